"""The command line, end to end: from an empty store to a search result, and its error messages."""

import json
import math
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from synpipe.cli import main
from synpipe.datasets import Project
from synpipe.text import format_table
from synpipe_tests.conftest import SMALL_ENCODERS, environment, write_project
from synpipe_tests.support.command import answer, assets, files, invoke, refusal, runs, versions

ENCODERS = ("tiny", "other")
TRUNK = {"volume", "annotations", "synapses", "synapse_stacks", "rgb_tiles", "rejects", "split"}
KINDS = ("embeddings", "classifier", "embedding_table", "index", "scores")
BRANCHES = {f"{kind}_{encoder}" for encoder in ENCODERS for kind in KINDS} | {"evaluation"}


@dataclass
class FirstRun:
    """A first run on an empty store, in a process with an empty home folder that reaches the network through our proxy only."""

    project: Project
    result: subprocess.CompletedProcess[str]
    home: Path
    data_before: dict[str, bytes]
    requests: list[Any]
    assets: dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def proxy() -> Iterator[tuple[str, list[Any]]]:
    """The address of a proxy that closes all connections, and the list of the callers' addresses."""
    calls: list[Any] = []
    server = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                connection, address = server.accept()
            except OSError:
                return
            calls.append(address)
            connection.close()

    threading.Thread(target=serve, daemon=True).start()
    yield f"http://127.0.0.1:{server.getsockname()[1]}", calls
    server.close()


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory, proxy: tuple[str, list[Any]]) -> FirstRun:
    folder = tmp_path_factory.mktemp("cli")
    project, (address, requests) = write_project(folder), proxy
    home = folder / "home"
    (home / "tmp").mkdir(parents=True)
    proxies = {
        name: address for kind in ("http", "https", "all") for name in (f"{kind}_proxy", f"{kind}_proxy".upper())
    }
    before = files(project.data)
    kept = {name: value for name, value in environment(project).items() if not name.startswith(("XDG_", "HF_"))}
    result = subprocess.run(
        [str(Path(sys.executable).parent / "synpipe"), "materialize"],
        env=kept | proxies | {"HOME": str(home), "TMPDIR": str(home / "tmp"), "NO_PROXY": "", "no_proxy": ""},
        cwd=home,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return FirstRun(project, result, home, before, requests, assets(project))


@pytest.fixture
def made_here(first: FirstRun, tmp_path: Path) -> Project:
    """A copy of the finished project, which a test may change."""
    shutil.copytree(first.project.data, tmp_path / "data")
    shutil.copytree(first.project.store, tmp_path / "store")
    return Project(tmp_path / "data", tmp_path / "store")


def a_synapse(project: Project, encoder: str = "tiny") -> int:
    return pq.read_table(project.dataset("demo").table_path(encoder))["synapse_id"][7].as_py()


def test_everything_is_made_from_an_empty_store(first: FirstRun):
    assert first.assets.keys() == TRUNK | BRANCHES
    assert {said["state"] for said in first.assets.values()} == {"fresh"}
    counts = {asset: said["made"]["figures"] | {"rows": said["made"]["rows"]} for asset, said in first.assets.items()}
    assert counts["synapse_stacks"]["cut_outs_made"] == counts["synapses"]["rows"] > 90
    for encoder in ENCODERS:
        assert counts[f"embeddings_{encoder}"]["tiles_embedded"] > 90
        assert counts[f"index_{encoder}"]["rows"] == counts["rgb_tiles"]["rows"]
    assert "demo/rgb_tiles" in first.result.stderr  # progress messages
    assert first.result.stdout == ""  # standard output holds results only
    assert "Traceback" not in first.result.stderr
    assert "rror" not in first.result.stderr


def test_nothing_is_written_elsewhere_and_no_network_is_used(first: FirstRun):
    # Matplotlib caches a list of this machine's fonts, and torch leaves an empty temporary folder.
    assert [path for path in files(first.home) if "matplotlib" not in str(path)] == []
    assert files(first.project.data) == first.data_before
    assert first.requests == []
    telemetry = yaml.safe_load((first.project.store / "dagster_home" / "dagster.yaml").read_text())["telemetry"]
    assert telemetry == {"enabled": False}


def test_profile_measures_an_encoder_and_keeps_nothing(first: FirstRun):
    before = files(first.project.store)
    measured = json.loads(answer(first.project, "profile", "--encoder", "tiny", "--tiles", "70", "--json"))
    assert measured["tiles"] == measured["done"]["tiles"] == 70
    assert measured["utilisation"] == pytest.approx(measured["tiles_per_second"] / measured["bare_per_second"])
    assert measured["done"]["computed_s"] + sum(measured["done"]["waited_s"].values()) <= measured["seconds"]
    said = answer(first.project, "profile", "--encoder", "tiny", "--tiles", "10")
    assert "10 tiles in" in said
    assert "the loop reaches" in said
    assert files(first.project.store) == before


def test_a_second_run_reuses_everything(first: FirstRun):
    former = {asset: said["made"]["data_version"] for asset, said in first.assets.items()}
    tables = files(first.project.store / "demo" / "tables")
    said = invoke(first.project, "materialize").stderr
    counts = {
        asset: said["made"]["figures"] | {"rows": said["made"]["rows"]} for asset, said in assets(first.project).items()
    }
    assert counts["synapse_stacks"]["cut_outs_made"] == 0
    assert [counts[f"embeddings_{encoder}"]["tiles_embedded"] for encoder in ENCODERS] == [0, 0]
    assert versions(first.project) == former
    assert files(first.project.store / "demo" / "tables") == tables
    assert "0 cut-outs made" in said


@pytest.mark.parametrize(
    "select, expected",
    [
        (["rejects"], {"rejects"}),
        (["embedding_table_tiny+"], {"embedding_table_tiny", "index_tiny", "scores_tiny", "evaluation"}),
        (["+synapses"], {"volume", "annotations", "synapses"}),
        (["rejects", "index_other"], {"rejects", "index_other"}),
    ],
)
def test_select(first: FirstRun, select: list[str], expected: set[str]):
    former = runs(first.project)
    answer(first.project, "materialize", *(part for item in select for part in ("--select", item)))
    now = runs(first.project)
    assert {asset for asset in now if now[asset] != former[asset]} == expected
    assert len({now[asset] for asset in expected}) == 1


def test_only_the_assets_of_a_changed_encoder_are_stale_and_made_again(made_here: Project):
    encoders = {name: dict(entry) for name, entry in SMALL_ENCODERS["encoders"].items()}
    encoders["tiny"]["seed"] = 5
    (made_here.data / "encoders.yaml").write_text(yaml.safe_dump({"encoders": encoders}))
    branch = {*(f"{kind}_tiny" for kind in KINDS), "evaluation"}
    assert {asset for asset, said in assets(made_here).items() if said["state"] == "stale"} == branch
    text = answer(made_here, "status")
    assert re.search(r"index_tiny +stale", text)
    assert re.search(r"because .*encoder tiny changed", text)

    former_runs, former_versions = runs(made_here), versions(made_here)
    answer(made_here, "materialize", "--stale")
    now_runs, now_versions = runs(made_here), versions(made_here)
    assert {asset for asset in now_runs if now_runs[asset] != former_runs[asset]} == branch
    assert {asset for asset in now_versions if now_versions[asset] != former_versions[asset]} == branch
    assert "up to date" in answer(made_here, "materialize", "--stale")
    assert "--select" in refusal(invoke(made_here, "materialize", "--stale", "--select", "rejects"))


@pytest.mark.parametrize("metric", ["cosine", "l2", "dot", "l1"])
def test_search_finds_the_same_as_numpy_in_the_parquet_file(first: FirstRun, metric: str):
    table = pq.read_table(first.project.dataset("demo").table_path("tiny"))
    ids, labels = table["synapse_id"].to_numpy(), np.array(table["neurotransmitter"].to_pylist())
    unit = np.stack(table["vector"].to_numpy()).astype(np.float64)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    full = unit * table["norm"].to_numpy()[:, None]
    query = ids[7]
    distances = {
        "cosine": 1 - unit @ unit[7],
        "l2": np.linalg.norm(full - full[7], axis=1),
        "dot": -full @ full[7],
        "l1": np.abs(full - full[7]).sum(axis=1),
    }[metric]
    tolerance = {"rtol": 1e-5, "atol": 1e-6}

    said = json.loads(answer(first.project, "search", str(query), "-m", metric, "-k", "3", "--json"))
    assert said["synapse_id"] == str(query)
    assert (said["dataset"], said["encoder"], said["metric"]) == ("demo", "tiny", metric)
    assert len(said["neighbours"]) >= 6
    for name, found in said["neighbours"].items():
        rows = np.flatnonzero((labels == (None if name == "unlabelled" else name)) & (ids != query))
        nearest = np.sort(distances[rows])[:3]
        np.testing.assert_allclose([one["distance"] for one in found], nearest, **tolerance)
        for one in found:
            row = int(np.flatnonzero(ids == int(one["synapse_id"]))[0])  # a string that is exactly an id
            assert row in rows
            assert isinstance(one["synapse_id"], str)
            assert isinstance(one["neuron_id"], str | None)
            np.testing.assert_allclose(one["distance"], distances[row], **tolerance)
            assert one["position_nm"] == [table[column][row].as_py() for column in ("x_nm", "y_nm", "z_nm")]


def test_search_prints_the_same_as_text_and_filters(first: FirstRun, tmp_path: Path):
    query = str(a_synapse(first.project))
    everything = json.loads(answer(first.project, "search", query, "-k", "1000", "--json"))["neighbours"]
    regions = sorted({one["region"] for found in everything.values() for one in found})
    assert len(regions) > 1

    words = answer(first.project, "search", query, "--per-class", "2")
    for name, found in everything.items():
        assert f"\n{name}\n" in words
        assert all(one["synapse_id"] in words for one in found[:2])
    assert sum(found[2]["synapse_id"] in words for found in everything.values() if len(found) > 2) == 0

    where = ("--where", f"region={regions[0]}", "--where", "neurotransmitter=gaba")
    picture = tmp_path / "similar.png"
    filtered = answer(first.project, "search", query, *where, "-k", "1000", "--json", "--picture", str(picture))
    wanted = [one for one in everything["gaba"] if one["region"] == regions[0]]
    assert json.loads(filtered)["neighbours"] == ({"gaba": wanted} if wanted else {})
    with Image.open(picture) as image:
        image.load()
        assert image.format == "PNG"
        tiles = 1 + len(wanted)
        assert image.width >= 128 * min(tiles - 1, 10)
        assert image.height >= 128 * (1 + math.ceil((tiles - 1) / 10)), "a row for the query, then ten tiles a row"

    other = json.loads(answer(first.project, "search", query, "--encoder", "other", "--json"))
    assert other["encoder"] == "other"
    counts = first.assets["embeddings_other"]["made"]["figures"]
    assert other["encoder_fingerprint"] == counts["encoder_fingerprint"]


@pytest.mark.parametrize(
    "arguments, expected",
    [
        ("search 5", ["5", "unknown or was rejected"]),
        (f"search {2**64}", [str(2**64)]),
        ("search 5 --encoder nope", ["'nope'", "tiny, other", "demo.yaml"]),
        ("search 5 --dataset nope", ["'nope'", "there is demo"]),
        ("status --dataset ../demo", ["'../demo'", "a-z"]),
        ("search 5 --where region", ["'region'", "column=value"]),
        ("search 5 --where colour=red", ["'colour'", "neurotransmitter"]),
        ("search 5 --where neuron_id=x", ["neuron_id", "'x'"]),
        (f"search 5 --where neuron_id={2**64}", ["neuron_id", str(2**64)]),
        ("materialize --select nope", ["'nope'", "rgb_tiles", "index_tiny", "embeddings_other"]),
        ("materialize --select rgb_tiles,rejects", ["'rgb_tiles,rejects'", "synapses"]),
        ("materialize --dataset nope", ["'nope'", "there is demo"]),
    ],
)
def test_wrong_arguments_are_named(first: FirstRun, arguments: str, expected: list[str]):
    former = runs(first.project)
    message = refusal(invoke(first.project, *arguments.split()))
    assert [part for part in expected if part not in message] == []
    assert runs(first.project) == former


@pytest.mark.parametrize(
    "arguments, expected",
    [
        ("search abc", "'abc' is not a valid integer"),
        ("search 5 --metric nope", "'cosine', 'l2', 'dot', 'l1'"),
        ("search 5 --per-class 0", "1<=x<=1000"),
        ("ui --port 99999", "1<=x<=65535"),
        ("nonsense", "nonsense"),
    ],
)
def test_wrong_usage_is_explained(first: FirstRun, arguments: str, expected: str):
    result = invoke(first.project, *arguments.split())
    assert result.exit_code == 2
    assert expected in result.stderr
    assert "--help" in result.stderr


def test_before_anything_is_made(project: Project):
    assert {said["state"] for said in assets(project).values()} == {"missing"}
    assert answer(project, "status").count(" missing") == len(TRUNK | BRANCHES)
    assert "materialise" in refusal(invoke(project, "search", "5"))
    message = refusal(invoke(project, "materialize", "--select", "rgb_tiles"))
    assert "synapse_stacks has not been made" in message
    assert "synpipe materialize" in message
    assert not (project.store / "demo" / "manifests").exists()


def test_the_package_runs_as_a_module_without_heavy_imports():
    program = "import sys, runpy; sys.argv[1:] = ['--version']; runpy.run_module('synpipe.cli', run_name='__main__')"
    command = [sys.executable, "-X", "importtime", "-c", program]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "version" in result.stdout
    imported = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines()}
    assert "synpipe.cli.make" in imported
    assert imported & {"dagster", "lancedb", "numpy", "pyarrow", "timm", "torch"} == set()


