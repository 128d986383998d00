"""The explorer's server answers correctly, refuses clearly, writes nothing, and gives no errors while tables are rebuilt."""

import http.client
import io
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import numpy as np
import pytest
import uvicorn
from PIL import Image

from synpipe.assets.rgb_tiles import open_tiles
from synpipe.datasets import Dataset, Project
from synpipe.explorer import answers
from synpipe.explorer.server import make_app
from synpipe.index.publish import publish
from synpipe.store.files import read_table, write_table
from synpipe_tests.conftest import environment, project_of, run_synpipe


@dataclass
class Site:
    url: str
    dataset: Dataset

    def ask(self, path: str, **query: Any) -> Any:
        """The JSON of an answer, or the status and the sentence of an error."""
        address = f"{self.url}{path}{'?' + urlencode(query) if query else ''}"
        try:
            with urllib.request.urlopen(address, timeout=60) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)["error"]

    def send(self, content: bytes, kind: str = "image/png", **query: Any) -> Any:
        request = urllib.request.Request(
            f"{self.url}/api/demo/tiny/search?{urlencode(query)}", content, {"Content-Type": kind}
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)["error"]


@pytest.fixture(scope="module")
def project(explored: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A copy of the small demo with a map, in which tests publish other versions of the index."""
    shared, own = project_of(explored), tmp_path_factory.mktemp("own")
    for folder in (shared.data, shared.store):
        shutil.copytree(folder, own / folder.name)
    return Project(own / shared.data.name, own / shared.store.name)


@pytest.fixture(scope="module")
def site(project: Project) -> Iterator[Site]:
    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(make_app(project), log_level="warning"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    yield Site(f"http://127.0.0.1:{listening.getsockname()[1]}", project.dataset("demo"))
    server.should_exit = True
    thread.join()


@pytest.fixture(scope="module")
def rows(site: Site) -> list[dict[str, Any]]:
    """The rows of the Parquet file."""
    return read_table(site.dataset.table_path("tiny")).to_pylist()


def test_data_sets_and_indexes_are_described(site: Site, rows: list[dict[str, Any]]):
    (dataset,) = site.ask("/api/datasets")["datasets"]
    assert (dataset["name"], dataset["encoders"], dataset["neuroglancer"]) == ("demo", ["tiny", "other"], False)
    assert dataset["classes"][-1] == "unlabelled"
    about = site.ask("/api/demo/tiny/about")
    assert (about["rows"], about["dimensions"], about["has_map"]) == (len(rows), len(rows[0]["vector"]), True)
    assert about["metrics"] == ["cosine", "l2", "dot", "l1"]
    assert about["regions"] == sorted({row["region"] for row in rows})
    assert about["fingerprint"] == rows[0]["encoder_fingerprint"]
    assert site.ask("/api/demo/tiny/random")["id"] in {str(row["synapse_id"]) for row in rows}


@pytest.mark.parametrize("metric", ["cosine", "l2", "dot", "l1"])
def test_the_most_similar_of_each_class_are_those_of_a_plain_computation(
    site: Site, rows: list[dict[str, Any]], metric: str
):
    vectors = np.array([row["vector"] for row in rows])
    vectors *= (np.array([row["norm"] for row in rows]) / np.linalg.norm(vectors, axis=1))[:, None]
    query = rows[5]
    here = vectors[5]
    distances = {
        "cosine": 1 - vectors @ here / np.linalg.norm(vectors, axis=1) / np.linalg.norm(here),
        "l2": np.linalg.norm(vectors - here, axis=1),
        "dot": -(vectors @ here),
        "l1": np.abs(vectors - here).sum(axis=1),
    }[metric]
    for own in (0, 1):
        found = site.ask(
            "/api/demo/tiny/search", id=query["synapse_id"], metric=metric, per_class=3, exclude_neuron=own
        )
        assert found["query"]["id"] == str(query["synapse_id"])
        for group in found["groups"]:
            others = [
                place
                for place, row in enumerate(rows)
                if (row["neurotransmitter"] or "unlabelled") == group["name"]
                and row is not query
                and not (own and row["neuron_id"] == query["neuron_id"])
            ]
            nearest = sorted(others, key=lambda place: distances[place])[:3]
            shown = group["neighbours"]
            assert [one["id"] for one in shown] == [str(rows[place]["synapse_id"]) for place in nearest]
            np.testing.assert_allclose([one["distance"] for one in shown], distances[nearest], rtol=1e-3, atol=1e-4)
            for one, row in zip(shown, (rows[place] for place in nearest), strict=True):
                assert one["position_nm"] == [row["x_nm"], row["y_nm"], row["z_nm"]]
                assert one["neuron"] == (None if row["neuron_id"] is None else str(row["neuron_id"]))
                assert one["neurotransmitter"] == row["neurotransmitter"]
                assert (one["predicted"], one["probability"]) == (
                    row["predicted_neurotransmitter"],
                    row["predicted_probability"],
                )


def test_filters_keep_only_matching_synapses(site: Site, rows: list[dict[str, Any]]):
    region = rows[0]["region"]
    found = site.ask("/api/demo/tiny/search", id=rows[0]["synapse_id"], region=region, per_class=100)
    assert {one["region"] for group in found["groups"] for one in group["neighbours"]} == {region}
    assert sum(len(group["neighbours"]) for group in found["groups"]) == sum(r["region"] == region for r in rows) - 1
    no_match = site.ask("/api/demo/tiny/search", id=rows[0]["synapse_id"], region="' OR 1=1 --")
    assert [group["neighbours"] for group in no_match["groups"]] == [[]] * len(no_match["groups"])


@pytest.mark.parametrize(
    ("path", "status", "says"),
    [
        ("/api/nothing/tiny/about", 404, "no data set 'nothing'"),
        ("/api/demo/nothing/about", 404, "it has tiny, other"),
        ("/api/demo/tiny/synapses/12", 404, "unknown or was rejected"),
        ("/api/demo/tiny/search?id=12", 404, "unknown or was rejected"),
        ("/api/demo/tiny/search?id=9223372036854775808", 400, "below 2^63"),
        (f"/api/demo/tiny/search?id={'9' * 5000}", 400, "below 2^63"),
        (f"/api/demo/tiny/search?id=ID&per_class={'9' * 5000}", 400, "from 1 to 100"),
        (f"/api/demo/tiles/{'9' * 5000}.png", 400, "is not a synapse id"),
        ("/api/demo/tiny/search?id=-1", 400, "is not a synapse id"),
        ("/api/demo/tiny/search", 400, "is not a synapse id"),
        ("/api/demo/tiny/search?id=ID&metric=manhattan", 400, "cosine, l2, dot, l1"),
        ("/api/demo/tiny/search?id=ID&per_class=0", 400, "from 1 to 100"),
        ("/api/demo/tiny/search?id=ID&per_class=1e9", 400, "from 1 to 100"),
        ("/api/demo/tiny/search?id=ID&exclude_neuron=yes", 400, "must be 1 or 0"),
        ("/api/demo/tiny/search?id=ID&metrc=l1", 400, "'metrc' is unknown"),
        ("/api/demo/tiny/search?id=ID&id=ID", 400, "given twice"),
        ("/api/demo/tiles/12.png", 404, "no tile of synapse 12"),
        ("/api/demo/tiles/x.png", 400, "is not a synapse id"),
        ("/api/demo/tiles/..%2F..%2Fsynapses.png", 404, ""),
        ("/api/..%2Fdata/tiny/about", 404, ""),
        ("/../../../etc/passwd", 404, ""),
        ("/..%2F..%2Fserver.py", 404, ""),
    ],
)
def test_an_unknown_name_or_wrong_value_is_refused_with_a_sentence(
    site: Site, rows: list[dict[str, Any]], path: str, status: int, says: str
):
    connection = http.client.HTTPConnection(site.url.removeprefix("http://"))
    connection.request(
        "GET", path.replace("ID", str(rows[0]["synapse_id"]))
    )  # not urllib, which would normalise the path
    answer = connection.getresponse()
    assert answer.status == status
    assert says in json.load(answer)["error"]


def test_a_tile_equals_the_one_in_the_store_and_is_sent_once(site: Site, rows: list[dict[str, Any]]):
    row = rows[3]
    url = f"{site.url}/api/demo/tiles/{row['synapse_id']}.png"
    with urllib.request.urlopen(url) as answer:
        pixels = np.asarray(Image.open(io.BytesIO(answer.read())))
        tag = answer.headers["ETag"]
    np.testing.assert_array_equal(pixels.transpose(2, 0, 1), open_tiles(site.dataset).by_id(row["synapse_id"]))
    assert tag == f'"{row["content_hash"]}"'
    with pytest.raises(urllib.error.HTTPError, match="304"):
        urllib.request.urlopen(urllib.request.Request(url, headers={"If-None-Match": tag}))


def test_the_map_has_all_positions_and_the_columns_that_colour_it(site: Site, rows: list[dict[str, Any]]):
    content = urllib.request.urlopen(f"{site.url}/api/demo/tiny/map").read()
    length = int.from_bytes(content[:4], "little")
    header, body = json.loads(content[4 : 4 + length]), content[4 + length :]
    assert (4 + length) % 8 == 0 and header["rows"] == len(rows)
    columns = {
        column["name"]: np.frombuffer(body[column["offset"] :][: column["length"]], np.dtype(column["dtype"]))
        for column in header["columns"]
    }
    names = {column["name"]: column.get("names") for column in header["columns"]}
    by_id = {row["synapse_id"]: row for row in rows}
    for place, synapse_id in enumerate(columns["synapse_id"].tolist()):
        row = by_id[synapse_id]
        assert (columns["map_x"][place], columns["map_y"][place]) == (
            np.float32(row["map_x"]),
            np.float32(row["map_y"]),
        )
        code = int(columns["neurotransmitter"][place])
        assert (None if code == 65535 else names["neurotransmitter"][code]) == row["neurotransmitter"]
    assert all(column["offset"] % 8 == 0 for column in header["columns"])


def png(pixels: np.ndarray, **more: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", **more)
    return buffer.getvalue()


def test_an_image_of_a_tile_finds_its_synapse(site: Site, rows: list[dict[str, Any]]):
    row = rows[7]
    tile = open_tiles(site.dataset).by_id(row["synapse_id"])
    found = site.send(png(tile.transpose(1, 2, 0)), per_class=1)
    assert found["query"] is None
    nearest = min((one for group in found["groups"] for one in group["neighbours"]), key=lambda one: one["distance"])
    assert (nearest["id"], nearest["distance"]) == (str(row["synapse_id"]), pytest.approx(0, abs=1e-4))
    # A larger image is cropped to the same tile and never resized.
    wide = np.pad(tile, ((0, 0), (100, 100), (40, 40))).transpose(1, 2, 0)
    assert site.send(png(np.ascontiguousarray(wide)), per_class=1)["groups"] == found["groups"]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "cannot be read as PNG"),
        (b"GIF89a" + bytes(100), "cannot be read as PNG"),
        (png(np.zeros((64, 64), np.uint8))[:-30], "cannot be read as PNG"),
        (png(np.zeros((16, 300), np.uint8)), "at least 32×32"),
        (png(np.zeros((9000, 9000), np.uint8)), "at most 4,194,304"),  # a file of 80 KB with 81 MB of pixels
        (png(np.zeros((64, 64), np.uint16)), "8 bits per channel"),
    ],
)
def test_an_image_that_cannot_be_used_is_refused(site: Site, content: bytes, says: str):
    status, sentence = site.send(content)
    assert status == 400 and says in sentence


def test_a_large_body_or_another_type_is_refused(site: Site):
    assert site.send(b"{}", "application/json")[0] == 415
    status, sentence = site.send(bytes(5 * 2**20))
    assert status == 413 and "4 MB" in sentence


def test_other_host_names_are_refused_and_responses_have_security_headers(site: Site):
    port = site.url.rpartition(":")[2]
    for host, status in ((f"localhost:{port}", 200), ("elsewhere.example", 403)):
        connection = http.client.HTTPConnection("127.0.0.1", int(port))
        connection.request("GET", "/api/datasets", headers={"Host": host})
        answer = connection.getresponse()
        assert answer.status == status
    headers = urllib.request.urlopen(f"{site.url}/").headers
    assert "default-src 'self'" in headers["Content-Security-Policy"]
    assert headers["X-Content-Type-Options"] == "nosniff"


def test_while_an_index_is_rebuilt_each_answer_comes_from_the_old_or_the_new_version(
    site: Site, rows: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(answers, "VERSION_CHECK_S", 0.01)
    before = site.ask("/api/demo/tiny/about")["version"]
    wrong: list[Any] = []
    seen: set[int] = set()
    done = threading.Event()

    def read() -> None:
        turn = 0
        while not done.is_set():
            turn += 1
            found = site.ask("/api/demo/tiny/search", id=rows[turn % len(rows)]["synapse_id"])
            if isinstance(found, tuple) or not any(group["neighbours"] for group in found["groups"]):
                wrong.append(found)
            else:
                seen.add(found["version"])

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    for number in range(4):
        table = site.dataset.table_path("tiny")
        publish(table, site.dataset.lancedb_folder, "tiny", f"{number:032x}", lambda line: None)
    deadline = time.monotonic() + 60
    while max(seen, default=0) <= before and time.monotonic() < deadline:
        time.sleep(0.05)
    done.set()
    for reader in readers:
        reader.join()
    assert not wrong
    assert min(seen) == before < max(seen)


def test_a_table_that_was_damaged_and_rebuilt_is_shown_although_its_number_is_the_same(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(answers, "VERSION_CHECK_S", 0.01)
    folder, rows = site.dataset.lancedb_folder, read_table(site.dataset.table_path("other"))
    abouts, reports = [], []
    for number in range(2):
        write_table(tmp_path / "table.parquet", rows.slice(number))
        for manifest in (folder / "other.lance" / "_versions").iterdir():
            manifest.write_bytes(b"damaged")
        reports.append(publish(tmp_path / "table.parquet", folder, "other", f"{number:032x}", lambda line: None))
        time.sleep(0.05)
        abouts.append(site.ask("/api/demo/other/about"))
    assert reports[0].version == reports[1].version == abouts[1]["version"]
    assert [about["rows"] for about in abouts] == [len(rows), len(rows) - 1]
    assert [about["data_version"] for about in abouts] == [f"{number:032x}" for number in range(2)]
    assert site.ask("/api/demo/other/search", id=rows["synapse_id"][1].as_py())["groups"]


def test_the_command_prints_its_address_and_ends_on_interrupt(project: Project):
    before = {path: path.stat().st_mtime_ns for path in project.store.rglob("*")}
    command = [str(Path(sys.executable).parent / "synpipe"), "explore", "--port", "0"]
    process = subprocess.Popen(command, env=environment(project), stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    line = process.stdout.readline()
    found = re.search(r"http://127\.0\.0\.1:(\d+)/", line)
    assert found, line
    with urllib.request.urlopen(f"{found[0]}api/demo/other/random") as answer:
        assert json.load(answer)["id"]
    taken = run_synpipe(project, "explore", "--port", found[1])
    assert taken.returncode == 1 and f"port {found[1]}" in taken.stderr
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=30) == 0
    assert {path: path.stat().st_mtime_ns for path in project.store.rglob("*")} == before, "the store is only read"
