"""The asset `classifier` of an encoder: the predicted class of every synapse, and the vote of every neuron.

Reads the `classifier:` entry of the data set, the sides of the split, and vectors from the cache. Writes a row per tile to
`predictions/<encoder>.parquet` and a row per neuron to `neuron_predictions/<encoder>.parquet`. Classes of the test side reach the
figures and nothing else. If nothing can be learned, predictions are null and a note says why.
"""

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from synpipe.analysis.charts import draw_confusion
from synpipe.analysis.classifier import FinetuneSpec, LinearSpec
from synpipe.analysis.classifier_report import confusion_table, format_interval, recall_table
from synpipe.analysis.classifier_scores import (
    PREDICTIONS,
    SIDE_NAMES,
    NeuronVotes,
    few_neurons,
    predictions_table,
    read_probabilities,
    score_test_side,
)
from synpipe.analysis.linear_probe import MAX_ROWS, Probe, fit_probe, sample_rows
from synpipe.analysis.splits import TRAIN, VALIDATION
from synpipe.assets import embeddings
from synpipe.assets.asset import (
    Asset,
    Finding,
    Leftover,
    Made,
    Table,
    Task,
    View,
    file_leftover,
    list_complete,
    view_of_figures,
)
from synpipe.assets.embeddings import embed_tiles, find_missing
from synpipe.assets.manifest import Manifest, data_version_of, file_has_version, file_metadata
from synpipe.assets.rgb_tiles import open_tiles
from synpipe.assets.synapse_stacks import read_ids
from synpipe.assets.synapses import COLUMNS
from synpipe.cluster.workers import shard_name
from synpipe.datasets import Dataset
from synpipe.embeddings.cache import EmbeddingCache
from synpipe.embeddings.encoder_specs import EncoderSpec
from synpipe.embeddings.encoders import open_encoder
from synpipe.errors import SynpipeError
from synpipe.progress import Log
from synpipe.specs import digest
from synpipe.store.files import atomic_path, table_writer, write_table
from synpipe.store.streams import RowsById, by_shard, column_of, read_batches
from synpipe.training.finetuning import HEAD, WEIGHTS, Examples, FinetuneTask, finetune, read_head

CODE_VERSION = "1"
MIN_CLASSES = 2


@dataclass(frozen=True)
class ClassifierFacts:
    """encoder_fingerprint, folder: the network that was trained further and the folder of that training; None for a linear
    probe on the encoder's own vectors."""

    encoder_fingerprint: str | None = None
    folder: str | None = None


def make(task: Task) -> Made[ClassifierFacts]:
    """Train, predict every synapse that has a tile, let neurons vote, and score the test side."""
    dataset, spec = task.dataset, task.dataset.spec.classifier
    assert spec is not None  # `exists` says so
    classes = dataset.spec.classes
    description = [spec.model_dump(mode="json"), dataset.spec.split.by, list(classes)]
    version = data_version_of("classifier", CODE_VERSION, task.inputs, description)
    path, votes_path = dataset.predictions_path(task.encoder), dataset.neuron_predictions_path(task.encoder)
    if not file_has_version(path, version):
        learning = _Learning(dataset, task.encoder, task.log)
        fit = learning.fit_finetuned(spec) if isinstance(spec, FinetuneSpec) else learning.fit(spec)
        summary = {"classifier": json.dumps({"counts": fit.figures, "notes": fit.notes})}
        metadata = file_metadata(dataset, version, task.inputs)
        votes = NeuronVotes(classes)
        # The predictions are renamed last, after the votes: a file that has this version is complete.
        with table_writer(path, PREDICTIONS, metadata | summary) as writer:
            for predictions in learning.predict(fit.probe):
                writer.write_table(predictions)
                if fit.probe is not None:
                    votes.add(predictions)
            if fit.probe is not None:
                write_table(votes_path, votes.table(), metadata)
            else:
                votes_path.unlink(missing_ok=True)
    file = pq.ParquetFile(path)
    stored = json.loads(file.schema_arrow.metadata[b"classifier"])
    figures, notes, rows = stored["counts"], stored["notes"], file.metadata.num_rows
    facts = ClassifierFacts(figures.get("encoder_fingerprint"), figures.get("folder"))
    predicted = (part["predicted_neurotransmitter"] for part in read_batches(path, ["predicted_neurotransmitter"]))
    if rows and not any(part.null_count for part in predicted):
        scores = score_test_side(read_batches(path), classes)
        figures |= scores
        notes += (
            few_neurons(scores["recalls"]) if scores else ["No labelled synapse stands on the test side: no figures."]
        )
        if scores:
            task.log(f"balanced accuracy on the test side: {format_interval(scores, 'balanced_accuracy')}")
    return Made(version, facts, rows, {"by": dataset.spec.split.by} | figures, notes)


