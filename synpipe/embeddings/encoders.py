"""Opens encoders: turns a spec into a network, its weights and its preprocessing on a device.

Input: an `EncoderSpec` or a `DescriptorSpec`. Output: an `Encoder`, which turns uint8 tiles into vectors. Everything that
affects the numbers is part of the encoder's fingerprint: architecture and arguments, the bytes of the weights, crop, mean,
standard deviation, precision, torch and timm. So vectors with the same fingerprint may be compared and cached.

All networks share one preprocessing: the centre `crop_px` of the tile at its native scale, then the mean and standard
deviation of the model (timm's data config). Tiles are cropped and never resized, because EM is calibrated: a vesicle of 40 nm
is 10 pixels wide in every tile of 4 nm pixels. Interpolation would blur the smallest structures, and its result would depend
on the implementation. The synapse stays in the centre.

torch and timm take about ten seconds to import, so this module imports them inside functions only.

After a change that alters vectors, raise `NETWORK_METHOD` in `encoder_specs`.
"""

import difflib
import hashlib
import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from synpipe.embeddings import descriptors
from synpipe.embeddings.encoder_specs import DescriptorSpec, EncoderSpec, TileEncoderSpec
from synpipe.embeddings.forward import BATCH_SIZE, Forward, FunctionForward, NetworkForward
from synpipe.errors import SynpipeError, one_line
from synpipe.tiles.tile import TILE_PX

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

_CROP_OF_LARGE_MODELS_PX = 224  # for a network whose own input is larger than a tile; a multiple of 14, 16 and 32
_HUB_TIMEOUT_S = 5.0
_COPY_BYTES = 2**22

# huggingface_hub reads this when it is imported.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")


@dataclass(frozen=True)
class Encoder:
    """A model ready to embed. `open_encoder` makes it."""

    spec: TileEncoderSpec
    weights: str
    """The weights that were loaded: `sha256:` and the digest of the file, `random:` and the seed, or `none`."""
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
        """Prepare tiles for `forward.launch`. Any thread may call this. Raises ValueError for a wrong dtype or shape."""
        if tiles.dtype != np.uint8 or tiles.shape[1:] != (3, TILE_PX, TILE_PX):
            raise ValueError(f"tiles must be uint8 (n, 3, {TILE_PX}, {TILE_PX}), not {tiles.dtype} {tiles.shape}")
        return self.forward.stage(tiles)

    @property
    def device_kind(self) -> str:
        """`cuda` or `cpu`: the key of `BATCH_SIZE` and similar tables. Other devices count as `cpu`."""
        return self.device.type if self.device.type in BATCH_SIZE else "cpu"

    @property
    def batch_size(self) -> int:
        """The number of tiles that go to the device at once."""
        return BATCH_SIZE[self.device_kind]


def open_encoder(spec: TileEncoderSpec, weights_base: Path, device: str = "auto") -> Encoder:
    """Build the network, load its weights and move it to `device`.

    weights_base: the folder where a relative weights path starts. device: `auto` (the GPU if there is one), `cpu`, `cuda:1` …;
    descriptors always run on the CPU. Raises `SynpipeError` if the model, the device or the weights are unavailable; it
    never falls back to other weights.
    """
    if not spec.is_network:
        return _open_descriptor(spec)
    target = find_device(device)
    if spec.precision == "bf16" and target.type == "cpu" and not cpu_has_bf16():
        logger.warning(
            "This CPU emulates bf16, which is slow: with `precision: fp32` in the registry, %s runs faster here",
            spec.model,
        )
    model, weights, preprocessing = open_network(spec, weights_base)
    forward = NetworkForward(model, preprocessing, target, spec.precision, spec.compile, TILE_PX)
    try:
        dim = forward.launch(forward.stage(np.zeros((1, 3, TILE_PX, TILE_PX), np.uint8)))().shape[1]
    except (RuntimeError, AssertionError) as error:
        raise SynpipeError(
            f"Encoder {spec.model} cannot process crops of {preprocessing['crop_px']} px ({_shorten(error)}): set another "
            "`crop_px`."
        ) from None
    return Encoder(spec, weights, spec.fingerprint(weights, preprocessing), dim, target, preprocessing, forward)


def weights_file(spec: TileEncoderSpec, weights_base: Path) -> Path | None:
    """The file with the weights, downloaded if necessary; None if the encoder has none. Raises as `open_encoder` does."""
    if not spec.is_network or spec.weights == "random":
        return None
    return _hub_file(spec, _pretrained_config(spec.model)) if spec.weights == "hub" else weights_base / spec.weights


def has_weights_here(spec: TileEncoderSpec, weights_base: Path) -> bool:
    """Whether the encoder can be opened without a download. Raises `SynpipeError` if timm does not know the model."""
    if not spec.is_network or spec.weights == "random":
        return True
    if spec.weights != "hub":
        return (weights_base / spec.weights).is_file()
    config = _pretrained_config(spec.model)
    return _cached_hub_file(_hub_place(spec, config)) is not None


