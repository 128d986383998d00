"""Reads volumes that are stored as one data set of an HDF5 file, such as those of CREMI.

Input: the path of the file and the path of the data set in it. Output: an `Hdf5Reader`. Guarantees:
- All voxels come from this file. A data set whose voxels lie in other files is refused, because a change of those would go
  unnoticed.
- Voxels that were never written are an error. They never read as black.
"""

import math
import os
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from itertools import product
from pathlib import Path
from threading import Lock
from typing import Any

import h5py
import numpy as np

from synpipe.errors import SynpipeError
from synpipe.store.fingerprints import file_sha256
from synpipe.store.hdf5 import refuse_other_files
from synpipe.volumes.chunk_plan import Chunk, Chunking
from synpipe.volumes.reader import NothingStored, SlicesZyx, VoxelReader, describe_error

# With the default of 1 MiB every cut-out decodes its chunks again. 128 MiB hold a row of chunks of a common volume.
CHUNK_CACHE_BYTES = 128 * 2**20
# Chunks with the same hash evict each other from the cache. HDF5 recommends a prime number of slots, about a hundred times
# the number of chunks that the cache holds (https://docs.hdfgroup.org/hdf5/v1_14/group___d_a_p_l.html,
# H5Pset_chunk_cache). A slot takes eight bytes.
CHUNK_CACHE_SLOTS = 200_003
# A contiguous data set has no chunks, so every reading order is equally good. This is about the size of a tile.
CONTIGUOUS_CHUNK_ZYX = (1, 256, 256)

# The exceptions that h5py raises for a damaged file, found by flipping every byte of one.
HDF5_ERRORS = (OSError, RuntimeError, KeyError, ValueError)


