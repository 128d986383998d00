"""The format `synister_v3`: the three JSON files that funkelab/synister exports."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from synpipe.annotations.json_files import (
    Row,
    build_table,
    is_unicode,
    read_object,
    read_records,
    to_names,
    to_text,
    unreadable_row,
)
from synpipe.annotations.source import AnnotationSource, Rows

Records = dict[str | None, dict[str, Any]]


class SynisterV3(AnnotationSource):
    """The three JSON files of funkelab/synister's export (Eckstein et al., Cell 2024); positions are in nm.

    A synapse is labelled with the known transmitter of its neuron. If a neuron has several transmitters, its synapses
    are unlabelled. If a synapse lies in several brain regions, their names are joined with `+`.
    """

    format: Literal["synister_v3"]
    synapses: str
    skeletons: str
    hemi_lineages: str

    def _file_names(self) -> tuple[str, ...]:
        return self.synapses, self.skeletons, self.hemi_lineages

    def read(self, base: Path) -> Iterator[Rows]:
        synapses_file, skeletons_file, lineages_file = self.files(base)
        skeletons, lineages = read_records(skeletons_file), read_records(lineages_file)
        rows: list[Row] = []
        ambiguous: dict[str | None, list[str]] = {}  # transmitters of the neurons that have several
        unlisted = set()
        for synapse_id, entry in read_object(synapses_file):
            row, transmitters = _read_entry(synapse_id, entry, skeletons, lineages)
            neuron_id = row["neuron_id"]
            if not is_unicode([*row.values(), *transmitters]):
                row = unreadable_row(synapse_id)
            elif len(transmitters) > 1:
                ambiguous[neuron_id] = transmitters
            elif neuron_id is not None and neuron_id not in skeletons:
                unlisted.add(neuron_id)
            rows.append(row)
        notes = [
            f"Neuron {neuron_id} has several transmitters ({', '.join(names)}); its synapses are kept as unlabelled."
            for neuron_id, names in ambiguous.items()
        ]
        if unlisted:
            notes.append(
                f"{len(unlisted):,} neurons of {synapses_file.name}, such as {min(unlisted)}, are not in "
                f"{skeletons_file.name}; their synapses are kept as unlabelled."
            )
        yield Rows(synapses_file, "entry", build_table(rows), tuple(notes))


def _read_entry(synapse_id: str, entry: Any, skeletons: Records, lineages: Records) -> tuple[Row, list[str]]:
    """Return the row of one entry of the synapse file, and the known transmitters of its neuron."""
    synapse = dict(entry) if isinstance(entry, tuple) else {}
    neuron_id = to_text(synapse.get("skeleton_id"))
    skeleton = skeletons.get(neuron_id, {})
    lineage = lineages.get(to_text(skeleton.get("hemi_lineage_id")), {})
    transmitters = to_names(skeleton.get("nt_known"))
    row = {
        "synapse_id": synapse_id,
        **{axis: to_text(synapse.get(axis)) for axis in "xyz"},
        "neuron_id": neuron_id,
        "hemilineage": to_text(lineage.get("hemi_lineage_name")),
        "region": "+".join(to_names(synapse.get("brain_region"))),
        "neurotransmitter": transmitters[0] if len(transmitters) == 1 else None,
        "problem": None if isinstance(entry, tuple) else "it is not an object with x, y and z",
    }
    return row, transmitters
