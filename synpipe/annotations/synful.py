"""The format `synful`: a JSON list of the synaptic partners that synful predicted in FAFB."""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from synpipe.annotations.json_files import Row, build_table, is_unicode, read_list, to_text, unreadable_row
from synpipe.annotations.source import AnnotationSource, Rows


class Synful(AnnotationSource):
    """A JSON list of partners from synful's FAFB predictions (Buhmann et al., Nature Methods 2021): nm, in the order zyx.

    Source: https://github.com/funkelab/synful_fafb, `evaluation/data/synful_predictions`.

    position: the point that the tile shows.
    The neuron is the presynaptic skeleton, if the entry names one. `confidence` is `score`, a sum that can exceed 1.
    """

    format: Literal["synful"]
    path: str
    position: Literal["pre", "post"] = "pre"

    def _file_names(self) -> tuple[str, ...]:
        return (self.path,)

    def read(self, base: Path) -> Iterator[Rows]:
        (path,) = self.files(base)
        rows: list[Row] = []
        for entry in read_list(path):
            synapse = dict(entry) if isinstance(entry, tuple) else {}
            location = synapse.get(f"location_{self.position}")
            z, y, x = location if isinstance(location, list) and len(location) == 3 else (None, None, None)
            row = {
                "synapse_id": to_text(synapse.get("id")),
                "x": to_text(x),
                "y": to_text(y),
                "z": to_text(z),
                "neuron_id": to_text(synapse.get("id_skel_pre")),
                "confidence": to_text(synapse.get("score")),
                "problem": None if isinstance(entry, tuple) else "it is not an object with id and location",
            }
            rows.append(row if is_unicode(row.values()) else unreadable_row(row["synapse_id"]))
        yield Rows(path, "entry", build_table(rows))
