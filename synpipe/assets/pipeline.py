"""The work of each step of the pipeline, in the order in which the data flows.

In: a `Dataset` and the data versions of the step's inputs. Out: files in its folder, and `Made`: the data version of what
they hold, with figures. Guarantees: a step reads only what earlier steps have finished; run again with nothing changed it
makes no cut-out, no forward pass and the same data version; killed at any moment and run again it carries on from the
last whole shard. `synpipe.assets.graph` says what depends on what, and keeps the manifests.

Memory is bounded by a shard, but for some 50 bytes of each synapse (its id, its place, its window) and for the rejects,
which are held whole: tiles, vectors and rows of tables are read and written a shard at a time.

A data version is a digest of the inputs' versions and of the step's own description, never of the clock.
"""

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from synpipe import __version__
from synpipe.analysis import drift
from synpipe.annotations.convert import REJECT_SCHEMA, SYNAPSE_SCHEMA, convert_annotations
from synpipe.assets.manifest import find_manifest, read_manifest
from synpipe.cluster import workers
from synpipe.cluster.engines import on_cluster
from synpipe.cluster.workers import shard_name
from synpipe.datasets import Dataset
from synpipe.embeddings import embed as embedding
from synpipe.embeddings import table
from synpipe.embeddings.cache import EmbeddingCache
from synpipe.embeddings.compression import CompressedSpec
from synpipe.embeddings.encoders import Encoder, open_on_all_devices
from synpipe.errors import SynpipeError
from synpipe.progress import Log, Progress
from synpipe.reports.links import find_viewer, image_layer
from synpipe.specs import digest
from synpipe.store.files import is_whole, read_table, remove_leftovers, set_aside, table_writer, write_table
from synpipe.store.fingerprints import file_sha256, size_and_mtime
from synpipe.store.objects import BulkPath
from synpipe.store.sorting import SpillFile
from synpipe.store.streams import ContentDigest, by_shard, read_batches
from synpipe.synthetic.demo import make_demo
from synpipe.tiles import tile as tiles
from synpipe.tiles.extraction import extract_shards
from synpipe.volumes.volume import Volume

Inputs = Mapping[str, str]  # data version by asset

# Raise the number of a step whenever it would make something else of the same inputs.
CODE_VERSIONS = {
    "volume": "2",
    "annotations": "1",
    "synapses": "1",
    "synapse_stacks": "2",
    "rgb_tiles": "1",
    "rejects": "2",
    "split": "2",
    "classifier": "1",
    "embeddings": "1",
    "projection": "1",
    "embedding_table": "1",
    "index": "1",
    "scores": "2",
    "evaluation": "2",
}

# The schema of the embedding table, Parquet and LanceDB, for other tools: a change of it raises the number.
TABLE_SCHEMA_VERSION = 3


# What makes a stack what it is: not the file that holds it: that depends on the order in which things were added.
STACK_IDENTITY = ["synapse_id", "start_z", "start_y", "start_x", "content_hash", "reason"]
STACKS_SCHEMA = pa.schema(
    [("synapse_id", pa.int64()), ("shard", pa.int32()), ("file", pa.string()), *tiles.PART_SCHEMA]
)


@dataclass(frozen=True)
class Made:
    """What a step has made. counts: figures for people and for later steps. notes: sentences for people."""

    data_version: str
    counts: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def make_volume(dataset: Dataset, inputs: Inputs, log: Log) -> Made:
    """Open the volume (making it first where it is synthetic) and take its fingerprint."""
    for folder in {dataset.folder, dataset.bulk_folder}:
        remove_leftovers(folder)
    if dataset.spec.synthetic is not None:
        make_demo(dataset.base, dataset.spec.synthetic, log)
    with Volume(dataset.spec.volume, dataset.base) as volume:
        counts = {
            "path": volume.path,
            "shape_zyx": volume.shape_zyx.tolist(),
            "voxel_size_nm_zyx": volume.voxel_size_nm_zyx.tolist(),
            "offset_nm_zyx": volume.offset_nm_zyx.tolist(),
            "files": status_of(dataset.volume_files()),
            "neuroglancer": image_layer(dataset.spec.volume, volume),
        }
        return Made(volume.fingerprint(), counts)


