"""The column `vector` of Arrow rows as an array."""

import numpy as np
import pyarrow as pa


def read_vectors(rows: pa.Table | pa.RecordBatch) -> np.ndarray:
    """The column `vector`: float32 (n, d)."""
    vectors = rows["vector"]
    if isinstance(vectors, pa.ChunkedArray):
        vectors = vectors.combine_chunks()
    return vectors.flatten().to_numpy().reshape(len(rows), -1)


def read_unit_vectors(rows: pa.Table | pa.RecordBatch) -> np.ndarray:
    """The same, of exactly unit length: an embedding table holds them rounded."""
    vectors = read_vectors(rows)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
