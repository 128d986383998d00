"""The steps that make something of an encoder's vectors: compressed vectors, and the map.

In: a `Dataset` and the data versions of the step's inputs; vectors are read from the cache. Out: files in the data set's
folder, and `Made`. Guarantees: as in `synpipe.assets.pipeline`; no tile is read and nothing is embedded. Fits see a sample of the
vectors, which is in memory with what the fit makes of it; all others pass a shard, or `TRANSFORM_ROWS`, at a time.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from synpipe.analysis import projection
from synpipe.assets.manifest import find_manifest, read_manifest
from synpipe.assets.pipeline import Inputs, Made, is_of_version, metadata_of, shard_name, version_of
from synpipe.datasets import Dataset
from synpipe.embeddings import compression
from synpipe.embeddings.cache import EmbeddingCache
from synpipe.embeddings.encoders import Encoder, open_encoder
from synpipe.embeddings.forward import FunctionForward
from synpipe.errors import SynpipeError
from synpipe.progress import Log
from synpipe.specs import digest
from synpipe.store.files import atomic_path, write_table
from synpipe.store.streams import SmallestHashes, by_shard, in_blocks, read_parts
from synpipe.tiles.tile import rows_by_shard

# Vectors that are placed on a fitted map at once: beyond what the fit took, memory does not grow with the data set.
TRANSFORM_ROWS = 20_000


def make_compressed_embeddings(dataset: Dataset, name: str, inputs: Inputs, log: Log) -> Made:
    """Fit on the base encoder's vectors of these tiles, and compress all of them."""
    spec = dataset.encoders[name]
    assert spec.base is not None
    who = dataset.identity(name)
    base = read_manifest(dataset, f"embeddings_{spec.base}").counts
    count = pq.read_metadata(dataset.tiles_path).num_rows
    made = find_manifest(dataset, f"embeddings_{name}")
    if made and made.counts["encoder_identity"] == who and made.inputs == inputs:
        fingerprint = made.counts["encoder_fingerprint"]
        cache = EmbeddingCache(dataset.embeddings_folder, fingerprint)
        if next(_missing(dataset, cache, verify=True), None) is None:
            log(f"0 vectors compressed, {count:,} were there")
            return Made(version_of("embeddings", inputs, [fingerprint]), made.counts | {"vectors_compressed": 0})

    source = EmbeddingCache(dataset.embeddings_folder, base["encoder_fingerprint"])
    smallest = SmallestHashes(["content_hash"], compression.SAMPLE_ROWS)
    for part in read_parts(dataset.tiles_path, ["shard", "content_hash"]):
        smallest.add(part)
    sample = smallest.rows()
    fitted, kept = compression.fit(_read(source, sample), spec)
    content = fitted.to_bytes()
    weights = f"sha256:{hashlib.sha256(content).hexdigest()}"
    fingerprint = digest([base["encoder_fingerprint"], weights])
    with atomic_path(dataset.compressor_path(fingerprint)) as temporary:
        temporary.write_bytes(content)
    log(f"{spec.base} {base['dimensions']} → {spec.dimensions} dimensions, {kept:.1%} of the variance kept")

    cache = EmbeddingCache(dataset.embeddings_folder, fingerprint)
    metadata = {"encoder": json.dumps(spec.model_dump(mode="json")), "base_fingerprint": base["encoder_fingerprint"]}
    compressed = 0
    for shard, hashes in _missing(dataset, cache, verify=False):
        cache.add(shard, hashes, fitted.compress(source.read(shard, hashes)), metadata)
        compressed += len(hashes)
    log(f"{compressed:,} vectors compressed, {count - compressed:,} were there")
    counts = {
        "rows": count,
        "dimensions": spec.dimensions,
        "tiles_embedded": 0,
        "vectors_compressed": compressed,
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
    if spec.base is None:
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
        forward=FunctionForward(lambda tiles: fitted.compress(base.embed(tiles))),
    )