@dataclass(frozen=True)
class _Fit:
    """A fitted classifier, or None if there was nothing to learn; its figures; notes for people."""

    probe: Probe | None
    figures: dict[str, Any]
    notes: list[str]


class _Learning:
    """The examples to learn from, and the vectors. One shard at a time is in memory, and the sample that is fitted.

    Rows are those of the index of the tiles.
    """

    def __init__(self, dataset: Dataset, encoder: str, log: Log):
        self._dataset, self._encoder, self._log = dataset, encoder, log
        self._fingerprint, self._dimensions = "", 0  # of the vectors in use
        ids = read_ids(dataset.tiles_path)
        order = np.argsort(ids)
        # A byte per tile for its class and its side, in the order of the tiles.
        self._classes = dataset.spec.classes
        labels, sides = np.empty(len(ids), np.int8), np.empty(len(ids), np.int8)
        labels[order] = _encode(column_of(dataset.synapses_path, ids[order], "neurotransmitter"), self._classes)
        sides[order] = _encode(column_of(dataset.split_path, ids[order], dataset.spec.split.by), SIDE_NAMES)
        self._sides = sides
        self._training, self._validation = (self._examples(side, labels) for side in (TRAIN, VALIDATION))
        self._counts = {"training": len(self._training.rows), "validation": len(self._validation.rows)}

    def _examples(self, side: str, codes: np.ndarray) -> Examples:
        rows = np.flatnonzero((self._sides == SIDE_NAMES.index(side)) & (codes >= 0))
        return Examples(rows, codes[rows].astype(np.int64))

    def _refusal(self) -> str | None:
        """Why nothing can be learned, or None."""
        codes = np.unique(self._training.codes)
        if len(codes) >= MIN_CLASSES:
            return None
        present = self._classes[codes[0]] if len(codes) else "none"
        return (
            f"Nothing can be learned: the training side of the split by {self._dataset.spec.split.by} has synapses of fewer "
            f"than {MIN_CLASSES} classes ({present}). Predictions are null."
        )

    def fit(self, spec: LinearSpec) -> _Fit:
        """A linear probe on the encoder's vectors."""
        figures: dict[str, Any] = {"method": spec.method, "balance": spec.balance} | self._counts
        if refusal := self._refusal():
            self._log(refusal)
            return _Fit(None, figures, [refusal])
        facts = embeddings.ASSET.read(self._dataset, self._encoder)
        self._fingerprint, self._dimensions = facts.encoder_fingerprint, facts.dimensions
        (training, codes), (validation, validation_codes) = map(self._sample, (self._training, self._validation))
        probe = fit_probe(training, codes, validation, validation_codes, len(self._classes), spec.balance)
        self._log(
            f"fitted on {len(training):,} synapses, penalty {probe.penalty:.2g}, temperature {probe.temperature:.2f}"
        )
        figures |= {"penalty": probe.penalty, "temperature": round(probe.temperature, 3)}
        notes = [] if len(self._validation.rows) else ["The validation side is empty: the penalty is the default one."]
        return _Fit(probe, figures, notes)

    def fit_finetuned(self, spec: FinetuneSpec) -> _Fit:
        """The head of the network that was trained further; that network's vectors are in use from here on."""
        entry = self._dataset.encoders[self._encoder]
        if not entry.is_network:
            fit = self.fit(LinearSpec(balance=spec.balance))
            note = "This encoder is not a network, so it cannot be trained further: this is a linear probe."
            return _Fit(fit.probe, fit.figures, [*fit.notes, note])
        figures: dict[str, Any] = {"method": spec.method, "balance": spec.balance} | self._counts
        if refusal := self._refusal():
            self._log(refusal)
            return _Fit(None, figures, [refusal])
        folder, report = self.train(spec, entry)
        encoder = open_encoder(with_weights(entry, str(folder / WEIGHTS)), self._dataset.weights_base)
        embed_tiles(self._dataset, [encoder], find_missing(self._dataset, encoder.fingerprint), self._log)
        self._fingerprint, self._dimensions = encoder.fingerprint, encoder.dim
        probe = read_head(folder / HEAD)
        # The head has an output for every class, also for those without an example.
        probe.bias[np.setdiff1d(np.arange(len(self._classes)), self._training.codes)] = -np.inf
        probe = probe.calibrated(*self._sample(self._validation))
        figures |= {name: report[name] for name in ("epochs", "best_epoch", "validation_balanced_accuracy")}
        figures |= {"temperature": round(probe.temperature, 3), "encoder_fingerprint": encoder.fingerprint}
        return _Fit(probe, figures | {"folder": str(folder.relative_to(self._dataset.folder))}, [])

    def train(self, spec: FinetuneSpec, entry: EncoderSpec) -> tuple[Path, dict[str, Any]]:
        """Train the network of `entry` further, unless that has been done: the folder of the training and its report.

        Raises `SynpipeError` if there is nothing to learn.
        """
        if refusal := self._refusal():
            raise SynpipeError(refusal)
        # The key covers everything that the outcome depends on.
        tiles = [self._hashes(part.rows) for part in (self._training, self._validation)]
        codes = [part.codes.tolist() for part in (self._training, self._validation)]
        identity = self._dataset.identity(self._encoder)
        key = digest([identity, spec.model_dump(mode="json"), list(self._classes), tiles, codes])[:16]
        folder = self._dataset.training_folder / f"{self._encoder}-{key}"
        task = FinetuneTask(
            spec=spec,
            encoder=entry,
            identity=identity,
            weights_base=self._dataset.weights_base,
            read_tiles=open_tiles(self._dataset).read,
            training=self._training,
            validation=self._validation,
            n_classes=len(self._classes),
            folder=folder,
        )
        return folder, finetune(task, self._log)

    def predict(self, probe: Probe | None) -> Iterator[pa.Table]:
        """`PREDICTIONS` of every tile, shard by shard; without a probe, predictions are null."""
        columns = ["synapse_id", "neuron_id", "neurotransmitter"]
        with RowsById(read_batches(self._dataset.synapses_path, columns), self._dataset.folder) as synapses:
            names = pa.array(SIDE_NAMES, pa.string())
            for rows, tiles, vectors in self._by_shard(None, with_vectors=probe is not None):
                ids = tiles["synapse_id"]
                labelled = synapses.take(ids.to_numpy()).set_column(0, "synapse_id", ids)
                sides = names.take(pa.array(self._sides[rows], mask=self._sides[rows] < 0))
                probabilities = None if probe is None else probe.probabilities(vectors)
                yield predictions_table(labelled, sides, probabilities, self._classes)

    def _sample(self, examples: Examples) -> tuple[np.ndarray, np.ndarray]:
        """Vectors, float32 (n, d), and classes of as many examples as are fitted."""
        chosen = sample_rows(examples.codes, MAX_ROWS)
        rows = examples.rows[chosen]
        sample = np.empty((len(rows), self._dimensions), np.float32)
        for picked, _, vectors in self._by_shard(rows):
            sample[np.searchsorted(rows, picked)] = vectors
        return sample, examples.codes[chosen]

    def _hashes(self, rows: np.ndarray) -> list[str]:
        """Content hashes of these rows, which ascend."""
        return [text for _, tiles, _ in self._by_shard(rows, False) for text in tiles["content_hash"].to_pylist()]

    def _by_shard(
        self, rows: np.ndarray | None, with_vectors: bool = True
    ) -> Iterator[tuple[np.ndarray, pa.Table, np.ndarray]]:
        """Numbers, index and vectors of these rows, which ascend, or of all rows, for each shard that has some of them."""
        cache = EmbeddingCache(self._dataset.embeddings_folder, self._fingerprint)
        first = 0
        for shard, tiles in by_shard(read_batches(self._dataset.tiles_path, ["synapse_id", "shard", "content_hash"])):
            here = np.arange(first, first + len(tiles))
            first += len(tiles)
            picked = here if rows is None else rows[slice(*np.searchsorted(rows, [here[0], first]))]
            if len(picked):
                tiles = tiles.take(picked - here[0])
                vectors = np.empty((0, 0), np.float32)
                if with_vectors:
                    vectors = cache.read(shard_name(shard), tiles["content_hash"].to_pylist())
                yield picked, tiles, vectors


