"""The transmitter of a synapse from its vector: a linear probe, with probabilities that can be believed.

In: vectors of an encoder, the known class of some, and the side (`synpipe.analysis.splits`) on which each stands. Out: a `Probe`,
which gives every vector, labelled or not, a probability per class. Guarantees: fitted on the training side alone;
penalty and temperature chosen on the validation side; the test side is not an argument of any of this. The same vectors
give the same probe.

The probe is a multinomial logistic regression on unit vectors, every component standardised, with an L2 penalty. Classes
are unequal (in FAFB 48,000 synapses to 1,900), and who asks which transmitter an unknown neuron has does not want the
answer of how many synapses of each were annotated: by default every class weighs the same, and the probabilities are
those under equal shares of the classes. On made-up neurons as unequal as FAFB's that gives a balanced accuracy of .81 on
neurons not seen, log-weights .76, no weights .71 (`python -m synpipe_tests.bench.balance`).
"""

import warnings
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from synpipe.embeddings.vectors import unit_vectors
from synpipe.specs import Spec

Balance = Literal["balanced", "log", "none"]

# Strengths of the penalty, as λ of mean loss + λ/2 |w|², the strongest first: each solution is the start of the next.
PENALTIES = tuple(10.0 ** (power / 2) for power in range(2, -11, -1))
DEFAULT_PENALTY = 0.1  # where there is nothing to choose it on
PATIENCE = 2  # penalties in a row that are worse than the best so far
# Of the training rows, and of the validation rows: 100,000 × 512 take 200 MB and a few minutes on one core, and more of
# them change little.
MAX_ROWS = 100_000
_MAX_ITERATIONS = 200


class LinearSpec(Spec):
    """A linear probe on the encoder's vectors.

    balance: how much the classes weigh. balanced: all the same. log: a synapse of a class with n of N synapses weighs
    ln(N/n), as it is drawn in SynOminous' `train_classifier.py`. none: every synapse the same.
    """

    method: Literal["linear"] = "linear"
    balance: Balance = "balanced"


class FinetuneSpec(Spec):
    """The encoder's network is trained further, with a linear layer on top; see `synpipe.training.finetuning`.

    balance: as in `LinearSpec`; here synapses are drawn with these weights. learning_rate: the highest, reached after a
    twentieth of the steps; half a cosine leads back to zero (AdamW; Loshchilov & Hutter, ICLR 2017 and 2019). patience:
    epochs without a better balanced accuracy on the validation side after which training ends.
    """

    method: Literal["finetune"] = "finetune"
    balance: Balance = "balanced"
    epochs: int = Field(30, ge=1)
    batch_size: int = Field(64, ge=8)
    learning_rate: float = Field(3e-4, gt=0)
    weight_decay: float = Field(0.05, ge=0)
    patience: int = Field(8, ge=1)
    seed: int = Field(0, ge=0)


ClassifierSpec = Annotated[LinearSpec | FinetuneSpec, Field(discriminator="method")]


@dataclass(frozen=True)
class Probe:
    """A linear layer on unit vectors, and the temperature that divides its output before the softmax.

    weights: float32 (classes, d). bias: float32 (classes,), −inf for a class of which nothing was learned. penalty: the
    strength that was chosen, None for a layer that was not fitted here.
    """

    weights: np.ndarray
    bias: np.ndarray
    temperature: float
    penalty: float | None = None

    def probabilities(self, vectors: np.ndarray) -> np.ndarray:
        """Vectors of any length, float32 (n, d), to float32 (n, classes); each row sums to one."""
        return np.exp(self.log_probabilities(vectors)).astype(np.float32)

    def log_probabilities(self, vectors: np.ndarray) -> np.ndarray:
        """The same as float64 logarithms."""
        from scipy.special import log_softmax

        return log_softmax(self._logits(vectors) / self.temperature, axis=1)

    def _logits(self, vectors: np.ndarray) -> np.ndarray:
        return (unit_vectors(vectors) @ self.weights.T).astype(np.float64) + self.bias

    def calibrated(self, vectors: np.ndarray, codes: np.ndarray) -> "Probe":
        """The probe with the temperature that fits these rows best (Guo et al., ICML 2017).

        Rows of classes of which nothing was learned are left out; without any others the temperature stays.
        """
        usable = np.isfinite(self.bias)[codes]
        if not usable.any():
            return self
        temperature = temperature_for(self._logits(vectors[usable]), codes[usable])
        return Probe(self.weights, self.bias, temperature, self.penalty)