def volume_version(dataset: Dataset, counts: Mapping[str, Any]) -> str | None:
    """Version that the volume has now; None where its file was not touched since `counts` of its manifest were taken.

    What is reached over a network is not looked at: what is stale is answered at once, and offline.
    """
    if status_of(dataset.volume_files()) == counts["files"]:
        return None
    with Volume(dataset.spec.volume, dataset.base) as volume:
        return volume.fingerprint()


def make_annotations(dataset: Dataset, inputs: Inputs, log: Log) -> Made:
    """Take the fingerprint of the annotation files and of how they are read."""
    files = _annotation_files(dataset)
    # The status first: a file that is edited in between is then seen to have changed.
    counts: dict[str, Any] = {"paths": [str(file) for file in files], "files": status_of(files), "sha256_by_source": {}}
    for annotation in dataset.spec.annotations:
        hashes = {str(file): file_sha256(file) for file in annotation.files(dataset.base)}
        counts["sha256_by_source"].setdefault(annotation.name, {}).update(hashes)
    return Made(_annotations_version(dataset), counts)


def annotations_version(dataset: Dataset, counts: Mapping[str, Any]) -> str | None:
    """Version that the annotations have now; None where no file was touched since `counts` were taken."""
    return None if status_of(_annotation_files(dataset)) == counts["files"] else _annotations_version(dataset)


def make_synapses(dataset: Dataset, inputs: Inputs, log: Log) -> Made:
    """Annotations → `synapses.parquet`, and what could not be used; in bounded memory."""
    with Volume(dataset.spec.volume, dataset.base) as volume:
        bounds, voxel_size = volume.bounds_nm_zyx, volume.voxel_size_nm_zyx
    # The volume counts with its bounds only: what is inside them is of no concern here.
    version = version_of(
        "synapses",
        {"annotations": inputs["annotations"]},
        [[corner.tolist() for corner in bounds], list(dataset.spec.classes)],
    )
    with (
        table_writer(dataset.synapses_path, SYNAPSE_SCHEMA, metadata_of(dataset, version, inputs)) as synapses,
        table_writer(dataset.synapse_rejects_path, REJECT_SCHEMA) as rejects,
    ):
        summary = convert_annotations(
            dataset.spec.annotations,
            dataset.base,
            synapses.write_table,
            rejects.write_table,
            bounds_nm_zyx=bounds,
            classes=dataset.spec.classes,
            voxel_size_nm_zyx=voxel_size,
            scratch=dataset.folder,
        )
    log(f"{summary.synapses:,} synapses, {summary.rejects:,} rejects")
    for note in summary.notes:
        log(note)
    counts = {"rows": summary.synapses, "rejects": summary.rejects, "classes": summary.classes}
    return Made(version, counts, summary.notes)


def lost_tiles(dataset: Dataset, index: Path, damaged: Sequence[BulkPath]) -> BulkPath | None:
    """The first of these damaged parts that an index of stacks or tiles names, or None."""
    if not damaged:
        return None
    names = [str(path).removeprefix(f"{dataset.bulk_folder}/") for path in damaged]
    named = {name for part in read_batches(index, ["file"]) for name in part["file"].unique().to_pylist()}
    return next((path for path, name in zip(damaged, names, strict=True) if name in named), None)


