"""The asset `rgb_tiles`: the index of the model-ready tiles, a view of the stacks in colour or in grey."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from synpipe.analysis.pictures import draw_sheet
from synpipe.annotations.schema import UNLABELLED
from synpipe.assets import synapse_stacks
from synpipe.assets.asset import (
    Asset,
    Finding,
    Leftover,
    Made,
    Task,
    View,
    always,
    file_leftover,
    list_complete,
    view_of_figures,
)
from synpipe.assets.manifest import Manifest, data_version_of, file_metadata, find_manifest, find_version
from synpipe.assets.synapse_stacks import STACKS_SCHEMA, read_ids
from synpipe.datasets import Dataset
from synpipe.store.files import read_table, table_writer
from synpipe.store.streams import BATCH_ROWS, by_shard, column_of, read_batches
from synpipe.tiles.contents import file_of, find_by_content, list_whole_parts, read_part
from synpipe.tiles.parts import damaged_parts, mark_of
from synpipe.tiles.tile import SECTIONS, TILE_PX, TileReader, content_hashes

CODE_VERSION = "1"
MAX_SHOWN_CLASSES = 12
PLACE_COLUMNS = ["content_hash", "file", "row", "crc32"]  # what `TileReader` needs, apart from the id


@dataclass(frozen=True)
class TilesFacts:
    """stacking: `rgb`, or `grey` for the middle section alone; see `TileSpec`."""

    stacking: str


def make(task: Task) -> Made[TilesFacts]:
    """List the stacks that have a tile."""
    dataset, stacking = task.dataset, task.dataset.spec.tiles.stacking
    version = data_version_of("rgb_tiles", CODE_VERSION, task.inputs, [stacking])
    rows = padded = with_missing_sections = 0
    schema = pa.schema([column for column in STACKS_SCHEMA if column.name not in ("reason", "detail")])
    with table_writer(dataset.tiles_path, schema, file_metadata(dataset, version, task.inputs)) as writer:
        for _, stacks in by_shard(read_batches(dataset.stacks_path)):
            tiles = stacks.filter(pc.is_null(stacks["reason"])).select(schema.names)
            if stacking == "grey":
                hashes = content_hashes(TileReader(tiles, dataset.bulk_folder, stacking), len(tiles))
                tiles = tiles.set_column(schema.get_field_index("content_hash"), "content_hash", hashes)
            rows += len(tiles)
            padded += int(pc.sum(pc.greater(tiles["pad_fraction"], 0)).as_py() or 0)
            with_missing_sections += int(pc.sum(pc.greater(tiles["missing_sections"], 0)).as_py() or 0)
            if len(tiles):
                writer.write_table(tiles.cast(schema))
    task.log(f"{rows:,} tiles, {padded:,} padded, {with_missing_sections:,} with missing sections")
    figures = {"stacking": stacking, "padded": padded, "with_missing_sections": with_missing_sections}
    return Made(version, TilesFacts(stacking), rows, figures)


def are_there(dataset: Dataset, _encoder: str) -> Finding:
    """There is at least one tile, and none is listed twice."""
    ids = read_ids(dataset.tiles_path)
    repeated = len(ids) - len(np.unique(ids))
    if not len(ids):
        return Finding(False, f"No tile is left: every synapse was rejected. Look at {dataset.rejects_path.name}.")
    if repeated:
        return Finding(False, f"{repeated:,} synapses are listed more than once.")
    return Finding(True, f"{len(ids):,} tiles, each of another synapse.", {"tiles": len(ids)})


def open_tiles(dataset: Dataset, synapse_ids: Sequence[int] | None = None) -> TileReader:
    """The tiles as they were made and hashed, even if the spec has another stacking by now.

    synapse_ids: read the index of these synapses only, so that the whole index need not fit in memory; in any order.
    Raises `SynpipeError` if the tiles have not been made.
    """
    stacking = ASSET.read(dataset).stacking
    ASSET.check_files(dataset)
    if synapse_ids is None:
        return TileReader(read_table(dataset.tiles_path), dataset.bulk_folder, stacking)
    wanted = pa.array(synapse_ids, pa.int64())
    parts = (part.filter(pc.is_in(part["synapse_id"], value_set=wanted)) for part in read_batches(dataset.tiles_path))
    return TileReader(pa.concat_tables(parts), dataset.bulk_folder, stacking)


def open_embedded_tiles(dataset: Dataset, origin: Mapping[str, Any], rows: pa.Table) -> TileReader:
    """The tiles that were embedded into rows of an index or an embedding table, whatever tiles their synapses have by now.

    origin: provenance of the index or table. rows: its columns `synapse_id` and `content_hash`, or some of their rows. A synapse
    whose tile the store no longer holds has no tile in the reader; see `explain_gone_tile`.
    """
    stacking = stacking_of(dataset, origin)
    places = _find_places(dataset, rows["content_hash"], stacking)
    found = pc.index_in(rows["content_hash"], value_set=places["content_hash"]).combine_chunks()
    there = pc.is_valid(found)
    tiles = places.take(found.filter(there))
    return TileReader(
        tiles.append_column("synapse_id", rows["synapse_id"].filter(there)), dataset.bulk_folder, stacking
    )


def explain_gone_tile(dataset: Dataset, synapse_id: int) -> str:
    """For a synapse of an index whose tile the store no longer holds."""
    return (
        f"The tile of synapse {synapse_id} from which this version of the index of {dataset.name} was made is no longer in the "
        "store: it was damaged, or `synpipe gc` of an earlier synpipe removed it. Let readers see another version with "
        "`synpipe rollback`."
    )


def stacking_of(dataset: Dataset, origin: Mapping[str, Any]) -> str:
    """The stacking of the tiles from which an index or an embedding table with this provenance was made."""
    made = find_version(dataset, ASSET.name, origin["inputs"][ASSET.name])
    # The lineage may have been lost. The spec is that of the run that wrote the table.
    return str(origin["dataset_spec"]["tiles"]["stacking"]) if made is None else ASSET.parse(made).stacking


def _find_places(dataset: Dataset, hashes: pa.ChunkedArray, stacking: str) -> pa.Table:
    """Where tiles with these content hashes lie: a table of `PLACE_COLUMNS`, in which a hash may have several rows.

    The index of the tiles is asked first. Only for hashes that it does not have are the parts searched.
    """
    found = [pa.schema([STACKS_SCHEMA.field(name) for name in PLACE_COLUMNS]).empty_table()]
    made = find_manifest(dataset, ASSET.name)
    # An equal hash in another stacking would be that of another tile.
    if made is not None and ASSET.parse(made).stacking == stacking and dataset.tiles_path.exists():
        # Each batch is compared with all hashes, so many hashes need the whole index at once.
        few = len(hashes) <= BATCH_ROWS
        path = dataset.tiles_path
        for part in read_batches(path, PLACE_COLUMNS) if few else [read_table(path, PLACE_COLUMNS)]:
            found.append(part.filter(pc.is_in(part["content_hash"], value_set=hashes)).select(PLACE_COLUMNS))
    known = pa.concat_tables(found)
    missing = hashes.filter(pc.invert(pc.is_in(hashes, value_set=known["content_hash"])))
    if len(missing):
        kept = find_by_content(dataset.cut_outs_folder, missing, stacking)
        known = pa.concat_tables([known, kept.select(PLACE_COLUMNS)])
    return known.combine_chunks()


@dataclass(frozen=True)
class TilePlaces:
    """Where tiles lie. synapse_ids: ascending, int64 (n,). starts_zyx: first voxels, int64 (n, 3). window_zyx: extent of a
    tile in voxels, sections that are skipped included."""

    synapse_ids: np.ndarray
    starts_zyx: np.ndarray
    window_zyx: tuple[int, int, int]


def read_places(dataset: Dataset) -> TilePlaces:
    """The places of all tiles."""
    ids, starts, step = [], [], 1
    for part in read_batches(dataset.tiles_path, ["synapse_id", "z_index", "start_z", "start_y", "start_x"]):
        ids.append(part["synapse_id"].to_numpy())
        starts.append(np.stack([part[f"start_{axis}"].to_numpy() for axis in "zyx"], axis=1))
        # The middle section of a stack is as far from its first section as from its last.
        step = (part["z_index"][0].as_py() - part["start_z"][0].as_py()) if len(part) else step
    order = np.argsort(together := np.concatenate(ids))
    return TilePlaces(together[order], np.concatenate(starts)[order], ((SECTIONS - 1) * step + 1, TILE_PX, TILE_PX))


def class_by_synapse(dataset: Dataset, synapse_ids: Iterable[int]) -> dict[int, str]:
    """The class of each of these synapses, `UNLABELLED` if it has none."""
    ids = np.unique(np.array([*synapse_ids], dtype=np.int64))
    labels = column_of(dataset.synapses_path, ids, "neurotransmitter")
    return {synapse_id: label or UNLABELLED for synapse_id, label in zip(ids.tolist(), labels, strict=True)}


def draw_tiles_by_class(dataset: Dataset, per_class: int = 8, tile_px: int = 96) -> Image.Image | None:
    """A row of tiles per class, taken at even distances from the index; None if there is no tile."""
    ids = np.sort(read_ids(dataset.tiles_path))
    labels = column_of(dataset.synapses_path, ids, "neurotransmitter")
    rows: dict[str, list[tuple[int, str]]] = {}
    for name in (*dataset.spec.classes, None):
        members = np.flatnonzero(labels == np.array(name, dtype=object))
        if len(members) and len(rows) < MAX_SHOWN_CLASSES:
            places = np.linspace(0, len(members) - 1, min(per_class, len(members))).astype(int)
            rows[name or UNLABELLED] = [(synapse_id, str(synapse_id)) for synapse_id in ids[members[places]].tolist()]
    shown = [synapse_id for row in rows.values() for synapse_id, _ in row]
    return draw_tiles(open_tiles(dataset, shown), rows, tile_px) if rows else None


def draw_tiles(reader: TileReader, rows: Mapping[str, Sequence[tuple[int, str]]], tile_px: int) -> Image.Image:
    """Rows of tiles, given as synapse ids with captions. The key of a row is written to its left; at least one row."""
    cells = {
        heading: [(reader.by_id(synapse_id), caption) for synapse_id, caption in row] for heading, row in rows.items()
    }
    return draw_sheet(cells, tile_px)


def find_leftovers(dataset: Dataset, fresh: bool) -> Iterable[Leftover]:
    """Parts of which no tile is in use, neither by the index of the tiles nor by a published version of an index.

    A part never changes, so one that is used in part stays whole.
    """
    if not fresh:
        return
    used: set[str] = set()
    for index in (dataset.stacks_path, dataset.tiles_path):
        used.update(read_table(index, ["file"])["file"].unique().to_pylist())
    used |= _find_published_parts(dataset, used)
    for part in damaged_parts(dataset.cut_outs_folder):
        if f"tiles/{part.parent.name}/{part.name}" not in used:
            yield file_leftover(mark_of(part), "mark of damaged tiles of no synapse")
    # `<part>.h5`, its index `<part>.parquet`, and the mark `<part>.h5.suspect` of a former version, which means nothing now.
    for path in list_complete(dataset.cut_outs_folder, "*/*.*"):
        if path.suffix == ".suspect" or f"tiles/{path.parent.name}/{path.stem}.h5" not in used:
            yield file_leftover(path, "tiles of no synapse")


def _find_published_parts(dataset: Dataset, used: Collection[str]) -> set[str]:
    """Of the parts that are not in `used`, those with a tile that only a published version of an index names."""
    others = [part for part in list_whole_parts(dataset.cut_outs_folder) if file_of(part) not in used]
    if not others or not any(dataset.lancedb_folder.glob("*.lance")):
        return set()
    from synpipe.index.versions import read_contents  # LanceDB takes two seconds to import

    current = read_table(dataset.tiles_path, ["content_hash"])["content_hash"]
    wanted: dict[str, set[str]] = {}
    for origin, hashes in read_contents(dataset):
        stacking = stacking_of(dataset, origin)
        if stacking == ASSET.read(dataset).stacking:
            hashes = hashes.filter(pc.invert(pc.is_in(hashes, value_set=current)))
        if len(hashes):
            wanted.setdefault(stacking, set()).update(hashes.to_pylist())
    return {
        file_of(part)
        for part in others
        if any(
            not hashes.isdisjoint(read_part(part, stacking)["content_hash"].to_pylist())
            for stacking, hashes in wanted.items()
        )
    }


SAMPLE_COLUMNS = ("synapse_id", "shard", "row", "z_index", "pad_fraction", "missing_sections", "mean", "std")


def show(dataset: Dataset, _encoder: str, manifest: Manifest) -> View:
    picture = draw_tiles_by_class(dataset)
    entries = ({} if picture is None else {"contact_sheet": picture}) | view_of_figures(manifest)
    return View(entries, dataset.tiles_path, SAMPLE_COLUMNS)


ASSET = Asset(
    name="rgb_tiles",
    per_encoder=False,
    exists=always,
    description="The stacks as tiles for the encoders: three sections as red, green and blue, or the middle one in grey.",
    storage=frozenset({"hdf5"}),
    facts=TilesFacts,
    reads=lambda dataset, encoder: ("synapse_stacks",),
    optional_reads=False,
    version_covers_reads=True,
    code_version=CODE_VERSION,
    still_valid=(),
    specs=lambda dataset, encoder: dataset.spec.tiles.stacking,
    make=make,
    source_version=None,
    checks={"are_there": are_there},
    files=lambda dataset, encoder: (dataset.tiles_path,),
    names_tiles=True,
    leftovers=find_leftovers,
    columns=synapse_stacks.COLUMNS,
    table_columns=(),
    show=show,
)
