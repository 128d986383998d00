"""The asset `volume`: the EM volume that a data set reads, and its fingerprint."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from synpipe.analysis.pictures import draw_section
from synpipe.assets.asset import Asset, Made, Task, View, always, no_files, no_leftovers, view_of_figures
from synpipe.assets.manifest import Manifest
from synpipe.datasets import Dataset
from synpipe.errors import SynpipeError
from synpipe.store.files import remove_leftovers
from synpipe.store.fingerprints import size_and_status
from synpipe.synthetic.demo import make_demo
from synpipe.volumes.neuroglancer import Viewer, image_layer
from synpipe.volumes.volume import Volume

FileStatus = list[list[Any]]
"""Path, and what `fingerprints.size_and_status` says of it, for each file."""


@dataclass(frozen=True)
class VolumeFacts:
    """files: status of the volume's files when the fingerprint was taken. neuroglancer: the layer that shows the volume, or None
    if no browser can reach it."""

    path: str
    shape_zyx: tuple[int, int, int]
    voxel_size_nm_zyx: tuple[float, float, float]
    offset_nm_zyx: tuple[float, float, float]
    files: FileStatus
    neuroglancer: dict[str, Any] | None = None


def status_of_files(files: Iterable[Path]) -> FileStatus:
    """The status of each file or folder that exists. While it stays the same, the content is not read again.

    Stores of former versions hold another status, so their files are read again until their asset is materialised.
    """
    return [[str(file), *size_and_status(file)] for file in files if file.exists()]


def make(task: Task) -> Made[VolumeFacts]:
    """Open the volume and take its fingerprint; the demo's volume is generated first."""
    dataset = task.dataset
    for folder in {dataset.folder, dataset.bulk_folder}:
        remove_leftovers(folder)
    if dataset.spec.synthetic is not None:
        make_demo(dataset.base, dataset.spec.synthetic, task.log)
    # The status comes first, so that a change during the hashing counts as one.
    file_status = status_of_files(dataset.volume_files())
    with Volume(dataset.spec.volume, dataset.base) as volume:
        facts = VolumeFacts(
            path=volume.path,
            shape_zyx=tuple(volume.shape_zyx.tolist()),
            voxel_size_nm_zyx=tuple(volume.voxel_size_nm_zyx.tolist()),
            offset_nm_zyx=tuple(volume.offset_nm_zyx.tolist()),
            files=file_status,
            neuroglancer=image_layer(dataset.spec.volume, volume),
        )
        figures = {name: getattr(facts, name) for name in ("path", "shape_zyx", "voxel_size_nm_zyx", "offset_nm_zyx")}
        return Made(volume.fingerprint(), facts, figures=figures)


def source_version(dataset: Dataset, facts: VolumeFacts) -> str | None:
    """The version that the volume has now, or None if its file was not touched since.

    A volume behind an address is not asked: the state of a data set is told at once, and offline.
    """
    if status_of_files(dataset.volume_files()) == facts.files:
        return None
    with Volume(dataset.spec.volume, dataset.base) as volume:
        return volume.fingerprint()


def find_viewer(dataset: Dataset) -> Viewer | None:
    """The Neuroglancer viewer of the volume as it was last opened, or None if the volume has no link."""
    facts = ASSET.find(dataset)
    if facts is None or facts.neuroglancer is None:
        return None
    return Viewer(dataset.spec.neuroglancer, facts.neuroglancer, facts.voxel_size_nm_zyx)


def show(dataset: Dataset, _encoder: str, manifest: Manifest) -> View:
    with Volume(dataset.spec.volume, dataset.base) as volume:
        try:
            picture = {"middle_section": draw_section(volume)}
        except SynpipeError:
            picture = {}  # Nothing is stored there, or its server fails just now: the other assets can still be made.
    return View(picture | view_of_figures(manifest))


ASSET = Asset(
    name="volume",
    per_encoder=False,
    exists=always,
    description="The EM volume: its size, voxel size and fingerprint. synpipe reads it and never changes it.",
    storage=frozenset({"hdf5"}),
    facts=VolumeFacts,
    reads=lambda dataset, encoder: (),
    optional_reads=False,
    version_covers_reads=True,
    code_version="2",
    still_valid=(),
    specs=lambda dataset, encoder: [dataset.spec.volume, dataset.spec.synthetic],
    make=make,
    source_version=source_version,
    checks={},
    files=no_files,
    names_tiles=False,
    leftovers=no_leftovers,
    columns={},
    table_columns=(),
    show=show,
)
