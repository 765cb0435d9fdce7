"""Tests of the edge: a real nginx with the project's configuration and start script.

Only addresses, ports and paths in the configuration are replaced, and the name resolution.
"""

import asyncio
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, closing, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed

from src.core.clock import SystemClock
from src.sandbox.server import Sandbox
from src.web.middleware import MAX_URL_BYTES
from tests.conftest import (
    Live,
    StartGateway,
    eventually,
    free_port,
    make_settings,
    sample,
    serve,
    tool,
)
from tests.processes import heed_signals

ROOT = Path(__file__).parents[2]
EDGE = ROOT / "deploy" / "edge"


class Edge:
    """A running edge with its port, an HTTP client and its logs."""

    def __init__(
        self, folder: Path, port: int, process: subprocess.Popen[bytes], client: httpx.AsyncClient
    ) -> None:
        self.folder = folder
        self.port = port
        self.process = process
        self.client = client
        self.url = f"http://127.0.0.1:{port}"

    async def get(self, path: str, **arguments: Any) -> httpx.Response:
        return await self.client.get(self.url + path, **arguments)

    async def raw(self, request: bytes, seconds: float = 60) -> bytes:
        """Send raw bytes. Returns everything until the edge closes or is idle for 1 s."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(request)
        received = b""
        with suppress(TimeoutError, ConnectionResetError):
            while data := await asyncio.wait_for(
                reader.read(65536), seconds if not received else 1
            ):
                received += data
        writer.close()
        return received

    def log(self) -> list[dict[str, Any]]:
        """Return the access log so far."""
        return [json.loads(line) for line in (self.folder / "out").read_text().splitlines()]

    def errors(self) -> str:
        return (self.folder / "err").read_text()


StartEdge = Callable[..., Awaitable[Edge]]


def configure(folder: Path, *gateways: str) -> int:
    """Write the configuration for these gateways (`host:port`). Returns the port of the edge."""
    port = free_port()
    health = free_port()
    inner = free_port()

    def replace(name: str, replacements: Mapping[str, str]) -> None:
        text = (EDGE / name).read_text()
        for old in replacements:
            assert old in text, f"{name} does not contain {old}"
        # In one pass, because a replacement may contain another search text.
        pattern = "|".join(map(re.escape, replacements))
        (folder / name).write_text(re.sub(pattern, lambda match: replacements[match[0]], text))

    (line,) = re.findall(r"server app:8000.*;", (EDGE / "upstream.conf").read_text())
    servers = " ".join(line.replace("app:8000", gateway) for gateway in gateways)
    common = {"/tmp/": f"{folder}/", "127.0.0.1:8082": f"127.0.0.1:{inner}"}
    clients = {
        "listen 8080 ": f"listen 127.0.0.1:{port} ",
        "listen 8081;": f"listen 127.0.0.1:{health};",
    }
    replace("nginx.conf", {"/etc/nginx/": f"{folder}/", **common, **clients})
    replace("upstream.conf", {**common, line: servers})
    (folder / "tls").mkdir(exist_ok=True)
    return port


class Script:
    """The start script with a stub for `getent`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        stub = folder / "bin" / "getent"
        stub.parent.mkdir()
        stub.write_text(f'#!/bin/sh\n[ "$*" = "ahostsv4 app" ] && cat "{folder}/addresses"\n')
        stub.chmod(0o755)
        self.path = f"{stub.parent}:{os.environ['PATH']}:/usr/sbin"

    def resolve(self, *addresses: str) -> None:
        """Change the addresses of the name atomically. Like getent, list each twice."""
        new = self.folder / "new"
        lines = [f"{address} STREAM app\n{address} DGRAM\n" for address in addresses]
        new.write_text("".join(lines))
        new.replace(self.folder / "addresses")

    def start(self, interval: float = 0.1) -> subprocess.Popen[bytes]:
        environment = {
            "PATH": self.path,
            "EDGE_CONFIG": str(self.folder),
            "EDGE_INTERVAL": str(interval),
        }
        with (self.folder / "out").open("ab") as out, (self.folder / "err").open("ab") as err:
            command = ["/bin/sh", str(EDGE / "start.sh")]
            return subprocess.Popen(
                command, stdout=out, stderr=err, env=environment, preexec_fn=heed_signals
            )

    @asynccontextmanager
    async def run(self, port: int, interval: float = 0.1) -> AsyncIterator[Edge]:
        """Run it until it listens; on leaving, end it by its process id."""
        process = self.start(interval)
        limits = httpx.Limits(max_connections=100)
        async with httpx.AsyncClient(timeout=90, limits=limits, verify=False) as client:  # noqa: S501 - loopback
            try:
                yield Edge(self.folder, port, process, client)
            finally:
                process.send_signal(signal.SIGTERM)
                await asyncio.to_thread(process.wait, 60)


@pytest.fixture
def script(tmp_path: Path) -> Script:
    tool("nginx", "nginx-light")
    return Script(tmp_path)


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


async def wait_until_listening(front: Edge) -> None:
    """Wait until both halves of an edge listen."""
    (inner,) = re.findall(r"listen 127.0.0.1:(\d+)", (front.folder / "upstream.conf").read_text())
    await eventually(
        lambda: front.process.poll() is not None or (listens(front.port) and listens(int(inner)))
    )
    assert front.process.poll() is None, front.errors()


@pytest.fixture
async def edge(tmp_path: Path) -> AsyncIterator[StartEdge]:
    """Start edges: `await edge(gateway, ...)` with gateways or addresses."""
    tool("nginx", "nginx-light")
    folders = (tmp_path / f"edge{number}" for number in range(9))
    async with AsyncExitStack() as stack:

        async def start_edge(*gateways: Any) -> Edge:
            folder = next(folders)
            folder.mkdir()
            addresses = [
                getattr(gateway, "url", gateway).removeprefix("http://") for gateway in gateways
            ]
            script = Script(folder)
            script.resolve("192.0.2.1")
            front = await stack.enter_async_context(script.run(configure(folder, *addresses)))
            await wait_until_listening(front)
            return front

        yield start_edge


class Peer:
    """A server that records the raw requests it receives, which a gateway does not show."""

    def __init__(self) -> None:
        self.url = ""
        self.requests: list[bytes] = []
        self.body = b"ok"
        self.go = asyncio.Event()
        self.go.set()

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                self.requests.append(await reader.readuntil(b"\r\n\r\n"))
                await self.go.wait()
                writer.write(
                    b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(self.body), self.body)
                )
                await writer.drain()
        writer.close()

    def headers(self) -> dict[str, str]:
        """Return the header fields of the last request."""
        lines = self.requests[-1].decode().split("\r\n")[1:]
        return {
            name.lower(): value
            for name, _, value in (line.partition(": ") for line in lines if line)
        }


@pytest.fixture
async def peer() -> AsyncIterator[Peer]:
    server_peer = Peer()
    server = await asyncio.start_server(server_peer.answer, "127.0.0.1", 0, backlog=1024)
    server_peer.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    yield server_peer
    server_peer.go.set()
    server.close()


