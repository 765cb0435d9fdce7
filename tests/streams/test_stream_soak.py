"""Streams under constant failures: 5 minutes in `make stream-soak`, 15 s in `make test-all`."""

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
WARM_UP_SECONDS = 20  # until objects that are created once exist
CHANNELS = ("ticker", "book", "trades")
SPARE_OBJECTS = (
    1500  # some connections for REST are kept for a while; five minutes are 50,000 updates
)
TROUBLE = (
    {"drop": "close"},
    {"drop": "cut"},
    {"freeze": True},
    {"refuse": True},
    {"body": "{"},
    {"latency_ms": 300},
    {"status": 500, "drop": "cut", "only": "ws"},
)
Seen = dict[tuple[str, str], list[int]]  # sequence numbers by channel and exchange


@asynccontextmanager
async def joined(live: Live) -> AsyncIterator[Client]:
    """Connect a client, and close it completely afterwards."""
    async with connect(
        live.url.replace("http", "ws") + "/ws", compression=None, close_timeout=0.1
    ) as connection:
        yield Client(connection)


async def read(client: Client, seen: Seen) -> None:
    """Record all sequence numbers, and check the rule of `seq`."""
    while True:
        message = await client.next(lambda _: True)
        client.got.clear()
        assert message["type"] != "error"
        if "seq" in message:
            numbers = seen[message["channel"], message["exchange"]]
            assert message["type"] == "snapshot" or message["seq"] == numbers[-1] + 1
            numbers.append(message["seq"])


async def trouble(sandbox: Sandbox, live: Live) -> None:
    """Cause one failure after the other, while clients connect and disconnect."""
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
    """Wait until no topic is watched, and return the number of tasks and objects."""
    watching = inside(live)
    await eventually(lambda: not watching.connections and not watching.topics)
    await eventually(lambda: not any(upstream.open_count for upstream in watching.sockets.values()))
    await asyncio.sleep(2)
    lively.clear_counts()
    gc.collect()
    return len(asyncio.all_tasks()), len(gc.get_objects())


async def watch(live: Live, lively: Sandbox, seconds: float) -> list[Seen]:
    """Run readers of all streams during failures, and return what each has received."""
    seen: list[Seen] = [defaultdict(list) for _ in range(READERS)]
    async with AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(joined(live)) for _ in seen]
        for client in clients:
            for channel in CHANNELS:
                await client.send(
                    op="subscribe", channel=channel, symbols=[BTC], exchange="all", levels=5
                )
        works = [asyncio.create_task(read(*each)) for each in zip(clients, seen, strict=True)]
        works.append(asyncio.create_task(trouble(lively, live)))
        done, _ = await asyncio.wait(works, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        for work in works:
            work.cancel()
        for work in done:
            work.result()  # raises its error: no task ends without one
        for work in works:
            with suppress(asyncio.CancelledError):
                await work
    for name in lively.listeners:
        await lively.set(name, push_ms=100)
    return seen


@pytest.mark.full
async def test_no_update_is_lost_and_nothing_leaks(
    lively: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Clients that read miss no update; afterwards no task or object is left."""
    monkeypatch.setattr(
        logging.root.manager, "disable", logging.CRITICAL
    )  # pytest keeps all log records
    async with serve(make_settings(lively, stream_idle_seconds=1), SystemClock()) as live:
        await eventually(lambda: len(live.gateway.markets.loaded_at) == 3)
        await watch(live, lively, WARM_UP_SECONDS)
        tasks, objects = await at_rest(live, lively)
        seen = await watch(live, lively, SECONDS)
        for stream in {stream for each in seen for stream in each}:
            everything = sorted({number for each in seen for number in each[stream]})
            for each in seen:
                first, last = everything.index(each[stream][0]), everything.index(each[stream][-1])
                assert each[stream] == everything[first : last + 1], stream
        assert len(seen[0]) == len(CHANNELS) * len(lively.listeners)
        await at_rest(live, lively)
        with suppress(TimeoutError):  # a busy machine may close connections late
            await eventually(lambda: len(asyncio.all_tasks()) <= tasks)
        after = await at_rest(live, lively)
        counts = f"tasks {tasks}, {after[0]}; objects {objects}, {after[1]}"
        updates = sum(map(len, seen[0].values()))
        print(f"{updates} updates each; {counts}")  # noqa: T201 - for `make stream-soak`
        assert after[0] <= tasks, asyncio.all_tasks()
        assert after[1] <= objects + SPARE_OBJECTS
