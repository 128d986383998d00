"""An image from a browser becomes a tile.

In: bytes of a PNG file, of which nothing is believed. Out: uint8 (3, 256, 256). Guarantees: no more than `MOST_BYTES` and
`MOST_PIXELS` are decoded, by Pillow's PNG decoder alone; pixels are never resized, because EM has a calibrated scale.
"""

import io
import warnings

import numpy as np
from PIL import Image

from synpipe.errors import SynpipeError
from synpipe.tiles.tile import SECTIONS, TILE_PX

MOST_BYTES = 4 * 2**20
MOST_PIXELS = 2048 * 2048
LEAST_PX = 32  # the smallest that any encoder looks at


def tile_of_png(content: bytes) -> np.ndarray:
    """The centre of the image at its own scale, filled up with its mean grey where it is smaller than a tile.

    A grey image is taken for all three sections; red, green and blue of another for z−1, z and z+1. Raises `SynpipeError`
    where it is no PNG of 8 bits a channel, is damaged, too large or too small.
    """
    try:
        with warnings.catch_warnings(), Image.open(io.BytesIO(content), formats=["PNG"]) as image:
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            width, height = image.size
            if width * height > MOST_PIXELS or min(width, height) < LEAST_PX:
                raise SynpipeError(
                    f"The image has {width}×{height} pixels; at least {LEAST_PX}×{LEAST_PX} and at most {MOST_PIXELS:,} of them "
                    "are needed."
                )
            if image.mode not in ("L", "LA", "P", "RGB", "RGBA", "1"):
                raise SynpipeError(f"The image has pixels of the kind {image.mode}: save it with 8 bits a channel.")
            pixels = np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise SynpipeError(
            "This is no PNG image that can be read. Save it as PNG, grey or RGB, and try again."
        ) from None
    top, left = (max(0, (size - TILE_PX) // 2) for size in pixels.shape[:2])
    centre = pixels[top : top + TILE_PX, left : left + TILE_PX].transpose(2, 0, 1)
    tile = np.empty((SECTIONS, TILE_PX, TILE_PX), np.uint8)
    tile[:] = np.rint(centre.mean(axis=(1, 2), keepdims=True))
    first_y, first_x = ((TILE_PX - size) // 2 for size in centre.shape[1:])
    tile[:, first_y : first_y + centre.shape[1], first_x : first_x + centre.shape[2]] = centre
    return tile
