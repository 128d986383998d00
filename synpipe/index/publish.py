"""Publish an embedding table as a LanceDB table with indexes: write a new version, verify it, then make it current.

Input: the Parquet file of `embedding_table_<encoder>`. Output: a new version of the LanceDB table of the encoder. The tag
`current` moves only after rows, indexes and recall have been verified. Readers who check out the tag therefore never see a
table without its indexes, even if a build is killed. There may be one writer at a time. Only this module,
`synpipe.index.build`, `synpipe.index.search` and `synpipe.index.versions` import LanceDB.
"""

import contextlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import lancedb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from synpipe.embeddings.vectors import read_unit_vectors, read_vectors
from synpipe.errors import SynpipeError, one_line
from synpipe.index import files as index_files
from synpipe.index.build import build_indexes, partitions_for, write_rows
from synpipe.index.damage import UNREADABLE, explaining_damage, set_damaged_parts_aside
from synpipe.index.recall import MIN_RECALL, RECALL_K, tune
from synpipe.specs import digest
from synpipe.store.files import set_aside
from synpipe.store.objects import BulkPath, lance_options
from synpipe.store.streams import BATCH_ROWS

CURRENT = "current"
METADATA_KEY = b"synpipe"
# LanceDB lists the names of the tags and then reads each one. If a tag is removed in between, the list is read again.
LIST_ATTEMPTS = 10
PUBLISH_CACHE_BYTES = 8 * 2**20  # while an index is built and tested, it is read from disk and hardly cached


@dataclass(frozen=True)
class IndexReport:
    """Describes a published version.

    kind: "flat" or "IVF_FLAT". recall: recall@10 against an exact search, mean over queries. rarest_class: the class with
    the fewest rows. rarest_class_recall: the recall of queries of that class. Both are None if no class is known, or if the
    version was published before synpipe measured this recall.
    """

    version: int
    tag: str
    rows: int
    kind: str
    partitions: int
    nprobes: int
    recall: float
    rarest_class: str | None = None
    rarest_class_recall: float | None = None


@dataclass(frozen=True)
class Cost:
    """The cost of a published table. bytes: size of its rows without indexes. query_ms: median time to find the ten nearest."""

    bytes: int
    query_ms: float


def tag_for(data_version: str, fingerprint: str) -> str:
    """Return the tag of a version. It names the data version and the encoder's fingerprint, with 12 hex digits of each."""
    return f"data-{data_version[:12]}-encoder-{fingerprint[:12]}"


def tag_of(table: Any) -> str | None:
    """Return the tag that the opened version of a LanceDB table should have, or None if its build did not end."""
    provenance = read_provenance(table.schema)
    if b"synpipe.nprobes" not in (table.schema.field("vector").metadata or {}):
        return None
    return tag_for(provenance["data_version"], provenance["encoder_fingerprint"])


def publish(
    table_path: Path, folder: BulkPath, name: str, data_version: str, log: Callable[[str], None]
) -> IndexReport:
    """Build table `name` of the LanceDB database `folder` from a Parquet file, verify it, and move the tag `current`.

    data_version: version of the index. It is stored in the schema's metadata, with the provenance of the Parquet file.

    Raises `SynpipeError`, and leaves `current` where it was, if the file is damaged, the disk is full, rows or indexes are
    incomplete, or the recall is too low.
    """
    try:
        _set_aside_unreadable(folder, name, log)
        return _publish(table_path, folder, name, data_version, log)
    except UNREADABLE as error:  # raised by pyarrow and LanceDB for files and disks
        reason = one_line(error).partition("Detail: Python exception")[0].rstrip(". ")
        raise SynpipeError(
            f"The index {folder}/{name} cannot be built from {table_path}: {reason}. If that file is damaged, materialise again "
            "to rebuild it; otherwise check the space and the permissions of the store."
        ) from error


