"""Embedding: order, batches, values that are not finite, and a cache that survives damage and interrupts."""

import dataclasses
import hashlib
import json
import logging
import time
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import timm
import torch

from synpipe.embeddings import embed as embedding
from synpipe.embeddings.cache import EmbeddingCache
from synpipe.embeddings.embed import Shard, embed_missing, embed_shard
from synpipe.embeddings.encoder_specs import EncoderSpec
from synpipe.embeddings.encoders import Encoder, open_encoder
from synpipe.embeddings.forward import FunctionForward
from synpipe.errors import SynpipeError

TINY = "test_resnet.r160_in1k"


def open_tiny(**changes: object) -> Encoder:
    spec = {"model": TINY, "weights": "random", "seed": 0, "crop_px": 64, "precision": "fp32", **changes}
    return open_encoder(EncoderSpec.parse(spec, "test"), Path())


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return open_tiny()


@pytest.fixture(scope="module")
def tiles() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (23, 3, 256, 256), dtype=np.uint8)


@pytest.fixture(scope="module")
def hashes(tiles: np.ndarray) -> list[str]:
    return [hashlib.sha256(tile.tobytes()).hexdigest() for tile in tiles]


class CountingReader:
    """Reads rows of an array and remembers their numbers."""

    def __init__(self, tiles: np.ndarray) -> None:
        self.tiles = tiles
        self.rows: list[int] = []

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        self.rows += rows.tolist()
        return self.tiles[rows]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_rows_keep_their_order_and_do_not_depend_on_the_batch_size(
    tiles: np.ndarray, hashes: list[str], precision: str
) -> None:
    encoder = open_tiny(precision=precision)
    expected = np.concatenate([encoder.embed(tile[None]) for tile in tiles])
    assert len(np.unique(expected.round(6), axis=0)) == len(tiles)  # so that a wrong order would be noticed
    done: list[int] = []
    for batch_size in (5, 23, 64, None):
        vectors = embed_shard(encoder, tiles.__getitem__, hashes, batch_size, done.append)
        assert vectors.dtype == np.float32
        error = np.linalg.norm(vectors - expected, axis=1) / np.linalg.norm(expected, axis=1)
        assert error.max() < 1e-5
    assert done == [5, 5, 5, 5, 3, 23, 23, 16, 7]  # the default is 16 on a CPU


def test_empty_shard_gives_no_rows(encoder: Encoder, tiles: np.ndarray) -> None:
    assert embed_shard(encoder, tiles.__getitem__, []).shape == (0, encoder.dim)


def test_values_that_are_not_finite_stop_the_shard_and_are_not_kept(
    tmp_path: Path, tiles: np.ndarray, hashes: list[str]
) -> None:
    state = timm.create_model(TINY).state_dict()
    state["conv1.1.running_mean"][0] = float("nan")
    safetensors.torch.save_file(state, tmp_path / "broken.safetensors")
    broken = open_tiny(weights=str(tmp_path / "broken.safetensors"), seed=None)
    cache = EmbeddingCache(tmp_path, broken.fingerprint)
    with pytest.raises(SynpipeError, match=f"infinite values for 23 of 23 tiles.*{hashes[0]}.*fp32"):
        embed_missing([broken], cache, [Shard("s0", hashes, tiles.__getitem__)])
    assert cache.known_hashes("s0") == set()


