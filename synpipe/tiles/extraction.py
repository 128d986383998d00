"""Cuts out all tiles of a data set: plans them by chunk, reads ahead, and writes them in parts.

Input: an opened volume and windows in it. Output: HDF5 parts with uncompressed, model-ready tiles, each with a Parquet
index. Guarantees:
- A part counts only once its index exists, and neither file changes afterwards.
- A tile is cut out once per volume, recipe and place.
- A chunk of the volume is fetched about once.
- Memory grows by only a few numbers per window.
- If a place cannot be read, only the cut-outs of its shard are lost.

A part is `<shard>-<digest>.h5` with `tiles` uint8 (n, 3, 256, 256), contiguous, so any reader can map it into memory.
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
from synpipe.volumes.volume import Volume, VolumeUnusable

# Tiles per batch, 100 MB at 256 px: they are held in memory until they are written, and a kill loses at most these.
PART_TILES = 512
TILES_PER_WRITE = 32  # writing all tiles of a part at once would need their memory twice
READ_AHEAD_BYTES = 64 * 2**20  # decoded chunks and voxels of the cut-outs that are being read
# Extraction stops after this many failed shards in a row without any tile between them.
GIVE_UP_AFTER = 8
SHARDS_NAMED = 10  # in a message

PART_NAME = re.compile("[0-9]{5}-[0-9a-f]{12}")
BYTES_KEY = b"synpipe.bytes"  # metadata key in the index of a part: size of the file of tiles
logger = logging.getLogger(__name__)

# One row per window: the row of its cut-out, the file name of the part that holds it, and the shard.
WINDOW_SCHEMA = PART_SCHEMA.append(pa.field("part", pa.string())).append(pa.field("shard", pa.int32()))


def extract_shards(
    volume: Volume,
    spec: TileSpec,
    folder: BulkPath,
    starts_zyx: np.ndarray,
    progress: Callable[[int], None] = lambda count: None,
    cut_out_all: "Callable[[np.ndarray], Failures] | None" = None,
) -> tuple[Iterator[tuple[np.ndarray, pa.Table]], int]:
    """Cut out the windows that `folder` does not hold yet, and return all of them.

    folder: the folder of the recipe, see `TileSpec.recipe`. starts_zyx: first voxels of the windows, int64 (n, 3).
    progress: called with the number of cut-outs that are newly done. cut_out_all: cuts out windows elsewhere, such as on a
    cluster; None to do it in this process.

    Returns an iterator over the shards, which yields the ascending indices of a shard's windows and a table of
    `WINDOW_SCHEMA` with a row for each of them; and the number of cut-outs that were made.

    Raises `SynpipeError` if the volume could not be read everywhere, after all other shards have been cut out, and
    `VolumeUnusable` at once if the volume may not be read.
    """
    windows = rows_by_shard(shard_of(starts_zyx, spec))
    parts = _list_parts(folder)
    missing = [_missing(_read_indexes(parts, shard), starts_zyx[rows]) for shard, rows in windows]
    missing_count = sum(map(len, missing))
    progress(len(starts_zyx) - missing_count)
    if missing_count:
        cut_out_all = cut_out_all or (lambda starts: cut_out_windows(volume, spec, folder, starts, progress))
        failures = cut_out_all(np.concatenate(missing))
        failures.check(shards_tried=sum(len(starts) > 0 for starts in missing))
    # The marks go last: if the process is killed before, the next run finds them again.
    damaged = [part for shard, _ in windows for part in parts.get(shard, []) if part.marked]
    for part in damaged:
        mark_of(part.tiles).unlink(missing_ok=True)
    if missing_count or damaged:
        parts = _list_parts(folder)

    def rows_of_shards() -> Iterator[tuple[np.ndarray, pa.Table]]:
        for shard, rows in windows:
            table = _read_indexes(parts, shard)
            place = {key: row for row, key in enumerate(_keys(table))}
            yield rows, table.take([place[key] for key in map(tuple, starts_zyx[rows].tolist())])

    return rows_of_shards(), missing_count


def missing_windows(folder: BulkPath, shard: int, starts_zyx: np.ndarray) -> np.ndarray:
    """The windows of a shard that no part holds at present, each once: int64 (m, 3). starts_zyx: int64 (n, 3)."""
    return _missing(_read_indexes(_list_parts(folder), shard), starts_zyx)


def _missing(known: pa.Table, starts_zyx: np.ndarray) -> np.ndarray:
    """The windows without a row in `known`, each once: int64 (m, 3)."""
    return np.array(sorted(set(map(tuple, starts_zyx.tolist())) - set(_keys(known))), dtype=np.int64).reshape(-1, 3)


def _keys(table: pa.Table) -> Iterator[tuple[int, int, int]]:
    """First voxel z, y, x of the window of each row."""
    return zip(*(table[f"start_{axis}"].to_pylist() for axis in "zyx"), strict=True)


@dataclass
class Failures:
    """The outcome of cutting out windows.

    by_shard: the first error of each shard that failed. lost: number of cut-outs that were therefore not made. made:
    number of cut-outs that were made. in_a_row: number of shards that failed since the last cut-out was made.
    """

    by_shard: dict[int, SynpipeError] = field(default_factory=dict)
    lost: int = 0
    made: int = 0
    in_a_row: int = 0

    @property
    def gave_up(self) -> bool:
        return self.in_a_row >= GIVE_UP_AFTER

    def add_error(self, shard: int, error: SynpipeError) -> None:
        self.by_shard[shard] = error
        self.in_a_row += 1
        self.lost += 1

    def add_cut_out(self) -> None:
        self.in_a_row = 0
        self.made += 1

    def check(self, shards_tried: int) -> None:
        """Raises `SynpipeError` if a shard failed. shards_tried: number of shards that were to be cut out."""
        if not self.by_shard:
            return
        raise SynpipeError(
            f"{self.lost:,} cut-outs were not made: {len(self.by_shard)} of {shards_tried} shards failed "
            f"({name_some(self.by_shard)}){', one after the other, and the rest was not tried' if self.gave_up else ''}. "
            f"The first error: {next(iter(self.by_shard.values()))} All other cut-outs are kept: run the same command again "
            "to make only the missing ones."
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
    """Cut out windows and write them as parts. starts: first voxels, int64 (n, 3), each window once.

    Errors of the volume end up in the returned `Failures`. Raises `VolumeUnusable`, which affects all shards, and
    `SynpipeError` if a part cannot be written.
    """
    shards = shard_of(starts, spec)
    low = np.clip(starts, 0, volume.shape_zyx)
    high = np.clip(starts + spec.window_zyx(volume.voxel_size_nm_zyx), 0, volume.shape_zyx)
    batches = plan_batches(low, high, shards, volume.chunking, PART_TILES)
    failures = Failures()

    def is_wanted(window: int) -> bool:
        return shards[window] not in failures.by_shard and not failures.gave_up

    def chunks_of(window: int) -> list[Chunk]:
        return list(volume.chunking.chunks(low[window], high[window]))

    order = np.concatenate(batches).tolist()
    cut_outs = _read_ahead(volume, spec, starts, order, is_wanted, chunks_of)
    # One array serves all batches. Allocating an array per batch would fragment the memory more with every batch.
    stack = np.empty((max(map(len, batches)), SECTIONS, TILE_PX, TILE_PX), dtype=np.uint8)
    for batch in batches:
        cut_outs_of_shard: dict[int, list[tuple[int, dict[str, Any]]]] = {}
        for place, window in enumerate(batch.tolist()):
            finish = next(cut_outs)
            shard = int(shards[window])
            if finish is None or not is_wanted(window):
                failures.lost += 1
                continue
            try:
                tile, row = finish()
            except VolumeUnusable:
                raise
            except SynpipeError as error:
                failures.add_error(shard, error)
                continue
            if tile is not None:
                stack[place] = tile
            cut_outs_of_shard.setdefault(shard, []).append((place, row))
            failures.add_cut_out()
            progress(1)
        for shard in sorted(cut_outs_of_shard):
            _write_part(folder, shard, stack, cut_outs_of_shard[shard])
    return failures


def _read_ahead(
    volume: Volume,
    spec: TileSpec,
    starts: np.ndarray,
    order: list[int],
    is_wanted: Callable[[int], bool],
    chunks_of: Callable[[int], list[Chunk]],
) -> Iterator[Callable[[], CutOut] | None]:
    """Start cut-outs in the given order, as many at a time as `READ_AHEAD_BYTES` allows.

    Yields for each window the function that finishes its cut-out, or None if the window is no longer wanted.
    """
    window_voxels = int(np.prod(spec.window_zyx(volume.voxel_size_nm_zyx)))
    started: deque[tuple[Callable[[], CutOut] | None, list[Chunk]]] = deque()
    in_flight: Counter[Chunk] = Counter()
    room = READ_AHEAD_BYTES // volume.voxel_bytes
    chunk_voxels = int(np.prod(volume.chunking.shape_zyx))
    for window in order:
        chunks = chunks_of(window)
        while started:
            new = sum(chunk not in in_flight for chunk in chunks)
            if (len(in_flight) + new) * chunk_voxels + (len(started) + 1) * window_voxels <= room:
                break
            finish, finished_chunks = started.popleft()
            yield finish
            for chunk in finished_chunks:
                in_flight[chunk] -= 1
                if not in_flight[chunk]:
                    del in_flight[chunk]
        started.append((tiles.start_cut_out(volume, starts[window], spec) if is_wanted(window) else None, chunks))
        in_flight.update(chunks)
    while started:
        yield started.popleft()[0]


@dataclass
class _PartFiles:
    """A part as the folder lists it.

    tiles: path of the HDF5 file. complete: whether both files exist. marked: whether the tiles are known to be damaged, so
    that they must be made again; the part may then consist of its mark alone.
    """

    tiles: BulkPath
    complete: bool
    marked: bool


def _list_parts(folder: BulkPath) -> dict[int, list[_PartFiles]]:
    """The parts of each shard.

    A part has no file of tiles if somebody deleted it, or if it was damaged and moved aside. Its cut-outs are then made again.
    """
    files = {path.name: path for path in list_paths(folder, "*")}
    marked = {path.name for path in list_paths(mark_of(folder / "any").parent, "*")}
    parts: dict[int, list[_PartFiles]] = {}
    for name in sorted(marked.union(path.stem for path in files.values() if path.suffix == ".parquet")):
        if PART_NAME.fullmatch(name):
            tiles_path = files.get(f"{name}.h5")
            complete = tiles_path is not None and f"{name}.parquet" in files
            part = _PartFiles(tiles_path or folder / f"{name}.h5", complete, name in marked)
            parts.setdefault(int(name[:5]), []).append(part)
    return parts


def _read_indexes(parts: Mapping[int, list[_PartFiles]], shard: int) -> pa.Table:
    """The rows of all intact parts of a shard: a table of `WINDOW_SCHEMA`."""
    tables = []
    for part in parts.get(shard, []):
        if part.complete and (table := _read_index(part)) is not None:
            for name, value in (("part", pa.scalar(part.tiles.name)), ("shard", pa.scalar(shard, pa.int32()))):
                table = table.append_column(name, pa.repeat(value, len(table)))
            tables.append(table.cast(WINDOW_SCHEMA))
    return pa.concat_tables(tables) if tables else WINDOW_SCHEMA.empty_table()


def _read_index(part: _PartFiles) -> pa.Table | None:
    """The index of a part. Returns None if the index or the file of tiles is damaged, and moves the damaged file aside.

    The mark is set before the file of tiles is moved, and stays until the tiles exist again, because only the mark shows
    that tiles were moved aside.
    """
    try:
        table = read_table(part.tiles.with_suffix(".parquet"))
    except SynpipeError as error:
        logger.warning("%s", error)
        return None
    size = part.tiles.stat().st_size
    expected_size = int((table.schema.metadata or {}).get(BYTES_KEY, size))  # older parts do not record it
    if size == expected_size and not part.marked:
        return table
    if not part.marked:
        mark_damaged(part.tiles)
    part.marked, part.complete = True, False
    logger.warning("%s is damaged: moved to %s, its tiles are cut out again", part.tiles, set_aside(part.tiles).name)
    return None


def _write_part(folder: BulkPath, shard: int, stack: np.ndarray, rows: list[tuple[int, dict[str, Any]]]) -> None:
    """Write the cut-outs of a shard. rows: for each cut-out the index of its tile in `stack`, and its row of `PART_SCHEMA`."""
    tile_places = [place for place, row in rows if "reason" not in row]
    row_in_part = {place: count for count, place in enumerate(tile_places)}
    part_rows = [row | {"row": row_in_part.get(place, -1)} for place, row in rows]
    windows = [[row["start_z"], row["start_y"], row["start_x"]] for row in part_rows]
    path = folder / f"{shard:05d}-{digest(windows)[:12]}.h5"
    with atomic_path(path) as temporary:
        with h5py.File(temporary, "w") as file:
            dataset = file.create_dataset("tiles", (len(tile_places), *stack.shape[1:]), np.uint8)
            for first in range(0, len(tile_places), TILES_PER_WRITE):
                dataset[first : first + TILES_PER_WRITE] = stack[tile_places[first : first + TILES_PER_WRITE]]
            dataset.attrs["axes"] = "tile, section (z-1, z, z+1), y, x"
        size = temporary.stat().st_size  # asking an object store for it later would take a request
    # The index is written last, because it makes the part count.
    table = pa.Table.from_pylist(part_rows, schema=PART_SCHEMA)
    write_table(path.with_suffix(".parquet"), table, {BYTES_KEY.decode(): str(size)})
