"""Hand-made descriptors: encoders that have learnt nothing, for trained ones to be held against.

In: tiles, uint8 (n, 3, 256, 256). Out: vectors, float32 (n, d). Guarantees: nothing is fitted to any data; brightness and
contrast of the whole tile are taken out first (but by `grey_histogram`, which is about nothing else).

The centre of the tile is described, at its own scale; `pixels` and `hog` see the middle section only.
"""

from collections.abc import Callable
from functools import lru_cache
from importlib.metadata import version
from typing import Literal, get_args

import numpy as np

from synpipe.specs import Spec, digest

Name = Literal["pixels", "hog", "lbp", "grey_histogram", "filter_bank", "filter_bank_pooled"]
NAMES: tuple[str, ...] = get_args(Name)
CROP_PX = 128
PIXELS_CROP_PX, PIXELS = 224, 28
HOG_CELL_PX, HOG_BINS, HOG_CLIP = 16, 9, 0.2
LBP_RADII_PX = (1, 2, 4)
HISTOGRAM_BINS = 32
FILTER_SIGMAS_PX = {1.5: 1, 3.0: 2, 6.0: 4, 12.0: 8}
"""Scales of the filters, and every how many pixels their responses are taken."""
FILTER_EDGE_PX, FILTER_CROP_PX = 224, 192
"""What is filtered, and what is described: filtering wraps around, which is to stay outside."""
RINGS_PX = (24, 48, 72, 96)
"""Outer radii; what lies beyond the last, in the corners, is not described."""
CROPS_PX: dict[str, int] = {
    **dict.fromkeys(NAMES, CROP_PX),
    "pixels": PIXELS_CROP_PX,
    **dict.fromkeys(("filter_bank", "filter_bank_pooled"), FILTER_EDGE_PX),
}
_METHOD = 1  # raise it when a change in this file changes the vectors


class DescriptorSpec(Spec):
    """An entry of the registry that names a descriptor: it has no weights and nothing to set."""

    descriptor: Name
    description: str = ""

    @property
    def model(self) -> str:
        """For messages."""
        return self.descriptor

    def fingerprint(self) -> str:
        """Everything that changes a number: the method, and the libraries that it rests on."""
        return digest([self.descriptor, _METHOD, version("numpy"), version("scipy")])


def describe(name: str, tiles: np.ndarray) -> np.ndarray:
    """Vectors of tiles: uint8 (n, 3, 256, 256) to float32 (n, d)."""
    functions: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        "pixels": pixels,
        "hog": hog,
        "lbp": lbp,
        "grey_histogram": grey_histogram,
        "filter_bank": filter_bank,
        "filter_bank_pooled": filter_bank_pooled,
    }
    return _not_zero(functions[name](tiles).astype(np.float32))


def crop(tiles: np.ndarray, size_px: int) -> np.ndarray:
    """The centre of each section, (…, size_px, size_px)."""
    edge = (tiles.shape[-1] - size_px) // 2
    return tiles[..., edge : edge + size_px, edge : edge + size_px]


def pixels(tiles: np.ndarray) -> np.ndarray:
    """The middle section reduced to 28 × 28 pixels by taking means, less its mean: (n, 784)."""
    middle = crop(tiles[:, 1], PIXELS_CROP_PX).astype(np.float32)
    step = PIXELS_CROP_PX // PIXELS
    small = middle.reshape(len(tiles), PIXELS, step, PIXELS, step).mean(axis=(2, 4)).reshape(len(tiles), -1)
    return small - small.mean(axis=1, keepdims=True)


def hog(tiles: np.ndarray) -> np.ndarray:
    """Histograms of oriented gradients of the middle section (Dalal & Triggs, CVPR 2005): (n, 1764).

    Nine orientations without sign, cells of 16 px, blocks of 2 × 2 cells with the L2-Hys norm. A pixel votes for the two
    nearest orientations; it belongs to one cell, without the interpolation between cells of the original.
    """
    middle = crop(tiles[:, 1], CROP_PX).astype(np.float32)
    dy, dx = np.gradient(middle, axis=(1, 2))
    strength, place = np.hypot(dy, dx), np.arctan2(dy, dx) % np.pi * HOG_BINS / np.pi - 0.5
    lower = np.floor(place).astype(np.int64)
    upper_share = place - lower
    cells_a_side = CROP_PX // HOG_CELL_PX
    cells = np.empty((len(tiles), cells_a_side, cells_a_side, HOG_BINS), dtype=np.float32)
    for number in range(HOG_BINS):
        votes = np.where(lower % HOG_BINS == number, 1 - upper_share, 0)
        votes += np.where((lower + 1) % HOG_BINS == number, upper_share, 0)
        votes *= strength
        cells[..., number] = votes.reshape(-1, cells_a_side, HOG_CELL_PX, cells_a_side, HOG_CELL_PX).sum(axis=(2, 4))
    blocks = np.concatenate([cells[:, :-1, :-1], cells[:, :-1, 1:], cells[:, 1:, :-1], cells[:, 1:, 1:]], axis=-1)
    for limit in (HOG_CLIP, np.inf):  # clipped and normalised anew: that is what Hys stands for
        blocks = np.minimum(blocks / np.sqrt((blocks**2).sum(axis=-1, keepdims=True) + 1e-6), limit)
    return blocks.reshape(len(tiles), -1)


