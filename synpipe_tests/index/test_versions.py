"""Versions of an index, how two differ, going back to one, where a row comes from, and what may be thrown away."""

import io
import json
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from pathlib import Path
from typing import Any

import h5py
import lancedb
import numpy as np
import pyarrow.compute as pc
import pytest
from PIL import Image

from synpipe.annotations.schema import SYNAPSE_SCHEMA
from synpipe.assets import index as asset_index
from synpipe.assets.asset import Leftover
from synpipe.assets.graph import nodes
from synpipe.assets.manifest import read_manifest
from synpipe.embeddings.encoders import open_encoder
from synpipe.embeddings.table import write_embedding_table
from synpipe.errors import SynpipeError
from synpipe.explorer.answers import Explorer
from synpipe.index import recall as index_recall
from synpipe.index import search
from synpipe.index.distances import METRICS
from synpipe.index.publish import open_current, publish, tag_for
from synpipe.index.search import SynapseIndex
from synpipe.index.versions import (
    Version,
    diff,
    forget,
    list_versions,
    open_version,
    remove_untagged,
    rollback,
)
from synpipe.reports.housekeeping import find_leftovers
from synpipe.reports.provenance import trace_row
from synpipe.store.files import read_table
from synpipe.store.locks import one_step_at_a_time
from synpipe.tiles.tile import TileReader
from synpipe_tests.index.test_search import make as index_of
from synpipe_tests.support.changes import NAME, TRUNK, Killed, Own, branch, killed_at_the_end, make_outdated, same_store
from synpipe_tests.support.command import answer, files, invoke, refusal
from synpipe_tests.support.tables import NOTHING_DERIVED, PROVENANCE, clustered, synapses, tiles_of

VERSIONS = int(
    os.environ.get("SYNPIPE_TEST_VERSIONS") or 30
)  # that are published under a reader; more for `make torture`


def make(own: Own) -> Version:
    """Make what is out of date; the version of the first index that is current now."""
    make_outdated(own.dataset)
    return next(version for version in list_versions(own.dataset, "tiny") if version.current)


def set_entry(own: Own, **change: Any) -> None:
    own.edit_encoders(lambda entries: entries["tiny"].update(change))


def ids(own: Own) -> list[int]:
    """Of the synapses in the index that stand once in the file, in its order."""
    known = set(open_current(own.dataset.lancedb_folder, "tiny").to_arrow()["synapse_id"].to_pylist())
    written = [line.partition(",")[0] for line in own.csv.read_text().splitlines()[1:]]
    return [int(each) for each in written if written.count(each) == 1 and int(each) in known]


def change_row(own: Own, synapse_id: int, change: Callable[[dict[str, str]], object]) -> None:
    own.edit_synapses(lambda rows: change(next(row for row in rows if row["synapse_id"] == str(synapse_id))))


def invert_volume(own: Own) -> None:
    with h5py.File(own.volume, "r+") as file:
        file["volumes/raw"][:] = 255 - file["volumes/raw"][:]


# Versions.


def test_every_build_is_a_version_that_names_its_data_and_its_encoder(own: Own):
    dataset = own.dataset
    (first,) = list_versions(dataset, "tiny")
    fingerprint = read_manifest(dataset, "embeddings_tiny").figures["encoder_fingerprint"]
    data_version = read_manifest(dataset, "index_tiny").data_version
    assert first == Version(
        tag_for(data_version, fingerprint), first.number, first.made_at, 40, data_version, fingerprint, True
    )
    made_at = datetime.fromisoformat(first.made_at)
    assert made_at.utcoffset() == timedelta(0)
    assert timedelta(0) < datetime.now(UTC) - made_at < timedelta(hours=1)

    set_entry(own, seed=7)
    second = make(own)
    assert [(version.tag, version.current) for version in list_versions(own.dataset, "tiny")] == [
        (second.tag, True),
        (first.tag, False),
    ]
    assert second.number > first.number and second.encoder_fingerprint != fingerprint
    assert len(list_versions(own.dataset, "other")) == 1
    for which in (first.tag, str(first.number)):
        table = open_version(own.dataset, "tiny", which)
        assert set(table.to_arrow()["encoder_fingerprint"].to_pylist()) == {fingerprint}
    for absent in ("data-0", str(second.number + 1), "-1", "", "current ", str(first.number + 1)):
        with pytest.raises(
            SynpipeError, match=r"has no version .* `synpipe versions --dataset mine --encoder tiny` lists"
        ):
            open_version(own.dataset, "tiny", absent)


