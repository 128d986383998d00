"""Trains `d4resnet` on unlabelled EM volumes to recognise a place. The weights can be used as an encoder.

Input: a `PretrainSpec`. Output: weights (safetensors), and beside them figures with the recipe (JSON) and a model card
(Markdown). If the process is killed, the same command continues from the last checkpoint and ends with the same weights. No
labels are read. Figures are measured on a part of each volume that was not used for training. Files are complete or absent.

The method is SimCLR with its NT-Xent loss (Chen et al., ICML 2020, arXiv:2002.05709): two altered views of a place (`views`)
should be closer to each other than to views of other places. Similarity search needs nothing more from an encoder.
"""

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor, nn

from synpipe import __version__
from synpipe.embeddings.em_network import D4ResNet
from synpipe.embeddings.encoders import cpu_has_bf16, find_device
from synpipe.errors import SynpipeError, one_line
from synpipe.specs import digest
from synpipe.store.files import atomic_path, write_json
from synpipe.training.blocks import Blocks, TrainingVolume, draw_blocks
from synpipe.training.held_out import measure_retrieval
from synpipe.training.model_card import model_card
from synpipe.training.recipe import PretrainSpec
from synpipe.training.views import draw_views

CROP_PX = 65  # size of a view: 130 px of a tile with 4–5 nm pixels. It must be odd; see `em_network`
PIXEL_NM = (
    8.3,
    10.5,
)  # range of the pixel size of a view: small, from about FAFB's 8 nm (two pixels of 4) to FIB-SEM's 10
CHECKPOINT_S = 60.0
CHECKPOINT_VERSION = 1  # raise it when a change alters the training, so that no old checkpoint is continued
WARM_UP = 0.03  # share of the steps
WEIGHT_DECAY = 0.02
GRADIENT_NORM = 5.0
HELD_OUT_PLACES = 512
WHITENING_PLACES = 4096
WHITENING_FLOOR = 0.1
FEW = 40  # steps over which the loss is averaged for display


@dataclass(frozen=True)
class TrainingStatus:
    """How far the training is.

    loss, matched: the loss, and the share of views that were nearest to their counterpart, averaged over the last few steps.
    """

    step: int
    steps: int
    loss: float
    matched: float
    seconds_left: float


class _Learner(nn.Module):
    """The network, and a projection on which the loss is computed. The projection is discarded after the training."""

    def __init__(self, spec: PretrainSpec):
        super().__init__()
        self.network = D4ResNet(width=spec.width, depth=spec.depth, shrink=1)
        self.projection = nn.Sequential(
            nn.Linear(self.network.pooled, 512), nn.BatchNorm1d(512), nn.ReLU(), nn.Linear(512, 128)
        )

    def forward(self, views: Tensor, bf16: bool) -> Tensor:
        with torch.autocast(views.device.type, torch.bfloat16, enabled=bf16):
            maps = self.network.forward_features(views)
        return F.normalize(self.projection(self.network.pool(maps)), dim=1)


def pretrain(
    spec: PretrainSpec,
    volumes: Sequence[TrainingVolume],
    out: Path,
    device: str = "auto",
    progress: Callable[[TrainingStatus], None] = lambda status: None,
) -> dict[str, Any]:
    """Train, and write `out` (.safetensors) with a .json and an .md file beside it. Returns the content of the JSON file.

    volumes: those of `spec.sources`, opened. During the training, a checkpoint lies beside `out`; the same call continues from
    it. Raises `SynpipeError` if a volume is unsuitable, the device is unavailable, or the checkpoint belongs to another recipe.
    """
    target = find_device(device)
    # The content of a volume matters, not its path.
    recipe = spec.model_dump(mode="json", exclude_defaults=True, exclude={"sources": {"__all__": {"volume": {"path"}}}})
    recipe_digest = digest([CHECKPOINT_VERSION, recipe, [each.volume.fingerprint() for each in volumes]])
    training = _Training(spec, recipe_digest, out.with_suffix(".checkpoint"), target)
    network = training.learner.network
    held_out = draw_blocks(volumes, HELD_OUT_PLACES, spec.seed, held_out=True)
    untrained = measure_retrieval(network, held_out, volumes, CROP_PX, target)
    blocks = draw_blocks(volumes, spec.blocks, spec.seed)
    learned = training.run(blocks, progress)

    _whiten(network, blocks, spec, target)
    weights = {name: value.cpu().contiguous() for name, value in network.state_dict().items()}
    report = {
        "model": "d4resnet",
        "args": {name: value for name in ("width", "depth") if (value := getattr(spec, name)) != 1},
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "recipe": recipe,
        "recipe_digest": recipe_digest,
        "licences": {source.name: source.licence for source in spec.sources},
        "held_out": measure_retrieval(network, held_out, volumes, CROP_PX, target),
        "held_out_untrained": untrained,
        **learned,
        "made_with": {"synpipe": __version__, "torch": version("torch"), "device": target.type},
    }
    with atomic_path(out) as temporary:
        temporary.write_bytes(
            save(weights, {"recipe_digest": recipe_digest, "licences": json.dumps(report["licences"])})
        )
    write_json(out.with_suffix(".json"), report)
    with atomic_path(out.with_suffix(".md")) as temporary:
        temporary.write_text(model_card(out.stem, report), encoding="utf-8")
    out.with_suffix(".checkpoint").unlink(missing_ok=True)
    return report


