"""A process that materialises in forks of itself, each of which can be killed with SIGKILL at any of its writes.

Run as `python -m synpipe_tests.killable`, it imports what is slow to import once, ten seconds that each fork saves. In: one
JSON line per materialisation, see `Killable.materialise`. Out: one line each, a `Materialised`. A fork makes, without
Dagster, exactly what is out of date. Parts are of `PART` tiles, so that a small data set has several in each shard.
"""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from synpipe import embedding, extraction, tiles
from synpipe.datasets import Project
from synpipe.graph import states, steps
from synpipe.shards import TEMPORARY_PREFIX

PART = 4
HANGS_S = 120
KINDS = {"index": b"p"} | dict.fromkeys(("classifier", "projection", "scores", "evaluation"), b"l")
# Files whose every call and return is a moment: those that write, ours and LanceDB's.
WRITERS = ("/synpipe/shards.py", "/synpipe/table.py", "/synpipe/index.py", "/lancedb/table.py", "/lancedb/db.py")


@dataclass(frozen=True)
class Materialised:
    """moments: those at which the fork could have been killed, `w` for a write, `p` while an index was published, `l` while
    something was learnt or judged.
    cut_outs, embedded: tiles, counted as the work on them was begun."""

    killed: bool
    moments: str
    cut_outs: int
    embedded: int


class Killable:
    """The process, seen from a test."""

    def __init__(self, process: subprocess.Popen[str]):
        self._process = process

    def materialise(self, project: Project, kill_at: int = 0, kill_after_s: float = 0) -> Materialised:
        """Make what is out of date in the data set `demo`.

        kill_at: number of the moment, from 1, at which the process kills itself. kill_after_s: or after this time.
        """
        assert self._process.stdin and self._process.stdout
        order = {"data": str(project.data), "store": str(project.store), "at": kill_at, "after_s": kill_after_s}
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline())
        assert "error" not in answer, answer["error"]
        return Materialised(**answer)


@contextlib.contextmanager
def killable() -> Iterator[Killable]:
    quiet = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    # LanceDB warns that it may hang when forked while at work; before the fork it does nothing here.
    command = [sys.executable, "-W", "ignore:lancedb fork support", "-m", "synpipe_tests.killable"]
    repository = Path(__file__).resolve().parent.parent
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=quiet, cwd=repository
    ) as process:
        try:
            yield Killable(process)
        finally:
            process.kill()


def main() -> None:
    import lancedb  # noqa: F401
    import sklearn.linear_model
    import sklearn.pipeline
    import sklearn.preprocessing  # noqa: F401
    import timm  # noqa: F401
    import torch

    import synpipe.index  # noqa: F401

    torch.set_num_threads(1)  # a thread of the parent would be missing in its forks
    extraction.PART_TILES = PART
    embedding.ROWS_PER_PART["cpu"] = PART
    for line in sys.stdin:
        print(json.dumps(fork(json.loads(line))), flush=True)


def fork(order: dict[str, Any]) -> dict[str, Any]:
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            materialise(order, lambda mark: os.write(writer, mark))
            status = 0
        except BaseException:
            os.write(writer, f"!{traceback.format_exc()}".encode())
        finally:
            os._exit(status)
    os.close(writer)
    with open(reader, "rb") as pipe:
        marks, _, error = pipe.read().partition(b"!")
    _, status = os.waitpid(child, 0)
    if error or (os.WIFSIGNALED(status) and os.WTERMSIG(status) not in (signal.SIGKILL, signal.SIGALRM)):
        return {"error": error.decode() or f"status {status}"}
    moments = marks.translate(None, b"ce").decode()
    counted = {"cut_outs": marks.count(b"c"), "embedded": marks.count(b"e")}
    return {"killed": os.WIFSIGNALED(status), "moments": moments, **counted}


def materialise(order: dict[str, Any], mark: Callable[[bytes], Any]) -> None:
    """The work of a fork. mark: what is written here outlives a kill: a `c` per cut-out, an `e` per tile embedded."""
    store, moments, kind = order["store"], 0, b"w"

    def moment() -> None:
        nonlocal moments
        moments += 1
        mark(kind)
        if moments == order["at"]:
            os.kill(os.getpid(), signal.SIGKILL)
            select.select([], [], [])

    def writes(event: str, arguments: tuple[Any, ...]) -> None:
        """Before a folder is made, before and after a temporary file is flushed, before and after it is renamed."""
        if event not in ("open", "os.rename", "os.mkdir") or not str(arguments[0]).startswith(store):
            return
        name = os.path.basename(str(arguments[0]))
        if event != "open" or name.startswith(TEMPORARY_PREFIX) or os.path.isdir(arguments[0]):
            moment()

    def calls(frame: Any, event: str, _: Any) -> None:
        if event in ("call", "return") and frame.f_code.co_filename.endswith(WRITERS):
            moment()

    sys.addaudithook(writes)
    count("make_tile", tiles, lambda *_: mark(b"c"))
    count("__call__", embedding._Launch, lambda _launch, staged: mark(b"e" * len(staged)))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends the process at once, as SIGKILL does
    signal.setitimer(signal.ITIMER_REAL, order["after_s"] or HANGS_S)
    dataset = Project(Path(order["data"]), Path(store)).dataset("demo")
    sys.setprofile(calls)
    stale = {state.asset for state in states(dataset) if state.state != "fresh"}
    for step in steps(dataset):
        if step.asset in stale:
            kind = KINDS.get(step.kind, b"w")
            step.run(lambda message: None)


def count(name: str, module: Any, note: Callable[..., Any]) -> None:
    """Let every call of a function of `module` be noted first."""
    function = getattr(module, name)

    def noted(*arguments: Any, **named: Any) -> Any:
        note(*arguments)
        return function(*arguments, **named)

    setattr(module, name, noted)


if __name__ == "__main__":
    main()