def test_how_two_versions_differ(own: Own):
    (first,) = list_versions(own.dataset, "tiny")
    added, moved, relabelled, removed, unsure, *_ = ids(own)
    rows = own.csv.read_bytes()
    own.edit_synapses(lambda each: each.remove(next(row for row in each if row["synapse_id"] == str(added))))
    before = make(own)
    same = diff(own.dataset, "tiny", before.tag, "current")
    assert (same.added, same.removed, same.changed, same.matched, same.same_encoder) == ([], [], [], 39, True)
    assert same.mean_cosine == pytest.approx(1, abs=1e-6)

    own.csv.write_bytes(rows)
    change_row(own, moved, lambda row: row.update(x_nm=str(float(row["x_nm"]) + 80)))
    change_row(own, relabelled, lambda row: row.update(neurotransmitter="" if row["neurotransmitter"] else "gaba"))
    change_row(own, unsure, lambda row: row.update(confidence="0.123"))
    own.edit_synapses(lambda each: each.remove(next(row for row in each if row["synapse_id"] == str(removed))))
    after = make(own)
    found = diff(own.dataset, "tiny", before.tag, str(after.number))
    assert (found.added, found.removed, found.matched) == ([added], [removed], 38)
    assert found.changed == sorted([moved, relabelled, unsure])
    # Of the vectors only that of the moved one is another.
    old, new = (
        {
            row["synapse_id"]: np.array(row["vector"])
            for row in open_version(own.dataset, "tiny", tag).to_arrow().to_pylist()
        }
        for tag in (before.tag, after.tag)
    )
    expected = np.mean([old[each] @ new[each] for each in old.keys() & new.keys()])
    assert found.mean_cosine == pytest.approx(expected, abs=1e-6)
    assert found.mean_cosine < 1 - 1e-6
    back = diff(own.dataset, "tiny", after.tag, before.tag)
    assert (back.added, back.removed, back.changed) == (found.removed, found.added, found.changed)

    change_row(own, moved, lambda row: row.update(x_nm=str(float(row["x_nm"]) - 80)))
    change_row(own, relabelled, lambda row: row.update(region="elsewhere"))
    make(own)
    labels = diff(own.dataset, "tiny", first.tag, "current")
    assert labels.changed == sorted([relabelled, unsure])
    assert labels.mean_cosine == pytest.approx(1, abs=1e-6)  # a label embeds nothing


def test_versions_of_different_encoders_are_told_apart(own: Own):
    (first,) = list_versions(own.dataset, "tiny")
    set_entry(own, seed=7)
    make(own)
    found = diff(own.dataset, "tiny", first.tag, "current")
    assert not found.same_encoder and found.changed == [] and found.matched == 40
    assert found.mean_cosine is not None and found.mean_cosine < 0.999
    set_entry(own, model="test_vit")
    make(own)
    found = diff(own.dataset, "tiny", first.tag, "current")
    assert not found.same_encoder and found.mean_cosine is None and found.matched == 40
    said = answer(own.project, "diff", first.tag, "--dataset", NAME)
    assert "not comparable" in said and "made by different encoders" in said


# Going back.


def test_readers_see_what_was_gone_back_to_until_the_index_is_made_again(own: Own):
    (first,) = list_versions(own.dataset, "tiny")
    gone = ids(own)[0]
    own.edit_synapses(lambda rows: rows.remove(next(row for row in rows if row["synapse_id"] == str(gone))))
    second = make(own)
    reader = open_current(own.dataset.lancedb_folder, "tiny")

    def seen() -> int:
        reader.checkout("current")
        return reader.count_rows()

    assert seen() == 39
    assert rollback(own.dataset, "tiny", first.tag).tag == first.tag
    assert seen() == 40 and SynapseIndex(own.dataset, "tiny").search(gone)
    assert own.outdated() == {}  # a nightly run does not undo what somebody decided
    assert rollback(own.dataset, "tiny", str(second.number)).number == second.number
    assert seen() == 39
    rollback(own.dataset, "tiny", first.tag)
    before = len(reader.list_versions())
    assert own.materialise("index_tiny").assets == {"index_tiny"}
    assert seen() == 39 and reader.version == second.number
    assert len(reader.list_versions()) == before  # published anew, not built
    with pytest.raises(SynpipeError, match="has no version 'data-1'"):
        rollback(own.dataset, "tiny", "data-1")
    assert seen() == 39


