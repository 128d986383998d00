"""The graph in Dagster: its shape, what people see of each asset, and what stops the chain."""

import base64
import io
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import dagster as dg
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import timm
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file

from synpipe.assets import embedding_table, embeddings, index, rgb_tiles, synapse_stacks
from synpipe.assets.manifest import read_manifest, write_manifest
from synpipe.datasets import Dataset, Project
from synpipe.defs.definitions import build_definitions
from synpipe.embeddings.cache import EmbeddingCache
from synpipe.store.files import read_table, write_table
from synpipe_tests.conftest import REPOSITORY, SMALL_ENCODERS, project_of, write_project
from synpipe_tests.support.command import invoke, refusal

# Asset: (what it depends on, group, checks).
GRAPH = {
    "volume": (set(), "demo", set()),
    "annotations": ({"volume"}, "demo", set()),
    "synapses": ({"volume", "annotations"}, "demo", set()),
    "synapse_stacks": ({"volume", "synapses"}, "demo", {"match_synapses"}),
    "rgb_tiles": ({"synapse_stacks"}, "demo", {"are_there"}),
    "rejects": ({"volume", "synapses", "synapse_stacks"}, "demo", {"are_few"}),
    "split": ({"synapses", "rgb_tiles"}, "demo", {"sides_are_apart"}),
    "evaluation": ({"scores_tiny", "scores_other"}, "demo_evaluation", set()),
    **{
        asset: described
        for name in ("tiny", "other")
        for asset, described in {
            f"embeddings_{name}": ({"rgb_tiles"}, f"demo_{name}", {"vectors_vary"}),
            f"classifier_{name}": (
                {"synapses", "split", f"embeddings_{name}"},
                f"demo_{name}",
                {"predictions_are_whole"},
            ),
            f"embedding_table_{name}": (
                {f"classifier_{name}"},
                f"demo_{name}",
                {"match_tiles", "drift"},
            ),
            f"index_{name}": ({f"embedding_table_{name}"}, f"demo_{name}", {"recall"}),
            f"scores_{name}": (
                {"volume", f"index_{name}"},
                f"demo_{name}",
                set(),
            ),
        }.items()
    },
}


def key(asset: str) -> dg.AssetKey:
    """`embeddings_tiny` is `demo/tiny/embeddings` in Dagster."""
    for encoder in SMALL_ENCODERS["encoders"]:
        if asset.endswith(f"_{encoder}"):
            return dg.AssetKey(["demo", encoder, asset.removesuffix(f"_{encoder}")])
    return dg.AssetKey(["demo", asset])


def name(key: dg.AssetKey) -> str:
    """The name of an asset in manifests and on the command line."""
    return "_".join(reversed(key.path[1:]))


def code_versions(project: Project, dataset: str = "demo") -> dict[str, str]:
    graph = build_definitions(project, [dataset]).resolve_asset_graph()
    return {name(each): str(graph.get(each).code_version) for each in graph.materializable_asset_keys}


def made_assets(project: Project) -> set[str]:
    return {path.stem for path in (project.store / "demo" / "manifests").glob("*.json")}


# Shape.


def test_the_graph_of_a_data_set(project: Project):
    graph = build_definitions(project, ["demo"]).resolve_asset_graph()
    found = {
        name(each): (
            {name(parent) for parent in graph.get(each).parent_keys},
            graph.get(each).group_name,
            {check.name for check in graph.get_check_keys_for_assets({each})},
        )
        for each in graph.get_all_asset_keys()
    }
    assert found == GRAPH
    assert {each.path[0] for each in graph.get_all_asset_keys()} == {"demo"}
    assert [key(name(each)) for each in graph.get_all_asset_keys()] == [*graph.get_all_asset_keys()]
    assert all(graph.get(check).blocking for check in graph.asset_check_keys)
    assert all(re.fullmatch(r"\d+-[0-9a-f]{12}", version) for version in code_versions(project).values())
    for each in graph.get_all_asset_keys():
        assert graph.get(each).description
        assert graph.get(each).kinds


def test_the_data_sets_of_the_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SYNPIPE_REAL_DATA", str(tmp_path / "nothing"))
    project = Project(REPOSITORY / "data", tmp_path)
    names = {each.path[0] for each in build_definitions(project).resolve_asset_graph().get_all_asset_keys()}
    assert names == set(project.dataset_names()) > {"demo", "vnc_stack1"}
    for encoder in project.dataset("demo").encoders.values():
        assert encoder.weights != "hub"  # the demo works without a network


