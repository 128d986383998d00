"""Describe how the classifier of an encoder is trained: the key `classifier:` of a data set's YAML file.

A `LinearSpec` asks for a linear probe (`synpipe.analysis.linear_probe`), a `FinetuneSpec` for further training of the
encoder's network (`synpipe.training.finetuning`). The specs are frozen, and their digest decides whether a classifier is
out of date.
"""

from typing import Annotated, Literal

from pydantic import Field

from synpipe.analysis.linear_probe import Balance
from synpipe.specs import Spec


class LinearSpec(Spec):
    """A linear probe on the encoder's vectors.

    balance: how much each class weighs. balanced: all classes weigh the same. log: a synapse of a class with n of N
    synapses weighs ln(N/n), the weight with which SynOminous' `train_classifier.py` draws it. none: all synapses weigh
    the same.
    """

    method: Literal["linear"] = "linear"
    balance: Balance = "balanced"


class FinetuneSpec(Spec):
    """Further training of the encoder's network with a linear layer on top; see `synpipe.training.finetuning`.

    balance: as in `LinearSpec`; synapses are drawn with these weights. learning_rate: the highest one. It is reached after
    a twentieth of the steps and then falls to zero along half a cosine (AdamW; Loshchilov & Hutter, ICLR 2017 and 2019).
    patience: training ends after this many epochs without a better balanced accuracy on the validation side.
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