def test_a_rollback_waits_for_a_run_and_status_says_that_readers_see_a_former_version(own: Own):
    (first,) = list_versions(own.dataset, "tiny")
    set_entry(own, seed=7)
    second = make(own)
    said: list[str] = []
    with ThreadPoolExecutor(1) as pool:
        with one_step_at_a_time(own.project.store, said.append):
            going_back = pool.submit(invoke, own.project, "rollback", first.tag, "--dataset", NAME)
            time.sleep(1)
            assert not going_back.done()
            assert open_current(own.dataset.lancedb_folder, "tiny").version == second.number
        done = going_back.result()
    assert done.exit_code == 0 and "waiting for another run" in done.stderr and not said
    assert open_current(own.dataset.lancedb_folder, "tiny").version == first.number

    status = answer(own.project, "status", "--dataset", NAME)
    assert f"Readers of tiny see the version {first.tag}" in status and "Readers of other" not in status
    assert json.loads(answer(own.project, "status", "--dataset", NAME, "--json"))["rolled_back"] == {"tiny": first.tag}
    own.materialise("index_tiny")
    assert json.loads(answer(own.project, "status", "--dataset", NAME, "--json"))["rolled_back"] == {}


# Where a row comes from.


def is_the_tile(own: Own, told: dict[str, Any]) -> None:
    """The place that the provenance names holds the tile of the row."""
    with h5py.File(own.dataset.folder / told["tile"]["file"]) as file:
        tile = file["tiles"][told["tile"]["row"]]
    if told["tile"]["recipe"]["stacking"] == "grey":
        tile = np.stack([tile[1]] * 3)
    assert sha256(tile.tobytes()).hexdigest()[:32] == told["row"]["content_hash"] == told["tile"]["content_hash"]
    with h5py.File(told["volume"]["path"]) as file:
        raw = file["volumes/raw"][()]
    z, y, x = (told["tile"][f"start_{axis}"] for axis in "zyx")
    if min(y, x) >= 0 and max(y, x) + 256 <= raw.shape[1]:
        assert (tile[1] == raw[z + 1, y : y + 256, x : x + 256]).all()


def test_provenance_goes_from_a_row_to_pixels_weights_code_and_run(own: Own):
    dataset = own.dataset
    synapses = read_table(dataset.synapses_path)
    with own.instance() as instance:
        for synapse_id in ids(own):
            told = trace_row(dataset, "tiny", synapse_id)
            (row,) = synapses.filter(pc.equal(synapses["synapse_id"], synapse_id)).to_pylist()
            assert row.items() <= told["row"].items() and row.keys() == set(SYNAPSE_SCHEMA.names)
            is_the_tile(own, told)
        assert set(told["assets"]) == TRUNK - {"rejects", "split"} | branch("tiny") - {"scores_tiny", "evaluation"}
        for asset, said in told["assets"].items():
            manifest = read_manifest(dataset, asset)
            assert said["data_version"] == manifest.data_version and said["code_version"] == manifest.code_version
            assert instance.get_run_by_id(said["dagster_run"]).is_success
    encoder = open_encoder(dataset.encoders["tiny"], dataset.weights_base)
    assert told["encoder"]["fingerprint"] == encoder.fingerprint
    assert told["encoder"]["weights"] == encoder.weights == "random:0"
    assert told["encoder"]["preprocessing"]["crop_px"] == 64
    assert told["volume"]["data_version"] == read_manifest(dataset, "volume").data_version
    assert list(told["annotation"]["sha256_by_file"].values()) == [sha256(own.csv.read_bytes()).hexdigest()]
    assert told["annotation"]["source_id"] == str(synapse_id)
    assert (
        json.loads(answer(own.project, "provenance", str(synapse_id), "--dataset", NAME, "--json"))["encoder"]
        == (told["encoder"])
    )
    for unknown in (1, -1, 2**63 - 1):
        with pytest.raises(SynpipeError, match=f"Synapse {unknown} is not in the index tiny of mine"):
            trace_row(dataset, "tiny", unknown)


