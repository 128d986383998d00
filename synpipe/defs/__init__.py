"""The Dagster code location of synpipe: `defs` is what `workspace.yaml` names. Only this package imports Dagster.

The definitions are made when Dagster asks for them. The command line uses other modules of this package, for one data set, and need
not wait for the graphs of all.
"""

import dagster as dg


@dg.definitions
def defs() -> dg.Definitions:
    """The assets of the project that the environment names. Dagster calls this function when it loads the location."""
    from synpipe.defs.definitions import build_definitions

    return build_definitions()
