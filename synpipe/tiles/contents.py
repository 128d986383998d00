"""Finds tiles by their content in all parts that are kept, also in parts that only former versions of the tiles name.

Input: the folder of all recipes, and content hashes. Output: where a tile of each hash lies. The index of a part holds the hashes
of its tiles in colour. The hash of a tile in grey is recorded nowhere else than in the index of the tiles, which may have changed
since, so tiles are read and hashed to find it. This takes about a millisecond per tile.
"""

import pyarrow as pa
import pyarrow.compute as pc

from synpipe.errors import SynpipeError
from synpipe.store.files import read_table
from synpipe.store.objects import BulkPath, list_paths
from synpipe.tiles.parts import damaged_parts
from synpipe.tiles.tile import PART_SCHEMA, TileReader, content_hashes

# A row per tile: the part that holds it, relative to the folder that holds the folder of all recipes, and its row there.
PLACE_SCHEMA = pa.schema(
    [("file", pa.string()), *(column for column in PART_SCHEMA if column.name not in ("reason", "detail"))]
)


def file_of(part: BulkPath) -> str:
    """The name of a part in the column `file` of an index of tiles."""
    return f"{part.parent.parent.name}/{part.parent.name}/{part.name}"


def list_whole_parts(folder: BulkPath) -> list[BulkPath]:
    """The HDF5 files of all recipes that have an index and are not known to be damaged."""
    files = {str(path): path for path in list_paths(folder, "*/[!.]*.*")}
    damaged = set(map(str, damaged_parts(folder)))
    return [
        path
        for name, path in files.items()
        if path.suffix == ".h5" and str(path.with_suffix(".parquet")) in files and name not in damaged
    ]


def read_part(part: BulkPath, stacking: str) -> pa.Table:
    """The tiles of a part, with their content hashes in this stacking: a table of `PLACE_SCHEMA`.

    A part that turns out to be damaged has none. stacking: see `TileSpec`.
    """
    try:
        index = read_table(part.with_suffix(".parquet"))
        tiles = index.filter(pc.is_null(index["reason"]))
        tiles = tiles.append_column("file", pa.repeat(pa.scalar(file_of(part)), len(tiles))).select(PLACE_SCHEMA.names)
        if stacking == "grey" and len(tiles):
            no_ids = tiles.append_column("synapse_id", pa.repeat(pa.scalar(0), len(tiles)))
            hashes = content_hashes(TileReader(no_ids, part.parent.parent.parent, stacking), len(tiles))
            tiles = tiles.set_column(PLACE_SCHEMA.get_field_index("content_hash"), "content_hash", hashes)
    except SynpipeError:  # the file has been marked or moved aside
        return PLACE_SCHEMA.empty_table()
    return tiles.cast(PLACE_SCHEMA)


def find_by_content(folder: BulkPath, hashes: pa.Array | pa.ChunkedArray, stacking: str) -> pa.Table:
    """One tile for each of these content hashes that a part holds: a table of `PLACE_SCHEMA`. folder: of all recipes."""
    found, missing = [PLACE_SCHEMA.empty_table()], set(hashes.to_pylist())
    for part in list_whole_parts(folder):
        if not missing:
            break
        tiles = read_part(part, stacking)
        rows = []
        for row, content_hash in enumerate(tiles["content_hash"].to_pylist()):
            if content_hash in missing:
                missing.remove(content_hash)  # of two places with the same content, the first one serves
                rows.append(row)
        found.append(tiles.take(pa.array(rows, pa.int64())))
    return pa.concat_tables(found).combine_chunks()
