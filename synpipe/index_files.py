"""Files of an index and their digests: LanceDB keeps no checksums of its rows, and gives what a damaged file holds, or NaN.

In: the folder of a LanceDB table. Out: SHA-256 of each file that a build has written, and later the names of those that
differ. Guarantee: a byte of rows or indexes that changed since they were published is found, and its file named.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

KEY = b"synpipe.sha256"  # in the metadata of the column `vector`: part of the version that the digests are of
FOLDERS = ("data", "_indices")


def written(table: Path) -> set[str]:
    """Files of rows and indexes that are there, of all versions, by their names below the table's folder."""
    return {
        str(path.relative_to(table)) for folder in FOLDERS for path in (table / folder).rglob("*") if path.is_file()
    }


def digests(table: Path, files: set[str]) -> str:
    """SHA-256 of these files by name, as JSON. Reads them once, in little memory."""
    return json.dumps({name: _sha256(table / name) for name in sorted(files)})


def damaged(table: Path, schema: Any) -> list[str]:
    """Files of the version with this schema that are gone or are not what was published; none is known of older stores."""
    told = json.loads((schema.field("vector").metadata or {}).get(KEY, "{}"))
    return [name for name, digest in told.items() if not (table / name).is_file() or _sha256(table / name) != digest]


def _sha256(path: Path) -> str:
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
