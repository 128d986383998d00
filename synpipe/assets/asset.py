"""What an asset is: a declaration from which everything else about it follows.

Each module of this folder declares one asset as an `Asset` named `ASSET`: its name and dependencies, code version, work, checks,
facts, files, and what to show of it. `graph.ASSETS` lists them. The Dagster layer and the command line render these
declarations and know no asset by name. No field of `Asset` has a default, so a type checker reports a part that is missing.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from pydantic import TypeAdapter, ValidationError

from synpipe.assets.file_records import find_damaged
from synpipe.assets.manifest import Inputs, Manifest, find_manifest, read_manifest
from synpipe.datasets import Dataset
from synpipe.errors import SynpipeError
from synpipe.progress import Log
from synpipe.store.files import DAMAGED, TEMPORARY_PREFIX
from synpipe.store.objects import BulkPath, list_paths

F = TypeVar("F")


@dataclass(frozen=True)
class NoFacts:
    """For an asset of which later assets read nothing but its files."""


@dataclass(frozen=True)
class Task:
    """What the work of an asset is given.

    encoder: name of the encoder's branch; "" for an asset that all encoders share. inputs: data versions of the assets that it
    reads. previous: its manifest as it was before this run, if any. unchanged: whether that manifest is of a complete version
    made of the same inputs by the same specs and code.
    """

    dataset: Dataset
    encoder: str
    inputs: Inputs
    previous: Manifest | None
    unchanged: bool
    log: Log


@dataclass(frozen=True)
class Made(Generic[F]):
    """What the work of an asset returns; see `Manifest` for the fields."""

    data_version: str
    facts: F
    rows: int | None = None
    figures: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Finding:
    """The result of a check: whether it passed, a sentence that says so, and figures.

    severity: an error stops everything downstream; a warning stops nothing.
    """

    passed: bool
    description: str
    figures: dict[str, Any] = field(default_factory=dict)
    severity: Literal["error", "warning"] = "error"

    @property
    def stops(self) -> bool:
        return not self.passed and self.severity == "error"


Check = Callable[[Dataset, str], Finding]
"""Data set and encoder ("" for shared assets) to a finding. It reads what is in the store, not what the work reports."""


@dataclass(frozen=True)
class Leftover:
    """Something in the store that nothing refers to: a file, a folder, or some versions of the LanceDB table at `path`.

    reason: a phrase for people. versions: the number of versions of that table; None for a file or folder.
    """

    path: BulkPath
    bytes: int
    reason: str
    versions: int | None = None


def file_leftover(path: BulkPath, reason: str) -> Leftover:
    """The leftover that is this file, or this folder with all that it holds."""
    files = path.rglob("*") if path.is_dir() else [path]
    return Leftover(path, sum(file.stat().st_size for file in files if file.is_file()), reason)


def list_complete(folder: BulkPath, pattern: str) -> list[BulkPath]:
    """Files in a folder that match a pattern, in order, without those that a writer may be working on and damaged ones."""
    return [
        path
        for path in list_paths(folder, pattern)
        if not path.name.startswith(TEMPORARY_PREFIX) and path.suffix != DAMAGED
    ]


@dataclass(frozen=True)
class Table:
    """A small table for people."""

    headers: Sequence[str]
    rows: Sequence[Sequence[Any]]


@dataclass(frozen=True)
class Links:
    """Links with the text of each and a remark beside it."""

    items: Sequence[tuple[str, str, str]]


@dataclass(frozen=True)
class View:
    """What to show of an asset, as plain data of a bounded size.

    entries: pictures, tables, links and figures by name, the most telling first. place: the file or folder that holds the
    asset. sample_columns: columns of which to show the first rows, if `place` is a Parquet file.
    """

    entries: Mapping[str, "Image.Image | Table | Links | Any"]
    place: BulkPath | None = None
    sample_columns: Sequence[str] = ()


def view_of_figures(manifest: Manifest) -> dict[str, Any]:
    """The figures of a manifest as entries of a `View`, and its notes."""
    entries: dict[str, Any] = {}
    for name, value in manifest.figures.items():
        if isinstance(value, Mapping) and all(isinstance(count, int) for count in value.values()):
            entries[name] = Table([name, "rows"], [[key, f"{count:,}"] for key, count in value.items()])
        elif isinstance(value, list):
            entries[name] = ", ".join(map(str, value))
        else:
            entries[name] = value
    if manifest.notes:
        entries["notes"] = Table(["note"], [[note] for note in manifest.notes])
    return entries


@dataclass(frozen=True, kw_only=True)
class Asset(Generic[F]):
    """One kind of asset. Functions take the data set and the encoder's name ("" for an asset that all encoders share).

    name: without the encoder, such as `embeddings`. per_encoder: whether every encoder has one. exists: whether this data set
    (and encoder) has it. description: what it is, for people. storage: what holds it or computes it, as Dagster's kinds.
    facts: the dataclass of what later assets read of its manifest; its fields are JSON-able.

    reads: names of the assets it reads. optional_reads: whether it takes those of them that are there and stays out of date
    until all are. version_covers_reads: whether its data version changes with that of everything it reads; else the version
    depends on the content only. code_version: raise it when the work would make something else of the same inputs.
    still_valid: former code versions whose results are still good. specs: the specs that decide what the work makes.

    make: the work. source_version: for an asset whose source can change without notice, the version its source has now, or
    None if the files were not touched since these facts were taken. checks: by name. files: its files in the data set's folder;
    the first exists whenever the asset has been made. names_tiles: whether its first file names parts of tiles, so
    that damage to a part makes it stale. leftovers: what nothing refers to any more of what it keeps outside of `files`; the
    flag says whether every asset of this kind is fresh. columns: what the columns of its files mean. table_columns: columns of
    its first file, which has a row per `synapse_id`, that the embedding table takes over. show: what to show of it.
    """

    name: str
    per_encoder: bool
    exists: Callable[[Dataset, str], bool]
    description: str
    storage: frozenset[str]
    facts: type[F]
    reads: Callable[[Dataset, str], tuple[str, ...]]
    optional_reads: bool
    version_covers_reads: bool
    code_version: str
    still_valid: tuple[str, ...]
    specs: Callable[[Dataset, str], Any]
    make: Callable[[Task], Made[F]]
    source_version: Callable[[Dataset, F], str | None] | None
    checks: Mapping[str, Check]
    files: Callable[[Dataset, str], tuple[Path, ...]]
    names_tiles: bool
    leftovers: Callable[[Dataset, bool], Iterable[Leftover]]
    columns: Mapping[str, str]
    table_columns: tuple[pa.Field, ...]
    show: Callable[[Dataset, str, Manifest], View]

    def name_for(self, encoder: str) -> str:
        """The name of this asset of an encoder, as files of the store and the command line use it."""
        return f"{self.name}_{encoder}" if self.per_encoder else self.name

    def read(self, dataset: Dataset, encoder: str = "") -> F:
        """The facts of this asset as it was last made. Raises `SynpipeError` if it has not been made."""
        return self.parse(read_manifest(dataset, self.name_for(encoder)))

    def find(self, dataset: Dataset, encoder: str = "") -> F | None:
        """The facts of this asset as it was last made, or None if it has not been made."""
        manifest = find_manifest(dataset, self.name_for(encoder))
        return None if manifest is None else self.parse(manifest)

    def check_files(self, dataset: Dataset, encoder: str = "") -> None:
        """Raise `SynpipeError` if a file of this asset is damaged. Only files with another size or time are read."""
        manifest = find_manifest(dataset, self.name_for(encoder))
        if manifest is not None and not manifest.interrupted:
            for path in find_damaged(dataset.folder, manifest.files):
                raise SynpipeError(
                    f"{path} is damaged: it is not as {manifest.asset} wrote it. Run `synpipe materialize --dataset {dataset.name} "
                    "--stale` to make it again."
                )

    def parse(self, manifest: Manifest) -> F:
        """The facts of a manifest. Raises `SynpipeError` if it lacks some, as the manifest of a very old version may."""
        try:
            return TypeAdapter(self.facts).validate_python(manifest.facts)
        except ValidationError as error:
            missing = ", ".join(str(problem["loc"][0]) for problem in error.errors() if problem["loc"])
            raise SynpipeError(
                f"The manifest of {manifest.asset} has no valid {missing}. Materialise {manifest.asset} again."
            ) from None


def facts_as_json(facts: Any) -> dict[str, Any]:
    """The facts in the form in which a manifest holds them."""
    return asdict(facts)


def always(_dataset: Dataset, _encoder: str) -> bool:
    """For `Asset.exists`: every data set has it."""
    return True


def no_files(_dataset: Dataset, _encoder: str) -> tuple[Path, ...]:
    """For `Asset.files`: it keeps nothing in the data set's folder but its manifest."""
    return ()


def no_leftovers(_dataset: Dataset, _fresh: bool) -> tuple[Leftover, ...]:
    """For `Asset.leftovers`: it keeps nothing outside of its files."""
    return ()


def count_rows(path: Path) -> int:
    """Rows of a Parquet file, from its footer."""
    return pq.read_metadata(path).num_rows
