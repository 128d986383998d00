"""The asset `synapses`: a row per usable synapse in `synapses.parquet`; the unusable ones in `synapse_rejects.parquet`."""

from dataclasses import dataclass

import numpy as np

from synpipe.annotations.bounds import VolumeBounds
from synpipe.annotations.convert import AnnotationInputs, convert_annotations
from synpipe.annotations.schema import REJECT_SCHEMA, SYNAPSE_SCHEMA
from synpipe.assets.asset import Asset, Made, Task, View, always, no_leftovers, view_of_figures
from synpipe.assets.manifest import data_version_of, file_metadata
from synpipe.datasets import Dataset
from synpipe.store.files import table_writer
from synpipe.store.streams import column_of
from synpipe.volumes.volume import Volume

CODE_VERSION = "1"

COLUMNS = {
    "synapse_id": "Unique in the data set.",
    "x_nm": "Position in nanometres.",
    "y_nm": "Position in nanometres.",
    "z_nm": "Position in nanometres, across the sections.",
    "neuron_id": "The presynaptic neuron; empty if it is not known.",
    "hemilineage": "Hemilineage of that neuron.",
    "region": "Neuropil.",
    "neurotransmitter": "The annotated class; empty if it is not known.",
    "confidence": "Confidence of the detection, as the source gives it.",
    "source": "The annotation file.",
    "source_id": "Name or row of the synapse in that file.",
}
REJECT_COLUMNS = {
    **COLUMNS,
    "reason": "Why there is no tile; empty if there is one.",
    "detail": "The reason as a sentence.",
}


@dataclass(frozen=True)
class SynapsesFacts:
    """rejects: number of annotated synapses that cannot be used."""

    rejects: int


def make(task: Task) -> Made[SynapsesFacts]:
    """Convert the annotations, in bounded memory."""
    dataset = task.dataset
    with Volume(dataset.spec.volume, dataset.base) as volume:
        bounds, voxel_size = volume.bounds_nm_zyx, volume.voxel_size_nm_zyx
    # Only the bounds of the volume matter here; its pixels do not.
    version = data_version_of(
        "synapses",
        CODE_VERSION,
        {"annotations": task.inputs["annotations"]},
        [[corner.tolist() for corner in bounds], list(dataset.spec.classes)],
    )
    with (
        table_writer(dataset.synapses_path, SYNAPSE_SCHEMA, file_metadata(dataset, version, task.inputs)) as synapses,
        table_writer(dataset.synapse_rejects_path, REJECT_SCHEMA) as rejects,
    ):
        summary = convert_annotations(
            AnnotationInputs(
                dataset.spec.annotations, dataset.base, dataset.spec.classes, VolumeBounds(*bounds, voxel_size)
            ),
            synapses.write_table,
            rejects.write_table,
            scratch=dataset.folder,
        )
    task.log(f"{summary.synapses:,} synapses, {summary.rejects:,} rejects")
    for note in summary.notes:
        task.log(note)
    figures = {"rejects": summary.rejects, "classes": summary.classes}
    return Made(version, SynapsesFacts(summary.rejects), summary.synapses, figures, summary.notes)


def read_column(dataset: Dataset, synapse_ids: np.ndarray, name: str) -> np.ndarray:
    """A column for these synapses, whose ids ascend: object (n,) with None for null; the ids themselves for `synapse_id`."""
    return synapse_ids if name == "synapse_id" else column_of(dataset.synapses_path, synapse_ids, name)


SAMPLE_COLUMNS = ("synapse_id", "x_nm", "y_nm", "z_nm", "neuron_id", "neurotransmitter", "hemilineage", "region")

ASSET = Asset(
    name="synapses",
    per_encoder=False,
    exists=always,
    description="One row per usable synapse: position in nm, neuron, hemilineage, region, transmitter. Synapses that cannot be "
    "used are in `rejects`.",
    storage=frozenset({"parquet"}),
    facts=SynapsesFacts,
    reads=lambda dataset, encoder: ("volume", "annotations"),
    optional_reads=False,
    version_covers_reads=False,
    code_version=CODE_VERSION,
    still_valid=(),
    specs=lambda dataset, encoder: dataset.spec.classes,
    make=make,
    source_version=None,
    checks={},
    files=lambda dataset, encoder: (dataset.synapses_path, dataset.synapse_rejects_path),
    names_tiles=False,
    leftovers=no_leftovers,
    columns=REJECT_COLUMNS,
    table_columns=(),
    show=lambda dataset, encoder, manifest: View(view_of_figures(manifest), dataset.synapses_path, SAMPLE_COLUMNS),
)
