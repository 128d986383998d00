"""Names files on an object store, and lets the rest of synpipe use them like local files.

Input: an address, `s3://bucket/prefix` or `gs://bucket/prefix`, or a folder. Output: for an address an `ObjectPath`, which
has the methods of `pathlib.Path` that synpipe needs, with the same names and meanings; for a folder a `Path`. Guarantees:
- An object is complete or absent, whatever interrupts its upload.
- Problems with the server, the network or permissions raise a `SynpipeError` that names the address, within seconds.

Credentials and endpoint come from the environment variables that all cloud tools read. For S3 these are AWS_ACCESS_KEY_ID,
AWS_SECRET_ACCESS_KEY, AWS_REGION, AWS_ENDPOINT_URL (which may begin with http://) and the rest of the SDK's chain; for GCS,
GOOGLE_APPLICATION_CREDENTIALS. They are never part of an address, a manifest or a message.
"""

import os
import re
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.fs as pafs

from synpipe.addresses import ADVICE, find_credentials
from synpipe.errors import SynpipeError, one_line

ADDRESS = re.compile(r"(s3|gs)://[a-z0-9][a-z0-9._-]{1,61}[a-z0-9](/[\w.=+ -]+)*")
CONNECT_S, SILENCE_S, ATTEMPTS = 3, 20, 3
HINTS = {
    "s3": "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION and, if it is not Amazon's, AWS_ENDPOINT_URL",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS",
}

# Threads for uploads; see `ObjectPath.write_bytes`.
_uploads = ThreadPoolExecutor(thread_name_prefix="upload")


@dataclass(frozen=True)
class ObjectStat:
    """Status of an object or of a folder. st_size: bytes. st_mtime: time of the upload, in seconds since 1970."""

    st_size: int
    st_mtime: float
    is_file: bool


