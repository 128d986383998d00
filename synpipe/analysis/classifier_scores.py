"""How good predictions are, per synapse and per neuron, and the vote of a neuron's synapses.

In: a predictions table (`PREDICTIONS`). Out: votes (`VOTES`), and figures of the test side, with intervals, beside those
that were published. Guarantee: a figure is of synapses on the test side alone, and a neuron's of its synapses there.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from synpipe.analysis.evaluation import Estimate, estimate
from synpipe.analysis.splits import GUARD, SIDES, TEST

PREDICTIONS = pa.schema(
    [
        pa.field("synapse_id", pa.int64(), nullable=False),
        pa.field("neuron_id", pa.int64()),
        pa.field("split", pa.string()),  # side on which the synapse stood; null: it had no part in it
        pa.field("neurotransmitter", pa.string()),  # known
        pa.field("predicted_neurotransmitter", pa.string()),  # null: nothing could be learned
        pa.field("predicted_probability", pa.float32()),  # of that class
        pa.field("class_probabilities", pa.list_(pa.float32())),  # in the order of the data set's classes
    ]
)
VOTES = pa.schema(
    [
        pa.field("neuron_id", pa.int64(), nullable=False),
        pa.field("synapses", pa.int64(), nullable=False),
        pa.field("split", pa.string()),  # where all of its synapses that have a side have the same
        pa.field("neurotransmitter", pa.string()),  # known, of most of its synapses
        pa.field("predicted_neurotransmitter", pa.string()),
        pa.field("vote_share", pa.float32()),  # synapses that voted for it
        pa.field("confidence", pa.float32()),  # mean probability of it over the synapses
        pa.field("class_probabilities", pa.list_(pa.float32())),  # mean over the synapses
    ]
)

SIDE_NAMES = (*SIDES, GUARD)
MERGED_ROWS = 2**16  # neurons of single shards that wait to be added to those of all

# Recall per class, for results to be held against.
PUBLISHED = {
    "Eckstein et al. 2024": {  # Cell 187; FAFB, 3-D network, neurons not seen in training
        "acetylcholine": 0.98,
        "gaba": 0.96,
        "glutamate": 0.75,
        "dopamine": 0.83,
        "serotonin": 0.88,
        "octopamine": 0.71,
    },
    "SynOminous, random split": {  # the same data, 2-D network; neurons stand on both sides, which flatters
        "acetylcholine": 0.96,
        "gaba": 0.95,
        "glutamate": 0.90,
        "dopamine": 0.95,
        "serotonin": 0.95,
        "octopamine": 0.88,
    },
}


def predictions_table(
    synapses: pa.Table, sides: pa.Array | pa.ChunkedArray, probabilities: np.ndarray | None, classes: Sequence[str]
) -> pa.Table:
    """synapses: `synapse_id`, `neuron_id`, `neurotransmitter`. sides: string (n,). probabilities: float32 (n, classes), None
    where there is no classifier. Returns `PREDICTIONS`."""
    columns = {name: synapses[name] for name in ("synapse_id", "neuron_id", "neurotransmitter")} | {"split": sides}
    if probabilities is not None:
        best = probabilities.argmax(axis=1)
        offsets = np.arange(len(best) + 1, dtype=np.int32) * len(classes)
        columns |= {
            "predicted_neurotransmitter": pa.array(classes, pa.string()).take(pa.array(best)),
            "predicted_probability": pa.array(probabilities[np.arange(len(best)), best]),
            "class_probabilities": pa.ListArray.from_arrays(pa.array(offsets), pa.array(probabilities.ravel())),
        }
    arrays = [columns.get(field.name, pa.nulls(len(synapses), field.type)) for field in PREDICTIONS]
    return pa.table(arrays, names=PREDICTIONS.names).cast(PREDICTIONS)


def read_probabilities(predictions: pa.Table) -> np.ndarray:
    """float32 (n, classes) of a table in which every row has a prediction."""
    return pc.list_flatten(predictions["class_probabilities"]).to_numpy().reshape(len(predictions), -1)


def votes_of_neurons(predictions: pa.Table, classes: Sequence[str]) -> pa.Table:
    """The votes of the neurons of one table; see `NeuronVotes`."""
    votes = NeuronVotes(classes)
    votes.add(predictions)
    return votes.table()


class NeuronVotes:
    """The vote of every known neuron: the majority of its synapses, as in Eckstein et al. (Cell 2024); of classes with
    equally many votes that of the highest mean probability. Memory grows with the neurons, not with their synapses.
    """

    def __init__(self, classes: Sequence[str]):
        self._classes = classes
        # By neuron, ids ascending: bits of the sides, then synapses, and by class the sum of probabilities, votes, known ones.
        self._ids, self._sides = np.zeros(0, np.int64), np.zeros(0, np.int64)
        self._sums = np.zeros((0, 1 + 3 * len(classes)))
        self._added: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []

    def add(self, predictions: pa.Table) -> None:
        """predictions: `PREDICTIONS`, with a prediction in every row."""
        known = predictions.filter(pc.is_valid(predictions["neuron_id"]))
        if not len(known):
            return
        probabilities, count = read_probabilities(known), len(self._classes)
        truth = codes_of(known["neurotransmitter"], self._classes)
        sums = np.zeros((len(known), 1 + 3 * count))
        sums[:, 0], sums[:, 1 : 1 + count] = 1, probabilities
        rows = np.arange(len(known))
        sums[rows, 1 + count + probabilities.argmax(axis=1)] = 1
        sums[rows[truth >= 0], 1 + 2 * count + truth[truth >= 0]] = 1
        sides = codes_of(known["split"], SIDE_NAMES)
        self._added.append(
            _summed(known["neuron_id"].to_numpy(), np.where(sides < 0, 0, 1 << np.maximum(sides, 0)), sums)
        )
        if sum(len(ids) for ids, _, _ in self._added) > max(len(self._ids), MERGED_ROWS):
            self._merge()

    def _merge(self) -> None:
        parts = zip((self._ids, self._sides, self._sums), *self._added, strict=True)
        self._ids, self._sides, self._sums = _summed(*(np.concatenate(part) for part in parts))
        self._added = []

    def table(self) -> pa.Table:
        """`VOTES`, sorted by id."""
        self._merge()
        count, synapses = len(self._classes), self._sums[:, 0]
        mean, counted, truth = np.split(self._sums[:, 1:], [count, 2 * count], axis=1)
        mean = mean / np.maximum(synapses, 1)[:, None]
        rows = np.arange(len(self._ids))
        chosen = np.argmax(counted + mean / 2, axis=1) if len(rows) else np.empty(0, np.int64)
        names = pa.array(self._classes, pa.string())
        # The side of a neuron that has one: of a power of two the place of its bit.
        one_side = (self._sides > 0) & (self._sides & (self._sides - 1) == 0)
        side = np.log2(np.maximum(self._sides, 1)).astype(np.int64)
        return pa.table(
            {
                "neuron_id": self._ids,
                "synapses": synapses.astype(np.int64),
                "split": pa.array(SIDE_NAMES, pa.string()).take(pa.array(side, mask=~one_side)),
                "neurotransmitter": names.take(pa.array(truth.argmax(axis=1), mask=truth.sum(axis=1) == 0)),
                "predicted_neurotransmitter": names.take(pa.array(chosen)),
                "vote_share": counted[rows, chosen] / np.maximum(synapses, 1),
                "confidence": mean[rows, chosen],
                "class_probabilities": pa.array(list(mean.astype(np.float32)), pa.list_(pa.float32())),
            }
        ).cast(VOTES)


def _summed(ids: np.ndarray, bits: np.ndarray, sums: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Distinct ids, ascending, with their bits together and their sums (n, k)."""
    distinct, places = np.unique(ids, return_inverse=True)
    all_bits, totals = np.zeros(len(distinct), np.int64), np.zeros((len(distinct), sums.shape[1]))
    np.bitwise_or.at(all_bits, places, bits)
    np.add.at(totals, places, sums)
    return distinct, all_bits, totals


