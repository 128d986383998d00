"""Cuts RGB tiles out around synapses, and reads stored tiles: sections z−1, z, z+1 are the three channels.

Input: an opened volume and the positions of synapses. Output: tiles, each with a row of `PART_SCHEMA`; and tiles by synapse
id from the parts that `extraction` writes. Guarantees: a cut-out that fails is recorded with its reason; every tile is
compared with its checksum when it is read back.
"""

import contextlib
import hashlib
import io
import math
import zlib
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from PIL import Image
from pydantic import Field, FiniteFloat, PositiveInt

from synpipe.errors import SynpipeError, one_line
from synpipe.specs import Spec, digest
from synpipe.store.objects import BulkPath
from synpipe.tiles.parts import TilePart, mark_damaged, open_tile_part
from synpipe.volumes.hdf5 import HDF5_ERRORS
from synpipe.volumes.volume import MissingChunk, Volume

SECTIONS = 3
TILE_PX = 256  # height and width of a tile, in voxels of the volume
STEP_TOLERANCE = 1e-4  # in sections, because people write a step in nm with few digits
CUT_OUT_VERSION = 1  # raise it whenever `start_cut_out` would give other bytes or another row for the same recipe

# One row per cut-out. `row` is −1 and `reason` is set if there is no tile.
PART_SCHEMA = pa.schema(
    [
        pa.field("start_z", pa.int64()),  # first voxel of the window; negative if the window begins outside the volume
        pa.field("start_y", pa.int64()),
        pa.field("start_x", pa.int64()),
        pa.field("row", pa.int32()),
        pa.field("z_index", pa.int64()),  # section of the synapse, counted from the volume's first
        pa.field("pad_fraction", pa.float32()),  # share of the tile's area that lies outside the volume
        pa.field("missing_sections", pa.uint8()),  # bits 0, 1, 2: section z−1, z, z+1 is outside, blank or repeated
        pa.field("mean", pa.float32()),
        pa.field("std", pa.float32()),
        pa.field("crc32", pa.uint32()),  # of the tile's bytes, to detect damage
        pa.field("content_hash", pa.string()),  # SHA-256 of the tile's bytes, first 32 hex digits
        pa.field("reason", pa.string()),
        pa.field("detail", pa.string()),
    ]
)

CutOut = tuple[np.ndarray | None, dict[str, Any]]
"""A tile, uint8 (3, 256, 256), or None, and its row of `PART_SCHEMA`, which has a `reason` if there is no tile."""


class TileSpec(Spec):
    """The recipe of a tile.

    stacking: "colour" (sections z−1, z, z+1 become red, green, blue) or "grey" (section z in all three channels).
    section_step_nm: distance between two channels along z, a multiple of the section thickness; one section by default.
    border: what to do if the window leaves the volume. "pad" fills it with the mean grey value and records the padded
        share; mirroring would show structures that do not exist, and mirrored tiles look alike. "reject" makes no tile.
    blank_std, blank_zero_fraction: a section counts as missing if the standard deviation of its grey values is smaller
        than the first, or if a larger share of its pixels than the second is exactly black. Measured on ssTEM, where real
        sections have a standard deviation above 20 and hardly a black pixel.
    shards: number of shards, about one per 2,048 synapses.
    block_voxels_zyx: size of a block; all synapses of a block are in the same shard.
    """

    stacking: Literal["colour", "grey"] = "colour"
    section_step_nm: FiniteFloat | None = Field(None, gt=0)
    border: Literal["pad", "reject"] = "pad"
    blank_std: float = Field(8.0, ge=0)
    blank_zero_fraction: float = Field(0.05, ge=0, le=1)
    shards: int = Field(16, ge=1, le=100_000)
    block_voxels_zyx: tuple[PositiveInt, PositiveInt, PositiveInt] = (32, 1024, 1024)

    def section_step(self, voxel_size_nm_zyx: np.ndarray) -> int:
        """Sections between two channels. Raises `SynpipeError` if the step is not a whole number of sections."""
        depth_nm = float(voxel_size_nm_zyx[0])
        sections = 1.0 if self.section_step_nm is None else self.section_step_nm / depth_nm
        step = max(1, round(sections))
        if abs(sections - step) > STEP_TOLERANCE:
            raise SynpipeError(
                f"`tiles.section_step_nm` is {self.section_step_nm:g}, but sections of the volume are {depth_nm:g} nm apart: "
                f"set it to {step * depth_nm:g}, or to another multiple, in the data set's YAML file."
            )
        return step

    def window_zyx(self, voxel_size_nm_zyx: np.ndarray) -> tuple[int, int, int]:
        """Size in voxels of the window that a tile needs."""
        return ((SECTIONS - 1) * self.section_step(voxel_size_nm_zyx) + 1, TILE_PX, TILE_PX)

    def recipe(self, volume_fingerprint: str) -> str:
        """Key of the cut-outs: digest of the volume and of every field that decides their bytes.

        `stacking` is not part of it, because it only changes how the cut-outs are viewed.
        """
        return digest([CUT_OUT_VERSION, volume_fingerprint, self.model_dump(mode="json", exclude={"stacking"})])


