"""Arrange the figures of a classifier as tables for people.

Input: the figures that `classifier_scores.score_test_side` returns. Outputs: headers and rows for `text.format_table`.
"""

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from synpipe.analysis.classifier_scores import PUBLISHED
from synpipe.analysis.metrics import row_shares

Unit = Literal["synapses", "neurons"]
Table = tuple[list[str], list[list[Any]]]
"""Headers, and rows with a cell per header."""


def recall_table(figures: Mapping[str, Any]) -> Table:
    """Return a row per class of the test side and a row of means.

    Published recalls stand beside them, if a publication has a class of the same name.
    """
    recalls = {name: figures["recalls"][name] for name in figures["confusion"]["classes"] if name in figures["recalls"]}
    published = {title: values for title, values in PUBLISHED.items() if recalls.keys() & values.keys()}
    rows: list[list[Any]] = []
    for name, recall in recalls.items():
        synapses, neurons = (recall.get(key, 0) for key in ("synapse_count", "neuron_count"))
        intervals = format_interval(recall, "recall"), format_interval(recall, "neuron_recall")
        others = [_format(values.get(name)) for values in published.values()]
        rows.append([name, synapses, intervals[0], neurons, intervals[1], *others])
    totals = [sum(recall.get(key, 0) for recall in recalls.values()) for key in ("synapse_count", "neuron_count")]
    means = [format_interval(figures, key) for key in ("balanced_accuracy", "neuron_balanced_accuracy")]
    others = [_format(float(np.mean(list(values.values())))) for values in published.values()]
    rows.append(["mean (balanced accuracy)", totals[0], means[0], totals[1], means[1], *others])
    return ["class", "synapses", "recall", "neurons", "recall of the vote", *published], rows


def confusion_table(figures: Mapping[str, Any], unit: Unit = "synapses") -> Table:
    """Return a row per true class that occurs: its number of synapses or neurons, and the share predicted as each class."""
    classes, counts = read_confusion(figures, unit)
    rows = [
        [name, int(total), *map(_format, shares)]
        for name, total, shares in zip(classes, counts.sum(axis=1), row_shares(counts).tolist(), strict=True)
        if total
    ]
    return ["true / predicted", unit, *classes], rows


def read_confusion(figures: Mapping[str, Any], unit: Unit) -> tuple[list[str], np.ndarray]:
    """Return the classes, and the counts by true (row) and predicted class: int64 (classes, classes)."""
    return figures["confusion"]["classes"], np.array(figures["confusion"][unit])


def format_interval(figures: Mapping[str, Any], name: str) -> str:
    """Format a figure with its interval, if it has one. A figure that is absent becomes an empty string."""
    value, low, high = (figures.get(key) for key in (name, f"{name}_low", f"{name}_high"))
    if value is None:
        return ""
    return _format(value) if low is None else f"{_format(value)} ({_format(low)}–{_format(high)})"


def _format(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"
