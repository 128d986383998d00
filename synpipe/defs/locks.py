"""Locks of Dagster's runs and history, which the kernel releases when their process ends, killed or not.

They give two guarantees. A run whose process has died is marked as failed when the next run begins, instead of being shown as
running for ever. One process at a time opens Dagster's history. `synpipe.store.locks` sees to it that one asset at a time is made
in a store. Dagster's own pools would not do: the slot of a killed run stays taken, and every later run waits for it.
"""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import alembic.util
import dagster as dg

from synpipe.errors import SynpipeError
from synpipe.store.locks import locks_folder, open_lock, try_lock

DIED = (
    "The process of this run died unexpectedly: it was killed, memory ran out, or the machine went down. Materialise again: "
    "it carries on from the last complete shard."
)

# Locks of the runs of this process. They are held until it ends.
_held: dict[str, int] = {}


@contextmanager
def open_history(store: Path) -> Iterator[dg.DagsterInstance]:
    """Open the Dagster instance of DAGSTER_HOME.

    The first process to open it creates its databases. If two do so at once, each writes the revision of the tables that it found,
    and Dagster (1.13) then refuses the database for having two revisions. Raises `SynpipeError` for such a database.
    """
    handle = open_lock(store, "history")
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
    _held[run_id] = open_lock(store, f"new-{run_id}")
    fcntl.flock(_held[run_id], fcntl.LOCK_EX)
    os.rename(locks_folder(store) / f"new-{run_id}", locks_folder(store) / f"run-{run_id}")
    fail_dead_runs(instance, store)


def fail_dead_runs(instance: dg.DagsterInstance, store: Path) -> set[str]:
    """Mark as failed every registered run that has not finished and whose process is gone; return the ids of the others."""
    alive = set()
    for path in locks_folder(store).glob("run-*"):
        run_id = path.name.removeprefix("run-")
        handle = open_lock(store, path.name)
        try:
            if not try_lock(handle):
                alive.add(run_id)
                continue
            run = instance.get_run_by_id(run_id)
            if run is not None and not run.is_finished:
                instance.report_run_failed(run, DIED)
            path.unlink(missing_ok=True)
        finally:
            os.close(handle)
    return alive
