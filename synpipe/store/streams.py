"""Tables of the store a part at a time: by shard, or by synapse id; and the digest of what they hold.

In: Parquet files of the store, or their parts in any order. Out: parts as Arrow tables. Guarantee: in memory are a shard, or
a batch of `BATCH_ROWS`, and where rows are looked up by id, 16 bytes of each: its id and its place. What is looked up
lies in a temporary file without a name, mapped into memory, which vanishes however the process ends.
"""

import hashlib
import json
import mmap
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from synpipe.specs import digest
from synpipe.store.files import reading

BATCH_ROWS = 8192
# A part that is looked into: larger ones take more memory while they are written, smaller ones more time to take rows of.
LOOKED_UP_ROWS = 2**16


def read_parts(path: Path, columns: list[str] | None = None) -> Iterator[pa.Table]:
    """One Parquet file of the store, a batch at a time; one empty table where it has no rows.

    Raises `SynpipeError` where it is absent, or damaged: it is then moved aside.
    """
    with reading(path):
        file = pq.ParquetFile(path, memory_map=True, page_checksum_verification=True)
        if file.metadata.num_rows == 0:
            yield file.read(columns=columns)
        for batch in file.iter_batches(BATCH_ROWS, columns=columns):
            yield pa.Table.from_batches([batch])


def column_of(path: Path, ids: np.ndarray, name: str) -> np.ndarray:
    """A column of the rows with these ids, ascending: object (n,), None where it is null or there is no row.

    Equal values are one object: eight bytes a row.
    """
    found = np.full(len(ids), None, dtype=object)
    objects: dict[Any, Any] = {}
    for part in read_parts(path, ["synapse_id", name]):
        places, wanted = places_among(ids, part)
        encoded = part[name].combine_chunks().dictionary_encode()
        values = [*(objects.setdefault(value, value) for value in encoded.dictionary.to_pylist()), None]
        codes = pc.fill_null(encoded.indices, len(values) - 1).to_numpy()
        found[places[wanted]] = np.array(values, dtype=object)[codes[wanted]]
    return found


