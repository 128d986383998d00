"""The steps that make something of an encoder's vectors: compressed vectors, and the map.

In: a `Dataset` and the data versions of the step's inputs; vectors are read from the cache. Out: files in the data set's
folder, and `Made`. Guarantees: as in `synpipe.pipeline`; no tile is read and nothing is embedded.
"""

import hashlib
import json
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from synpipe import compression, projection
from synpipe.datasets import Dataset
from synpipe.embedding_cache import EmbeddingCache
from synpipe.encoders import Encoder, open_encoder
from synpipe.errors import SynpipeError
from synpipe.forward import Computed
from synpipe.manifests import find_manifest, read_manifest
from synpipe.pipeline import Inputs, Log, Made, is_of_version, metadata_of, shard_name, version_of
from synpipe.shards import atomic_path, read_table, write_table
from synpipe.specs import digest

# Vectors that are placed on a fitted map at once: beyond what the fit took, memory does not grow with the data set.
TRANSFORM_ROWS = 20_000


def make_compressed_embeddings(dataset: Dataset, name: str, inputs: Inputs, log: Log) -> Made:
    """Fit on the base encoder's vectors of these tiles, and compress all of them."""
    spec = dataset.encoders[name]
    assert isinstance(spec, compression.CompressedSpec)
    who = dataset.identity(name)
    base = read_manifest(dataset, f"embeddings_{spec.base}").counts
    tiles = read_table(dataset.tiles_path, ["shard", "content_hash"])
    made = find_manifest(dataset, f"embeddings_{name}")
    if made and made.counts["encoder_identity"] == who and made.inputs == inputs:
        fingerprint = made.counts["encoder_fingerprint"]
        if not _missing(tiles, EmbeddingCache(dataset.embeddings_folder, fingerprint)):
            log(f"0 vectors compressed, {len(tiles):,} were there")
            return Made(version_of("embeddings", inputs, [fingerprint]), made.counts | {"vectors_compressed": 0})

    source = EmbeddingCache(dataset.embeddings_folder, base["encoder_fingerprint"])
    sample = _smallest_hashes(tiles, compression.SAMPLE_ROWS)
    fitted, kept = compression.fit(_read(source, sample), spec)
    content = fitted.to_bytes()
    weights = f"sha256:{hashlib.sha256(content).hexdigest()}"
    fingerprint = digest([base["encoder_fingerprint"], weights])
    with atomic_path(dataset.compressor_path(fingerprint)) as temporary:
        temporary.write_bytes(content)
    log(f"{spec.base} {base['dimensions']} → {spec.dimensions} dimensions, {kept:.1%} of the variance kept")

    cache = EmbeddingCache(dataset.embeddings_folder, fingerprint)
    missing = _missing(tiles, cache)
    metadata = {"encoder": json.dumps(spec.model_dump(mode="json")), "base_fingerprint": base["encoder_fingerprint"]}
    for shard, hashes in missing.items():
        cache.add(shard, hashes, fitted.compress(source.read(shard, hashes)), metadata)
    count = sum(map(len, missing.values()))
    log(f"{count:,} vectors compressed, {len(tiles) - count:,} were there")
    counts = {
        "rows": len(tiles),
        "dimensions": spec.dimensions,
        "tiles_embedded": 0,
        "vectors_compressed": count,
        "fitted_on": len(sample),
        "base": spec.base,
        "base_dimensions": base["dimensions"],
        "variance_kept": round(kept, 4),
        "encoder_identity": who,
        "encoder_fingerprint": fingerprint,
        "encoder": {
            "spec": spec.model_dump(mode="json"),
            "weights": weights,
            "preprocessing": base["encoder"]["preprocessing"],
            "base_fingerprint": base["encoder_fingerprint"],
            "base": base["encoder"],
        },
    }
    return Made(version_of("embeddings", inputs, [fingerprint]), counts)


def open_branch(dataset: Dataset, name: str, device: str = "auto") -> Encoder:
    """The encoder of a branch, ready to embed tiles that are not of the data set; a compressed one as it was last fitted.

    Raises `SynpipeError` as `open_encoder` does, and where that fit was made of another state of its base.
    """
    spec = dataset.encoders[name]
    if not isinstance(spec, compression.CompressedSpec):
        return open_encoder(spec, dataset.weights_base, device)
    made = read_manifest(dataset, f"embeddings_{name}").counts
    fitted = compression.load(dataset.compressor_path(made["encoder_fingerprint"]))
    base = open_branch(dataset, spec.base, device)
    if base.fingerprint != made["encoder"]["base_fingerprint"]:
        raise SynpipeError(
            f"{name} was fitted on {spec.base} as it was before: `synpipe materialize --dataset {dataset.name} --stale`."
        )
    return replace(
        base,
        weights=made["encoder"]["weights"],
        fingerprint=made["encoder_fingerprint"],
        dim=spec.dimensions,
        forward=Computed(lambda tiles: fitted.compress(base.embed(tiles))),
    )


