"""Cut-outs around synapses become RGB tiles: sections z−1, z, z+1 are the three channels.

In: an opened volume and the positions of synapses. Out: HDF5 parts of tiles, uncompressed and model-ready, each with a
Parquet index; tiles by synapse id. Guarantees: a part counts only once its index stands beside it, and neither ever
changes afterwards; a tile is cut out once for a volume, a recipe and a place; what cannot be cut out is recorded with
its reason; every tile read back is held against its checksum.

A part is `<shard>-<digest>.h5` with `tiles` uint8 (n, 3, 256, 256), contiguous: any reader can map it into memory.
"""

import hashlib
import io
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import h5py
import numpy as np
import pyarrow as pa
from PIL import Image
from pydantic import Field, FiniteFloat, PositiveInt

from synpipe.errors import SynpipeError
from synpipe.shards import atomic_path, read_table, write_table
from synpipe.specs import Spec, digest
from synpipe.volume_sources import HDF5_ERRORS
from synpipe.volumes import MissingChunk, Volume

SECTIONS = 3
TILE_PX = 256  # height and width of a tile, in voxels of the volume
STEP_TOLERANCE = 1e-4  # of a section: a step is written with the digits that a person writes
PART_TILES = 2048  # 400 MB at 256 px: the memory that a part needs while it is made, and what a kill can cost
CUT_OUT_VERSION = 1  # raise it whenever `cut_out` would make other bytes or another row of the same recipe

# One row per cut-out that was tried; `row` is −1 and `reason` is set where there is no tile.
PART_SCHEMA = pa.schema(
    [
        pa.field("start_z", pa.int64()),  # first voxel of the window; negative where it sticks out of the volume
        pa.field("start_y", pa.int64()),
        pa.field("start_x", pa.int64()),
        pa.field("row", pa.int32()),
        pa.field("z_index", pa.int64()),  # section of the synapse, counted from the volume's first
        pa.field("pad_fraction", pa.float32()),  # share of the tile's area that lies outside the volume
        pa.field("missing_sections", pa.uint8()),  # bit 0, 1, 2: z−1, z, z+1 is outside, blank or repeated
        pa.field("mean", pa.float32()),
        pa.field("std", pa.float32()),
        pa.field("crc32", pa.uint32()),  # of the tile's bytes, to detect damage
        pa.field("content_hash", pa.string()),  # SHA-256 of the tile's bytes, first 32 hex digits
        pa.field("reason", pa.string()),
        pa.field("detail", pa.string()),
    ]
)


class TileSpec(Spec):
    """The recipe of a tile.

    stacking: "colour" (z−1, z, z+1 → red, green, blue) or "grey" (section z thrice).
    section_step_nm: distance of two channels along z, a multiple of the voxel's depth; by default one section.
    border: what to do where the window leaves the volume, "pad" (with the mean grey value, share recorded: mirroring would
    show structures that are not there, and mirrored tiles look alike) or "reject".
    blank_std, blank_zero_fraction: a section whose grey values vary less, or of which more is exactly black, is missing.
    Measured on ssTEM, where real sections have a standard deviation above 20 and hardly a black pixel.
    shards: number of shards, about one per 2,048 synapses. block_voxels_zyx: synapses of one such block stay together.
    """

    stacking: Literal["colour", "grey"] = "colour"
    section_step_nm: FiniteFloat | None = Field(None, gt=0)
    border: Literal["pad", "reject"] = "pad"
    blank_std: float = Field(8.0, ge=0)
    blank_zero_fraction: float = Field(0.05, ge=0, le=1)
    shards: int = Field(16, ge=1, le=100_000)
    block_voxels_zyx: tuple[PositiveInt, PositiveInt, PositiveInt] = (32, 1024, 1024)

    def section_step(self, voxel_size_nm_zyx: np.ndarray) -> int:
        """Sections between two channels. Raises `SynpipeError` where the step is no whole number of them."""
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
        """Voxels that a tile needs of a volume."""
        return ((SECTIONS - 1) * self.section_step(voxel_size_nm_zyx) + 1, TILE_PX, TILE_PX)

    def recipe(self, volume_fingerprint: str) -> str:
        """Key of the cut-outs: volume and all of the spec that decides their bytes. How they are viewed is not of it."""
        return digest([CUT_OUT_VERSION, volume_fingerprint, self.model_dump(mode="json", exclude={"stacking"})])


