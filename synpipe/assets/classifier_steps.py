"""The classifier of an encoder: who is taught what, and what is then said of every synapse, labelled or not.

In: the data set's `classifier:`, the sides of the split, vectors from the cache of embeddings. Out: a row per tile in
`predictions/<encoder>.parquet`, one per neuron in `neuron_predictions/<encoder>.parquet`, and the figures of the test
side. Guarantees: classes of the test side reach the figures and nothing else; where nothing can be learned, predictions
are null, and a note says why.
"""

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from synpipe.analysis.classifier import FinetuneSpec, LinearSpec
from synpipe.analysis.classifier_report import format_interval
from synpipe.analysis.classifier_scores import (
    PREDICTIONS,
    SIDE_NAMES,
    NeuronVotes,
    few_neurons,
    predictions_table,
    score_test_side,
)
from synpipe.analysis.linear_probe import MAX_ROWS, Probe, fit_probe, sample_rows
from synpipe.analysis.splits import TRAIN, VALIDATION
from synpipe.assets.manifest import read_manifest
from synpipe.assets.pipeline import (
    CODE_VERSIONS,
    Inputs,
    Made,
    embed_tiles,
    is_of_version,
    metadata_of,
    open_tiles,
    shard_name,
    tiles_to_embed,
)
from synpipe.datasets import Dataset
from synpipe.embeddings.cache import EmbeddingCache
from synpipe.embeddings.encoders import EncoderSpec, open_encoder
from synpipe.errors import SynpipeError
from synpipe.progress import Log
from synpipe.specs import digest
from synpipe.store.files import atomic_path, table_writer, write_table
from synpipe.store.streams import RowsById, by_shard, column_of, read_parts
from synpipe.training.finetuning import HEAD, WEIGHTS, Examples, finetune, read_head

MIN_CLASSES = 2


def make_classifier(dataset: Dataset, name: str, inputs: Inputs, log: Log) -> Made:
    """Train, predict every synapse that has a tile, let neurons vote, and score the test side."""
    spec = dataset.spec.classifier
    assert spec is not None  # else the graph has no such step
    classes = dataset.spec.classes
    described = [spec.model_dump(mode="json"), dataset.spec.split.by, list(classes)]
    version = digest(["classifier", CODE_VERSIONS["classifier"], dict(inputs), described])
    path = dataset.predictions_path(name)
    if not is_of_version(path, version):
        learn = _Learning(dataset, name, log)
        probe, counts, notes = learn.fit_finetuned(spec) if isinstance(spec, FinetuneSpec) else learn.fit(spec)
        told = {"classifier": json.dumps({"counts": counts, "notes": notes})}
        votes = NeuronVotes(classes)
        # Renamed last, after the votes: what is of this version is whole.
        with table_writer(path, PREDICTIONS, metadata_of(dataset, version, inputs) | told) as writer:
            for predictions in learn.predict(probe):
                writer.write_table(predictions)
                if probe is not None:
                    votes.add(predictions)
            if probe is not None:
                write_table(dataset.neuron_predictions_path(name), votes.table(), metadata_of(dataset, version, inputs))
            else:
                dataset.neuron_predictions_path(name).unlink(missing_ok=True)
    file = pq.ParquetFile(path)
    told = json.loads(file.schema_arrow.metadata[b"classifier"])
    counts, notes, rows = told["counts"], told["notes"], file.metadata.num_rows
    predicted = (part["predicted_neurotransmitter"] for part in read_parts(path, ["predicted_neurotransmitter"]))
    if rows and not any(part.null_count for part in predicted):
        scores = score_test_side(read_parts(path), classes)
        counts |= scores
        notes += (
            few_neurons(scores["recalls"]) if scores else ["No labelled synapse stands on the test side: no figures."]
        )
        if scores:
            log(f"balanced accuracy on the test side: {format_interval(scores, 'balanced_accuracy')}")
    return Made(version, {"rows": rows, "by": dataset.spec.split.by} | counts, notes)


