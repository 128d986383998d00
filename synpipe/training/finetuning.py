"""Fine-tunes the network of an encoder to predict the classes, on a GPU or a CPU.

Input: tiles and classes of the training and the validation side. Output: the weights of the epoch with the best validation
score, as safetensors that `encoders.yaml` can name, and the linear layer on top. Tiles are preprocessed as the encoder does
it (`open_network`). The test side is never passed to this module.

A run that was killed continues from its last checkpoint. Every step draws its random numbers from (seed, epoch, step), so
on a CPU with the same number of threads the result is bit for bit that of an uninterrupted run.

Each run has a folder: `checkpoint.pt` (tensors and numbers, loaded with `weights_only`) and `tensorboard/`. A finished run
also has `weights.safetensors`, `head.safetensors` and, written last, `report.json`.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from synpipe.analysis.classifier import FinetuneSpec
from synpipe.analysis.linear_probe import Probe, class_weights
from synpipe.analysis.metrics import balanced_accuracy
from synpipe.embeddings.encoders import EncoderSpec, find_device, open_network
from synpipe.errors import SynpipeError
from synpipe.progress import Log, Progress
from synpipe.store.files import atomic_path, read_json, write_json
from synpipe.tiles.tile import TILE_PX
from synpipe.training.augmentation import augment
from synpipe.training.curves import TrainingCurves

if TYPE_CHECKING:
    import torch

ReadTiles = Callable[[np.ndarray], np.ndarray]

CHECKPOINT_S = 120.0
WARM_UP = 0.05  # share of all steps
READERS = 4  # threads that read tiles, each one batch ahead of the network
# The layer sees unit vectors, as searches do, so its outputs differ by at most 2. Without a factor the loss could not become
# small (Wang et al., NormFace, ACM Multimedia 2017).
LOGIT_SCALE = 16.0
WEIGHTS, HEAD = "weights.safetensors", "head.safetensors"


@dataclass(frozen=True)
class Examples:
    """Rows of the tiles and the codes of their classes, both int64 (n,)."""

    rows: np.ndarray
    codes: np.ndarray


@dataclass(frozen=True)
class FinetuneTask:
    """A network, what it learns from, and where the run is kept.

    encoder: the network to start from. identity: that of the encoder when `folder` was named. weights_base: the folder where its
    relative weights path starts. read_tiles: rows to tiles, uint8 (n, 3, 256, 256). n_classes: class codes are
    0 … n_classes − 1. folder: of this run only; its name must depend on everything that affects the outcome.
    """

    spec: FinetuneSpec
    encoder: EncoderSpec
    identity: str
    weights_base: Path
    read_tiles: ReadTiles
    training: Examples
    validation: Examples
    n_classes: int
    folder: Path


def finetune(task: FinetuneTask, log: Log, device: str = "auto") -> dict[str, Any]:
    """Train, continue an interrupted run, or return the report of a finished one. The report is also in the folder.

    The report: `epochs` that were run, `best_epoch` and its `validation_balanced_accuracy` (None without validation rows, in
    which case the last epoch is used), and `history` with an entry per epoch.
    Raises `SynpipeError` if the loss is not finite, a batch does not fit into the memory of the device, or the checkpoint is
    damaged.
    """
    import torch

    report_path = task.folder / "report.json"
    if report_path.exists():
        return read_json(report_path)
    run = _Run(task, log, device)
    try:
        with torch.random.fork_rng(devices=[]):  # leaves the random numbers of the caller alone
            return run.train()
    finally:
        run.close()


class _Run:
    """The state of a run, which its checkpoint keeps: network, optimiser, position, history and best weights."""

    def __init__(self, task: FinetuneTask, log: Log, device: str):
        import torch

        spec = task.spec
        self.spec, self.folder, self.log, self._read = spec, task.folder, log, task.read_tiles
        self.training, self.validation = task.training, task.validation
        self.device = find_device(device)
        backbone, weights_loaded, preprocessing = open_network(task.encoder, task.weights_base)
        task.encoder.check_loaded(weights_loaded, task.identity)  # the folder is named after the identity
        self.crop_px = preprocessing["crop_px"]
        backbone.eval()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(spec.seed)
            with torch.no_grad():
                dim = backbone(torch.zeros(1, 3, self.crop_px, self.crop_px)).shape[1]
            head = torch.nn.Linear(dim, task.n_classes)
        self.network = torch.nn.ModuleDict({"backbone": backbone, "head": head})
        self.network.to(memory_format=torch.channels_last).to(self.device)
        self.mean, self.std = (
            torch.tensor(preprocessing[key], device=self.device).view(1, 3, 1, 1) * 255 for key in ("mean", "std")
        )
        self.optimizer = torch.optim.AdamW(
            self.network.parameters(), lr=spec.learning_rate, weight_decay=spec.weight_decay
        )
        self.steps = math.ceil(len(self.training.rows) / spec.batch_size)  # per epoch
        weights = class_weights(self.training.codes, task.n_classes, spec.balance)[self.training.codes]
        self.probabilities = weights / weights.sum()  # of drawing each training example
        self.epoch, self.step, self.loss = 0, 0, 0.0  # loss: the sum over the steps of this epoch
        self.history: list[dict[str, Any]] = []
        self.best: dict[str, torch.Tensor] = {}
        self._resume()
        self.curves = TrainingCurves(
            self.folder / "tensorboard", self.epoch * self.steps + self.step, spec.model_dump()
        )
        self._pool = ThreadPoolExecutor(READERS)
        self._saved_at = time.monotonic()

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)
        self.curves.close()

    def train(self) -> dict[str, Any]:
        resumed = f", continuing from epoch {self.epoch + 1}, step {self.step}" if self.epoch or self.step else ""
        self.log(
            f"training on {self.device}: {len(self.training.rows):,} tiles, at most {self.spec.epochs} epochs{resumed}"
        )
        remaining = (self.spec.epochs - self.epoch) * self.steps - self.step
        progress = Progress(self.log, remaining * self.spec.batch_size, "tiles")
        while self.epoch < self.spec.epochs and not self._stalled():
            self._train_epoch(progress)
            self._end_epoch()
        return self._finish()

    def _train_epoch(self, progress: Progress) -> None:
        """Train on the batches of the current epoch that remain."""
        import torch

        self.network.train()
        remaining = self._draw_batches(self.epoch)[self.step :]
        for batch, tiles in self._read_batches(self.training, remaining):
            seed = [self.spec.seed, self.epoch, self.step]
            torch.manual_seed(np.random.SeedSequence(seed).generate_state(1).item())  # for dropout and similar layers
            number = self.epoch * self.steps + self.step
            for group in self.optimizer.param_groups:
                group["lr"] = self._learning_rate(number)
            codes = torch.from_numpy(self.training.codes[batch]).to(self.device)
            try:
                logits = self._forward(augment(torch.from_numpy(tiles).to(self.device), self.crop_px, seed))
                loss = torch.nn.functional.cross_entropy(logits, codes)
                self.optimizer.zero_grad(set_to_none=True)
                loss.backward()
                self.optimizer.step()
            except torch.OutOfMemoryError as error:
                raise SynpipeError(
                    f"A batch of {len(batch)} tiles does not fit into the memory of {self.device}: set a smaller "
                    "`batch_size` under `classifier:` in the data set's YAML file."
                ) from error
            value = loss.item()
            if not math.isfinite(value):
                raise SynpipeError(
                    f"The loss became {value} in epoch {self.epoch + 1}: set a smaller `learning_rate` under "
                    "`classifier:` in the data set's YAML file."
                )
            self.curves.add({"train/loss": value, "train/learning_rate": self._learning_rate(number)}, number)
            self.step += 1
            self.loss += value
            progress(len(batch))
            if time.monotonic() - self._saved_at > CHECKPOINT_S:
                self._save()

    def _end_epoch(self) -> None:
        score, loss = self._validate(), self.loss / self.steps
        scores = [entry["validation_balanced_accuracy"] for entry in self.history]
        # Without a validation side there is no score to choose by, so the last epoch is kept.
        if score is None or not scores or score > max(scores):
            self.best = {name: value.detach().cpu().clone() for name, value in self.network.state_dict().items()}
        self.epoch, self.step, self.loss = self.epoch + 1, 0, 0.0
        self.history.append({"epoch": self.epoch, "training_loss": loss, "validation_balanced_accuracy": score})
        score_text = "" if score is None else f", validation balanced accuracy {score:.3f}"
        self.log(f"epoch {self.epoch} of {self.spec.epochs}: loss {loss:.4f}{score_text}")
        if score is not None:
            self.curves.add({"validation/balanced_accuracy": score}, self.epoch * self.steps)
        self._save()

    def _stalled(self) -> bool:
        """Whether the validation score has not improved for `patience` epochs."""
        scores = [entry["validation_balanced_accuracy"] for entry in self.history]
        return bool(scores) and scores[0] is not None and len(scores) - 1 - int(np.argmax(scores)) >= self.spec.patience

    def _validate(self) -> float | None:
        """Balanced accuracy on the validation side; None if that is empty."""
        import torch

        if not len(self.validation.rows):
            return None
        self.network.eval()
        low = (TILE_PX - self.crop_px) // 2
        predicted = []
        batches = _split_evenly(np.arange(len(self.validation.rows)), 4 * self.spec.batch_size)
        for _, tiles in self._read_batches(self.validation, batches):
            crops = np.ascontiguousarray(tiles[:, :, low : low + self.crop_px, low : low + self.crop_px])
            with torch.inference_mode():
                predicted.append(self._forward(torch.from_numpy(crops).to(self.device).float()).argmax(1).cpu().numpy())
        return balanced_accuracy(self.validation.codes, np.concatenate(predicted))

    def _forward(self, pixels: "torch.Tensor") -> "torch.Tensor":
        """Grey values, float32 (n, 3, crop, crop), to logits, float32 (n, classes)."""
        import torch

        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            features = self.network["backbone"](
                pixels.sub(self.mean).div_(self.std).contiguous(memory_format=torch.channels_last)
            )
        return self.network["head"](torch.nn.functional.normalize(features.float(), dim=1)) * LOGIT_SCALE

    def _learning_rate(self, number: int) -> float:
        """The learning rate of a step, counted over all epochs: a linear warm-up, then half a cosine."""
        total = self.spec.epochs * self.steps
        warm_up = max(1, round(WARM_UP * total))
        if number < warm_up:
            return self.spec.learning_rate * (number + 1) / warm_up
        return self.spec.learning_rate * 0.5 * (1 + math.cos(math.pi * (number - warm_up) / max(1, total - warm_up)))

    def _draw_batches(self, epoch: int) -> list[np.ndarray]:
        """Positions in the training examples, one array per batch: drawn by class, with replacement."""
        random = np.random.default_rng([self.spec.seed, epoch])
        count = len(self.probabilities)
        return _split_evenly(random.choice(count, count, p=self.probabilities), self.spec.batch_size)

    def _read_batches(
        self, examples: Examples, batches: Iterable[np.ndarray]
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield each batch with its tiles. Later batches are read while the network computes."""
        reading: deque[tuple[np.ndarray, Future[np.ndarray]]] = deque()
        for batch in batches:
            reading.append((batch, self._pool.submit(self._read, examples.rows[batch])))
            if len(reading) > READERS:
                first, tiles = reading.popleft()
                yield first, tiles.result()
        for first, tiles in reading:
            yield first, tiles.result()

    def _save(self) -> None:
        import torch

        state = {
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "best": self.best,
            "epoch": self.epoch,
            "step": self.step,
            "loss": self.loss,
            "history": self.history,
        }
        with atomic_path(self.folder / "checkpoint.pt") as temporary:
            torch.save(state, temporary)
        self._saved_at = time.monotonic()

    def _resume(self) -> None:
        import torch

        path = self.folder / "checkpoint.pt"
        if not path.exists():
            return
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # pickle, zipfile and torch raise many types
            raise SynpipeError(
                f"The checkpoint {path} cannot be read ({type(error).__name__}): delete it to start the training again."
            ) from None
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.best, self.history = state["best"], state["history"]
        self.epoch, self.step, self.loss = state["epoch"], state["step"], state["loss"]

    def _finish(self) -> dict[str, Any]:
        from safetensors.torch import save_file

        for name, part in ((WEIGHTS, "backbone."), (HEAD, "head.")):
            tensors = {
                key.removeprefix(part): value.contiguous() for key, value in self.best.items() if key.startswith(part)
            }
            with atomic_path(self.folder / name) as temporary:
                save_file(tensors, temporary)
        scores = [entry["validation_balanced_accuracy"] for entry in self.history]
        best = len(scores) - 1 if scores[0] is None else int(np.argmax(scores))
        report = {
            "epochs": self.epoch,
            "best_epoch": best + 1,
            "validation_balanced_accuracy": scores[best],
            "history": self.history,
        }
        write_json(self.folder / "report.json", report)
        (self.folder / "checkpoint.pt").unlink(missing_ok=True)
        return report


def read_head(path: Path) -> Probe:
    """The linear layer of a finished run (`HEAD`), as a probe for vectors of the trained network."""
    from safetensors.numpy import load_file

    tensors = load_file(path)
    return Probe(tensors["weight"] * LOGIT_SCALE, tensors["bias"] * LOGIT_SCALE, temperature=1.0)


def _split_evenly(positions: np.ndarray, max_size: int) -> list[np.ndarray]:
    """Batches of similar size, at most `max_size`. A last batch of a single tile would disturb batch normalisation."""
    return np.array_split(positions, math.ceil(len(positions) / max_size))
