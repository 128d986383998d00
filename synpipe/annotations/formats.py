"""Formats of synapse annotations: JSON and HDF5 files here, tables in `annotation_tables.py`; `AnnotationSpec` is any of them.

In: an `AnnotationSpec` that names files in nm or voxels. Out: `Rows`, untyped and in file order. Guarantee: every row
of every file is delivered once, a row that cannot be read with its `problem`; only a bad file raises.

The files here are read whole: they hold some 100,000 synapses, at about 5 kB of memory each for JSON. Tables are streamed.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import h5py
import numpy as np
import pyarrow as pa
from pydantic import Field

from synpipe.annotations.files import damage_reported, json_array, json_object, json_records, numbered
from synpipe.annotations.sources import COLUMNS, Rows, Source
from synpipe.annotations.tables import Cave, FlyWire, NeuPrint, Table
from synpipe.errors import SynpipeError


class SynisterV3(Source):
    """The three JSON files of funkelab/synister's export (Eckstein et al., Cell 2024); positions in nm.

    The label of a synapse is the one known transmitter of its neuron; a neuron with several is unlabelled. A synapse in
    several brain regions has their names joined with `+`.
    """

    format: Literal["synister_v3"]
    synapses: str
    skeletons: str
    hemi_lineages: str

    def _paths(self) -> tuple[str, ...]:
        return self.synapses, self.skeletons, self.hemi_lineages

    def read(self, base: Path) -> Iterator[Rows]:
        synapses, skeletons_file, lineages_file = self.files(base)
        skeletons, lineages = json_records(skeletons_file), json_records(lineages_file)
        rows, several, unlisted = [], {}, set()
        for synapse_id, value in json_object(synapses):
            synapse = dict(value) if isinstance(value, tuple) else {}
            neuron_id = _as_text(synapse.get("skeleton_id"))
            skeleton = skeletons.get(neuron_id, {})
            lineage = lineages.get(_as_text(skeleton.get("hemi_lineage_id")), {})
            transmitters = _as_names(skeleton.get("nt_known"))
            row = {
                "synapse_id": synapse_id,
                **{axis: _as_text(synapse.get(axis)) for axis in "xyz"},
                "neuron_id": neuron_id,
                "hemilineage": _as_text(lineage.get("hemi_lineage_name")),
                "region": "+".join(_as_names(synapse.get("brain_region"))),
                "neurotransmitter": transmitters[0] if len(transmitters) == 1 else None,
                "problem": None if isinstance(value, tuple) else "it is not an object with x, y and z",
            }
            if not _is_unicode([*row.values(), *transmitters]):
                row = _unreadable(synapse_id)
            elif len(transmitters) > 1:
                several[neuron_id] = transmitters
            elif neuron_id is not None and neuron_id not in skeletons:
                unlisted.add(neuron_id)
            rows.append(row)
        notes = [
            f"Neuron {neuron} has several transmitters ({', '.join(names)}); its synapses are kept as unlabelled."
            for neuron, names in several.items()
        ]
        if unlisted:
            notes.append(
                f"{len(unlisted):,} neurons of {synapses.name}, such as {min(unlisted)}, are not in "
                f"{skeletons_file.name}; their synapses are kept as unlabelled."
            )
        yield Rows(synapses, "entry", _table(rows), tuple(notes))


class Cremi(Source):
    """The group `annotations` of a CREMI HDF5 file (https://cremi.org/data/): `ids`, `types`, `locations` (nm, zyx).

    Locations are relative to the group's own attribute `offset`, which is added. The offset of the volume is not: it
    says where voxel 0 lies in the same space (cremi/cremi_python, `pre_post_locations`, subtracts it to get voxels).

    annotation_types: read only these, such as `presynaptic_site`; by default all.
    """

    format: Literal["cremi"]
    path: str
    annotation_types: tuple[str, ...] = ()

    def _paths(self) -> tuple[str, ...]:
        return (self.path,)

    def read(self, base: Path) -> Iterator[Rows]:
        (path,) = self.files(base)
        with damage_reported(path), h5py.File(path) as file:
            missing = [name for name in ("ids", "types", "locations") if f"annotations/{name}" not in file]
            if missing:
                raise SynpipeError(
                    f"{path} has no `annotations/{'`, `annotations/'.join(missing)}`, which CREMI's layout asks for: "
                    "name a file with annotations."
                )
            ids, locations = file["annotations/ids"][()], file["annotations/locations"][()]
            types = file["annotations/types"].asstr()[()]
            offset = np.asarray(file["annotations"].attrs.get("offset", (0.0, 0.0, 0.0)), dtype=np.float64)
        if ids.dtype.kind not in "iu" or ids.ndim != 1 or types.shape != ids.shape or locations.shape != (len(ids), 3):
            raise SynpipeError(
                f"{path}: annotations/ids {ids.dtype}{ids.shape}, types {types.shape} and locations {locations.shape} "
                "do not fit together: n integers, n strings and (n, 3) numbers are needed."
            )
        chosen = np.isin(types.astype(str), self.annotation_types) if self.annotation_types else np.full(len(ids), True)
        if len(ids) and not chosen.any():
            raise SynpipeError(
                f"{path} has no annotation of type {', '.join(self.annotation_types)}; it has "
                f"{', '.join(sorted(set(types)))}. Correct `annotation_types`."
            )
        note = (
            f"{path.name}: {chosen.sum():,} of {len(ids):,} annotations are of type {', '.join(self.annotation_types)}."
        )
        z, y, x = (locations.astype(np.float64) + offset).T
        native_ids = ids.astype(ids.dtype.newbyteorder("="))
        table = numbered(pa.table({"synapse_id": native_ids, "x": x, "y": y, "z": z})).filter(pa.array(chosen))
        yield Rows(path, "entry", table, () if chosen.all() else (note,))


class Synful(Source):
    """A JSON list of partners from synful's FAFB predictions (Buhmann et al., Nature Methods 2021): in nm, in the order zyx.

    https://github.com/funkelab/synful_fafb, `evaluation/data/synful_predictions`. position: the point that the tile shows.
    The neuron is the presynaptic skeleton, where there is one; `confidence` is `score`, a sum that goes above 1.
    """

    format: Literal["synful"]
    path: str
    position: Literal["pre", "post"] = "pre"

    def _paths(self) -> tuple[str, ...]:
        return (self.path,)

    def read(self, base: Path) -> Iterator[Rows]:
        (path,) = self.files(base)
        rows = []
        for entry in json_array(path):
            synapse = dict(entry) if isinstance(entry, tuple) else {}
            location = synapse.get(f"location_{self.position}")
            z, y, x = location if isinstance(location, list) and len(location) == 3 else (None, None, None)
            row = {
                "synapse_id": _as_text(synapse.get("id")),
                "x": _as_text(x),
                "y": _as_text(y),
                "z": _as_text(z),
                "neuron_id": _as_text(synapse.get("id_skel_pre")),
                "confidence": _as_text(synapse.get("score")),
                "problem": None if isinstance(entry, tuple) else "it is not an object with id and location",
            }
            rows.append(row if _is_unicode(row.values()) else _unreadable(row["synapse_id"]))
        yield Rows(path, "entry", _table(rows))


AnnotationSpec = Annotated[
    SynisterV3 | Cremi | Synful | Table | FlyWire | Cave | NeuPrint, Field(discriminator="format")
]


def _as_text(value: Any) -> str | None:
    return None if value is None else str(value)


def _as_names(value: Any) -> list[str]:
    """The distinct names in a JSON value that is null, one string or a list of strings."""
    values = value if isinstance(value, list) else [value]
    return list(dict.fromkeys(str(name) for name in values if name is not None))


def _table(rows: Sequence[Mapping[str, str | None]]) -> pa.Table:
    keys = (*COLUMNS, "problem")
    return numbered(pa.table({key: pa.array([row.get(key) for row in rows], pa.string()) for key in keys}))


def _unreadable(synapse_id: str | None) -> dict[str, str | None]:
    """The row of an entry with a text that is not Unicode: no Arrow string holds it, and no file or terminal takes it."""
    return {
        "synapse_id": None if synapse_id is None else synapse_id.encode(errors="backslashreplace").decode(),
        "problem": "it, its neuron or its hemilineage has a text with half a character (a lone surrogate)",
    }


def _is_unicode(texts: Iterable[str | None]) -> bool:
    """False where a text has a lone surrogate, such as JSON's escape \\ud800 makes one; UTF-8 has none (RFC 3629, 3)."""
    try:
        "".join(text for text in texts if text is not None).encode()
    except UnicodeEncodeError:
        return False
    return True
