"""Commands that inspect a data set before anything is made from it."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from synpipe.cli.common import check_picture, echo_error, save_picture, short_path

if TYPE_CHECKING:
    from synpipe.datasets import Project


@click.group()
def dataset() -> None:
    """Inspect a data set before you make anything from it."""


@dataset.command()
@click.argument("file_or_name", metavar="FILE|NAME")
@click.option(
    "--picture",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Where to save the contact sheet.  [default: check.png in the data set's folder of the store]",
)
@click.pass_obj
def check(project: "Project", file_or_name: str, picture: Path | None) -> None:
    """Check a data set before you make anything from it.

    The command opens the volume, reads all annotations and some tiles, and estimates the cost of the rest. FILE is the
    path of a YAML file; NAME is a data set in data/datasets/. All problems are reported together, and the exit code is
    then 1. Warnings name what may fail or mislead later, and do not change the exit code.

    \b
    Examples:
      synpipe dataset check data/datasets/mydata.yaml
      synpipe dataset check mydata --picture tiles.png
    """
    from synpipe.reports import dataset_check

    if picture is not None:
        check_picture(picture)
    opened = project.find_dataset(file_or_name)
    click.echo(f"{opened.name}: {opened.spec.title}")
    report = dataset_check.check(opened)
    for heading, lines in report.found.items():
        _echo_section(heading, lines)
    if report.picture is not None:
        picture = picture or opened.folder / "check.png"
        save_picture(picture, report.picture)
        _echo_section("picture", [short_path(picture)])
    if report.warnings:
        _echo_section("warning", report.warnings)
    for problem in report.problems:
        echo_error(problem)
    sys.exit(1 if report.problems else 0)


def _echo_section(heading: str, lines: list[str]) -> None:
    """Print lines beside their heading. The lines are too long for a table."""
    for number, line in enumerate(lines):
        click.echo(f"  {'' if number else heading:<12} {line}")
