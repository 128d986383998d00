"""Cut-outs in one call, for tests that need a few of them."""

from collections.abc import Callable

import numpy as np
import pyarrow as pa

from synpipe.store.objects import BulkPath
from synpipe.tiles.extraction import WINDOW_SCHEMA, extract_shards
from synpipe.tiles.tile import CutOut, TileSpec, start_cut_out
from synpipe.volumes.volume import Volume


def cut_out(volume: Volume, start_zyx: np.ndarray, spec: TileSpec) -> CutOut:
    """One tile, or None, and its row of `PART_SCHEMA`."""
    return start_cut_out(volume, start_zyx, spec)()


def extract(
    volume: Volume,
    spec: TileSpec,
    folder: BulkPath,
    starts_zyx: np.ndarray,
    progress: Callable[[int], None] = lambda count: None,
) -> tuple[pa.Table, int]:
    """`extract_shards` as one table of `WINDOW_SCHEMA`, a row per window in their order, and the number of cut-outs made."""
    shards, made = extract_shards(volume, spec, folder, starts_zyx, progress)
    order, tables = [np.zeros(0, np.int64)], [WINDOW_SCHEMA.empty_table()]
    for rows, table in shards:
        order.append(rows)
        tables.append(table)
    return pa.concat_tables(tables).take(np.argsort(np.concatenate(order))), made
