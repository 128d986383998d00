"""From the project on disk to Dagster's `Definitions`."""

import logging
from collections.abc import Sequence

import dagster as dg

from synpipe.datasets import Dataset, Project
from synpipe.defs.assets import dataset_assets
from synpipe.defs.schedules import build_automation

logger = logging.getLogger("synpipe")


def build_definitions(project: Project | None = None, names: Sequence[str] | None = None) -> dg.Definitions:
    """The assets of the named data sets, or of every data set whose source files exist.

    Raises `SynpipeError` for a wrong YAML file; the UI then shows the message.
    """
    project = project or Project.locate()
    datasets = available_datasets(project) if names is None else [project.dataset(name) for name in names]
    assets = [asset for dataset in datasets for asset in dataset_assets(dataset)]
    schedule, sensor = build_automation(project, datasets)
    # One process suits a chain of short steps: it takes a fifth of the time of a process per step, and imports torch once.
    return dg.Definitions(
        assets=assets,
        schedules=[schedule],
        sensors=[sensor],
        executor=dg.in_process_executor,
        loggers={"progress": progress_logger},
    )


def available_datasets(project: Project) -> list[Dataset]:
    """The data sets whose files exist. The others are skipped with a warning, so that the graph can be loaded."""
    datasets = [project.dataset(name) for name in project.dataset_names()]
    missing = {dataset.name: dataset.missing_sources() for dataset in datasets}
    skipped = [f"{name} ({files[0]})" for name, files in missing.items() if files]
    if skipped:
        logger.warning("Skipping data sets whose files do not exist: %s.", ", ".join(skipped))
    return [dataset for dataset in datasets if not missing[dataset.name]]


@dg.logger
def progress_logger(_context: dg.InitLoggerContext) -> logging.Logger:
    """One line per message of an asset, for a terminal. Dagster's own events are for its UI."""
    handler = logging.StreamHandler()
    handler.addFilter(lambda record: getattr(record, "dagster_meta", {}).get("dagster_event") is None)
    handler.setFormatter(_Line())
    log = logging.Logger("progress", level=logging.INFO)
    log.addHandler(handler)
    return log


class _Line(logging.Formatter):
    """`12:00:00  demo/rgb_tiles  1,304 tiles`: Dagster's own prefix of run and step ids is for machines."""

    def format(self, record: logging.LogRecord) -> str:
        details = getattr(record, "dagster_meta", {})
        message = details.get("orig_message", record.getMessage())
        step = (details.get("step_key") or "").replace("__", "/")
        return f"{self.formatTime(record, '%H:%M:%S')}  {step:<44} {message}"
