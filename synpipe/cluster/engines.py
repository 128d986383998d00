"""Runs a function on many shards with the workers of a Ray cluster.

Input: SYNPIPE_ENGINE, `local` (the default) or `ray`; then a function and the shards to run it on. Output: the result of
each shard as soon as it is finished. Guarantees:
- A shard is with one worker at a time.
- If a worker dies, only its current shard is affected, and another worker takes it over.
- A shard that fails does not stop the others.
- Memory does not grow with the number of shards, because the next shard is taken from an iterator when a worker is free.

Why Ray: its workers need no shared home folder, scheduler or database. `ray start` makes a cluster of any machines, and
KubeRay one of Kubernetes. One actor keeps one GPU with the network loaded. Ray chooses the cluster: RAY_ADDRESS names it;
otherwise Ray uses the one on this machine, or starts one that ends with this process.
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
from synpipe.errors import SynpipeError, one_line
from synpipe.progress import Log

Work = Callable[[Any, bool], Any]
"""Works on one shard. Arguments: the shard's input, and whether a worker that died may have done part of it already."""

ATTEMPTS = 3  # workers that a shard may cost; a shard that needs too much memory would kill every worker
FAILED_STARTS = 10  # workers that may die while they start; after that no more are started
CHECK_S = 10.0  # how often the size of the cluster is checked
CONNECT_S = 5.0
WORKERS_LOGGED = 8
ERROR_CHARACTERS = 300


def on_cluster() -> bool:
    """Whether the environment asks for a cluster. Raises `SynpipeError` if SYNPIPE_ENGINE has an unknown value."""
    engine = os.environ.get("SYNPIPE_ENGINE") or "local"
    if engine not in ("local", "ray"):
        raise SynpipeError(f"SYNPIPE_ENGINE is {engine!r}: use local or ray.")
    return engine == "ray"


