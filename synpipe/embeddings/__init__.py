"""Turns tiles into vectors, and keeps the vectors.

encoder_specs   what an encoder is: the entries of `encoders.yaml` as validated specs, and their identities
registry        reads `encoders.yaml` and picks the encoders that a data set names
encoders        opens a spec: the network with its weights and preprocessing on a device
em_network      the network `d4resnet`, made for EM
descriptors     hand-made descriptors, the baselines
compression     linear maps that shorten the vectors of another encoder
forward         the forward pass on one device
embed           embeds shards of tiles on one or several devices
cache           the computed vectors, keyed by tile content and encoder fingerprint
vectors         vector columns of Arrow tables as arrays and back; unit vectors
table           the embedding table, one Parquet file per encoder
profiling       measures how fast an encoder embeds on this machine
"""
