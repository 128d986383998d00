"""Augments tiles at random for fine-tuning: turned, mirrored, shifted, brighter or noisier, but never rescaled.

Input: uint8 tiles on any device, and a seed. Output: the centre crop that the encoder sees, as float32 grey values from 0 to
255. The same tiles and seed give the same crops. Pixels are moved but never interpolated, so a nanometre keeps its length in
pixels. This matters because EM is calibrated, and the diameter of vesicles helps to tell transmitters apart.
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
    """Augment tiles, uint8 (n, 3, t, t), to crops, float32 (n, 3, crop_px, crop_px).

    Each tile gets one of the eight symmetries of the square, reversed sections with probability one half, a shift of up to
    `MAX_SHIFT_PX` along each axis, and its own contrast, brightness and noise. All values are drawn uniformly up to the limits
    above.
    """
    import torch

    random = np.random.default_rng(seed)
    count, _, tile_px, _ = tiles.shape
    device = tiles.device

    def to_device(values: np.ndarray) -> "torch.Tensor":
        return torch.from_numpy(values).to(device)

    max_shift = min(MAX_SHIFT_PX, (tile_px - crop_px) // 2)
    start = (tile_px - crop_px) // 2 + random.integers(-max_shift, max_shift + 1, (2, count, 1))
    indices = start + np.arange(crop_px)
    flipped = random.random((2, count, 1)) < 0.5
    rows, columns = (to_device(axis) for axis in np.where(flipped, indices[:, :, ::-1], indices))
    sections = np.where(random.random((count, 1)) < 0.5, np.arange(2, -1, -1), np.arange(3))
    crops = tiles[
        torch.arange(count, device=device)[:, None, None, None],
        to_device(sections)[:, :, None, None],
        rows[:, None, :, None],
        columns[:, None, None, :],
    ].float()
    transposed = to_device(random.random((count, 1, 1, 1)) < 0.5)
    crops = torch.where(transposed, crops.transpose(2, 3), crops)

    contrast = to_device(1 + random.uniform(-CONTRAST, CONTRAST, (count, 1, 1, 1)).astype(np.float32))
    brightness = to_device(random.uniform(-BRIGHTNESS, BRIGHTNESS, (count, 1, 1, 1)).astype(np.float32))
    noise = to_device(random.uniform(0, NOISE, (count, 1, 1, 1)).astype(np.float32))
    generator = torch.Generator(device).manual_seed(int(random.integers(2**62)))
    mean = crops.mean(dim=(1, 2, 3), keepdim=True)
    crops = (crops - mean) * contrast + mean + brightness
    crops += noise * torch.randn(crops.shape, device=device, generator=generator)
    return crops.clamp_(0, 255)