class GatewayProcess:
    """A gateway in its own process, started as in the container, that can be killed."""

    def __init__(
        self, folder: Path, environment: Mapping[str, str], app: str = "src.api:app"
    ) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = folder / f"gateway{self.port}"
        command = [sys.executable, "-m", "uvicorn", app, "--port", str(self.port)]
        command += [
            "--timeout-keep-alive",
            "75",
            "--no-proxy-headers",
            "--no-server-header",
            "--no-access-log",
        ]
        command += [
            "--timeout-graceful-shutdown",
            "10",
            "--ws-max-size",
            "65536",
            "--ws-per-message-deflate",
            "false",
        ]
        base = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "REDIS_HOST": ""}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command, cwd=folder, env={**base, **environment}, stdout=log, stderr=log
            )

    async def wait_until_ready(self) -> None:
        """Wait until all market lists are loaded."""
        async with httpx.AsyncClient(timeout=30) as client:
            deadline = time.monotonic() + 240  # on an overloaded machine
            while time.monotonic() < deadline:
                with suppress(httpx.TransportError):
                    exchanges = (await client.get(f"{self.url}/exchanges")).json().values()
                    if all(exchange["markets"]["count"] for exchange in exchanges):
                        return
                assert self.process.poll() is None, self.log.read_text()
                await asyncio.sleep(0.02)
        pytest.fail(f"the gateway did not start: {self.log.read_text()[-2000:]}")

    def end(self, number: int = signal.SIGTERM) -> None:
        self.process.send_signal(number)
        self.process.wait(60)


async def start_with_markets(start: StartGateway, **settings: object) -> Live:
    """Start a gateway and wait until it has all market lists."""
    live = await start(wait=False, **settings)
    await eventually(lambda: len(live.gateway.markets.loaded_at) == len(live.gateway.manager.names))
    return live


@pytest.fixture
def processes(tmp_path: Path, sandbox: Sandbox) -> Iterator[Callable[..., GatewayProcess]]:
    """Start gateways in separate processes, with the sandbox as exchanges."""
    started: list[GatewayProcess] = []

    def start_process() -> GatewayProcess:
        started.append(GatewayProcess(tmp_path, sandbox.settings))
        return started[-1]

    yield start_process
    for gateway in started:
        if gateway.process.poll() is None:
            gateway.end(signal.SIGKILL)


def logged_requests(caplog: pytest.LogCaptureFixture) -> list[tuple[str, str]]:
    """Return method and path of each request that the gateways answered."""
    requests = [vars(record) for record in caplog.records if record.getMessage() == "request"]
    return [(request["method"], request["path"]) for request in requests]


@pytest.fixture
def requests(caplog: pytest.LogCaptureFixture) -> Callable[[], list[tuple[str, str]]]:
    """Return a function that lists the requests of gateways; request it before they start."""
    caplog.set_level(logging.DEBUG, "src.web.middleware")
    return lambda: logged_requests(caplog)


def status_of(answer: bytes) -> int:
    """Return the status of a raw response, or 0 without one."""
    found = re.match(rb"HTTP/1\.[01] (\d{3}) ", answer)
    return int(found[1]) if found else 0


def check_problem(answer: httpx.Response, status: int, code: str) -> None:
    """Check that a response of the edge has the form of the gateway errors."""
    assert (answer.status_code, answer.headers["content-type"]) == (
        status,
        "application/problem+json",
    )
    document = answer.json()
    assert (document["status"], document["code"], document["type"]) == (
        status,
        code,
        f"urn:virtuoso:error:{code}",
    )
    assert {"title", "detail"} < document.keys()
    assert answer.headers["cache-control"] == "no-store"
    assert re.fullmatch("[0-9a-f]{32}", answer.headers["x-request-id"])
    assert answer.headers.get("retry-after") == (
        str(document["retry_after"]) if "retry_after" in document else None
    )


async def test_responses_pass_unchanged(start: StartGateway, edge: StartEdge) -> None:
    """Body, ETag, age and request id are those of the gateway. 304, HEAD and %2F work."""
    live = await start_with_markets(start, exchange_timeout_seconds=30, request_timeout=30)
    front = await edge(live)
    direct = await live.get("/ticker/BTC/USDT")
    kept = ("etag", "cache-control", "content-length", "content-type", "age")
    for path in (
        "/ticker/BTC/USDT",
        "/ticker/BTC%2FUSDT",
        "/ticker/btc-usdt",
        "/ticker/BTC%2fUSDT?x=%2f",
    ):
        answer = await front.get(
            path, headers={"Accept-Encoding": "gzip", "X-Request-ID": "mine-1"}
        )
        assert answer.content == direct.content
        assert {name: answer.headers[name] for name in kept} == {
            name: direct.headers[name] for name in kept
        }
        assert answer.headers["x-request-id"] == "mine-1"
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["server"] == "nginx"
    again = await front.get("/ticker/BTC/USDT", headers={"If-None-Match": direct.headers["etag"]})
    assert (again.status_code, again.content, again.headers["etag"]) == (
        304,
        b"",
        direct.headers["etag"],
    )
    head = await front.client.head(front.url + "/ticker/BTC/USDT")
    assert (head.status_code, head.headers["content-length"], head.content) == (
        200,
        direct.headers["content-length"],
        b"",
    )
    assert (await front.get("/health")).json()["status"] == "healthy"


async def test_gateway_errors_pass_unchanged(
    start: StartGateway, edge: StartEdge, sandbox: Sandbox
) -> None:
    """The edge replaces no error of the gateway, whatever its status."""
    live = await start_with_markets(start, api_keys="me:right-right", client_rate_limit=14)
    front = await edge(live)
    for name in sandbox.urls:
        await sandbox.set(name, status=500)
    key = {"X-API-Key": "right-right"}
    cases = [
        ("/ticker/NO/SUCH", key, 404),
        ("/ticker/%00", key, 400),
        ("/orderbook/BTC-USDT?limit=0", key, 422),
        ("/ticker/BTC/USDT", {}, 401),
        ("/ticker/BTC/USDT", key, 503),
        ("/nope", key, 404),
        ("/health?" + "x" * MAX_URL_BYTES, key, 414),
    ]
    for path, headers, status in cases:
        answers = [await live.get(path, headers=headers), await front.get(path, headers=headers)]
        if path == "/ticker/%00":  # nginx does not take this one
            check_problem(answers.pop(), 400, "malformed_request")
        for answer in answers:
            assert answer.status_code == status
            assert answer.json()["code"] == answers[0].json()["code"]
            assert answer.json()["detail"] == answers[0].json()["detail"]
            assert ("retry-after" in answer.headers) == ("retry_after" in answer.json())
            assert ("www-authenticate" in answer.headers) == (status == 401)
    while (limited := await front.get("/ticker/x", headers=key)).status_code != 429:
        assert limited.status_code == 400
    assert limited.headers["ratelimit"].startswith('"client";r=0')
    assert limited.headers.get_list("retry-after") == [str(limited.json()["retry_after"])]


