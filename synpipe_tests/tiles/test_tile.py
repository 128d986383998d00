"""Tiles: they hold the right voxels, are cut out once, are made again if incomplete, and are never read damaged."""

import io
import math
import threading
import time
import zlib
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from synpipe.errors import SynpipeError
from synpipe.tiles import extraction
from synpipe.tiles.tile import TileReader, TileSpec, content_hashes, shard_of
from synpipe.volumes.volume import Volume, VolumeSpec
from synpipe_tests.support.extraction import cut_out, extract

SHAPE = (12, 600, 700)
BLANK, REPEATED, CONSTANT = 8, 5, 10  # sections: black; a copy of the one before; without contrast
STARTS = np.array([[0, 0, 0], [1, 100, 200], [2, 300, 400], [1, 344, 0], [0, 17, 444]])


def open_volume(folder: Path, data: np.ndarray) -> Volume:
    with h5py.File(folder / "volume.h5", "w") as file:
        file.create_dataset("volumes/raw", data=data)
        file["volumes/raw"].attrs["resolution"] = (50.0, 4.0, 4.0)
    return Volume(VolumeSpec(path="volume.h5"), folder)


@pytest.fixture(scope="module")
def voxels() -> np.ndarray:
    data = np.random.default_rng(0).integers(1, 256, SHAPE, dtype=np.uint8)
    data[BLANK] = 0
    data[REPEATED] = data[REPEATED - 1]
    data[CONSTANT] = 100
    return data


@pytest.fixture(scope="module")
def volume(tmp_path_factory: pytest.TempPathFactory, voxels: np.ndarray) -> Volume:
    return open_volume(tmp_path_factory.mktemp("volume"), voxels)


def cut(volume: Volume, *start: int, **spec: Any) -> tuple[np.ndarray, dict[str, Any]]:
    """Cut out a tile that must exist."""
    tile, row = cut_out(volume, np.array(start), TileSpec(**spec))
    assert tile is not None and "reason" not in row, row
    assert tile.shape == (3, 256, 256) and tile.dtype == np.uint8
    return tile, row


def rejected(volume: Volume, *start: int, **spec: Any) -> str:
    tile, row = cut_out(volume, np.array(start), TileSpec(**spec))
    assert tile is None and row["row"] == -1
    assert row["detail"].endswith(".")
    return row["reason"]


def reader_of(cut: pa.Table, folder: Path, stacking: str = "colour", first_id: int = 1000) -> TileReader:
    ids = pa.array(range(first_id, first_id + len(cut)), pa.int64())
    return TileReader(cut.append_column("synapse_id", ids).append_column("file", cut["part"]), folder, stacking)


def contents(cut: pa.Table) -> dict[tuple[int, int, int], str]:
    """Content hash of each window, by its first voxel."""
    return {(row["start_z"], row["start_y"], row["start_x"]): row["content_hash"] for row in cut.to_pylist()}


# Which voxels


@settings(deadline=None, derandomize=True, max_examples=50)
@given(st.integers(0, 1), st.integers(0, 344), st.integers(0, 444), st.integers(1, 3))
def test_channels_are_the_sections_before_at_and_after(volume, voxels, z, y, x, step):
    tile, row = cut(volume, z, y, x, section_step_nm=50 * step, blank_std=0)
    middle = z + step
    for channel, section in enumerate((middle - step, middle, middle + step)):
        if not row["missing_sections"] >> channel & 1:
            np.testing.assert_array_equal(tile[channel], voxels[section, y : y + 256, x : x + 256])
    np.testing.assert_array_equal(tile[1], voxels[middle, y : y + 256, x : x + 256])
    assert row["z_index"] == middle
    assert row["pad_fraction"] == 0
    assert row["missing_sections"] == (0b100 if middle + step == REPEATED and step == 1 else 0)


def test_a_marked_voxel_appears_where_it_is_and_not_transposed(tmp_path: Path) -> None:
    """A position in nm ends up at the right pixel: z selects the channel, y points down, x to the right."""
    data = np.random.default_rng(1).integers(50, 200, (5, 400, 500), dtype=np.uint8)
    data[3, 210, 260] = 255  # the section after the synapse, ten voxels lower, thirty to the left
    with open_volume(tmp_path, data) as volume:
        synapse_nm_zyx = np.array([[2.5 * 50, 200 * 4, 290 * 4]])
        spec = TileSpec()
        (start,) = volume.window_starts(synapse_nm_zyx, spec.window_zyx(volume.voxel_size_nm_zyx))
        tile, row = cut(volume, *start)
    assert np.argwhere(tile == 255).tolist() == [[2, 128 + 10, 128 - 30]]
    assert row["z_index"] == 2


