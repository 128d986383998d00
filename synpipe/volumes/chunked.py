"""Chunked volumes through tensorstore: neuroglancer precomputed, N5, Zarr 2 and 3; in a folder or behind an address.

In: the kind, the place, and the voxel size that is wanted. Out: a `Source`. Guarantees: a scale is chosen by its voxel
size, never by its number; a chunk that is not there is an error and never black; what cannot be reached is given up after
a few attempts; a chunk that was cut off is an error. What no checksum guards can still be wrong: raw and JPEG chunks have
none, and a flipped bit, or zeros in place of the end of a JPEG of high quality, may decode to a wrong picture. Only another
request per chunk would show some of that, so it is not looked for. The gzip of N5 and the crc32c of Zarr 3 show every bit.

What the documents say: precomputed, https://github.com/google/neuroglancer/tree/master/src/datasource/precomputed; N5,
https://github.com/saalfeldlab/n5; Zarr, https://zarr-specs.readthedocs.io; OME-Zarr, https://ngff.openmicroscopy.org.
"""

import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from synpipe.errors import SynpipeError
from synpipe.store.fingerprints import folder_sha256
from synpipe.volumes.chunk_plan import Chunking
from synpipe.volumes.local import Box, Source, line
from synpipe.volumes.volume import same_numbers

# Without these a server that stalls would be waited for without end. curl reads them once, when tensorstore is loaded.
os.environ.setdefault("TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS", "20")
os.environ.setdefault("TENSORSTORE_CURL_LOW_SPEED_LIMIT_BYTES", "1")
import tensorstore as ts

CACHE_BYTES = 256 * 2**20  # decoded chunks: neighbouring tiles share them
IN_FLIGHT = 64  # requests at a time; more gain nothing over a delay of 20 ms
# Waits of 0.2, 0.4 … 5 s, eleven seconds in all. tensorstore's own 32 attempts are many minutes.
RETRIES = {"max_retries": 6, "initial_delay": "200ms", "max_delay": "5s"}
MAX_SCALES = 32

NM_BY_UNIT = {
    **dict.fromkeys(("nm", "nanometer", "nanometre", "nanometers", "nanometres"), 1.0),
    **dict.fromkeys(("um", "µm", "μm", "micrometer", "micrometre", "micron", "microns"), 1e3),
    **dict.fromkeys(("mm", "millimeter", "millimetre"), 1e6),
    **dict.fromkeys(("m", "meter", "metre"), 1e9),
    **dict.fromkeys(("angstrom", "Å"), 0.1),
}


@dataclass(frozen=True)
class Scale:
    """One array of a volume. options: for `ts.open`. voxel_size_nm, offset_nm: z, y, x; None where it does not say them."""

    folder: str
    axes: tuple[str, ...]
    options: dict[str, Any]
    voxel_size_nm: list[float] | None
    offset_nm: list[float] | None


