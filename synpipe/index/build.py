"""Write the rows of a new version of a LanceDB table, and build its indexes.

Input: rows with vectors, a batch at a time. Output: the newest version of the table with its indexes. Readers do not see it
before a tag names it. Memory holds the vectors that the partitions are fitted to, `SAMPLE_RATE` times √rows of them.

The kind of index follows from measurements (LanceDB 0.40, 103,511 × 192). A flat scan takes 79 ms; IVF_FLAT with 256
partitions and 16 probes takes 2.5 ms at the same recall. SQ and PQ return approximate distances, and HNSW takes four times
as long to build. So IVF_FLAT is used, and no index below `FLAT_ROWS`, where a flat scan is exact and takes a few
milliseconds. Twice as many partitions take twice as long to build and save nothing, because most of the time of a query does
not depend on how much LanceDB reads.

The index is built in segments of the rows, which are then merged. For 400,000 × 192 (307 MB) this adds 20 MB to the memory
of the process, where building in one piece with `create_index` adds 310 MB; it takes half as long again.
`python -m synpipe_tests.bench.memory` measures it.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import lancedb
import pyarrow as pa
from lancedb.index import Bitmap, BTree

from synpipe.errors import SynpipeError
from synpipe.store.objects import BulkPath, lance_options, remove_tree

FLAT_ROWS = 5_000
# Rows per partition that the partitions are fitted to. The default, 256, takes twice as long and improves no recall.
SAMPLE_RATE = 64
# Segments merged at once. Each is an open file, and macOS allows a process 256 of them.
MERGED_AT_ONCE = 64
VECTOR_INDEX = "vector_idx"  # LanceDB's own name for it
BITMAP_COLUMNS = ("neurotransmitter", "region", "hemilineage", "predicted_neurotransmitter", "split")
BTREE_COLUMNS = ("synapse_id", "neuron_id")


def partitions_for(rows: int) -> int:
    """Return the number of partitions of IVF_FLAT: the power of two nearest to √rows (256 for 100,000 rows, 1,024 for a
    million), or 0 for no vector index."""
    return 0 if rows < FLAT_ROWS else 2 ** round(math.log2(math.sqrt(rows)))


def open_lance(path: BulkPath, version: int | str | None = None, **options: Any) -> Any:
    """Open the LanceDB table in this folder with pylance, which offers operations that LanceDB lacks."""
    import lance

    return lance.dataset(str(path), version=version, storage_options=lance_options(path), **options)


def write_rows(path: BulkPath, schema: pa.Schema, batches: Iterator[pa.RecordBatch], rows: int) -> None:
    """Write a new version of the table in this folder, without indexes. Older versions stay, so their readers can go on."""
    import lance

    lance.write_dataset(
        pa.RecordBatchReader.from_batches(schema, batches),
        str(path),
        mode="overwrite",
        storage_options=lance_options(path),
        max_rows_per_file=SAMPLE_RATE * partitions_for(rows) or FLAT_ROWS,
    )


def build_indexes(table: lancedb.table.Table, path: BulkPath, log: Callable[[str], None]) -> None:
    """Build the indexes of the newest version of the table in this folder. Raises `SynpipeError` if one is incomplete."""
    partitions = partitions_for(table.count_rows())
    if partitions:
        _build_ivf(path, partitions, log)
        table.checkout_latest()
    for column in BITMAP_COLUMNS:
        table.create_index(column, config=Bitmap())
    for column in BTREE_COLUMNS:
        table.create_index(column, config=BTree())
    complete = {index.columns[0] for index in table.list_indices() if index.num_unindexed_rows == 0}
    missing = {*BITMAP_COLUMNS, *BTREE_COLUMNS, *(["vector"] if partitions else [])} - complete
    if missing:
        raise SynpipeError(f"{path} has no complete index of {', '.join(sorted(missing))}: materialise again.")


def _build_ivf(path: BulkPath, partitions: int, log: Callable[[str], None]) -> None:
    """Build the index of the vectors by cosine: a segment for each file of rows, which are then merged into one."""
    from lance.indices import IndicesBuilder

    dataset = open_lance(path, index_cache_size_bytes=0)
    fitted = IndicesBuilder(dataset, "vector").train_ivf(partitions, distance_type="cosine", sample_rate=SAMPLE_RATE)
    segments = []
    fragments = dataset.get_fragments()
    for number, fragment in enumerate(fragments, start=1):
        segments.append(
            dataset.create_index_uncommitted(
                "vector",
                "IVF_FLAT",
                name=VECTOR_INDEX,
                metric="cosine",
                num_partitions=partitions,
                ivf_centroids=fitted.centroids,
                fragment_ids=[fragment.fragment_id],
            )
        )
        log(f"{number:,} of {len(fragments):,} parts of the vectors indexed")
    merged = set()  # a segment that is left over in one round is merged in the next
    while len(segments) > 1:
        merged |= {segment.uuid for segment in segments}
        groups = [segments[first : first + MERGED_AT_ONCE] for first in range(0, len(segments), MERGED_AT_ONCE)]
        segments = [dataset.merge_existing_index_segments(group) if len(group) > 1 else group[0] for group in groups]
    dataset.commit_existing_index_segments(VECTOR_INDEX, "vector", segments)
    for uuid in merged:
        remove_tree(path / "_indices" / uuid)
