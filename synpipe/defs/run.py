"""Dagster from the command line: a home for its history, materialising in this process, and the UI.

What the command line materialises is in the same history that the UI shows.
"""

import os
import signal
import sys
import uuid
from collections.abc import Sequence
from pathlib import Path

import dagster as dg
import sqlalchemy.exc
from dagster._core.definitions.job_base import InMemoryJob
from dagster._core.execution.execute_in_process import core_execute_in_process

from synpipe.assets.graph import find_node
from synpipe.datasets import Dataset, Project
from synpipe.defs.assets import asset_key
from synpipe.defs.definitions import build_definitions
from synpipe.defs.locks import fail_dead_runs, open_history, register_run
from synpipe.errors import SynpipeError
from synpipe.store.files import write_text

# The environment variable alone does not switch off all telemetry: the page would still fetch a script.
INSTANCE_YAML = """\
telemetry:
  enabled: false
"""


def prepare_home(project: Project) -> Path:
    """Create the folder of Dagster's history and set DAGSTER_HOME to it, unless DAGSTER_HOME is set.

    It lies in the store, because a history belongs to the files that it describes.
    Raises `SynpipeError` if the folder cannot be written.
    """
    home = Path(os.environ.get("DAGSTER_HOME") or project.store / "dagster_home").resolve()
    if not (home / "dagster.yaml").exists():
        write_text(home / "dagster.yaml", INSTANCE_YAML)
    # Without this file the page asks every new visitor for an e-mail address.
    if not (home / ".nux" / "nux.yaml").exists():
        write_text(home / ".nux" / "nux.yaml", "seen: 1\n")
    # A store that is shared read-only has these files already; SQLite would fail later, with a traceback.
    if not os.access(home, os.W_OK):
        raise SynpipeError(
            f"Cannot write {home}: this store can be searched, but nothing can be made in it. Choose another store with "
            "--store or SYNPIPE_STORE."
        )
    os.environ["DAGSTER_HOME"] = str(home)
    os.environ["SYNPIPE_STORE"] = str(project.store)
    os.environ["SYNPIPE_DATA"] = str(project.data)
    return home


def materialize(project: Project, dataset_name: str, selection: Sequence[str] = ()) -> None:
    """Materialise assets of a data set in this process, as a run of the project's Dagster instance.

    selection: names of assets, see `graph.find_node`. `x+` adds all that lies downstream of x, `+x` all upstream. An empty
    selection means all assets.
    Raises `SynpipeError` with the message of the asset that failed, or if the history cannot be written.
    """
    home = prepare_home(project)
    definitions = build_definitions(project, [dataset_name])
    keys = _select(definitions, project.dataset(dataset_name), selection)
    run_id = str(uuid.uuid4())
    try:
        with open_history(project.store) as instance:
            register_run(instance, project.store, run_id)
            result = _execute(definitions, instance, run_id, frozenset(keys))
    except sqlalchemy.exc.DatabaseError as error:
        raise SynpipeError(
            f"Dagster's history in {home} cannot be written ({error.orig}). Check the space and the permissions of that "
            "folder, or delete it if it is damaged; nothing but the history is lost."
        ) from None
    if not result.success:
        raise SynpipeError(_explain_failure(result))


def _execute(
    definitions: dg.Definitions, instance: dg.DagsterInstance, run_id: str, keys: frozenset[dg.AssetKey]
) -> dg.ExecuteInProcessResult:
    """Make the assets with the executor of the definitions; Dagster's public function replaces it by its own."""
    job = definitions.resolve_implicit_global_asset_job_def().get_subset(asset_selection=keys)
    return core_execute_in_process(
        run_config={"loggers": {"progress": {}}},
        job=InMemoryJob(job),
        instance=instance,
        output_capturing_enabled=False,
        raise_on_error=False,
        run_id=run_id,
        asset_selection=keys,
    )


def _select(definitions: dg.Definitions, dataset: Dataset, selection: Sequence[str]) -> set[dg.AssetKey]:
    graph = definitions.resolve_asset_graph()
    if not selection:
        return set(graph.materializable_asset_keys)
    keys: set[dg.AssetKey] = set()
    for item in selection:
        chosen = dg.AssetSelection.assets(asset_key(find_node(dataset, item.removeprefix("+").removesuffix("+"))))
        keys |= chosen.resolve(graph)
        if item.startswith("+"):
            keys |= chosen.upstream().resolve(graph)
        if item.endswith("+"):
            keys |= chosen.downstream().resolve(graph)
    return keys


def _explain_failure(result: dg.ExecuteInProcessResult) -> str:
    """The message of the first asset that failed, or the check that stopped the chain, and the names of other failed assets."""
    failed_checks = {
        check.asset_key.to_user_string(): check for check in result.get_asset_check_evaluations() if not check.passed
    }
    reasons = {}
    for event in result.all_events:
        if not event.is_step_failure:
            continue
        asset = str(event.step_key).replace("__", "/")
        failure = event.step_failure_data
        if failure.user_failure_data:
            reasons[asset] = str(failure.user_failure_data.description)
        elif asset in failed_checks:
            check = failed_checks[asset]
            reasons[asset] = f"the check {check.check_name} failed. {check.description}"
        else:
            error = failure.error and (failure.error.cause or failure.error)
            if error and error.cls_name == dg.DagsterExecutionInterruptedError.__name__:
                return f"{asset}: interrupted. What is finished is kept, and the same command carries on from there."
            message = " ".join(error.message.split()) if error else "no reason given"
            reasons[asset] = f"{message}. This is a fault in synpipe; `synpipe ui` shows the run."
    if not reasons:
        return "The run failed; `synpipe ui` shows why."
    (asset, reason), *others = reasons.items()
    return f"{asset}: {reason}" + (f" Also failed: {', '.join(other for other, _ in others)}." if others else "")


def serve_ui(project: Project, host: str, port: int) -> None:
    """Replace this process by `dagster dev`, with a guarded web server, on the project's code location."""
    prepare_home(project)
    workspace = project.data.parent / "workspace.yaml"
    location = ["-w", str(workspace)] if workspace.exists() else ["-m", "synpipe.defs", "-a", "defs"]
    with open_history(project.store) as instance:
        fail_dead_runs(instance, project.store)
    # A shell that starts a program in the background makes it ignore Ctrl-C, and Dagster treats SIGTERM as Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    ignored = "ignore:Function `dev_command` is superseded"  # by a tool for projects of another layout
    os.environ["PYTHONWARNINGS"] = ",".join(filter(None, [os.environ.get("PYTHONWARNINGS"), ignored]))
    program = [sys.executable, "-m", "synpipe.defs.web_server", "dev"]
    os.execv(sys.executable, [*program, *location, "-h", host, "-p", str(port)])
