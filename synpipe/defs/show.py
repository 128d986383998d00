"""What people see of an asset in the Dagster UI: the asset's `View` as Dagster metadata.

Views are samples and reduced pictures, so the metadata has a bounded size whatever the size of the data set.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import dagster as dg
import pyarrow.parquet as pq
from PIL import Image

from synpipe.analysis.pictures import data_uri
from synpipe.assets.asset import Links, Table, View
from synpipe.text import format_table

SAMPLE_ROWS = 10


def as_metadata(view: View, rows: int | None, column_descriptions: Mapping[str, str]) -> dict[str, Any]:
    """The entries of a view in the form in which the asset's page shows them best, then the place that holds the asset."""
    metadata = {name: _as_value(name, entry) for name, entry in view.entries.items()}
    if rows is not None:
        metadata["dagster/row_count"] = rows
    if view.place is not None:
        metadata["path"] = dg.MetadataValue.path(str(view.place))
    if isinstance(view.place, Path) and view.place.suffix == ".parquet":
        metadata |= _describe_parquet(view.place, view.sample_columns, column_descriptions)
    return metadata


def _as_value(name: str, entry: Any) -> Any:
    if isinstance(entry, Image.Image):
        # Dagster shows Markdown of more than 1,000 characters on a click; there is no other way to give it a picture.
        return dg.MetadataValue.md(f"![{name}]({data_uri(entry)})")
    if isinstance(entry, Table):
        return dg.MetadataValue.md(format_table(entry.headers, entry.rows, markdown=True))
    if isinstance(entry, Links):
        return dg.MetadataValue.md(
            "\n".join(f"- [{text}]({address}): {remark}" for text, address, remark in entry.items)
        )
    return list(entry) if isinstance(entry, tuple) else entry


def _describe_parquet(path: Path, sample_columns: Sequence[str], descriptions: Mapping[str, str]) -> dict[str, Any]:
    """Schema and first rows of a Parquet file."""
    file = pq.ParquetFile(path)
    columns = [dg.TableColumn(field.name, str(field.type), descriptions.get(field.name)) for field in file.schema_arrow]
    metadata: dict[str, Any] = {"dagster/column_schema": dg.TableSchema(columns=columns)}
    sample = next(file.iter_batches(batch_size=SAMPLE_ROWS, columns=list(sample_columns)), None)
    if sample is not None and len(sample):
        records = [dg.TableRecord({name: _cell(row[name]) for name in sample_columns}) for row in sample.to_pylist()]
        text = dg.TableSchema(columns=[dg.TableColumn(name, "string") for name in sample_columns])
        metadata["sample"] = dg.MetadataValue.table(records, schema=text)
    return metadata


def _cell(value: Any) -> str:
    """Text, because a browser rounds ids above 2⁵³ and a whole vector would fill the page."""
    if isinstance(value, list):
        return ", ".join(f"{number:.2g}" for number in value[:2]) + ", …"
    if isinstance(value, float):
        return f"{value:.6g}"
    return "" if value is None else str(value)
