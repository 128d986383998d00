"""Compute the map of an encoder: a place in the plane for every vector, so that similar vectors lie close together.

Input: vectors, float32 (n, d). Output: places, float32 (n, 2), by UMAP (L. McInnes, J. Healy, J. Melville,
arXiv:1802.03426, 2018) with the cosine, as in the search. On one machine, the same vectors in the same order with the same
spec get the same places.

The map shows which vectors are neighbours. Distances between clusters and their sizes mean little. UMAP starts from the
first two principal components, so that the global arrangement comes from them and not from chance (D. Kobak, G. Linderman,
Nature Biotechnology 39, 2021). The map is fitted again for every set of vectors, so added synapses move all others.

umap takes eight seconds to import and ten to compile, so only the functions that need it import it.
"""

import warnings
from collections.abc import Callable

import numpy as np
from pydantic import Field

from synpipe.embeddings.vectors import unit_vectors
from synpipe.specs import Spec

# UMAP is fitted to this many vectors at most; the others are placed among them. `python -m synpipe_tests.bench.projection`
# measures time and memory.
FIT_ROWS = 200_000

Place = Callable[[np.ndarray], np.ndarray]
"""Maps vectors, float32 (n, d), to places, float32 (n, 2)."""


class ProjectionSpec(Spec):
    """How a map is computed; the fields are parameters of UMAP.

    n_neighbours: number of neighbours that are kept close. Larger numbers show the coarse structure, smaller ones the fine
    structure. min_dist: smallest distance between points.
    """

    n_neighbours: int = Field(15, ge=2, le=200)
    min_dist: float = Field(0.1, ge=0, le=0.99)
    seed: int = Field(0, ge=0, lt=2**32)


def enough_for_umap(count: int, spec: ProjectionSpec) -> bool:
    """Tell whether there are enough vectors for UMAP. If not, `fit_map` uses the first two principal components."""
    return count > spec.n_neighbours + 1


def fit_map(vectors: np.ndarray, spec: ProjectionSpec) -> tuple[np.ndarray, Place]:
    """Return the places of vectors, float32 (n, d) with n > 0, and a function that places other vectors on the same map."""
    unit = unit_vectors(vectors)
    if not enough_for_umap(len(vectors), spec):
        mean = unit.mean(axis=0)
        _, _, axes = np.linalg.svd(unit - mean, full_matrices=False)
        axes = np.pad(axes[:2], ((0, max(0, 2 - len(axes))), (0, 0)))
        return (unit - mean) @ axes.T, lambda others: (unit_vectors(others) - mean) @ axes.T
    import torch
    import umap

    threads = torch.get_num_threads()
    model = umap.UMAP(
        n_neighbors=spec.n_neighbours,
        min_dist=spec.min_dist,
        metric="cosine",
        init="pca",
        random_state=spec.seed,
        n_jobs=1,  # with several threads two runs differ, because they overwrite each other's places
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # warnings of umap and numba do not help a person who draws a map
        places = model.fit_transform(unit)
    # When numba starts its threads, it sets OpenMP's number of threads for the whole process. With another number, torch would
    # add up in another order in later steps.
    torch.set_num_threads(threads)

    def place(others: np.ndarray) -> np.ndarray:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return np.asarray(model.transform(unit_vectors(others)), np.float32)

    return np.asarray(places, np.float32), place
