"""The Dagster code location of synpipe: `defs` is what `workspace.yaml` names. Only this package imports Dagster."""

from synpipe.defs.definitions import build_definitions

defs = build_definitions()
