"""The classifier: its training rows, its predictions, the votes of neurons, and the figures of the test side."""

import json
import shutil
from pathlib import Path

import duckdb
import lancedb
import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from synpipe.analysis import classifier_scores
from synpipe.analysis.classifier_scores import (
    NeuronVotes,
    predictions_table,
    read_probabilities,
    score_test_side,
    votes_of_neurons,
)
from synpipe.analysis.linear_probe import Balance, class_weights, fit_probe, fit_temperature, sample_rows
from synpipe.annotations.schema import SYNAPSE_SCHEMA
from synpipe.assets import classifier
from synpipe.assets.asset import Task
from synpipe.assets.embedding_table import DERIVED_FIELDS
from synpipe.assets.graph import states
from synpipe.assets.manifest import read_manifest
from synpipe.datasets import Project
from synpipe.errors import SynpipeError
from synpipe.store.files import read_table, write_table
from synpipe_tests.bench.balance import recalls
from synpipe_tests.support.command import answer, invoke, refusal
from synpipe_tests.support.textures import CLASSES, change_spec, make_outdated, write_textures

PREDICTED = ["predicted_neurotransmitter", "predicted_probability", "class_probabilities", "split"]


def clusters(counts: tuple[int, ...], seed: int = 0, spread: float = 0.5) -> tuple[np.ndarray, np.ndarray]:
    """Vectors around a centre per class, and their classes as numbers."""
    centres = np.random.default_rng(0).normal(size=(len(counts), 16))
    codes = np.repeat(np.arange(len(counts)), counts)
    random = np.random.default_rng(seed + 1)
    vectors = centres[codes] + spread * random.normal(size=(len(codes), 16))
    return (vectors * random.uniform(0.5, 3, (len(codes), 1))).astype(np.float32), codes


# The probe.


def test_a_probe_learns_what_can_be_learned_and_gives_probabilities():
    training, validation, test = (clusters((60, 40, 20), seed) for seed in range(3))
    probe = fit_probe(*training, *validation, classes=3)
    probabilities = probe.probabilities(test[0])
    assert probabilities.dtype == np.float32
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, atol=1e-5)
    assert np.mean(probabilities.argmax(axis=1) == test[1]) > 0.9
    # Only the direction of a vector counts, not its length.
    np.testing.assert_allclose(probe.probabilities(7 * test[0]), probabilities, atol=1e-5)
    again = fit_probe(*training, *validation, classes=3)
    np.testing.assert_array_equal(again.probabilities(test[0]), probabilities)


def test_two_classes_of_four_and_no_validation_rows():
    vectors, codes = clusters((30, 30))
    codes = np.array([1, 3])[codes]
    probe = fit_probe(vectors, codes, vectors[:0], codes[:0], classes=4)
    probabilities = probe.probabilities(vectors)
    assert (probabilities[:, [0, 2]] == 0).all()
    assert np.mean(probabilities.argmax(axis=1) == codes) > 0.95
    # Validation rows of a class without training rows are ignored.
    other = fit_probe(vectors, codes, vectors[:5], np.array([0, 0, 1, 3, 3]), classes=4)
    assert np.isfinite(other.probabilities(vectors)).all()


def test_probabilities_are_calibrated():
    """About a share p of the predictions with probability p is correct, although the classes overlap."""
    training, validation, test = (clusters((400, 400, 400), seed, spread=2.0) for seed in range(3))
    probabilities = fit_probe(*training, *validation, classes=3).probabilities(test[0])
    right = probabilities.argmax(axis=1) == test[1]
    assert 0.5 < right.mean() < 0.95
    assert abs(probabilities.max(axis=1).mean() - right.mean()) < 0.05


def test_few_validation_rows_without_an_error_are_no_reason_for_certainty():
    logits = np.array([[9.0, 0], [9, 0], [0, 9], [0, 9]])
    temperature = fit_temperature(logits, np.array([0, 0, 1, 1]))
    assert 1 / (1 + np.exp(-9 / temperature)) == pytest.approx(3 / 4, abs=0.01)


