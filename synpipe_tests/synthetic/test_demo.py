"""The demo data set: its files have the promised content, and its pictures resemble serial-section EM."""

import csv
import hashlib
from collections import Counter, defaultdict
from pathlib import Path

import h5py
import numpy as np
import pytest
from scipy.ndimage import label, uniform_filter

from synpipe.errors import SynpipeError
from synpipe.synthetic.demo import SyntheticSpec, _make_neurons, make_demo

SMALL = SyntheticSpec(shape_zyx=(12, 1024, 1024), n_synapses=120, n_neurons=18, n_missing_sections=1)
TINY = SyntheticSpec(shape_zyx=(9, 512, 512), n_synapses=36, n_neurons=12, n_missing_sections=1)  # made in 0.5 s
TRANSMITTERS = {"acetylcholine", "gaba", "glutamate", "dopamine", "serotonin", "octopamine"}
FILES = {"volume.h5", "synapses.csv"}
N_BAD = 4


def sha256(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    make_demo(folder, SMALL)
    return folder


@pytest.fixture(scope="module")
def volume(demo: Path) -> np.ndarray:
    with h5py.File(demo / "volume.h5") as file:
        return file["volumes/raw"][:]


@pytest.fixture(scope="module")
def rows(demo: Path) -> list[dict[str, str]]:
    with open(demo / "synapses.csv", newline="") as file:
        return list(csv.DictReader(file))


def voxel(row: dict[str, str]) -> tuple[int, int, int]:
    return int(float(row["z_nm"]) // 40), int(float(row["y_nm"]) // 4), int(float(row["x_nm"]) // 4)


def blank_sections(volume: np.ndarray) -> set[int]:
    return set(np.flatnonzero(volume.mean((1, 2)) < 10))


@pytest.mark.slow
def test_same_spec_same_bytes_on_any_number_of_threads(demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    make_demo(tmp_path, SMALL)
    assert sha256(tmp_path) == sha256(demo)


def test_another_seed_gives_another_data_set(demo: Path, tmp_path: Path):
    make_demo(tmp_path, SMALL.model_copy(update={"seed": 1}))
    other, first = sha256(tmp_path), sha256(demo)
    assert all(other[name] != first[name] for name in FILES)


def test_a_complete_demo_is_kept_and_a_damaged_one_is_generated_again(tmp_path: Path):
    make_demo(tmp_path, TINY)
    written = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    expected = sha256(tmp_path)
    messages: list[str] = []
    make_demo(tmp_path, TINY, messages.append)
    assert messages == []
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == written
    (tmp_path / "synapses.csv").write_text("synapse_id\n")
    make_demo(tmp_path, TINY, messages.append)
    assert sha256(tmp_path) == expected
    assert messages == [  # after every eighth section and after the last one
        "synthetic tissue: growing neurites",
        "synthetic tissue: membranes of section 8 of 9",
        "synthetic tissue: membranes of section 9 of 9",
        "synthetic volume: section 8 of 9",
        "synthetic volume: section 9 of 9",
    ]


@pytest.mark.parametrize("when", ["membranes of section 8", "volume: section 8", "volume: section 9"])
def test_an_interrupted_run_leaves_no_files(tmp_path: Path, when: str):
    def stop(message: str) -> None:
        if when in message:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_demo(tmp_path, TINY, stop)
    assert list(tmp_path.iterdir()) == []


def test_a_volume_that_is_too_small_is_an_error(tmp_path: Path):
    with pytest.raises(SynpipeError, match="lower n_synapses or enlarge shape_zyx"):
        make_demo(tmp_path, SyntheticSpec(shape_zyx=(8, 512, 512), n_synapses=500, n_neurons=12))
    with pytest.raises(SynpipeError, match="three times n_neurons"):
        SyntheticSpec.parse({"n_synapses": 30, "n_neurons": 20}, "demo.yaml")


def test_cremi_layout(demo: Path, rows: list[dict[str, str]]):
    with h5py.File(demo / "volume.h5") as file:
        raw = file["volumes/raw"]
        assert raw.shape == SMALL.shape_zyx and raw.dtype == np.uint8 and raw.compression is None
        np.testing.assert_array_equal(raw.attrs["resolution"], (40, 4, 4))
        np.testing.assert_array_equal(raw.attrs["offset"], (0, 0, 0))
        assert file.attrs["synthetic"] and file.attrs["title"] == "synthetic demo data, not a brain"
        assert {"seed", "spec_digest", "synpipe_version"} <= set(file.attrs)
        ids, locations = file["annotations/ids"][:], file["annotations/locations"][:]
        types, partners = file["annotations/types"].asstr()[:], file["annotations/presynaptic_site/partners"][:]
    presynaptic = types == "presynaptic_site"
    good = rows[:-N_BAD]
    assert ids[presynaptic].tolist() == [int(row["synapse_id"]) for row in good]
    table_nm = [[float(row[axis]) for axis in ("z_nm", "y_nm", "x_nm")] for row in good]
    np.testing.assert_allclose(locations[presynaptic], table_nm, atol=0.006)
    assert len(set(ids)) == len(ids)
    assert set(partners[:, 0]) <= set(ids[presynaptic]) and set(partners[:, 1]) == set(ids[~presynaptic])


def test_good_rows(rows: list[dict[str, str]]):
    good = rows[:-N_BAD]
    assert len(good) == SMALL.n_synapses
    assert len({row["synapse_id"] for row in good}) == len(good)
    extent = np.array(SMALL.shape_zyx)
    assert all((np.array(voxel(row)) >= 0).all() and (np.array(voxel(row)) < extent).all() for row in good)
    of_neuron, of_hemilineage = defaultdict(set), defaultdict(set)
    for row in good:
        of_neuron[row["neuron_id"]].add(row["neurotransmitter"])
        of_hemilineage[row["hemilineage"]].add(row["neurotransmitter"])
    assert len(of_neuron) <= SMALL.n_neurons
    assert all(len(known) == 1 for known in [*of_neuron.values(), *of_hemilineage.values()])
    assert {row["neurotransmitter"] for row in good} == TRANSMITTERS | {""}
    assert all("synthetic" in row["region"] for row in good)


def test_the_table_ends_with_four_bad_rows(rows: list[dict[str, str]]):
    good, (duplicate, incomplete, outside, misspelt) = rows[:-N_BAD], rows[-N_BAD:]
    assert duplicate["synapse_id"] in {row["synapse_id"] for row in good}
    assert incomplete["z_nm"] == ""
    assert float(outside["x_nm"]) > SMALL.shape_zyx[2] * 4
    assert misspelt["neurotransmitter"] == "acetylcholin"


def test_the_default_is_large_enough_for_six_classes():
    neurons = _make_neurons(SyntheticSpec(), np.random.default_rng(0))
    synapses: Counter[str] = Counter()
    for neuron in neurons:
        if neuron.transmitter:
            synapses[neuron.transmitter] += neuron.n_synapses
    per_class = Counter(neuron.transmitter for neuron in neurons if neuron.transmitter)
    assert set(synapses) == TRANSMITTERS
    assert sum(synapses.values()) >= 1200 and min(synapses.values()) >= 80 and min(per_class.values()) >= 5


def test_neighbouring_sections_are_as_similar_as_real_ones(volume: np.ndarray):
    blank = blank_sections(volume)
    assert len(blank) == SMALL.n_missing_sections
    pairs = [z for z in range(len(volume) - 1) if not {z, z + 1} & blank]
    similarity = np.array(
        [np.corrcoef(volume[z, ::2, ::2].ravel(), volume[z + 1, ::2, ::2].ravel())[0, 1] for z in pairs]
    )
    repeated = similarity > 0.999
    assert repeated.sum() == 1
    # In real ssTEM of the larval nerve cord, neighbours 50 nm apart correlate by 0.26 to 0.38.
    assert 0.22 < np.median(similarity[~repeated]) < 0.45


def test_synapses_are_dark_spots(volume: np.ndarray, rows: list[dict[str, str]]):
    def darkness(z: int, y: int, x: int) -> float:
        return float(volume[z, y - 8 : y + 8, x - 8 : x + 8].mean())

    places = [voxel(row) for row in rows[:-N_BAD]]
    at_synapses = [darkness(*p) for p in places if min(p[1:]) >= 8 and max(p[1:]) < 1016]
    rng = np.random.default_rng(0)
    sections = sorted({p[0] for p in places})
    elsewhere = [darkness(rng.choice(sections), *rng.integers(8, 1016, 2)) for _ in range(500)]
    # In real ssTEM of that nerve cord, synapses have a mean of 39 and their surroundings of 121.
    assert np.mean(at_synapses) < 70 < 100 < np.mean(elsewhere)
    assert np.mean(at_synapses) < np.percentile(elsewhere, 15)


def test_amines_show_dense_cores(demo: Path, volume: np.ndarray, rows: list[dict[str, str]]):
    """A core is a dark disc of about 45 nm in the terminal, darker than every point of a ring of 56 nm around it."""
    with h5py.File(demo / "volume.h5") as file:
        position_of = dict(zip(file["annotations/ids"][:].tolist(), file["annotations/locations"][:], strict=True))
        partners = file["annotations/presynaptic_site/partners"][:].tolist()
    postsynaptic = defaultdict(list)
    for synapse, partner in partners:
        postsynaptic[synapse].append(position_of[partner])
    ring = [(round(14 * np.sin(a)), round(14 * np.cos(a))) for a in np.linspace(0, 2 * np.pi, 16, endpoint=False)]

    def cores(synapse: int) -> int:
        inward = position_of[synapse] - np.mean(postsynaptic[synapse], axis=0)
        inward[0] = 0
        z, y, x = ((position_of[synapse] + 180 * inward / np.linalg.norm(inward)) / (40, 4, 4)).astype(int)
        picture = np.pad(volume[z].astype(float), 70, mode="edge")[y : y + 140, x : x + 140]
        disc, fine = uniform_filter(picture, 9), uniform_filter(picture, 5)
        around = np.min([np.roll(fine, step, (0, 1)) for step in ring], axis=0)
        return label((around - disc > 45)[30:110, 30:110])[1]

    cores_of = defaultdict(list)
    for row in rows[:-N_BAD]:
        cores_of[row["neurotransmitter"]].append(cores(int(row["synapse_id"])))
    large = np.mean(cores_of["serotonin"] + cores_of["octopamine"])
    clear = np.mean(cores_of["acetylcholine"] + cores_of["gaba"] + cores_of["glutamate"])
    assert large > 2 * clear
