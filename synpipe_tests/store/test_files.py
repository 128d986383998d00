"""Files of the store are complete or absent, whatever happens to the writer. Specs are validated and hashed."""

import gzip
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import Field

from synpipe.errors import SynpipeError
from synpipe.specs import Spec, digest, read_yaml
from synpipe.store.files import (
    atomic_path,
    is_whole,
    read_json,
    read_table,
    remove_leftovers,
    write_json,
    write_table,
    write_text,
)

TABLE = pa.table({"id": pa.array([1, 2, None], pa.int64()), "name": ["a", None, "c"]})


@pytest.fixture
def small_disk(disk: Callable[[int], Path]) -> Path:
    """A folder on a disk of 1 MB."""
    return disk(1024)


def test_a_file_appears_whole_with_its_folders(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "file.txt"
    with atomic_path(path) as temporary:
        temporary.write_text("half")
        assert not path.exists()
        temporary.write_text("whole")
    assert path.read_text() == "whole"
    assert [file.name for file in path.parent.iterdir()] == ["file.txt"]


@pytest.mark.parametrize("error", [ValueError, SynpipeError, KeyboardInterrupt, SystemExit])
def test_an_error_in_the_middle_leaves_the_former_file_and_nothing_else(
    tmp_path: Path, error: type[BaseException]
) -> None:
    path = tmp_path / "file.txt"
    write_text(path, "former")
    with pytest.raises(error), atomic_path(path) as temporary:
        temporary.write_text("half")
        raise error("stop")
    assert path.read_text() == "former"
    assert list(tmp_path.iterdir()) == [path]


def test_a_writer_that_writes_nothing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SynpipeError, match="Cannot write"), atomic_path(tmp_path / "file.txt"):
        pass
    assert not list(tmp_path.iterdir())


def test_killed_at_any_moment_a_file_is_whole_or_absent(tmp_path: Path) -> None:
    """Writers are killed when they open or rename a file for the 1st, 2nd, 3rd … time, so the result does not depend on timing."""
    writers = textwrap.dedent(
        """
        import os, signal, sys
        from pathlib import Path
        import pyarrow as pa
        from synpipe.store import files

        def write(folder, deadly):
            count = 0

            def audit(event, arguments):
                nonlocal count
                if event in ("open", "os.rename", "os.mkdir") and str(folder) in str(arguments[0]):
                    count += 1
                    if count == deadly:
                        os.kill(os.getpid(), signal.SIGKILL)

            sys.addaudithook(audit)
            for value in range(3):
                files.write_json(folder / "new" / "file.json", {"values": [value] * 10_000})
                files.write_table(folder / "new" / "file.parquet", pa.table({"value": [value] * 10_000}))

        pa.table({"value": [0]})  # imports pandas once for all child processes
        status = None
        deadly = 0
        while status != 0:
            deadly += 1
            folder = Path(sys.argv[1]) / str(deadly)
            folder.mkdir()
            child = os.fork()
            if child == 0:
                write(folder, deadly)
                os._exit(0)
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            assert status in (0, -signal.SIGKILL), status
        """
    )
    subprocess.run([sys.executable, "-c", writers, str(tmp_path)], check=True)
    folders = sorted(tmp_path.iterdir(), key=lambda folder: int(folder.name))
    seen, leftovers = [], 0
    for folder in folders:
        document, table = folder / "new" / "file.json", folder / "new" / "file.parquet"
        values = set(read_json(document)["values"]) if document.exists() else {-1}
        rows = set(read_table(table)["value"].to_pylist()) if table.exists() else {-1}
        assert len(values) == len(rows) == 1
        seen.append((values.pop(), rows.pop()))
        strange = [file for file in folder.rglob("*") if file.is_file() and file not in (document, table)]
        assert all(file.name.startswith(".tmp-") for file in strange)
        leftovers += len(strange)
        remove_leftovers(folder, older_than_s=-1)
        assert not list(folder.rglob(".tmp-*"))
    # A later kill lets the writer get further, and some kills must hit a write in progress.
    assert seen == sorted(seen) and set(seen) == {(-1, -1), (0, -1), (0, 0), (1, 0), (1, 1), (2, 1), (2, 2)}
    assert leftovers >= 12


