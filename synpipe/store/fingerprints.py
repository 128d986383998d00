"""Content of files and folders as digests, and their status: while that stays, the content is not read again.

In: a path. Out: SHA-256 as hex digits; size and time. Guarantee: two copies of the same content have the same digest.
"""

import hashlib
import os
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's content, read again only when its size, its times or its inode changed."""
    status = path.stat()
    return _file_sha256(path, (status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino))


@lru_cache(maxsize=256)
def _file_sha256(path: Path, _status: tuple[int, ...]) -> str:
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def folder_sha256(folder: Path) -> str:
    """SHA-256 over the relative names and the contents of all files below a folder."""
    total = hashlib.sha256()
    for path in sorted(_files(folder)):
        with open(path, "rb") as handle:
            content = hashlib.file_digest(handle, "sha256").digest()
        total.update(os.fsencode(path.relative_to(folder)) + b"\0" + content)
    return total.hexdigest()


def status(path: Path) -> tuple[int, int]:
    """Bytes and time of the latest modification (ns) of a file, or of all that is in a folder."""
    if not path.is_dir():
        found = path.stat()
        return found.st_size, found.st_mtime_ns
    # The folders count with their times: a file that is taken away or renamed changes no other.
    inside = [file.stat() for file in _files(path)]
    folders = [os.stat(name).st_mtime_ns for name, _, _ in os.walk(path)]
    return sum(one.st_size for one in inside), max([*folders, *(one.st_mtime_ns for one in inside)])


def _files(folder: Path) -> Iterator[Path]:
    return (Path(name) / file for name, _, files in os.walk(folder) for file in files)
