"""The asset `projection` of an encoder: a map, with a place in the plane for every synapse."""

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from synpipe.analysis import projection
from synpipe.analysis.charts import draw_map
from synpipe.analysis.projection import ProjectionSpec
from synpipe.assets.asset import Asset, Made, NoFacts, Task, View, count_rows, no_leftovers, view_of_figures
from synpipe.assets.embeddings import open_cache, read_vectors_of
from synpipe.assets.manifest import Manifest, data_version_of, file_has_version, file_metadata
from synpipe.assets.synapses import COLUMNS
from synpipe.datasets import Dataset
from synpipe.embeddings.cache import EmbeddingCache
from synpipe.progress import Log
from synpipe.store.files import read_table, write_table
from synpipe.store.streams import SmallestHashes, by_shard, column_of, read_batches, rebatch

CODE_VERSION = "1"
TILE_COLUMNS = ["synapse_id", "shard", "content_hash"]

# Vectors that are placed on a fitted map at once. Memory beyond that of the fit does not grow with the data set.
TRANSFORM_ROWS = 20_000


def make(task: Task) -> Made[NoFacts]:
    """Fit the map on a sample of the vectors, and place all others on it."""
    dataset, spec = task.dataset, task.dataset.spec.projection
    assert spec is not None  # `exists` says so
    version = data_version_of("projection", CODE_VERSION, task.inputs, spec.model_dump(mode="json"))
    path = dataset.projection_path(task.encoder)
    if file_has_version(path, version):
        task.log("the map has this version already")
    else:
        ids, places = _place_tiles(dataset, open_cache(dataset, task.encoder), spec, task.log)
        # UMAP gives NaN to a vector without neighbours; it has no place.
        map_x, map_y = (pa.array(places[:, axis], pa.float32(), from_pandas=True) for axis in (0, 1))
        table = pa.table({"synapse_id": ids, "map_x": map_x, "map_y": map_y})
        write_table(path, table, file_metadata(dataset, version, task.inputs))
    count = count_rows(path)
    method = "umap" if projection.enough_for_umap(count, spec) else "pca"
    notes = []
    if method == "pca":
        notes.append(f"{count} synapses are too few for UMAP: the map shows the first two principal components.")
    figures = {"method": method, "fitted_on": min(count, projection.FIT_ROWS)}
    return Made(version, NoFacts(), count, figures | spec.model_dump(mode="json"), notes)


def _place_tiles(
    dataset: Dataset, cache: EmbeddingCache, spec: ProjectionSpec, log: Log
) -> tuple[np.ndarray, np.ndarray]:
    """Ids, ascending, and places of all tiles, float32 (n, 2): a sample is fitted, the others are placed among it."""
    # The smallest hashes are a random sample that stays mostly the same when synapses are added.
    smallest = SmallestHashes(["content_hash", "synapse_id"], projection.FIT_ROWS)
    count = 0
    for part in read_batches(dataset.tiles_path, TILE_COLUMNS):
        smallest.add(part)
        count += len(part)
    sample = smallest.rows().sort_by("synapse_id")
    log(f"laying out {len(sample):,} vectors")
    sample_places, place = projection.fit_map(read_vectors_of(cache, sample), spec)
    ids, places = [sample["synapse_id"].to_numpy()], [np.asarray(sample_places, np.float32)]

    for rows in rebatch(_tiles_beside(dataset, sample["synapse_id"]), TRANSFORM_ROWS):
        ids.append(rows["synapse_id"].to_numpy())
        places.append(place(read_vectors_of(cache, rows)))
        log(f"{sum(map(len, ids)):,} of {count:,} placed")
    together = np.concatenate(ids)
    order = np.argsort(together)
    return together[order], np.concatenate(places)[order]


def _tiles_beside(dataset: Dataset, sample_ids: pa.ChunkedArray) -> Iterator[pa.Table]:
    """The tiles that are not in the sample, shard by shard, by hash."""
    known = sample_ids.combine_chunks()
    for _, rows in by_shard(read_batches(dataset.tiles_path, TILE_COLUMNS)):
        others = rows.filter(pc.invert(pc.is_in(rows["synapse_id"], value_set=known)))
        yield others.sort_by([("content_hash", "ascending"), ("synapse_id", "ascending")])


def show(dataset: Dataset, encoder: str, manifest: Manifest) -> View:
    table = read_table(dataset.projection_path(encoder))  # sorted by id
    places = np.stack([table[axis].to_numpy() for axis in ("map_x", "map_y")], axis=1)
    labels = column_of(dataset.synapses_path, table["synapse_id"].to_numpy(), "neurotransmitter")
    title = f"{dataset.name}, {encoder}: {len(table):,} synapses"
    picture = draw_map(places, labels, dataset.spec.classes, title)
    entries = {"map": picture} | view_of_figures(manifest)
    return View(entries, dataset.projection_path(encoder), ("synapse_id", "map_x", "map_y"))


MAP_COLUMNS = {
    "map_x": "Place on the map of the encoder; empty if there is none.",
    "map_y": "Place on the map of the encoder; empty if there is none.",
}

ASSET = Asset(
    name="projection",
    per_encoder=True,
    exists=lambda dataset, encoder: dataset.spec.projection is not None,
    description="A place in the plane for every synapse, by UMAP: similar vectors lie side by side.",
    storage=frozenset({"parquet"}),
    facts=NoFacts,
    # The map depends on the vectors alone. Its picture shows the classes as they were when it was made.
    reads=lambda dataset, encoder: ("rgb_tiles", f"embeddings_{encoder}"),
    optional_reads=False,
    version_covers_reads=True,
    code_version=CODE_VERSION,
    still_valid=(),
    specs=lambda dataset, encoder: [dataset.identity(encoder), dataset.spec.projection],
    make=make,
    source_version=None,
    checks={},
    files=lambda dataset, encoder: (dataset.projection_path(encoder),),
    names_tiles=False,
    leftovers=no_leftovers,
    columns={"synapse_id": COLUMNS["synapse_id"], **MAP_COLUMNS},
    table_columns=(pa.field("map_x", pa.float32()), pa.field("map_y", pa.float32())),
    show=show,
)
