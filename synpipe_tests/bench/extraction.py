"""Compare the cost of cut-outs by different methods in one run: `python -m synpipe_tests.bench.extraction`.

Every method runs in its own process. It reads from a server on this machine that adds 20 ms to every request, and from
a local HDF5 file in CREMI layout. Printed for each: requests, bytes and the minimum of bytes, tiles per second, CPU
time per tile and peak memory; then the bars, met or missed. The volumes are real EM, repeated, if `SYNPIPE_REAL_DATA`
names a folder that has some, else noise. Only this bench needs CloudVolume: `pip install cloud-volume`.

The figures of synpipe are of whole extractions, in which tiles are checked, hashed and written to disk. The other methods only read
the voxels.
"""

import asyncio
import contextlib
import json
import multiprocessing
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow as pa

from synpipe.tiles.tile import SECTIONS, TILE_PX, TileReader, TileSpec
from synpipe.volumes.chunk_plan import Chunking, spatial_order
from synpipe.volumes.volume import Volume, VolumeSpec
from synpipe_tests.bench.bars import row
from synpipe_tests.support.extraction import extract

DELAY_S = 0.02
CHUNK = 64
PERIOD = 1024  # voxels along y and x after which the texture repeats, which lets a server offer a volume of any size
JPEG_QUALITY = 75  # the default of neuroglancer and CloudVolume
VOXEL_NM_ZYX = (40.0, 4.0, 4.0)
WINDOW = np.array([SECTIONS, TILE_PX, TILE_PX])

DENSE_ZYX, DENSE_TILES = (64, 4096, 4096), 1000
WIDE_ZYX = (64, 8192, 8192)
FAFB_ZYX, SPARSE_TILES = (2048, 65_536, 65_536), 250
# Labelled synapses lie in clumps along their neurons. In FAFB, 48 % of the tiles overlap another one, and a chunk
# serves at most 1.9 tiles. Normally distributed clumps of six on average come close to that. The bench prints the
# values that they reach.
CLUMP_SYNAPSES, CLUMP_STD_ZYX = 6, (15, 150, 150)
# Read one by one, no tile profits from another, so the rate is measured on a part of the same tiles.
ONE_BY_ONE_TILES = 100
CREMI_ZYX = (125, 1250, 1250)
READ_AHEAD = 16
TURNS = 3  # odd: the median is one of them
COMPARED = 20  # tiles that must be equal for all methods

DENSE_BAR, SPARSE_BAR, HDF5_BAR, BYTES_BAR, MEMORY_BAR = 20, 5, 5, 1.1, 1.1


