"""Teach `d4resnet` to recognise a place in EM, from unlabelled volumes; the weights are an encoder for the registry.

In: a `PretrainSpec`. Out: weights (safetensors), figures and the recipe (JSON), and a model card (Markdown) beside them.
Guarantees: killed at any moment, the same command carries on and ends with the same weights; no label is read; figures are
of a part of each volume that was not learned from; files are whole or absent.

Two views of each place (`pretraining_views.py`) are to be nearer to each other than to views of other places: SimCLR with
its NT-Xent loss (Chen et al., ICML 2020, arXiv:2002.05709), which is all that similarity search asks of an encoder.
"""

import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
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
from synpipe.errors import SynpipeError
from synpipe.specs import digest
from synpipe.store.files import atomic_path, write_json
from synpipe.training.blocks import Blocks, OpenSource, draw_blocks
from synpipe.training.recipe import PretrainSpec
from synpipe.training.views import draw_views

CROP_PX = 65  # of a view, 130 px of a tile of 4–5 nm pixels. Odd, see `em_network`
PIXEL_NM = (8.3, 10.5)  # of a view: mild, and from FAFB's 8 nm (two pixels of 4) to FIB-SEM's 10
CHECKPOINT_S = 60.0
CHECKPOINT_VERSION = 1  # raise it when the training in these files changes: an old checkpoint must not carry on
WARM_UP = 0.03  # of the steps
WEIGHT_DECAY = 0.02
GRADIENT_NORM = 5.0
HELD_OUT_PLACES = 512
WHITENING_PLACES = 4096
WHITENING_FLOOR = 0.1
FEW = 40  # steps over which the loss is averaged where it is shown


@dataclass(frozen=True)
class Progress:
    """step of steps; loss, and share of views whose counterpart was the nearest of all, over the last few steps; seconds left."""

    step: int
    steps: int
    loss: float
    found: float
    seconds_left: float


@dataclass(frozen=True)
class Retrieval:
    """How often the altered view of a held-out place finds the place itself, the first or among the first five."""

    places: int
    recall_at_1: float
    recall_at_5: float


class _Learner(nn.Module):
    """The network and the projection that the loss is taken on, which is thrown away afterwards."""

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
    sources: list[OpenSource],
    out: Path,
    device: str = "auto",
    progress: Callable[[Progress], None] = lambda at: None,
) -> dict[str, Any]:
    """Learn, and write `out` (.safetensors), with .json and .md beside it. Returns what the JSON file says.

    While it runs, a checkpoint lies beside `out`, from which the same call carries on. Raises `SynpipeError` where a volume
    cannot be learned from, the device is not there, or the checkpoint is of another recipe.
    """
    target = find_device(device)
    # Where a volume lies is no matter; what it holds is.
    stated = spec.model_dump(mode="json", exclude_defaults=True, exclude={"sources": {"__all__": {"volume": {"path"}}}})
    recipe = digest([CHECKPOINT_VERSION, stated, [source.volume.fingerprint() for source in sources]])
    torch.manual_seed(spec.seed)
    learner = _Learner(spec).to(target)
    held_out = draw_blocks(sources, HELD_OUT_PLACES, spec.seed, held_out=True)
    untrained = _retrieval_by_source(learner.network, held_out, sources, target)
    blocks = draw_blocks(sources, spec.blocks, spec.seed)
    learned = _learn(learner, spec, blocks, recipe, out.with_suffix(".checkpoint"), target, progress)

    _whiten(learner.network, blocks, spec, target)
    weights = {name: value.cpu().contiguous() for name, value in learner.network.state_dict().items()}
    report = {
        "model": "d4resnet",
        "args": {name: value for name in ("width", "depth") if (value := getattr(spec, name)) != 1},
        "parameters": sum(parameter.numel() for parameter in learner.network.parameters()),
        "recipe": stated,
        "recipe_digest": recipe,
        "licences": {source.name: source.licence for source in spec.sources},
        "held_out": _retrieval_by_source(learner.network, held_out, sources, target),
        "held_out_untrained": untrained,
        **learned,
        "made_with": {"synpipe": __version__, "torch": version("torch"), "device": target.type},
    }
    with atomic_path(out) as temporary:
        temporary.write_bytes(save(weights, {"recipe_digest": recipe, "licences": json.dumps(report["licences"])}))
    write_json(out.with_suffix(".json"), report)
    with atomic_path(out.with_suffix(".md")) as temporary:
        temporary.write_text(card(out.stem, report), encoding="utf-8")
    out.with_suffix(".checkpoint").unlink(missing_ok=True)
    return report


