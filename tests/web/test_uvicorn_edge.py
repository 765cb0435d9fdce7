"""The gateway behind each of uvicorn's protocols, and behind a server that exposes no internals."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import httpx
import pytest
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed

from config import setting_names
from src.core.clock import SystemClock
from src.sandbox.server import Sandbox
from src.web import uvicorn_edge, websocket
from tests.conftest import FakeClock, eventually, free_port, make_settings, serve

START_SECONDS = 60.0
TICKER = "/ticker/BTC-USDT?exchange=kraken"
STREAM = "/stream/BTC-USDT?exchange=kraken"
SUBSCRIBE = json.dumps({"op": "subscribe", "symbols": ["BTC-USDT"], "exchange": "kraken"})
LIMIT = 40
# The second pair has no raw frames: `websockets` is uvicorn's older protocol.
PROTOCOLS = [
    ("httptools", "websockets-sansio"),
    ("h11", "websockets-sansio"),
    ("h11", "websockets"),
]


class Process:
    """A gateway in a separate process, and its log."""

    def __init__(self, sandbox: Sandbox, http: str, ws: str) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed by `process`
        settings = sandbox.settings | {"CLIENT_RATE_LIMIT": str(LIMIT), "LOG_FORMAT": "json"}
        command = [sys.executable, "-m", "uvicorn", "src.api:app", "--port", str(self.port)]
        self.process = subprocess.Popen(
            [*command, "--http", http, "--ws", ws],
            env={**os.environ, **dict.fromkeys(setting_names(), ""), **settings, "REDIS_HOST": ""},
            stderr=self.log,
        )

    def events(self) -> list[str]:
        """Return the events that were logged, without the warnings of Python itself."""
        self.log.seek(0)
        lines = [line for line in self.log if line.startswith("{")]
        return [json.loads(line)["event"] for line in lines]


@asynccontextmanager
async def process(sandbox: Sandbox, http: str, ws: str) -> AsyncIterator[Process]:
    """Run a gateway, and yield it when it is ready."""
    gateway = Process(sandbox, http, ws)
    try:
        async with httpx.AsyncClient() as client, asyncio.timeout(START_SECONDS):
            while not await _is_ready(client, gateway.url):  # noqa: ASYNC110 - in another process
                await asyncio.sleep(0.05)
        yield gateway
    finally:
        gateway.process.kill()
        gateway.process.wait()
        gateway.log.close()


async def _is_ready(client: httpx.AsyncClient, url: str) -> bool:
    try:
        return (await client.get(f"{url}/health/ready")).status_code == 200
    except httpx.TransportError:
        return False


async def receive(connection: ClientConnection, *types: str) -> list[dict[str, Any]]:
    """Return one message of each type, in this order."""
    messages = []
    for expected in types:
        message: dict[str, Any] = {}
        while message.get("type") != expected:
            message = json.loads(await asyncio.wait_for(connection.recv(), 60))
        messages.append(message)
    return messages


async def close_code(connection: ClientConnection) -> int | None:
    """Read messages until the gateway closes the connection; return the code of the close frame."""
    with suppress(ConnectionClosed):
        async with asyncio.timeout(60):
            async for _ in connection:
                pass
    return connection.close_code


async def check_rest(client: httpx.AsyncClient, url: str) -> None:
    """Check answers of the app and of the fast path, HEAD and errors."""
    first = await client.get(url + TICKER, headers={"X-Request-ID": "first"})
    second = await client.get(url + TICKER, headers={"If-None-Match": first.headers["etag"]})
    assert (first.status_code, second.status_code) == (200, 304)
    assert first.headers["x-request-id"] == "first"
    assert second.headers["cache-status"].startswith("virtuoso; hit; detail=memory")
    head = await client.head(url + TICKER)
    assert (head.status_code, head.content) == (200, b"")
    missing = await client.get(f"{url}/ticker/NO-SUCH")
    assert (missing.status_code, missing.json()["code"]) == (404, "unknown_symbol")


async def check_stream(client: httpx.AsyncClient, url: str) -> None:
    """Check that `/stream` sends a snapshot and updates."""
    async with client.stream("GET", url + STREAM) as answer:
        assert answer.status_code == 200
        lines = answer.aiter_lines()
        for event in ("event: snapshot", "event: update"):
            while await asyncio.wait_for(anext(lines), 60) != event:
                pass


async def check_websocket(url: str) -> None:
    """Check that `/ws` sends updates, and refuses a message that is too large."""
    async with connect(url.replace("http", "ws") + "/ws") as connection:
        await connection.send(SUBSCRIBE)
        await receive(connection, "subscribed", "snapshot", "update", "update")
        await connection.send("x" * (websocket.MAX_MESSAGE_BYTES + 1))
        assert await close_code(connection) == 1009


@pytest.mark.parametrize(("http", "ws"), PROTOCOLS)
async def test_every_protocol_serves_rest_streams_limits_and_shutdown(
    lively: Sandbox, http: str, ws: str
) -> None:
    """REST, `/stream`, `/ws`, client limits and shutdown work with each protocol of uvicorn."""
    await lively.set("kraken", rate_limit=-1, push_ms=50)
    async with process(lively, http, ws) as gateway, httpx.AsyncClient(timeout=60) as client:
        await check_rest(client, gateway.url)
        await check_stream(client, gateway.url)
        await check_websocket(gateway.url)
        await check_limits(client, gateway.url)
        await check_shutdown(gateway)
        missing = [event for event in gateway.events() if event.startswith("this server lacks")]
        assert len(missing) == (ws == "websockets")


async def check_limits(client: httpx.AsyncClient, url: str) -> None:
    """Check that the limit is that of the connection's address, whatever the headers contain."""
    answers = [
        await client.get(url + TICKER, headers={"X-Forwarded-For": f"203.0.113.{number}"})
        for number in range(LIMIT)
    ]
    assert [answer.status_code for answer in answers].count(429) >= 5
    assert answers[-1].status_code == 429
    transport = httpx.AsyncHTTPTransport(local_address="127.0.0.2")
    async with httpx.AsyncClient(transport=transport, timeout=60) as other:
        assert (await other.get(url + TICKER)).status_code == 200


