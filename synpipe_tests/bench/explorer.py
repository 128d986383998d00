"""Measure how long the explorer takes for the four most similar synapses of each class: `python -m synpipe_tests.bench.explorer`.

It measures 103,511 and 1,000,000 rows × 128. The classes are as frequent as among the labelled synapses of FAFB, and a
tenth of the rows is unlabelled. The vectors are synthetic, in clusters that say little about the class. The time is that
of a whole answer of the server, without HTTP. For comparison, an exact numpy scan of the same rows, sorted by class, is
timed in turns in the same run.
"""

import argparse
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from synpipe.assets.manifest import Manifest, write_manifest
from synpipe.datasets import Project
from synpipe.embeddings.table import table_schema
from synpipe.explorer.answers import Explorer
from synpipe.index.publish import publish
from synpipe_tests.bench.bars import row
from synpipe_tests.support.tables import PROVENANCE

DIMENSIONS = 128
# Counts of the 103,511 labelled synapses of FAFB (Eckstein et al.) that SynOminous shows, from `synominous_umap.json.gz`.
FREQUENCY = {
    "acetylcholine": 0.4615,
    "gaba": 0.3126,
    "glutamate": 0.0702,
    "dopamine": 0.0919,
    "serotonin": 0.0457,
    "octopamine": 0.0182,
}
UNLABELLED_SHARE = 0.1
CLUSTERS = 400
SPREAD = 0.7
PER_CLASS = 4
QUERIES = 40
BLOCK = 50_000
TIME_BAR, GROWTH_BAR, RECALL_BAR, CLASS_BAR = 1.5, 3, 0.99, 0.97


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, nargs=2, default=[103_511, 1_000_000])
    sizes = parser.parse_args().rows
    print(f"{platform.platform()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    print(", ".join(f"{name} {version(name)}" for name in ("lancedb", "numpy", "pyarrow")))
    header = f"\n{'rows':>10} {'explorer ms':>12} {'numpy ms':>9} {'ratio':>6} {'recall':>7} {'worst class':>12}"
    print(header, flush=True)
    with tempfile.TemporaryDirectory(prefix="synpipe-bench-") as folder:
        found = [measure(Path(folder) / str(rows), rows) for rows in sizes]
    (small, large) = found
    print()
    for what, figure, bar, at_least in (
        (f"{sizes[0]:,} rows: recall", small["recall"], 1.0, True),
        (f"{sizes[0]:,} rows: time ÷ numpy's exact scan", small["ms"] / small["numpy_ms"], TIME_BAR, False),
        (f"{sizes[1]:,} rows: recall", large["recall"], RECALL_BAR, True),
        (f"{sizes[1]:,} rows: recall of the worst class", large["worst"], CLASS_BAR, True),
        (f"time at {sizes[1]:,} ÷ at {sizes[0]:,}", large["ms"] / small["ms"], GROWTH_BAR, False),
    ):
        row(f"explorer, {what}", figure, bar, at_most=not at_least)


def measure(folder: Path, rows: int) -> dict[str, Any]:
    vectors, labels = made_up(rows)
    project = store(folder, vectors, labels)
    explorer = Explorer(project)
    places = [np.flatnonzero(labels == number) for number in range(len(FREQUENCY) + 1)]
    sorted_rows = np.concatenate(places)
    matrix = vectors[sorted_rows]
    ends = np.cumsum([len(place) for place in places])
    slices = [slice(end - len(place), end) for place, end in zip(places, ends, strict=True)]

    def scan(row: int) -> list[list[int]]:
        distances = -(matrix @ vectors[row])
        distances[sorted_rows == row] = np.inf
        nearest = []
        for place in slices:
            of_class = distances[place]
            some = np.argpartition(of_class, PER_CLASS)[:PER_CLASS]
            nearest.append(sorted_rows[place][some[np.argsort(of_class[some])]].tolist())
        return nearest

    def ask(row: int) -> list[list[int]]:
        found = explorer.search("bench", "made_up", str(row), per_class=str(PER_CLASS))
        return [[int(one["id"]) for one in group["neighbours"]] for group in found["groups"]]

    queries = np.random.default_rng(1).choice(rows, QUERIES, replace=False).tolist()
    ask(queries[0]), scan(queries[0])
    timed = [(timing(lambda row=row: ask(row)), timing(lambda row=row: scan(row))) for row in queries]
    hits = np.array(
        [
            [len({*of} & {*true}) / len(true) for of, true in zip(asked, scanned, strict=True)]
            for (_, asked), (_, scanned) in timed
        ]
    )
    found = {
        "ms": float(np.median([ms for (ms, _), _ in timed])),
        "numpy_ms": float(np.median([ms for _, (ms, _) in timed])),
        "recall": float(hits.mean()),
        "worst": float(hits.mean(axis=0).min()),
    }
    print(
        f"{rows:>10,} {found['ms']:>12.1f} {found['numpy_ms']:>9.1f} {found['ms'] / found['numpy_ms']:>6.2f} "
        f"{found['recall']:>7.3f} {found['worst']:>12.3f}",
        flush=True,
    )
    return found


def timing(method: Callable[[], Any]) -> tuple[float, Any]:
    began = time.perf_counter()
    answer = method()
    return 1e3 * (time.perf_counter() - began), answer


def made_up(rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Return unit vectors, float32 (n, d), and class numbers (n,), the last of which means unlabelled."""
    random = np.random.default_rng(0)
    shares = [*(share * (1 - UNLABELLED_SHARE) for share in FREQUENCY.values()), UNLABELLED_SHARE]
    labels = random.choice(len(shares), rows, p=np.array(shares) / sum(shares))
    centres = random.normal(size=(CLUSTERS, DIMENSIONS)).astype(np.float32)
    vectors = np.empty((rows, DIMENSIONS), np.float32)
    for first in range(0, rows, BLOCK):
        block = vectors[first : first + BLOCK]
        random.standard_normal(block.shape, np.float32, out=block)
        block *= SPREAD
        block += centres[random.integers(0, CLUSTERS, len(block))]
        block /= np.linalg.norm(block, axis=1, keepdims=True)
    return vectors, labels


def store(folder: Path, vectors: np.ndarray, labels: np.ndarray) -> Project:
    """Make a store that holds only an index of these rows. The id of a synapse is its row."""
    datasets = folder / "data" / "datasets"
    datasets.mkdir(parents=True)
    spec = {
        "title": "Made up",
        "volume": {"path": "none.h5"},
        "annotations": [{"format": "cremi", "path": "none.h5"}],
        "classes": [*FREQUENCY],
        "encoders": ["made_up"],
    }
    (datasets / "bench.yaml").write_text(yaml.safe_dump(spec))
    registry = {"encoders": {"made_up": {"model": "resnet10t", "weights": "random", "seed": 0}}}
    (folder / "data" / "encoders.yaml").write_text(yaml.safe_dump(registry))
    project = Project(folder / "data", folder / "store")
    dataset = project.dataset("bench")
    path = folder / "table.parquet"
    write_table(path, vectors, labels)
    publish(path, dataset.lancedb_folder, "made_up", "0" * 32, lambda line: None)
    # This tells the explorer that there is an index.
    write_manifest(dataset, Manifest("index_made_up", "0" * 32, "", {}))
    return project


def write_table(path: Path, vectors: np.ndarray, labels: np.ndarray) -> None:
    """Write an embedding table. vectors: unit, float32 (n, d). classes: numbers (n,). Ids are row numbers."""
    schema = table_schema(vectors.shape[1]).with_metadata({"synpipe": json.dumps(PROVENANCE | {"encoder": "made_up"})})
    names = pa.array([*FREQUENCY, None])
    with pq.ParquetWriter(path, schema, compression="none") as writer:
        for first in range(0, len(vectors), BLOCK):
            block = vectors[first : first + BLOCK]
            ids = np.arange(first, first + len(block))
            given = {
                "synapse_id": pa.array(ids),
                "neuron_id": pa.array(ids // 50),
                "neurotransmitter": names.take(pa.array(labels[first : first + BLOCK])),
                "vector": pa.FixedSizeListArray.from_arrays(pa.array(block.ravel()), vectors.shape[1]),
                "norm": pa.array(np.ones(len(block), np.float32)),
                "x_nm": pa.array(ids * 1.0),
                "y_nm": pa.array(ids * 2.0),
                "z_nm": pa.array(ids * 3.0),
            }
            texts = {
                name: pa.array(["made up"] * len(block)) for name in schema.names if not schema.field(name).nullable
            }
            columns = [
                (given.get(name) if name in given else texts.get(name, pa.nulls(len(block)))).cast(
                    schema.field(name).type
                )
                for name in schema.names
            ]
            writer.write_table(pa.table(columns, schema=schema))


if __name__ == "__main__":
    main()
