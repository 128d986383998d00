"""What the readers of all annotation files share: numbered rows, and errors that name the file."""

import csv
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa

from synpipe.errors import SynpipeError, one_line


@contextmanager
def explain_damage(path: Path) -> Iterator[None]:
    """Turn the errors that libraries raise on a damaged file into a `SynpipeError` that names the file."""
    try:
        yield
    except (pa.ArrowException, csv.Error, OSError, ValueError, TypeError, RuntimeError) as error:
        raise SynpipeError(
            f"{path} is truncated or damaged, or its content does not match its name ({one_line(error)}). Copy or export "
            "it again."
        ) from None


def number_rows(table: pa.Table) -> pa.Table:
    """Add the column `row`, which counts the rows from 1."""
    return table.append_column("row", pa.array(np.arange(1, 1 + table.num_rows)))
