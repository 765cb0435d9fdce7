"""Streams end to end: real clients over real sockets, real ccxt, the sandbox's exchanges, and every way they fail."""

import asyncio
import json
import logging
import random
import socket
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from itertools import pairwise
from typing import Any

import pytest
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed

from src.core import background
from src.sandbox.server import Sandbox
from src.streams import exchange_socket as upstream
from src.streams import hub as streams
from src.streams.bus import Topic
from src.streams.exchange_socket import ExchangeSocket
from src.web import websocket
from tests.conftest import FakeClock, Live, StartGateway, eventually, sample

BTC = "BTC/USDT"
PATIENCE = 45.0  # for a message that is about to come


class Moving(FakeClock):
    """A clock that also moves a little whenever it is looked at, as real ones do."""

    def monotonic(self) -> float:
        self.elapsed += 1e-3
        return super().monotonic()


class Client:
    """A client of /ws that keeps what it got."""

    def __init__(self, connection: ClientConnection) -> None:
        self.connection = connection
        self.got: list[dict[str, Any]] = []

    async def send(self, **command: object) -> None:
        await self.connection.send(json.dumps(command))

    async def subscribe(self, *symbols: str, **more: object) -> dict[str, Any]:
        await self.send(op="subscribe", id="s", symbols=symbols or [BTC], **more)
        return await self.next(lambda message: message.get("id") == "s")

    async def next(self, wanted: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
        """Return the next message that is wanted; those before it are kept, too."""
        async with asyncio.timeout(PATIENCE):
            while True:
                message: dict[str, Any] = json.loads(await self.connection.recv())
                self.got.append(message)
                if wanted(message):
                    return message

    async def take(self, kind: str, count: int = 1, **members: object) -> list[dict[str, Any]]:
        """Return the next messages of a type that have these members."""
        return [await self.next(lambda message: is_like(message, kind, members)) for _ in range(count)]

    async def closed(self) -> tuple[int, str]:
        """Wait for the end; returns its code and reason."""
        try:
            async with asyncio.timeout(PATIENCE):
                while True:
                    self.got.append(json.loads(await self.connection.recv()))
        except ConnectionClosed as end:
            return (end.rcvd.code, end.rcvd.reason) if end.rcvd else (1006, "")


def is_like(message: dict[str, Any], kind: str, members: dict[str, object]) -> bool:
    return message["type"] == kind and all(message.get(name) == value for name, value in members.items())


Join = Callable[..., Awaitable[Client]]


@pytest.fixture
async def join() -> AsyncIterator[Join]:
    """Connect clients to /ws of a gateway."""
    async with AsyncExitStack() as stack:

        async def connected(live: Live, query: str = "", **options: Any) -> Client:
            address = live.url.replace("http", "ws") + "/ws" + query
            return Client(
                await stack.enter_async_context(
                    connect(address, **{"compression": None, "close_timeout": 0.1} | options)
                )
            )

        yield connected


def inside(live: Live) -> streams.StreamHub:
    """The gateway's streams, for what cannot be seen from outside."""
    found = live.server.lifespan.state["streams"]
    assert isinstance(found, streams.StreamHub)
    return found


def tickers(live: Live, exchange: str) -> ExchangeSocket:
    """What watches the tickers of an exchange's spot markets."""
    return inside(live).upstreams[streams.SocketKey(exchange, "ticker", swaps=False)]


async def is_pushed(live: Live, *topics: tuple[str, str, str]) -> None:
    """Wait until exchanges push these."""
    await eventually(lambda: all(it.live for it in inside(live).topics.values() if not topics or it.topic in topics))


async def has_a_pace(live: Live, clock: FakeClock) -> None:
    """Let the market move, until it is known how often something comes of it."""
    watches = [watched.watch for watched in inside(live).topics.values()]
    for _ in range(3):
        clock.advance(0.25)
        await eventually(lambda: all(watch.last == clock.monotonic() for watch in watches))


async def is_quiet(exchange: str) -> None:
    """Wait until what an exchange had pushed before it fell silent has arrived."""
    before = -1.0
    while before != (before := sample("stream_messages_received_total", exchange=exchange, channel="ticker")):  # noqa: ASYNC110
        await asyncio.sleep(0.3)


@asynccontextmanager
async def time_passes(clock: FakeClock) -> AsyncIterator[None]:
    """Let the clock go on meanwhile: how many pauses it takes until all is well again is left to chance."""

    async def go_on() -> None:
        while True:
            clock.advance(1)
            await asyncio.sleep(0.1)

    going = asyncio.create_task(go_on())
    try:
        yield
    finally:
        going.cancel()


def sockets(sandbox: Sandbox) -> dict[str, int]:
    return {name: len(listener.sockets) for name, listener in sandbox.listeners.items()}


# What comes.


@pytest.mark.parametrize("exchange", ["bybit", "binance", "kraken"])
async def test_first_a_snapshot_then_updates_without_a_hole(start: StartGateway, join: Join, exchange: str) -> None:
    """A subscription begins with a snapshot, and each update has the next number and the exchange's bid and ask."""
    live = await start()
    client = await join(live)
    answer = await client.subscribe("btc-usdt", exchange=exchange.upper())
    assert answer == {"type": "subscribed", "id": "s", "channel": "ticker", "symbols": [BTC], "errors": {}}
    (first,) = await client.take("snapshot")
    assert (first["exchange"], first["symbol"], first["channel"]) == (exchange, BTC, "ticker")
    updates = await client.take("update", 4)
    assert [message["seq"] - first["seq"] for message in updates] == [1, 2, 3, 4]
    for message in updates:
        assert 0 < message["data"]["bid"] < message["data"]["ask"]
        assert message["data"]["source"] == "stream"
        assert message["fetched_at"] == message["data"]["fetched_at"]
        assert message["sent_at"] > 0
        assert message["timestamp"] == message["data"].get("timestamp")


async def test_rest_answers_what_was_pushed_without_a_call(
    start: StartGateway, join: Join, sandbox: Sandbox, clock: FakeClock
) -> None:
    """While a symbol is watched, GET /ticker is a hit in memory of what came last, however old it would be by REST."""
    live = await start(ticker_ttl_seconds=1)
    client = await join(live)
    await client.subscribe(exchange="binance")
    await client.take("update")
    calls = sandbox.count("binance", "/api/v3/ticker")
    for _ in range(5):
        clock.advance(0.9)
        (update,) = await client.take("update")
        answer = await live.get("/ticker/BTC-USDT?exchange=binance")
        assert answer.headers["cache-status"].startswith("virtuoso; hit; detail=memory")
        assert answer.json()["source"] == "stream"
        assert answer.json()["fetched_at"] >= update["fetched_at"]
    assert sandbox.count("binance", "/api/v3/ticker") == calls


async def test_data_is_what_rest_answers(start: StartGateway, join: Join) -> None:
    """The data of an update is the answer of REST to the letter."""
    live = await start()
    client = await join(live)
    await client.subscribe(exchange="kraken")
    await client.take("update", 2)
    await live.gateway.manager.close()  # nothing more comes
    tickers(live, "kraken").lost("lost", None)
    answer = (await live.get("/ticker/BTC-USDT?exchange=kraken")).json()
    await client.send(op="ping", id="p")
    await client.next(lambda message: message["type"] == "pong")
    last = [message for message in client.got if message["type"] == "update"][-1]
    assert last["data"] == answer


async def test_upstream_does_not_grow_with_clients(start: StartGateway, join: Join, sandbox: Sandbox) -> None:
    """However many clients watch, there is one socket to an exchange and one subscription."""
    live = await start()
    clients = [await join(live) for _ in range(20)]
    for client in clients:
        await client.subscribe(BTC, "ETH/USDT", exchange="all")
    for client in clients:
        for name in ("bybit", "binance", "kraken"):
            await client.take("update", 1, exchange=name)
    assert sockets(sandbox) == {"bybit": 1, "binance": 1, "kraken": 1}
    # BTC and ETH each, and bybit's best bid and ask; one client more changes nothing.
    asked = {name: sandbox.count(name, " asked") for name in sandbox.calls}
    late = await join(live)
    await late.subscribe(BTC, "ETH/USDT", exchange="all")
    await late.take("update", 6)
    assert {name: sandbox.count(name, " asked") for name in sandbox.calls} == asked
    assert max(asked.values()) <= 4


async def test_every_update_reaches_every_client(start: StartGateway, join: Join, sandbox: Sandbox) -> None:
    """Clients that read get the same updates, all of them and in order."""
    live = await start()
    await sandbox.set("binance", push_ms=10)
    clients = [await join(live) for _ in range(5)]
    for client in clients:
        await client.subscribe(exchange="binance")
    for client in clients:
        await client.take("update", 30)
    for client in clients:
        numbers = [message["seq"] for message in client.got if message["type"] in ("snapshot", "update")]
        assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))


