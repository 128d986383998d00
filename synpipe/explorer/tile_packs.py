"""Tiles in packs of a few megabytes, from which a browser takes parts with Range requests.

In: the tiles of the rows of a site. Out: a folder of files, each JPEG files one after another in the order of the rows, and a
file of columns that says where each begins.

JPEG without subsampling of colours, which here are sections: 40 kB a tile of ssTEM, where PNG takes 157. WebP halves the
resolution of two of the sections; AVIF of the same fidelity saves a quarter and takes thirty times as long
(`python -m synpipe_tests.bench.site`).
"""

import io
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from synpipe.assets.rgb_tiles import open_tiles
from synpipe.datasets import Dataset
from synpipe.errors import SynpipeError
from synpipe.explorer.column_files import Files, as_column
from synpipe.progress import Log, Progress
from synpipe.specs import digest
from synpipe.store.files import read_table
from synpipe.tiles.tile import TileReader

TILE_QUALITY = 80
PACK_BYTES = 4 << 20  # what a host that knows no Range requests sends for a tile
TILES_AT_ONCE = 1024


def write_tiles(
    files: Files, dataset: Dataset, synapses: pa.Table, former: tuple[Path, dict[str, Any]] | None, log: Log
) -> dict[str, Any]:
    """Write the tiles of the rows, in their order, into packs; those of an earlier site are kept where they are the same.

    Raises `SynpipeError` where a row was made of another tile than there is now.
    """
    index = read_table(dataset.tiles_path, ["synapse_id", "content_hash"])
    ids = index["synapse_id"].to_numpy()
    by_id = np.argsort(ids)
    wanted = synapses["synapse_id"].to_numpy()
    rows = by_id[np.minimum(np.searchsorted(ids, wanted, sorter=by_id), len(ids) - 1)]
    if not index.take(rows).equals(synapses.combine_chunks().cast(index.schema)):
        raise SynpipeError(
            f"The indexes of {dataset.name} are of other tiles than there are now: "
            f"`synpipe materialize --dataset {dataset.name} --stale`."
        )
    folder = f"data/tiles-{digest([TILE_QUALITY, PACK_BYTES, synapses['content_hash'].to_pylist()])[:16]}"
    if former is not None:
        site, said = former
        (before,) = said["datasets"]
        if before["tiles"]["folder"] == folder:
            log(f"{len(rows):,} tiles are those of the earlier site")
            for path in (folder, *before["tiles"]["places"]["paths"]):
                files.keep(site, path)
            return before["tiles"]
    lengths, starts = _write_packs(files.folder / folder, open_tiles(dataset), rows, log)
    places = files.write("places", {"length": as_column(lengths), "pack": as_column(starts)})
    return {"folder": folder, "places": places}


def _write_packs(folder: Path, reader: TileReader, rows: np.ndarray, log: Log) -> tuple[np.ndarray, np.ndarray]:
    """Returns the bytes of each tile, uint32 (n,), and the first tile of each pack, uint32, with n behind the last."""
    folder.mkdir(parents=True)
    lengths, starts, pack = np.zeros(len(rows), np.uint32), [0], bytearray()
    progress = Progress(log, len(rows), "tiles")
    for place, image in enumerate(_images(reader, rows, progress)):
        if pack and len(pack) + len(image) > PACK_BYTES:
            (folder / f"{len(starts) - 1:05d}.bin").write_bytes(pack)
            starts.append(place)
            pack.clear()
        lengths[place] = len(image)
        pack += image
    (folder / f"{len(starts) - 1:05d}.bin").write_bytes(pack)
    return lengths, np.array([*starts, len(rows)], np.uint32)


def jpeg(tile: np.ndarray) -> bytes:
    """tile: uint8 (3, y, x)."""
    buffer = io.BytesIO()
    Image.fromarray(tile.transpose(1, 2, 0)).save(buffer, "JPEG", quality=TILE_QUALITY, subsampling=0, optimize=True)
    return buffer.getvalue()


def _images(reader: TileReader, rows: np.ndarray, progress: Progress) -> Iterator[bytes]:
    def encode(row: int) -> bytes:
        return jpeg(reader.read(np.array([row]))[0])

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # Pillow lets go of the interpreter's lock
        for start in range(0, len(rows), TILES_AT_ONCE):
            batch = rows[start : start + TILES_AT_ONCE].tolist()
            yield from pool.map(encode, batch)
            progress(len(batch))
