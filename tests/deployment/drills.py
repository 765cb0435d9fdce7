"""Break parts of the deployment under load and write a report: `make drill`.

Compose starts a copy of the project in a temporary folder with simulated exchanges, three
gateways, other ports and another name, so that a deployment on this machine is not affected. All
times of alert rules are divided by `SPEED`. The report counts what a client sees at the edge. The
exit code is 1 if a promise was broken.

The environment variables `COMPOSE` and `DOCKER` name the commands (`docker compose`, `docker`).
"""

import argparse
import asyncio
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
import yaml

from config import setting_names
from src.sandbox.demo import free_port

ROOT = Path(__file__).parents[2]
REPORT = ROOT / "docs" / "drills.md"
PARTS = (
    "Dockerfile",
    ".dockerignore",
    "docker-compose.yml",
    "prometheus.yml",
    "requirements.txt",
    "config.py",
)
FOLDERS = ("src", "deploy")
REPLICAS = 3
EXCHANGES = ("bybit", "binance", "kraken")
SYMBOLS = ("BTC-USDT", "ETH-USDT", "SOL-USDT", "XRP-USDT", "DOGE-USDT", "ADA-USDT")
SPEED = 30  # divisor of `for` and all windows in alert rules
SCRAPE_SECONDS = 1
PER_SECOND = 60  # requests of the load per second
CLIENTS = 20  # concurrent requests of the load
SLOW_CLIENTS = 2000
TIMEOUT = 300.0  # seconds to wait for any condition
# Short times, so that a drill takes about one minute. Limits are the defaults.
SETTINGS = {
    "TICKER_TTL_SECONDS": "2",
    "CB_RESET_SECONDS": "5",
    "CB_MAX_OPEN_SECONDS": "10",
    "GEO_BLOCK_SECONDS": "10",
    "KRAKEN_BUDGET": "200/5",
    "REQUEST_TIMEOUT": "12",
    "LOG_LEVEL": "WARNING",
}
FAULTS: dict[str, dict[str, Any]] = {
    "down": {"refuse": True},
    "slow (4 s)": {"latency_ms": 4000},
    "geo-blocked": {"geo_block": True},
    "banned, Retry-After 10": {"status": 418, "headers": {"Retry-After": "10"}},
    "sending invalid data": {"body": "<html>maintenance</html>"},
}


@dataclass
class Seen:
    """One response, or a failed request."""

    at: float
    seconds: float
    status: int  # 0 without a response
    stale: bool
    retry_after: bool
    pinned: bool

    @property
    def failed(self) -> bool:
        return self.status != 200


@dataclass
class Outcome:
    """A row of the report. Times are in seconds."""

    drill: str
    requests: int = 0
    errors: int = 0
    detected: float | None = None
    alert: str = ""
    recovered: float | None = None
    notes: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)  # promises

    def promise(self, kept: bool, text: str) -> None:
        if not kept:
            self.broken.append(text)


