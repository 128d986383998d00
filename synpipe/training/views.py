"""Draws randomly altered views of places, for batches of blocks on any device.

Input: blocks, uint8 (n, 5, side, side), the places in them, and a random generator. Output: views, float (n, 3, crop, crop):
three neighbouring sections, as in a tile. On one device, the same generator state gives the same views.

The alterations are those that can occur between two images of the same tissue: any turn and mirroring, a shift of up to 8 px,
one section up or down, sections misaligned by a pixel, a missing neighbouring section, brightness, contrast and gamma,
shading, blur, shot noise, and saturation. Scale varies only within the pixel sizes that the encoder is made for. Shape varies
by 6 %, the compression that cutting causes in a section.
"""

import math

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from synpipe.embeddings.em_network import standardise

SHIFT_PX = 8.0
"""In pixels of the working size, about 9 nm. They correspond to 16 px of a tile with 4–5 nm pixels."""


def draw_views(
    blocks: Tensor,
    centres_yx: Tensor,
    zoom: tuple[Tensor, Tensor],
    mirror_z: Tensor,
    crop_px: int,
    generator: Generator,
) -> Tensor:
    """Draw one view per block: float (n, 3, crop_px, crop_px), in units of the standard deviation of each section.

    blocks: uint8 (n, 5, side, side). centres_yx: pixels, (n, 2). zoom: the smallest and largest number of block pixels per
    pixel of the view, (n,) each. mirror_z: whether the sections are reversed, bool (n,). Both views of a pair need the same
    value, because reversing turns an obliquely cut structure into a different one.
    """
    views = _cut(blocks, centres_yx, zoom, crop_px, generator)
    views = torch.where(mirror_z[:, None, None, None], views.flip(1), views)
    return _alter_pixels(views, generator)


def _uniform(count: int, low: float, high: float, generator: Generator) -> Tensor:
    return torch.rand(count, generator=generator, device=generator.device) * (high - low) + low


def _cut(blocks: Tensor, centres_yx: Tensor, zoom: tuple[Tensor, Tensor], crop_px: int, generator: Generator) -> Tensor:
    """Three sections of each block, turned, shifted and scaled: float (n, 3, crop_px, crop_px), grey values."""
    count, device, side = len(blocks), blocks.device, blocks.shape[-1]
    offset = torch.randint(-1, 2, (count,), generator=generator, device=device)
    sections = 2 + offset[:, None] + torch.arange(-1, 2, device=device)
    source = blocks[torch.arange(count, device=device)[:, None], sections].float()

    low, high = zoom[0].log(), zoom[1].log()
    scale = torch.exp(low + (high - low) * _uniform(count, 0, 1, generator))
    stretch = torch.exp(_uniform(count, -0.06, 0.06, generator))
    mirror = torch.where(_uniform(count, 0, 1, generator) < 0.5, -1.0, 1.0)
    scale_x, scale_y = scale * stretch * mirror, scale / stretch
    angle = _uniform(count, 0, 2 * math.pi, generator)
    cos, sin = angle.cos(), angle.sin()

    shift = (torch.rand(count, 2, generator=generator, device=device) * 2 - 1) * SHIFT_PX * scale[:, None]
    misaligned = (
        torch.randn(count, 3, 2, generator=generator, device=device)
        * 1.2
        * _uniform(count, 0, 1, generator)[:, None, None]
    )
    misaligned[:, 1] = 0
    centre = (centres_yx + shift)[:, None] + misaligned

    line = torch.arange(crop_px, device=device) - (crop_px - 1) / 2
    v, u = torch.meshgrid(line, line, indexing="ij")
    x = (cos * scale_x)[:, None, None] * u - (sin * scale_y)[:, None, None] * v
    y = (sin * scale_x)[:, None, None] * u + (cos * scale_y)[:, None, None] * v
    grid = torch.stack([x[:, None] + centre[:, :, 1, None, None], y[:, None] + centre[:, :, 0, None, None]], -1)
    sampled = F.grid_sample(
        source.reshape(count * 3, 1, side, side),
        ((grid * 2 + 1) / side - 1).reshape(count * 3, crop_px, crop_px, 2),
        padding_mode="reflection",
        align_corners=False,
    )
    return sampled.reshape(count, 3, crop_px, crop_px)


def _alter_pixels(x: Tensor, generator: Generator) -> Tensor:
    """Drop neighbours, standardise, and change gamma, sharpness, shading, noise and saturation."""
    count, device, size = len(x), x.device, x.shape[-1]

    def uniform(low: float, high: float) -> Tensor:
        return _uniform(count, low, high, generator)[:, None, None, None]

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    # In place of a missing neighbour, the pipeline puts the middle section.
    side = torch.randint(0, 2, (count,), generator=generator, device=device) * 2
    order = torch.arange(3, device=device).repeat(count, 1)
    missing = (order == side[:, None]) & (uniform(0, 1)[:, :, 0, 0] < 0.1)
    x = x[torch.arange(count, device=device)[:, None], order.masked_fill(missing, 1)]

    x = standardise(x).clamp(-3, 3)
    x = x + (uniform(-0.25, 0.25) + 0.04 * normal(count, 3, 1, 1)) * (x * x - 1)  # gamma, to second order
    x = torch.where(uniform(0, 1) < 0.5, _blur(x, _uniform(count, 0.05, 1.1, generator)), x)
    line = torch.linspace(-1, 1, size, device=device)
    x = x + 0.15 * normal(count, 1, 1, 1) * line[:, None] + 0.15 * normal(count, 1, 1, 1) * line
    x = x + uniform(0, 0.5) * normal(*x.shape)
    return torch.minimum(torch.maximum(x, -uniform(1.5, 4)), uniform(1.2, 4))


def _blur(x: Tensor, sigma_px: Tensor) -> Tensor:
    """Blur views, (n, 3, h, w), each with a Gaussian of its own standard deviation, (n,)."""
    count, channels, height, width = x.shape
    offset = torch.arange(-3, 4, device=x.device)
    kernel = torch.exp(-(offset**2) / (2 * sigma_px[:, None] ** 2))
    kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(channels, 0)
    flat = x.reshape(1, count * channels, height, width)
    flat = F.conv2d(F.pad(flat, (3, 3, 0, 0), mode="replicate"), kernel[:, None, None, :], groups=len(kernel))
    flat = F.conv2d(F.pad(flat, (0, 0, 3, 3), mode="replicate"), kernel[:, None, :, None], groups=len(kernel))
    return flat.reshape(x.shape)