@pytest.mark.parametrize("change", [{"seed": 7}, {"precision": "fp32"}, {"crop_px": 96}, {"model": "resnet10t"}])
def test_an_encoder_entry_decides_the_code_versions_of_its_branch(project: Project, change: dict[str, Any]):
    before = code_versions(project)
    encoders = {name: dict(entry) for name, entry in SMALL_ENCODERS["encoders"].items()}
    encoders["tiny"] |= change
    (project.data / "encoders.yaml").write_text(yaml.safe_dump({"encoders": encoders}))
    after = code_versions(Project(project.data, project.store))
    changed = {asset for asset in before if before[asset] != after[asset]}
    assert changed == {asset for asset in before if asset.endswith("_tiny")} | {"evaluation"}
    assert len(changed) >= 5


def test_a_description_decides_nothing(project: Project):
    before = code_versions(project)
    encoders = {name: {**entry, "description": "changed"} for name, entry in SMALL_ENCODERS["encoders"].items()}
    (project.data / "encoders.yaml").write_text(yaml.safe_dump({"encoders": encoders}))
    assert code_versions(Project(project.data, project.store)) == before


# What a person sees.


@pytest.fixture(scope="module")
def history(made: Dataset) -> Iterator[dg.DagsterInstance]:
    """The Dagster history that the command wrote."""
    home = made.folder.parent / "dagster_home"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DAGSTER_HOME", str(home))
        with dg.DagsterInstance.from_config(str(home)) as instance:
            yield instance


Seen = Callable[[str], dict[str, Any]]


@pytest.fixture(scope="module")
def seen(history: dg.DagsterInstance) -> Seen:
    """Metadata of the latest materialisation of an asset, as the UI shows it."""

    def metadata(asset: str) -> dict[str, Any]:
        event = history.get_latest_materialization_event(key(asset))
        assert event is not None, asset
        assert event.asset_materialization is not None
        return {name: value.value for name, value in event.asset_materialization.metadata.items()}

    return metadata


def picture(markdown: str) -> Image.Image:
    uri = re.fullmatch(r"!\[[^\]]+\]\(data:image/jpeg;base64,([A-Za-z0-9+/=]+)\)", markdown)
    assert uri, markdown[:80]
    image = Image.open(io.BytesIO(base64.b64decode(uri[1])))
    image.load()
    return image


def test_every_asset_tells_its_data_version(made: Dataset, history: dg.DagsterInstance):
    for asset in GRAPH:
        event = history.get_latest_materialization_event(key(asset))
        assert event is not None
        assert event.asset_materialization is not None
        tags = event.asset_materialization.tags or {}
        assert tags["dagster/data_version"] == read_manifest(made, asset).data_version
        assert tags["dagster/code_version"] == read_manifest(made, asset).code_version
        assert event.run_id == read_manifest(made, asset).run_id


def test_tables_are_shown_with_rows_columns_and_a_sample(made: Dataset, seen: Seen):
    paths = {
        "synapses": made.synapses_path,
        "synapse_stacks": made.stacks_path,
        "rgb_tiles": made.tiles_path,
        "rejects": made.rejects_path,
        "classifier_tiny": made.predictions_path("tiny"),
        "embedding_table_tiny": made.table_path("tiny"),
        "embedding_table_other": made.table_path("other"),
    }
    for asset, path in paths.items():
        metadata, file = seen(asset), pq.ParquetFile(path)
        assert metadata["path"] == str(path)
        assert metadata["dagster/row_count"] == file.metadata.num_rows > 0
        assert [column.name for column in metadata["dagster/column_schema"].columns] == file.schema_arrow.names
        sample = [record.data for record in metadata["sample"].records]
        assert 0 < len(sample) <= 10
        ids = pq.read_table(path, columns=["synapse_id"])["synapse_id"].to_pylist()
        shown = ["" if each is None else str(each) for each in ids[: len(sample)]]  # strings: exact in a browser
        assert [row["synapse_id"] for row in sample] == shown
    vector = seen("embedding_table_tiny")["sample"].records[0].data["vector"]
    assert "…" in vector  # 1,280 numbers would fill the page
    assert len(vector) < 60
    for encoder in made.encoders:
        for asset in (f"embeddings_{encoder}", f"index_{encoder}"):
            assert seen(asset)["dagster/row_count"] == len(read_table(made.tiles_path, ["row"]))


