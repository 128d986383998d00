"""Fit a linear probe: a multinomial logistic regression on vectors, with calibrated class probabilities.

Inputs: vectors and class codes of training rows and of validation rows. Output: a `Probe`, which gives every vector a
probability for each class. The classifier and the evaluation both fit their probes here. The weights are fitted on the
training rows only; the validation rows choose the penalty and the temperature. Test rows are no argument of any function
here. The same rows in the same order give the same probe.

The probe works on vectors scaled to unit length, with every component standardised and with an L2 penalty. Class sizes
are unequal (FAFB has 48,000 synapses of one class and 1,900 of another), and the transmitter of an unknown neuron should
not depend on how many synapses of each class were annotated. By default, therefore, every class weighs the same, and the
probabilities assume equal class shares. On simulated neurons with FAFB's class imbalance, equal weights reach a balanced
accuracy of .81 on unseen neurons, logarithmic weights .76, and no weights .71
(`python -m synpipe_tests.bench.balance`).
"""

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from synpipe.embeddings.vectors import unit_vectors

Balance = Literal["balanced", "log", "none"]
"""How much each class weighs; see `class_weights`."""

# Strengths λ of the penalty in "mean loss + λ/2 |w|²". The strongest comes first: each solution starts the next fit.
PENALTIES = tuple(10.0 ** (power / 2) for power in range(2, -11, -1))
DEFAULT_PENALTY = 0.1  # used when there are no validation rows to choose it on
PATIENCE = 2  # consecutive penalties without an improvement after which the search ends
# Training rows at most, and validation rows at most: 100,000 × 512 take 200 MB and a few minutes on one core, and more
# rows change little.
MAX_ROWS = 100_000
_MAX_ITERATIONS = 200


@dataclass(frozen=True)
class Probe:
    """A linear layer on unit vectors, and the temperature that divides its output before the softmax.

    weights: float32 (classes, d). bias: float32 (classes,), −inf for a class without training rows. penalty: the chosen
    strength; None for a layer that `fit_probe` did not fit.
    """

    weights: np.ndarray
    bias: np.ndarray
    temperature: float
    penalty: float | None = None

    def probabilities(self, vectors: np.ndarray) -> np.ndarray:
        """Return the class probabilities of vectors of any length, float32 (n, d): float32 (n, classes), rows sum to 1."""
        return np.exp(self.log_probabilities(vectors)).astype(np.float32)

    def log_probabilities(self, vectors: np.ndarray) -> np.ndarray:
        """Return the logarithms of the class probabilities of vectors, float32 (n, d): float64 (n, classes)."""
        from scipy.special import log_softmax

        return log_softmax(self._logits(vectors) / self.temperature, axis=1)

    def _logits(self, vectors: np.ndarray) -> np.ndarray:
        return (unit_vectors(vectors) @ self.weights.T).astype(np.float64) + self.bias

    def calibrated(self, vectors: np.ndarray, codes: np.ndarray) -> "Probe":
        """Return the probe with the temperature that fits these rows best (Guo et al., ICML 2017).

        Rows of classes without training rows are left out. If no row remains, the temperature does not change.
        """
        usable = np.isfinite(self.bias)[codes]
        if not usable.any():
            return self
        temperature = fit_temperature(self._logits(vectors[usable]), codes[usable])
        return Probe(self.weights, self.bias, temperature, self.penalty)


def fit_probe(
    vectors: np.ndarray,
    codes: np.ndarray,
    validation_vectors: np.ndarray,
    validation_codes: np.ndarray,
    classes: int,
    balance: Balance = "balanced",
) -> Probe:
    """Fit a probe on (vectors, codes). Choose penalty and temperature by the balanced log-loss on the validation rows.

    vectors: float32 (n, d). codes: int (n,), class codes, at least two different ones. Validation rows of classes that
    do not occur in `codes` are left out. Without validation rows the penalty is `DEFAULT_PENALTY` and the temperature 1.
    """
    usable = np.isin(validation_codes, np.unique(codes))
    validation_vectors, validation_codes = validation_vectors[usable], validation_codes[usable]
    if not len(validation_codes):
        return next(_fit_penalties(vectors, codes, classes, balance, [DEFAULT_PENALTY]))
    best, best_loss, worse = None, np.inf, 0
    for uncalibrated in _fit_penalties(vectors, codes, classes, balance, PENALTIES):
        # Each candidate gets its own temperature. Otherwise the best scale would win: strong penalties make small logits.
        probe = uncalibrated.calibrated(validation_vectors, validation_codes)
        loss = balanced_log_loss(probe.log_probabilities(validation_vectors), validation_codes)
        if loss < best_loss:
            best, best_loss, worse = probe, loss, 0
        else:
            worse += 1
            if worse == PATIENCE:
                break
    assert best is not None
    return best


