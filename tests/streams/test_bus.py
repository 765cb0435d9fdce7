"""Replicas that share a Redis: leases, takeover, and independence without Redis."""

import asyncio
import json
import os
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import pairwise
from typing import Any

import httpx
import pytest
from websockets.asyncio.client import connect

from config import setting_names
from src.cache.entry import Key
from src.core.background import repeat
from src.exchanges.profiles import PROFILES
from src.sandbox.server import Sandbox
from src.store.redis import RedisUnavailable
from src.streams import bus
from src.streams.dialer import Dialer
from src.streams.topics import MarketDataEvent, Topic
from tests.conftest import FakeClock, Live, RedisServer, StartGateway, eventually, free_port, sample
from tests.streams.test_hub import (
    BTC,
    Client,
    Join,
    inside,
    join,
    slow_client,
    sockets,
    time_passes,
)

__all__ = ["join"]  # a fixture
TOPIC = Topic("kraken", "ticker", BTC)
START_SECONDS = 180  # longest start of a process on a busy machine


def lease(redis: RedisServer) -> bytes | None:
    held = redis.client.get(TOPIC.redis_name("lease"))
    assert held is None or isinstance(held, bytes)
    return held


async def both_watch(
    start: StartGateway,
    join: Join,
    redis: RedisServer,
    exchange: str = "kraken",
    **settings: object,
) -> tuple[list[Live], list[Client]]:
    """Start two replicas, each with a client that receives the BTC ticker."""
    lives = [await start(redis_url=redis.url, **settings) for _ in range(2)]
    clients = [await join(live) for live in lives]
    for client in clients:
        await client.subscribe(exchange=exchange)
        await client.take("update", 3)
    return lives, clients


async def test_one_replica_watches_for_both(
    start: StartGateway, join: Join, sandbox: Sandbox, redis: RedisServer
) -> None:
    """Clients of both replicas get the same updates, and the exchange has one socket."""
    await sandbox.set("kraken", push_ms=50)
    lives, clients = await both_watch(start, join, redis)
    for client in clients:
        await client.take("update", 10)
    got = [
        {item["seq"]: item["data"] for item in client.got if item["type"] == "update"}
        for client in clients
    ]
    both = got[0].keys() & got[1].keys()
    assert both
    assert all(got[0][number] == got[1][number] for number in both)
    assert sockets(sandbox)["kraken"] == 1
    assert sorted(inside(live).topics[TOPIC].held for live in lives) == [False, True]
    assert lease(redis)


async def test_other_replica_serves_pushed_value_from_redis(
    start: StartGateway, join: Join, sandbox: Sandbox, redis: RedisServer, clock: FakeClock
) -> None:
    """A replica without a subscriber answers REST with a value that another one watches."""
    await sandbox.set("kraken", push_ms=50)
    watching, other = [await start(redis_url=redis.url) for _ in range(2)]
    client = await join(watching)
    await client.subscribe(exchange="kraken")
    await client.take("update", 3)
    clock.advance(2)
    key = Key("kraken", "ticker", BTC).redis_name()
    await eventually(lambda: b'"source":"stream"' in (redis.client.get(key) or b""))
    calls = sandbox.count("kraken", "/0/public/Ticker")
    answer = await other.get("/ticker/BTC-USDT?exchange=kraken")
    assert answer.headers["cache-status"].startswith("virtuoso; hit; detail=redis")
    assert answer.json()["source"] == "stream"
    assert sandbox.count("kraken", "/0/public/Ticker") == calls


