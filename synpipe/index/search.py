"""Search the published index for similar synapses: the most similar ones of each class.

Inputs: a data set, one of its encoders, and the id of a synapse or a vector. Output: neighbours per class, nearest first.
All answers of a `SynapseIndex` come from one published version of the table. A filter value is compared with the column,
never pasted into a filter string.

The vectors of a class are held in memory and searched exactly if the table has at most `EXACT_ROWS` rows, or the class at
most `EXACT_CLASS_ROWS`. For this question an exact scan was measured to be faster than any index (7 ms for the top 4 of six
classes of 103,511 × 192). It is also correct for rare classes, of which an index misses up to a fifth, and it allows L1.

The LanceDB index answers for the other classes. The few hundred nearest rows of all classes contain the nearest of every
frequent class. A class with too few rows among them is searched for on its own.
"""

import asyncio
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, reduce
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from lancedb.expr import Expr, col, func, lit

from synpipe.annotations.schema import UNLABELLED
from synpipe.datasets import Dataset
from synpipe.embeddings.vectors import read_vectors
from synpipe.errors import NotFound, SynpipeError
from synpipe.index.distances import METRICS, Metric
from synpipe.index.exact_search import ExactSearch, Question
from synpipe.index.publish import check_rows, open_async_table, open_current, read_provenance
from synpipe.volumes.neuroglancer import Viewer

EXACT_ROWS = 300_000  # a table of at most so many rows is held in memory
EXACT_CLASS_ROWS = 60_000  # of a larger table, the classes of at most so many rows are held in memory
KEPT_ROWS = 5_000_000  # of a table of at most so many rows, the shown columns are held in memory
FILTER_COLUMNS = (
    "neurotransmitter",
    "region",
    "hemilineage",
    "neuron_id",
    "source",
    "predicted_neurotransmitter",
    "split",
)
SHOWN_COLUMNS = (
    *("synapse_id", "neuron_id", "neurotransmitter", "predicted_neurotransmitter", "predicted_probability"),
    *("hemilineage", "region", "x_nm", "y_nm", "z_nm"),
)
NEAREST_LOOKED_AT = 50  # rows of all classes that are fetched for each neighbour wanted per class
# The probes that find the ten nearest rows are too few for a rare class, whose nearest rows are further away. A class with
# 1 % of the rows had a recall of .81 with 16 of 256 partitions, and of 1.0 with 128.
CLASS_NPROBES_FACTOR = 8
VALUES_SHOWN = 20  # existing values that a message names
MAX_DIGITS = 19  # those of 2^63
CACHED_QUERIES = 64  # synapses whose rows and vectors are kept


@dataclass(frozen=True, kw_only=True)
class Synapse:
    """A synapse as an answer shows it.

    neurotransmitter: the annotated class. predicted_neurotransmitter, predicted_probability: prediction of the encoder's
    classifier, None without a classifier. position_nm: x, y, z. neuroglancer: link to its place, None without a viewer.
    """

    synapse_id: int
    neuron_id: int | None
    neurotransmitter: str | None
    predicted_neurotransmitter: str | None
    predicted_probability: float | None
    hemilineage: str | None
    region: str | None
    position_nm: tuple[float, float, float]
    neuroglancer: str | None


@dataclass(frozen=True, kw_only=True)
class Neighbour(Synapse):
    """A synapse of the answer. distance: see `distances.distances_to`; a smaller one means more similar."""

    distance: float


