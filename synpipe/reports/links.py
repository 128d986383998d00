"""Neuroglancer links: addresses that show a place of a volume in the browser.

In: an opened `Volume`, or the manifest that was made of it, and positions in nm. Out: addresses, with everything that
Neuroglancer needs to know in their fragment. Guarantees: a link needs nothing but its inputs, so that making one touches
no network; the voxel at its middle is the one that the tile is centred on, whatever the volume says of its own place; a
volume that no browser can reach (a local file) has no link.

The state is that of https://github.com/google/neuroglancer/blob/master/python/neuroglancer/viewer_state.py. Data sources
are written `precomputed://`, `n5://`, `zarr2://` and `zarr3://` before an address: the client takes these beside its newer
`ADDRESS|zarr2:` (`KvStoreBasedDataSourceLegacyUrlAdapter`), and the older clients that laboratories run know only these.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import quote

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from synpipe.annotations.columns import MAX_ID
from synpipe.assets.manifest import find_manifest
from synpipe.datasets import Dataset
from synpipe.errors import SynpipeError
from synpipe.store.files import read_table
from synpipe.tiles.tile import TILE_PX
from synpipe.volumes.volume import Volume, VolumeSpec

if TYPE_CHECKING:
    from synpipe.volumes.chunked import ChunkedReader

TILE_ON_SCREEN_PX = 640  # a tile with its surroundings, in a window of a thousand
POSITION_DECIMALS = 6  # of a voxel: what `volumes.EDGE_TOLERANCE_VOXELS` takes for the edge is the edge
# Characters of a fragment that stay as they are: no brackets and quotes, so that a link survives Markdown and mail.
SAFE = ":/,@"

MARKER_COLOUR = "#ffd400"


@dataclass(frozen=True)
class Viewer:
    """A Neuroglancer site that shows a volume. image: its layer, see `image_layer`; None shows no volume."""

    site: str
    image: dict[str, Any] | None
    voxel_size_nm_zyx: tuple[float, float, float]

    def link(self, position_nm_zyx: Sequence[float], name: str, layers: Sequence[dict[str, Any]] = ()) -> str:
        """The address that shows a position (nm, in the space of the volume), marked by a point with this name.

        The section of the position fills the window, at a scale at which a tile and its surroundings are seen.
        layers: further ones, in JSON.
        """
        sizes = self.voxel_size_nm_zyx[::-1]
        place = [
            round(float(nm / size), POSITION_DECIMALS) for nm, size in zip(position_nm_zyx[::-1], sizes, strict=True)
        ]
        return self._address(place, name, layers)

    def template(self) -> str:
        """The same with `{x}`, `{y}`, `{z}` (voxels) and `{id}` where a position and its name belong."""
        address = self._address(["{x}", "{y}", "{z}"], "{id}", ())
        for axis in "xyz":  # numbers, without the quotes
            address = address.replace(quote(f'"{{{axis}}}"'), f"{{{axis}}}")
        return address.replace(quote("{id}"), "{id}")

    def _address(self, place: Sequence[float] | Sequence[str], name: str, layers: Sequence[dict[str, Any]]) -> str:
        z_nm, y_nm, x_nm = self.voxel_size_nm_zyx
        axes = {"x": x_nm, "y": y_nm, "z": z_nm}
        dimensions = {axis: [size / 1e9, "m"] for axis, size in axes.items()}
        marker = {
            "type": "annotation",
            "name": "position",
            "source": {"url": "local://annotations", "transform": {"outputDimensions": dimensions}},
            "annotationColor": MARKER_COLOUR,
            "annotations": [{"type": "point", "id": name, "point": place}],
        }
        state = {
            "dimensions": dimensions,
            "position": place,
            # Voxels per pixel of the screen, of the smallest side of a voxel.
            "crossSectionScale": TILE_PX / TILE_ON_SCREEN_PX * x_nm / min(axes.values()),
            "layout": "xy",
            "layers": [*([self.image] if self.image else []), *layers, marker],
        }
        return f"{self.site}/#!{quote(json.dumps(state, separators=(',', ':')), safe=SAFE)}"

    def links(self, rows: pa.Table) -> pa.Array:
        """A link per row of a table with `synapse_id`, `x_nm`, `y_nm`, `z_nm`; null where a row has no position."""
        columns = (rows[name].to_pylist() for name in ("z_nm", "y_nm", "x_nm", "synapse_id"))
        found = [
            None if None in position else self.link(position, "no id" if synapse_id is None else str(synapse_id))
            for *position, synapse_id in zip(*columns, strict=True)
        ]
        return pa.array(found, pa.string())


def link_to(dataset: Dataset, synapse_id: int) -> str:
    """The link of a synapse or of a reject with this id; of several rejects, of the first.

    Raises `SynpipeError` where the id is unknown, has no position, or the volume has no link.
    """
    viewer = find_viewer(dataset)
    if viewer is None:
        raise SynpipeError(
            f"The volume of {dataset.name} cannot be opened by Neuroglancer: it is in local files, or has not been looked at "
            f"by this version of synpipe (`synpipe materialize --dataset {dataset.name} --select volume`)."
        )
    columns = ["synapse_id", "x_nm", "y_nm", "z_nm"]
    for path in (dataset.synapses_path, dataset.synapse_rejects_path):
        rows = read_table(path, columns)
        found = rows.filter(pc.equal(rows["synapse_id"], synapse_id)) if 0 <= synapse_id <= MAX_ID else rows.slice(0, 0)
        link = viewer.links(found.slice(0, 1)).to_pylist()
        if link and link[0]:
            return link[0]
        if link:
            raise SynpipeError(f"Synapse {synapse_id} of {dataset.name} was rejected without a position.")
    raise SynpipeError(f"There is no synapse {synapse_id} in {dataset.name}, neither used nor rejected.")


def find_viewer(dataset: Dataset) -> Viewer | None:
    """The viewer of a data set's volume as it was last looked at; None where there is no link to it."""
    manifest = find_manifest(dataset, "volume")
    image = manifest.counts.get("neuroglancer") if manifest else None
    if manifest is None or image is None:
        return None
    return Viewer(dataset.spec.neuroglancer, image, tuple(manifest.counts["voxel_size_nm_zyx"]))