def shard_of(starts_zyx: np.ndarray, spec: TileSpec) -> np.ndarray:
    """Shard of each window: a stable hash of the block that contains its first voxel. Added synapses move no others.

    starts_zyx: int64 (n, 3). Returns int64 (n,) in [0, spec.shards). The hash is CRC-32 of the three block numbers as
    little-endian int64.
    """
    blocks = np.floor_divide(starts_zyx, np.array(spec.block_voxels_zyx)).astype("<i8")
    unique, inverse = np.unique(blocks, axis=0, return_inverse=True)
    hashes = np.array([zlib.crc32(block.tobytes()) for block in unique], dtype=np.int64)
    return hashes[inverse.reshape(-1)] % spec.shards if len(unique) else np.zeros(0, dtype=np.int64)


def rows_by_shard(shards: np.ndarray) -> list[tuple[int, np.ndarray]]:
    """The rows of each shard. shards: int (n,), the shard of each row.

    Returns pairs of a shard and its rows in ascending order. Time and memory grow with n, not with the number of shards.
    """
    order = np.argsort(shards, kind="stable")
    cuts = np.flatnonzero(np.diff(shards[order])) + 1
    return [(int(shards[rows[0]]), rows) for rows in np.split(order, cuts)] if len(order) else []


def start_cut_out(volume: Volume, start_zyx: np.ndarray, spec: TileSpec) -> Callable[[], CutOut]:
    """Begin to read one window. start_zyx: its first voxel, int64 (3,).

    The returned function waits for the voxels and returns the cut-out. It raises `SynpipeError` if the volume cannot be read.

    A section beside the middle one is replaced by the middle one, and noted in `missing_sections`, if it is outside the
    volume, blank, or a copy of the middle one. Such copies are a common way to fill in for lost sections.
    """
    step = spec.section_step(volume.voxel_size_nm_zyx)
    window = np.array(spec.window_zyx(volume.voxel_size_nm_zyx))
    stop = start_zyx + window
    low, high = np.maximum(start_zyx, 0), np.minimum(stop, volume.shape_zyx)
    middle = int(start_zyx[0]) + step
    inside = np.clip(high - low, 0, None)
    padded = float(1 - inside[1] * inside[2] / (window[1] * window[2]))
    row: dict[str, Any] = dict(zip(("start_z", "start_y", "start_x"), map(int, start_zyx), strict=True))
    row |= {"row": -1, "z_index": middle, "pad_fraction": padded}
    if (inside == 0).any() or not 0 <= middle < volume.shape_zyx[0]:
        outside = {"reason": "outside_volume", "detail": f"The tile lies outside the volume, section {middle}."}
        return lambda: (None, row | outside)
    if spec.border == "reject" and (padded > 0 or inside[0] < window[0]):
        border = {"reason": "border", "detail": f"The tile leaves the volume, section {middle}."}
        return lambda: (None, row | border)

    read = volume.start_read(low, high)

    def finish() -> CutOut:
        try:
            voxels = read()
        except MissingChunk as error:
            return None, row | {"reason": "missing_chunk", "detail": str(error)}
        return make_tile(voxels, low, start_zyx, step, spec, row)

    return finish


