"""Score predictions per synapse and per neuron, and let the synapses of a neuron vote.

Input: a predictions table (`PREDICTIONS`), in parts. Outputs: a table of votes (`VOTES`), and figures of the test side with
their intervals. Figures count synapses of the test side only; the figures of a neuron count its synapses on that side.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from synpipe.analysis.metrics import Estimate, confusion_matrix, estimate
from synpipe.analysis.splits import GUARD, SIDES, TEST

PREDICTIONS = pa.schema(
    [
        pa.field("synapse_id", pa.int64(), nullable=False),
        pa.field("neuron_id", pa.int64()),
        pa.field("split", pa.string()),  # side of the split; null where the synapse has no side
        pa.field("neurotransmitter", pa.string()),  # annotated class
        pa.field("predicted_neurotransmitter", pa.string()),  # null where nothing could be learned
        pa.field("predicted_probability", pa.float32()),  # probability of the predicted class
        pa.field("class_probabilities", pa.list_(pa.float32())),  # in the order of the data set's classes
    ]
)
VOTES = pa.schema(
    [
        pa.field("neuron_id", pa.int64(), nullable=False),
        pa.field("synapses", pa.int64(), nullable=False),
        pa.field("split", pa.string()),  # the side of the neuron's synapses; null where they have several sides or none
        pa.field("neurotransmitter", pa.string()),  # annotated class of most of its synapses
        pa.field("predicted_neurotransmitter", pa.string()),
        pa.field("vote_share", pa.float32()),  # share of its synapses that voted for the predicted class
        pa.field("confidence", pa.float32()),  # mean probability of the predicted class over its synapses
        pa.field("class_probabilities", pa.list_(pa.float32())),  # mean over its synapses
    ]
)

SIDE_NAMES = (*SIDES, GUARD)
MERGED_ROWS = 2**16  # rows of per-part sums that are collected before they are merged into the totals

# Published recall per class, shown beside the figures of a classifier.
PUBLISHED = {
    "Eckstein et al. 2024": {  # Cell 187; FAFB, 3-D network, neurons that were not seen in training
        "acetylcholine": 0.98,
        "gaba": 0.96,
        "glutamate": 0.75,
        "dopamine": 0.83,
        "serotonin": 0.88,
        "octopamine": 0.71,
    },
    "SynOminous, random split": {  # the same data, 2-D network; neurons occur on both sides, which inflates recall
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
    """Build a table of `PREDICTIONS`.

    synapses: `synapse_id`, `neuron_id`, `neurotransmitter`. sides: string (n,), null where a synapse has no side.
    probabilities: float32 (n, classes); None where there is no classifier.
    """
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
    """Return the class probabilities, float32 (n, classes), of a table in which every row has a prediction."""
    return pc.list_flatten(predictions["class_probabilities"]).to_numpy().reshape(len(predictions), -1)


def votes_of_neurons(predictions: pa.Table, classes: Sequence[str]) -> pa.Table:
    """Return the votes of the neurons of one table; see `NeuronVotes`."""
    votes = NeuronVotes(classes)
    votes.add(predictions)
    return votes.table()


class NeuronVotes:
    """Collects the vote of every known neuron from parts of a predictions table.

    The majority of a neuron's synapses decides, as in Eckstein et al. (Cell 2024). If several classes have the same number
    of votes, the one with the highest mean probability wins. Memory grows with the number of neurons, not of synapses.
    """

    def __init__(self, classes: Sequence[str]):
        self._classes = classes
        # One row per neuron, ids ascending. `_sides` has a bit per side. `_sums` holds the number of synapses and then, for
        # each class, the sum of probabilities, the number of votes and the number of annotated synapses.
        self._ids, self._sides = np.zeros(0, np.int64), np.zeros(0, np.int64)
        self._sums = np.zeros((0, 1 + 3 * len(classes)))
        self._added: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []

    def add(self, predictions: pa.Table) -> None:
        """Add a table of `PREDICTIONS` in which every row has a prediction."""
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
        """Return a table of `VOTES`, sorted by neuron id."""
        self._merge()
        count, synapses = len(self._classes), self._sums[:, 0]
        mean, counted, truth = np.split(self._sums[:, 1:], [count, 2 * count], axis=1)
        mean = mean / np.maximum(synapses, 1)[:, None]
        rows = np.arange(len(self._ids))
        chosen = np.argmax(counted + mean / 2, axis=1) if len(rows) else np.empty(0, np.int64)
        names = pa.array(self._classes, pa.string())
        # A neuron has one side if exactly one bit is set; the position of that bit is the code of the side.
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
    """Group rows by id: distinct ids (ascending), bits combined with OR, and sums added up, (ids, k)."""
    distinct, places = np.unique(ids, return_inverse=True)
    all_bits, totals = np.zeros(len(distinct), np.int64), np.zeros((len(distinct), sums.shape[1]))
    np.bitwise_or.at(all_bits, places, bits)
    np.add.at(totals, places, sums)
    return distinct, all_bits, totals


def score_test_side(parts: Iterable[pa.Table], classes: Sequence[str]) -> dict[str, Any]:
    """Score the labelled synapses of the test side; returns an empty mapping if there are none.

    parts: tables of `PREDICTIONS`. The result can be written as JSON:
    `balanced_accuracy` and `neuron_balanced_accuracy`, each with `_low` and `_high`; `accuracy` and `neuron_accuracy`;
    `recalls`, a mapping per class; `confusion`, counts with a row per true class.
    Intervals are those of `metrics.estimate`, which resamples neurons and not synapses; a class with one neuron has no
    interval. Ten bytes per synapse of the test side are kept in memory.
    """
    votes, columns = _read_test_side(parts, classes)
    truth, predicted, groups = columns
    if not len(truth):
        return {}
    neurons = votes.table()
    neuron_truth, neuron_predicted = _class_codes(neurons, classes)
    synapse_figures, synapse_recalls, synapse_confusion = _score(truth, predicted, groups, classes, "")
    neuron_figures, neuron_recalls, neuron_confusion = _score(
        neuron_truth, neuron_predicted, neurons["neuron_id"].to_numpy(), classes, "neuron_"
    )
    recalls = {name: found | neuron_recalls.get(name, {}) for name, found in synapse_recalls.items()}
    confusion = {"classes": list(classes), "synapses": synapse_confusion, "neurons": neuron_confusion}
    return synapse_figures | neuron_figures | {"recalls": recalls, "confusion": confusion}


def _read_test_side(
    parts: Iterable[pa.Table], classes: Sequence[str]
) -> tuple[NeuronVotes, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Votes of the neurons of the test side, and of its labelled synapses the true class, predicted class and group."""
    votes, collected = NeuronVotes(classes), [(np.zeros(0, np.int8), np.zeros(0, np.int8), np.zeros(0, np.int64))]
    for part in parts:
        test = part.filter(pc.fill_null(pc.equal(part["split"], TEST), False))
        test = test.filter(pc.is_valid(test["neurotransmitter"]))
        votes.add(test)
        # A synapse without a known neuron is a group of its own.
        groups = pc.coalesce(test["neuron_id"], pc.negate(test["synapse_id"])).to_numpy()
        collected.append((*_class_codes(test, classes), groups))
    truth, predicted, groups = (np.concatenate(column) for column in zip(*collected, strict=True))
    return votes, (truth, predicted, groups)


