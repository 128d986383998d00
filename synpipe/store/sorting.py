"""Sorts any number of synapses by id and separates repeated ids, in bounded memory.

Input: tables of synapses in file order. Output: tables in ascending order of ids, and the rows whose id an earlier row
already has. Guarantees: the first row with an id keeps it. Only ids and row numbers are held in memory, about 50 bytes per
row during sorting. Everything else lies in unnamed temporary files, which vanish however the process ends.

The rows are written to a file, then distributed to one file per range of ids, each of which fits in memory. This is a
distribution sort (Knuth, The Art of Computer Programming 3, 5.2.5).
"""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

RANGE_ROWS = 2**14  # rows per range of ids; more if there would otherwise be more than `MAX_RANGES` ranges
MAX_RANGES = 256  # number of files that are open at the same time


class SpillFile:
    """A context that writes tables to an unnamed temporary file and reads them back once."""

    def __init__(self, schema: pa.Schema, folder: Path | None):
        """folder: where the temporary file is created; None for the system's temporary folder."""
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - `__exit__` closes it
        self._writer = pa.ipc.new_stream(self._file, schema, options=pa.ipc.IpcWriteOptions(compression="lz4"))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    def add(self, table: pa.Table) -> None:
        self._writer.write_table(table)

    def read(self) -> Iterator[pa.Table]:
        """All rows in the order in which they were added, in batches. Works once, and nothing can be added afterwards."""
        self._writer.close()
        self._file.seek(0)
        for batch in pa.ipc.open_stream(self._file):
            yield pa.Table.from_batches([batch])


class SortedById:
    """A context that collects tables with the column `synapse_id` (int64, not negative) and writes them sorted by it."""

    def __init__(self, schema: pa.Schema, folder: Path | None):
        self._schema, self._folder = schema, folder
        self._unsorted = SpillFile(schema, folder)
        self._ids: list[np.ndarray] = []
        self._line_numbers: list[np.ndarray] = []
        self._prefixes: list[str] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._unsorted.__exit__(*exception)

    def add(self, table: pa.Table, prefix: str, numbers: np.ndarray) -> None:
        """Add a table. prefix, numbers: the origin of each row, such as "a.csv, line " and the line number."""
        self._unsorted.add(table)
        self._ids.append(table["synapse_id"].to_numpy())
        self._line_numbers.append(numbers)
        self._prefixes.append(prefix)

    def write(
        self,
        write_sorted: Callable[[pa.Table], object],
        write_repeated: Callable[[pa.Table, pa.Array, pa.Array], object],
    ) -> None:
        """Pass all rows to the writers.

        write_sorted: receives tables in ascending order of ids. write_repeated: receives rows with a repeated id in file
        order, the origin of each, and the origin of the row that keeps its id.
        """
        table_starts = np.cumsum([0, *map(len, self._line_numbers)])[:-1]
        numbers = _concatenate_and_clear(self._line_numbers)

        def origins(positions: np.ndarray) -> pa.Array:
            prefixes = pa.array(self._prefixes).take(np.searchsorted(table_starts, positions, side="right") - 1)
            return pc.binary_join_element_wise(prefixes, pa.array(numbers[positions]).cast(pa.string()), "")

        repeated, keepers, range_starts = _plan_ranges(_concatenate_and_clear(self._ids))
        position = 0
        with ExitStack() as stack:
            ranges = [stack.enter_context(SpillFile(self._schema, self._folder)) for _ in range_starts]
            for table in self._unsorted.read():
                here = slice(*np.searchsorted(repeated, [position, position + len(table)]))
                kept = np.full(len(table), True)
                kept[repeated[here] - position] = False
                if not kept.all():
                    write_repeated(table.filter(~kept), origins(repeated[here]), origins(keepers[here]))
                position += len(table)
                _distribute(table.filter(kept), range_starts, ranges)
            for spilled in ranges:
                rows = pa.concat_tables(spilled.read())
                write_sorted(rows.take(np.argsort(rows["synapse_id"].to_numpy())))


def _plan_ranges(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Find repeated ids and divide the ids into ranges. ids: int64 (n,).

    Returns the positions whose id occurs earlier, in ascending order; for each of them the position where its id occurs
    first; and the first id of each range.
    """
    order = np.argsort(ids, kind="stable")
    ascending = ids[order]
    later = np.flatnonzero(ascending[1:] == ascending[:-1]) + 1
    repeated, keepers = order[later], order[np.searchsorted(ascending, ascending[later])]
    in_file_order = np.argsort(repeated)
    starts = np.unique(ascending[:: max(RANGE_ROWS, -(-len(ids) // MAX_RANGES))])
    return repeated[in_file_order], keepers[in_file_order], starts


def _distribute(table: pa.Table, range_starts: np.ndarray, ranges: list[SpillFile]) -> None:
    """Append each row to the file of its range."""
    range_of_row = np.searchsorted(range_starts, table["synapse_id"].to_numpy(), side="right") - 1
    grouped = table.take(np.argsort(range_of_row, kind="stable"))
    ends = np.cumsum(np.bincount(range_of_row, minlength=len(ranges)))
    for spilled, start, end in zip(ranges, [0, *ends[:-1]], ends, strict=True):
        if end > start:
            spilled.add(grouped.slice(start, end - start))


def _concatenate_and_clear(arrays: list[np.ndarray]) -> np.ndarray:
    """Join arrays into one and empty the list, so that both copies exist only during the join."""
    joined = np.concatenate(arrays) if arrays else np.empty(0, np.int64)
    arrays.clear()
    return joined
