"""The embedding table: the columns that other tools rely on, the accuracy of rounded vectors, and the size of the file."""

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from synpipe.assets.embedding_table import DERIVED_FIELDS
from synpipe.embeddings.table import round_vectors, table_schema, write_embedding_table
from synpipe.embeddings.vectors import read_vectors
from synpipe.errors import SynpipeError
from synpipe_tests.support.tables import PROVENANCE, clustered, embedding_table, synapses, tiles_of, unit

# The contract with other tools. Whoever changes it must raise `pipeline.TABLE_SCHEMA_VERSION`.
COLUMNS = {
    "synapse_id": "int64",
    "x_nm": "double",
    "y_nm": "double",
    "z_nm": "double",
    "neuron_id": "int64",
    "hemilineage": "string",
    "region": "string",
    "neurotransmitter": "string",
    "confidence": "float",
    "source": "string",
    "source_id": "string",
    "content_hash": "string",
    "pad_fraction": "float",
    "missing_sections": "uint8",
    "vector": "fixed_size_list<element: float>[16]",
    "norm": "float",
    "predicted_neurotransmitter": "string",
    "predicted_probability": "float",
    "class_probabilities": "list<element: float>",
    "split": "string",
    "map_x": "float",
    "map_y": "float",
    "encoder": "string",
    "encoder_fingerprint": "string",
    "dataset_version": "string",
}


def ten_nearest(vectors: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """Rows of the ten most similar vectors, without the query itself."""
    similarity = vectors[queries] @ vectors.T
    similarity[np.arange(len(queries)), queries] = -np.inf
    return np.argpartition(-similarity, 10, axis=1)[:, :10]


def test_columns_and_types_are_those_that_are_documented(tmp_path: Path) -> None:
    path = embedding_table(tmp_path / "table.parquet", clustered(50, 16), shards=3)
    schema = pq.read_schema(path)
    assert {field.name: str(field.type) for field in schema} == COLUMNS
    assert schema.equals(table_schema(16, DERIVED_FIELDS))
    assert {field.name for field in schema if not field.nullable} == {
        *("synapse_id", "content_hash", "vector", "norm", "encoder", "encoder_fingerprint", "dataset_version")
    }


def test_rows_carry_their_synapse_tile_and_vector(tmp_path: Path) -> None:
    vectors = clustered(7, 16)
    table = synapses(
        9,
        synapse_id=np.arange(9) * 10 + 2**62,
        x_nm=np.arange(9) / 2,
        neurotransmitter=["gaba", None, "dopamine"] * 3,
        source_id=[f"s{place}" for place in range(9)],
    )
    # Two synapses have no tile, and the tiles are in another order than the synapses.
    order = [8, 0, 3, 5, 2, 7, 1]
    tiles = tiles_of(table.take(order), shards=2)
    rows = write_embedding_table(
        tmp_path / "table.parquet",
        [table.slice(0, 4), table.slice(4)],
        [tiles.slice(0, 5), tiles.slice(5)],
        lambda _, hashes: vectors[[int(content, 16) for content in hashes]],
        PROVENANCE,
    )
    found = pq.read_table(tmp_path / "table.parquet")
    assert rows == len(found) == 7
    for name in table.column_names:
        assert found[name].to_pylist() == table[name].take(order).to_pylist()
    assert found["content_hash"].to_pylist() == tiles["content_hash"].to_pylist()
    np.testing.assert_allclose(found["norm"].to_numpy(), np.linalg.norm(vectors, axis=1), rtol=1e-6)
    np.testing.assert_allclose(read_vectors(found), unit(vectors), atol=1 / 500)
    for name in ("encoder", "encoder_fingerprint", "dataset_version"):
        assert set(found[name].to_pylist()) == {PROVENANCE[name]}


def test_a_row_group_per_shard(tmp_path: Path) -> None:
    path = embedding_table(tmp_path / "table.parquet", clustered(100, 16), shards=4)
    metadata = pq.ParquetFile(path).metadata
    assert [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)] == [25] * 4


def test_where_it_comes_from_is_in_the_metadata(tmp_path: Path) -> None:
    path = embedding_table(tmp_path / "table.parquet", clustered(10, 16))
    assert json.loads(pq.read_schema(path).metadata[b"synpipe"]) == PROVENANCE


