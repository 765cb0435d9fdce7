"""`GET /stream`: streams as server-sent events, and clients that misbehave."""

import asyncio
import json
import random
import socket
from collections.abc import AsyncIterator
from contextlib import suppress
from itertools import pairwise
from typing import Any

import pytest
from starlette.requests import Request

from src.sandbox.server import Sandbox
from src.streams.feed import Feed
from src.streams.topics import Topic
from src.web.server_events import RETRY, EventStream
from tests.conftest import FakeClock, StartGateway, eventually, sample
from tests.streams.test_hub import BTC, Join, inside, is_quiet, join, time_passes, watched

__all__ = ["join"]  # a fixture


async def events(lines: AsyncIterator[str], count: int) -> list[tuple[int, str, dict[str, Any]]]:
    """Return the next events as id, type and data."""
    found: list[tuple[int, str, dict[str, Any]]] = []
    fields: dict[str, str] = {}
    async for line in lines:
        if line and not line.startswith(":"):
            name, _, value = line.partition(": ")
            fields[name] = value
        elif not line and "data" in fields:
            found.append((int(fields.get("id", -1)), fields["event"], json.loads(fields["data"])))
            fields = {}
            if len(found) == count:
                break
    return found


async def test_stream_sends_snapshot_then_updates(start: StartGateway) -> None:
    """GET /stream sends a snapshot, then updates, with `seq` as id and the data of /ws."""
    live = await start()
    async with live.client.stream("GET", f"{live.url}/stream/btc-usdt?exchange=kraken") as answer:
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert answer.headers["cache-control"] == "no-store"
        got = await events(answer.aiter_lines(), 4)
    assert [kind for _, kind, _ in got] == ["snapshot", "update", "update", "update"]
    assert [number - got[0][0] for number, _, _ in got] == [0, 1, 2, 3]
    assert all(data["seq"] == number and data["data"]["symbol"] == BTC for number, _, data in got)
    await eventually(lambda: not inside(live).connections)


async def test_head_sends_headers_only(start: StartGateway) -> None:
    """HEAD answers as GET, subscribes to nothing, and keeps the connection usable."""
    live = await start(stream_max_per_client=2)
    head, alive = (
        f"HEAD /stream/{BTC} HTTP/1.1\r\nHost: x\r\n\r\n",
        "GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n",
    )
    host, port = live.url.removeprefix("http://").split(":")
    for _ in range(3):
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write((head + alive).encode())
        for kind in (b"content-type: text/event-stream", b"content-type: application/json"):
            answer = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 30)
            assert answer.startswith(b"HTTP/1.1 200 ")
            assert kind in answer
        writer.close()
    await eventually(lambda: not inside(live).connections)
    assert not inside(live).topics
    refused = await live.client.head(f"{live.url}/stream/{BTC}?channel=none")
    assert (refused.status_code, refused.headers["content-type"]) == (
        422,
        "application/problem+json",
    )


async def test_heartbeat_is_an_event(start: StartGateway, sandbox: Sandbox) -> None:
    """A heartbeat is an event, because a page cannot see comments."""
    live = await start()
    await sandbox.set("kraken", freeze=True)
    async with (
        asyncio.timeout(60),
        live.client.stream("GET", f"{live.url}/stream/{BTC}?exchange=kraken") as answer,
    ):
        lines = answer.aiter_lines()
        assert [kind for _, kind, _ in await events(lines, 1)] == ["snapshot"]
        await inside(live).send_heartbeats()
        ((number, kind, data),) = await events(lines, 1)
    assert (number, kind, sorted(data)) == (-1, "heartbeat", ["sent_at", "type"])


async def test_several_symbols_share_one_response(start: StartGateway) -> None:
    """Each symbol is pushed once per exchange, in whatever spelling it is repeated."""
    live = await start()
    url = f"{live.url}/stream/BTC-USDT,eth/usdt,btc-usdt,?exchange=all"
    async with live.client.stream("GET", url, headers={"Last-Event-ID": "1"}) as answer:
        assert answer.status_code == 200
        got = await events(answer.aiter_lines(), 30)
        (client,) = inside(live).connections
        assert len(client.subscriptions) == 2
    first = {(data["symbol"], data["exchange"]): kind for _, kind, data in reversed(got)}
    assert first == {
        (symbol, name): "snapshot"
        for symbol in (BTC, "ETH/USDT")
        for name in live.gateway.manager.names
    }
    await eventually(lambda: not inside(live).connections)


