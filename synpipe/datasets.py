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
from urllib.parse import urlsplit

from pydantic import Field, field_validator

from synpipe.analysis.classifier import ClassifierSpec, LinearSpec
from synpipe.analysis.evaluation import EvaluationSpec
from synpipe.analysis.projection import ProjectionSpec
from synpipe.analysis.splits import SplitSpec
from synpipe.annotations.formats import AnnotationSpec
from synpipe.embeddings.encoder_specs import AnyEncoderSpec
from synpipe.embeddings.registry import branch_name, chosen_encoders, load_registry
from synpipe.errors import SynpipeError
from synpipe.specs import Spec, read_yaml
from synpipe.store.files import read_json, write_json
from synpipe.store.objects import BulkPath, ObjectPath, locate
from synpipe.synthetic.demo import SyntheticSpec
from synpipe.tiles.tile import TileSpec
from synpipe.volumes.volume import VolumeSpec

# The six transmitters of Eckstein et al. (Cell 2024), in their order.
NEUROTRANSMITTERS = ("acetylcholine", "gaba", "glutamate", "dopamine", "serotonin", "octopamine")

BULK_RECORD = "bulk.json"
NAME = re.compile(r"[a-z][a-z0-9_]*")


class DatasetSpec(Spec):
    """One data set.

    title: a sentence for people. synthetic: makes the volume and the annotations on the spot (the demo). volume,
    annotations: where the data is; relative paths start at the folder of the YAML file, or of what `synthetic` makes.
    classes: values that the class column `neurotransmitter` may have. tiles: the recipe. split: what is learnt from and
    what it is held against. evaluation: how much is measured; null: nothing. classifier: how classes are predicted; null: not
    at all. encoders: names of entries of `encoders.yaml`, or `<name>+pca32` and `<name>+ae32` (see `compression`), the
    first being the default; each is a branch of the graph. projection: how the maps are drawn; null draws none.
    max_reject_share: the share of the synapses that may be rejected, for whatever reason, before the check of `rejects`
    fails. neuroglancer: the site that links lead to.
    """

    title: str
    synthetic: SyntheticSpec | None = None
    volume: VolumeSpec
    annotations: tuple[AnnotationSpec, ...] = Field(min_length=1)
    classes: tuple[str, ...] = Field(NEUROTRANSMITTERS, min_length=1)
    tiles: TileSpec = TileSpec()
    split: SplitSpec = SplitSpec()
    classifier: ClassifierSpec | None = LinearSpec()
    evaluation: EvaluationSpec | None = EvaluationSpec()
    encoders: tuple[str, ...] = Field(min_length=1)
    projection: ProjectionSpec | None = ProjectionSpec()
    max_reject_share: float = Field(0.05, ge=0, le=1)
    neuroglancer: str = "https://neuroglancer-demo.appspot.com"

    @field_validator("neuroglancer")
    @classmethod
    def _is_a_site(cls, site: str) -> str:
        parts = urlsplit(site)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.fragment or re.search(r"\s", site):
            raise ValueError(f"{site} should be the address of a Neuroglancer site: https://… without #")
        return site.rstrip("/")


