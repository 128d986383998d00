"""Object stores: objects are complete or absent, errors name damaged objects, and failures are reported within seconds."""

import contextlib
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread

import h5py
import numpy as np
import pyarrow as pa
import pytest

from synpipe.datasets import record_bulk
from synpipe.embeddings import cache as embedding_cache
from synpipe.embeddings.cache import EmbeddingCache
from synpipe.errors import SynpipeError
from synpipe.index import recall as index_recall
from synpipe.index.publish import open_current, publish, republish
from synpipe.store.files import atomic_path, read_table, write_table
from synpipe.store.objects import ObjectPath, lance_options, list_paths, locate
from synpipe.tiles.tile import TileReader
from synpipe_tests.conftest import write_project
from synpipe_tests.support.object_store import BUCKET, serve
from synpipe_tests.support.tables import clustered, embedding_table

ROOT = ObjectPath(f"s3://{BUCKET}/some/prefix")
RANDOM = np.random.default_rng(0)


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with serve() as address:
        yield address


def everything() -> list[str]:
    return [str(path) for path in list_paths(ObjectPath(f"s3://{BUCKET}"), "*/*/*/*") if path.is_file()]


def test_objects_are_used_like_files(server: str) -> None:
    path = ROOT / "folder" / "00001-abc.h5"
    assert not path.exists()
    with pytest.raises(FileNotFoundError):
        path.read_bytes()
    with pytest.raises(FileNotFoundError):
        path.stat()
    path.write_bytes(b"first")
    path.write_bytes(b"second one")
    assert path.read_bytes() == b"second one"
    assert (path.name, path.stem, path.suffix, str(path.parent)) == (
        "00001-abc.h5",
        "00001-abc",
        ".h5",
        str(ROOT / "folder"),
    )
    assert path.exists() and path.is_file() and path.parent.is_dir() and not path.parent.is_file()
    assert path.stat().st_size == 10
    assert time.time() - path.stat().st_mtime < 60

    other = path.with_suffix(".parquet")
    path.replace(other)
    assert not path.exists()
    (ROOT / "top.json").write_bytes(b"{}")
    assert [str(found) for found in list_paths(ROOT, "*/*.parquet")] == [str(other)]
    assert [found.stat().st_size for found in ROOT.glob("*/0*")] == [10]
    assert {found.name for found in ROOT.iterdir()} == {"folder", "top.json"}
    assert {found.name for found in ROOT.rglob("*.parquet")} == {other.name}
    assert [*(ROOT / "absent").glob("*")] == []
    other.unlink()
    other.unlink(missing_ok=True)
    with pytest.raises(FileNotFoundError):
        other.unlink()


def test_a_table_on_an_object_store_is_the_table(server: str) -> None:
    table = pa.table({"number": [1, 2, 3], "name": ["a", None, "c"]})
    write_table(ROOT / "tables" / "one.parquet", table)
    assert read_table(ROOT / "tables" / "one.parquet", ["name"]).equals(table.select(["name"]))
    with pytest.raises(SynpipeError, match=r"s3://bucket/some/prefix/tables/two\.parquet does not exist"):
        read_table(ROOT / "tables" / "two.parquet")
    (ROOT / "tables" / "two.parquet").write_bytes(b"PAR1 no more")
    with pytest.raises(SynpipeError, match=r"two\.parquet is damaged"):
        read_table(ROOT / "tables" / "two.parquet")


def test_an_object_whose_writer_fails_is_absent(server: str) -> None:
    path = ROOT / "failed" / "part.h5"
    with pytest.raises(KeyboardInterrupt), atomic_path(path) as temporary:
        temporary.write_bytes(b"half of it")
        raise KeyboardInterrupt
    assert not path.exists()


class Gate(BaseHTTPRequestHandler):
    """A proxy in front of the server that holds back, or refuses, the second piece of an upload."""

    protocol_version = "HTTP/1.1"
    server_address = ""
    reached = Event()
    refuse = False

    def _pass_on(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size + 2)[:-2]
            self.rfile.readline()
        if "partNumber=2" in self.path:
            type(self).reached.set()
            if not type(self).refuse:
                Event().wait(60)
            self._answer(403, b"<Error><Code>AccessDenied</Code><Message>no</Message></Error>")
            return
        own = ("host", "connection", "expect", "transfer-encoding", "content-length")
        headers = {name: value for name, value in self.headers.items() if name.lower() not in own}
        request = urllib.request.Request(self.server_address + self.path, body or None, headers, method=self.command)
        try:
            with urllib.request.urlopen(request) as answer:
                self._answer(answer.status, answer.read(), dict(answer.headers))
        except urllib.error.HTTPError as error:
            self._answer(error.code, error.read(), dict(error.headers))

    def _answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            if name.lower() not in ("content-length", "connection", "transfer-encoding"):
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        with contextlib.suppress(BrokenPipeError):  # the client was killed
            self.end_headers()
            self.wfile.write(body)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _pass_on

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def gate(server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Gate]]:
    handler = type("Handler", (Gate,), {"server_address": server, "reached": Event(), "refuse": False})
    proxy = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    proxy.daemon_threads = True
    Thread(target=proxy.serve_forever, daemon=True).start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.server_port}")
    yield handler
    proxy.shutdown()


