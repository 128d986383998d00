"""synpipe: from an EM volume and a table of synapses to versioned embedding assets."""

import os

__version__ = "0.1.0"

# LanceDB warns of every table that it makes anew, and pylance of every partition without rows. They read this when they are
# imported, wherever that is.
for _logger in ("LANCEDB_LOG", "LANCE_LOG"):
    os.environ.setdefault(_logger, "error")
