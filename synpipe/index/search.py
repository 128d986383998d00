"""Similar synapses: the most similar ones of each class, from the published LanceDB table.

In: a data set, one of its encoders, the id of a synapse. Out: neighbours per class, nearest first. Guarantees: the answer
comes from one published version of the table; a filter value is compared, never pasted into a filter string.

The vectors of a class are held in memory and searched exactly where the table has up to `EXACT_ROWS` rows, or the class
up to `EXACT_CLASS_ROWS`. An exact scan was measured to be faster than any index for this question (seven milliseconds for the
top 4 of six classes of 103,511 × 192), it is right for rare classes too, where an index misses up to a fifth, and it allows L1.
The index answers for the other classes: a few hundred nearest of all classes hold the nearest of every frequent one; a class
that they hold too few of is searched for alone.
"""

import asyncio
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, reduce
from itertools import islice
from typing import Any, Literal, get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from lancedb.expr import Expr, col, func, lit

from synpipe.annotations.schema import UNLABELLED
from synpipe.datasets import Dataset
from synpipe.embeddings.vectors import read_vectors
from synpipe.errors import NotFound, SynpipeError
from synpipe.index.exact_search import ExactSearch
from synpipe.index.publish import open_current, open_version, read_provenance
from synpipe.reports.links import Viewer, find_viewer

Metric = Literal["cosine", "l2", "dot", "l1"]
METRICS: tuple[str, ...] = get_args(Metric)
EXACT_ROWS = 300_000
EXACT_CLASS_ROWS = 60_000
KEPT_ROWS = 5_000_000
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
NEAREST_LOOKED_AT = 50  # of all classes together, for each one wanted of a class
# The probes that find the ten nearest of all are too few for a rare class, whose nearest are further away: with 16 of 256
# partitions one of 1 % had a recall of .81, with 128 of 1.0.
CLASS_NPROBES_FACTOR = 8
FOUND_KEPT = 64


@dataclass(frozen=True, kw_only=True)
class Synapse:
    """neurotransmitter: the known one. predicted_…: what the classifier of the encoder says; None where there is none."""

    synapse_id: int
    neuron_id: int | None
    neurotransmitter: str | None
    predicted_neurotransmitter: str | None
    predicted_probability: float | None
    hemilineage: str | None
    region: str | None
    position_nm: tuple[float, float, float]  # x, y, z
    neuroglancer: str | None  # link to its place; None where the volume is in local files


@dataclass(frozen=True, kw_only=True)
class Neighbour(Synapse):
    """A synapse of the answer. distance: 1 − cosine, Euclidean, −inner product or Manhattan; smaller is more similar."""

    distance: float


@dataclass(frozen=True)
class _Question:
    query: np.ndarray  # float32 (d,)
    metric: str
    per_class: int
    wanted: Mapping[str, str | int]
    without_id: int | None = None
    without_neuron: int | None = None


