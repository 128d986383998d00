"""Export the synapses as a Neuroglancer layer: points that are coloured by transmitter and listed by neuron.

The export is a folder in Neuroglancer's precomputed annotation format. Any web server can serve it. Every synapse is in each
index once, with its exact id. The folder is complete or absent. The same synapses give the same bytes.

The format: https://github.com/google/neuroglancer/blob/master/src/datasource/precomputed/annotations.md. NumPy lays out the
records, and tensorstore writes the sharded files. Tests read them with Neuroglancer's own reader and client. Two existing
writers did not fit: the one of `neuroglancer` makes a file per synapse and a single cell for all of space, and
`ngsidekick` 0.0.20 fails with DuckDB 2 and for synapses without a neuron.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from synpipe import __version__
from synpipe.addresses import find_credentials
from synpipe.analysis.charts import PALETTE
from synpipe.annotations.schema import UNLABELLED
from synpipe.assets import volume
from synpipe.assets.manifest import read_manifest
from synpipe.assets.volume import find_viewer
from synpipe.datasets import Dataset
from synpipe.errors import SynpipeError, one_line
from synpipe.store.files import atomic_folder, read_table
from synpipe.volumes.neuroglancer import Viewer
from synpipe.volumes.volume import REMOTE_SCHEMES

TYPE = "neuroglancer_annotations_v1"
# A level of the spatial index has at most this many synapses per cell. Neuroglancer fetches a cell, 150 kB, at a time.
CELL_SYNAPSES = 5_000
# The last level takes all remaining synapses. 2²⁰ cells along an axis resolve a micrometre in a metre.
LEVELS = 20
KEYS_PER_MINISHARD = 512  # an index of 12 kB, fetched on a click
MINISHARDS_PER_SHARD_BITS = 12
SEED = 0  # the format requires a random order within a cell; a fixed seed makes it reproducible

UNKNOWN = "unknown"
# Okabe and Ito's colours, which people with colour blindness can tell apart (https://jfly.uni-koeln.de/color/).
COLOURS = (*PALETTE[:-1], "#f0e442")  # as on the map, but without black, which is invisible on EM
GREY = "#999999"  # unlabelled


def export(dataset: Dataset, folder: Path, address: str | None = None) -> tuple[int, str | None]:
    """Write the synapses of a data set as a layer. Returns their number, and a link if the address of the folder is given.

    Raises `SynpipeError` as `write_layer` does, if the synapses have not been made, and for an address that no browser reads.
    """
    found = find_credentials(address or "")
    if found:
        raise SynpipeError(
            f"The address of the layer holds {found}, which everyone with the link would see: remove it."
        )
    if address is not None and not address.startswith(tuple(f"{scheme}://" for scheme in REMOTE_SCHEMES)):
        raise SynpipeError(
            f"{address} is not the address of a layer: it must start with {'://, '.join(REMOTE_SCHEMES)}://."
        )
    manifest = read_manifest(dataset, "synapses")
    synapses = read_table(dataset.synapses_path)
    provenance = {"dataset": dataset.name, "data_version": manifest.data_version, "synpipe_version": __version__}
    write_layer(folder, synapses, dataset.spec.classes, provenance, dataset.spec.title)
    if address is None:
        return len(synapses), None
    viewer = find_viewer(dataset)
    if viewer is None:  # the volume is in local files, so the link shows the synapses only
        viewer = Viewer(dataset.spec.neuroglancer, None, volume.ASSET.read(dataset).voxel_size_nm_zyx)
    first = synapses.slice(0, 1).to_pylist()[0]
    layer = annotation_layer(address.rstrip("/"), dataset.spec.classes)
    return len(synapses), viewer.link([first[f"{axis}_nm"] for axis in "zyx"], str(first["synapse_id"]), [layer])


def write_layer(
    folder: Path, synapses: pa.Table, classes: Sequence[str], provenance: Mapping[str, Any], title: str
) -> None:
    """Write synapses (`SYNAPSE_SCHEMA`) as a layer; an earlier export in the folder is replaced.

    Positions are in nm, in float32: exact to 0.06 nm within a millimetre. `neurotransmitter` is an enum of the classes and
    `unlabelled`. `region`, `hemilineage` and `source` are enums and `confidence` is a float, if any synapse has one.
    `neuron_id` is a relationship.
    Raises `SynpipeError` if there is no synapse, or if the folder holds something other than an export.
    """
    if not len(synapses):
        raise SynpipeError("There is no synapse to export. Look at the rejects.")
    if folder.exists() and (not folder.is_dir() or (any(folder.iterdir()) and not _is_layer(folder))):
        raise SynpipeError(f"{folder} holds something other than an earlier export: name another folder.")
    # One random order makes each cell and each level a random sample in a random order.
    synapses = synapses.take(np.random.default_rng(SEED).permutation(len(synapses)))
    properties = _properties(synapses, classes)
    records = _Records.of(synapses, properties)
    low = np.floor(records.positions.min(axis=0))
    high = (
        np.floor(records.positions.max(axis=0)) + 1
    )  # the bound lies outside of all positions, so no side has length zero
    with atomic_folder(folder) as temporary:
        info = {
            "@type": TYPE,
            "description": title,
            "dimensions": {axis: [1e-9, "m"] for axis in "xyz"},
            "lower_bound": low.tolist(),
            "upper_bound": high.tolist(),
            "annotation_type": "POINT",
            "properties": [each.described for each in properties],
            "by_id": _write(temporary, "by_id", len(synapses), records.singles(), "raw"),
            "relationships": [{"id": "neuron_id", **_write_neurons(temporary, records)}],
            "spatial": list(_write_levels(temporary, records, low, high)),
            "synpipe": dict(provenance),
        }
        (temporary / "info").write_text(json.dumps(info))


def annotation_layer(address: str, classes: Sequence[str]) -> dict[str, Any]:
    """The layer as Neuroglancer's state has it, JSON-able. address: where the folder is served."""
    rgb = [
        ", ".join(f"{int(colour[i : i + 2], 16) / 255:.3f}" for i in (1, 3, 5))
        for colour in (*(COLOURS[number % len(COLOURS)] for number in range(len(classes))), GREY)
    ]
    palette = ", ".join(f"vec3({one})" for one in rgb)
    shader = f"""#uicontrol float size slider(min=1, max=20, default=7)
void main() {{
  vec3 colours[{len(rgb)}] = vec3[{len(rgb)}]({palette});  // {", ".join((*classes, UNLABELLED))}
  setColor(colours[prop_neurotransmitter()]);
  setPointMarkerSize(size);
}}
"""
    return {"type": "annotation", "name": "synapses", "source": f"precomputed://{address}", "shader": shader}


