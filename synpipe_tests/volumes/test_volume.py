"""Volumes: positions in nm become windows without bias, and wrong files are refused with one sentence."""

import os
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from synpipe.errors import SynpipeError
from synpipe.volumes.volume import MissingChunk, Volume, VolumeSpec

RESOLUTION = (50.0, 4.6, 4.6)
OFFSET = (100.0, -46.0, 9.2)
SHAPE = (7, 40, 30)
STEADY = settings(deadline=None, derandomize=True)

# Voxel sizes from publications; 4.6 and 3.8 nm have no exact binary form.
voxel_sizes = st.sampled_from([1.0, 3.8, 4.0, 4.6, 8.0, 10.0, 35.0, 50.0])
offsets = st.sampled_from([0.0, -46.0, 9.2, 1234.5, 400_000.0])
odd_sizes = st.integers(0, 300).map(lambda half: 2 * half + 1)
even_sizes = st.integers(1, 300).map(lambda half: 2 * half)
voxels = st.integers(-1000, 250_000)


def write_volume(path: Path, data: np.ndarray | None = None, dataset: str = "volumes/raw", **attributes: Any) -> Path:
    """A volume of random grey values in CREMI layout. An attribute that is None is not written."""
    if data is None:
        data = np.random.default_rng(0).integers(1, 256, SHAPE, dtype=np.uint8)
    with h5py.File(path, "w") as file:
        written = file.create_dataset(dataset, data=data, chunks=(1, *data.shape[1:]), compression="gzip")
        for name, value in {"resolution": RESOLUTION, "offset": OFFSET, **attributes}.items():
            if value is not None:
                written.attrs[name] = value
    return path


def open_volume(path: Path, **spec: Any) -> Volume:
    return Volume(VolumeSpec.parse({"path": path.name, **spec}, "test"), path.parent)


def refusal(path: Path, **spec: Any) -> str:
    """The error message for a refused volume: one paragraph that names the file."""
    with pytest.raises(SynpipeError) as caught:
        open_volume(path, **spec).read(np.zeros(3), np.array(SHAPE))
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    return message


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_volume(tmp_path_factory.mktemp("volume") / "volume.h5")


class Axes(Volume):
    """A volume without a file: it has only the voxel size and the offset that `window_starts` needs."""

    def __init__(self, size_nm: float, offset_nm: float):
        self.voxel_size_nm_zyx, self.offset_nm_zyx = np.full(3, size_nm), np.full(3, offset_nm)

    def starts(self, positions_nm: np.ndarray, size: int) -> np.ndarray:
        starts = self.window_starts(np.repeat(np.atleast_1d(positions_nm)[:, None], 3, axis=1), (size, size, size))
        assert (starts == starts[:, :1]).all()  # the axes are independent
        return starts[:, 0]


@STEADY
@given(voxel_sizes, offsets, odd_sizes, voxels, st.floats(0, 1, exclude_max=True).filter(lambda part: part < 1 - 1e-5))
@example(4.6, 0.0, 3, 3, 0.0)  # 3 × 4.6 = 13.799999999999999
@example(4.6, 9.2, 3, 249_999, 0.0)
def test_odd_window_has_the_voxel_with_the_position_in_its_middle(size_nm, offset_nm, size, voxel, part):
    start = Axes(size_nm, offset_nm).starts(offset_nm + (voxel + part) * size_nm, size)[0]
    assert start + size // 2 == voxel


@STEADY
@given(voxel_sizes, offsets, odd_sizes, voxels)
def test_a_decimal_on_the_edge_between_two_voxels_belongs_to_the_upper_one(size_nm, offset_nm, size, voxel):
    # The same edge as people write it, with three decimals.
    written = float(f"{offset_nm + voxel * size_nm:.3f}")
    assert Axes(size_nm, offset_nm).starts(written, size)[0] + size // 2 == voxel


@STEADY
@given(voxel_sizes, offsets, even_sizes, st.floats(-1000, 250_000))
def test_even_window_is_centred_within_half_a_voxel(size_nm, offset_nm, size, position):
    start = Axes(size_nm, offset_nm).starts(offset_nm + position * size_nm, size)[0]
    assert abs(start + size / 2 - position) <= 0.5 + 2e-6


@pytest.mark.parametrize("size", [1, 2, 3, 256])
def test_windows_have_no_bias_over_all_positions_in_a_voxel(size: int) -> None:
    positions = (np.arange(10_000) + 0.5) / 1000  # evenly over ten voxels
    starts = Axes(4.6, 0.0).starts(positions * 4.6, size)
    assert abs((starts + size / 2 - positions).mean()) < 1e-6


