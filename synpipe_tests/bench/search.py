"""Measure the search for the ten nearest by LanceDB and other engines: `python -m synpipe_tests.bench.search`.

LanceDB is queried as any tool would query it, on the index that `synpipe.index.publish` builds from a Parquet table. In the
same run, and by turns, the bench queries NumPy's exact scan, FAISS (flat, and IVF with as many partitions and probes) and
hnswlib. All engines use as many threads as the environment allows (`OMP_NUM_THREADS`).

The vectors are simulated as in `bench.projection`: clusters of unequal size, each with ten directions of its own. A share
`LOYAL` of each cluster belongs to one class and the rest to any class, with FAFB's class shares, so that the rarest class is
rare and clustered. The queries are rows of the table, but not those with which the index was tuned. `--spread` uses the
harder clusters of `bench.explorer`, which are round and independent of the class.
"""

import argparse
import os
import platform
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np

from synpipe.index.publish import open_current, publish
from synpipe_tests.bench import explorer as bench_explorer
from synpipe_tests.bench.bars import row
from synpipe_tests.bench.explorer import FREQUENCY, write_table
from synpipe_tests.bench.projection import CLUSTERS, clusters_like_an_encoders

SIZES = ((103_511, 192), (100_000, 128), (1_000_000, 128))
HNSW_ROWS = 200_000  # building it takes minutes beyond
HNSW_LINKS, HNSW_BUILD_WIDTH, HNSW_SEARCH_WIDTH = 16, 100, 128
K, QUERIES, WARM_UP = 10, 400, 200
TURN = 25  # queries that an engine answers before the next engine takes its turn
LOYAL = 0.8
TIME_BAR, GROWTH_BAR, RECALL_BAR = 1.0, 2.0, 0.99

