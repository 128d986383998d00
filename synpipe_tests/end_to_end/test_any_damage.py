"""Any file of a store, damaged in any way: each command is unaffected or names the file, and the next runs repair it.

`SYNPIPE_TEST_DAMAGE` is the number of cases. `SYNPIPE_TEST_DAMAGE_FROM` is the number of the first one, to repeat a case.
"""

import json
import logging
import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from synpipe.api import OpenDataset
from synpipe.assets.graph import ASSETS, nodes, states
from synpipe.datasets import BULK_RECORD, Dataset, Project, record_bulk
from synpipe.errors import SynpipeError
from synpipe.explorer.answers import Explorer
from synpipe_tests.support.command import invoke
from synpipe_tests.support.inputs import Inputs

CASES = int(os.environ.get("SYNPIPE_TEST_DAMAGE", "100"))
FIRST = int(os.environ.get("SYNPIPE_TEST_DAMAGE_FROM", "0"))
# In every so many cases, all assets are made and shown. That takes ten times as long.
THOROUGH_EVERY = 20 if "SYNPIPE_TEST_DAMAGE" in os.environ else 1000
BATCHES = 10  # pytest shows the progress, and a failure ends its own batch only
RUNS = 2  # "the same command makes it again, or at the latest the next one does"

SYNAPSES = {1000 + n: ((n % 6, 60 + 13 * n, 450 - 14 * n), ("gaba", "glutamate")[n % 2]) for n in range(30)}
INPUTS = Inputs(SYNAPSES)
QUERY = 1007
# Every kind of asset, and the files that only some data sets have.
CHANGES = {
    "split": {"by": "random"},
    "classifier": {"method": "finetune", "epochs": 1, "batch_size": 8},
    "evaluation": {"queries": 10, "places": 10, "singles": 1},
    "projection": {"n_neighbours": 200},  # the map is one of principal components, which takes no time
    "encoders": ["tiny", "tiny+pca4"],
    "max_reject_share": 1,
}


def materialise(dataset: Dataset, kinds: frozenset[str] | None = None) -> str:
    """Do all work and all checks, and draw all views, as Dagster does; return what was logged.

    kinds: make these assets and those that are out of date, which takes less time.
    """
    said: list[str] = []
    outdated = find_outdated(dataset)
    for node in nodes(dataset):
        if kinds is not None and node.asset.name not in kinds and node.name not in outdated:
            continue
        checks = node.asset.checks
        manifest = node.run(said.append, None, checks)
        findings = {name: check(dataset, node.encoder) for name, check in checks.items()}
        if stopped := [finding.description for finding in findings.values() if finding.stops]:
            raise AssertionError(f"{node.name}: {stopped}")
        node.pass_checks([*findings])
        if kinds is None:
            node.asset.show(dataset, node.encoder, manifest)
        outdated = find_outdated(dataset)
    return "\n".join(said)


def find_outdated(dataset: Dataset) -> set[str]:
    return {state.asset for state in states(dataset) if state.state != "fresh"}


def kinds_of_files(dataset: Dataset) -> dict[str, list[Path]]:
    """Every file of a store by its kind. The kinds follow from the assets and from the folders that a data set declares."""
    kinds: dict[str, list[Path]] = {}
    for asset in ASSETS:
        for branch in dataset.encoders if asset.per_encoder else [""]:
            for number, path in enumerate(asset.files(dataset, branch)):
                kinds.setdefault(f"file {number} of {asset.name}", []).extend([path] if path.exists() else [])
    folders = {
        "part": dataset.cut_outs_folder,
        "vectors": dataset.embeddings_folder,
        "compressor": dataset.compressor_path("any").parent,
        "index": dataset.lancedb_folder,
        "manifest": dataset.manifest_path("any").parent,
        "lineage": dataset.lineage_path("any", "any").parent.parent,
        "training": dataset.training_folder,
    }
    for name, folder in folders.items():
        for path in sorted(folder.rglob("*")):  # type: ignore[type-var]
            if path.is_file():
                inner = path.relative_to(folder).parts[1:-1] if name == "index" else ()  # LanceDB's own folders
                kind = " ".join([name, *(part for part in inner if part.startswith("_") or part == "data")])
                kinds.setdefault(f"{kind} {path.suffix}", []).append(Path(str(path)))
    kinds["record of the bulk"] = [dataset.folder / BULK_RECORD]
    return kinds


def _assets_that_check(kind: str) -> set[str]:
    """The assets that find damage to files of this kind when they are made, if `states` does not find it."""
    checking = {
        "part": {"synapse_stacks", "rgb_tiles"},
        "vectors": {"embeddings", "compressed", "classifier"},
        "compressor": {"compressed"},
        "index": {"index"},
        "training": {"classifier"},
    }
    return checking.get(kind.split()[0], set())