def finetune_encoder(dataset: Dataset, encoder: str, name: str, spec: FinetuneSpec, log: Log) -> EncoderSpec:
    """Train the network of an encoder further and keep it as `weights/<name>.safetensors` beside the registry.

    Needs `rgb_tiles` and `split`. Returns the entry for the registry. A training that the classifier has done is not repeated.
    Raises `SynpipeError` if there is nothing to learn, or if the encoder is not a network.
    """
    entry = dataset.encoders[encoder]
    if not entry.is_network:
        raise SynpipeError(f"{encoder} is not a network, so it cannot be trained: choose another encoder.")
    folder, report = _Learning(dataset, encoder, log).train(spec, entry)
    weights = f"weights/{name}.safetensors"
    with atomic_path(dataset.weights_base / weights) as temporary:
        shutil.copyfile(folder / WEIGHTS, temporary)
    score = report["validation_balanced_accuracy"]
    figure = "" if score is None else f"; validation balanced accuracy {score:.2f}"
    description = f"{encoder}, fine-tuned on {dataset.name}, split by {dataset.spec.split.by}{figure}."
    return with_weights(entry, weights).model_copy(update={"description": description})


def with_weights(entry: EncoderSpec, weights: str) -> EncoderSpec:
    """The encoder with other weights: a file, absolute or relative to the registry."""
    return entry.model_copy(update={"weights": weights, "seed": None})


