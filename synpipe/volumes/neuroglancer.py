"""Build Neuroglancer links: addresses that show a place of a volume in the browser.

Inputs: an opened `Volume` and positions in nm. Outputs: the JSON of the layer that shows the volume, and addresses that
carry the whole state of Neuroglancer in their fragment. Guarantees:
- Building a link needs nothing but its inputs and touches no network.
- The voxel in the middle of the view is the one that the tile is centred on, whatever the volume's own metadata say about
  its place.
- A volume that no browser can reach, such as a local file, has no layer and hence no link.

The state follows https://github.com/google/neuroglancer/blob/master/python/neuroglancer/viewer_state.py. Data sources are
written with `precomputed://`, `n5://`, `zarr2://` or `zarr3://` before the address. Neuroglancer accepts these beside its
newer `ADDRESS|zarr2:` (`KvStoreBasedDataSourceLegacyUrlAdapter`), and the older versions that laboratories run know only
these.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import quote

import numpy as np
import pyarrow as pa

from synpipe.volumes.volume import Volume, VolumeSpec

if TYPE_CHECKING:
    from synpipe.volumes.chunked import ChunkedReader

# A tile of 256 voxels takes 640 pixels of the screen, so that a window of a thousand pixels also shows its surroundings.
VOXELS_PER_PIXEL = 256 / 640
# Decimals of a position in voxels, fine enough that what `volumes.EDGE_TOLERANCE_VOXELS` takes for the edge is the edge.
POSITION_DECIMALS = 6
# Characters of a fragment that stay as they are. Brackets and quotes are escaped, so that a link survives Markdown and mail.
SAFE = ":/,@"

MARKER_COLOUR = "#ffd400"


@dataclass(frozen=True)
class Viewer:
    """A Neuroglancer site that shows a volume.

    site: address of the site. image: layer of the volume, see `image_layer`; None shows no volume.
    """

    site: str
    image: dict[str, Any] | None
    voxel_size_nm_zyx: tuple[float, float, float]

    def link(self, position_nm_zyx: Sequence[float], name: str, layers: Sequence[dict[str, Any]] = ()) -> str:
        """Return the address that shows a position and marks it with a point of this name.

        position_nm_zyx: nm, in the space of the volume. layers: further layers, as JSON. The view shows the section of the
        position, at a scale at which a tile and its surroundings are visible.
        """
        sizes = self.voxel_size_nm_zyx[::-1]
        place = [
            round(float(nm / size), POSITION_DECIMALS) for nm, size in zip(position_nm_zyx[::-1], sizes, strict=True)
        ]
        return self._address(place, name, layers)

    def template(self) -> str:
        """Return the address with the placeholders `{x}`, `{y}`, `{z}` (voxels) and `{id}` for a position and its name."""
        address = self._address(["{x}", "{y}", "{z}"], "{id}", ())
        for axis in "xyz":  # numbers stand without quotes
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
            # In units of the shortest side of a voxel.
            "crossSectionScale": VOXELS_PER_PIXEL * x_nm / min(axes.values()),
            "layout": "xy",
            "layers": [*([self.image] if self.image else []), *layers, marker],
        }
        return f"{self.site}/#!{quote(json.dumps(state, separators=(',', ':')), safe=SAFE)}"

    def links(self, rows: pa.Table) -> pa.Array:
        """Return a link for each row: string (n,), null where a row has no position.

        rows: a table with `synapse_id`, `x_nm`, `y_nm` and `z_nm`.
        """
        columns = (rows[name].to_pylist() for name in ("z_nm", "y_nm", "x_nm", "synapse_id"))
        links = [
            None if None in position else self.link(position, "no id" if synapse_id is None else str(synapse_id))
            for *position, synapse_id in zip(*columns, strict=True)
        ]
        return pa.array(links, pa.string())


def image_layer(spec: VolumeSpec, volume: Volume) -> dict[str, Any] | None:
    """Return the layer that shows a volume in Neuroglancer, as JSON; None if the volume is not reached over a network.

    A precomputed volume states its own place correctly. The other kinds get a transform that puts voxels where the data
    set has them, because Neuroglancer ignores the offset of N5 and Zarr arrays and the `resolution` of Zarr arrays, and
    places the centre of the first voxel of an OME-Zarr where synpipe places its corner.
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
    # The matrix maps lengths to lengths, except that its last column is in voxels of the output (see
    # `coordinate_transform.ts` of Neuroglancer).
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
    """axis: z, y or x. name: its name in Neuroglancer. size_nm: size of a voxel. begins: start of the first voxel, voxels."""

    axis: str
    name: str
    size_nm: float
    begins: float = 0.0


@dataclass(frozen=True)
class _Array:
    """The array that Neuroglancer opens, with its axes in order. folder: relative to the volume's address."""

    scheme: str
    folder: str
    axes: list[_Axis]


def _n5(source: "ChunkedReader", voxel_nm: Mapping[str, float]) -> _Array:
    """A single array. Its neighbours s0, s1 … are not used, because their scales in nm are written in too many ways."""
    # As in Neuroglancer, attributes that the array lacks are taken from the group.
    array = f"{source.scale.folder}/attributes.json".removeprefix("/")
    attributes = {**source.documents.get("attributes.json", {}), **source.documents[array]}
    names = attributes.get("axes") or "xyz"
    factors = attributes.get("downsamplingFactors") or [1]
    # A group may list the factors of all its arrays; those are not used. Neuroglancer counts in voxels before downsampling.
    factors = [1] * 3 if isinstance(factors[0], list) or len(factors) != 3 else factors
    axes = [
        _Axis(axis, name, voxel_nm[axis] / factor)
        for axis, name, factor in zip(source.scale.axes, names, factors, strict=True)
    ]
    return _Array("n5", source.scale.folder, axes)


def _zarr(source: "ChunkedReader", voxel_nm: Mapping[str, float]) -> _Array:
    """A single array, or all scales of an OME-Zarr."""
    third = source.documents.get("zarr.json")
    scheme = "zarr3" if third else "zarr2"
    attributes = third.get("attributes", {}) if third else source.documents.get(".zattrs") or {}
    ome = attributes.get("ome", attributes)
    if "multiscales" in ome:
        return _Array(scheme, "", _ome_axes(source, ome["multiscales"][0], voxel_nm))
    names = (third.get("dimension_names") if third else attributes.get("_ARRAY_DIMENSIONS")) or [None] * 3
    unnamed = "dim_" if third else "d"  # followed by the number of the axis, see `zarr/frontend.ts` of Neuroglancer
    axes = [
        _Axis(axis, name or f"{unnamed}{number}", voxel_nm[axis])
        for number, (axis, name) in enumerate(zip(source.scale.axes, names, strict=True))
    ]
    return _Array(scheme, "", axes)


def _ome_axes(source: "ChunkedReader", image: Mapping[str, Any], voxel_nm: Mapping[str, float]) -> list[_Axis]:
    """The axes of an OME-Zarr. Neuroglancer counts in voxels of the first scale and centres its first voxel on `translation`."""
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
