"""Locks of a store: one asset at a time is made in it, and nothing else writes to it meanwhile.

The kernel releases these locks when their process ends, killed or not. On a network file system it may know only the locks of its
own machine. A process that holds the lock of a store therefore also keeps a file in the store that says so, and changes it every
few seconds. A process on another machine sees that file change and waits.

Guarantees: two processes on one machine never write at once. Two machines that share a file system do not either, unless one
of them begins within the moment in which the file system has not yet shown it the other's file.
"""

import fcntl
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from synpipe.errors import SynpipeError

DRIVER_PREFIX = "driver-"
BEAT_S = 5.0
# NFS may show a file as it was up to a minute ago.
SILENT_S = 75.0
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@contextmanager
def one_step_at_a_time(store: Path, log: Callable[[str], None]) -> Iterator[None]:
    """Wait until no other process works in the store, and keep others waiting meanwhile.

    Two embeddings at once on one GPU gain nothing and may not fit, and two runs of one data set would make its files twice.
    """
    handle = open_lock(store, "step")
    try:
        if not try_lock(handle):
            log("waiting for another run, which is working in this store")
            fcntl.flock(handle, fcntl.LOCK_EX)
        with _only_machine(store, log):
            yield
    finally:
        os.close(handle)


def locks_folder(store: Path) -> Path:
    return store / ".locks"


def open_lock(store: Path, name: str) -> int:
    """Open the file of a lock. Closing the handle releases the lock. Raises `SynpipeError` if the store cannot be written."""
    path = locks_folder(store) / name
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise SynpipeError(
            f"Cannot write {path}: {error.strerror}. Choose another store with --store or SYNPIPE_STORE."
        ) from error


def try_lock(handle: int) -> bool:
    """Take a lock if no other process on this machine has it; return whether it was free."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextmanager
def _only_machine(store: Path, log: Callable[[str], None]) -> Iterator[None]:
    """Wait until no process on another machine works in the store, and let other machines see that this one does."""
    own = locks_folder(store) / f"{DRIVER_PREFIX}{_machine_id()}"
    # A file of this machine was left by a process that was killed: the kernel's lock says that it is gone.
    own.unlink(missing_ok=True)
    while True:
        # The file is written before others are looked for, so of two machines that begin at once, at least one sees the other.
        _beat(own, works=False)
        if not (others := _find_others(own)):
            break
        # The machine whose file has the smaller name goes on waiting with its file in place; the other one lets it go first.
        if others[0] < own:
            own.unlink(missing_ok=True)
        _wait_for(others[0], own, log)
    stop = threading.Event()
    beating = threading.Thread(target=_keep_beating, args=(own, stop, log), name="lock", daemon=True)
    beating.start()
    try:
        yield
    finally:
        stop.set()
        beating.join()
        own.unlink(missing_ok=True)


def _find_others(own: Path) -> list[Path]:
    """The files of other machines, sorted by name."""
    return sorted(path for path in own.parent.glob(f"{DRIVER_PREFIX}*") if path != own)


def _wait_for(other: Path, own: Path, log: Callable[[str], None]) -> None:
    """Wait until the process that keeps this file has ended, or was silent for so long that its machine must have gone down."""
    seen, since, said = _read(other), time.monotonic(), False
    while seen is not None:
        if not said:
            log(f"waiting for a run on the machine {_name_of(seen)}, which is working in this store")
            said = True
        if time.monotonic() - since > SILENT_S:
            log(f"the machine {_name_of(seen)} has been silent for {SILENT_S:.0f} s: its run is taken for dead")
            other.unlink(missing_ok=True)
            return
        time.sleep(min(1.0, BEAT_S))
        if own.exists():
            _beat(own, works=False)
        latest = _read(other)
        if latest != seen:
            seen, since = latest, time.monotonic()


def _keep_beating(own: Path, stop: threading.Event, log: Callable[[str], None]) -> None:
    reported: set[Path] = set()
    _beat(own, works=True)
    while not stop.wait(BEAT_S):
        _beat(own, works=True)
        for other in _find_others(own):
            content = _read(other)
            if content is not None and '"works": true' in content and other not in reported:
                reported.add(other)
                log(
                    f"the machine {_name_of(content)} began to work in this store at the same moment: stop one of the two runs, "
                    "and materialise again"
                )


def _beat(own: Path, works: bool) -> None:
    """Change the file. On a full disk it stays as it is: the kernel's lock holds nevertheless.

    works: whether this process works in the store already, or waits to do so.
    """
    content = {"machine": socket.gethostname(), "process": os.getpid(), "works": works, "beat": uuid.uuid4().hex}
    with suppress(OSError):
        own.write_text(json.dumps(content))


def _read(path: Path) -> str | None:
    """The content of a file, opened anew, because NFS compares a file with the server when it is opened. None if it is gone.

    A file that cannot be read counts as empty.
    """
    try:
        return path.read_text(errors="replace")
    except FileNotFoundError:
        return None
    except OSError:
        return ""


def _name_of(content: str) -> str:
    try:
        return str(json.loads(content)["machine"])
    except (ValueError, TypeError, KeyError):  # read while it was written
        return "that keeps a file in .locks"


def _machine_id() -> str:
    """The same for all processes that share a kernel, containers included, and for no others."""
    with suppress(OSError):
        return _BOOT_ID.read_text().strip()
    return f"{socket.gethostname()}-{uuid.getnode():x}"