@pytest.mark.parametrize("exchange", ["bybit", "binance", "kraken"])
async def test_books_come_with_the_levels_asked_for(
    start: StartGateway, join: Join, sandbox: Sandbox, clock: FakeClock, exchange: str
) -> None:
    """A book has its best levels, is never crossed, moves with the market, and is what REST answers."""
    live = await start(orderbook_ttl_seconds=60)
    client = await join(live)
    await client.subscribe("ETH/USDT", channel="book", exchange=exchange, levels=3)
    await sandbox.set(exchange, push_ms=20)
    seen = set()
    for _ in range(40):
        clock.advance(0.5)
        (update,) = await client.take("update")
        data = update["data"]
        assert len(data["bids"]) == len(data["asks"]) == 3
        assert data["bids"][0][0] < data["asks"][0][0]
        assert data["bids"] == sorted(data["bids"], reverse=True)
        assert data["asks"] == sorted(data["asks"])
        seen.add(data["bids"][0][0])
    assert len(seen) > 1
    calls = Counter(sandbox.calls[exchange])
    answer = await live.get(f"/orderbook/ETH-USDT?exchange={exchange}&limit=3")
    assert answer.json()["source"] == "stream"
    assert {name for name in sandbox.calls[exchange] - calls if "asked" not in name} == set()


@pytest.mark.parametrize("exchange", ["bybit", "binance", "kraken"])
async def test_every_trade_comes_once(
    start: StartGateway, join: Join, sandbox: Sandbox, clock: FakeClock, exchange: str
) -> None:
    """Updates of trades hold each trade once, none is lost."""
    live = await start()
    await sandbox.set(exchange, push_ms=20)
    client = await join(live)
    await client.subscribe(channel="trades", exchange=exchange)
    await client.take("snapshot")
    await is_pushed_soon(live, clock)
    client.got.clear()
    for _ in range(6):
        clock.advance(1.5)
        await client.take("update")
    times = [trade["timestamp"] for message in client.got for trade in message["data"]["trades"]]
    assert times == list(range(times[0], times[0] + 500 * len(times), 500))


async def test_a_hole_in_trades_is_announced(
    start: StartGateway, join: Join, sandbox: Sandbox, clock: FakeClock
) -> None:
    """Trades that came while the socket was not there are missing; the first message after it says so."""
    live = await start()
    await sandbox.set("binance", push_ms=20)
    client = await join(live)
    await client.subscribe(channel="trades", exchange="binance")
    async with time_passes(clock):
        await client.take("update", 2)
        await sandbox.set("binance", drop="cut", push_ms=20)
        watching = inside(live).upstreams[streams.SocketKey("binance", "trades", swaps=False)]
        await eventually(lambda: watching.reconnects)
        client.got.clear()
        await client.take("snapshot")
        await client.take("update", 2)
    trades = [[trade["timestamp"] for trade in it["data"]["trades"]] for it in client.got if "seq" in it]
    for (one, other), message in zip(pairwise(trades), client.got[1:], strict=False):
        assert message["type"] == "snapshot" or other[0] == one[-1] + 500


async def is_pushed_soon(live: Live, clock: FakeClock) -> None:
    """Let the market move until something of every topic was pushed."""
    while not all(it.watch.last for it in inside(live).topics.values()):
        clock.advance(0.5)
        await asyncio.sleep(0.05)


# What fails.


async def watched(live: Live, join: Join, sandbox: Sandbox, clock: FakeClock, exchange: str = "binance") -> Client:
    """A client to whom an exchange pushes often."""
    await sandbox.set(exchange, push_ms=20)
    client = await join(live)
    await client.subscribe(exchange=exchange)
    await client.take("update", 2)
    await is_pushed(live)
    await has_a_pace(live, clock)
    return client


@pytest.mark.parametrize("exchange", ["bybit", "binance", "kraken"])
async def test_a_silent_socket_is_noticed_and_opened_again(
    start: StartGateway, join: Join, sandbox: Sandbox, clock: FakeClock, exchange: str
) -> None:
    """A socket that answers pings but pushes nothing is closed; clients hear of it, and get prices by REST."""
    live = await start()
    client = await watched(live, join, sandbox, clock, exchange)
    before = sample("stream_reconnects_total", exchange=exchange, cause="silent")
    await sandbox.set(exchange, freeze=True, push_ms=20)
    await is_quiet(exchange)
    client.got.clear()
    clock.advance(6)
    (status,) = await client.take("status")
    assert {**status, "age_ms": 0} == {
        "type": "status", "channel": "ticker", "exchange": exchange, "symbol": BTC, "state": "stale", "age_ms": 0,
    }  # fmt: skip
    assert status["age_ms"] >= 6000
    clock.advance(3)
    polled = await client.next(lambda message: message["type"] == "update" and message["data"]["source"] == "rest")
    assert polled["exchange"] == exchange
    await eventually(lambda: sample("stream_reconnects_total", exchange=exchange, cause="silent") > before)
    shown = (await live.get("/exchanges")).json()[exchange]["streams"]
    assert (shown["cause"], shown["stale"], shown["watched"]) == ("silent", 1, 1)
    health = (await live.get("/health")).json()
    assert (health["status"], health["parts"]["streams"]["status"]) == ("degraded", "degraded")
    await sandbox.set(exchange, push_ms=20)
    async with time_passes(clock):
        await client.take("status", state="live")
        await client.next(lambda message: message["type"] == "update" and message["data"]["source"] == "stream")
    assert (await live.get("/exchanges")).json()[exchange]["streams"]["cause"] is None
    numbers = [message["seq"] for message in client.got if "seq" in message]
    assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))


