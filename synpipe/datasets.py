"""Data sets: a YAML file each, in `data/datasets/`, and the folder of the store that holds what is made from it.

In: the data folder (`datasets/*.yaml`, `encoders.yaml`) and the store. Out: `Dataset` objects that know their spec, their
encoders and where each of their files is. This is the one place that knows the layout of the store.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import Field

from synpipe.annotations import AnnotationSpec
from synpipe.encoders import EncoderSpec, load_registry
from synpipe.errors import SynpipeError
from synpipe.specs import Spec, read_yaml
from synpipe.synthetic import SyntheticSpec
from synpipe.tiles import TileSpec
from synpipe.volumes import VolumeSpec

# The six transmitters of Eckstein et al. (Cell 2024), in their order.
NEUROTRANSMITTERS = ("acetylcholine", "gaba", "glutamate", "dopamine", "serotonin", "octopamine")

NAME = re.compile(r"[a-z][a-z0-9_]*")


class DatasetSpec(Spec):
    """One data set.

    title: a sentence for people. synthetic: makes the volume and the annotations on the spot (the demo). volume,
    annotations: where the data is; relative paths start at the folder of the YAML file, or of what `synthetic` makes.
    classes: values that the class column `neurotransmitter` may have. tiles: the recipe. encoders: names of entries of
    `encoders.yaml`, the first being the default; each is a branch of the graph.
    """

    title: str
    synthetic: SyntheticSpec | None = None
    volume: VolumeSpec
    annotations: tuple[AnnotationSpec, ...] = Field(min_length=1)
    classes: tuple[str, ...] = Field(NEUROTRANSMITTERS, min_length=1)
    tiles: TileSpec = TileSpec()
    encoders: tuple[str, ...] = Field(min_length=1)


@dataclass(frozen=True)
class Dataset:
    """A data set with its place in the store.

    folder: its folder in the store. base: where relative paths of its spec start. encoders: its encoders by name, in the
    order of the spec. weights_base: where relative paths of weights start.
    """

    name: str
    spec: DatasetSpec
    folder: Path
    base: Path
    encoders: Mapping[str, EncoderSpec]
    weights_base: Path

    @property
    def synapses_path(self) -> Path:
        return self.folder / "synapses.parquet"

    @property
    def synapse_rejects_path(self) -> Path:
        return self.folder / "synapse_rejects.parquet"

    @property
    def stacks_path(self) -> Path:
        return self.folder / "synapse_stacks.parquet"

    @property
    def tiles_path(self) -> Path:
        return self.folder / "rgb_tiles.parquet"

    @property
    def rejects_path(self) -> Path:
        return self.folder / "rejects.parquet"

    @property
    def cut_outs_folder(self) -> Path:
        return self.folder / "tiles"

    @property
    def embeddings_folder(self) -> Path:
        return self.folder / "embeddings"

    def table_path(self, encoder: str) -> Path:
        return self.folder / "tables" / f"{encoder}.parquet"

    @property
    def lancedb_folder(self) -> Path:
        return self.folder / "lancedb"

    def manifest_path(self, asset: str) -> Path:
        return self.folder / "manifests" / f"{asset}.json"

    def lineage_path(self, asset: str, data_version: str) -> Path:
        return self.folder / "lineage" / asset / f"{data_version}.json"

    def encoder(self, name: str | None) -> str:
        """The encoder of that name, or the default one. Raises `SynpipeError` where the data set has no such encoder."""
        if name is None:
            return self.spec.encoders[0]
        if name not in self.encoders:
            raise SynpipeError(
                f"The data set {self.name} has no encoder {name!r}; it has {', '.join(self.encoders)}. To add one, name it "
                f"under `encoders:` in {self.name}.yaml."
            )
        return name

    def volume_files(self) -> list[Path]:
        """The volume's file or folder, whether it is there or not; none where it is reached over a network."""
        path = self.spec.volume.resolve(self.base)
        return [] if path is None else [path]

    def source_files(self) -> list[Path]:
        """The volume and the annotation files that the spec names, whether they are there or not."""
        return self.volume_files() + [
            file for annotation in self.spec.annotations for file in annotation.resolve(self.base)
        ]

    def missing_sources(self) -> list[Path]:
        """Source files that are not there; none where the data set makes its own."""
        return [] if self.spec.synthetic else [file for file in self.source_files() if not file.exists()]


@dataclass(frozen=True)
class Project:
    """The data folder and the store."""

    data: Path
    store: Path

    @classmethod
    def locate(cls, store: str | os.PathLike[str] | None = None) -> "Project":
        """The project that the environment names.

        Data folder: SYNPIPE_DATA, else `./data` where that has `datasets`, else the one beside the package. Store: the
        argument, else SYNPIPE_STORE, else `store` in the data folder.
        """
        beside_package = Path(__file__).resolve().parent.parent / "data"
        here = Path("data").resolve()
        data = Path(
            os.environ.get("SYNPIPE_DATA") or (here if (here / "datasets").is_dir() else beside_package)
        ).resolve()
        chosen = store or os.environ.get("SYNPIPE_STORE") or data / "store"
        return cls(data, Path(chosen).resolve())

    @cached_property
    def registry(self) -> Mapping[str, EncoderSpec]:
        return load_registry(self.data / "encoders.yaml")

    def dataset_names(self) -> list[str]:
        return sorted(path.stem for path in (self.data / "datasets").glob("*.yaml"))

    def dataset(self, name: str) -> Dataset:
        """Raises `SynpipeError` where there is no such data set or its YAML file is wrong."""
        path = self.data / "datasets" / f"{name}.yaml"
        if not NAME.fullmatch(name):
            raise SynpipeError(
                f"{name!r} cannot be the name of a data set: use a-z, 0-9 and _, and begin with a letter."
            )
        if not path.exists():
            known = ", ".join(self.dataset_names()) or "none"
            raise SynpipeError(f"There is no data set {name!r} in {path.parent}; there is {known}.")
        spec = DatasetSpec.parse(expand(read_yaml(path)), str(path))
        unknown = [encoder for encoder in spec.encoders if encoder not in self.registry]
        if unknown:
            raise SynpipeError(
                f"{path}: encoders {', '.join(unknown)} are not in {self.data / 'encoders.yaml'}, which has "
                f"{', '.join(self.registry)}."
            )
        folder = self.store / name
        return Dataset(
            name=name,
            spec=spec,
            folder=folder,
            base=folder / "source" if spec.synthetic is not None else path.parent,
            encoders={encoder: self.registry[encoder] for encoder in spec.encoders},
            weights_base=self.data,
        )


def expand(value: Any) -> Any:
    """Replace `${VARIABLE:-default}` in every string of a YAML document by the environment's value, or the default."""
    if isinstance(value, Mapping):
        return {key: expand(item) for key, item in value.items()}
    if isinstance(value, list):
        return [expand(item) for item in value]
    if isinstance(value, str):
        return re.sub(r"\$\{(\w+):-([^}]*)\}", lambda match: os.environ.get(match[1]) or match[2], value)
    return value
