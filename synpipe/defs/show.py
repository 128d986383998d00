"""What a person sees of an asset in the Dagster UI: figures, tables, pictures."""

from collections.abc import Callable, Mapping
from typing import Any

import dagster as dg
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from synpipe.datasets import Dataset
from synpipe.manifests import Manifest
from synpipe.pictures import contact_sheet, data_uri, section_picture
from synpipe.shards import read_table
from synpipe.tiles import TileReader
from synpipe.volumes import Volume

# Badges of the assets, by kind of step.
KINDS = {
    "volume": {"hdf5"},
    "annotations": {"file"},
    "synapses": {"parquet"},
    "synapse_stacks": {"hdf5"},
    "rgb_tiles": {"hdf5"},
    "rejects": {"parquet"},
    "embeddings": {"pytorch"},
    "embedding_table": {"parquet"},
    "index": {"lancedb"},
}
SHEET_TILES = 40
SAMPLE_ROWS = 10


def volume(dataset: Dataset, manifest: Manifest) -> dict[str, Any]:
    with Volume(dataset.spec.volume, dataset.base) as opened:
        picture = section_picture(opened)
    return _figures(manifest) | {"section": _picture(picture, "middle section, reduced")}


def files(_dataset: Dataset, manifest: Manifest) -> dict[str, Any]:
    return _figures(manifest)


def synapses(dataset: Dataset, manifest: Manifest) -> dict[str, Any]:
    return _figures(manifest) | _parquet(dataset.synapses_path) | _notes(manifest)


def stacks(dataset: Dataset, manifest: Manifest) -> dict[str, Any]:
    return _figures(manifest) | _parquet(dataset.stacks_path)


def tiles(dataset: Dataset, manifest: Manifest) -> dict[str, Any]:
    return _figures(manifest) | _parquet(dataset.tiles_path) | _contact_sheet(dataset)


def rejects(dataset: Dataset, manifest: Manifest) -> dict[str, Any]:
    return _figures(manifest) | _parquet(dataset.rejects_path)


def embeddings(_dataset: Dataset, manifest: Manifest) -> dict[str, Any]:
    return _figures(manifest) | {"dagster/row_count": manifest.counts["rows"]}


def embedding_table(dataset: Dataset, manifest: Manifest) -> dict[str, Any]:
    encoder = manifest.asset.removeprefix("embedding_table_")
    return _figures(manifest) | _parquet(dataset.table_path(encoder))


def index(dataset: Dataset, manifest: Manifest) -> dict[str, Any]:
    uri = dg.MetadataValue.path(str(dataset.lancedb_folder))
    return _figures(manifest) | {"dagster/row_count": manifest.counts["rows"], "lancedb": uri}


def _figures(manifest: Manifest) -> dict[str, Any]:
    """Counts as they are; counts by value as a table."""
    return {
        name: _by_value(name, value) if name in ("classes", "reasons") and isinstance(value, Mapping) else value
        for name, value in manifest.counts.items()
    }


def _by_value(name: str, counts: Mapping[str, int]) -> dg.MetadataValue:
    lines = [f"| {name} | rows |", "|---|---|", *(f"| {value} | {count:,} |" for value, count in counts.items())]
    return dg.MetadataValue.md("\n".join(lines))


def _notes(manifest: Manifest) -> dict[str, Any]:
    return {"notes": dg.MetadataValue.md("\n".join(f"- {note}" for note in manifest.notes))} if manifest.notes else {}


def _parquet(path) -> dict[str, Any]:
    """Where the file is, its rows and schema, and a sample of them."""
    file = pq.ParquetFile(path)
    sample = next(file.iter_batches(batch_size=SAMPLE_ROWS), None)
    schema = file.schema_arrow
    columns = [dg.TableColumn(field.name, str(field.type)) for field in schema]
    metadata: dict[str, Any] = {
        "path": dg.MetadataValue.path(str(path)),
        "dagster/row_count": file.metadata.num_rows,
        "dagster/column_schema": dg.TableSchema(columns=columns),
    }
    if sample is not None and len(sample):
        records = [dg.TableRecord({name: _cell(value) for name, value in row.items()}) for row in sample.to_pylist()]
        text = dg.TableSchema(columns=[dg.TableColumn(field.name, "string") for field in schema])
        metadata["sample"] = dg.MetadataValue.table(records, schema=text)
    return metadata


def _cell(value: Any) -> str:
    """Ids above 2⁵³ would lose digits as numbers in a browser; vectors would fill the page."""
    if isinstance(value, list):
        return f"[{', '.join(f'{number:.3f}' for number in value[:3])}, … {len(value)} values]"
    return "" if value is None else str(value)


def _contact_sheet(dataset: Dataset) -> dict[str, Any]:
    table: pa.Table = read_table(dataset.tiles_path)
    if not len(table):
        return {}
    rows = np.linspace(0, len(table) - 1, min(SHEET_TILES, len(table))).astype(int)
    reader = TileReader(table, dataset.folder, dataset.spec.tiles.stacking)
    captions = [str(table["synapse_id"][int(row)]) for row in rows]
    return {"contact_sheet": _picture(contact_sheet(list(reader.read(rows)), captions), "tiles")}


def _picture(image, caption: str) -> dg.MetadataValue:
    return dg.MetadataValue.md(f"![{caption}]({data_uri(image)})")


# What is shown, by kind of step.
SHOW: dict[str, Callable[[Dataset, Manifest], dict[str, Any]]] = {
    "volume": volume,
    "annotations": files,
    "synapses": synapses,
    "synapse_stacks": stacks,
    "rgb_tiles": tiles,
    "rejects": rejects,
    "embeddings": embeddings,
    "embedding_table": embedding_table,
    "index": index,
}