def test_provenance_is_that_of_the_version_that_readers_see(own: Own):
    synapse_id = ids(own)[3]
    before = trace_row(own.dataset, "tiny", synapse_id)
    (first,) = list_versions(own.dataset, "tiny")
    invert_volume(own)
    own.edit_dataset(lambda spec: spec["tiles"].update(stacking="grey"))
    set_entry(own, seed=7)
    make(own)
    after = trace_row(own.dataset, "tiny", synapse_id)
    is_the_tile(own, after)
    assert after["volume"]["data_version"] != before["volume"]["data_version"]
    assert after["encoder"]["weights"] == "random:7"
    # The annotations are the same, and were read in the first run.
    assert after["assets"]["annotations"] == before["assets"]["annotations"]
    assert after["assets"]["embeddings_tiny"]["dagster_run"] is None  # made without Dagster
    rollback(own.dataset, "tiny", first.tag)
    again = trace_row(own.dataset, "tiny", synapse_id)
    for name in ("volume", "encoder", "annotation", "assets", "row"):
        assert again[name] == before[name]
    assert again["tile"] == before["tile"]


@pytest.mark.parametrize("stacking", ["colour", "grey"])
def test_after_a_rollback_every_row_has_the_tile_that_was_embedded(own: Own, tmp_path: Path, stacking: str):
    """The rows are those of a synapse that was removed since, one that was moved, and one that stayed."""
    if stacking == "grey":
        own.edit_dataset(lambda spec: spec["tiles"].update(stacking="grey"))
    former = make(own)
    removed, moved, stayed = ids(own)[:3]
    hashes = {each: trace_row(own.dataset, "tiny", each)["row"]["content_hash"] for each in (removed, moved, stayed)}
    own.edit_synapses(lambda rows: rows.remove(next(row for row in rows if row["synapse_id"] == str(removed))))
    change_row(own, moved, lambda row: row.update(x_nm=str(float(row["x_nm"]) + 80)))
    if stacking == "colour":
        # Every stack changes: the tiles of before are in parts that no current asset names.
        invert_volume(own)

    # While a run has made new tiles, and no new index yet, readers have the former index and its tiles.
    explorer = Explorer(own.project)
    for node in nodes(own.dataset):
        if not node.encoder and node.name in own.outdated():
            node.run(lambda line: None)
    shows_the_tiles(own, explorer, hashes, tmp_path)
    newest = make(own)
    new_hash = trace_row(own.dataset, "tiny", moved)["row"]["content_hash"]
    assert new_hash != hashes[moved]

    rollback(own.dataset, "tiny", former.tag)
    answer(own.project, "gc", "--dataset", NAME, "--delete")
    shows_the_tiles(own, Explorer(own.project), hashes, tmp_path)
    # The other encoder was not rolled back. Without an encoder in the address, the first one that has the synapse decides.
    explorer = Explorer(own.project)
    assert explorer.tile(NAME, str(moved), "other")[0] == new_hash
    assert explorer.tile(NAME, str(removed))[0] == hashes[removed]

    rollback(own.dataset, "tiny", newest.tag)
    for encoder in ("tiny", "other"):
        for version in list_versions(own.dataset, encoder):
            if not version.current:
                forget(own.dataset, encoder, version.tag)
    reasons = set(listed(own).values())
    assert ("tiles of no synapse" in reasons) == (stacking == "colour")
    answer(own.project, "gc", "--dataset", NAME, "--delete")
    shows_the_tiles(own, Explorer(own.project), {moved: new_hash}, tmp_path)
    with pytest.raises(SynpipeError, match="unknown or was rejected"):
        Explorer(own.project).tile(NAME, str(removed))


