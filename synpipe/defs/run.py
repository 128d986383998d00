"""Dagster from the command line: a home for its history, materialising in this process, the UI.

Guarantee: what the command line materialises is in the same history that the UI shows.
"""

import os
import shutil
import signal
import sys
import uuid
from collections.abc import Sequence
from pathlib import Path

import dagster as dg
import sqlalchemy.exc

from synpipe.datasets import Project
from synpipe.defs.definitions import build_definitions
from synpipe.defs.locks import fail_dead_runs, open_history, register_run
from synpipe.embeddings.registry import branch_name
from synpipe.errors import SynpipeError
from synpipe.store.files import write_text

# The environment variable alone does not switch all of the telemetry off: the page would still fetch a script.
INSTANCE_YAML = """\
telemetry:
  enabled: false
"""


def prepare_home(project: Project) -> Path:
    """Make the folder that holds Dagster's history, and name it in DAGSTER_HOME unless that is set.

    It lies in the store: a history belongs to the files that it tells of.
    Raises `SynpipeError` where it cannot be written.
    """
    home = Path(os.environ.get("DAGSTER_HOME") or project.store / "dagster_home").resolve()
    if not (home / "dagster.yaml").exists():
        write_text(home / "dagster.yaml", INSTANCE_YAML)
    # The page asks every new visitor for an e-mail address unless this file says that it has done so.
    if not (home / ".nux" / "nux.yaml").exists():
        write_text(home / ".nux" / "nux.yaml", "seen: 1\n")
    # A store that somebody shares read-only has these files already; SQLite would fail later, with a traceback.
    if not os.access(home, os.W_OK):
        raise SynpipeError(
            f"Cannot write {home}: this store can be searched, but nothing can be made in it. Choose another one with "
            "--store or SYNPIPE_STORE."
        )
    os.environ["DAGSTER_HOME"] = str(home)
    os.environ["SYNPIPE_STORE"] = str(project.store)
    os.environ["SYNPIPE_DATA"] = str(project.data)
    return home


def materialize(project: Project, dataset: str, selection: Sequence[str] = ()) -> None:
    """Materialise a data set's assets in this process, as a run of the project's Dagster instance.

    selection: asset names without the data set; `x+` is that one and all downstream of it, `+x` all upstream. None
    means all.
    Raises `SynpipeError` with the message of the asset that failed, or where the history cannot be written.
    """
    home = prepare_home(project)
    definitions = build_definitions(project, [dataset])
    keys = _selected(definitions, dataset, selection)
    run_id = str(uuid.uuid4())
    try:
        with open_history(project.store) as instance:
            register_run(instance, project.store, run_id)
            result = definitions.resolve_implicit_global_asset_job_def().execute_in_process(
                instance=instance,
                run_id=run_id,
                asset_selection=sorted(keys),
                run_config={"loggers": {"progress": {}}},
                raise_on_error=False,
            )
    except sqlalchemy.exc.DatabaseError as error:
        raise SynpipeError(
            f"Dagster's history in {home} cannot be written ({error.orig}): check the space and the permissions of that "
            "folder, or delete it if it is damaged; nothing but the history is lost."
        ) from None
    if not result.success:
        raise SynpipeError(_why(result))


def _selected(definitions: dg.Definitions, dataset: str, selection: Sequence[str]) -> set[dg.AssetKey]:
    graph = definitions.resolve_asset_graph()
    keys = {key.path[-1]: key for key in graph.materializable_asset_keys}
    if not selection:
        return set(keys.values())
    found: set[dg.AssetKey] = set()
    for item in selection:
        name = branch_name(item.removeprefix("+").removesuffix("+"))
        if name not in keys:
            raise SynpipeError(f"{dataset} has no asset {name!r}. Its assets: {', '.join(sorted(keys))}.")
        chosen = dg.AssetSelection.assets(keys[name])
        found |= chosen.resolve(graph)
        if item.startswith("+"):
            found |= chosen.upstream().resolve(graph)
        if item.endswith("+"):
            found |= chosen.downstream().resolve(graph)
    return found


def _why(result: dg.ExecuteInProcessResult) -> str:
    """What the first asset that failed says, or the check that stopped the chain; and which others failed."""
    checks = {
        check.asset_key.to_user_string(): check for check in result.get_asset_check_evaluations() if not check.passed
    }
    reasons = {}
    for event in result.all_events:
        if not event.is_step_failure:
            continue
        asset = str(event.step_key).replace("__", "/", 1)
        failure = event.step_failure_data
        if failure.user_failure_data:
            reasons[asset] = str(failure.user_failure_data.description)
        elif asset in checks:
            reasons[asset] = f"the check {checks[asset].check_name} failed. {checks[asset].description}"
        else:
            error = failure.error and (failure.error.cause or failure.error)
            if error and error.cls_name == dg.DagsterExecutionInterruptedError.__name__:
                return f"{asset}: interrupted. What is finished is kept, and the same command carries on from there."
            message = " ".join(error.message.split()) if error else "no reason given"
            reasons[asset] = f"{message}. That is a fault in synpipe; `synpipe ui` shows the run."
    if not reasons:
        return "The run failed; `synpipe ui` shows why."
    (asset, reason), *others = reasons.items()
    return f"{asset}: {reason}" + (f" Failed too: {', '.join(other for other, _ in others)}." if others else "")


def serve_ui(project: Project, host: str, port: int) -> None:
    """Replace this process by `dagster dev` on the project's code location."""
    prepare_home(project)
    workspace = project.data.parent / "workspace.yaml"
    where = ["-w", str(workspace)] if workspace.exists() else ["-m", "synpipe.defs"]
    program = shutil.which("dagster", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    if program is None:
        raise SynpipeError("The program `dagster` is not installed beside synpipe: install the lock file again.")
    with open_history(project.store) as instance:
        fail_dead_runs(instance, project.store)
    # A shell that starts a program in the background lets it ignore Ctrl-C, and Dagster treats SIGTERM as Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    ignored = "ignore:Function `dev_command` is superseded"  # by a tool for projects of another layout
    os.environ["PYTHONWARNINGS"] = ",".join(filter(None, [os.environ.get("PYTHONWARNINGS"), ignored]))
    os.execv(program, [program, "dev", *where, "-h", host, "-p", str(port)])