@asynccontextmanager
async def process(
    sandbox: Sandbox, redis_url: str
) -> AsyncIterator[tuple[str, subprocess.Popen[bytes]]]:
    """Run a gateway in a separate process, which can be killed."""
    port = free_port()
    environment = {
        **os.environ,
        **dict.fromkeys(setting_names(), ""),
        **sandbox.settings,
        "REDIS_URL": redis_url,
    }
    command = [
        sys.executable,
        "-m",
        "uvicorn",
        "src.api:app",
        "--port",
        str(port),
        "--log-level",
        "error",
    ]
    part = subprocess.Popen(command, env=environment)  # noqa: ASYNC220 - does not block
    url = f"http://127.0.0.1:{port}"
    try:
        async with httpx.AsyncClient() as client, asyncio.timeout(START_SECONDS):
            while True:
                try:
                    if (await client.get(f"{url}/health/ready")).status_code == 200:
                        break
                except httpx.TransportError:
                    pass
                await asyncio.sleep(0.05)
        yield url, part
    finally:
        part.kill()
        part.wait()


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
async def test_lease_is_taken_over_when_holder_ends(
    start: StartGateway, join: Join, sandbox: Sandbox, redis: RedisServer, end: signal.Signals
) -> None:
    """A killed holder is replaced when its lease expires, a stopped one at once."""
    await sandbox.set("kraken", push_ms=50)
    async with process(sandbox, redis.url) as (url, holder):
        address = url.replace("http", "ws") + "/ws"
        async with connect(address, compression=None) as connection:
            first = Client(connection)
            await first.subscribe(exchange="kraken")
            await first.take("update", 2)
            assert lease(redis)
            live = await start(redis_url=redis.url)
            client = await join(live)
            await client.subscribe(exchange="kraken")
            await client.take("update", 2)
            await eventually(lambda: not inside(live).topics[TOPIC].held)
            before = lease(redis)
            holder.send_signal(end)
            client.got.clear()
            if end == signal.SIGTERM:
                assert (await first.closed())[0] == 1001
                await asyncio.to_thread(holder.wait)
                assert lease(redis) != before, "the lease was released"
    await eventually(lambda: inside(live).topics[TOPIC].held)
    assert lease(redis) != before
    await client.take("snapshot")  # values between the two holders are missing
    await client.take("update", 3, exchange="kraken")
    await eventually(lambda: sockets(sandbox)["kraken"] == 1)
    messages = [message for message in client.got if "seq" in message]
    assert all(
        later["type"] == "snapshot" or later["seq"] == earlier["seq"] + 1
        for earlier, later in pairwise(messages)
    )


async def test_unreachable_holder_releases_lease(
    start: StartGateway, join: Join, sandbox: Sandbox, redis: RedisServer, clock: FakeClock
) -> None:
    """A holder without a connection releases its lease, and listens to another replica."""
    await sandbox.set("kraken", push_ms=50)
    cut_off = await start(redis_url=redis.url, kraken_ws_url=f"ws://127.0.0.1:{free_port()}")
    client = await join(cut_off)
    await client.subscribe(exchange="kraken")
    await eventually(lambda: lease(redis))
    before = lease(redis)
    other = await start(redis_url=redis.url)
    second = await join(other)
    await second.subscribe(exchange="kraken")
    async with time_passes(clock):
        await client.next(lambda message: message.get("data", {}).get("source") == "stream")
        await client.take("status", state="live")
    await second.take("update", 3)
    assert lease(redis) not in (None, before)
    assert [inside(live).topics[TOPIC].held for live in (cut_off, other)] == [False, True]
    assert sockets(sandbox)["kraken"] == 1
    numbers = [(message["type"], message["seq"]) for message in client.got if "seq" in message]
    assert all(
        kind == "snapshot" or number == last + 1 for (_, last), (kind, number) in pairwise(numbers)
    )


@pytest.mark.parametrize("how", [{"status": 503, "only": "/v2"}, {"geo_block": True}])
async def test_released_lease_is_acquired_again(
    start: StartGateway,
    join: Join,
    sandbox: Sandbox,
    redis: RedisServer,
    clock: FakeClock,
    how: dict[str, Any],
) -> None:
    """A replica that released its lease watches again if no other replica holds it."""
    live = await start(redis_url=redis.url)
    await sandbox.set("kraken", **how)
    assert (await live.get("/ticker/BTC-USDT?exchange=kraken")).is_success is ("status" in how)
    client = await join(live)
    await client.subscribe(exchange="kraken")
    async with time_passes(clock):
        await client.take("status", state="stale")
    # The topic may be stale, because of REST, before the lease was acquired for the first time.
    await eventually(lambda: inside(live).topics[TOPIC].held and lease(redis) is None)
    await sandbox.set("kraken", push_ms=50)
    await live.gateway.manager.reset_breakers()
    async with time_passes(clock):
        await client.take("status", state="live")
    await eventually(lambda: lease(redis))


