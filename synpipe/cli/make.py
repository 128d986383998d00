"""Commands that make the assets of a data set, show their state, and remove files that are no longer needed."""

import os
from contextlib import nullcontext
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from synpipe.cli.common import dataset_option, json_option, log, own_command, print_json, save_picture, short_path
from synpipe.errors import SynpipeError
from synpipe.text import format_table

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from synpipe.assets.asset import Leftover
    from synpipe.datasets import Dataset, Project


@click.command()
@click.pass_obj
def demo(project: "Project") -> None:
    """Make the synthetic demo data set and all of its assets, and search in it.

    \b
    Examples:
      synpipe demo
      synpipe --store /data/synpipe demo
    """
    from synpipe.assets.index import choose_example_queries, draw_example_neighbours
    from synpipe.defs.run import materialize as run_assets

    dataset = project.dataset("demo")
    command = own_command(project)  # before the run, which sets SYNPIPE_STORE for this process
    run_assets(project, "demo")
    encoder = dataset.encoder(None)
    picture = dataset.folder / "neighbours.png"
    image = draw_example_neighbours(dataset, encoder, tile_px=128)
    if image is not None:
        save_picture(picture, image)
    click.echo(f"\n{_demo_summary(dataset, picture)}\n\nNext:\n")
    click.echo(_next_steps(command, choose_example_queries(dataset, encoder)[0]))


def _demo_summary(dataset: "Dataset", picture: "Path") -> str:
    from synpipe.assets.manifest import read_manifest

    synapses, tiles, rejects = (read_manifest(dataset, asset).rows for asset in ("synapses", "rgb_tiles", "rejects"))
    folder = short_path(dataset.folder)
    files = [
        (f"{folder}/synapses.parquet", "synapses"),
        (f"{folder}/rejects.parquet", "rejected synapses, with reasons"),
        (f"{folder}/tables/*.parquet", f"embeddings: {', '.join(dataset.encoders)}"),
        (short_path(dataset.lancedb_folder), "the same embeddings as LanceDB tables with indexes"),
    ]
    if picture.exists():
        files.append((short_path(picture), "picture: the neighbours of one synapse of each class"))
    return (
        f"{dataset.spec.title}\n{synapses:,} synapses, {tiles:,} tiles, {rejects:,} rejects\n\n"
        f"{format_table(['file', 'content'], files)}"
    )


def _next_steps(command: str, synapse_id: int) -> str:
    installed_by_make = command == os.path.join(".venv", "bin", "synpipe")
    ui, explore = ("make ui", "make explore") if installed_by_make else (f"{command} ui", f"{command} explore")
    steps = [
        (explore, "similar synapses and the map in the browser: http://127.0.0.1:8000"),
        (ui, "the asset graph in Dagster: http://127.0.0.1:3000"),
        (f"{command} search {synapse_id}", "the most similar synapses of each class"),
        (f"{command} status", "which assets exist, and which are out of date"),
        (f"{command} --help", "all other commands"),
    ]
    return format_table(["command", "shows"], steps)


@click.command()
@dataset_option
@click.option(
    "--select",
    "-s",
    multiple=True,
    metavar="ASSET",
    help="Make only this asset. ASSET+ adds everything downstream of it, +ASSET everything upstream. Can be repeated.",
)
@click.option(
    "--stale", is_flag=True, help="Make only assets that are stale or missing, and the assets downstream of them."
)
@click.pass_obj
def materialize(project: "Project", dataset: str, select: tuple[str, ...], stale: bool) -> None:
    """Make the assets of a data set: synapses, tiles, embeddings, tables, indexes.

    Finished work is reused, so run this command after every change and after every interruption.

    \b
    Examples:
      synpipe materialize -d mydata
      synpipe materialize -d mydata --stale
      synpipe materialize -d mydata -s rgb_tiles+
      synpipe materialize -d mydata -s embeddings_resnet18+
    """
    # Dagster takes two seconds to import, and `status` and `gc` do not need it.
    from synpipe.defs.run import materialize as run_assets

    if stale and select:
        raise SynpipeError("Use either --stale or --select: --stale selects the assets itself.")
    if stale:
        from synpipe.assets.graph import states

        select = tuple(state.asset for state in states(project.dataset(dataset)) if state.state != "fresh")
        if not select:
            click.echo("Every asset is up to date.")
            return
    opened = project.dataset(dataset)
    before = _made_of(opened)
    run_assets(project, dataset, select)
    if _made_of(opened) == before:
        click.echo("Nothing has changed: every asset is as it was.")