@dataclass(frozen=True, order=True)
class ObjectPath:
    """An object, or a prefix that works like a folder. Its methods mean the same as those of `pathlib.Path`.

    Reading an absent object raises `FileNotFoundError`, as for a local file. All other failures raise `SynpipeError`.
    Folders need not be created.
    """

    address: str
    # The status from the listing that found this object. It saves `is_file`, `is_dir` and `stat` a request each.
    _listed: ObjectStat | None = field(default=None, compare=False, repr=False)

    def __str__(self) -> str:
        return self.address

    def __truediv__(self, name: "str | PurePosixPath") -> "ObjectPath":
        return ObjectPath(f"{self.address}/{name}")

    @property
    def scheme(self) -> str:
        return self.address.partition("://")[0]

    @property
    def _key(self) -> PurePosixPath:
        """Bucket and key, as pyarrow names objects."""
        return PurePosixPath(self.address.partition("://")[2])

    @property
    def name(self) -> str:
        return self._key.name

    @property
    def stem(self) -> str:
        return self._key.stem

    @property
    def suffix(self) -> str:
        return self._key.suffix

    @property
    def parent(self) -> "ObjectPath":
        return self._at(self._key.parent)

    def with_suffix(self, suffix: str) -> "ObjectPath":
        return self._at(self._key.with_suffix(suffix))

    def with_name(self, name: str) -> "ObjectPath":
        return self._at(self._key.with_name(name))

    def relative_to(self, other: "ObjectPath") -> PurePosixPath:
        return self._key.relative_to(other._key)

    def _at(self, key: PurePosixPath, listed: ObjectStat | None = None) -> "ObjectPath":
        return ObjectPath(f"{self.scheme}://{key}", listed)

    def exists(self) -> bool:
        return self._info().type != pafs.FileType.NotFound

    def is_file(self) -> bool:
        status = self._status()
        return status is not None and status.is_file

    def is_dir(self) -> bool:
        status = self._status()
        return status is not None and not status.is_file

    def _status(self) -> ObjectStat | None:
        return self._listed or _to_stat(self._info())

    def stat(self) -> ObjectStat:
        status = self._status()
        if status is None:
            raise FileNotFoundError(f"{self} does not exist")
        return status

    def _info(self) -> pafs.FileInfo:
        with self._explained("look for"):
            return self._files().get_file_info(str(self._key))

    def iterdir(self) -> "Iterator[ObjectPath]":
        return self.glob("*")

    def glob(self, pattern: str) -> "Iterator[ObjectPath]":
        """Objects and folders whose path below this one matches the pattern, name by name. `**` is not supported."""
        patterns = pattern.split("/")
        for path in self._below(recursive=len(patterns) > 1):
            names = path.relative_to(self).parts
            if len(names) == len(patterns) and all(map(fnmatchcase, names, patterns)):
                yield path

    def rglob(self, pattern: str) -> "Iterator[ObjectPath]":
        return (path for path in self._below(recursive=True) if fnmatchcase(path.name, pattern))

    def _below(self, recursive: bool) -> "Iterator[ObjectPath]":
        try:
            with self._explained("list"):
                # With `allow_not_found`, a bucket that does not exist would look like an empty one.
                selector = pafs.FileSelector(str(self._key), recursive=recursive)
                infos = self._files().get_file_info(selector)
        except FileNotFoundError:
            return
        for info in infos:
            yield self._at(PurePosixPath(info.path), _to_stat(info))

    def check(self) -> None:
        """Raises `SynpipeError` if the bucket does not exist, cannot be reached or may not be listed."""
        next(self._below(recursive=False), None)

    def open_random(self) -> pa.NativeFile:
        """Open the object for `read_at`, from any thread. Opening takes one request, and so does every read."""
        with self._explained("read"):
            return self._files().open_input_file(str(self._key))

    def read_bytes(self) -> bytes:
        with self._explained("read"), self._files().open_input_file(str(self._key)) as file:
            return file.read()

    def read_at(self, file: pa.NativeFile, count: int, offset: int) -> bytes:
        """Read `count` bytes from `offset`, fewer at the end of the object. file: from `open_random`."""
        with self._explained("read"):
            return file.read_at(count, offset)

    def write_bytes(self, content: bytes | memoryview | pa.Buffer) -> None:
        """Upload the whole content. It replaces a former object when the upload is complete.

        pyarrow completes an upload whenever it closes the stream, even if an exception or Ctrl-C closes it, and half an
        object would then look like a complete one. Therefore a separate thread, which no signal interrupts, opens the
        stream, writes once and closes it. An upload is not completed if one of its requests fails or the process is killed.
        """
        with self._explained("write"):
            _uploads.submit(self._put, content).result()

    def _put(self, content: bytes | memoryview | pa.Buffer) -> None:
        stream = self._files().open_output_stream(str(self._key), compression=None)
        stream.write(content)
        stream.close()

    def unlink(self, missing_ok: bool = False) -> None:
        try:
            with self._explained("delete"):
                self._files().delete_file(str(self._key))
        except FileNotFoundError:
            if not missing_ok:
                raise

    def replace(self, target: "ObjectPath") -> "ObjectPath":
        with self._explained("rename"):
            self._files().move(str(self._key), str(target._key))
        return target

    def _files(self) -> pafs.FileSystem:
        variables = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_REGION", "AWS_DEFAULT_REGION")
        return _file_system(self.scheme, *(os.environ.get(name) or None for name in variables))

    @contextmanager
    def _explained(self, action: str) -> Iterator[None]:
        """Turn the exceptions of pyarrow into `SynpipeError`. action: a verb for the message, such as "read"."""
        try:
            yield
        except FileNotFoundError:
            raise
        except (OSError, pa.ArrowException) as error:
            reason = re.sub(r"^.*?(?=AWS Error )| \(Request ID: [^)]*\)", "", one_line(error)).rstrip(".")
            raise SynpipeError(
                f"Cannot {action} {self}: {reason}. Check that address (SYNPIPE_BULK), the network, and the environment "
                f"variables {HINTS[self.scheme]}."
            ) from error


