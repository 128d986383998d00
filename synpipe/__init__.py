"""synpipe: from an EM volume and a table of synapses to versioned embedding assets."""

import os

__version__ = "0.1.0"

# LanceDB warns about each table that it replaces, and pylance about each partition without rows. Both read these variables when
# they are imported, so the variables are set here, before any module can import them.
for _logger in ("LANCEDB_LOG", "LANCE_LOG"):
    os.environ.setdefault(_logger, "error")
