"""Extraction: tiles equal those of naive cut-outs, each chunk is fetched once, and a fault affects only its shard."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import tensorstore as ts
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from synpipe.errors import SynpipeError
from synpipe.tiles import extraction
from synpipe.tiles import tile as tiles
from synpipe.tiles.tile import TileReader, TileSpec, shard_of
from synpipe.volumes.volume import Volume, VolumeSpec
from synpipe_tests.support.extraction import extract
from synpipe_tests.volumes.test_sources import Handler

SHAPE = (12, 400, 500)
SIZE_NM = (50.0, 4.0, 4.0)
CHUNKS = [(1, 400, 500), (5, 33, 97), (4, 64, 64)]
# The blocks are so small that a few windows fall into many shards.
SPEC = TileSpec(shards=7, block_voxels_zyx=(4, 64, 64))
VOXELS = np.random.default_rng(0).integers(1, 256, SHAPE, dtype=np.uint8)


def write_zarr(folder: Path, chunk: tuple[int, int, int]) -> str:
    spec = {
        "driver": "zarr3",
        "kvstore": {"driver": "file", "path": f"{folder}/"},
        "metadata": {
            "shape": SHAPE,
            "data_type": "uint8",
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunk}},
            "attributes": {"resolution": SIZE_NM, "units": ["nm"] * 3},
        },
    }
    ts.open(spec, create=True).result()[...].write(VOXELS).result()
    return f"zarr://{folder}"


def write_hdf5(path: Path, chunk: tuple[int, int, int] | None) -> str:
    with h5py.File(path, "w") as file:
        file.create_dataset("volumes/raw", data=VOXELS, chunks=chunk, compression=chunk and "gzip")
        file["volumes/raw"].attrs["resolution"] = SIZE_NM
    return str(path)


def opened(path: str) -> Volume:
    return Volume(VolumeSpec(path=path), Path("/nowhere"))


@pytest.fixture(scope="module")
def volumes(tmp_path_factory: pytest.TempPathFactory) -> list[Volume]:
    """The same voxels in chunks of several shapes."""
    folder = tmp_path_factory.mktemp("volumes")
    paths = [write_zarr(folder / str(number), chunk) for number, chunk in enumerate(CHUNKS)]
    paths += [write_hdf5(folder / "odd.h5", (5, 33, 97)), write_hdf5(folder / "contiguous.h5", None)]
    return [opened(path) for path in paths]


def naive(start: tuple[int, int, int], step: int) -> np.ndarray | None:
    """The tile of a window, cut out of the array directly."""
    z, y, x = start[0] + step, start[1], start[2]
    inside = VOXELS[:, max(0, y) : max(0, y + 256), max(0, x) : max(0, x + 256)]
    if not 0 <= z < SHAPE[0] or 0 in inside.shape:
        return None
    tile = np.empty((3, 256, 256), np.uint8)
    for channel, section in enumerate((z - step, z, z + step)):
        seen = inside[section if 0 <= section < SHAPE[0] else z]
        tile[channel] = round(float(seen.mean()))
        tile[channel, max(0, -y) :, max(0, -x) :][: seen.shape[0], : seen.shape[1]] = seen
    return tile


def tiles_in(found, folder: Path) -> list[np.ndarray | None]:
    index = found.append_column("file", found["part"]).append_column("synapse_id", found["row"])
    reader = TileReader(index, folder, "colour")
    reasons = found["reason"].to_pylist()
    return [None if reason else reader.read(np.array([place]))[0] for place, reason in enumerate(reasons)]


starts_lists = st.lists(
    st.tuples(st.integers(-4, 13), st.integers(-300, 450), st.integers(-300, 550)), min_size=1, max_size=12
)


@settings(
    deadline=None,
    derandomize=True,
    max_examples=40,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(starts_lists, st.integers(1, 3), st.integers(0, 4), st.integers(1, 5), st.integers(0, 3))
def test_tiles_are_those_of_naive_cut_outs(volumes, tmp_path_factory, starts, step, which, part, room):
    """Every window gets its own voxels once, for any chunks, step, border, size of a part and amount of memory."""
    folder = tmp_path_factory.mktemp("parts")
    spec = SPEC.model_copy(update={"section_step_nm": step * SIZE_NM[0], "blank_std": 0.0})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(extraction, "PART_TILES", part)
        patch.setattr(extraction, "READ_AHEAD_BYTES", room * 10**6)
        found, made = extract(volumes[which], spec, folder, np.array(starts))
    assert made == len(set(starts))
    assert [*zip(*(found[f"start_{axis}"].to_pylist() for axis in "zyx"), strict=True)] == starts
    for tile, start in zip(tiles_in(found, folder), starts, strict=True):
        expected = naive(start, step)
        assert (tile is None) == (expected is None), start
        if expected is not None:
            np.testing.assert_array_equal(tile, expected)
    cut = [row for row in found.to_pylist() if not row["reason"]]
    places = {(row["part"], row["row"]): (row["start_z"], row["start_y"], row["start_x"]) for row in cut}
    assert len(places) == len(set(places.values()))  # no two windows share a tile, and no tile is stored twice
    assert found["shard"].to_pylist() == shard_of(np.array(starts), spec).tolist()


def test_reads_ahead_only_as_far_as_the_memory_allows(volumes, tmp_path: Path, monkeypatch) -> None:
    begun, most = 0, 0
    start_cut_out = tiles.start_cut_out

    def counted(*arguments: Any) -> Callable[[], Any]:
        nonlocal begun, most
        begun += 1
        most = max(most, begun)
        finish = start_cut_out(*arguments)

        def finished() -> Any:
            nonlocal begun
            begun -= 1
            return finish()

        return finished

    monkeypatch.setattr(tiles, "start_cut_out", counted)
    starts = np.array([(z, 10, x) for z in range(9) for x in range(0, 200, 20)])
    window = 3 * 256 * 256
    for room, limit in ((0, 1), (5 * window, 4), (100 * 10**6, len(starts))):
        most = 0
        monkeypatch.setattr(extraction, "READ_AHEAD_BYTES", room)
        extract(volumes[2], SPEC, tmp_path / str(room), starts)
        assert begun == 0 and 1 <= most <= limit
    assert most > 40


# Over HTTP, with faults


class Server(ThreadingHTTPServer):
    """Serves a folder over HTTP. fault: for the path of a chunk, the status of the answer, or `stall`, or None for no fault.
    requests: the requested paths."""

    request_queue_size = 256
    daemon_threads = True
    status: int | None = None
    etag: str | None = None

    def __init__(self, folder: Path):
        super().__init__(("127.0.0.1", 0), partial(FaultyHandler, directory=str(folder)))
        self.requests: list[str] = []
        self.fault: Callable[[str], str | None] = lambda path: None
        self.over = threading.Event()
        self.url = f"zarr://http://127.0.0.1:{self.server_port}"

    @property
    def chunks(self) -> list[str]:
        return [path for path in self.requests if "/c/" in path]


class FaultyHandler(Handler):
    server: Server  # type: ignore[assignment]

    def do_GET(self) -> None:
        fault = self.server.fault(self.path) if "/c/" in self.path else None
        if fault == "stall":
            self.server.requests.append(self.path)
            self.server.over.wait(60)
        elif fault:
            self.server.requests.append(self.path)
            self.send_error(int(fault))
        else:
            super().do_GET()


@pytest.fixture
def server(tmp_path: Path, monkeypatch) -> Iterator[Server]:
    """A volume in chunks of 4×64×64. A failed read is repeated twice, without waiting."""
    from synpipe.volumes import chunked as volume_chunked

    retries = {"max_retries": 2, "initial_delay": "1ms", "max_delay": "2ms"}
    monkeypatch.setattr(volume_chunked, "RETRIES", retries)
    write_zarr(tmp_path / "served", (4, 64, 64))
    found = Server(tmp_path / "served")
    threading.Thread(target=found.serve_forever, daemon=True).start()
    yield found
    found.over.set()
    found.shutdown()
    found.server_close()


WINDOW = np.array([3, 256, 256])
STARTS = np.random.default_rng(3).integers((0, 0, 0), (10, 145, 245), (40, 3))


def test_every_chunk_is_fetched_once(server: Server, tmp_path: Path) -> None:
    with opened(server.url) as volume:
        found, _ = extract(volume, SPEC, tmp_path / "parts", STARTS)
        needed = {chunk for start in STARTS for chunk in volume.chunking.chunks(start, start + WINDOW)}
    assert len(server.chunks) == len(set(server.chunks)) == len(needed)
    for tile, start in zip(tiles_in(found, tmp_path / "parts"), STARTS.tolist(), strict=True):
        np.testing.assert_array_equal(tile, naive(tuple(start), 1))


def test_a_fault_affects_only_its_shard_and_a_second_run_makes_the_rest(server: Server, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    broken = "/c/2/0/0"  # sections 8 to 11 of the upper left corner
    with opened(server.url) as volume:
        expected, _ = extract(volume, SPEC, whole, STARTS)
    hit = (STARTS[:, 0] + 3 > 8) & (STARTS[:, 1:] < 64).all(axis=1)
    lost_shards = sorted(set(shard_of(STARTS[hit], SPEC).tolist()))
    assert 0 < len(lost_shards) < 7
    server.fault = lambda path: "500" if path.endswith(broken) else None
    with opened(server.url) as volume:
        with pytest.raises(SynpipeError) as caught:
            extract(volume, SPEC, parts, STARTS)
        message = str(caught.value)
        assert "\n" not in message and "500" in message and "run the same command again" in message
        assert f"{len(lost_shards)} of 7 shards failed ({', '.join(map(str, lost_shards))})" in message
        for shard in set(shard_of(STARTS, SPEC).tolist()) - set(lost_shards):
            _, made = extract(volume, SPEC, parts, STARTS[shard_of(STARTS, SPEC) == shard])
            assert made == 0
    before = {path: path.stat().st_mtime_ns for path in parts.iterdir()}
    server.fault = lambda path: None
    server.requests = []
    with opened(server.url) as volume:
        found, made = extract(volume, SPEC, parts, STARTS)
    assert f"{made:,} cut-outs were not made" in message and int(hit.sum()) <= made < len(STARTS)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert found.drop_columns(["part", "row"]).equals(expected.drop_columns(["part", "row"]))
    for tile, other in zip(tiles_in(found, parts), tiles_in(expected, whole), strict=True):
        np.testing.assert_array_equal(tile, other)


def test_extraction_stops_if_a_server_no_longer_answers(server: Server, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(extraction, "GIVE_UP_AFTER", 2)
    monkeypatch.setattr(extraction, "READ_AHEAD_BYTES", 0)
    server.fault = lambda path: "503"
    with opened(server.url) as volume, pytest.raises(SynpipeError) as caught:
        extract(volume, SPEC, tmp_path / "parts", STARTS)
    assert "40 cut-outs were not made: 2 of 7 shards failed" in str(caught.value)
    assert "the rest was not tried" in str(caught.value)
    assert len(set(server.chunks)) <= 2 * 2 * 6 * 6


def test_a_missing_chunk_leads_to_rejects_and_is_not_an_error(server: Server, tmp_path: Path) -> None:
    (tmp_path / "served" / "c" / "2" / "0" / "0").unlink()
    with opened(server.url) as volume:
        found, made = extract(volume, SPEC, tmp_path / "parts", STARTS)
    hit = (STARTS[:, 0] + 3 > 8) & (STARTS[:, 1:] < 64).all(axis=1)
    assert made == len(STARTS) and hit.any()
    assert found["reason"].to_pylist() == ["missing_chunk" if lost else None for lost in hit]


@pytest.mark.parametrize("over_http", [False, True])
def test_several_threads_read_the_same_volume(server: Server, tmp_path: Path, over_http: bool) -> None:
    wrong: list[Any] = []
    with opened(server.url if over_http else f"zarr://{tmp_path}/served") as volume:

        def read(seed: int) -> None:
            random = np.random.default_rng(seed)
            try:
                for _ in range(20):
                    low = random.integers(0, SHAPE)
                    high = random.integers(low, SHAPE) + 1
                    found = volume.read(low, high)
                    box = tuple(map(slice, low, high))
                    if found.dtype != np.uint8 or not np.array_equal(found, VOXELS[box]):
                        wrong.append(box)
            except Exception as error:
                wrong.append(error)

        threads = [threading.Thread(target=read, args=(seed,)) for seed in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert wrong == []


EXTRACTING = """
import sys
from pathlib import Path
import numpy as np
from synpipe.tiles.tile import TileSpec
from synpipe.volumes.volume import Volume, VolumeSpec
from synpipe_tests.support.extraction import extract
with Volume(VolumeSpec(path=sys.argv[1]), Path()) as volume:
    extract(volume, TileSpec(), Path(sys.argv[2]), np.array([[0, 0, 0], [1, 100, 200]]))
"""


def test_an_interrupt_stops_at_once_even_while_a_server_stalls(server: Server, tmp_path: Path) -> None:
    server.fault = lambda path: "stall"
    command = [sys.executable, "-c", EXTRACTING, server.url, str(tmp_path / "parts")]
    environment = {**os.environ, "PYTHONPATH": str(Path(tiles.__file__).parents[2])}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        deadline = time.monotonic() + 60
        while not server.chunks and time.monotonic() < deadline:
            time.sleep(0.05)
        assert server.chunks
        process.send_signal(signal.SIGINT)
        try:
            _, said = process.communicate(timeout=15)  # reads of a stalled server time out later than that
        finally:
            process.kill()
    assert "KeyboardInterrupt" in said and process.returncode != 0
    assert not list((tmp_path / "parts").glob("*.parquet"))
