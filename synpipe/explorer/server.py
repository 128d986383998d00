"""The explorer's web server: HTTP addresses, the answers of `answers.Explorer`, and the pages.

Guarantees:

- The server only reads.
- An error that the user can fix is one sentence of JSON with status 400 or 404.
- Pages load nothing from other hosts, and a Content-Security-Policy makes browsers enforce this.
- Pages of other origins can link to the explorer and get nothing else from it; see `synpipe.guard`.
"""

import socket
from contextlib import suppress
from pathlib import Path

import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from synpipe.datasets import Project
from synpipe.errors import NotFound, SynpipeError
from synpipe.explorer.answers import Explorer
from synpipe.explorer.uploads import MAX_BYTES, tile_from_png
from synpipe.guard import Guard
from synpipe.progress import Log

STATIC = Path(__file__).parent / "static"
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' blob: data:; object-src 'none'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}
SEARCH_OPTIONS = ("metric", "per_class", "region", "hemilineage")


def make_app(project: Project, host: str = "127.0.0.1") -> Starlette:
    """The explorer as an ASGI application, for a server that listens on `host`."""
    return Starlette(
        routes=[*_Api(project).routes(), Mount("/", StaticFiles(directory=STATIC, html=True))],
        middleware=[
            Middleware(_SecurityHeaders),
            Middleware(Guard, host=host),
        ],
        exception_handlers={NotFound: _error_response, SynpipeError: _error_response, HTTPException: _error_response},
    )


def serve(project: Project, host: str, port: int, announce: Log) -> None:
    """Serve until interrupted.

    port: 0 picks a free one. announce: is called with a sentence that contains the address, when the server is reachable.
    Raises `SynpipeError` if the server cannot listen there.
    """
    try:
        listening = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise SynpipeError(
            f"The explorer cannot listen on {host}, port {port} ({error.strerror}): choose another port with --port."
        ) from None
    host_in_url = f"[{host}]" if ":" in host else host
    announce(f"The explorer is at http://{host_in_url}:{listening.getsockname()[1]}/. Press Ctrl-C to stop it.")
    with suppress(KeyboardInterrupt):  # uvicorn has already shut down
        uvicorn.Server(uvicorn.Config(make_app(project, host), log_level="warning")).run(sockets=[listening])


class _Api:
    """The addresses below `/api`. Answers are computed in threads, because they read files."""

    def __init__(self, project: Project):
        self._explorer = Explorer(project)

    def routes(self) -> list[BaseRoute]:
        encoder = "/api/{dataset}/{encoder}"
        return [
            Route("/api/datasets", self.datasets),
            Route("/api/{dataset}/tiles/{id}.png", self.tile),  # of the first encoder that has the synapse
            Route(f"{encoder}/tiles/{{id}}.png", self.tile),
            Route(f"{encoder}/about", self.about),
            Route(f"{encoder}/search", self.search, methods=["GET"]),
            Route(f"{encoder}/search", self.search_image, methods=["POST"]),
            Route(f"{encoder}/random", self.random),
            Route(f"{encoder}/synapses/{{id}}", self.synapse),
            Route(f"{encoder}/map", self.map),
        ]

    async def datasets(self, request: Request) -> Response:
        return JSONResponse({"datasets": await run_in_threadpool(self._explorer.datasets)})

    async def about(self, request: Request) -> Response:
        return JSONResponse(await run_in_threadpool(self._explorer.about, *_encoder_of(request)))

    async def search(self, request: Request) -> Response:
        options = _query_options(request, *SEARCH_OPTIONS, "exclude_neuron", "id")
        synapse_id = options.pop("id", "")
        return JSONResponse(
            await run_in_threadpool(self._explorer.search, *_encoder_of(request), synapse_id, **options)
        )

    async def search_image(self, request: Request) -> Response:
        options = _query_options(request, *SEARCH_OPTIONS)
        if request.headers.get("content-type") != "image/png":
            raise HTTPException(415, "Send a PNG image.")
        content = await _read_body(request)

        def answer() -> dict:
            return self._explorer.search_tile(*_encoder_of(request), tile_from_png(content), **options)

        return JSONResponse(await run_in_threadpool(answer))

    async def random(self, request: Request) -> Response:
        return JSONResponse({"id": await run_in_threadpool(self._explorer.random, *_encoder_of(request))})

    async def synapse(self, request: Request) -> Response:
        synapse_id = request.path_params["id"]
        return JSONResponse(await run_in_threadpool(self._explorer.synapse, *_encoder_of(request), synapse_id))

    async def map(self, request: Request) -> Response:
        packed = await run_in_threadpool(self._explorer.map, *_encoder_of(request))
        return Response(packed, media_type="application/octet-stream")

    async def tile(self, request: Request) -> Response:
        path = request.path_params
        content_hash, read_png = await run_in_threadpool(
            self._explorer.tile, path["dataset"], path["id"], path.get("encoder")
        )
        # The tile of an id may change, so the browser must ask each time. Usually the answer is that nothing has changed.
        headers = {"ETag": f'"{content_hash}"', "Cache-Control": "private, no-cache"}
        if request.headers.get("if-none-match") == headers["ETag"]:
            return Response(status_code=304, headers=headers)
        return Response(await run_in_threadpool(read_png), media_type="image/png", headers=headers)


class _SecurityHeaders:
    """Adds `HEADERS` to every response."""

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        await self._app(scope, receive, send_with_headers)


def _error_response(request: Request, error: Exception) -> Response:
    if isinstance(error, HTTPException):
        return JSONResponse({"error": error.detail}, error.status_code, error.headers)
    return JSONResponse({"error": str(error)}, 404 if isinstance(error, NotFound) else 400)


def _encoder_of(request: Request) -> tuple[str, str]:
    """The names of the data set and of the encoder in the address."""
    return request.path_params["dataset"], request.path_params["encoder"]


def _query_options(request: Request, *known: str) -> dict[str, str]:
    """The query of the address. Raises `SynpipeError` for an option that is unknown or given twice."""
    names = [name for name, _ in request.query_params.multi_items()]
    wrong = [name for name in names if name not in known or names.count(name) > 1]
    if wrong:
        raise SynpipeError(f"The option {wrong[0]!r} is unknown or given twice. Options: {', '.join(known)}.")
    return dict(request.query_params)


async def _read_body(request: Request) -> bytes:
    """The body of a request. Reading stops at `MAX_BYTES`, and the request is then refused."""
    content = bytearray()
    async for part in request.stream():
        content += part
        if len(content) > MAX_BYTES:
            raise HTTPException(413, f"The image is larger than {MAX_BYTES // 2**20} MB.")
    return bytes(content)
