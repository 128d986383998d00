"""A folder over HTTP by a server that fails as real ones do: for tests of what is read over a network.

In: a folder, and a rule that says what befalls the n-th request for a path. Out: an address, and how often each path was
asked for. Guarantee: the same rule gives the same faults, whatever the order in which the requests come.
"""

import random
import socket
import struct
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

# What may befall a request: a status of HTTP, or
RESET = "reset"  # the connection is torn down before an answer
STALL = "stall"  # the headers come, and then nothing more
SHORT = "short"  # half of the body comes, and then the connection is closed
HALVED = "halved"  # half of the body comes as though it were all of it

Fault = int | str | None
Rule = Callable[[str, int], Fault]  # path and number of the request for it, from 1 on → what befalls it

STALL_S = 60  # longer than any time-out of a test; a server that is closed stalls no longer


def never(_path: str, _number: int) -> Fault:
    return None


def at_first(times: int, *faults: Fault, seed: int = 0) -> Rule:
    """Each path fails that many times, each with faults of its own, and is well from then on."""

    def rule(path: str, number: int) -> Fault:
        return random.Random(f"{seed} {path} {number}").choice(faults) if number <= times else None

    return rule


def always(fault: Fault, concerned: Callable[[str], bool]) -> Rule:
    """The paths that are concerned fail whenever they are asked for."""
    return lambda path, _number: fault if concerned(path) else None


class FaultServer(ThreadingHTTPServer):
    """rule: may be replaced at any time. requests: how often each path was asked for."""

    request_queue_size = 256  # as real servers have it; connections beyond it are reset

    def __init__(self, folder: Path, rule: Rule):
        super().__init__(("127.0.0.1", 0), partial(_Handler, directory=str(folder)))
        self.rule, self.requests = rule, Counter[str]()
        self.lock, self.closed = threading.Lock(), threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, *_: Any) -> None:
        """A client that gives up is no fault of the server's."""


@contextmanager
def serving(folder: Path, rule: Rule = never) -> Iterator[FaultServer]:
    with FaultServer(folder, rule) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.closed.set()
        server.shutdown()


class _Handler(SimpleHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FaultServer

    def do_GET(self) -> None:
        with self.server.lock:
            self.server.requests[self.path] += 1
            number = self.server.requests[self.path]
        fault = self.server.rule(self.path, number)
        if fault is None:
            super().do_GET()
        elif isinstance(fault, int):
            self.send_error(fault)
        elif fault == RESET:
            # Closing with a linger of zero seconds sends a reset instead of an orderly end.
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True
        else:
            self._answer_badly(fault)

    def _answer_badly(self, fault: str) -> None:
        content = Path(self.translate_path(self.path)).read_bytes()
        half = content[: len(content) // 2]
        self.send_response(200)
        self.send_header("Content-Length", str(len(half if fault == HALVED else content)))
        self.end_headers()
        if fault == STALL:
            self.server.closed.wait(STALL_S)
        else:
            self.wfile.write(half)
        self.close_connection = fault != HALVED

    def log_message(self, *_: Any) -> None:
        """Silent."""
