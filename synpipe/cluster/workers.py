"""What the workers of a cluster do of a step: the cut-outs, and the vectors, of a shard at a time.

In: on the driver, what is missing. Out: parts in the place of the bulk, as the steps in one process write them. Guarantees:
a worker needs that place, for cut-outs the volume, and nothing else of the driver's: specs and the bytes of the weights
travel to it; it works only if the volume and the encoder are, to the last bit, those that the driver has opened.
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
from synpipe.volumes.volume import AccessDenied, Volume, VolumeSpec

# Of the index of the tiles.
NEEDED_COLUMNS = ("synapse_id", "file", "row", "crc32", "content_hash")


def shard_name(shard: int) -> str:
    return f"{shard:05d}"


@dataclass(frozen=True)
class Cutting:
    """What is cut out of: base: where relative paths start. version: the volume's fingerprint. folder: of the recipe."""

    volume: VolumeSpec
    base: Path
    version: str
    tiles: TileSpec
    folder: BulkPath


def cut_out(plan: Cutting, starts: np.ndarray, progress: Callable[[int], None], log: Log) -> Failures:
    """Windows, int64 (n, 3), each once, cut out by the workers; else as `extraction.cut_out_windows`.

    Shards are read apart: a chunk of the volume that two of them need is fetched twice.
    """
    by_shard = dict(rows_by_shard(shard_of(starts, plan.tiles)))
    needs = ((shard_name(shard), (shard, starts[rows])) for shard, rows in by_shard.items())
    failures = Failures()
    for name, result in connect().run(prepare_cutting, plan, needs, len(by_shard), log):
        if isinstance(result, AccessDenied):
            raise result
        if isinstance(result, SynpipeError):
            # Not the volume's fault: the worker died, or could not write.
            result = Failures({int(name): result}, lost=len(by_shard[int(name)]))
        failures.by_shard |= result.by_shard
        failures.lost += result.lost
        progress(result.made)
        failures.in_a_row = failures.in_a_row + 1 if result.by_shard and not result.made else 0
        if failures.gave_up:
            break
    return failures


def prepare_cutting(plan: Cutting) -> Work:
    volume = Volume(plan.volume, plan.base)
    if volume.fingerprint() != plan.version:
        raise SynpipeError(
            f"Volume {volume.path} is another one than that of the driver: on all machines its path must lead to the same "
            "data."
        )

    def work(needs: tuple[int, np.ndarray], again: bool) -> Failures:
        shard, starts = needs
        if again:
            starts = extraction.missing_windows(plan.folder, shard, starts)
        return extraction.cut_out_windows(volume, plan.tiles, plan.folder, starts) if len(starts) else Failures()

    return work


@dataclass(frozen=True)
class Embedding:
    """What is embedded, and by what. weights: the content of the file, None where there is none. bulk: where tiles lie."""

    spec: TileEncoderSpec
    weights: bytes | None
    suffix: str
    fingerprint: str
    bulk: BulkPath
    embeddings: BulkPath
    stacking: str
    device: str


def embed(
    encoder: Encoder,
    weights_base: Path,
    shards: Iterable[tuple[int, pa.Table, np.ndarray]],
    count: int,
    bulk: BulkPath,
    stacking: str,
    progress: Callable[[int], None],
    log: Log,
) -> embedding.EmbedStats:
    """Embed tiles that are in no part yet.

    weights_base: where the encoder's relative paths start. shards: `count` of them, each with the index of its tiles and those
    rows of it that are to be embedded; index and stacking: see `TileReader`.
    Raises `SynpipeError` where a shard failed, after all others have been embedded.
    """
    cluster = connect()
    on_gpus = encoder.spec.is_network and cluster.has_gpus()
    path = weights_file(encoder.spec, weights_base)
    plan = Embedding(
        spec=encoder.spec,
        weights=None if path is None else path.read_bytes(),
        suffix="" if path is None else path.suffix,
        fingerprint=encoder.fingerprint,
        bulk=bulk,
        embeddings=bulk / "embeddings",
        stacking=stacking,
        device="auto" if on_gpus else "cpu",
    )
    needs = (
        (shard_name(shard), (shard_name(shard), index.select(NEEDED_COLUMNS), rows)) for shard, index, rows in shards
    )
    embedded, failed = embedding.EmbedStats(), {}
    for name, result in cluster.run(prepare_embedding, plan, needs, count, log, on_gpus):
        if isinstance(result, SynpipeError):
            failed[name] = result
            continue
        embedded.add(result)
        progress(result.tiles)
    if failed:
        raise SynpipeError(
            f"{len(failed)} of {count} shards were not embedded ({extraction.name_some(failed)}). The first error: "
            f"{next(iter(failed.values()))} All other vectors are kept: run the same command again, and only those that are "
            "not there are computed."
        )
    return embedded


def prepare_embedding(plan: Embedding) -> Work:
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
            "versions of torch and timm on both, best as one image."
        )
    encoder = replace(opened, spec=plan.spec)  # parts say what made them, and not where its weights lay for a moment

    def work(needs: tuple[str, pa.Table, np.ndarray], again: bool) -> embedding.EmbedStats:
        shard, index, rows = needs
        hashes, reader = index["content_hash"].to_pylist(), TileReader(index, plan.bulk, plan.stacking)
        # Whoever was at it before may have finished some parts.
        wanted = embedding.Shard(shard, hashes, reader.read, None if again else rows)
        return embedding.embed_missing([encoder], EmbeddingCache(plan.embeddings, plan.fingerprint), [wanted])

    return work
