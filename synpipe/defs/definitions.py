"""From the project on disk to Dagster's `Definitions`.

A data set whose YAML file is wrong, or whose files are absent, stops no other one. It appears in the graph, says what is wrong, and
its first asset fails. The process of a run loads the project again. It has the assets that the UI offered, whatever happened to
the files since; else Dagster would refuse the whole run.
"""

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import dagster as dg

# The only way by which Dagster tells a run what was loaded before.
from dagster._core.definitions.definitions_load_context import DefinitionsLoadContext, DefinitionsLoadType

from synpipe.datasets import Project
from synpipe.defs.assets import FailingAsset, build_failing_asset, dataset_assets, first_asset_key
from synpipe.defs.executor import one_process
from synpipe.defs.loading import load_datasets
from synpipe.defs.schedules import build_automation

OFFERED = "synpipe/assets"  # the key under which Dagster keeps what the UI offers
DEPENDENCIES_FAILED = "Dependencies for step "  # how Dagster's message on a step that it leaves out begins


def build_definitions(project: Project | None = None, names: Sequence[str] | None = None) -> dg.Definitions:
    """The assets of the named data sets, or of every data set.

    Raises `SynpipeError` if the file of a named data set is wrong.
    """
    project = project or Project.locate()
    problems: dict[str, str] = {}
    if names is None:
        datasets, problems = load_datasets(project)
    else:
        datasets = [project.dataset(name) for name in names]
    assets = [asset for dataset in datasets for asset in dataset_assets(dataset)]
    assets += [build_failing_asset(FailingAsset(first_asset_key(name), text)) for name, text in problems.items()]
    if names is None:
        assets = _as_offered(assets, problems)
    schedule, sensor = build_automation(project, datasets)
    # One process suits a chain of short steps: it takes a fifth of the time of a process per step, and imports torch once.
    return dg.Definitions(
        assets=assets,
        schedules=[schedule],
        sensors=[sensor],
        executor=one_process,
        loggers={"progress": progress_logger},
    )


def _as_offered(assets: Sequence[dg.AssetsDefinition], problems: Mapping[str, str]) -> list[dg.AssetsDefinition]:
    """These assets, and in the process of a run also those that the UI offered and that the files no longer describe."""
    context = DefinitionsLoadContext.get()
    offered = [_describe(asset) for asset in assets]
    if context.load_type is DefinitionsLoadType.RECONSTRUCTION:
        offered = json.loads(context.reconstruction_metadata.get(OFFERED, "[]"))
    context.add_to_pending_reconstruction_metadata(OFFERED, json.dumps(offered))
    return [*assets, *_gone_assets(assets, offered, problems)]


def _describe(asset: dg.AssetsDefinition) -> dict[str, Any]:
    """What Dagster must know of an asset to accept it in a run, in a JSON-able form."""
    (spec,) = asset.specs
    deps = [list(dependency.asset_key.path) for dependency in spec.deps]
    return {"key": list(spec.key.path), "deps": deps, "checks": [check.name for check in asset.check_specs]}


def _gone_assets(
    assets: Sequence[dg.AssetsDefinition], offered: Sequence[Mapping[str, Any]], problems: Mapping[str, str]
) -> Iterator[dg.AssetsDefinition]:
    present = {asset.key for asset in assets}
    for each in offered:
        key = dg.AssetKey(each["key"])
        if key in present:
            continue
        changed = (
            f"{key.to_user_string()} is no longer described by the files of the project, which changed after they were loaded. "
            "Reload the code location in the UI under Deployment."
        )
        problem = problems.get(key.path[0], changed)
        deps = tuple(dg.AssetKey(path) for path in each["deps"])
        yield build_failing_asset(FailingAsset(key, problem, deps, tuple(each["checks"])))


@dg.logger
def progress_logger(_context: dg.InitLoggerContext) -> logging.Logger:
    """One line per message of an asset, for a terminal. Dagster's own events are for its UI."""
    handler = logging.StreamHandler()
    handler.addFilter(lambda record: getattr(record, "dagster_meta", {}).get("dagster_event") is None)
    # The command ends with the asset that failed first and the reason. A line for each asset downstream would bury that.
    handler.addFilter(lambda record: not _original_message(record).startswith(DEPENDENCIES_FAILED))
    handler.setFormatter(_Line())
    log = logging.Logger("progress", level=logging.INFO)
    log.addHandler(handler)
    return log


class _Line(logging.Formatter):
    """`12:00:00  demo/rgb_tiles  1,304 tiles`: Dagster's own prefix of run and step ids is for machines."""

    def format(self, record: logging.LogRecord) -> str:
        details = getattr(record, "dagster_meta", {})
        message = _original_message(record)
        step = (details.get("step_key") or "").replace("__", "/")
        return f"{self.formatTime(record, '%H:%M:%S')}  {step:<44} {message}"


def _original_message(record: logging.LogRecord) -> str:
    """The message without Dagster's prefix of run and step ids."""
    return str(getattr(record, "dagster_meta", {}).get("orig_message", record.getMessage()))