def fit_linear(
    vectors: np.ndarray,
    codes: np.ndarray,
    validation_vectors: np.ndarray,
    validation_codes: np.ndarray,
    classes: int,
    balance: Balance = "balanced",
) -> Probe:
    """Fit on (vectors, codes); choose penalty and temperature by the balanced log-loss on the validation rows.

    vectors: float32 (n, d); codes: int (n,), numbers of the classes, at least two of them. Validation rows of classes
    that are not among `codes` are left out; without any the penalty is `DEFAULT_PENALTY` and the temperature 1.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    known = np.unique(codes)
    usable = np.isin(validation_codes, known)
    validation_vectors, validation_codes = validation_vectors[usable], validation_codes[usable]
    weights_of_rows = class_weights(codes, classes, balance)[codes]
    features = unit_vectors(vectors)
    mean = features.mean(axis=0)
    scale = np.maximum(features.std(axis=0), 1e-6)
    features = (features - mean) / scale

    model = LogisticRegression(max_iter=_MAX_ITERATIONS, warm_start=True)
    best, best_loss, worse = None, np.inf, 0
    for penalty in PENALTIES if len(validation_codes) else (DEFAULT_PENALTY,):
        # Scikit-learn minimises C Σ weight · loss + |w|²/2.
        model.set_params(C=1 / (penalty * weights_of_rows.sum()))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # close enough: what counts is the validation side
            model.fit(features, codes, sample_weight=weights_of_rows)
        # Of two classes scikit-learn gives the logit of the second.
        slopes = model.coef_ if len(known) > 2 else np.concatenate([-model.coef_, model.coef_]) / 2
        offsets = model.intercept_ if len(known) > 2 else np.concatenate([-model.intercept_, model.intercept_]) / 2
        weights, bias = np.zeros((classes, vectors.shape[1]), np.float32), np.full(classes, -np.inf, np.float32)
        weights[known] = slopes / scale
        bias[known] = offsets - (slopes / scale) @ mean
        probe = Probe(weights, bias, 1.0, penalty)
        if not len(validation_codes):
            return probe
        # With its own temperature, or the choice would be that of the best scale: strong penalties make small logits.
        probe = probe.calibrated(validation_vectors, validation_codes)
        loss = balanced_log_loss(probe.log_probabilities(validation_vectors), validation_codes)
        if loss < best_loss:
            best, best_loss, worse = probe, loss, 0
        else:
            worse += 1
            if worse == PATIENCE:
                break
    assert best is not None
    return best


def class_weights(codes: np.ndarray, classes: int, balance: Balance) -> np.ndarray:
    """Weight of a synapse of each class, float64 (classes,): the mean over `codes`, int (n,), is 1. See `LinearSpec`."""
    counts = np.bincount(codes, minlength=classes)
    found = counts > 0
    weights = np.zeros(classes)
    if balance == "balanced":
        weights[found] = 1 / counts[found]
    elif balance == "log":
        weights[found] = np.log(len(codes) / counts[found])
    else:
        weights[found] = 1
    total = float(weights @ counts)
    return weights * len(codes) / total if total else found.astype(float)


def sample_rows(codes: np.ndarray, most: int) -> np.ndarray:
    """Rows to train on, ascending: all, or `most` of them, for which the largest classes are cut down to one size."""
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


def temperature_for(logits: np.ndarray, codes: np.ndarray) -> float:
    """The temperature of the smallest balanced log-loss: logits (n, classes), codes int (n,)."""
    from scipy.optimize import minimize_scalar
    from scipy.special import log_softmax

    def loss(log_temperature: float) -> float:
        return balanced_log_loss(log_softmax(logits / np.exp(log_temperature), axis=1), codes)

    found = minimize_scalar(loss, bounds=(np.log(0.01), np.log(20)), method="bounded")
    return float(np.exp(found.x))


def balanced_log_loss(log_probabilities: np.ndarray, codes: np.ndarray) -> float:
    """Mean over the classes of the mean negative log-probability of the true class: (n, classes), int (n,).

    The true class of n rows counts as (n + 1) / (n + 2) true (Platt, Advances in Large Margin Classifiers, 1999): a few rows
    without an error are no reason for certainty. Classes of which nothing was learned, at −inf, are left out.
    """
    learned = np.isfinite(log_probabilities).all(axis=0)
    losses = []
    for code in np.unique(codes):
        rows = log_probabilities[codes == code]
        others = np.flatnonzero(learned & (np.arange(len(learned)) != code))
        doubt = 1 / (len(rows) + 2)
        losses.append(-(1 - doubt) * rows[:, code].mean() - doubt * rows[:, others].mean())
    return float(np.mean(losses))
