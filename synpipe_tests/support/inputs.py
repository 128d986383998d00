"""Inputs that tests change, and the expected outputs, computed here from only the voxels and the rows."""

import csv
import hashlib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import h5py
import lancedb
import numpy as np
import pyarrow as pa
import yaml

from synpipe.assets.graph import nodes
from synpipe.assets.manifest import read_manifest
from synpipe.datasets import Dataset, Project
from synpipe.index.build import BITMAP_COLUMNS, BTREE_COLUMNS
from synpipe.index.publish import CURRENT
from synpipe.store.files import read_table

SHAPE = (6, 512, 512)
VOXEL_NM = (40, 4, 4)
VOXELS = np.random.default_rng(0).integers(1, 256, SHAPE, dtype=np.uint8)
COLUMNS = ["synapse_id", "z_nm", "y_nm", "x_nm", "neurotransmitter"]
DATASET = {
    "title": "A small volume of noise",
    "volume": {"path": "volume.h5"},
    "annotations": [{"format": "table", "path": "synapses.csv", "columns": {"x": "x_nm", "y": "y_nm", "z": "z_nm"}}],
    "tiles": {"shards": 3, "block_voxels_zyx": [2, 128, 128]},
    "max_reject_share": 1,  # bad rows are intended
    # Learning from the vectors takes longer than everything else, and these data sets are made a hundred times.
    "classifier": None,
    "projection": None,
    "evaluation": None,
}
# timm's smallest networks, which exist for tests. A forward pass takes a millisecond.
ENCODER = {"weights": "random", "crop_px": 64, "precision": "fp32"}

Place = tuple[int, int, int]  # voxel (z, y, x)


@dataclass(frozen=True)
class Inputs:
    """The inputs of a data set. synapses: place and label by id. encoders: model and seed by name."""

    synapses: dict[int, tuple[Place, str]]
    encoders: dict[str, tuple[str, int]] = field(default_factory=lambda: {"tiny": ("test_resnet", 0)})

    def write(self, data: Path) -> None:
        """Write the files of the data folder. The volume is written only once."""
        folder = data / "datasets"
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "volume.h5").exists():
            with h5py.File(folder / "volume.h5", "w") as file:
                file.create_dataset("volumes/raw", data=VOXELS)
                file["volumes/raw"].attrs["resolution"] = VOXEL_NM
        with (folder / "synapses.csv").open("w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(COLUMNS)
            rows.writerows([synapse_id, *nm(place), label] for synapse_id, (place, label) in self.synapses.items())
        registry = {name: ENCODER | {"model": model, "seed": seed} for name, (model, seed) in self.encoders.items()}
        (data / "encoders.yaml").write_text(yaml.safe_dump({"encoders": registry}))
        (folder / "demo.yaml").write_text(yaml.safe_dump({**DATASET, "encoders": list(self.encoders)}))

    def rows(self) -> dict[int, tuple[Any, ...]]:
        """Return the expected position, label and content hash of the tile for each synapse."""
        return {
            synapse_id: (*nm(place), label, content_hash(place)) for synapse_id, (place, label) in self.synapses.items()
        }

    def with_synapses(self, changes: dict[int, tuple[Place, str] | None]) -> "Inputs":
        """Return the same inputs with synapses added or replaced, or removed where the value is None."""
        return replace(self, synapses={key: value for key, value in (self.synapses | changes).items() if value})


def nm(place: Place) -> tuple[float, float, float]:
    """Return the position in nm whose window is centred on this voxel; see `Volume.window_starts`."""
    z, y, x = place
    return (z + 0.5) * VOXEL_NM[0], float(y * VOXEL_NM[1]), float(x * VOXEL_NM[2])


def content_hash(place: Place) -> str:
    """Return the hash of the tile around a voxel: the sections before, at and after it. A missing one is replaced by the middle."""
    z, y, x = place
    tile = np.empty((3, 256, 256), np.uint8)
    for channel, section in enumerate((z - 1, z, z + 1)):
        seen = VOXELS[section if 0 <= section < SHAPE[0] else z, max(0, y - 128) : y + 128, max(0, x - 128) : x + 128]
        tile[channel] = round(float(seen.mean()))
        top, left = max(0, 128 - y), max(0, 128 - x)
        tile[channel, top : top + seen.shape[0], left : left + seen.shape[1]] = seen
    return hashlib.sha256(tile.tobytes()).hexdigest()[:32]


@dataclass
class Store:
    """The content of a store: data versions by asset, and by encoder the rows and their vectors in the order of ids."""

    versions: dict[str, str]
    rows: dict[str, dict[int, tuple[Any, ...]]]
    vectors: dict[str, np.ndarray]

    @classmethod
    def read(cls, project: Project) -> "Store":
        """Read the published index of every encoder, and assert that it agrees with the Parquet table."""
        dataset = project.dataset("demo")
        found = cls({node.name: read_manifest(dataset, node.name).data_version for node in nodes(dataset)}, {}, {})
        for encoder in dataset.encoders:
            index, file = published(dataset, encoder), read_table(dataset.table_path(encoder))
            found.rows[encoder], found.vectors[encoder] = _rows(index), _vectors(index)
            assert _rows(file) == found.rows[encoder]
            np.testing.assert_allclose(_vectors(file), found.vectors[encoder], atol=0.01)  # rounded, see `table`
        return found

    def assert_same(self, other: "Store") -> None:
        assert self.versions == other.versions
        assert self.rows == other.rows
        assert self.vectors.keys() == other.vectors.keys()
        for encoder, vectors in self.vectors.items():
            # Another batch size changes the last bits, and with them the rounding; see `embed` and `table`.
            np.testing.assert_allclose(vectors, other.vectors[encoder], atol=2e-3)


def published(dataset: Dataset, encoder: str) -> pa.Table:
    """Return the rows of the published index, and assert that its LanceDB indexes are complete."""
    table = lancedb.connect(dataset.lancedb_folder).open_table(encoder)
    table.checkout(CURRENT)
    indexes = table.list_indices()
    assert {index.columns[0] for index in indexes} - {"vector"} == {*BITMAP_COLUMNS, *BTREE_COLUMNS}
    assert not any(index.num_unindexed_rows for index in indexes)
    return table.to_arrow()


def _rows(table: pa.Table) -> dict[int, tuple[Any, ...]]:
    columns = ["z_nm", "y_nm", "x_nm", "neurotransmitter", "content_hash"]
    found = {row["synapse_id"]: tuple(row[name] for name in columns) for row in table.to_pylist()}
    assert len(found) == len(table)
    return found


def _vectors(table: pa.Table) -> np.ndarray:
    vectors = table.sort_by("synapse_id")["vector"].combine_chunks()
    return vectors.flatten().to_numpy().reshape(len(table), -1)