def test_too_little_memory_halves_the_batch_and_goes_on(
    encoder: Encoder, tiles: np.ndarray, hashes: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    sizes: list[int] = []

    def limited(batch: np.ndarray, limit: int) -> np.ndarray:
        if len(batch) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        sizes.append(len(batch))
        return encoder.embed(batch)

    small = dataclasses.replace(encoder, forward=FunctionForward(lambda batch: limited(batch, 4)))
    vectors = embed_shard(small, tiles.__getitem__, hashes, batch_size=16)
    assert sizes == [4, 4, 4, 4, 4, 3]
    np.testing.assert_allclose(vectors, encoder.embed(tiles), rtol=1e-4, atol=1e-6)
    assert "batches of 4 tiles" in caplog.text
    with pytest.raises(SynpipeError, match="One tile does not fit"):
        embed_shard(
            dataclasses.replace(encoder, forward=FunctionForward(lambda batch: limited(batch, 0))),
            tiles.__getitem__,
            hashes,
        )


def test_only_what_is_missing_is_embedded_and_each_content_once(
    tmp_path: Path, encoder: Encoder, tiles: np.ndarray, hashes: list[str]
) -> None:
    cache = EmbeddingCache(tmp_path, encoder.fingerprint)
    order = [3, 1, 3, 4, 1]
    reader = CountingReader(tiles[order])
    first = [hashes[row] for row in order]
    assert embed_missing([encoder], cache, [Shard("s0", first, reader)]).tiles == 3
    assert reader.rows == [0, 1, 3]

    reader = CountingReader(tiles)
    assert embed_missing([encoder], cache, [Shard("s0", hashes, reader)]).tiles == 20
    assert sorted(reader.rows) == [row for row in range(23) if row not in (1, 3, 4)]
    assert embed_missing([encoder], cache, [Shard("s0", hashes, reader)]).tiles == 0
    assert len(reader.rows) == 20

    assert cache.known_hashes("s0") == set(hashes)
    np.testing.assert_allclose(cache.read("s0", hashes[::-1]), encoder.embed(tiles[::-1]), rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(cache.read("s0", first)[0], cache.read("s0", first)[2])
    assert cache.known_hashes("s") == cache.known_hashes("s1") == set()


def test_encoders_do_not_see_each_others_vectors(
    tmp_path: Path, encoder: Encoder, tiles: np.ndarray, hashes: list[str]
) -> None:
    embed_missing([encoder], EmbeddingCache(tmp_path, encoder.fingerprint), [Shard("s0", hashes, tiles.__getitem__)])
    other = open_tiny(seed=1)
    cache = EmbeddingCache(tmp_path, other.fingerprint)
    assert embed_missing([other], cache, [Shard("s0", hashes, tiles.__getitem__)]).tiles == 23
    assert (
        embed_missing(
            [encoder], EmbeddingCache(tmp_path, encoder.fingerprint), [Shard("s0", hashes, tiles.__getitem__)]
        ).tiles
        == 0
    )
    with pytest.raises(ValueError, match="another encoder"):
        embed_missing([encoder], cache, [Shard("s0", hashes, tiles.__getitem__)])


def test_several_devices_share_the_parts(
    tmp_path: Path, encoder: Encoder, tiles: np.ndarray, hashes: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The devices are the same CPU twice. Each takes some parts, none is embedded twice, and the result is that of one device."""
    monkeypatch.setitem(embedding.ROWS_PER_PART, "cpu", 4)
    alone, together = (EmbeddingCache(tmp_path / name, encoder.fingerprint) for name in ("alone", "together"))
    shards = [Shard(f"s{number}", hashes[number::2], tiles[number::2].__getitem__) for number in range(2)]
    embed_missing([encoder], alone, shards)
    at_work = [0, 0]

    def second_waits_for_first(device: int, batch: np.ndarray) -> np.ndarray:
        at_work[device] += len(batch)
        deadline = time.monotonic() + 10
        while not all(at_work) and time.monotonic() < deadline:
            time.sleep(0.001)
        return encoder.embed(batch)

    devices = [
        dataclasses.replace(encoder, forward=FunctionForward(partial(second_waits_for_first, device)))
        for device in (0, 1)
    ]
    assert embed_missing(devices, together, shards).tiles == sum(at_work) == len(tiles)
    assert all(at_work)
    for shard in shards:
        vectors = [cache.read(shard.name, shard.content_hashes) for cache in (alone, together)]
        np.testing.assert_array_equal(*vectors)


def test_a_device_that_fails_costs_only_what_it_was_at(
    tmp_path: Path, encoder: Encoder, tiles: np.ndarray, hashes: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(embedding.ROWS_PER_PART, "cpu", 4)
    cache = EmbeddingCache(tmp_path, encoder.fingerprint)

    def fails(batch: np.ndarray) -> np.ndarray:
        raise RuntimeError("the device fell off the bus")

    broken = dataclasses.replace(encoder, forward=FunctionForward(fails))
    with pytest.raises(RuntimeError, match="fell off"):
        embed_missing([encoder, broken], cache, [Shard("s0", hashes, tiles.__getitem__)])
    kept = cache.known_hashes("s0")
    assert embed_missing([encoder], cache, [Shard("s0", hashes, tiles.__getitem__)]).tiles == len(tiles) - len(kept)


def test_interrupted_work_keeps_the_finished_parts(
    tmp_path: Path, encoder: Encoder, tiles: np.ndarray, hashes: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(embedding.ROWS_PER_PART, "cpu", 8)
    cache = EmbeddingCache(tmp_path, encoder.fingerprint)

    def interrupted(rows: np.ndarray) -> np.ndarray:
        if rows.max() >= 16:
            raise KeyboardInterrupt
        return tiles[rows]

    with pytest.raises(KeyboardInterrupt):
        embed_missing([encoder], cache, [Shard("s0", hashes, interrupted)])
    assert cache.known_hashes("s0") == set(hashes[:16])
    assert embed_missing([encoder], cache, [Shard("s0", hashes, tiles.__getitem__)]).tiles == 7


@pytest.mark.parametrize("damage", ["cut", "flipped bit", "emptied", "of another encoder"])
def test_damaged_part_is_named_moved_aside_and_computed_again(
    tmp_path: Path,
    encoder: Encoder,
    tiles: np.ndarray,
    hashes: list[str],
    damage: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    cache = EmbeddingCache(tmp_path, encoder.fingerprint)
    embed_missing([encoder], cache, [Shard("s0", hashes[:10], tiles.__getitem__)])
    (part,) = cache.folder.glob("*.parquet")
    embed_missing([encoder], cache, [Shard("s0", hashes, tiles.__getitem__)])
    before = cache.read("s0", hashes)
    content = bytearray(part.read_bytes())
    if damage == "cut":
        content = content[: len(content) // 2]
    elif damage == "flipped bit":
        content[pq.ParquetFile(part).metadata.row_group(0).column(1).data_page_offset + 100] ^= 4
    elif damage == "emptied":
        content = bytearray()
    else:
        other = EmbeddingCache(tmp_path, "another")
        content = bytearray(other.add("s0", hashes[:10], before[:10]).read_bytes())
    part.write_bytes(content)

    with caplog.at_level(logging.WARNING):
        assert cache.known_hashes("s0") == set(hashes[10:])
    assert str(part) in caplog.text
    assert part.with_suffix(".damaged").exists()
    with pytest.raises(SynpipeError, match=r"lacks the vectors of 10 tiles of shard s0.*materialise"):
        cache.read("s0", hashes)
    assert embed_missing([encoder], cache, [Shard("s0", hashes, tiles.__getitem__)]).tiles == 10
    np.testing.assert_array_equal(cache.read("s0", hashes), before)


def test_part_file_says_what_made_it_and_other_tools_read_it(
    tmp_path: Path, encoder: Encoder, tiles: np.ndarray, hashes: list[str]
) -> None:
    cache = EmbeddingCache(tmp_path, encoder.fingerprint)
    embed_missing([encoder], cache, [Shard("s0", hashes[:4], tiles.__getitem__)])
    (part,) = cache.folder.glob("s0-*.parquet")
    table = pq.read_table(part)
    assert table.column_names == ["content_hash", "vector"]
    assert str(table.schema.field("vector").type) == f"fixed_size_list<element: float>[{encoder.dim}]"
    metadata = table.schema.metadata
    assert metadata[b"encoder_fingerprint"].decode() == encoder.fingerprint == part.parent.name
    assert EncoderSpec.model_validate(json.loads(metadata[b"encoder"])) == encoder.spec
    assert json.loads(metadata[b"preprocessing"])["crop_px"] == 64


def test_embeddings_of_real_tissue_tell_structures_apart(real_em: Path) -> None:
    """With the default encoder on 544 real points, nearest neighbours (cosine) agree more often than by chance."""
    import csv

    import h5py

    from synpipe.embeddings.registry import load_registry

    path = Path(__file__).parents[2] / "data" / "encoders.yaml"
    encoder = open_encoder(next(iter(load_registry(path).values())), path.parent)
    with open(real_em / "vnc_stack1_points.csv") as handle:
        points = [row for row in csv.DictReader(handle) if row["structure"] in ("synapse", "mitochondrion")]
    with h5py.File(real_em / "vnc_stack1.h5") as file:
        raw = np.pad(file["volumes/raw"][:], ((1, 1), (128, 128), (128, 128)), mode="reflect")
    z, y, x = (
        np.array([float(p[f"{a}_nm"]) / s for p in points]).astype(int)
        for a, s in zip("zyx", (50, 4.6, 4.6), strict=True)
    )
    vectors = embed_shard(
        encoder,
        lambda rows: np.stack([raw[z[r] : z[r] + 3, y[r] : y[r] + 256, x[r] : x[r] + 256] for r in rows]),
        [str(row) for row in range(len(points))],
    )
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    similarity = unit @ unit.T
    similarity[np.hypot(y[:, None] - y, x[:, None] - x) < 256] = -1  # tiles that share pixels would be too easy
    synapse = np.array([point["structure"] == "synapse" for point in points])
    votes = synapse[np.argsort(-similarity, axis=1)[:, :5]].mean(axis=1) > 0.5
    balanced = (votes[synapse].mean() + (~votes[~synapse]).mean()) / 2
    assert balanced > 0.6