def test_padding_is_the_mean_of_the_section_and_its_share_is_noted(volume: Volume, voxels: np.ndarray) -> None:
    tile, row = cut(volume, 1, -56, 600)  # 56 rows above the volume, 156 columns to its right
    for channel, section in enumerate(voxels[1:4, 0:200, 600:700]):
        np.testing.assert_array_equal(tile[channel, 56:, :100], section)
        outside = np.ones((256, 256), dtype=bool)
        outside[56:, :100] = False
        assert set(tile[channel][outside]) == {round(float(section.mean()))}
    assert row["pad_fraction"] == pytest.approx(1 - 200 * 100 / 256**2)
    assert row["missing_sections"] == 0
    assert row["mean"] == pytest.approx(tile.mean(), abs=1e-3)
    assert row["std"] == pytest.approx(tile.std(), abs=1e-3)
    assert row["crc32"] == zlib.crc32(tile.tobytes())


@pytest.mark.parametrize("start", [(1, -1, 0), (1, 0, 445), (1, 345, 0), (-1, 0, 0), (10, 0, 0)])
def test_border_reject_refuses_what_border_pad_fills(volume: Volume, start: tuple[int, int, int]) -> None:
    assert rejected(volume, *start, border="reject", blank_std=0) == "border"
    cut(volume, *start, border="pad", blank_std=0)


def test_border_reject_keeps_tiles_that_just_fit(volume: Volume) -> None:
    for start in ((0, 0, 0), (1, 344, 444)):
        assert cut(volume, *start, border="reject")[1]["pad_fraction"] == 0


@pytest.mark.parametrize(
    ("z", "step", "missing"),
    [
        (-1, 1, 0b001),  # the synapse is in the first section
        (10, 1, 0b101),  # in the last one, after one without contrast
        (6, 1, 0b100),  # before the black section
        (8, 1, 0b101),  # after the black section and before one without contrast
        (4, 1, 0b001),  # section 5 is a copy of section 4
        (3, 1, 0b100),  # the section after section 4 is a copy of it
        (5, 1, 0b000),  # section 5 is a valid neighbour of section 6
        (-3, 4, 0b001),  # section 1 with a step of 4: nothing before it, section 5 after it
        (3, 4, 0b000),  # section 7 with a step of 4: sections 3 and 11 are good
    ],
)
def test_missing_neighbours_are_replaced_by_the_middle_and_noted(volume, voxels, z, step, missing):
    middle = z + step
    tile, row = cut(volume, z, 50, 60, section_step_nm=50 * step)
    assert row["missing_sections"] == missing
    for channel in range(3):
        section = middle if missing >> channel & 1 else middle + (channel - 1) * step
        np.testing.assert_array_equal(tile[channel], voxels[section, 50:306, 60:316])


def test_a_synapse_in_a_blank_section_has_no_tile(volume: Volume) -> None:
    assert rejected(volume, BLANK - 1, 0, 0) == "blank_section"
    assert rejected(volume, CONSTANT - 1, 0, 0) == "blank_section"
    cut(volume, CONSTANT - 1, 0, 0, blank_std=0)


def test_partly_black_sections_are_blank_above_the_stated_share(tmp_path: Path) -> None:
    data = np.random.default_rng(1).integers(1, 256, (3, 256, 256), dtype=np.uint8)
    data[1, :, :26] = 0  # 10 %
    with open_volume(tmp_path, data) as volume:
        assert rejected(volume, 0, 0, 0) == "blank_section"
        cut(volume, 0, 0, 0, blank_zero_fraction=0.11)


@pytest.mark.parametrize(
    "start", [(11, 0, 0), (-2, 0, 0), (50, 0, 0), (1, 600, 0), (1, -256, 0), (1, 0, 700), (1, 0, -256)]
)
def test_windows_outside_the_volume_have_no_tile(volume: Volume, start: tuple[int, int, int]) -> None:
    assert rejected(volume, *start, blank_std=0) == "outside_volume"