@pytest.mark.parametrize(
    ("exchange", "symbol", "silent", "seconds"),
    [
        ("bybit", BTC, "orderbook.1.", 6),
        ("binance", "BTC/USDT:USDT", "bookTicker", 6),
        ("bybit", BTC, "tickers.", 620),
        ("binance", "BTC/USDT:USDT", "@ticker", 620),
    ],
)
async def test_half_a_ticker_is_noticed(
    start: StartGateway,
    join: Join,
    sandbox: Sandbox,
    clock: FakeClock,
    exchange: str,
    symbol: str,
    silent: str,
    seconds: int,
) -> None:
    """A ticker whose bid and ask come apart from its last price is stale when one of the two stays away too long."""
    await sandbox.set(exchange, push_ms=20)
    live = await start(market_types="spot,swap")
    client = await join(live)
    await client.subscribe(symbol, exchange=exchange)
    await has_a_pace(live, clock)
    await eventually(lambda: all(watched.live for watched in inside(live).topics.values()))
    await sandbox.set(exchange, push_ms=20, mute=silent)
    await client.take("update", 5)
    clock.advance(seconds)
    async with time_passes(clock):  # something may have been under way
        await client.take("status", state="stale")
    client.got.clear()
    clock.advance(3)
    await client.next(lambda message: message.get("data", {}).get("source") == "rest")
    await sandbox.set(exchange, push_ms=20)
    async with time_passes(clock):
        await client.take("status", state="live")
        await client.next(lambda message: message.get("data", {}).get("source") == "stream")
    numbers = [(message["type"], message["seq"]) for message in client.got if "seq" in message]
    assert all(kind == "snapshot" or number == last + 1 for (_, last), (kind, number) in pairwise(numbers))


@pytest.mark.parametrize(("drop", "cause"), [("close", "closed"), ("cut", "closed")])
@pytest.mark.parametrize("exchange", ["bybit", "binance", "kraken"])
async def test_the_end_of_a_socket_is_invisible(
    start: StartGateway, join: Join, sandbox: Sandbox, clock: FakeClock, exchange: str, drop: str, cause: str
) -> None:
    """When an exchange closes a socket, as binance does once a day, clients notice nothing."""
    live = await start()
    client = await watched(live, join, sandbox, clock, exchange)
    before = sample("stream_reconnects_total", exchange=exchange, cause=cause)
    await sandbox.set(exchange, drop=drop, push_ms=20)
    await eventually(lambda: sample("stream_reconnects_total", exchange=exchange, cause=cause) == before + 1)
    client.got.clear()
    clock.advance(0.2)
    await asyncio.sleep(2 * streams.TICK_SECONDS)
    clock.advance(1)
    await client.take("update", 3)
    assert {message["type"] for message in client.got} == {"update"}
    numbers = [message["seq"] for message in client.got]
    assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))