INSIDE = [  # spellings of the internal paths
    "/metrics", "//metrics", "/metrics/", "/metrics?x", "/metrics#", "/metrics#/../x", "/metrics;x",
    "/metrics%23", "/metrics%3f", "/metrics%20", "/metrics%0a", "/metrics%00", "/%6detrics",
    "/%6Detrics", "/METRICS", "/metricS", "/x/../metrics", "/x/%2e%2e/metrics", "/x/..%2fmetrics",
    "/x%2f..%2fmetrics", "/%2e/metrics", "/./metrics", "/ticker/../metrics",
    "/ticker/%2e%2e/metrics", "/ticker/..%2fmetrics", "/ticker/..%2f..%2fmetrics", "metrics",
    "/ticker/BTC/../../metrics", "/%2fmetrics", "/metrics%2f", "/metrics/..", "/metrics/../metrics",
    "/%256detrics", "/metrics%2f..%2fmetrics", "/\\metrics", "/x\\..\\metrics", "http://x/metrics",
    "http://x//metrics", "/%u006detrics", "http://x?/metrics", "http://x/y/../metrics",
    "http:/metrics", "http:///metrics", "/\xff/../metrics", "/metrics\xff", "/admin", "/admin/",
    "/admin/cache/clear", "//admin/cache/clear", "/%61dmin/breakers/reset", "/ADMIN/cache/clear",
    "/x/../admin/cache/clear", "/admin/../admin/cache/clear", "/ticker/..%2fadmin%2fcache%2fclear",
    "/;/admin/cache/clear", "/admin%2fcache%2fclear", "/admin/cache/clear?x",
    "http://x/admin/cache/clear", "/admin/cache/clear#x",
]  # fmt: skip