def test_killed_while_it_writes_a_file_is_whole_or_absent(tmp_path: Path) -> None:
    """Here the reader decides when to kill the writer, so the moment is arbitrary for the writer."""
    writer = textwrap.dedent(
        """
        import sys
        from pathlib import Path
        from synpipe.store import files

        for value in range(10**6):
            files.write_json(Path(sys.argv[1]), {"values": [value] * 20_000})
            print(value, flush=True)
        """
    )
    path = tmp_path / "file.json"
    random = np.random.default_rng(0)
    for _ in range(3):
        process = subprocess.Popen([sys.executable, "-c", writer, str(path)], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        process.stdout.readline()
        for _ in range(int(random.integers(1, 300))):
            assert len(set(read_json(path)["values"])) == 1
        process.kill()
        process.wait()
        process.stdout.close()
        assert len(set(read_json(path)["values"])) == 1


@pytest.mark.parametrize("folder", ["file/below", "file", "/proc/synpipe"])
def test_a_folder_that_cannot_be_written(tmp_path: Path, folder: str) -> None:
    (tmp_path / "file").write_text("")
    path = tmp_path / folder / "table.parquet"  # an absolute folder replaces tmp_path
    with pytest.raises(SynpipeError, match=r"Cannot write .*table\.parquet: .*--store") as caught:
        write_table(path, TABLE)
    assert "\n" not in str(caught.value)


def test_a_full_disk_leaves_the_former_file(small_disk: Path) -> None:
    path = small_disk / "file"
    noise = np.random.default_rng(0).bytes(3_000_000)
    write_text(path, "former")

    def write_hdf5() -> None:
        with atomic_path(path) as temporary, h5py.File(temporary, "w") as file:
            file.create_dataset("tiles", data=np.frombuffer(noise, np.uint8))

    for write in (
        lambda: write_text(path, noise.hex()),
        lambda: write_table(path, pa.table({"noise": np.frombuffer(noise, np.int64)})),
        write_hdf5,
    ):
        with pytest.raises(SynpipeError, match="No space left on device") as caught:
            write()
        assert "\n" not in str(caught.value)
        assert [file.name for file in small_disk.iterdir()] == ["file"]
        assert path.read_text() == "former"


def test_only_old_leftovers_are_removed(tmp_path: Path) -> None:
    old, young, other = tmp_path / "a" / ".tmp-1-x", tmp_path / "a" / ".tmp-2-x", tmp_path / "a" / "file"
    old.parent.mkdir()
    for path in (old, young, other):
        path.write_text("")
    (tmp_path / ".tmp-folder").mkdir()  # not made by synpipe
    for path in (old, other, tmp_path / ".tmp-folder"):
        os.utime(path, (0, 0))
    remove_leftovers(tmp_path)
    assert sorted(path.name for path in old.parent.iterdir()) == [".tmp-2-x", "file"]
    remove_leftovers(tmp_path / "absent")


def test_a_table_comes_back_with_its_types_and_metadata(tmp_path: Path) -> None:
    path = tmp_path / "table.parquet"
    write_table(path, TABLE.replace_schema_metadata({"kept": "yes"}), {"synpipe": '{"né": 1}'})
    found = read_table(path)
    assert found.equals(TABLE)
    assert found.schema.metadata == {b"kept": b"yes", b"synpipe": '{"né": 1}'.encode()}
    assert read_table(path, ["name"]).column_names == ["name"]
    assert pq.ParquetFile(path).metadata.row_group(0).column(0).compression == "ZSTD"


def test_damage_of_a_table_is_found(tmp_path: Path) -> None:
    path, damaged = tmp_path / "table.parquet", tmp_path / "damaged.parquet"
    numbers = np.random.default_rng(0).integers(0, 2**62, 500)
    write_table(path, pa.table({"id": numbers}))
    whole = path.read_bytes()
    file = pq.ParquetFile(path).metadata
    column = file.row_group(0).column(0)
    start = column.dictionary_page_offset or column.data_page_offset
    data = range(start + 60, start + column.total_compressed_size, 97)  # after the header of the page
    for place in data:
        content = bytearray(whole)
        content[place] ^= 1
        damaged.write_bytes(content)
        assert not is_whole(damaged)
        with pytest.raises(SynpipeError, match=r"damaged\.parquet is damaged .* moved .* Materialise again"):
            read_table(damaged)
        assert not damaged.exists() and (tmp_path / "damaged.parquet.damaged").read_bytes() == content
    for length in (0, 3, 4, 100, len(whole) // 2, len(whole) - 1):
        damaged.write_bytes(whole[:length])
        assert not is_whole(damaged)
        with pytest.raises(SynpipeError, match=r"damaged\.parquet is damaged"):
            read_table(damaged)
    assert is_whole(path) and read_table(path).num_rows == 500


def test_absent_and_damaged_documents(tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    for read in (read_json, read_table):
        with pytest.raises(SynpipeError, match=r"manifest\.json does not exist: materialise"):
            read(path)
    for content in (b"", b'{"a": ', b"\xff\xfe", gzip.compress(b"{}")):
        path.write_bytes(content)
        with pytest.raises(SynpipeError, match=r"manifest\.json is damaged"):
            read_json(path)
    write_json(path, {"b": [1, None], "a": "µ"})
    assert read_json(path) == {"a": "µ", "b": [1, None]}


class Inner(Spec):
    """A nested spec."""

    size: float = 4.0
    mode: Literal["a", "b"] = "a"


class Outer(Spec):
    """A spec."""

    name: str
    count: int = Field(1, ge=1)
    inner: Inner = Inner()
    parts: tuple[int, ...] = ()


def test_an_invalid_spec_names_every_wrong_key_at_once() -> None:
    wrong = {"count": 0, "inner": {"mode": "c"}, "nmae": "x"}
    with pytest.raises(SynpipeError) as caught:
        Outer.parse(wrong, "demo.yaml, entry 3")
    message = str(caught.value)
    assert message.startswith("demo.yaml, entry 3: ")
    for part in ("name:", "count:", "inner.mode:", "nmae:", "Known keys: name, count, inner, parts."):
        assert part in message
    for nonsense in (None, [], "text", 3):
        with pytest.raises(SynpipeError, match=r"demo\.yaml: the whole entry: "):
            Outer.parse(nonsense, "demo.yaml")


def test_equal_specs_have_equal_digests_however_they_are_written() -> None:
    first = Outer.parse({"name": "µ", "parts": [1, 2], "inner": {"size": 4}}, "")
    second = Outer.parse({"inner": {"mode": "a"}, "parts": (1, 2), "count": 1, "name": "µ"}, "")
    assert first.digest() == second.digest()
    # This digest must stay: later versions of synpipe look up existing stores by it.
    assert first.digest() == "25a30115e2cad441df60ee17d9461345"


@pytest.mark.parametrize(
    "change", [{"name": "b"}, {"count": 2}, {"inner": {"size": 4.6}}, {"inner": {"mode": "b"}}, {"parts": [2, 1]}]
)
def test_every_field_counts_in_the_digest(change: dict) -> None:
    base = {"name": "a", "parts": [1, 2]}
    assert Outer.parse(base, "").digest() != Outer.parse({**base, **change}, "").digest()


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda children: st.lists(children) | st.dictionaries(st.text(), children),
    max_leaves=8,
)


@settings(deadline=None, derandomize=True)
@given(st.dictionaries(st.text(), json_values))
def test_the_order_of_keys_does_not_count(value: dict) -> None:
    assert digest(value) == digest(dict(reversed(value.items())))


def test_yaml_files(tmp_path: Path) -> None:
    path = tmp_path / "demo.yaml"
    with pytest.raises(SynpipeError, match=r"demo\.yaml does not exist"):
        read_yaml(path)
    path.write_text("title: x\n  volume: [1\n")
    with pytest.raises(SynpipeError, match=r"demo\.yaml is not valid YAML: .*line 2") as caught:
        read_yaml(path)
    assert "\n" not in str(caught.value)
    for content in ("", "- a\n", "text"):
        path.write_text(content)
        with pytest.raises(SynpipeError, match="must hold a mapping"):
            read_yaml(path)
    path.write_bytes(b"title: \xff\n")
    with pytest.raises(SynpipeError, match="is not valid YAML"):
        read_yaml(path)
    path.write_text("title: x\nvolume: {path: v.h5}\n")
    assert read_yaml(path) == {"title": "x", "volume": {"path": "v.h5"}}
