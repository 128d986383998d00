"""Synapse annotations in any known format become one typed Arrow table, and a table of what was rejected.

In: `AnnotationSpec`s that name files in nm or voxels. Out: `Annotations`: synapses (`SYNAPSE_SCHEMA`, sorted by id),
rejects (`REJECT_SCHEMA`) and notes for the user. Guarantee: every row of every file is in exactly one of the two
tables; ids up to 2^63 - 1 are exact; a bad row stops no other row, and only a bad file raises.

A new format is one more `_Source` whose `read` yields `Rows`, untyped and in file order; typing and checking are
common to all formats and work on whole columns, one `Rows` at a time.
"""

import csv
import difflib
import json
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
from pydantic import Field, FiniteFloat, PositiveFloat, model_validator

from synpipe.errors import SynpipeError
from synpipe.specs import Spec, digest
from synpipe.volumes import file_sha256

SYNAPSE_SCHEMA = pa.schema(
    [
        pa.field("synapse_id", pa.int64(), nullable=False),
        pa.field("x_nm", pa.float64()),
        pa.field("y_nm", pa.float64()),
        pa.field("z_nm", pa.float64()),
        pa.field("neuron_id", pa.int64()),  # null: unknown
        pa.field("hemilineage", pa.string()),
        pa.field("region", pa.string()),
        pa.field("neurotransmitter", pa.string()),  # one of the data set's classes; null: unlabelled
        pa.field("confidence", pa.float32()),
        pa.field("source", pa.string()),
        pa.field("source_id", pa.string()),  # the id as the file writes it, before `id_offset`
    ]
)
REJECT_SCHEMA = pa.schema(
    [
        pa.field("synapse_id", pa.int64()),  # null: missing_id, bad_id, malformed_row
        pa.field("x_nm", pa.float64()),
        pa.field("y_nm", pa.float64()),
        pa.field("z_nm", pa.float64()),
        pa.field("reason", pa.string()),
        pa.field("detail", pa.string()),
        pa.field("source", pa.string()),
        pa.field("source_id", pa.string()),
    ]
)

# Reasons, in the order in which they are checked: a row is rejected for the first that holds.
MALFORMED_ROW = "malformed_row"  # a CSV line with too few or too many values, a JSON entry that is no object
MISSING_ID = "missing_id"
BAD_ID = "bad_id"
MISSING_COORDINATE = "missing_coordinate"  # absent, not a number, or not finite
OUTSIDE_VOLUME = "outside_volume"
UNKNOWN_NEUROTRANSMITTER = "unknown_neurotransmitter"
DUPLICATE_ID = "duplicate_id"  # of a row that has no other fault: the first such row keeps the id

COLUMNS = ("synapse_id", "x", "y", "z", "neuron_id", "hemilineage", "region", "neurotransmitter", "confidence")
REQUIRED_COLUMNS = COLUMNS[:4]
ColumnKey = Literal[COLUMNS]  # type: ignore[valid-type]

MAX_ID = 2**63 - 1
# Above 2^53 - 1 a float64 no longer tells neighbouring integers apart (IEEE 754): such an id may be another synapse's.
MAX_ID_AS_FLOAT = 2**53 - 1

# What exports write for "no value", in lower case: pandas, R, SQL, Python, synister.
ABSENT = ("", "na", "n/a", "nan", "null", "none", "unknown")
# Short names of transmitters, as FlyWire, hemibrain and the literature write them, in lower case.
SYNONYMS = {
    "ach": "acetylcholine",
    "glu": "glutamate",
    "glut": "glutamate",
    "da": "dopamine",
    "5-ht": "serotonin",
    "5ht": "serotonin",
    "ser": "serotonin",
    "oa": "octopamine",
    "oct": "octopamine",
}
NUMBER = r"^[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?$"  # what pyarrow casts to float64 without raising

