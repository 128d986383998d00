"""Computes digests of files and folders, and their size and time.

Input: a path. Output: SHA-256 as hex digits, or size and time. Guarantee: two copies of the same content have the same
digest. While size and time stay the same, nothing needs to read the content again.
"""

import hashlib
import os
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's content. Within a process the file is read again only if its size, times or inode changed."""
    status = path.stat()
    return _file_sha256(path, (status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino))


@lru_cache(maxsize=256)
def _file_sha256(path: Path, _status: tuple[int, ...]) -> str:
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def folder_sha256(folder: Path) -> str:
    """SHA-256 of the relative names and the contents of all files below a folder."""
    total = hashlib.sha256()
    for path in sorted(_files(folder)):
        with open(path, "rb") as handle:
            content = hashlib.file_digest(handle, "sha256").digest()
        total.update(os.fsencode(path.relative_to(folder)) + b"\0" + content)
    return total.hexdigest()


def size_and_mtime(path: Path) -> tuple[int, int]:
    """Size in bytes and latest modification time in ns of a file, or of everything below a folder."""
    if not path.is_dir():
        status = path.stat()
        return status.st_size, status.st_mtime_ns
    # The times of folders count as well, because removing or renaming a file changes only the time of its folder.
    files = [file.stat() for file in _files(path)]
    folder_times = [os.stat(name).st_mtime_ns for name, _, _ in os.walk(path)]
    return sum(file.st_size for file in files), max([*folder_times, *(file.st_mtime_ns for file in files)])


def _files(folder: Path) -> Iterator[Path]:
    return (Path(name) / file for name, _, files in os.walk(folder) for file in files)
