"""The list of annotation formats. To add a format, write its class in a module of this folder and add the class here.

An entry under `annotations:` in a data set's YAML file is one of these classes; its key `format` chooses the class.
"""

from typing import Annotated

from pydantic import Field

from synpipe.annotations.cremi import Cremi
from synpipe.annotations.synful import Synful
from synpipe.annotations.synister import SynisterV3
from synpipe.annotations.tables import Cave, FlyWire, NeuPrint, PlainTable

AnnotationSpec = Annotated[
    SynisterV3 | Cremi | Synful | PlainTable | FlyWire | Cave | NeuPrint, Field(discriminator="format")
]
