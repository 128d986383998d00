"""Read annotations into memory, which no product code needs: the pipeline writes them to files, part by part."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from synpipe.annotations.bounds import VolumeBounds
from synpipe.annotations.convert import AnnotationInputs, convert_annotations
from synpipe.annotations.schema import REJECT_SCHEMA, SYNAPSE_SCHEMA
from synpipe.annotations.source import AnnotationSource


@dataclass(frozen=True)
class Annotations:
    """synapses: `SYNAPSE_SCHEMA`, sorted by id. rejects: `REJECT_SCHEMA`. notes: sentences for the user."""

    synapses: pa.Table
    rejects: pa.Table
    notes: list[str]


def bounds_from_origin(high_nm_zyx: Sequence[float], voxel_size_nm_zyx: Sequence[float] = (1, 1, 1)) -> VolumeBounds:
    """A volume from 0 nm to the given corner; the default voxels are those of no real volume."""
    return VolumeBounds(np.zeros(3), np.array(high_nm_zyx, float), np.array(voxel_size_nm_zyx, float))


def read_annotations(
    sources: Sequence[AnnotationSource], base: Path, bounds: VolumeBounds | None, classes: Sequence[str]
) -> Annotations:
    synapses, rejects = [SYNAPSE_SCHEMA.empty_table()], [REJECT_SCHEMA.empty_table()]
    summary = convert_annotations(AnnotationInputs(sources, base, classes, bounds), synapses.append, rejects.append)
    return Annotations(pa.concat_tables(synapses), pa.concat_tables(rejects), summary.notes)
