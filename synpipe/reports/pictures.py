"""Pictures for people: tiles by class, synapses with their nearest neighbours, a section of the volume.

In: what the store holds of a data set. Out: PIL images. Guarantee: small enough to be kept in Dagster's history (as JPEG
some 200 kB), however large the data set.
"""

import base64
import io
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import pyarrow.compute as pc
from PIL import Image, ImageDraw, ImageFont

from synpipe.analysis.projection import map_picture
from synpipe.annotations.schema import UNLABELLED
from synpipe.assets.pipeline import open_tiles
from synpipe.datasets import Dataset
from synpipe.index.search import Neighbour, SynapseIndex
from synpipe.store.files import read_table
from synpipe.store.streams import column_of, read_batches
from synpipe.volumes.volume import Volume

Cell = tuple[np.ndarray, str]  # a tile, uint8 (3, size, size), and its caption

CAPTION_PX = 14
GAP_PX = 4
HEAD_PX = 104
BACKGROUND = (24, 24, 27)
TEXT = (228, 228, 231)
MAX_CLASSES = 12


def tiles_by_class(dataset: Dataset, per_class: int = 8, tile_px: int = 96) -> Image.Image | None:
    """A row of tiles per class, taken at even distances from the index of the tiles; None where there is no tile."""
    ids = np.concatenate([part["synapse_id"].to_numpy() for part in read_batches(dataset.tiles_path, ["synapse_id"])])
    order = np.argsort(ids)
    labels = np.full(len(ids), None, dtype=object)
    labels[order] = column_of(dataset.synapses_path, ids[order], "neurotransmitter")
    chosen: dict[str, list[int]] = {}
    for name in (*dataset.spec.classes, None):
        of_class = np.flatnonzero(labels == np.array(name, dtype=object))
        if len(of_class) and len(chosen) < MAX_CLASSES:
            places = np.linspace(0, len(of_class) - 1, min(per_class, len(of_class))).astype(int)
            chosen[name or UNLABELLED] = ids[of_class[places]].tolist()
    reader = open_tiles(dataset, [synapse_id for row in chosen.values() for synapse_id in row])
    rows = {name: [(reader.by_id(synapse_id), str(synapse_id)) for synapse_id in row] for name, row in chosen.items()}
    return sheet(rows, tile_px) if rows else None


def example_queries(dataset: Dataset, encoder: str) -> list[int]:
    """A synapse of each class to search with, the first whose tile is whole."""
    columns = ["synapse_id", "neurotransmitter", "pad_fraction", "missing_sections"]
    found: dict[str, int] = {}
    for part in read_batches(dataset.table_path(encoder), columns):
        whole = part.filter(pc.and_(pc.equal(part["pad_fraction"], 0), pc.equal(part["missing_sections"], 0)))
        for name in dataset.spec.classes:
            of_class = whole.filter(pc.equal(whole["neurotransmitter"], name))
            if name not in found and len(of_class):
                found[name] = of_class["synapse_id"][0].as_py()
    return [found[name] for name in dataset.spec.classes if name in found][:MAX_CLASSES]


def neighbours_picture(
    dataset: Dataset, answers: Mapping[int, Mapping[str, Sequence[Neighbour]]], tile_px: int = 64
) -> Image.Image:
    """A row per query: its tile, then the two most similar synapses of each class, with their distances.

    answers: what `SynapseIndex.search` found, by the query's synapse id; at least one.
    """
    shown = [one.synapse_id for answer in answers.values() for near in answer.values() for one in near[:2]]
    reader = open_tiles(dataset, [*answers, *shown])
    labels = class_by_synapse(dataset, [*answers])
    rows = {}
    for query, answer in answers.items():
        found = [
            (one.synapse_id, f"{name[:4]}  {one.distance:.2g}") for name, near in answer.items() for one in near[:2]
        ]
        cells = [(reader.by_id(synapse_id), caption) for synapse_id, caption in [(query, "query"), *found]]
        rows[f"{labels[query]}\n{query}"] = cells
    return sheet(rows, tile_px)