def shard_of(starts_zyx: np.ndarray, spec: TileSpec) -> np.ndarray:
    """Shard of each window: a stable hash of the spatial block of its first voxel; int64 (n,) in [0, spec.shards).

    Adding synapses moves no others. The hash is CRC-32 of the three block numbers as little-endian int64.
    """
    blocks = np.floor_divide(starts_zyx, np.array(spec.block_voxels_zyx)).astype("<i8")
    unique, inverse = np.unique(blocks, axis=0, return_inverse=True)
    hashes = np.array([zlib.crc32(block.tobytes()) for block in unique], dtype=np.int64)
    return hashes[inverse.reshape(-1)] % spec.shards if len(unique) else np.zeros(0, dtype=np.int64)


def cut_out(volume: Volume, start_zyx: np.ndarray, spec: TileSpec) -> tuple[np.ndarray | None, dict[str, Any]]:
    """One tile, uint8 (3, 256, 256), and its row of `PART_SCHEMA`; no tile where the row has a `reason`.

    A neighbouring section that is outside the volume, blank, or a copy of the middle one (how missing sections are often
    filled) is replaced by the middle one and noted in `missing_sections`.
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
        return None, row | {
            "reason": "outside_volume",
            "detail": f"The tile lies outside the volume, section {middle}.",
        }
    if spec.border == "reject" and (padded > 0 or inside[0] < window[0]):
        return None, row | {"reason": "border", "detail": f"The tile leaves the volume, section {middle}."}

    try:
        voxels = volume.read(low, high)
    except MissingChunk as error:
        return None, row | {"reason": "missing_chunk", "detail": str(error)}
    centre = voxels[middle - low[0]]
    blank = is_blank(centre, spec)
    if blank:
        return None, row | {"reason": "blank_section", "detail": f"Section {middle} is blank there: {blank}."}
    sections, missing = [], 0
    for channel in range(SECTIONS):
        z = middle + (channel - 1) * step
        section = voxels[z - low[0]] if low[0] <= z < high[0] else None
        if z != middle and (section is None or is_blank(section, spec) or np.array_equal(section, centre)):
            section = None
            missing |= 1 << channel
        sections.append(centre if section is None else section)

    top, left = (low - start_zyx)[1:]
    tile = np.empty((SECTIONS, TILE_PX, TILE_PX), dtype=np.uint8)
    for channel, section in enumerate(sections):
        tile[channel] = round(float(section.mean()))
        tile[channel, top : top + section.shape[0], left : left + section.shape[1]] = section
    content = tile.tobytes()
    row |= {
        "missing_sections": missing,
        "mean": float(tile.mean()),
        "std": float(tile.std()),
        "crc32": zlib.crc32(content),
        "content_hash": hashlib.sha256(content).hexdigest()[:32],
    }
    return tile, row


def is_blank(section: np.ndarray, spec: TileSpec) -> str | None:
    """Why a section counts as missing, or None."""
    zeros = 1 - np.count_nonzero(section) / section.size
    if zeros > spec.blank_zero_fraction:
        return f"{zeros:.0%} of it is black"
    std = float(section.std())
    return f"its grey values vary by {std:.1f} only" if std < spec.blank_std else None


def extract_shard(
    volume: Volume,
    spec: TileSpec,
    folder: Path,
    shard: int,
    starts_zyx: np.ndarray,
    progress: Callable[[int], None] = lambda count: None,
) -> tuple[pa.Table, int]:
    """Tiles of one shard, cut out where `folder` does not hold them yet.

    folder: the folder of `spec.recipe(…)`. starts_zyx: int64 (n, 3) windows. progress: called with numbers of cut-outs
    done. Returns one row per window, in their order (`PART_SCHEMA` plus `part`, the file's name), and the number of
    cut-outs made.
    """
    known = _read_parts(folder, shard)
    have = set(zip(*(known[f"start_{axis}"].to_pylist() for axis in "zyx"), strict=True))
    wanted = dict.fromkeys(map(tuple, starts_zyx.tolist()))
    # Rows of chunks are read one after the other, so that the volume's cache serves neighbours.
    missing = sorted(start for start in wanted if start not in have)
    progress(len(wanted) - len(missing))
    for first in range(0, len(missing), PART_TILES):
        _write_part(volume, spec, folder, shard, missing[first : first + PART_TILES], progress)
    if missing:
        known = _read_parts(folder, shard)
    row_of = {
        key: row for row, key in enumerate(zip(*(known[f"start_{axis}"].to_pylist() for axis in "zyx"), strict=True))
    }
    return known.take([row_of[tuple(start)] for start in starts_zyx.tolist()]), len(missing)


def _read_parts(folder: Path, shard: int) -> pa.Table:
    schema = PART_SCHEMA.append(pa.field("part", pa.string()))
    tables = []
    for path in sorted(folder.glob(f"{shard:05d}-*.parquet")):
        tiles = path.with_suffix(".h5")
        if tiles.exists():  # gone only if somebody deleted it: the cut-outs are then made again
            table = read_table(path)
            tables.append(table.append_column("part", pa.repeat(pa.scalar(tiles.name), len(table))).cast(schema))
    return pa.concat_tables(tables) if tables else schema.empty_table()


def _write_part(volume: Volume, spec: TileSpec, folder: Path, shard: int, starts: list[tuple], progress) -> None:
    tiles = np.empty((len(starts), SECTIONS, TILE_PX, TILE_PX), dtype=np.uint8)
    count = 0
    rows = []
    for start in starts:
        tile, row = cut_out(volume, np.array(start), spec)
        if tile is not None:
            tiles[count] = tile
            row["row"] = count
            count += 1
        rows.append(row)
        progress(1)
    path = folder / f"{shard:05d}-{digest(starts)[:12]}.h5"
    with atomic_path(path) as temporary, h5py.File(temporary, "w") as file:
        file.create_dataset("tiles", data=tiles[:count])
        file["tiles"].attrs["axes"] = "tile, section (z-1, z, z+1), y, x"
    # Written last: it is what makes the part count.
    write_table(path.with_suffix(".parquet"), pa.Table.from_pylist(rows, schema=PART_SCHEMA))


class TileReader:
    """Tiles of one version of the `rgb_tiles` index, by row or by synapse id; safe to use from several threads.

    A tile by id takes well under a millisecond once its part has been opened.
    """

    def __init__(self, index: pa.Table, folder: Path, stacking: str):
        """index: table with `synapse_id`, `file` (below `folder`), `row` and `crc32`; stacking: see `TileSpec`."""
        self._folder = folder
        self._grey = stacking == "grey"
        self._files = index["file"].to_pylist()
        self._rows = index["row"].to_numpy()
        self._crc32 = index["crc32"].to_numpy()
        ids = index["synapse_id"].to_numpy()
        self._order = np.argsort(ids, kind="stable")
        self._sorted_ids = ids[self._order]
        self._parts: dict[str, np.ndarray] = {}

    def read(self, indices: np.ndarray) -> np.ndarray:
        """Tiles at these rows of the index: uint8 (n, 3, 256, 256).

        Raises `SynpipeError` naming the file and the row where a tile is absent or differs from its checksum.
        """
        tiles = np.empty((len(indices), SECTIONS, TILE_PX, TILE_PX), dtype=np.uint8)
        for place, index in enumerate(indices):
            tiles[place] = self._tile(int(index))
        return tiles

    def by_id(self, synapse_id: int) -> np.ndarray:
        """Tile of a synapse: uint8 (3, 256, 256). Raises `SynpipeError` where it has none."""
        place = int(np.searchsorted(self._sorted_ids, synapse_id))
        if place == len(self._sorted_ids) or self._sorted_ids[place] != synapse_id:
            raise SynpipeError(f"There is no tile of synapse {synapse_id}: it is unknown, or among the rejects.")
        return self._tile(int(self._order[place]))

    def png(self, synapse_id: int) -> bytes:
        """The same as a PNG file with sections z−1, z, z+1 as red, green, blue."""
        buffer = io.BytesIO()
        Image.fromarray(self.by_id(synapse_id).transpose(1, 2, 0)).save(buffer, "PNG")
        return buffer.getvalue()

    def _tile(self, index: int) -> np.ndarray:
        name, row = self._files[index], int(self._rows[index])
        path = self._folder / name
        try:
            if name not in self._parts:
                self._parts[name] = _map_part(path)
            tile = self._parts[name][row]
        except (*HDF5_ERRORS, TypeError, IndexError) as error:
            raise SynpipeError(
                f"Tiles {path}, row {row}, cannot be read ({' '.join(str(error).split())}): delete that file and "
                "materialise synapse_stacks again."
            ) from None
        if zlib.crc32(tile) != self._crc32[index]:
            raise SynpipeError(
                f"Tiles {path}, row {row}, differ from their checksum: the file is damaged. Delete it and materialise "
                "synapse_stacks again."
            )
        return np.broadcast_to(tile[1], tile.shape) if self._grey else tile


def _map_part(path: Path) -> np.ndarray:
    """Map a part into memory: unlike h5py, that is fast from several threads."""
    with h5py.File(path, "r") as file:
        tiles = file["tiles"]
        if 0 in tiles.shape:
            return np.zeros(tiles.shape, dtype=np.uint8)
        return np.memmap(path, np.uint8, "r", tiles.id.get_offset(), tiles.shape)


def content_hashes(reader: TileReader, count: int) -> pa.Array:
    """Content hashes of the tiles as the reader gives them: string (n,)."""
    hashes = (hashlib.sha256(reader.read(np.array([index])).tobytes()).hexdigest()[:32] for index in range(count))
    return pa.array(hashes, pa.string(), size=count)
