"""A small fine-tuning that can be killed: `python -m synpipe_tests.finetune_once FOLDER` runs it, or carries on.

Tiles are noise of three grains. A checkpoint is written after every step, and what reads the tiles takes its time, so that
a kill hits the middle of an epoch.
"""

import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from synpipe import finetuning
from synpipe.classifier import FinetuneSpec
from synpipe.encoders import EncoderSpec
from synpipe.finetuning import Examples, finetune

SPEC = FinetuneSpec(epochs=3, batch_size=8, learning_rate=2e-3)
ENCODER = EncoderSpec(model="test_resnet", weights="random", seed=0, crop_px=64, precision="fp32")
COUNT = 48
CODES = np.arange(COUNT) % 3


def tiles() -> np.ndarray:
    """uint8 (COUNT, 3, 256, 256)."""
    random = np.random.default_rng(0)
    found = np.empty((COUNT, 3, 256, 256), np.uint8)
    for place, code in enumerate(CODES):
        grain = 2 ** (2 - int(code))
        noise = random.integers(60, 200, (3, 256 // grain, 256 // grain))
        found[place] = noise.repeat(grain, axis=1).repeat(grain, axis=2)
    return found


def run(folder: Path, pause_s: float = 0.0, said: list[str] | None = None, **changes: Any) -> dict[str, Any]:
    """The first half is for training, the next quarter for validation, and the last must not be read."""
    content = tiles()

    def read(rows: np.ndarray) -> np.ndarray:
        assert rows.max() < COUNT * 3 // 4
        time.sleep(pause_s)
        return content[rows]

    parts = (np.arange(COUNT // 2), np.arange(COUNT // 2, COUNT * 3 // 4))
    training, validation = (Examples(rows, CODES[rows]) for rows in parts)
    spec = SPEC.model_copy(update=changes)
    log = (lambda line: None) if said is None else said.append
    return finetune(spec, ENCODER, folder, read, training, validation, 3, folder, log, device="cpu")


if __name__ == "__main__":
    finetuning.CHECKPOINT_S = 0.0
    run(Path(sys.argv[1]), pause_s=0.3)
