"""The server of the explorer: addresses to answers, and the pages.

Guarantees: it only reads; an error that a user can mend is one sentence of JSON with status 400 or 404; no asset comes from
another host, and browsers are told so; where it listens on this machine only, it answers no other name of it, so that a page
elsewhere cannot reach it under a name of its own (DNS rebinding).
"""

import socket
from contextlib import suppress
from pathlib import Path

import click
import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from synpipe.datasets import Project
from synpipe.errors import NotFound, SynpipeError
from synpipe.explorer.answers import Explorer
from synpipe.explorer.uploads import MOST_BYTES, tile_of_png

STATIC = Path(__file__).parent / "static"
LOOPBACK = ("127.0.0.1", "localhost", "::1")
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' blob: data:; object-src 'none'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}
SEARCH_OPTIONS = ("metric", "per_class", "region", "hemilineage")


def make_app(project: Project, host: str = LOOPBACK[0]) -> Starlette:
    """The server as an ASGI application, for a server that listens on `host`."""
    explorer = Explorer(project)

    async def datasets(request: Request) -> Response:
        return JSONResponse({"datasets": await run_in_threadpool(explorer.datasets)})

    async def about(request: Request) -> Response:
        return JSONResponse(await run_in_threadpool(explorer.about, *_branch(request)))

    async def search(request: Request) -> Response:
        options = _options(request, *SEARCH_OPTIONS, "exclude_neuron", "id")
        synapse_id = options.pop("id", "")
        return JSONResponse(await run_in_threadpool(explorer.search, *_branch(request), synapse_id, **options))

    async def search_image(request: Request) -> Response:
        options = _options(request, *SEARCH_OPTIONS)
        if request.headers.get("content-type") != "image/png":
            raise HTTPException(415, "Send a PNG image.")
        content = await _bounded(request)

        def answer() -> dict:
            return explorer.search_tile(*_branch(request), tile_of_png(content), **options)

        return JSONResponse(await run_in_threadpool(answer))

    async def random(request: Request) -> Response:
        return JSONResponse({"id": await run_in_threadpool(explorer.random, *_branch(request))})

    async def synapse(request: Request) -> Response:
        synapse_id = request.path_params["id"]
        return JSONResponse(await run_in_threadpool(explorer.synapse, *_branch(request), synapse_id))

    async def places(request: Request) -> Response:
        content = await run_in_threadpool(explorer.map, *_branch(request))
        return Response(content, media_type="application/octet-stream")

    async def tile(request: Request) -> Response:
        path = request.path_params
        content_hash, png = await run_in_threadpool(explorer.tile, path["dataset"], path["id"])
        # The same id may get another tile, so a browser asks each time; the answer is mostly that nothing has changed.
        headers = {"ETag": f'"{content_hash}"', "Cache-Control": "private, no-cache"}
        if request.headers.get("if-none-match") == headers["ETag"]:
            return Response(status_code=304, headers=headers)
        return Response(await run_in_threadpool(png), media_type="image/png", headers=headers)

    of_branch = "/api/{dataset}/{encoder}"
    return Starlette(
        routes=[
            Route("/api/datasets", datasets),
            Route("/api/{dataset}/tiles/{id}.png", tile),
            Route(f"{of_branch}/about", about),
            Route(f"{of_branch}/search", search, methods=["GET"]),
            Route(f"{of_branch}/search", search_image, methods=["POST"]),
            Route(f"{of_branch}/random", random),
            Route(f"{of_branch}/synapses/{{id}}", synapse),
            Route(f"{of_branch}/map", places),
            Mount("/", StaticFiles(directory=STATIC, html=True)),
        ],
        middleware=[
            Middleware(TrustedHostMiddleware, allowed_hosts=[*LOOPBACK, "[::1]"] if host in LOOPBACK else ["*"]),
            Middleware(_Headers),
        ],
        exception_handlers={NotFound: _failed, SynpipeError: _failed, HTTPException: _failed},
    )


def serve(project: Project, host: str, port: int) -> None:
    """Serve until interrupted; says where. port: 0 takes a free one. Raises `SynpipeError` where it cannot listen there."""
    try:
        listening = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise SynpipeError(
            f"The explorer cannot listen on {host}, port {port} ({error.strerror}): choose another with --port."
        ) from None
    shown = f"[{host}]" if ":" in host else host
    click.echo(f"The explorer is on http://{shown}:{listening.getsockname()[1]}/ – Ctrl-C ends it.")
    with suppress(KeyboardInterrupt):  # uvicorn has shut down by then
        uvicorn.Server(uvicorn.Config(make_app(project, host), log_level="warning")).run(sockets=[listening])


class _Headers:
    """Adds `HEADERS` to every answer."""

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        await self._app(scope, receive, send_with_headers)


def _failed(request: Request, error: Exception) -> Response:
    if isinstance(error, HTTPException):
        return JSONResponse({"error": error.detail}, error.status_code, error.headers)
    return JSONResponse({"error": str(error)}, 404 if isinstance(error, NotFound) else 400)


def _branch(request: Request) -> tuple[str, str]:
    return request.path_params["dataset"], request.path_params["encoder"]


def _options(request: Request, *known: str) -> dict[str, str]:
    """The query of an address. Raises `SynpipeError` for a name that is unknown or given twice."""
    names = [name for name, _ in request.query_params.multi_items()]
    wrong = [name for name in names if name not in known or names.count(name) > 1]
    if wrong:
        raise SynpipeError(f"{wrong[0]!r} is unknown or given twice; there is {', '.join(known)}.")
    return dict(request.query_params)


async def _bounded(request: Request) -> bytes:
    """The body of a request, of which no more is read than is allowed."""
    content = bytearray()
    async for part in request.stream():
        content += part
        if len(content) > MOST_BYTES:
            raise HTTPException(413, f"The image is larger than {MOST_BYTES // 2**20} MB.")
    return bytes(content)
