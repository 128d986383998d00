"""Serve the explorer's pages with the command, open them in a browser, and read back what they show."""

import contextlib
import io
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from PIL import Image
from playwright.sync_api import Browser, Page

from synpipe.datasets import Dataset, Project
from synpipe.store.files import read_table
from synpipe_tests.conftest import environment

START_S, WAIT_S = 60, 20
SETTLED = "document.querySelector('.answer')?.dataset.of === location.search"
READY = ".stage[data-ready][data-view]"
SHOWN = """() => [...document.querySelectorAll('.answer .class')].map(each => ({
    name: each.querySelector('h3').textContent,
    ids: [...each.querySelectorAll('.neighbour')].map(one => one.dataset.id),
    distances: [...each.querySelectorAll('.distance')].map(one => Number(one.title.replace('distance ', ''))),
}))"""
# Controls, links and images without a name that a screen reader can say.
NAMELESS = """() => [...document.querySelectorAll('a, button, input, select, textarea, [role=application], [role=img]')]
    .filter(each => each.checkVisibility())
    .filter(each => ![each.getAttribute('aria-label'), each.textContent, each.title,
        ...[...(each.labels ?? [])].map(label => label.textContent)].some(text => text?.trim())
        || (each.tagName === 'SELECT' && !each.labels.length))
    .map(each => each.outerHTML)"""


@contextlib.contextmanager
def explore(project: Project, log: Path) -> Iterator[str]:
    """Run `synpipe explore` on a free port and yield its address."""
    command = [str(Path(sys.executable).parent / "synpipe"), "explore", "--port", "0"]
    with log.open("w") as output:
        process = subprocess.Popen(command, env=environment(project), stdout=output, stderr=output)
    try:
        deadline = time.monotonic() + START_S
        while not (said := re.search(r"http://\S+/", log.read_text())):
            if process.poll() is not None or time.monotonic() > deadline:
                raise TimeoutError(f"`synpipe explore` does not start:\n{log.read_text()}")
            time.sleep(0.1)
        yield said.group()
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=START_S)


@dataclass
class Watched:
    """A page, its requests to other hosts (`elsewhere`), and its errors (`complaints`)."""

    page: Page
    elsewhere: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)


@contextlib.contextmanager
def watched(browser: Browser, url: str, **context: Any) -> Iterator[Watched]:
    """Open a page at `url`. At the end, it must have reported no error and sent no request to another host."""
    opened = browser.new_context(**({"viewport": {"width": 1280, "height": 900}} | context))
    seen = Watched(opened.new_page())
    host = urlsplit(url).netloc

    def look(asked: str) -> None:
        if urlsplit(asked.removeprefix("blob:")).netloc != host and not asked.startswith("data:"):
            seen.elsewhere.append(asked)

    seen.page.on("request", lambda request: look(request.url))
    seen.page.on("pageerror", lambda error: seen.complaints.append(str(error)))
    seen.page.on(
        "console", lambda said: seen.complaints.append(said.text) if said.type in ("error", "warning") else None
    )
    seen.page.goto(url)
    yield seen
    opened.close()
    assert seen.elsewhere == []
    assert seen.complaints == []


def until(page: Page, condition: str | Callable[[], bool]) -> None:
    """Wait for a condition. Playwright's `wait_for_function` evaluates strings in the page, and the page forbids that."""
    deadline = time.monotonic() + WAIT_S
    while not (page.evaluate(condition) if isinstance(condition, str) else condition()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"Not within {WAIT_S} s: {condition}\n{page.url}\n{page.inner_text('body')}")
        page.wait_for_timeout(20)


def shown(page: Page) -> dict[str, tuple[list[str], list[float]]]:
    """Wait until the page shows the answer to its address. Return ids and distances by class."""
    until(page, SETTLED)
    return {each["name"]: (each["ids"], each["distances"]) for each in page.evaluate(SHOWN)}


