"""The asset `evaluation`: the figures of every encoder, a row each, in `evaluation.parquet`."""

from typing import Any

import pyarrow as pa

from synpipe.analysis.charts import draw_figures
from synpipe.analysis.compare import encoder_table
from synpipe.analysis.evaluation import FIGURES
from synpipe.assets import index
from synpipe.assets.asset import Asset, Made, NoFacts, Table, Task, View, no_leftovers
from synpipe.assets.manifest import Manifest, data_version_of, file_metadata
from synpipe.datasets import Dataset
from synpipe.errors import SynpipeError
from synpipe.store.files import read_json, read_table, write_table

CODE_VERSION = "2"
COPIED = ("encoder", "dimensions", "queries", "places", "groups", "index_recall", "bytes_per_vector")


def make(task: Task) -> Made[NoFacts]:
    """Gather the figures of all encoders that have been scored."""
    dataset = task.dataset
    scored = [encoder for encoder in dataset.encoders if f"scores_{encoder}" in task.inputs]
    rows: list[dict[str, Any]] = []
    for encoder in scored:
        report = read_json(dataset.scores_path(encoder))
        row = {name: report[name] for name in COPIED}
        for figure, value in report["figures"].items():
            row |= {figure: value["value"], f"{figure}_low": value["low"], f"{figure}_high": value["high"]}
        rows.append(row | {"encoder_fingerprint": report["encoder_fingerprint"]})
    if not rows:
        raise SynpipeError(
            f"No encoder of {dataset.name} has been scored. Run `synpipe materialize --dataset {dataset.name}`."
        )
    version = data_version_of("evaluation", CODE_VERSION, task.inputs, scored)
    numbers = {name: pa.float64() for name in rows[0] if name.startswith(tuple(FIGURES))}
    schema = pa.schema([(name, numbers.get(name, pa.scalar(value).type)) for name, value in rows[0].items()])
    metadata = file_metadata(dataset, version, task.inputs)
    write_table(dataset.evaluation_path, pa.Table.from_pylist(rows, schema), metadata)
    task.log(f"{len(rows)} encoders")
    return Made(version, NoFacts(), len(rows))


def read_rows(dataset: Dataset) -> list[dict[str, Any]]:
    """A row per encoder that was scored, in the order of the data set, with `query_ms`: the median time of a query.

    A time is not content of an asset, so it comes from the facts of the index. Raises `SynpipeError` if no encoder was scored.
    """
    rows = read_table(dataset.evaluation_path).to_pylist()
    return [row | {"query_ms": index.ASSET.read(dataset, row["encoder"]).query_ms} for row in rows]


def show(dataset: Dataset, _encoder: str, _manifest: Manifest) -> View:
    rows = read_rows(dataset)
    figures = ("instance_recall_at_1", "knn_balanced_accuracy", "map")
    columns = ("encoder", "dimensions", *figures, "index_recall", "bytes_per_vector")
    entries = {"figures": draw_figures(rows), "report": Table(*encoder_table(rows))}
    return View(entries, dataset.evaluation_path, columns)


ASSET = Asset(
    name="evaluation",
    per_encoder=False,
    exists=lambda dataset, encoder: dataset.spec.evaluation is not None,
    description="The figures of every encoder, a row each, for choosing among them. `synpipe compare A B` compares two in detail.",
    storage=frozenset({"parquet"}),
    facts=NoFacts,
    reads=lambda dataset, encoder: tuple(f"scores_{name}" for name in dataset.encoders),
    optional_reads=True,
    version_covers_reads=True,
    code_version=CODE_VERSION,
    still_valid=(),
    specs=lambda dataset, encoder: [dataset.identity(name) for name in dataset.encoders],
    make=make,
    source_version=None,
    checks={},
    files=lambda dataset, encoder: (dataset.evaluation_path,),
    names_tiles=False,
    leftovers=no_leftovers,
    columns={
        "encoder": "Entry of `encoders.yaml`.",
        "encoder_fingerprint": "Digest of the encoder's weights, architecture, preprocessing and precision.",
        "dimensions": "Numbers in a vector.",
        "queries": "Synapses that searched for their class.",
        "places": "Places of which altered views were looked for.",
        "groups": "Neurons or places that are resampled for the intervals.",
        "index_recall": "recall@10 of the LanceDB index against an exact search.",
        "bytes_per_vector": "Bytes of a vector in the Parquet table.",
        **{
            f"{name}{suffix}": f"{figure.title}{meaning}."
            for name, figure in FIGURES.items()
            for suffix, meaning in (("", ""), ("_low", ", lower end of the 95 % interval"), ("_high", ", upper end"))
        },
    },
    table_columns=(),
    show=show,
)