def test_tables_align_formatted_numbers_to_the_right():
    table = format_table(["asset", "rows", "share"], [["a", "12,345", "97.5%"], ["long", "7", None]])
    assert table.splitlines()[2:] == ["a      12,345  97.5%", "long        7"]


def test_every_command_has_help_with_examples_or_defaults():
    for name in (None, *main.commands):
        result = invoke(Project(Path("data"), Path("store")), *([name] if name else []), "--help")
        assert result.exit_code == 0
        assert re.search("default|Example|Commands:", result.stdout), name
        assert "Traceback" not in result.stderr


def test_store_option_wins_over_the_variable_and_that_over_the_default(project: Project, tmp_path: Path):
    def folder(*arguments: str, **places: str | None) -> Path:
        result = invoke(project, *arguments, "status", "--json", **places)
        return Path(json.loads(result.stdout)["folder"])

    assert folder() == project.store / "demo"
    (tmp_path / "chosen").mkdir()
    assert folder("--store", str(tmp_path / "chosen")) == tmp_path / "chosen" / "demo"
    assert folder(SYNPIPE_STORE=None) == project.data / "store" / "demo"
    assert {*tmp_path.iterdir()} == {project.data, tmp_path / "chosen"}  # `status` writes nothing
    assert [*(tmp_path / "chosen").iterdir()] == []


