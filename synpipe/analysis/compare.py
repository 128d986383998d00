"""Compare encoders: a table of all judged encoders, or two of them query by query.

Inputs: the figures and query tables of judged encoders, as tables and arrays. Outputs: an `EncoderComparison`, and headers
and rows for `text.format_table`. Two encoders are compared on the same queries, and the interval of a difference is that of
paired values. It is much narrower than the intervals of the two figures suggest, because queries that are hard for one
encoder are usually hard for the other.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from synpipe.analysis import evaluation
from synpipe.analysis.classifier_report import Table
from synpipe.analysis.evaluation import FIGURES
from synpipe.analysis.metrics import Estimate, interval, resample

SHOWN_QUERIES = 6


@dataclass(frozen=True)
class JudgedEncoder:
    """An encoder that was judged.

    figures: by the keys of `evaluation.FIGURES`. queries: a row per judged synapse, the columns of `evaluation.Rows` with
    `synapse_id` and `nearest`, list<int64>, null where a synapse was not a query.
    """

    name: str
    figures: Mapping[str, Estimate]
    queries: pa.Table


@dataclass(frozen=True)
class Pair:
    """A figure of two encoders, and its difference: b minus a."""

    title: str
    a: Estimate
    b: Estimate
    difference: Estimate


@dataclass(frozen=True)
class Query:
    """The answers of two encoders to a query.

    average_precision_a, average_precision_b: None if the class of the synapse is not known. overlap: share of the nearest
    neighbours that both find. nearest_a, nearest_b: ids of the nearest neighbours.
    """

    synapse_id: int
    label: str | None
    average_precision_a: float | None
    average_precision_b: float | None
    overlap: float
    nearest_a: list[int]
    nearest_b: list[int]


@dataclass(frozen=True)
class EncoderComparison:
    """How encoder b differs from encoder a.

    queries: number of queries that both answered. overlap: share of the ten nearest neighbours that both find. jaccard:
    common neighbours divided by all that either finds. Both are means over the queries. differ_most: the queries whose
    answers differ most.
    """

    a: str
    b: str
    queries: int
    figures: dict[str, Pair]
    overlap: float | None
    jaccard: float | None
    differ_most: list[Query]


def compare_encoders(a: JudgedEncoder, b: JudgedEncoder, seed: int) -> EncoderComparison:
    """Compare two encoders on the synapses that both have. seed: of the bootstrap."""
    table_a, table_b = a.queries.sort_by("synapse_id"), b.queries.sort_by("synapse_id")
    table_a = table_a.filter(pc.is_in(table_a["synapse_id"], table_b["synapse_id"]))
    table_b = table_b.filter(pc.is_in(table_b["synapse_id"], table_a["synapse_id"]))
    differences = _differences(table_a, table_b, seed)
    queries = _pair_queries(table_a, table_b)
    jaccard = [
        len({*query.nearest_a} & {*query.nearest_b}) / len({*query.nearest_a} | {*query.nearest_b})
        for query in queries
        if query.nearest_a or query.nearest_b
    ]
    return EncoderComparison(
        a=a.name,
        b=b.name,
        queries=len(queries),
        figures={
            name: Pair(FIGURES[name].title, a.figures[name], b.figures[name], difference)
            for name, difference in differences.items()
        },
        overlap=float(np.mean([query.overlap for query in queries])) if queries else None,
        jaccard=float(np.mean(jaccard)) if jaccard else None,
        differ_most=sorted(queries, key=_similarity_key)[:SHOWN_QUERIES],
    )


def _differences(table_a: pa.Table, table_b: pa.Table, seed: int) -> dict[str, Estimate]:
    """Difference, b minus a, of every figure that both have, on the same rows and the same bootstrap samples."""
    rows_a, rows_b = _rows(table_a), _rows(table_b)
    differences = {}
    for name, figure in FIGURES.items():
        values_a, values_b = figure.values(rows_a), figure.values(rows_b)
        absent = np.isnan(values_a) | np.isnan(values_b)
        labels, weights = evaluation.strata(name, rows_a)
        (value_a, samples_a), (value_b, samples_b) = (
            resample(np.where(absent, np.nan, values), labels, rows_a["group"], seed, weights)
            for values in (values_a, values_b)
        )
        if value_a is not None and value_b is not None:
            differences[name] = Estimate(value_b - value_a, *interval(samples_b - samples_a))
    return differences


def _similarity_key(query: Query) -> tuple[float, float, int]:
    """Sort key that is small for queries on which the encoders differ: first by average precision, then by overlap."""
    a, b = query.average_precision_a, query.average_precision_b
    return (0.0 if a is None or b is None else -abs(a - b), query.overlap, query.synapse_id)


def _pair_queries(table_a: pa.Table, table_b: pa.Table) -> list[Query]:
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


def _rows(table: pa.Table) -> evaluation.Rows:
    """The columns of a table of queries as arrays; nulls of number columns become NaN."""
    rows = {}
    for name in table.column_names:
        if name in ("label", "voted"):
            rows[name] = np.array([*table[name].to_pylist(), None], dtype=object)[:-1]
        elif name != "nearest":
            rows[name] = table[name].to_numpy()
    return rows


def encoder_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Return headers and a row per encoder: its figures with intervals, index recall, and costs.

    rows: `encoder`, `dimensions`, `index_recall`, `bytes_per_vector`, `query_ms`, and for each figure of
    `evaluation.FIGURES` its value, `<figure>_low` and `<figure>_high`. Figures that no encoder has are left out.
    """
    shown = [name for name in FIGURES if any(row[name] is not None for row in rows)]
    titles = [FIGURES[name].title for name in shown]
    cells = [
        [
            *(row["encoder"], row["dimensions"]),
            *(format_figure(Estimate(row[name], row[f"{name}_low"], row[f"{name}_high"])) for name in shown),
            *(f"{row['index_recall']:.4f}", f"{row['bytes_per_vector']:,.0f}", f"{row['query_ms']:.1f}"),
        ]
        for row in rows
    ]
    return ["encoder", "dimensions", *titles, "index recall", "bytes per vector", "ms per query"], cells


def format_figure(figure: Estimate, sign: str = "") -> str:
    """Format a figure as `.640 [.610, .671]`, or without the interval if it has none. sign: "+" shows plus signs."""
    if figure.value is None:
        return "–"
    if figure.low is None or figure.high is None:
        return _number(figure.value, sign)
    return f"{_number(figure.value, sign)} [{_number(figure.low, sign)}, {_number(figure.high, sign)}]"


def _number(value: float, sign: str) -> str:
    return f"{value:{sign}.3f}".replace("0.", ".", 1) if abs(value) < 0.9995 else f"{value:{sign}.3f}"
