"""Draw charts with matplotlib: maps, confusion matrices, and the figures of several encoders.

Inputs: arrays, or figures as the other modules of this folder give them. Outputs: PIL images of bounded size.

`matplotlib.figure.Figure` is used without pyplot, which would keep every figure in memory and look for a screen.
"""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from synpipe.analysis.classifier_report import Unit, format_interval, read_confusion
from synpipe.analysis.evaluation import FIGURES
from synpipe.analysis.metrics import row_shares

# M. Okabe, K. Ito, "Color universal design", 2008. Its yellow is left out because it is faint on white.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "o^s"
GREY = "#BBBBBB"
MAP_POINTS = 200_000
MAP_INCHES, MAP_DPI = (8.0, 6.4), 100
BAR_FIGURES = (
    "instance_recall_at_1",
    "instance_recall_at_5",
    "knn_balanced_accuracy",
    "map",
    "probe_neuron",
    "probe_random",
)


def draw_map(places: np.ndarray, labels: np.ndarray, classes: Sequence[str], title: str) -> Image.Image:
    """Draw the points of a map, coloured by class. Rare classes lie on top; points without a class are grey and lie behind.

    places: float32 (n, 2). labels: string (n,). classes: in the order of the palette. At most `MAP_POINTS` points are drawn,
    but the legend counts all of them.
    """
    from matplotlib.figure import Figure

    counts = {name: int((labels == name).sum()) for name in classes if name in labels}
    others = len(labels) - sum(counts.values())
    if len(places) > MAP_POINTS:
        shown = np.random.default_rng(0).permutation(len(places))[:MAP_POINTS]
        places, labels = places[shown], labels[shown]
    figure = Figure(figsize=MAP_INCHES, dpi=MAP_DPI, layout="constrained")
    axes = figure.subplots()
    size = float(np.clip(20_000 / max(1, len(places)), 0.3, 16))
    if others:
        unknown = places[~np.isin(labels, list(classes))]
        axes.scatter(unknown[:, 0], unknown[:, 1], s=size, c=GREY, linewidths=0, label=f"unlabelled  {others:,}")
    for order, name in enumerate(sorted(counts, key=lambda name: -counts[name])):
        number = list(classes).index(name)
        points = places[labels == name]
        axes.scatter(
            points[:, 0],
            points[:, 1],
            s=size,
            c=PALETTE[number % len(PALETTE)],
            marker=MARKERS[number // len(PALETTE) % len(MARKERS)],
            linewidths=0,
            alpha=0.8,
            zorder=2 + order,
            label=f"{name}  {counts[name]:,}",
        )
    axes.set(title=title, xlabel="map_x", ylabel="map_y", aspect="equal")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, markerscale=float(np.sqrt(40 / size)))
    axes.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return Image.open(buffer)


def draw_confusion(figures: Mapping[str, Any], title: str) -> Image.Image:
    """Draw the confusion matrices of synapses and of neurons, each row as shares of its true class.

    figures: the result of `classifier_scores.score_test_side`.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    units: tuple[Unit, ...] = ("synapses", "neurons")
    figure = Figure(figsize=(11, 5.2), dpi=100, layout="constrained")
    figure.suptitle(title, fontsize=11)
    for unit, axes in zip(units, figure.subplots(1, len(units)), strict=True):
        classes, counts = read_confusion(figures, unit)
        totals, shares = counts.sum(axis=1), row_shares(counts)
        axes.imshow(np.where(totals[:, None] > 0, shares, np.nan), cmap="Blues", vmin=0, vmax=1)
        for row, column in np.ndindex(shares.shape):
            if totals[row]:
                colour = "white" if shares[row, column] > 0.5 else "black"
                axes.text(column, row, f"{shares[row, column]:.2f}", ha="center", va="center", color=colour, fontsize=8)
        labels = [f"{name} ({int(total):,})" for name, total in zip(classes, totals, strict=True)]
        axes.set_xticks(range(len(classes)), classes, rotation=40, ha="right", fontsize=8)
        axes.set_yticks(range(len(classes)), labels, fontsize=8)
        name = "balanced_accuracy" if unit == "synapses" else "neuron_balanced_accuracy"
        axes.set_title(f"{unit}: balanced accuracy {format_interval(figures, name)}", fontsize=9)
        axes.set_xlabel("predicted", fontsize=8)
    canvas, buffer = FigureCanvasAgg(figure), io.BytesIO()
    canvas.print_png(buffer)
    return Image.open(buffer).convert("RGB")


def draw_figures(rows: Sequence[Mapping[str, Any]]) -> Image.Image:
    """Draw the most informative figures of each encoder as bars with their intervals.

    rows: one per encoder, as `compare.encoder_table` takes them.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = [name for name in BAR_FIGURES if any(row[name] is not None for row in rows)]
    canvas = FigureCanvasAgg(Figure(figsize=(2.2 * max(1, len(shown)), 0.6 + 0.28 * len(rows)), layout="constrained"))
    positions = np.arange(len(rows))[::-1]
    for number, name in enumerate(shown):
        axes = canvas.figure.add_subplot(1, len(shown), number + 1)
        values = np.array([np.nan if row[name] is None else row[name] for row in rows])
        ends = [[row[f"{name}_{end}"] for row in rows] for end in ("low", "high")]
        low, high = (np.array([np.nan if end is None else end for end in each]) for each in ends)
        reach = np.clip(np.stack([values - low, high - values]), 0, None)
        axes.barh(
            positions, values, xerr=reach, height=0.6, color="#4c72b0", error_kw={"elinewidth": 1, "ecolor": "#333333"}
        )
        axes.set_xlim(0, 1)
        axes.set_title(FIGURES[name].title, fontsize=8)
        axes.tick_params(labelsize=7)
        axes.set_yticks(positions, [row["encoder"] for row in rows] if number == 0 else [""] * len(rows))
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
