"""Link to synapses of a data set in Neuroglancer.

Input: a `Dataset` whose volume has been read. Output: the link of a synapse or reject. `synpipe.volumes.neuroglancer` builds the
links.
"""

import pyarrow.compute as pc

from synpipe.annotations.columns import MAX_ID
from synpipe.assets.volume import find_viewer
from synpipe.datasets import Dataset
from synpipe.errors import SynpipeError
from synpipe.store.files import read_table


def link_to(dataset: Dataset, synapse_id: int) -> str:
    """Return the link of the synapse or reject with this id. If several rejects have the id, the first one is linked.

    Raises `SynpipeError` if the id is unknown, its row has no position, or the volume has no link.
    """
    viewer = find_viewer(dataset)
    if viewer is None:
        raise SynpipeError(
            f"The volume of {dataset.name} cannot be opened by Neuroglancer: it is in local files, or this version of synpipe "
            f"has not read it yet (`synpipe materialize --dataset {dataset.name} --select volume`)."
        )
    columns = ["synapse_id", "x_nm", "y_nm", "z_nm"]
    for path in (dataset.synapses_path, dataset.synapse_rejects_path):
        rows = read_table(path, columns)
        matching = (
            rows.filter(pc.equal(rows["synapse_id"], synapse_id)) if 0 <= synapse_id <= MAX_ID else rows.slice(0, 0)
        )
        link = viewer.links(matching.slice(0, 1)).to_pylist()
        if link and link[0]:
            return link[0]
        if link:
            raise SynpipeError(f"Synapse {synapse_id} of {dataset.name} was rejected without a position.")
    raise SynpipeError(f"There is no synapse {synapse_id} in {dataset.name}, neither used nor rejected.")