CSV_BLOCK_BYTES = 16 * 2**20
BATCH_ROWS = 2**20


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
        skeletons, lineages = _json_records(skeletons_file), _json_records(lineages_file)
        columns: dict[str, list[str | None]] = {key: [] for key in (*COLUMNS[:-1], "problem")}
        several, unlisted = {}, set()
        for synapse_id, value in _json_object(synapses):
            is_object = isinstance(value, tuple)
            synapse = dict(value) if is_object else {}
            neuron_id = _as_text(synapse.get("skeleton_id"))
            if neuron_id is not None and neuron_id not in skeletons:
                unlisted.add(neuron_id)
            skeleton = skeletons.get(neuron_id, {})
            lineage = lineages.get(_as_text(skeleton.get("hemi_lineage_id")), {})
            transmitters = _as_names(skeleton.get("nt_known"))
            if len(transmitters) > 1:
                several[neuron_id] = transmitters
            row = {
                "synapse_id": synapse_id,
                **{axis: _as_text(synapse.get(axis)) for axis in "xyz"},
                "neuron_id": neuron_id,
                "hemilineage": _as_text(lineage.get("hemi_lineage_name")),
                "region": "+".join(_as_names(synapse.get("brain_region"))),
                "neurotransmitter": transmitters[0] if len(transmitters) == 1 else None,
                "problem": None if is_object else "it is not an object with x, y and z",
            }
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
        yield Rows(synapses, "entry", _numbered(table), tuple(notes))


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
        with _damage_reported(path), h5py.File(path) as file:
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
        table = _numbered(pa.table({"synapse_id": native_ids, "x": x, "y": y, "z": z})).filter(pa.array(chosen))
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
        if Path(self.path).suffix.lower() not in _TABLE_READERS:
            raise ValueError(f"path must end with one of {', '.join(_TABLE_READERS)}")
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
        with _damage_reported(path):
            yield from _TABLE_READERS[path.suffix.lower()](path, self._file_columns)

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


# Files.


@contextmanager
def _damage_reported(path: Path) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, csv.Error, OSError, ValueError, TypeError, RuntimeError) as error:
        raise SynpipeError(
            f"{path} is truncated or damaged, or not what its name says ({' '.join(str(error).split())}): copy or "
            "export it again."
        ) from None


def _numbered(table: pa.Table, first: int = 1) -> pa.Table:
    return table.append_column("row", pa.array(np.arange(first, first + table.num_rows)))


def _json_object(path: Path) -> tuple[tuple[str, Any], ...]:
    """The pairs of the object at the top level, in file order and with repeated keys.

    Objects arrive as tuples of pairs (arrays as lists): a dict would drop a repeated synapse id without a word. Numbers
    arrive as they are written.
    """
    with _damage_reported(path):
        content = json.loads(path.read_bytes(), object_pairs_hook=tuple, parse_int=str, parse_float=str)
    if not isinstance(content, tuple):
        raise SynpipeError(f"{path} must hold one object with ids as keys at the top level: name a synister v3 file.")
    return content


def _json_records(path: Path) -> dict[str | None, dict[str, Any]]:
    """An object of objects. Raises `SynpipeError` where a key comes twice or an entry is no object."""
    records: dict[str | None, dict[str, Any]] = {}
    for key, value in _json_object(path):
        if key in records or not isinstance(value, tuple):
            problem = "is there twice" if key in records else "is not an object"
            raise SynpipeError(f"{path}: key {key!r} {problem}: correct the file.")
        records[key] = dict(value)
    return records


def _as_text(value: Any) -> str | None:
    return None if value is None else str(value)


def _as_names(value: Any) -> list[str]:
    """The distinct names in a JSON value that is null, one string or a list of strings."""
    values = value if isinstance(value, list) else [value]
    return list(dict.fromkeys(str(name) for name in values if name is not None))


ChooseColumns = Callable[[Path, Sequence[str]], dict[str, str]]


