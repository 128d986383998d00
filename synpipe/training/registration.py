"""A new encoder in the registry: a network that was trained here gets a name.

In: the registry's file, a name, an `EncoderSpec`. Out: the entry as text, or the file with the entry at its end. Guarantee:
comments and other entries stay as they are; a file that would not say what is meant is not written.
"""

import textwrap
from pathlib import Path

import yaml

from synpipe.datasets import NAME
from synpipe.embeddings.encoder_specs import EncoderSpec
from synpipe.embeddings.registry import load_registry
from synpipe.errors import SynpipeError
from synpipe.store.files import write_text


def check_new_name(path: Path, name: str) -> None:
    """Raises `SynpipeError` where no encoder can have that name in the registry `path`, or one has it."""
    if not NAME.fullmatch(name):
        raise SynpipeError(f"{name!r} cannot be the name of an encoder: use a-z, 0-9 and _, and begin with a letter.")
    if name in load_registry(path):
        raise SynpipeError(f"{path} has an encoder {name!r} already: choose another name.")


def as_yaml(name: str, spec: EncoderSpec) -> str:
    """The entry as it stands in a registry, two spaces in."""
    entry = {name: spec.model_dump(mode="json", exclude_defaults=True)}
    return textwrap.indent(yaml.safe_dump(entry, sort_keys=False, allow_unicode=True, width=1000), "  ")


def register(path: Path, name: str, spec: EncoderSpec) -> None:
    """Add the entry at the end of the registry `path`. Raises `SynpipeError` where that is laid out in another way."""
    check_new_name(path, name)
    before = path.read_text(encoding="utf-8")
    after = f"{before.rstrip()}\n\n{as_yaml(name, spec)}"
    meant = yaml.safe_load(before)
    meant["encoders"][name] = spec.model_dump(mode="json", exclude_defaults=True)
    try:
        same = yaml.safe_load(after) == meant
    except yaml.YAMLError:
        same = False
    if not same:
        raise SynpipeError(
            f"{path} does not end with its encoders, indented by two spaces: add the entry by hand, or without `--register`."
        )
    write_text(path, after)
