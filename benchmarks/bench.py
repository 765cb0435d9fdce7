"""How fast the gateway is, each figure beside a partner measured in turn with it; writes RESULTS.md and the plots.

`make bench`. Every server is one process, and only one of them is loaded at a time. `--quick` measures next to nothing
and only prints: it shows that all of it runs.
"""

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import uvloop
from redis import Redis

from benchmarks.figures import COLUMNS, Figure, chart, interleave, number, percentile, ratios, table
from benchmarks.load import CLIENT, Report, at_rate, drive, expect, one_by_one, zipf
from benchmarks.servers import LONG, NGINX, PATH, Sandbox, Servers, fetch, gateway_environment, nginx_same, warm

FOLDER = Path(__file__).parent
BARE, PLAIN, NAIVE = "benchmarks.bare:make --factory", "benchmarks.bare:make_fastapi --factory", "benchmarks.naive:app"
ALONE = "benchmarks.bare:make_app_alone --factory"
HIT, MISS, REDIS_HIT = "; hit; detail=memory", "; fwd=miss; stored", "; hit; detail=redis"
MIX_SYMBOLS, LATENCY_MS, START_MARKETS = 300, 80, 1500


@dataclass(frozen=True)
class Plan:
    """How much is measured."""

    pairs: int = 5
    seconds: float = 2  # of each load by wrk
    levels: Sequence[int] = (1, 2, 4, 8, 16, 32, 64, 128)  # connections
    level_rounds: int = 3
    sizes: Sequence[int] = (10, 100, 1000, 10_000)  # cached symbols
    calls: int = 10_000  # into the app, per pair
    requests: int = 500  # one by one, per pair
    misses: int = 12  # per pair
    rate: float = 200  # requests per second of the Zipf mix
    mix_seconds: float = 60
    warm_seconds: float = 60  # four default TTLs of a ticker: by then nearly every symbol was asked for


QUICK = Plan(1, 1, (1, 8), 1, (10, 100), 500, 20, 2, 100, 2, 1)


@dataclass
class Results:
    """What was measured: figures, what lies behind them, how it was done, and plots by file name."""

    figures: list[Figure] = field(default_factory=list)
    behind: list[Figure] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    plots: dict[str, str] = field(default_factory=dict)


def hits(plan: Plan, results: Results) -> None:
    """Memory hits over HTTP: beside every partner at 32 connections, and beside the bare server at one and at more."""
    with Servers() as servers:
        sandbox = servers.sandbox()
        gateway = servers.gateway(sandbox, LONG)
        same = servers.record(gateway)
        own = {"BENCH_REDIS": servers.redis(), **sandbox.settings}
        partners = {"gateway": gateway, "bare uvicorn": servers.partner(BARE, same)}
        alone = servers.uvicorn(ALONE, gateway_environment(sandbox, LONG))
        servers.wait_for_markets(alone)
        partners["gateway without its fast path"] = alone
        partners |= {"plain FastAPI": servers.partner(PLAIN, same), "naive design": servers.partner(NAIVE, own)}
        if NGINX:
            partners["nginx"] = servers.nginx(nginx_same(same), PATH)
        urls = {name: server.url + PATH for name, server in partners.items()}
        both = {name: urls[name] for name in ("gateway", "bare uvicorn")}
        interleave(_loads(urls, 32, 1), 1)  # warms them
        at_32 = interleave(_loads(urls, 32, plan.seconds), plan.pairs)
        at_1 = interleave(_loads(both, 1, plan.seconds), plan.pairs)
        levels = [interleave(_loads(both, level, 1), plan.level_rounds) for level in plan.levels]
        gateway.check_hits(misses=1)
    rates = {name: [report.rate for report in reports] for name, reports in at_32.items()}
    targets = {"bare uvicorn": (0.70, 0.85), "nginx": (None, None)}
    for name in list(rates)[1:]:
        title = f"memory hit, 32 connections: requests/s against {name}"
        results.figures.append(Figure(title, ratios(rates["gateway"], rates[name]), "x", *targets.get(name, (5, 8))))
    p50s = {name: [report.p50 for report in reports] for name, reports in at_1.items()}
    slower = ratios(p50s["gateway"], p50s["bare uvicorn"])
    title = "memory hit, one connection: p50 against bare uvicorn"
    results.figures.append(Figure(title, slower, "x", 1.25, 1.10, lower=True))
    for name in list(rates)[2:5]:  # what nothing under uvicorn can exceed
        title = f"bare uvicorn against {name}, 32 connections"
        results.behind.append(Figure(title, ratios(rates["bare uvicorn"], rates[name])))
    results.behind += [Figure(f"{name}, 32 connections", values, "requests/s") for name, values in rates.items()]
    results.behind += [Figure(f"{name}, one connection: p50", values, "ms") for name, values in p50s.items()]
    results.notes.append(
        f"Memory hits: `GET {PATH}`, {plan.pairs} rounds of {plan.seconds:g} s per server. bare uvicorn, plain FastAPI "
        "(one route with the same parameters, no middleware) and nginx repeat one recorded answer, the naive design "
        "(`naive.py`) sends its own, and the gateway without its fast path is the app alone. The curves over "
        f"connections are medians of {plan.level_rounds} rounds of 1 s."
    )
    each = {name: f"{1e6 / statistics.median(values):.1f} µs with {name}" for name, values in rates.items()}
    results.notes.append(
        f"What bounds these ratios: at 32 connections a request takes {', '.join(each.values())}. A gateway that took "
        "no time at all would be as fast as bare uvicorn, and so much faster than the others as the lines above tell."
    )
    for file, title, unit, of in (
        ("throughput.svg", "Throughput of memory hits", "requests/s", "rate"),
        ("p99.svg", "99th percentile of memory hits", "p99 (ms)", "p99"),
    ):
        lines = {
            name: [statistics.median(getattr(one, of) for one in found[name]) for found in levels] for name in both
        }
        results.plots[file] = chart(title, "connections", unit, plan.levels, lines, log=True)


