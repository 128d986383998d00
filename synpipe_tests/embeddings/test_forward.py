"""The forward pass on a GPU, if there is one, and the effect of `compile` on the identity of an encoder."""

from pathlib import Path

import numpy as np
import pytest
import torch

from synpipe.embeddings.cache import EmbeddingCache
from synpipe.embeddings.embed import Shard, embed_missing, embed_shard
from synpipe.embeddings.encoder_specs import EncoderSpec
from synpipe.embeddings.encoders import Encoder, open_encoder

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


def spec(**changes: object) -> EncoderSpec:
    return EncoderSpec.parse(
        {"model": "resnet10t", "weights": "random", "seed": 0, "precision": "fp32", **changes}, "test"
    )


@pytest.fixture(scope="module")
def tiles() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (70, 3, 256, 256), dtype=np.uint8)


def embedded(encoder: Encoder, tiles: np.ndarray, batch_size: int | None = None) -> np.ndarray:
    return embed_shard(encoder, tiles.__getitem__, [str(row) for row in range(len(tiles))], batch_size)


def test_kernels_made_by_the_compiler_are_another_encoder():
    compiled, default, uncompiled = (
        each.identity(Path(), {}) for each in (spec(compile=True), spec(), spec(compile=False))
    )
    assert compiled != default == uncompiled


@needs_gpu
@pytest.mark.parametrize(
    ("changes", "tolerance"), [({}, 1e-3), ({"precision": "bf16"}, 2e-2), ({"compile": True}, 1e-3)]
)
def test_a_gpu_gives_the_vectors_of_the_cpu(tiles: np.ndarray, changes: dict, tolerance: float):
    expected = embedded(open_encoder(spec(), Path(), "cpu"), tiles)
    encoder = open_encoder(spec(**changes), Path(), "cuda")
    for found in (embedded(encoder, tiles), embedded(encoder, tiles, 16), encoder.embed(tiles)):
        apart = np.linalg.norm(found - expected, axis=1) / np.linalg.norm(expected, axis=1)
        assert apart.max() < tolerance


@needs_gpu
def test_a_batch_too_large_for_the_gpu_is_halved(tiles: np.ndarray, caplog: pytest.LogCaptureFixture):
    encoder = open_encoder(spec(), Path(), "cuda")
    expected = embedded(encoder, tiles)
    free, total = torch.cuda.mem_get_info()
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction((total - free + 2**27) / total)
    try:
        found = embedded(encoder, tiles)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    np.testing.assert_allclose(found, expected, rtol=1e-2, atol=1e-2)
    assert "out of memory" in caplog.text


@needs_gpu
def test_what_went_through_the_gpu_is_written_and_counted(tiles: np.ndarray, tmp_path: Path):
    encoder = open_encoder(spec(), Path(), "cuda")
    cache = EmbeddingCache(tmp_path, encoder.fingerprint)
    hashes = [str(row) for row in range(len(tiles))]
    done = embed_missing([encoder], cache, [Shard("s0", hashes, tiles.__getitem__)])
    assert done.tiles == len(tiles)
    assert done.gpu_bytes > 0
    np.testing.assert_allclose(cache.read("s0", hashes), embedded(encoder, tiles), rtol=1e-3, atol=1e-3)
