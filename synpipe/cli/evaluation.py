"""Commands that show how good encoders and classifiers are."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from synpipe.cli.common import (
    check_picture,
    dataset_option,
    encoder_option,
    json_option,
    print_json,
    save_picture,
    short_path,
)
from synpipe.errors import SynpipeError
from synpipe.text import format_table

if TYPE_CHECKING:
    from synpipe.analysis.classifier_report import Unit
    from synpipe.analysis.compare import EncoderComparison
    from synpipe.datasets import Dataset, Project


@click.command()
@click.argument("a", required=False)
@click.argument("b", required=False)
@dataset_option
@json_option
@click.pass_obj
def compare(project: "Project", a: str | None, b: str | None, dataset: str, as_json: bool) -> None:
    """Compare encoders: all of a data set, or A with B.

    A and B are compared on the same queries. Figures have 95 % intervals. A difference is the value of B minus the value of A.

    \b
    Examples:
      synpipe compare
      synpipe compare em_d4 filter_bank -d vnc_stack1
    """
    opened = project.dataset(dataset)
    if a is None:
        _compare_all(opened, as_json)
    elif b is None:
        raise SynpipeError(
            f"Name two encoders to compare: {a} and one of {', '.join(opened.encoders)}. Name none to compare all."
        )
    else:
        _compare_two(opened, opened.encoder(a), opened.encoder(b), as_json)


def _compare_all(dataset: "Dataset", as_json: bool) -> None:
    from synpipe.reports.comparison import read_encoder_rows

    encoders = read_encoder_rows(dataset)
    if as_json:
        print_json(encoders)
    else:
        click.echo(f"{_figures_table(encoders)}\n\n{_costs_table(encoders)}")


def _figures_table(encoders: list[dict[str, Any]]) -> str:
    """A row per figure and encoder. The title of a figure is in the first of its rows only."""
    from synpipe.analysis.compare import format_figure
    from synpipe.analysis.evaluation import FIGURES
    from synpipe.analysis.metrics import Estimate

    rows = []
    for name, figure in FIGURES.items():
        if all(encoder[name] is None for encoder in encoders):
            continue
        for number, encoder in enumerate(encoders):
            estimate = Estimate(encoder[name], encoder[f"{name}_low"], encoder[f"{name}_high"])
            rows.append((None if number else figure.title, encoder["encoder"], format_figure(estimate)))
    return format_table(["figure", "encoder", "value [95 % interval]"], rows)


def _costs_table(encoders: list[dict[str, Any]]) -> str:
    rows = [
        (
            encoder["encoder"],
            encoder["dimensions"],
            f"{encoder['bytes_per_vector']:,.0f}",
            f"{encoder['index_recall']:.4f}",
            f"{encoder['query_ms']:.1f}",
        )
        for encoder in encoders
    ]
    table = format_table(["encoder", "dimensions", "bytes per vector", "index recall", "query ms"], rows)
    return (
        f"{table}\n\nbytes per vector: in the Parquet file; index recall: recall@10 against exact search; query ms: median time of "
        "a query"
    )


def _compare_two(dataset: "Dataset", a: str, b: str, as_json: bool) -> None:
    from synpipe.reports.comparison import comparison_picture, read_comparison

    comparison = read_comparison(dataset, a, b)
    image = comparison_picture(dataset, comparison, tile_px=128)
    path = dataset.folder / "evaluation" / f"{comparison.a}-{comparison.b}.png"
    if image is not None:
        save_picture(path, image)
    if as_json:
        print_json(asdict(comparison) | {"picture": None if image is None else str(path)})
        return
    click.echo(_comparison_table(comparison))
    if comparison.overlap is not None:
        click.echo(
            f"\nOn {comparison.queries:,} queries, the two encoders share {comparison.overlap:.0%} of the ten nearest neighbours "
            f"(Jaccard {comparison.jaccard:.2f}).\nThey differ most on these queries:\n"
        )
        click.echo(_queries_table(comparison))
    if image is not None:
        click.echo(f"\nPicture of their neighbours: {short_path(path)}")


def _comparison_table(comparison: "EncoderComparison") -> str:
    from synpipe.analysis.compare import format_figure

    rows = [
        (pair.title, format_figure(pair.a), format_figure(pair.b), format_figure(pair.difference, "+"))
        for pair in comparison.figures.values()
    ]
    return format_table(["figure", comparison.a, comparison.b, "difference"], rows)


def _queries_table(comparison: "EncoderComparison") -> str:
    from synpipe.analysis.compare import format_figure
    from synpipe.analysis.metrics import Estimate
    from synpipe.annotations.schema import UNLABELLED

    rows = [
        (
            str(query.synapse_id),
            query.label or UNLABELLED,
            format_figure(Estimate(query.average_precision_a)),
            format_figure(Estimate(query.average_precision_b)),
            f"{query.overlap:.0%}",
        )
        for query in comparison.differ_most
    ]
    return format_table(["synapse", "class", f"AP {comparison.a}", f"AP {comparison.b}", "shared"], rows) + (
        "\n\nAP: average precision; shared: neighbours that both encoders find"
    )


@click.command()
@dataset_option
@encoder_option
@click.option("--neurons", is_flag=True, help="Count the votes of neurons instead of single synapses.")
@click.option("--picture", type=click.Path(dir_okay=False, path_type=Path), help="Save both matrices as a PNG.")
@json_option
@click.pass_obj
def confusion(
    project: "Project", dataset: str, encoder: str | None, neurons: bool, picture: Path | None, as_json: bool
) -> None:
    """Show how good the classifier of an encoder is.

    The command prints the recall of each class and the confusion matrix, both on the test side of the split.

    \b
    Examples:
      synpipe confusion
      synpipe confusion -d mydata -e resnet18 --neurons --picture confusion.png
    """
    from synpipe.analysis.charts import draw_confusion
    from synpipe.analysis.classifier_report import confusion_table, recall_table

    if picture:
        check_picture(picture)
    opened = project.dataset(dataset)
    name = opened.encoder(encoder)
    figures, notes = _classifier_figures(opened, name)
    if picture:
        save_picture(picture, draw_confusion(figures, f"{dataset}, {name}, split by {figures['by']}"))
    if as_json:
        print_json({"dataset": dataset, "encoder": name, **figures, "notes": notes})
        return
    click.echo(f"{dataset}, {name}: test side of the split by {figures['by']}, 95 % intervals over neurons\n")
    unit: Unit = "neurons" if neurons else "synapses"
    for headers, rows in (recall_table(figures), confusion_table(figures, unit)):
        click.echo(f"{format_table(headers, rows)}\n")
    for note in notes:
        click.echo(note)


def _classifier_figures(dataset: "Dataset", encoder: str) -> tuple[dict[str, Any], list[str]]:
    """The figures of the encoder's classifier on the test side, and notes for people.

    Raises `SynpipeError` if there is no classifier, or if it was not measured.
    """
    from synpipe.assets.manifest import read_manifest

    manifest = read_manifest(dataset, f"classifier_{encoder}")
    if "confusion" not in manifest.figures:
        raise SynpipeError(f"The classifier of {dataset.name} and {encoder} has no figures. {' '.join(manifest.notes)}")
    return {"rows": manifest.rows, **manifest.figures}, manifest.notes
