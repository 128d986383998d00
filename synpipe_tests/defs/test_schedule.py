"""The schedule and the sensor: what they ask for and what they say otherwise, evaluated as Dagster does, and by its daemon."""

import csv
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import dagster as dg
import lancedb
import pytest
import yaml

from synpipe.assets.graph import nodes, states
from synpipe.datasets import BULK_RECORD, Dataset, Project
from synpipe.defs import schedules
from synpipe.defs.definitions import build_definitions
from synpipe.defs.locks import DIED
from synpipe.defs.run import prepare_home
from synpipe.errors import SynpipeError
from synpipe.index.publish import CURRENT
from synpipe.store.locks import one_step_at_a_time
from synpipe.store.objects import ObjectPath, list_paths
from synpipe.tiles.parts import mark_damaged
from synpipe_tests.conftest import SMALL_ENCODERS, environment, write_project
from synpipe_tests.support import object_store
from synpipe_tests.support.browser import Ui, serve
from synpipe_tests.support.changes import name_of
from synpipe_tests.support.inputs import Inputs

TRUNK = {"volume", "annotations", "synapses", "synapse_stacks", "rgb_tiles", "rejects", "split"}
KINDS = ("embeddings", "classifier", "embedding_table", "index", "scores")
BRANCHES = {f"{kind}_{name}" for kind in KINDS for name in ("tiny", "other")} | {"evaluation"}
UP_TO_DATE = "every asset is up to date"


class CodeLocation:
    """The project as Dagster has loaded it; `reload` loads it again."""

    def __init__(self, project: Project, instance: dg.DagsterInstance):
        self.project, self.instance = project, instance
        self.reload()

    def reload(self) -> None:
        self.definitions = build_definitions(replace(self.project))

    def tick(self) -> dg.RunRequest | str:
        """What the schedule asks for, or its reason for skipping; the sensor must say the same."""
        schedule = self.definitions.resolve_schedule_def("nightly")
        sensor = self.definitions.resolve_sensor_def("sources_changed")
        with (
            dg.build_schedule_context(self.instance) as for_schedule,
            dg.build_sensor_context(self.instance, definitions=self.definitions) as for_sensor,
        ):
            found = []
            for data in (schedule.evaluate_tick(for_schedule), sensor.evaluate_tick(for_sensor)):
                assert len(data.run_requests or []) + bool(data.skip_message) == 1
                found.append(data.run_requests[0] if data.run_requests else str(data.skip_message))
        assert wanted(found[0]) == wanted(found[1])
        return found[0]

    def launch(self, request: dg.RunRequest | str) -> str:
        """Make the run that was asked for, in this process; its status and then its id."""
        assert isinstance(request, dg.RunRequest), request
        result = self.definitions.resolve_job_def(schedules.JOB).execute_in_process(
            instance=self.instance,
            asset_selection=list(request.asset_selection or ()),
            tags=dict(request.tags),
            run_config={"loggers": {"progress": {}}},
            raise_on_error=False,
        )
        return f"{result.dagster_run.status.value} {result.run_id}"


def wanted(request: dg.RunRequest | str) -> set[str] | str:
    """Names of the assets that a request is for."""
    return request if isinstance(request, str) else {name_of(key) for key in request.asset_selection or ()}


@pytest.fixture
def empty(project: Project, monkeypatch: pytest.MonkeyPatch) -> Iterator[CodeLocation]:
    """A project of the test's own with nothing made."""
    yield from load(project, monkeypatch)