class SynapseIndex:
    """One published version of the index of an encoder. It is safe to use from several threads.

    The metric cosine compares directions; l2, dot and l1 compare the vectors at the length that the encoder gave them.
    """

    def __init__(self, dataset: Dataset, encoder: str, in_memory: bool = True, viewer: Viewer | None = None):
        """Open the version that is now current.

        in_memory: hold vectors in memory as the module docstring says, which pays off for many questions; otherwise the
        LanceDB index answers every question. viewer: the Neuroglancer site for the links of the answers (see
        `reports.links.find_viewer`); without it they have no links.

        Raises `SynpipeError` if the index has not been built.
        """
        self._table = open_current(dataset.lancedb_folder, encoder)
        check_rows(dataset.lancedb_folder, encoder, self._table)
        self._classes: list[str | None] = [*dataset.spec.classes, None]
        self._viewer = viewer
        self.provenance = read_provenance(self._table.schema)
        self.fingerprint: str = self.provenance["encoder_fingerprint"]
        self.version: int = self._table.version
        self.rows: int = self._table.count_rows()
        self.dimensions: int = self._table.schema.field("vector").type.list_size
        self.exact = in_memory and self.rows <= EXACT_ROWS
        self._nprobes = int(self._table.schema.field("vector").metadata[b"synpipe.nprobes"])
        self.metrics = METRICS if self.exact else ("cosine",)

        limit = EXACT_ROWS if self.exact else EXACT_CLASS_ROWS
        held = {name: count for name, count in self._counts().items() if count <= limit} if in_memory else {}
        self._kept = self._keep() if in_memory and not self.exact and self.rows <= KEPT_ROWS else None
        kept_labels = [] if self._kept is None else self._kept["neurotransmitter"].to_pylist()
        self._labels = np.array(kept_labels, dtype=object)
        # One batch is read even if no class is held, because the columns are taken from it.
        self._held = ExactSearch(islice(self._batches(), None if held else 1), held, self.dimensions)
        # Users search for the same synapse again with other options, and `synapse` looks it up too. Its row never changes.
        self._find = lru_cache(maxsize=CACHED_QUERIES)(self._look_up)
        # Queries run in threads of their own because a notebook already runs an event loop in its thread.
        self._threads = ThreadPoolExecutor(thread_name_prefix="search")
        # Queries use the asynchronous table. The synchronous one reads the schema four times per query, a third of its time.
        opening = open_async_table(dataset.lancedb_folder, encoder, self.version)
        self._async_table = self._threads.submit(asyncio.run, opening).result()

    def _counts(self) -> dict[str | None, int]:
        counted = pc.value_counts(self.columns(["neurotransmitter"])["neurotransmitter"]).to_pylist()
        count_of = {entry["values"]: entry["counts"] for entry in counted}
        return {name: count_of.get(name, 0) for name in self._classes}

    def _batches(self) -> Iterator[tuple[pa.RecordBatch, np.ndarray]]:
        columns = dict.fromkeys([*SHOWN_COLUMNS, *FILTER_COLUMNS, "norm", "vector"])
        for batch in self._table.search().select(list(columns)).to_batches(batch_size=8192):
            yield batch.drop_columns(["vector"]), read_vectors(batch)

    def _keep(self) -> pa.Table:
        """The shown columns of all rows, at 60 bytes a row. LanceDB then only has to find row numbers, in half the time."""
        rows = self._table.search().select(list(SHOWN_COLUMNS)).with_row_id(True).to_arrow()
        fields = [
            f if f.type != pa.string() else f.with_type(pa.dictionary(pa.int32(), pa.string())) for f in rows.schema
        ]
        return rows.cast(pa.schema(fields)).unify_dictionaries().combine_chunks().sort_by("_rowid")

    def columns(self, names: Sequence[str]) -> pa.Table:
        """Return these columns of all rows, in the order of the table."""
        return self._table.search().select(list(names)).to_arrow()

    def contents(self, synapse_ids: Sequence[int] | None = None) -> pa.Table:
        """Return `synapse_id` and `content_hash` of the rows with these ids, or of all rows, in the order of the table."""
        rows = self._table.search().select(["synapse_id", "content_hash"])
        if synapse_ids is not None:
            rows = rows.where(col("synapse_id").isin(list(synapse_ids)))
        return rows.to_arrow()

    def synapse(self, synapse_id: int) -> Synapse:
        """Return the synapse with this id. Raises `NotFound` if the index does not have it."""
        return Synapse(**_synapses(self._find(synapse_id)[0], self._viewer)[0])

    def refuse_unknown_values(self, where: Mapping[str, str]) -> None:
        """Raises `SynpipeError`, which names the existing values, if a column has nowhere the value that `where` requires."""
        if not where:
            return
        columns = self.columns(list(where))
        for column, value in where.items():
            existing = columns[column].unique().drop_null().to_pylist()
            if _filter_value(column, value) not in existing:
                shown = ", ".join(map(str, sorted(existing)[:VALUES_SHOWN])) or "no values"
                more = f" and {len(existing) - VALUES_SHOWN:,} more" if len(existing) > VALUES_SHOWN else ""
                raise SynpipeError(f"No synapse has {column}={value[:40]}. The column has {shown}{more}.")

    def any_id(self, random: np.random.Generator) -> int:
        """Return the id of a synapse, drawn uniformly."""
        row = int(random.integers(self.rows))
        if self.exact:
            return int(self._held.ids[row])
        return self._table.take_offsets([row]).select(["synapse_id"]).to_arrow()["synapse_id"][0].as_py()

    def search(
        self,
        synapse_id: int,
        metric: Metric = "cosine",
        per_class: int = 4,
        where: Mapping[str, str] | None = None,
        other_neurons: bool = False,
    ) -> dict[str, list[Neighbour]]:
        """Return the `per_class` most similar synapses of each class, without the query itself.

        where: required values by column (`FILTER_COLUMNS`). other_neurons: leave out the query's own neuron too.
        The result has the classes of the data set in their order, then `unlabelled`; classes without an answer are left
        out. Raises `SynpipeError` for an unknown synapse, metric or column, for `per_class` below 1, and for a metric other
        than cosine if the table is too large for an exact search.
        """
        row, vector = self._find(synapse_id)
        neuron = row["neuron_id"][0].as_py() if other_neurons else None
        return self._answer(self._question(vector, metric, per_class, where, synapse_id, neuron))

    def search_vector(
        self,
        vector: np.ndarray,
        fingerprint: str,
        metric: Metric = "cosine",
        per_class: int = 4,
        where: Mapping[str, str] | None = None,
    ) -> dict[str, list[Neighbour]]:
        """Return the synapses whose vectors are most similar to `vector`, float (d,), at the length the encoder gave it.

        fingerprint: `Encoder.fingerprint` of the encoder that computed the vector. It must be that of the index, because
        vectors of different encoders cannot be compared, even if they have the same number of dimensions. The other
        arguments and the result are those of `search`.
        Raises `SynpipeError` also if the fingerprint is another one, or the vector has another number of dimensions, is not
        finite, or is zero.
        """
        if fingerprint != self.fingerprint:
            raise SynpipeError(
                f"The vector was made by the encoder {fingerprint[:12]}, this index of {self.provenance['encoder']} by "
                f"{self.fingerprint[:12]}: their vectors cannot be compared. Embed the query with the encoder of the index, "
                "or search the index of the query's encoder."
            )
        return self._answer(self._question(vector, metric, per_class, where))

    def _question(
        self, vector: np.ndarray, metric: str, per_class: int, where: Mapping[str, str] | None, *without: int | None
    ) -> Question:
        if metric not in METRICS:
            raise SynpipeError(f"Unknown metric {metric!r}: use one of {', '.join(METRICS)}.")
        if metric not in self.metrics:
            raise SynpipeError(
                f"The metric {metric} needs an exact search, which is possible up to {EXACT_ROWS:,} rows; this index has "
                f"{self.rows:,}. Use cosine."
            )
        if per_class < 1:
            raise SynpipeError(f"The number of neighbours of each class must be at least 1, not {per_class}.")
        query = np.asarray(vector, np.float32)
        if query.shape != (self.dimensions,):
            raise SynpipeError(f"The vector has shape {query.shape}; this index needs ({self.dimensions},).")
        if not (np.isfinite(query).all() and query.any()):
            raise SynpipeError("The vector is zero or has values that are not finite, so no vector is similar to it.")
        values = {column: _filter_value(column, value) for column, value in (where or {}).items()}
        return Question(query, metric, per_class, values, *without)

    def _look_up(self, synapse_id: int) -> tuple[pa.Table, np.ndarray]:
        """The row of a synapse, and its vector with its length."""
        held = np.flatnonzero(self._held.ids == synapse_id)
        if len(held):
            return self._held.rows.slice(held[0], 1), self._held.vector(held[0])
        if self._kept is not None:
            known = np.flatnonzero(self._kept["synapse_id"].to_numpy() == synapse_id)
            if len(known):
                row = self._kept.slice(known[0], 1)
                stored = self._table.take_row_ids(row["_rowid"].to_pylist()).select(["vector", "norm"]).to_arrow()
                return row, read_vectors(stored)[0] * stored["norm"][0].as_py()
        elif not self.exact and -(2**63) <= synapse_id < 2**63:
            row = self._table.search().where(col("synapse_id") == lit(synapse_id)).limit(1).to_arrow()
            if len(row):
                return row, read_vectors(row)[0] * row["norm"][0].as_py()
        raise NotFound(
            f"Synapse {synapse_id} is not in the index of {self.provenance['encoder']}: it is unknown or was rejected."
        )

    def _answer(self, question: Question) -> dict[str, list[Neighbour]]:
        by_index = [name for name in self._classes if name not in self._held.places]
        index_search = self._threads.submit(self._through_index, by_index, question) if by_index else None
        nearest = self._held.nearest(question)
        rows, distances = (np.concatenate([[], *part]) for part in zip(([], []), *nearest.values(), strict=True))
        neighbours = iter(_neighbours(self._held.rows.take(rows.astype(np.int64)), distances, self._viewer))
        answer = {name: list(islice(neighbours, len(rows))) for name, (rows, _) in nearest.items()}
        if index_search is not None:
            answer |= index_search.result()
        return {name or UNLABELLED: answer[name] for name in self._classes if answer[name]}

    def _through_index(self, names: list[str | None], question: Question) -> dict[str | None, list[Neighbour]]:
        """Neighbours of the classes that are not held in memory."""
        search = self._query(question).limit(NEAREST_LOOKED_AT * question.per_class)
        condition = _condition(question)
        labels, distances, shown = self._fetch(search if condition is None else search.where(condition))
        nearest = {name: np.flatnonzero(labels == name)[: question.per_class] for name in names}
        enough = {name: rows for name, rows in nearest.items() if len(rows) == question.per_class}
        chosen = np.concatenate([[], *enough.values()]).astype(np.int64)
        neighbours = iter(_neighbours(shown(chosen), distances[chosen], self._viewer))
        answer = {name: list(islice(neighbours, len(rows))) for name, rows in enough.items()}
        return answer | {name: self._of_class(name, question) for name in names if name not in enough}

    def _of_class(self, name: str | None, question: Question) -> list[Neighbour]:
        # 0 means no upper limit: if those partitions hold fewer than `per_class` members of the class, the search goes on.
        search = self._query(question, CLASS_NPROBES_FACTOR).maximum_nprobes(0).limit(question.per_class)
        _, distances, shown = self._fetch(search.where(_class_condition(name, question)))
        return _neighbours(shown(np.arange(len(distances))), distances, self._viewer)

    def _query(self, question: Question, nprobes_factor: int = 1) -> Any:
        # LanceDB takes a number above that of the partitions for all of them.
        search = self._async_table.query().nearest_to(question.vector)
        return search.distance_type("cosine").nprobes(nprobes_factor * self._nprobes)

    def _fetch(self, search: Any) -> tuple[np.ndarray, np.ndarray, Callable[[np.ndarray], pa.Table]]:
        """Classes and distances of the rows of an answer, and a function that returns the shown columns of some of them."""
        if self._kept is None:
            table = asyncio.run(search.select([*SHOWN_COLUMNS, "_distance"]).to_arrow())
            labels = np.array(table["neurotransmitter"].to_pylist(), dtype=object)
            return labels, table["_distance"].to_numpy(), table.take
        nearest, kept = asyncio.run(search.select(["_rowid", "_distance"]).to_arrow()), self._kept
        rows = np.searchsorted(kept["_rowid"].to_numpy(), nearest["_rowid"].to_numpy())
        return self._labels[rows], nearest["_distance"].to_numpy(), lambda chosen: kept.take(rows[chosen])


