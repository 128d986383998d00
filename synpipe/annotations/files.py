"""What annotation files hold, untyped: rows of CSV, TSV, Parquet and Feather (Arrow IPC) files, objects of JSON files.

In: a path and, for tables, a function that says which of the file's columns are wanted. Out: Arrow tables of those
columns, a block of the file at a time, with `row` (int64, the place in the file, from 1) and, of rows that could not be
read, `problem`; or the pairs of a JSON object. Guarantee: every row and every pair of the file is delivered once.
"""

import csv
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from synpipe.errors import SynpipeError

CSV_BLOCK_BYTES = 2**20
BATCH_ROWS = 2**14
MAX_MALFORMED_LINES = 100_000
POSITION = "position"  # the key of a column that holds x, y and z together


@contextmanager
def damage_reported(path: Path) -> Iterator[None]:
    """Turn what the libraries raise on a bad file into a `SynpipeError` that names the file."""
    try:
        yield
    except (pa.ArrowException, csv.Error, OSError, ValueError, TypeError, RuntimeError) as error:
        raise SynpipeError(
            f"{path} is truncated or damaged, or not what its name says ({' '.join(str(error).split())}): copy or "
            "export it again."
        ) from None


def numbered(table: pa.Table, first: int = 1) -> pa.Table:
    """The table with its rows numbered from `first` in `row`."""
    return table.append_column("row", pa.array(np.arange(first, first + table.num_rows)))


def _json(path: Path) -> Any:
    """Objects as tuples of pairs, arrays as lists, numbers as they are written."""
    with damage_reported(path):
        return json.loads(path.read_bytes(), object_pairs_hook=tuple, parse_int=str, parse_float=str)


def json_object(path: Path) -> tuple[tuple[str, Any], ...]:
    """The pairs of the object at the top level, in file order and with repeated keys.

    Objects arrive as tuples of pairs (arrays as lists): a dict would drop a repeated synapse id without a word. Numbers
    arrive as they are written.
    """
    content = _json(path)
    if not isinstance(content, tuple):
        raise SynpipeError(f"{path} must hold one object with ids as keys at the top level: name a synister v3 file.")
    return content


def json_array(path: Path) -> list[Any]:
    """The entries of the array at the top level, as in `json_object`."""
    content = _json(path)
    if not isinstance(content, list):
        raise SynpipeError(f"{path} must hold one list of synapses at the top level: name a synful file.")
    return content


def json_records(path: Path) -> dict[str | None, dict[str, Any]]:
    """An object of objects. Raises `SynpipeError` where a key comes twice or an entry is no object."""
    records: dict[str | None, dict[str, Any]] = {}
    for key, value in json_object(path):
        if key in records or not isinstance(value, tuple):
            problem = "is there twice" if key in records else "is not an object"
            raise SynpipeError(f"{path}: key {key!r} {problem}: correct the file.")
        records[key] = dict(value)
    return records


# From the path and the names of a file's columns to the column for each key; raises where one is missing.
ChooseColumns = Callable[[Path, Sequence[str]], dict[str, str]]


def _read_delimited(path: Path, choose: ChooseColumns) -> Iterator[pa.Table]:
    """Every value as text, so that one bad value is one bad row; lines with a wrong number of values come last.

    One line is one row, so that a quote which is never closed cannot swallow the rest of the file unseen.
    """
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    with open(path, newline="", encoding="utf-8-sig", errors="replace") as handle:
        header = next((line for line in csv.reader(handle, delimiter=delimiter) if line), [])
    columns = choose(path, header)
    lines = _line_numbers(path)
    # Number among the lines that are not blank, values that it has, values that it should have.
    malformed: list[tuple[int, int, int]] = []

    def set_aside(row: pa_csv.InvalidRow) -> str:
        malformed.append((row.number, row.actual_columns, row.expected_columns))
        return "skip" if len(malformed) <= MAX_MALFORMED_LINES else "error"

    reader = pa_csv.open_csv(
        path,
        # pyarrow gives the number of a malformed row only when it reads in one thread.
        pa_csv.ReadOptions(use_threads=False, block_size=CSV_BLOCK_BYTES),
        pa_csv.ParseOptions(delimiter=delimiter, newlines_in_values=True, invalid_row_handler=set_aside),
        pa_csv.ConvertOptions(
            include_columns=list(dict.fromkeys(columns.values())),
            column_types=dict.fromkeys(columns.values(), pa.string()),
        ),
    )
    count = 0
    for batch in reader:
        rows = np.arange(count, count + batch.num_rows)
        count += batch.num_rows
        # Row k of those that pyarrow delivers stands after the malformed rows with fewer than k + 1 good rows before.
        good_before = np.array([number - 2 - index for index, (number, _, _) in enumerate(malformed)], dtype=np.int64)
        ordinals = rows + 1 + np.searchsorted(good_before, rows, side="right")
        table = pa.table({key: batch[column] for key, column in columns.items()})
        yield _placed(table, lines.take(ordinals, mode="clip"), ordinals)
    if 1 + count + len(malformed) != len(lines):
        raise SynpipeError(
            f"{path} has {len(lines):,} lines but, with the header, {1 + count + len(malformed):,} rows: a quoted "
            "value runs over several lines. Close the quote, take the line ends out of the values, or convert to Parquet."
        )
    problems = [f"it has {actual} values, the header {expected}" for _, actual, expected in malformed]
    ordinals = np.array([number - 1 for number, _, _ in malformed], dtype=np.int64)
    yield _placed(pa.table({"problem": pa.array(problems, pa.string())}), lines.take(ordinals), ordinals)