def _is_layer(folder: Path) -> bool:
    """Whether synpipe exported this folder."""
    try:
        info = json.loads((folder / "info").read_text())
    except (OSError, ValueError):
        return False
    return isinstance(info, dict) and info.get("@type") == TYPE and "synpipe" in info


@dataclass(frozen=True)
class _Property:
    """A property as the format describes it, and its values."""

    described: dict[str, Any]
    values: np.ndarray


def _properties(synapses: pa.Table, classes: Sequence[str]) -> list[_Property]:
    """The properties that a synapse has, the widest first, as the format requires."""
    found = [_enum("neurotransmitter", synapses, [*classes, UNLABELLED])]
    for name in ("region", "hemilineage", "source"):
        labels = sorted(label for label in pc.unique(synapses[name]).to_pylist() if label is not None)
        if labels:
            found.append(_enum(name, synapses, [*labels, UNKNOWN]))
    confidence = synapses["confidence"]
    if confidence.null_count < len(confidence):
        values = confidence.to_numpy(zero_copy_only=False).astype("<f4")  # NaN: the source gives none
        found.append(_Property({"id": "confidence", "type": "float32"}, values))
    return sorted(found, key=lambda each: -each.values.dtype.itemsize)


def _enum(name: str, synapses: pa.Table, labels: list[str]) -> _Property:
    """An enum. labels: all values, and last the label for null."""
    dtype = np.min_scalar_type(len(labels) - 1)
    known = pc.index_in(synapses[name], pa.array(labels[:-1], pa.string()))
    values = pc.fill_null(known, len(labels) - 1).to_numpy().astype(dtype.newbyteorder("<"))
    enum = {"enum_values": list(range(len(labels))), "enum_labels": labels}
    return _Property({"id": name, "type": dtype.name, **enum}, values)


@dataclass(frozen=True)
class _Records:
    """The synapses as records of the format.

    ids: uint64 (n,). positions: float64 (n, 3), x y z, as a reader of the records sees them. records: structured (n,).
    neurons: uint64 (n,), valid where has_neuron, bool (n,), is true.
    """

    ids: np.ndarray
    positions: np.ndarray
    records: np.ndarray
    neurons: np.ndarray
    has_neuron: np.ndarray

    @classmethod
    def of(cls, synapses: pa.Table, properties: Sequence[_Property]) -> "_Records":
        fields = [("position", "<f4", 3), *((each.described["id"], each.values.dtype) for each in properties)]
        padding = -np.dtype(fields).itemsize % 4
        records = np.zeros(len(synapses), [*fields, ("padding", "u1", padding)])
        records["position"] = np.stack([synapses[f"{axis}_nm"].to_numpy() for axis in "xyz"], axis=1)
        for each in properties:
            records[each.described["id"]] = each.values
        neurons = synapses["neuron_id"]
        return cls(
            synapses["synapse_id"].to_numpy().astype("<u8"),
            records["position"].astype(np.float64),
            records,
            pc.fill_null(neurons, 0).to_numpy().astype("<u8"),
            pc.is_valid(neurons).to_numpy(zero_copy_only=False),
        )

    def singles(self) -> Iterator[tuple[int, bytes]]:
        """Each synapse with its neurons, by its id."""
        for number, synapse_id in enumerate(self.ids.tolist()):
            related = self.neurons[number : number + self.has_neuron[number]]
            yield synapse_id, self.records[number].tobytes() + np.uint32(len(related)).tobytes() + related.tobytes()

    def lists(self, rows: np.ndarray, keys: np.ndarray) -> Iterator[tuple[int, bytes]]:
        """Lists of the synapses in these rows by key (uint64, one per row), in the order of the rows."""
        if not len(rows):
            return
        order = np.argsort(keys, kind="stable")
        rows, keys = rows[order], keys[order]
        starts = np.flatnonzero(np.diff(keys, prepend=~keys[:1]))
        for key, start, stop in zip(keys[starts].tolist(), starts, [*starts[1:], len(rows)], strict=True):
            group = rows[start:stop]
            count = np.uint64(len(group))
            yield key, count.tobytes() + self.records[group].tobytes() + self.ids[group].tobytes()


