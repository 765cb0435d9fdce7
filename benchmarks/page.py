"""What the page costs a browser: processor time, memory, and how long until it shows prices; writes PAGE.md.

`make bench-page MINUTES=10`. Exchanges, gateway and browser are processes of this machine and share its cores.
`--load` runs one of the loads and only prints.
"""

import argparse
import os
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import orjson

from benchmarks.bench import FOLDER, machine
from benchmarks.devtools import TICKS, Chromium, DevTools, cpu_seconds, private_mb
from benchmarks.figures import COLUMNS, Figure, number, table
from benchmarks.servers import Sandbox, Server, Servers
from benchmarks.stream import metric
from config import EXCHANGES

WIDTH, HEIGHT = 1440, 900
SYMBOLS = [f"F{number:04d}/USDT" for number in range(1, 101)]  # listed by all simulated exchanges alike
PUSH_MS = 50
OPENINGS = 5  # of the page, at a gateway that has just started and at one that is watched
SETTLE_SECONDS = 10.0  # until what is made once is made
PATIENCE = 60.0  # until every price is there, on a machine that has much to do
MOST_MINUTES = 240.0
PRICES = "td[data-cell=last]"  # one for each symbol at each exchange
MUST_CORES, MUST_MB, MUST_SECONDS = 0.25, 60.0, 1.0
# When a price stands in the table, it is shown with the next picture: a task after that picture's frame tells the time.
WATCH = f"""
(() => {{
  const shown = () => [...document.querySelectorAll("{PRICES}")].filter((cell) => /\\d/.test(cell.textContent)).length;
  globalThis.pricesShown = shown;
  const observer = new MutationObserver(() => {{
    if (!shown()) return;
    observer.disconnect();
    requestAnimationFrame(() => setTimeout(() => {{ globalThis.firstPicture = performance.now(); }}));
  }});
  observer.observe(document, {{ subtree: true, childList: true, characterData: true }});
}})();
"""
METHOD = f"""The page shows {len(SYMBOLS)} symbols in a window of {WIDTH}x{HEIGHT}; the simulated exchanges push each of
them every {PUSH_MS} ms, bybit its prices and its best bid and ask by themselves. Chromium has no window and no graphics
processor, so that it draws by the processor, which is counted; nothing of the page is reported to anybody while it is
measured (`devtools.py`). Exchanges, gateway and browser share the cores of this machine, and the page has less to do
where the others cannot keep up: what the gateway really sent is told beside, by its own counters.

Processor time is that of the process which runs and draws the page, and of all of the browser's processes, from the
system's counters, over {{minutes}} minutes; 1 is one core. Memory is what that process has to itself at the end; what
an empty page's has is told beside. The JavaScript heap is what is in use of it without its garbage. A first picture is
there when the frame after the first price is done, from the start of the navigation, without anything in the browser's
cache: {OPENINGS} times at a gateway that has just started and has only its lists of markets, and {OPENINGS} times at
one that is pushed all of this already.
"""


class Load(NamedTuple):
    """What is pushed to the page."""

    title: str
    exchanges: tuple[str, ...]


LOADS = {
    "one": Load(f"{len(SYMBOLS)} symbols of one exchange", ("binance",)),
    "three": Load(f"{len(SYMBOLS)} symbols of three exchanges", EXCHANGES),
}


class Spent(NamedTuple):
    """Processor time in seconds, or what it is a second of: cores."""

    page: float  # of the process that runs and draws the page
    browser: float  # of all processes of Chromium
    gateway: float
    machine: float  # of everything


class TopicState(NamedTuple):
    """What became of a page that was open for a while."""

    cores: Spent
    updates: float  # a second, that were sent to it
    conflated: float  # a second, that were left out, as newer ones came before the page took them
    heap_mb: tuple[float, float]  # at the beginning and at the end
    private_mb: tuple[float, float]
    prices: int  # that were shown


