"""Compare the gateway with other designs; write RESULTS.md and the charts.

Run with `make bench`. Each server is one process, and only one of them is loaded at a time. With
`--quick`, each measurement is as short as possible, which only shows that everything runs.
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
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

import uvloop
from redis import Redis

from benchmarks.figures import (
    VALUE_COLUMNS,
    Figure,
    chart,
    figure_table,
    interleave,
    number,
    percentile,
    ratios,
)
from benchmarks.load import CLIENT, Report, Response, at_rate, drive, expect, one_by_one, zipf
from benchmarks.servers import (
    LONG_TTL_SETTINGS,
    NGINX,
    PATH,
    Sandbox,
    Server,
    Servers,
    fetch,
    gateway_environment,
    nginx_response,
    warm,
)

FOLDER = Path(__file__).parent
BARE_APP = "benchmarks.bare:create_bare_app --factory"
FASTAPI_APP = "benchmarks.bare:create_fastapi_app --factory"
NAIVE_APP = "benchmarks.naive:app"
GATEWAY_WITHOUT_FAST_PATH = "benchmarks.bare:create_gateway_without_fast_path --factory"

# Parts of the `Cache-Status` header.
MEMORY_HIT = "; hit; detail=memory"
REDIS_HIT = "; hit; detail=redis"
MISS = "; fwd=miss; stored"

CONNECTIONS = 32
MIX_SYMBOLS = 300
MIX_PARTS = 5  # parts of the mix, each with its own hit rate
RAW_PATH = "/raw/bybit/v5/market/tickers?category=spot&symbol=BTCUSDT"
RAW_MISS_PATH = "/api/v3/time"  # of Binance; never cached
RAW_MISSES = 100  # per round
LATENCY_MS = 80  # of the simulated exchange in the comparison of hit and miss
START_MARKETS = 1500  # additional markets of each exchange
REDIS_WRITE_SECONDS = 0.1  # the gateway writes to Redis after it has responded


@dataclass(frozen=True)
class Plan:
    """How long and how often to measure."""

    rounds: int = 5
    seconds: float = 2  # of each load at full speed
    levels: Sequence[int] = (1, 2, 4, 8, 16, 32, 64, 128)  # connections
    level_rounds: int = 3
    sizes: Sequence[int] = (10, 100, 1000, 10_000)  # cached symbols
    calls: int = 10_000  # of the ASGI app, per round
    requests: int = 500  # one by one, per round
    misses: int = 12  # per round
    rate: float = 200  # requests per second of the Zipf mix
    mix_seconds: float = 60
    warm_seconds: float = 60  # four default TTLs of a ticker, after which most symbols are cached


QUICK = Plan(1, 1, (1, 8), 1, (10, 100), 500, 20, 2, 100, 2, 1)


@dataclass
class Results:
    """What the sections measured."""

    figures: list[Figure] = field(default_factory=list)  # with targets
    details: list[Figure] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # about the method
    charts: dict[str, str] = field(default_factory=dict)  # SVG by file name


Rounds = Mapping[str, Sequence[Report]]  # by name of the server


def measure_hits(plan: Plan, results: Results) -> None:
    """Measure memory hits over HTTP, beside all other servers."""
    with Servers() as servers:
        gateway, urls = _start_partners(servers)
        main_urls = {name: urls[name] for name in ("gateway", "bare uvicorn")}
        interleave(_loads(urls, CONNECTIONS, 1), 1)  # warm-up
        throughput = interleave(_loads(urls, CONNECTIONS, plan.seconds), plan.rounds)
        latency = interleave(_loads(main_urls, 1, plan.seconds), plan.rounds)
        levels = [
            interleave(_loads(main_urls, level, 1), plan.level_rounds) for level in plan.levels
        ]
        gateway.check_hits(misses=1)
    _add_throughput(throughput, results)
    _add_latency(latency, results)
    _add_level_charts(plan, levels, results)
    results.notes.append(
        f"Memory hits: `GET {PATH}`, {plan.rounds} rounds of {plan.seconds:g} s per server. Bare "
        "uvicorn, plain FastAPI (one route with the same parameters, no middleware) and nginx "
        "repeat one recorded response. The naive design (`naive.py`) sends its own. The gateway "
        "without its fast path is the FastAPI app alone. The charts over connections show medians "
        f"of {plan.level_rounds} rounds of 1 s."
    )
    times = [
        f"{1e6 / statistics.median(report.rate for report in reports):.1f} µs with {name}"
        for name, reports in throughput.items()
    ]
    results.notes.append(
        f"With {CONNECTIONS} connections, a request takes {', '.join(times)}, including the "
        "client. The gateway is faster than bare uvicorn, because it answers known requests "
        "without uvicorn's parser. The details contain the ratios of bare uvicorn to the others."
    )


def _start_partners(servers: Servers) -> tuple[Server, dict[str, str]]:
    """Start the gateway and the servers beside it; return the gateway and the URL of each."""
    sandbox = servers.sandbox()
    gateway = servers.gateway(sandbox, LONG_TTL_SETTINGS)
    recording = servers.record(gateway)
    without_fast_path = servers.uvicorn(
        GATEWAY_WITHOUT_FAST_PATH, gateway_environment(sandbox, LONG_TTL_SETTINGS)
    )
    servers.wait_for_markets(without_fast_path)
    naive_environment = {"BENCH_REDIS": servers.redis(), **sandbox.settings}
    partners = {
        "gateway": gateway,
        "bare uvicorn": servers.partner(BARE_APP, recording),
        "gateway without its fast path": without_fast_path,
        "plain FastAPI": servers.partner(FASTAPI_APP, recording),
        "naive design": servers.partner(NAIVE_APP, naive_environment),
    }
    if NGINX:
        partners["nginx"] = servers.nginx(nginx_response(recording), PATH)
    return gateway, {name: server.url + PATH for name, server in partners.items()}


def _loads(
    urls: Mapping[str, str], connections: int, seconds: float
) -> dict[str, Callable[[], Report]]:
    return {name: partial(drive, url, connections, seconds) for name, url in urls.items()}


def _add_throughput(reports: Rounds, results: Results) -> None:
    rates = {name: [report.rate for report in values] for name, values in reports.items()}
    targets = {"bare uvicorn": (2.0, 2.7), "nginx": (0.6, 0.9), "naive design": (10, 15)}
    for name in rates:
        if name != "gateway":
            title = f"memory hit, {CONNECTIONS} connections: requests/s against {name}"
            required, goal = targets.get(name, (8, 12))
            values = ratios(rates["gateway"], rates[name])
            results.figures.append(Figure(title, values, "x", required, goal))
    p99s = {name: [report.p99 for report in values] for name, values in reports.items()}
    title = f"memory hit, {CONNECTIONS} connections: P99 against bare uvicorn"
    values = ratios(p99s["gateway"], p99s["bare uvicorn"])
    results.figures.append(Figure(title, values, "x", 0.8, 0.5, lower_is_better=True))
    for name in ("gateway without its fast path", "plain FastAPI", "naive design"):
        title = f"bare uvicorn against {name}, {CONNECTIONS} connections"
        results.details.append(Figure(title, ratios(rates["bare uvicorn"], rates[name])))
    for name, values in rates.items():
        title = f"{name}, {CONNECTIONS} connections"
        results.details.append(Figure(title, values, "requests/s"))


def _add_latency(reports: Rounds, results: Results) -> None:
    p50s = {name: [report.p50 for report in values] for name, values in reports.items()}
    title = "memory hit, one connection: p50 against bare uvicorn"
    values = ratios(p50s["gateway"], p50s["bare uvicorn"])
    results.figures.append(Figure(title, values, "x", 0.8, 0.6, lower_is_better=True))
    for name, milliseconds in p50s.items():
        results.details.append(Figure(f"{name}, one connection: p50", milliseconds, "ms"))


def _add_level_charts(plan: Plan, levels: Sequence[Rounds], results: Results) -> None:
    for file, title, label, member in (
        ("throughput.svg", "Throughput of memory hits", "requests/s", "rate"),
        ("p99.svg", "99th percentile of memory hits", "p99 (ms)", "p99"),
    ):
        lines = {
            name: [
                statistics.median(getattr(report, member) for report in level[name])
                for level in levels
            ]
            for name in levels[0]
        }
        results.charts[file] = chart(title, "connections", label, plan.levels, lines, log=True)


def measure_inside(plan: Plan, results: Results) -> None:
    """Measure the time inside the ASGI app, without sockets."""
    with Servers() as servers:
        sandbox = servers.sandbox()
        gateway = servers.gateway(sandbox, LONG_TTL_SETTINGS)
        recording = servers.record(gateway)
        servers.stop(gateway)
        environment = gateway_environment(sandbox, LONG_TTL_SETTINGS) | recording
        command = [sys.executable, "-m", "benchmarks.inside", str(plan.rounds), str(plan.calls)]
        process = subprocess.run(
            command, env={**os.environ, **environment}, stdout=subprocess.PIPE, check=True
        )
    measured = json.loads(process.stdout)
    targets = (("p50", 0.025, 0.010), ("p99", 0.080, None))
    for index, (name, required, goal) in enumerate(targets):
        times = [values[index] for values in measured["gateway"]]
        bare_times = [values[index] for values in measured["bare"]]
        title = f"memory hit inside the ASGI app: {name}"
        results.figures.append(Figure(title, times, "ms", required, goal, lower_is_better=True))
        results.details += [
            Figure(f"bare app, inside: {name}", bare_times, "ms"),
            Figure(f"memory hit, inside: {name} against the bare app", ratios(times, bare_times)),
        ]
    shares = ", ".join(f"`{name}` {share:.0f} %" for name, share in measured["profile"])
    results.notes.append(
        f"Profile of a hit inside the app, by time of each function itself (cProfile, without "
        f"built-in functions): {shares}."
    )
    results.notes.append(
        "Inside: `await app(scope, receive, send)` of `src.api.app` in one process with uvloop, "
        f"{plan.rounds} rounds of {plan.calls:,} calls, in turn with the bare app. The times "
        "include garbage collection and the app's own tasks."
    )


def measure_redis_hits(plan: Plan, results: Results) -> None:
    """Measure hits in Redis, with a memory tier that is never fresh."""
    with Servers() as servers:
        settings = {
            "CACHE_MEMORY_TTL": "0.001",
            "TICKER_TTL_SECONDS": "3600",
            "REDIS_URL": servers.redis(),
        }
        gateway = servers.gateway(servers.sandbox(), settings)
        bare = servers.partner(BARE_APP, servers.record(gateway))
        time.sleep(REDIS_WRITE_SECONDS)
        sides = {
            "gateway": partial(_p50, gateway.url, REDIS_HIT, plan.requests),
            "bare": partial(_p50, bare.url, "", plan.requests),
        }
        p50s = interleave(sides, plan.rounds)
    results.figures.append(
        Figure("Redis hit, one connection: p50", p50s["gateway"], "ms", 3, 1, lower_is_better=True)
    )
    title = "Redis hit, one connection: p50 against bare uvicorn"
    results.details.append(Figure(title, ratios(p50s["gateway"], p50s["bare"])))
    results.notes.append(
        "Redis hits: with `CACHE_MEMORY_TTL=0.001` memory is never fresh, while Redis always is. "
        f"{plan.rounds} rounds of {plan.requests} requests one by one. The benchmark checks the "
        "`Cache-Status` of each response."
    )


def measure_misses(plan: Plan, results: Results) -> None:
    """Compare a memory hit with a miss, with the latency of a real exchange."""
    with Servers() as servers:
        sandbox = servers.sandbox()
        gateway = servers.gateway(sandbox, LONG_TTL_SETTINGS)
        fetch(gateway.url + PATH)
        sandbox.set("bybit", latency_ms=LATENCY_MS)
        sides = {
            "hit": partial(_p50, gateway.url, MEMORY_HIT, plan.requests),
            "miss": partial(_p50, gateway.url, MISS, plan.misses, f"{PATH}?max_age=0"),
        }
        p50s = interleave(sides, plan.rounds)
    title = f"memory hit against a miss with {LATENCY_MS} ms upstream, one connection: p50"
    results.figures.append(Figure(title, ratios(p50s["miss"], p50s["hit"]), "x", 315, 600))
    results.details += [
        Figure(f"memory {name}, one by one: p50", values, "ms") for name, values in p50s.items()
    ]
    results.notes.append(
        f"Hit against miss: {plan.rounds} rounds of {plan.requests} hits and {plan.misses} misses "
        "(`max_age=0`) one by one, without Redis. The benchmark checks the `Cache-Status` of each "
        "response."
    )


def _p50(url: str, cache_status: str, count: int, path: str = PATH) -> float:
    responses = expect(one_by_one(url, [path] * count), cache_status)
    return percentile([response.seconds * 1000 for response in responses], 0.50)


def measure_raw(plan: Plan, results: Results) -> None:
    """Compare raw hits with those of `/ticker`, and raw misses with the exchange itself."""
    with Servers() as servers:
        sandbox = servers.sandbox()
        gateway = servers.gateway(sandbox, LONG_TTL_SETTINGS)
        urls = {"ticker": gateway.url + PATH, "raw": gateway.url + RAW_PATH}
        sizes = {name: len(fetch(url)[1]) for name, url in urls.items()}
        interleave(_loads(urls, CONNECTIONS, 1), 1)  # warm-up
        throughput = interleave(_loads(urls, CONNECTIONS, plan.seconds), plan.rounds)
        miss_urls = {
            "gateway": f"{gateway.url}/raw/binance",
            "exchange": sandbox.settings["BINANCE_REST_URL"],
        }
        sides = {
            name: partial(_p50, url, "", RAW_MISSES, urlsplit(url).path + RAW_MISS_PATH)
            for name, url in miss_urls.items()
        }
        p50s = interleave(sides, plan.rounds)
    rates = {name: [report.rate for report in reports] for name, reports in throughput.items()}
    title = f"raw hit, {CONNECTIONS} connections: requests/s against a hit of /ticker"
    results.figures.append(Figure(title, ratios(rates["raw"], rates["ticker"]), "x", 0.9, 1.0))
    added = [
        gateway - exchange
        for gateway, exchange in zip(p50s["gateway"], p50s["exchange"], strict=True)
    ]
    title = "raw miss, one connection: p50 above that of the exchange"
    results.figures.append(Figure(title, added, "ms", 2, 1, lower_is_better=True))
    results.notes.append(
        f"Raw: `GET {RAW_PATH}` ({sizes['raw']} bytes) beside `GET {PATH}` ({sizes['ticker']} "
        f"bytes). Misses: {plan.rounds} rounds of {RAW_MISSES} requests one by one for Binance's "
        f"`{RAW_MISS_PATH}`, which is never cached, directly and through the gateway."
    )


def measure_mix(plan: Plan, results: Results) -> None:
    """Measure the hit rate of a Zipf mix of symbols, with default settings."""
    symbols = [f"/ticker/F{rank:04d}/USDT" for rank in range(1, MIX_SYMBOLS + 1)]
    warm_count = int(plan.rate * plan.warm_seconds)
    paths = zipf(symbols, warm_count + int(plan.rate * plan.mix_seconds))
    with Servers() as servers:
        gateway = servers.gateway(servers.sandbox(MIX_SYMBOLS), {"REDIS_URL": servers.redis()})
        uvloop.run(at_rate(gateway.url, paths[:warm_count], plan.rate))
        before = gateway.cache_results()
        responses = expect(uvloop.run(at_rate(gateway.url, paths[warm_count:], plan.rate)), "")
        cache_results = gateway.cache_results() - before
    hits = sum(response.is_hit for response in responses)
    _check_hit_counts(hits, len(responses), cache_results)
    title = f"hit rate, Zipf mix of {MIX_SYMBOLS} symbols at {plan.rate:g} requests/s"
    percentages = _hit_percentages(responses, plan.mix_seconds)
    results.figures.append(Figure(title, percentages, "%", 90, 99))
    results.notes.append(
        f"Hit rate: exponent 1.0, {plan.rate:g} requests/s for {plan.mix_seconds:g} s after a "
        f"warm-up of {plan.warm_seconds:g} s. Default settings (a ticker is fresh for 15 s), with "
        f"Redis. The values are those of {MIX_PARTS} equal parts of the time. {hits:,} of "
        f"{len(responses):,} responses were hits by `Cache-Status`; "
        "`virtuoso_cache_requests_total` counted the same."
    )


def _check_hit_counts(hits: int, responses: int, cache_results: Counter[str]) -> None:
    """Raise `RuntimeError` if the headers and the gateway's metric disagree."""
    metric_hits = cache_results.total() - cache_results["miss"] - cache_results["coalesced"]
    if (hits, responses) != (metric_hits, cache_results.total()):
        raise RuntimeError(
            f"{hits} of {responses} responses are hits by their headers, but the metric counts "
            f"{cache_results}"
        )


