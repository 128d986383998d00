"""Tables as text, for a terminal or for the Markdown that Dagster shows."""

from collections.abc import Sequence
from numbers import Number
from typing import Any

from tabulate import tabulate


def format_table(headers: Sequence[str], rows: Sequence[Sequence[Any]], *, markdown: bool = False) -> str:
    """Lay out rows under their headers. None becomes an empty cell; columns of numbers are aligned to the right.

    Text is printed as it is: an id stays exact, and `007` keeps its zeros.
    """
    columns = zip(*rows, strict=True) if rows else [()] * len(headers)
    alignment = [
        "right" if all(cell is None or isinstance(cell, Number) for cell in column) else "left" for column in columns
    ]
    layout = "github" if markdown else "simple"
    return tabulate(rows, headers, tablefmt=layout, missingval="", disable_numparse=True, colalign=alignment)
