"""Turn columns of annotation files into the types of `SYNAPSE_SCHEMA`.

Input: one Arrow column of strings, integers or floats. Output: a column of the same length that holds text, float64,
exact int64 ids or class names. No value raises an error: a value that is absent, of the wrong kind or, for an id, not
exact becomes null or NaN.
"""

import difflib
from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from synpipe.annotations.schema import UNLABELLED

MAX_ID = 2**63 - 1
# Above 2^53 - 1, float64 cannot distinguish neighbouring integers (IEEE 754), so such an id may belong to another synapse.
MAX_ID_AS_FLOAT = 2**53 - 1

# How pandas, R, SQL, Python and synister write "no value", in lower case.
ABSENT = ("", "na", "n/a", "nan", "null", "none", "unknown")
# Short names of transmitters in FlyWire, hemibrain and the literature, in lower case.
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
NUMBER = r"^[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?$"  # text that pyarrow casts to float64 without an error
# Three values, with or without brackets of any kind, as pandas ("[1, 2, 3]"), numpy ("[1 2 3]") and CAVE write them.
POSITION_TEXT = (
    r"^\s*[\[({]?\s*(?P<x>[^,;\s\[({]+)\s*[,;\s]\s*(?P<y>[^,;\s]+)\s*[,;\s]\s*(?P<z>[^,;\s\])}]+)\s*[\])}]?\s*$"
)


def as_text(column: pa.Array) -> pa.Array:
    """Return the column as trimmed strings, with null for every value in `ABSENT`."""
    text = pc.utf8_trim_whitespace(column.cast(pa.string()))
    return pc.if_else(pc.is_in(pc.utf8_lower(text), pa.array(ABSENT)), pa.scalar(None, pa.string()), text)


def as_float32(column: pa.Array) -> pa.Array:
    """Return the column as float32, with null where a value is absent, not a number, or not finite as float32."""
    with np.errstate(over="ignore"):  # a value that overflows becomes infinite and then null
        values = as_floats(column).astype(np.float32)
    return pa.array(values, mask=~np.isfinite(values))


def as_floats(column: pa.Array) -> np.ndarray:
    """Return the column as float64, with NaN where a value is absent or not a number."""
    if pa.types.is_string(column.type):
        text = pc.utf8_trim_whitespace(column)
        column = pc.if_else(pc.match_substring_regex(text, NUMBER), text, pa.scalar(None, pa.string()))
    return column.cast(pa.float64(), safe=False).fill_null(np.nan).to_numpy(zero_copy_only=False)


def split_positions(column: pa.Array) -> tuple[pa.Array, pa.Array, pa.Array]:
    """Split a column of lists, or of text such as "[1, 2, 3]", into x, y and z.

    All three are null where a row does not hold exactly three values.
    """
    if pa.types.is_string(column.type):
        matched = pc.extract_regex(column, POSITION_TEXT)
        return tuple(matched.field(axis) if len(column) else column for axis in range(3))
    lists = column.cast(pa.list_(column.type.value_type))  # large and fixed-size lists become plain ones
    has_three = pc.fill_null(pc.equal(pc.list_value_length(lists), 3), False).to_numpy(zero_copy_only=False)
    starts = lists.offsets.to_numpy()[:-1]
    return tuple(lists.values.take(pa.array(starts + axis, mask=~has_three)) for axis in range(3))


def as_whole_numbers(column: pa.Array, limit: int) -> pa.Array:
    """Return the column as int64, with null where a value is absent or not a whole number from 0 to `limit`.

    Text is converted without passing through float, so that large ids stay exact.
    """
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
    """Match each value to one of `classes`; case, spaces and the `SYNONYMS` do not matter.

    Returns two string columns: the class of each row (null if the value is absent or unknown), and a sentence about
    each unknown value (null elsewhere).
    """
    class_by_name = {_canonical(name): name for name in classes} | {_normalised(name): name for name in classes}
    encoded = column.cast(pa.string()).dictionary_encode()
    labels, problems = [], []
    for value in encoded.dictionary.to_pylist():
        label = class_by_name.get(_normalised(value), class_by_name.get(_canonical(value)))
        is_unknown = label is None and _normalised(value) not in ABSENT
        labels.append(label)
        problems.append(
            f"{value!r} is none of {', '.join(classes)}{_hint(value, class_by_name)}" if is_unknown else None
        )
    return pa.array(labels, pa.string()).take(encoded.indices), pa.array(problems, pa.string()).take(encoded.indices)


def check_class_names(classes: Sequence[str]) -> None:
    """Raise `ValueError` if the name of a class is empty or reserved, or if two names would stand for the same values."""
    earlier: dict[str, str] = {}
    for name in classes:
        if not name.strip():
            raise ValueError("a class has an empty name: give it a name, or remove it")
        if _normalised(name) == UNLABELLED:
            raise ValueError(
                f"{name!r} is what synpipe calls synapses without a class: rename the class, or remove it and leave the "
                "neurotransmitter of its synapses empty"
            )
        if (same := earlier.get(_canonical(name))) is not None:
            raise ValueError(
                f"{same!r} and {name!r} name the same class, because case, spaces and common synonyms do not matter: keep one "
                "of them"
            )
        earlier[_canonical(name)] = name


def _normalised(name: str) -> str:
    return " ".join(name.split()).casefold()


def _canonical(name: str) -> str:
    return SYNONYMS.get(_normalised(name), _normalised(name))


def _hint(name: str, class_by_name: Mapping[str, str]) -> str:
    similar = difflib.get_close_matches(_normalised(name), class_by_name, n=1)
    return f"; did you mean {class_by_name[similar[0]]!r}?" if similar else ""
