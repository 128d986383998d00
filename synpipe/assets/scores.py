"""The asset `scores` of an encoder: how good its neighbours are.

`evaluation/<encoder>.json` holds the figures with their intervals, `evaluation/<encoder>.parquet` what each query found.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from synpipe.analysis import evaluation, splits
from synpipe.analysis.compare import format_figure
from synpipe.analysis.evaluation import EvaluationSpec
from synpipe.analysis.instance_retrieval import EmbeddedTiles, InstanceRetrieval, retrieve_instances
from synpipe.analysis.metrics import Estimate, estimate
from synpipe.assets import embedding_table, embeddings, index, rgb_tiles
from synpipe.assets.asset import Asset, Made, NoFacts, Table, Task, View, count_rows, no_leftovers, view_of_figures
from synpipe.assets.compressed import open_branch
from synpipe.assets.manifest import Manifest, data_version_of, file_has_version, file_metadata
from synpipe.assets.rgb_tiles import read_places
from synpipe.assets.synapses import COLUMNS, read_column
from synpipe.datasets import Dataset
from synpipe.embeddings.embed import embed_shard
from synpipe.errors import SynpipeError
from synpipe.store.files import is_whole, read_json, set_aside, write_json, write_table
from synpipe.store.streams import column_of
from synpipe.volumes.volume import Volume

# 3: the probes are those of the classifier. Figures of version 2 differ in the probes alone and stay valid.
CODE_VERSION = "3"
LOGGED_FIGURES = ("instance_recall_at_1", "instance_recall_at_5", "knn_balanced_accuracy")


@dataclass(frozen=True)
class _Judged:
    """The synapses that are judged, in ascending order of their ids. labels, neurons: object (n,). vectors: float32 (n, d),
    of unit length. starts_zyx: first voxels of their tiles, int64 (n, 3)."""

    synapse_ids: np.ndarray
    labels: np.ndarray
    neurons: np.ndarray
    vectors: np.ndarray
    starts_zyx: np.ndarray
    window_zyx: tuple[int, int, int]


def make(task: Task) -> Made[NoFacts]:
    """Search with some synapses, train probes, and look for altered views of some places."""
    dataset, encoder, spec = task.dataset, task.encoder, task.dataset.spec.evaluation
    assert spec is not None  # `exists` says so
    fingerprint = embeddings.ASSET.read(dataset, encoder).encoder_fingerprint
    version = data_version_of("scores", CODE_VERSION, task.inputs, [fingerprint, spec.digest()])
    if (result := _find_result(task, version)) is not None:
        task.log("the figures have this version already")
        return result

    judged = _draw_judged(dataset, encoder, spec)
    labels, count = judged.labels, len(judged.labels)
    queries = evaluation.draw_queries(labels, spec)
    neighbours = evaluation.search_all(
        judged.vectors, labels, judged.neurons, judged.starts_zyx, judged.window_zyx, queries
    )
    task.log(f"{len(queries):,} synapses have searched for their class")
    rows = {
        "label": labels,
        "group": evaluation.bootstrap_groups(judged.neurons, judged.starts_zyx, judged.window_zyx),
        "voted": spread(neighbours.voted, queries, count, None),
        "average_precision": spread(neighbours.average_precision, queries, count),
        "precision_at_10": spread(neighbours.precision, queries, count),
    }
    for scheme in splits.SCHEMES:
        sides = column_of(dataset.split_path, judged.synapse_ids, scheme)
        probed = evaluation.probe_test_side(judged.vectors, labels, sides, dataset.spec.classes, spec)
        rows[f"probe_{scheme}"] = spread(probed[1], probed[0], count) if probed else np.full(count, np.nan)
    task.log("linear probes are fitted")
    retrieval = _retrieve(task, judged, fingerprint, spec)
    rows["instance_rank"] = spread(retrieval.ranks, retrieval.places, count)
    task.log(f"{len(retrieval.places):,} places have been looked for")

    report = {
        "encoder": encoder,
        "encoder_fingerprint": fingerprint,
        "dimensions": judged.vectors.shape[1],
        "queries": len(queries),
        "places": len(retrieval.places),
        "groups": len(np.unique(rows["group"])),
        "index_recall": index.ASSET.read(dataset, encoder).recall,
        "bytes_per_vector": embedding_table.ASSET.read(dataset, encoder).bytes_per_vector,
        "figures": _as_json(evaluation.measure(rows, spec.seed)),
        "classes": {name: _as_json(each) for name, each in evaluation.measure_classes(rows, spec.seed).items()},
        "alterations": _measure_alterations(retrieval, rows["group"], spec.seed),
        "data_version": version,
    }
    columns = {
        "synapse_id": judged.synapse_ids,
        **{name: pa.array(value, from_pandas=True) for name, value in rows.items()},
        "nearest": _nearest_ids(judged.synapse_ids, queries, neighbours.nearest),
    }
    write_table(dataset.queries_path(encoder), pa.table(columns), file_metadata(dataset, version, task.inputs))
    write_json(dataset.scores_path(encoder), report)
    task.log(
        ", ".join(
            f"{evaluation.FIGURES[name].title} {_as_text(report['figures'][name]['value'])}" for name in LOGGED_FIGURES
        )
    )
    return _describe(task, version, report)


def _find_result(task: Task, version: str) -> Made[NoFacts] | None:
    """The result of an earlier run, if it is complete and still valid; else None."""
    report_path, queries_path = task.dataset.scores_path(task.encoder), task.dataset.queries_path(task.encoder)
    if not report_path.exists() or not queries_path.exists():
        return None
    if not is_whole(queries_path):
        task.log(f"{queries_path} is damaged: moved to {set_aside(queries_path).name}; it is written again")
        return None
    try:
        report = read_json(report_path)
    except SynpipeError as error:  # damaged, and already moved aside
        task.log(str(error))
        return None
    if task.unchanged and task.previous is not None:
        return _describe(task, task.previous.data_version, report)
    # A run that was killed after it had written both files left no manifest.
    complete = report.get("data_version") == version and file_has_version(queries_path, version)
    return _describe(task, version, report) if complete else None


def _describe(task: Task, version: str, report: Mapping[str, Any]) -> Made[NoFacts]:
    values = {name: each["value"] for name, each in report["figures"].items() if each["value"] is not None}
    figures = {"queries": report["queries"], "places": report["places"], **values}
    return Made(version, NoFacts(), count_rows(task.dataset.queries_path(task.encoder)), figures)


def _draw_judged(dataset: Dataset, encoder: str, spec: EvaluationSpec) -> _Judged:
    places = read_places(dataset)
    labels = read_column(dataset, places.synapse_ids, "neurotransmitter")
    drawn = evaluation.draw_judged(labels, spec)
    ids = places.synapse_ids[drawn]
    return _Judged(
        ids,
        labels[drawn],
        read_column(dataset, ids, "neuron_id"),
        embedding_table.read_unit_vectors(dataset, encoder, ids),
        places.starts_zyx[drawn],
        places.window_zyx,
    )


def _retrieve(task: Task, judged: _Judged, fingerprint: str, spec: EvaluationSpec) -> InstanceRetrieval:
    """Embed altered views of some places, and look for the originals."""
    dataset = task.dataset
    encoder = open_branch(dataset, task.encoder)
    if encoder.fingerprint != fingerprint:
        raise SynpipeError(
            f"The encoder {task.encoder} is not the one that made its vectors: materialise embeddings_{task.encoder}+ again."
        )
    grey = rgb_tiles.ASSET.read(dataset).stacking == "grey"
    with Volume(dataset.spec.volume, dataset.base) as volume:
        tiles = EmbeddedTiles(
            volume=volume,
            tile_spec=dataset.spec.tiles,
            stack_view=(lambda tile: np.broadcast_to(tile[1], tile.shape)) if grey else (lambda tile: tile),
            embed=lambda views: embed_shard(encoder, views.__getitem__, [f"view {row}" for row in range(len(views))]),
            vectors=judged.vectors,
            starts_zyx=judged.starts_zyx,
            window_zyx=judged.window_zyx,
        )
        return retrieve_instances(tiles, spec)


def _measure_alterations(retrieval: InstanceRetrieval, groups: np.ndarray, seed: int) -> dict[str, dict[str, Any]]:
    """Recall by single alteration, with intervals from resampling the groups of the places."""
    place_groups = groups[retrieval.places]

    def recall(ranks: np.ndarray, k: int) -> Estimate:
        no_labels = np.full(len(ranks), None)
        return estimate((ranks <= k).astype(float), no_labels, place_groups[: len(ranks)], seed)

    return {
        name: {f"recall_at_{k}": asdict(recall(ranks, k)) for k in (1, 5)} for name, ranks in retrieval.singles.items()
    }


def _nearest_ids(synapse_ids: np.ndarray, queries: np.ndarray, nearest: np.ndarray) -> pa.Array:
    """Ids of the nearest synapses of each query, lists of int64 (n,); null for a synapse that was not a query."""
    with_none = np.append(synapse_ids, -1)  # −1: there is no such neighbour
    lists: list[list[int] | None] = [None] * len(synapse_ids)
    for query, ids in zip(queries.tolist(), with_none[nearest].tolist(), strict=True):
        lists[query] = [synapse_id for synapse_id in ids if synapse_id >= 0]
    return pa.array(lists, pa.list_(pa.int64()))


def spread(values: np.ndarray, rows: np.ndarray, count: int, absent: Any = np.nan) -> np.ndarray:
    """Values of some rows as a column of all rows: (count,), `absent` elsewhere."""
    column = np.full(count, absent, dtype=object if absent is None else float)
    column[rows] = values
    return column


def _as_json(estimates: Mapping[str, Estimate]) -> dict[str, dict[str, float | None]]:
    return {name: asdict(estimate) for name, estimate in estimates.items()}


def _as_text(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def show(dataset: Dataset, encoder: str, manifest: Manifest) -> View:
    report = read_json(dataset.scores_path(encoder))
    tables = {
        "by_class": _estimates_table("class", report["classes"]),
        "single_alterations": _estimates_table("altered", report["alterations"]),
    }
    columns = ("synapse_id", "label", "voted", "average_precision", "precision_at_10", "instance_rank", "nearest")
    return View(tables | view_of_figures(manifest), dataset.queries_path(encoder), columns)


def _estimates_table(head: str, estimates: Mapping[str, Mapping[str, Any]]) -> Table:
    names = list(next(iter(estimates.values()), {}))
    rows = [[key, *(format_figure(Estimate(**row[name])) for name in names)] for key, row in estimates.items()]
    return Table([head, *names], rows)


ASSET = Asset(
    name="scores",
    per_encoder=True,
    exists=lambda dataset, encoder: dataset.spec.evaluation is not None,
    description="How good the neighbours are: do synapses find their class in other neurons, and altered places their original? "
    "With intervals.",
    storage=frozenset({"parquet"}),
    facts=NoFacts,
    reads=lambda dataset, encoder: (
        "volume",
        "rgb_tiles",
        "split",
        f"embedding_table_{encoder}",
        f"index_{encoder}",
    ),
    optional_reads=False,
    version_covers_reads=True,
    code_version=CODE_VERSION,
    still_valid=("2",),
    specs=lambda dataset, encoder: [dataset.identity(encoder), dataset.spec.evaluation],
    make=make,
    source_version=None,
    checks={},
    files=lambda dataset, encoder: (dataset.scores_path(encoder), dataset.queries_path(encoder)),
    names_tiles=False,
    leftovers=no_leftovers,
    columns={
        "synapse_id": COLUMNS["synapse_id"],
        "label": "The annotated class; empty if it is not known.",
        "group": "The neuron as a number, or the place if the neuron is not known: what is resampled as one.",
        "voted": "The class for which the ten nearest of other neurons vote; empty if it was not a query.",
        "average_precision": "Average precision of its own class in the ranking; empty if it was not a query.",
        "precision_at_10": "Share of its own class among the ten nearest of other neurons.",
        "probe_neuron": "Whether a linear probe is right, split by neuron; empty outside the test side.",
        "probe_hemilineage": "Whether a linear probe is right, split by hemilineage.",
        "probe_region": "Whether a linear probe is right, split by region.",
        "probe_random": "Whether a linear probe is right, split at random.",
        "instance_rank": "Rank of the original for an altered view of it; empty if none was tried.",
        "nearest": "The nearest synapses of known class, of other neurons and at other places.",
    },
    table_columns=(),
    show=show,
)
