"""Find damaged parts of a LanceDB table, and move them aside so that LanceDB can read and write the rest.

Input: a LanceDB table in its folder. LanceDB keeps a small file per version, its manifest, and a small JSON file per tag. If one
of them is damaged, LanceDB can list neither versions nor tags, and nothing can be published. Output: damaged ones lie aside as
`*.damaged`. The versions and tags that are left can be read again.
"""

import contextlib
import json
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pyarrow as pa

from synpipe.errors import SynpipeError, one_line
from synpipe.index.build import open_lance
from synpipe.store.files import set_aside
from synpipe.store.objects import BulkPath, list_paths

# What LanceDB and pylance raise for damaged files. A missing version is a ValueError.
UNREADABLE = (RuntimeError, OSError, ValueError, KeyError, TypeError, pa.ArrowException)
_NEWEST = 2**64 - 1  # LanceDB names the manifest of version n after this number minus n


@contextlib.contextmanager
def explaining_damage(folder: BulkPath, name: str) -> Iterator[None]:
    """Turn what LanceDB raises for damaged files of an index into `SynpipeError`."""
    try:
        yield
    except UNREADABLE as error:
        raise SynpipeError(
            f"The index {name} in {folder} cannot be read ({one_line(error)}): materialise index_{name} again to rebuild it."
        ) from error


def set_damaged_parts_aside(path: BulkPath, log: Callable[[str], None]) -> list[str]:
    """Move damaged manifests and tags of the LanceDB table in this folder aside, and log their names.

    Returns the tags that are lost thereby.
    """
    lost = []
    versions = {_number_of(manifest): manifest for manifest in list_paths(path / "_versions", "*.manifest")}
    if not _can_list(path):
        for number, manifest in list(versions.items()):
            if problem := _problem_of(partial(_read_version, path, number)):
                _set_aside(manifest, problem, log)
                del versions[number]
    for tag in list_paths(path / "_refs" / "tags", "*.json"):
        if problem := _problem_of(partial(_check_tag, tag, versions)):
            _set_aside(tag, problem, log)
            lost.append(tag.stem)
    return lost


def _can_list(path: BulkPath) -> bool:
    return _problem_of(lambda: open_lance(path).versions()) is None


def _problem_of(read: Callable[[], Any]) -> str | None:
    """Why this cannot be read, or None."""
    try:
        read()
    except UNREADABLE as error:
        return one_line(error)
    return None


def _read_version(path: BulkPath, number: int) -> None:
    open_lance(path, number).schema  # noqa: B018 - reading the schema is the test


def _check_tag(tag: BulkPath, versions: dict[int, BulkPath]) -> None:
    open_lance(tag.parent.parent.parent).tags.get_version(tag.stem)  # LanceDB can read it
    content = json.loads(tag.read_bytes())
    manifest = versions.get(content["version"])
    if content.get("branch") is not None or manifest is None:
        raise ValueError("it names a version that does not exist")
    if content.get("manifestSize") not in (None, manifest.stat().st_size):
        raise ValueError(f"its size is not that of {manifest.name}")


def _set_aside(path: BulkPath, problem: str, log: Callable[[str], None]) -> None:
    log(f"{path} is damaged ({problem}): moved to {set_aside(path).name}")


def _number_of(manifest: BulkPath) -> int:
    """The version of a manifest. Early versions of LanceDB named it after the version itself."""
    number = int(manifest.stem)
    return _NEWEST - number if number > _NEWEST // 2 else number
