"""What the pages of the explorer ask of a store, as plain values that JSON can hold.

In: a project, and values as they come from an address. Out: dicts, lists and bytes; ids are strings, since JavaScript has no
64-bit integers. Guarantees: the store is only read; a name from outside is compared with names that are there and never
becomes part of a path or of a filter; every answer is of one published version of an index, and while that is replaced, the
former one answers.

Raises `NotFound` for a data set, an encoder or a synapse that is not there, and `SynpipeError` for a bad value.
"""

import json
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from synpipe.annotations.schema import UNLABELLED
from synpipe.assets.compressed import open_branch
from synpipe.assets.manifest import find_manifest
from synpipe.assets.rgb_tiles import open_tiles
from synpipe.assets.volume import find_viewer
from synpipe.datasets import Dataset, Project
from synpipe.embeddings.encoders import Encoder
from synpipe.errors import NotFound, SynpipeError
from synpipe.index.publish import open_current
from synpipe.index.search import Neighbour, Synapse, SynapseIndex
from synpipe.store.files import read_table
from synpipe.tiles.tile import TileReader

FRESH_S = 1.0  # so often a request looks for a newer version
MOST_PER_CLASS = 100
MAP_CATEGORIES = ("neurotransmitter", "predicted_neurotransmitter", "region", "hemilineage", "split", "source")
MAP_NUMBERS = ("predicted_probability", "confidence", "pad_fraction")
MOST_CATEGORIES = 2**16 - 1  # a code of a category is a uint16, of which the largest stands for none
ALIGNMENT = 8  # bytes: what a typed array of int64 needs

T = TypeVar("T")


