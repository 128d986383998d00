"""Runs that meet in one store, and runs that are killed."""

import multiprocessing
import re
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from contextlib import closing
from pathlib import Path

import dagster as dg
import pytest

from synpipe.assets.graph import states
from synpipe.datasets import Project
from synpipe.defs.locks import DIED, open_history
from synpipe.defs.run import prepare_home
from synpipe.index.versions import list_versions
from synpipe.reports.housekeeping import find_leftovers
from synpipe.store.locks import one_step_at_a_time
from synpipe_tests.conftest import environment
from synpipe_tests.support.command import answer, invoke
from synpipe_tests.support.inputs import Inputs, Store


@pytest.mark.slow
def test_a_killed_run_blocks_nothing_and_is_shown_as_failed(project: Project, tmp_path: Path) -> None:
    messages = tmp_path / "stderr"
    command = [str(Path(sys.executable).parent / "synpipe"), "materialize", "--select", "volume"]
    with one_step_at_a_time(project.store, log=print), messages.open("w") as stderr:
        killed = subprocess.Popen(command, env=environment(project), stderr=stderr)
        deadline = time.monotonic() + 120
        while "waiting for another run" not in messages.read_text():
            assert killed.poll() is None and time.monotonic() < deadline, messages.read_text()
            time.sleep(0.1)
        killed.send_signal(signal.SIGKILL)
        killed.wait()
    # The lock is taken by nobody now, whatever the dead process had of it.
    again = invoke(project, "materialize", "--select", "volume")
    assert again.exit_code == 0, again.stderr
    assert "waiting" not in again.stderr

    with dg.DagsterInstance.from_config(str(project.store / "dagster_home")) as instance:
        second, first = instance.get_runs()
        assert (first.status, second.status) == (dg.DagsterRunStatus.FAILURE, dg.DagsterRunStatus.SUCCESS)
        assert DIED in [event.message for event in instance.all_logs(first.run_id)]


def test_a_history_that_several_open_first_at_once_stays_whole(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each makes Dagster's databases where it finds none; without a lock, two of four leave them unusable mostly."""
    context = multiprocessing.get_context("fork")
    for number in range(3):
        monkeypatch.setenv("DAGSTER_HOME", str(project.store / f"home-{number}"))
        prepare_home(project)
        together = context.Barrier(4)
        openers = [context.Process(target=_open_history, args=(project, together)) for _ in range(4)]
        for opener in openers:
            opener.start()
        for opener in openers:
            opener.join()
        assert [opener.exitcode for opener in openers] == [0] * 4
        with open_history(project.store) as instance:
            assert len(instance.get_runs()) == 0


def _open_history(project: Project, together: threading.Barrier) -> None:
    together.wait()
    with open_history(project.store) as instance:
        instance.get_runs()


@pytest.mark.slow
def test_a_history_of_two_revisions_is_named(project: Project) -> None:
    assert invoke(project, "materialize", "--select", "volume").exit_code == 0
    history = project.store / "dagster_home" / "history" / "runs.db"
    with closing(sqlite3.connect(history)) as database:
        database.execute("INSERT INTO alembic_version VALUES ('of another')")
        database.commit()
    refused = invoke(project, "materialize", "--select", "volume")
    assert refused.exit_code == 1 and "delete that folder" in refused.stderr and "dagster_home" in refused.stderr


@pytest.mark.slow
def test_two_runs_of_the_same_assets_at_once_and_a_clearing_up_in_between(tmp_path: Path) -> None:
    """Both succeed, nothing is made twice, and what one of them has just made is not taken for a leftover."""
    inputs = Inputs({1000 + number: ((number % 6, 40 * number, 500 - 30 * number), "gaba") for number in range(12)})
    project = Project(tmp_path / "data", tmp_path / "store")
    inputs.write(project.data)
    dataset = project.dataset("demo")
    command = [str(Path(sys.executable).parent / "synpipe"), "materialize"]
    both = [subprocess.Popen(command, env=environment(project), stderr=subprocess.PIPE, text=True) for _ in range(2)]
    cleared = 0
    while any(run.poll() is None for run in both):
        if dataset.folder.exists():
            answer(project, "gc", "--delete")
            cleared += 1
        time.sleep(0.3)
    said = [run.communicate()[1] for run in both]
    assert [run.returncode for run in both] == [0, 0], said
    assert cleared > 3

    found = Store.read(project)
    assert found.rows == {"tiny": inputs.rows()}
    assert {state.state for state in states(dataset)} == {"fresh"}
    # A cut-out, a vector and a build of the index: each was made by one of the two.
    for words, of_all in (("cut-outs made", 12), ("tiles embedded", 12)):
        made = [int(number) for text in said for number in re.findall(rf"(\d+) {words}", text)]
        assert sorted(made) == [0, of_all], said
    assert sum(text.count("rows written, building indexes") for text in said) == 1
    assert len(list_versions(dataset, "tiny")) == 1 and find_leftovers(dataset) == []
    with dg.DagsterInstance.from_config(str(project.store / "dagster_home")) as instance:
        assert [run.status for run in instance.get_runs()] == [dg.DagsterRunStatus.SUCCESS] * 2