@STEADY
@given(voxel_sizes, offsets, st.integers(1, 300), st.floats(0, 100), st.integers(-1000, 200_000))
def test_windows_move_with_whole_voxels(size_nm, offset_nm, size, position, shift):
    position = round(position, 3) + 0.0005  # not on an edge, where rounding would decide
    here = Axes(size_nm, offset_nm).starts(offset_nm + position * size_nm, size)
    there = Axes(size_nm, offset_nm).starts(offset_nm + (position + shift) * size_nm, size)
    assert there - here == shift


def test_windows_of_a_file_follow_its_offset_and_voxel_size(path: Path) -> None:
    with open_volume(path) as volume:
        position = np.array([[100 + 3.5 * 50, -46 + 20.5 * 4.6, 9.2 + 10.5 * 4.6]])  # the middle of voxel 3, 20, 10
        assert volume.window_starts(position, (3, 5, 7)).tolist() == [[2, 18, 7]]
        lower, upper = volume.bounds_nm_zyx
        np.testing.assert_allclose(lower, [100, -46, 9.2])
        np.testing.assert_allclose(upper, [450, 138, 147.2])
        assert volume.window_starts(np.zeros((0, 3)), (3, 5, 7)).shape == (0, 3)


def test_reads_the_requested_voxels(path: Path) -> None:
    expected = np.random.default_rng(0).integers(1, 256, SHAPE, dtype=np.uint8)
    with open_volume(path) as volume:
        assert volume.shape_zyx.tolist() == list(SHAPE)
        found = volume.read(np.array([1, 2, 3]), np.array([4, 20, 30]))
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, expected[1:4, 2:20, 3:30])


def test_absent_file(tmp_path: Path) -> None:
    assert "does not exist" in refusal(tmp_path / "none.h5")


def test_truncated_file(tmp_path: Path, path: Path) -> None:
    whole = path.read_bytes()
    for length in range(0, len(whole), 101):
        short = tmp_path / "short.h5"
        short.write_bytes(whole[:length])
        assert "copy it again" in refusal(short)


@pytest.mark.slow
def test_a_damaged_byte_is_refused_or_does_no_harm(tmp_path: Path, path: Path) -> None:
    """Whatever byte is wrong, h5py's own errors never reach the user."""
    whole = path.read_bytes()
    damaged, refused = tmp_path / "damaged.h5", 0
    for place in range(0, len(whole), 13):
        content = bytearray(whole)
        content[place] ^= 0x55
        damaged.write_bytes(content)
        try:
            with open_volume(damaged) as volume:
                volume.read(np.zeros(3), volume.shape_zyx)
        except SynpipeError as error:
            assert str(damaged) in str(error) and "\n" not in str(error)
            refused += 1
    assert refused > 10


def test_folders_and_other_files_are_not_volumes(tmp_path: Path) -> None:
    (tmp_path / "folder.h5").mkdir()
    assert "not an HDF5 file" in refusal(tmp_path / "folder.h5")
    (tmp_path / "text.h5").write_text("id,x,y,z\n" * 1000)
    assert "not an HDF5 file" in refusal(tmp_path / "text.h5")


def test_a_missing_data_set_names_the_existing_ones(tmp_path: Path) -> None:
    path = write_volume(tmp_path / "volume.h5", dataset="em/grey")
    message = refusal(path)
    assert "`volumes/raw`" in message and "em/grey" in message
    assert "em/grey" in refusal(path, dataset="em")  # a group
    with open_volume(path, dataset="em/grey") as volume:
        assert volume.shape_zyx.tolist() == list(SHAPE)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (np.zeros(SHAPE, np.uint16), "holds uint16"),
        (np.zeros(SHAPE, np.float32), "holds float32"),
        (np.zeros((7, 40), np.uint8), "(7, 40)"),
        (np.zeros((7, 40, 30, 3), np.uint8), "(7, 40, 30, 3)"),
    ],
)
def test_only_sections_of_grey_values_are_volumes(tmp_path: Path, data: np.ndarray, words: str) -> None:
    assert words in refusal(write_volume(tmp_path / "volume.h5", data))


def test_empty_volumes(tmp_path: Path) -> None:
    path = tmp_path / "volume.h5"
    for empty in (h5py.Empty("u1"), np.zeros((0, 40, 30), np.uint8)):
        with h5py.File(path, "w") as file:
            file.create_dataset("volumes/raw", data=empty)
        assert "has shape" in refusal(path)


def link_to_a_file(file: h5py.File, other: str) -> None:
    file["volumes/raw"] = h5py.ExternalLink(other, "volumes/raw")


