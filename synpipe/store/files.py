"""Files that are whole or absent: atomic writes, Parquet with metadata, a manifest per asset.

In: tables and small JSON documents. Out: files in the store, local or on an object store. Guarantee: a reader never sees
half a file. A local one is written beside its final name, flushed to disk and renamed; a process killed at any moment
leaves at most a file whose name begins with `.tmp-`, which `remove_leftovers` deletes. An object is uploaded when it is
whole.
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

from synpipe.errors import SynpipeError
from synpipe.store.objects import BulkPath, ObjectPath, move_tree, remove_tree

TEMPORARY_PREFIX = ".tmp-"
DAMAGED = ".damaged"  # suffix of what was moved aside


@contextlib.contextmanager
def atomic_path(path: BulkPath) -> Iterator[Path]:
    """Yield a temporary path in the folder of `path`; on success it is flushed and renamed to `path`.

    What is to become an object is written in the system's folder for temporary files, and uploaded on success.
    Raises `SynpipeError` where the folder cannot be written or the disk is full.
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
        reason = " ".join(str(error.strerror or error).split())  # HDF5's have several lines
        raise SynpipeError(
            f"Cannot write {path}: {reason}. Check the space and the permissions of that folder, or choose another store "
            "with --store or SYNPIPE_STORE."
        ) from error
    except BaseException:
        _remove(temporary)
        raise


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a new temporary folder beside `path`; on success it is flushed and takes the place of `path`.

    What was at `path` is removed then; a process killed between the two renames leaves it under a temporary name.
    Raises `SynpipeError` where the folder cannot be written or the disk is full.
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
    # Whatever prevented the writing (a read-only disk, a file in the folder's place) prevents this as well.
    with contextlib.suppress(OSError):
        path.unlink()


def _sync_folder(folder: Path) -> None:
    # The rename itself is only durable once the folder is flushed.
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove_leftovers(folder: BulkPath, older_than_s: float = 3600) -> None:
    """Delete temporary files of writers that died; recent ones may belong to a writer at work and stay.

    An object store has none; of uploads that were cut off it keeps parts until a rule of the bucket removes them.
    """
    if isinstance(folder, ObjectPath):
        return
    for path in folder.rglob(f"{TEMPORARY_PREFIX}*"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > older_than_s:
                path.unlink()


def set_aside(path: BulkPath) -> BulkPath:
    """Move what is damaged out of the way, so that it is made anew; returns where to. `synpipe gc` lists it."""
    aside = path.with_suffix(f"{path.suffix}{DAMAGED}")
    if aside.is_dir():
        remove_tree(aside)
    move_tree(path, aside)
    return aside


def damaged(path: BulkPath, problem: object) -> SynpipeError:
    """The error to raise for a damaged file of the store, which is moved aside, so that its asset counts as missing."""
    reason = " ".join(str(problem).split()).rstrip(".")
    try:
        moved = f"moved to {set_aside(path).name}. Materialise again, which makes it anew."
    except (OSError, SynpipeError):  # a reader's, of a store that it may not write
        moved = "delete it and materialise again."
    return SynpipeError(f"{path} is damaged ({reason}): {moved}")


def write_text(path: Path, text: str) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(text)


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=1, sort_keys=True) + "\n")


def read_json(path: Path) -> Any:
    """Raises `SynpipeError` where the file is absent, or damaged: it is then moved aside."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise SynpipeError(f"{path} does not exist: materialise the asset that makes it.") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise damaged(path, error) from None


def write_table(path: BulkPath, table: pa.Table, metadata: dict[str, str] | None = None, **options: Any) -> None:
    """Write one Parquet file atomically, with `metadata` added to the schema's; zstd, with checksums of the pages."""
    if metadata:
        table = table.replace_schema_metadata({**(table.schema.metadata or {}), **metadata})
    with atomic_path(path) as temporary:
        pq.write_table(table, temporary, **{"compression": "zstd", "write_page_checksum": True, **options})


@contextlib.contextmanager
def table_writer(path: Path, schema: pa.Schema, metadata: dict[str, str] | None = None) -> Iterator[pq.ParquetWriter]:
    """Yield a writer of one Parquet file that takes tables of `schema` one after another; else as `write_table`."""
    with (
        atomic_path(path) as temporary,
        pq.ParquetWriter(
            temporary, schema.with_metadata(metadata), compression="zstd", write_page_checksum=True
        ) as writer,
    ):
        yield writer


def read_table(path: BulkPath, columns: list[str] | None = None) -> pa.Table:
    """Read one Parquet file of the store. Raises `SynpipeError` where it is absent, or damaged: it is then moved aside."""
    with reading(path):
        source = pa.BufferReader(path.read_bytes()) if isinstance(path, ObjectPath) else path
        return pq.ParquetFile(source, memory_map=True, page_checksum_verification=True).read(columns=columns)


@contextlib.contextmanager
def reading(path: BulkPath) -> Iterator[None]:
    """Say of a Parquet file of the store what is wrong with it; what is damaged is moved aside."""
    try:
        yield
    except FileNotFoundError:
        raise SynpipeError(f"{path} does not exist: materialise the asset that makes it.") from None
    except (pa.ArrowInvalid, OSError) as error:
        if isinstance(error, OSError) and error.errno:  # a wrong checksum is an OSError without a number
            raise SynpipeError(f"Cannot read {path}: {error.strerror}. Check that file.") from None
        raise damaged(path, error) from None


def is_whole(path: BulkPath) -> bool:
    """Whether every page of a Parquet file has its checksum; all of it is read, a batch at a time."""
    try:
        source = pa.BufferReader(path.read_bytes()) if isinstance(path, ObjectPath) else path
        file = pq.ParquetFile(source, memory_map=True, page_checksum_verification=True)
        return sum(len(batch) for batch in file.iter_batches()) == file.metadata.num_rows
    except (pa.ArrowException, OSError):
        return False