def nameless(page: Page) -> list[str]:
    return page.evaluate(NAMELESS)


class Truth:
    """The expected answers, computed with numpy from the Parquet file."""

    def __init__(self, dataset: Dataset, encoder: str):
        table = read_table(dataset.table_path(encoder))
        self.rows = table.to_pylist()
        self.place = {str(row["synapse_id"]): place for place, row in enumerate(self.rows)}
        self.ids = list(self.place)
        unit = np.array([row["vector"] for row in self.rows])
        unit /= np.linalg.norm(unit, axis=1, keepdims=True)
        self.vectors = unit * np.array([row["norm"] for row in self.rows])[:, None]
        self.unit = unit
        self.map = np.array([(row["map_x"], row["map_y"]) for row in self.rows])

    def distances(self, synapse_id: str, metric: str) -> np.ndarray:
        query = self.place[synapse_id]
        return {
            "cosine": lambda: 1 - self.unit @ self.unit[query],
            "l2": lambda: np.linalg.norm(self.vectors - self.vectors[query], axis=1),
            "dot": lambda: -(self.vectors @ self.vectors[query]),
            "l1": lambda: np.abs(self.vectors - self.vectors[query]).sum(axis=1),
        }[metric]()

    def nearest(
        self, synapse_id: str, metric: str = "cosine", per_class: int = 4, **where: Any
    ) -> dict[str, list[str]]:
        """Return ids by class, nearest first. where: accepted values by column. other_neurons: leave out the query's own neuron."""
        distances = self.distances(synapse_id, metric)
        own = self.rows[self.place[synapse_id]]["neuron_id"]
        other_neurons = where.pop("other_neurons", False)
        found: dict[str, list[str]] = {}
        for place in np.argsort(distances, kind="stable"):
            row = self.rows[place]
            if self.ids[place] == synapse_id or (other_neurons and row["neuron_id"] == own):
                continue
            if all(row[column] == value for column, value in where.items()):
                found.setdefault(row["neurotransmitter"] or "unlabelled", []).append(self.ids[place])
        return {name: ids[:per_class] for name, ids in found.items()}


class MapOnPage:
    """The map on a page, and where its points are on the screen."""

    def __init__(self, page: Page, truth: Truth):
        page.wait_for_selector(READY)
        self.page = page
        self.truth = truth

    def places(self) -> np.ndarray:
        """Return the positions of all synapses in pixels of the window: (n, 2)."""
        view = self.page.locator(".stage").get_attribute("data-view")
        assert view is not None
        x, y, scale = map(float, view.split())
        box = self.page.locator("canvas").bounding_box()
        assert box is not None
        middle = np.array([box["x"] + box["width"] / 2, box["y"] + box["height"] / 2])
        return middle + (self.truth.map - [x, y]) * [scale, -scale]

    def wait_for(self, row: int, place: Sequence[float]) -> None:
        """Wait until a point is drawn within two pixels of a position in the window."""
        until(self.page, lambda: bool(np.abs(self.places()[row] - place).max() < 2))

    def lonely(self) -> int:
        """Return the row of the point that is farthest from all others."""
        apart = np.linalg.norm(self.truth.map[:, None] - self.truth.map, axis=2)
        np.fill_diagonal(apart, np.inf)
        return int(apart.min(axis=1).argmax())

    def painted(self, row: int) -> bool:
        """Return whether a point is drawn: whether its pixel differs from the corner of the map."""
        right, down = self.places()[row]
        corner = self.page.locator("canvas").bounding_box()
        assert corner is not None
        return self._pixel(right, down) != self._pixel(corner["x"] + 3, corner["y"] + 3)

    def _pixel(self, right: float, down: float) -> Any:
        clip: Any = {"x": round(right), "y": round(down), "width": 1, "height": 1}
        return Image.open(io.BytesIO(self.page.screenshot(clip=clip))).convert("RGB").getpixel((0, 0))