def test_pictures_are_shown(seen: Seen):
    pictures = {"volume": "middle_section", "rgb_tiles": "contact_sheet", "index_tiny": "nearest_neighbours"}
    pictures |= {"classifier_tiny": "confusion_matrix"}
    for asset, name in pictures.items():
        image = picture(seen(asset)[name])
        assert min(image.size) > 300
        assert np.asarray(image).std() > 15  # something to see, and not one grey


def test_counts_are_shown(made: Dataset, seen: Seen):
    for asset, name, path, column in (
        ("synapses", "classes", made.synapses_path, "neurotransmitter"),
        ("rejects", "reasons", made.rejects_path, "reason"),
    ):
        counted = read_table(path, [column])[column].value_counts().to_pylist()
        expected = {(row["values"] or "unlabelled", f"{row['counts']:,}") for row in counted}
        rows = [line.strip("|").split("|") for line in seen(asset)[name].splitlines()[2:]]
        assert {tuple(cell.strip() for cell in row) for row in rows} == expected
    assert seen("synapse_stacks")["cut_outs_per_second"] > 0
    assert 0 < seen("synapse_stacks")["bytes_read"] <= len(read_table(made.stacks_path)) * 3 * 256 * 256
    for encoder in made.encoders:
        assert seen(f"embeddings_{encoder}")["tiles_per_second"] > 0
        assert seen(f"embeddings_{encoder}")["bytes_read"] == len(read_table(made.tiles_path)) * 3 * 256 * 256
        assert 0 <= seen(f"embeddings_{encoder}")["device_waited"] < 1
        assert seen(f"embeddings_{encoder}")["device"]
        assert seen(f"index_{encoder}")["recall"] >= 0.99


def test_every_check_passed_and_says_what_it_saw(history: dg.DagsterInstance):
    expected = {dg.AssetCheckKey(key(asset), check) for asset, (_, _, names) in GRAPH.items() for check in names}
    records = history.event_log_storage.get_latest_asset_check_execution_by_key(list(expected))
    assert set(records) == expected
    for record in records.values():
        assert record.event is not None
        evaluation = record.event.dagster_event.asset_check_evaluation_data
        assert evaluation.passed
        assert evaluation.description.endswith(".")


# What stops the chain.


@pytest.mark.slow
def test_no_tile_stops_the_chain_and_leaves_the_reasons(tmp_path: Path):
    project = write_project(tmp_path, tiles={"shards": 3, "blank_std": 200}, max_reject_share=1)
    message = refusal(invoke(project, "materialize"))
    assert "demo/rgb_tiles: the check are_there failed" in message
    assert "rejects.parquet" in message
    assert made_assets(project) == {"volume", "annotations", "synapses", "synapse_stacks", "rgb_tiles", "rejects"}
    reasons = read_table(project.dataset("demo").rejects_path, ["reason"])["reason"].to_pylist()
    assert reasons.count("blank_section") > 90


def constant_weights(path: Path, bias: float) -> None:
    """A network that says the same of every tile: all weights zero, all biases `bias`."""
    state = timm.create_model("resnet10t", num_classes=0).state_dict()
    same = {name: torch.full_like(value, bias if name.endswith("bias") else 0) for name, value in state.items()}
    save_file(same, path)


@pytest.mark.parametrize("bias", [1.0, 0.0])
def test_an_encoder_that_tells_nothing_apart_stops_its_own_branch(made: Dataset, tmp_path: Path, bias: float):
    shutil.copytree(made.folder.parent, tmp_path / "store")
    shutil.copytree(made.weights_base, tmp_path / "data")
    project = Project(tmp_path / "data", tmp_path / "store")
    constant_weights(project.data / "constant.safetensors", bias)
    constant = {"model": "resnet10t", "weights": "constant.safetensors", "crop_px": 64, "precision": "fp32"}
    registry = {"encoders": {**SMALL_ENCODERS["encoders"], "constant": constant}}
    (project.data / "encoders.yaml").write_text(yaml.safe_dump(registry))
    path = project.data / "datasets" / "demo.yaml"
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), "encoders": ["constant", "tiny"]}))

    message = refusal(invoke(project, "materialize", "--select", "embeddings_constant+", "--select", "index_tiny"))
    assert "demo/constant/embeddings: the check vectors_vary failed" in message
    assert {"embedding_table_constant", "index_constant"} & made_assets(project) == set()
    assert not project.dataset("demo").table_path("constant").exists()
    index = read_manifest(project.dataset("demo"), "index_tiny")
    assert index.run_id != read_manifest(made, "index_tiny").run_id  # the other branch went on