@pytest.mark.parametrize(
    ("path", "count"), [("BTC-USDT,ETH-USDT?exchange=kraken", 2), ("BTC-USDT?exchange=all", 3)]
)
async def test_last_event_id_is_ignored_for_several_streams(
    start: StartGateway, sandbox: Sandbox, path: str, count: int
) -> None:
    """With several streams, Last-Event-ID is ambiguous: each starts with a snapshot."""
    live = await start()
    for name in sandbox.urls:
        await sandbox.set(name, freeze=True)
    async with (
        asyncio.timeout(60),
        live.client.stream("GET", f"{live.url}/stream/{path}") as answer,
    ):
        numbers = {number for number, _, _ in await events(answer.aiter_lines(), count)}
        for number in numbers:
            headers = {"Last-Event-ID": str(number)}
            async with live.client.stream(
                "GET", f"{live.url}/stream/{path}", headers=headers
            ) as again:
                got = await events(again.aiter_lines(), count)
            assert {(number, kind) for number, kind, _ in got} == {
                (number, "snapshot") for number in numbers
            }


async def test_limits_are_checked_before_the_first_event(start: StartGateway) -> None:
    """Too many streams or symbols are refused before any event."""
    live, fewer = await start(stream_max_subscriptions=3, stream_max_topics=2), "BTC-USDT,ETH-USDT"
    for path, status, code in (
        ("BTC-USDT,ETH-USDT,SOL-USDT,XRP-USDT?exchange=kraken", 429, "too_many_subscriptions"),
        (f"{fewer}?exchange=all", 429, "too_many_subscriptions"),
        (",".join(f"X{number}-USDT" for number in range(101)), 422, "invalid_parameter"),
        (",", 422, "invalid_parameter"),
        (f"{fewer},FOO-BAR", 404, "unknown_symbol"),
        (f"{fewer},*", 400, "malformed_request"),
        (f"{fewer},SOL-USDT?exchange=kraken", 503, "too_many_streams"),
    ):
        answer = await live.get(f"/stream/{path}")
        assert (answer.status_code, answer.json()["code"]) == (status, code), path
        assert not inside(live).connections
    await eventually(lambda: not any(item.is_wanted for item in inside(live).topics.values()))
    async with live.client.stream("GET", f"{live.url}/stream/{fewer}?exchange=kraken") as answer:
        assert len(await events(answer.aiter_lines(), 2)) == 2


async def test_client_that_leaves_early_is_removed(start: StartGateway) -> None:
    """A client that disconnects before the first event leaves no subscription."""
    live = await start()
    host, port = live.url.removeprefix("http://").split(":")
    for _ in range(40):
        _, writer = await asyncio.open_connection(host, int(port))
        writer.write(b"GET /stream/BTC-USDT?exchange=kraken HTTP/1.1\r\nHost: x\r\n\r\n")
        await asyncio.sleep(random.choice((0, 0.001, 0.005)))
        writer.transport.abort()
        with suppress(OSError):
            await writer.wait_closed()
    await eventually(lambda: not live.server.server_state.connections)
    await eventually(lambda: not inside(live).connections)
    assert not any(item.is_wanted for item in inside(live).topics.values())


async def test_current_last_event_id_skips_snapshot(
    start: StartGateway, join: Join, sandbox: Sandbox, clock: FakeClock
) -> None:
    """With the newest id as Last-Event-ID no snapshot is sent; with another one it is."""
    live = await start()
    client = await watched(live, join, sandbox, clock, "kraken")
    await sandbox.set("kraken", freeze=True, push_ms=20)
    await is_quiet("kraken")
    newest = next(iter(inside(live).topics.values())).sequence
    for seen, kind in ((newest, "update"), (newest - 1, "snapshot")):
        headers = {"Last-Event-ID": str(seen)}
        url = f"{live.url}/stream/BTC-USDT?exchange=kraken"
        async with live.client.stream("GET", url, headers=headers) as answer:
            await eventually(lambda: len(inside(live).connections) == 2)
            await sandbox.set("kraken", push_ms=20)
            ((number, got, _),) = await events(answer.aiter_lines(), 1)
        assert got == kind
        assert number > newest or kind == "snapshot"
        await sandbox.set("kraken", freeze=True, push_ms=20)
        await is_quiet("kraken")
        newest = next(iter(inside(live).topics.values())).sequence
    assert client.got


@pytest.mark.parametrize(
    ("path", "status", "code"),
    [
        ("/stream/FOO-BAR", 404, "unknown_symbol"),
        ("/stream/BTC-USDT?exchange=mtgox", 404, "unknown_exchange"),
        ("/stream/BTC-USDT?channel=news", 422, "invalid_parameter"),
        ("/stream/BTC-USDT?levels=0", 422, "invalid_parameter"),
    ],
)
async def test_invalid_stream_is_a_problem(
    start: StartGateway, path: str, status: int, code: str
) -> None:
    """An invalid stream is refused with the error of REST."""
    live = await start()
    answer = await live.get(path)
    assert (answer.status_code, answer.json()["code"]) == (status, code)


