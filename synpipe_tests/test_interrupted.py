"""Killed at any moment of any asset and run again: the same result, a part cut out twice at most, two embedded twice, and no
reader the wiser."""

import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from synpipe.datasets import Project
from synpipe.graph import states
from synpipe.housekeeping import leftovers
from synpipe.shards import TEMPORARY_PREFIX, read_table, remove_leftovers
from synpipe_tests.command import files
from synpipe_tests.conftest import QUICK_EVALUATION
from synpipe_tests.inputs import SHAPE, Inputs, Store, published
from synpipe_tests.killable import PART, Killable, killable
from synpipe_tests.textures import change_spec, make_outdated, write_textures

KILLS = int(os.environ.get("SYNPIPE_TEST_KILLS") or 40)  # more for a night
ENCODERS = {"tiny": ("test_resnet", 0), "other": ("test_vit", 0)}


def random_synapses(count: int, seed: int) -> dict[int, tuple[tuple[int, int, int], str]]:
    random = np.random.default_rng(seed)
    places = random.integers(0, SHAPE, (count, 3)).tolist()
    labels = random.choice(["acetylcholine", "gaba", "glutamate"], count).tolist()
    return {
        1000 + number: ((z, y, x), label) for number, ((z, y, x), label) in enumerate(zip(places, labels, strict=True))
    }


BEFORE = Inputs(random_synapses(24, seed=1), ENCODERS)
MOVED = {1000 + number: place for number, place in enumerate(random_synapses(5, seed=2).values())}
ADDED = {1100 + number: place for number, place in enumerate(random_synapses(6, seed=3).values())}
RELABELLED = {key: (BEFORE.synapses[key][0], "octopamine") for key in (1010, 1011)}
AFTER = BEFORE.with_synapses(MOVED | ADDED | RELABELLED | dict.fromkeys((1020, 1021)))


class Story:
    """The inputs before and after a change, and what an undisturbed process makes of them.

    before: a store of the former inputs. moments, first_moments: at which bringing it up to date, or the first build of all,
    can be killed.
    """

    def __init__(self, folder: Path, process: Killable):
        self.folder, self.process = folder, process
        self.before, undisturbed, first = self.store("before"), self.store("undisturbed"), self.store("first")
        BEFORE.write(self.before.data)
        process.materialise(self.before)
        AFTER.write(self.before.data)
        shutil.copytree(self.before.store, undisturbed.store)
        self.update, self.first = process.materialise(undisturbed), process.materialise(first)
        self.expected = Store.read(first)
        assert self.expected.rows == dict.fromkeys(ENCODERS, AFTER.rows())
        self.expected.assert_same(Store.read(undisturbed))

    def store(self, name: str) -> Project:
        return Project(self.folder / "data", self.folder / name)

    def resume(self, project: Project, kills: int = 1) -> tuple[int, int]:
        """Run again, undisturbed; tiles cut out and embedded. The outcome must be as if nothing had happened."""
        again = self.process.materialise(project)
        assert not again.killed
        folder = project.dataset("demo").folder
        # What was being written: synapses and their rejects are, side by side.
        assert len(list(folder.rglob(f"{TEMPORARY_PREFIX}*"))) <= 2 * kills
        remove_leftovers(folder, older_than_s=0)
        assert list(folder.rglob(f"{TEMPORARY_PREFIX}*")) == []
        self.expected.assert_same(Store.read(project))
        assert {state.state for state in states(project.dataset("demo"))} == {"fresh"}
        return again.cut_outs, again.embedded


@pytest.fixture(scope="module")
def process() -> Iterator[Killable]:
    with killable() as found:
        yield found


@pytest.fixture(scope="module")
def story(process: Killable, tmp_path_factory: pytest.TempPathFactory) -> Story:
    return Story(tmp_path_factory.mktemp("story"), process)


