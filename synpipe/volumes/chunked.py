"""Reads chunked volumes (precomputed, N5, Zarr 2 and 3) through tensorstore, from a folder or from a network address.

Input: the format, the place, and the voxel size that is wanted. Output: a `ChunkedReader`. Guarantees:
- A scale is chosen by its voxel size, never by its number.
- A missing chunk is an error. It never reads as black.
- Reading stops with an error after a few attempts if the volume cannot be reached, and if an answer takes too long or never
  ends; see `server_limits`.
- A truncated chunk is an error.

Damage that no checksum covers can stay undetected. Raw and JPEG chunks have no checksum, so a flipped bit, or zeros in
place of the end of a high-quality JPEG, may decode to a wrong image. Detecting some of these cases would take another
request per chunk, so synpipe does not try. A web page that a server sends in place of a raw chunk is recognised. The gzip
of N5 and the crc32c of Zarr 3 reveal every flipped bit.
"""

import json
import math
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from synpipe.errors import SynpipeError
from synpipe.store.fingerprints import folder_sha256
from synpipe.volumes.chunk_plan import Chunking
from synpipe.volumes.reader import EndlessAnswer, SlicesZyx, VoxelReader, describe_error, same_nm
from synpipe.volumes.scales import ChunkedFormat, Scale

# Without these settings a read would wait for a stalled server forever. curl reads them once, when tensorstore is imported.
# Each of 64 requests at a time still gets 500 bytes per second of a line of 256 kbit/s.
os.environ.setdefault("TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS", "20")
os.environ.setdefault("TENSORSTORE_CURL_LOW_SPEED_LIMIT_BYTES", "500")
import tensorstore as ts

from synpipe.volumes.server_limits import count_bytes_read, is_web_page, wait_for_answer

CACHE_BYTES = 256 * 2**20  # decoded chunks; neighbouring tiles share them
REQUESTS_IN_FLIGHT = 64  # more requests at a time gain nothing at a latency of 20 ms
# Waits of 0.2, 0.4 … 5 s, eleven seconds in total. The 32 attempts that tensorstore makes by default take many minutes.
RETRIES = {"max_retries": 6, "initial_delay": "200ms", "max_delay": "5s"}


