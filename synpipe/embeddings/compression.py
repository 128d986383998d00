"""Compressed encoders: a linear map, fitted on the vectors of another encoder, that makes them shorter.

In: vectors of a base encoder, float32 (n, d). Out: a `Compressor` to k < d dimensions, kept as safetensors, and the vectors
that it gives. Guarantees: the fit is a function of the set of tiles and their vectors, not of their order or of chance; its
bytes are in the fingerprint under which the compressed vectors are cached; nothing is embedded again.

Vectors are brought to unit length first, because the search compares directions. Then the mean of the sample is taken off,
as PCA wants it: cosines are from then on those of deviations from the mean, which tell more apart where all vectors share
a large component (J. Mu, P. Viswanath, "All-but-the-top", ICLR 2018), but are not the cosines of the base.

pca: the k directions of largest variance. Of all linear maps it loses the least in the sense of squares.

linear_autoencoder: an encoder and a decoder matrix, trained with Adam, as in SynOminous. Trained on squared errors it would
end in the subspace that PCA computes at once (P. Baldi, K. Hornik, "Neural networks and principal component analysis",
Neural Networks 2, 1989). So it begins there and is trained on what the search sees, the cosine between a vector
and its reconstruction; far and near vectors then count alike.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from pydantic import Field

from synpipe.errors import SynpipeError
from synpipe.specs import Spec
from synpipe.store.objects import BulkPath

SAMPLE_ROWS = 100_000
"""Vectors at most that a fit sees: two hundred for each of 512 dimensions."""

_METHOD = 1  # raise it when a change in this file changes the vectors
_SHORTHAND = re.compile(r"([a-z][a-z0-9_]*)\+(pca|ae)([1-9][0-9]*)")
_METHODS: dict[str, Literal["pca", "linear_autoencoder"]] = {"pca": "pca", "ae": "linear_autoencoder"}
_BLOCK_ROWS = 8192
# Of the autoencoder. It begins where PCA ends, so that there is little left to learn.
_STEPS = 500
_BATCH = 1024
_LEARNING_RATE = 1e-3


class CompressedSpec(Spec):
    """An entry of the registry that is fitted on the vectors of another one.

    base: that entry's name. dimensions: fewer than the base has. `<base>+pca32` and `<base>+ae32` in the `encoders:` of a
    data set say the same without an entry.
    """

    base: str
    method: Literal["pca", "linear_autoencoder"]
    dimensions: int = Field(ge=2)
    description: str = ""

    def declaration(self) -> dict[str, Any]:
        """What decides the vectors beside those of the base; see `Dataset.identity`."""
        return {"method": self.method, "dimensions": self.dimensions, "code": _METHOD}


def branch_name(encoder: str) -> str:
    """Name of an encoder in assets and files, where no + may stand: `resnet18+pca32` is `resnet18_pca32`."""
    return encoder.replace("+", "_")


def chosen_encoders(names: Sequence[str], registry: Mapping[str, Spec], where: str) -> dict[str, Any]:
    """Specs by branch name of the encoders that a data set names, in its order.

    where: names the file in the error. Raises `SynpipeError` for a name that is neither an entry of the registry nor of
    the form `<base>+pca32`, and for a base that the data set does not name or that is compressed itself.
    """
    found: dict[str, Spec] = {}
    for name in names:
        shorthand, branch = _SHORTHAND.fullmatch(name), branch_name(name)
        if shorthand is None and name not in registry:
            raise SynpipeError(
                f"{where}: the encoder {name!r} is not in encoders.yaml, which has {', '.join(registry)}; nor is it of the form "
                "<encoder>+pca32 or <encoder>+ae32."
            )
        if shorthand and branch in registry:
            raise SynpipeError(
                f"{where}: {name!r} would be the branch {branch}, which is an entry of encoders.yaml: rename that entry, or name "
                "it instead."
            )
        if shorthand:
            base, method, dimensions = shorthand.groups()
            spec: Spec = CompressedSpec.parse(
                {"base": base, "method": _METHODS[method], "dimensions": int(dimensions)}, f"{where}, encoder {name!r}"
            )
        else:
            spec = registry[name]
        found[branch] = spec
    for branch, spec in found.items():
        if not isinstance(spec, CompressedSpec):
            continue
        base_spec = found.get(spec.base)
        if base_spec is None:
            raise SynpipeError(
                f"{where}: {branch} compresses the vectors of {spec.base!r}, which is not among the `encoders:` of this data "
                f"set: name it there too. Encoders that can be compressed: "
                f"{', '.join(name for name, entry in registry.items() if not isinstance(entry, CompressedSpec))}."
            )
        if isinstance(base_spec, CompressedSpec):
            raise SynpipeError(
                f"{where}: {branch} compresses {spec.base!r}, which is compressed itself: compress {base_spec.base!r} instead."
            )
    return found


@dataclass(frozen=True)
class Compressor:
    """mean: float32 (d,). components: float32 (k, d)."""

    mean: np.ndarray
    components: np.ndarray

    def compress(self, vectors: np.ndarray) -> np.ndarray:
        """Vectors of the base, float32 (n, d) of any length, to float32 (n, k)."""
        return (unit_length(vectors) - self.mean) @ self.components.T

    def to_bytes(self) -> bytes:
        """As a safetensors file."""
        from safetensors.numpy import save

        return save({"mean": self.mean, "components": self.components})


def load(path: BulkPath) -> Compressor:
    """What `Compressor.to_bytes` was written to. Raises `SynpipeError` where it is absent or damaged."""
    from safetensors import SafetensorError
    from safetensors.numpy import load as load_bytes

    try:
        return Compressor(**load_bytes(path.read_bytes()))
    except (OSError, SafetensorError, TypeError) as error:
        raise SynpipeError(
            f"The fit {path} cannot be read ({error}): delete it and materialise its embeddings again."
        ) from None


def fit(vectors: np.ndarray, spec: CompressedSpec) -> tuple[Compressor, float]:
    """Fit on vectors of the base, float32 (n, d), in an order that is the same whenever they are the same.

    Returns also the share of their variance that is kept. Raises `SynpipeError` where the dimensions are not fewer than the
    base has, or as many as there are vectors.
    """
    count, dimensions = vectors.shape
    if spec.dimensions >= dimensions:
        raise SynpipeError(
            f"{spec.base} has {dimensions} dimensions: compressing it to {spec.dimensions} saves nothing. Choose fewer."
        )
    if spec.dimensions >= count:
        raise SynpipeError(
            f"{count:,} different tiles cannot tell {spec.dimensions} dimensions of {spec.base} apart: at least "
            f"{spec.dimensions + 1:,} are needed. Choose fewer dimensions."
        )
    unit = unit_length(vectors)
    mean = unit.mean(axis=0, dtype=np.float64)
    covariance = np.zeros((dimensions, dimensions))
    for start in range(0, count, _BLOCK_ROWS):
        block = unit[start : start + _BLOCK_ROWS] - mean
        covariance += block.T @ block
    # Of the covariance, not of the vectors: its size does not grow with them. Eigenvalues come in ascending order.
    variances, directions = np.linalg.eigh(covariance)
    components = directions[:, ::-1][:, : spec.dimensions].T
    # An eigenvector has no sign of its own: its largest component is made positive, as scikit-learn does.
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
    """Encoder matrix, float32 (k, d), trained from `start` on 1 − cosine between float32 (n, d) and its reconstruction.

    Codes of an encoder and a decoder that share nothing lie in axes of any length and angle. The matrix returned gives them
    in an orthonormal basis of the decoder's range: with decoder = QR it is R · encoder, so that the cosine of two codes is
    that of their reconstructions.
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


def unit_length(vectors: np.ndarray) -> np.ndarray:
    """Vectors (n, d) divided by their lengths; one without length stays zero."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.maximum(lengths, np.finfo(np.float32).tiny)