def make_synapse_stacks(dataset: Dataset, inputs: Inputs, log: Log) -> Made:
    """Cut the three sections around every synapse out of the volume."""
    spec = dataset.spec.tiles
    recipe = spec.recipe(inputs["volume"])
    synapses = read_table(dataset.synapses_path, ["synapse_id", "z_nm", "y_nm", "x_nm"])
    if not len(synapses):
        raise SynpipeError(
            f"{dataset.name} has no usable synapse: all {read_manifest(dataset, 'synapses').counts['rejects']} were rejected. "
            f"Look at {dataset.synapse_rejects_path}."
        )
    ids = synapses["synapse_id"].to_numpy()
    positions = np.stack([synapses[column].to_numpy() for column in ("z_nm", "y_nm", "x_nm")], axis=1)
    del synapses
    started = time.monotonic()
    content, rejected, shards = ContentDigest(), 0, 0
    with Volume(dataset.spec.volume, dataset.base) as volume, SpillFile(STACKS_SCHEMA, dataset.folder) as stacks:
        starts = volume.window_starts(positions, spec.window_zyx(volume.voxel_size_nm_zyx))
        progress = Progress(log, len(starts), "cut-outs")
        folder = dataset.cut_outs_folder / recipe
        plan = workers.CutOutPlan(dataset.spec.volume, dataset.base, inputs["volume"], spec, folder)
        elsewhere = partial(workers.cut_out, plan, progress=progress, log=log) if on_cluster() else None
        found, made = extract_shards(volume, spec, folder, starts, progress, elsewhere)
        for rows, cut in found:
            files = pc.binary_join_element_wise(f"tiles/{recipe}", cut["part"], "/")
            place = {"synapse_id": ids[rows], "shard": cut["shard"], "file": files}
            stack_table = pa.table(place | {name: cut[name] for name in tiles.PART_SCHEMA.names}).combine_chunks()
            content.add(stack_table.select(STACK_IDENTITY))
            rejected += len(stack_table) - stack_table["reason"].null_count
            shards += 1
            stacks.add(stack_table)
        bytes_read = volume.bytes_read
        # Of the content, not of the inputs: a changed label or a file that was only copied leads to the same stacks.
        version = version_of("synapse_stacks", {}, content.value())
        with table_writer(dataset.stacks_path, STACKS_SCHEMA, metadata_of(dataset, version, inputs)) as writer:
            for part in stacks.read():
                writer.write_table(part)
    elapsed = time.monotonic() - started
    log(f"{made:,} cut-outs made, {len(ids) - made:,} were there")
    counts = {
        "rows": len(ids),
        "rejects": rejected,
        "cut_outs_made": made,
        "cut_outs_per_second": round(made / elapsed, 1),
        **({} if on_cluster() else {"bytes_read": bytes_read}),
        "shards": shards,
        "recipe": recipe,
    }
    return Made(version, counts)


def make_rgb_tiles(dataset: Dataset, inputs: Inputs, log: Log) -> Made:
    """The index of the model-ready tiles: a view of the stacks, in colour or grey, without those that have no tile."""
    stacking = dataset.spec.tiles.stacking
    version = version_of("rgb_tiles", inputs, [stacking])
    counts: dict[str, Any] = {"rows": 0, "stacking": stacking, "padded": 0, "with_missing_sections": 0}
    schema = pa.schema([column for column in STACKS_SCHEMA if column.name not in ("reason", "detail")])
    with table_writer(dataset.tiles_path, schema, metadata_of(dataset, version, inputs)) as writer:
        for _, stacks in by_shard(read_batches(dataset.stacks_path)):
            good = stacks.filter(pc.is_null(stacks["reason"])).select(schema.names)
            if stacking == "grey":
                hashes = tiles.content_hashes(tiles.TileReader(good, dataset.bulk_folder, stacking), len(good))
                good = good.set_column(schema.get_field_index("content_hash"), "content_hash", hashes)
            counts["rows"] += len(good)
            counts["padded"] += int(pc.sum(pc.greater(good["pad_fraction"], 0)).as_py() or 0)
            counts["with_missing_sections"] += int(pc.sum(pc.greater(good["missing_sections"], 0)).as_py() or 0)
            if len(good):
                writer.write_table(good.cast(schema))
    log(
        f"{counts['rows']:,} tiles, {counts['padded']:,} padded, {counts['with_missing_sections']:,} with missing sections"
    )
    return Made(version, counts)


def open_tiles(dataset: Dataset, synapse_ids: Sequence[int] | None = None) -> tiles.TileReader:
    """The tiles of `rgb_tiles`, as they were made and hashed: the spec may say another stacking by now.

    synapse_ids: for those of some synapses only, in no order, where the index of all need not be in memory.
    Raises `SynpipeError` where they have not been made.
    """
    stacking = read_manifest(dataset, "rgb_tiles").counts["stacking"]
    if synapse_ids is None:
        return tiles.TileReader(read_table(dataset.tiles_path), dataset.bulk_folder, stacking)
    wanted = pa.array(synapse_ids, pa.int64())
    parts = (part.filter(pc.is_in(part["synapse_id"], value_set=wanted)) for part in read_batches(dataset.tiles_path))
    return tiles.TileReader(pa.concat_tables(parts), dataset.bulk_folder, stacking)


