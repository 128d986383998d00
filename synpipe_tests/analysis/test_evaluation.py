"""The figures of an encoder agree with plain definitions, and they show when a split leaks neurons."""

import json

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, recall_score
from sklearn.metrics import confusion_matrix as sklearn_confusion

from synpipe.analysis import evaluation, metrics, splits
from synpipe.analysis.evaluation import EvaluationSpec, draw_judged, draw_queries, probe_test_side, search_all
from synpipe.analysis.linear_probe import fit_probe
from synpipe.analysis.metrics import Estimate, estimate, resample
from synpipe.analysis.splits import SplitSpec, split
from synpipe.assets.manifest import read_manifest
from synpipe.datasets import Dataset
from synpipe.store.files import read_table

WINDOW = (3, 256, 256)
CLASSES = tuple(f"class {number}" for number in range(6))


def objects(values) -> np.ndarray:
    return np.array([*values, None], dtype=object)[:-1]


def apart(count: int) -> np.ndarray:
    """First voxels of tiles that do not overlap: int64 (count, 3)."""
    return np.arange(count)[:, None] * np.array([0, 0, 1000])


def unit(vectors: np.ndarray) -> np.ndarray:
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def six_classes(of_class: float, of_neuron: float, seed: int = 0):
    """Vectors of 60 neurons with 20 synapses each, labels and neurons.

    of_class, of_neuron: how strongly the class and the neuron of a synapse shape its vector.
    """
    rng = np.random.default_rng(seed)
    neurons = np.repeat(np.arange(60), 20)
    classes = neurons % 6
    vectors = of_class * rng.normal(size=(6, 80))[classes] + of_neuron * rng.normal(size=(60, 80))[neurons]
    return (
        unit(vectors + rng.normal(size=(1200, 80))),
        objects(f"class {c}" for c in classes),
        objects(neurons.tolist()),
    )


def probed(vectors, labels, neurons, scheme: str) -> Estimate:
    groups = neurons if scheme == "neuron" else objects(range(len(labels)))
    sides = split(SplitSpec(), scheme, labels, groups, apart(len(labels)), WINDOW)
    tested = probe_test_side(vectors, labels, sides, CLASSES, EvaluationSpec())
    assert tested is not None
    rows, correct = tested
    return estimate(correct.astype(float), labels[rows], neurons[rows].astype(int))


def test_the_random_split_shows_the_leak_and_the_split_by_neuron_does_not():
    """Every neuron looks different, and only its identity tells its class."""
    leaky = six_classes(of_class=0, of_neuron=2)
    by_neuron, at_random = probed(*leaky, "neuron"), probed(*leaky, "random")
    assert at_random.value > 0.9
    assert by_neuron.value < 0.4
    assert by_neuron.high < at_random.low


def test_on_six_classes_the_probe_of_new_neurons_is_clearly_above_chance():
    by_neuron = probed(*six_classes(of_class=1, of_neuron=0.5), "neuron")
    assert by_neuron.low > 2 / 6


def test_the_probe_is_the_one_that_the_classifier_fits():
    """On the same rows, the evaluation predicts exactly what the classifier would predict."""
    vectors, labels, neurons = six_classes(of_class=0.4, of_neuron=0.5)
    sides = split(SplitSpec(), "neuron", labels, neurons, apart(len(labels)), WINDOW)
    codes = np.array([CLASSES.index(label) for label in labels])
    training, validation, test = (sides == side for side in splits.SIDES)
    classifier = fit_probe(vectors[training], codes[training], vectors[validation], codes[validation], len(CLASSES))
    predicted = classifier.probabilities(vectors[test]).argmax(axis=1)
    tested = probe_test_side(vectors, labels, sides, CLASSES, EvaluationSpec())
    assert tested is not None
    assert tested[0].tolist() == np.flatnonzero(test).tolist()
    assert tested[1].tolist() == (predicted == codes[test]).tolist()
    assert 0.3 < tested[1].mean() < 0.95


def test_neighbours_of_the_own_neuron_are_no_answers():
    """If they were, a data set in which only synapses of one neuron look alike would have perfect neighbours."""
    vectors, labels, neurons = six_classes(of_class=0, of_neuron=2)
    queries = np.arange(len(labels))
    strict = search_all(vectors, labels, neurons, apart(1200), WINDOW, queries)
    naive = search_all(vectors, labels, objects([None] * 1200), apart(1200), WINDOW, queries)
    assert (strict.voted == labels).mean() < 0.35
    assert (naive.voted == labels).mean() > 0.9


