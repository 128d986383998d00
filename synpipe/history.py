"""Versions of an index: which there are, how two of them differ, going back to one, and where a row of it comes from.

In: the LanceDB table of an encoder, whose every published version has a tag. Out: lists and figures; a moved tag.
Guarantee: going back moves the tag `current` and nothing else, so that readers see one whole version or another.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import lancedb
import lancedb.expr
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from synpipe.datasets import Dataset
from synpipe.errors import SynpipeError
from synpipe.graph import steps
from synpipe.index import CURRENT, METADATA_KEY, open_current
from synpipe.manifests import find_manifest
from synpipe.shards import read_table

# Columns whose change makes a row another one; the encoder's vector is compared by its cosine.
ROW_COLUMNS = ("x_nm", "y_nm", "z_nm", "neuron_id", "hemilineage", "region", "neurotransmitter", "content_hash")


@dataclass(frozen=True)
class Version:
    """A published version of an index. number: LanceDB's. made_at: UTC, ISO 8601. current: whether readers see it."""

    tag: str
    number: int
    made_at: str
    rows: int
    data_version: str
    encoder_fingerprint: str
    current: bool


@dataclass(frozen=True)
class Difference:
    """How version b differs from version a. mean_cosine: of the vectors of rows in both; None where there is none, or
    where the vectors have different lengths. same_encoder: whether both were made by the same fingerprint, without which
    cosines tell little."""

    added: list[int]
    removed: list[int]
    changed: list[int]
    matched: int
    mean_cosine: float | None
    same_encoder: bool


def versions(dataset: Dataset, encoder: str) -> list[Version]:
    """All published versions, the newest first. Raises `SynpipeError` where there is no index."""
    table = open_current(dataset.lancedb_folder, encoder)
    current = table.version
    made_at = {entry["version"]: entry["timestamp"] for entry in table.list_versions()}
    found = []
    for tag, content in table.tags.list().items():
        if tag == CURRENT:
            continue
        table.checkout(tag)
        provenance = _provenance(table)
        found.append(
            Version(
                tag=tag,
                number=content["version"],
                made_at=made_at[content["version"]].astimezone().isoformat(timespec="seconds"),
                rows=table.count_rows(),
                data_version=provenance["data_version"],
                encoder_fingerprint=provenance["encoder_fingerprint"],
                current=content["version"] == current,
            )
        )
    return sorted(found, key=lambda version: -version.number)


def open_version(dataset: Dataset, encoder: str, which: str) -> Any:
    """The version with this tag or number, read-only. Raises `SynpipeError` where there is no such one."""
    for version in versions(dataset, encoder):
        if which in (version.tag, str(version.number)) or (which == CURRENT and version.current):
            table = lancedb.connect(dataset.lancedb_folder).open_table(encoder)
            table.checkout(version.number)
            return table
    raise SynpipeError(
        f"The index {encoder} of {dataset.name} has no version {which!r}: `synpipe versions --dataset {dataset.name} "
        f"--encoder {encoder}` lists them."
    )


def diff(dataset: Dataset, encoder: str, a: str, b: str) -> Difference:
    """How version `b` differs from version `a`, each a tag, a number or `current`."""
    first, second = open_version(dataset, encoder, a), open_version(dataset, encoder, b)
    same_encoder = _provenance(first)["encoder_fingerprint"] == _provenance(second)["encoder_fingerprint"]
    old, new = _rows(first), _rows(second)
    ids = np.intersect1d(old["synapse_id"].to_numpy(), new["synapse_id"].to_numpy())
    old_both, new_both = _at(old, ids), _at(new, ids)
    changed = np.zeros(len(ids), dtype=bool)
    for column in ROW_COLUMNS:
        same = pc.fill_null(pc.equal(old_both[column], new_both[column]), False)
        neither = pc.and_(pc.is_null(old_both[column]), pc.is_null(new_both[column]))
        changed |= ~pc.or_(same, neither).to_numpy(zero_copy_only=False)
    vectors = [_vectors(table) for table in (old_both, new_both)]
    comparable = len(ids) > 0 and vectors[0].shape == vectors[1].shape
    return Difference(
        added=np.setdiff1d(new["synapse_id"].to_numpy(), ids).tolist(),
        removed=np.setdiff1d(old["synapse_id"].to_numpy(), ids).tolist(),
        changed=ids[changed].tolist(),
        matched=len(ids),
        mean_cosine=float((vectors[0] * vectors[1]).sum(axis=1).mean()) if comparable else None,
        same_encoder=same_encoder,
    )


