"""Killed at any moment of any asset and run again: the same result, hardly a part made twice, and no reader the wiser.

Kills are SIGKILLs: before and after every file operation of ours, at every change of a file of LanceDB's, and by the clock.
By default they come in chains, each run killed at a moment of what the one before has left to do, because that costs a
third; `SYNPIPE_TEST_KILLS=1400`, see `make torture`, is one at every operation of a whole build, each followed by an
undisturbed run.
"""

import contextlib
import os
import shutil
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from synpipe.assets.graph import states
from synpipe.datasets import Project
from synpipe.reports.housekeeping import find_leftovers
from synpipe.store.files import TEMPORARY_PREFIX, read_table, remove_leftovers
from synpipe_tests.conftest import QUICK_EVALUATION
from synpipe_tests.support.command import files
from synpipe_tests.support.inputs import SHAPE, Inputs, Store, published
from synpipe_tests.support.killable import PART, Killable, Materialised, killable
from synpipe_tests.support.textures import change_spec, make_outdated, write_textures

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="forks, and asks the kernel with inotify")

KILLS = int(os.environ.get("SYNPIPE_TEST_KILLS") or 130)
CHAIN = 1 if KILLS >= 500 else 5
ENCODERS = {"tiny": ("test_resnet", 0)}

Kill = dict[str, Any]  # arguments of `Killable.materialise`


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

    before: a store of the former inputs. undisturbed: what it takes to bring it up to date, and to make all from nothing.
    """

    def __init__(self, folder: Path, process: Killable):
        self.folder, self.process = folder, process
        self.before, updated, first = self.store("before"), self.store("undisturbed"), self.store("first")
        BEFORE.write(self.before.data)
        process.materialise(self.before)
        AFTER.write(self.before.data)
        shutil.copytree(self.before.store, updated.store)
        self.undisturbed = {"update": process.materialise(updated), "first": process.materialise(first)}
        self.expected = Store.read(first)
        assert self.expected.rows == dict.fromkeys(ENCODERS, AFTER.rows())
        self.expected.assert_same(Store.read(updated))

    def store(self, name: str) -> Project:
        return Project(self.folder / "data", self.folder / name)

    def survive(self, build: str, name: str, kills: Sequence[Kill], watched: bool = False) -> int:
        """Kill one build after the other, then let it finish: the outcome must be as if nothing had happened.

        watched: others read all the while. Returns how often it was killed: a build that a later kill finds done is not.
        """
        project = self.store(f"{build}-{name}")
        if build == "update":
            shutil.copytree(self.before.store, project.store)
        runs: list[Materialised] = []
        with Reader(project) if watched else contextlib.nullcontext():
            for kill in kills:
                runs.append(self.process.materialise(project, **kill))
                if build == "update":
                    look(project)
                if not runs[-1].killed:
                    break
            killed = sum(run.killed for run in runs)
            runs.append(self.process.materialise(project))
        assert not runs[-1].killed
        self.is_done(project, killed)
        for work in ("cut_outs", "embedded"):
            made = sum(getattr(run, work) for run in runs)
            # Of vectors one part may be computed while another one is written.
            lost = PART * killed * (2 if work == "embedded" else 1)
            assert made - getattr(self.undisturbed[build], work) in range(lost + 1), work
        shutil.rmtree(project.store)
        return killed

    def is_done(self, project: Project, kills: int) -> None:
        dataset = project.dataset("demo")
        # What was being written: synapses and their rejects are, side by side.
        assert len(list(dataset.folder.rglob(f"{TEMPORARY_PREFIX}*"))) <= 2 * kills
        remove_leftovers(dataset.folder, older_than_s=0)
        assert list(dataset.folder.rglob(f"{TEMPORARY_PREFIX}*")) == []
        self.expected.assert_same(Store.read(project))
        assert {state.state for state in states(dataset)} == {"fresh"}


def look(project: Project) -> None:
    """As a reader: indexes and tables must each be of one whole version."""
    dataset, whole = project.dataset("demo"), [inputs.rows().keys() for inputs in (BEFORE, AFTER)]
    for encoder in ENCODERS:
        for table in (published(dataset, encoder), read_table(dataset.table_path(encoder))):
            ids = table["synapse_id"].to_pylist()
            assert len(ids) in map(len, whole) and set(ids) in whole


@pytest.fixture(scope="module")
def process(request: pytest.FixtureRequest) -> Iterator[Killable]:
    with killable() as found:
        yield found
        with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
            print(f"\n  {found.kills:,} kills")


@pytest.fixture(scope="module")
def story(process: Killable, tmp_path_factory: pytest.TempPathFactory) -> Story:
    return Story(tmp_path_factory.mktemp("story"), process)


def spread(last: int, count: int) -> list[int]:
    """`count` numbers from 1 to `last`, evenly."""
    return sorted(set(np.linspace(1, last, count).round().astype(int).tolist()))


@pytest.mark.parametrize("build", ["first", "update"])
@pytest.mark.parametrize("where", ["at", "change"])
def test_killed_at_any_file_operation(story: Story, build: str, where: str):
    """at: of ours, in synapses, tiles, embeddings, tables and manifests; change: of LanceDB's."""
    whole = story.undisturbed[build]
    last, share = (len(whole.moments), 0.28) if where == "at" else (whole.changes - 5, 0.16)
    wanted, killed, random = min(last, round(KILLS * share)), 0, np.random.default_rng(0)
    for first in spread(last, -(-wanted // CHAIN)):
        # Of what is left to do: early, so that the next has something left as well.
        rest = random.integers(1, max(2, last // 12), CHAIN - 1).tolist()
        killed += story.survive(build, f"{where}-{first}", [{where: each} for each in (first, *rest)])
    assert killed >= 0.75 * wanted


def test_killed_by_the_clock_while_others_read(story: Story):
    """At moments of no one's choosing: in the middle of a file, in the threads of LanceDB."""
    killed = 0
    for number, after_s in enumerate(np.linspace(0.02, 0.6, round(KILLS * 0.1))):
        killed += story.survive("update", f"clock-{number}", [{"after_s": float(after_s)}], watched=True)
    assert killed


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
    places = [numbers[place - 1] for place in spread(len(numbers), min(len(numbers), KILLS // 20))]
    for first in range(0, len(places), CHAIN):
        project = copied(f"learnt-{first}")
        done = 0  # of the moments of a whole build, by the kills before
        for at in places[first : first + CHAIN]:
            run = process.materialise(project, at=max(1, at - done))
            assert run.killed and (run.cut_outs, run.embedded) == (0, 0)
            done = at
        again = process.materialise(project)
        assert not again.killed and (again.cut_outs, again.embedded) == (0, 0)
        remove_leftovers(project.store, older_than_s=0)
        assert learnt(project) == expected
        assert {state.state for state in states(project.dataset("demo"))} == {"fresh"}
        assert find_leftovers(project.dataset("demo")) == []
        shutil.rmtree(project.store)


def learnt(project: Project) -> dict[str, bytes]:
    """Every file that holds data, but for the index: of the same vectors they are the same to the last bit."""
    found = files(project.dataset("demo").folder)
    return {
        path: content for path, content in found.items() if not path.startswith(("manifests/", "lineage/", "lancedb/"))
    }


class Reader:
    """Reads the indexes and the tables of a store all the while, as a service would."""

    PAUSE_S = 0.02

    def __init__(self, project: Project):
        self._project = project
        self._looks, self._stop = 0, threading.Event()
        self._problem: BaseException | None = None
        self._thread = threading.Thread(target=self._look, daemon=True)

    def _look(self) -> None:
        try:
            while not self._stop.wait(self.PAUSE_S):
                look(self._project)
                self._looks += 1
        except BaseException as problem:
            self._problem = problem

    def __enter__(self) -> "Reader":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(30)
        assert self._problem is None, self._problem
        assert self._looks
