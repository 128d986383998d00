"""Checks of what the steps have made: a step may succeed and still have made something that nobody should build on.

In: the files of a data set. Out: a `Finding`. Guarantee: a check reads what is in the store, not what a step says of it.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from synpipe import splits
from synpipe.datasets import Dataset
from synpipe.embedding import EmbeddingCache
from synpipe.learning_steps import column, synapses_with_tiles
from synpipe.manifests import read_manifest
from synpipe.pipeline import shard_name
from synpipe.shards import read_table

# Vectors of one encoder that differ by less than this share of their length carry nothing; random weights give 10⁻².
MIN_SPREAD = 1e-4


@dataclass(frozen=True)
class Finding:
    """Whether a check passed, in a sentence, with figures."""

    passed: bool
    description: str
    figures: dict[str, Any] = field(default_factory=dict)


def tiles_are_there(dataset: Dataset) -> Finding:
    """There is at least one tile, and none is listed twice."""
    ids = read_table(dataset.tiles_path, ["synapse_id"])["synapse_id"]
    repeated = len(ids) - len(pc.unique(ids))
    if not len(ids):
        return Finding(False, f"No tile is left: every synapse was rejected. Look at {dataset.rejects_path.name}.")
    if repeated:
        return Finding(False, f"{repeated:,} synapses are listed more than once.")
    return Finding(True, f"{len(ids):,} tiles, each of another synapse.", {"tiles": len(ids)})


def stacks_match_synapses(dataset: Dataset) -> Finding:
    """Every synapse has either a stack or a reason why there is none."""
    synapses = set(read_table(dataset.synapses_path, ["synapse_id"])["synapse_id"].to_pylist())
    stacks = read_table(dataset.stacks_path, ["synapse_id"])["synapse_id"].to_pylist()
    lost, strange = len(synapses.difference(stacks)), len(set(stacks) - synapses)
    figures = {"without stack or reason": lost, "of no synapse": strange, "repeated": len(stacks) - len(set(stacks))}
    wrong = ", ".join(f"{count:,} {name}" for name, count in figures.items() if count)
    return Finding(
        not wrong, f"Stacks and synapses differ: {wrong}." if wrong else "A stack or a reason for each.", figures
    )


def vectors_vary(dataset: Dataset, encoder: str) -> Finding:
    """The vectors of the first shards are finite and not all alike."""
    fingerprint = read_manifest(dataset, f"embeddings_{encoder}").counts["encoder_fingerprint"]
    tiles = read_table(dataset.tiles_path, ["shard", "content_hash"])
    # The hashes are in the order of space: a sample from everywhere, of a bounded size, one shard in memory at a time.
    cache, sample = EmbeddingCache(dataset.embeddings_folder, fingerprint), []
    for shard in pc.unique(tiles["shard"]).to_pylist()[:16]:
        hashes = tiles.filter(pc.equal(tiles["shard"], shard))["content_hash"].to_pylist()
        sample.append(cache.read(shard_name(shard), list(dict.fromkeys(hashes))[:128]))
    vectors = np.concatenate(sample)
    if not np.isfinite(vectors).all():
        return Finding(False, "There are NaN or infinite values.", {"vectors": len(vectors)})
    length = float(np.linalg.norm(vectors, axis=1).mean())
    spread = float(np.linalg.norm(vectors.std(axis=0))) / length if length else 0.0
    figures = {"spread": round(spread, 6), "vectors": len(vectors)}
    if len(vectors) > 1 and spread < MIN_SPREAD:
        text = f"The vectors are constant (spread {spread:.2g}): this encoder tells nothing apart."
        return Finding(False, text, figures)
    return Finding(True, f"The vectors spread by {spread:.2g} of their length.", figures)


def table_matches_tiles(dataset: Dataset, encoder: str) -> Finding:
    """The embedding table has exactly the tiles' synapses, with exactly the tiles' content."""
    columns = ["synapse_id", "content_hash"]
    tiles = read_table(dataset.tiles_path, columns).sort_by("synapse_id")
    table = read_table(dataset.table_path(encoder), columns).sort_by("synapse_id")
    same = pa.Table.equals(_plain(tiles), _plain(table))
    text = "The table has the rows of the tiles." if same else "The rows of the table are not those of the tiles."
    return Finding(same, text, {"tiles": len(tiles), "rows": len(table)})


def index_finds_neighbours(dataset: Dataset, encoder: str) -> Finding:
    """The published index has the rows of the table and finds the true neighbours."""
    from synpipe.index import MIN_RECALL, published  # late, as in `pipeline.make_index`

    table = read_manifest(dataset, f"embedding_table_{encoder}").counts
    report = published(dataset.lancedb_folder, encoder)
    figures = {"recall@10": report.recall, "rows": report.rows}
    if report.rows != table["rows"]:
        return Finding(False, f"The index has {report.rows:,} rows, the table {table['rows']:,}.", figures)
    text = f"recall@10 {report.recall:.4f} against exact search; at least {MIN_RECALL}."
    return Finding(report.recall >= MIN_RECALL, text, figures)


def sides_are_apart(dataset: Dataset) -> Finding:
    """No group stands on two sides of a split, and no tile overlaps one of another side; the random split is exempt."""
    synapses, starts, window = synapses_with_tiles(dataset)
    split = read_table(dataset.split_path).sort_by("synapse_id")
    problems = []
    for scheme in splits.SCHEMES[:-1]:
        groups, overlapping = splits.faults(
            column(split, scheme),
            column(synapses, splits.GROUP_COLUMNS[scheme]),
            starts,
            window,
            dataset.spec.split.guard,
        )
        if groups:
            problems.append(f"by {scheme}, {len(groups):,} groups stand on two sides, the first being {groups[0]}")
        if len(overlapping):
            first = split["synapse_id"][int(overlapping[0])]
            problems.append(
                f"by {scheme}, {len(overlapping):,} tiles overlap one of another side, first that of {first}"
            )
    if problems:
        return Finding(False, f"{'; '.join(problems)}.")
    return Finding(True, "Every group and every tile stands on one side.", {"synapses": len(split)})


def _plain(table: pa.Table) -> pa.Table:
    fields = [pa.field(name, table.schema.field(name).type) for name in table.column_names]
    return table.cast(pa.schema(fields)).combine_chunks()
