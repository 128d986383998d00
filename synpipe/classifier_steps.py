"""The classifier of an encoder: who is taught what, and what is then said of every synapse, labelled or not.

In: the data set's `classifier:`, the sides of the split, vectors from the cache of embeddings. Out: a row per tile in
`predictions/<encoder>.parquet`, one per neuron in `neuron_predictions/<encoder>.parquet`, and the figures of the test
side. Guarantees: classes of the test side reach the figures and nothing else; where nothing can be learned, predictions
are null, and a note says why.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from synpipe.classifier import FinetuneSpec, LinearSpec, Probe, fit_linear, sample_rows
from synpipe.classifier_report import interval_text
from synpipe.classifier_scores import codes_of, few_neurons, predictions_table, score_test_side, votes_of_neurons
from synpipe.datasets import Dataset
from synpipe.embedding_cache import EmbeddingCache
from synpipe.encoders import EncoderSpec, open_encoder
from synpipe.errors import SynpipeError
from synpipe.finetuning import HEAD, WEIGHTS, Examples, finetune, read_head
from synpipe.manifests import read_manifest
from synpipe.pipeline import (
    CODE_VERSIONS,
    Inputs,
    Log,
    Made,
    embed_tiles,
    is_of_version,
    metadata_of,
    open_tiles,
    shard_name,
)
from synpipe.shards import atomic_path, read_table, write_table
from synpipe.specs import digest
from synpipe.splits import TRAIN, VALIDATION

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
        probabilities = None if probe is None else learn.predict(probe)
        predictions = predictions_table(learn.synapses, learn.sides, probabilities, classes)
        if probe is not None:
            votes = votes_of_neurons(predictions, classes)
            write_table(dataset.neuron_predictions_path(name), votes, metadata_of(dataset, version, inputs))
        else:
            dataset.neuron_predictions_path(name).unlink(missing_ok=True)
        told = {"classifier": json.dumps({"counts": counts, "notes": notes})}
        # Last: what is of this version is whole.
        write_table(path, predictions, metadata_of(dataset, version, inputs) | told)
    predictions = read_table(path)
    told = json.loads(predictions.schema.metadata[b"classifier"])
    counts, notes = told["counts"], told["notes"]
    if len(predictions) and predictions["predicted_neurotransmitter"].null_count == 0:
        scores = score_test_side(predictions, classes)
        counts |= scores
        notes += (
            few_neurons(scores["recalls"]) if scores else ["No labelled synapse stands on the test side: no figures."]
        )
        if scores:
            log(f"balanced accuracy on the test side: {interval_text(scores, 'balanced_accuracy')}")
    return Made(version, {"rows": len(predictions), "by": dataset.spec.split.by} | counts, notes)


class _Learning:
    """What is learned from, and how vectors are read: one shard at a time is in memory."""

    def __init__(self, dataset: Dataset, name: str, log: Log):
        self._dataset, self._name, self._log = dataset, name, log
        tiles = read_table(dataset.tiles_path, ["synapse_id", "shard", "content_hash"])
        self._hashes = np.array(tiles["content_hash"].to_pylist())
        self._shards = tiles["shard"].to_numpy()
        self._fingerprint, self._dimensions = "", 0  # of the vectors in use
        synapses = read_table(dataset.synapses_path, ["synapse_id", "neuron_id", "neurotransmitter"])
        split = read_table(dataset.split_path, ["synapse_id", dataset.spec.split.by])
        self.synapses = _rows_of(synapses, tiles["synapse_id"])
        self.sides = _rows_of(split, tiles["synapse_id"])[dataset.spec.split.by]
        self._classes = dataset.spec.classes
        codes = codes_of(self.synapses["neurotransmitter"], self._classes)
        self._training, self._validation = (self._examples(side, codes) for side in (TRAIN, VALIDATION))
        self._counts = {"training": len(self._training.rows), "validation": len(self._validation.rows)}

    def _examples(self, side: str, codes: np.ndarray) -> Examples:
        here = pc.fill_null(pc.equal(self.sides, side), False).to_numpy(zero_copy_only=False) & (codes >= 0)
        rows = np.flatnonzero(here)
        return Examples(rows, codes[rows])

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
        chosen = sample_rows(self._training.codes)
        training = self._vectors(self._training.rows[chosen])
        probe = fit_linear(
            training,
            self._training.codes[chosen],
            self._vectors(self._validation.rows),
            self._validation.codes,
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
        embed_tiles(self._dataset, [encoder], self._log)
        self._fingerprint, self._dimensions = encoder.fingerprint, encoder.dim
        probe = read_head(folder / HEAD)
        # The layer has an output for every class, also where there was none to learn.
        probe.bias[np.setdiff1d(np.arange(len(self._classes)), self._training.codes)] = -np.inf
        probe = probe.calibrated(self._vectors(self._validation.rows), self._validation.codes)
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
        tiles = [self._hashes[part.rows].tolist() for part in (self._training, self._validation)]
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

    def predict(self, probe: Probe) -> np.ndarray:
        """Probabilities of every tile, float32 (n, classes)."""
        found = np.empty((len(self._hashes), len(self._classes)), np.float32)
        for rows, vectors in self._by_shard(np.arange(len(self._hashes))):
            found[rows] = probe.probabilities(vectors)
        return found

    def _vectors(self, rows: np.ndarray) -> np.ndarray:
        """float32 (n, d) of these tiles, in the order of `rows`, which ascends."""
        found = np.empty((len(rows), self._dimensions), np.float32)
        for picked, vectors in self._by_shard(rows):
            found[np.searchsorted(rows, picked)] = vectors
        return found

    def _by_shard(self, rows: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        cache = EmbeddingCache(self._dataset.embeddings_folder, self._fingerprint)
        for shard in np.unique(self._shards[rows]).tolist():
            picked = rows[self._shards[rows] == shard]
            yield picked, cache.read(shard_name(shard), self._hashes[picked].tolist())


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


def _rows_of(table: pa.Table, ids: pa.ChunkedArray) -> pa.Table:
    """Rows of `table` for these synapses, all null for one that it does not have."""
    return table.take(pc.index_in(ids, value_set=table["synapse_id"])).set_column(0, "synapse_id", ids)
