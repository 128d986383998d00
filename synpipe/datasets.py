"""Data sets: each has a YAML file in `data/datasets/` and a folder in the store.

A `Project` finds the data folder (`datasets/*.yaml`, `encoders.yaml`) and the store. A `Dataset` knows its spec, its encoders and
the place of each of its files. No other module knows the layout of the store.
"""

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from synpipe.addresses import refuse_credentials, refuse_credentials_within
from synpipe.analysis.classifier import ClassifierSpec, LinearSpec
from synpipe.analysis.evaluation import EvaluationSpec
from synpipe.analysis.projection import ProjectionSpec
from synpipe.analysis.splits import SplitSpec
from synpipe.annotations.columns import check_class_names
from synpipe.annotations.formats import AnnotationSpec
from synpipe.embeddings.encoder_specs import AnyEncoderSpec
from synpipe.embeddings.registry import Registry, branch_name, chosen_encoders
from synpipe.errors import SynpipeError
from synpipe.specs import Spec, read_yaml
from synpipe.store.files import DAMAGED, write_json
from synpipe.store.objects import BulkPath, ObjectPath, locate
from synpipe.synthetic.demo import SyntheticSpec
from synpipe.tiles.tile import TileSpec
from synpipe.volumes.volume import VolumeSpec

# The six transmitters of Eckstein et al. (Cell 2024), in their order.
NEUROTRANSMITTERS = ("acetylcholine", "gaba", "glutamate", "dopamine", "serotonin", "octopamine")

BULK_RECORD = "bulk.json"
NAME = re.compile(r"[a-z][a-z0-9_]*")


class DatasetSpec(Spec):
    """The content of a data set's YAML file.

    title: a sentence for people. synthetic: generates the volume and the annotations (the demo). volume, annotations: where the
    data is; relative paths start at the folder of the YAML file, or at the folder of what `synthetic` generates. classes: the
    values that the column `neurotransmitter` may have. tiles: how tiles are cut out. split: the sides for training, validation
    and test. classifier: how classes are predicted; null for no prediction. evaluation: how much is measured; null for nothing.
    encoders: entries of `encoders.yaml`, or compressed ones such as `<name>+pca32` and `<name>+ae32`; each is a branch of the
    graph, and the first is the default. projection: how the map is drawn; null for no map. max_reject_share: the share of
    synapses that may be rejected before the check of `rejects` fails. neuroglancer: the site that links lead to.
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

    @field_validator("classes")
    @classmethod
    def _are_distinct(cls, classes: tuple[str, ...]) -> tuple[str, ...]:
        check_class_names(classes)
        return classes

    @model_validator(mode="before")
    @classmethod
    def _holds_no_credentials(cls, document: Any) -> Any:
        """The whole description is recorded in every table, so this covers every key, also `title`."""
        refuse_credentials_within(document)
        return document

    @field_validator("neuroglancer")
    @classmethod
    def _is_a_site(cls, site: str) -> str:
        refuse_credentials(site)
        parts = urlsplit(site)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.fragment or re.search(r"\s", site):
            raise ValueError(f"{site} is not the address of a Neuroglancer site: give https://… without #")
        return site.rstrip("/")


@dataclass(frozen=True)
class Dataset:
    """A data set with its place in the store.

    folder: its folder in the store. base: where relative paths of its spec start. encoders: specs of its encoders by the name of
    their branch, in the order of the data set's spec. weights_base: where relative paths of weights start. bulk: the place of
    tiles, vectors and indexes, if that is not `folder`.
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
        """The figures of an encoder."""
        return self.folder / "evaluation" / f"{encoder}.json"

    def queries_path(self, encoder: str) -> Path:
        """The results of each query of an encoder's evaluation."""
        return self.folder / "evaluation" / f"{encoder}.parquet"

    @property
    def evaluation_path(self) -> Path:
        """The figures of all encoders, a row each."""
        return self.folder / "evaluation.parquet"

    @property
    def bulk_folder(self) -> BulkPath:
        """The place of tiles, vectors and indexes. On a cluster, every worker must be able to reach it."""
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
        """The fit of a compressed encoder with this fingerprint."""
        return self.bulk_folder / "compressors" / f"{fingerprint}.safetensors"

    def former_table_path(self, encoder: str) -> Path:
        """A sample of the former version of the embedding table."""
        return self.folder / "former_tables" / f"{encoder}.parquet"

    @property
    def lancedb_folder(self) -> BulkPath:
        return self.bulk_folder / "lancedb"

    def manifest_path(self, asset: str) -> Path:
        return self.folder / "manifests" / f"{asset}.json"

    def lineage_path(self, asset: str, data_version: str) -> Path:
        return self.folder / "lineage" / asset / f"{data_version}.json"

    def encoder(self, name: str | None) -> str:
        """The branch of this encoder, or of the default one for None; `a+pca32` is the same as `a_pca32`.

        Raises `SynpipeError` if the data set has no such encoder.
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
        """The volume's file or folder, even if it does not exist; empty for a volume behind an address."""
        path = self.spec.volume.resolve(self.base)
        return [] if path is None else [path]

    def source_files(self) -> list[Path]:
        """The volume and the annotation files that the spec names, even if they do not exist."""
        return self.volume_files() + [
            file for annotation in self.spec.annotations for file in annotation.resolve(self.base)
        ]

    def missing_sources(self) -> list[Path]:
        """Source files that do not exist; empty for a data set that generates its own."""
        return [] if self.spec.synthetic else [file for file in self.source_files() if not file.exists()]