def _encode(values: np.ndarray, names: Sequence[str]) -> np.ndarray:
    """The place of each value, object (n,), among the names: int8 (n,), −1 for any other value."""
    code_by_name = {name: code for code, name in enumerate(names)}
    return np.fromiter((code_by_name.get(value, -1) for value in values), np.int8, len(values))


def predictions_are_whole(dataset: Dataset, encoder: str) -> Finding:
    """Every tile has a prediction, unless nothing could be learned; probabilities are finite and sum to one."""
    path = dataset.predictions_path(encoder)
    tiles, predicted = read_ids(dataset.tiles_path), read_ids(path)
    figures = {"tiles": len(tiles), "rows": len(predicted)}
    if not np.array_equal(np.sort(tiles), np.sort(predicted)):
        return Finding(False, "The rows of the predictions are not those of the tiles.", figures)
    missing = bad = 0
    for part in read_batches(path, ["class_probabilities"]):
        missing += part["class_probabilities"].null_count
        present = part.filter(pc.is_valid(part["class_probabilities"]))
        if len(present):
            probabilities = read_probabilities(present)
            sums_to_one = np.abs(probabilities.sum(axis=1) - 1) < 1e-3
            bad += int((~(np.isfinite(probabilities).all(axis=1) & sums_to_one)).sum())
    if missing == len(predicted):
        return Finding(True, "Nothing could be learned: there are no predictions.", figures)
    if missing:
        return Finding(False, f"{missing:,} tiles have no prediction.", figures)
    if bad:
        return Finding(False, f"The probabilities of {bad:,} tiles are not finite, or do not sum to one.", figures)
    return Finding(True, f"{len(predicted):,} predictions; the probabilities of each sum to one.", figures)