def test_a_volume_thinner_than_the_window(tmp_path: Path) -> None:
    data = np.random.default_rng(1).integers(1, 256, (1, 40, 30), dtype=np.uint8)
    with open_volume(tmp_path, data) as volume:
        tile, row = cut(volume, -1, -108, -113)
    assert row["missing_sections"] == 0b101
    np.testing.assert_array_equal(tile[:, 108:148, 113:143], np.repeat(data, 3, axis=0))


# Shards


def test_shards_follow_the_documented_formula() -> None:
    spec = TileSpec(shards=16)
    starts = np.array([[0, 0, 0], [-1, -1, -1], [31, 1023, 1023], [32, 1024, 2048], [7000, 130_000, 240_000]])
    expected = []
    for start in starts.tolist():
        blocks = [math.floor(place / size) for place, size in zip(start, (32, 1024, 1024), strict=True)]
        raw = b"".join(block.to_bytes(8, "little", signed=True) for block in blocks)
        expected.append(zlib.crc32(raw) % 16)
    assert shard_of(starts, spec).tolist() == expected
    # These numbers must stay: another formula would make every store cut out all tiles again.
    assert expected == [0, 2, 0, 11, 8]


starts_lists = st.lists(st.tuples(*[st.integers(-300, 300_000)] * 3), min_size=1, max_size=30)


@settings(deadline=None, derandomize=True)
@given(starts_lists, starts_lists, st.integers(1, 50))
def test_adding_synapses_moves_no_others(some, more, shards):
    spec = TileSpec(shards=shards)
    alone, together = shard_of(np.array(some), spec), shard_of(np.array(more + some), spec)
    assert alone.tolist() == together[len(more) :].tolist()
    assert ((alone >= 0) & (alone < shards)).all()


def test_neighbours_share_a_shard_and_all_shards_are_used() -> None:
    spec = TileSpec(shards=16)
    block = np.array([32, 1024, 1024])
    inside = np.random.default_rng(0).integers(0, block, (100, 3)) + 5 * block
    assert len(set(shard_of(inside, spec))) == 1
    everywhere = np.random.default_rng(0).integers(0, (6400, 100_000, 100_000), (5000, 3))
    assert np.bincount(shard_of(everywhere, spec), minlength=16).min() > 200
    assert shard_of(np.zeros((0, 3), np.int64), spec).shape == (0,)


def test_specs_that_make_no_sense_are_refused() -> None:
    wrongs: list[dict] = [
        {"shards": 0},
        {"section_step_nm": 0},
        {"border": "mirror"},
        {"block_voxels_zyx": [32, 0, 1024]},
    ]
    for wrong in wrongs:
        with pytest.raises(SynpipeError, match=next(iter(wrong))):
            TileSpec.parse(wrong, "demo.yaml")


def test_the_recipe_covers_the_bytes_of_tiles_and_not_the_view() -> None:
    recipe = TileSpec().recipe("volume")
    assert TileSpec(stacking="grey").recipe("volume") == recipe
    others = [TileSpec(section_step_nm=200), TileSpec(border="reject"), TileSpec(blank_std=5), TileSpec(shards=3)]
    assert len({recipe, TileSpec().recipe("other"), *(spec.recipe("volume") for spec in others)}) == 6


# Parts


def test_rows_come_back_in_the_order_of_the_windows(volume: Volume, voxels: np.ndarray, tmp_path: Path) -> None:
    starts = np.concatenate(
        [STARTS, [[BLANK - 1, 0, 0]], STARTS[:1]]
    )  # one window without a tile, and one window twice
    cuts, made = extract(volume, TileSpec(), tmp_path, starts)
    assert made == len(STARTS) + 1
    assert np.stack([cuts[f"start_{axis}"].to_numpy() for axis in "zyx"], axis=1).tolist() == starts.tolist()
    assert cuts["reason"].to_pylist() == [None] * 5 + ["blank_section", None]
    reader = reader_of(cuts.filter(pa.compute.is_null(cuts["reason"])), tmp_path)
    for index, (z, y, x) in enumerate([*STARTS, STARTS[0]]):
        np.testing.assert_array_equal(reader.read(np.array([index]))[0], voxels[z : z + 3, y : y + 256, x : x + 256])
    assert {path.name[:6] for path in tmp_path.iterdir()} == {"00000-"}


