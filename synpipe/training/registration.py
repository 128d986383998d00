"""Adds an encoder to the registry: a trained network gets a name.

Input: the file of the registry, a name and an `EncoderSpec`. Output: the entry as text, or the file with the entry at its end.
Comments and other entries stay as they are. The file is written only if it then parses to the intended content.
"""

import textwrap
from pathlib import Path
from typing import Any

import yaml

from synpipe.datasets import NAME
from synpipe.embeddings.encoder_specs import EncoderSpec
from synpipe.embeddings.registry import Registry
from synpipe.errors import SynpipeError
from synpipe.store.files import write_text


def check_new_name(path: Path, name: str) -> None:
    """Raise `SynpipeError` if the name is invalid or the registry `path` already has it."""
    if not NAME.fullmatch(name):
        raise SynpipeError(f"{name!r} cannot be the name of an encoder: use a-z, 0-9 and _, and begin with a letter.")
    if name in Registry(path):
        raise SynpipeError(f"{path} already has an encoder {name!r}: choose another name.")


def as_yaml(name: str, spec: EncoderSpec) -> str:
    """The entry as text for a registry, indented by two spaces."""
    entry = {name: _as_entry(spec)}
    return textwrap.indent(yaml.safe_dump(entry, sort_keys=False, allow_unicode=True, width=1000), "  ")


def register(path: Path, name: str, spec: EncoderSpec) -> None:
    """Append the entry to the registry `path`. Raises `SynpipeError` if the layout of the file does not allow that."""
    check_new_name(path, name)
    before = path.read_text(encoding="utf-8")
    after = f"{before.rstrip()}\n\n{as_yaml(name, spec)}"
    intended = yaml.safe_load(before)
    intended["encoders"][name] = _as_entry(spec)
    try:
        as_intended = yaml.safe_load(after) == intended
    except yaml.YAMLError:
        as_intended = False
    if not as_intended:
        raise SynpipeError(
            f"{path} does not end with its encoders, indented by two spaces: run without `--register`, and add the entry by hand."
        )
    write_text(path, after)


def _as_entry(spec: EncoderSpec) -> dict[str, Any]:
    entry = spec.model_dump(mode="json", exclude_defaults=True)
    return entry if spec.pixel_nm is None else entry | {"pixel_nm": list(spec.pixel_nm)}