def spread(moments: str, count: int) -> list[int]:
    """Numbers of `count` moments, from 1: two of three are writes, the rest while an index is published, all spread evenly."""
    found: list[int] = []
    for kind, share in (("w", count - count // 3), ("p", count // 3)):
        numbers = [number for number, moment in enumerate(moments, 1) if moment == kind]
        found += [numbers[place] for place in np.linspace(0, len(numbers) - 1, share).round().astype(int)]
    return sorted(set(found))


def test_a_first_build_killed_at_any_moment(story: Story):
    kills = spread(story.first.moments, KILLS * 2 // 5)
    assert len(kills) > KILLS // 3
    for at in kills:
        project = story.store(f"first-{at}")
        killed = story.process.materialise(project, kill_at=at)
        assert killed.killed and len(killed.moments) == at
        cut_outs, embedded = story.resume(project)
        assert killed.cut_outs + cut_outs - story.first.cut_outs in range(PART + 1)
        assert killed.embedded + embedded - story.first.embedded in range(2 * PART + 1)
        assert leftovers(project.dataset("demo")) == []
        shutil.rmtree(project.store)


def test_an_update_killed_at_any_moment_while_others_read(story: Story):
    kills = spread(story.update.moments, KILLS * 2 // 5)
    assert len(kills) > KILLS // 3
    for at in kills:
        project = story.store(f"update-{at}")
        shutil.copytree(story.before.store, project.store)
        with Reader(project) as reader:
            killed = story.process.materialise(project, kill_at=at)
            assert killed.killed and len(killed.moments) == at
            reader.must_look_again()
            cut_outs, embedded = story.resume(project)
        assert killed.cut_outs + cut_outs - story.update.cut_outs in range(PART + 1)
        assert killed.embedded + embedded - story.update.embedded in range(2 * PART + 1)
        shutil.rmtree(project.store)


def test_an_update_killed_by_the_clock(story: Story):
    """At moments of no one's choosing: in the middle of a file, in the threads of LanceDB."""
    for number, after_s in enumerate(np.linspace(0.02, 1.0, KILLS // 5)):
        project = story.store(f"clock-{number}")
        shutil.copytree(story.before.store, project.store)
        with Reader(project) as reader:
            story.process.materialise(project, kill_after_s=float(after_s))
            reader.must_look_again()
            story.resume(project)
        shutil.rmtree(project.store)


def test_a_build_killed_over_and_over_gets_done(story: Story):
    project, at, cut_outs, embedded, kills = story.store("again"), 10, 0, 0, 0
    while (done := story.process.materialise(project, kill_at=at)).killed:
        cut_outs, embedded, kills, at = cut_outs + done.cut_outs, embedded + done.embedded, kills + 1, at + 10 + at // 5
    assert kills > 5
    assert story.resume(project, kills) == (0, 0)
    assert cut_outs + done.cut_outs - story.first.cut_outs in range(PART * kills + 1)
    assert embedded + done.embedded - story.first.embedded in range(2 * PART * kills + 1)


def test_what_learns_and_judges_killed_at_any_moment(process: Killable, tmp_path: Path):
    """Classifier, map and evaluation are switched on in a store that has the rest."""
    before = write_textures(tmp_path, classifier=None)
    make_outdated(before)
    # More neighbours than synapses: the map is of principal components, and no fork has to compile umap.
    change_spec(before, classifier={"method": "linear"}, projection={"n_neighbours": 150}, evaluation=QUICK_EVALUATION)

    def copied(name: str) -> Project:
        shutil.copytree(before.store, tmp_path / name)
        return Project(before.data, tmp_path / name)

    undisturbed = copied("undisturbed")
    moments = process.materialise(undisturbed).moments
    expected = learnt(undisturbed)
    assert {path.split("/")[0] for path in expected} >= {"predictions", "projections", "evaluation", "tables"}
    numbers = [number for number, moment in enumerate(moments, 1) if moment == "l"]
    places = np.linspace(0, len(numbers) - 1, KILLS // 8).round().astype(int)
    for at in sorted({numbers[place] for place in places}):
        project = copied(f"learnt-{at}")
        assert process.materialise(project, kill_at=at).killed
        again = process.materialise(project)
        assert not again.killed and (again.cut_outs, again.embedded) == (0, 0)
        remove_leftovers(project.store, older_than_s=0)
        assert learnt(project) == expected
        assert {state.state for state in states(project.dataset("demo"))} == {"fresh"}
        assert leftovers(project.dataset("demo")) == []
        shutil.rmtree(project.store)


def learnt(project: Project) -> dict[str, bytes]:
    """Every file that holds data, but for the index: of the same vectors they are the same to the last bit."""
    found = files(project.dataset("demo").folder)
    return {
        path: content for path, content in found.items() if not path.startswith(("manifests/", "lineage/", "lancedb/"))
    }


class Reader:
    """Reads the indexes and the tables of a store all the while, as a service would: each must be of one whole version."""

    def __init__(self, project: Project):
        self._dataset = project.dataset("demo")
        self._whole = [inputs.rows().keys() for inputs in (BEFORE, AFTER)]
        self._looked, self._stop = threading.Event(), threading.Event()
        self._problem: BaseException | None = None
        self._thread = threading.Thread(target=self._look, daemon=True)

    def _look(self) -> None:
        try:
            while not self._stop.is_set():
                for encoder in ENCODERS:
                    for table in (published(self._dataset, encoder), read_table(self._dataset.table_path(encoder))):
                        ids = table["synapse_id"].to_pylist()
                        assert len(ids) in map(len, self._whole) and set(ids) in self._whole
                self._looked.set()
        except BaseException as problem:
            self._problem = problem
            self._looked.set()

    def must_look_again(self) -> None:
        self._looked.clear()
        assert self._looked.wait(30)
        assert self._problem is None, self._problem

    def __enter__(self) -> "Reader":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(30)
        assert self._problem is None, self._problem
