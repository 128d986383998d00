"""How good the neighbours are: figures of one encoder from its vectors, with intervals.

In: vectors, classes, neurons and places of the synapses, as arrays. Out: `Estimate`s, and a row per query for comparing
encoders. Guarantees: a query is never answered by a synapse of its own neuron or by a tile that overlaps its own, which
would find the neuron or the place again and not the class; the queries, and so the figures, depend on the data and the
seed, never on the encoder; classes count alike, however rare.

Where a neuron is not known, its own place stands for it: overlapping tiles are no answers, and tiles of one block of
the size of a tile stay together in the bootstrap.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pydantic import Field

from synpipe.analysis.splits import SCHEMES, known
from synpipe.specs import Spec

K = 10  # neighbours that vote, and of precision@10
CONFIDENCE = 0.95
RESAMPLES = 1000  # the ends of a 95 % interval then rest on 25 resamples each
PAIRS = (
    2**20
)  # of a query and a candidate, that are in memory at a time: 70 bytes each, most of them for where tiles begin
RESAMPLED_AT_ONCE = 2**20  # groups × samples of a bootstrap
PROBE_C = (0.01, 0.1, 1.0)  # inverse strengths of the L2 penalty; the validation side chooses


class EvaluationSpec(Spec):
    """How much is measured; more narrows the intervals and takes longer.

    synapses: that are judged at most: of more, a sample is drawn, first of those whose class is known; it bounds memory and
    time. queries: synapses that search for their class, as many of each class as there are up to an even share. places: of which
    altered views must find their original; distractors: other tiles among which. singles: places at which each alteration
    is also tried alone. probe_rows: synapses that a linear probe is fitted to, at most.
    """

    seed: int = Field(0, ge=0)
    synapses: int = Field(100_000, ge=10)
    queries: int = Field(2000, ge=10)
    places: int = Field(256, ge=10)
    distractors: int = Field(1000, ge=10)
    singles: int = Field(64, ge=1)
    probe_rows: int = Field(10_000, ge=100)


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95 % interval; None where there is nothing to take it from."""

    value: float | None
    low: float | None = None
    high: float | None = None


def draw_judged(labels: np.ndarray, spec: EvaluationSpec) -> np.ndarray:
    """Rows that are judged: int64, sorted; all, or `spec.synapses` of them, first of those with a label.

    labels: object (n,), None where not known.
    """
    if len(labels) <= spec.synapses:
        return np.arange(len(labels))
    drawn = np.random.default_rng([spec.seed, 2]).permutation(len(labels))
    unknown = ~known(labels[drawn])
    return np.sort(drawn[np.argsort(unknown, kind="stable")][: spec.synapses])


