"""Commands that write files for other programs: a Neuroglancer layer and a static site."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from synpipe.cli.common import dataset_option, log, short_path
from synpipe.text import format_table

if TYPE_CHECKING:
    from synpipe.datasets import Project
    from synpipe.explorer.site import SiteReport

folder_argument = click.argument("folder", metavar="DIR", type=click.Path(file_okay=False, path_type=Path))


@click.command("export-annotations")
@folder_argument
@dataset_option
@click.option(
    "--url", metavar="ADDRESS", help="Address at which DIR will be served. Prints a Neuroglancer link to the layer."
)
@click.pass_obj
def export_annotations(project: "Project", folder: Path, dataset: str, url: str | None) -> None:
    """Write the synapses as a Neuroglancer layer into DIR.

    The layer is coloured by neurotransmitter and can be searched by neuron.
    An earlier export in DIR is replaced when the new one is complete.

    \b
    Example:
      synpipe export-annotations synapses -d fafb_v14 --url http://127.0.0.1:9000
    """
    from synpipe.reports.annotation_layer import export

    rows, link = export(project.dataset(dataset), folder, url)
    click.echo(f"Wrote {rows:,} synapses to {short_path(folder)}.")
    click.echo(
        f"Serve the folder from a bucket, or from any server that allows CORS and supports Range requests, for example:\n"
        f"  npx http-server {short_path(folder)} --cors --port 9000"
    )
    if link:
        click.echo(f"Then open:\n  {link}")


@click.command("export-site")
@folder_argument
@dataset_option
@click.option(
    "--encoder",
    "-e",
    "encoders",
    multiple=True,
    help="Encoder of the data set. Can be repeated.  [default: the first that the data set names]",
)
@click.pass_obj
def export_site(project: "Project", folder: Path, dataset: str, encoders: tuple[str, ...]) -> None:
    """Write the explorer as a static site into DIR.

    Any static host can serve the site, because the browser runs the search.
    An earlier export in DIR is replaced when the new one is complete.

    \b
    Examples:
      synpipe export-site site
      synpipe export-site site -d mydata -e em_d4 -e resnet18
    """
    from synpipe.explorer.site import export_site as write_site

    opened = project.dataset(dataset)
    names = list(dict.fromkeys(map(opened.encoder, encoders or [None])))
    report = write_site(opened, names, folder, log)
    click.echo(
        f"Wrote {report.rows:,} synapses in {short_path(folder)}: {report.bytes / 1e6:,.1f} MB including tiles.\n"
    )
    click.echo(_recall_table(report))
    click.echo("\nPublish the folder on any static host, or view it on this machine:")
    click.echo(f"  python -m http.server --bind 127.0.0.1 --directory {short_path(folder)}")


def _recall_table(report: "SiteReport") -> str:
    """For each encoder the download before the first answer, and the share of true neighbours that the browser finds."""
    rows = []
    for encoder, recall in report.recall.items():
        rarest = f"{recall['rarest']:.1%} ({recall['rarest_class']})" if recall["rarest_class"] else None
        rows.append((encoder, f"{report.first_bytes[encoder] / 1e6:.1f}", f"{recall['overall']:.1%}", rarest))
    per_class = next(iter(report.recall.values()))["per_class"]
    return format_table(
        ["encoder", "MB before the first answer", f"recall of the nearest {per_class}", "of the rarest class"], rows
    )
