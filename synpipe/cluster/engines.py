"""Where the shards of a step are worked on: in this process, or by the workers of a Ray cluster.

In: SYNPIPE_ENGINE, `local` (the default) or `ray`; then a function and the shards it is for. Out: what it gave for each
shard, as they are finished. Guarantees: a shard is with one worker at a time; a worker that dies costs the shard that it
was at, which another one takes over; a shard that fails stops no other; memory does not grow with the number of shards,
which are taken from an iterator when a worker is free.

Why Ray: its workers need no shared home, scheduler or database, `ray start` makes a cluster of any machines, KubeRay one of
Kubernetes, and one actor holds one GPU with the network loaded. Which cluster is Ray's own affair: RAY_ADDRESS names it;
without, Ray uses the one that runs on this machine, or starts one for as long as this process lives.
"""

import os
import re
import socket
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from synpipe import __version__
from synpipe.errors import SynpipeError

Work = Callable[[Any, bool], Any]
"""(what a shard needs, whether another worker may have done a part of it before it died) to the result."""

ATTEMPTS = 3  # workers that a shard may cost: one that is out of memory would be so on every other
FAILED_STARTS = 10  # of workers that die before they have begun; after that no more are started
CHECK_S = 10.0  # how often the size of the cluster is looked at
REACH_S = 5.0
WORKERS_TOLD = 8


def on_cluster() -> bool:
    """Whether the environment asks for a cluster. Raises `SynpipeError` where it asks for something else."""
    engine = os.environ.get("SYNPIPE_ENGINE") or "local"
    if engine not in ("local", "ray"):
        raise SynpipeError(f"SYNPIPE_ENGINE is {engine!r}: use local or ray.")
    return engine == "ray"