def store_files(dataset: Dataset) -> set[Path]:
    roots = [dataset.folder, Path(str(dataset.bulk_folder))]
    return {path for root in roots for path in root.rglob("*") if path.is_file()}


@dataclass(frozen=True)
class Whole:
    """A store without damage. answers: what each reader says of it."""

    folder: Path
    answers: dict[str, Any]

    def copy(self, folder: Path) -> Dataset:
        for name in ("store", "bulk"):
            shutil.copytree(self.folder / name, folder / name)
        # The record of the bulk names the folder of the store that was copied.
        record = folder / "store" / "demo" / BULK_RECORD
        record.unlink()
        dataset = project_in(folder, self.folder / "data").dataset("demo")
        record_bulk(dataset)
        return dataset


def project_in(folder: Path, data: Path) -> Project:
    return Project(data, folder / "store", folder / "bulk")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    folder = tmp_path_factory.mktemp("whole")
    project = project_in(folder, folder / "data")
    # A label changes, so that there are former versions of everything.
    for label in ("glutamate", "gaba"):
        INPUTS.with_synapses({1000: (SYNAPSES[1000][0], label)}).write(project.data)
        path = project.data / "datasets" / "demo.yaml"
        path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | CHANGES))
        materialise(project.dataset("demo"))
    dataset = project.dataset("demo")
    found = kinds_of_files(dataset)
    empty = [kind for kind, paths in found.items() if not paths and kind != "file 1 of classifier"]
    assert not empty
    unknown = store_files(dataset) - {path for paths in found.values() for path in paths}
    assert not unknown
    answers = {name: reader(Project(project.data, project.store)) for name, reader in READERS.items()}
    return Whole(folder, answers)


def command(*arguments: str, as_json: bool = True) -> Callable[[Project], Any]:
    """A reader that runs a command; what it prints on standard output."""

    def run(project: Project) -> Any:
        result = invoke(project, *arguments, *(["--json"] if as_json else []))
        if result.exit_code:
            raise SynpipeError(result.stderr)
        return json.loads(result.stdout) if as_json else result.stdout

    return run


def explore(project: Project) -> Any:
    explorer = Explorer(project)
    answers = []
    for encoder in ("tiny", "tiny_pca4"):
        answer = explorer.search("demo", encoder, str(QUERY))
        answers.append([answer["groups"], answer["query"], explorer.map("demo", encoder)])
    for synapse in list(SYNAPSES)[::10]:
        content_hash, png = explorer.tile("demo", str(synapse))
        answers.append([content_hash, len(png())])
    return answers


def list_published(project: Project) -> Any:
    """A rebuilt version has another number and another time."""
    versions = command("versions")(project)
    return sorted([version["tag"], version["rows"], version["current"]] for version in versions)


def trace(project: Project) -> Any:
    origin = command("provenance", str(QUERY))(project)
    del origin["index"]["version"]
    return origin


def table(project: Project) -> Any:
    found = OpenDataset(project.dataset("demo")).table("tiny")
    return found.replace_schema_metadata(None).to_pylist()


READERS: dict[str, Callable[[Project], Any]] = {
    "search": command("search", str(QUERY)),
    "versions": list_published,
    "provenance": trace,
    "explorer": explore,
    "table": table,
    "status": command("status"),
    "gc": command("gc"),
    "diff": lambda project: command("diff", command("versions")(project)[-1]["tag"])(project),
    "confusion": command("confusion"),
}
# Those that are asked again after the repair, to save time.
ESSENTIAL = ("search", "versions", "provenance", "explorer", "table")
FREE = ("status", "gc")  # they may say more about a damaged store, and need not fail


def flip_bits(path: Path, random: np.random.Generator, _others: list[Path]) -> None:
    content = bytearray(path.read_bytes())
    for place in random.integers(0, len(content), random.integers(1, 4)).tolist():
        content[place] ^= 1 << int(random.integers(8))
    path.write_bytes(content)


def flip_near_the_end(path: Path, random: np.random.Generator, _others: list[Path]) -> None:
    """Footers and metadata are at the end or at the beginning."""
    content = bytearray(path.read_bytes())
    reach = min(len(content), 2000)
    place = int(random.integers(reach))
    content[place if random.random() < 0.3 else -1 - place] ^= 1 << int(random.integers(8))
    path.write_bytes(content)


def cut_short(path: Path, random: np.random.Generator, _others: list[Path]) -> None:
    path.write_bytes(path.read_bytes()[: int(random.integers(path.stat().st_size))])


def empty(path: Path, _random: np.random.Generator, _others: list[Path]) -> None:
    path.write_bytes(b"")


