"""Commands about the published versions of an index, and about the origin of its rows."""

import json
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from synpipe.cli.common import dataset_option, encoder_option, json_option, log, print_json, synapse_id_argument
from synpipe.text import format_table

if TYPE_CHECKING:
    from synpipe.datasets import Project
    from synpipe.index.versions import Difference

EXAMPLE_IDS = 5


@click.command()
@dataset_option
@encoder_option
@json_option
@click.pass_obj
def versions(project: "Project", dataset: str, encoder: str | None, as_json: bool) -> None:
    """List the published versions of an index, newest first.

    Searches use the version that is marked `current`. `synpipe rollback TAG` switches to another one.
    """
    from synpipe.index.versions import index_name, list_versions

    opened = project.dataset(dataset)
    published = list_versions(opened, index_name(opened, encoder))
    if as_json:
        print_json([asdict(version) for version in published])
        return
    rows = [
        (version.number, version.tag, version.made_at, f"{version.rows:,}", "current" if version.current else None)
        for version in published
    ]
    click.echo(format_table(["version", "tag", "made at", "rows", ""], rows))


@click.command()
@click.argument("a")
@click.argument("b", default="current")
@dataset_option
@encoder_option
@json_option
@click.pass_obj
def diff(project: "Project", a: str, b: str, dataset: str, encoder: str | None, as_json: bool) -> None:
    """Show what changed between versions A and B of an index.

    A and B are tags or numbers, as listed by `synpipe versions`. B is `current` by default.

    \b
    Example:
      synpipe diff 7 14
    """
    from synpipe.index.versions import diff as compare_versions

    opened = project.dataset(dataset)
    difference = compare_versions(opened, opened.encoder(encoder), a, b)
    if as_json:
        content = asdict(difference)
        ids = {name: list(map(str, content[name])) for name in ("added", "removed", "changed")}
        print_json(content | ids)
    else:
        click.echo(_describe_difference(difference))


def _describe_difference(difference: "Difference") -> str:
    rows: list[tuple[str, str, str | None]] = []
    for name in ("added", "removed", "changed"):
        ids = getattr(difference, name)
        examples = ", ".join(map(str, ids[:EXAMPLE_IDS])) + (" …" if len(ids) > EXAMPLE_IDS else "")
        rows.append((name, f"{len(ids):,}", examples))
    rows.append(("matched", f"{difference.matched:,}", None))
    lines = [format_table(["", "rows", "examples"], rows), ""]
    if difference.mean_cosine is None:
        lines.append("The vectors of the two versions are not comparable.")
    else:
        lines.append(f"Mean cosine of the matched vectors: {difference.mean_cosine:.6f}")
    if not difference.same_encoder:
        lines.append(
            "The two versions were made by different encoders, so a cosine between their vectors means little."
        )
    return "\n".join(lines)


@click.command()
@click.argument("version")
@dataset_option
@encoder_option
@click.pass_obj
def rollback(project: "Project", version: str, dataset: str, encoder: str | None) -> None:
    """Make searches use VERSION of an index (a tag or a number).

    Nothing is removed, so the same command also switches forward again. When the index is materialised, its newest version
    becomes the current one. `synpipe status` says while searches use a former version. The command waits until no run works
    in the store.
    """
    from synpipe.index.versions import rollback as set_current
    from synpipe.store.locks import one_step_at_a_time

    opened = project.dataset(dataset)
    with one_step_at_a_time(project.store, log):
        current = set_current(opened, opened.encoder(encoder), version)
    click.echo(
        f"Searches now use version {current.number}: {current.tag}, {current.rows:,} rows, made at {current.made_at}."
    )


@click.command()
@click.argument("tags", nargs=-1, required=True, metavar="TAG…")
@dataset_option
@encoder_option
@click.pass_obj
def forget(project: "Project", tags: tuple[str, ...], dataset: str, encoder: str | None) -> None:
    """Remove the tags of published versions of an index.

    `synpipe gc --delete` can then remove the rows of these versions. The current version keeps its tag, unless the data
    set no longer names that encoder.
    """
    from synpipe.index.versions import forget as remove_tag
    from synpipe.index.versions import index_name
    from synpipe.store.locks import one_step_at_a_time

    opened = project.dataset(dataset)
    index = index_name(opened, encoder)
    with one_step_at_a_time(project.store, log):
        for tag in tags:
            version = remove_tag(opened, index, tag)
            click.echo(
                f"Forgotten: version {version.number} of {index}, {version.rows:,} rows, made at {version.made_at}."
            )


@click.command()
@synapse_id_argument
@dataset_option
@encoder_option
@json_option
@click.pass_obj
def provenance(project: "Project", synapse_id: int, dataset: str, encoder: str | None, as_json: bool) -> None:
    """Show where the row of the synapse ID comes from.

    The output names the tile, volume, annotation file, weights, code and Dagster runs.
    """
    import yaml

    from synpipe.reports.provenance import trace_row

    opened = project.dataset(dataset)
    origin = trace_row(opened, opened.encoder(encoder), synapse_id)
    if as_json:
        print_json(origin)
    else:
        # YAML cannot represent tuples; JSON turns them into lists.
        plain = json.loads(json.dumps(origin))
        click.echo(yaml.safe_dump(plain, sort_keys=False, allow_unicode=True), nl=False)
