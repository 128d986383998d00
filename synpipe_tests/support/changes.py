"""A data set whose files can be edited, materialised through Dagster in this process.

The tests of versions ask it what is out of date, what ran (from Dagster's event log), how much work that was (from the
manifests), and whether the store equals one that is made from the same inputs from scratch.
"""

import csv
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import dagster as dg
import numpy as np
import pyarrow as pa
import pytest
import yaml
from dagster._core.definitions.data_version import CachingStaleStatusResolver
from dagster._core.loader import LoadingContextForTest

from synpipe.assets.asset import Made, Task
from synpipe.assets.graph import Node, nodes, states
from synpipe.assets.manifest import read_manifest
from synpipe.cluster.workers import shard_name
from synpipe.datasets import Dataset, Project
from synpipe.defs.definitions import build_definitions
from synpipe.defs.run import materialize, prepare_home
from synpipe.embeddings.cache import EmbeddingCache
from synpipe.index.publish import open_current
from synpipe.store.files import read_table
from synpipe.synthetic.demo import SyntheticSpec, make_demo
from synpipe_tests.conftest import QUICK_EVALUATION
from synpipe_tests.support.outdated import make_outdated

NAME = "mine"
SPEC = {
    "title": "Files that can be edited",
    "volume": {"path": "volume.h5"},
    "annotations": [{"format": "table", "path": "synapses.csv", "columns": {"x": "x_nm", "y": "y_nm", "z": "z_nm"}}],
    "tiles": {"shards": 3, "block_voxels_zyx": [32, 128, 128]},
    "encoders": ["tiny", "other"],
    "projection": None,
    "max_reject_share": 1,  # bad rows are intended
    "classifier": None,  # `test_classifier` tests it
    "evaluation": QUICK_EVALUATION,
}
# Small networks with different architectures and dimensions. A vector of the first one is the same to the last bit in
# batches of any size. Compressed encoders need that: the version of their fit depends on every bit of the vectors.
ENCODERS = {
    "tiny": {"model": "resnet10t", "weights": "random", "seed": 0, "crop_px": 64, "precision": "fp32"},
    "other": {"model": "test_vit", "weights": "random", "seed": 0, "crop_px": 64, "precision": "fp32"},
}
VOLUME = SyntheticSpec(seed=1, shape_zyx=(10, 640, 640), n_synapses=40, n_neurons=12, n_missing_sections=1)

TRUNK = {"volume", "annotations", "synapses", "synapse_stacks", "rgb_tiles", "rejects", "split"}


def name_of(key: dg.AssetKey) -> str:
    """The name that an asset with this key has in manifests and on the command line."""
    return "_".join(reversed(key.path[1:]))


def branch(*encoders: str) -> set[str]:
    return {
        f"{kind}_{encoder}" for encoder in encoders for kind in ("embeddings", "embedding_table", "index", "scores")
    } | {"evaluation"}


@dataclass(frozen=True)
class Ran:
    """What one run did. assets: those that were made. cut_outs, embedded: number of tiles cut out, and embedded by encoder."""

    assets: set[str]
    cut_outs: int
    embedded: dict[str, int]


@dataclass(frozen=True)
class Own:
    """A project in a folder that belongs to one test."""

    folder: Path

    @property
    def project(self) -> Project:
        """A new object each time, because a project reads the registry only once."""
        return Project(self.folder / "data", self.folder / "store")

    @property
    def dataset(self) -> Dataset:
        return self.project.dataset(NAME)

    @property
    def csv(self) -> Path:
        return self.folder / "data" / "datasets" / "synapses.csv"

    @property
    def volume(self) -> Path:
        return self.folder / "data" / "datasets" / "volume.h5"

    def edit_encoders(self, change: Callable[[dict[str, Any]], object]) -> None:
        """Change the entries of the registry in place."""
        _edit(self.folder / "data" / "encoders.yaml", lambda content: change(content["encoders"]))

    def edit_dataset(self, change: Callable[[dict[str, Any]], object]) -> None:
        _edit(self.folder / "data" / "datasets" / f"{NAME}.yaml", change)

    def edit_synapses(self, change: Callable[[list[dict[str, str]]], object]) -> None:
        """Change the rows of the CSV in place."""
        with self.csv.open(newline="") as handle:
            rows = list(csv.DictReader(handle))
        names = list(rows[0])
        change(rows)
        with self.csv.open("w", newline="") as handle:
            writer = csv.DictWriter(handle, names, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)

    def outdated(self) -> dict[str, str]:
        """Return the state of every asset that is not fresh."""
        return {state.asset: state.state for state in states(self.dataset) if state.state != "fresh"}

    def materialise(self, *selection: str) -> Ran:
        """Materialise everything, or a selection, as a run of the project's Dagster instance."""
        with self.instance() as instance:
            before = {run.run_id for run in instance.get_runs()}
        materialize(self.project, NAME, selection)
        with self.instance() as instance:
            runs = [run.run_id for run in instance.get_runs() if run.run_id not in before]
            events = [
                entry.asset_materialization
                for run_id in runs
                for entry in instance.all_logs(run_id, of_type=dg.DagsterEventType.ASSET_MATERIALIZATION)
            ]
        assets = {name_of(event.asset_key) for event in events if event is not None}
        counts = {asset: read_manifest(self.dataset, asset).figures for asset in assets}
        return Ran(
            assets,
            counts["synapse_stacks"]["cut_outs_made"] if "synapse_stacks" in counts else 0,
            {
                asset.removeprefix("embeddings_"): count["tiles_embedded"]
                for asset, count in counts.items()
                if asset.startswith("embeddings_")
            },
        )

    def materialise_stale(self) -> Ran:
        """Do what `synpipe materialize --stale` does."""
        return self.materialise(*self.outdated())

    def unsynced(self) -> set[str]:
        """Return the assets that Dagster's UI shows as unsynced or never materialised."""
        graph = build_definitions(self.project, [NAME]).resolve_asset_graph()
        with self.instance() as instance:
            resolver = CachingStaleStatusResolver(instance, graph, LoadingContextForTest(instance))
            found = {name_of(key): resolver.get_status(key) for key in graph.materializable_asset_keys}
        return {asset for asset, status in found.items() if status.value != "FRESH"}

    def instance(self) -> dg.DagsterInstance:
        prepare_home(self.project)
        return dg.DagsterInstance.get()

    def versions(self) -> dict[str, str]:
        return {node.name: read_manifest(self.dataset, node.name).data_version for node in nodes(self.dataset)}

    def branch_files(self, encoder: str) -> dict[str, bytes]:
        """Return the content of an encoder's manifests and table, by file name."""
        paths = [self.dataset.manifest_path(asset) for asset in branch(encoder)]
        return {path.name: path.read_bytes() for path in [*paths, self.dataset.table_path(encoder)]}

    def is_as_from_scratch(self) -> None:
        """Assert that the store equals one made from the same inputs from scratch, down to the data versions."""
        scratch = Project(self.folder / "data", self.folder / "scratch").dataset(NAME)
        shutil.rmtree(scratch.folder, ignore_errors=True)
        make_outdated(scratch)
        same_store(self.dataset, scratch)


