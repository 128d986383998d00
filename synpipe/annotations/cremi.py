"""The format `cremi`: the annotations in an HDF5 file with CREMI's layout."""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import h5py
import numpy as np
import pyarrow as pa

from synpipe.annotations.files import explain_damage, number_rows
from synpipe.annotations.source import AnnotationSource, Rows
from synpipe.errors import SynpipeError
from synpipe.store.hdf5 import refuse_other_files


class Cremi(AnnotationSource):
    """The group `annotations` of a CREMI HDF5 file (https://cremi.org/data/): `ids`, `types`, `locations` (nm, zyx).

    Locations are relative to the attribute `offset` of the group `annotations`, which is added to them. The offset of
    the volume is not added: it is the position of voxel 0 in the same space (`pre_post_locations` in
    cremi/cremi_python subtracts it to get voxels).

    annotation_types: read only annotations of these types, such as `presynaptic_site`; by default all.
    """

    format: Literal["cremi"]
    path: str
    annotation_types: tuple[str, ...] = ()

    def _file_names(self) -> tuple[str, ...]:
        return (self.path,)

    def read(self, base: Path) -> Iterator[Rows]:
        (path,) = self.files(base)
        ids, types, locations_zyx = _read_annotations(path)
        chosen = np.isin(types.astype(str), self.annotation_types) if self.annotation_types else np.full(len(ids), True)
        if len(ids) and not chosen.any():
            raise SynpipeError(
                f"{path} has no annotation of type {', '.join(self.annotation_types)}; it has "
                f"{', '.join(sorted(set(types)))}. Correct `annotation_types`."
            )
        note = (
            f"{path.name}: {chosen.sum():,} of {len(ids):,} annotations are of type {', '.join(self.annotation_types)}."
        )
        z, y, x = locations_zyx.T
        table = number_rows(pa.table({"synapse_id": ids, "x": x, "y": y, "z": z})).filter(pa.array(chosen))
        yield Rows(path, "entry", table, () if chosen.all() else (note,))


def _read_annotations(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return ids (n,), types (n,) and locations (n, 3; nm, zyx, offset added) of all annotations of the file."""
    with explain_damage(path), h5py.File(path) as file:
        for name in ("ids", "types", "locations"):
            refuse_other_files(file, f"annotations/{name}")
        missing = [name for name in ("ids", "types", "locations") if f"annotations/{name}" not in file]
        if missing:
            raise SynpipeError(
                f"{path} has no `annotations/{'`, `annotations/'.join(missing)}`, which CREMI's layout requires. Name a "
                "file with annotations."
            )
        ids, locations = file["annotations/ids"][()], file["annotations/locations"][()]
        types = file["annotations/types"].asstr()[()]
        offset = np.asarray(file["annotations"].attrs.get("offset", (0.0, 0.0, 0.0)), dtype=np.float64)
    if ids.dtype.kind not in "iu" or ids.ndim != 1 or types.shape != ids.shape or locations.shape != (len(ids), 3):
        raise SynpipeError(
            f"{path}: annotations/ids {ids.dtype}{ids.shape}, types {types.shape} and locations {locations.shape} "
            "do not match. Provide n integers, n strings and an array of (n, 3) numbers."
        )
    native_ids = ids.astype(ids.dtype.newbyteorder("="))
    return native_ids, types, locations.astype(np.float64) + offset
