"""Convert the annotations of a data set to one table of synapses and one table of rejects.

Input: the sources under `annotations:`, in nm or voxels. Output: synapses (`SYNAPSE_SCHEMA`, sorted by id), rejects
(`REJECT_SCHEMA`) and notes for the user. Every row of every file is in exactly one of the two tables. Ids up to 2^63 - 1
are exact. A bad row does not stop the others; only an unusable file or a wrong unit raises an error.

Rows are converted block by block: 10 million rows need less than 2 GB (`python -m synpipe_tests.bench.annotations`).
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from synpipe.annotations.bounds import VolumeBounds
from synpipe.annotations.counts import ClassCounts
from synpipe.annotations.row_checks import check_rows, make_rejects
from synpipe.annotations.schema import DUPLICATE_ID, SYNAPSE_SCHEMA
from synpipe.annotations.source import AnnotationSource
from synpipe.annotations.units import UnitCheck
from synpipe.errors import SynpipeError
from synpipe.store.sorting import SortedById

Sink = Callable[[pa.Table], object]


@dataclass(frozen=True)
class AnnotationInputs:
    """What the annotations of a data set are read from.

    sources: the entries under `annotations:`. base: the folder where relative paths start.
    classes: the values that `neurotransmitter` may have; case, spaces and common synonyms do not matter.
    bounds: the space that the volume fills; None means that no position and no unit is checked.
    """

    sources: Sequence[AnnotationSource]
    base: Path
    classes: Sequence[str]
    bounds: VolumeBounds | None


@dataclass(frozen=True)
class Summary:
    """synapses, rejects: numbers of rows. classes: synapses by class, most frequent first. notes: sentences for the user."""

    synapses: int
    rejects: int
    classes: dict[str, int]
    notes: list[str]


def convert_annotations(
    inputs: AnnotationInputs, write_synapses: Sink, write_rejects: Sink, *, scratch: Path | None = None
) -> Summary:
    """Read, type and check every row of every source, and pass it to one of the two sinks, a part at a time.

    scratch: a folder for temporary files, which need about twice the space of the synapses; by default the system's.

    Raises `SynpipeError` if a file is missing, damaged, empty or without the needed columns, if a label is not one of
    the classes, or if the unit of the coordinates is wrong.
    """
    n_rejects, notes, counts = 0, list[str](), ClassCounts()

    def reject(table: pa.Table) -> None:
        nonlocal n_rejects
        n_rejects += len(table)
        write_rejects(table)

    def keep(table: pa.Table) -> None:
        counts.add(table)
        write_synapses(table)

    def reject_repeated(table: pa.Table, places: pa.Array, keepers: pa.Array) -> None:
        explanation = ["id ", table["synapse_id"], " is taken by ", keepers]
        reject(make_rejects(table, places, DUPLICATE_ID, explanation))

    with SortedById(SYNAPSE_SCHEMA, scratch) as accepted:
        for source in inputs.sources:
            notes += _convert_source(source, inputs, accepted, reject)
        accepted.write(keep, reject_repeated)
    return Summary(counts.synapses, n_rejects, counts.synapses_by_class(), notes + counts.describe(inputs.classes))


def _convert_source(
    source: AnnotationSource, inputs: AnnotationInputs, accepted: SortedById, reject: Sink
) -> list[str]:
    """Pass the rows of one source to `accepted` and `reject`. Returns notes on the source."""
    if source.label is not None and source.label not in inputs.classes:
        raise SynpipeError(
            f"Source {source.name}: label {source.label!r} is none of the classes {', '.join(inputs.classes)}. Correct the "
            "label, or add it to `classes`. To leave its synapses unlabelled, remove `label`."
        )
    notes, count, emptied = list[str](), 0, Counter[str]()
    units = UnitCheck(source, inputs.bounds) if inputs.bounds else None
    for rows in source.read(inputs.base):
        count += rows.table.num_rows
        checked = check_rows(rows, source, inputs.classes, inputs.bounds)
        accepted.add(checked.synapses, rows.place_prefix, checked.numbers)
        if checked.rejects:
            reject(pa.concat_tables(checked.rejects))
        if units:
            units.add(checked.points_zyx, checked.inside)
        emptied += checked.emptied
        notes += rows.notes
    if count == 0:
        raise SynpipeError(f"{source.files(inputs.base)[0]} holds no synapses. Name a file that has at least one.")
    notes += [
        f"{source.name}: {number:,} synapses have a {key} that is not a number, not exact or too large; it is left empty."
        for key, number in emptied.items()
    ]
    return notes + (units.conclude() if units else [])
