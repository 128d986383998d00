"""The static site in a browser: its answers compared with numpy, its requests to the host, and its use without a network."""

import gzip
import io
import json
import shutil
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import h5py
import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from playwright.sync_api import Browser, ConsoleMessage, Page, expect

from synpipe.annotations.schema import UNLABELLED
from synpipe.assets.asset import facts_as_json
from synpipe.assets.manifest import Manifest, write_manifest
from synpipe.assets.volume import VolumeFacts, find_viewer
from synpipe.datasets import Dataset, DatasetSpec
from synpipe.errors import SynpipeError
from synpipe.explorer import column_files, tile_packs
from synpipe.explorer.quantised import quantise
from synpipe.explorer.site import SiteReport, export_site
from synpipe.index.distances import METRICS
from synpipe.index.publish import publish
from synpipe.store.files import write_table
from synpipe_tests.conftest import project_of, run_synpipe
from synpipe_tests.support import tables
from synpipe_tests.support.browser import CHROMIUM, QUIET, chromium
from synpipe_tests.support.static_host import Host, host
from synpipe_tests.support.tables import clustered, embedding_table, unit

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="neither chromium nor google-chrome is on the PATH")

CLASSES = ("acetylcholine", "gaba", "serotonin", "octopamine")  # no synapse here is octopaminergic
GROUPS = [*CLASSES, UNLABELLED]
COUNT = 1_500
DIMENSIONS = {"tiny": 33, "other": 64}  # 33 is not a multiple of four
FIRST_ID = 2**63 - 1 - COUNT  # the largest possible ids, which float64 cannot distinguish
REGIONS = ("AL", "O'Brien", "<b>MB</b>", "' OR '1'='1", None)
TILES = 40
PACK_BYTES, PIECE_BYTES = 200_000, 20_000  # many packs, and more than one file of vectors
VOXEL_NM_ZYX = (40.0, 4.0, 4.6)


@dataclass
class Exported:
    """A data set, its site, and the true content of the site. vectors: those of each encoder, not normalised."""

    dataset: Dataset
    folder: Path
    report: SiteReport
    ids: np.ndarray
    columns: dict[str, list[Any]]
    vectors: dict[str, np.ndarray]
    tiles: np.ndarray
    log: list[str]

    @property
    def site(self) -> dict[str, Any]:
        return json.loads((self.folder / "site.json").read_text())

    def row(self, synapse_id: str) -> int:
        return int(np.flatnonzero(self.ids == int(synapse_id))[0])


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    folder = tmp_path_factory.mktemp("site")
    spec = DatasetSpec.parse(
        {
            "title": "made up",
            "volume": {"path": "none.h5"},
            "annotations": [{"format": "cremi", "path": "none.h5"}],
            "classes": CLASSES,
            "encoders": ["tiny", "other"],
        },
        "test",
    )
    dataset = Dataset("made_up", spec, folder / "store", folder, {}, folder)
    random = np.random.default_rng(0)
    ids = FIRST_ID + 1 + random.permutation(COUNT)
    kinds = random.choice(4, COUNT, p=[0.5, 0.3, 0.18, 0.02])
    columns: dict[str, list[Any]] = {
        "neurotransmitter": [(*CLASSES[:2], None, "serotonin")[kind] for kind in kinds],  # serotonin is rare
        "region": [REGIONS[place] for place in random.integers(0, len(REGIONS), COUNT)],
        "hemilineage": [("07B", None)[place] for place in random.integers(0, 2, COUNT)],
        "neuron_id": [None if place == 0 else 2**63 - int(place) for place in random.integers(0, 40, COUNT)],
        "x_nm": (np.arange(COUNT) + 1e6 / 3).tolist(),  # not exact in float32
        "y_nm": (np.arange(COUNT) * 2.0).tolist(),
        "z_nm": (np.arange(COUNT) * 3.0).tolist(),
    }
    vectors = {}
    for seed, (encoder, dimensions) in enumerate(DIMENSIONS.items()):
        vectors[encoder] = clustered(COUNT, dimensions, seed)
        places = pa.table(
            {
                "synapse_id": ids,
                "map_x": pa.array(np.arange(COUNT), pa.float32()),
                "map_y": pa.array(-np.arange(COUNT), pa.float32()),
                "predicted_neurotransmitter": ["gaba"] * COUNT,
                "predicted_probability": pa.array(np.linspace(0, 1, COUNT), pa.float32()),
            }
        )
        path = embedding_table(
            folder / f"{encoder}.parquet", vectors[encoder], 3, derived=[places], synapse_id=ids, **columns
        )
        publish(path, dataset.lancedb_folder, encoder, "a" * 32, lambda line: None)
    tiles = write_tiles(dataset, ids)
    image = {"type": "image", "name": "em", "source": "precomputed://https://example.org/em"}
    write_manifest(
        dataset,
        Manifest(
            "volume", "v", "c", {}, facts_as_json(VolumeFacts("em", (9, 9, 9), VOXEL_NM_ZYX, (0, 0, 0), [], image))
        ),
    )
    log: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tile_packs, "PACK_BYTES", PACK_BYTES)
        patch.setattr(column_files, "PIECE_BYTES", PIECE_BYTES)
        report = export_site(dataset, list(DIMENSIONS), folder / "site", log.append)
    return Exported(dataset, folder / "site", report, ids, columns, vectors, tiles, log)