def _read_delimited(path: Path, choose: ChooseColumns) -> Iterator[Rows]:
    """Every value as text, so that one bad value is one bad row; lines with a wrong number of values come last.

    One line is one row, so that a quote which is never closed cannot swallow the rest of the file unseen.
    """
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    with open(path, newline="", encoding="utf-8-sig", errors="replace") as handle:
        header = next((line for line in csv.reader(handle, delimiter=delimiter) if line), [])
    columns = choose(path, header)
    lines = _line_numbers(path)
    malformed: list[pa_csv.InvalidRow] = []

    def set_aside(row: pa_csv.InvalidRow) -> str:
        malformed.append(row)
        return "skip"

    reader = pa_csv.open_csv(
        path,
        # pyarrow gives the number of a malformed row only when it reads in one thread.
        pa_csv.ReadOptions(use_threads=False, block_size=CSV_BLOCK_BYTES),
        pa_csv.ParseOptions(delimiter=delimiter, newlines_in_values=True, invalid_row_handler=set_aside),
        pa_csv.ConvertOptions(
            include_columns=list(dict.fromkeys(columns.values())),
            column_types=dict.fromkeys(columns.values(), pa.string()),
        ),
    )
    count = 0
    for batch in reader:
        rows = np.arange(count, count + batch.num_rows)
        count += batch.num_rows
        # Row k of those that pyarrow delivers stands after the malformed rows with fewer than k + 1 good rows before.
        good_before = np.array([row.number - 2 - index for index, row in enumerate(malformed)], dtype=np.int64)
        numbers = lines.take(rows + 1 + np.searchsorted(good_before, rows, side="right"), mode="clip")
        table = pa.table({key: batch[column] for key, column in columns.items()})
        yield Rows(path, "line", table.append_column("row", pa.array(numbers)))
    if 1 + count + len(malformed) != len(lines):
        raise SynpipeError(
            f"{path} has {len(lines):,} lines but, with the header, {1 + count + len(malformed):,} rows: a quoted "
            "value runs over several lines. Close the quote, take the line ends out of the values, or convert to Parquet."
        )
    problems = [f"it has {row.actual_columns} values, the header {row.expected_columns}" for row in malformed]
    numbers = lines.take(np.array([row.number - 1 for row in malformed], dtype=np.int64))
    yield Rows(path, "line", pa.table({"problem": pa.array(problems, pa.string()), "row": pa.array(numbers)}))


def _line_numbers(path: Path) -> np.ndarray:
    """Number of each line that is not blank, the header first: pyarrow does not count blank lines."""
    with open(path, encoding="latin-1") as handle:  # decodes any byte, and knows every kind of line end
        return np.fromiter((number for number, line in enumerate(handle, start=1) if line != "\n"), dtype=np.int64)


def _read_parquet(path: Path, choose: ChooseColumns) -> Iterator[Rows]:
    file = pq.ParquetFile(path, memory_map=True)
    columns = choose(path, file.schema_arrow.names)
    yield from _typed_rows(path, columns, file.iter_batches(BATCH_ROWS, columns=list(dict.fromkeys(columns.values()))))


def _read_feather(path: Path, choose: ChooseColumns) -> Iterator[Rows]:
    reader = pa.ipc.open_file(pa.memory_map(str(path)))
    columns = choose(path, reader.schema.names)
    yield from _typed_rows(path, columns, (reader.get_batch(index) for index in range(reader.num_record_batches)))


def _typed_rows(path: Path, columns: Mapping[str, str], batches: Iterator[pa.RecordBatch]) -> Iterator[Rows]:
    first = 1
    for batch in batches:
        table = pa.table({key: _readable(path, name, batch[name]) for key, name in columns.items()})
        yield Rows(path, "row", _numbered(table, first))
        first += batch.num_rows


def _readable(path: Path, name: str, column: pa.Array) -> pa.Array:
    """Integers and floats as they are; decimals, dictionaries and other kinds of string as string."""
    if pa.types.is_integer(column.type) or pa.types.is_floating(column.type):
        return column
    try:
        return column.cast(pa.string())
    except (pa.ArrowNotImplementedError, pa.ArrowInvalid):
        raise SynpipeError(f"{path}: column `{name}` holds {column.type}: numbers or text are needed.") from None


_TABLE_READERS: dict[str, Callable[[Path, ChooseColumns], Iterator[Rows]]] = {
    ".csv": _read_delimited,
    ".tsv": _read_delimited,
    ".parquet": _read_parquet,
    ".feather": _read_feather,
}


