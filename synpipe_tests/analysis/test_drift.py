"""Drift: the check passes if the vectors are unchanged, warns if they changed, and never stops the branch."""

import shutil
from pathlib import Path

import dagster as dg
import numpy as np
import pytest

from synpipe.analysis import drift
from synpipe.assets.asset import Finding
from synpipe.assets.embedding_table import have_not_drifted
from synpipe.assets.manifest import read_manifest
from synpipe.store.files import read_table, write_table
from synpipe_tests.support import changes
from synpipe_tests.support.changes import NAME, Own, make_outdated
from synpipe_tests.support.command import invoke
from synpipe_tests.support.tables import clustered, embedding_table

ENCODERS = ["tiny", "tiny+pca8"]


@pytest.fixture(scope="module")
def made(template: Own, tmp_path_factory: pytest.TempPathFactory) -> Own:
    """A network and a compressed encoder fitted on its vectors, materialised once. Shared: copy it, do not change it."""
    own = changes.copy(template, tmp_path_factory.mktemp("made"))
    own.edit_dataset(lambda content: content.update(encoders=ENCODERS, evaluation=None))
    make_outdated(own.dataset)
    return own


@pytest.fixture
def own(made: Own, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Own:
    return changes.copy(made, tmp_path / "own", monkeypatch)


def finding(own: Own, encoder: str = "tiny") -> Finding:
    return have_not_drifted(own.dataset, encoder)


def add_a_synapse(own: Own) -> None:
    own.edit_synapses(
        lambda rows: rows.append({**rows[0], "synapse_id": "900", "x_nm": str(float(rows[0]["x_nm"]) + 500)})
    )


def disturb(own: Own, encoder: str, amount: float) -> None:
    """Add noise to all cached vectors of an encoder. amount: as a share of a vector's length."""
    fingerprint = read_manifest(own.dataset, f"embeddings_{encoder}").figures["encoder_fingerprint"]
    random = np.random.default_rng(0)
    for path in (own.dataset.embeddings_folder / fingerprint).glob("*.parquet"):
        table = read_table(path)
        column = table["vector"].combine_chunks()
        vectors = column.flatten().to_numpy().reshape(len(table), -1)
        noise = (
            random.normal(size=vectors.shape) * np.linalg.norm(vectors, axis=1, keepdims=True) / vectors.shape[1] ** 0.5
        )
        values = (vectors + amount * noise).astype(np.float32).ravel()
        changed = type(column).from_arrays(values, vectors.shape[1])
        write_table(path, table.set_column(1, "vector", changed).replace_schema_metadata(table.schema.metadata))


def test_a_first_version_has_nothing_to_be_compared_with(own: Own) -> None:
    assert finding(own).passed
    assert "nothing to compare" in finding(own).description


def test_added_and_relabelled_synapses_are_no_drift(own: Own) -> None:
    add_a_synapse(own)
    make_outdated(own.dataset)
    for encoder in ("tiny", "tiny_pca8"):  # the first is unchanged, the second is fitted again
        found = finding(own, encoder)
        assert found.passed, found.description
        assert found.figures["matched rows"] == 40
        assert found.figures["cosine, 1st percentile"] > 0.98
    assert finding(own).figures["same encoder"]
    assert not finding(own, "tiny_pca8").figures["same encoder"]
    own.edit_synapses(lambda rows: rows[5].update(neurotransmitter="dopamine"))
    make_outdated(own.dataset)
    assert finding(own).passed


def test_a_disturbed_cache_is_a_warning_and_stops_nothing(own: Own) -> None:
    disturb(own, "tiny", 0.3)
    add_a_synapse(own)
    done = invoke(own.project, "materialize", "--dataset", NAME, "--stale")
    assert done.exit_code == 0, done.stderr
    assert "drift: The vectors of the same tiles changed" in done.stderr
    assert own.outdated() == {}
    found = finding(own)
    assert not found.passed
    assert found.severity == "warning"
    with own.instance() as instance:
        key = dg.AssetCheckKey(dg.AssetKey([NAME, "tiny", "embedding_table"]), "drift")
        (record,) = instance.event_log_storage.get_asset_check_execution_history(key, limit=1)
        evaluation = record.event.dagster_event.event_specific_data  # type: ignore[union-attr]
    assert not evaluation.passed
    assert evaluation.severity == dg.AssetCheckSeverity.WARN


def test_vectors_of_another_length_are_a_warning(own: Own) -> None:
    """Vectors with the same directions and twice the length, as after a change of contrast."""
    fingerprint = read_manifest(own.dataset, "embeddings_tiny").figures["encoder_fingerprint"]
    for path in (own.dataset.embeddings_folder / fingerprint).glob("*.parquet"):
        table = read_table(path)
        column = table["vector"].combine_chunks()
        doubled = type(column).from_arrays(column.flatten().to_numpy() * 2, column.type.list_size)
        write_table(path, table.set_column(1, "vector", doubled).replace_schema_metadata(table.schema.metadata))
    add_a_synapse(own)
    make_outdated(own.dataset)
    assert "norm of the vectors" in finding(own).description


def test_another_network_under_the_same_name_is_told_as_such(own: Own) -> None:
    own.edit_encoders(lambda entries: entries["tiny"].update(seed=1))
    make_outdated(own.dataset)
    for encoder in ("tiny", "tiny_pca8"):
        found = finding(own, encoder)
        assert (found.passed, found.severity) == (False, "warning")
        assert "The encoder changed" in found.description
    own.edit_encoders(lambda entries: entries["tiny"].update(model="test_vit"))  # with another number of dimensions
    make_outdated(own.dataset)
    assert "The encoder changed" in finding(own).description


def test_a_table_that_cannot_be_read_is_a_first_version_again(own: Own) -> None:
    path = own.dataset.table_path("tiny")
    path.write_bytes(path.read_bytes()[:-100])
    add_a_synapse(own)
    make_outdated(own.dataset)
    assert "nothing to compare" in finding(own).description


def test_the_sample_is_of_the_same_tiles_in_every_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drift, "SAMPLE_ROWS", 50)
    vectors = clustered(400, 16)
    samples = []
    for count, shards in ((400, 3), (300, 1)):
        path = embedding_table(tmp_path / f"{count}.parquet", vectors[:count], shards)
        samples.append(drift.take_sample(path))
    assert samples[0]["content_hash"].to_pylist() == [f"{row:032x}" for row in range(50)]
    assert samples[0].equals(samples[1])
    shutil.rmtree(tmp_path)
