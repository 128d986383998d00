"""Tiles to vectors: shards of tiles go through an encoder, and what is computed once is never computed again.

In: an `Encoder`, on one device or several, and functions that read rows of shards. Out: float32 vectors in the order asked
for, in the cache. Guarantees: a vector in the cache is finite and was made by exactly that encoder from exactly those
pixels; work that is killed loses, a device, the part that is being computed and the one that is being written: less than a
shard.

The device is what is scarce. So threads read the next batches while one is computed, and another thread writes the vectors
of those before it; a device waits only where reading or writing is slower than it is, and `Embedded` says for how long.
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
READERS = {"cpu": 1, "cuda": 8}  # a CPU that computes has nothing to spare for reading far ahead
LAUNCHED_AHEAD = {"cpu": 0, "cuda": 1}  # so that the copy of a batch runs beside the computation of the one before

ReadTiles = Callable[[np.ndarray], np.ndarray]
"""Row numbers (n,) of a shard to its tiles, uint8 (n, 3, 256, 256); `__getitem__` of an array or memmap is one."""


@dataclass(frozen=True)
class Shard:
    """Tiles that lie together; row i of it has the i-th content hash. rows: those to embed; None: those that the cache lacks,
    which is then asked."""

    name: str
    content_hashes: Sequence[str]
    read_tiles: ReadTiles
    rows: np.ndarray | None = None


@dataclass
class Embedded:
    """What has been done. waited_s: seconds for which the devices, all together, waited for tiles, and for the disk that takes
    the vectors; computed_s: for which this process waited for the devices, or was one."""

    tiles: int = 0
    bytes_read: int = 0
    waited_s: dict[str, float] = field(default_factory=lambda: {"for tiles": 0.0, "for the disk": 0.0})
    computed_s: float = 0.0
    gpu_bytes: int = 0

    def add(self, other: "Embedded") -> None:
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
    """Embed rows 0 … n-1, whose tiles have the n `content_hashes`; float32 (n, dim) in that order.

    On a CPU a vector depends on `batch_size` by less than 1e-5 of its length (measured: 7e-7 in fp32, 5e-6 in bf16, and
    zero as a rule). A batch that does not fit into the GPU's memory is halved, and so are those after it. `progress` is
    called with the number of tiles of each finished batch. Raises `SynpipeError` where a value is not finite.
    """
    size = batch_size or encoder.batch_size
    rows = np.arange(len(content_hashes))
    batches = [rows[start : start + size] for start in range(0, len(rows), size)]
    found = [np.empty((0, encoder.dim), np.float32)]
    for vectors in _stream(encoder, (partial(read_tiles, batch) for batch in batches), size, Embedded()):
        found.append(vectors)
        if progress:
            progress(len(vectors))
    vectors = np.concatenate(found)
    _check(encoder, vectors, content_hashes)
    return vectors


def embed_missing(
    encoders: Sequence[Encoder],
    cache: EmbeddingCache,
    shards: Iterable[Shard],
    batch_size: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> Embedded:
    """Embed the tiles of all shards that the cache lacks, each content of a shard once; or those that a shard names.

    encoders: the same one on each device that is to work; each takes the next part when it is through with one. Where one
    fails, the others end the part that they are at, and all that is whole is kept.
    """
    if any(cache.fingerprint != encoder.fingerprint for encoder in encoders):
        raise ValueError("the cache belongs to another encoder")
    done = Embedded()
    parts = _Shared(_parts(cache, shards, ROWS_PER_PART[encoders[0].device_kind]))
    with ThreadPoolExecutor(1, "synpipe-write") as writer:
        work = partial(_embed_parts, cache=cache, parts=parts, writer=writer, size=batch_size, tell=progress, done=done)
        if len(encoders) == 1:
            work(encoders[0])
        else:
            with ThreadPoolExecutor(len(encoders), "synpipe-device") as devices:
                running = [devices.submit(work, encoder) for encoder in encoders]
                try:
                    for one in running:
                        one.result()
                finally:
                    parts.end()
    return done


@dataclass
class _Part:
    """Rows of a shard whose vectors are written at once."""

    shard: Shard
    rows: np.ndarray
    vectors: list[np.ndarray] = field(default_factory=list)

    @property
    def hashes(self) -> list[str]:
        return [self.shard.content_hashes[row] for row in self.rows.tolist()]


def _parts(cache: EmbeddingCache, shards: Iterable[Shard], most: int) -> Iterator[_Part]:
    for shard in shards:
        rows = shard.rows
        if rows is None:
            rows = cache.lacking(shard.name, shard.content_hashes, verify=False)
        for start in range(0, len(rows), most):
            yield _Part(shard, rows[start : start + most])


class _Shared:
    """Parts for several devices: each goes to one of them, and there are none after an end."""

    def __init__(self, parts: Iterator[_Part]) -> None:
        self._parts = parts
        self.lock = threading.Lock()
        self._ended = False

    def __iter__(self) -> Iterator[_Part]:
        while True:
            with self.lock:
                part = None if self._ended else next(self._parts, None)
            if part is None:
                return
            yield part

    def end(self) -> None:
        self._ended = True


def _embed_parts(
    encoder: Encoder,
    cache: EmbeddingCache,
    parts: _Shared,
    writer: ThreadPoolExecutor,
    size: int | None,
    tell: Callable[[int], None] | None,
    done: Embedded,
) -> None:
    """The work of one device."""
    size = size or encoder.batch_size
    metadata = {
        "encoder": json.dumps(encoder.spec.model_dump(mode="json")),
        "preprocessing": json.dumps(encoder.preprocessing),
        "synpipe": __version__,
    }
    at_work: deque[_Part] = deque()
    written: Future[Any] | None = None
    mine = Embedded()

    def wait_until_written() -> None:
        started = time.perf_counter()
        if written is not None:
            written.result()
        mine.waited_s["for the disk"] += time.perf_counter() - started

    def reads() -> Iterator[Callable[[], np.ndarray]]:
        for part in parts:
            at_work.append(part)
            for start in range(0, len(part.rows), size):
                yield partial(part.shard.read_tiles, part.rows[start : start + size])

    try:
        for vectors in _stream(encoder, reads(), size, mine):
            part = at_work[0]
            part.vectors.append(vectors)
            mine.tiles += len(vectors)
            if tell:
                tell(len(vectors))
            if sum(map(len, part.vectors)) == len(part.rows):
                at_work.popleft()
                found = np.concatenate(part.vectors)
                _check(encoder, found, part.hashes)
                wait_until_written()
                written = writer.submit(cache.add, part.shard.name, part.hashes, found, metadata)
        wait_until_written()
    except BaseException:
        parts.end()
        raise
    finally:
        if encoder.device.type == "cuda":
            import torch

            mine.gpu_bytes = torch.cuda.max_memory_allocated(encoder.device)
        with parts.lock:
            done.add(mine)


def _stream(
    encoder: Encoder, reads: Iterable[Callable[[], np.ndarray]], size: int, done: Embedded
) -> Iterator[np.ndarray]:
    """Vectors of batch after batch, each read by a function of `reads` in another thread while others are computed."""
    readers, launched_ahead = READERS[encoder.device_kind], LAUNCHED_AHEAD[encoder.device_kind]
    launched: deque[list[Finish]] = deque()
    launch = _Launch(encoder, size)

    def stage(read: Callable[[], np.ndarray]) -> tuple[Any, int]:
        tiles = read()
        return encoder.stage(tiles), tiles.nbytes

    def finish() -> np.ndarray:
        started = time.perf_counter()
        vectors = [wait() for wait in launched.popleft()]
        done.computed_s += time.perf_counter() - started
        return vectors[0] if len(vectors) == 1 else np.concatenate(vectors)

    with ThreadPoolExecutor(readers, "synpipe-read") as pool:
        ahead: deque[Future[tuple[Any, int]]] = deque()
        left = iter(reads)
        try:
            while True:
                while len(ahead) <= readers and (read := next(left, None)) is not None:
                    ahead.append(pool.submit(stage, read))
                if not ahead:
                    break
                started = time.perf_counter()
                staged, size_bytes = ahead.popleft().result()
                waited = time.perf_counter()
                launched.append(launch(staged))
                done.waited_s["for tiles"] += waited - started
                done.computed_s += time.perf_counter() - waited
                done.bytes_read += size_bytes
                if len(launched) > launched_ahead:
                    yield finish()
        except GeneratorExit:
            raise
        except BaseException:
            while launched:  # what was read and computed before something failed, or somebody stopped it
                yield finish()
            raise
        finally:
            for future in ahead:
                future.cancel()
        while launched:
            yield finish()


class _Launch:
    """Begins forward passes, in halves from where a batch did not fit into the device's memory."""

    def __init__(self, encoder: Encoder, size: int) -> None:
        self._encoder, self._size = encoder, size

    def __call__(self, staged: Any) -> list[Finish]:
        import torch

        begun: list[Finish] = []
        start = 0
        while start < len(staged):
            size = self._size
            try:
                begun.append(self._encoder.forward.launch(staged[start : start + size], size))
            except torch.OutOfMemoryError as error:
                if size == 1:
                    raise SynpipeError(
                        f"One tile does not fit into the memory of {self._encoder.device} with {self._encoder.spec.model}: "
                        "close what else uses that device, choose a smaller encoder, or run on the CPU."
                    ) from error
                self._size = min(size, len(staged) - start) // 2 or 1
                torch.cuda.empty_cache()
                logger.warning(
                    "%s is out of memory: going on with batches of %d tiles", self._encoder.device, self._size
                )
                continue
            start += size
        return begun


def _check(encoder: Encoder, vectors: np.ndarray, content_hashes: Sequence[str]) -> None:
    bad = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
    if len(bad):
        examples = ", ".join(f"{content_hashes[row]} (row {row})" for row in bad[:3])
        raise SynpipeError(
            f"{encoder.spec.model} gave NaN or infinite values for {len(bad)} of {len(vectors)} tiles, the first being "
            f"{examples}. None of them was kept. Try `precision: fp32`; if that does not help, its weights are damaged."
        )
