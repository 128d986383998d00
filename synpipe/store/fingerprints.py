"""Computes digests of files and folders, and a status that changes when they are written.

Input: a path. Output: SHA-256 as hex digits, or the status. Guarantee: two copies of the same content have the same digest.
While the status stays the same, nothing needs to read the content again. Symbolic links are followed, because readers follow
them too.
"""

import hashlib
import os
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from synpipe.errors import SynpipeError


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
        try:
            with open(path, "rb") as handle:
                content = hashlib.file_digest(handle, "sha256").digest()
        except OSError as error:
            raise _unreadable(error) from None
        total.update(os.fsencode(path.relative_to(folder)) + b"\0" + content)
    return total.hexdigest()


def size_and_status(path: Path) -> tuple[int, str]:
    """Size in bytes of a file, or of everything below a folder, and a digest of the name, size and times of each file.

    The time of the last change of the inode (ctime) is included, because `cp -p` and rsync set the modification time to that of
    their source, which may be older than the file that they replace.
    """
    total_bytes, total = 0, hashlib.sha256()
    for file in sorted(_files(path)) if path.is_dir() else [path]:
        try:
            status = file.stat()
        except OSError as error:
            raise _unreadable(error) from None
        total_bytes += status.st_size
        size_and_times = f"{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}\n"
        total.update(os.fsencode(file.relative_to(path)) + b"\0" + size_and_times.encode())
    return total_bytes, total.hexdigest()


def _files(folder: Path) -> Iterator[Path]:
    """All files below a folder, also those below symbolic links to other folders.

    Raises `SynpipeError` if a folder cannot be listed, or if a link leads to a folder that contains the link.
    """

    def stop(error: OSError) -> None:
        raise _unreadable(error)

    for name, folders, files in os.walk(folder, onerror=stop, followlinks=True):
        yield from (Path(name) / file for file in files)
        for link in (Path(name) / child for child in folders):
            if link.is_symlink() and Path(name).resolve().is_relative_to(link.resolve()):
                raise SynpipeError(f"{link} is a link to a folder that contains it, so it has no end: remove the link.")


def _unreadable(error: OSError) -> SynpipeError:
    return SynpipeError(
        f"{error.filename} cannot be read ({error.strerror}): correct its permissions, or the link that names it, or remove it."
    )
