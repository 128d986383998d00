"""Checks of what the steps have made: a step may succeed and still have made something that nobody should build on.

In: the files of a data set. Out: a `Finding`. Guarantee: a check reads what is in the store, not what a step says of it; of
it a shard is in memory, and ids.
"""

import hashlib
from collections import Counter
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq

from synpipe.analysis import drift, splits
from synpipe.analysis.classifier_scores import read_probabilities
from synpipe.assets.learning_steps import synapse_column, synapses_with_tiles
from synpipe.assets.manifest import read_manifest, whole_versions
from synpipe.assets.pipeline import shard_name
from synpipe.datasets import Dataset
from synpipe.embeddings.cache import EmbeddingCache
from synpipe.store.files import read_table
from synpipe.store.streams import by_shard, column_of, read_parts

# Vectors of one encoder that differ by less than this share of their length carry nothing; random weights give 10⁻².
MIN_SPREAD = 1e-4
# Rounding in the table and another batch size change vectors by .004 of what lies between two tiles, see `drift`; bf16 of
# another version of torch by .05. Another network, or weights trained further, by .5 and more.
MAX_CHANGE = 0.1
# Half as much again, or a third less, than the vectors of earlier versions: other tissue, another contrast, other weights.
MAX_FACTOR = 1.5


@dataclass(frozen=True)
class Finding:
    """Whether a check passed, in a sentence, with figures. severity: what lies downstream of a mere warning is made."""

    passed: bool
    description: str
    figures: dict[str, Any] = field(default_factory=dict)
    severity: Literal["error", "warning"] = "error"


def tiles_are_there(dataset: Dataset) -> Finding:
    """There is at least one tile, and none is listed twice."""
    ids = _ids(dataset.tiles_path)
    repeated = len(ids) - len(np.unique(ids))
    if not len(ids):
        return Finding(False, f"No tile is left: every synapse was rejected. Look at {dataset.rejects_path.name}.")
    if repeated:
        return Finding(False, f"{repeated:,} synapses are listed more than once.")
    return Finding(True, f"{len(ids):,} tiles, each of another synapse.", {"tiles": len(ids)})


def stacks_match_synapses(dataset: Dataset) -> Finding:
    """Every synapse has either a stack or a reason why there is none."""
    synapses, stacks = _ids(dataset.synapses_path), _ids(dataset.stacks_path)
    lost, strange = len(np.setdiff1d(synapses, stacks)), len(np.setdiff1d(stacks, synapses))
    figures = {
        "without stack or reason": lost,
        "of no synapse": strange,
        "repeated": len(stacks) - len(np.unique(stacks)),
    }
    wrong = ", ".join(f"{count:,} {name}" for name, count in figures.items() if count)
    return Finding(
        not wrong, f"Stacks and synapses differ: {wrong}." if wrong else "A stack or a reason for each.", figures
    )


def rejects_are_few(dataset: Dataset) -> Finding:
    """No larger share of the synapses was rejected than `max_reject_share` of the data set allows."""
    counted: Counter[str] = Counter()
    for part in read_parts(dataset.rejects_path, ["reason"]):
        counted.update(part["reason"].to_pylist())
    reasons, rejected = counted.most_common(), counted.total()
    total = _rows(dataset.synapses_path) + _rows(dataset.synapse_rejects_path)
    share, allowed = rejected / max(1, total), dataset.spec.max_reject_share
    figures = {"share": share, "allowed": allowed, **dict(reasons)}
    text = f"{rejected:,} of {total:,} synapses were rejected, {share:.2%}"
    if share <= allowed:
        return Finding(True, f"{text}; {allowed:.2%} are allowed.", figures)
    why = ", ".join(f"{count:,} {reason}" for reason, count in reasons)
    return Finding(
        False,
        f"{text}, where {allowed:.2%} are allowed: {why}. {dataset.rejects_path} says where each comes from: mend that, or "
        f"raise `max_reject_share` in {dataset.name}.yaml if they are rightly rejected. No other asset waits for it.",
        figures,
    )


