"""Versions of an index: which there are, how two of them differ, going back to one, letting go of one, and where a row of it
comes from.

In: the LanceDB table of an encoder, whose every published version has a tag. Out: lists and figures; a moved tag.
Guarantees: going back moves the tag `current` and nothing else, so that readers see one whole version or another; what
is told of a row's origin is that of the version which readers see, not of what was made since.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, timedelta
from typing import Any

import lancedb.expr
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from synpipe.annotations.convert import SYNAPSE_SCHEMA
from synpipe.assets.graph import steps
from synpipe.assets.manifest import Manifest, find_version
from synpipe.datasets import Dataset
from synpipe.embeddings.vectors import read_vectors
from synpipe.errors import SynpipeError
from synpipe.index.build import open_lance
from synpipe.index.files import find_damaged_files
from synpipe.index.publish import CURRENT, connect, list_tags, open_current, read_provenance
from synpipe.store.files import read_table
from synpipe.store.objects import BulkPath, listed

# Columns whose change makes a row another one; the encoder's vector is compared by its cosine.
ROW_COLUMNS = (*SYNAPSE_SCHEMA.names[1:], "content_hash", "pad_fraction", "missing_sections")


@dataclass(frozen=True)
class Version:
    """A published version of an index. number: LanceDB's. made_at: UTC, ISO 8601. current: whether readers see it."""

    tag: str
    number: int
    made_at: str
    rows: int
    data_version: str
    encoder_fingerprint: str
    current: bool


@dataclass(frozen=True)
class Difference:
    """How version b differs from version a. mean_cosine: of the vectors of rows in both; None where there is none, or
    where the vectors have different lengths. same_encoder: whether both were made by the same fingerprint, without which
    cosines tell little."""

    added: list[int]
    removed: list[int]
    changed: list[int]
    matched: int
    mean_cosine: float | None
    same_encoder: bool


def versions(dataset: Dataset, encoder: str) -> list[Version]:
    """All published versions, the newest first. Raises `SynpipeError` where there is no index."""
    table = open_current(dataset.lancedb_folder, encoder)
    current = table.version
    made_at = {entry["version"]: entry["timestamp"] for entry in table.list_versions()}
    found = []
    for tag, number in _tags(table).items():
        table.checkout(number)
        told = read_provenance(table.schema)
        found.append(
            Version(
                tag=tag,
                number=number,
                made_at=made_at[number].astimezone(UTC).isoformat(timespec="seconds"),
                rows=table.count_rows(),
                data_version=told["data_version"],
                encoder_fingerprint=told["encoder_fingerprint"],
                current=number == current,
            )
        )
    return sorted(found, key=lambda version: -version.number)


def index_name(dataset: Dataset, encoder: str | None) -> str:
    """The data set's encoder of that name, or one that it had and whose index is still there."""
    if encoder in {path.stem for path in dataset.lancedb_folder.glob("*.lance")}:
        return str(encoder)
    return dataset.encoder(encoder)


def open_version(dataset: Dataset, encoder: str, which: str) -> Any:
    """The version with this tag or number, or `current`, read-only. Raises `SynpipeError` where there is no such one."""
    table = open_current(dataset.lancedb_folder, encoder)
    published = _tags(table)
    numbers = {str(number): number for number in published.values()} | published | {CURRENT: table.version}
    if which not in numbers:
        raise SynpipeError(
            f"The index {encoder} of {dataset.name} has no version {which!r}: `synpipe versions --dataset {dataset.name} "
            f"--encoder {encoder}` lists them."
        )
    table.checkout(numbers[which])
    return table


def diff(dataset: Dataset, encoder: str, a: str, b: str) -> Difference:
    """How version `b` differs from version `a`, each a tag, a number or `current`."""
    first, second = open_version(dataset, encoder, a), open_version(dataset, encoder, b)
    same_encoder = (
        read_provenance(first.schema)["encoder_fingerprint"] == read_provenance(second.schema)["encoder_fingerprint"]
    )
    old, new = _rows(first), _rows(second)
    ids = np.intersect1d(old["synapse_id"].to_numpy(), new["synapse_id"].to_numpy())
    old_both, new_both = _at(old, ids), _at(new, ids)
    changed = np.zeros(len(ids), dtype=bool)
    for column in ROW_COLUMNS:
        same = pc.fill_null(pc.equal(old_both[column], new_both[column]), False)
        neither = pc.and_(pc.is_null(old_both[column]), pc.is_null(new_both[column]))
        changed |= ~pc.or_(same, neither).to_numpy()
    vectors = [read_vectors(table) for table in (old_both, new_both)]
    comparable = len(ids) > 0 and vectors[0].shape == vectors[1].shape
    return Difference(
        added=np.setdiff1d(new["synapse_id"].to_numpy(), ids).tolist(),
        removed=np.setdiff1d(old["synapse_id"].to_numpy(), ids).tolist(),
        changed=ids[changed].tolist(),
        matched=len(ids),
        mean_cosine=float((vectors[0] * vectors[1]).sum(axis=1).mean()) if comparable else None,
        same_encoder=same_encoder,
    )