def _score(
    truth: np.ndarray, predicted: np.ndarray, groups: np.ndarray, classes: Sequence[str], prefix: str
) -> tuple[dict[str, Any], dict[str, dict[str, Any]], list[list[int]]]:
    """Figures, recall of each class that occurs, and confusion counts. truth, predicted: int8 (n,). groups: int64 (n,)."""
    labels = np.array(classes, dtype=object)[truth]
    correct = (truth == predicted).astype(float)
    figures: dict[str, Any] = _rounded(f"{prefix}balanced_accuracy", estimate(correct, labels, groups))
    figures[f"{prefix}accuracy"] = _round(float(correct.mean())) if len(correct) else None
    recalls = {}
    for code, name in enumerate(classes):
        rows = np.flatnonzero(truth == code)
        if len(rows):
            recall = _rounded(f"{prefix}recall", estimate(correct[rows], labels[rows], groups[rows]))
            recalls[name] = {f"{prefix or 'synapse_'}count": len(rows)} | recall
    return figures, recalls, confusion_matrix(truth, predicted, len(classes)).tolist()


def _class_codes(table: pa.Table, classes: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Codes of the annotated and of the predicted class of each row, neither of which is null: int8 (n,)."""
    truth, predicted = (codes_of(table[name], classes) for name in ("neurotransmitter", "predicted_neurotransmitter"))
    return truth.astype(np.int8), predicted.astype(np.int8)


def few_neurons(recalls: Mapping[str, Mapping[str, Any]], fewest: int = 3) -> list[str]:
    """Return a sentence that names the classes with fewer than `fewest` neurons on the test side, or nothing."""
    counts = {name: figures.get("neuron_count", 0) for name, figures in recalls.items()}
    few = [f"{name} ({count})" for name, count in counts.items() if count < fewest]
    if not few:
        return []
    return [
        f"Fewer than {fewest} test neurons: {', '.join(few)}. Intervals over neurons say little about these classes."
    ]


def codes_of(names: pa.ChunkedArray | pa.Array, classes: Sequence[str]) -> np.ndarray:
    """Return the class code of each name: int64 (n,), the position of the name in `classes`, or −1 for null."""
    codes = pc.index_in(names, value_set=pa.array(classes, pa.string()))
    return pc.fill_null(codes, -1).to_numpy(zero_copy_only=False).astype(np.int64)


def _rounded(name: str, figure: Estimate) -> dict[str, float | None]:
    return {name: _round(figure.value), f"{name}_low": _round(figure.low), f"{name}_high": _round(figure.high)}


def _round(value: float | None) -> float | None:
    return None if value is None else round(value, 4)
