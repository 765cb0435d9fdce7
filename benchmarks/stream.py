"""Compare streaming with a bare relay of the same messages; write STREAM.md.

Run with `make bench-stream`. Exchange, relay, writer and gateway are one process each. With
`--quick`, each measurement is as short as possible, which only shows that everything runs.
"""

import argparse
import asyncio
import re
import sys
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

import uvloop

from benchmarks.bench import FOLDER, machine
from benchmarks.devtools import cpu_seconds
from benchmarks.figures import (
    VALUE_COLUMNS,
    Figure,
    figure_table,
    interleave,
    percentile,
    ratios,
)
from benchmarks.servers import Sandbox, Server, Servers, fetch
from benchmarks.stalls import StallLog, record_stalls
from benchmarks.stream_clients import Received, connect
from src.sandbox.demo import free_port

PUSH_MS = 50  # interval of the exchange's updates to many clients
ONE_PUSH_MS = 10  # interval to one client
MAX_PUSH_MS = 10  # interval to many clients that shows the highest message rate
MIN_UPDATES_PER_SECOND = 950 / PUSH_MS  # 95 % of the updates
SUBSCRIBE_COMMAND = b'{"op":"subscribe","symbols":["BTC/USDT"],"exchange":"binance"}'
SETTLE_SECONDS = 2.0  # after all clients are connected
TRIES = 5  # per measurement, if the machine stands still
T = TypeVar("T")


METHOD = f"""\
The simulated binance pushes the ticker of one symbol every {PUSH_MS} ms, and to one client every
{ONE_PUSH_MS} ms. There are {{plan.rounds}} rounds of {{plan.seconds}} s in turn; one client of each
side is measured at the same time. The bare relay (`relay.py`) forwards what it receives with the
library `websockets`. Latency is the time from the exchange's time in a message, in whole
milliseconds, until a client receives the message. The bare writer (`writes.py`) writes as many
bytes to as many sockets at full speed. All clients are in one process, which shares the machine
with the others.

A process that only sleeps records when the machine stood still (`stalls.py`). Messages of these
times are left out of p50 and p99 on both sides; "time left out" is their share. Rates include all
of the time. The simulated exchange stands still with the machine and then pushes less often than it
should, so the highest message rate is measured with a push every {MAX_PUSH_MS} ms.
"""


@dataclass(frozen=True)
class Plan:
    """How long and how often to measure."""

    rounds: int = 5
    clients: int = 1000
    paused_clients: int = 50  # of them, which read nothing
    seconds: float = 10


QUICK = Plan(1, 20, 2, 2)


class MachineStalledError(Exception):
    """The machine stood still during the whole measurement."""


class Side(NamedTuple):
    """A server, and the URL and first command of its clients."""

    url: str
    command: bytes
    server: Server


class Round(NamedTuple):
    """The result of one round; the values of `ROUND_FIGURES` are in the report."""

    rate: float
    p50: float
    p99: float
    cpu_us: float
    memory_kb: float
    left_out: float
    lost_connections: int


ROUND_FIGURES = {
    "rate": ("message rate", "messages/s"),
    "p50": ("p50", "ms"),
    "p99": ("p99", "ms"),
    "cpu_us": ("processor time per message", "µs"),
    "memory_kb": ("memory per client", "KB"),
    "left_out": ("time left out", "%"),
}
LATENCY_MEMBERS = ("p50", "p99", "left_out")

Rounds = Sequence[Round]


def values(rounds: Rounds, member: str) -> list[float]:
    """Return one value of each round."""
    return [getattr(measured, member) for measured in rounds]


async def subscribe_once(side: Side) -> None:
    """Start the subscription at the exchange, so that it exists before the measurement."""
    clients = await connect(side.url, side.command, 1, Received())
    await asyncio.sleep(SETTLE_SECONDS)
    clients[0].transport.abort()


async def measure(
    side: Side, stall_log: StallLog, clients: int, seconds: float, paused_clients: int = 0
) -> Round:
    """Measure connected clients, of which the first `paused_clients` read nothing."""
    received = Received()
    memory_before = side.server.rss_mb()
    connected = await connect(side.url, side.command, clients, received)
    await asyncio.sleep(SETTLE_SECONDS)
    for client in connected[:paused_clients]:
        client.transport.pause_reading()
    memory_kb = (side.server.rss_mb() - memory_before) * 1024 / clients
    received.reset()
    cpu_before = cpu_seconds(side.server.process.pid)
    began = time.time()
    await asyncio.sleep(seconds)
    ended = time.time()
    cpu = cpu_seconds(side.server.process.pid) - cpu_before
    messages = received.messages
    lost_connections = received.lost_connections
    stalls = stall_log.read()
    for client in connected:
        client.transport.abort()  # an event loop cannot close while connections are read
    await asyncio.sleep(1)
    latencies = received.latencies(stalls)
    if not latencies:
        raise MachineStalledError
    return Round(
        rate=messages / (ended - began),
        p50=percentile(latencies, 0.5),
        p99=percentile(latencies, 0.99),
        cpu_us=cpu * 1e6 / messages,
        memory_kb=memory_kb,
        left_out=100 * stalls.share(1000 * began, 1000 * ended),
        lost_connections=lost_connections,
    )


