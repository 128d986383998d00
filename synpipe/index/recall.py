"""How well an index finds the true neighbours, and with how many probes.

In: a LanceDB table with its index, and the Parquet file that it was made of. Out: the number of probes, and the recall.

How many probes are enough depends on how clumped the vectors are, and hardly on their number: 8 found .9999 at
103,511 × 192 and .994 at 1,000,000 × 128, 16 all of them. So they are doubled from `FIRST_NPROBES` on until a sample of the
rows, and one of the rarest class, find their neighbours. `python -m synpipe_tests.bench.search` measures it again.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq

from synpipe.embeddings.vectors import read_unit_vectors, read_vectors
from synpipe.store.streams import read_batches

MIN_RECALL = 0.99
WANTED_RECALL = 0.995  # of the sample, so that other queries find `MIN_RECALL` too
FIRST_NPROBES = 8
RECALL_QUERIES = 200  # of all rows, and as many of the rarest class
RECALL_K = 10
TOLERANCE = 1e-6  # of a cosine in float32; LanceDB's were within 2e-7 of those in float64


def tune(table: Any, table_path: Path, partitions: int) -> tuple[int, dict[str | None, float]]:
    """Smallest number of probes, from `FIRST_NPROBES` up, with which the recalls are as wanted; and those: by class of the
    queries, None being a sample of all rows, the other the rarest class.

    A query finds itself, in the exact search too. Of the vectors a batch is in memory at a time, and the queries.
    Raises `SynpipeError` where the file is damaged.
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
    """Rows to search with: of all (None), and of the class that has the fewest, where one is known."""
    # As a dictionary a label takes four bytes.
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
    """Cosine of the k-th nearest row of each query, for arrays of queries, float32 (q, d): float32 (q,) each.

    Equal vectors are equally good answers: an answer is right if it is as near as the k-th true one.
    """
    everyone = np.concatenate(queries)
    best = np.full((len(everyone), k), -np.inf, np.float32)
    for rows in read_batches(table_path, ["vector"]):
        found = np.concatenate([best, everyone @ read_unit_vectors(rows).T], axis=1)
        best = np.partition(found, -k, axis=1)[:, -k:]
    return np.split(best.min(axis=1), np.cumsum([len(group) for group in queries])[:-1])


def _recall(table: Any, queries: np.ndarray, kth: np.ndarray, k: int, nprobes: int) -> float:
    hits = 0
    for query, limit in zip(queries, kth, strict=True):
        search = table.search(query).distance_type("cosine").nprobes(nprobes).limit(k)
        distances = search.select(["_distance"]).to_arrow()["_distance"].to_numpy()
        hits += int((1 - distances >= limit - TOLERANCE).sum())
    return hits / (len(queries) * k)
