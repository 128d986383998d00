"""Search: it finds the true nearest of every class under every metric, filters are safe, and ids are exact."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from synpipe.annotations.schema import UNLABELLED
from synpipe.datasets import Dataset, DatasetSpec
from synpipe.errors import SynpipeError
from synpipe.index import search
from synpipe.index.distances import METRICS
from synpipe.index.publish import publish
from synpipe.index.search import SynapseIndex, parse_where
from synpipe_tests.support.tables import clustered, embedding_table

CLASSES = ("acetylcholine", "gaba", "serotonin", "octopamine")  # no synapse of this data set is octopaminergic
COUNT, DIMENSIONS = 6_000, 32
FIRST_ID = 2**63 - 1 - COUNT  # the largest possible ids, which float64 cannot tell apart
NASTY = [
    "O'Brien",
    "' OR '1'='1",
    "x') OR 1=1 --",
    '"; DROP TABLE tiny; --',
    "back\\slash",
    "\\' OR 1=1 --",
    "`AL`",
    "%",
    "",
]


@dataclass
class Truth:
    """The content of the index. vectors: float64 (n, d), with their length."""

    vectors: np.ndarray
    ids: np.ndarray
    columns: dict[str, list[Any]]

    def nearest(self, query: int, metric: str, per_class: int, **where: Any) -> dict[str, list[tuple[int, float]]]:
        """Return (id, distance) of the nearest of each class, computed from textbook definitions."""
        here, all_ = self.vectors[query], self.vectors
        distances = {
            "cosine": lambda: 1 - all_ @ here / np.linalg.norm(all_, axis=1) / np.linalg.norm(here),
            "l2": lambda: np.sqrt(((all_ - here) ** 2).sum(axis=1)),
            "dot": lambda: -(all_ @ here),
            "l1": lambda: np.abs(all_ - here).sum(axis=1),
        }[metric]()
        answer = {}
        for name in (*CLASSES, None):
            rows = [
                row
                for row in range(len(all_))
                if row != query
                and self.columns["neurotransmitter"][row] == name
                and all(self.columns[column][row] == value for column, value in where.items())
            ]
            if rows:
                rows = sorted(rows, key=lambda row: distances[row])[:per_class]
                answer[name or UNLABELLED] = [(int(self.ids[row]), float(distances[row])) for row in rows]
        return answer


def make(folder: Path, vectors: np.ndarray, **columns: Any) -> Dataset:
    """A data set that has only the index of the encoder `tiny`."""
    spec = DatasetSpec.parse(
        {
            "title": "made up",
            "volume": {"path": "none.h5"},
            "annotations": [{"format": "cremi", "path": "none.h5"}],
            "classes": CLASSES,
            "encoders": ["tiny"],
        },
        "test",
    )
    dataset = Dataset("made_up", spec, folder, folder, {}, folder)
    path = embedding_table(folder / "table.parquet", vectors, 3, **columns)
    publish(path, dataset.lancedb_folder, "tiny", "a" * 32, lambda line: None)
    return dataset


@pytest.fixture(scope="module")
def dataset_and_truth(tmp_path_factory: pytest.TempPathFactory) -> tuple[Dataset, Truth]:
    random = np.random.default_rng(0)
    vectors = clustered(COUNT, DIMENSIONS)
    ids = FIRST_ID + 1 + random.permutation(COUNT)
    kinds = random.choice(4, COUNT, p=[0.6, 0.3, 0.095, 0.005])
    columns = {
        "neurotransmitter": [(*CLASSES[:2], None, "serotonin")[kind] for kind in kinds],  # serotonin is rare
        "region": [(*NASTY, None, "AL", "MB")[place] for place in random.integers(0, len(NASTY) + 3, COUNT)],
        "hemilineage": [("07B", "FLAa2", None)[place] for place in random.integers(0, 3, COUNT)],
        "neuron_id": [None if place == 0 else 2**63 - int(place) for place in random.integers(0, 40, COUNT)],
        "source": ["table"] * COUNT,
        "x_nm": np.arange(COUNT) + 0.5,
        "y_nm": np.arange(COUNT) * 2.0,
        "z_nm": np.arange(COUNT) * 3.0,
    }
    dataset = make(tmp_path_factory.mktemp("search"), vectors, synapse_id=ids, **columns)
    return dataset, Truth(vectors.astype(np.float64), ids, columns)


@pytest.fixture(scope="module")
def truth(dataset_and_truth: tuple[Dataset, Truth]) -> Truth:
    return dataset_and_truth[1]


@pytest.fixture(scope="module")
def exact(dataset_and_truth: tuple[Dataset, Truth]) -> SynapseIndex:
    index = SynapseIndex(dataset_and_truth[0], "tiny")
    assert index.exact
    return index


def too_large(dataset: Dataset, class_rows: int, kept_rows: int) -> SynapseIndex:
    """The index, treated as too large for memory. Only vectors of classes of at most `class_rows` rows are held."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search, "KEPT_ROWS", kept_rows)
        patch.setattr(search, "EXACT_ROWS", 0)
        patch.setattr(search, "EXACT_CLASS_ROWS", class_rows)
        index = SynapseIndex(dataset, "tiny")
    assert not index.exact
    return index


