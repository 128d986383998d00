"""Opens an EM volume from its description, and reads sub-volumes by position in nanometres or in voxels.

Input: a `VolumeSpec`. Output: a `Volume` with its shape, voxel size and offset, and sub-volumes as uint8 arrays.
Guarantees: opening fails if the spec contradicts the volume; equal voxels give equal bytes, whatever format stores them.

Axis order is z, y, x everywhere. Voxel i of an axis covers [offset + i·size, offset + (i + 1)·size) nm. This is the
convention of CREMI (https://cremi.org/data/) and of neuroglancer's precomputed format.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Self

import numpy as np
from pydantic import FiniteFloat, field_validator, model_validator

from synpipe.addresses import refuse_credentials
from synpipe.errors import SynpipeError
from synpipe.specs import Spec, digest
from synpipe.volumes.kinds import PREFIXES, VolumePlace, open_reader
from synpipe.volumes.reader import EndlessAnswer, NothingStored, SlicesZyx, VoxelReader, describe_error, same_nm

# Voxel sizes such as 4.6 nm have no exact binary form, and positions often come as decimal text. A position that misses
# the edge of a voxel only by rounding belongs to that voxel. A millionth of a voxel is far below the precision of any
# position.
EDGE_TOLERANCE_VOXELS = 1e-6

REMOTE_SCHEMES = ("https", "http", "gs", "s3")
WINDOW_VERSION = 1  # raise it whenever `to_uint8` would give other grey values for the same window

ThreeNumbers = tuple[FiniteFloat, FiniteFloat, FiniteFloat]


class VolumeSpec(Spec):
    """Where an EM volume is, and how to read its voxels.

    path: an HDF5 file, a folder with a PNG or TIFF image per section, or a chunked volume. The path of a chunked volume is
        `precomputed://`, `n5://` or `zarr://` (version 2 or 3), followed by a local folder or by an address that begins
        with https://, http://, gs:// or s3://. Relative paths start at the folder of the YAML file.
    dataset: path of the data set in an HDF5 file. It is 3-D with axes z, y, x; its attributes `resolution` and `offset`
        are in nm.
    voxel_size_nm_zyx, offset_nm_zyx: required if the volume does not state them; otherwise they must agree with it. If a
        volume has several scales, the one with this voxel size is read.
    intensity_window: [low, high], the values that become black and white. Required for uint16 and floats; see `to_uint8`.
    """

    path: str
    dataset: str = "volumes/raw"
    voxel_size_nm_zyx: ThreeNumbers | None = None
    offset_nm_zyx: ThreeNumbers | None = None
    intensity_window: tuple[FiniteFloat, FiniteFloat] | None = None

    @field_validator("path")
    @classmethod
    def _has_a_known_prefix(cls, path: str) -> str:
        refuse_credentials(path)  # before the other messages, which repeat the path
        first, *rest = path.split("://")
        if rest and (first not in PREFIXES or len(rest) > 2 or (len(rest) == 2 and rest[0] not in REMOTE_SCHEMES)):
            prefixes, schemes = (" or ".join(f"{name}://" for name in names) for names in (PREFIXES, REMOTE_SCHEMES))
            raise ValueError(
                f"{path} should begin with {prefixes}, then a folder, or {schemes} and the rest of an address"
            )
        return path

    @model_validator(mode="after")
    def _makes_sense(self) -> Self:
        if self.intensity_window is not None and self.intensity_window[0] >= self.intensity_window[1]:
            raise ValueError("intensity_window should be [low, high] with low below high")
        if "dataset" in self.model_fields_set and self.kind is not None:
            raise ValueError("dataset is for HDF5 files; put the place within a chunked volume into its path")
        return self

    @property
    def kind(self) -> str | None:
        """The prefix of the path: `precomputed`, `n5` or `zarr`. None for a plain local file or folder."""
        kind, separator, _ = self.path.partition("://")
        return kind if separator else None

    @property
    def address(self) -> str:
        """The path without its prefix."""
        return self.path.partition("://")[2] if self.kind else self.path

    def resolve(self, base: Path) -> Path | None:
        """The local file or folder, with relative paths taken from `base`; None if the volume is on a network."""
        return None if "://" in self.address else (base / self.address).resolve()


class MissingChunk(SynpipeError):
    """The volume is intact but has no voxels at this place: the chunk was never stored, which differs from a black one."""


class VolumeUnusable(SynpipeError):
    """Something is wrong with the whole volume, so reading another chunk or trying again is pointless."""


class AccessDenied(VolumeUnusable):
    """Access is denied for the whole volume."""


def to_uint8(values: np.ndarray, window: tuple[float, float]) -> np.ndarray:
    """Grey values from an intensity window: floor(255·(v − low)/(high − low) + ½), with v clipped to the window.

    values: any real dtype, any shape. window: low and high. Returns uint8 of the same shape. Halves are rounded up. The
    result is exact for integers with an integer window. NaN counts as low, that is, as black.
    """
    low, high = window
    clipped = np.clip(np.where(np.isnan(values), low, values).astype(np.float64), low, high)
    return np.floor((clipped - low) * 255 / (high - low) + 0.5).astype(np.uint8)


class Volume:
    """An opened volume.

    Attributes: `path` (for messages), `shape_zyx` (voxels, int64 (3,)), `voxel_size_nm_zyx` and `offset_nm_zyx` (float64
    (3,)), `reader` (the `VoxelReader` that provides the voxels), and from the reader `chunking`, `dtype` (of the stored
    voxels), `voxel_bytes` (size of a stored voxel) and `scale_name`.
    """

    def __init__(self, spec: VolumeSpec, base: Path):
        """base: the folder where relative paths start.

        Raises `SynpipeError` if the volume is absent or damaged, does not hold grey values, or contradicts the spec.
        """
        place = VolumePlace(spec.resolve(base) or spec.address, spec.dataset, spec.voxel_size_nm_zyx)
        self.reader: VoxelReader = open_reader(spec.kind, place)
        self._window = spec.intensity_window
        self.path = self.reader.location
        try:
            self._describe(spec, f"Volume {self.path}")
        except SynpipeError:
            self.close()
            raise

    def _describe(self, spec: VolumeSpec, where: str) -> None:
        reader = self.reader
        windowed = reader.dtype.kind == "f" or (reader.dtype.kind, reader.dtype.itemsize) == ("u", 2)
        if reader.dtype != np.uint8 and not windowed:
            raise SynpipeError(f"{where} holds {reader.dtype}, but synpipe reads uint8, uint16 and floats: convert it.")
        if windowed and self._window is None:
            raise SynpipeError(
                f"{where} holds {reader.dtype}, but tiles have uint8 grey values. Set `volume.intensity_window: [low, "
                "high]` in the data set's YAML file, the values that become black and white."
            )
        if not windowed and self._window is not None:
            raise SynpipeError(f"{where} holds uint8, which is read as it is: remove `volume.intensity_window`.")
        self.shape_zyx = np.array(reader.shape_zyx, dtype=np.int64)
        self.chunking, self.voxel_bytes = reader.chunking, reader.dtype.itemsize
        self.dtype, self.scale_name = reader.dtype, reader.scale_name
        self.voxel_size_nm_zyx = _agreed(where, "voxel_size_nm_zyx", spec.voxel_size_nm_zyx, reader.voxel_size_nm_zyx)
        self.offset_nm_zyx = _agreed(
            where, "offset_nm_zyx", spec.offset_nm_zyx, reader.offset_nm_zyx, default=(0.0, 0.0, 0.0)
        )
        if not (self.voxel_size_nm_zyx > 0).all():
            raise SynpipeError(f"{where}: voxel size {self.voxel_size_nm_zyx.tolist()} nm is not positive.")

    @property
    def bytes_read(self) -> int:
        """Bytes read since the volume was opened, as they are stored."""
        return self.reader.bytes_read

    @property
    def bounds_nm_zyx(self) -> tuple[np.ndarray, np.ndarray]:
        """Lower corner (inside) and upper corner (outside) of the volume in nm: two float64 arrays (3,)."""
        return self.offset_nm_zyx, self.offset_nm_zyx + self.shape_zyx * self.voxel_size_nm_zyx

    def window_starts(self, positions_nm_zyx: np.ndarray, size_zyx: tuple[int, int, int]) -> np.ndarray:
        """First voxels of the windows of `size_zyx` voxels that are centred on positions.

        The window is the one whose centre is nearest to the position; if two are equally near, the upper one. A window of
        odd size has the voxel that contains the position in its middle. The centre of a window of even size is an edge
        between two voxels, at most half a voxel from the position, with no bias to either side.

        positions_nm_zyx: float64 (n, 3), finite. Returns int64 (n, 3) in voxels; values may be negative at the border.
        """
        voxels = (np.asarray(positions_nm_zyx, dtype=np.float64) - self.offset_nm_zyx) / self.voxel_size_nm_zyx
        return np.floor(voxels - np.array(size_zyx) / 2 + 0.5 + EDGE_TOLERANCE_VOXELS).astype(np.int64)

    def read(self, start_zyx: np.ndarray, stop_zyx: np.ndarray) -> np.ndarray:
        """The voxels from `start_zyx` (included) to `stop_zyx` (excluded), both within the volume: uint8 (z, y, x).

        Raises `MissingChunk` if the volume holds nothing there, `AccessDenied` if it may not be read, `VolumeUnusable` if its
        server sends without end, and `SynpipeError` if it is damaged or cannot be reached.
        """
        return self.start_read(start_zyx, stop_zyx)()

    def start_read(self, start_zyx: np.ndarray, stop_zyx: np.ndarray) -> Callable[[], np.ndarray]:
        """Begin a `read` in the background, so that several reads wait for a server at the same time.

        The returned function waits for the voxels. It returns and raises what `read` does.
        """
        z, y, x = (slice(int(a), int(b)) for a, b in zip(start_zyx, stop_zyx, strict=True))
        wait = self.reader.start_read((z, y, x))

        def finish() -> np.ndarray:
            try:
                values = wait()
            except self.reader.errors as error:
                raise self._explain(error, (z, y, x)) from None
            return values if self._window is None else to_uint8(values, self._window)

        return finish

    def _explain(self, error: Exception, box: SlicesZyx) -> SynpipeError:
        z, y, x = box
        place = f"voxels z {z.start}–{z.stop}, y {y.start}–{y.stop}, x {x.start}–{x.stop}"
        # tensorstore's messages begin with a status. Nothing else tells a missing chunk from a server out of reach.
        if isinstance(error, NothingStored) or str(error).startswith("NOT_FOUND"):
            return MissingChunk(f"Volume {self.path} holds nothing at {place} ({describe_error(error)}).")
        if isinstance(error, EndlessAnswer):
            return VolumeUnusable(
                f"Volume {self.path} cannot be read at {place} ({error}): ask whoever keeps its server."
            )
        if str(error).startswith("PERMISSION_DENIED"):
            return AccessDenied(
                f"Volume {self.path}: permission denied at {place} ({describe_error(error)}): ask whoever keeps it for "
                "access, or give the credentials that its bucket needs."
            )
        return SynpipeError(
            f"Volume {self.path} cannot be read at {place} ({describe_error(error)}): {self.reader.remedy}."
        )

    def fingerprint(self) -> str:
        """Digest of the volume's content and of how it is read.

        The fingerprint of a local volume changes whenever the value or the position of a voxel may have changed. The
        fingerprint of a remote volume covers its metadata only: their content, and the version (ETag) that the server
        reports.
        """
        described = self.reader.identity() | {
            "voxel_size_nm_zyx": self.voxel_size_nm_zyx.tolist(),
            "offset_nm_zyx": self.offset_nm_zyx.tolist(),
        }
        if self._window is not None:
            described["intensity_window"] = [WINDOW_VERSION, *self._window]
        return digest(described)

    def close(self) -> None:
        self.reader.close()

    def __enter__(self) -> "Volume":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _agreed(where: str, key: str, from_spec, from_file, default=None) -> np.ndarray:
    """The value on which spec and file agree, or the only one given, or the default: float64 (3,), finite.

    Raises `SynpipeError` if they contradict each other, if the file's value is not three numbers, or if there is none.
    """
    given = None if from_spec is None else np.asarray(from_spec, dtype=np.float64)
    read = None if from_file is None else _three_numbers(from_file)
    if from_file is not None and read is None:
        raise SynpipeError(f"{where} states {key} = {from_file}, but three finite numbers (z, y, x, in nm) are needed.")
    if given is not None and read is not None and not same_nm(given, read):
        raise SynpipeError(
            f"{where} states {key} = {read.tolist()}, but the data set's YAML file states {given.tolist()}: correct "
            f"`volume.{key}`, or remove it."
        )
    value = given if given is not None else read if read is not None else default
    if value is None:
        raise SynpipeError(f"{where} does not state its voxel size: set `volume.{key}` in the data set's YAML file.")
    return np.asarray(value, dtype=np.float64)


def _three_numbers(value) -> np.ndarray | None:
    try:
        numbers = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError):
        return None
    return numbers if numbers.shape == (3,) and np.isfinite(numbers).all() else None
