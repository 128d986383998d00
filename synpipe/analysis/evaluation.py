"""Measure how good an encoder's vectors are: neighbours of the same class, linear probes, and recognition of places.

Inputs: vectors, classes, neurons and tile positions of the synapses, as arrays. Outputs: a figure with its interval
(`metrics.Estimate`) for each measure, and a row per query, from which two encoders can be compared.

Guarantees:
- No synapse of the query's own neuron and no tile that overlaps the query's tile counts as an answer. Such an answer would
  show that the neuron or the place was recognised, not the class.
- The queries depend on the data and the seed, never on the encoder. All encoders of a data set answer the same queries.
- Classes count alike, however rare they are.

Where the neuron of a synapse is not known, its place is used instead: tiles in the same block, a block being as large as a
tile, form one group of the bootstrap.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pydantic import Field

from synpipe.analysis.linear_probe import fit_probe, sample_rows
from synpipe.analysis.metrics import Estimate, estimate
from synpipe.analysis.splits import SCHEMES, TEST, TRAIN, VALIDATION, known
from synpipe.specs import Spec

K = 10  # neighbours that vote; also the k of precision@k
# Pairs of a query and a candidate that are in memory at a time. Each takes 70 bytes, most of them to compare positions.
PAIRS = 2**20


class EvaluationSpec(Spec):
    """How much is measured. Larger numbers give narrower intervals and take longer.

    synapses: synapses that are judged, at most. If there are more, a sample is drawn, labelled synapses first. This bounds
    memory and time.
    queries: synapses that search for their class; each class gets an even share, or all it has if that is less.
    places: places whose altered views must find their original.
    distractors: other tiles among which the original must be found.
    singles: places at which each alteration is also tried alone.
    probe_rows: synapses that a linear probe is fitted to, at most.
    """

    seed: int = Field(0, ge=0)
    synapses: int = Field(100_000, ge=10)
    queries: int = Field(2000, ge=10)
    places: int = Field(256, ge=10)
    distractors: int = Field(1000, ge=10)
    singles: int = Field(64, ge=1)
    probe_rows: int = Field(10_000, ge=100)


def draw_judged(labels: np.ndarray, spec: EvaluationSpec) -> np.ndarray:
    """Draw the rows that are judged: int64, sorted. These are all rows, or `spec.synapses` of them, labelled rows first.

    labels: object (n,), None for an unknown class.
    """
    if len(labels) <= spec.synapses:
        return np.arange(len(labels))
    drawn = np.random.default_rng([spec.seed, 2]).permutation(len(labels))
    unknown = ~known(labels[drawn])
    return np.sort(drawn[np.argsort(unknown, kind="stable")][: spec.synapses])


def draw_queries(labels: np.ndarray, spec: EvaluationSpec) -> np.ndarray:
    """Draw the rows that search: int64, sorted. Each class gets at most the same number of queries.

    labels: object (n,), None for an unknown class. If no class is known, the queries are drawn from all rows.
    """
    rng = np.random.default_rng(spec.seed)
    names = sorted({label for label in labels.tolist() if label is not None})
    strata = [np.flatnonzero(labels == name) for name in names] or [np.arange(len(labels))]
    share = -(-spec.queries // len(strata))
    return np.sort(np.concatenate([rng.permutation(rows)[:share] for rows in strata]))


def bootstrap_groups(neurons: np.ndarray, starts_zyx: np.ndarray, window_zyx: Sequence[int]) -> np.ndarray:
    """Number the groups that the bootstrap draws as a whole: int64 (n,).

    A group is a neuron, or, for synapses of unknown neurons, a block as large as a tile. neurons: object (n,), None where
    unknown. starts_zyx: int64 (n, 3), first voxels of the tiles. window_zyx: size of a tile in voxels.
    """
    blocks = np.floor_divide(starts_zyx, np.array(window_zyx)).tolist()
    keys = [
        ("place", *block) if neuron is None else neuron for neuron, block in zip(neurons.tolist(), blocks, strict=True)
    ]
    number_of = {key: number for number, key in enumerate(dict.fromkeys(keys))}
    return np.array([number_of[key] for key in keys], dtype=np.int64)


def same_place(starts: np.ndarray, others: np.ndarray, window_zyx: Sequence[int]) -> np.ndarray:
    """Tell which windows overlap: bool (n, m), for windows that start at voxels int64 (n, 3) and (m, 3)."""
    return (np.abs(starts[:, None] - others[None]) < np.array(window_zyx)).all(axis=2)


@dataclass(frozen=True)
class Neighbours:
    """The answers to all queries.

    queries: rows, (q,). nearest: rows of the nearest, (q, K), −1 where there are fewer than K. voted: the class that the
    nearest vote for, object (q,). average_precision, precision: of the query's own class, float (q,); NaN for a query
    without a class or without another member of its class. precision is precision@10.
    """

    queries: np.ndarray
    nearest: np.ndarray
    voted: np.ndarray
    average_precision: np.ndarray
    precision: np.ndarray


def search_all(
    vectors: np.ndarray,
    labels: np.ndarray,
    neurons: np.ndarray,
    starts_zyx: np.ndarray,
    window_zyx: Sequence[int],
    queries: np.ndarray,
) -> Neighbours:
    """Let every query rank the labelled synapses (or all, if none is labelled) by cosine. The search is exact.

    vectors: float32 (n, d) of unit length. labels, neurons: object (n,). starts_zyx: int64 (n, 3). queries: rows, (q,). The
    query itself, its neuron and tiles that overlap its own are left out. Each of the `K` nearest has one vote; if classes
    have equally many votes, the one with the nearer neighbours wins.
    """
    names, codes = _class_codes(labels)
    _, neuron_codes = _class_codes(neurons)
    labelled = np.flatnonzero(codes >= 0)
    candidates = labelled if len(labelled) else np.arange(len(labels))
    nearest = np.full((len(queries), K), -1, dtype=np.int64)
    votes = np.zeros((len(queries), max(1, len(names))))
    average_precision, precision = np.full(len(queries), np.nan), np.full(len(queries), np.nan)
    block_rows = max(1, PAIRS // max(1, len(candidates)))
    for first in range(0, len(queries), block_rows):
        block = queries[first : first + block_rows]
        similarity = vectors[block] @ vectors[candidates].T
        own = (neuron_codes[block][:, None] == neuron_codes[candidates][None]) & (neuron_codes[block] >= 0)[:, None]
        excluded = own | same_place(starts_zyx[block], starts_zyx[candidates], window_zyx)
        similarity[excluded] = -np.inf
        order = np.argsort(-similarity, axis=1, kind="stable")
        left = (~excluded).sum(axis=1)
        for place, row in enumerate(block.tolist(), start=first):
            ranked = candidates[order[place - first, : left[place - first]]]
            best = ranked[:K]
            nearest[place, : len(best)] = best
            if len(names):
                # The bonus for near neighbours adds up to less than one vote: Σ (K − r) / K² < 1 for K ≥ 2.
                np.add.at(votes[place], codes[best], 1 + (K - 1 - np.arange(len(best))) / K**2)
            if codes[row] >= 0:
                average_precision[place], precision[place] = _precisions(codes[ranked] == codes[row])
    voted = np.array([*(names[code] for code in votes.argmax(axis=1)), None] if names else [None] * (len(queries) + 1))
    voted = voted.astype(object)[:-1]
    voted[nearest[:, 0] < 0] = None
    return Neighbours(queries, nearest, voted, average_precision, precision)


def _precisions(relevant: np.ndarray) -> tuple[float, float]:
    """Average precision and precision@10 of a ranking, bool (n,); NaN if nothing in it is relevant.

    Average precision is the mean, over the relevant items, of the precision at their rank (Manning, Raghavan & Schütze,
    Introduction to Information Retrieval, 2008, section 8.4).
    """
    ranks = np.flatnonzero(relevant)
    if not len(ranks):
        return np.nan, np.nan
    return float(np.mean(np.arange(1, len(ranks) + 1) / (ranks + 1))), float(relevant[:K].mean())


def _class_codes(values: np.ndarray, names: Sequence[Any] | None = None) -> tuple[Sequence[Any], np.ndarray]:
    """The names (by default the distinct values, sorted) and the position of each row's value in them.

    values: object (n,). Returns codes as int64 (n,), −1 for None.
    """
    names = sorted({value for value in values.tolist() if value is not None}) if names is None else names
    code_of = {name: code for code, name in enumerate(names)}
    return names, np.array([code_of.get(value, -1) for value in values.tolist()], dtype=np.int64)


def probe_test_side(
    vectors: np.ndarray, labels: np.ndarray, sides: np.ndarray, classes: Sequence[str], spec: EvaluationSpec
) -> tuple[np.ndarray, np.ndarray] | None:
    """Fit a linear probe on the training side and try it on the test side.

    The probe is that of `linear_probe.fit_probe` with equal class weights: the model of the default classifier, if both
    see the same rows. The validation side chooses penalty and temperature, if the split has one.

    vectors: float32 (n, d). labels: object (n,), names from `classes` or None. sides: object (n,) of `splits.SIDES`; rows
    with another value are not used. Returns the test rows, int64 (t,), and whether each was predicted correctly, bool
    (t,). Returns None if the training side has fewer than two classes or the test side is empty.
    """
    _, codes = _class_codes(labels, classes)
    train, validation, test = (np.flatnonzero((sides == side) & (codes >= 0)) for side in (TRAIN, VALIDATION, TEST))
    if len(np.unique(codes[train])) < 2 or not len(test):
        return None
    train = train[sample_rows(codes[train], spec.probe_rows)]
    probe = fit_probe(vectors[train], codes[train], vectors[validation], codes[validation], len(classes))
    return test, probe.probabilities(vectors[test]).argmax(axis=1) == codes[test]


Rows = Mapping[str, np.ndarray]
"""Columns of a table with a row per judged synapse.

