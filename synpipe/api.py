"""The public Python API: `import synpipe` provides every name of this module.

It reads what `synpipe materialize` has made, and makes nothing itself. These names stay when the inside of the package moves;
everything else is private by convention. docs/api.md describes them.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pyarrow as pa

from synpipe.assets import embedding_table, synapses
from synpipe.assets.rgb_tiles import open_tiles
from synpipe.datasets import Dataset, Project
from synpipe.errors import SynpipeError
from synpipe.store.files import read_table
from synpipe.tiles.tile import TileReader

# LanceDB and torch take seconds to import, and reading tables needs neither.
if TYPE_CHECKING:
    from synpipe.embeddings.encoders import Encoder
    from synpipe.index.distances import Metric
    from synpipe.index.search import Neighbour

__all__ = ["OpenDataset", "SynpipeError", "open_dataset", "open_encoder"]


@dataclass(frozen=True)
class OpenDataset:
    """A data set whose assets have been made. `open_dataset` opens it."""

    _dataset: Dataset

    @property
    def name(self) -> str:
        return self._dataset.name

    @property
    def encoders(self) -> tuple[str, ...]:
        """The names of its encoders; the first one is the default."""
        return tuple(self._dataset.encoders)

    @property
    def classes(self) -> tuple[str, ...]:
        """The classes that a synapse may have."""
        return self._dataset.spec.classes

    def synapses(self) -> pa.Table:
        """A row per usable synapse; docs/store.md lists the columns. Raises `SynpipeError` if they have not been made."""
        synapses.ASSET.check_files(self._dataset)
        return read_table(self._dataset.synapses_path)

    def tiles(self, synapse_ids: Sequence[int] | None = None) -> TileReader:
        """A reader of the tiles: `by_id(synapse_id)` is uint8 (3, 256, 256), `read(rows)` is uint8 (n, 3, 256, 256).

        synapse_ids: only these synapses, so that the whole index of the tiles need not fit in memory.
        Raises `SynpipeError` if the tiles have not been made.
        """
        return open_tiles(self._dataset, synapse_ids)

    def table(self, encoder: str | None = None, columns: Sequence[str] | None = None) -> pa.Table:
        """The embedding table of an encoder, the default one if None; `vector` has unit length.

        columns: only these columns. Raises `SynpipeError` if the table has not been made.
        """
        encoder = self._dataset.encoder(encoder)
        embedding_table.ASSET.check_files(self._dataset, encoder)
        path = self._dataset.table_path(encoder)
        return read_table(path, None if columns is None else list(columns))

    def search(
        self,
        synapse_id: int,
        encoder: str | None = None,
        per_class: int = 4,
        metric: "Metric" = "cosine",
        where: Mapping[str, str] | None = None,
    ) -> dict[str, list["Neighbour"]]:
        """The most similar synapses of each class, nearest first, from the published index.

        metric: `cosine`, `l2`, `dot` or `l1`. where: values that the neighbours must have, such as `{"region": "AL"}`.
        Raises `SynpipeError` if there is no index, no such synapse, or no such column.
        """
        from synpipe.assets.index import open_index

        index = open_index(self._dataset, self._dataset.encoder(encoder), in_memory=metric != "cosine")
        return index.search(synapse_id, metric, per_class, where)

    def open_encoder(self, encoder: str | None = None, device: str = "auto") -> "Encoder":
        """An encoder of the data set, also a compressed one as it was last fitted; see `open_encoder`."""
        from synpipe.assets.compressed import open_branch

        return open_branch(self._dataset, self._dataset.encoder(encoder), device)


def open_dataset(name: str, store: str | os.PathLike[str] | None = None) -> OpenDataset:
    """Open a data set by its name, or by the path of its YAML file.

    The data folder and the store are those that the command line finds; `store` replaces the store.
    Raises `SynpipeError` if there is no such data set, or if its YAML file is wrong.
    """
    return OpenDataset(Project.locate(store).find_dataset(name))


def open_encoder(name: str, device: str = "auto") -> "Encoder":
    """Open an encoder of `data/encoders.yaml`: `embed(tiles)` takes uint8 (n, 3, 256, 256) and returns float32 (n, dim).

    device: `auto` takes the GPU if there is one; or `cpu`, `cuda`. Raises `SynpipeError` if there is no such encoder or
    its weights cannot be read, and for a compressed encoder: only a data set can open that.
    """
    from synpipe.embeddings import encoders

    project = Project.locate()
    spec = project.registry.get(name)
    if spec is None:
        raise SynpipeError(
            f"There is no encoder {name!r} in {project.data / 'encoders.yaml'}; there is {', '.join(project.registry)}."
        )
    if spec.base is not None:
        raise SynpipeError(
            f"{name} compresses the vectors of {spec.base}, fitted on a data set: use `open_dataset(…).open_encoder({name!r})`."
        )
    return encoders.open_encoder(spec, project.data, device)
