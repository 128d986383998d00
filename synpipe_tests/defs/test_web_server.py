"""No web page can use `synpipe ui` behind the back of its user: tried from pages of another origin, in a browser."""

import http.server
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Page

from synpipe.datasets import Project
from synpipe_tests.support.browser import CHROMIUM, Ui, chromium, serve

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="neither chromium nor google-chrome is on the PATH")

RUNS = "{ runsOrError { ... on Runs { results { runId } } } }"
MADE = "{ assetNodes { assetKey { path } assetMaterializations(limit: 1) { timestamp } } }"
LAUNCH = """mutation { launchRun(executionParams: {
  selector: {repositoryLocationName: "%s", repositoryName: "__repository__", jobName: "__ASSET_JOB",
             assetSelection: [{path: ["demo", "volume"]}]}
  runConfigData: {}, mode: "default"
}) { __typename ... on PythonError { message } } }"""

# Each sends one kind of request to the server, with everything a page can set, and ends when the answer or an error is there.
ATTACKS = {
    "form in the address": """async ({url, query}) => {
        document.body.innerHTML = '<iframe name=target></iframe><form method=post target=target>';
        document.forms[0].action = `${url}/graphql?query=${encodeURIComponent(query)}`;
        const sent = new Promise(done => { document.querySelector('iframe').onload = done; });
        document.forms[0].submit();
        await sent;
    }""",
    "form with JSON as text": """async ({url, query}) => {
        const body = JSON.stringify({query});
        const headers = {'Content-Type': 'text/plain; application/json'};
        await fetch(`${url}/graphql`, {method: 'POST', mode: 'no-cors', headers, body});
    }""",
    "picture": """async ({url, query}) => {
        const image = new Image();
        const done = new Promise(done => { image.onload = image.onerror = done; });
        image.src = `${url}/graphql?query=${encodeURIComponent(query)}`;
        await done;
    }""",
    "report of an asset": """async ({url}) => {
        await fetch(`${url}/report_asset_materialization/demo/volume`, {method: 'POST', mode: 'no-cors'});
    }""",
    "websocket": """async ({url, query}) => {
        const socket = new WebSocket(url.replace('http', 'ws') + '/graphql', 'graphql-ws');
        await new Promise(done => {
            socket.onerror = done;
            socket.onopen = () => {
                window.opened = true;
                done();
            };
        });
    }""",
}


@pytest.fixture
def elsewhere() -> Iterator[int]:
    """The port of a web site with one empty page."""

    class EmptyPage(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(b"<!doctype html><title>elsewhere</title><body></body>")

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), EmptyPage) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()


@pytest.mark.slow
@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_a_web_page_from_elsewhere_cannot_start_runs(
    project: Project, tmp_path: Path, elsewhere: int, host: str
) -> None:
    names = "--host-resolver-rules=MAP *.test 127.0.0.1"
    with serve(project, tmp_path, host) as ui, chromium(False, names) as browser:
        location = ui.ask("{ workspaceOrError { ... on Workspace { locationEntries { name } } } }")
        query = LAUNCH % location["workspaceOrError"]["locationEntries"][0]["name"]
        page = browser.new_page()
        for origin in (f"http://site.test:{elsewhere}", f"http://127.0.0.1:{elsewhere}"):
            for name, attack in ATTACKS.items():
                page.goto(origin)
                _ignoring_errors(page, attack, {"url": ui.url, "query": query})
                assert not page.evaluate("window.opened"), f"{name} from {origin} opened a websocket"
                assert ui.ask(RUNS)["runsOrError"]["results"] == [], f"{name} from {origin} started a run"
                assert not any(asset["assetMaterializations"] for asset in ui.ask(MADE)["assetNodes"]), name
        _a_name_that_points_here_gets_no_answer(page, ui)
        _a_link_from_elsewhere_opens_the_page(page, ui, elsewhere)
        assert _listening_ports(ui.process.pid) == {urlsplit(ui.url).port}


def _ignoring_errors(page: Page, script: str, argument: dict[str, str]) -> None:
    page.evaluate(f"argument => ({script})(argument).catch(() => null)", argument)


def _a_name_that_points_here_gets_no_answer(page: Page, ui: Ui) -> None:
    """The page's own name points at this machine now, so that its requests are of the same origin as its server."""
    answer = page.goto(f"{ui.url.replace('127.0.0.1', 'site.test')}/server_info")
    assert answer is not None and answer.status == 403
    assert "site.test" in answer.text()


def _a_link_from_elsewhere_opens_the_page(page: Page, ui: Ui, elsewhere: int) -> None:
    page.goto(f"http://site.test:{elsewhere}")
    page.evaluate("url => { location.href = url }", f"{ui.url}/asset-groups")
    page.get_by_role("button", name="Materialize all").wait_for(timeout=60_000)


def _listening_ports(session: int) -> set[int]:
    """The TCP ports on which the processes of a session listen."""
    sockets = set()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if os.getsid(int(folder.name)) == session:
                sockets |= {os.readlink(link) for link in (folder / "fd").iterdir()}
        except OSError:  # the process, or its file, is gone
            continue
    lines = [
        line.split() for table in ("tcp", "tcp6") for line in Path("/proc/net", table).read_text().splitlines()[1:]
    ]
    listening = "0A"
    return {
        int(line[1].rpartition(":")[2], 16)
        for line in lines
        if line[3] == listening and f"socket:[{line[9]}]" in sockets
    }
