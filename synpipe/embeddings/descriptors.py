"""Hand-made descriptors: encoders without training, as baselines for trained ones.

Input: tiles, uint8 (n, 3, 256, 256). Output: vectors, float32 (n, d). Nothing is fitted to data. Every descriptor except
`grey_histogram` first removes the brightness and contrast of the whole tile.

The descriptors cover the centre of the tile at its native scale. `pixels` and `hog` use the middle section only.

After a change that alters vectors, raise `DESCRIPTOR_METHOD` in `encoder_specs`.
"""

from collections.abc import Callable
from functools import lru_cache

import numpy as np

CROP_PX = 128
PIXELS_CROP_PX, PIXELS = 224, 28
HOG_CELL_PX, HOG_BINS, HOG_CLIP = 16, 9, 0.2
LBP_RADII_PX = (1, 2, 4)
HISTOGRAM_BINS = 32
FILTER_SIGMAS_PX = {1.5: 1, 3.0: 2, 6.0: 4, 12.0: 8}
"""Scale of the filters: the distance in pixels between the samples of their responses."""
FILTER_EDGE_PX, FILTER_CROP_PX = 224, 192
"""Size of the filtered area and, within it, of the described area. Filtering wraps around at the outer edge."""
RINGS_PX = (24, 48, 72, 96)
"""Outer radii of the rings. The corners beyond the last ring are not described."""
CROPS_PX = {
    "pixels": PIXELS_CROP_PX,
    "hog": CROP_PX,
    "lbp": CROP_PX,
    "grey_histogram": CROP_PX,
    "filter_bank": FILTER_EDGE_PX,
    "filter_bank_pooled": FILTER_EDGE_PX,
}
"""Size of the centre crop that each descriptor uses."""


def describe(name: str, tiles: np.ndarray) -> np.ndarray:
    """The descriptor `name` of tiles: uint8 (n, 3, 256, 256) to float32 (n, d)."""
    functions: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        "pixels": pixels,
        "hog": hog,
        "lbp": lbp,
        "grey_histogram": grey_histogram,
        "filter_bank": filter_bank,
        "filter_bank_pooled": filter_bank_pooled,
    }
    return _replace_zero_vectors(functions[name](tiles).astype(np.float32))


def crop(tiles: np.ndarray, size_px: int) -> np.ndarray:
    """The centre of each section, (…, size_px, size_px)."""
    edge = (tiles.shape[-1] - size_px) // 2
    return tiles[..., edge : edge + size_px, edge : edge + size_px]


def pixels(tiles: np.ndarray) -> np.ndarray:
    """The middle section averaged to 28 × 28 pixels, minus its mean: (n, 784)."""
    middle = crop(tiles[:, 1], PIXELS_CROP_PX).astype(np.float32)
    step = PIXELS_CROP_PX // PIXELS
    small = middle.reshape(len(tiles), PIXELS, step, PIXELS, step).mean(axis=(2, 4)).reshape(len(tiles), -1)
    return small - small.mean(axis=1, keepdims=True)


def hog(tiles: np.ndarray) -> np.ndarray:
    """Histograms of oriented gradients of the middle section (Dalal & Triggs, CVPR 2005): (n, 1764).

    Nine unsigned orientations, cells of 16 px, and groups of 2 × 2 cells (the blocks of the paper) with the L2-Hys norm. A
    pixel votes for the two nearest orientations. Unlike in the paper, votes are not interpolated between cells.
    """
    middle = crop(tiles[:, 1], CROP_PX).astype(np.float32)
    dy, dx = np.gradient(middle, axis=(1, 2))
    strength, orientation = np.hypot(dy, dx), np.arctan2(dy, dx) % np.pi * HOG_BINS / np.pi - 0.5
    lower = np.floor(orientation).astype(np.int64)
    upper_share = orientation - lower
    cells_a_side = CROP_PX // HOG_CELL_PX
    cells = np.empty((len(tiles), cells_a_side, cells_a_side, HOG_BINS), dtype=np.float32)
    for number in range(HOG_BINS):
        votes = np.where(lower % HOG_BINS == number, 1 - upper_share, 0)
        votes += np.where((lower + 1) % HOG_BINS == number, upper_share, 0)
        votes *= strength
        cells[..., number] = votes.reshape(-1, cells_a_side, HOG_CELL_PX, cells_a_side, HOG_CELL_PX).sum(axis=(2, 4))
    groups = np.concatenate([cells[:, :-1, :-1], cells[:, :-1, 1:], cells[:, 1:, :-1], cells[:, 1:, 1:]], axis=-1)
    for limit in (HOG_CLIP, np.inf):  # Hys: normalise, clip, and normalise again
        groups = np.minimum(groups / np.sqrt((groups**2).sum(axis=-1, keepdims=True) + 1e-6), limit)
    return groups.reshape(len(tiles), -1)


