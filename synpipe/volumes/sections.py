"""Reads volumes that are stored as a folder with one grey PNG or TIFF image per section.

Input: the folder. Output: a `SectionsReader`.
"""

import re
from collections.abc import Callable
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from PIL import Image

from synpipe.errors import SynpipeError
from synpipe.store.fingerprints import folder_sha256
from synpipe.volumes.chunk_plan import Chunking
from synpipe.volumes.reader import SlicesZyx, VoxelReader, describe_error

CACHE_BYTES = 256 * 2**20
MIN_CACHED_SECTIONS = 6  # the sections of two tiles
SUFFIXES = (".png", ".tif", ".tiff")

# Pillow takes images above 179 megapixels for an attack. Such sections are common in EM, and the user named the files.
Image.MAX_IMAGE_PIXELS = None


class SectionsReader(VoxelReader):
    """Reads a folder with a grey PNG or TIFF image per section. The last number in a file's name gives its order.

    The numbers must be consecutive, because a gap would shift every section after it. The first number is free. Images do
    not state the distance of sections, so the voxel size always comes from the spec. Safe to use from several threads;
    a section that two threads need at the same time is decoded twice.
    """

    # Pillow raises SyntaxError for a PNG file with broken chunks.
    errors = (OSError, SyntaxError, ValueError)

    def __init__(self, folder: Path):
        self._folder, self.location = folder, str(folder)
        self._paths = _sections_in_order(folder)
        try:
            with Image.open(self._paths[0]) as first:
                width, height = first.size
                self.dtype = _dtype(first, self._paths[0])
        except self.errors as error:
            raise SynpipeError(f"{self._paths[0]} cannot be read ({describe_error(error)}): copy it again.") from None
        self.shape_zyx = (len(self._paths), height, width)
        # A decoded image serves all tiles of its section.
        cached = max(MIN_CACHED_SECTIONS, CACHE_BYTES // (height * width * self.dtype.itemsize))
        self._section = lru_cache(maxsize=cached)(self._decode)
        self._bytes_read = 0
        self.chunking = Chunking((1, height, width), cached)

    def start_read(self, box: SlicesZyx) -> Callable[[], np.ndarray]:
        z, y, x = box
        return lambda: np.stack([self._section(index)[y, x] for index in range(z.start, z.stop)])

    @property
    def bytes_read(self) -> int:
        return self._bytes_read

    def _decode(self, index: int) -> np.ndarray:
        path = self._paths[index]
        self._bytes_read += path.stat().st_size
        with Image.open(path) as image:
            dtype, shape = _dtype(image, path), (image.height, image.width)
            if (dtype, shape) != (self.dtype, self.shape_zyx[1:]):
                raise SynpipeError(
                    f"{path} is {dtype} of {shape} pixels, {self._paths[0].name} is {self.dtype} of "
                    f"{self.shape_zyx[1:]}: all sections of a volume must be alike."
                )
            return np.asarray(image)

    def identity(self) -> dict[str, Any]:
        return {"sections": folder_sha256(self._folder)}

    def close(self) -> None:
        self._section.cache_clear()


def _sections_in_order(folder: Path) -> list[Path]:
    """The images of a folder in the order of their numbers. Raises `SynpipeError` if the numbers are not consecutive."""
    images = [path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES]
    if not images:
        raise SynpipeError(
            f"Volume {folder} is a folder without PNG or TIFF sections, and not an HDF5 file: correct `volume.path` in "
            "the data set's YAML file."
        )
    numbered = []
    for path in images:
        numbers = re.findall(r"\d+", path.stem)
        if not numbers:
            raise SynpipeError(
                f"{path} has no number in its name. The numbers give the order of the sections: rename or remove the file."
            )
        numbered.append((int(numbers[-1]), path))
    numbered.sort()
    for (number, path), (next_number, next_path) in pairwise(numbered):
        if next_number != number + 1:
            problem = "have the same number" if next_number == number else f"leave out section {number + 1}"
            raise SynpipeError(
                f"Volume {folder}: {path.name} and {next_path.name} {problem}. Every section needs one image; use a black "
                "image for a section that was lost."
            )
    return [path for _, path in numbered]


def _dtype(image: Image.Image, path: Path) -> np.dtype:
    dtypes = {"L": "u1", "I;16": "<u2", "I;16L": "<u2", "I;16B": ">u2", "F": "f4"}
    if (pages := getattr(image, "n_frames", 1)) != 1:
        raise SynpipeError(_explain_pages(path, pages))
    if image.mode not in dtypes:
        raise SynpipeError(
            f"{path} is not a grey image of 8-bit, 16-bit or floating-point values (its mode is {image.mode}): convert it."
        )
    return np.dtype(dtypes[image.mode])


def refuse_image(path: Path) -> NoReturn:
    """Raise `SynpipeError` for an image that is named where a folder of images is expected."""
    try:
        with Image.open(path) as image:
            pages = getattr(image, "n_frames", 1)
    except SectionsReader.errors as error:
        raise SynpipeError(f"{path} cannot be read ({describe_error(error)}): copy it again.") from None
    if pages > 1:
        raise SynpipeError(_explain_pages(path, pages))
    raise SynpipeError(
        f"Volume {path} is one image. Put one image per section into a folder, and let `volume.path` name the folder."
    )


def _explain_pages(path: Path, pages: int) -> str:
    folder = path.with_name(f"{path.stem}_sections")
    command = (
        "from PIL import Image, ImageSequence; "
        f"[page.save(f'{folder}/{{n:05d}}.tif') for n, page in enumerate(ImageSequence.Iterator(Image.open('{path}')))]"
    )
    return (
        f"{path} is a stack of {pages:,} pages. synpipe reads a folder with one image per section: run `mkdir {folder} && python "
        f'-c "{command}"`, and set `volume.path` to {folder}.'
    )
