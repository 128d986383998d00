"""How fast an encoder embeds here, how near that is to what its device can do, and where the rest of the time goes.

In: an encoder, on one device or several, and tiles. Out: a `Profile`. Nothing of it stays: vectors are written to a temporary
folder, where the cache would be, because the disk counts too.
"""

import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from synpipe.embeddings.cache import EmbeddingCache
from synpipe.embeddings.embed import Embedded, ReadTiles, Shard, embed_missing
from synpipe.embeddings.encoders import Encoder
from synpipe.embeddings.forward import NetworkForward

TILES_PER_SHARD = 2048
BARE_S = 2.0  # for how long the bare forward pass is repeated


@dataclass(frozen=True)
class Profile:
    """done: of one loop over the tiles, which took `seconds` and `cpu_seconds` of all threads together. bare_per_second:
    tiles that the networks alone take, all devices together; None for what is no network."""

    tiles: int
    seconds: float
    cpu_seconds: float
    done: Embedded
    bare_per_second: float | None

    @property
    def tiles_per_second(self) -> float:
        return self.tiles / self.seconds

    @property
    def utilisation(self) -> float | None:
        """Share of the time that the networks alone would have needed for the same tiles."""
        return None if self.bare_per_second is None else self.tiles_per_second / self.bare_per_second


def profile(encoders: Sequence[Encoder], read_tiles: ReadTiles, count: int, folder: Path) -> Profile:
    """Embed `count` tiles and measure it, after a first batch, in which libraries load and kernels are made.

    encoders: the same one on each device. folder: below it vectors are written and removed again.
    """
    size = min(count, encoders[0].batch_size)
    tiles = read_tiles(np.arange(size))
    for encoder in encoders:
        encoder.embed(tiles)
    # Before and after: a machine is not equally fast for long.
    before = [bare_rate(encoder, tiles) for encoder in encoders]
    shards = [
        _shard(first, min(count, first + TILES_PER_SHARD), read_tiles) for first in range(0, count, TILES_PER_SHARD)
    ]
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".tmp-profile-") as temporary:
        cache = EmbeddingCache(Path(temporary), encoders[0].fingerprint)
        started, cpu = time.perf_counter(), time.process_time()
        done = embed_missing(encoders, cache, shards)
        seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    after = [bare_rate(encoder, tiles) for encoder in encoders]
    bare = None if None in before + after else sum(filter(None, before + after)) / 2
    return Profile(count, seconds, cpu, done, bare)


def bare_rate(encoder: Encoder, tiles: np.ndarray) -> float | None:
    """Tiles a second of the network alone, on batches such as `tiles`; None for what is no network."""
    if not isinstance(encoder.forward, NetworkForward):
        return None
    once = encoder.forward.bare(tiles)
    once()
    started, count = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - started) < BARE_S or not count:
        once()
        count += len(tiles)
    return count / elapsed


def report(encoders: Sequence[Encoder], found: Profile) -> str:
    """Lines for people."""
    encoder, done, cores = encoders[0], found.done, os.cpu_count() or 1
    devices = ", ".join(str(one.device) for one in encoders)
    spent = done.computed_s + sum(done.waited_s.values())
    shares = {"computing": done.computed_s} | {f"waiting {name}": seconds for name, seconds in done.waited_s.items()}
    lines = [
        f"{encoder.dim} dimensions on {devices}, batches of {encoder.batch_size}: {found.tiles:,} tiles in {found.seconds:.1f} s",
        f"  {found.tiles_per_second:,.1f} tiles a second, {done.bytes_read / found.seconds / 1e6:,.0f} MB a second read",
    ]
    if found.bare_per_second is not None and found.utilisation is not None:
        lines.append(
            f"  {found.bare_per_second:,.1f} tiles a second by the network alone: {found.utilisation:.0%} of that is reached"
        )
    lines.append("  the devices: " + ", ".join(f"{name} {seconds / spent:.1%}" for name, seconds in shares.items()))
    lines.append(f"  {found.cpu_seconds / found.seconds:.1f} of {cores} CPU cores at work")
    if done.gpu_bytes:
        lines.append(f"  {done.gpu_bytes / 1e9:.2f} GB of GPU memory at most")
    return "\n".join(lines)


def _shard(first: int, stop: int, read_tiles: ReadTiles) -> Shard:
    # The cache wants a name for each content; nobody looks at these.
    names = [str(number) for number in range(first, stop)]
    return Shard(f"{first // TILES_PER_SHARD:05d}", names, lambda rows: read_tiles(first + rows))
