"""`synpipe dataset check`: what a data set holds, in one command; whatever is wrong with it, in one go."""

import re
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from click.testing import Result
from PIL import Image

from synpipe.assets.manifest import read_manifest
from synpipe.datasets import Dataset, Project
from synpipe.store.files import read_table
from synpipe.volumes import chunked as volume_chunked
from synpipe_tests.conftest import REPOSITORY, project_of, write_project
from synpipe_tests.support.command import files, invoke
from synpipe_tests.support.fault_server import always, serving
from synpipe_tests.volumes.test_sources import OFFSET_NM, SIZE_NM, write_precomputed, write_zarr3

SHAPE = (6, 400, 420)


def check(project: Project, which: str | Path = "demo", *options: str) -> Result:
    return invoke(project, "dataset", "check", str(which), *options)


def problems(result: Result) -> list[str]:
    """A paragraph each."""
    assert result.exit_code == 1, result.stdout
    found = result.stderr.splitlines()
    assert found and all(line.startswith("Error: ") for line in found), result.stderr
    return found


def picture_of(result: Result) -> tuple[int, int]:
    """Width and height of the contact sheet that it names."""
    assert result.exit_code == 0, result.stderr
    path = re.search(r"^  picture +(.+)$", result.stdout, re.MULTILINE)
    assert path, result.stdout
    with Image.open(path[1]) as image:
        assert np.asarray(image).std() > 20
        return image.size


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two volumes of noise, and 40 synapses in nm."""
    folder, rng = tmp_path_factory.mktemp("source"), np.random.default_rng(0)
    grey = rng.integers(1, 256, SHAPE, dtype=np.uint8)
    write_precomputed(folder / "volume", grey)
    write_zarr3(folder / "zarr", grey)
    write_synapses(folder / "synapses.csv", OFFSET_NM + rng.uniform((0, 0, 0), SHAPE, (40, 3)) * SIZE_NM)
    return folder


def write_synapses(path: Path, positions: np.ndarray, first: int = 1) -> None:
    rows = [
        f"{number},{x},{y},{z},{('gaba', 'serotonin', '')[number % 3]}"
        for number, (z, y, x) in enumerate(positions.tolist(), start=first)
    ]
    path.write_text("\n".join(["synapse_id,x,y,z,neurotransmitter", *rows]))


def a_project(folder: Path, source: Path, volume: str = "", annotations: Any = None, **changes: Any) -> Project:
    return write_project(
        folder,
        synthetic=None,
        volume={"path": volume or f"precomputed://{source}/volume"},
        annotations=annotations or [{"format": "table", "path": f"{source}/synapses.csv"}],
        **changes,
    )


# What there is


def test_the_demo(made: Dataset, tmp_path: Path) -> None:
    """The figures are those of the assets; nothing changes in the store but for the picture."""
    before = files(made.folder)
    result = check(project_of(made), "demo", "--picture", str(tmp_path / "sheet.png"))
    assert picture_of(result) > (700, 500)  # eight tiles of each of six classes
    assert files(made.folder) == before
    manifest = read_manifest(made, "synapses")
    counts = manifest.figures
    assert f"annotations  {manifest.rows} usable, {counts['rejects']} rejected" in result.stdout
    for name, count in counts["classes"].items():
        assert f"{name}: {count} synapses" in result.stdout
    for reason in set(read_table(made.synapse_rejects_path)["reason"].to_pylist()):
        assert f"rejected as {reason}: " in result.stdout
    assert f"{manifest.rows} tiles of 196,608 bytes" in result.stdout
    assert "12 × 1,024 × 1,024 voxels" in result.stdout and "40 × 4 × 4 nm" in result.stdout


def test_the_demo_before_it_is_made(project: Project) -> None:
    (problem,) = problems(check(project))
    assert "synpipe materialize --dataset demo --select volume" in problem
    assert not project.store.exists()


def test_real_em_from_a_yaml_file_anywhere(real_em: Path, tmp_path: Path) -> None:
    """Relative paths start at the folder of that file."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "em").symlink_to(real_em)
    text = (REPOSITORY / "data/datasets/vnc_stack1.yaml").read_text()
    text = re.sub(r"\$\{SYNPIPE_REAL_DATA:-[^}]*\}", "../em", text)
    (tmp_path / "mine" / "larva.yaml").write_text(text)
    project = Project(REPOSITORY / "data", tmp_path / "store")
    result = check(project, tmp_path / "mine" / "larva.yaml")
    assert picture_of(result) > (900, 500)
    assert (tmp_path / "store" / "larva" / "check.png").exists()
    assert "larva: ssTEM" in result.stdout and "larva" not in project.dataset_names()
    for words in (
        "20 × 1,024 × 1,024 voxels z y x, uint8",
        "voxel size 50 × 4.6 × 4.6 nm",
        "bounds z 0 – 1,000, y 0 – 4,710.4, x 0 – 4,710.4 nm",
        "1,594 usable, 0 rejected (0.00%); 100.00% are not outside the volume",
        "glia: 280 synapses",
        "1,594 tiles of 196,608 bytes, 0.31 GB",
    ):
        assert words in result.stdout


