"""The asset `index` of an encoder: the embedding table as a published version of a LanceDB table.

LanceDB takes two seconds to import. `synpipe status` and the loading of the Dagster code need not wait for it, so functions
import the modules that use it.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import pyarrow.compute as pc
from PIL import Image

from synpipe.annotations.schema import UNLABELLED
from synpipe.assets import embedding_table, embeddings
from synpipe.assets.asset import Asset, Finding, Leftover, Made, Task, View, file_leftover, no_files, view_of_figures
from synpipe.assets.manifest import Manifest, data_version_of, find_manifest, read_manifest
from synpipe.assets.rgb_tiles import MAX_SHOWN_CLASSES, draw_tiles, explain_gone_tile, open_embedded_tiles
from synpipe.assets.volume import find_viewer
from synpipe.datasets import Dataset
from synpipe.errors import SynpipeError
from synpipe.store.objects import list_paths
from synpipe.store.streams import read_batches

if TYPE_CHECKING:
    from synpipe.index.search import Neighbour, SynapseIndex

CODE_VERSION = "1"
SHOWN_PER_CLASS = 2
TILES_PER_ROW = 10


@dataclass(frozen=True)
class IndexFacts:
    """recall: recall@10 against an exact search. query_ms: median time of a query for the ten nearest."""

    recall: float
    query_ms: float


def make(task: Task) -> Made[IndexFacts]:
    """Publish the table as a version of the LanceDB table that has the encoder's name."""
    from synpipe.index import publish

    dataset, encoder = task.dataset, task.encoder
    version = data_version_of("index", CODE_VERSION, task.inputs)
    fingerprint = embeddings.ASSET.read(dataset, encoder).encoder_fingerprint
    # Going back to a version that was published before, after a swap there and back or a rollback, builds nothing.
    report = publish.republish(dataset.lancedb_folder, encoder, version, fingerprint, task.log)
    if report:
        task.log("this version was published before")
        if task.unchanged and task.previous is not None:
            return Made(version, ASSET.parse(task.previous), report.rows, task.previous.figures)
    else:
        report = publish.publish(dataset.table_path(encoder), dataset.lancedb_folder, encoder, version, task.log)
    task.log(f"{report.rows:,} rows, {report.kind}, recall@10 {report.recall:.4f}, tag {report.tag}")
    cost = publish.cost(dataset.lancedb_folder, encoder)
    task.log(f"{cost.bytes / 1e6:.1f} MB, {cost.query_ms:.1f} ms a query")
    figures = {name: value for name, value in (asdict(report) | asdict(cost)).items() if name != "rows"}
    return Made(version, IndexFacts(report.recall, cost.query_ms), report.rows, figures)


def finds_neighbours(dataset: Dataset, encoder: str) -> Finding:
    """The published index has the rows of the table and finds the true neighbours, also for the rarest class."""
    from synpipe.index.publish import published
    from synpipe.index.recall import MIN_RECALL

    table_rows = read_manifest(dataset, embedding_table.ASSET.name_for(encoder)).rows
    report = published(dataset.lancedb_folder, encoder)
    figures: dict[str, Any] = {"recall@10": report.recall, "rows": report.rows}
    text = f"recall@10 {report.recall:.4f} against exact search"
    recalls = [report.recall]
    if report.rarest_class_recall is not None:
        figures |= {"recall@10, rarest class": report.rarest_class_recall, "rarest class": report.rarest_class}
        text += f", {report.rarest_class_recall:.4f} for queries of the rarest class, {report.rarest_class}"
        recalls.append(report.rarest_class_recall)
    if report.rows != table_rows:
        return Finding(False, f"The index has {report.rows:,} rows, the table {table_rows:,}.", figures)
    return Finding(min(recalls) >= MIN_RECALL, f"{text}; at least {MIN_RECALL} is required.", figures)


def open_index(dataset: Dataset, encoder: str, in_memory: bool = True) -> "SynapseIndex":
    """The published index of an encoder, ready to search. Raises `SynpipeError` if there is none.

    in_memory: hold vectors in memory as far as `index.search` does; False suits a single query.
    """
    from synpipe.index.damage import explaining_damage
    from synpipe.index.search import SynapseIndex

    viewer = find_viewer(dataset)
    with explaining_damage(dataset.lancedb_folder, encoder):
        return SynapseIndex(dataset, encoder, in_memory=in_memory, viewer=viewer)


def find_rolled_back(dataset: Dataset, encoder: str) -> str | None:
    """The tag of the version that readers see, if it is not the version that the manifest of the index describes.

    None also if the index has not been made or cannot be read, and after an interrupted run, which may have published a version
    that the manifest does not describe yet.
    """
    manifest = find_manifest(dataset, ASSET.name_for(encoder))
    if manifest is None or manifest.interrupted:
        return None
    # LanceDB takes two seconds to import. Normally its file of the tag `current` names the version of the manifest.
    with suppress(OSError, ValueError, KeyError, TypeError, SynpipeError):
        tag = dataset.lancedb_folder / f"{encoder}.lance" / "_refs" / "tags" / "current.json"
        if json.loads(tag.read_bytes())["version"] == manifest.figures["version"]:
            return None
    from synpipe.index.publish import open_current, read_provenance, tag_for

    try:
        seen = read_provenance(open_current(dataset.lancedb_folder, encoder).schema)
    except (SynpipeError, OSError):
        return None
    if seen["data_version"] == manifest.data_version:
        return None
    return tag_for(seen["data_version"], seen["encoder_fingerprint"])