def _learn(
    learner: _Learner,
    spec: PretrainSpec,
    blocks: Blocks,
    recipe: str,
    checkpoint: Path,
    device: torch.device,
    progress: Callable[[Progress], None],
) -> dict[str, Any]:
    """All steps that are left. Returns the loss curve and the time it took."""
    matrices = [parameter for parameter in learner.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in learner.parameters() if parameter.ndim <= 1]
    optimiser = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}],
        lr=spec.learning_rate,
        betas=(0.9, 0.98),
    )
    done, curve, spent_s = _resume(checkpoint, recipe, learner, optimiser)
    pixels, pixel_nm = torch.from_numpy(blocks.pixels).to(device), torch.from_numpy(blocks.pixel_nm).to(device)
    bf16 = device.type == "cuda" or cpu_has_bf16()
    learner.train()
    began = saved = time.monotonic()
    for step in range(done, spec.steps):
        for group in optimiser.param_groups:
            group["lr"] = spec.learning_rate * _schedule(step / spec.steps)
        # A generator of each step's own: a run that was killed draws what an uninterrupted one would have drawn.
        generator = torch.Generator(device).manual_seed(spec.seed * 1_000_003 + step)
        vectors = learner(_pairs(pixels, pixel_nm, spec.places, generator), bf16)
        loss, found = nt_xent(vectors, spec.temperature)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(learner.parameters(), GRADIENT_NORM)
        optimiser.step()

        curve.append((loss.item(), found.item()))
        now = time.monotonic()
        left_s = (now - began) / (step + 1 - done) * (spec.steps - step - 1)
        mean_loss, mean_found = np.mean(curve[-FEW:], axis=0).tolist()
        progress(Progress(step + 1, spec.steps, mean_loss, mean_found, left_s))
        if now - saved > CHECKPOINT_S or step + 1 == spec.steps:
            saved = now
            state = {
                "recipe": recipe,
                "step": step + 1,
                "curve": curve,
                "spent_s": spent_s + now - began,
                "learner": learner.state_dict(),
                "optimiser": optimiser.state_dict(),
            }
            with atomic_path(checkpoint) as temporary:
                torch.save(state, temporary)
    means = [np.mean(part, axis=0).tolist() for part in np.array_split(np.array(curve), min(20, len(curve)))]
    return {
        "loss": [round(loss, 4) for loss, _ in means],
        "found_in_batch": [round(found, 4) for _, found in means],
        "views": 2 * spec.places * spec.steps,
        "seconds": round(spent_s + time.monotonic() - began),
    }


@torch.inference_mode()
def _whiten(network: D4ResNet, blocks: Blocks, spec: PretrainSpec, device: torch.device) -> None:
    """Set the network's last layer so that what changes between two views of one place weighs little.

    Within-class covariance normalisation (Hatch, Kajarekar & Stolcke, Interspeech 2006) with places as classes: vectors are
    multiplied by (S + 0.1·mean(diagonal of S)·1)^−½, S being the covariance of pairs; of the result, the first principal
    components are kept. The places are ones that were learned from.
    """
    network.eval()
    pixels, pixel_nm = torch.from_numpy(blocks.pixels), torch.from_numpy(blocks.pixel_nm)
    generator = torch.Generator(device).manual_seed(spec.seed)
    pairs = []
    for part in torch.arange(len(pixels))[:WHITENING_PLACES].split(spec.places):
        views = _pairs(pixels[part].to(device), pixel_nm[part].to(device), len(part), generator)
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


def _resume(
    checkpoint: Path, recipe: str, learner: nn.Module, optimiser: torch.optim.Optimizer
) -> tuple[int, list[tuple[float, float]], float]:
    """Steps done, their losses and seconds; 0, none and 0 without a checkpoint."""
    if not checkpoint.exists():
        return 0, [], 0.0
    try:
        state = torch.load(checkpoint, weights_only=True, map_location="cpu")
        if state["recipe"] != recipe:
            raise SynpipeError(
                f"{checkpoint} was left by a training with another recipe or other volumes: give another --out, or delete it."
            )
        learner.load_state_dict(state["learner"])
        optimiser.load_state_dict(state["optimiser"])
    except SynpipeError:
        raise
    except Exception as error:  # whatever torch, zipfile and pickle raise on a file that is something else
        raise SynpipeError(f"{checkpoint} cannot be read ({error}): delete it to begin anew.") from None
    return state["step"], state["curve"], state["spent_s"]


def _schedule(done: float) -> float:
    """Share of the learning rate: a short linear warm-up under half a cosine."""
    return min(1.0, (done + 1e-3) / WARM_UP) * 0.5 * (1 + math.cos(math.pi * done))


def _pairs(pixels: Tensor, pixel_nm: Tensor, places: int, generator: torch.Generator) -> Tensor:
    """Views (2 · places, 3, 65, 65): first one of each place, then the other."""
    device, side = pixels.device, pixels.shape[-1]
    rows = torch.randint(0, len(pixels), (places,), generator=generator, device=device)
    mirror_z = torch.rand(places, generator=generator, device=device) < 0.5
    # Free room around the middle: what is left of the block beyond the reach of a turned and shifted view.
    room = max(0.0, side / 2 - CROP_PX / 2 * math.sqrt(2) - 12)
    centres = side / 2 + (torch.rand(places, 2, generator=generator, device=device) * 2 - 1) * room
    chosen, zoom = pixels[rows], (PIXEL_NM[0] / pixel_nm[rows], PIXEL_NM[1] / pixel_nm[rows])
    views = [draw_views(chosen, centres, zoom, mirror_z, CROP_PX, generator) for _ in range(2)]
    return torch.cat(views).contiguous(memory_format=torch.channels_last)