def _loads(urls: dict[str, str], connections: int, seconds: float) -> dict[str, partial[Report]]:
    return {name: partial(drive, url, connections, seconds) for name, url in urls.items()}


def inside(plan: Plan, results: Results) -> None:
    """The time inside the ASGI app, without sockets."""
    with Servers() as servers:
        sandbox = servers.sandbox()
        gateway = servers.gateway(sandbox, LONG)
        same = servers.record(gateway)
        servers.end(gateway)
        environment = {**os.environ, **gateway_environment(sandbox, LONG), **same}
        command = [sys.executable, "-m", "benchmarks.inside", str(plan.pairs), str(plan.calls)]
        measured = json.loads(subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True).stdout)
    for at, (name, must, aim) in enumerate((("P50", 0.025, 0.010), ("P99", 0.080, None))):
        own, bare = ([pair[at] for pair in measured[side]] for side in ("gateway", "bare"))
        results.figures.append(Figure(f"memory hit, inside the ASGI app: {name}", own, "ms", must, aim, lower=True))
        results.behind.append(Figure(f"bare app, inside: {name}", bare, "ms"))
        results.behind.append(Figure(f"memory hit, inside: {name} against the bare app", ratios(own, bare)))
    parts = ", ".join(f"`{name}` {share:.0f} %" for name, share in measured["profile"])
    results.notes.append(
        f"Profile of a hit, inside, by each function's own time (cProfile, built-ins left out): {parts}."
    )
    results.notes.append(
        f"Inside: `await app(scope, receive, send)` of `src.api.app` in one process under uvloop, {plan.pairs} times "
        f"{plan.calls:,} calls, in turn with the bare app; garbage collection and the app's own tasks included."
    )


def redis_hits(plan: Plan, results: Results) -> None:
    """Answers that memory may not give, so that every one comes from Redis."""
    with Servers() as servers:
        settings = {"CACHE_MEMORY_TTL": "0.001", "TICKER_TTL_SECONDS": "3600", "REDIS_URL": servers.redis()}
        gateway = servers.gateway(servers.sandbox(), settings)
        bare = servers.partner(BARE, servers.record(gateway))
        time.sleep(0.1)  # Redis is written to beside the answer
        own, limit = (partial(_p50, *side, plan.requests) for side in ((gateway.url, REDIS_HIT), (bare.url, "")))
        found = interleave({"own": own, "bare": limit}, plan.pairs)
    results.figures.append(Figure("Redis hit, one connection: p50", found["own"], "ms", 3, 1, lower=True))
    slower = ratios(found["own"], found["bare"])
    results.behind.append(Figure("Redis hit, one connection: p50 against bare uvicorn", slower))
    results.notes.append(
        "Redis hits: `CACHE_MEMORY_TTL=0.001`, so memory is never fresh, while Redis always is; "
        f"{plan.pairs} times {plan.requests} requests one by one, and the `Cache-Status` of each is checked."
    )