def _placed(table: pa.Table, places: np.ndarray, ordinals: np.ndarray) -> pa.Table:
    return table.append_column("row", pa.array(places)).append_column("ordinal", pa.array(ordinals))


def _line_numbers(path: Path) -> np.ndarray:
    """Number of each line that is not blank, the header first: pyarrow does not count blank lines."""
    with open(path, encoding="latin-1") as handle:  # decodes any byte, and knows every kind of line end
        return np.fromiter((number for number, line in enumerate(handle, start=1) if line != "\n"), dtype=np.int64)


def _read_parquet(path: Path, choose: ChooseColumns) -> Iterator[pa.Table]:
    # Buffered: a row group may be the whole file. Not mapped: what was read would stay in memory.
    file = pq.ParquetFile(path, buffer_size=2**20, pre_buffer=False)
    columns = choose(path, file.schema_arrow.names)
    yield from _typed_rows(path, columns, file.iter_batches(BATCH_ROWS, columns=list(dict.fromkeys(columns.values()))))


def _read_feather(path: Path, choose: ChooseColumns) -> Iterator[pa.Table]:
    names = pa.ipc.open_file(path).schema.names
    columns = choose(path, names)
    wanted = pa.ipc.IpcReadOptions(included_fields=sorted({names.index(column) for column in columns.values()}))
    reader = pa.ipc.open_file(path, options=wanted)
    batches = (reader.get_batch(index) for index in range(reader.num_record_batches))
    # Some libraries write the whole file as one batch.
    pieces = (batch.slice(start, BATCH_ROWS) for batch in batches for start in range(0, batch.num_rows, BATCH_ROWS))
    yield from _typed_rows(path, columns, pieces)


def _typed_rows(path: Path, columns: Mapping[str, str], batches: Iterator[pa.RecordBatch]) -> Iterator[pa.Table]:
    first = 1
    for batch in batches:
        table = pa.table({key: _readable(path, key, name, batch[name]) for key, name in columns.items()})
        rows = np.arange(first, first + batch.num_rows)
        yield _placed(table, rows, rows)
        first += batch.num_rows


def _readable(path: Path, key: str, name: str, column: pa.Array) -> pa.Array:
    """Integers, floats and lists of a position as they are; decimals, dictionaries and other kinds of string as string."""
    kind = column.type
    if key == POSITION and (
        pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    ):
        return column.cast(pa.list_(_readable(path, "", name, column.flatten()[:0]).type))
    if pa.types.is_integer(kind) or pa.types.is_floating(kind):
        return column
    try:
        return column.cast(pa.string())
    except (pa.ArrowNotImplementedError, pa.ArrowInvalid):
        raise SynpipeError(f"{path}: column `{name}` holds {kind}: numbers or text are needed.") from None


# For each suffix, what `row` counts, for messages, and the reader.
TABLE_READERS: dict[str, tuple[str, Callable[[Path, ChooseColumns], Iterator[pa.Table]]]] = {
    ".csv": ("line", _read_delimited),
    ".tsv": ("line", _read_delimited),
    ".parquet": ("row", _read_parquet),
    ".feather": ("row", _read_feather),
}
