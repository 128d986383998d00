"""What lies in the store and nothing refers to: tiles of moved synapses, vectors of encoders no longer used.

In: a `Dataset`. Out: a list of files with their sizes, and on request their removal. Guarantee: what a manifest, an index
of tiles or a tagged version of an index refers to is never listed.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq

from synpipe.datasets import Dataset
from synpipe.errors import SynpipeError
from synpipe.graph import steps
from synpipe.history import versions
from synpipe.manifests import find_manifest
from synpipe.shards import read_table


@dataclass(frozen=True)
class Leftover:
    """A file that nothing refers to. reason: a phrase for people."""

    path: Path
    bytes: int
    reason: str


def leftovers(dataset: Dataset) -> list[Leftover]:
    """Files that can be removed without any asset or version losing anything; making them again would cost work."""
    return [*_tiles(dataset), *_embeddings(dataset), *_tables(dataset)]


def remove(found: Iterable[Leftover]) -> None:
    for leftover in found:
        leftover.path.unlink(missing_ok=True)


def _tiles(dataset: Dataset) -> list[Leftover]:
    """Parts of which no tile is in use: a part never changes, so one that is used in part stays whole."""
    used: set[str] = set()
    for path in (dataset.stacks_path, dataset.tiles_path):
        if path.exists():
            used.update(read_table(path, ["file"])["file"].unique().to_pylist())
    return [
        _leftover(path, "tiles of no synapse")
        for path in sorted(dataset.cut_outs_folder.glob("*/*"))
        if str(path.with_suffix(".h5").relative_to(dataset.folder)) not in used and not path.name.startswith(".")
    ]


def _embeddings(dataset: Dataset) -> list[Leftover]:
    """Vectors of fingerprints that no encoder of the data set has and no tagged version names, and of tiles now gone."""
    fingerprints: set[str] = set()
    tagged: set[str] = set()
    for step in steps(dataset):
        if step.kind == "embeddings" and (manifest := find_manifest(dataset, step.asset)):
            fingerprints.add(manifest.counts["encoder_fingerprint"])
    for table in dataset.lancedb_folder.glob("*.lance"):
        try:
            tagged.update(version.encoder_fingerprint for version in versions(dataset, table.stem))
        except SynpipeError:
            continue  # never published: it names no version
    hashes: set[str] = set()
    if dataset.tiles_path.exists():
        hashes.update(read_table(dataset.tiles_path, ["content_hash"])["content_hash"].to_pylist())
    found = []
    for path in sorted(dataset.embeddings_folder.glob("*/*")):
        if path.name.startswith("."):
            continue  # a writer may be at work on it
        fingerprint = path.parent.name
        if path.suffix == ".damaged":
            found.append(_leftover(path, "damaged vectors, computed anew"))
        elif fingerprint not in fingerprints | tagged:
            found.append(_leftover(path, "vectors of an encoder no longer used"))
        elif fingerprint in fingerprints and hashes.isdisjoint(_content_hashes(path)):
            found.append(_leftover(path, "vectors of tiles no longer there"))
    return found


def _tables(dataset: Dataset) -> list[Leftover]:
    kept = {dataset.table_path(encoder) for encoder in dataset.encoders}
    found = sorted(path for path in dataset.table_path("any").parent.glob("*.parquet") if path not in kept)
    return [_leftover(path, "table of an encoder that the data set does not name") for path in found]


def _content_hashes(path: Path) -> list[str]:
    return pq.read_table(path, columns=["content_hash"])["content_hash"].to_pylist()


def _leftover(path: Path, reason: str) -> Leftover:
    return Leftover(path, path.stat().st_size, reason)
