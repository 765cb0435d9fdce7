"""How well prices are pushed on, beside a bare relay of the same messages; writes STREAM.md.

`make bench-stream`. Exchange, relay, writer and gateway are one process each; one of them is loaded at a time.
`--quick` measures next to nothing and only prints: it shows that all of it runs.
"""

import argparse
import asyncio
import os
import re
import sys
import time
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

import uvloop

from benchmarks.bench import FOLDER, machine
from benchmarks.figures import COLUMNS, Figure, interleave, percentile, ratios, table
from benchmarks.servers import Sandbox, Server, Servers, fetch
from benchmarks.stalls import Noted, noted
from benchmarks.watchers import Seen, connect
from src.sandbox.demo import free_port

PUSH_MS, ONE_PUSH_MS = 50, 10  # to many clients, and to one
FULL_PUSH_MS = 10  # to as many, to see what goes through at most
WANTS = b'{"op":"subscribe","symbols":["BTC/USDT"],"exchange":"binance"}'
SETTLE_SECONDS = 2.0  # after all are connected
TRIES = 5  # to measure, on a machine that stands still
T = TypeVar("T")


METHOD = f"""binance's sandbox pushes the ticker of one symbol every {PUSH_MS} ms, to one client every {ONE_PUSH_MS} ms;
{{plan.rounds}} rounds of {{plan.seconds}} s in turn, one client of each side at the same time. The bare relay
(`relay.py`) sends on what it gets by the library `websockets`; latency is from the exchange's time in a message, in
whole milliseconds, to when a client has it. The bare writer (`writes.py`) does nothing but write as many bytes to as
many sockets, as fast as it goes. All clients are in one process, which shares the machine with the others.

What was under way while the machine stood still is left out of p50 and p99, on both sides: a process that only sleeps
tells when (`stalls.py`); `idle` is the share of the time that was left out so. Rates count all of the time. The
simulated exchange stands still with the machine, and then pushes less often than it should: what goes through at most
is measured with a push every {FULL_PUSH_MS} ms.
"""


@dataclass(frozen=True)
class Plan:
    """How much is measured."""

    rounds: int = 5
    clients: int = 1000
    deaf: int = 50  # of them, that never read
    seconds: float = 10


class StoodStillError(Exception):
    """The machine stood still as long as was measured."""


class Side(NamedTuple):
    """What clients connect to, and what they say there."""

    url: str
    wants: bytes
    server: Server


class Round(NamedTuple):
    """What one round brought."""

    rate: float  # messages a second, to all clients that read
    p50: float  # ms
    p99: float
    cpu_us: float  # of the server, for each message
    kb: float  # of the server's memory, for each client
    lost: int
    idle: float  # share of the time that was left out, in percent


def cpu_seconds(server: Server) -> float:
    """Return the processor time a process took so far."""
    with open(f"/proc/{server.process.pid}/stat") as file:  # noqa: PTH123
        fields = file.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def watch(side: Side) -> None:
    """Have what is measured watched already."""
    watchers = await connect(side.url, side.wants, 1, Seen())
    await asyncio.sleep(SETTLE_SECONDS)
    watchers[0].transport.abort()


async def measure(side: Side, noted: Noted, clients: int, seconds: float, deaf: int = 0) -> Round:
    """Have so many clients watch for so long; the first `deaf` of them read nothing."""
    seen, before = Seen(), side.server.rss_mb()
    watchers = await connect(side.url, side.wants, clients, seen)
    await asyncio.sleep(SETTLE_SECONDS)
    for watcher in watchers[:deaf]:
        watcher.transport.pause_reading()
    memory = (side.server.rss_mb() - before) * 1024 / clients
    seen.messages, seen.lost = 0, 0
    seen.came.clear()
    spent, began = cpu_seconds(side.server), time.time()
    await asyncio.sleep(seconds)
    ended, spent, lost = time.time(), cpu_seconds(side.server) - spent, seen.lost
    stalls, messages = noted.read(), seen.messages
    for watcher in watchers:
        watcher.transport.abort()  # first of all: an event loop that still reads cannot be closed
    await asyncio.sleep(1)
    latencies = seen.latencies(stalls)
    if not latencies:
        raise StoodStillError
    return Round(
        rate=messages / (ended - began),
        p50=percentile(latencies, 0.5),
        p99=percentile(latencies, 0.99),
        cpu_us=spent * 1e6 / messages,
        kb=memory,
        lost=lost,
        idle=100 * stalls.share(1000 * began, 1000 * ended),
    )