# Checks.


@dataclass(frozen=True)
class Annotations:
    """synapses: `SYNAPSE_SCHEMA`, sorted by id. rejects: `REJECT_SCHEMA`. notes: sentences for the user."""

    synapses: pa.Table
    rejects: pa.Table
    notes: list[str]


def read_annotations(
    specs: Sequence[AnnotationSpec],
    base: Path,
    *,
    bounds_nm_zyx: tuple[np.ndarray, np.ndarray] | None,
    classes: Sequence[str],
) -> Annotations:
    """Read, type and check every row of every source.

    bounds_nm_zyx: lower (inside) and upper (outside) corner of the volume; None checks no position.
    classes: the names that `neurotransmitter` may have; case, spaces and common synonyms do not matter.

    Raises `SynpipeError` where a file is missing, damaged, empty or without the needed columns, or a label is no class.
    """
    accepted, rejects = [SYNAPSE_SCHEMA.empty_table()], [REJECT_SCHEMA.empty_table()]
    notes: list[str] = []
    for spec in specs:
        if spec.label is not None and spec.label not in classes:
            raise SynpipeError(f"Source {spec.name}: label {spec.label!r} is none of the classes {', '.join(classes)}.")
        count, lost = 0, Counter[str]()
        for rows in spec.read(base):
            count += rows.table.num_rows
            good, bad, lost_here = _checked(rows, spec, bounds_nm_zyx, classes)
            accepted.append(good)
            rejects += bad
            notes += rows.notes
            lost += lost_here
        notes += [
            f"{spec.name}: {number:,} synapses have a {key} that is no number or not exact; it is left empty."
            for key, number in lost.items()
        ]
        if count == 0:
            raise SynpipeError(f"{spec.files(base)[0]} holds no synapse: name a file with at least one.")
    unique, duplicates = _split_duplicates(pa.concat_tables(accepted, promote_options="default"))
    synapses = unique.select(SYNAPSE_SCHEMA.names).cast(SYNAPSE_SCHEMA)
    return Annotations(synapses, pa.concat_tables([*rejects, duplicates]), notes + _class_counts(synapses, classes))