def make_tile(
    voxels: np.ndarray, low: np.ndarray, start_zyx: np.ndarray, step: int, spec: TileSpec, row: dict
) -> CutOut:
    """Make a tile from the voxels of a window.

    voxels: the window as far as it lies inside the volume, uint8 (z, y, x), which begins at voxel `low`. start_zyx:
    first voxel of the window. step: sections between two channels. row: the fields of `PART_SCHEMA` that are known so far.
    """
    middle = int(start_zyx[0]) + step
    centre = voxels[middle - low[0]]
    centre_greys = _grey_counts(centre)
    blank = _why_blank(centre_greys, spec)
    if blank:
        return None, row | {"reason": "blank_section", "detail": f"Section {middle} is blank there: {blank}."}
    sections, greys, missing = [], np.zeros(256, dtype=np.int64), 0
    for channel in range(SECTIONS):
        z = middle + (channel - 1) * step
        section, counts = centre, centre_greys
        if z != middle:
            neighbour = voxels[z - low[0]] if 0 <= z - low[0] < len(voxels) else centre
            neighbour_greys = _grey_counts(neighbour)
            if np.array_equal(neighbour, centre) or _why_blank(neighbour_greys, spec):
                missing |= 1 << channel
            else:
                section, counts = neighbour, neighbour_greys
        sections.append(section)
        greys += counts

    top, left = (low - start_zyx)[1:]
    tile = np.empty((SECTIONS, TILE_PX, TILE_PX), dtype=np.uint8)
    for channel, section in enumerate(sections):
        if section.shape != (TILE_PX, TILE_PX):
            mean = round(float(section.mean()))
            tile[channel] = mean
            greys[mean] += TILE_PX * TILE_PX - section.size
        tile[channel, top : top + section.shape[0], left : left + section.shape[1]] = section
    mean_grey, std = _moments(greys)
    return tile, row | {
        "missing_sections": missing,
        "mean": mean_grey,
        "std": std,
        "crc32": zlib.crc32(tile.data),
        "content_hash": hashlib.sha256(tile.data).hexdigest()[:32],
    }


def _grey_counts(values: np.ndarray) -> np.ndarray:
    """How often each grey value occurs in a section, uint8 (y, x): int64 (256,).

    The counts give mean and standard deviation exactly. They are much cheaper than numpy's functions, which first convert
    the values to doubles and use all cores for it.
    """
    return np.array(Image.fromarray(values).histogram(), dtype=np.int64)


def _moments(counts: np.ndarray) -> tuple[float, float]:
    """Mean and standard deviation of grey values. counts: from `_grey_counts`."""
    greys = np.arange(256)
    size, total, squares = int(counts.sum()), int(counts @ greys), int(counts @ greys**2)
    return total / size, math.sqrt(size * squares - total * total) / size


def is_blank(section: np.ndarray, spec: TileSpec) -> str | None:
    """Why a section, uint8 (y, x), counts as missing; None if it does not."""
    return _why_blank(_grey_counts(section), spec)


def _why_blank(counts: np.ndarray, spec: TileSpec) -> str | None:
    zeros = counts[0] / counts.sum()
    if zeros > spec.blank_zero_fraction:
        return f"{zeros:.0%} of it is black"
    _, std = _moments(counts)
    return f"its grey values vary by {std:.1f} only" if std < spec.blank_std else None