@pytest.mark.parametrize(
    ("balance", "shares"), [("none", (6, 3, 1)), ("balanced", (1, 1, 1)), ("log", (6 * 0.5108, 3 * 1.2040, 1 * 2.3026))]
)
def test_what_share_each_class_has(balance: Balance, shares: tuple[float, ...]):
    codes = np.repeat([0, 1, 2], [60, 30, 10])
    weights = class_weights(codes, 4, balance)
    assert weights[3] == 0
    assert weights[codes].mean() == pytest.approx(1)
    found = np.bincount(codes, weights=weights[codes])
    np.testing.assert_allclose(found / found.sum(), np.array(shares) / np.sum(shares), atol=1e-4)


def test_a_rare_class_is_found_more_often_when_classes_are_balanced():
    by_class = {balance: recalls(0, balance)[0] for balance in ("balanced", "none")}
    assert by_class["balanced"][-2:].mean() > by_class["none"][-2:].mean() + 0.2
    assert by_class["balanced"].mean() > by_class["none"].mean()


def test_training_rows_are_cut_down_at_the_largest_classes():
    codes = np.repeat([0, 1, 2], [500, 90, 10])
    chosen = sample_rows(codes, most=200)
    assert np.bincount(codes[chosen]).tolist() == [100, 90, 10]
    assert (np.diff(chosen) > 0).all()
    assert sample_rows(codes, most=600).tolist() == list(range(600))


# Votes and figures.


def predictions(rows: list[tuple[int | None, str | None, str | None, list[float]]]) -> pa.Table:
    """Rows are neuron, side, annotated class and probabilities. Synapse ids count from 1."""
    neurons, sides, labels, probabilities = zip(*rows, strict=True)
    synapses = pa.table(
        {
            "synapse_id": pa.array(range(1, len(rows) + 1), pa.int64()),
            "neuron_id": pa.array(neurons, pa.int64()),
            "neurotransmitter": pa.array(labels, pa.string()),
        }
    )
    return predictions_table(synapses, pa.array(sides, pa.string()), np.array(probabilities, np.float32), ("a", "b"))


def test_neurons_vote():
    table = predictions(
        [
            (7, "test", "a", [0.9, 0.1]),
            (7, "test", "a", [0.45, 0.55]),
            (7, "guard", "a", [0.45, 0.55]),
            (3, "train", "b", [0.9, 0.1]),
            (3, "train", "b", [0.4, 0.6]),
            (None, None, None, [0.2, 0.8]),
        ]
    )
    three, seven = votes_of_neurons(table, ("a", "b")).to_pylist()
    assert (seven["neuron_id"], seven["synapses"], seven["split"]) == (7, 3, None)
    assert (seven["neurotransmitter"], seven["predicted_neurotransmitter"]) == (
        "a",
        "b",
    )  # two votes of three, although with low probability
    assert seven["vote_share"] == pytest.approx(2 / 3)
    assert seven["confidence"] == pytest.approx(0.4)
    np.testing.assert_allclose(seven["class_probabilities"], [0.6, 0.4], atol=1e-6)
    assert (three["split"], three["predicted_neurotransmitter"]) == (
        "train",
        "a",
    )  # one vote each: the higher probability wins


def test_votes_and_figures_are_the_same_however_the_synapses_are_spread_over_parts(monkeypatch):
    random = np.random.default_rng(0)
    shares = random.dirichlet([1, 1], 400).astype(np.float32)
    neurons = [None if number == 0 else number for number in random.integers(0, 40, 400).tolist()]
    sides = random.choice(["train", "test", "guard"], 400).tolist()
    table = predictions(list(zip(neurons, sides, random.choice(["a", "b"], 400).tolist(), shares, strict=True)))
    monkeypatch.setattr(classifier_scores, "MERGED_ROWS", 0)
    votes = NeuronVotes(("a", "b"))
    parts = [table.slice(start, 37) for start in range(0, 400, 37)]
    for part in parts:
        votes.add(part)
    found, whole = votes.table(), votes_of_neurons(table, ("a", "b"))
    assert found.drop_columns(["confidence", "class_probabilities"]).equals(
        whole.drop_columns(["confidence", "class_probabilities"])
    )
    np.testing.assert_allclose(found["confidence"].to_numpy(), whole["confidence"].to_numpy(), rtol=1e-6)
    assert score_test_side(parts, ("a", "b")) == score_test_side([table], ("a", "b"))


