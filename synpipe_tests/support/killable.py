"""A process that materialises in forks of itself. SIGKILL can end each fork at any of its file operations.

Run it as `python -m synpipe_tests.support.killable`. It imports the slow libraries once, which saves each fork ten
seconds. It reads one JSON line per materialisation (see `Killable.materialise`) and answers each with one line, a
`Materialised`. Without Dagster, a fork makes exactly what is out of date. Parts hold `PART` tiles, so that each shard
of a small data set has several.
"""

import contextlib
import ctypes
import json
import os
import select
import signal
import struct
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from synpipe.assets.graph import nodes, states
from synpipe.datasets import Project
from synpipe.embeddings import embed as embedding
from synpipe.store.files import TEMPORARY_PREFIX
from synpipe.tiles import extraction
from synpipe.tiles import tile as tiles

PART = 4
HANGS_S = 120
LEARN = {"classifier", "projection", "scores", "evaluation"}


@dataclass(frozen=True)
class Materialised:
    """What a fork did.

    moments: one letter per file operation of synpipe at which the fork could have been killed: `l` in an asset of
    `LEARN`, else `w`. changes: number of changes of LanceDB's files. cut_outs, embedded: number of tiles, counted when
    the work on them began.
    """

    killed: bool
    moments: str
    changes: int
    cut_outs: int
    embedded: int


class Killable:
    """The process, as tests use it."""

    def __init__(self, process: subprocess.Popen[str]):
        self._process = process
        self.kills = 0

    def materialise(self, project: Project, at: int = 0, change: int = 0, after_s: float = 0) -> Materialised:
        """Make what is out of date in the data set `demo`.

        at: kill the fork at this moment, counted from 1. change: kill it when the kernel reports this change of LanceDB's files.
        after_s: kill it after this time. Zero means never.
        """
        assert self._process.stdin and self._process.stdout
        order = {"data": str(project.data), "store": str(project.store), "at": at, "change": change, "after_s": after_s}
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline())
        assert "error" not in answer, answer["error"]
        self.kills += answer["killed"]
        return Materialised(**answer)


@contextlib.contextmanager
def killable() -> Iterator[Killable]:
    quiet = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    # LanceDB warns that a fork may hang if LanceDB was working before it. Here it does nothing before the fork.
    quiet["PYTHONWARNINGS"] = "ignore:lancedb fork support,ignore:lance is not fork-safe"
    command = [sys.executable, "-m", "synpipe_tests.support.killable"]
    repository = Path(__file__).resolve().parents[2]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=quiet, cwd=repository
    ) as process:
        try:
            yield Killable(process)
        finally:
            process.kill()


def main() -> None:
    import lance.indices  # noqa: F401
    import lancedb  # noqa: F401
    import sklearn.linear_model
    import sklearn.pipeline
    import sklearn.preprocessing  # noqa: F401
    import timm  # noqa: F401
    import torch

    from synpipe.index import build as index_build
    from synpipe.index import recall as index_recall

    torch.set_num_threads(1)  # forks do not inherit the parent's threads
    extraction.PART_TILES = PART
    embedding.ROWS_PER_PART["cpu"] = PART
    index_recall.RECALL_QUERIES = 3  # more queries take a third of the time of a build and touch no file
    index_build.FLAT_ROWS, index_build.SAMPLE_RATE = 8, 2  # partitions of a dozen rows, in two segments
    for line in sys.stdin:
        print(json.dumps(fork(json.loads(line))), flush=True)