UPLOAD = """
from synpipe.store.objects import ObjectPath
ObjectPath("s3://bucket/some/prefix/killed/part.h5").write_bytes(bytes(40_000_000))
"""


def test_an_upload_that_is_killed_leaves_nothing(gate: type[Gate]) -> None:
    with subprocess.Popen([sys.executable, "-c", UPLOAD]) as process:
        assert gate.reached.wait(60)
        process.send_signal(signal.SIGKILL)
    assert list_paths(ROOT / "killed", "*") == []


def test_an_upload_with_a_refused_piece_leaves_nothing(gate: type[Gate]) -> None:
    gate.refuse = True
    with pytest.raises(SynpipeError, match=r"Cannot write s3://bucket/some/prefix/refused/part\.h5.*ACCESS_DENIED"):
        (ROOT / "refused" / "part.h5").write_bytes(bytes(40_000_000))
    assert list_paths(ROOT / "refused", "*") == []


def test_failures_of_the_store_are_reported_within_seconds(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    started = time.monotonic()
    nowhere = ObjectPath("s3://nowhere/prefix")
    with pytest.raises(
        SynpipeError, match=r"Cannot list s3://nowhere/prefix: .*bucket does not exist.*AWS_ENDPOINT_URL"
    ):
        nowhere.check()
    with pytest.raises(SynpipeError, match="Cannot write s3://nowhere/prefix/file"):
        (nowhere / "file").write_bytes(b"something")
    with pytest.raises(SynpipeError, match="Cannot list s3://nowhere/prefix/embeddings/f"):
        EmbeddingCache(nowhere / "embeddings", "f").known_hashes("00000")
    ROOT.check()
    (ObjectPath(f"s3://{BUCKET}/empty")).check()
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(SynpipeError, match=r"Cannot list s3://bucket/some/prefix: .*[Cc]ould not connect"):
        ROOT.check()
    assert time.monotonic() - started < 60  # by default the clients retry for minutes
    monkeypatch.setenv("AWS_ENDPOINT_URL", "127.0.0.1:9")
    with pytest.raises(SynpipeError, match="should begin with http"):
        ROOT.check()


def test_addresses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert locate("s3://bucket/a/b/") == ObjectPath("s3://bucket/a/b")
    assert locate(str(tmp_path / "x")) == tmp_path / "x"
    for wrong in ("ftp://bucket/a", "s3://", "s3://key:secret@bucket/a", "s3://bucket/a?endpoint=b", "s3://bucket//a"):
        with pytest.raises(SynpipeError, match="SYNPIPE_BULK"):
            locate(wrong)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    options = lance_options(ROOT)
    assert options is not None and options["allow_http"] == "true" and "secret" not in options.values()
    assert lance_options(tmp_path) is None


def write_part(path: ObjectPath, tiles: np.ndarray) -> None:
    with atomic_path(path) as temporary, h5py.File(temporary, "w") as file:
        file.create_dataset("tiles", data=tiles)


def index_of(tiles: np.ndarray, name: str, first: int) -> pa.Table:
    import zlib

    return pa.table(
        {
            "synapse_id": np.arange(len(tiles)) + first,
            "file": [name] * len(tiles),
            "row": np.arange(len(tiles), dtype=np.int32),
            "crc32": np.array([zlib.crc32(tile.tobytes()) for tile in tiles], np.uint32),
        }
    )


def test_tiles_are_read_by_ranges(server: str) -> None:
    parts = [RANDOM.integers(0, 256, (count, 3, 256, 256), dtype=np.uint8) for count in (40, 7)]
    names = [f"tiles/recipe/0000{number}.h5" for number in range(2)]
    for name, part in zip(names, parts, strict=True):
        write_part(ROOT / name, part)
    tables = [index_of(part, name, 1000 * n) for n, (name, part) in enumerate(zip(names, parts, strict=True))]
    index, tiles = pa.concat_tables(tables), np.concatenate(parts)
    reader = TileReader(index, ROOT, "colour")
    for rows in (np.arange(47), RANDOM.permutation(47), np.array([46, 0, 0, 3, 12]), np.array([], dtype=np.int64)):
        np.testing.assert_array_equal(reader.read(rows), tiles[rows])
    np.testing.assert_array_equal(reader.by_id(1003), tiles[43])
    grey = TileReader(index, ROOT, "grey").read(np.array([5]))
    np.testing.assert_array_equal(grey[0], np.broadcast_to(tiles[5, 1], (3, 256, 256)))

    damaged = bytearray((ROOT / names[1]).read_bytes())
    damaged[-(3 * 256 * 256 + 5000)] ^= 1
    (ROOT / names[1]).write_bytes(damaged)
    with pytest.raises(SynpipeError, match=r"00001\.h5, row \d, differ from their checksum"):
        TileReader(index, ROOT, "colour").read(np.arange(40, 47))
    (ROOT / names[1]).write_bytes(damaged[: len(damaged) // 2])
    with pytest.raises(SynpipeError, match=r"s3://.*00001\.h5, row \d, cannot be read"):
        TileReader(index, ROOT, "colour").read(np.arange(40, 47))
    (ROOT / names[1]).unlink()
    with pytest.raises(SynpipeError, match=r"s3://.*00001\.h5 do not exist"):
        TileReader(index, ROOT, "colour").read(np.arange(40, 47))


def test_vectors_on_an_object_store(
    server: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A damaged vector is found when it is read. Damaged hashes, or a damaged file end, are found when the cache is listed."""
    vectors = RANDOM.normal(size=(5, 8)).astype(np.float32)
    hashes = [f"{number:032x}" for number in range(5)]
    cache = EmbeddingCache(ROOT / "embeddings", "f" * 32)
    first = cache.add("00003", hashes[:2], vectors[:2])
    cache.add("00003", hashes[2:], vectors[2:])
    for reader in (cache, EmbeddingCache(ROOT / "embeddings", "f" * 32)):
        np.testing.assert_array_equal(reader.read("00003", hashes[::-1]), vectors[::-1])
        assert reader.known_hashes("00002") == set()
    flipped = bytearray(first.read_bytes())
    flipped[len(flipped) // 2] ^= 1
    first.write_bytes(flipped)
    monkeypatch.setattr(embedding_cache, "SMALL_BYTES", 0)  # so that the hashes are read apart
    missing = partial(EmbeddingCache(ROOT / "embeddings", "f" * 32).missing_rows, "00003", ["?", *hashes, "?"])
    assert missing(verify=False).tolist() == [0] and not first.with_suffix(".damaged").exists()
    first.write_bytes(first.read_bytes()[:-20])
    assert missing(verify=False).tolist() == [0, 1, 2]
    assert EmbeddingCache(ROOT / "embeddings", "f" * 32).known_hashes("00003") == set(hashes[2:])
    assert str(first) in caplog.text and first.with_suffix(".damaged").exists() and not first.exists()


@pytest.mark.slow
def test_an_index_of_partitions_is_built_in_segments_there_too(
    server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index_recall, "RECALL_QUERIES", 20)  # each query sends several requests
    vectors = clustered(6000, 16)
    table, database = embedding_table(tmp_path / "table.parquet", vectors), ROOT / "lancedb"
    report = publish(table, database, "tiny", "a" * 32, print)
    assert (report.kind, report.rows) == ("IVF_FLAT", 6000) and report.recall >= 0.99
    assert len(open_current(database, "tiny").to_lance().get_fragments()) == 2
    folders = {path.parent.name for path in list_paths(database / "tiny.lance" / "_indices", "*/*")}
    assert len(folders) == 8  # one for the vectors and seven for columns; the segments have been removed
    # Publish a second version beside the first, then return to the first.
    assert publish(table, database, "tiny", "b" * 32, print).tag != report.tag
    assert republish(database, "tiny", "a" * 32, report.tag[-12:], print) == report


def test_the_store_records_its_bulk_folder(tmp_path: Path, server: str) -> None:
    """With or without SYNPIPE_BULK, existing files are found and never silently made a second time elsewhere."""
    project = write_project(tmp_path)
    from dataclasses import replace

    there = replace(project, bulk=ROOT).dataset("demo")
    assert there.bulk_folder == ROOT / "demo"
    record_bulk(there)
    assert project.dataset("demo").bulk_folder == ROOT / "demo"
    with pytest.raises(
        SynpipeError, match=r"are in s3://bucket/some/prefix/demo, but SYNPIPE_BULK places them in s3://other/demo"
    ):
        replace(project, bulk=ObjectPath("s3://other")).dataset("demo")

    elsewhere = write_project(tmp_path / "elsewhere")
    (elsewhere.store / "demo" / "tiles").mkdir(parents=True)
    assert elsewhere.dataset("demo").bulk is None
    with pytest.raises(SynpipeError, match="Unset SYNPIPE_BULK to use the existing ones"):
        replace(elsewhere, bulk=ROOT).dataset("demo")
    nowhere = replace(write_project(tmp_path / "new"), bulk=ObjectPath("s3://nowhere/x")).dataset("demo")
    with pytest.raises(SynpipeError, match="s3://nowhere/x"):
        record_bulk(nowhere)
    assert not (nowhere.folder / "bulk.json").exists()
    assert os.environ.get("SYNPIPE_BULK") is None