def test_figures_are_of_the_test_side_alone_and_neurons_vote_there():
    right, wrong = [0.9, 0.1], [0.1, 0.9]
    rows = [(1, "test", "a", right)] * 3 + [(1, "test", "a", wrong)] + [(2, "test", "a", wrong)] * 4
    rows += [(3, "test", "b", wrong)] * 2
    elsewhere = [(side, "a") for side in ("train", "validation", "guard", None)]
    rows += [(1, side, label, wrong) for side, label in elsewhere] * 5 + [(1, "test", None, wrong)] * 5
    figures = score_test_side([predictions(rows)], ("a", "b"))
    assert figures["confusion"]["synapses"] == [[3, 5], [0, 2]]
    assert figures["confusion"]["neurons"] == [[1, 1], [0, 1]]
    assert figures["recalls"]["a"]["recall"] == pytest.approx(3 / 8)
    assert figures["recalls"]["a"]["neuron_recall"] == 0.5
    assert figures["balanced_accuracy"] == pytest.approx((3 / 8 + 1) / 2, abs=1e-4)
    assert figures["accuracy"] == 0.5
    # Two neurons, one mostly right and one all wrong: the interval is that of two groups, not of eight synapses.
    assert figures["recalls"]["a"]["recall_low"] == 0
    assert figures["recalls"]["a"]["recall_high"] == 0.75
    assert json.loads(json.dumps(figures)) == figures
    assert score_test_side([predictions([(1, "train", "a", right)])], ("a", "b")) == {}


# The asset.


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """The textures data set with all assets. Shared: copy it to change it."""
    project = write_textures(tmp_path_factory.mktemp("textures"))
    make_outdated(project)
    return project


@pytest.fixture
def own(made: Project, tmp_path: Path) -> Project:
    shutil.copytree(made.data.parent, tmp_path, dirs_exist_ok=True)
    return Project(tmp_path / "data", tmp_path / "store")


def relabel(project: Project, ids: list[int], label: str) -> None:
    path = project.data / "datasets" / "synapses.csv"
    lines = path.read_text().splitlines()
    changed = [f"{line.rsplit(',', 1)[0]},{label}" if line.split(",")[0] in map(str, ids) else line for line in lines]
    path.write_text("\n".join(changed))


def test_every_synapse_has_a_prediction_beside_what_is_known(made: Project):
    dataset = made.dataset("demo")
    rows = read_table(dataset.table_path("tiny")).to_pylist()
    assert {row["neurotransmitter"] for row in rows} == {*CLASSES, None}
    for row in rows:
        assert row["predicted_neurotransmitter"] in CLASSES
        assert sum(row["class_probabilities"]) == pytest.approx(1, abs=1e-3)
        assert row["predicted_probability"] == max(row["class_probabilities"])
        assert CLASSES[int(np.argmax(row["class_probabilities"]))] == row["predicted_neurotransmitter"]
    assert {row["split"] for row in rows if row["neurotransmitter"]} == {"train", "validation", "test"}
    assert {row["split"] for row in rows if not row["neurotransmitter"]} == {None}
    test = [row for row in rows if row["split"] == "test"]
    assert np.mean([row["predicted_neurotransmitter"] == row["neurotransmitter"] for row in test]) > 0.8
    # Synapses without a class take the textures in turn, see `textures`.
    unknown = sorted((row for row in rows if not row["neurotransmitter"]), key=lambda row: row["synapse_id"])
    truth = [CLASSES[(row["synapse_id"] - 1000) % 3] for row in unknown]
    assert [row["predicted_neurotransmitter"] for row in unknown] == truth


