"""Every asset declares all of its parts, and the Dagster layer and the command line know none of them by name."""

import ast
import dataclasses
import importlib
import re
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from pydantic import TypeAdapter

from synpipe.assets import asset as asset_module
from synpipe.assets.asset import Asset
from synpipe.assets.graph import ASSETS, Node, edges, find_node, nodes
from synpipe.assets.manifest import read_manifest
from synpipe.datasets import Dataset, Project
from synpipe.errors import SynpipeError
from synpipe_tests.conftest import REPOSITORY, write_project

FOLDER = REPOSITORY / "synpipe" / "assets"
NO_ASSETS = {"__init__", "asset", "file_records", "graph", "manifest"}
MODULES = {path.stem for path in FOLDER.glob("*.py")} - NO_ASSETS
ENCODERS = ["tiny", "other", "tiny+pca8"]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """A data set with every kind of asset. Nothing is made of it."""
    project = write_project(tmp_path_factory.mktemp("assets"), encoders=ENCODERS, projection={})
    return project.dataset("demo")


@pytest.mark.parametrize("name", sorted(MODULES))
def test_each_module_declares_one_asset_that_the_graph_lists(name: str):
    declared = importlib.import_module(f"synpipe.assets.{name}").ASSET
    assert isinstance(declared, Asset)
    assert [each for each in ASSETS if each is declared] == [declared]


def test_the_graph_lists_nothing_else_and_in_the_order_of_the_data_flow(dataset: Dataset):
    assert len(ASSETS) == len(MODULES)
    seen: set[str] = set()
    for node in nodes(dataset):
        assert set(node.reads) <= seen, node.name
        seen.add(node.name)
    assert {node.asset.name for node in nodes(dataset)} == {each.name for each in ASSETS}


def test_no_part_of_an_asset_has_a_default_so_forgetting_one_is_a_type_error():
    for field in dataclasses.fields(Asset):
        assert field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING, field.name


@pytest.mark.parametrize("asset", ASSETS, ids=lambda each: f"{each.name}: {each.description[:20]}")
def test_the_facts_of_an_asset_are_a_frozen_dataclass_with_a_schema(asset: Asset):
    assert dataclasses.is_dataclass(asset.facts)
    assert asset.facts.__dataclass_params__.frozen
    assert TypeAdapter(asset.facts).json_schema()["type"] == "object"
    assert re.fullmatch(r"[A-Z].*\.", asset.description)
    assert all(re.fullmatch(r".*\.", check.__doc__ or "", re.DOTALL) for check in asset.checks.values())


def test_every_column_of_every_file_has_a_description(made: Dataset):
    for node in nodes(made):
        for path in node.asset.files(made, node.encoder):
            if path.suffix == ".parquet" and path.exists():
                missing = set(pq.read_schema(path).names) - node.asset.columns.keys()
                # A file of votes of neurons, or a sample of a former table, is not shown.
                assert path != node.path or not missing, (node.name, missing)


def test_every_file_in_the_folder_of_a_data_set_belongs_to_an_asset(made: Dataset):
    owned = {path for node in nodes(made) for path in node.asset.files(made, node.encoder)}
    # Commands save pictures there, such as that of a comparison.
    shared = {"manifests", "lineage", "tiles", "embeddings", "lancedb", "source", "training", "compressors"}
    loose = {
        path
        for path in made.folder.rglob("*")
        if path.is_file() and path.relative_to(made.folder).parts[0] not in shared and path.suffix != ".png"
    }
    assert loose <= owned, loose - owned


def test_facts_and_figures_are_those_of_the_manifest(made: Dataset):
    for node in nodes(made):
        manifest = read_manifest(made, node.name)
        facts = node.asset.parse(manifest)
        assert set(manifest.facts) == {field.name for field in dataclasses.fields(facts)}


def test_a_branch_has_at_most_ten_edges_and_none_runs_backwards(dataset: Dataset):
    direct = edges(dataset)
    group = {node.name: node.encoder or ("end" if node.asset.optional_reads else "trunk") for node in nodes(dataset)}
    order = ["trunk", "tiny", "other", "tiny_pca8", "end"]
    for branch in order[1:-1]:
        assert sum(len(direct[node.name]) for node in nodes(dataset) if node.encoder == branch) <= 10
    for name, parents in direct.items():
        assert all(order.index(group[parent]) <= order.index(group[name]) for parent in parents), name


def test_what_an_asset_reads_lies_upstream_of_it(dataset: Dataset):
    direct = edges(dataset)
    upstream: dict[str, set[str]] = {}
    for node in nodes(dataset):
        upstream[node.name] = {*direct[node.name]}.union(*(upstream[parent] for parent in direct[node.name]))
        assert set(node.reads) <= upstream[node.name], node.name


def test_an_asset_is_found_by_both_of_its_names(dataset: Dataset):
    names = {node.name: node.name for node in nodes(dataset)} | {
        "/".join(node.key[1:]): node.name for node in nodes(dataset)
    }
    assert {name: find_node(dataset, name).name for name in names} == names
    assert find_node(dataset, "embeddings_tiny+pca8").key == ("demo", "tiny_pca8", "embeddings")
    with pytest.raises(SynpipeError, match=r"no asset 'embeddings_none'.*embeddings_tiny"):
        find_node(dataset, "embeddings_none")


@pytest.mark.parametrize("layer", ["defs"])
def test_the_layer_that_renders_assets_names_none_of_them(layer: str):
    names = {each.name for each in ASSETS} - {"annotations", "volume", "index", "split"}  # also plain words
    for path in (REPOSITORY / "synpipe" / layer).glob("*.py"):
        strings = {node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)}
        assert not strings & names, path


def test_the_parts_that_are_nothing_are_shared():
    assert {asset_module.no_files, asset_module.no_leftovers, asset_module.always} <= {
        part for each in ASSETS for part in (each.files, each.leftovers, each.exists)
    }


def test_nodes_of_one_data_set_have_different_names_and_keys(dataset: Dataset):
    found: list[Node] = nodes(dataset)
    assert len({node.name for node in found}) == len({node.key for node in found}) == len(found)


def test_a_project_without_its_own_encoder_says_so(tmp_path: Path):
    project: Project = write_project(tmp_path, encoders=["nobody"])
    with pytest.raises(SynpipeError, match="nobody"):
        project.dataset("demo")