def shows_the_tiles(own: Own, explorer: Explorer, hashes: dict[int, str], folder: Path) -> None:
    """The explorer, `provenance` and the picture of `search` show tiles with these content hashes, by synapse id."""
    readers: list[TileReader] = []
    for synapse_id, content_hash in hashes.items():
        assert explorer.search(NAME, "tiny", str(synapse_id))["query"]["id"] == str(synapse_id)
        told, read = explorer.tile(NAME, str(synapse_id), "tiny")
        tile = np.asarray(Image.open(io.BytesIO(read()))).transpose(2, 0, 1)
        assert told == content_hash == sha256(tile.tobytes()).hexdigest()[:32]
        traced = trace_row(own.dataset, "tiny", synapse_id)["tile"]
        with h5py.File(own.dataset.folder / traced["file"]) as file:
            stored = file["tiles"][traced["row"]]
        grey = own.dataset.spec.tiles.stacking == "grey"
        assert (np.stack([stored[1]] * 3) == tile).all() if grey else (stored == tile).all()
        picture = folder / "picture.png"
        answer(own.project, "search", str(synapse_id), "--dataset", NAME, "--picture", str(picture))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(asset_index, "draw_tiles", lambda reader, rows, tile_px: readers.append(reader))
            index = SynapseIndex(own.dataset, "tiny")
            asset_index.draw_neighbours(own.dataset, index, {synapse_id: index.search(synapse_id)})
        assert (readers[-1].by_id(synapse_id) == tile).all()


# What may be thrown away.


def listed(own: Own) -> dict[str, str]:
    """Reason by path below the data set's folder, without the manifests of former versions."""
    found = {str(each.path.relative_to(own.dataset.folder)): each.reason for each in find_leftovers(own.dataset)}
    return {path: reason for path, reason in found.items() if not path.startswith("lineage/")}


def test_in_a_store_that_is_in_order_nothing_is_left_over(own: Own):
    assert listed(own) == {}
    own.materialise()
    assert listed(own) == {}


def test_what_no_longer_serves_is_listed_and_nothing_else_is_lost(own: Own, template: Own):
    dataset, inputs = own.dataset, files(own.folder / "data")
    store = set(files(dataset.folder))
    fingerprint = read_manifest(dataset, "embeddings_tiny").figures["encoder_fingerprint"]
    old = {name for name in store if name.startswith(f"embeddings/{fingerprint}/")}
    (first,) = list_versions(dataset, "tiny")

    # A swapped encoder: nothing is listed before the new one is there, then its vectors.
    set_entry(own, seed=7)
    assert listed(own) == {}
    make(own)
    assert listed(own) == dict.fromkeys(old, "vectors of an encoder no longer used")

    # A moved synapse adds parts and leaves the old ones in use; with inverted pixels only published versions use old parts.
    change_row(own, ids(own)[0], lambda row: row.update(x_nm=str(float(row["x_nm"]) + 80)))
    make(own)
    assert listed(own).keys() == old
    invert_volume(own)
    before = set(files(dataset.folder))
    assert listed(own) == {}  # what a change of the volume leaves is known once it is cut out
    make(own)
    fresh = set(files(dataset.folder))
    # Published versions name the tiles of before, so those stay.
    vectors = {name for name in before if name.startswith("embeddings/")} - old
    assert listed(own) == (
        dict.fromkeys(old, "vectors of an encoder no longer used")
        | dict.fromkeys(vectors, "vectors of tiles no longer there")
    )

    # Another encoder is dropped.
    own.edit_dataset(lambda spec: spec["encoders"].remove("other"))
    of_other = {f"manifests/{asset}.json" for asset in branch("other") - {"evaluation"}}
    of_other |= {"tables/other.parquet", "former_tables/other.parquet"}
    of_other |= {"evaluation/other.json", "evaluation/other.parquet"}
    others = {name for name in fresh if name.startswith("embeddings/")} - old - vectors
    tiny = read_manifest(own.dataset, "embeddings_tiny").figures["encoder_fingerprint"]
    others = {name for name in others if tiny not in name}
    expected = old | vectors | of_other | others
    assert listed(own).keys() == expected
    (dataset.folder / "embeddings" / tiny / "00000-01234567.damaged").write_bytes(b"?")
    (dataset.folder / "embeddings" / tiny / ".tmp-0-00000-01234567.parquet").write_bytes(b"?")
    expected |= {f"embeddings/{tiny}/00000-01234567.damaged"}

    said = json.loads(answer(own.project, "gc", "--dataset", NAME, "--json"))
    old_lineage = {f"lineage/{asset}" for asset in ("scores_tiny", "scores_other", "evaluation", "rejects")}
    lineage = {each["path"] for each in said if "/lineage/" in each["path"]}
    assert {str(Path(path).parent.relative_to(dataset.folder)) for path in lineage} <= old_lineage
    said = [each for each in said if each["path"] not in lineage]
    assert {str(Path(each["path"]).relative_to(dataset.folder)) for each in said} == expected
    assert {Path(each["path"]).stat().st_size for each in said} == {each["bytes"] for each in said}
    assert expected < set(files(dataset.folder))  # listed, not removed
    assert "remove them with --delete" in answer(own.project, "gc", "--dataset", NAME)
    left = {name for name in set(files(dataset.folder)) - expected if str(dataset.folder / name) not in lineage}
    assert "removed" in answer(own.project, "gc", "--dataset", NAME, "--delete")
    assert set(files(dataset.folder)) == left
    assert listed(own) == {} and own.outdated() == {"evaluation": "stale"}  # it was of both encoders
    make_outdated(own.dataset)
    assert listed(own) == {} and own.outdated() == {}

    # Nothing that readers have is lost, and the store is what a fresh start gives.
    for version in list_versions(own.dataset, "tiny"):
        table = open_version(own.dataset, "tiny", version.tag)
        assert table.count_rows() == version.rows == len(table.to_arrow())
    assert len(list_versions(own.dataset, "tiny")) == 4
    assert open_current(dataset.lancedb_folder, "other").count_rows() == 40
    assert SynapseIndex(own.dataset, "tiny").search(ids(own)[1])
    is_the_tile(own, trace_row(own.dataset, "tiny", ids(own)[1]))
    own.is_as_from_scratch()
    # What is removed can be made again, also where the very first state comes back.
    for path, content in inputs.items():
        (own.folder / "data" / path).write_bytes(content)
    assert own.outdated().keys() == TRUNK | branch("tiny", "other")
    make_outdated(own.dataset)
    same_store(own.dataset, template.dataset)
    assert next(version for version in list_versions(own.dataset, "tiny") if version.current) == first


