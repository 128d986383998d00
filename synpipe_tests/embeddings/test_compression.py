"""Compressed encoders: the fit compared with scikit-learn, names, errors, and a branch of the graph that embeds no tile."""

from pathlib import Path

import numpy as np
import pytest
import yaml
from sklearn.decomposition import PCA

from synpipe.assets.compressed import open_branch
from synpipe.assets.graph import states
from synpipe.assets.manifest import read_manifest
from synpipe.assets.rgb_tiles import open_tiles
from synpipe.embeddings.compression import fit, load
from synpipe.embeddings.encoder_specs import CompressedSpec
from synpipe.embeddings.encoders import open_encoder
from synpipe.embeddings.registry import chosen_encoders, load_registry
from synpipe.errors import SynpipeError
from synpipe.index.search import SynapseIndex
from synpipe.reports.housekeeping import find_leftovers, remove_leftovers
from synpipe.store.files import read_table
from synpipe_tests.support import changes
from synpipe_tests.support.changes import Own, make_outdated
from synpipe_tests.support.command import answer, refusal
from synpipe_tests.support.command import invoke as run
from synpipe_tests.support.tables import clustered, unit

NAMES = ["tiny+pca8", "tiny", "tiny+ae8", "other"]


def spec_of(method: str = "pca", dimensions: int = 8) -> CompressedSpec:
    return CompressedSpec(base="tiny", method=method, dimensions=dimensions)  # type: ignore[arg-type]


# The fit.


def test_pca_is_that_of_scikit_learn() -> None:
    vectors = clustered(600, 24, clusters=5)
    fitted, kept = fit(vectors, spec_of())
    exact = PCA(n_components=8, svd_solver="full").fit(unit(vectors))
    np.testing.assert_allclose(fitted.compress(vectors), exact.transform(unit(vectors)), atol=1e-5)
    assert kept == pytest.approx(exact.explained_variance_ratio_.sum(), abs=1e-5)


def test_the_autoencoder_is_the_same_each_time_and_reconstructs_directions_no_worse_than_pca() -> None:
    vectors = clustered(2000, 24, clusters=9)
    first, again = (fit(vectors, spec_of("linear_autoencoder"))[0] for _ in range(2))
    assert first.to_bytes() == again.to_bytes()
    pca, _ = fit(vectors, spec_of())
    centred = unit(vectors) - pca.mean

    def lost(codes: np.ndarray) -> float:
        """1 − cosine between the vectors and the best linear reconstruction from their codes."""
        back = codes @ np.linalg.lstsq(codes, centred, rcond=None)[0]
        return float(
            1 - ((back * centred).sum(1) / np.linalg.norm(back, axis=1) / np.linalg.norm(centred, axis=1)).mean()
        )

    assert first.to_bytes() != pca.to_bytes()
    assert lost(first.compress(vectors)) < 1.01 * lost(pca.compress(vectors))


@pytest.mark.parametrize(
    ("count", "dimensions", "message"),
    [(100, 24, "saves nothing"), (100, 30, "24 dimensions"), (8, 8, "at least 9")],
)
def test_what_cannot_be_fitted_is_refused(count: int, dimensions: int, message: str) -> None:
    with pytest.raises(SynpipeError, match=message):
        fit(clustered(count, 24), spec_of(dimensions=dimensions))


def test_a_fit_is_kept_as_safetensors_and_a_damaged_one_is_refused(tmp_path: Path) -> None:
    fitted, _ = fit(clustered(60, 12), spec_of())
    path = tmp_path / "fit.safetensors"
    path.write_bytes(fitted.to_bytes())
    vectors = clustered(5, 12, seed=1)
    np.testing.assert_array_equal(load(path).compress(vectors), fitted.compress(vectors))
    path.write_bytes(fitted.to_bytes()[:-7])
    with pytest.raises(SynpipeError, match=r"fit\.safetensors cannot be read"):
        load(path)