class Deployment:
    """The copy of the deployment: containers, Prometheus and simulated exchanges."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.edge = free_port()
        self.prometheus = free_port()
        self.control = free_port()
        self._compose = shlex.split(os.environ.get("COMPOSE", "docker compose"))
        self._docker = shlex.split(os.environ.get("DOCKER", "docker"))

    def prepare(self) -> None:
        """Copy the project, shorten alert times, and publish the ports that the drills use."""
        for name in (*PARTS, "maintenance.py"):
            shutil.copy(ROOT / name, self.folder)
        for name in FOLDERS:
            shutil.copytree(
                ROOT / name, self.folder / name, ignore=shutil.ignore_patterns("__pycache__")
            )
        compose = yaml.safe_load((self.folder / "docker-compose.yml").read_text())
        compose["name"] = "virtuoso-drill"
        services = compose["services"]
        for unused in ("traffic", "grafana"):
            del services[unused]
        for name, port, inside in (
            ("prometheus", self.prometheus, 9090),
            ("sandbox", self.control, 9100),
        ):
            services[name] |= {
                "ports": [f"127.0.0.1:{port}:{inside}"],
                "networks": ["inner", "front"],
            }
        del services["sandbox"]["profiles"]
        (self.folder / "docker-compose.yml").write_text(yaml.safe_dump(compose, sort_keys=False))
        main = yaml.safe_load((self.folder / "prometheus.yml").read_text())
        main["global"] |= dict.fromkeys(
            ("scrape_interval", "evaluation_interval", "scrape_timeout"), f"{SCRAPE_SECONDS}s"
        )
        (self.folder / "prometheus.yml").write_text(yaml.safe_dump(main))
        for rules in (self.folder / "deploy" / "prometheus").glob("*.yml"):
            rules.write_text(quick(rules.read_text()))
        values = SETTINGS | {
            "REDIS_PASSWORD": "drill-redis",
            "GRAFANA_PASSWORD": "unused",
            "EDGE_PORT": str(self.edge),
        }
        values |= {"EDGE_TLS_PORT": str(free_port()), "TAG": "drill", "REGISTRY": ""}
        for number, name in enumerate(EXCHANGES, start=1):
            values[f"{name.upper()}_REST_URL"] = f"http://sandbox:910{number}"
            values[f"{name.upper()}_WS_URL"] = f"ws://sandbox:910{number}"
        (self.folder / ".env").write_text(
            "".join(f"{name}={value}\n" for name, value in values.items())
        )

    async def compose(self, *arguments: str) -> str:
        return await run(*self._compose, *arguments, folder=self.folder)

    async def docker(self, *arguments: str) -> str:
        return await run(*self._docker, *arguments, folder=self.folder)

    async def container(self, service: str) -> list[str]:
        return (await self.compose("ps", "-q", service)).split()

    async def healthy(self, container: str) -> bool:
        return (
            await self.docker("inspect", "-f", "{{.State.Health.Status}}", container)
        ).strip() == "healthy"

    async def spoil(self, session: aiohttp.ClientSession, name: str, knobs: dict[str, Any]) -> None:
        async with session.post(
            f"http://127.0.0.1:{self.control}/control/{name}", json=knobs | {"rate_limit": -1}
        ) as done:
            done.raise_for_status()

    async def value(self, session: aiohttp.ClientSession, query: str) -> float | None:
        """Query one number from Prometheus. Returns None if there is no result."""
        url = f"http://127.0.0.1:{self.prometheus}/api/v1/query"
        async with session.get(url, params={"query": query}) as answer:
            found = (await answer.json())["data"]["result"]
        return float(found[0]["value"][1]) if found else None

    async def firing(self, session: aiohttp.ClientSession) -> set[str]:
        """Return the firing alerts as `NAME` or `NAME EXCHANGE`."""
        async with session.get(f"http://127.0.0.1:{self.prometheus}/api/v1/alerts") as answer:
            alerts = (await answer.json())["data"]["alerts"]
        return {
            " ".join(filter(None, (alert["labels"]["alertname"], alert["labels"].get("exchange"))))
            for alert in alerts
            if alert["state"] == "firing"
        }


class Load:
    """Request prices at a constant rate through the edge until cancelled."""

    def __init__(self, deployment: Deployment, pinned: str = "") -> None:
        self.seen: list[Seen] = []
        self._url = f"http://127.0.0.1:{deployment.edge}"
        self._pinned = pinned  # every second request names this exchange

    async def run(self) -> None:
        async with asyncio.TaskGroup() as group:
            for number in range(CLIENTS):
                group.create_task(self._client(number))

    async def _client(self, number: int) -> None:
        timeout = aiohttp.ClientTimeout(total=20)
        pace = CLIENTS / PER_SECOND
        async with aiohttp.ClientSession(timeout=timeout) as session:
            await asyncio.sleep(pace * number / CLIENTS)
            for turn in range(number, 1_000_000):
                due = time.monotonic() + pace
                pinned = bool(self._pinned) and turn % 2 == 0
                query = f"?exchange={self._pinned}" if pinned else ""
                await self._ask(
                    session, f"/ticker/{SYMBOLS[turn // 2 % len(SYMBOLS)]}{query}", pinned
                )
                await asyncio.sleep(max(0.0, due - time.monotonic()))

    async def _ask(self, session: aiohttp.ClientSession, path: str, pinned: bool) -> None:
        started = time.monotonic()
        status = 0
        stale = False
        retry_after = False
        try:
            async with session.get(self._url + path) as answer:
                body = await answer.json(content_type=None)
                status = answer.status
                retry_after = "Retry-After" in answer.headers
                stale = body.get("stale") is True
        except (aiohttp.ClientError, TimeoutError, ValueError):
            status = 0
        self.seen.append(
            Seen(started, time.monotonic() - started, status, stale, retry_after, pinned)
        )


class Drill:
    """Context of one drill: the deployment, an HTTP session and the row of the report."""

    def __init__(self, name: str, deployment: Deployment, session: aiohttp.ClientSession) -> None:
        self.outcome = Outcome(name)
        self.deployment = deployment
        self.session = session

    @asynccontextmanager
    async def load(self, pinned: str = "") -> AsyncIterator[Load]:
        """Run the load in the background. The warm-up of 5 seconds is not counted."""
        load = Load(self.deployment, pinned)
        task = asyncio.create_task(load.run())
        try:
            await asyncio.sleep(5)
            load.seen.clear()
            yield load
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        unpinned = [seen for seen in load.seen if not seen.pinned]
        self.outcome.requests = len(load.seen)
        self.outcome.errors = sum(seen.failed for seen in load.seen)
        statuses = Counter(str(seen.status or "none") for seen in load.seen if seen.failed)
        if statuses:
            self.outcome.notes.append(
                "errors: " + ", ".join(f"{count} x {what}" for what, count in statuses.items())
            )
        slowest = max((seen.seconds for seen in unpinned), default=0.0)
        self.outcome.notes.append(f"slowest response {slowest:.2f} s")

    async def until(self, condition: Callable[[], Awaitable[bool]], what: str) -> float | None:
        """Wait for a condition. Returns the seconds, or None after `TIMEOUT`."""
        started = time.monotonic()
        while time.monotonic() - started < TIMEOUT:
            if await condition():
                return time.monotonic() - started
            await asyncio.sleep(0.2)
        self.outcome.broken.append(f"no {what} within {TIMEOUT:.0f} s")
        return None

    async def until_value(self, query: str, wanted: float, what: str) -> float | None:
        async def there() -> bool:
            return await self.deployment.value(self.session, query) == wanted

        return await self.until(there, what)

    async def until_alert(self, name: str) -> None:
        """Wait until an alert fires and record the time."""

        async def fires() -> bool:
            return name in await self.deployment.firing(self.session)

        if (seconds := await self.until(fires, f"alert {name}")) is not None:
            self.outcome.alert = (
                f"{name.removeprefix('Virtuoso')}, {(self.outcome.detected or 0) + seconds:.0f} s"
            )

    async def until_quiet(self, name: str) -> None:
        async def silent() -> bool:
            return name not in await self.deployment.firing(self.session)

        await self.until(silent, f"end of alert {name}")


async def redis(drill: Drill, breaking: str, mending: str) -> None:
    """Kill or freeze Redis, then start it again."""
    (container,) = await drill.deployment.container("redis")
    async with drill.load() as load:
        await drill.deployment.docker(breaking, container)
        down = 'count(virtuoso_cache_tier_up{tier="redis"} == 0)'
        drill.outcome.detected = await drill.until_value(
            down, REPLICAS, "sign of it in the metrics"
        )
        await drill.until_alert("VirtuosoRedisDown")
        await drill.deployment.docker(mending, container)
        up = 'sum(virtuoso_cache_tier_up{tier="redis"})'
        drill.outcome.recovered = await drill.until_value(up, REPLICAS, "recovery")
        await drill.until_quiet("VirtuosoRedisDown")
    drill.outcome.promise(
        not any(seen.failed for seen in load.seen), "a Redis outage causes no errors"
    )


async def replica(drill: Drill) -> None:
    """Kill one of three gateways and start it again."""
    victim = (await drill.deployment.container("app"))[0]
    async with drill.load() as load:
        await drill.deployment.docker("kill", victim)
        alive = 'count(up{job="virtuoso"} == 1)'
        drill.outcome.detected = await drill.until_value(
            alive, REPLICAS - 1, "sign of it in the metrics"
        )
        await asyncio.sleep(10)
        await drill.deployment.docker("start", victim)
        drill.outcome.recovered = await drill.until_value(alive, REPLICAS, "recovery")
        await asyncio.sleep(10)
    drill.outcome.alert = "none: two other gateways answer"
    drill.outcome.promise(
        not any(seen.failed for seen in load.seen), "a killed replica causes no errors"
    )


async def rolling_restart(drill: Drill) -> None:
    """Stop and start each gateway in turn."""
    async with drill.load() as load:
        for container in await drill.deployment.container("app"):
            await drill.deployment.docker("stop", "-t", "20", container)
            await drill.deployment.docker("start", container)
            await drill.until(partial(drill.deployment.healthy, container), "health")
            await asyncio.sleep(6)  # the edge resolves addresses every 5 s
    drill.outcome.alert = "none"
    drill.outcome.promise(
        not any(seen.failed for seen in load.seen), "a rolling restart causes no errors"
    )


async def slow_clients(drill: Drill) -> None:
    """Open 2000 connections that send one header byte per second."""
    closed = Counter[str]()
    stop = asyncio.Event()
    opened = 0

    async def drip() -> None:
        nonlocal opened
        while not stop.is_set():
            # The timeout of the edge starts here, even if a busy loop learns of the connection
            # later.
            started = time.monotonic()
            try:
                reader, writer = await asyncio.open_connection("127.0.0.1", drill.deployment.edge)
                opened += 1
                writer.write(b"GET /ticker/BTC-USDT HTTP/1.1\r\nHost: x\r\nX-Slow: ")
                while not stop.is_set() and not reader.at_eof() and time.monotonic() - started < 30:
                    writer.write(b"x")
                    await writer.drain()
                    with_timeout = asyncio.wait_for(reader.read(1024), 1)
                    try:
                        await with_timeout
                    except TimeoutError:
                        continue
                closed["by the edge" if time.monotonic() - started < 30 else "after 30 s"] += 1
                lives.append(time.monotonic() - started)
                writer.close()
            except OSError:
                closed["by the edge"] += 1
                await asyncio.sleep(0.5)

    lives: list[float] = []
    async with drill.load() as load:
        await asyncio.sleep(10)
        calm = median([seen.seconds for seen in load.seen])
        begun = time.monotonic()
        tasks = [asyncio.create_task(drip()) for _ in range(SLOW_CLIENTS)]
        await asyncio.sleep(30)
        beside = [seen.seconds for seen in load.seen if seen.at > begun + 3]
        stop.set()
        await asyncio.gather(*tasks, return_exceptions=True)
    drill.outcome.alert = "none: other clients get no errors"
    drill.outcome.notes += [
        f"{opened} slow connections opened, {SLOW_CLIENTS} at a time,"
        f" closed after {median(lives):.1f} s",
        f"median response {calm * 1000:.0f} ms before, {median(beside) * 1000:.0f} ms during",
    ]
    drill.outcome.detected = median(lives)
    drill.outcome.promise(
        not any(seen.failed for seen in load.seen), "slow clients cause no errors for others"
    )
    drill.outcome.promise(set(closed) == {"by the edge"}, "the edge closes slow clients")


async def exchange(drill: Drill, name: str, knobs: dict[str, Any]) -> None:
    """Let one exchange fail in one way. Half of the requests name this exchange."""
    async with drill.load(pinned=name) as load:
        await drill.deployment.spoil(drill.session, name, knobs)
        is_open = f'count(virtuoso_circuit_state{{exchange="{name}",state="open"}} == 1) > 0'

        async def opened() -> bool:
            return await drill.deployment.value(drill.session, is_open) is not None

        drill.outcome.detected = await drill.until(opened, "open breaker")
        await drill.until_alert(f"VirtuosoCircuitOpen {name}")
        await drill.deployment.spoil(drill.session, name, {})
        closed = f'sum(virtuoso_circuit_state{{exchange="{name}",state="closed"}})'
        drill.outcome.recovered = await drill.until_value(
            closed, REPLICAS, "closed breaker on all replicas"
        )
        await drill.until_quiet(f"VirtuosoCircuitOpen {name}")
    pinned = [seen for seen in load.seen if seen.pinned]
    drill.outcome.notes.append(
        f"requests that name {name}: {share(seen.stale for seen in pinned)} stale,"
        f" {share(seen.failed for seen in pinned)} errors"
    )
    others = [seen for seen in load.seen if not seen.pinned]
    answered = not any(seen.failed for seen in others)
    drill.outcome.promise(answered, "requests without an exchange are answered by other exchanges")
    has_retry_after = all(seen.retry_after for seen in pinned if seen.failed)
    drill.outcome.promise(has_retry_after, "errors have a Retry-After header")


async def everything(drill: Drill) -> None:
    """Stop all exchanges: stale values for a limited time, then 503."""
    async with drill.load() as load:
        begun = time.monotonic()
        for name in EXCHANGES:
            await drill.deployment.spoil(drill.session, name, {"refuse": True})
        is_open = 'count(virtuoso_circuit_state{state="open"} == 1)'
        drill.outcome.detected = await drill.until_value(
            is_open, REPLICAS * len(EXCHANGES), "all breakers open"
        )
        await drill.until_alert("VirtuosoAllCircuitsOpen")

        async def refused() -> bool:
            return bool(load.seen) and load.seen[-1].status == 503

        await drill.until(refused, "503 response")
        await asyncio.sleep(5)
        for name in EXCHANGES:
            await drill.deployment.spoil(drill.session, name, {})

        # Not until all breakers are closed: breakers of exchanges without requests wait for a
        # probe.
        async def fresh() -> bool:
            last = load.seen[-3 * CLIENTS :]
            return not any(seen.failed or seen.stale for seen in last)

        await asyncio.sleep(2)
        drill.outcome.recovered = await drill.until(fresh, "fresh responses for all")
    stale = [max(0.0, seen.at - begun) for seen in load.seen if seen.stale]
    failed = [seen for seen in load.seen if seen.failed]
    first = min((seen.at for seen in failed), default=begun) - begun
    drill.outcome.notes.append(
        f"first stale value after {min(stale, default=0):.0f} s, first 503 after {first:.0f} s"
    )
    drill.outcome.notes.append(f"{len(stale)} stale responses, {len(failed)} errors")
    drill.outcome.promise(bool(stale) and bool(failed), "stale values are served before 503")
    drill.outcome.promise(
        all(seen.status == 503 and seen.retry_after for seen in failed),
        "errors are 503 with Retry-After",
    )


INTRODUCTION = """\
# Drills