def _hit_percentages(responses: Sequence[Response], seconds: float) -> list[float]:
    """Return the hit rate of each part of the time."""
    parts: list[list[bool]] = [[] for _ in range(MIX_PARTS)]
    for response in responses:
        part = int(response.at * MIX_PARTS / seconds)
        parts[min(MIX_PARTS - 1, part)].append(response.is_hit)
    return [100 * statistics.fmean(part) for part in parts]


def measure_sizes(plan: Plan, results: Results) -> None:
    """Measure throughput by number of cached symbols, which are requested in shuffled order."""
    smallest = min(plan.sizes)
    largest = max(plan.sizes)
    names = [f"F{rank:04d}/USDT" for rank in range(1, largest + 1)]
    random.Random(1).shuffle(names)
    # binance can return a list of symbols. bybit and kraken would return all symbols per batch.
    settings = LONG_TTL_SETTINGS | {"CACHE_MEMORY_SIZE": "20000", "EXCHANGE_ORDER": "binance"}
    with Servers() as servers:
        sandbox = servers.sandbox(largest)
        gateways = {size: servers.gateway(sandbox, settings) for size in plan.sizes}
        sides = {}
        for size, gateway in gateways.items():
            warm(gateway, names[:size])
            paths = servers.folder / f"paths-{size}"
            paths.write_text("".join(f"/ticker/{name}\n" for name in names[:size]))
            sides[str(size)] = partial(drive, gateway.url, CONNECTIONS, plan.seconds, paths)
        interleave(sides, plan.rounds)  # a request is known by its bytes from the fourth one on
        reports = interleave(sides, plan.rounds)
        for size, gateway in gateways.items():
            gateway.check_hits(misses=size)
    rates = {size: [report.rate for report in reports[str(size)]] for size in plan.sizes}
    title = f"throughput with {largest:,} cached symbols against {smallest}"
    values = ratios(rates[largest], rates[smallest])
    results.figures.append(Figure(title, values, "x", 0.9, 0.97))
    for size in plan.sizes:
        results.details.append(Figure(f"{size:,} cached symbols", rates[size], "requests/s"))
    line = {"gateway": [statistics.median(rates[size]) for size in plan.sizes]}
    title = "Throughput by number of cached symbols"
    results.charts["symbols.svg"] = chart(
        title, "cached symbols", "requests/s", plan.sizes, line, log=True
    )
    results.notes.append(
        "Cached symbols: one gateway for each number, with `CACHE_MEMORY_SIZE=20000`. "
        f"{CONNECTIONS} connections, {plan.rounds} rounds of {plan.seconds:g} s, all symbols in "
        "the same shuffled order, with the same client script."
    )


