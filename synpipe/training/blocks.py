"""Draws blocks for pretraining: small stacks of sections from random places of EM volumes, at the working pixel size.

Input: the sources of a recipe. Output: `Blocks`, uint8 (n, 5, side, side), with the pixel size of each block. Held-out blocks
for measurements come from a part of the volume that the other blocks never touch. The volumes, the counts and the seed
determine the blocks.

Pixels are averaged k × k, where k brings them closest to `WORKING_NM`. A volume with (nearly) cubic voxels is cut along all
three axes, with sections 40–50 nm apart. In three of five blocks, each section is the mean of the slices within 40 nm, because
an electron beam projects a whole section. In the others, each section is a single slice.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from synpipe.datasets import Project
from synpipe.errors import SynpipeError
from synpipe.synthetic.demo import VOLUME, make_demo
from synpipe.tiles.tile import TileSpec, is_blank
from synpipe.training.recipe import TrainingSource
from synpipe.volumes.volume import MissingChunk, Volume, VolumeSpec

WORKING_NM = 9.2
"""Pixel size at which the encoder works: two pixels of 4.6 nm, and close to one of 8 or 10 nm."""
SECTION_NM = 40.0
BLOCK_SECTIONS = 5  # the three sections of a tile, and one on either side for views that are shifted by one section
CUBIC = 1.5  # voxels count as cubic up to this ratio of depth to width
HELD_OUT = 0.25  # the share of the volume along x that is held out
SIDE_PX, HELD_OUT_SIDE_PX = 144, 120
TRIES = 20  # random places per block before a volume counts as blank


@dataclass(frozen=True)
class TrainingVolume:
    """An opened source and how it is cut into blocks.

    step: distance between two sections along z, in slices. share: of the blocks, relative to the other volumes.
    """

    name: str
    volume: Volume
    step: int
    share: float

    @property
    def cubic(self) -> bool:
        """Whether it can be cut along all three axes."""
        depth, _, width = self.volume.voxel_size_nm_zyx
        return bool(depth < CUBIC * width)

    @property
    def shrink(self) -> int:
        """How many pixels are averaged along each axis of a section."""
        return max(1, round(WORKING_NM / float(self.volume.voxel_size_nm_zyx[2])))

    @property
    def pixel_nm(self) -> float:
        """Pixel size after averaging."""
        return float(self.volume.voxel_size_nm_zyx[2]) * self.shrink


@dataclass(frozen=True)
class Blocks:
    """pixels: uint8 (n, 5, side, side). pixel_nm: float32 (n,). volume: index of the volume, int64 (n,). centre_zyx: in
    voxels of the volume, int64 (n, 3)."""

    pixels: np.ndarray
    pixel_nm: np.ndarray
    volume: np.ndarray
    centre_zyx: np.ndarray


def open_training_volume(
    source: TrainingSource, project: Project, base: Path, progress: Callable[[str], None]
) -> TrainingVolume:
    """Open the volume of a source. A synthetic volume is made first.

    base: the folder where relative paths of a volume start. Raises `SynpipeError` if the volume cannot be read.
    """
    if source.synthetic is not None:
        folder = project.store / "pretraining" / f"synthetic_{source.synthetic.digest()[:12]}"
        make_demo(folder, source.synthetic, progress)
        volume, tiles = Volume(VolumeSpec(path=VOLUME), folder), TileSpec()
    elif source.volume is not None:
        volume, tiles = Volume(source.volume, base), TileSpec()
    else:
        assert source.dataset is not None  # the spec requires one of the three
        dataset = project.dataset(source.dataset)
        if dataset.spec.synthetic is not None:
            make_demo(dataset.base, dataset.spec.synthetic, progress)
        volume, tiles = Volume(dataset.spec.volume, dataset.base), dataset.spec.tiles
    opened = TrainingVolume(source.name, volume, 1, source.share)
    depth_nm = float(volume.voxel_size_nm_zyx[0])
    step = max(1, round(SECTION_NM / depth_nm)) if opened.cubic else tiles.section_step(volume.voxel_size_nm_zyx)
    return replace(opened, step=step)


def draw_blocks(volumes: Sequence[TrainingVolume], count: int, seed: int, held_out: bool = False) -> Blocks:
    """Draw `count` blocks from the volumes, according to their shares.

    held_out: take the last quarter of each volume along x, and cut along z only. Otherwise take the rest.
    Raises `SynpipeError` if a volume is too small or blank.
    """
    shares = np.array([volume.share for volume in volumes])
    counts = np.diff(np.round(np.concatenate([[0], np.cumsum(shares / shares.sum())]) * count)).astype(int)
    side = HELD_OUT_SIDE_PX if held_out else SIDE_PX
    drawn = []
    for number, (volume, count_here) in enumerate(zip(volumes, counts.tolist(), strict=True)):
        rng = np.random.default_rng([seed, number, held_out])
        drawn += [(*_draw_block(volume, side, held_out, rng), volume.pixel_nm, number) for _ in range(count_here)]
    pixels, centres, pixel_nm, numbers = zip(*drawn, strict=True)
    return Blocks(np.stack(pixels), np.array(pixel_nm, np.float32), np.array(numbers), np.stack(centres))


def _draw_block(
    opened: TrainingVolume, side: int, held_out: bool, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Pixels, uint8 (5, side, side), and the centre in voxels, int64 (3,), z y x."""
    shape = opened.volume.shape_zyx
    border = round(int(shape[2]) * (1 - HELD_OUT))
    low = np.array([0, 0, border if held_out else 0])
    high = np.array([shape[0], shape[1], shape[2] if held_out else border])
    for _ in range(TRIES):
        axis = int(rng.integers(3)) if opened.cubic and not held_out else 0
        step = opened.step + int(rng.integers(2)) if opened.cubic and not held_out else opened.step
        thickness = opened.step if opened.cubic and (held_out or rng.random() < 0.6) else 1
        size = np.full(3, side * opened.shrink)
        size[axis] = (BLOCK_SECTIONS - 1) * step + thickness
        if (size > high - low).any():
            part = "last quarter" if held_out else "part before the last quarter"
            raise SynpipeError(
                f"Volume {opened.volume.path} is too small to learn from: a block needs {size.tolist()} voxels (z y x), and the "
                f"{part} along x has {(high - low).tolist()}. Use a larger volume."
            )
        start = rng.integers(low, high - size + 1)
        try:
            voxels = np.moveaxis(opened.volume.read(start, start + size), axis, 0)
        except MissingChunk:
            continue
        sections = np.stack(
            [voxels[k * step : k * step + thickness].mean(0, np.float32) for k in range(BLOCK_SECTIONS)]
        )
        k = opened.shrink
        sections = sections.reshape(BLOCK_SECTIONS, side, k, side, k).mean((2, 4))
        pixels = np.floor(sections + 0.5).astype(np.uint8)
        if not any(is_blank(section, TileSpec()) for section in pixels[1:4]):
            return pixels, start + size // 2
    raise SynpipeError(
        f"Volume {opened.volume.path} is blank or not stored at {TRIES} random places in a row: use a volume with more tissue."
    )