def rollback(dataset: Dataset, encoder: str, which: str) -> Version:
    """Let readers see version `which` (a tag or a number) from now on; returns it.

    It holds until the index is materialised again. Raises `SynpipeError` where there is no such version, or it is damaged.
    """
    found = open_version(dataset, encoder, which)
    number = found.version
    if wrong := find_damaged_files(dataset.lancedb_folder / f"{encoder}.lance", found.schema):
        raise SynpipeError(f"Version {which} of {encoder} is damaged ({', '.join(wrong)}): choose another.")
    connect(dataset.lancedb_folder).open_table(encoder).tags.update(CURRENT, number)
    return next(version for version in versions(dataset, encoder) if version.current)


def forget(dataset: Dataset, encoder: str, tag: str) -> Version:
    """Take the tag off a published version, so that nothing keeps it from being removed; returns it.

    Raises `SynpipeError` where there is no such tag, or where readers see that version and the data set has the encoder.
    """
    found = next((version for version in versions(dataset, encoder) if version.tag == tag), None)
    if found is None:
        raise SynpipeError(
            f"The index {encoder} of {dataset.name} has no tag {tag!r}: `synpipe versions --dataset {dataset.name} --encoder "
            f"{encoder}` lists them."
        )
    if found.current and encoder in dataset.encoders:
        raise SynpipeError(
            f"Readers see {tag} of {encoder}: let them see another version first, by `synpipe rollback` or by materialising, or "
            f"take {encoder} out of {dataset.name}.yaml."
        )
    table = connect(dataset.lancedb_folder).open_table(encoder)
    table.tags.delete(tag)
    if found.current:
        # Of an encoder that is gone, readers see the newest that is left; with the last one the table goes.
        left = max(_tags(table).values(), default=None)
        table.tags.delete(CURRENT) if left is None else table.tags.update(CURRENT, left)
    return found


def former_encoders(dataset: Dataset) -> dict[str, int]:
    """How many published versions there are of each encoder that the data set no longer has."""
    found = {}
    for path in listed(dataset.lancedb_folder, "*.lance"):
        if path.stem not in dataset.encoders and (table := _open(dataset, path.stem)) and (tags := _tags(table)):
            found[path.stem] = len(tags)
    return found


@dataclass(frozen=True)
class Untagged:
    """What no tag names in a LanceDB table. bytes: of rows and indexes that no tagged version has; 0 where there are only the
    small files of the steps of builds that were published. tags: of versions, without `current`."""

    versions: int
    bytes: int
    tags: int


def untagged(dataset: Dataset, name: str) -> Untagged:
    """Of the LanceDB table of that name. LanceDB itself neither lists nor removes them beside tags; pylance does.

    Raises `SynpipeError` where the table cannot be read.
    """
    opened, path = _open(dataset, name), dataset.lancedb_folder / f"{name}.lance"
    if opened is None:
        return Untagged(0, 0, 0)
    tags, tagged = len(_tags(opened)), set(list_tags(opened).values())
    table = open_lance(path)
    numbers = {version["version"] for version in table.versions()} - tagged
    files = table.explain_cleanup_old_versions(**_UNTAGGED, include_files=True, max_files=10**9).candidate_files
    found = {file.path: file.size_bytes for file in files}
    if table.version not in tagged:  # the newest is no candidate, not even where its build was killed
        kept = {file for number in tagged for file in _files_of(open_lance(path, number), path)}
        found |= {str(file): file.stat().st_size for file in _files_of(table, path) - kept}
    large = any(not name.endswith((".manifest", ".txn")) for name in found)
    return Untagged(len(numbers), sum(found.values()) if large else 0, tags)


def remove_untagged(path: BulkPath) -> None:
    """Remove what `untagged` finds in the LanceDB table in this folder, while nobody writes to it."""
    newest = open_lance(path)
    tags = list_tags(newest)
    if CURRENT in tags and newest.version not in tags.values():
        open_lance(path, CURRENT).restore()  # as the newest, which is never removed: that would stay
    open_lance(path).cleanup_old_versions(**_UNTAGGED)


# A version is made in far more than a microsecond; the files that a killed build left belong to none.
_UNTAGGED: dict[str, Any] = {
    "older_than": timedelta(microseconds=1),
    "delete_unverified": True,
    "error_if_tagged_old_versions": False,
}


def _files_of(table: Any, root: BulkPath) -> set[BulkPath]:
    """Files of the rows and the indexes of an opened version of the table in that folder."""
    rows = {root / "data" / file.path for fragment in table.get_fragments() for file in fragment.data_files()}
    indexes = [segment.uuid for index in table.describe_indices() for segment in index.segments]
    folders = [root / "_indices" / uuid for uuid in indexes]
    return rows | {file for folder in folders for file in folder.rglob("*")}


