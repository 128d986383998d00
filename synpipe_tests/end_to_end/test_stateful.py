"""Any sequence of changes, kills and clearing up leaves the store that the same inputs give from scratch."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from synpipe.assets.graph import states
from synpipe.assets.manifest import read_manifest
from synpipe.datasets import Project
from synpipe.index.versions import list_versions, open_version
from synpipe.reports.housekeeping import find_leftovers, remove_leftovers
from synpipe.store.files import read_table
from synpipe_tests.support.inputs import SHAPE, Inputs, Place, Store
from synpipe_tests.support.killable import Killable, killable

SETTINGS = settings(
    max_examples=int(os.environ.get("SYNPIPE_TEST_SEQUENCES") or 4),  # more for a night
    stateful_step_count=8,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)

# Few, so that a synapse often comes back to where one was before.
IDS = st.integers(1, 16)
PLACES = st.sampled_from([(z, y, x) for z in (0, 2, SHAPE[0] - 1) for y in (10, 200, 333) for x in (128, 256, 511)])
LABELS = st.sampled_from(["gaba", "glutamate"])
SEEDS = st.sampled_from([0, 1])
# After a change: bring the store up to date, be killed at this moment of doing so, or change more.
THEN = st.sampled_from(["materialise", "wait"]) | st.integers(1, 150)


@pytest.fixture(scope="module")
def process() -> Iterator[Killable]:
    with killable() as found:
        yield found


def test_any_sequence_of_changes_and_kills_leads_to_the_store_that_is_made_from_scratch(process: Killable):
    run_state_machine_as_test(lambda: Changes(process), settings=SETTINGS)


class Changes(RuleBasedStateMachine):
    """One project whose inputs change; its store is brought up to date now and then."""

    def __init__(self, process: Killable):
        super().__init__()
        self.process = process
        self.folder = Path(tempfile.mkdtemp())

    @property
    def project(self) -> Project:
        """A new one each time: a project remembers its registry."""
        return Project(self.folder / "data", self.folder / "store")

    def teardown(self) -> None:
        """Every sequence ends well."""
        try:
            self.materialise_and_clear_up()
        finally:
            shutil.rmtree(self.folder)

    @initialize(places=st.lists(PLACES, min_size=3, max_size=8, unique=True))
    def begin(self, places: list[Place]) -> None:
        self.write(Inputs({number: (place, "gaba") for number, place in enumerate(places, 1)}), "materialise")

    def write(self, inputs: Inputs, then: str | int) -> None:
        self.inputs = inputs
        inputs.write(self.project.data)
        if then == "materialise":
            self.materialise()
        elif isinstance(then, int):
            self.process.materialise(self.project, at=then)

    # Changes of the inputs.

    @rule(synapse_id=IDS, place=PLACES, label=LABELS, then=THEN)
    def add_or_replace(self, synapse_id: int, place: Place, label: str, then: str | int) -> None:
        self.write(self.inputs.with_synapses({synapse_id: (place, label)}), then)

    @rule(number=IDS, place=PLACES, then=THEN)
    def move(self, number: int, place: Place, then: str | int) -> None:
        synapse_id = self.one(number)
        self.write(self.inputs.with_synapses({synapse_id: (place, self.inputs.synapses[synapse_id][1])}), then)

    @rule(number=IDS, then=THEN)
    def relabel(self, number: int, then: str | int) -> None:
        synapse_id = self.one(number)
        place, label = self.inputs.synapses[synapse_id]
        other = "glutamate" if label == "gaba" else "gaba"
        self.write(self.inputs.with_synapses({synapse_id: (place, other)}), then)

    @precondition(lambda self: len(self.inputs.synapses) > 1)
    @rule(number=IDS, then=THEN)
    def remove(self, number: int, then: str | int) -> None:
        self.write(self.inputs.with_synapses({self.one(number): None}), then)

    def one(self, number: int) -> int:
        ids = sorted(self.inputs.synapses)
        return ids[number % len(ids)]

    @rule(seed=SEEDS, then=THEN)
    def swap_the_encoder(self, seed: int, then: str | int) -> None:
        self.write(replace(self.inputs, encoders=self.inputs.encoders | {"tiny": ("test_resnet", seed)}), then)

    @rule(seed=SEEDS, then=THEN)
    def add_an_encoder_or_swap_it(self, seed: int, then: str | int) -> None:
        self.write(replace(self.inputs, encoders=self.inputs.encoders | {"other": ("test_vit", seed)}), then)

    @precondition(lambda self: len(self.inputs.encoders) > 1)
    @rule(then=THEN)
    def drop_that_encoder(self, then: str | int) -> None:
        self.write(replace(self.inputs, encoders={"tiny": self.inputs.encoders["tiny"]}), then)

    @rule(name=st.sampled_from(["volume.h5", "synapses.csv"]))
    def touch(self, name: str) -> None:
        os.utime(self.project.data / "datasets" / name)

    # What is done with them.

    def materialise(self) -> None:
        self.process.materialise(self.project)
        self.must_be_as_from_scratch()

    @rule()
    def clear_up(self) -> None:
        before = states(self.project.dataset("demo"))
        remove_leftovers(find_leftovers(self.project.dataset("demo")))
        assert find_leftovers(self.project.dataset("demo")) == []
        assert states(self.project.dataset("demo")) == before

    @rule()
    def materialise_and_clear_up(self) -> None:
        self.materialise()
        self.clear_up()
        self.nothing_must_be_left_over()
        again = self.process.materialise(self.project)
        assert (again.cut_outs, again.embedded) == (0, 0)
        self.must_be_as_from_scratch()

    def must_be_as_from_scratch(self) -> None:
        found = Store.read(self.project)
        assert found.rows == dict.fromkeys(self.inputs.encoders, self.inputs.rows())
        assert {state.state for state in states(self.project.dataset("demo"))} == {"fresh"}
        scratch = Project(self.project.data, self.folder / "scratch")
        shutil.rmtree(scratch.store, ignore_errors=True)
        self.process.materialise(scratch)
        found.assert_same(Store.read(scratch))

    def nothing_must_be_left_over(self) -> None:
        """Of a store that is up to date and cleared up, every file is accounted for."""
        dataset = self.project.dataset("demo")
        stacks = read_table(dataset.stacks_path)
        parts = {dataset.folder / file for file in stacks["file"].to_pylist()}
        # Beside the parts of the stacks, those stay that only a published version names.
        hashes_by_part = {
            part: set(read_table(part.with_suffix(".parquet"))["content_hash"].to_pylist())
            for part in dataset.cut_outs_folder.glob("*/[!.]*.h5")
        }
        expected = set(hashes_by_part) | {part.with_suffix(".parquet") for part in hashes_by_part}
        assert set(dataset.cut_outs_folder.glob("*/[!.]*")) == expected and parts <= expected
        published = {
            content_hash
            for path in dataset.lancedb_folder.glob("*.lance")
            for version in list_versions(dataset, path.stem)
            for content_hash in open_version(dataset, path.stem, version.tag).to_arrow()["content_hash"].to_pylist()
        }
        assert published <= set().union(*hashes_by_part.values())
        former = published - set(stacks["content_hash"].to_pylist())
        assert all(hashes & former for part, hashes in hashes_by_part.items() if part not in parts)
        fingerprints = {
            read_manifest(dataset, f"embeddings_{encoder}").figures["encoder_fingerprint"]
            for encoder in dataset.encoders
        }
        assert {path.name for path in dataset.embeddings_folder.glob("*") if any(path.iterdir())} == fingerprints
        hashes = set(stacks["content_hash"].to_pylist())
        for path in dataset.embeddings_folder.glob("*/[!.]*"):
            assert hashes & set(read_table(path)["content_hash"].to_pylist())
        assert {path.stem for path in dataset.table_path("any").parent.glob("[!.]*")} == set(dataset.encoders)
