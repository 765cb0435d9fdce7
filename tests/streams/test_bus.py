"""Replicas that share a Redis: one watches for all, another takes over when it dies, and no Redis is no loss."""

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
from src.sandbox.server import Sandbox
from src.store.redis import RedisAway
from src.streams import bus
from src.streams.bus import MarketDataEvent, Topic
from tests.conftest import FakeClock, Live, RedisServer, StartGateway, eventually, free_port, sample
from tests.streams.test_hub import BTC, Client, Join, inside, join, slow_client, sockets, time_passes

__all__ = ["join"]  # a fixture
TOPIC = Topic("kraken", "ticker", BTC)
PATIENCE = 180  # seconds after which a process is considered hung; a busy machine starts one slowly


def lease(redis: RedisServer) -> bytes | None:
    held = redis.client.get(TOPIC.redis("lease"))
    assert held is None or isinstance(held, bytes)
    return held


async def both_watch(
    start: StartGateway, join: Join, redis: RedisServer, exchange: str = "kraken", **settings: object
) -> tuple[list[Live], list[Client]]:
    """Two replicas, each with a client to whom bitcoin's ticker is pushed."""
    lives = [await start(redis_url=redis.url, **settings) for _ in range(2)]
    clients = [await join(live) for live in lives]
    for client in clients:
        await client.subscribe(exchange=exchange)
        await client.take("update", 3)
    return lives, clients


async def test_one_of_two_replicas_watches(
    start: StartGateway, join: Join, sandbox: Sandbox, redis: RedisServer
) -> None:
    """Clients of both replicas get the same updates, and the exchange has one socket."""
    await sandbox.set("kraken", push_ms=50)
    lives, clients = await both_watch(start, join, redis)
    for client in clients:
        await client.take("update", 10)
    got = [{it["seq"]: it["data"] for it in client.got if it["type"] == "update"} for client in clients]
    both = got[0].keys() & got[1].keys()
    assert both
    assert all(got[0][number] == got[1][number] for number in both)
    assert sockets(sandbox)["kraken"] == 1
    assert sorted(inside(live).topics[TOPIC].held for live in lives) == [False, True]
    assert lease(redis)


async def test_who_does_not_listen_finds_it_in_redis(
    start: StartGateway, join: Join, sandbox: Sandbox, redis: RedisServer, clock: FakeClock
) -> None:
    """A replica without a subscriber answers REST from what another one watches, without a call."""
    await sandbox.set("kraken", push_ms=50)
    watching, other = [await start(redis_url=redis.url) for _ in range(2)]
    client = await join(watching)
    await client.subscribe(exchange="kraken")
    await client.take("update", 3)
    clock.advance(2)
    key = Key("kraken", "ticker", BTC).redis()
    await eventually(lambda: b'"source":"stream"' in (redis.client.get(key) or b""))
    calls = sandbox.count("kraken", "/0/public/Ticker")
    answer = await other.get("/ticker/BTC-USDT?exchange=kraken")
    assert answer.headers["cache-status"].startswith("virtuoso; hit; detail=redis")
    assert answer.json()["source"] == "stream"
    assert sandbox.count("kraken", "/0/public/Ticker") == calls


@asynccontextmanager
async def process(sandbox: Sandbox, redis_url: str) -> AsyncIterator[tuple[str, subprocess.Popen[bytes]]]:
    """A gateway in a process of its own, which can be killed."""
    port = free_port()
    environment = {**os.environ, **dict.fromkeys(setting_names(), ""), **sandbox.settings, "REDIS_URL": redis_url}
    command = [sys.executable, "-m", "uvicorn", "src.api:app", "--port", str(port), "--log-level", "error"]
    part = subprocess.Popen(command, env=environment)  # noqa: ASYNC220 - it returns at once
    url = f"http://127.0.0.1:{port}"
    try:
        async with httpx.AsyncClient() as client, asyncio.timeout(PATIENCE):
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
async def test_when_the_holder_ends_another_takes_over(
    start: StartGateway, join: Join, sandbox: Sandbox, redis: RedisServer, end: signal.Signals
) -> None:
    """A holder that is killed is replaced when its lease ends, one that stops at once; no hole is unannounced."""
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
                assert lease(redis) != before, "it was given back"
    await eventually(lambda: inside(live).topics[TOPIC].held)
    assert lease(redis) != before
    await client.take("snapshot")  # what came while nobody watched is missing
    await client.take("update", 3, exchange="kraken")
    await eventually(lambda: sockets(sandbox)["kraken"] == 1)
    messages = [message for message in client.got if "seq" in message]
    assert all(other["type"] == "snapshot" or other["seq"] == one["seq"] + 1 for one, other in pairwise(messages))


