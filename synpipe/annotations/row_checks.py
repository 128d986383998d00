"""Type and check rows of annotation files: separate the synapses that can be used from the rejects.

Input: `Rows`, with untyped columns. Output: `CheckedRows`, in which every row is either in `synapses` or in one of the
tables of `rejects`. A row is rejected for the first fault that it has, in the order of `schema.py`; a bad row never
affects other rows. Whole columns are checked at once, so that files of any size can be converted.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from synpipe.annotations.bounds import VolumeBounds
from synpipe.annotations.columns import (
    MAX_ID,
    MAX_ID_AS_FLOAT,
    as_class_names,
    as_float32,
    as_floats,
    as_text,
    as_whole_numbers,
)
from synpipe.annotations.schema import (
    BAD_ID,
    MALFORMED_ROW,
    MISSING_COORDINATE,
    MISSING_ID,
    OUTSIDE_VOLUME,
    REJECT_SCHEMA,
    SYNAPSE_SCHEMA,
    UNKNOWN_NEUROTRANSMITTER,
)
from synpipe.annotations.source import COLUMNS, AnnotationSource, Rows

Explanation = Sequence[str | pa.Array]  # texts and columns, which are joined row by row


@dataclass(frozen=True)
class CheckedRows:
    """Some rows of a file after the checks.

    synapses: rows without a fault (`SYNAPSE_SCHEMA`). numbers: their places in the file, int64.
    rejects: one table (`REJECT_SCHEMA`) for each reason that occurs.
    emptied: for each column, how many synapses have a value that is not an exact number and became null.
    points_zyx: finite coordinates (n, 3) as in the file. inside: whether each of them lies in the volume, bool (n,).
    """

    synapses: pa.Table
    numbers: np.ndarray
    rejects: list[pa.Table]
    emptied: Counter[str]
    points_zyx: np.ndarray
    inside: np.ndarray


@dataclass(frozen=True)
class _TypedRows:
    """raw: the columns of the file by key. columns: those of `SYNAPSE_SCHEMA`, with nulls for what could not be typed.

    coordinates_zyx, positions_nm_zyx: (n, 3), as in the file and in nm; NaN where one is absent.
    max_id: the largest id that the file may have. class_problems: a sentence on each unknown class, else null.
    """

    raw: dict[str, pa.Array]
    columns: dict[str, pa.Array]
    coordinates_zyx: np.ndarray
    positions_nm_zyx: np.ndarray
    max_id: int
    class_problems: pa.Array


@dataclass(frozen=True)
class _Fault:
    """A reason for a reject, the rows that have it (bool), and the explanation."""

    reason: str
    rows: np.ndarray
    explanation: Explanation


def check_rows(
    rows: Rows, source: AnnotationSource, classes: Sequence[str], bounds: VolumeBounds | None
) -> CheckedRows:
    """Type and check some rows of `source`. With `bounds` None, positions are not checked."""
    typed = _type_rows(rows.table, source, classes)
    is_point = np.isfinite(typed.positions_nm_zyx).all(axis=1)
    inside = bounds.contain(typed.positions_nm_zyx) if bounds else np.full(len(is_point), True)

    table = pa.table({name: typed.columns[name] for name in SYNAPSE_SCHEMA.names})
    numbers = rows.table["row"].to_numpy()
    usable = np.full(len(numbers), True)
    rejects = []
    for fault in _find_faults(typed, is_point, inside, bounds):
        hit = usable & fault.rows
        if hit.any():
            usable &= ~hit
            explanation = [part if isinstance(part, str) else part.filter(hit) for part in fault.explanation]
            places = pc.binary_join_element_wise(rows.place_prefix, pa.array(numbers[hit]).cast(pa.string()), "")
            rejects.append(make_rejects(table.filter(hit), places, fault.reason, explanation))

    emptied = Counter[str]()
    for key in ("neuron_id", "confidence"):
        was_given = _to_numpy(as_text(typed.raw[key]).is_valid())
        emptied[key] += int((usable & was_given & _to_numpy(typed.columns[key].is_null())).sum())
    return CheckedRows(
        synapses=table.filter(usable).cast(SYNAPSE_SCHEMA),
        numbers=numbers[usable],
        rejects=rejects,
        emptied=+emptied,
        points_zyx=typed.coordinates_zyx[is_point],
        inside=inside[is_point],
    )


def make_rejects(rows: pa.Table, places: pa.Array, reason: str, explanation: Explanation) -> pa.Table:
    """Make rejects (`REJECT_SCHEMA`) of synapses. places: such as "a.csv, line 3". explanation: as long as `rows`."""
    ids = pc.fill_null(pc.binary_join_element_wise(" (id '", rows["source_id"], "')", ""), "")
    parts = [
        pa.scalar(part) if isinstance(part, str) else part.cast(pa.string())
        for part in (places, ids, ": ", *explanation, ".")
    ]
    detail = pc.binary_join_element_wise(*parts, "", null_handling="replace", null_replacement="")
    table = rows.append_column("reason", pa.repeat(reason, len(rows))).append_column("detail", detail)
    return table.select(REJECT_SCHEMA.names).cast(REJECT_SCHEMA)


def _type_rows(table: pa.Table, source: AnnotationSource, classes: Sequence[str]) -> _TypedRows:
    count = table.num_rows
    raw = {
        key: table[key].combine_chunks() if key in table.column_names else pa.nulls(count, pa.string())
        for key in (*COLUMNS, "problem")
    }
    largest = MAX_ID_AS_FLOAT if pa.types.is_floating(raw["synapse_id"].type) else MAX_ID
    max_id = min(largest, MAX_ID - source.id_offset)
    coordinates = np.stack([as_floats(raw[axis]) for axis in "zyx"], axis=1)
    with np.errstate(over="ignore"):  # a value that overflows becomes infinite and is rejected
        positions = source.to_nm(coordinates) + np.array(source.shift_nm_zyx)
    finite = np.isfinite(positions)
    names = raw["neurotransmitter"] if source.label is None else pa.repeat(source.label, count)
    labels, class_problems = as_class_names(names, classes)
    columns = {
        "synapse_id": pc.add(as_whole_numbers(raw["synapse_id"], max_id), source.id_offset),
        **{
            f"{name}_nm": pa.array(positions[:, axis], mask=~finite[:, axis])
            for axis, name in ((2, "x"), (1, "y"), (0, "z"))
        },
        "neuron_id": as_whole_numbers(raw["neuron_id"], MAX_ID),
        "hemilineage": as_text(raw["hemilineage"]),
        "region": as_text(raw["region"]),
        "neurotransmitter": labels,
        "confidence": as_float32(raw["confidence"]),
        "source": pa.repeat(source.name, count),
        "source_id": as_text(raw["synapse_id"]),
    }
    return _TypedRows(raw, columns, coordinates, positions, max_id, class_problems)


def _find_faults(
    typed: _TypedRows, is_point: np.ndarray, inside: np.ndarray, bounds: VolumeBounds | None
) -> list[_Fault]:
    """Every reason with the rows that it applies to, in the order of the checks."""
    raw, columns = typed.raw, typed.columns
    return [
        _Fault(MALFORMED_ROW, _to_numpy(raw["problem"].is_valid()), [raw["problem"]]),
        _Fault(MISSING_ID, _to_numpy(columns["source_id"].is_null()), ["it has no id"]),
        _Fault(
            BAD_ID,
            _to_numpy(columns["synapse_id"].is_null()),
            [f"the id is not a whole number from 0 to {typed.max_id}"],
        ),
        _Fault(MISSING_COORDINATE, ~is_point, [*_quote(raw, "x", "y", "z"), " are not three finite numbers"]),
        _Fault(
            OUTSIDE_VOLUME,
            ~inside,
            [*_quote(columns, "x_nm", "y_nm", "z_nm"), f" (nm) is not in the volume, {bounds}"],
        ),
        _Fault(
            UNKNOWN_NEUROTRANSMITTER,
            _to_numpy(typed.class_problems.is_valid()),
            ["neurotransmitter ", typed.class_problems],
        ),
    ]


def _quote(columns: dict[str, pa.Array], x: str, y: str, z: str) -> list[str | pa.Array]:
    return ["x '", columns[x], "', y '", columns[y], "', z '", columns[z], "'"]


def _to_numpy(mask: pa.Array) -> np.ndarray:
    return mask.to_numpy(zero_copy_only=False)