def _checked(
    rows: Rows, spec: _Source, bounds_nm_zyx: tuple[np.ndarray, np.ndarray] | None, classes: Sequence[str]
) -> tuple[pa.Table, list[pa.Table], Counter[str]]:
    """Typed rows without fault, with `file` and `row` added; a table of rejects per reason; counts of lost numbers."""
    count = rows.table.num_rows
    raw = {
        key: rows.table[key].combine_chunks() if key in rows.table.column_names else pa.nulls(count, pa.string())
        for key in (*COLUMNS, "problem")
    }
    source_id = _text(raw["synapse_id"])
    largest = MAX_ID_AS_FLOAT if pa.types.is_floating(raw["synapse_id"].type) else MAX_ID
    max_id = min(largest, MAX_ID - spec.id_offset)
    ids = _whole_numbers(raw["synapse_id"], max_id)
    coordinates = np.stack([_floats(raw[axis]) for axis in "zyx"], axis=1)
    with np.errstate(over="ignore"):  # what overflows is not finite, and rejected below
        positions = spec.to_nm(coordinates) + np.array(spec.shift_nm_zyx)
    finite = np.isfinite(positions)
    low, high = bounds_nm_zyx if bounds_nm_zyx is not None else (np.full(3, -np.inf), np.full(3, np.inf))
    box = ", ".join(f"{axis} {low[i]:g} to {high[i]:g}" for i, axis in ((2, "x"), (1, "y"), (0, "z")))
    inside = ((positions >= low) & (positions < high)).all(axis=1)
    names = pa.repeat(spec.label, count) if spec.label is not None else raw["neurotransmitter"]
    labels, unknown = _class_names(names, classes)
    z_nm, y_nm, x_nm = (pa.array(positions[:, axis], mask=~finite[:, axis]) for axis in range(3))
    numbers = {
        "neuron_id": _whole_numbers(raw["neuron_id"], MAX_ID),
        "confidence": pa.array(_floats(raw["confidence"]), from_pandas=True).cast(pa.float32(), safe=False),
    }
    table = pa.table(
        {
            "synapse_id": pc.add(ids, spec.id_offset),
            "x_nm": x_nm,
            "y_nm": y_nm,
            "z_nm": z_nm,
            **numbers,
            "hemilineage": _text(raw["hemilineage"]),
            "region": _text(raw["region"]),
            "neurotransmitter": labels,
            "source": pa.repeat(spec.name, count),
            "source_id": source_id,
            "file": pa.repeat(f"{rows.file.name}, {rows.counted_in} ", count).dictionary_encode(),
            "row": rows.table["row"],
        }
    )
    # An explanation is a list of texts and columns that are joined for the rejected rows alone.
    faults: list[tuple[str, np.ndarray, list[Any]]] = [
        (MALFORMED_ROW, _numpy(raw["problem"].is_valid()), [raw["problem"]]),
        (MISSING_ID, _numpy(source_id.is_null()), ["it has no id"]),
        (BAD_ID, _numpy(ids.is_null()), [f"the id is not a whole number from 0 to {max_id}"]),
        (
            MISSING_COORDINATE,
            ~finite.all(axis=1),
            [*_xyz(raw["x"], raw["y"], raw["z"]), " are not three finite numbers"],
        ),
        (OUTSIDE_VOLUME, ~inside, [*_xyz(x_nm, y_nm, z_nm), f" (nm) is not in the volume, {box}"]),
        (UNKNOWN_NEUROTRANSMITTER, _numpy(unknown.is_valid()), ["neurotransmitter ", unknown]),
    ]
    open_rows = np.full(count, True)
    rejects = []
    for reason, fault, explanation in faults:
        hit = open_rows & fault
        if hit.any():
            open_rows &= ~hit
            parts = [part if isinstance(part, str) else part.filter(hit) for part in explanation]
            rejects.append(_rejects(table.filter(hit), reason, parts))
    lost = Counter[str]()
    for key, values in numbers.items():
        lost[key] += int((open_rows & _numpy(_text(raw[key]).is_valid()) & _numpy(values.is_null())).sum())
    return table.filter(open_rows), rejects, +lost


def _split_duplicates(table: pa.Table) -> tuple[pa.Table, pa.Table]:
    """The first row of each id, sorted by id; rejects for all later ones, in file order."""
    ids = table["synapse_id"].to_numpy()
    order = np.argsort(ids, kind="stable")
    is_first = np.diff(ids[order], prepend=-1) != 0  # ids are never negative
    first_of = order[np.maximum.accumulate(np.where(is_first, np.arange(len(ids)), 0))]
    later = np.argsort(order[~is_first])
    duplicates, kept = table.take(order[~is_first][later]), table.take(first_of[~is_first][later])
    if not duplicates.num_rows:
        return table.take(order), REJECT_SCHEMA.empty_table()
    explanation = ["id ", duplicates["synapse_id"], " is taken by ", kept["file"], kept["row"]]
    return table.take(order[is_first]), _rejects(duplicates, DUPLICATE_ID, explanation)


def _rejects(rows: pa.Table, reason: str, explanation: list[Any]) -> pa.Table:
    named = pc.fill_null(pc.binary_join_element_wise(" (id '", rows["source_id"], "')", ""), "")
    detail = [rows["file"], rows["row"], named, ": ", *explanation, "."]
    parts = [pa.scalar(part) if isinstance(part, str) else part.cast(pa.string()) for part in detail]
    joined = pc.binary_join_element_wise(*parts, "", null_handling="replace", null_replacement="")
    table = rows.append_column("reason", pa.repeat(reason, len(rows))).append_column("detail", joined)
    return table.select(REJECT_SCHEMA.names).cast(REJECT_SCHEMA)


def _xyz(x: pa.Array, y: pa.Array, z: pa.Array) -> list[Any]:
    return ["x '", x, "', y '", y, "', z '", z, "'"]


