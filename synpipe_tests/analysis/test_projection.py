"""The map: it is reproducible, is stored in Parquet and LanceDB, keeps similar vectors close, and has a picture.

umap takes 20 s to import and compile.
"""

from pathlib import Path

import dagster as dg
import numpy as np
import pytest
import torch

from synpipe.analysis import projection
from synpipe.analysis.charts import PALETTE, draw_map
from synpipe.analysis.projection import ProjectionSpec, fit_map
from synpipe.assets import projection as projection_asset
from synpipe.assets.manifest import read_manifest
from synpipe.index.publish import open_current
from synpipe.reports.housekeeping import find_leftovers
from synpipe.store.files import read_table
from synpipe_tests.support import changes
from synpipe_tests.support.changes import NAME, TRUNK, Own, make_outdated
from synpipe_tests.support.tables import clustered

MAP = ["map_x", "map_y"]
ON = {"projection": {"n_neighbours": 8}, "classifier": {"method": "linear"}}


@pytest.fixture(scope="module")
def threads() -> int:
    """The number of threads of torch before anything is mapped."""
    return torch.get_num_threads()


@pytest.fixture(scope="module")
def mapped(template: Own, threads: int, tmp_path_factory: pytest.TempPathFactory) -> Own:
    """A data set with one network and all assets, materialised through Dagster. Shared: copy it, do not change it."""
    own = changes.copy(template, tmp_path_factory.mktemp("mapped"))
    own.edit_dataset(lambda content: content.update(encoders=["tiny"], **ON))
    with pytest.MonkeyPatch.context() as patch:
        changes.at_home(patch)
        own.materialise_stale()
    return own


