"""The formats that are tables: CSV, TSV, Parquet and Feather files with your own column names or those of a known export.

Input: an entry under `annotations:` with the `format` table, flywire, cave or neuprint. Output: `Rows`, a block of the
file at a time, so files can have any size. `source.py` states what every format guarantees.

A known export is a subclass of `TableSource` whose `_column_names` lists the names that each column may have.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import ClassVar, Literal, Self

import numpy as np
from pydantic import Field, PositiveFloat, model_validator

from synpipe.annotations.columns import split_positions
from synpipe.annotations.files import explain_damage
from synpipe.annotations.source import COLUMNS, AnnotationSource, Rows
from synpipe.annotations.table_files import POSITION, TABLE_READERS
from synpipe.errors import SynpipeError

AXES = ("x", "y", "z")
KEYS = (*COLUMNS, POSITION)
ColumnKey = Literal[KEYS]  # type: ignore[valid-type]


class TableSource(AnnotationSource):
    """What every table format shares.

    columns: the name of the file's column for a key. The keys are `COLUMNS`, and `position` for one column that holds x,
        y and z, as a list or as text such as `[1, 2, 3]`. For other keys, the export's usual column is used if the file
        has it. To exchange axes, write `{x: z, z: x}`.
    unit: `nm`, `um`, or `voxel` of `voxel_size_nm_zyx`. Voxel coordinate i, whole or not, means the centre of voxel i,
        (i + 0.5) · size. If coordinates count from voxel 0 of the volume and this voxel does not begin at 0 nm, put the
        volume's offset into `shift_nm_zyx`.
    """

    DEFAULT_VOXEL_SIZE_NM_ZYX: ClassVar[tuple[float, float, float] | None] = None
    REQUIRED_KEYS: ClassVar[tuple[str, ...]] = ()

    path: str
    columns: dict[ColumnKey, str] = Field(default_factory=dict)
    unit: Literal["nm", "um", "voxel"] = "nm"
    voxel_size_nm_zyx: tuple[PositiveFloat, PositiveFloat, PositiveFloat] | None = None

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        if Path(self.path).suffix.lower() not in TABLE_READERS:
            raise ValueError(f"path must end with one of {', '.join(TABLE_READERS)}")
        if self._unit_nm_zyx() is None or (self.unit != "voxel" and self.voxel_size_nm_zyx is not None):
            raise ValueError("give voxel_size_nm_zyx with `unit: voxel`, and only then")
        if self.label is not None and "neurotransmitter" in self.columns:
            raise ValueError("give either a label or a column for neurotransmitter, not both")
        return self

    def _file_names(self) -> tuple[str, ...]:
        return (self.path,)

    def _unit_nm_zyx(self) -> tuple[float, float, float] | None:
        """The length of one unit in nm; None if it is a voxel of unknown size."""
        if self.unit == "voxel":
            return self.voxel_size_nm_zyx or self.DEFAULT_VOXEL_SIZE_NM_ZYX
        return (1000.0,) * 3 if self.unit == "um" else (1.0,) * 3

    @property
    def declared_unit(self) -> str:
        return f"voxels of {list(self._unit_nm_zyx() or ())} nm (z, y, x)" if self.unit == "voxel" else self.unit

    def to_nm(self, coordinates_zyx: np.ndarray) -> np.ndarray:
        return (coordinates_zyx + (0.5 if self.unit == "voxel" else 0.0)) * np.array(self._unit_nm_zyx())

    def _column_names(self) -> Mapping[str, Sequence[str]]:
        """For each key, the names that its column may have in this export. The first name that the file has is used."""
        return {key: (key,) for key in COLUMNS}

    def read(self, base: Path) -> Iterator[Rows]:
        (path,) = self.files(base)
        counted_in, read_tables = TABLE_READERS[path.suffix.lower()]
        notes: tuple[str, ...] = ()
        with explain_damage(path):
            for number, table in enumerate(read_tables(path, self._choose_columns)):
                if POSITION in table.column_names:
                    position = table[POSITION].combine_chunks()
                    for axis, values in zip(AXES, split_positions(position), strict=True):
                        table = table.append_column(axis, values)
                if "synapse_id" not in table.column_names and "problem" not in table.column_names:
                    table = table.append_column("synapse_id", table["ordinal"])
                    note = f"{path.name} has no column of ids, so the number of each row, from 1, is its id."
                    notes = () if number else (note,)
                yield Rows(path, counted_in, table, notes)

    def _choose_columns(self, path: Path, header: Sequence[str]) -> dict[str, str]:
        """Return the file's column for each key. Raises `SynpipeError` if a column is missing or occurs twice."""
        candidates = {**self._column_names(), **{key: (name,) for key, name in self.columns.items()}}
        chosen = {
            key: next(name for name in names if name in header)
            for key, names in candidates.items()
            if any(name in header for name in names)
        }
        if POSITION in chosen and (POSITION in self.columns or not set(AXES) <= set(chosen)):
            chosen = {key: name for key, name in chosen.items() if key not in AXES}
            needed = {*self.REQUIRED_KEYS, *self.columns}
        else:
            chosen.pop(POSITION, None)
            needed = {*self.REQUIRED_KEYS, *AXES, *self.columns}
        missing = [
            f"`{'` or `'.join(candidates[key])}` (for `{key}`)" for key in KEYS if key in needed and key not in chosen
        ]
        if missing:
            present = ", ".join(f"`{name}`" for name in header) or "none"
            raise SynpipeError(
                f"{path} has no column {', '.join(missing)}. Its columns are {present}. Assign columns to keys with "
                f"`columns: {{key: column of the file}}`; the keys are {', '.join(KEYS)}."
            )
        repeated = [name for name in chosen.values() if header.count(name) > 1]
        if repeated:
            raise SynpipeError(f"{path} has more than one column `{repeated[0]}`. Rename all but one.")
        return chosen


