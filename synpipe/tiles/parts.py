"""Opens a part of tiles: an HDF5 file whose tiles lie in one contiguous piece, so that each row is at a known offset.

Input: the path of a part, local or on an object store. Output: rows of the part. A local file is mapped into memory, which
is fast from several threads, unlike h5py. From an object, only the wanted bytes are fetched, in a few parallel requests.

An empty file marks a part that was found to be damaged. All marks lie in one folder beside the folders of the recipes, so
listing this folder shows which parts must be made again. Listing hundreds of thousands of parts is not necessary. The mark
is removed when the tiles have been made again.
"""

import io
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import h5py
import numpy as np

from synpipe.store.files import atomic_path
from synpipe.store.objects import BulkPath, ObjectPath, list_paths

MARKS = "suspect"  # folder of the marks: `suspect/<recipe>/<part>` is the mark of `<recipe>/<part>.h5`

# HDF5 stores all metadata of a part within its first two kilobytes.
HEAD_BYTES = 16_384
# A request of 6 MB costs hardly more than one of 200 kB, and several requests at a time use the full network bandwidth.
TILES_PER_REQUEST = 32
# Up to this many unwanted rows between two wanted ones are fetched as well, because that saves a request.
GAP_TILES = 2
REQUESTS_IN_FLIGHT = 8

_requests = ThreadPoolExecutor(REQUESTS_IN_FLIGHT, thread_name_prefix="tiles")


def mark_of(path: BulkPath) -> BulkPath:
    """Path of the mark of a part. While the mark exists, the part's tiles are damaged or have not been made again."""
    return path.parent.parent / MARKS / path.parent.name / path.stem


def mark_damaged(path: BulkPath) -> None:
    """Mark a part as damaged. Raises `SynpipeError` if the mark cannot be written."""
    with atomic_path(mark_of(path)) as temporary:
        temporary.touch()


def damaged_parts(folder: BulkPath) -> list[BulkPath]:
    """The marked parts below the folders of all recipes. The files of these parts may no longer exist."""
    return [folder / mark.parent.name / f"{mark.name}.h5" for mark in list_paths(folder / MARKS, "*/[!.]*")]


class TilePart(Protocol):
    def read(self, rows: np.ndarray, tiles: np.ndarray, places: np.ndarray) -> None:
        """Copy `rows`, int (n,), of the part into `tiles`, uint8 (m, 3, 256, 256), at the indices `places`, int (n,).

        Raises `IndexError` if the part does not have a row, and the exceptions of the file, the disk or the network.
        """


def open_tile_part(path: BulkPath) -> TilePart:
    """Open a part. Raises `OSError` if it does not exist, and the exceptions of h5py if it is damaged."""
    return RemotePart(path) if isinstance(path, ObjectPath) else MappedPart(path)


class MappedPart:
    """A part in a local file."""

    def __init__(self, path: Path):
        with h5py.File(path, "r") as file:
            tiles = file["tiles"]
            self._tiles = (
                np.zeros(tiles.shape, np.uint8)
                if 0 in tiles.shape
                else np.memmap(path, np.uint8, "r", tiles.id.get_offset(), tiles.shape)
            )

    def read(self, rows: np.ndarray, tiles: np.ndarray, places: np.ndarray) -> None:
        for row, place in zip(rows.tolist(), places.tolist(), strict=True):
            tiles[place] = self._tiles[row]


class RemotePart:
    """A part on an object store."""

    def __init__(self, path: ObjectPath):
        self._path, self._file = path, path.open_random()
        head = io.BufferedReader(self._file, HEAD_BYTES)
        with h5py.File(head, "r") as file:
            self._shape, self._offset = file["tiles"].shape, file["tiles"].id.get_offset()
        head.detach()  # otherwise it would close the object

    def read(self, rows: np.ndarray, tiles: np.ndarray, places: np.ndarray) -> None:
        if len(rows) and not 0 <= rows.min() <= rows.max() < self._shape[0]:
            raise IndexError(f"the part has {self._shape[0]} rows")
        order = np.argsort(rows, kind="stable")
        cuts = np.flatnonzero(np.diff(rows[order]) > GAP_TILES) + 1
        runs = [
            run[first : first + TILES_PER_REQUEST]
            for run in np.split(order, cuts)
            for first in range(0, len(run), TILES_PER_REQUEST)
        ]

        def fetch(run: np.ndarray) -> None:
            first, last = int(rows[run[0]]), int(rows[run[-1]])
            tile_bytes = int(np.prod(self._shape[1:]))
            content = self._path.read_at(self._file, (last - first + 1) * tile_bytes, self._offset + first * tile_bytes)
            # If the object is shorter than expected, `reshape` or the index raises an error.
            fetched = np.frombuffer(content, np.uint8).reshape(-1, *self._shape[1:])
            tiles[places[run]] = fetched[rows[run] - first]

        list(_requests.map(fetch, runs))