@pytest.fixture
def own(mapped: Own, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Own:
    return changes.copy(mapped, tmp_path / "own", monkeypatch)


def places_of(own: Own) -> np.ndarray:
    table = read_table(own.dataset.projection_path("tiny")).sort_by("synapse_id")
    return np.stack([table[name].to_numpy() for name in MAP], axis=1)


def test_the_map_is_in_the_projection_the_table_and_the_index(mapped: Own) -> None:
    dataset = mapped.dataset
    tables = [
        table.sort_by("synapse_id").select(["synapse_id", *MAP]).to_pylist()
        for table in (
            read_table(dataset.projection_path("tiny")),
            read_table(dataset.table_path("tiny")),
            open_current(dataset.lancedb_folder, "tiny").to_arrow(),
        )
    ]
    assert tables[0] == tables[1] == tables[2]
    assert len(np.unique(places_of(mapped), axis=0)) == 40
    assert read_manifest(dataset, "projection_tiny").figures["method"] == "umap"


def test_a_map_leaves_torch_its_threads(mapped: Own, threads: int) -> None:
    """With another number, the last bits of everything that is embedded or trained afterwards would change."""
    assert torch.get_num_threads() == threads


def test_the_whole_graph_is_there_with_nothing_switched_off(mapped: Own) -> None:
    kinds = {"embeddings", "classifier", "projection", "embedding_table", "index", "scores"}
    assert mapped.versions().keys() == TRUNK | {f"{kind}_tiny" for kind in kinds} | {"evaluation"}
    assert mapped.outdated() == {}


def test_the_page_shows_a_picture(mapped: Own, monkeypatch: pytest.MonkeyPatch) -> None:
    changes.at_home(monkeypatch)
    with mapped.instance() as instance:
        event = instance.get_latest_materialization_event(dg.AssetKey([NAME, "tiny", "projection"]))
    assert event is not None and event.asset_materialization is not None
    assert str(event.asset_materialization.metadata["map"].value).startswith("![map](data:image/jpeg;base64,")


def test_made_again_of_the_same_vectors_every_place_is_the_same(own: Own) -> None:
    before, version = places_of(own), own.versions()["projection_tiny"]
    own.dataset.projection_path("tiny").unlink()
    make_outdated(own.dataset)
    np.testing.assert_array_equal(places_of(own), before)
    assert own.versions()["projection_tiny"] == version


def test_labels_move_no_point_and_new_synapses_or_another_seed_do(own: Own) -> None:
    before, versions = places_of(own), own.versions()
    own.edit_synapses(lambda rows: rows[5].update(neurotransmitter="dopamine"))
    assert "projection_tiny" in own.outdated()  # its picture is
    make_outdated(own.dataset)
    assert own.versions()["projection_tiny"] == versions["projection_tiny"]
    np.testing.assert_array_equal(places_of(own), before)

    own.edit_dataset(lambda content: content["projection"].update(seed=1))
    assert own.outdated().keys() == {
        "projection_tiny",
        "embedding_table_tiny",
        "index_tiny",
        "scores_tiny",
        "evaluation",
    }
    make_outdated(own.dataset)
    assert not np.array_equal(places_of(own), before)


def test_switched_off_the_columns_are_empty_and_the_vectors_stay(own: Own) -> None:
    vectors = read_table(own.dataset.table_path("tiny"))["vector"]
    own.edit_dataset(lambda content: content.update(projection=None))
    dataset = own.dataset
    make_outdated(dataset)
    table = read_table(dataset.table_path("tiny"))
    assert {table[name].null_count for name in MAP} == {len(table)}
    assert table["vector"].equals(vectors)
    assert "projection_tiny" not in own.versions()
    assert dataset.projection_path("tiny") in {leftover.path for leftover in find_leftovers(dataset)}


def test_more_vectors_than_a_fit_takes_are_placed_among_their_like(own: Own, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(projection, "FIT_ROWS", 30)
    monkeypatch.setattr(projection_asset, "TRANSFORM_ROWS", 4)
    own.dataset.projection_path("tiny").unlink()
    make_outdated(own.dataset)
    assert np.isfinite(places_of(own)).all()
    assert read_manifest(own.dataset, "projection_tiny").figures["fitted_on"] == 30


def test_clusters_of_vectors_are_clusters_on_the_map_also_of_vectors_that_come_later() -> None:
    random = np.random.default_rng(0)
    centres, groups = random.normal(size=(4, 32)), random.integers(0, 4, 300)
    vectors = (centres[groups] + 0.2 * random.normal(size=(300, 32))).astype(np.float32)
    places, place = fit_map(vectors[:200], ProjectionSpec())
    later = place(vectors[200:])
    nearest = np.linalg.norm(later[:, None] - places, axis=2).argmin(axis=1)
    assert (groups[:200][nearest] == groups[200:]).mean() > 0.97


@pytest.mark.parametrize("count", [1, 2, 3, 16])
def test_few_vectors_are_laid_out_by_their_principal_components(count: int) -> None:
    vectors = clustered(count, 8)
    assert not projection.enough_for_umap(count, ProjectionSpec())
    places, place = fit_map(vectors, ProjectionSpec())
    assert places.shape == (count, 2)
    np.testing.assert_allclose(place(vectors), places, atol=1e-6)
    assert len(np.unique(places.round(6), axis=0)) == count


def test_the_picture_has_a_colour_for_each_class_and_bounded_size() -> None:
    count = 60_000
    places = np.random.default_rng(0).normal(size=(count, 2)).astype(np.float32)
    names = ["acetylcholine", "gaba", "glutamate"]
    labels = np.array([*names, "unlabelled"])[np.arange(count) % 4]
    picture = np.asarray(draw_map(places, labels, names, "a map").convert("RGB")).reshape(-1, 3).astype(int)
    for colour in PALETTE[:3]:
        wanted = [int(colour[at : at + 2], 16) for at in (1, 3, 5)]
        assert (np.abs(picture - wanted).max(axis=1) < 60).sum() > 50, colour  # on white, not quite opaque
    assert len(picture) < 10**6
