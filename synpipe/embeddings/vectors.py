"""Vector columns of Arrow tables as NumPy arrays and back, and unit vectors."""

import numpy as np
import pyarrow as pa


def read_vectors(rows: pa.Table | pa.RecordBatch) -> np.ndarray:
    """The column `vector`, a fixed_size_list<float32>[d], as float32 (n, d)."""
    column = rows["vector"]
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    return column.flatten().to_numpy().reshape(len(rows), column.type.list_size)


def read_unit_vectors(rows: pa.Table | pa.RecordBatch) -> np.ndarray:
    """The column `vector` at exactly unit length, float32 (n, d). An embedding table holds rounded vectors."""
    return unit_vectors(read_vectors(rows))


def vector_column(vectors: np.ndarray) -> pa.FixedSizeListArray:
    """Vectors, (n, d) of any float type, as a column fixed_size_list<float32>[d]."""
    values = pa.array(np.ascontiguousarray(vectors, np.float32).ravel())
    return pa.FixedSizeListArray.from_arrays(values, vectors.shape[1])


def unit_vectors(vectors: np.ndarray) -> np.ndarray:
    """Vectors (n, d) divided by their lengths, of the same float type. A vector of length zero stays zero."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.maximum(lengths, np.finfo(np.float32).tiny)