@pytest.fixture(scope="module")
def large(dataset_and_truth: tuple[Dataset, Truth]) -> SynapseIndex:
    """The index with no vectors in memory, as for a table that is too large."""
    return SynapseIndex(dataset_and_truth[0], "tiny", in_memory=False)


@pytest.fixture(scope="module")
def mixed(dataset_and_truth: tuple[Dataset, Truth]) -> SynapseIndex:
    """The index with serotonin and unlabelled rows in memory; LanceDB answers for the other classes."""
    return too_large(dataset_and_truth[0], 1000, kept_rows=COUNT)


@pytest.fixture(params=["exact", "large", "mixed"])
def either(request: pytest.FixtureRequest) -> SynapseIndex:
    return request.getfixturevalue(request.param)


def distances_agree(found: dict, expected: dict[str, list[tuple[int, float]]], rtol: float, atol: float) -> None:
    """The same classes in the same order, the same distances, and ids that differ only where distances tie."""
    assert list(found) == list(expected)
    for name, neighbours in found.items():
        wanted = dict(expected[name])
        assert len(neighbours) == len(wanted)
        distances = np.array([neighbour.distance for neighbour in neighbours])
        assert (np.diff(distances) >= 0).all()
        np.testing.assert_allclose(distances, list(wanted.values()), rtol=rtol, atol=atol)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("query", [0, 17, 4321])
def test_the_nearest_of_every_class_are_the_true_ones(exact: SynapseIndex, truth: Truth, metric: Any, query: int):
    found = exact.search(int(truth.ids[query]), metric, per_class=5)
    expected = truth.nearest(query, metric, 5)
    # Stored vectors are rounded by 1/500 of a component. Distances shift as much, but their order hardly changes.
    distances_agree(found, expected, rtol=5e-3, atol=1e-3)
    assert list(found) == ["acetylcholine", "gaba", "serotonin", UNLABELLED]
    same = [
        neighbour.synapse_id in dict(expected[name]) for name, neighbours in found.items() for neighbour in neighbours
    ]
    assert np.mean(same) >= 0.9


def test_neighbours_say_who_they_are(either: SynapseIndex, truth: Truth) -> None:
    row_of = {int(synapse_id): row for row, synapse_id in enumerate(truth.ids)}
    answer = either.search(int(truth.ids[5]), per_class=6)
    for name, neighbours in answer.items():
        assert len({neighbour.synapse_id for neighbour in neighbours}) == 6
        for neighbour in neighbours:
            row = row_of[neighbour.synapse_id]  # an id that was converted to float64 would not be among them
            assert row != 5
            assert neighbour.neurotransmitter == (None if name == UNLABELLED else name)
            for column in ("neuron_id", "hemilineage", "region", "neurotransmitter"):
                assert getattr(neighbour, column) == truth.columns[column][row]
            assert neighbour.position_nm == (row + 0.5, row * 2.0, row * 3.0)


def test_the_index_agrees_with_the_exact_search(exact: SynapseIndex, large: SynapseIndex, truth: Truth) -> None:
    hits = []
    for query in range(0, COUNT, 300):
        here, there = (index.search(int(truth.ids[query]), per_class=4) for index in (exact, large))
        assert list(here) == list(there)
        for name, neighbours in here.items():
            assert len(neighbours) == len(there[name]) == 4  # even for a class with thirty members
            found = {neighbour.synapse_id: neighbour.distance for neighbour in there[name]}
            hits += [neighbour.synapse_id in found for neighbour in neighbours]
            for neighbour in neighbours:
                if neighbour.synapse_id in found:
                    assert found[neighbour.synapse_id] == pytest.approx(neighbour.distance, abs=1e-6)
    assert np.mean(hits) >= 0.99


def test_a_rare_class_is_given_in_full_where_more_is_asked_for(either: SynapseIndex, truth: Truth, monkeypatch) -> None:
    monkeypatch.setattr(search, "CLASS_NPROBES_FACTOR", 1)  # 16 of 64 partitions, which do not contain all members
    members = truth.columns["neurotransmitter"].count("serotonin")
    assert 10 < members < 60
    query = truth.columns["neurotransmitter"].index("gaba")
    assert len(either.search(int(truth.ids[query]), per_class=100)["serotonin"]) == members


@pytest.mark.parametrize("value", [*NASTY, "AL", "no such region"])
def test_a_filter_compares_whatever_it_is_given(either: SynapseIndex, truth: Truth, value: str) -> None:
    answer = either.search(int(truth.ids[3]), per_class=COUNT, where={"region": value})
    found = sorted(neighbour.synapse_id for neighbours in answer.values() for neighbour in neighbours)
    regions = truth.columns["region"]
    assert found == sorted(int(truth.ids[row]) for row in range(COUNT) if regions[row] == value and row != 3)
    assert all(neighbour.region == value for neighbours in answer.values() for neighbour in neighbours)


