"""Tables as text, for a terminal or for the Markdown that Dagster shows."""

import re
from collections.abc import Sequence
from numbers import Number
from typing import Any

import tabulate

tabulate.MIN_PADDING = 0  # by default, a right-aligned column is two characters wider than its header
_NUMBER = re.compile(r"[-+−]?[\d,]*\.?\d+ ?%?")


def format_table(headers: Sequence[str], rows: Sequence[Sequence[Any]], *, markdown: bool = False) -> str:
    """Lay out rows under their headers. None becomes an empty cell.

    Columns of numbers are aligned to the right, including numbers that are already formatted, such as `12,345` and `97.5%`.
    Text is printed as it is: an id stays exact, and `007` keeps its zeros.
    """
    columns = zip(*rows, strict=True) if rows else [()] * len(headers)
    alignment = ["right" if all(map(_is_number, column)) else "left" for column in columns]
    layout = "github" if markdown else "simple"
    return tabulate.tabulate(rows, headers, tablefmt=layout, missingval="", disable_numparse=True, colalign=alignment)


def _is_number(cell: Any) -> bool:
    return cell is None or isinstance(cell, Number) or (isinstance(cell, str) and bool(_NUMBER.fullmatch(cell)))
