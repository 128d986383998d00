"""Cuts out tiles and embeds them on the workers of a cluster, one shard at a time.

Input, on the driver: the windows or the tiles that are missing. Output: parts in the bulk folder, the same as those that
the steps write in one process. Guarantees: a worker needs the bulk folder and, for cut-outs, the volume, but no other file
of the driver, because specs and the bytes of the weights are sent to it. It works only if its volume and encoder are
identical, to the last bit, to those that the driver has opened.
"""

import socket
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa

from synpipe.cluster.engines import Work, connect
from synpipe.embeddings import embed as embedding
from synpipe.embeddings.cache import EmbeddingCache
from synpipe.embeddings.encoder_specs import TileEncoderSpec
from synpipe.embeddings.encoders import Encoder, open_encoder, weights_file
from synpipe.errors import SynpipeError
from synpipe.progress import Log
from synpipe.store.objects import BulkPath
from synpipe.tiles import extraction
from synpipe.tiles.extraction import Failures
from synpipe.tiles.tile import TileReader, TileSpec, rows_by_shard, shard_of
from synpipe.volumes.volume import Volume, VolumeSpec, VolumeUnusable

# The columns of the tile index that a worker needs.
NEEDED_COLUMNS = ("synapse_id", "file", "row", "crc32", "content_hash")


def shard_name(shard: int) -> str:
    return f"{shard:05d}"


@dataclass(frozen=True)
class CutOutPlan:
    """What the workers need to cut out tiles.

    volume, tiles: the specs. base: the folder where relative paths start. version: fingerprint of the volume. folder: the
    folder of the recipe.
    """

    volume: VolumeSpec
    base: Path
    version: str
    tiles: TileSpec
    folder: BulkPath


def cut_out(plan: CutOutPlan, starts: np.ndarray, progress: Callable[[int], None], log: Log) -> Failures:
    """Let the workers cut out windows. starts: first voxels, int64 (n, 3), each window once.

    Does the same as `extraction.cut_out_windows`, except that the shards are read independently: a chunk of the volume that
    two shards need is fetched twice.
    """
    by_shard = dict(rows_by_shard(shard_of(starts, plan.tiles)))
    inputs = ((shard_name(shard), (shard, starts[rows])) for shard, rows in by_shard.items())
    failures = Failures()
    for name, result in connect().run(prepare_cut_outs, plan, inputs, len(by_shard), log):
        if isinstance(result, VolumeUnusable):
            raise result
        if isinstance(result, SynpipeError):
            # The volume is not the cause: the worker died, or could not write.
            result = Failures({int(name): result}, lost=len(by_shard[int(name)]))
        failures.by_shard |= result.by_shard
        failures.lost += result.lost
        progress(result.made)
        failures.in_a_row = failures.in_a_row + 1 if result.by_shard and not result.made else 0
        if failures.gave_up:
            break
    return failures


def prepare_cut_outs(plan: CutOutPlan) -> Work:
    """Open the volume on a worker. Raises `SynpipeError` if it differs from the driver's."""
    volume = Volume(plan.volume, plan.base)
    if volume.fingerprint() != plan.version:
        raise SynpipeError(
            f"Volume {volume.path} differs from the driver's: its path must lead to the same data on all machines."
        )

    def work(shard_input: tuple[int, np.ndarray], is_retry: bool) -> Failures:
        shard, starts = shard_input
        if is_retry:
            starts = extraction.missing_windows(plan.folder, shard, starts)
        return extraction.cut_out_windows(volume, plan.tiles, plan.folder, starts) if len(starts) else Failures()

    return work


@dataclass(frozen=True)
class TilesToEmbed:
    """The tiles that an encoder has not embedded yet.

    shards: for each shard its number, the index of its tiles, and the rows of that index to embed. count: number of shards.
    bulk: the folder with the tiles and the embeddings. stacking: see `TileSpec`.
    """

    shards: Iterable[tuple[int, pa.Table, np.ndarray]]
    count: int
    bulk: BulkPath
    stacking: str


