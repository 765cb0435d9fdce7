"""A Chromium of its own for the benchmark of the page, spoken to by its DevTools protocol and by nothing else.

Playwright, which the tests use, has every frame of a WebSocket reported to it: that would be measured, too. Here
nothing of a page is reported that is not asked for.
"""

import itertools
import json
import os
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from websockets.sync.client import ClientConnection, connect

from benchmarks.servers import START_SECONDS, Servers
from tests.page.browser import CHROMIUM_OPTIONS, find_chromium

ANSWER_SECONDS = 60.0
TICKS = os.sysconf("SC_CLK_TCK")


class DevTools:
    """One connection: to the browser, or to one of its pages."""

    def __init__(self, connection: ClientConnection) -> None:
        self._connection, self._numbers = connection, itertools.count(1)

    def ask(self, method: str, **parameters: object) -> dict[str, Any]:
        """Call a method; events that come meanwhile are dropped. Raises `RuntimeError` when it fails."""
        number = next(self._numbers)
        self._connection.send(json.dumps({"id": number, "method": method, "params": parameters}))
        while True:
            message: dict[str, Any] = json.loads(self._connection.recv(ANSWER_SECONDS))
            if message.get("id") == number:
                if "error" in message:
                    raise RuntimeError(f"{method}: {message['error']}")
                answer: dict[str, Any] = message["result"]
                return answer

    def evaluate(self, expression: str) -> Any:
        """Return what an expression is in the page, as JSON would have it."""
        answer = self.ask("Runtime.evaluate", expression=expression, returnByValue=True)
        return answer["result"].get("value")

    def heap_mb(self) -> float:
        """Return how much of the page's JavaScript heap is in use once its garbage is collected."""
        self.ask("Performance.enable")
        for _ in range(2):
            self.ask("HeapProfiler.collectGarbage")
        metrics = self.ask("Performance.getMetrics")["metrics"]
        self.ask("Performance.disable")
        used: float = next(metric["value"] for metric in metrics if metric["name"] == "JSHeapUsedSize")
        return used / 2**20


class Chromium:
    """A running browser: its pages, and its processes as the system sees them."""

    def __init__(self, servers: Servers, width: int, height: int) -> None:
        if (program := find_chromium()) is None:
            raise SystemExit("Chromium is missing; make ci-deps installs it")
        self._size = {"width": width, "height": height}
        profile = servers.folder / "chromium"
        command = [program, "--headless", *CHROMIUM_OPTIONS, f"--user-data-dir={profile}", "--remote-debugging-port=0"]
        self._pid = servers.start([*command, f"--window-size={width},{height}", "about:blank"]).pid
        self._place = _when_listens(profile / "DevToolsActivePort")

    @contextmanager
    def page(self, script: str = "") -> Iterator[DevTools]:
        """Open an empty page as a new visitor; `script` runs before those of every document."""
        port, path = self._place
        with connect(f"ws://127.0.0.1:{port}{path}", max_size=None) as wire:
            browser = DevTools(wire)
            visitor = browser.ask("Target.createBrowserContext")["browserContextId"]
            target = browser.ask("Target.createTarget", url="about:blank", browserContextId=visitor, **self._size)
            address = f"ws://127.0.0.1:{port}/devtools/page/{target['targetId']}"
            with connect(address, max_size=None) as page_wire:
                page = DevTools(page_wire)
                page.ask("Page.enable")
                page.ask("Page.addScriptToEvaluateOnNewDocument", source=script)
                yield page
            browser.ask("Target.disposeBrowserContext", browserContextId=visitor)

    def processes(self) -> dict[int, str]:
        """Map the id of each of the browser's processes to its kind."""
        found = {self._pid: "browser"}
        parents = dict(_parents())
        waiting = [self._pid]
        while waiting:
            parent = waiting.pop()
            children = [child for child, its in parents.items() if its == parent]
            waiting += children
            found |= {child: _kind(child) for child in children}
        return found

    def spent(self) -> dict[int, float]:
        """Return the processor time in seconds that each process took so far."""
        return {pid: cpu_seconds(pid) for pid in self.processes()}

    def renderer(self, since: Mapping[int, float]) -> int:
        """Return the process of the only page: of those that draw pages, the one that worked most since then."""
        drawing = [pid for pid, kind in self.processes().items() if kind == "renderer"]
        return max(drawing, key=lambda pid: cpu_seconds(pid) - since.get(pid, 0.0))


def cpu_seconds(pid: int) -> float:
    """Return the processor time a process took so far; 0 when it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / TICKS


def private_mb(pid: int) -> float:
    """Return the memory that only this process has."""
    told = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return sum(int(size) for size in re.findall(r"^Private_(?:Clean|Dirty): +(\d+)", told, re.MULTILINE)) / 1024


def _parents() -> Iterator[tuple[int, int]]:
    """Give each process of the machine and its parent."""
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                yield int(folder.name), int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:  # it has just ended
                continue


def _kind(pid: int) -> str:
    """Return what a process of Chromium does, as its command line tells."""
    try:
        told = Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""
    found = re.search(r"--type=([\w-]+)", told)
    return found[1] if found else ""


def _when_listens(file: Path) -> tuple[int, str]:
    """Wait until a browser has written where it listens: its port, and the path of its WebSocket."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if file.exists() and len(lines := file.read_text().split()) == 2:
            return int(lines[0]), lines[1]
        time.sleep(0.02)
    raise RuntimeError("Chromium does not listen")
