"""The command `synpipe`: everything that a user does without the Dagster UI.

Errors that a user can mend are one paragraph on standard error and exit code 1; with `--json` the answer on standard
output is one JSON document, with ids as strings (JavaScript has no 64-bit integers).
"""

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from synpipe import __version__
from synpipe.errors import SynpipeError

# The rest is imported by the commands that need it, so that help appears at once.
if TYPE_CHECKING:
    from synpipe.datasets import Project
    from synpipe.store.objects import BulkPath


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
      synpipe explore                       the same and the map in the browser
      synpipe ui                            the graph of assets in the browser (Dagster)

    \b
    Your own volume: copy data/datasets/demo.yaml, then
      synpipe materialize --dataset NAME
    """
    from synpipe.datasets import Project

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
def materialize(project: "Project", dataset: str, select: tuple[str, ...], stale: bool) -> None:
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
        from synpipe.assets.graph import states

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
    help="Only synapses with this neurotransmitter, region, hemilineage, neuron_id, source, predicted_neurotransmitter or "
    "split. Repeat for more.",
)
@click.option(
    "--picture", type=click.Path(dir_okay=False, path_type=Path), help="Save the tiles of the answer as a PNG."
)
@json_option
@click.pass_obj
def search(project: "Project", synapse_id: int, dataset: str, encoder: str | None, **options: Any) -> None:
    """The synapses most similar to the synapse ID, for each class.

    \b
    Examples:
      synpipe search 4005871
      synpipe search 4005871 --metric l2 --per-class 8 --picture similar.png
      synpipe search 4005871 --where region=AL --json
    """
    from synpipe.assets.volume import find_viewer
    from synpipe.index.search import SynapseIndex, parse_where

    chosen = project.dataset(dataset)
    index = SynapseIndex(chosen, chosen.encoder(encoder), viewer=find_viewer(chosen))
    answer = index.search(synapse_id, options["metric"], options["per_class"], parse_where(options["where"]))
    if options["picture"]:
        from synpipe.reports.pictures import neighbours_picture

        _save(options["picture"], neighbours_picture(chosen, {synapse_id: answer}, tile_px=128))
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
@click.argument("synapse_id", type=int, metavar="ID")
@dataset_option
@click.pass_obj
def link(project: "Project", synapse_id: int, dataset: str) -> None:
    """A link that shows synapse ID, used or rejected, in Neuroglancer.

    For volumes that are reached over a network; the site is `neuroglancer:` in the data set's YAML file.

    \b
    Example:
      synpipe link 4005871 -d fafb_v14
    """
    from synpipe.reports.links import link_to

    click.echo(link_to(project.dataset(dataset), synapse_id))


@main.command()
@dataset_option
@json_option
@click.pass_obj
def status(project: "Project", dataset: str, as_json: bool) -> None:
    """For each asset of a data set: fresh, stale and why, or missing.

    \b
    Examples:
      synpipe status
      synpipe status -d mydata --json
    """
    from synpipe.assets.graph import states
    from synpipe.assets.manifest import find_manifest

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


@main.group("dataset")
def dataset_group() -> None:
    """Look at a data set before anything is made of it."""


@dataset_group.command()
@click.argument("which", metavar="FILE|NAME")
@click.option(
    "--picture",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Where to save the contact sheet.  [default: check.png in the data set's folder of the store]",
)
@click.pass_obj
def check(project: "Project", which: str, picture: Path | None) -> None:
    """Open a data set's volume, read all of its annotations and some tiles, and say what there is and what it will cost.

    FILE is a YAML file anywhere, NAME one in data/datasets/. Whatever is wrong is said in one go; the exit code is then 1.

    \b
    Examples:
      synpipe dataset check data/datasets/mydata.yaml
      synpipe dataset check mydata --picture tiles.png
    """
    from synpipe.reports import dataset_check

    is_file = which.endswith((".yaml", ".yml")) or os.sep in which
    chosen = project.dataset_at(Path(which)) if is_file else project.dataset(which)
    click.echo(f"{chosen.name}: {chosen.spec.title}")
    report = dataset_check.check(chosen)
    for heading, found in report.found.items():
        for number, line in enumerate(found):
            click.echo(f"  {'' if number else heading:<12} {line}")
    if report.picture is not None:
        picture = picture or chosen.folder / "check.png"
        _save(picture, report.picture)
        click.echo(f"  {'picture':<12} {_short(picture)}")
    for problem in report.problems:
        click.echo(f"Error: {problem}", err=True)
    sys.exit(1 if report.problems else 0)


@main.command()
@dataset_option
@encoder_option
@click.option("--name", "-n", required=True, help="Name of the new encoder.")
@click.option("--epochs", type=click.IntRange(1), help="At most so many.  [default: that of `classifier:`, or 30]")
@click.option(
    "--register", "add", is_flag=True, help="Add the new encoder to encoders.yaml instead of printing the entry."
)
@click.pass_obj
def finetune(project: "Project", dataset: str, encoder: str | None, name: str, epochs: int | None, add: bool) -> None:
    """Train the network of an encoder further to tell the classes apart, as a new encoder.

    It learns from the training side of the split alone. Interrupted, the same command carries on from the last checkpoint.
    Settings are those of `classifier: {method: finetune, …}` of the data set, where it has that.

    \b
    Examples:
      synpipe finetune -d mydata -e resnet18 -n resnet18_mydata --register
      tensorboard --logdir data/store/mydata/training
    """
    from synpipe.analysis.classifier import FinetuneSpec
    from synpipe.assets.classifier import finetune_encoder
    from synpipe.defs.run import materialize as run
    from synpipe.training.registration import as_yaml, check_new_name, register

    chosen, registry = project.dataset(dataset), project.data / "encoders.yaml"
    base = chosen.encoder(encoder)
    check_new_name(registry, name)
    spec = chosen.spec.classifier if isinstance(chosen.spec.classifier, FinetuneSpec) else FinetuneSpec()
    if epochs:
        spec = spec.model_copy(update={"epochs": epochs})
    run(project, dataset, ["+split"])
    entry = finetune_encoder(chosen, base, name, spec, lambda line: click.echo(line, err=True))
    click.echo(f"Weights: {_short(project.data / entry.weights)}")
    if add:
        register(registry, name, entry)
        click.echo(
            f"{name} is in {_short(registry)} now. Name it under `encoders:` in {dataset}.yaml, and materialise."
        )
    else:
        click.echo(f"To use it, add to {_short(registry)}:\n\n{as_yaml(name, entry)}")
        click.echo(f"and name it under `encoders:` in {dataset}.yaml.")


@main.command()
@dataset_option
@encoder_option
@click.option("--neurons", is_flag=True, help="The votes of neurons instead of single synapses.")
@click.option("--picture", type=click.Path(dir_okay=False, path_type=Path), help="Save both matrices as a PNG.")
@json_option
@click.pass_obj
def confusion(
    project: "Project", dataset: str, encoder: str | None, neurons: bool, picture: Path | None, as_json: bool
) -> None:
    """How good the classifier of an encoder is on the test side: recall per class, confusion matrix.

    \b
    Examples:
      synpipe confusion
      synpipe confusion -d mydata -e resnet18 --neurons --picture confusion.png
    """
    from synpipe.analysis.charts import draw_confusion
    from synpipe.analysis.classifier_report import confusion_table, recall_table
    from synpipe.assets.manifest import read_manifest
    from synpipe.text import format_table

    chosen = project.dataset(dataset)
    name = chosen.encoder(encoder)
    manifest = read_manifest(chosen, f"classifier_{name}")
    figures = manifest.counts
    if "confusion" not in figures:
        raise SynpipeError(f"The classifier of {dataset} and {name} has no figures. {' '.join(manifest.notes)}")
    if picture:
        _save(picture, draw_confusion(figures, f"{dataset}, {name}, split by {figures['by']}"))
    if as_json:
        _print_json({"dataset": dataset, "encoder": name, **figures, "notes": manifest.notes})
        return
    click.echo(f"{dataset}, {name}: test side of the split by {figures['by']}, intervals of 95 % over neurons\n")
    click.echo(format_table(*recall_table(figures)))
    click.echo(f"\n{format_table(*confusion_table(figures, 'neurons' if neurons else 'synapses'))}")
    for note in manifest.notes:
        click.echo(f"\n{note}")


@main.command()
@dataset_option
@encoder_option
@json_option
@click.pass_obj
def versions(project: "Project", dataset: str, encoder: str | None, as_json: bool) -> None:
    """The published versions of an index, the newest first.

    Readers see the one marked `current`; `synpipe rollback TAG` goes back to another.
    """
    from synpipe.reports.versions import index_name
    from synpipe.reports.versions import versions as list_versions

    chosen = project.dataset(dataset)
    found = list_versions(chosen, index_name(chosen, encoder))
    if as_json:
        _print_json([asdict(version) for version in found])
        return
    for version in found:
        mark = "current" if version.current else ""
        click.echo(f"{version.number:>6}  {version.tag}  {version.made_at}  {version.rows:>12,} rows  {mark}")


@main.command()
@dataset_option
@encoder_option
@click.option("--tiles", type=click.IntRange(1), help="So many, some several times.  [default: 1,024; on a GPU 65,536]")
@json_option
@click.pass_obj
def profile(project: "Project", dataset: str, encoder: str | None, tiles: int | None, as_json: bool) -> None:
    """Tell how fast an encoder embeds here, and where the time goes; nothing of it is kept.

    Beside the rate stands that of the network alone, on a batch that lies ready: what the device could do.
    """
    from synpipe.assets.rgb_tiles import open_tiles
    from synpipe.embeddings.encoders import open_on_all_devices
    from synpipe.embeddings.profiling import profile as measure
    from synpipe.embeddings.profiling import report

    found = project.dataset(dataset)
    name = found.encoder(encoder)
    spec = found.encoders[name]
    if spec.base is not None:
        raise SynpipeError(
            f"{name} embeds no tiles, it compresses the vectors of {spec.base}: `--encoder {spec.base}`."
        )
    reader = open_tiles(found)
    if not len(reader):
        raise SynpipeError(f"{dataset} has no tiles. Look at the rejects.")
    encoders = open_on_all_devices(spec, found.weights_base)
    count = tiles or (1024 if encoders[0].device.type == "cpu" else 65_536)
    told = measure(encoders, lambda rows: reader.read(rows % len(reader)), count, found.folder)
    if as_json:
        figures = asdict(told) | {"tiles_per_second": told.tiles_per_second, "utilisation": told.utilisation}
        _print_json(figures | {"encoder": name, "device": str(encoders[0].device), "devices": len(encoders)})
        return
    click.echo(f"{found.name}, {name}, {report(encoders, told)}")


@main.command()
@click.argument("a")
@click.argument("b", default="current")
@dataset_option
@encoder_option
@json_option
@click.pass_obj
def diff(project: "Project", a: str, b: str, dataset: str, encoder: str | None, as_json: bool) -> None:
    """What changed from version A of an index to version B (tags or numbers, see `versions`; B is `current` by default).

    \b
    Example:
      synpipe diff 7 14
    """
    from synpipe.reports.versions import diff as compare

    chosen = project.dataset(dataset)
    found = compare(chosen, chosen.encoder(encoder), a, b)
    if as_json:
        content = asdict(found)
        _print_json(content | {name: [str(one) for one in content[name]] for name in ("added", "removed", "changed")})
        return
    for name in ("added", "removed", "changed"):
        ids = getattr(found, name)
        examples = f"  {', '.join(map(str, ids[:5]))}{' …' if len(ids) > 5 else ''}" if ids else ""
        click.echo(f"{name:<8} {len(ids):>10,} rows{examples}")
    cosine = "not comparable" if found.mean_cosine is None else f"mean cosine {found.mean_cosine:.6f}"
    click.echo(f"matched  {found.matched:>10,} rows  {cosine}")
    if not found.same_encoder:
        click.echo("The two versions were made by different encoders: their vectors are not of one space.")


@main.command()
@click.argument("a", required=False)
@click.argument("b", required=False)
@dataset_option
@json_option
@click.pass_obj
def compare(project: "Project", a: str | None, b: str | None, dataset: str, as_json: bool) -> None:
    """Which encoder is better: all of a data set side by side, or encoder A against encoder B.

    Figures come with 95 % intervals. The difference of two encoders is that of B from A, on the same queries.

    \b
    Examples:
      synpipe compare
      synpipe compare em_d4 filter_bank -d vnc_stack1
    """
    from synpipe.analysis.compare import format_figure
    from synpipe.analysis.evaluation import FIGURES
    from synpipe.analysis.metrics import Estimate
    from synpipe.reports.comparison import comparison_picture, read_comparison, read_encoder_rows

    chosen = project.dataset(dataset)
    if a is None:
        rows = read_encoder_rows(chosen)
        if as_json:
            _print_json(rows)
            return
        shown = [name for name in FIGURES if any(row[name] is not None for row in rows)]
        for name in shown:
            click.echo(f"\n{FIGURES[name].title}")
            for row in rows:
                figure = Estimate(row[name], row[f"{name}_low"], row[f"{name}_high"])
                click.echo(f"  {row['encoder']:<24} {row['dimensions']:>5} dimensions  {format_figure(figure)}")
        click.echo(
            "\nindex: recall@10 against exact search, median time of a query; size of a vector in the Parquet file"
        )
        for row in rows:
            costs = f"{row['index_recall']:.4f} {row['query_ms']:>8.1f} ms {row['bytes_per_vector']:>8,.0f} bytes"
            click.echo(f"  {row['encoder']:<24} {costs}")
        return
    if b is None:
        raise SynpipeError(
            f"Name two encoders to compare, {a} and one of {', '.join(chosen.encoders)}; or none, for all."
        )
    found = read_comparison(chosen, chosen.encoder(a), chosen.encoder(b))
    picture = chosen.folder / "evaluation" / f"{found.a}-{found.b}.png"
    image = comparison_picture(chosen, found, tile_px=128)
    if image is not None:
        _save(picture, image)
    if as_json:
        _print_json(asdict(found) | {"picture": str(picture) if image is not None else None})
        return
    click.echo(f"{'':<34} {found.a[:24]:<24} {found.b[:24]:<24} difference")
    for pair in found.figures.values():
        cells = [
            format_figure(pair.a),
            format_figure(pair.b),
            format_figure(pair.difference, "+"),
        ]
        click.echo(f"{pair.title:<34} {cells[0]:<24} {cells[1]:<24} {cells[2]}")
    if found.overlap is not None:
        click.echo(
            f"\nOf the ten nearest neighbours {found.overlap:.0%} are the same (Jaccard {found.jaccard:.2f}), {found.queries:,} "
            "queries. They differ most on:"
        )
    for query in found.differ_most:
        precision = [format_figure(Estimate(each)) for each in (query.average_precision_a, query.average_precision_b)]
        click.echo(
            f"  {query.synapse_id:>20}  {query.label or UNLABELLED:<16} average precision {precision[0]} and {precision[1]}, "
            f"{query.overlap:.0%} in common"
        )
    if image is not None:
        click.echo(f"\n{_short(picture)}   their neighbours: look at it")


@main.command()
@click.argument("version")
@dataset_option
@encoder_option
@click.pass_obj
def rollback(project: "Project", version: str, dataset: str, encoder: str | None) -> None:
    """Let readers see VERSION of an index (a tag or a number) from now on.

    Nothing is removed: the same command goes forward again. Materialising the index publishes the newest version anew.
    """
    from synpipe.reports.versions import rollback as go_back

    chosen = project.dataset(dataset)
    now = go_back(chosen, chosen.encoder(encoder), version)
    click.echo(f"Readers see version {now.number} now: {now.tag}, {now.rows:,} rows, made {now.made_at}.")


@main.command()
@click.argument("tags", nargs=-1, required=True, metavar="TAG…")
@dataset_option
@encoder_option
@click.pass_obj
def forget(project: "Project", tags: tuple[str, ...], dataset: str, encoder: str | None) -> None:
    """Let go of published versions of an index: `synpipe gc --delete` then removes their rows.

    Not of the version that readers see, unless the data set no longer has that encoder.
    """
    from synpipe.defs.locks import one_step_at_a_time
    from synpipe.reports.versions import forget as let_go
    from synpipe.reports.versions import index_name

    chosen = project.dataset(dataset)
    name = index_name(chosen, encoder)
    with one_step_at_a_time(project.store, lambda line: click.echo(line, err=True)):
        for tag in tags:
            gone = let_go(chosen, name, tag)
            click.echo(f"Forgotten: version {gone.number} of {name}, {gone.rows:,} rows, made {gone.made_at}.")


@main.command()
@click.argument("synapse_id", type=int, metavar="ID")
@dataset_option
@encoder_option
@json_option
@click.pass_obj
def provenance(project: "Project", synapse_id: int, dataset: str, encoder: str | None, as_json: bool) -> None:
    """Where the row of synapse ID comes from: tile, volume, annotation file, weights, code, Dagster runs."""
    import yaml

    from synpipe.reports.versions import provenance as trace

    chosen = project.dataset(dataset)
    found = trace(chosen, chosen.encoder(encoder), synapse_id)
    if as_json:
        _print_json(found)
    else:
        click.echo(yaml.safe_dump(json.loads(json.dumps(found)), sort_keys=False, allow_unicode=True), nl=False)


@main.command()
@dataset_option
@click.option("--delete", is_flag=True, help="Remove what is listed. Without it, nothing is.")
@json_option
@click.pass_obj
def gc(project: "Project", dataset: str, delete: bool, as_json: bool) -> None:
    """List what nothing in a data set refers to any more, files and versions of indexes; remove it with --delete.

    Among it are vectors of encoders no longer used: going back to such an encoder embeds its tiles again. A version of an
    index that a tag names stays until `synpipe forget TAG`.
    """
    from contextlib import nullcontext

    from synpipe.assets.graph import states
    from synpipe.defs.locks import one_step_at_a_time
    from synpipe.reports.housekeeping import leftovers, remove
    from synpipe.reports.versions import former_encoders

    chosen = project.dataset(dataset)
    # A run at work would take up what it has just made and nothing refers to yet.
    alone = one_step_at_a_time(project.store, lambda line: click.echo(line, err=True)) if delete else nullcontext()
    with alone:
        found = leftovers(chosen)
        if delete:
            remove(found)
    if as_json:
        _print_json([asdict(one) | {"path": str(one.path)} for one in found])
        return
    for one in found:
        what = "" if one.versions is None else f", {one.versions:,} versions"
        click.echo(f"{one.bytes / 1e6:>10.1f} MB  {one.reason:<44} {_short(one.path)}{what}")
    total = sum(one.bytes for one in found) / 1e6
    click.echo(f"{len(found):,} entries, {total:.1f} MB{', removed' if delete else '; remove them with --delete'}")
    if any(state.state != "fresh" for state in states(chosen)):
        click.echo("Some assets are out of date: materialise them, and what only they still need is listed too.")
    for name, count in former_encoders(chosen).items():
        click.echo(
            f"{name} is no longer an encoder of {dataset} and has {count} published versions: `synpipe forget TAG -d {dataset} "
            f"-e {name}` lets go of one."
        )


@main.command("export-annotations")
@click.argument("folder", metavar="DIR", type=click.Path(file_okay=False, path_type=Path))
@dataset_option
@click.option("--url", metavar="ADDRESS", help="Where DIR will be served: print a Neuroglancer link that shows it.")
@click.pass_obj
def export_annotations(project: "Project", folder: Path, dataset: str, url: str | None) -> None:
    """Write the synapses as a Neuroglancer layer into DIR: coloured by transmitter, found by neuron.

    An earlier export in DIR is replaced once the new one is whole.

    \b
    Example:
      synpipe export-annotations synapses -d fafb_v14 --url http://127.0.0.1:9000
    """
    from synpipe.reports.annotation_layer import export

    rows, link = export(project.dataset(dataset), folder, url)
    click.echo(f"{rows:,} synapses in {_short(folder)}.")
    click.echo(
        f"Serve it from a bucket, or from any server that allows CORS and knows Range requests, for example\n"
        f"  npx http-server {_short(folder)} --cors --port 9000"
    )
    if link:
        click.echo(f"Then open\n  {link}")


@main.command("export-site")
@click.argument("folder", metavar="DIR", type=click.Path(file_okay=False, path_type=Path))
@dataset_option
@click.option(
    "--encoder", "-e", "encoders", multiple=True, help="Encoder of the data set. Repeat for more.  [default: its first]"
)
@click.pass_obj
def export_site(project: "Project", folder: Path, dataset: str, encoders: tuple[str, ...]) -> None:
    """Write the explorer into DIR as a site that any static host can publish: the search is done in the browser.

    An earlier export in DIR is replaced once the new one is whole.

    \b
    Examples:
      synpipe export-site site
      synpipe export-site site -d mydata -e em_d4 -e resnet18
    """
    from synpipe.explorer.site import export_site as export

    chosen = project.dataset(dataset)
    names = list(dict.fromkeys(map(chosen.encoder, encoders or [None])))
    report = export(chosen, names, folder, lambda line: click.echo(line, err=True))
    click.echo(f"{report.rows:,} synapses in {_short(folder)}, {report.bytes / 1e6:,.1f} MB with their tiles.")
    for name, recall in report.recall.items():
        rarest = f", of {recall['rarest_class']} {recall['rarest']:.1%}" if recall["rarest_class"] else ""
        click.echo(
            f"  {name}: {report.first_bytes[name] / 1e6:.1f} MB before the first answer; of the true nearest "
            f"{recall['per_class']} of each class it finds {recall['overall']:.1%}{rarest}"
        )
    click.echo("Publish the folder on any static host, or look at it here:")
    click.echo(f"  python -m http.server --bind 127.0.0.1 --directory {_short(folder)}")


@main.command()
@click.option("--dataset", "-d", "datasets", multiple=True, help="Learn from this data set's volume. Repeat for more.")
@click.option(
    "--recipe",
    type=click.Path(dir_okay=False, path_type=Path),
    help="YAML file with sources and settings, such as data/pretraining/em_d4.yaml. Instead of --dataset.",
)
@click.option("--steps", type=click.IntRange(1), help="Of 128 pairs of views each; 1,000 take 20 minutes on one core.")
@click.option("--seed", type=click.IntRange(0))
@click.option("--device", default="auto", show_default=True, help="cpu, cuda or auto.")
@click.option(
    "--out",
    "-o",
    required=True,
    type=click.Path(dir_okay=False, path_type=Path),
    help="File for the weights, .safetensors.",
)
@click.pass_obj
def pretrain(
    project: "Project", datasets: tuple[str, ...], recipe: Path | None, device: str, out: Path, **settings: int | None
) -> None:
    """Train a small encoder on unlabelled EM: it learns to recognise a place, turned, shifted or a section off.

    Run the same command again after an interruption, and it carries on. A quarter of each volume is kept aside to measure
    with; figures, recipe and a model card are written beside the weights.

    \b
    Examples:
      synpipe pretrain -d mydata -o data/weights/mine.safetensors
      synpipe pretrain -d demo -d mydata --steps 20000 --device cuda -o data/weights/mine.safetensors
      synpipe pretrain --recipe data/pretraining/em_d4.yaml -o em_d4.safetensors
    """
    from contextlib import ExitStack

    from synpipe.training.blocks import open_training_volume
    from synpipe.training.model_card import registry_entry
    from synpipe.training.recipe import read_recipe

    if out.suffix != ".safetensors":
        raise SynpipeError(f"--out {out} must end with .safetensors.")
    spec, base = read_recipe(recipe, datasets, settings)

    def tell(message: str) -> None:
        click.echo(message, err=True)

    with ExitStack() as stack:
        volumes = [open_training_volume(source, project, base, tell) for source in spec.sources]
        for each in volumes:
            stack.callback(each.volume.close)
        from synpipe.training.pretraining import TrainingStatus  # torch takes seconds to import
        from synpipe.training.pretraining import pretrain as learn

        def show(status: TrainingStatus) -> None:
            if status.step % 20 == 0 or status.step in (1, status.steps):
                tell(
                    f"step {status.step:,} of {status.steps:,}  loss {status.loss:.3f}  found {status.matched:.0%}  "
                    f"{status.seconds_left / 60:.0f} min left"
                )

        report = learn(spec, volumes, out, device, show)
    for name, found in report["held_out"].items():
        before = report["held_out_untrained"][name]["recall_at_1"]
        click.echo(f"{name}: held-out places found {found['recall_at_1']:.0%}, before training {before:.0%}")
    weights = os.path.relpath(out.resolve(), project.data)
    entry = registry_entry(out.stem, weights, report)
    click.echo(f"\n{_short(out)}, .json and .md are written. To use it, paste into encoders.yaml:\n\n{entry}")


@main.command()
@click.pass_obj
def demo(project: "Project") -> None:
    """Make the synthetic demo data set and all of its assets, and search in it.

    \b
    Examples:
      synpipe demo
      synpipe --store /data/synpipe demo
    """
    from synpipe.assets.manifest import read_manifest
    from synpipe.defs.run import materialize as run
    from synpipe.reports.pictures import example_queries, nearest_neighbours

    dataset, again = project.dataset("demo"), _command(project)
    run(project, "demo")
    encoder = dataset.encoder(None)
    queries = example_queries(dataset, encoder)
    picture = dataset.folder / "neighbours.png"
    _save(picture, nearest_neighbours(dataset, encoder, tile_px=128))

    counts = {asset: read_manifest(dataset, asset).counts for asset in ("synapses", "rgb_tiles", "rejects")}
    folder, rows = _short(dataset.folder), {name: count["rows"] for name, count in counts.items()}
    by_make = again == os.path.join(".venv", "bin", "synpipe")
    open_ui, open_explorer = ("make ui", "make explore") if by_make else (f"{again} ui", f"{again} explore")
    next_steps = {
        open_explorer: "similar synapses and the map in the browser: http://127.0.0.1:8000",
        open_ui: "the graph in the browser: Dagster on http://127.0.0.1:3000",
        f"{again} search {queries[0]}": "the most similar synapses of each class",
        f"{again} status": "what is made, and what is out of date",
        f"{again} --help": "everything else",
    }
    width = max(map(len, next_steps))
    click.echo(f"""
{dataset.spec.title}
  {rows["synapses"]:,} synapses, {rows["rgb_tiles"]:,} tiles, {rows["rejects"]:,} rejects with their reasons
  {folder}/synapses.parquet, rejects.parquet
  {folder}/tables/*.parquet     vectors for pandas, Polars, DuckDB: {", ".join(dataset.encoders)}
  {_short(dataset.lancedb_folder)}              the same as LanceDB tables with indexes
  {_short(picture)}   neighbours of one synapse of each class: look at it

Next:""")
    for command, what in next_steps.items():
        click.echo(f"  {command:<{width}}   {what}")


host_option = click.option(
    "--host", default="127.0.0.1", show_default=True, help="Address to listen on. There is no password."
)


@main.command()
@host_option
@click.option("--port", "-p", default=3000, show_default=True, type=click.IntRange(1, 65535))
@click.pass_obj
def ui(project: "Project", host: str, port: int) -> None:
    """Open the graph in the browser: Dagster with this project's data sets and history."""
    from synpipe.defs.run import serve_ui

    click.echo(f"The graph will be on http://{host}:{port}/asset-groups in half a minute. Ctrl-C ends it.")
    serve_ui(project, host, port)


@main.command()
@host_option
@click.option(
    "--port", "-p", default=8000, show_default=True, type=click.IntRange(0, 65535), help="0 takes a free one."
)
@click.pass_obj
def explore(project: "Project", host: str, port: int) -> None:
    """Open the explorer in the browser: similar synapses and the map, of all indexed data sets.

    \b
    Examples:
      synpipe explore
      synpipe explore --port 8080
    """
    from synpipe.explorer.app import serve

    serve(project, host, port)


def _save(path: Path, image: Any) -> None:
    from synpipe.store.files import atomic_path

    with atomic_path(path) as temporary:
        image.save(temporary, "PNG")


def _print_json(value: Any) -> None:
    click.echo(json.dumps(_ids_as_strings(value), indent=1))


def _ids_as_strings(value: Any) -> Any:
    if isinstance(value, dict):
        ids, lists_of_ids = ("synapse_id", "neuron_id"), ("nearest_a", "nearest_b")
        return {
            name: list(map(str, item))
            if name in lists_of_ids
            else str(item)
            if name in ids and item is not None
            else _ids_as_strings(item)
            for name, item in value.items()
        }
    return [_ids_as_strings(item) for item in value] if isinstance(value, list | tuple) else value


def _short(path: "BulkPath") -> str:
    """Relative to the working directory where that is shorter."""
    if not isinstance(path, Path):
        return str(path)
    relative = os.path.relpath(path)
    return relative if len(relative) < len(str(path)) else str(path)


def _command(project: "Project") -> str:
    """How this program was called, so that a printed command can be pasted."""
    program = _short(Path(sys.argv[0])) if os.sep in sys.argv[0] else "synpipe"
    return program if project.store == type(project).locate().store else f"{program} --store {_short(project.store)}"