def score_test_side(parts: Iterable[pa.Table], classes: Sequence[str]) -> dict[str, Any]:
    """Figures of the test side, for people and for JSON; an empty mapping where no synapse stands there.

    parts: of `PREDICTIONS`. `balanced_accuracy`, `neuron_balanced_accuracy` with `_low` and `_high`; `accuracy`,
    `neuron_accuracy`; `recalls`, a mapping per class; `confusion`, counts with a row per true class. Intervals are those of
    `evaluation.estimate`, which draws neurons, not synapses; of a class with one neuron there is none. Of a synapse of the
    test side ten bytes are in memory.
    """
    neurons, tested = NeuronVotes(classes), []
    for part in parts:
        test = part.filter(pc.fill_null(pc.equal(part["split"], TEST), False))
        test = test.filter(pc.is_valid(test["neurotransmitter"]))
        neurons.add(test)
        # A synapse of no known neuron is drawn by itself.
        groups = pc.coalesce(test["neuron_id"], pc.negate(test["synapse_id"])).to_numpy()
        tested.append((*_truth_and_prediction(test, classes), groups))
    columns = [np.concatenate(column) for column in zip(*tested, strict=True)] if tested else [np.zeros(0)]
    if not len(columns[0]):
        return {}
    votes = neurons.table()
    figures: dict[str, Any] = {}
    recalls: dict[str, dict[str, Any]] = {}
    confusion: dict[str, Any] = {"classes": list(classes)}
    of_neurons = (*_truth_and_prediction(votes, classes), votes["neuron_id"].to_numpy())
    for unit, prefix, (truth, predicted, drawn) in (("synapses", "", columns), ("neurons", "neuron_", of_neurons)):
        labels = np.array(classes, dtype=object)[truth]
        right = (truth == predicted).astype(float)
        confusion[unit] = _counted(truth, predicted, (len(classes), len(classes))).astype(int).tolist()
        figures |= _told(f"{prefix}balanced_accuracy", estimate(right, labels, drawn))
        figures[f"{prefix}accuracy"] = _round(float(right.mean())) if len(right) else None
        for code, name in enumerate(classes):
            rows = np.flatnonzero(truth == code)
            if len(rows):
                counted = {f"{prefix or 'synapse_'}count": len(rows)}
                of_class = _told(f"{prefix}recall", estimate(right[rows], labels[rows], drawn[rows]))
                recalls[name] = recalls.get(name, {}) | counted | of_class
    return figures | {"recalls": recalls, "confusion": confusion}


