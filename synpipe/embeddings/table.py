"""Writes the embedding table: synapses with their vectors in one Parquet file, for any tool that reads Parquet.

Input: the synapses, the index of their tiles, vectors by shard, and tables that were derived from the vectors. Output: one
file with a row group per shard. The table has one row per tile. Each row belongs to a known synapse, and the length of its
vector is 1 to within 1/500. Memory use is bounded by one shard, plus 16 bytes for each row of the synapses and of the derived
tables (`streams.RowsById`).

The file is smaller than gzipped JSON of the same vectors, because vectors are rounded. A component of a unit vector of d
dimensions is about 1/√d, so all components are rounded to multiples of one step, 2^−8 of the power of two below 1/√d. After
that, a row group holds a few thousand different float32 values. Parquet's dictionary encoding stores each in some eleven
bits, before zstd. The error of a component is at most 1/500 of its typical size, and .997 of the ten nearest neighbours stay
the same. Half precision would need a sixth more space, and DuckDB 2.0 cannot read it with byte-stream split encoding.
"""

import json
import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from synpipe.annotations.schema import SYNAPSE_SCHEMA
from synpipe.embeddings.vectors import vector_column
from synpipe.errors import SynpipeError
from synpipe.store.files import atomic_path
from synpipe.store.streams import RowsById, by_shard

STEP_BITS = 8

ReadVectors = Callable[[int, list[str]], np.ndarray]
"""Shard and content hashes (n) to vectors, float32 (n, d)."""


@dataclass(frozen=True)
class Derived:
    """Columns that another asset derived from the vectors. fields: their names and types. batches: a table with `synapse_id` and
    these columns, in pieces; None if the asset is switched off, and the columns are null."""

    fields: Sequence[pa.Field]
    batches: Iterable[pa.Table] | None


def table_schema(dimensions: int, derived_fields: Sequence[pa.Field]) -> pa.Schema:
    """The columns of the embedding table for vectors of `dimensions` components, in Parquet and in LanceDB."""
    return pa.schema(
        [
            *SYNAPSE_SCHEMA,
            pa.field("content_hash", pa.string(), nullable=False),  # of the tile; see `tile.PART_SCHEMA`
            pa.field("pad_fraction", pa.float32()),
            pa.field("missing_sections", pa.uint8()),
            pa.field("vector", pa.list_(pa.float32(), dimensions), nullable=False),  # of unit length, rounded
            pa.field("norm", pa.float32(), nullable=False),  # length of the vector that the encoder computed
            *derived_fields,
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
    derived: Sequence[Derived] = (),
) -> int:
    """Join, normalise and write the rows. Returns their number. Each table is passed as an iterable of pieces.

    tiles: `synapse_id`, `shard`, `content_hash`, `pad_fraction`, `missing_sections`; the rows of a shard are consecutive.
    provenance: goes into the metadata of the schema under `synpipe` as JSON; its `encoder`, `encoder_fingerprint` and
    `dataset_version` are also columns. derived: columns of other assets, in the order in which the table has them.
    Raises `SynpipeError` if there are no tiles, the synapse of a tile is unknown, or the length of a vector is zero or not
    finite. The former file then stays as it is.
    """
    metadata = {"synpipe": json.dumps(provenance, sort_keys=True)}
    writer, count = None, 0
    with ExitStack() as stack:
        temporary = stack.enter_context(atomic_path(path))
        by_id = stack.enter_context(RowsById(synapses, path.parent))
        lookups = [
            None if each.batches is None else stack.enter_context(RowsById(each.batches, path.parent))
            for each in derived
        ]
        fields = [field for each in derived for field in each.fields]
        for shard, rows in by_shard(tiles):
            ids = rows["synapse_id"].to_numpy()
            unknown = ids[~by_id.knows(ids)]
            if len(unknown):
                raise SynpipeError(
                    f"{len(unknown)} tiles belong to no synapse of this version, in shard {shard}, the first one to synapse "
                    f"{unknown[0]}: materialise synapse_stacks and rgb_tiles again."
                )
            for each, lookup in zip(derived, lookups, strict=True):
                rows = add_derived_columns(rows, each.fields, lookup)
            vectors = read_vectors(shard, rows["content_hash"].to_pylist())
            group = _row_group(by_id.take(ids), rows, vectors, provenance, fields)
            if writer is None:
                schema = group.schema.with_metadata(metadata)
                # Rounding bounds the dictionary, which stays far below the default limit of 1 MB, a quarter of a million values.
                writer = pq.ParquetWriter(temporary, schema, compression="zstd", write_page_checksum=True)
                stack.callback(writer.close)
            writer.write_table(group.cast(schema))
            count += len(group)
        if writer is None:
            raise SynpipeError(f"There are no tiles, so {path} cannot be written. Look at the rejects.")
    return count


def add_derived_columns(rows: pa.Table, fields: Sequence[pa.Field], lookup: RowsById | None) -> pa.Table:
    """Append columns, looked up by `synapse_id`; null without a lookup."""
    table = None if lookup is None else lookup.take(rows["synapse_id"].to_numpy())
    for field in fields:
        column = pa.nulls(len(rows), field.type) if table is None else table[field.name].cast(field.type)
        rows = rows.append_column(field, column)
    return rows


def round_vectors(vectors: np.ndarray) -> np.ndarray:
    """Round the components of unit vectors, float32 (n, d), to multiples of the step that the module docstring describes."""
    steps = np.float32(2.0 ** (math.ceil(math.log2(math.sqrt(vectors.shape[1]))) + STEP_BITS))
    return np.round(vectors * steps) / steps


def _row_group(
    synapses: pa.Table,
    tiles: pa.Table,
    vectors: np.ndarray,
    provenance: dict[str, Any],
    derived_fields: Sequence[pa.Field],
) -> pa.Table:
    """The rows of one shard. synapses: those of the tiles, in the same order."""
    norms = np.linalg.norm(vectors, axis=1)
    bad = np.flatnonzero(~((norms > 0) & np.isfinite(norms)))
    if len(bad):
        raise SynpipeError(
            f"The vector of synapse {tiles['synapse_id'][int(bad[0])]} has length {norms[bad[0]]}, so it has no direction: "
            f"encoder {provenance['encoder']} cannot represent its tile. Check its weights, or choose another encoder."
        )
    unit = round_vectors(vectors / norms[:, None])
    columns = {
        **{name: synapses[name] for name in SYNAPSE_SCHEMA.names},
        **{name: tiles[name] for name in ("content_hash", "pad_fraction", "missing_sections")},
        "vector": vector_column(unit),
        "norm": pa.array(norms, pa.float32()),
        **{field.name: tiles[field.name] for field in derived_fields},
        **{
            name: pa.repeat(pa.scalar(provenance[name]), len(vectors))
            for name in ("encoder", "encoder_fingerprint", "dataset_version")
        },
    }
    return pa.table(columns).cast(table_schema(vectors.shape[1], derived_fields))