class SynapseIndex:
    """One published version of the index of an encoder; safe to use from several threads.

    cosine compares directions. l2, dot and l1 compare the vectors as the encoder gave them, with their length.
    """

    def __init__(self, dataset: Dataset, encoder: str, in_memory: bool = True):
        """in_memory: hold what the module says, which pays for many questions; else everything is asked of the index.

        Raises `SynpipeError` where the index has not been built.
        """
        self._table = open_current(dataset.lancedb_folder, encoder)
        self._classes: list[str | None] = [*dataset.spec.classes, None]
        self._viewer = find_viewer(dataset)
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
        # The columns are those of the first batch, of which nothing may be held.
        self._held = ExactSearch(islice(self._batches(), None if held else 1), held, self.dimensions)
        # The same synapse is asked for again with other options, and by `synapse`; what it finds never changes.
        self._find = lru_cache(maxsize=FOUND_KEPT)(self._look_up)
        # Always in a thread: a notebook has a loop of its own running.
        self._threads = ThreadPoolExecutor(thread_name_prefix="search")
        # The table again: its plain form asks for the schema four times in each query, a third of the time that takes.
        opening = open_version(dataset.lancedb_folder, encoder, self.version)
        self._searched = self._threads.submit(asyncio.run, opening).result()

    def _counts(self) -> dict[str | None, int]:
        counted = pc.value_counts(self.columns(["neurotransmitter"])["neurotransmitter"]).to_pylist()
        found = {each["values"]: each["counts"] for each in counted}
        return {name: found.get(name, 0) for name in self._classes}

    def _batches(self) -> Iterator[tuple[pa.RecordBatch, np.ndarray]]:
        columns = dict.fromkeys([*SHOWN_COLUMNS, *FILTER_COLUMNS, "norm", "vector"])
        for batch in self._table.search().select(list(columns)).to_batches(batch_size=8192):
            yield batch.drop_columns(["vector"]), read_vectors(batch)

    def _keep(self) -> pa.Table:
        """What is shown of every row, so that LanceDB need find their numbers only: 60 bytes a row, and half the time."""
        rows = self._table.search().select(list(SHOWN_COLUMNS)).with_row_id(True).to_arrow()
        fields = [
            f if f.type != pa.string() else f.with_type(pa.dictionary(pa.int32(), pa.string())) for f in rows.schema
        ]
        return rows.cast(pa.schema(fields)).unify_dictionaries().combine_chunks().sort_by("_rowid")

    def columns(self, names: Sequence[str]) -> pa.Table:
        """These columns of all rows, in the order of the table."""
        return self._table.search().select(list(names)).to_arrow()

    def synapse(self, synapse_id: int) -> Synapse:
        """Raises `NotFound` for an unknown one."""
        return Synapse(**_synapses(self._find(synapse_id)[0], self._viewer)[0])

    def any_id(self, random: np.random.Generator) -> int:
        """The id of a synapse, each as likely as any other."""
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
        """The `per_class` most similar synapses of each class, the query itself left out.

        where: wanted values by column (`FILTER_COLUMNS`). other_neurons: the query's own neuron is left out, too. Returns
        the classes of the data set in their order, then `unlabelled`; classes without an answer are left out.
        Raises `SynpipeError` for an unknown synapse, metric or column, `per_class` below 1, or a metric other than cosine
        on a table too large for an exact search.
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
        """The synapses whose vectors are most similar to `vector`, (d,), with its length as the encoder gave it.

        fingerprint: of the encoder that made the vector, `Encoder.fingerprint`; vectors of two encoders are of two spaces,
        whatever their number of dimensions. The rest as in `search`.
        Raises `SynpipeError` also where the fingerprint is not that of the index, or the vector has another number of
        dimensions, is not finite, or has no length.
        """
        if fingerprint != self.fingerprint:
            raise SynpipeError(
                f"The vector was made by the encoder {fingerprint[:12]}, this index of {self.provenance['encoder']} by "
                f"{self.fingerprint[:12]}: their vectors cannot be compared. Embed the query with the encoder of the index, "
                "or search in the index of its own."
            )
        return self._answer(self._question(vector, metric, per_class, where))

    def _question(
        self, vector: np.ndarray, metric: str, per_class: int, where: Mapping[str, str] | None, *without: int | None
    ) -> _Question:
        if metric not in METRICS:
            raise SynpipeError(f"Unknown metric {metric!r}: use one of {', '.join(METRICS)}.")
        if metric not in self.metrics:
            raise SynpipeError(
                f"The metric {metric} needs an exact search, which is made up to {EXACT_ROWS:,} rows; this index has "
                f"{self.rows:,}. Use cosine."
            )
        if per_class < 1:
            raise SynpipeError(f"The number of neighbours of each class must be at least 1, not {per_class}.")
        query = np.asarray(vector, np.float32)
        if query.shape != (self.dimensions,):
            raise SynpipeError(f"The vector has shape {query.shape}; this index needs ({self.dimensions},).")
        if not (np.isfinite(query).all() and query.any()):
            raise SynpipeError("The vector is zero, or holds values that are not finite: nothing is similar to it.")
        wanted = {column: _filter_value(column, value) for column, value in (where or {}).items()}
        return _Question(query, metric, per_class, wanted, *without)

    def _look_up(self, synapse_id: int) -> tuple[pa.Table, np.ndarray]:
        """The row of a synapse, and its vector with its length."""
        held = np.flatnonzero(self._held.ids == synapse_id)
        if len(held):
            return self._held.rows.slice(held[0], 1), self._held.vector(held[0])
        if self._kept is not None:
            known = np.flatnonzero(self._kept["synapse_id"].to_numpy() == synapse_id)
            if len(known):
                row = self._kept.slice(known[0], 1)
                found = self._table.take_row_ids(row["_rowid"].to_pylist()).select(["vector", "norm"]).to_arrow()
                return row, read_vectors(found)[0] * found["norm"][0].as_py()
        elif not self.exact and -(2**63) <= synapse_id < 2**63:
            row = self._table.search().where(col("synapse_id") == lit(synapse_id)).limit(1).to_arrow()
            if len(row):
                return row, read_vectors(row)[0] * row["norm"][0].as_py()
        raise NotFound(
            f"Synapse {synapse_id} is not in the index of {self.provenance['encoder']}: it is unknown or was rejected."
        )

    def _answer(self, question: _Question) -> dict[str, list[Neighbour]]:
        by_index = [name for name in self._classes if name not in self._held.places]
        begun = self._threads.submit(self._through_index, by_index, question) if by_index else None
        found = self._held.nearest(**vars(question))
        rows, distances = (np.concatenate([[], *part]) for part in zip(([], []), *found.values(), strict=True))
        held = iter(_neighbours(self._held.rows.take(rows.astype(np.int64)), distances, self._viewer))
        answer = {name: list(islice(held, len(rows))) for name, (rows, _) in found.items()}
        if begun is not None:
            answer |= begun.result()
        return {name or UNLABELLED: answer[name] for name in self._classes if answer[name]}

    def _through_index(self, names: list[str | None], question: _Question) -> dict[str | None, list[Neighbour]]:
        search = self._query(question).limit(NEAREST_LOOKED_AT * question.per_class)
        condition = _condition(question)
        labels, distances, shown = self._fetch(search if condition is None else search.where(condition))
        nearest = {name: np.flatnonzero(labels == name)[: question.per_class] for name in names}
        enough = {name: rows for name, rows in nearest.items() if len(rows) == question.per_class}
        chosen = np.concatenate([[], *enough.values()]).astype(np.int64)
        found = iter(_neighbours(shown(chosen), distances[chosen], self._viewer))
        answer = {name: list(islice(found, len(rows))) for name, rows in enough.items()}
        return answer | {name: self._of_class(name, question) for name in names if name not in enough}

    def _of_class(self, name: str | None, question: _Question) -> list[Neighbour]:
        # No upper limit: where a class has no `per_class` members in those partitions, the search goes on.
        search = self._query(question, CLASS_NPROBES_FACTOR).maximum_nprobes(0).limit(question.per_class)
        _, distances, shown = self._fetch(search.where(_class_condition(name, question)))
        return _neighbours(shown(np.arange(len(distances))), distances, self._viewer)

    def _query(self, question: _Question, nprobes_factor: int = 1) -> Any:
        # What is more than there are is taken for all.
        found = self._searched.query().nearest_to(question.query)
        return found.distance_type("cosine").nprobes(nprobes_factor * self._nprobes)

    def _fetch(self, search: Any) -> tuple[np.ndarray, np.ndarray, Callable[[np.ndarray], pa.Table]]:
        """Classes and distances of the rows found, and a function that gives what is shown of some of them."""
        if self._kept is None:
            table = asyncio.run(search.select([*SHOWN_COLUMNS, "_distance"]).to_arrow())
            labels = np.array(table["neurotransmitter"].to_pylist(), dtype=object)
            return labels, table["_distance"].to_numpy(), table.take
        found, kept = asyncio.run(search.select(["_rowid", "_distance"]).to_arrow()), self._kept
        rows = np.searchsorted(kept["_rowid"].to_numpy(), found["_rowid"].to_numpy())
        return self._labels[rows], found["_distance"].to_numpy(), lambda chosen: kept.take(rows[chosen])


def _condition(question: _Question) -> Expr | None:
    """What may be an answer; None: everything.

    Conditions are expressions: as SQL (`to_sql`), LanceDB 0.40 lets a value that holds \\' end its own quotes.
    """
    conditions: list[Expr] = []
    if question.without_id is not None:
        conditions.append(col("synapse_id") != lit(question.without_id))
    if question.without_neuron is not None:
        # A synapse of no known neuron is none of the query's; no neuron has the id −1.
        conditions.append(func("coalesce", col("neuron_id"), lit(-1)) != lit(question.without_neuron))
    conditions += [col(column) == lit(value) for column, value in question.wanted.items()]
    return reduce(Expr.and_, conditions) if conditions else None


def _class_condition(name: str | None, question: _Question) -> Expr | str:
    """Members of a class that may be an answer."""
    if name is None and not question.wanted:
        # Expressions have no IS NULL, by which the index of the column finds them: ten times as fast. Only numbers are put in.
        conditions = ["neurotransmitter IS NULL"]
        if question.without_id is not None:
            conditions.append(f"synapse_id != {int(question.without_id)}")
        if question.without_neuron is not None:
            conditions.append(f"coalesce(neuron_id, -1) != {int(question.without_neuron)}")
        return " AND ".join(conditions)
    # `concat` takes a null for an empty string, which is no class.
    label = func("concat", col("neurotransmitter"), lit("")) if name is None else col("neurotransmitter")
    others = _condition(question)
    return label == lit(name or "") if others is None else (label == lit(name or "")) & others


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


def _synapses(table: pa.Table, viewer: Viewer | None) -> list[dict[str, Any]]:
    """Rows as arguments of `Synapse`."""
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