def test_over_http(source: Path, tmp_path: Path) -> None:
    """Each chunk is fetched once at most; unlabelled synapses have their row in the picture."""
    with serving(source) as server:
        result = check(a_project(tmp_path, source, f"precomputed://{server.url}/volume"))
    assert picture_of(result)[1] > 3 * 100
    for words in (
        f"{server.url}/volume (precomputed, scale 4.6_4.6_50)",
        "read in chunks of 4 × 64 × 64",
        "offset 100, -46, 9.2 nm",
        "40 of 40 from everywhere could be cut out",
        "unlabelled: 13 synapses",
    ):
        assert words in result.stdout, result.stdout
    assert max(count for path, count in server.requests.items() if not path.endswith("info")) == 1


def test_few_tiles_of_many_synapses(source: Path, tmp_path: Path) -> None:
    """What is read of the volume does not grow with the annotations: here, a spot of it, and some tiles elsewhere."""
    rng = np.random.default_rng(1)
    positions = OFFSET_NM + rng.uniform((0, 0, 0), SHAPE, (20_000, 3)) * SIZE_NM
    write_synapses(tmp_path / "many.csv", positions)
    result = check(a_project(tmp_path, source, annotations=[{"format": "table", "path": f"{tmp_path}/many.csv"}]))
    picture_of(result)
    assert "48 of 48 from everywhere" in result.stdout and "tiles/s of 64 neighbours" in result.stdout
    assert "20,000 tiles of 196,608 bytes, 3.93 GB" in result.stdout


# What is wrong


def test_all_that_is_wrong_is_said_at_once(source: Path, tmp_path: Path) -> None:
    """The volume and each of the annotation files; nothing is written."""
    (tmp_path / "points.csv").write_text("synapse_id,x,y\n1,2,3\n")
    annotations = [{"format": "table", "path": str(tmp_path / name)} for name in ("absent.csv", "points.csv")]
    annotations.append({"format": "table", "path": f"{source}/synapses.csv"})
    project = a_project(tmp_path, source, f"n5://{tmp_path}/nothing", annotations)
    volume, absent, incomplete = problems(check(project))
    assert f"{tmp_path}/nothing" in volume and "does not exist" in volume
    assert "absent.csv" in absent and "points.csv" in incomplete and "z" in incomplete
    assert not project.store.exists()


def test_a_good_volume_is_described_though_the_annotations_are_bad(source: Path, tmp_path: Path) -> None:
    project = a_project(tmp_path, source, annotations=[{"format": "table", "path": f"{tmp_path}/absent.csv"}])
    result = check(project)
    assert len(problems(result)) == 1 and "voxel size 50 × 4.6 × 4.6 nm" in result.stdout


