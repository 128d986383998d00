"""Splits: groups and overlapping tiles stay on one side for any data, and classes that cannot be divided are reported."""

import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from synpipe.analysis import splits
from synpipe.analysis.splits import GUARD, SIDES, TEST, TRAIN, VALIDATION, SplitSpec, split
from synpipe.assets.manifest import read_manifest
from synpipe.assets.split import sides_are_apart
from synpipe.datasets import Dataset, Project
from synpipe.errors import SynpipeError
from synpipe.store.files import read_table, write_table

WINDOW = (3, 256, 256)
SPREAD = 4096  # range of the first voxels of tiles, small enough that many tiles overlap


def objects(values) -> np.ndarray:
    return np.array([*values, None], dtype=object)[:-1]


@st.composite
def crowds(draw):
    """Labels, groups and tiles of up to 150 synapses. Groups may contain two classes; some labels and groups are unknown."""
    count = draw(st.integers(0, 150))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    group = rng.integers(0, draw(st.integers(1, 25)), count)
    labels = objects(np.array(["a", "b", "c"])[(group + (rng.random(count) < 0.1)) % 3].tolist())
    labels[rng.random(count) < 0.1] = None
    groups = objects(group.tolist())
    groups[rng.random(count) < 0.1] = None
    starts = np.column_stack([rng.integers(0, 30, count), rng.integers(0, SPREAD, (count, 2))])
    return labels, groups, starts


@settings(deadline=None, max_examples=80)
@given(crowds(), st.sampled_from(["neuron", "hemilineage", "region"]), st.integers(0, 5), st.randoms())
def test_no_group_and_no_overlapping_tiles_on_two_sides(crowd, scheme, seed, random):
    labels, groups, starts = crowd
    spec = SplitSpec(seed=seed)
    sides = split(spec, scheme, labels, groups, starts, WINDOW)
    known = np.array([a is not None and b is not None for a, b in zip(labels, groups, strict=True)], dtype=bool)
    assert all(side in (*SIDES, GUARD) for side in sides[known])
    assert all(side is None for side in sides[~known])
    for side in SIDES:
        here, elsewhere = sides == side, np.isin(sides, [each for each in SIDES if each != side])
        assert not {*groups[here]} & {*groups[elsewhere]}
        apart = np.abs(starts[here][:, None] - starts[elsewhere][None]) >= np.array(WINDOW)
        assert apart.any(axis=2).all()
    assert splits.faults(sides, groups, starts, WINDOW)[0] == []
    assert len(splits.faults(sides, groups, starts, WINDOW)[1]) == 0

    order = random.sample(range(len(labels)), len(labels))
    again = split(spec, scheme, labels[order], groups[order], starts[order], WINDOW)
    assert (again == sides[order]).all()


def test_the_guard_takes_from_training_what_overlaps_a_test_tile_and_nothing_else():
    labels, groups = objects(["a"] * 40), objects(range(40))
    starts = np.column_stack([np.zeros(40, int), np.zeros(40, int), np.arange(40) * 10_000])
    alone = split(SplitSpec(), "neuron", labels, groups, starts, WINDOW)
    (test, *_), (train, other, *_) = np.flatnonzero(alone == TEST), np.flatnonzero(alone == TRAIN)
    for moved, distance, expected in (
        (train, (2, 255, 255), GUARD),
        (other, (3, 0, 0), TRAIN),
        (other, (0, 0, 256), TRAIN),
    ):
        near = starts.copy()
        near[moved] = near[test] + distance
        found = split(SplitSpec(), "neuron", labels, groups, near, WINDOW)
        assert found[moved] == expected
        assert found[test] == TEST
        assert (np.delete(found, moved) == np.delete(alone, moved)).all()
    wider = split(SplitSpec(guard=1.5), "neuron", labels, groups, near, WINDOW)
    assert wider[other] == GUARD


def test_every_class_is_on_every_side_in_about_the_shares_asked_for():
    rng = np.random.default_rng(0)
    classes = np.repeat(["common", "rare", "rarest"], [300, 30, 5])
    sizes = rng.lognormal(2, 1, len(classes)).astype(int) + 1
    groups, labels = (
        objects(np.repeat(np.arange(len(classes)), sizes).tolist()),
        objects(np.repeat(classes, sizes).tolist()),
    )
    sides = split(
        SplitSpec(), "neuron", labels, groups, np.arange(len(labels))[:, None] * np.array([0, 0, 256]), WINDOW
    )
    for name, least, most in (("common", 0.13, 0.27), ("rare", 0.05, 0.4), ("rarest", 0.001, 0.4)):
        of_class = sides[labels == name]
        assert least < (of_class == TEST).mean() < most
        assert {*of_class} == {*SIDES}