def vectors_vary(dataset: Dataset, encoder: str) -> Finding:
    """The vectors of the first shards are finite and not all alike."""
    fingerprint = read_manifest(dataset, f"embeddings_{encoder}").counts["encoder_fingerprint"]
    # The hashes are in the order of space: a sample from everywhere, of a bounded size, one shard in memory at a time.
    cache, sample = EmbeddingCache(dataset.embeddings_folder, fingerprint), []
    for shard, tiles in islice(by_shard(read_parts(dataset.tiles_path, ["shard", "content_hash"])), 16):
        hashes = tiles["content_hash"].to_pylist()
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


def predictions_are_whole(dataset: Dataset, encoder: str) -> Finding:
    """Every tile has a prediction, unless nothing could be learned; probabilities are finite and sum to one."""
    path = dataset.predictions_path(encoder)
    tiles, predicted = _ids(dataset.tiles_path), _ids(path)
    figures = {"tiles": len(tiles), "rows": len(predicted)}
    if not np.array_equal(np.sort(tiles), np.sort(predicted)):
        return Finding(False, "The rows of the predictions are not those of the tiles.", figures)
    missing = bad = 0
    for part in read_parts(path, ["class_probabilities"]):
        missing += part["class_probabilities"].null_count
        there = part.filter(pc.is_valid(part["class_probabilities"]))
        if len(there):
            probabilities = read_probabilities(there)
            sums_to_one = np.abs(probabilities.sum(axis=1) - 1) < 1e-3
            bad += int((~(np.isfinite(probabilities).all(axis=1) & sums_to_one)).sum())
    if missing == len(predicted):
        return Finding(True, "Nothing could be learned: there are no predictions.", figures)
    if missing:
        return Finding(False, f"{missing:,} tiles have no prediction.", figures)
    if bad:
        return Finding(False, f"Probabilities of {bad:,} tiles are not finite, or do not sum to one.", figures)
    return Finding(True, f"{len(predicted):,} predictions; the probabilities of each sum to one.", figures)


def table_matches_tiles(dataset: Dataset, encoder: str) -> Finding:
    """The embedding table has exactly the tiles' synapses, with exactly the tiles' content."""
    paths = dataset.tiles_path, dataset.table_path(encoder)
    same = _content(paths[0]) == _content(paths[1])
    text = "The table has the rows of the tiles." if same else "The rows of the table are not those of the tiles."
    return Finding(same, text, {"tiles": _rows(paths[0]), "rows": _rows(paths[1])})


def vectors_have_not_drifted(dataset: Dataset, encoder: str) -> Finding:
    """The same tiles have the same vectors as in the former version of the table; length and spread are as before."""
    asset = f"embedding_table_{encoder}"
    made = read_manifest(dataset, asset)
    path = dataset.former_table_path(encoder)
    if not path.exists():
        return Finding(True, "The first version: there is nothing to compare it with.")
    found = drift.compare_samples(read_table(path), drift.take_sample(dataset.table_path(encoder)))
    shown: dict[str, Any] = {"matched rows": found.matched, "same encoder": found.same_encoder}
    if found.change is not None:
        shown |= {"mean cosine": found.mean_cosine, "cosine, 1st percentile": found.low_cosine, "change": found.change}
    if not found.same_encoder and not found.turned and (found.change is None or found.change > MAX_CHANGE):
        text = "The encoder changed: these vectors cannot be compared with those of the former version."
        return Finding(False, text, shown, "warning")

    problems = []
    if found.change is not None and found.change > MAX_CHANGE:
        problems.append(
            f"the vectors of the same tiles changed (cosine {found.mean_cosine:.4f} in the mean, {found.low_cosine:.4f} at the "
            "1st percentile), though the encoder did not: is the cache of embeddings damaged?"
        )
    earlier = [
        manifest.counts
        for manifest in whole_versions(dataset, asset)
        if manifest.data_version != made.data_version
        and manifest.counts.get("encoder_identity") == made.counts["encoder_identity"]
    ]
    for name in ("norm", "spread") if earlier else ():
        before, now = float(np.median([counts[name] for counts in earlier])), made.counts[name]
        shown[name], shown[f"{name} before"] = now, before
        if not before / MAX_FACTOR <= now <= before * MAX_FACTOR:
            problems.append(
                f"the {name} of the vectors is {now:.3g}, in earlier versions it was {before:.3g}: are the tiles alike?"
            )
    if problems:
        text = "; ".join(problems)
        return Finding(False, text[0].upper() + text[1:], shown, "warning")
    if not found.matched:
        return Finding(True, "No tile of the former version is in this one; length and spread are as before.", shown)
    return Finding(True, f"{found.matched:,} tiles compared: their vectors are as before.", shown)


