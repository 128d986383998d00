"""Describes encoders: the three kinds of entries that `encoders.yaml` may hold.

An `EncoderSpec` names a network with its weights, a `DescriptorSpec` a hand-made descriptor, and a `CompressedSpec` a
linear map that is fitted on the vectors of another encoder. All three answer the same questions, so callers ask the spec
and not its type:

- `spec.is_network`: whether the encoder is a network, which runs on a GPU and can be trained further.
- `spec.base`: the name of the encoder whose vectors it compresses, or None if it embeds tiles itself.
- `spec.identity(...)`: what the spec declares, as a digest. It enters code versions. It needs neither torch nor the hub.

The *identity* differs from the *fingerprint*, which is the key of the cached vectors. A fingerprint covers the bytes of the
weights that were loaded, so it is known only after the encoder was opened or fitted.
"""

import re
from collections.abc import Mapping
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, TypeAlias

from pydantic import Field, PositiveFloat, field_validator, model_validator

from synpipe.errors import SynpipeError
from synpipe.specs import Spec, digest
from synpipe.store.fingerprints import file_sha256
from synpipe.tiles.tile import TILE_PX

# Raise one of these when a change in the modules that it names changes vectors: the vectors are then computed again.
NETWORK_METHOD = 1  # `encoders`, `forward`, `em_network`
DESCRIPTOR_METHOD = 1  # `descriptors`
COMPRESSION_METHOD = 1  # `compression`

_WEIGHT_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")
# Arguments of `timm.create_model` that load weights or choose which are loaded, beside those that begin with `pretrained`.
_ARGS_OF_WEIGHTS = ("checkpoint_path", "cache_dir")
# These begin with `pretrained` and describe the architecture of Swin networks.
_ARGS_OF_SHAPE = ("pretrained_window_size", "pretrained_window_sizes")
_LIKE_A_FILE = re.compile(r"[/\\:]|\.(safetensors|pth|pt|bin|ckpt|npz|npy|tar|h5)$", re.IGNORECASE)

# Looking up a version reads a file and takes 6 ms, and `status` asks for every asset of every encoder.
_version = lru_cache(version)


