"""What every annotation format shares: its entry in the YAML file, and the rows that it delivers.

Input: one entry under `annotations:`. Output: an `AnnotationSource` that knows its files and reads them as `Rows`, which
are untyped and in file order. Every row of every file is delivered once. A row that cannot be read has a `problem`; an
error is raised only if a whole file cannot be used. `row_checks.py` types and checks the rows of all formats.

A new format is a subclass of `AnnotationSource`, or of `tables.TableSource` for tables, that is listed in `formats.py`.
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

    table: any of `COLUMNS` (string, integer or floating point; a missing column counts as null), `row` (int64, the place
        in the file, from 1) and, if some rows could not be read, `problem` (string, null for the other rows).
    counted_in: what `row` counts, for messages: line, row or entry.
    notes: sentences about the file, for the user.
    """

    file: Path
    counted_in: str
    table: pa.Table
    notes: tuple[str, ...] = ()

    @property
    def place_prefix(self) -> str:
        """The start of the description of a row's place, such as "a.csv, line "."""
        return f"{self.file.name}, {self.counted_in} "


class AnnotationSource(Spec):
    """One entry under `annotations:`.

    source: the value of the column `source`; by default the name of the first file without its suffix.
    id_offset: this number is added to every id, so that the ids of two sources of one data set do not collide.
    label: the class of every synapse of this source. It replaces the class in the file.
    shift_nm_zyx: this vector is added to every position.
    min_inside: the share of positions that must lie inside the volume. Below it, the unit is considered wrong.
    unit_checked: a person has checked the unit. Evidence against it from inside the volume is then a note, not an error.
        `units.py` explains this key and `min_inside`.
    """

    source: str | None = None
    id_offset: int = Field(default=0, ge=0, le=MAX_ID)
    label: str | None = None
    shift_nm_zyx: tuple[FiniteFloat, FiniteFloat, FiniteFloat] = (0.0, 0.0, 0.0)
    min_inside: float = Field(default=0.95, ge=0, le=1)
    unit_checked: bool = False

    @property
    def name(self) -> str:
        return self.source or Path(self._file_names()[0]).stem

    @property
    def declared_unit(self) -> str:
        """The unit of the coordinates in the file, for messages."""
        return "nm"

    def resolve(self, base: Path) -> list[Path]:
        """Return the paths of the files, which may or may not exist. Relative paths start at the folder `base`."""
        return [(base / name).resolve() for name in self._file_names()]

    def files(self, base: Path) -> list[Path]:
        """Return the same paths. Raises `SynpipeError` if a file does not exist."""
        paths = self.resolve(base)
        for path in paths:
            if not path.is_file():
                raise SynpipeError(
                    f"Annotation file {path} does not exist. Correct its path, which is relative to {base}."
                )
        return paths

    def fingerprint(self, base: Path) -> str:
        """Digest of the spec and of the content of its files."""
        return digest({"spec": self.model_dump(mode="json"), "files": [file_sha256(path) for path in self.files(base)]})

    @abstractmethod
    def _file_names(self) -> tuple[str, ...]:
        """The files as the entry names them."""

    @abstractmethod
    def read(self, base: Path) -> Iterator[Rows]:
        """Yield every row of the files, in file order. Raises `SynpipeError` if a whole file cannot be used."""

    def to_nm(self, coordinates_zyx: np.ndarray) -> np.ndarray:
        """Convert coordinates of the file, (n, 3), to positions in nm, without `shift_nm_zyx`."""
        return coordinates_zyx
