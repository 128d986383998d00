"""Read JSON annotation files, and turn their entries into a table of strings.

The files are read whole: they hold some 100,000 synapses, and an entry needs about 5 kB of memory. JSON objects become
tuples of (key, value) pairs, because a dictionary would silently drop a repeated synapse id. Numbers stay as the file
writes them, so that large ids are exact.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from synpipe.annotations.files import explain_damage, number_rows
from synpipe.annotations.source import COLUMNS
from synpipe.errors import SynpipeError

Row = dict[str, str | None]


def _read_json(path: Path) -> Any:
    with explain_damage(path):
        return json.loads(path.read_bytes(), object_pairs_hook=tuple, parse_int=str, parse_float=str)


def read_object(path: Path) -> tuple[tuple[str, Any], ...]:
    """Return the pairs of the object at the top level, in file order, with repeated keys.

    Raises `SynpipeError` if the file is damaged or its top level is not an object.
    """
    content = _read_json(path)
    if not isinstance(content, tuple):
        raise SynpipeError(f"{path} must hold one JSON object with ids as keys at the top level. Name another file.")
    return content


def read_list(path: Path) -> list[Any]:
    """Return the entries of the list at the top level; objects among them are tuples of pairs.

    Raises `SynpipeError` if the file is damaged or its top level is not a list.
    """
    content = _read_json(path)
    if not isinstance(content, list):
        raise SynpipeError(f"{path} must hold one JSON list of synapses at the top level. Name another file.")
    return content


def read_records(path: Path) -> dict[str | None, dict[str, Any]]:
    """Return an object of objects. Raises `SynpipeError` if a key is repeated or an entry is not an object."""
    records: dict[str | None, dict[str, Any]] = {}
    for key, value in read_object(path):
        if key in records or not isinstance(value, tuple):
            problem = "occurs twice" if key in records else "is not an object"
            raise SynpipeError(f"{path}: key {key!r} {problem}. Correct the file.")
        records[key] = dict(value)
    return records


def to_text(value: Any) -> str | None:
    return None if value is None else str(value)


def to_names(value: Any) -> list[str]:
    """The distinct names in a JSON value that is null, one string or a list of strings."""
    values = value if isinstance(value, list) else [value]
    return list(dict.fromkeys(str(name) for name in values if name is not None))


def build_table(rows: Sequence[Mapping[str, str | None]]) -> pa.Table:
    """Build the table of a `Rows`: a string column for each of `COLUMNS` and for `problem`, and the number of each row."""
    keys = (*COLUMNS, "problem")
    return number_rows(pa.table({key: pa.array([row.get(key) for row in rows], pa.string()) for key in keys}))


def is_unicode(texts: Iterable[str | None]) -> bool:
    """Whether every text can be encoded as UTF-8.

    The JSON escape \\ud800, for example, makes a lone surrogate, which UTF-8 does not allow (RFC 3629, section 3).
    """
    try:
        "".join(text for text in texts if text is not None).encode()
    except UnicodeEncodeError:
        return False
    return True


def unreadable_row(synapse_id: str | None) -> Row:
    """The row of an entry whose text is not Unicode: no Arrow string, file or terminal can hold such a text."""
    return {
        "synapse_id": None if synapse_id is None else synapse_id.encode(errors="backslashreplace").decode(),
        "problem": "it, its neuron or its hemilineage has a text with half a character (a lone surrogate)",
    }