def published_assets(dataset: Dataset) -> list[tuple[str, str]]:
    """Asset and data version of every published index, and of the table that it was made of, also of encoders now gone."""
    found = []
    for path in dataset.lancedb_folder.glob("*.lance"):
        table = _open(dataset, path.stem)
        if table is None:
            continue
        for number in _tags(table).values():
            table.checkout(number)
            told = read_provenance(table.schema)
            found += [
                (f"index_{path.stem}", told["data_version"]),
                (f"embedding_table_{path.stem}", told["table_data_version"]),
            ]
    return found


def provenance(dataset: Dataset, encoder: str, synapse_id: int) -> dict[str, Any]:
    """Where a row of the published index comes from: its tile, volume, annotation, weights, code and runs.

    Of an asset that was made again to the same version, the first run and code are told. Raises `SynpipeError` where the
    index has no such synapse.
    """
    table = open_current(dataset.lancedb_folder, encoder)
    columns = [field.name for field in table.schema if field.name != "vector"]
    found = table.search().where(_is(synapse_id)).select(columns).limit(1).to_arrow().to_pylist()
    if not found:
        raise SynpipeError(f"Synapse {synapse_id} is not in the index {encoder} of {dataset.name}.")
    row, told = found[0], read_provenance(table.schema)
    lineage = _lineage(dataset, encoder, told)
    annotations = lineage["annotations"]
    return {
        "row": row,
        "index": {"version": table.version, "data_version": told["data_version"], "schema": told["schema_version"]},
        "encoder": {"name": told["encoder"], "fingerprint": told["encoder_fingerprint"], **told["encoder_details"]},
        "tile": _tile(dataset, told, row),
        "volume": {
            "data_version": lineage["volume"].data_version,
            **{
                name: lineage["volume"].counts[name]
                for name in ("path", "shape_zyx", "voxel_size_nm_zyx", "offset_nm_zyx")
            },
        },
        "annotation": {
            "data_version": annotations.data_version,
            "source": row["source"],
            "source_id": row["source_id"],
            "sha256_by_file": annotations.counts["sha256_by_source"][row["source"]],
        },
        "assets": {
            asset: {
                "data_version": manifest.data_version,
                "code_version": manifest.code_version,
                "synpipe_version": manifest.synpipe_version,
                "dagster_run": manifest.run_id,
            }
            for asset, manifest in lineage.items()
        },
    }


def _lineage(dataset: Dataset, encoder: str, told: Mapping[str, Any]) -> dict[str, Manifest]:
    """Manifests, by asset, of all that a version of the index was made of, in the order in which the data flows."""
    made_of = {f"index_{encoder}": told["data_version"], f"embedding_table_{encoder}": told["table_data_version"]}
    found = {}
    for step in reversed(steps(dataset)):
        data_version = made_of.get(step.asset)
        if data_version and (manifest := find_version(dataset, step.asset, data_version)):
            found[step.asset] = manifest
            # The asset that lies next downstream says it best: the same stacks may serve two versions of the synapses.
            made_of = manifest.inputs | made_of
    return dict(reversed(found.items()))


def _tile(dataset: Dataset, told: Mapping[str, Any], row: Mapping[str, Any]) -> dict[str, Any]:
    recipe = {"content_hash": row["content_hash"], "recipe": told["dataset_spec"]["tiles"]}
    tiles = read_table(dataset.tiles_path)
    found = tiles.filter(pc.equal(tiles["content_hash"], row["content_hash"])).to_pylist()
    if not found:
        return recipe  # of an older version: its tile is no longer among the tiles
    names = ("file", "row", "start_z", "start_y", "start_x", "pad_fraction", "missing_sections", "crc32")
    # Tiles of one content may be several, at several places.
    own = next((tile for tile in found if tile["synapse_id"] == row["synapse_id"]), found[0])
    return recipe | {name: own[name] for name in names}


def _is(synapse_id: int) -> Any:
    return lancedb.expr.col("synapse_id") == lancedb.expr.lit(synapse_id)


def _open(dataset: Dataset, name: str) -> Any | None:
    """The table with its tags, or None where there is none, as its first build was killed."""
    try:
        table = connect(dataset.lancedb_folder).open_table(name)
        list_tags(table)
        return table
    except ValueError:
        return None
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise SynpipeError(
            f"The index {name} in {dataset.lancedb_folder} cannot be read ({reason}): materialise it again, which builds it anew."
        ) from error


def _tags(table: Any) -> dict[str, int]:
    """Number of each published version by its tag."""
    return {tag: number for tag, number in list_tags(table).items() if tag != CURRENT}


def _rows(table: Any) -> pa.Table:
    return table.search().select(["synapse_id", *ROW_COLUMNS, "vector"]).to_arrow().combine_chunks()


def _at(table: pa.Table, ids: np.ndarray) -> pa.Table:
    """Rows of these ids, in their order."""
    order = np.argsort(table["synapse_id"].to_numpy())
    return table.take(order[np.searchsorted(table["synapse_id"].to_numpy()[order], ids)])
