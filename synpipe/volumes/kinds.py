"""Lists the kinds of volumes and opens the one that a path names.

This is the only module that knows all kinds. To add a kind, write a module with a `VoxelReader`, or with a
`ChunkedFormat` if tensorstore has a driver for it, and add an entry to `KINDS`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from synpipe.errors import SynpipeError
from synpipe.volumes.hdf5 import Hdf5Reader
from synpipe.volumes.n5 import N5
from synpipe.volumes.precomputed import PRECOMPUTED
from synpipe.volumes.reader import VoxelReader
from synpipe.volumes.scales import ChunkedFormat
from synpipe.volumes.sections import SUFFIXES, SectionsReader, refuse_image
from synpipe.volumes.zarr import ZARR


@dataclass(frozen=True)
class VolumePlace:
    """Where a volume is, and which of its arrays to read.

    path: local file or folder, or an address such as `https://…`. dataset: path of the data set in an HDF5 file.
    voxel_size_nm_zyx: voxel size of the scale to read; None if the spec does not give one.
    """

    path: Path | str
    dataset: str
    voxel_size_nm_zyx: tuple[float, float, float] | None


@dataclass(frozen=True)
class VolumeKind:
    """One way to store a volume.

    prefix: what `volume.path` begins with, before `://`; None for a kind that is recognised by the local path alone.
    matches: whether a local path without prefix is of this kind; False for all paths if there is a prefix.
    documents: names of files that a folder of this kind contains, and no folder of images does.
    """

    prefix: str | None
    open: Callable[[VolumePlace], VoxelReader]
    matches: Callable[[Path], bool] = lambda path: False
    documents: tuple[str, ...] = ()


def _chunked(format: ChunkedFormat, *documents: str) -> VolumeKind:
    def open_chunked(place: VolumePlace) -> VoxelReader:
        # tensorstore reads its settings from the environment when it is imported, so only the process that reads a
        # chunked volume imports it.
        from synpipe.volumes.chunked import ChunkedReader

        return ChunkedReader(format, place.path, place.voxel_size_nm_zyx)

    return VolumeKind(format.name, open_chunked, documents=documents)


def _open_sections(place: VolumePlace) -> VoxelReader:
    folder = Path(place.path)
    for kind in KINDS:
        for document in kind.documents:
            if (folder / document).exists():
                raise SynpipeError(f"Volume {folder} holds `{document}`: set `volume.path: {kind.prefix}://{folder}`.")
    return SectionsReader(folder)


def _open_image(place: VolumePlace) -> VoxelReader:
    refuse_image(Path(place.path))


def _open_hdf5(place: VolumePlace) -> VoxelReader:
    return Hdf5Reader(Path(place.path), place.dataset)


# The first kind that matches a path without prefix opens it.
KINDS = (
    _chunked(PRECOMPUTED, "info"),
    _chunked(N5, "attributes.json"),
    _chunked(ZARR, "zarr.json", ".zarray"),
    VolumeKind(None, _open_sections, matches=Path.is_dir),
    VolumeKind(None, _open_image, matches=lambda path: path.suffix.lower() in SUFFIXES),
    VolumeKind(None, _open_hdf5, matches=lambda path: True),
)
PREFIXES = tuple(kind.prefix for kind in KINDS if kind.prefix is not None)


def open_reader(prefix: str | None, place: VolumePlace) -> VoxelReader:
    """Open a volume. prefix: the kind that `volume.path` names; None to recognise the kind by the local path.

    Raises `SynpipeError` if the volume is absent, damaged or not of that kind.
    """
    if isinstance(place.path, Path) and not place.path.exists():
        raise SynpipeError(f"Volume {place.path} does not exist: correct `volume.path` in the data set's YAML file.")
    for kind in KINDS:
        if kind.prefix == prefix and (prefix is not None or kind.matches(Path(place.path))):
            return kind.open(place)
    raise AssertionError(f"no kind of volume fits {prefix}, {place.path}")  # the spec admits known prefixes only
