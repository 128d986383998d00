"""Serve any folder on loopback, with or without Range requests, and record every request."""

import contextlib
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from http import HTTPStatus
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


@dataclass
class Host:
    """asked: path, status and size of the body in bytes of each answer, in order."""

    url: str
    asked: list[tuple[str, int, int]] = field(default_factory=list)

    @property
    def bytes(self) -> int:
        return sum(size for _, _, size in self.asked)


@contextlib.contextmanager
def host(folder: Path, ranges: bool) -> Iterator[Host]:
    """Serve like `python -m http.server`, which ignores Range headers. With `ranges`, answer them."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, directory=str(folder))) as server:
        server.daemon_threads = True
        found = Host(f"http://127.0.0.1:{server.server_port}/")
        server.ranges, server.asked = ranges, found.asked  # type: ignore[attr-defined]
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield found
        finally:
            server.shutdown()
            thread.join()


class _Handler(SimpleHTTPRequestHandler):
    def do_GET(self) -> None:
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        path = Path(self.translate_path(self.path))
        if not (self.server.ranges and asked and path.is_file()):
            super().do_GET()
            return
        start, stop = int(asked[1]), int(asked[2]) + 1
        part = path.read_bytes()[start:stop]
        self.send_response(HTTPStatus.PARTIAL_CONTENT)
        self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{path.stat().st_size}")
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        self.wfile.write(part)

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError):  # a browser that has left the page
            super().handle()

    def send_header(self, keyword: str, value: str) -> None:
        if keyword == "Content-Length":
            self._length = int(value)
        super().send_header(keyword, value)

    def end_headers(self) -> None:
        self.server.asked.append((self.path, self._status, getattr(self, "_length", 0)))
        self._length = 0
        super().end_headers()

    def send_response(self, code: int, message: str | None = None) -> None:
        self._status = code
        super().send_response(code, message)

    def log_message(self, *_: object) -> None:
        pass
