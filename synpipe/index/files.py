"""Files of an index and their digests: LanceDB keeps no checksums of its rows, and gives what a damaged file holds, or NaN.

In: the folder of a LanceDB table. Out: SHA-256 of each file that a build has written, and later the names of those that
differ. Guarantee: a byte of rows or indexes that changed since they were published is found, and its file named; on an object
store, whose own checksums see to that, a file that is gone or cut short.
"""

import hashlib
import json
from typing import Any

from synpipe.store.objects import BulkPath, ObjectPath

KEY = b"synpipe.sha256"  # in the metadata of the column `vector`: part of the version that the digests are of
FOLDERS = ("data", "_indices")


def written(table: BulkPath) -> set[str]:
    """Files of rows and indexes that are there, of all versions, by their names below the table's folder."""
    return {
        str(path).removeprefix(f"{table}/")
        for folder in FOLDERS
        for path in (table / folder).rglob("*")
        if path.is_file()
    }


def digests(table: BulkPath, files: set[str]) -> str:
    """SHA-256 of these files by name, as JSON. Reads them once, in little memory."""
    return json.dumps({name: _digest(table / name) for name in sorted(files)})


def damaged(table: BulkPath, schema: Any) -> list[str]:
    """Files of the version with this schema that are gone or are not what was published; none is known of older stores."""
    told = json.loads((schema.field("vector").metadata or {}).get(KEY, "{}"))
    return [name for name, digest in told.items() if not (table / name).is_file() or _digest(table / name) != digest]


def _digest(path: BulkPath) -> str:
    """Of an object its size only: object stores hold a checksum against what they store, and reading it all would cost."""
    if isinstance(path, ObjectPath):
        return f"bytes:{path.stat().st_size}"
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