@dataclass
class _Curve:
    """The loss of each step, and the share of views that were nearest to their counterpart. spent_s: seconds so far."""

    steps: list[tuple[float, float]] = field(default_factory=list)
    spent_s: float = 0.0

    def recent(self) -> tuple[float, float]:
        """Both figures, averaged over the last `FEW` steps."""
        loss, matched = np.mean(self.steps[-FEW:], axis=0).tolist()
        return loss, matched

    def report(self) -> dict[str, list[float]]:
        """Both figures in at most twenty means, as the report holds them."""
        twentieths = np.array_split(np.array(self.steps), min(20, len(self.steps)))
        means = [np.mean(steps, axis=0).tolist() for steps in twentieths]
        return {
            "loss": [round(loss, 4) for loss, _ in means],
            "found_in_batch": [round(matched, 4) for _, matched in means],
        }


class _Training:
    """A training run: the network, the optimiser and the curve, which a checkpoint keeps."""

    def __init__(self, spec: PretrainSpec, recipe_digest: str, checkpoint: Path, device: torch.device):
        self.spec, self.recipe_digest, self.checkpoint, self.device = spec, recipe_digest, checkpoint, device
        torch.manual_seed(spec.seed)
        self.learner = _Learner(spec).to(device)
        self.bf16 = device.type == "cuda" or cpu_has_bf16()
        self.curve = _Curve()

    def run(self, blocks: Blocks, progress: Callable[[TrainingStatus], None]) -> dict[str, Any]:
        """Do all steps that remain. Returns the curve and the time that they took, as the report holds them."""
        spec = self.spec
        optimiser = self._optimiser()
        self._resume(optimiser)
        pixels = torch.from_numpy(blocks.pixels).to(self.device)
        pixel_nm = torch.from_numpy(blocks.pixel_nm).to(self.device)
        first, spent_before_s = len(self.curve.steps), self.curve.spent_s
        self.learner.train()
        began = saved = time.monotonic()
        for step in range(first, spec.steps):
            self.curve.steps.append(self._step(step, pixels, pixel_nm, optimiser))
            now = time.monotonic()
            self.curve.spent_s = spent_before_s + now - began
            seconds_left = (now - began) / (step + 1 - first) * (spec.steps - step - 1)
            progress(TrainingStatus(step + 1, spec.steps, *self.curve.recent(), seconds_left))
            if now - saved > CHECKPOINT_S or step + 1 == spec.steps:
                saved = now
                self._save(optimiser)
        return {
            **self.curve.report(),
            "views": 2 * spec.places * spec.steps,
            "seconds": round(spent_before_s + time.monotonic() - began),
        }

    def _optimiser(self) -> torch.optim.Optimizer:
        """AdamW. Weight decay applies to matrices, not to biases and norms."""
        parameters = list(self.learner.parameters())
        return torch.optim.AdamW(
            [
                {"params": [each for each in parameters if each.ndim > 1], "weight_decay": WEIGHT_DECAY},
                {"params": [each for each in parameters if each.ndim <= 1], "weight_decay": 0.0},
            ],
            lr=self.spec.learning_rate,
            betas=(0.9, 0.98),
        )

    def _step(
        self, step: int, pixels: Tensor, pixel_nm: Tensor, optimiser: torch.optim.Optimizer
    ) -> tuple[float, float]:
        """The loss, and the share of views that were nearest to their counterpart."""
        for group in optimiser.param_groups:
            group["lr"] = self.spec.learning_rate * _schedule(step / self.spec.steps)
        # Each step has its own generator, so a run that was killed and resumed draws the same views as an uninterrupted one.
        generator = torch.Generator(self.device).manual_seed(self.spec.seed * 1_000_003 + step)
        vectors = self.learner(_pairs(pixels, pixel_nm, self.spec.places, generator), self.bf16)
        loss, matched = nt_xent(vectors, self.spec.temperature)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.learner.parameters(), GRADIENT_NORM)
        optimiser.step()
        return loss.item(), matched.item()

    def _save(self, optimiser: torch.optim.Optimizer) -> None:
        state = {
            "recipe": self.recipe_digest,
            "step": len(self.curve.steps),
            "curve": self.curve.steps,
            "spent_s": self.curve.spent_s,
            "learner": self.learner.state_dict(),
            "optimiser": optimiser.state_dict(),
        }
        with atomic_path(self.checkpoint) as temporary:
            torch.save(state, temporary)

    def _resume(self, optimiser: torch.optim.Optimizer) -> None:
        """Load the checkpoint, if there is one. Raises `SynpipeError` if it is damaged or belongs to another recipe."""
        if not self.checkpoint.exists():
            return
        try:
            state = torch.load(self.checkpoint, weights_only=True, map_location="cpu")
            if state["recipe"] != self.recipe_digest:
                raise SynpipeError(
                    f"{self.checkpoint} belongs to a training with another recipe or other volumes: give another --out, or "
                    "delete it."
                )
            self.learner.load_state_dict(state["learner"])
            optimiser.load_state_dict(state["optimiser"])
        except SynpipeError:
            raise
        except Exception as error:  # torch, zipfile and pickle raise many types
            raise SynpipeError(
                f"{self.checkpoint} cannot be read ({one_line(error)}): delete it to start again."
            ) from None
        self.curve = _Curve(state["curve"], state["spent_s"])