class Killed(BaseException):
    """Simulates the end of the process."""


def killed_at_the_end(node: Node) -> Node:
    """Return the step, changed so that its process ends after writing its files and before writing its manifest."""

    def make(task: Task) -> Made[Any]:
        node.asset.make(task)
        raise Killed

    return replace(node, asset=replace(node.asset, make=make))


def same_store(here: Dataset, there: Dataset) -> None:
    """Assert that data versions, rows, vectors and rejects are equal. The files that hold the tiles may differ."""
    for node in nodes(here):
        versions = [read_manifest(dataset, node.name).data_version for dataset in (here, there)]
        assert versions[0] == versions[1], node.name
    for name in ("synapses_path", "rejects_path"):
        assert _plain(read_table(getattr(here, name))) == _plain(read_table(getattr(there, name))), name
    tiles = [read_table(dataset.tiles_path).drop_columns(["file", "row"]) for dataset in (here, there)]
    assert _plain(tiles[0]) == _plain(tiles[1])
    for encoder in here.encoders:
        expected = _embedded(there, encoder)
        np.testing.assert_allclose(_embedded(here, encoder), expected, atol=1e-6)
        for found, wanted in (
            (read_table(here.table_path(encoder)), read_table(there.table_path(encoder))),
            tuple(open_current(dataset.lancedb_folder, encoder).to_arrow() for dataset in (here, there)),
        ):
            assert len(found) > 0
            assert _plain(found.drop_columns(["vector", "norm"])) == _plain(wanted.drop_columns(["vector", "norm"]))
            # Stored vectors are rounded, so a difference in the last bit can become one rounding step, 1/500 of a component.
            stored = np.array(found.sort_by("synapse_id")["vector"].to_pylist())
            np.testing.assert_allclose(stored, expected, atol=expected.shape[1] ** -0.5 / 250)


def make(folder: Path) -> Own:
    """Write the project to `folder` and materialise everything."""
    own = Own(folder)
    datasets = folder / "data" / "datasets"
    make_demo(datasets, VOLUME)
    (datasets / f"{NAME}.yaml").write_text(yaml.safe_dump(SPEC))
    (folder / "data" / "encoders.yaml").write_text(yaml.safe_dump({"encoders": ENCODERS}))
    with pytest.MonkeyPatch.context() as patch:
        at_home(patch)
        own.materialise()
    return own


def copy(made: Own, folder: Path, patch: pytest.MonkeyPatch | None = None) -> Own:
    """Copy the project, with its Dagster history, to `folder`. Tests that use Dagster pass their monkeypatch as `patch`."""
    if patch is not None:
        at_home(patch)
    shutil.copytree(made.folder, folder, dirs_exist_ok=True)
    return Own(folder)


def at_home(patch: pytest.MonkeyPatch) -> None:
    """Undo at the end of the test what `prepare_home` sets in the environment."""
    for name in ("DAGSTER_HOME", "SYNPIPE_STORE", "SYNPIPE_DATA"):
        patch.setenv(name, "")
        patch.delenv(name)


def _edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = yaml.safe_load(path.read_text())
    change(content)
    path.write_text(yaml.safe_dump(content, sort_keys=False))


def _plain(table: pa.Table) -> list[dict[str, Any]]:
    return table.sort_by("synapse_id").to_pylist()


def _embedded(dataset: Dataset, encoder: str) -> np.ndarray:
    """Return the vectors that the encoder produced, scaled to unit length, in the order of synapse ids."""
    fingerprint = read_manifest(dataset, f"embeddings_{encoder}").figures["encoder_fingerprint"]
    cache = EmbeddingCache(dataset.embeddings_folder, fingerprint)
    tiles = read_table(dataset.tiles_path, ["synapse_id", "shard", "content_hash"]).sort_by("synapse_id").to_pylist()
    vectors = np.concatenate([cache.read(shard_name(tile["shard"]), [tile["content_hash"]]) for tile in tiles])
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
