"""EM volumes: a description becomes an opened volume that answers in nanometres and in voxels.

In: a `VolumeSpec`. Out: a `Volume` with its shape, voxel size and offset, and sub-volumes of it as uint8 arrays.
Guarantee: what the spec says about the volume agrees with the file, or opening it fails.

Axis order is z, y, x everywhere. Voxel i of an axis covers [offset + i·size, offset + (i + 1)·size) nm, the convention
of CREMI (https://cremi.org/data/) and of neuroglancer's precomputed format.
"""

import hashlib
from functools import lru_cache
from pathlib import Path

import h5py
import numpy as np
from pydantic import FiniteFloat

from synpipe.errors import SynpipeError
from synpipe.specs import Spec, digest

# Coordinates come as decimals (4.6 nm voxels) and as text: a point that stands on a voxel's edge but for the last bits
# belongs to that voxel. A millionth of a voxel is far below any position's precision.
EDGE_TOLERANCE_VOXELS = 1e-6

# The default of 1 MiB makes every cut-out decode its chunks again; 128 MiB keeps a row of chunks of a common volume.
HDF5_CHUNK_CACHE_BYTES = 128 * 2**20

# What h5py raises of a damaged file, as flipping every byte of one has shown.
HDF5_ERRORS = (OSError, RuntimeError, KeyError, ValueError)

# Spec and file may say the same number in float32 and in float64, but no more: 10⁻⁵ is two voxels of a whole brain.
SAME_NUMBER_RTOL, SAME_NUMBER_ATOL_NM = 1e-7, 1e-6


class VolumeSpec(Spec):
    """Where an EM volume is: an HDF5 file in CREMI layout (`dataset` with attributes `resolution` and `offset`, in nm).

    path: the file; a relative path starts at the folder of the YAML file.
    dataset: path of the 3-D uint8 data set, axes z, y, x.
    voxel_size_nm_zyx, offset_nm_zyx: needed only where the file does not say them; they must agree where it does.
    """

    path: str
    dataset: str = "volumes/raw"
    voxel_size_nm_zyx: tuple[FiniteFloat, FiniteFloat, FiniteFloat] | None = None
    offset_nm_zyx: tuple[FiniteFloat, FiniteFloat, FiniteFloat] | None = None

    def resolve(self, base: Path) -> Path:
        return (base / self.path).resolve()


