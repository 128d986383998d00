"""Materialise one asset as Dagster would, for the bench `memory`: `… DATA STORE ASSET` prints the seconds."""

import json
import os
import sys
import time
from pathlib import Path

from synpipe.analysis import projection
from synpipe.assets import classifier_steps
from synpipe.assets.graph import steps
from synpipe.datasets import Project
from synpipe.defs.assets import CHECKS
from synpipe.defs.show import SHOW
from synpipe.embeddings import compression
from synpipe_tests.bench.memory import SAMPLE


def main(data: str, store: str, asset: str) -> None:
    classifier_steps.MAX_ROWS = compression.SAMPLE_ROWS = projection.FIT_ROWS = SAMPLE
    dataset = Project(Path(data), Path(store)).dataset("bench")
    step = next(step for step in steps(dataset) if step.asset == asset)
    began = time.perf_counter()
    which = () if step.encoder is None else (step.encoder,)
    manifest = step.run(lambda line: print(line, file=sys.stderr), None, ())
    for name, check in CHECKS.get(step.kind, {}).items():
        finding = check(dataset, *which)
        if not finding.passed:
            print(f"{asset}: {name}: {finding.description}", file=sys.stderr)
    SHOW[step.kind](dataset, manifest)
    print(json.dumps({"seconds": time.perf_counter() - began}), flush=True)
    os._exit(0)  # running threads of a library once made the process end with an error


if __name__ == "__main__":
    main(*sys.argv[1:])