BulkPath = Path | ObjectPath


def move_tree(path: BulkPath, target: BulkPath) -> None:
    """Move a file, or a folder with its content. On an object store the objects are moved one after another."""
    if isinstance(path, ObjectPath) and isinstance(target, ObjectPath):
        for each in [*path.rglob("*")] or [path]:
            if each.is_file():
                each.replace(target if each == path else target / each.relative_to(path))
    else:
        path.replace(target)  # type: ignore[arg-type]  # both are of the same kind


def remove_tree(path: BulkPath) -> None:
    """Remove a folder with its content."""
    if isinstance(path, Path):
        shutil.rmtree(path)
    else:
        for each in [*path.rglob("*")]:
            if each.is_file():
                each.unlink()


def list_paths(folder: BulkPath, pattern: str) -> list[BulkPath]:
    """The files and folders below `folder` that match a glob pattern, sorted by name."""
    paths: list[BulkPath] = [*folder.glob(pattern)]
    return sorted(paths, key=str)


def locate(text: str) -> BulkPath:
    """The folder, or the prefix on an object store, that a text names. Raises `SynpipeError` for any other address."""
    if "://" not in text:
        return Path(text).resolve()
    found = find_credentials(text)
    if found:
        raise SynpipeError(f"The address in SYNPIPE_BULK holds {found}: remove it. {ADVICE}.")
    if not ADDRESS.fullmatch(text.rstrip("/")):
        raise SynpipeError(
            f"SYNPIPE_BULK is {text!r}, which cannot hold tiles and vectors: use a folder, s3://bucket/prefix or "
            "gs://bucket/prefix."
        )
    return ObjectPath(text.rstrip("/"))


def lance_options(folder: BulkPath) -> dict[str, str] | None:
    """The `storage_options` for a LanceDB database in `folder`: settings that LanceDB does not read from the environment."""
    if isinstance(folder, Path):
        return None
    # By default LanceDB retries for three minutes.
    options = {"client_max_retries": str(ATTEMPTS), "client_retry_timeout": "10", "connect_timeout": f"{CONNECT_S}s"}
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if folder.scheme == "s3" and endpoint:
        region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"
        options |= {"aws_endpoint": endpoint, "aws_region": region}
        options |= {"allow_http": "true"} if endpoint.startswith("http://") else {}
    return options


@lru_cache(maxsize=8)
def _file_system(scheme: str, endpoint_s3: str | None, endpoint: str | None, *regions: str | None) -> pafs.FileSystem:
    if scheme == "gs":
        return pafs.GcsFileSystem(retry_time_limit=timedelta(seconds=SILENCE_S))
    named = endpoint_s3 or endpoint or ""
    found = find_credentials(named)
    if found:
        raise SynpipeError(
            f"AWS_ENDPOINT_URL holds {found}: remove it. Put the credentials into AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY."
        )
    address = urlsplit(named)
    if named and (address.scheme not in ("http", "https") or not address.netloc):
        raise SynpipeError(f"AWS_ENDPOINT_URL is {named!r}: it should begin with http:// or https://.")
    region = next(filter(None, regions), None)
    return pafs.S3FileSystem(
        # Without a region the SDK would query a metadata server that only Amazon's own machines have.
        region=region or ("us-east-1" if address.netloc else None),
        scheme=address.scheme or "https",
        endpoint_override=address.netloc or None,
        connect_timeout=CONNECT_S,
        request_timeout=SILENCE_S,
        retry_strategy=pafs.AwsStandardS3RetryStrategy(max_attempts=ATTEMPTS),
        allow_delayed_open=True,  # a small object is uploaded with one request instead of three
    )


def _to_stat(info: pafs.FileInfo) -> ObjectStat | None:
    if info.type == pafs.FileType.NotFound:
        return None
    modified = info.mtime or datetime.fromtimestamp(0, UTC)
    return ObjectStat(info.size or 0, modified.timestamp(), info.type == pafs.FileType.File)