class Volume:
    """An opened volume.

    Attributes: `shape_zyx` (voxels), `voxel_size_nm_zyx`, `offset_nm_zyx` (float64 arrays of 3).
    """

    def __init__(self, spec: VolumeSpec, base: Path):
        """Raises `SynpipeError` where the file is absent, damaged, not uint8, or contradicts the spec."""
        self.path = spec.resolve(base)
        where = f"Volume {self.path}"
        if not self.path.exists():
            raise SynpipeError(f"{where} does not exist: correct `volume.path` in the data set's YAML file.")
        try:
            self._file = h5py.File(self.path, "r", rdcc_nbytes=HDF5_CHUNK_CACHE_BYTES)
        except OSError as error:
            raise SynpipeError(f"{where} is truncated or not an HDF5 file ({_line(error)}): copy it again.") from None
        try:
            self._describe(spec, where)
        except HDF5_ERRORS as error:
            self.close()
            raise SynpipeError(f"{where} is damaged ({_line(error)}): copy it again.") from None
        except SynpipeError:
            self.close()
            raise

    def _describe(self, spec: VolumeSpec, where: str) -> None:
        data = self._file.get(spec.dataset)
        if not isinstance(data, h5py.Dataset):
            raise SynpipeError(
                f"{where} has no data set `{spec.dataset}`; it has {', '.join(_datasets(self._file)) or 'none'}. Set "
                "`volume.dataset` in the data set's YAML file."
            )
        if data.shape is None or len(data.shape) != 3 or 0 in data.shape:
            raise SynpipeError(
                f"{where}: `{spec.dataset}` has shape {data.shape}, but sections as (z, y, x) are needed."
            )
        if data.dtype != np.uint8:
            raise SynpipeError(
                f"{where}: `{spec.dataset}` holds {data.dtype}, but synpipe reads uint8 grey values. Convert it with a "
                "stated intensity window first."
            )
        self._data = data
        self.shape_zyx = np.array(data.shape, dtype=np.int64)
        self.voxel_size_nm_zyx = _agreed(
            where, "voxel_size_nm_zyx", spec.voxel_size_nm_zyx, data.attrs.get("resolution")
        )
        self.offset_nm_zyx = _agreed(
            where, "offset_nm_zyx", spec.offset_nm_zyx, data.attrs.get("offset"), default=(0.0, 0.0, 0.0)
        )
        if not (self.voxel_size_nm_zyx > 0).all():
            raise SynpipeError(f"{where}: voxel size {self.voxel_size_nm_zyx.tolist()} nm is not positive.")

    @property
    def bounds_nm_zyx(self) -> tuple[np.ndarray, np.ndarray]:
        """Lower (inside) and upper (outside) corner of the volume, float64 arrays of 3."""
        return self.offset_nm_zyx, self.offset_nm_zyx + self.shape_zyx * self.voxel_size_nm_zyx

    def window_starts(self, positions_nm_zyx: np.ndarray, size_zyx: tuple[int, int, int]) -> np.ndarray:
        """First voxels of the windows of `size_zyx` voxels that are centred on positions.

        The window is the one whose centre is nearest to the position; of two equally near ones, the upper. For an odd
        size that puts the voxel which contains the position in the middle; for an even size the centre of the window is
        an edge between two voxels, at most half a voxel from the position, with no bias to either side.

        positions_nm_zyx: float64 (n, 3), finite. Returns int64 (n, 3), in voxels; may be negative at the border.
        """
        voxels = (np.asarray(positions_nm_zyx, dtype=np.float64) - self.offset_nm_zyx) / self.voxel_size_nm_zyx
        return np.floor(voxels - np.array(size_zyx) / 2 + 0.5 + EDGE_TOLERANCE_VOXELS).astype(np.int64)

    def read(self, start_zyx: np.ndarray, stop_zyx: np.ndarray) -> np.ndarray:
        """The voxels from `start_zyx` up to `stop_zyx`, both within the volume: uint8 (z, y, x).

        Raises `SynpipeError` where the file is damaged there.
        """
        z, y, x = (slice(int(a), int(b)) for a, b in zip(start_zyx, stop_zyx, strict=True))
        try:
            return self._data[z, y, x]
        except HDF5_ERRORS as error:
            raise SynpipeError(
                f"Volume {self.path} cannot be read at voxels z {z.start}–{z.stop}, y {y.start}–{y.stop}, "
                f"x {x.start}–{x.stop} ({_line(error)}): the file is truncated or damaged, copy it again."
            ) from None

    def fingerprint(self) -> str:
        """Digest of the content of the file and of how it is read: changes exactly when a voxel's value or place may."""
        return digest(
            {
                "content": file_sha256(self.path),
                "dataset": self._data.name,
                "voxel_size_nm_zyx": self.voxel_size_nm_zyx.tolist(),
                "offset_nm_zyx": self.offset_nm_zyx.tolist(),
            }
        )

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> "Volume":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's content, read again only when its size, its times or its inode changed."""
    status = path.stat()
    return _file_sha256(path, (status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino))


@lru_cache(maxsize=256)
def _file_sha256(path: Path, _status: tuple[int, ...]) -> str:
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _datasets(file: h5py.File) -> list[str]:
    names: list[str] = []
    file.visititems(lambda name, item: names.append(name) if isinstance(item, h5py.Dataset) else None)
    return names


def _line(error: BaseException) -> str:
    """The text of an error in one line; HDF5's have several."""
    return " ".join(str(error).split())


def _agreed(where: str, key: str, from_spec, from_file, default=None) -> np.ndarray:
    """The value that spec and file agree on, or the one that is there: float64 (3,), finite."""
    given = None if from_spec is None else np.asarray(from_spec, dtype=np.float64)
    read = None if from_file is None else _three_numbers(from_file)
    if from_file is not None and read is None:
        raise SynpipeError(f"{where} says {key} = {from_file}, but three finite numbers, z, y, x, in nm, are needed.")
    if (
        given is not None
        and read is not None
        and not np.allclose(given, read, rtol=SAME_NUMBER_RTOL, atol=SAME_NUMBER_ATOL_NM)
    ):
        raise SynpipeError(f"{where} says {key} = {read.tolist()}, the data set's YAML file says {given.tolist()}.")
    value = given if given is not None else read if read is not None else default
    if value is None:
        raise SynpipeError(f"{where} does not say its voxel size: set `volume.{key}` in the data set's YAML file.")
    return np.asarray(value, dtype=np.float64)


def _three_numbers(value) -> np.ndarray | None:
    try:
        numbers = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError):
        return None
    return numbers if numbers.shape == (3,) and np.isfinite(numbers).all() else None