async def measure_one_each(
    sides: Mapping[str, Side], stall_log: StallLog, seconds: float
) -> dict[str, Round]:
    """Measure one client of each side at once, so that other load affects both sides alike."""
    measurements = (measure(side, stall_log, 1, seconds) for side in sides.values())
    rounds = await asyncio.gather(*measurements)
    return dict(zip(sides, rounds, strict=True))


def run_with_retries(work: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Run a measurement in an event loop, again if the machine stood still all the time."""
    for _ in range(TRIES):
        with suppress(MachineStalledError):
            return uvloop.run(work())
    raise RuntimeError(
        f"The machine stood still in {TRIES} measurements. Repeat the benchmark on an idle machine."
    )


def run(
    side: Side, stall_log: StallLog, clients: int, seconds: float, paused_clients: int = 0
) -> Round:
    """Run `measure` with retries."""
    return run_with_retries(partial(measure, side, stall_log, clients, seconds, paused_clients))


def metric(server: Server, name: str) -> float:
    """Return the value of one of the gateway's metrics, summed over its labels."""
    text = fetch(f"{server.url}/metrics")[1].decode()
    samples = re.findall(rf"^virtuoso_{name}(?:{{.*}})? (\S+)$", text, re.MULTILINE)
    return sum(float(sample) for sample in samples)


@dataclass
class Measured:
    """The rounds of all loads."""

    one: dict[str, list[Round]] = field(default_factory=dict)  # one client, by side
    many: dict[str, list[Round]] = field(default_factory=dict)  # all clients, by side
    paused: list[Round] = field(default_factory=list)  # the gateway with paused clients
    max_rate: list[Round] = field(default_factory=list)  # the gateway with frequent pushes
    conflated: float = 0  # updates with many clients
    conflated_at_max_rate: float = 0
    exchange_calls: float = 0  # with many clients


def measure_all(
    plan: Plan, sides: Mapping[str, Side], writer: Side, sandbox: Sandbox, stall_log: StallLog
) -> Measured:
    """Measure one client, many clients, paused clients, and the highest message rate."""
    measured = Measured()
    gateway = sides["gateway"]
    sandbox.set("binance", push_ms=ONE_PUSH_MS)
    pairs = [
        run_with_retries(partial(measure_one_each, sides, stall_log, plan.seconds))
        for _ in range(plan.rounds)
    ]
    measured.one = {name: [pair[name] for pair in pairs] for name in sides}

    sandbox.set("binance", push_ms=PUSH_MS)
    calls_before = sandbox.calls()
    conflated_before = metric(gateway.server, "stream_conflated_total")
    loads = {
        name: partial(run, side, stall_log, plan.clients, plan.seconds)
        for name, side in {**sides, "bare writer": writer}.items()
    }
    measured.many = interleave(loads, plan.rounds)
    measured.exchange_calls = sandbox.calls() - calls_before
    measured.conflated = metric(gateway.server, "stream_conflated_total") - conflated_before

    measured.paused = [
        run(gateway, stall_log, plan.clients, plan.seconds, plan.paused_clients)
        for _ in range(plan.rounds)
    ]

    sandbox.set("binance", push_ms=MAX_PUSH_MS)
    conflated_before = metric(gateway.server, "stream_conflated_total")
    measured.max_rate = [
        run(gateway, stall_log, plan.clients, plan.seconds) for _ in range(plan.rounds)
    ]
    conflated = metric(gateway.server, "stream_conflated_total") - conflated_before
    measured.conflated_at_max_rate = conflated
    return measured


def figures(plan: Plan, measured: Measured) -> list[Figure]:
    """Return the figures of the first table."""
    at_most = partial(Figure, lower_is_better=True)
    gateway = measured.many["gateway"]
    many = f"{plan.clients} clients"
    paused = f"{plan.paused_clients} of them paused"
    cpu = values(gateway, "cpu_us")
    return [
        at_most("one client: p50 above a bare relay", above_relay(measured, "p50"), "ms", 2),
        at_most("one client: p99 above a bare relay", above_relay(measured, "p99"), "ms", 10),
        Figure(
            f"{many}: updates per second and client",
            client_rates(gateway, plan.clients),
            "1/s",
            MIN_UPDATES_PER_SECOND,
        ),
        Figure(f"{many}: highest message rate", values(measured.max_rate, "rate"), "messages/s"),
        at_most(f"{many}: p99", values(gateway, "p99"), "ms", 100),
        at_most(f"{many}: conflated updates", [measured.conflated], "updates", 0),
        at_most(
            f"{many}: processor time per message against a bare relay",
            ratios(cpu, values(measured.many["bare relay"], "cpu_us")),
            "x",
            2,
        ),
        Figure(
            f"{many}: processor time per message against a bare writer",
            ratios(cpu, values(measured.many["bare writer"], "cpu_us")),
        ),
        # Only the first round: later clients use memory that the process has kept.
        at_most("memory per client", values(gateway, "memory_kb")[:1], "KB", 60),
        at_most(
            f"calls to exchanges for {plan.rounds * plan.clients} clients",
            [measured.exchange_calls],
            "calls",
            0,
        ),
        Figure(
            f"{paused}: message rate of each other client, against no paused clients",
            ratios(
                client_rates(measured.paused, plan.clients - plan.paused_clients),
                client_rates(gateway, plan.clients),
            ),
        ),
        Figure(
            f"{paused}: p99 of the others, against no paused clients",
            ratios(values(measured.paused, "p99"), values(gateway, "p99")),
        ),
    ]


def client_rates(rounds: Rounds, clients: int) -> list[float]:
    """Return the messages per second and client of each round."""
    return [rate / clients for rate in values(rounds, "rate")]


def above_relay(measured: Measured, member: str) -> list[float]:
    """Return how much a value of one client is above that of the bare relay, by round."""
    pairs = zip(
        values(measured.one["gateway"], member),
        values(measured.one["bare relay"], member),
        strict=True,
    )
    return [gateway - relay for gateway, relay in pairs]


def details(plan: Plan, measured: Measured) -> list[Figure]:
    """Return the figures without targets."""
    many = f"{plan.clients} clients"
    conflated = [measured.conflated_at_max_rate]
    result = [
        Figure(f"{many}: pushed updates", [plan.clients * 1000 / PUSH_MS], "messages/s"),
        Figure(f"{many}, highest message rate: conflated updates", conflated, "updates"),
    ]
    result += round_figures(f"{many}, bare writer", measured.many["bare writer"], "rate", "cpu_us")
    for name in measured.one:
        result += round_figures(f"{many}, {name}", measured.many[name], *ROUND_FIGURES)
    title = f"{many}, gateway, {plan.paused_clients} paused"
    result += round_figures(title, measured.paused, *ROUND_FIGURES)
    for name, rounds in measured.one.items():
        result += round_figures(f"one client, {name}", rounds, *LATENCY_MEMBERS)
    return result


def round_figures(title: str, rounds: Rounds, *members: str) -> list[Figure]:
    """Return one figure for each member of the rounds."""
    result = []
    for member in members:
        name, unit = ROUND_FIGURES[member]
        result.append(Figure(f"{title}: {name}", values(rounds, member), unit))
    return result


def start_partner(servers: Servers, module: str, ready_status: int, *arguments: str) -> Side:
    """Start the relay or the writer. `ready_status` is its response to a plain HTTP request."""
    port = free_port()
    process = servers.start([sys.executable, "-m", f"benchmarks.{module}", *arguments, str(port)])
    server = Server(f"http://127.0.0.1:{port}", process)
    servers.wait(server.url, lambda status, _: status == ready_status)
    return Side(f"ws://127.0.0.1:{port}/", b"", server)


def report(plan: Plan, measured: Measured) -> str:
    """Return the report as Markdown."""
    lines = [
        "# Streams\n",
        f"Generated by `make bench-stream` on {datetime.now(UTC):%Y-%m-%d %H:%M} UTC, on",
        f"{machine()}.\n",
        METHOD.format(plan=plan),
        figure_table(figures(plan, measured)),
        "## Details\n",
        figure_table(details(plan, measured), VALUE_COLUMNS),
    ]
    return "\n".join(lines)


def main() -> int:
    """Measure, print and write the report; return the exit code."""
    parser = argparse.ArgumentParser(description="Compare streaming with a bare relay.")
    parser.add_argument(
        "--quick", action="store_true", help="measure briefly, only to see that everything runs"
    )
    options = parser.parse_args()
    plan = QUICK if options.quick else Plan()
    with Servers() as servers, record_stalls() as stall_log:
        sandbox = servers.sandbox()
        # All clients have one address.
        gateway = servers.gateway(sandbox, {"STREAM_MAX_PER_CLIENT": str(plan.clients)})
        gateway_url = f"ws://{urlsplit(gateway.url).netloc}/ws"
        exchange_url = sandbox.settings["BINANCE_WS_URL"] + "/stream/ws/0"
        sides = {
            "bare relay": start_partner(servers, "relay", 426, exchange_url),
            "gateway": Side(gateway_url, SUBSCRIBE_COMMAND, gateway),
        }
        uvloop.run(subscribe_once(sides["gateway"]))
        writer = start_partner(servers, "writes", 101)
        text = report(plan, measure_all(plan, sides, writer, sandbox, stall_log))
    print(text)
    if not options.quick:
        (FOLDER / "STREAM.md").write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