This report is for operators who want to know how failures of single parts affect clients.
`make drill` generates it: it starts the Compose deployment with three gateways and simulated
exchanges, breaks each part under load, and exits with an error if a promise is broken. Docker
Compose is required.

The promises:

- Failures of Redis or of one gateway, and a rolling restart, cause no errors.
- While one exchange fails, requests without `exchange` cause no errors.
- Errors have a `Retry-After` header.
- If all exchanges fail, stale values come before 503.
- The edge closes slow clients, which cause no errors for others.

The last run was on {where}.

- With `--only`, a run repeats some drills. The rows of the others are from earlier runs.
- Load: {CLIENTS} clients at the edge, {each} requests per second each, or fewer if responses are
  slow. In the drills of one exchange, every second request names that exchange.
- To keep a drill short, Prometheus scrapes every {SCRAPE_SECONDS} s, the times in alert rules are
  divided by {SPEED} (5 minutes become {minutes} s), and the gateways run with {settings}.

Columns:

- *Errors*: responses other than 200 and requests without a response, as seen by the clients.
- *Detected*: time from the command that breaks a part until Prometheus shows it: Redis is down on
  all gateways, a gateway is gone, or a breaker is open. For slow clients: until the edge closes
  them.
- *Alert*: time from the same command until the alert fires. Names are without the prefix
  `Virtuoso`. "none": no alert is expected.
