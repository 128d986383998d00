"""The network of an encoder, trained further to tell the classes apart: on a GPU or a CPU, and again after a kill.

In: tiles and classes of the training and the validation side. Out: the weights of the epoch that did best on the validation
side, as safetensors that `encoders.yaml` can name, and the linear layer on top. Guarantees: what the network is shown is
prepared as its encoder does it (`open_network`), in training and after; the test side is no argument of any of this. A run
that was killed carries on from its last checkpoint and, on a CPU with the same number of threads, ends as if nothing had
happened, bit by bit: every step draws its own random numbers from (seed, epoch, step).

A run has a folder: `checkpoint.pt` (tensors and numbers, loaded with `weights_only`), `tensorboard/`, and when it has
ended `weights.safetensors`, `head.safetensors` and, last, `report.json`.
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
from synpipe.training.augmentation import augment
from synpipe.training.curves import TrainingLog

if TYPE_CHECKING:
    import torch

ReadTiles = Callable[[np.ndarray], np.ndarray]

CHECKPOINT_S = 120.0
WARM_UP = 0.05  # of all steps
READERS = 4  # threads that read tiles, each a batch ahead of the network
# The layer sees directions, as searches do, and those differ by 2 at the most: without a factor no loss could become small
# (Wang et al., NormFace, ACM Multimedia 2017).
LOGIT_SCALE = 16.0
WEIGHTS, HEAD = "weights.safetensors", "head.safetensors"


@dataclass(frozen=True)
class Examples:
    """Rows of the tiles and their classes as numbers, both int64 (n,)."""

    rows: np.ndarray
    codes: np.ndarray


def finetune(
    spec: FinetuneSpec,
    encoder: EncoderSpec,
    base: Path,
    read_tiles: ReadTiles,
    training: Examples,
    validation: Examples,
    classes: int,
    folder: Path,
    log: Log,
    device: str = "auto",
) -> dict[str, Any]:
    """Train, or carry on, or take what has been trained; returns the report, which also is in `folder`.

    base: where a relative weights file of the encoder starts. read_tiles: rows to uint8 (n, 3, 256, 256). folder: of this
    run and no other; whoever calls names it after all that the outcome depends on.
    The report: `epochs` that were run, `best_epoch` and its `validation_balanced_accuracy` (None without validation rows,
    where the last epoch is taken), `history`, an entry per epoch.
    Raises `SynpipeError` where the loss is not finite or a batch does not fit into the memory of the device.
    """
    import torch

    if (folder / "report.json").exists():
        return read_json(folder / "report.json")
    run = _Run(spec, encoder, base, read_tiles, training, validation, classes, folder, log, device)
    try:
        with torch.random.fork_rng(devices=[]):  # the caller's random numbers are none of our concern
            return run.train()
    finally:
        run.close()


class _Run:
    def __init__(
        self,
        spec: FinetuneSpec,
        encoder: EncoderSpec,
        base: Path,
        read_tiles: ReadTiles,
        training: Examples,
        validation: Examples,
        classes: int,
        folder: Path,
        log: Log,
        device: str,
    ):
        import torch

        self.spec, self.folder, self.log, self._read = spec, folder, log, read_tiles
        self.training, self.validation = training, validation
        self.device = find_device(device)
        backbone, _, preprocessing = open_network(encoder, base)
        self.crop_px = preprocessing["crop_px"]
        backbone.eval()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(spec.seed)
            with torch.no_grad():
                dim = backbone(torch.zeros(1, 3, self.crop_px, self.crop_px)).shape[1]
            head = torch.nn.Linear(dim, classes)
        self.network = torch.nn.ModuleDict({"backbone": backbone, "head": head})
        self.network.to(memory_format=torch.channels_last).to(self.device)
        self.mean, self.std = (
            torch.tensor(preprocessing[key], device=self.device).view(1, 3, 1, 1) * 255 for key in ("mean", "std")
        )
        self.optimizer = torch.optim.AdamW(
            self.network.parameters(), lr=spec.learning_rate, weight_decay=spec.weight_decay
        )
        self.steps = math.ceil(len(training.rows) / spec.batch_size)
        weights = class_weights(training.codes, classes, spec.balance)[training.codes]
        self.chances = weights / weights.sum()
        self.epoch, self.step, self.loss = 0, 0, 0.0  # loss: sum over the steps of this epoch
        self.history: list[dict[str, Any]] = []
        self.best: dict[str, torch.Tensor] = {}
        self._resume()
        self.logs = TrainingLog(folder / "tensorboard", self.epoch * self.steps + self.step, spec.model_dump())
        self._pool = ThreadPoolExecutor(READERS)
        self._saved_at = time.monotonic()

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)
        self.logs.close()

    def train(self) -> dict[str, Any]:
        count = f"{len(self.training.rows):,} tiles, {self.spec.epochs} epochs at most"
        where = f"on from epoch {self.epoch + 1}, step {self.step}" if self.epoch or self.step else "from the beginning"
        self.log(f"training on {self.device}: {count}, {where}")
        left = (self.spec.epochs - self.epoch) * self.steps - self.step
        progress = Progress(self.log, left * self.spec.batch_size, "tiles")
        while self.epoch < self.spec.epochs and not self._stalled():
            self._train_epoch(progress)
            self._end_epoch()
        return self._finish()

    def _train_epoch(self, progress: Progress) -> None:
        """The rest of the epoch."""
        import torch

        self.network.train()
        drawn = self._drawn(self.epoch)[self.step :]
        for picked, tiles in self._batches(self.training, drawn):
            seed = [self.spec.seed, self.epoch, self.step]
            torch.manual_seed(np.random.SeedSequence(seed).generate_state(1).item())  # dropout and its kin
            number = self.epoch * self.steps + self.step
            for group in self.optimizer.param_groups:
                group["lr"] = self._learning_rate(number)
            codes = torch.from_numpy(self.training.codes[picked]).to(self.device)
            try:
                logits = self._forward(augment(torch.from_numpy(tiles).to(self.device), self.crop_px, seed))
                loss = torch.nn.functional.cross_entropy(logits, codes)
                self.optimizer.zero_grad(set_to_none=True)
                loss.backward()
                self.optimizer.step()
            except torch.OutOfMemoryError as error:
                raise SynpipeError(
                    f"A batch of {len(picked)} tiles does not fit into the memory of {self.device}: set a smaller "
                    "`batch_size` under `classifier:` in the data set's YAML file."
                ) from error
            value = loss.item()
            if not math.isfinite(value):
                raise SynpipeError(
                    f"The loss became {value} in epoch {self.epoch + 1}: set a smaller `learning_rate` under "
                    "`classifier:` in the data set's YAML file."
                )
            self.logs.add({"train/loss": value, "train/learning_rate": self._learning_rate(number)}, number)
            self.step += 1
            self.loss += value
            progress(len(picked))
            if time.monotonic() - self._saved_at > CHECKPOINT_S:
                self._save()

    def _end_epoch(self) -> None:
        score, loss = self._validate(), self.loss / self.steps
        scores = [entry["validation_balanced_accuracy"] for entry in self.history]
        # Without a validation side there is nothing to choose by: the last epoch it is.
        if score is None or not scores or score > max(scores):
            self.best = {name: value.detach().cpu().clone() for name, value in self.network.state_dict().items()}
        self.epoch, self.step, self.loss = self.epoch + 1, 0, 0.0
        self.history.append({"epoch": self.epoch, "training_loss": loss, "validation_balanced_accuracy": score})
        said = "" if score is None else f", validation balanced accuracy {score:.3f}"
        self.log(f"epoch {self.epoch} of {self.spec.epochs}: loss {loss:.4f}{said}")
        if score is not None:
            self.logs.add({"validation/balanced_accuracy": score}, self.epoch * self.steps)
        self._save()

    def _stalled(self) -> bool:
        scores = [entry["validation_balanced_accuracy"] for entry in self.history]
        return bool(scores) and scores[0] is not None and len(scores) - 1 - int(np.argmax(scores)) >= self.spec.patience

    def _validate(self) -> float | None:
        import torch

        if not len(self.validation.rows):
            return None
        self.network.eval()
        low = (256 - self.crop_px) // 2
        predicted = []
        parts = _in_batches(np.arange(len(self.validation.rows)), 4 * self.spec.batch_size)
        for _, tiles in self._batches(self.validation, parts):
            crops = np.ascontiguousarray(tiles[:, :, low : low + self.crop_px, low : low + self.crop_px])
            with torch.inference_mode():
                predicted.append(self._forward(torch.from_numpy(crops).to(self.device).float()).argmax(1).cpu().numpy())
        return balanced_accuracy(self.validation.codes, np.concatenate(predicted))

    def _forward(self, pixels: "torch.Tensor") -> "torch.Tensor":
        """Grey values, float32 (n, 3, crop, crop), to logits."""
        import torch

        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            features = self.network["backbone"](
                pixels.sub(self.mean).div_(self.std).contiguous(memory_format=torch.channels_last)
            )
        return self.network["head"](torch.nn.functional.normalize(features.float(), dim=1)) * LOGIT_SCALE

    def _learning_rate(self, number: int) -> float:
        total = self.spec.epochs * self.steps
        warm_up = max(1, round(WARM_UP * total))
        if number < warm_up:
            return self.spec.learning_rate * (number + 1) / warm_up
        return self.spec.learning_rate * 0.5 * (1 + math.cos(math.pi * (number - warm_up) / max(1, total - warm_up)))

    def _drawn(self, epoch: int) -> list[np.ndarray]:
        """Places in the training examples, a batch each: drawn by class, with replacement."""
        random = np.random.default_rng([self.spec.seed, epoch])
        return _in_batches(random.choice(len(self.chances), len(self.chances), p=self.chances), self.spec.batch_size)

    def _batches(self, examples: Examples, parts: Iterable[np.ndarray]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Each part with its tiles, read while the network is at work."""
        waiting: deque[tuple[np.ndarray, Future[np.ndarray]]] = deque()
        for part in parts:
            waiting.append((part, self._pool.submit(self._read, examples.rows[part])))
            if len(waiting) > READERS:
                first, tiles = waiting.popleft()
                yield first, tiles.result()
        for first, tiles in waiting:
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
        except Exception as error:  # whatever pickle, zipfile and torch raise
            raise SynpipeError(
                f"The checkpoint {path} cannot be read ({type(error).__name__}): delete it, and training starts anew."
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
    """The trained layer, for vectors of the trained network."""
    from safetensors.numpy import load_file

    tensors = load_file(path)
    return Probe(tensors["weight"] * LOGIT_SCALE, tensors["bias"] * LOGIT_SCALE, temperature=1.0)


def _in_batches(places: np.ndarray, size: int) -> list[np.ndarray]:
    """Parts of `size` at the most, all of about one size: a last one of a single tile would upset batch norms."""
    return np.array_split(places, math.ceil(len(places) / size))
