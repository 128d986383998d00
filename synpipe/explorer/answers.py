"""Answers the questions that the explorer's pages ask about a store.

Input: a project, and the text values of a web address. Output: dictionaries, lists and bytes; ids are strings, because
JavaScript rounds integers above 2^53.

Guarantees:

- The store is only read.
- Names from outside are compared with existing names. They never become part of a path or of a filter.
- Each answer comes from one published version of an index. While a new version is being opened, the previous one answers.

All functions raise `NotFound` for an unknown data set, encoder or synapse, and `SynpipeError` for an invalid value.
"""

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Generic, TypeVar

import numpy as np
import pyarrow as pa

from synpipe.annotations.schema import UNLABELLED
from synpipe.assets.compressed import open_branch
from synpipe.assets.index import open_index
from synpipe.assets.manifest import find_manifest
from synpipe.assets.rgb_tiles import explain_gone_tile, open_embedded_tiles
from synpipe.assets.volume import find_viewer
from synpipe.datasets import Dataset, Project
from synpipe.embeddings.encoders import Encoder
from synpipe.errors import NotFound, SynpipeError
from synpipe.explorer.map_file import MAP_CATEGORIES, MAP_NUMBERS, pack_map
from synpipe.index.publish import identify, open_current
from synpipe.index.search import Neighbour, Synapse, SynapseIndex
from synpipe.tiles.tile import TileReader

VERSION_CHECK_S = 1.0  # minimum time between two checks for a newer version
MAX_PER_CLASS = 100
MAX_DIGITS = 19  # those of 2^63
SHOWN = 40  # characters of a wrong value that a message repeats
FILTER_COLUMNS = ("region", "hemilineage")

T = TypeVar("T")


