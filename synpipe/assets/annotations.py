"""The asset `annotations`: the files that say where the synapses are."""

from dataclasses import dataclass
from pathlib import Path

from synpipe.assets.asset import Asset, Made, Task, View, always, no_files, no_leftovers, view_of_figures
from synpipe.assets.volume import FileStatus, status_of_files
from synpipe.datasets import Dataset
from synpipe.specs import digest
from synpipe.store.fingerprints import file_sha256


@dataclass(frozen=True)
class AnnotationsFacts:
    """files: status of the files when the fingerprint was taken. sha256_by_source: of each file, by source and path."""

    files: FileStatus
    sha256_by_source: dict[str, dict[str, str]]


def make(task: Task) -> Made[AnnotationsFacts]:
    """Take the fingerprint of the annotation files and of the way in which they are read."""
    files = _files(task.dataset)
    # The status comes first, so that an edit during the hashing counts as a change.
    file_status = status_of_files(files)
    hashes: dict[str, dict[str, str]] = {}
    for annotation in task.dataset.spec.annotations:
        own = {str(file): file_sha256(file) for file in annotation.files(task.dataset.base)}
        hashes.setdefault(annotation.name, {}).update(own)
    facts = AnnotationsFacts(file_status, hashes)
    return Made(_version(task.dataset), facts, figures={"paths": [str(file) for file in files]})


def source_version(dataset: Dataset, facts: AnnotationsFacts) -> str | None:
    """The version that the annotations have now, or None if no file was touched since."""
    return None if status_of_files(_files(dataset)) == facts.files else _version(dataset)


def _files(dataset: Dataset) -> list[Path]:
    return [file for annotation in dataset.spec.annotations for file in annotation.files(dataset.base)]


def _version(dataset: Dataset) -> str:
    return digest([annotation.fingerprint(dataset.base) for annotation in dataset.spec.annotations])


ASSET = Asset(
    name="annotations",
    per_encoder=False,
    exists=always,
    description="The files that say where the synapses are, and a fingerprint of their content.",
    storage=frozenset({"file"}),
    facts=AnnotationsFacts,
    # The generator of the demo writes its annotations together with its volume.
    reads=lambda dataset, encoder: ("volume",) if dataset.spec.synthetic else (),
    optional_reads=False,
    version_covers_reads=False,
    code_version="1",
    still_valid=(),
    specs=lambda dataset, encoder: dataset.spec.annotations,
    make=make,
    source_version=source_version,
    checks={},
    files=no_files,
    names_tiles=False,
    leftovers=no_leftovers,
    columns={},
    table_columns=(),
    show=lambda dataset, encoder, manifest: View(view_of_figures(manifest)),
)