def index_finds_neighbours(dataset: Dataset, encoder: str) -> Finding:
    """The published index has the rows of the table and finds the true neighbours, also of the rarest class."""
    from synpipe.index.publish import published  # late, as in `pipeline.make_index`
    from synpipe.index.recall import MIN_RECALL

    table = read_manifest(dataset, f"embedding_table_{encoder}").counts
    report = published(dataset.lancedb_folder, encoder)
    figures: dict[str, Any] = {"recall@10": report.recall, "rows": report.rows}
    text = f"recall@10 {report.recall:.4f} against exact search"
    recalls = [report.recall]
    if report.rarest_class_recall is not None:
        figures |= {"recall@10, rarest class": report.rarest_class_recall, "rarest class": report.rarest_class}
        text += f", {report.rarest_class_recall:.4f} of queries of the rarest class, {report.rarest_class}"
        recalls.append(report.rarest_class_recall)
    if report.rows != table["rows"]:
        return Finding(False, f"The index has {report.rows:,} rows, the table {table['rows']:,}.", figures)
    return Finding(min(recalls) >= MIN_RECALL, f"{text}; at least {MIN_RECALL}.", figures)


def sides_are_apart(dataset: Dataset) -> Finding:
    """No group stands on two sides of a split, and no tile overlaps one of another side; the random split is exempt."""
    ids, starts, window = synapses_with_tiles(dataset)
    problems = []
    for scheme in splits.SCHEMES[:-1]:
        groups, overlapping = splits.faults(
            column_of(dataset.split_path, ids, scheme),
            synapse_column(dataset, ids, splits.GROUP_COLUMNS[scheme]),
            starts,
            window,
            dataset.spec.split.guard,
        )
        if groups:
            problems.append(f"by {scheme}, {len(groups):,} groups stand on two sides, the first being {groups[0]}")
        if len(overlapping):
            problems.append(
                f"by {scheme}, {len(overlapping):,} tiles overlap one of another side, first that of {ids[overlapping[0]]}"
            )
    if problems:
        return Finding(False, f"{'; '.join(problems)}.")
    return Finding(True, "Every group and every tile stands on one side.", {"synapses": len(ids)})


def _ids(path: Path) -> np.ndarray:
    return np.concatenate([part["synapse_id"].to_numpy() for part in read_parts(path, ["synapse_id"])])


def _content(path: Path) -> int:
    """Sum of the digests of all rows: the same in any order (M. Bellare, D. Micciancio, "A new paradigm for collision-free
    hashing", Eurocrypt 1997)."""
    total = 0
    for part in read_parts(path, ["synapse_id", "content_hash"]):
        for row in zip(part["synapse_id"].to_pylist(), part["content_hash"].to_pylist(), strict=True):
            total += int.from_bytes(hashlib.sha256(repr(row).encode()).digest())
    return total % 2**256


def _rows(path: Path) -> int:
    return pq.read_metadata(path).num_rows
