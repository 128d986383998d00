"""Describes the scales of a chunked volume, and a chunked format as a way to list them.

A chunked volume has one array or several, each with its own voxel size: its scales. JSON documents inside the volume list
them. One module per format (`precomputed`, `n5`, `zarr`) reads these documents; this module holds what they share.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

NM_BY_UNIT = {
    **dict.fromkeys(("nm", "nanometer", "nanometre", "nanometers", "nanometres"), 1.0),
    **dict.fromkeys(("um", "µm", "μm", "micrometer", "micrometre", "micron", "microns"), 1e3),
    **dict.fromkeys(("mm", "millimeter", "millimetre"), 1e6),
    **dict.fromkeys(("m", "meter", "metre"), 1e9),
    **dict.fromkeys(("angstrom", "Å"), 0.1),
}

ReadDocument = Callable[[str], dict[str, Any] | None]
"""Reads a JSON document of a volume by its path below the volume's root; returns None if there is no such document."""


@dataclass(frozen=True)
class Scale:
    """One array of a chunked volume.

    folder: path below the volume's root. axes: names of the array's axes in their order. options: for `tensorstore.open`.
    voxel_size_nm, offset_nm: in the order z, y, x; None if the volume does not state them in known units.
    """

    folder: str
    axes: tuple[str, ...]
    options: dict[str, Any]
    voxel_size_nm: list[float] | None
    offset_nm: list[float] | None


@dataclass(frozen=True)
class ChunkedFormat:
    """A chunked format.

    name: what stands before `://` in `volume.path`. documents: names of the metadata documents, as Markdown for messages.
    list_scales: finds the scales of a volume; an empty list means that the volume has no metadata of this format. It may
    raise KeyError, TypeError, IndexError, AttributeError or ValueError if the documents do not follow the format.
    """

    name: str
    documents: str
    list_scales: Callable[[ReadDocument], list[Scale]]


def scale_of_array(
    folder: str, options: dict[str, Any], attributes: dict[str, Any], axis_names: Any, default_axes: str
) -> Scale:
    """The scale that an array's own attributes describe.

    attributes: `resolution` and `units`, or `pixelResolution` with its `unit`, and `offset`, in the order of the axes.
    axis_names: the names that the array gives to its axes. `default_axes` replaces them unless they are x, y and z.
    """
    axes = tuple(axis_names) if axis_names and sorted(axis_names) == ["x", "y", "z"] else tuple(default_axes)
    size, units = attributes.get("resolution"), attributes.get("units")
    pixel = attributes.get("pixelResolution")
    if size is None and isinstance(pixel, dict):
        size, units = pixel["dimensions"], [pixel.get("unit")] * len(axes)
    elif size is None:
        size = pixel
    nm_per_unit = [NM_BY_UNIT.get(unit) for unit in units] if units else [None]
    options = {**options, "path": folder} if folder else options
    if size is None or None in nm_per_unit:
        return Scale(folder, axes, options, None, None)
    offset = attributes.get("offset")
    return Scale(
        folder, axes, options, to_nm_zyx(axes, size, nm_per_unit), offset and to_nm_zyx(axes, offset, nm_per_unit)
    )


def to_nm_zyx(axes: Sequence[str], values: Sequence[float], nm_per_unit: Sequence[Any]) -> list[float]:
    """Convert one value per axis, in the order of `axes`, to nm in the order z, y, x."""
    by_axis = {axis: value * nm for axis, value, nm in zip(axes, values, nm_per_unit, strict=True)}
    return [by_axis[axis] for axis in "zyx"]
