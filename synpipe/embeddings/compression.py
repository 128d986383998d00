"""Compresses vectors: a linear map, fitted on the vectors of a base encoder, makes them shorter.

Input: vectors of a base encoder, float32 (n, d). Output: a `Compressor` to k < d dimensions, which is stored as safetensors,
and the vectors that it computes. The fit depends on the set of tiles and their vectors only, not on their order or on chance.
Its bytes are part of the fingerprint under which the compressed vectors are cached. No tile is embedded again.

Vectors are first scaled to unit length, because the search compares directions. Then the mean of the sample is subtracted, as
PCA requires. Cosines of compressed vectors are therefore cosines of deviations from the mean, not those of the base. They
separate vectors better when all vectors share a large component (J. Mu, P. Viswanath, "All-but-the-top", ICLR 2018).

pca: the k directions of largest variance. No other linear map has a smaller squared reconstruction error.

linear_autoencoder: an encoder and a decoder matrix, trained with Adam, as in SynOminous. Training on squared errors would
converge to the subspace that PCA computes directly (P. Baldi, K. Hornik, "Neural networks and principal component analysis",
Neural Networks 2, 1989). So training starts from that subspace and maximises what the search uses, the cosine between a
vector and its reconstruction. Vectors far from the mean and near it then have equal weight.

After a change that alters vectors, raise `COMPRESSION_METHOD` in `encoder_specs`.
"""

from dataclasses import dataclass

import numpy as np

from synpipe.embeddings.encoder_specs import CompressedSpec
from synpipe.embeddings.vectors import unit_vectors
from synpipe.errors import SynpipeError, one_line
from synpipe.store.objects import BulkPath

SAMPLE_ROWS = 100_000
"""The most vectors that a fit uses: two hundred for each of 512 dimensions."""

_ROWS_AT_A_TIME = 8192
# The autoencoder starts from the result of PCA, so little remains to be learned.
_STEPS = 500
_BATCH = 1024
_LEARNING_RATE = 1e-3


@dataclass(frozen=True)
class Compressor:
    """A fitted map. mean: float32 (d,). components: float32 (k, d)."""

    mean: np.ndarray
    components: np.ndarray

    def compress(self, vectors: np.ndarray) -> np.ndarray:
        """Vectors of the base, float32 (n, d) of any length, to float32 (n, k)."""
        return (unit_vectors(vectors) - self.mean) @ self.components.T

    def to_bytes(self) -> bytes:
        """The content of a safetensors file, which `load` reads."""
        from safetensors.numpy import save

        return save({"mean": self.mean, "components": self.components})


def load(path: BulkPath) -> Compressor:
    """Read a file that holds `Compressor.to_bytes`. Raises `SynpipeError` if it is missing or damaged."""
    from safetensors import SafetensorError
    from safetensors.numpy import load as load_bytes

    try:
        return Compressor(**load_bytes(path.read_bytes()))
    except (OSError, SafetensorError, TypeError) as error:
        raise SynpipeError(
            f"The compressor {path} cannot be read ({one_line(error)}): delete it and materialise its embeddings again."
        ) from None


def fit(vectors: np.ndarray, spec: CompressedSpec) -> tuple[Compressor, float]:
    """Fit on vectors of the base, float32 (n, d). The caller must pass equal sets of vectors in the same order.

    Returns the compressor and the share of the variance that it keeps. Raises `SynpipeError` unless the dimensions are
    fewer than those of the base and fewer than the vectors.
    """
    count, dimensions = vectors.shape
    if spec.dimensions >= dimensions:
        raise SynpipeError(
            f"{spec.base} has {dimensions} dimensions: compressing it to {spec.dimensions} saves nothing. Choose fewer."
        )
    if spec.dimensions >= count:
        raise SynpipeError(
            f"{count:,} different tiles are too few to fit {spec.dimensions} dimensions of {spec.base}: at least "
            f"{spec.dimensions + 1:,} are needed. Choose fewer dimensions."
        )
    unit = unit_vectors(vectors)
    mean = unit.mean(axis=0, dtype=np.float64)
    covariance = np.zeros((dimensions, dimensions))
    for start in range(0, count, _ROWS_AT_A_TIME):
        rows = unit[start : start + _ROWS_AT_A_TIME] - mean
        covariance += rows.T @ rows
    # The size of the covariance does not grow with the number of vectors. `eigh` returns eigenvalues in ascending order.
    variances, directions = np.linalg.eigh(covariance)
    components = directions[:, ::-1][:, : spec.dimensions].T
    # The sign of an eigenvector is arbitrary. As in scikit-learn, its largest component is made positive.
    largest = np.take_along_axis(components, np.abs(components).argmax(axis=1)[:, None], axis=1)
    components = (components * np.sign(largest)).astype(np.float32)
    mean = mean.astype(np.float32)
    if spec.method == "linear_autoencoder":
        components = _train_autoencoder(unit - mean, components)
    total = float(variances.sum())
    basis = np.linalg.qr(components.T)[0].astype(np.float64)
    kept = float(np.trace(basis.T @ covariance @ basis)) / total if total else 0.0
    return Compressor(mean, np.ascontiguousarray(components)), kept


def _train_autoencoder(centred: np.ndarray, start: np.ndarray) -> np.ndarray:
    """Train an encoder matrix, float32 (k, d), starting from `start`.

    The loss is 1 − cosine between a row of `centred`, float32 (n, d), and its reconstruction.

    An encoder and a decoder with separate weights may use code axes of any length and angle. The returned matrix therefore
    expresses codes in an orthonormal basis of the decoder's range: with decoder = QR it is R · encoder, so that the cosine
    of two codes equals the cosine of their reconstructions.
    """
    import torch

    generator = torch.Generator().manual_seed(0)
    data = torch.from_numpy(centred)
    encoder = torch.from_numpy(start.copy()).requires_grad_()
    decoder = torch.from_numpy(start.T.copy()).requires_grad_()
    optimiser = torch.optim.Adam([encoder, decoder], lr=_LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, _STEPS)
    for _ in range(_STEPS):
        batch = data[torch.randint(len(data), (min(_BATCH, len(data)),), generator=generator)]
        loss = 1 - torch.nn.functional.cosine_similarity(batch, batch @ encoder.T @ decoder.T).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    triangular = torch.linalg.qr(decoder.detach()).R
    return (triangular @ encoder.detach()).numpy()
