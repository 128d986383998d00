"""The top-level command `synpipe`, with all of its subcommands.

An error that the user can fix is printed as one line on standard error, and the exit code is then 1. With `--json`, standard
output holds one JSON document.
"""

import sys
from typing import Any

import click

from synpipe import __version__
from synpipe.cli import dataset, encoders, evaluation, export, make, search, serve, versions
from synpipe.cli.common import echo_error
from synpipe.errors import SynpipeError, one_line

# Commands that are of use before there is a store.
MAKE_A_STORE = ("demo", "materialize", "dataset", "ui", "pretrain")


class _ErrorPrintingGroup(click.Group):
    """Prints a `SynpipeError` without a traceback and exits with code 1."""

    def invoke(self, context: click.Context) -> Any:
        try:
            return super().invoke(context)
        except SynpipeError as error:
            echo_error(one_line(error))
            sys.exit(1)


@click.group(
    cls=_ErrorPrintingGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}
)
@click.version_option(__version__)
@click.option(
    "--store", envvar="SYNPIPE_STORE", help="Folder for everything that synpipe makes.  [default: data/store]"
)
@click.pass_context
def main(context: click.Context, store: str | None) -> None:
    """Turn an EM volume and a table of synapses into versioned embeddings, and search for similar synapses.

    \b
    Get started:
      synpipe demo                          make the demo data set and all of its assets
      synpipe search ID                     list the most similar synapses of each class
      synpipe explore                       browse similar synapses and the map
      synpipe ui                            view the asset graph in Dagster

    \b
    To use your own volume, copy and edit data/datasets/demo.yaml, then run:
      synpipe materialize --dataset NAME
    """
    from synpipe.datasets import Project

    context.obj = Project.locate(store)
    typed = context.get_parameter_source("store") == click.core.ParameterSource.COMMANDLINE
    if typed and context.invoked_subcommand not in MAKE_A_STORE and not context.obj.store.is_dir():
        raise SynpipeError(
            f"There is no store at {context.obj.store}. Correct --store, or make a store there with `synpipe --store {store} "
            "materialize`."
        )


for _command in (
    *(make.demo, make.materialize, make.status, make.gc),
    *(dataset.dataset, search.search, search.link),
    *(versions.versions, versions.diff, versions.rollback, versions.forget, versions.provenance),
    *(encoders.finetune, encoders.pretrain, encoders.profile, evaluation.compare, evaluation.confusion),
    *(export.export_annotations, export.export_site, serve.ui, serve.explore),
):
    main.add_command(_command)
