"""Streams while everything fails: for five minutes in `make stream-soak`, for some seconds in `make test-all`."""

import asyncio
import gc
import logging
import os
import random
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress

import pytest
from websockets.asyncio.client import connect

from src.core.clock import SystemClock
from src.sandbox.server import Sandbox
from tests.conftest import Live, eventually, make_settings, serve
from tests.streams.test_hub import BTC, Client, inside, slow_client

SECONDS = float(os.environ.get("VIRTUOSO_SOAK_SECONDS", "15"))
READERS = 5
WARM_SECONDS = 20  # until what is made once is made
CHANNELS = ("ticker", "book", "trades")
SPARE_OBJECTS = 1500  # some connections for REST are kept for a while; five minutes are 50,000 updates
TROUBLE = (
    {"drop": "close"}, {"drop": "cut"}, {"freeze": True}, {"refuse": True}, {"body": "{"}, {"latency_ms": 300},
    {"status": 500, "drop": "cut", "only": "ws"},
)  # fmt: skip
Seen = dict[tuple[str, str], list[int]]  # by channel and exchange, the numbers of what came


@asynccontextmanager
async def joined(live: Live) -> AsyncIterator[Client]:
    """Connect a client of which nothing is left afterwards."""
    async with connect(live.url.replace("http", "ws") + "/ws", compression=None, close_timeout=0.1) as connection:
        yield Client(connection)


async def read(client: Client, seen: Seen) -> None:
    """Note what comes, and hold each message to the rule of `seq`."""
    while True:
        message = await client.next(lambda _: True)
        client.got.clear()
        assert message["type"] != "error"
        if "seq" in message:
            numbers = seen[message["channel"], message["exchange"]]
            assert message["type"] == "snapshot" or message["seq"] == numbers[-1] + 1
            numbers.append(message["seq"])


async def trouble(sandbox: Sandbox, live: Live) -> None:
    """Break one thing after the other, and have clients come and go."""
    chance = random.Random(5)
    while True:
        name = chance.choice(list(sandbox.listeners))
        await sandbox.set(name, push_ms=100, **chance.choice(TROUBLE))
        _, writer = await slow_client(live.url.removeprefix("http://"), name)
        try:
            async with joined(live) as guest:
                await guest.subscribe("ETH/USDT", channel=chance.choice(CHANNELS), exchange="all")
                await asyncio.sleep(chance.uniform(0.5, 2))
        finally:
            writer.transport.abort()
            with suppress(OSError):
                await writer.wait_closed()
        await sandbox.set(name, push_ms=100)
        await asyncio.sleep(chance.uniform(0.5, 2))


async def at_rest(live: Live, lively: Sandbox) -> tuple[int, int]:
    """Wait until nobody watches anything; returns how many tasks and objects there are then."""
    watching = inside(live)
    await eventually(lambda: not watching.subscribers and not watching.topics)
    await eventually(lambda: not any(upstream.sockets for upstream in watching.upstreams.values()))
    await asyncio.sleep(2)
    lively.clear_counts()
    gc.collect()
    return len(asyncio.all_tasks()), len(gc.get_objects())


async def watch(live: Live, lively: Sandbox, seconds: float) -> list[Seen]:
    """Have readers watch everything for so long, amid trouble; returns what each of them saw."""
    seen: list[Seen] = [defaultdict(list) for _ in range(READERS)]
    async with AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(joined(live)) for _ in seen]
        for client in clients:
            for channel in CHANNELS:
                await client.send(op="subscribe", channel=channel, symbols=[BTC], exchange="all", levels=5)
        works = [asyncio.create_task(read(*each)) for each in zip(clients, seen, strict=True)]
        works.append(asyncio.create_task(trouble(lively, live)))
        done, _ = await asyncio.wait(works, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        for work in works:
            work.cancel()
        for work in done:
            work.result()  # which raises: none of them ends by itself
        for work in works:
            with suppress(asyncio.CancelledError):
                await work
    for name in lively.listeners:
        await lively.set(name, push_ms=100)
    return seen


@pytest.mark.full
async def test_nothing_is_lost_and_nothing_is_left(lively: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients that read miss no update and no number; after they left all is as it was before they came."""
    monkeypatch.setattr(logging.root.manager, "disable", logging.CRITICAL)  # pytest keeps what is logged
    async with serve(make_settings(lively, stream_idle_seconds=1), SystemClock()) as live:
        await eventually(lambda: len(live.gateway.markets.loaded_at) == 3)
        await watch(live, lively, WARM_SECONDS)
        tasks, objects = await at_rest(live, lively)
        seen = await watch(live, lively, SECONDS)
        for stream in {stream for each in seen for stream in each}:
            everything = sorted({number for each in seen for number in each[stream]})
            for each in seen:
                first, last = everything.index(each[stream][0]), everything.index(each[stream][-1])
                assert each[stream] == everything[first : last + 1], stream
        assert len(seen[0]) == len(CHANNELS) * len(lively.listeners)
        await at_rest(live, lively)
        with suppress(TimeoutError):  # a connection that a starved machine closes late is not one that is never closed
            await eventually(lambda: len(asyncio.all_tasks()) <= tasks)
        after = await at_rest(live, lively)
        told = (
            f"{sum(map(len, seen[0].values()))} updates each; tasks {tasks}, {after[0]}; objects {objects}, {after[1]}"
        )
        print(told)  # noqa: T201 - for `make stream-soak`
        assert after[0] <= tasks, asyncio.all_tasks()
        assert after[1] <= objects + SPARE_OBJECTS
