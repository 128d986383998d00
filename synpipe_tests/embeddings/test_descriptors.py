"""Hand-made descriptors: they are encoders, and each ignores what it should ignore."""

from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage

from synpipe.embeddings import descriptors
from synpipe.embeddings.descriptors import describe
from synpipe.embeddings.encoder_specs import DescriptorSpec
from synpipe.embeddings.encoders import open_encoder
from synpipe.embeddings.registry import load_registry
from synpipe.errors import SynpipeError
from synpipe_tests.conftest import REPOSITORY

ROTATION = ("lbp", "grey_histogram", "filter_bank", "filter_bank_pooled")


@pytest.fixture(scope="module")
def tiles() -> np.ndarray:
    """Smooth textures of different grain, elongated in one direction: uint8 (6, 3, 256, 256)."""
    rng = np.random.default_rng(0)
    textures = []
    for grain in (1, 2, 3, 4, 6, 8):
        texture = ndimage.gaussian_filter(rng.normal(size=(3, 256, 256)), (0.5, grain, 2 * grain), mode="wrap")
        textures.append(128 + 40 * texture / texture.std())
    return np.clip(textures, 0, 255).astype(np.uint8)


def cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a * b).sum(axis=1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)


@pytest.mark.parametrize("name", descriptors.CROPS_PX)
def test_a_descriptor_is_an_encoder(name: str, tiles: np.ndarray):
    encoder = open_encoder(DescriptorSpec(descriptor=name), REPOSITORY)
    vectors = encoder.embed(tiles)
    assert vectors.dtype == np.float32
    assert vectors.shape == (6, encoder.dim)
    one_by_one = np.concatenate([encoder.embed(tiles[row : row + 1]) for row in range(6)])
    np.testing.assert_allclose(vectors, one_by_one, rtol=1e-3, atol=1e-4)
    assert np.linalg.norm(encoder.embed(np.full_like(tiles, 90)), axis=1).min() > 0
    with pytest.raises(ValueError, match="uint8"):
        encoder.embed(tiles.astype(float))


@pytest.mark.parametrize("name", descriptors.CROPS_PX)
def test_turning_a_tile_changes_only_what_has_a_direction(name: str, tiles: np.ndarray):
    vectors, turned = describe(name, tiles), describe(name, np.rot90(tiles, axes=(2, 3)))
    assert (cosine(vectors, turned).min() > 0.9999) == (name in ROTATION)


@pytest.mark.parametrize("name", descriptors.CROPS_PX)
def test_brightness_and_contrast_change_the_histogram_only(name: str, tiles: np.ndarray):
    paler = np.round((tiles.astype(float) - 128) * 0.7 + 140).astype(np.uint8)
    same = cosine(describe(name, tiles), describe(name, paler)).min()
    assert same < 0.9 if name == "grey_histogram" else same > 0.95


def test_the_filter_bank_pools_over_any_angle_not_only_quarter_turns(tiles: np.ndarray):
    angle = 30
    turned = np.stack(
        [ndimage.rotate(tile, angle, axes=(1, 2), reshape=False, mode="wrap", order=3) for tile in tiles[2:]]
    )
    for name in ("filter_bank", "filter_bank_pooled"):
        own = cosine(describe(name, tiles[2:]), describe(name, turned))
        assert own.min() > 0.97


def test_the_sections_may_change_places_in_the_pooled_bank(tiles: np.ndarray):
    swapped = tiles[:, [2, 0, 1]]
    np.testing.assert_allclose(
        describe("filter_bank_pooled", tiles), describe("filter_bank_pooled", swapped), atol=1e-4
    )


def test_hog_counts_orientations(tiles: np.ndarray):
    """A grating along x has gradients along x only, so all of its weight is in the two bins beside zero."""
    x = np.arange(256)
    grating = np.broadcast_to((128 + 60 * np.sin(x / 4)).astype(np.uint8), (1, 3, 256, 256))
    bins = describe("hog", grating).reshape(-1, descriptors.HOG_BINS).sum(axis=0)
    assert bins[[0, -1]].sum() / bins.sum() > 0.99


def test_entries_of_the_registry(tmp_path: Path):
    path = tmp_path / "encoders.yaml"
    path.write_text(
        "encoders: {lines: {descriptor: hog, description: mine}, net: {model: resnet10t, weights: random, seed: 0}}"
    )
    registry = load_registry(path)
    assert registry["lines"] == DescriptorSpec(descriptor="hog", description="mine")
    assert registry["lines"].identity(tmp_path, {}) == DescriptorSpec(descriptor="hog").identity(tmp_path, {})
    assert registry["lines"].identity(tmp_path, {}) != DescriptorSpec(descriptor="lbp").identity(tmp_path, {})
    path.write_text("encoders: {lines: {descriptor: sift}}")
    with pytest.raises(SynpipeError, match=r"lines.*'hog'"):
        load_registry(path)
