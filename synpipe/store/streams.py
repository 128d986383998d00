"""Reads tables of the store in batches, by shard or by synapse id, and digests their content, in bounded memory.

Input: Parquet files of the store, or batches of their rows in any order. Output: Arrow tables. Guarantee: memory holds one
shard, or one batch of `BATCH_ROWS`. Looking rows up by id also takes 16 bytes per row, for its id and its position; the
rows themselves lie in an unnamed temporary file that is mapped into memory and vanishes however the process ends.
"""

import hashlib
import json
import mmap
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from synpipe.specs import digest
from synpipe.store.files import check_columns, explaining_read_errors

BATCH_ROWS = 8192
# Rows per batch in the file of `RowsById`. Larger batches take more memory to write; smaller ones take more time to read.
LOOKUP_BATCH_ROWS = 2**16


def read_batches(path: Path, columns: list[str] | None = None) -> Iterator[pa.Table]:
    """Read one Parquet file of the store in batches of `BATCH_ROWS`. A file without rows gives one empty table.

    Raises `SynpipeError` if the file is absent or damaged; a damaged file is moved aside.
    """
    with explaining_read_errors(path):
        file = pq.ParquetFile(path, memory_map=True, page_checksum_verification=True)
        check_columns(path, file, columns)
        if file.metadata.num_rows == 0:
            yield file.read(columns=columns)
        for batch in file.iter_batches(BATCH_ROWS, columns=columns):
            yield pa.Table.from_batches([batch])


def column_of(path: Path, ids: np.ndarray, name: str) -> np.ndarray:
    """Values of one column for the rows with these ids. ids: int64 (n,), ascending.

    Returns object (n,), with None where the value is null or no row has the id. Equal values are the same object, so a
    row takes eight bytes.
    """
    values_of_ids = np.full(len(ids), None, dtype=object)
    objects: dict[Any, Any] = {}
    for batch in read_batches(path, ["synapse_id", name]):
        places, wanted = places_among(ids, batch)
        encoded = batch[name].combine_chunks().dictionary_encode()
        values = [*(objects.setdefault(value, value) for value in encoded.dictionary.to_pylist()), None]
        codes = pc.fill_null(encoded.indices, len(values) - 1).to_numpy()
        values_of_ids[places[wanted]] = np.array(values, dtype=object)[codes[wanted]]
    return values_of_ids


def places_among(ids: np.ndarray, rows: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    """Look up the `synapse_id` of each row in `ids`, which are ascending.

    Returns int64 (n,), the index of each row's id in `ids`, and bool (n,), whether `ids` contains it. Where it does not,
    the index is meaningless.
    """
    own = rows["synapse_id"].to_numpy()
    places = np.searchsorted(ids, own)
    places[places == len(ids)] = 0
    return places, ids[places] == own if len(ids) else np.zeros(len(rows), dtype=bool)


def by_shard(batches: Iterable[pa.Table]) -> Iterator[tuple[int, pa.Table]]:
    """Regroup batches by shard: yields the number and the rows of each shard.

    batches: tables with the column `shard`; the rows of a shard must follow one another.
    """
    pending: list[pa.Table] = []
    pending_shard = -1
    for batch in batches:
        for shard, rows in _runs(batch["shard"].to_numpy()):
            if pending and shard != pending_shard:
                yield pending_shard, pa.concat_tables(pending).combine_chunks()
                pending = []
            pending_shard = shard
            pending.append(batch.slice(rows.start, rows.stop - rows.start))
    if pending:
        yield pending_shard, pa.concat_tables(pending).combine_chunks()


def _runs(numbers: np.ndarray) -> Iterator[tuple[int, slice]]:
    """Each run of equal numbers in an int (n,) array: the number and where the run lies."""
    starts = np.flatnonzero(np.diff(numbers, prepend=numbers[:1] - 1))
    for start, end in zip(starts.tolist(), [*starts[1:].tolist(), len(numbers)], strict=False):
        yield int(numbers[start]), slice(start, end)


class RowsById:
    """A context that stores rows with the column `synapse_id` and looks them up by id, in any order."""

    def __init__(self, batches: Iterable[pa.Table], folder: Path | None = None):
        """batches: at least one table. folder: where the temporary file is created, which is as large as the rows; None for
        the system's temporary folder."""
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - `__exit__` closes it
        self._starts = [0]
        ids: list[np.ndarray] = []
        for table in _merge_small(batches):
            if not ids:
                writer = pa.ipc.new_file(self._file, table.schema)
            ids.append(table["synapse_id"].to_numpy())
            writer.write_table(table)
            self._starts.append(self._starts[-1] + len(table))
        writer.close()
        self._file.flush()
        self._mapped = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ)
        self._reader = pa.ipc.open_file(pa.BufferReader(pa.py_buffer(self._mapped)))
        self.schema: pa.Schema = self._reader.schema
        all_ids = np.concatenate(ids)
        self._order = np.argsort(all_ids, kind="stable")
        self._ids = all_ids[self._order]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()  # the mapping is released with the last table that refers to it

    def __len__(self) -> int:
        return len(self._ids)

    def knows(self, ids: np.ndarray) -> np.ndarray:
        """Whether there is a row for each id: bool (n,)."""
        places = np.searchsorted(self._ids, ids)
        return (places < len(self._ids)) & (
            self._ids[np.minimum(places, len(self._ids) - 1)] == ids if len(self) else False
        )

    def take(self, ids: np.ndarray) -> pa.Table:
        """The rows with these ids, int64 (n,), in the same order. A row is all null if there is none with its id."""
        known = self.knows(ids)
        positions = self._order[np.searchsorted(self._ids, ids[known])]
        batch_of_row = np.searchsorted(self._starts, positions, side="right") - 1
        order = np.argsort(batch_of_row, kind="stable")
        taken = [
            self._reader.get_batch(batch).take(pa.array(positions[order[rows]] - self._starts[batch]))
            for batch, rows in _runs(batch_of_row[order])
        ]
        place = np.zeros(len(ids), np.int64)
        place[np.flatnonzero(known)[order]] = np.arange(len(order))
        rows_by_batch = pa.Table.from_batches(taken, self.schema).combine_chunks()
        return rows_by_batch.take(pa.array(place, mask=~known))