def main() -> None:
    if len(sys.argv) > 1:
        print(json.dumps(METHODS[sys.argv[1]](**json.load(sys.stdin))))
        return
    try:
        versions = {name: version(name) for name in ("cloud-volume", "tensorstore", "h5py", "numpy")}
    except PackageNotFoundError as error:
        sys.exit(f"This bench compares with {error.name}, which is not installed: pip install {error.name}.")
    print(f"{platform.platform()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    print(", ".join(f"{name} {number}" for name, number in {"Python": platform.python_version(), **versions}.items()))
    with tempfile.TemporaryDirectory(prefix="synpipe-bench-") as folder:
        texture, name = _texture()
        print(f"texture: {name}")
        with serving(_chunks(texture, Path(folder) / "written")) as server:
            bars = over_http(server)
        bars += of_hdf5(texture, Path(folder))
    print()
    for what, figure, bar, at_least in bars:
        row(f"cut-outs, {what}", figure, bar, at_most=not at_least)


Bar = tuple[str, float, float, bool]


def over_http(server: "Server") -> list[Bar]:
    """Compare CloudVolume and synpipe on dense, sparse and scattered tiles, and synpipe with four times as many synapses."""
    bars: list[Bar] = []
    clumped = _clumped(FAFB_ZYX, SPARSE_TILES)
    title(f"{DELAY_S * 1e3:.0f} ms per request, {CHUNK}³ JPEG; {_sharing(clumped)}")
    for name, shape, starts, bar in (
        ("dense", DENSE_ZYX, _starts(DENSE_ZYX, DENSE_TILES), DENSE_BAR),
        ("sparse", FAFB_ZYX, clumped, SPARSE_BAR),
        ("scattered", FAFB_ZYX, _starts(FAFB_ZYX, SPARSE_TILES), None),  # hardly any two share a chunk
    ):
        url, count = f"{server.url}/{'x'.join(map(str, shape))}", len(starts)
        slow, fast = by_turns(
            partial(server.measure, "cloudvolume", url=url, starts=starts[:ONE_BY_ONE_TILES]),
            partial(server.measure, "synpipe", path=f"precomputed://{url}", starts=starts),
        )
        where = f"{name}, {count:,} synapses in {'×'.join(map(str, shape[::-1]))}"
        show(f"{where}: CloudVolume, one by one", slow, slow)
        show(f"{where}: synpipe", fast, slow)
        if bar is not None:
            bars.append((f"{name}: × CloudVolume one by one", fast["rate"] / slow["rate"], bar, True))
        bars.append((f"{name}: bytes ÷ minimum", fast["bytes"] / fast["minimum"], BYTES_BAR, False))
        if slow["checksum"] != fast["checksum"]:
            bars.append((f"{name}: the same voxels", 0, 1, True))
        if name == "dense":
            # Once as dense in a volume four times as large, and once four times as dense, so that more tiles per chunk
            # are in flight.
            for wide, what in ((WIDE_ZYX, "as dense"), (shape, "4× as dense")):
                url = f"{server.url}/{'x'.join(map(str, wide))}"
                more = server.measure("synpipe", path=f"precomputed://{url}", starts=_starts(wide, 4 * count))
                show(f"4× the synapses, {what}: synpipe", more, slow)
                peaks = more["peak_mb"] / fast["peak_mb"]
                bars.append((f"peak memory, {4 * count:,} ÷ {count:,} synapses, {what}", peaks, MEMORY_BAR, False))
    return bars


def of_hdf5(texture: np.ndarray, folder: Path) -> list[Bar]:
    """Read a file like those of CREMI, with gzip and the chunks that h5py chooses for the shape."""
    repeats = [-(-size // have) for size, have in zip(CREMI_ZYX, texture.shape, strict=True)]
    data = np.tile(texture, repeats)[tuple(map(slice, CREMI_ZYX))]
    path = folder / "cremi.h5"
    with h5py.File(path, "w") as file:
        written = file.create_dataset("volumes/raw", data=data, compression="gzip")
        written.attrs["resolution"] = VOXEL_NM_ZYX
        chunks = written.chunks
    starts = _starts(CREMI_ZYX, DENSE_TILES)
    title(f"Local HDF5, {DENSE_TILES:,} synapses in {CREMI_ZYX}, gzip, chunks {chunks}")
    slow, fast, whole = by_turns(
        *(partial(child, method, path=str(path), starts=starts) for method in ("h5py", "plan", "synpipe"))
    )
    show("one slice per synapse, default cache", slow, slow)
    show("synpipe's plan, the voxels alone", fast, slow)
    show("synpipe", whole, slow)
    bars: list[Bar] = [("HDF5: × one slice per synapse, the voxels alone", fast["rate"] / slow["rate"], HDF5_BAR, True)]
    if not slow["checksum"] == fast["checksum"] == whole["checksum"]:
        bars.append(("HDF5: the same voxels", 0, 1, True))
    return bars


def _starts(shape: tuple[int, ...], count: int) -> list[list[int]]:
    """Return the first voxels of windows anywhere in the volume."""
    return np.random.default_rng(1).integers(0, np.array(shape) - WINDOW + 1, (count, 3)).tolist()


def _clumped(shape: tuple[int, ...], count: int) -> list[list[int]]:
    """Return the first voxels of windows in clumps. The size of a clump is geometric; its positions are normal."""
    random = np.random.default_rng(1)
    places = np.empty((0, 3))
    while len(places) < count:
        size = random.geometric(1 / CLUMP_SYNAPSES)
        clump = random.uniform(0, shape) + random.normal(size=(size, 3)) * CLUMP_STD_ZYX
        places = np.concatenate([places, clump])
    return np.clip(np.rint(places[:count]), 0, np.array(shape) - WINDOW).astype(int).tolist()


def _sharing(starts: list[list[int]]) -> str:
    low = np.array(starts)
    apart = np.abs(low[:, None] - low[None])
    overlapping = ((apart < WINDOW).all(axis=2).sum(axis=1) > 1).mean()
    needed = [set(Chunking((CHUNK,) * 3, 0).chunks(box, box + WINDOW)) for box in low]
    sharing = sum(map(len, needed)) / len(set.union(*needed))
    return f"sparse: {overlapping:.0%} of the tiles overlap another, a chunk serves {sharing:.1f} of them"


def title(text: str) -> None:
    print(
        f"\n{text}\n  {'':<72} {'requests':>8} {'MB':>7} {'least':>7} {'tiles/s':>8} {'CPU ms':>7} {'peak MB':>8} {'ratio':>6}"
    )


def show(name: str, found: dict[str, Any], slow: dict[str, Any]) -> None:
    traffic = "".join(f" {found[key] / 1e6:7.1f}" if key in found else f" {'–':>7}" for key in ("bytes", "minimum"))
    figures = (
        f"{found.get('requests', '–'):>8}{traffic} {found['rate']:8.1f} {found['cpu_ms']:7.1f} {found['peak_mb']:8.0f}"
    )
    print(f"  {name:<72} {figures} {found['rate'] / slow['rate']:6.1f}", flush=True)


# The methods, each in its own process


def by_turns(*methods: Callable[[], dict[str, Any]]) -> list[dict[str, Any]]:
    """Run the methods in turns, several times each, and return for each the run with the median rate."""
    turns = [[method() for method in methods] for _ in range(TURNS)]
    return [sorted(runs, key=lambda run: run["rate"])[TURNS // 2] for runs in zip(*turns, strict=True)]


def child(method: str, **arguments: Any) -> dict[str, Any]:
    command = [sys.executable, "-m", "synpipe_tests.bench.extraction", method]
    found = subprocess.run(command, input=json.dumps(arguments), stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(found.stdout.splitlines()[-1])


def by_cloudvolume(url: str, starts: list[list[int]]) -> dict[str, Any]:
    from cloudvolume import CloudVolume

    volume = CloudVolume(f"precomputed://{url}", progress=False)

    def cut(z: int, y: int, x: int) -> np.ndarray:
        return np.asarray(volume[x : x + TILE_PX, y : y + TILE_PX, z : z + SECTIONS])[..., 0].T

    return _one_by_one(cut, starts)


def by_h5py(path: str, starts: list[list[int]]) -> dict[str, Any]:
    with h5py.File(path) as file:
        data = file["volumes/raw"]
        return _one_by_one(lambda z, y, x: data[z : z + SECTIONS, y : y + TILE_PX, x : x + TILE_PX], starts)


def _one_by_one(cut: Callable[[int, int, int], np.ndarray], starts: list[list[int]]) -> dict[str, Any]:
    began, checksums = _now(), []
    for place, start in enumerate(starts):
        tile = cut(*start)
        if place < COMPARED:
            checksums.append(zlib.crc32(tile.tobytes()))
    return _measured(len(starts), began) | {"checksum": checksums}


def by_synpipe(path: str, starts: list[list[int]]) -> dict[str, Any]:
    pa.Table.from_pylist([{"warm": "up"}])  # for its first table, pyarrow imports pandas if it is installed
    folder = Path(tempfile.mkdtemp(prefix="synpipe-bench-"))
    try:
        with Volume(VolumeSpec(path=path), folder) as volume:
            began = _now()
            found, made = extract(volume, TileSpec(), folder, np.array(starts))
            measured = _measured(made, began)
        assert made == len(starts) and found["reason"].null_count == made
        index = found.append_column("file", found["part"]).append_column("synapse_id", found["row"])
        # synpipe replaces a missing neighbouring section, so such a tile no longer equals the voxels.
        assert not any(found["missing_sections"].to_pylist()[:COMPARED])
        tiles = TileReader(index, folder, "colour").read(np.arange(COMPARED))
        return measured | {"checksum": [zlib.crc32(tile.tobytes()) for tile in tiles]}
    finally:
        shutil.rmtree(folder)


def by_plan(path: str, starts: list[list[int]]) -> dict[str, Any]:
    """Read only the voxels, in the order and as far ahead as `extract` reads them."""
    low, checksums = np.array(starts), [0] * COMPARED
    ahead: deque[tuple[int, Callable[[], np.ndarray]]] = deque()

    def finish() -> None:
        place, read = ahead.popleft()
        tile = read()
        if place < COMPARED:
            checksums[place] = zlib.crc32(tile.tobytes())

    with Volume(VolumeSpec(path=path), Path()) as volume:
        began = _now()
        for place in spatial_order(low, low + WINDOW, volume.chunking).tolist():
            ahead.append((place, volume.start_read(low[place], low[place] + WINDOW)))
            if len(ahead) > READ_AHEAD:
                finish()
        while ahead:
            finish()
        return _measured(len(starts), began) | {"checksum": checksums}


def _now() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def _measured(tiles: int, began: tuple[float, float]) -> dict[str, Any]:
    elapsed_s, cpu_s = (now - then for now, then in zip(_now(), began, strict=True))
    # Only of this program: `getrusage` would include the memory of its parent.
    (peak_kb,) = re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return {"rate": tiles / elapsed_s, "cpu_ms": 1e3 * cpu_s / tiles, "peak_mb": int(peak_kb) / 1e3}


METHODS = {"cloudvolume": by_cloudvolume, "synpipe": by_synpipe, "h5py": by_h5py, "plan": by_plan}


# The server


class Server:
    """Serve volumes whose chunks repeat. Any shape is available, at /<depth>x<height>x<width>."""

    def __init__(self, url: str, sizes: dict[tuple[int, int], int]):
        self.url, self._sizes = url, sizes

    def measure(self, method: str, **arguments: Any) -> dict[str, Any]:
        """Run a method in its own process. Returns its figures with the requests for chunks, the bytes and the minimum of bytes."""
        self._counts()
        found = child(method, **arguments)
        low = np.array(arguments["starts"])
        chunking = Chunking((CHUNK, CHUNK, CHUNK), 0)
        needed = {chunk for box in low for chunk in chunking.chunks(box, box + WINDOW)}
        period = PERIOD // CHUNK
        minimum = sum(self._sizes[y % period, x % period] for _, y, x in needed)
        return {**found, **self._counts(), "minimum": minimum}

    def _counts(self) -> dict[str, int]:
        """Return the counts since the last call."""
        with urllib.request.urlopen(f"{self.url}/counts") as answer:
            return json.load(answer)


@contextlib.contextmanager
def serving(chunks: dict[tuple[int, int], bytes]) -> Iterator[Server]:
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=_serve, args=(chunks, theirs), daemon=True)
    process.start()
    try:
        yield Server(f"http://127.0.0.1:{ours.recv()}", {place: len(body) for place, body in chunks.items()})
    finally:
        process.terminate()
        process.join()


def _serve(chunks: dict[tuple[int, int], bytes], pipe: Any) -> None:
    async def run() -> None:
        answers = Answers(chunks)
        server = await asyncio.start_server(answers, "127.0.0.1", 0, backlog=512)
        pipe.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(run())


class Answers:
    """A minimal HTTP/1.1 server with keep-alive, which leaves the CPU to the clients."""

    CHUNK_PATH = re.compile(r"/\w+/em/(\d+)-\d+_(\d+)-\d+_\d+-\d+$")
    INFO_PATH = re.compile(r"/(\d+)x(\d+)x(\d+)/info$")

    def __init__(self, chunks: dict[tuple[int, int], bytes]):
        self._chunks = chunks
        self._requests = self._bytes = 0

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            while True:
                method, path, _ = (await reader.readuntil(b"\r\n\r\n")).split(b" ", 2)
                status, body = await self._answer(path.decode())
                head = f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\nContent-Type: application/octet-stream\r\n\r\n"
                writer.write(head.encode() + (b"" if method == b"HEAD" else body))
                await writer.drain()
        writer.close()

    async def _answer(self, path: str) -> tuple[str, bytes]:
        if path == "/counts":
            counts = {"requests": self._requests, "bytes": self._bytes}
            self._requests = self._bytes = 0
            return "200 OK", json.dumps(counts).encode()
        await asyncio.sleep(DELAY_S)
        chunk = self.CHUNK_PATH.match(path)
        if chunk:
            x, y = (int(place) % PERIOD // CHUNK for place in chunk.groups())
            body = self._chunks[y, x]
            self._requests += 1
            self._bytes += len(body)
            return "200 OK", body
        info = self.INFO_PATH.match(path)
        return ("200 OK", _info(*map(int, info.groups()))) if info else ("404 Not Found", b"")


def _info(depth: int, height: int, width: int) -> bytes:
    scale = {
        "key": "em",
        "size": [width, height, depth],
        "resolution": VOXEL_NM_ZYX[::-1],
        "voxel_offset": [0, 0, 0],
        "chunk_sizes": [[CHUNK] * 3],
        "encoding": "jpeg",
    }
    kind = {"@type": "neuroglancer_multiscale_volume", "type": "image", "data_type": "uint8", "num_channels": 1}
    return json.dumps({**kind, "scales": [scale]}).encode()


# The voxels


def _texture() -> tuple[np.ndarray, str]:
    """Return the texture, uint8 (64, 1024, 1024), and its description."""
    real = Path(os.environ.get("SYNPIPE_REAL_DATA", "")) / "vnc_stack1.h5"
    if not real.is_file():
        return np.random.default_rng(0).normal(128, 40, (CHUNK, PERIOD, PERIOD)).clip(1, 255).astype(np.uint8), "noise"
    with h5py.File(real) as file:
        data = file["volumes/raw"][:]
    # Forwards and backwards, so that no section follows itself.
    there_and_back = np.concatenate([data, data[-2:0:-1]])
    repeated = np.tile(there_and_back, (-(-CHUNK // len(there_and_back)), 1, 1))[:CHUNK]
    return np.ascontiguousarray(repeated), f"{real.name}, {len(data)} sections, repeated"


def _chunks(texture: np.ndarray, folder: Path) -> dict[tuple[int, int], bytes]:
    """Return the JPEG of each 64³ chunk of the texture, by its number (y, x), written by tensorstore."""
    import tensorstore as ts

    spec = {
        "driver": "neuroglancer_precomputed",
        "kvstore": {"driver": "file", "path": f"{folder}/"},
        "multiscale_metadata": {"type": "image", "data_type": "uint8", "num_channels": 1},
        "scale_metadata": {
            "key": "em",
            "size": texture.shape[::-1],
            "resolution": VOXEL_NM_ZYX[::-1],
            "chunk_size": [CHUNK] * 3,
            "encoding": "jpeg",
            "jpeg_quality": JPEG_QUALITY,
        },
    }
    ts.open(spec, create=True, open=True).result()[...].write(texture.T[..., None]).result()
    places = range(0, PERIOD, CHUNK)
    return {
        (y // CHUNK, x // CHUNK): (folder / f"em/{x}-{x + CHUNK}_{y}-{y + CHUNK}_0-{CHUNK}").read_bytes()
        for y in places
        for x in places
    }


if __name__ == "__main__":
    main()
