"""Search vectors held in memory exactly, class by class.

Inputs: batches of rows with their vectors, in any order, and the classes to hold. Output: for each held class, the rows
nearest to a query. The answer is that of a scan of all rows; among rows at the same distance, the earlier ones win.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from synpipe.index.distances import distances_to


@dataclass(frozen=True)
class Question:
    """What is searched for.

    vector: float32 (d,), with its length. metric: one of `distances.METRICS`. per_class: neighbours of each class.
    where: the required value of each of these columns. without_id, without_neuron: a synapse and a neuron that are no
    answers.
    """

    vector: np.ndarray
    metric: str
    per_class: int
    where: Mapping[str, str | int]
    without_id: int | None = None
    without_neuron: int | None = None


class ExactSearch:
    """Holds the rows of some classes with their vectors, class by class. It is safe to use from several threads."""

    def __init__(
        self, batches: Iterable[tuple[pa.RecordBatch, np.ndarray]], counts: Mapping[str | None, int], dim: int
    ):
        """Read the rows of the classes in `counts`; rows of other classes are skipped.

        batches: rows with `synapse_id`, `neuron_id`, `neurotransmitter` and `norm`, and their unit vectors, float32
        (n, dim). counts: number of rows of each class; None is the class of rows without a label.
        """
        ends = np.cumsum(list(counts.values()), dtype=np.int64).tolist()
        self.places = {name: slice(end - counts[name], end) for name, end in zip(counts, ends, strict=True)}
        self._unit = np.empty((ends[-1] if ends else 0, dim), np.float32)
        begins = [place.start for place in self.places.values()]
        kept, codes_of_kept = [], []
        for batch, vectors in batches:
            positions = pc.index_in(batch["neurotransmitter"], pa.array(list(counts), pa.string()))
            codes = pc.fill_null(positions, len(counts)).to_numpy()
            for code in np.unique(codes[codes < len(counts)]).tolist():
                of_class = vectors[codes == code]
                self._unit[begins[code] : begins[code] + len(of_class)] = of_class
                begins[code] += len(of_class)
            codes_of_kept.append(codes[codes < len(counts)])
            kept.append(batch.filter(pa.array(codes < len(counts))))
        table = pa.Table.from_batches(kept)
        self.rows = table.take(np.argsort(np.concatenate(codes_of_kept), kind="stable")).combine_chunks()
        self.ids = self.rows["synapse_id"].to_numpy()
        self._neurons = pc.fill_null(self.rows["neuron_id"], -1).to_numpy()
        self._norms = self.rows["norm"].to_numpy()

    def vector(self, row: int) -> np.ndarray:
        """Return the vector of a row with its length: float32 (dim,)."""
        return self._unit[row] * self._norms[row]

    def nearest(self, question: Question) -> dict[str | None, tuple[np.ndarray, np.ndarray]]:
        """Return rows and their distances for each held class: at most `question.per_class` of each, nearest first."""
        distances = distances_to(question.vector, self._unit, self._norms, question.metric)
        if question.without_id is not None:
            distances[self.ids == question.without_id] = np.inf
        if question.without_neuron is not None:
            distances[self._neurons == question.without_neuron] = np.inf
        for column, value in question.where.items():
            fits = pc.fill_null(pc.equal(self.rows[column], value), False)
            distances[~fits.to_numpy(zero_copy_only=False)] = np.inf
        return {name: _smallest(distances, place, question.per_class) for name, place in self.places.items()}


def _smallest(distances: np.ndarray, place: slice, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the smallest finite distances within `place`, at most `count`, and those distances, ascending."""
    of_class = distances[place]
    if len(of_class) > count:
        # All rows as near as the last one are candidates, so that the order of the rows decides among equals.
        rows = np.flatnonzero(of_class <= np.partition(of_class, count - 1)[count - 1])
    else:
        rows = np.arange(len(of_class))
    rows = rows[np.argsort(of_class[rows], kind="stable")][:count]
    rows = rows[np.isfinite(of_class[rows])]
    return rows + place.start, of_class[rows]
