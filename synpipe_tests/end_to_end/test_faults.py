"""Servers that fail, stall and truncate: no tile is lost or invented, and cut-outs made before a failure are kept."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from synpipe.assets.graph import nodes
from synpipe.assets.manifest import read_manifest
from synpipe.datasets import Dataset, Project
from synpipe.store.files import read_table
from synpipe.volumes import chunked as volume_chunked
from synpipe.volumes import server_limits
from synpipe.volumes.volume import AccessDenied
from synpipe_tests.conftest import SMALL_DEMO, environment, write_project
from synpipe_tests.support import command
from synpipe_tests.support.fault_server import (
    ENDLESS,
    HALVED,
    PAGE,
    RESET,
    SHORT,
    STALL,
    TRICKLE,
    FaultServer,
    always,
    at_first,
    never,
    serving,
)
from synpipe_tests.volumes.test_sources import (
    CHUNK,
    OFFSET_NM,
    SIZE_NM,
    everything,
    first_chunk,
    opened,
    refusal,
    write_n5,
    write_precomputed,
    write_zarr3,
)

SHAPE = (10, 640, 640)
BLACK, COPY = 5, 8  # a lost section that is black, and one that was replaced by a copy of its neighbour
ATTEMPTS = 4
KINDS: dict[str, Callable[[Path, np.ndarray], None]] = {
    "raw": write_precomputed,
    "jpeg": partial(write_precomputed, encoding="jpeg"),
    "n5": write_n5,
}
SCHEMES = {"raw": "precomputed", "jpeg": "precomputed", "n5": "n5"}
TRUNK = ("volume", "annotations", "synapses", "synapse_stacks", "rgb_tiles", "rejects")

Tiles = dict[int, dict[str, Any]]
Rejects = dict[int, tuple[str, str]]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One volume of each kind, and 60 synapses, some of them at the border."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(1, 256, (SHAPE[0], SHAPE[1] // 4, SHAPE[2] // 4), dtype=np.uint8)
    grey = coarse.repeat(4, axis=1).repeat(4, axis=2)
    grey[BLACK] = 0
    grey[COPY] = grey[COPY - 1]
    folder = tmp_path_factory.mktemp("source")
    for kind, write in KINDS.items():
        write(folder / kind, grey)
    positions = OFFSET_NM + rng.uniform((0, 0, 0), SHAPE, (60, 3)) * SIZE_NM
    lines = [f"{number},{x},{y},{z},gaba" for number, (z, y, x) in enumerate(positions.tolist(), start=1)]
    (folder / "synapses.csv").write_text("\n".join(["synapse_id,x,y,z,neurotransmitter", *lines]))
    return folder


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        volume_chunked, "RETRIES", {"max_retries": ATTEMPTS, "initial_delay": "5ms", "max_delay": "20ms"}
    )


@pytest.fixture(scope="module")
def clean(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Dataset]:
    """A function that makes the data set from the local files of a kind, once per kind."""
    found: dict[str, Dataset] = {}

    def clean_run(kind: str) -> Dataset:
        if kind not in found:
            found[kind] = project(tmp_path_factory.mktemp("clean"), source, kind, str(source / kind)).dataset("demo")
            make(found[kind])
        return found[kind]

    return clean_run


def project(folder: Path, source: Path, kind: str, place: str) -> Project:
    annotations = [{"format": "table", "path": f"{source}/synapses.csv"}]
    return write_project(
        folder,
        synthetic=None,
        volume={"path": f"{SCHEMES[kind]}://{place}"},
        annotations=annotations,
        tiles={**SMALL_DEMO["tiles"], "shards": 8, "block_voxels_zyx": [32, 160, 160]},
        max_reject_share=1,
    )


def make(dataset: Dataset) -> None:
    for node in nodes(dataset)[: len(TRUNK)]:
        node.run(lambda message: None)


def result(dataset: Dataset) -> tuple[Tiles, Rejects]:
    columns = ["synapse_id", "start_z", "start_y", "start_x", "content_hash", "missing_sections", "pad_fraction"]
    tiles = {row["synapse_id"]: row for row in read_table(dataset.tiles_path, columns).to_pylist()}
    rejects = read_table(dataset.rejects_path).to_pylist()
    return tiles, {row["synapse_id"]: (row["reason"], row["detail"]) for row in rejects}


def shards_on(dataset: Dataset, chunk_yx: tuple[int, int]) -> tuple[set[int], set[int]]:
    """Shards and synapses whose cut-outs need chunks in this row and column."""
    columns = ["synapse_id", "shard", "start_y", "start_x"]
    rows = [
        row
        for row in read_table(dataset.stacks_path, columns).to_pylist()
        if all(
            row[f"start_{axis}"] < (number + 1) * size and row[f"start_{axis}"] + 256 > number * size
            for axis, number, size in zip("yx", chunk_yx, CHUNK[1:], strict=True)
        )
    ]
    return {row["shard"] for row in rows}, {row["synapse_id"] for row in rows}


def in_column(chunk_yx: tuple[int, int]) -> Callable[[str], bool]:
    """Recognises paths of precomputed chunks in this row and column. `write_precomputed` shifts the volume by whole voxels."""
    y, x = (number * size + shift for number, size, shift in zip(chunk_yx, CHUNK[1:], (-10, 2), strict=True))
    return lambda path: re.search(rf"/{x}-{x + CHUNK[2]}_{y}-{y + CHUNK[1]}_", path) is not None


def chunks_asked_for(server: FaultServer) -> dict[str, int]:
    documents = ("info", "attributes.json", "zarr.json")
    return {path: count for path, count in server.requests.items() if not path.endswith(documents)}


# Faults that pass


@pytest.mark.parametrize("kind", KINDS)
def test_a_passing_fault_has_no_effect(source: Path, clean: Callable, tmp_path: Path, kind: str) -> None:
    """Every path fails twice and then works, so each chunk is transferred once. Sections that are black or copies are recognised
    as in local files."""
    with serving(source, at_first(2, 500, 502, 503, 429, RESET, SHORT)) as server:
        dataset = project(tmp_path, source, kind, f"{server.url}/{kind}").dataset("demo")
        make(dataset)
    tiles, rejects = result(dataset)
    assert (tiles, rejects) == result(clean(kind))
    assert set(chunks_asked_for(server).values()) == {3}
    sections = {key: OFFSET_NM[0] + SIZE_NM[0] * key for key in (BLACK, COPY)}
    middle = {number: row["start_z"] + 1 for number, row in tiles.items()}
    assert {reason for reason, _ in rejects.values()} == {"blank_section"} and len(rejects) > 3, sections
    for number, row in tiles.items():
        z, missing = middle[number], row["missing_sections"]
        assert bool(missing & 1) == (z in (0, BLACK + 1, COPY)), (z, missing)
        assert bool(missing & 4) == (z in (SHAPE[0] - 1, BLACK - 1, COPY - 1)), (z, missing)
    assert {BLACK - 1, BLACK + 1, COPY - 1, COPY} <= set(middle.values())


# Faults that stay


@pytest.mark.parametrize(
    ("kind", "fault"), [("raw", 503), ("raw", RESET), ("raw", SHORT), ("raw", HALVED), ("jpeg", HALVED)]
)
def test_a_lasting_fault_affects_only_its_shards(
    source: Path, clean: Callable, tmp_path: Path, kind: str, fault: int | str
) -> None:
    """The message says where the fault is and what to do. Once the server works again, only the missing tiles are fetched."""
    column = (0, 0)
    failing, _ = shards_on(clean(kind), column)
    stacks = read_table(clean(kind).stacks_path).to_pylist()
    shards = {row["shard"] for row in stacks}
    assert failing and failing < shards

    with serving(source, always(fault, in_column(column))) as server:
        dataset = project(tmp_path, source, kind, f"{server.url}/{kind}").dataset("demo")
        message = refusal(partial(make, dataset), server.url, "shards failed", "again")
        assert "html" not in message and len(message) < 1500
        assert not dataset.stacks_path.exists()
        kept = cut_outs_kept(dataset)
        assert kept >= {place(row) for row in stacks if row["shard"] not in failing}

        server.rule, server.requests = never, type(server.requests)()
        make(dataset)
    assert result(dataset) == result(clean(kind))
    missing = [row for row in stacks if place(row) not in kept]
    assert read_manifest(dataset, "synapse_stacks").figures["cut_outs_made"] == len(missing) > 0
    needed = {(row["shard"], chunk) for row in missing for chunk in chunks_of(row)}
    assert 0 < sum(chunks_asked_for(server).values()) <= len(needed)


def cut_outs_kept(dataset: Dataset) -> set[tuple[int, int, int]]:
    paths = dataset.cut_outs_folder.rglob("*.parquet")
    return {place(row) for path in paths for row in read_table(path).to_pylist()}


def place(row: dict[str, Any]) -> tuple[int, int, int]:
    """First voxel of a window."""
    return row["start_z"], row["start_y"], row["start_x"]


def chunks_of(row: dict[str, Any]) -> set[tuple[int, int, int]]:
    """The chunks that a window needs."""
    ranges = []
    for axis, window, size, extent in zip("zyx", (3, 256, 256), CHUNK, SHAPE, strict=True):
        low, high = max(row[f"start_{axis}"], 0), min(row[f"start_{axis}"] + window, extent)
        ranges.append(range(low // size, (high - 1) // size + 1))
    return {(z, y, x) for z in ranges[0] for y in ranges[1] for x in ranges[2]}


def test_a_stalled_read_times_out(source: Path, clean: Callable, tmp_path: Path) -> None:
    """After a single stall, another attempt succeeds. A server that always stalls fails the shard. The test needs a process of
    its own, because curl reads its time-out when tensorstore is imported."""
    failing, _ = shards_on(clean("raw"), (0, 0))
    ever, once, program = always(STALL, in_column((0, 0))), at_first(1, STALL), [sys.executable, "-c", STALLED_PROGRAM]
    concerned = in_column((9, 9))
    with serving(
        source, lambda path, number: ever(path, number) or (once(path, number) if concerned(path) else None)
    ) as server:
        made = project(tmp_path, source, "raw", f"{server.url}/raw")
        quickly = environment(made) | {"TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS": "2"}
        ended = subprocess.run(program, env=quickly, capture_output=True, text=True, timeout=300, check=False)
        message = ended.stderr.splitlines()[-1]
        assert "SynpipeError" in message and "Timeout" in message and server.url in message, ended.stderr
        dataset = made.dataset("demo")
        stacks = read_table(clean("raw").stacks_path).to_pylist()
        assert cut_outs_kept(dataset) >= {place(row) for row in stacks if row["shard"] not in failing}
        assert min(count for path, count in server.requests.items() if concerned(path)) >= 2
        server.rule = never
        make(dataset)
    assert result(dataset) == result(clean("raw"))


STALLED_PROGRAM = """
from synpipe.volumes import chunked as volume_chunked
from synpipe.volumes import server_limits
from synpipe.datasets import Project
from synpipe_tests.end_to_end.test_faults import make