def _class_counts(synapses: pa.Table, classes: Sequence[str]) -> list[str]:
    grouped = synapses.group_by("neurotransmitter").aggregate(
        [("synapse_id", "count"), ("neuron_id", "count_distinct")]
    )
    counts = {row["neurotransmitter"]: row for row in grouped.to_pylist()}
    return [
        f"{name or 'unlabelled'}: {counts[name]['synapse_id_count']:,} synapses"
        + (f" of {neurons:,} neurons" if (neurons := counts[name]["neuron_id_count_distinct"]) else "")
        for name in [*classes, None]
        if name in counts
    ]


# Columns: from what a file holds to what the schema says.


def _numpy(mask: pa.Array) -> np.ndarray:
    return mask.to_numpy(zero_copy_only=False)


def _text(column: pa.Array) -> pa.Array:
    """The column as trimmed strings; null where the file says in words that there is no value."""
    text = pc.utf8_trim_whitespace(column.cast(pa.string()))
    return pc.if_else(pc.is_in(pc.utf8_lower(text), pa.array(ABSENT)), pa.scalar(None, pa.string()), text)


def _floats(column: pa.Array) -> np.ndarray:
    """float64; NaN where the value is absent or not a number."""
    if pa.types.is_string(column.type):
        text = pc.utf8_trim_whitespace(column)
        column = pc.if_else(pc.match_substring_regex(text, NUMBER), text, pa.scalar(None, pa.string()))
    return column.cast(pa.float64(), safe=False).fill_null(np.nan).to_numpy(zero_copy_only=False)


def _whole_numbers(column: pa.Array, limit: int) -> pa.Array:
    """int64; null where the value is absent or no whole number from 0 to `limit`. Text never passes through float."""
    if pa.types.is_floating(column.type):
        floats = _floats(column)
        exact = (floats >= 0) & (floats <= MAX_ID_AS_FLOAT) & (floats == np.floor(floats))
        values = pa.array(np.where(exact, floats, 0).astype(np.int64), mask=~exact)
    elif pa.types.is_integer(column.type):
        values = column.cast(pa.int64(), safe=False)  # uint64 above MAX_ID wraps round to a negative number
    else:
        text = _text(column)
        digits = pc.replace_substring_regex(text, r"^(\d+)\.0*$", r"\1")  # pandas writes "12.0" in columns with gaps
        largest = pc.if_else(pc.equal(digits, text), str(MAX_ID), str(MAX_ID_AS_FLOAT).zfill(19))
        fits = pc.less_equal(pc.utf8_lpad(digits, 19, "0"), largest)
        valid = pc.and_(pc.match_substring_regex(digits, r"^\d{1,19}$"), fits)
        values = pc.if_else(valid, digits, pa.scalar(None, pa.string())).cast(pa.int64())
    in_range = pc.and_(pc.greater_equal(values, 0), pc.less_equal(values, limit))
    return pc.if_else(in_range, values, pa.scalar(None, pa.int64()))


def _class_names(column: pa.Array, classes: Sequence[str]) -> tuple[pa.Array, pa.Array]:
    """The class of each row (null: unlabelled or unknown) and what to say of the unknown ones (null elsewhere)."""
    by_name = {_canonical(name): name for name in classes} | {_plain(name): name for name in classes}
    encoded = column.cast(pa.string()).dictionary_encode()
    labels, unknown = [], []
    for written in encoded.dictionary.to_pylist():
        label = by_name.get(_plain(written), by_name.get(_canonical(written)))
        labels.append(label)
        known_or_absent = label is not None or _plain(written) in ABSENT
        unknown.append(
            None if known_or_absent else f"{written!r} is none of {', '.join(classes)}{_hint(written, by_name)}"
        )
    return pa.array(labels, pa.string()).take(encoded.indices), pa.array(unknown, pa.string()).take(encoded.indices)


def _plain(name: str) -> str:
    return " ".join(name.split()).casefold()


def _canonical(name: str) -> str:
    return SYNONYMS.get(_plain(name), _plain(name))


def _hint(written: str, by_name: Mapping[str, str]) -> str:
    close = difflib.get_close_matches(_plain(written), by_name, n=1)
    return f"; did you mean {by_name[close[0]]!r}?" if close else ""
