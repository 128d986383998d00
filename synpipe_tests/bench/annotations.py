"""Measure peak memory and time of `make_synapses` for large tables: `python -m synpipe_tests.bench.annotations --rows 10000000`.

Each format is generated, and converted in its own process, from the file to `synapses.parquet` with every check. The
rows are in random order. 0.1 % each are repeated, lack a coordinate, lie outside the volume, or misspell the
transmitter.
"""

import argparse
import os
import platform
import resource
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
import pyarrow.parquet as pq

from synpipe.assets import synapses
from synpipe.assets.asset import Task
from synpipe.datasets import Dataset, DatasetSpec

FORMATS = ("csv", "parquet", "feather")
ROWS = 10_000_000
BLOCK_ROWS = 2**18
SHAPE_ZYX, VOXEL_NM_ZYX = (7063, 134144, 248832), (40, 4, 4)  # FAFB v14
NEURONS = 200_000
NAMES = ["acetylcholine", "gaba", "glutamate", "dopamine", "serotonin", "octopamine", None]
MULTIPLIER = 0x5851F42D4C957F2D  # odd, so that k · MULTIPLIER mod 2^62 is another id for every k (Knuth's MMIX)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=FORMATS)
    parser.add_argument("--folder", type=Path, help="for the files, some 200 bytes a row; by default a temporary one")
    parser.add_argument("--convert", choices=FORMATS, help=argparse.SUPPRESS)  # runs in the measured process
    arguments = parser.parse_args()
    if arguments.convert:
        _convert(arguments.folder, arguments.convert)
        return
    print_memory(arguments.rows, arguments.formats, arguments.folder)


def print_memory(rows: int, formats: tuple[str, ...] = FORMATS, folder: Path | None = None) -> None:
    print(f"\nsynapses from {rows:,} rows; {platform.platform()}, {os.cpu_count()} cores, pyarrow {pa.__version__}")
    print(f"  {'':<8} {'file, MB':>9} {'peak, MB':>9} {'seconds':>8}  synapses, rejects")
    with tempfile.TemporaryDirectory(dir=folder) as made:
        for suffix in formats:
            path = write(Path(made), suffix, rows)
            command = [sys.executable, "-m", "synpipe_tests.bench.annotations", "--folder", made, "--convert", suffix]
            figures = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            print(f"  {suffix:<8} {path.stat().st_size / 1e6:9,.0f} {figures}", end="", flush=True)
            path.unlink()


def _dataset(folder: Path, suffix: str) -> Dataset:
    spec = {
        "title": "Many synapses",
        "volume": {"path": "volume.h5"},
        "annotations": [{"format": "flywire", "path": f"synapses.{suffix}", "columns": {"neurotransmitter": "nt"}}],
        "encoders": ["none"],
    }
    return Dataset("many", DatasetSpec.parse(spec, "bench"), folder / "store", folder, {}, folder)


def _convert(folder: Path, suffix: str) -> None:
    started = time.monotonic()
    made = synapses.make(Task(_dataset(folder, suffix), "", {"annotations": ""}, None, False, lambda _: None))
    elapsed, peak_kb = time.monotonic() - started, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"{peak_kb * 1024 / 1e6:9,.0f} {elapsed:8.1f}  {made.rows:,}, {made.facts.rejects:,}")


def write(folder: Path, suffix: str, rows: int) -> Path:
    """Write a table like FlyWire's, `synapses.<suffix>`, and a volume without a single voxel written."""
    with h5py.File(folder / "volume.h5", "w") as file:
        file.create_dataset("volumes/raw", SHAPE_ZYX, np.uint8, chunks=(64, 64, 64)).attrs["resolution"] = VOXEL_NM_ZYX
    path = folder / f"synapses.{suffix}"
    blocks = _blocks(rows)
    first = next(blocks)
    open_writer = {"csv": pa_csv.CSVWriter, "parquet": pq.ParquetWriter, "feather": pa.ipc.new_file}[suffix]
    with open_writer(str(path), first.schema) as writer:
        writer.write_table(first)
        for block in blocks:
            writer.write_table(block)
    return path


def _blocks(rows: int) -> Iterator[pa.Table]:
    random = np.random.default_rng(0)
    for start in range(0, rows, BLOCK_ROWS):
        numbers = np.arange(start, min(start + BLOCK_ROWS, rows), dtype=np.uint64)
        count = len(numbers)
        kind = random.integers(0, 1000, count)  # 0 to 3: the four faults
        ids = np.where(kind == 0, numbers // 2, numbers) * np.uint64(MULTIPLIER) & np.uint64(2**62 - 1)
        zyx = random.random((count, 3)) * SHAPE_ZYX // 1 * VOXEL_NM_ZYX
        zyx[kind == 1, 0] = np.nan
        zyx[kind == 2, 1] += SHAPE_ZYX[1] * VOXEL_NM_ZYX[1]
        names = pa.array(NAMES).take(random.integers(0, len(NAMES), count))
        yield pa.table(
            {
                "id": ids.astype(np.int64),
                **{f"pre_pt_position_{axis}": pa.array(zyx[:, i], from_pandas=True) for i, axis in enumerate("zyx")},
                "pre_pt_root_id": 720575940600000000 + random.integers(0, NEURONS, count),
                "neuropil": pa.array([f"NP_{number}" for number in range(78)]).take(random.integers(0, 78, count)),
                "cleft_score": random.random(count) * 255,
                "nt": pa.array(np.where(kind == 3, "acetylcholin", names.to_numpy(zero_copy_only=False))),
            }
        )


if __name__ == "__main__":
    main()