def open_network(spec: EncoderSpec, weights_base: Path) -> tuple["torch.nn.Module", str, dict[str, Any]]:
    """Build the network on the CPU and load its weights, to embed with it or to train it further.

    Returns the network, its weights (see `Encoder.weights`) and its preprocessing: `crop_px`, and per channel the `mean` and
    `std` of grey values from 0 to 1. Raises as `open_encoder` does.
    """
    import timm
    import torch

    import synpipe.embeddings.em_network  # noqa: F401  # registers `d4resnet` with timm

    config = _pretrained_config(spec.model)
    native_px = config.input_size[-1]
    crop_px = spec.crop_px or (native_px if native_px <= TILE_PX else _CROP_OF_LARGE_MODELS_PX)
    args = dict(spec.args)
    if config.fixed_input_size and crop_px != native_px:
        args["img_size"] = crop_px  # position embeddings are built for, and resampled to, this size

    # Initialisation must be the same in every process and must not disturb the random numbers of the caller.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(spec.seed or 0)
        if spec.weights == "random":
            weights = f"random:{spec.seed}"
            model = _create(spec, args)
        else:
            path = _hub_file(spec, config) if spec.weights == "hub" else weights_base / spec.weights
            with _private_copy(spec, path) as (copy, sha256):
                model = _create_with_weights(spec, args, config, _Weights(path, copy))
            weights = f"sha256:{sha256}"

    data = timm.data.resolve_model_data_config(model)
    preprocessing = {"crop_px": crop_px, "resize": "none", "mean": list(data["mean"]), "std": list(data["std"])}
    return model, weights, preprocessing


def _open_descriptor(spec: DescriptorSpec) -> Encoder:
    import torch

    def describe(tiles: np.ndarray) -> np.ndarray:
        return descriptors.describe(spec.descriptor, tiles)

    dim = describe(np.zeros((1, 3, TILE_PX, TILE_PX), np.uint8)).shape[1]
    preprocessing = {"crop_px": descriptors.CROPS_PX[spec.descriptor], "resize": "none"}
    forward = FunctionForward(describe)
    return Encoder(spec, "none", spec.fingerprint(), dim, torch.device("cpu"), preprocessing, forward)


def open_on_all_devices(spec: TileEncoderSpec, weights_base: Path) -> list[Encoder]:
    """Open the encoder on each GPU of this machine, or once on its CPU. Raises as `open_encoder` does."""
    import torch

    gpus = torch.cuda.device_count() if spec.is_network else 0
    devices = [f"cuda:{gpu}" for gpu in range(gpus)] or ["cpu"]
    return [open_encoder(spec, weights_base, device) for device in devices]


def find_device(device: str = "auto") -> "torch.device":
    """The device of that name; `auto` means the GPU if there is one. Raises `SynpipeError` if it cannot be used."""
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
    """Whether the CPU has instructions for bf16. Other CPUs emulate it slowly."""
    import torch

    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16"))


def _pretrained_config(model: str) -> Any:
    """timm's `PretrainedCfg`: input size, mean, standard deviation, address on the hub. Raises `SynpipeError` if unknown."""
    import timm

    try:
        config = timm.models.get_pretrained_cfg(model)
    except RuntimeError:
        config = None
    if config is None:
        close = difflib.get_close_matches(model, [*timm.list_models(), *timm.list_pretrained()], n=4)
        hint = f" Did you mean {', '.join(close)}?" if close else ""
        raise SynpipeError(f"timm {timm.__version__} has no model `{model}`.{hint} timm.list_pretrained() lists all.")
    return config


def _create(spec: EncoderSpec, args: dict[str, Any], **weights: Any) -> "torch.nn.Module":
    import timm

    try:
        return timm.create_model(spec.model, num_classes=0, **args, **weights)
    except (TypeError, AssertionError) as error:
        raise SynpipeError(
            f"Encoder {spec.model} cannot be built with {args} ({_shorten(error)}): correct `args` or `crop_px`."
        ) from None


@dataclass(frozen=True)
class _Weights:
    """named: the file of the registry or of the hub's cache, for messages. copy: the file that is loaded."""

    named: Path
    copy: Path