@settings(deadline=None, derandomize=True)
@given(st.sampled_from([1, 2, 3, 16, 100, 128, 192, 384, 768, 1000, 4096]), st.integers(0, 1000))
def test_rounding_errs_by_less_than_a_500th(dimensions: int, seed: int) -> None:
    exact = unit(np.random.default_rng(seed).standard_cauchy((5, dimensions))).astype(np.float32)
    rounded = round_vectors(exact)
    assert rounded.dtype == np.float32
    assert np.abs(rounded - exact).max() <= 1 / 500 / np.sqrt(dimensions)
    assert np.abs(np.linalg.norm(rounded, axis=1) - 1).max() <= 1 / 500
    np.testing.assert_array_equal(round_vectors(rounded), rounded)


@pytest.mark.parametrize(("dimensions", "spread"), [(192, 0.6), (192, 5.0), (512, 0.6), (32, 0.6)])
def test_rounded_vectors_have_the_same_neighbours(dimensions: int, spread: float) -> None:
    exact = unit(clustered(4000, dimensions, spread=spread)).astype(np.float32)
    queries = np.arange(0, 4000, 10)
    truth, found = ten_nearest(exact, queries), ten_nearest(round_vectors(exact), queries)
    recall = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(truth, found, strict=True)])
    assert recall >= 0.99


def test_the_file_is_smaller_than_gzipped_json(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Smaller than JSON of the same vectors, and of vectors with three decimals, which is what SynOminous wrote."""
    vectors = clustered(2000, 192)
    labels = np.random.default_rng(0).choice(["acetylcholine", "gaba", "glutamate"], 2000)
    path = embedding_table(tmp_path / "table.parquet", vectors, neurotransmitter=labels)
    table = pq.read_table(path)

    def gzipped(components: np.ndarray) -> int:
        rows = [
            {"s": number, "n": label, "v": vector}
            for number, label, vector in zip(
                table["synapse_id"].to_pylist(), labels.tolist(), components.tolist(), strict=True
            )
        ]
        return len(gzip.compress(json.dumps(rows, separators=(",", ":")).encode(), 6))

    parquet = path.stat().st_size
    same = gzipped(read_vectors(table).astype(np.float64))
    three_decimals = gzipped(np.round(unit(vectors), 3))
    values = 2000 * 192
    with capsys.disabled():
        print(
            f"\n  bytes a component, 2,000 × 192: Parquet {parquet / values:.2f}, JSON.gz of the same vectors "
            f"{same / values:.2f}, of three decimals {three_decimals / values:.2f}"
        )
    assert parquet < same
    assert parquet < three_decimals


def write(path: Path, vectors: np.ndarray, **changes: Any) -> None:
    table = synapses(len(vectors))
    arguments = {"synapses": table, "tiles": tiles_of(table, 2), **changes}
    write_embedding_table(
        path,
        [arguments["synapses"]],
        [arguments["tiles"]],
        lambda _, hashes: vectors[[int(content, 16) for content in hashes]],
        PROVENANCE,
    )


@pytest.mark.parametrize("value", [0.0, np.nan, np.inf])
def test_a_vector_without_a_length_is_an_error_and_leaves_the_former_file(tmp_path: Path, value: float) -> None:
    path = tmp_path / "table.parquet"
    vectors = clustered(20, 16)
    write(path, vectors)
    former = path.read_bytes()
    vectors[13] = value  # in the second row group, after the first was written
    with pytest.raises(SynpipeError, match=r"synapse 13 .* encoder tiny"):
        write(path, vectors)
    assert path.read_bytes() == former
    assert list(tmp_path.iterdir()) == [path]


def test_a_tile_of_no_synapse_and_no_tiles_are_errors(tmp_path: Path) -> None:
    path = tmp_path / "table.parquet"
    vectors = clustered(20, 16)
    with pytest.raises(SynpipeError, match=r"2 tiles belong to no synapse .* synapse 18"):
        write(path, vectors, synapses=synapses(18))
    with pytest.raises(SynpipeError, match="no tiles"):
        write(path, vectors, tiles=tiles_of(synapses(0)))
    assert not list(tmp_path.iterdir())


def test_an_error_of_the_vectors_leaves_nothing_half_written(tmp_path: Path) -> None:
    table = synapses(20)

    def read_vectors(shard: int, hashes: list[str]) -> np.ndarray:
        if shard == 1:
            raise SynpipeError("the vectors of shard 1 are not here")
        return clustered(len(hashes), 16)

    with pytest.raises(SynpipeError, match="shard 1"):
        write_embedding_table(tmp_path / "table.parquet", [table], [tiles_of(table, 2)], read_vectors, PROVENANCE)
    assert not list(tmp_path.iterdir())
