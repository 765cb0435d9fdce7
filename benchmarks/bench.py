"""How fast a memory hit is, beside a bare server sending the same bytes, in one run.

`make bench`. The two are measured in turn, pair by pair, so that what else the machine does falls on both; the figure
is the median of the pairs' ratios. Both run under the same uvicorn with uvloop and httptools, one process each.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

from benchmarks.load import NAME, requests_per_second
from src.demo import free_port, stop, wait_until_ready

PATH = "/ticker/BTC/USDT"
REPEATED = ("age", "cache-control", "cache-status", "etag", "content-type", "content-length", "x-request-id")
TTL_SECONDS = "3600"  # longer than the run: every request is a hit


def main() -> None:
    """Start both sides, measure them in turn, print a Markdown table."""
    parser = argparse.ArgumentParser(description="Measure the hit path beside a bare server.")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=4)
    parser.add_argument("--connections", type=int, default=32)
    options = parser.parse_args()
    parts: list[subprocess.Popen[bytes]] = []
    try:
        with tempfile.TemporaryDirectory() as folder:
            gateway = start_gateway(parts)
            bare = start_bare(parts, gateway, Path(folder) / "answer.json")
            measure(gateway, bare, options.pairs, options.seconds, options.connections)
    finally:
        stop(parts)


def measure(gateway: str, bare: str, pairs: int, seconds: float, connections: int) -> None:
    """Measure pair by pair, the order changing each time, and print the table."""
    for url in (gateway, bare):
        requests_per_second(url, connections, 1)
    rates: dict[str, list[float]] = {gateway: [], bare: []}
    for number in range(pairs):
        for url in (gateway, bare) if number % 2 else (bare, gateway):
            rates[url].append(requests_per_second(url, connections, seconds))
    ratios = [ours / limit for ours, limit in zip(rates[gateway], rates[bare], strict=True)]
    print(f"\n{pairs} pairs of {seconds:g} s, {connections} connections, {os.cpu_count()} cores, client: {NAME}\n")
    print("| requests per second | median | min | max |\n|---|---|---|---|")
    for name, values in (("memory hit", rates[gateway]), ("bare uvicorn, same bytes", rates[bare])):
        print(f"| {name} | {statistics.median(values):,.0f} | {min(values):,.0f} | {max(values):,.0f} |")
    print(f"| ratio | {statistics.median(ratios):.3f} | {min(ratios):.3f} | {max(ratios):.3f} |")


def start_gateway(parts: list[subprocess.Popen[bytes]]) -> str:
    """Start the sandbox and a gateway on memory alone; returns the URL of a ticker that is cached."""
    sandbox_port, port = free_port(), free_port()
    environment = os.environ | {"REDIS_HOST": "", "REDIS_URL": "", "LOG_LEVEL": "WARNING"}
    environment |= dict.fromkeys(("TICKER_TTL_SECONDS", "CACHE_MEMORY_TTL"), TTL_SECONDS)
    for number, name in enumerate(("BYBIT", "BINANCE", "KRAKEN"), start=1):
        environment[f"{name}_REST_URL"] = f"http://127.0.0.1:{sandbox_port + number}"
    parts.append(subprocess.Popen([sys.executable, "-m", "src.sandbox", "--port", str(sandbox_port)]))
    parts.append(serve(["src.api:app"], port, environment))
    if not wait_until_ready(f"http://127.0.0.1:{port}/health/ready", parts):
        raise RuntimeError("the gateway did not start")
    return f"http://127.0.0.1:{port}{PATH}"


def start_bare(parts: list[subprocess.Popen[bytes]], gateway: str, recorded: Path) -> str:
    """Record one answer of the gateway and start the bare server that sends the same."""
    urllib.request.urlopen(gateway, timeout=10).close()  # noqa: S310 - our own address; the second one is the hit
    with urllib.request.urlopen(gateway, timeout=10) as answer:  # noqa: S310
        headers = {name.lower(): value for name, value in answer.headers.items() if name.lower() in REPEATED}
        recorded.write_text(json.dumps({"headers": headers, "body": answer.read().decode()}))
    port = free_port()
    parts.append(serve(["benchmarks.bare:make", "--factory"], port, os.environ | {"BENCH_ANSWER": str(recorded)}))
    url = f"http://127.0.0.1:{port}{PATH}"
    if not wait_until_ready(url, parts):
        raise RuntimeError("the bare server did not start")
    return url


def serve(app: list[str], port: int, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    """Start uvicorn as the gateway is run, without its access log."""
    command = [sys.executable, "-m", "uvicorn", *app, "--port", str(port), "--no-access-log", "--log-level", "warning"]
    return subprocess.Popen(command, env=environment)


if __name__ == "__main__":
    started = time.monotonic()
    main()
    print(f"\n{time.monotonic() - started:.0f} s in all", file=sys.stderr)
