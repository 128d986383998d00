"""The steps that learn from what `synpipe.assets.pipeline` has made, or judge it; the same rules hold.

In: a `Dataset` and the data versions of the step's inputs. Out: files in its folder, and `Made`. In memory are some sixty
bytes of each synapse (id, class, group, and where its tile begins), and the vectors of the sample that is judged.
"""

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow as pa

from synpipe.analysis import evaluation, splits
from synpipe.analysis.instance_retrieval import EmbeddedTiles, retrieve_instances
from synpipe.analysis.metrics import estimate
from synpipe.assets.derived_steps import open_branch
from synpipe.assets.manifest import read_manifest
from synpipe.assets.pipeline import CODE_VERSIONS, Inputs, Made, metadata_of, version_of
from synpipe.datasets import Dataset
from synpipe.embeddings.embed import embed_shard
from synpipe.errors import SynpipeError
from synpipe.progress import Log
from synpipe.specs import digest
from synpipe.store.files import read_json, table_writer, write_json, write_table
from synpipe.store.streams import BATCH_ROWS, ContentDigest, column_of, places_among, read_parts
from synpipe.tiles.tile import SECTIONS, TILE_PX
from synpipe.volumes.volume import Volume


def make_split(dataset: Dataset, inputs: Inputs, log: Log) -> Made:
    """The side of every synapse with a tile, a column per scheme: `split.parquet`."""
    spec = dataset.spec.split
    ids, starts, window = synapses_with_tiles(dataset)
    labels = synapse_column(dataset, ids, "neurotransmitter")
    names = np.array([*splits.SIDES, splits.GUARD, None], dtype=object)
    codes: dict[str, np.ndarray] = {}  # a byte of each side: as text they would take sixty
    counts, notes = {}, []
    for scheme in splits.SCHEMES:
        groups = synapse_column(dataset, ids, splits.GROUP_COLUMNS[scheme])
        sides = splits.split(spec, scheme, labels, groups, starts, window)
        codes[scheme] = np.full(len(ids), len(names) - 1, dtype=np.int8)
        for number, name in enumerate(names[:-1]):
            codes[scheme][sides == name] = number
        counts[scheme] = splits.tally(labels, groups, sides)
        notes += splits.shortcomings(scheme, counts[scheme])
    schema = pa.schema([("synapse_id", pa.int64()), *((scheme, pa.string()) for scheme in splits.SCHEMES)])

    def parts() -> Iterator[pa.Table]:
        for first in range(0, max(1, len(ids)), BATCH_ROWS):
            here = slice(first, first + BATCH_ROWS)
            columns = [pa.array(names[codes[scheme][here]], pa.string()) for scheme in splits.SCHEMES]
            yield pa.table([pa.array(ids[here]), *columns], schema=schema)

    # Of the content: a changed confidence, or a position moved within its voxel, leads to the same split.
    content = ContentDigest()
    for part in parts():
        content.add(part)
    version = digest(["split", CODE_VERSIONS["split"], spec.by, content.value()])
    with table_writer(dataset.split_path, schema, metadata_of(dataset, version, inputs)) as writer:
        for part in parts():
            writer.write_table(part)
    chosen = counts[spec.by].values()
    log(f"by {spec.by}: " + ", ".join(f"{sum(c[side] for c in chosen):,} {side}" for side in (*splits.SIDES, "guard")))
    return Made(version, {"rows": len(ids), "by": spec.by, "split": counts}, notes)


