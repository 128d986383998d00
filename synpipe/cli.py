"""The command `synpipe`: everything that a user does without the Dagster UI.

Errors that a user can mend are one paragraph on standard error and exit code 1; with `--json` the answer on standard
output is one JSON document, with ids as strings (JavaScript has no 64-bit integers).
"""

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from synpipe import __version__
from synpipe.datasets import Dataset, Project
from synpipe.errors import SynpipeError


class _Commands(click.Group):
    """Prints a `SynpipeError` as the one paragraph that it is."""

    def invoke(self, context: click.Context) -> Any:
        try:
            return super().invoke(context)
        except SynpipeError as error:
            click.echo(f"Error: {error}", err=True)
            sys.exit(1)


dataset_option = click.option(
    "--dataset", "-d", default="demo", show_default=True, help="Data set: a YAML file in data/datasets/, without .yaml."
)
encoder_option = click.option("--encoder", "-e", help="Encoder of the data set.  [default: its first]")
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__)
@click.option("--store", envvar="SYNPIPE_STORE", help="Folder for all that is made.  [default: data/store]")
@click.pass_context
def main(context: click.Context, store: str | None) -> None:
    """From an EM volume and a table of synapses to versioned embeddings and similarity search.

    \b
    Begin with:
      synpipe demo                          make the demo data set and everything from it
      synpipe search ID                     the most similar synapses of each class
      synpipe ui                            the same graph in the browser (Dagster)

    \b
    Your own volume: copy data/datasets/demo.yaml, then
      synpipe materialize --dataset NAME
    """
    context.obj = Project.locate(store)


@main.command()
@dataset_option
@click.option(
    "--select",
    "-s",
    multiple=True,
    metavar="ASSET",
    help="Only this asset; ASSET+ with all downstream of it, +ASSET with all upstream. Repeat for more.",
)
@click.option("--stale", is_flag=True, help="Only what is stale or missing, and what lies downstream of it.")
@click.pass_obj
def materialize(project: Project, dataset: str, select: tuple[str, ...], stale: bool) -> None:
    """Make the assets of a data set: synapses, tiles, embeddings, tables, indexes.

    What is made already is not made again: run it after every change, and after an interruption.

    \b
    Examples:
      synpipe materialize -d mydata
      synpipe materialize -d mydata --stale
      synpipe materialize -d mydata -s rgb_tiles+
      synpipe materialize -d mydata -s embeddings_resnet18+
    """
    # Dagster takes two seconds to import, which `search` and `status` need not wait for.
    from synpipe.defs.run import materialize as run

    if stale and select:
        raise SynpipeError("Use either --stale or --select: --stale chooses the assets itself.")
    if stale:
        from synpipe.graph import states

        select = tuple(state.asset for state in states(project.dataset(dataset)) if state.state != "fresh")
        if not select:
            click.echo("Every asset is up to date.")
            return
    run(project, dataset, select)


