"""Drift: whether an encoder still gives the same tiles the same vectors, and vectors of the same kind.

In: the embedding table, a sample of its former version, and figures of earlier ones. Out: a `Comparison`. Guarantee: a
bounded sample, the same tiles in every version as long as those are there: the ones with the smallest content hashes.

A cosine alone tells little: two tiles at random have one of .9999 with an untrained network, of .3 with a trained one. So
matched rows are held against pairs at random: `change` is (1 − cosine of the matched) / (1 − cosine of any two), nothing where
all is as it was, 1 where a tile is as unlike its former self as it is unlike any other tile.
"""

import contextlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from synpipe.embeddings.vectors import read_vectors, unit_vectors
from synpipe.store.files import write_table
from synpipe.store.streams import SmallestHashes

SAMPLE_ROWS = 2_000
LOW_PERCENTILE = 1


@dataclass(frozen=True)
class Figures:
    """norm: mean length of the vectors. spread: root of 1 − the mean cosine of two rows at random."""

    norm: float
    spread: float


@dataclass(frozen=True)
class Comparison:
    """matched: tiles of both samples. same_encoder: the fingerprint is the same. turned: both are fits of one compressed
    encoder, and were laid over one another, for the axes of a new fit may point elsewhere. mean_cosine, low_cosine (1st
    percentile), change: of the matched rows, None where there is none or the numbers of dimensions differ."""

    matched: int
    same_encoder: bool
    turned: bool
    mean_cosine: float | None
    low_cosine: float | None
    change: float | None


def take_sample(path: Path) -> pa.Table:
    """`content_hash`, `vector` and `norm` of at most `SAMPLE_ROWS` rows of an embedding table, by hash, with its metadata."""
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
    first = pc.index_in(chosen, value_set=rows["content_hash"].combine_chunks())  # of tiles with the same content, one
    return rows.take(first).replace_schema_metadata(file.schema_arrow.metadata)


def keep_former(table_path: Path, former_path: Path) -> None:
    """Keep a sample of a table that is about to be overwritten; none where it cannot be read."""
    former_path.unlink(missing_ok=True)
    with contextlib.suppress(pa.ArrowException, OSError, KeyError):
        write_table(former_path, take_sample(table_path))


def figures(sample: pa.Table) -> Figures:
    unit = _unit(sample)
    return Figures(float(pc.mean(sample["norm"]).as_py()), float(np.sqrt(max(0.0, 1 - _mean_cosine(unit)))))


def compare(former: pa.Table, now: pa.Table) -> Comparison:
    """How the rows of two samples differ that are of the same tiles."""
    was, told = (json.loads(sample.schema.metadata[b"synpipe"]) for sample in (former, now))
    same_encoder = was["encoder_fingerprint"] == told["encoder_fingerprint"]
    base = told["encoder_details"].get("base_fingerprint")
    turned = (
        not same_encoder
        and base is not None
        and base == was["encoder_details"].get("base_fingerprint")
        and was["encoder_details"]["spec"] == told["encoder_details"]["spec"]
    )
    places = pc.index_in(now["content_hash"], value_set=former["content_hash"].combine_chunks())
    both = pc.is_valid(places)
    a, b = _unit(former.take(places.filter(both))), _unit(now.filter(both))
    if not len(a) or a.shape != b.shape:
        return Comparison(len(a), same_encoder, turned, None, None, None)
    if turned:
        left, _, right = np.linalg.svd(a.T @ b)  # orthogonal Procrustes: P. Schönemann, Psychometrika 31, 1966
        a = a @ (left @ right)
    cosines = (a * b).sum(axis=1)
    low = float(np.percentile(cosines, LOW_PERCENTILE))
    apart = max(1 - _mean_cosine(_unit(former)), np.finfo(np.float64).eps)
    return Comparison(len(a), same_encoder, turned, float(cosines.mean()), low, max(0.0, 1 - low) / apart)


def _mean_cosine(unit: np.ndarray) -> float:
    """Of any two rows."""
    return float((unit.mean(axis=0) ** 2).sum())


def _unit(sample: pa.Table) -> np.ndarray:
    """The vectors at exactly unit length, float64 (n, d). The table holds rounded ones."""
    return unit_vectors(read_vectors(sample).astype(np.float64))
