"""A classifier's figures for people: a table per class beside what was published, the confusion matrix, a picture of it.

In: figures as `classifier_scores.score_test_side` gives them. Out: rows of text, the first being the head; a PIL image.
"""

import io
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from PIL import Image

from synpipe.analysis.classifier_scores import PUBLISHED

Unit = Literal["synapses", "neurons"]


def recall_rows(figures: Mapping[str, Any]) -> list[list[str]]:
    """A row per class of the test side and one of means; published recalls where a class has its name."""
    recalls = {name: figures["recalls"][name] for name in figures["confusion"]["classes"] if name in figures["recalls"]}
    published = {title: found for title, found in PUBLISHED.items() if recalls.keys() & found.keys()}
    rows = [["class", "synapses", "recall", "neurons", "recall of the vote", *published]]
    for name, found in recalls.items():
        shown = [_number(others.get(name)) for others in published.values()]
        counts = [f"{found.get(key, 0):,}" for key in ("synapse_count", "neuron_count")]
        rows.append(
            [name, counts[0], interval_text(found, "recall"), counts[1], interval_text(found, "neuron_recall"), *shown]
        )
    means = [_number(float(np.mean(list(others.values())))) for others in published.values()]
    totals = [f"{sum(found.get(key, 0) for found in recalls.values()):,}" for key in ("synapse_count", "neuron_count")]
    mean, of_votes = interval_text(figures, "balanced_accuracy"), interval_text(figures, "neuron_balanced_accuracy")
    return [*rows, ["mean (balanced accuracy)", totals[0], mean, totals[1], of_votes, *means]]


def confusion_rows(figures: Mapping[str, Any], unit: Unit = "synapses") -> list[list[str]]:
    """A row per true class that is there: its number, then the share that was predicted as each class."""
    classes, counts = _matrix(figures, unit)
    rows = [["true / predicted", unit, *classes]]
    for name, row in zip(classes, counts, strict=True):
        if row.sum():
            rows.append([name, f"{int(row.sum()):,}", *(_number(float(share)) for share in row / row.sum())])
    return rows


def confusion_picture(figures: Mapping[str, Any], title: str) -> Image.Image:
    """Both confusion matrices, per synapse and per neuron, normalised by row."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    units: tuple[Unit, ...] = ("synapses", "neurons")
    figure = Figure(figsize=(11, 5.2), dpi=100, layout="constrained")
    figure.suptitle(title, fontsize=11)
    for unit, axes in zip(units, figure.subplots(1, len(units)), strict=True):
        classes, counts = _matrix(figures, unit)
        totals = counts.sum(axis=1)
        shares = counts / np.maximum(totals, 1)[:, None]
        axes.imshow(np.where(totals[:, None] > 0, shares, np.nan), cmap="Blues", vmin=0, vmax=1)
        for row, column in np.ndindex(shares.shape):
            if totals[row]:
                colour = "white" if shares[row, column] > 0.5 else "black"
                axes.text(column, row, f"{shares[row, column]:.2f}", ha="center", va="center", color=colour, fontsize=8)
        labels = [f"{name} ({int(total):,})" for name, total in zip(classes, totals, strict=True)]
        axes.set_xticks(range(len(classes)), classes, rotation=40, ha="right", fontsize=8)
        axes.set_yticks(range(len(classes)), labels, fontsize=8)
        name = "balanced_accuracy" if unit == "synapses" else "neuron_balanced_accuracy"
        axes.set_title(f"{unit}: balanced accuracy {interval_text(figures, name)}", fontsize=9)
        axes.set_xlabel("predicted", fontsize=8)
    canvas, buffer = FigureCanvasAgg(figure), io.BytesIO()
    canvas.print_png(buffer)
    return Image.open(buffer).convert("RGB")


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows in columns for a terminal: the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        cells = (cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))
        lines.append("  ".join([first.ljust(widths[0]), *cells]).rstrip())
    return "\n".join(lines)


def markdown(rows: Sequence[Sequence[str]]) -> str:
    head, *body = rows
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, rule, *body])


def _matrix(figures: Mapping[str, Any], unit: Unit) -> tuple[list[str], np.ndarray]:
    return figures["confusion"]["classes"], np.array(figures["confusion"][unit])


def interval_text(figures: Mapping[str, Any], name: str) -> str:
    """A figure with its interval, where it has one; nothing where there is no figure."""
    value, low, high = (figures.get(key) for key in (name, f"{name}_low", f"{name}_high"))
    if value is None:
        return ""
    return _number(value) if low is None else f"{_number(value)} ({_number(low)}–{_number(high)})"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"
