"""Synapse annotations in any known format become one typed Arrow table, and a table of what was rejected.

In: `AnnotationSpec`s that name files in nm or voxels. Out: synapses (`SYNAPSE_SCHEMA`, sorted by id), rejects
(`REJECT_SCHEMA`) and notes for the user. Guarantee: every row of every file is in exactly one of the two tables; ids up
to 2^63 - 1 are exact; a bad row stops no other row, and only a bad file or a wrong unit raises.

The formats are in `annotation_formats.py`. Checks work on whole columns, one `Rows` at a time, so that files of any size
can be converted: 10 million rows need less than 2 GB (`python -m synpipe_tests.bench.annotations`).
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from synpipe.annotations.columns import MAX_ID, MAX_ID_AS_FLOAT, as_class_names, as_floats, as_text, as_whole_numbers
from synpipe.annotations.counts import Census
from synpipe.annotations.formats import AnnotationSpec
from synpipe.annotations.sources import COLUMNS, Rows
from synpipe.annotations.units import Box, UnitCheck
from synpipe.errors import SynpipeError
from synpipe.store.sorting import SortedById

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


Sink = Callable[[pa.Table], object]


@dataclass(frozen=True)
class Summary:
    """synapses, rejects: numbers of rows. classes: synapses by class, the most frequent first. notes: sentences for the user."""

    synapses: int
    rejects: int
    classes: dict[str, int]
    notes: list[str]


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
    voxel_size_nm_zyx: np.ndarray | None = None,
) -> Annotations:
    """`convert_annotations` into memory, for some 100,000 synapses."""
    synapses, rejects = [SYNAPSE_SCHEMA.empty_table()], [REJECT_SCHEMA.empty_table()]
    summary = convert_annotations(
        specs,
        base,
        synapses.append,
        rejects.append,
        bounds_nm_zyx=bounds_nm_zyx,
        classes=classes,
        voxel_size_nm_zyx=voxel_size_nm_zyx,
    )
    return Annotations(pa.concat_tables(synapses), pa.concat_tables(rejects), summary.notes)


def convert_annotations(
    specs: Sequence[AnnotationSpec],
    base: Path,
    write_synapses: Sink,
    write_rejects: Sink,
    *,
    bounds_nm_zyx: tuple[np.ndarray, np.ndarray] | None,
    classes: Sequence[str],
    voxel_size_nm_zyx: np.ndarray | None = None,
    scratch: Path | None = None,
) -> Summary:
    """Read, type and check every row of every source, and write it to one of the two sinks, a part at a time.

    bounds_nm_zyx: lower (inside) and upper (outside) corner of the volume; None checks no position.
    classes: the names that `neurotransmitter` may have; case, spaces and common synonyms do not matter.
    voxel_size_nm_zyx: of the volume, to tell voxels from nm; by default 1 nm.
    scratch: folder for temporary files, about as large as the synapses twice; by default the system's.

    Raises `SynpipeError` where a file is missing, damaged, empty or without the needed columns, a label is no class, or
    the unit of the coordinates is wrong.
    """
    counts, notes, census = Counter[str](), list[str](), Census()

    def reject(table: pa.Table) -> None:
        counts["rejects"] += len(table)
        write_rejects(table)

    def keep(table: pa.Table) -> None:
        census.add(table)
        write_synapses(table)

    def reject_repeated(table: pa.Table, places: pa.Array, keepers: pa.Array) -> None:
        reject(_rejects(table, places, DUPLICATE_ID, ["id ", table["synapse_id"], " is taken by ", keepers]))

    box = None
    if bounds_nm_zyx is not None:
        box = Box(*bounds_nm_zyx, np.ones(3) if voxel_size_nm_zyx is None else voxel_size_nm_zyx)
    with SortedById(SYNAPSE_SCHEMA, scratch) as accepted:
        for spec in specs:
            notes += _read_source(spec, base, box, classes, accepted, reject)
        accepted.write(keep, reject_repeated)
    return Summary(census.synapses, counts["rejects"], census.classes(), notes + census.notes(classes))


def _read_source(
    spec: AnnotationSpec, base: Path, box: Box | None, classes: Sequence[str], accepted: SortedById, reject: Sink
) -> list[str]:
    """Notes on the source; its rows go to `accepted` and `reject`."""
    if spec.label is not None and spec.label not in classes:
        raise SynpipeError(f"Source {spec.name}: label {spec.label!r} is none of the classes {', '.join(classes)}.")
    notes, count, lost = list[str](), 0, Counter[str]()
    units = UnitCheck(spec, box) if box else None
    for rows in spec.read(base):
        count += rows.table.num_rows
        checked = _checked(rows, spec, box, classes)
        accepted.add(checked.good, checked.place, checked.numbers)
        if checked.bad:
            reject(pa.concat_tables(checked.bad))
        if units:
            units.add(checked.points, checked.inside)
        lost += checked.lost
        notes += rows.notes
    if count == 0:
        raise SynpipeError(f"{spec.files(base)[0]} holds no synapse: name a file with at least one.")
    notes += [
        f"{spec.name}: {number:,} synapses have a {key} that is no number or not exact; it is left empty."
        for key, number in lost.items()
    ]
    return notes + (units.notes() if units else [])


@dataclass(frozen=True)
class _Checked:
    """Some rows of a file. good: without fault; place, numbers: where they stand. bad: a table of rejects per reason.

    lost: numbers left empty, by column. points: finite coordinates (n, 3) as in the file. inside: whether in the volume.
    """

    good: pa.Table
    place: str
    numbers: np.ndarray
    bad: list[pa.Table]
    lost: Counter[str]
    points: np.ndarray
    inside: np.ndarray


def _checked(rows: Rows, spec: AnnotationSpec, box: Box | None, classes: Sequence[str]) -> _Checked:
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
    is_point = finite.all(axis=1)
    inside = box.contains(positions) if box else np.full(count, True)
    names = pa.repeat(spec.label, count) if spec.label is not None else raw["neurotransmitter"]
    labels, unknown = as_class_names(names, classes)
    z_nm, y_nm, x_nm = (pa.array(positions[:, axis], mask=~finite[:, axis]) for axis in range(3))
    typed = {
        "neuron_id": as_whole_numbers(raw["neuron_id"], MAX_ID),
        "confidence": pa.array(as_floats(raw["confidence"]), from_pandas=True).cast(pa.float32(), safe=False),
    }
    table = pa.table(
        {
            "synapse_id": pc.add(ids, spec.id_offset),
            "x_nm": x_nm,
            "y_nm": y_nm,
            "z_nm": z_nm,
            **typed,
            "hemilineage": as_text(raw["hemilineage"]),
            "region": as_text(raw["region"]),
            "neurotransmitter": labels,
            "source": pa.repeat(spec.name, count),
            "source_id": source_id,
        }
    ).select(SYNAPSE_SCHEMA.names)
    place, numbers = f"{rows.file.name}, {rows.counted_in} ", rows.table["row"].to_numpy()
    # An explanation is a list of texts and columns that are joined for the rejected rows alone.
    faults: list[tuple[str, np.ndarray, list[Any]]] = [
        (MALFORMED_ROW, _numpy(raw["problem"].is_valid()), [raw["problem"]]),
        (MISSING_ID, _numpy(source_id.is_null()), ["it has no id"]),
        (BAD_ID, _numpy(ids.is_null()), [f"the id is not a whole number from 0 to {max_id}"]),
        (
            MISSING_COORDINATE,
            ~is_point,
            [*_xyz(raw["x"], raw["y"], raw["z"]), " are not three finite numbers"],
        ),
        (OUTSIDE_VOLUME, ~inside, [*_xyz(x_nm, y_nm, z_nm), f" (nm) is not in the volume, {box}"]),
        (UNKNOWN_NEUROTRANSMITTER, _numpy(unknown.is_valid()), ["neurotransmitter ", unknown]),
    ]
    open_rows = np.full(count, True)
    bad = []
    for reason, fault, explanation in faults:
        hit = open_rows & fault
        if hit.any():
            open_rows &= ~hit
            parts = [part if isinstance(part, str) else part.filter(hit) for part in explanation]
            places = pc.binary_join_element_wise(place, pa.array(numbers[hit]).cast(pa.string()), "")
            bad.append(_rejects(table.filter(hit), places, reason, parts))
    lost = Counter[str]()
    for key, values in typed.items():
        lost[key] += int((open_rows & _numpy(as_text(raw[key]).is_valid()) & _numpy(values.is_null())).sum())
    good = table.filter(open_rows).cast(SYNAPSE_SCHEMA)
    return _Checked(good, place, numbers[open_rows], bad, +lost, coordinates[is_point], inside[is_point])


def _rejects(rows: pa.Table, places: pa.Array, reason: str, explanation: list[Any]) -> pa.Table:
    named = pc.fill_null(pc.binary_join_element_wise(" (id '", rows["source_id"], "')", ""), "")
    detail = [places, named, ": ", *explanation, "."]
    parts = [pa.scalar(part) if isinstance(part, str) else part.cast(pa.string()) for part in detail]
    joined = pc.binary_join_element_wise(*parts, "", null_handling="replace", null_replacement="")
    table = rows.append_column("reason", pa.repeat(reason, len(rows))).append_column("detail", joined)
    return table.select(REJECT_SCHEMA.names).cast(REJECT_SCHEMA)


def _xyz(x: pa.Array, y: pa.Array, z: pa.Array) -> list[Any]:
    return ["x '", x, "', y '", y, "', z '", z, "'"]


def _numpy(mask: pa.Array) -> np.ndarray:
    return mask.to_numpy(zero_copy_only=False)
