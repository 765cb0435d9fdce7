"""Measure processor time, memory and time to the first price of the page; write PAGE.md.

Run with `make bench-page MINUTES=10`. Exchanges, gateway and browser are processes of this machine
and share its cores. With `--load`, run only one of the loads and do not write the report.
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
from benchmarks.devtools import TICKS_PER_SECOND, Chromium, DevTools, cpu_seconds, private_mb
from benchmarks.figures import Figure, figure_table, number, table
from benchmarks.servers import Sandbox, Server, Servers
from benchmarks.stream import metric
from config import EXCHANGES

WIDTH = 1440
HEIGHT = 900
SYMBOLS = [f"F{number:04d}/USDT" for number in range(1, 101)]  # on all simulated exchanges
PUSH_MS = 50
OPENINGS = 5  # of the page, at a gateway without and with subscriptions
SETTLE_SECONDS = 10.0  # until one-time work after the start is done
PRICES_SECONDS = 60.0  # until all prices are shown, on a busy machine
MAX_MINUTES = 240.0
PRICE_CELLS = "td[data-cell=last]"  # one per symbol and exchange
SENT = "stream_messages_sent_total"
CONFLATED = "stream_conflated_total"

# Targets.
MAX_CORES = 0.25
MAX_MB = 60.0
MAX_FIRST_PRICE_SECONDS = 1.0

# A price in the table is drawn with the next frame. The task after that frame notes the time.
OBSERVER = f"""
(() => {{
  const countPrices = () => [...document.querySelectorAll("{PRICE_CELLS}")]
    .filter((cell) => /\\d/.test(cell.textContent)).length;
  globalThis.countPrices = countPrices;
  const observer = new MutationObserver(() => {{
    if (!countPrices()) return;
    observer.disconnect();
    requestAnimationFrame(() => setTimeout(() => {{
      globalThis.firstPriceTime = performance.now();
    }}));
  }});
  observer.observe(document, {{ subtree: true, childList: true, characterData: true }});
}})();
"""
METHOD = f"""\
The page shows {len(SYMBOLS)} symbols in a window of {WIDTH}x{HEIGHT}. The simulated exchanges push
each symbol every {PUSH_MS} ms; bybit pushes prices separately from its best bid and ask. Chromium
runs without a window and without a graphics processor, so the processor time includes drawing. No
DevTools events are enabled during the measurement (`devtools.py`). Exchanges, gateway and browser
share the cores of this machine. If the others cannot keep up, the page has less to do, so the
details contain what the gateway really sent, from its own metrics.

