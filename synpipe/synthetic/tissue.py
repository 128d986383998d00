"""Grow the neurites of the demo tissue, and compute their membranes in each section.

Input: the shape of the volume and a random generator. Output: `Tissue` (the course of neurites and mitochondria through
the volume) and, for each section, a `SectionMap`. A section's map depends only on the tissue, so sections can be computed
in any order and by any number of threads. Every number is invented for the demo.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

VOXEL_NM = (40.0, 4.0, 4.0)  # z, y, x: the voxel of FAFB (Zheng et al., Cell 2018)
SECTION_NM, PIXEL_NM = VOXEL_NM[0], VOXEL_NM[2]
MAP_NM = 2 * PIXEL_NM  # membranes are computed on every second pixel and interpolated
REACH_NM = (
    300.0  # how far beyond its radius a disc competes for space; a smaller value leaves straight edges in wide gaps
)


@dataclass(frozen=True)
class Tissue:
    """The content of the volume: S sections, N discs, M neurites. A neurite is one or more discs."""

    disc_yx_nm: Floats  # (S, N, 2) as in the picture, with jitter
    jitter_nm: Floats  # (S, 2): misalignment of each section
    disc_radius_nm: Floats  # (S, N)
    neurite: NDArray[np.int64]  # (N,): the neurite of each disc
    stain: Floats  # (M,): cytoplasm
    grain: Floats  # (M,): coarseness of the cytoplasm
    # Fields (S, 2, h, w) that bend the outlines, coarse to fine; each has half the spacing of the one before.
    warp_nm: tuple[Floats, ...]
    mitochondria: NDArray[np.float32]  # (K, 8): disc, z_nm, half length nm, semi-axes nm (2), angle, pitch nm, phase


@dataclass(frozen=True)
class SectionMap:
    """Membranes of one section on a grid of `MAP_NM`.

    disc: the disc at each point. wall_nm: the distance to its wall, at most 255. sweep_nm: how far this wall moves
    sideways through the thickness of the section.
    """

    disc: NDArray[np.uint16]
    wall_nm: NDArray[np.uint8]
    sweep_nm: NDArray[np.uint8]

    def at(self, y_nm: NDArray, x_nm: NDArray) -> tuple[NDArray[np.uint16], NDArray[np.uint8], NDArray[np.uint8]]:
        """Return disc, wall and sweep at the nearest grid points; a point outside the grid takes the nearest one inside."""
        height, width = self.disc.shape
        row = np.clip((np.asarray(y_nm) / MAP_NM).astype(int), 0, height - 1)
        column = np.clip((np.asarray(x_nm) / MAP_NM).astype(int), 0, width - 1)
        return self.disc[row, column], self.wall_nm[row, column], self.sweep_nm[row, column]


def smooth_noise(rng: np.random.Generator, shape: tuple[int, ...], sigma: float | tuple[float, ...]) -> Floats:
    """Draw Gaussian noise, smooth it by `sigma` grid points and scale it to unit variance."""
    from scipy import ndimage

    field = ndimage.gaussian_filter(rng.standard_normal(shape, dtype=np.float32), sigma, mode="wrap")
    return field / field.std()


def double(image: Floats) -> Floats:
    """Enlarge an image (h, w) to (2h, 2w) by bilinear interpolation."""
    for axis in (1, 0):
        larger = np.empty([size * (2 if i == axis else 1) for i, size in enumerate(image.shape)], np.float32)
        out, near, far = (
            np.moveaxis(part, axis, 0) for part in (larger, image * np.float32(0.75), image * np.float32(0.25))
        )
        out[0::2], out[1::2] = near, near
        out[0] += far[0]
        out[2::2] += far[:-1]
        out[1:-1:2] += far[1:]
        out[-1] += far[-1]
        image = larger
    return image


def grow(shape_zyx: tuple[int, int, int], rng: np.random.Generator) -> Tissue:
    """Pack discs into the first section, merge some neighbours into one neurite, and let all of them drift through z."""
    from scipy.spatial import cKDTree

    depth, height, width = shape_zyx
    extent = np.array([height, width]) * PIXEL_NM
    margin = 500.0
    area = float(np.prod(extent + 2 * margin))
    # Ranges of radii in nm, and the share of the area, for few varicosities, some axons and many twigs.
    radii = np.concatenate(
        [
            rng.uniform(low, high, int(share * area / (np.pi * ((low + high) / 2) ** 2)))
            for low, high, share in ((230, 400, 0.22), (110, 220, 0.24), (42, 100, 0.36))
        ]
    )
    yx = rng.uniform(-margin, extent + margin, (len(radii), 2))
    yx = _relax(yx, radii, 60)

    # A neurite's outline is rarely a disc, so most discs join up to two neighbours. They drift apart like branches.
    neurite = np.arange(len(radii))
    _, neighbours = cKDTree(yx).query(yx, k=4)
    for disc in rng.permutation(len(radii))[: 7 * len(radii) // 10]:
        partner = neighbours[disc, rng.integers(1, 4)]
        members = np.flatnonzero((neurite == neurite[disc]) | (neurite == neurite[partner]))
        if len(members) <= 3:
            neurite[members] = members[0]
    _, neurite = np.unique(neurite, return_inverse=True)

    flow = smooth_noise(rng, (2, 24, 24), (0, 3, 3))
    cell = np.clip(((yx + margin) / (extent + 2 * margin) * 24).astype(int), 0, 23)
    heading = 12 * flow[:, cell[:, 0], cell[:, 1]].T + rng.normal(0, 18, (neurite.max() + 1, 2))[neurite]
    swelling = smooth_noise(rng, (len(radii), depth), (0, 5))
    all_radii = (radii[:, None] * (1 + 0.16 * swelling)).T
    all_yx = np.empty((depth, len(radii), 2))
    for z in range(depth):
        heading = 0.93 * heading + rng.normal(0, 6, (neurite.max() + 1, 2))[neurite]
        yx = _relax(yx + heading, all_radii[z], 4)
        all_yx[z] = yx
    jitter = rng.normal(0, 5, (depth, 2))

    stain = rng.normal(0.27, 0.06, neurite.max() + 1)
    dark = rng.random(len(stain)) < 0.05
    return Tissue(
        disc_yx_nm=(all_yx + jitter[:, None]).astype(np.float32),
        jitter_nm=jitter.astype(np.float32),
        disc_radius_nm=all_radii.astype(np.float32),
        neurite=neurite,
        stain=np.where(dark, rng.uniform(0.5, 0.8, len(stain)), np.clip(stain, 0.15, 0.45)).astype(np.float32),
        grain=(rng.lognormal(0, 0.25, len(stain)) * (1 + 0.4 * dark)).astype(np.float32),
        warp_nm=_warps(rng, shape_zyx),
        mitochondria=_mitochondria(rng, all_radii, depth),
    )


def _relax(yx: NDArray, radii: NDArray, rounds: int) -> NDArray:
    """Push overlapping discs apart, by half of the overlap in each round; the smaller disc moves farther."""
    from scipy.spatial import cKDTree

    for turn in range(rounds):
        if turn % 6 == 0:  # neighbourhoods change slowly
            first, second = cKDTree(yx).query_pairs(2 * radii.max(), output_type="ndarray").T
            near = np.hypot(*(yx[first] - yx[second]).T) < radii[first] + radii[second] + 40
            first, second = first[near], second[near]
            share = (radii[second] / (radii[first] + radii[second]))[:, None]
        gap = yx[first] - yx[second]
        distance = np.maximum(np.hypot(*gap.T), 1)
        overlap = np.maximum(radii[first] + radii[second] - distance, 0)
        push = gap * (0.5 * overlap / distance)[:, None]
        yx = yx.copy()
        np.add.at(yx, first, push * share)
        np.add.at(yx, second, push * (share - 1))
    return yx


def _warps(rng: np.random.Generator, shape_zyx: tuple[int, int, int]) -> tuple[Floats, ...]:
    """Draw displacements on grids of 64, 32 and 16 nm, which bend and dent the outlines."""
    depth, height, width = shape_zyx
    fields = []
    for step_px, amplitude_nm, sigma in (
        (16, 62, (2.0, 0, 2.8, 2.8)),
        (8, 17, (1.0, 0, 1.7, 1.7)),
        (4, 5, (0.8, 0, 1.8, 1.8)),
    ):
        rows, columns = -(-height // step_px) + 1, -(-width // step_px) + 1
        field = np.float32(amplitude_nm) * smooth_noise(rng, (depth + 1, 2, min(rows, 256), min(columns, 256)), sigma)
        wrap = ((0, 0), (0, 0), (0, max(rows - 256, 0)), (0, max(columns - 256, 0)))  # the noise is periodic
        fields.append(np.pad(field, wrap, mode="wrap"))
    return tuple(fields)


def _mitochondria(rng: np.random.Generator, radii: NDArray, depth: int) -> Floats:
    """Put a mitochondrion into half of the discs that are wide enough; its semi-axes follow the radius of the disc."""
    wide = np.flatnonzero(radii.mean(0) > 130)
    disc = wide[rng.random(len(wide)) < 0.5]
    count = len(disc)
    mean_radius = radii.mean(0)[disc]
    rows = (
        disc,
        rng.uniform(-100, depth * SECTION_NM + 100, count),
        rng.uniform(250, 900, count),
        np.clip(mean_radius * rng.uniform(0.5, 0.95, count), 110, 320),
        np.clip(mean_radius * rng.uniform(0.4, 0.65, count), 80, 170),
        rng.uniform(0, np.pi, count),
        rng.uniform(34, 52, count),
        rng.uniform(0, 2 * np.pi, count),
    )
    return np.stack(rows, 1).astype(np.float32)


def _warp(tissue: Tissue, z: int, shape_yx: tuple[int, int]) -> tuple[Floats, Floats]:
    """Return the displacement (2, h, w) of the map's points at section z, and its change to the next section."""
    z = min(z, len(tissue.warp_nm[0]) - 2)
    both = []
    for axis in (0, 1):
        for pick in (lambda field, a=axis: field[z, a], lambda field, a=axis: field[z + 1, a] - field[z, a]):
            total = pick(tissue.warp_nm[0])
            for finer in tissue.warp_nm[1:]:
                larger = double(total)
                total = pick(finer) + larger[: finer.shape[2], : finer.shape[3]]
            while total.shape[0] < shape_yx[0] or total.shape[1] < shape_yx[1]:
                total = double(total)
            both.append(total[: shape_yx[0], : shape_yx[1]])
    return np.stack(both[0::2]), np.stack(both[1::2])