def _write_neurons(folder: Path, records: _Records) -> dict[str, Any]:
    rows = np.flatnonzero(records.has_neuron)
    neurons = records.neurons[rows]
    return _write(folder, "neuron_id", len(np.unique(neurons)), records.lists(rows, neurons), "gzip")


def _write_levels(folder: Path, records: _Records, low: np.ndarray, high: np.ndarray) -> Iterator[dict[str, Any]]:
    """Write levels of the spatial index, from one cell for all of space to ever finer ones, until no synapse is left.

    Each takes from all of its cells the same share of what is left, as large as the fullest allows.
    """
    left = np.arange(len(records.ids))
    size, grid = high - low, np.ones(3, dtype=np.int64)
    for level in range(LEVELS):
        cells = np.minimum((records.positions[left] - low) // size, grid - 1).astype(np.uint64)
        codes = _morton_codes(cells, grid)
        _, cell, counts = np.unique(codes, return_inverse=True, return_counts=True)
        order = np.argsort(cell, kind="stable")
        rank = np.empty(len(left), dtype=np.int64)
        rank[order] = np.arange(len(left)) - np.repeat(np.cumsum(counts) - counts, counts)
        fullest = int(counts.max())
        limit = fullest if level == LEVELS - 1 else min(CELL_SYNAPSES, fullest)
        taken = rank < -(-counts[cell] * limit // fullest)
        name = f"spatial{level}"
        lists = records.lists(left[taken], codes[taken])
        shape = {"grid_shape": grid.tolist(), "chunk_size": size.tolist(), "limit": limit}
        yield _write(folder, name, len(counts), lists, "gzip") | shape
        left = left[~taken]
        if not len(left):
            return
        # Halve the axes that bring a cell nearer to a cube.
        halved = size > size.max() / math.sqrt(2)
        size, grid = np.where(halved, size / 2, size), np.where(halved, grid * 2, grid)


def _morton_codes(cells: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """Compressed Morton codes of cells, uint64 (n, 3) to (n,): bits of x, y, z in turn, as many of each axis as it needs.

    https://github.com/google/neuroglancer/blob/master/src/datasource/precomputed/volume.md#compressed-morton-code
    """
    codes, place = np.zeros(len(cells), dtype=np.uint64), 0
    for bit in range(LEVELS):
        for axis in range(3):
            if (int(grid[axis]) - 1) >> bit:
                codes |= ((cells[:, axis] >> np.uint64(bit)) & np.uint64(1)) << np.uint64(place)
                place += 1
    return codes


def _write(folder: Path, name: str, keys: int, values: Iterator[tuple[int, bytes]], encoding: str) -> dict[str, Any]:
    """Write values by key into a sharded index; returns its description. keys: their number. encoding: raw or gzip."""
    import tensorstore as ts

    bits = max(0, math.ceil(math.log2(max(1, keys) / KEYS_PER_MINISHARD)))
    sharding = {
        "@type": "neuroglancer_uint64_sharded_v1",
        "preshift_bits": 0,
        "hash": "murmurhash3_x86_128",  # ids come in runs, which an identity hash would put into few shards
        "minishard_bits": min(bits, MINISHARDS_PER_SHARD_BITS),
        "shard_bits": max(0, bits - MINISHARDS_PER_SHARD_BITS),
        "minishard_index_encoding": "gzip",
        "data_encoding": encoding,
    }
    base = {"driver": "file", "path": f"{folder / name}/"}
    store = ts.KvStore.open({"driver": "neuroglancer_uint64_sharded", "metadata": sharding, "base": base}).result()
    try:
        with ts.Transaction() as transaction:  # so that each shard is written once, when all of its keys are known
            view = store.with_transaction(transaction)
            for key, value in values:
                view[key.to_bytes(8, "big")] = value
    except ValueError as error:  # tensorstore raises it for every failure
        raise SynpipeError(f"Cannot write {folder / name} ({one_line(error)}). Check the free space.") from None
    return {"key": name, "sharding": sharding}
