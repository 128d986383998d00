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
    return [name for name, digest in _digests(schema).items() if not _has_digest(table / name, digest)]


def find_touched_files(table: BulkPath, version: int, schema: Any) -> list[str]:
    """List the files of this version that are gone, or that were written after it was published and differ from it.

    The version's manifest is its last file. A file that is older than the manifest has not been touched since, and is not read.
    """
    if isinstance(table, ObjectPath):
        return []
    names = (f"{2**64 - 1 - version}.manifest", f"{version}.manifest")  # early versions of LanceDB used the second form
    manifests = [path.stat().st_mtime_ns for name in names if (path := table / "_versions" / name).is_file()]
    published_at = max(manifests, default=0)

    def is_whole(name: str, digest: str) -> bool:
        path = table / name
        untouched = path.is_file() and path.stat().st_mtime_ns <= published_at
        return untouched or _has_digest(path, digest)

    return [name for name, digest in _digests(schema).items() if not is_whole(name, digest)]


def _digests(schema: Any) -> dict[str, str]:
    return dict(json.loads((schema.field("vector").metadata or {}).get(KEY, "{}")))


def _has_digest(path: BulkPath, digest: str) -> bool:
    return path.is_file() and _digest(path) == digest


def _digest(path: BulkPath) -> str:
    """The SHA-256 of a file, or the size of an object: reading all objects would be slow, and their store checks them."""
    if isinstance(path, ObjectPath):
        return f"bytes:{path.stat().st_size}"
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
