"""Tables in batches: however rows are cut into batches, the results are the same as for the whole table."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from synpipe.errors import SynpipeError
from synpipe.store import streams
from synpipe.store.streams import ContentDigest, RowsById, SmallestHashes, by_shard, column_of, read_batches, rebatch


@pytest.fixture
def table() -> pa.Table:
    random = np.random.default_rng(0)
    count = 500
    return pa.table(
        {
            "synapse_id": random.permutation(10 * count)[:count] + 2**62,
            "shard": pa.array(np.sort(random.choice([3, 4, 9, 70_000], count)), pa.int32()),
            "content_hash": [f"{number:032x}" for number in random.integers(0, 300, count)],
            "label": [None if row % 5 == 0 else f"class {row % 3}" for row in range(count)],
        }
    )


def cut(table: pa.Table, seed: int = 0) -> list[pa.Table]:
    """Cut a table into batches of random sizes, some of them empty."""
    borders = np.sort(np.random.default_rng(seed).integers(0, len(table), 20)).tolist()
    return [table.slice(start, end - start) for start, end in zip([0, *borders], [*borders, len(table)], strict=True)]


def test_shards_are_whole_however_the_rows_are_cut(table: pa.Table):
    found = dict(by_shard(cut(table)))
    assert [*found] == [3, 4, 9, 70_000]
    assert pa.concat_tables(found.values()).to_pylist() == table.to_pylist()
    assert all(set(rows["shard"].to_pylist()) == {shard} for shard, rows in found.items())
    assert dict(by_shard([])) == dict(by_shard([table.slice(0, 0)])) == {}


def test_rows_are_found_by_id_in_any_order_and_unknown_ones_are_null(table: pa.Table, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(streams, "LOOKUP_BATCH_ROWS", 64)
    order = np.random.default_rng(1).permutation(len(table))
    wanted = np.insert(table["synapse_id"].to_numpy()[order], [0, 7], [1, 2**63 - 1])
    with RowsById(cut(table), tmp_path) as rows:
        found = rows.take(wanted)
        assert rows.take(wanted[:0]).num_rows == 0
        assert rows.knows(wanted).sum() == len(table)
    assert not list(tmp_path.iterdir())
    unknown = dict.fromkeys(table.column_names)
    expected = table.take(order).to_pylist()
    assert found.to_pylist() == [unknown, *expected[:7], unknown, *expected[7:]]
    with RowsById([table.slice(0, 0)]) as rows:
        assert rows.take(wanted[:2]).to_pylist() == [unknown, unknown]


def test_the_smallest_hashes_are_those_of_the_whole_table(table: pa.Table):
    for keys in (["content_hash"], ["content_hash", "synapse_id"]):
        for count in (5, 100, 10_000):
            smallest = SmallestHashes(keys, count)
            for batch in cut(table, count):
                smallest.add(batch)
            expected = sorted({tuple(row[key] for key in keys) for row in table.select(keys).to_pylist()})[:count]
            assert [tuple(row[key] for key in keys) for row in smallest.rows().to_pylist()] == expected


def test_a_digest_depends_on_values_and_their_places_only(table: pa.Table):
    def digest_of(batches: list[pa.Table]) -> str:
        content = ContentDigest()
        for batch in batches:
            content.add(batch)
        return content.value()

    whole = digest_of([table])
    assert digest_of(cut(table, 1)) == digest_of(cut(table, 2)) == whole
    others = [
        table.slice(1),
        table.take([1, 0, *range(2, len(table))]),
        table.rename_columns(["synapse_id", "shard", "content_hash", "name"]),
        table.set_column(3, "label", table["label"].fill_null("null")),
    ]
    assert len({whole, *(digest_of([other]) for other in others)}) == 5


def test_a_column_by_ids_and_batches_of_one_size(table: pa.Table, tmp_path: Path):
    path = tmp_path / "table.parquet"
    pq.write_table(table, path, row_group_size=70)
    sorted_table = table.sort_by("synapse_id")
    ids = np.append(sorted_table["synapse_id"].to_numpy(), 2**63 - 1)
    assert column_of(path, ids, "label").tolist() == [*sorted_table["label"].to_pylist(), None]
    assert column_of(path, ids[:0], "label").tolist() == []
    assert pa.concat_tables(read_batches(path, ["label"])).equals(table.select(["label"]))
    batches = [*rebatch(cut(table), 90)]
    assert [len(batch) for batch in batches] == [90] * 5 + [50]
    assert pa.concat_tables(batches).to_pylist() == table.to_pylist()


def test_an_absent_and_a_damaged_file_are_named(table: pa.Table, tmp_path: Path):
    path = tmp_path / "table.parquet"
    with pytest.raises(SynpipeError, match=r"table\.parquet does not exist"):
        next(read_batches(path))
    pq.write_table(table, path)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(SynpipeError, match=r"table\.parquet is damaged"):
        next(read_batches(path))
