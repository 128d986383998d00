"""Writes and reads the files of a store: Parquet tables, JSON documents and any other file, each written atomically.

Input: tables and JSON-able values. Output: files in the store, local or on an object store. Guarantee: a reader never
sees half a file. A local file is written beside its final name, flushed to disk and renamed. A process that is killed at
any moment leaves at most a file whose name begins with `.tmp-`, which `remove_leftovers` deletes. An object is uploaded
only when it is complete.
"""

import contextlib
import json
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from synpipe.errors import SynpipeError, one_line
from synpipe.store.objects import BulkPath, ObjectPath, move_tree, remove_tree

TEMPORARY_PREFIX = ".tmp-"
DAMAGED = ".damaged"  # suffix of damaged files and folders that were moved aside


@contextlib.contextmanager
def atomic_path(path: BulkPath) -> Iterator[Path]:
    """Yield a temporary path in the folder of `path`. On success the file is flushed and renamed to `path`.

    A file that becomes an object is written to the system's temporary folder, and uploaded on success.
    Raises `SynpipeError` if the folder cannot be written or the disk is full.
    """
    if isinstance(path, ObjectPath):
        with tempfile.TemporaryDirectory(prefix="synpipe-") as folder:
            with atomic_path(Path(folder) / path.name) as temporary:
                yield temporary
            path.write_bytes((Path(folder) / path.name).read_bytes())
        return
    temporary = path.parent / f"{TEMPORARY_PREFIX}{uuid.uuid4().hex}-{path.name}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with open(temporary, "rb") as handle:
            os.fsync(handle.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        _remove(temporary)
        reason = " ".join((error.strerror or one_line(error)).split())  # HDF5 fills `strerror` with several lines
        raise SynpipeError(
            f"Cannot write {path}: {reason}. Check the space and the permissions of that folder, or choose another store "
            "with --store or SYNPIPE_STORE."
        ) from error
    except BaseException:
        _remove(temporary)
        raise


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a new temporary folder beside `path`. On success it is flushed and replaces `path`.

    The former folder at `path` is then removed. A process that is killed between the two renames leaves it under a
    temporary name. Raises `SynpipeError` if the folder cannot be written or the disk is full.
    """
    path = path.absolute()
    temporary, former = (path.parent / f"{TEMPORARY_PREFIX}{uuid.uuid4().hex}-{path.name}" for _ in range(2))
    try:
        temporary.mkdir(parents=True)
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                with open(file, "rb") as handle:
                    os.fsync(handle.fileno())
            else:
                _sync_folder(file)
        _sync_folder(temporary)
        if path.exists():
            os.replace(path, former)
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        raise SynpipeError(
            f"Cannot write {path}: {error.strerror or error}. Check the space and the permissions of its folder."
        ) from error
    finally:
        for folder in (temporary, former):
            shutil.rmtree(folder, ignore_errors=True)


def _remove(path: Path) -> None:
    # The cause of the failed write (a read-only disk, a file in place of the folder) may also prevent the removal.
    with contextlib.suppress(OSError):
        path.unlink()


def _sync_folder(folder: Path) -> None:
    # A rename is durable only after the folder has been flushed.
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove_leftovers(folder: BulkPath, older_than_s: float = 3600) -> None:
    """Delete temporary files of writers that died. Recent files stay, because they may belong to a running writer.

    An object store has no temporary files. It keeps the received pieces of an interrupted upload until a lifecycle rule of
    the bucket removes them.
    """
    if isinstance(folder, ObjectPath):
        return
    for path in folder.rglob(f"{TEMPORARY_PREFIX}*"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > older_than_s:
                path.unlink()


def set_aside(path: BulkPath) -> BulkPath:
    """Rename a damaged file or folder so that it counts as missing and is made again. Returns the new path.

    `synpipe gc` lists files and folders that were moved aside.
    """
    aside = path.with_suffix(f"{path.suffix}{DAMAGED}")
    if aside.is_dir():
        remove_tree(aside)
    move_tree(path, aside)
    return aside


def set_aside_as_damaged(path: BulkPath, problem: Exception) -> SynpipeError:
    """Move a damaged file aside, so that its asset counts as missing, and return the error to raise."""
    try:
        remedy = f"moved to {set_aside(path).name}. Materialise again to make a new file."
    except (OSError, SynpipeError):  # this process may only read the store
        remedy = "delete it and materialise again."
    return SynpipeError(f"{path} is damaged ({one_line(problem).rstrip('.')}): {remedy}")


def write_text(path: Path, text: str) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(text)


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=1, sort_keys=True) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file. Raises `SynpipeError` if it is absent or damaged; a damaged file is moved aside."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise SynpipeError(f"{path} does not exist: materialise the asset that makes it.") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise set_aside_as_damaged(path, error) from None


def write_table(path: BulkPath, table: pa.Table, metadata: dict[str, str] | None = None, **options: Any) -> None:
    """Write one Parquet file atomically, with zstd compression and page checksums. metadata: added to that of the schema."""
    if metadata:
        table = table.replace_schema_metadata({**(table.schema.metadata or {}), **metadata})
    with atomic_path(path) as temporary:
        pq.write_table(table, temporary, **{"compression": "zstd", "write_page_checksum": True, **options})


@contextlib.contextmanager
def table_writer(path: Path, schema: pa.Schema, metadata: dict[str, str] | None = None) -> Iterator[pq.ParquetWriter]:
    """Yield a writer that appends tables of `schema` to one Parquet file. The file is written as by `write_table`."""
    with (
        atomic_path(path) as temporary,
        pq.ParquetWriter(
            temporary, schema.with_metadata(metadata), compression="zstd", write_page_checksum=True
        ) as writer,
    ):
        yield writer


def read_table(path: BulkPath, columns: list[str] | None = None) -> pa.Table:
    """Read one Parquet file of the store. Raises `SynpipeError` if it is absent or damaged; a damaged file is moved aside."""
    with explaining_read_errors(path):
        source = pa.BufferReader(path.read_bytes()) if isinstance(path, ObjectPath) else path
        file = pq.ParquetFile(source, memory_map=True, page_checksum_verification=True)
        check_columns(path, file, columns)
        return file.read(columns=columns)


def check_columns(path: BulkPath, file: pq.ParquetFile, columns: list[str] | None) -> None:
    """Raise `SynpipeError` if a Parquet file lacks one of these columns. pyarrow would leave it out without an error."""
    names = file.schema_arrow.names
    if missing := [name for name in columns or [] if name not in names]:
        raise SynpipeError(
            f"{path} has no column {missing[0]!r}; it has {', '.join(names)}. If it should have that column, the file is damaged: "
            "materialise again to make a new one."
        )


@contextlib.contextmanager
def explaining_read_errors(path: BulkPath) -> Iterator[None]:
    """Turn the exceptions of reading a Parquet file into `SynpipeError`, and move the file aside if it is damaged."""
    try:
        yield
    except FileNotFoundError:
        raise SynpipeError(f"{path} does not exist: materialise the asset that makes it.") from None
    # A damaged footer may also hold text that is no UTF-8, or lack a column.
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        if isinstance(error, OSError) and error.errno:  # Arrow reports a wrong checksum as an OSError without a number
            raise SynpipeError(f"Cannot read {path}: {error.strerror}. Check the permissions and the disk.") from None
        raise set_aside_as_damaged(path, error) from None


def is_whole(path: BulkPath) -> bool:
    """Whether every page of a Parquet file matches its checksum. Reads the whole file, one batch at a time."""
    try:
        source = pa.BufferReader(path.read_bytes()) if isinstance(path, ObjectPath) else path
        file = pq.ParquetFile(source, memory_map=True, page_checksum_verification=True)
        return sum(len(batch) for batch in file.iter_batches()) == file.metadata.num_rows
    except (pa.ArrowException, OSError):
        return False