Ask = Callable[[np.ndarray], np.ndarray]
"""Maps a query, float32 (d,), to the rows of its nearest neighbours."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--spread", action="store_true")
    parser.add_argument("--hnsw-rows", type=int, default=HNSW_ROWS)
    chosen = parser.parse_args()
    threads = os.environ.get("OMP_NUM_THREADS", "all")
    print(f"{platform.platform()}, {os.cpu_count()} cores, {threads} threads, load {os.getloadavg()[0]:.1f}")
    print(", ".join(f"{name} {version(name)}" for name in ("lancedb", "numpy", "faiss-cpu", "hnswlib")))
    first, small, large = (measure(*size, chosen.spread, chosen.hnsw_rows) for size in SIZES)
    print()
    row(f"top {K} of 103,511 × 192 through LanceDB: time ÷ numpy's exact scan", first["ms"] / first["numpy"], TIME_BAR)
    row("  its recall", first["recall"], RECALL_BAR, at_most=False)
    row("  its recall, queries of the rarest class", first["rarest"], RECALL_BAR, at_most=False)
    row(f"top {K}: time at 1,000,000 × 128 ÷ at 100,000 × 128", large["ms"] / small["ms"], GROWTH_BAR)
    row("  recall at 1,000,000", large["recall"], RECALL_BAR, at_most=False)
    row("  recall at 1,000,000, queries of the rarest class", large["rarest"], RECALL_BAR, at_most=False)


def measure(rows: int, dimensions: int, spread: bool, hnsw_rows: int) -> dict[str, float]:
    vectors, labels = made_up(rows, dimensions, spread)
    random = np.random.default_rng(1)
    queries = random.choice(rows, QUERIES, replace=False)
    rarest = np.bincount(labels, minlength=len(FREQUENCY))[: len(FREQUENCY)].argmin()
    of_class = np.flatnonzero(labels == rarest)
    rare = random.choice(of_class, min(QUERIES, len(of_class)), replace=False)
    print(f"\n{rows:,} × {dimensions}; the rarest class has {len(of_class):,} rows")
    print(f"  {'':<34} {'build s':>8} {'MB':>7} {'p50 ms':>7} {'recall':>7} {'rarest':>7}")
    with tempfile.TemporaryDirectory(prefix="synpipe-bench-") as folder:
        engines = {"numpy, exact scan": (lambda query: _nearest(vectors @ query), 0.0, vectors.nbytes)}
        engines |= lancedb_index(Path(folder), vectors, labels) | faiss_indexes(vectors)
        if rows <= hnsw_rows:
            engines |= hnsw_index(vectors)
        times: dict[str, list[float]] = {name: [] for name in engines}
        hits: dict[str, list[float]] = {name: [] for name in engines}
        for each in random.choice(rows, WARM_UP):
            for ask, _, _ in engines.values():
                ask(vectors[each])
        asked = [*queries, *rare]
        for block in np.array_split(asked, len(asked) // TURN):
            similarity = [vectors @ vectors[each] for each in block]
            limits = [np.partition(one, -K)[-K] - 1e-6 for one in similarity]  # equal vectors are equally good answers
            # A turn has several queries, because a scan of all rows evicts everything else from the processor's caches.
            for name, (ask, _, _) in engines.items():
                for each, one, limit in zip(block, similarity, limits, strict=True):
                    began = time.perf_counter()
                    answer = ask(vectors[each])
                    times[name].append(1e3 * (time.perf_counter() - began))
                    hits[name].append(float((one[answer] >= limit).mean()))
    figures = {}
    for name, (_, build, size) in engines.items():
        p50, recall = float(np.median(times[name][:QUERIES])), float(np.mean(hits[name][:QUERIES]))
        of_rarest = float(np.mean(hits[name][QUERIES:]))
        print(f"  {name:<34} {build:>8.1f} {size / 1e6:>7.0f} {p50:>7.2f} {recall:>7.4f} {of_rarest:>7.4f}", flush=True)
        kind = "numpy" if name.startswith("numpy") else name.split(",")[0]
        figures[kind] = p50
        if kind == "LanceDB":
            figures |= {"ms": p50, "recall": recall, "rarest": of_rarest}
    return figures


def made_up(rows: int, dimensions: int, spread: bool) -> tuple[np.ndarray, np.ndarray]:
    """Simulate unit vectors, float32 (n, d), with their class codes (n,)."""
    if spread:
        bench_explorer.DIMENSIONS = dimensions
        return bench_explorer.made_up(rows)
    vectors, cluster = clusters_like_an_encoders(rows, dimensions, seed=1)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    random = np.random.default_rng(2)
    shares = np.array([*FREQUENCY.values()]) / sum(FREQUENCY.values())
    of_cluster = random.choice(len(shares), CLUSTERS, p=shares)
    any_class = random.choice(len(shares), rows, p=shares)
    return vectors, np.where(random.random(rows) < LOYAL, of_cluster[cluster], any_class)


def lancedb_index(folder: Path, vectors: np.ndarray, labels: np.ndarray) -> dict[str, tuple[Ask, float, int]]:
    write_table(folder / "table.parquet", vectors, labels)
    began = time.perf_counter()
    report = publish(folder / "table.parquet", folder / "db", "made_up", "0" * 32, lambda line: None)
    seconds = time.perf_counter() - began
    table = open_current(folder / "db", "made_up")

    def ask(query: np.ndarray) -> np.ndarray:
        search = table.search(query).distance_type("cosine").nprobes(report.nprobes).limit(K).select(["synapse_id"])
        return search.to_arrow()["synapse_id"].to_numpy()

    size = sum(file.stat().st_size for file in (folder / "db").rglob("*") if file.is_file())
    return {f"LanceDB, {report.kind}, {report.partitions}, {report.nprobes} probes": (ask, seconds, size)}


def faiss_indexes(vectors: np.ndarray) -> dict[str, tuple[Ask, float, int]]:
    import faiss

    from synpipe.index.build import partitions_for
    from synpipe.index.recall import FIRST_NPROBES

    rows, dimensions = vectors.shape
    flat, partitions = faiss.IndexFlatIP(dimensions), partitions_for(rows)
    inverted = faiss.IndexIVFFlat(faiss.IndexFlatIP(dimensions), dimensions, partitions, faiss.METRIC_INNER_PRODUCT)
    inverted.nprobe = FIRST_NPROBES
    engines: dict[str, tuple[Ask, float, int]] = {}
    for name, index in (("FAISS flat", flat), (f"FAISS IVF, {partitions}, {FIRST_NPROBES} probes", inverted)):
        began = time.perf_counter()
        index.train(vectors)
        index.add(vectors)
        seconds = time.perf_counter() - began
        engines[name] = (lambda query, index=index: index.search(query[None], K)[1][0], seconds, vectors.nbytes)
    return engines


def hnsw_index(vectors: np.ndarray) -> dict[str, tuple[Ask, float, int]]:
    import hnswlib

    index = hnswlib.Index("ip", vectors.shape[1])
    began = time.perf_counter()
    index.init_index(len(vectors), M=HNSW_LINKS, ef_construction=HNSW_BUILD_WIDTH)
    index.add_items(vectors, num_threads=int(os.environ.get("OMP_NUM_THREADS", -1)))
    index.set_ef(HNSW_SEARCH_WIDTH)
    name = f"hnswlib, M {HNSW_LINKS}, ef {HNSW_SEARCH_WIDTH}"
    size = index.index_file_size()
    return {name: (lambda query: index.knn_query(query, K)[0][0].astype(np.int64), time.perf_counter() - began, size)}


def _nearest(similarity: np.ndarray) -> np.ndarray:
    some = np.argpartition(similarity, -K)[-K:]
    return some[np.argsort(-similarity[some])]


if __name__ == "__main__":
    main()
