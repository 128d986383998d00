"""Columns of annotation files, typed: from what a file holds to what `SYNAPSE_SCHEMA` says.

In: one Arrow column of strings, integers or floats. Out: text, float64, exact int64 ids or class names, of the same
length. Guarantee: no value raises; one that is absent, of another kind or, for an id, not exact becomes null or NaN.
"""

import difflib
from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

MAX_ID = 2**63 - 1
# Above 2^53 - 1 a float64 no longer tells neighbouring integers apart (IEEE 754): such an id may be another synapse's.
MAX_ID_AS_FLOAT = 2**53 - 1

# What exports write for "no value", in lower case: pandas, R, SQL, Python, synister.
ABSENT = ("", "na", "n/a", "nan", "null", "none", "unknown")
# Short names of transmitters, as FlyWire, hemibrain and the literature write them, in lower case.
SYNONYMS = {
    "ach": "acetylcholine",
    "glu": "glutamate",
    "glut": "glutamate",
    "da": "dopamine",
    "5-ht": "serotonin",
    "5ht": "serotonin",
    "ser": "serotonin",
    "oa": "octopamine",
    "oct": "octopamine",
}
NUMBER = r"^[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?$"  # what pyarrow casts to float64 without raising
# Three values in brackets of any kind, or in none, as pandas ("[1, 2, 3]"), numpy ("[1 2 3]") and CAVE write them.
POSITION_TEXT = (
    r"^\s*[\[({]?\s*(?P<x>[^,;\s\[({]+)\s*[,;\s]\s*(?P<y>[^,;\s]+)\s*[,;\s]\s*(?P<z>[^,;\s\])}]+)\s*[\])}]?\s*$"
)


def as_text(column: pa.Array) -> pa.Array:
    """The column as trimmed strings; null where the file says in words that there is no value."""
    text = pc.utf8_trim_whitespace(column.cast(pa.string()))
    return pc.if_else(pc.is_in(pc.utf8_lower(text), pa.array(ABSENT)), pa.scalar(None, pa.string()), text)


def as_floats(column: pa.Array) -> np.ndarray:
    """float64; NaN where the value is absent or not a number."""
    if pa.types.is_string(column.type):
        text = pc.utf8_trim_whitespace(column)
        column = pc.if_else(pc.match_substring_regex(text, NUMBER), text, pa.scalar(None, pa.string()))
    return column.cast(pa.float64(), safe=False).fill_null(np.nan).to_numpy(zero_copy_only=False)


def split_positions(column: pa.Array) -> tuple[pa.Array, pa.Array, pa.Array]:
    """x, y and z of a column of lists, or of text such as "[1, 2, 3]"; null where there are not three."""
    if pa.types.is_string(column.type):
        matched = pc.extract_regex(column, POSITION_TEXT)
        return tuple(matched.field(axis) if len(column) else column for axis in range(3))
    lists = column.cast(pa.list_(column.type.value_type))  # large and fixed-size lists alike
    three = pc.fill_null(pc.equal(pc.list_value_length(lists), 3), False).to_numpy(zero_copy_only=False)
    starts = lists.offsets.to_numpy()[:-1]
    return tuple(lists.values.take(pa.array(starts + axis, mask=~three)) for axis in range(3))


def as_whole_numbers(column: pa.Array, limit: int) -> pa.Array:
    """int64; null where the value is absent or no whole number from 0 to `limit`. Text never passes through float."""
    if pa.types.is_floating(column.type):
        floats = as_floats(column)
        exact = (floats >= 0) & (floats <= MAX_ID_AS_FLOAT) & (floats == np.floor(floats))
        values = pa.array(np.where(exact, floats, 0).astype(np.int64), mask=~exact)
    elif pa.types.is_integer(column.type):
        values = column.cast(pa.int64(), safe=False)  # uint64 above MAX_ID wraps round to a negative number
    else:
        text = as_text(column)
        digits = pc.replace_substring_regex(text, r"^(\d+)\.0*$", r"\1")  # pandas writes "12.0" in columns with gaps
        largest = pc.if_else(pc.equal(digits, text), str(MAX_ID), str(MAX_ID_AS_FLOAT).zfill(19))
        fits = pc.less_equal(pc.utf8_lpad(digits, 19, "0"), largest)
        valid = pc.and_(pc.match_substring_regex(digits, r"^\d{1,19}$"), fits)
        values = pc.if_else(valid, digits, pa.scalar(None, pa.string())).cast(pa.int64())
    in_range = pc.and_(pc.greater_equal(values, 0), pc.less_equal(values, limit))
    return pc.if_else(in_range, values, pa.scalar(None, pa.int64()))


def as_class_names(column: pa.Array, classes: Sequence[str]) -> tuple[pa.Array, pa.Array]:
    """The class of each row (null: unlabelled or unknown) and what to say of the unknown ones (null elsewhere)."""
    by_name = {_canonical(name): name for name in classes} | {_plain(name): name for name in classes}
    encoded = column.cast(pa.string()).dictionary_encode()
    labels, unknown = [], []
    for written in encoded.dictionary.to_pylist():
        label = by_name.get(_plain(written), by_name.get(_canonical(written)))
        labels.append(label)
        known_or_absent = label is not None or _plain(written) in ABSENT
        unknown.append(
            None if known_or_absent else f"{written!r} is none of {', '.join(classes)}{_hint(written, by_name)}"
        )
    return pa.array(labels, pa.string()).take(encoded.indices), pa.array(unknown, pa.string()).take(encoded.indices)


def _plain(name: str) -> str:
    return " ".join(name.split()).casefold()


def _canonical(name: str) -> str:
    return SYNONYMS.get(_plain(name), _plain(name))


def _hint(written: str, by_name: Mapping[str, str]) -> str:
    close = difflib.get_close_matches(_plain(written), by_name, n=1)
    return f"; did you mean {by_name[close[0]]!r}?" if close else ""