@pytest.fixture
def fresh(made: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[CodeLocation]:
    """A project of the test's own with everything made: a copy, whose files have other paths and times."""
    yield from load(copy_of(made, tmp_path), monkeypatch)


def copy_of(made: Dataset, folder: Path) -> Project:
    project = write_project(folder)
    shutil.copytree(made.folder, project.store / made.name)
    return project


def load(project: Project, monkeypatch: pytest.MonkeyPatch) -> Iterator[CodeLocation]:
    for name in ("DAGSTER_HOME", "SYNPIPE_STORE", "SYNPIPE_DATA"):
        monkeypatch.setenv(name, "")  # so that what `prepare_home` sets is undone
    home = prepare_home(project)
    with dg.DagsterInstance.from_config(str(home)) as instance:
        yield CodeLocation(project, instance)


def annotations(project: Project) -> Path:
    return project.store / "demo" / "source" / "synapses.csv"


def add_synapse(project: Project, synapse_id: int) -> None:
    """A synapse as an editor would add it: at the place of the first one, 40 nm further in x."""
    path = annotations(project)
    with path.open(newline="") as file:
        header, *rows = csv.reader(file)
    new = dict(zip(header, rows[0], strict=True))
    new |= {"synapse_id": str(synapse_id), "x_nm": f"{float(new['x_nm']) + 40:.2f}"}
    with path.open("a", newline="") as file:
        csv.writer(file, lineterminator="\n").writerow(new.values())


def write_registry(project: Project, **changes: Any) -> None:
    """Change the encoder `tiny`."""
    encoders = SMALL_ENCODERS["encoders"]
    registry = {"encoders": {**encoders, "tiny": {**encoders["tiny"], **changes}}}
    (project.data / "encoders.yaml").write_text(yaml.safe_dump(registry))


def indexed_ids(project: Project, encoder: str) -> set[int]:
    """Synapses in the published version of an index, as any reader of LanceDB finds them."""
    table = lancedb.connect(project.dataset("demo").lancedb_folder).open_table(encoder)
    table.checkout(CURRENT)
    return set(table.to_arrow()["synapse_id"].to_pylist())


# Through the daemon. Its schedule ticks once a minute: the tests between the first and the last one fill that time.

AUTOMATION = """{ repositoriesOrError { ... on RepositoryConnection { nodes {
  schedules { name scheduleState { id status ticks { status skipReason runIds } } }
  sensors { name sensorState { id status ticks { status skipReason runIds } } }
} } } }"""
RUNS = "{ runsOrError { ... on Runs { results { runId status assets { key { path } } assetChecks { name } } } } }"
STOP_SCHEDULE = 'mutation { stopRunningSchedule(id: "%s") { __typename } }'
START_SENSOR = """mutation { startSensor(sensorSelector: {
  repositoryName: "__repository__", repositoryLocationName: "%s", sensorName: "sources_changed"
}) { __typename } }"""
LOCATION = "{ repositoriesOrError { ... on RepositoryConnection { nodes { location { name } } } } }"


@pytest.fixture(scope="module")
def automated(made: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Project, Ui]]:
    """`synpipe ui` on a project with everything made but for one synapse, with a schedule that ticks once a minute."""
    folder = tmp_path_factory.mktemp("automated")
    project = copy_of(made, folder)
    with serve(project, folder, SYNPIPE_SCHEDULE="* * * * *") as ui:
        yield project, ui


def test_the_schedule_is_on_and_the_sensor_is_off(automated: tuple[Project, Ui]):
    project, ui = automated
    assert automation(ui, "schedule")["status"] == "RUNNING"
    assert automation(ui, "sensor")["status"] == "STOPPED"
    add_synapse(project, 77)  # for the last test


def automation(ui: Ui, kind: str) -> dict[str, Any]:
    """State of the schedule or the sensor, with its ticks, the newest first."""
    (node,) = ui.ask(AUTOMATION)["repositoriesOrError"]["nodes"]
    (found,) = node[f"{kind}s"]
    return found[f"{kind}State"]


def launched(ui: Ui, kind: str) -> set[str]:
    """Wait until a run that the schedule or the sensor asked for has succeeded; names of the assets that it made."""

    def runs() -> list[dict[str, Any]]:
        ids = [run_id for tick in automation(ui, kind)["ticks"] for run_id in tick["runIds"]]
        return [run for run in ui.ask(RUNS)["runsOrError"]["results"] if run["runId"] in ids]

    wait_until(lambda: any(run["status"] in ("SUCCESS", "FAILURE") for run in runs()))
    (run,) = runs()
    assert run["status"] == "SUCCESS", ui.messages
    assert len(run["assetChecks"]) == 14
    return {name_of(dg.AssetKey(asset["key"]["path"])) for asset in run["assets"]}


