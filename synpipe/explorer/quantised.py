"""Vectors in one byte a component, for the search in the browser, and what that costs.

In: unit vectors, float32 (n, d). Out: `Quantised`, a quarter of the bytes; and the share of the true neighbours that is
still found. Guarantee: a row is never further from its vector than half a step of 1/127 of its largest component.

A row is its deviation from the mean of all rows, in steps of its own, brought back to unit length. Without the mean, rows
that share a large component, as those of many networks do, spend their steps on it: of such vectors plain bytes find less
than a third of the nearest four, these more than .95 (`test_site`).
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
RECALL_QUERIES, RECALL_PER_CLASS, QUERIES_AT_ONCE = 100, 4, 10
TOLERANCE = 1e-6  # of a distance in float32: as near as the last true neighbour is right, too


@dataclass(frozen=True)
class Quantised:
    """Row i is `centre[i] * mean + scale[i] * codes[i]`, of unit length.

    codes: int8 (n, d). scale, centre: float32 (n,). mean: float32 (d,).
    """

    codes: np.ndarray
    scale: np.ndarray
    centre: np.ndarray
    mean: np.ndarray

    def rows(self, rows: slice | np.ndarray) -> np.ndarray:
        """Vectors as the browser sees them: float32 (k, d)."""
        return self.centre[rows, None] * self.mean + self.scale[rows, None] * self.codes[rows]


def quantise(unit: np.ndarray) -> Quantised:
    """unit: float32 (n, d), of unit length."""
    mean = unit.mean(axis=0, dtype=np.float64).astype(np.float32)
    codes = np.empty(unit.shape, dtype=np.int8)
    scale, centre = np.empty(len(unit), np.float32), np.empty(len(unit), np.float32)
    for rows in _blocks(len(unit)):
        deviation = unit[rows] - mean
        step = np.abs(deviation).max(axis=1, keepdims=True) / LEVELS
        step[step == 0] = 1  # the mean itself
        codes[rows] = np.rint(deviation / step)
        length = np.linalg.norm(mean + step * codes[rows], axis=1)
        scale[rows], centre[rows] = step[:, 0] / length, 1 / length
    return Quantised(codes, scale, centre, mean)


def measure_recall(
    unit: np.ndarray, norms: np.ndarray, quantised: Quantised, starts: Sequence[int], classes: Sequence[str]
) -> dict[str, Any]:
    """The share of the nearest of each class that a search of the quantised rows finds, held against the exact search.

    The rows of `classes[i]` are those from `starts[i]` to `starts[i + 1]`. Queries are rows drawn with a fixed seed.
    Returns JSON-able `queries`, `per_class`, `overall`, `rarest_class` with its `rarest` (both under cosine), and
    `metrics`, overall under each.
    """
    queries = np.random.default_rng(0).permutation(len(unit))[:RECALL_QUERIES]
    seen = quantised.rows(slice(None))
    found = {metric: np.zeros(len(classes)) for metric in METRICS}
    wanted = np.zeros(len(classes))
    for batch in np.array_split(queries, math.ceil(len(queries) / QUERIES_AT_ONCE)):
        true_similarities, similarities = unit[batch] @ unit.T, seen[batch] @ seen.T
        for place, query in enumerate(batch):
            for metric, hits in found.items():
                true = _distances(metric, unit, norms, int(query), true_similarities[place])
                got = _distances(metric, seen, norms, int(query), similarities[place])
                for number, (start, stop) in enumerate(pairwise(starts)):
                    k = min(RECALL_PER_CLASS, stop - start - (start <= query < stop))
                    if k <= 0:
                        continue
                    exact = true[start:stop]
                    last = np.partition(exact, k - 1)[k - 1]
                    nearest = np.argpartition(got[start:stop], k - 1)[:k]
                    hits[number] += (exact[nearest] <= last + TOLERANCE * (1 + abs(last))).sum()
                    wanted[number] += k if metric == "cosine" else 0
    labelled = [number for number in np.flatnonzero(wanted).tolist() if classes[number] != UNLABELLED]
    rarest = min(labelled, key=lambda number: starts[number + 1] - starts[number], default=None)
    shares = {metric: _share(hits.sum(), wanted.sum()) for metric, hits in found.items()}
    return {
        "queries": len(queries),
        "per_class": RECALL_PER_CLASS,
        "overall": shares["cosine"],
        "rarest_class": None if rarest is None else classes[rarest],
        "rarest": None if rarest is None else _share(found["cosine"][rarest], wanted[rarest]),
        "metrics": shares,
    }


def _distances(metric: str, unit: np.ndarray, norms: np.ndarray, query: int, cosines: np.ndarray) -> np.ndarray:
    """Distances of all rows to the row `query`, float32 (n,); infinite for that row itself."""
    distances = distances_to(unit[query] * norms[query], unit, norms, metric, cosines)
    distances[query] = np.inf
    return distances


def _blocks(count: int) -> Iterator[slice]:
    return (slice(start, start + BLOCK_ROWS) for start in range(0, count, BLOCK_ROWS))


def _share(part: float, whole: float) -> float | None:
    return round(float(part / whole), 4) if whole else None