def _distance(y: Floats, x: Floats, centre: Floats) -> Floats:
    dy, dx = y - centre[0], x - centre[1]
    dy *= dy
    dx *= dx
    dy += dx
    return np.sqrt(dy, out=dy)  # np.hypot also guards against overflow, which takes three times as long


@dataclass(frozen=True)
class _Assignment:
    """For each map point (h, w): the nearest disc and the nearest disc of another neurite, with their distances in nm."""

    disc: NDArray[np.uint16]
    gap_nm: Floats
    rival: NDArray[np.uint16]
    rival_gap_nm: Floats


def section_map(tissue: Tissue, z: int, shape_yx: tuple[int, int]) -> SectionMap:
    """Compute the membranes of section z. `shape_yx` is the shape of the map, half that of the picture."""
    height, width = shape_yx
    warp, warp_change = _warp(tissue, z, shape_yx)
    y = warp[0] + ((np.arange(height, dtype=np.float32) + 0.5) * MAP_NM)[:, None]
    x = warp[1] + ((np.arange(width, dtype=np.float32) + 0.5) * MAP_NM)[None]
    centre, radius = tissue.disc_yx_nm[z], tissue.disc_radius_nm[z]
    assigned = _assign_discs(tissue, z, y, x)

    # The wall is where both distances are equal. Their difference, divided by its slope, is the distance to the wall in
    # nm. The motion of both discs to the next section says how far the wall leans.
    following = min(z + 1, len(tissue.disc_yx_nm) - 1)
    velocity = (tissue.disc_yx_nm[following] - tissue.jitter_nm[following]) - (centre - tissue.jitter_nm[z])
    growth = tissue.disc_radius_nm[following] - radius
    slope_y = slope_x = lean = np.float32(0)
    for discs, sign in ((assigned.disc, 1), (assigned.rival, -1)):
        dy, dx = y - centre[discs, 0], x - centre[discs, 1]
        scale = sign / np.maximum(np.hypot(dy, dx), 1)
        dy *= scale
        dx *= scale
        slope_y, slope_x = slope_y + dy, slope_x + dx
        lean = lean + dy * (warp_change[0] - velocity[discs, 0]) + dx * (warp_change[1] - velocity[discs, 1])
        lean -= sign * growth[discs]
    slope = np.maximum(np.hypot(slope_y, slope_x), 0.3)
    wall = np.minimum((assigned.rival_gap_nm - assigned.gap_nm) / slope, 255).astype(np.uint8)
    return SectionMap(assigned.disc, wall, np.minimum(np.abs(lean / slope), 255).astype(np.uint8))


