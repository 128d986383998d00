"""Pictures for people: tiles by class, synapses with their nearest neighbours, a section of the volume.

In: what the store holds of a data set. Out: PIL images. Guarantee: small enough to be kept in Dagster's history (as JPEG
some 200 kB), however large the data set.
"""

import base64
import io
from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow.compute as pc
from PIL import Image, ImageDraw, ImageFont

from synpipe.datasets import Dataset
from synpipe.pipeline import open_tiles
from synpipe.projection import map_picture
from synpipe.search import UNLABELLED, Neighbour, SynapseIndex
from synpipe.shards import read_table
from synpipe.volumes import Volume

Cell = tuple[np.ndarray, str]  # a tile, uint8 (3, size, size), and its caption

CAPTION_PX = 14
GAP_PX = 4
HEAD_PX = 104
BACKGROUND = (24, 24, 27)
TEXT = (228, 228, 231)
MAX_CLASSES = 12


def tiles_by_class(dataset: Dataset, per_class: int = 8, tile_px: int = 96) -> Image.Image | None:
    """A row of tiles per class, taken at even distances from the index of the tiles; None where there is no tile."""
    index = read_table(dataset.tiles_path, ["synapse_id"])
    reader = open_tiles(dataset)
    labels = class_by_synapse(dataset)
    classes = np.array([labels[synapse_id] for synapse_id in index["synapse_id"].to_pylist()])
    rows: dict[str, list[Cell]] = {}
    for name in (*dataset.spec.classes, UNLABELLED):
        of_class = np.flatnonzero(classes == name)
        if len(of_class) and len(rows) < MAX_CLASSES:
            chosen = of_class[np.linspace(0, len(of_class) - 1, min(per_class, len(of_class))).astype(int)]
            captions = [str(index["synapse_id"][row]) for row in chosen.tolist()]
            rows[name] = list(zip(reader.read(chosen), captions, strict=True))
    return sheet(rows, tile_px) if rows else None


def example_queries(dataset: Dataset, encoder: str) -> list[int]:
    """A synapse of each class to search with, the first whose tile is whole."""
    columns = ["synapse_id", "neurotransmitter", "pad_fraction", "missing_sections"]
    table = read_table(dataset.table_path(encoder), columns)
    whole = table.filter(pc.and_(pc.equal(table["pad_fraction"], 0), pc.equal(table["missing_sections"], 0)))
    of_class = (whole.filter(pc.equal(whole["neurotransmitter"], name)) for name in dataset.spec.classes)
    return [found["synapse_id"][0].as_py() for found in of_class if len(found)][:MAX_CLASSES]


def neighbours_picture(
    dataset: Dataset, answers: Mapping[int, Mapping[str, Sequence[Neighbour]]], tile_px: int = 64
) -> Image.Image:
    """A row per query: its tile, then the two most similar synapses of each class, with their distances.

    answers: what `SynapseIndex.search` found, by the query's synapse id; at least one.
    """
    reader = open_tiles(dataset)
    labels = class_by_synapse(dataset)
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
    index = SynapseIndex(dataset, encoder)
    answers = {query: index.search(query) for query in example_queries(dataset, encoder)}
    return neighbours_picture(dataset, answers, tile_px) if answers else None


def vector_map(dataset: Dataset, encoder: str) -> Image.Image:
    """The map of an encoder, coloured by class."""
    table = read_table(dataset.projection_path(encoder))
    classes, labels = dataset.spec.classes, class_by_synapse(dataset)
    places = np.stack([table[axis].to_numpy() for axis in ("map_x", "map_y")], axis=1)
    found = np.array([labels[synapse_id] for synapse_id in table["synapse_id"].to_pylist()])
    return map_picture(places, found, classes, f"{dataset.name}, {encoder}: {len(table):,} synapses")


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


def class_by_synapse(dataset: Dataset) -> dict[int, str]:
    """Class by synapse."""
    table = read_table(dataset.synapses_path, ["synapse_id", "neurotransmitter"])
    labels = (label or UNLABELLED for label in table["neurotransmitter"].to_pylist())
    return dict(zip(table["synapse_id"].to_pylist(), labels, strict=True))
