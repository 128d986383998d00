"""All cut-outs of a data set: planned by chunk, read ahead, written in parts.

In: an opened volume and windows in it. Out: HDF5 parts of tiles, uncompressed and model-ready, each with a Parquet index.
Guarantees: a part counts only once its index stands beside it, and neither ever changes afterwards; a tile is cut out once
for a volume, a recipe and a place; a chunk of the volume is fetched about once; memory does not grow with the number of
windows, but for a few numbers each; what cannot be read costs the cut-outs of its shard and no others.

A part is `<shard>-<digest>.h5` with `tiles` uint8 (n, 3, 256, 256), contiguous: any reader can map it into memory.
"""

import logging
import re
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import h5py
import numpy as np
import pyarrow as pa

from synpipe.errors import SynpipeError
from synpipe.specs import digest
from synpipe.store.files import atomic_path, read_table, set_aside, write_table
from synpipe.store.objects import BulkPath, list_paths
from synpipe.tiles import tile as tiles
from synpipe.tiles.parts import mark_damaged, mark_of
from synpipe.tiles.tile import PART_SCHEMA, SECTIONS, TILE_PX, CutOut, TileSpec, rows_by_shard, shard_of
from synpipe.volumes.chunk_plan import Chunk, plan_batches
from synpipe.volumes.volume import AccessDenied, Volume

PART_TILES = 512  # 100 MB at 256 px: the memory that tiles need until they are written, and what a kill can cost
WRITTEN_AT_ONCE = 32  # tiles; all of a part at once would need its memory twice
READ_AHEAD_BYTES = 64 * 2**20  # decoded chunks and voxels of the cut-outs that are being read
# A volume that fails so many shards one after the other, with no tile between them, is not waited for any longer.
GIVE_UP_AFTER = 8
SHARDS_NAMED = 10

PART_NAME = re.compile("[0-9]{5}-[0-9a-f]{12}")
BYTES_KEY = b"synpipe.bytes"  # size of the tiles' file, in the metadata of its index
logger = logging.getLogger(__name__)

FOUND_SCHEMA = PART_SCHEMA.append(pa.field("part", pa.string())).append(pa.field("shard", pa.int32()))


def extract(
    volume: Volume,
    spec: TileSpec,
    folder: BulkPath,
    starts_zyx: np.ndarray,
    progress: Callable[[int], None] = lambda count: None,
) -> tuple[pa.Table, int]:
    """`extract_shards` into memory, for some 100,000 windows: a row per window, in their order."""
    found, made = extract_shards(volume, spec, folder, starts_zyx, progress)
    order, tables = [np.zeros(0, np.int64)], [FOUND_SCHEMA.empty_table()]
    for rows, table in found:
        order.append(rows)
        tables.append(table)
    return pa.concat_tables(tables).take(np.argsort(np.concatenate(order))), made


def extract_shards(
    volume: Volume,
    spec: TileSpec,
    folder: BulkPath,
    starts_zyx: np.ndarray,
    progress: Callable[[int], None] = lambda count: None,
    cut_out_all: "Callable[[np.ndarray], Failures] | None" = None,
) -> tuple[Iterator[tuple[np.ndarray, pa.Table]], int]:
    """Tiles of all windows, cut out where `folder` does not hold them yet.

    folder: the folder of `spec.recipe(…)`. starts_zyx: int64 (n, 3), first voxels of the windows. progress: called with
    numbers of cut-outs done. cut_out_all: has windows cut out elsewhere; None: here. Returns, shard by shard, the numbers of
    its windows, which ascend, and a row for each of them (`PART_SCHEMA` plus `part`, the file's name, and `shard`); and the
    number of cut-outs made.

    Raises `SynpipeError` where the volume could not be read everywhere, after all other shards have been cut out;
    `AccessDenied` at once where it may not be read.
    """
    windows = rows_by_shard(shard_of(starts_zyx, spec))
    parts = _list_parts(folder)
    missing = [_missing(_read_parts(parts, shard), starts_zyx[rows]) for shard, rows in windows]
    made = sum(map(len, missing))
    progress(len(starts_zyx) - made)
    if made:
        cut_out_all = cut_out_all or (lambda starts: cut_out_windows(volume, spec, folder, starts, progress))
        cut_out_all(np.concatenate(missing)).check(of=sum(len(absent) > 0 for absent in missing))
    # Killed before, the same command finds the marks again.
    damaged = [part for shard, _ in windows for part in parts.get(shard, []) if part.marked]
    for part in damaged:
        mark_of(part.tiles).unlink(missing_ok=True)
    if made or damaged:
        parts = _list_parts(folder)

    def found() -> Iterator[tuple[np.ndarray, pa.Table]]:
        for shard, rows in windows:
            table = _read_parts(parts, shard)
            place = {key: row for row, key in enumerate(_keys(table))}
            yield rows, table.take([place[key] for key in map(tuple, starts_zyx[rows].tolist())])

    return found(), made


