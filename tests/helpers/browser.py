"""A real server of the dashboard, and a headless Chromium that visits it."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlencode, urlsplit

from gptailor.store.folder import RunFolder, run_folders

ROOT = Path(__file__).resolve().parents[2]

SHOTS = ROOT / "screenshots"

CHROMIUM = Path("/usr/bin/chromium")

PATIENCE = 600_000
"""Milliseconds until something is given up."""

PAGES = ("Home", "Launch", "Compare", "Progress", "Fidelity", "Trade-offs", "Layers", "Models")

# Streamlit's client looks for its server under the page's own path before it looks at the root.
HARMLESS = re.compile(r"/[\w-]+/_stcore/(health|host-config)$")

SETTLED = """() => {
    const app = document.querySelector('[data-testid="stApp"]');
    const all = (name, part) =>
        [...document.querySelectorAll(`[data-testid="${name}"]`)].every((found) => found.querySelector(part));
    return app && app.dataset.testScriptState === 'notRunning' && app.dataset.testConnectionState === 'CONNECTED'
        && !document.querySelector('[data-testid="stSkeleton"]')
        && all('stVegaLiteChart', 'svg, canvas') && all('stDataFrame', 'canvas');
}"""

EVERYTHING = """() => {
    const all = (part, of) => [...document.querySelectorAll(part)].map(of);
    return [document.body.innerText, ...all('input, textarea', (field) => field.value),
        ...all('canvas table, svg text', (drawn) => drawn.textContent)].join('\\n');
}"""


class Server:
    """`streamlit run` on a port of its own, over a runs folder."""

    def __init__(self, runs: Path, *options: str) -> None:
        self.runs, self._options = runs, options
        self.process: subprocess.Popen[bytes] | None = None
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self._port}"

    def start(self) -> None:
        command = [sys.executable, "-m", "streamlit", "run", "streamlit_app.py", "--server.port", str(self._port)]
        command += ["--server.headless", "true", "--server.fileWatcherType", "none", *self._options]
        environment = {**os.environ, "GPTAILOR_RUNS": str(self.runs), "HF_HUB_OFFLINE": "1"}
        with open(self.runs.parent / "server.log", "ab") as log:
            self.process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
        until(self._answers)

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/_stcore/health", timeout=2) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def kill(self) -> None:
        if self.process is not None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()


def until(condition: Callable[[], Any]) -> Any:
    end = time.monotonic() + PATIENCE / 1000
    while not (found := condition()):
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.1)
    return found


class Visitor:
    """A browser tab, and everything it complained about."""

    def __init__(self, browser: Any, url: str, *friends: str) -> None:
        context = browser.new_context(viewport={"width": 1280, "height": 900}, color_scheme="light", timezone_id="UTC")
        self.page = context.new_page()
        self.page.set_default_timeout(PATIENCE)
        self.url, self.friends, self.complaints = url, friends, list[str]()
        self.page.on("console", self._console)
        self.page.on("pageerror", lambda error: self.complaints.append(f"page error: {error}"))
        self.page.on("request", self._request)
        self.page.on("dialog", self._dialog)

    def _console(self, message: Any) -> None:
        if message.type == "error" and not HARMLESS.search(message.location.get("url", "")):
            self.complaints.append(f"console: {message.text} {message.location.get('url', '')}")

    def _request(self, request: Any) -> None:
        """Nothing may be asked of anybody else: the dashboard works offline and tells nobody."""
        known = (self.url, "data:", "blob:", self.url.replace("http", "ws", 1), *self.friends)
        if not request.url.startswith(known):
            self.complaints.append(f"asked elsewhere: {request.url}")

    def _dialog(self, dialog: Any) -> None:
        self.complaints.append(f"a script spoke: {dialog.message}")
        dialog.dismiss()

    def open(self, title: str, **query: str) -> None:
        """A page by its link."""
        self.page.goto(f"{self.url}/{'' if title == 'Home' else title}?{urlencode(query)}")
        self.arrived(title)

    def go(self, title: str) -> None:
        """To another page, by the navigation."""
        self.page.locator('[data-testid="stSidebar"]').get_by_role("link", name=title, exact=True).click()
        self.arrived(title)

    def arrived(self, title: str) -> None:
        self.page.get_by_role("heading", name=title, exact=True, level=1).wait_for()
        if title == "Launch":
            self.says("Check again|Some fields need a change")
        self.settle()

    def settle(self) -> None:
        """Until the page's script has run, everything it sent is drawn, and nothing broke."""
        self.page.wait_for_function(SETTLED, polling=100)
        self.no_complaints()

    def no_complaints(self) -> None:
        assert self.page.locator('[data-testid="stException"]').count() == 0, self.text()
        assert self.complaints == []

    def says(self, pattern: str) -> None:
        """Until the page's text has the pattern."""
        found = "pattern => new RegExp(pattern).test(document.querySelector('[data-testid=\"stMain\"]').innerText)"
        self.page.wait_for_function(found, arg=pattern, polling=100)

    def text(self) -> str:
        return str(self.page.locator('[data-testid="stMain"]').inner_text())

    def shows(self, words: str) -> None:
        """Until the words are somewhere on the page, letter for letter: also in fields, tables and charts."""
        self.page.wait_for_function(f"words => ({EVERYTHING})().includes(words)", arg=words, polling=100)

    def chosen(self, name: str) -> str:
        """A choice in the URL."""
        return parse_qs(urlsplit(self.page.url).query).get(name, [""])[0]

    def button(self, name: str) -> Any:
        """One whose whole label is `name`; an icon's name comes before it."""
        return self.page.get_by_role("button", name=re.compile(rf"^(\w+ )?{re.escape(name)}( …)?$"))

    def dialog(self) -> Any:
        return self.page.get_by_role("dialog")

    def tick(self, *runs: RunFolder) -> None:
        """Tick runs in Home's table, which is drawn on a canvas."""
        box = self.page.locator('[data-testid="stDataFrame"] canvas').first.bounding_box()
        shown = [found.run_id for found in reversed(run_folders(runs[0].root))]
        for ticked, run in enumerate(runs, start=1):
            self.page.mouse.click(box["x"] + 17, box["y"] + 36 + 35 * shown.index(run.run_id) + 17)
            self.says(f"{ticked} runs? ticked")
        self.settle()

    def shoot(self, name: str, dark: bool = False, width: int = 1280) -> None:
        """A picture of the whole page, on which nothing is wider than the window."""
        SHOTS.mkdir(exist_ok=True)
        self.page.emulate_media(color_scheme="dark" if dark else "light")
        self.page.set_viewport_size({"width": width, "height": 900})
        self.page.wait_for_timeout(400)  # drawing has no end that a page tells
        tall = self.page.evaluate("document.querySelector('[data-testid=stMain]').scrollHeight")
        self.page.set_viewport_size({"width": width, "height": max(900, min(tall, 8000))})
        self.page.wait_for_timeout(400)
        self.settle()
        self.page.screenshot(path=SHOTS / f"{name}.png")
        wide = self.page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        assert wide <= 0, f"{name} is wider than the window by {wide} px"

    def close(self) -> None:
        self.page.context.close()


def run_called(server: Server, name: str) -> RunFolder:
    [found] = [folder for folder in run_folders(server.runs) if f"-{name}-" in folder.run_id]
    return found