def choose_example_queries(dataset: Dataset, encoder: str) -> list[int]:
    """A synapse of each class to search with: the first one whose tile is whole."""
    columns = ["synapse_id", "neurotransmitter", "pad_fraction", "missing_sections"]
    example_by_class: dict[str, int] = {}
    for part in read_batches(dataset.table_path(encoder), columns):
        whole = part.filter(pc.and_(pc.equal(part["pad_fraction"], 0), pc.equal(part["missing_sections"], 0)))
        for name in dataset.spec.classes:
            members = whole.filter(pc.equal(whole["neurotransmitter"], name))
            if name not in example_by_class and len(members):
                example_by_class[name] = members["synapse_id"][0].as_py()
    return [example_by_class[name] for name in dataset.spec.classes if name in example_by_class][:MAX_SHOWN_CLASSES]


def draw_neighbours(
    dataset: Dataset,
    index: "SynapseIndex",
    answers: Mapping[int, "Mapping[str, Sequence[Neighbour]]"],
    tile_px: int = 64,
) -> Image.Image:
    """A row per query: its tile, then the two most similar synapses of each class, with their distances.

    The tiles and classes are those of the index, even if synapses have others by now. answers: at least one answer of
    `index.search`, by the query's synapse id. Raises `SynpipeError` if the store no longer holds one of the tiles.
    """
    rows = {
        f"{index.synapse(query).neurotransmitter or UNLABELLED}\n{query}": [
            (query, "query"),
            *(
                (neighbour.synapse_id, f"{name[:4]}  {neighbour.distance:.2g}")
                for name, neighbours in answer.items()
                for neighbour in neighbours[:SHOWN_PER_CLASS]
            ),
        ]
        for query, answer in answers.items()
    }
    return _draw_embedded_tiles(dataset, index, rows, tile_px)


def _draw_embedded_tiles(
    dataset: Dataset, index: "SynapseIndex", rows: Mapping[str, Sequence[tuple[int, str]]], tile_px: int
) -> Image.Image:
    """`draw_tiles` with the tiles that were embedded for this version of the index."""
    shown = list(dict.fromkeys(synapse_id for row in rows.values() for synapse_id, _ in row))
    reader = open_embedded_tiles(dataset, index.provenance, index.contents(shown))
    for synapse_id in shown:
        if not reader.has(synapse_id):
            raise SynpipeError(explain_gone_tile(dataset, synapse_id))
    return draw_tiles(reader, rows, tile_px)


def draw_answer(
    dataset: Dataset, index: "SynapseIndex", query: int, answer: "Mapping[str, Sequence[Neighbour]]"
) -> Image.Image:
    """One whole answer of `index.search`: the tile of the query, then rows with all neighbours of each class.

    Raises `SynpipeError` if the store no longer holds one of the tiles.
    """
    rows = {f"query\n{query}": [(query, index.synapse(query).neurotransmitter or UNLABELLED)]}
    for name, neighbours in answer.items():
        for start in range(0, len(neighbours), TILES_PER_ROW):
            of_row = neighbours[start : start + TILES_PER_ROW]
            heading = f"{name}\n{start + 1}–{start + len(of_row)}"
            rows[heading] = [(each.synapse_id, f"{each.synapse_id}  {each.distance:.2g}") for each in of_row]
    return _draw_embedded_tiles(dataset, index, rows, tile_px=128)


def draw_example_neighbours(dataset: Dataset, encoder: str, tile_px: int = 64) -> Image.Image | None:
    """`draw_neighbours` for an example of each class; None if no tile of a known class is whole."""
    index = open_index(dataset, encoder, in_memory=False)
    answers = {query: index.search(query) for query in choose_example_queries(dataset, encoder)}
    return draw_neighbours(dataset, index, answers, tile_px) if answers else None


def find_leftovers(dataset: Dataset, _fresh: bool) -> Iterator[Leftover]:
    """Versions that no tag names, with what interrupted builds left behind, and tables without any tag."""
    tables = list_paths(dataset.lancedb_folder, "*.lance")
    if not tables:
        return
    from synpipe.index import versions

    for path in tables:
        untagged = versions.find_untagged(dataset, path.stem)
        if path.stem not in dataset.encoders and not untagged.tags:
            yield file_leftover(path, "index of an encoder no longer used")
        elif untagged.bytes:
            yield Leftover(path, untagged.bytes, "versions that no tag names", untagged.versions)


def show(dataset: Dataset, encoder: str, manifest: Manifest) -> View:
    picture = draw_example_neighbours(dataset, encoder)
    entries = ({} if picture is None else {"nearest_neighbours": picture}) | view_of_figures(manifest)
    return View(entries, dataset.lancedb_folder / f"{encoder}.lance")


ASSET = Asset(
    name="index",
    per_encoder=True,
    exists=lambda dataset, encoder: True,
    description="The table in LanceDB, versioned and indexed, for `synpipe search`.",
    storage=frozenset({"lancedb"}),
    facts=IndexFacts,
    reads=lambda dataset, encoder: (f"embedding_table_{encoder}",),
    optional_reads=False,
    version_covers_reads=True,
    code_version=CODE_VERSION,
    still_valid=(),
    specs=lambda dataset, encoder: dataset.identity(encoder),
    make=make,
    source_version=None,
    checks={"recall": finds_neighbours},
    files=no_files,
    names_tiles=False,
    leftovers=find_leftovers,
    columns=embedding_table.COLUMNS,
    table_columns=(),
    show=show,
)
