"""One gateway behind nginx beside two replicas behind nginx that share a Redis: the same load on each, in turn.

`make scale`. First a hot symbol as fast as it goes, then a Zipf mix at a steady rate. Each side has its own nginx,
Redis and gateways; the exchanges are the same.
"""

import argparse
import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import uvloop

from benchmarks.figures import Figure, interleave, number, table
from benchmarks.load import CLIENT, at_rate, drive, expect, zipf
from benchmarks.servers import NGINX, PATH, Sandbox, Server, Servers, fetch

SYMBOLS, COLD_SYMBOLS, LATENCY_MS = 300, 5, 80
PROXY = (
    "upstream replicas { %s keepalive 64; } server { listen LISTEN; location / { proxy_pass http://replicas; "
    'proxy_http_version 1.1; proxy_set_header Connection ""; proxy_set_header Host $host; } }'
)


@dataclass(frozen=True)
class Plan:
    """How much is measured."""

    rounds: int
    hot_seconds: float
    rate: float
    warm_seconds: float
    mix_seconds: float


class Side(NamedTuple):
    """So many replicas, and the nginx before them."""

    replicas: list[Server]
    front: Server


class Measured(NamedTuple):
    """What one round brought; the names are those of the printed table."""

    requests_per_second: float
    p50_ms: float
    p99_ms: float
    hit_rate_percent: float
    upstream_calls: float
    bybit_budget_used_percent: float


def start(servers: Servers, sandbox: Sandbox, count: int) -> Side:
    """Start replicas on one Redis, and an nginx before them."""
    settings = {"REDIS_URL": servers.redis()}
    replicas = [servers.gateway(sandbox, settings) for _ in range(count)]
    addresses = " ".join(f"server {replica.url.removeprefix('http://')};" for replica in replicas)
    return Side(replicas, servers.nginx(PROXY % addresses, PATH))


def measure(side: Side, sandbox: Sandbox, plan: Plan) -> Measured:
    """Load one side: the hot symbol, a warm-up, the mix."""
    drive(side.front.url + PATH, 32, 1)
    hot = drive(side.front.url + PATH, 32, plan.hot_seconds)
    paths = [f"/ticker/F{rank:04d}/USDT" for rank in range(1, SYMBOLS + 1)]
    begin = int(plan.rate * plan.warm_seconds)
    asked = zipf(paths, begin + int(plan.rate * plan.mix_seconds))
    uvloop.run(at_rate(side.front.url, asked[:begin], plan.rate))
    calls = sandbox.calls()
    answers = expect(uvloop.run(at_rate(side.front.url, asked[begin:], plan.rate)), "")
    calls = sandbox.calls() - calls
    told = [json.loads(fetch(f"{replica.url}/exchanges")[1])["bybit"]["budget_used_ratio"] for replica in side.replicas]
    hits = sum(answer.is_hit for answer in answers)
    return Measured(*hot, 100 * hits / len(answers), calls, 100 * max(told))


def cold(side: Side, sandbox: Sandbox) -> list[int]:
    """Ask all replicas at once for symbols nobody has; returns the calls the exchanges got for each."""
    sandbox.set("bybit", latency_ms=LATENCY_MS)  # so that the requests overlap
    calls = []
    with ThreadPoolExecutor(len(side.replicas)) as pool:
        for rank in range(SYMBOLS + 1, SYMBOLS + COLD_SYMBOLS + 1):
            before = sandbox.calls()
            urls = [f"{replica.url}/ticker/F{rank:04d}/USDT" for replica in side.replicas]
            if any(status != 200 for status, _, _ in pool.map(fetch, urls)):
                raise RuntimeError("not every replica answered for the cold symbol")
            calls.append(sandbox.calls() - before)
    return calls


def main() -> int:
    """Measure both sides in turn and print them side by side; returns the exit code."""
    parser = argparse.ArgumentParser(description="Compare one gateway with two replicas, both behind nginx.")
    parser.add_argument("--quick", action="store_true", help="next to nothing, only to see that it runs")
    options = parser.parse_args()
    if NGINX is None:
        print("this needs nginx, which was not found; `make ci-deps` as root installs it", file=sys.stderr)
        return 1
    plan = Plan(1, 1, 100, 1, 2) if options.quick else Plan(3, 3, 200, 15, 15)
    with Servers() as servers:
        sandbox = servers.sandbox(SYMBOLS + COLD_SYMBOLS)
        sides = {f"{count} replica{'s' * (count > 1)}": start(servers, sandbox, count) for count in (1, 2)}
        found = interleave({name: partial(measure, side, sandbox, plan) for name, side in sides.items()}, plan.rounds)
        calls = cold(sides["2 replicas"], sandbox)
    rows = []
    for at, name in enumerate(Measured._fields):
        of = [Figure(name, [one[at] for one in found[side]]) for side in sides]
        shown = [f"{number(one.median)} ({number(min(one.values))} to {number(max(one.values))})" for one in of]
        rows.append([name.replace("_", " "), *shown])
    print(
        f"\n{os.cpu_count()} cores, shared by the client, nginx, the replicas, Redis and the exchanges; where they do "
        f"not suffice, replicas\nadd no throughput. Client: {CLIENT}. Medians (and range) of {plan.rounds} rounds in "
        f"turn: {plan.hot_seconds:g} s of one hot symbol over\n32 connections, then {plan.rate:g} requests/s of a Zipf "
        f"mix of {SYMBOLS} symbols for {plan.mix_seconds:g} s after {plan.warm_seconds:g} s of the same.\nHit rate, "
        "upstream calls and budget are those of the mix; all settings are the defaults.\n"
    )
    print(table(["", *sides], rows))
    print(f"A cold symbol asked for on both replicas at once: upstream calls for each of {len(calls)} symbols: {calls}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