class Hdf5Reader(VoxelReader):
    """Reads a data set of an HDF5 file. Its attributes `resolution` and `offset` state voxel size and offset, as in CREMI.

    h5py admits one thread at a time, and becomes slower with several. Chunks that are only gzipped, as CREMI's are, are
    therefore decompressed outside h5py, on all processors. Other data sets are read in the calling thread, when the caller
    asks for the voxels.
    """

    errors = (*HDF5_ERRORS, zlib.error, NothingStored)

    def __init__(self, path: Path, dataset: str):
        self._path, self.location = path, str(path)
        self._voxel_bytes = 0
        self._gzipped: GzippedChunks | None = None
        where = f"Volume {path}"
        try:
            self._file = h5py.File(path, "r", rdcc_nbytes=CHUNK_CACHE_BYTES, rdcc_nslots=CHUNK_CACHE_SLOTS)
        except OSError as error:
            raise SynpipeError(
                f"{where} is truncated or not an HDF5 file ({describe_error(error)}): copy it again."
            ) from None
        try:
            self._open(where, dataset)
        except HDF5_ERRORS as error:
            self.close()
            raise SynpipeError(f"{where} is damaged ({describe_error(error)}): copy it again.") from None
        except SynpipeError:
            self.close()
            raise

    def _open(self, where: str, dataset: str) -> None:
        refuse_other_files(self._file, dataset)
        data = self._file.get(dataset)
        if not isinstance(data, h5py.Dataset):
            raise SynpipeError(
                f"{where} has no data set `{dataset}`; it has {', '.join(_dataset_names(self._file)) or 'none'}. Set "
                "`volume.dataset` in the data set's YAML file."
            )
        if data.shape is None or len(data.shape) != 3 or 0 in data.shape:
            raise SynpipeError(f"{where}: `{dataset}` has shape {data.shape}, but sections as (z, y, x) are needed.")
        self._data, self.shape_zyx, self.dtype = data, data.shape, data.dtype
        self.voxel_size_nm_zyx, self.offset_nm_zyx = data.attrs.get("resolution"), data.attrs.get("offset")
        chunk = data.chunks or CONTIGUOUS_CHUNK_ZYX
        self.chunking = Chunking(chunk, CHUNK_CACHE_BYTES // (math.prod(chunk) * self.dtype.itemsize))
        self._gzipped = GzippedChunks(data, self.chunking) if _is_only_gzipped(data) else None
        self._written_chunks: set[Chunk] = set()

    @property
    def bytes_read(self) -> int:
        return self._voxel_bytes if self._gzipped is None else self._gzipped.bytes_read

    def start_read(self, box: SlicesZyx) -> Callable[[], np.ndarray]:
        return partial(self._read, box) if self._gzipped is None else self._gzipped.start_read(box)

    def _read(self, box: SlicesZyx) -> np.ndarray:
        self._require_written(box)
        values = self._data[box]
        self._voxel_bytes += values.nbytes
        return values

    def _require_written(self, box: SlicesZyx) -> None:
        """Raise `NothingStored` if a chunk of this box was never written. HDF5 would return its fill value."""
        if self._data.chunks is None:
            if not _is_allocated(self._data):
                raise NothingStored("the data set was created but never written")
            return
        low, high = np.array([(side.start, side.stop) for side in box]).T
        for chunk in self.chunking.chunks(low, high):
            if chunk not in self._written_chunks:
                _find_chunk(self._data, chunk)
                self._written_chunks.add(chunk)

    def identity(self) -> dict[str, Any]:
        identity = {"content": file_sha256(self._path), "dataset": self._data.name}
        # Former versions read such voxels as black. The mark makes the tiles that were cut out of them out of date.
        return identity if _is_wholly_written(self._data) else identity | {"never_written": "missing"}

    def close(self) -> None:
        if self._gzipped is not None:
            self._gzipped.close()
        self._file.close()


def _is_only_gzipped(data: h5py.Dataset) -> bool:
    settings = data.id.get_create_plist()
    filters = [settings.get_filter(number)[0] for number in range(settings.get_nfilters())]
    return data.chunks is not None and filters == [h5py.h5z.FILTER_DEFLATE]


def _find_chunk(data: h5py.Dataset, chunk: Chunk) -> tuple[int, ...]:
    """The first voxel of a chunk. Raises `NothingStored` if the chunk was never written."""
    first_voxel = tuple(number * size for number, size in zip(chunk, data.chunks, strict=True))
    if data.id.get_chunk_info_by_coord(first_voxel).byte_offset is None:
        raise NothingStored(f"the chunk at voxel {first_voxel} was never written")
    return first_voxel


def _is_wholly_written(data: h5py.Dataset) -> bool:
    if data.chunks is None:
        return _is_allocated(data)
    chunk_count = math.prod(-(-extent // size) for extent, size in zip(data.shape, data.chunks, strict=True))
    return data.id.get_num_chunks() == chunk_count


def _is_allocated(data: h5py.Dataset) -> bool:
    """Whether a data set without chunks has a place in the file. HDF5 gives it one when voxels are first written."""
    return data.id.get_storage_size() > 0


class GzippedChunks:
    """The gzipped chunks of an HDF5 data set, decompressed by several threads and cached. Safe to use from several threads."""

    def __init__(self, data: h5py.Dataset, chunking: Chunking):
        self._data, self._chunking = data, chunking
        self.bytes_read, self._count_lock = 0, Lock()
        self._threads = ThreadPoolExecutor(os.cpu_count(), "inflate")
        self._start = lru_cache(maxsize=chunking.cached)(lambda chunk: self._threads.submit(self._decompress, chunk))

    def start_read(self, box: SlicesZyx) -> Callable[[], np.ndarray]:
        axes = [list(_overlaps(side, size)) for side, size in zip(box, self._chunking.shape_zyx, strict=True)]
        overlaps = [tuple(zip(*overlap, strict=True)) for overlap in product(*axes)]
        futures = [self._start(chunk) for chunk, _, _ in overlaps]

        def finish() -> np.ndarray:
            values = np.empty([side.stop - side.start for side in box], self._data.dtype)
            for (_, within_chunk, within_box), future in zip(overlaps, futures, strict=True):
                values[within_box] = future.result()[within_chunk]
            return values

        return finish

    def _decompress(self, chunk: Chunk) -> np.ndarray:
        shape, dtype = self._chunking.shape_zyx, self._data.dtype
        first_voxel = _find_chunk(self._data, chunk)
        skipped_filters, content = self._data.id.read_direct_chunk(first_voxel)
        with self._count_lock:
            self.bytes_read += len(content)
        if not skipped_filters:
            content = zlib.decompress(content, bufsize=math.prod(shape) * dtype.itemsize)
        return np.frombuffer(content, dtype).reshape(shape)

    def close(self) -> None:
        self._threads.shutdown(cancel_futures=True)
        self._start.cache_clear()


def _overlaps(side: slice, size: int) -> Iterator[tuple[int, slice, slice]]:
    """The chunks that one side of a box overlaps: number of the chunk, and the shared voxels counted from the chunk's and
    from the box's first voxel. size: voxels of a chunk along this axis."""
    for number in range(side.start // size, -(-side.stop // size)):
        low, high = max(number * size, side.start), min((number + 1) * size, side.stop)
        yield number, slice(low - number * size, high - number * size), slice(low - side.start, high - side.start)


def _dataset_names(file: h5py.File) -> list[str]:
    names: list[str] = []
    file.visititems(lambda name, item: names.append(name) if isinstance(item, h5py.Dataset) else None)
    return names
