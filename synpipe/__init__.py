"""synpipe: from an EM volume and a table of synapses to versioned embedding assets.

The names below are the public API; `synpipe.api` describes them. Everything else is private by convention.
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from synpipe.api import OpenDataset, SynpipeError, open_dataset, open_encoder

__version__ = "0.1.0"
__all__ = ["OpenDataset", "SynpipeError", "__version__", "open_dataset", "open_encoder"]

# LanceDB warns about each table that it replaces, and pylance about each partition without rows. Both read these variables when
# they are imported, so the variables are set here, before any module can import them.
for _logger in ("LANCEDB_LOG", "LANCE_LOG"):
    os.environ.setdefault(_logger, "error")


def __getattr__(name: str) -> Any:
    """Import the API when it is first used, so that `synpipe --help` need not wait for pyarrow."""
    if name in __all__:
        return getattr(import_module("synpipe.api"), name)
    raise AttributeError(f"module 'synpipe' has no attribute {name!r}")
