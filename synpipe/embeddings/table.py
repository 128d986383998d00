"""The embedding table: synapses with their vectors in one Parquet file, for every tool that reads Parquet.

In: the synapses, the index of their tiles, vectors by shard, and tables of what was derived from the vectors. Out: one
file, a row group per shard. Memory is bounded by a shard, but for 16 bytes of each row of the synapses and of what was
derived (`streams.RowsById`). Guarantee: one row per tile, of a known synapse, with a
vector whose length is 1 to within 1/500.

Why the file is smaller than gzipped JSON of the same vectors: a component of a unit vector of d dimensions is about
1/√d, so all of them are rounded to multiples of one step, 2^−8 of the power of two below 1/√d. Rounded, a row group holds
a few thousand different float32 values, which Parquet's dictionary encoding stores in some eleven bits each, before
zstd. The error of a component is at most 1/500 of its typical size; the nearest ten are the same in .997 of the places.
Half precision would need a sixth more space, and DuckDB 2.0 cannot read it byte-stream split.
"""

import json
import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from synpipe.annotations.schema import SYNAPSE_SCHEMA
from synpipe.errors import SynpipeError
from synpipe.store.files import atomic_path
from synpipe.store.streams import RowsById, by_shard

STEP_BITS = 8

ReadVectors = Callable[[int, list[str]], np.ndarray]
"""Shard and content hashes (n) to vectors, float32 (n, d)."""


# Columns that other assets derive from the vectors; null where an asset is switched off or says nothing of a synapse.
DERIVED_FIELDS = (
    pa.field("predicted_neurotransmitter", pa.string()),  # `neurotransmitter` is the known one, see `classifier_scores`
    pa.field("predicted_probability", pa.float32()),
    # In the order of `classes` in the metadata's `dataset_spec`. No fixed size: the schema is the same for every data set,
    # and a null takes no space.
    pa.field("class_probabilities", pa.list_(pa.float32())),
    pa.field("split", pa.string()),  # side on which the synapse stood when the prediction was learned
    pa.field("map_x", pa.float32()),  # place on the map of the encoder, see `projection`
    pa.field("map_y", pa.float32()),
)


def table_schema(dimensions: int) -> pa.Schema:
    """Columns of the embedding table, in Parquet and in LanceDB."""
    return pa.schema(
        [
            *SYNAPSE_SCHEMA,
            pa.field("content_hash", pa.string(), nullable=False),  # of the tile, see `tiles.PART_SCHEMA`
            pa.field("pad_fraction", pa.float32()),
            pa.field("missing_sections", pa.uint8()),
            pa.field("vector", pa.list_(pa.float32(), dimensions), nullable=False),  # of unit length, rounded
            pa.field("norm", pa.float32(), nullable=False),  # length of the vector as the encoder gave it
            *DERIVED_FIELDS,
            pa.field("encoder", pa.string(), nullable=False),
            pa.field("encoder_fingerprint", pa.string(), nullable=False),
            pa.field("dataset_version", pa.string(), nullable=False),
        ]
    )


def write_embedding_table(
    path: Path,
    synapses: Iterable[pa.Table],
    tiles: Iterable[pa.Table],
    read_vectors: ReadVectors,
    provenance: dict[str, Any],
    derived: Sequence[Iterable[pa.Table]] = (),
) -> int:
    """Join, normalise and write; returns the number of rows. Tables come in parts.

    tiles: `synapse_id`, `shard`, `content_hash`, `pad_fraction`, `missing_sections`, the rows of a shard together.
    provenance: goes into the schema's metadata under `synpipe` as JSON; `encoder`, `encoder_fingerprint` and
    `dataset_version` of it are columns too. derived: tables with `synapse_id` and some of `DERIVED_FIELDS`.
    Raises `SynpipeError` where a tile's synapse is unknown, or a vector's length is zero or not finite.
    """
    metadata = {"synpipe": json.dumps(provenance, sort_keys=True)}
    writer, count = None, 0
    with ExitStack() as stack:
        temporary = stack.enter_context(atomic_path(path))
        by_id = stack.enter_context(RowsById(synapses, path.parent))
        others = [stack.enter_context(RowsById(parts, path.parent)) for parts in derived]
        for shard, rows in by_shard(tiles):
            ids = rows["synapse_id"].to_numpy()
            unknown = ids[~by_id.knows(ids)]
            if len(unknown):
                raise SynpipeError(
                    f"{len(unknown)} tiles belong to no synapse of this version, in shard {shard}, the first to synapse "
                    f"{unknown[0]}: materialise synapse_stacks and rgb_tiles again."
                )
            rows = with_derived(rows, others)
            vectors = read_vectors(shard, rows["content_hash"].to_pylist())
            group = _row_group(by_id.take(ids), rows, vectors, provenance)
            if writer is None:
                schema = group.schema.with_metadata(metadata)
                # The step bounds the dictionary; 1 MB, the default limit, would hold a quarter of a million values.
                writer = pq.ParquetWriter(temporary, schema, compression="zstd", write_page_checksum=True)
                stack.callback(writer.close)
            writer.write_table(group.cast(schema))
            count += len(group)
        if writer is None:
            raise SynpipeError(f"There are no tiles to make {path} of. Look at the rejects.")
    return count


def with_derived(rows: pa.Table, derived: Sequence[RowsById]) -> pa.Table:
    """`rows` with `DERIVED_FIELDS`, taken by `synapse_id` from whichever of `derived` has them; else null."""
    taken = [source.take(rows["synapse_id"].to_numpy()) for source in derived]
    for field in DERIVED_FIELDS:
        source = next((table for table in taken if field.name in table.column_names), None)
        column = pa.nulls(len(rows), field.type) if source is None else source[field.name].cast(field.type)
        rows = rows.append_column(field, column)
    return rows


def round_vectors(vectors: np.ndarray) -> np.ndarray:
    """Round the components of unit vectors, float32 (n, d), to multiples of the step that the module describes."""
    steps = np.float32(2.0 ** (math.ceil(math.log2(math.sqrt(vectors.shape[1]))) + STEP_BITS))
    return np.round(vectors * steps) / steps


def _row_group(synapses: pa.Table, tiles: pa.Table, vectors: np.ndarray, provenance: dict[str, Any]) -> pa.Table:
    """synapses: those of the tiles, in their order."""
    norms = np.linalg.norm(vectors, axis=1)
    bad = np.flatnonzero(~((norms > 0) & np.isfinite(norms)))
    if len(bad):
        raise SynpipeError(
            f"The vector of synapse {tiles['synapse_id'][int(bad[0])]} has length {norms[bad[0]]}: encoder "
            f"{provenance['encoder']} does not work here."
        )
    unit = round_vectors(vectors / norms[:, None])
    count, dimensions = vectors.shape
    columns = {
        **{name: synapses[name] for name in SYNAPSE_SCHEMA.names},
        **{name: tiles[name] for name in ("content_hash", "pad_fraction", "missing_sections")},
        "vector": pa.FixedSizeListArray.from_arrays(pa.array(unit.ravel(), pa.float32()), dimensions),
        "norm": pa.array(norms, pa.float32()),
        **{field.name: tiles[field.name] for field in DERIVED_FIELDS},
        **{
            name: pa.repeat(pa.scalar(provenance[name]), count)
            for name in ("encoder", "encoder_fingerprint", "dataset_version")
        },
    }
    return pa.table(columns).cast(table_schema(dimensions))