def test_what_is_forgotten_is_removed_and_what_a_tag_names_is_not(own: Own):
    dataset, folder = own.dataset, own.dataset.lancedb_folder
    (first,) = list_versions(dataset, "tiny")
    set_entry(own, seed=7)
    second = make(own)
    reader = open_version(own.dataset, "tiny", second.tag)
    of_first = [dataset.lineage_path("embeddings_tiny", read_manifest(dataset, "embeddings_tiny").data_version)]

    def large() -> list[Leftover]:
        return [each for each in find_leftovers(own.dataset) if each.path.suffix == ".lance"]

    def gc() -> int:
        """Bytes that it says to remove of indexes, which it must."""
        found, before = large(), sum(map(len, files(folder).values()))
        answer(own.project, "gc", "--dataset", NAME, "--delete")
        assert not large()
        assert before - sum(map(len, files(folder).values())) >= 0.9 * sum(each.bytes for each in found)
        return sum(each.bytes for each in found)

    assert not large() and gc() == 0
    # A build that was killed before it was published: the newest version of the table, and named by nobody.
    table = lancedb.connect(folder).open_table("tiny")
    table.add(table.search().limit(5).to_arrow())
    lost = folder / "tiny.lance" / "data" / "of_a_killed_writer.lance"
    lost.write_bytes(b"?" * 1000)
    assert gc() > 1000 and not lost.exists()
    assert [version.tag for version in list_versions(own.dataset, "tiny")] == [second.tag, first.tag]
    for tag in (first.tag, second.tag):
        assert len(open_version(own.dataset, "tiny", tag).to_arrow()) == 40

    message = refusal(invoke(own.project, "forget", second.tag, "--dataset", NAME))
    assert "Readers see" in message and "rollback" in message
    assert "has no tag" in refusal(invoke(own.project, "forget", "current", "--dataset", NAME))
    assert "Forgotten: version" in answer(own.project, "forget", first.tag, "--dataset", NAME)
    rows_and_indexes = gc()
    assert rows_and_indexes > 40 * 512 * 4  # its vectors
    assert [version.tag for version in list_versions(own.dataset, "tiny")] == [second.tag]
    assert len(reader.to_arrow()) == 40 and SynapseIndex(own.dataset, "tiny").search(ids(own)[1])
    assert trace_row(own.dataset, "tiny", ids(own)[1])["assets"].keys() == TRUNK - {"rejects", "split"} | branch(
        "tiny"
    ) - {"scores_tiny", "evaluation"}
    assert not own.outdated() and of_first[0].parent.exists()

    # An encoder that the data set no longer has, version by version.
    own.edit_dataset(lambda spec: spec["encoders"].remove("tiny"))
    make_outdated(own.dataset)
    said = answer(own.project, "gc", "--dataset", NAME)
    assert "tiny is no longer an encoder of mine and has 1 published versions" in said and not large()
    assert second.tag in answer(own.project, "versions", "--dataset", NAME, "--encoder", "tiny")
    answer(own.project, "forget", second.tag, "--dataset", NAME, "--encoder", "tiny")
    assert [(each.path.name, each.reason) for each in large()] == [("tiny.lance", "index of an encoder no longer used")]
    gc()
    assert [path.name for path in folder.iterdir()] == ["other.lance"]
    assert not list((dataset.folder / "lineage").glob("*_tiny/*")) and find_leftovers(own.dataset) == []
    own.edit_dataset(lambda spec: spec["encoders"].append("tiny"))
    make_outdated(own.dataset)
    own.is_as_from_scratch()


