"""Embedding tables of synthetic vectors, written by synpipe itself, for the tests of table, index and search."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from synpipe.annotations.schema import SYNAPSE_SCHEMA
from synpipe.assets.asset import Asset
from synpipe.assets.embedding_table import CONTRIBUTORS
from synpipe.embeddings.table import Derived, write_embedding_table

PROVENANCE = {
    "dataset": "demo",
    "data_version": "0" * 32,
    "encoder": "tiny",
    "encoder_fingerprint": "f" * 64,
    "dataset_version": "d" * 32,
    "schema_version": 1,
}


def clustered(count: int, dimensions: int, seed: int = 0, clusters: int = 40, spread: float = 0.6) -> np.ndarray:
    """Return vectors like an encoder's, in clusters and of different lengths: float32 (count, dimensions)."""
    random = np.random.default_rng(seed)
    centres = random.normal(size=(clusters, dimensions))
    vectors = centres[random.integers(0, clusters, count)] + spread * random.normal(size=(count, dimensions))
    return (vectors * random.uniform(0.5, 8, (count, 1))).astype(np.float32)


def synapses(count: int, **columns: Any) -> pa.Table:
    """Return synapses 0 … count-1. All columns are null except those given as `columns`."""
    given = {"synapse_id": np.arange(count), **columns}
    arrays = [
        pa.array(given[field.name], field.type) if field.name in given else pa.nulls(count, field.type)
        for field in SYNAPSE_SCHEMA
    ]
    return pa.table(arrays, schema=SYNAPSE_SCHEMA)


def tiles_of(table: pa.Table, shards: int = 1) -> pa.Table:
    """Return one tile per synapse, in `shards` consecutive groups of rows. Tile i has the content hash f"{i:032x}"."""
    count = len(table)
    return pa.table(
        {
            "synapse_id": table["synapse_id"],
            "shard": pa.array(np.arange(count) * shards // max(1, count), pa.int32()),
            "content_hash": [f"{place:032x}" for place in range(count)],
            "pad_fraction": pa.array(np.zeros(count), pa.float32()),
            "missing_sections": pa.array(np.zeros(count), pa.uint8()),
        }
    )


def embedding_table(
    path: Path,
    vectors: np.ndarray,
    shards: int = 1,
    version: str = "0" * 32,
    derived: Sequence[pa.Table] = (),
    **columns: Any,
) -> Path:
    """Write the Parquet file of an embedding table with these vectors, and return its path."""
    table = synapses(len(vectors), **columns)

    def read_vectors(_: int, hashes: list[str]) -> np.ndarray:
        return vectors[[int(content, 16) for content in hashes]]

    provenance = {**PROVENANCE, "data_version": version}
    columns_of_others = [
        Derived(
            asset.table_columns,
            next(([with_nulls(each, asset)] for each in derived if names_of(asset) & {*each.column_names}), None),
        )
        for asset in CONTRIBUTORS
    ]
    write_embedding_table(path, [table], [tiles_of(table, shards)], read_vectors, provenance, columns_of_others)
    return path


def names_of(asset: Asset[Any]) -> set[str]:
    """Names of the columns that an asset gives to the embedding table."""
    return {field.name for field in asset.table_columns}


def with_nulls(table: pa.Table, asset: Asset[Any]) -> pa.Table:
    """The table with null for those columns of an asset that it does not have."""
    for field in asset.table_columns:
        if field.name not in table.column_names:
            table = table.append_column(field, pa.nulls(len(table), field.type))
    return table


NOTHING_DERIVED = [Derived(asset.table_columns, None) for asset in CONTRIBUTORS]


def unit(vectors: np.ndarray) -> np.ndarray:
    """Return the vectors scaled to unit length, in float64."""
    exact = vectors.astype(np.float64)
    return exact / np.linalg.norm(exact, axis=1, keepdims=True)
