"""Reads and writes the files of a store, on a local disk or on an object store.

files: atomic writes, Parquet and JSON files, and what happens to damaged files.
objects: `ObjectPath`, which names an object on S3 or GCS and behaves like `pathlib.Path`.
fingerprints: digests of files and folders, and a status that changes when they are written.
hdf5: refuses HDF5 objects whose values lie in another file.
streams: tables read in batches, by shard or by synapse id, in bounded memory.
sorting: tables of any size sorted by synapse id in bounded memory.
"""