def write_tiles(dataset: Dataset, ids: np.ndarray) -> np.ndarray:
    """Write 40 tiles of squares, uint8 (40, 3, 256, 256), which the synapses share: row i has tile i % 40. Returns the tiles."""
    squares = np.random.default_rng(1).integers(0, 256, (TILES, 3, 16, 16), dtype=np.uint8)
    tiles = squares.repeat(16, axis=2).repeat(16, axis=3)
    dataset.folder.mkdir(exist_ok=True)
    with h5py.File(dataset.folder / "part.h5", "w") as file:
        file.create_dataset("tiles", data=tiles)
    rows = np.arange(len(ids)) % TILES
    index = pa.table(
        {
            "synapse_id": ids,
            "file": ["part.h5"] * len(ids),
            "row": pa.array(rows, pa.int32()),
            "crc32": pa.array([zlib.crc32(tiles[row].data) for row in rows], pa.uint32()),
            "content_hash": [f"{place:032x}" for place in range(len(ids))],
        }
    )
    write_table(dataset.tiles_path, index)
    write_manifest(dataset, Manifest("rgb_tiles", "v", "c", {}, {"stacking": "colour"}))
    return tiles


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as opened:
        yield opened


@pytest.fixture(scope="module")
def served(exported: Exported) -> Iterator[Host]:
    with host(exported.folder, ranges=True) as found:
        yield found


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """A page of a browser with an empty cache. An error on its console fails the test."""
    context = browser.new_context()
    page = context.new_page()
    said: list[str] = []

    def hear(message: ConsoleMessage) -> None:
        if message.type == "error" and not message.location["url"].endswith("favicon.ico"):
            said.append(message.text)

    page.on("console", hear)
    page.on("pageerror", lambda error: said.append(str(error)))
    yield page
    context.close()
    assert said == []


@pytest.fixture
def source(page: Page, served: Host) -> Page:
    """A page that has opened the source only, without the explorer's pages."""
    return open_source(page, served)


def open_source(page: Page, served: Host) -> Page:
    page.goto(f"{served.url}icon.svg")  # loads nothing else
    page.evaluate(
        """async () => {
            window.source = await (await import(new URL("js/source-static.js", location.href))).open(location.href);
            window.progress = [];
            window.source.onprogress = (at) => window.progress.push(at);
        }"""
    )
    return page