class _Current(Generic[T]):
    """A value that follows what it is made of: the last one is given while another thread makes the next one."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._made: tuple[Any, T] | None = None
        self._looked = 0.0

    def get(self, version: Callable[[], Any], make: Callable[[], T]) -> T:
        """Raises what making the first one raises; a failure to make a later one leaves the last one in use."""
        made = self._made
        if made is not None and (time.monotonic() - self._looked < FRESH_S or self._lock.locked()):
            return made[1]
        with self._lock:
            if self._made is None or time.monotonic() - self._looked >= FRESH_S:
                try:
                    wanted = version()
                    if self._made is None or self._made[0] != wanted:
                        self._made = wanted, make()
                except SynpipeError:
                    if self._made is None:
                        raise
                self._looked = time.monotonic()
            return self._made[1]


@dataclass(frozen=True)
class _Indexed:
    """An index with what the pages show beside its answers."""

    index: SynapseIndex
    values: Mapping[str, list[str]]
    map: bytes | None


@dataclass(frozen=True)
class _Tiles:
    reader: TileReader
    ids: np.ndarray  # sorted
    hashes: pa.ChunkedArray


class Explorer:
    """Answers of all indexed tables of a project; safe to use from several threads."""

    def __init__(self, project: Project):
        self._project = project
        self._lock = threading.Lock()
        self._kept: dict[tuple[str, ...], _Current[Any]] = {}
        self._random = np.random.default_rng()
        self._embedding = threading.Lock()  # one image at a time: a network takes all cores

    def datasets(self) -> list[dict[str, Any]]:
        """The data sets that have an index, with their encoders in the order of the data set."""
        found = []
        for name in self._project.dataset_names():
            try:
                dataset = self._dataset(name)
            except SynpipeError:  # a broken YAML file is no reason to hide the others
                continue
            encoders = [encoder for encoder in dataset.encoders if find_manifest(dataset, f"index_{encoder}")]
            if encoders:
                told = {"name": name, "title": dataset.spec.title, "classes": _classes(dataset)}
                found.append(told | {"encoders": encoders, "neuroglancer": find_viewer(dataset) is not None})
        return found

    def about(self, dataset: str, encoder: str) -> dict[str, Any]:
        indexed = self._indexed(dataset, encoder)
        index = indexed.index
        return {
            "dataset": dataset,
            "encoder": encoder,
            "rows": index.rows,
            "dimensions": index.dimensions,
            "metrics": list(index.metrics),
            "has_map": indexed.map is not None,
            "version": index.version,
            "fingerprint": index.fingerprint,
            "classes": _classes(self._dataset(dataset)),
            "regions": indexed.values["region"],
            "hemilineages": indexed.values["hemilineage"],
            "upload": True,
        }

    def synapse(self, dataset: str, encoder: str, synapse_id: str) -> dict[str, Any]:
        return _shown(self._indexed(dataset, encoder).index.synapse(_id(synapse_id)))

    def random(self, dataset: str, encoder: str) -> str:
        return str(self._indexed(dataset, encoder).index.any_id(self._random))

    def search(self, dataset: str, encoder: str, synapse_id: str, **options: str) -> dict[str, Any]:
        """The most similar synapses of each class. options: `metric`, `per_class`, `exclude_neuron`, `region`, `hemilineage`,
        each as an address has it."""
        index = self._indexed(dataset, encoder).index
        number, metric, per_class, where = _id(synapse_id), *_options(options)
        own = _flag("exclude_neuron", options.get("exclude_neuron", ""))
        found = index.search(number, metric, per_class, where, other_neurons=own)  # type: ignore[arg-type]
        return self._found(dataset, encoder, index, metric, _shown(index.synapse(number)), found)

    def search_tile(self, dataset: str, encoder: str, tile: np.ndarray, **options: str) -> dict[str, Any]:
        """The same for a tile that is not of the data set, uint8 (3, 256, 256)."""
        index = self._indexed(dataset, encoder).index
        metric, per_class, where = _options(options)
        with self._embedding:
            opened = self._encoder(dataset, encoder, index.fingerprint)
            (vector,) = opened.embed(tile[None])
        found = index.search_vector(vector, opened.fingerprint, metric, per_class, where)  # type: ignore[arg-type]
        return self._found(dataset, encoder, index, metric, None, found)

    def map(self, dataset: str, encoder: str) -> bytes:
        """All places of the map with what they can be coloured by, see `pack_map`."""
        found = self._indexed(dataset, encoder).map
        if found is None:
            raise NotFound(
                f"{encoder} of {dataset} has no map: its `projection` is switched off, or has not been made "
                f"(`synpipe materialize --dataset {dataset}`)."
            )
        return found

    def tile(self, dataset: str, synapse_id: str) -> tuple[str, Callable[[], bytes]]:
        """The content hash of a tile, and a function that gives it as a PNG, sections z−1, z, z+1 as red, green, blue."""
        chosen = self._dataset(dataset)
        tiles: _Tiles = self._current(
            (dataset,), lambda: find_manifest(chosen, "rgb_tiles"), lambda: _open_tiles(chosen)
        )
        number = _id(synapse_id)
        place = int(np.searchsorted(tiles.ids, number))
        if place == len(tiles.ids) or tiles.ids[place] != number:
            raise NotFound(f"There is no tile of synapse {number} in {dataset}: it is unknown, or among the rejects.")
        return tiles.hashes[place].as_py(), lambda: tiles.reader.png(number)

    def _found(
        self,
        dataset: str,
        encoder: str,
        index: SynapseIndex,
        metric: str,
        query: dict[str, Any] | None,
        found: dict[str, list[Neighbour]],
    ) -> dict[str, Any]:
        groups = {name: list(map(_shown, found.get(name, []))) for name in _classes(self._dataset(dataset))}
        return {
            "dataset": dataset,
            "encoder": encoder,
            "metric": metric,
            "version": index.version,
            "fingerprint": index.fingerprint,
            "query": query,
            "groups": [{"name": name, "neighbours": neighbours} for name, neighbours in groups.items()],
        }

    def _dataset(self, name: str) -> Dataset:
        if name not in self._project.dataset_names():
            raise NotFound(f"There is no data set {name!r} here.")
        # Read again each time it may have changed: a data set gets encoders while the explorer runs.
        return self._current(("dataset", name), time.monotonic, lambda: replace(self._project).dataset(name))

    def _indexed(self, dataset: str, encoder: str) -> _Indexed:
        chosen = self._dataset(dataset)
        if encoder not in chosen.encoders:
            raise NotFound(f"{dataset} has no encoder {encoder!r}; it has {', '.join(chosen.encoders)}.")
        if not find_manifest(chosen, f"index_{encoder}"):
            raise NotFound(
                f"{dataset} has no index of {encoder} yet: `synpipe materialize --dataset {dataset} --select index_{encoder}`."
            )
        return self._current(
            (dataset, encoder),
            lambda: (open_current(chosen.lancedb_folder, encoder).version, find_viewer(chosen), chosen.spec.classes),
            lambda: _open_index(chosen, encoder),
        )

    def _encoder(self, dataset: str, encoder: str, fingerprint: str) -> Encoder:
        chosen = self._dataset(dataset)
        return self._current((dataset, encoder, "encoder"), lambda: fingerprint, lambda: open_branch(chosen, encoder))

    def _current(self, key: tuple[str, ...], version: Callable[[], Any], make: Callable[[], T]) -> T:
        with self._lock:
            kept = self._kept.setdefault(key, _Current())
        return kept.get(version, make)


def _classes(dataset: Dataset) -> list[str]:
    return [*dataset.spec.classes, UNLABELLED]


def _open_index(dataset: Dataset, encoder: str) -> _Indexed:
    index = SynapseIndex(dataset, encoder, viewer=find_viewer(dataset))
    shown = index.columns(["region", "hemilineage"])
    values = {name: sorted(shown[name].unique().drop_null().to_pylist()) for name in shown.column_names}
    return _Indexed(
        index, values, pack_map(index.columns(["synapse_id", "map_x", "map_y", *MAP_CATEGORIES, *MAP_NUMBERS]))
    )


def _open_tiles(dataset: Dataset) -> _Tiles:
    table = read_table(dataset.tiles_path, ["synapse_id", "content_hash"]).sort_by("synapse_id")
    return _Tiles(open_tiles(dataset), table["synapse_id"].to_numpy(), table["content_hash"])


def pack_map(table: pa.Table) -> bytes | None:
    """A map as typed arrays that a browser uses as they are: None where no synapse has a place.

    uint32 little-endian, the length of a JSON header; the header, padded so that what follows begins at a multiple of 8 bytes:
    `rows`, and for each of `columns` its `name`, `kind` (id, x, y, category, number), `dtype`, `offset` from the end of the
    header and `length` in bytes, `names` of categories; then the arrays, little-endian. A category is the number of its name,
    65535 for none; a number is NaN for none.
    """
    table = table.filter(pc.is_valid(table["map_x"]))
    if not len(table):
        return None
    columns: list[dict[str, Any]] = []
    arrays: list[bytes] = []

    def add(name: str, kind: str, values: np.ndarray, **more: Any) -> None:
        content = values.astype(values.dtype.newbyteorder("<")).tobytes()
        offset = sum(map(len, arrays))
        columns.append(
            {"name": name, "kind": kind, "dtype": values.dtype.name, "offset": offset, "length": len(content), **more}
        )
        arrays.append(content + bytes(-len(content) % ALIGNMENT))

    add("synapse_id", "id", table["synapse_id"].to_numpy())
    for axis in "xy":
        add(f"map_{axis}", axis, table[f"map_{axis}"].to_numpy())
    for name in MAP_CATEGORIES:
        coded = table[name].combine_chunks().dictionary_encode()
        if 0 < len(coded.dictionary) <= MOST_CATEGORIES:
            codes = pc.fill_null(coded.indices, MOST_CATEGORIES).to_numpy().astype(np.uint16)
            add(name, "category", codes, names=coded.dictionary.to_pylist())
    for name in MAP_NUMBERS:
        if table[name].null_count < len(table):
            add(name, "number", table[name].to_numpy().astype(np.float32))
    header = json.dumps({"rows": len(table), "columns": columns}).encode()
    header += b" " * (-(4 + len(header)) % ALIGNMENT)
    return len(header).to_bytes(4, "little") + header + b"".join(arrays)


def _shown(synapse: Synapse) -> dict[str, Any]:
    told = dict(vars(synapse))
    neuron = told.pop("neuron_id")
    return {
        "id": str(told.pop("synapse_id")),
        "neuron": None if neuron is None else str(neuron),
        "predicted": told.pop("predicted_neurotransmitter"),
        "probability": told.pop("predicted_probability"),
        **told,
    }


def _id(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and int(text) < 2**63):
        raise SynpipeError(f"{text!r} is no id of a synapse: that is a whole number below 2^63.")
    return int(text)


def _flag(name: str, text: str) -> bool:
    if text not in ("", "0", "1"):
        raise SynpipeError(f"{name} must be 1 or 0, not {text!r}.")
    return text == "1"


def _options(options: Mapping[str, str]) -> tuple[str, int, dict[str, str]]:
    """metric, number per class, wanted values by column."""
    per_class = options.get("per_class", "4")
    if not (per_class.isascii() and per_class.isdecimal() and 1 <= int(per_class) <= MOST_PER_CLASS):
        raise SynpipeError(f"per_class must be a whole number from 1 to {MOST_PER_CLASS}, not {per_class!r}.")
    where = {name: options[name] for name in ("region", "hemilineage") if options.get(name)}
    return options.get("metric", "cosine"), int(per_class), where