class PlainTable(TableSource):
    """A table with at least an id, x, y and z, in columns with these names or with those that `columns` gives."""

    REQUIRED_KEYS: ClassVar[tuple[str, ...]] = ("synapse_id",)

    format: Literal["table"]


class PartnerTable(TableSource):
    """Synapses as pairs of a presynaptic and a postsynaptic point, as in CAVE and FlyWire.

    position: the point that the tile shows. The default is `pre`, because the transmitter belongs to the presynaptic
        neuron. In CAVE's tables, `ctr` is the middle of the cleft.

    The neuron is always the presynaptic one. `confidence` is `cleft_score` (Heinrich et al., MICCAI 2018) or, without
    it, `connection_score` (Buhmann et al., Nature Methods 2021), unchanged. If the file has no column `id`, the numbers
    of the rows, from 1, are the ids; a copy of the file in another order is then a different data set. The scores
    `gaba` … `da` are a network's predictions (Eckstein et al., Cell 2024), not known transmitters, so the synapses are
    unlabelled unless `columns` names a column for `neurotransmitter`.
    """

    position: Literal["pre", "post", "ctr"] = "pre"

    def _column_names(self) -> Mapping[str, Sequence[str]]:
        return {
            "synapse_id": ("id",),
            POSITION: (f"{self.position}_pt_position",),
            # fafbseg names the columns `pre_x` … and `pre`.
            **{axis: (f"{self.position}_pt_position_{axis}", f"{self.position}_{axis}") for axis in AXES},
            "neuron_id": ("pre_pt_root_id", "pre"),
            "region": ("neuropil",),
            "confidence": ("cleft_score", "connection_score"),
        }


class FlyWire(PartnerTable):
    """FlyWire's synapses (Buhmann et al. 2021; Dorkenwald et al., Nature 2024): in nm of FlyWire's alignment, FAFB v14.1.

    The volume `fafb_v14_orig` has another alignment: its positions differ by about a micrometre.
    """

    format: Literal["flywire"]


class Cave(PartnerTable):
    """A table of synapses from CAVE (Dorkenwald et al., Nature Methods 2025): voxels of 4 × 4 × 40 nm by default.

    Positions are lists in Parquet and Feather files, text such as `[1, 2, 3]` in CSV files, or three columns each
    (`split_positions=True`). If they were exported with `desired_resolution=[1, 1, 1]`, they are in nm: set `unit: nm`.
    """

    DEFAULT_VOXEL_SIZE_NM_ZYX: ClassVar[tuple[float, float, float] | None] = (40.0, 4.0, 4.0)

    format: Literal["cave"]
    unit: Literal["nm", "um", "voxel"] = "voxel"


class NeuPrint(TableSource):
    """Synapses of the hemibrain, MANC and other neuPrint data sets: voxels of 8 nm by default.

    The column names of these exports are known: neuPrint's Python client (`bodyId`, `confidence`, `roi`), its R client
    (`bodyid`, `connector_id`) and MANC's files per transmitter (`body`, `conf`, `syn_id`; give the transmitter as
    `label`). If the file has no column of ids, the numbers of the rows, from 1, are the ids. Several files of one data
    set then need different values of `id_offset`.
    """

    DEFAULT_VOXEL_SIZE_NM_ZYX: ClassVar[tuple[float, float, float] | None] = (8.0, 8.0, 8.0)

    format: Literal["neuprint"]
    unit: Literal["nm", "um", "voxel"] = "voxel"

    def _column_names(self) -> Mapping[str, Sequence[str]]:
        return {
            "synapse_id": ("connector_id", "syn_id"),
            **{axis: (axis,) for axis in AXES},
            "neuron_id": ("bodyId", "bodyid", "body"),
            "region": ("roi",),
            "confidence": ("confidence", "conf"),
        }
