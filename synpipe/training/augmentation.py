"""Tiles as they might as well have looked: turned, mirrored, a little aside, brighter, noisier; never larger or smaller.

In: uint8 tiles on any device, and a seed. Out: the centre crop that the encoder is shown, as float32 grey values 0 to 255.
Guarantee: the same tiles and seed give the same crops; every pixel is one of the tile's, so that a nanometre stays as long as
it was: EM is calibrated, and the diameter of a vesicle tells transmitters apart.
"""

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch

MAX_SHIFT_PX = 16
CONTRAST = 0.2  # largest relative change
BRIGHTNESS = 20.0  # largest change, grey values
NOISE = 8.0  # largest standard deviation, grey values


def augment(tiles: "torch.Tensor", crop_px: int, seed: list[int]) -> "torch.Tensor":
    """uint8 (n, 3, t, t) to float32 (n, 3, crop_px, crop_px).

    One of the eight symmetries of the square and, evenly, the sections in reverse; the centre moved by up to `MAX_SHIFT_PX`
    along each axis; contrast, brightness and noise of each tile on its own, evenly up to the limits above.
    """
    import torch

    random = np.random.default_rng(seed)
    count, _, tile_px, _ = tiles.shape
    device = tiles.device

    def drawn(values: np.ndarray) -> "torch.Tensor":
        return torch.from_numpy(values).to(device)

    reach = min(MAX_SHIFT_PX, (tile_px - crop_px) // 2)
    start = (tile_px - crop_px) // 2 + random.integers(-reach, reach + 1, (2, count, 1))
    places = start + np.arange(crop_px)
    flipped = random.random((2, count, 1)) < 0.5
    rows, columns = (drawn(axis) for axis in np.where(flipped, places[:, :, ::-1], places))
    sections = np.where(random.random((count, 1)) < 0.5, np.arange(2, -1, -1), np.arange(3))
    picked = tiles[
        torch.arange(count, device=device)[:, None, None, None],
        drawn(sections)[:, :, None, None],
        rows[:, None, :, None],
        columns[:, None, None, :],
    ].float()
    turned = drawn(random.random((count, 1, 1, 1)) < 0.5)
    picked = torch.where(turned, picked.transpose(2, 3), picked)

    contrast = drawn(1 + random.uniform(-CONTRAST, CONTRAST, (count, 1, 1, 1)).astype(np.float32))
    brightness = drawn(random.uniform(-BRIGHTNESS, BRIGHTNESS, (count, 1, 1, 1)).astype(np.float32))
    noise = drawn(random.uniform(0, NOISE, (count, 1, 1, 1)).astype(np.float32))
    generator = torch.Generator(device).manual_seed(int(random.integers(2**62)))
    mean = picked.mean(dim=(1, 2, 3), keepdim=True)
    picked = (picked - mean) * contrast + mean + brightness
    picked += noise * torch.randn(picked.shape, device=device, generator=generator)
    return picked.clamp_(0, 255)