def test_filters_combine(either: SynapseIndex, truth: Truth) -> None:
    neuron = 2**63 - 7
    where = {"hemilineage": "07B", "neuron_id": str(neuron), "source": "table"}
    answer = either.search(int(truth.ids[3]), per_class=COUNT, where=where)
    expected = truth.nearest(3, "cosine", COUNT, hemilineage="07B", neuron_id=neuron)
    assert {name: {neighbour.synapse_id for neighbour in found} for name, found in answer.items()} == {
        name: {synapse_id for synapse_id, _ in found} for name, found in expected.items()
    }
    assert sum(len(found) for found in answer.values()) > 10
    by_class = either.search(int(truth.ids[3]), per_class=3, where={"neurotransmitter": "gaba"})
    assert list(by_class) == ["gaba"] and len(by_class["gaba"]) == 3
    assert either.search(int(truth.ids[3]), where={"neurotransmitter": "' OR neurotransmitter IS NULL OR '"}) == {}


@pytest.mark.parametrize("unknown", [0, -1, FIRST_ID, 2**63, 2**80, -(2**70)])
def test_an_unknown_synapse(either: SynapseIndex, unknown: int) -> None:
    with pytest.raises(SynpipeError, match=f"Synapse {unknown} is not in the index of tiny"):
        either.search(unknown)


def test_questions_that_make_no_sense(either: SynapseIndex, truth: Truth) -> None:
    known = int(truth.ids[0])
    with pytest.raises(SynpipeError, match="Unknown metric 'euclid': use one of cosine, l2, dot, l1"):
        either.search(known, "euclid")  # type: ignore[arg-type]
    with pytest.raises(SynpipeError, match="Cannot filter by 'vector': use one of"):
        either.search(known, where={"vector": "1"})
    with pytest.raises(SynpipeError, match="Cannot filter by '1=1 OR region'"):
        either.search(known, where={"1=1 OR region": "AL"})
    for value in ("seven", "", "1.5", "-1", "٣", str(2**63), "1 OR 1=1"):
        with pytest.raises(SynpipeError, match="neuron_id must be a whole number"):
            either.search(known, where={"neuron_id": value})
    for per_class in (0, -1):
        with pytest.raises(SynpipeError, match="at least 1"):
            either.search(known, per_class=per_class)


@pytest.mark.parametrize("metric", ["l1", "l2", "dot"])
def test_a_large_table_answers_cosine_only(large: SynapseIndex, truth: Truth, metric: Any) -> None:
    with pytest.raises(SynpipeError, match=f"{metric} needs an exact search, .* 6,000. Use cosine"):
        large.search(int(truth.ids[0]), metric)


def test_equal_vectors_are_at_no_distance(tmp_path: Path) -> None:
    vectors = clustered(10, 16)
    vectors[7] = vectors[2]
    dataset = make(tmp_path, vectors, neurotransmitter=["gaba"] * 10)
    index = SynapseIndex(dataset, "tiny")
    for metric in ("cosine", "l2", "l1"):
        (nearest,) = index.search(2, metric, per_class=1)["gaba"]  # type: ignore[arg-type]
        assert nearest.synapse_id == 7
        assert nearest.distance == pytest.approx(0, abs=1e-5)


def test_an_index_answers_from_the_version_it_was_opened_with(tmp_path: Path) -> None:
    dataset = make(tmp_path, clustered(50, 16), neurotransmitter=["gaba"] * 50)
    for rows, index in ((300_000, SynapseIndex(dataset, "tiny")), (0, SynapseIndex(dataset, "tiny", in_memory=False))):
        before = index.search(3)
        path = embedding_table(tmp_path / "other.parquet", clustered(80, 24, seed=rows + 1), 2)
        publish(path, dataset.lancedb_folder, "tiny", "b" * 32, lambda line: None)
        assert index.search(3) == before
        assert list(SynapseIndex(dataset, "tiny").search(3)) == [UNLABELLED]
        make(tmp_path, clustered(50, 16), neurotransmitter=["gaba"] * 50)


def test_no_index(tmp_path: Path) -> None:
    dataset = make(tmp_path, clustered(5, 16))
    with pytest.raises(SynpipeError, match=r"no index other .* materialise index_other"):
        SynapseIndex(dataset, "other")


def test_conditions_of_the_command_line() -> None:
    assert parse_where(["region=AL", " hemilineage = a=b ", "neuron_id=5"]) == {
        "region": "AL",
        "hemilineage": "a=b",
        "neuron_id": "5",
    }
    for wrong, words in (("region", "column=value"), ("colour=red", "Cannot filter"), ("neuron_id=x", "whole number")):
        with pytest.raises(SynpipeError, match=words):
            parse_where([wrong])
