"""Read tables of annotations: CSV, TSV, Parquet and Feather (Arrow IPC) files.

Input: a path, and a function that chooses columns from the header. Output: Arrow tables with the chosen columns, a block
of the file at a time, plus three columns: `row` (int64, the place in the file, from 1: a line of a text file, else a
row), `ordinal` (int64, the number of the row, without header and blank lines) and, for rows that could not be read,
`problem` (string). Every row of the file is delivered once.
"""

import csv
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from synpipe.errors import SynpipeError

CSV_BLOCK_BYTES = 2**20
BATCH_ROWS = 2**14
MAX_MALFORMED_LINES = 100_000
POSITION = "position"  # the key of a column that holds x, y and z together

# Takes the path and the column names of a file, and returns the name of the column for each key. Raises `SynpipeError` if
# a column is missing.
ChooseColumns = Callable[[Path, Sequence[str]], dict[str, str]]


class _MalformedLine(NamedTuple):
    """number: its place among the lines that are not blank, from 1."""

    number: int
    n_values: int
    n_expected: int


def _read_delimited(path: Path, choose: ChooseColumns) -> Iterator[pa.Table]:
    """Read a CSV or TSV file with every value as text, so that a bad value spoils only its own row.

    Lines with a wrong number of values come last. Raises `SynpipeError` if a row is longer than one line: otherwise a
    quote that is never closed could swallow the rest of the file unnoticed.
    """
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    with open(path, newline="", encoding="utf-8-sig", errors="replace") as handle:
        header = next((line for line in csv.reader(handle, delimiter=delimiter) if line), [])
    columns = choose(path, header)
    lines = _line_numbers(path)
    malformed: list[_MalformedLine] = []

    def set_aside(row: pa_csv.InvalidRow) -> str:
        malformed.append(_MalformedLine(row.number, row.actual_columns, row.expected_columns))
        return "skip" if len(malformed) <= MAX_MALFORMED_LINES else "error"

    reader = pa_csv.open_csv(
        path,
        # pyarrow reports the number of a malformed row only when it reads in one thread.
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
        # For each malformed row, the number of good rows before it. Row k of the good rows comes after the malformed
        # rows that have at most k good rows before them.
        good_before = np.array([line.number - 2 - index for index, line in enumerate(malformed)], dtype=np.int64)
        ordinals = rows + 1 + np.searchsorted(good_before, rows, side="right")
        table = pa.table({key: batch[column] for key, column in columns.items()})
        yield _add_places(table, lines.take(ordinals, mode="clip"), ordinals)
    if 1 + count + len(malformed) != len(lines):
        raise SynpipeError(
            f"{path} has {len(lines):,} lines but, with the header, {1 + count + len(malformed):,} rows: a quoted "
            "value runs over several lines. Close the quote, remove the line breaks from the values, or convert the file "
            "to Parquet."
        )
    problems = [f"it has {line.n_values} values, the header {line.n_expected}" for line in malformed]
    ordinals = np.array([line.number - 1 for line in malformed], dtype=np.int64)
    yield _add_places(pa.table({"problem": pa.array(problems, pa.string())}), lines.take(ordinals), ordinals)


def _add_places(table: pa.Table, rows: np.ndarray, ordinals: np.ndarray) -> pa.Table:
    return table.append_column("row", pa.array(rows)).append_column("ordinal", pa.array(ordinals))


def _line_numbers(path: Path) -> np.ndarray:
    """The number of each line that is not blank, starting with the header. pyarrow does not count blank lines."""
    # latin-1 decodes any byte, and text mode recognises every kind of line ending.
    with open(path, encoding="latin-1") as handle:
        return np.fromiter((number for number, line in enumerate(handle, start=1) if line != "\n"), dtype=np.int64)


def _read_parquet(path: Path, choose: ChooseColumns) -> Iterator[pa.Table]:
    # Reading is buffered because a row group may be the whole file. The file is not memory-mapped because the pages that
    # were read would stay in memory.
    file = pq.ParquetFile(path, buffer_size=2**20, pre_buffer=False)
    columns = choose(path, file.schema_arrow.names)
    batches = file.iter_batches(BATCH_ROWS, columns=list(dict.fromkeys(columns.values())))
    yield from _convert_batches(path, columns, batches)


def _read_feather(path: Path, choose: ChooseColumns) -> Iterator[pa.Table]:
    names = pa.ipc.open_file(path).schema.names
    columns = choose(path, names)
    options = pa.ipc.IpcReadOptions(included_fields=sorted({names.index(column) for column in columns.values()}))
    reader = pa.ipc.open_file(path, options=options)
    batches = (reader.get_batch(index) for index in range(reader.num_record_batches))
    # Some libraries write the whole file as one batch.
    pieces = (batch.slice(start, BATCH_ROWS) for batch in batches for start in range(0, batch.num_rows, BATCH_ROWS))
    yield from _convert_batches(path, columns, pieces)


def _convert_batches(path: Path, columns: Mapping[str, str], batches: Iterator[pa.RecordBatch]) -> Iterator[pa.Table]:
    first = 1
    for batch in batches:
        table = pa.table({key: _convert_column(path, key, name, batch[name]) for key, name in columns.items()})
        rows = np.arange(first, first + batch.num_rows)
        yield _add_places(table, rows, rows)
        first += batch.num_rows


def _convert_column(path: Path, key: str, name: str, column: pa.Array) -> pa.Array:
    """Keep integers, floats and lists of a position; turn decimals, dictionaries and other kinds of string into strings.

    Raises `SynpipeError` if the column holds anything else.
    """
    kind = column.type
    if key == POSITION and (
        pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    ):
        return column.cast(pa.list_(_convert_column(path, "", name, column.flatten()[:0]).type))
    if pa.types.is_integer(kind) or pa.types.is_floating(kind):
        return column
    try:
        return column.cast(pa.string())
    except (pa.ArrowNotImplementedError, pa.ArrowInvalid):
        raise SynpipeError(f"{path}: column `{name}` holds {kind}. Convert it to numbers or text.") from None


# For each suffix: what `row` counts (for messages), and the function that reads the file.
TABLE_READERS: dict[str, tuple[str, Callable[[Path, ChooseColumns], Iterator[pa.Table]]]] = {
    ".csv": ("line", _read_delimited),
    ".tsv": ("line", _read_delimited),
    ".parquet": ("row", _read_parquet),
    ".feather": ("row", _read_feather),
}
