"""Credentials in addresses are refused before anything is written, and no message repeats them."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from synpipe.addresses import find_credentials
from synpipe.cli import main
from synpipe.datasets import Project
from synpipe_tests.support.command import invoke, refusal
from synpipe_tests.support.inputs import DATASET, Inputs

SECRET = "hunter2secret"
SITE = f"https://user:{SECRET}@em.example.org"
SIGNED = f"https://em.example.org/v?X-Amz-Signature={SECRET}"

# Arguments of every command that works on a data set; DIR is a folder for what it writes.
COMMANDS = {
    "materialize": [],
    "status": [],
    "gc": [],
    "dataset": ["check", "demo"],
    "search": ["1"],
    "link": ["1"],
    "versions": [],
    "diff": ["1", "2"],
    "rollback": ["1"],
    "forget": ["v1"],
    "provenance": ["1"],
    "finetune": ["--name", "tuned"],
    "pretrain": ["--name", "trained"],
    "profile": [],
    "compare": [],
    "confusion": [],
    "export-annotations": ["DIR"],
    "export-site": ["DIR", "-e", "tiny"],
}
# These need neurons and labels, several encoders or several versions. They still read everything that was written.
NEED_MORE = {"export-annotations", "diff", "rollback", "forget", "link", "finetune", "pretrain", "compare", "confusion"}
NOT_ON_A_DATA_SET = {"demo", "ui", "explore"}  # `demo` is `materialize`, and the servers only read

PLANTED: dict[str, dict[str, Any]] = {
    "volume": {"volume": {"path": f"precomputed://{SITE}/v"}},
    "volume, signed": {"volume": {"path": f"zarr://{SIGNED}"}},
    "volume, unknown parameter": {"volume": {"path": f"n5://https://em.example.org/v?s={SECRET}"}},
    "neuroglancer": {"neuroglancer": SITE},
    "title": {"title": f"From {SITE}/v"},
    "title, signed": {"title": f"From {SIGNED}"},
    "annotations": {"annotations": [{**DATASET["annotations"][0], "source": SITE}]},
}


def write_project(folder: Path, **changes: Any) -> Project:
    Inputs({1: ((2, 200, 200), "gaba"), 2: ((3, 300, 300), "gaba")}).write(folder / "data")
    path = folder / "data" / "datasets" / "demo.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | changes))
    return Project(folder / "data", folder / "store")


def files_with_the_secret(folder: Path) -> list[Path]:
    inputs = folder / "data"
    return [
        path
        for path in folder.rglob("*")
        if not path.is_relative_to(inputs) and (SECRET in path.name or SECRET.encode() in _content(path))
    ]


def _content(path: Path) -> bytes:
    return path.read_bytes() if path.is_file() else b""


def test_every_command_is_tried_here():
    assert COMMANDS.keys() | NOT_ON_A_DATA_SET == main.commands.keys()


@pytest.mark.parametrize("place", PLANTED)
def test_credentials_in_a_data_set_are_written_nowhere(tmp_path: Path, place: str):
    project = write_project(tmp_path, **PLANTED[place])
    for command, arguments in COMMANDS.items():
        result = invoke(
            project, command, *[str(tmp_path / "made") if argument == "DIR" else argument for argument in arguments]
        )
        assert SECRET not in result.output, command
        assert result.exit_code != 0, command
    assert files_with_the_secret(tmp_path) == []
    said = refusal(invoke(project, "status"))
    assert next(iter(PLANTED[place])) in said
    assert "AWS_SECRET_ACCESS_KEY" in said and "GOOGLE_APPLICATION_CREDENTIALS" in said


@pytest.mark.slow
def test_credentials_in_variables_are_written_nowhere(tmp_path: Path):
    project = write_project(tmp_path)
    variables = ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "HF_TOKEN", "GOOGLE_APPLICATION_CREDENTIALS")
    for command, arguments in COMMANDS.items():
        result = invoke(
            project,
            command,
            *[str(tmp_path / f"made by {command}") if argument == "DIR" else argument for argument in arguments],
            **dict.fromkeys(variables, SECRET),
        )
        assert SECRET not in result.output, command
        assert result.exit_code == 0 or command in NEED_MORE, (command, result.output)
    assert (tmp_path / "made by export-site").is_dir()
    assert files_with_the_secret(tmp_path) == []


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({"SYNPIPE_BULK": f"s3://user:{SECRET}@bucket/em"}, "SYNPIPE_BULK"),
        ({"SYNPIPE_BULK": f"s3://bucket/em?sig={SECRET}"}, "SYNPIPE_BULK"),
        (
            {"SYNPIPE_BULK": "s3://bucket/em", "AWS_ENDPOINT_URL": f"http://user:{SECRET}@127.0.0.1:9"},
            "AWS_ENDPOINT_URL",
        ),
        ({"SYNPIPE_STORE": f"s3://user:{SECRET}@bucket"}, "SYNPIPE_STORE"),
    ],
)
def test_credentials_in_the_environment_are_written_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], says: str
):
    monkeypatch.chdir(tmp_path)
    result = invoke(write_project(tmp_path), "materialize", "--select", "volume+", **environment)
    assert SECRET not in result.output
    assert says in refusal(result)
    assert files_with_the_secret(tmp_path) == []


def test_credentials_in_the_registry_of_encoders_are_refused(tmp_path: Path):
    project = write_project(tmp_path)
    registry = project.data / "encoders.yaml"
    content = yaml.safe_load(registry.read_text())
    content["encoders"]["tiny"]["description"] = f"weights from {SITE}"
    registry.write_text(yaml.safe_dump(content))
    said = refusal(invoke(project, "status"))
    assert "encoders.tiny.description" in said and SECRET not in said


def test_credentials_in_the_address_of_a_layer_are_refused(tmp_path: Path):
    project = write_project(tmp_path)
    said = refusal(invoke(project, "export-annotations", str(tmp_path / "layer"), "--url", f"{SITE}/layer"))
    assert "everyone with the link" in said and SECRET not in said


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("https://user:pw@host/v", True),
        ("https://token@host/v", True),
        ("HTTPS://user:pw@host/v", True),
        ("see https://user:p/w@host/v", True),
        ("precomputed://s3://key:pw@bucket/v", True),
        ("https://host/v?sv=1&sig=abc", True),
        ("gs://bucket/v?anything=1", True),
        ("https://host:8000/v@2/x", False),
        ("https://[::1]:8000/v", False),
        ("(see https://host:8000).", False),
        ("precomputed://em@v2", False),
        ("n5://em?v=2", False),
        ("zarr://gs://bucket/em@v2", False),
        ("/data/user:pw@host", False),
        ("mail user@host", False),
    ],
)
def test_credentials_are_told_from_ordinary_addresses(text: str, found: bool):
    assert (find_credentials(text) is not None) == found


def test_a_query_string_in_a_text_for_people_is_no_credential():
    assert find_credentials("see https://em.example.org/?page=2&author=me", any_query=False) is None
