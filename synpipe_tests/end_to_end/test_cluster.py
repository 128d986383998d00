"""Shard steps on a real Ray cluster of two workers, with tiles, vectors and indexes on an S3 server."""

import os
import signal
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from synpipe.assets.graph import nodes, states
from synpipe.assets.manifest import read_manifest
from synpipe.cluster import engines
from synpipe.cluster.engines import Cluster, connect, on_cluster
from synpipe.cluster.workers import EmbeddingPlan, prepare_embedding, shard_name
from synpipe.datasets import Dataset, Project
from synpipe.embeddings.cache import EmbeddingCache
from synpipe.errors import SynpipeError
from synpipe.index.search import SynapseIndex
from synpipe.store.files import read_table
from synpipe.store.objects import ObjectPath
from synpipe_tests.conftest import project_of, write_project
from synpipe_tests.support.object_store import BUCKET, serve

BULK = ObjectPath(f"s3://{BUCKET}/bulk")
ASSETS = ("volume", "annotations", "synapses", "synapse_stacks", "rgb_tiles", "embeddings_tiny", "embedding_table_tiny")
SPEC: dict[str, Any] = {"encoders": ["tiny"], "classifier": None, "evaluation": None}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A cluster of two workers on this machine, with a GPU each, and the S3 server that they share with the driver."""
    ray = pytest.importorskip("ray", reason="ray is not installed")
    with serve(), pytest.MonkeyPatch.context() as patch:
        for name in ("RAY_ADDRESS", "SYNPIPE_BULK"):
            patch.delenv(name, raising=False)
        patch.setenv("SYNPIPE_ENGINE", "ray")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_AUTH_MODE", "disabled")  # otherwise Ray would write a token into the home folder
        patch.setenv("OMP_NUM_THREADS", "1")
        # Ray counts two GPUs and assigns one to each worker. They do not exist, so the workers compute on the CPU.
        ray.init(num_cpus=2, num_gpus=2, include_dashboard=False, object_store_memory=80 * 2**20, logging_level="ERROR")
        yield connect()
        ray.shutdown()


def workers_at_work() -> list[int]:
    """Ids of the processes, descending from this one, of Ray actors that are working on a shard."""
    parents, titles = {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            titles[int(folder.name)] = (folder / "cmdline").read_text()
        except OSError:
            continue  # it has ended in the meantime

    def is_ours(pid: int) -> bool:
        return pid == os.getpid() or (pid in parents and is_ours(parents[pid]))

    return [pid for pid, title in titles.items() if title.startswith("ray::_Worker.work") and is_ours(pid)]


def kill_the_first_at_work(killed: list[int]) -> None:
    deadline = time.monotonic() + 120
    while not killed and time.monotonic() < deadline:
        for pid in workers_at_work()[:1]:
            os.kill(pid, signal.SIGKILL)
            killed.append(pid)
        time.sleep(0.005)


def run(dataset: Dataset, assets: tuple[str, ...], log: list[str]) -> None:
    for node in nodes(dataset):
        if node.name in assets:
            node.run(log.append)


@pytest.fixture(scope="module")
def both(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> tuple[Dataset, Dataset, list[str], list[int]]:
    """The small demo made in this process, and the same made by the cluster while one of its workers is killed. Also the log of
    the cluster run and the ids of killed processes."""
    here = write_project(tmp_path_factory.mktemp("here"), **SPEC).dataset("demo")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SYNPIPE_ENGINE", "local")
        run(here, (*ASSETS, "index_tiny"), [])
    there = replace(write_project(tmp_path_factory.mktemp("there"), **SPEC), bulk=BULK).dataset("demo")
    log: list[str] = []
    killed: list[int] = []
    run(there, ASSETS[:5], log)
    killer = Thread(target=kill_the_first_at_work, args=(killed,))
    killer.start()
    run(there, (*ASSETS[5:], "index_tiny"), log)
    killer.join()
    return here, there, log, killed


def parts(dataset: Dataset) -> Iterator[tuple[str, pa.Table]]:
    """Name and table of each part of vectors."""
    fingerprint = read_manifest(dataset, "embeddings_tiny").figures["encoder_fingerprint"]
    for path in (dataset.embeddings_folder / fingerprint).glob("*.parquet"):
        yield path.name, pq.read_table(pa.BufferReader(path.read_bytes()))


def test_cluster_and_object_store_make_what_one_process_makes(both) -> None:
    """Data versions, tiles, vectors (to the last bit) and tables do not depend on where they were made."""
    here, there, log, _ = both
    for asset in (*ASSETS, "index_tiny"):
        versions = [read_manifest(dataset, asset).data_version for dataset in (here, there)]
        assert versions[0] == versions[1], asset
    assert any("shards by" in line for line in log)
    assert not (there.folder / "tiles").exists() and not (there.folder / "embeddings").exists()
    assert not (there.folder / "lancedb").exists()
    tables = [read_table(dataset.tiles_path).drop_columns(["file", "row"]) for dataset in (here, there)]
    assert tables[0].equals(tables[1])
    assert read_table(here.table_path("tiny")).equals(read_table(there.table_path("tiny")))
    vectors_by_hash = [
        {hash_: vector for _, table in parts(dataset) for hash_, vector in rows(table)} for dataset in (here, there)
    ]
    assert vectors_by_hash[0] == vectors_by_hash[1] and len(vectors_by_hash[0]) > 50
    assert {table.schema.metadata[b"encoder"] for dataset in (here, there) for _, table in parts(dataset)} == {
        next(parts(here))[1].schema.metadata[b"encoder"]
    }


def rows(table: pa.Table) -> Iterator[tuple[str, bytes]]:
    vectors = np.array(table["vector"].to_pylist(), np.float32)
    return ((name, vector.tobytes()) for name, vector in zip(table["content_hash"].to_pylist(), vectors, strict=True))


def test_a_killed_worker_affects_only_its_shard_and_nothing_is_embedded_twice(both) -> None:
    _, there, log, killed = both
    (pid,) = killed
    assert not Path(f"/proc/{pid}").exists() or "Z" in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2][:3]
    assert sum("a worker died at shard" in line for line in log) == 1
    tiles = read_table(there.tiles_path, ["shard", "content_hash"])
    contents = set(tiles["content_hash"].to_pylist())
    manifest = read_manifest(there, "embeddings_tiny")
    assert manifest.rows == len(tiles) and manifest.figures["tiles_embedded"] == len(contents)
    held = Counter(name for _, table in parts(there) for name in table["content_hash"].to_pylist())
    assert set(held) == contents and set(held.values()) == {1}
    by_shard = {shard_name(shard) for shard in tiles["shard"].to_pylist()}
    assert {name.partition("-")[0] for name, _ in parts(there)} == by_shard


def test_run_again_nothing_is_made(both, cluster: Cluster) -> None:
    here, there, *_ = both
    before = sorted((str(path), path.stat().st_mtime) for path in there.embeddings_folder.rglob("*"))
    log: list[str] = []
    run(there, ASSETS, log)
    assert "96 cut-outs made" not in "".join(log) and any("0 cut-outs made" in line for line in log)
    assert any("0 tiles embedded" in line for line in log)
    assert not any("shards by" in line for line in log)  # the cluster was not used
    assert sorted((str(path), path.stat().st_mtime) for path in there.embeddings_folder.rglob("*")) == before
    assert (
        read_manifest(here, "embedding_table_tiny").data_version
        == read_manifest(there, "embedding_table_tiny").data_version
    )


def test_one_process_continues_the_work_of_the_cluster(both, monkeypatch: pytest.MonkeyPatch) -> None:
    """If a part is lost, only its rows are made again, wherever that happens."""
    here, there, *_ = both
    monkeypatch.setenv("SYNPIPE_ENGINE", "local")
    part = min((path for path in there.embeddings_folder.rglob("*.parquet")), key=str)
    lost = pq.read_metadata(pa.BufferReader(part.read_bytes())).num_rows
    part.unlink()
    tiles = min((path for path in there.cut_outs_folder.rglob("*.h5")), key=str)
    cut = sum(name.endswith(tiles.name) for name in read_table(there.tiles_path, ["file"])["file"].to_pylist())
    tiles.unlink()
    log: list[str] = []
    run(there, ASSETS, log)
    assert any(line.startswith(f"{lost} tiles embedded") for line in log)
    assert read_manifest(there, "synapse_stacks").figures["cut_outs_made"] >= cut > 0
    versions = [read_manifest(dataset, "embedding_table_tiny").data_version for dataset in (here, there)]
    assert versions[0] == versions[1]


def test_the_index_on_the_object_store_answers(both) -> None:
    here, there, *_ = both
    indexes = [SynapseIndex(dataset, "tiny") for dataset in (here, there)]
    for synapse_id in read_table(here.tiles_path, ["synapse_id"])["synapse_id"].to_pylist()[:5]:
        answers = [index.search(synapse_id, "cosine", 3) for index in indexes]
        assert answers[0] == answers[1] and answers[0]


def test_commands_work_on_the_object_store(both, monkeypatch: pytest.MonkeyPatch) -> None:
    """They work without SYNPIPE_BULK, because the store records its bulk folder."""
    from synpipe.cli import main

    _, there, *_ = both
    project: Project = project_of(there)
    monkeypatch.setenv("SYNPIPE_DATA", str(project.data))

    def synpipe(*arguments: str) -> str:
        result = CliRunner().invoke(main, ["--store", str(project.store), *arguments], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.output

    assert "fresh" in synpipe("status") and "current" in synpipe("versions")
    some_id = read_table(there.tiles_path, ["synapse_id"])["synapse_id"][0].as_py()
    assert "Most similar to" in synpipe("search", str(some_id))
    assert {state.state for state in states(there) if state.asset in ASSETS} == {"fresh"}

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
        assert "its tiles cannot be looked at: Cannot list s3://bucket/bulk/demo/tiles/suspect:" in synpipe("status")

    used = {str(path) for path in BULK.rglob("*.parquet")}
    old = EmbeddingCache(there.embeddings_folder, "0" * 32)
    leftover = old.add("00000", ["f" * 32], np.ones((1, 4), np.float32))
    assert str(leftover) in synpipe("gc")
    assert leftover.exists()
    synpipe("gc", "--delete")
    assert not leftover.exists()
    assert {str(path) for path in BULK.rglob("*.parquet")} == used


def test_an_encoder_that_differs_on_a_worker_embeds_nothing(both) -> None:
    """A worker refuses to work if its fingerprint of the encoder differs from the driver's."""
    _, there, *_ = both
    spec = there.encoders["tiny"]
    plan = EmbeddingPlan(spec, None, "", "0" * 32, there.bulk_folder, "colour", "cpu")  # type: ignore[arg-type]
    with pytest.raises(SynpipeError, match=r"has the fingerprint .* and 000000000000 on the driver"):
        prepare_embedding(plan)