- *Recovered*: time from the command that repairs the part until the state is as before. After all
  exchanges were down: until all responses are fresh. Breakers of exchanges without requests close
  later.
- "-": not measured, because nothing has to be detected or repaired.
"""


def quick(rules: str) -> str:
    """Divide all times in a rules file by `SPEED`."""

    def shorter(match: re.Match[str]) -> str:
        before, number, unit, after = match.groups()
        seconds = int(number) * {"s": 1, "m": 60, "h": 3600, "d": 86400}[unit]
        return f"{before}{max(seconds // SPEED, 4 * SCRAPE_SECONDS)}s{after}"

    windows = re.sub(r"(\[)(\d+)([smhd])(\])", shorter, rules)
    return re.sub(r"(for: )(\d+)([smhd])($)", shorter, windows, flags=re.MULTILINE)


def share(of: Any) -> str:
    flags = list(of)
    return f"{100 * sum(flags) / max(len(flags), 1):.0f} %"


def median(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 2] if values else 0.0


async def run(*command: str, folder: Path) -> str:
    """Run a command and return its output. Raises `RuntimeError` with the output on failure."""
    # Variables of the shell about another deployment would override the files of the copy.
    lines = (folder / ".env").read_text().splitlines()
    names = {line.partition("=")[0] for line in lines} | setting_names().keys()
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in names and not name.startswith("COMPOSE")
    }
    process = await asyncio.create_subprocess_exec(
        *command,
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
    )
    out, err = await process.communicate()
    if process.returncode:
        raise RuntimeError(
            f"{shlex.join(command)} failed: {err.decode()[-2000:] or out.decode()[-2000:]}"
        )
    return out.decode()


def drills(wanted: str) -> dict[str, Callable[[Drill], Awaitable[None]]]:
    """Return the drills with `wanted` in their name.

    The drill of all exchanges is last, because it affects the windows of alert rules.
    """
    found: dict[str, Callable[[Drill], Awaitable[None]]] = {
        "Redis killed": partial(redis, breaking="kill", mending="start"),
        "Redis frozen": partial(redis, breaking="pause", mending="unpause"),
        "One gateway of three killed": replica,
        "Rolling restart": rolling_restart,
        f"{SLOW_CLIENTS} slow clients": slow_clients,
    }
    for name in EXCHANGES:
        for fault, knobs in FAULTS.items():
            found[f"{name} {fault}"] = partial(exchange, name=name, knobs=knobs)
    found["All exchanges down"] = everything
    return {name: drill for name, drill in found.items() if wanted in name}


async def main() -> int:
    """Run the drills in a copy of the project and write the report. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--only",
        default="",
        help="run only drills whose name contains this text, and update their rows",
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="virtuoso-drill-") as folder:
        deployment = Deployment(Path(folder))
        deployment.prepare()
        try:
            print("starting three gateways behind the edge", flush=True)
            await deployment.compose("up", "-d", "--build", "--scale", f"app={REPLICAS}")
            pause = await pause_of_20_ms()
            outcomes = await run_drills(deployment, options.only)
            engine = (await deployment.docker("version", "-f", "{{.Server.Version}}")).strip()
            version = await deployment.compose("exec", "-T", "edge", "sh", "-c", "nginx -v 2>&1")
            nginx = version.strip().removeprefix("nginx version: ").replace("/", " ")
        finally:
            await deployment.compose("down", "-v", "--remove-orphans")
    machine = f"{os.cpu_count()} cores (a sleep of 20 ms took {pause * 1000:.0f} ms)"
    before = REPORT.read_text() if options.only and REPORT.exists() else ""
    REPORT.write_text(report(outcomes, f"{machine}, container engine {engine}, {nginx}", before))
    broken = [f"{outcome.drill}: {text}" for outcome in outcomes for text in outcome.broken]
    print("\n".join(broken) or "all promises were kept")
    return 1 if broken else 0


