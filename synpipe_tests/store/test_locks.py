"""Machines that share a store on a file system whose locks each machine keeps to itself."""

import json
import threading
import time
from pathlib import Path

import pytest

from synpipe.store import locks
from synpipe.store.locks import one_step_at_a_time


@pytest.fixture
def machines(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every thread counts as a machine of its own, named after the thread, and the kernel's locks hold nobody up."""
    monkeypatch.setattr(locks, "BEAT_S", 0.02)
    monkeypatch.setattr(locks, "try_lock", lambda handle: True)
    monkeypatch.setattr(locks, "_machine_id", lambda: threading.current_thread().name)


@pytest.mark.usefixtures("machines")
def test_machines_that_do_not_see_each_others_locks_work_one_after_the_other(tmp_path: Path) -> None:
    inside: list[str] = []
    most: list[int] = []
    said: list[str] = []

    def work() -> None:
        for _ in range(8):
            with one_step_at_a_time(tmp_path, said.append):
                inside.append(threading.current_thread().name)
                time.sleep(0.01)
                most.append(len(inside))
                inside.remove(threading.current_thread().name)

    threads = [threading.Thread(target=work, name=f"machine-{number}") for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    assert most == [1] * 32
    assert any("waiting for a run on the machine" in line for line in said)
    assert [path.name for path in (tmp_path / ".locks").iterdir()] == ["step"]


@pytest.mark.usefixtures("machines")
def test_a_machine_that_went_down_holds_nobody_up_for_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "SILENT_S", 0.3)
    left = tmp_path / ".locks" / "driver-gone"
    left.parent.mkdir()
    left.write_text(json.dumps({"machine": "cellar", "process": 7, "works": True, "beat": "0"}))
    said: list[str] = []
    with one_step_at_a_time(tmp_path, said.append):
        assert not left.exists()
    assert said[0].startswith("waiting for a run on the machine cellar") and "taken for dead" in said[1]


@pytest.mark.usefixtures("machines")
def test_a_killed_run_of_the_same_machine_holds_nobody_up(tmp_path: Path) -> None:
    left = tmp_path / ".locks" / f"driver-{threading.current_thread().name}"
    left.parent.mkdir()
    left.write_text("{")
    said: list[str] = []
    with one_step_at_a_time(tmp_path, said.append):
        assert left.exists()
    assert not said and not left.exists()


@pytest.mark.usefixtures("machines")
def test_a_second_machine_that_was_seen_too_late_is_reported(tmp_path: Path) -> None:
    said: list[str] = []
    with one_step_at_a_time(tmp_path, said.append):
        other = tmp_path / ".locks" / "driver-attic"
        other.write_text(json.dumps({"machine": "attic", "process": 7, "works": True, "beat": "0"}))
        deadline = time.monotonic() + 10
        while not said and time.monotonic() < deadline:
            time.sleep(0.01)
    assert len(said) == 1 and "the machine attic began to work in this store" in said[0]