def test_a_mistyped_store_is_an_error_and_not_an_empty_store(project: Project, tmp_path: Path):
    nowhere = tmp_path / "nowhere"
    for command in (["status"], ["status", "--json"], ["gc"], ["search", "1"], ["versions"]):
        said = refusal(invoke(project, "--store", str(nowhere), *command))
        assert f"There is no store at {nowhere}" in said
    assert not nowhere.exists()
    assert f"There is no store at {project.store} yet" in invoke(project, "status").stderr


@pytest.mark.parametrize("command", ["search", "link", "provenance"])
def test_an_id_that_no_column_can_hold_is_refused(first: FirstRun, command: str):
    for synapse_id in (str(2**63), "9" * 4000, "9" * 5000):
        said = refusal(invoke(first.project, command, synapse_id))
        assert "below 2^63" in said and len(said) < 200


def test_a_value_that_no_synapse_has_is_named_with_the_existing_ones(first: FirstRun):
    query = str(a_synapse(first.project))
    region = json.loads(answer(first.project, "search", query, "--json"))["neighbours"]
    existing = next(iter(region.values()))[0]["region"]
    said = refusal(invoke(first.project, "search", query, "--where", "region=ZZ"))
    assert "region=ZZ" in said and existing in said
    long = refusal(invoke(first.project, "search", query, "--where", f"neuron_id={'9' * 5000}"))
    assert "below 2^63" in long and len(long) < 200