volume_chunked.RETRIES |= {"max_retries": 3, "initial_delay": "5ms"}
make(Project.locate().dataset("demo"))
"""


def read_in_new_process(url: str, **environment_changes: str) -> list[str]:
    """Read a volume in a process with its own time-outs and its own memory. Returns the lines that it prints."""
    program = [sys.executable, "-c", READING_PROGRAM, url]
    ended = subprocess.run(
        program, env=os.environ | environment_changes, capture_output=True, text=True, timeout=120, check=False
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout.splitlines()


# Prints the error; whether reading anything else is pointless; and by how many MB the memory grew before and after the error.
READING_PROGRAM = """
import resource, sys, time
from synpipe.errors import SynpipeError
from synpipe.volumes import chunked, server_limits
from synpipe.volumes.volume import VolumeUnusable
from synpipe_tests.volumes.test_sources import everything, opened

chunked.RETRIES |= {"max_retries": 2, "initial_delay": "5ms"}
server_limits.MAX_ANSWERS_BYTES = 100 * 2**20
with opened("precomputed", sys.argv[1]) as volume:
    memory = [resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024]
    try:
        everything(volume)
    except SynpipeError as error:
        print(error)
        print(isinstance(error, VolumeUnusable))
    for seconds in (1, 3):
        time.sleep(seconds)
        memory.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
    print(memory[1] - memory[0])
    print(memory[2] - memory[1])
