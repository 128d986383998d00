"""Volumes in local files: HDF5, and a folder with an image per section.

In: a path. Out: a `Source`: what the file says about itself, and sub-volumes of it in its own data type. Chunked volumes,
local or remote, are in `volume_chunked`.
"""

import math
import os
import re
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from itertools import pairwise, product
from pathlib import Path
from threading import Lock
from typing import Any, ClassVar

import h5py
import numpy as np
from PIL import Image

from synpipe.errors import SynpipeError
from synpipe.store.fingerprints import file_sha256, folder_sha256
from synpipe.volumes.chunk_plan import Chunk, Chunking

# The default of 1 MiB makes every cut-out decode its chunks again; 128 MiB keeps a row of chunks of a common volume.
HDF5_CHUNK_CACHE_BYTES = 128 * 2**20
# Chunks whose hashes collide drive each other out of the cache: HDF5 advises a prime, a hundred times the chunks it holds
# (https://docs.hdfgroup.org/hdf5/v1_14/group___d_a_p_l.html, H5Pset_chunk_cache). Eight bytes each.
HDF5_CHUNK_CACHE_SLOTS = 200_003
# A contiguous data set has no chunks: any order of reading does, by blocks of about a tile as well as another.
CONTIGUOUS_BLOCK_ZYX = (1, 256, 256)
SECTION_CACHE_BYTES = 256 * 2**20

# What h5py raises of a damaged file, as flipping every byte of one has shown.
HDF5_ERRORS = (OSError, RuntimeError, KeyError, ValueError)

SECTION_SUFFIXES = (".png", ".tif", ".tiff")
# A folder that holds one of these is a chunked volume: the path must say so.
CHUNKED_BY_DOCUMENT = {"info": "precomputed", "attributes.json": "n5", "zarr.json": "zarr", ".zarray": "zarr"}

# Sections larger than what Pillow takes for an attack (179 megapixels) are common in EM, and the user named the files.
Image.MAX_IMAGE_PIXELS = None


Box = tuple[slice, slice, slice]


class Source(ABC):
    """Voxels with their axes z, y, x. One thread at a time may read, unless the kind of source says otherwise.

    location: the path or address, for people. dtype, shape_zyx: of the voxels. voxel_size_nm_zyx, offset_nm_zyx: as the
    source says them, unchecked; None where it does not. chunking: how the voxels are stored, and how many decoded chunks are
    kept. scale_name: of the array that is read, where the volume may have several. errors: what `start_read` and what it
    returns may raise, and remedy: what to do then.
    """

    errors: ClassVar[tuple[type[Exception], ...]]
    remedy: str = "the file is truncated or damaged, copy it again"
    location: str
    dtype: np.dtype
    shape_zyx: tuple[int, int, int]
    chunking: Chunking
    scale_name: str | None = None
    voxel_size_nm_zyx: Any = None
    offset_nm_zyx: Any = None

    @property
    @abstractmethod
    def bytes_read(self) -> int:
        """What has been read since the volume was opened, as it is stored, compressed or not."""

    @abstractmethod
    def start_read(self, box: Box) -> Callable[[], np.ndarray]:
        """Begin to read where that is of use; what is returned waits for the voxels, or reads them."""

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """What changes when a voxel may have changed, JSON-able."""

    @abstractmethod
    def close(self) -> None:
        """Let go of files and memory."""


def line(error: BaseException) -> str:
    """The text of an error in one line; HDF5's have several. Without the page that a server sends with it."""
    return " ".join(re.sub(r" \[http_response_body='(?:[^'\\]|\\.)*'\]", "", str(error)).split())


