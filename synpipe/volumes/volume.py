"""EM volumes: a description becomes an opened volume that answers in nanometres and in voxels.

In: a `VolumeSpec`. Out: a `Volume` with its shape, voxel size and offset, and sub-volumes of it as uint8 arrays.
Guarantee: what the spec says about the volume agrees with the volume itself, or opening it fails; the same voxels are
the same bytes whatever they are stored in.

Axis order is z, y, x everywhere. Voxel i of an axis covers [offset + i·size, offset + (i + 1)·size) nm, the convention
of CREMI (https://cremi.org/data/) and of neuroglancer's precomputed format.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import numpy as np
from pydantic import FiniteFloat, field_validator, model_validator

from synpipe.errors import SynpipeError
from synpipe.specs import Spec, digest
from synpipe.volumes.local import Hdf5, Sections, Source, line

# Coordinates come as decimals (4.6 nm voxels) and as text: a point that stands on a voxel's edge but for the last bits
# belongs to that voxel. A millionth of a voxel is far below any position's precision.
EDGE_TOLERANCE_VOXELS = 1e-6

# Spec and file may say the same number in float32 and in float64, but no more: 10⁻⁵ is two voxels of a whole brain.
SAME_NUMBER_RTOL, SAME_NUMBER_ATOL_NM = 1e-7, 1e-6

CHUNKED = ("precomputed", "n5", "zarr")
REMOTE = ("https", "http", "gs", "s3")
WINDOW_VERSION = 1  # raise it whenever `to_uint8` would make other grey values of the same window

ThreeNumbers = tuple[FiniteFloat, FiniteFloat, FiniteFloat]


class VolumeSpec(Spec):
    """Where an EM volume is and how its voxels are read.

    path: an HDF5 file; or a folder with a PNG or TIFF image per section; or a chunked volume, `precomputed://`, `n5://` or
    `zarr://` (version 2 or 3) before a local folder or an address that begins with https://, http://, gs:// or s3://. A
    relative path starts at the folder of the YAML file.
    dataset: path of the data set in an HDF5 file, 3-D with axes z, y, x; `resolution` and `offset` (nm) are its attributes.
    voxel_size_nm_zyx, offset_nm_zyx: needed where the volume does not say them; they must agree where it does. Of a volume
    with several scales, the one with this voxel size is read.
    intensity_window: [low, high], the values that become black and white; needed for uint16 and floats. See `to_uint8`.
    """

    path: str
    dataset: str = "volumes/raw"
    voxel_size_nm_zyx: ThreeNumbers | None = None
    offset_nm_zyx: ThreeNumbers | None = None
    intensity_window: tuple[FiniteFloat, FiniteFloat] | None = None

    @field_validator("path")
    @classmethod
    def _is_of_a_known_kind(cls, path: str) -> str:
        first, *more = path.split("://")
        if more and (first not in CHUNKED or len(more) > 2 or (len(more) == 2 and more[0] not in REMOTE)):
            kinds, remotes = (" or ".join(f"{name}://" for name in names) for names in (CHUNKED, REMOTE))
            raise ValueError(
                f"{path} should begin with {kinds}, then a folder, or {remotes} and the rest of an address"
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
        """`precomputed`, `n5` or `zarr`; None for plain local files."""
        kind, separator, _ = self.path.partition("://")
        return kind if separator else None

    @property
    def address(self) -> str:
        """The path without its kind."""
        return self.path.partition("://")[2] if self.kind else self.path

    def resolve(self, base: Path) -> Path | None:
        """The local file or folder, relative paths taken from `base`; None for what is reached over a network."""
        return None if "://" in self.address else (base / self.address).resolve()


class MissingChunk(SynpipeError):
    """The volume is sound, but holds no voxels at this place: it was never stored there, which is not the same as black."""


class AccessDenied(SynpipeError):
    """Whoever keeps the volume refuses to give it out: a chunk more or less is not the question, and no attempt helps."""


def to_uint8(values: np.ndarray, window: tuple[float, float]) -> np.ndarray:
    """Grey values from an intensity window: floor(255·(v − low)/(high − low) + ½), with v clipped to the window.

    That rounds halves up, and is exact for integers with an integer window. NaN counts as low, that is, as black.
    """
    low, high = window
    inside = np.clip(np.where(np.isnan(values), low, values).astype(np.float64), low, high)
    return np.floor((inside - low) * 255 / (high - low) + 0.5).astype(np.uint8)


class Volume:
    """An opened volume.

    Attributes: `path` (for people), `shape_zyx` (voxels), `voxel_size_nm_zyx`, `offset_nm_zyx` (float64 arrays of 3),
    `chunking` (how it is stored), `voxel_bytes`, `dtype` (as it is stored), `scale_name` (see `Source`).
    """

    def __init__(self, spec: VolumeSpec, base: Path):
        """Raises `SynpipeError` where it is absent, damaged, not of grey values, or contradicts the spec."""
        self._source = _open(spec, base)
        self._window = spec.intensity_window
        self.path = self._source.location
        try:
            self._describe(spec, f"Volume {self.path}")
        except SynpipeError:
            self.close()
            raise

    def _describe(self, spec: VolumeSpec, where: str) -> None:
        source = self._source
        windowed = source.dtype.kind == "f" or (source.dtype.kind, source.dtype.itemsize) == ("u", 2)
        if source.dtype != np.uint8 and not windowed:
            raise SynpipeError(f"{where} holds {source.dtype}, but synpipe reads uint8, uint16 and floats: convert it.")
        if windowed and self._window is None:
            raise SynpipeError(
                f"{where} holds {source.dtype}, but tiles have uint8 grey values. Set `volume.intensity_window: [low, "
                "high]` in the data set's YAML file, the values that become black and white."
            )
        if not windowed and self._window is not None:
            raise SynpipeError(f"{where} holds uint8, which is read as it is: remove `volume.intensity_window`.")
        self.shape_zyx = np.array(source.shape_zyx, dtype=np.int64)
        self.chunking, self.voxel_bytes = source.chunking, source.dtype.itemsize
        self.dtype, self.scale_name = source.dtype, source.scale_name
        self.voxel_size_nm_zyx = _agreed(where, "voxel_size_nm_zyx", spec.voxel_size_nm_zyx, source.voxel_size_nm_zyx)
        self.offset_nm_zyx = _agreed(
            where, "offset_nm_zyx", spec.offset_nm_zyx, source.offset_nm_zyx, default=(0.0, 0.0, 0.0)
        )
        if not (self.voxel_size_nm_zyx > 0).all():
            raise SynpipeError(f"{where}: voxel size {self.voxel_size_nm_zyx.tolist()} nm is not positive.")

    @property
    def source(self) -> Source:
        """What the voxels come from, with what it says of itself."""
        return self._source

    @property
    def bytes_read(self) -> int:
        """What has been read since it was opened, as it is stored."""
        return self._source.bytes_read

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

        Raises `MissingChunk` where the volume holds nothing there, `AccessDenied` where it may not be read, `SynpipeError`
        where it is damaged or out of reach.
        """
        return self.start_read(start_zyx, stop_zyx)()

    def start_read(self, start_zyx: np.ndarray, stop_zyx: np.ndarray) -> Callable[[], np.ndarray]:
        """Begin to `read`, so that several reads wait for a server together.

        The function returned waits for the voxels; it returns and raises what `read` does.
        """
        z, y, x = (slice(int(a), int(b)) for a, b in zip(start_zyx, stop_zyx, strict=True))
        wait = self._source.start_read((z, y, x))

        def finish() -> np.ndarray:
            try:
                values = wait()
            except self._source.errors as error:
                place = f"voxels z {z.start}–{z.stop}, y {y.start}–{y.stop}, x {x.start}–{x.stop}"
                # The status with which tensorstore's messages begin: the one thing that tells absent from out of reach.
                if str(error).startswith("NOT_FOUND"):
                    raise MissingChunk(f"Volume {self.path} holds nothing at {place} ({line(error)}).") from None
                if str(error).startswith("PERMISSION_DENIED"):
                    raise AccessDenied(
                        f"Volume {self.path}: permission denied at {place} ({line(error)}): ask whoever keeps it for "
                        "access, or give the credentials that its bucket needs."
                    ) from None
                raise SynpipeError(
                    f"Volume {self.path} cannot be read at {place} ({line(error)}): {self._source.remedy}."
                ) from None
            return values if self._window is None else to_uint8(values, self._window)

        return finish

    def fingerprint(self) -> str:
        """Digest of the content and of how it is read.

        Of local files it changes whenever a voxel's value or place may. Of remote ones only the metadata are looked at:
        their content, and the version (ETag) that the server gives them.
        """
        described = self._source.identity() | {
            "voxel_size_nm_zyx": self.voxel_size_nm_zyx.tolist(),
            "offset_nm_zyx": self.offset_nm_zyx.tolist(),
        }
        if self._window is not None:
            described["intensity_window"] = [WINDOW_VERSION, *self._window]
        return digest(described)

    def close(self) -> None:
        self._source.close()

    def __enter__(self) -> "Volume":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def same_numbers(first: Any, second: Any) -> bool:
    """Whether two voxel sizes or places, in nm, are meant to be the same."""
    return np.allclose(first, second, rtol=SAME_NUMBER_RTOL, atol=SAME_NUMBER_ATOL_NM)


def _open(spec: VolumeSpec, base: Path) -> Source:
    path = spec.resolve(base)
    if path is not None and not path.exists():
        raise SynpipeError(f"Volume {path} does not exist: correct `volume.path` in the data set's YAML file.")
    if spec.kind is not None:
        # Only here: it sets how tensorstore behaves, which is to be decided where it is used.
        from synpipe.volumes.chunked import open_chunked

        return open_chunked(spec.kind, spec.address if path is None else path, spec.voxel_size_nm_zyx)
    assert path is not None  # the spec lets no address pass that does not say its kind
    if path.is_dir():
        return Sections(path)
    return Hdf5(path, spec.dataset)


def _agreed(where: str, key: str, from_spec, from_file, default=None) -> np.ndarray:
    """The value that spec and file agree on, or the one that is there: float64 (3,), finite."""
    given = None if from_spec is None else np.asarray(from_spec, dtype=np.float64)
    read = None if from_file is None else _three_numbers(from_file)
    if from_file is not None and read is None:
        raise SynpipeError(f"{where} says {key} = {from_file}, but three finite numbers, z, y, x, in nm, are needed.")
    if given is not None and read is not None and not same_numbers(given, read):
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
