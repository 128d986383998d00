"""Locks that the kernel releases when their process ends, killed or not.

They give three guarantees for a store. One asset at a time is made in it, whoever asked for it. A run whose process has died is
marked as failed when the next run begins, instead of being shown as running for ever. One process at a time opens Dagster's
history. Dagster's own pools give neither of the first two: the slot of a killed run stays taken, and every later run
waits for it.
"""

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import alembic.util
import dagster as dg

from synpipe.errors import SynpipeError

DIED = (
    "The process of this run died unexpectedly: it was killed, memory ran out, or the machine went down. Materialise again: "
    "it carries on from the last complete shard."
)

# Locks of the runs of this process. They are held until it ends.
_held: dict[str, int] = {}


@contextmanager
def one_step_at_a_time(store: Path, log: Callable[[str], None]) -> Iterator[None]:
    """Wait until no other run works in the store.

    Two embeddings at once on one GPU gain nothing and may not fit, and two runs of one data set would make its files twice.
    """
    handle = _open(store, "step")
    try:
        if not _try(handle):
            log("waiting for another run, which is working in this store")
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


@contextmanager
def open_history(store: Path) -> Iterator[dg.DagsterInstance]:
    """Open the Dagster instance of DAGSTER_HOME.

    The first process to open it creates its databases. If two do so at once, each writes the revision of the tables that it found,
    and Dagster (1.13) then refuses the database for having two revisions. Raises `SynpipeError` for such a database.
    """
    handle = _open(store, "history")
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        instance = dg.DagsterInstance.get()
    except alembic.util.CommandError as error:
        raise SynpipeError(
            f"Dagster's history in {os.environ['DAGSTER_HOME']} cannot be opened ({error}): delete that folder; nothing but "
            "the history is lost."
        ) from None
    finally:
        os.close(handle)
    with instance:
        yield instance


def register_run(instance: dg.DagsterInstance, store: Path, run_id: str) -> None:
    """Mark the run as alive for as long as this process lives, and fail the runs that are not alive."""
    if run_id in _held:
        return
    # Locked before it gets its name, so that no other process finds it unlocked and takes the run for dead.
    _held[run_id] = _open(store, f"new-{run_id}")
    fcntl.flock(_held[run_id], fcntl.LOCK_EX)
    os.rename(_folder(store) / f"new-{run_id}", _folder(store) / f"run-{run_id}")
    fail_dead_runs(instance, store)


def fail_dead_runs(instance: dg.DagsterInstance, store: Path) -> set[str]:
    """Mark as failed every registered run that has not finished and whose process is gone; return the ids of the others."""
    alive = set()
    for path in _folder(store).glob("run-*"):
        run_id = path.name.removeprefix("run-")
        handle = _open(store, path.name)
        try:
            if not _try(handle):
                alive.add(run_id)
                continue
            run = instance.get_run_by_id(run_id)
            if run is not None and not run.is_finished:
                instance.report_run_failed(run, DIED)
            path.unlink(missing_ok=True)
        finally:
            os.close(handle)
    return alive


def _folder(store: Path) -> Path:
    return store / ".locks"


def _open(store: Path, name: str) -> int:
    path = _folder(store) / name
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise SynpipeError(
            f"Cannot write {path}: {error.strerror}. Choose another store with --store or SYNPIPE_STORE."
        ) from error


def _try(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