def _condition(question: Question) -> Expr | None:
    """The condition that an answer must meet; None if every row may be one.

    It is an expression and not SQL (`to_sql`), because LanceDB 0.40 lets a value that contains \\' end its own quotes.
    """
    conditions: list[Expr] = []
    if question.without_id is not None:
        conditions.append(col("synapse_id") != lit(question.without_id))
    if question.without_neuron is not None:
        # A synapse without a known neuron is not of the query's neuron; no neuron has the id −1.
        conditions.append(func("coalesce", col("neuron_id"), lit(-1)) != lit(question.without_neuron))
    conditions += [col(column) == lit(value) for column, value in question.where.items()]
    return reduce(Expr.and_, conditions) if conditions else None


def _class_condition(name: str | None, question: Question) -> Expr | str:
    """The condition that an answer of this class must meet."""
    if name is None and not question.where:
        # Expressions have no IS NULL, with which the index of the column finds these rows ten times as fast. The SQL is safe
        # because only numbers are inserted.
        conditions = ["neurotransmitter IS NULL"]
        if question.without_id is not None:
            conditions.append(f"synapse_id != {int(question.without_id)}")
        if question.without_neuron is not None:
            conditions.append(f"coalesce(neuron_id, -1) != {int(question.without_neuron)}")
        return " AND ".join(conditions)
    # `concat` turns null into an empty string, which is not the name of a class.
    label = func("concat", col("neurotransmitter"), lit("")) if name is None else col("neurotransmitter")
    others = _condition(question)
    return label == lit(name or "") if others is None else (label == lit(name or "")) & others


