"""Measures an encoder on held-out blocks: how often an altered view of a place finds that place among all others.

Input: a network, and blocks from the parts of the volumes that were not used for training. Output: figures for each volume.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from synpipe.embeddings.em_network import D4ResNet
from synpipe.training.blocks import Blocks, TrainingVolume
from synpipe.training.views import draw_views


@dataclass(frozen=True)
class Retrieval:
    """The share of held-out places whose altered view has the place itself as its nearest, or among its five nearest."""

    places: int
    recall_at_1: float
    recall_at_5: float


def measure_retrieval(
    network: D4ResNet, blocks: Blocks, volumes: Sequence[TrainingVolume], crop_px: int, device: torch.device
) -> dict[str, dict[str, float]]:
    """Fields of `Retrieval` for each volume that has blocks, by its name.

    Altered views are drawn as in pretraining; the original is the unaltered centre of the block. crop_px: size of a view.
    The network is put into evaluation mode and back.
    """
    was_training = network.training
    network.eval()
    figures = {}
    for number, volume in enumerate(volumes):
        of_volume = blocks.volume == number
        if of_volume.any():
            selected = replace(blocks, **{name: values[of_volume] for name, values in vars(blocks).items()})
            figures[volume.name] = asdict(_measure_volume(network, selected, volume, crop_px, device))
    network.train(was_training)
    return figures


def _measure_volume(
    network: D4ResNet, blocks: Blocks, volume: TrainingVolume, crop_px: int, device: torch.device
) -> Retrieval:
    pixels = torch.from_numpy(blocks.pixels).to(device)
    scale = torch.from_numpy(blocks.pixel_nm).to(device) / volume.pixel_nm
    centre = torch.full((len(pixels), 2), pixels.shape[-1] / 2, device=device)
    generator = torch.Generator(device).manual_seed(0)
    altered = draw_views(pixels, centre, (scale, scale), torch.zeros_like(scale).bool(), crop_px, generator)
    first = (pixels.shape[-1] - crop_px) // 2
    plain = pixels[:, 1:4, first : first + crop_px, first : first + crop_px].float()
    queries, originals = (F.normalize(_embed(network, views), dim=1) for views in (altered, plain))
    similarity = queries @ originals.T
    # Blocks that overlap show the same tissue, so they do not count as wrong answers.
    distance = np.abs(blocks.centre_zyx[:, None] - blocks.centre_zyx[None])
    reach = np.array([3 * volume.step, crop_px * volume.shrink // 2, crop_px * volume.shrink // 2])
    overlapping = torch.from_numpy((distance < reach).all(2)).to(device).fill_diagonal_(False)
    own = similarity.diag()[:, None]
    rank = (similarity.masked_fill(overlapping, -torch.inf).fill_diagonal_(-torch.inf) >= own).sum(1)
    return Retrieval(len(rank), *(round((rank < k).float().mean().item(), 4) for k in (1, 5)))


@torch.inference_mode()
def _embed(network: D4ResNet, views: Tensor) -> Tensor:
    return torch.cat([network(batch) for batch in views.split(256)])
