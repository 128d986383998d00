"""Reads the registry of encoders, `encoders.yaml`, and picks the encoders that a data set names.

Registries are read whenever Dagster loads the code, so nothing here imports torch or timm, which take about ten seconds.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from synpipe.addresses import refuse_credentials_within
from synpipe.embeddings.encoder_specs import AnyEncoderSpec, CompressedSpec, DescriptorSpec, EncoderSpec
from synpipe.errors import SynpipeError
from synpipe.specs import Spec, read_yaml

_SHORTHAND = re.compile(r"([a-z][a-z0-9_]*)\+(pca|ae)([1-9][0-9]*)")
_METHODS: dict[str, Literal["pca", "linear_autoencoder"]] = {"pca": "pca", "ae": "linear_autoencoder"}


class _RegistryFile(Spec):
    encoders: dict[Any, Any] = Field(min_length=1)

    @model_validator(mode="before")
    @classmethod
    def _holds_no_credentials(cls, document: Any) -> Any:
        refuse_credentials_within(document)
        return document


class Registry(Mapping[str, AnyEncoderSpec]):
    """The entries of a registry by name, in the order of the file.

    An entry is checked when it is looked up, so that a wrong entry stops only those who use it. A lookup raises `SynpipeError` that
    names the file, the entry and the valid keys.
    """

    def __init__(self, path: Path):
        """Raises `SynpipeError` if the file is not a registry at all."""
        self._path = path
        self._entries: dict[str, Any] = _RegistryFile.parse(read_yaml(path), str(path)).encoders

    def __getitem__(self, name: str) -> AnyEncoderSpec:
        entry = self._entries[name]
        if not (isinstance(name, str) and re.fullmatch("[a-z][a-z0-9_]*", name)):
            raise SynpipeError(
                f"{self._path}: the name `{name}` must consist of a-z, 0-9 and _ and begin with a letter."
            )
        return _kind_of(entry).parse(entry, f"{self._path}, encoder `{name}`")

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries


def load_registry(path: Path) -> dict[str, AnyEncoderSpec]:
    """Read all entries by name. Raises `SynpipeError` if any of them is wrong."""
    return dict(Registry(path))


def _kind_of(entry: Any) -> type[EncoderSpec] | type[DescriptorSpec] | type[CompressedSpec]:
    keys = entry if isinstance(entry, dict) else ()
    return DescriptorSpec if "descriptor" in keys else CompressedSpec if "base" in keys else EncoderSpec


def branch_name(encoder: str) -> str:
    """The name of an encoder in assets and file names, which cannot contain a +: `resnet18+pca32` → `resnet18_pca32`."""
    return encoder.replace("+", "_")


def chosen_encoders(
    names: Sequence[str], registry: Mapping[str, AnyEncoderSpec], where: str
) -> dict[str, AnyEncoderSpec]:
    """Look up the encoders that a data set names: specs by branch name, in the order of `names`.

    where: names the file in the error. Raises `SynpipeError` for a name that is neither an entry of the registry nor of
    the form `<base>+pca32`, and for a base that the data set does not name or that is itself compressed.
    """
    chosen: dict[str, AnyEncoderSpec] = {}
    for name in names:
        chosen[branch_name(name)] = _look_up(name, registry, where)
    for branch, spec in chosen.items():
        if spec.base is None:
            continue
        base_spec = chosen.get(spec.base)
        if base_spec is None:
            candidates = ", ".join(_names_that_can_be_compressed(registry))
            raise SynpipeError(
                f"{where}: {branch} compresses the vectors of {spec.base!r}, which is not among the `encoders:` of this data "
                f"set: name it there too. Encoders that can be compressed: {candidates}."
            )
        if base_spec.base is not None:
            raise SynpipeError(
                f"{where}: {branch} compresses {spec.base!r}, which is compressed itself: compress {base_spec.base!r} instead."
            )
    return chosen


def _names_that_can_be_compressed(registry: Mapping[str, AnyEncoderSpec]) -> Iterator[str]:
    for name in registry:
        try:
            if registry[name].base is None:
                yield name
        except SynpipeError:
            continue  # a wrong entry that this data set need not use


def _look_up(name: str, registry: Mapping[str, AnyEncoderSpec], where: str) -> AnyEncoderSpec:
    shorthand, branch = _SHORTHAND.fullmatch(name), branch_name(name)
    if shorthand is None:
        if name in registry:
            return registry[name]
        known = ", ".join(map(str, registry))
        raise SynpipeError(
            f"{where}: the encoder {name!r} is not in encoders.yaml, which has {known}; nor is it of the form "
            "<encoder>+pca32 or <encoder>+ae32."
        )
    if branch in registry:
        raise SynpipeError(
            f"{where}: {name!r} would become the branch {branch}, which is also an entry of encoders.yaml: rename that entry, "
            "or name it instead."
        )
    base, method, dimensions = shorthand.groups()
    return CompressedSpec.parse(
        {"base": base, "method": _METHODS[method], "dimensions": int(dimensions)}, f"{where}, encoder {name!r}"
    )
