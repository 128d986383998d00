"""Keeps computed vectors, keyed by the content hash of the tile and the fingerprint of the encoder.

Input: vectors of the tiles of a shard. Output: the same vectors, by content hash. Files are complete and never change. If
one is damaged, only its own rows are computed again. Each column has its own checksums: a vector is returned only if it
matches them, and the column of hashes alone tells which vectors are present.
"""

import logging
import re
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from synpipe.embeddings.vectors import read_vectors, vector_column
from synpipe.errors import SynpipeError, one_line
from synpipe.specs import digest
from synpipe.store.files import write_table
from synpipe.store.objects import BulkPath, ObjectPath, list_paths

logger = logging.getLogger(__name__)

SMALL_BYTES = 2**17
"""A part up to this size is read as a whole. On an object store that is one request; footer and hashes would be two."""


class LostVectors(SynpipeError):
    """Vectors have disappeared from the cache, so their embeddings must be computed again."""

    def __init__(self, message: str, fingerprint: str) -> None:
        super().__init__(message)
        self.fingerprint = fingerprint


def open_vector_part(path: BulkPath) -> pq.ParquetFile:
    """Open a part to read single columns. From an object store, only those columns are fetched."""
    source = path.open_random() if isinstance(path, ObjectPath) else path
    return pq.ParquetFile(source, page_checksum_verification=True)


class EmbeddingCache:
    """The vectors of one encoder, as immutable Parquet files `<root>/<fingerprint>/<shard>-<digest>.parquet`.

    Columns: `content_hash` string and `vector` fixed_size_list<float32>[dim]. The metadata holds the spec of the encoder.
    """

    def __init__(self, root: BulkPath, fingerprint: str) -> None:
        """Files are listed on first use, once for all shards. Files that others add later are not seen."""
        self.fingerprint = fingerprint
        self.folder = root / fingerprint
        self._parts_by_shard: dict[str, list[BulkPath]] | None = None

    def _parts(self, shard: str) -> list[BulkPath]:
        if self._parts_by_shard is None:
            parts: dict[str, list[BulkPath]] = {}
            for path in list_paths(self.folder, "*.parquet"):
                if match := re.fullmatch(r"(.+)-[0-9a-f]{8}", path.stem):
                    parts.setdefault(match[1], []).append(path)
            self._parts_by_shard = parts
        return self._parts_by_shard.get(shard, [])

    def known_hashes(self, shard: str, verify: bool = True) -> set[str]:
        """Content hashes whose vectors are in the cache. Damaged files are moved aside with a warning.

        verify: also read the vectors and check them against their checksums. Otherwise `read` detects the damage.
        """
        return {content_hash for path in self._parts(shard) for content_hash in self._hashes(path, verify)}

    def missing_rows(self, shard: str, content_hashes: Sequence[str], verify: bool) -> np.ndarray:
        """Rows of `content_hashes` whose vectors are not in the cache: int32 (m,), ascending.

        Equal hashes count once, at their first row. verify: see `known_hashes`.
        """
        known = self.known_hashes(shard, verify)
        first_row = {content_hash: row for row, content_hash in reversed(list(enumerate(content_hashes)))}
        missing = (row for content_hash, row in first_row.items() if content_hash not in known)
        return np.array(sorted(missing), dtype=np.int32)

    def read(self, shard: str, content_hashes: Sequence[str]) -> np.ndarray:
        """Vectors, float32 (n, dim), in the order of `content_hashes`. Raises `LostVectors` if one is not in the cache."""
        hashes, vectors = self._load(shard)
        row_of = {content_hash: row for row, content_hash in enumerate(hashes)}
        missing = [content_hash for content_hash in content_hashes if content_hash not in row_of]
        if missing:
            raise LostVectors(
                f"{self.folder} lacks the vectors of {len(missing)} tiles of shard {shard}, for example "
                f"{missing[0]}: materialise the embeddings again.",
                self.fingerprint,
            )
        return vectors[[row_of[content_hash] for content_hash in content_hashes]]

    def add(
        self, shard: str, content_hashes: Sequence[str], vectors: np.ndarray, metadata: dict[str, str] | None = None
    ) -> BulkPath:
        """Write one part with vectors, float32 (n, dim), n > 0, and return its path."""
        table = pa.table({"content_hash": pa.array(content_hashes, pa.string()), "vector": vector_column(vectors)})
        path = self.folder / f"{shard}-{digest(list(content_hashes))[:8]}.parquet"
        metadata = {**(metadata or {}), "encoder_fingerprint": self.fingerprint}
        write_table(path, table, metadata)
        if self._parts_by_shard is not None:
            self._parts_by_shard[shard] = sorted({*self._parts(shard), path}, key=str)
        return path

    def _load(self, shard: str) -> tuple[list[str], np.ndarray]:
        hashes: list[str] = []
        vectors: list[np.ndarray] = []
        for path in self._parts(shard):
            table = self._read_part(path)
            if table is not None:
                hashes += table["content_hash"].to_pylist()
                vectors.append(read_vectors(table))
        return hashes, np.concatenate(vectors) if vectors else np.empty((0, 0), np.float32)

    def _hashes(self, path: BulkPath, verify: bool) -> list[str]:
        """The content hashes of a part; none if it is damaged."""
        if not verify:
            try:
                if path.stat().st_size > SMALL_BYTES:
                    file = open_vector_part(path)
                    if self._is_ours(file.schema_arrow):
                        return file.read(["content_hash"])["content_hash"].to_pylist()
            except (pa.ArrowException, OSError):
                pass  # damaged, deleted or unreachable: reading the whole part below shows which
        table = self._read_part(path)
        return [] if table is None else table["content_hash"].to_pylist()

    def _is_ours(self, schema: pa.Schema) -> bool:
        fingerprint = (schema.metadata or {}).get(b"encoder_fingerprint")
        return schema.names == ["content_hash", "vector"] and fingerprint == self.fingerprint.encode()

    def _read_part(self, path: BulkPath) -> pa.Table | None:
        """The table, or None for a damaged file, which is moved aside so that its rows are computed again."""
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return None  # moved aside or deleted after the files were listed
        except OSError as error:
            raise SynpipeError(f"Cannot read {path}: {error.strerror}. Check its permissions and the disk.") from error
        try:
            table = pq.read_table(pa.BufferReader(content), page_checksum_verification=True)
            if self._is_ours(table.schema):
                return table
            problem = "it is not a part of this encoder"
        except (pa.ArrowException, OSError) as error:  # a wrong checksum raises OSError
            problem = one_line(error)
        aside = path.with_suffix(".damaged")
        path.replace(aside)  # type: ignore[arg-type]  # both paths are of the same kind
        logger.warning(
            "%s is damaged (%s): it was moved to %s, and its vectors are computed again", path, problem, aside.name
        )
        return None