def test_the_seed_and_nothing_else_decides():
    labels, groups = objects(["a", "b"] * 60), objects(np.repeat(range(60), 2) * 2 + np.tile([0, 1], 60))
    starts = np.arange(120)[:, None] * np.array([0, 0, 256])
    one, two, other = (split(SplitSpec(seed=seed), "neuron", labels, groups, starts, WINDOW) for seed in (1, 1, 2))
    assert (one == two).all()
    assert (one != other).any()


def test_added_synapses_move_no_other_and_an_added_group_few():
    groups = objects(np.repeat(range(100), 5).tolist())
    labels, starts = objects(["a"] * 500), np.arange(600)[:, None] * np.array([0, 0, 256])
    before = split(SplitSpec(), "neuron", labels, groups, starts[:500], WINDOW)
    more = objects([*groups, *range(0, 100, 2)])
    after = split(SplitSpec(), "neuron", objects(["a"] * 550), more, starts[:550], WINDOW)
    assert (after[:500] == before).all()
    new = split(SplitSpec(), "neuron", objects(["a"] * 505), objects([*groups, *[1000] * 5]), starts[:505], WINDOW)
    assert (new[:500] != before).sum() <= 10  # the synapses of two groups at most


def test_a_group_that_is_most_of_its_class_is_trained_on():
    sizes = [1000, 10, 10, 10, 10, 10]
    groups, labels = objects(np.repeat(range(6), sizes).tolist()), objects(["a"] * sum(sizes))
    starts = np.arange(len(labels))[:, None] * np.array([0, 0, 256])
    for seed in range(20):
        assert split(SplitSpec(seed=seed), "neuron", labels, groups, starts, WINDOW)[0] == TRAIN


@pytest.mark.parametrize(
    ("neurons", "where", "said"),
    [
        (1, {TRAIN}, "b has 1 neuron, so there is none for validation and test"),
        (2, {TRAIN, TEST}, "b has 2 neurons, so there is none for validation"),
        (3, {TRAIN, VALIDATION, TEST}, None),
    ],
)
def test_a_class_with_too_few_groups_is_reported(neurons, where, said):
    labels = objects(["a"] * 40 + ["b"] * 12)
    groups = objects([*range(40), *(100 + np.arange(12) % neurons).tolist()])
    sides = split(SplitSpec(), "neuron", labels, groups, np.arange(52)[:, None] * np.array([0, 0, 256]), WINDOW)
    assert {*sides[labels == "b"]} == where
    counts = splits.tally(labels, groups, sides)
    assert counts["b"]["groups"] == neurons
    assert sum(counts["b"][side] for side in SIDES) == 12
    notes = splits.shortcomings("neuron", counts)
    assert [note for note in notes if "a has" in note] == []
    assert (said is None and not notes) or said in notes[0]


def test_the_random_split_divides_neurons_and_needs_none():
    labels, groups = objects(["a"] * 200), objects(range(200))
    sides = split(SplitSpec(), "random", labels, groups, np.zeros((200, 3), int), WINDOW)
    assert [(sides == side).sum() for side in SIDES] == [140, 20, 40]


def test_shares_that_leave_nothing_to_train_on_are_refused():
    with pytest.raises(SynpipeError, match="keep their sum below 1"):
        SplitSpec.parse({"test_share": 0.6, "validation_share": 0.5}, "mine.yaml, split")


def test_the_split_of_a_data_set(made: Dataset):
    table = read_table(made.split_path)
    assert table.column_names == ["synapse_id", *splits.SCHEMES]
    assert table["synapse_id"].to_pylist() == sorted(read_table(made.tiles_path)["synapse_id"].to_pylist())
    manifest = read_manifest(made, "split")
    classes = manifest.figures["split"]["neuron"]
    assert set(classes) == set(made.spec.classes)
    assert all(count["groups"] > 0 for count in classes.values())
    few = [name for name, count in classes.items() if not all(count[side] for side in SIDES)]
    assert all(any(name in note for note in manifest.notes) for name in few)
    assert sides_are_apart(made, "").passed


def test_the_check_fails_where_a_neuron_or_overlapping_tiles_stand_on_two_sides(made: Dataset, tmp_path: Path):
    shutil.copytree(made.folder, tmp_path / made.name)
    dataset = Project(made.weights_base, tmp_path).dataset(made.name)
    table = read_table(dataset.split_path)
    sides = table["neuron"].to_pylist()
    place = sides.index(TEST)
    torn = [TRAIN if row == place else side for row, side in enumerate(sides)]
    write_table(dataset.split_path, table.set_column(1, "neuron", pa.array(torn)))
    finding = sides_are_apart(dataset, "")
    assert not finding.passed
    assert "by neuron, 1 groups stand on two sides" in finding.description

    unguarded = [TRAIN if side == GUARD else side for side in sides]
    assert unguarded != sides
    write_table(dataset.split_path, table.set_column(1, "neuron", pa.array(unguarded)))
    finding = sides_are_apart(dataset, "")
    assert not finding.passed
    assert "overlap one of another side" in finding.description
