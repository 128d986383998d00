"""Scheduled re-embedding: ask the files what is out of date, and request exactly that.

In: the project as it is on disk, and Dagster's runs. Out: one request for a run, or the reason why there is none.
Guarantees: planned from the state of the files, not from events, so that a source that changed with nobody telling Dagster
is seen; no run is requested while another is at work on the same assets; a run that failed or was killed is asked for
again, but `MAX_ATTEMPTS` runs in a row at the most that leave the same assets out of date for the same reasons.
"""

import os
import time
from collections.abc import Collection, Mapping, Sequence

import dagster as dg

from synpipe.assets.graph import states, steps
from synpipe.assets.pipeline import status_of
from synpipe.datasets import Dataset, Project
from synpipe.defs.assets import asset_key
from synpipe.defs.locks import DIED, fail_dead_runs
from synpipe.errors import SynpipeError
from synpipe.specs import digest

NIGHTLY = "0 3 * * *"  # UTC; SYNPIPE_SCHEDULE replaces it
MAX_ATTEMPTS = 3
JOB = "materialize"
PLAN_TAG = "synpipe/plan"
SENSOR_INTERVAL_S = 60
START_TIMEOUT_S = 300  # a run's process needs some seconds; on a machine under load, a minute

CodeVersions = Mapping[dg.AssetKey, str]
UNFINISHED = [
    dg.DagsterRunStatus.QUEUED,
    dg.DagsterRunStatus.NOT_STARTED,
    dg.DagsterRunStatus.STARTING,
    dg.DagsterRunStatus.STARTED,
    dg.DagsterRunStatus.CANCELING,
]


def build_automation(
    project: Project, datasets: Sequence[Dataset]
) -> tuple[dg.ScheduleDefinition, dg.SensorDefinition]:
    """The schedule `nightly`, on by default, and the sensor `sources_changed`, off by default; both plan alike.

    Raises `SynpipeError` where SYNPIPE_SCHEDULE is no cron expression.
    """
    loaded = _code_versions(datasets)
    job = dg.define_asset_job(JOB, dg.AssetSelection.all())
    cron = os.environ.get("SYNPIPE_SCHEDULE") or NIGHTLY

    def nightly(context: dg.ScheduleEvaluationContext) -> dg.RunRequest | dg.SkipReason:
        return plan(project, loaded, context.instance)

    @dg.sensor(
        job=job,
        minimum_interval_seconds=SENSOR_INTERVAL_S,
        default_status=dg.DefaultSensorStatus.STOPPED,
        description="Does what the schedule does, within a minute after an annotation file, a volume or a spec changed.",
    )
    def sources_changed(context: dg.SensorEvaluationContext) -> dg.RunRequest | dg.SkipReason:
        return plan(project, loaded, context.instance)

    try:
        schedule = dg.schedule(
            job=job,
            cron_schedule=cron,
            default_status=dg.DefaultScheduleStatus.RUNNING,
            description="Materialises exactly what is stale or missing, also where a source changed with nobody telling.",
        )(nightly)
    except dg.DagsterInvalidDefinitionError:
        raise SynpipeError(
            f"SYNPIPE_SCHEDULE is {cron!r}, which is no cron expression: give minute, hour, day, month and weekday, as in "
            f"{NIGHTLY!r}, every night at 3 UTC."
        ) from None
    return schedule, sources_changed


def plan(project: Project, loaded: CodeVersions, instance: dg.DagsterInstance) -> dg.RunRequest | dg.SkipReason:
    """One run of everything that is out of date, or why there is none.

    loaded: code versions of the assets as this code location knows them; the specs are read again from the files.
    """
    try:
        # A fresh project: this one may remember the registry as it was.
        return _plan(Project(project.data, project.store), loaded, instance)
    except SynpipeError as error:
        return dg.SkipReason(f"Nothing can be planned: {error}")


def _plan(project: Project, loaded: CodeVersions, instance: dg.DagsterInstance) -> dg.RunRequest | dg.SkipReason:
    datasets = _datasets(project, {key.path[0] for key in loaded})
    now = _code_versions(datasets)
    changed = sorted(key.to_user_string() for key in now.keys() | loaded.keys() if now.get(key) != loaded.get(key))
    if changed:
        return dg.SkipReason(
            "encoders.yaml, a data set's YAML file or a file of weights changed after this code location was loaded: "
            f"reload it in the UI under Deployment. It concerns {_listed(changed)}."
        )
    found = {asset_key(dataset, state.asset): state for dataset in datasets for state in states(dataset)}
    stale = [key for key, state in found.items() if state.state != "fresh"]
    if not stale:
        return dg.SkipReason("every asset is up to date")
    at_work = _run_at_work(project, stale, instance)
    if at_work:
        return dg.SkipReason(f"run {at_work} is at work on these assets")

    # What the plan rests on. After a change of any of it the runs are counted anew.
    reasons = [[key.to_user_string(), now[key], state.state, *state.reasons] for key, state in found.items()]
    sources = [status_of(dataset.source_files()) for dataset in datasets]
    wanted = digest([reasons, sources])
    last = instance.get_runs(dg.RunsFilter(job_name=JOB), limit=MAX_ATTEMPTS)
    if len(last) == MAX_ATTEMPTS and {run.tags.get(PLAN_TAG) for run in last} == {wanted}:
        return dg.SkipReason(
            f"{MAX_ATTEMPTS} runs in a row have left the same assets out of date: "
            f"{_listed([key.to_user_string() for key in stale])}. The last run, {last[0].run_id}, says why. Mend that; if it "
            "is in none of the project's files, materialise by hand then."
        )
    return dg.RunRequest(asset_selection=stale, tags={PLAN_TAG: wanted})


def _datasets(project: Project, loaded: Collection[str]) -> list[Dataset]:
    """What reloading the code location would find, without leaving out a loaded data set whose files are gone."""
    found = [project.dataset(name) for name in project.dataset_names()]
    return [dataset for dataset in found if dataset.name in loaded or not dataset.missing_sources()]


def _code_versions(datasets: Sequence[Dataset]) -> CodeVersions:
    return {asset_key(dataset, step.asset): step.code_version for dataset in datasets for step in steps(dataset)}


def _run_at_work(project: Project, assets: Collection[dg.AssetKey], instance: dg.DagsterInstance) -> str | None:
    """Id of an unfinished run of any of the assets; runs whose process has died are marked as failed on the way."""
    alive = fail_dead_runs(instance, project.store)
    for record in instance.get_run_records(dg.RunsFilter(statuses=UNFINISHED)):
        run = record.dagster_run
        # Without a selection it is of all assets of its job; whether that job is one of this project, only the lock says.
        if (run.run_id not in alive) if run.asset_selection is None else run.asset_selection.isdisjoint(assets):
            continue
        waits = run.status == dg.DagsterRunStatus.QUEUED
        starts = time.time() - record.update_timestamp.timestamp() < START_TIMEOUT_S
        if waits or starts or run.run_id in alive:
            return run.run_id
        instance.report_run_failed(run, DIED)  # killed before it could register
    return None


def _listed(names: Sequence[str], most: int = 4) -> str:
    return f"{', '.join(names[:most])}{' …' if len(names) > most else ''}"