def search(source: Page, synapse_id: int, **options: Any) -> dict[str, Any]:
    asked = {"dataset": "made_up", "encoder": "tiny", "id": str(synapse_id), "metric": "cosine", "perClass": 4}
    return source.evaluate("asked => source.search(asked)", asked | options)


def failure(source: Page, call: str) -> dict[str, Any]:
    return source.evaluate(
        f"async () => {{ try {{ await {call} }} catch ({{name, message, status}}) {{ return {{name, message, status}} }} }}"
    )


def distances(vectors: np.ndarray, query: int, metric: str) -> np.ndarray:
    """Distances by their textbook definitions."""
    all_, here = vectors.astype(np.float64), vectors[query].astype(np.float64)
    return {
        "cosine": lambda: 1 - all_ @ here / np.linalg.norm(all_, axis=1) / np.linalg.norm(here),
        "l2": lambda: np.sqrt(((all_ - here) ** 2).sum(axis=1)),
        "dot": lambda: -(all_ @ here),
        "l1": lambda: np.abs(all_ - here).sum(axis=1),
    }[metric]()


def nearest(
    exported: Exported, vectors: np.ndarray, query: int, metric: str, count: int, keep: np.ndarray
) -> dict[str, list[int]]:
    """The nearest rows of each class among the rows of `keep`, without the query itself."""
    labels = np.array([label or UNLABELLED for label in exported.columns["neurotransmitter"]])
    order = np.argsort(distances(vectors, query, metric), kind="stable")
    order = order[(order != query) & keep[order]]
    return {name: order[labels[order] == name][:count].tolist() for name in GROUPS}


def stored_vectors(exported: Exported, encoder: str) -> np.ndarray:
    """The vectors with their lengths, read from the files of the site as `site.json` describes them, in the order of `ids`."""
    (entry,) = exported.site["datasets"]
    ids = read_columns(exported.folder, entry["synapses"])["synapse_id"]
    found = read_columns(exported.folder, entry["encoders"][encoder]["columns"])
    codes = read_columns(exported.folder, entry["encoders"][encoder]["vectors"])["codes"].reshape(len(ids), -1)
    vectors = found["centre"][:, None] * found["mean"].astype(np.float64) + found["scale"][:, None] * codes
    vectors *= found["norm"][:, None]
    return vectors[np.argsort(ids)][np.argsort(np.argsort(exported.ids))]


def read_columns(folder: Path, file: dict[str, Any]) -> dict[str, np.ndarray]:
    content = b"".join((folder / path).read_bytes() for path in file["paths"])
    assert len(content) == file["bytes"]
    content = gzip.decompress(content)
    return {
        column["name"]: np.frombuffer(
            content, f"<{np.dtype(column['dtype']).str[1:]}", column["length"], column["offset"]
        )
        for column in file["columns"]
    }


@pytest.mark.parametrize("encoder", DIMENSIONS)
def test_each_metric_finds_the_nearest_of_every_class(exported: Exported, source: Page, encoder: str) -> None:
    stored, everyone, same = stored_vectors(exported, encoder), np.full(COUNT, True), []
    for query in (0, 17, 321):
        for metric in METRICS:
            found = search(source, exported.ids[query], encoder=encoder, metric=metric, perClass=5)
            assert [group["name"] for group in found["groups"]] == GROUPS
            as_stored = nearest(exported, stored, query, metric, 5, everyone)
            true = nearest(exported, exported.vectors[encoder], query, metric, 5, everyone)
            for group in found["groups"]:
                rows = [exported.row(neighbour["id"]) for neighbour in group["neighbours"]]
                shown = np.array([neighbour["distance"] for neighbour in group["neighbours"]])
                assert (np.diff(shown) >= 0).all()
                here = distances(stored, query, metric)
                np.testing.assert_allclose(shown, here[rows], rtol=1e-5, atol=1e-5)
                np.testing.assert_allclose(shown, here[as_stored[group["name"]]], rtol=1e-5, atol=1e-5)
                same += [row in true[group["name"]] for row in rows]
    assert np.mean(same) >= 0.97


