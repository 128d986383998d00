"""Run all benches in turn, and print a table of all figures that have a bar: `make bench [BENCH="device search"]`.

Each bench runs in its own process, so that its memory and threads do not affect the next. If one fails, the others
still run, and its name is printed at the end. All of them take about two hours on two cores. Each prints the machine,
its load and the versions beside its figures.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from synpipe_tests.bench import bars

BENCHES = {
    "demo": [],
    "device": [],
    "extraction": [],
    "search": [],
    "memory": [],
    "explorer": [],
    "site": [],
    "map": ["--rows", "103511", "1000000"],
    "projection": ["--rows", "103511"],
    "annotations": ["--rows", "1000000"],
    "balance": [],
    "scale": [],
}


def main() -> None:
    chosen = sys.argv[1:] or list(BENCHES)
    if unknown := set(chosen) - BENCHES.keys():
        sys.exit(f"There is no bench {', '.join(sorted(unknown))}; there are {', '.join(BENCHES)}.")
    failed = []
    with tempfile.TemporaryDirectory() as folder:
        table = Path(folder) / "table.jsonl"
        table.touch()
        for name in chosen:
            print(f"\n—— {name} ——", flush=True)
            command = [sys.executable, "-m", f"synpipe_tests.bench.{name}", *BENCHES[name]]
            if subprocess.run(command, env=os.environ | {"SYNPIPE_BENCH_TABLE": str(table)}, check=False).returncode:
                failed.append(name)
        bars.main(table)
    if failed:
        sys.exit(f"These benches failed: {', '.join(failed)}.")


if __name__ == "__main__":
    main()
