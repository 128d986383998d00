"""One module per asset, in the order of the data flow.

volume, annotations, synapses, synapse_stacks, rgb_tiles, rejects and split are shared by all encoders. Each encoder has embeddings
(compressed, if it is a compressed encoder), classifier, projection, embedding_table, index and scores. evaluation gathers the
scores of all encoders.

asset says what an asset is, graph lists the assets of a data set and their states, manifest records what was made, and
file_records records the digests of its files.
"""