def test_the_order_of_the_windows_does_not_matter(volume: Volume, tmp_path: Path) -> None:
    forth, _ = extract(volume, TileSpec(), tmp_path / "a", STARTS)
    back, _ = extract(volume, TileSpec(), tmp_path / "b", STARTS[::-1])
    assert contents(forth) == contents(back)
    files = [{path.name: path.read_bytes() for path in (tmp_path / name).glob("*.h5")} for name in "ab"]
    assert files[0].keys() == files[1].keys()


def test_a_second_run_makes_no_cut_out_and_changes_no_file(volume: Volume, tmp_path: Path) -> None:
    first, made = extract(volume, TileSpec(), tmp_path, STARTS)
    assert made == len(STARTS)
    before = {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in tmp_path.iterdir()}
    counted: list[int] = []
    second, made = extract(volume, TileSpec(), tmp_path, STARTS, counted.append)
    assert made == 0 and sum(counted) == len(STARTS)
    assert second.equals(first)
    assert {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in tmp_path.iterdir()} == before


def test_added_windows_are_the_only_ones_cut_out(volume: Volume, tmp_path: Path) -> None:
    some, _ = extract(volume, TileSpec(), tmp_path, STARTS[:3])
    counted: list[int] = []
    every, made = extract(volume, TileSpec(), tmp_path, STARTS, counted.append)
    assert made == 2 and sum(counted) == len(STARTS)
    assert every.slice(0, 3).equals(some)
    at_once, _ = extract(volume, TileSpec(), tmp_path / "at once", STARTS)
    assert contents(every) == contents(at_once)