def link_to_a_group_of_a_file(file: h5py.File, other: str) -> None:
    file["em"] = h5py.ExternalLink(other, "volumes")
    file["volumes"] = h5py.SoftLink("/em")


def virtual_data_set(file: h5py.File, other: str) -> None:
    layout = h5py.VirtualLayout(SHAPE, np.uint8)
    layout[:] = h5py.VirtualSource(other, "volumes/raw", SHAPE)
    file.create_virtual_dataset("volumes/raw", layout)
    file["volumes/raw"].attrs["resolution"] = RESOLUTION


def values_in_a_raw_file(file: h5py.File, other: str) -> None:
    file.create_dataset("volumes/raw", SHAPE, np.uint8, external=[(other, 0, h5py.h5f.UNLIMITED)])
    file["volumes/raw"].attrs["resolution"] = RESOLUTION


@pytest.mark.parametrize("is_there", [True, False])
@pytest.mark.parametrize("write", [link_to_a_file, link_to_a_group_of_a_file, virtual_data_set, values_in_a_raw_file])
def test_voxels_of_another_file_are_refused(tmp_path: Path, write, is_there: bool) -> None:
    """A change of the other file would go unnoticed. If it is gone, HDF5 reads a virtual data set as black."""
    other, path = tmp_path / "other.h5", tmp_path / "volume.h5"
    if is_there:
        write_volume(other)
    with h5py.File(path, "w") as file:
        write(file, str(other))
    message = refusal(path)
    assert str(other) in message and "would not notice" in message


def test_soft_links_within_the_file_are_followed(tmp_path: Path) -> None:
    path = write_volume(tmp_path / "volume.h5", dataset="em/grey")
    with h5py.File(path, "r+") as file:
        file["volumes/raw"] = h5py.SoftLink("/em/./grey")
        file["loop"] = h5py.SoftLink("/loop")
    with open_volume(path) as volume:
        assert volume.shape_zyx.tolist() == list(SHAPE)
    assert "too many links" in refusal(path, dataset="loop")


CHUNK = (1, 16, 16)
STORAGE: dict[str, dict[str, Any]] = {
    "gzipped": {"chunks": CHUNK, "compression": "gzip"},
    "shuffled": {"chunks": CHUNK, "compression": "gzip", "shuffle": True},
    "uncompressed": {"chunks": CHUNK},
    "contiguous": {},
}


@pytest.mark.parametrize("storage", STORAGE)
def test_voxels_that_were_never_written_are_a_missing_chunk_and_not_black(tmp_path: Path, storage: str) -> None:
    """Written voxels beside them are read, also if they are black."""
    path, chunked = tmp_path / "volume.h5", storage != "contiguous"
    with h5py.File(path, "w") as file:
        data = file.create_dataset("volumes/raw", SHAPE, np.uint8, **STORAGE[storage])
        data.attrs["resolution"] = RESOLUTION
        if chunked:
            data[:, :, :16] = 0
    with open_volume(path) as volume:
        with pytest.raises(MissingChunk, match=r"holds nothing at voxels z 2–5.* never written"):
            volume.read(np.array([2, 0, 10]), np.array([5, 20, 20]))
        if chunked:
            assert not volume.read(np.zeros(3), np.array([7, 40, 16])).any()
        unwritten = volume.fingerprint()
    with h5py.File(path, "r+") as file:
        file["volumes/raw"][:] = 0
    with open_volume(path) as volume:
        assert not volume.read(np.zeros(3), np.array(SHAPE)).any()
        assert "never_written" not in volume.reader.identity()
        assert volume.fingerprint() != unwritten


def test_voxel_size_comes_from_the_spec_where_the_file_has_none(tmp_path: Path) -> None:
    path = write_volume(tmp_path / "volume.h5", resolution=None, offset=None)
    assert "volume.voxel_size_nm_zyx" in refusal(path)
    with open_volume(path, voxel_size_nm_zyx=[40, 4, 4]) as volume:
        assert volume.voxel_size_nm_zyx.tolist() == [40, 4, 4]
        assert volume.offset_nm_zyx.tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("voxel_size_nm_zyx", [4.6, 4.6, 50]),  # x, y, z: the most common mistake
        ("voxel_size_nm_zyx", [50, 4.6, 4.60002]),  # shifts voxel 250,000 to another one
        ("offset_nm_zyx", [0, 0, 0]),
        ("offset_nm_zyx", [100, -46, 9.3]),
    ],
)
def test_a_spec_that_contradicts_the_file_is_refused(path: Path, key: str, value: list[float]) -> None:
    message = refusal(path, **{key: value})
    assert key in message and str(value[2]) in message