class EncoderSpec(Spec):
    """A network: one entry of the registry, without its name.

    Two specs have the same identity if they differ only in `description` or `pixel_nm`, or in the path of the same weights file.
    """

    is_network: ClassVar[Literal[True]] = True
    base: ClassVar[None] = None

    model: str = Field(pattern=r"^\w+(\.\w+)?$")
    """timm's name, `architecture.weights_tag`, such as `xcit_nano_12_p16_224.fb_in1k`."""
    weights: str
    """`hub` (Hugging Face), `random` (needs `seed`), or a weights file, relative to the registry's folder."""
    seed: int | None = Field(None, ge=0)
    args: dict[str, bool | int | float | str] = Field(default_factory=dict)
    """Further arguments of the architecture, for `timm.create_model`."""
    crop_px: int | None = Field(None, ge=32, le=TILE_PX, multiple_of=2)
    """Size of the centre crop that the model sees. Default: the model's input size, or 224 where that exceeds the tile."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """bf16 (autocast) moves a vector by at most about 1 % and is twice as fast on a CPU that supports it (AVX512-BF16, AMX).
    Other CPUs emulate it, 2 to 10 times slower than fp32; `open_encoder` then logs a warning."""
    compile: bool = False
    """Whether `torch.compile` generates kernels for this network. It needs a C++ compiler and takes minutes at every start.
    The kernels round differently, so this setting is part of the fingerprint."""
    pixel_nm: tuple[PositiveFloat, PositiveFloat] | None = Field(None, exclude=True)
    """Smallest and largest size of the pixels that the network was made for. `dataset check` warns of others. It changes no
    vector, so it is not part of identity, fingerprint or metadata (`exclude`)."""
    description: str = ""

    @field_validator("pixel_nm")
    @classmethod
    def _is_a_range(cls, pixel_nm: tuple[float, float] | None) -> tuple[float, float] | None:
        if pixel_nm is not None and pixel_nm[0] > pixel_nm[1]:
            raise ValueError("give the smallest size first, such as [4, 5]")
        return pixel_nm

    @field_validator("weights")
    @classmethod
    def _check_weights(cls, weights: str) -> str:
        if weights not in ("hub", "random") and not weights.endswith(_WEIGHT_SUFFIXES):
            raise ValueError(f"use `hub`, `random` or a file that ends with {', '.join(_WEIGHT_SUFFIXES)}")
        return weights

    @field_validator("args")
    @classmethod
    def _load_no_weights(cls, args: dict[str, Any]) -> dict[str, Any]:
        """`weights` alone says what is loaded. The identity and the fingerprint do not cover files that `args` name."""
        for name, value in args.items():
            names_weights = name in _ARGS_OF_WEIGHTS or (name.startswith("pretrained") and name not in _ARGS_OF_SHAPE)
            if names_weights or (isinstance(value, str) and _LIKE_A_FILE.search(value)):
                raise ValueError(
                    f"`{name}: {value}` makes timm load a file, whose content would not change the fingerprint of the encoder: "
                    "remove it, and name the weights under `weights`"
                )
        return args

    @model_validator(mode="after")
    def _check_seed(self) -> Self:
        if (self.seed is None) == (self.weights == "random"):
            raise ValueError("`seed` belongs to `weights: random`: give both or neither")
        return self

    def identity(self, weights_base: Path, encoders: Mapping[str, "AnyEncoderSpec"]) -> str:
        """Digest of what the spec declares, and of the bytes of a weights file.

        weights_base: the folder where a relative weights path starts. encoders: not used by this kind.
        A missing weights file is no error, so that the other encoders can still be listed and used.
        """
        path = weights_base / self.weights
        if self.weights == "hub":
            weights = f"hub:{self.model}"
        elif self.weights == "random":
            weights = f"random:{self.seed}"
        else:
            weights = f"sha256:{file_sha256(path)}" if path.is_file() else f"missing:{self.weights}"
        return self._identity_with(weights)

    def check_loaded(self, weights: str, identity: str) -> None:
        """Raise `SynpipeError` if `weights`, which were loaded, are not those of `identity`: the file was replaced since."""
        if self.weights not in ("hub", "random") and self._identity_with(weights) != identity:
            raise SynpipeError(
                f"The weights file {self.weights} of encoder {self.model} was replaced while it was being opened. Run the same "
                "command again."
            )

    def _identity_with(self, weights: str) -> str:
        return digest({**self._settings(), "weights": weights, "crop_px": self.crop_px})

    def fingerprint(self, weights: str, preprocessing: Mapping[str, Any]) -> str:
        """The key of the vectors. weights: see `Encoder.weights`. preprocessing: see `encoders.open_network`."""
        return digest({**self._settings(), "weights": weights, "preprocessing": preprocessing})

    def _settings(self) -> dict[str, Any]:
        """What the identity and the fingerprint have in common."""
        settings = {
            "model": self.model,
            "args": self.args,
            "precision": self.precision,
            "method": NETWORK_METHOD,
            "torch": _version("torch"),
            "timm": _version("timm"),
        }
        return settings | ({"compile": True} if self.compile else {})


class DescriptorSpec(Spec):
    """A hand-made descriptor of `descriptors`. It has no weights and no settings."""

    is_network: ClassVar[Literal[False]] = False
    base: ClassVar[None] = None

    descriptor: Literal["pixels", "hog", "lbp", "grey_histogram", "filter_bank", "filter_bank_pooled"]
    description: str = ""

    @property
    def model(self) -> str:
        """The name that messages show, as `EncoderSpec.model`."""
        return self.descriptor

    def identity(self, weights_base: Path, encoders: Mapping[str, "AnyEncoderSpec"]) -> str:
        """The same as the fingerprint, because there are no weights."""
        return self.fingerprint()

    def fingerprint(self) -> str:
        """The key of the vectors: covers the method and the libraries that it uses."""
        return digest([self.descriptor, DESCRIPTOR_METHOD, _version("numpy"), _version("scipy")])


class CompressedSpec(Spec):
    """A linear map that shortens the vectors of another encoder; see `compression`.

    base: the name of that encoder. dimensions: fewer than the base has. In the `encoders:` of a data set, `<base>+pca32` and
    `<base>+ae32` mean the same and need no entry in the registry.
    """

    is_network: ClassVar[Literal[False]] = False

    base: str
    method: Literal["pca", "linear_autoencoder"]
    dimensions: int = Field(ge=2)
    description: str = ""

    def identity(self, weights_base: Path, encoders: Mapping[str, "AnyEncoderSpec"]) -> str:
        """Digest of the spec and of the identity of its base, which must be among `encoders`."""
        settings = {"method": self.method, "dimensions": self.dimensions, "code": COMPRESSION_METHOD}
        return digest([encoders[self.base].identity(weights_base, encoders), settings])


TileEncoderSpec: TypeAlias = EncoderSpec | DescriptorSpec
"""Encoders that embed tiles. Their `base` is None."""

AnyEncoderSpec: TypeAlias = EncoderSpec | DescriptorSpec | CompressedSpec