def make_rejects(dataset: Dataset, inputs: Inputs, log: Log) -> Made:
    """Every synapse that has no tile: `REJECT_SCHEMA`, and `neuroglancer`, a link to its place (null: there is none)."""
    # What was rejected is in memory; of everything else a part at a time.
    stacks = pa.concat_tables(
        part.filter(pc.is_valid(part["reason"]))
        for part in read_batches(dataset.stacks_path, ["synapse_id", "reason", "detail"])
    )
    count, found = 0, []
    for part in read_batches(dataset.synapses_path):
        count += len(part)
        found.append(part.filter(pc.is_in(part["synapse_id"], value_set=stacks["synapse_id"].combine_chunks())))
    without_tile = stacks.join(pa.concat_tables(found), "synapse_id", join_type="inner")
    unusable = read_table(dataset.synapse_rejects_path).cast(REJECT_SCHEMA)
    rejects = pa.concat_tables([unusable, without_tile.select(REJECT_SCHEMA.names).cast(REJECT_SCHEMA)])
    rejects = rejects.sort_by([("reason", "ascending"), ("synapse_id", "ascending")])
    viewer = find_viewer(dataset)
    links = pa.nulls(len(rejects), pa.string()) if viewer is None else viewer.links(rejects)
    rejects = rejects.append_column("neuroglancer", links)
    version = version_of("rejects", inputs, None if viewer is None else asdict(viewer))
    write_table(dataset.rejects_path, rejects, metadata_of(dataset, version, inputs))
    reasons = _counts(rejects, "reason")
    log(f"{len(rejects):,} rejects: " + (", ".join(f"{count} {reason}" for reason, count in reasons.items()) or "none"))
    share = len(rejects) / max(1, count + len(unusable))
    return Made(version, {"rows": len(rejects), "reasons": reasons, "share": round(share, 4)})


def make_embeddings(dataset: Dataset, name: str, inputs: Inputs, log: Log) -> Made:
    """Embed every tile that this encoder, as it now is, has not embedded before."""
    asset = f"embeddings_{name}"
    spec, who = dataset.encoders[name], dataset.identity(name)
    assert not isinstance(spec, CompressedSpec)  # `derived_steps` makes those
    made, wanted = find_manifest(dataset, asset), None
    if made and made.counts["encoder_identity"] == who and made.inputs == inputs:
        # Nothing has changed, and nobody may read the vectors after this: what is damaged is to be found here.
        wanted = tiles_to_embed(dataset, made.counts["encoder_fingerprint"], verify=True)
        if not wanted.rows:
            # Opening the network takes ten seconds, most of it to import torch, and would change nothing.
            log(f"0 tiles embedded, {wanted.tiles:,} were there")
            version = version_of("embeddings", inputs, [made.counts["encoder_fingerprint"]])
            kept = {name: value for name, value in made.counts.items() if name not in OF_THE_WORK}
            return Made(version, kept | {"tiles_embedded": 0})

    encoders = open_on_all_devices(spec, dataset.weights_base)
    encoder, devices = encoders[0], ", ".join(str(one.device) for one in encoders)
    log(f"{encoder.spec.model} on {devices}, {encoder.dim} dimensions, fingerprint {encoder.fingerprint[:12]}")
    if wanted is None or wanted.cache.fingerprint != encoder.fingerprint:
        wanted = tiles_to_embed(dataset, encoder.fingerprint)
    counts = embed_tiles(dataset, encoders, wanted, log) | {
        "device": devices,
        "encoder_identity": who,
        "encoder_fingerprint": encoder.fingerprint,
        "encoder": {
            "spec": encoder.spec.model_dump(mode="json"),
            "weights": encoder.weights,
            "preprocessing": encoder.preprocessing,
        },
    }
    version = version_of("embeddings", inputs, [encoder.fingerprint])
    return Made(version, counts)


# Figures of embedding that a run without a forward pass has none of.
OF_THE_WORK = ("tiles_per_second", "bytes_read", "device_waited", "gpu_memory_bytes")


@dataclass(frozen=True)
class ToEmbed:
    """What an encoder's cache lacks. tiles: number of all. rows: of the shards that lack some, those of their index, int32 (n,)."""

    cache: EmbeddingCache
    tiles: int
    rows: dict[int, np.ndarray]


