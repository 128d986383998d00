"""Plans the order in which to read many windows of a volume, so that each chunk is fetched and decoded about once.

Input: boxes of voxels, the shard of each box, and how the volume is stored and cached. Output: batches of boxes in reading
order. Guarantees: every box is in exactly one batch; the same set of boxes always gives the same plan. The functions are
pure and read no data.

A box is given by its corners `low` (inside) and `high` (outside): int64 (n, 3), voxels in the order z, y, x, within the
volume. An empty box needs no chunk.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import numpy as np

# Batches that mix shards write many small files. They are worth it only if they save at least this share of the chunk
# fetches …
WORTHWHILE_SAVING = 0.1
# … and if a file still holds this many tiles on average, which is 3 MB.
SMALLEST_MEAN_PART = 16
SAMPLED_BATCHES = 64  # enough to estimate the saving in a fraction of a second, for any number of boxes

Chunk = tuple[int, int, int]
"""The number of a chunk along z, y and x, counted from the first chunk of the volume."""


@dataclass(frozen=True)
class Chunking:
    """How a volume is stored and cached.

    shape_zyx: size of a chunk in voxels; the first chunk begins at voxel 0. cached: number of decoded chunks that the
    volume keeps in memory.
    """

    shape_zyx: tuple[int, int, int]
    cached: int

    def chunks(self, low: np.ndarray, high: np.ndarray) -> Iterator[Chunk]:
        """The chunks that one box needs, each once. low, high: corners of the box, int64 (3,)."""
        if (high > low).all():
            first, last = low // self.shape_zyx, (high - 1) // self.shape_zyx
            yield from product(*(range(a, b + 1) for a, b in zip(first.tolist(), last.tolist(), strict=True)))


def plan_batches(
    low: np.ndarray, high: np.ndarray, shards: np.ndarray, chunking: Chunking, batch_size: int
) -> list[np.ndarray]:
    """Divide boxes into batches of at most `batch_size`, each an array of int64 indices, in reading order.

    The caller holds a batch in memory and then writes it as one file for each of its shards. The blocks of a shard are
    scattered in space, so finishing one shard after the other fetches many chunks once per shard. Batches therefore follow
    space alone if enough boxes share chunks across shards. Otherwise each batch belongs to a single shard.
    """
    order = spatial_order(low, high, chunking)
    mixed = _split(order, batch_size)
    if not mixed or _is_mixing_worthwhile(mixed, low, high, shards, chunking):
        return mixed
    order = order[np.argsort(shards[order], kind="stable")]
    borders = np.flatnonzero(np.diff(shards[order])) + 1
    return [batch for boxes in np.split(order, borders) for batch in _split(boxes, batch_size)]


def _split(order: np.ndarray, batch_size: int) -> list[np.ndarray]:
    return [order[first : first + batch_size] for first in range(0, len(order), batch_size)]


def _is_mixing_worthwhile(batches: list[np.ndarray], low, high, shards: np.ndarray, chunking: Chunking) -> bool:
    """Whether batches that mix shards save enough chunk fetches without writing tiny files."""
    files = sum(len(np.unique(shards[batch])) for batch in batches)
    if files * SMALLEST_MEAN_PART > len(shards):
        return False
    fetches_mixed = fetches_by_shard = 0
    for batch in batches[:: -(-len(batches) // SAMPLED_BATCHES)]:
        needed = {(shards[box], chunk) for box in batch for chunk in chunking.chunks(low[box], high[box])}
        fetches_by_shard += len(needed)
        fetches_mixed += len({chunk for _, chunk in needed})
    return fetches_by_shard - fetches_mixed > WORTHWHILE_SAVING * fetches_by_shard


def spatial_order(low: np.ndarray, high: np.ndarray, chunking: Chunking) -> np.ndarray:
    """Order boxes so that those which share chunks come soon after each other. Returns indices, int64 (n,).

    The volume is cut into beams along y, and each beam is swept once. The chunks that the cross-section of a beam needs
    stay in the cache during the sweep, so only the chunks at the seams between beams are read again. Among the
    cross-sections that fit into the cache, the one with the smallest share of seams is chosen.
    """
    if not len(low):
        return np.zeros(0, dtype=np.int64)
    shape = np.array(chunking.shape_zyx)
    first, last = low // shape, np.maximum(high - 1, low) // shape
    origin = first.min(axis=0)
    overlap = (last - first).max(axis=0)  # chunks that a box needs beyond its first
    depth, width = _choose_cross_section(first.max(axis=0) - origin + 1, overlap, chunking.cached)
    z, y, x = (first - origin).T
    # Boxes with the same chunks are ordered by their corners, so that the order of the input never matters.
    keys = (*low.T, *high.T, x, z, y, x // width, z // depth)
    return np.lexsort(keys)


def _choose_cross_section(count: np.ndarray, overlap: np.ndarray, cached: int) -> tuple[int, int]:
    """Depth (along z) and width (along x) of a beam in chunks.

    count: number of chunks along z, y, x in which boxes begin. overlap: chunks along z, y, x that a box needs beyond its
    first. cached: chunks that the cache holds.
    """
    # The cache must hold as many layers of the cross-section as a box extends along y.
    capacity = cached // (overlap[1] + 1)

    def widest_beam(depth: int) -> tuple[int, int]:
        return depth, int(np.clip(capacity // (depth + overlap[0]) - overlap[2], 1, count[2]))

    def chunks_read(section: tuple[int, int]) -> int:
        seams_z, seams_x = -(-count[0] // section[0]) - 1, -(-count[2] // section[1]) - 1
        return int((count[0] + seams_z * overlap[0]) * (count[2] + seams_x * overlap[2]))

    # A cross-section that is too deep for the cache would look best, so it is excluded.
    fitting = [depth for depth in range(1, int(count[0]) + 1) if capacity // (depth + overlap[0]) > overlap[2]]
    return min(map(widest_beam, fitting or [1]), key=chunks_read)
