"""Defines `VoxelReader`, the interface that every kind of volume implements.

A reader gives access to the stored voxels in their own data type, and reports the metadata that the volume states about
itself. It does not check these metadata: `volume.Volume` compares them with the spec.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np

from synpipe.errors import one_line
from synpipe.volumes.chunk_plan import Chunking

# A spec and a file may state the same number once in float32 and once in float64. A larger difference is a contradiction:
# a relative error of 10⁻⁵ shifts positions by two voxels at the far end of a whole brain.
SAME_NUMBER_RTOL, SAME_NUMBER_ATOL_NM = 1e-7, 1e-6

SlicesZyx = tuple[slice, slice, slice]
"""The voxels of a sub-volume as slices along z, y and x. Start and stop are given and lie inside the volume."""


class NothingStored(Exception):
    """The volume is intact, but it holds no voxels at this place. A reader that raises it names it in `errors`."""


class EndlessAnswer(Exception):
    """A server sent more data than a volume's chunks can have. A reader that raises it names it in `errors`."""


class VoxelReader(ABC):
    """Reads the voxels of one volume. Axis order is z, y, x.

    Only one thread at a time may read, unless the subclass says otherwise.

    Attributes:
        errors: the exceptions that `start_read`, and the function that it returns, may raise.
        remedy: what a user should do after one of these exceptions.
        location: path or address of the volume, for messages.
        dtype, shape_zyx: data type of the stored voxels, and size of the volume in voxels.
        chunking: shape of the chunks, and how many decoded chunks the reader keeps in memory.
        scale_name: name of the array that is read; None if volumes of this kind have a single array.
        voxel_size_nm_zyx, offset_nm_zyx: as the volume states them, unchecked; None if it does not state them.
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
        """Bytes read since the volume was opened, as they are stored: compressed chunks count with their compressed size."""

    @abstractmethod
    def start_read(self, box: SlicesZyx) -> Callable[[], np.ndarray]:
        """Begin to read a sub-volume in the background, if this kind of volume gains by it.

        The returned function waits for the voxels, or reads them itself, and returns them as an array (z, y, x) of `dtype`.
        """

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """JSON-able data that change whenever a voxel may have changed. They enter the fingerprint of the volume."""

    @abstractmethod
    def close(self) -> None:
        """Release files and memory."""


def same_nm(first: Any, second: Any) -> bool:
    """Whether two voxel sizes, or two positions, in nm are meant to be the same."""
    return np.allclose(first, second, rtol=SAME_NUMBER_RTOL, atol=SAME_NUMBER_ATOL_NM)


def describe_error(error: BaseException) -> str:
    """The message of an exception in one line, without the web page that a server may have sent as its answer."""
    return re.sub(r" \[http_response_body='(?:[^'\\]|\\.)*'\]", "", one_line(error))
