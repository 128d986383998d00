"""What lies in the store and nothing refers to: tiles of moved synapses, vectors of encoders no longer used, versions of an
index that no tag names.

In: a `Dataset`. Out: a list of files and versions with their sizes, and on request their removal. Guarantees: what a manifest,
the index of the tiles or an embedding table refers to is never listed, nor what a run that is interrupted or still to come
would take up: while the tiles or an encoder's vectors are out of date, none of their files counts as left over. Versions of an
index that a tag names, and what their provenance rests on, stay until the tag is taken off: see `history.forget`.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from synpipe.assets.graph import states, steps
from synpipe.assets.manifest import find_manifest, find_version, read_manifest
from synpipe.datasets import Dataset
from synpipe.embeddings.cache import open_vector_part
from synpipe.store.files import DAMAGED, TEMPORARY_PREFIX, read_table
from synpipe.store.objects import BulkPath, list_paths, move_tree, remove_tree
from synpipe.tiles.parts import damaged_parts, mark_of


@dataclass(frozen=True)
class Leftover:
    """A file or folder that nothing refers to; or, of the LanceDB table at this path, as many versions. reason: a phrase for
    people."""

    path: BulkPath
    bytes: int
    reason: str
    versions: int | None = None


def leftovers(dataset: Dataset) -> list[Leftover]:
    """What can be removed without any asset or published version losing anything; making it again would cost work."""
    fresh = {state.asset for state in states(dataset) if state.state == "fresh"}
    # Manifests first: without them an asset whose files are gone counts as missing, also when the removal is killed.
    found = [*_of_dropped_assets(dataset), *_damaged(dataset), *_indexes(dataset), *_lineage(dataset)]
    if "rgb_tiles" in fresh:
        found += _tiles(dataset)
    if {step.asset for step in steps(dataset) if step.kind == "embeddings"} <= fresh:
        found += _embeddings(dataset)
    if {step.asset for step in steps(dataset) if step.kind == "classifier"} <= fresh:
        found += _trainings(dataset)
    return found


def remove(found: Iterable[Leftover]) -> None:
    """Remove what `leftovers` found, while no run is at work in the store."""
    for leftover in found:
        if leftover.versions is not None:
            from synpipe.reports import versions as history

            history.remove_untagged(leftover.path)
        elif leftover.path.is_dir():
            # No half of a table is left under its name, whenever the process ends.
            aside = leftover.path.with_suffix(f"{leftover.path.suffix}{DAMAGED}")
            move_tree(leftover.path, aside)
            remove_tree(aside)
        else:
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
    found: list[BulkPath] = [*dataset.folder.rglob(f"*{DAMAGED}")]
    found += dataset.bulk.rglob(f"*{DAMAGED}") if dataset.bulk else ()
    return [_leftover(path, "damaged, made anew") for path in sorted(found, key=str)]


def _indexes(dataset: Dataset) -> list[Leftover]:
    """Versions that no tag names, with what interrupted builds left, and tables without any tag."""
    tables = list_paths(dataset.lancedb_folder, "*.lance")
    if not tables:
        return []
    from synpipe.reports import versions as history  # LanceDB takes two seconds to import

    found = []
    for path in tables:
        untagged = history.untagged(dataset, path.stem)
        if path.stem not in dataset.encoders and not untagged.tags:
            found.append(_leftover(path, "index of an encoder no longer used"))
        elif untagged.bytes:
            found.append(Leftover(path, untagged.bytes, "versions that no tag names", untagged.versions))
    return found


def _lineage(dataset: Dataset) -> list[Leftover]:
    """Manifests of former versions, but for those that a published version was made of, or what there is now."""
    wanted: list[tuple[str, str]] = []
    for step in steps(dataset):
        if manifest := find_manifest(dataset, step.asset):
            wanted += [(step.asset, manifest.data_version), *manifest.inputs.items()]
    if any(dataset.lancedb_folder.glob("*.lance")):
        from synpipe.reports import versions as history

        wanted += history.published_assets(dataset)
    used: set[tuple[str, str]] = set()
    while wanted:
        if (version := wanted.pop()) not in used:
            used.add(version)
            if made := find_version(dataset, *version):
                wanted += made.inputs.items()
    return [
        _leftover(path, "manifest of a version not in use")
        for path in _files(dataset.folder / "lineage", "*/*.json")
        if (path.parent.name, path.stem) not in used
    ]


def _tiles(dataset: Dataset) -> list[Leftover]:
    """Parts of which no tile is in use: a part never changes, so one that is used in part stays whole."""
    used: set[str] = set()
    for path in (dataset.stacks_path, dataset.tiles_path):
        used.update(read_table(path, ["file"])["file"].unique().to_pylist())
    marks = [
        _leftover(mark_of(path), "mark of damaged tiles of no synapse")
        for path in damaged_parts(dataset.cut_outs_folder)
        if f"tiles/{path.parent.name}/{path.name}" not in used
    ]
    return marks + [
        _leftover(path, "tiles of no synapse")
        # `<part>.h5`, its index `<part>.parquet`, and the mark `<part>.h5.suspect` of a former version, which means nothing now.
        for path in _files(dataset.cut_outs_folder, "*/*.*")
        if path.suffix == ".suspect" or f"tiles/{path.parent.name}/{path.stem}.h5" not in used
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
            content = open_vector_part(path).read(["content_hash"])["content_hash"]
        except (pa.ArrowException, OSError):
            continue  # damaged: whoever embeds next moves it aside
        if hashes.isdisjoint(content.to_pylist()):
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
    return (
        path
        for path in list_paths(folder, pattern)
        if not path.name.startswith(TEMPORARY_PREFIX) and path.suffix != DAMAGED
    )


def _leftover(path: BulkPath, reason: str) -> Leftover:
    files = path.rglob("*") if path.is_dir() else [path]
    return Leftover(path, sum(file.stat().st_size for file in files if file.is_file()), reason)