def test_the_site_states_its_true_recall(exported: Exported, source: Page) -> None:
    stated = exported.site["datasets"][0]["encoders"]["other"]["recall"]
    hits: dict[str, list[bool]] = {name: [] for name in GROUPS}
    for query in range(0, COUNT, 30):
        true = nearest(exported, exported.vectors["other"], query, "cosine", 4, np.full(COUNT, True))
        for group in search(source, exported.ids[query], encoder="other")["groups"]:
            hits[group["name"]] += [exported.row(each["id"]) in true[group["name"]] for each in group["neighbours"]]
    assert stated["overall"] == pytest.approx(
        np.mean([hit for of_class in hits.values() for hit in of_class]), abs=0.02
    )
    assert (stated["rarest_class"], stated["per_class"]) == ("serotonin", 4)
    assert stated["rarest"] == pytest.approx(np.mean(hits["serotonin"]), abs=0.03)
    assert min(stated["metrics"].values()) > 0.95
    about = source.evaluate("source.about('made_up', 'other')")
    assert about["recall"] == {"recall@4": stated["overall"], "recall@4 of serotonin": stated["rarest"]}
    assert exported.report.recall["other"] == stated


def test_vectors_that_share_a_large_component_keep_their_neighbours() -> None:
    vectors = unit(clustered(2_000, 64) + 100).astype(np.float32)
    seen = quantise(vectors).rows(slice(None))
    np.testing.assert_allclose(np.linalg.norm(seen, axis=1), 1, atol=1e-6)
    step = np.abs(vectors).max(axis=1, keepdims=True) / 127
    plain = np.rint(vectors / step) * step
    true, found, plainly = (
        np.argsort(-(each[:100] @ each.T), axis=1)[:, 1:5].tolist() for each in (vectors, seen, plain)
    )

    def recall(answers: list[list[int]]) -> float:
        return float(np.mean([len({*answer} & {*right}) / 4 for answer, right in zip(answers, true, strict=True)]))

    assert recall(found) > 0.95 and recall(plainly) < 0.3
    (one,) = quantise(vectors[:1]).rows(slice(None))  # equals its own mean
    np.testing.assert_allclose(one, vectors[0], atol=1e-6)


def test_neighbours_have_their_metadata(exported: Exported, source: Page) -> None:
    found = search(source, exported.ids[7])
    assert found["query"]["id"] == str(exported.ids[7])
    viewer = find_viewer(exported.dataset)
    for group in found["groups"]:
        for neighbour in group["neighbours"]:
            row = exported.row(neighbour["id"])  # fails for an id that was rounded to float64
            neuron = exported.columns["neuron_id"][row]
            assert neighbour["neuron"] == (None if neuron is None else str(neuron))
            for column in ("neurotransmitter", "region", "hemilineage"):
                assert neighbour[column] == exported.columns[column][row]
            assert (neighbour["neurotransmitter"] or UNLABELLED) == group["name"]
            assert neighbour["predicted"] == "gaba"
            assert neighbour["probability"] == pytest.approx(row / (COUNT - 1), abs=1e-6)
            x, y, z = (exported.columns[f"{axis}_nm"][row] for axis in "xyz")
            assert neighbour["position_nm"] == [x, y, z]
            assert viewer_state(neighbour["neuroglancer"]) == viewer_state(viewer.link((z, y, x), neighbour["id"]))
    assert source.evaluate("id => source.synapse('made_up', 'other', id)", str(exported.ids[7])) == found["query"]


def viewer_state(link: str) -> tuple[str, Any]:
    parts = urlsplit(link)
    return parts.netloc, json.loads(unquote(parts.fragment.removeprefix("!")))


