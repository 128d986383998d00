"""Commands that open a page in the browser: Dagster's UI and the explorer."""

from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from synpipe.datasets import Project

host_option = click.option(
    "--host",
    default="127.0.0.1",
    show_default=True,
    help="Address to listen on. There is no password, but web pages of other sites are refused.",
)


@click.command()
@host_option
@click.option("--port", "-p", default=3000, show_default=True, type=click.IntRange(1, 65535))
@click.pass_obj
def ui(project: "Project", host: str, port: int) -> None:
    """Open the asset graph in the browser: Dagster, with this project's data sets and run history."""
    from synpipe.defs.run import serve_ui

    click.echo(
        f"Dagster will be ready at http://{host}:{port}/asset-groups in about 30 seconds. Press Ctrl-C to stop it."
    )
    serve_ui(project, host, port)


@click.command()
@host_option
@click.option(
    "--port", "-p", default=8000, show_default=True, type=click.IntRange(0, 65535), help="0 picks a free port."
)
@click.pass_obj
def explore(project: "Project", host: str, port: int) -> None:
    """Open the explorer in the browser: similar synapses and the map, for all data sets that have an index.

    \b
    Examples:
      synpipe explore
      synpipe explore --port 8080
    """
    from synpipe.explorer.server import serve

    serve(project, host, port, click.echo)
