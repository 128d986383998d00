"""Distributes the shards of a step over the workers of a Ray cluster.

engines: the choice between this process and a cluster, and the dispatch of shards to workers.
workers: what a worker does with a shard: cut-outs and embeddings.
"""