@dataclass(frozen=True)
class Dataset:
    """A data set with its place in the store.

    folder: its folder in the store. base: where relative paths of its spec start. encoders: its encoders by the
    name of their branch, in the order of the spec. weights_base: where relative paths of weights start. bulk: where tiles,
    vectors and indexes lie if not in `folder`.
    """

    name: str
    spec: DatasetSpec
    folder: Path
    base: Path
    encoders: Mapping[str, AnyEncoderSpec]
    weights_base: Path
    bulk: BulkPath | None = None

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
    def split_path(self) -> Path:
        return self.folder / "split.parquet"

    def scores_path(self, encoder: str) -> Path:
        """Figures of an encoder."""
        return self.folder / "evaluation" / f"{encoder}.json"

    def queries_path(self, encoder: str) -> Path:
        """What each query of its evaluation found."""
        return self.folder / "evaluation" / f"{encoder}.parquet"

    @property
    def evaluation_path(self) -> Path:
        """The figures of all encoders, a row each."""
        return self.folder / "evaluation.parquet"

    @property
    def bulk_folder(self) -> BulkPath:
        """Where tiles, vectors and indexes lie: on a cluster, what all of its workers can reach."""
        return self.folder if self.bulk is None else self.bulk

    @property
    def cut_outs_folder(self) -> BulkPath:
        return self.bulk_folder / "tiles"

    @property
    def embeddings_folder(self) -> BulkPath:
        return self.bulk_folder / "embeddings"

    def predictions_path(self, encoder: str) -> Path:
        return self.folder / "predictions" / f"{encoder}.parquet"

    def neuron_predictions_path(self, encoder: str) -> Path:
        return self.folder / "neuron_predictions" / f"{encoder}.parquet"

    @property
    def training_folder(self) -> Path:
        return self.folder / "training"

    def table_path(self, encoder: str) -> Path:
        return self.folder / "tables" / f"{encoder}.parquet"

    def projection_path(self, encoder: str) -> Path:
        return self.folder / "projections" / f"{encoder}.parquet"

    def compressor_path(self, fingerprint: str) -> BulkPath:
        """What was fitted for a compressed encoder, by the fingerprint of that."""
        return self.bulk_folder / "compressors" / f"{fingerprint}.safetensors"

    def former_table_path(self, encoder: str) -> Path:
        """A sample of the embedding table's former version."""
        return self.folder / "former_tables" / f"{encoder}.parquet"

    @property
    def lancedb_folder(self) -> BulkPath:
        return self.bulk_folder / "lancedb"

    def manifest_path(self, asset: str) -> Path:
        return self.folder / "manifests" / f"{asset}.json"

    def lineage_path(self, asset: str, data_version: str) -> Path:
        return self.folder / "lineage" / asset / f"{data_version}.json"

    def encoder(self, name: str | None) -> str:
        """The branch of the encoder of that name, or of the default one; `a+pca32` is the same as `a_pca32`.

        Raises `SynpipeError` where the data set has no such encoder.
        """
        name = branch_name(self.spec.encoders[0] if name is None else name)
        if name not in self.encoders:
            raise SynpipeError(
                f"The data set {self.name} has no encoder {name!r}; it has {', '.join(self.encoders)}. To add one, name it "
                f"under `encoders:` in {self.name}.yaml."
            )
        return name

    def identity(self, encoder: str) -> str:
        """What the spec of an encoder declares, as a digest; see `encoder_specs`."""
        return self.encoders[encoder].identity(self.weights_base, self.encoders)

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
    """The data folder, the store, and the place of the bulk of the data: None for the store."""

    data: Path
    store: Path
    bulk: BulkPath | None = None

    @classmethod
    def locate(cls, store: str | os.PathLike[str] | None = None) -> "Project":
        """The project that the environment names.

        Data folder: SYNPIPE_DATA, else `./data` where that has `datasets`, else the one beside the package. Store: the
        argument, else SYNPIPE_STORE, else `store` in the data folder. Bulk: SYNPIPE_BULK, a folder or the address of an object
        store.
        """
        beside_package = Path(__file__).resolve().parent.parent / "data"
        here = Path("data").resolve()
        data = Path(
            os.environ.get("SYNPIPE_DATA") or (here if (here / "datasets").is_dir() else beside_package)
        ).resolve()
        chosen = store or os.environ.get("SYNPIPE_STORE") or data / "store"
        bulk = os.environ.get("SYNPIPE_BULK")
        return cls(data, Path(chosen).resolve(), locate(bulk) if bulk else None)

    @cached_property
    def registry(self) -> Mapping[str, AnyEncoderSpec]:
        return load_registry(self.data / "encoders.yaml")

    def dataset_names(self) -> list[str]:
        return sorted(path.stem for path in (self.data / "datasets").glob("*.yaml"))

    def dataset(self, name: str) -> Dataset:
        """Raises `SynpipeError` where there is no such data set or its YAML file is wrong."""
        path = self.data / "datasets" / f"{_checked_name(name)}.yaml"
        if not path.exists():
            known = ", ".join(self.dataset_names()) or "none"
            raise SynpipeError(f"There is no data set {name!r} in {path.parent}; there is {known}.")
        return self.dataset_at(path)

    def dataset_at(self, path: Path) -> Dataset:
        """The data set that a YAML file anywhere describes, named after it. Raises `SynpipeError` where it is wrong."""
        name = _checked_name(path.stem)
        spec = DatasetSpec.parse(expand(read_yaml(path)), str(path))
        folder = self.store / name
        return Dataset(
            name=name,
            spec=spec,
            folder=folder,
            base=folder / "source" if spec.synthetic is not None else path.absolute().parent,
            encoders=chosen_encoders(spec.encoders, self.registry, str(path)),
            weights_base=self.data,
            bulk=self._bulk_of(folder),
        )

    def _bulk_of(self, folder: Path) -> BulkPath | None:
        """Where the bulk of the data set in `folder` lies. Raises `SynpipeError` where SYNPIPE_BULK contradicts the store."""
        chosen = None if self.bulk is None else self.bulk / folder.name
        record = folder / BULK_RECORD
        if record.exists():
            former = locate(read_json(record)["address"])
        elif (folder / "tiles").is_dir():
            former = folder
        else:
            return chosen
        if chosen is not None and former != chosen:
            raise SynpipeError(
                f"Tiles, vectors and indexes of {folder.name} lie in {former}, but by SYNPIPE_BULK they should lie in {chosen}. "
                "Unset it to go on with those that are there. Or move the folders tiles, embeddings, compressors and lancedb, "
                f"and delete {record} if there is one; or choose another store."
            )
        return None if former == folder else former


def record_bulk(dataset: Dataset) -> None:
    """Write down where the bulk lies, before anything is put there: commands find it with SYNPIPE_BULK or without.

    Raises `SynpipeError` where it cannot be reached.
    """
    if dataset.bulk is None:
        return
    if isinstance(dataset.bulk, ObjectPath):
        dataset.bulk.check()
    record = dataset.folder / BULK_RECORD
    if not record.exists():
        write_json(record, {"address": str(dataset.bulk)})


def _checked_name(name: str) -> str:
    if not NAME.fullmatch(name):
        raise SynpipeError(f"{name!r} cannot be the name of a data set: use a-z, 0-9 and _, and begin with a letter.")
    return name


def expand(value: Any) -> Any:
    """Replace `${VARIABLE:-default}` in every string of a YAML document by the environment's value, or the default."""
    if isinstance(value, Mapping):
        return {key: expand(item) for key, item in value.items()}
    if isinstance(value, list):
        return [expand(item) for item in value]
    if isinstance(value, str):
        return re.sub(r"\$\{(\w+):-([^}]*)\}", lambda match: os.environ.get(match[1]) or match[2], value)
    return value
