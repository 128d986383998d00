"""Similar synapses: the most similar ones of each class, from the published LanceDB table.

In: a data set, one of its encoders, the id of a synapse. Out: neighbours per class, nearest first. Guarantees: the answer
comes from one published version of the table; a filter value is compared, never pasted into a filter string.

Up to `EXACT_ROWS` rows the vectors are held in memory and searched exactly. That was measured to be faster than any
index for this question (seven milliseconds for the top 4 of six classes of 103,511 × 192), it is right for rare classes
too, where an index misses up to a fifth, and it allows L1. Beyond that the index answers, class by class.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from lancedb.expr import Expr, col, func, lit

from synpipe.datasets import Dataset
from synpipe.errors import SynpipeError
from synpipe.index import open_current, read_provenance, read_vectors
from synpipe.links import Viewer, find_viewer

Metric = Literal["cosine", "l2", "dot", "l1"]
METRICS: tuple[str, ...] = get_args(Metric)
EXACT_ROWS = 300_000
UNLABELLED = "unlabelled"
FILTER_COLUMNS = (
    "neurotransmitter",
    "region",
    "hemilineage",
    "neuron_id",
    "source",
    "predicted_neurotransmitter",
    "split",
)
# The probes of a plain query are too few for a class: with 16 of 256 the rarest had a recall of .81, with 128 of 1.0.
CLASS_NPROBES_FACTOR = 8


@dataclass(frozen=True)
class Neighbour:
    """A synapse of the answer. distance: 1 − cosine, Euclidean, −inner product or Manhattan; smaller is more similar."""

    synapse_id: int
    distance: float
    neuron_id: int | None
    neurotransmitter: str | None
    hemilineage: str | None
    region: str | None
    position_nm: tuple[float, float, float]  # x, y, z
    neuroglancer: str | None  # link to its place; None where the volume is in local files


class SynapseIndex:
    """One published version of the index of an encoder.

    cosine compares directions. l2, dot and l1 compare the vectors as the encoder gave them, with their length.
    """

    def __init__(self, dataset: Dataset, encoder: str):
        """Raises `SynpipeError` where the index has not been built."""
        self._table = open_current(dataset.lancedb_folder, encoder)
        self._classes = dataset.spec.classes
        self._viewer = find_viewer(dataset)
        self.provenance = read_provenance(self._table.schema)
        self.fingerprint: str = self.provenance["encoder_fingerprint"]
        self.version = self._table.version
        self.exact = self._table.count_rows() <= EXACT_ROWS
        if self.exact:
            self._rows = self._table.to_arrow().combine_chunks()
            self._unit = read_vectors(self._rows)
            self._norms = self._rows["norm"].to_numpy()

    def search(
        self,
        synapse_id: int,
        metric: Metric = "cosine",
        per_class: int = 4,
        where: Mapping[str, str] | None = None,
    ) -> dict[str, list[Neighbour]]:
        """The `per_class` most similar synapses of each class, the query itself left out.

        where: wanted values by column (`FILTER_COLUMNS`). Returns the classes of the data set in their order, then
        `unlabelled`; classes without an answer are left out.
        Raises `SynpipeError` for an unknown synapse, metric or column, `per_class` below 1, or a metric other than cosine
        on a table too large for an exact search.
        """
        vector = self._query(synapse_id)
        return self.search_vector(vector, self.fingerprint, metric, per_class, where, leave_out=synapse_id)

    def search_vector(
        self,
        vector: np.ndarray,
        fingerprint: str,
        metric: Metric = "cosine",
        per_class: int = 4,
        where: Mapping[str, str] | None = None,
        leave_out: int | None = None,
    ) -> dict[str, list[Neighbour]]:
        """The synapses whose vectors are most similar to `vector`, (d,), with its length as the encoder gave it.

        fingerprint: of the encoder that made the vector, `Encoder.fingerprint`; vectors of two encoders are of two spaces,
        whatever their number of dimensions. leave_out: id of a synapse that is no answer. The rest as in `search`.
        Raises `SynpipeError` also where the fingerprint is not that of the index, or the vector has another number of
        dimensions, is not finite, or has no length.
        """
        if metric not in METRICS:
            raise SynpipeError(f"Unknown metric {metric!r}: use one of {', '.join(METRICS)}.")
        if per_class < 1:
            raise SynpipeError(f"The number of neighbours of each class must be at least 1, not {per_class}.")
        if fingerprint != self.fingerprint:
            raise SynpipeError(
                f"The vector was made by the encoder {fingerprint[:12]}, this index of {self.provenance['encoder']} by "
                f"{self.fingerprint[:12]}: their vectors cannot be compared. Embed the query with the encoder of the index, "
                "or search in the index of its own."
            )
        query = np.asarray(vector, np.float32)
        dimensions = self._table.schema.field("vector").type.list_size
        if query.shape != (dimensions,):
            raise SynpipeError(f"The vector has shape {query.shape}; this index needs ({dimensions},).")
        if not (np.isfinite(query).all() and query.any()):
            raise SynpipeError("The vector is zero, or holds values that are not finite: nothing is similar to it.")
        wanted = {column: _filter_value(column, value) for column, value in (where or {}).items()}
        answer = self._exactly if self.exact else self._through_index
        return answer(query, leave_out, metric, per_class, wanted)

    def _query(self, synapse_id: int) -> np.ndarray:
        """The vector of a synapse with its length: float32 (d,)."""
        if not -(2**63) <= synapse_id < 2**63:
            found = self._table.schema.empty_table()
        elif self.exact:
            found = self._rows.filter(pc.equal(self._rows["synapse_id"], synapse_id))
        else:
            found = self._table.search().where(col("synapse_id") == lit(synapse_id)).limit(1).to_arrow()
        if not len(found):
            raise SynpipeError(
                f"Synapse {synapse_id} is not in the index of {self.provenance['encoder']}: it is unknown or was rejected."
            )
        return read_vectors(found)[0] * found["norm"][0].as_py()

    def _exactly(self, query: np.ndarray, leave_out: int | None, metric: str, per_class: int, wanted: Mapping) -> dict:
        # No id is negative.
        keep = pc.not_equal(self._rows["synapse_id"], -1 if leave_out is None else leave_out)
        for column, value in wanted.items():
            keep = pc.and_kleene(keep, pc.equal(self._rows[column], value))
        keep = pc.fill_null(keep, False).to_numpy(zero_copy_only=False)
        labels = self._rows["neurotransmitter"]
        answers = {}
        distances = None
        for name in (*self._classes, None):
            of_class = pc.is_null(labels) if name is None else pc.fill_null(pc.equal(labels, name), False)
            rows = np.flatnonzero(keep & of_class.to_numpy(zero_copy_only=False))
            if not len(rows):
                continue
            if distances is None:
                distances = self._distances(query, metric)
            nearest = rows[np.argsort(distances[rows], kind="stable")[:per_class]]
            table = self._rows.take(nearest)
            answers[name or UNLABELLED] = _neighbours(table, distances[nearest], self._viewer)
        return answers

    def _distances(self, query: np.ndarray, metric: str) -> np.ndarray:
        if metric == "cosine":
            return 1 - self._unit @ (query / np.linalg.norm(query))
        if metric == "dot":
            return -(self._unit @ query) * self._norms
        difference = self._unit * self._norms[:, None] - query
        return np.abs(difference).sum(axis=1) if metric == "l1" else np.linalg.norm(difference, axis=1)

    def _through_index(
        self, query: np.ndarray, leave_out: int | None, metric: str, per_class: int, wanted: Mapping
    ) -> dict:
        if metric != "cosine":
            raise SynpipeError(
                f"The metric {metric} needs an exact search, which is made up to {EXACT_ROWS:,} rows; this index has "
                f"{self._table.count_rows():,}. Use cosine."
            )
        settings = self._table.schema.field("vector").metadata
        nprobes = CLASS_NPROBES_FACTOR * int(settings[b"synpipe.nprobes"])
        answers = {}
        for name in (*self._classes, None):
            # LanceDB's expressions have no IS NULL; `concat` takes a null for an empty string, which is no class. Conditions
            # stay expressions: as SQL (`to_sql`), LanceDB 0.40 lets a value that holds \' end its own quotes.
            label = func("concat", col("neurotransmitter"), lit("")) if name is None else col("neurotransmitter")
            condition: Expr = label == lit(name or "")
            if leave_out is not None:
                condition = condition & (col("synapse_id") != lit(leave_out))
            for column, value in wanted.items():
                condition = condition & (col(column) == lit(value))
            # No upper limit: where a class has no `per_class` members in those partitions, the search goes on.
            search = self._table.search(query).distance_type("cosine").minimum_nprobes(nprobes).maximum_nprobes(0)
            table = search.where(condition).limit(per_class).to_arrow()
            if len(table):
                answers[name or UNLABELLED] = _neighbours(table, table["_distance"].to_numpy(), self._viewer)
        return answers


def parse_where(conditions: Sequence[str]) -> dict[str, str]:
    """Conditions `column=value` of the command line as a mapping. Raises `SynpipeError` for any other form."""
    wanted = {}
    for condition in conditions:
        column, equals, value = condition.partition("=")
        if not equals:
            raise SynpipeError(f"--where {condition!r} is not of the form column=value, for example region=AL.")
        _filter_value(column.strip(), value.strip())
        wanted[column.strip()] = value.strip()
    return wanted


def _filter_value(column: str, value: str) -> str | int:
    """The value in the type of its column."""
    if column not in FILTER_COLUMNS:
        raise SynpipeError(f"Cannot filter by {column!r}: use one of {', '.join(FILTER_COLUMNS)}.")
    if column != "neuron_id":
        return value
    if not value.isascii() or not value.isdecimal() or int(value) >= 2**63:
        raise SynpipeError(f"neuron_id must be a whole number below 2^63, not {value!r}.")
    return int(value)


def _neighbours(table: pa.Table, distances: np.ndarray, viewer: Viewer | None) -> list[Neighbour]:
    links = [None] * len(table) if viewer is None else viewer.links(table).to_pylist()
    return [
        Neighbour(
            synapse_id=row["synapse_id"],
            distance=float(distance),
            neuron_id=row["neuron_id"],
            neurotransmitter=row["neurotransmitter"],
            hemilineage=row["hemilineage"],
            region=row["region"],
            position_nm=(row["x_nm"], row["y_nm"], row["z_nm"]),
            neuroglancer=link,
        )
        for row, distance, link in zip(table.drop_columns(["vector"]).to_pylist(), distances, links, strict=True)
    ]
