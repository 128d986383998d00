"""A file of the store with a flipped byte or cut short: found by its checksum, named, and made anew by the same command, with
nothing deleted by hand. A disk that is full: the file is named, and with space the same command carries on."""

import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import h5py
import numpy as np
import pyarrow.parquet as pq
import pytest

from synpipe.assets.graph import nodes, states
from synpipe.assets.rgb_tiles import open_tiles
from synpipe.datasets import Dataset, Project
from synpipe.embeddings import cache as embedding_cache
from synpipe.errors import SynpipeError
from synpipe.index.publish import open_current
from synpipe.index.versions import list_versions, rollback
from synpipe.reports.housekeeping import find_leftovers, remove_leftovers
from synpipe.tiles import extraction
from synpipe.tiles.parts import mark_damaged
from synpipe_tests.support.command import answer, assets, files, invoke, refusal
from synpipe_tests.support.inputs import Inputs, Store

INPUTS = Inputs({1000 + number: ((number % 6, 40 * number, 500 - 30 * number), "gaba") for number in range(12)})


def materialise(dataset: Dataset, only_stale: bool = False) -> str:
    """Every step, as `synpipe materialize` runs them, or with --stale; what they said."""
    said: list[str] = []
    stale = {state.asset for state in states(dataset) if state.state != "fresh"}
    for node in nodes(dataset):
        if node.name in stale or not only_stale:
            node.run(said.append)
    return "\n".join(said)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Project, Store]:
    folder = tmp_path_factory.mktemp("whole")
    project = Project(folder / "data", folder / "store")
    INPUTS.write(project.data)
    materialise(project.dataset("demo"))
    return project, Store.read(project)


@pytest.fixture
def dataset(whole: tuple[Project, Store], tmp_path: Path) -> Dataset:
    shutil.copytree(whole[0].store, tmp_path / "store")
    return Project(whole[0].data, tmp_path / "store").dataset("demo")


def is_whole_again(dataset: Dataset, expected: Store) -> None:
    """As if nothing had happened; the damaged file lies aside, until it is cleared up."""
    found = Store.read(Project(dataset.weights_base, dataset.folder.parent))
    expected.assert_same(found)
    assert {state.state for state in states(dataset)} == {"fresh"}
    listed = find_leftovers(dataset)
    assert listed
    remove_leftovers(listed)
    assert find_leftovers(dataset) == []
    Store.read(Project(dataset.weights_base, dataset.folder.parent)).assert_same(expected)
    assert len(open_tiles(dataset).read(np.arange(12))) == 12


def reasons_of(dataset: Dataset) -> dict[str, tuple[str, ...]]:
    return {state.asset: state.reasons for state in states(dataset)}


def flip(path: Path, place: int | None = None) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2 if place is None else place] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_page(path: Path, column: int = 0) -> None:
    """In the values of a column of a Parquet file, behind the header of the page."""
    chunk = pq.ParquetFile(path).metadata.row_group(0).column(column)
    flip(path, (chunk.dictionary_page_offset or chunk.data_page_offset) + chunk.total_compressed_size - 4)


def the(pattern: str) -> Callable[[Dataset], Path]:
    return lambda dataset: sorted(dataset.folder.glob(pattern), key=lambda path: path.stat().st_size)[-1]