def image_layer(spec: VolumeSpec, volume: Volume) -> dict[str, Any] | None:
    """The layer that shows a volume in Neuroglancer, JSON-able; None for what is not reached over a network.

    Only precomputed volumes are left to say their own place. Neuroglancer reads no offset of N5 and of Zarr arrays, no
    `resolution` of Zarr arrays, and puts the centre of the first voxel of an OME-Zarr where synpipe puts its corner: for
    these the layer has a transform, so that voxels are where the data set has them.
    """
    if spec.kind is None or "://" not in spec.address:
        return None
    layer: dict[str, Any] = {"type": "image", "name": "em", "source": _source(spec, volume)}
    if spec.intensity_window is not None:
        layer["shaderControls"] = {"normalized": {"range": list(spec.intensity_window)}}
    return layer


def _source(spec: VolumeSpec, volume: Volume) -> Any:
    address = spec.address.rstrip("/")
    if spec.kind == "precomputed":
        return f"precomputed://{address}"
    source = cast("ChunkedReader", volume.reader)
    voxel_nm = dict(zip("zyx", volume.voxel_size_nm_zyx.tolist(), strict=True))
    offset_nm = dict(zip("zyx", volume.offset_nm_zyx.tolist(), strict=True))
    array = _n5(source, voxel_nm) if spec.kind == "n5" else _zarr(source, voxel_nm)
    # The matrix maps lengths to lengths; its last column is in voxels of the output (Neuroglancer's
    # `coordinate_transform.ts`).
    matrix = np.eye(3, 4)
    matrix[:, 3] = [(offset_nm[axis.axis] - axis.begins * axis.size_nm) / voxel_nm[axis.axis] for axis in array.axes]
    transform = {
        "inputDimensions": {axis.name: [axis.size_nm / 1e9, "m"] for axis in array.axes},
        "outputDimensions": {axis.axis: [voxel_nm[axis.axis] / 1e9, "m"] for axis in array.axes},
        "matrix": matrix.tolist(),
    }
    return {"url": "/".join(filter(None, (f"{array.scheme}://{address}", array.folder))), "transform": transform}