def test_good_annotations_are_counted_though_the_volume_is_bad(source: Path, tmp_path: Path) -> None:
    with serving(source, always(403, bool)) as server:
        result = check(a_project(tmp_path, source, f"precomputed://{server.url}/volume"))
    (problem,) = problems(result)
    assert "403" in problem and "gaba: 13 synapses" in result.stdout


def test_synapses_in_another_place(source: Path, tmp_path: Path) -> None:
    write_synapses(tmp_path / "far.csv", np.random.default_rng(0).uniform(1e6, 2e6, (100, 3)))
    result = check(a_project(tmp_path, source, annotations=[{"format": "table", "path": f"{tmp_path}/far.csv"}]))
    (problem,) = problems(result)
    assert "only 0 of 100 positions" in problem and "voxel size 50 × 4.6 × 4.6 nm" in result.stdout


@pytest.mark.parametrize(("allowed", "fine"), [(0.09, False), (0.1, True)])
def test_more_rejects_than_are_allowed(source: Path, tmp_path: Path, allowed: float, fine: bool) -> None:
    good = OFFSET_NM + np.random.default_rng(0).uniform((0, 0, 0), SHAPE, (18, 3)) * SIZE_NM
    write_synapses(tmp_path / "some.csv", np.concatenate([good, np.full((2, 3), np.nan)]))
    annotations = [{"format": "table", "path": f"{tmp_path}/some.csv"}]
    result = check(a_project(tmp_path, source, annotations=annotations, max_reject_share=allowed))
    if fine:
        picture_of(result)
        assert "18 usable, 2 rejected (10.00%); 100.00% are not outside" in result.stdout
    else:
        (problem,) = problems(result)
        assert "10.00%" in problem and "missing_coordinate: 2" in problem and "max_reject_share" in problem


def test_a_chunk_that_cannot_be_read(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(volume_chunked, "RETRIES", {"max_retries": 1, "initial_delay": "5ms", "max_delay": "5ms"})
    with serving(source, always(503, lambda path: "/zarr/c/0/3/3" in path)) as server:
        result = check(a_project(tmp_path, source, f"zarr://{server.url}/zarr"))
    (problem,) = problems(result)
    assert "503" in problem and "40 usable" in result.stdout
    with serving(source, always(404, lambda path: "/zarr/c/0/3/3" in path)) as server:
        result = check(a_project(tmp_path / "missing", source, f"zarr://{server.url}/zarr"))
    picture_of(result)  # irregular volumes lack chunks: these synapses are rejected, and the others have their tiles
    assert "rejected as missing_chunk" in result.stdout


def test_a_recipe_that_does_not_fit_the_volume(source: Path, tmp_path: Path) -> None:
    (problem,) = problems(check(a_project(tmp_path, source, tiles={"section_step_nm": 35})))
    assert "section_step_nm" in problem


def test_too_little_space(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: namedtuple("Usage", "free")(40 * 196_608 - 1))
    (problem,) = problems(check(a_project(tmp_path, source)))
    assert "0.0 GB" in problem and "--store" in problem


def test_files_and_names_that_are_none(project: Project, tmp_path: Path) -> None:
    for name, content in (("empty", ""), ("wrong", "title: 1\ncolour: red\n"), ("Bad-Name", "title: x\n")):
        (tmp_path / f"{name}.yaml").write_text(content)
        (problem,) = problems(check(project, tmp_path / f"{name}.yaml"))
        assert name in problem
    for which in ("nothing", "../demo", "absent.yaml", f"{tmp_path}/absent.yaml"):
        (problem,) = problems(check(project, which))
        assert Path(which).stem in problem
    content = yaml.safe_load((project.data / "datasets" / "demo.yaml").read_text())
    (tmp_path / "other.yaml").write_text(yaml.safe_dump({**content, "encoders": ["unknown"]}))
    (problem,) = problems(check(project, tmp_path / "other.yaml"))
    assert "unknown" in problem