def _missing(known: pa.Table, starts_zyx: np.ndarray) -> np.ndarray:
    """Windows that no part holds, each once: int64 (m, 3)."""
    have = set(_keys(known))
    return np.array(sorted(set(map(tuple, starts_zyx.tolist())) - have), dtype=np.int64).reshape(-1, 3)


def _keys(table: pa.Table) -> Iterator[tuple[int, int, int]]:
    return zip(*(table[f"start_{axis}"].to_pylist() for axis in "zyx"), strict=True)


@dataclass
class Failures:
    """Shards that could not be cut out, each with its first error.

    lost: cut-outs that were therefore not made. made: those that were. in_a_row: of the shards that failed last.
    """

    by_shard: dict[int, SynpipeError] = field(default_factory=dict)
    lost: int = 0
    made: int = 0
    in_a_row: int = 0

    @property
    def gave_up(self) -> bool:
        return self.in_a_row >= GIVE_UP_AFTER

    def check(self, of: int) -> None:
        """Raises `SynpipeError` where there is one. of: number of shards that were to be cut out."""
        if not self.by_shard:
            return
        raise SynpipeError(
            f"{self.lost:,} cut-outs were not made: {len(self.by_shard)} of {of} shards failed ({name_some(self.by_shard)})"
            f"{', one after the other, and the rest was not tried' if self.gave_up else ''}. The first error: "
            f"{next(iter(self.by_shard.values()))} All other cut-outs are kept: run the same command again, and only those "
            "that are not there are fetched."
        )


def name_some(shards: Collection[Any]) -> str:
    """The first `SHARDS_NAMED` of these shards, for a message."""
    return ", ".join(map(str, sorted(shards)[:SHARDS_NAMED])) + (", …" if len(shards) > SHARDS_NAMED else "")


def cut_out_windows(
    volume: Volume,
    spec: TileSpec,
    folder: BulkPath,
    starts: np.ndarray,
    progress: Callable[[int], None] = lambda count: None,
) -> Failures:
    """Cut out windows, each of them given once, and write them as parts. Raises `AccessDenied`."""
    shards = shard_of(starts, spec)
    low = np.clip(starts, 0, volume.shape_zyx)
    high = np.clip(starts + spec.window_zyx(volume.voxel_size_nm_zyx), 0, volume.shape_zyx)
    batches = plan_batches(low, high, shards, volume.chunking, PART_TILES)
    failures = Failures()

    def wanted(window: int) -> bool:
        return shards[window] not in failures.by_shard and not failures.gave_up

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
                failures.lost += 1
                continue
            try:
                tile, row = finish()
            except AccessDenied:  # to the other shards as well
                raise
            except SynpipeError as error:
                failures.by_shard[shard] = error
                failures.in_a_row += 1
                failures.lost += 1
                continue
            if tile is not None:
                stack[place] = tile
            made.setdefault(shard, []).append((place, row))
            failures.in_a_row = 0
            failures.made += 1
            progress(1)
        for shard in sorted(made):
            _write_part(folder, shard, stack, made[shard])
    return failures


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


