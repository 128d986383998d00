"""What lies in the store and nothing refers to, and its removal.

Examples are tiles of moved synapses, vectors of encoders no longer used, and versions of an index that no tag names. Nothing is
listed that a manifest, the index of the tiles or an embedding table refers to, nor tiles that a published version of an index
was made from, nor what an interrupted or coming run would
reuse: while an asset is out of date, none of what it keeps counts as left over. Tagged versions of an index, and the lineage that
their provenance needs, stay until `versions.forget` takes the tag off.
"""

from collections.abc import Iterable

from synpipe.assets import embedding_table, index
from synpipe.assets.asset import Leftover, file_leftover, list_complete
from synpipe.assets.graph import ASSETS, nodes, states
from synpipe.assets.manifest import find_manifest, find_version
from synpipe.datasets import Dataset
from synpipe.store.files import DAMAGED
from synpipe.store.objects import BulkPath, move_tree, remove_tree


def find_leftovers(dataset: Dataset) -> list[Leftover]:
    """What can be removed without a loss for any asset or published version. Making it again would cost work."""
    fresh = {state.asset for state in states(dataset) if state.state == "fresh"}
    # Manifests come first. Without them an asset whose files are gone counts as missing, even if the removal is killed.
    leftovers = [*_find_dropped_assets(dataset), *_find_damaged(dataset)]
    found = nodes(dataset)
    for asset in ASSETS:
        names = {node.name for node in found if node.asset.name == asset.name}
        leftovers += asset.leftovers(dataset, names <= fresh)
    return leftovers + _find_lineage(dataset)


def remove_leftovers(leftovers: Iterable[Leftover]) -> None:
    """Remove what `find_leftovers` found. No run may be working in the store meanwhile."""
    for leftover in leftovers:
        if leftover.versions is not None:
            from synpipe.index.versions import remove_untagged

            remove_untagged(leftover.path)
        elif leftover.path.is_dir():
            # Renamed first, so that no half of a table is left under its name if the process is killed.
            aside = leftover.path.with_suffix(f"{leftover.path.suffix}{DAMAGED}")
            move_tree(leftover.path, aside)
            remove_tree(aside)
        else:
            leftover.path.unlink(missing_ok=True)


def _find_dropped_assets(dataset: Dataset) -> list[Leftover]:
    """Files of encoders that the data set no longer names, and of assets that its spec has switched off."""
    names = {node.name for node in nodes(dataset)}
    paths = [path for path in list_complete(dataset.manifest_path("any").parent, "*.json") if path.stem not in names]
    for asset in ASSETS:
        # A branch keeps its files under the encoder's name.
        for example in asset.files(dataset, "any") if asset.per_encoder else ():
            files = list_complete(example.parent, f"*{example.suffix}")
            paths += [path for path in files if asset.name_for(path.stem) not in names]
        if not asset.per_encoder and asset.name not in names:
            paths += [path for path in asset.files(dataset, "") if path.exists()]
    unique = dict.fromkeys(paths)
    return [file_leftover(path, "of an encoder or an asset that the data set no longer has") for path in unique]


def _find_damaged(dataset: Dataset) -> list[Leftover]:
    paths: list[BulkPath] = [*dataset.folder.rglob(f"*{DAMAGED}")]
    paths += dataset.bulk.rglob(f"*{DAMAGED}") if dataset.bulk else ()
    return [file_leftover(path, "damaged, and made again since") for path in sorted(paths, key=str)]


def _find_lineage(dataset: Dataset) -> list[Leftover]:
    """Manifests of former versions, except those of which the current assets or a published version were made."""
    wanted: list[tuple[str, str]] = []
    for node in nodes(dataset):
        if manifest := find_manifest(dataset, node.name):
            wanted += [(node.name, manifest.data_version), *manifest.inputs.items()]
    if any(dataset.lancedb_folder.glob("*.lance")):
        from synpipe.index.versions import list_published  # LanceDB takes two seconds to import

        for encoder, origin in list_published(dataset):
            wanted += [
                (index.ASSET.name_for(encoder), origin["data_version"]),
                (embedding_table.ASSET.name_for(encoder), origin["table_data_version"]),
            ]
    used: set[tuple[str, str]] = set()
    while wanted:
        if (version := wanted.pop()) not in used:
            used.add(version)
            if manifest := find_version(dataset, *version):
                wanted += manifest.inputs.items()
    return [
        file_leftover(path, "manifest of a version not in use")
        for path in list_complete(dataset.folder / "lineage", "*/*.json")
        if (path.parent.name, path.stem) not in used
    ]
