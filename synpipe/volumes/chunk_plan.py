"""The order in which windows of a volume are read, so that each chunk of it is fetched and decoded about once.

In: boxes of voxels, the shard of each, and what the volume says of its chunks and of its cache. Out: batches of boxes, in
the order in which they are to be read; every box is in one of them. Pure functions: nothing is read here, and the same set
of boxes has the same plan.

Boxes are `low` up to `high`, int64 (n, 3) voxels z, y, x within the volume; empty ones need no chunk.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import numpy as np

# Another order than shard by shard is worth its many small files where it saves this share of the chunks, …
WORTHWHILE_SAVING = 0.1
# … and where a file still holds this many tiles on average: 3 MB.
SMALLEST_MEAN_PART = 16
BATCHES_LOOKED_AT = 64  # to estimate that: a fraction of a second, whatever the number of boxes

Chunk = tuple[int, int, int]


@dataclass(frozen=True)
class Chunking:
    """shape_zyx: voxels of a chunk; the first chunk begins at voxel 0. cached: decoded chunks that the volume keeps."""

    shape_zyx: tuple[int, int, int]
    cached: int

    def chunks(self, low: np.ndarray, high: np.ndarray) -> Iterator[Chunk]:
        """Numbers (z, y, x) of the chunks that one box needs, each once."""
        if (high > low).all():
            first, last = low // self.shape_zyx, (high - 1) // self.shape_zyx
            yield from product(*(range(a, b + 1) for a, b in zip(first.tolist(), last.tolist(), strict=True)))


def plan(low: np.ndarray, high: np.ndarray, shards: np.ndarray, chunking: Chunking, most: int) -> list[np.ndarray]:
    """Batches of at most `most` boxes: int64 indices, in reading order.

    A batch is what is held in memory until it is written, one file for each of its shards. Shards are scattered in space,
    so that to finish one after the other reads many chunks once for each shard. Where enough boxes share chunks across
    shards, batches therefore follow space alone; elsewhere they are of one shard each.
    """
    order = spatial_order(low, high, chunking)
    across = _split(order, most)
    if not across or _worthwhile(across, low, high, shards, chunking):
        return across
    order = order[np.argsort(shards[order], kind="stable")]
    borders = np.flatnonzero(np.diff(shards[order])) + 1
    return [batch for shard in np.split(order, borders) for batch in _split(shard, most)]


def _split(order: np.ndarray, most: int) -> list[np.ndarray]:
    return [order[first : first + most] for first in range(0, len(order), most)]


def _worthwhile(batches: list[np.ndarray], low, high, shards: np.ndarray, chunking: Chunking) -> bool:
    """Whether batches that follow space save chunks, and make no crumbs of files."""
    files = sum(len(np.unique(shards[batch])) for batch in batches)
    if files * SMALLEST_MEAN_PART > len(shards):
        return False
    together = by_shard = 0
    for batch in batches[:: -(-len(batches) // BATCHES_LOOKED_AT)]:
        needed = {(shards[box], chunk) for box in batch for chunk in chunking.chunks(low[box], high[box])}
        by_shard += len(needed)
        together += len({chunk for _, chunk in needed})
    return by_shard - together > WORTHWHILE_SAVING * by_shard


def spatial_order(low: np.ndarray, high: np.ndarray, chunking: Chunking) -> np.ndarray:
    """Indices of boxes such that those which share chunks come soon after each other: int64 (n,).

    Space is cut into beams along y, and each is swept once: what its cross-section needs stays in the cache meanwhile, and
    only at the seams between beams are chunks read again. Of all cross-sections that fit into the cache, the one with the
    smallest share of seams is taken.
    """
    if not len(low):
        return np.zeros(0, dtype=np.int64)
    shape = np.array(chunking.shape_zyx)
    first, last = low // shape, np.maximum(high - 1, low) // shape
    origin = first.min(axis=0)
    overlap = (last - first).max(axis=0)  # chunks that a box needs beyond its first
    depth, width = _cross_section(first.max(axis=0) - origin + 1, overlap, chunking.cached)
    z, y, x = (first - origin).T
    # The corner decides among boxes of the same chunks, so that the order of the input never does.
    keys = (*low.T, *high.T, x, z, y, x // width, z // depth)
    return np.lexsort(keys)


def _cross_section(count: np.ndarray, overlap: np.ndarray, cached: int) -> tuple[int, int]:
    """Chunks in z and in x of a beam.

    count: chunks, z y x, in which boxes begin; overlap: chunks that they reach beyond.
    """
    room = cached // (overlap[1] + 1)  # chunks of a cross-section: the cache holds as many layers of it as a box needs

    def beam(depth: int) -> tuple[int, int]:
        return depth, int(np.clip(room // (depth + overlap[0]) - overlap[2], 1, count[2]))

    def read(section: tuple[int, int]) -> int:
        seams_z, seams_x = -(-count[0] // section[0]) - 1, -(-count[2] // section[1]) - 1
        return int((count[0] + seams_z * overlap[0]) * (count[2] + seams_x * overlap[2]))

    # A cross-section that is too deep to fit would look best of all.
    fitting = [depth for depth in range(1, int(count[0]) + 1) if room // (depth + overlap[0]) > overlap[2]]
    return min(map(beam, fitting or [1]), key=read)