def test_what_an_interrupted_run_would_take_up_is_not_left_over(own: Own):
    before = set(files(own.dataset.folder))
    set_entry(own, seed=7)
    change_row(own, ids(own)[0], lambda row: row.update(x_nm=str(float(row["x_nm"]) + 80)))
    for asset in ("synapse_stacks", "embeddings_tiny"):
        for node in nodes(own.dataset):
            if node.name in own.outdated():
                if node.name == asset:
                    with pytest.raises(Killed):
                        killed_at_the_end(node).run(lambda line: None)
                    break
                node.run(lambda line: None)
        assert set(files(own.dataset.folder)) - before
        assert listed(own) == {}
    made = {name for name in set(files(own.dataset.folder)) - before if name.startswith(("tiles/", "embeddings/"))}
    make(own)
    assert made and not made & listed(own).keys()


# A vector as the question.


@pytest.fixture(params=["exact", "large"])
def index(request: pytest.FixtureRequest, template: Own, monkeypatch: pytest.MonkeyPatch) -> SynapseIndex:
    for limit in ("EXACT_ROWS", "EXACT_CLASS_ROWS"):
        monkeypatch.setattr(search, limit, {"exact": 300_000, "large": 0}[request.param])
    return SynapseIndex(template.dataset, "tiny")


def test_a_vector_finds_what_its_synapse_finds(index: SynapseIndex, template: Own):
    dataset = template.dataset
    encoder = open_encoder(dataset.encoders["tiny"], dataset.weights_base)
    tiles = TileReader(read_table(dataset.tiles_path), dataset.folder, "colour")
    for synapse_id in ids(template)[:5]:
        vector = encoder.embed(tiles.by_id(synapse_id)[None])[0]
        for metric in METRICS if index.exact else ("cosine",):
            found = index.search_vector(vector, encoder.fingerprint, metric, per_class=4)
            found = {name: [one for one in each if one.synapse_id != synapse_id][:3] for name, each in found.items()}
            expected = index.search(synapse_id, metric, per_class=3)
            assert [*found] == [*expected]
            for name, neighbours in expected.items():
                distances = [neighbour.distance for neighbour in neighbours]
                np.testing.assert_allclose([one.distance for one in found[name]], distances, rtol=1e-2, atol=1e-3)
        nearest = [neighbours[0] for neighbours in index.search_vector(vector, encoder.fingerprint).values()]
        closest = min(nearest, key=lambda one: one.distance)
        assert (closest.synapse_id, closest.distance) == (synapse_id, pytest.approx(0, abs=1e-5))
    where = {"region": "synthetic_region_2"}
    regions = {
        one.region for each in index.search_vector(vector, encoder.fingerprint, where=where).values() for one in each
    }
    assert regions == {"synthetic_region_2"}


