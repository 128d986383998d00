"""Limits the time and the memory that the answers of a server may take, and recognises web pages among them.

tensorstore gives up a server that sends nothing, but it accepts an answer of any length and cannot stop one that has begun.

Input: futures of tensorstore. Output: their results. Guarantees:
- Waiting ends after `MAX_WAIT_S`, however slowly the server sends.
- Waiting ends after about `MAX_ANSWERS_BYTES` if a server sends more and more, and its connections are closed.
"""

import os
import resource
import socket
import stat
import sys
import threading
import time
from contextlib import closing
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import tensorstore as ts

from synpipe.volumes.reader import EndlessAnswer

# A sub-volume of a few dozen chunks takes seconds, and a minute over a bad line.
MAX_WAIT_S = 600.0
# The answers to all requests in flight. Chunks have a few megabytes at most, and 64 of them are requested at a time.
MAX_ANSWERS_BYTES = 2**30
POLL_S = 0.2
RETRYING_S = 20.0  # longer than tensorstore repeats a request whose connection was closed; see `chunked.RETRIES`
MAX_RSS_UNIT_BYTES = 1 if sys.platform == "darwin" else 1024  # see getrusage(2)

MIN_PAGE_BYTES = 16
PAGE_STARTS = (b"<!doctype html", b"<html", b"<head", b"<?xml")


def wait_for_answer(future: ts.Future, address: str) -> Any:
    """The result of a future that reads from a server.

    Raises what the future raises, `TimeoutError` after `MAX_WAIT_S`, and `EndlessAnswer` if the memory of this process grows by
    more than `MAX_ANSWERS_BYTES` while no request is answered.
    """
    give_up = time.monotonic() + MAX_WAIT_S
    answered, memory = -1, 0
    while True:
        try:
            return future.result(timeout=POLL_S)
        except TimeoutError:
            if future.done():
                raise
        answered_before, answered = answered, count_bytes_read()
        if answered != answered_before:
            memory = _peak_memory_bytes()
        elif _peak_memory_bytes() - memory > MAX_ANSWERS_BYTES:
            future.cancel()
            threading.Thread(target=_keep_connections_closed, args=(address,), daemon=True).start()
            raise EndlessAnswer(f"the server sent more than {MAX_ANSWERS_BYTES / 2**30:g} GiB and did not end")
        if time.monotonic() > give_up:
            future.cancel()
            raise TimeoutError(f"the server did not finish its answers within {MAX_WAIT_S:g} s")


def count_bytes_read() -> int:
    """Bytes that tensorstore has read since this process began. An answer counts when it is complete."""
    metrics = ts.experimental_collect_matching_metrics("/tensorstore/kvstore/")
    return sum(int(metric["values"][0]["value"]) for metric in metrics if metric["name"].endswith("/bytes_read"))


def _peak_memory_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * MAX_RSS_UNIT_BYTES


def _keep_connections_closed(address: str) -> None:
    """Close connections until tensorstore has given up.

    Cancelling a read leaves the transfer running, and it would fill the memory while other assets are made.
    """
    stop = time.monotonic() + RETRYING_S
    while time.monotonic() < stop:
        _close_connections(address)
        time.sleep(POLL_S)


def _close_connections(address: str) -> None:
    """Close this process's connections to the server of an http:// or https:// address."""
    parts = urlsplit(address)
    if parts.scheme not in ("http", "https") or parts.hostname is None:
        return
    try:
        found = socket.getaddrinfo(parts.hostname, parts.port or parts.scheme, type=socket.SOCK_STREAM)
        servers = {place[:2] for *_, place in found}
        descriptors = [int(name) for name in os.listdir("/dev/fd")]
    except OSError:
        return
    for descriptor in descriptors:
        try:
            if not stat.S_ISSOCK(os.fstat(descriptor).st_mode):
                continue
            with closing(socket.socket(fileno=os.dup(descriptor))) as connection:
                if connection.getpeername()[:2] in servers:
                    connection.shutdown(socket.SHUT_RDWR)
        except OSError:
            continue  # closed by now, or not connected


def is_web_page(first_voxels: np.ndarray) -> bool:
    """Whether the first voxels of a chunk are the beginning of a web page.

    first_voxels: in the order in which the chunk stores them.
    """
    if first_voxels.nbytes < MIN_PAGE_BYTES:
        return False
    contents = (first_voxels.tobytes(), first_voxels.byteswap().tobytes())  # the chunk may store either byte order
    return any(content.isascii() and content.lstrip().lower().startswith(PAGE_STARTS) for content in contents)