def tiles_to_embed(dataset: Dataset, fingerprint: str, verify: bool = False) -> ToEmbed:
    """The tiles that are not in the cache of an encoder. verify: see `EmbeddingCache.known`."""
    cache = EmbeddingCache(dataset.embeddings_folder, fingerprint)
    count, missing = 0, {}
    for shard, index in by_shard(read_batches(dataset.tiles_path, ["shard", "content_hash"])):
        count += len(index)
        rows = cache.lacking(shard_name(shard), index["content_hash"].to_pylist(), verify)
        if len(rows):
            missing[shard] = rows
    return ToEmbed(cache, count, missing)


def embed_tiles(dataset: Dataset, encoders: Sequence[Encoder], wanted: ToEmbed, log: Log) -> dict[str, Any]:
    """Embed the tiles that are not in the encoder's cache, and say how that went, in figures.

    encoders: the same one on each device that is to work; on a cluster its workers open their own.
    """
    started, missing = time.monotonic(), wanted.rows
    stacking = read_manifest(dataset, "rgb_tiles").counts["stacking"]
    progress = Progress(log, sum(map(len, missing.values())), "tiles")
    indexes = by_shard(read_batches(dataset.tiles_path))
    shards = ((shard, index, missing[shard]) for shard, index in indexes if shard in missing)
    if not missing:
        done = embedding.Embedded()
    elif on_cluster():
        lacking = workers.TilesToEmbed(shards, len(missing), dataset.bulk_folder, stacking)
        done = workers.embed(encoders[0], dataset.weights_base, lacking, progress, log)
    else:
        work = (_work(shard, index, rows, dataset, stacking) for shard, index, rows in shards)
        done = embedding.embed_missing(encoders, wanted.cache, work, progress=progress)
    elapsed = time.monotonic() - started
    log(f"{done.tiles:,} tiles embedded, {wanted.tiles - done.tiles:,} were there")
    counts: dict[str, Any] = {"rows": wanted.tiles, "dimensions": encoders[0].dim, "tiles_embedded": done.tiles}
    if done.tiles:
        waited = sum(done.waited_s.values())
        counts |= {"tiles_per_second": round(done.tiles / elapsed, 1), "bytes_read": done.bytes_read}
        counts |= {"device_waited": round(waited / (waited + done.computed_s), 4)}
    if done.gpu_bytes:
        counts["gpu_memory_bytes"] = done.gpu_bytes
    return counts


def _work(shard: int, index: pa.Table, rows: np.ndarray, dataset: Dataset, stacking: str) -> embedding.Shard:
    reader = tiles.TileReader(index, dataset.bulk_folder, stacking)
    return embedding.Shard(shard_name(shard), index["content_hash"].to_pylist(), reader.read, rows)


def make_embedding_table(dataset: Dataset, name: str, inputs: Inputs, log: Log) -> Made:
    """Synapses with their vectors: the Parquet file that other tools read, one row group per shard."""
    made = read_manifest(dataset, f"embeddings_{name}").counts
    version = version_of("embedding_table", inputs, [TABLE_SCHEMA_VERSION])
    path = dataset.table_path(name)
    if path.exists() and not is_whole(path):
        log(f"{path} is damaged: moved to {set_aside(path).name}, and made anew")
    if is_of_version(path, version):
        log("the table is of this version already")
    else:
        provenance = _provenance(dataset, version, inputs) | {
            "encoder": name,
            "encoder_fingerprint": made["encoder_fingerprint"],
            "encoder_details": made["encoder"],
            "dataset_version": digest([inputs["synapses"], inputs["rgb_tiles"]]),
            "schema_version": TABLE_SCHEMA_VERSION,
        }
        cache = EmbeddingCache(dataset.embeddings_folder, made["encoder_fingerprint"])
        columns = ["synapse_id", "shard", "content_hash", "pad_fraction", "missing_sections"]
        paths = {"classifier": dataset.predictions_path(name), "projection": dataset.projection_path(name)}
        derived = [read_batches(file) for kind, file in paths.items() if f"{kind}_{name}" in inputs]
        drift.keep_former(path, dataset.former_table_path(name))
        table.write_embedding_table(
            path,
            read_batches(dataset.synapses_path),
            read_batches(dataset.tiles_path, columns),
            lambda shard, hashes: cache.read(shard_name(shard), hashes),
            provenance,
            derived,
        )
    file = pq.ParquetFile(path)
    vectors = file.schema_arrow.field("vector").type.list_size * file.metadata.num_rows
    kind = drift.figures(drift.take_sample(path))
    counts = {
        "rows": file.metadata.num_rows,
        "dimensions": file.schema_arrow.field("vector").type.list_size,
        "bytes": path.stat().st_size,
        "bytes_per_component": round(path.stat().st_size / vectors, 3),
        "bytes_per_vector": round(_column_bytes(file.metadata, "vector") / file.metadata.num_rows, 1),
        "norm": kind.norm,
        "spread": kind.spread,
        "encoder_identity": made["encoder_identity"],
    }
    log(f"{counts['rows']:,} rows, {counts['bytes'] / 1e6:.1f} MB")
    return Made(version, counts)