def test_a_vector_of_another_encoder_is_refused(index: SynapseIndex, template: Own):
    vector, own = np.ones(512, np.float32), index.fingerprint
    other = SynapseIndex(template.dataset, "other").fingerprint
    for wrong in (other, own[:12], "", own.upper()):
        with pytest.raises(SynpipeError, match="cannot be compared") as caught:
            index.search_vector(vector, wrong)
        assert wrong[:12] in str(caught.value) and "\n" not in str(caught.value)
    for shape in ((64,), (513,), (1, 512), (512, 1), (), (0,)):
        with pytest.raises(SynpipeError, match=r"has shape .* needs \(512,\)"):
            index.search_vector(np.ones(shape, np.float32), own)
    for value in (0.0, np.nan, np.inf):
        with pytest.raises(SynpipeError, match="is zero or has values that are not finite"):
            index.search_vector(np.full(512, value), own)
    for options, words in (
        ({"metric": "euclid"}, "Unknown metric"),
        ({"per_class": 0}, "at least 1"),
        ({"where": {"vector": "1"}}, "Cannot filter"),
    ):
        with pytest.raises(SynpipeError, match=words):
            index.search_vector(vector, own, **options)  # type: ignore[arg-type]


# Readers while versions are published.


@pytest.mark.slow
def test_readers_that_never_stop_while_tables_are_rebuilt_optimised_and_cleaned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Every row says which version it is of; no answer holds two, and none is of a version that was not current."""
    monkeypatch.setattr(index_recall, "RECALL_QUERIES", 5)  # most of the time that publishing takes
    dataset = index_of(tmp_path, clustered(50, 8))
    # By version of the index.
    dataset_versions = {f"{number:012x}{0:020x}": f"{number:032x}" for number in range(1, VERSIONS + 1)}
    path = tmp_path / "table.parquet"
    started, done = threading.Event(), threading.Event()
    seen: list[tuple[str, int]] = []

    def read() -> None:
        while not done.is_set():
            table = open_current(dataset.lancedb_folder, "tiny")
            version = json.loads(table.schema.metadata[b"synpipe"])["data_version"]
            index = SynapseIndex(dataset, "tiny")
            answer = [one for found in index.search(7, per_class=60).values() for one in found]
            found = table.search().to_arrow(), table.search(np.ones(8, np.float32)).limit(60).to_arrow()
            (of_file,) = (
                set(read_table(path, ["dataset_version"])["dataset_version"].to_pylist()) if started.is_set() else ("",)
            )
            if version != "a" * 32:
                assert {each for rows in found for each in rows["dataset_version"].to_pylist()} == {
                    dataset_versions[version]
                }
                # The search may be of a later version, but of one.
                assert {one.region for one in answer} == {dataset_versions[index.provenance["data_version"]]}
                assert index.provenance["data_version"] >= version
                assert not of_file or of_file >= dataset_versions[version]  # the file is there before it is published
                started.set()
            assert len(found[0]) == len(found[1]) == 50 and len(answer) == 49
            assert table.version == table.tags.get_version(tag_for(version, PROVENANCE["encoder_fingerprint"]))
            seen.append((version, table.version))

    with ThreadPoolExecutor(1) as threads:
        reader = threads.submit(read)
        try:
            for version, dataset_version in dataset_versions.items():
                rows = synapses(50, region=[dataset_version] * 50)
                vectors = clustered(50, 8, seed=int(dataset_version, 16))
                told = {**PROVENANCE, "dataset_version": dataset_version}
                write_embedding_table(
                    path, [rows], [tiles_of(rows)], lambda *_, found=vectors: found, told, NOTHING_DERIVED
                )
                publish(path, dataset.lancedb_folder, "tiny", version, lambda line: None)
                if int(dataset_version, 16) % 5 == 0:
                    lancedb.connect(dataset.lancedb_folder).open_table("tiny").optimize()
                    for old in list_versions(dataset, "tiny")[5:]:
                        forget(dataset, "tiny", old.tag)
                    remove_untagged(dataset.lancedb_folder / "tiny.lance")
                if reader.done():
                    break
        finally:
            done.set()
        reader.result()
    assert started.is_set()
    assert [number for _, number in seen] == sorted(number for _, number in seen)  # never back
    assert len(set(seen)) > VERSIONS / 3
    assert len(list_versions(dataset, "tiny")) == 5
    assert len(list((dataset.lancedb_folder / "tiny.lance" / "data").iterdir())) <= 6  # one that was optimised last
