"""The asset `embeddings` of a compressed encoder such as `em_d4+pca32`: fewer dimensions, fitted on its base's vectors."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import replace

from synpipe.assets import embeddings
from synpipe.assets.asset import Asset, Made, Task, View, count_rows, no_files, no_leftovers, view_of_figures
from synpipe.assets.embeddings import EmbeddingsFacts, open_cache, read_vectors_of, vectors_vary
from synpipe.assets.manifest import data_version_of
from synpipe.cluster.workers import shard_name
from synpipe.datasets import Dataset
from synpipe.embeddings import compression
from synpipe.embeddings.cache import EmbeddingCache
from synpipe.embeddings.encoders import Encoder, open_encoder
from synpipe.embeddings.forward import FunctionForward
from synpipe.errors import SynpipeError
from synpipe.specs import digest
from synpipe.store.files import atomic_path
from synpipe.store.streams import SmallestHashes, by_shard, read_batches

CODE_VERSION = embeddings.CODE_VERSION


def make(task: Task) -> Made[EmbeddingsFacts]:
    """Fit on the base encoder's vectors of these tiles, then compress all of them. No tile is read."""
    dataset = task.dataset
    spec, identity = dataset.encoders[task.encoder], dataset.identity(task.encoder)
    assert spec.base is not None
    count = count_rows(dataset.tiles_path)
    if task.previous is not None and task.previous.inputs == task.inputs:
        facts = ASSET.parse(task.previous)
        cache = EmbeddingCache(dataset.embeddings_folder, facts.encoder_fingerprint)
        if facts.encoder_identity == identity and next(_missing(dataset, cache, verify=True), None) is None:
            task.log(f"0 vectors compressed, {count:,} were there")
            version = data_version_of("embeddings", CODE_VERSION, task.inputs, [facts.encoder_fingerprint])
            return Made(version, facts, count, task.previous.figures | {"vectors_compressed": 0})

    base = embeddings.ASSET.read(dataset, spec.base)
    source = open_cache(dataset, spec.base)
    smallest = SmallestHashes(["content_hash"], compression.SAMPLE_ROWS)
    for part in read_batches(dataset.tiles_path, ["shard", "content_hash"]):
        smallest.add(part)
    sample = smallest.rows()
    fitted, variance_kept = compression.fit(read_vectors_of(source, sample), spec)
    content = fitted.to_bytes()
    weights = f"sha256:{hashlib.sha256(content).hexdigest()}"
    fingerprint = digest([base.encoder_fingerprint, weights])
    with atomic_path(dataset.compressor_path(fingerprint)) as temporary:
        temporary.write_bytes(content)
    task.log(f"{spec.base} {base.dimensions} → {spec.dimensions} dimensions, {variance_kept:.1%} of the variance kept")

    cache = EmbeddingCache(dataset.embeddings_folder, fingerprint)
    metadata = {"encoder": json.dumps(spec.model_dump(mode="json")), "base_fingerprint": base.encoder_fingerprint}
    compressed = 0
    for shard, hashes in _missing(dataset, cache, verify=False):
        cache.add(shard, hashes, fitted.compress(source.read(shard, hashes)), metadata)
        compressed += len(hashes)
    task.log(f"{compressed:,} vectors compressed, {count - compressed:,} were there")
    details = {
        "spec": spec.model_dump(mode="json"),
        "weights": weights,
        "preprocessing": base.encoder["preprocessing"],
        "base_fingerprint": base.encoder_fingerprint,
        "base": base.encoder,
    }
    figures = {
        "dimensions": spec.dimensions,
        "tiles_embedded": 0,
        "vectors_compressed": compressed,
        "fitted_on": len(sample),
        "base": spec.base,
        "base_dimensions": base.dimensions,
        "variance_kept": round(variance_kept, 4),
        "encoder_fingerprint": fingerprint,
        "encoder": details,
    }
    facts = EmbeddingsFacts(spec.dimensions, identity, fingerprint, details)
    return Made(data_version_of("embeddings", CODE_VERSION, task.inputs, [fingerprint]), facts, count, figures)


def _missing(dataset: Dataset, cache: EmbeddingCache, verify: bool) -> Iterator[tuple[str, list[str]]]:
    """Name of each shard for which the cache lacks vectors, and the content hashes of their tiles, each once.

    verify: see `EmbeddingCache.known_hashes`.
    """
    for shard, index in by_shard(read_batches(dataset.tiles_path, ["shard", "content_hash"])):
        hashes = index["content_hash"].to_pylist()
        if len(rows := cache.missing_rows(shard_name(shard), hashes, verify)):
            yield shard_name(shard), [hashes[row] for row in rows]


def open_branch(dataset: Dataset, encoder: str, device: str = "auto") -> Encoder:
    """The encoder of a branch, ready to embed tiles from elsewhere; a compressed one as it was last fitted.

    Raises `SynpipeError` as `open_encoder` does, and if the fit belongs to a former state of the base encoder.
    """
    spec = dataset.encoders[encoder]
    if spec.base is None:
        return open_encoder(spec, dataset.weights_base, device)
    facts = ASSET.read(dataset, encoder)
    fitted = compression.load(dataset.compressor_path(facts.encoder_fingerprint))
    base = open_branch(dataset, spec.base, device)
    if base.fingerprint != facts.encoder["base_fingerprint"]:
        raise SynpipeError(
            f"{encoder} was fitted on a former state of {spec.base}. Run `synpipe materialize --dataset {dataset.name} --stale`."
        )
    return replace(
        base,
        weights=facts.encoder["weights"],
        fingerprint=facts.encoder_fingerprint,
        dim=spec.dimensions,
        forward=FunctionForward(lambda tiles: fitted.compress(base.embed(tiles))),
    )


def _reads(dataset: Dataset, encoder: str) -> tuple[str, ...]:
    spec = dataset.encoders[encoder]
    assert spec.base is not None
    return "rgb_tiles", f"embeddings_{spec.base}"


ASSET = Asset(
    name="embeddings",
    per_encoder=True,
    exists=lambda dataset, encoder: dataset.encoders[encoder].base is not None,
    description="A short vector per tile, computed from the vectors of the base encoder.",
    storage=frozenset({"pytorch"}),
    facts=EmbeddingsFacts,
    reads=_reads,
    optional_reads=False,
    version_covers_reads=True,
    code_version=CODE_VERSION,
    still_valid=(),
    specs=lambda dataset, encoder: dataset.identity(encoder),
    make=make,
    source_version=None,
    checks={"vectors_vary": vectors_vary},
    files=no_files,
    names_tiles=False,
    leftovers=no_leftovers,  # `embeddings` lists the vectors and fits of all encoders
    columns={},
    table_columns=(),
    show=lambda dataset, encoder, manifest: View(view_of_figures(manifest)),
)
