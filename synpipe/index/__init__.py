"""Builds, publishes and searches the LanceDB table of an encoder.

build          rows and indexes of a new version
recall         number of probes, and recall against an exact search
files          digests of the files, to find damaged ones
publish        verifies a new version and makes it current
distances      the metrics and their formulas
exact_search   exact search in memory
search         the most similar synapses of each class
"""