"""


def test_a_server_that_sends_a_byte_per_second_is_given_up(source: Path) -> None:
    with serving(source, always(TRICKLE, in_column((0, 0)))) as server:
        message, *_ = read_in_new_process(f"{server.url}/raw", TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS="2")
    assert "cannot be read" in message and "Timeout" in message and server.url in message


def test_a_slow_answer_is_given_up_although_it_is_fast_enough_to_go_on(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_limits, "MAX_WAIT_S", 2)
    with (
        serving(source, always(TRICKLE, in_column((0, 0)))) as server,
        opened("precomputed", f"{server.url}/raw") as volume,
    ):
        refusal(partial(everything, volume), "did not finish", "2 s", server.url)


def test_a_chunk_without_end_does_not_fill_the_memory(source: Path) -> None:
    """The connection is closed too, so the memory does not grow while other assets are made."""
    with serving(source, always(ENDLESS, in_column((0, 0)))) as server:
        message, is_volume_unusable, grown_before_mb, grown_after_mb = read_in_new_process(f"{server.url}/raw")
    assert "did not end" in message and server.url in message
    assert is_volume_unusable == "True"
    assert int(grown_before_mb) < 2500
    assert int(grown_after_mb) < 50


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_a_web_page_of_the_right_length_is_not_taken_for_voxels(
    tmp_path: Path, textured: np.ndarray, dtype: type
) -> None:
    write_precomputed(tmp_path / "v", textured.astype(dtype))
    spec = {} if dtype == np.uint8 else {"intensity_window": (0, 255)}
    with serving(tmp_path, always(PAGE, in_column((0, 0)))) as server:
        with opened("precomputed", f"{server.url}/v", **spec) as volume:
            refusal(partial(everything, volume), "web page instead of a chunk", server.url)
        server.rule = never
        with opened("precomputed", f"{server.url}/v", **spec) as volume:
            np.testing.assert_array_equal(everything(volume), textured)


@pytest.mark.parametrize("kind", ["raw", "jpeg"])
def test_a_chunk_that_is_missing_and_one_that_is_black(
    source: Path, clean: Callable, tmp_path: Path, kind: str
) -> None:
    """Only the synapses that need the missing chunk are rejected as `missing_chunk`. Those on black chunks are rejected as
    `blank_section`."""
    column = (4, 4)
    _, concerned = shards_on(clean(kind), column)
    tiles, rejects = result(clean(kind))
    with serving(source, always(404, in_column(column))) as server:
        dataset = project(tmp_path, source, kind, f"{server.url}/{kind}").dataset("demo")
        make(dataset)
    found_tiles, found_rejects = result(dataset)
    assert found_tiles == {number: tile for number, tile in tiles.items() if number not in concerned}
    assert {number: reason for number, (reason, _) in found_rejects.items()} == {
        number: "missing_chunk" if number in concerned else "blank_section" for number in concerned | set(rejects)
    }
    assert all(server.url in detail for number, (_, detail) in found_rejects.items() if number in concerned)
    assert concerned and set(rejects) - concerned


@pytest.mark.parametrize("status", [401, 403])
def test_permission_denied_stops_the_asset(source: Path, tmp_path: Path, status: int) -> None:
    """It does not count as a missing chunk, which would only reject synapses, and it is not worth another attempt."""
    with serving(source, always(status, in_column((0, 0)))) as server:
        dataset = project(tmp_path, source, "raw", f"{server.url}/raw").dataset("demo")
        with pytest.raises(AccessDenied) as caught:
            make(dataset)
    message = str(caught.value)
    assert "permission denied" in message and server.url in message and "again" not in message
    assert max(count for path, count in server.requests.items() if in_column((0, 0))(path)) == 1
    assert not dataset.stacks_path.exists()


def test_the_command_says_what_failed(source: Path, tmp_path: Path) -> None:
    """This also holds if the failing chunk is in the picture of the volume."""
    with serving(source, always(503, in_column((4, 4)))) as server:
        made = project(tmp_path, source, "raw", f"{server.url}/raw")
        message = command.refusal(command.invoke(made, "materialize", "-s", "+rgb_tiles"))
    assert message.startswith("Error: demo/synapse_stacks:") and server.url in message and "503" in message
    assert {asset for asset, state in command.assets(made).items() if state["state"] == "fresh"} == set(TRUNK[:3])


def test_a_volume_that_cannot_be_opened_says_why(source: Path, tmp_path: Path) -> None:
    for rule, words in ((always(503, bool), "503"), (always(RESET, bool), "curl"), (always(403, bool), "permission")):
        with serving(source, rule) as server:
            message = refusal(
                partial(opened, "precomputed", f"{server.url}/raw"), "cannot be opened", words, server.url
            )
        assert "html" not in message


# Damage that only the content reveals


@pytest.fixture(scope="module")
def textured() -> np.ndarray:
    return np.random.default_rng(1).integers(1, 256, (4, 64, 64), dtype=np.uint8)


@pytest.mark.parametrize(
    ("kind", "damage"),
    [
        ("jpeg", "halved"),
        ("jpeg", "noise"),
        ("jpeg", "white"),
        ("raw", "halved"),
        ("n5", "halved"),
        ("n5", "noise"),
        ("n5", "one bit"),
        ("zarr3", "one bit"),
    ],
)
def test_damage_that_the_content_reveals(tmp_path: Path, textured: np.ndarray, kind: str, damage: str) -> None:
    """Checksums (N5's gzip, Zarr's crc32c) reveal every flipped bit. JPEG and raw chunks have none; see `volumes.chunked`."""
    {**KINDS, "zarr3": write_zarr3}[kind](tmp_path / "v", textured)
    chunk = first_chunk(tmp_path / "v")
    content = bytearray(chunk.read_bytes())
    half = len(content) // 2
    if damage == "halved":
        content = content[:half]
    elif damage == "one bit":
        content[half] ^= 1
    else:
        fill = np.full(half, 255) if damage == "white" else np.random.default_rng(2).integers(0, 256, half)
        content[-half:] = fill.astype(np.uint8).tobytes()
    chunk.write_bytes(content)
    with opened({**SCHEMES, "zarr3": "zarr3"}[kind], tmp_path / "v") as volume:
        refusal(partial(everything, volume), "cannot be read")