def connect() -> "Cluster":
    """The Ray cluster. Raises `SynpipeError` where Ray is not installed or the cluster cannot be reached."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # read when it is imported, and by the processes that it starts
    try:
        import ray
    except ImportError:
        raise SynpipeError(
            "SYNPIPE_ENGINE is ray, but Ray is not installed here: `pip install 'synpipe[cluster]'`, or unset it."
        ) from None
    if not ray.is_initialized():
        _connect(ray)
    return Cluster(ray)


def _connect(ray: Any) -> None:
    address = os.environ.get("RAY_ADDRESS")
    where = address or "on this machine"
    try:
        # Ray itself would try for minutes.
        if found := re.fullmatch(r"(?:ray://)?(.+):(\d+)", address or ""):
            socket.create_connection((found[1].strip("[]"), int(found[2])), timeout=REACH_S).close()
        with warnings.catch_warnings():
            # Ray starts its processes by forking, of which LanceDB warns; they go on to be other programs at once.
            warnings.filterwarnings("ignore", "lancedb fork support", RuntimeWarning)
            ray.init(include_dashboard=False, logging_level="ERROR")
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        raise SynpipeError(
            f"The Ray cluster {where} cannot be used ({_line(error)}): check RAY_ADDRESS, and RAY_AUTH_MODE, which is "
            "`token` for a cluster that wants one, until `ray status` works here; or unset SYNPIPE_ENGINE to work in this process."
        ) from error


@dataclass
class _Job:
    name: str
    needs: Any
    attempts: int = 0


class _Worker:
    """An actor: one process on some machine of the cluster."""

    _work: Work

    def prepare(self, version: str, prepare: Callable[[Any], Work], told: Any) -> SynpipeError | None:
        if version != __version__:
            return SynpipeError(
                f"The workers have synpipe {__version__}, this process {version}: use one image, or one lock file."
            )
        try:
            self._work = prepare(told)
        except SynpipeError as error:
            return SynpipeError(f"On the worker {socket.gethostname()}: {error}")
        return None

    def work(self, needs: Any, again: bool) -> Any:
        try:
            return self._work(needs, again)
        except SynpipeError as error:
            return error


class Cluster:
    """A Ray cluster that this process is connected to."""

    def __init__(self, ray: Any):
        self._ray = ray

    def has_gpus(self) -> bool:
        return self._ray.cluster_resources().get("GPU", 0) >= 1

    def run(
        self,
        prepare: Callable[[Any], Work],
        told: Any,
        shards: Iterable[tuple[str, Any]],
        count: int,
        log: Callable[[str], None],
        on_gpus: bool = False,
    ) -> Iterator[tuple[str, Any]]:
        """(name, result) of each shard, or (name, `SynpipeError`), in the order in which they are finished.

        prepare: called once in every worker with `told`, gives the function that works on what a shard needs. Both travel
        to the workers: `prepare` by its name, so that synpipe must be installed there. count: of the shards. on_gpus: each
        worker has a GPU to itself; else a processor core.
        Raises `SynpipeError` where `prepare` does, or no worker could be started.
        """
        ray, kind = self._ray, "GPU" if on_gpus else "CPU"
        actor = ray.remote(num_cpus=0 if on_gpus else 1, num_gpus=1 if on_gpus else 0)(_Worker)
        told = ray.put(told)
        new, again, left = iter(shards), deque[_Job](), count
        busy: dict[Any, tuple[Any, _Job | None]] = {}  # by what is waited for; without a job: a worker that begins
        idle: list[Any] = []
        finished_by: Counter[Any] = Counter()
        failed_starts, reason = 0, ""
        try:
            while left:
                # At least one, also where there is none yet: a cluster that grows on demand sees the demand by it.
                wanted = min(left, max(1, int(ray.cluster_resources().get(kind, 0))))
                while len(busy) + len(idle) < wanted and failed_starts < FAILED_STARTS:
                    worker = actor.remote()
                    busy[worker.prepare.remote(__version__, prepare, told)] = worker, None
                while idle and (job := again.popleft() if again else _next(new)):
                    worker = idle.pop()
                    busy[worker.work.remote(job.needs, job.attempts > 0)] = worker, job
                if not busy:
                    raise SynpipeError(
                        f"No worker of the Ray cluster could be started, the last one because: {reason}. Is the same synpipe "
                        "installed on all of its machines?"
                    )
                done = self._wait([*busy])
                if not done and not any(job for _, job in busy.values()):
                    log(
                        f"waiting for workers to start: the cluster has {ray.cluster_resources().get(kind, 0):g} {kind}s"
                    )
                for finished in done:
                    worker, job = busy.pop(finished)
                    try:
                        result = ray.get(finished)
                    except ray.exceptions.RayTaskError:
                        raise  # neither the worker's end nor a fault that it knows: a bug
                    except ray.exceptions.RayError as error:
                        reason = _line(error)
                        if job is None:
                            failed_starts += 1
                            continue
                        ray.kill(worker)  # it may only be out of reach, and must not go on beside another one
                        job.attempts += 1
                        if job.attempts < ATTEMPTS:
                            log(f"a worker died at shard {job.name}, which another one takes over ({reason})")
                            again.append(job)
                            continue
                        result = SynpipeError(f"Shard {job.name} has cost {ATTEMPTS} workers, the last one: {reason}.")
                    else:
                        idle.append(worker)
                        if job is None:
                            if result is not None:
                                raise result
                            continue
                        finished_by[worker] += 1
                    left -= 1
                    yield job.name, result
            shares = ", ".join(f"{shards:,}" for _, shards in finished_by.most_common(WORKERS_TOLD))
            log(f"{count:,} shards by {len(finished_by):,} workers of the cluster: {shares}")
        finally:
            for worker in [*idle, *(worker for worker, _ in busy.values())]:
                ray.kill(worker)

    def _wait(self, for_any_of: list[Any]) -> list[Any]:
        """Those that are finished: one, or none within `CHECK_S`."""
        try:
            return self._ray.wait(for_any_of, timeout=CHECK_S)[0]
        except SystemError as error:
            # How Ctrl-C, or what a signal's handler makes of it, arrives out of Ray's C++.
            if error.__cause__ is not None and not isinstance(error.__cause__, Exception):
                raise error.__cause__ from None
            raise


def _next(shards: Iterator[tuple[str, Any]]) -> _Job | None:
    found = next(shards, None)
    return None if found is None else _Job(*found)


def _line(error: BaseException) -> str:
    """The error's first sentence; Ray's own tell of the whole cluster."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:300]} …"
