"""What a person sees of an asset in the Dagster UI: what it is, figures, tables, pictures.

In: a step and its manifest. Out: descriptions and metadata for Dagster. Guarantee: a bounded size, whatever the size of
the data set: samples and reduced pictures only.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import dagster as dg
import pyarrow.parquet as pq
from PIL import Image

from synpipe.analysis.charts import draw_confusion, draw_figures
from synpipe.analysis.classifier_report import confusion_table, recall_table
from synpipe.analysis.compare import encoder_table, format_figure
from synpipe.analysis.metrics import Estimate
from synpipe.analysis.pictures import data_uri, draw_section
from synpipe.analysis.splits import SCHEMES
from synpipe.assets.graph import Step
from synpipe.assets.manifest import Manifest
from synpipe.datasets import Dataset
from synpipe.errors import SynpipeError
from synpipe.reports.comparison import read_encoder_rows
from synpipe.reports.pictures import nearest_neighbours, tiles_by_class, vector_map
from synpipe.store.files import read_json
from synpipe.text import format_table
from synpipe.volumes.volume import Volume

SAMPLE_ROWS = 10

# Badges of the assets, by kind of step.
KINDS = {
    "volume": {"hdf5"},
    "annotations": {"file"},
    "synapses": {"parquet"},
    "synapse_stacks": {"hdf5"},
    "rgb_tiles": {"hdf5"},
    "rejects": {"parquet"},
    "split": {"parquet"},
    "embeddings": {"pytorch"},
    "classifier": {"parquet", "scikitlearn"},
    "projection": {"parquet"},
    "embedding_table": {"parquet"},
    "index": {"lancedb"},
    "scores": {"parquet"},
    "evaluation": {"parquet"},
}

DESCRIPTIONS = {
    "volume": "The EM volume: its size, voxel size and fingerprint. It is read, never changed.",
    "annotations": "The files that say where the synapses are, and a fingerprint of what they hold.",
    "synapses": "One row per usable synapse: position in nm, neuron, hemilineage, region, transmitter. What could not be "
    "used is in `rejects`.",
    "synapse_stacks": "For every synapse the sections z−1, z and z+1, 256 × 256 pixels around it, cut out of the volume.",
    "rgb_tiles": "The stacks as tiles for the encoders: three sections as red, green and blue, or the middle one in grey.",
    "rejects": "Every synapse that has no tile, with the reason, and the file and row that it comes from.",
    "split": "The side of every synapse, training, validation or test: by neuron, hemilineage or region, and at random to "
    "show beside the others what that leaks.",
    "embeddings": "A vector per tile. Only tiles that this encoder has not seen are embedded.",
    "classifier": "The class of every synapse, predicted from its vector, and the vote of every neuron; how good that is on the "
    "test side.",
    "projection": "A place in the plane for every synapse, by UMAP: vectors that are alike lie side by side.",
    "embedding_table": "The synapses with their vectors in one Parquet file, for pandas, Polars, DuckDB and others.",
    "index": "The table in LanceDB, versioned and indexed, for `synpipe search`.",
    "scores": "How good the neighbours are: do synapses find their class, in other neurons, and places themselves? With "
    "intervals.",
    "evaluation": "The figures of every encoder, a row each, for choosing among them; `synpipe compare A B` says more of two.",
}

COLUMNS = {
    "synapse_id": "Unique in the data set.",
    "x_nm": "Position in nanometres.",
    "y_nm": "Position in nanometres.",
    "z_nm": "Position in nanometres, across the sections.",
    "neuron_id": "The presynaptic neuron; empty where it is not known.",
    "hemilineage": "Hemilineage of that neuron.",
    "region": "Neuropil.",
    "neurotransmitter": "The class; empty where it is not known.",
    "confidence": "Of the detection, as the source gives it.",
    "source": "The annotation file.",
    "source_id": "The synapse's name or row in that file.",
    "neuroglancer": "Link to the place in Neuroglancer; empty where the volume is in local files.",
    "reason": "Why there is no tile; empty where there is one.",
    "detail": "The reason as a sentence.",
    "shard": "Synapses that lie close together are in the same shard.",
    "file": "HDF5 file of the tile, in the data set's folder.",
    "row": "Of the tile in that file.",
    "start_z": "First voxel of the stack.",
    "start_y": "First voxel of the stack; negative where it begins outside the volume.",
    "start_x": "First voxel of the stack; negative where it begins outside the volume.",
    "z_index": "Section of the synapse, counted from the volume's first.",
    "pad_fraction": "Share of the tile's area outside the volume.",
    "missing_sections": "Bits 0, 1, 2: section z−1, z, z+1 is outside, blank or a copy.",
    "mean": "Grey value of the tile, 0 to 255.",
    "std": "Contrast of the tile.",
    "crc32": "Checksum of the tile.",
    "content_hash": "SHA-256 of the tile, its first 32 digits: what it is embedded under.",
    "neuron": "Side in the split by neuron; `guard`: too near to a tile of another side; empty where it cannot be placed.",
    "random": "Side in the split synapse by synapse: neurons stand on two sides and tiles overlap.",
    "predicted_neurotransmitter": "Class that the classifier predicts; `neurotransmitter` is the one that was annotated.",
    "predicted_probability": "Of the predicted class, under equal shares of the classes.",
    "class_probabilities": "Of every class, in the order of the data set's `classes`.",
    "split": "Side on which the synapse stood: predictions of `train` rows are no evidence.",
    "vector": "Embedding of unit length.",
    "label": "The class; empty where it is not known.",
    "voted": "The class for which the ten nearest of other neurons vote; empty where it was not a query.",
    "average_precision": "Of its own class in the ranking; empty where it was not a query.",
    "precision_at_10": "Share of its own class among the ten nearest of other neurons.",
    "instance_rank": "Rank of the original for an altered view of it; empty where none was tried.",
    "nearest": "The nearest of known class, of other neurons and other places.",
    "group": "The neuron, or where it is not known the place, as a number: what is resampled as one.",
    "norm": "Length of the vector as the encoder gave it.",
    "map_x": "Place on the map of the encoder; empty where there is none.",
    "map_y": "Place on the map of the encoder; empty where there is none.",
    "encoder": "Entry of `encoders.yaml`.",
    "encoder_fingerprint": "Weights, architecture, preprocessing, precision.",
    "dataset_version": "Of synapses and tiles together.",
}


def describe(step: Step) -> str:
    """What the asset is, and for an embedding of which encoder."""
    encoder = step.dataset.encoders[step.encoder].description if step.encoder else ""
    return f"{DESCRIPTIONS[step.kind]} {encoder}".strip()


def volume(dataset: Dataset, manifest: Manifest) -> dict[str, Any]:
    with Volume(dataset.spec.volume, dataset.base) as opened:
        try:
            picture = draw_section(opened)
        except SynpipeError:
            picture = None  # nothing is stored there, or its server fails just now: no reason to make nothing else
    return _picture("middle_section", picture) | _figures(manifest)


def figures(_dataset: Dataset, manifest: Manifest) -> dict[str, Any]:
    return _figures(manifest)


def synapses(dataset: Dataset, manifest: Manifest) -> dict[str, Any]:
    columns = ["synapse_id", "x_nm", "y_nm", "z_nm", "neuron_id", "neurotransmitter", "hemilineage", "region"]
    return _figures(manifest) | _parquet(dataset.synapses_path, columns)


def stacks(dataset: Dataset, manifest: Manifest) -> dict[str, Any]:
    columns = ["synapse_id", "shard", "start_z", "start_y", "start_x", "pad_fraction", "missing_sections", "reason"]
    return _figures(manifest) | _parquet(dataset.stacks_path, columns)


def tiles(dataset: Dataset, manifest: Manifest) -> dict[str, Any]:
    columns = ["synapse_id", "shard", "row", "z_index", "pad_fraction", "missing_sections", "mean", "std"]
    pictures = _picture("contact_sheet", tiles_by_class(dataset))
    return pictures | _figures(manifest) | _parquet(dataset.tiles_path, columns)


def rejects(dataset: Dataset, manifest: Manifest) -> dict[str, Any]:
    shown = _figures(manifest) | _parquet(dataset.rejects_path, ["synapse_id", "reason", "detail"])
    first = next(
        pq.ParquetFile(dataset.rejects_path).iter_batches(
            SAMPLE_ROWS, columns=["synapse_id", "reason", "neuroglancer"]
        ),
        None,
    )
    # Beside the table, whose cells are text.
    links = [
        f"- [{row['synapse_id']}]({row['neuroglancer']}): {row['reason']}"
        for row in (first.to_pylist() if first else [])
        if row["neuroglancer"]
    ]
    return shown | ({"neuroglancer": dg.MetadataValue.md("\n".join(links))} if links else {})


def split(dataset: Dataset, manifest: Manifest) -> dict[str, Any]:
    return _figures(manifest) | _parquet(dataset.split_path, ["synapse_id", *SCHEMES])


def embeddings(_dataset: Dataset, manifest: Manifest) -> dict[str, Any]:
    return _figures(manifest) | {"dagster/row_count": manifest.counts["rows"]}


def classifier(dataset: Dataset, manifest: Manifest) -> dict[str, Any]:
    encoder = manifest.asset.removeprefix("classifier_")
    columns = ["synapse_id", "split", "neurotransmitter", "predicted_neurotransmitter", "predicted_probability"]
    shown = _figures(manifest)
    if "confusion" in manifest.counts:
        picture = draw_confusion(manifest.counts, f"{dataset.name}, {encoder}, split by {manifest.counts['by']}")
        shown = _picture("confusion_matrix", picture) | shown
    return shown | _parquet(dataset.predictions_path(encoder), columns)


def projection(dataset: Dataset, manifest: Manifest) -> dict[str, Any]:
    encoder = manifest.asset.removeprefix("projection_")
    picture = _picture("map", vector_map(dataset, encoder))
    return picture | _figures(manifest) | _parquet(dataset.projection_path(encoder), ["synapse_id", "map_x", "map_y"])


def embedding_table(dataset: Dataset, manifest: Manifest) -> dict[str, Any]:
    encoder = manifest.asset.removeprefix("embedding_table_")
    columns = ["synapse_id", "neurotransmitter", "neuron_id", "norm", "vector"]
    return _figures(manifest) | _parquet(dataset.table_path(encoder), columns)


def index(dataset: Dataset, manifest: Manifest) -> dict[str, Any]:
    encoder = manifest.asset.removeprefix("index_")
    pictures = _picture("nearest_neighbours", nearest_neighbours(dataset, encoder))
    folder = {"path": dg.MetadataValue.path(str(dataset.lancedb_folder / f"{encoder}.lance"))}
    return pictures | _figures(manifest) | folder | {"dagster/row_count": manifest.counts["rows"]}


def scores(dataset: Dataset, manifest: Manifest) -> dict[str, Any]:
    report = read_json(dataset.scores_path(manifest.asset.removeprefix("scores_")))
    columns = ["synapse_id", "label", "voted", "average_precision", "precision_at_10", "instance_rank", "nearest"]
    tables = {
        "by_class": dg.MetadataValue.md(_estimates("class", report["classes"])),
        "single_alterations": dg.MetadataValue.md(_estimates("altered", report["alterations"])),
    }
    return tables | _figures(manifest) | _parquet(dataset.queries_path(report["encoder"]), columns)


def _estimates(head: str, rows: Mapping[str, Mapping[str, Any]]) -> str:
    names = list(next(iter(rows.values()), {}))
    cells = [[key, *(format_figure(Estimate(**row[name])) for name in names)] for key, row in rows.items()]
    return format_table([head, *names], cells, markdown=True)


def evaluation(dataset: Dataset, manifest: Manifest) -> dict[str, Any]:
    rows = read_encoder_rows(dataset)
    report = {"report": dg.MetadataValue.md(format_table(*encoder_table(rows), markdown=True))}
    figures = ["instance_recall_at_1", "knn_balanced_accuracy", "map"]
    columns = ["encoder", "dimensions", *figures, "index_recall", "bytes_per_vector"]
    return _picture("figures", draw_figures(rows)) | report | _parquet(dataset.evaluation_path, columns)


# Counts for the next steps only.
HIDDEN = ("rows", "encoder_identity", "files", "sha256_by_source", "neuroglancer")

# What is shown, by kind of step.
SHOW: dict[str, Callable[[Dataset, Manifest], dict[str, Any]]] = {
    "volume": volume,
    "annotations": figures,
    "synapses": synapses,
    "synapse_stacks": stacks,
    "rgb_tiles": tiles,
    "rejects": rejects,
    "split": split,
    "embeddings": embeddings,
    "classifier": classifier,
    "projection": projection,
    "embedding_table": embedding_table,
    "index": index,
    "scores": scores,
    "evaluation": evaluation,
}


def _figures(manifest: Manifest) -> dict[str, Any]:
    """Counts in the form in which the page shows them best; then the notes."""
    shown = {
        name: _figure(name, value, manifest.counts) for name, value in manifest.counts.items() if name not in HIDDEN
    }
    if manifest.notes:
        shown["notes"] = dg.MetadataValue.md("\n".join(f"- {note}" for note in manifest.notes))
    return shown


def _figure(name: str, value: Any, counts: Mapping[str, Any]) -> Any:
    if name in ("classes", "reasons") and isinstance(value, Mapping):
        rows = (f"| {key} | {count:,} |" for key, count in value.items())
        return dg.MetadataValue.md("\n".join([f"| {name} | rows |", "|---|---:|", *rows]))
    if name == "recalls":
        return dg.MetadataValue.md(format_table(*recall_table(counts), markdown=True))
    if name == "confusion":
        return dg.MetadataValue.md(format_table(*confusion_table(counts), markdown=True))
    if name == "split":
        return dg.MetadataValue.md(_split_table(value))
    if name == "paths":
        return dg.MetadataValue.md("\n".join(f"- `{file}`" for file in value))
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return value


def _split_table(schemes: Mapping[str, Mapping[str, Mapping[str, int]]]) -> str:
    """Groups and synapses of each class by scheme; schemes of which the data knows no group are left out."""
    lines = []
    for scheme, classes in schemes.items():
        if any(count["groups"] for count in classes.values()):
            names = list(next(iter(classes.values())))
            lines += [f"| by {scheme} | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
            lines += [f"| {name} | {' | '.join(f'{n:,}' for n in count.values())} |" for name, count in classes.items()]
            lines.append("")
    return "\n".join(lines) or "No synapse has a class."


def _parquet(path: Path, sample_columns: Sequence[str]) -> dict[str, Any]:
    """Where the file is, its rows and schema, and its first rows."""
    file = pq.ParquetFile(path)
    columns = [dg.TableColumn(field.name, str(field.type), COLUMNS.get(field.name)) for field in file.schema_arrow]
    metadata: dict[str, Any] = {
        "path": dg.MetadataValue.path(str(path)),
        "dagster/row_count": file.metadata.num_rows,
        "dagster/column_schema": dg.TableSchema(columns=columns),
    }
    sample = next(file.iter_batches(batch_size=SAMPLE_ROWS, columns=list(sample_columns)), None)
    if sample is not None and len(sample):
        records = [dg.TableRecord({name: _cell(row[name]) for name in sample_columns}) for row in sample.to_pylist()]
        text = dg.TableSchema(columns=[dg.TableColumn(name, "string") for name in sample_columns])
        metadata["sample"] = dg.MetadataValue.table(records, schema=text)
    return metadata


def _cell(value: Any) -> str:
    """Ids above 2⁵³ would lose digits as numbers in a browser; vectors would fill the page."""
    if isinstance(value, list):
        return ", ".join(f"{number:.2g}" for number in value[:2]) + ", …"
    if isinstance(value, float):
        return f"{value:.6g}"
    return "" if value is None else str(value)


def _picture(name: str, image: Image.Image | None) -> dict[str, Any]:
    """Dagster shows Markdown of more than 1,000 characters on a click; there is no other way to give it a picture."""
    return {} if image is None else {name: dg.MetadataValue.md(f"![{name}]({data_uri(image)})")}
