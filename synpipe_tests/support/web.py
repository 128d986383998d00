"""What Neuroglancer needs in tests: its own client, as its Python package brings it, and files behind a web server."""

import contextlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import uvicorn
from playwright.sync_api import Page, TimeoutError
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import Mount
from starlette.staticfiles import StaticFiles

from synpipe_tests.support.browser import chromium

LOADED_S, ATTEMPTS = 60, 3


@contextlib.contextmanager
def serve_folder(folder: Path) -> Iterator[str]:
    """The address of a server on loopback that allows CORS and knows Range requests, as Neuroglancer needs it."""
    cors = Middleware(CORSMiddleware, allow_origins=["*"], allow_headers=["*"])
    files = Starlette(
        routes=[Mount("/", StaticFiles(directory=folder, follow_symlink=True, html=True))], middleware=[cors]
    )
    server = uvicorn.Server(uvicorn.Config(files, host="127.0.0.1", port=0, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join(timeout=10)


def add_client(folder: Path) -> str:
    """Put the client into a folder that is served. Returns its path below the server: it wants a token there."""
    from neuroglancer import static

    (folder / "v").mkdir()
    (folder / "v" / "token").symlink_to(Path(static.__file__).parent / "client")
    return "v/token"


@contextlib.contextmanager
def neuroglancer_page() -> Iterator[Page]:
    with chromium(webgl=True) as browser:
        page = browser.new_page(viewport={"width": 900, "height": 900})
        page.set_default_timeout(2 * LOADED_S * 1000)
        yield page


def open_link(page: Page, link: str, layers: int) -> None:
    """Open a link and wait until all of its layers are there.

    The first page that a browser opens sometimes loses its first layer (the client of neuroglancer 2.41 says "Cannot read
    properties of undefined (reading 'length')"), whatever the layer is, and never does again: it is opened anew then.
    """
    ready = f"window.viewer?.layerManager.managedLayers.filter(each => each.isReady()).length === {layers}"
    for attempt in range(ATTEMPTS):
        page.goto("about:blank")  # else another fragment is no other page
        page.goto(link)
        try:
            page.wait_for_function(ready, timeout=LOADED_S * 1000)
            return
        except TimeoutError as error:
            if attempt + 1 == ATTEMPTS:
                shown = page.evaluate("document.body.innerText")
                raise AssertionError(f"Neuroglancer does not show {link}, but: {shown}") from error


def value_at_middle(page: Page, layer: int) -> str:
    """What a layer shows at the position, once it does."""
    shown = f"viewer.layerManager.managedLayers[{layer}].layer.getValueAt(viewer.navigationState.position.value, {{}})"
    page.wait_for_function(f"({shown}) != null")
    return page.evaluate(f"String({shown})")