def make_scores(dataset: Dataset, name: str, inputs: Inputs, log: Log) -> Made:
    """Judge an encoder: figures with intervals (JSON), and what each query found (Parquet)."""
    spec = dataset.spec.evaluation
    assert spec is not None  # else the graph has no such step
    made = read_manifest(dataset, f"embeddings_{name}").counts
    ids, starts, window = synapses_with_tiles(dataset)
    labels = synapse_column(dataset, ids, "neurotransmitter")
    judged = evaluation.draw_judged(labels, spec)
    ids, starts, labels = ids[judged], starts[judged], labels[judged]
    neurons = synapse_column(dataset, ids, "neuron_id")
    vectors = _vectors(dataset, name, ids)

    queries = evaluation.draw_queries(labels, spec)
    found = evaluation.search_all(vectors, labels, neurons, starts, window, queries)
    log(f"{len(queries):,} synapses have searched for their class")
    rows = {
        "label": labels,
        "group": evaluation.bootstrap_groups(neurons, starts, window),
        "voted": spread(found.voted, queries, len(labels), None),
        "average_precision": spread(found.average_precision, queries, len(labels)),
        "precision_at_10": spread(found.precision, queries, len(labels)),
    }
    for scheme in splits.SCHEMES:
        sides = column_of(dataset.split_path, ids, scheme)
        tested = evaluation.probe_test_side(vectors, labels, sides, dataset.spec.classes, spec)
        rows[f"probe_{scheme}"] = spread(tested[1], tested[0], len(labels)) if tested else np.full(len(labels), np.nan)
    log("linear probes are fitted")

    encoder = open_branch(dataset, name)
    if encoder.fingerprint != made["encoder_fingerprint"]:
        raise SynpipeError(
            f"The encoder {name} is not the one that made its vectors: materialise embeddings_{name}+ again."
        )
    grey = read_manifest(dataset, "rgb_tiles").counts["stacking"] == "grey"
    with Volume(dataset.spec.volume, dataset.base) as volume:
        tiles = EmbeddedTiles(
            volume=volume,
            tile_spec=dataset.spec.tiles,
            stack_view=(lambda tile: np.broadcast_to(tile[1], tile.shape)) if grey else (lambda tile: tile),
            embed=lambda views: embed_shard(encoder, views.__getitem__, [f"view {row}" for row in range(len(views))]),
            vectors=vectors,
            starts_zyx=starts,
            window_zyx=window,
        )
        again = retrieve_instances(tiles, spec)
    rows["instance_rank"] = spread(again.ranks, again.places, len(labels))
    log(f"{len(again.places):,} places have been looked for")

    figures = evaluation.measure(rows, spec.seed)
    groups = rows["group"][again.places]
    report = {
        "encoder": name,
        "encoder_fingerprint": made["encoder_fingerprint"],
        "dimensions": vectors.shape[1],
        "queries": len(queries),
        "places": len(again.places),
        "groups": len(np.unique(rows["group"])),
        "index_recall": read_manifest(dataset, f"index_{name}").counts["recall"],
        "bytes_per_vector": read_manifest(dataset, f"embedding_table_{name}").counts["bytes_per_vector"],
        "figures": {figure: asdict(value) for figure, value in figures.items()},
        "classes": {
            label: {figure: asdict(value) for figure, value in each.items()}
            for label, each in evaluation.measure_classes(rows, spec.seed).items()
        },
        "alterations": {
            alteration: {
                f"recall_at_{k}": asdict(
                    estimate((ranks <= k).astype(float), np.full(len(ranks), None), groups[: len(ranks)], spec.seed)
                )
                for k in (1, 5)
            }
            for alteration, ranks in again.singles.items()
        },
    }
    some_ids = np.append(ids, -1)  # −1: there is no such neighbour
    nearest = [None] * len(labels)
    for query, near in zip(queries.tolist(), some_ids[found.nearest].tolist(), strict=True):
        nearest[query] = [one for one in near if one >= 0]
    columns = {
        "synapse_id": ids,
        **{key: pa.array(value, from_pandas=True) for key, value in rows.items()},
    }
    version = version_of("scores", inputs, [made["encoder_fingerprint"], spec.digest()])
    write_table(
        dataset.queries_path(name),
        pa.table(columns | {"nearest": pa.array(nearest, pa.list_(pa.int64()))}),
        metadata_of(dataset, version, inputs),
    )
    write_json(dataset.scores_path(name), report)
    shown = ("instance_recall_at_1", "instance_recall_at_5", "knn_balanced_accuracy")
    log(", ".join(f"{evaluation.FIGURES[each].title} {text(figures[each].value)}" for each in shown))
    values = {each: figure.value for each, figure in figures.items() if figure.value is not None}
    return Made(version, {"rows": len(labels), "queries": len(queries), "places": len(again.places), **values})