def gateway(servers: Servers, sandbox: Sandbox, load: Load) -> Server:
    """Start a gateway that knows only these exchanges, and wait for their lists of markets."""
    settings = {f"{name.upper()}_ENABLED": str(name in load.exchanges) for name in EXCHANGES}
    settings |= {"STREAM_MAX_TOPICS": "1000", "STREAM_MAX_SUBSCRIPTIONS": "1000"}
    server = servers.gateway(sandbox, settings | {"DASHBOARD_SYMBOLS": ",".join(SYMBOLS)}, wait=False)

    def loaded(status: int, body: bytes) -> bool:
        told = orjson.loads(body) if status == 200 else {}
        return bool(told) and all(told[name]["markets"]["count"] for name in load.exchanges)

    servers.wait(f"{server.url}/exchanges", loaded)
    return server


def wait(page: DevTools, expression: str, least: float = 1) -> float:
    """Ask the page until this is large enough; returns what it is, also when it never was."""
    deadline = time.monotonic() + PATIENCE
    while (found := float(page.evaluate(expression) or 0)) < least and time.monotonic() < deadline:
        time.sleep(0.1)
    return found


def first_picture(chromium: Chromium, server: Server) -> float:
    """Open the page and close it again; returns the seconds until it showed a price."""
    with chromium.page(WATCH) as page:
        page.ask("Page.navigate", url=f"{server.url}/")
        if not (found := wait(page, "globalThis.firstPicture", 0.001)):
            raise RuntimeError("the page shows no price")
    return found / 1000


def empty(chromium: Chromium) -> tuple[float, float]:
    """Return the memory of a process with an empty page: its own, and its JavaScript heap."""
    before = chromium.spent()
    with chromium.page() as page:
        page.ask("Page.navigate", url="about:blank#empty")
        heap = page.heap_mb()
        return private_mb(chromium.renderer(before)), heap


def spent(chromium: Chromium, renderer: int, server: Server) -> Spent:
    """Return the processor time that was spent so far."""
    by_process = chromium.spent()
    user, nice, system, _, _, *more = (int(ticks) for ticks in Path("/proc/stat").read_text().split()[1:9])
    whole = (user + nice + system + sum(more)) / TICKS
    return Spent(by_process[renderer], sum(by_process.values()), cpu_seconds(server.process.pid), whole)


def watch(chromium: Chromium, server: Server, load: Load, seconds: float) -> TopicState:
    """Have the page open for so long, and let it alone meanwhile."""
    before = chromium.spent()
    with chromium.page(WATCH) as page:
        page.ask("Page.navigate", url=f"{server.url}/")
        prices = wait(page, "globalThis.pricesShown?.()", len(SYMBOLS) * len(load.exchanges))
        time.sleep(SETTLE_SECONDS)
        if page.evaluate("document.visibilityState") != "visible":
            raise RuntimeError("the page is not drawn")
        renderer = chromium.renderer(before)
        memory = [(page.heap_mb(), private_mb(renderer))]
        time.sleep(1)
        counters = "stream_messages_sent_total", "stream_conflated_total"
        counts, used, began = (
            [metric(server, name) for name in counters],
            spent(chromium, renderer, server),
            time.time(),
        )
        time.sleep(seconds)
        took, now = time.time() - began, spent(chromium, renderer, server)
        sent, conflated = (metric(server, name) - count for name, count in zip(counters, counts, strict=True))
        memory.append((page.heap_mb(), private_mb(renderer)))
    heap, private = zip(*memory, strict=True)
    cores = Spent(*((later - earlier) / took for later, earlier in zip(now, used, strict=True)))
    return TopicState(cores, sent / took, conflated / took, heap, private, int(prices))