def _made_of(dataset: "Dataset") -> dict[str, tuple[str, str, dict[str, str]] | None]:
    """Data version, code version and inputs of every asset that has been made."""
    from synpipe.assets.graph import nodes
    from synpipe.assets.manifest import find_manifest

    made = {node.name: find_manifest(dataset, node.name) for node in nodes(dataset)}
    return {
        name: (manifest.data_version, manifest.code_version, manifest.inputs) if manifest else None
        for name, manifest in made.items()
    }


@click.command()
@dataset_option
@json_option
@click.pass_obj
def status(project: "Project", dataset: str, as_json: bool) -> None:
    """Show which assets are fresh, stale (and why) or missing, and whether readers see a former version of an index.

    \b
    Examples:
      synpipe status
      synpipe status -d mydata --json
    """
    from synpipe.assets.graph import states
    from synpipe.assets.index import find_rolled_back
    from synpipe.assets.manifest import find_manifest

    opened = project.dataset(dataset)
    if not project.store.exists():
        log(f"There is no store at {project.store} yet.")
    assets = [(state, find_manifest(opened, state.asset)) for state in states(opened)]
    rolled_back = {encoder: tag for encoder in opened.encoders if (tag := find_rolled_back(opened, encoder))}
    if as_json:
        described = {
            state.asset: {"state": state.state, "reasons": state.reasons, "made": manifest and asdict(manifest)}
            for state, manifest in assets
        }
        print_json({"dataset": dataset, "folder": str(opened.folder), "assets": described, "rolled_back": rolled_back})
        return
    click.echo(f"{dataset}: {opened.spec.title}\n{opened.folder}\n")
    rows = []
    for state, manifest in assets:
        count = manifest.rows if manifest else None
        version = manifest.data_version[:12] if manifest else None
        rows.append((state.asset, state.state, version, None if count is None else f"{count:,}"))
    click.echo(format_table(["asset", "state", "version", "rows"], rows))
    reasons = [f"{state.asset} is {state.state} because {reason}" for state, _ in assets for reason in state.reasons]
    if reasons:
        click.echo("\n" + "\n".join(reasons))
    for encoder, tag in rolled_back.items():
        click.echo(
            f"\nReaders of {encoder} see the version {tag}, not the one that was made last. To let them see that one, materialise "
            f"index_{encoder}: `synpipe materialize -d {dataset} -s index_{encoder}`."
        )


@click.command()
@dataset_option
@click.option(
    "--delete", is_flag=True, help="Remove everything that is listed. Without this option nothing is removed."
)
@json_option
@click.pass_obj
def gc(project: "Project", dataset: str, delete: bool, as_json: bool) -> None:
    """List files and index versions that are no longer needed.

    --delete removes them.
    The list includes the embeddings of encoders that the data set no longer names. If you go back to such an encoder, its tiles
    are embedded again. Index versions that have a tag are kept until you run `synpipe forget TAG`.
    """
    from synpipe.reports.housekeeping import find_leftovers, remove_leftovers
    from synpipe.store.locks import one_step_at_a_time

    opened = project.dataset(dataset)
    # Nothing refers yet to the files that a running step has just written, so a removal waits until no step is running.
    with one_step_at_a_time(project.store, log) if delete else nullcontext():
        unneeded = find_leftovers(opened)
        if delete:
            remove_leftovers(unneeded)
    if as_json:
        print_json([asdict(leftover) | {"path": str(leftover.path)} for leftover in unneeded])
    else:
        _show_leftovers(opened, unneeded, deleted=delete)


def _show_leftovers(dataset: "Dataset", unneeded: "Sequence[Leftover]", deleted: bool) -> None:
    from synpipe.assets.graph import states
    from synpipe.index.versions import former_encoders

    if unneeded:
        rows = [
            (f"{leftover.bytes / 1e6:,.1f}", leftover.reason, leftover.versions, short_path(leftover.path))
            for leftover in unneeded
        ]
        click.echo(format_table(["MB", "reason", "versions", "path"], rows))
        total = sum(leftover.bytes for leftover in unneeded) / 1e6
        hint = ", removed" if deleted else "; remove them with --delete"
        click.echo(f"\n{len(unneeded):,} entries, {total:,.1f} MB{hint}")
    else:
        click.echo("Nothing to remove.")
    if any(state.state != "fresh" for state in states(dataset)):
        click.echo(
            "Some assets are out of date. Materialise them first: files that only outdated assets need are then listed too."
        )
    for encoder, count in former_encoders(dataset).items():
        click.echo(
            f"{encoder} is no longer an encoder of {dataset.name} and has {count} published versions. To let `gc` remove a "
            f"version, run `synpipe forget TAG -d {dataset.name} -e {encoder}`."
        )