def _publish(
    table_path: Path, folder: BulkPath, name: str, data_version: str, log: Callable[[str], None]
) -> IndexReport:
    source = pq.ParquetFile(table_path, memory_map=True, page_checksum_verification=True)
    # Normally an earlier step stops if there is nothing to embed. LanceDB would accept an empty table and fail at the index.
    if source.metadata.num_rows == 0:
        raise SynpipeError(f"{table_path} has no rows: there is nothing to index. Look at the rejects.")
    provenance = read_provenance(source.schema_arrow)
    provenance |= {"table_data_version": provenance["data_version"], "data_version": data_version}
    schema = pa.schema([*source.schema_arrow], metadata={METADATA_KEY: json.dumps(provenance)})
    batches = (_with_unit_vectors(batch).cast(schema) for batch in source.iter_batches(BATCH_ROWS))
    path, rows = folder / f"{name}.lance", source.metadata.num_rows
    before = index_files.list_files(path)
    write_rows(path, schema, batches, rows)
    log(f"{rows:,} rows written, building indexes")
    table = connect(folder, session=lancedb.Session(index_cache_size_bytes=PUBLISH_CACHE_BYTES)).open_table(name)
    if table.count_rows() != rows:
        raise SynpipeError(f"{folder}/{name} has {table.count_rows()} rows, {table_path} {rows}.")
    build_indexes(table, path, log)
    nprobes, recalls = tune(table, table_path, partitions_for(rows))
    for queries, recall in recalls.items():
        if recall < MIN_RECALL:
            raise SynpipeError(
                f"The index {folder}/{name} finds {recall:.1%} of the true neighbours{f' of {queries}' if queries else ''}, less "
                f"than {MIN_RECALL:.0%}; the former version stays current. Look at the check of the embeddings: many vectors "
                "may be alike."
            )
    digests = index_files.digest_files(path, index_files.list_files(path) - before)
    metadata = {"synpipe.nprobes": str(nprobes), index_files.KEY.decode(): digests}
    for queries, recall in recalls.items():
        metadata["synpipe.rarest_class_recall_at_10" if queries else "synpipe.recall_at_10"] = f"{recall:.4f}"
        metadata |= {"synpipe.rarest_class": queries} if queries else {}
    table.update_field_metadata({"path": "vector", "metadata": metadata})
    tag = tag_for(data_version, provenance["encoder_fingerprint"])
    for label in (tag, CURRENT):
        _move_tag(table, label)
    return published(folder, name)


def connect(folder: BulkPath, **options: Any) -> lancedb.DBConnection:
    """Connect to the LanceDB database in a folder, local or on an object store."""
    return lancedb.connect(str(folder), storage_options=lance_options(folder), **options)


def open_current(folder: BulkPath, name: str) -> Any:
    """Open the current version of a LanceDB table, read-only. Raises `SynpipeError` if none has been published."""
    if not (folder / f"{name}.lance").is_dir():
        raise SynpipeError(f"There is no index {name} in {folder}: materialise index_{name} first.")
    try:
        table = connect(folder, read_consistency_interval=timedelta(0)).open_table(name)
        table.checkout(CURRENT)
    except ValueError:  # LanceDB finds no table in the folder, or no such tag, because its first build was killed
        raise SynpipeError(
            f"The index {name} in {folder} was never published: materialise index_{name} again."
        ) from None
    except RuntimeError as error:
        raise SynpipeError(
            f"The index {name} in {folder} cannot be read ({one_line(error)}): materialise index_{name} again to "
            "rebuild it."
        ) from error
    return table


def check_rows(folder: BulkPath, name: str, table: Any) -> None:
    """Raise `SynpipeError` if the build of the opened version of a LanceDB table did not end, or if its files are damaged.

    Only files that were written later than the version was published are read, so this takes little time.
    """
    with explaining_damage(folder, name):
        if tag_of(table) is None:
            raise ValueError(f"a tag names version {table.version}, which was never published")
        damaged = index_files.find_touched_files(folder / f"{name}.lance", table.version, table.schema)
        if damaged:
            raise ValueError(f"{', '.join(damaged)} is not as it was published")


def list_tags(table: Any) -> dict[str, int]:
    """Return the version number of each tag, including `current`."""
    for _ in range(LIST_ATTEMPTS):
        with contextlib.suppress(RuntimeError):
            return {tag: content["version"] for tag, content in table.tags.list().items()}
        time.sleep(0.01)
    return {tag: content["version"] for tag, content in table.tags.list().items()}


async def open_async_table(folder: BulkPath, name: str, version: int) -> lancedb.AsyncTable:
    """Open a version of a LanceDB table for asynchronous queries."""
    database = await lancedb.connect_async(str(folder), storage_options=lance_options(folder))
    table = await database.open_table(name)
    await table.checkout(version)
    return table