def measure(load: Load, minutes: float) -> tuple[list[Figure], list[Figure]]:
    """Measure one load; returns the figures with targets, and what lies behind them."""
    with Servers() as servers:
        sandbox = servers.sandbox(len(SYMBOLS))
        for name in load.exchanges:
            sandbox.set(name, push_ms=PUSH_MS, rate_limit=-1)
        chromium = Chromium(servers, WIDTH, HEIGHT)
        bare_private, bare_heap = empty(chromium)
        cold = []
        for number in range(OPENINGS):
            server = gateway(servers, sandbox, load)
            cold.append(first_picture(chromium, server))
            if number < OPENINGS - 1:
                servers.end(server)
        time.sleep(SETTLE_SECONDS)
        warm = [first_picture(chromium, server) for _ in range(OPENINGS)]
        seen = watch(chromium, server, load, minutes * 60)
    figures = [
        Figure("processor time of the page", [seen.cores.page], "cores", MUST_CORES, lower=True),
        Figure("memory of the page", [seen.private_mb[1]], "MB", MUST_MB, lower=True),
        Figure("first picture, gateway just started", cold, "s", MUST_SECONDS, lower=True),
        Figure("first picture, gateway at work", warm, "s", MUST_SECONDS, lower=True),
    ]
    behind = [
        Figure("prices shown", [seen.prices], "cells"),
        Figure("pushed by the exchanges, at least", [len(SYMBOLS) * len(load.exchanges) * 1000 / PUSH_MS], "updates/s"),
        Figure("sent to it", [seen.updates], "updates/s"),
        Figure("left out, as newer ones came before they were taken", [seen.conflated], "updates/s"),
        Figure("processor time of the page, per update", [seen.cores.page * 1e6 / seen.updates], "µs"),
        Figure("processor time of all of Chromium", [seen.cores.browser], "cores"),
        Figure("processor time of the gateway", [seen.cores.gateway], "cores"),
        Figure(f"processor time of the whole machine, of {os.cpu_count()}", [seen.cores.machine], "cores"),
        Figure("memory of the page, at the beginning", [seen.private_mb[0]], "MB"),
        Figure("memory of an empty page", [bare_private], "MB"),
        Figure("JavaScript heap, at the beginning", [seen.heap_mb[0]], "MB"),
        Figure("JavaScript heap, at the end", [seen.heap_mb[1]], "MB"),
        Figure("JavaScript heap of an empty page", [bare_heap], "MB"),
    ]
    return figures, behind


def report(found: Mapping[str, tuple[Sequence[Figure], Sequence[Figure]]], minutes: float) -> str:
    """Write what was measured as Markdown."""
    lines = [
        "# Page\n",
        f"Written by `make bench-page MINUTES={minutes:g}` on {datetime.now(UTC):%Y-%m-%d %H:%M} UTC, on {machine()}.",
        "",
        METHOD.format(minutes=f"{minutes:g}"),
    ]
    for name, (figures, _) in found.items():
        lines += [f"## {LOADS[name].title}\n", table(COLUMNS, [figure.row() for figure in figures])]
    lines.append("## Behind them\n")
    names = [LOADS[name].title for name in found]
    rows = zip(*(behind for _, behind in found.values()), strict=True)
    lines.append(
        table(
            ["figure", "unit", *names],
            [[each[0].name, each[0].unit, *(number(figure.median) for figure in each)] for each in rows],
        )
    )
    return "\n".join(lines)


def bounded(text: str) -> float:
    """Read minutes that end some time."""
    if not 0 < (minutes := float(text)) <= MOST_MINUTES:
        raise argparse.ArgumentTypeError(f"must be above 0, and {MOST_MINUTES:g} at most")
    return minutes


def main() -> int:
    """Measure, print and write; returns the exit code."""
    parser = argparse.ArgumentParser(description="Measure what the page costs a browser.")
    parser.add_argument("--minutes", type=bounded, default=10.0, help="how long each load is watched")
    parser.add_argument("--load", choices=LOADS, help="only this one")
    options = parser.parse_args()
    found = {name: measure(LOADS[name], options.minutes) for name in ([options.load] if options.load else LOADS)}
    text = report(found, options.minutes)
    print(text)
    if not options.load:
        (FOLDER / "PAGE.md").write_text(text)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
