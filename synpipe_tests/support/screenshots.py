"""Take the pictures of the README from the demo in the store: `make pictures`.

Outputs: `asset_graph.png`, `tiles.png`, `neighbours.png`, `explorer_search.png` and `explorer_map.png` in data/pictures/, together
about a megabyte.
"""

import io
import shutil
import tempfile
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps
from playwright.sync_api import Page

from synpipe.assets.index import draw_example_neighbours
from synpipe.assets.rgb_tiles import draw_tiles_by_class
from synpipe.datasets import Project
from synpipe.store.files import atomic_path
from synpipe_tests.support.browser import chromium, serve
from synpipe_tests.support.explorer_pages import MapOnPage, Truth, explore, shown

WIDTH_PX = 1200
MARGIN_PX = 16
# High enough that the toolbar above and the buttons below do not cover the graph in the middle.
PANES_PX, TOOLBAR_PX, BUTTONS_PX = 545, 115, 460
WINDOW: Any = {"width": PANES_PX + WIDTH_PX, "height": 2300}
EXPLORER_WINDOW: Any = {"width": WIDTH_PX, "height": 800}
# Few pixels beside the tiles show the colours of the classes, and those colours must not change.
RARE_COLOURS = Image.Quantize.MAXCOVERAGE
# Only the dots of the page's background are lighter than this.
BACKGROUND_GREY = 232


def main() -> None:
    project = Project.locate()
    dataset = project.dataset("demo")
    folder = project.data / "pictures"
    _save(draw_tiles_by_class(dataset, tile_px=64), folder / "tiles.png")
    _save(draw_example_neighbours(dataset, dataset.encoder(None)), folder / "neighbours.png")
    with tempfile.TemporaryDirectory() as logs:
        with serve(_alone(project, Path(logs)), Path(logs)) as ui:
            with chromium() as browser:
                page = browser.new_page(viewport=WINDOW)
                page.goto(f"{ui.url}/asset-groups")
                _save(_graph(page), folder / "asset_graph.png")
            ui.stop()
        with explore(project, Path(logs) / "explore.log") as url, chromium(webgl=True) as browser:
            page = browser.new_page(viewport=EXPLORER_WINDOW)
            truth = Truth(dataset, dataset.encoder(None))
            _save(_search(page, url, truth), folder / "explorer_search.png", RARE_COLOURS)
            _save(_map(page, url, truth), folder / "explorer_map.png")


def _alone(project: Project, folder: Path) -> Project:
    """Return a project with the same store and only the demo data set, whatever other data sets exist."""
    data = folder / "data"
    shutil.copytree(project.data, data, ignore=shutil.ignore_patterns("store", "pictures", "datasets"))
    (data / "datasets").mkdir()
    shutil.copy2(project.data / "datasets" / "demo.yaml", data / "datasets")
    return Project(data, project.store)


def _search(page: Page, url: str, truth: Truth) -> Image.Image:
    """Search for synapses like the first labelled one. Grey tiles leave the colours of the picture to the classes."""
    labelled = next(row["synapse_id"] for row in truth.rows if row["neurotransmitter"])
    page.goto(f"{url}?id={labelled}&tiles=grey")
    shown(page)
    page.wait_for_load_state("networkidle")
    return _shot(page)


def _map(page: Page, url: str, truth: Truth) -> Image.Image:
    """Show the map, with the mouse on the synapse that has most room around it."""
    page.goto(f"{url}?page=map")
    places = MapOnPage(page, truth)
    page.mouse.move(*places.places()[places.lonely()])
    page.locator(".tip img").wait_for()
    page.wait_for_load_state("networkidle")
    return _shot(page)


def _shot(page: Page) -> Image.Image:
    return Image.open(io.BytesIO(page.screenshot())).convert("RGB")


def _graph(page: Page) -> Image.Image:
    """Show the asset graph with all groups expanded, cropped to the graph."""
    page.get_by_role("button", name="Materialize all").wait_for()
    page.get_by_text("demo", exact=True).last.wait_for()
    page.wait_for_timeout(2000)
    page.keyboard.press("Alt+e")
    page.get_by_text("rgb_tiles").last.wait_for()
    page.wait_for_timeout(3000)  # the graph moves into place
    width, height = WINDOW["width"] - PANES_PX, WINDOW["height"] - TOOLBAR_PX - BUTTONS_PX
    clip: Any = {"x": PANES_PX, "y": TOOLBAR_PX, "width": width, "height": height}
    shot = Image.open(io.BytesIO(page.screenshot(clip=clip))).convert("RGB")
    drawn = shot.convert("L").point(lambda grey: 255 * (grey < BACKGROUND_GREY))
    return ImageOps.expand(shot.crop(drawn.getbbox()), MARGIN_PX, "white")


def _save(image: Image.Image | None, path: Path, method: Image.Quantize = Image.Quantize.MEDIANCUT) -> None:
    """Save as a PNG with 256 colours, a third of the size. method: how Pillow chooses the colours."""
    if image is None:
        raise SystemExit("The demo has nothing to show: run `make demo` first.")
    path.parent.mkdir(exist_ok=True)
    with atomic_path(path) as temporary:
        image.quantize(256, method, dither=Image.Dither.NONE).save(temporary, "PNG", optimize=True)
    print(f"{path}  {image.width} × {image.height}  {path.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