def lbp(tiles: np.ndarray) -> np.ndarray:
    """Uniform rotation-invariant local binary patterns (Ojala, Pietikäinen & Mäenpää, PAMI 2002, LBP riu2): (n, 90).

    Each section for itself. Eight neighbours on the square of radius 1, 2 and 4 px; square roots of the ten shares, so
    that a cosine is a Bhattacharyya coefficient.
    """
    reach = max(LBP_RADII_PX)
    padded = crop(tiles, CROP_PX + 2 * reach)
    centre = crop(padded, CROP_PX)
    found = []
    for radius in LBP_RADII_PX:
        around = [(-1, -1), (-1, 0), (-1, 1), (0, 1), (1, 1), (1, 0), (1, -1), (0, -1)]
        bits = np.stack(
            [
                padded[
                    ...,
                    reach + y * radius : reach + y * radius + CROP_PX,
                    reach + x * radius : reach + x * radius + CROP_PX,
                ]
                >= centre
                for y, x in around
            ]
        )
        changes = (bits != np.roll(bits, 1, axis=0)).sum(axis=0)
        pattern = np.where(changes <= 2, bits.sum(axis=0), 9)
        found.append(_shares(pattern, 10))
    return np.sqrt(np.concatenate(found, axis=1))


def grey_histogram(tiles: np.ndarray) -> np.ndarray:
    """Shares of 32 ranges of grey in each section, as square roots: (n, 96)."""
    return np.sqrt(_shares(crop(tiles, CROP_PX).astype(np.int64) * HISTOGRAM_BINS // 256, HISTOGRAM_BINS))


def filter_bank(tiles: np.ndarray) -> np.ndarray:
    """Mean and spread of the responses to blobs, edges and bars, four scales, in four rings around the centre: (n, 384).

    Each section for itself. Edges and bars are pooled over all angles, by the largest and the smallest response.
    """
    return _ring_statistics(tiles, 0).reshape(len(tiles), -1)


def filter_bank_pooled(tiles: np.ndarray) -> np.ndarray:
    """The same of edges and bars only, as the mean of the three sections: (n, 96).

    What is left out hurts: smoothed grey changes with contrast, and a section off is another section.
    """
    return _ring_statistics(tiles, 1).mean(axis=3).reshape(len(tiles), -1)


def _ring_statistics(tiles: np.ndarray, first_filter: int) -> np.ndarray:
    """float32 (n, scales, filters, 3 sections, rings, 2): means and standard deviations. Filters: blob, edge, two of bars."""
    from scipy import fft

    grey = crop(tiles, FILTER_EDGE_PX).astype(np.float32)
    grey -= grey.mean(axis=(1, 2, 3), keepdims=True)
    grey /= np.maximum(grey.std(axis=(1, 2, 3), keepdims=True), 1e-6)
    spectrum = fft.rfft2(grey)
    found = []
    for sigma, step in FILTER_SIGMAS_PX.items():
        # A smooth response needs few samples: those that a smaller inverse transform gives, in the middle of its pixels.
        size = FILTER_EDGE_PX // step
        fy, fx = np.meshgrid(fft.fftfreq(size, step), fft.rfftfreq(size, step), indexing="ij")
        fy, fx = 2 * np.pi * fy, 2 * np.pi * fx
        smooth = np.exp(-0.5 * sigma**2 * (fy**2 + fx**2) + 0.5j * (step - 1) * (fy + fx)) / step**2
        rows = np.r_[: size // 2, FILTER_EDGE_PX - size // 2 : FILTER_EDGE_PX]
        smoothed = spectrum[..., rows, : size // 2 + 1] * smooth.astype(np.complex64)

        def response(
            kernel: np.ndarray, smoothed: np.ndarray = smoothed, size: int = size, step: int = step
        ) -> np.ndarray:
            filtered = fft.irfft2(smoothed * kernel.astype(np.complex64), s=(size, size))
            return crop(filtered, FILTER_CROP_PX // step)

        # Steerable: the largest response of an edge filter over all angles is the gradient's length, the largest and the
        # smallest of a bar filter are the eigenvalues of the Hessian (Freeman & Adelson, PAMI 1991).
        edges = sigma * np.hypot(response(1j * fy), response(1j * fx))
        yy, xx, yx = (sigma**2 * response(-a * b) for a, b in ((fy, fy), (fx, fx), (fy, fx)))
        middle, radius = (yy + xx) / 2, np.hypot((yy - xx) / 2, yx)
        blobs = [response(np.ones_like(fy))] if first_filter == 0 else []
        responses = np.stack([*blobs, edges, middle + radius, middle - radius], axis=1)
        of_ring = _rings(FILTER_CROP_PX // step, step)
        flat = responses.reshape(*responses.shape[:3], -1)
        means = flat @ of_ring
        found.append(np.stack([means, np.sqrt(np.maximum((flat * flat) @ of_ring - means**2, 0))], axis=-1))
    return np.stack(found, axis=1)


@lru_cache(maxsize=16)
def _rings(size: int, step: int) -> np.ndarray:
    """Weights that take the mean within each ring: float32 (size², rings)."""
    y, x = (np.mgrid[:size, :size] - (size - 1) / 2) * step
    ring = np.digitize(np.hypot(y, x), RINGS_PX).ravel()
    inside = ring[:, None] == np.arange(len(RINGS_PX))[None]
    return (inside / inside.sum(axis=0)).astype(np.float32)


def _shares(values: np.ndarray, bins: int) -> np.ndarray:
    """Share of each of `bins` values in each section: int (n, 3, y, x) to float (n, 3·bins)."""
    sections = values.reshape(values.shape[0] * values.shape[1], -1)
    shifted = sections + bins * np.arange(len(sections))[:, None]
    counts = np.bincount(shifted.ravel(), minlength=bins * len(sections)).reshape(values.shape[0], -1)
    return counts / sections.shape[1]


def _not_zero(vectors: np.ndarray) -> np.ndarray:
    """A tile of one grey value has no direction: it gets one of its own, as a vector of no length cannot be compared."""
    empty = ~vectors.any(axis=1)
    vectors[empty, 0] = 1
    return vectors