def test_filters(exported: Exported, source: Page) -> None:
    query = next(row for row in range(COUNT) if exported.columns["neuron_id"][row] is not None)
    own = np.array([neuron == exported.columns["neuron_id"][query] for neuron in exported.columns["neuron_id"]])
    lineage = np.array([name == "07B" for name in exported.columns["hemilineage"]])
    for region in REGIONS[:-1]:
        in_region = np.array([name == region for name in exported.columns["region"]])
        for options, keep in (
            ({"region": region}, in_region),
            ({"region": region, "excludeNeuron": True}, in_region & ~own),
            ({"region": region, "hemilineage": "07B"}, in_region & lineage),
        ):
            found = search(source, exported.ids[query], perClass=100, **options)
            expected = nearest(exported, exported.vectors["tiny"], query, "cosine", COUNT, keep)
            for group in found["groups"]:
                rows = {exported.row(neighbour["id"]) for neighbour in group["neighbours"]}
                assert rows <= set(expected[group["name"]])
                assert len(rows) == min(100, len(expected[group["name"]]))
    nowhere = search(source, exported.ids[query], region="no such region")
    assert [group["neighbours"] for group in nowhere["groups"]] == [[]] * len(GROUPS)


def test_invalid_queries_are_refused_with_a_sentence(exported: Exported, source: Page) -> None:
    place = "dataset: 'made_up', encoder: 'tiny'"
    known = f"id: '{exported.ids[0]}'"
    for call, words, status in (
        (f"source.search({{{place}, id: '17', metric: 'l2', perClass: 4}})", "Synapse 17 is not on this site", 404),
        (f"source.search({{{place}, id: '{2**63}', metric: 'l2', perClass: 4}})", "is not on this site", 404),
        (f"source.search({{{place}, id: '1 OR 1', metric: 'l2', perClass: 4}})", "is not a synapse id", 400),
        (f"source.search({{{place}, {known}, metric: 'euclid', perClass: 4}})", "metric “euclid” is unknown", 400),
        (f"source.search({{{place}, {known}, metric: 'l2', perClass: 0}})", "from 1 to 100, not “0”", 400),
        ("source.random('made_up', 'toString')", "no encoder “toString” here; it has tiny, other", 404),
        ("source.about('elsewhere', 'tiny')", "no data set “elsewhere”", 404),
        ("source.tile('made_up', '../../x')", "is not a synapse id", 400),
    ):
        said = failure(source, call)
        assert said["name"] == "SourceError" and words in said["message"] and said["status"] == status
    aborted = f"source.search({{{place}, {known}, metric: 'l2', perClass: 4}}, AbortSignal.abort())"
    assert failure(source, aborted)["name"] == "AbortError"


def test_data_sets_and_indexes_are_described(exported: Exported, source: Page) -> None:
    (dataset,) = source.evaluate("source.datasets()")
    assert dataset["name"] == "made_up" and dataset["encoders"] == ["tiny", "other"]
    assert dataset["classes"] == GROUPS and dataset["neuroglancer"] is True
    about = source.evaluate("source.about('made_up', 'tiny')")
    assert about["rows"] == COUNT and about["dimensions"] == 33 and about["has_map"] and not about["upload"]
    assert about["metrics"] == list(METRICS) and about["regions"] == sorted(REGIONS[:-1])
    assert source.evaluate("source.random('made_up', 'tiny')") in set(map(str, exported.ids))


