"""synpipe: from an EM volume and a table of synapses to versioned embedding assets."""

__version__ = "0.1.0"