def make_projection(dataset: Dataset, name: str, inputs: Inputs, log: Log) -> Made:
    """A place in the plane for every tile's synapse: `projections/<encoder>.parquet`."""
    spec = dataset.spec.projection
    assert spec is not None
    # Of the vectors alone: a changed label colours the picture anew and moves no point.
    of_vectors = {asset: version for asset, version in inputs.items() if asset != "synapses"}
    version = version_of("projection", of_vectors, spec.model_dump(mode="json"))
    path = dataset.projection_path(name)
    columns = ["synapse_id", "shard", "content_hash"]
    tiles = read_table(dataset.tiles_path, columns).sort_by("synapse_id")
    if is_of_version(path, version):
        log("the map is of this version already")
    else:
        made = read_manifest(dataset, f"embeddings_{name}").counts
        cache = EmbeddingCache(dataset.embeddings_folder, made["encoder_fingerprint"])
        places = _places(tiles, cache, spec, log)
        # What has no neighbour has no place: UMAP says NaN.
        map_x, map_y = (pa.array(places[:, axis], pa.float32(), from_pandas=True) for axis in (0, 1))
        table = pa.table({"synapse_id": tiles["synapse_id"], "map_x": map_x, "map_y": map_y})
        write_table(path, table, metadata_of(dataset, version, inputs))
    count = len(tiles)
    method = "umap" if projection.enough_for_umap(count, spec) else "pca"
    notes = []
    if method == "pca":
        notes.append(f"{count} synapses are too few for UMAP: the map shows the two first principal components.")
    counts = {"rows": count, "method": method, "fitted_on": min(count, projection.FIT_ROWS)}
    return Made(version, counts | spec.model_dump(mode="json"), notes)


def _places(tiles: pa.Table, cache: EmbeddingCache, spec: projection.ProjectionSpec, log: Log) -> np.ndarray:
    """Places of all tiles, float32 (n, 2): those of a sample are fitted, and the others placed among them."""
    count = len(tiles)
    # The smallest hashes are a sample at random, and mostly the same one after synapses were added.
    order = pc.sort_indices(tiles, [("content_hash", "ascending"), ("synapse_id", "ascending")]).to_numpy()
    fitted = np.sort(order[: projection.FIT_ROWS])
    log(f"laying out {len(fitted):,} vectors")
    places = np.empty((count, 2), np.float32)
    places[fitted], place = projection.fit_map(_read(cache, tiles.take(fitted)), spec)
    rest = order[projection.FIT_ROWS :]
    rest = rest[np.argsort(tiles["shard"].to_numpy()[rest], kind="stable")]  # each shard is read once, or twice
    for start in range(0, len(rest), TRANSFORM_ROWS):
        rows = rest[start : start + TRANSFORM_ROWS]
        places[rows] = place(_read(cache, tiles.take(rows)))
        log(f"{len(fitted) + start + len(rows):,} of {count:,} placed")
    return places


def _smallest_hashes(tiles: pa.Table, limit: int) -> pa.Table:
    """The `limit` contents with the smallest hashes, in their order, each once: a sample at random that is always the same."""
    once = tiles.group_by("content_hash").aggregate([("shard", "min")]).rename_columns(["content_hash", "shard"])
    return once.sort_by("content_hash").slice(0, limit)


def _missing(tiles: pa.Table, cache: EmbeddingCache) -> dict[str, list[str]]:
    """Content hashes that the cache lacks, each once, by name of the shard."""
    found = {}
    for shard in pc.unique(tiles["shard"]).to_pylist():
        hashes = pc.unique(tiles.filter(pc.equal(tiles["shard"], shard))["content_hash"]).to_pylist()
        known = cache.known(shard_name(shard))
        if lacking := [content for content in hashes if content not in known]:
            found[shard_name(shard)] = lacking
    return found


def _read(cache: EmbeddingCache, tiles: pa.Table) -> np.ndarray:
    """Vectors of tiles in their order, float32 (n, d), n > 0; a shard is in memory at a time."""
    if not len(tiles):
        raise SynpipeError("There is no tile, so there are no vectors. Look at the rejects.")
    shards = tiles["shard"].to_numpy()
    vectors: np.ndarray | None = None
    for shard in np.unique(shards).tolist():
        rows = np.flatnonzero(shards == shard)
        found = cache.read(shard_name(shard), tiles["content_hash"].take(rows).to_pylist())
        if vectors is None:
            vectors = np.empty((len(tiles), found.shape[1]), np.float32)
        vectors[rows] = found
    assert vectors is not None
    return vectors