def test_the_map_has_every_synapse_at_its_position(exported: Exported, source: Page) -> None:
    found = source.evaluate(
        """async () => {
            const map = await source.map("made_up", "tiny", (at) => window.last = at);
            const columns = map.columns.map(({name, kind, names, codes, values}) =>
                ({name, kind, labels: codes ? Array.from(codes, (code) => names[code] ?? null) : Array.from(values)}));
            return {rows: map.rows, ids: Array.from(map.ids, String), x: [...map.x], y: [...map.y], columns, last: window.last};
        }"""
    )
    assert found["rows"] == COUNT and sorted(found["ids"]) == sorted(map(str, exported.ids))
    rows = [exported.row(synapse_id) for synapse_id in found["ids"]]
    assert found["x"] == rows and found["y"] == [-row for row in rows]
    columns = {column["name"]: column["labels"] for column in found["columns"]}
    for name in ("neurotransmitter", "region", "hemilineage"):
        assert columns[name] == [exported.columns[name][row] for row in rows]
    assert columns["predicted_neurotransmitter"] == ["gaba"] * COUNT
    np.testing.assert_allclose(columns["predicted_probability"], np.array(rows) / (COUNT - 1), atol=1e-6)
    assert found["last"]["loaded"] == found["last"]["total"]


@pytest.mark.parametrize("ranges", [True, False])
def test_tiles_are_read_from_packs(exported: Exported, page: Page, ranges: bool) -> None:
    with host(exported.folder, ranges) as served:
        open_source(page, served)
        rows = [0, 1, 2, 700, 701, COUNT - 1]
        pixels = page.evaluate(
            """ids => Promise.all(ids.map(async (id) => {
                const image = new Image();
                image.src = await source.tile("made_up", id);
                await image.decode();
                const context = new OffscreenCanvas(256, 256).getContext("2d");
                context.drawImage(image, 0, 0);
                const { data } = context.getImageData(0, 0, 256, 256);
                const middles = Array.from({ length: 256 }, (_, square) => 256 * (16 * (square >> 4) + 8) + 16 * (square & 15) + 8);
                return middles.flatMap((at) => [...data.slice(4 * at, 4 * at + 3)]);
            }))""",
            [str(exported.ids[row]) for row in rows],
        )
        packs = [answer for answer in served.asked if "/tiles-" in answer[0]]
    for row, values in zip(rows, pixels, strict=True):
        squares = np.array(values).reshape(16, 16, 3).transpose(2, 0, 1)
        assert np.abs(squares - exported.tiles[row % TILES, :, 8::16, 8::16]).mean() < 4
    assert len(list((exported.folder / exported.site["datasets"][0]["tiles"]["folder"]).iterdir())) > 20
    if ranges:
        assert {status for _, status, _ in packs} == {206} and sum(size for _, _, size in packs) < len(rows) * 40_000
    else:
        assert {status for _, status, _ in packs} <= {200, 304}
        assert len(packs) <= len({path for path, _, _ in packs}) + 1  # each pack once, and the test for Range support


def test_a_tile_of_noise_is_written() -> None:
    noise = np.random.default_rng(0).choice(np.array([0, 255], np.uint8), (3, 256, 256))
    with Image.open(io.BytesIO(tile_packs.jpeg(noise))) as image:
        assert image.size == (256, 256)


def test_progress_is_reported_in_bytes(exported: Exported, source: Page) -> None:
    search(source, exported.ids[0])
    progress = source.evaluate("progress")
    (entry,) = exported.site["datasets"]
    parts = (entry["synapses"], entry["encoders"]["tiny"]["columns"], entry["encoders"]["tiny"]["vectors"])
    assert progress[-1]["loaded"] == progress[-1]["total"] == sum(part["bytes"] for part in parts)
    assert all(before["loaded"] <= after["loaded"] for before, after in pairwise(progress))


def test_an_incomplete_download_is_repeated(exported: Exported, source: Page) -> None:
    asked = (
        f"source.search({{dataset: 'made_up', encoder: 'tiny', id: '{exported.ids[0]}', metric: 'l2', perClass: 4}})"
    )
    files = "**/data/vectors-*"
    source.context.route(files, lambda route: route.fulfill(body=b"half"))
    assert "arrived: try again" in failure(source, asked)["message"]
    source.context.unroute(files)
    assert len(source.evaluate(asked)["groups"]) == len(GROUPS)


