"""`synpipe dataset check`: what a data set holds, in one command; whatever is wrong with it, in one go."""

import re
import shutil
import subprocess
import sys
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
from synpipe.errors import SynpipeError
from synpipe.store.files import read_table
from synpipe.volumes import chunked as volume_chunked
from synpipe.volumes.volume import Volume, VolumeSpec
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


def test_a_volume_of_which_no_tile_can_be_cut(source: Path, tmp_path: Path) -> None:
    """One line says so, however many tiles were tried, and the exit code is 1."""
    with serving(source, always(404, lambda path: "/zarr/c/" in path)) as server:
        result = check(a_project(tmp_path, source, f"zarr://{server.url}/zarr"))
    (problem,) = problems(result)
    assert "none of 40 tiles could be cut out" in problem and "missing_chunk: 40, such as" in problem
    assert result.stdout.count("rejected as missing_chunk") == 1


def registered(project: Project, **encoders: dict[str, Any]) -> Project:
    (project.data / "encoders.yaml").write_text(yaml.safe_dump({"encoders": encoders}))
    return project


def warnings_of(result: Result) -> str:
    """All warnings in one text."""
    return result.stdout.partition("  warning ")[2]


def test_weights_that_are_not_on_this_machine(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights of the hub may still be downloaded; a file that does not exist is an error."""
    import huggingface_hub

    network = {"model": "resnet18.a1_in1k", "weights": "hub"}
    lost = {"model": "resnet18", "weights": "weights/gone.pth"}
    project = registered(a_project(tmp_path, source, encoders=["net", "net+pca32"]), net=network, lost=lost)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_args, **_options: None)
    result = check(project)
    picture_of(result)
    assert "weights of the encoder net are not on this machine" in warnings_of(result)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_args, **_options: str(source))
    assert "not on this machine" not in check(project).stdout
    project = registered(a_project(tmp_path / "lost", source, encoders=["lost"]), lost=lost)
    (problem,) = problems(check(project))
    assert f"{project.data}/weights/gone.pth of the encoder lost does not exist" in problem


@pytest.mark.parametrize(("pixel_nm", "fits"), [([4, 5], True), ([4.6, 4.6], True), ([7, 10], False), (None, True)])
def test_pixels_that_an_encoder_was_not_made_for(source: Path, tmp_path: Path, pixel_nm: Any, fits: bool) -> None:
    spec = {"model": "resnet10t", "weights": "random", "seed": 0} | ({"pixel_nm": pixel_nm} if pixel_nm else {})
    result = check(registered(a_project(tmp_path, source, encoders=["net"]), net=spec))
    picture_of(result)
    assert ("net was made for pixels of 7 to 10 nm" in warnings_of(result)) is not fits


def test_sections_that_are_too_thin_to_differ(tmp_path: Path) -> None:
    (tmp_path / "sections").mkdir()
    rng = np.random.default_rng(0)
    for number in range(20):
        Image.fromarray(rng.integers(1, 256, (300, 300), dtype=np.uint8)).save(tmp_path / f"sections/{number:03d}.png")
    write_synapses(tmp_path / "synapses.csv", rng.uniform(0, (160, 2400, 2400), (20, 3)))
    volume = {"path": str(tmp_path / "sections"), "voxel_size_nm_zyx": [8, 8, 8], "offset_nm_zyx": [0, 0, 0]}
    sources = [{"format": "table", "path": str(tmp_path / "synapses.csv")}]
    thin = {"synthetic": None, "volume": volume, "annotations": sources}
    result = check(write_project(tmp_path / "a", **thin))
    assert "Sections are 8 nm apart" in warnings_of(result) and "for example to 40" in warnings_of(result)
    for name, tiles in (("b", {"section_step_nm": 40}), ("c", {"stacking": "grey"})):
        assert "Sections are" not in check(write_project(tmp_path / name, **thin, tiles=tiles)).stdout


def write_neurons(path: Path, positions: np.ndarray, neurons: list[int], classes: list[str]) -> list[dict[str, str]]:
    """A table of labelled synapses with neurons, as the entry of a data set."""
    rows = zip(neurons, classes, positions.tolist(), strict=True)
    lines = [f"{number},{x},{y},{z},{neuron},{name}" for number, (neuron, name, (z, y, x)) in enumerate(rows)]
    path.write_text("\n".join(["synapse_id,x,y,z,neuron_id,neurotransmitter", *lines]))
    return [{"format": "table", "path": str(path)}]


def test_a_split_that_is_of_no_use(source: Path, tmp_path: Path) -> None:
    """Too few neurons of a class, most synapses in the guard, or no neuron at all."""
    rng = np.random.default_rng(0)
    positions = OFFSET_NM + rng.uniform((0, 0, 0), SHAPE, (200, 3)) * SIZE_NM
    neurons, classes = list(range(200)), ["gaba"] * 190 + ["serotonin"] * 10
    annotations = write_neurons(tmp_path / "crowded.csv", positions, neurons, classes)
    text = warnings_of(check(a_project(tmp_path / "a", source, annotations=annotations)))
    assert "fewer than 5 neurons of serotonin (2)" in text and "gaba (" not in text
    assert re.search(r"The split by neuron sets aside [5-9]\d% of its synapses as `guard`", text)
    split = {"guard": 0.001}
    text = warnings_of(check(a_project(tmp_path / "b", source, annotations=annotations, split=split)))
    assert "sets aside" not in text and "serotonin (2)" in text
    text = warnings_of(check(a_project(tmp_path / "c", source)))
    assert "None of the 27 synapses with a class has a known neuron" in text
    nothing_is_learned = {"classifier": None, "evaluation": None}
    assert "neuron" not in warnings_of(check(a_project(tmp_path / "d", source, **nothing_is_learned)))


def test_labels_that_are_no_class(source: Path, tmp_path: Path) -> None:
    """The report says how to leave labels out."""
    positions = OFFSET_NM + np.random.default_rng(0).uniform((0, 0, 0), SHAPE, (20, 3)) * SIZE_NM
    annotations = write_neurons(tmp_path / "others.csv", positions, [*range(20)], ["gaba"] * 19 + ["others"])
    result = check(a_project(tmp_path / "a", source, annotations=annotations))
    assert "unknown_neurotransmitter: 1" in result.stdout and "leave their neurotransmitter empty" in result.stdout
    labelled = [{"format": "table", "path": f"{source}/synapses.csv", "label": "others"}]
    (problem,) = problems(check(a_project(tmp_path / "b", source, annotations=labelled)))
    assert "label 'others'" in problem and "remove `label`" in problem


@pytest.mark.parametrize("inside", [False, True])
def test_a_tiff_of_many_pages(tmp_path: Path, inside: bool) -> None:
    """The error says what the file is. The command that it gives makes a volume of it."""
    (tmp_path / "em").mkdir()
    rng = np.random.default_rng(0)
    sections = rng.integers(0, 256, (5, 300, 300), dtype=np.uint8)
    pages = [Image.fromarray(section) for section in sections]
    pages[0].save(tmp_path / "em" / "stack1.tif", save_all=True, append_images=pages[1:])
    path = tmp_path / "em" / ("" if inside else "stack1.tif")
    spec = {"voxel_size_nm_zyx": (40, 4, 4), "offset_nm_zyx": (0, 0, 0)}
    with pytest.raises(SynpipeError, match=r"stack1\.tif is a stack of 5 pages") as caught:
        Volume(VolumeSpec(path=str(path), **spec), tmp_path)
    commands = re.search(r"run `(.+)`, and set `volume\.path` to (\S+)\.$", str(caught.value))
    assert commands
    command = commands[1].replace("python", sys.executable)
    subprocess.run(command, shell=True, check=True)
    with Volume(VolumeSpec(path=commands[2], **spec), tmp_path) as volume:
        np.testing.assert_array_equal(volume.reader.start_read((slice(0, 5), slice(0, 300), slice(0, 300)))(), sections)


def test_a_single_image_is_no_volume(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((9, 9), np.uint8)).save(tmp_path / "one.png")
    with pytest.raises(SynpipeError, match=r"one\.png is one image\. Put one image per section into a folder"):
        Volume(VolumeSpec(path=str(tmp_path / "one.png")), tmp_path)


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
