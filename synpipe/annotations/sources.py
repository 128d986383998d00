"""What every format of synapse annotations has in common: its spec, and the `Rows` that it delivers.

In: the keys of an entry under `annotations:`. Out: a `Source` that knows its files, and `Rows`, untyped and in file order.
Guarantee: every row of every file is delivered once, a row that cannot be read with its `problem`; only a bad file raises.

A new format is one more `Source` whose `read` yields `Rows`; typing and checking, in `annotations.py`, are common to all.
"""

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from pydantic import Field, FiniteFloat

from synpipe.annotations.columns import MAX_ID
from synpipe.errors import SynpipeError
from synpipe.specs import Spec, digest
from synpipe.store.fingerprints import file_sha256

COLUMNS = ("synapse_id", "x", "y", "z", "neuron_id", "hemilineage", "region", "neurotransmitter", "confidence")


@dataclass(frozen=True)
class Rows:
    """Consecutive rows of one file, before any check.

    table: any of `COLUMNS` (string, integer or floating; an absent one counts as null), `row` (int64, the place in the
        file, from 1) and, if some rows could not be read, `problem` (string, null where all is well).
    counted_in: what `row` counts, for messages: line, row, entry.
    notes: what the user should know about the file.
    """

    file: Path
    counted_in: str
    table: pa.Table
    notes: tuple[str, ...] = ()


class Source(Spec):
    """One entry under `annotations:`.

    source: name in the column `source`; by default the stem of the first file.
    id_offset: is added to every id, so that two sources of one data set do not collide.
    label: the class of every synapse of this source, instead of what the file says.
    shift_nm_zyx: is added to every position.
    min_inside: the share of positions that must lie inside the volume; below it the unit is taken to be wrong.
    unit_checked: the unit was checked by eye: what contradicts it inside the volume is a note, no error. See
        `annotation_units.py` for both.
    """

    source: str | None = None
    id_offset: int = Field(default=0, ge=0, le=MAX_ID)
    label: str | None = None
    shift_nm_zyx: tuple[FiniteFloat, FiniteFloat, FiniteFloat] = (0.0, 0.0, 0.0)
    min_inside: float = Field(default=0.95, ge=0, le=1)
    unit_checked: bool = False

    @property
    def name(self) -> str:
        return self.source or Path(self._paths()[0]).stem

    @property
    def declared_unit(self) -> str:
        """For messages; `nm` where the coordinates are positions as they stand."""
        return "nm"

    def resolve(self, base: Path) -> list[Path]:
        """The files, relative paths taken from the folder `base`, whether they are there or not."""
        return [(base / path).resolve() for path in self._paths()]

    def files(self, base: Path) -> list[Path]:
        """The same, all of which are there. Raises `SynpipeError` where one is missing."""
        paths = self.resolve(base)
        for path in paths:
            if not path.is_file():
                raise SynpipeError(f"Annotation file {path} does not exist: correct its path, relative to {base}.")
        return paths

    def fingerprint(self, base: Path) -> str:
        """Digest of the spec and of the content of its files."""
        return digest({"spec": self.model_dump(mode="json"), "files": [file_sha256(path) for path in self.files(base)]})

    @abstractmethod
    def _paths(self) -> tuple[str, ...]: ...

    @abstractmethod
    def read(self, base: Path) -> Iterator[Rows]:
        """Every row of the files, in file order. Raises `SynpipeError` where a file as a whole cannot be used."""

    def to_nm(self, coordinates_zyx: np.ndarray) -> np.ndarray:
        """Coordinates of the file (n, 3) as positions in nm, without `shift_nm_zyx`."""
        return coordinates_zyx
