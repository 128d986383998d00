"""Every kind of change: what is out of date then, what runs, how much work that is, and what the store holds afterwards.

All of it over a real Dagster instance. After each change the store equals one that is made from scratch of the same
inputs, down to the data versions, and the other encoder's files are as they were.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import dagster as dg
import h5py
import pytest
import torch

from synpipe.assets import rgb_tiles
from synpipe.assets.asset import Made, Task
from synpipe.assets.graph import Node, find_node, nodes, states
from synpipe.assets.manifest import FORMAT, read_manifest
from synpipe.errors import SynpipeError
from synpipe.index.publish import IndexReport, published
from synpipe.store.files import read_table
from synpipe_tests.conftest import environment
from synpipe_tests.support.browser import serve
from synpipe_tests.support.changes import (
    ENCODERS,
    NAME,
    TRUNK,
    Killed,
    Own,
    branch,
    killed_at_the_end,
    make_outdated,
    name_of,
    same_store,
)
from synpipe_tests.support.command import answer, files, invoke, refusal

TILES, SYNAPSES = 40, 40  # of the small volume; other rows of its file are rejected
BRANCHES = branch("tiny", "other")
NOT_THE_VOLUME = TRUNK - {"volume"} | BRANCHES


def reasons(own: Own) -> dict[str, str]:
    """What `synpipe status --json` says of every asset that is not fresh."""
    said = json.loads(answer(own.project, "status", "--dataset", NAME, "--json"))["assets"]
    return {asset: "; ".join(each["reasons"]) for asset, each in said.items() if each["state"] != "fresh"}


def indexes(own: Own) -> dict[str, IndexReport]:
    """What readers see."""
    return {encoder: published(own.dataset.lancedb_folder, encoder) for encoder in own.dataset.encoders}


# What changes.


def add(rows: list[dict[str, str]]) -> None:
    """Three synapses half a micrometre beside others."""
    for number in range(3):
        rows.append({**rows[number], "synapse_id": str(900 + number), "x_nm": str(float(rows[number]["x_nm"]) + 500)})


def remove(rows: list[dict[str, str]]) -> None:
    del rows[4:6]


def move(rows: list[dict[str, str]]) -> None:
    rows[3]["y_nm"] = str(float(rows[3]["y_nm"]) + 40)


def relabel(rows: list[dict[str, str]]) -> None:
    rows[2]["neurotransmitter"] = "" if rows[2]["neurotransmitter"] else "gaba"


CORNER_ZYX = (slice(0, 4), slice(0, 150), slice(0, 150))


def whiten_a_corner(own: Own) -> None:
    with h5py.File(own.volume, "r+") as file:
        data = file["volumes/raw"]
        data[CORNER_ZYX] = 255 - data[CORNER_ZYX]


def tiles_with_the_corner(own: Own) -> int:
    """Tiles that hold a voxel of the corner, from their windows alone."""
    stacks = read_table(own.dataset.stacks_path).to_pylist()
    sections, height, width = (part.stop for part in CORNER_ZYX)
    inside = [
        each
        for each in stacks
        if each["reason"] is None
        and each["start_z"] < sections
        and each["start_y"] < height
        and each["start_x"] < width
    ]
    # A neighbouring section that is missing is not in the tile.
    return sum(
        any(
            each["start_z"] + channel < sections and not each["missing_sections"] >> channel & 1 for channel in range(3)
        )
        for each in inside
    )


@dataclass(frozen=True)
class Change:
    """stale, missing: assets. embedded: tiles by encoder. said: words of the reason by asset. ran: if not just those."""

    make: Callable[[Own], object]
    stale: set[str]
    embedded: dict[str, int]
    cut_outs: int = 0
    missing: set[str] = field(default_factory=set)
    said: dict[str, str] = field(default_factory=dict)
    unsynced: set[str] = field(default_factory=set)  # what Dagster itself notices: specs, not sources


def entry(**change: Any) -> Callable[[Own], object]:
    return lambda own: own.edit_encoders(lambda entries: entries["tiny"].update(change))


def third(own: Own) -> None:
    own.edit_encoders(lambda entries: entries.update(third={**ENCODERS["tiny"], "seed": 3}))
    own.edit_dataset(lambda spec: spec["encoders"].append("third"))


def stacking(how: str) -> Callable[[Own], object]:
    return lambda own: own.edit_dataset(lambda spec: spec["tiles"].update(stacking=how))


def rows(change: Callable[[list[dict[str, str]]], None]) -> Callable[[Own], object]:
    return lambda own: own.edit_synapses(change)


TINY = branch("tiny")
ENCODER_SAID = dict.fromkeys(TINY - {"evaluation"}, "encoder tiny changed (")
SYNAPSES_SAID = {
    "annotations": "its source changed (",
    "synapses": "annotations is out of date",
    "synapse_stacks": "synapses is out of date",
    "index_other": "embedding_table_other is out of date",
}
CHANGES = {
    "seed": Change(entry(seed=7), TINY, {"tiny": TILES}, said=ENCODER_SAID, unsynced=TINY),
    "crop and precision": Change(
        entry(crop_px=96, precision="bf16"), TINY, {"tiny": TILES}, said=ENCODER_SAID, unsynced=TINY
    ),
    "an encoder more": Change(
        third,
        {"evaluation"},
        {"third": TILES},
        missing=branch("third") - {"evaluation"},
        said={},
        unsynced=branch("third"),
    ),
    "synapses added": Change(rows(add), NOT_THE_VOLUME, {"tiny": 3, "other": 3}, 3, said=SYNAPSES_SAID),
    "a synapse moved": Change(rows(move), NOT_THE_VOLUME, {"tiny": 1, "other": 1}, 1, said=SYNAPSES_SAID),
    "synapses removed and relabelled": Change(
        lambda own: (rows(remove)(own), rows(relabel)(own)),
        NOT_THE_VOLUME,
        {"tiny": 0, "other": 0},
        0,
        said=SYNAPSES_SAID,
    ),
    "grey": Change(
        stacking("grey"),
        {"rgb_tiles", "split"} | BRANCHES,
        {"tiny": TILES, "other": TILES},
        said={"rgb_tiles": "its spec or code changed (1-", "embeddings_tiny": "rgb_tiles is out of date"},
        unsynced={"rgb_tiles"},
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_costs_what_it_changes_and_leads_where_a_fresh_start_would(own: Own, template: Own, name: str):
    change, inputs, versions = CHANGES[name], files(own.folder / "data"), own.versions()
    untouched = {encoder: own.branch_files(encoder) for encoder in own.dataset.encoders}
    change.make(own)

    assert own.outdated() == dict.fromkeys(change.stale, "stale") | dict.fromkeys(change.missing, "missing")
    said = reasons(own)
    assert {asset: words for asset, words in change.said.items() if words not in said[asset]} == {}
    assert own.unsynced() == change.unsynced

    ran = own.materialise_stale()
    assert ran.assets == change.stale | change.missing
    assert ran.cut_outs == change.cut_outs
    assert ran.embedded == change.embedded
    assert own.outdated() == {} and own.unsynced() == set()
    own.is_as_from_scratch()
    for encoder, before in untouched.items():
        if not branch(encoder) & ran.assets:
            assert own.branch_files(encoder) == before

    # And back: nothing is cut out or embedded, and the version of the index that was published first is current again.
    if name in ("seed", "grey", "a synapse moved"):
        for path, content in inputs.items():
            (own.folder / "data" / path).write_bytes(content)
        back = own.materialise_stale()
        assert (back.assets, back.cut_outs, set(back.embedded.values())) == (ran.assets, 0, {0})
        assert own.versions() == versions
        assert own.outdated() == {} and own.unsynced() == set()
        assert indexes(own) == indexes(template)
        same_store(own.dataset, template.dataset)


def test_a_corner_of_the_volume(own: Own):
    expected = tiles_with_the_corner(own)
    assert 3 < expected < TILES - 3
    whiten_a_corner(own)
    affected = TRUNK - {"annotations"} | BRANCHES
    assert own.outdated() == dict.fromkeys(affected, "stale")
    assert "its source changed (" in reasons(own)["volume"]
    assert "volume is out of date" in reasons(own)["synapse_stacks"]
    ran = own.materialise_stale()
    assert ran.assets == affected
    assert ran.cut_outs == SYNAPSES  # which of them have changed is known once they are cut out
    assert ran.embedded == {"tiny": expected, "other": expected}
    assert own.outdated() == {} and own.unsynced() == set()
    own.is_as_from_scratch()


def test_an_encoder_that_is_taken_out_and_put_back(own: Own):
    before = own.branch_files("other")
    # The evaluation is of all encoders, whichever they are.
    own.edit_dataset(lambda spec: spec["encoders"].remove("other"))
    assert own.outdated() == {"evaluation": "stale"} and own.unsynced() == {"evaluation"}
    assert {state.asset for state in states(own.dataset)} == TRUNK | TINY
    assert own.materialise_stale().assets == {"evaluation"}
    own.is_as_from_scratch()
    own.edit_dataset(lambda spec: spec["encoders"].append("other"))
    assert own.outdated() == {"evaluation": "stale"} and own.unsynced() == {"evaluation"}
    assert own.materialise_stale().assets == {"evaluation"}
    assert {**own.branch_files("other"), "evaluation.json": before["evaluation.json"]} == before


def test_what_changes_nothing_makes_nothing(own: Own, template: Own):
    tables = {name: own.dataset.table_path(name).read_bytes() for name in ENCODERS}

    def nothing_to_do() -> None:
        assert own.outdated() == {} and own.unsynced() == set() and reasons(own) == {}
        assert answer(own.project, "materialize", "--dataset", NAME, "--stale") == "Every asset is up to date.\n"

    nothing_to_do()
    # Words for people, and files that are written anew with the same content.
    own.edit_encoders(lambda entries: [each.update(description="changed") for each in entries.values()])
    own.edit_dataset(lambda spec: spec.update(title="changed"))
    for path in (own.csv, own.volume):
        os.utime(path, (time.time() + 5, time.time() + 5))
    nothing_to_do()
    ran = own.materialise()
    assert (ran.assets, ran.cut_outs, ran.embedded) == (TRUNK | BRANCHES, 0, {"tiny": 0, "other": 0})
    assert {name: own.dataset.table_path(name).read_bytes() for name in ENCODERS} == tables
    assert own.versions() == template.versions() and indexes(own) == indexes(template)
    nothing_to_do()


WITHOUT_WORK = """
import sys
from synpipe.cli import main
main(["materialize", "--dataset", sys.argv[1]], standalone_mode=False)
print(*sorted({"torch", "timm", "umap", "sklearn"} & set(sys.modules)))
"""


def test_a_second_run_says_that_nothing_has_changed_and_makes_no_forward_pass(
    own: Own, monkeypatch: pytest.MonkeyPatch
):
    own.edit_dataset(
        lambda spec: spec.update(classifier={"method": "linear"}, encoders=[*spec["encoders"], "tiny+pca4"])
    )
    own.materialise()
    passes: list[str] = []
    monkeypatch.setattr(torch.nn.Module, "__call__", lambda network, *_: passes.append(type(network).__name__))
    monkeypatch.setattr(rgb_tiles, "draw_sheet", lambda *_: passes.append("picture"))
    said = answer(own.project, "materialize", "--dataset", NAME)
    assert said == "Nothing has changed: every asset is as it was.\n"
    assert passes == []
    # Without these libraries nothing can be embedded, trained or laid out.
    command = [sys.executable, "-c", WITHOUT_WORK, NAME]
    done = subprocess.run(command, env=environment(own.project), capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["Nothing has changed: every asset is as it was.", ""]


def test_pictures_show_changed_labels_of_tiles_that_have_not_changed(own: Own):
    def sheet() -> Any:
        with own.instance() as instance:
            event = instance.get_latest_materialization_event(dg.AssetKey([NAME, "rgb_tiles"]))
        assert event is not None and event.asset_materialization is not None
        return event.asset_materialization.metadata["contact_sheet"].value

    version, before = own.versions()["rgb_tiles"], sheet()
    own.edit_synapses(relabel)
    own.materialise("+rgb_tiles")
    assert own.versions()["rgb_tiles"] == version
    assert sheet() != before


def test_the_command_says_what_changed_and_makes_just_that(own: Own):
    entry(seed=7)(own)
    said = answer(own.project, "status", "--dataset", NAME)
    assert said.count("because encoder tiny changed") == 4
    answer(own.project, "materialize", "--dataset", NAME, "--stale")
    with own.instance() as instance:
        (run,) = instance.get_runs(limit=1)
    assert {name_of(key) for key in run.asset_selection or ()} == TINY
    assert {asset for asset in own.versions() if read_manifest(own.dataset, asset).run_id == run.run_id} == TINY
    assert " stale " not in answer(own.project, "status", "--dataset", NAME)


# What a run leaves that was killed, or that was told to do half of the work.


def step_of(own: Own, asset: str) -> Node:
    return next(node for node in nodes(own.dataset) if node.name == asset)


@pytest.mark.parametrize(
    ("asset", "there"),
    [
        ("synapses", rows(relabel)),
        ("synapse_stacks", rows(move)),
        ("rgb_tiles", stacking("grey")),
        ("embeddings_tiny", entry(seed=7)),
        ("embedding_table_tiny", entry(seed=7)),
        ("index_tiny", entry(seed=7)),
    ],
)
def test_a_run_that_was_killed_is_not_forgotten_when_the_change_is_undone(
    own: Own, template: Own, asset: str, there: Callable[[Own], object]
):
    """Its files may be of the next version, though everything else says the former one."""
    inputs = files(own.folder / "data")
    there(own)
    for node in nodes(own.dataset):
        if node.name == asset:
            with pytest.raises(Killed):
                killed_at_the_end(node).run(lambda line: None)
            break
        if node.name in own.outdated():
            node.run(lambda line: None)
    for path, content in inputs.items():
        (own.folder / "data" / path).write_bytes(content)
    assert "its last run was interrupted" in reasons(own)[asset]
    make_outdated(own.dataset)
    assert own.outdated() == {}
    same_store(own.dataset, template.dataset)


def test_nothing_is_built_on_what_is_not_whole_or_has_changed_since(own: Own, template: Own):
    tiles, stacks, synapses = (step_of(own, asset) for asset in ("rgb_tiles", "synapse_stacks", "synapses"))
    with pytest.raises(Killed):
        killed_at_the_end(stacks).run(lambda line: None)
    with pytest.raises(
        SynpipeError, match=r"rgb_tiles cannot be made: mine/synapse_stacks is out of date, its last run"
    ):
        tiles.run(lambda line: None)
    stacks.run(lambda line: None)

    csv = own.csv.read_bytes()
    own.edit_synapses(relabel)
    message = refusal(invoke(own.project, "materialize", "--dataset", NAME, "--select", "synapses+"))
    assert "synapses cannot be made: mine/annotations is out of date, its source changed" in message
    own.csv.write_bytes(csv)

    pixels = own.volume.read_bytes()
    whiten_a_corner(own)
    cut_outs = sorted(own.dataset.cut_outs_folder.rglob("*"))
    message = refusal(invoke(own.project, "materialize", "--dataset", NAME, "--select", "synapse_stacks+"))
    assert "synapse_stacks cannot be made: mine/volume is out of date, its source changed" in message
    assert sorted(own.dataset.cut_outs_folder.rglob("*")) == cut_outs
    own.volume.write_bytes(pixels)

    def edited_while_it_is_read(task: Task) -> Made[Any]:
        made = synapses.asset.make(task)
        own.edit_synapses(relabel)
        return made

    with pytest.raises(SynpipeError, match="mine/annotations is out of date, its source changed"):
        replace(synapses, asset=replace(synapses.asset, make=edited_while_it_is_read)).run(lambda line: None)
    own.csv.write_bytes(csv)
    make_outdated(own.dataset)
    same_store(own.dataset, template.dataset)


def test_vectors_are_kept_under_the_tiles_that_were_embedded(own: Own):
    """The spec asks for grey by now, the tiles are still in colour."""
    stacking("grey")(own)
    entry(seed=7)(own)
    own.materialise(*TINY)
    stacking("colour")(own)
    assert own.outdated() == {}
    own.is_as_from_scratch()


def test_a_file_that_is_gone_is_made_again(own: Own, template: Own):
    for asset in ("synapses", "synapse_stacks", "rgb_tiles", "rejects", "embedding_table_tiny"):
        path = step_of(own, asset).path
        assert path is not None
        path.unlink()
        assert reasons(own)[asset] == f"its file {path.name} is not there"
        make_outdated(own.dataset)
        assert own.outdated() == {}
    same_store(own.dataset, template.dataset)


# Stores of other versions of the program.


def rewrite_manifests(own: Own, **content: Any) -> None:
    for path in [*own.dataset.folder.glob("manifests/*.json"), *own.dataset.folder.glob("lineage/*/*.json")]:
        path.write_text(json.dumps(json.loads(path.read_text()) | content))


def test_a_store_of_a_newer_version_is_refused_and_left_alone(own: Own):
    rewrite_manifests(own, format=FORMAT + 1, synpipe_version="9.1", something_new=[1])
    before = files(own.dataset.folder)
    for command in ("status", "materialize"):
        message = refusal(invoke(own.project, command, "--dataset", NAME))
        for words in ("was written by synpipe 9.1", "Upgrade synpipe", "--store"):
            assert words in message
    assert files(own.dataset.folder) == before


def test_a_store_of_an_older_version_is_brought_up_without_cutting_or_embedding(own: Own, template: Own):
    rewrite_manifests(own, format=0)
    for path in own.dataset.folder.glob("manifests/*.json"):  # older still, of another form
        path.write_text('{"asset": "?"}' if "tiny" in path.name else path.read_text())
    assert own.outdated() == dict.fromkeys(TRUNK | BRANCHES, "missing")
    ran = own.materialise_stale()
    assert (ran.assets, ran.cut_outs, ran.embedded) == (TRUNK | BRANCHES, 0, {"tiny": 0, "other": 0})
    assert own.outdated() == {} and own.unsynced() == set()
    same_store(own.dataset, template.dataset)


# In the browser's own words.

STATUS = "{ assetNodes { assetKey { path } staleStatus staleCauses { reason category } } }"
RELOAD = 'mutation { reloadRepositoryLocation(repositoryLocationName: "%s") { __typename } }'
PLACE = "{ repositoriesOrError { ... on RepositoryConnection { nodes { name location { name } } } } }"
LAUNCH = """mutation { launchPipelineExecution(executionParams: {
  mode: "default"
  selector: {pipelineName: "__ASSET_JOB", repositoryName: "%s", repositoryLocationName: "%s", assetSelection: [%s]}
}) { __typename ... on LaunchRunSuccess { run { runId } } ... on PythonError { message } } }"""
RUN = '{ runOrError(runId: "%s") { ... on Run { status } } }'


def test_the_page_marks_and_materialises_the_branch_of_a_changed_encoder(own: Own, tmp_path: Path):
    with serve(own.project, tmp_path) as ui:

        def unsynced() -> dict[str, list[str]]:
            nodes = ui.ask(STATUS)["assetNodes"]
            assert len(nodes) == len(TRUNK | BRANCHES)
            return {
                name_of(dg.AssetKey(node["assetKey"]["path"])): [cause["category"] for cause in node["staleCauses"]]
                for node in nodes
                if node["staleStatus"] != "FRESH"
            }

        assert unsynced() == {}
        entry(seed=7)(own)
        (repository,) = ui.ask(PLACE)["repositoriesOrError"]["nodes"]
        place = repository["location"]["name"]
        ui.ask(RELOAD % place)
        found = unsynced()
        assert found.keys() == TINY
        assert all("CODE" in causes for causes in found.values())

        # What the button "Materialize unsynced" sends.
        keys = ", ".join(f"{{path: {json.dumps(find_node(own.dataset, asset).key)}}}" for asset in sorted(found))
        launched = ui.ask(LAUNCH % (repository["name"], place, keys))["launchPipelineExecution"]
        assert launched["__typename"] == "LaunchRunSuccess", launched
        deadline = time.monotonic() + 120
        while (status := ui.ask(RUN % launched["run"]["runId"])["runOrError"]["status"]) not in ("SUCCESS", "FAILURE"):
            assert time.monotonic() < deadline
            time.sleep(0.5)
        assert status == "SUCCESS", ui.messages
        assert unsynced() == {}
        ui.stop()
    made = {asset for asset in own.versions() if read_manifest(own.dataset, asset).run_id == launched["run"]["runId"]}
    assert made == TINY
    assert own.outdated() == {}
    own.is_as_from_scratch()
