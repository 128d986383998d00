"""Scheduled re-embedding: ask the files what is out of date, and request exactly that.

Planned from the state of the files, not from events: a source that changed with nobody telling Dagster is seen, and a run
that failed is asked for again, `MAX_ATTEMPTS` times at the most.
"""

import os
from collections.abc import Mapping, Sequence

import dagster as dg

from synpipe.datasets import Dataset, Project
from synpipe.defs.assets import asset_key
from synpipe.errors import SynpipeError
from synpipe.graph import states, steps
from synpipe.specs import digest

NIGHTLY = "0 3 * * *"  # SYNPIPE_SCHEDULE replaces it
MAX_ATTEMPTS = 3
PLAN_TAG = "synpipe/plan"
SENSOR_INTERVAL_S = 60


def build_automation(
    project: Project, datasets: Sequence[Dataset]
) -> tuple[dg.ScheduleDefinition, dg.SensorDefinition]:
    """The schedule `nightly`, on by default, and the sensor `sources_changed`, off by default; both plan alike."""
    loaded = _code_versions(datasets)
    names = [dataset.name for dataset in datasets]
    job = dg.define_asset_job("materialize", dg.AssetSelection.all())

    @dg.schedule(
        job=job,
        cron_schedule=os.environ.get("SYNPIPE_SCHEDULE") or NIGHTLY,
        default_status=dg.DefaultScheduleStatus.RUNNING,
        description="Materialises exactly what is stale or missing, also where a source changed with nobody telling.",
    )
    def nightly(context: dg.ScheduleEvaluationContext) -> dg.RunRequest | dg.SkipReason:
        return plan(project, names, loaded, context.instance)

    @dg.sensor(
        job=job,
        minimum_interval_seconds=SENSOR_INTERVAL_S,
        default_status=dg.DefaultSensorStatus.STOPPED,
        description="The same as soon as an annotation file, a volume or a spec changes.",
    )
    def sources_changed(context: dg.SensorEvaluationContext) -> dg.RunRequest | dg.SkipReason:
        return plan(project, names, loaded, context.instance)

    return nightly, sources_changed


def plan(
    project: Project, names: Sequence[str], loaded: Mapping[dg.AssetKey, str], instance: dg.DagsterInstance
) -> dg.RunRequest | dg.SkipReason:
    """One run of everything that is out of date, or why there is none.

    loaded: code versions of the assets as this code location knows them; the specs are read again from the files.
    """
    try:
        datasets = [Project(project.data, project.store).dataset(name) for name in names]
        now = _code_versions(datasets)
    except SynpipeError as error:
        return dg.SkipReason(f"The configuration cannot be read: {error}")
    changed = sorted(key.to_user_string() for key in now.keys() | loaded.keys() if now.get(key) != loaded.get(key))
    if changed:
        return dg.SkipReason(
            f"encoders.yaml or a data set's YAML changed after this code location was loaded ({', '.join(changed[:3])}"
            f"{' …' if len(changed) > 3 else ''}): reload it in the UI under Deployment."
        )
    stale = [
        asset_key(dataset, state.asset) for dataset in datasets for state in states(dataset) if state.state != "fresh"
    ]
    if not stale:
        return dg.SkipReason("every asset is up to date")

    wanted = digest([key.to_user_string() for key in stale] + [_versions_now(dataset) for dataset in datasets])
    runs = instance.get_runs(dg.RunsFilter(tags={PLAN_TAG: wanted}), limit=MAX_ATTEMPTS)
    if any(not run.is_finished for run in runs):
        return dg.SkipReason("a run of these assets is under way")
    if len(runs) == MAX_ATTEMPTS and all(run.is_failure_or_canceled for run in runs):
        return dg.SkipReason(
            f"{MAX_ATTEMPTS} runs of these assets failed, the last being {runs[0].run_id}: mend what it tells of, and "
            "materialise by hand."
        )
    return dg.RunRequest(asset_selection=stale, tags={PLAN_TAG: wanted})


def _code_versions(datasets: Sequence[Dataset]) -> dict[dg.AssetKey, str]:
    return {asset_key(dataset, step.asset): step.code_version for dataset in datasets for step in steps(dataset)}


def _versions_now(dataset: Dataset) -> list[str]:
    """What the plan rests on: an attempt after a change is another plan, and counted anew."""
    return [f"{state.asset} {state.state} {' '.join(state.reasons)}" for state in states(dataset)]
