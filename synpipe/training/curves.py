"""Curves of a training run: TensorBoard in the run's folder, and Weights & Biases where that is configured.

In: numbers by name and step. Out: files that `tensorboard --logdir FOLDER` shows. Guarantee: Weights & Biases is imported
and reached only where WANDB_API_KEY is set and the package is installed; whatever it does, training goes on.
"""

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)


class TrainingLog:
    def __init__(self, folder: Path, step: int, settings: Mapping[str, Any]):
        """step: the next to be made; what an interrupted run logged of it and of later ones is left out of the curves.
        settings: of the run, for Weights & Biases."""
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
    """A run of Weights & Biases, None where it is not configured or cannot be started. A resumed training is one run."""
    if not os.environ.get("WANDB_API_KEY"):
        return None
    try:
        import wandb

        name = folder.parent.name
        return wandb.init(
            project="synpipe", id=name, name=name, dir=str(folder.parent), resume="allow", config=dict(settings)
        )
    except Exception as error:  # no package, no network, a wrong key …
        logger.warning("Weights & Biases is left out: %s", error)
        return None
