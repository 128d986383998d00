"""The asset `embeddings` of an encoder: a vector per tile, in a cache under (content of the tile, fingerprint of the encoder)."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa

from synpipe.assets import rgb_tiles
from synpipe.assets.asset import (
    Asset,
    Finding,
    Leftover,
    Made,
    Task,
    View,
    file_leftover,
    list_complete,
    no_files,
    view_of_figures,
)
from synpipe.assets.manifest import data_version_of, find_manifest
from synpipe.cluster import workers
from synpipe.cluster.engines import on_cluster
from synpipe.cluster.workers import shard_name
from synpipe.datasets import Dataset
from synpipe.embeddings import embed
from synpipe.embeddings.cache import EmbeddingCache, open_vector_part
from synpipe.embeddings.encoders import Encoder, open_on_all_devices
from synpipe.errors import SynpipeError
from synpipe.progress import Log, Progress
from synpipe.store.files import read_table
from synpipe.store.streams import by_shard, read_batches
from synpipe.tiles.tile import TileReader, rows_by_shard

CODE_VERSION = "1"

# Vectors of one encoder that differ by less than this share of their length carry nothing; random weights give 10⁻².
MIN_SPREAD = 1e-4
CHECKED_SHARDS = 16
CHECKED_PER_SHARD = 128

# Figures of embedding that a run without a forward pass has none of.
FIGURES_OF_THE_WORK = ("tiles_per_second", "bytes_read", "device_waited", "gpu_memory_bytes")


@dataclass(frozen=True)
class EmbeddingsFacts:
    """encoder_identity: what the registry declared when the vectors were made. encoder_fingerprint: the key of the vectors.
    encoder: spec, weights and preprocessing of the encoder, for the provenance of a row."""

    dimensions: int
    encoder_identity: str
    encoder_fingerprint: str
    encoder: dict[str, Any]


def make(task: Task) -> Made[EmbeddingsFacts]:
    """Embed every tile that this encoder, as it is now, has not embedded before."""
    dataset = task.dataset
    spec, identity = dataset.encoders[task.encoder], dataset.identity(task.encoder)
    assert spec.base is None  # `compressed` makes the others
    missing: MissingTiles | None = None
    if task.previous is not None and task.previous.inputs == task.inputs:
        facts = ASSET.parse(task.previous)
        if facts.encoder_identity == identity:
            # Nothing has changed. Later assets may not read every vector, so damage must be found here.
            missing = find_missing(dataset, facts.encoder_fingerprint, verify=True)
            if not missing.rows:
                # Opening the network would take ten seconds, most of them to import torch, and change nothing.
                task.log(f"0 tiles embedded, {missing.tiles:,} were there")
                version = data_version_of("embeddings", CODE_VERSION, task.inputs, [facts.encoder_fingerprint])
                kept = {
                    name: figure for name, figure in task.previous.figures.items() if name not in FIGURES_OF_THE_WORK
                }
                return Made(version, facts, missing.tiles, kept | {"tiles_embedded": 0}, [])

    encoders = open_on_all_devices(spec, dataset.weights_base)
    encoder, devices = encoders[0], ", ".join(str(one.device) for one in encoders)
    if spec.is_network:
        for each in encoders:
            spec.check_loaded(each.weights, identity)
    task.log(f"{encoder.spec.model} on {devices}, {encoder.dim} dimensions, fingerprint {encoder.fingerprint[:12]}")
    if missing is None or missing.cache.fingerprint != encoder.fingerprint:
        missing = find_missing(dataset, encoder.fingerprint)
    figures = embed_tiles(dataset, encoders, missing, task.log) | {"device": devices}
    details = {
        "spec": encoder.spec.model_dump(mode="json"),
        "weights": encoder.weights,
        "preprocessing": encoder.preprocessing,
    }
    facts = EmbeddingsFacts(encoder.dim, identity, encoder.fingerprint, details)
    version = data_version_of("embeddings", CODE_VERSION, task.inputs, [encoder.fingerprint])
    return Made(version, facts, missing.tiles, {"dimensions": encoder.dim} | figures | _shown(facts))


def _shown(facts: EmbeddingsFacts) -> dict[str, Any]:
    return {"encoder_fingerprint": facts.encoder_fingerprint, "encoder": facts.encoder}


def open_cache(dataset: Dataset, encoder: str) -> EmbeddingCache:
    """The vectors of an encoder as they were last made. Raises `SynpipeError` if they have not been made."""
    return EmbeddingCache(dataset.embeddings_folder, ASSET.read(dataset, encoder).encoder_fingerprint)


@dataclass(frozen=True)
class MissingTiles:
    """What an encoder's cache lacks. tiles: number of all tiles. rows: by shard, rows of its index whose vectors are missing,
    int32 (n,); shards that lack nothing are left out."""

    cache: EmbeddingCache
    tiles: int
    rows: dict[int, np.ndarray]


def find_missing(dataset: Dataset, fingerprint: str, verify: bool = False) -> MissingTiles:
    """The tiles that are not in the cache of an encoder. verify: see `EmbeddingCache.known_hashes`."""
    cache = EmbeddingCache(dataset.embeddings_folder, fingerprint)
    count, missing = 0, {}
    for shard, index in by_shard(read_batches(dataset.tiles_path, ["shard", "content_hash"])):
        count += len(index)
        rows = cache.missing_rows(shard_name(shard), index["content_hash"].to_pylist(), verify)
        if len(rows):
            missing[shard] = rows
    return MissingTiles(cache, count, missing)


def embed_tiles(dataset: Dataset, encoders: Sequence[Encoder], missing: MissingTiles, log: Log) -> dict[str, Any]:
    """Embed the tiles that the cache lacks; returns figures of how that went.

    encoders: the same encoder on each device that is to work; the workers of a cluster open their own.
    """
    started = time.monotonic()
    stacking = rgb_tiles.ASSET.read(dataset).stacking
    progress = Progress(log, sum(map(len, missing.rows.values())), "tiles")
    indexes = by_shard(read_batches(dataset.tiles_path))
    shards = ((shard, index, missing.rows[shard]) for shard, index in indexes if shard in missing.rows)
    if not missing.rows:
        done = embed.EmbedStats()
    elif on_cluster():
        tiles = workers.TilesToEmbed(shards, len(missing.rows), dataset.bulk_folder, stacking)
        done = workers.embed(encoders[0], dataset.weights_base, tiles, progress, log)
    else:
        work = (_shard_work(shard, index, rows, dataset, stacking) for shard, index, rows in shards)
        done = embed.embed_missing(encoders, missing.cache, work, progress=progress)
    elapsed_s = time.monotonic() - started
    log(f"{done.tiles:,} tiles embedded, {missing.tiles - done.tiles:,} were there")
    figures: dict[str, Any] = {"tiles_embedded": done.tiles}
    if done.tiles:
        waited_s = sum(done.waited_s.values())
        figures |= {"tiles_per_second": round(done.tiles / elapsed_s, 1), "bytes_read": done.bytes_read}
        figures |= {"device_waited": round(waited_s / (waited_s + done.computed_s), 4)}
    if done.gpu_bytes:
        figures["gpu_memory_bytes"] = done.gpu_bytes
    return figures


def _shard_work(shard: int, index: pa.Table, rows: np.ndarray, dataset: Dataset, stacking: str) -> embed.Shard:
    reader = TileReader(index, dataset.bulk_folder, stacking)
    return embed.Shard(shard_name(shard), index["content_hash"].to_pylist(), reader.read, rows)


def read_vectors_of(cache: EmbeddingCache, tiles: pa.Table) -> np.ndarray:
    """Vectors of tiles (columns `shard`, `content_hash`) in their order, float32 (n, d), n > 0.

    Beside the result one shard is in memory at a time. Raises `SynpipeError` if there is no tile.
    """
    if not len(tiles):
        raise SynpipeError("There is no tile, so there are no vectors. Look at the rejects.")
    vectors: np.ndarray | None = None
    for shard, rows in rows_by_shard(tiles["shard"].to_numpy()):
        read = cache.read(shard_name(shard), tiles["content_hash"].take(rows).to_pylist())
        if vectors is None:
            vectors = np.empty((len(tiles), read.shape[1]), np.float32)
        vectors[rows] = read
    assert vectors is not None
    return vectors


def vectors_vary(dataset: Dataset, encoder: str) -> Finding:
    """The vectors of the first shards are finite and not all alike."""
    # Hashes are in the order of space, so this sample comes from everywhere. One shard is in memory at a time.
    cache, sample = open_cache(dataset, encoder), []
    for shard, tiles in islice(by_shard(read_batches(dataset.tiles_path, ["shard", "content_hash"])), CHECKED_SHARDS):
        hashes = list(dict.fromkeys(tiles["content_hash"].to_pylist()))[:CHECKED_PER_SHARD]
        sample.append(cache.read(shard_name(shard), hashes))
    vectors = np.concatenate(sample)
    if not np.isfinite(vectors).all():
        return Finding(False, "There are NaN or infinite values.", {"vectors": len(vectors)})
    length = float(np.linalg.norm(vectors, axis=1).mean())
    spread = float(np.linalg.norm(vectors.std(axis=0))) / length if length else 0.0
    figures = {"spread": round(spread, 6), "vectors": len(vectors)}
    if len(vectors) > 1 and spread < MIN_SPREAD:
        text = f"The vectors are constant (spread {spread:.2g}): this encoder tells nothing apart."
        return Finding(False, text, figures)
    return Finding(True, f"The vectors spread by {spread:.2g} of their length.", figures)


def find_leftovers(dataset: Dataset, fresh: bool) -> Iterator[Leftover]:
    """Vectors of fingerprints that no encoder of the data set has, and vectors of tiles that are gone."""
    if not fresh:
        return
    # A classifier has vectors of its own if it has trained the network further.
    names = [f"{kind}_{encoder}" for kind in ("embeddings", "classifier") for encoder in dataset.encoders]
    manifests = [find_manifest(dataset, name) for name in names]
    fingerprints = {manifest.facts.get("encoder_fingerprint") for manifest in manifests if manifest}
    hashes = set(read_table(dataset.tiles_path, ["content_hash"])["content_hash"].to_pylist())
    for path in list_complete(dataset.compressor_path("any").parent, "*.safetensors"):
        if path.stem not in fingerprints:
            yield file_leftover(path, "fit of a compressed encoder no longer used")
    for path in list_complete(dataset.embeddings_folder, "*/*.parquet"):
        if path.parent.name not in fingerprints:
            yield file_leftover(path, "vectors of an encoder no longer used")
            continue
        try:
            content = open_vector_part(path).read(["content_hash"])["content_hash"]
        except (pa.ArrowException, OSError):
            continue  # damaged: the next run that reads it moves it aside
        if hashes.isdisjoint(content.to_pylist()):
            yield file_leftover(path, "vectors of tiles no longer there")


ASSET = Asset(
    name="embeddings",
    per_encoder=True,
    exists=lambda dataset, encoder: dataset.encoders[encoder].base is None,
    description="A vector per tile. Only tiles that this encoder has not seen are embedded.",
    storage=frozenset({"pytorch"}),
    facts=EmbeddingsFacts,
    reads=lambda dataset, encoder: ("rgb_tiles",),
    optional_reads=False,
    version_covers_reads=True,
    code_version=CODE_VERSION,
    still_valid=(),
    # Dagster's staleness looks one hop up only, so the identity of an encoder is part of every code version of its branch.
    specs=lambda dataset, encoder: dataset.identity(encoder),
    make=make,
    source_version=None,
    checks={"vectors_vary": vectors_vary},
    files=no_files,
    names_tiles=False,
    leftovers=find_leftovers,
    columns={},
    table_columns=(),
    show=lambda dataset, encoder, manifest: View(view_of_figures(manifest)),
)
