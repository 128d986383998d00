"""Start Dagster's UI and a browser, for the tests and for the pictures in the README."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, sync_playwright

from synpipe.datasets import Project
from synpipe_tests.conftest import environment

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
# Without these flags, Chromium contacts Google's hosts for updates.
QUIET = ("--no-first-run", "--disable-background-networking", "--disable-component-update")
# WebGL on the CPU, for machines without a graphics card.
SOFTWARE_GL = ("--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader")
START_S, STOP_S = 150, 60


@dataclass
class Ui:
    """A running `synpipe ui`. `messages` is what it has written so far."""

    url: str
    process: subprocess.Popen
    log: Path

    @property
    def messages(self) -> str:
        return self.log.read_text()

    def ask(self, query: str) -> Any:
        """Return the answer to a GraphQL query."""
        body = json.dumps({"query": query}).encode()
        request = urllib.request.Request(f"{self.url}/graphql", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.load(answer)["data"]

    def stop(self) -> None:
        """Send SIGTERM and wait until the process and all of its children have ended. Raises `TimeoutError`."""
        self.process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + STOP_S
        while self._alive():
            if time.monotonic() > deadline:
                raise TimeoutError(f"Processes of `synpipe ui` are left after {STOP_S} s.")
            time.sleep(0.2)

    def _alive(self) -> bool:
        self.process.poll()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, 0)
            return True
        return False


@contextlib.contextmanager
def serve(project: Project, folder: Path, host: str = "127.0.0.1", **variables: str) -> Iterator[Ui]:
    """Run `synpipe ui` on a free port, in the background as a shell would start it: with SIGINT ignored.

    host: where it listens. variables: environment variables, in addition to those that name the project.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    synpipe = Path(sys.executable).parent / "synpipe"
    command = ["sh", "-c", f"trap '' INT; exec '{synpipe}' ui --host {host} --port {port}"]
    log = folder / "ui.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            command, env=environment(project) | variables, stdout=output, stderr=output, start_new_session=True
        )
    ui = Ui(f"http://127.0.0.1:{port}", process, log)
    try:
        _wait_until_loaded(ui)
        yield ui
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def _wait_until_loaded(ui: Ui) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and ui.process.poll() is None:
        with contextlib.suppress(urllib.error.URLError, ConnectionError, TimeoutError):
            if ui.ask("{ assetNodes { id } }")["assetNodes"]:
                return
        time.sleep(0.5)
    raise TimeoutError(f"`synpipe ui` shows no asset after {START_S} s:\n{ui.messages}")


@contextlib.contextmanager
def chromium(webgl: bool = False, *more_flags: str) -> Iterator[Browser]:
    flags = [*QUIET, *(SOFTWARE_GL if webgl else ["--disable-gpu"]), *more_flags]
    # Chromium cannot use its sandbox when it runs as root, as in most containers.
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=flags, chromium_sandbox=False)
        yield browser
        browser.close()
