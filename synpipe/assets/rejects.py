"""The asset `rejects`: every synapse that has no tile, with the reason."""

from collections import Counter
from dataclasses import asdict

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from synpipe.annotations.schema import REJECT_SCHEMA
from synpipe.assets.asset import (
    Asset,
    Finding,
    Links,
    Made,
    NoFacts,
    Task,
    View,
    always,
    count_rows,
    no_leftovers,
    view_of_figures,
)
from synpipe.assets.manifest import Manifest, data_version_of, file_metadata
from synpipe.assets.synapses import REJECT_COLUMNS
from synpipe.assets.volume import find_viewer
from synpipe.datasets import Dataset
from synpipe.store.files import read_table, write_table
from synpipe.store.streams import read_batches

CODE_VERSION = "2"
SHOWN_LINKS = 10


def make(task: Task) -> Made[NoFacts]:
    """Gather the rejects of the annotations and of the cut-outs, with a Neuroglancer link where the volume has one."""
    dataset = task.dataset
    # Rejects are held in memory as a whole; everything else passes a part at a time.
    stacks = pa.concat_tables(
        part.filter(pc.is_valid(part["reason"]))
        for part in read_batches(dataset.stacks_path, ["synapse_id", "reason", "detail"])
    )
    synapse_count, matching = 0, []
    for part in read_batches(dataset.synapses_path):
        synapse_count += len(part)
        matching.append(part.filter(pc.is_in(part["synapse_id"], value_set=stacks["synapse_id"].combine_chunks())))
    without_tile = stacks.join(pa.concat_tables(matching), "synapse_id", join_type="inner")
    unusable = read_table(dataset.synapse_rejects_path).cast(REJECT_SCHEMA)
    rejects = pa.concat_tables([unusable, without_tile.select(REJECT_SCHEMA.names).cast(REJECT_SCHEMA)])
    rejects = rejects.sort_by([("reason", "ascending"), ("synapse_id", "ascending")])
    viewer = find_viewer(dataset)
    links = pa.nulls(len(rejects), pa.string()) if viewer is None else viewer.links(rejects)
    rejects = rejects.append_column("neuroglancer", links)
    version = data_version_of("rejects", CODE_VERSION, task.inputs, None if viewer is None else asdict(viewer))
    write_table(dataset.rejects_path, rejects, file_metadata(dataset, version, task.inputs))
    reasons = dict(Counter(rejects["reason"].to_pylist()).most_common())
    task.log(
        f"{len(rejects):,} rejects: " + (", ".join(f"{count} {reason}" for reason, count in reasons.items()) or "none")
    )
    share = len(rejects) / max(1, synapse_count + len(unusable))
    return Made(version, NoFacts(), len(rejects), {"reasons": reasons, "share": round(share, 4)})


def are_few(dataset: Dataset, _encoder: str) -> Finding:
    """The share of rejected synapses is at most `max_reject_share` of the data set."""
    # Nothing lies downstream of the rejects. A failure here fails the run, so that nobody overlooks what was lost.
    reason_counts: Counter[str] = Counter()
    for part in read_batches(dataset.rejects_path, ["reason"]):
        reason_counts.update(part["reason"].to_pylist())
    rejected = reason_counts.total()
    total = count_rows(dataset.synapses_path) + count_rows(dataset.synapse_rejects_path)
    share, allowed = rejected / max(1, total), dataset.spec.max_reject_share
    figures = {"share": share, "allowed": allowed, **dict(reason_counts.most_common())}
    text = f"{rejected:,} of {total:,} synapses were rejected, {share:.2%}"
    if share <= allowed:
        return Finding(True, f"{text}; {allowed:.2%} are allowed.", figures)
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in reason_counts.most_common())
    return Finding(
        False,
        f"{text}, but only {allowed:.2%} are allowed: {reasons}. {dataset.rejects_path} lists where each comes from. Correct the "
        f"annotations, or raise `max_reject_share` in {dataset.name}.yaml if the rejects are right. No other asset waits for this.",
        figures,
    )


def show(dataset: Dataset, _encoder: str, manifest: Manifest) -> View:
    columns = ["synapse_id", "reason", "neuroglancer"]
    first = next(pq.ParquetFile(dataset.rejects_path).iter_batches(SHOWN_LINKS, columns=columns), None)
    rows = first.to_pylist() if first else []
    links = [(str(row["synapse_id"]), row["neuroglancer"], row["reason"]) for row in rows if row["neuroglancer"]]
    entries = view_of_figures(manifest) | ({"neuroglancer": Links(links)} if links else {})
    return View(entries, dataset.rejects_path, ("synapse_id", "reason", "detail"))


ASSET = Asset(
    name="rejects",
    per_encoder=False,
    exists=always,
    description="Every synapse that has no tile, with the reason and the file and row that it comes from.",
    storage=frozenset({"parquet"}),
    facts=NoFacts,
    reads=lambda dataset, encoder: ("volume", "synapses", "synapse_stacks"),
    optional_reads=False,
    version_covers_reads=True,
    code_version=CODE_VERSION,
    still_valid=(),
    # The links depend on the address of the volume and on the place that it declares.
    specs=lambda dataset, encoder: [dataset.spec.volume, dataset.spec.neuroglancer, dataset.spec.max_reject_share],
    make=make,
    source_version=None,
    checks={"are_few": are_few},
    files=lambda dataset, encoder: (dataset.rejects_path,),
    names_tiles=False,
    leftovers=no_leftovers,
    columns=REJECT_COLUMNS
    | {"neuroglancer": "Link to the place in Neuroglancer; empty if the volume is in local files."},
    table_columns=(),
    show=show,
)