def nt_xent(vectors: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Loss of unit vectors (2n, d) whose row i belongs to row i + n, and the share whose nearest is its counterpart."""
    count = len(vectors)
    similarity = (vectors @ vectors.T / temperature).fill_diagonal_(-torch.inf)
    counterpart = torch.arange(count, device=vectors.device).roll(count // 2)
    return F.cross_entropy(similarity, counterpart), (similarity.argmax(1) == counterpart).float().mean()


def _retrieval_by_source(
    network: D4ResNet, blocks: Blocks, sources: list[OpenSource], device: torch.device
) -> dict[str, dict[str, float]]:
    """Retrieval in each volume. An altered view is made as for learning; the original is the plain middle of the block."""
    was_training = network.training
    network.eval()
    figures = {}
    for number, source in enumerate(sources):
        mine = blocks.source == number
        if mine.any():
            figures[source.name] = vars(_retrieval(network, _only(blocks, mine), source, device))
    network.train(was_training)
    return figures


def _only(blocks: Blocks, mask: np.ndarray) -> Blocks:
    return replace(blocks, **{name: values[mask] for name, values in vars(blocks).items()})


def _retrieval(network: D4ResNet, blocks: Blocks, source: OpenSource, device: torch.device) -> Retrieval:
    pixels = torch.from_numpy(blocks.pixels).to(device)
    scale = torch.from_numpy(blocks.pixel_nm).to(device) / source.pixel_nm
    centre = torch.full((len(pixels), 2), pixels.shape[-1] / 2, device=device)
    generator = torch.Generator(device).manual_seed(0)
    altered = draw_views(pixels, centre, (scale, scale), torch.zeros_like(scale).bool(), CROP_PX, generator)
    first = (pixels.shape[-1] - CROP_PX) // 2
    plain = pixels[:, 1:4, first : first + CROP_PX, first : first + CROP_PX].float()
    queries, originals = (F.normalize(_embed(network, views), dim=1) for views in (altered, plain))
    similarity = queries @ originals.T
    apart = np.abs(blocks.centre_zyx[:, None] - blocks.centre_zyx[None])
    reach = np.array([3 * source.step, CROP_PX * source.shrink // 2, CROP_PX * source.shrink // 2])
    same = torch.from_numpy((apart < reach).all(2)).to(device).fill_diagonal_(False)
    own = similarity.diag()[:, None]
    rank = (similarity.masked_fill(same, -torch.inf).fill_diagonal_(-torch.inf) >= own).sum(1)
    return Retrieval(len(rank), *(round((rank < k).float().mean().item(), 4) for k in (1, 5)))


@torch.inference_mode()
def _embed(network: D4ResNet, views: Tensor) -> Tensor:
    return torch.cat([network(part) for part in views.split(256)])


def registry_entry(name: str, weights: str, report: dict[str, Any]) -> str:
    """The lines to paste into `encoders.yaml`."""
    lines = [f"  {name}:", f"    model: {report['model']}", f"    weights: {weights}", "    precision: fp32"]
    if report["args"]:
        lines.append(f"    args: {json.dumps(report['args'])}")
    return "\n".join([*lines, f"    description: Trained on {', '.join(report['licences'])}."])


def card(name: str, report: dict[str, Any]) -> str:
    """The model card, Markdown."""
    return "\n".join(_card_lines(name, report)) + "\n"


def _card_lines(name: str, report: dict[str, Any]) -> Iterator[str]:
    yield from (f"# {name}", "")
    yield f"`{report['model']}`, {report['parameters']:,} parameters, trained without labels by `synpipe pretrain` on:"
    yield ""
    yield from (f"- {source} (licence: {licence})" for source, licence in report["licences"].items())
    yield from ("", "| held-out places of | places | untrained @1 | @1 | @5 |", "|---|---|---|---|---|")
    for source, found in report["held_out"].items():
        before = report["held_out_untrained"][source]
        yield (
            f"| {source} | {found['places']} | {before['recall_at_1']:.3f} | {found['recall_at_1']:.3f} | "
            f"{found['recall_at_5']:.3f} |"
        )
    yield ""
    yield "An altered view (turned, shifted, a section off, other contrast, noise) must find the place it was taken from."
    yield ""
    yield f"{report['views']:,} views, {report['seconds']:,} s on {report['made_with']['device']}. Loss, in twentieths:"
    yield ", ".join(f"{loss:.2f}" for loss in report["loss"]) + "."
    yield from ("", "```json", json.dumps(report["recipe"], indent=1), "```")