def make_evaluation(dataset: Dataset, inputs: Inputs, log: Log) -> Made:
    """The figures of all encoders that have been judged, a row each: `evaluation.parquet`."""
    judged = [name for name in dataset.encoders if f"scores_{name}" in inputs]
    rows = []
    for name in judged:
        report = read_json(dataset.scores_path(name))
        kept = ("encoder", "dimensions", "queries", "places", "groups", "index_recall", "bytes_per_vector")
        row = {key: report[key] for key in kept}
        for figure, value in report["figures"].items():
            row |= {figure: value["value"], f"{figure}_low": value["low"], f"{figure}_high": value["high"]}
        rows.append(row | {"encoder_fingerprint": report["encoder_fingerprint"]})
    if not rows:
        raise SynpipeError(
            f"No encoder of {dataset.name} has been judged: `synpipe materialize --dataset {dataset.name}`."
        )
    version = version_of("evaluation", inputs, judged)
    numbers = {name: pa.float64() for name in rows[0] if name.startswith(tuple(evaluation.FIGURES))}
    schema = pa.schema([(name, numbers.get(name, pa.scalar(value).type)) for name, value in rows[0].items()])
    write_table(dataset.evaluation_path, pa.Table.from_pylist(rows, schema), metadata_of(dataset, version, inputs))
    log(f"{len(rows)} encoders")
    return Made(version, {"rows": len(rows)})


def spread(values: np.ndarray, rows: np.ndarray, count: int, absent: Any = np.nan) -> np.ndarray:
    """Values of some rows as a column of all: (count,), `absent` elsewhere."""
    found = np.full(count, absent, dtype=object if absent is None else float)
    found[rows] = values
    return found


def text(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def synapses_with_tiles(dataset: Dataset) -> tuple[np.ndarray, np.ndarray, tuple[int, int, int]]:
    """Ids of the synapses that have a tile, ascending; first voxels of the tiles, int64 (n, 3); extents of a tile, voxels
    z y x."""
    ids, starts, step = [], [], 1
    for part in read_parts(dataset.tiles_path, ["synapse_id", "z_index", "start_z", "start_y", "start_x"]):
        ids.append(part["synapse_id"].to_numpy())
        starts.append(np.stack([part[f"start_{axis}"].to_numpy() for axis in "zyx"], axis=1))
        # The middle section of a stack is as far from its first as from its last.
        step = (part["z_index"][0].as_py() - part["start_z"][0].as_py()) if len(part) else step
    order = np.argsort(together := np.concatenate(ids))
    return together[order], np.concatenate(starts)[order], ((SECTIONS - 1) * step + 1, TILE_PX, TILE_PX)


def synapse_column(dataset: Dataset, ids: np.ndarray, name: str) -> np.ndarray:
    """A column of the synapses with these ids, ascending: object (n,), None where it is null; or the ids themselves."""
    return ids if name == "synapse_id" else column_of(dataset.synapses_path, ids, name)


def _vectors(dataset: Dataset, encoder: str, ids: np.ndarray) -> np.ndarray:
    """Unit vectors of these synapses, ascending ids: float32 (n, d)."""
    vectors: np.ndarray | None = None
    for part in read_parts(dataset.table_path(encoder), ["synapse_id", "vector"]):
        places, wanted = places_among(ids, part)
        rows = part["vector"].combine_chunks().flatten().to_numpy().reshape(len(part), -1)[wanted]
        if vectors is None:
            vectors = np.empty((len(ids), rows.shape[1]), np.float32)
        vectors[places[wanted]] = rows / np.linalg.norm(rows, axis=1, keepdims=True)  # they are held rounded
    assert vectors is not None
    return vectors
