"""All cut-outs of a data set: planned by chunk, read ahead, written in parts.

In: an opened volume and windows in it. Out: HDF5 parts of tiles, uncompressed and model-ready, each with a Parquet index.
Guarantees: a part counts only once its index stands beside it, and neither ever changes afterwards; a tile is cut out once
for a volume, a recipe and a place; a chunk of the volume is fetched about once; memory does not grow with the number of
windows, but for a few numbers each; what cannot be read costs the cut-outs of its shard and no others.

A part is `<shard>-<digest>.h5` with `tiles` uint8 (n, 3, 256, 256), contiguous: any reader can map it into memory.
"""

import logging
from collections import Counter, deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow as pa

from synpipe import tiles
from synpipe.chunk_plan import Chunk, plan
from synpipe.errors import SynpipeError
from synpipe.shards import DAMAGED, atomic_path, read_table, set_aside, write_table
from synpipe.specs import digest
from synpipe.tiles import PART_SCHEMA, SECTIONS, SUSPECT, TILE_PX, CutOut, TileSpec, shard_of
from synpipe.volumes import AccessDenied, Volume

PART_TILES = 512  # 100 MB at 256 px: the memory that tiles need until they are written, and what a kill can cost
WRITTEN_AT_ONCE = 32  # tiles; all of a part at once would need its memory twice
READ_AHEAD_BYTES = 64 * 2**20  # decoded chunks and voxels of the cut-outs that are being read
# A volume that fails so many shards one after the other, with no tile between them, is not waited for any longer.
GIVE_UP_AFTER = 8
SHARDS_NAMED = 10

BYTES_KEY = b"synpipe.bytes"  # size of the tiles' file, in the metadata of its index
logger = logging.getLogger(__name__)

FOUND_SCHEMA = PART_SCHEMA.append(pa.field("part", pa.string())).append(pa.field("shard", pa.int32()))


def extract(
    volume: Volume,
    spec: TileSpec,
    folder: Path,
    starts_zyx: np.ndarray,
    progress: Callable[[int], None] = lambda count: None,
) -> tuple[pa.Table, int]:
    """Tiles of all windows, cut out where `folder` does not hold them yet.

    folder: the folder of `spec.recipe(…)`. starts_zyx: int64 (n, 3), first voxels of the windows. progress: called with
    numbers of cut-outs done. Returns one row per window, in their order (`PART_SCHEMA` plus `part`, the file's name, and
    `shard`), and the number of cut-outs made.

    Raises `SynpipeError` where the volume could not be read everywhere, after all other shards have been cut out;
    `AccessDenied` at once where it may not be read.
    """
    shards = shard_of(starts_zyx, spec)
    numbers = np.unique(shards).tolist()
    known = {shard: _read_parts(folder, shard) for shard in numbers}
    missing = [_missing(known[shard], starts_zyx[shards == shard]) for shard in numbers]
    made = sum(map(len, missing))
    progress(len(starts_zyx) - made)
    if made:
        _cut_out_missing(volume, spec, folder, np.concatenate(missing), progress)
    order, found = [], []
    for shard, absent in zip(numbers, missing, strict=True):
        table = _read_parts(folder, shard) if len(absent) else known[shard]
        rows = np.flatnonzero(shards == shard)
        place = {key: row for row, key in enumerate(_keys(table))}
        found.append(table.take([place[key] for key in map(tuple, starts_zyx[rows].tolist())]))
        order.append(rows)
    if not found:
        return FOUND_SCHEMA.empty_table(), 0
    return pa.concat_tables(found).take(np.argsort(np.concatenate(order))), made


def _missing(known: pa.Table, starts_zyx: np.ndarray) -> np.ndarray:
    """Windows that no part holds, each once: int64 (m, 3)."""
    have = set(_keys(known))
    return np.array(sorted(set(map(tuple, starts_zyx.tolist())) - have), dtype=np.int64).reshape(-1, 3)


def _keys(table: pa.Table) -> Iterator[tuple[int, int, int]]:
    return zip(*(table[f"start_{axis}"].to_pylist() for axis in "zyx"), strict=True)


def _cut_out_missing(volume: Volume, spec: TileSpec, folder: Path, starts: np.ndarray, progress) -> None:
    """Cut out windows, each of them given once, and write them as parts."""
    shards = shard_of(starts, spec)
    low = np.clip(starts, 0, volume.shape_zyx)
    high = np.clip(starts + spec.window_zyx(volume.voxel_size_nm_zyx), 0, volume.shape_zyx)
    batches = plan(low, high, shards, volume.chunking, PART_TILES)
    failed: dict[int, SynpipeError] = {}
    lost = in_a_row = 0

    def wanted(window: int) -> bool:
        return shards[window] not in failed and in_a_row < GIVE_UP_AFTER

    def needs(window: int) -> list[Chunk]:
        return list(volume.chunking.chunks(low[window], high[window]))

    order = np.concatenate(batches).tolist()
    ahead = _read_ahead(volume, spec, starts, order, wanted, needs)
    # One for all batches: arrays that come and go would leave holes in the memory, more with every batch.
    stack = np.empty((max(map(len, batches)), SECTIONS, TILE_PX, TILE_PX), dtype=np.uint8)
    for batch in batches:
        made: dict[int, list[tuple[int, dict[str, Any]]]] = {}
        for place, window in enumerate(batch.tolist()):
            finish = next(ahead)
            shard = int(shards[window])
            if finish is None or not wanted(window):
                lost += 1
                continue
            try:
                tile, row = finish()
            except AccessDenied:  # to the other shards as well
                raise
            except SynpipeError as error:
                failed[shard] = error
                in_a_row += 1
                lost += 1
                continue
            if tile is not None:
                stack[place] = tile
            made.setdefault(shard, []).append((place, row))
            in_a_row = 0
            progress(1)
        for shard in sorted(made):
            _write_part(folder, shard, stack, made[shard])
    if failed:
        raise _failure(failed, lost, len(np.unique(shards)), in_a_row >= GIVE_UP_AFTER)