class ChunkedReader(VoxelReader):
    """Reads one scale of a chunked volume. Safe to use from several threads.

    A read requests all its chunks at once, while the caller continues. Reads of the same chunk share one request, and also
    the decoded voxels for as long as the cache keeps them. A read is cancelled when nothing refers to its result any more.

    Attributes: `scale` (the array that is read), and those of `VoxelReader`.
    """

    errors = (ValueError, OSError, EndlessAnswer)  # tensorstore raises the first two
    remedy = "try again when its server and the network are well; if it is damaged, copy it again"

    def __init__(
        self, format: ChunkedFormat, place: str | Path, wanted_voxel_size_nm_zyx: tuple[float, float, float] | None
    ):
        """place: a local folder or an address. wanted_voxel_size_nm_zyx: voxel size of the scale to read."""
        self._format, self._address, self._folder = format, str(place), place if isinstance(place, Path) else None
        self.location = f"{format.name}://{place}"
        root = {"driver": "file", "path": f"{place}/"} if self._folder else f"{str(place).rstrip('/')}/"
        self._documents: dict[str, Any] = {}  # by name: content, and the version that the server gave
        self._bytes_read_before = count_bytes_read()
        self._denial: BaseException | None = None
        self._context = ts.Context(
            {
                "cache_pool": {"total_bytes_limit": CACHE_BYTES},
                **{f"{service}_request_retries": RETRIES for service in ("http", "gcs", "s3")},
                **{
                    f"{service}_request_concurrency": {"limit": REQUESTS_IN_FLIGHT} for service in ("http", "gcs", "s3")
                },
            }
        )
        try:
            self._root = ts.KvStore.open(ts.KvStore.Spec(root), context=self._context).result()
            self.scale = self._choose_scale(format.list_scales(self._read_document), wanted_voxel_size_nm_zyx)
            self._require_scale_within_folder()
            self._open()
        except self.errors as error:
            raise SynpipeError(
                f"Volume {self.location} cannot be opened ({describe_error(error)}): correct `volume.path` in the data "
                "set's YAML file, ask for access where permission is denied, or try again when its server and the network "
                "are well."
            ) from None
        except (KeyError, TypeError, IndexError, AttributeError) as error:
            raise SynpipeError(
                f"Volume {self.location}: {' and '.join(sorted(self._documents))} do not follow the {format.name} format "
                f"({type(error).__name__} {describe_error(error)}): export the volume again."
            ) from None

    def _read_document(self, name: str) -> dict[str, Any] | None:
        """Read a JSON document of the volume. Returns None if there is none of that name."""
        answer = self._wait(self._root.read(name))
        if answer.state != "value":
            return None
        content = json.loads(answer.value)
        # A server's name for the version of a document. For a local file it is the modification time, which says nothing
        # about the content.
        version = answer.stamp.generation.hex() if self._folder is None else None
        self._documents[name] = [content, version]
        return content

    def _choose_scale(self, scales: list[Scale], wanted_nm_zyx: tuple[float, float, float] | None) -> Scale:
        where = f"Volume {self.location}"
        if not scales:
            raise SynpipeError(
                f"{where} has no {self._format.name} metadata ({self._format.documents}): set `volume.path` in the data set's "
                "YAML file to the folder that holds them."
            )
        if len(scales) == 1:
            return scales[0]  # `Volume` compares its voxel size with the spec, as for any other kind
        sizes = [scale.voxel_size_nm for scale in scales]
        if None in sizes:
            raise SynpipeError(
                f"{where} has scales that do not state their voxel size in known units: set `volume.path` to one of them, "
                f"{', '.join(scale.folder for scale in scales)}."
            )
        fitting = [
            scale for scale in scales if wanted_nm_zyx is not None and same_nm(scale.voxel_size_nm, wanted_nm_zyx)
        ]
        if len(fitting) != 1:
            raise SynpipeError(
                f"{where} has {'no' if wanted_nm_zyx else 'several'} scales"
                f"{f' of {list(wanted_nm_zyx)} nm' if wanted_nm_zyx else ''}: set "
                f"`volume.voxel_size_nm_zyx` to one of {', '.join(map(str, sizes))}."
            )
        return fitting[0]

    def _require_scale_within_folder(self) -> None:
        # Whether a local volume changed is found by looking at its folder alone.
        if self._folder is not None and not Path(os.path.normpath(self._folder / self.scale.folder)).is_relative_to(
            self._folder
        ):
            raise SynpipeError(
                f"Volume {self.location}: its scale {self.scale.folder} lies outside its folder, so synpipe would not notice "
                "its changes: move it into the folder, or replace it there by a symbolic link."
            )

    def _open(self) -> None:
        spec = {
            "kvstore": self._root.spec().to_json(),
            "recheck_cached_data": "open",
            "recheck_cached_metadata": "open",
        }
        # By default a missing chunk reads as zeros, like a black one.
        spec |= {"fill_missing_data_reads": False, **self.scale.options}
        array = self._wait(ts.open(spec, read=True, open=True, context=self._context))
        axes = list(self.scale.axes)
        wrong_axes = SynpipeError(
            f"Volume {self.location} has axes {', '.join(axes)} and shape {array.shape}, but one grey value for each z, y, x "
            "is needed."
        )
        if len(axes) != array.rank or 0 in array.shape:
            raise wrong_axes
        for axis in [axis for axis in axes if axis not in "zyx"]:
            place = axes.index(axis)
            if array.shape[place] != 1:
                raise wrong_axes
            array = array[(slice(None),) * place + (array.domain.origin[place],)]
            axes.remove(axis)
        if sorted(axes) != ["x", "y", "z"]:
            raise wrong_axes
        self._is_raw = _is_raw(array.codec.to_json())
        zyx = array[ts.d[[axes.index(axis) for axis in "zyx"]].transpose[:]]
        self._data = zyx[ts.d[:].translate_to[0]]
        depth, height, width = self._data.shape
        self.scale_name = self.scale.folder or None
        self.shape_zyx, self.dtype = (depth, height, width), self._data.dtype.numpy_dtype
        self.voxel_size_nm_zyx, self.offset_nm_zyx = self.scale.voxel_size_nm, self.scale.offset_nm
        shape: Any = self._data.chunk_layout.read_chunk.shape  # in all these formats the first chunk begins at voxel 0
        self.chunking = Chunking(shape, CACHE_BYTES // (math.prod(shape) * self.dtype.itemsize))

    @property
    def bytes_read(self) -> int:
        """Includes what all other volumes of this process read since this one was opened: tensorstore keeps one count."""
        return count_bytes_read() - self._bytes_read_before

    def start_read(self, box: SlicesZyx) -> Callable[[], np.ndarray]:
        if (denial := self._denial) is not None:
            return partial(_raise, denial)
        future = self._data[box].read(order="C")
        future.add_done_callback(self._remember_denial)
        future.force()  # without it the read would only begin when the caller waits for the result
        may_be_page = self._folder is None and self._is_raw

        def finish() -> np.ndarray:
            values = self._wait(future)
            # Not before: a chunk that cannot be read would be requested twice.
            if may_be_page and any(is_web_page(self._wait(voxels)) for voxels in self._start_first_voxels(box)):
                raise ValueError("the server sent a web page instead of a chunk")
            return values

        return finish

    def _remember_denial(self, future: ts.Future) -> None:
        """After a denied read, reads that are planned ahead send no further request."""
        error = None if future.cancelled() else future.exception()
        if error is not None and str(error).startswith("PERMISSION_DENIED"):
            self._denial = error

    def _start_first_voxels(self, box: SlicesZyx) -> list[ts.Future]:
        """Begin to read the first voxels of each chunk of a box that has been read: the chunks are in the cache."""
        fastest = self._data.chunk_layout.inner_order[-1]
        low, high = np.array([(side.start, side.stop) for side in box]).T
        futures = []
        for chunk in self.chunking.chunks(low, high):
            first = [number * size for number, size in zip(chunk, self.chunking.shape_zyx, strict=True)]
            row: list[Any] = [*first]
            row[fastest] = slice(
                first[fastest], min(first[fastest] + self.chunking.shape_zyx[fastest], self.shape_zyx[fastest])
            )
            futures.append(self._data[tuple(row)].read())
            futures[-1].force()
        return futures

    def _wait(self, future: ts.Future) -> Any:
        return future.result() if self._folder is not None else wait_for_answer(future, self._address)

    def close(self) -> None:
        del self._data, self._root, self._context  # which frees the cache

    def identity(self) -> dict[str, Any]:
        identity: dict[str, Any] = {"documents": self._documents, "scale": self.scale.folder}
        if self._folder is not None:
            identity["content"] = folder_sha256(self._folder / self.scale.folder)
        return identity

    @property
    def documents(self) -> dict[str, Any]:
        """The JSON documents that were read, by name."""
        return {name: content for name, (content, _) in self._documents.items()}


def _raise(error: BaseException) -> np.ndarray:
    raise error


def _is_raw(codec: dict[str, Any]) -> bool:
    """Whether chunks are stored as they are, so that other content of the right length would be taken for voxels."""
    if codec["driver"] == "zarr3":
        return [step["name"] for step in codec["codecs"]] == ["bytes"]
    return codec.get("encoding") == "raw" or (codec["driver"] == "zarr" and codec.get("compressor") is None)
