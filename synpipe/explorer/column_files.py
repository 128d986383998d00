"""The data files of a static site: typed arrays, one after another, gzip.

In: columns. Out: files named after their content, and what `site.json` says of them. Guarantee: the same columns have the same
name, so that a browser may keep a file for ever.

The files are gzip without saying so by their names: some hosts would announce a `.gz` as `Content-Encoding`, others not, and
the browser would unpack it in one of the cases.
"""

import gzip
import hashlib
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from synpipe.explorer.answers import ALIGNMENT, MOST_CATEGORIES

PIECE_BYTES = 20_000_000  # hosts have limits: 25 MiB a file at Cloudflare Pages, 100 at GitHub

Column = tuple[np.ndarray, dict[str, Any]]
"""An array, and what is said of it in `site.json` beside its place and type."""


def as_column(values: np.ndarray) -> Column:
    return values, {}


def metadata_columns(rows: pa.Table, names: Sequence[str]) -> dict[str, Column]:
    """Columns that say something of some row: names and uint16 codes, 65535 for none, or float32, NaN for none."""
    found = {}
    for name in names:
        values = rows[name].combine_chunks()
        if values.null_count == len(values):
            continue
        if not pa.types.is_string(values.type):
            found[name] = values.to_numpy(zero_copy_only=False).astype(np.float32), {"kind": "number"}
            continue
        labels = pc.unique(values.drop_null()).sort()
        if len(labels) <= MOST_CATEGORIES:
            codes = pc.fill_null(pc.index_in(values, labels), MOST_CATEGORIES).to_numpy().astype(np.uint16)
            found[name] = codes, {"kind": "category", "names": labels.to_pylist()}
    return found


def narrow(values: np.ndarray) -> np.ndarray:
    """In float32 where that holds every value exactly."""
    narrow = values.astype(np.float32)
    return narrow if np.array_equal(narrow, values, equal_nan=True) else values


@dataclass(frozen=True)
class Files:
    """The data files of a site. folder: of the site."""

    folder: Path

    def write(self, kind: str, columns: Mapping[str, Column]) -> dict[str, Any]:
        """Write columns into one or more files and describe them. offset: in bytes, unpacked; length: in values."""
        described, arrays, offset = [], [], 0
        for name, (values, more) in columns.items():
            content = values.astype(values.dtype.newbyteorder("<")).tobytes()
            place = {"name": name, "dtype": values.dtype.name, "offset": offset, "length": len(values)}
            described.append(place | more)
            arrays.append(content + bytes(-len(content) % ALIGNMENT))
            offset += len(arrays[-1])
        packed = gzip.compress(b"".join(arrays), mtime=0)
        pieces = [packed[start : start + PIECE_BYTES] for start in range(0, len(packed), PIECE_BYTES)]
        paths = [f"data/{kind}-{hashlib.sha256(piece).hexdigest()[:16]}.bin" for piece in pieces]
        (self.folder / "data").mkdir(exist_ok=True)
        for path, piece in zip(paths, pieces, strict=True):
            (self.folder / path).write_bytes(piece)
        return {"paths": paths, "bytes": len(packed), "columns": described}

    def keep(self, former: Path, path: str) -> None:
        """Take over a file or a folder of an earlier site."""
        source, target = former / path, self.folder / path
        if source.is_dir():
            shutil.copytree(source, target, copy_function=_link)
        else:
            _link(source, target)


def _link(source: str | Path, target: str | Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without links
        shutil.copy2(source, target)
