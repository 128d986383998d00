"""Manifests: a checksum that damage does not pass, and those of former formats."""

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from synpipe import __version__
from synpipe.assets.manifest import FORMAT, Manifest, find_manifest, list_versions, read_manifest, write_manifest
from synpipe.datasets import Dataset, Project
from synpipe.errors import SynpipeError
from synpipe_tests.conftest import write_project

MANIFEST = Manifest(
    asset="rgb_tiles",
    data_version="d" * 32,
    code_version="1-abc",
    inputs={"synapse_stacks": "e" * 32},
    facts={"stacking": "rgb"},
    figures={"padded": 3, "shape": (1, 2)},
    rows=17,
    notes=["Three tiles are padded."],
)


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    project: Project = write_project(tmp_path)
    return project.dataset("demo")


def test_a_manifest_reads_back_as_it_was_written(dataset: Dataset):
    write_manifest(dataset, MANIFEST)
    assert asdict(read_manifest(dataset, "rgb_tiles")) == json.loads(json.dumps(asdict(MANIFEST)))
    assert [each.data_version for each in list_versions(dataset, "rgb_tiles")] == [MANIFEST.data_version]
    write_manifest(dataset, replace(MANIFEST, data_version="f" * 32, interrupted=True))
    assert len(list_versions(dataset, "rgb_tiles")) == 1  # only complete versions have a lineage


CHANGES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "a misspelt key": lambda content: content.update(interrupued=content.pop("interrupted")),
    "a changed value": lambda content: content["facts"].update(stacking="grey"),
    "null for a string": lambda content: content.update(data_version=None),
    "a list for a string": lambda content: content.update(code_version=[]),
    "a missing key": lambda content: content.pop("inputs"),
    "no checksum": lambda content: content.pop("checksum"),
    "no format": lambda content: content.pop("format"),
    "a word as the format": lambda content: content.update(format="two"),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_damaged_manifest_is_named_moved_aside_and_counts_as_missing(
    dataset: Dataset, change: Callable[[dict[str, Any]], Any], caplog: pytest.LogCaptureFixture
):
    write_manifest(dataset, MANIFEST)
    path = dataset.manifest_path("rgb_tiles")
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    assert find_manifest(dataset, "rgb_tiles") is None
    assert str(path) in caplog.text and "moved to rgb_tiles.json.damaged" in caplog.text
    assert path.with_name("rgb_tiles.json.damaged").exists() and not path.exists()
    write_manifest(dataset, MANIFEST)
    assert read_manifest(dataset, "rgb_tiles").rows == 17


@pytest.mark.parametrize("text", ["[]", "null", "3", '"rgb_tiles"', "{}"])
def test_json_that_is_no_manifest_is_moved_aside(dataset: Dataset, text: str):
    path = dataset.manifest_path("rgb_tiles")
    path.parent.mkdir(parents=True)
    path.write_text(text)
    assert find_manifest(dataset, "rgb_tiles") is None
    assert path.with_name("rgb_tiles.json.damaged").read_text() == text


def test_every_flipped_bit_is_noticed(dataset: Dataset):
    write_manifest(dataset, MANIFEST)
    path = dataset.manifest_path("rgb_tiles")
    content = path.read_bytes()
    for place in range(0, len(content), 7):
        path.write_bytes(content[:place] + bytes([content[place] ^ (1 << place % 8)]) + content[place + 1 :])
        found = find_manifest(dataset, "rgb_tiles")
        # A flip in the white space between tokens changes nothing.
        assert found is None or asdict(found) == json.loads(json.dumps(asdict(MANIFEST))), place
        path.with_name("rgb_tiles.json.damaged").unlink(missing_ok=True)


def test_a_manifest_of_the_former_format_opens_with_its_facts_and_figures(dataset: Dataset):
    path = dataset.manifest_path("embeddings_tiny")
    path.parent.mkdir(parents=True)
    counts = {
        "rows": 5,
        "dimensions": 512,
        "encoder_identity": "i",
        "encoder_fingerprint": "f",
        "encoder": {"spec": {}},
    }
    content = {name: value for name, value in asdict(MANIFEST).items() if name not in ("facts", "figures", "rows")}
    path.write_text(json.dumps({**content, "asset": "embeddings_tiny", "counts": counts, "format": 1}))
    found = read_manifest(dataset, "embeddings_tiny")
    assert (found.rows, found.format, found.facts) == (5, FORMAT, counts)
    assert found.figures == {name: counts[name] for name in ("dimensions", "encoder_fingerprint", "encoder")}


def test_a_store_of_a_newer_version_is_refused(dataset: Dataset):
    write_manifest(dataset, MANIFEST)
    path = dataset.manifest_path("rgb_tiles")
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "format": FORMAT + 1, "synpipe_version": "9.9"}))
    with pytest.raises(
        SynpipeError, match=rf"{path} was written by synpipe 9.9, .* this version, {__version__}.*--store"
    ):
        find_manifest(dataset, "rgb_tiles")
    assert path.exists()
