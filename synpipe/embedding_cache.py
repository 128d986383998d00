"""Vectors that have been computed, kept under (content hash of the tile, fingerprint of the encoder).

In: vectors of a shard's tiles. Out: the same, by content hash. Guarantees: files are whole and never change; a damaged one
costs its own rows a second forward pass and nothing else.
"""

import logging
import re
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from synpipe.errors import SynpipeError
from synpipe.shards import write_table
from synpipe.specs import digest
from synpipe.storage import BulkPath, listed

logger = logging.getLogger(__name__)


class EmbeddingCache:
    """Vectors of one encoder, as immutable Parquet files `<root>/<fingerprint>/<shard>-<digest>.parquet`.

    Columns `content_hash` string and `vector` fixed_size_list<float32>[dim]; the encoder's spec is in the metadata.
    """

    def __init__(self, root: BulkPath, fingerprint: str) -> None:
        """The files are listed here, once for all shards: what others add afterwards is not seen."""
        self.fingerprint = fingerprint
        self.folder = root / fingerprint
        self._parts: dict[str, list[BulkPath]] = {}
        for path in listed(self.folder, "*.parquet"):
            if named := re.fullmatch(r"(.+)-[0-9a-f]{8}", path.stem):
                self._parts.setdefault(named[1], []).append(path)

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
    ) -> BulkPath:
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
        write_table(path, table, metadata)
        parts = self._parts.setdefault(shard, [])
        self._parts[shard] = sorted({*parts, path}, key=str)
        return path

    def _load(self, shard: str) -> tuple[list[str], np.ndarray]:
        hashes: list[str] = []
        vectors: list[np.ndarray] = []
        for path in self._parts.get(shard, []):
            table = self._read_part(path)
            if table is not None:
                hashes += table["content_hash"].to_pylist()
                column = table["vector"].combine_chunks()
                vectors.append(column.flatten().to_numpy().reshape(len(column), -1))
        return hashes, np.concatenate(vectors) if vectors else np.empty((0, 0), np.float32)

    def _read_part(self, path: BulkPath) -> pa.Table | None:
        """The table, or None for a damaged file, which is then moved aside so that its rows are computed anew."""
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return None  # moved aside, or deleted, since the files were listed
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
        path.replace(aside)  # type: ignore[arg-type]  # both of one kind
        logger.warning("%s is damaged (%s): moved to %s, its vectors are computed again", path, problem, aside.name)
        return None