def republish(
    folder: BulkPath, name: str, data_version: str, fingerprint: str, log: Callable[[str], None]
) -> IndexReport | None:
    """Make a version current that was published earlier from this data. Returns None if there is none, or if it is damaged."""
    path = folder / f"{name}.lance"
    if not path.is_dir():
        return None
    lost_tags = set_damaged_parts_aside(path, log)
    try:
        with explaining_damage(folder, name):
            table = connect(folder).open_table(name)
            _restore_tags(table, lost_tags, log)
            number = list_tags(table).get(tag_for(data_version, fingerprint))
            if number is None:
                return None
            table.checkout(number)
            if damaged := index_files.find_damaged_files(path, table.schema):
                log(f"the index {folder}/{name} is damaged ({', '.join(damaged)}): it is rebuilt")
                return None
            if tag_of(table) != tag_for(data_version, fingerprint):
                log(f"the tags of the index {folder}/{name} are damaged: it is rebuilt")
                return None
            _move_tag(table, CURRENT)
            return published(folder, name)
    except SynpipeError as error:
        log(f"{error} It is rebuilt.")
        return None


def published(folder: BulkPath, name: str) -> IndexReport:
    """Describe the current version. Raises `SynpipeError` if nothing has been published."""
    table = open_current(folder, name)
    provenance = read_provenance(table.schema)
    settings = {key.decode(): value.decode() for key, value in table.schema.field("vector").metadata.items()}
    partitions = partitions_for(table.count_rows())
    rarest_recall = settings.get("synpipe.rarest_class_recall_at_10")
    return IndexReport(
        version=table.version,
        tag=tag_for(provenance["data_version"], provenance["encoder_fingerprint"]),
        rows=table.count_rows(),
        kind="IVF_FLAT" if partitions else "flat",
        partitions=partitions,
        nprobes=int(settings["synpipe.nprobes"]),
        recall=float(settings["synpipe.recall_at_10"]),
        rarest_class=settings.get("synpipe.rarest_class"),
        rarest_class_recall=None if rarest_recall is None else float(rarest_recall),
    )


def cost(folder: BulkPath, name: str, queries: int = 20) -> Cost:
    """Measure the size of the current version and the time of a query."""
    table = open_current(folder, name)
    nprobes = published(folder, name).nprobes
    vectors = read_vectors(table.search().select(["vector"]).limit(queries).to_arrow())
    times = []
    for query in vectors:
        started = time.perf_counter()
        table.search(query).distance_type("cosine").nprobes(nprobes).limit(RECALL_K).select(["synapse_id"]).to_arrow()
        times.append(time.perf_counter() - started)
    return Cost(table.stats()["total_bytes"], round(1000 * float(np.median(times)), 2))


def identify(table: Any) -> str:
    """Return a digest that differs between any two builds, to tell whether `current` is still the version that was opened.

    The number of a version is not enough: LanceDB counts from one again in a table that is rebuilt after it was damaged.
    """
    schema = table.schema  # its metadata name the data and, because their names are random, the files of the build
    built = (schema.field("vector").metadata or {}).get(index_files.KEY, b"").decode()
    return digest([table.version, read_provenance(schema), built])


def read_provenance(schema: pa.Schema) -> dict[str, Any]:
    """Read where the rows come from. Embedding tables and all versions of an index store this with their schema."""
    return json.loads(schema.metadata[METADATA_KEY])


def _set_aside_unreadable(folder: BulkPath, name: str, log: Callable[[str], None]) -> None:
    """Move a table aside that LanceDB cannot open, because LanceDB could not add a version to it either."""
    path = folder / f"{name}.lance"
    try:
        list_tags(connect(folder).open_table(name))
    except ValueError:
        return  # there is no table
    except RuntimeError as error:
        log(f"{path} cannot be read ({one_line(error)}): moved to {set_aside(path).name}, and rebuilt")


def _restore_tags(table: Any, lost: list[str], log: Callable[[str], None]) -> None:
    """Create these tags again. A published version knows its tag; `current` is for the caller to set."""
    wanted = {*lost} - {CURRENT}
    numbers = [entry["version"] for entry in table.list_versions()] if wanted else []
    for number in sorted(numbers, reverse=True):
        table.checkout(number)
        if (tag := tag_of(table)) in wanted:
            table.tags.create(tag, number)
            wanted.remove(tag)
            log(f"the tag {tag} names version {number} again")


def _move_tag(table: Any, tag: str) -> None:
    if tag in list_tags(table):
        table.tags.update(tag, table.version)
    else:
        table.tags.create(tag, table.version)


def _with_unit_vectors(batch: pa.RecordBatch) -> pa.RecordBatch:
    """The same rows with vectors of exactly unit length."""
    vectors = read_unit_vectors(batch)
    place = batch.schema.get_field_index("vector")
    unit = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), vectors.shape[1])
    return batch.set_column(place, batch.schema.field(place), unit)
