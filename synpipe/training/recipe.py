"""What an encoder is to learn from, and how long: recipes for `synpipe pretrain`.

In: a YAML file, or names of data sets. Out: a `PretrainSpec`. Imports neither torch nor a volume: a mistake in a recipe is
told at once.
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


class Source(Spec):
    """A volume to learn from: a data set of the project, a volume described here, or one that is made up on the spot.

    title: for people. share: of the places, relative to the other sources'. licence: what it asks of weights trained on it.
    """

    title: str = ""

    dataset: str | None = None
    volume: VolumeSpec | None = None
    synthetic: SyntheticSpec | None = None
    share: float = Field(1.0, gt=0)
    licence: str = "unknown"

    @model_validator(mode="after")
    def _one_of_three(self) -> Self:
        if sum(given is not None for given in (self.dataset, self.volume, self.synthetic)) != 1:
            raise ValueError("give one of `dataset`, `volume` and `synthetic`")
        return self

    @property
    def name(self) -> str:
        if self.synthetic is not None:
            return self.title or f"synthetic, seed {self.synthetic.seed}"
        return self.title or self.dataset or (Path(self.volume.path).name if self.volume else "")


class PretrainSpec(Spec):
    """sources: what to learn from. steps: of `places` pairs of views each. blocks: of all sources, drawn once; a block holds
    several places. width, depth: see `em_network.D4ResNet`; larger ones ask for a GPU."""

    sources: tuple[Source, ...] = Field(min_length=1)
    steps: int = Field(4000, ge=1)
    places: int = Field(128, ge=2)
    blocks: int = Field(7500, ge=16)
    seed: int = Field(0, ge=0)
    width: int = Field(1, ge=1, le=16)
    depth: int = Field(1, ge=1, le=16)
    learning_rate: float = Field(3e-3, gt=0)
    temperature: float = Field(0.1, gt=0)


def read_recipe(path: Path | None, datasets: Sequence[str], settings: Mapping[str, Any]) -> tuple[PretrainSpec, Path]:
    """The recipe in a YAML file, or one for these data sets, and the folder where relative paths in it start.

    settings: what replaces the recipe's own; None does not. Raises `SynpipeError` where both or neither are given.
    """
    if (path is None) == (not datasets):
        raise SynpipeError("Say what to learn from: either --dataset, once or more, or --recipe.")
    content = {"sources": [{"dataset": name} for name in datasets]} if path is None else expand(read_yaml(path))
    given = {name: value for name, value in settings.items() if value is not None}
    return PretrainSpec.parse({**content, **given}, str(path or "pretrain")), (path or Path("x")).resolve().parent
