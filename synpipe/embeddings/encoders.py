"""Encoders: a registry entry says which network, which weights and which preprocessing; here it becomes a model.

In: `data/encoders.yaml`, an `EncoderSpec` per name, or a `DescriptorSpec`. Out: an `Encoder` that turns uint8 tiles into vectors.
Guarantee: everything that changes a number is in the encoder's fingerprint (architecture and its arguments, the bytes
of the weights, crop, mean, std, precision, torch and timm), so vectors with one fingerprint may be compared and cached.

Preprocessing, the same for every encoder and only here: the centre `crop_px` of the tile at its native scale, then the
model's own mean and standard deviation (timm's data config). Cropped and never resized, because EM is calibrated: a
vesicle of 40 nm is 10 pixels wide in every tile of 4 nm pixels, and an interpolation would blur the smallest structures
and bring in an implementation of its own. The synapse stays in the centre.

torch and timm take about ten seconds to import, and registries are read whenever Dagster loads the code, so this module
imports them inside `open_encoder` only.
"""

import difflib
import hashlib
import logging
import os
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
from pydantic import Field, field_validator, model_validator

from synpipe.embeddings import descriptors
from synpipe.embeddings.compression import CompressedSpec
from synpipe.embeddings.descriptors import DescriptorSpec
from synpipe.embeddings.forward import BATCH_SIZE, Computed, Forward, NetworkForward
from synpipe.errors import SynpipeError
from synpipe.specs import Spec, digest, read_yaml

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

TILE_PX = 256
"""Height and width of a tile in pixels."""

_CROP_OF_LARGE_MODELS_PX = 224  # for a network whose own input is larger than a tile; a multiple of 14, 16 and 32
_METHOD = 1  # raise it when a change in this file, or in em_network.py, changes the vectors
_HUB_TIMEOUT_S = 5.0
_WEIGHT_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")

# Read by huggingface_hub when it is imported.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")


