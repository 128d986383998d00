"""Opens EM volumes: a spec becomes a volume that answers in nanometres and in voxels.

A *chunk* is the unit in which a volume is stored, fetched and decoded.

volume: `VolumeSpec`, which describes a volume, and `Volume`, which opens it and reads sub-volumes as uint8.
kinds: the list of volume kinds, and the choice of the one that a path names.
reader: `VoxelReader`, the interface that every kind implements.
hdf5, sections: readers of a data set in an HDF5 file, and of a folder with one image per section.
chunked: reader of chunked volumes, local or remote, through tensorstore.
scales, precomputed, n5, zarr: the scales of a chunked volume, and one module per format that lists them.
chunk_plan: the order in which to read many windows so that each chunk is fetched about once.
"""