def wait_until(done: Callable[[], bool], seconds: float = 180) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline
        time.sleep(1)


# What is asked for.


@pytest.mark.slow
def test_of_an_empty_store_everything_is_asked_for_and_then_nothing(empty: CodeLocation):
    request = empty.tick()
    assert wanted(request) == TRUNK | BRANCHES
    assert empty.launch(request).startswith("SUCCESS")
    assert {state.state for state in states(empty.project.dataset("demo"))} == {"fresh"}
    assert empty.tick() == UP_TO_DATE


def test_an_edited_annotation_file_is_seen_though_nobody_told_dagster(fresh: CodeLocation):
    assert fresh.tick() == UP_TO_DATE
    add_synapse(fresh.project, 77)
    assert wanted(fresh.tick()) == (TRUNK | BRANCHES) - {"volume"}


def test_one_missing_asset_is_asked_for_with_all_downstream_of_it(fresh: CodeLocation):
    fresh.project.dataset("demo").manifest_path("embedding_table_other").unlink()
    request = fresh.tick()
    assert wanted(request) == {"embedding_table_other", "index_other", "scores_other", "evaluation"}
    assert fresh.launch(request).startswith("SUCCESS")
    assert fresh.tick() == UP_TO_DATE


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="the kernel does not tell what was read")
def test_a_volume_that_was_touched_is_read_once_and_found_equal(fresh: CodeLocation):
    volume = fresh.project.store / "demo" / "source" / "volume.h5"
    os.utime(volume)
    before = bytes_read()
    assert fresh.tick() == UP_TO_DATE
    assert bytes_read() - before > volume.stat().st_size  # the measure sees what it should
    before = bytes_read()
    assert fresh.tick() == UP_TO_DATE
    assert bytes_read() - before < volume.stat().st_size / 4


def bytes_read() -> int:
    """By this process since it began, from files or their cache."""
    (line,) = [line for line in Path("/proc/self/io").read_text().splitlines() if line.startswith("rchar")]
    return int(line.split()[1])