async def pause_of_20_ms() -> float:
    """Return the median seconds of a 20 ms sleep, which shows whether the machine is overloaded."""
    took = []
    for _ in range(50):
        started = time.monotonic()
        await asyncio.sleep(0.02)
        took.append(time.monotonic() - started)
    return median(took)


async def run_drills(deployment: Deployment, wanted: str) -> list[Outcome]:
    outcomes = []
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=10)) as session:
        for name in EXCHANGES:
            await deployment.spoil(session, name, {})
        for name, run_drill in drills(wanted).items():
            drill = Drill(name, deployment, session)
            await drill.until_value('count(up{job="virtuoso"} == 1)', REPLICAS, "three gateways")
            try:
                await run_drill(drill)
            except (RuntimeError, aiohttp.ClientError) as error:
                drill.outcome.broken.append(str(error))
            outcomes.append(drill.outcome)
            print(row(drill.outcome), *drill.outcome.broken, flush=True)
            for exchange_name in EXCHANGES:
                await deployment.spoil(session, exchange_name, {})
    return outcomes


def row(outcome: Outcome) -> str:
    times = [
        f"{seconds:.1f} s" if seconds is not None else "-"
        for seconds in (outcome.detected, outcome.recovered)
    ]
    cells = [
        outcome.drill,
        str(outcome.requests),
        str(outcome.errors),
        times[0],
        outcome.alert or "-",
        times[1],
    ]
    return f"| {' | '.join([*cells, '; '.join(outcome.notes)])} |"


