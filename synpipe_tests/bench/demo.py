"""Measure sizes and times of the demo data set: `python -m synpipe_tests.bench.demo`.

If the demo data set does not exist, it is made first. The machine and the versions are printed beside the figures.
"""

import gzip
import json
import os
import platform
import time
from collections.abc import Callable
from importlib.metadata import version

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from synpipe.assets.rgb_tiles import open_tiles
from synpipe.datasets import Dataset, Project
from synpipe.defs.run import materialize
from synpipe.index.search import SynapseIndex
from synpipe.store.files import read_table

REPEATS = 50


def main() -> None:
    project = Project.locate()
    materialize(project, "demo")
    demo = project.dataset("demo")
    print(f"\n{platform.platform()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    print(", ".join(f"{name} {version(name)}" for name in ("numpy", "pyarrow", "lancedb", "torch", "timm")))
    for encoder in demo.encoders:
        print_sizes(demo, encoder)
    print_latencies(demo)


def print_sizes(dataset: Dataset, encoder: str) -> None:
    """Compare the Parquet file with gzipped JSON, the format of SynOminous, of the same vectors and of fewer digits."""
    path = dataset.table_path(encoder)
    table = read_table(path, ["vector"])["vector"].combine_chunks()
    vectors = table.flatten().to_numpy().reshape(len(table), -1).astype(np.float64)
    # The shortest decimals that distinguish the rounded components, so that both files hold the same information.
    digits = int(np.ceil(-np.log10(np.min(np.diff(np.unique(vectors)))))) + 1
    print(f"\nSize of {encoder}, {vectors.shape[0]:,} × {vectors.shape[1]}, bytes a component")
    print(f"  {'':<34} {'Parquet':>8} {'gzipped JSON':>13}")
    for name, decimals in ((f"as we write them ({digits} decimals)", digits), ("rounded to 3 decimals", 3)):
        rounded = np.round(vectors, decimals)
        as_json = len(gzip.compress(json.dumps(rounded.tolist()).encode()))
        print(f"  {name:<34} {_parquet_bytes(rounded) / vectors.size:8.3f} {as_json / vectors.size:13.3f}")
    print(f"  {'the whole file, with all columns':<34} {path.stat().st_size / vectors.size:8.3f}")


def _parquet_bytes(vectors: np.ndarray) -> int:
    column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel(), pa.float32()), vectors.shape[1])
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"vector": column}), sink, compression="zstd")
    return sink.getvalue().size


def print_latencies(dataset: Dataset) -> None:
    """Time reading a tile by id, and searching for the most similar synapses of every class."""
    index = read_table(dataset.tiles_path)
    reader = open_tiles(dataset)
    ids = np.random.default_rng(0).choice(index["synapse_id"].to_numpy(), REPEATS).tolist()
    search = SynapseIndex(dataset, dataset.encoder(None))
    print(f"\nMedian of {REPEATS}, ms")
    rows: list[tuple[str, Callable[[int], object]]] = [
        ("tile by id", reader.by_id),
        ("tile by id as PNG", reader.png),
        (f"top 4 of each class among {len(index):,}", search.search),
    ]
    for name, ask in rows:
        print(f"  {name:<38} {np.median([_milliseconds(ask, synapse_id) for synapse_id in ids]):7.3f}")


def _milliseconds(ask: Callable[[int], object], synapse_id: int) -> float:
    started = time.perf_counter()
    ask(synapse_id)
    return 1000 * (time.perf_counter() - started)


if __name__ == "__main__":
    main()
