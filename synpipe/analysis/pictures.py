"""Draw tiles and sections as pictures for people.

Inputs: tiles and captions, or an opened volume. Outputs: PIL images, small enough to be kept in Dagster's history (about
200 kB as JPEG) for data sets of any size.
"""

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from synpipe.volumes.volume import Volume

Cell = tuple[np.ndarray, str]
"""A tile, uint8 (3, size, size), and its caption."""

CAPTION_PX = 14
GAP_PX = 4
HEAD_PX = 104
BACKGROUND = (24, 24, 27)
TEXT = (228, 228, 231)


def draw_sheet(rows: Mapping[str, Sequence[Cell]], tile_px: int) -> Image.Image:
    """Draw rows of tiles with their captions. The key of a row, of one or more lines, is written to its left.

    Sections z−1, z and z+1 become red, green and blue. rows: at least one. tile_px: size of a tile in the picture.
    """
    step_x, step_y = tile_px + GAP_PX, tile_px + CAPTION_PX + GAP_PX
    columns = max(map(len, rows.values()))
    canvas = Image.new("RGB", (HEAD_PX + columns * step_x + GAP_PX, len(rows) * step_y + GAP_PX), BACKGROUND)
    draw = ImageDraw.Draw(canvas)
    large, small = ImageFont.load_default(size=12), ImageFont.load_default(size=10)
    for number, (heading, cells) in enumerate(rows.items()):
        top = GAP_PX + number * step_y
        lines = [_shorten(draw, line, large, HEAD_PX - 2 * GAP_PX) for line in heading.splitlines()]
        draw.text((2 * GAP_PX, top + tile_px // 2 - 8 * len(lines)), "\n".join(lines), font=large, fill=TEXT)
        for column, (tile, caption) in enumerate(cells):
            left = HEAD_PX + column * step_x
            picture = Image.fromarray(np.ascontiguousarray(tile.transpose(1, 2, 0)))
            canvas.paste(picture.resize((tile_px, tile_px), Image.Resampling.LANCZOS), (left, top))
            draw.text((left, top + tile_px + 1), _shorten(draw, caption, small, tile_px), font=small, fill=TEXT)
    return canvas


def _shorten(draw: ImageDraw.ImageDraw, text: str, font: Any, width_px: int) -> str:
    """Remove characters from the end of a line until it fits."""
    while text and draw.textlength(text, font=font) > width_px:
        text = text[:-1]
    return text


def draw_section(volume: Volume, edge_px: int = 1536, width_px: int = 640) -> Image.Image:
    """Draw the centre of the middle section of a volume: at most `edge_px` voxels a side, reduced to `width_px`.

    Raises what reading the volume raises (`SynpipeError`).
    """
    middle = volume.shape_zyx // 2
    reach = np.array([0, edge_px // 2, edge_px // 2])
    low, high = np.maximum(middle - reach, 0), np.minimum(middle + np.maximum(reach, 1), volume.shape_zyx)
    picture = Image.fromarray(volume.read(low, high)[0])
    picture.thumbnail((width_px, width_px), Image.Resampling.LANCZOS)
    return picture


def data_uri(image: Image.Image) -> str:
    """Encode an image as a `data:` address (JPEG, quality 80), for Markdown in the Dagster UI."""
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