async def test_who_does_not_reach_an_exchange_leaves_it_to_others(
    start: StartGateway, join: Join, sandbox: Sandbox, redis: RedisServer, clock: FakeClock
) -> None:
    """A holder that gets no connection gives its lease up: its clients get what another replica hears."""
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
    assert all(kind == "snapshot" or number == last + 1 for (_, last), (kind, number) in pairwise(numbers))


@pytest.mark.parametrize("how", [{"status": 503, "only": "/v2"}, {"geo_block": True}])
async def test_who_gave_its_lease_up_tries_on(
    start: StartGateway,
    join: Join,
    sandbox: Sandbox,
    redis: RedisServer,
    clock: FakeClock,
    how: dict[str, Any],
) -> None:
    """While no other replica takes a lease that was given up, its holder watches again as soon as it can."""
    live = await start(redis_url=redis.url)
    await sandbox.set("kraken", **how)
    assert (await live.get("/ticker/BTC-USDT?exchange=kraken")).is_success is ("status" in how)
    client = await join(live)
    await client.subscribe(exchange="kraken")
    async with time_passes(clock):
        await client.take("status", state="stale")
    await eventually(lambda: lease(redis) is None)
    assert inside(live).topics[TOPIC].held
    await sandbox.set("kraken", push_ms=50)
    await live.gateway.manager.reset_breakers()
    async with time_passes(clock):
        await client.take("status", state="live")
    await eventually(lambda: lease(redis))


async def test_half_a_ticker_is_no_sign_of_life_elsewhere(
    start: StartGateway, join: Join, sandbox: Sandbox, redis: RedisServer, clock: FakeClock
) -> None:
    """A replica that only listens learns from bid and ask that they come, as the one that watches does."""
    topic = Topic("bybit", "ticker", BTC)
    await sandbox.set("bybit", push_ms=50)
    lives, clients = await both_watch(start, join, redis, "bybit")
    watches = [inside(live).topics[topic].watch for live in lives]
    clock.advance(0.25)
    await eventually(lambda: all(watch.last == clock.monotonic() for watch in watches))
    await sandbox.set("bybit", push_ms=50, mute="orderbook.1.")
    for client in clients:
        await client.take("update", 10)
    before = [watch.messages for watch in watches]
    for client in clients:
        await client.take("update", 10)
    assert [watch.messages for watch in watches] == before


async def test_replicas_that_all_fail_do_not_take_turns(
    start: StartGateway, join: Join, sandbox: Sandbox, redis: RedisServer, clock: FakeClock
) -> None:
    """While an exchange lets no replica in each tries with pauses that grow, and says once that the stream is stale."""
    await sandbox.set("kraken", push_ms=50)
    _, clients = await both_watch(start, join, redis)
    changes = {to: sample("stream_lease_changes_total", to=to) for to in ("taken", "lost")}
    tried = sandbox.count("kraken", "/v2")
    await sandbox.set("kraken", status=503, only="/v2", drop="cut")
    async with time_passes(clock):
        for client in clients:
            await client.take("status", state="stale")
        for _ in range(10):  # a minute and a half of the clock's, ten seconds of the leases'
            for client in clients:
                await client.send(op="ping", id="p")
                await client.take("pong")
            await asyncio.sleep(bus.LEASE_SECONDS / 3)
    assert [[it["state"] for it in client.got if it["type"] == "status"] for client in clients] == [["stale"]] * 2
    assert sandbox.count("kraken", "/v2") - tried <= 24
    assert all(sample("stream_lease_changes_total", to=to) - before <= 2 for to, before in changes.items())
    await sandbox.set("kraken", push_ms=50)
    async with time_passes(clock):
        for client in clients:
            await client.take("status", state="live")
    await eventually(lambda: sockets(sandbox)["kraken"] == 1)