# What the checks find.


@pytest.fixture
def tampered(made: Dataset, tmp_path: Path) -> Dataset:
    shutil.copytree(made.folder, tmp_path / "store" / "demo")
    return Project(project_of(made).data, tmp_path / "store").dataset("demo")


def test_checks_pass_on_what_was_made(made: Dataset):
    findings = [rgb_tiles.are_there(made, ""), synapse_stacks.match_synapses(made, "")]
    for encoder in made.encoders:
        findings += [
            check(made, encoder)
            for check in (embeddings.vectors_vary, embedding_table.match_tiles, index.finds_neighbours)
        ]
    assert [finding.description for finding in findings if not finding.passed] == []


def test_checks_of_tiles_find_a_synapse_listed_twice_and_none_at_all(tampered: Dataset):
    tiles = read_table(tampered.tiles_path)
    write_table(tampered.tiles_path, tiles.take([*range(len(tiles)), 3, 4]))
    finding = rgb_tiles.are_there(tampered, "")
    assert not finding.passed
    assert "2 synapses are listed more than once" in finding.description
    write_table(tampered.tiles_path, tiles.slice(0, 0))
    assert not rgb_tiles.are_there(tampered, "").passed


def test_checks_of_stacks_find_what_is_lost_strange_and_repeated(tampered: Dataset):
    stacks = read_table(tampered.stacks_path)
    strange = pc.add(stacks["synapse_id"].slice(0, 1), 10**12)
    without_first = stacks.slice(1)
    added = stacks.slice(0, 1).set_column(0, "synapse_id", strange)
    write_table(tampered.stacks_path, without_first)
    assert "1 without stack or reason" in synapse_stacks.match_synapses(tampered, "").description
    write_table(tampered.stacks_path, pa.concat_tables([stacks, added.cast(stacks.schema), stacks.slice(5, 2)]))
    finding = synapse_stacks.match_synapses(tampered, "")
    assert not finding.passed
    assert "1 of no synapse" in finding.description
    assert "2 repeated" in finding.description
    assert "without stack" not in finding.description


@pytest.mark.parametrize("value", [0.5, 0.0, np.nan])
def test_checks_of_vectors_find_constant_and_broken_ones(tampered: Dataset, value: float):
    fingerprint = read_manifest(tampered, "embeddings_tiny").figures["encoder_fingerprint"]
    cache = EmbeddingCache(tampered.embeddings_folder, fingerprint)
    for path in cache.folder.glob("*.parquet"):
        table = read_table(path)
        hashes = table["content_hash"].to_pylist()
        vectors = np.full((len(hashes), 1280), value, np.float32)
        assert cache.add(path.name.split("-")[0], hashes, vectors) == path
    assert not embeddings.vectors_vary(tampered, "tiny").passed
    assert embeddings.vectors_vary(tampered, "other").passed


def test_checks_of_the_table_and_the_index_find_missing_rows_and_other_tiles(tampered: Dataset):
    path = tampered.table_path("tiny")
    table = read_table(path)
    content = table["content_hash"].to_pylist()
    exchanged = [content[1], content[0], *content[2:]]
    write_table(path, table.set_column(table.column_names.index("content_hash"), "content_hash", [exchanged]))
    assert not embedding_table.match_tiles(tampered, "tiny").passed
    write_table(path, table.take(np.arange(len(table))[::-1]))
    assert embedding_table.match_tiles(tampered, "tiny").passed  # the order does not matter
    write_table(path, table.slice(1))
    assert not embedding_table.match_tiles(tampered, "tiny").passed

    manifest = read_manifest(tampered, "embedding_table_tiny")
    write_manifest(tampered, replace(manifest, rows=len(table) - 1))
    finding = index.finds_neighbours(tampered, "tiny")
    assert not finding.passed
    assert f"{len(table)} rows, the table {len(table) - 1}" in finding.description


# How fast it starts. Who may import what is in pyproject.toml, as contracts that `make check` enforces.


def test_what_must_start_fast_leaves_the_heavy_libraries_alone():
    program = "import sys, synpipe.cli, synpipe.assets.graph, synpipe.embeddings.embed; print(*sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert {"torch", "timm", "dagster", "lancedb", "scipy"} & set(done.stdout.split()) == set()
