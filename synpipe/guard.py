"""Protects a web server without passwords from the web pages that its users visit. Both servers of synpipe stand behind it.

Input: every request and every websocket of an ASGI application. Output: the application's answer, or status 403. Guarantees:

- A page of another origin can neither send a request nor open a websocket nor show the server in a frame. It can only link to it.
- A page that points its own host name at this machine (DNS rebinding) gets no answer.

How: browsers say in `Origin` and `Sec-Fetch-Site` which page sends a request, and in `Host` which name the address has. A page
cannot change these headers. Programs that are no browsers may omit the first two, since no page controls them.
"""

import ipaddress
import re
import socket
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

_HOST = re.compile(r"(?P<name>[\w.-]+|\[[0-9a-f:.]+\])(:\d+)?", re.ASCII)
_POLICY_VIOLATION = 1008  # the code that closes a refused websocket


class Guard:
    """ASGI middleware that refuses what a page from elsewhere sends.

    host: the address or the name that the server listens on. On an address of this machine alone, the server answers only to
    such addresses and to `localhost`. Otherwise it also answers to every IP address, which a page cannot point elsewhere, to the
    names of this machine and to `host`.
    """

    def __init__(self, app: ASGIApp, host: str):
        self._app = app
        self._host = host
        self._only_this_machine = _is_loopback(host)
        own_names = set() if self._only_this_machine else {socket.gethostname(), socket.getfqdn(), host}
        self._names = {"localhost", *(name.lower() for name in own_names)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        reason = None if scope["type"] == "lifespan" else self._reason_to_refuse(scope)
        if reason is None:
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": _POLICY_VIOLATION, "reason": reason})
        else:
            await PlainTextResponse(f"{reason}\n", 403)(scope, receive, send)

    def _reason_to_refuse(self, scope: Scope) -> str | None:
        headers = Headers(scope=scope)
        host = headers.get("host", "").lower()
        if not self._answers_to(host):
            return (
                f"This server does not answer to the name {host!r}. Use the IP address or the name that it was started with; "
                "--host NAME lets it listen on another name."
            )
        if any(not _is_origin_of(origin, host) for origin in headers.getlist("origin")):
            return "A page of another origin sent this request. Open the address itself in the browser."
        if headers.get("sec-fetch-site", "none") not in ("none", "same-origin") and not _is_link(scope, headers):
            return "A page of another origin sent this request. It may only link to this server."
        return None

    def _answers_to(self, host: str) -> bool:
        match = _HOST.fullmatch(host)
        if match is None:
            return False
        name = match["name"].strip("[]")
        return name in self._names or (_is_loopback(name) if self._only_this_machine else _is_ip_address(name))


def _is_link(scope: Scope, headers: Headers) -> bool:
    """Whether the user follows a link: the browser opens the answer as a page of its own, not in a frame."""
    opens_page = headers.get("sec-fetch-mode") == "navigate" and headers.get("sec-fetch-dest") == "document"
    return opens_page and scope.get("method") == "GET"


def _is_origin_of(origin: str, host: str) -> bool:
    """Whether pages of this origin have this host in their address. A proxy may add https, so both schemes count."""
    parts = urlsplit(origin.lower())
    return parts.scheme in ("http", "https") and parts.netloc == host


def _is_loopback(host: str) -> bool:
    return host == "localhost" or (_is_ip_address(host) and ipaddress.ip_address(host).is_loopback)


def _is_ip_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