def make_index(dataset: Dataset, name: str, inputs: Inputs, log: Log) -> Made:
    """Publish the table as a version of the LanceDB table of the same name."""
    # LanceDB takes two seconds to import, which `synpipe status` and a reload of the code location need not wait for.
    from synpipe.index import publish as index

    version = version_of("index", inputs)
    fingerprint = read_manifest(dataset, f"embeddings_{name}").counts["encoder_fingerprint"]
    # Going back to what was published before, after a swap there and back or a rollback, builds nothing.
    report = index.republish(dataset.lancedb_folder, name, version, fingerprint, log)
    if report:
        log("this version was published before")
    else:
        report = index.publish(dataset.table_path(name), dataset.lancedb_folder, name, version, log)
    log(f"{report.rows:,} rows, {report.kind}, recall@10 {report.recall:.4f}, tag {report.tag}")
    cost = index.cost(dataset.lancedb_folder, name)
    log(f"{cost.bytes / 1e6:.1f} MB, {cost.query_ms:.1f} ms a query")
    return Made(version, asdict(report) | asdict(cost))


def _annotation_files(dataset: Dataset) -> list[Path]:
    return [file for annotation in dataset.spec.annotations for file in annotation.files(dataset.base)]


def _annotations_version(dataset: Dataset) -> str:
    return digest([annotation.fingerprint(dataset.base) for annotation in dataset.spec.annotations])


def status_of(files: Iterable[Path]) -> list[list[Any]]:
    """Size and time of each file or folder: while they stay, its content is not read again."""
    return [[str(file), *size_and_mtime(file)] for file in files if file.exists()]


def _column_bytes(metadata: pq.FileMetaData, name: str) -> int:
    """What a column takes in a Parquet file."""
    groups = (metadata.row_group(number) for number in range(metadata.num_row_groups))
    columns = (group.column(number) for group in groups for number in range(group.num_columns))
    return sum(column.total_compressed_size for column in columns if column.path_in_schema.split(".")[0] == name)


def is_of_version(path: Path, version: str) -> bool:
    """What the file itself says: the manifest may be older where a run was killed between the two."""
    try:
        provenance = json.loads(pq.read_schema(path).metadata[b"synpipe"])
    except (OSError, pa.ArrowInvalid, TypeError, KeyError):  # absent, damaged, or written by something else
        return False
    return provenance["data_version"] == version


def _provenance(dataset: Dataset, version: str, inputs: Inputs) -> dict[str, Any]:
    """Where a file comes from, for its schema's metadata under the key `synpipe`."""
    return {
        "dataset": dataset.name,
        "data_version": version,
        "inputs": dict(inputs),
        "dataset_spec": dataset.spec.model_dump(mode="json"),
        "synpipe_version": __version__,
    }


def metadata_of(dataset: Dataset, version: str, inputs: Inputs) -> dict[str, str]:
    """What a file says of itself: its version and what it was made of."""
    return {"synpipe": json.dumps(_provenance(dataset, version, inputs), sort_keys=True)}


def _counts(found: pa.Table, column: str) -> dict[str, int]:
    """Rows by value, the most frequent first; nulls count as `unlabelled`."""
    counted = found[column].value_counts().to_pylist()
    return {row["values"] or "unlabelled": row["counts"] for row in sorted(counted, key=lambda row: -row["counts"])}


def version_of(step: str, inputs: Mapping[str, str], description: Any = None) -> str:
    """Data version of what a step makes of inputs of these versions, as `description` has it made."""
    return digest([step, CODE_VERSIONS[step], dict(inputs), description])