def test_large_shards_are_written_in_several_parts(volume: Volume, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(extraction, "PART_TILES", 2)
    cuts, made = extract(volume, TileSpec(), tmp_path, STARTS)
    assert made == 5 and len(list(tmp_path.glob("*.h5"))) == 3
    monkeypatch.undo()
    assert contents(cuts) == contents(extract(volume, TileSpec(), tmp_path / "one", STARTS)[0])
    read = reader_of(cuts, tmp_path)
    assert content_hashes(read, 5).to_pylist() == cuts["content_hash"].to_pylist()


@pytest.mark.parametrize("suffix", [".parquet", ".h5"])
def test_half_a_part_is_made_again_with_the_same_content(volume: Volume, tmp_path: Path, suffix: str) -> None:
    """The index is missing if the process was killed after writing the tiles. Tiles are missing if somebody deleted them."""
    first, _ = extract(volume, TileSpec(), tmp_path, STARTS)
    (half,) = tmp_path.glob(f"*{suffix}")
    half.unlink()
    again, made = extract(volume, TileSpec(), tmp_path, STARTS)
    assert made == len(STARTS)
    assert again.equals(first)
    assert len(list(tmp_path.iterdir())) == 2


def test_an_error_in_the_middle_of_a_part_leaves_the_parts_before_it(volume, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(extraction, "PART_TILES", 2)
    done = 0

    def stop_in_the_second_part(count: int) -> None:
        nonlocal done
        done += count
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        extract(volume, TileSpec(), tmp_path, STARTS, stop_in_the_second_part)
    assert extract(volume, TileSpec(), tmp_path, STARTS)[1] == 3


def test_a_shard_with_rejects_only(volume: Volume, tmp_path: Path) -> None:
    starts = np.array([[BLANK - 1, 0, 0], [50, 0, 0]])
    cuts, made = extract(volume, TileSpec(), tmp_path, starts)
    assert made == 2
    assert cuts["reason"].to_pylist() == ["blank_section", "outside_volume"]
    assert extract(volume, TileSpec(), tmp_path, starts)[1] == 0


def test_parts_are_plain_hdf5_that_any_reader_can_map(volume: Volume, voxels: np.ndarray, tmp_path: Path) -> None:
    cuts, _ = extract(volume, TileSpec(), tmp_path, STARTS)
    with h5py.File(tmp_path / cuts["part"][0].as_py()) as file:
        stack = file["tiles"]
        assert stack.shape == (5, 3, 256, 256) and stack.dtype == np.uint8
        assert stack.chunks is None and stack.compression is None
        z, y, x = STARTS[2]
        np.testing.assert_array_equal(stack[cuts["row"][2].as_py()], voxels[z : z + 3, y : y + 256, x : x + 256])


# Reading


@pytest.fixture
def parts(volume: Volume, tmp_path: Path) -> pa.Table:
    return extract(volume, TileSpec(), tmp_path, STARTS)[0]


@pytest.mark.parametrize("first_id", [0, 2**63 - 5])
def test_tiles_by_id(parts: pa.Table, voxels: np.ndarray, tmp_path: Path, first_id: int) -> None:
    order = [3, 0, 4, 1, 2]  # ids need not be sorted
    shuffled = parts.take(order).append_column("file", parts["part"])
    ids = pa.array([first_id + place for place in order], pa.int64())
    reader = TileReader(shuffled.append_column("synapse_id", ids), tmp_path, "colour")
    for place, (z, y, x) in enumerate(STARTS):
        tile = reader.by_id(first_id + place)
        assert tile.dtype == np.uint8
        np.testing.assert_array_equal(tile, voxels[z : z + 3, y : y + 256, x : x + 256])
    for unknown in (first_id - 1, first_id + 5, -(2**63), 2**63, 2**70):
        with pytest.raises(SynpipeError, match=f"Synapse {unknown} has no tile"):
            reader.by_id(unknown)


def test_pictures_by_id(parts: pa.Table, voxels: np.ndarray, tmp_path: Path) -> None:
    z, y, x = STARTS[1]
    sections = voxels[z : z + 3, y : y + 256, x : x + 256]
    colour = np.asarray(Image.open(io.BytesIO(reader_of(parts, tmp_path).png(1001))))
    np.testing.assert_array_equal(colour, sections.transpose(1, 2, 0))
    grey = np.asarray(Image.open(io.BytesIO(reader_of(parts, tmp_path, "grey").png(1001))))
    np.testing.assert_array_equal(grey, np.stack([sections[1]] * 3, axis=2))


def test_grey_tiles_are_the_middle_section_thrice(parts: pa.Table, voxels: np.ndarray, tmp_path: Path) -> None:
    reader = reader_of(parts, tmp_path, "grey")
    z, y, x = STARTS[2]
    middle = voxels[z + 1, y : y + 256, x : x + 256]
    np.testing.assert_array_equal(reader.read(np.array([2, 2]))[1], np.stack([middle] * 3))
    np.testing.assert_array_equal(reader.by_id(1002), np.stack([middle] * 3))
    hashes = content_hashes(reader, 5).to_pylist()
    assert len(set(hashes)) == 5
    assert not set(hashes) & set(parts["content_hash"].to_pylist())
    assert content_hashes(reader_of(parts, tmp_path), 5).to_pylist() == parts["content_hash"].to_pylist()


def test_reading_no_tiles_gives_an_empty_array(parts: pa.Table, tmp_path: Path) -> None:
    assert reader_of(parts, tmp_path).read(np.zeros(0, np.int64)).shape == (0, 3, 256, 256)
    assert reader_of(parts.slice(0, 0), tmp_path).read(np.zeros(0, np.int64)).shape == (0, 3, 256, 256)


def flip_a_byte(folder: Path, row: int) -> Path:
    """Damage one tile of the only part in a folder."""
    (path,) = folder.glob("*.h5")
    with h5py.File(path) as file:
        offset = file["tiles"].id.get_offset()
    content = bytearray(path.read_bytes())
    content[offset + row * 3 * 256 * 256 + 777] ^= 1
    path.write_bytes(content)
    return path


def test_a_flipped_byte_is_found_and_the_other_tiles_are_still_read(parts: pa.Table, tmp_path: Path) -> None:
    path = flip_a_byte(tmp_path, row=2)
    damaged = parts["row"].to_pylist().index(2)
    reader = reader_of(parts, tmp_path)
    with pytest.raises(SynpipeError, match=rf"{path.name}, row 2, differ from their checksum"):
        reader.read(np.arange(5))
    with pytest.raises(SynpipeError, match="checksum"):
        reader.by_id(1000 + damaged)
    assert len(reader.read(np.delete(np.arange(5), damaged))) == 4


def test_truncated_absent_and_strange_parts_are_named(parts: pa.Table, tmp_path: Path) -> None:
    (path,) = tmp_path.glob("*.h5")
    whole = path.read_bytes()
    for length in (0, 100, 2048, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(SynpipeError, match=rf"{path.name}, row \d, cannot be read .* Materialise again") as caught:
            reader_of(parts, tmp_path).by_id(1000)
        assert "\n" not in str(caught.value)
    with h5py.File(path, "w") as file:
        file.create_dataset("tiles", data=np.zeros((1, 3, 256, 256), np.uint8), chunks=True)
    with pytest.raises(SynpipeError, match="cannot be read"):
        reader_of(parts, tmp_path).by_id(1004)
    path.unlink()
    with pytest.raises(SynpipeError, match="do not exist: materialise"):
        reader_of(parts, tmp_path).by_id(1000)


def test_damaged_parts_are_named_moved_aside_and_cut_out_again(
    volume: Volume, parts: pa.Table, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A flipped byte is found when its tile is read. A truncated file or index is found by the next extraction."""
    (index,), (tiles,), whole = tmp_path.glob("*.parquet"), tmp_path.glob("*.h5"), reader_of(parts, tmp_path)
    expected = whole.read(np.arange(5))
    last = parts["row"].to_pylist().index(4)

    def flip() -> Path:
        flip_a_byte(tmp_path, row=4)
        with pytest.raises(SynpipeError, match="checksum"):
            reader_of(parts, tmp_path).by_id(1000 + last)
        return tiles

    def truncate(path: Path, by: int) -> Path:
        path.write_bytes(path.read_bytes()[:-by])
        return path

    for spoil in (
        flip,
        lambda: truncate(tiles, 1),
        lambda: truncate(tiles, tiles.stat().st_size),
        lambda: truncate(index, 10),
    ):
        damaged = spoil()
        caplog.clear()
        again, made = extract(volume, TileSpec(), tmp_path, STARTS)
        assert made == len(STARTS) and f"{damaged} is damaged" in caplog.text
        assert damaged.with_name(f"{damaged.name}.damaged").exists()
        np.testing.assert_array_equal(reader_of(again, tmp_path).read(np.arange(5)), expected)
        assert extract(volume, TileSpec(), tmp_path, STARTS)[1] == 0


def test_several_threads_read_the_same_tiles(parts: pa.Table, tmp_path: Path) -> None:
    reader = reader_of(parts, tmp_path)
    wanted = np.random.default_rng(0).integers(0, 5, 60)
    expected = reader_of(parts, tmp_path).read(wanted)
    same: list[bool] = []
    threads = [
        threading.Thread(target=lambda: same.append(np.array_equal(reader.read(wanted), expected))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert same == [True] * 4


def test_a_tile_by_id_comes_quickly(parts: pa.Table, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    reader = reader_of(parts, tmp_path)
    reader.by_id(1000)
    elapsed = []
    for call in range(200):
        started = time.perf_counter()
        tile = reader.by_id(1000 + call % 5)
        elapsed.append(time.perf_counter() - started)
    assert tile.shape == (3, 256, 256)
    with capsys.disabled():
        print(f"\n  a tile by id: {1e3 * float(np.median(elapsed)):.2f} ms (median of 200)")


def test_real_synapses_are_in_the_middle_of_their_tiles(real_em: Path) -> None:
    """Positions in nm from a real file end up in the middle pixel of their tiles. Tiles at the border are padded."""
    path = real_em / "vnc_stack1.h5"
    spec = TileSpec()
    with Volume(VolumeSpec(path=str(path)), Path()) as volume, h5py.File(path) as file:
        raw = file["volumes/raw"][:]
        starts = volume.window_starts(file["annotations/locations"][:], spec.window_zyx(volume.voxel_size_nm_zyx))
        padded = 0
        for start in starts:
            tile, row = cut_out(volume, start, spec)
            assert tile is not None, row
            z, y, x = start + np.array([1, 128, 128])
            assert tile[1, 128, 128] == raw[z, y, x]
            assert (row["pad_fraction"] > 0) == (min(start[1:]) < 0 or max(start[1:]) > 1024 - 256)
            assert 20 < row["std"] < 80
            padded += row["pad_fraction"] > 0
    assert len(starts) == 50 and padded == 22
