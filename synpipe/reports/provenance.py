"""Where a row of a published index comes from: its tile, volume, annotations, weights, code and Dagster runs.

The answer is about the version of the index that readers see, even if later versions of the assets exist.
"""

from collections.abc import Mapping
from typing import Any

import lancedb.expr
import pyarrow as pa
import pyarrow.compute as pc

from synpipe.assets import annotations, embedding_table, index, rgb_tiles, volume
from synpipe.assets.graph import nodes
from synpipe.assets.manifest import Manifest, find_version
from synpipe.datasets import Dataset
from synpipe.errors import SynpipeError
from synpipe.index.publish import check_rows, open_current, read_provenance
from synpipe.store.files import read_table
from synpipe.tiles.contents import find_by_content

VOLUME_FACTS = ("path", "shape_zyx", "voxel_size_nm_zyx", "offset_nm_zyx")


def trace_row(dataset: Dataset, encoder: str, synapse_id: int) -> dict[str, Any]:
    """The origin of a row of the published index, as JSON-able values.

    If an asset was made several times to the same version, the first run and code are given. Raises `SynpipeError` if the
    index has no such synapse.
    """
    table = open_current(dataset.lancedb_folder, encoder)
    check_rows(dataset.lancedb_folder, encoder, table)
    columns = [field.name for field in table.schema if field.name != "vector"]
    condition = lancedb.expr.col("synapse_id") == lancedb.expr.lit(synapse_id)
    rows = table.search().where(condition).select(columns).limit(1).to_arrow().to_pylist()
    if not rows:
        raise SynpipeError(f"Synapse {synapse_id} is not in the index {encoder} of {dataset.name}.")
    row, origin = rows[0], read_provenance(table.schema)
    lineage = _read_lineage(dataset, encoder, origin)
    volume_facts = volume.ASSET.parse(lineage["volume"])
    annotation_facts = annotations.ASSET.parse(lineage["annotations"])
    return {
        "row": row,
        "index": {"version": table.version, "data_version": origin["data_version"], "schema": origin["schema_version"]},
        "encoder": {
            "name": origin["encoder"],
            "fingerprint": origin["encoder_fingerprint"],
            **origin["encoder_details"],
        },
        "tile": _find_tile(dataset, origin, row),
        "volume": {
            "data_version": lineage["volume"].data_version,
            **{name: getattr(volume_facts, name) for name in VOLUME_FACTS},
        },
        "annotation": {
            "data_version": lineage["annotations"].data_version,
            "source": row["source"],
            "source_id": row["source_id"],
            "sha256_by_file": annotation_facts.sha256_by_source[row["source"]],
        },
        "assets": {
            name: {
                "data_version": manifest.data_version,
                "code_version": manifest.code_version,
                "synpipe_version": manifest.synpipe_version,
                "dagster_run": manifest.run_id,
            }
            for name, manifest in lineage.items()
        },
    }


def _read_lineage(dataset: Dataset, encoder: str, origin: Mapping[str, Any]) -> dict[str, Manifest]:
    """Manifests, by asset, of everything that a version of the index was made of, in the order of the data flow."""
    versions = {
        index.ASSET.name_for(encoder): origin["data_version"],
        embedding_table.ASSET.name_for(encoder): origin["table_data_version"],
    }
    lineage = {}
    for node in reversed(nodes(dataset)):
        data_version = versions.get(node.name)
        if data_version:
            manifest = find_version(dataset, node.name, data_version)
            if manifest is None:
                raise SynpipeError(
                    f"{dataset.lineage_path(node.name, data_version)} is not there, or was damaged. It says what a version "
                    f"of {node.name} was made of. Materialise {node.name} again: that writes the file if it still has this version."
                )
            lineage[node.name] = manifest
            # The nearest asset downstream decides: the same stacks may serve two versions of the synapses.
            versions = manifest.inputs | versions
    return dict(reversed(lineage.items()))


def _find_tile(dataset: Dataset, origin: Mapping[str, Any], row: Mapping[str, Any]) -> dict[str, Any]:
    recipe = {"content_hash": row["content_hash"], "recipe": origin["dataset_spec"]["tiles"]}
    tiles = read_table(dataset.tiles_path)
    matching = tiles.filter(pc.equal(tiles["content_hash"], row["content_hash"])).to_pylist()
    if not matching:
        # Tiles of a former version are found in the parts, as long as a published version names them.
        stacking = rgb_tiles.stacking_of(dataset, origin)
        matching = find_by_content(dataset.cut_outs_folder, pa.array([row["content_hash"]]), stacking).to_pylist()
    if not matching:
        return recipe  # it was damaged, or `gc` of an earlier synpipe removed it
    names = ("file", "row", "start_z", "start_y", "start_x", "pad_fraction", "missing_sections", "crc32")
    # Several places may have tiles of the same content.
    own = next((tile for tile in matching if tile.get("synapse_id") == row["synapse_id"]), matching[0])
    return recipe | {name: own[name] for name in names}