class _Learning:
    """What is learned from, and how vectors are read: one shard at a time is in memory, and the sample that is fitted.

    Rows are those of the index of the tiles.
    """

    def __init__(self, dataset: Dataset, name: str, log: Log):
        self._dataset, self._name, self._log = dataset, name, log
        self._fingerprint, self._dimensions = "", 0  # of the vectors in use
        ids = np.concatenate([part["synapse_id"].to_numpy() for part in read_parts(dataset.tiles_path, ["synapse_id"])])
        order = np.argsort(ids)
        # Codes, a byte of each tile, of the class and of the side, in the order of the tiles.
        self._classes = dataset.spec.classes
        labels, sides = np.empty(len(ids), np.int8), np.empty(len(ids), np.int8)
        labels[order] = _numbered(column_of(dataset.synapses_path, ids[order], "neurotransmitter"), self._classes)
        sides[order] = _numbered(column_of(dataset.split_path, ids[order], dataset.spec.split.by), SIDE_NAMES)
        self._sides = sides
        self._training, self._validation = (self._examples(side, labels) for side in (TRAIN, VALIDATION))
        self._counts = {"training": len(self._training.rows), "validation": len(self._validation.rows)}

    def _examples(self, side: str, codes: np.ndarray) -> Examples:
        rows = np.flatnonzero((self._sides == SIDE_NAMES.index(side)) & (codes >= 0))
        return Examples(rows, codes[rows].astype(np.int64))

    def _refusal(self) -> str | None:
        found = np.unique(self._training.codes)
        if len(found) >= MIN_CLASSES:
            return None
        what = self._classes[found[0]] if len(found) else "none"
        return (
            f"Nothing can be learned: the training side, split by {self._dataset.spec.split.by}, holds synapses of fewer "
            f"than {MIN_CLASSES} classes ({what}). Predictions are null."
        )

    def fit(self, spec: LinearSpec) -> tuple[Probe | None, dict[str, Any], list[str]]:
        """A probe on the encoder's vectors, or None where there is nothing to learn; counts; notes."""
        counts: dict[str, Any] = {"method": spec.method, "balance": spec.balance} | self._counts
        if refusal := self._refusal():
            self._log(refusal)
            return None, counts, [refusal]
        made = read_manifest(self._dataset, f"embeddings_{self._name}").counts
        self._fingerprint, self._dimensions = made["encoder_fingerprint"], made["dimensions"]
        (training, codes), (validation, validation_codes) = map(self._sample, (self._training, self._validation))
        probe = fit_probe(
            training,
            codes,
            validation,
            validation_codes,
            len(self._classes),
            spec.balance,
        )
        self._log(
            f"fitted on {len(training):,} synapses, penalty {probe.penalty:.2g}, temperature {probe.temperature:.2f}"
        )
        counts |= {"penalty": probe.penalty, "temperature": round(probe.temperature, 3)}
        notes = [] if len(self._validation.rows) else ["The validation side is empty: the penalty is the default one."]
        return probe, counts, notes

    def fit_finetuned(self, spec: FinetuneSpec) -> tuple[Probe | None, dict[str, Any], list[str]]:
        """The layer on the network that was trained further, whose vectors are in use from here on; the rest as in `fit`."""
        entry = self._dataset.encoders[self._name]
        if not isinstance(entry, EncoderSpec):
            probe, counts, notes = self.fit(LinearSpec(balance=spec.balance))
            return probe, counts, [*notes, "This encoder is no network that could be trained: this is a linear probe."]
        counts = {"method": spec.method, "balance": spec.balance} | self._counts
        if refusal := self._refusal():
            self._log(refusal)
            return None, counts, [refusal]
        folder, report = self.train(spec, entry)
        encoder = open_encoder(trained_entry(entry, str(folder / WEIGHTS)), self._dataset.weights_base)
        embed_tiles(self._dataset, [encoder], tiles_to_embed(self._dataset, encoder.fingerprint), self._log)
        self._fingerprint, self._dimensions = encoder.fingerprint, encoder.dim
        probe = read_head(folder / HEAD)
        # The layer has an output for every class, also where there was none to learn.
        probe.bias[np.setdiff1d(np.arange(len(self._classes)), self._training.codes)] = -np.inf
        probe = probe.calibrated(*self._sample(self._validation))
        counts |= {name: report[name] for name in ("epochs", "best_epoch", "validation_balanced_accuracy")}
        counts |= {"temperature": round(probe.temperature, 3), "encoder_fingerprint": encoder.fingerprint}
        return probe, counts | {"folder": str(folder.relative_to(self._dataset.folder))}, []

    def train(self, spec: FinetuneSpec, entry: EncoderSpec) -> tuple[Path, dict[str, Any]]:
        """Train the network of `entry` further, unless that has been done: the folder of the run, its report.

        Raises `SynpipeError` where there is nothing to learn.
        """
        if refusal := self._refusal():
            raise SynpipeError(refusal)
        # All that the outcome depends on.
        tiles = [self._hashes(part.rows) for part in (self._training, self._validation)]
        codes = [part.codes.tolist() for part in (self._training, self._validation)]
        who = self._dataset.identity(self._name)
        key = digest([who, spec.model_dump(mode="json"), list(self._classes), tiles, codes])[:16]
        folder = self._dataset.training_folder / f"{self._name}-{key}"
        report = finetune(
            spec,
            entry,
            self._dataset.weights_base,
            open_tiles(self._dataset).read,
            self._training,
            self._validation,
            len(self._classes),
            folder,
            self._log,
        )
        return folder, report

    def predict(self, probe: Probe | None) -> Iterator[pa.Table]:
        """`PREDICTIONS` of every tile, shard by shard; without a probe those of nothing learned."""
        columns = ["synapse_id", "neuron_id", "neurotransmitter"]
        with RowsById(read_parts(self._dataset.synapses_path, columns), self._dataset.folder) as synapses:
            names = pa.array(SIDE_NAMES, pa.string())
            for rows, tiles, vectors in self._by_shard(None, with_vectors=probe is not None):
                ids = tiles["synapse_id"]
                found = synapses.take(ids.to_numpy()).set_column(0, "synapse_id", ids)
                sides = names.take(pa.array(self._sides[rows], mask=self._sides[rows] < 0))
                probabilities = None if probe is None else probe.probabilities(vectors)
                yield predictions_table(found, sides, probabilities, self._classes)

    def _sample(self, examples: Examples) -> tuple[np.ndarray, np.ndarray]:
        """Vectors, float32 (n, d), and classes of as many as are fitted."""
        chosen = sample_rows(examples.codes, MAX_ROWS)
        rows = examples.rows[chosen]
        found = np.empty((len(rows), self._dimensions), np.float32)
        for picked, _, vectors in self._by_shard(rows):
            found[np.searchsorted(rows, picked)] = vectors
        return found, examples.codes[chosen]

    def _hashes(self, rows: np.ndarray) -> list[str]:
        """Content hashes of these rows, which ascend."""
        return [text for _, tiles, _ in self._by_shard(rows, False) for text in tiles["content_hash"].to_pylist()]

    def _by_shard(
        self, rows: np.ndarray | None, with_vectors: bool = True
    ) -> Iterator[tuple[np.ndarray, pa.Table, np.ndarray]]:
        """Numbers, index and vectors of these rows, which ascend, or of all, for each shard that has some of them."""
        cache = EmbeddingCache(self._dataset.embeddings_folder, self._fingerprint)
        first = 0
        for shard, tiles in by_shard(read_parts(self._dataset.tiles_path, ["synapse_id", "shard", "content_hash"])):
            here = np.arange(first, first + len(tiles))
            first += len(tiles)
            picked = here if rows is None else rows[slice(*np.searchsorted(rows, [here[0], first]))]
            if len(picked):
                tiles = tiles.take(picked - here[0])
                vectors = np.empty((0, 0), np.float32)
                if with_vectors:
                    vectors = cache.read(shard_name(shard), tiles["content_hash"].to_pylist())
                yield picked, tiles, vectors


