"""Reads recipes for `synpipe pretrain`: what an encoder learns from, and for how long.

Input: a YAML file, or the names of data sets. Output: a `PretrainSpec`. This module imports no torch and opens no volume, so
mistakes in a recipe are reported at once.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from pydantic import Field, model_validator

from synpipe.datasets import expand
from synpipe.errors import SynpipeError
from synpipe.specs import Spec, read_yaml
from synpipe.synthetic.demo import SyntheticSpec
from synpipe.volumes.volume import VolumeSpec


class TrainingSource(Spec):
    """A volume to learn from: one of a data set of the project, one that is described here, or a synthetic one.

    title: the name in reports. share: of the places, relative to the other sources. licence: the conditions for weights that
    are trained on it.
    """

    title: str = ""

    dataset: str | None = None
    volume: VolumeSpec | None = None
    synthetic: SyntheticSpec | None = None
    share: float = Field(1.0, gt=0)
    licence: str = "unknown"

    @model_validator(mode="after")
    def _one_of_three(self) -> Self:
        if sum(origin is not None for origin in (self.dataset, self.volume, self.synthetic)) != 1:
            raise ValueError("give exactly one of `dataset`, `volume` and `synthetic`")
        return self

    @property
    def name(self) -> str:
        if self.synthetic is not None:
            return self.title or f"synthetic, seed {self.synthetic.seed}"
        return self.title or self.dataset or (Path(self.volume.path).name if self.volume else "")


class PretrainSpec(Spec):
    """A recipe.

    steps: training steps, of `places` pairs of views each. blocks: drawn once, from all sources together; a block contains
    several places. width, depth: see `em_network.D4ResNet`; larger values need a GPU.
    """

    sources: tuple[TrainingSource, ...] = Field(min_length=1)
    steps: int = Field(4000, ge=1)
    places: int = Field(128, ge=2)
    blocks: int = Field(7500, ge=16)
    seed: int = Field(0, ge=0)
    width: int = Field(1, ge=1, le=16)
    depth: int = Field(1, ge=1, le=16)
    learning_rate: float = Field(3e-3, gt=0)
    temperature: float = Field(0.1, gt=0)


def read_recipe(path: Path | None, datasets: Sequence[str], settings: Mapping[str, Any]) -> tuple[PretrainSpec, Path]:
    """Read the recipe in a YAML file, or make one for these data sets. Also returns the folder where its relative paths start.

    settings: values that replace those of the recipe, unless they are None. Raises `SynpipeError` if both or neither of `path`
    and `datasets` are given, or the recipe is invalid.
    """
    if (path is None) == (not datasets):
        raise SynpipeError("Say what to learn from: give either --dataset, once or more, or --recipe.")
    content = {"sources": [{"dataset": name} for name in datasets]} if path is None else expand(read_yaml(path))
    replaced = {name: value for name, value in settings.items() if value is not None}
    base = Path.cwd() if path is None else path.resolve().parent
    return PretrainSpec.parse({**content, **replaced}, str(path or "pretrain")), base
