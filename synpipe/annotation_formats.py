"""Formats of synapse annotations: what their specs say, and how their files become `Rows`.

In: an `AnnotationSpec` that names files in nm or voxels. Out: `Rows`, untyped and in file order. Guarantee: every row
of every file is delivered once, a row that cannot be read with its `problem`; only a bad file raises.

A new format is one more `_Source` whose `read` yields `Rows`; typing and checking, in `annotations.py`, are common to
all formats.
"""

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import h5py
import numpy as np
import pyarrow as pa
from pydantic import Field, FiniteFloat, PositiveFloat, model_validator

from synpipe.annotation_columns import MAX_ID
from synpipe.annotation_files import TABLE_READERS, damage_reported, json_object, json_records, numbered
from synpipe.errors import SynpipeError
from synpipe.fingerprints import file_sha256
from synpipe.specs import Spec, digest

COLUMNS = ("synapse_id", "x", "y", "z", "neuron_id", "hemilineage", "region", "neurotransmitter", "confidence")
REQUIRED_COLUMNS = COLUMNS[:4]
ColumnKey = Literal[COLUMNS]  # type: ignore[valid-type]


@dataclass(frozen=True)
class Rows:
    """Consecutive rows of one file, before any check.

    table: any of `COLUMNS` (string, integer or floating; an absent one counts as null), `row` (int64, the place in the
        file, from 1) and, if some rows could not be read, `problem` (string, null where all is well).
    counted_in: what `row` counts, for messages: line, row, entry.
    notes: what the user should know about the file.
    """

    file: Path
    counted_in: str
    table: pa.Table
    notes: tuple[str, ...] = ()


class _Source(Spec):
    """What every format has in common.

    source: name in the column `source`; by default the stem of the first file.
    id_offset: is added to every id, so that two sources of one data set do not collide.
    label: the class of every synapse of this source, instead of what the file says.
    shift_nm_zyx: is added to every position.
    """

    source: str | None = None
    id_offset: int = Field(default=0, ge=0, le=MAX_ID)
    label: str | None = None
    shift_nm_zyx: tuple[FiniteFloat, FiniteFloat, FiniteFloat] = (0.0, 0.0, 0.0)

    @property
    def name(self) -> str:
        return self.source or Path(self._paths()[0]).stem

    def resolve(self, base: Path) -> list[Path]:
        """The files, relative paths taken from the folder `base`, whether they are there or not."""
        return [(base / path).resolve() for path in self._paths()]

    def files(self, base: Path) -> list[Path]:
        """The same, all of which are there. Raises `SynpipeError` where one is missing."""
        paths = self.resolve(base)
        for path in paths:
            if not path.is_file():
                raise SynpipeError(f"Annotation file {path} does not exist: correct its path, relative to {base}.")
        return paths

    def fingerprint(self, base: Path) -> str:
        """Digest of the spec and of the content of its files."""
        return digest({"spec": self.model_dump(mode="json"), "files": [file_sha256(path) for path in self.files(base)]})

    @abstractmethod
    def _paths(self) -> tuple[str, ...]: ...

    @abstractmethod
    def read(self, base: Path) -> Iterator[Rows]:
        """Every row of the files, in file order. Raises `SynpipeError` where a file as a whole cannot be used."""

    def to_nm(self, coordinates_zyx: np.ndarray) -> np.ndarray:
        """Coordinates of the file (n, 3) as positions in nm, without `shift_nm_zyx`."""
        return coordinates_zyx


class SynisterV3(_Source):
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
        columns: dict[str, list[str | None]] = {key: [] for key in (*COLUMNS[:-1], "problem")}
        several, unlisted = {}, set()
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
                # No Arrow string holds such a text, and no file or terminal takes it in a note.
                row = dict.fromkeys(columns) | {
                    "synapse_id": synapse_id.encode(errors="backslashreplace").decode(),
                    "problem": "it, its neuron or its hemilineage has a text with half a character (a lone surrogate)",
                }
            elif len(transmitters) > 1:
                several[neuron_id] = transmitters
            elif neuron_id is not None and neuron_id not in skeletons:
                unlisted.add(neuron_id)
            for key, column in columns.items():
                column.append(row[key])
        notes = [
            f"Neuron {neuron} has several transmitters ({', '.join(names)}); its synapses are kept as unlabelled."
            for neuron, names in several.items()
        ]
        if unlisted:
            notes.append(
                f"{len(unlisted):,} neurons of {synapses.name}, such as {min(unlisted)}, are not in "
                f"{skeletons_file.name}; their synapses are kept as unlabelled."
            )
        table = pa.table({key: pa.array(column, pa.string()) for key, column in columns.items()})
        yield Rows(synapses, "entry", numbered(table), tuple(notes))


