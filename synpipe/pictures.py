"""Pictures of tiles for people: contact sheets, neighbours, a section of the volume.

In: uint8 tiles (3, size, size) with captions. Out: encoded images as bytes. Guarantee: small enough to be kept in
Dagster's event log (a contact sheet is a JPEG of some 100 kB).
"""

import base64
import io
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from synpipe.volumes import Volume

CAPTION_PX = 14
GAP_PX = 4
BACKGROUND = (24, 24, 27)
TEXT = (228, 228, 231)


def sheet(
    rows: Sequence[Sequence[tuple[np.ndarray, str]]], tile_px: int = 96, head_px: int = 0, heads: Sequence[str] = ()
):
    """Rows of (tile, caption), each row with an optional head to its left: a PIL image.

    tile: uint8 (3, size, size), sections z−1, z, z+1 as red, green, blue.
    """
    font = ImageFont.load_default(size=10)
    columns = max((len(row) for row in rows), default=0)
    step_x, step_y = tile_px + GAP_PX, tile_px + CAPTION_PX + GAP_PX
    canvas = Image.new("RGB", (head_px + columns * step_x + GAP_PX, len(rows) * step_y + GAP_PX), BACKGROUND)
    draw = ImageDraw.Draw(canvas)
    for number, row in enumerate(rows):
        top = GAP_PX + number * step_y
        if head_px:
            draw.text((GAP_PX, top + tile_px // 2 - 6), heads[number], font=ImageFont.load_default(size=12), fill=TEXT)
        for column, (tile, caption) in enumerate(row):
            left = head_px + GAP_PX + column * step_x
            picture = Image.fromarray(np.ascontiguousarray(tile.transpose(1, 2, 0)))
            canvas.paste(picture.resize((tile_px, tile_px), Image.Resampling.LANCZOS), (left, top))
            draw.text((left, top + tile_px + 1), _fit(draw, caption, font, tile_px), font=font, fill=TEXT)
    return canvas


def contact_sheet(tiles: Sequence[np.ndarray], captions: Sequence[str], columns: int = 8, tile_px: int = 112):
    """Tiles in a grid, row by row: a PIL image."""
    cells = list(zip(tiles, captions, strict=True))
    return sheet([cells[first : first + columns] for first in range(0, len(cells), columns)], tile_px)


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


def _fit(draw: ImageDraw.ImageDraw, text: str, font, width: int) -> str:
    while text and draw.textlength(text, font=font) > width:
        text = text[:-1]
    return text
