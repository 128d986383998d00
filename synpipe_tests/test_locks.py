"""Runs that meet in one store, and runs that are killed."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import dagster as dg

from synpipe.datasets import Project
from synpipe.defs.locks import DIED, one_step_at_a_time
from synpipe_tests.conftest import environment, run_synpipe


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
    again = run_synpipe(project, "materialize", "--select", "volume", timeout_s=120)
    assert again.returncode == 0, again.stderr
    assert "waiting" not in again.stderr

    with dg.DagsterInstance.from_config(str(project.store / "dagster_home")) as instance:
        second, first = instance.get_runs()
        assert (first.status, second.status) == (dg.DagsterRunStatus.FAILURE, dg.DagsterRunStatus.SUCCESS)
        assert DIED in [event.message for event in instance.all_logs(first.run_id)]
