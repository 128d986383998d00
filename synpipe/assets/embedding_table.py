"""The asset `embedding_table` of an encoder: the synapses with their vectors in one Parquet file, for other tools."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from synpipe.analysis import drift
from synpipe.analysis.charts import draw_map
from synpipe.assets import classifier, embeddings, projection, synapse_stacks, synapses
from synpipe.assets.asset import Asset, Finding, Made, Task, View, count_rows, no_leftovers, view_of_figures
from synpipe.assets.embeddings import open_cache
from synpipe.assets.manifest import (
    Manifest,
    data_version_of,
    describe_origin,
    file_has_version,
    list_versions,
    read_manifest,
)
from synpipe.cluster.workers import shard_name
from synpipe.datasets import Dataset
from synpipe.embeddings import table
from synpipe.embeddings.vectors import read_vectors, unit_vectors
from synpipe.specs import digest
from synpipe.store.files import is_whole, read_table, set_aside
from synpipe.store.streams import places_among, read_batches

CODE_VERSION = "1"

# The schema of the embedding table, Parquet and LanceDB, for other tools. Raise the number with every change.
TABLE_SCHEMA_VERSION = 3

# Assets whose `table_columns` the table takes over, in the order of the columns.
CONTRIBUTORS: tuple[Asset[Any], ...] = (classifier.ASSET, projection.ASSET)
DERIVED_FIELDS = tuple(field for asset in CONTRIBUTORS for field in asset.table_columns)

# Rounding in the table and another batch size change vectors by .004 of the distance between two tiles (see `drift`); bf16 of
# another version of torch by .05; another network, or weights trained further, by .5 and more.
MAX_CHANGE = 0.1
# Half as much again, or a third less, than in earlier versions: other tissue, another contrast, or other weights.
MAX_FACTOR = 1.5

COLUMNS = {
    **synapses.COLUMNS,
    **{name: synapse_stacks.COLUMNS[name] for name in ("content_hash", "pad_fraction", "missing_sections")},
    "vector": "Embedding of unit length.",
    "norm": "Length of the vector as the encoder gave it.",
    **{field.name: asset.columns[field.name] for asset in CONTRIBUTORS for field in asset.table_columns},
    "encoder": "Entry of `encoders.yaml`.",
    "encoder_fingerprint": "Digest of the encoder's weights, architecture, preprocessing and precision.",
    "dataset_version": "Digest of the versions of synapses and tiles.",
}


@dataclass(frozen=True)
class TableFacts:
    """bytes_per_vector: in the Parquet file. norm, spread: mean length and spread of the vectors, for the check of drift."""

    bytes_per_vector: float
    norm: float
    spread: float
    encoder_identity: str


def make(task: Task) -> Made[TableFacts]:
    """Join synapses, vectors and what other assets derived from them; one row group per shard."""
    dataset, encoder = task.dataset, task.encoder
    made_by = embeddings.ASSET.read(dataset, encoder)
    version = data_version_of("embedding_table", CODE_VERSION, task.inputs, [TABLE_SCHEMA_VERSION])
    path = dataset.table_path(encoder)
    if path.exists() and not is_whole(path):
        task.log(f"{path} is damaged: moved to {set_aside(path).name}; the table is written again")
    if file_has_version(path, version):
        task.log("the table has this version already")
    else:
        provenance = describe_origin(dataset, version, task.inputs) | {
            "encoder": encoder,
            "encoder_fingerprint": made_by.encoder_fingerprint,
            "encoder_details": made_by.encoder,
            "dataset_version": digest([task.inputs["synapses"], task.inputs["rgb_tiles"]]),
            "schema_version": TABLE_SCHEMA_VERSION,
        }
        cache = open_cache(dataset, encoder)
        columns = ["synapse_id", "shard", "content_hash", "pad_fraction", "missing_sections"]
        drift.keep_former(path, dataset.former_table_path(encoder))
        table.write_embedding_table(
            path,
            read_batches(dataset.synapses_path),
            read_batches(dataset.tiles_path, columns),
            lambda shard, hashes: cache.read(shard_name(shard), hashes),
            provenance,
            [
                table.Derived(
                    asset.table_columns,
                    read_batches(asset.files(dataset, encoder)[0]) if asset.name_for(encoder) in task.inputs else None,
                )
                for asset in CONTRIBUTORS
            ],
        )
    file = pq.ParquetFile(path)
    dimensions, rows = file.schema_arrow.field("vector").type.list_size, file.metadata.num_rows
    sample = drift.measure_vectors(drift.take_sample(path))
    bytes_per_vector = round(_column_bytes(file.metadata, "vector") / rows, 1)
    figures = {
        "dimensions": dimensions,
        "bytes": path.stat().st_size,
        "bytes_per_component": round(path.stat().st_size / (dimensions * rows), 3),
        "bytes_per_vector": bytes_per_vector,
        "norm": sample.norm,
        "spread": sample.spread,
    }
    task.log(f"{rows:,} rows, {figures['bytes'] / 1e6:.1f} MB")
    facts = TableFacts(bytes_per_vector, sample.norm, sample.spread, made_by.encoder_identity)
    return Made(version, facts, rows, figures)


def _column_bytes(metadata: pq.FileMetaData, name: str) -> int:
    """Bytes that a column takes in a Parquet file."""
    groups = (metadata.row_group(number) for number in range(metadata.num_row_groups))
    columns = (group.column(number) for group in groups for number in range(group.num_columns))
    return sum(column.total_compressed_size for column in columns if column.path_in_schema.split(".")[0] == name)


def read_unit_vectors(dataset: Dataset, encoder: str, synapse_ids: np.ndarray) -> np.ndarray:
    """Unit vectors of these synapses, whose ids ascend: float32 (n, d). The table holds them rounded."""
    vectors: np.ndarray | None = None
    for part in read_batches(dataset.table_path(encoder), ["synapse_id", "vector"]):
        places, wanted = places_among(synapse_ids, part)
        rows = unit_vectors(read_vectors(part)[wanted])
        if vectors is None:
            vectors = np.empty((len(synapse_ids), rows.shape[1]), np.float32)
        vectors[places[wanted]] = rows
    assert vectors is not None
    return vectors


def match_tiles(dataset: Dataset, encoder: str) -> Finding:
    """The embedding table has exactly the tiles' synapses, with exactly the tiles' content."""
    paths = dataset.tiles_path, dataset.table_path(encoder)
    same = _content_sum(paths[0]) == _content_sum(paths[1])
    text = "The table has the rows of the tiles." if same else "The rows of the table are not those of the tiles."
    return Finding(same, text, {"tiles": count_rows(paths[0]), "rows": count_rows(paths[1])})


def _content_sum(path: Path) -> int:
    """The sum of the digests of all rows, which is the same in any order (M. Bellare, D. Micciancio, "A new paradigm for
    collision-free hashing", Eurocrypt 1997)."""
    total = 0
    for part in read_batches(path, ["synapse_id", "content_hash"]):
        for row in zip(part["synapse_id"].to_pylist(), part["content_hash"].to_pylist(), strict=True):
            total += int.from_bytes(hashlib.sha256(repr(row).encode()).digest())
    return total % 2**256


def have_not_drifted(dataset: Dataset, encoder: str) -> Finding:
    """The same tiles have the same vectors as in the former version of the table; their length and spread are as before."""
    manifest = read_manifest(dataset, ASSET.name_for(encoder))
    path = dataset.former_table_path(encoder)
    if not path.exists():
        return Finding(True, "The first version: there is nothing to compare it with.")
    change = drift.compare_samples(read_table(path), drift.take_sample(dataset.table_path(encoder)))
    figures: dict[str, Any] = {"matched rows": change.matched, "same encoder": change.same_encoder}
    if change.change is not None:
        figures |= {
            "mean cosine": change.mean_cosine,
            "cosine, 1st percentile": change.low_cosine,
            "change": change.change,
        }
    if not change.same_encoder and not change.turned and (change.change is None or change.change > MAX_CHANGE):
        text = "The encoder changed: these vectors cannot be compared with those of the former version."
        return Finding(False, text, figures, "warning")

    problems = []
    if change.change is not None and change.change > MAX_CHANGE:
        problems.append(
            f"the vectors of the same tiles changed (mean cosine {change.mean_cosine:.4f}, 1st percentile "
            f"{change.low_cosine:.4f}), although the encoder did not: is the cache of embeddings damaged?"
        )
    now = ASSET.parse(manifest)
    versions = list_versions(dataset, ASSET.name_for(encoder))
    earlier = [ASSET.parse(other) for other in versions if other.data_version != manifest.data_version]
    earlier = [facts for facts in earlier if facts.encoder_identity == now.encoder_identity]
    for name in ("norm", "spread") if earlier else ():
        before = float(np.median([getattr(facts, name) for facts in earlier]))
        value = getattr(now, name)
        figures[name], figures[f"{name} before"] = value, before
        if not before / MAX_FACTOR <= value <= before * MAX_FACTOR:
            problems.append(
                f"the {name} of the vectors is {value:.3g}; in earlier versions it was {before:.3g}: are the tiles alike?"
            )
    if problems:
        text = "; ".join(problems)
        return Finding(False, text[0].upper() + text[1:], figures, "warning")
    if not change.matched:
        text = "No tile of the former version is in this one; length and spread are as before."
        return Finding(True, text, figures)
    return Finding(True, f"{change.matched:,} tiles compared: their vectors are as before.", figures)


def show(dataset: Dataset, encoder: str, manifest: Manifest) -> View:
    path = dataset.table_path(encoder)
    entries = view_of_figures(manifest)
    if projection.ASSET.exists(dataset, encoder):
        # Here, and not with the projection only: a changed label colours this picture and moves no point.
        columns = pq.read_table(path, columns=["map_x", "map_y", "neurotransmitter"])
        places = np.stack([columns[axis].to_numpy() for axis in ("map_x", "map_y")], axis=1)
        labels = np.array(columns["neurotransmitter"].to_pylist(), dtype=object)
        title = f"{dataset.name}, {encoder}: {len(columns):,} synapses"
        entries = {"map": draw_map(places, labels, dataset.spec.classes, title)} | entries
    return View(entries, path, ("synapse_id", "neurotransmitter", "neuron_id", "norm", "vector"))


def _reads(dataset: Dataset, encoder: str) -> tuple[str, ...]:
    contributors = (asset.name_for(encoder) for asset in CONTRIBUTORS if asset.exists(dataset, encoder))
    return "synapses", "rgb_tiles", f"embeddings_{encoder}", *contributors


ASSET = Asset(
    name="embedding_table",
    per_encoder=True,
    exists=lambda dataset, encoder: True,
    description="The synapses with their vectors in one Parquet file, for pandas, Polars, DuckDB and others.",
    storage=frozenset({"parquet"}),
    facts=TableFacts,
    reads=_reads,
    optional_reads=False,
    version_covers_reads=True,
    code_version=CODE_VERSION,
    still_valid=(),
    specs=lambda dataset, encoder: [dataset.identity(encoder), TABLE_SCHEMA_VERSION],
    make=make,
    source_version=None,
    checks={"match_tiles": match_tiles, "drift": have_not_drifted},
    files=lambda dataset, encoder: (dataset.table_path(encoder), dataset.former_table_path(encoder)),
    names_tiles=False,
    leftovers=no_leftovers,
    columns=COLUMNS,
    table_columns=(),
    show=show,
)
