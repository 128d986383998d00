"""Files of the store are complete or absent, whatever happens to the writer. Specs are validated and hashed."""

import gzip
import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

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
    for part in (
        "`name` is required and missing.",
        "`count` is 0, but it should be at least 1.",
        "`inner.mode` is 'c', but it should be 'a' or 'b'.",
        "`nmae` is not a known key: did you mean `name`? Known keys: name, count, inner, parts.",
    ):
        assert part in message
    for nonsense in (None, [], "text", 3):
        with pytest.raises(SynpipeError, match=r"demo\.yaml: the whole entry is .*, but it should be a mapping"):
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


ALIASES_OF_ALIASES = "a0: &a0 [x, x]\n" + "".join(
    f"a{number}: &a{number} [{', '.join([f'*a{number - 1}'] * 9)}]\n" for number in range(1, 12)
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (ALIASES_OF_ALIASES, ["more than 100,000 values", "aliases", "line 6"]),
        ("a: &a [*a]\n", ["line 1", "an alias refers to a value that contains the alias"]),
        ("a: &a\n  b: {c: *a}\n", ["an alias refers to a value that contains the alias"]),
        ("a: " + "[" * 150 + "]" * 150, ["nested more than 100 deep"]),
        ("a: " + "[" * 3000 + "]" * 3000, ["nested more than 100 deep"]),
        ("a0: &a0 x\n" + "".join(f"a{n + 1}: &a{n + 1} [*a{n}]\n" for n in range(2000)), ["nested more than 100 deep"]),
        ("a: " + "1" * 5000, ["line 1", "a number is too large"]),
        ("a: 99999999999999999999\n", ["a number is too large"]),
        ("title: x\na: {{ data }}\n", ["line 2", "Placeholders such as {{ name }}", "${VARIABLE:-default}"]),
        ("a: {{ data }}/volume.h5\n", ["line 1", "Placeholders such as {{ name }}"]),
        ("? [a, b]\n: 1\n", ["a key is a list or a mapping"]),
        ("a: 1\na: 2\n", ["line 2", "the key 'a' appears twice"]),
        ("a: 2020-13-45\n", ["line 1", "month"]),
        ('a: "\\0"\n', ["characters that no text may have"]),
        ('a: "\\ud800"\n', ["characters that no text may have"]),
    ],
)
def test_yaml_that_cannot_be_used_is_explained_at_once(tmp_path: Path, text: str, expected: list[str]) -> None:
    path = tmp_path / "demo.yaml"
    path.write_text(text)
    began = time.monotonic()
    with pytest.raises(SynpipeError, match=r"demo\.yaml is not valid YAML: ") as caught:
        read_yaml(path)
    assert time.monotonic() - began < 20
    assert [part for part in expected if part not in str(caught.value)] == [], caught.value
    assert len(str(caught.value)) < 400


def test_aliases_and_merge_keys_can_be_used(tmp_path: Path) -> None:
    path = tmp_path / "demo.yaml"
    path.write_text("a: &a {x: 1, y: 2}\nb: &b {<<: *a, y: 3}\nc: {<<: [*b, *a], z: 4}\nd: [*a, *b]\n")
    assert read_yaml(path) == {
        "a": {"x": 1, "y": 2},
        "b": {"x": 1, "y": 3},
        "c": {"x": 1, "y": 3, "z": 4},
        "d": [{"x": 1, "y": 2}, {"x": 1, "y": 3}],
    }


class First(Spec):
    kind: Literal["first"]
    size: tuple[float, float] = (1, 1)


class Second(Spec):
    kind: Literal["second"]
    args: dict[str, bool | int | str] = Field(default_factory=dict)


class WithUnion(Spec):
    entries: tuple[Annotated[First | Second, Field(discriminator="kind")], ...] = Field((), min_length=1)


@pytest.mark.parametrize(
    ("entry", "sentence"),
    [
        ({"kind": "first", "size": 4}, "`entries.0.size` is 4, but it should be a list in square brackets."),
        ({"kind": "first", "size": [4]}, "`entries.0.size.1` is required and missing: the list is too short."),
        ({"kind": "first", "size": ["x", 1]}, "`entries.0.size.0` is 'x', but it should be a number."),
        (
            {"kind": "first", "sise": 4},
            "`entries.0.sise` is not a known key: did you mean `size`? Known keys: kind, size.",
        ),
        (
            {"kind": "second", "args": {"x": []}},
            "`entries.0.args.x` is [], but it should be true or false or a whole number",
        ),
        ({"kind": "third"}, "`entries.0` has 'third' as 'kind', but it should be one of 'first', 'second'."),
        ({"size": [1, 2]}, "`entries.0` has no key 'kind', which is required."),
        (None, "`entries.0` is empty, but it should be a mapping"),
        ({"kind": "second", 3: 4}, "`entries.0.3` is not a known key. Known keys: kind, args."),
    ],
)
def test_a_wrong_key_is_explained_in_a_sentence(entry: Any, sentence: str) -> None:
    """The place as the file has it, what was found and what is expected, without the words of the library."""
    with pytest.raises(SynpipeError) as caught:
        WithUnion.parse({"entries": [entry]}, "demo.yaml")
    assert str(caught.value).startswith(f"demo.yaml: {sentence}"), caught.value
    assert "Input should" not in str(caught.value) and str(caught.value).count(". ") <= 1