class _Latest(Generic[T]):
    """A value that is opened again when its version changes.

    Only one thread opens the next value; meanwhile the other threads get the current one.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._current: tuple[Any, T] | None = None  # its version and the value
        self._checked_at = 0.0

    def get(self, version: Callable[[], Any], open_value: Callable[[], T]) -> T:
        """The value of the latest version.

        Raises the error of opening the first value. If a later value cannot be opened, the current one stays in use.
        """
        current = self._current
        if current is not None and (self._checked_recently() or self._lock.locked()):
            return current[1]
        with self._lock:
            if self._current is None or not self._checked_recently():
                try:
                    latest = version()
                    if self._current is None or self._current[0] != latest:
                        self._current = latest, open_value()
                except SynpipeError:
                    if self._current is None:
                        raise
                self._checked_at = time.monotonic()
            return self._current[1]

    def _checked_recently(self) -> bool:
        return time.monotonic() - self._checked_at < VERSION_CHECK_S


@dataclass(frozen=True)
class _OpenIndex:
    """An index, the values that its filters offer (by column), its map (None if it has no map), and the tiles it was made from."""

    index: SynapseIndex
    filter_values: Mapping[str, list[str]]
    map: bytes | None
    tiles: "_Latest[_OpenTiles]"


@dataclass(frozen=True)
class _OpenTiles:
    """The tiles of an index. rows: `synapse_id` and `content_hash`, sorted by id. reader: lacks tiles that are gone."""

    reader: TileReader
    rows: pa.Table

    def content_hash(self, synapse_id: int) -> str | None:
        """The content hash of the tile of a synapse, or None if the index has no such synapse."""
        ids = self.rows["synapse_id"].to_numpy()
        row = int(np.searchsorted(ids, synapse_id))
        return self.rows["content_hash"][row].as_py() if row < len(ids) and ids[row] == synapse_id else None


class Explorer:
    """Answers questions about all indexed data sets of a project. Several threads may use it at once."""

    def __init__(self, project: Project):
        self._project = project
        self._lock = threading.Lock()
        self._opened: dict[tuple[str, ...], _Latest[Any]] = {}
        self._random = np.random.default_rng()
        self._embedding = threading.Lock()  # a network uses all cores, so images are embedded one at a time

    def datasets(self) -> list[dict[str, Any]]:
        """The data sets that have an index, each with its indexed encoders in the order of the data set."""
        described = []
        for name in self._project.dataset_names():
            try:
                dataset = self._dataset(name)
            except SynpipeError:  # a data set with a broken YAML file must not hide the others
                continue
            encoders = [encoder for encoder in dataset.encoders if _has_index(dataset, encoder)]
            if encoders:
                described.append(
                    {
                        "name": name,
                        "title": dataset.spec.title,
                        "classes": _classes(dataset),
                        "encoders": encoders,
                        "neuroglancer": find_viewer(dataset) is not None,
                    }
                )
        return described

    def about(self, dataset: str, encoder: str) -> dict[str, Any]:
        """The size and the version of an index, and the choices that the pages offer for it."""
        opened = self._index(dataset, encoder)
        index = opened.index
        return {
            "dataset": dataset,
            "encoder": encoder,
            "rows": index.rows,
            "dimensions": index.dimensions,
            "metrics": list(index.metrics),
            "has_map": opened.map is not None,
            "version": index.version,
            "data_version": index.provenance["data_version"],
            "fingerprint": index.fingerprint,
            "classes": _classes(self._dataset(dataset)),
            "regions": opened.filter_values["region"],
            "hemilineages": opened.filter_values["hemilineage"],
            "upload": True,
        }

    def synapse(self, dataset: str, encoder: str, synapse_id: str) -> dict[str, Any]:
        """What the pages show of one synapse."""
        return _described(self._index(dataset, encoder).index.synapse(_parse_id(synapse_id)))

    def random(self, dataset: str, encoder: str) -> str:
        """The id of a random synapse."""
        return str(self._index(dataset, encoder).index.any_id(self._random))

    def search(self, dataset: str, encoder: str, synapse_id: str, **options: str) -> dict[str, Any]:
        """The most similar synapses of each class.

        options: `metric`, `per_class`, `exclude_neuron`, `region` and `hemilineage`, as text.
        """
        index = self._index(dataset, encoder).index
        query_id, query = _parse_id(synapse_id), _parse_query(options)
        other_neurons = _parse_flag("exclude_neuron", options.get("exclude_neuron", ""))
        neighbours = index.search(query_id, query.metric, query.per_class, query.where, other_neurons)  # type: ignore[arg-type]
        described = _described(index.synapse(query_id))
        return self._about_answer(dataset, encoder, index, query.metric) | {
            "query": described,
            "groups": self._groups(dataset, neighbours),
        }

    def search_tile(self, dataset: str, encoder: str, tile: np.ndarray, **options: str) -> dict[str, Any]:
        """The most similar synapses of each class for a tile from elsewhere, uint8 (3, 256, 256).

        options: as in `search`, without `exclude_neuron`.
        """
        index = self._index(dataset, encoder).index
        query = _parse_query(options)
        with self._embedding:
            network = self._encoder(dataset, encoder, index.fingerprint)
            (vector,) = network.embed(tile[None])
        neighbours = index.search_vector(vector, network.fingerprint, query.metric, query.per_class, query.where)  # type: ignore[arg-type]
        return self._about_answer(dataset, encoder, index, query.metric) | {
            "query": None,
            "groups": self._groups(dataset, neighbours),
        }

    def map(self, dataset: str, encoder: str) -> bytes:
        """The map of an encoder, in the layout of `map_file`."""
        packed = self._index(dataset, encoder).map
        if packed is None:
            raise NotFound(
                f"{encoder} of {dataset} has no map: its `projection` is switched off, or has not been made "
                f"(`synpipe materialize --dataset {dataset}`)."
            )
        return packed

    def tile(self, dataset: str, synapse_id: str, encoder: str | None = None) -> tuple[str, Callable[[], bytes]]:
        """The content hash of the tile from which a row of an index was made, and a function that returns the tile as PNG.

        Sections z−1, z and z+1 are red, green and blue. encoder: None for the first encoder whose index has the synapse.
        """
        opened, wanted = self._dataset(dataset), _parse_id(synapse_id)
        indexed = [name for name in opened.encoders if _has_index(opened, name)]
        for name in indexed if encoder is None else [encoder]:
            index = self._index(dataset, name)
            # The place of a tile changes if it was damaged and cut out again, or if the tiles are made anew.
            tiles = index.tiles.get(
                lambda: find_manifest(opened, "rgb_tiles"), partial(_open_tiles, opened, index.index)
            )
            content_hash = tiles.content_hash(wanted)
            if content_hash is None:
                continue
            if not tiles.reader.has(wanted):
                raise NotFound(explain_gone_tile(opened, wanted))
            return content_hash, partial(tiles.reader.png, wanted)
        raise NotFound(f"There is no tile of synapse {wanted} in {dataset}: the synapse is unknown or was rejected.")

    def _about_answer(self, dataset: str, encoder: str, index: SynapseIndex, metric: str) -> dict[str, Any]:
        """Where an answer comes from."""
        return {
            "dataset": dataset,
            "encoder": encoder,
            "metric": metric,
            "version": index.version,
            "fingerprint": index.fingerprint,
        }

    def _groups(self, dataset: str, neighbours: Mapping[str, list[Neighbour]]) -> list[dict[str, Any]]:
        """The neighbours of each class. Classes without neighbours are included."""
        return [
            {"name": name, "neighbours": list(map(_described, neighbours.get(name, [])))}
            for name in _classes(self._dataset(dataset))
        ]

    def _dataset(self, name: str) -> Dataset:
        if name not in self._project.dataset_names():
            raise NotFound(f"There is no data set {name!r} here.")
        # A data set may get other encoders while the explorer runs, so its YAML file is read again at every check.
        return self._latest(("dataset", name), time.monotonic, lambda: replace(self._project).dataset(name))

    def _index(self, dataset: str, encoder: str) -> _OpenIndex:
        opened = self._dataset(dataset)
        if encoder not in opened.encoders:
            raise NotFound(f"{dataset} has no encoder {encoder!r}; it has {', '.join(opened.encoders)}.")
        if not _has_index(opened, encoder):
            raise NotFound(
                f"{dataset} has no index of {encoder} yet: `synpipe materialize --dataset {dataset} --select index_{encoder}`."
            )
        return self._latest(
            (dataset, encoder),
            lambda: (identify(open_current(opened.lancedb_folder, encoder)), find_viewer(opened), opened.spec.classes),
            lambda: _open_index(opened, encoder),
        )

    def _encoder(self, dataset: str, encoder: str, fingerprint: str) -> Encoder:
        opened = self._dataset(dataset)
        return self._latest((dataset, encoder, "encoder"), lambda: fingerprint, lambda: open_branch(opened, encoder))

    def _latest(self, key: tuple[str, ...], version: Callable[[], Any], open_value: Callable[[], T]) -> T:
        with self._lock:
            latest = self._opened.setdefault(key, _Latest())
        return latest.get(version, open_value)


def _has_index(dataset: Dataset, encoder: str) -> bool:
    return find_manifest(dataset, f"index_{encoder}") is not None


def _classes(dataset: Dataset) -> list[str]:
    return [*dataset.spec.classes, UNLABELLED]


def _open_index(dataset: Dataset, encoder: str) -> _OpenIndex:
    index = open_index(dataset, encoder)
    columns = index.columns(FILTER_COLUMNS)
    filter_values = {name: sorted(columns[name].unique().drop_null().to_pylist()) for name in columns.column_names}
    packed = pack_map(index.columns(["synapse_id", "map_x", "map_y", *MAP_CATEGORIES, *MAP_NUMBERS]))
    return _OpenIndex(index, filter_values, packed, _Latest())


def _open_tiles(dataset: Dataset, index: SynapseIndex) -> _OpenTiles:
    rows = index.contents().sort_by("synapse_id").combine_chunks()
    return _OpenTiles(open_embedded_tiles(dataset, index.provenance, rows), rows)


def _described(synapse: Synapse) -> dict[str, Any]:
    """A synapse or a neighbour under the names that the pages use, with ids as text."""
    fields = dict(vars(synapse))
    neuron_id = fields.pop("neuron_id")
    return {
        "id": str(fields.pop("synapse_id")),
        "neuron": None if neuron_id is None else str(neuron_id),
        "predicted": fields.pop("predicted_neurotransmitter"),
        "probability": fields.pop("predicted_probability"),
        **fields,
    }


@dataclass(frozen=True)
class _Query:
    metric: str
    per_class: int
    where: dict[str, str]


def _parse_query(options: Mapping[str, str]) -> _Query:
    per_class = options.get("per_class", "4")
    number = _whole_number(per_class)
    if number is None or not 1 <= number <= MAX_PER_CLASS:
        raise SynpipeError(f"per_class must be a whole number from 1 to {MAX_PER_CLASS}, not {per_class[:SHOWN]!r}.")
    where = {name: options[name] for name in FILTER_COLUMNS if options.get(name)}
    return _Query(options.get("metric", "cosine"), number, where)


def _parse_id(text: str) -> int:
    number = _whole_number(text)
    if number is None or number >= 2**63:
        raise SynpipeError(f"{text[:SHOWN]!r} is not a synapse id: an id is a whole number below 2^63.")
    return number


def _whole_number(text: str) -> int | None:
    """The number, or None for any other text and for numbers that are too long for every use."""
    digits = text.lstrip("0") or text[:1]  # Python refuses to convert more than 4,300 digits, even zeros
    return int(digits) if text.isascii() and text.isdecimal() and len(digits) <= MAX_DIGITS else None


def _parse_flag(name: str, text: str) -> bool:
    if text not in ("", "0", "1"):
        raise SynpipeError(f"{name} must be 1 or 0, not {text!r}.")
    return text == "1"
