"""Manifests: one small JSON file per asset that says what the asset is and what it was made of.

A manifest is written last, when everything else of its asset is in place. An asset whose manifest reports neither an
interruption nor a failed check is therefore complete. The manifest under which each complete version was first made is kept
in `lineage/`. Every manifest carries a checksum of its content.

This module also says how the version of an asset follows from its inputs, and how a file of the store names its version.
"""

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import TypeAdapter

from synpipe import __version__
from synpipe.assets.file_records import FileRecord
from synpipe.datasets import Dataset
from synpipe.errors import SynpipeError
from synpipe.specs import digest
from synpipe.store.files import read_json, set_aside_as_damaged, write_json

logger = logging.getLogger(__name__)

# The layout of the store: its folders, the columns of its files, the fields of its manifests. Raise it with every change, and
# say in docs/store.md what happens to stores of the former format.
FORMAT = 2

# Format 1 kept facts and figures together under `counts`. These entries were not meant for people.
_NOT_FIGURES = ("rows", "encoder_identity", "files", "sha256_by_source", "neuroglancer")

Inputs = Mapping[str, str]
"""Data version of each asset that was read, by the asset's name."""


@dataclass(frozen=True)
class Manifest:
    """What an asset is.

    asset: its name, such as `embeddings_em_d4`. inputs: the data versions it was made of. facts: what later assets read, in the
    form of the asset's dataclass of facts. figures: numbers and tables for people. rows: rows of its main table, if it has one.
    notes: sentences for people. run_id: the Dagster run that made it, if any. unpassed: checks that it failed, or that had not
    finished when the process ended. interrupted: a run began and did not end, so its files may belong to this version or the
    next. files: records of its files, by their names in the data set's folder; empty in the manifests of an earlier synpipe.
    """

    asset: str
    data_version: str
    code_version: str
    inputs: dict[str, str]
    facts: dict[str, Any] = field(default_factory=dict)
    figures: dict[str, Any] = field(default_factory=dict)
    rows: int | None = None
    notes: list[str] = field(default_factory=list)
    run_id: str | None = None
    unpassed: list[str] = field(default_factory=list)
    interrupted: bool = False
    files: dict[str, FileRecord] = field(default_factory=dict)
    synpipe_version: str = __version__
    format: int = FORMAT


_MANIFEST = TypeAdapter(Manifest)


def find_manifest(dataset: Dataset, asset: str) -> Manifest | None:
    """The manifest of an asset, or None if the asset has not been made, or its manifest is damaged or of an unknown old format.

    A damaged manifest is moved aside with a warning; materialising the asset then writes a new one, mostly from files that are
    still there. Raises `SynpipeError` for a store that a newer synpipe wrote.
    """
    return _read(dataset.manifest_path(asset))


def read_manifest(dataset: Dataset, asset: str) -> Manifest:
    """Like `find_manifest`, but raises `SynpipeError` if the asset has not been made."""
    manifest = find_manifest(dataset, asset)
    if manifest is None:
        raise SynpipeError(
            f"{dataset.name}/{asset} has not been made. Run `synpipe materialize --dataset {dataset.name}`."
        )
    return manifest


def find_version(dataset: Dataset, asset: str, data_version: str) -> Manifest | None:
    """The manifest under which this version of an asset was first completed, or None if it never was."""
    return _read(dataset.lineage_path(asset, data_version))


def list_versions(dataset: Dataset, asset: str) -> list[Manifest]:
    """The manifests under which each version of an asset was first completed, in no particular order."""
    paths = dataset.lineage_path(asset, "any").parent.glob("[!.]*.json")
    return [manifest for manifest in map(_read, sorted(paths)) if manifest is not None]


def write_manifest(dataset: Dataset, manifest: Manifest) -> None:
    """Write the manifest of an asset and, if it completes a new version, the version's lineage."""
    complete = not manifest.interrupted and not manifest.unpassed
    # The lineage comes first, so that every version that is known to be complete has one.
    if complete and find_version(dataset, manifest.asset, manifest.data_version) is None:
        _write(dataset.lineage_path(manifest.asset, manifest.data_version), manifest)
    _write(dataset.manifest_path(manifest.asset), manifest)


