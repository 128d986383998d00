"""Find damaged files of an index by their digests.

Input: the folder of a LanceDB table. Outputs: the SHA-256 of each file that a build has written, and later the names of
the files that differ from it. The digests are needed because LanceDB keeps no checksums of its rows: from a damaged file
it returns whatever the file holds, or NaN.

A byte of rows or indexes that changed since publication is found, and its file is named. An object store has checksums of
its own, so only files that are gone or have another size are found there.
"""

import hashlib
import json
from typing import Any

from synpipe.store.objects import BulkPath, ObjectPath

KEY = (
    b"synpipe.sha256"  # in the metadata of the column `vector`, so that the digests belong to one version of the table
)
FOLDERS = ("data", "_indices")


def list_files(table: BulkPath) -> set[str]:
    """List the files of rows and indexes of all versions, by their names relative to the table's folder."""
    return {
        str(path).removeprefix(f"{table}/")
        for folder in FOLDERS
        for path in (table / folder).rglob("*")
        if path.is_file()
    }


def digest_files(table: BulkPath, names: set[str]) -> str:
    """Return the SHA-256 of these files by name, as JSON. Each file is read once, in little memory."""
    return json.dumps({name: _digest(table / name) for name in sorted(names)})


def find_damaged_files(table: BulkPath, schema: Any) -> list[str]:
    """List the files of the version with this schema that are gone or differ from what was published.

    Versions published by an early synpipe have no digests; none of their files is listed.
    """
    digests = json.loads((schema.field("vector").metadata or {}).get(KEY, "{}"))
    return [name for name, digest in digests.items() if not (table / name).is_file() or _digest(table / name) != digest]


def _digest(path: BulkPath) -> str:
    """The SHA-256 of a file, or the size of an object: reading all objects would be slow, and their store checks them."""
    if isinstance(path, ObjectPath):
        return f"bytes:{path.stat().st_size}"
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
