"""The chunk plan: every box is read once, the order of the input does not matter, and chunks are fetched about once."""

from collections import OrderedDict

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from synpipe.tiles.tile import TileSpec, shard_of
from synpipe.volumes.chunk_plan import Chunking, plan_batches, spatial_order

STEADY = settings(deadline=None, derandomize=True)

chunk_shapes = st.tuples(st.integers(1, 9), st.integers(1, 40), st.integers(1, 40))
chunkings = st.builds(Chunking, chunk_shapes, st.integers(0, 500))
corners = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 300), st.integers(0, 300)), min_size=1, max_size=60)
windows = st.tuples(st.integers(0, 11), st.integers(0, 70), st.integers(0, 70))


def boxes(corners: list[tuple[int, int, int]], window: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    low = np.unique(np.array(corners), axis=0)
    return low, low + window


def fetches(order: np.ndarray, low: np.ndarray, high: np.ndarray, chunking: Chunking) -> tuple[int, int]:
    """Number of chunks that an LRU cache fetches in this order, and number of different chunks that are needed."""
    cache: OrderedDict[tuple[int, ...], None] = OrderedDict()
    fetched, needed = 0, set()
    for box in order:
        for chunk in chunking.chunks(low[box], high[box]):
            fetched += chunk not in cache
            cache[chunk] = None
            cache.move_to_end(chunk)
            needed.add(chunk)
            if len(cache) > chunking.cached:
                cache.popitem(last=False)
    return fetched, len(needed)


@STEADY
@given(chunkings, st.tuples(*[st.integers(0, 60)] * 3), windows)
def test_the_chunks_of_a_box_are_those_that_hold_its_voxels(chunking, corner, window):
    low, high = np.array(corner), np.array(corner) + np.minimum(window, 20)
    found = list(chunking.chunks(low, high))
    voxels = np.stack(np.meshgrid(*map(np.arange, low, high), indexing="ij"), axis=-1).reshape(-1, 3)
    assert set(found) == set(map(tuple, (voxels // chunking.shape_zyx).tolist()))
    assert len(found) == len(set(found))


@STEADY
@given(corners, windows, chunkings, st.integers(1, 20), st.integers(1, 5), st.randoms(use_true_random=False))
def test_every_box_is_in_one_batch_whatever_the_order_of_the_input(
    corners, window, chunking, batch_size, shards, random
):
    low, high = boxes(corners, window)
    shard = shard_of(low, TileSpec(shards=shards, block_voxels_zyx=(7, 64, 64)))
    batches = plan_batches(low, high, shard, chunking, batch_size)
    assert sorted(np.concatenate(batches).tolist()) == list(range(len(low)))
    assert max(map(len, batches)) <= batch_size and min(map(len, batches)) > 0

    shuffled = list(range(len(low)))
    random.shuffle(shuffled)
    again = plan_batches(low[shuffled], high[shuffled], shard[shuffled], chunking, batch_size)
    assert [low[batch].tolist() for batch in batches] == [low[shuffled][batch].tolist() for batch in again]


@STEADY
@given(corners, windows, chunk_shapes)
def test_a_cache_that_holds_what_is_needed_fetches_each_chunk_once(corners, window, shape):
    low, high = boxes(corners, window)
    chunking = Chunking(shape, 10**9)
    fetched, needed = fetches(spatial_order(low, high, chunking), low, high, chunking)
    assert fetched == needed


def windows_in(shape: tuple[int, int, int], count: int, depth: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Random windows of tiles in a volume, some of them beyond its border: lower corners, upper corners, shards."""
    window = np.array([depth, 256, 256])
    starts = np.random.default_rng(0).integers(0, shape, (count, 3)) - window // 2
    return np.clip(starts, 0, shape), np.clip(starts + window, 0, shape), shard_of(starts, TileSpec())


def test_a_dense_volume_is_read_about_once_with_a_cache_much_smaller_than_it() -> None:
    cases = [
        ((64, 64, 64), (64, 4096, 4096), 1000, 3, 1024, 1.001),  # 4,077 chunks
        ((64, 64, 64), (256, 4096, 4096), 4000, 3, 1024, 1.1),
        ((64, 64, 64), (256, 4096, 4096), 4000, 11, 1024, 1.1),
        ((8, 79, 157), (125, 1250, 1250), 500, 3, 1352, 1.001),  # as h5py lays out a CREMI volume
        ((1, 256, 256), (60, 2048, 2048), 1000, 3, 500, 1.1),
        ((1, 5000, 5000), (60, 5000, 5000), 300, 3, 6, 1.001),  # sections
    ]
    for chunk, shape, count, depth, cached, bar in cases:
        low, high, shards = windows_in(shape, count, depth)
        chunking = Chunking(chunk, cached)
        batches = plan_batches(low, high, shards, chunking, 1024)
        fetched, needed = fetches(np.concatenate(batches), low, high, chunking)
        assert fetched <= bar * needed, (chunk, shape, fetched / needed)


def test_batches_follow_space_where_shards_share_chunks_and_are_of_one_shard_elsewhere() -> None:
    chunking = Chunking((64, 64, 64), 1024)
    low, high, shards = windows_in((64, 4096, 4096), 1000, 3)
    (dense,) = plan_batches(low, high, shards, chunking, 1024)
    assert len(set(shards[dense])) == 16
    one_by_one = np.argsort(shards, kind="stable")
    assert fetches(one_by_one, low, high, chunking)[0] > 1.5 * fetches(dense, low, high, chunking)[0]

    low, high, shards = windows_in((7000, 100_000, 200_000), 1000, 3)
    sparse = plan_batches(low, high, shards, chunking, 1024)
    assert len(sparse) == 16 and all(len(set(shards[batch])) == 1 for batch in sparse)


def test_batches_never_write_tiny_files_however_many_chunks_they_would_save() -> None:
    """The boxes are pairs of neighbours in different shards. The pairs are so far apart that a mixed batch would hold about
    one tile of each shard."""
    chunking = Chunking((64, 64, 64), 1024)
    pairs = np.random.default_rng(0).integers(0, (200, 100, 200), (200, 3)) * [32, 1024, 1024]
    low = np.concatenate([pairs + np.array([0, 0, x]) for x in (1023, 1024)])
    shards = shard_of(low, TileSpec(shards=100))
    assert all(
        len(set(shards[batch])) == 1
        for batch in plan_batches(low, low + np.array([3, 256, 256]), shards, chunking, 1024)
    )


def test_no_boxes_give_no_batches() -> None:
    none = np.zeros((0, 3), np.int64)
    assert plan_batches(none, none, none[:, 0], Chunking((1, 1, 1), 1), 10) == []
