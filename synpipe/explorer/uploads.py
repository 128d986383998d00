"""Turns an image from a browser into a tile.

Input: untrusted PNG bytes. Output: uint8 (3, 256, 256).

Guarantees: only Pillow's PNG decoder reads the bytes, at most `MAX_BYTES` of them and at most `MAX_PIXELS` pixels. The image is
never resized, because the scale of EM is calibrated.
"""

import io
import warnings

import numpy as np
from PIL import Image

from synpipe.errors import SynpipeError
from synpipe.tiles.tile import SECTIONS, TILE_PX

MAX_BYTES = 4 * 2**20
MAX_PIXELS = 2048 * 2048
MIN_SIDE_PX = 32  # the smallest crop that any encoder uses


def tile_from_png(content: bytes) -> np.ndarray:
    """The centre of the image at its own scale, uint8 (3, 256, 256).

    An image that is smaller than a tile is surrounded by its mean grey. A grey image is used for all three sections. In a colour
    image, red, green and blue are sections z−1, z and z+1.

    Raises `SynpipeError` if the content is not a PNG with 8 bits per channel, is damaged, or is too large or too small.
    """
    try:
        with warnings.catch_warnings(), Image.open(io.BytesIO(content), formats=["PNG"]) as image:
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            width, height = image.size
            if width * height > MAX_PIXELS or min(width, height) < MIN_SIDE_PX:
                raise SynpipeError(
                    f"The image has {width}×{height} pixels. Use an image of at least {MIN_SIDE_PX}×{MIN_SIDE_PX} pixels and at "
                    f"most {MAX_PIXELS:,} pixels in all."
                )
            if image.mode not in ("L", "LA", "P", "RGB", "RGBA", "1"):
                raise SynpipeError(f"The image has pixels of type {image.mode}. Save it with 8 bits per channel.")
            pixels = np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise SynpipeError(
            "The image cannot be read as PNG. Save it as a grey or RGB PNG file, and try again."
        ) from None
    top, left = (max(0, (size - TILE_PX) // 2) for size in pixels.shape[:2])
    centre = pixels[top : top + TILE_PX, left : left + TILE_PX].transpose(2, 0, 1)
    tile = np.empty((SECTIONS, TILE_PX, TILE_PX), np.uint8)
    tile[:] = np.rint(centre.mean(axis=(1, 2), keepdims=True))
    first_y, first_x = ((TILE_PX - size) // 2 for size in centre.shape[1:])
    tile[:, first_y : first_y + centre.shape[1], first_x : first_x + centre.shape[2]] = centre
    return tile