def test_the_search_against_its_definition():
    rng = np.random.default_rng(3)
    count = 150
    vectors = unit(rng.normal(size=(count, 6)))
    labels, neurons = objects(rng.choice(["a", "b", "c"], count).tolist()), objects(rng.integers(0, 30, count).tolist())
    labels[::9], neurons[::7] = None, None
    starts = np.column_stack([rng.integers(0, 8, count), rng.integers(0, 1500, (count, 2))])
    queries = draw_queries(labels, EvaluationSpec())
    assert sorted(queries) == [row for row in range(count) if labels[row] is not None]
    found = search_all(vectors, labels, neurons, starts, WINDOW, queries)
    excluded = 0
    for place, query in enumerate(queries):
        overlap = (abs(starts - starts[query]) < WINDOW).all(axis=1)
        own = np.array([neuron is not None and neuron == neurons[query] for neuron in neurons])
        allowed = [row for row in range(count) if labels[row] is not None and not overlap[row] and not own[row]]
        excluded += int((overlap | own).sum()) - 1
        similarity = vectors[allowed] @ vectors[query]
        same = np.array([labels[row] == labels[query] for row in allowed])
        order = np.argsort(-similarity)
        assert found.nearest[place].tolist() == np.array(allowed)[order][:10].tolist()
        assert found.average_precision[place] == pytest.approx(average_precision_score(same, similarity), abs=1e-6)
        assert found.precision[place] == pytest.approx(same[order][:10].mean())
        votes = [labels[row] for row in np.array(allowed)[order][:10]]
        most = max(map(votes.count, votes))
        assert votes.count(found.voted[place]) == most
    assert excluded > 100


def test_equal_votes_go_to_the_nearer():
    angles = np.deg2rad([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10])
    vectors = unit(np.column_stack([np.cos(angles), np.sin(angles)]))
    labels = objects(["b", *["b"] * 5, *["a"] * 5])
    found = search_all(vectors, labels, objects([None] * 11), apart(11), WINDOW, np.array([0]))
    assert found.voted.tolist() == ["b"]
    found = search_all(
        vectors, objects(["b", *["a"] * 5, *["b"] * 5]), objects([None] * 11), apart(11), WINDOW, np.array([0])
    )
    assert found.voted.tolist() == ["a"]


def test_synapses_of_no_class_find_neighbours_where_no_class_is_known():
    vectors = unit(np.random.default_rng(0).normal(size=(30, 4)))
    nothing = objects([None] * 30)
    queries = draw_queries(nothing, EvaluationSpec(queries=12))
    found = search_all(vectors, nothing, nothing, apart(30), WINDOW, queries)
    assert len(queries) == 12
    assert (found.nearest >= 0).all()
    assert np.isnan(found.average_precision).all()
    assert found.voted.tolist() == [None] * 12


def test_queries_are_even_over_classes_and_of_the_seed_alone():
    labels = objects(["a"] * 900 + ["b"] * 90 + ["c"] * 10 + [None] * 50)
    queries = draw_queries(labels, EvaluationSpec(queries=150))
    assert [int((labels[queries] == name).sum()) for name in "abc"] == [50, 50, 10]
    assert queries.tolist() == draw_queries(labels, EvaluationSpec(queries=150)).tolist()
    assert queries.tolist() != draw_queries(labels, EvaluationSpec(queries=150, seed=1)).tolist()


def test_the_intervals_cover_the_truth_because_whole_neurons_are_resampled():
    rng = np.random.default_rng(0)
    covered = {"neurons": 0, "synapses": 0}
    trials, truth = 60, 0.6
    labels = objects(["a"] * 240)
    for _ in range(trials):
        skill = rng.beta(0.6, 0.4, 30)  # mean 0.6: some neurons are easy, some are hard
        values = (rng.random(240) < np.repeat(skill, 8)).astype(float)
        for name, groups in (("neurons", np.repeat(np.arange(30), 8)), ("synapses", np.arange(240))):
            found = estimate(values, labels, groups)
            covered[name] += found.low <= truth <= found.high
    assert covered["neurons"] / trials > 0.85
    assert covered["synapses"] / trials < 0.8


def test_classes_count_alike_and_absent_values_not_at_all():
    values = np.array([1, 1, 1, 1, 0, np.nan])
    labels, groups = objects(["a", "a", "a", "a", "b", "b"]), np.arange(6)
    value, samples = resample(values, labels, groups)
    assert value == 0.5
    assert {0.5, 1.0} <= {*samples}  # in a sample without b, the mean is that of a
    assert resample(values, labels, groups, weights={"a": 4, "b": 1})[0] == pytest.approx(0.8)
    assert (resample(values, labels, groups)[1] == samples).all()
    assert estimate(values, labels, np.zeros(6, dtype=int)) == Estimate(0.5)
    assert estimate(np.full(6, np.nan), labels, groups) == Estimate(None)


