"""The Dagster code location of synpipe: `defs` is what `workspace.yaml` names. Only this package imports Dagster.

`defs` is made when Dagster asks for it. The command line uses other modules of this package, for one data set, and need not wait
for the graphs of all.
"""

from typing import Any


def __getattr__(name: str) -> Any:
    if name != "defs":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from synpipe.defs.definitions import build_definitions

    return build_definitions()