async def test_partial_ticker_is_not_steady_on_other_replica(
    start: StartGateway, join: Join, sandbox: Sandbox, redis: RedisServer, clock: FakeClock
) -> None:
    """A listening replica learns from steady events only, as the watching one does."""
    topic = Topic("bybit", "ticker", BTC)
    await sandbox.set("bybit", push_ms=50)
    lives, clients = await both_watch(start, join, redis, "bybit")
    watches = [inside(live).topics[topic].liveness for live in lives]
    clock.advance(0.25)
    await eventually(lambda: all(watch.last_message_at == clock.monotonic() for watch in watches))
    await sandbox.set("bybit", push_ms=50, mute="orderbook.1.")
    for client in clients:
        await client.take("update", 10)
    before = [watch.last_message_at for watch in watches]
    clock.advance(0.25)
    for client in clients:
        await client.take("update", 10)
    assert [watch.last_message_at for watch in watches] == before


async def test_failing_replicas_do_not_alternate(
    start: StartGateway, join: Join, sandbox: Sandbox, redis: RedisServer, clock: FakeClock
) -> None:
    """If an exchange refuses all replicas, each retries with pauses; `stale` comes once."""
    await sandbox.set("kraken", push_ms=50)
    _, clients = await both_watch(start, join, redis)
    changes = {to: sample("stream_lease_changes_total", to=to) for to in ("taken", "lost")}
    tried = sandbox.count("kraken", "/v2")
    started = clock.elapsed
    await sandbox.set("kraken", status=503, only="/v2", drop="cut")
    async with time_passes(clock):
        for client in clients:
            await client.take("status", state="stale")
        for _ in range(10):  # 90 s of the fake clock, 10 s of real time for leases
            for client in clients:
                await client.send(op="ping", id="p")
                await client.take("pong")
            await asyncio.sleep(bus.LEASE_SECONDS / 3)
    assert [
        [item["state"] for item in client.got if item["type"] == "status"] for client in clients
    ] == [["stale"]] * 2
    attempts = (clock.elapsed - started) / Dialer(PROFILES["kraken"], clock).interval
    assert sandbox.count("kraken", "/v2") - tried <= 2 * attempts + 2
    assert all(
        sample("stream_lease_changes_total", to=to) - before <= 2 for to, before in changes.items()
    )
    await sandbox.set("kraken", push_ms=50)
    async with time_passes(clock):
        for client in clients:
            await client.take("status", state="live")
    await eventually(lambda: sockets(sandbox)["kraken"] == 1)


async def test_without_redis_each_replica_watches(
    start: StartGateway, join: Join, sandbox: Sandbox, own_redis: RedisServer, clock: FakeClock
) -> None:
    """While Redis is unavailable each replica has a socket; afterwards only one."""
    await sandbox.set("kraken", push_ms=50)
    lives, clients = await both_watch(start, join, own_redis, redis_timeout_seconds=0.5)
    own_redis.kill()
    await eventually(lambda: all(inside(live).topics[TOPIC].held for live in lives))
    await eventually(lambda: sockets(sandbox)["kraken"] == 2)
    for client in clients:
        client.got.clear()
        await client.take("update", 5)
        assert not [message for message in client.got if message["type"] == "status"]
    own_redis.start()
    async with asyncio.timeout(60):
        while sum(inside(live).topics[TOPIC].held for live in lives) != 1:
            clock.advance(1)  # until the breaker of Redis allows an attempt
            await asyncio.sleep(0.2)
    await eventually(lambda: sockets(sandbox)["kraken"] == 1)
    for client in clients:
        client.got.clear()
        await client.take("update", 5)
        numbers = [(message["type"], message["seq"]) for message in client.got if "seq" in message]
        for (_, earlier), (kind, later) in pairwise(numbers):
            assert kind == "snapshot" or later == earlier + 1


async def test_pubsub_keeps_its_connection_under_load(
    start: StartGateway, join: Join, sandbox: Sandbox, redis: RedisServer
) -> None:
    """Many concurrent commands are no failure of Redis while pub/sub is open."""
    await sandbox.set("kraken", push_ms=50)
    lives, _ = await both_watch(start, join, redis)
    store = next(live for live in lives if not inside(live).topics[TOPIC].held).gateway.store

    def block(client: Any) -> Any:
        return client.blpop(["a-list"], timeout=30)

    def blocked() -> int:
        clients: dict[str, int] = redis.client.info("clients")
        return clients["blocked_clients"]

    waiting = [asyncio.create_task(store.run("test", block, 30)) for _ in range(55)]
    await eventually(lambda: blocked() >= 45 or not store.up)  # lease renewals are commands, too
    redis.client.rpush("a-list", *range(55))
    outcomes = await asyncio.gather(*waiting, return_exceptions=True)
    assert store.up
    assert {type(outcome) for outcome in outcomes} <= {tuple, list, RedisUnavailable}
    assert {str(outcome) for outcome in outcomes if isinstance(outcome, RedisUnavailable)} <= {
        "TimeoutError"
    }
    assert sum(not isinstance(outcome, RedisUnavailable) for outcome in outcomes) >= 45


