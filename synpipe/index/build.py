"""The rows of a version of a LanceDB table are written, and their indexes built.

In: rows with vectors, a batch at a time. Out: the newest version of the table, with its indexes; nobody reads it before its tag
is set. Guarantee: in memory are as many vectors as the partitions are fitted to, `SAMPLE_RATE` times √rows.

What was measured (LanceDB 0.40, 103,511 × 192): a flat scan 79 ms, IVF_FLAT with 256 partitions and 16 probes 2.5 ms at
the same recall; SQ and PQ show approximate distances, HNSW builds four times slower. So: IVF_FLAT, or nothing below
`FLAT_ROWS`, where a flat scan is exact and takes a few milliseconds. Twice as many partitions take twice as long to build, and
save nothing: most of a query is what LanceDB needs whatever it reads.

Built in one piece, as `create_index` does it, an index of 400,000 × 192 (307 MB) takes 310 MB more than the process had; built by
segments of the rows, which are merged then, 20 MB, and half as long again. `python -m synpipe_tests.bench.memory` measures it.
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
# Rows a partition that the partitions are fitted to; 256, the default, takes twice as long and finds no more.
SAMPLE_RATE = 64
# Segments that are merged at once: each is an open file, of which macOS allows 256.
MERGED_AT_ONCE = 64
VECTOR_INDEX = "vector_idx"  # LanceDB's own name for it
BITMAP_COLUMNS = ("neurotransmitter", "region", "hemilineage", "predicted_neurotransmitter", "split")
BTREE_COLUMNS = ("synapse_id", "neuron_id")


def partitions_for(rows: int) -> int:
    """Partitions of IVF_FLAT: the power of two nearest to √rows (256 at 100,000, 1,024 at a million), 0 for none."""
    return 0 if rows < FLAT_ROWS else 2 ** round(math.log2(math.sqrt(rows)))


def open_lance(path: BulkPath, version: int | str | None = None, **options: Any) -> Any:
    """The LanceDB table in this folder as pylance has it, which does what LanceDB itself offers no way to."""
    import lance

    return lance.dataset(str(path), version=version, storage_options=lance_options(path), **options)


def write_rows(path: BulkPath, schema: pa.Schema, batches: Iterator[pa.RecordBatch], rows: int) -> None:
    """Write a new version of the table in this folder, without indexes. Older ones stay: their readers go on."""
    import lance

    lance.write_dataset(
        pa.RecordBatchReader.from_batches(schema, batches),
        str(path),
        mode="overwrite",
        storage_options=lance_options(path),
        max_rows_per_file=SAMPLE_RATE * partitions_for(rows) or FLAT_ROWS,
    )


def build_indexes(table: lancedb.table.Table, path: BulkPath, log: Callable[[str], None]) -> None:
    """Build the indexes of the newest version of the table in this folder. Raises `SynpipeError` where one is not whole."""
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
        raise SynpipeError(f"{path} has no whole index of {', '.join(sorted(missing))}: materialise again.")


def _build_ivf(path: BulkPath, partitions: int, log: Callable[[str], None]) -> None:
    """An index of the vectors by cosine: a segment for each file of rows, and one of them all."""
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
    merged = set()  # one that is left over from its round is merged in the next
    while len(segments) > 1:
        merged |= {segment.uuid for segment in segments}
        groups = [segments[first : first + MERGED_AT_ONCE] for first in range(0, len(segments), MERGED_AT_ONCE)]
        segments = [dataset.merge_existing_index_segments(group) if len(group) > 1 else group[0] for group in groups]
    dataset.commit_existing_index_segments(VECTOR_INDEX, "vector", segments)
    for uuid in merged:
        remove_tree(path / "_indices" / uuid)
