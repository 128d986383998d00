"""Embeds tiles: shards of tiles go through an encoder, and no vector is computed twice.

Input: an `Encoder`, on one device or several, and functions that read rows of shards. Output: float32 vectors in the
requested order, in the cache. Every vector in the cache is finite and was computed by exactly that encoder from exactly those
pixels. If the process is killed, each device loses at most the part that it was computing and the part that was being
written, which is less than a shard.

The device is the scarce resource. So several threads read the next batches while the device computes, and another thread
writes finished vectors. A device waits only if reading or writing is slower than computing; `EmbedStats` says for how long.
"""

import json
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from synpipe import __version__
from synpipe.embeddings.cache import EmbeddingCache
from synpipe.embeddings.encoders import Encoder
from synpipe.embeddings.forward import Finish
from synpipe.errors import SynpipeError

logger = logging.getLogger(__name__)

ROWS_PER_PART = {"cpu": 512, "cuda": 1024}
READERS = {"cpu": 1, "cuda": 8}  # a busy CPU has no time to read far ahead
LAUNCHED_AHEAD = {
    "cpu": 0,
    "cuda": 1,
}  # on a GPU, the copy of a batch overlaps with the computation of the previous one

ReadTiles = Callable[[np.ndarray], np.ndarray]
"""Row numbers (n,) of a shard to its tiles, uint8 (n, 3, 256, 256). `__getitem__` of an array or memmap qualifies."""


@dataclass(frozen=True)
class Shard:
    """Tiles that are stored together. Row i has the i-th content hash.

    rows: the rows to embed. None: those that the cache lacks.
    """

    name: str
    content_hashes: Sequence[str]
    read_tiles: ReadTiles
    rows: np.ndarray | None = None


@dataclass
class EmbedStats:
    """What was embedded, and where the time went.

    waited_s: seconds that the devices, added up, waited for tiles and for the disk that stores the vectors. computed_s:
    seconds that this process waited for the devices or, on a CPU, computed. gpu_bytes: the most GPU memory in use.
    """

    tiles: int = 0
    bytes_read: int = 0
    waited_s: dict[str, float] = field(default_factory=lambda: {"for tiles": 0.0, "for the disk": 0.0})
    computed_s: float = 0.0
    gpu_bytes: int = 0

    def add(self, other: "EmbedStats") -> None:
        self.tiles += other.tiles
        self.bytes_read += other.bytes_read
        self.computed_s += other.computed_s
        self.gpu_bytes = max(self.gpu_bytes, other.gpu_bytes)
        for name, seconds in other.waited_s.items():
            self.waited_s[name] += seconds


