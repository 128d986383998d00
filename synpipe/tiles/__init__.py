"""Cuts tiles out of a volume, stores them in parts, and reads them back.

Four words have exactly one meaning in synpipe. A *chunk* is the unit in which a volume is stored. A *block* is a spatial
cube of synapses; the block decides the shard. A *shard* is the unit of work and of caching of a pipeline step. A *part* is
one file of a shard's tiles or vectors.

tile: `TileSpec`, which describes a tile; one cut-out; the shard of a window; `TileReader`, which reads tiles by synapse id.
extraction: all cut-outs of a data set, read in chunk order and written as parts.
parts: one part of tiles on disk or on an object store, and the marks of damaged parts.
"""
