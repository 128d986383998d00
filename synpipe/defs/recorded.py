"""What Dagster's history already shows of an asset, so that an unchanged asset need not be drawn again."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import dagster as dg

from synpipe.assets.graph import Node
from synpipe.assets.manifest import Manifest


def is_unchanged(previous: Manifest | None, manifest: Manifest) -> bool:
    """Whether a run made the same asset again: nothing differs but the run, the checks to come and the version of synpipe."""
    if previous is None or previous.interrupted or previous.unpassed:
        return False
    return manifest == replace(
        previous, run_id=manifest.run_id, unpassed=manifest.unpassed, synpipe_version=manifest.synpipe_version
    )


def recorded_view(instance: dg.DagsterInstance, node: Node, previous: Manifest) -> Mapping[str, Any] | None:
    """The metadata of the run that made `previous`, or None if the history lacks it or shows a store at another place."""
    event = instance.get_latest_materialization_event(dg.AssetKey(list(node.key)))
    if event is None or event.asset_materialization is None or event.run_id != previous.run_id:
        return None
    metadata = event.asset_materialization.metadata
    path = metadata.get("path")
    places = (str(node.dataset.folder), str(node.dataset.bulk_folder))
    # The manifest covers a path that is one of its figures.
    if path is None or path.value == previous.figures.get("path") or str(path.value).startswith(places):
        return metadata
    return None