def test_the_evaluation_reports_the_model_of_the_classifier(own: Project):
    """The evaluation reads vectors that the table has rounded, so the two probes agree to a rounding error."""
    change_spec(own, evaluation={"queries": 10, "places": 10, "singles": 1})
    make_outdated(own)
    dataset = own.dataset("demo")
    figures = read_manifest(dataset, "classifier_tiny").figures
    report = json.loads(dataset.scores_path("tiny").read_text())
    for end in ("", "_low", "_high"):
        probe = report["figures"]["probe_neuron"][end.removeprefix("_") or "value"]
        assert probe == pytest.approx(figures[f"balanced_accuracy{end}"], abs=1e-3)


def test_predictions_are_in_lancedb_and_other_tools_read_them(made: Project):
    dataset = made.dataset("demo")
    path = dataset.table_path("tiny")
    table = lancedb.connect(dataset.lancedb_folder).open_table("tiny")
    table.checkout("current")
    rows = read_table(path)
    for name in PREDICTED:
        assert table.to_arrow()[name].to_pylist() == rows[name].to_pylist()
    assert pl.read_parquet(path)["class_probabilities"].to_list() == rows["class_probabilities"].to_pylist()
    found = duckdb.sql(f"SELECT count(*), min(class_probabilities[1]) FROM '{path}' WHERE split = 'test'").fetchall()
    assert found[0][0] == rows["split"].to_pylist().count("test")
    said = json.loads(
        answer(made, "search", "1000", "--where", "predicted_neurotransmitter=fine", "--where", "split=test", "--json")
    )
    near = {one["synapse_id"] for group in said["neighbours"].values() for one in group}
    by_id = {str(row["synapse_id"]): row for row in rows.to_pylist()}
    assert near
    assert {(by_id[one]["predicted_neurotransmitter"], by_id[one]["split"]) for one in near} == {("fine", "test")}


def test_classes_of_the_test_side_teach_nothing(own: Project):
    dataset = own.dataset("demo")
    before = read_table(dataset.predictions_path("tiny"))
    test = {row["synapse_id"] for row in before.to_pylist() if row["split"] == "test"}
    rows = read_table(dataset.synapses_path).to_pylist()
    wrong = dict(zip(CLASSES, [*CLASSES[1:], CLASSES[0]], strict=True))
    for row in rows:
        if row["synapse_id"] in test:
            row["neurotransmitter"] = wrong[row["neurotransmitter"]]
    write_table(dataset.synapses_path, pa.Table.from_pylist(rows, SYNAPSE_SCHEMA))
    made = classifier.make(Task(dataset, "tiny", {"synapses": "relabelled"}, None, False, lambda line: None))
    after = read_table(dataset.predictions_path("tiny"))
    np.testing.assert_array_equal(read_probabilities(after), read_probabilities(before))
    assert after["neurotransmitter"].to_pylist() != before["neurotransmitter"].to_pylist()
    assert (
        made.figures["balanced_accuracy"] < 0.2
    )  # the predictions were right, so they are wrong for the changed labels


def test_neurons_vote_in_a_table_of_their_own(made: Project):
    rows = read_table(made.dataset("demo").neuron_predictions_path("tiny")).to_pylist()
    assert len(rows) == 27
    test = [row for row in rows if row["split"] == "test"]
    assert len(test) >= 3
    assert all(row["predicted_neurotransmitter"] == row["neurotransmitter"] for row in test)
    assert all(row["synapses"] == 4 and 0 < row["vote_share"] <= 1 and 0 < row["confidence"] <= 1 for row in rows)


def test_without_a_classifier_the_columns_are_null_and_the_schema_is_the_same(own: Project):
    schema = pq.read_schema(own.dataset("demo").table_path("tiny"))
    change_spec(own, classifier=None)
    dataset = own.dataset("demo")
    assert make_outdated(own) == {"embedding_table_tiny", "index_tiny"}
    assert not [state.asset for state in states(dataset) if state.asset.startswith("classifier")]
    table = read_table(dataset.table_path("tiny"))
    assert table.schema.remove_metadata() == schema.remove_metadata()
    assert {field.name for field in DERIVED_FIELDS} >= set(PREDICTED)
    assert all(table[name].null_count == len(table) for name in PREDICTED)


