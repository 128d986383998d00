"""The public Python API: `import synpipe` gives what docs/api.md promises, and nothing heavy before it is used."""

import re
import subprocess
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest

import synpipe
from synpipe.datasets import Dataset
from synpipe_tests.conftest import REPOSITORY, environment, project_of


@pytest.fixture
def opened(made: Dataset, monkeypatch: pytest.MonkeyPatch) -> synpipe.OpenDataset:
    project = project_of(made)
    monkeypatch.setenv("SYNPIPE_DATA", str(project.data))
    return synpipe.open_dataset("demo", project.store)


def test_a_data_set_gives_its_synapses_tiles_and_tables(opened: synpipe.OpenDataset, made: Dataset):
    assert opened.name == "demo"
    assert opened.encoders == ("tiny", "other")
    assert opened.classes == made.spec.classes
    assert opened.synapses() == pq.read_table(made.synapses_path)
    table = opened.table()
    assert table == opened.table("tiny") == pq.read_table(made.table_path("tiny"))
    assert opened.table("other", ["synapse_id", "norm"]).column_names == ["synapse_id", "norm"]
    ids = table["synapse_id"].to_pylist()
    tiles = opened.tiles()
    assert len(tiles) == len(ids)
    np.testing.assert_array_equal(opened.tiles(ids[:2]).by_id(ids[1]), tiles.by_id(ids[1]))


def test_a_search_gives_the_neighbours_of_each_class(opened: synpipe.OpenDataset):
    table = opened.table("tiny")
    synapse_id, region = table["synapse_id"][0].as_py(), table["region"][0].as_py()
    answer = opened.search(synapse_id, encoder="tiny", per_class=2)
    assert set(answer) <= {*opened.classes, "unlabelled"}
    assert all(len(neighbours) <= 2 for neighbours in answer.values())
    found = opened.search(synapse_id, metric="l2", where={"region": region})
    assert {neighbour.region for neighbours in found.values() for neighbour in neighbours} == {region}
    assert synapse_id not in {neighbour.synapse_id for neighbours in answer.values() for neighbour in neighbours}


def test_an_encoder_embeds_tiles_as_those_of_the_table_were(opened: synpipe.OpenDataset):
    table = opened.table("other")
    tiles = np.stack([opened.tiles().by_id(synapse_id) for synapse_id in table["synapse_id"][:3].to_pylist()])
    vectors = synpipe.open_encoder("other", device="cpu").embed(tiles)
    assert vectors.dtype == np.float32
    np.testing.assert_array_equal(vectors, opened.open_encoder("other", device="cpu").embed(tiles))
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    expected = np.stack(table["vector"][:3].to_pylist())
    assert ((unit * expected).sum(axis=1) > 0.999).all()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda opened: synpipe.open_dataset("nobody"), "There is no data set 'nobody'"),
        (lambda opened: synpipe.open_encoder("nobody"), "There is no encoder 'nobody'"),
        (lambda opened: opened.table("nobody"), "has no encoder 'nobody'"),
        (lambda opened: opened.search(12), "12"),
        (lambda opened: opened.tiles().by_id(12), "Synapse 12 has no tile"),
    ],
)
def test_mistakes_are_one_kind_of_error(opened: synpipe.OpenDataset, call, words: str):
    with pytest.raises(synpipe.SynpipeError, match=re.escape(words)):
        call(opened)


def test_importing_the_package_imports_nothing_heavy(made: Dataset):
    program = "import sys, synpipe; print({'numpy', 'pyarrow', 'torch', 'lancedb', 'dagster'} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment(project_of(made)), capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "set()"


def test_the_documentation_names_everything_that_is_public():
    page = (REPOSITORY / "docs" / "api.md").read_text()
    methods = [name for name in vars(synpipe.OpenDataset) if not name.startswith("_")]
    for name in [*(set(synpipe.__all__) - {"OpenDataset", "__version__"}), *(f"ds.{method}" for method in methods)]:
        assert name in page, name
