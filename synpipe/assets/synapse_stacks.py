"""The asset `synapse_stacks`: for every synapse the sections z−1, z and z+1 around it, cut out of the volume."""

import time
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from synpipe.assets import synapses
from synpipe.assets.asset import (
    Asset,
    Finding,
    Made,
    NoFacts,
    Task,
    View,
    always,
    no_leftovers,
    view_of_figures,
)
from synpipe.assets.manifest import data_version_of, file_metadata
from synpipe.cluster import workers
from synpipe.cluster.engines import on_cluster
from synpipe.datasets import Dataset
from synpipe.errors import SynpipeError
from synpipe.progress import Progress
from synpipe.store.files import read_table, table_writer
from synpipe.store.sorting import SpillFile
from synpipe.store.streams import ContentDigest, read_batches
from synpipe.tiles.extraction import extract_shards
from synpipe.tiles.tile import CUT_OUT_VERSION, PART_SCHEMA
from synpipe.volumes.volume import Volume

CODE_VERSION = "2"

# What identifies a stack. The file that holds it does not: that depends on the order in which synapses were added.
STACK_IDENTITY = ["synapse_id", "start_z", "start_y", "start_x", "content_hash", "reason"]
STACKS_SCHEMA = pa.schema([("synapse_id", pa.int64()), ("shard", pa.int32()), ("file", pa.string()), *PART_SCHEMA])

COLUMNS = {
    **synapses.REJECT_COLUMNS,
    "shard": "Synapses that lie close together share a shard.",
    "file": "HDF5 file that holds the tile, relative to the data set's folder.",
    "row": "Row of the tile in that file.",
    "start_z": "First voxel of the stack.",
    "start_y": "First voxel of the stack; negative if it begins outside the volume.",
    "start_x": "First voxel of the stack; negative if it begins outside the volume.",
    "z_index": "Section of the synapse, counted from the first section of the volume.",
    "pad_fraction": "Share of the tile's area outside the volume.",
    "missing_sections": "Bits 0, 1, 2: section z−1, z, z+1 is outside, blank or a copy.",
    "mean": "Mean grey value of the tile, 0 to 255.",
    "std": "Standard deviation of the grey values: the contrast of the tile.",
    "crc32": "Checksum of the tile.",
    "content_hash": "SHA-256 of the tile, first 32 hex digits. Its vectors are cached under this key.",
}


def make(task: Task) -> Made[NoFacts]:
    """Cut the stacks out, shard by shard. Stacks that are there already are kept."""
    dataset, spec = task.dataset, task.dataset.spec.tiles
    recipe = spec.recipe(task.inputs["volume"])
    positions = read_table(dataset.synapses_path, ["synapse_id", "z_nm", "y_nm", "x_nm"])
    if not len(positions):
        raise SynpipeError(
            f"{dataset.name} has no usable synapse: all {synapses.ASSET.read(dataset).rejects} were rejected. "
            f"Look at {dataset.synapse_rejects_path}."
        )
    ids = positions["synapse_id"].to_numpy()
    positions_nm_zyx = np.stack([positions[column].to_numpy() for column in ("z_nm", "y_nm", "x_nm")], axis=1)
    del positions
    started = time.monotonic()
    content, rejected, shards = ContentDigest(), 0, 0
    with Volume(dataset.spec.volume, dataset.base) as volume, SpillFile(STACKS_SCHEMA, dataset.folder) as stacks:
        starts = volume.window_starts(positions_nm_zyx, spec.window_zyx(volume.voxel_size_nm_zyx))
        progress = Progress(task.log, len(starts), "cut-outs")
        folder = dataset.cut_outs_folder / recipe
        plan = workers.CutOutPlan(dataset.spec.volume, dataset.base, task.inputs["volume"], spec, folder)
        elsewhere = partial(workers.cut_out, plan, progress=progress, log=task.log) if on_cluster() else None
        extracted, cut_outs_made = extract_shards(volume, spec, folder, starts, progress, elsewhere)
        for rows, cut in extracted:
            files = pc.binary_join_element_wise(f"tiles/{recipe}", cut["part"], "/")
            place = {"synapse_id": ids[rows], "shard": cut["shard"], "file": files}
            stack_table = pa.table(place | {name: cut[name] for name in PART_SCHEMA.names}).combine_chunks()
            content.add(stack_table.select(STACK_IDENTITY))
            rejected += len(stack_table) - stack_table["reason"].null_count
            shards += 1
            stacks.add(stack_table)
        bytes_read = volume.bytes_read
        # The version depends on content only, so a changed label or a copied file keeps the same version.
        version = data_version_of("synapse_stacks", CODE_VERSION, {}, content.value())
        metadata = file_metadata(dataset, version, task.inputs)
        with table_writer(dataset.stacks_path, STACKS_SCHEMA, metadata) as writer:
            for part in stacks.read():
                writer.write_table(part)
    elapsed_s = time.monotonic() - started
    task.log(f"{cut_outs_made:,} cut-outs made, {len(ids) - cut_outs_made:,} were there")
    figures = {
        "rejects": rejected,
        "cut_outs_made": cut_outs_made,
        "cut_outs_per_second": round(cut_outs_made / elapsed_s, 1),
        **({} if on_cluster() else {"bytes_read": bytes_read}),
        "shards": shards,
        "recipe": recipe,
    }
    return Made(version, NoFacts(), len(ids), figures)


def match_synapses(dataset: Dataset, _encoder: str) -> Finding:
    """Every synapse has either a stack or a reason why there is none."""
    wanted, present = read_ids(dataset.synapses_path), read_ids(dataset.stacks_path)
    figures = {
        "without stack or reason": len(np.setdiff1d(wanted, present)),
        "of no synapse": len(np.setdiff1d(present, wanted)),
        "repeated": len(present) - len(np.unique(present)),
    }
    wrong = ", ".join(f"{count:,} {name}" for name, count in figures.items() if count)
    if wrong:
        return Finding(False, f"Stacks and synapses differ: {wrong}.", figures)
    return Finding(True, "Every synapse has a stack or a reason.", figures)


def read_ids(path: Path) -> np.ndarray:
    """The column `synapse_id` of a Parquet file of the store, int64 (n,)."""
    return np.concatenate([part["synapse_id"].to_numpy() for part in read_batches(path, ["synapse_id"])])


SAMPLE_COLUMNS = ("synapse_id", "shard", "start_z", "start_y", "start_x", "pad_fraction", "missing_sections", "reason")

ASSET = Asset(
    name="synapse_stacks",
    per_encoder=False,
    exists=always,
    description="For every synapse the sections z−1, z and z+1, 256 × 256 pixels around it, cut out of the volume.",
    storage=frozenset({"hdf5"}),
    facts=NoFacts,
    reads=lambda dataset, encoder: ("volume", "synapses"),
    optional_reads=False,
    version_covers_reads=False,
    code_version=CODE_VERSION,
    still_valid=(),
    specs=lambda dataset, encoder: [
        CUT_OUT_VERSION,
        dataset.spec.tiles.model_dump(mode="json", exclude={"stacking"}),
    ],
    make=make,
    source_version=None,
    checks={"match_synapses": match_synapses},
    files=lambda dataset, encoder: (dataset.stacks_path,),
    names_tiles=True,
    leftovers=no_leftovers,
    columns=COLUMNS,
    table_columns=(),
    show=lambda dataset, encoder, manifest: View(view_of_figures(manifest), dataset.stacks_path, SAMPLE_COLUMNS),
)