def _assign_discs(tissue: Tissue, z: int, y: Floats, x: Floats) -> _Assignment:
    """Assign each map point, at y and x in nm (h, w), to the disc for which (distance to the centre − radius) is least.

    This is an additively weighted Voronoi diagram. Its walls bulge from large profiles around small ones, as those of
    cells do.
    """
    shape_yx = y.shape
    centre, radius = tissue.disc_yx_nm[z], tissue.disc_radius_nm[z]
    best = np.full(shape_yx, 1e6, np.float32)
    second = np.full(shape_yx, 1e6, np.float32)
    disc = np.zeros(shape_yx, np.uint16)
    rival = np.zeros(shape_yx, np.uint16)

    order = np.argsort(tissue.neurite, kind="stable")
    reach = (radius + REACH_NM)[:, None]
    low = np.maximum(((centre - reach) / MAP_NM).astype(int), 0)
    high = ((centre + reach) / MAP_NM).astype(int)
    for members in np.split(order, np.flatnonzero(np.diff(tissue.neurite[order])) + 1):
        visible = members[(high[members] > 0).all(1) & (low[members] < shape_yx).all(1)]
        if not len(visible):
            continue
        (top, left), (bottom, right) = low[visible].min(0), high[visible].max(0)
        window = np.s_[top:bottom, left:right]
        own: NDArray = np.full((1, 1), visible[0], np.uint16)
        gap = _distance(y[window], x[window], centre[visible[0]]) - radius[visible[0]]
        for other in visible[1:]:
            other_gap = _distance(y[window], x[window], centre[other]) - radius[other]
            own = np.where(other_gap < gap, np.uint16(other), own)
            gap = np.minimum(gap, other_gap)
        wins = gap < best[window]
        runner_up = gap < second[window]
        runner_up &= ~wins
        loser = disc[window].copy()
        np.copyto(rival[window], own, where=runner_up)
        np.copyto(rival[window], loser, where=wins)
        np.copyto(disc[window], own, where=wins)
        np.minimum(second[window], np.maximum(best[window], gap), out=second[window])
        np.minimum(best[window], gap, out=best[window])
    return _Assignment(disc, best, rival, second)
