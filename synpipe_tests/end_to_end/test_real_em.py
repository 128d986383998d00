"""Real EM from end to end over the command: 20 sections of a Drosophila larva's ventral nerve cord, 1,594 points."""

import json
import os
from pathlib import Path

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from synpipe.datasets import Dataset, Project
from synpipe.index.publish import open_current
from synpipe.store.files import read_table
from synpipe.tiles.tile import TileReader
from synpipe_tests.conftest import QUICK_EVALUATION, REPOSITORY, SMALL_ENCODERS
from synpipe_tests.support.command import answer, assets

N_SYNAPSES, N_POINTS = 50, 1544
VOXEL_NM_ZYX = np.array([50.0, 4.6, 4.6])
# What the label volume holds where a point of each class lies; see the README beside the data.
LABELS = {
    "synapse": {223},
    "mitochondrion": {191},
    "membrane": {0, 32, 64, 96, 128},
    "glia": {159},
    "cytoplasm": {255},
}


@pytest.fixture(scope="module")
def project(real_em: Path, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """The repository's own description of the data set, with one fast encoder, made in a store of its own."""
    folder = tmp_path_factory.mktemp("real")
    datasets = folder / "data" / "datasets"
    datasets.mkdir(parents=True)
    described = yaml.safe_load((REPOSITORY / "data" / "datasets" / "vnc_stack1.yaml").read_text())
    changes = {"encoders": ["tiny"], "projection": None, "evaluation": QUICK_EVALUATION}
    (datasets / "vnc_stack1.yaml").write_text(yaml.safe_dump(described | changes))
    (folder / "data" / "encoders.yaml").write_text(yaml.safe_dump(SMALL_ENCODERS))
    made = Project(folder / "data", folder / "store")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SYNPIPE_REAL_DATA", str(real_em.resolve()))
        before = {path.name: path.stat().st_mtime_ns for path in real_em.iterdir()}
        answer(made, "materialize", "--dataset", "vnc_stack1")
        assert {path.name: path.stat().st_mtime_ns for path in real_em.iterdir()} == before  # sources are only read
        yield made


@pytest.fixture(scope="module")
def dataset(project: Project) -> Dataset:
    return project.dataset("vnc_stack1")


@pytest.fixture(scope="module")
def raw(real_em: Path) -> np.ndarray:
    with h5py.File(real_em / "vnc_stack1.h5") as file:
        return file["volumes/raw"][:]


def voxels(synapses: pa.Table) -> np.ndarray:
    """The voxel of each position, by arithmetic of its own: int64 (n, 3), zyx."""
    positions = np.stack([synapses[column].to_numpy() for column in ("z_nm", "y_nm", "x_nm")], axis=1)
    return np.floor(positions / VOXEL_NM_ZYX + 1e-6).astype(int)


def test_every_point_has_a_tile_and_none_is_rejected(project: Project, dataset: Dataset):
    said = {
        asset: each["made"]["figures"] | {"rows": each["made"]["rows"]}
        for asset, each in assets(project, "vnc_stack1").items()
    }
    assert said["synapses"]["rows"] == said["rgb_tiles"]["rows"] == N_SYNAPSES + N_POINTS
    assert said["rejects"]["rows"] == 0
    assert said["index_tiny"]["rows"] == N_SYNAPSES + N_POINTS
    assert said["synapses"]["classes"] == {
        "synapse": 184 + N_SYNAPSES,
        "mitochondrion": 360,
        "membrane": 360,
        "glia": 280,
        "cytoplasm": 360,
    }
    ids = read_table(dataset.synapses_path, ["synapse_id"])["synapse_id"].to_numpy()
    assert ((ids < 1_000_000).sum(), (ids > 1_000_000).sum()) == (N_SYNAPSES, N_POINTS)


def test_exactly_the_tiles_that_leave_the_volume_are_padded(project: Project, dataset: Dataset, raw: np.ndarray):
    synapses, tiles = read_table(dataset.synapses_path), read_table(dataset.tiles_path)
    row_of = {each: row for row, each in enumerate(tiles["synapse_id"].to_pylist())}
    order = [row_of[each] for each in synapses["synapse_id"].to_pylist()]
    padded = tiles["pad_fraction"].to_numpy()[order] > 0
    # A voxel more or less: the window of an even size may begin half a voxel to either side.
    inside = voxels(synapses)[:, 1:]
    surely = ((inside < 126) | (inside > 1024 - 126)).any(axis=1)
    surely_not = ((inside > 130) & (inside < 1024 - 130)).all(axis=1)
    assert padded[surely].all()
    assert not padded[surely_not].any()
    assert 0.2 < padded.mean() < 0.7
    z = voxels(synapses)[:, 0]
    missing = tiles["missing_sections"].to_numpy()[order]
    np.testing.assert_array_equal(missing[z == 0] & 1, 1)  # there is no section before the first
    np.testing.assert_array_equal(missing[z == len(raw) - 1] & 4, 4)
    np.testing.assert_array_equal(missing[(z > 0) & (z < len(raw) - 1)], 0)


def test_a_tile_is_that_part_of_the_volume(dataset: Dataset, raw: np.ndarray):
    synapses, tiles = read_table(dataset.synapses_path), read_table(dataset.tiles_path)
    reader = TileReader(tiles, dataset.folder, "colour")
    whole = tiles.filter(
        pa.array((tiles["pad_fraction"].to_numpy() == 0) & (tiles["missing_sections"].to_numpy() == 0))
    )
    chosen = whole["synapse_id"].to_pylist()[:: len(whole) // 25]
    assert len(chosen) >= 25
    voxel_of = dict(zip(synapses["synapse_id"].to_pylist(), voxels(synapses), strict=True))
    for synapse_id in chosen:
        z, y, x = voxel_of[synapse_id]
        tile = reader.by_id(synapse_id)
        # The window is centred on an edge between voxels, the one nearest to the position.
        offsets = [
            (dy, dx)
            for dy in (0, 1)
            for dx in (0, 1)
            if np.array_equal(tile, raw[z - 1 : z + 2, y - 128 + dy : y + 128 + dy, x - 128 + dx : x + 128 + dx])
        ]
        assert len(offsets) == 1, synapse_id


def test_the_labelled_structure_stands_at_the_centre_of_the_tile(dataset: Dataset, real_em: Path):
    """Fails where axes are exchanged, or an offset or half a voxel goes astray."""
    with h5py.File(real_em / "vnc_stack1.h5") as file:
        structures = file["volumes/labels/structures"][:]
    tiles = read_table(dataset.tiles_path)
    stacks = read_table(dataset.stacks_path)
    start_of = {row["synapse_id"]: row for row in stacks.select(["synapse_id", "start_y", "start_x"]).to_pylist()}
    section_of = dict(zip(tiles["synapse_id"].to_pylist(), tiles["z_index"].to_pylist(), strict=True))
    points = read_table(dataset.synapses_path).filter(
        pa.array(read_table(dataset.synapses_path, ["source"])["source"].to_numpy() == "vnc_stack1_points")
    )
    assert len(points) == N_POINTS
    right: dict[str, list[bool]] = {name: [] for name in LABELS}
    transposed = []
    for point in points.to_pylist():
        start = start_of[point["synapse_id"]]
        # The four voxels around the centre of the tile: one of them is the point's.
        z, y, x = section_of[point["synapse_id"]], start["start_y"] + 128, start["start_x"] + 128
        around = structures[z, max(y - 1, 0) : y + 1, max(x - 1, 0) : x + 1]
        exchanged = structures[z, max(x - 1, 0) : x + 1, max(y - 1, 0) : y + 1]
        expected = list(LABELS[point["neurotransmitter"]])
        right[point["neurotransmitter"]].append(bool(np.isin(around, expected).any()))
        transposed.append(bool(np.isin(exchanged, expected).any()))
    share = {name: float(np.mean(found)) for name, found in right.items()}
    assert min(share.values()) > 0.99, share
    assert np.mean(transposed) < 0.5  # the test can tell


def test_neighbours_are_what_numpy_and_lancedb_find(project: Project, dataset: Dataset):
    table = pq.read_table(dataset.table_path("tiny"))
    ids, labels = table["synapse_id"].to_numpy(), np.array(table["neurotransmitter"].to_pylist())
    unit = np.stack(table["vector"].to_numpy()).astype(np.float64)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    index = open_current(dataset.lancedb_folder, "tiny")
    for query in (3, 700, 1500):
        distances = 1 - unit @ unit[query]
        # LanceDB for itself: the ten nearest of all, the query among them.
        found = index.search(unit[query].astype(np.float32)).distance_type("cosine").limit(10).to_arrow()
        np.testing.assert_allclose(found["_distance"].to_numpy(), np.sort(distances)[:10], atol=1e-5)
        assert ids[query] in found["synapse_id"].to_pylist()
        # The command: the nearest of each class.
        said = json.loads(answer(project, "search", str(ids[query]), "-d", "vnc_stack1", "-k", "5", "--json"))
        assert list(said["neighbours"]) == list(dataset.spec.classes)
        for name, neighbours in said["neighbours"].items():
            nearest = np.sort(distances[(labels == name) & (ids != ids[query])])[:5]
            np.testing.assert_allclose([each["distance"] for each in neighbours], nearest, atol=1e-5)
            rows = [int(np.flatnonzero(ids == int(each["synapse_id"]))[0]) for each in neighbours]
            assert {labels[row] for row in rows} == {name}
            np.testing.assert_allclose(distances[rows], nearest, atol=1e-5)


def test_the_description_finds_the_data_through_the_environment(dataset: Dataset, real_em: Path):
    assert os.environ["SYNPIPE_REAL_DATA"] == str(real_em.resolve())
    assert dataset.missing_sources() == []
    assert dataset.spec.volume.resolve(dataset.base) == real_em.resolve() / "vnc_stack1.h5"
