"""Figures and their bars: benches report one at a time, and `make bench` ends with a table of all.

The environment variable SYNPIPE_BENCH_TABLE names the file, JSON lines, that collects the table.
`python -m synpipe_tests.bench.bars FILE` prints it.
"""

import json
import os
import sys
from pathlib import Path
from typing import SupportsFloat


def row(figure: str, value: SupportsFloat, bar: float, at_most: bool = True, unit: str = "") -> None:
    """Print a figure beside its bar, and add it to the table if one is being collected.

    figure: what is measured, and by which bench. at_most: whether the bar is the highest allowed value, or else the lowest.
    """
    told = {"figure": figure, "value": float(value), "bar": bar, "at_most": at_most, "unit": unit}
    print(_line(told), flush=True)
    if table := os.environ.get("SYNPIPE_BENCH_TABLE"):
        with open(table, "a") as file:
            file.write(json.dumps(told) + "\n")


def _line(told: dict) -> str:
    met = told["value"] <= told["bar"] if told["at_most"] else told["value"] >= told["bar"]
    sign = "≤" if told["at_most"] else "≥"
    value, bar = f"{told['value']:.4g} {told['unit']}".strip(), f"{sign} {told['bar']:g}"
    return f"  {'met   ' if met else 'MISSED'}  {told['figure']:<76} {value:>12}   {bar}"


def main(table: Path) -> None:
    lines = [_line(json.loads(line)) for line in table.read_text().splitlines()]
    print("\nEvery figure that has a bar\n" + "\n".join(lines))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
