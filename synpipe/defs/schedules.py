"""Scheduled re-embedding: read from the files what is out of date, and request exactly that.

The plan is one request for a run, or the reason why there is none. It follows from the state of the files and not from events, so
it includes sources that changed without Dagster's notice. No run is requested while another works on the same assets. A run that
failed or was killed is requested again, but at most `MAX_ATTEMPTS` runs in a row may leave the same assets out of date for the
same reasons.
"""

import os
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

import dagster as dg

from synpipe.assets.graph import ASSETS, nodes, states
from synpipe.assets.manifest import find_manifest
from synpipe.assets.volume import status_of_files
from synpipe.datasets import Dataset, Project
from synpipe.defs.assets import asset_key
from synpipe.defs.loading import load_datasets
from synpipe.defs.locks import DIED, fail_dead_runs
from synpipe.errors import SynpipeError
from synpipe.specs import digest

NIGHTLY = "0 3 * * *"  # UTC; SYNPIPE_SCHEDULE replaces it
MAX_ATTEMPTS = 3
JOB = "materialize"
PLAN_TAG = "synpipe/plan"
SENSOR_INTERVAL_S = 60
START_TIMEOUT_S = 300  # the process of a run starts within seconds, or within a minute on a machine under load

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
    """The schedule `nightly`, on by default, and the sensor `sources_changed`, off by default; both make the same plan.

    Raises `SynpipeError` if SYNPIPE_SCHEDULE is not a cron expression.
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
        description="Does what the schedule does, within a minute after an annotation file, a volume or a spec has changed.",
    )
    def sources_changed(context: dg.SensorEvaluationContext) -> dg.RunRequest | dg.SkipReason:
        return plan(project, loaded, context.instance)

    try:
        schedule = dg.schedule(
            job=job,
            cron_schedule=cron,
            default_status=dg.DefaultScheduleStatus.RUNNING,
            description="Materialises exactly what is stale or missing, even if a source changed without notice.",
        )(nightly)
    except dg.DagsterInvalidDefinitionError:
        raise SynpipeError(
            f"SYNPIPE_SCHEDULE is {cron!r}, which is not a cron expression. Give minute, hour, day, month and weekday, such as "
            f"{NIGHTLY!r} for every night at 3:00 UTC."
        ) from None
    return schedule, sources_changed


def plan(project: Project, loaded: CodeVersions, instance: dg.DagsterInstance) -> dg.RunRequest | dg.SkipReason:
    """One run of everything that is out of date, or the reason why there is none.

    loaded: code versions of the assets when this code location was loaded. The specs are read again from the files.
    """
    try:
        # A new project object, because this one may hold a former registry.
        return _plan(replace(project), loaded, instance)
    except SynpipeError as error:
        return dg.SkipReason(f"Nothing can be planned: {error}")


def _plan(project: Project, loaded: CodeVersions, instance: dg.DagsterInstance) -> dg.RunRequest | dg.SkipReason:
    found, problems = load_datasets(project)
    datasets = [dataset for dataset in found if not _waits_for_its_files(dataset)]
    now = _code_versions(datasets)
    left_out = {*problems, *(dataset.name for dataset in found if dataset not in datasets)}
    changed = sorted(
        key.to_user_string()
        for key in now.keys() | loaded.keys()
        if now.get(key) != loaded.get(key) and key.path[0] not in left_out
    )
    # A data set that cannot be planned stops no other one.
    changed_names = {key.partition("/")[0] for key in changed}
    datasets = [dataset for dataset in datasets if dataset.name not in changed_names]
    state_by_key = {
        asset_key(node): state
        for dataset in datasets
        for node, state in zip(nodes(dataset), states(dataset), strict=True)
    }
    stale = [key for key, state in state_by_key.items() if state.state != "fresh"]
    if not stale and problems:
        return dg.SkipReason(f"Nothing can be planned: {' '.join(dict.fromkeys(problems.values()))}")
    if not stale and changed:
        return dg.SkipReason(
            "encoders.yaml, a data set's YAML file or a file of weights changed after this code location was loaded: "
            f"reload it in the UI under Deployment. It concerns {_listed(changed)}."
        )
    if not stale:
        return dg.SkipReason("every asset is up to date")
    working_run = _find_working_run(project, stale, instance)
    if working_run:
        return dg.SkipReason(f"run {working_run} is working on these assets")

    # Everything that the plan depends on. A change of any of it starts the count of attempts again.
    reasons = [[key.to_user_string(), now[key], state.state, *state.reasons] for key, state in state_by_key.items()]
    sources = [status_of_files(dataset.source_files()) for dataset in datasets]
    plan_id = digest([reasons, sources])
    last = instance.get_runs(dg.RunsFilter(job_name=JOB), limit=MAX_ATTEMPTS)
    if len(last) == MAX_ATTEMPTS and {run.tags.get(PLAN_TAG) for run in last} == {plan_id}:
        return dg.SkipReason(
            f"{MAX_ATTEMPTS} runs in a row have left the same assets out of date: "
            f"{_listed([key.to_user_string() for key in stale])}. The last run, {last[0].run_id}, says why. Fix that. If the fix "
            "changes none of the project's files, materialise by hand afterwards."
        )
    return dg.RunRequest(asset_selection=stale, tags={PLAN_TAG: plan_id})


def _waits_for_its_files(dataset: Dataset) -> bool:
    """Whether source files do not exist and nothing was ever made of them, so that no run can help."""
    return bool(dataset.missing_sources()) and find_manifest(dataset, ASSETS[0].name) is None


def _code_versions(datasets: Sequence[Dataset]) -> CodeVersions:
    return {asset_key(node): node.code_version for dataset in datasets for node in nodes(dataset)}


def _find_working_run(project: Project, assets: Collection[dg.AssetKey], instance: dg.DagsterInstance) -> str | None:
    """The id of an unfinished run of any of the assets. Runs whose process has died are marked as failed on the way."""
    alive = fail_dead_runs(instance, project.store)
    for record in instance.get_run_records(dg.RunsFilter(statuses=UNFINISHED)):
        run = record.dagster_run
        # Without a selection a run covers all assets of its job. Only the lock says whether that job belongs to this project.
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
