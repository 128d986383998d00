"""The guard of both web servers, header by header."""

import pytest
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route, WebSocketRoute
from starlette.testclient import TestClient
from starlette.websockets import WebSocket, WebSocketDisconnect

from synpipe.guard import Guard

LINK = {"sec-fetch-mode": "navigate", "sec-fetch-dest": "document"}


def client(listens_on: str) -> TestClient:
    async def websocket(socket: WebSocket) -> None:
        await socket.accept()
        await socket.close()

    routes = [
        Route("/", lambda _: PlainTextResponse("answer"), methods=["GET", "POST"]),
        WebSocketRoute("/", websocket),
    ]
    return TestClient(Guard(Starlette(routes=routes), listens_on))


@pytest.mark.parametrize(
    ("listens_on", "host", "answers"),
    [
        ("127.0.0.1", "127.0.0.1:3000", True),
        ("127.0.0.1", "localhost:8080", True),  # the local end of an SSH tunnel
        ("127.0.0.1", "LOCALHOST", True),
        ("::1", "[::1]:3000", True),
        ("localhost", "127.0.0.1:3000", True),
        ("127.0.0.1", "10.0.0.7:3000", False),
        ("127.0.0.1", "elsewhere.example:3000", False),
        ("127.0.0.1", "localhost.elsewhere.example", False),
        ("127.0.0.1", "127.0.0.1.elsewhere.example", False),
        ("127.0.0.1", "localhost@elsewhere.example", False),
        ("127.0.0.1", "", False),
        ("0.0.0.0", "10.0.0.7:3000", True),
        ("0.0.0.0", "[fe80::1]:3000", True),
        ("0.0.0.0", "localhost:3000", True),
        ("0.0.0.0", "elsewhere.example:3000", False),
        ("em.example.org", "EM.example.org:3000", True),
        ("em.example.org", "elsewhere.example:3000", False),
    ],
)
def test_a_server_answers_only_to_names_that_no_web_page_can_point_at_it(listens_on: str, host: str, answers: bool):
    answer = client(listens_on).get("/", headers={"host": host})
    assert answer.status_code == (200 if answers else 403)
    assert answers or "--host NAME" in answer.text


@pytest.mark.parametrize("listens_on", ["127.0.0.1", "0.0.0.0"])
@pytest.mark.parametrize(
    ("method", "headers", "answers"),
    [
        ("POST", {}, True),  # a program
        ("POST", {"origin": "http://127.0.0.1:3000", "sec-fetch-site": "same-origin"}, True),
        ("POST", {"origin": "https://127.0.0.1:3000"}, True),  # a proxy adds https
        ("POST", {"origin": "http://elsewhere.example"}, False),
        ("POST", {"origin": "http://127.0.0.1:8000"}, False),
        ("POST", {"origin": "http://127.0.0.1"}, False),
        ("POST", {"origin": "null"}, False),
        ("POST", {"origin": ""}, False),
        ("POST", {"sec-fetch-site": "cross-site", **LINK}, False),
        ("GET", {"sec-fetch-site": "none", **LINK}, True),
        ("GET", {"sec-fetch-site": "cross-site", **LINK}, True),
        ("GET", {"sec-fetch-site": "same-site", "sec-fetch-mode": "no-cors", "sec-fetch-dest": "image"}, False),
        ("GET", {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate", "sec-fetch-dest": "iframe"}, False),
    ],
)
def test_a_page_of_another_origin_can_only_link(listens_on: str, method: str, headers: dict[str, str], answers: bool):
    answer = client(listens_on).request(method, "/", headers={"host": "127.0.0.1:3000", **headers})
    assert answer.status_code == (200 if answers else 403)


@pytest.mark.parametrize(("origin", "opens"), [("http://127.0.0.1:3000", True), ("http://elsewhere.example", False)])
def test_a_page_of_another_origin_cannot_open_a_websocket(origin: str, opens: bool):
    headers = {"host": "127.0.0.1:3000", "origin": origin}
    if opens:
        with client("127.0.0.1").websocket_connect("/", headers=headers):
            return
    with pytest.raises(WebSocketDisconnect), client("127.0.0.1").websocket_connect("/", headers=headers):
        pass
