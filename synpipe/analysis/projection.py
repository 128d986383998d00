"""The map: a place in the plane for every vector of an encoder, so that vectors which are alike lie side by side.

In: vectors, float32 (n, d). Out: places, float32 (n, 2), by UMAP (L. McInnes, J. Healy, J. Melville, arXiv:1802.03426, 2018)
under cosine, the measure of the search; and a picture of them. Guarantee: on one machine the same vectors in the same
order, with the same spec, get the same places.

What the map tells: who is next to whom. Distances between clusters, and their sizes, tell little. It begins at the first
two principal components, so that what it says of the whole is theirs and not that of chance (D. Kobak, G. Linderman,
Nature Biotechnology 39, 2021). It is fitted anew for every set of vectors: added synapses move all the others.

umap takes eight seconds to import and ten to compile, so it is imported by what needs it only.
"""

import io
import warnings
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image
from pydantic import Field

from synpipe.annotations.schema import UNLABELLED
from synpipe.embeddings.vectors import unit_vectors
from synpipe.specs import Spec

# UMAP sees this many vectors at the most; the others get places among those. What it takes was measured by
# `python -m synpipe_tests.bench.projection`.
FIT_ROWS = 200_000

# M. Okabe, K. Ito, "Color universal design", 2008, without its yellow, which is faint on white.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "o^s"
GREY = "#BBBBBB"
PICTURE_POINTS = 200_000
PICTURE_INCHES, PICTURE_DPI = (8.0, 6.4), 100

Place = Callable[[np.ndarray], np.ndarray]
"""Vectors, float32 (n, d), to places, float32 (n, 2)."""


class ProjectionSpec(Spec):
    """How a map is drawn: as the parameters of UMAP of the same names.

    n_neighbours: how many are kept near; more show the coarse, fewer the fine structure. min_dist: how close points may come.
    """

    n_neighbours: int = Field(15, ge=2, le=200)
    min_dist: float = Field(0.1, ge=0, le=0.99)
    seed: int = Field(0, ge=0, lt=2**32)


def enough_for_umap(count: int, spec: ProjectionSpec) -> bool:
    """Whether there are more vectors than neighbours; for fewer, `fit_map` gives the two first principal components."""
    return count > spec.n_neighbours + 1


def fit_map(vectors: np.ndarray, spec: ProjectionSpec) -> tuple[np.ndarray, Place]:
    """Places of vectors, float32 (n, d) and n > 0, and the function that gives others their places on the same map."""
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
        n_jobs=1,  # threads write into one another's places: with more of them, two runs differ
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of umap and numba: of little use to a person who draws a map
        places = model.fit_transform(unit)
    # When numba starts its threads it sets OpenMP's number of them for the whole process, and with another number torch, in the
    # steps that follow, would add up in another order.
    torch.set_num_threads(threads)

    def place(others: np.ndarray) -> np.ndarray:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return np.asarray(model.transform(unit_vectors(others)), np.float32)

    return np.asarray(places, np.float32), place


def map_picture(places: np.ndarray, labels: np.ndarray, classes: Sequence[str], title: str) -> Image.Image:
    """Points coloured by class, rare classes on top; what is of no class is grey and lies behind.

    places: float32 (n, 2). labels: string (n,). classes: in the order of the palette. The legend counts all of the points.
    """
    from matplotlib.figure import Figure  # without pyplot, which would keep every figure and look for a screen

    counts = {name: int((labels == name).sum()) for name in classes if name in labels}
    others = len(labels) - sum(counts.values())
    if len(places) > PICTURE_POINTS:
        shown = np.random.default_rng(0).permutation(len(places))[:PICTURE_POINTS]
        places, labels = places[shown], labels[shown]
    figure = Figure(figsize=PICTURE_INCHES, dpi=PICTURE_DPI, layout="constrained")
    axes = figure.subplots()
    size = float(np.clip(20_000 / max(1, len(places)), 0.3, 16))
    if others:
        unknown = places[~np.isin(labels, list(classes))]
        axes.scatter(unknown[:, 0], unknown[:, 1], s=size, c=GREY, linewidths=0, label=f"{UNLABELLED}  {others:,}")
    for order, name in enumerate(sorted(counts, key=lambda name: -counts[name])):
        number = list(classes).index(name)
        points = places[labels == name]
        axes.scatter(
            points[:, 0],
            points[:, 1],
            s=size,
            c=PALETTE[number % len(PALETTE)],
            marker=MARKERS[number // len(PALETTE) % len(MARKERS)],
            linewidths=0,
            alpha=0.8,
            zorder=2 + order,
            label=f"{name}  {counts[name]:,}",
        )
    axes.set(title=title, xlabel="map_x", ylabel="map_y", aspect="equal")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, markerscale=float(np.sqrt(40 / size)))
    axes.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return Image.open(buffer)