def missing_windows(folder: BulkPath, shard: int, starts_zyx: np.ndarray) -> np.ndarray:
    """Of these windows of a shard, those that no part holds now: int64 (m, 3)."""
    return _missing(_read_parts(_list_parts(folder), shard), starts_zyx)


@dataclass
class _Files:
    """A part as the listing has it, or only its mark. there: whether both files of it are. marked: whether its tiles were
    found to be damaged, here or before, and are to be made anew."""

    tiles: BulkPath
    there: bool
    marked: bool


def _list_parts(folder: BulkPath) -> dict[int, list[_Files]]:
    """The parts by shard.

    Tiles are gone where somebody deleted them, or where they were damaged and moved aside: the cut-outs are then made again.
    """
    found = {path.name: path for path in list_paths(folder, "*")}
    marked = {path.name for path in list_paths(mark_of(folder / "any").parent, "*")}
    parts: dict[int, list[_Files]] = {}
    for name in sorted(marked.union(path.stem for path in found.values() if path.suffix == ".parquet")):
        if PART_NAME.fullmatch(name):
            tiles_path = found.get(f"{name}.h5")
            there = tiles_path is not None and f"{name}.parquet" in found
            files = _Files(tiles_path or folder / f"{name}.h5", there, name in marked)
            parts.setdefault(int(name[:5]), []).append(files)
    return parts


def _read_parts(parts: Mapping[int, list[_Files]], shard: int) -> pa.Table:
    tables = []
    for part in parts.get(shard, []):
        if part.there and (table := _read_part(part)) is not None:
            for name, value in (("part", pa.scalar(part.tiles.name)), ("shard", pa.scalar(shard, pa.int32()))):
                table = table.append_column(name, pa.repeat(value, len(table)))
            tables.append(table.cast(FOUND_SCHEMA))
    return pa.concat_tables(tables) if tables else FOUND_SCHEMA.empty_table()


def _read_part(part: _Files) -> pa.Table | None:
    """The index of a part, or None where it or the file of the tiles is damaged, which is then moved aside.

    Whether tiles were moved aside is known by the mark alone, so that comes first and stays until they are there again.
    """
    try:
        table = read_table(part.tiles.with_suffix(".parquet"))
    except SynpipeError as error:
        logger.warning("%s", error)
        return None
    there = part.tiles.stat().st_size
    size = int((table.schema.metadata or {}).get(BYTES_KEY, there))  # older parts do not say it
    if there == size and not part.marked:
        return table
    if not part.marked:
        mark_damaged(part.tiles)
    part.marked, part.there = True, False
    logger.warning("%s is damaged: moved to %s, its tiles are cut out again", part.tiles, set_aside(part.tiles).name)
    return None


def _write_part(folder: BulkPath, shard: int, stack: np.ndarray, made: list[tuple[int, dict[str, Any]]]) -> None:
    """made: for each cut-out the place of its tile in the stack, and its row, which has a reason where there is no tile."""
    tiles_at = [place for place, row in made if "reason" not in row]
    number = {place: count for count, place in enumerate(tiles_at)}
    rows = [row | {"row": number.get(place, -1)} for place, row in made]
    windows = [[row["start_z"], row["start_y"], row["start_x"]] for row in rows]
    path = folder / f"{shard:05d}-{digest(windows)[:12]}.h5"
    with atomic_path(path) as temporary:
        with h5py.File(temporary, "w") as file:
            dataset = file.create_dataset("tiles", (len(tiles_at), *stack.shape[1:]), np.uint8)
            for first in range(0, len(tiles_at), WRITTEN_AT_ONCE):
                dataset[first : first + WRITTEN_AT_ONCE] = stack[tiles_at[first : first + WRITTEN_AT_ONCE]]
            dataset.attrs["axes"] = "tile, section (z-1, z, z+1), y, x"
        size = temporary.stat().st_size  # to ask an object store for it would be a request
    # Written last: it is what makes the part count.
    table = pa.Table.from_pylist(rows, schema=PART_SCHEMA)
    write_table(path.with_suffix(".parquet"), table, {BYTES_KEY.decode(): str(size)})