def find_leftovers(dataset: Dataset, fresh: bool) -> Iterator[Leftover]:
    """Files of trainings that have ended and that no classifier uses."""
    if not fresh:
        return
    folders = [facts.folder for encoder in dataset.encoders if (facts := ASSET.find(dataset, encoder))]
    used = {dataset.folder / folder for folder in folders if folder is not None}
    for folder in sorted({path.parent for path in dataset.training_folder.glob("*/report.json")} - used):
        for path in list_complete(folder, "**/*"):
            if path.is_file():
                yield file_leftover(path, "of a training that no classifier uses")


def show(dataset: Dataset, encoder: str, manifest: Manifest) -> View:
    figures, entries = manifest.figures, view_of_figures(manifest)
    if "confusion" in figures:
        entries["recalls"] = Table(*recall_table(figures))
        entries["confusion"] = Table(*confusion_table(figures))
        picture = draw_confusion(figures, f"{dataset.name}, {encoder}, split by {figures['by']}")
        entries = {"confusion_matrix": picture} | entries
    columns = ("synapse_id", "split", "neurotransmitter", "predicted_neurotransmitter", "predicted_probability")
    return View(entries, dataset.predictions_path(encoder), columns)


PREDICTED_COLUMNS = {
    "predicted_neurotransmitter": "The class that the classifier predicts; `neurotransmitter` is the annotated one.",
    "predicted_probability": "Probability of the predicted class, if all classes were equally frequent.",
    "class_probabilities": "Probability of every class, in the order of the data set's `classes`.",
    "split": "Side on which the synapse stood: predictions of `train` rows are no evidence.",
}

ASSET = Asset(
    name="classifier",
    per_encoder=True,
    exists=lambda dataset, encoder: dataset.spec.classifier is not None,
    description="The class of every synapse, predicted from its vector, the vote of every neuron, and how good both are on the "
    "test side.",
    storage=frozenset({"parquet", "scikitlearn"}),
    facts=ClassifierFacts,
    reads=lambda dataset, encoder: ("synapses", "rgb_tiles", "split", f"embeddings_{encoder}"),
    optional_reads=False,
    version_covers_reads=True,
    code_version=CODE_VERSION,
    still_valid=(),
    specs=lambda dataset, encoder: [
        dataset.identity(encoder),
        dataset.spec.classifier,
        dataset.spec.split.by,
        dataset.spec.classes,
    ],
    make=make,
    source_version=None,
    checks={"predictions_are_whole": predictions_are_whole},
    files=lambda dataset, encoder: (dataset.predictions_path(encoder), dataset.neuron_predictions_path(encoder)),
    names_tiles=False,
    leftovers=find_leftovers,
    columns={name: COLUMNS[name] for name in ("synapse_id", "neuron_id", "neurotransmitter")} | PREDICTED_COLUMNS,
    table_columns=(
        pa.field("predicted_neurotransmitter", pa.string()),
        pa.field("predicted_probability", pa.float32()),
        # No fixed size, so that the schema is the same for every data set and a null takes no space.
        pa.field("class_probabilities", pa.list_(pa.float32())),
        pa.field("split", pa.string()),
    ),
    show=show,
)