@main.command()
@click.argument("synapse_id", type=int, metavar="ID")
@dataset_option
@encoder_option
@click.option(
    "--metric",
    "-m",
    type=click.Choice(["cosine", "l2", "dot", "l1"]),
    default="cosine",
    show_default=True,
    help="cosine compares directions; the others compare the vectors with their lengths.",
)
@click.option(
    "--per-class", "-k", type=click.IntRange(1, 1000), default=4, show_default=True, help="Synapses per class."
)
@click.option(
    "--where",
    "-w",
    multiple=True,
    metavar="COLUMN=VALUE",
    help="Only synapses with this neurotransmitter, region, hemilineage, neuron_id or source. Repeat for more.",
)
@click.option(
    "--picture", type=click.Path(dir_okay=False, path_type=Path), help="Save the tiles of the answer as a PNG."
)
@json_option
@click.pass_obj
def search(project: Project, synapse_id: int, dataset: str, encoder: str | None, **options: Any) -> None:
    """The synapses most similar to the synapse ID, for each class.

    \b
    Examples:
      synpipe search 4005871
      synpipe search 4005871 --metric l2 --per-class 8 --picture similar.png
      synpipe search 4005871 --where region=AL --json
    """
    from synpipe.search import SynapseIndex, parse_where

    chosen = project.dataset(dataset)
    index = SynapseIndex(chosen, chosen.encoder(encoder))
    answer = index.search(synapse_id, options["metric"], options["per_class"], parse_where(options["where"]))
    if options["picture"]:
        _save(options["picture"], neighbours_picture(chosen, {synapse_id: answer}))
    if options["as_json"]:
        _print_json(
            {
                "synapse_id": synapse_id,
                "dataset": dataset,
                "encoder": index.provenance["encoder"],
                "encoder_fingerprint": index.provenance["encoder_fingerprint"],
                "metric": options["metric"],
                "neighbours": {name: [asdict(neighbour) for neighbour in found] for name, found in answer.items()},
            }
        )
        return
    click.echo(f"Most similar to {synapse_id} by {options['metric']}, encoder {index.provenance['encoder']}:")
    if not answer:
        click.echo("\nNone: no other synapse fits --where.")
    for name, found in answer.items():
        click.echo(
            f"\n{name}\n  {'synapse':>20}  {'distance':>10}  {'neuron':>20}  {'x nm':>10}  {'y nm':>10}  {'z nm':>10}"
        )
        for one in found:
            place = "  ".join(f"{value:>10.0f}" for value in one.position_nm)
            neuron = "" if one.neuron_id is None else one.neuron_id
            click.echo(f"  {one.synapse_id:>20}  {one.distance:>10.4f}  {neuron:>20}  {place}")


@main.command()
@dataset_option
@json_option
@click.pass_obj
def status(project: Project, dataset: str, as_json: bool) -> None:
    """For each asset of a data set: fresh, stale and why, or missing.

    \b
    Examples:
      synpipe status
      synpipe status -d mydata --json
    """
    from synpipe.graph import states
    from synpipe.manifests import find_manifest

    chosen = project.dataset(dataset)
    found = {state.asset: (state, find_manifest(chosen, state.asset)) for state in states(chosen)}
    if as_json:
        assets = {
            asset: {"state": state.state, "reasons": state.reasons, "made": manifest and asdict(manifest)}
            for asset, (state, manifest) in found.items()
        }
        _print_json({"dataset": dataset, "folder": str(chosen.folder), "assets": assets})
        return
    click.echo(f"{dataset}: {chosen.spec.title}\n{chosen.folder}\n")
    for asset, (state, manifest) in found.items():
        rows = manifest.counts.get("rows") if manifest else None
        what = f"version {manifest.data_version[:12]}" if manifest else ""
        click.echo(f"  {asset:<40} {state.state:<8} {what:<21} {'' if rows is None else f'{rows:,} rows'}")
        for reason in state.reasons:
            click.echo(f"  {'':<40}   because {reason}")


