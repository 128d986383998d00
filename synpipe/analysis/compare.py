"""Encoders beside each other: a table of all that were judged, or two of them query by query.

In: what the assets `scores_<encoder>` and `evaluation` hold. Out: rows, `Comparison`s, and pictures. Guarantee: two encoders
are compared on the same queries, and the interval of a difference is that of pairs: it is far narrower than the two
intervals side by side suggest, because what is hard for one is as a rule hard for the other.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from synpipe.analysis import evaluation
from synpipe.analysis.evaluation import FIGURES, Estimate
from synpipe.annotations.schema import UNLABELLED
from synpipe.assets.manifest import read_manifest
from synpipe.datasets import Dataset
from synpipe.errors import SynpipeError
from synpipe.store.files import read_json, read_table

SHOWN_QUERIES = 6
SHOWN_NEIGHBOURS = 4
CHART_FIGURES = (
    "instance_recall_at_1",
    "instance_recall_at_5",
    "knn_balanced_accuracy",
    "map",
    "probe_neuron",
    "probe_random",
)


@dataclass(frozen=True)
class Pair:
    """A figure of both encoders, and the difference of the second from the first."""

    title: str
    a: Estimate
    b: Estimate
    difference: Estimate


@dataclass(frozen=True)
class Query:
    """A synapse for which the two find different things: its average precision under each (None where its class is not
    known), the share of common neighbours, and the nearest neighbours under each."""

    synapse_id: int
    label: str | None
    average_precision_a: float | None
    average_precision_b: float | None
    overlap: float
    nearest_a: list[int]
    nearest_b: list[int]


@dataclass(frozen=True)
class Comparison:
    """overlap: share of the ten nearest neighbours that both find; jaccard: common ones ÷ all that either finds; means over
    the queries. differ_most: the queries on which they differ most, a few of them."""

    a: str
    b: str
    queries: int
    figures: dict[str, Pair]
    overlap: float | None
    jaccard: float | None
    differ_most: list[Query]


def encoders_table(dataset: Dataset) -> list[dict[str, Any]]:
    """A row per encoder that was judged, in the order of the data set. Raises `SynpipeError` where none was.

    query_ms: see `index.Cost`. A time is no content of an asset, so it is read from what was noted when the index was made.
    """
    _spec(dataset)
    rows = read_table(dataset.evaluation_path).to_pylist()
    return [row | {"query_ms": read_manifest(dataset, f"index_{row['encoder']}").counts["query_ms"]} for row in rows]


def compare(dataset: Dataset, a: str, b: str) -> Comparison:
    """Two encoders on the synapses that both have. Raises `SynpipeError` where one of them was not judged, or both are the
    same."""
    if a == b:
        raise SynpipeError(f"{a} cannot be compared with itself: name two of {', '.join(dataset.encoders)}.")
    seed = _spec(dataset).seed
    told_a, told_b = (read_json(dataset.scores_path(name)) for name in (a, b))
    table_a, table_b = (read_table(dataset.queries_path(name)).sort_by("synapse_id") for name in (a, b))
    table_a = table_a.filter(pc.is_in(table_a["synapse_id"], table_b["synapse_id"]))
    table_b = table_b.filter(pc.is_in(table_b["synapse_id"], table_a["synapse_id"]))
    rows_a, rows_b = _rows(table_a), _rows(table_b)
    figures = {}
    for name, figure in FIGURES.items():
        values_a, values_b = figure.values(rows_a), figure.values(rows_b)
        absent = np.isnan(values_a) | np.isnan(values_b)
        labels, weights = evaluation.strata(name, rows_a)
        (at_a, samples_a), (at_b, samples_b) = (
            evaluation.resample(np.where(absent, np.nan, values), labels, rows_a["group"], seed, weights)
            for values in (values_a, values_b)
        )
        if at_a is None or at_b is None:
            continue
        difference = Estimate(at_b - at_a, *evaluation.interval(samples_b - samples_a))
        figures[name] = Pair(
            figure.title, Estimate(**told_a["figures"][name]), Estimate(**told_b["figures"][name]), difference
        )

    queries = _queries(table_a, table_b)
    common = [set(query.nearest_a) & set(query.nearest_b) for query in queries]
    either = [set(query.nearest_a) | set(query.nearest_b) for query in queries]
    jaccard = [len(both) / len(any_) for both, any_ in zip(common, either, strict=True) if any_]
    return Comparison(
        a=a,
        b=b,
        queries=len(queries),
        figures=figures,
        overlap=float(np.mean([query.overlap for query in queries])) if queries else None,
        jaccard=float(np.mean(jaccard)) if jaccard else None,
        differ_most=sorted(queries, key=_likeness)[:SHOWN_QUERIES],
    )


def _likeness(query: Query) -> tuple[float, float, int]:
    """Small where the two differ: by how well they find the class, then by what they find."""
    a, b = query.average_precision_a, query.average_precision_b
    return (0.0 if a is None or b is None else -abs(a - b), query.overlap, query.synapse_id)


def _queries(table_a: pa.Table, table_b: pa.Table) -> list[Query]:
    names = ["synapse_id", "label", "average_precision", "nearest"]
    pairs = zip(table_a.select(names).to_pylist(), table_b.select(names).to_pylist(), strict=True)
    return [
        Query(
            synapse_id=a["synapse_id"],
            label=a["label"],
            average_precision_a=a["average_precision"],
            average_precision_b=b["average_precision"],
            overlap=len({*a["nearest"]} & {*b["nearest"]}) / max(1, min(len(a["nearest"]), len(b["nearest"]))),
            nearest_a=a["nearest"],
            nearest_b=b["nearest"],
        )
        for a, b in pairs
        if a["nearest"] is not None and b["nearest"] is not None
    ]


def _spec(dataset: Dataset) -> evaluation.EvaluationSpec:
    if dataset.spec.evaluation is None:
        raise SynpipeError(
            f"{dataset.name}.yaml says `evaluation: null`, so that no encoder is judged: take that line out and materialise."
        )
    return dataset.spec.evaluation


def _rows(table: pa.Table) -> evaluation.Rows:
    found = {}
    for name in table.column_names:
        if name in ("label", "voted"):
            found[name] = np.array([*table[name].to_pylist(), None], dtype=object)[:-1]
        elif name != "nearest":
            found[name] = table[name].to_numpy()  # nulls become NaN
    return found


def picture(dataset: Dataset, comparison: Comparison, tile_px: int = 96) -> Image.Image | None:
    """A row per query on which they differ most: its tile, then what the one finds, then what the other finds; None where
    there is no query."""
    from synpipe.assets.pipeline import open_tiles
    from synpipe.reports.pictures import Cell, class_by_synapse, sheet

    shown = [
        synapse_id
        for query in comparison.differ_most
        for synapse_id in (query.synapse_id, *query.nearest_a[:SHOWN_NEIGHBOURS], *query.nearest_b[:SHOWN_NEIGHBOURS])
    ]
    reader, labels = open_tiles(dataset, shown), class_by_synapse(dataset, shown)
    rows: dict[str, list[Cell]] = {}
    for query in comparison.differ_most:
        cells = [(reader.by_id(query.synapse_id), "query")]
        for name, nearest in ((comparison.a, query.nearest_a), (comparison.b, query.nearest_b)):
            found = nearest[:SHOWN_NEIGHBOURS]
            cells += [(reader.by_id(one), f"{name[:8]}: {labels[one]}") for one in found]
        rows[f"{query.label or UNLABELLED}\n{query.synapse_id}"] = cells
    return sheet(rows, tile_px) if rows else None


def chart(rows: Sequence[dict[str, Any]]) -> Image.Image:
    """Bars of the most telling figures of each encoder, with their intervals."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = [name for name in CHART_FIGURES if any(row[name] is not None for row in rows)]
    canvas = FigureCanvasAgg(Figure(figsize=(2.2 * max(1, len(shown)), 0.6 + 0.28 * len(rows)), layout="constrained"))
    places = np.arange(len(rows))[::-1]
    for number, name in enumerate(shown):
        axes = canvas.figure.add_subplot(1, len(shown), number + 1)
        values = np.array([np.nan if row[name] is None else row[name] for row in rows])
        ends = [[row[f"{name}_{end}"] for row in rows] for end in ("low", "high")]
        low, high = (np.array([np.nan if end is None else end for end in each]) for each in ends)
        reach = np.clip(np.stack([values - low, high - values]), 0, None)
        axes.barh(
            places, values, xerr=reach, height=0.6, color="#4c72b0", error_kw={"elinewidth": 1, "ecolor": "#333333"}
        )
        axes.set_xlim(0, 1)
        axes.set_title(FIGURES[name].title, fontsize=8)
        axes.tick_params(labelsize=7)
        axes.set_yticks(places, [row["encoder"] for row in rows] if number == 0 else [""] * len(rows))
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The figures that any encoder has, as a table: value and interval."""
    shown = [name for name in FIGURES if any(row[name] is not None for row in rows)]
    lines = [
        f"| encoder | dimensions | {' | '.join(FIGURES[name].title for name in shown)} | index recall "
        "| bytes a vector | ms a query |",
        "|---" * (len(shown) + 5) + "|",
    ]
    for row in rows:
        cells = " | ".join(
            format_figure(Estimate(row[name], row[f"{name}_low"], row[f"{name}_high"])) for name in shown
        )
        costs = f"{row['index_recall']:.4f} | {row['bytes_per_vector']:,.0f} | {row['query_ms']:.1f}"
        lines.append(f"| {row['encoder']} | {row['dimensions']} | {cells} | {costs} |")
    return "\n".join(lines)


def format_figure(figure: Estimate, sign: str = "") -> str:
    """`.640 [.610, .671]`, without the interval where there is none."""
    if figure.value is None:
        return "–"
    if figure.low is None or figure.high is None:
        return _number(figure.value, sign)
    return f"{_number(figure.value, sign)} [{_number(figure.low, sign)}, {_number(figure.high, sign)}]"


def _number(value: float, sign: str) -> str:
    return f"{value:{sign}.3f}".replace("0.", ".", 1) if abs(value) < 0.9995 else f"{value:{sign}.3f}"
