"""Records of the files of an asset: what was written, so that damage is found later.

Input: files in the folder of a data set. Output: the size, the time and the SHA-256 of each, which its manifest keeps. The pages
of a Parquet file have checksums, but its footer has none: a flipped bit there may rename a column or make the file unreadable.
A JSON file has no checksum at all.
"""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class FileRecord:
    """A file when its asset was made. sha256: of its content, in hex. mtime_ns: when it was written last, as the disk says."""

    sha256: str
    bytes: int
    mtime_ns: int


def record_files(folder: Path, paths: Iterable[Path]) -> dict[str, FileRecord]:
    """Record those of these files that exist, by their names relative to `folder`. Every file is read once."""
    records = {}
    for path in paths:
        if path.is_file():
            status = path.stat()
            records[str(path.relative_to(folder))] = FileRecord(_digest(path), status.st_size, status.st_mtime_ns)
    return records


def find_lost(folder: Path, records: Mapping[str, FileRecord]) -> list[Path]:
    """Recorded files that are gone."""
    return [folder / name for name in records if not (folder / name).is_file()]


def find_damaged(folder: Path, records: Mapping[str, FileRecord], read_all: bool = False) -> list[Path]:
    """Recorded files that have another content now.

    read_all: read every file. Otherwise only those files are read whose size or time is another one, which is fast.
    """
    return [
        folder / name
        for name, record in records.items()
        if (folder / name).is_file()
        and (read_all or not has_same_status(folder / name, record))
        and ((folder / name).stat().st_size != record.bytes or _digest(folder / name) != record.sha256)
    ]


def has_same_status(path: Path, record: FileRecord) -> bool:
    """Whether a file has the recorded size and time."""
    status = path.stat()
    return (status.st_size, status.st_mtime_ns) == (record.bytes, record.mtime_ns)


def _digest(path: Path) -> str:
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