def misses(plan: Plan, results: Results) -> None:
    """A memory hit against a miss, with the time a real exchange takes."""
    with Servers() as servers:
        sandbox = servers.sandbox()
        gateway = servers.gateway(sandbox, LONG)
        fetch(gateway.url + PATH)
        sandbox.set("bybit", latency_ms=LATENCY_MS)
        hit = partial(_p50, gateway.url, HIT, plan.requests)
        miss = partial(_p50, gateway.url, MISS, plan.misses, f"{PATH}?max_age=0")
        found = interleave({"hit": hit, "miss": miss}, plan.pairs)
    title = f"memory hit against a miss at {LATENCY_MS} ms upstream, one connection: p50"
    results.figures.append(Figure(title, ratios(found["miss"], found["hit"]), "x", 315, 600))
    results.behind += [Figure(f"memory {name}, one by one: p50", values, "ms") for name, values in found.items()]
    results.notes.append(
        f"Hit against miss: {plan.pairs} times {plan.requests} hits and {plan.misses} misses (`max_age=0`) one by one, "
        "without Redis; the `Cache-Status` of each is checked."
    )


def _p50(url: str, cache: str, count: int, path: str = PATH) -> float:
    return percentile([answer.seconds * 1000 for answer in expect(one_by_one(url, [path] * count), cache)], 0.50)


def mix(plan: Plan, results: Results) -> None:
    """The share of hits when some symbols are asked for far more often than others; all settings at their defaults."""
    paths = [f"/ticker/F{rank:04d}/USDT" for rank in range(1, MIX_SYMBOLS + 1)]
    begin = int(plan.rate * plan.warm_seconds)
    asked = zipf(paths, begin + int(plan.rate * plan.mix_seconds))
    with Servers() as servers:
        gateway = servers.gateway(servers.sandbox(MIX_SYMBOLS), {"REDIS_URL": servers.redis()})
        uvloop.run(at_rate(gateway.url, asked[:begin], plan.rate))
        before = gateway.results()
        answers = expect(uvloop.run(at_rate(gateway.url, asked[begin:], plan.rate)), "")
        counted = gateway.results() - before
    told, metric = sum(answer.is_hit for answer in answers), counted.total() - counted["miss"] - counted["coalesced"]
    if (told, len(answers)) != (metric, counted.total()):
        raise RuntimeError(f"the headers tell of {told} hits in {len(answers)}, the metric of {counted}")
    parts: list[list[bool]] = [[] for _ in range(5)]
    for answer in answers:
        parts[min(4, int(answer.at * 5 / plan.mix_seconds))].append(answer.is_hit)
    title = f"hit rate, Zipf mix of {MIX_SYMBOLS} symbols at {plan.rate:g} requests/s"
    results.figures.append(Figure(title, [100 * statistics.fmean(part) for part in parts], "%", 90, 99))
    results.notes.append(
        f"Hit rate: exponent 1.0, {plan.rate:g} requests/s for {plan.mix_seconds:g} s after {plan.warm_seconds:g} s of "
        "the same; default settings (a ticker is fresh for 15 s), with Redis; the values are those of five equal parts "
        f"of it. By `Cache-Status`: {told:,} hits in {len(answers):,}; `virtuoso_cache_requests_total` counted as many."
    )


def symbols(plan: Plan, results: Results) -> None:
    """Throughput over the number of cached symbols, all of them visited in a spread order."""
    least, most = min(plan.sizes), max(plan.sizes)
    names = [f"F{rank:04d}/USDT" for rank in range(1, most + 1)]
    random.Random(1).shuffle(names)
    # binance has a call for a list of symbols; bybit and kraken would send all they have for every batch.
    settings = {**LONG, "CACHE_MEMORY_SIZE": "20000", "EXCHANGE_ORDER": "binance"}
    with Servers() as servers:
        sandbox, sides = servers.sandbox(most), {}
        gateways = {size: servers.gateway(sandbox, settings) for size in plan.sizes}
        for size, gateway in gateways.items():
            warm(gateway, names[:size])
            paths = servers.folder / f"paths-{size}"
            paths.write_text("".join(f"/ticker/{name}\n" for name in names[:size]))
            sides[f"{size:,} cached symbols"] = partial(drive, gateway.url, 32, plan.seconds, paths)
        interleave(sides, 1)  # each symbol's first request goes through the framework
        found = interleave(sides, plan.pairs)
        for size, gateway in gateways.items():
            gateway.check_hits(misses=size)
    rates = {size: [one.rate for one in of] for size, of in zip(plan.sizes, found.values(), strict=True)}
    title = f"throughput at {most:,} cached symbols against {least}"
    results.figures.append(Figure(title, ratios(rates[most], rates[least]), "x", 0.9, 0.97))
    results.behind += [Figure(f"{size:,} cached symbols", rates[size], "requests/s") for size in plan.sizes]
    line = {"gateway": [statistics.median(rates[size]) for size in plan.sizes]}
    title = "Throughput over cached symbols"
    results.plots["symbols.svg"] = chart(title, "cached symbols", "requests/s", plan.sizes, line, log=True)
    results.notes.append(
        f"Cached symbols: a gateway for each number, `CACHE_MEMORY_SIZE=20000`; 32 connections, {plan.pairs} rounds of "
        f"{plan.seconds:g} s, all symbols in one shuffled order, the same client script for every number."
    )


