"""Records the curves of a training run in TensorBoard and, if it is configured, in Weights & Biases.

Input: numbers by name and step. Output: files in the folder of the run, which `tensorboard --logdir FOLDER` shows. Weights &
Biases is imported and contacted only if WANDB_API_KEY is set. If it cannot be started, training continues without it.
"""

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from synpipe.errors import one_line

logger = logging.getLogger(__name__)


class TrainingCurves:
    """The curves of one training run. Call `close` at its end."""

    def __init__(self, folder: Path, step: int, settings: Mapping[str, Any]):
        """step: the next step. Values that an interrupted run logged for it and for later steps are hidden.
        settings: the settings of the run, for Weights & Biases.
        """
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=step)
        self._wandb = _wandb_run(folder, settings)

    def add(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(dict(values), step=step)

    def close(self) -> None:
        self._writer.close()
        if self._wandb is not None:
            self._wandb.finish()


def _wandb_run(folder: Path, settings: Mapping[str, Any]) -> Any:
    """A run of Weights & Biases, or None if it is not configured or cannot be started. A resumed training stays one run."""
    if not os.environ.get("WANDB_API_KEY"):
        return None
    try:
        import wandb

        name = folder.parent.name
        return wandb.init(
            project="synpipe", id=name, name=name, dir=str(folder.parent), resume="allow", config=dict(settings)
        )
    except Exception as error:  # no package, no network, a wrong key …
        logger.warning("Training continues without Weights & Biases: %s", one_line(error))
        return None
