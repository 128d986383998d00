"""Blocks to learn from: small stacks of sections from random places of EM volumes, at the pixel size that is learned.

In: `Source`s of a recipe. Out: `Blocks`, uint8 (n, 5, side, side) with the pixel size of each;
and, from a part of the volume that the others never touch, blocks to measure with. Guarantee: volumes, numbers and seed
decide the blocks, whatever has been read before.

Pixels are averaged k × k, k being what brings them nearest to `WORKING_NM`. A volume of (nearly) cubic voxels is cut along
all three axes, its sections 40–50 nm apart; in three of five blocks each section is the mean of the slices within 40 nm, as
an electron beam projects a section, in the others it is one slice.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from synpipe.datasets import Project
from synpipe.errors import SynpipeError
from synpipe.synthetic.demo import VOLUME, make_demo
from synpipe.tiles.tile import TileSpec, is_blank
from synpipe.training.recipe import Source
from synpipe.volumes.volume import MissingChunk, Volume, VolumeSpec

WORKING_NM = 9.2
"""Pixel size that the encoder works at: two pixels of 4.6 nm, and near one of 8 or 10 nm."""
SECTION_NM = 40.0
BLOCK_SECTIONS = 5  # three of a tile, and one to either side for views one section off
CUBIC = 1.5  # voxels no deeper than this times their width are cut along every axis
HELD_OUT = 0.25  # of the volume's x
SIDE_PX, HELD_OUT_SIDE_PX = 144, 120
TRIES = 20  # per block, where the volume is blank or was not stored


@dataclass(frozen=True)
class OpenSource:
    """A volume and how it is cut. step: slices between two sections along z."""

    name: str
    volume: Volume
    step: int
    share: float

    @property
    def cubic(self) -> bool:
        depth, _, width = self.volume.voxel_size_nm_zyx
        return bool(depth < CUBIC * width)

    @property
    def shrink(self) -> int:
        return max(1, round(WORKING_NM / float(self.volume.voxel_size_nm_zyx[2])))

    @property
    def pixel_nm(self) -> float:
        return float(self.volume.voxel_size_nm_zyx[2]) * self.shrink


@dataclass(frozen=True)
class Blocks:
    """pixels: uint8 (n, 5, side, side). pixel_nm: float32 (n,). source: number of the source, int64 (n,). centre_zyx: in
    voxels, int64 (n, 3)."""

    pixels: np.ndarray
    pixel_nm: np.ndarray
    source: np.ndarray
    centre_zyx: np.ndarray


def open_source(source: Source, project: Project, base: Path, progress: Callable[[str], None]) -> OpenSource:
    """Open it, having made it if it is synthetic. base: where relative paths of a volume start.

    Raises `SynpipeError` where it cannot be read.
    """
    if source.synthetic is not None:
        folder = project.store / "pretraining" / f"synthetic_{source.synthetic.digest()[:12]}"
        make_demo(folder, source.synthetic, progress)
        volume, tiles = Volume(VolumeSpec(path=VOLUME), folder), TileSpec()
    elif source.volume is not None:
        volume, tiles = Volume(source.volume, base), TileSpec()
    else:
        assert source.dataset is not None  # the spec demands one of the three
        dataset = project.dataset(source.dataset)
        if dataset.spec.synthetic is not None:
            make_demo(dataset.base, dataset.spec.synthetic, progress)
        volume, tiles = Volume(dataset.spec.volume, dataset.base), dataset.spec.tiles
    opened = OpenSource(source.name, volume, 1, source.share)
    depth_nm = float(volume.voxel_size_nm_zyx[0])
    step = max(1, round(SECTION_NM / depth_nm)) if opened.cubic else tiles.section_step(volume.voxel_size_nm_zyx)
    return OpenSource(source.name, volume, step, source.share)


def draw_blocks(sources: Sequence[OpenSource], count: int, seed: int, held_out: bool = False) -> Blocks:
    """`count` blocks, shared out among the sources. held_out: from the last quarter of each volume along x, and cut along
    z only; otherwise from the rest. Raises `SynpipeError` where a volume is too small or blank."""
    shares = np.array([source.share for source in sources])
    counts = np.diff(np.round(np.concatenate([[0], np.cumsum(shares / shares.sum())]) * count)).astype(int)
    side = HELD_OUT_SIDE_PX if held_out else SIDE_PX
    drawn = []
    for number, (source, part) in enumerate(zip(sources, counts.tolist(), strict=True)):
        rng = np.random.default_rng([seed, number, held_out])
        drawn += [(*_draw_block(source, side, held_out, rng), source.pixel_nm, number) for _ in range(part)]
    pixels, centres, pixel_nm, number_of = zip(*drawn, strict=True)
    return Blocks(np.stack(pixels), np.array(pixel_nm, np.float32), np.array(number_of), np.stack(centres))


def _draw_block(
    source: OpenSource, side: int, held_out: bool, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Pixels uint8 (5, side, side), and the middle in voxels, int64 (3,)."""
    shape = source.volume.shape_zyx
    border = round(int(shape[2]) * (1 - HELD_OUT))
    low = np.array([0, 0, border if held_out else 0])
    high = np.array([shape[0], shape[1], shape[2] if held_out else border])
    for _ in range(TRIES):
        axis = int(rng.integers(3)) if source.cubic and not held_out else 0
        step = source.step + int(rng.integers(2)) if source.cubic and not held_out else source.step
        thickness = source.step if source.cubic and (held_out or rng.random() < 0.6) else 1
        size = np.full(3, side * source.shrink)
        size[axis] = (BLOCK_SECTIONS - 1) * step + thickness
        if (size > high - low).any():
            part = "the last quarter of it along x" if held_out else "the rest of it"
            raise SynpipeError(
                f"Volume {source.volume.path} is too small to learn from: a block needs {size.tolist()} voxels (z y x), and "
                f"{part} has {(high - low).tolist()}. Take a larger volume."
            )
        start = rng.integers(low, high - size + 1)
        try:
            voxels = np.moveaxis(source.volume.read(start, start + size), axis, 0)
        except MissingChunk:
            continue
        sections = np.stack(
            [voxels[k * step : k * step + thickness].mean(0, np.float32) for k in range(BLOCK_SECTIONS)]
        )
        k = source.shrink
        sections = sections.reshape(BLOCK_SECTIONS, side, k, side, k).mean((2, 4))
        pixels = np.floor(sections + 0.5).astype(np.uint8)
        if not any(is_blank(section, TileSpec()) for section in pixels[1:4]):
            return pixels, start + size // 2
    raise SynpipeError(
        f"Volume {source.volume.path} is blank, or holds nothing, at {TRIES} random places in a row: choose a part with tissue."
    )