def _read_ahead(
    volume: Volume,
    spec: TileSpec,
    starts: np.ndarray,
    order: list[int],
    wanted: Callable[[int], bool],
    needs: Callable[[int], list[Chunk]],
) -> Iterator[Callable[[], CutOut] | None]:
    """Begun cut-outs in the given order, as many begun at a time as the memory allows; None for those not wanted any more."""
    voxels = int(np.prod(spec.window_zyx(volume.voxel_size_nm_zyx)))
    begun: deque[tuple[Callable[[], CutOut] | None, list[Chunk]]] = deque()
    in_flight: Counter[Chunk] = Counter()
    room = READ_AHEAD_BYTES // volume.voxel_bytes
    chunk_voxels = int(np.prod(volume.chunking.shape_zyx))
    for window in order:
        chunks = needs(window)
        while begun:
            new = sum(chunk not in in_flight for chunk in chunks)
            if (len(in_flight) + new) * chunk_voxels + (len(begun) + 1) * voxels <= room:
                break
            finish, done = begun.popleft()
            yield finish
            for chunk in done:
                in_flight[chunk] -= 1
                if not in_flight[chunk]:
                    del in_flight[chunk]
        begun.append((tiles.start_cut_out(volume, starts[window], spec) if wanted(window) else None, chunks))
        in_flight.update(chunks)
    while begun:
        yield begun.popleft()[0]


def _failure(failed: dict[int, SynpipeError], lost: int, of: int, gave_up: bool) -> SynpipeError:
    named = ", ".join(map(str, sorted(failed)[:SHARDS_NAMED])) + (", …" if len(failed) > SHARDS_NAMED else "")
    first = next(iter(failed.values()))
    return SynpipeError(
        f"{lost:,} cut-outs were not made: {len(failed)} of {of} shards failed ({named})"
        f"{', one after the other, and the rest was not tried' if gave_up else ''}. The first error: {first} All other "
        "cut-outs are kept: run the same command again, and only those that are not there are fetched."
    )


def damaged_parts(folder: Path) -> list[Path]:
    """Files of tiles, below the folders of all recipes, that were found to be damaged and are not there again."""
    suspect = {mark.with_suffix("") for mark in folder.glob(f"*/*.h5{SUSPECT}")}
    moved = {aside.with_suffix("") for aside in folder.glob(f"*/*.h5{DAMAGED}")}
    return sorted(suspect | {path for path in moved if not path.exists()})


def _read_parts(folder: Path, shard: int) -> pa.Table:
    tables = []
    for path in sorted(folder.glob(f"{shard:05d}-*.parquet")):
        tiles_path = path.with_suffix(".h5")
        # Gone where somebody deleted it, or where it was damaged and moved aside: the cut-outs are then made again.
        if tiles_path.exists() and (table := _read_part(path, tiles_path)) is not None:
            for name, value in (("part", pa.scalar(tiles_path.name)), ("shard", pa.scalar(shard, pa.int32()))):
                table = table.append_column(name, pa.repeat(value, len(table)))
            tables.append(table.cast(FOUND_SCHEMA))
    return pa.concat_tables(tables) if tables else FOUND_SCHEMA.empty_table()


def _read_part(path: Path, tiles_path: Path) -> pa.Table | None:
    """The index of a part, or None where it or the file of the tiles is damaged, which is then moved aside."""
    try:
        table = read_table(path)
    except SynpipeError as error:
        logger.warning("%s", error)
        return None
    size = int((table.schema.metadata or {}).get(BYTES_KEY, tiles_path.stat().st_size))  # older parts do not say it
    mark = tiles_path.with_suffix(f"{tiles_path.suffix}{SUSPECT}")
    if tiles_path.stat().st_size == size and not mark.exists():
        return table
    logger.warning("%s is damaged: moved to %s, its tiles are cut out again", tiles_path, set_aside(tiles_path).name)
    mark.unlink(missing_ok=True)
    return None


def _write_part(folder: Path, shard: int, stack: np.ndarray, made: list[tuple[int, dict[str, Any]]]) -> None:
    """made: for each cut-out the place of its tile in the stack, and its row, which has a reason where there is no tile."""
    tiles_at = [place for place, row in made if "reason" not in row]
    number = {place: count for count, place in enumerate(tiles_at)}
    rows = [row | {"row": number.get(place, -1)} for place, row in made]
    windows = [[row["start_z"], row["start_y"], row["start_x"]] for row in rows]
    path = folder / f"{shard:05d}-{digest(windows)[:12]}.h5"
    with atomic_path(path) as temporary, h5py.File(temporary, "w") as file:
        dataset = file.create_dataset("tiles", (len(tiles_at), *stack.shape[1:]), np.uint8)
        for first in range(0, len(tiles_at), WRITTEN_AT_ONCE):
            dataset[first : first + WRITTEN_AT_ONCE] = stack[tiles_at[first : first + WRITTEN_AT_ONCE]]
        dataset.attrs["axes"] = "tile, section (z-1, z, z+1), y, x"
    # Written last: it is what makes the part count.
    size = {BYTES_KEY.decode(): str(path.stat().st_size)}
    write_table(path.with_suffix(".parquet"), pa.Table.from_pylist(rows, schema=PART_SCHEMA), size)
