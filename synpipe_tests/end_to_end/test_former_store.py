"""A store that an earlier version wrote: every asset is fresh, and materialising it computes nothing again."""

import tarfile
from importlib.metadata import version
from pathlib import Path

import pytest

import synpipe
from synpipe.assets.graph import nodes, states
from synpipe.assets.manifest import read_manifest
from synpipe.datasets import Dataset, Project
from synpipe.embeddings import embed
from synpipe.index.versions import list_versions
from synpipe.tiles import tile
from synpipe_tests.conftest import REPOSITORY
from synpipe_tests.support.command import answer, invoke

FIXTURES = REPOSITORY / "synpipe_tests" / "fixtures"
# The identity of an encoder covers these versions, so other ones make its branch stale, as they should.
MADE_WITH = {"torch": "2.15.0", "timm": "1.0.31"}


@pytest.fixture
def project(tmp_path: Path) -> Project:
    with tarfile.open(FIXTURES / "store_9968423.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    return Project(tmp_path / "data", tmp_path / "store")


@pytest.fixture
def dataset(project: Project) -> Dataset:
    return project.dataset("small")


def fresh_branches() -> set[str]:
    """Branches that these versions of torch and timm leave fresh."""
    same = {name: version(name).split("+")[0] for name in MADE_WITH} == MADE_WITH
    return {"", "lbp"} | ({"tiny", "tiny_pca32"} if same else set())


def test_every_asset_of_a_former_store_is_fresh(dataset: Dataset):
    expected = {
        node.name for node in nodes(dataset) if node.encoder in fresh_branches() and node.asset.name != "evaluation"
    }
    found = {state.asset: (state.state, state.reasons) for state in states(dataset)}
    assert len(found) == 7 + 3 * 6 + 1
    assert {name: found[name] for name in expected} == dict.fromkeys(expected, ("fresh", ()))
    if len(fresh_branches()) == 4:
        assert found["evaluation"] == ("fresh", ())


def test_materialising_it_cuts_out_and_embeds_nothing_and_keeps_every_version(
    project: Project, dataset: Dataset, monkeypatch: pytest.MonkeyPatch
):
    if len(fresh_branches()) < 4:
        pytest.skip(f"this environment has other versions than {MADE_WITH}, so encoders are stale")

    def refuse(*_arguments: object, **_options: object) -> None:
        raise AssertionError("something was computed again")

    monkeypatch.setattr(tile, "make_tile", refuse)
    monkeypatch.setattr(embed, "_stream", refuse)  # every forward pass, of tiles and of altered views
    before = {node.name: read_manifest(dataset, node.name).data_version for node in nodes(dataset)}
    published = [each.tag for each in list_versions(dataset, "lbp")]
    result = invoke(project, "materialize", "--dataset", "small")
    assert result.exit_code == 0, result.stderr
    assert {node.name: read_manifest(dataset, node.name).data_version for node in nodes(dataset)} == before
    assert [each.tag for each in list_versions(dataset, "lbp")] == published


def test_its_rows_can_be_searched_traced_and_read(project: Project, dataset: Dataset, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SYNPIPE_DATA", str(project.data))
    opened = synpipe.open_dataset("small", project.store)
    synapse_id = opened.table("lbp")["synapse_id"][0].as_py()
    assert str(synapse_id) in answer(project, "search", str(synapse_id), "-d", "small", "-e", "lbp")
    assert "sha256_by_file" in answer(project, "provenance", str(synapse_id), "-d", "small", "-e", "lbp")
    assert opened.tiles().by_id(synapse_id).shape == (3, 256, 256)
    assert answer(project, "gc", "-d", "small").startswith("Nothing to remove")
