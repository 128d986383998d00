"""Commands that find synapses: similar ones, and the place of one in Neuroglancer."""

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
    synapse_id_argument,
)
from synpipe.text import format_table

if TYPE_CHECKING:
    from synpipe.datasets import Project
    from synpipe.index.search import Neighbour


@click.command()
@synapse_id_argument
@dataset_option
@encoder_option
@click.option(
    "--metric",
    "-m",
    type=click.Choice(["cosine", "l2", "dot", "l1"]),
    default="cosine",
    show_default=True,
    help="cosine compares directions only; the other metrics also take the lengths of the vectors into account.",
)
@click.option(
    "--per-class", "-k", type=click.IntRange(1, 1000), default=4, show_default=True, help="Synapses per class."
)
@click.option(
    "--where",
    "-w",
    multiple=True,
    metavar="COLUMN=VALUE",
    help="Search only synapses with this neurotransmitter, region, hemilineage, neuron_id, source, "
    "predicted_neurotransmitter or split. Can be repeated.",
)
@click.option(
    "--picture", type=click.Path(dir_okay=False, path_type=Path), help="Save the tiles of the result as a PNG."
)
@json_option
@click.pass_obj
def search(project: "Project", synapse_id: int, dataset: str, encoder: str | None, **options: Any) -> None:
    """List the synapses of each class that are most similar to the synapse ID.

    \b
    Examples:
      synpipe search 4005871
      synpipe search 4005871 --metric l2 --per-class 8 --picture similar.png
      synpipe search 4005871 --where region=AL --json
    """
    from synpipe.assets.index import draw_answer, open_index
    from synpipe.index.search import parse_where

    if options["picture"]:
        check_picture(options["picture"])
    opened, metric = project.dataset(dataset), options["metric"]
    index = open_index(opened, opened.encoder(encoder))
    where = parse_where(options["where"])
    index.refuse_unknown_values(where)
    neighbours = index.search(synapse_id, metric, options["per_class"], where)
    if options["picture"]:
        save_picture(options["picture"], draw_answer(opened, index, synapse_id, neighbours))
    if options["as_json"]:
        print_json(
            {
                "synapse_id": synapse_id,
                "dataset": dataset,
                "encoder": index.provenance["encoder"],
                "encoder_fingerprint": index.provenance["encoder_fingerprint"],
                "metric": metric,
                "neighbours": {name: list(map(asdict, of_class)) for name, of_class in neighbours.items()},
            }
        )
        return
    click.echo(f"Most similar to {synapse_id} by {metric}, encoder {index.provenance['encoder']}:")
    if not neighbours:
        click.echo("\nNone: no other synapse matches --where.")
    for name, of_class in neighbours.items():
        click.echo(f"\n{name}\n{_neighbours_table(of_class)}")


def _neighbours_table(neighbours: "list[Neighbour]") -> str:
    rows = [
        (
            str(neighbour.synapse_id),
            f"{neighbour.distance:.4f}",
            neighbour.neuron_id,
            *(f"{coordinate:.0f}" for coordinate in neighbour.position_nm),
        )
        for neighbour in neighbours
    ]
    return format_table(["synapse", "distance", "neuron", "x nm", "y nm", "z nm"], rows)


@click.command()
@synapse_id_argument
@dataset_option
@click.pass_obj
def link(project: "Project", synapse_id: int, dataset: str) -> None:
    """Print a link that shows the synapse ID in Neuroglancer, whether it was used or rejected.

    The volume must be reachable over a network. The key `neuroglancer:` in the data set's YAML file names the site.

    \b
    Example:
      synpipe link 4005871 -d fafb_v14
    """
    from synpipe.reports.links import link_to

    click.echo(link_to(project.dataset(dataset), synapse_id))