def rollback(dataset: Dataset, encoder: str, which: str) -> Version:
    """Let readers see version `which` (a tag or a number) from now on; returns it.

    It holds until the index is built or materialised again.
    """
    number = open_version(dataset, encoder, which).version
    lancedb.connect(dataset.lancedb_folder).open_table(encoder).tags.update(CURRENT, number)
    return next(version for version in versions(dataset, encoder) if version.current)


def provenance(dataset: Dataset, encoder: str, synapse_id: int) -> dict[str, Any]:
    """Where a row of the published index comes from: its tile, volume, annotation, weights, code and runs.

    Raises `SynpipeError` where the index has no such synapse.
    """
    table = open_current(dataset.lancedb_folder, encoder)
    columns = [field.name for field in table.schema if field.name != "vector"]
    found = table.search().where(_is(synapse_id)).select(columns).limit(1).to_arrow().to_pylist()
    if not found:
        raise SynpipeError(f"Synapse {synapse_id} is not in the index {encoder} of {dataset.name}.")
    row, told = found[0], _provenance(table)
    stacks = read_table(dataset.stacks_path)
    cut = stacks.filter(pc.equal(stacks["content_hash"], row["content_hash"])).to_pylist()
    manifests = {step.asset: find_manifest(dataset, step.asset) for step in steps(dataset)}
    upstream = [step.asset for step in steps(dataset) if step.encoder in (None, encoder)]
    return {
        "row": row,
        "index": {"version": table.version, "data_version": told["data_version"], "schema": told["schema_version"]},
        "encoder": {"name": told["encoder"], "fingerprint": told["encoder_fingerprint"], **told["encoder_details"]},
        "tile": _tile(cut, told, row["content_hash"]),
        "volume": _of(manifests.get("volume"), "path", "shape_zyx", "voxel_size_nm_zyx"),
        "annotations": _of(manifests.get("annotations"), "paths") | {"source": row["source"], "id": row["source_id"]},
        "assets": {
            asset: {
                "data_version": manifest.data_version,
                "code_version": manifest.code_version,
                "synpipe_version": manifest.synpipe_version,
                "dagster_run": manifest.run_id,
            }
            for asset in upstream
            if (manifest := manifests[asset]) is not None
        },
    }


def _tile(cut: list[dict[str, Any]], told: Mapping[str, Any], content_hash: str) -> dict[str, Any]:
    recipe = {"content_hash": content_hash, "recipe": told["dataset_spec"]["tiles"]}
    if not cut:
        return recipe  # of an older version: its tile is no longer among the stacks
    names = ("file", "row", "start_z", "start_y", "start_x", "pad_fraction", "missing_sections", "crc32")
    return recipe | {name: cut[0][name] for name in names}


def _of(manifest: Any, *names: str) -> dict[str, Any]:
    return {} if manifest is None else {"data_version": manifest.data_version, **{n: manifest.counts[n] for n in names}}


def _is(synapse_id: int) -> Any:
    return lancedb.expr.col("synapse_id") == lancedb.expr.lit(synapse_id)


def _provenance(table: Any) -> dict[str, Any]:
    return json.loads(table.schema.metadata[METADATA_KEY])


def _rows(table: Any) -> pa.Table:
    return table.search().select(["synapse_id", *ROW_COLUMNS, "vector"]).to_arrow().combine_chunks()


def _at(table: pa.Table, ids: np.ndarray) -> pa.Table:
    """Rows of these ids, in their order."""
    order = np.argsort(table["synapse_id"].to_numpy())
    return table.take(order[np.searchsorted(table["synapse_id"].to_numpy()[order], ids)])


def _vectors(table: pa.Table) -> np.ndarray:
    vectors = table["vector"].combine_chunks()
    return vectors.flatten().to_numpy().reshape(len(table), -1)