class TileReader:
    """Reads tiles by their row in the `rgb_tiles` index or by synapse id. Safe to use from several threads.

    Reading a tile by id takes well under a millisecond once its part has been opened.
    """

    def __init__(self, index: pa.Table, folder: BulkPath, stacking: str):
        """index: table with `synapse_id`, `file` (path below `folder`), `row` and `crc32`. stacking: see `TileSpec`."""
        self._folder = folder
        self._grey = stacking == "grey"
        files = index["file"].combine_chunks().dictionary_encode()
        self._names = files.dictionary.to_pylist()
        self._files = files.indices.to_numpy()
        self._rows = index["row"].to_numpy()
        self._crc32 = index["crc32"].to_numpy()
        ids = index["synapse_id"].to_numpy()
        self._order = np.argsort(ids, kind="stable")
        self._sorted_ids = ids[self._order]
        self._parts: dict[int, TilePart] = {}

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, indices: np.ndarray) -> np.ndarray:
        """Tiles at these rows of the index, int (n,): uint8 (n, 3, 256, 256).

        Raises `SynpipeError`, which names the file and the row, if a tile is absent or differs from its checksum. A damaged
        file is marked as such, which makes `synapse_stacks` out of date, and the next run cuts out its tiles again. All
        other tiles can still be read.
        """
        tiles = np.empty((len(indices), SECTIONS, TILE_PX, TILE_PX), dtype=np.uint8)
        files = self._files[indices]
        for file in np.unique(files).tolist():
            places = np.flatnonzero(files == file)
            self._read(file, indices[places], tiles, places)
        if self._grey:
            tiles[:] = tiles[:, 1:2]
        return tiles

    def has(self, synapse_id: int) -> bool:
        """Whether the index has a tile of this synapse."""
        place = int(np.searchsorted(self._sorted_ids, synapse_id))
        return place < len(self._sorted_ids) and bool(self._sorted_ids[place] == synapse_id)

    def by_id(self, synapse_id: int) -> np.ndarray:
        """Tile of a synapse: uint8 (3, 256, 256). Raises `SynpipeError` if the synapse has none."""
        if not self.has(synapse_id):
            raise SynpipeError(f"Synapse {synapse_id} has no tile: it is unknown, or among the rejects.")
        place = int(np.searchsorted(self._sorted_ids, synapse_id))
        return self.read(self._order[place : place + 1])[0]

    def png(self, synapse_id: int) -> bytes:
        """Tile of a synapse as a PNG file, with sections z−1, z, z+1 as red, green, blue. Raises what `by_id` does."""
        buffer = io.BytesIO()
        Image.fromarray(self.by_id(synapse_id).transpose(1, 2, 0)).save(buffer, "PNG")
        return buffer.getvalue()

    def _read(self, file: int, indices: np.ndarray, tiles: np.ndarray, places: np.ndarray) -> None:
        """Copy tiles of one file into `tiles` at `places`, and compare them with their checksums."""
        path, rows = self._folder / self._names[file], self._rows[indices]
        try:
            if file not in self._parts:
                self._parts[file] = open_tile_part(path)
            self._parts[file].read(rows, tiles, places)
        except FileNotFoundError:
            raise SynpipeError(
                f"Tiles {path} do not exist: materialise synapse_stacks again to cut them out."
            ) from None
        except (*HDF5_ERRORS, TypeError, IndexError) as error:
            raise _report_damage(path, f"row {rows[0]}, cannot be read ({one_line(error)})") from None
        for index, row, place in zip(indices, rows, places, strict=True):
            if zlib.crc32(tiles[place].data) != self._crc32[index]:
                raise _report_damage(path, f"row {row}, differ from their checksum")


def _report_damage(path: BulkPath, problem: str) -> SynpipeError:
    """Mark a part as damaged and return the error to raise."""
    with contextlib.suppress(OSError, SynpipeError):  # this process may only read the store
        mark_damaged(path)
    return SynpipeError(
        f"Tiles {path}, {problem}: the file is damaged. Materialise again: synapse_stacks then cuts out its tiles again."
    )


def content_hashes(reader: TileReader, count: int) -> pa.Array:
    """Content hashes of the reader's first `count` tiles, after stacking: string (n,)."""
    hashes = (hashlib.sha256(reader.read(np.array([index])).tobytes()).hexdigest()[:32] for index in range(count))
    return pa.array(hashes, pa.string(), size=count)
