"""Fixtures that all tests share: real EM data where it exists, and small data sets, each made once per test run."""

import fcntl
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import yaml

from synpipe.datasets import Dataset, Project
from synpipe_tests.support.outdated import make_outdated

if TYPE_CHECKING:
    from synpipe_tests.support.changes import Own

REPOSITORY = Path(__file__).resolve().parent.parent

# The default evaluation of a small data set takes two seconds per encoder, ten times as long as all other steps together.
QUICK_EVALUATION = {"queries": 10, "places": 10, "singles": 1}
SMALL_DEMO = {
    "title": "A small synthetic volume",
    "synthetic": {"seed": 1, "shape_zyx": [12, 1024, 1024], "n_synapses": 96, "n_neurons": 18, "n_missing_sections": 1},
    "volume": {"path": "volume.h5"},
    "annotations": [{"format": "table", "path": "synapses.csv", "columns": {"x": "x_nm", "y": "y_nm", "z": "z_nm"}}],
    "tiles": {"shards": 3},
    "encoders": ["tiny", "other"],
    "evaluation": QUICK_EVALUATION,
    "projection": None,  # UMAP takes twenty seconds to import and compile; `test_projection` tests the maps
}
# Two networks that embed a hundred tiles in about a second.
SMALL_ENCODERS = {
    "encoders": {
        "tiny": {"model": "mobilenetv4_conv_small", "weights": "random", "seed": 0, "crop_px": 64},
        "other": {"model": "resnet10t", "weights": "random", "seed": 0, "crop_px": 64, "precision": "fp32"},
    }
}


# The files that take longest, longest first. They start first, so that no process is left with a long file at the end.
LONGEST_FIRST = (
    "defs/test_schedule",
    "end_to_end/test_changes",
    "training/test_pretraining",
    "cli/test_cli",
    "defs/test_ui",
    "end_to_end/test_interrupted",
    "end_to_end/test_stateful",
    "reports/test_versions",
    "end_to_end/test_bad_input",
    "index/test_publish",
    "end_to_end/test_cluster",
    "explorer/test_pages",
    "explorer/test_site",
    "explorer/test_server",
    "analysis/test_projection",
    "end_to_end/test_faults",
    "training/test_finetuning",
    "volumes/test_sources",
    "defs/test_locks",
    "analysis/test_compare",
)
# Tests that need one of these take part in `make test` only: a data set with every asset made, or a browser.
SLOW_FIXTURES = {"made", "explored", "template", "first", "browser"}


def pytest_configure() -> None:
    """Let SIGINT interrupt this process and those that it starts.

    A shell starts its background jobs with SIGINT ignored, and child processes inherit that. Some tests send SIGINT.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {f"{name}.py": place for place, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: order.get("/".join(item.path.parts[-2:]), len(order)))
    for item in items:
        if item.path.parent.name == "end_to_end" or SLOW_FIXTURES.intersection(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def real_em() -> Path:
    """Folder with real EM data. Without it, the tests that need it are skipped."""
    folder = Path(os.environ.get("SYNPIPE_REAL_DATA") or REPOSITORY.parent / "shared" / "em")
    if not (folder / "vnc_stack1.h5").exists():
        pytest.skip(f"no real EM data in {folder}: set SYNPIPE_REAL_DATA to a folder with vnc_stack1.h5")
    return folder


def write_project(folder: Path, **changes) -> Project:
    """Write a project with the small demo to `folder`. `changes` replace keys of the data set's YAML file."""
    datasets = folder / "data" / "datasets"
    datasets.mkdir(parents=True)
    (datasets / "demo.yaml").write_text(yaml.safe_dump({**SMALL_DEMO, **changes}))
    (folder / "data" / "encoders.yaml").write_text(yaml.safe_dump(SMALL_ENCODERS))
    return project_in(folder)


def project_in(folder: Path) -> Project:
    return Project(folder / "data", folder / "store")


@pytest.fixture
def project(tmp_path: Path) -> Project:
    """A project for one test, with an empty store."""
    return write_project(tmp_path)


def made_once(tmp_path_factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """Return a folder that all test processes of this run share. The first process that needs it makes it."""
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent  # the folder of the run; each process has its own folder in it
    folder, done = root / name, root / f"{name}.done"
    with (root / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            shutil.rmtree(folder, ignore_errors=True)  # left by a failed attempt
            folder.mkdir()
            make(folder)
            done.touch()
    return folder


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """The small demo, materialised through Dagster. Shared: read it, do not change it."""

    def make(folder: Path) -> None:
        result = run_synpipe(write_project(folder), "materialize", "--dataset", "demo")
        assert result.returncode == 0, result.stderr

    return project_in(made_once(tmp_path_factory, "made", make)).dataset("demo")


@pytest.fixture(scope="session")
def explored(tmp_path_factory: pytest.TempPathFactory, made: Dataset) -> Dataset:
    """The small demo with maps. Shared: read it, do not change it."""

    def make(folder: Path) -> None:
        # With more neighbours than synapses, the map is one of principal components, which takes no time.
        project = write_project(folder, projection={"n_neighbours": 200})
        shutil.copytree(made.folder, project.store / made.name)
        make_outdated(project.dataset("demo"))

    return project_in(made_once(tmp_path_factory, "explored", make)).dataset("demo")


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> "Own":
    """A data set with files that can be edited, and everything materialised. Shared: copy it, do not change it."""
    from synpipe_tests.support import changes  # importing Dagster and LanceDB takes four seconds

    return changes.Own(made_once(tmp_path_factory, "template", changes.make))


@pytest.fixture
def own(template: "Own", tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> "Own":
    """A copy of `template` that a test may change."""
    from synpipe_tests.support import changes

    return changes.copy(template, tmp_path / "own", monkeypatch)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """`disk(kB)` mounts a small disk and returns its folder. A later call with a larger number makes it larger."""
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
    """Environment variables for a command that works on `project` with the code of this checkout."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SYNPIPE_", "DAGSTER_"))}
    return {
        **kept,
        "SYNPIPE_DATA": str(project.data),
        "SYNPIPE_STORE": str(project.store),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(REPOSITORY),  # another checkout may be the one that is installed
    }


def run_synpipe(project: Project, *arguments: str, timeout_s: float = 300) -> subprocess.CompletedProcess[str]:
    """Run the command as a user would, in its own process."""
    command = [str(Path(sys.executable).parent / "synpipe"), *arguments]
    return subprocess.run(
        command, env=environment(project), capture_output=True, text=True, timeout=timeout_s, check=False
    )


Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def synpipe(project: Project) -> Command:
    """`synpipe(...)` runs the command on the test's own project."""
    return lambda *arguments, **options: run_synpipe(project, *arguments, **options)