@main.command()
@click.pass_obj
def demo(project: Project) -> None:
    """Make the synthetic demo data set and all of its assets, and search in it."""
    import pyarrow.compute as pc

    from synpipe.defs.run import materialize as run
    from synpipe.manifests import read_manifest
    from synpipe.search import SynapseIndex
    from synpipe.shards import read_table

    dataset, again = project.dataset("demo"), _command(project)
    run(project, "demo")
    encoder = dataset.encoder(None)
    index = SynapseIndex(dataset, encoder)
    table = read_table(
        dataset.table_path(encoder), ["synapse_id", "neurotransmitter", "pad_fraction", "missing_sections"]
    )
    whole = table.filter(pc.and_(pc.equal(table["pad_fraction"], 0), pc.equal(table["missing_sections"], 0)))
    queries = {}
    for name in dataset.spec.classes:
        of_class = whole.filter(pc.equal(whole["neurotransmitter"], name))["synapse_id"]
        if len(of_class):
            queries[of_class[0].as_py()] = name
    answers = {query: index.search(query) for query in queries}
    picture = dataset.folder / "neighbours.png"
    _save(picture, neighbours_picture(dataset, answers))

    counts = {asset: read_manifest(dataset, asset).counts for asset in ("synapses", "rgb_tiles", "rejects")}
    folder, rows = _short(dataset.folder), {name: count["rows"] for name, count in counts.items()}
    click.echo(f"""
{dataset.spec.title}
  {rows["synapses"]:,} synapses, {rows["rgb_tiles"]:,} tiles, {rows["rejects"]:,} rejects with their reasons
  {folder}/synapses.parquet, rejects.parquet
  {folder}/tables/*.parquet     vectors for pandas, Polars, DuckDB: {", ".join(dataset.encoders)}
  {folder}/lancedb              the same as LanceDB tables with indexes
  {_short(picture)}   neighbours of one synapse of each class: look at it

Next:
  {again} ui                the graph in the browser: Dagster on http://127.0.0.1:3000
  {again} search {next(iter(queries))}    the most similar synapses of each class
  {again} status            what is made, and what is out of date
  {again} --help            everything else
""")


@main.command()
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on. There is no password.")
@click.option("--port", "-p", default=3000, show_default=True, type=click.IntRange(1, 65535))
@click.pass_obj
def ui(project: Project, host: str, port: int) -> None:
    """Open the graph in the browser: Dagster with this project's data sets and history."""
    from synpipe.defs.run import serve_ui

    click.echo(f"Dagster on http://{host}:{port} — open “Assets”, then “Materialize all”. Ctrl-C ends it.")
    serve_ui(project, host, port)


def neighbours_picture(dataset: Dataset, answers: dict[int, dict]) -> Any:
    """A row per query: its tile, then the most similar synapses of each class, the nearest first: a PIL image."""
    from synpipe.pictures import sheet
    from synpipe.shards import read_table
    from synpipe.tiles import TileReader

    reader = TileReader(read_table(dataset.tiles_path), dataset.folder, dataset.spec.tiles.stacking)
    labels = read_table(dataset.synapses_path, ["synapse_id", "neurotransmitter"])
    label_of = dict(zip(labels["synapse_id"].to_pylist(), labels["neurotransmitter"].to_pylist(), strict=True))
    rows, heads = [], []
    for query, answer in answers.items():
        row = [(reader.by_id(query), f"query {query}")]
        for name, found in answer.items():
            row += [(reader.by_id(one.synapse_id), f"{name[:8]} {one.distance:.3f}") for one in found[:2]]
        rows.append(row)
        heads.append(label_of[query] or "unlabelled")
    return sheet(rows, tile_px=112, head_px=110, heads=heads)


def _save(path: Path, image: Any) -> None:
    from synpipe.shards import atomic_path

    with atomic_path(path) as temporary:
        image.save(temporary, "PNG")


def _print_json(value: Any) -> None:
    click.echo(json.dumps(_ids_as_strings(value), indent=1))


def _ids_as_strings(value: Any) -> Any:
    if isinstance(value, dict):
        ids = ("synapse_id", "neuron_id")
        return {
            name: str(item) if name in ids and item is not None else _ids_as_strings(item)
            for name, item in value.items()
        }
    return [_ids_as_strings(item) for item in value] if isinstance(value, list | tuple) else value


def _short(path: Path) -> str:
    """Relative to the working directory where that is shorter."""
    relative = os.path.relpath(path)
    return relative if len(relative) < len(str(path)) else str(path)


def _command(project: Project) -> str:
    """How this program was called, so that a printed command can be pasted."""
    program = _short(Path(sys.argv[0])) if os.sep in sys.argv[0] else "synpipe"
    return program if project.store == Project.locate().store else f"{program} --store {_short(project.store)}"
