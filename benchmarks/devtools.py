"""Control Chromium through its DevTools protocol, for the benchmark of the page.

Playwright, which the tests use, receives an event for every WebSocket frame, which would be
measured, too. This module enables no events during a measurement.
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

RESPONSE_SECONDS = 60.0
TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")  # unit of processor time in /proc


class DevTools:
    """A DevTools connection to the browser or to one of its pages."""

    def __init__(self, connection: ClientConnection) -> None:
        self._connection = connection
        self._ids = itertools.count(1)

    def call(self, method: str, **parameters: object) -> dict[str, Any]:
        """Call a method and return its result. Events are discarded.

        Raise `RuntimeError` if the method fails.
        """
        call_id = next(self._ids)
        self._connection.send(json.dumps({"id": call_id, "method": method, "params": parameters}))
        while True:
            message: dict[str, Any] = json.loads(self._connection.recv(RESPONSE_SECONDS))
            if message.get("id") == call_id:
                if "error" in message:
                    raise RuntimeError(f"{method}: {message['error']}")
                result: dict[str, Any] = message["result"]
                return result

    def evaluate(self, expression: str) -> Any:
        """Evaluate JavaScript in the page and return its value."""
        response = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        return response["result"].get("value")

    def heap_mb(self) -> float:
        """Return the used JavaScript heap of the page after garbage collection."""
        self.call("Performance.enable")
        for _ in range(2):
            self.call("HeapProfiler.collectGarbage")
        metrics = self.call("Performance.getMetrics")["metrics"]
        self.call("Performance.disable")
        values = {metric["name"]: float(metric["value"]) for metric in metrics}
        return values["JSHeapUsedSize"] / 2**20


class Chromium:
    """A running browser with its pages and processes."""

    def __init__(self, servers: Servers, width: int, height: int) -> None:
        program = find_chromium()
        if program is None:
            raise SystemExit("Chromium is not installed. Run make ci-deps as root.")
        self._size = {"width": width, "height": height}
        profile = servers.folder / "chromium"
        options = [
            "--headless",
            *CHROMIUM_OPTIONS,
            f"--user-data-dir={profile}",
            "--remote-debugging-port=0",
            f"--window-size={width},{height}",
        ]
        self._pid = servers.start([program, *options, "about:blank"]).pid
        self._port, self._path = _read_debugging_address(profile / "DevToolsActivePort")

    @contextmanager
    def page(self, script: str = "") -> Iterator[DevTools]:
        """Open an empty page as a new visitor.

        `script` runs in every document before the document's own scripts.
        """
        address = f"ws://127.0.0.1:{self._port}"
        with connect(f"{address}{self._path}", max_size=None) as browser_connection:
            browser = DevTools(browser_connection)
            context = browser.call("Target.createBrowserContext")["browserContextId"]
            target = browser.call(
                "Target.createTarget", url="about:blank", browserContextId=context, **self._size
            )
            page_address = f"{address}/devtools/page/{target['targetId']}"
            with connect(page_address, max_size=None) as page_connection:
                page = DevTools(page_connection)
                page.call("Page.enable")
                page.call("Page.addScriptToEvaluateOnNewDocument", source=script)
                yield page
            browser.call("Target.disposeBrowserContext", browserContextId=context)

    def processes(self) -> dict[int, str]:
        """Return the kind of each of the browser's processes by process id."""
        kinds = {self._pid: "browser"}
        parents = _parents()
        waiting = [self._pid]
        while waiting:
            parent = waiting.pop()
            children = [pid for pid, parent_pid in parents.items() if parent_pid == parent]
            waiting += children
            kinds |= {child: _process_kind(child) for child in children}
        return kinds

    def cpu_seconds(self) -> dict[int, float]:
        """Return the processor time of each process by process id."""
        return {pid: cpu_seconds(pid) for pid in self.processes()}

    def find_renderer(self, earlier: Mapping[int, float]) -> int:
        """Return the renderer process with the most processor time since `earlier`.

        This is the process of the page, if only one page is open.
        """
        renderers = [pid for pid, kind in self.processes().items() if kind == "renderer"]
        return max(renderers, key=lambda pid: cpu_seconds(pid) - earlier.get(pid, 0.0))


def cpu_seconds(pid: int) -> float:
    """Return the processor time of a process, or 0 if it has ended."""
    fields = _stat_fields(pid)
    return (int(fields[11]) + int(fields[12])) / TICKS_PER_SECOND if fields else 0.0


def private_mb(pid: int) -> float:
    """Return the memory of a process that no other process shares."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    sizes = re.findall(r"^Private_(?:Clean|Dirty): +(\d+)", text, re.MULTILINE)
    return sum(int(size) for size in sizes) / 1024


def _stat_fields(pid: int) -> list[str]:
    """Return the fields of /proc/PID/stat after the name, or an empty list without the process."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return []
    return text.rpartition(")")[2].split()


def _parents() -> dict[int, int]:
    """Return the parent of each process of the machine."""
    pids = [int(folder.name) for folder in Path("/proc").iterdir() if folder.name.isdigit()]
    fields_by_pid = {pid: _stat_fields(pid) for pid in pids}
    return {pid: int(fields[1]) for pid, fields in fields_by_pid.items() if fields}


def _process_kind(pid: int) -> str:
    """Return the type of a Chromium process from its command line."""
    try:
        command = Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""
    match = re.search(r"--type=([\w-]+)", command)
    return match[1] if match else ""


def _read_debugging_address(file: Path) -> tuple[int, str]:
    """Wait for the file that Chromium writes; return the port and the path of its WebSocket."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        lines = file.read_text().split() if file.exists() else []
        if len(lines) == 2:
            return int(lines[0]), lines[1]
        time.sleep(0.02)
    raise RuntimeError(f"Chromium has not opened its debugging port after {START_SECONDS:g} s")