def test_the_picture_of_a_search_shows_as_many_tiles_as_k_asks_for(first: FirstRun, tmp_path: Path):
    sizes = {}
    for k in ("1", "5"):
        picture = tmp_path / f"{k}.PNG"
        answer(first.project, "search", str(a_synapse(first.project)), "-k", k, "--picture", str(picture))
        with Image.open(picture) as image:
            sizes[k] = image.width
    assert sizes["5"] - sizes["1"] >= 4 * 128


@pytest.mark.parametrize(("name", "says"), [("similar.jpg", ".png"), ("similar", ".png"), ("absent/a.png", "absent")])
def test_a_picture_is_saved_only_as_png_in_an_existing_folder(first: FirstRun, tmp_path: Path, name: str, says: str):
    for command in (["search", str(a_synapse(first.project))], ["confusion"], ["dataset", "check", "demo"]):
        assert says in refusal(invoke(first.project, *command, "--picture", str(tmp_path / name)))
    assert list(tmp_path.iterdir()) == []


def test_the_demo_prints_commands_that_can_be_pasted(made_here: Project, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "argv", ["synpipe"])
    result = invoke(made_here, "--store", str(made_here.store), "demo", SYNPIPE_STORE=None)
    assert result.exit_code == 0, result.stderr
    with Image.open(made_here.store / "demo" / "neighbours.png") as picture:
        picture.load()
    pasted = re.search(r"synpipe (--store \S+ )?search (\d+)", result.stdout)
    assert pasted, result.stdout
    again = invoke(made_here, *(pasted[1] or "").split(), "search", pasted[2], SYNPIPE_STORE=None)
    assert again.exit_code == 0, again.stderr
    assert "96 synapses" in result.stdout


@pytest.mark.slow
def test_ctrl_c_is_no_fault_and_the_same_command_carries_on(project: Project):
    command = [str(Path(sys.executable).parent / "synpipe"), "materialize", "--select", "volume"]
    process = subprocess.Popen(
        command, env=environment(project), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    for line in process.stderr:
        if "demo/volume" in line:
            break
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    message = refusal(subprocess.CompletedProcess(command, process.returncode, output, errors))
    assert "demo/volume: interrupted" in message
    assert not (project.store / "demo" / "manifests").exists()
    answer(project, "materialize", "--select", "volume")
