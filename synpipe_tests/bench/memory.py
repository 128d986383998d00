"""Measure peak memory and time of every asset with 10,000 and with 100,000 tiles: `python -m synpipe_tests.bench.memory`.

Each asset is materialised in its own process, with its checks and with what Dagster's page shows of it. The volume is a
texture whose tiles overlap, and the annotations are synthetic. Shards hold 2,048 tiles at both sizes. The encoder is a
descriptor, so that 100,000 tiles take minutes. They take 20 GB of disk, which are freed at the end.

Memory means anonymous memory (`RssAnon` in /proc/PID/status, read every 5 ms), which the kernel cannot reclaim. It
excludes the pages of mapped files, such as tiles: the kernel takes those back when it needs memory, and they would
count every tile that has been read. `ALLOCATORS` makes allocators return freed memory at once, because their reserve
depends on chance and load, by up to 40 MB.

Here, fits see a sample of at most `SAMPLE` vectors at both sizes. The shipped sample is larger and bounds the memory in
the same way, at a higher level: the bench `projection` measures the largest. For the compressed encoder, only the
vectors are made, because the other assets do the same work as those of its base.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import yaml

from synpipe.assets.graph import nodes
from synpipe.datasets import Project
from synpipe_tests.bench.bars import row
from synpipe_tests.bench.explorer import FREQUENCY
from synpipe_tests.conftest import environment

SHAPE_ZYX, VOXEL_NM_ZYX = (40, 2304, 2304), (40, 4, 4)
TILES_PER_SHARD = 2048
SYNAPSES_PER_NEURON = 50
SAMPLE = 5_000  # from 4,097 vectors on, UMAP searches neighbours as it does for the shipped 200,000
COMPRESSED = "grey_pca32"
ALLOCATORS = {"MIMALLOC_PURGE_DELAY": "0", "MALLOC_ARENA_MAX": "1", "MALLOC_TRIM_THRESHOLD_": "131072"}
# With ten times the tiles, a quarter more is allowed for the few numbers kept per tile and for the additional parts of files.
RATIO_BAR = 1.25
# Work per tile costs the same at both sizes. A step that fits on a sample becomes cheaper per tile.
TIME_BAR = 1.5
INTERVAL_S = 0.005


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiles", type=int, nargs=2, default=[10_000, 100_000])
    parser.add_argument("--folder", type=Path, help="for the stores: 21 GB with 100,000 tiles; by default the system's")
    chosen = parser.parse_args()
    print(f"{platform.platform()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    with tempfile.TemporaryDirectory(prefix="synpipe-bench-", dir=chosen.folder) as folder:
        small, large = (dict(measure(make_project(Path(folder), tiles))) for tiles in chosen.tiles)
    tell(chosen.tiles, small, large)


def tell(sizes: list[int], small: dict[str, tuple[float, float]], large: dict[str, tuple[float, float]]) -> None:
    """Print the table. small, large: peak in MB, and seconds, by asset."""
    print(f"\n{'':<34} {'peak, MB':>15} {'':>6} {'bytes a':>9}   {'ms a tile':>15}")
    print(f"{'asset':<34} {sizes[0]:>7,} {sizes[1]:>7,} {'ratio':>6} {'more tile':>9}   {sizes[0]:>7,} {sizes[1]:>7,}")
    for asset, (peak, seconds) in small.items():
        more, longer = large[asset]
        growth = (more - peak) * 1e6 / (sizes[1] - sizes[0])
        print(
            f"{asset:<34} {peak:>7.0f} {more:>7.0f} {more / peak:>6.2f} {growth:>9.0f}   "
            f"{1e3 * seconds / sizes[0]:>7.2f} {1e3 * longer / sizes[1]:>7.2f}"
        )
    worst = max(small, key=lambda asset: large[asset][0] / small[asset][0])
    seconds = [sum(one for _, one in found.values()) for found in (small, large)]
    print()
    row(f"peak memory at {sizes[1]:,} tiles ÷ at {sizes[0]:,}: {worst}", large[worst][0] / small[worst][0], RATIO_BAR)
    row(
        f"time a tile at {sizes[1]:,} ÷ at {sizes[0]:,}: all assets",
        seconds[1] / sizes[1] / (seconds[0] / sizes[0]),
        TIME_BAR,
    )


def make_project(folder: Path, tiles: int) -> Project:
    """Write a project with this many synapses, each of which has a tile. All sizes share the volume."""
    volume = folder / "volume.h5"
    if not volume.exists():
        write_volume(volume)
    data = folder / f"{tiles}" / "data"
    (data / "datasets").mkdir(parents=True)
    synapses = data.parent / "synapses.csv"
    write_synapses(synapses, tiles)
    spec = {
        "title": "Made up",
        "volume": {"path": str(volume)},
        "annotations": [{"format": "table", "path": str(synapses), "columns": {"x": "x_nm", "y": "y_nm", "z": "z_nm"}}],
        "classes": [*FREQUENCY],
        # Small blocks, because the shards of so small a volume would otherwise differ in size.
        "tiles": {"shards": -(-tiles // TILES_PER_SHARD), "block_voxels_zyx": [8, 64, 64]},
        "encoders": ["grey", "grey+pca32"],  # `COMPRESSED` is the second
        "evaluation": {"synapses": SAMPLE},
        "split": {"guard": 0.01},  # all tiles of such a small volume overlap
    }
    (data / "datasets" / "bench.yaml").write_text(yaml.safe_dump(spec))
    registry = {"encoders": {"grey": {"descriptor": "grey_histogram"}}}
    (data / "encoders.yaml").write_text(yaml.safe_dump(registry))
    return Project(data, data.parent / "store")


def write_volume(path: Path) -> None:
    """Return grey values that vary over about 30 voxels and differ between sections."""
    random = np.random.default_rng(0)
    with h5py.File(path, "w") as file:
        voxels = file.create_dataset("volumes/raw", SHAPE_ZYX, np.uint8)
        for section in range(SHAPE_ZYX[0]):
            coarse = random.integers(40, 200, [extent // 32 for extent in SHAPE_ZYX[1:]], dtype=np.uint8)
            fine = random.integers(0, 40, SHAPE_ZYX[1:], dtype=np.uint8)
            voxels[section] = np.kron(coarse, np.ones((32, 32), np.uint8)) + fine
        voxels.attrs["resolution"], voxels.attrs["offset"] = VOXEL_NM_ZYX, (0, 0, 0)


def write_synapses(path: Path, count: int) -> None:
    random = np.random.default_rng(1)
    half = np.array([1, 128, 128])
    places = random.integers(half, np.array(SHAPE_ZYX) - half, (count, 3))
    z_nm, y_nm, x_nm = ((places + 0.5) * VOXEL_NM_ZYX).T
    neurons = np.arange(count) // SYNAPSES_PER_NEURON
    # A neuron has one transmitter and lies in one region.
    labels = random.choice(len(FREQUENCY), neurons[-1] + 1, p=np.array([*FREQUENCY.values()]) / sum(FREQUENCY.values()))
    columns = {
        "synapse_id": np.arange(count) + 720_000_000_000,
        "x_nm": x_nm,
        "y_nm": y_nm,
        "z_nm": z_nm,
        "neuron_id": neurons + 720_575_940_000_000_000,
        "neurotransmitter": pa.array([*FREQUENCY]).take(pa.array(labels[neurons])),
        "region": pa.array([f"region {number}" for number in range(40)]).take(pa.array(neurons % 40)),
        "hemilineage": pa.array([f"lineage {number}" for number in range(100)]).take(pa.array(neurons % 100)),
        "confidence": random.random(count).astype(np.float32),
    }
    pa_csv.write_csv(pa.table(columns), path)


def measure(project: Project) -> Iterator[tuple[str, tuple[float, float]]]:
    """Yield asset, peak in MB and seconds, in the order of the data flow."""
    for node in nodes(project.dataset("bench")):
        if node.encoder == COMPRESSED and node.asset.name != "embeddings":
            continue  # the same work as for its base
        peak = 0.0
        command = [sys.executable, "-m", "synpipe_tests.bench.memory_step", str(project.data), str(project.store)]
        process = subprocess.Popen(
            [*command, node.name], stdout=subprocess.PIPE, text=True, env=environment(project) | ALLOCATORS
        )
        while process.poll() is None:
            peak = max(peak, anonymous_mb(process.pid))
            time.sleep(INTERVAL_S)
        assert process.stdout is not None
        if process.returncode:
            raise SystemExit(f"{node.name} failed")
        seconds = json.loads(process.stdout.read().splitlines()[-1])["seconds"]
        print(f"  {int(project.data.parent.name):>9,}  {node.name:<34} {peak:6.0f} MB {seconds:8.1f} s", flush=True)
        yield node.name, (peak, seconds)


def anonymous_mb(process_id: int) -> float:
    """Return the anonymous memory of a process, or 0 if it has ended."""
    try:
        lines = Path(f"/proc/{process_id}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    return next((int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith("RssAnon")), 0.0)


if __name__ == "__main__":
    main()