@contextmanager
def _private_copy(spec: EncoderSpec, path: Path) -> Iterator[tuple[Path, str]]:
    """A copy of a weights file, for as long as the context is open, and the SHA-256 of its bytes.

    The file itself may be replaced at any moment. Nobody changes the copy, so the digest is that of the weights that are loaded.
    """
    total = hashlib.sha256()
    with tempfile.TemporaryDirectory(prefix="synpipe-") as folder:
        copy = Path(folder) / f"weights{path.suffix}"
        try:
            with open(path, "rb") as source, open(copy, "wb") as target:
                while block := source.read(_COPY_BYTES):
                    total.update(block)
                    target.write(block)
        except FileNotFoundError:
            raise SynpipeError(
                f"The weights file {path} of encoder {spec.model} does not exist: correct `weights` in the registry."
            ) from None
        except OSError as error:
            raise SynpipeError(
                f"The weights file {path} of encoder {spec.model} cannot be copied to {folder} ({error.strerror}). Make the file "
                "readable, and make space there, or let TMPDIR name another folder."
            ) from None
        yield copy, total.hexdigest()


def _create_with_weights(
    spec: EncoderSpec, args: dict[str, Any], config: Any, weights: "_Weights"
) -> "torch.nn.Module":
    import timm

    path = weights.named
    try:
        state = timm.models.load_state_dict(str(weights.copy), weights_only=True)
    except Exception as error:  # safetensors, pickle, zipfile and torch raise many types
        raise SynpipeError(
            f"The weights file {path} of encoder {spec.model} cannot be read ({_first_line(error)}). It must be "
            "safetensors, or a torch checkpoint that contains tensors only: code in a checkpoint is never run."
        ) from None
    classifiers = (config.classifier,) if isinstance(config.classifier, str) else config.classifier or ()
    features = {key: value for key, value in state.items() if not key.startswith(tuple(f"{c}." for c in classifiers))}
    try:
        if not features:
            raise RuntimeError("it contains no weights")
        # With equal `num_classes` on both sides timm loads strictly; otherwise it silently accepts missing layers.
        overlay = {"state_dict": features, "num_classes": 0, "label_offset": 0}
        model = _create(spec, args, pretrained=True, pretrained_cfg_overlay=overlay)
    except (RuntimeError, KeyError, ValueError, AttributeError) as error:
        raise SynpipeError(
            f"The weights file {path} does not fit {spec.model}: {_shorten(error)} Its first keys are "
            f"{', '.join(list(features)[:4])}. Give the file that belongs to this model, or change `model`."
        ) from None
    vars(model)["pretrained_cfg"].pop("state_dict")  # a second copy of the weights
    return model


@dataclass(frozen=True)
class _HubPlace:
    """The repository on the hub that holds weights, and the names that their file may have there."""

    repository: str
    revision: str | None
    names: tuple[str, ...]


def _hub_place(spec: EncoderSpec, config: Any) -> _HubPlace:
    repository, _, revision = (config.hf_hub_id or "").partition("@")
    if not repository:
        raise SynpipeError(
            f"timm names no weights on the hub for {spec.model}: set `weights` to `random` or to a file."
        )
    names = (config.hf_hub_filename,) if config.hf_hub_filename else ("model.safetensors", "pytorch_model.bin")
    return _HubPlace(repository, revision or None, names)


def _cached_hub_file(place: _HubPlace) -> Path | None:
    import huggingface_hub as hub

    for name in place.names:
        cached = hub.try_to_load_from_cache(place.repository, name, revision=place.revision)
        if isinstance(cached, str):
            return Path(cached)
    return None


def _hub_file(spec: EncoderSpec, config: Any) -> Path:
    """Path of the weights in the Hugging Face cache, downloaded if they are missing there.

    Cached weights are used without contacting the hub, so a change on the hub cannot silently change vectors here.
    """
    import huggingface_hub as hub

    place = _hub_place(spec, config)
    repository, revision, names = place.repository, place.revision, place.names
    try:
        if cached := _cached_hub_file(place):
            return cached
        for name in names:
            try:
                # Without a network, hf_hub_download would retry for minutes. This request fails after one timeout.
                url = hub.hf_hub_url(repository, name, revision=revision)
                hub.get_hf_file_metadata(url, timeout=_HUB_TIMEOUT_S)
                return Path(hub.hf_hub_download(repository, name, revision=revision))
            except hub.errors.EntryNotFoundError:
                continue
        raise FileNotFoundError(f"the repository has neither {' nor '.join(names)}")
    except Exception as error:  # the hub's client, its HTTP library and the disk raise many types
        raise SynpipeError(
            f"Encoder {spec.model} needs {repository} from {hub.constants.ENDPOINT}, which failed "
            f"({type(error).__name__}: {_first_line(error)}). On a machine with a network, run `hf download {repository} "
            f"{names[0]}`, then copy that file here and set `weights` to its path, or copy the Hugging Face cache folder. Or "
            "use an encoder that needs no download (`weights: random` or a file)."
        ) from None


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _shorten(error: BaseException, limit: int = 400) -> str:
    text = one_line(error)
    return text if len(text) <= limit else text[: limit - 2].rsplit(" ", 1)[0] + " …"
