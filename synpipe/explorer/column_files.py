"""Writes the data files of a static site: gzipped typed arrays, one after another.

Input: columns. Output: files that are named after their content, and the description of each file for `site.json`. Guarantee:
equal columns get equal file names, so a browser may cache a file for ever.

The names do not end in `.gz`, although the content is gzip. Some hosts would send such a file with `Content-Encoding: gzip` and
others would not, so the browser would unpack it in some cases only.
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

from synpipe.explorer.map_file import NO_CATEGORY, little_endian, padded

PIECE_BYTES = 20_000_000  # hosts limit the size of a file: 25 MiB at Cloudflare Pages, 100 MiB at GitHub

Column = tuple[np.ndarray, dict[str, Any]]
"""An array, and further entries of its description in `site.json`."""


def as_column(values: np.ndarray) -> Column:
    """A column whose description has no further entries."""
    return values, {}


def metadata_columns(rows: pa.Table, names: Sequence[str]) -> dict[str, Column]:
    """Those of the named columns that have a value in any row.

    Text becomes uint16 codes of sorted names, 65535 for a missing value. Numbers become float32, NaN for a missing value. Text
    columns with more than 65535 names are left out.
    """
    columns: dict[str, Column] = {}
    for name in names:
        values = rows[name].combine_chunks()
        if values.null_count == len(values):
            continue
        if not pa.types.is_string(values.type):
            columns[name] = values.to_numpy(zero_copy_only=False).astype(np.float32), {"kind": "number"}
            continue
        labels = pc.unique(values.drop_null()).sort()
        if len(labels) <= NO_CATEGORY:
            codes = pc.fill_null(pc.index_in(values, labels), NO_CATEGORY).to_numpy().astype(np.uint16)
            columns[name] = codes, {"kind": "category", "names": labels.to_pylist()}
    return columns


def narrow(values: np.ndarray) -> np.ndarray:
    """The values as float32 if that represents each of them exactly, otherwise unchanged."""
    as_float32 = values.astype(np.float32)
    return as_float32 if np.array_equal(as_float32, values, equal_nan=True) else values


@dataclass(frozen=True)
class SiteFiles:
    """Writes the data files of a site into its folder."""

    folder: Path

    def write(self, kind: str, columns: Mapping[str, Column]) -> dict[str, Any]:
        """Write columns into one or more files, and return their description for `site.json`.

        In the description of a column, `offset` counts bytes after unpacking and `length` counts values.
        """
        described, arrays, offset = [], [], 0
        for name, (values, more) in columns.items():
            entry = {"name": name, "dtype": values.dtype.name, "offset": offset, "length": len(values)}
            described.append(entry | more)
            arrays.append(padded(little_endian(values)))
            offset += len(arrays[-1])
        packed = gzip.compress(b"".join(arrays), mtime=0)
        pieces = [packed[start : start + PIECE_BYTES] for start in range(0, len(packed), PIECE_BYTES)]
        paths = [f"data/{kind}-{hashlib.sha256(piece).hexdigest()[:16]}.bin" for piece in pieces]
        (self.folder / "data").mkdir(exist_ok=True)
        for path, piece in zip(paths, pieces, strict=True):
            (self.folder / path).write_bytes(piece)
        return {"paths": paths, "bytes": len(packed), "columns": described}

    def reuse(self, former_site: Path, path: str) -> None:
        """Take over a file or a folder from an earlier site, as hard links where the file system allows them."""
        source, target = former_site / path, self.folder / path
        if source.is_dir():
            shutil.copytree(source, target, copy_function=_link)
        else:
            _link(source, target)


def _link(source: str | Path, target: str | Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # the file system has no hard links
        shutil.copy2(source, target)