def _write(path: Path, manifest: Manifest) -> None:
    content = json.loads(json.dumps(asdict(manifest)))  # tuples become lists, as they will when it is read
    write_json(path, content | {"checksum": _checksum(content)})


def _checksum(content: Mapping[str, Any]) -> str:
    """SHA-256 of the content in canonical JSON: sorted keys, no spaces."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _read(path: Path) -> Manifest | None:
    if not path.exists():
        return None
    try:
        content = read_json(path)
    except SynpipeError as error:  # damaged, and already moved aside
        logger.warning("%s", error)
        return None
    try:
        return _parse(content)
    except _NewerStore as error:
        raise SynpipeError(
            f"{path} was written by synpipe {error}, whose stores this version, {__version__}, cannot read. Upgrade synpipe, or "
            "choose another store with --store."
        ) from None
    except (TypeError, ValueError, AttributeError, KeyError) as error:
        logger.warning("%s", set_aside_as_damaged(path, error))
        return None


class _NewerStore(Exception):
    """The message is the version of synpipe that wrote the store."""


def _parse(content: Any) -> Manifest | None:
    """None for a format older than 1. Raises `ValueError`, `TypeError`, `AttributeError` or `KeyError` for damaged content."""
    if isinstance(content["format"], int) and content["format"] > FORMAT:
        raise _NewerStore(content.get("synpipe_version"))
    if isinstance(content["format"], int) and content["format"] < 1:
        return None
    if content["format"] == 1:
        content = _from_format_1(content)
    elif content.pop("checksum") != _checksum(content):
        raise ValueError("the checksum does not fit the content")
    if {"files": {}, **content}.keys() != {field.name for field in fields(Manifest)}:
        raise ValueError("fields are missing or unknown")
    return _MANIFEST.validate_python(content)


def _from_format_1(content: Mapping[str, Any]) -> dict[str, Any]:
    """A manifest of commit 9968423 or before, which had no checksum."""
    counts = content["counts"]
    figures = {name: value for name, value in counts.items() if name not in _NOT_FIGURES}
    kept = {name: value for name, value in content.items() if name != "counts"}
    return kept | {"facts": dict(counts), "figures": figures, "rows": counts.get("rows"), "format": FORMAT}


def data_version_of(asset: str, code_version: str, inputs: Inputs, description: Any = None) -> str:
    """The data version of what an asset makes of inputs of these versions, as `description` (JSON-able) has it made.

    It never depends on the clock, so the same inputs lead to the same version on any machine.
    """
    return digest([asset, code_version, dict(inputs), description])


def describe_origin(dataset: Dataset, data_version: str, inputs: Inputs) -> dict[str, Any]:
    """Where a file comes from: the content of the key `synpipe` in the metadata of its schema."""
    return {
        "dataset": dataset.name,
        "data_version": data_version,
        "inputs": dict(inputs),
        "dataset_spec": dataset.spec.model_dump(mode="json"),
        "synpipe_version": __version__,
    }


def file_metadata(dataset: Dataset, data_version: str, inputs: Inputs) -> dict[str, str]:
    """Schema metadata for a Parquet file of the store: its version and what it was made of."""
    return {"synpipe": json.dumps(describe_origin(dataset, data_version, inputs), sort_keys=True)}


def file_has_version(path: Path, data_version: str) -> bool:
    """Whether a Parquet file says that it has this version.

    The manifest cannot answer this: it is older than the file if a run was killed between writing the two.
    """
    try:
        origin = json.loads(pq.read_schema(path).metadata[b"synpipe"])
    except (OSError, pa.ArrowInvalid, TypeError, KeyError, ValueError):  # absent, damaged, or not written by synpipe
        return False
    return isinstance(origin, dict) and origin.get("data_version") == data_version
