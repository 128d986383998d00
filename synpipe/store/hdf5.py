"""Makes sure that an object of an HDF5 file lies in this file.

HDF5 can lead to other files without notice: by an external link, by a virtual data set, and by raw files that hold the values.
A fingerprint of the file does not cover them, so a change of them would go unnoticed. HDF5 even reads the values of a virtual
data set as zeros if their file is gone.
"""

from typing import Any

import h5py

from synpipe.errors import SynpipeError

MAX_SOFT_LINKS = 16  # HDF5 itself follows no more of them by default


def refuse_other_files(file: h5py.File, path: str) -> None:
    """Raise `SynpipeError` if the object at this path, or any of its values, lies in another file.

    Nothing happens if there is no such object.
    """
    _refuse_external_links(file, path, MAX_SOFT_LINKS)
    data = file.get(path)
    if not isinstance(data, h5py.Dataset):
        return
    sources = [source.file_name for source in data.virtual_sources()] if data.is_virtual else []
    sources += [name for name, _, _ in data.external or ()]
    if sources or data.is_virtual:
        raise SynpipeError(
            f"{file.filename}: `{path}` is put together from {', '.join(sorted(set(sources))[:3]) or 'other data sets'}, "
            "whose changes synpipe would not notice: copy the values into an ordinary data set of one file, and name that "
            "file in the data set's YAML file."
        )


def _refuse_external_links(group: h5py.Group, path: str, soft_links_left: int) -> None:
    item: Any = group.file if path.startswith("/") else group
    for name in path.split("/"):
        if name in ("", "."):
            continue
        # `Group.get` does not tell a link that leads nowhere from an absent one.
        key = name.encode()
        if not isinstance(item, h5py.Group) or not item.id.links.exists(key):
            return
        kind = item.id.links.get_info(key).type
        if kind == h5py.h5l.TYPE_EXTERNAL:
            other_file, place = (part.decode(errors="replace") for part in item.id.links.get_val(key))
            raise SynpipeError(
                f"{group.file.filename}: `{path}` leads to `{place}` in the file {other_file}, whose changes synpipe would "
                "not notice: name that file in the data set's YAML file, or copy what it holds into this file."
            )
        if kind == h5py.h5l.TYPE_SOFT and soft_links_left:
            _refuse_external_links(item, item.id.links.get_val(key).decode(), soft_links_left - 1)
        item = item.get(name)