def _merge_small(batches: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """Merge batches into contiguous tables of about `LOOKUP_BATCH_ROWS`; yields at least one table."""
    pending: list[pa.Table] = []
    is_first = True
    for batch in batches:
        pending.append(batch)
        if sum(map(len, pending)) >= LOOKUP_BATCH_ROWS:
            yield pa.concat_tables(pending).combine_chunks()
            pending, is_first = [], False
    if pending and (any(map(len, pending)) or is_first):
        yield pa.concat_tables(pending).combine_chunks()


class SmallestHashes:
    """Keeps the rows with the smallest keys of all batches: a random sample that is the same in every run.

    keys: columns that decide, the first of which is a content hash. Rows that agree in all keys are kept once.
    """

    def __init__(self, keys: list[str], count: int):
        """count: number of rows to keep."""
        self._keys, self._count = keys, count
        self._candidates: list[pa.Table] = []
        self._largest: pa.Scalar | None = None  # no row with a larger hash can be in the sample

    def add(self, rows: pa.Table) -> None:
        if self._largest is not None:
            rows = rows.filter(pc.less_equal(rows[self._keys[0]], self._largest))
        self._candidates.append(rows)
        if sum(map(len, self._candidates)) >= 2 * self._count:
            sample = self.rows()
            self._candidates = [sample]
            if len(sample) == self._count:
                self._largest = sample[self._keys[0]][-1]

    def rows(self) -> pa.Table:
        """The sample, sorted by the keys."""
        candidates = pa.concat_tables(self._candidates)
        others = [name for name in candidates.column_names if name not in self._keys]
        unique = candidates.group_by(self._keys, use_threads=False).aggregate([(name, "min") for name in others])
        unique = unique.rename_columns([name.removesuffix("_min") for name in unique.column_names])
        unique = unique.select(candidates.column_names)
        return unique.sort_by([(key, "ascending") for key in self._keys]).slice(0, self._count).combine_chunks()


class ContentDigest:
    """Digest of a table that arrives in batches.

    It does not depend on how the table is cut into batches. It changes if a value, or the order of the rows, changes.
    """

    def __init__(self) -> None:
        self._hashes: dict[str, Any] = {}

    def add(self, rows: pa.Table) -> None:
        for name in rows.column_names:
            text = json.dumps(rows[name].to_pylist(), separators=(",", ":"), ensure_ascii=False)
            self._hashes.setdefault(name, hashlib.sha256()).update((text[1:-1] + ",").encode() if len(rows) else b"")

    def value(self) -> str:
        return digest({name: column.hexdigest() for name, column in self._hashes.items()})


def rebatch(batches: Iterable[pa.Table], rows: int) -> Iterator[pa.Table]:
    """Cut batches of any size into batches of `rows` rows; the last one may be smaller."""
    pending: list[pa.Table] = []
    for batch in batches:
        pending.append(batch)
        while (count := sum(map(len, pending))) >= rows:
            merged = pa.concat_tables(pending)
            yield merged.slice(0, rows)
            pending = [merged.slice(rows)] if count > rows else []
    if any(map(len, pending)):
        yield pa.concat_tables(pending)