class EncoderSpec(Spec):
    """One entry of the registry, without its name.

    Two specs that differ only in `description`, or in where the same weights file lies, have the same identity.
    """

    model: str = Field(pattern=r"^\w+(\.\w+)?$")
    """timm's name, `architecture.weights_tag`, such as `xcit_nano_12_p16_224.fb_in1k`."""
    weights: str
    """`hub` (Hugging Face), `random` (needs `seed`), or a weights file, relative to the registry's folder."""
    seed: int | None = Field(None, ge=0)
    args: dict[str, bool | int | float | str] = Field(default_factory=dict)
    """Further arguments of the architecture, for `timm.create_model`."""
    crop_px: int | None = Field(None, ge=32, le=TILE_PX, multiple_of=2)
    """Centre crop shown to the model. Default: the model's own input size, or 224 where that exceeds the tile."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """bf16 (autocast) moves a vector by at most about 1 % and is twice as fast on a CPU that has it (AVX512-BF16, AMX). One
    that has not emulates it, 2 to 10 times slower than fp32; `open_encoder` then warns."""
    compile: bool = False
    """Whether `torch.compile` makes kernels for this network, which takes minutes at every start and a C++ compiler. They round
    otherwise, so it is of the fingerprint."""
    description: str = ""

    @field_validator("weights")
    @classmethod
    def _known_source(cls, weights: str) -> str:
        if weights not in ("hub", "random") and not weights.endswith(_WEIGHT_SUFFIXES):
            raise ValueError(f"`hub`, `random` or a file that ends with {', '.join(_WEIGHT_SUFFIXES)}")
        return weights

    @model_validator(mode="after")
    def _seed_only_with_random(self) -> Self:
        if (self.seed is None) == (self.weights == "random"):
            raise ValueError("`seed` belongs to `weights: random`, and to nothing else")
        return self


class _Registry(Spec):
    encoders: dict[str, Any] = Field(min_length=1)

    @field_validator("encoders")
    @classmethod
    def _names(cls, encoders: dict[str, Any]) -> dict[str, Any]:
        for name in encoders:
            if not (name.isascii() and name.isidentifier() and name == name.lower() and name[0] != "_"):
                raise ValueError(f"the name `{name}` must consist of a-z, 0-9 and _ and begin with a letter")
        return encoders


def load_registry(path: Path) -> dict[str, EncoderSpec | DescriptorSpec | CompressedSpec]:
    """Read the encoders in the order of the file. Raises `SynpipeError` naming file, entry and valid keys."""
    entries = _Registry.parse(read_yaml(path), str(path)).encoders
    return {name: _kind(entry).parse(entry, f"{path}, encoder `{name}`") for name, entry in entries.items()}


def _kind(entry: Any) -> type[EncoderSpec] | type[DescriptorSpec] | type[CompressedSpec]:
    """A network, a hand-made descriptor, or what is fitted on the vectors of another encoder."""
    keys = entry if isinstance(entry, dict) else ()
    return DescriptorSpec if "descriptor" in keys else CompressedSpec if "base" in keys else EncoderSpec


def identity(spec: EncoderSpec | DescriptorSpec, base: Path) -> str:
    """What the encoder is declared to be, without importing torch, opening the model or asking the hub.

    For Dagster's `code_version`. The vectors' cache key is `Encoder.fingerprint`, which also covers the bytes that the
    hub delivered. A weights file that does not exist is no error here: the other encoders can still be listed and run.
    """
    if isinstance(spec, DescriptorSpec):
        return spec.fingerprint()
    path = base / spec.weights
    if spec.weights == "hub":
        weights = f"hub:{spec.model}"
    elif spec.weights == "random":
        weights = f"random:{spec.seed}"
    else:
        weights = f"sha256:{_sha256(path)}" if path.is_file() else f"missing:{spec.weights}"
    return digest({**_declaration(spec), "weights": weights, "crop_px": spec.crop_px})


def _declaration(spec: EncoderSpec) -> dict[str, Any]:
    declared = {
        "model": spec.model,
        "args": spec.args,
        "precision": spec.precision,
        "method": _METHOD,
        "torch": _version("torch"),
        "timm": _version("timm"),
    }
    return declared | ({"compile": True} if spec.compile else {})


_version = lru_cache(version)  # it reads a file for 6 ms, and `status` asks for every step of every encoder


def _sha256(path: Path) -> str:
    status = path.stat()
    return _sha256_of_version(path.resolve(), status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=64)
def _sha256_of_version(path: Path, size: int, mtime_ns: int) -> str:
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


@dataclass(frozen=True)
class Encoder:
    """A model ready to embed; made by `open_encoder`."""

    spec: EncoderSpec | DescriptorSpec
    weights: str
    """Identity of the weights that were loaded: `sha256:` and the digest of the file, `random:` and the seed, or `none`."""
    fingerprint: str
    dim: int
    device: "torch.device"
    preprocessing: dict[str, Any]
    forward: Forward = field(repr=False)

    def embed(self, tiles: np.ndarray) -> np.ndarray:
        """Pooled features before the classifier: uint8 (n, 3, 256, 256) to float32 (n, dim), not normalised."""
        starts = range(0, max(1, len(tiles)), self.batch_size)
        batches = (self.stage(tiles[start : start + self.batch_size]) for start in starts)
        return np.concatenate([self.forward.launch(batch, self.batch_size)() for batch in batches])

    def stage(self, tiles: np.ndarray) -> Any:
        """What `forward.launch` wants of tiles; in any thread."""
        if tiles.dtype != np.uint8 or tiles.shape[1:] != (3, TILE_PX, TILE_PX):
            raise ValueError(f"tiles must be uint8 (n, 3, {TILE_PX}, {TILE_PX}), not {tiles.dtype} {tiles.shape}")
        return self.forward.stage(tiles)

    @property
    def device_kind(self) -> str:
        """Of the kinds that sizes are known for the device's own, else `cpu`."""
        return self.device.type if self.device.type in BATCH_SIZE else "cpu"

    @property
    def batch_size(self) -> int:
        """Tiles that go to the device at once."""
        return BATCH_SIZE[self.device_kind]