def measure_starts(plan: Plan, results: Results) -> None:
    """Measure the start of a gateway, without and with a market snapshot in Redis."""
    with Servers() as servers:
        sandbox = servers.sandbox(START_MARKETS)
        redis = servers.redis()
        sides = {
            "without snapshot": partial(_measure_start, servers, sandbox, redis, flush=True),
            "with snapshot": partial(_measure_start, servers, sandbox, redis, flush=False),
        }
        sides["without snapshot"]()  # warm-up: Python compiles the modules
        rounds = interleave(sides, plan.rounds)
    titles = {
        "process start to /health/live": "s",
        "process start to the first ticker": "s",
        "RSS after the first ticker": "MB",
    }
    for side, values in rounds.items():
        for (title, unit), column in zip(titles.items(), zip(*values, strict=True), strict=True):
            results.figures.append(Figure(f"{title}, {side}", column, unit))
    results.notes.append(
        f"Start: each of the three exchanges has {START_MARKETS:,} additional markets. The first "
        "ticker is requested with `max_age=0`, so that it comes from an exchange. The snapshot is "
        "that of an earlier process in Redis."
    )


def _measure_start(
    servers: Servers, sandbox: Sandbox, redis: str, *, flush: bool
) -> tuple[float, float, float]:
    """Return the seconds to /health/live and to the first ticker, and the memory after it."""
    if flush:
        Redis.from_url(redis).flushall()
    began = time.perf_counter()
    gateway = servers.gateway(sandbox, {"REDIS_URL": redis}, wait=False)
    servers.wait(f"{gateway.url}/health/live")
    live_seconds = time.perf_counter() - began
    servers.wait(f"{gateway.url}{PATH}?max_age=0")
    ticker_seconds = time.perf_counter() - began
    memory = gateway.rss_mb()
    servers.wait_for_markets(gateway)  # the next process may find all markets in Redis
    servers.stop(gateway)
    return live_seconds, ticker_seconds, memory


