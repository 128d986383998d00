"""Synapse annotations in any known format become one typed Arrow table, and a table of what was rejected.

In: `AnnotationSpec`s that name files in nm or voxels. Out: `Annotations`: synapses (`SYNAPSE_SCHEMA`, sorted by id),
rejects (`REJECT_SCHEMA`) and notes for the user. Guarantee: every row of every file is in exactly one of the two
tables; ids up to 2^63 - 1 are exact; a bad row stops no other row, and only a bad file raises.

The formats are in `annotation_formats.py`. Checks work on whole columns, one `Rows` at a time.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from synpipe.annotation_columns import MAX_ID, MAX_ID_AS_FLOAT, as_class_names, as_floats, as_text, as_whole_numbers
from synpipe.annotation_formats import COLUMNS, AnnotationSpec, Rows
from synpipe.errors import SynpipeError

SYNAPSE_SCHEMA = pa.schema(
    [
        pa.field("synapse_id", pa.int64(), nullable=False),
        pa.field("x_nm", pa.float64()),
        pa.field("y_nm", pa.float64()),
        pa.field("z_nm", pa.float64()),
        pa.field("neuron_id", pa.int64()),  # null: unknown
        pa.field("hemilineage", pa.string()),
        pa.field("region", pa.string()),
        pa.field("neurotransmitter", pa.string()),  # one of the data set's classes; null: unlabelled
        pa.field("confidence", pa.float32()),
        pa.field("source", pa.string()),
        pa.field("source_id", pa.string()),  # the id as the file writes it, before `id_offset`
    ]
)
REJECT_SCHEMA = pa.schema(
    [
        pa.field("synapse_id", pa.int64()),  # null: missing_id, bad_id, malformed_row
        pa.field("x_nm", pa.float64()),
        pa.field("y_nm", pa.float64()),
        pa.field("z_nm", pa.float64()),
        pa.field("reason", pa.string()),
        pa.field("detail", pa.string()),
        pa.field("source", pa.string()),
        pa.field("source_id", pa.string()),
    ]
)

# Reasons, in the order in which they are checked: a row is rejected for the first that holds.
MALFORMED_ROW = "malformed_row"  # a CSV line with too few or too many values, a JSON entry that is no object
MISSING_ID = "missing_id"
BAD_ID = "bad_id"
MISSING_COORDINATE = "missing_coordinate"  # absent, not a number, or not finite
OUTSIDE_VOLUME = "outside_volume"
UNKNOWN_NEUROTRANSMITTER = "unknown_neurotransmitter"
DUPLICATE_ID = "duplicate_id"  # of a row that has no other fault: the first such row keeps the id


@dataclass(frozen=True)
class Annotations:
    """synapses: `SYNAPSE_SCHEMA`, sorted by id. rejects: `REJECT_SCHEMA`. notes: sentences for the user."""

    synapses: pa.Table
    rejects: pa.Table
    notes: list[str]


def read_annotations(
    specs: Sequence[AnnotationSpec],
    base: Path,
    *,
    bounds_nm_zyx: tuple[np.ndarray, np.ndarray] | None,
    classes: Sequence[str],
) -> Annotations:
    """Read, type and check every row of every source.

    bounds_nm_zyx: lower (inside) and upper (outside) corner of the volume; None checks no position.
    classes: the names that `neurotransmitter` may have; case, spaces and common synonyms do not matter.

    Raises `SynpipeError` where a file is missing, damaged, empty or without the needed columns, or a label is no class.
    """
    accepted, rejects = [SYNAPSE_SCHEMA.empty_table()], [REJECT_SCHEMA.empty_table()]
    notes: list[str] = []
    for spec in specs:
        if spec.label is not None and spec.label not in classes:
            raise SynpipeError(f"Source {spec.name}: label {spec.label!r} is none of the classes {', '.join(classes)}.")
        count, lost = 0, Counter[str]()
        for rows in spec.read(base):
            count += rows.table.num_rows
            good, bad, lost_here = _checked(rows, spec, bounds_nm_zyx, classes)
            accepted.append(good)
            rejects += bad
            notes += rows.notes
            lost += lost_here
        notes += [
            f"{spec.name}: {number:,} synapses have a {key} that is no number or not exact; it is left empty."
            for key, number in lost.items()
        ]
        if count == 0:
            raise SynpipeError(f"{spec.files(base)[0]} holds no synapse: name a file with at least one.")
    unique, duplicates = _split_duplicates(pa.concat_tables(accepted, promote_options="default"))
    synapses = unique.select(SYNAPSE_SCHEMA.names).cast(SYNAPSE_SCHEMA)
    return Annotations(synapses, pa.concat_tables([*rejects, duplicates]), notes + _class_counts(synapses, classes))


def _checked(
    rows: Rows, spec: AnnotationSpec, bounds_nm_zyx: tuple[np.ndarray, np.ndarray] | None, classes: Sequence[str]
) -> tuple[pa.Table, list[pa.Table], Counter[str]]:
    """Typed rows without fault, with `file` and `row` added; a table of rejects per reason; counts of lost numbers."""
    count = rows.table.num_rows
    raw = {
        key: rows.table[key].combine_chunks() if key in rows.table.column_names else pa.nulls(count, pa.string())
        for key in (*COLUMNS, "problem")
    }
    source_id = as_text(raw["synapse_id"])
    largest = MAX_ID_AS_FLOAT if pa.types.is_floating(raw["synapse_id"].type) else MAX_ID
    max_id = min(largest, MAX_ID - spec.id_offset)
    ids = as_whole_numbers(raw["synapse_id"], max_id)
    coordinates = np.stack([as_floats(raw[axis]) for axis in "zyx"], axis=1)
    with np.errstate(over="ignore"):  # what overflows is not finite, and rejected below
        positions = spec.to_nm(coordinates) + np.array(spec.shift_nm_zyx)
    finite = np.isfinite(positions)
    low, high = bounds_nm_zyx if bounds_nm_zyx is not None else (np.full(3, -np.inf), np.full(3, np.inf))
    box = ", ".join(f"{axis} {low[i]:g} to {high[i]:g}" for i, axis in ((2, "x"), (1, "y"), (0, "z")))
    inside = ((positions >= low) & (positions < high)).all(axis=1)
    names = pa.repeat(spec.label, count) if spec.label is not None else raw["neurotransmitter"]
    labels, unknown = as_class_names(names, classes)
    z_nm, y_nm, x_nm = (pa.array(positions[:, axis], mask=~finite[:, axis]) for axis in range(3))
    numbers = {
        "neuron_id": as_whole_numbers(raw["neuron_id"], MAX_ID),
        "confidence": pa.array(as_floats(raw["confidence"]), from_pandas=True).cast(pa.float32(), safe=False),
    }
    table = pa.table(
        {
            "synapse_id": pc.add(ids, spec.id_offset),
            "x_nm": x_nm,
            "y_nm": y_nm,
            "z_nm": z_nm,
            **numbers,
            "hemilineage": as_text(raw["hemilineage"]),
            "region": as_text(raw["region"]),
            "neurotransmitter": labels,
            "source": pa.repeat(spec.name, count),
            "source_id": source_id,
            "file": pa.repeat(f"{rows.file.name}, {rows.counted_in} ", count).dictionary_encode(),
            "row": rows.table["row"],
        }
    )
    # An explanation is a list of texts and columns that are joined for the rejected rows alone.
    faults: list[tuple[str, np.ndarray, list[Any]]] = [
        (MALFORMED_ROW, _numpy(raw["problem"].is_valid()), [raw["problem"]]),
        (MISSING_ID, _numpy(source_id.is_null()), ["it has no id"]),
        (BAD_ID, _numpy(ids.is_null()), [f"the id is not a whole number from 0 to {max_id}"]),
        (
            MISSING_COORDINATE,
            ~finite.all(axis=1),
            [*_xyz(raw["x"], raw["y"], raw["z"]), " are not three finite numbers"],
        ),
        (OUTSIDE_VOLUME, ~inside, [*_xyz(x_nm, y_nm, z_nm), f" (nm) is not in the volume, {box}"]),
        (UNKNOWN_NEUROTRANSMITTER, _numpy(unknown.is_valid()), ["neurotransmitter ", unknown]),
    ]
    open_rows = np.full(count, True)
    rejects = []
    for reason, fault, explanation in faults:
        hit = open_rows & fault
        if hit.any():
            open_rows &= ~hit
            parts = [part if isinstance(part, str) else part.filter(hit) for part in explanation]
            rejects.append(_rejects(table.filter(hit), reason, parts))
    lost = Counter[str]()
    for key, values in numbers.items():
        lost[key] += int((open_rows & _numpy(as_text(raw[key]).is_valid()) & _numpy(values.is_null())).sum())
    return table.filter(open_rows), rejects, +lost


def _split_duplicates(table: pa.Table) -> tuple[pa.Table, pa.Table]:
    """The first row of each id, sorted by id; rejects for all later ones, in file order."""
    ids = table["synapse_id"].to_numpy()
    order = np.argsort(ids, kind="stable")
    is_first = np.diff(ids[order], prepend=-1) != 0  # ids are never negative
    first_of = order[np.maximum.accumulate(np.where(is_first, np.arange(len(ids)), 0))]
    later = np.argsort(order[~is_first])
    duplicates, kept = table.take(order[~is_first][later]), table.take(first_of[~is_first][later])
    if not duplicates.num_rows:
        return table.take(order), REJECT_SCHEMA.empty_table()
    explanation = ["id ", duplicates["synapse_id"], " is taken by ", kept["file"], kept["row"]]
    return table.take(order[is_first]), _rejects(duplicates, DUPLICATE_ID, explanation)


def _rejects(rows: pa.Table, reason: str, explanation: list[Any]) -> pa.Table:
    named = pc.fill_null(pc.binary_join_element_wise(" (id '", rows["source_id"], "')", ""), "")
    detail = [rows["file"], rows["row"], named, ": ", *explanation, "."]
    parts = [pa.scalar(part) if isinstance(part, str) else part.cast(pa.string()) for part in detail]
    joined = pc.binary_join_element_wise(*parts, "", null_handling="replace", null_replacement="")
    table = rows.append_column("reason", pa.repeat(reason, len(rows))).append_column("detail", joined)
    return table.select(REJECT_SCHEMA.names).cast(REJECT_SCHEMA)


def _xyz(x: pa.Array, y: pa.Array, z: pa.Array) -> list[Any]:
    return ["x '", x, "', y '", y, "', z '", z, "'"]


def _class_counts(synapses: pa.Table, classes: Sequence[str]) -> list[str]:
    grouped = synapses.group_by("neurotransmitter").aggregate(
        [("synapse_id", "count"), ("neuron_id", "count_distinct")]
    )
    counts = {row["neurotransmitter"]: row for row in grouped.to_pylist()}
    return [
        f"{name or 'unlabelled'}: {counts[name]['synapse_id_count']:,} synapses"
        + (f" of {neurons:,} neurons" if (neurons := counts[name]["neuron_id_count_distinct"]) else "")
        for name in [*classes, None]
        if name in counts
    ]


def _numpy(mask: pa.Array) -> np.ndarray:
    return mask.to_numpy(zero_copy_only=False)