def lbp(tiles: np.ndarray) -> np.ndarray:
    """Uniform rotation-invariant local binary patterns (Ojala, Pietikäinen & Mäenpää, PAMI 2002, LBP riu2): (n, 90).

    Each section is described separately, by eight neighbours on the square of radius 1, 2 and 4 px. The vector holds the
    square roots of the ten shares, so a cosine is a Bhattacharyya coefficient.
    """
    reach = max(LBP_RADII_PX)
    padded = crop(tiles, CROP_PX + 2 * reach)
    centre = crop(padded, CROP_PX)
    histograms = []
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
        histograms.append(_shares(pattern, 10))
    return np.sqrt(np.concatenate(histograms, axis=1))


def grey_histogram(tiles: np.ndarray) -> np.ndarray:
    """Square roots of the shares of 32 grey ranges in each section: (n, 96)."""
    return np.sqrt(_shares(crop(tiles, CROP_PX).astype(np.int64) * HISTOGRAM_BINS // 256, HISTOGRAM_BINS))


def filter_bank(tiles: np.ndarray) -> np.ndarray:
    """Mean and standard deviation of the responses to blobs, edges and bars: (n, 384).

    They are computed at four scales, in four rings around the centre, and for each section separately. Edges and bars are
    pooled over all angles by taking the largest and the smallest response.
    """
    return _ring_statistics(tiles, 0).reshape(len(tiles), -1)


def filter_bank_pooled(tiles: np.ndarray) -> np.ndarray:
    """As `filter_bank`, but edges and bars only, averaged over the three sections: (n, 96).

    Blobs and single sections are left out because they hurt: the smoothed grey changes with contrast, and a shift by one
    section replaces a section by another.
    """
    return _ring_statistics(tiles, 1).mean(axis=3).reshape(len(tiles), -1)


def _ring_statistics(tiles: np.ndarray, first_filter: int) -> np.ndarray:
    """Means and standard deviations within rings: float32 (n, scales, filters, 3 sections, rings, 2).

    Filters: blob, edge, and two for bars. first_filter: 1 omits the blob.
    """
    from scipy import fft

    grey = crop(tiles, FILTER_EDGE_PX).astype(np.float32)
    grey -= grey.mean(axis=(1, 2, 3), keepdims=True)
    grey /= np.maximum(grey.std(axis=(1, 2, 3), keepdims=True), 1e-6)
    spectrum = fft.rfft2(grey)
    statistics = []
    for sigma, step in FILTER_SIGMAS_PX.items():
        # A smooth response needs few samples. A smaller inverse transform gives them, at the centres of its larger pixels.
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

        # The filters are steerable (Freeman & Adelson, PAMI 1991): the largest response of an edge filter over all angles is
        # the length of the gradient; the largest and smallest responses of a bar filter are the eigenvalues of the Hessian.
        edges = sigma * np.hypot(response(1j * fy), response(1j * fx))
        yy, xx, yx = (sigma**2 * response(-a * b) for a, b in ((fy, fy), (fx, fx), (fy, fx)))
        middle, radius = (yy + xx) / 2, np.hypot((yy - xx) / 2, yx)
        blobs = [response(np.ones_like(fy))] if first_filter == 0 else []
        responses = np.stack([*blobs, edges, middle + radius, middle - radius], axis=1)
        ring_weights = _ring_weights(FILTER_CROP_PX // step, step)
        flat = responses.reshape(*responses.shape[:3], -1)
        means = flat @ ring_weights
        statistics.append(np.stack([means, np.sqrt(np.maximum((flat * flat) @ ring_weights - means**2, 0))], axis=-1))
    return np.stack(statistics, axis=1)


@lru_cache(maxsize=16)
def _ring_weights(size: int, step: int) -> np.ndarray:
    """Weights that average over each ring: float32 (size², rings)."""
    y, x = (np.mgrid[:size, :size] - (size - 1) / 2) * step
    ring = np.digitize(np.hypot(y, x), RINGS_PX).ravel()
    inside = ring[:, None] == np.arange(len(RINGS_PX))[None]
    return (inside / inside.sum(axis=0)).astype(np.float32)


def _shares(values: np.ndarray, bins: int) -> np.ndarray:
    """The share of each of the values 0 … bins − 1 in each section: int (n, 3, y, x) to float (n, 3·bins)."""
    sections = values.reshape(values.shape[0] * values.shape[1], -1)
    shifted = sections + bins * np.arange(len(sections))[:, None]
    counts = np.bincount(shifted.ravel(), minlength=bins * len(sections)).reshape(values.shape[0], -1)
    return counts / sections.shape[1]


def _replace_zero_vectors(vectors: np.ndarray) -> np.ndarray:
    """A uniform tile gives a zero vector, which cannot be compared by direction: set its first component to 1."""
    zero = ~vectors.any(axis=1)
    vectors[zero, 0] = 1
    return vectors