def connect() -> "Cluster":
    """Connect to the Ray cluster. Raises `SynpipeError` if Ray is not installed or the cluster cannot be reached."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # Ray reads it on import, and so do the processes that Ray starts
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
        # Try the address first, because Ray would try for minutes.
        if match := re.fullmatch(r"(?:ray://)?(.+):(\d+)", address or ""):
            socket.create_connection((match[1].strip("[]"), int(match[2])), timeout=CONNECT_S).close()
        with warnings.catch_warnings():
            # LanceDB warns against forking. Ray starts its processes by forking, but they become other programs at once.
            warnings.filterwarnings("ignore", "lancedb fork support", RuntimeWarning)
            ray.init(include_dashboard=False, logging_level="ERROR")
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        raise SynpipeError(
            f"The Ray cluster {where} cannot be used ({_shorten(error)}): check RAY_ADDRESS, and RAY_AUTH_MODE, which is "
            "`token` for a cluster that requires one, until `ray status` works here; or unset SYNPIPE_ENGINE to work in this "
            "process."
        ) from error


class Cluster:
    """A Ray cluster that this process is connected to."""

    def __init__(self, ray: Any):
        self._ray = ray

    def has_gpus(self) -> bool:
        return self._ray.cluster_resources().get("GPU", 0) >= 1

    def run(
        self,
        prepare: Callable[[Any], Work],
        plan: Any,
        shards: Iterable[tuple[str, Any]],
        count: int,
        log: Log,
        on_gpus: bool = False,
    ) -> Iterator[tuple[str, Any]]:
        """Work on shards. Yields (name, result), or (name, `SynpipeError`), of each shard when it is finished.

        prepare: called once in every worker with `plan`; returns the function that works on a shard. Ray sends `prepare`
        by name, so the workers need the same synpipe. shards: name and input of each shard. count: number of shards.
        on_gpus: give every worker a GPU of its own instead of a processor core.

        Raises `SynpipeError` if `prepare` does, or if no worker can be started.
        """
        dispatch = _Dispatch(self._ray, prepare, self._ray.put(plan), on_gpus, log)
        try:
            yield from dispatch.run(iter(shards), count)
        finally:
            dispatch.kill_workers()


class _Worker:
    """A Ray actor: one process on a machine of the cluster."""

    _work: Work

    def prepare(self, version: str, prepare: Callable[[Any], Work], plan: Any) -> SynpipeError | None:
        if version != __version__:
            return SynpipeError(
                f"The workers have synpipe {__version__}, this process {version}: use one image, or one lock file."
            )
        try:
            self._work = prepare(plan)
        except SynpipeError as error:
            return SynpipeError(f"On the worker {socket.gethostname()}: {error}")
        return None

    def work(self, shard_input: Any, is_retry: bool) -> Any:
        try:
            return self._work(shard_input, is_retry)
        except SynpipeError as error:
            return error


@dataclass
class _Job:
    """A shard that is under way. attempts: number of workers that died while they worked on it."""

    name: str
    shard_input: Any
    attempts: int = 0


class _Dispatch:
    """One run of a function on many shards: the workers, what each of them does, and what is left to do."""

    def __init__(self, ray: Any, prepare: Callable[[Any], Work], plan: Any, on_gpus: bool, log: Log):
        self._ray, self._prepare, self._plan, self._log = ray, prepare, plan, log
        self._resource = "GPU" if on_gpus else "CPU"
        self._actor = ray.remote(num_cpus=0 if on_gpus else 1, num_gpus=1 if on_gpus else 0)(_Worker)
        # By the future that Ray returned: the worker and its job. A worker that is starting has no job.
        self._busy: dict[Any, tuple[Any, _Job | None]] = {}
        self._idle: list[Any] = []
        self._retries: deque[_Job] = deque()
        self._finished_by: Counter[Any] = Counter()
        self._failed_starts, self._last_failure = 0, ""

    def run(self, shards: Iterator[tuple[str, Any]], count: int) -> Iterator[tuple[str, Any]]:
        remaining = count
        while remaining:
            self._start_workers(remaining)
            self._assign(shards)
            for future in self._wait():
                if (finished := self._collect(future)) is not None:
                    remaining -= 1
                    yield finished
        shares = ", ".join(f"{shards:,}" for _, shards in self._finished_by.most_common(WORKERS_LOGGED))
        self._log(f"{count:,} shards by {len(self._finished_by):,} workers of the cluster: {shares}")

    def _start_workers(self, remaining: int) -> None:
        # At least one worker is requested even if the cluster has no resources yet. A cluster that grows on demand needs
        # the request to see the demand.
        wanted = min(remaining, max(1, int(self._resources())))
        while len(self._busy) + len(self._idle) < wanted and self._failed_starts < FAILED_STARTS:
            worker = self._actor.remote()
            self._busy[worker.prepare.remote(__version__, self._prepare, self._plan)] = worker, None

    def _assign(self, shards: Iterator[tuple[str, Any]]) -> None:
        """Give every idle worker a shard. Shards whose worker died go first."""
        while self._idle and (job := self._retries.popleft() if self._retries else _next_job(shards)):
            worker = self._idle.pop()
            self._busy[worker.work.remote(job.shard_input, job.attempts > 0)] = worker, job

    def _collect(self, future: Any) -> tuple[str, Any] | None:
        """Name and result of the shard that a worker has finished; None if it has started, or if its shard is tried again."""
        worker, job = self._busy.pop(future)
        try:
            result = self._ray.get(future)
        except self._ray.exceptions.RayTaskError:
            raise  # an exception in the worker's code that is not a SynpipeError: a bug
        except self._ray.exceptions.RayError as error:
            return self._replace_worker(worker, job, error)
        self._idle.append(worker)
        if job is None:
            if result is not None:
                raise result
            return None
        self._finished_by[worker] += 1
        return job.name, result

    def _replace_worker(self, worker: Any, job: _Job | None, error: Exception) -> tuple[str, SynpipeError] | None:
        """Handle the death of a worker. Returns the name of its shard and an error if the shard is not tried again."""
        self._last_failure = _shorten(error)
        if job is None:
            self._failed_starts += 1
            return None
        self._ray.kill(worker)  # it may only be out of reach, and must not work beside the one that takes over
        job.attempts += 1
        if job.attempts < ATTEMPTS:
            self._log(f"a worker died at shard {job.name}, which another one takes over ({self._last_failure})")
            self._retries.append(job)
            return None
        message = f"Shard {job.name} has cost {ATTEMPTS} workers, the last one: {self._last_failure}."
        return job.name, SynpipeError(message)

    def _wait(self) -> list[Any]:
        """Wait for a worker. Returns its future, or nothing after `CHECK_S`."""
        if not self._busy:
            raise SynpipeError(
                f"No worker of the Ray cluster could be started. The last one failed because: {self._last_failure}. Install "
                "the same synpipe on all machines of the cluster."
            )
        try:
            finished = self._ray.wait([*self._busy], timeout=CHECK_S)[0]
        except SystemError as error:
            # Ray's C++ code turns Ctrl-C, and exceptions of other signal handlers, into a SystemError.
            if error.__cause__ is not None and not isinstance(error.__cause__, Exception):
                raise error.__cause__ from None
            raise
        if not finished and not any(job for _, job in self._busy.values()):
            self._log(f"waiting for workers to start: the cluster has {self._resources():g} {self._resource}s")
        return finished

    def _resources(self) -> float:
        """Number of GPUs or processor cores that the cluster has at present."""
        return self._ray.cluster_resources().get(self._resource, 0)

    def kill_workers(self) -> None:
        for worker in [*self._idle, *(worker for worker, _ in self._busy.values())]:
            self._ray.kill(worker)


def _next_job(shards: Iterator[tuple[str, Any]]) -> _Job | None:
    shard = next(shards, None)
    return None if shard is None else _Job(*shard)


def _shorten(error: BaseException) -> str:
    """The beginning of an error's message in one line. Ray's messages go on to describe the whole cluster."""
    text = one_line(error)
    return text if len(text) <= ERROR_CHARACTERS else f"{text[:ERROR_CHARACTERS]} …"
