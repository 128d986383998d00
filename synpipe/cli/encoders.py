"""Commands that train encoders and measure their speed."""

import os
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from synpipe.cli.common import dataset_option, encoder_option, json_option, log, print_json, short_path
from synpipe.errors import SynpipeError

if TYPE_CHECKING:
    from synpipe.datasets import Project
    from synpipe.training.pretraining import TrainingStatus

STEPS_PER_MESSAGE = 20
CPU_TILES, GPU_TILES = 1024, 65_536


@click.command()
@dataset_option
@encoder_option
@click.option("--name", "-n", required=True, help="Name of the new encoder.")
@click.option(
    "--epochs", type=click.IntRange(1), help="Maximum number of epochs.  [default: from `classifier:`, otherwise 30]"
)
@click.option(
    "--register", "add", is_flag=True, help="Add the new encoder to encoders.yaml instead of printing its entry."
)
@click.pass_obj
def finetune(project: "Project", dataset: str, encoder: str | None, name: str, epochs: int | None, add: bool) -> None:
    """Fine-tune an encoder to distinguish the classes.

    The result is a new encoder. Only the training side of the split is used. After an interruption, the same command
    resumes from the last checkpoint. If the data set's YAML file contains `classifier: {method: finetune, …}`, those
    settings apply.

    \b
    Examples:
      synpipe finetune -d mydata -e resnet18 -n resnet18_mydata --register
      tensorboard --logdir data/store/mydata/training
    """
    from synpipe.analysis.classifier import FinetuneSpec
    from synpipe.assets.classifier import finetune_encoder
    from synpipe.defs.run import materialize as run_assets
    from synpipe.training.registration import as_yaml, check_new_name, register

    opened, registry = project.dataset(dataset), project.data / "encoders.yaml"
    base = opened.encoder(encoder)
    check_new_name(registry, name)
    spec = opened.spec.classifier if isinstance(opened.spec.classifier, FinetuneSpec) else FinetuneSpec()
    if epochs:
        spec = spec.model_copy(update={"epochs": epochs})
    run_assets(project, dataset, ["+split"])
    entry = finetune_encoder(opened, base, name, spec, log)
    click.echo(f"Weights: {short_path(project.data / entry.weights)}")
    if add:
        register(registry, name, entry)
        click.echo(
            f"{name} is in {short_path(registry)} now. Name it under `encoders:` in {dataset}.yaml, then run "
            "`synpipe materialize`."
        )
    else:
        click.echo(f"To use it, add this entry to {short_path(registry)}:\n\n{as_yaml(name, entry)}")
        click.echo(f"Then name it under `encoders:` in {dataset}.yaml.")


@click.command()
@click.option(
    "--dataset", "-d", "datasets", multiple=True, help="Learn from the volume of this data set. Can be repeated."
)
@click.option(
    "--recipe",
    type=click.Path(dir_okay=False, path_type=Path),
    help="YAML file with sources and settings, such as data/pretraining/em_d4.yaml. Replaces --dataset.",
)
@click.option(
    "--steps",
    type=click.IntRange(1),
    help="Number of training steps, each on 128 pairs of views. 1,000 steps take 20 minutes on one core.",
)
@click.option("--seed", type=click.IntRange(0), help="Seed of the random numbers.")
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
    """Train a small encoder on unlabelled EM.

    The encoder learns to recognise a place that is rotated, shifted or one section away. After an interruption, the
    same command resumes the training. A quarter of each volume is held out for measuring. The figures, the recipe and a
    model card are written beside the weights.

    \b
    Examples:
      synpipe pretrain -d mydata -o data/weights/mine.safetensors
      synpipe pretrain -d demo -d mydata --steps 20000 --device cuda -o data/weights/mine.safetensors
      synpipe pretrain --recipe data/pretraining/em_d4.yaml -o em_d4.safetensors
    """
    from synpipe.training.blocks import open_training_volume
    from synpipe.training.model_card import registry_entry
    from synpipe.training.recipe import read_recipe

    if out.suffix != ".safetensors":
        raise SynpipeError(f"--out {out} must end with .safetensors.")
    spec, base = read_recipe(recipe, datasets, settings)
    with ExitStack() as stack:
        volumes = [open_training_volume(source, project, base, log) for source in spec.sources]
        for each in volumes:
            stack.callback(each.volume.close)
        # torch takes seconds to import, and a mistake in the recipe is reported before.
        from synpipe.training.pretraining import pretrain as train

        report = train(spec, volumes, out, device, _log_training)
    for name, trained in report["held_out"].items():
        untrained = report["held_out_untrained"][name]["recall_at_1"]
        click.echo(
            f"{name}: recognised {trained['recall_at_1']:.0%} of held-out places ({untrained:.0%} before training)"
        )
    entry = registry_entry(out.stem, os.path.relpath(out.resolve(), project.data), report)
    click.echo(
        f"\nWrote {short_path(out)}, with .json and .md files beside it. To use it, add this entry to encoders.yaml:\n\n{entry}"
    )


def _log_training(status: "TrainingStatus") -> None:
    if status.step % STEPS_PER_MESSAGE == 0 or status.step in (1, status.steps):
        log(
            f"step {status.step:,} of {status.steps:,}: loss {status.loss:.3f}, {status.matched:.0%} of views matched, "
            f"{status.seconds_left / 60:.0f} min left"
        )


@click.command()
@dataset_option
@encoder_option
@click.option(
    "--tiles",
    type=click.IntRange(1),
    help="Number of tiles. Tiles are repeated if the data set has fewer."
    f"  [default: {CPU_TILES:,}; on a GPU {GPU_TILES:,}]",
)
@json_option
@click.pass_obj
def profile(project: "Project", dataset: str, encoder: str | None, tiles: int | None, as_json: bool) -> None:
    """Measure how fast an encoder embeds on this machine.

    The command shows where the time goes, and discards the vectors. For comparison, it also measures the network alone
    on a batch in memory, which is the most that the device can do.
    """
    from synpipe.assets.rgb_tiles import open_tiles
    from synpipe.embeddings.encoders import open_on_all_devices
    from synpipe.embeddings.profiling import profile as measure
    from synpipe.embeddings.profiling import report

    opened = project.dataset(dataset)
    name = opened.encoder(encoder)
    spec = opened.encoders[name]
    if spec.base is not None:
        raise SynpipeError(
            f"{name} does not embed tiles; it compresses the vectors of {spec.base}. Use `--encoder {spec.base}`."
        )
    reader = open_tiles(opened)
    if not len(reader):
        raise SynpipeError(
            f"{dataset} has no tiles. The reasons are in its rejects: {short_path(opened.rejects_path)}."
        )
    encoders = open_on_all_devices(spec, opened.weights_base)
    count = tiles or (CPU_TILES if encoders[0].device.type == "cpu" else GPU_TILES)
    measured = measure(encoders, lambda rows: reader.read(rows % len(reader)), count, opened.folder)
    if as_json:
        figures = asdict(measured) | {
            "tiles_per_second": measured.tiles_per_second,
            "utilisation": measured.utilisation,
        }
        print_json(figures | {"encoder": name, "device": str(encoders[0].device), "devices": len(encoders)})
        return
    click.echo(f"{opened.name}, {name}, {report(encoders, measured)}")
