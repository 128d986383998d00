"""Options, JSON, errors, paths and pictures that several commands share."""

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from synpipe.errors import SynpipeError

if TYPE_CHECKING:
    from PIL.Image import Image

    from synpipe.datasets import Project
    from synpipe.store.objects import BulkPath

ID_FIELDS = ("synapse_id", "neuron_id")
ID_LIST_FIELDS = ("nearest_a", "nearest_b")


class _SynapseId(click.ParamType):
    """A number that a column of ids can hold. The message does not repeat a value of thousands of digits."""

    name = "ID"

    def convert(self, value: Any, param: click.Parameter | None, context: click.Context | None) -> int:
        text = str(value)
        if not (text.isascii() and text.isdecimal()):
            self.fail(f"{text[:40]!r} is not a valid integer.", param, context)
        if len(text) > len(str(2**63)) or int(text) >= 2**63:
            raise SynpipeError(f"Synapse {text[:40]} is unknown: an id is a whole number below 2^63.")
        return int(text)


synapse_id_argument = click.argument("synapse_id", type=_SynapseId(), metavar="ID")
dataset_option = click.option(
    "--dataset",
    "-d",
    default="demo",
    show_default=True,
    help="Data set: the name of a YAML file in data/datasets/, without .yaml.",
)
encoder_option = click.option(
    "--encoder", "-e", help="Encoder of the data set.  [default: the first that the data set names]"
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of text.")


def log(message: str) -> None:
    """Print a message about progress on standard error, so that standard output holds results only."""
    click.echo(message, err=True)


def echo_error(message: str) -> None:
    """Print the message of an error that the user can fix. All commands print errors in this way."""
    click.echo(f"Error: {message}", err=True)


def print_json(value: Any) -> None:
    """Print one JSON document, with ids as strings: JavaScript rounds integers above 2^53."""
    click.echo(json.dumps(_with_text_ids(value), indent=1))


def _with_text_ids(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _field_with_text_ids(name, item) for name, item in value.items()}
    return [_with_text_ids(item) for item in value] if isinstance(value, list | tuple) else value


def _field_with_text_ids(name: str, value: Any) -> Any:
    if name in ID_FIELDS:
        return None if value is None else str(value)
    return list(map(str, value)) if name in ID_LIST_FIELDS else _with_text_ids(value)


def check_picture(path: Path) -> None:
    """Check where the user wants a picture, before any work. Raises `SynpipeError` for another format or an unknown folder."""
    if path.suffix.lower() != ".png":
        raise SynpipeError(f"--picture {path} is written as PNG: choose a name that ends with .png.")
    if not path.parent.is_dir():
        raise SynpipeError(
            f"--picture {path}: the folder {path.parent} does not exist. Create it, or choose another one."
        )


def save_picture(path: Path, image: "Image") -> None:
    """Write an image as PNG. The file is either complete or absent."""
    from synpipe.store.files import atomic_path

    with atomic_path(path) as temporary:
        image.save(temporary, "PNG")


def short_path(path: "BulkPath") -> str:
    """The path relative to the working directory if that is shorter, otherwise the whole path."""
    if not isinstance(path, Path):
        return str(path)
    relative = os.path.relpath(path)
    return relative if len(relative) < len(str(path)) else str(path)


def own_command(project: "Project") -> str:
    """The command line that started this program, without its arguments, so that users can paste suggested commands."""
    program = short_path(Path(sys.argv[0])) if os.sep in sys.argv[0] else "synpipe"
    if program.endswith("__main__.py"):
        program = "python -m synpipe.cli"
    return (
        program if project.store == type(project).locate().store else f"{program} --store {short_path(project.store)}"
    )