async def check_shutdown(gateway: Process) -> None:
    """Check that SIGTERM ends `/ws` with code 1001 and `/stream` in order, and then the process."""
    address = ("127.0.0.2", 0)  # the other address has used up its limit
    transport = httpx.AsyncHTTPTransport(local_address=address[0])
    socket_url = gateway.url.replace("http", "ws") + "/ws"
    async with (
        httpx.AsyncClient(transport=transport, timeout=60) as client,
        client.stream("GET", gateway.url + STREAM) as answer,
        connect(socket_url, local_addr=address) as connection,
    ):
        await connection.send(SUBSCRIBE)
        await receive(connection, "snapshot")
        gateway.process.send_signal(signal.SIGTERM)
        async for _ in answer.aiter_bytes():
            pass
        assert await close_code(connection) == 1001
    assert await asyncio.to_thread(gateway.process.wait, 30) in (0, -signal.SIGTERM)


async def test_unknown_server_is_served_with_plain_asgi_messages(lively: Sandbox) -> None:
    """Without the server's objects, REST, `/stream` and `/ws` work with the messages of ASGI."""
    await lively.set("kraken", rate_limit=-1, push_ms=50)
    async with serve(make_settings(lively), SystemClock(), shortcut=False) as live:
        await eventually(lambda: live.gateway.markets.loaded_at)
        assert (await live.get(TICKER)).status_code == 200
        await check_stream(live.client, live.url)
        await check_websocket(live.url)


async def test_missing_internals_are_reported_once_at_startup(
    sandbox: Sandbox, clock: FakeClock, caplog: pytest.LogCaptureFixture
) -> None:
    """The check is silent for the tested server, and names what another server lacks."""
    async with serve(make_settings(sandbox), clock):
        assert not caplog.records or "missing" not in vars(caplog.records[-1])
    uvicorn_edge.check_server({"type": "lifespan", uvicorn_edge.SEND: print})
    assert vars(caplog.records[-1])["missing"] == "http transport, websocket frames"


async def test_refused_websocket_leaves_no_sending_task(sandbox: Sandbox, clock: FakeClock) -> None:
    """Without the server's objects, a refused connection starts no task that sends messages."""
    settings = make_settings(sandbox, stream_max_clients=1)
    async with serve(settings, clock, shortcut=False) as live:
        address = live.url.replace("http", "ws") + "/ws"
        async with connect(address) as first:
            await first.send('{"op":"ping"}')
            await receive(first, "pong")
            async with connect(address) as second:
                assert await close_code(second) == 1013
            senders = [task for task in asyncio.all_tasks() if "_send_frames" in repr(task)]
            assert len(senders) == 1