@torch.inference_mode()
def _whiten(network: D4ResNet, blocks: Blocks, spec: PretrainSpec, device: torch.device) -> None:
    """Set the last layer of the network so that directions in which views of one place differ have little weight.

    This is within-class covariance normalisation (Hatch, Kajarekar & Stolcke, Interspeech 2006) with places as classes.
    Vectors are multiplied by (S + 0.1·mean(diagonal of S)·1)^−½, where S is the covariance of pairs. Then the first principal
    components of the result are kept. The places are among those used for training.
    """
    network.eval()
    pixels, pixel_nm = torch.from_numpy(blocks.pixels), torch.from_numpy(blocks.pixel_nm)
    generator = torch.Generator(device).manual_seed(spec.seed)
    pairs = []
    for rows in torch.arange(len(pixels))[:WHITENING_PLACES].split(spec.places):
        views = _pairs(pixels[rows].to(device), pixel_nm[rows].to(device), len(rows), generator)
        pairs.append(network.pool(network.forward_features(views)).unflatten(0, (2, -1)).double().cpu())
    both = torch.cat(pairs, 1)
    difference, vectors = both[0] - both[1], both.flatten(0, 1)
    within = difference.T @ difference / (2 * len(difference))
    within += WHITENING_FLOOR * within.diagonal().mean() * torch.eye(len(within), dtype=within.dtype)
    scale, directions = torch.linalg.eigh(within)
    whitened = (vectors - vectors.mean(0)) @ (directions / scale.sqrt())
    _, _, components = torch.linalg.svd(whitened, full_matrices=False)
    kept = components[: network.whitening.out_features]
    matrix = kept @ (directions / scale.sqrt()).T
    network.whitening.weight.zero_()[: len(kept)] = matrix.to(device, torch.float32)
    network.whitening.bias.zero_()[: len(kept)] = -(matrix @ vectors.mean(0)).to(device, torch.float32)


def _schedule(progress: float) -> float:
    """Factor of the learning rate at `progress` from 0 to 1: half a cosine, with a short linear warm-up."""
    return min(1.0, (progress + 1e-3) / WARM_UP) * 0.5 * (1 + math.cos(math.pi * progress))


def _pairs(pixels: Tensor, pixel_nm: Tensor, places: int, generator: torch.Generator) -> Tensor:
    """Draw two views of each of `places` random places: (2 · places, 3, 65, 65), first one view of each, then the other."""
    device, side = pixels.device, pixels.shape[-1]
    rows = torch.randint(0, len(pixels), (places,), generator=generator, device=device)
    mirror_z = torch.rand(places, generator=generator, device=device) < 0.5
    # How far a place may lie from the middle of its block, so that a turned and shifted view stays inside.
    room = max(0.0, side / 2 - CROP_PX / 2 * math.sqrt(2) - 12)
    centres = side / 2 + (torch.rand(places, 2, generator=generator, device=device) * 2 - 1) * room
    chosen, zoom = pixels[rows], (PIXEL_NM[0] / pixel_nm[rows], PIXEL_NM[1] / pixel_nm[rows])
    views = [draw_views(chosen, centres, zoom, mirror_z, CROP_PX, generator) for _ in range(2)]
    return torch.cat(views).contiguous(memory_format=torch.channels_last)


def nt_xent(vectors: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """NT-Xent loss of unit vectors, (2n, d), and the share of them that are nearest to their counterpart.

    The counterpart of row i is row i + n.
    """
    count = len(vectors)
    similarity = (vectors @ vectors.T / temperature).fill_diagonal_(-torch.inf)
    counterpart = torch.arange(count, device=vectors.device).roll(count // 2)
    return F.cross_entropy(similarity, counterpart), (similarity.argmax(1) == counterpart).float().mean()