@dataclass(frozen=True)
class EmbeddingPlan:
    """What the workers need to embed tiles.

    weights, suffix: content and name suffix of the weights file; None and "" if there is none. fingerprint: of the
    encoder. bulk, stacking: see `TilesToEmbed`. device: where the encoder runs, see `open_encoder`.
    """

    spec: TileEncoderSpec
    weights: bytes | None
    suffix: str
    fingerprint: str
    bulk: BulkPath
    stacking: str
    device: str


def embed(
    encoder: Encoder, weights_base: Path, tiles: TilesToEmbed, progress: Callable[[int], None], log: Log
) -> embedding.EmbedStats:
    """Let the workers embed tiles. weights_base: the folder where the encoder's relative paths start.

    Raises `SynpipeError` if a shard failed, after all other shards have been embedded.
    """
    cluster = connect()
    on_gpus = encoder.spec.is_network and cluster.has_gpus()
    path = weights_file(encoder.spec, weights_base)
    plan = EmbeddingPlan(
        spec=encoder.spec,
        weights=None if path is None else path.read_bytes(),
        suffix="" if path is None else path.suffix,
        fingerprint=encoder.fingerprint,
        bulk=tiles.bulk,
        stacking=tiles.stacking,
        device="auto" if on_gpus else "cpu",
    )
    inputs = (
        (shard_name(shard), (shard_name(shard), index.select(NEEDED_COLUMNS), rows))
        for shard, index, rows in tiles.shards
    )
    embedded, failed = embedding.EmbedStats(), {}
    for name, result in cluster.run(prepare_embedding, plan, inputs, tiles.count, log, on_gpus):
        if isinstance(result, SynpipeError):
            failed[name] = result
            continue
        embedded.add(result)
        progress(result.tiles)
    if failed:
        raise SynpipeError(
            f"{len(failed)} of {tiles.count} shards were not embedded ({extraction.name_some(failed)}). The first error: "
            f"{next(iter(failed.values()))} All other vectors are kept: run the same command again to compute only the "
            "missing ones."
        )
    return embedded


def prepare_embedding(plan: EmbeddingPlan) -> Work:
    """Open the encoder on a worker. Raises `SynpipeError` if its fingerprint differs from the driver's."""
    with tempfile.TemporaryDirectory(prefix="synpipe-") as folder:
        spec = plan.spec
        if plan.weights is not None:
            path = Path(folder) / f"weights{plan.suffix}"
            path.write_bytes(plan.weights)
            spec = spec.model_copy(update={"weights": path.name})
        opened = open_encoder(spec, Path(folder), plan.device)
    if opened.fingerprint != plan.fingerprint:
        raise SynpipeError(
            f"The encoder {plan.spec.model_dump(mode='json', exclude_defaults=True)} has the fingerprint "
            f"{opened.fingerprint[:12]} on {socket.gethostname()} and {plan.fingerprint[:12]} on the driver: install the same "
            "versions of torch and timm on both, preferably with the same image."
        )
    # Parts record the spec of their encoder. It must not name the temporary file.
    encoder = replace(opened, spec=plan.spec)

    def work(shard_input: tuple[str, pa.Table, np.ndarray], is_retry: bool) -> embedding.EmbedStats:
        shard, index, rows = shard_input
        hashes, reader = index["content_hash"].to_pylist(), TileReader(index, plan.bulk, plan.stacking)
        # A worker that died may have finished some parts, so `embed_missing` then looks for the missing rows itself.
        shard_to_embed = embedding.Shard(shard, hashes, reader.read, None if is_retry else rows)
        cache = EmbeddingCache(plan.bulk / "embeddings", plan.fingerprint)
        return embedding.embed_missing([encoder], cache, [shard_to_embed])

    return work