def _fit_penalties(
    vectors: np.ndarray, codes: np.ndarray, classes: int, balance: Balance, penalties: Sequence[float]
) -> Iterator[Probe]:
    """Yield a probe with temperature 1 for each penalty. Each fit starts from the solution of the one before."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    known = np.unique(codes)
    row_weights = class_weights(codes, classes, balance)[codes]
    features = unit_vectors(vectors)
    mean = features.mean(axis=0)
    scale = np.maximum(features.std(axis=0), 1e-6)
    features = (features - mean) / scale

    model = LogisticRegression(max_iter=_MAX_ITERATIONS, warm_start=True)
    for penalty in penalties:
        # Scikit-learn minimises C Σ weight · loss + |w|²/2.
        model.set_params(C=1 / (penalty * row_weights.sum()))
        with warnings.catch_warnings():
            # A fit that has not quite converged is good enough: the validation rows judge it.
            warnings.simplefilter("ignore", ConvergenceWarning)
            model.fit(features, codes, sample_weight=row_weights)
        # For two classes scikit-learn gives the logit of the second class only.
        slopes = model.coef_ if len(known) > 2 else np.concatenate([-model.coef_, model.coef_]) / 2
        offsets = model.intercept_ if len(known) > 2 else np.concatenate([-model.intercept_, model.intercept_]) / 2
        weights, bias = np.zeros((classes, vectors.shape[1]), np.float32), np.full(classes, -np.inf, np.float32)
        weights[known] = slopes / scale
        bias[known] = offsets - (slopes / scale) @ mean
        yield Probe(weights, bias, 1.0, penalty)


def class_weights(codes: np.ndarray, classes: int, balance: Balance) -> np.ndarray:
    """Return the weight of a row of each class: float64 (classes,), scaled so that the mean over `codes`, int (n,), is 1.

    balanced: every class weighs the same in total. log: a row of a class with n of N rows weighs ln(N/n). none: every row
    weighs the same.
    """
    counts = np.bincount(codes, minlength=classes)
    present = counts > 0
    weights = np.zeros(classes)
    if balance == "balanced":
        weights[present] = 1 / counts[present]
    elif balance == "log":
        weights[present] = np.log(len(codes) / counts[present])
    else:
        weights[present] = 1
    total = float(weights @ counts)
    return weights * len(codes) / total if total else present.astype(float)


def sample_rows(codes: np.ndarray, most: int) -> np.ndarray:
    """Choose the rows to train on: int64, ascending. These are all rows, or `most` of them.

    When there are too many, the largest classes are cut down to one common size. codes: int (n,), class codes.
    """
    if len(codes) <= most:
        return np.arange(len(codes))
    counts = np.sort(np.unique(codes, return_counts=True)[1])
    left, quota = most, most
    for place, count in enumerate(counts.tolist()):
        quota = left // (len(counts) - place)
        if count > quota:
            break
        left -= count
    random = np.random.default_rng(0)
    chosen = [random.permutation(np.flatnonzero(codes == code))[:quota] for code in np.unique(codes)]
    return np.sort(np.concatenate(chosen))


def fit_temperature(logits: np.ndarray, codes: np.ndarray) -> float:
    """Return the temperature with the smallest balanced log-loss. logits: float (n, classes). codes: int (n,)."""
    from scipy.optimize import minimize_scalar
    from scipy.special import log_softmax

    def loss(log_temperature: float) -> float:
        return balanced_log_loss(log_softmax(logits / np.exp(log_temperature), axis=1), codes)

    minimum = minimize_scalar(loss, bounds=(np.log(0.01), np.log(20)), method="bounded")
    return float(np.exp(minimum.x))


def balanced_log_loss(log_probabilities: np.ndarray, codes: np.ndarray) -> float:
    """Return the mean, over classes, of the mean negative log-probability of the true class.

    log_probabilities: float (n, classes). codes: int (n,), true class codes. If a class has n rows, its label counts as
    true with probability (n + 1) / (n + 2) (Platt, Advances in Large Margin Classifiers, 1999), because a few rows
    without an error do not justify certainty. Classes without training rows have a log-probability of −inf and are left
    out.
    """
    learned = np.isfinite(log_probabilities).all(axis=0)
    losses = []
    for code in np.unique(codes):
        rows = log_probabilities[codes == code]
        others = np.flatnonzero(learned & (np.arange(len(learned)) != code))
        doubt = 1 / (len(rows) + 2)
        losses.append(-(1 - doubt) * rows[:, code].mean() - doubt * rows[:, others].mean())
    return float(np.mean(losses))
