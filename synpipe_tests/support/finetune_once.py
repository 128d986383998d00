"""A small fine-tuning that kills itself: `python -m synpipe_tests.support.finetune_once FOLDER NUMBER`.

The tiles are noise of three grain sizes. A checkpoint is written after every step and every epoch. The process ends
when half of checkpoint NUMBER is written.
"""

import os
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from synpipe.analysis.classifier import FinetuneSpec
from synpipe.embeddings.encoder_specs import EncoderSpec
from synpipe.training import finetuning
from synpipe.training.finetuning import Examples, FinetuneTask, finetune

SPEC = FinetuneSpec(epochs=3, batch_size=8, learning_rate=2e-3)
ENCODER = EncoderSpec(model="test_resnet", weights="random", seed=0, crop_px=64, precision="fp32")
COUNT = 48
CODES = np.arange(COUNT) % 3


def tiles() -> np.ndarray:
    """Return the tiles: uint8 (COUNT, 3, 256, 256)."""
    random = np.random.default_rng(0)
    found = np.empty((COUNT, 3, 256, 256), np.uint8)
    for place, code in enumerate(CODES):
        grain = 2 ** (2 - int(code))
        noise = random.integers(60, 200, (3, 256 // grain, 256 // grain))
        found[place] = noise.repeat(grain, axis=1).repeat(grain, axis=2)
    return found


def run(folder: Path, said: list[str] | None = None, **changes: Any) -> dict[str, Any]:
    """Use the first half for training and the next quarter for validation. The last quarter must not be read."""
    content = tiles()

    def read(rows: np.ndarray) -> np.ndarray:
        assert rows.max() < COUNT * 3 // 4
        return content[rows]

    parts = (np.arange(COUNT // 2), np.arange(COUNT // 2, COUNT * 3 // 4))
    training, validation = (Examples(rows, CODES[rows]) for rows in parts)
    spec = SPEC.model_copy(update=changes)
    log = (lambda line: None) if said is None else said.append
    task = FinetuneTask(spec, ENCODER, ENCODER.identity(folder, {}), folder, read, training, validation, 3, folder)
    return finetune(task, log, device="cpu")


def kill_while_saving(number: int) -> None:
    """Make this process kill itself when half of a checkpoint is written."""
    save, saved = torch.save, 0

    def counted(state: Any, path: Path) -> None:
        nonlocal saved
        saved += 1
        save(state, path)
        if saved == number:
            os.truncate(path, path.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    torch.save = counted


if __name__ == "__main__":
    finetuning.CHECKPOINT_S = 0.0
    kill_while_saving(int(sys.argv[2]))
    run(Path(sys.argv[1]))
