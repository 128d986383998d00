"""The map of an encoder as one binary file, which a browser uses as typed arrays without copying.

Input: a table of synapses with their map positions and the columns that can colour them. Output: bytes.

Layout, little-endian:

1. uint32: the length of the header in bytes.
2. The header: JSON, padded with spaces so that the arrays start at a multiple of 8 bytes. `rows` is the number of synapses.
   `columns` is a list. Each column has a `name`, a `kind` (id, x, y, category or number), a `dtype`, its `offset` from the end of
   the header and its `length`, both in bytes. Categories also have `names`.
3. The arrays, each padded to a multiple of 8 bytes. A category is stored as the position of its name in `names`, or 65535 if the
   synapse has none. A missing number is NaN.
"""

import json
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

MAP_CATEGORIES = ("neurotransmitter", "predicted_neurotransmitter", "region", "hemilineage", "split", "source")
MAP_NUMBERS = ("predicted_probability", "confidence", "pad_fraction")
NO_CATEGORY = 2**16 - 1  # categories are uint16 codes, and the largest code means "no value"
ALIGNMENT_BYTES = 8  # a typed array of int64 must start at a multiple of this


def pack_map(synapses: pa.Table) -> bytes | None:
    """Pack the synapses that have a map position, in the layout above; None if there are none.

    synapses: with `synapse_id`, `map_x`, `map_y`, `MAP_CATEGORIES` and `MAP_NUMBERS`. Columns without any value are left out.
    """
    synapses = synapses.filter(pc.is_valid(synapses["map_x"]))
    if not len(synapses):
        return None
    columns: list[dict[str, Any]] = []
    arrays: list[bytes] = []

    def add(name: str, kind: str, values: np.ndarray, **more: Any) -> None:
        content = little_endian(values)
        offset = sum(map(len, arrays))
        columns.append(
            {"name": name, "kind": kind, "dtype": values.dtype.name, "offset": offset, "length": len(content), **more}
        )
        arrays.append(padded(content))

    add("synapse_id", "id", synapses["synapse_id"].to_numpy())
    for axis in "xy":
        add(f"map_{axis}", axis, synapses[f"map_{axis}"].to_numpy())
    for name in MAP_CATEGORIES:
        coded = synapses[name].combine_chunks().dictionary_encode()
        if 0 < len(coded.dictionary) <= NO_CATEGORY:
            codes = pc.fill_null(coded.indices, NO_CATEGORY).to_numpy().astype(np.uint16)
            add(name, "category", codes, names=coded.dictionary.to_pylist())
    for name in MAP_NUMBERS:
        if synapses[name].null_count < len(synapses):
            add(name, "number", synapses[name].to_numpy().astype(np.float32))
    header = json.dumps({"rows": len(synapses), "columns": columns}).encode()
    header += b" " * (-(4 + len(header)) % ALIGNMENT_BYTES)
    return len(header).to_bytes(4, "little") + header + b"".join(arrays)


def little_endian(values: np.ndarray) -> bytes:
    """The values of an array as a browser reads them."""
    return values.astype(values.dtype.newbyteorder("<")).tobytes()


def padded(content: bytes) -> bytes:
    """The content with zeros after it, so that the next array is aligned."""
    return content + bytes(-len(content) % ALIGNMENT_BYTES)
