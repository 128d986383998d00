"""`dagster dev` with a guarded web server: what `synpipe ui` runs.

Dagster's web server starts runs for anyone who can send it a request, and every page in the user's browser can. Dagster has no
option for a guard. This module therefore replaces the function that starts the processes of `dagster dev`, and in the process of
the web server the function that serves. Nothing else of `dagster dev` listens on a port.

`python -m synpipe.defs.web_server dev …` is `dagster dev …`. It runs `python -m synpipe.defs.web_server serve …` in place of
`python -m dagster_webserver …`.
"""

import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import uvicorn
from dagster._cli import dev
from starlette.datastructures import Headers
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from synpipe.guard import Guard

MODULE = "synpipe.defs.web_server"
_NOT_BY_ADDRESS = PlainTextResponse("Send GraphQL queries with POST.\n", 405, {"Allow": "POST"})

_run_server = uvicorn.run
_start_process = dev.open_ipc_subprocess


class _NoQueriesInAddresses:
    """Refuses a GraphQL query that is part of an address, because a picture on any page can have such an address."""

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await (_NOT_BY_ADDRESS if _is_query_in_address(scope) else self._app)(scope, receive, send)


def _is_query_in_address(scope: Scope) -> bool:
    if scope["type"] != "http" or scope["method"] == "POST" or not scope["path"].startswith("/graphql"):
        return False
    # To a browser that opens the address as a page, Dagster sends an editor for queries and executes nothing.
    return "text/html" not in Headers(scope=scope).get("accept", "")


def _serve_guarded(app: ASGIApp, *, host: str, **options: Any) -> None:
    _run_server(Guard(_NoQueriesInAddresses(app), host), host=host, **options)


def _start_guarded(command: Sequence[str], **options: Any) -> "subprocess.Popen[Any]":
    """Start a process of `dagster dev`. In place of Dagster's own web server, start the guarded one."""
    interpreter, _, module, *arguments = command
    if module == "dagster_webserver":
        command = [interpreter, "-m", MODULE, "serve", *arguments]
    elif module != "dagster._daemon":
        raise RuntimeError(f"`dagster dev` would start {module}, which synpipe does not know how to guard.")
    return _start_process(command, **options)


def main() -> None:
    program, *arguments = sys.argv[1:]
    if program == "dev":
        dev.open_ipc_subprocess = _start_guarded  # type: ignore[assignment]  # the parameter has another name
        dev.dev_command(arguments, prog_name="dagster dev")
    else:
        from dagster_webserver.cli import dagster_webserver  # it takes seconds to import, and `dev` does not need it

        uvicorn.run = _serve_guarded  # type: ignore[assignment]  # it takes fewer kinds of applications
        dagster_webserver(arguments, prog_name="dagster-webserver")


if __name__ == "__main__":
    main()
