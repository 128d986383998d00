"""Serve a folder over HTTP and fail as real servers do, for tests of reading over a network.

Inputs: a folder, and a rule that says how the n-th request for a path fails. Outputs: an address, and the number of
requests for each path. The same rule gives the same faults in whatever order the requests arrive.
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

# How a request may fail: with an HTTP status, or
RESET = "reset"  # the connection is reset before an answer
STALL = "stall"  # the headers arrive, and nothing after them
SHORT = "short"  # half of the body arrives, and the connection is closed
HALVED = "halved"  # half of the body arrives as if it were the whole
TRICKLE = "trickle"  # a byte per second arrives
ENDLESS = "endless"  # the body never ends
PAGE = "page"  # a web page arrives that has the length of the body

Fault = int | str | None
Rule = Callable[[str, int], Fault]  # path, and number of the request for it from 1 → fault

ENDLESS_BYTES = 2**40
STALL_S = 60  # longer than any time-out of a test; closing the server ends the stall


def never(_path: str, _number: int) -> Fault:
    return None


def at_first(times: int, *faults: Fault, seed: int = 0) -> Rule:
    """Each path fails `times` times, each time with the next of the faults, and works afterwards."""

    def rule(path: str, number: int) -> Fault:
        return random.Random(f"{seed} {path} {number}").choice(faults) if number <= times else None

    return rule


def always(fault: Fault, concerned: Callable[[str], bool]) -> Rule:
    """Every request for one of these paths fails."""
    return lambda path, _number: fault if concerned(path) else None


class FaultServer(ThreadingHTTPServer):
    """The server. rule: may be replaced at any time. requests: number of requests by path."""

    request_queue_size = 256  # as on real servers; further connections are reset

    def __init__(self, folder: Path, rule: Rule):
        super().__init__(("127.0.0.1", 0), partial(_Handler, directory=str(folder)))
        self.rule, self.requests = rule, Counter[str]()
        self.lock, self.closed = threading.Lock(), threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, *_: Any) -> None:
        """Ignore clients that close the connection."""


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
            # Closing with a linger time of zero sends a reset.
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True
        else:
            self._answer_badly(fault)

    def _answer_badly(self, fault: str) -> None:
        content = Path(self.translate_path(self.path)).read_bytes()
        half = content[: len(content) // 2]
        page = b"<!DOCTYPE html><html><body>Please log in</body></html>"
        body = {HALVED: half, PAGE: page.ljust(len(content))[: len(content)]}.get(fault, content)
        self.send_response(200)
        self.send_header("Content-Length", str(ENDLESS_BYTES if fault == ENDLESS else len(body)))
        self.end_headers()
        if fault == STALL:
            self.server.closed.wait(STALL_S)
        elif fault == TRICKLE:
            while not self.server.closed.wait(1):
                self.wfile.write(b"\0")
        elif fault == ENDLESS:
            while not self.server.closed.is_set():
                self.wfile.write(bytes(2**20))
        else:
            self.wfile.write(half if fault == SHORT else body)
        self.close_connection = fault not in (HALVED, PAGE)

    def log_message(self, *_: Any) -> None:
        """Log nothing."""
