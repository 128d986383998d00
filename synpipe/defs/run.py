"""Dagster from the command line: a home for its history, materialising in this process, the UI.

Guarantee: what the command line materialises is in the same history that the UI shows.
"""

import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import dagster as dg

from synpipe.datasets import Project
from synpipe.defs.definitions import build_definitions
from synpipe.errors import SynpipeError
from synpipe.shards import write_text

# The environment variable alone does not switch all of the telemetry off: the page would still fetch a script.
INSTANCE_YAML = """\
telemetry:
  enabled: false
concurrency:
  pools:
    default_limit: 1
"""


def prepare_home(project: Project) -> Path:
    """Make the folder that holds Dagster's history, and name it in DAGSTER_HOME unless that is set.

    It lies in the store: a history belongs to the files that it tells of.
    """
    home = Path(os.environ.get("DAGSTER_HOME") or project.store / "dagster_home")
    if not (home / "dagster.yaml").exists():
        write_text(home / "dagster.yaml", INSTANCE_YAML)
    # The page asks every new visitor for an e-mail address unless this file says that it has done so.
    if not (home / ".nux" / "nux.yaml").exists():
        write_text(home / ".nux" / "nux.yaml", "seen: 1\n")
    os.environ["DAGSTER_HOME"] = str(home)
    os.environ["SYNPIPE_STORE"] = str(project.store)
    os.environ["SYNPIPE_DATA"] = str(project.data)
    return home


def materialize(project: Project, dataset: str, selection: Sequence[str] = ()) -> None:
    """Materialise a data set's assets in this process, as a run of the project's Dagster instance.

    selection: asset names without the data set, in Dagster's selection syntax (`embeddings_x*`: that one and what lies
    downstream); none means all.
    Raises `SynpipeError` with the message of the asset that failed.
    """
    prepare_home(project)
    definitions = build_definitions(project, [dataset])
    graph = definitions.resolve_asset_graph()
    keys = _selected(definitions, dataset, selection)
    with dg.DagsterInstance.get() as instance:
        result = definitions.resolve_implicit_global_asset_job_def().execute_in_process(
            instance=instance,
            asset_selection=sorted(keys & graph.materializable_asset_keys, key=str),
            run_config={"loggers": {"progress": {}}},
            raise_on_error=False,
        )
    if not result.success:
        raise SynpipeError(_why(result))


def _selected(definitions: dg.Definitions, dataset: str, selection: Sequence[str]) -> set[dg.AssetKey]:
    graph = definitions.resolve_asset_graph()
    if not selection:
        return set(graph.materializable_asset_keys)
    names = {key.path[-1] for key in graph.materializable_asset_keys}
    found: set[dg.AssetKey] = set()
    for item in selection:
        name = item.strip("*+")
        if name not in names:
            raise SynpipeError(f"{dataset} has no asset {name!r}. Its assets: {', '.join(sorted(names))}.")
        whole = item.replace(name, f"{dataset}/{name}")
        found |= dg.AssetSelection.from_string(whole.replace("*", "+")).resolve(graph)
    return found


def _why(result: dg.ExecuteInProcessResult) -> str:
    """The message of the first asset that failed, or of the check that stopped the chain."""
    for event in result.all_events:
        if event.is_step_failure:
            data = event.step_failure_data.user_failure_data
            if data and data.description:
                return f"{str(event.step_key).replace('__', '/', 1)}: {data.description}"
    for check in result.get_asset_check_evaluations():
        if not check.passed:
            return f"{check.asset_key.to_user_string()}: the check {check.check_name} failed. {check.description}"
    for event in result.all_events:
        if event.is_failure:
            return f"{event.step_key or 'the run'}: {event.message}"
    return "The run failed; `synpipe ui` shows why."


def serve_ui(project: Project, host: str, port: int) -> None:
    """Replace this process by `dagster dev` on the project's code location."""
    prepare_home(project)
    workspace = project.data.parent / "workspace.yaml"
    where = ["-w", str(workspace)] if workspace.exists() else ["-m", "synpipe.defs"]
    program = shutil.which("dagster", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    if program is None:
        raise SynpipeError("The program `dagster` is not installed beside synpipe: install the lock file again.")
    os.execv(program, [program, "dev", *where, "-h", host, "-p", str(port)])
