"""Fetch what the pictures of a data set show from its store, and draw it.

Input: a `Dataset`. Outputs: PIL images, drawn by `synpipe.analysis.pictures` and `synpipe.analysis.charts`; their size is
bounded for data sets of any size.
"""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import pyarrow.compute as pc
from PIL import Image

from synpipe.analysis.charts import draw_map
from synpipe.analysis.pictures import draw_sheet
from synpipe.assets.pipeline import open_tiles
from synpipe.datasets import Dataset
from synpipe.index.search import UNLABELLED, Neighbour, SynapseIndex
from synpipe.store.files import read_table
from synpipe.store.streams import column_of, read_parts

MAX_CLASSES = 12
SHOWN_PER_CLASS = 2  # neighbours of each class


def tile_sheet(dataset: Dataset, rows: Mapping[str, Sequence[tuple[int, str]]], tile_px: int) -> Image.Image:
    """Draw rows of tiles, given as synapse ids with captions. The key of a row is written to its left; at least one row."""
    reader = open_tiles(dataset, [synapse_id for row in rows.values() for synapse_id, _ in row])
    cells = {
        heading: [(reader.by_id(synapse_id), caption) for synapse_id, caption in row] for heading, row in rows.items()
    }
    return draw_sheet(cells, tile_px)


def tiles_by_class(dataset: Dataset, per_class: int = 8, tile_px: int = 96) -> Image.Image | None:
    """Draw a row of tiles per class, taken at even distances from the table of tiles. Returns None if there is no tile."""
    ids = np.concatenate([part["synapse_id"].to_numpy() for part in read_parts(dataset.tiles_path, ["synapse_id"])])
    order = np.argsort(ids)
    labels = np.full(len(ids), None, dtype=object)
    labels[order] = column_of(dataset.synapses_path, ids[order], "neurotransmitter")
    rows: dict[str, list[tuple[int, str]]] = {}
    for name in (*dataset.spec.classes, None):
        of_class = np.flatnonzero(labels == np.array(name, dtype=object))
        if len(of_class) and len(rows) < MAX_CLASSES:
            places = np.linspace(0, len(of_class) - 1, min(per_class, len(of_class))).astype(int)
            rows[name or UNLABELLED] = [(one, str(one)) for one in ids[of_class[places]].tolist()]
    return tile_sheet(dataset, rows, tile_px) if rows else None


def example_queries(dataset: Dataset, encoder: str) -> list[int]:
    """Return a synapse of each class to search with: the first one whose tile is complete."""
    columns = ["synapse_id", "neurotransmitter", "pad_fraction", "missing_sections"]
    examples: dict[str, int] = {}
    for part in read_parts(dataset.table_path(encoder), columns):
        complete = part.filter(pc.and_(pc.equal(part["pad_fraction"], 0), pc.equal(part["missing_sections"], 0)))
        for name in dataset.spec.classes:
            of_class = complete.filter(pc.equal(complete["neurotransmitter"], name))
            if name not in examples and len(of_class):
                examples[name] = of_class["synapse_id"][0].as_py()
    return [examples[name] for name in dataset.spec.classes if name in examples][:MAX_CLASSES]


def neighbours_picture(
    dataset: Dataset, answers: Mapping[int, Mapping[str, Sequence[Neighbour]]], tile_px: int = 64
) -> Image.Image:
    """Draw a row per query: its tile, then the two most similar synapses of each class with their distances.

    answers: results of `SynapseIndex.search`, by the id of the query; at least one.
    """
    labels = class_by_synapse(dataset, [*answers])
    rows = {
        f"{labels[query]}\n{query}": [
            (query, "query"),
            *(
                (neighbour.synapse_id, f"{name[:4]}  {neighbour.distance:.2g}")
                for name, neighbours in answer.items()
                for neighbour in neighbours[:SHOWN_PER_CLASS]
            ),
        ]
        for query, answer in answers.items()
    }
    return tile_sheet(dataset, rows, tile_px)


def nearest_neighbours(dataset: Dataset, encoder: str, tile_px: int = 64) -> Image.Image | None:
    """Draw `neighbours_picture` for an example of each class. Returns None if no labelled synapse has a complete tile."""
    index = SynapseIndex(dataset, encoder, in_memory=False)
    answers = {query: index.search(query) for query in example_queries(dataset, encoder)}
    return neighbours_picture(dataset, answers, tile_px) if answers else None


def vector_map(dataset: Dataset, encoder: str) -> Image.Image:
    """Draw the map of an encoder, coloured by class."""
    table = read_table(dataset.projection_path(encoder))  # sorted by synapse id, as `column_of` needs it
    places = np.stack([table[axis].to_numpy() for axis in ("map_x", "map_y")], axis=1)
    labels = column_of(dataset.synapses_path, table["synapse_id"].to_numpy(), "neurotransmitter")
    return draw_map(places, labels, dataset.spec.classes, f"{dataset.name}, {encoder}: {len(table):,} synapses")


def class_by_synapse(dataset: Dataset, synapse_ids: Iterable[int]) -> dict[int, str]:
    """Return the class of each of these synapses, or "unlabelled"."""
    ids = np.unique(np.array([*synapse_ids], dtype=np.int64))
    labels = column_of(dataset.synapses_path, ids, "neurotransmitter")
    return {synapse_id: label or UNLABELLED for synapse_id, label in zip(ids.tolist(), labels, strict=True)}
