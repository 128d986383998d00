"""Synapses of any number, sorted by id and without repeated ids, in bounded memory.

In: tables of synapses in file order. Out: tables that follow one another in the order of ids; and the rows whose id an
earlier row has. Guarantee: the first row of an id keeps it; only ids and row numbers are held in memory (about 50 bytes a
row while they are sorted), everything else lies in temporary files without a name, which vanish however the process ends.

The rows are set aside, then dealt out to one file per range of ids, each of which fits in memory: a distribution sort
(Knuth, The Art of Computer Programming 3, 5.2.5).
"""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

RANGE_ROWS = 2**14  # or more, where these would be more than `MAX_RANGES`
MAX_RANGES = 256  # as many files are open at a time


class SetAside:
    """A context in which tables are put on disk and given back. folder: where the temporary file is made."""

    def __init__(self, schema: pa.Schema, folder: Path | None):
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - `__exit__` closes it
        self._writer = pa.ipc.new_stream(self._file, schema, options=pa.ipc.IpcWriteOptions(compression="lz4"))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    def add(self, table: pa.Table) -> None:
        self._writer.write_table(table)

    def read(self) -> Iterator[pa.Table]:
        """What was added, in that order, a part at a time. Once, and after it no more can be added."""
        self._writer.close()
        self._file.seek(0)
        for batch in pa.ipc.open_stream(self._file):
            yield pa.Table.from_batches([batch])


class SortedById:
    """A context in which tables with the column `synapse_id` (int64, not negative) are added, then written sorted."""

    def __init__(self, schema: pa.Schema, folder: Path | None):
        self._schema, self._folder = schema, folder
        self._aside = SetAside(schema, folder)
        self._ids: list[np.ndarray] = []
        self._numbers: list[np.ndarray] = []
        self._places: list[str] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._aside.__exit__(*exception)

    def add(self, table: pa.Table, place: str, numbers: np.ndarray) -> None:
        """place, numbers: where each row comes from, such as "a.csv, line " and its number."""
        self._aside.add(table)
        self._ids.append(table["synapse_id"].to_numpy())
        self._numbers.append(numbers)
        self._places.append(place)

    def write(
        self,
        write_sorted: Callable[[pa.Table], object],
        write_repeated: Callable[[pa.Table, pa.Array, pa.Array], object],
    ) -> None:
        """write_repeated: takes rows, in file order, their places, and the places of the rows that keep their ids."""
        place_starts = np.cumsum([0, *map(len, self._numbers)])[:-1]
        numbers = _emptied(self._numbers)

        def places(positions: np.ndarray) -> pa.Array:
            before = pa.array(self._places).take(np.searchsorted(place_starts, positions, side="right") - 1)
            return pc.binary_join_element_wise(before, pa.array(numbers[positions]).cast(pa.string()), "")

        repeated, keepers, range_starts = _plan(_emptied(self._ids))
        position = 0
        with ExitStack() as stack:
            ranges = [stack.enter_context(SetAside(self._schema, self._folder)) for _ in range_starts]
            for table in self._aside.read():
                here = slice(*np.searchsorted(repeated, [position, position + len(table)]))
                kept = np.full(len(table), True)
                kept[repeated[here] - position] = False
                if not kept.all():
                    write_repeated(table.filter(~kept), places(repeated[here]), places(keepers[here]))
                position += len(table)
                _deal(table.filter(kept), range_starts, ranges)
            for part in ranges:
                rows = pa.concat_tables(part.read())
                write_sorted(rows.take(np.argsort(rows["synapse_id"].to_numpy())))


def _plan(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Positions whose id is there before, ascending; the first position of that id for each; first ids of the ranges."""
    order = np.argsort(ids, kind="stable")
    ascending = ids[order]
    later = np.flatnonzero(ascending[1:] == ascending[:-1]) + 1
    repeated, keepers = order[later], order[np.searchsorted(ascending, ascending[later])]
    in_file_order = np.argsort(repeated)
    starts = np.unique(ascending[:: max(RANGE_ROWS, -(-len(ids) // MAX_RANGES))])
    return repeated[in_file_order], keepers[in_file_order], starts


def _deal(table: pa.Table, range_starts: np.ndarray, ranges: list[SetAside]) -> None:
    of_range = np.searchsorted(range_starts, table["synapse_id"].to_numpy(), side="right") - 1
    grouped = table.take(np.argsort(of_range, kind="stable"))
    ends = np.cumsum(np.bincount(of_range, minlength=len(ranges)))
    for part, start, end in zip(ranges, [0, *ends[:-1]], ends, strict=True):
        if end > start:
            part.add(grouped.slice(start, end - start))


def _emptied(arrays: list[np.ndarray]) -> np.ndarray:
    """The arrays as one; the list lets go of them, so that they are not held twice for longer than it takes."""
    joined = np.concatenate(arrays) if arrays else np.empty(0, np.int64)
    arrays.clear()
    return joined
