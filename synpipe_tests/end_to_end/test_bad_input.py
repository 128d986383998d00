"""Wrong files, data set descriptions, disks and networks.

The error is one paragraph that names the file and says what to do. Nothing is left half written. Once the fault is
repaired, the same command works.
"""

import hashlib
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import yaml

from synpipe.assets import embeddings
from synpipe.assets.graph import find_node, nodes
from synpipe.datasets import Project
from synpipe.embeddings.encoders import Encoder
from synpipe.errors import SynpipeError
from synpipe_tests.conftest import SMALL_ENCODERS, environment
from synpipe_tests.support.command import answer, files, invoke, refusal, versions

DATASET = {
    "title": "A user's own data set",
    "volume": {"path": "../../em/volume.h5"},
    "annotations": [
        {"format": "table", "path": "../../em/synapses.csv", "columns": {"x": "x_nm", "y": "y_nm", "z": "z_nm"}}
    ],
    "tiles": {"shards": 2},
    "encoders": ["tiny"],
    # These read no input of their user, and they take longer than everything else.
    "classifier": None,
    "projection": None,
    "evaluation": None,
}
MATERIALIZE = ("materialize", "--dataset", "mine")
PROGRAM = str(Path(sys.executable).parent / "synpipe")


@dataclass(frozen=True)
class UserFolder:
    """A user's folder: volume and annotations in `em`, descriptions in `data`, and all results in `store`."""

    folder: Path

    @property
    def project(self) -> Project:
        return Project(self.folder / "data", self.folder / "store")

    @property
    def volume(self) -> Path:
        return self.folder / "em" / "volume.h5"

    @property
    def synapses(self) -> Path:
        return self.folder / "em" / "synapses.csv"

    @property
    def dataset(self) -> Path:
        return self.folder / "data" / "datasets" / "mine.yaml"

    @property
    def encoders(self) -> Path:
        return self.folder / "data" / "encoders.yaml"

    def describe(self, **changes: object) -> None:
        self.dataset.parent.mkdir(parents=True, exist_ok=True)
        self.dataset.write_text(yaml.safe_dump({**DATASET, **changes}))

    def register(self, **changes: object) -> None:
        """Change keys of the encoder `tiny`."""
        tiny = {**SMALL_ENCODERS["encoders"]["tiny"], **changes}
        self.encoders.write_text(
            yaml.safe_dump({"encoders": {"tiny": {k: v for k, v in tiny.items() if v is not None}}})
        )


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> UserFolder:
    """A folder without faults, with all assets. It is shared between tests, so do not change it."""
    user = UserFolder(tmp_path_factory.mktemp("own"))
    user.describe()
    user.register()
    user.volume.parent.mkdir()
    random = np.random.default_rng(0)
    with h5py.File(user.volume, "w") as file:
        file["volumes/raw"] = random.integers(40, 215, (8, 640, 640), np.uint8)
        file["volumes/raw"].attrs["resolution"] = (40.0, 4.0, 4.0)
    places = random.uniform(0, (2560, 2560, 320), (30, 3)).round(1).tolist()
    rows = (f"{number},{x},{y},{z},gaba\n" for number, (x, y, z) in enumerate(places, start=1))
    user.synapses.write_text("synapse_id,x_nm,y_nm,z_nm,neurotransmitter\n" + "".join(rows))
    answer(user.project, *MATERIALIZE)
    return user


@pytest.fixture
def user(intact: UserFolder, tmp_path: Path) -> UserFolder:
    shutil.copytree(intact.folder, tmp_path, dirs_exist_ok=True)
    return UserFolder(tmp_path)


