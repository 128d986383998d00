"""Measure how smoothly the explorer's map moves: `python -m synpipe_tests.bench.map --rows 103511 1000000`.

It needs the demo in the store (`make demo`) and Chromium. The points are those of 103,511 synapses of FAFB if
SYNPIPE_REAL_DATA has `synominous_umap.json.gz`, and synthetic otherwise. More rows are scattered a little around those
points. The CPU computes the graphics; a laptop with a graphics card is faster. The time until the map is drawn includes
the time in which Playwright transfers the points.
"""

import argparse
import gzip
import json
import os
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
from playwright.sync_api import Page

from synpipe.datasets import Project
from synpipe.explorer.map_file import MAP_CATEGORIES, MAP_NUMBERS, pack_map
from synpipe_tests.support.browser import chromium
from synpipe_tests.support.explorer_pages import READY, explore, until

PAN_STEPS, STEP_MS = 180, 16
COUNT_FRAMES = """() => {
    window.frames = [];
    const count = time => { window.frames.push(time); requestAnimationFrame(count); };
    requestAnimationFrame(count);
}"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[103_511, 1_000_000])
    arguments = parser.parse_args()
    project = Project.locate()
    print(f"{'points':>9}  {'drawn after s':>13}  {'panning, ms a frame: median':>27}  {'p95':>5}  {'lasso s':>7}")
    with tempfile.TemporaryDirectory() as logs, explore(project, Path(logs) / "explore.log") as url:
        for rows in arguments.rows:
            content = pack_map(_synapses(rows))
            assert content
            with chromium(webgl=True) as browser:
                _measure(browser.new_page(viewport={"width": 1280, "height": 900}), url, rows, content)


def _measure(page: Page, url: str, rows: int, content: bytes) -> None:
    page.route("**/map", lambda route: route.fulfill(body=content))
    began = time.perf_counter()
    page.goto(f"{url}?page=map")
    page.wait_for_selector(READY, timeout=120_000)
    drawn = time.perf_counter() - began
    box = page.locator("canvas").bounding_box()
    assert box
    left, top = box["x"] + box["width"] / 4, box["y"] + box["height"] / 4
    page.mouse.move(left, top)
    page.mouse.down()
    page.evaluate(COUNT_FRAMES)
    for step in range(PAN_STEPS):
        page.mouse.move(left + step, top + step)
        page.wait_for_timeout(STEP_MS)
    frames = np.diff(page.evaluate("window.frames"))
    page.mouse.up()
    page.get_by_role("button", name="Lasso: draw").click()
    page.mouse.move(left, top)
    page.mouse.down()
    for right, down in ((0.5, 0), (0.5, 0.5), (0, 0.5)):
        page.mouse.move(left + right * box["width"], top + down * box["height"])
    began = time.perf_counter()
    page.mouse.up()
    until(page, "document.querySelector('.selected strong').checkVisibility()")
    lasso = time.perf_counter() - began
    print(f"{rows:>9,}  {drawn:>13.1f}  {np.median(frames):>27.0f}  {np.quantile(frames, 0.95):>5.0f}  {lasso:>7.2f}")


def _synapses(rows: int) -> pa.Table:
    """The columns that a map is made of."""
    random = np.random.default_rng(0)
    file = Path(os.environ.get("SYNPIPE_REAL_DATA", "")) / "fafb_v3" / "synominous_umap.json.gz"
    if file.is_file():
        points = json.loads(gzip.decompress(file.read_bytes()))
        chosen = np.arange(rows) % len(points)
        places = np.array([(point["x"], point["y"]) for point in points])[chosen]
        labels = np.array([point["neurotransmitter"] for point in points])[chosen]
    else:
        chosen = random.integers(0, 60, rows)
        places = random.normal(size=(60, 2))[chosen] * 8
        labels = np.array(["acetylcholine", "gaba", "glutamate", "dopamine", "serotonin", "octopamine"])[chosen % 6]
    places = places + random.normal(0, 0.02, (rows, 2))
    empty = {name: pa.nulls(rows, pa.string()) for name in MAP_CATEGORIES} | {
        name: pa.nulls(rows, pa.float32()) for name in MAP_NUMBERS
    }
    columns = {
        "synapse_id": np.arange(rows),
        "map_x": places[:, 0].astype(np.float32),
        "map_y": places[:, 1].astype(np.float32),
    }
    shown = empty | {"neurotransmitter": pa.array(labels), "confidence": pa.array(random.random(rows))}
    return pa.table({**columns, **shown})


if __name__ == "__main__":
    main()
