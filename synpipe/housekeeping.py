"""What lies in the store and nothing refers to: tiles of moved synapses, vectors of encoders no longer used.

In: a `Dataset`. Out: a list of files with their sizes, and on request their removal. Guarantees: what a manifest, the
index of the tiles or an embedding table refers to is never listed, nor what a run that is interrupted or still to come
would take up: while the tiles or an encoder's vectors are out of date, none of their files counts as left over. Published
versions of an index hold their own vectors and lose nothing.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from synpipe.datasets import Dataset
from synpipe.errors import SynpipeError
from synpipe.graph import states, steps
from synpipe.manifests import find_manifest, read_manifest
from synpipe.shards import TEMPORARY_PREFIX, read_table
from synpipe.storage import BulkPath, listed


@dataclass(frozen=True)
class Leftover:
    """A file that nothing refers to. reason: a phrase for people."""

    path: BulkPath
    bytes: int
    reason: str


def leftovers(dataset: Dataset) -> list[Leftover]:
    """Files that can be removed without any asset or version losing anything; making them again would cost work."""
    fresh = {state.asset for state in states(dataset) if state.state == "fresh"}
    # Manifests first: without them an asset whose files are gone counts as missing, also when the removal is killed.
    found = [*_of_dropped_assets(dataset), *_damaged(dataset)]
    if "rgb_tiles" in fresh:
        found += _tiles(dataset)
    if {step.asset for step in steps(dataset) if step.kind == "embeddings"} <= fresh:
        found += _embeddings(dataset)
    if {step.asset for step in steps(dataset) if step.kind == "classifier"} <= fresh:
        found += _trainings(dataset)
    return found


def remove(found: Iterable[Leftover]) -> None:
    for leftover in found:
        leftover.path.unlink(missing_ok=True)


def _of_dropped_assets(dataset: Dataset) -> list[Leftover]:
    """Of encoders that the data set no longer names, and of what its spec has switched off."""
    assets = {step.asset for step in steps(dataset)}
    found = [path for path in _files(dataset.manifest_path("any").parent, "*.json") if path.stem not in assets]
    places: tuple[tuple[str, Callable[[str], Path]], ...] = (
        ("embedding_table", dataset.table_path),
        ("embedding_table", dataset.former_table_path),
        ("projection", dataset.projection_path),
        ("classifier", dataset.predictions_path),
        ("classifier", dataset.neuron_predictions_path),
        ("scores", dataset.scores_path),
        ("scores", dataset.queries_path),
    )
    for kind, place in places:
        example = place("any")
        files = _files(example.parent, f"*{example.suffix}")
        found += [path for path in files if f"{kind}_{path.stem}" not in assets]
    if "evaluation" not in assets:
        found += _files(dataset.evaluation_path.parent, dataset.evaluation_path.name)
    return [_leftover(path, "of an encoder or a step that the data set no longer has") for path in found]


def _damaged(dataset: Dataset) -> list[Leftover]:
    return [
        _leftover(path, "damaged vectors, computed anew") for path in _files(dataset.embeddings_folder, "*/*.damaged")
    ]


def _tiles(dataset: Dataset) -> list[Leftover]:
    """Parts of which no tile is in use: a part never changes, so one that is used in part stays whole."""
    used: set[str] = set()
    for path in (dataset.stacks_path, dataset.tiles_path):
        used.update(read_table(path, ["file"])["file"].unique().to_pylist())
    return [
        _leftover(path, "tiles of no synapse")
        for path in _files(dataset.cut_outs_folder, "*/*")
        if f"tiles/{path.parent.name}/{path.stem}.h5" not in used
    ]


def _embeddings(dataset: Dataset) -> list[Leftover]:
    """Vectors of fingerprints that no encoder of the data set has, and of tiles now gone."""
    kinds = ("embeddings", "classifier")  # a classifier has vectors of its own where it has trained the network further
    manifests = [find_manifest(dataset, step.asset) for step in steps(dataset) if step.kind in kinds]
    fingerprints = {manifest.counts.get("encoder_fingerprint") for manifest in manifests if manifest}
    hashes = set(read_table(dataset.tiles_path, ["content_hash"])["content_hash"].to_pylist())
    found = []
    for path in _files(dataset.compressor_path("any").parent, "*.safetensors"):
        if path.stem not in fingerprints:
            found.append(_leftover(path, "fit of a compressed encoder no longer used"))
    for path in _files(dataset.embeddings_folder, "*/*.parquet"):
        if path.parent.name not in fingerprints:
            found.append(_leftover(path, "vectors of an encoder no longer used"))
            continue
        try:
            content = read_table(path, ["content_hash"])["content_hash"].to_pylist()
        except SynpipeError:
            continue  # damaged: whoever embeds next moves it aside
        if hashes.isdisjoint(content):
            found.append(_leftover(path, "vectors of tiles no longer there"))
    return found


def _trainings(dataset: Dataset) -> list[Leftover]:
    """What is left of trainings that have ended and are no classifier's."""
    manifests = [read_manifest(dataset, step.asset) for step in steps(dataset) if step.kind == "classifier"]
    used = {dataset.folder / manifest.counts["folder"] for manifest in manifests if "folder" in manifest.counts}
    ended = sorted({path.parent for path in dataset.training_folder.glob("*/report.json")} - used)
    return [
        _leftover(path, "of a training that no classifier uses")
        for folder in ended
        for path in _files(folder, "**/*")
        if path.is_file()
    ]


def _files(folder: BulkPath, pattern: str) -> Iterator[BulkPath]:
    """Files that are whole, in order: a writer may be at work on the others."""
    return (path for path in listed(folder, pattern) if not path.name.startswith(TEMPORARY_PREFIX))


def _leftover(path: BulkPath, reason: str) -> Leftover:
    return Leftover(path, path.stat().st_size, reason)
