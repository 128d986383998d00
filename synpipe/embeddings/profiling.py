"""Measures how fast an encoder embeds on this machine, how close that is to the limit of its devices, and where time is lost.

Input: an encoder, on one device or several, and tiles. Output: a `Profile`. Vectors are written to a temporary folder beside
the cache, because the speed of the disk matters too. The folder is removed afterwards.
"""

import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from synpipe.embeddings.cache import EmbeddingCache
from synpipe.embeddings.embed import EmbedStats, ReadTiles, Shard, embed_missing
from synpipe.embeddings.encoders import Encoder
from synpipe.embeddings.forward import NetworkForward

TILES_PER_SHARD = 2048
BARE_S = 2.0  # how long the bare forward pass is repeated


@dataclass(frozen=True)
class Profile:
    """The measurement of one loop over `tiles` tiles.

    seconds: wall-clock time of the loop. cpu_seconds: CPU time of all threads together. done: details of the loop.
    bare_per_second: tiles per second of the networks alone, on all devices together; None for an encoder without a network.
    """

    tiles: int
    seconds: float
    cpu_seconds: float
    done: EmbedStats
    bare_per_second: float | None

    @property
    def tiles_per_second(self) -> float:
        return self.tiles / self.seconds

    @property
    def utilisation(self) -> float | None:
        """The rate of the loop, divided by the rate of the networks alone."""
        return None if self.bare_per_second is None else self.tiles_per_second / self.bare_per_second


def profile(encoders: Sequence[Encoder], read_tiles: ReadTiles, count: int, folder: Path) -> Profile:
    """Embed `count` tiles and measure it. A first batch, during which libraries load and kernels compile, is not measured.

    encoders: the same encoder on each device. folder: where the temporary folder for the vectors is made.
    """
    size = min(count, encoders[0].batch_size)
    tiles = read_tiles(np.arange(size))
    for encoder in encoders:
        encoder.embed(tiles)
    # Measured before and after the loop, because the speed of a machine drifts.
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
    """Tiles per second of the network alone, on batches like `tiles`; None for an encoder without a network."""
    if not isinstance(encoder.forward, NetworkForward):
        return None
    run_once = encoder.forward.bare(tiles)
    run_once()
    started, count = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - started) < BARE_S or not count:
        run_once()
        count += len(tiles)
    return count / elapsed


def report(encoders: Sequence[Encoder], profile: Profile) -> str:
    """The measurement as text, several lines."""
    encoder, stats, cores = encoders[0], profile.done, os.cpu_count() or 1
    devices = ", ".join(str(each.device) for each in encoders)
    total_s = stats.computed_s + sum(stats.waited_s.values())
    seconds_by_state = {"computing": stats.computed_s}
    seconds_by_state |= {f"waiting {name}": seconds for name, seconds in stats.waited_s.items()}
    lines = [
        f"{encoder.dim} dimensions on {devices}, batches of {encoder.batch_size}: "
        f"{profile.tiles:,} tiles in {profile.seconds:.1f} s",
        f"  {profile.tiles_per_second:,.1f} tiles per second, "
        f"{stats.bytes_read / profile.seconds / 1e6:,.0f} MB read per second",
    ]
    if profile.bare_per_second is not None and profile.utilisation is not None:
        lines.append(
            f"  {profile.bare_per_second:,.1f} tiles per second for the network alone; the loop reaches "
            f"{profile.utilisation:.0%} of that"
        )
    shares = ", ".join(f"{name} {seconds / total_s:.1%}" for name, seconds in seconds_by_state.items())
    lines.append(f"  time of the devices: {shares}")
    lines.append(f"  {profile.cpu_seconds / profile.seconds:.1f} of {cores} CPU cores busy")
    if stats.gpu_bytes:
        lines.append(f"  at most {stats.gpu_bytes / 1e9:.2f} GB of GPU memory")
    return "\n".join(lines)


def _shard(first: int, stop: int, read_tiles: ReadTiles) -> Shard:
    # The cache needs a hash per tile. Any unique text serves, because the cache is removed after the measurement.
    hashes = [str(number) for number in range(first, stop)]
    return Shard(f"{first // TILES_PER_SHARD:05d}", hashes, lambda rows: read_tiles(first + rows))