def test_the_confusion_matrix_and_the_recalls_agree_with_scikit_learn():
    rng = np.random.default_rng(0)
    truth, predicted = rng.choice([0, 1, 3], 500).astype(np.int8), rng.integers(0, 4, 500).astype(np.int8)
    confusion = metrics.confusion_matrix(truth, predicted, 4)
    assert confusion.tolist() == sklearn_confusion(truth, predicted, labels=range(4)).tolist()
    recalls = recall_score(truth, predicted, labels=[0, 1, 3], average=None)
    np.testing.assert_array_equal(metrics.class_recalls(truth, predicted, 4), [*recalls[:2], np.nan, recalls[2]])
    np.testing.assert_array_equal(np.diagonal(metrics.row_shares(confusion))[[0, 1, 3]], recalls)
    assert metrics.row_shares(confusion)[2].tolist() == [0, 0, 0, 0]
    assert metrics.balanced_accuracy(truth, predicted) == recall_score(
        truth, predicted, labels=[0, 1, 3], average="macro"
    )
    predicted[:100] = -1
    assert metrics.confusion_matrix(truth, predicted, 4).sum() == 400


def test_accuracy_weighs_classes_by_their_size_though_the_queries_are_even():
    labels = objects(["a"] * 90 + ["b"] * 10)
    voted = objects([None] * 100)
    voted[:5], voted[90:95] = "a", "a"  # five queries of each class: all of a are correct, all of b are wrong
    rows = {
        "label": labels,
        "voted": voted,
        "group": np.arange(100),
        "average_precision": np.full(100, np.nan),
        "precision_at_10": np.full(100, np.nan),
        "instance_rank": np.full(100, np.nan),
        **{f"probe_{scheme}": np.full(100, np.nan) for scheme in splits.SCHEMES},
    }
    figures = evaluation.measure(rows, 0)
    assert figures["knn_accuracy"].value == pytest.approx(0.9)
    assert figures["knn_balanced_accuracy"].value == pytest.approx(0.5)
    assert figures["map"].value is None


def test_a_probe_without_a_second_class_or_a_test_side_is_none():
    vectors = unit(np.random.default_rng(0).normal(size=(20, 4)))
    for labels, sides in (
        (objects(["a"] * 20), objects(["train", "test"] * 10)),
        (objects(["a", "b"] * 10), objects(["train"] * 20)),
        (objects(["a", "b"] * 10), objects([None] * 20)),
    ):
        assert probe_test_side(vectors, labels, sides, ("a", "b"), EvaluationSpec()) is None


def test_the_figures_of_a_data_set(made: Dataset):
    rows = {row["encoder"]: row for row in read_table(made.evaluation_path).to_pylist()}
    assert list(rows) == list(made.encoders)
    count = read_manifest(made, "rgb_tiles").rows
    for name, row in rows.items():
        report = json.loads(made.scores_path(name).read_text())
        for figure in ("instance_recall_at_1", "instance_recall_at_5", "knn_balanced_accuracy", "map", "probe_random"):
            assert 0 <= row[f"{figure}_low"] <= row[figure] <= row[f"{figure}_high"] <= 1
            assert report["figures"][figure]["value"] == row[figure]
        assert row["index_recall"] >= 0.99
        assert row["bytes_per_vector"] == read_manifest(made, f"embedding_table_{name}").figures["bytes_per_vector"]
        assert set(report["classes"]) <= set(made.spec.classes)
        table = read_table(made.queries_path(name))
        assert len(table) == count
        neuron = dict(
            zip(*(read_table(made.synapses_path)[key].to_pylist() for key in ("synapse_id", "neuron_id")), strict=True)
        )
        for query, nearest in zip(table["synapse_id"].to_pylist(), table["nearest"].to_pylist(), strict=True):
            assert neuron[query] not in {neuron[one] for one in nearest or []}


def test_of_many_synapses_a_sample_is_judged_those_of_known_class_first():
    labels = objects([None, "a", None, "b"] * 500)
    assert draw_judged(labels, EvaluationSpec()).tolist() == list(range(2000))
    few, more = (draw_judged(labels, EvaluationSpec(synapses=count)) for count in (300, 1200))
    assert len(few) == 300 and all(labels[row] is not None for row in few)
    assert 100 < sum(labels[row] == "a" for row in few) < 200
    assert len(more) == 1200 and sum(labels[row] is not None for row in more) == 1000
    assert (np.diff(few) > 0).all() and (np.diff(more) > 0).all()
    assert draw_judged(labels, EvaluationSpec(synapses=300, seed=1)).tolist() != few.tolist()


def test_figures_do_not_depend_on_how_much_is_in_memory_at_a_time(monkeypatch):
    vectors, labels, neurons = six_classes(0.6, 0.6)
    values = (vectors[:, 0] > 0).astype(float)

    def measured():
        queries = draw_queries(labels, EvaluationSpec(queries=60))
        found = search_all(vectors, labels, neurons, apart(len(labels)), WINDOW, queries)
        return found.nearest, found.average_precision, resample(values, labels, neurons.astype(np.int64), 3)[1]

    at_once = measured()
    monkeypatch.setattr(evaluation, "PAIRS", 7 * len(labels))
    monkeypatch.setattr(metrics, "RESAMPLED_AT_ONCE", 60 * 13)
    for one, other in zip(at_once, measured(), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-12)