async def test_without_redis_each_watches_for_itself(
    start: StartGateway, join: Join, sandbox: Sandbox, own_redis: RedisServer, clock: FakeClock
) -> None:
    """While Redis is away every replica has its own socket; when it is back, one of them gives its up."""
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
            clock.advance(1)  # the breaker of Redis tries again
            await asyncio.sleep(0.2)
    await eventually(lambda: sockets(sandbox)["kraken"] == 1)
    for client in clients:
        client.got.clear()
        await client.take("update", 5)
        numbers = [(message["type"], message["seq"]) for message in client.got if "seq" in message]
        for (_, one), (kind, other) in pairwise(numbers):
            assert kind == "snapshot" or other == one + 1


async def test_commands_at_once_leave_pubsub_its_connection(
    start: StartGateway, join: Join, sandbox: Sandbox, redis: RedisServer
) -> None:
    """As many commands as may run at once, and some that have to wait, are no failure of Redis beside pub/sub."""
    await sandbox.set("kraken", push_ms=50)
    lives, _ = await both_watch(start, join, redis)
    store = next(live for live in lives if not inside(live).topics[TOPIC].held).gateway.store

    def block(client: Any) -> Any:
        return client.blpop(["a-list"], timeout=30)

    def blocked() -> int:
        clients: dict[str, int] = redis.client.info("clients")
        return clients["blocked_clients"]

    waiting = [asyncio.create_task(store.run("test", block, 30)) for _ in range(55)]
    await eventually(lambda: blocked() >= 45 or not store.up)  # a lease is renewed by a command, too
    redis.client.rpush("a-list", *range(55))
    outcomes = await asyncio.gather(*waiting, return_exceptions=True)
    assert store.up
    assert {type(outcome) for outcome in outcomes} <= {tuple, list, RedisAway}
    assert {str(outcome) for outcome in outcomes if isinstance(outcome, RedisAway)} <= {"TimeoutError"}
    assert sum(not isinstance(outcome, RedisAway) for outcome in outcomes) >= 45


def test_an_event_is_read_as_it_was_written() -> None:
    """What one replica writes another reads; whatever else is on the channel is nothing."""
    event = MarketDataEvent("kraken", BTC, "ticker", 7, None, 1_700_000_000_000, b'{"price":1.5,"a":"\\n"}')
    assert MarketDataEvent.parse(event.dump()) == event
    for raw in (None, b"", b"[]\n{}", b"junk", b"[1,2,3,4,5,null]\n", event.dump()[3:], "text", b"null\n{}"):
        assert MarketDataEvent.parse(raw) is None


async def test_what_replicas_tell_each_other_is_bounded(
    start: StartGateway, join: Join, sandbox: Sandbox, redis: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Events that Redis does not take in time are dropped and counted, the oldest first."""
    monkeypatch.setattr(bus, "MAX_PENDING", 5)
    before = sample("stream_dropped_total", reason="bus")
    live = await start(redis_url=redis.url)
    sent = bus.Bus(live.gateway.store, lambda *_: None, lambda _: None, lambda _: True)
    event = MarketDataEvent("kraken", BTC, "ticker", 7, None, 1, b"{}")
    for _ in range(8):
        sent.publish(event)
    assert sample("stream_dropped_total", reason="bus") == before + 3


async def test_junk_on_a_channel_is_nothing(
    start: StartGateway, join: Join, sandbox: Sandbox, redis: RedisServer, clock: FakeClock
) -> None:
    """What is no event harms no listener."""
    await sandbox.set("kraken", push_ms=50)
    lives, clients = await both_watch(start, join, redis)
    book = Topic("kraken", "orderbook", BTC)
    for client in clients:
        await client.subscribe(channel="book", exchange="kraken")
    await eventually(lambda: all(book in inside(live).topics for live in lives))
    await eventually(lambda: any(inside(live).topics[book].held for live in lives))
    odd = MarketDataEvent(*("kraken", BTC, "orderbook"), 10**15, None, 10**13, b'{"levels":[]}').dump()
    for _ in range(3):
        for junk in (b"", b"junk", json.dumps([1]).encode(), b"\xff\n{}", odd):
            redis.client.publish(TOPIC.redis("events"), junk)
            redis.client.publish(book.redis("events"), junk)
        async with time_passes(clock):
            for client in clients:
                await client.take("update", 3, channel="book")
                await client.take("update", 3, channel="ticker")


async def test_who_leaves_without_a_word_harms_nobody(sandbox: Sandbox) -> None:
    """Clients that are cut off cost the others no update, and the exchange no connection; on the loop of production."""
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
                assert (await client.get(f"{url}/exchanges")).json()["kraken"]["streams"]["reconnects"] == 0