@dataclass(frozen=True)
class _Axis:
    """axis: z, y or x. name: what Neuroglancer calls it. size_nm: of its voxels; the first begins at `begins` (voxels)."""

    axis: str
    name: str
    size_nm: float
    begins: float = 0.0


@dataclass(frozen=True)
class _Array:
    """What Neuroglancer opens, and the axes under which it does, in their order. folder: below the volume's address."""

    scheme: str
    folder: str
    axes: list[_Axis]


def _n5(source: "ChunkedReader", voxel_nm: Mapping[str, float]) -> _Array:
    """One array: what its neighbours s0, s1 … are in nm is written in too many ways."""
    # As Neuroglancer does, with the attributes of the group for those that the array has not.
    array = f"{source.scale.folder}/attributes.json".removeprefix("/")
    attributes = {**source.documents.get("attributes.json", {}), **source.documents[array]}
    names = attributes.get("axes") or "xyz"
    factors = attributes.get("downsamplingFactors") or [1]
    # Of a single array; a group may list those of all. Neuroglancer's voxels are the undivided ones.
    factors = [1] * 3 if isinstance(factors[0], list) or len(factors) != 3 else factors
    axes = [
        _Axis(axis, name, voxel_nm[axis] / factor)
        for axis, name, factor in zip(source.scale.axes, names, factors, strict=True)
    ]
    return _Array("n5", source.scale.folder, axes)


def _zarr(source: "ChunkedReader", voxel_nm: Mapping[str, float]) -> _Array:
    """The array, or all scales of an OME-Zarr."""
    third = source.documents.get("zarr.json")
    scheme = "zarr3" if third else "zarr2"
    attributes = third.get("attributes", {}) if third else source.documents.get(".zattrs") or {}
    ome = attributes.get("ome", attributes)
    if "multiscales" in ome:
        return _Array(scheme, "", _ome_axes(source, ome["multiscales"][0], voxel_nm))
    names = (third.get("dimension_names") if third else attributes.get("_ARRAY_DIMENSIONS")) or [None] * 3
    unnamed = "dim_" if third else "d"  # and the number of the axis: `zarr/frontend.ts` of Neuroglancer
    axes = [
        _Axis(axis, name or f"{unnamed}{number}", voxel_nm[axis])
        for number, (axis, name) in enumerate(zip(source.scale.axes, names, strict=True))
    ]
    return _Array(scheme, "", axes)


def _ome_axes(source: "ChunkedReader", image: Mapping[str, Any], voxel_nm: Mapping[str, float]) -> list[_Axis]:
    """Of an OME-Zarr Neuroglancer counts in voxels of the first scale, and centres the first of them on `translation`."""
    from synpipe.volumes.zarr import scale_and_translation

    axes = source.scale.axes
    overall, shift = scale_and_translation(image.get("coordinateTransformations", []), len(axes))
    steps = {entry["path"]: entry["coordinateTransformations"] for entry in image["datasets"]}
    first, translation = scale_and_translation(image["datasets"][0]["coordinateTransformations"], len(axes))
    read, _ = scale_and_translation(steps[source.scale.folder], len(axes))
    return [
        _Axis(
            axis,
            axis,
            voxel_nm[axis] * first[place] / read[place],
            (translation[place] * overall[place] + shift[place]) / (first[place] * overall[place]) - 0.5,
        )
        for place, axis in enumerate(axes)
        if axis in voxel_nm
    ]