@dataclass(frozen=True)
class Project:
    """The data folder, the store, and the place of the bulk of the data (None: the store)."""

    data: Path
    store: Path
    bulk: BulkPath | None = None

    @classmethod
    def locate(cls, store: str | os.PathLike[str] | None = None) -> "Project":
        """The project that the environment names.

        Data folder: SYNPIPE_DATA, else `./data` if that has a folder `datasets`, else the one beside the package. Store: the
        argument, else SYNPIPE_STORE, else `store` in the data folder. Bulk: SYNPIPE_BULK, a folder or the address of an
        object store.
        """
        beside_package = Path(__file__).resolve().parent.parent / "data"
        here = Path("data").resolve()
        data = Path(
            os.environ.get("SYNPIPE_DATA") or (here if (here / "datasets").is_dir() else beside_package)
        ).resolve()
        chosen = store or os.environ.get("SYNPIPE_STORE") or data / "store"
        if "://" in str(chosen):  # it would become a folder with this name
            raise SynpipeError(
                "The store (--store or SYNPIPE_STORE) is an address, but it must be a folder. SYNPIPE_BULK may be an address: it "
                "names the place of tiles, vectors and indexes."
            )
        bulk = os.environ.get("SYNPIPE_BULK")
        return cls(data, Path(chosen).resolve(), locate(bulk) if bulk else None)

    @cached_property
    def registry(self) -> Registry:
        """The encoders that data sets may name. Raises `SynpipeError` if the file is not a registry."""
        return Registry(self.data / "encoders.yaml")

    def dataset_names(self) -> list[str]:
        return sorted(path.stem for path in (self.data / "datasets").glob("*.yaml"))

    def dataset(self, name: str) -> Dataset:
        """The data set of this name. Raises `SynpipeError` if there is none, or if its YAML file is wrong."""
        path = self.data / "datasets" / f"{_checked_name(name)}.yaml"
        if not path.exists():
            known = ", ".join(self.dataset_names()) or "none"
            raise SynpipeError(f"There is no data set {name!r} in {path.parent}; there is {known}.")
        return self.dataset_at(path)

    def find_dataset(self, file_or_name: str) -> Dataset:
        """The data set of this name, or the one that this YAML file describes; raises `SynpipeError` as both do."""
        is_file = file_or_name.endswith((".yaml", ".yml")) or os.sep in file_or_name
        return self.dataset_at(Path(file_or_name)) if is_file else self.dataset(file_or_name)

    def dataset_at(self, path: Path) -> Dataset:
        """The data set that this YAML file describes, named after the file. Raises `SynpipeError` if the file is wrong."""
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
        """The place of the bulk of the data set in `folder`. Raises `SynpipeError` if SYNPIPE_BULK contradicts the store."""
        chosen = None if self.bulk is None else self.bulk / folder.name
        record = folder / BULK_RECORD
        if (address := _recorded_address(record)) is not None:
            former = locate(address)
        elif (folder / "tiles").is_dir():
            former = folder
        else:
            return chosen
        if chosen is not None and former != chosen:
            raise SynpipeError(
                f"Tiles, vectors and indexes of {folder.name} are in {former}, but SYNPIPE_BULK places them in {chosen}. Unset "
                "SYNPIPE_BULK to use the existing ones. Or move the folders tiles, embeddings, compressors and lancedb, and "
                f"delete {record} if it exists; or choose another store."
            )
        return None if former == folder else former


def record_bulk(dataset: Dataset) -> None:
    """Record the place of the bulk before anything is written there, so that commands find it without SYNPIPE_BULK.

    Raises `SynpipeError` if the place cannot be reached.
    """
    if dataset.bulk is None:
        return
    if isinstance(dataset.bulk, ObjectPath):
        dataset.bulk.check()
    record = dataset.folder / BULK_RECORD
    if not record.exists():
        address = str(dataset.bulk)
        write_json(record, {"address": address, "checksum": _checksum(address)})


def _recorded_address(record: Path) -> str | None:
    """The address in the record of the bulk, or None if there is no record.

    Raises `SynpipeError` for a damaged record, and leaves it where it is: without it, everything would be made again elsewhere.
    """
    aside = record.with_suffix(f"{record.suffix}{DAMAGED}")  # an earlier synpipe moved damaged records aside
    if not record.exists() and not aside.exists():
        return None
    try:
        content = json.loads(record.read_text())
        address = content.pop("address")
        if content in ({}, {"checksum": _checksum(address)}):  # an earlier synpipe wrote no checksum
            return str(address)
    except (OSError, ValueError, AttributeError, KeyError, TypeError):
        pass
    damaged = record if record.exists() else aside
    folder = record.parent
    raise SynpipeError(
        f"{damaged} is damaged or cannot be read. It says where tiles, vectors and indexes of {folder.name} are. If you know the "
        f'place, write {{"address": "PLACE"}} to {record}, where PLACE is a folder, or an address such as '
        f"s3://bucket/{folder.name}. If they are in {folder}, delete {damaged}."
    )


def _checksum(address: str) -> str:
    return hashlib.sha256(address.encode()).hexdigest()


def _checked_name(name: str) -> str:
    if not NAME.fullmatch(name):
        raise SynpipeError(f"{name!r} cannot be the name of a data set: use a-z, 0-9 and _, starting with a letter.")
    return name


def expand(value: Any) -> Any:
    """Replace `${VARIABLE:-default}` in every string of a YAML document with the environment's value, or the default."""
    if isinstance(value, Mapping):
        return {key: expand(item) for key, item in value.items()}
    if isinstance(value, list):
        return [expand(item) for item in value]
    if isinstance(value, str):
        return re.sub(r"\$\{(\w+):-([^}]*)\}", lambda match: os.environ.get(match[1]) or match[2], value)
    return value