def fork(order: dict[str, Any]) -> dict[str, Any]:
    indexes = Path(order["store"]) / "demo" / "lancedb"
    indexes.mkdir(parents=True, exist_ok=True)
    watch = Watch(indexes)
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
    marks, changes, deadline = b"", 0, time.monotonic() + (order["after_s"] or HANGS_S)
    while True:
        ready, _, _ = select.select([reader, watch.descriptor], [], [], max(0, deadline - time.monotonic()))
        changes += watch.changes() if watch.descriptor in ready else 0
        if not ready or (order["change"] and changes >= order["change"]):
            os.kill(child, signal.SIGKILL)
            deadline = time.monotonic() + HANGS_S
        if reader in ready:
            told = os.read(reader, 65536)
            marks += told
            if not told:
                break
    os.close(reader)
    os.close(watch.descriptor)
    _, status = os.waitpid(child, 0)
    marks, _, error = marks.partition(b"!")
    if error or (os.WIFSIGNALED(status) and os.WTERMSIG(status) != signal.SIGKILL):
        return {"error": error.decode() or f"status {status}"}
    counted = {"changes": changes, "cut_outs": marks.count(b"c"), "embedded": marks.count(b"e")}
    return {"killed": os.WIFSIGNALED(status), "moments": marks.translate(None, b"ce").decode(), **counted}


class Watch:
    """Counts changes below a folder with inotify(7), because LanceDB writes its files outside Python."""

    MADE, FOLDER = 0x100, 0x40000000
    MASK = MADE | 0x2 | 0x8 | 0x40 | 0x80 | 0x200  # made, modified, closed, moved from and to, deleted

    def __init__(self, folder: Path):
        self._library = ctypes.CDLL(None)
        self.descriptor = self._library.inotify_init1(os.O_NONBLOCK)
        self._folders: dict[int, Path] = {}
        self._add(folder)

    def _add(self, folder: Path) -> None:
        self._folders[self._library.inotify_add_watch(self.descriptor, os.fsencode(folder), self.MASK)] = folder
        for inside in folder.iterdir():
            if inside.is_dir():
                self._add(inside)

    def changes(self) -> int:
        """Return the number of changes since the last call."""
        content, count = os.read(self.descriptor, 65536), 0
        while content:
            folder, mask, _, length = struct.unpack_from("iIII", content)
            name, content = content[16 : 16 + length].rstrip(b"\0"), content[16 + length :]
            count += 1
            if mask & self.FOLDER and mask & self.MADE:
                with contextlib.suppress(FileNotFoundError):
                    self._add(self._folders[folder] / os.fsdecode(name))
        return count


def materialise(order: dict[str, Any], mark: Callable[[bytes], Any]) -> None:
    """Do the work of a fork. mark: writes to a pipe, which survives a kill: `c` per cut-out, `e` per embedded tile."""
    store, moments, kind = order["store"], 0, b"w"

    def operations(event: str, arguments: tuple[Any, ...]) -> None:
        """Count a moment before a folder is made, and before and after a temporary file is flushed or renamed."""
        nonlocal moments
        if event not in ("open", "os.rename", "os.mkdir") or not str(arguments[0]).startswith(store):
            return
        name = os.path.basename(str(arguments[0]))
        if event != "open" or name.startswith(TEMPORARY_PREFIX) or os.path.isdir(arguments[0]):
            moments += 1
            mark(kind)
            if moments == order["at"]:
                os.kill(os.getpid(), signal.SIGKILL)
                select.select([], [], [])

    sys.addaudithook(operations)
    count("make_tile", tiles, lambda *_: mark(b"c"))
    count("__call__", embedding._Launch, lambda _launch, staged: mark(b"e" * len(staged)) if for_the_cache() else None)
    dataset = Project(Path(order["data"]), Path(store)).dataset("demo")
    stale = {state.asset for state in states(dataset) if state.state != "fresh"}
    for node in nodes(dataset):
        if node.name in stale:
            kind = b"l" if node.asset.name in LEARN else b"w"
            node.run(lambda message: None)


def for_the_cache() -> bool:
    """Return whether tiles are being embedded now, not the evaluation's views of them."""
    frame: Any = sys._getframe()
    while frame and frame.f_code is not embedding._EmbedQueue.work_off.__code__:
        frame = frame.f_back
    return frame is not None


def count(name: str, module: Any, note: Callable[..., Any]) -> None:
    """Call `note` before every call of a function of `module`."""
    function = getattr(module, name)

    def noted(*arguments: Any, **named: Any) -> Any:
        note(*arguments)
        return function(*arguments, **named)

    setattr(module, name, noted)


if __name__ == "__main__":
    main()
