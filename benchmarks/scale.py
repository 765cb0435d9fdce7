"""Compare one gateway with two replicas that share a Redis, both behind nginx.

Run with `make scale`. Each side has its own nginx, Redis and gateways; the exchanges are the same.
The load is one hot symbol at full speed, then a Zipf mix at a steady rate.
"""

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import uvloop

from benchmarks.figures import Figure, interleave, number, table
from benchmarks.load import CLIENT, at_rate, drive, expect, zipf
from benchmarks.servers import NGINX, PATH, Sandbox, Server, Servers, fetch

SYMBOLS = 300
COLD_SYMBOLS = 5
COLD_LATENCY_MS = 80  # makes the requests of both replicas overlap
CONNECTIONS = 32
PROXY = (
    "upstream replicas { %s keepalive 64; } "
    "server { listen LISTEN; location / { proxy_pass http://replicas; proxy_http_version 1.1; "
    'proxy_set_header Connection ""; proxy_set_header Host $host; } }'
)


@dataclass(frozen=True)
class Plan:
    """How long and how often to measure."""

    rounds: int = 3
    hot_seconds: float = 3
    rate: float = 200  # requests per second of the mix
    warm_seconds: float = 15
    mix_seconds: float = 15


QUICK = Plan(1, 1, 100, 1, 2)


class Side(NamedTuple):
    """Replicas and the nginx in front of them."""

    replicas: list[Server]
    front: Server


class Measurement(NamedTuple):
    """The result of one round; the names are the rows of the printed table."""

    requests_per_second: float
    p50_ms: float
    p99_ms: float
    hit_rate_percent: float
    upstream_calls: float
    bybit_budget_used_percent: float


def start(servers: Servers, sandbox: Sandbox, count: int) -> Side:
    """Start replicas with one Redis, and an nginx in front of them."""
    settings = {"REDIS_URL": servers.redis()}
    replicas = [servers.gateway(sandbox, settings) for _ in range(count)]
    addresses = " ".join(f"server {replica.url.removeprefix('http://')};" for replica in replicas)
    return Side(replicas, servers.nginx(PROXY % addresses, PATH))


def measure(side: Side, sandbox: Sandbox, plan: Plan) -> Measurement:
    """Load one side: the hot symbol, the warm-up of the mix, the mix."""
    url = side.front.url
    drive(url + PATH, CONNECTIONS, 1)  # warm-up
    hot = drive(url + PATH, CONNECTIONS, plan.hot_seconds)
    symbols = [f"/ticker/F{rank:04d}/USDT" for rank in range(1, SYMBOLS + 1)]
    warm_count = int(plan.rate * plan.warm_seconds)
    paths = zipf(symbols, warm_count + int(plan.rate * plan.mix_seconds))
    uvloop.run(at_rate(url, paths[:warm_count], plan.rate))
    calls_before = sandbox.calls()
    responses = expect(uvloop.run(at_rate(url, paths[warm_count:], plan.rate)), "")
    calls = sandbox.calls() - calls_before
    hits = sum(response.is_hit for response in responses)
    budgets = [
        json.loads(fetch(f"{replica.url}/exchanges")[1])["bybit"]["budget_used_ratio"]
        for replica in side.replicas
    ]
    return Measurement(*hot, 100 * hits / len(responses), calls, 100 * max(budgets))


def measure_cold(side: Side, sandbox: Sandbox) -> list[int]:
    """Request uncached symbols from all replicas at once; return the upstream calls of each."""
    sandbox.set("bybit", latency_ms=COLD_LATENCY_MS)
    calls = []
    with ThreadPoolExecutor(len(side.replicas)) as pool:
        for rank in range(SYMBOLS + 1, SYMBOLS + COLD_SYMBOLS + 1):
            before = sandbox.calls()
            urls = [f"{replica.url}/ticker/F{rank:04d}/USDT" for replica in side.replicas]
            if any(status != 200 for status, _, _ in pool.map(fetch, urls)):
                raise RuntimeError("a replica did not respond with 200 for an uncached symbol")
            calls.append(sandbox.calls() - before)
    return calls


def result_rows(rounds: Mapping[str, Sequence[Measurement]]) -> list[list[str]]:
    """Return one table row per measured value, with the median and range of each side."""
    rows = []
    for index, name in enumerate(Measurement._fields):
        cells = []
        for measurements in rounds.values():
            figure = Figure(name, [measurement[index] for measurement in measurements])
            low = number(min(figure.values))
            high = number(max(figure.values))
            cells.append(f"{number(figure.median)} ({low} to {high})")
        rows.append([name.replace("_", " "), *cells])
    return rows


def method(plan: Plan) -> str:
    """Describe how the printed values are measured."""
    return (
        f"\nThe client, nginx, the replicas, Redis and the exchanges share {os.cpu_count()} cores. "
        "Without free cores,\nreplicas do not increase throughput. "
        f"Client: {CLIENT}.\nMedians and ranges of {plan.rounds} rounds in turn: "
        f"{plan.hot_seconds:g} s of one hot symbol with {CONNECTIONS} connections, then\n"
        f"{plan.rate:g} requests/s of a Zipf mix of {SYMBOLS} symbols for {plan.mix_seconds:g} s, "
        f"after a warm-up of {plan.warm_seconds:g} s.\nHit rate, upstream calls and budget are "
        "those of the mix. All settings have their defaults.\n"
    )


def main() -> int:
    """Measure both sides in turn and print the results; return the exit code."""
    parser = argparse.ArgumentParser(
        description="Compare one gateway with two replicas, both behind nginx."
    )
    parser.add_argument(
        "--quick", action="store_true", help="measure briefly, only to see that everything runs"
    )
    options = parser.parse_args()
    if NGINX is None:
        print("nginx is not installed. Run `make ci-deps` as root.", file=sys.stderr)
        return 1
    plan = QUICK if options.quick else Plan()
    with Servers() as servers:
        sandbox = servers.sandbox(SYMBOLS + COLD_SYMBOLS)
        sides = {
            "1 replica": start(servers, sandbox, 1),
            "2 replicas": start(servers, sandbox, 2),
        }
        rounds = interleave(
            {name: partial(measure, side, sandbox, plan) for name, side in sides.items()},
            plan.rounds,
        )
        cold_calls = measure_cold(sides["2 replicas"], sandbox)
    print(method(plan))
    print(table(["", *sides], result_rows(rounds)))
    print(
        f"Upstream calls for {len(cold_calls)} uncached symbols, each requested from both replicas "
        f"at once: {cold_calls}"
    )
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