def finetuned_encoder(dataset: Dataset, encoder: str, name: str, spec: FinetuneSpec, log: Log) -> EncoderSpec:
    """Train the network of an encoder further and keep it as `weights/<name>.safetensors` beside the registry.

    Needs `rgb_tiles` and `split`. Returns the entry for the registry. What the classifier has trained in this way is not
    trained again. Raises `SynpipeError` where there is nothing to learn, or the encoder is not a network.
    """
    entry = dataset.encoders[encoder]
    if not isinstance(entry, EncoderSpec):
        raise SynpipeError(f"{encoder} is no network that could be trained: choose another encoder.")
    folder, report = _Learning(dataset, encoder, log).train(spec, entry)
    weights = f"weights/{name}.safetensors"
    with atomic_path(dataset.weights_base / weights) as temporary:
        shutil.copyfile(folder / WEIGHTS, temporary)
    score = report["validation_balanced_accuracy"]
    figure = "" if score is None else f"; validation balanced accuracy {score:.2f}"
    told = f"{encoder}, fine-tuned on {dataset.name}, split by {dataset.spec.split.by}{figure}."
    return trained_entry(entry, weights).model_copy(update={"description": told})


def trained_entry(entry: EncoderSpec, weights: str) -> EncoderSpec:
    """The encoder with other weights: a file, absolute or relative to the registry."""
    return entry.model_copy(update={"weights": weights, "seed": None})


def _numbered(values: np.ndarray, names: Sequence[str]) -> np.ndarray:
    """Number of each value, object (n,), among the names: int8 (n,), −1 for any other."""
    number = {name: place for place, name in enumerate(names)}
    return np.fromiter((number.get(value, -1) for value in values), np.int8, len(values))
