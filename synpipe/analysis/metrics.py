"""Metrics of predictions: confusion matrix, recall per class, balanced accuracy, and means with bootstrap intervals.

Inputs are arrays: true and predicted class codes, or a value per row with its class and its group. Outputs are arrays,
floats and `Estimate`s. The same arrays and the same seed always give the same figures.

A class code is the position of a class in the list of classes; −1 stands for "no class".
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

CONFIDENCE = 0.95
RESAMPLES = 1000  # each end of a 95 % interval then rests on 25 resamples
RESAMPLED_AT_ONCE = 2**20  # groups × bootstrap samples that are in memory at a time


def confusion_matrix(truth: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
    """Count rows by true class (row) and predicted class (column): int64 (classes, classes).

    truth, predicted: int (n,), class codes. Rows without a predicted class are not counted.
    """
    counted = predicted >= 0
    cells = truth[counted].astype(np.int64) * classes + predicted[counted]
    return np.bincount(cells, minlength=classes**2).reshape(classes, classes)


def row_shares(confusion: np.ndarray) -> np.ndarray:
    """Divide each row of a confusion matrix by its sum: float64 (classes, classes). Empty rows stay zero."""
    return confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)


def class_recalls(truth: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
    """Share of each class that was predicted correctly: float64 (classes,), NaN for a class without rows.

    truth, predicted: int (n,), class codes.
    """
    counts = np.bincount(truth, minlength=classes)
    hits = np.bincount(truth[truth == predicted], minlength=classes)
    return np.divide(hits, counts, out=np.full(classes, np.nan), where=counts > 0)


def balanced_accuracy(truth: np.ndarray, predicted: np.ndarray) -> float:
    """Mean recall of the classes that occur in `truth`. truth, predicted: int (n,), class codes; n > 0."""
    return float(np.nanmean(class_recalls(truth, predicted, int(truth.max()) + 1)))


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95 % interval. A field is None where no row has a value, or where no interval can be given."""

    value: float | None
    low: float | None = None
    high: float | None = None


def estimate(
    values: np.ndarray,
    labels: np.ndarray,
    groups: np.ndarray,
    seed: int = 0,
    weights: Mapping[Any, float] | None = None,
) -> Estimate:
    """Return the figure of `resample` with its percentile interval.

    The interval is left out when fewer than two groups have a value.
    """
    value, samples = resample(values, labels, groups, seed, weights)
    several = len(np.unique(groups[~np.isnan(values)])) > 1
    return Estimate(value, *interval(samples)) if several else Estimate(value)


def resample(
    values: np.ndarray,
    labels: np.ndarray,
    groups: np.ndarray,
    seed: int = 0,
    weights: Mapping[Any, float] | None = None,
) -> tuple[float | None, np.ndarray]:
    """Average a value over classes, and repeat this for `RESAMPLES` bootstrap samples of whole groups.

    values: float (n,); NaN means "no value". labels: object (n,); None counts as a class of its own. groups: int64 (n,).
    weights: weight of each class; by default all classes weigh the same.

    Returns the figure (None when there is no value) and the figures of the samples, float (RESAMPLES,). A class that a
    sample lacks is left out of that sample's mean. Two sets of values that lack the same rows get the same samples, so
    that they can be compared pair by pair.

    Groups are drawn with replacement, which is the cluster bootstrap: Davison & Hinkley, Bootstrap Methods and their
    Application, 1997, section 3.8.
    """
    present = ~np.isnan(values)
    if not present.any():
        return None, np.full(RESAMPLES, np.nan)
    values, labels = values[present], labels[present]
    names, group_codes = np.unique(groups[present], return_inverse=True)
    classes = sorted({*labels.tolist()}, key=str)
    code_of = {name: code for code, name in enumerate(classes)}
    class_codes = np.array([code_of[label] for label in labels.tolist()])
    totals, counts = np.zeros((2, len(names), len(classes)))
    np.add.at(totals, (group_codes, class_codes), values)
    np.add.at(counts, (group_codes, class_codes), 1)
    class_weights = np.array([1.0 if weights is None else weights[name] for name in classes])
    value = _class_mean(totals.sum(axis=0, keepdims=True), counts.sum(axis=0, keepdims=True), class_weights)[0]
    random, shares = np.random.default_rng(seed), np.full(len(names), 1 / len(names))
    at_once, samples = max(1, RESAMPLED_AT_ONCE // len(names)), []
    for first in range(0, RESAMPLES, at_once):
        drawn = random.multinomial(len(names), shares, min(at_once, RESAMPLES - first))
        samples.append(_class_mean(drawn @ totals, drawn @ counts, class_weights))
    return float(value), np.concatenate(samples)


def interval(samples: np.ndarray) -> tuple[float | None, float | None]:
    """Return both ends of the percentile interval of bootstrap samples, float (b,). NaN samples are left out."""
    samples = samples[~np.isnan(samples)]
    if not len(samples):
        return None, None
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(samples, [tail, 100 - tail])
    return float(low), float(high)


def _class_mean(totals: np.ndarray, counts: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Weighted mean over classes of totals ÷ counts, both (b, c): float (b,), NaN where every class is absent."""
    present = counts > 0
    means = np.divide(totals, counts, out=np.zeros_like(totals, dtype=float), where=present)
    total = (present * weights).sum(axis=1)
    return np.divide((means * weights).sum(axis=1), total, out=np.full(len(total), np.nan), where=total > 0)