class Cremi(_Source):
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


class Table(_Source):
    """A CSV, TSV, Parquet or Feather (Arrow IPC) file with one row per synapse and at least an id and x, y, z.

    columns: name of the file's column for a key of `COLUMNS`; a key that is not named stands for the column of the
        same name, if the file has it.
    unit: `nm`, or `voxel` with `voxel_size_nm_zyx`: coordinate i, whole or not, means the centre of voxel i,
        (i + 0.5) · size. Where voxel 0 of the volume does not begin at 0 nm and the coordinates count from voxel 0, put
        the volume's offset into `shift_nm_zyx`.
    """

    format: Literal["table"]
    path: str
    columns: dict[ColumnKey, str] = Field(default_factory=dict)
    unit: Literal["nm", "voxel"] = "nm"
    voxel_size_nm_zyx: tuple[PositiveFloat, PositiveFloat, PositiveFloat] | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if Path(self.path).suffix.lower() not in TABLE_READERS:
            raise ValueError(f"path must end with one of {', '.join(TABLE_READERS)}")
        if (self.unit == "voxel") != (self.voxel_size_nm_zyx is not None):
            raise ValueError("voxel_size_nm_zyx is needed with `unit: voxel`, and only there")
        if self.label is not None and "neurotransmitter" in self.columns:
            raise ValueError("give either a label or a column for neurotransmitter")
        return self

    def _paths(self) -> tuple[str, ...]:
        return (self.path,)

    def to_nm(self, coordinates_zyx: np.ndarray) -> np.ndarray:
        if self.voxel_size_nm_zyx is None:
            return coordinates_zyx
        return (coordinates_zyx + 0.5) * np.array(self.voxel_size_nm_zyx)

    def read(self, base: Path) -> Iterator[Rows]:
        (path,) = self.files(base)
        with damage_reported(path):
            counted_in, read = TABLE_READERS[path.suffix.lower()]
            for table in read(path, self._file_columns):
                yield Rows(path, counted_in, table)

    def _file_columns(self, path: Path, names: Sequence[str]) -> dict[str, str]:
        """File column of each key. Raises `SynpipeError` where one is missing or there twice."""
        wanted = {key: self.columns.get(key, key) for key in COLUMNS}
        missing = [
            f"`{column}` (for `{key}`)"
            for key, column in wanted.items()
            if column not in names and (key in REQUIRED_COLUMNS or key in self.columns)
        ]
        if missing:
            there = ", ".join(f"`{name}`" for name in names) or "none"
            raise SynpipeError(
                f"{path} has no column {', '.join(missing)}. Its columns are {there}. Say which is which with "
                f"`columns: {{key: column of the file}}`; keys: {', '.join(COLUMNS)}."
            )
        twice = [column for column in wanted.values() if names.count(column) > 1]
        if twice:
            raise SynpipeError(f"{path} has more than one column `{twice[0]}`: rename all but one.")
        return {key: column for key, column in wanted.items() if column in names}


AnnotationSpec = Annotated[SynisterV3 | Cremi | Table, Field(discriminator="format")]


def _as_text(value: Any) -> str | None:
    return None if value is None else str(value)


def _as_names(value: Any) -> list[str]:
    """The distinct names in a JSON value that is null, one string or a list of strings."""
    values = value if isinstance(value, list) else [value]
    return list(dict.fromkeys(str(name) for name in values if name is not None))


def _is_unicode(texts: Iterable[str | None]) -> bool:
    """False where a text has a lone surrogate, such as JSON's escape \\ud800 makes one; UTF-8 has none (RFC 3629, 3)."""
    try:
        "".join(text for text in texts if text is not None).encode()
    except UnicodeEncodeError:
        return False
    return True