def collect(cluster: Cluster, prepare: Any, shards: int, log: list[str]) -> dict[str, Any]:
    needs = ((str(number), number) for number in range(shards))
    found = [*cluster.run(prepare, "plan", needs, shards, log.append)]
    assert len(found) == len({name for name, _ in found}) == shards
    return dict(found)


def test_both_workers_work_and_no_more_shards_are_under_way_than_workers(cluster: Cluster) -> None:
    def prepare(plan: str) -> Any:
        def work(number: int, again: bool) -> tuple[str, int]:
            time.sleep(0.02)
            return os.environ["CUDA_VISIBLE_DEVICES"], number

        return work

    taken, most = 0, 0
    log: list[str] = []

    def needs() -> Iterator[tuple[str, int]]:
        nonlocal taken
        for number in range(60):
            taken += 1
            yield str(number), number

    found = {}
    for name, result in cluster.run(prepare, "plan", needs(), 60, log.append, on_gpus=True):
        found[name] = result
        most = max(most, taken - len(found))
    assert {name: number for name, (_, number) in found.items()} == {str(number): number for number in range(60)}
    assert most <= 2
    assert {gpu for gpu, _ in found.values()} == {"0", "1"}
    assert "60 shards by 2 workers" in log[-1]


def test_a_failure_affects_only_its_shard(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """One shard is damaged, one loses its worker once, and one kills every worker."""
    monkeypatch.setattr(engines, "ATTEMPTS", 2)

    def prepare(plan: str) -> Any:
        def work(number: int, again: bool) -> tuple[str, bool]:
            if number == 1:
                raise SynpipeError("this one is damaged")
            if number == 3 or (number == 2 and not again):
                os.kill(os.getpid(), signal.SIGKILL)
            return plan, again

        return work

    log: list[str] = []
    found = collect(cluster, prepare, 6, log)
    assert str(found["1"]) == "this one is damaged"
    assert found["2"] == ("plan", True)
    assert isinstance(found["3"], SynpipeError) and "Shard 3 has cost 2 workers" in str(found["3"])
    assert [found[name] for name in "045"] == [("plan", False)] * 3
    assert sum("shard 3" in line for line in log) == sum("shard 2" in line for line in log) == 1


def test_a_worker_that_cannot_begin_is_an_error_at_once(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(plan: str) -> Any:
        raise SynpipeError("no such volume here")

    def die(plan: str) -> Any:
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(SynpipeError, match=r"On the worker .*: no such volume here"):
        collect(cluster, refuse, 1, [])
    monkeypatch.setattr(engines, "FAILED_STARTS", 1)
    with pytest.raises(SynpipeError, match="No worker of the Ray cluster could be started"):
        collect(cluster, die, 1, [])


def test_interrupted_the_workers_end(cluster: Cluster) -> None:
    def prepare(plan: str) -> Any:
        os.kill(driver, signal.SIGINT)
        return lambda number, again: time.sleep(600)

    driver = os.getpid()
    with pytest.raises(KeyboardInterrupt):
        collect(cluster, prepare, 1, [])
    deadline = time.monotonic() + 60
    while workers_at_work():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_the_environment_selects_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    for value, expected in (("", False), ("local", False), ("ray", True)):
        monkeypatch.setenv("SYNPIPE_ENGINE", value)
        assert on_cluster() == expected
    monkeypatch.setenv("SYNPIPE_ENGINE", "dask")
    with pytest.raises(SynpipeError, match="use local or ray"):
        on_cluster()


def test_a_cluster_that_is_out_of_reach_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = pytest.importorskip("ray", reason="ray is not installed")
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    for address in ("127.0.0.1:9", "ray://127.0.0.1:9"):
        monkeypatch.setenv("RAY_ADDRESS", address)
        with pytest.raises(SynpipeError, match=f"The Ray cluster {address} cannot be used"):
            connect()