async def test_invalid_last_event_id_is_ignored(start: StartGateway) -> None:
    """An invalid Last-Event-ID is ignored."""
    live = await start()
    url = f"{live.url}/stream/BTC-USDT?exchange=kraken"
    for seen in ("9" * 5000, "-1", "x", "1e9"):
        async with live.client.stream("GET", url, headers={"Last-Event-ID": seen}) as answer:
            assert answer.status_code == 200
            ((_, kind, _),) = await events(answer.aiter_lines(), 1)
            assert kind == "snapshot"


async def non_reading_client(url: str) -> socket.socket:
    """Request a stream with small buffers, and read nothing."""
    own = socket.socket()
    own.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    own.setblocking(False)
    host, port = url.removeprefix("http://").split(":")
    await asyncio.get_running_loop().sock_connect(own, (host, int(port)))
    request = b"GET /stream/BTC-USDT?exchange=kraken HTTP/1.1\r\nHost: x\r\n\r\n"
    await asyncio.get_running_loop().sock_sendall(own, request)
    return own


async def test_client_that_reads_nothing_is_disconnected(
    start: StartGateway, sandbox: Sandbox, clock: FakeClock
) -> None:
    """A client that reads nothing is disconnected, counted once, and removed."""
    live = await start()
    await sandbox.set("kraken", push_ms=2)
    before = sample("stream_dropped_total", reason="slow_client")
    with await non_reading_client(live.url) as own:
        await eventually(lambda: inside(live).slow_connections)
        async with time_passes(clock):
            await eventually(lambda: not inside(live).connections)
        await eventually(lambda: not live.server.server_state.connections)
        await eventually(lambda: not live.server.server_state.tasks)
        assert sample("stream_dropped_total", reason="slow_client") == before + 1
        with suppress(ConnectionResetError):
            while await asyncio.get_running_loop().sock_recv(own, 65536):
                pass


async def test_slow_client_that_leaves_is_removed(start: StartGateway, sandbox: Sandbox) -> None:
    """A slow client that disconnects is removed."""
    live = await start()
    await sandbox.set("kraken", push_ms=2)
    for _ in range(3):
        with await non_reading_client(live.url):
            await eventually(lambda: inside(live).slow_connections)
    await eventually(lambda: not inside(live).connections and not inside(live).slow_connections)


async def test_replaced_update_becomes_snapshot(start: StartGateway, sandbox: Sandbox) -> None:
    """A slow client gets a snapshot in place of skipped updates."""
    live = await start()
    await sandbox.set("kraken", push_ms=2)
    with await non_reading_client(live.url) as own:
        await eventually(lambda: inside(live).slow_connections)
        own.setblocking(False)

        async def lines() -> AsyncIterator[str]:
            rest = b""
            while True:
                rest += await asyncio.get_running_loop().sock_recv(own, 65536)
                *whole, rest = rest.split(b"\n")
                for line in whole:
                    yield line.strip().decode()

        got = [event for event in await events(lines(), 400) if event[0] >= 0]
    numbers = [(kind, number) for number, kind, _ in got]
    pairs = list(pairwise(numbers))
    assert any(number > last + 1 for (_, last), (_, number) in pairs)
    assert all(kind == "snapshot" or number == last + 1 for (_, last), (kind, number) in pairs)


async def test_connection_limit_holds_for_concurrent_clients(start: StartGateway) -> None:
    """Concurrent clients above STREAM_MAX_CLIENTS are refused with a problem."""
    live, most = await start(stream_max_clients=5), 5
    host, port = live.url.removeprefix("http://").split(":")
    made = [await asyncio.open_connection(host, int(port)) for _ in range(40)]
    for _, writer in made:
        writer.write(b"GET /stream/BTC-USDT?exchange=kraken HTTP/1.1\r\nHost: x\r\n\r\n")
    heads = await asyncio.gather(*(reader.readuntil(b"\r\n") for reader, _ in made))
    assert sum(b" 200 " in head for head in heads) == most
    assert sum(b" 503 " in head for head in heads) == len(made) - most
    assert len(inside(live).connections) == most
    assert (await live.get("/stream/BTC-USDT")).json()["code"] == "too_many_streams"
    for _, writer in made:
        writer.transport.abort()
    await eventually(lambda: not inside(live).connections)


async def test_status_is_sent_between_frequent_values(start: StartGateway) -> None:
    """A client that always has pending values receives status messages, too."""
    state = (await start()).server.lifespan.state
    request = Request({"type": "http", "headers": [], "state": state})
    client = EventStream(request, [])
    feed = Feed(Topic("kraken", "ticker", BTC), 0)
    told = client.events()
    assert await anext(told) == RETRY
    client.push(feed, "update")
    client.send_message({"type": "status", "state": "stale"})
    kinds = []
    for _ in range(4):
        kinds.append((await anext(told))[:13])
        client.push(feed, "update")  # the next value arrives before this one is sent
    assert b"event: status" in kinds