def starts(plan: Plan, results: Results) -> None:
    """The time from the start of the process to its first answers, without and with a market snapshot in Redis."""
    with Servers() as servers:
        sandbox, redis = servers.sandbox(START_MARKETS), servers.redis()
        without, snapshot = (partial(_start, servers, sandbox, redis, flush=flush) for flush in (True, False))
        without()  # what Python has to compile is compiled once
        found = interleave({"without snapshot": without, "with snapshot": snapshot}, plan.pairs)
    for name, times in found.items():
        for what, unit, values in zip(
            ("process start to /health/live", "process start to the first ticker", "RSS then"),
            ("s", "s", "MB"),
            zip(*times, strict=True),
            strict=True,
        ):
            results.figures.append(Figure(f"{what}, {name}", values, unit))
    results.notes.append(
        f"Start: {START_MARKETS:,} markets more than usual on each of three exchanges; the first ticker is asked for "
        "with `max_age=0`, so that it comes from an exchange; a snapshot is what an earlier process left in Redis."
    )


def _start(servers: Servers, sandbox: Sandbox, redis: str, *, flush: bool) -> tuple[float, float, float]:
    """Return the seconds to /health/live and to the first ticker, and the memory then."""
    if flush:
        Redis.from_url(redis).flushall()
    began = time.perf_counter()
    gateway = servers.gateway(sandbox, {"REDIS_URL": redis}, wait=False)
    servers.wait(f"{gateway.url}/health/live")
    live = time.perf_counter() - began
    servers.wait(f"{gateway.url}{PATH}?max_age=0")
    first, memory = time.perf_counter() - began, gateway.rss_mb()
    servers.wait_for_markets(gateway)  # so that all of them are in Redis for the next one
    servers.end(gateway)
    return live, first, memory


SECTIONS = {part.__name__: part for part in (hits, inside, redis_hits, misses, mix, symbols, starts)}


def report(results: Results, seconds: float) -> str:
    """Write all of it as Markdown."""
    missed = [
        f"- missed: {figure.name} is {number(figure.median)} {figure.unit}, and must be at "
        f"{'most' if figure.lower else 'least'} {number(figure.must or 0)} {figure.unit}."
        for figure in results.figures
        if figure.verdict == "missed"
    ]
    lines = [
        "# Results\n",
        "Written by `make bench`, not by hand. Each figure is the median of values measured in turn with its partner's",
        "(least and greatest beside it); `x` is a ratio, ours divided by theirs.\n",
        f"Measured on {datetime.now(UTC):%Y-%m-%d %H:%M} UTC in {seconds / 60:.1f} minutes, on {machine()}, {CLIENT}.",
        "Client and servers share the cores. Each server is one process on loopback (uvicorn with uvloop and",
        "httptools, no access log; nginx with one worker), and one of them is loaded at a time. To measure again:\n",
        "```sh\nmake ci-deps   # optional, as root: wrk and nginx\nmake bench\n```\n",
        table(COLUMNS, [figure.row() for figure in results.figures]),
        *(missed or ["Nothing that has a target was missed."]),
        "\n## What lies behind\n",
        table(COLUMNS[:5], [figure.row()[:5] for figure in results.behind]),
        *(f"![{Path(file).stem}]({file})\n" for file in results.plots),
        "## How it was done\n",
        *(f"- {note}" for note in results.notes),
    ]
    return "\n".join(lines) + "\n"


def machine() -> str:
    """Describe what it runs on."""
    told = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    model = told[0].split(":", 1)[1].strip() if told else platform.machine()
    return f"{os.cpu_count()} cores ({model}), Python {platform.python_version()}"


def main() -> None:
    """Measure section by section, print the report, and write it if it is a whole one."""
    parser = argparse.ArgumentParser(description="Measure the gateway beside its partners.")
    parser.add_argument("--quick", action="store_true", help="next to nothing of each, only to see that it runs")
    parser.add_argument("--only", choices=SECTIONS, action="append", help="only this section")
    parser.add_argument("--out", type=Path, help="write to this folder, even if it is not a whole report")
    options = parser.parse_args()
    results, began = Results(), time.monotonic()
    for name in options.only or SECTIONS:
        print(f"{time.monotonic() - began:4.0f} s: {name}", file=sys.stderr, flush=True)
        SECTIONS[name](QUICK if options.quick else Plan(), results)
    text = report(results, time.monotonic() - began)
    print(text)
    folder = options.out or (None if options.quick or options.only else FOLDER)
    if folder is not None:
        for file, content in {**results.plots, "RESULTS.md": text}.items():
            (folder / file).write_text(content)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