class Chunked(Source):
    """One scale of a chunked volume. Safe to use from several threads.

    Each read fetches its chunks all at once, while the caller goes on; reads of the same chunk share one request, and its
    decoded voxels as long as the cache keeps them. A read whose result nobody waits for any more is cancelled.
    """

    errors = (ValueError, OSError)  # tensorstore raises these only
    remedy = "try again when its server and the network are well; if it is damaged, copy it again"

    def __init__(self, kind: str, place: str | Path, wanted_nm_zyx: tuple[float, float, float] | None):
        self._kind, self._folder = kind, place if isinstance(place, Path) else None
        self.location = f"{kind}://{place}"
        root = {"driver": "file", "path": f"{place}/"} if self._folder else f"{str(place).rstrip('/')}/"
        self._documents: dict[str, Any] = {}
        self._read_before = _bytes_read()
        self._context = ts.Context(
            {
                "cache_pool": {"total_bytes_limit": CACHE_BYTES},
                **{f"{service}_request_retries": RETRIES for service in ("http", "gcs", "s3")},
                **{f"{service}_request_concurrency": {"limit": IN_FLIGHT} for service in ("http", "gcs", "s3")},
            }
        )
        try:
            self._root = ts.KvStore.open(ts.KvStore.Spec(root), context=self._context).result()
            self._scale = self._chosen(SCALES[kind](self), wanted_nm_zyx)
            self._open()
        except self.errors as error:
            raise SynpipeError(
                f"Volume {self.location} cannot be opened ({line(error)}): correct `volume.path` in the data set's YAML "
                "file, ask for access where permission is denied, or try again when its server and the network are well."
            ) from None
        except (KeyError, TypeError, IndexError, AttributeError) as error:
            raise SynpipeError(
                f"Volume {self.location}: {' and '.join(sorted(self._documents))} are not as {kind} has them "
                f"({type(error).__name__} {line(error)}): export it again."
            ) from None

    def document(self, name: str) -> dict[str, Any] | None:
        """A JSON document of the volume; None where there is none of that name."""
        found = self._root.read(name).result()
        if found.state != "value":
            return None
        content = json.loads(found.value)
        # A server's name for the version of what it sent; that of a local file is its time, which says nothing.
        version = found.stamp.generation.hex() if self._folder is None else None
        self._documents[name] = [content, version]
        return content

    def _chosen(self, scales: list[Scale], wanted: tuple[float, float, float] | None) -> Scale:
        where = f"Volume {self.location}"
        if not scales:
            raise SynpipeError(
                f"{where} has no metadata of that kind ({DOCUMENTS[self._kind]}) there: correct `volume.path` in the data "
                "set's YAML file; it names the folder that holds them."
            )
        if len(scales) == 1:
            return scales[0]  # whether it agrees with the spec is held against it like that of any other volume
        sizes = [scale.voxel_size_nm for scale in scales]
        if None in sizes:
            raise SynpipeError(
                f"{where} has scales whose voxel size it does not say in known units: set `volume.path` to one of them, "
                f"{', '.join(scale.folder for scale in scales)}."
            )
        fitting = [scale for scale in scales if wanted is not None and same_numbers(scale.voxel_size_nm, wanted)]
        if len(fitting) != 1:
            raise SynpipeError(
                f"{where} has {'no' if wanted else 'several'} scales{f' of {list(wanted)} nm' if wanted else ''}: set "
                f"`volume.voxel_size_nm_zyx` to one of {', '.join(map(str, sizes))}."
            )
        return fitting[0]

    def _open(self) -> None:
        spec = {
            "kvstore": self._root.spec().to_json(),
            "recheck_cached_data": "open",
            "recheck_cached_metadata": "open",
        }
        # Else a chunk that is not there reads as zeros, like a black one.
        spec |= {"fill_missing_data_reads": False, **self._scale.options}
        store = ts.open(spec, read=True, open=True, context=self._context).result()
        axes = list(self._scale.axes)
        unfit = SynpipeError(
            f"Volume {self.location} has axes {', '.join(axes)} and shape {store.shape}: one grey value for each z, y, x is "
            "needed."
        )
        if len(axes) != store.rank or 0 in store.shape:
            raise unfit
        for axis in [axis for axis in axes if axis not in "zyx"]:
            place = axes.index(axis)
            if store.shape[place] != 1:
                raise unfit
            store = store[(slice(None),) * place + (store.domain.origin[place],)]
            axes.remove(axis)
        if sorted(axes) != ["x", "y", "z"]:
            raise unfit
        zyx = store[ts.d[[axes.index(axis) for axis in "zyx"]].transpose[:]]
        self._data = zyx[ts.d[:].translate_to[0]]
        depth, height, width = self._data.shape
        self.scale_name = self._scale.folder or None
        self.shape_zyx, self.dtype = (depth, height, width), self._data.dtype.numpy_dtype
        self.voxel_size_nm_zyx, self.offset_nm_zyx = self._scale.voxel_size_nm, self._scale.offset_nm
        shape: Any = self._data.chunk_layout.read_chunk.shape  # the first begins at voxel 0 in all these formats
        self.chunking = Chunking(shape, CACHE_BYTES // (math.prod(shape) * self.dtype.itemsize))

    @property
    def bytes_read(self) -> int:
        """Of all volumes that are open in this process at the time: tensorstore counts no other way."""
        return _bytes_read() - self._read_before

    def start_read(self, box: Box) -> Callable[[], np.ndarray]:
        future = self._data[box].read(order="C")
        future.force()  # else it would begin only when it is waited for
        return future.result

    def close(self) -> None:
        del self._data, self._root, self._context  # and with them the cache

    def identity(self) -> dict[str, Any]:
        identity: dict[str, Any] = {"documents": self._documents, "scale": self._scale.folder}
        if self._folder is not None:
            identity["content"] = folder_sha256(self._folder / self._scale.folder)
        return identity

    @property
    def scale(self) -> Scale:
        """The array that is read."""
        return self._scale

    @property
    def documents(self) -> dict[str, Any]:
        """The JSON documents that were looked at, by name."""
        return {name: content for name, (content, _) in self._documents.items()}


def _bytes_read() -> int:
    """Since this process began."""
    metrics = ts.experimental_collect_matching_metrics("/tensorstore/kvstore/")
    return sum(int(metric["values"][0]["value"]) for metric in metrics if metric["name"].endswith("/bytes_read"))


def open_chunked(kind: str, place: str | Path, wanted_nm_zyx: tuple[float, float, float] | None) -> Chunked:
    """kind: precomputed, n5 or zarr. place: a folder or an address. wanted_nm_zyx: the voxel size of the scale to read."""
    return Chunked(kind, place, wanted_nm_zyx)


def precomputed_scales(volume: Chunked) -> list[Scale]:
    info = volume.document("info")
    if info is None:
        return []
    return [
        Scale(
            scale["key"],
            ("x", "y", "z", "channel"),
            {"driver": "neuroglancer_precomputed", "scale_index": index},
            scale["resolution"][::-1],
            [a * b for a, b in zip(scale.get("voxel_offset", (0, 0, 0)), scale["resolution"], strict=True)][::-1],
        )
        for index, scale in enumerate(info["scales"])
    ]


def n5_scales(volume: Chunked) -> list[Scale]:
    """The array itself, or the arrays s0, s1 … of a group, as its writers name them."""
    found = [("", volume.document("attributes.json"))]
    if found[0][1] is None or "dimensions" not in found[0][1]:
        folders = [f"s{number}" for number in range(MAX_SCALES)]
        found = []
        for folder in folders:
            attributes = volume.document(f"{folder}/attributes.json")
            if attributes is None:
                break
            found.append((folder, attributes))
    return [
        _array(folder, {"driver": "n5"}, attributes, attributes.get("axes"), "xyz")
        for folder, attributes in found
        if attributes is not None
    ]


def zarr_scales(volume: Chunked) -> list[Scale]:
    """The array itself, or the arrays that the `multiscales` of an OME-Zarr group name."""
    third = volume.document("zarr.json")
    if third is not None:
        attributes = third.get("attributes", {})
        if third["node_type"] == "array":
            names = third.get("dimension_names") or attributes.get("axes")
            return [_array("", {"driver": "zarr3"}, attributes, names, "zyx")]
        return _ome_scales(attributes.get("ome", attributes), "zarr3")
    attributes = volume.document(".zattrs") or {}
    if volume.document(".zarray") is not None:
        names = attributes.get("_ARRAY_DIMENSIONS") or attributes.get("axes")
        return [_array("", {"driver": "zarr"}, attributes, names, "zyx")]
    return _ome_scales(attributes, "zarr")


def _array(folder: str, options: dict[str, Any], attributes: dict[str, Any], names: Any, default: str) -> Scale:
    """An array with attributes in the order of its axes: `resolution` and `units`, or `pixelResolution` with its `unit`."""
    axes = tuple(names) if names and sorted(names) == ["x", "y", "z"] else tuple(default)
    size, units = attributes.get("resolution"), attributes.get("units")
    pixel = attributes.get("pixelResolution")
    if size is None and isinstance(pixel, dict):
        size, units = pixel["dimensions"], [pixel.get("unit")] * len(axes)
    elif size is None:
        size = pixel
    factors = [NM_BY_UNIT.get(unit) for unit in units] if units else [None]
    options = {**options, "path": folder} if folder else options
    if size is None or None in factors:
        return Scale(folder, axes, options, None, None)
    offset = attributes.get("offset")
    return Scale(folder, axes, options, _zyx(axes, size, factors), offset and _zyx(axes, offset, factors))


def _ome_scales(attributes: dict[str, Any], driver: str) -> list[Scale]:
    """The scales of the first image of an OME-Zarr group.

    A scale begins at the corner at which the finest begins, which is so wherever blocks of voxels were averaged. Whether a
    `translation` is of corners or of centres of voxels is then of no concern.
    """
    if "multiscales" not in attributes:
        return []
    image = attributes["multiscales"][0]
    axes = tuple(axis["name"] for axis in image["axes"])
    factors = [NM_BY_UNIT.get(axis.get("unit")) if axis["name"] in "zyx" else 1.0 for axis in image["axes"]]
    overall, shift = scale_and_translation(image.get("coordinateTransformations", []), len(axes))
    found: list[Scale] = []
    for entry in image["datasets"]:
        size, offset = scale_and_translation(entry["coordinateTransformations"], len(axes))
        size = [a * b for a, b in zip(size, overall, strict=True)]
        offset = [a * b + c for a, b, c in zip(offset, overall, shift, strict=True)]
        options = {"driver": driver, "path": entry["path"]}
        if None in factors:
            found.append(Scale(entry["path"], axes, options, None, None))
            continue
        corner = found[0].offset_nm if found else _zyx(axes, offset, factors)
        found.append(Scale(entry["path"], axes, options, _zyx(axes, size, factors), corner))
    return found


def scale_and_translation(steps: list[dict[str, Any]], count: int) -> tuple[list[float], list[float]]:
    """Scale and translation of OME-Zarr's `coordinateTransformations`."""
    scale, translation = [1.0] * count, [0.0] * count
    for step in steps:
        if step["type"] == "scale":
            scale = step["scale"]
        elif step["type"] == "translation":
            translation = step["translation"]
    return scale, translation


def _zyx(axes: tuple[str, ...], values: list[float], factors: list[Any]) -> list[float]:
    """Values in the order of the axes and in units → z, y, x in nm."""
    by_axis = {axis: value * factor for axis, value, factor in zip(axes, values, factors, strict=True)}
    return [by_axis[axis] for axis in "zyx"]


SCALES = {"precomputed": precomputed_scales, "n5": n5_scales, "zarr": zarr_scales}
DOCUMENTS = {
    "precomputed": "`info`",
    "n5": "`attributes.json`",
    "zarr": "`zarr.json`, `.zarray` or OME's `multiscales`",
}
