"""Finds credentials in addresses. Descriptions with addresses are recorded in manifests, tables and published sites.

Messages of this module never repeat the address, because messages end up in Dagster's history and in logs.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

ADVICE = (
    "synpipe records addresses in its files. For s3:// set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY in the environment, and "
    "for gs:// set GOOGLE_APPLICATION_CREDENTIALS. Data behind another kind of login can be served on this machine, for example "
    "with `rclone serve http`"
)

# A prefix such as `precomputed://` may be followed by a folder, and names of folders may hold an @.
_SCHEME = r"(?<![\w+.-])(?!(?:precomputed|n5|zarr\d?)://)[a-z][a-z0-9+.-]*://"
# A password may hold a slash: what follows the host and a colon and is no port then counts as one.
_LOGIN = re.compile(rf"{_SCHEME}([^/?#\s@]*@|[^/?#\s@:\[\]]+:(?!\d*(?:[/?#\s\"'`.,;)]|$)))", re.IGNORECASE)
_QUERY = re.compile(rf"{_SCHEME}[^\s?]*\?", re.IGNORECASE)
_SECRET_IN_QUERY = re.compile(
    rf"{_SCHEME}\S*[?&;#]([\w.-]*(token|signature|secret|passw|credential|auth(?!or)|key)[\w.-]*|sig|policy)=",
    re.IGNORECASE,
)


def find_credentials(text: str, any_query: bool = True) -> str | None:
    """What in the addresses of a text is, or may be, a credential, in words; None if there is nothing.

    any_query: whether every query string counts, since no list of names covers all signed addresses. Without it, only a query
    string with a telling name counts; this is for texts that are written for people.
    """
    if _LOGIN.search(text):
        return "a user name or a password"
    return "a query string" if (_QUERY if any_query else _SECRET_IN_QUERY).search(text) else None


def refuse_credentials(text: str, any_query: bool = True) -> str:
    """The same text. Raises `ValueError` if an address in it holds credentials."""
    found = find_credentials(text, any_query)
    if found:
        raise ValueError(f"the address holds {found}: remove it. {ADVICE}")
    return text


def refuse_credentials_within(value: Any) -> None:
    """Raises `ValueError` that names the key if any text in plain data, such as a YAML document, holds credentials."""
    for key, text in _texts(value, ()):
        found = find_credentials(text, any_query=False)
        if found:
            raise ValueError(f"{'.'.join(key)}: the address holds {found}: remove it. {ADVICE}")


def _texts(value: Any, key: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], str]]:
    """Every text with the keys that lead to it, in the order of the document."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, Mapping):
        for name, item in value.items():
            yield from _texts(name, (*key, "a key"))
            yield from _texts(item, (*key, str(name)))
    elif isinstance(value, list | tuple):
        for number, item in enumerate(value):
            yield from _texts(item, (*key, str(number)))
