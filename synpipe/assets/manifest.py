"""What has been made: one small JSON file per asset, written when everything else of it is in place.

In and out: `Manifest`s in the data set's folder. Guarantees: an asset whose manifest says nothing else is whole; of
every version that was ever whole, the manifest under which it was made first is kept.
"""

import logging
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from synpipe import __version__
from synpipe.datasets import Dataset
from synpipe.errors import SynpipeError
from synpipe.store.files import read_json, write_json

logger = logging.getLogger(__name__)

# Of the store: the layout of its folder and the columns of its files. A change raises it, and the README tells of it.
FORMAT = 1


@dataclass(frozen=True)
class Manifest:
    """What an asset is: written last, so that an asset with a manifest is whole.

    inputs: data version of each input when it was made. run_id: the Dagster run that made it, if any. unpassed: names of
    the checks that it failed, or was to undergo when the process ended. interrupted: a run of it began and did not end;
    its files may be of this version or of the next.
    """

    asset: str
    data_version: str
    code_version: str
    inputs: dict[str, str]
    counts: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    run_id: str | None = None
    unpassed: list[str] = field(default_factory=list)
    interrupted: bool = False
    synpipe_version: str = __version__
    format: int = FORMAT


def find_manifest(dataset: Dataset, asset: str) -> Manifest | None:
    """The manifest of an asset, or None where it has not been made, is damaged, or of an older format of the store.

    What is older is made anew by materialising; tiles and vectors are taken from their caches where those can be read.
    Raises `SynpipeError` for a store that a newer synpipe has written.
    """
    return _find(dataset.manifest_path(asset))


def find_version(dataset: Dataset, asset: str, data_version: str) -> Manifest | None:
    """The manifest under which this version of an asset was made first, or None where it never was."""
    return _find(dataset.lineage_path(asset, data_version))


def whole_versions(dataset: Dataset, asset: str) -> list[Manifest]:
    """The manifests under which each version of an asset was made first, in no order."""
    paths = dataset.lineage_path(asset, "any").parent.glob("[!.]*.json")
    return [manifest for manifest in map(_find, sorted(paths)) if manifest is not None]


def _find(path: Path) -> Manifest | None:
    if not path.exists():
        return None
    try:
        content = read_json(path)
    except SynpipeError as error:  # damaged, and moved aside: the asset is made anew, mostly from what is there
        logger.warning("%s", error)
        return None
    if content.get("format", 0) > FORMAT:
        raise SynpipeError(
            f"{path} was written by synpipe {content.get('synpipe_version')}, whose store this version, {__version__}, cannot "
            "read: upgrade synpipe, or choose another store with --store."
        )
    return Manifest(**content) if content.get("format") == FORMAT else None


def read_manifest(dataset: Dataset, asset: str) -> Manifest:
    """Raises `SynpipeError` where the asset has not been made."""
    manifest = find_manifest(dataset, asset)
    if manifest is None:
        raise SynpipeError(f"{dataset.name}/{asset} has not been made: `synpipe materialize --dataset {dataset.name}`.")
    return manifest


def write_manifest(dataset: Dataset, manifest: Manifest) -> None:
    whole = not manifest.interrupted and not manifest.unpassed
    # Before the manifest itself: what is known to be whole has its lineage.
    if whole and find_version(dataset, manifest.asset, manifest.data_version) is None:
        write_json(dataset.lineage_path(manifest.asset, manifest.data_version), asdict(manifest))
    write_json(dataset.manifest_path(manifest.asset), asdict(manifest))
