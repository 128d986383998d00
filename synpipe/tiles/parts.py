"""A part of the tiles: an HDF5 file whose data set lies in it in one piece, so that rows are bytes at a known place.

In: the path of a part, local or on an object store. Out: rows of it. A local file is mapped into memory, which is fast from
several threads, unlike h5py; of an object only the bytes that are wanted are fetched, in few and parallel requests.

A part that is found to be damaged is marked by an empty file in a folder of their own, beside those of the recipes: what
is to be made anew is known by listing that, and not the hundred thousands of parts. The mark goes when it has been made.
"""

import io
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import h5py
import numpy as np

from synpipe.store.files import atomic_path
from synpipe.store.objects import BulkPath, ObjectPath, list_paths

MARKS = "suspect"  # the folder of the marks: `suspect/<recipe>/<part>` is that of `<recipe>/<part>.h5`

# HDF5 keeps all that it says of a part within its first two kilobytes.
HEAD_BYTES = 16_384
# A request of 6 MB costs hardly more than one of 200 kB, and several at once fill the network.
TILES_PER_REQUEST = 32
# Rows that nobody asked for are fetched along with their neighbours where that saves a request.
GAP_TILES = 2
REQUESTS_AT_ONCE = 8

_requests = ThreadPoolExecutor(REQUESTS_AT_ONCE, thread_name_prefix="tiles")


def mark_of(path: BulkPath) -> BulkPath:
    """The file that says by being there that tiles of this part are damaged, or were and have not been made again."""
    return path.parent.parent / MARKS / path.parent.name / path.stem


def mark_damaged(path: BulkPath) -> None:
    """Raises `SynpipeError` where the mark cannot be written."""
    with atomic_path(mark_of(path)) as temporary:
        temporary.touch()


def damaged_parts(folder: BulkPath) -> list[BulkPath]:
    """The parts that are marked, below the folders of all recipes; they need not be there any more."""
    return [folder / mark.parent.name / f"{mark.name}.h5" for mark in list_paths(folder / MARKS, "*/[!.]*")]


class Part(Protocol):
    def read(self, rows: np.ndarray, tiles: np.ndarray, places: np.ndarray) -> None:
        """Put rows (n,) of the part into `tiles`, uint8 (m, 3, 256, 256), at `places` (n,).

        Raises `IndexError` for a row that it does not have, and what the file, the disk or the network raise.
        """


def open_part(path: BulkPath) -> Part:
    """Raises what h5py raises of a damaged file, `OSError` where there is none."""
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
        head.detach()  # it would close the file

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
            size = int(np.prod(self._shape[1:]))
            content = self._path.read_at(self._file, (last - first + 1) * size, self._offset + first * size)
            found = np.frombuffer(content, np.uint8).reshape(-1, *self._shape[1:])  # shorter than asked for: ValueError
            tiles[places[run]] = found[rows[run] - first]

        list(_requests.map(fetch, runs))
