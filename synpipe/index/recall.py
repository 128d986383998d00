"""Choose the number of probes of an index, and measure how many true neighbours it finds with them.

Inputs: a LanceDB table with its index, and the Parquet file that it was built from. Outputs: the number of probes (the
partitions that a query reads) and the recall.

The number of probes needed depends on how strongly the vectors cluster and hardly on how many there are: 8 probes found
.9999 of the neighbours at 103,511 × 192 and .994 at 1,000,000 × 128, and 16 found all of them. Starting from
`FIRST_NPROBES`, the number is therefore doubled until a sample of all rows and a sample of the rarest class find their
neighbours. `python -m synpipe_tests.bench.search` measures it again.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq

from synpipe.embeddings.vectors import read_unit_vectors, read_vectors
from synpipe.store.streams import read_batches

MIN_RECALL = 0.99
WANTED_RECALL = 0.995  # for the samples, so that other queries reach `MIN_RECALL` too
FIRST_NPROBES = 8
RECALL_QUERIES = 200  # drawn from all rows, and as many from the rarest class
RECALL_K = 10
TOLERANCE = 1e-6  # of a cosine in float32; those of LanceDB were within 2e-7 of float64


def tune(table: Any, table_path: Path, partitions: int) -> tuple[int, dict[str | None, float]]:
    """Return the smallest number of probes, from `FIRST_NPROBES` up, that reaches `WANTED_RECALL`, and the recalls.

    The recalls have two keys: None for a sample of all rows, and the name of the rarest class for a sample of that class.
    A query counts as its own neighbour, in the exact search too. One batch of vectors and the queries are in memory at a
    time. Raises `SynpipeError` if the file is damaged.
    """
    drawn = _draw_queries(table_path)
    queries = {
        name: read_vectors(table.take_offsets(rows).select(["vector"]).to_arrow()) for name, rows in drawn.items()
    }
    k = min(RECALL_K, table.count_rows())
    kth = dict(zip(queries, _kth_similarities(table_path, list(queries.values()), k), strict=True))
    nprobes = max(1, min(FIRST_NPROBES, partitions))
    while True:
        recalls = {name: _recall(table, queries[name], kth[name], k, nprobes) for name in queries}
        if min(recalls.values()) >= WANTED_RECALL or nprobes >= partitions:
            return nprobes, recalls
        nprobes = min(2 * nprobes, partitions)


def _draw_queries(table_path: Path) -> dict[str | None, list[int]]:
    """Rows to search with: from all rows (None), and from the class with the fewest rows, if any class is known."""
    # Dictionary encoding keeps a label in four bytes.
    labels = pq.ParquetFile(table_path, read_dictionary=["neurotransmitter"]).read(["neurotransmitter"])
    encoded = labels["neurotransmitter"].unify_dictionaries().combine_chunks()
    codes = pc.fill_null(encoded.indices, -1).to_numpy()
    random = np.random.default_rng(0)

    def some_of(rows: np.ndarray | int, count: int) -> list[int]:
        return np.sort(random.choice(rows, min(RECALL_QUERIES, count), replace=False)).tolist()

    drawn: dict[str | None, list[int]] = {None: some_of(len(codes), len(codes))}
    counts = np.bincount(codes[codes >= 0], minlength=len(encoded.dictionary))
    if counts.any():
        names = encoded.dictionary.to_pylist()
        rarest = min(np.flatnonzero(counts).tolist(), key=lambda code: (counts[code], names[code]))
        drawn[names[rarest]] = some_of(np.flatnonzero(codes == rarest), counts[rarest])
    return drawn


def _kth_similarities(table_path: Path, queries: list[np.ndarray], k: int) -> list[np.ndarray]:
    """Cosine of the k-th nearest row of each query. queries: arrays float32 (q, d). Returns an array float32 (q,) for each.

    Equal vectors are equally good answers, so an answer is correct if it is as near as the k-th true neighbour.
    """
    all_queries = np.concatenate(queries)
    best = np.full((len(all_queries), k), -np.inf, np.float32)
    for rows in read_batches(table_path, ["vector"]):
        candidates = np.concatenate([best, all_queries @ read_unit_vectors(rows).T], axis=1)
        best = np.partition(candidates, -k, axis=1)[:, -k:]
    return np.split(best.min(axis=1), np.cumsum([len(group) for group in queries])[:-1])


def _recall(table: Any, queries: np.ndarray, kth: np.ndarray, k: int, nprobes: int) -> float:
    """Share of the true k nearest that the index finds, mean over queries. kth: see `_kth_similarities`."""
    hits = 0
    for query, limit in zip(queries, kth, strict=True):
        search = table.search(query).distance_type("cosine").nprobes(nprobes).limit(k)
        distances = search.select(["_distance"]).to_arrow()["_distance"].to_numpy()
        hits += int((1 - distances >= limit - TOLERANCE).sum())
    return hits / (len(queries) * k)
