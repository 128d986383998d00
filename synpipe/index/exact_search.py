"""Exact search class by class, in memory.

In: batches of rows with their vectors, in any order, and the classes to hold. Out: for each class the rows nearest to a
query. Guarantee: the answer is that of a scan of all rows; of rows equally near, those that came first.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

BLOCK_ROWS = 4096  # vectors subtracted from the query at a time: the differences stay in the processor's cache


class ExactSearch:
    """Rows of some classes and their vectors, those of a class together; safe to use from several threads."""

    def __init__(
        self, batches: Iterable[tuple[pa.RecordBatch, np.ndarray]], counts: Mapping[str | None, int], dim: int
    ):
        """batches: rows with `synapse_id`, `neuron_id`, `neurotransmitter` and `norm`, and unit vectors, float32 (n, dim).
        counts: of how many rows each class to be held has; None is the class of those without a label. Rows of other
        classes are passed over.
        """
        ends = np.cumsum(list(counts.values()), dtype=np.int64).tolist()
        self.places = {name: slice(end - counts[name], end) for name, end in zip(counts, ends, strict=True)}
        self._unit = np.empty((ends[-1] if ends else 0, dim), np.float32)
        begins = [place.start for place in self.places.values()]
        kept, rows = [], []
        for batch, vectors in batches:
            found = pc.index_in(batch["neurotransmitter"], pa.array(list(counts), pa.string()))
            of_batch = pc.fill_null(found, len(counts)).to_numpy()
            for number in np.unique(of_batch[of_batch < len(counts)]).tolist():
                of_class = vectors[of_batch == number]
                self._unit[begins[number] : begins[number] + len(of_class)] = of_class
                begins[number] += len(of_class)
            rows.append(of_batch[of_batch < len(counts)])
            kept.append(batch.filter(pa.array(of_batch < len(counts))))
        table = pa.Table.from_batches(kept)
        self.rows = table.take(np.argsort(np.concatenate(rows), kind="stable")).combine_chunks()
        self.ids = self.rows["synapse_id"].to_numpy()
        self._neurons = pc.fill_null(self.rows["neuron_id"], -1).to_numpy()
        self._norms = self.rows["norm"].to_numpy()

    def vector(self, row: int) -> np.ndarray:
        """With its length: float32 (dim,)."""
        return self._unit[row] * self._norms[row]

    def nearest(
        self,
        query: np.ndarray,
        metric: str,
        per_class: int,
        wanted: Mapping[str, Any],
        without_id: int | None,
        without_neuron: int | None,
    ) -> dict[str | None, tuple[np.ndarray, np.ndarray]]:
        """Rows and their distances, at most `per_class` of each class, nearest first.

        wanted: value by column. without_id, without_neuron: what is no answer.
        """
        distances = self._distances(query, metric)
        if without_id is not None:
            distances[self.ids == without_id] = np.inf
        if without_neuron is not None:
            distances[self._neurons == without_neuron] = np.inf
        for column, value in wanted.items():
            fits = pc.fill_null(pc.equal(self.rows[column], value), False)
            distances[~fits.to_numpy(zero_copy_only=False)] = np.inf
        return {name: _smallest(distances, place, per_class) for name, place in self.places.items()}

    def _distances(self, query: np.ndarray, metric: str) -> np.ndarray:
        if metric == "cosine":
            return 1 - self._unit @ (query / np.linalg.norm(query))
        if metric == "dot":
            return -(self._unit @ query) * self._norms
        distances = np.empty(len(self._unit), np.float32)
        for first in range(0, len(self._unit), BLOCK_ROWS):
            block = slice(first, first + BLOCK_ROWS)
            difference = self._unit[block] * self._norms[block, None]
            difference -= query
            if metric == "l1":
                distances[block] = np.abs(difference, out=difference).sum(axis=1)
            else:
                distances[block] = np.sqrt(np.einsum("ij,ij->i", difference, difference))
        return distances


def _smallest(distances: np.ndarray, place: slice, count: int) -> tuple[np.ndarray, np.ndarray]:
    of_class = distances[place]
    if len(of_class) > count:
        # Whatever is as near as the last one, so that the order of the rows decides among equals.
        rows = np.flatnonzero(of_class <= np.partition(of_class, count - 1)[count - 1])
    else:
        rows = np.arange(len(of_class))
    rows = rows[np.argsort(of_class[rows], kind="stable")][:count]
    rows = rows[np.isfinite(of_class[rows])]
    return rows + place.start, of_class[rows]
