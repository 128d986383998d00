"""One data set does not stop another, and one encoder does not stop another."""

import json
import time
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
import yaml

from synpipe.assets.graph import states
from synpipe.assets.manifest import find_manifest
from synpipe.datasets import Project
from synpipe.defs import schedules
from synpipe.defs.definitions import build_definitions
from synpipe.store.files import read_table
from synpipe_tests.conftest import QUICK_EVALUATION, project_in, run_synpipe
from synpipe_tests.support.browser import Ui, serve
from synpipe_tests.support.changes import at_home
from synpipe_tests.support.command import answer, invoke, refusal
from synpipe_tests.support.inputs import DATASET, ENCODER, Inputs

INPUTS = Inputs({number: ((3, 150 + 10 * number, 250), "gaba") for number in range(20)})
TYPO = "encoders: [\n"
NODES = "{ assetNodes { assetKey { path } description } }"
PLACE = "{ repositoriesOrError { ... on RepositoryConnection { nodes { name location { name } } } } }"
LAUNCH = """mutation { launchPipelineExecution(executionParams: {
  mode: "default"
  selector: {pipelineName: "__ASSET_JOB", repositoryName: "%s", repositoryLocationName: "%s", assetSelection: [%s]}
}) { __typename ... on LaunchRunSuccess { run { runId } } ... on PythonError { message } } }"""
RUN = """{ runOrError(runId: "%s") { ... on Run { status
  eventConnection { events { ... on ExecutionStepFailureEvent { stepKey failureMetadata { description } } } }
} } }"""


def add_dataset(project: Project, name: str, **changes: Any) -> Path:
    path = project.data / "datasets" / f"{name}.yaml"
    path.write_text(yaml.safe_dump({**DATASET, "encoders": ["tiny"], **changes}))
    return path


def add_encoders(project: Project, **entries: Any) -> None:
    path = project.data / "encoders.yaml"
    content = yaml.safe_load(path.read_text())
    content["encoders"] |= entries
    path.write_text(yaml.safe_dump(content))


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    """A project with the data set `demo`, and nothing made."""
    at_home(monkeypatch)
    INPUTS.write(tmp_path / "data")
    return project_in(tmp_path)


def not_fresh(project: Project, name: str = "demo") -> list[str]:
    return [state.asset for state in states(project.dataset(name)) if state.state != "fresh"]


# A data set.


def materialise_all(ui: Ui) -> tuple[str, dict[str, str]]:
    """Do what the button "Materialize all" does; the status of the run, and the reasons of the steps that failed."""
    (repository,) = ui.ask(PLACE)["repositoriesOrError"]["nodes"]
    paths = [node["assetKey"]["path"] for node in ui.ask(NODES)["assetNodes"]]
    keys = ", ".join(f"{{path: {json.dumps(path)}}}" for path in paths)
    launched = ui.ask(LAUNCH % (repository["name"], repository["location"]["name"], keys))["launchPipelineExecution"]
    assert launched["__typename"] == "LaunchRunSuccess", launched
    deadline = time.monotonic() + 180
    while (run := ui.ask(RUN % launched["run"]["runId"])["runOrError"])["status"] not in ("SUCCESS", "FAILURE"):
        assert time.monotonic() < deadline
        time.sleep(0.5)
    failures = [event for event in run["eventConnection"]["events"] if "stepKey" in event]
    return run["status"], {event["stepKey"]: str(event["failureMetadata"]["description"]) for event in failures}


