"""Detect drift: whether an encoder still gives the same tiles the same vectors.

Inputs: an embedding table and a sample of its former version. Outputs: `VectorFigures` of one version and the `Drift`
between two. The sample is bounded. It consists of the tiles with the smallest content hashes, so that all versions sample
the same tiles as long as these exist.

A cosine alone says little: two random tiles have a cosine of .9999 with an untrained network and of .3 with a trained one.
Matched rows are therefore compared with random pairs: `change` is (1 − cosine of matched rows) / (1 − cosine of random
pairs). It is 0 if nothing changed, and 1 if a tile resembles its former self no more than any other tile.
"""

import contextlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from synpipe.store.files import write_table
from synpipe.store.streams import SmallestHashes

SAMPLE_ROWS = 2_000
LOW_PERCENTILE = 1


@dataclass(frozen=True)
class VectorFigures:
    """norm: mean length of the vectors. spread: square root of 1 − the mean cosine of random pairs."""

    norm: float
    spread: float


@dataclass(frozen=True)
class Drift:
    """How the vectors of the same tiles differ between two versions.

    matched: number of tiles in both samples. same_encoder: whether both have the same fingerprint. turned: whether both are
    fits of the same compressed encoder. A new fit may have other axes, so one version is then rotated onto the other first.
    mean_cosine, low_cosine (1st percentile), change: of the matched rows; None if there are none, or if the numbers of
    dimensions differ.
    """

    matched: int
    same_encoder: bool
    turned: bool
    mean_cosine: float | None
    low_cosine: float | None
    change: float | None


def take_sample(path: Path) -> pa.Table:
    """Read `content_hash`, `vector` and `norm` of at most `SAMPLE_ROWS` rows of an embedding table, with its metadata.

    The rows are sorted by content hash.
    """
    file = pq.ParquetFile(path, memory_map=True, page_checksum_verification=True)
    smallest = SmallestHashes(["content_hash"], SAMPLE_ROWS)
    for batch in file.iter_batches(8192, columns=["content_hash"]):
        smallest.add(pa.Table.from_batches([batch]))
    chosen = smallest.rows()["content_hash"].combine_chunks()
    columns = ["content_hash", "vector", "norm"]
    batches = (
        batch.filter(pc.is_in(batch["content_hash"], value_set=chosen))
        for batch in file.iter_batches(8192, columns=columns)
    )
    rows = pa.Table.from_batches(batches)
    # One row of tiles with the same content.
    first = pc.index_in(chosen, value_set=rows["content_hash"].combine_chunks())
    return rows.take(first).replace_schema_metadata(file.schema_arrow.metadata)


def keep_former(table_path: Path, former_path: Path) -> None:
    """Keep a sample of a table that is about to be overwritten. No sample is kept if the table cannot be read."""
    former_path.unlink(missing_ok=True)
    with contextlib.suppress(pa.ArrowException, OSError, KeyError):
        write_table(former_path, take_sample(table_path))


def measure_vectors(sample: pa.Table) -> VectorFigures:
    """Return the figures of a sample that `take_sample` has taken."""
    unit = _unit_vectors(sample)
    return VectorFigures(float(pc.mean(sample["norm"]).as_py()), float(np.sqrt(max(0.0, 1 - _mean_cosine(unit)))))


def compare_samples(former: pa.Table, now: pa.Table) -> Drift:
    """Compare the vectors of the tiles that both samples contain."""
    before, after = (json.loads(sample.schema.metadata[b"synpipe"]) for sample in (former, now))
    same_encoder = before["encoder_fingerprint"] == after["encoder_fingerprint"]
    base = after["encoder_details"].get("base_fingerprint")
    turned = (
        not same_encoder
        and base is not None
        and base == before["encoder_details"].get("base_fingerprint")
        and before["encoder_details"]["spec"] == after["encoder_details"]["spec"]
    )
    places = pc.index_in(now["content_hash"], value_set=former["content_hash"].combine_chunks())
    both = pc.is_valid(places)
    a, b = _unit_vectors(former.take(places.filter(both))), _unit_vectors(now.filter(both))
    if not len(a) or a.shape != b.shape:
        return Drift(len(a), same_encoder, turned, None, None, None)
    if turned:
        left, _, right = np.linalg.svd(a.T @ b)  # orthogonal Procrustes: P. Schönemann, Psychometrika 31, 1966
        a = a @ (left @ right)
    cosines = (a * b).sum(axis=1)
    low = float(np.percentile(cosines, LOW_PERCENTILE))
    apart = max(1 - _mean_cosine(_unit_vectors(former)), np.finfo(np.float64).eps)
    return Drift(len(a), same_encoder, turned, float(cosines.mean()), low, max(0.0, 1 - low) / apart)


def _mean_cosine(unit: np.ndarray) -> float:
    """Mean cosine of random pairs of rows. unit: float64 (n, d), of unit length."""
    return float((unit.mean(axis=0) ** 2).sum())


def _unit_vectors(sample: pa.Table) -> np.ndarray:
    """The vectors at exactly unit length, float64 (n, d). The table holds rounded ones."""
    vectors = sample["vector"].combine_chunks()
    rows = vectors.flatten().to_numpy().astype(np.float64).reshape(len(vectors), vectors.type.list_size)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)