`label`, `voted`: object. `group`: int64. `average_precision`, `precision_at_10`, `instance_rank`, `probe_<scheme>` (1 if
correct, else 0): float, NaN where a synapse has no value.
"""


@dataclass(frozen=True)
class Figure:
    """A figure of an encoder.

    values: the function that gives the value of each row, NaN where there is none. by_class: whether classes count alike;
    otherwise rows count alike.
    """

    title: str
    values: Callable[[Rows], np.ndarray]
    by_class: bool = True


def _vote_is_correct(rows: Rows) -> np.ndarray:
    answered = np.array([a is not None and b is not None for a, b in zip(rows["label"], rows["voted"], strict=True)])
    return np.where(answered, rows["label"] == rows["voted"], np.nan)


def _column(name: str) -> Callable[[Rows], np.ndarray]:
    return lambda rows: rows[name]


def _found_within(k: int) -> Callable[[Rows], np.ndarray]:
    return lambda rows: np.where(np.isnan(rows["instance_rank"]), np.nan, rows["instance_rank"] <= k)


FIGURES = {
    "instance_recall_at_1": Figure("instance recall@1", _found_within(1), by_class=False),
    "instance_recall_at_5": Figure("instance recall@5", _found_within(5), by_class=False),
    "knn_balanced_accuracy": Figure("kNN balanced accuracy", _vote_is_correct),
    "knn_accuracy": Figure("kNN accuracy", _vote_is_correct, by_class=False),
    "map": Figure("mean average precision", _column("average_precision")),
    "precision_at_10": Figure("precision@10", _column("precision_at_10")),
    **{f"probe_{scheme}": Figure(f"linear probe, split by {scheme}", _column(f"probe_{scheme}")) for scheme in SCHEMES},
}
"""All figures, in the order in which they are shown."""


def strata(name: str, rows: Rows) -> tuple[np.ndarray, Mapping[Any, float] | None]:
    """Return the labels and class weights with which `metrics.estimate` takes a figure of FIGURES.

    Queries are drawn evenly from the classes, but accuracy is meant over all labelled synapses. For accuracy, therefore,
    each class weighs as much as it has members.
    """
    if name.startswith("instance"):
        return np.full(len(rows["label"]), None, dtype=object), None
    return rows["label"], None if FIGURES[name].by_class else Counter(rows["label"].tolist())


def measure(rows: Rows, seed: int) -> dict[str, Estimate]:
    """Estimate every figure of FIGURES with its interval."""
    figures = {}
    for name, figure in FIGURES.items():
        labels, weights = strata(name, rows)
        figures[name] = estimate(figure.values(rows), labels, rows["group"], seed, weights)
    return figures


def measure_classes(rows: Rows, seed: int) -> dict[str, dict[str, Estimate]]:
    """Estimate the recall of the vote, mean average precision and precision@10 of each class."""
    values_by_figure = {
        "knn_recall": _vote_is_correct(rows),
        "map": rows["average_precision"],
        "precision_at_10": rows["precision_at_10"],
    }
    return {
        name: {
            figure: estimate(np.where(rows["label"] == name, values, np.nan), rows["label"], rows["group"], seed)
            for figure, values in values_by_figure.items()
        }
        for name in sorted({label for label in rows["label"].tolist() if label is not None})
    }
