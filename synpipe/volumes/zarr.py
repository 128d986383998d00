"""Lists the scales of a Zarr volume, version 2 or 3, including OME-Zarr groups.

Formats: https://zarr-specs.readthedocs.io and https://ngff.openmicroscopy.org.
"""

from typing import Any

from synpipe.volumes.scales import NM_BY_UNIT, ChunkedFormat, ReadDocument, Scale, scale_of_array, to_nm_zyx


def list_zarr_scales(read_document: ReadDocument) -> list[Scale]:
    """The array itself, or the arrays that the `multiscales` of an OME-Zarr group name."""
    version_3 = read_document("zarr.json")
    if version_3 is not None:
        attributes = version_3.get("attributes", {})
        if version_3["node_type"] == "array":
            names = version_3.get("dimension_names") or attributes.get("axes")
            return [scale_of_array("", {"driver": "zarr3"}, attributes, names, "zyx")]
        return _list_ome_scales(attributes.get("ome", attributes), "zarr3")
    attributes = read_document(".zattrs") or {}
    if read_document(".zarray") is not None:
        names = attributes.get("_ARRAY_DIMENSIONS") or attributes.get("axes")
        return [scale_of_array("", {"driver": "zarr"}, attributes, names, "zyx")]
    return _list_ome_scales(attributes, "zarr")


def _list_ome_scales(attributes: dict[str, Any], driver: str) -> list[Scale]:
    """The scales of the first image of an OME-Zarr group.

    Every scale gets the corner of the finest scale as its offset. That is right wherever a coarser scale averages cuboids
    of voxels, and makes it irrelevant whether a `translation` refers to corners or to centres of voxels.
    """
    if "multiscales" not in attributes:
        return []
    image = attributes["multiscales"][0]
    axes = tuple(axis["name"] for axis in image["axes"])
    nm_per_unit = [NM_BY_UNIT.get(axis.get("unit")) if axis["name"] in "zyx" else 1.0 for axis in image["axes"]]
    image_scale, image_shift = scale_and_translation(image.get("coordinateTransformations", []), len(axes))
    scales: list[Scale] = []
    for entry in image["datasets"]:
        size, offset = scale_and_translation(entry["coordinateTransformations"], len(axes))
        size = [a * b for a, b in zip(size, image_scale, strict=True)]
        offset = [a * b + c for a, b, c in zip(offset, image_scale, image_shift, strict=True)]
        options = {"driver": driver, "path": entry["path"]}
        if None in nm_per_unit:
            scales.append(Scale(entry["path"], axes, options, None, None))
            continue
        corner = scales[0].offset_nm if scales else to_nm_zyx(axes, offset, nm_per_unit)
        scales.append(Scale(entry["path"], axes, options, to_nm_zyx(axes, size, nm_per_unit), corner))
    return scales


def scale_and_translation(transformations: list[dict[str, Any]], axis_count: int) -> tuple[list[float], list[float]]:
    """Scale and translation, one number per axis, of the `coordinateTransformations` of an OME-Zarr."""
    scale, translation = [1.0] * axis_count, [0.0] * axis_count
    for transformation in transformations:
        if transformation["type"] == "scale":
            scale = transformation["scale"]
        elif transformation["type"] == "translation":
            translation = transformation["translation"]
    return scale, translation


ZARR = ChunkedFormat("zarr", "`zarr.json`, `.zarray` or OME's `multiscales`", list_zarr_scales)