class Hdf5(Source):
    """A data set of an HDF5 file; voxel size and offset are its attributes `resolution` and `offset`, as in CREMI.

    h5py lets one thread in at a time, and gets slower with more. Chunks that are only gzipped, as CREMI's are, are therefore
    inflated outside of it, on all processors; other voxels are read when they are asked for, in the thread that asks.
    """

    errors = (*HDF5_ERRORS, zlib.error)

    def __init__(self, path: Path, dataset: str):
        self._path, self.location = path, str(path)
        self._voxel_bytes = 0
        self._gzipped: Gzipped | None = None
        where = f"Volume {path}"
        try:
            self._file = h5py.File(path, "r", rdcc_nbytes=HDF5_CHUNK_CACHE_BYTES, rdcc_nslots=HDF5_CHUNK_CACHE_SLOTS)
        except OSError as error:
            raise SynpipeError(f"{where} is truncated or not an HDF5 file ({line(error)}): copy it again.") from None
        try:
            self._open(where, dataset)
        except HDF5_ERRORS as error:
            self.close()
            raise SynpipeError(f"{where} is damaged ({line(error)}): copy it again.") from None
        except SynpipeError:
            self.close()
            raise

    def _open(self, where: str, dataset: str) -> None:
        data = self._file.get(dataset)
        if not isinstance(data, h5py.Dataset):
            raise SynpipeError(
                f"{where} has no data set `{dataset}`; it has {', '.join(_datasets(self._file)) or 'none'}. Set "
                "`volume.dataset` in the data set's YAML file."
            )
        if data.shape is None or len(data.shape) != 3 or 0 in data.shape:
            raise SynpipeError(f"{where}: `{dataset}` has shape {data.shape}, but sections as (z, y, x) are needed.")
        self._data, self.shape_zyx, self.dtype = data, data.shape, data.dtype
        self.voxel_size_nm_zyx, self.offset_nm_zyx = data.attrs.get("resolution"), data.attrs.get("offset")
        chunk = data.chunks or CONTIGUOUS_BLOCK_ZYX
        self.chunking = Chunking(chunk, HDF5_CHUNK_CACHE_BYTES // (math.prod(chunk) * self.dtype.itemsize))
        self._gzipped = Gzipped(data, self.chunking) if _is_only_gzipped(data) else None

    @property
    def bytes_read(self) -> int:
        return self._voxel_bytes if self._gzipped is None else self._gzipped.bytes_read

    def start_read(self, box: Box) -> Callable[[], np.ndarray]:
        return partial(self._read, box) if self._gzipped is None else self._gzipped.start_read(box)

    def _read(self, box: Box) -> np.ndarray:
        values = self._data[box]
        self._voxel_bytes += values.nbytes
        return values

    def identity(self) -> dict[str, Any]:
        return {"content": file_sha256(self._path), "dataset": self._data.name}

    def close(self) -> None:
        if self._gzipped is not None:
            self._gzipped.close()
        self._file.close()


def _is_only_gzipped(data: h5py.Dataset) -> bool:
    settings = data.id.get_create_plist()
    filters = [settings.get_filter(number)[0] for number in range(settings.get_nfilters())]
    return data.chunks is not None and filters == [h5py.h5z.FILTER_DEFLATE]


class Gzipped:
    """Chunks of an HDF5 data set, inflated by several threads and kept. Safe to use from several threads."""

    def __init__(self, data: h5py.Dataset, chunking: Chunking):
        self._data, self._chunking = data, chunking
        self.bytes_read, self._counting = 0, Lock()
        self._threads = ThreadPoolExecutor(os.cpu_count(), "inflate")
        self._begun = lru_cache(maxsize=chunking.cached)(lambda chunk: self._threads.submit(self._inflated, chunk))

    def start_read(self, box: Box) -> Callable[[], np.ndarray]:
        axes = [list(_pieces(side, size)) for side, size in zip(box, self._chunking.shape_zyx, strict=True)]
        pieces = [tuple(zip(*piece, strict=True)) for piece in product(*axes)]
        begun = [self._begun(chunk) for chunk, _, _ in pieces]

        def finish() -> np.ndarray:
            values = np.empty([side.stop - side.start for side in box], self._data.dtype)
            for (_, there, here), inflated in zip(pieces, begun, strict=True):
                values[here] = inflated.result()[there]
            return values

        return finish

    def _inflated(self, chunk: Chunk) -> np.ndarray:
        shape, dtype = self._chunking.shape_zyx, self._data.dtype
        first = tuple(number * size for number, size in zip(chunk, shape, strict=True))
        if self._data.id.get_chunk_info_by_coord(first).byte_offset is None:  # never written
            return np.full(shape, self._data.fillvalue)
        unfiltered, content = self._data.id.read_direct_chunk(first)
        with self._counting:
            self.bytes_read += len(content)
        if not unfiltered:
            content = zlib.decompress(content, bufsize=math.prod(shape) * dtype.itemsize)
        return np.frombuffer(content, dtype).reshape(shape)

    def close(self) -> None:
        self._threads.shutdown(cancel_futures=True)
        self._begun.cache_clear()


def _pieces(side: slice, size: int) -> Iterator[tuple[int, slice, slice]]:
    """Numbers of the chunks of one axis that a box needs, with the voxels, counted in the chunk, and counted in the box."""
    for number in range(side.start // size, -(-side.stop // size)):
        low, high = max(number * size, side.start), min((number + 1) * size, side.stop)
        yield number, slice(low - number * size, high - number * size), slice(low - side.start, high - side.start)


def _datasets(file: h5py.File) -> list[str]:
    names: list[str] = []
    file.visititems(lambda name, item: names.append(name) if isinstance(item, h5py.Dataset) else None)
    return names


class Sections(Source):
    """A folder with a grey PNG or TIFF image per section, in the order of the last number of their names.

    The numbers must be consecutive, from any first one on: a gap would shift every section after it. Images say nothing
    about z, so that the voxel size is never read from them. Safe to use from several threads; a section that two of them
    want at once is decoded twice.
    """

    # Pillow raises SyntaxError of a PNG whose chunks are broken.
    errors = (OSError, SyntaxError, ValueError)

    def __init__(self, folder: Path):
        self._folder, self.location = folder, str(folder)
        for document, kind in CHUNKED_BY_DOCUMENT.items():
            if (folder / document).exists():
                raise SynpipeError(f"Volume {folder} holds `{document}`: set `volume.path: {kind}://{folder}`.")
        self._paths = _numbered(folder)
        try:
            with Image.open(self._paths[0]) as first:
                width, height = first.size
                self.dtype = _dtype(first, self._paths[0])
        except self.errors as error:
            raise SynpipeError(f"{self._paths[0]} cannot be read ({line(error)}): copy it again.") from None
        self.shape_zyx = (len(self._paths), height, width)
        # A decoded image serves all tiles of its section; at least those of two stacks are kept.
        kept = max(6, SECTION_CACHE_BYTES // (height * width * self.dtype.itemsize))
        self._section = lru_cache(maxsize=kept)(self._decode)
        self._bytes_read = 0
        self.chunking = Chunking((1, height, width), kept)

    def start_read(self, box: Box) -> Callable[[], np.ndarray]:
        z, y, x = box
        return lambda: np.stack([self._section(index)[y, x] for index in range(z.start, z.stop)])

    @property
    def bytes_read(self) -> int:
        return self._bytes_read

    def _decode(self, index: int) -> np.ndarray:
        path = self._paths[index]
        self._bytes_read += path.stat().st_size
        with Image.open(path) as image:
            dtype, shape = _dtype(image, path), (image.height, image.width)
            if (dtype, shape) != (self.dtype, self.shape_zyx[1:]):
                raise SynpipeError(
                    f"{path} is {dtype} of {shape} pixels, {self._paths[0].name} is {self.dtype} of "
                    f"{self.shape_zyx[1:]}: all sections of a volume must be alike."
                )
            return np.asarray(image)

    def identity(self) -> dict[str, Any]:
        return {"sections": folder_sha256(self._folder)}

    def close(self) -> None:
        self._section.cache_clear()


def _numbered(folder: Path) -> list[Path]:
    """The images of a folder in the order of their numbers."""
    images = [path for path in folder.iterdir() if path.suffix.lower() in SECTION_SUFFIXES]
    if not images:
        raise SynpipeError(
            f"Volume {folder} is a folder without PNG or TIFF sections, and not an HDF5 file: correct `volume.path` in "
            "the data set's YAML file."
        )
    found = []
    for path in images:
        numbers = re.findall(r"\d+", path.stem)
        if not numbers:
            raise SynpipeError(f"{path} has no number in its name: sections are put in the order of their numbers.")
        found.append((int(numbers[-1]), path))
    found.sort()
    for (number, path), (following, other) in pairwise(found):
        if following != number + 1:
            gap = "have the same number" if following == number else f"leave out section {number + 1}"
            raise SynpipeError(
                f"Volume {folder}: {path.name} and {other.name} {gap}. Every section needs an image of its own, a black "
                "one where it was lost."
            )
    return [path for _, path in found]


def _dtype(image: Image.Image, path: Path) -> np.dtype:
    dtypes = {"L": "u1", "I;16": "<u2", "I;16L": "<u2", "I;16B": ">u2", "F": "f4"}
    if image.mode not in dtypes or getattr(image, "n_frames", 1) != 1:
        raise SynpipeError(
            f"{path} is no single grey image of 8 or 16 bit or of floats (its mode is {image.mode}, its pages "
            f"{getattr(image, 'n_frames', 1)}): convert it, one section per file."
        )
    return np.dtype(dtypes[image.mode])
