"""Vectors that have been computed, kept under (content hash of the tile, fingerprint of the encoder).

In: vectors of a shard's tiles. Out: the same, by content hash. Guarantees: files are whole and never change; a damaged one
costs its own rows a second forward pass and nothing else. Each column has checksums of its own: no vector is given out that
differs from them, and which are here is answered from the column of hashes alone.
"""

import logging
import re
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from synpipe.errors import SynpipeError
from synpipe.specs import digest
from synpipe.store.files import write_table
from synpipe.store.objects import BulkPath, ObjectPath, list_paths

logger = logging.getLogger(__name__)

# Of a part on an object store, footer and hashes are two requests: up to this size all of it is fetched by one.
SMALL_BYTES = 2**17


class LostVectors(SynpipeError):
    """Vectors that were in the cache are not there any more: those embeddings are to be made again."""

    def __init__(self, message: str, fingerprint: str) -> None:
        super().__init__(message)
        self.fingerprint = fingerprint


def open_part(path: BulkPath) -> pq.ParquetFile:
    """A part of which columns are wanted: of an object no more than those is fetched."""
    source = path.open_random() if isinstance(path, ObjectPath) else path
    return pq.ParquetFile(source, page_checksum_verification=True)


class EmbeddingCache:
    """Vectors of one encoder, as immutable Parquet files `<root>/<fingerprint>/<shard>-<digest>.parquet`.

    Columns `content_hash` string and `vector` fixed_size_list<float32>[dim]; the encoder's spec is in the metadata.
    """

    def __init__(self, root: BulkPath, fingerprint: str) -> None:
        """The files are listed when it is first asked, once for all shards: what others add afterwards is not seen."""
        self.fingerprint = fingerprint
        self.folder = root / fingerprint
        self._found: dict[str, list[BulkPath]] | None = None

    def _parts(self, shard: str) -> list[BulkPath]:
        if self._found is None:
            found: dict[str, list[BulkPath]] = {}
            for path in list_paths(self.folder, "*.parquet"):
                if named := re.fullmatch(r"(.+)-[0-9a-f]{8}", path.stem):
                    found.setdefault(named[1], []).append(path)
            self._found = found
        return self._found.get(shard, [])

    def known(self, shard: str, verify: bool = True) -> set[str]:
        """Content hashes whose vectors are here. Damaged files are moved aside with a warning.

        verify: the vectors are read and held against their checksums, too. Else one that is damaged is found by who reads it.
        """
        return {content for path in self._parts(shard) for content in self._hashes(path, verify)}

    def lacking(self, shard: str, content_hashes: Sequence[str], verify: bool) -> np.ndarray:
        """Rows of `content_hashes` whose vectors are not here, of equal ones the first: int32 (m,), ascending.

        verify: see `known`.
        """
        known = self.known(shard, verify)
        first_row = {content: row for row, content in reversed(list(enumerate(content_hashes)))}
        return np.array(sorted(row for content, row in first_row.items() if content not in known), dtype=np.int32)

    def read(self, shard: str, content_hashes: Sequence[str]) -> np.ndarray:
        """Vectors float32 (n, dim) in the order of `content_hashes`. Raises `LostVectors` where one is not here."""
        hashes, vectors = self._load(shard)
        row_of = {content_hash: row for row, content_hash in enumerate(hashes)}
        missing = [content_hash for content_hash in content_hashes if content_hash not in row_of]
        if missing:
            raise LostVectors(
                f"{self.folder} lacks the vectors of {len(missing)} tiles of shard {shard}, the first being "
                f"{missing[0]}: materialise the embeddings again.",
                self.fingerprint,
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
        if self._found is not None:
            self._found[shard] = sorted({*self._parts(shard), path}, key=str)
        return path

    def _load(self, shard: str) -> tuple[list[str], np.ndarray]:
        hashes: list[str] = []
        vectors: list[np.ndarray] = []
        for path in self._parts(shard):
            table = self._read_part(path)
            if table is not None:
                hashes += table["content_hash"].to_pylist()
                column = table["vector"].combine_chunks()
                vectors.append(column.flatten().to_numpy().reshape(len(column), -1))
        return hashes, np.concatenate(vectors) if vectors else np.empty((0, 0), np.float32)

    def _hashes(self, path: BulkPath, verify: bool) -> list[str]:
        """The content hashes of a part, none where it is damaged."""
        if not verify:
            try:
                if path.stat().st_size > SMALL_BYTES:
                    file = open_part(path)
                    if self._is_ours(file.schema_arrow):
                        return file.read(["content_hash"])["content_hash"].to_pylist()
            except (pa.ArrowException, OSError):
                pass  # damaged, gone or out of reach: which of them is told by reading all of it
        table = self._read_part(path)
        return [] if table is None else table["content_hash"].to_pylist()

    def _is_ours(self, schema: pa.Schema) -> bool:
        made_by = (schema.metadata or {}).get(b"encoder_fingerprint")
        return schema.names == ["content_hash", "vector"] and made_by == self.fingerprint.encode()

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
            if self._is_ours(table.schema):
                return table
            problem = "it is not a part file of this encoder"
        except (pa.ArrowException, OSError) as error:  # a wrong checksum raises OSError
            problem = str(error)
        aside = path.with_suffix(".damaged")
        path.replace(aside)  # type: ignore[arg-type]  # both of one kind
        logger.warning("%s is damaged (%s): moved to %s, its vectors are computed again", path, problem, aside.name)
        return None
