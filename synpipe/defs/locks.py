"""Locks that outlive nothing: the kernel frees them when their process ends, killed or not.

In: a store. Three guarantees: one step at a time is made in a store, whoever asked for it; a run whose process has died is
marked as failed when the next one begins, instead of being shown as running for ever; and one process at a time opens
Dagster's history. Dagster's own pools do neither of the first two: the slot of a killed run stays taken, and every later run
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
    "The process of this run ended without a word: it was killed, memory ran out, or the machine went down. Materialise "
    "again: it carries on from the last whole shard."
)

# Locks of the runs of this process, held until it ends.
_held: dict[str, int] = {}


@contextmanager
def one_step_at_a_time(store: Path, log: Callable[[str], None]) -> Iterator[None]:
    """Wait until no other run makes anything in the store.

    Two embeddings at once on one GPU gain nothing and may not fit; two runs of one data set would make its files twice.
    """
    handle = _open(store, "step")
    try:
        if not _try(handle):
            log("waiting for another run, which is at work in this store")
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


@contextmanager
def open_history(store: Path) -> Iterator[dg.DagsterInstance]:
    """The Dagster instance of DAGSTER_HOME.

    Whoever opens it first makes its databases. Two that do so at once each write the revision of the tables that they found,
    and Dagster (1.13) refuses a database of two revisions from then on. Raises `SynpipeError` for such a database.
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
    """Show for as long as this process lives that the run is alive, and fail the runs that are not."""
    if run_id in _held:
        return
    # Locked first and named then: nobody finds it unlocked and takes the run for dead.
    _held[run_id] = _open(store, f"new-{run_id}")
    fcntl.flock(_held[run_id], fcntl.LOCK_EX)
    os.rename(_folder(store) / f"new-{run_id}", _folder(store) / f"run-{run_id}")
    fail_dead_runs(instance, store)


def fail_dead_runs(instance: dg.DagsterInstance, store: Path) -> set[str]:
    """Mark as failed every registered run that has not finished and whose process is gone; return ids of the others."""
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
