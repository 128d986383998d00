"""Annotations in tables: CSV, TSV, Parquet and Feather files, with any names of columns or with those of a known export.

In: one entry under `annotations:` with `format:` table, flywire, cave or neuprint. Out: `Rows`, a block of the file at a
time, so that the size of a file does not matter. Guarantee: as in `annotation_sources.py`.

A known export is a `Table` whose columns need not be named: `USUAL` says what each may be called, the first that is there
counts. Axes in another order are a matter of `columns`, too: `{x: z, z: x}`.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import ClassVar, Literal, Self

import numpy as np
from pydantic import Field, PositiveFloat, model_validator

from synpipe.annotations.columns import split_positions
from synpipe.annotations.files import POSITION, TABLE_READERS, damage_reported
from synpipe.annotations.sources import COLUMNS, Rows, Source
from synpipe.errors import SynpipeError

AXES = ("x", "y", "z")
KEYS = (*COLUMNS, POSITION)
ColumnKey = Literal[KEYS]  # type: ignore[valid-type]
Names = Mapping[str, Sequence[str]]  # for each key what its column may be called


class TableSource(Source):
    """What every format of table has in common.

    columns: name of the file's column for a key: those of `COLUMNS`, and `position` for one column that holds x, y and z,
        as a list or as text such as `[1, 2, 3]`. A key that is not named stands for the usual column, if the file has it.
    unit: `nm`, `um`, or `voxel` of `voxel_size_nm_zyx`: coordinate i, whole or not, means the centre of voxel i,
        (i + 0.5) · size. Where voxel 0 of the volume does not begin at 0 nm and the coordinates count from voxel 0, put
        the volume's offset into `shift_nm_zyx`.
    """

    USUAL_VOXEL_SIZE_NM_ZYX: ClassVar[tuple[float, float, float] | None] = None
    REQUIRED: ClassVar[tuple[str, ...]] = ()

    path: str
    columns: dict[ColumnKey, str] = Field(default_factory=dict)
    unit: Literal["nm", "um", "voxel"] = "nm"
    voxel_size_nm_zyx: tuple[PositiveFloat, PositiveFloat, PositiveFloat] | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if Path(self.path).suffix.lower() not in TABLE_READERS:
            raise ValueError(f"path must end with one of {', '.join(TABLE_READERS)}")
        if self._unit_nm() is None or (self.unit != "voxel" and self.voxel_size_nm_zyx is not None):
            raise ValueError("voxel_size_nm_zyx is needed with `unit: voxel`, and only there")
        if self.label is not None and "neurotransmitter" in self.columns:
            raise ValueError("give either a label or a column for neurotransmitter")
        return self

    def _paths(self) -> tuple[str, ...]:
        return (self.path,)

    def _unit_nm(self) -> tuple[float, float, float] | None:
        if self.unit == "voxel":
            return self.voxel_size_nm_zyx or self.USUAL_VOXEL_SIZE_NM_ZYX
        return (1000.0,) * 3 if self.unit == "um" else (1.0,) * 3

    @property
    def declared_unit(self) -> str:
        return f"voxels of {list(self._unit_nm() or ())} nm (z, y, x)" if self.unit == "voxel" else self.unit

    def to_nm(self, coordinates_zyx: np.ndarray) -> np.ndarray:
        return (coordinates_zyx + (0.5 if self.unit == "voxel" else 0.0)) * np.array(self._unit_nm())

    def _usual(self) -> Names:
        """What the columns of this export are called."""
        return {key: (key,) for key in COLUMNS}

    def read(self, base: Path) -> Iterator[Rows]:
        (path,) = self.files(base)
        counted_in, read = TABLE_READERS[path.suffix.lower()]
        notes: tuple[str, ...] = ()
        with damage_reported(path):
            for number, table in enumerate(read(path, self._file_columns)):
                if POSITION in table.column_names:
                    position = table[POSITION].combine_chunks()
                    for axis, values in zip(AXES, split_positions(position), strict=True):
                        table = table.append_column(axis, values)
                if "synapse_id" not in table.column_names and "problem" not in table.column_names:
                    table = table.append_column("synapse_id", table["ordinal"])
                    notes = () if number else (f"{path.name} has no column of ids: each row has its number, from 1.",)
                yield Rows(path, counted_in, table, notes)

    def _file_columns(self, path: Path, names: Sequence[str]) -> dict[str, str]:
        """File column of each key. Raises `SynpipeError` where one is missing or there twice."""
        candidates = {**self._usual(), **{key: (column,) for key, column in self.columns.items()}}
        found = {
            key: next(column for column in columns if column in names)
            for key, columns in candidates.items()
            if any(column in names for column in columns)
        }
        if POSITION in found and (POSITION in self.columns or not set(AXES) <= set(found)):
            found = {key: column for key, column in found.items() if key not in AXES}
            needed = {*self.REQUIRED, *self.columns}
        else:
            found.pop(POSITION, None)
            needed = {*self.REQUIRED, *AXES, *self.columns}
        missing = [
            f"`{'` or `'.join(candidates[key])}` (for `{key}`)" for key in KEYS if key in needed and key not in found
        ]
        if missing:
            there = ", ".join(f"`{name}`" for name in names) or "none"
            raise SynpipeError(
                f"{path} has no column {', '.join(missing)}. Its columns are {there}. Say which is which with "
                f"`columns: {{key: column of the file}}`; keys: {', '.join(KEYS)}."
            )
        twice = [column for column in found.values() if names.count(column) > 1]
        if twice:
            raise SynpipeError(f"{path} has more than one column `{twice[0]}`: rename all but one.")
        return found


class Table(TableSource):
    """A table with at least an id and x, y, z, under these names or those that `columns` gives."""

    REQUIRED: ClassVar[tuple[str, ...]] = ("synapse_id",)

    format: Literal["table"]


class Partners(TableSource):
    """Synapses as pairs of a presynaptic and a postsynaptic point, as CAVE and FlyWire have them.

    position: the point that the tile shows: `pre` by default, since the transmitter is the presynaptic neuron's; `ctr`
        is the middle of the cleft in CAVE's tables.
    The neuron is the presynaptic one, whichever point is shown. `confidence` is `cleft_score` (Heinrich et al., MICCAI
    2018), or else `connection_score` (Buhmann et al., Nature Methods 2021), as the file has it. Without a column `id`
    the synapses have the numbers of their rows, from 1, as ids: a sorted copy of the file is then another data set.
    The scores `gaba` … `da` are predictions of a network (Eckstein et al., Cell 2024), no known transmitter: such
    synapses are unlabelled, unless `columns` names a column for `neurotransmitter`.
    """

    position: Literal["pre", "post", "ctr"] = "pre"

    def _usual(self) -> Names:
        return {
            "synapse_id": ("id",),
            POSITION: (f"{self.position}_pt_position",),
            # The latter, and `pre`, are the names that fafbseg gives them.
            **{axis: (f"{self.position}_pt_position_{axis}", f"{self.position}_{axis}") for axis in AXES},
            "neuron_id": ("pre_pt_root_id", "pre"),
            "region": ("neuropil",),
            "confidence": ("cleft_score", "connection_score"),
        }


class FlyWire(Partners):
    """FlyWire's synapses (Buhmann et al. 2021; Dorkenwald et al., Nature 2024): in nm of FlyWire's alignment, FAFB v14.1.

    That alignment is not that of `fafb_v14_orig`: a position differs by about a micrometre.
    """

    format: Literal["flywire"]


class Cave(Partners):
    """A table of synapses from CAVE (Dorkenwald et al., Nature Methods 2025): in voxels of 4 × 4 × 40 nm unless declared.

    Positions are lists in Parquet and Feather, text such as `[1, 2, 3]` in CSV, or three columns each
    (`split_positions=True`). With `desired_resolution=[1, 1, 1]` they are in nm: say `unit: nm`.
    """

    USUAL_VOXEL_SIZE_NM_ZYX: ClassVar[tuple[float, float, float] | None] = (40.0, 4.0, 4.0)

    format: Literal["cave"]
    unit: Literal["nm", "um", "voxel"] = "voxel"


class NeuPrint(TableSource):
    """Synapses of the hemibrain, MANC and other sets of neuPrint: in voxels of 8 nm unless declared.

    Known are the names of neuPrint's clients (`bodyId`, `confidence`, `roi`; Python), `bodyid`, `connector_id` (R) and of
    MANC's lists per transmitter (`body`, `conf`, `syn_id`), whose transmitter is the `label`. Without a column of ids the
    synapses have the numbers of their rows, from 1: several files of one data set then need an `id_offset` each.
    """

    USUAL_VOXEL_SIZE_NM_ZYX: ClassVar[tuple[float, float, float] | None] = (8.0, 8.0, 8.0)

    format: Literal["neuprint"]
    unit: Literal["nm", "um", "voxel"] = "voxel"

    def _usual(self) -> Names:
        return {
            "synapse_id": ("connector_id", "syn_id"),
            **{axis: (axis,) for axis in AXES},
            "neuron_id": ("bodyId", "bodyid", "body"),
            "region": ("roi",),
            "confidence": ("confidence", "conf"),
        }