def test_a_reload_downloads_nothing_and_needs_no_network(exported: Exported, page: Page) -> None:
    hosts: set[str | None] = set()
    page.on("request", lambda request: hosts.add(urlsplit(request.url).netloc))
    query = str(exported.ids[5])
    with host(exported.folder, ranges=True) as served:
        page.goto(f"{served.url}?id={query}&per_class=2")
        wait_for_answer(page)
        page.wait_for_function("() => navigator.serviceWorker.controller !== null")
        assert served.bytes > 100_000
        served.asked.clear()
        page.reload()
        wait_for_answer(page)
        page.wait_for_timeout(300)
        assert [(path, size) for path, _, size in served.asked if path != "/sw.js" or size] == []
        address = urlsplit(served.url).netloc
    page.reload()
    wait_for_answer(page)
    page.goto(f"{page.url.split('?')[0]}?id={exported.ids[6]}&metric=l1")  # not loaded before
    expect(page.locator(f"text={exported.ids[6]}").first).to_be_visible()
    assert hosts - {""} == {address}


def wait_for_answer(page: Page) -> None:
    """Wait for the neighbours of all classes and their tiles."""
    page.wait_for_function(
        """() => {
            const tiles = [...document.querySelectorAll(".neighbour img")];
            return tiles.length === 8 && tiles.every((tile) => tile.complete && tile.naturalWidth === 256);
        }""",
        timeout=20_000,
    )


def until(page: Page, condition: str, argument: Any = None) -> None:
    """Wait for a condition that may be a promise, which `wait_for_function` would take as true."""
    deadline = time.monotonic() + 20
    while not page.evaluate(condition, argument):
        assert time.monotonic() < deadline, condition
        time.sleep(0.1)


def test_plain_http_has_neither_cache_nor_service_worker(exported: Exported, browser: Browser) -> None:
    rules = "--host-resolver-rules=MAP lab.example 127.0.0.1"
    with (
        host(exported.folder, ranges=True) as served,
        browser.browser_type.launch(executable_path=CHROMIUM, args=[*QUIET, rules], chromium_sandbox=False) as other,
    ):
        page = other.new_page()
        page.goto(f"{served.url.replace('127.0.0.1', 'lab.example')}?id={exported.ids[5]}&per_class=2")
        wait_for_answer(page)
        assert page.evaluate("() => !isSecureContext && !('caches' in window)")


def test_a_new_export_replaces_the_old_one(exported: Exported, browser: Browser, tmp_path: Path) -> None:
    folder = tmp_path / "site"
    shutil.copytree(exported.folder, folder)
    packs = {file.name: file.stat().st_ino for file in folder.glob("data/tiles-*/*")}
    log: list[str] = []
    with host(folder, ranges=True) as served:
        page = browser.new_context().new_page()
        page.goto(f"{served.url}?id={exported.ids[5]}&per_class=2")
        wait_for_answer(page)
        page.wait_for_function("() => navigator.serviceWorker.controller !== null")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tile_packs, "PACK_BYTES", PACK_BYTES)
            export_site(exported.dataset, ["other"], folder, log.append)
        assert {file.name: file.stat().st_ino for file in folder.glob("data/tiles-*/*")} == packs  # reused
        assert any("tiles of the earlier site" in line for line in log)
        until(
            page,
            """async () => {
                await (await navigator.serviceWorker.getRegistration()).update();
                const site = await (await fetch("site.json")).json();
                return Object.keys(site.datasets[0].encoders)[0] === "other";
            }""",
        )
        page.reload()
        wait_for_answer(page)
        there = [f"/{file.relative_to(folder).as_posix()}" for file in folder.rglob("*") if file.is_file()]
        until(  # nothing of the earlier site is cached
            page,
            """async (there) => {
                const caches_ = await Promise.all((await caches.keys()).map((name) => caches.open(name)));
                const kept = (await Promise.all(caches_.map((cache) => cache.keys()))).flat();
                return kept.length > 20 && kept.every(({ url }) => there.includes(new URL(url).pathname));
            }""",
            ["/", *there],
        )
        page.context.close()