def nearest_neighbours(dataset: Dataset, encoder: str, tile_px: int = 64) -> Image.Image | None:
    """`neighbours_picture` for an example of each class; None where no tile of a known class is whole."""
    index = SynapseIndex(dataset, encoder, in_memory=False)
    answers = {query: index.search(query) for query in example_queries(dataset, encoder)}
    return neighbours_picture(dataset, answers, tile_px) if answers else None


def vector_map(dataset: Dataset, encoder: str) -> Image.Image:
    """The map of an encoder, coloured by class."""
    table = read_table(dataset.projection_path(encoder))  # by id
    places = np.stack([table[axis].to_numpy() for axis in ("map_x", "map_y")], axis=1)
    labels = column_of(dataset.synapses_path, table["synapse_id"].to_numpy(), "neurotransmitter")
    return map_picture(places, labels, dataset.spec.classes, f"{dataset.name}, {encoder}: {len(table):,} synapses")


def section_picture(volume: Volume, edge_px: int = 1536, width_px: int = 640) -> Image.Image:
    """The middle of the middle section of a volume, at most `edge_px` voxels a side, reduced to `width_px`."""
    middle = volume.shape_zyx // 2
    reach = np.array([0, edge_px // 2, edge_px // 2])
    low, high = np.maximum(middle - reach, 0), np.minimum(middle + np.maximum(reach, 1), volume.shape_zyx)
    picture = Image.fromarray(volume.read(low, high)[0])
    picture.thumbnail((width_px, width_px), Image.Resampling.LANCZOS)
    return picture


def data_uri(image: Image.Image) -> str:
    """The image as a `data:` address (JPEG, quality 80), for Markdown in the Dagster UI."""
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def sheet(rows: Mapping[str, Sequence[Cell]], tile_px: int) -> Image.Image:
    """Rows of tiles by the text to their left; sections z−1, z, z+1 are red, green and blue."""
    step_x, step_y = tile_px + GAP_PX, tile_px + CAPTION_PX + GAP_PX
    columns = max(map(len, rows.values()))
    canvas = Image.new("RGB", (HEAD_PX + columns * step_x + GAP_PX, len(rows) * step_y + GAP_PX), BACKGROUND)
    draw = ImageDraw.Draw(canvas)
    large, small = ImageFont.load_default(size=12), ImageFont.load_default(size=10)
    for number, (head, row) in enumerate(rows.items()):
        top = GAP_PX + number * step_y
        lines = [_fit(draw, line, large, HEAD_PX - 2 * GAP_PX) for line in head.splitlines()]
        draw.text((2 * GAP_PX, top + tile_px // 2 - 8 * len(lines)), "\n".join(lines), font=large, fill=TEXT)
        for column, (tile, caption) in enumerate(row):
            left = HEAD_PX + column * step_x
            picture = Image.fromarray(np.ascontiguousarray(tile.transpose(1, 2, 0)))
            canvas.paste(picture.resize((tile_px, tile_px), Image.Resampling.LANCZOS), (left, top))
            draw.text((left, top + tile_px + 1), _fit(draw, caption, small, tile_px), font=small, fill=TEXT)
    return canvas


def _fit(draw: ImageDraw.ImageDraw, text: str, font, width_px: int) -> str:
    while text and draw.textlength(text, font=font) > width_px:
        text = text[:-1]
    return text


def class_by_synapse(dataset: Dataset, synapse_ids: Iterable[int]) -> dict[int, str]:
    """Class of each of these synapses."""
    ids = np.unique(np.array([*synapse_ids], dtype=np.int64))
    labels = column_of(dataset.synapses_path, ids, "neurotransmitter")
    return {synapse_id: label or UNLABELLED for synapse_id, label in zip(ids.tolist(), labels, strict=True)}