SECTIONS: dict[str, Callable[[Plan, Results], None]] = {
    "hits": measure_hits,
    "inside": measure_inside,
    "redis_hits": measure_redis_hits,
    "misses": measure_misses,
    "raw": measure_raw,
    "mix": measure_mix,
    "symbols": measure_sizes,
    "starts": measure_starts,
}


def report(results: Results, seconds: float) -> str:
    """Return the report as Markdown. `seconds` is the duration of all measurements."""
    missed = [_missed_line(figure) for figure in results.figures if figure.verdict == "missed"]
    lines = [
        "# Results\n",
        "Generated by `make bench`. Each figure is the median of all rounds, with minimum and",
        "maximum beside it. A round measures the gateway and its partner in turn. `x` is the ratio",
        "of the gateway to its partner. A figure must reach `required` and should reach `goal`.\n",
        f"Measured on {datetime.now(UTC):%Y-%m-%d %H:%M} UTC in {seconds / 60:.1f} minutes, on",
        f"{machine()}, {CLIENT}.",
        "Client and servers share the cores. Each server is one process on loopback (uvicorn with",
        "uvloop and httptools, no access log; nginx with one worker), and only one of them is",
        "loaded at a time. To repeat the measurements:\n",
        "```sh\nmake ci-deps   # optional, as root: wrk and nginx\nmake bench\n```\n",
        figure_table(results.figures),
        *(missed or ["All targets are met."]),
        "\n## Details\n",
        figure_table(results.details, VALUE_COLUMNS),
        *(f"![{Path(file).stem}]({file})\n" for file in results.charts),
        "## Method\n",
        *(f"- {note}" for note in results.notes),
    ]
    return "\n".join(lines) + "\n"


