"""Reads the tables of a materialised data set with pandas, Polars, DuckDB, PyTorch, LanceDB and Node, without synpipe's code."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import duckdb
import lancedb
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.dataset as pa_dataset
import pyarrow.parquet as pq
import pytest
import torch

from synpipe.datasets import Dataset
from synpipe_tests.support.tables import unit

ENCODER = "tiny"
NODE = Path(__file__).resolve().parents[1] / "node"
INTEGERS, NUMBERS, TEXTS = ("synapse_id", "neuron_id"), ("x_nm", "y_nm", "z_nm"), ("neurotransmitter", "region")


@pytest.fixture(scope="module")
def parquet(made: Dataset) -> Path:
    return made.table_path(ENCODER)


@pytest.fixture(scope="module")
def rows(parquet: Path) -> pa.Table:
    """The content of the file, read with PyArrow as the reference."""
    return pq.read_table(parquet)


@pytest.fixture(scope="module")
def vectors(rows: pa.Table) -> np.ndarray:
    return np.array(rows["vector"].to_pylist(), np.float32)


@pytest.fixture
def lance_table(made: Dataset) -> Any:
    table = lancedb.connect(made.lancedb_folder).open_table(ENCODER)
    table.checkout("current")
    return table


def nearest_ids(vectors: np.ndarray, rows: pa.Table, query: int) -> list[int]:
    similarity = unit(vectors) @ unit(vectors)[query]
    return rows["synapse_id"].to_numpy()[np.argsort(-similarity, kind="stable")[:10]].tolist()


def test_the_table_is_not_trivial(rows: pa.Table, vectors: np.ndarray) -> None:
    assert len(rows) > 50
    assert len(set(rows["neurotransmitter"].to_pylist())) > 3
    assert np.ptp(vectors, axis=0).max() > 0.01


def test_pandas(parquet: Path, rows: pa.Table, vectors: np.ndarray) -> None:
    frame = pd.read_parquet(parquet)
    assert frame["synapse_id"].dtype == np.int64
    assert frame["synapse_id"].tolist() == rows["synapse_id"].to_pylist()
    assert frame["neurotransmitter"].isna().sum() == rows["neurotransmitter"].null_count > 0
    np.testing.assert_array_equal(np.stack(frame["vector"].to_list()), vectors)
    # With pandas' own types, a column of ids with a null becomes float64, which is exact up to 2^53 only.
    exact = pd.read_parquet(parquet, dtype_backend="pyarrow")
    for name in (*INTEGERS, *NUMBERS, *TEXTS):
        assert pa.array(exact[name]).to_pylist() == rows[name].to_pylist()


def test_polars(parquet: Path, rows: pa.Table, vectors: np.ndarray) -> None:
    frame = pl.read_parquet(parquet)
    assert frame.schema["vector"] == pl.Array(pl.Float32, vectors.shape[1])
    assert frame.schema["synapse_id"] == pl.Int64 and frame.schema["neurotransmitter"] == pl.String
    for name in (*INTEGERS, *NUMBERS, *TEXTS):
        assert frame[name].to_list() == rows[name].to_pylist()
    np.testing.assert_array_equal(frame["vector"].to_numpy(), vectors)
    lazily = pl.scan_parquet(parquet).group_by("neurotransmitter").len().collect()
    assert dict(lazily.rows()) == {
        row["values"]: row["counts"] for row in rows["neurotransmitter"].value_counts().to_pylist()
    }


def test_duckdb(parquet: Path, rows: pa.Table, vectors: np.ndarray) -> None:
    with duckdb.connect() as connection:
        found = connection.execute(f"SELECT synapse_id, x_nm, neurotransmitter FROM '{parquet}'").fetchall()
        assert found == list(
            zip(*(rows[name].to_pylist() for name in ("synapse_id", "x_nm", "neurotransmitter")), strict=True)
        )
        columns = dict(connection.execute(f"SELECT column_name, column_type FROM (DESCRIBE '{parquet}')").fetchall())
        assert columns["synapse_id"] == "BIGINT" and columns["x_nm"] == "DOUBLE"
        size = vectors.shape[1]
        # A search in pure SQL.
        query = rows["synapse_id"][5].as_py()
        answer = connection.execute(
            f"""
            SELECT t.synapse_id FROM '{parquet}' t, (FROM '{parquet}' WHERE synapse_id = {query}) q
            ORDER BY array_cosine_distance(t.vector::FLOAT[{size}], q.vector::FLOAT[{size}]) LIMIT 10
            """
        ).fetchall()
    found_ids, expected = [row[0] for row in answer], nearest_ids(vectors, rows, 5)
    assert found_ids[0] == query
    assert len(set(found_ids) & set(expected)) >= 9  # two synapses may be equally near


def test_torch(parquet: Path, rows: pa.Table, vectors: np.ndarray) -> None:
    """Batches for a classifier are read without loading the whole table into memory."""

    class Batches(torch.utils.data.IterableDataset):
        def __iter__(self):
            for batch in pa_dataset.dataset(parquet).to_batches(columns=["synapse_id", "vector"], batch_size=16):
                flat = batch["vector"].flatten().to_numpy()
                yield torch.from_numpy(batch["synapse_id"].to_numpy().copy()), torch.tensor(flat).view(len(batch), -1)

    batches = list(torch.utils.data.DataLoader(Batches(), batch_size=None))
    ids, values = (torch.cat(parts) for parts in zip(*batches, strict=True))
    assert len(batches) > 3 and values.dtype == torch.float32 and ids.dtype == torch.int64
    assert ids.tolist() == rows["synapse_id"].to_pylist()
    np.testing.assert_array_equal(values.numpy(), vectors)


def test_each_row_group_can_be_read_alone(parquet: Path, rows: pa.Table) -> None:
    file = pq.ParquetFile(parquet)
    assert file.num_row_groups == 3
    parts = [file.read_row_group(group, columns=["synapse_id"]) for group in range(3)]
    assert pa.concat_tables(parts)["synapse_id"].equals(rows["synapse_id"])


def test_lancedb_itself(lance_table: Any, rows: pa.Table, vectors: np.ndarray) -> None:
    table = lance_table.to_arrow()
    for name in (*INTEGERS, *NUMBERS, *TEXTS, "content_hash", "norm"):
        assert table[name].to_pylist() == rows[name].to_pylist()
    found = lance_table.search(vectors[5]).distance_type("cosine").limit(10).to_pandas()
    assert len(set(found["synapse_id"]) & set(nearest_ids(vectors, rows, 5))) >= 9
    stored = np.array(table["vector"].to_pylist())
    np.testing.assert_allclose(np.linalg.norm(stored, axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(stored, vectors, atol=2e-3)


def test_duckdb_polars_and_torch_over_lancedb(lance_table: Any, rows: pa.Table, vectors: np.ndarray) -> None:
    lance_rows = lance_table.to_arrow()  # DuckDB finds the variable by its name
    counts = duckdb.sql("SELECT neurotransmitter, count(*) FROM lance_rows GROUP BY 1").fetchall()
    assert dict(counts) == {row["values"]: row["counts"] for row in rows["neurotransmitter"].value_counts().to_pylist()}
    assert pl.from_arrow(lance_rows)["synapse_id"].to_list() == rows["synapse_id"].to_pylist()
    values = torch.from_dlpack(lance_rows["vector"].combine_chunks().flatten()).view(len(rows), -1)
    np.testing.assert_allclose(values.numpy(), vectors, atol=2e-3)


def test_duckdb_over_a_lance_data_set(lance_table: Any, rows: pa.Table) -> None:
    pytest.importorskip("lance", reason="pylance is not installed: `pip install pylance`")
    lance_data = lance_table.to_lance()  # DuckDB finds the variable by its name
    assert lance_data.count_rows() == len(rows)
    near = duckdb.sql(
        "SELECT synapse_id FROM lance_data WHERE neurotransmitter = 'gaba' ORDER BY synapse_id"
    ).fetchall()
    assert [row[0] for row in near] == sorted(
        row["synapse_id"]
        for row in rows.select(["synapse_id", "neurotransmitter"]).to_pylist()
        if row["neurotransmitter"] == "gaba"
    )


def test_node(made: Dataset, rows: pa.Table, vectors: np.ndarray) -> None:
    """LanceDB's client for Node, which is older than the library that wrote the table."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("node is not installed")
    if not (NODE / "node_modules").is_dir():
        pytest.skip(f"the packages for Node are not installed: npm ci --prefix {NODE}")
    query = rows["synapse_id"][5].as_py()
    command = [node, str(NODE / "read.mjs"), str(made.lancedb_folder), ENCODER, str(query)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert found["rows"] == len(rows)
    assert list(found["columns"]) == rows.column_names
    assert found["columns"]["vector"] == f"FixedSizeList[{vectors.shape[1]}]<Float32>"
    assert found["columns"]["synapse_id"] == "Int64" and found["columns"]["neurotransmitter"] == "Utf8"
    assert found["provenance"]["encoder"] == ENCODER
    nearest = found["nearest"]
    assert nearest[0]["id"] == str(query) and nearest[0]["distance"] == pytest.approx(0, abs=1e-5)
    similarity = np.sort(unit(vectors) @ unit(vectors)[5])[::-1]
    np.testing.assert_allclose([row["distance"] for row in nearest], 1 - similarity[:10], atol=1e-4)
    labels = {str(row["synapse_id"]): row["neurotransmitter"] for row in rows.to_pylist()}
    assert [row["neurotransmitter"] for row in nearest] == [labels[row["id"]] for row in nearest]


def test_the_lock_of_the_node_packages_names_no_registry() -> None:
    """Users install the packages from their own registry."""
    lock = json.loads((NODE / "package-lock.json").read_text())
    assert len(lock["packages"]) > 10
    assert not [name for name, package in lock["packages"].items() if "resolved" in package]
    asked: dict = json.loads((NODE / "package.json").read_text())["dependencies"]
    assert {name: lock["packages"][f"node_modules/{name}"]["version"] for name in asked} == asked