async def test_metrics_and_admin_are_not_reachable(
    requests: Callable[[], list[tuple[str, str]]], start: StartGateway, edge: StartEdge
) -> None:
    """No spelling and no method reaches these paths."""
    live = await start(wait=False, admin_token="t0ken-t0ken")
    front = await edge(live)
    inside = await live.raw(b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    assert b"virtuoso_build_info" in inside
    before = len(requests())
    fields = "Host: x\r\nAuthorization: Bearer t0ken-t0ken\r\nConnection: close\r\n\r\n"
    for target in INSIDE:
        for method in ("GET", "POST", "HEAD"):
            answer = await front.raw(f"{method} {target} HTTP/1.1\r\n{fields}".encode("latin-1"))
            page = (
                target == "http://x?/metrics" and method != "POST"
            )  # the path of this target is `/`
            assert status_of(answer) in ((200,) if page else (400, 404, 405)), (target, answer)
            assert (b"text/html" if page else b"application/problem+json") in answer
            assert b"virtuoso_" not in answer
    assert not [
        path for _, path in requests()[before:] if re.fullmatch("/(metrics|admin/.*|admin)", path)
    ]
    check_problem(await front.get("/metrics"), 404, "not_found")
    check_problem(await front.get("/edge/problem"), 404, "not_found")


async def test_other_methods_get_405(
    requests: Callable[[], list[tuple[str, str]]], start: StartGateway, edge: StartEdge
) -> None:
    """OPTIONS requests reach the gateway for CORS."""
    live = await start(wait=False, cors_origins="https://app.example")
    front = await edge(live)
    before = len(requests())
    for method in ("POST", "PUT", "DELETE", "PATCH", "TRACE", "PROPFIND", "GETX"):
        answer = await front.client.request(method, front.url + "/ticker/BTC/USDT")
        check_problem(answer, 405, "method_not_allowed")
        assert answer.headers["allow"] == "GET, HEAD, OPTIONS"
    assert len(requests()) == before
    asked = {"Origin": "https://app.example", "Access-Control-Request-Method": "GET"}
    answer = await front.client.options(front.url + "/ticker/BTC/USDT", headers=asked)
    assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (
        200,
        "https://app.example",
    )


async def test_sizes_are_limited(
    requests: Callable[[], list[tuple[str, str]]], start: StartGateway, edge: StartEdge
) -> None:
    """The longest URL of the gateway passes. The edge rejects more, and any body."""
    front = await edge(await start(wait=False))
    longest = "/health/live?" + "x" * (MAX_URL_BYTES - len("/health/live"))
    assert (await front.get(longest)).status_code == 200
    assert "exceed 8192" in (await front.get(longest + "x")).json()["detail"]
    before = len(requests())
    check_problem(await front.get("/health/live?" + "x" * 10_000), 414, "uri_too_long")
    check_problem(
        await front.get("/health/live", headers={"X-Big": "x" * 10_000}), 431, "headers_too_large"
    )
    many = {f"X-Big-{number}": "x" * 8000 for number in range(6)}
    check_problem(await front.get("/health/live", headers=many), 431, "headers_too_large")
    for content in (b"x", b"x" * 100_000):
        request = front.client.build_request("GET", front.url + "/health/live", content=content)
        check_problem(await front.client.send(request), 413, "body_not_allowed")
    chunked = await front.raw(
        b"GET /health/live HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
    )
    assert status_of(chunked) == 413
    assert len(requests()) == before
    four = {f"X-Big-{number}": "x" * 8300 for number in range(4)}  # above the limit of the gateway
    assert (
        (await front.get("/health/live", headers=four))
        .json()["detail"]
        .startswith("the headers exceed 32768")
    )


SECOND = b"GET /smuggled HTTP/1.1\r\nHost: x\r\n\r\n"
LENGTH = b"Content-Length: %d\r\n" % len(SECOND)
CHUNKED = b"Transfer-Encoding: chunked\r\n"
END = b"0\r\n\r\n" + SECOND
CHUNK = b"%x\r\n%b\r\n0\r\n\r\n" % (len(SECOND), SECOND)
UPGRADE = (
    b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAAP__\r\n"
)
SOCKET = (
    b"Connection: Upgrade\r\nUpgrade: websocket\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: eA==\r\n"
)
SMUGGLING = {  # header fields after Host, body, and allowed statuses
    "length and chunks": (LENGTH + CHUNKED, END, {400}),
    "chunks and length": (b"Transfer-Encoding: chunked\r\nContent-Length: 4\r\n", CHUNK, {400}),
    "chunked twice": (CHUNKED + CHUNKED, END, {400}),
    "chunked and identity": (CHUNKED + b"Transfer-Encoding: identity\r\n", END, {400}),
    "identity": (b"Transfer-Encoding: identity\r\n", END, {400, 413}),
    "chunked in a list": (b"Transfer-Encoding: chunked, identity\r\n", END, {400}),
    "xchunked": (b"Transfer-Encoding: xchunked\r\n", END, {400}),
    "blank before the colon": (b"Transfer-Encoding : chunked\r\n", END, {400}),
    "tab before chunked": (b"Transfer-Encoding:\tchunked\r\n", END, {400, 413}),
    "control before chunked": (b"Transfer-Encoding: \x0bchunked\r\n", END, {400}),
    "quoted": (b'Transfer-Encoding: "chunked"\r\n', END, {400}),
    "folded": (b"Transfer-Encoding:\r\n chunked\r\n", END, {400}),
    "two lengths": (b"Content-Length: 0\r\n" + LENGTH, SECOND, {400}),
    "a list of lengths": (b"Content-Length: 0, %d\r\n" % len(SECOND), SECOND, {400}),
    "length with a sign": (b"Content-Length: +0\r\n", SECOND, {400}),
    "negative length": (b"Content-Length: -1\r\n", SECOND, {400}),
    "hexadecimal length": (b"Content-Length: 0x0\r\n", SECOND, {400}),
    "length with a zero": (b"Content-Length: 00\r\nConnection: close\r\n", SECOND, {400, 413}),
    "GET with a body": (LENGTH, SECOND, {413}),
    "chunks": (CHUNKED, CHUNK, {413}),
    "expect": (b"Expect: 100-continue\r\n" + LENGTH, SECOND, {413}),
    "folded field": (b"X-A: 1\r\n X-B: 2\r\n", b"", {400}),
    "line feed in a value": (b"X-A: 1\rGET /smuggled HTTP/1.1\r\n", b"", {400}),
    "NUL": (b"X-A: 1\x002\r\n", b"", {400}),
    "blank in a name": (b"X A: 1\r\n", b"", {400}),
    "second Host": (b"Host: y\r\n", b"", {400}),
    "h2c": (UPGRADE, b"", {200}),
    "WebSocket": (SOCKET, b"", {200}),
    "hop by hop": (b"Connection: close, X-Forwarded-For, X-Request-ID, Host\r\n", b"", {200}),
    "bare line feeds": (b"X-A: 1\nX-B: 2\n", b"", {200, 400}),
}  # fmt: skip


async def smuggle(front: Edge, name: str) -> int:
    """Send one of these requests. Returns the status of its only response."""
    fields, body, allowed = SMUGGLING[name]
    answer = await front.raw(b"GET /health/live HTTP/1.1\r\nHost: x\r\n" + fields + b"\r\n" + body)
    assert status_of(answer) in allowed, (name, answer)
    assert answer.count(b"HTTP/1.1 ") == 1, (name, answer)
    assert b"\r\nupgrade" not in answer.lower()
    return status_of(answer)


@pytest.mark.parametrize("name", SMUGGLING)
async def test_request_smuggling_is_prevented(edge: StartEdge, peer: Peer, name: str) -> None:
    """Ambiguous requests are rejected. Others are forwarded as exactly one request."""
    status = await smuggle(await edge(peer), name)
    assert len(peer.requests) == (status == 200)
    if status == 200:
        assert peer.requests[0].startswith(b"GET /health/live HTTP/1.1\r\nHost: x\r\n")
        assert (
            not {"transfer-encoding", "content-length", "upgrade", "connection"}
            & peer.headers().keys()
        )


async def test_request_smuggling_is_prevented_at_a_gateway(
    requests: Callable[[], list[tuple[str, str]]], start: StartGateway, edge: StartEdge
) -> None:
    """A real gateway answers only the admitted requests, each with its own response."""
    front = await edge(await start_with_markets(start))
    before = len(requests())
    statuses = await asyncio.gather(*(smuggle(front, name) for name in SMUGGLING))
    others = await asyncio.gather(
        *(front.get(f"/ticker/{base}-USDT") for base in ("BTC", "ETH", "SOL") * 5)
    )
    assert {answer.json()["symbol"] for answer in others} == {"BTC/USDT", "ETH/USDT", "SOL/USDT"}
    found = [path for _, path in requests()[before:] if not path.startswith("/ticker/")]
    assert found == ["/health/live"] * statuses.count(200)


@pytest.mark.parametrize(
    ("request_bytes", "statuses"),
    [
        (b"GET /health/live HTTP/1.1\r\n\r\n", {400}),
        (b"GET /health/live HTTP/1.0\r\n\r\n", {200}),
        (b"GET /health/live HTTP/1.1\nHost: x\n\n", {200, 400}),
        (b"GET /health/live\r\n", {0, 400}),
        (b"GET /health/live HTTP/9.9\r\nHost: x\r\n\r\n", {400}),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", {400}),
        (b"GET http://other.example/health/live HTTP/1.1\r\nHost: x\r\n\r\n", {200}),
        (b"GET /health/live HTTP/1.1\r\nHost: a b/c\r\n\r\n", {400}),
        (b"GET /health /live HTTP/1.1\r\nHost: x\r\n\r\n", {400}),
        (b"get /health/live HTTP/1.1\r\nHost: x\r\n\r\n", {400}),
        (b"CONNECT x:443 HTTP/1.1\r\nHost: x\r\n\r\n", {400, 405}),
        (b"OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n", {400}),
        (b"\x00\x01\x02\r\n\r\n", {400}),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", {400}),
        (b"GET /ticker/x%00 HTTP/1.1\r\nHost: x\r\n\r\n", {400}),
    ],
    ids=[
        "no host",
        "1.0",
        "line feeds",
        "0.9",
        "version",
        "HTTP/2",
        "absolute",
        "bad host",
        "blank",
        "lower case",
        "connect",
        "star",
        "binary",
        "TLS",
        "NUL",
    ],
)
async def test_malformed_requests_are_rejected(
    edge: StartEdge, peer: Peer, request_bytes: bytes, statuses: set[int]
) -> None:
    """They get a problem document and are not forwarded. Old but valid forms are answered."""
    front = await edge(peer)
    answer = await front.raw(request_bytes)
    assert status_of(answer) in statuses, answer
    if status_of(answer) >= 400:
        assert answer.count(b"application/problem+json") == 1
        assert not peer.requests
    else:
        assert len(peer.requests) == 1
        assert peer.headers()["host"] in ("x", "other.example", "virtuoso")
    assert (await front.get("/health/live")).status_code == 200


async def test_client_cannot_claim_an_address(edge: StartEdge, peer: Peer) -> None:
    """The edge sets the headers about the client, and removes hop-by-hop headers."""
    front = await edge(peer)
    claimed = {
        "X-Forwarded-For": "203.0.113.9", "X-Forwarded-Host": "evil", "X-Forwarded-Proto": "gopher",
        "X-Real-IP": "203.0.113.9", "Forwarded": "for=203.0.113.9", "Authorization": "Bearer t0ken",
        "X-Request-ID": 'a b"c', "X-API-Key": "the key", "TE": "trailers", "Upgrade": "h2c",
        "Connection": "Upgrade, X-API-Key", "If-None-Match": '"tag"', "X_Forwarded_For": "1",
    }  # fmt: skip
    await front.get("/ticker/BTC%2FUSDT?x=%2F", headers=claimed)
    got = peer.headers()
    assert peer.requests[-1].startswith(b"GET /ticker/BTC%2FUSDT?x=%2F HTTP/1.1\r\n")
    assert (got["x-forwarded-for"], got["x-forwarded-proto"]) == ("127.0.0.1", "http")
    assert re.fullmatch("[0-9a-f]{32}", got["x-request-id"])
    assert (got["x-api-key"], got["if-none-match"]) == ("the key", '"tag"')
    removed = {
        "x-forwarded-host",
        "x-real-ip",
        "forwarded",
        "authorization",
        "te",
        "upgrade",
        "connection",
    }
    assert not (removed | {"x_forwarded_for"}) & got.keys()


async def test_configured_proxy_determines_the_client_address(
    script: Script, peer: Peer, tmp_path: Path
) -> None:
    """docs/deploying.md describes the file `proxy.conf` beside the certificate."""
    port = configure(tmp_path, peer.url.removeprefix("http://"))
    (words,) = re.findall(
        r"`(set_real_ip_from ADDRESS;[^`]*)`", (ROOT / "docs" / "deploying.md").read_text()
    )
    (tmp_path / "tls" / "proxy.conf").write_text(words.replace("ADDRESS", "127.0.0.1"))
    script.resolve("192.0.2.1")
    async with script.run(port) as front:
        await wait_until_listening(front)
        await front.get("/health", headers={"X-Forwarded-For": "198.51.100.1, 203.0.113.9"})
        # The last address is the one that the proxy has seen itself.
        assert peer.headers()["x-forwarded-for"] == "203.0.113.9"


@pytest.mark.full
async def test_slow_clients_are_disconnected(
    start: StartGateway, edge: StartEdge, peer: Peer
) -> None:
    """Slow headers are cut off after 3 s, bodies are rejected, other clients are served."""
    front = await edge(await start_with_markets(start))
    other = await edge(peer)
    peer.body = b"x" * 16_000_000

    async def drip() -> float:
        reader, writer = await asyncio.open_connection("127.0.0.1", front.port)
        began = time.monotonic()
        writer.write(b"GET /ticker/BTC/USDT HTTP/1.1\r\nHost: x\r\nX-Slow: ")
        closed = asyncio.create_task(reader.read())
        while not closed.done() and time.monotonic() < began + 30:
            with suppress(ConnectionError):
                writer.write(b"a")
                await writer.drain()
            await asyncio.wait([closed], timeout=0.25)
        with suppress(ConnectionError):
            assert (await closed).startswith((b"", b"HTTP/1.1 408"))
        writer.close()
        return time.monotonic() - began

    async def drip_body() -> float:
        began = time.monotonic()
        answer = await front.raw(
            b"GET /health HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\na"
        )
        assert status_of(answer) == 413
        return time.monotonic() - began

    async def stop_reading() -> None:
        """Read nothing of a long response until the edge gives up, as its log shows."""
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.connect(("127.0.0.1", other.port))
            client.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
            await eventually(lambda: (other.folder / "out").stat().st_size)
        assert 5 <= other.log()[0]["seconds"] < 30
        assert other.log()[0]["bytes"] < len(peer.body)

    slow = asyncio.gather(*(drip() for _ in range(200)), drip_body())
    reader = asyncio.create_task(stop_reading())
    slowest = 0.0
    count = 0
    while not (slow.done() and reader.done()):
        began = time.monotonic()
        answer = await front.get("/ticker/BTC/USDT")
        assert answer.status_code == 200
        slowest = max(slowest, time.monotonic() - began)
        count = count + 1
        await asyncio.sleep(0.02)
    await reader
    *drips, body = await slow
    assert all(2 < seconds < 20 for seconds in drips), (min(drips), max(drips))
    assert body < min(drips)
    assert count > 5
    assert slowest < 3, "a request waited for slow clients"


@pytest.mark.full
async def test_concurrent_requests_per_address_are_limited(edge: StartEdge, peer: Peer) -> None:
    """The limit is 500. The next request gets 429 until one of the others ends."""
    front = await edge(peer)
    peer.go.clear()

    async def ask() -> int:
        return status_of(
            await front.raw(b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", 20)
        )

    waiting = [asyncio.create_task(ask()) for _ in range(500)]
    await eventually(lambda: len(peer.requests) == 500)
    answer = await front.get("/health")
    check_problem(answer, 429, "too_many_requests")
    peer.go.set()
    assert set(await asyncio.gather(*waiting)) == {200}
    assert (await front.get("/health")).status_code == 200


@pytest.mark.full
async def test_killed_replica_fails_no_request(
    edge: StartEdge, peer: Peer, processes: Callable[..., GatewayProcess]
) -> None:
    """The other replica answers. Without any replica, clients get 502 until one is back."""
    first = processes()
    second = processes()
    await asyncio.gather(first.wait_until_ready(), second.wait_until_ready())
    front = await edge(first, second)
    stop = asyncio.Event()
    statuses = list[int]()

    async def load() -> None:
        while not stop.is_set():
            statuses.append((await front.get("/ticker/BTC/USDT")).status_code)

    tasks = [asyncio.create_task(load()) for _ in range(10)]
    await eventually(lambda: len(statuses) > 100)
    first.end(signal.SIGKILL)
    after = len(statuses)
    await eventually(lambda: len(statuses) > after + 200)
    stop.set()
    await asyncio.gather(*tasks)
    assert set(statuses) == {200}

    second.end(signal.SIGKILL)
    away = await front.get("/ticker/BTC/USDT")
    check_problem(away, 502, "gateway_unavailable")
    assert int(away.headers["retry-after"]) > 0
    server = await asyncio.start_server(peer.answer, "127.0.0.1", second.port)
    deadline = time.monotonic() + 60  # nginx retries gateways that were down after 5 s
    while (await front.get("/ticker/BTC/USDT")).text != "ok":
        assert time.monotonic() < deadline
        await asyncio.sleep(0.05)
    server.close()


async def test_access_log_contains_no_secrets(start: StartGateway, edge: StartEdge) -> None:
    """Lines are JSON of bounded length without queries and headers."""
    live = await start_with_markets(start, api_keys="me:c4nary-c4nary")
    front = await edge(live)
    headers = {
        "X-API-Key": "c4nary-c4nary",
        "X-Request-ID": "mine-1",
        "User-Agent": "c4nary",
        "Cookie": "c4nary=1",
        "Referer": "https://x.example/c4nary",
        "Authorization": "Bearer c4nary",
    }
    assert (await front.get("/ticker/BTC-USDT?api_key=c4nary", headers=headers)).status_code == 200
    await front.get("/metrics?c4nary=1", headers=headers)
    await front.raw(
        b'GET /"x%0d%0a\x1b?c4nary HTTP/1.1\r\nHost: x\r\nX-Request-ID: a"b\r\n'
        b"Connection: close\r\n\r\n"
    )
    await front.get("/" + "y" * 5000)
    await eventually(lambda: len(front.log()) == 4)
    assert "c4nary" not in (front.folder / "out").read_text() + front.errors()
    found, inside, *others = front.log()
    forged, long = sorted(others, key=lambda line: len(line["path"]))  # nginx may swap them
    assert (found["path"], found["status"], found["request_id"], found["method"]) == (
        "/ticker/BTC-USDT",
        "200",
        "mine-1",
        "GET",
    )
    assert found["upstream"] == live.url.removeprefix("http://")
    assert float(found["upstream_seconds"]) <= found["seconds"] + 0.002
    assert (inside["path"], inside["status"], inside["upstream"]) == ("/metrics", "404", "")
    assert forged["request_id"] not in ("mine-1", 'a"b')
    assert len(long["path"]) == 256


KEY = "c4nary-c4nary"
HANDSHAKE = {
    "Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13",
    "Sec-WebSocket-Key": "AAAAAAAAAAAAAAAAAAAAAA==",
}  # fmt: skip


@asynccontextmanager
async def streaming(lively: Sandbox, **settings: object) -> AsyncIterator[Live]:
    """Run a gateway with all market lists that streams from these exchanges."""
    async with serve(make_settings(lively, **settings), SystemClock()) as live:
        await eventually(
            lambda: len(live.gateway.markets.loaded_at) == len(live.gateway.manager.names)
        )
        yield live


async def receive(client: ClientConnection, *kinds: str) -> dict[str, Any]:
    """Return the next message of these types."""
    async with asyncio.timeout(60):
        while True:
            message: dict[str, Any] = json.loads(await client.recv())
            if message["type"] in kinds:
                return message


async def read_until_closed(client: ClientConnection) -> tuple[int, list[str]]:
    """Read until the connection closes. Returns the close code and the message types."""
    kinds = []
    async with asyncio.timeout(60):
        try:
            while True:
                kinds.append(json.loads(await client.recv())["type"])
        except ConnectionClosed as closed:
            return (closed.rcvd.code if closed.rcvd else 1006), kinds


async def test_websockets_pass(edge: StartEdge, lively: Sandbox) -> None:
    """Messages pass both ways, Origin is compared with Host, and one line is logged."""
    async with streaming(lively, api_keys=f"me:{KEY}") as live:
        front = await edge(live)
        address = f"ws://127.0.0.1:{front.port}/ws"
        subscribe = json.dumps(
            {"op": "subscribe", "symbols": ["BTC/USDT", "ETH/USDT"], "channel": "book"}
        )
        async with connect(f"{address}?token={KEY}", origin=front.url) as client:  # type: ignore[arg-type]
            await client.send(subscribe)
            assert (await receive(client, "subscribed"))["symbols"] == ["BTC/USDT", "ETH/USDT"]
            assert len((await receive(client, "snapshot"))["data"]["bids"]) == 10
            for _ in range(20):
                update = await receive(client, "update")
            assert update["sent_at"] > time.time() * 1000 - 10_000
            await client.send('{"op":"ping","id":7}')
            assert (await receive(client, "pong"))["id"] == 7
        async with connect(address, additional_headers={"X-API-Key": KEY}) as client:
            await client.send(subscribe)
            await receive(client, "update")
        other = f"http://127.0.0.1:{front.port + 1}"  # a different port is a different origin
        async with connect(f"{address}?token={KEY}", origin=other) as client:  # type: ignore[arg-type]
            assert await read_until_closed(client) == (1008, ["error"])
        await eventually(lambda: len(front.log()) == 3)
    for line in front.log():
        assert (line["path"], line["status"], line["upstream"]) == (
            "/ws",
            "101",
            live.url.removeprefix("http://"),
        )


async def test_server_sent_events_are_not_buffered(edge: StartEdge, lively: Sandbox) -> None:
    """The gateway also notices when a client disconnects."""
    # Slow updates: a buffering nginx would wait for about 1500 bytes, which is more than one event.
    for name in lively.urls:
        await lively.set(name, rate_limit=-1, push_ms=3000)
    async with streaming(lively) as live:
        front = await edge(live)
        late = []
        kinds = list[str]()
        async with front.client.stream("GET", f"{front.url}/stream/BTC-USDT") as answer:
            assert (answer.status_code, answer.headers["cache-control"]) == (200, "no-store")
            assert answer.headers["content-type"].startswith("text/event-stream")
            async for line in answer.aiter_lines():
                if line.startswith("event: "):
                    kinds.append(line[7:])
                if line.startswith("data: "):
                    late.append(time.time() - json.loads(line[6:])["sent_at"] / 1000)
                if kinds.count("update") == 3 and len(late) == len(kinds):
                    break
        assert kinds[0] == "snapshot"
        assert sorted(late)[len(late) // 2] < 1, late
        await eventually(lambda: front.log())
        assert front.log()[0]["status"] == "200"
        deadline = time.monotonic() + 60
        while (
            'virtuoso_stream_subscribers{transport="sse"} 0.0'
            not in (await live.get("/metrics")).text
        ):
            assert time.monotonic() < deadline


async def drop_connection(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Behave like a gateway that dies at a request or within a stream."""
    request = await reader.readuntil(b"\r\n\r\n")
    if b"/ws" in request:
        writer.write(
            b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\n"
            b"Connection: Upgrade\r\n\r\n\x81\x02{}"
        )
    elif b"late" in request:
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nid: 1\r\n")
    await writer.drain()
    writer.transport.abort()


async def test_logs_contain_no_keys_of_streams(edge: StartEdge, lively: Sandbox) -> None:
    """Neither half logs a query, also for wrong keys and failing gateways."""
    handshake = "".join(f"{name}: {value}\r\n" for name, value in HANDSHAKE.items())
    targets = [
        f"/ws?token={KEY}",
        f"/ws?token={KEY}x",
        f"/stream/BTC-USDT?token={KEY}x",
        f"/stream/late?token={KEY}",
    ]
    dying = await asyncio.start_server(drop_connection, "127.0.0.1", 0)
    addresses = [f"127.0.0.1:{port}" for port in (dying.sockets[0].getsockname()[1], free_port())]
    async with dying, streaming(lively, api_keys=f"me:{KEY}") as live:
        for gateway in (live, *addresses):
            front = await edge(gateway)
            for target in targets:
                fields = handshake if "/ws" in target else "Connection: close\r\n"
                assert await front.raw(f"GET {target} HTTP/1.1\r\nHost: x\r\n{fields}\r\n".encode())
            await front.raw(
                f"POST {targets[0]} HTTP/1.1\r\nHost: x\r\nContent-Length: 5000\r\n\r\n".encode()
            )
            await front.raw(b"GET /health?quoted HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            await eventually(lambda front=front: len(front.log()) == len(targets) + 2)  # type: ignore[misc]
            assert "c4nary" not in (front.folder / "out").read_text() + front.errors()
            # Requests without a key are logged with their query when they fail.
            assert ("quoted" in front.errors()) is (gateway is not live)


async def test_only_websockets_are_upgraded(edge: StartEdge, peer: Peer) -> None:
    """Only at /ws. The limits of other requests apply, and Host keeps its port."""
    front = await edge(peer)
    handshake = "".join(f"{name}: {value}\r\n" for name, value in HANDSHAKE.items())
    claimed = (
        "Host: Name:8443\r\nX-Forwarded-For: 203.0.113.9\r\n"
        "X-API-Key: the key\r\nAuthorization: Bearer t0ken\r\n"
    )

    async def passed(target: str, fields: str) -> dict[str, str]:
        await front.raw(f"GET {target} HTTP/1.1\r\n{claimed}{fields}\r\n".encode())
        return peer.headers()

    got = await passed("/ws?token=a%2Bb", handshake)
    assert peer.requests[-1].startswith(b"GET /ws?token=a%2Bb HTTP/1.1\r\n")
    assert (got["upgrade"], got["connection"], got["sec-websocket-version"]) == (
        "websocket",
        "upgrade",
        "13",
    )
    assert (got["host"], got["x-forwarded-for"], got["x-api-key"]) == (
        "Name:8443",
        "127.0.0.1",
        "the key",
    )
    assert "authorization" not in got
    for target, fields in (
        ("/ws", handshake.replace(": websocket", ": h2c")),
        ("/ws/", handshake),
        ("/WS", handshake),
        ("/stream/BTC-USDT", handshake),
        ("/ticker/ws", handshake),
        ("/ws", ""),
    ):
        got = await passed(target, fields)
        assert not {"upgrade", "connection"} & got.keys(), target
        assert got["host"] == "name"
    before = len(peer.requests)
    for path in ("/ws", "/stream/BTC-USDT"):
        check_problem(await front.client.post(front.url + path), 405, "method_not_allowed")
        request = front.client.build_request("GET", front.url + path, content=b"x")
        check_problem(await front.client.send(request), 413, "body_not_allowed")
        check_problem(await front.get(path + "?" + "x" * 10_000), 414, "uri_too_long")
    check_problem(await front.get("/stream/..%2fmetrics"), 404, "not_found")
    assert len(peer.requests) == before


@pytest.mark.full
async def test_concurrent_streams_per_address_are_limited(edge: StartEdge, peer: Peer) -> None:
    """The limit is 200. Other requests are counted separately."""
    front = await edge(peer)
    peer.go.clear()
    handshake = "".join(f"{name}: {value}\r\n" for name, value in HANDSHAKE.items())
    kinds = [f"GET /ws?token={KEY} HTTP/1.1\r\nHost: x\r\n{handshake}\r\n".encode()]
    kinds.append(f"GET /stream/BTC-USDT?token={KEY} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    waiting = [asyncio.create_task(front.raw(request)) for request in kinds * 100]
    await eventually(lambda: len(peer.requests) == 200)
    check_problem(await front.get(f"/stream/BTC-USDT?token={KEY}"), 429, "too_many_requests")
    assert status_of(await front.raw(kinds[0])) == 429
    other = asyncio.create_task(front.get("/health"))
    await eventually(lambda: len(peer.requests) == 201)
    peer.go.set()
    assert {status_of(answer) for answer in await asyncio.gather(*waiting)} == {200}
    assert (await other).status_code == 200
    assert (await front.get("/stream/BTC-USDT")).status_code == 200
    assert "c4nary" not in front.errors()


@pytest.mark.full
async def test_client_that_does_not_read_affects_no_others(
    edge: StartEdge, lively: Sandbox
) -> None:
    """The gateway conflates its updates, or the edge disconnects it."""
    for name in lively.urls:
        await lively.set(name, rate_limit=-1, push_ms=50)
    wanted = {"op": "subscribe", "exchange": "all", "channel": "book", "levels": 50}
    most = json.dumps(
        wanted | {"symbols": ["BTC/USDT", "ETH/USDT", "SOL/USDT", "XRP/USDT", "DOGE/USDT"]}
    )
    async with streaming(lively) as live:
        front = await edge(live)
        address = f"ws://127.0.0.1:{front.port}/ws"
        late = list[float]()
        with closing(socket.socket()) as small:
            small.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            small.setblocking(False)
            await asyncio.get_running_loop().sock_connect(small, ("127.0.0.1", front.port))
            async with (
                connect(address) as reader,
                connect(
                    address, sock=small, max_queue=1, ping_interval=None, close_timeout=0.1
                ) as lazy,
            ):
                await reader.send('{"op":"subscribe","symbols":["BTC/USDT"]}')
                await receive(reader, "snapshot")
                conflated = sample("stream_conflated_total")
                await lazy.send(most)
                while sample("stream_conflated_total") == conflated and not front.log():
                    late.append(time.time() - (await receive(reader, "update"))["sent_at"] / 1000)
                for _ in range(50):
                    late.append(time.time() - (await receive(reader, "update"))["sent_at"] / 1000)
                lazy.transport.abort()
    assert sorted(late)[len(late) // 2] < 2, sorted(late)


@pytest.mark.full
async def test_gateway_shutdown_closes_streams_through_the_edge(
    edge: StartEdge, lively: Sandbox, tmp_path: Path
) -> None:
    """WebSockets close with 1001, event streams end normally; then clients get 502."""
    gateway = GatewayProcess(tmp_path, lively.settings)
    events = list[str]()
    try:
        await gateway.wait_until_ready()
        front = await edge(gateway)
        address = f"ws://127.0.0.1:{front.port}/ws"

        async def follow_events() -> None:
            async with front.client.stream("GET", f"{front.url}/stream/BTC-USDT") as answer:
                async for line in answer.aiter_lines():
                    events.append(line)

        following = asyncio.create_task(follow_events())
        await eventually(lambda: "event: update" in events)
        async with connect(address) as client:
            await client.send('{"op":"subscribe","symbols":["BTC/USDT"]}')
            await receive(client, "update")
            gateway.process.terminate()
            code, kinds = await read_until_closed(client)
        assert (code, set(kinds) <= {"update", "snapshot", "heartbeat"}) == (1001, True)
        await asyncio.wait_for(following, 30)
        assert await asyncio.to_thread(gateway.process.wait, 30) in (0, -signal.SIGTERM)
        check_problem(await front.get("/stream/BTC-USDT"), 502, "gateway_unavailable")
    finally:
        if gateway.process.poll() is None:
            gateway.end(signal.SIGKILL)


async def test_edge_reports_its_own_health(edge: StartEdge) -> None:
    """The internal listener answers without a gateway, and serves nothing else."""
    front = await edge(f"127.0.0.1:{free_port()}")
    (port,) = re.findall(r"listen 127.0.0.1:(\d+);", (front.folder / "nginx.conf").read_text())
    answer = await front.client.get(f"http://127.0.0.1:{port}/edge/health")
    assert (answer.status_code, answer.text) == (200, "ok\n")
    scraped = await front.client.get(f"http://127.0.0.1:{port}/metrics")
    assert scraped.headers["content-type"].startswith("text/plain")
    (family,) = text_string_to_metric_families(scraped.text)
    assert (family.name, family.samples[0].value >= 1) == ("virtuoso_edge_connections", True)
    assert (await front.client.get(f"http://127.0.0.1:{port}/health")).status_code == 404
    check_problem(await front.get("/edge/health"), 502, "gateway_unavailable")


def make_certificate(folder: Path) -> None:
    command = [
        tool("openssl", "openssl"),
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:prime256v1",
    ]
    command += [
        "-nodes",
        "-days",
        "2",
        "-subj",
        "/CN=localhost",
        "-keyout",
        "tls.key",
        "-out",
        "tls.crt",
    ]
    subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=60)


async def test_tls_example_works(start: StartGateway, script: Script, tmp_path: Path) -> None:
    """Both ports serve the same. TLS 1.2 or newer only; HSTS over HTTPS only."""
    live = await start_with_markets(start)
    secure = free_port()
    port = configure(tmp_path, live.url.removeprefix("http://"))
    make_certificate(tmp_path / "tls")
    example = (EDGE / "tls" / "tls.conf.example").read_text()
    assert "listen 8443 ssl" in example
    config = example.replace("/etc/nginx/", f"{tmp_path}/").replace(
        "listen 8443", f"listen 127.0.0.1:{secure}"
    )
    (tmp_path / "tls" / "tls.conf").write_text(config)
    script.resolve("192.0.2.1")
    async with script.run(port) as front:
        await wait_until_listening(front)
        await eventually(lambda: listens(secure))
        answer = await front.client.get(f"https://127.0.0.1:{secure}/ticker/BTC/USDT")
        assert answer.status_code == 200
        assert answer.headers["strict-transport-security"] == "max-age=31536000"
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert "strict-transport-security" not in (await front.get("/ticker/BTC/USDT")).headers
        check_problem(
            await front.client.get(f"https://127.0.0.1:{secure}//metrics"), 404, "not_found"
        )
        check_problem(
            await front.client.get(f"http://127.0.0.1:{secure}/health"), 400, "malformed_request"
        )
        assert [await accepts_tls(secure, f"tls1_{minor}") for minor in (1, 2, 3)] == [
            False,
            True,
            True,
        ]
        assert "warn" not in front.errors()


async def accepts_tls(port: int, version: str) -> bool:
    """True if the edge accepts this TLS version, for example `tls1_2`."""
    command = [
        tool("openssl", "openssl"),
        "s_client",
        "-connect",
        f"127.0.0.1:{port}",
        f"-{version}",
    ]
    command += ["-cipher", "ALL:@SECLEVEL=0"]  # otherwise the client rejects old versions
    nothing = subprocess.DEVNULL
    process = await asyncio.create_subprocess_exec(
        *command, stdin=nothing, stdout=nothing, stderr=nothing
    )
    return await asyncio.wait_for(process.wait(), 60) == 0


@pytest.fixture
async def other() -> AsyncIterator[Peer]:
    """A second peer with a different response."""
    second_peer = Peer()
    second_peer.body = b"other"
    server = await asyncio.start_server(second_peer.answer, "127.0.0.1", 0)
    second_peer.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    yield second_peer
    server.close()


def switch(folder: Path, old: Peer, new: Peer) -> None:
    """Let the inner half use the other peer after its next reload."""
    file = folder / "upstream.conf"
    file.write_text(
        file.read_text().replace(old.url.removeprefix("http://"), new.url.removeprefix("http://"))
    )


@pytest.mark.full
async def test_edge_follows_address_changes(script: Script, peer: Peer, other: Peer) -> None:
    """502 without an address, a reload for changes but not for another order."""
    script.resolve()
    port = configure(script.folder, peer.url.removeprefix("http://"))
    async with script.run(port) as front:
        await eventually(
            lambda: front.errors().count("cannot be resolved yet") >= 2 and listens(port)
        )
        check_problem(await front.get("/health"), 502, "gateway_unavailable")
        script.resolve("192.0.2.1", "192.0.2.2")
        await wait_until_listening(front)
        assert (await front.get("/health")).text == "ok"

        upstream = script.folder / "upstream.conf"
        text = upstream.read_text()
        upstream.write_text("this is no configuration")
        script.resolve("192.0.2.3")
        await eventually(lambda: "unexpected end of file" in front.errors())
        assert (await front.get("/health")).text == "ok"
        upstream.write_text(text)
        switch(script.folder, peer, other)
        await eventually(lambda: "app is now at 192.0.2.3" in front.errors())
        deadline = time.monotonic() + 60
        while (await front.get("/health")).text != "other":
            assert time.monotonic() < deadline

        script.resolve("192.0.2.3", "192.0.2.1")
        await eventually(lambda: "app is now at 192.0.2.1 192.0.2.3" in front.errors())
        script.resolve("192.0.2.1", "192.0.2.3")
        await asyncio.sleep(0.3)  # several lookups that may not cause a reload
        script.resolve()
        await asyncio.sleep(0.3)
        assert front.errors().count("is now at") == 2
        assert (await front.get("/health")).text == "other"


@pytest.mark.full
async def test_reload_fails_no_request(script: Script, peer: Peer) -> None:
    """Clients with kept connections send requests during ten address changes."""
    script.resolve("192.0.2.1")
    port = configure(script.folder, peer.url.removeprefix("http://"))
    stop = asyncio.Event()
    answered = 0

    async def ask(pause: float) -> None:
        nonlocal answered
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        while not stop.is_set():
            writer.write(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
            answer = await reader.readuntil(b"\r\n\r\n") + await reader.readexactly(2)
            assert (status_of(answer), answer[-2:]) == (200, b"ok")
            answered += 1
            await asyncio.sleep(pause)
        writer.close()

    async with script.run(port) as front:
        await wait_until_listening(front)
        clients = [asyncio.create_task(ask(pause)) for pause in (0, 0.002, 0.01, 0.05) * 5]
        for number in range(10):
            script.resolve(f"192.0.2.{number}")
            said = f"app is now at 192.0.2.{number} "
            await eventually(lambda said=said: said in front.errors())  # type: ignore[misc]
        stop.set()
        await asyncio.gather(*clients)
    assert answered > 200


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGQUIT, signal.SIGINT])
async def test_signal_lets_requests_finish(script: Script, peer: Peer, number: int) -> None:
    """nginx completes open requests, and no process is left."""
    script.resolve("192.0.2.1")
    port = configure(script.folder, peer.url.removeprefix("http://"))
    async with script.run(port) as front:
        await wait_until_listening(front)
        peer.go.clear()
        asked = asyncio.create_task(front.get("/health"))
        await eventually(lambda: peer.requests)
        masters = [
            int((script.folder / name).read_text()) for name in ("nginx.pid", "upstream.pid")
        ]
        front.process.send_signal(number)
        await eventually(lambda: not listens(port))
        assert front.process.poll() is None
        peer.go.set()
        assert (await asked).text == "ok"
        assert await asyncio.to_thread(front.process.wait, 60) == 0
        for master in masters:
            with pytest.raises(ProcessLookupError):
                os.kill(master, 0)


async def test_failed_nginx_is_restarted_or_ends_the_script(script: Script, peer: Peer) -> None:
    """The inner half is restarted. The script exits with the code of the outer half."""
    script.resolve("192.0.2.1")
    port = configure(script.folder, peer.url.removeprefix("http://"))
    async with script.run(port) as front:
        await wait_until_listening(front)
        os.kill(int((script.folder / "upstream.pid").read_text()), signal.SIGTERM)
        await eventually(lambda: "the inner nginx has ended" in front.errors())
        await wait_until_listening(front)
        assert (await front.get("/health")).text == "ok"
        os.kill(int((script.folder / "nginx.pid").read_text()), signal.SIGTERM)
        assert await asyncio.to_thread(front.process.wait, 60) == 0
    (script.folder / "nginx.conf").write_text("this is no configuration")
    async with script.run(port) as front:
        assert await asyncio.to_thread(front.process.wait, 60) == 1


def test_immediate_failure_of_nginx_ends_the_script(script: Script) -> None:
    """Even if it fails before the inner half handles signals."""
    nginx = script.folder / "bin" / "nginx"
    nginx.write_text("#!/bin/sh\nexit 1\n")
    nginx.chmod(0o755)
    script.resolve("192.0.2.1")
    started = [script.start() for _ in range(30)]
    try:
        assert {process.wait(60) for process in started} == {1}
    finally:
        for process in started:
            process.kill()
            process.wait()


async def test_early_stop_signal_is_repeated(script: Script) -> None:
    """Background processes of a shell ignore QUIT until nginx installs its handler."""
    nginx = script.folder / "bin" / "nginx"
    started = script.folder / "started"
    install_handler = "signal.signal(signal.SIGQUIT, lambda *_: os._exit(7))"
    steps = [
        "import os, signal, time",
        f"print(file=open({str(started)!r}, 'a'))",
        "time.sleep(0.5)",
        install_handler,
        "time.sleep(60)",
    ]
    nginx.write_text("\n".join([f"#!{sys.executable}", *steps]))
    nginx.chmod(0o755)
    script.resolve("192.0.2.1")
    process = script.start()
    try:
        await eventually(lambda: started.exists() and len(started.read_text()) == 2)
        process.send_signal(signal.SIGTERM)
        assert await asyncio.to_thread(process.wait, 60) == 7
    finally:
        process.kill()


@pytest.mark.full
async def test_signal_interrupts_the_wait_for_addresses(script: Script) -> None:
    """The script ends immediately, however long the interval is."""
    script.resolve()
    port = configure(script.folder, "127.0.0.1:1")
    async with script.run(port, interval=20) as front:
        await eventually(lambda: "cannot be resolved yet" in front.errors() and listens(port))
        front.process.send_signal(signal.SIGTERM)
        assert await asyncio.to_thread(front.process.wait, 60) == 0


def test_start_script_passes_shellcheck() -> None:
    """There are no warnings."""
    found = subprocess.run(
        [tool("shellcheck", "shellcheck"), EDGE / "start.sh"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert found.stdout + found.stderr == ""