async def together(sides: dict[str, Side], noted: Noted, seconds: float) -> dict[str, Round]:
    """Measure one client of each side at the same time: whatever else the machine does falls on both."""
    rounds = await asyncio.gather(*(measure(side, noted, 1, seconds) for side in sides.values()))
    return dict(zip(sides, rounds, strict=True))


def patiently(work: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Measure in an event loop of its own, and again if the machine stood still all the time."""
    for _ in range(TRIES):
        with suppress(StoodStillError):
            return uvloop.run(work())
    raise RuntimeError("the machine stands still all the time: nothing can be measured on it now")


def run(side: Side, noted: Noted, clients: int, seconds: float, deaf: int = 0) -> Round:
    """Measure so many clients, so long, with so many of them deaf."""
    return patiently(partial(measure, side, noted, clients, seconds, deaf))


def metric(server: Server, name: str) -> float:
    """Read one of the gateway's metrics, summed over its labels."""
    text = fetch(f"{server.url}/metrics")[1].decode()
    return sum(float(value) for value in re.findall(rf"^virtuoso_{name}(?:{{.*}})? (\S+)$", text, re.MULTILINE))


def figures(
    plan: Plan, sides: dict[str, Side], writer: Side, sandbox: Sandbox, noted: Noted
) -> tuple[list[Figure], list[Figure]]:
    """Measure everything; returns the figures with targets, and what lies behind them."""
    gateway = sides["gateway"].server
    sandbox.set("binance", push_ms=ONE_PUSH_MS)
    rounds_of_one = [patiently(partial(together, sides, noted, plan.seconds)) for _ in range(plan.rounds)]
    one = {name: [found[name] for found in rounds_of_one] for name in sides}
    sandbox.set("binance", push_ms=PUSH_MS)
    asked, conflated = sandbox.calls(), metric(gateway, "stream_conflated_total")
    loaded = sides | {"bare writer": writer}
    many = interleave(
        {name: partial(run, side, noted, plan.clients, plan.seconds) for name, side in loaded.items()}, plan.rounds
    )
    writes = many.pop("bare writer")
    asked, conflated = sandbox.calls() - asked, metric(gateway, "stream_conflated_total") - conflated
    deaf = [run(sides["gateway"], noted, plan.clients, plan.seconds, plan.deaf) for _ in range(plan.rounds)]
    sandbox.set("binance", push_ms=FULL_PUSH_MS)
    replaced = metric(gateway, "stream_conflated_total")
    full = [run(sides["gateway"], noted, plan.clients, plan.seconds) for _ in range(plan.rounds)]
    replaced = metric(gateway, "stream_conflated_total") - replaced

    def of(rounds: Sequence[Round], name: str) -> list[float]:
        return [getattr(each, name) for each in rounds]

    def above(name: str) -> list[float]:
        return [own - bare for own, bare in zip(of(one["gateway"], name), of(one["bare relay"], name), strict=True)]

    whole = plan.clients * 1000 / PUSH_MS
    reading = plan.clients - plan.deaf
    with_deaf = [each.rate / reading for each in deaf]
    without = [each.rate / plan.clients for each in many["gateway"]]
    result = [
        Figure("one client: p50 above a bare relay", above("p50"), "ms", 2, lower=True),
        Figure("one client: p99 above a bare relay", above("p99"), "ms", 10, lower=True),
        Figure(f"{plan.clients} clients: updates a second to each", without, "1/s", 950 / PUSH_MS),
        Figure(f"{plan.clients} clients: what goes through at most", of(full, "rate"), "messages/s"),
        Figure(f"{plan.clients} clients: p99", of(many["gateway"], "p99"), "ms", 100, lower=True),
        Figure(f"{plan.clients} clients: conflated updates", [conflated], "updates", 0, lower=True),
        Figure(
            f"{plan.clients} clients: processor time per message against a bare relay",
            ratios(of(many["gateway"], "cpu_us"), of(many["bare relay"], "cpu_us")), "x", 2, lower=True,
        ),
        Figure(
            f"{plan.clients} clients: processor time per message against a bare writer",
            ratios(of(many["gateway"], "cpu_us"), of(writes, "cpu_us")), "x",
        ),
        Figure("memory per client", of(many["gateway"], "kb")[:1], "KB", 60, lower=True),  # kept for the next
        Figure(f"messages to exchanges for {plan.rounds * plan.clients} clients", [asked], "messages", 0, lower=True),
        Figure(f"{plan.deaf} of them deaf: messages/s of each other, against none", ratios(with_deaf, without), "x"),
        Figure(
            f"{plan.deaf} of them deaf: p99 of the others, against none",
            ratios(of(deaf, "p99"), of(many["gateway"], "p99")), "x",
        ),
    ]  # fmt: skip
    behind = [
        Figure(f"pushed to {plan.clients} clients, if none is late", [whole], "messages/s"),
        Figure(f"{plan.clients} clients, what goes through at most: conflated updates", [replaced], "updates"),
        Figure(f"{plan.clients} clients, bare writer: rate", of(writes, "rate"), "messages/s"),
        Figure(f"{plan.clients} clients, bare writer: cpu_us", of(writes, "cpu_us"), "µs"),
    ]
    for name, rounds in (*many.items(), (f"gateway, {plan.deaf} deaf", deaf)):
        for member, unit in (
            ("rate", "messages/s"),
            ("p50", "ms"),
            ("p99", "ms"),
            ("cpu_us", "µs"),
            ("kb", "KB"),
            ("idle", "%"),
        ):
            behind.append(Figure(f"{plan.clients} clients, {name}: {member}", of(rounds, member), unit))
    for name, rounds in one.items():
        behind += [
            Figure(f"one client, {name}: {member}", of(rounds, member), "%" if member == "idle" else "ms")
            for member in ("p50", "p99", "idle")
        ]
    return result, behind


def bare(servers: Servers, module: str, status: int, *arguments: str) -> Side:
    """Start something to compare with, which answers plain HTTP with `status` when it is ready."""
    port = free_port()
    process = servers.start([sys.executable, "-m", f"benchmarks.{module}", *arguments, str(port)])
    server = Server(f"http://127.0.0.1:{port}", process)
    servers.wait(server.url, lambda found, _: found == status)
    return Side(f"ws://127.0.0.1:{port}/", b"", server)


def main() -> int:
    """Measure, print and write; returns the exit code."""
    parser = argparse.ArgumentParser(description="Measure what is pushed, beside a bare relay.")
    parser.add_argument("--quick", action="store_true", help="next to nothing, only to see that it runs")
    plan = Plan(1, 20, 2, 2) if parser.parse_args().quick else Plan()
    with Servers() as servers, noted() as stalls:
        sandbox = servers.sandbox()
        gateway = servers.gateway(sandbox, {"STREAM_MAX_PER_CLIENT": str(plan.clients)})  # all come from one address
        exchange = sandbox.settings["BINANCE_WS_URL"] + "/stream/ws/0"
        sides = {
            "bare relay": bare(servers, "relay", 426, exchange),  # it asks for an upgrade
            "gateway": Side(f"ws://{urlsplit(gateway.url).netloc}/ws", WANTS, gateway),
        }
        uvloop.run(watch(sides["gateway"]))  # from now on
        found, behind = figures(plan, sides, bare(servers, "writes", 101), sandbox, stalls)
    text = "\n".join(
        [
            "# Streams\n",
            f"Written by `make bench-stream` on {datetime.now(UTC):%Y-%m-%d %H:%M} UTC, on {machine()}.",
            METHOD.format(plan=plan),
            table(COLUMNS, [figure.row() for figure in found]),
            "## Behind them\n",
            table(COLUMNS[:5], [figure.row()[:5] for figure in behind]),
        ]
    )
    print(text)
    if plan == Plan():
        (FOLDER / "STREAM.md").write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