def make_projection(dataset: Dataset, name: str, inputs: Inputs, log: Log) -> Made:
    """A place in the plane for every tile's synapse: `projections/<encoder>.parquet`."""
    spec = dataset.spec.projection
    assert spec is not None
    # Of the vectors alone: a changed label colours the picture anew and moves no point.
    of_vectors = {asset: version for asset, version in inputs.items() if asset != "synapses"}
    version = version_of("projection", of_vectors, spec.model_dump(mode="json"))
    path = dataset.projection_path(name)
    if is_of_version(path, version):
        log("the map is of this version already")
    else:
        made = read_manifest(dataset, f"embeddings_{name}").counts
        cache = EmbeddingCache(dataset.embeddings_folder, made["encoder_fingerprint"])
        ids, places = _places(dataset, cache, spec, log)
        # What has no neighbour has no place: UMAP says NaN.
        map_x, map_y = (pa.array(places[:, axis], pa.float32(), from_pandas=True) for axis in (0, 1))
        table = pa.table({"synapse_id": ids, "map_x": map_x, "map_y": map_y})
        write_table(path, table, metadata_of(dataset, version, inputs))
    count = pq.read_metadata(path).num_rows
    method = "umap" if projection.enough_for_umap(count, spec) else "pca"
    notes = []
    if method == "pca":
        notes.append(f"{count} synapses are too few for UMAP: the map shows the two first principal components.")
    counts = {"rows": count, "method": method, "fitted_on": min(count, projection.FIT_ROWS)}
    return Made(version, counts | spec.model_dump(mode="json"), notes)


def _places(
    dataset: Dataset, cache: EmbeddingCache, spec: projection.ProjectionSpec, log: Log
) -> tuple[np.ndarray, np.ndarray]:
    """Ids, ascending, and places of all tiles, float32 (n, 2): those of a sample are fitted, the others placed among them."""
    columns = ["synapse_id", "shard", "content_hash"]
    # The smallest hashes are a sample at random, and mostly the same one after synapses were added.
    smallest = SmallestHashes(["content_hash", "synapse_id"], projection.FIT_ROWS)
    count = 0
    for part in read_parts(dataset.tiles_path, columns):
        smallest.add(part)
        count += len(part)
    fitted = smallest.rows().sort_by("synapse_id")
    log(f"laying out {len(fitted):,} vectors")
    of_sample, place = projection.fit_map(_read(cache, fitted), spec)
    ids, places = [fitted["synapse_id"].to_numpy()], [np.asarray(of_sample, np.float32)]

    def place_all(rows: pa.Table) -> None:
        ids.append(rows["synapse_id"].to_numpy())
        places.append(place(_read(cache, rows)))
        log(f"{sum(map(len, ids)):,} of {count:,} placed")

    in_blocks(_others(dataset, columns, fitted["synapse_id"]), TRANSFORM_ROWS, place_all)
    together = np.concatenate(ids)
    order = np.argsort(together)
    return together[order], np.concatenate(places)[order]


def _others(dataset: Dataset, columns: list[str], fitted: pa.ChunkedArray) -> Iterator[pa.Table]:
    """The tiles that are not fitted, shard by shard, by hash."""
    known = fitted.combine_chunks()
    for _, rows in by_shard(read_parts(dataset.tiles_path, columns)):
        others = rows.filter(pc.invert(pc.is_in(rows["synapse_id"], value_set=known)))
        yield others.sort_by([("content_hash", "ascending"), ("synapse_id", "ascending")])


def _missing(dataset: Dataset, cache: EmbeddingCache, verify: bool) -> Iterator[tuple[str, list[str]]]:
    """Name of each shard of whose tiles the cache lacks some, and their content hashes, each once.

    verify: see `EmbeddingCache.known_hashes`.
    """
    for shard, index in by_shard(read_parts(dataset.tiles_path, ["shard", "content_hash"])):
        hashes = index["content_hash"].to_pylist()
        if len(rows := cache.missing_rows(shard_name(shard), hashes, verify)):
            yield shard_name(shard), [hashes[row] for row in rows]


def _read(cache: EmbeddingCache, tiles: pa.Table) -> np.ndarray:
    """Vectors of tiles in their order, float32 (n, d), n > 0; beside them a shard is in memory at a time."""
    if not len(tiles):
        raise SynpipeError("There is no tile, so there are no vectors. Look at the rejects.")
    vectors: np.ndarray | None = None
    for shard, rows in rows_by_shard(tiles["shard"].to_numpy()):
        found = cache.read(shard_name(shard), tiles["content_hash"].take(rows).to_pylist())
        if vectors is None:
            vectors = np.empty((len(tiles), found.shape[1]), np.float32)
        vectors[rows] = found
    assert vectors is not None
    return vectors