Processor time comes from the counters of the operating system, over {{minutes}} minutes, for the
process that runs and draws the page and for all processes of the browser; 1 is one core. Memory is
the private memory of the page's process at the end, with that of an empty page in the details. The
JavaScript heap is measured after garbage collection. The time to the first price runs from the
start of the navigation, with an empty browser cache, until the frame after the first price is
drawn. It is measured {OPENINGS} times at a gateway that has just started and has only its market
lists, and {OPENINGS} times at a gateway that already receives all symbols.
"""


class Load(NamedTuple):
    """The exchanges whose symbols the page shows."""

    title: str
    exchanges: tuple[str, ...]


LOADS = {
    "one": Load(f"{len(SYMBOLS)} symbols of one exchange", ("binance",)),
    "three": Load(f"{len(SYMBOLS)} symbols of three exchanges", EXCHANGES),
}


class ProcessorTime(NamedTuple):
    """Processor time in seconds, or in cores when divided by the elapsed time."""

    page: float  # the process that runs and draws the page
    browser: float  # all processes of Chromium
    gateway: float
    machine: float  # all processes of the machine


class PageUsage(NamedTuple):
    """The result of a page that was open for some minutes."""

    cores: ProcessorTime
    sent_rate: float  # updates per second to the page
    conflated_rate: float  # updates per second that newer ones replaced before they were sent
    heap_mb: tuple[float, float]  # at the beginning and at the end
    private_mb: tuple[float, float]  # at the beginning and at the end
    prices: int  # shown in the table


Result = tuple[Sequence[Figure], Sequence[Figure]]  # figures with targets, details


def start_gateway(servers: Servers, sandbox: Sandbox, load: Load) -> Server:
    """Start a gateway with the exchanges of the load, and wait for their market lists."""
    settings = {f"{name.upper()}_ENABLED": str(name in load.exchanges) for name in EXCHANGES}
    settings |= {
        "STREAM_MAX_TOPICS": "1000",
        "STREAM_MAX_SUBSCRIPTIONS": "1000",
        "DASHBOARD_SYMBOLS": ",".join(SYMBOLS),
    }
    server = servers.gateway(sandbox, settings, wait=False)

    def has_markets(status: int, body: bytes) -> bool:
        if status != 200:
            return False
        exchanges = orjson.loads(body)
        return all(exchanges[name]["markets"]["count"] for name in load.exchanges)

    servers.wait(f"{server.url}/exchanges", has_markets)
    return server


def wait_for_value(page: DevTools, expression: str, minimum: float) -> float:
    """Wait until a JavaScript value reaches the minimum; return the last value in any case."""
    deadline = time.monotonic() + PRICES_SECONDS
    while True:
        value = float(page.evaluate(expression) or 0)
        if value >= minimum or time.monotonic() > deadline:
            return value
        time.sleep(0.1)


def first_price_seconds(chromium: Chromium, server: Server) -> float:
    """Open and close the page; return the time until it has shown a price."""
    with chromium.page(OBSERVER) as page:
        page.call("Page.navigate", url=f"{server.url}/")
        milliseconds = wait_for_value(page, "globalThis.firstPriceTime", 0.001)
    if not milliseconds:
        raise RuntimeError(f"the page has shown no price after {PRICES_SECONDS:g} s")
    return milliseconds / 1000


def measure_empty_page(chromium: Chromium) -> tuple[float, float]:
    """Return the private memory and the JavaScript heap of an empty page in MB."""
    before = chromium.cpu_seconds()
    with chromium.page() as page:
        page.call("Page.navigate", url="about:blank#empty")
        heap = page.heap_mb()
        return private_mb(chromium.find_renderer(before)), heap


def processor_time(chromium: Chromium, renderer: int, server: Server) -> ProcessorTime:
    """Return the processor time since the start of each process."""
    by_process = chromium.cpu_seconds()
    ticks = [int(field) for field in Path("/proc/stat").read_text().split()[1:9]]
    user, nice, system, _idle, _iowait, irq, softirq, steal = ticks
    busy_ticks = user + nice + system + irq + softirq + steal
    return ProcessorTime(
        page=by_process[renderer],
        browser=sum(by_process.values()),
        gateway=cpu_seconds(server.process.pid),
        machine=busy_ticks / TICKS_PER_SECOND,
    )


def measure_open_page(chromium: Chromium, server: Server, load: Load, seconds: float) -> PageUsage:
    """Open the page for some time without any access to it, and return what it used."""
    processes_before = chromium.cpu_seconds()
    with chromium.page(OBSERVER) as page:
        page.call("Page.navigate", url=f"{server.url}/")
        expected_prices = len(SYMBOLS) * len(load.exchanges)
        prices = wait_for_value(page, "globalThis.countPrices?.()", expected_prices)
        time.sleep(SETTLE_SECONDS)
        if page.evaluate("document.visibilityState") != "visible":
            raise RuntimeError("the page is hidden, so the browser does not draw it")
        renderer = chromium.find_renderer(processes_before)
        heap_before = page.heap_mb()
        private_before = private_mb(renderer)
        time.sleep(1)
        sent_before = metric(server, SENT)
        conflated_before = metric(server, CONFLATED)
        time_before = processor_time(chromium, renderer, server)
        began = time.time()
        time.sleep(seconds)
        elapsed = time.time() - began
        time_after = processor_time(chromium, renderer, server)
        sent = metric(server, SENT) - sent_before
        conflated = metric(server, CONFLATED) - conflated_before
        heap_after = page.heap_mb()
        private_after = private_mb(renderer)
    used = zip(time_after, time_before, strict=True)
    return PageUsage(
        cores=ProcessorTime(*((after - before) / elapsed for after, before in used)),
        sent_rate=sent / elapsed,
        conflated_rate=conflated / elapsed,
        heap_mb=(heap_before, heap_after),
        private_mb=(private_before, private_after),
        prices=int(prices),
    )


def measure(load: Load, minutes: float) -> Result:
    """Measure one load; return the figures with targets and the details."""
    with Servers() as servers:
        sandbox = servers.sandbox(len(SYMBOLS))
        for name in load.exchanges:
            sandbox.set(name, push_ms=PUSH_MS, rate_limit=-1)
        chromium = Chromium(servers, WIDTH, HEIGHT)
        empty_private, empty_heap = measure_empty_page(chromium)
        cold_seconds = []
        server = start_gateway(servers, sandbox, load)
        cold_seconds.append(first_price_seconds(chromium, server))
        for _ in range(OPENINGS - 1):
            servers.stop(server)
            server = start_gateway(servers, sandbox, load)
            cold_seconds.append(first_price_seconds(chromium, server))
        time.sleep(SETTLE_SECONDS)
        warm_seconds = [first_price_seconds(chromium, server) for _ in range(OPENINGS)]
        usage = measure_open_page(chromium, server, load, minutes * 60)
    targets = [
        ("processor time of the page", [usage.cores.page], "cores", MAX_CORES),
        ("memory of the page", [usage.private_mb[1]], "MB", MAX_MB),
        ("first price, gateway just started", cold_seconds, "s", MAX_FIRST_PRICE_SECONDS),
        ("first price, gateway with streams", warm_seconds, "s", MAX_FIRST_PRICE_SECONDS),
    ]
    figures = [
        Figure(name, values, unit, maximum, lower_is_better=True)
        for name, values, unit, maximum in targets
    ]
    empty_page = [
        Figure("memory of an empty page", [empty_private], "MB"),
        Figure("JavaScript heap of an empty page", [empty_heap], "MB"),
    ]
    return figures, usage_details(load, usage) + empty_page


def usage_details(load: Load, usage: PageUsage) -> list[Figure]:
    """Return the details of an open page."""
    pushed = len(SYMBOLS) * len(load.exchanges) * 1000 / PUSH_MS
    details = [
        ("prices shown", usage.prices, "cells"),
        ("pushed by the exchanges, at least", pushed, "updates/s"),
        ("sent to the page", usage.sent_rate, "updates/s"),
        ("conflated for the page", usage.conflated_rate, "updates/s"),
        ("processor time of the page per update", usage.cores.page * 1e6 / usage.sent_rate, "µs"),
        ("processor time of all of Chromium", usage.cores.browser, "cores"),
        ("processor time of the gateway", usage.cores.gateway, "cores"),
        (f"processor time of the machine, of {os.cpu_count()}", usage.cores.machine, "cores"),
        ("memory of the page at the beginning", usage.private_mb[0], "MB"),
        ("JavaScript heap at the beginning", usage.heap_mb[0], "MB"),
        ("JavaScript heap at the end", usage.heap_mb[1], "MB"),
    ]
    return [Figure(name, [value], unit) for name, value, unit in details]


def report(results: Mapping[str, Result], minutes: float) -> str:
    """Return the report as Markdown. `results` has the names of `LOADS`."""
    lines = [
        "# Page\n",
        f"Generated by `make bench-page MINUTES={minutes:g}` on",
        f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC, on {machine()}.\n",
        METHOD.format(minutes=f"{minutes:g}"),
    ]
    for name, (figures, _) in results.items():
        lines += [f"## {LOADS[name].title}\n", figure_table(figures)]
    titles = [LOADS[name].title for name in results]
    rows = [
        [figures[0].name, figures[0].unit, *(number(figure.median) for figure in figures)]
        for figures in zip(*(details for _, details in results.values()), strict=True)
    ]
    lines += ["## Details\n", table(["figure", "unit", *titles], rows)]
    return "\n".join(lines)


def parse_minutes(text: str) -> float:
    """Parse the option `--minutes`."""
    minutes = float(text)
    if not 0 < minutes <= MAX_MINUTES:
        raise argparse.ArgumentTypeError(
            f"{text} is invalid: expected minutes above 0, at most {MAX_MINUTES:g}"
        )
    return minutes


def main() -> int:
    """Measure, print and write the report; return the exit code."""
    parser = argparse.ArgumentParser(description="Measure the cost of the page for a browser.")
    parser.add_argument("--minutes", type=parse_minutes, default=10.0, help="duration of each load")
    parser.add_argument("--load", choices=LOADS, help="run only this load")
    options = parser.parse_args()
    names = [options.load] if options.load else list(LOADS)
    results = {name: measure(LOADS[name], options.minutes) for name in names}
    text = report(results, options.minutes)
    print(text)
    if not options.load:
        (FOLDER / "PAGE.md").write_text(text)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