def zero(path: Path, random: np.random.Generator, _others: list[Path]) -> None:
    """A piece becomes zeros, as after a power failure."""
    content = bytearray(path.read_bytes())
    first = int(random.integers(len(content)))
    last = min(len(content), first + int(random.integers(1, 4097)))
    content[first:last] = bytes(last - first)
    path.write_bytes(content)


def swap(path: Path, random: np.random.Generator, others: list[Path]) -> None:
    other = others[int(random.integers(len(others)))]
    content = path.read_bytes()
    path.write_bytes(other.read_bytes())
    other.write_bytes(content)


DAMAGES = [flip_bits, flip_near_the_end, cut_short, empty, zero, swap]


class Case:
    """One damaged copy of the store."""

    def __init__(self, whole: Whole, folder: Path, number: int) -> None:
        self.random = np.random.default_rng(number)
        self.whole, self.dataset = whole, whole.copy(folder)
        self.project = Project(self.dataset.weights_base, self.dataset.folder.parent)
        kinds = {kind: paths for kind, paths in kinds_of_files(self.dataset).items() if paths}
        kind = list(kinds)[number % len(kinds)]
        self.path = kinds[kind][int(self.random.integers(len(kinds[kind])))]
        damage = DAMAGES[int(self.random.integers(len(DAMAGES)))]
        others = [path for path in kinds[kind] if path != self.path] or [*store_files(self.dataset)]
        before = {path: path.read_bytes() for path in store_files(self.dataset)}
        damage(self.path, self.random, others)
        self.kinds = None if number % THOROUGH_EVERY == THOROUGH_EVERY - 1 else frozenset(_assets_that_check(kind))
        self.changed = [path for path, content in before.items() if path.read_bytes() != content]
        self.title = f"case {number}: {damage.__name__} {', '.join(str(path) for path in self.changed)}"

    def is_named(self, text: str) -> bool:
        """Whether a message names a damaged file, its folder in LanceDB, or the asset that it belongs to."""
        bulk = Path(str(self.dataset.lancedb_folder))
        names = {path.name for path in self.changed} | {path.stem for path in self.changed}
        names |= {
            path.relative_to(bulk).parts[0].removesuffix(".lance") for path in self.changed if bulk in path.parents
        }
        return any(name in text for name in names)

    def read(self, names: Iterable[str], log: pytest.LogCaptureFixture) -> dict[str, str]:
        """Ask these readers: what is wrong with the answers, by reader."""
        faults = {}
        for name in names:
            try:
                answer = READERS[name](self.project)
            except SynpipeError as error:
                if not self.is_named(str(error) + log.text):
                    faults[name] = f"does not name the file: {error}"
            except BaseException as error:
                faults[name] = f"traceback: {type(error).__name__}: {str(error)[:300]}"
            else:
                if name not in FREE and answer != self.whole.answers[name] and not self.is_named(log.text):
                    faults[name] = "another answer"
        return faults

    def repair(self) -> dict[str, str]:
        """Materialise as often as it may take."""
        said = ""
        for _ in range(RUNS):
            try:
                said = materialise(self.project.dataset("demo"), self.kinds)
            except SynpipeError as error:
                said = str(error)
                if not self.is_named(said) and "lacks the vectors" not in said:
                    return {"materialise": f"does not name the file: {said}"}
                if BULK_RECORD in said:  # only a person can say where the data is
                    record = self.dataset.folder / BULK_RECORD
                    record.write_text(json.dumps({"address": str(self.dataset.bulk_folder)}))
            except BaseException as error:
                return {"materialise": f"traceback: {type(error).__name__}: {str(error)[:300]}"}
            else:
                break
        else:
            return {"materialise": f"still fails: {said}"}
        outdated = [state for state in states(self.project.dataset("demo")) if state.state != "fresh"]
        return {"states": str(outdated)} if outdated else {}


def faults_of(whole: Whole, folder: Path, number: int, log: pytest.LogCaptureFixture) -> list[str]:
    case = Case(whole, folder, number)
    log.clear()
    faults = {f"before: {name}": fault for name, fault in case.read(READERS, log).items()}
    faults |= case.repair()
    log.clear()
    faults |= {
        f"after: {name}": fault for name, fault in case.read(READERS if case.kinds is None else ESSENTIAL, log).items()
    }
    shutil.rmtree(folder)
    return [f"{case.title}: {name}: {fault}" for name, fault in faults.items()]


@pytest.mark.parametrize("batch", range(BATCHES))
def test_a_damaged_file_is_named_and_repaired_and_changes_no_answer(
    whole: Whole, tmp_path: Path, batch: int, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        faults = [
            fault
            for number in range(FIRST + batch, FIRST + CASES, BATCHES)
            for fault in faults_of(whole, tmp_path / str(number), number, caplog)
        ]
    assert not faults, "\n".join(faults)