def test_the_schedule_looks_at_the_object_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The address of the object store is that of the project, even if the store has lost its own record of it."""
    inputs = Inputs({number: ((3, 200 + 10 * number, 250), "gaba") for number in range(4)})
    project = Project(tmp_path / "data", tmp_path / "store", ObjectPath(f"s3://{object_store.BUCKET}/schedule"))
    inputs.write(project.data)
    with object_store.serve():
        for location in load(project, monkeypatch):
            assert location.launch(location.tick()).startswith("SUCCESS")
            assert location.tick() == UP_TO_DATE
            dataset = project.dataset("demo")
            (dataset.folder / BULK_RECORD).unlink()
            mark_damaged(next(iter(list_paths(dataset.cut_outs_folder, "*/*.h5"))))
            assert {"synapse_stacks", "rgb_tiles", "index_tiny"} <= set(wanted(location.tick()))


# What is not asked for, and why.


def test_a_code_location_older_than_the_registry_asks_to_be_reloaded(fresh: CodeLocation):
    write_registry(fresh.project, description="another description changes nothing")
    assert fresh.tick() == UP_TO_DATE
    write_registry(fresh.project, seed=9)
    reason = fresh.tick()
    assert isinstance(reason, str)
    assert "after this code location was loaded: reload it" in reason
    assert "demo/tiny/classifier, demo/tiny/embedding_table, demo/tiny/embeddings" in reason
    fresh.reload()
    assert wanted(fresh.tick()) == {*(f"{kind}_tiny" for kind in KINDS), "evaluation"}


def test_a_data_set_that_came_or_went_asks_for_a_reload(fresh: CodeLocation):
    described = fresh.project.data / "datasets" / "demo.yaml"
    other = described.with_name("other.yaml")
    absent = {**yaml.safe_load(described.read_text()), "volume": {"path": "later.h5"}}
    del absent["synthetic"]
    other.write_text(yaml.safe_dump(absent))
    assert fresh.tick() == UP_TO_DATE  # its files are not there yet: it is left out, as it is when loading
    shutil.copy(described, other)
    assert "reload it" in str(fresh.tick())
    fresh.reload()
    request = fresh.tick()
    assert isinstance(request, dg.RunRequest)
    assert {key.path[0] for key in request.asset_selection or ()} == {"other"}
    other.unlink()
    assert "reload it" in str(fresh.tick())


@pytest.mark.parametrize("name", ["encoders.yaml", "datasets/demo.yaml", "datasets/another.yaml"])
def test_a_broken_yaml_file_is_named(fresh: CodeLocation, name: str):
    (fresh.project.data / name).write_text("encoders: [\n")
    reason = fresh.tick()
    assert isinstance(reason, str)
    assert reason.startswith("Nothing can be planned: ")
    assert str(fresh.project.data / name) in reason


def test_a_damaged_manifest_is_named_and_its_asset_made_again(fresh: CodeLocation, caplog: pytest.LogCaptureFixture):
    path = fresh.project.dataset("demo").manifest_path("rgb_tiles")
    path.write_text("{")
    assert "rgb_tiles" in wanted(fresh.tick())
    assert f"{path} is damaged" in caplog.text


def test_what_is_no_cron_expression_is_refused_in_a_sentence(project: Project, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SYNPIPE_SCHEDULE", "every night")
    with pytest.raises(SynpipeError, match="SYNPIPE_SCHEDULE is 'every night', which is not a cron expression"):
        build_definitions(project)


# Runs that fail.


def test_a_run_that_fails_is_asked_for_again_with_a_bound_until_something_changes(fresh: CodeLocation):
    path = annotations(fresh.project)
    content = path.read_text()
    path.write_text(content.replace("x_nm", "x_mm", 1))
    request = fresh.tick()
    assert wanted(request) == (TRUNK | BRANCHES) - {"volume"}
    assert fresh.launch(request).startswith("FAILURE")  # it got as far as the fingerprint of the file
    for _ in range(schedules.MAX_ATTEMPTS):
        request = fresh.tick()
        assert wanted(request) == (TRUNK | BRANCHES) - {"volume", "annotations"}
        status, run_id = fresh.launch(request).split()
        assert status == "FAILURE"
    reason = fresh.tick()
    assert isinstance(reason, str)
    assert f"{schedules.MAX_ATTEMPTS} runs in a row" in reason
    assert run_id in reason
    assert fresh.tick() == reason  # and so on

    path.write_text(content)
    assert fresh.launch(fresh.tick()).startswith("SUCCESS")
    assert fresh.tick() == UP_TO_DATE


@pytest.mark.slow
def test_sources_that_cannot_be_read_at_all_are_asked_for_again_once_they_changed(tmp_path: Path, monkeypatch):
    project = write_project(tmp_path)
    described = project.data / "datasets" / "demo.yaml"
    described.write_text(
        yaml.safe_dump(
            {key: value for key, value in yaml.safe_load(described.read_text()).items() if key != "synthetic"}
        )
    )
    for name in ("volume.h5", "synapses.csv"):
        (described.parent / name).write_text("not what it should be")
    for location in load(project, monkeypatch):
        while isinstance(request := location.tick(), dg.RunRequest):
            assert location.launch(request).startswith("FAILURE")
            assert len(location.instance.get_runs()) < 10
        (described.parent / "volume.h5").write_text("still not")  # no asset has a version of it
        assert isinstance(location.tick(), dg.RunRequest)


@pytest.mark.slow
def test_a_check_that_failed_keeps_its_asset_out_of_date_and_stops_what_is_downstream(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    project = write_project(tmp_path, tiles={"shards": 3, "blank_std": 200}, max_reject_share=1)  # all look blank
    for location in load(project, monkeypatch):
        assert location.launch(location.tick()).startswith("FAILURE")
        (state,) = [state for state in states(project.dataset("demo")) if state.asset == "rgb_tiles"]
        assert state.reasons == ("its check are_there has not passed",)
        for _ in range(schedules.MAX_ATTEMPTS):
            request = location.tick()
            assert wanted(request) == {"rgb_tiles", "split"} | BRANCHES
            assert location.launch(request).startswith("FAILURE")
        assert "runs in a row" in str(location.tick())
        made = {path.stem for path in (project.store / "demo" / "manifests").glob("*.json")}
        assert made == TRUNK - {"split"}


def test_an_asset_whose_process_ended_before_its_checks_is_out_of_date(fresh: CodeLocation):
    (node,) = [node for node in nodes(fresh.project.dataset("demo")) if node.name == "embeddings_tiny"]
    node.run(lambda message: None, checks=["vectors_vary"])
    assert wanted(fresh.tick()) == {*(f"{kind}_tiny" for kind in KINDS), "evaluation"}
    node.pass_checks(["vectors_vary"])
    assert fresh.tick() == UP_TO_DATE


# Runs at work, and runs that died.


def test_a_run_at_work_is_waited_for_and_a_killed_one_is_not(fresh: CodeLocation, tmp_path: Path):
    add_synapse(fresh.project, 77)
    messages = tmp_path / "stderr"
    command = [str(Path(sys.executable).parent / "synpipe"), "materialize", "--stale"]
    with one_step_at_a_time(fresh.project.store, log=print), messages.open("w") as stderr:
        process = subprocess.Popen(command, env=environment(fresh.project), stderr=stderr)
        deadline = time.monotonic() + 120
        while "waiting for another run" not in messages.read_text():
            assert process.poll() is None and time.monotonic() < deadline, messages.read_text()
            time.sleep(0.1)
        (run,) = fresh.instance.get_runs()
        assert fresh.tick() == f"run {run.run_id} is working on these assets"
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert isinstance(fresh.tick(), dg.RunRequest)
    (run,) = fresh.instance.get_runs()
    assert run.status == dg.DagsterRunStatus.FAILURE
    assert DIED in [event.message for event in fresh.instance.all_logs(run.run_id)]


def test_a_run_that_was_killed_before_it_began_is_given_up_after_a_while(
    fresh: CodeLocation, monkeypatch: pytest.MonkeyPatch
):
    add_synapse(fresh.project, 77)
    request = fresh.tick()
    assert isinstance(request, dg.RunRequest)
    job = fresh.definitions.resolve_job_def(schedules.JOB)
    run = fresh.instance.create_run_for_job(
        job, asset_selection=frozenset(request.asset_selection or ()), status=dg.DagsterRunStatus.STARTING
    )
    assert fresh.tick() == f"run {run.run_id} is working on these assets"
    monkeypatch.setattr(schedules, "START_TIMEOUT_S", 0)
    assert isinstance(fresh.tick(), dg.RunRequest)
    (run,) = fresh.instance.get_runs()
    assert run.status == dg.DagsterRunStatus.FAILURE


def test_a_run_of_other_assets_is_not_waited_for(fresh: CodeLocation):
    fresh.project.dataset("demo").manifest_path("index_tiny").unlink()
    job = fresh.definitions.resolve_job_def(schedules.JOB)
    fresh.instance.create_run_for_job(
        job, asset_selection=frozenset({dg.AssetKey(["demo", "other", "index"])}), status=dg.DagsterRunStatus.STARTED
    )
    assert wanted(fresh.tick()) == {"index_tiny", "scores_tiny", "evaluation"}


def test_the_daemon_has_made_what_the_schedule_asked_for_and_the_sensor_makes_what_changed_since(
    automated: tuple[Project, Ui],
):
    project, ui = automated
    assert launched(ui, "schedule") == (TRUNK | BRANCHES) - {"volume"}
    assert 77 in indexed_ids(project, "tiny") & indexed_ids(project, "other")
    wait_until(lambda: automation(ui, "schedule")["ticks"][0]["skipReason"] == UP_TO_DATE)
    assert automation(ui, "sensor")["ticks"] == []

    ui.ask(STOP_SCHEDULE % automation(ui, "schedule")["id"])
    add_synapse(project, 78)
    (node,) = ui.ask(LOCATION)["repositoriesOrError"]["nodes"]
    ui.ask(START_SENSOR % node["location"]["name"])
    assert launched(ui, "sensor") == (TRUNK | BRANCHES) - {"volume"}
    assert {77, 78} <= indexed_ids(project, "tiny") & indexed_ids(project, "other")
    ui.stop()
    assert {state.state for state in states(project.dataset("demo"))} == {"fresh"}