def draw_queries(labels: np.ndarray, spec: EvaluationSpec) -> np.ndarray:
    """Rows that search: int64, sorted. Of each class the same number at most; where no class is known, of all.

    labels: object (n,), None where not known.
    """
    rng = np.random.default_rng(spec.seed)
    names = sorted({label for label in labels.tolist() if label is not None})
    strata = [np.flatnonzero(labels == name) for name in names] or [np.arange(len(labels))]
    share = -(-spec.queries // len(strata))
    return np.sort(np.concatenate([rng.permutation(rows)[:share] for rows in strata]))


def bootstrap_groups(neurons: np.ndarray, starts_zyx: np.ndarray, window_zyx: Sequence[int]) -> np.ndarray:
    """What is resampled as one: int64 (n,), a number per neuron, and per block of a tile's extent where there is none."""
    blocks = np.floor_divide(starts_zyx, np.array(window_zyx)).tolist()
    keys = [
        ("place", *block) if neuron is None else neuron for neuron, block in zip(neurons.tolist(), blocks, strict=True)
    ]
    number = {key: place for place, key in enumerate(dict.fromkeys(keys))}
    return np.array([number[key] for key in keys], dtype=np.int64)


def same_place(starts: np.ndarray, others: np.ndarray, window_zyx: Sequence[int]) -> np.ndarray:
    """Which windows overlap: bool (n, m), for first voxels int64 (n, 3) and (m, 3)."""
    return (np.abs(starts[:, None] - others[None]) < np.array(window_zyx)).all(axis=2)


@dataclass(frozen=True)
class Neighbours:
    """What each query found, (q,) or (q, K): rows of the nearest, −1 where there are fewer; the class that they vote for;
    average precision and precision@10 of its own class, NaN without a class or without another member of it."""

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
    """Let every query rank the synapses of known class (all, where none is known) by cosine; exact.

    vectors: float32 (n, d) of unit length. labels, neurons: object (n,). queries: rows. Left out are the query itself,
    its neuron, and tiles that overlap its own. The vote counts heads; of equally many the nearer ones win.
    """
    names, codes = _codes(labels)
    _, neuron_codes = _codes(neurons)
    of_class = np.flatnonzero(codes >= 0)
    candidates = of_class if len(of_class) else np.arange(len(labels))
    nearest = np.full((len(queries), K), -1, dtype=np.int64)
    votes = np.zeros((len(queries), max(1, len(names))))
    average_precision, precision = np.full(len(queries), np.nan), np.full(len(queries), np.nan)
    block_rows = max(1, PAIRS // max(1, len(candidates)))
    for first in range(0, len(queries), block_rows):
        block = queries[first : first + block_rows]
        similarity = vectors[block] @ vectors[candidates].T
        own = (neuron_codes[block][:, None] == neuron_codes[candidates][None]) & (neuron_codes[block] >= 0)[:, None]
        out = own | same_place(starts_zyx[block], starts_zyx[candidates], window_zyx)
        similarity[out] = -np.inf
        order = np.argsort(-similarity, axis=1, kind="stable")
        left = (~out).sum(axis=1)
        for place, row in enumerate(block.tolist(), start=first):
            ranked = candidates[order[place - first, : left[place - first]]]
            best = ranked[:K]
            nearest[place, : len(best)] = best
            if len(names):
                # A place adds less than a head all together: Σ (K − r) / K² < 1 for K ≥ 2.
                np.add.at(votes[place], codes[best], 1 + (K - 1 - np.arange(len(best))) / K**2)
            if codes[row] >= 0:
                average_precision[place], precision[place] = _precisions(codes[ranked] == codes[row])
    voted = np.array([*(names[code] for code in votes.argmax(axis=1)), None] if names else [None] * (len(queries) + 1))
    voted = voted.astype(object)[:-1]
    voted[nearest[:, 0] < 0] = None
    return Neighbours(queries, nearest, voted, average_precision, precision)


def _precisions(relevant: np.ndarray) -> tuple[float, float]:
    """Average precision and precision@10 of a ranking, bool (n,); NaN where nothing in it is relevant.

    Average precision is the mean, over the relevant, of the precision at their rank (Manning, Raghavan & Schütze,
    Introduction to Information Retrieval, 2008, section 8.4).
    """
    ranks = np.flatnonzero(relevant)
    if not len(ranks):
        return np.nan, np.nan
    return float(np.mean(np.arange(1, len(ranks) + 1) / (ranks + 1))), float(relevant[:K].mean())


def _codes(values: np.ndarray) -> tuple[list, np.ndarray]:
    """Distinct values, sorted, and the number of each row's: int64 (n,), −1 for None."""
    names = sorted({value for value in values.tolist() if value is not None})
    number = {name: place for place, name in enumerate(names)}
    return names, np.array([number.get(value, -1) for value in values.tolist()], dtype=np.int64)


def resample(
    values: np.ndarray,
    labels: np.ndarray,
    groups: np.ndarray,
    seed: int = 0,
    weights: Mapping[Any, float] | None = None,
) -> tuple[float | None, np.ndarray]:
    """Mean of a figure over its classes, and the same of `RESAMPLES` bootstrap samples of whole groups.

    values: float (n,), NaN counts as absent. labels: object (n,), None being a class as good as any. groups: int64 (n,).
    weights: of the classes; by default they count alike. Groups are drawn with replacement (the cluster bootstrap: Davison
    & Hinkley, Bootstrap Methods and their Application, 1997, section 3.8); a class that a sample lacks is left out of its
    mean. Two figures that are absent in the same rows are given the same samples, so that they can be compared in pairs.
    """
    there = ~np.isnan(values)
    if not there.any():
        return None, np.full(RESAMPLES, np.nan)
    values, labels = values[there], labels[there]
    names, group_codes = np.unique(groups[there], return_inverse=True)
    classes = sorted({*labels.tolist()}, key=str)
    number = {name: place for place, name in enumerate(classes)}
    class_codes = np.array([number[label] for label in labels.tolist()])
    totals, numbers = np.zeros((2, len(names), len(classes)))
    np.add.at(totals, (group_codes, class_codes), values)
    np.add.at(numbers, (group_codes, class_codes), 1)
    class_weights = np.array([1.0 if weights is None else weights[name] for name in classes])
    value = _mean(totals.sum(axis=0, keepdims=True), numbers.sum(axis=0, keepdims=True), class_weights)[0]
    random, shares = np.random.default_rng(seed), np.full(len(names), 1 / len(names))
    at_once, samples = max(1, RESAMPLED_AT_ONCE // len(names)), []
    for first in range(0, RESAMPLES, at_once):
        drawn = random.multinomial(len(names), shares, min(at_once, RESAMPLES - first))
        samples.append(_mean(drawn @ totals, drawn @ numbers, class_weights))
    return float(value), np.concatenate(samples)


def _mean(totals: np.ndarray, numbers: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Weighted mean over classes of totals ÷ numbers, both (b, c): float (b,), NaN where every class is absent."""
    there = numbers > 0
    means = np.divide(totals, numbers, out=np.zeros_like(totals, dtype=float), where=there)
    total = (there * weights).sum(axis=1)
    return np.divide((means * weights).sum(axis=1), total, out=np.full(len(total), np.nan), where=total > 0)


def estimate(
    values: np.ndarray,
    labels: np.ndarray,
    groups: np.ndarray,
    seed: int = 0,
    weights: Mapping[Any, float] | None = None,
) -> Estimate:
    """`resample` as a figure with its percentile interval; without one where fewer than two groups have a value."""
    value, samples = resample(values, labels, groups, seed, weights)
    several = len(np.unique(groups[~np.isnan(values)])) > 1
    return Estimate(value, *interval(samples)) if several else Estimate(value)


def interval(samples: np.ndarray) -> tuple[float | None, float | None]:
    """Percentile interval of bootstrap samples (b,)."""
    samples = samples[~np.isnan(samples)]
    if not len(samples):
        return None, None
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(samples, [tail, 100 - tail])
    return float(low), float(high)


def probe(
    vectors: np.ndarray, labels: np.ndarray, sides: np.ndarray, spec: EvaluationSpec
) -> tuple[np.ndarray, np.ndarray] | None:
    """A linear probe: multinomial logistic regression on standardised vectors, classes weighted alike.

    labels: object (n,); sides: object (n,) of `splits.SIDES`, others left out. The strength of the penalty is the one that
    does best on the validation side. Returns the test rows and whether each was right, bool; None where fewer than two
    classes can be trained on, or nothing tested on.
    """
    # Sklearn takes a second to import.
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    train, validation, test = (np.flatnonzero(sides == side) for side in ("train", "validation", "test"))
    if len({*labels[train]}) < 2 or not len(test):
        return None
    train = np.sort(np.random.default_rng(spec.seed).permutation(train)[: spec.probe_rows])
    validation = validation[np.isin(labels[validation].astype(str), [*{*labels[train].tolist()}])]
    truth = labels[validation].astype(str)
    fitted = []
    for c in PROBE_C if len(validation) else PROBE_C[1:2]:
        model = make_pipeline(
            StandardScaler(), LogisticRegression(C=c, class_weight="balanced", max_iter=500, tol=1e-3)
        ).fit(vectors[train], labels[train].astype(str))
        hits = model.predict(vectors[validation]) == truth if len(validation) else np.zeros(0)
        balanced = sum(hits[truth == name].mean() for name in np.unique(truth))
        fitted.append((balanced, -c, model))
    best = max(fitted, key=lambda entry: entry[:2])[2]
    return test, best.predict(vectors[test]) == labels[test].astype(str)


Rows = Mapping[str, np.ndarray]
"""Columns of what the queries of an encoder found, n rows each, one per synapse with a tile: `label`, `voted` object;
`group` int64; `average_precision`, `precision_at_10`, `instance_rank`, `probe_<scheme>` (1 where right) float, NaN where
absent."""


@dataclass(frozen=True)
class Figure:
    """A figure of an encoder. values: of each row, NaN where absent. by_class: whether classes count alike, or all rows."""

    title: str
    values: Callable[[Rows], np.ndarray]
    by_class: bool = True


def _right(rows: Rows) -> np.ndarray:
    answered = np.array([a is not None and b is not None for a, b in zip(rows["label"], rows["voted"], strict=True)])
    return np.where(answered, rows["label"] == rows["voted"], np.nan)


def _column(name: str) -> Callable[[Rows], np.ndarray]:
    return lambda rows: rows[name]


def _within(k: int) -> Callable[[Rows], np.ndarray]:
    return lambda rows: np.where(np.isnan(rows["instance_rank"]), np.nan, rows["instance_rank"] <= k)


FIGURES = {
    "instance_recall_at_1": Figure("instance recall@1", _within(1), by_class=False),
    "instance_recall_at_5": Figure("instance recall@5", _within(5), by_class=False),
    "knn_balanced_accuracy": Figure("kNN balanced accuracy", _right),
    "knn_accuracy": Figure("kNN accuracy", _right, by_class=False),
    "map": Figure("mean average precision", _column("average_precision")),
    "precision_at_10": Figure("precision@10", _column("precision_at_10")),
    **{f"probe_{scheme}": Figure(f"linear probe, split by {scheme}", _column(f"probe_{scheme}")) for scheme in SCHEMES},
}
"""In the order in which they are shown."""


def strata(name: str, rows: Rows) -> tuple[np.ndarray, Mapping[Any, float] | None]:
    """Labels and weights with which `estimate` takes a figure of FIGURES.

    Accuracy is that of all synapses of known class, although the queries are an even draw: each class weighs as much as
    it has members.
    """
    if name.startswith("instance"):
        return np.full(len(rows["label"]), None, dtype=object), None
    return rows["label"], None if FIGURES[name].by_class else Counter(rows["label"].tolist())


def measure(rows: Rows, seed: int) -> dict[str, Estimate]:
    """Every figure of FIGURES, with its interval."""
    found = {}
    for name, figure in FIGURES.items():
        labels, weights = strata(name, rows)
        found[name] = estimate(figure.values(rows), labels, rows["group"], seed, weights)
    return found


def measure_classes(rows: Rows, seed: int) -> dict[str, dict[str, Estimate]]:
    """Recall of the vote, mean average precision and precision@10 of each class."""
    figures = {"knn_recall": _right(rows), "map": rows["average_precision"], "precision_at_10": rows["precision_at_10"]}
    return {
        name: {
            figure: estimate(np.where(rows["label"] == name, values, np.nan), rows["label"], rows["group"], seed)
            for figure, values in figures.items()
        }
        for name in sorted({label for label in rows["label"].tolist() if label is not None})
    }