def report(outcomes: Sequence[Outcome], where: str, before: str) -> str:
    """Return the report with these rows, and the rows of other drills from the old report."""
    names = list(drills(""))
    old_lines = before.splitlines()
    rows = {name: line for name in names for line in old_lines if line.startswith(f"| {name} |")}
    broken = [line for line in old_lines if line.startswith("- **")]
    for outcome in outcomes:
        rows[outcome.drill] = row(outcome)
        broken = [line for line in broken if not line.startswith(f"- **{outcome.drill}**")]
        broken += [f"- **{outcome.drill}**: {text}" for text in outcome.broken]
    kept = sum(not any(line.startswith(f"- **{name}**") for line in broken) for name in rows)
    settings = " ".join(
        f"`{name}={value}`" for name, value in SETTINGS.items() if name != "LOG_LEVEL"
    )
    values = {
        "where": where,
        "settings": settings,
        "minutes": 300 // SPEED,
        "each": PER_SECOND // CLIENTS,
    }
    lines = [
        INTRODUCTION.format(**values, **globals()),
        f"{kept} of {len(rows)} drills kept every promise.",
        "",
        "| Drill | Requests | Errors | Detected | Alert | Recovered | Notes |",
        "|---|---|---|---|---|---|---|",
        *[rows[name] for name in names if name in rows],
        "",
        *(["Broken promises:", "", *broken, ""] if broken else []),
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
