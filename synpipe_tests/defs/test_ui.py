"""The Dagster UI as a user meets it: started by the command, used in a browser, ended by a signal."""

import re
import time
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Page, expect

from synpipe.assets.graph import nodes
from synpipe.datasets import Project
from synpipe_tests.support.browser import CHROMIUM, Ui, chromium, serve

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="neither chromium nor google-chrome is on the PATH")

RUNS = "{ runsOrError { ... on Runs { results { runId status } } } }"
ASSETS = """{
  assetNodes {
    assetKey { path }
    staleStatus
    assetMaterializations(limit: 1) { runId }
    assetChecksOrError { ... on AssetChecks { checks { name executionForLatestMaterialization { status } } } }
  }
}"""


@pytest.mark.slow
def test_from_an_empty_store_to_green_assets_with_one_click(project: Project, tmp_path: Path) -> None:
    with serve(project, tmp_path) as ui:
        with chromium() as browser:
            page = browser.new_page(
                viewport={"width": 1280, "height": 1600}
            )  # the page lists no asset that is out of sight
            asked: list[str] = []
            page.on("request", lambda request: asked.append(request.url))

            page.goto(f"{ui.url}/asset-groups")
            page.get_by_role("button", name="Materialize all").click()
            expect(page.get_by_text("Launched run")).to_be_visible(timeout=30_000)
            run_id = _wait_for_success(ui)
            expect(page.get_by_role("dialog")).to_have_count(0)

            assets = ui.ask(ASSETS)["assetNodes"]
            expected = nodes(project.dataset("demo"))
            assert {tuple(asset["assetKey"]["path"]) for asset in assets} == {node.key for node in expected}
            for asset in assets:
                assert [made["runId"] for made in asset["assetMaterializations"]] == [run_id], asset
                assert asset["staleStatus"] == "FRESH", asset
            checks = [check for asset in assets for check in asset["assetChecksOrError"].get("checks", [])]
            assert len(checks) == sum(len(node.asset.checks) for node in expected)
            assert {check["executionForLatestMaterialization"]["status"] for check in checks} == {"SUCCEEDED"}, checks

            _all_are_green(page, ui, len(expected))
            assert _picture(page, f"{ui.url}/assets/demo/rgb_tiles", "contact_sheet") > 400
            assert _picture(page, f"{ui.url}/assets/demo/tiny/index", "nearest_neighbours") > 400
            elsewhere = [url for url in asked if urlsplit(url).hostname != "127.0.0.1"]
            assert [url for url in elsewhere if not url.startswith(("data:", "blob:http://127.0.0.1:"))] == []
        ui.stop()
        assert not re.search("warning|error|traceback", ui.messages, re.IGNORECASE), ui.messages


def _wait_for_success(ui: Ui) -> str:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        (run,) = ui.ask(RUNS)["runsOrError"]["results"]
        assert run["status"] not in ("FAILURE", "CANCELED"), ui.messages
        if run["status"] == "SUCCESS":
            return run["runId"]
        time.sleep(0.5)
    raise TimeoutError("The run has not finished after two minutes.")


def _all_are_green(page: Page, ui: Ui, count: int) -> None:
    page.goto(f"{ui.url}/assets")
    expect(page.get_by_text("Materialized", exact=True)).to_have_count(count, timeout=30_000)
    for unwanted in ("Never materialized", "Failed", "Unsynced", "Code version"):
        expect(page.get_by_text(unwanted)).to_have_count(0)


def _picture(page: Page, url: str, name: str) -> int:
    """Width in pixels of a picture among an asset's metadata, once the browser has decoded it."""
    page.goto(url)
    row = page.get_by_role("row").filter(has=page.get_by_text(name, exact=True))
    row.get_by_text("[Show Markdown]").click()
    picture = page.get_by_role("img", name=name)
    expect(picture).to_be_visible()
    return picture.evaluate("async image => { await image.decode(); return image.naturalWidth }")