def _truth_and_prediction(table: pa.Table, classes: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the known and of the predicted class of each row, all of them known: int8 (n,)."""
    truth, predicted = (codes_of(table[name], classes) for name in ("neurotransmitter", "predicted_neurotransmitter"))
    return truth.astype(np.int8), predicted.astype(np.int8)


def few_neurons(recalls: Mapping[str, Mapping[str, Any]], fewest: int = 3) -> list[str]:
    """Sentences on classes whose figures rest on fewer than `fewest` neurons of the test side."""
    few = [f"{name} ({found.get('neuron_count', 0)})" for name, found in recalls.items()]
    few = [text for text, found in zip(few, recalls.values(), strict=True) if found.get("neuron_count", 0) < fewest]
    if not few:
        return []
    return [f"Fewer than {fewest} test neurons: {', '.join(few)}. Intervals over neurons say little of these classes."]


def codes_of(names: pa.ChunkedArray | pa.Array, classes: Sequence[str]) -> np.ndarray:
    """Number of each name in `classes`, int64 (n,); −1 for null."""
    found = pc.index_in(names, value_set=pa.array(classes, pa.string()))
    return pc.fill_null(found, -1).to_numpy(zero_copy_only=False).astype(np.int64)


def _counted(rows: np.ndarray, columns: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    counts = np.zeros(shape)
    valid = columns >= 0
    np.add.at(counts, (rows[valid], columns[valid]), 1)
    return counts


def _told(name: str, found: Estimate) -> dict[str, float | None]:
    return {name: _round(found.value), f"{name}_low": _round(found.low), f"{name}_high": _round(found.high)}


def _round(value: float | None) -> float | None:
    return None if value is None else round(value, 4)