# Names.


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["tiny+pca8"], "not among the `encoders:`"),
        (["tiny", "nobody+pca8"], "'nobody', which is not among"),
        (["tiny", "small", "small+pca4"], "'small', which is compressed itself"),
        (["tiny", "tiny+pca8", "twice"], "'tiny_pca8', which is compressed itself"),
        (["tiny", "tiny+ica8"], "nor is it of the form"),
        (["tiny", "tiny+pca"], "nor is it of the form"),
        (["tiny", "tiny+pca1"], "dimensions"),
        (["tiny", "tiny+pca9"], "rename that entry"),
    ],
)
def test_names_that_are_refused(tmp_path: Path, names: list[str], message: str) -> None:
    path = tmp_path / "encoders.yaml"
    entries = {
        **changes.ENCODERS,
        "small": {"base": "tiny", "method": "pca", "dimensions": 8},
        "twice": {"base": "tiny_pca8", "method": "pca", "dimensions": 4},
        "tiny_pca9": changes.ENCODERS["other"],
    }
    path.write_text(yaml.safe_dump({"encoders": entries}))
    with pytest.raises(SynpipeError, match=message) as caught:
        chosen_encoders(names, load_registry(path), "here.yaml")
    assert "here.yaml" in str(caught.value)


# The branch.


@pytest.fixture(scope="module")
def compressed(template: Own, tmp_path_factory: pytest.TempPathFactory) -> Own:
    """The template store with two more, compressed encoders. Tests share it: copy it, do not change it."""
    own = changes.copy(template, tmp_path_factory.mktemp("compressed"))
    own.edit_dataset(lambda content: content.update(encoders=NAMES))
    make_outdated(own.dataset)
    return own