@pytest.mark.slow
def test_sources_that_disappear_after_the_page_has_loaded_stop_their_own_data_set(project: Project, tmp_path: Path):
    add_dataset(project, "gone", volume={"path": "gone.h5"})
    typo = add_dataset(project, "typo")
    volume = project.data / "datasets" / "gone.h5"
    volume.write_bytes((project.data / "datasets" / "volume.h5").read_bytes())
    with serve(project, tmp_path) as ui:
        assert len(ui.ask(NODES)["assetNodes"]) > 20
        volume.unlink()
        typo.write_text(TYPO)
        status, failures = materialise_all(ui)
        ui.stop()
    assert status == "FAILURE"
    assert failures.keys() == {"gone__volume", "typo__volume", "typo__annotations"}
    assert f"Volume {volume} does not exist: correct `volume.path`" in failures["gone__volume"]
    assert f"{typo} is not valid YAML" in failures["typo__volume"]
    assert not_fresh(project) == []
    assert find_manifest(project.dataset("gone"), "annotations") is not None


def test_a_wrong_yaml_file_and_absent_files_are_assets_that_say_so(
    project: Project, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
):
    add_dataset(project, "absent", volume={"path": "absent.h5"})
    typo = project.data / "datasets" / "typo-1.yaml"
    typo.write_text(TYPO)
    graph = build_definitions(project).resolve_asset_graph()
    said = {key.to_user_string(): str(graph.get(key).description) for key in graph.get_all_asset_keys()}
    assert {name.split("/")[0] for name in said} == {"demo", "absent", "typo_1"}
    assert f"do not exist: {project.data / 'datasets' / 'absent.h5'}" in said["absent/volume"]
    assert "'typo-1' cannot be the name of a data set" in said["typo_1/volume"]
    assert "do not exist" not in said["demo/volume"]
    assert (capfd.readouterr(), caplog.records) == (("", ""), [])  # nothing that every command would repeat

    assert "missing" in answer(project, "status", "--dataset", "demo")
    answer(project, "materialize", "--dataset", "demo")
    assert not_fresh(project) == []


def test_the_schedule_plans_the_other_data_sets(project: Project):
    add_dataset(project, "absent", volume={"path": "absent.h5"})
    (project.data / "datasets" / "typo.yaml").write_text(TYPO)
    loaded = schedules._code_versions([project.dataset(name) for name in ("demo", "absent")])
    with dg.DagsterInstance.ephemeral() as instance:
        request = schedules.plan(project, loaded, instance)
    assert isinstance(request, dg.RunRequest)
    assert {key.path[0] for key in request.asset_selection or ()} == {"demo"}


# An encoder.


def test_a_wrong_entry_of_the_registry_stops_only_the_data_sets_that_use_it(project: Project):
    add_encoders(project, wrong={"model": "resnet10t", "wieghts": "hub"}, **{"Bad-Name": ENCODER})
    add_dataset(project, "other", encoders=["tiny", "wrong"])
    assert "missing" in answer(project, "status", "--dataset", "demo")
    assert "encoder `wrong`: " in refusal(invoke(project, "status", "--dataset", "other"))
    graph = build_definitions(project).resolve_asset_graph()
    names = {key.to_user_string() for key in graph.get_all_asset_keys()}
    assert {name for name in names if name.startswith("other/")} == {"other/volume"}
    assert {"demo/volume", "demo/tiny/embeddings"} <= names


@pytest.mark.slow
def test_an_encoder_that_cannot_be_loaded_stops_its_own_branch_and_the_evaluation_gathers_the_others(project: Project):
    absent = {**ENCODER, "model": "test_resnet", "weights": "weights/absent.safetensors"}
    add_encoders(project, absent=absent)
    add_dataset(project, "demo", encoders=["absent", "tiny"], evaluation=QUICK_EVALUATION)
    done = run_synpipe(project, "materialize", "--dataset", "demo")
    message = done.stderr.splitlines()[-1]
    assert done.returncode == 1
    assert message.startswith("Error: demo/absent/embeddings: ")
    assert str(project.data / "weights" / "absent.safetensors") in message
    assert "Dependencies for step" not in done.stderr
    assert read_table(project.dataset("demo").evaluation_path)["encoder"].to_pylist() == ["tiny"]
    kinds = ("embeddings", "embedding_table", "index", "scores")
    assert set(not_fresh(project)) == {"evaluation", *(f"{kind}_absent" for kind in kinds)}