def places_among(ids: np.ndarray, rows: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    """For each row its place in `ids`, ascending, by its `synapse_id`: int64 (n,); and whether it is there at all: bool (n,)."""
    own = rows["synapse_id"].to_numpy()
    places = np.searchsorted(ids, own)
    places[places == len(ids)] = 0
    return places, ids[places] == own if len(ids) else np.zeros(len(rows), dtype=bool)


def by_shard(parts: Iterable[pa.Table]) -> Iterator[tuple[int, pa.Table]]:
    """Number and rows of each shard, of parts with the column `shard`, the rows of a shard being together in them."""
    held: list[pa.Table] = []
    number = -1
    for part in parts:
        for shard, rows in _runs(part["shard"].to_numpy()):
            if held and shard != number:
                yield number, pa.concat_tables(held).combine_chunks()
                held = []
            number = shard
            held.append(part.slice(rows.start, rows.stop - rows.start))
    if held:
        yield number, pa.concat_tables(held).combine_chunks()


def _runs(numbers: np.ndarray) -> Iterator[tuple[int, slice]]:
    """Each number, int (n,), and where it stands, with its like beside it."""
    starts = np.flatnonzero(np.diff(numbers, prepend=numbers[:1] - 1))
    for start, end in zip(starts.tolist(), [*starts[1:].tolist(), len(numbers)], strict=False):
        yield int(numbers[start]), slice(start, end)


class RowsById:
    """A context in which rows with a `synapse_id` are taken by that, in any order."""

    def __init__(self, parts: Iterable[pa.Table], folder: Path | None = None):
        """folder: where the temporary file is made, as large as the rows; by default the system's."""
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - `__exit__` closes it
        self._starts = [0]
        ids: list[np.ndarray] = []
        for table in _together(parts):
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
        found = np.concatenate(ids)
        self._order = np.argsort(found, kind="stable")
        self._ids = found[self._order]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()  # the mapping goes with the last table that was taken

    def __len__(self) -> int:
        return len(self._ids)

    def knows(self, ids: np.ndarray) -> np.ndarray:
        """Whether there is a row of each id: bool (n,)."""
        places = np.searchsorted(self._ids, ids)
        return (places < len(self._ids)) & (
            self._ids[np.minimum(places, len(self._ids) - 1)] == ids if len(self) else False
        )

    def take(self, ids: np.ndarray) -> pa.Table:
        """The rows of these ids, int64 (n,), in their order; all null for one that has none."""
        known = self.knows(ids)
        wanted = self._order[np.searchsorted(self._ids, ids[known])]
        part_of = np.searchsorted(self._starts, wanted, side="right") - 1
        order = np.argsort(part_of, kind="stable")
        taken = [
            self._reader.get_batch(part).take(pa.array(wanted[order[rows]] - self._starts[part]))
            for part, rows in _runs(part_of[order])
        ]
        place = np.zeros(len(ids), np.int64)
        place[np.flatnonzero(known)[order]] = np.arange(len(order))
        found = pa.Table.from_batches(taken, self.schema).combine_chunks()
        return found.take(pa.array(place, mask=~known))


def _together(parts: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """The same rows as tables of one chunk and about `LOOKED_UP_ROWS`; at least one."""
    held: list[pa.Table] = []
    written = False
    for part in parts:
        held.append(part)
        if sum(map(len, held)) >= LOOKED_UP_ROWS:
            yield pa.concat_tables(held).combine_chunks()
            held, written = [], True
    if held and (any(map(len, held)) or not written):
        yield pa.concat_tables(held).combine_chunks()


class SmallestHashes:
    """Of rows that come a part at a time those with the smallest keys: a sample at random that is always the same.

    keys: columns that decide, the first being a content hash; rows that are alike in all of them are taken once.
    """

    def __init__(self, keys: list[str], most: int):
        self._keys, self._most = keys, most
        self._kept: list[pa.Table] = []
        self._largest: pa.Scalar | None = None  # hash that is too large to be one of them

    def add(self, rows: pa.Table) -> None:
        if self._largest is not None:
            rows = rows.filter(pc.less_equal(rows[self._keys[0]], self._largest))
        self._kept.append(rows)
        if sum(map(len, self._kept)) >= 2 * self._most:
            kept = self.rows()
            self._kept = [kept]
            if len(kept) == self._most:
                self._largest = kept[self._keys[0]][-1]

    def rows(self) -> pa.Table:
        """In the order of the keys."""
        kept = pa.concat_tables(self._kept)
        others = [name for name in kept.column_names if name not in self._keys]
        once = kept.group_by(self._keys, use_threads=False).aggregate([(name, "min") for name in others])
        once = once.rename_columns([name.removesuffix("_min") for name in once.column_names]).select(kept.column_names)
        return once.sort_by([(key, "ascending") for key in self._keys]).slice(0, self._most).combine_chunks()


class ContentDigest:
    """Digest of rows that come a part at a time: the same however they are cut, another where a value or its place is."""

    def __init__(self) -> None:
        self._hashes: dict[str, Any] = {}

    def add(self, rows: pa.Table) -> None:
        for name in rows.column_names:
            text = json.dumps(rows[name].to_pylist(), separators=(",", ":"), ensure_ascii=False)
            self._hashes.setdefault(name, hashlib.sha256()).update((text[1:-1] + ",").encode() if len(rows) else b"")

    def value(self) -> str:
        return digest({name: found.hexdigest() for name, found in self._hashes.items()})


def in_blocks(parts: Iterable[pa.Table], rows: int, work: Callable[[pa.Table], None]) -> None:
    """Give all rows to `work`, `rows` at a time."""
    held: list[pa.Table] = []
    for part in parts:
        held.append(part)
        while (count := sum(map(len, held))) >= rows:
            together = pa.concat_tables(held)
            work(together.slice(0, rows))
            held = [together.slice(rows)] if count > rows else []
    if any(map(len, held)):
        work(pa.concat_tables(held))
