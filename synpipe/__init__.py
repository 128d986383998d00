"""synpipe: from an EM volume and a table of synapses to versioned embedding assets."""

import os

__version__ = "0.1.0"

# LanceDB warns of every table that it makes anew. It reads this when it is imported, wherever that is.
os.environ.setdefault("LANCEDB_LOG", "error")