def test_event_round_trips() -> None:
    """`parse` restores the output of `dump`, and returns None for anything else."""
    body = b'{"price":1.5,"a":"\\n"}'
    event = MarketDataEvent(TOPIC, 7, None, 1_700_000_000_000, body, wire=[["1", "2.50"]])
    assert MarketDataEvent.parse(event.dump()) == event
    for raw in (
        None,
        b"",
        b"[]\n{}",
        b"junk",
        b"[1,2,3,4,5,null]\n",
        event.dump()[3:],
        "text",
        b"null\n{}",
    ):
        assert MarketDataEvent.parse(raw) is None


async def test_outgoing_events_are_bounded(
    start: StartGateway,
    join: Join,
    sandbox: Sandbox,
    redis: RedisServer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Events above MAX_PENDING are dropped, the oldest first, and counted."""
    monkeypatch.setattr(bus, "MAX_PENDING", 5)
    before = sample("stream_dropped_total", reason="bus")
    live = await start(redis_url=redis.url)
    sender = bus.Bus(live.gateway.store, lambda *_: None, lambda _: True, lambda _: None)
    event = MarketDataEvent(TOPIC, 7, None, 1, b"{}")
    for _ in range(8):
        sender.publish(event)
    assert sample("stream_dropped_total", reason="bus") == before + 3


@pytest.mark.parametrize("steps", range(6))
async def test_work_on_leases_ends_when_cancelled_after_a_change(
    start: StartGateway, steps: int
) -> None:
    """A cancellation is not lost, however many steps of the loop ago a topic was added."""
    live = await start()
    keeper = bus.Bus(live.gateway.store, lambda *_: None, lambda _: True, lambda _: None)
    work = asyncio.create_task(repeat("streams", keeper.keep_leases))
    await asyncio.sleep(0.05)
    keeper.add(TOPIC)
    for _ in range(steps):
        await asyncio.sleep(0)
    work.cancel()
    done, _ = await asyncio.wait([work], timeout=0.5)
    assert done, "the work continues"


async def test_invalid_events_are_ignored(
    start: StartGateway, join: Join, sandbox: Sandbox, redis: RedisServer, clock: FakeClock
) -> None:
    """Invalid data on a pub/sub channel does not affect listeners."""
    await sandbox.set("kraken", push_ms=50)
    lives, clients = await both_watch(start, join, redis)
    book = Topic("kraken", "orderbook", BTC)
    for client in clients:
        await client.subscribe(channel="book", exchange="kraken")
    await eventually(lambda: all(book in inside(live).topics for live in lives))
    await eventually(lambda: any(inside(live).topics[book].held for live in lives))
    odd = MarketDataEvent(book, 10**15, None, 10**13, b'{"levels":[]}').dump()
    for _ in range(3):
        for junk in (b"", b"junk", json.dumps([1]).encode(), b"\xff\n{}", odd):
            redis.client.publish(TOPIC.redis_name("events"), junk)
            redis.client.publish(book.redis_name("events"), junk)
        async with time_passes(clock):
            for client in clients:
                await client.take("update", 3, channel="book")
                await client.take("update", 3, channel="ticker")


async def test_aborted_clients_do_not_affect_others(sandbox: Sandbox) -> None:
    """Aborted clients cost no other client an update, and cause no reconnect (uvloop)."""
    await sandbox.set("kraken", push_ms=2)
    async with process(sandbox, "") as (url, _):
        host, port = url.removeprefix("http://").split(":")
        async with connect(url.replace("http", "ws") + "/ws", compression=None) as connection:
            good = Client(connection)
            await good.subscribe(exchange="kraken")
            await good.take("update", 10)
            for _ in range(15):
                rude = [await slow_client(f"{host}:{port}", exchange="kraken") for _ in range(4)]
                await good.take("update", 5)
                for _, writer in rude:
                    cut = writer.get_extra_info("socket")
                    cut.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    writer.transport.abort()
            numbers = [message["seq"] for message in good.got if "seq" in message]
            assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
            async with httpx.AsyncClient() as client:
                assert (await client.get(f"{url}/exchanges")).json()["kraken"]["streams"][
                    "reconnects"
                ] == 0