def _missed_line(figure: Figure) -> str:
    bound = "most" if figure.lower_is_better else "least"
    return (
        f"- missed: {figure.name} is {number(figure.median)} {figure.unit}, must be at {bound} "
        f"{number(figure.required or 0)} {figure.unit}."
    )


def machine() -> str:
    """Return the number and model of the cores, and the version of Python."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    model = models[0] if models else platform.machine()
    return f"{os.cpu_count()} cores ({model}), Python {platform.python_version()}"


def main() -> None:
    """Run the sections and print the report. Write it if it is complete or `--out` is given."""
    parser = argparse.ArgumentParser(description="Compare the gateway with other designs.")
    parser.add_argument(
        "--quick", action="store_true", help="measure briefly, only to see that everything runs"
    )
    parser.add_argument("--only", choices=SECTIONS, action="append", help="run only this section")
    parser.add_argument(
        "--out", type=Path, help="folder for the report, which may be incomplete then"
    )
    options = parser.parse_args()
    plan = QUICK if options.quick else Plan()
    results = Results()
    began = time.monotonic()
    for name in options.only or SECTIONS:
        print(f"{time.monotonic() - began:4.0f} s: {name}", file=sys.stderr, flush=True)
        SECTIONS[name](plan, results)
    text = report(results, time.monotonic() - began)
    print(text)
    folder = options.out or (None if options.quick or options.only else FOLDER)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        for file, content in {**results.charts, "RESULTS.md": text}.items():
            (folder / file).write_text(content)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
