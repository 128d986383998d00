"""What Dagster's history already shows of an asset, so that an unchanged asset need not be drawn again.

A picture may show more than the version of its asset covers: the tiles of each class show labels. A tag of each materialisation
therefore says of which versions it and everything upstream were.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import dagster as dg

from synpipe.assets.graph import Node, nodes
from synpipe.assets.manifest import Manifest, find_manifest
from synpipe.specs import digest

SHOWS = "synpipe/shows"


def is_unchanged(previous: Manifest | None, manifest: Manifest) -> bool:
    """Whether a run made the same asset again: nothing differs but the run, the checks to come and the times of its files."""
    if previous is None or previous.interrupted or previous.unpassed:
        return False
    return manifest == replace(previous, run_id=manifest.run_id, unpassed=manifest.unpassed, files=manifest.files)


def versions_shown(node: Node) -> str:
    """A digest of the versions of everything upstream."""
    node_by_name = {each.name: each for each in nodes(node.dataset)}
    upstream: dict[str, str | None] = {}
    left = [*node.reads]
    while left:
        name = left.pop()
        if name not in upstream:
            manifest = find_manifest(node.dataset, name)
            upstream[name] = manifest.data_version if manifest else None
            left += node_by_name[name].reads
    return digest(upstream)


def recorded_view(instance: dg.DagsterInstance, node: Node, previous: Manifest) -> Mapping[str, Any] | None:
    """The metadata of the run that made `previous`; None if the history lacks it or shows another state or place."""
    event = instance.get_latest_materialization_event(dg.AssetKey(list(node.key)))
    if event is None or event.asset_materialization is None or event.run_id != previous.run_id:
        return None
    if (event.asset_materialization.tags or {}).get(SHOWS) != versions_shown(node):
        return None
    metadata = event.asset_materialization.metadata
    path = metadata.get("path")
    places = (str(node.dataset.folder), str(node.dataset.bulk_folder))
    # The manifest covers a path that is one of its figures.
    if path is None or path.value == previous.figures.get("path") or str(path.value).startswith(places):
        return metadata
    return None