@pytest.fixture
def own(compressed: Own, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Own:
    return changes.copy(compressed, tmp_path / "own", monkeypatch)


def test_a_compressed_branch_needs_no_tile_and_leaves_its_base_alone(
    template: Own, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = changes.copy(template, tmp_path / "own", monkeypatch)

    def base() -> dict[str, bytes]:
        return {name: content for name, content in own.branch_files("tiny").items() if name != "evaluation.json"}

    before = base()
    own.edit_dataset(lambda content: content.update(encoders=["tiny", "other", "tiny+pca8"]))
    expected = {f"{kind}_tiny_pca8" for kind in ("embeddings", "embedding_table", "index", "scores")} | {"evaluation"}
    assert own.outdated().keys() == expected
    tiles = own.dataset.cut_outs_folder
    tiles.rename(own.folder / "elsewhere")  # so that no tile can be read
    make_outdated(own.dataset)
    assert own.outdated() == {}
    (own.folder / "elsewhere").rename(tiles)
    ran = own.materialise("embeddings_tiny+pca8+")
    assert ran.assets == expected
    assert ran.embedded == {"tiny_pca8": 0}
    assert base() == before

    own.edit_dataset(lambda content: content.update(encoders=["tiny", "other"]))
    remove_leftovers(find_leftovers(own.dataset))
    assert own.outdated() == {"evaluation": "stale"}  # it covers all encoders
    assert not list(own.folder.rglob("*pca8*.parquet"))
    assert not list(own.folder.rglob("*.safetensors"))
    assert base() == before


def test_the_table_holds_the_principal_components_of_the_base(compressed: Own) -> None:
    dataset = compressed.dataset
    tiny, pca = (read_table(dataset.table_path(name)).sort_by("synapse_id") for name in ("tiny", "tiny_pca8"))
    exact = PCA(n_components=8).fit_transform(unit(np.array(tiny["vector"].to_pylist())))
    exact /= np.linalg.norm(exact, axis=1, keepdims=True)
    np.testing.assert_allclose(
        np.abs(np.array(pca["vector"].to_pylist())), np.abs(exact), atol=0.02
    )  # both are rounded
    counts = {name: read_manifest(dataset, f"embedding_table_{name}").figures for name in ("tiny", "tiny_pca8")}
    assert counts["tiny_pca8"]["bytes_per_vector"] < counts["tiny"]["bytes_per_vector"] / 4
    costs = {name: read_manifest(dataset, f"index_{name}").figures for name in ("tiny", "tiny_pca8")}
    assert costs["tiny_pca8"]["bytes"] < costs["tiny"]["bytes"]
    assert costs["tiny_pca8"]["query_ms"] > 0


def test_a_compressed_encoder_is_searched_under_both_names_and_may_be_the_default(compressed: Own) -> None:
    query = read_table(compressed.dataset.tiles_path)["synapse_id"][0].as_py()
    outputs = [
        answer(compressed.project, "search", str(query), "-d", changes.NAME, *option)
        for option in ([], ["-e", "tiny+pca8"], ["-e", "tiny_pca8"])
    ]
    assert outputs[0] == outputs[1] == outputs[2]
    assert "encoder tiny_pca8" in outputs[0]
    refused = refusal(run(compressed.project, "search", str(query), "-d", changes.NAME, "-e", "tiny+pca16"))
    assert "tiny_pca8" in refused


def test_a_tile_from_elsewhere_is_embedded_as_those_of_the_table_were(compressed: Own) -> None:
    dataset = compressed.dataset
    encoder = open_branch(dataset, "tiny_ae8", "cpu")
    index = SynapseIndex(dataset, "tiny_ae8")
    reader = open_tiles(dataset)
    query = read_table(dataset.tiles_path)["synapse_id"][3].as_py()
    (vector,) = encoder.embed(reader.by_id(query)[None])
    answers = index.search_vector(vector, encoder.fingerprint, per_class=1)
    nearest = min((neighbours[0] for neighbours in answers.values()), key=lambda neighbour: neighbour.distance)
    assert nearest.synapse_id == query
    assert nearest.distance < 1e-3
    base = open_encoder(dataset.encoders["tiny"], dataset.weights_base, "cpu")
    assert base.fingerprint != encoder.fingerprint


def test_added_synapses_and_another_base_lead_to_the_store_that_is_made_from_scratch(own: Own) -> None:
    own.edit_dataset(lambda content: content.update(encoders=["tiny", "tiny+pca8"]))
    remove_leftovers(find_leftovers(own.dataset))
    own.edit_synapses(
        lambda rows: rows.append({**rows[0], "synapse_id": "900", "x_nm": str(float(rows[0]["x_nm"]) + 500)})
    )
    make_outdated(own.dataset)
    own.is_as_from_scratch()
    own.edit_encoders(lambda entries: entries["tiny"].update(seed=5))
    stale = {state.asset for state in states(own.dataset) if state.state != "fresh"}
    assert {asset for asset in stale if asset.startswith("embeddings_")} == {
        *("embeddings_tiny", "embeddings_tiny_pca8")
    }
    make_outdated(own.dataset)
    own.is_as_from_scratch()
    remove_leftovers(find_leftovers(own.dataset))
    assert own.outdated() == {}
    kept = {path.name for path in own.dataset.embeddings_folder.iterdir() if any(path.iterdir())}
    assert len(kept) == 2
    assert {path.stem for path in own.dataset.compressor_path("any").parent.iterdir()} < kept


def test_too_many_dimensions_stop_the_branch_with_a_sentence(own: Own) -> None:
    own.edit_dataset(lambda content: content.update(encoders=["tiny", "tiny+pca128", "tiny+pca512"]))
    message = refusal(run(own.project, "materialize", "-d", changes.NAME, "-s", "embeddings_tiny_pca128"))
    assert "at least 129 are needed" in message
    message = refusal(run(own.project, "materialize", "-d", changes.NAME, "-s", "embeddings_tiny_pca512"))
    assert "tiny has 512 dimensions" in message
