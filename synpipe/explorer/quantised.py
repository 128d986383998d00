"""Stores vectors with one byte per component, for the search in the browser, and measures what that costs in recall.

Input: unit vectors, float32 (n, d). Output: `Quantised`, a quarter of the bytes, and the share of the true neighbours that a
search still finds. Guarantee: no component is off by more than half a step, before the row is scaled back to unit length. A step is
1/127 of the largest component of the row's deviation.

Each row is stored as its deviation from the mean of all rows, in steps of its own. Without subtracting the mean, rows that share a
large component, as the vectors of many networks do, would spend most of their steps on that component. On such vectors, plain
bytes find less than a third of the nearest four, and these find more than .95 (`test_site`).
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from synpipe.annotations.schema import UNLABELLED
from synpipe.index.distances import METRICS, distances_to

LEVELS = 127
BLOCK_ROWS = 8192
RECALL_QUERIES, RECALL_PER_CLASS, QUERIES_PER_BATCH = 100, 4, 10
TOLERANCE = 1e-6  # relative; in float32, a neighbour at the distance of the last true one is equally correct


@dataclass(frozen=True)
class Quantised:
    """Row i is `centre[i] * mean + scale[i] * codes[i]`, and has unit length.

    codes: int8 (n, d). scale, centre: float32 (n,). mean: float32 (d,).
    """

    codes: np.ndarray
    scale: np.ndarray
    centre: np.ndarray
    mean: np.ndarray

    def rows(self, rows: slice | np.ndarray) -> np.ndarray:
        """The vectors as the browser sees them, float32 (k, d)."""
        return self.centre[rows, None] * self.mean + self.scale[rows, None] * self.codes[rows]


def quantise(unit: np.ndarray) -> Quantised:
    """Quantise vectors of unit length, float32 (n, d)."""
    mean = unit.mean(axis=0, dtype=np.float64).astype(np.float32)
    codes = np.empty(unit.shape, dtype=np.int8)
    scale, centre = np.empty(len(unit), np.float32), np.empty(len(unit), np.float32)
    for rows in _blocks(len(unit)):
        deviation = unit[rows] - mean
        step = np.abs(deviation).max(axis=1, keepdims=True) / LEVELS
        step[step == 0] = 1  # the vector equals the mean
        codes[rows] = np.rint(deviation / step)
        length = np.linalg.norm(mean + step * codes[rows], axis=1)
        scale[rows], centre[rows] = step[:, 0] / length, 1 / length
    return Quantised(codes, scale, centre, mean)


def measure_recall(
    unit: np.ndarray, norms: np.ndarray, quantised: Quantised, starts: Sequence[int], classes: Sequence[str]
) -> dict[str, Any]:
    """The share of the true nearest neighbours of each class that a search of the quantised vectors finds.

    unit: the exact vectors, float32 (n, d). norms: their lengths before they were normalised, (n,). Rows `starts[i]` to
    `starts[i + 1]` belong to `classes[i]`. The queries are rows drawn with a fixed seed.

    Returns values for JSON: `queries`, `per_class`, `overall`, `rarest_class` and its share `rarest` (both under cosine), and
    `metrics` with the overall share under each metric.
    """
    queries = np.random.default_rng(0).permutation(len(unit))[:RECALL_QUERIES]
    approximate = quantised.rows(slice(None))
    hits = {metric: np.zeros(len(classes)) for metric in METRICS}
    wanted = np.zeros(len(classes))  # the same under each metric
    for batch in np.array_split(queries, math.ceil(len(queries) / QUERIES_PER_BATCH)):
        exact_similarities, similarities = unit[batch] @ unit.T, approximate[batch] @ approximate.T
        for number, query in enumerate(batch.tolist()):
            counts = _neighbour_counts(query, starts)
            wanted += counts
            for metric in METRICS:
                exact = _distances(metric, unit, norms, query, exact_similarities[number])
                found = _distances(metric, approximate, norms, query, similarities[number])
                hits[metric] += _hits(exact, found, starts, counts)
    labelled = [number for number in np.flatnonzero(wanted).tolist() if classes[number] != UNLABELLED]
    rarest = min(labelled, key=lambda number: starts[number + 1] - starts[number], default=None)
    shares = {metric: _share(of_metric.sum(), wanted.sum()) for metric, of_metric in hits.items()}
    return {
        "queries": len(queries),
        "per_class": RECALL_PER_CLASS,
        "overall": shares["cosine"],
        "rarest_class": None if rarest is None else classes[rarest],
        "rarest": None if rarest is None else _share(hits["cosine"][rarest], wanted[rarest]),
        "metrics": shares,
    }


def _neighbour_counts(query: int, starts: Sequence[int]) -> np.ndarray:
    """How many neighbours a query has in each class, at most `RECALL_PER_CLASS`; the query itself does not count."""
    members = [stop - start - (start <= query < stop) for start, stop in pairwise(starts)]
    return np.clip(members, 0, RECALL_PER_CLASS)


def _hits(exact: np.ndarray, approximate: np.ndarray, starts: Sequence[int], counts: np.ndarray) -> np.ndarray:
    """How many of the nearest by approximate distance are among the truly nearest of each class.

    exact, approximate: distances of all rows, (n,). counts: the number of neighbours of each class.
    """
    hits = np.zeros(len(counts))
    for number, ((start, stop), count) in enumerate(zip(pairwise(starts), counts.tolist(), strict=True)):
        if count:
            distances = exact[start:stop]
            last = np.partition(distances, count - 1)[count - 1]
            nearest = np.argpartition(approximate[start:stop], count - 1)[:count]
            hits[number] = (distances[nearest] <= last + TOLERANCE * (1 + abs(last))).sum()
    return hits


def _distances(metric: str, unit: np.ndarray, norms: np.ndarray, query: int, cosines: np.ndarray) -> np.ndarray:
    """Distances of all rows to the row `query`, float32 (n,); infinite for that row itself."""
    distances = distances_to(unit[query] * norms[query], unit, norms, metric, cosines)
    distances[query] = np.inf
    return distances


def _blocks(count: int) -> Iterator[slice]:
    return (slice(start, start + BLOCK_ROWS) for start in range(0, count, BLOCK_ROWS))


def _share(part: float, whole: float) -> float | None:
    return round(float(part / whole), 4) if whole else None