def parse_where(conditions: Sequence[str]) -> dict[str, str]:
    """Parse conditions `column=value` into a mapping. Raises `SynpipeError` for any other form or an unknown column."""
    values = {}
    for condition in conditions:
        column, equals, value = condition.partition("=")
        if not equals:
            raise SynpipeError(f"--where {condition!r} is not of the form column=value, for example region=AL.")
        _filter_value(column.strip(), value.strip())
        values[column.strip()] = value.strip()
    return values


def _filter_value(column: str, value: str) -> str | int:
    """Convert the value to the type of its column."""
    if column not in FILTER_COLUMNS:
        raise SynpipeError(f"Cannot filter by {column!r}: use one of {', '.join(FILTER_COLUMNS)}.")
    if column != "neuron_id":
        return value
    # Python refuses to convert more than 4,300 digits.
    if not value.isascii() or not value.isdecimal() or len(value) > MAX_DIGITS or int(value) >= 2**63:
        raise SynpipeError(f"neuron_id must be a whole number below 2^63, not {value[:40]!r}.")
    return int(value)


def _synapses(table: pa.Table, viewer: Viewer | None) -> list[dict[str, Any]]:
    """Convert rows to the arguments of `Synapse`."""
    links = [None] * len(table) if viewer is None else viewer.links(table).to_pylist()
    columns = {name: table[name].to_pylist() for name in SHOWN_COLUMNS}
    positions = zip(*(columns.pop(name) for name in ("x_nm", "y_nm", "z_nm")), strict=True)
    columns |= {"position_nm": list(positions), "neuroglancer": links}
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _neighbours(table: pa.Table, distances: np.ndarray, viewer: Viewer | None) -> list[Neighbour]:
    return [
        Neighbour(**row, distance=distance)
        for row, distance in zip(_synapses(table, viewer), distances.tolist(), strict=True)
    ]