def embed_shard(
    encoder: Encoder,
    read_tiles: ReadTiles,
    content_hashes: Sequence[str],
    batch_size: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> np.ndarray:
    """Embed rows 0 … n-1, whose tiles have the n `content_hashes`. Returns float32 (n, dim) in that order.

    On a CPU, `batch_size` changes a vector by less than 1e-5 of its length (measured: 7e-7 in fp32, 5e-6 in bf16, and
    usually zero). A batch that does not fit into GPU memory is halved, and so are the later ones. `progress` receives the
    number of tiles of each finished batch. Raises `SynpipeError` if a value is not finite.
    """
    size = batch_size or encoder.batch_size
    rows = np.arange(len(content_hashes))
    batches = [rows[start : start + size] for start in range(0, len(rows), size)]
    embedded = [np.empty((0, encoder.dim), np.float32)]
    for batch_vectors in _stream(encoder, (partial(read_tiles, batch) for batch in batches), size, EmbedStats()):
        embedded.append(batch_vectors)
        if progress:
            progress(len(batch_vectors))
    vectors = np.concatenate(embedded)
    _check_finite(encoder, vectors, content_hashes)
    return vectors


def embed_missing(
    encoders: Sequence[Encoder],
    cache: EmbeddingCache,
    shards: Iterable[Shard],
    batch_size: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> EmbedStats:
    """Embed the tiles of all shards that the cache lacks, or the rows that a shard names. Equal tiles of a shard count once.

    encoders: the same encoder on each device. A device takes the next part when it has finished one. If a device fails, the
    others finish their current parts, and all complete parts are kept. `progress` receives the number of tiles of each
    finished batch. Raises `SynpipeError` if a value is not finite.
    """
    if any(cache.fingerprint != encoder.fingerprint for encoder in encoders):
        raise ValueError("the cache belongs to another encoder")
    parts = _SharedParts(_split_into_parts(cache, shards, ROWS_PER_PART[encoders[0].device_kind]))
    with ThreadPoolExecutor(1, "synpipe-write") as writer:
        queue = _EmbedQueue(cache, parts, writer, batch_size, progress)
        if len(encoders) == 1:
            queue.work_off(encoders[0])
        else:
            with ThreadPoolExecutor(len(encoders), "synpipe-device") as devices:
                running = [devices.submit(queue.work_off, encoder) for encoder in encoders]
                try:
                    for device in running:
                        device.result()
                finally:
                    parts.end()
    return queue.stats


@dataclass
class _Part:
    """Rows of a shard whose vectors are written together."""

    shard: Shard
    rows: np.ndarray
    vectors: list[np.ndarray] = field(default_factory=list)

    @property
    def hashes(self) -> list[str]:
        return [self.shard.content_hashes[row] for row in self.rows.tolist()]

    @property
    def complete(self) -> bool:
        return sum(map(len, self.vectors)) == len(self.rows)


def _split_into_parts(cache: EmbeddingCache, shards: Iterable[Shard], max_rows: int) -> Iterator[_Part]:
    for shard in shards:
        rows = shard.rows
        if rows is None:
            rows = cache.missing_rows(shard.name, shard.content_hashes, verify=False)
        for start in range(0, len(rows), max_rows):
            yield _Part(shard, rows[start : start + max_rows])


class _SharedParts:
    """Parts for several devices. Each part goes to one device. After `end`, there are none left."""

    def __init__(self, parts: Iterator[_Part]) -> None:
        self._parts = parts
        self._lock = threading.Lock()
        self._ended = False

    def __iter__(self) -> Iterator[_Part]:
        while True:
            with self._lock:
                part = None if self._ended else next(self._parts, None)
            if part is None:
                return
            yield part

    def end(self) -> None:
        self._ended = True


@dataclass
class _EmbedQueue:
    """The work that the devices share, and what they have done."""

    cache: EmbeddingCache
    parts: _SharedParts
    writer: ThreadPoolExecutor
    batch_size: int | None
    progress: Callable[[int], None] | None
    stats: EmbedStats = field(default_factory=EmbedStats)
    stats_lock: threading.Lock = field(default_factory=threading.Lock)

    def work_off(self, encoder: Encoder) -> None:
        """Embed parts on the device of `encoder` until there are none left."""
        size = encoder.batch_size if self.batch_size is None else self.batch_size
        metadata = {
            "encoder": json.dumps(encoder.spec.model_dump(mode="json")),
            "preprocessing": json.dumps(encoder.preprocessing),
            "synpipe": __version__,
        }
        started_parts: deque[_Part] = deque()
        write: Future[Any] | None = None
        stats = EmbedStats()
        try:
            for vectors in _stream(encoder, self._reads(started_parts, size), size, stats):
                part = started_parts[0]
                part.vectors.append(vectors)
                stats.tiles += len(vectors)
                if self.progress:
                    self.progress(len(vectors))
                if part.complete:
                    started_parts.popleft()
                    part_vectors = np.concatenate(part.vectors)
                    _check_finite(encoder, part_vectors, part.hashes)
                    _wait_for(write, stats)
                    write = self.writer.submit(self.cache.add, part.shard.name, part.hashes, part_vectors, metadata)
            _wait_for(write, stats)
        except BaseException:
            self.parts.end()
            raise
        finally:
            if encoder.device.type == "cuda":
                import torch

                stats.gpu_bytes = torch.cuda.max_memory_allocated(encoder.device)
            with self.stats_lock:
                self.stats.add(stats)

    def _reads(self, started_parts: deque[_Part], size: int) -> Iterator[Callable[[], np.ndarray]]:
        """A function per batch that reads its tiles. Each part is added to `started_parts` before its first batch."""
        for part in self.parts:
            started_parts.append(part)
            for start in range(0, len(part.rows), size):
                yield partial(part.shard.read_tiles, part.rows[start : start + size])


def _wait_for(write: Future[Any] | None, stats: EmbedStats) -> None:
    started = time.perf_counter()
    if write is not None:
        write.result()
    stats.waited_s["for the disk"] += time.perf_counter() - started


def _stream(
    encoder: Encoder, reads: Iterable[Callable[[], np.ndarray]], size: int, stats: EmbedStats
) -> Iterator[np.ndarray]:
    """Yield the vectors of each batch in turn. Other threads call the functions of `reads` while the device computes."""
    readers, launched_ahead = READERS[encoder.device_kind], LAUNCHED_AHEAD[encoder.device_kind]
    launched: deque[list[Finish]] = deque()
    launch = _Launch(encoder, size)

    def stage(read: Callable[[], np.ndarray]) -> tuple[Any, int]:
        tiles = read()
        return encoder.stage(tiles), tiles.nbytes

    def finish() -> np.ndarray:
        started = time.perf_counter()
        vectors = [wait() for wait in launched.popleft()]
        stats.computed_s += time.perf_counter() - started
        return vectors[0] if len(vectors) == 1 else np.concatenate(vectors)

    with ThreadPoolExecutor(readers, "synpipe-read") as pool:
        ahead: deque[Future[tuple[Any, int]]] = deque()
        remaining = iter(reads)
        try:
            while True:
                while len(ahead) <= readers and (read := next(remaining, None)) is not None:
                    ahead.append(pool.submit(stage, read))
                if not ahead:
                    break
                started = time.perf_counter()
                staged, size_bytes = ahead.popleft().result()
                waited = time.perf_counter()
                launched.append(launch(staged))
                stats.waited_s["for tiles"] += waited - started
                stats.computed_s += time.perf_counter() - waited
                stats.bytes_read += size_bytes
                if len(launched) > launched_ahead:
                    yield finish()
        except GeneratorExit:
            raise
        except BaseException:
            while launched:  # keep the batches that were launched before a failure or an interrupt
                yield finish()
            raise
        finally:
            for future in ahead:
                future.cancel()
        while launched:
            yield finish()


class _Launch:
    """Launches batches. After one did not fit into the memory of the device, it splits that one and all later ones."""

    def __init__(self, encoder: Encoder, size: int) -> None:
        self._encoder, self._size = encoder, size

    def __call__(self, staged: Any) -> list[Finish]:
        import torch

        launched: list[Finish] = []
        start = 0
        while start < len(staged):
            size = self._size
            try:
                launched.append(self._encoder.forward.launch(staged[start : start + size], size))
            except torch.OutOfMemoryError as error:
                if size == 1:
                    raise SynpipeError(
                        f"One tile does not fit into the memory of {self._encoder.device} with {self._encoder.spec.model}: "
                        "close other programs that use that device, choose a smaller encoder, or run on the CPU."
                    ) from error
                self._size = min(size, len(staged) - start) // 2 or 1
                torch.cuda.empty_cache()
                logger.warning(
                    "%s is out of memory: continuing with batches of %d tiles", self._encoder.device, self._size
                )
                continue
            start += size
        return launched


def _check_finite(encoder: Encoder, vectors: np.ndarray, content_hashes: Sequence[str]) -> None:
    bad = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
    if len(bad):
        examples = ", ".join(f"{content_hashes[row]} (row {row})" for row in bad[:3])
        raise SynpipeError(
            f"{encoder.spec.model} gave NaN or infinite values for {len(bad)} of {len(vectors)} tiles, for example "
            f"{examples}. None of them was kept. Try `precision: fp32`; if that does not help, its weights are damaged."
        )
