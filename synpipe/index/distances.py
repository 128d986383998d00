"""The distances by which vectors are compared, and the formula of each.

Rows are given as unit vectors and their lengths, because an index stores them this way. `cosine` compares directions only;
`l2`, `dot` and `l1` compare the vectors at the length that the encoder gave them. A smaller distance means more similar.
"""

from typing import Literal, get_args

import numpy as np

Metric = Literal["cosine", "l2", "dot", "l1"]
METRICS: tuple[str, ...] = get_args(Metric)

BLOCK_ROWS = 4096  # rows subtracted from the query at a time, so that the differences stay in the processor's cache


def distances_to(
    query: np.ndarray, unit: np.ndarray, norms: np.ndarray, metric: str, cosines: np.ndarray | None = None
) -> np.ndarray:
    """Return the distance of every row to a query: float32 (n,).

    cosine: 1 − cosine. dot: −inner product. l2: Euclidean. l1: Manhattan.

    query: float32 (d,), with its length. unit: float32 (n, d), rows of unit length. norms: float32 (n,), their lengths.
    cosines: float32 (n,), the cosine of each row with the query, if the caller has computed them for many queries at
    once; `cosine` and `dot` then need no product of their own.
    """
    if metric == "cosine":
        return 1 - (unit @ (query / np.linalg.norm(query)) if cosines is None else cosines)
    if metric == "dot":
        return -(unit @ query if cosines is None else cosines * np.linalg.norm(query)) * norms
    distances = np.empty(len(unit), np.float32)
    for first in range(0, len(unit), BLOCK_ROWS):
        block = slice(first, first + BLOCK_ROWS)
        difference = unit[block] * norms[block, None]
        difference -= query
        if metric == "l1":
            distances[block] = np.abs(difference, out=difference).sum(axis=1)
        else:
            distances[block] = np.sqrt(np.einsum("ij,ij->i", difference, difference))
    return distances