def truncate(user: UserFolder) -> None:
    user.volume.write_bytes(user.volume.read_bytes()[: user.volume.stat().st_size // 2])


def widen(user: UserFolder) -> None:
    with h5py.File(user.volume, "r+") as file:
        raw, attributes = file["volumes/raw"][:], dict(file["volumes/raw"].attrs)
        del file["volumes/raw"]
        file["volumes/raw"] = raw.astype("uint16") * 256
        file["volumes/raw"].attrs.update(attributes)


def rename_columns(user: UserFolder) -> None:
    header, rest = user.synapses.read_text().split("\n", 1)
    user.synapses.write_text(header.replace("x_nm", "pos_x") + "\n" + rest)


@dataclass(frozen=True)
class Fault:
    """spoil: causes the fault. message: texts that the error must contain. unaffected: assets that can still be made."""

    spoil: Callable[[UserFolder], object]
    message: tuple[str, ...]
    unaffected: frozenset[str] = frozenset()


BEFORE_SYNAPSES = frozenset({"volume", "annotations"})
BEFORE_EMBEDDINGS = BEFORE_SYNAPSES | {"synapses", "synapse_stacks", "rgb_tiles", "rejects", "split"}
# The volume and the annotations do not depend on each other.
FILE_FAULTS = {
    "a truncated volume": Fault(truncate, ("volume.h5", "truncated", "copy it again"), frozenset({"annotations"})),
    "a volume of 16 bits": Fault(widen, ("volume.h5", "uint16", "uint8"), frozenset({"annotations"})),
    "no volume": Fault(lambda user: user.volume.unlink(), ("volume.h5", "does not exist"), frozenset({"annotations"})),
    "other columns": Fault(rename_columns, ("synapses.csv", "`x_nm`", "`pos_x`", "columns"), BEFORE_SYNAPSES),
    "no annotations": Fault(
        lambda user: user.synapses.unlink(), ("synapses.csv", "does not exist"), frozenset({"volume"})
    ),
    "annotations without a row": Fault(
        lambda user: user.synapses.write_text(user.synapses.read_text().split("\n")[0] + "\n"),
        ("synapses.csv", "no synapse"),
        BEFORE_SYNAPSES,
    ),
    "an encoder without weights": Fault(
        lambda user: user.register(weights="gone.safetensors", seed=None),
        ("gone.safetensors", "does not exist", "`weights`"),
        BEFORE_EMBEDDINGS,
    ),
    "an encoder that timm does not know": Fault(
        lambda user: user.register(model="resnet10tt"), ("resnet10tt", "Did you mean", "resnet10t"), BEFORE_EMBEDDINGS
    ),
}
# With these faults no asset is made.
DESCRIPTION_FAULTS = {
    "a data set that is not YAML": Fault(
        lambda user: user.dataset.write_bytes(b"title: [a\nvolume: }"), ("mine.yaml", "line 2")
    ),
    "a data set that is not text": Fault(
        lambda user: user.dataset.write_bytes(b"\xff\xfe\x00title"), ("mine.yaml", "YAML")
    ),
    "a data set that is a list": Fault(lambda user: user.dataset.write_bytes(b"- title\n"), ("mine.yaml", "mapping")),
    "a data set with an unknown key": Fault(
        lambda user: user.describe(tile={"shards": 2}), ("mine.yaml", "`tile` is not", "Known keys", "tiles")
    ),
    "a data set with a wrong value": Fault(
        lambda user: user.describe(tiles={"border": "mirror"}), ("mine.yaml", "tiles.border", "'pad'")
    ),
    "a data set with an unknown encoder": Fault(
        lambda user: user.describe(encoders=["tiny", "huge"]), ("mine.yaml", "huge", "encoders.yaml", "tiny")
    ),
    "classes that differ only in case": Fault(
        lambda user: user.describe(classes=["gaba", "Gaba"]),
        ("mine.yaml", "classes", "'gaba' and 'Gaba'", "same class"),
    ),
    "a class that is named twice": Fault(
        lambda user: user.describe(classes=["gaba", "gaba"]),
        ("mine.yaml", "classes", "'gaba' and 'gaba'", "same class"),
    ),
    "classes that are synonyms": Fault(
        lambda user: user.describe(classes=["ach", "acetylcholine"]), ("mine.yaml", "'ach' and 'acetylcholine'")
    ),
    "a class without a name": Fault(
        lambda user: user.describe(classes=["gaba", " "]), ("mine.yaml", "classes", "empty name")
    ),
    "a class named unlabelled": Fault(
        lambda user: user.describe(classes=["gaba", "Unlabelled"]), ("mine.yaml", "'Unlabelled'", "rename the class")
    ),
    "no registry": Fault(lambda user: user.encoders.unlink(), ("encoders.yaml", "does not exist")),
    "an encoder with an unknown key": Fault(
        lambda user: user.register(wheights="hub"), ("encoders.yaml", "`tiny`", "wheights", "Known keys", "weights")
    ),
    "an encoder without a model": Fault(
        lambda user: user.register(model=None), ("encoders.yaml", "`tiny`", "model", "required")
    ),
}


def assert_no_temporary_files(store: Path) -> None:
    assert [path for path in store.rglob("*") if path.name.startswith(".tmp-")] == []


def repair(user: UserFolder, intact: UserFolder) -> None:
    for part in ("em", "data"):
        shutil.copytree(intact.folder / part, user.folder / part, dirs_exist_ok=True)


def make_all_assets(project: Project) -> str | None:
    """Make every asset that can be made, and return the message of the first one that fails.

    This does the same as the command, but without Dagster's history, which takes most of the command's time.
    """
    failures = []
    for node in nodes(project.dataset("mine")):
        try:
            node.run(lambda line: None)
        except SynpipeError as error:
            failures.append(str(error))
    return failures[0] if failures else None


@pytest.mark.parametrize("name", FILE_FAULTS)
def test_a_wrong_file_is_named_and_repairing_it_is_enough(user: UserFolder, intact: UserFolder, name: str):
    fault = FILE_FAULTS[name]
    folder, empty = user.project.store / "mine", Project(user.project.data, user.folder / "empty")
    good, good_versions = files(folder), versions(user.project, "mine")
    fault.spoil(user)
    message = refusal(invoke(user.project, *MATERIALIZE))
    for text in (message, make_all_assets(empty)):
        assert [part for part in fault.message if part not in text] == [], text
    for project in (user.project, empty):
        assert_no_temporary_files(project.store)

    # The empty store now holds the unaffected assets, and no file of the others.
    left = files(empty.store / "mine")
    assert {Path(path).stem for path in left if path.startswith("manifests/")} == fault.unaffected
    assert {Path(path).parts[1] for path in left if path.startswith("lineage/")} == fault.unaffected
    if "synapses" not in fault.unaffected:
        assert {path for path in left if not path.startswith(("manifests/", "lineage/"))} == set()
    # The files of earlier runs are untouched, except the manifests of steps that ran again.
    now, again = files(folder), {f"manifests/{asset}.json" for asset in fault.unaffected}
    added = {Path(path).parts[:2] for path in now.keys() - good.keys()}
    assert added <= {("lineage", asset) for asset in fault.unaffected}
    assert [path for path in good if path not in again and now.get(path) != good[path]] == []

    repair(user, intact)
    assert make_all_assets(user.project) is None
    assert versions(user.project, "mine") == good_versions


@pytest.mark.parametrize("name", DESCRIPTION_FAULTS)
def test_a_wrong_description_is_named_before_any_work_starts(user: UserFolder, intact: UserFolder, name: str):
    fault = DESCRIPTION_FAULTS[name]
    good = files(user.project.store)
    fault.spoil(user)
    for command in ("materialize", "status"):
        message = refusal(invoke(user.project, command, "--dataset", "mine"))
        assert [part for part in fault.message if part not in message] == [], message
    assert files(user.project.store) == good
    repair(user, intact)
    assert "mine" in answer(user.project, "status", "--dataset", "mine")


def test_weights_from_a_hub_that_cannot_be_reached(user: UserFolder, tmp_path: Path):
    user.register(model="resnet10t.c3_in1k", weights="hub", seed=None)
    closed_port = "http://127.0.0.1:9"  # the port "discard", on which nothing listens
    proxies = {
        name: closed_port for kind in ("http", "https", "all") for name in (f"{kind}_proxy", f"{kind}_proxy".upper())
    }
    before = files(user.project.store / "mine" / "embeddings")
    started = time.monotonic()
    result = subprocess.run(
        [PROGRAM, *MATERIALIZE, "--select", "embeddings_tiny+"],
        env=environment(user.project) | proxies | {"HF_HOME": str(tmp_path / "hub"), "HOME": str(tmp_path / "home")},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    # Most of this time is the import of torch, which is slow on a busy machine. Retries would take minutes.
    assert time.monotonic() - started < 90
    message = refusal(result)
    for part in ("mine/tiny/embeddings", "timm/resnet10t.c3_in1k", "hf download", "weights: random"):
        assert part in message
    assert files(user.project.store / "mine" / "embeddings") == before
    assert_no_temporary_files(user.project.store)
    user.register()
    answer(user.project, *MATERIALIZE)


def test_weights_that_are_replaced_before_they_are_opened(user: UserFolder, monkeypatch: pytest.MonkeyPatch):
    """The run stops, so that no version claims other weights than those that made it. The same command then carries on."""
    import safetensors.torch
    import timm

    model = SMALL_ENCODERS["encoders"]["tiny"]["model"]
    weights = user.encoders.parent / "used.safetensors"
    state = timm.create_model(model, num_classes=0).state_dict()
    safetensors.torch.save_file(state, weights)
    user.register(weights=weights.name, seed=None)
    open_now = embeddings.open_on_all_devices

    def replace_then_open(*args: Any) -> list[Encoder]:
        name = next(name for name, value in state.items() if value.is_floating_point())
        safetensors.torch.save_file({**state, name: state[name] * 2}, weights)
        return open_now(*args)

    monkeypatch.setattr(embeddings, "open_on_all_devices", replace_then_open)
    node = find_node(user.project.dataset("mine"), "embeddings_tiny")
    with pytest.raises(SynpipeError, match=r"used\.safetensors of encoder .* was replaced while it was being opened"):
        node.run(lambda line: None)
    monkeypatch.undo()
    node.run(lambda line: None)
    facts = embeddings.ASSET.read(user.project.dataset("mine"), "tiny")
    assert facts.encoder["weights"] == f"sha256:{hashlib.sha256(weights.read_bytes()).hexdigest()}"


def test_a_store_below_a_file(user: UserFolder):
    file = user.folder / "a_file"
    file.write_text("not a folder")
    for command in (MATERIALIZE, ("demo",)):
        message = refusal(invoke(user.project, "--store", str(file / "store"), *command))
        if command == MATERIALIZE:
            assert str(file / "store") in message
            assert "--store" in message
    assert "materialize" in refusal(
        invoke(user.project, "--store", str(file / "store"), "search", "5", "--dataset", "mine")
    )
    assert file.read_text() == "not a folder"
    answer(user.project, "--store", str(user.folder / "elsewhere"), *MATERIALIZE, "--select", "+synapses")


UNSHARE = ["unshare", "--map-root-user", "--mount"]


def with_store_mounted(user: UserFolder, mount: str, script: str) -> subprocess.CompletedProcess[str]:
    """Run a shell script in its own mount namespace: other processes do not see the mount, and it ends with the script.

    In the script, $0 is the program and $SYNPIPE_STORE the store.
    """
    attempt = [*UNSHARE, "mount", "-t", "tmpfs", "none", str(user.project.store)]
    if shutil.which("unshare") is None or subprocess.run(attempt, capture_output=True, check=False).returncode:
        pytest.skip("mounting is not permitted here")
    return subprocess.run(
        [*UNSHARE, "sh", "-c", f"{mount} && {script}", PROGRAM],
        env=environment(user.project),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_a_disk_that_is_read_only(user: UserFolder):
    mount = 'mount -t tmpfs -o ro none "$SYNPIPE_STORE"'
    message = refusal(with_store_mounted(user, mount, '"$0" materialize --dataset mine'))
    assert "Read-only file system" in message
    assert str(user.project.store) in message
    assert "--store" in message


@pytest.mark.parametrize("size_kb", [100, 3000])
def test_a_disk_that_is_full(user: UserFolder, size_kb: int):
    """The smaller disk is full at once, because even Dagster's history does not fit; the larger one while tiles are written."""
    mount = f'mount -t tmpfs -o size={size_kb}k none "$SYNPIPE_STORE"'
    script = '"$0" materialize --dataset mine; code=$?; find "$SYNPIPE_STORE" -name ".tmp-*"; exit $code'
    result = with_store_mounted(user, mount, script)
    message = refusal(result)
    assert "No space left" in message or "disk is full" in message
    assert str(user.project.store) in message
    assert result.stdout == ""  # no leftovers


def test_a_read_only_store_can_be_searched_but_not_changed(user: UserFolder):
    """A group may share such a store."""
    mount = 'mount --bind "$SYNPIPE_STORE" "$SYNPIPE_STORE" && mount -o remount,bind,ro "$SYNPIPE_STORE"'
    result = with_store_mounted(user, mount, '"$0" search 7 --dataset mine && "$0" materialize --dataset mine')
    message = refusal(result)
    assert "Most similar to 7" in result.stdout
    assert str(user.project.store) in message
    assert "--store" in message
