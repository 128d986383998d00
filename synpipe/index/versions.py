"""The published versions of an index: list them, compare two, go back to one, or let go of one.

Every published version of an encoder's LanceDB table has a tag. Going back moves the tag `current` and nothing else, so
readers see one complete version or another.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, timedelta
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from synpipe.annotations.schema import SYNAPSE_SCHEMA
from synpipe.datasets import Dataset
from synpipe.embeddings.vectors import read_vectors
from synpipe.errors import SynpipeError, one_line
from synpipe.index.build import open_lance
from synpipe.index.damage import explaining_damage
from synpipe.index.files import find_damaged_files
from synpipe.index.publish import CURRENT, check_rows, connect, list_tags, open_current, read_provenance
from synpipe.store.objects import BulkPath, list_paths

# A row has changed if one of these columns has. Vectors are compared by their cosine.
ROW_COLUMNS = (*SYNAPSE_SCHEMA.names[1:], "content_hash", "pad_fraction", "missing_sections")


@dataclass(frozen=True)
class Version:
    """A published version of an index. number: its number in LanceDB. made_at: UTC, ISO 8601. current: whether readers see it."""

    tag: str
    number: int
    made_at: str
    rows: int
    data_version: str
    encoder_fingerprint: str
    current: bool


@dataclass(frozen=True)
class Difference:
    """How version b differs from version a.

    added, removed, changed: synapse ids. matched: number of rows in both. mean_cosine: mean cosine of the vectors of those
    rows; None if there are none, or if the dimensions differ. same_encoder: whether the encoder has the same fingerprint in
    both; if not, cosines mean little.
    """

    added: list[int]
    removed: list[int]
    changed: list[int]
    matched: int
    mean_cosine: float | None
    same_encoder: bool


def list_versions(dataset: Dataset, encoder: str) -> list[Version]:
    """All published versions, the newest first. Raises `SynpipeError` if there is no index."""
    table = open_current(dataset.lancedb_folder, encoder)
    with explaining_damage(dataset.lancedb_folder, encoder):
        current = table.version
        made_at = {entry["version"]: entry["timestamp"] for entry in table.list_versions()}
        versions = []
        for tag, number in _tags(table).items():
            table.checkout(number)
            provenance = read_provenance(table.schema)
            versions.append(
                Version(
                    tag=tag,
                    number=number,
                    made_at=made_at[number].astimezone(UTC).isoformat(timespec="seconds"),
                    rows=table.count_rows(),
                    data_version=provenance["data_version"],
                    encoder_fingerprint=provenance["encoder_fingerprint"],
                    current=number == current,
                )
            )
    return sorted(versions, key=lambda version: -version.number)


def index_name(dataset: Dataset, encoder: str | None) -> str:
    """The encoder of that name, either of the data set or a former one whose index still exists."""
    if encoder in {path.stem for path in dataset.lancedb_folder.glob("*.lance")}:
        return str(encoder)
    return dataset.encoder(encoder)


def open_version(dataset: Dataset, encoder: str, version: str) -> Any:
    """The version with this tag or number, or `current`, read-only. Raises `SynpipeError` if there is none."""
    table = open_current(dataset.lancedb_folder, encoder)
    with explaining_damage(dataset.lancedb_folder, encoder):
        published = _tags(table)
    numbers = {str(number): number for number in published.values()} | published | {CURRENT: table.version}
    if version not in numbers:
        raise SynpipeError(
            f"The index {encoder} of {dataset.name} has no version {version!r}: `synpipe versions --dataset {dataset.name} "
            f"--encoder {encoder}` lists them."
        )
    with explaining_damage(dataset.lancedb_folder, encoder):
        table.checkout(numbers[version])
    return table


def diff(dataset: Dataset, encoder: str, a: str, b: str) -> Difference:
    """How version `b` differs from version `a`, each a tag, a number or `current`."""
    first, second = open_version(dataset, encoder, a), open_version(dataset, encoder, b)
    same_encoder = (
        read_provenance(first.schema)["encoder_fingerprint"] == read_provenance(second.schema)["encoder_fingerprint"]
    )
    for table in (first, second):
        check_rows(dataset.lancedb_folder, encoder, table)
    with explaining_damage(dataset.lancedb_folder, encoder):
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


def rollback(dataset: Dataset, encoder: str, version: str) -> Version:
    """Let readers see this version (a tag or a number) from now on; returns it.

    It holds until the index is materialised again. Raises `SynpipeError` if there is no such version, or if it is damaged.
    """
    opened = open_version(dataset, encoder, version)
    number = opened.version
    if damaged := find_damaged_files(dataset.lancedb_folder / f"{encoder}.lance", opened.schema):
        raise SynpipeError(f"Version {version} of {encoder} is damaged ({', '.join(damaged)}): choose another.")
    connect(dataset.lancedb_folder).open_table(encoder).tags.update(CURRENT, number)
    return next(each for each in list_versions(dataset, encoder) if each.current)


def forget(dataset: Dataset, encoder: str, tag: str) -> Version:
    """Take the tag off a published version, so that `synpipe gc` may remove it; returns the version.

    Raises `SynpipeError` if there is no such tag, or if readers see that version and the data set still has the encoder.
    """
    forgotten = next((version for version in list_versions(dataset, encoder) if version.tag == tag), None)
    if forgotten is None:
        raise SynpipeError(
            f"The index {encoder} of {dataset.name} has no tag {tag!r}: `synpipe versions --dataset {dataset.name} --encoder "
            f"{encoder}` lists them."
        )
    if forgotten.current and encoder in dataset.encoders:
        raise SynpipeError(
            f"Readers see {tag} of {encoder}. Let them see another version first, with `synpipe rollback` or by materialising, or "
            f"remove {encoder} from {dataset.name}.yaml."
        )
    table = connect(dataset.lancedb_folder).open_table(encoder)
    table.tags.delete(tag)
    if forgotten.current:
        # Readers of a removed encoder see the newest version that is left. The table goes with the last one.
        left = max(_tags(table).values(), default=None)
        table.tags.delete(CURRENT) if left is None else table.tags.update(CURRENT, left)
    return forgotten


def former_encoders(dataset: Dataset) -> dict[str, int]:
    """The number of published versions of each encoder that the data set no longer has."""
    counts = {}
    for path in list_paths(dataset.lancedb_folder, "*.lance"):
        if path.stem not in dataset.encoders and (table := _open(dataset, path.stem)) and (tags := _tags(table)):
            counts[path.stem] = len(tags)
    return counts


@dataclass(frozen=True)
class Untagged:
    """What no tag names in a LanceDB table.

    versions: number of such versions. bytes: size of rows and indexes that no tagged version has; 0 if only the small files of the
    steps of published builds are left. tags: number of tags, without `current`.
    """

    versions: int
    bytes: int
    tags: int


def find_untagged(dataset: Dataset, name: str) -> Untagged:
    """What no tag names in the LanceDB table of that name. LanceDB cannot list it while there are tags, so pylance does.

    Raises `SynpipeError` if the table cannot be read.
    """
    opened, path = _open(dataset, name), dataset.lancedb_folder / f"{name}.lance"
    if opened is None:
        return Untagged(0, 0, 0)
    with explaining_damage(dataset.lancedb_folder, name):
        return _find_untagged(opened, path)


def _find_untagged(opened: Any, path: BulkPath) -> Untagged:
    tags, tagged = len(_tags(opened)), set(list_tags(opened).values())
    table = open_lance(path)
    numbers = {version["version"] for version in table.versions()} - tagged
    files = table.explain_cleanup_old_versions(**_UNTAGGED, include_files=True, max_files=10**9).candidate_files
    bytes_by_file = {file.path: file.size_bytes for file in files}
    if table.version not in tagged:  # the newest version is never a candidate, not even if its build was killed
        kept = {file for number in tagged for file in _files_of(open_lance(path, number), path)}
        bytes_by_file |= {str(file): file.stat().st_size for file in _files_of(table, path) - kept}
    large = any(not file.endswith((".manifest", ".txn")) for file in bytes_by_file)
    return Untagged(len(numbers), sum(bytes_by_file.values()) if large else 0, tags)


def remove_untagged(path: BulkPath) -> None:
    """Remove what `find_untagged` finds in the LanceDB table in this folder. No other process may write to it meanwhile."""
    newest = open_lance(path)
    tags = list_tags(newest)
    if CURRENT in tags and newest.version not in tags.values():
        open_lance(path, CURRENT).restore()  # it becomes the newest version; the former newest can then be removed
    open_lance(path).cleanup_old_versions(**_UNTAGGED)


# Making a version takes far longer than a microsecond. Files that a killed build left belong to no version.
_UNTAGGED: dict[str, Any] = {
    "older_than": timedelta(microseconds=1),
    "delete_unverified": True,
    "error_if_tagged_old_versions": False,
}


def _files_of(table: Any, root: BulkPath) -> set[BulkPath]:
    """Files of the rows and indexes of an opened version of the table in that folder."""
    rows = {root / "data" / file.path for fragment in table.get_fragments() for file in fragment.data_files()}
    indexes = [segment.uuid for index in table.describe_indices() for segment in index.segments]
    folders = [root / "_indices" / uuid for uuid in indexes]
    return rows | {file for folder in folders for file in folder.rglob("*")}


def list_published(dataset: Dataset) -> list[tuple[str, dict[str, Any]]]:
    """Encoder and provenance of every published version, also of encoders that the data set no longer has."""
    published = []
    for path in dataset.lancedb_folder.glob("*.lance"):
        table = _open(dataset, path.stem)
        if table is None:
            continue
        with explaining_damage(dataset.lancedb_folder, path.stem):
            for number in _tags(table).values():
                table.checkout(number)
                published.append((path.stem, read_provenance(table.schema)))
    return published


def read_contents(dataset: Dataset) -> Iterator[tuple[dict[str, Any], pa.ChunkedArray]]:
    """Provenance and content hashes of the rows of every published version, also of encoders that the data set no longer has.

    Of versions that were made from the same tiles, only one is read. Raises `SynpipeError` if a version cannot be read.
    """
    known: set[str] = set()
    for path in list_paths(dataset.lancedb_folder, "*.lance"):
        table = _open(dataset, path.stem)
        if table is None:
            continue
        for tag, number in _tags(table).items():
            try:
                table.checkout(number)
                origin = read_provenance(table.schema)
                if origin["inputs"]["rgb_tiles"] in known:
                    continue
                hashes = table.search().select(["content_hash"]).to_arrow()["content_hash"]
            except (RuntimeError, ValueError, OSError) as error:
                raise SynpipeError(
                    f"Version {tag} of {path.stem} cannot be read ({one_line(error)}), so it is not known which tiles it needs. "
                    f"Give it up: `synpipe forget {tag} -d {dataset.name} -e {path.stem}`."
                ) from error
            known.add(origin["inputs"]["rgb_tiles"])
            yield origin, hashes


def _open(dataset: Dataset, name: str) -> Any | None:
    """The table with its tags, or None if there is no table, for example because its first build was killed."""
    try:
        table = connect(dataset.lancedb_folder).open_table(name)
        list_tags(table)
        return table
    except ValueError:
        return None
    except RuntimeError as error:
        raise SynpipeError(
            f"The index {name} in {dataset.lancedb_folder} cannot be read ({one_line(error)}). Materialise it again: that rebuilds "
            "it."
        ) from error


def _tags(table: Any) -> dict[str, int]:
    """Number of each published version by its tag."""
    return {tag: number for tag, number in list_tags(table).items() if tag != CURRENT}


def _rows(table: Any) -> pa.Table:
    return table.search().select(["synapse_id", *ROW_COLUMNS, "vector"]).to_arrow().combine_chunks()


def _at(table: pa.Table, ids: np.ndarray) -> pa.Table:
    """The rows of these ids, in the order of the ids."""
    order = np.argsort(table["synapse_id"].to_numpy())
    return table.take(order[np.searchsorted(table["synapse_id"].to_numpy()[order], ids)])
