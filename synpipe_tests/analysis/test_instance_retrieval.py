"""Instance retrieval: views are cut at the right place, and the recall ranges from chance to one."""

from pathlib import Path

import h5py
import numpy as np
import pytest

from synpipe.analysis.evaluation import EvaluationSpec
from synpipe.analysis.instance_retrieval import (
    ALL,
    MARGIN_PX,
    SHIFT_PX,
    SINGLES,
    UNALTERED,
    Alteration,
    EmbeddedTiles,
    cut_view,
    draw_alterations,
    draw_places,
    keep_only,
    rank_originals,
    read_surroundings,
    retrieve_instances,
)
from synpipe.tiles.tile import TileSpec
from synpipe.volumes.volume import Volume, VolumeSpec
from synpipe_tests.support.extraction import cut_out

WINDOW = (3, 256, 256)
PLACES = 12  # in a row, each with a texture of its own


@pytest.fixture(scope="module")
def volume(tmp_path_factory: pytest.TempPathFactory):
    """A strip of textures with seven sections. The share of bright pixels differs from place to place."""
    path: Path = tmp_path_factory.mktemp("strip") / "volume.h5"
    rng = np.random.default_rng(0)
    size = 256 + 2 * MARGIN_PX + 8
    grains = rng.random((PLACES, 7, size // 4, size // 4)).repeat(4, axis=2).repeat(4, axis=3)
    strip = [np.where(grains[place] < (place + 1) / (PLACES + 1), 190, 60) for place in range(PLACES)]
    with h5py.File(path, "w") as file:
        raw = file.create_dataset("volumes/raw", data=np.concatenate(strip, axis=2).astype(np.uint8))
        raw.attrs["resolution"], raw.attrs["offset"] = (40.0, 4.0, 4.0), (0.0, 0.0, 0.0)
    with Volume(VolumeSpec(path=str(path)), path.parent) as opened:
        yield opened


def starts() -> np.ndarray:
    size = 256 + 2 * MARGIN_PX + 8
    return np.array([(2, MARGIN_PX + 4, place * size + MARGIN_PX + 4) for place in range(PLACES)])


def tile_at(volume: Volume, start) -> np.ndarray:
    tile, row = cut_out(volume, np.array(start), TileSpec())
    assert tile is not None, row
    return tile


def share_of_bright(tiles: np.ndarray) -> np.ndarray:
    """An encoder that depends on the share of bright pixels only."""
    flat = tiles.reshape(len(tiles), -1).astype(float)
    middle = (flat.min(axis=1) + flat.max(axis=1)) / 2
    angle = (flat > middle[:, None]).mean(axis=1) * np.pi / 2
    return np.column_stack([np.cos(angle), np.sin(angle)]).astype(np.float32)


def test_an_encoder_that_nothing_disturbs_finds_every_place(volume: Volume):
    tiles = np.stack([tile_at(volume, start) for start in starts()])
    spec = EvaluationSpec(places=PLACES, singles=5)
    vectors = share_of_bright(tiles)
    embedded = EmbeddedTiles(volume, TileSpec(), lambda view: view, share_of_bright, vectors, starts(), WINDOW)
    found = retrieve_instances(embedded, spec)
    assert sorted(found.places.tolist()) == list(range(PLACES))
    assert (found.ranks == 1).all()
    assert {name: each.tolist() for name, each in found.singles.items()} == {name: [1] * 5 for name in SINGLES}
    assert ALL not in found.singles


def test_random_vectors_find_places_by_chance_and_constant_ones_never():
    count, rng = 400, np.random.default_rng(0)
    vectors = rng.normal(size=(count, 8))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    apart = np.arange(count)[:, None] * np.array([0, 0, 256])
    spec = EvaluationSpec(distractors=100)
    at = rank_originals(rng.normal(size=(count, 8)), np.arange(count), vectors, apart, WINDOW, spec)
    # Ranks 1 to 101, evenly: the standard error of each share is 0.005 and 0.011.
    assert (at <= 1).mean() == pytest.approx(1 / 101, abs=0.02)
    assert (at <= 5).mean() == pytest.approx(5 / 101, abs=0.04)
    assert at.mean() == pytest.approx(51, abs=6)
    same = np.tile([[1.0, 0.0]], (count, 1))
    assert (rank_originals(same, np.arange(count), same, apart, WINDOW, spec) >= 100).all()


def test_tiles_that_overlap_the_original_are_neither_right_nor_wrong():
    vectors = np.array([[1.0, 0], [1, 0], [0, 1]])
    near = np.array([[0, 0, 0], [2, 100, -255], [0, 0, 900]])
    found = rank_originals(np.array([[1.0, 0]]), np.array([0]), vectors, near, WINDOW, EvaluationSpec())
    assert found.tolist() == [1]
    apart = np.array([[0, 0, 0], [3, 0, 0], [0, 0, 900]])
    found = rank_originals(np.array([[1.0, 0]]), np.array([0]), vectors, apart, WINDOW, EvaluationSpec())
    assert found.tolist() == [2]


def test_a_view_is_of_the_place_turned_shifted_and_a_section_off(volume: Volume):
    start = starts()[5]
    surroundings = read_surroundings(volume, start, TileSpec())
    assert surroundings is not None
    tile = tile_at(volume, start)
    assert (cut_view(surroundings, UNALTERED) == tile).all()
    for sections in (-1, 1):
        assert (
            cut_view(surroundings, Alteration(sections=sections)) == tile_at(volume, start + np.array([sections, 0, 0]))
        ).all()
    for y, x in ((16, 0), (-3, 11)):
        shifted = cut_view(surroundings, Alteration(shift_yx_px=(y, x)))
        assert (shifted == tile_at(volume, start + np.array([0, y, x]))).all()
    quarter = cut_view(surroundings, Alteration(angle_deg=90)).astype(int)
    assert min(np.abs(quarter - np.rot90(tile, turns, (1, 2))).max() for turns in (1, 3)) <= 1
    darker = cut_view(surroundings, Alteration(contrast=0.75, brightness=-20))
    assert (darker == np.round((tile - 127.5) * 0.75 + 127.5 - 20)).all()


def test_no_view_shows_what_lies_beyond_the_margin(volume: Volume):
    surroundings = np.full((5, 256 + 2 * MARGIN_PX, 256 + 2 * MARGIN_PX), 100, dtype=np.uint8)
    for alteration in draw_alterations(40, 0):
        assert np.hypot(*alteration.shift_yx_px) <= SHIFT_PX
        assert alteration.sections in (-1, 1)
        turned = cut_view(surroundings, keep_only(alteration, ("angle_deg", "shift_yx_px")))
        assert (turned == 100).all()
    corner = Alteration(angle_deg=45, shift_yx_px=(SHIFT_PX / np.sqrt(2), SHIFT_PX / np.sqrt(2)))
    assert (cut_view(surroundings, corner) == 100).all()


def test_places_whose_margin_leaves_the_volume_are_taken_only_where_there_are_few_others():
    rng = np.random.default_rng(0)
    inside = np.column_stack([rng.integers(1, 16, 300), rng.integers(MARGIN_PX, 600, (300, 2))])
    outside = inside * [1, 0, 1]
    shape, spec = np.array([20, 1024, 1024]), EvaluationSpec(places=200)
    drawn = draw_places(np.concatenate([inside, outside]), WINDOW, shape, spec)
    assert len(drawn) == 200
    assert (drawn < 300).all()
    few = draw_places(np.concatenate([inside[:20], outside]), WINDOW, shape, spec)
    assert len(few) == 200
    assert {*range(20)} <= {*few.tolist()}


def test_the_surroundings_at_the_border_are_filled_like_tiles(volume: Volume):
    found = read_surroundings(volume, np.array([-1, -100, 0]), TileSpec())
    assert found is not None
    tile = tile_at(volume, (-1, -100, 0))
    middle = slice(MARGIN_PX, MARGIN_PX + 256)
    assert (found[2, middle, middle][100:] == tile[1, 100:]).all()
    assert (found[0] == found[2]).all()  # sections −2 and −1 do not exist
    assert read_surroundings(volume, np.array([50, 0, 0]), TileSpec()) is None