def test_too_few_classes_to_learn_are_noted_and_stop_nothing(own: Project):
    dataset = own.dataset("demo")
    rows = read_table(dataset.synapses_path).to_pylist()
    relabel(own, [row["synapse_id"] for row in rows if row["neurotransmitter"]], "fine")
    make_outdated(own)
    manifest = read_manifest(dataset, "classifier_tiny")
    assert any("fewer than 2 classes (fine)" in note for note in manifest.notes)
    table = read_table(dataset.table_path("tiny"))
    assert table["predicted_neurotransmitter"].null_count == len(table) == 112
    assert "train" in table["split"].to_pylist()
    assert classifier.predictions_are_whole(dataset, "tiny").passed
    assert not dataset.neuron_predictions_path("tiny").exists()
    assert "fewer than 2 classes" in refusal(invoke(own, "confusion"))


def test_the_check_finds_predictions_that_are_missing_or_no_probabilities(own: Project):
    dataset = own.dataset("demo")
    assert classifier.predictions_are_whole(dataset, "tiny").passed
    path = dataset.predictions_path("tiny")
    table = read_table(path)
    write_table(path, table.slice(1))
    assert not classifier.predictions_are_whole(dataset, "tiny").passed
    place = table.schema.get_field_index("class_probabilities")
    for value, said in (([0.5, np.nan, 0.5], "not finite"), ([0.5, 0.1, 0.1], "do not sum to one"), (None, "1 tiles")):
        values = [value, *table["class_probabilities"].to_pylist()[1:]]
        write_table(path, table.set_column(place, table.schema.field(place), pa.array(values, pa.list_(pa.float32()))))
        finding = classifier.predictions_are_whole(dataset, "tiny")
        assert not finding.passed and said in finding.description


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ({"method": "forest"}, "'linear', 'finetune'"),
        ({"method": "linear", "epochs": 3}, "epochs"),
        ({"method": "finetune", "epochs": 0}, "epochs"),
        ({"method": "linear", "balance": "even"}, "'balanced', 'log' or 'none'"),
    ],
)
def test_a_wrong_spec_is_named(tmp_path: Path, spec: dict, said: str):
    project = write_textures(tmp_path, classifier=spec)
    with pytest.raises(SynpipeError, match=r"demo\.yaml: `classifier") as raised:
        project.dataset("demo")
    assert said in str(raised.value)


def test_figures_in_the_terminal_and_as_a_picture(made: Project, tmp_path: Path):
    said = answer(made, "confusion", "--picture", str(tmp_path / "confusion.png"))
    figures = read_manifest(made.dataset("demo"), "classifier_tiny").figures
    for name in CLASSES:
        assert f"{figures['recalls'][name]['recall']:.2f} (" in next(
            line for line in said.splitlines() if line.startswith(name)
        )
    assert "Eckstein" not in said  # no publication has a class of these names
    assert min(Image.open(tmp_path / "confusion.png").size) > 300
    votes = answer(made, "confusion", "--neurons")
    assert f"{'coarse':<16}" in votes and "neurons" in votes
    content = json.loads(answer(made, "confusion", "--json"))
    assert content["confusion"]["synapses"] == figures["confusion"]["synapses"]


def test_published_figures_stand_beside_classes_of_the_same_name(own: Project):
    path = own.data / "datasets" / "synapses.csv"
    path.write_text(path.read_text().replace("coarse", "gaba"))
    spec = yaml.safe_load((own.data / "datasets" / "demo.yaml").read_text())
    change_spec(own, classes=["gaba", *spec["classes"][1:]])
    make_outdated(own)
    said = answer(own, "confusion")
    assert "Eckstein et al. 2024" in said
    row = next(line for line in said.splitlines() if line.startswith("gaba"))
    assert row.split()[-2:] == ["0.96", "0.95"]
