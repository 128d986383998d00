"""Writes the tiles of a static site into packs of a few megabytes, from which a browser reads single tiles with Range requests.

Input: the synapses of a site. Output: a folder of packs, in which JPEG files follow each other in the order of the rows, and a file
of columns with the length of each tile.

Why JPEG without chroma subsampling (the colour channels are sections): an ssTEM tile takes 40 kB, as PNG 157 kB. WebP halves the
resolution of two of the sections. AVIF of the same fidelity saves a quarter but takes thirty times as long
(`python -m synpipe_tests.bench.site`).
"""

import io
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image, ImageFile

from synpipe.assets.rgb_tiles import open_tiles
from synpipe.datasets import Dataset
from synpipe.errors import SynpipeError
from synpipe.explorer.column_files import SiteFiles, as_column
from synpipe.progress import Log, Progress
from synpipe.specs import digest
from synpipe.store.files import read_table
from synpipe.tiles.tile import TileReader

TILE_QUALITY = 80
# Pillow gives the encoder a buffer of a byte per pixel, and a tile of noise does not fit. This is more than any tile needs.
ImageFile.MAXBLOCK = max(ImageFile.MAXBLOCK, 1 << 20)
PACK_BYTES = 4 << 20  # a host without Range requests sends this much for a single tile
TILES_PER_BATCH = 1024


@dataclass(frozen=True)
class FormerSite:
    """An earlier export. content: its `site.json`."""

    folder: Path
    content: dict[str, Any]


def write_tiles(
    files: SiteFiles, dataset: Dataset, synapses: pa.Table, former: FormerSite | None, log: Log
) -> dict[str, Any]:
    """Write the tiles of the synapses, in their order, and return their description for `site.json`.

    synapses: `synapse_id` and `content_hash` of each row. Packs of the earlier site are reused if the tiles are the same.

    Raises `SynpipeError` if the tiles have changed since the index was made.
    """
    rows = _tile_rows(dataset, synapses)
    folder = f"data/tiles-{digest([TILE_QUALITY, PACK_BYTES, synapses['content_hash'].to_pylist()])[:16]}"
    if former is not None:
        (former_dataset,) = former.content["datasets"]
        former_tiles = former_dataset["tiles"]
        if former_tiles["folder"] == folder:
            log(f"reused {len(rows):,} tiles of the earlier site")
            for path in (folder, *former_tiles["places"]["paths"]):
                files.reuse(former.folder, path)
            return former_tiles
    lengths, first_tiles = _write_packs(files.folder / folder, open_tiles(dataset), rows, log)
    places = files.write("places", {"length": as_column(lengths), "pack": as_column(first_tiles)})
    return {"folder": folder, "places": places}


def _tile_rows(dataset: Dataset, synapses: pa.Table) -> np.ndarray:
    """The row of each synapse in the table of tiles, int64 (n,)."""
    tiles = read_table(dataset.tiles_path, ["synapse_id", "content_hash"])
    ids = tiles["synapse_id"].to_numpy()
    by_id = np.argsort(ids)
    wanted = synapses["synapse_id"].to_numpy()
    rows = by_id[np.minimum(np.searchsorted(ids, wanted, sorter=by_id), len(ids) - 1)]
    if not tiles.take(rows).equals(synapses.combine_chunks().cast(tiles.schema)):
        raise SynpipeError(
            f"The tiles of {dataset.name} have changed since its indexes were made. Run "
            f"`synpipe materialize --dataset {dataset.name} --stale`. After a rollback, go forward again with `synpipe rollback`."
        )
    return rows


def _write_packs(folder: Path, reader: TileReader, rows: np.ndarray, log: Log) -> tuple[np.ndarray, np.ndarray]:
    """Write the tiles of these rows into packs.

    Returns the number of bytes of each tile, uint32 (n,), and the first tile of each pack, uint32 (packs + 1,), ending with n.
    """
    folder.mkdir(parents=True)
    lengths, first_tiles, pack = np.zeros(len(rows), np.uint32), [0], bytearray()
    progress = Progress(log, len(rows), "tiles")
    for number, image in enumerate(_encoded_tiles(reader, rows, progress)):
        if pack and len(pack) + len(image) > PACK_BYTES:
            (folder / f"{len(first_tiles) - 1:05d}.bin").write_bytes(pack)
            first_tiles.append(number)
            pack.clear()
        lengths[number] = len(image)
        pack += image
    (folder / f"{len(first_tiles) - 1:05d}.bin").write_bytes(pack)
    return lengths, np.array([*first_tiles, len(rows)], np.uint32)


def jpeg(tile: np.ndarray) -> bytes:
    """A tile, uint8 (3, y, x), as JPEG."""
    buffer = io.BytesIO()
    Image.fromarray(tile.transpose(1, 2, 0)).save(buffer, "JPEG", quality=TILE_QUALITY, subsampling=0, optimize=True)
    return buffer.getvalue()


def _encoded_tiles(reader: TileReader, rows: np.ndarray, progress: Progress) -> Iterator[bytes]:
    def encode(row: int) -> bytes:
        return jpeg(reader.read(np.array([row]))[0])

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # Pillow releases the interpreter lock
        for start in range(0, len(rows), TILES_PER_BATCH):
            batch = rows[start : start + TILES_PER_BATCH].tolist()
            yield from pool.map(encode, batch)
            progress(len(batch))