def test_a_large_offset_must_agree_to_less_than_a_voxel(tmp_path: Path) -> None:
    path = write_volume(tmp_path / "volume.h5", offset=(280_000.0, 500_000.0, 900_000.0))
    assert "offset_nm_zyx" in refusal(path, offset_nm_zyx=[280_000, 500_000, 900_004])


def test_a_spec_that_agrees_with_a_float32_attribute_is_accepted(tmp_path: Path) -> None:
    path = write_volume(tmp_path / "volume.h5", resolution=np.array(RESOLUTION, np.float32))
    with open_volume(path, voxel_size_nm_zyx=RESOLUTION, offset_nm_zyx=OFFSET) as volume:
        assert volume.voxel_size_nm_zyx.tolist() == list(RESOLUTION)


@pytest.mark.parametrize(
    "resolution", [(0.0, 4.0, 4.0), (-40.0, 4.0, 4.0), (np.nan, 4.0, 4.0), (np.inf, 4.0, 4.0), 4.0, (4.0, 4.0), "4 nm"]
)
def test_an_impossible_voxel_size_is_refused(tmp_path: Path, resolution: Any) -> None:
    message = refusal(write_volume(tmp_path / "volume.h5", resolution=resolution))
    assert "voxel" in message
    with pytest.raises(SynpipeError, match="offset_nm_zyx"):
        open_volume(write_volume(tmp_path / "volume.h5", offset=(np.nan, 0, 0)))


def test_spec_refuses_numbers_that_are_not_finite() -> None:
    with pytest.raises(SynpipeError, match=r"voxel_size_nm_zyx\.1"):
        VolumeSpec.parse({"path": "volume.h5", "voxel_size_nm_zyx": [40, float("nan"), 4]}, "demo.yaml")


def test_fingerprint_follows_the_content_and_not_the_clock(tmp_path: Path) -> None:
    path = write_volume(tmp_path / "volume.h5")
    with open_volume(path) as volume:
        before = volume.fingerprint()
    os.utime(path, ns=(10**18, 10**18))
    copy = tmp_path / "elsewhere.h5"
    copy.write_bytes(path.read_bytes())
    for same in (path, copy):
        with open_volume(same) as volume:
            assert volume.fingerprint() == before

    times = path.stat()
    data = np.random.default_rng(0).integers(1, 256, SHAPE, dtype=np.uint8)
    with h5py.File(path, "r+") as file:
        file["volumes/raw"][3, 20, 10] = data[3, 20, 10] ^ 1
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))  # like `cp -p` and rsync
    with open_volume(path) as volume:
        assert volume.fingerprint() != before


def test_fingerprint_follows_the_place_of_the_voxels(tmp_path: Path) -> None:
    path = write_volume(tmp_path / "volume.h5", resolution=None, offset=None)
    specs = [
        {"voxel_size_nm_zyx": RESOLUTION},
        {"voxel_size_nm_zyx": (50.0, 4.0, 4.0)},
        {"voxel_size_nm_zyx": RESOLUTION, "offset_nm_zyx": (0.0, 0.0, 4.6)},
    ]
    found = [open_volume(path, **spec).fingerprint() for spec in specs]
    assert len(set(found)) == 3
    assert open_volume(path, voxel_size_nm_zyx=RESOLUTION, dataset="/volumes/raw").fingerprint() == found[0]


def test_real_synapses_stand_in_the_middle_of_their_windows(real_em: Path) -> None:
    """The middle voxel of a synapse's window has the label that annotators gave to the synapse."""
    path = real_em / "vnc_stack1.h5"
    with open_volume(path) as volume, h5py.File(path) as file:
        assert volume.shape_zyx.tolist() == [20, 1024, 1024]
        assert volume.voxel_size_nm_zyx.tolist() == [50, 4.6, 4.6]
        positions = file["annotations/locations"][:]
        starts = volume.window_starts(positions, (3, 255, 255))
        middles = starts + np.array([1, 127, 127])
        structures = file["volumes/labels/structures"][:]
        labels = structures[tuple(middles.T)]
    assert (labels == 223).mean() > 0.8  # 223 is a synapse; the centre of a curved synapse may lie outside it
    np.testing.assert_allclose((middles + 0.5) * volume.voxel_size_nm_zyx, positions, atol=25 + 1e-6)


def test_a_real_section_is_read_unchanged(real_em: Path) -> None:
    with open_volume(real_em / "vnc_stack1.h5") as volume, h5py.File(real_em / "vnc_stack1.h5") as file:
        low, high = np.array([18, 700, 0]), np.array([20, 1024, 256])
        found = volume.read(low, high)
        np.testing.assert_array_equal(found, file["volumes/raw"][18:20, 700:1024, 0:256])
    assert found.std() > 20
