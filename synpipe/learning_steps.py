"""The steps that learn from what `synpipe.pipeline` has made, or judge it; the same rules hold.

In: a `Dataset` and the data versions of the step's inputs. Out: files in its folder, and `Made`.
"""

import numpy as np
import pyarrow as pa

from synpipe import splits
from synpipe.datasets import Dataset
from synpipe.pipeline import CODE_VERSIONS, Inputs, Log, Made, _metadata
from synpipe.shards import read_table, write_table
from synpipe.specs import digest
from synpipe.tiles import SECTIONS, TILE_PX


def make_split(dataset: Dataset, inputs: Inputs, log: Log) -> Made:
    """The side of every synapse with a tile, a column per scheme: `split.parquet`."""
    spec = dataset.spec.split
    synapses, starts, window = synapses_with_tiles(dataset)
    labels = column(synapses, "neurotransmitter")
    columns: dict[str, pa.Array] = {"synapse_id": synapses["synapse_id"]}
    counts, notes = {}, []
    for scheme in splits.SCHEMES:
        groups = column(synapses, splits.GROUP_COLUMNS[scheme])
        sides = splits.split(spec, scheme, labels, groups, starts, window)
        columns[scheme] = pa.array(sides, pa.string())
        counts[scheme] = splits.tally(labels, groups, sides)
        notes += splits.shortcomings(scheme, counts[scheme])
    table = pa.table(columns)
    # Of the content: a changed confidence, or a position moved within its voxel, leads to the same split.
    version = digest(["split", CODE_VERSIONS["split"], spec.by, table.to_pydict()])
    write_table(dataset.split_path, table, _metadata(dataset, version, inputs))
    chosen = counts[spec.by].values()
    log(f"by {spec.by}: " + ", ".join(f"{sum(c[side] for c in chosen):,} {side}" for side in (*splits.SIDES, "guard")))
    return Made(version, {"rows": len(table), "by": spec.by, "split": counts}, notes)


def synapses_with_tiles(dataset: Dataset) -> tuple[pa.Table, np.ndarray, tuple[int, int, int]]:
    """The synapses that have a tile, by id; first voxels of the tiles, int64 (n, 3); extents of a tile, voxels z y x."""
    tiles = read_table(dataset.tiles_path, ["synapse_id", "z_index", "start_z", "start_y", "start_x"])
    tiles = tiles.sort_by("synapse_id")
    synapses = read_table(dataset.synapses_path).sort_by("synapse_id")
    rows = np.searchsorted(synapses["synapse_id"].to_numpy(), tiles["synapse_id"].to_numpy())
    starts = np.stack([tiles[f"start_{axis}"].to_numpy() for axis in "zyx"], axis=1)
    # The middle section of a stack is as far from its first as from its last.
    step = (tiles["z_index"][0].as_py() - tiles["start_z"][0].as_py()) if len(tiles) else 1
    return synapses.take(rows), starts, ((SECTIONS - 1) * step + 1, TILE_PX, TILE_PX)


def column(table: pa.Table, name: str) -> np.ndarray:
    """A column as object (n,), None where it is null."""
    return np.array([*table[name].to_pylist(), None], dtype=object)[:-1]