async def test_pauses_grow_to_a_bound(
    start: StartGateway, join: Join, sandbox: Sandbox, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While an exchange refuses, it is asked again after pauses that double up to a bound; then it is live again."""
    pauses: list[float] = []
    monkeypatch.setattr(random, "uniform", lambda least, most: most)
    live = await start()
    client = await watched(live, join, sandbox, clock, "kraken")
    await sandbox.set("kraken", refuse=True)
    kraken = tickers(live, "kraken")
    for expected in range(2, 10):
        await eventually(lambda: kraken.reconnects == expected - 1)  # noqa: B023
        pauses.append(kraken.retry_at - clock.monotonic())
        clock.advance(pauses[-1])
    assert pauses == [0.5, 1, 2, 4, 8, 16, 30, 30]
    await sandbox.reset()
    async with time_passes(clock):
        await client.take("status", state="live")


@pytest.mark.parametrize(
    ("exchange", "junk"),
    [
        ("bybit", "{"), ("bybit", '{"topic":"tickers.BTCUSDT","type":"snapshot","data":7}'),
        ("binance", "[]"), ("binance", "{broken"), ("kraken", '{"channel":'),
        ("kraken", '{"channel":"ticker","data":{}}'),
    ],
)  # fmt: skip
async def test_junk_harms_nobody(
    start: StartGateway, join: Join, sandbox: Sandbox, clock: FakeClock, exchange: str, junk: str
) -> None:
    """What is no message never reaches a client, and when sense comes again, so do updates."""
    live = await start()
    client = await watched(live, join, sandbox, clock, exchange)
    await sandbox.set(exchange, body=junk, only="w", push_ms=20) if exchange == "binance" else await sandbox.set(
        exchange, body=junk, push_ms=20
    )
    for _ in range(5):
        clock.advance(4)
        await asyncio.sleep(0.1)
    await sandbox.reset()
    client.got.clear()
    async with time_passes(clock):
        await client.next(lambda message: message["type"] == "update" and message["data"]["source"] == "stream")
    assert all(message["data"]["price"] > 0 for message in client.got if "data" in message)


@pytest.mark.parametrize(("status", "cause"), [(451, "geo_blocked"), (429, "rate_limited"), (418, "banned")])
async def test_a_refused_connection_opens_the_breaker(
    start: StartGateway, join: Join, sandbox: Sandbox, clock: FakeClock, status: int, cause: str
) -> None:
    """An exchange that refuses our location or address keeps its breaker open, and is not connected to meanwhile."""
    live = await start()
    client = await watched(live, join, sandbox, clock)
    await sandbox.set("binance", status=status, drop="cut", only="/ws", headers={"Retry-After": "40"})
    breaker = live.gateway.manager["binance"].breaker
    await eventually(lambda: tickers(live, "binance").reconnects)
    clock.advance(1)
    await eventually(lambda: breaker.state == "open")
    assert breaker.cause == cause
    asked = sandbox.count("binance", "/ws")
    for _ in range(6):
        clock.advance(5)
        await asyncio.sleep(0.3)
    assert sandbox.count("binance", "/ws") == asked
    await sandbox.set("binance", push_ms=20)
    clock.advance(1000)
    async with time_passes(clock):
        await client.next(lambda message: message["type"] == "update" and message["data"]["source"] == "stream")


async def test_who_left_the_choice_to_us_moves_on(
    start: StartGateway, join: Join, sandbox: Sandbox, clock: FakeClock
) -> None:
    """Without an exchange the first is watched; when it goes stale the next one takes over, with a snapshot."""
    live = await start()
    for name in ("bybit", "binance"):
        await sandbox.set(name, push_ms=20)
    client = await join(live)
    await client.subscribe()
    (first,) = await client.take("snapshot")
    assert first["exchange"] == "bybit"
    await client.take("update")
    await is_pushed(live)
    await sandbox.set("bybit", refuse=True)
    await eventually(lambda: tickers(live, "bybit").cause)
    clock.advance(7)
    await client.take("status", state="stale", exchange="bybit")
    (moved,) = await client.take("snapshot")
    assert moved["exchange"] == "binance"
    await client.take("update", exchange="binance")
    await client.send(op="list", id=1)
    listed = await client.next(lambda message: message["type"] == "list")
    assert listed["streams"] == [{"channel": "ticker", "symbol": BTC, "exchange": None, "from": ["binance"]}]
    await sandbox.set("bybit", push_ms=20)
    watched = inside(live).topics[Topic("bybit", "ticker", BTC)]
    async with time_passes(clock):
        await eventually(lambda: watched.live)
    client.got.clear()
    await sandbox.set("binance", refuse=True)
    async with time_passes(clock):
        await client.take("snapshot", exchange="bybit")
        await client.take("status", state="live", exchange="bybit")  # who stopped at its end goes on
        await client.take("update", exchange="bybit")
    assert [it["exchange"] for it in client.got if it["type"] == "status"] == ["binance", "bybit"]


async def test_first_values_come_together(start: StartGateway, join: Join, sandbox: Sandbox) -> None:
    """To subscribe to many tickers of an exchange costs one call, which a small budget allows."""
    live = await start(kraken_budget="2/600")
    client = await join(live)
    symbols = [BTC, "ETH/USDT", "SOL/USDT", "XRP/USDT", "DOGE/USDT"]
    await client.subscribe(*symbols, exchange="kraken")
    first = [message["symbol"] for message in await client.take("snapshot", len(symbols))]
    assert sorted(first) == sorted(symbols)
    assert not [message for message in client.got if message["type"] == "status"]
    assert sandbox.count("kraken", "/0/public/Ticker") == 1


async def test_first_values_do_not_wait_for_others(start: StartGateway, join: Join, sandbox: Sandbox) -> None:
    """A market that hangs delays none of another type that was subscribed to by the same message."""
    live = await start(market_types="spot,swap")
    client = await join(live)
    await sandbox.set("binance", hang=True, only="/fapi")
    await client.subscribe("ETH/USDT", "SOL/USDT:USDT", exchange="binance")
    await client.take("snapshot", symbol="ETH/USDT")
    assert inside(live).topics[Topic("binance", "ticker", "SOL/USDT:USDT")].coming == 1
    await sandbox.set("binance")


async def test_what_was_lost_before_is_no_word_about_what_is_new(
    start: StartGateway, join: Join, sandbox: Sandbox, clock: FakeClock
) -> None:
    """Who subscribes anew is not told at once of the trouble others had with an exchange: it has its time, too."""
    live = await start(stream_idle_seconds=1)
    client = await join(live)
    await sandbox.set("kraken", status=503, only="/v2")
    await client.subscribe(exchange="kraken")
    async with time_passes(clock):
        await client.take("status", state="stale")
    await client.connection.close()
    async with time_passes(clock):
        await eventually(lambda: not inside(live).topics)
    assert tickers(live, "kraken").cause
    late = await join(live)
    await late.subscribe(exchange="kraken")
    await asyncio.sleep(3 * streams.TICK_SECONDS)
    await late.send(op="ping", id="p")
    await late.take("pong")
    assert not [message for message in late.got if message["type"] == "status"]
    await sandbox.set("kraken", push_ms=20)
    async with time_passes(clock):
        await late.next(lambda message: message.get("data", {}).get("source") == "stream")


async def test_a_value_comes_once(start: StartGateway, join: Join, sandbox: Sandbox) -> None:
    """What was pushed last is no news when it stands in for what cannot be had."""
    clock = Moving()
    live = await start(clock=clock, stale_seconds=600)
    client = await join(live)
    await sandbox.set("binance", push_ms=20)
    await client.subscribe(exchange="binance")
    await client.take("update", 3)
    await sandbox.set("binance", freeze=True, status=500)
    await is_quiet("binance")
    clock.advance(30)
    await client.take("status", state="stale")
    client.got.clear()
    for _ in range(3):
        late = await join(live)
        await late.subscribe(exchange="binance")
        await late.take("snapshot")
        await late.take("status", state="stale")
    await client.send(op="ping", id=1)
    await client.take("pong")
    assert not [message for message in client.got if "seq" in message]


async def test_a_symbol_that_is_left_while_others_are_asked_for_harms_nobody(
    start: StartGateway, join: Join, sandbox: Sandbox, clock: FakeClock, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """Who leaves before the exchange was asked for all is not asked for, and the rest comes."""
    monkeypatch.setattr(upstream, "BATCH", 1)
    live = await start(stream_idle_seconds=1)
    client = await join(live)
    await client.subscribe(BTC, "ETH/USDT", "SOL/USDT", exchange="kraken")
    await eventually(lambda: sandbox.count("kraken", " asked"))
    await client.send(op="unsubscribe", symbols=["ETH/USDT", "SOL/USDT"], exchange="kraken")
    await client.take("unsubscribed")
    clock.advance(2)
    await eventually(lambda: len(inside(live).topics) == 1)
    await client.take("update", 3, symbol=BTC)
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


async def test_rest_is_right_after_a_subscription_while_an_exchange_is_down(
    start: StartGateway, join: Join, sandbox: Sandbox, clock: FakeClock
) -> None:
    """What stands in for a failed load is marked once, however often it is sent."""
    live = await start(ticker_ttl_seconds=1)
    await live.get("/ticker/BTC-USDT?exchange=kraken")
    await sandbox.set("kraken", refuse=True)
    clock.advance(5)
    client = await join(live)
    await client.subscribe(exchange="kraken")
    (first,) = await client.take("snapshot")
    assert first["data"]["stale"] is True
    for _ in range(2):
        answer = await live.get("/ticker/BTC-USDT?exchange=kraken")
        assert answer.json()["stale"] is True
        assert answer.text.count("stale") == 1


async def test_a_stale_stream_begins_with_what_rest_has(
    start: StartGateway, join: Join, sandbox: Sandbox, clock: FakeClock
) -> None:
    """Who subscribes to what is not pushed any more gets what can be had, not what was pushed last."""
    live = await start()
    client = await watched(live, join, sandbox, clock)
    await sandbox.set("binance", freeze=True, push_ms=20)
    await is_quiet("binance")
    await client.connection.close()
    await eventually(lambda: not inside(live).subscribers)
    clock.advance(100)
    await eventually(lambda: all(it.live is False for it in inside(live).topics.values()))
    late = await join(live)
    await late.subscribe(exchange="binance")
    (first,) = await late.take("snapshot")
    assert first["data"]["source"] == "rest"
    assert first["fetched_at"] / 1000 > clock.time() - 1


@pytest.mark.parametrize("exchange", ["bybit", "binance"])
async def test_what_was_left_and_is_watched_again_is_new(
    start: StartGateway, join: Join, sandbox: Sandbox, clock: FakeClock, exchange: str
) -> None:
    """Nothing of what was known an hour ago comes back, while others kept the socket open."""
    symbol, other = ("BTC/USDT", "ETH/USDT") if exchange == "bybit" else ("BTC/USDT:USDT", "ETH/USDT:USDT")
    live = await start(stream_idle_seconds=1, market_types="spot,swap")
    await sandbox.set(exchange, push_ms=20)
    client = await join(live)
    assert not (await client.subscribe(symbol, other, exchange=exchange))["errors"]
    await client.next(lambda message: message["type"] == "update" and message["symbol"] == symbol)
    await client.send(op="unsubscribe", symbols=[symbol], exchange=exchange)
    await client.take("unsubscribed")
    clock.advance(2)
    await eventually(lambda: len(inside(live).topics) == 1)
    await eventually(lambda: sandbox.count(exchange, " asked") >= 3)
    clock.advance(3600)
    await client.subscribe(symbol, exchange=exchange)
    for update in await client.take("update", 3, symbol=symbol):
        assert update["data"]["bid"] <= update["data"]["last"] <= update["data"]["ask"]
        assert update["timestamp"] / 1000 > clock.time() - 60


async def test_who_was_told_that_there_is_nothing_is_told_when_there_is(
    start: StartGateway, join: Join, sandbox: Sandbox, clock: FakeClock
) -> None:
    """A stream without a first value is stale at once, with the reason, and live with the first push."""
    live = await start()
    await sandbox.set("kraken", refuse=True)
    client = await join(live)
    await client.subscribe(exchange="kraken")
    (status,) = await client.take("status")
    assert (status["state"], status["age_ms"], status["code"]) == ("stale", None, "exchange_unavailable")
    await sandbox.set("kraken")
    async with time_passes(clock):
        await client.take("status", state="live")
    await client.take("update")


async def test_who_could_not_move_moves_when_he_can(
    start: StartGateway, join: Join, sandbox: Sandbox, clock: FakeClock
) -> None:
    """While no exchange pushes a subscription without one waits; the first that pushes again takes it over."""
    live = await start()
    client = await join(live)
    await client.subscribe()
    await client.take("update", exchange="bybit")
    await client.subscribe(exchange="all")  # so that all are watched
    for name in ("binance", "kraken"):
        await client.take("update", exchange=name)
    for name in ("bybit", "binance", "kraken"):
        await sandbox.set(name, refuse=True)
    await eventually(lambda: all(tickers(live, name).cause for name in ("bybit", "binance", "kraken")))
    clock.advance(5)
    await client.take("status", 3, state="stale")
    await sandbox.set("kraken")
    async with time_passes(clock):
        await client.take("status", state="live", exchange="kraken")

    async def moved() -> bool:
        await client.send(op="list", id=1)
        listed = await client.next(lambda message: message["type"] == "list")
        return {"channel": "ticker", "symbol": BTC, "exchange": None, "from": ["kraken"]} in listed["streams"]

    async with asyncio.timeout(PATIENCE):
        while not await moved():
            clock.advance(1)
            await asyncio.sleep(0.3)


async def test_what_nobody_watches_is_no_trouble(
    start: StartGateway, join: Join, sandbox: Sandbox, clock: FakeClock
) -> None:
    """A lost socket is told of in /health while somebody wants it, and no longer."""
    live = await start(stream_idle_seconds=10)
    client = await watched(live, join, sandbox, clock, "kraken")
    await sandbox.set("kraken", refuse=True)
    await eventually(lambda: tickers(live, "kraken").cause)
    assert "kraken" in (await live.get("/health")).json()["parts"]["streams"]["reason"]
    await client.connection.close()
    await eventually(lambda: not inside(live).subscribers)
    clock.advance(11)
    await eventually(lambda: tickers(live, "kraken").trouble is None)
    assert (await live.get("/health")).json()["parts"]["streams"]["status"] == "healthy"


@pytest.mark.parametrize(("gap", "most"), [(0.05, 0), (1.0, 0), (5.0, 0), (40.0, 4), (55.0, 4)])
def test_each_symbol_has_its_own_pace(gap: float, most: int) -> None:
    """What comes seldom is not cut for that, once it is known; what comes often is missed soon."""
    watch, now, cuts = upstream.Liveness(0.0), 0.0, 0
    watch.asked_at = 0.0
    for _ in range(100):
        due = now + gap
        while now < due:
            if watch.is_silent(now):
                cuts += 1
                watch.tried()
                watch.asked_at = now
            now += min(1.0, gap)
        watch.came(now)
    assert cuts <= most
    assert watch.is_silent(now + max(11 * gap, 6))
    assert not watch.is_silent(now + gap)


def test_a_quiet_night_is_forgotten() -> None:
    """What had come once in a while for a long time is missed soon when it comes often again."""
    watch, now = upstream.Liveness(0.0), 0.0
    watch.asked_at = 0.0
    for pause in (*[900.0] * 50, *[1.0] * 600):
        now += pause
        watch.came(now)
    assert not watch.is_silent(now + 9)
    assert watch.is_silent(now + 12)


def test_an_outage_is_no_new_pace() -> None:
    """After an hour without anything a symbol that came each second is missed as soon as before, within a minute."""
    watch = upstream.Liveness(0.0)
    for second in range(60):
        watch.came(float(second))
    for second in range(3600, 3620):
        watch.came(float(second))
    assert watch.is_silent(3620 + 12) is False  # it is not subscribed to
    watch.asked_at = 3600.0
    assert watch.is_silent(3620 + 12)


@pytest.mark.parametrize("pause", [6.5, 20.0, 60.0])
def test_bursts_have_the_pace_of_their_pauses(pause: float) -> None:
    """What comes several at once is not missed between, once a few pauses are known."""
    watch, cuts = upstream.Liveness(0.0), 0
    watch.asked_at = 0.0
    for burst in range(50):
        now = burst * pause
        cuts += watch.is_silent(now)
        for number in range(20):
            watch.came(now + number * 0.02)
    assert cuts <= 6
    assert watch.is_silent(now + 11 * pause)


async def test_only_a_message_shows_that_a_stream_is_live(
    start: StartGateway, join: Join, sandbox: Sandbox, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A symbol that fell silent stays stale though more patience is had with it after each try in vain."""
    live = await start()
    client = await watched(live, join, sandbox, clock)
    await sandbox.set("binance", push_ms=500, mute="ethusdt")
    await client.subscribe("ETH/USDT", exchange="binance")
    ether = inside(live).topics[Topic("binance", "ticker", "ETH/USDT")]
    await eventually(lambda: ether.watch.asked_at)
    await sandbox.set("binance", push_ms=500)
    await eventually(lambda: ether.watch.messages)
    await sandbox.set("binance", push_ms=20, mute="ethusdt")
    await eventually(lambda: ether.live)
    assert ether.watch.messages == 1, "its pace is not known yet"
    clock.advance(4 * upstream.FIRST_SECONDS)  # more than it has after a try in vain
    await client.take("status", state="stale", symbol="ETH/USDT")
    monkeypatch.setattr(upstream, "FIRST_SECONDS", 500.0)
    clock.advance(1)
    await asyncio.sleep(3 * streams.TICK_SECONDS)
    await client.send(op="ping", id="p")
    await client.take("pong")
    assert [it["state"] for it in client.got if it["type"] == "status" and it["symbol"] != BTC] == ["stale"]
    await sandbox.set("binance", push_ms=20)
    async with time_passes(clock):
        await client.take("status", state="live", symbol="ETH/USDT")


async def test_old_trades_are_no_news(start: StartGateway, join: Join, sandbox: Sandbox, clock: FakeClock) -> None:
    """Who subscribes to trades that are stale brings nothing to those who had them."""
    live = await start()
    await sandbox.set("kraken", push_ms=20)
    one = await join(live)
    await one.subscribe(channel="trades", exchange="kraken")
    await one.take("snapshot")
    await sandbox.set("kraken", freeze=True)
    clock.advance(30)
    await one.take("status", state="stale")
    one.got.clear()
    late = await join(live)
    await late.subscribe(channel="trades", exchange="kraken")
    await late.take("snapshot")
    await late.take("status", state="stale")
    await one.send(op="ping", id="p")
    await one.take("pong")
    assert not [message for message in one.got if "seq" in message]


async def test_a_snapshot_says_when_it_was_sent(
    start: StartGateway, join: Join, sandbox: Sandbox, clock: FakeClock
) -> None:
    """Who comes later is not told the age that a value had for somebody else."""
    live = await start()
    await watched(live, join, sandbox, clock, "kraken")
    await sandbox.set("kraken", freeze=True)
    await is_quiet("kraken")
    for _ in range(2):
        client, before = await join(live), time.time_ns() // 1_000_000
        await client.subscribe(exchange="kraken")
        (first,) = await client.take("snapshot")
        assert first["sent_at"] >= before


async def test_budgets_are_left_to_requests(
    start: StartGateway, join: Join, sandbox: Sandbox, clock: FakeClock
) -> None:
    """What is stale is not asked for while more than half of an exchange's budget is used."""
    live = await start(kraken_budget="10/600")
    client = await watched(live, join, sandbox, clock, "kraken")
    for number in range(1, 6):
        await live.get(f"/orderbook/BTC-USDT?exchange=kraken&limit={number}")
    assert live.gateway.manager.limiter.used_ratio("kraken") > streams.POLL_BUDGET_RATIO
    await sandbox.set("kraken", freeze=True, rate_limit=-1)
    await is_quiet("kraken")
    clock.advance(10)
    await client.take("status", state="stale")
    asked = sandbox.count("kraken", "/0/public/Ticker")
    for _ in range(4):
        clock.advance(3)
        await asyncio.sleep(0.6)  # a look at all of it
    assert sandbox.count("kraken", "/0/public/Ticker") == asked
    assert live.gateway.manager.is_available("kraken")


async def test_what_was_given_is_counted(start: StartGateway, join: Join, sandbox: Sandbox, clock: FakeClock) -> None:
    """The counter of messages has what clients got, and the histogram how old it was."""
    live = await start()
    await sandbox.set("kraken", push_ms=20)
    await live.get("/metrics")
    before, ages = sample("stream_messages_sent_total", channel="ticker"), sample("stream_event_age_seconds_count")
    clients = [await join(live) for _ in range(2)]
    for client in clients:
        await client.subscribe(channel="ticker", exchange="kraken")
        await client.take("update", 3)
    await sandbox.set("kraken", freeze=True)
    await eventually(lambda: not inside(live).slow)
    await asyncio.sleep(0.5)  # for what is under way
    for client in clients:
        await client.send(op="ping", id="p")
        await client.take("pong")
    await live.get("/metrics")
    got = sum("seq" in message for client in clients for message in client.got)
    assert sample("stream_messages_sent_total", channel="ticker") - before == got
    assert 3 <= sample("stream_event_age_seconds_count") - ages <= got


# What is bounded.


async def test_hot_tickers_keep_to_the_bound(start: StartGateway, join: Join, clock: FakeClock) -> None:
    """What is asked for often is not watched when subscribers have taken all streams there may be."""
    live = await start(stream_max_topics=1)
    client = await join(live)
    await client.subscribe(exchange="kraken")
    await client.take("snapshot")
    for _ in range(3):
        for _ in range(streams.HOT_REQUESTS):
            await live.get("/ticker/ETH-USDT?exchange=binance")
        await asyncio.sleep(0.6)  # a look at all of it
        clock.advance(1)
    assert [topic.symbol for topic in inside(live).topics] == [BTC]


async def test_what_nobody_wants_is_watched_no_more(
    start: StartGateway, join: Join, sandbox: Sandbox, clock: FakeClock
) -> None:
    """Some time after the last subscriber a symbol is unsubscribed from, and a socket without any is closed."""
    live = await start(stream_idle_seconds=30)
    client = await watched(live, join, sandbox, clock)
    await client.send(op="unsubscribe", symbols=["btc-usdt"], exchange="binance")
    assert (await client.take("unsubscribed"))[0]["symbols"] == [BTC]
    clock.advance(29)
    await asyncio.sleep(1)
    assert inside(live).topics
    clock.advance(2)
    await eventually(lambda: not inside(live).topics)
    await eventually(lambda: sockets(sandbox)["binance"] == 0)
    assert sample("stream_watched", exchange="binance", channel="ticker") == 0


async def test_watched_streams_are_bounded(start: StartGateway, join: Join, clock: FakeClock) -> None:
    """A stream too many is refused with an error that says so; one that nobody wants any more makes room."""
    live = await start(stream_max_topics=2)
    client = await join(live)
    await client.subscribe(BTC, "ETH/USDT", exchange="kraken")
    refused = await client.subscribe("SOL/USDT", exchange="kraken")
    assert (refused["type"], refused["status"], refused["code"]) == ("error", 503, "too_many_streams")
    answer = await live.get("/stream/SOL-USDT?exchange=kraken")
    assert (answer.status_code, answer.json()["code"]) == (503, "too_many_streams")
    assert answer.headers["retry-after"]
    await client.send(op="unsubscribe", symbols=[BTC], exchange="kraken")
    await client.take("unsubscribed")
    assert (await client.subscribe("SOL/USDT", exchange="kraken"))["type"] == "subscribed"


async def test_one_client_may_have_so_many(start: StartGateway, join: Join) -> None:
    """A client's streams are bounded; the error names the bound, and each of `all` counts."""
    live = await start(stream_max_subscriptions=4)
    client = await join(live)
    assert (await client.subscribe(exchange="all"))["type"] == "subscribed"
    await client.take("snapshot", 3)
    refused = await client.subscribe("ETH/USDT", exchange="all")
    assert (refused["status"], refused["code"]) == (429, "too_many_subscriptions")
    assert "4 are allowed" in refused["detail"]
    assert (await client.subscribe("ETH/USDT", exchange="kraken"))["symbols"] == ["ETH/USDT"]


async def test_clients_are_bounded(start: StartGateway, join: Join) -> None:
    """A client too many is told to come later, over both transports."""
    live = await start(stream_max_clients=1)
    first = await join(live)
    await first.send(op="ping")
    await first.take("pong")
    second = await join(live)
    assert (await second.closed())[0] == 1013
    assert second.got[0]["code"] == "too_many_streams"
    assert (await live.get("/stream/BTC-USDT")).status_code == 503
    await first.connection.close()
    await eventually(lambda: not inside(live).subscribers)
    third = await join(live)
    await third.send(op="ping")
    await third.take("pong")


async def test_what_is_asked_for_often_is_watched(start: StartGateway, sandbox: Sandbox, clock: FakeClock) -> None:
    """The hundredth request for a ticker within a minute earns a watch; it ends when the interest does."""
    live = await start(stream_idle_seconds=100)
    before = sample("stream_messages_received_total", exchange="kraken", channel="ticker")
    for _ in range(2 * streams.HOT_REQUESTS):
        await live.get("/ticker/BTC-USDT?exchange=kraken")
        await asyncio.sleep(0.01)
    await eventually(lambda: inside(live).topics)
    await eventually(lambda: sample("stream_messages_received_total", exchange="kraken", channel="ticker") > before)
    assert (await live.get("/ticker/BTC-USDT?exchange=kraken")).json()["source"] == "stream"
    clock.advance(101)
    await eventually(lambda: not inside(live).topics)


async def test_some_requests_are_no_reason_to_watch(start: StartGateway, clock: FakeClock) -> None:
    """Fewer requests in a minute change nothing."""
    live = await start()
    for _ in range(3):
        for _ in range(streams.HOT_REQUESTS // 2):
            await live.get("/ticker/BTC-USDT?exchange=kraken")
        await asyncio.sleep(2 * streams.TICK_SECONDS)
        clock.advance(streams.HOT_SECONDS)
        await asyncio.sleep(2 * streams.TICK_SECONDS)
    assert not inside(live).topics


# Who connects.


@pytest.mark.parametrize(
    ("message", "code"),
    [
        ("junk", "malformed_request"), ("[]", "malformed_request"), ('{"op":"fly"}', "invalid_parameter"),
        ('{"op":"subscribe","symbols":["FOO/BAR"]}', "unknown_symbol"),
        ('{"op":"subscribe","symbols":["BTC/USDT"],"exchange":"mtgox"}', "unknown_exchange"),
        ('{"op":"subscribe","symbols":["BTC/USDT"],"channel":"news"}', "invalid_parameter"),
        ('{"op":"subscribe","symbols":["BTC/USDT"],"levels":51,"channel":"book"}', "invalid_parameter"),
        ('{"op":"subscribe","symbols":[],"exchange":"kraken"}', "invalid_parameter"),
        ('{"op":"ping","more":1}', "invalid_parameter"), ('{"symbols":["BTC/USDT"]}', "invalid_parameter"),
        ('{"op":"subscribe","symbols":["BTC/USDT"],"levels":"5","channel":"book"}', "invalid_parameter"),
        ('{"op":"subscribe","symbols":["BTC/USDT"],"levels":true,"channel":"book"}', "invalid_parameter"),
        ('{"op":"subscribe","symbols":"BTC/USDT"}', "invalid_parameter"),
    ],
)  # fmt: skip
async def test_a_wrong_message_is_answered_with_a_problem(
    start: StartGateway, join: Join, message: str, code: str
) -> None:
    """Every message that cannot be obeyed has an answer that says why, with its id where there is one."""
    live = await start()
    client = await join(live)
    if message.startswith("{"):
        message = json.dumps({"id": "x"} | json.loads(message))
    await client.connection.send(message)
    (problem,) = await client.take("error")
    assert problem["code"] == code
    assert problem["detail"]
    assert problem["id"] == ("x" if message.startswith("{") else None)
    await client.send(op="ping", id=2)
    await client.take("pong", id=2)


async def test_some_of_many_may_be_wrong(start: StartGateway, join: Join) -> None:
    """Of several symbols those that exist are subscribed to; each other has its problem."""
    live = await start()
    client = await join(live)
    answer = await client.subscribe(BTC, "FOO/BAR", exchange="kraken")
    assert answer["symbols"] == [BTC]
    assert {symbol: problem["code"] for symbol, problem in answer["errors"].items()} == {"FOO/BAR": "unknown_symbol"}


async def test_some_of_many_may_be_wrong_in_the_end(start: StartGateway, join: Join) -> None:
    """Each symbol is unsubscribed from for itself, too."""
    live = await start()
    client = await join(live)
    await client.subscribe(BTC, exchange="kraken")
    await client.send(op="unsubscribe", symbols=["?", BTC], exchange="kraken")
    (answer,) = await client.take("unsubscribed")
    assert answer["symbols"] == [BTC]
    assert {symbol: problem["code"] for symbol, problem in answer["errors"].items()} == {"?": "malformed_request"}
    await client.send(op="unsubscribe", symbols=[BTC], exchange="kraken")
    (problem,) = await client.take("error")
    assert problem["code"] == "invalid_parameter"
    assert "list" in problem["detail"]


async def test_wrong_symbols_count_as_messages(start: StartGateway, join: Join) -> None:
    """To look for what is close to a wrong symbol costs something: a hundred at a time is too much."""
    live = await start()
    client = await join(live)
    wrong = [f"FOO{number}/USDT" for number in range(websocket.MAX_SYMBOLS)]
    answer = await client.subscribe(*wrong, exchange="kraken")
    assert len(answer["errors"]) == websocket.MAX_SYMBOLS
    await client.send(op="ping")
    assert (await client.closed())[0] == 1008


async def test_an_id_that_is_none_is_not_repeated(start: StartGateway, join: Join) -> None:
    """An id is a text or a number; whatever else it is, the message is answered."""
    live = await start()
    client = await join(live)
    for odd in ("[" * 300 + "]" * 300, "1.5", "{}"):
        await client.connection.send('{"op":"ping","id":' + odd + "}")
        (problem,) = await client.take("error")
        assert (problem["code"], problem["id"]) == ("invalid_parameter", None)
        assert problem["detail"] == "id has to be a text or a whole number"


async def test_keys_are_asked_for(start: StartGateway, join: Join) -> None:
    """With API keys a client needs one, in the header or, for browsers, in the query; else it is closed with 1008."""
    live = await start(api_keys="bot:secret-key-1")
    refused = await join(live)
    assert (await refused.closed())[0] == 1008
    assert refused.got[0]["code"] == "unauthorized"
    wrong = await join(live, "?token=wrong-key-1")
    assert (await wrong.closed())[0] == 1008
    for options in ({"query": "?token=secret-key-1"}, {"additional_headers": {"X-API-Key": "secret-key-1"}}):
        client = await join(live, **options)
        assert (await client.subscribe(exchange="kraken"))["type"] == "subscribed"
    assert (await live.get("/stream/BTC-USDT")).status_code == 401
    assert (await live.get("/ticker/BTC-USDT?token=secret-key-1")).status_code == 401
    async with live.client.stream("GET", f"{live.url}/stream/BTC-USDT?token=secret-key-1") as answer:
        assert answer.status_code == 200


@pytest.mark.parametrize(
    ("origin", "allowed"),
    [
        ("https://evil.example", False), ("https://app.example", True), ("http://HOST", True), ("null", False),
        ("http://HOST.evil.example", False),
    ],
)  # fmt: skip
async def test_origins_are_checked(start: StartGateway, join: Join, origin: str, *, allowed: bool) -> None:
    """A page may connect from where the gateway is itself and from CORS_ORIGINS, and from nowhere else."""
    live = await start(cors_origins="https://app.example")
    host = live.url.removeprefix("http://")
    client = await join(live, additional_headers={"Origin": origin.replace("HOST", host)})
    if not allowed:
        assert (await client.closed())[0] == 1008
        assert client.got[0]["code"] == "origin_refused"
        return
    await client.send(op="ping")
    await client.take("pong")


@pytest.mark.parametrize(("streaming", "told"), [(True, "only WebSockets are served"), (False, "nothing is served")])
async def test_who_asks_for_the_socket_as_for_a_page_is_told(
    start: StartGateway, told: str, *, streaming: bool
) -> None:
    """Without a handshake `/ws` is a 404, and says what is served there."""
    live = await start(streaming=streaming)
    answer = await live.get("/ws")
    assert (answer.status_code, answer.json()["code"]) == (404, "not_found")
    assert answer.json()["detail"].startswith(told)


async def test_a_message_too_long_ends_the_connection(start: StartGateway, join: Join) -> None:
    """A message beyond the bound is not read: 1009."""
    live = await start()
    client = await join(live)
    await client.connection.send("x" * (websocket.MAX_MESSAGE_BYTES + 1))
    assert (await client.closed())[0] == 1009


async def test_too_many_messages_end_the_connection(start: StartGateway, join: Join, clock: FakeClock) -> None:
    """Who sends more than the bound is told so, and closed with 1008; time gives messages back."""
    live = await start()
    client = await join(live)
    for _ in range(websocket.MESSAGES_AT_ONCE):
        await client.send(op="ping")
    await client.take("pong", websocket.MESSAGES_AT_ONCE)
    clock.advance(1)
    for _ in range(websocket.MESSAGES_PER_SECOND + 1):
        await client.send(op="ping")
    assert (await client.closed())[0] == 1008
    assert Counter(message["type"] for message in client.got)["pong"] == (
        websocket.MESSAGES_AT_ONCE + websocket.MESSAGES_PER_SECOND
    )
    assert client.got[-1]["code"] == "too_many_requests"


async def test_who_wants_nothing_is_closed(start: StartGateway, join: Join, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client without a subscription is closed after a while, with 1000; one with a subscription stays."""
    monkeypatch.setattr(websocket, "IDLE_SECONDS", 0.5)
    live = await start()
    busy = await join(live)
    await busy.subscribe(exchange="kraken")
    idle = await join(live)
    assert (await idle.closed())[0] == 1000
    await busy.take("update", 2)


async def test_there_is_a_heartbeat(start: StartGateway, join: Join, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients hear that the gateway is there while nothing else happens."""
    monkeypatch.setattr(streams, "HEARTBEAT_SECONDS", 0.1)
    live = await start()
    client = await join(live)
    (beat, _) = await client.take("heartbeat", 2)
    assert abs(beat["sent_at"] / 1000 - time.time()) < 600


# Who is slow.


async def slow_client(address: str, exchange: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Connect a client that reads nothing more than it has to, into small buffers."""
    host, port = address.split(":")
    own = socket.socket()
    own.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    own.setblocking(False)
    await asyncio.get_running_loop().sock_connect(own, (host, int(port)))
    reader, writer = await asyncio.open_connection(sock=own, limit=1024)
    writer.write(
        b"GET /ws HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n\r\n"
    )
    await reader.readuntil(b"\r\n\r\n")
    wants = json.dumps({"op": "subscribe", "symbols": [BTC], "exchange": exchange}).encode()
    writer.write(bytes((0x81, 0x80 | len(wants))) + bytes(4) + wants)
    return reader, writer


async def test_a_slow_client_gets_the_newest_and_harms_nobody(
    start: StartGateway, join: Join, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client that does not read costs nobody an update; when it reads again, a snapshot says what it missed."""
    monkeypatch.setattr(websocket, "BUFFER_BYTES", 4096)
    monkeypatch.setattr(websocket, "SEND_BUFFER_BYTES", 4096)
    live = await start()
    await sandbox.set("binance", push_ms=2)
    good = await join(live)
    await good.subscribe(exchange="binance")
    reader, writer = await slow_client(live.url.removeprefix("http://"), "binance")
    before = sample("stream_conflated_total")
    async with asyncio.timeout(PATIENCE):
        while sample("stream_conflated_total") < before + 20:
            await good.take("update")
    numbers = [message["seq"] for message in good.got if "seq" in message]
    assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
    late = [message async for message in frames(reader, 200)]
    seen = [message for message in late if "seq" in message]
    holes = [(one, other) for one, other in pairwise(seen) if other["seq"] != one["seq"] + 1]
    assert holes
    assert all(other["type"] == "snapshot" for _, other in holes)
    writer.close()


async def test_a_client_that_takes_nothing_is_closed(
    start: StartGateway, join: Join, sandbox: Sandbox, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After some time a client that does not even take the newest is closed with 1013, and cut if it must be."""
    monkeypatch.setattr(websocket, "BUFFER_BYTES", 4096)
    monkeypatch.setattr(websocket, "SEND_BUFFER_BYTES", 4096)
    monkeypatch.setattr(websocket, "CLOSE_SECONDS", 0.2)
    live = await start()
    await sandbox.set("binance", push_ms=2)
    _, writer = await slow_client(live.url.removeprefix("http://"), "binance")
    await eventually(lambda: inside(live).slow)
    before = sample("stream_dropped_total", reason="slow_client")
    async with time_passes(clock):  # until its buffers are full, and some time more
        await eventually(lambda: not inside(live).subscribers)
    assert sample("stream_dropped_total", reason="slow_client") == before + 1
    await eventually(lambda: not live.server.server_state.connections)
    writer.close()


async def frames(reader: asyncio.StreamReader, count: int) -> AsyncIterator[dict[str, Any]]:
    """Read text frames of a server."""
    for _ in range(count):
        head = await reader.readexactly(2)
        size = head[1]
        if size == 126:
            size = int.from_bytes(await reader.readexactly(2))
        body = await reader.readexactly(size)
        if head[0] == 0x81:
            yield json.loads(body)


async def test_streaming_can_be_switched_off(start: StartGateway) -> None:
    """Without STREAMING there is neither path, and no socket to an exchange."""
    live = await start(streaming=False)
    assert (await live.get("/stream/BTC-USDT")).status_code == 404
    with pytest.raises(Exception, match=r"403|404"):
        async with connect(live.url.replace("http", "ws") + "/ws"):
            pass
    assert (await live.get("/exchanges")).json()["kraken"].get("streams") is None
    assert (await live.get("/health")).json()["parts"]["streams"]["reason"] == "off"


async def test_an_error_of_ours_is_not_the_exchanges(
    start: StartGateway,
    join: Join,
    sandbox: Sandbox,
    clock: FakeClock,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """What we fail to deliver is our own error, with a traceback; the socket stays, and subscribers are told."""
    monkeypatch.setattr(background, "_logged_at", {})
    live = await start()
    client = await watched(live, join, sandbox, clock)
    upstream, before = tickers(live, "binance"), sample("internal_errors_total", component="delivery")
    opened = sandbox.count("binance", "/stream")
    with monkeypatch.context() as broken:
        broken.setattr(live.gateway, "adopt", None)
        for _ in range(7):
            clock.advance(1)
            await eventually(lambda: upstream._heard_at == clock.monotonic() or upstream.cause)
        (status,) = await client.take("status")
        assert status["state"] == "stale"
    assert (upstream.reconnects, sandbox.count("binance", "/stream"), sockets(sandbox)["binance"]) == (0, opened, 1)
    assert sample("internal_errors_total", component="delivery") >= before + 7
    errors = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert ["TypeError" in (record.exc_text or "") for record in errors] == [True], "once in a while is enough"
    client.got.clear()
    async with time_passes(clock):
        await client.take("status", state="live")
        await client.take("update", 2)
    assert upstream.reconnects == 0
    messages = [(message["type"], message["seq"]) for message in client.got if "seq" in message]
    assert all(kind == "snapshot" or number == last + 1 for (_, last), (kind, number) in pairwise(messages))


async def test_a_subscriber_that_fails_disturbs_no_other(
    start: StartGateway, join: Join, sandbox: Sandbox, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error in what is done for one client is no matter of the others; what it missed is announced."""
    monkeypatch.setattr(streams, "HEARTBEAT_SECONDS", 0.05)
    live = await start()
    first = await watched(live, join, sandbox, clock)
    (failing,) = inside(live).subscribers
    second = await join(live)
    await second.subscribe(exchange="binance")
    await second.take("update", 2)
    with monkeypatch.context() as broken:
        for name in ("offer", "beat", "catch_up"):
            broken.setattr(failing, name, None)
        inside(live).slow |= inside(live).subscribers
        await second.take("snapshot", 2)
        await second.take("heartbeat", 2)
        await eventually(lambda: inside(live).slow == {failing})
    inside(live).slow.clear()
    first.got.clear()
    await first.take("snapshot")
    await first.take("update", 2)
    assert tickers(live, "binance").reconnects == 0
    with monkeypatch.context() as broken:
        broken.setattr(failing, "goodbye", None)
        inside(live).goodbye()
    assert await second.closed() == (1001, "the gateway stops")


async def test_stopping_is_said(start: StartGateway, join: Join) -> None:
    """When the gateway stops, clients of /ws are closed with 1001, and server-sent events end."""
    live = await start()
    client = await join(live)
    await client.subscribe(exchange="kraken")
    async with live.client.stream("GET", f"{live.url}/stream/BTC-USDT?exchange=kraken") as answer:
        lines = answer.aiter_lines()
        await anext(lines)
        await eventually(lambda: len(inside(live).subscribers) == 2)
        inside(live).goodbye()
        async for _ in lines:
            pass
    assert await client.closed() == (1001, "the gateway stops")
