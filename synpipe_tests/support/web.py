"""Run Neuroglancer in tests: the client from its Python package, and a web server for the files that it reads."""

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
    """Serve a folder on loopback and yield the address. Neuroglancer needs CORS and Range requests."""
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
    """Put the client into a served folder. Returns its path on the server, which must contain a token."""
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
    """Open a link and wait until all of its layers are ready.

    The first page that a browser opens sometimes loses its first layer, whatever the layer is: the client of
    neuroglancer 2.41 reports "Cannot read properties of undefined (reading 'length')". Later pages never do, so the
    link is then opened again.
    """
    ready = f"window.viewer?.layerManager.managedLayers.filter(each => each.isReady()).length === {layers}"
    for attempt in range(ATTEMPTS):
        page.goto("about:blank")  # a new fragment alone would not load the page again
        page.goto(link)
        try:
            page.wait_for_function(ready, timeout=LOADED_S * 1000)
            return
        except TimeoutError as error:
            if attempt + 1 == ATTEMPTS:
                shown = page.evaluate("document.body.innerText")
                raise AssertionError(f"Neuroglancer does not show {link}, but: {shown}") from error


def value_at_middle(page: Page, layer: int) -> str:
    """Wait until a layer has a value at the current position, and return it."""
    shown = f"viewer.layerManager.managedLayers[{layer}].layer.getValueAt(viewer.navigationState.position.value, {{}})"
    page.wait_for_function(f"({shown}) != null")
    return page.evaluate(f"String({shown})")
