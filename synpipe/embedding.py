"""Tiles to vectors: a shard of tiles goes through an encoder, and what is computed once is never computed again.

In: an `Encoder` and a function that reads rows of a shard. Out: float32 vectors in the order asked for, kept in a cache
under (content hash of the tile, fingerprint of the encoder). Guarantees: a vector in the cache is finite and was
made by exactly that encoder from exactly those pixels; work that is interrupted loses at most `ROWS_PER_PART` tiles;
a damaged file costs its own rows a second forward pass and nothing else.
"""

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from synpipe import __version__
from synpipe.encoders import Encoder
from synpipe.errors import SynpipeError
from synpipe.shards import write_table
from synpipe.specs import digest

logger = logging.getLogger(__name__)

ROWS_PER_PART = 512
BATCH_SIZE = {"cpu": 32, "cuda": 256}

ReadTiles = Callable[[np.ndarray], np.ndarray]
"""Row numbers (n,) of a shard to its tiles, uint8 (n, 3, 256, 256); `__getitem__` of an array or memmap is one."""


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
    import torch

    batch_size = batch_size or BATCH_SIZE.get(encoder.device.type, BATCH_SIZE["cpu"])
    vectors = np.empty((len(content_hashes), encoder.dim), np.float32)
    start = 0
    while start < len(vectors):
        rows = np.arange(start, min(start + batch_size, len(vectors)))
        try:
            vectors[rows] = encoder.embed(read_tiles(rows))
        except torch.OutOfMemoryError as error:
            if len(rows) == 1:
                raise SynpipeError(
                    f"One tile does not fit into the memory of {encoder.device} with {encoder.spec.model}: close what "
                    "else uses that device, choose a smaller encoder, or run on the CPU."
                ) from error
            batch_size = len(rows) // 2
            torch.cuda.empty_cache()
            logger.warning("%s is out of memory: going on with batches of %d tiles", encoder.device, batch_size)
            continue
        start += len(rows)
        if progress:
            progress(len(rows))
    bad = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
    if len(bad):
        examples = ", ".join(f"{content_hashes[row]} (row {row})" for row in bad[:3])
        raise SynpipeError(
            f"{encoder.spec.model} gave NaN or infinite values for {len(bad)} of {len(vectors)} tiles, the first being "
            f"{examples}. None of them was kept. Try `precision: fp32`; if that does not help, its weights are damaged."
        )
    return vectors


class EmbeddingCache:
    """Vectors of one encoder, as immutable Parquet files `<root>/<fingerprint>/<shard>-<digest>.parquet`.

    Columns `content_hash` string and `vector` fixed_size_list<float32>[dim]; the encoder's spec is in the metadata.
    """

    def __init__(self, root: Path, fingerprint: str) -> None:
        self.fingerprint = fingerprint
        self.folder = root / fingerprint

    def known(self, shard: str) -> set[str]:
        """Content hashes whose vectors are here. Damaged files are moved aside with a warning."""
        return set(self._load(shard)[0])

    def read(self, shard: str, content_hashes: Sequence[str]) -> np.ndarray:
        """Vectors float32 (n, dim) in the order of `content_hashes`. Raises `SynpipeError` where one is not here."""
        hashes, vectors = self._load(shard)
        row_of = {content_hash: row for row, content_hash in enumerate(hashes)}
        missing = [content_hash for content_hash in content_hashes if content_hash not in row_of]
        if missing:
            raise SynpipeError(
                f"{self.folder} lacks the vectors of {len(missing)} tiles of shard {shard}, the first being "
                f"{missing[0]}: materialise the embeddings again."
            )
        return vectors[[row_of[content_hash] for content_hash in content_hashes]]

    def add(
        self, shard: str, content_hashes: Sequence[str], vectors: np.ndarray, metadata: dict[str, str] | None = None
    ) -> Path:
        """Write one part file with vectors float32 (n, dim), n > 0, and return its path."""
        table = pa.table(
            {
                "content_hash": pa.array(content_hashes, pa.string()),
                "vector": pa.FixedSizeListArray.from_arrays(
                    pa.array(np.ascontiguousarray(vectors, np.float32).ravel()), vectors.shape[1]
                ),
            }
        )
        path = self.folder / f"{shard}-{digest(list(content_hashes))[:8]}.parquet"
        metadata = {**(metadata or {}), "encoder_fingerprint": self.fingerprint}
        write_table(path, table, metadata, write_page_checksum=True)
        return path

    def _load(self, shard: str) -> tuple[list[str], np.ndarray]:
        hashes: list[str] = []
        vectors: list[np.ndarray] = []
        for path in sorted(self.folder.glob(f"{shard}-{'[0-9a-f]' * 8}.parquet")):
            table = self._read_part(path)
            if table is not None:
                hashes += table["content_hash"].to_pylist()
                column = table["vector"].combine_chunks()
                vectors.append(column.flatten().to_numpy().reshape(len(column), -1))
        return hashes, np.concatenate(vectors) if vectors else np.empty((0, 0), np.float32)

    def _read_part(self, path: Path) -> pa.Table | None:
        """The table, or None for a damaged file, which is then moved aside so that its rows are computed anew."""
        try:
            content = path.read_bytes()
        except OSError as error:
            raise SynpipeError(f"Cannot read {path}: {error.strerror}. Check that file.") from error
        try:
            table = pq.read_table(pa.BufferReader(content), page_checksum_verification=True)
            made_by = (table.schema.metadata or {}).get(b"encoder_fingerprint")
            if table.column_names == ["content_hash", "vector"] and made_by == self.fingerprint.encode():
                return table
            problem = "it is not a part file of this encoder"
        except (pa.ArrowException, OSError) as error:  # a wrong checksum raises OSError
            problem = str(error)
        aside = path.with_suffix(".damaged")
        path.replace(aside)
        logger.warning("%s is damaged (%s): moved to %s, its vectors are computed again", path, problem, aside.name)
        return None


def embed_missing(
    encoder: Encoder,
    cache: EmbeddingCache,
    shard: str,
    content_hashes: Sequence[str],
    read_tiles: ReadTiles,
    batch_size: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> int:
    """Embed the tiles of a shard that the cache lacks, each content once; return how many went through the model."""
    if cache.fingerprint != encoder.fingerprint:
        raise ValueError("the cache belongs to another encoder")
    known = cache.known(shard)
    first_row = {content_hash: row for row, content_hash in reversed(list(enumerate(content_hashes)))}
    rows = np.array(sorted(row for content_hash, row in first_row.items() if content_hash not in known), dtype=np.int64)
    metadata = {
        "encoder": json.dumps(encoder.spec.model_dump(mode="json")),
        "preprocessing": json.dumps(encoder.preprocessing),
        "synpipe": __version__,
    }
    for start in range(0, len(rows), ROWS_PER_PART):
        part = rows[start : start + ROWS_PER_PART]
        hashes = [content_hashes[row] for row in part]
        vectors = embed_shard(encoder, _rows_of(read_tiles, part), hashes, batch_size, progress)
        cache.add(shard, hashes, vectors, metadata)
    return len(rows)


def _rows_of(read_tiles: ReadTiles, rows: np.ndarray) -> ReadTiles:
    return lambda picked: read_tiles(rows[picked])