DAMAGE: dict[str, tuple[Callable[[Dataset], Path], Callable[[Path], None]]] = {
    "tiles cut short": (the("tiles/*/*.h5"), cut),
    "index of tiles flipped": (the("tiles/*/*.parquet"), flip_page),
    "vectors flipped": (the("embeddings/*/*.parquet"), flip),
    "vectors cut short": (the("embeddings/*/*.parquet"), cut),
    "table flipped": (the("tables/tiny.parquet"), flip_page),
    "table cut short": (the("tables/tiny.parquet"), cut),
    "manifest cut short": (the("manifests/synapse_stacks.json"), cut),
    "LanceDB rows flipped": (the("lancedb/tiny.lance/data/*"), flip),
    "LanceDB rows cut short": (the("lancedb/tiny.lance/data/*"), cut),
    "LanceDB index flipped": (the("lancedb/tiny.lance/_indices/*/*"), flip),
    "LanceDB index gone": (the("lancedb/tiny.lance/_indices/*/*"), Path.unlink),
    "LanceDB tag cut short": (the("lancedb/tiny.lance/_refs/tags/current.json"), cut),
    "LanceDB manifest cut short": (lambda dataset: min(dataset.folder.glob("lancedb/*/_versions/*.manifest")), cut),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_named_and_made_good_by_the_same_command(
    dataset: Dataset, whole: tuple[Project, Store], name: str, caplog: pytest.LogCaptureFixture
) -> None:
    which, spoil = DAMAGE[name]
    path = which(dataset)
    spoil(path)
    with caplog.at_level(logging.WARNING):
        said = materialise(dataset)
    table = path.relative_to(dataset.lancedb_folder).parts[0] if dataset.lancedb_folder in path.parents else None
    # LanceDB names the file that it cannot read only now and then; its table at least is named.
    assert path.name in said + caplog.text or (table and f"{table} cannot be read" in said), said + caplog.text
    is_whole_again(dataset, whole[1])


FOOTERS = ["synapses.parquet", "rgb_tiles.parquet", "rejects.parquet", "split.parquet", "tables/tiny.parquet"]


@pytest.mark.parametrize("name", FOOTERS)
def test_a_flipped_bit_in_the_footer_of_a_table_makes_its_asset_stale_and_the_table_is_made_again(
    dataset: Dataset, whole: tuple[Project, Store], name: str
) -> None:
    """The footer has no checksum: a flip there renames columns or makes the file unreadable."""
    path = dataset.folder / name
    size = path.stat().st_size
    footer = int.from_bytes(path.read_bytes()[-8:-4], "little")
    for place in np.random.default_rng(len(name)).integers(size - 8 - footer, size, 3).tolist():
        flip(path, place)
        reasons = [reason for reasons in reasons_of(dataset).values() for reason in reasons]
        assert f"its file {path.name} is damaged" in reasons
        said = materialise(dataset, only_stale=True)
        assert f"{path} is damaged: moved to {path.name}.damaged" in said
        whole[1].assert_same(Store.read(Project(dataset.weights_base, dataset.folder.parent)))
    is_whole_again(dataset, whole[1])


def test_a_flipped_bit_that_leaves_size_and_time_as_they_were_is_found_when_the_table_is_materialised(
    dataset: Dataset, whole: tuple[Project, Store]
) -> None:
    path, times = dataset.synapses_path, dataset.synapses_path.stat()
    flip(path, path.read_bytes().rindex(b"neuron_id"))  # the last one names the column in the footer
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert f"{path} is damaged" in materialise(dataset)
    is_whole_again(dataset, whole[1])


def test_an_asset_is_not_made_of_a_damaged_table(dataset: Dataset) -> None:
    flip(dataset.synapses_path, dataset.synapses_path.stat().st_size - 100)
    node = next(node for node in nodes(dataset) if node.name == "split")
    with pytest.raises(SynpipeError, match=r"its file synapses\.parquet is damaged\. Materialise it and everything"):
        node.run(lambda line: None)


def test_a_copied_store_is_fresh_although_its_files_are_younger(dataset: Dataset) -> None:
    for path in dataset.folder.rglob("*.parquet"):
        path.touch()
    assert {state.state for state in states(dataset)} == {"fresh"}


def test_a_flipped_byte_of_a_tile_is_named_when_it_is_read_and_cut_out_again_by_the_next_run(
    dataset: Dataset, whole: tuple[Project, Store]
) -> None:
    path = the("tiles/*/*.h5")(dataset)
    with h5py.File(path) as file:
        flip(path, file["tiles"].id.get_offset() + 777)
    shutil.rmtree(dataset.embeddings_folder)  # so that every tile is read
    with pytest.raises(SynpipeError, match=rf"{path.name}, row \d+, differ from their checksum.* Materialise again"):
        materialise(dataset)
    reasons = reasons_of(dataset)
    assert reasons["synapse_stacks"] == reasons["rgb_tiles"][:1] == (f"its tiles {path.name} were damaged",)
    materialise(dataset)
    is_whole_again(dataset, whole[1])


def test_tiles_that_cannot_be_made_anew_at_once_are_not_forgotten(
    dataset: Dataset, whole: tuple[Project, Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run that moves them aside fails, or is killed before, or just after they have been cut out again."""
    path = the("tiles/*/*.h5")(dataset)
    cut(path)

    def server_is_down(*_: object) -> NoReturn:
        raise SynpipeError("the server of the volume is down")

    with monkeypatch.context() as patch, pytest.raises(SynpipeError, match="is down"):
        patch.setattr(extraction, "cut_out_windows", server_is_down)
        materialise(dataset)
    assert not path.exists()
    assert reasons_of(dataset)["synapse_stacks"] == (f"its tiles {path.name} were damaged",)
    materialise(dataset)
    assert {state.state for state in states(dataset)} == {"fresh"}
    mark_damaged(path)
    assert reasons_of(dataset)["rgb_tiles"][0] == f"its tiles {path.name} were damaged"
    materialise(dataset)
    is_whole_again(dataset, whole[1])


def test_marks_of_a_former_version_mean_nothing_and_are_cleared_up(
    dataset: Dataset, whole: tuple[Project, Store]
) -> None:
    path = the("tiles/*/*.h5")(dataset)
    mark = path.with_name(f"{path.name}.suspect")
    mark.touch()
    assert [leftover.path for leftover in find_leftovers(dataset)] == [mark]
    assert "0 cut-outs made" in materialise(dataset)
    is_whole_again(dataset, whole[1])


def test_vectors_found_damaged_by_who_reads_them_are_made_anew_by_the_next_run(
    dataset: Dataset, whole: tuple[Project, Store], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where tiles were added it is asked which vectors there are, and that without reading those; nothing is materialised
    but what is out of date."""
    monkeypatch.setattr(embedding_cache, "SMALL_BYTES", 0)
    shutil.copytree(whole[0].data, tmp_path / "data")
    INPUTS.with_synapses({2000: ((1, 100, 100), "gaba")}).write(tmp_path / "data")
    project = Project(tmp_path / "data", dataset.folder.parent)
    path = the("embeddings/*/*.parquet")(dataset)
    flip_page(path, column=1)
    damaged = project.dataset("demo")
    with pytest.raises(SynpipeError, match=r"lacks the vectors of \d+ tiles"):
        materialise(damaged, only_stale=True)
    assert not path.exists()
    assert reasons_of(damaged)["embeddings_tiny"] == ("its check vectors_are_whole has not passed",)
    materialise(damaged, only_stale=True)
    assert {state.state for state in states(damaged)} == {"fresh"}
    found = Store.read(project)
    assert found.rows["tiny"].keys() == {*INPUTS.synapses, 2000}
    np.testing.assert_allclose(found.vectors["tiny"][:-1], whole[1].vectors["tiny"], atol=2e-3)


def test_a_damaged_version_is_not_gone_back_to(dataset: Dataset, whole: tuple[Project, Store], tmp_path: Path) -> None:
    (first,) = list_versions(dataset, "tiny")
    flip(the("lancedb/tiny.lance/data/*")(dataset))
    shutil.copytree(whole[0].data, tmp_path / "data")
    other = Project(tmp_path / "data", dataset.folder.parent)
    INPUTS.with_synapses({1000: None}).write(other.data)
    materialise(other.dataset("demo"))
    with pytest.raises(SynpipeError, match=r"Version .* of tiny is damaged \(data/.*\): choose another"):
        rollback(dataset, "tiny", first.tag)
    assert open_current(dataset.lancedb_folder, "tiny").count_rows() == 11


# Manifests and lineage.

CHANGES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "a misspelt key": lambda content: content.update(interrupued=content.pop("interrupted")),
    "a misspelt fact": lambda content: content["facts"].update(encoder_fingerqrint="f"),
    "null for a string": lambda content: content.update(data_version=None),
    "a list for a string": lambda content: content.update(code_version=[]),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("folder", ["manifests", "lineage"])
def test_a_changed_manifest_is_named_by_status_set_aside_and_written_again_by_the_next_run(
    dataset: Dataset,
    whole: tuple[Project, Store],
    change: Callable[[dict[str, Any]], Any],
    folder: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    project = Project(whole[0].data, dataset.folder.parent)
    asset = "embeddings_tiny"
    (path,) = (dataset.folder / folder).glob(f"{asset}.json" if folder == "manifests" else f"{asset}/*.json")
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    if folder == "lineage":  # only the commands that need it read it
        assert str(path) in refusal(invoke(project, "provenance", "1000")) + caplog.text
    state = assets(project)[asset]
    assert state["state"] == ("missing" if folder == "manifests" else "stale")
    assert str(path) in caplog.text and f"moved to {path.name}.damaged" in caplog.text
    materialise(dataset, only_stale=True)
    assert json.loads(path.read_text())["asset"] == asset
    assert json.loads(answer(project, "provenance", "1000", "--json"))["row"]["synapse_id"] == "1000"
    is_whole_again(dataset, whole[1])


# LanceDB.

TAGS = {
    "no JSON": "{",
    "null": "null",
    "no version": "{}",
    "a word as the version": '{"branch":null,"version":"nine","manifestSize":3}',
    "a version that does not exist": '{"branch":null,"version":999,"manifestSize":3}',
    "an unfinished version": '{"branch":null,"version":2,"manifestSize":3}',
    "another branch": '{"branch":"x","version":9,"manifestSize":3}',
}


@pytest.mark.parametrize("content", TAGS.values(), ids=TAGS)
@pytest.mark.parametrize("tag", ["current", "data-*"])
def test_a_damaged_tag_of_an_index_is_named_and_does_not_block_publishing(
    dataset: Dataset, whole: tuple[Project, Store], tag: str, content: str
) -> None:
    (path,) = dataset.lancedb_folder.glob(f"tiny.lance/_refs/tags/{tag}.json")
    assert isinstance(path, Path)
    path.write_text(content)
    read_without_traceback(dataset, "tiny")
    assert f"{path} is damaged" in materialise(dataset)
    is_whole_again(dataset, whole[1])


@pytest.mark.parametrize("pattern", ["data/*.lance", "_indices/*/*.lance", "_versions/*.manifest"])
def test_a_missing_file_of_an_index_gives_an_error_and_the_next_run_builds_the_index_again(
    dataset: Dataset, whole: tuple[Project, Store], pattern: str
) -> None:
    path = sorted(dataset.lancedb_folder.glob(f"tiny.lance/{pattern}"), key=str)[0]
    path.unlink()
    said = read_without_traceback(dataset, "tiny")
    assert "materialise index_tiny" in said
    materialise(dataset)
    Store.read(Project(dataset.weights_base, dataset.folder.parent)).assert_same(whole[1])
    read_without_traceback(dataset, "tiny", succeed=True)


def test_a_damaged_manifest_of_a_former_version_does_not_hide_the_others(
    dataset: Dataset, whole: tuple[Project, Store]
) -> None:
    path = sorted(dataset.lancedb_folder.glob("tiny.lance/_versions/*.manifest"), key=str)[-1]  # the oldest
    assert isinstance(path, Path)
    path.write_bytes(b"")
    read_without_traceback(dataset, "tiny")
    assert f"{path} is damaged" in materialise(dataset)
    read_without_traceback(dataset, "tiny", succeed=True)
    is_whole_again(dataset, whole[1])


def test_a_search_never_answers_from_damaged_vectors(dataset: Dataset) -> None:
    path = the("lancedb/tiny.lance/data/*")(dataset)
    flip(path)
    project = Project(dataset.weights_base, dataset.folder.parent)
    for command in (["search", "1000"], ["provenance", "1000"]):
        message = refusal(invoke(project, *command))
        assert f"data/{path.name} is not as it was published" in message and "materialise index_tiny" in message


def read_without_traceback(dataset: Dataset, encoder: str, succeed: bool = False) -> str:
    """Ask all commands that read an index; what those said that failed."""
    project = Project(dataset.weights_base, dataset.folder.parent)
    said = ""
    for command in (["versions"], ["search", "1000"], ["provenance", "1000"], ["gc"], ["status"]):
        result = invoke(project, *command)
        if result.exit_code or succeed:
            assert not succeed or result.exit_code == 0, result.stderr
            said += "" if succeed else refusal(result)
    return said


# The record of the place of the bulk.


def write_text(text: str) -> Callable[[Path], None]:
    return lambda path: (path.write_text(text), None)[1]


RECORDS: dict[str, Callable[[Path], None]] = {
    "cut short": cut,
    "empty": write_text(""),
    "null": write_text("null"),
    "no address": write_text("{}"),
    "a list as the address": write_text('{"address": []}'),
    "another address": lambda path: path.write_text(path.read_text().replace("elsewhere", "elsewhera")) and None,
    "moved aside by an earlier version": lambda path: path.rename(path.with_name("bulk.json.damaged")) and None,
}


@pytest.fixture(scope="module")
def detached(whole: tuple[Project, Store], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store whose tiles, vectors and indexes are in another folder."""
    folder = tmp_path_factory.mktemp("detached")
    materialise(Project(whole[0].data, folder / "store", folder / "elsewhere").dataset("demo"))
    return folder


@pytest.mark.parametrize("name", RECORDS)
def test_a_damaged_record_of_the_bulk_stops_every_command_and_nothing_is_deleted(
    detached: Path, whole: tuple[Project, Store], tmp_path: Path, name: str
) -> None:
    shutil.copytree(detached / "store", tmp_path / "store")
    project = Project(whole[0].data, tmp_path / "store")
    record = project.dataset("demo").folder / "bulk.json"
    sound = record.read_text()
    RECORDS[name](record)
    before = files(tmp_path)
    for command in (["status"], ["gc", "--delete"], ["materialize"], ["search", "1000"], ["versions"]):
        message = refusal(invoke(project, *command))
        assert f"{record}" in message and "If you know the place, write" in message
    assert files(tmp_path) == before
    record.write_text(json.dumps({"address": json.loads(sound)["address"]}))  # as the message says
    assert project.dataset("demo").bulk_folder == detached / "elsewhere" / "demo"
    assert {state.state for state in states(project.dataset("demo"))} == {"fresh"}


# A full disk.


@pytest.fixture(scope="module")
def used_kb(whole: tuple[Project, Store], tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, int]]:
    """What the store takes before and after each step."""
    dataset = Project(whole[0].data, tmp_path_factory.mktemp("measured")).dataset("demo")
    found, used = {}, 0
    for node in nodes(dataset):
        node.run(lambda line: None)
        now = sum(-(-path.stat().st_size // 4096) * 4 for path in dataset.folder.rglob("*") if path.is_file())
        found[node.asset.name], used = (used, now), now
    return found


SHARES = np.linspace(0.1, 0.9, 9).tolist() if "SYNPIPE_TEST_KILLS" in os.environ else [0.5]


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("kind", ["synapses", "synapse_stacks", "embeddings", "embedding_table", "index"])
def test_a_full_disk_is_named_and_with_space_the_same_command_carries_on(
    whole: tuple[Project, Store],
    used_kb: dict[str, tuple[int, int]],
    disk: Callable[[int], Path],
    kind: str,
    share: float,
) -> None:
    before, after = used_kb[kind]
    project = Project(whole[0].data, disk(round(before + share * (after - before))))
    dataset = project.dataset("demo")
    with pytest.raises(SynpipeError, match="No space left on device") as caught:
        materialise(dataset)
    message = str(caught.value)
    assert str(dataset.folder) in message and "space" in message and "\n" not in message
    assert list(dataset.folder.rglob(".tmp-*")) == []
    outdated = [state.asset for state in states(dataset) if state.state != "fresh"]
    order = [node.asset.name for node in nodes(dataset)]
    # Files of LanceDB that are half written, or a manifest that did not fit, are of the step or of the one before.
    assert abs(order.index(outdated[0].removesuffix("_tiny")) - order.index(kind)) <= 1
    # A part counts once its index stands beside it.
    parts = [path.with_suffix(".h5") for path in dataset.cut_outs_folder.rglob("*.parquet")]
    kept = [path.stat().st_mtime_ns for path in parts]

    disk(65_536)
    materialise(dataset)
    whole[1].assert_same(Store.read(project))
    assert {state.state for state in states(dataset)} == {"fresh"}
    assert set(kept) <= {path.stat().st_mtime_ns for path in dataset.cut_outs_folder.rglob("*.h5")}
