"""The asset `split`: the training, validation or test side of every synapse with a tile, a column per scheme."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from synpipe.analysis import splits
from synpipe.assets.asset import Asset, Finding, Made, NoFacts, Table, Task, View, always, no_leftovers, view_of_figures
from synpipe.assets.manifest import Manifest, file_metadata
from synpipe.assets.rgb_tiles import read_places
from synpipe.assets.synapses import COLUMNS, read_column
from synpipe.datasets import Dataset
from synpipe.specs import digest
from synpipe.store.files import table_writer
from synpipe.store.streams import BATCH_ROWS, ContentDigest, column_of

CODE_VERSION = "2"


def make(task: Task) -> Made[NoFacts]:
    """Put every synapse on a side, by each scheme."""
    dataset, spec = task.dataset, task.dataset.spec.split
    places = read_places(dataset)
    ids = places.synapse_ids
    labels = read_column(dataset, ids, "neurotransmitter")
    side_names = np.array([*splits.SIDES, splits.GUARD, None], dtype=object)
    codes: dict[str, np.ndarray] = {}  # a byte per side; as text each would take sixty
    tallies, notes = {}, []
    for scheme in splits.SCHEMES:
        groups = read_column(dataset, ids, splits.GROUP_COLUMNS[scheme])
        sides = splits.split(spec, scheme, labels, groups, places.starts_zyx, places.window_zyx)
        codes[scheme] = np.full(len(ids), len(side_names) - 1, dtype=np.int8)
        for number, name in enumerate(side_names[:-1]):
            codes[scheme][sides == name] = number
        tallies[scheme] = splits.tally(labels, groups, sides)
        notes += splits.shortcomings(scheme, tallies[scheme])
    schema = pa.schema([("synapse_id", pa.int64()), *((scheme, pa.string()) for scheme in splits.SCHEMES)])

    def parts() -> Iterator[pa.Table]:
        for first in range(0, max(1, len(ids)), BATCH_ROWS):
            rows = slice(first, first + BATCH_ROWS)
            columns = [pa.array(side_names[codes[scheme][rows]], pa.string()) for scheme in splits.SCHEMES]
            yield pa.table([pa.array(ids[rows]), *columns], schema=schema)

    # The version depends on content only: a changed confidence, or a position that moved within its voxel, keeps it.
    content = ContentDigest()
    for part in parts():
        content.add(part)
    version = digest(["split", CODE_VERSION, spec.by, content.value()])
    with table_writer(dataset.split_path, schema, file_metadata(dataset, version, task.inputs)) as writer:
        for part in parts():
            writer.write_table(part)
    chosen = tallies[spec.by].values()
    sizes = (f"{sum(count[side] for count in chosen):,} {side}" for side in (*splits.SIDES, splits.GUARD))
    task.log(f"by {spec.by}: " + ", ".join(sizes))
    return Made(version, NoFacts(), len(ids), {"by": spec.by, "split": tallies}, notes)


def sides_are_apart(dataset: Dataset, _encoder: str) -> Finding:
    """No group stands on two sides, and no tile overlaps one of another side; the random split is exempt."""
    places = read_places(dataset)
    problems = []
    for scheme in splits.SCHEMES[:-1]:
        groups, overlapping = splits.faults(
            column_of(dataset.split_path, places.synapse_ids, scheme),
            read_column(dataset, places.synapse_ids, splits.GROUP_COLUMNS[scheme]),
            places.starts_zyx,
            places.window_zyx,
            dataset.spec.split.guard,
        )
        if groups:
            problems.append(f"by {scheme}, {len(groups):,} groups stand on two sides, the first being {groups[0]}")
        if len(overlapping):
            first = places.synapse_ids[overlapping[0]]
            problems.append(
                f"by {scheme}, {len(overlapping):,} tiles overlap one of another side, the first of {first}"
            )
    if problems:
        return Finding(False, f"{'; '.join(problems)}.")
    return Finding(True, "Every group and every tile stands on one side.", {"synapses": len(places.synapse_ids)})


def show(dataset: Dataset, _encoder: str, manifest: Manifest) -> View:
    tables = {f"by_{scheme}": table for scheme, table in _tables(manifest.figures["split"]).items()}
    rest = {name: entry for name, entry in view_of_figures(manifest).items() if name != "split"}
    return View(rest | tables, dataset.split_path, ("synapse_id", *splits.SCHEMES))


def _tables(schemes: Mapping[str, Mapping[str, Mapping[str, int]]]) -> dict[str, Table]:
    """Groups and synapses of each class by scheme, without schemes for which the data has no groups."""
    tables: dict[str, Table] = {}
    for scheme, classes in schemes.items():
        if any(count["groups"] for count in classes.values()):
            names = list(next(iter(classes.values())))
            rows: list[list[Any]] = [[name, *(count[each] for each in names)] for name, count in classes.items()]
            tables[scheme] = Table([f"by {scheme}", *names], rows)
    return tables


ASSET = Asset(
    name="split",
    per_encoder=False,
    exists=always,
    description="The side of every synapse, training, validation or test: by neuron, hemilineage or region, and at random to show "
    "what a random split leaks.",
    storage=frozenset({"parquet"}),
    facts=NoFacts,
    reads=lambda dataset, encoder: ("synapses", "rgb_tiles"),
    optional_reads=False,
    version_covers_reads=False,
    code_version=CODE_VERSION,
    still_valid=(),
    specs=lambda dataset, encoder: dataset.spec.split,
    make=make,
    source_version=None,
    checks={"sides_are_apart": sides_are_apart},
    files=lambda dataset, encoder: (dataset.split_path,),
    names_tiles=False,
    leftovers=no_leftovers,
    columns={
        "synapse_id": COLUMNS["synapse_id"],
        "neuron": "Side in the split by neuron; `guard` if it is too near to a tile of another side; empty if it has no neuron.",
        "hemilineage": "Side in the split by hemilineage.",
        "region": "Side in the split by region.",
        "random": "Side in the split synapse by synapse: neurons stand on two sides, and tiles overlap.",
    },
    table_columns=(),
    show=show,
)