def open_encoder(spec: EncoderSpec | DescriptorSpec, base: Path, device: str = "auto") -> Encoder:
    """Build the network, load its weights and put it on `device` (`auto`: the GPU if there is one; `cpu`, `cuda:1` …).

    `base` is the folder that a relative weights file starts from. Raises `SynpipeError` where the model, the device or
    the weights are not to be had; it never falls back to other weights. A descriptor is computed on the CPU in any case.
    """
    if isinstance(spec, DescriptorSpec):
        return _open_descriptor(spec)
    target = find_device(device)
    if spec.precision == "bf16" and target.type == "cpu" and not cpu_has_bf16():
        logger.warning(
            "This CPU emulates bf16, slowly: `precision: fp32` in the registry is faster for %s here", spec.model
        )
    model, weights, preprocessing = open_network(spec, base)
    forward = NetworkForward(model, preprocessing, target, spec.precision, spec.compile, TILE_PX)
    try:
        dim = forward.launch(forward.stage(np.zeros((1, 3, TILE_PX, TILE_PX), np.uint8)))().shape[1]
    except (RuntimeError, AssertionError) as error:
        raise SynpipeError(
            f"Encoder {spec.model} cannot take tiles of {preprocessing['crop_px']} px ({_shorten(error)}): set another "
            "`crop_px`."
        ) from None
    fingerprint = digest({**_declaration(spec), "weights": weights, "preprocessing": preprocessing})
    return Encoder(spec, weights, fingerprint, dim, target, preprocessing, forward)


def weights_file(spec: EncoderSpec | DescriptorSpec, base: Path) -> Path | None:
    """The file that the weights are read from, downloaded if need be; None where there is none. Raises as `open_encoder`."""
    if isinstance(spec, DescriptorSpec) or spec.weights == "random":
        return None
    return _hub_file(spec, _pretrained_config(spec.model)) if spec.weights == "hub" else base / spec.weights


def open_network(spec: EncoderSpec, base: Path) -> tuple["torch.nn.Module", str, dict[str, Any]]:
    """The network itself, on the CPU, the identity of its weights, and its preprocessing, for training it further.

    preprocessing: `crop_px`, and per channel `mean` and `std` of grey values from 0 to 1. Raises as `open_encoder` does.
    """
    import timm
    import torch

    import synpipe.embeddings.em_network  # noqa: F401  # makes `d4resnet` known to timm

    config = _pretrained_config(spec.model)
    native_px = config.input_size[-1]
    crop_px = spec.crop_px or (native_px if native_px <= TILE_PX else _CROP_OF_LARGE_MODELS_PX)
    args = dict(spec.args)
    if config.fixed_input_size and crop_px != native_px:
        args["img_size"] = crop_px  # position embeddings are built for, and resampled to, this size

    # Initialisation must be the same in every process and leave the caller's random numbers alone.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(spec.seed or 0)
        if spec.weights == "random":
            weights = f"random:{spec.seed}"
            model = _create(spec, args)
        else:
            path = _hub_file(spec, config) if spec.weights == "hub" else base / spec.weights
            model = _create_with_weights(spec, args, config, path)
            weights = f"sha256:{_sha256(path)}"

    data = timm.data.resolve_model_data_config(model)
    preprocessing = {"crop_px": crop_px, "resize": "none", "mean": list(data["mean"]), "std": list(data["std"])}
    return model, weights, preprocessing


def _open_descriptor(spec: DescriptorSpec) -> Encoder:
    import torch

    def describe(tiles: np.ndarray) -> np.ndarray:
        return descriptors.describe(spec.descriptor, tiles)

    dim = describe(np.zeros((1, 3, TILE_PX, TILE_PX), np.uint8)).shape[1]
    seen = {"crop_px": descriptors.CROPS_PX[spec.descriptor], "resize": "none"}
    return Encoder(spec, "none", spec.fingerprint(), dim, torch.device("cpu"), seen, Computed(describe))


def open_on_all_devices(spec: EncoderSpec | DescriptorSpec, base: Path) -> list[Encoder]:
    """The same encoder on each GPU of this machine, or once on its CPU. Raises as `open_encoder` does."""
    import torch

    gpus = 0 if isinstance(spec, DescriptorSpec) else torch.cuda.device_count()
    return [open_encoder(spec, base, f"cuda:{gpu}") for gpu in range(gpus)] or [open_encoder(spec, base, "cpu")]


def find_device(device: str = "auto") -> "torch.device":
    """The device of that name; `auto`: the GPU if there is one. Raises `SynpipeError` where it cannot be used."""
    import torch

    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        target = torch.device(device)
        torch.empty(0, device=target)
    except (RuntimeError, AssertionError) as error:
        raise SynpipeError(
            f"Device `{device}` cannot be used here ({_first_line(error)}): use cpu, cuda or auto."
        ) from None
    return target


def cpu_has_bf16() -> bool:
    """Whether it computes in bf16; one that has not emulates it slowly."""
    import torch

    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16"))


