"""What the tests share: real EM data where it is there, and a small demo data set, made once a run."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import yaml

from synpipe.datasets import Dataset, Project

if TYPE_CHECKING:
    from synpipe_tests.support.changes import Own

REPOSITORY = Path(__file__).resolve().parent.parent

# An evaluation of a small data set takes two seconds an encoder, ten times what all of the other steps take.
QUICK_EVALUATION = {"queries": 10, "places": 10, "singles": 1}
SMALL_DEMO = {
    "title": "A small synthetic volume",
    "synthetic": {"seed": 1, "shape_zyx": [12, 1024, 1024], "n_synapses": 96, "n_neurons": 18, "n_missing_sections": 1},
    "volume": {"path": "volume.h5"},
    "annotations": [{"format": "table", "path": "synapses.csv", "columns": {"x": "x_nm", "y": "y_nm", "z": "z_nm"}}],
    "tiles": {"shards": 3},
    "encoders": ["tiny", "other"],
    "evaluation": QUICK_EVALUATION,
    "projection": None,  # umap takes twenty seconds to import and compile; `test_projection` has the maps
}
# Two networks that embed a hundred tiles in about a second.
SMALL_ENCODERS = {
    "encoders": {
        "tiny": {"model": "mobilenetv4_conv_small", "weights": "random", "seed": 0, "crop_px": 64},
        "other": {"model": "resnet10t", "weights": "random", "seed": 0, "crop_px": 64, "precision": "fp32"},
    }
}


# Files that take longest, in that order: begun last, one of them would keep one process waiting for the other.
SLOWEST = (
    "interrupted",
    "changes",
    "schedule",
    "pretraining",
    "bad_input",
    "cluster",
    "stateful",
    "ui",
    "explorer_pages",
    "cli",
    "site",
)


def pytest_configure() -> None:
    """Let SIGINT interrupt this process and those that it starts.

    A shell starts its background jobs with SIGINT ignored, and child processes inherit that. Some tests send SIGINT.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {f"test_{name}.py": place for place, name in enumerate(SLOWEST)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))


@pytest.fixture(scope="session")
def real_em() -> Path:
    """Folder with real EM data; tests that need it skip where it is absent."""
    folder = Path(os.environ.get("SYNPIPE_REAL_DATA") or REPOSITORY.parent / "shared" / "em")
    if not (folder / "vnc_stack1.h5").exists():
        pytest.skip(f"no real EM data in {folder}: set SYNPIPE_REAL_DATA to a folder with vnc_stack1.h5")
    return folder


def write_project(folder: Path, **changes) -> Project:
    """A project with the small demo in `folder`; `changes` replace keys of the data set's YAML file."""
    datasets = folder / "data" / "datasets"
    datasets.mkdir(parents=True)
    (datasets / "demo.yaml").write_text(yaml.safe_dump({**SMALL_DEMO, **changes}))
    (folder / "data" / "encoders.yaml").write_text(yaml.safe_dump(SMALL_ENCODERS))
    return Project(folder / "data", folder / "store")


@pytest.fixture
def project(tmp_path: Path) -> Project:
    """A project of the test's own, with nothing made yet."""
    return write_project(tmp_path)


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """The small demo, materialised through Dagster. Shared: read it, do not change it."""
    project = write_project(tmp_path_factory.mktemp("made"))
    result = run_synpipe(project, "materialize", "--dataset", "demo")
    assert result.returncode == 0, result.stderr
    return project.dataset("demo")


@pytest.fixture(scope="session")
def explored(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """The same with maps, of the kind that few synapses get: made at once. Shared: read it, do not change it."""
    project = write_project(tmp_path_factory.mktemp("explored"), projection={"n_neighbours": 200})
    result = run_synpipe(project, "materialize", "--dataset", "demo")
    assert result.returncode == 0, result.stderr
    return project.dataset("demo")


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> "Own":
    """Files that can be edited, with everything materialised. Shared: copy it, do not change it."""
    from synpipe_tests.support import (
        changes,  # Dagster and LanceDB, four seconds that most files of tests can do without
    )

    return changes.make(tmp_path_factory.mktemp("template"))


@pytest.fixture
def own(template: "Own", tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> "Own":
    """A copy of that, for a test to change."""
    from synpipe_tests.support import changes

    return changes.copy(template, tmp_path / "own", monkeypatch)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """A folder on a disk of so many kB, which a later call makes larger."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def sized(kb: int) -> Path:
        again = "remount," if folder.is_mount() else ""
        command = ["mount", "-t", "tmpfs", "-o", f"{again}size={kb}k", "tmpfs", str(folder)]
        try:
            mounted = subprocess.run(command, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            pytest.skip("there is no mount command here")
        if mounted.returncode:
            pytest.skip(f"this user may not mount a small disk: {mounted.stderr.strip()}")
        return folder

    yield sized
    if folder.is_mount():
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def project_of(dataset: Dataset) -> Project:
    return Project(dataset.weights_base, dataset.folder.parent)


def environment(project: Project) -> dict[str, str]:
    """The environment of a command that works on `project` and runs the code of this checkout."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SYNPIPE_", "DAGSTER_"))}
    return {
        **kept,
        "SYNPIPE_DATA": str(project.data),
        "SYNPIPE_STORE": str(project.store),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(REPOSITORY),  # the environment may have another checkout installed
    }


def run_synpipe(project: Project, *arguments: str, timeout_s: float = 300) -> subprocess.CompletedProcess[str]:
    """Run the command as a user would, in a process of its own."""
    command = [str(Path(sys.executable).parent / "synpipe"), *arguments]
    return subprocess.run(
        command, env=environment(project), capture_output=True, text=True, timeout=timeout_s, check=False
    )


Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def synpipe(project: Project) -> Command:
    """`synpipe(...)` on the test's own project."""
    return lambda *arguments, **options: run_synpipe(project, *arguments, **options)