def test_the_same_export_has_the_same_files(exported: Exported, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tile_packs, "PACK_BYTES", PACK_BYTES)
        patch.setattr(column_files, "PIECE_BYTES", PIECE_BYTES)
        export_site(exported.dataset, list(DIMENSIONS), tmp_path / "again", lambda line: None)
    first, second = (
        {file.relative_to(folder): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
        for folder in (exported.folder, tmp_path / "again")
    )
    assert first == second


def test_other_files_are_not_overwritten(exported: Exported, tmp_path: Path) -> None:
    for name, content in (("letter.txt", "dear"), ("site.json", "[]"), ("site.json", '{"mine": 1}')):
        (tmp_path / name).write_text(content)
        with pytest.raises(SynpipeError, match=r"contains files that are not an earlier export\. Name another folder"):
            export_site(exported.dataset, ["tiny"], tmp_path, lambda line: None)
        assert (tmp_path / name).read_text() == content and len(list(tmp_path.iterdir())) == 1
        (tmp_path / name).unlink()
    with pytest.raises(SynpipeError, match="no index absent"):
        export_site(exported.dataset, ["absent"], tmp_path, lambda line: None)
    assert list(tmp_path.iterdir()) == []


def test_the_export_stops_if_tiles_or_synapses_have_changed(exported: Exported, tmp_path: Path) -> None:
    stale = Dataset("made_up", exported.dataset.spec, tmp_path / "store", tmp_path, {}, tmp_path)
    write_tiles(stale, exported.ids[::-1])
    publish(exported.dataset.base / "tiny.parquet", stale.lancedb_folder, "tiny", "a" * 32, lambda line: None)
    with pytest.raises(
        SynpipeError,
        match=r"have changed since its indexes were made\. Run `synpipe materialize --dataset made_up --stale`",
    ):
        export_site(stale, ["tiny"], tmp_path / "site", lambda line: None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tables.PROVENANCE, "dataset_version", "e" * 32)
        path = embedding_table(tmp_path / "other.parquet", exported.vectors["other"], synapse_id=exported.ids)
        publish(path, stale.lancedb_folder, "other", "a" * 32, lambda line: None)
    with pytest.raises(
        SynpipeError, match="tiny, other were made from different versions of the synapses and cannot share a site"
    ):
        export_site(stale, ["tiny", "other"], tmp_path / "site", lambda line: None)
    assert not (tmp_path / "site").exists()


def test_the_command(made: Dataset, tmp_path: Path, page: Page) -> None:
    """A data set from the pipeline, with a local volume and without a map."""
    run = run_synpipe(project_of(made), "export-site", str(tmp_path / "site"), "-e", "tiny", "-e", "other")
    assert run.returncode == 0, run.stderr
    assert "96 synapses in" in run.stdout and "MB before the first answer" in run.stdout
    assert "tiny: quantising 96 × " in run.stderr
    (entry,) = json.loads((tmp_path / "site" / "site.json").read_text())["datasets"]
    assert list(entry["encoders"]) == ["tiny", "other"] and entry["neuroglancer"] is None
    with host(tmp_path / "site", ranges=True) as served:
        page.goto(served.url)  # a random synapse
        page.locator(".neighbour button").first.click()
        expect(page.locator(".neighbour img").first).to_be_visible()
        expect(page.get_by_text("recall@4").first).to_be_visible()
        page.goto(f"{served.url}?page=map")
        expect(page.get_by_text("There is no map of tiny")).to_be_visible()
        page.goto(f"{served.url}?id=1")
        expect(page.get_by_text("Synapse 1 is not on this site: it is unknown or was rejected.")).to_be_visible()
    again = run_synpipe(project_of(made), "export-site", str(tmp_path), "-e", "tiny")
    assert again.returncode == 1 and "not an earlier export" in again.stderr