def _pretrained_config(model: str) -> Any:
    """timm's `PretrainedCfg`: input size, mean, std, address on the hub."""
    import timm

    try:
        config = timm.models.get_pretrained_cfg(model)
    except RuntimeError:
        config = None
    if config is None:
        close = difflib.get_close_matches(model, [*timm.list_models(), *timm.list_pretrained()], n=4)
        hint = f" Did you mean {', '.join(close)}?" if close else ""
        raise SynpipeError(f"timm {timm.__version__} knows no model `{model}`.{hint} timm.list_pretrained() lists all.")
    return config


def _create(spec: EncoderSpec, args: dict[str, Any], **weights: Any) -> "torch.nn.Module":
    import timm

    try:
        return timm.create_model(spec.model, num_classes=0, **args, **weights)
    except (TypeError, AssertionError) as error:
        raise SynpipeError(
            f"Encoder {spec.model} cannot be built with {args} ({_shorten(error)}): correct `args` or `crop_px`."
        ) from None


def _create_with_weights(spec: EncoderSpec, args: dict[str, Any], config: Any, path: Path) -> "torch.nn.Module":
    import timm

    try:
        state = timm.models.load_state_dict(str(path), weights_only=True)
    except FileNotFoundError:
        raise SynpipeError(
            f"The weights file {path} of encoder {spec.model} does not exist: correct `weights` in the registry."
        ) from None
    except Exception as error:  # whatever safetensors, pickle, zipfile and torch raise on a file that is something else
        raise SynpipeError(
            f"The weights file {path} of encoder {spec.model} cannot be read ({_first_line(error)}). It must be "
            "safetensors, or a torch checkpoint that holds tensors only: code in a checkpoint is never run."
        ) from None
    classifiers = (config.classifier,) if isinstance(config.classifier, str) else config.classifier or ()
    features = {key: value for key, value in state.items() if not key.startswith(tuple(f"{c}." for c in classifiers))}
    try:
        if not features:
            raise RuntimeError("it holds no weights")
        # With `num_classes` equal on both sides timm loads strictly; else it accepts missing layers in silence.
        overlay = {"state_dict": features, "num_classes": 0, "label_offset": 0}
        model = _create(spec, args, pretrained=True, pretrained_cfg_overlay=overlay)
    except (RuntimeError, KeyError, ValueError, AttributeError) as error:
        raise SynpipeError(
            f"The weights file {path} does not fit {spec.model}: {_shorten(error)} Its first keys are "
            f"{', '.join(list(features)[:4])}. Give the file that belongs to this model, or change `model`."
        ) from None
    vars(model)["pretrained_cfg"].pop("state_dict")  # a second copy of the weights
    return model


def _hub_file(spec: EncoderSpec, config: Any) -> Path:
    """Path of the weights in the Hugging Face cache, downloaded if they are not there.

    What is in the cache is used without asking the hub: a change there cannot change vectors here unnoticed.
    """
    import huggingface_hub as hub

    repository, _, revision = (config.hf_hub_id or "").partition("@")
    if not repository:
        raise SynpipeError(
            f"timm names no weights on the hub for {spec.model}: set `weights` to `random` or to a file."
        )
    names = [config.hf_hub_filename] if config.hf_hub_filename else ["model.safetensors", "pytorch_model.bin"]
    try:
        for name in names:
            cached = hub.try_to_load_from_cache(repository, name, revision=revision or None)
            if isinstance(cached, str):
                return Path(cached)
        for name in names:
            try:
                # hf_hub_download would retry for minutes on a machine without network; this asks once.
                url = hub.hf_hub_url(repository, name, revision=revision or None)
                hub.get_hf_file_metadata(url, timeout=_HUB_TIMEOUT_S)
                return Path(hub.hf_hub_download(repository, name, revision=revision or None))
            except hub.errors.EntryNotFoundError:
                continue
        raise FileNotFoundError(f"the repository has neither {' nor '.join(names)}")
    except Exception as error:  # whatever the hub's client, its HTTP library and the disk raise
        raise SynpipeError(
            f"Encoder {spec.model} needs {repository} from {hub.constants.ENDPOINT}, which failed "
            f"({type(error).__name__}: {_first_line(error)}). With network: `hf download {repository} {names[0]}`, "
            "then copy that file here and set `weights` to its path, or copy the Hugging Face cache folder; or use an "
            "encoder whose weights are here (`weights: random` or a file)."
        ) from None


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _shorten(error: BaseException, limit: int = 400) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= limit else text[: limit - 2].rsplit(" ", 1)[0] + " …"
