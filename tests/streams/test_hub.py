"""Streams end to end: real clients, real ccxt and the sandbox's exchanges, with all failures."""

import asyncio
import gc
import json
import logging
import socket
import time
import warnings
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from itertools import pairwise
from typing import Any
from urllib.parse import urlsplit

import pytest
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed

from src.core import background
from src.exchanges.profiles import PROFILES, SocketLimits
from src.sandbox.server import Sandbox
from src.streams import hub, liveness, monitor
from src.streams.exchange_socket import ExchangeSocket
from src.streams.topics import SocketKey, Topic
from src.web import websocket
from tests.conftest import FakeClock, Live, StartGateway, eventually, sample

BTC = "BTC/USDT"
MESSAGE_SECONDS = 45.0  # longest wait for an expected message


class MovingClock(FakeClock):
    """A clock that advances on each reading, as real clocks do."""

    def monotonic(self) -> float:
        self.elapsed += 1e-3
        return super().monotonic()


class Client:
    """A client of /ws that keeps all received messages."""

    def __init__(self, connection: ClientConnection) -> None:
        self.connection = connection
        self.got: list[dict[str, Any]] = []

    async def send(self, **command: object) -> None:
        await self.connection.send(json.dumps(command))

    async def subscribe(self, *symbols: str, **more: object) -> dict[str, Any]:
        await self.send(op="subscribe", id="s", symbols=symbols or [BTC], **more)
        return await self.next(lambda message: message.get("id") == "s")

    async def next(self, wanted: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
        """Return the next wanted message. Earlier messages are kept, too."""
        async with asyncio.timeout(MESSAGE_SECONDS):
            while True:
                message: dict[str, Any] = json.loads(await self.connection.recv())
                self.got.append(message)
                if wanted(message):
                    return message

    async def take(self, kind: str, count: int = 1, **members: object) -> list[dict[str, Any]]:
        """Return the next messages with this type and these members."""
        return [
            await self.next(lambda message: is_like(message, kind, members)) for _ in range(count)
        ]

    async def closed(self) -> tuple[int, str]:
        """Wait for the close frame, and return its code and reason."""
        try:
            async with asyncio.timeout(MESSAGE_SECONDS):
                while True:
                    self.got.append(json.loads(await self.connection.recv()))
        except ConnectionClosed as end:
            return (end.rcvd.code, end.rcvd.reason) if end.rcvd else (1006, "")


def is_like(message: dict[str, Any], kind: str, members: dict[str, object]) -> bool:
    return message["type"] == kind and all(
        message.get(name) == value for name, value in members.items()
    )


Join = Callable[..., Awaitable[Client]]


@pytest.fixture
async def join() -> AsyncIterator[Join]:
    """Return a function that connects clients to /ws of a gateway."""
    async with AsyncExitStack() as stack:

        async def connected(live: Live, query: str = "", **options: Any) -> Client:
            address = live.url.replace("http", "ws") + "/ws" + query
            return Client(
                await stack.enter_async_context(
                    connect(address, **{"compression": None, "close_timeout": 0.1} | options)
                )
            )

        yield connected


def inside(live: Live) -> hub.StreamHub:
    """Return the gateway's stream hub, to check internal state."""
    found = live.server.lifespan.state["streams"]
    assert isinstance(found, hub.StreamHub)
    return found


def tickers(live: Live, exchange: str) -> ExchangeSocket:
    """Return the socket for tickers of an exchange's spot markets."""
    return inside(live).sockets[SocketKey(exchange, "ticker", swaps=False)]


async def is_pushed(live: Live, *topics: Topic) -> None:
    """Wait until these topics, or all topics, are live."""
    await eventually(
        lambda: all(
            item.live for item in inside(live).topics.values() if not topics or item.topic in topics
        )
    )


async def has_a_pace(live: Live, clock: FakeClock) -> None:
    """Advance the clock until the pace of every topic is known."""
    watches = [watched.liveness for watched in inside(live).topics.values()]
    for _ in range(3):
        clock.advance(0.25)
        await eventually(
            lambda: all(watch.last_message_at == clock.monotonic() for watch in watches)
        )


async def check_topics(live: Live, clock: FakeClock, seconds: float) -> None:
    """Advance the clock by at least `POLL_SECONDS`, and wait until all topics were checked."""
    clock.advance(seconds)
    now = clock.monotonic()
    await eventually(lambda: inside(live)._monitor._polled_at >= now)


async def is_quiet(exchange: str) -> None:
    """Wait until all messages that an exchange sent before it became silent have arrived."""

    def received() -> float:
        return sample("stream_messages_received_total", exchange=exchange, channel="ticker")

    count = -1.0
    while count != received():
        count = received()
        await asyncio.sleep(0.3)


@asynccontextmanager
async def time_passes(clock: FakeClock, step: float = 1) -> AsyncIterator[None]:
    """Advance the clock in the background: the number of retries is random."""

    async def advance() -> None:
        while True:
            clock.advance(step)
            await asyncio.sleep(0.1)

    going = asyncio.create_task(advance())
    try:
        yield
    finally:
        going.cancel()


def sockets(sandbox: Sandbox) -> dict[str, int]:
    return {name: len(listener.sockets) for name, listener in sandbox.listeners.items()}


# Values.


async def test_work_that_never_began_leaves_no_coroutine(start: StartGateway) -> None:
    """Work that is started while the hub stops is dropped without a report of Python."""
    live = await start(streaming=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        streams = hub.StreamHub(live.gateway)
        task = asyncio.create_task(streams.run())
        await asyncio.sleep(0.05)
        task.cancel()
        streams._spawn(background.repeat, "streams", streams.send_heartbeats)
        await asyncio.wait([task])
        gc.collect()
    assert task.cancelled()
    assert not [warning.message for warning in caught if "awaited" in str(warning.message)]


@pytest.mark.parametrize("exchange", ["bybit", "binance", "kraken"])
async def test_snapshot_then_consecutive_updates(
    start: StartGateway, join: Join, exchange: str
) -> None:
    """A stream starts with a snapshot; each update has the next number, bid and ask."""
    live = await start()
    client = await join(live)
    answer = await client.subscribe("btc-usdt", exchange=exchange.upper())
    assert answer == {
        "type": "subscribed",
        "id": "s",
        "channel": "ticker",
        "symbols": [BTC],
        "errors": {},
    }
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


async def test_rest_serves_pushed_value_from_memory(
    start: StartGateway, join: Join, sandbox: Sandbox, clock: FakeClock
) -> None:
    """While a symbol is watched, GET /ticker is a memory hit, whatever its TTL."""
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


async def test_update_data_equals_rest_answer(start: StartGateway, join: Join) -> None:
    """The data of an update equals the REST answer."""
    live = await start()
    client = await join(live)
    await client.subscribe(exchange="kraken")
    await client.take("update", 2)
    await live.gateway.manager.close()  # no further values
    tickers(live, "kraken").lost("lost", None)
    answer = (await live.get("/ticker/BTC-USDT?exchange=kraken")).json()
    await client.send(op="ping", id="p")
    await client.next(lambda message: message["type"] == "pong")
    last = [message for message in client.got if message["type"] == "update"][-1]
    assert last["data"] == answer


async def test_all_clients_share_one_exchange_socket(
    start: StartGateway, join: Join, sandbox: Sandbox
) -> None:
    """There is one socket and one subscription per exchange for any number of clients."""
    live = await start()
    clients = [await join(live) for _ in range(20)]
    for client in clients:
        await client.subscribe(BTC, "ETH/USDT", exchange="all")
    for client in clients:
        for name in ("bybit", "binance", "kraken"):
            await client.take("update", 1, exchange=name)
    assert sockets(sandbox) == {"bybit": 1, "binance": 1, "kraken": 1}
    # BTC and ETH each, and bybit's best bid and ask; another client changes nothing.
    asked = {name: sandbox.count(name, " asked") for name in sandbox.calls}
    late = await join(live)
    await late.subscribe(BTC, "ETH/USDT", exchange="all")
    await late.take("update", 6)
    assert {name: sandbox.count(name, " asked") for name in sandbox.calls} == asked
    assert max(asked.values()) <= 4


async def test_every_update_reaches_every_client(
    start: StartGateway, join: Join, sandbox: Sandbox
) -> None:
    """Clients that read receive the same updates, complete and in order."""
    live = await start()
    await sandbox.set("binance", push_ms=10)
    clients = [await join(live) for _ in range(5)]
    for client in clients:
        await client.subscribe(exchange="binance")
    for client in clients:
        await client.take("update", 30)
    for client in clients:
        numbers = [
            message["seq"] for message in client.got if message["type"] in ("snapshot", "update")
        ]
        assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))


@pytest.mark.parametrize("exchange", ["bybit", "binance", "kraken"])
async def test_book_has_requested_levels(
    start: StartGateway, join: Join, sandbox: Sandbox, clock: FakeClock, exchange: str
) -> None:
    """A book has its best levels, is never crossed, follows the market and equals REST."""
    live = await start(orderbook_ttl_seconds=60)
    client = await join(live)
    await client.subscribe("ETH/USDT", channel="book", exchange=exchange, levels=3)
    await sandbox.set(exchange, push_ms=20)
    seen: list[float] = []
    while len(seen) < 40 or len(set(seen)) == 1:
        clock.advance(0.5)
        (update,) = await client.take("update")
        data = update["data"]
        assert len(data["bids"]) == len(data["asks"]) == 3
        assert data["bids"][0][0] < data["asks"][0][0]
        assert data["bids"] == sorted(data["bids"], reverse=True)
        assert data["asks"] == sorted(data["asks"])
        seen.append(data["bids"][0][0])
    calls = Counter(sandbox.calls[exchange])
    answer = await live.get(f"/orderbook/ETH-USDT?exchange={exchange}&limit=3")
    assert answer.json()["source"] == "stream"
    assert {name for name in sandbox.calls[exchange] - calls if "asked" not in name} == set()


@pytest.mark.parametrize("exchange", ["bybit", "binance", "kraken"])
async def test_each_trade_is_sent_once(
    start: StartGateway, join: Join, sandbox: Sandbox, clock: FakeClock, exchange: str
) -> None:
    """Updates of trades contain each trade once, and none is missing."""
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


async def test_gap_in_trades_starts_with_snapshot(
    start: StartGateway, join: Join, sandbox: Sandbox, clock: FakeClock
) -> None:
    """After a reconnect, the first message of trades is a snapshot: trades are missing."""
    live = await start()
    await sandbox.set("binance", push_ms=20)
    client = await join(live)
    await client.subscribe(channel="trades", exchange="binance")
    async with time_passes(clock):
        await client.take("update", 2)
        await sandbox.set("binance", drop="cut", push_ms=20)
        watching = inside(live).sockets[SocketKey("binance", "trades", swaps=False)]
        await eventually(lambda: watching.reconnects)
        client.got.clear()
        await client.take("snapshot")
        await client.take("update", 2)
    trades = [
        [trade["timestamp"] for trade in item["data"]["trades"]]
        for item in client.got
        if "seq" in item
    ]
    for (earlier, later), message in zip(pairwise(trades), client.got[1:], strict=False):
        assert message["type"] == "snapshot" or later[0] == earlier[-1] + 500


async def is_pushed_soon(live: Live, clock: FakeClock) -> None:
    """Advance the clock until every topic has received a message."""
    while not all(item.liveness.last_message_at for item in inside(live).topics.values()):
        clock.advance(0.5)
        await asyncio.sleep(0.05)


# Failures.


async def watched(
    live: Live, join: Join, sandbox: Sandbox, clock: FakeClock, exchange: str = "binance"
) -> Client:
    """Return a client with frequent updates of one exchange."""
    await sandbox.set(exchange, push_ms=20)
    client = await join(live)
    await client.subscribe(exchange=exchange)
    await client.take("update", 2)
    await is_pushed(live)
    await has_a_pace(live, clock)
    return client


@pytest.mark.parametrize("exchange", ["bybit", "binance", "kraken"])
async def test_silent_socket_is_reopened(
    start: StartGateway, join: Join, sandbox: Sandbox, clock: FakeClock, exchange: str
) -> None:
    """A socket that pushes nothing is closed; clients get `stale` and values from REST."""
    live = await start()
    client = await watched(live, join, sandbox, clock, exchange)
    before = sample("stream_reconnects_total", exchange=exchange, cause="silent")
    await sandbox.set(exchange, freeze=True, push_ms=20)
    await is_quiet(exchange)
    client.got.clear()
    clock.advance(6)
    (status,) = await client.take("status")
    assert {**status, "age_ms": 0} == {
        "type": "status",
        "channel": "ticker",
        "exchange": exchange,
        "symbol": BTC,
        "state": "stale",
        "age_ms": 0,
    }
    assert status["age_ms"] >= 6000
    clock.advance(3)
    polled = await client.next(
        lambda message: message["type"] == "update" and message["data"]["source"] == "rest"
    )
    assert polled["exchange"] == exchange
    await eventually(
        lambda: sample("stream_reconnects_total", exchange=exchange, cause="silent") > before
    )
    shown = (await live.get("/exchanges")).json()[exchange]["streams"]
    assert (shown["cause"], shown["stale"], shown["watched"]) == ("silent", 1, 1)
    health = (await live.get("/health")).json()
    assert (health["status"], health["parts"]["streams"]["status"]) == ("degraded", "degraded")
    await sandbox.set(exchange, push_ms=20)
    async with time_passes(clock):
        await client.take("status", state="live")
        await client.next(
            lambda message: message["type"] == "update" and message["data"]["source"] == "stream"
        )
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
async def test_ticker_without_one_of_its_parts_is_stale(
    start: StartGateway,
    join: Join,
    sandbox: Sandbox,
    clock: FakeClock,
    exchange: str,
    symbol: str,
    silent: str,
    seconds: int,
) -> None:
    """A ticker is stale if its last price, or its bid and ask, stay away too long."""
    await sandbox.set(exchange, push_ms=20)
    live = await start(market_types="spot,swap")
    client = await join(live)
    await client.subscribe(symbol, exchange=exchange)
    await has_a_pace(live, clock)
    await eventually(lambda: all(watched.live for watched in inside(live).topics.values()))
    await sandbox.set(exchange, push_ms=20, mute=silent)
    await client.take("update", 5)
    clock.advance(seconds)
    async with time_passes(clock):  # messages may be in flight
        await client.take("status", state="stale")
        client.got.clear()
        await client.next(lambda message: message.get("data", {}).get("source") == "rest")
    await sandbox.set(exchange, push_ms=20)
    async with time_passes(clock):
        await client.take("status", state="live")
        await client.next(lambda message: message.get("data", {}).get("source") == "stream")
    numbers = [(message["type"], message["seq"]) for message in client.got if "seq" in message]
    assert all(
        kind == "snapshot" or number == last + 1 for (_, last), (kind, number) in pairwise(numbers)
    )


@pytest.mark.parametrize(("drop", "cause"), [("close", "closed"), ("cut", "closed")])
@pytest.mark.parametrize("exchange", ["bybit", "binance", "kraken"])
async def test_short_reconnect_is_invisible(
    start: StartGateway,
    join: Join,
    sandbox: Sandbox,
    clock: FakeClock,
    exchange: str,
    drop: str,
    cause: str,
) -> None:
    """If an exchange closes a socket, as binance does daily, clients see no change."""
    live = await start()
    client = await watched(live, join, sandbox, clock, exchange)
    before = sample("stream_reconnects_total", exchange=exchange, cause=cause)
    await sandbox.set(exchange, drop=drop, push_ms=20)
    await eventually(
        lambda: sample("stream_reconnects_total", exchange=exchange, cause=cause) == before + 1
    )
    client.got.clear()
    clock.advance(0.2)
    (state,) = inside(live).topics.values()
    await eventually(lambda: state.used_at == clock.monotonic())  # checked while disconnected
    clock.advance(1)
    await client.take("update", 3)
    assert {message["type"] for message in client.got} == {"update"}
    numbers = [message["seq"] for message in client.got]
    assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))


@pytest.mark.parametrize(
    ("exchange", "junk"),
    [
        ("bybit", "{"),
        ("bybit", '{"topic":"tickers.BTCUSDT","type":"snapshot","data":7}'),
        ("binance", "[]"),
        ("binance", "{broken"),
        ("kraken", '{"channel":'),
        ("kraken", '{"channel":"ticker","data":{}}'),
    ],
)
async def test_invalid_messages_do_not_reach_clients(
    start: StartGateway, join: Join, sandbox: Sandbox, clock: FakeClock, exchange: str, junk: str
) -> None:
    """An invalid message reaches no client, and valid messages are sent afterwards."""
    live = await start()
    client = await watched(live, join, sandbox, clock, exchange)
    await sandbox.set(
        exchange, body=junk, only="w", push_ms=20
    ) if exchange == "binance" else await sandbox.set(exchange, body=junk, push_ms=20)
    for _ in range(5):
        clock.advance(4)
        await asyncio.sleep(0.1)
    await sandbox.reset()
    client.got.clear()
    async with time_passes(clock):
        await client.next(
            lambda message: message["type"] == "update" and message["data"]["source"] == "stream"
        )
    assert all(message["data"]["price"] > 0 for message in client.got if "data" in message)


@pytest.mark.parametrize(
    ("status", "cause"), [(451, "geo_blocked"), (429, "rate_limited"), (418, "banned")]
)
async def test_refused_connection_opens_breaker(
    start: StartGateway, join: Join, sandbox: Sandbox, clock: FakeClock, status: int, cause: str
) -> None:
    """A refused location or address opens the breaker, and stops new connections."""
    live = await start()
    client = await watched(live, join, sandbox, clock)
    await sandbox.set(
        "binance", status=status, drop="cut", only="/ws", headers={"Retry-After": "40"}
    )
    breaker = live.gateway.manager["binance"].breaker
    await eventually(lambda: tickers(live, "binance").reconnects)
    clock.advance(1)
    await eventually(lambda: breaker.state == "open")
    assert breaker.cause == cause
    asked = sandbox.count("binance", "/ws")
    for _ in range(6):
        await check_topics(live, clock, 5)
    assert sandbox.count("binance", "/ws") == asked
    await sandbox.set("binance", push_ms=20)
    clock.advance(1000)
    async with time_passes(clock):
        await client.next(
            lambda message: message["type"] == "update" and message["data"]["source"] == "stream"
        )


async def test_subscription_does_not_move_to_another_coin(
    start: StartGateway, join: Join, sandbox: Sandbox, clock: FakeClock
) -> None:
    """An exchange with a very different price under the same symbol is skipped (A5)."""
    live = await start()
    await sandbox.set("binance", push_ms=20, price=100)
    for name in ("bybit", "kraken"):
        await sandbox.set(name, push_ms=20)
    client = await join(live)
    await client.subscribe()
    await client.take("update", exchange="bybit")
    await is_pushed(live)
    await sandbox.set("bybit", refuse=True)
    await eventually(lambda: tickers(live, "bybit").lost_cause)
    clock.advance(7)
    await client.take("status", state="stale", exchange="bybit")
    async with time_passes(clock):
        await client.take("snapshot", exchange="kraken")
    assert not [message for message in client.got if message.get("exchange") == "binance"]


async def test_subscription_without_exchange_moves(
    start: StartGateway, join: Join, sandbox: Sandbox, clock: FakeClock
) -> None:
    """A subscription without exchange moves, with a snapshot, if its stream is stale."""
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
    await eventually(lambda: tickers(live, "bybit").lost_cause)
    clock.advance(7)
    await client.take("status", state="stale", exchange="bybit")
    (moved,) = await client.take("snapshot")
    assert moved["exchange"] == "binance"
    await client.take("update", exchange="binance")
    await client.send(op="list", id=1)
    listed = await client.next(lambda message: message["type"] == "list")
    assert listed["streams"] == [
        {"channel": "ticker", "symbol": BTC, "exchange": None, "from": ["binance"]}
    ]
    await sandbox.set("bybit", push_ms=20)
    watched = inside(live).topics[Topic("bybit", "ticker", BTC)]
    async with time_passes(clock):
        await eventually(lambda: watched.live)
    client.got.clear()
    await sandbox.set("binance", refuse=True)
    async with time_passes(clock):
        await client.take("snapshot", exchange="bybit")
        await client.take(
            "status", state="live", exchange="bybit"
        )  # sent to clients that received `stale`
        await client.take("update", exchange="bybit")
    assert [item["exchange"] for item in client.got if item["type"] == "status"] == [
        "binance",
        "bybit",
    ]


async def test_first_values_share_one_rest_call(
    start: StartGateway, join: Join, sandbox: Sandbox
) -> None:
    """Many tickers of one message cost one REST call."""
    live = await start(kraken_budget="2/600")
    client = await join(live)
    symbols = [BTC, "ETH/USDT", "SOL/USDT", "XRP/USDT", "DOGE/USDT"]
    await client.subscribe(*symbols, exchange="kraken")
    first = [message["symbol"] for message in await client.take("snapshot", len(symbols))]
    assert sorted(first) == sorted(symbols)
    assert not [message for message in client.got if message["type"] == "status"]
    assert sandbox.count("kraken", "/0/public/Ticker") == 1


async def test_hung_market_does_not_delay_first_values(
    start: StartGateway, join: Join, sandbox: Sandbox
) -> None:
    """A hung market does not delay a market of another type in the same message."""
    live = await start(market_types="spot,swap")
    client = await join(live)
    await sandbox.set("binance", hang=True, only="/fapi")
    await client.subscribe("ETH/USDT", "SOL/USDT:USDT", exchange="binance")
    await client.take("snapshot", symbol="ETH/USDT")
    assert inside(live).topics[Topic("binance", "ticker", "SOL/USDT:USDT")].waiting_subscribers == 1
    await sandbox.set("binance")


async def test_new_topic_ignores_earlier_loss(
    start: StartGateway, join: Join, sandbox: Sandbox, clock: FakeClock
) -> None:
    """An earlier loss of the socket does not make a new subscription stale at once."""
    live = await start(stream_idle_seconds=1)
    client = await join(live)
    await sandbox.set("kraken", status=503, only="/v2")
    await client.subscribe(exchange="kraken")
    async with time_passes(clock):
        await client.take("status", state="stale")
    await client.connection.close()
    async with time_passes(clock):
        await eventually(lambda: not inside(live).topics)
    assert tickers(live, "kraken").lost_cause
    late = await join(live)
    await late.subscribe(exchange="kraken")
    await check_topics(live, clock, monitor.POLL_SECONDS)
    await late.send(op="ping", id="p")
    await late.take("pong")
    assert not [message for message in late.got if message["type"] == "status"]
    await sandbox.set("kraken", push_ms=20)
    async with time_passes(clock):
        await late.next(lambda message: message.get("data", {}).get("source") == "stream")


async def test_unchanged_value_is_not_sent_again(
    start: StartGateway, join: Join, sandbox: Sandbox
) -> None:
    """A value that REST returns again is not sent to existing subscribers."""
    clock = MovingClock()
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


async def test_unsubscribe_between_batches_causes_no_error(
    start: StartGateway,
    join: Join,
    sandbox: Sandbox,
    clock: FakeClock,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A symbol that is unsubscribed between two batches is skipped without an error."""
    limits = SocketLimits(frame_topics=1, frame_seconds=0.25)
    monkeypatch.setitem(PROFILES["kraken"].socket_limits, "spot", limits)
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


async def test_stale_answer_is_marked_once(
    start: StartGateway, join: Join, sandbox: Sandbox, clock: FakeClock
) -> None:
    """A value that replaces a failed load has one `stale` member, on every request."""
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


async def test_stale_stream_starts_with_rest_value(
    start: StartGateway, join: Join, sandbox: Sandbox, clock: FakeClock
) -> None:
    """A new subscriber of a stale stream gets the value of REST, not the last pushed one."""
    live = await start()
    client = await watched(live, join, sandbox, clock)
    await sandbox.set("binance", freeze=True, push_ms=20)
    await is_quiet("binance")
    await client.connection.close()
    await eventually(lambda: not inside(live).connections)
    clock.advance(100)
    await eventually(lambda: all(item.live is False for item in inside(live).topics.values()))
    late = await join(live)
    await late.subscribe(exchange="binance")
    (first,) = await late.take("snapshot")
    assert first["data"]["source"] == "rest"
    assert first["fetched_at"] / 1000 > clock.time() - 1


@pytest.mark.parametrize("exchange", ["bybit", "binance"])
async def test_resubscribed_symbol_has_no_old_values(
    start: StartGateway, join: Join, sandbox: Sandbox, clock: FakeClock, exchange: str
) -> None:
    """A symbol watched again later has no old values, although the socket stayed open."""
    symbol, other = (
        ("BTC/USDT", "ETH/USDT") if exchange == "bybit" else ("BTC/USDT:USDT", "ETH/USDT:USDT")
    )
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
    (watched_now,) = inside(live).topics.values()
    now = clock.monotonic()
    async with time_passes(clock):  # the socket may count as silent, and be opened again
        await eventually(lambda: (watched_now.liveness.last_message_at or 0) >= now)
    await client.subscribe(symbol, exchange=exchange)
    for update in await client.take("update", 3, symbol=symbol):
        assert update["data"]["bid"] <= update["data"]["last"] <= update["data"]["ask"]
        assert update["timestamp"] / 1000 > clock.time() - 60


async def test_stream_without_first_value_is_stale_then_live(
    start: StartGateway, join: Join, sandbox: Sandbox, clock: FakeClock
) -> None:
    """Without a first value a stream is stale with a code, and live with the first push."""
    live = await start()
    await sandbox.set("kraken", refuse=True)
    client = await join(live)
    await client.subscribe(exchange="kraken")
    (status,) = await client.take("status")
    assert (status["state"], status["age_ms"], status["code"]) == (
        "stale",
        None,
        "exchange_unavailable",
    )
    await sandbox.set("kraken")
    async with time_passes(clock):
        await client.take("status", state="live")
    await client.take("update")


async def test_waiting_subscription_moves_to_first_live_exchange(
    start: StartGateway, join: Join, sandbox: Sandbox, clock: FakeClock
) -> None:
    """If no exchange pushes, a subscription moves to the first that pushes again."""
    live = await start()
    client = await join(live)
    await client.subscribe()
    await client.take("update", exchange="bybit")
    await client.subscribe(exchange="all")  # watches all exchanges
    for name in ("binance", "kraken"):
        await client.take("update", exchange=name)
    for name in ("bybit", "binance", "kraken"):
        await sandbox.set(name, refuse=True)
    await eventually(
        lambda: all(tickers(live, name).lost_cause for name in ("bybit", "binance", "kraken"))
    )
    clock.advance(5)
    await client.take("status", 3, state="stale")
    await sandbox.set("kraken")
    async with time_passes(clock):
        await client.take("status", state="live", exchange="kraken")

    async def moved() -> bool:
        await client.send(op="list", id=1)
        listed = await client.next(lambda message: message["type"] == "list")
        return {"channel": "ticker", "symbol": BTC, "exchange": None, "from": ["kraken"]} in listed[
            "streams"
        ]

    async with asyncio.timeout(MESSAGE_SECONDS):
        while not await moved():
            clock.advance(1)
            await asyncio.sleep(0.3)


async def test_unused_lost_socket_does_not_degrade_health(
    start: StartGateway, join: Join, sandbox: Sandbox, clock: FakeClock
) -> None:
    """A lost socket degrades /health only while it has subscribers."""
    live = await start(stream_idle_seconds=10)
    client = await watched(live, join, sandbox, clock, "kraken")
    await sandbox.set("kraken", refuse=True)
    await eventually(lambda: tickers(live, "kraken").lost_cause)
    assert "kraken" in (await live.get("/health")).json()["parts"]["streams"]["reason"]
    await client.connection.close()
    await eventually(lambda: not inside(live).connections)
    clock.advance(11)
    await eventually(lambda: tickers(live, "kraken").outage_cause is None)
    assert (await live.get("/health")).json()["parts"]["streams"]["status"] == "healthy"


@pytest.mark.parametrize(("gap", "most"), [(0.05, 0), (1.0, 0), (5.0, 0), (40.0, 4), (55.0, 4)])
def test_pace_is_learned_per_symbol(gap: float, most: int) -> None:
    """A rare symbol is not cut once its pace is known; a frequent one is missed soon."""
    watch, now, cuts = liveness.Liveness(0.0), 0.0, 0
    watch.subscribed_at = 0.0
    for _ in range(100):
        due = now + gap
        while now < due:
            if watch.is_silent(now):
                cuts += 1
                watch.failures += 1
                watch.subscribed_at = now
            now += min(1.0, gap)
        watch.record_message(now)
    assert cuts <= most
    assert watch.is_silent(now + max(11 * gap, 6))
    assert not watch.is_silent(now + gap)


def test_pace_decays_after_quiet_period() -> None:
    """After a quiet period, a frequent symbol is missed as soon as before."""
    watch, now = liveness.Liveness(0.0), 0.0
    watch.subscribed_at = 0.0
    for pause in (*[900.0] * 50, *[1.0] * 600):
        now += pause
        watch.record_message(now)
    assert not watch.is_silent(now + 9)
    assert watch.is_silent(now + 12)


def test_outage_is_not_learned_as_pace() -> None:
    """After an outage of an hour, silence is detected as soon as before within a minute."""
    watch = liveness.Liveness(0.0)
    for second in range(60):
        watch.record_message(float(second))
    for second in range(3600, 3620):
        watch.record_message(float(second))
    assert watch.is_silent(3620 + 12) is False  # not subscribed
    watch.subscribed_at = 3600.0
    assert watch.is_silent(3620 + 12)


@pytest.mark.parametrize("pause", [6.5, 20.0, 60.0])
def test_pace_of_bursts_is_their_pause(pause: float) -> None:
    """The pace of messages in bursts is the pause between two bursts."""
    watch, cuts = liveness.Liveness(0.0), 0
    watch.subscribed_at = 0.0
    for burst in range(50):
        now = burst * pause
        cuts += watch.is_silent(now)
        for number in range(20):
            watch.record_message(now + number * 0.02)
    assert cuts <= 6
    assert watch.is_silent(now + 11 * pause)


async def test_only_a_message_makes_a_stream_live(
    start: StartGateway,
    join: Join,
    sandbox: Sandbox,
    clock: FakeClock,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A silent symbol stays stale although its timeout grows after each attempt."""
    live = await start()
    client = await watched(live, join, sandbox, clock)
    await sandbox.set("binance", push_ms=500, mute="ethusdt")
    await client.subscribe("ETH/USDT", exchange="binance")
    ether = inside(live).topics[Topic("binance", "ticker", "ETH/USDT")]
    await eventually(lambda: ether.liveness.subscribed_at)
    await sandbox.set("binance", push_ms=500)
    await eventually(lambda: ether.liveness.last_message_at)
    await sandbox.set("binance", push_ms=20, mute="ethusdt")
    await eventually(lambda: ether.live)
    assert ether.liveness.pace is None
    clock.advance(
        4 * liveness.FIRST_MESSAGE_SECONDS
    )  # longer than the timeout after a failed attempt
    await client.take("status", state="stale", symbol="ETH/USDT")
    monkeypatch.setattr(liveness, "FIRST_MESSAGE_SECONDS", 500.0)
    await check_topics(live, clock, monitor.POLL_SECONDS)
    await client.send(op="ping", id="p")
    await client.take("pong")
    assert [
        item["state"] for item in client.got if item["type"] == "status" and item["symbol"] != BTC
    ] == ["stale"]
    await sandbox.set("binance", push_ms=20)
    async with time_passes(clock):
        await client.take("status", state="live", symbol="ETH/USDT")


async def test_new_subscriber_does_not_resend_old_trades(
    start: StartGateway, join: Join, sandbox: Sandbox, clock: FakeClock
) -> None:
    """A new subscriber of stale trades sends nothing to existing subscribers."""
    live = await start()
    await sandbox.set("kraken", push_ms=20)
    first = await join(live)
    await first.subscribe(channel="trades", exchange="kraken")
    await first.take("snapshot")
    await sandbox.set("kraken", freeze=True)
    async with time_passes(clock):  # a trade may still arrive
        await first.take("status", state="stale")
    first.got.clear()
    late = await join(live)
    await late.subscribe(channel="trades", exchange="kraken")
    await late.take("snapshot")
    await late.take("status", state="stale")
    await first.send(op="ping", id="p")
    await first.take("pong")
    assert not [message for message in first.got if "seq" in message]


async def test_snapshot_has_its_own_sent_at(
    start: StartGateway, join: Join, sandbox: Sandbox, clock: FakeClock
) -> None:
    """`sent_at` of a snapshot is the time at which this client's snapshot was made."""
    live = await start()
    await watched(live, join, sandbox, clock, "kraken")
    await sandbox.set("kraken", freeze=True)
    await is_quiet("kraken")
    for _ in range(2):
        client, before = await join(live), time.time_ns() // 1_000_000
        await client.subscribe(exchange="kraken")
        (first,) = await client.take("snapshot")
        assert first["sent_at"] >= before


async def test_no_polling_above_half_of_budget(
    start: StartGateway, join: Join, sandbox: Sandbox, clock: FakeClock
) -> None:
    """Stale streams are not polled while half of the exchange's budget is used."""
    live = await start(kraken_budget="10/600")
    client = await watched(live, join, sandbox, clock, "kraken")
    for coin in ("BTC", "ETH", "SOL", "XRP", "ADA"):
        await live.get(f"/orderbook/{coin}-USDT?exchange=kraken")
    assert live.gateway.manager.limiter.used_ratio("kraken") > monitor.POLL_BUDGET_RATIO
    await sandbox.set("kraken", freeze=True, rate_limit=-1)
    await is_quiet("kraken")
    clock.advance(10)
    await client.take("status", state="stale")
    asked = sandbox.count("kraken", "/0/public/Ticker")
    for _ in range(4):
        await check_topics(live, clock, 3)
    assert sandbox.count("kraken", "/0/public/Ticker") == asked
    assert live.gateway.manager.is_available("kraken")


async def test_polling_leaves_half_of_the_budget(
    start: StartGateway, join: Join, sandbox: Sandbox, clock: FakeClock
) -> None:
    """Polling many stale order books takes turns within half of the budget."""
    live = await start(kraken_budget="24/600")
    client = await join(live)
    coins = ("BTC", "ETH", "SOL", "XRP", "ADA", "DOGE", "LTC", "DOT")
    symbols = [f"{coin}/USDT" for coin in coins]
    await client.subscribe(*symbols, channel="book", exchange="kraken")
    await is_pushed(live)
    await has_a_pace(live, clock)
    await sandbox.set("kraken", freeze=True, rate_limit=-1)
    used = live.gateway.manager.limiter.used_ratio
    async with time_passes(clock):
        await client.take("status", len(symbols), state="stale")
        await eventually(lambda: used("kraken") >= monitor.POLL_BUDGET_RATIO)
        for _ in range(3):
            await check_topics(live, clock, monitor.POLL_SECONDS)
    assert used("kraken") == monitor.POLL_BUDGET_RATIO
    assert (await live.get("/ticker/BTC-USDT?exchange=kraken")).status_code == 200


async def test_feed_that_misses_messages_is_replaced_by_rest(
    start: StartGateway, join: Join, sandbox: Sandbox, clock: FakeClock
) -> None:
    """A pushed value is fresh for a few intervals of its feed. Then a request goes to REST."""
    live = await start(ticker_ttl_seconds=60)
    client = await join(live)
    await client.subscribe(BTC, exchange="kraken")
    await is_pushed(live)
    (state,) = inside(live).topics.values()
    for _ in range(12):
        clock.advance(1)
        await eventually(lambda: state.liveness.last_message_at == clock.monotonic())
    await sandbox.set("kraken", freeze=True, rate_limit=-1)
    await is_quiet("kraken")
    clock.advance(1)
    assert (await live.get("/ticker/BTC-USDT?exchange=kraken")).json()["source"] == "stream"
    clock.advance(3)
    answer = (await live.get("/ticker/BTC-USDT?exchange=kraken")).json()
    assert (answer["source"], answer["stale"]) == ("rest", False)


async def test_sent_messages_are_counted(
    start: StartGateway, join: Join, sandbox: Sandbox, clock: FakeClock
) -> None:
    """The counter has all messages sent; the histogram has the age of values."""
    live = await start()
    await sandbox.set("kraken", push_ms=20)
    await live.get("/metrics")
    before, ages = (
        sample("stream_messages_sent_total", channel="ticker"),
        sample("stream_event_age_seconds_count"),
    )
    clients = [await join(live) for _ in range(2)]
    for client in clients:
        await client.subscribe(channel="ticker", exchange="kraken")
        await client.take("update", 3)
    await sandbox.set("kraken", freeze=True)
    await eventually(lambda: not inside(live).slow_connections)
    await is_quiet("kraken")
    for client in clients:
        await client.send(op="ping", id="p")
        await client.take("pong")
    await live.get("/metrics")
    got = sum("seq" in message for client in clients for message in client.got)
    assert sample("stream_messages_sent_total", channel="ticker") - before == got
    assert 3 <= sample("stream_event_age_seconds_count") - ages <= got


# Limits.


async def test_hot_tickers_respect_topic_limit(
    start: StartGateway, join: Join, clock: FakeClock
) -> None:
    """A hot ticker is not watched if subscribers use all STREAM_MAX_TOPICS."""
    live = await start(stream_max_topics=1)
    client = await join(live)
    await client.subscribe(exchange="kraken")
    await client.take("snapshot")
    for _ in range(3):
        for _ in range(monitor.HOT_REQUESTS):
            await live.get("/ticker/ETH-USDT?exchange=binance")
        await check_topics(live, clock, monitor.POLL_SECONDS)
    assert [topic.symbol for topic in inside(live).topics] == [BTC]


async def test_unused_topic_is_unsubscribed(
    start: StartGateway, join: Join, sandbox: Sandbox, clock: FakeClock
) -> None:
    """After STREAM_IDLE_SECONDS a symbol is unsubscribed, and an empty socket closed."""
    live = await start(stream_idle_seconds=30)
    client = await watched(live, join, sandbox, clock)
    await client.send(op="unsubscribe", symbols=["btc-usdt"], exchange="binance")
    assert (await client.take("unsubscribed"))[0]["symbols"] == [BTC]
    await check_topics(live, clock, 29)
    assert inside(live).topics
    clock.advance(2)
    await eventually(lambda: not inside(live).topics)
    await eventually(lambda: sockets(sandbox)["binance"] == 0)
    assert sample("stream_watched", exchange="binance", channel="ticker") == 0


async def test_topic_limit_is_enforced(start: StartGateway, join: Join, clock: FakeClock) -> None:
    """A stream above the limit is refused; a stream without subscribers makes room."""
    live = await start(stream_max_topics=2)
    client = await join(live)
    await client.subscribe(BTC, "ETH/USDT", exchange="kraken")
    refused = await client.subscribe("SOL/USDT", exchange="kraken")
    assert (refused["type"], refused["status"], refused["code"]) == (
        "error",
        503,
        "too_many_streams",
    )
    answer = await live.get("/stream/SOL-USDT?exchange=kraken")
    assert (answer.status_code, answer.json()["code"]) == (503, "too_many_streams")
    assert answer.headers["retry-after"]
    await client.send(op="unsubscribe", symbols=[BTC], exchange="kraken")
    await client.take("unsubscribed")
    assert (await client.subscribe("SOL/USDT", exchange="kraken"))["type"] == "subscribed"


async def test_subscription_limit_counts_each_exchange(start: StartGateway, join: Join) -> None:
    """STREAM_MAX_SUBSCRIPTIONS limits a connection; `all` counts each exchange."""
    live = await start(stream_max_subscriptions=4)
    client = await join(live)
    assert (await client.subscribe(exchange="all"))["type"] == "subscribed"
    await client.take("snapshot", 3)
    refused = await client.subscribe("ETH/USDT", exchange="all")
    assert (refused["status"], refused["code"]) == (429, "too_many_subscriptions")
    assert "4 are allowed" in refused["detail"]
    assert (await client.subscribe("ETH/USDT", exchange="kraken"))["symbols"] == ["ETH/USDT"]


async def test_connection_limit_is_enforced(start: StartGateway, join: Join) -> None:
    """A connection above STREAM_MAX_CLIENTS is refused on both transports."""
    live = await start(stream_max_clients=1)
    first = await join(live)
    await first.send(op="ping")
    await first.take("pong")
    second = await join(live)
    assert (await second.closed())[0] == 1013
    assert second.got[0]["code"] == "too_many_streams"
    assert (await live.get("/stream/BTC-USDT")).status_code == 503
    await first.connection.close()
    await eventually(lambda: not inside(live).connections)
    third = await join(live)
    await third.send(op="ping")
    await third.take("pong")


async def test_hot_ticker_is_watched(
    start: StartGateway, sandbox: Sandbox, clock: FakeClock
) -> None:
    """HOT_REQUESTS requests within a minute start a watch, which ends with the requests."""
    live = await start(stream_idle_seconds=100)
    before = sample("stream_messages_received_total", exchange="kraken", channel="ticker")
    async with asyncio.timeout(MESSAGE_SECONDS):
        while not inside(live).topics:
            await live.get("/ticker/BTC-USDT?exchange=kraken")
    await eventually(
        lambda: (
            sample("stream_messages_received_total", exchange="kraken", channel="ticker") > before
        )
    )
    assert (await live.get("/ticker/BTC-USDT?exchange=kraken")).json()["source"] == "stream"
    clock.advance(101)
    await eventually(lambda: not inside(live).topics)


async def test_fewer_requests_do_not_start_a_watch(start: StartGateway, clock: FakeClock) -> None:
    """Fewer than HOT_REQUESTS requests per minute do not start a watch."""
    live = await start()
    for _ in range(3):
        for _ in range(monitor.HOT_REQUESTS // 2):
            await live.get("/ticker/BTC-USDT?exchange=kraken")
        await check_topics(live, clock, monitor.POLL_SECONDS)
        await check_topics(live, clock, monitor.HOT_SECONDS)
    assert not inside(live).topics


# Messages and connections.


@pytest.mark.parametrize(
    ("message", "code"),
    [
        ("junk", "malformed_request"),
        ("[]", "malformed_request"),
        ('{"op":"fly"}', "invalid_parameter"),
        ('{"op":"subscribe","symbols":["FOO/BAR"]}', "unknown_symbol"),
        ('{"op":"subscribe","symbols":["BTC/USDT"],"exchange":"mtgox"}', "unknown_exchange"),
        ('{"op":"subscribe","symbols":["BTC/USDT"],"channel":"news"}', "invalid_parameter"),
        (
            '{"op":"subscribe","symbols":["BTC/USDT"],"levels":51,"channel":"book"}',
            "invalid_parameter",
        ),
        ('{"op":"subscribe","symbols":[],"exchange":"kraken"}', "invalid_parameter"),
        ('{"op":"ping","more":1}', "invalid_parameter"),
        ('{"symbols":["BTC/USDT"]}', "invalid_parameter"),
        (
            '{"op":"subscribe","symbols":["BTC/USDT"],"levels":"5","channel":"book"}',
            "invalid_parameter",
        ),
        (
            '{"op":"subscribe","symbols":["BTC/USDT"],"levels":true,"channel":"book"}',
            "invalid_parameter",
        ),
        ('{"op":"subscribe","symbols":"BTC/USDT"}', "invalid_parameter"),
    ],
)
async def test_invalid_message_is_answered_with_error(
    start: StartGateway, join: Join, message: str, code: str
) -> None:
    """Each invalid message is answered with an error and the message's id."""
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


async def test_subscribe_reports_each_wrong_symbol(start: StartGateway, join: Join) -> None:
    """Existing symbols are subscribed; each other symbol has a problem."""
    live = await start()
    client = await join(live)
    answer = await client.subscribe(BTC, "FOO/BAR", exchange="kraken")
    assert answer["symbols"] == [BTC]
    assert {symbol: problem["code"] for symbol, problem in answer["errors"].items()} == {
        "FOO/BAR": "unknown_symbol"
    }


async def test_unsubscribe_reports_each_wrong_symbol(start: StartGateway, join: Join) -> None:
    """Each symbol of an `unsubscribe` is processed separately."""
    live = await start()
    client = await join(live)
    await client.subscribe(BTC, exchange="kraken")
    await client.send(op="unsubscribe", symbols=["?", BTC], exchange="kraken")
    (answer,) = await client.take("unsubscribed")
    assert answer["symbols"] == [BTC]
    assert {symbol: problem["code"] for symbol, problem in answer["errors"].items()} == {
        "?": "malformed_request"
    }
    await client.send(op="unsubscribe", symbols=[BTC], exchange="kraken")
    (problem,) = await client.take("error")
    assert problem["code"] == "invalid_parameter"
    assert "list" in problem["detail"]


async def test_wrong_symbols_count_as_messages(start: StartGateway, join: Join) -> None:
    """Each wrong symbol costs a message, because suggestions are expensive."""
    live = await start()
    client = await join(live)
    wrong = [f"FOO{number}/USDT" for number in range(websocket.MAX_SYMBOLS)]
    answer = await client.subscribe(*wrong, exchange="kraken")
    assert len(answer["errors"]) == websocket.MAX_SYMBOLS
    await client.send(op="ping")
    assert (await client.closed())[0] == 1008


async def test_invalid_id_is_not_repeated(start: StartGateway, join: Join) -> None:
    """A message with an invalid id is answered with id null."""
    live = await start()
    client = await join(live)
    for odd in ("[" * 300 + "]" * 300, "1.5", "{}"):
        await client.connection.send('{"op":"ping","id":' + odd + "}")
        (problem,) = await client.take("error")
        assert (problem["code"], problem["id"]) == ("invalid_parameter", None)
        assert problem["detail"] == "id is invalid: expected a string or an integer"


async def test_api_key_is_required(start: StartGateway, join: Join) -> None:
    """With API_KEYS, the header or the query has a key; otherwise the close code is 1008."""
    live = await start(api_keys="bot:secret-key-1")
    refused = await join(live)
    assert (await refused.closed())[0] == 1008
    assert refused.got[0]["code"] == "unauthorized"
    wrong = await join(live, "?token=wrong-key-1")
    assert (await wrong.closed())[0] == 1008
    for options in (
        {"query": "?token=secret-key-1"},
        {"additional_headers": {"X-API-Key": "secret-key-1"}},
    ):
        client = await join(live, **options)
        assert (await client.subscribe(exchange="kraken"))["type"] == "subscribed"
    assert (await live.get("/stream/BTC-USDT")).status_code == 401
    assert (await live.get("/ticker/BTC-USDT?token=secret-key-1")).status_code == 401
    async with live.client.stream(
        "GET", f"{live.url}/stream/BTC-USDT?token=secret-key-1"
    ) as answer:
        assert answer.status_code == 200


@pytest.mark.parametrize("origin", ["https://app.example", "null"])
async def test_empty_host_is_no_origin(start: StartGateway, origin: str) -> None:
    """A handshake with an empty Host header does not pass for the gateway's own origin."""
    live = await start()
    head = (
        f"GET /ws HTTP/1.1\r\nHost: \r\nOrigin: {origin}\r\nUpgrade: websocket\r\n"
        "Connection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    )
    reader, writer = await asyncio.open_connection("127.0.0.1", urlsplit(live.url).port)
    writer.write(head.encode())
    async with asyncio.timeout(60):
        answer = await reader.readuntil(b'"code":"origin_refused"')
    writer.close()
    assert answer.startswith(b"HTTP/1.1 101"), answer


@pytest.mark.parametrize(
    ("origin", "allowed"),
    [
        ("https://evil.example", False),
        ("https://app.example", True),
        ("http://HOST", True),
        ("null", False),
        ("http://HOST.evil.example", False),
    ],
)
async def test_origin_is_checked(
    start: StartGateway, join: Join, origin: str, *, allowed: bool
) -> None:
    """A page may connect from the gateway's own origin and from CORS_ORIGINS only."""
    live = await start(cors_origins="https://app.example")
    host = live.url.removeprefix("http://")
    client = await join(live, additional_headers={"Origin": origin.replace("HOST", host)})
    if not allowed:
        assert (await client.closed())[0] == 1008
        assert client.got[0]["code"] == "origin_refused"
        return
    await client.send(op="ping")
    await client.take("pong")


@pytest.mark.parametrize(
    ("streaming", "detail"),
    [(True, "this path serves only WebSockets"), (False, "nothing is served")],
)
async def test_plain_request_to_ws_is_404(
    start: StartGateway, detail: str, *, streaming: bool
) -> None:
    """`/ws` without a handshake is a 404 that names what is served there."""
    live = await start(streaming=streaming)
    answer = await live.get("/ws")
    assert (answer.status_code, answer.json()["code"]) == (404, "not_found")
    assert answer.json()["detail"].startswith(detail)


async def test_long_message_closes_with_1009(start: StartGateway, join: Join) -> None:
    """A message above the limit closes the connection with 1009."""
    live = await start()
    client = await join(live)
    await client.connection.send("x" * (websocket.MAX_MESSAGE_BYTES + 1))
    assert (await client.closed())[0] == 1009


async def test_message_rate_is_limited(start: StartGateway, join: Join, clock: FakeClock) -> None:
    """Too many messages close the connection with 1008; time restores the allowance."""
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


async def test_idle_connection_is_closed(
    start: StartGateway, join: Join, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A connection without subscription is closed with 1000; one with a subscription stays."""
    monkeypatch.setattr(websocket, "IDLE_SECONDS", 0.5)
    live = await start()
    busy = await join(live)
    await busy.subscribe(exchange="kraken")
    idle = await join(live)
    assert (await idle.closed())[0] == 1000
    await busy.take("update", 2)


async def test_heartbeat_is_sent(
    start: StartGateway, join: Join, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Clients receive heartbeats while nothing else is sent."""
    monkeypatch.setattr(hub, "HEARTBEAT_SECONDS", 0.1)
    live = await start()
    client = await join(live)
    (beat, _) = await client.take("heartbeat", 2)
    assert abs(beat["sent_at"] / 1000 - time.time()) < 600


# Slow clients.


async def slow_client(
    address: str, exchange: str
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Connect a client with small buffers that reads only the handshake."""
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


async def test_slow_client_gets_newest_as_snapshot(
    start: StartGateway, join: Join, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slow client costs no other client an update, and gets a snapshot afterwards."""
    monkeypatch.setattr(websocket, "BUFFER_BYTES", 4096)
    monkeypatch.setattr(websocket, "SEND_BUFFER_BYTES", 4096)
    live = await start()
    await sandbox.set("binance", push_ms=2)
    good = await join(live)
    await good.subscribe(exchange="binance")
    reader, writer = await slow_client(live.url.removeprefix("http://"), "binance")
    before = sample("stream_conflated_total")
    async with asyncio.timeout(MESSAGE_SECONDS):
        while sample("stream_conflated_total") < before + 20:
            await good.take("update")
    numbers = [message["seq"] for message in good.got if "seq" in message]
    assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
    late = [message async for message in frames(reader, 200)]
    seen = [message for message in late if "seq" in message]
    gaps = [later for earlier, later in pairwise(seen) if later["seq"] != earlier["seq"] + 1]
    assert gaps
    assert {message["type"] for message in gaps} == {"snapshot"}
    writer.close()


async def test_client_that_reads_nothing_is_closed(
    start: StartGateway,
    join: Join,
    sandbox: Sandbox,
    clock: FakeClock,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A client that reads nothing is closed with 1013, and then disconnected."""
    monkeypatch.setattr(websocket, "BUFFER_BYTES", 4096)
    monkeypatch.setattr(websocket, "SEND_BUFFER_BYTES", 4096)
    monkeypatch.setattr(websocket, "CLOSE_SECONDS", 0.2)
    live = await start()
    await sandbox.set("binance", push_ms=2)
    _, writer = await slow_client(live.url.removeprefix("http://"), "binance")
    await eventually(lambda: inside(live).slow_connections)
    before = sample("stream_dropped_total", reason="slow_client")
    async with time_passes(clock):  # until the buffers are full and the client is too slow
        await eventually(lambda: not inside(live).connections)
    assert sample("stream_dropped_total", reason="slow_client") == before + 1
    await eventually(lambda: not live.server.server_state.connections)
    writer.close()


async def frames(reader: asyncio.StreamReader, count: int) -> AsyncIterator[dict[str, Any]]:
    """Yield the text frames that a server sends."""
    for _ in range(count):
        head = await reader.readexactly(2)
        size = head[1]
        if size == 126:
            size = int.from_bytes(await reader.readexactly(2))
        body = await reader.readexactly(size)
        if head[0] == 0x81:
            yield json.loads(body)


async def test_streaming_false_removes_paths(start: StartGateway) -> None:
    """With STREAMING=false both paths are absent, and no exchange socket is opened."""
    live = await start(streaming=False)
    assert (await live.get("/stream/BTC-USDT")).status_code == 404
    with pytest.raises(Exception, match=r"403|404"):
        async with connect(live.url.replace("http", "ws") + "/ws"):
            pass
    assert (await live.get("/exchanges")).json()["kraken"].get("streams") is None
    assert (await live.get("/health")).json()["parts"]["streams"]["reason"] == "off"


async def test_internal_error_does_not_reconnect(
    start: StartGateway,
    join: Join,
    sandbox: Sandbox,
    clock: FakeClock,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """An internal error in delivery is logged and makes streams stale; the socket stays."""
    monkeypatch.setattr(background, "_logged_at", {})
    live = await start()
    client = await watched(live, join, sandbox, clock)
    upstream, before = (
        tickers(live, "binance"),
        sample("internal_errors_total", component="delivery"),
    )
    opened = sandbox.count("binance", "/stream")
    with monkeypatch.context() as broken:
        broken.setattr(live.gateway, "add_pushed", None)
        for _ in range(7):
            clock.advance(1)
            await eventually(
                lambda: upstream._received_at == clock.monotonic() or upstream.lost_cause
            )
        (status,) = await client.take("status")
        assert status["state"] == "stale"
    assert (
        upstream.reconnects,
        sandbox.count("binance", "/stream"),
        sockets(sandbox)["binance"],
    ) == (0, opened, 1)
    assert sample("internal_errors_total", component="delivery") >= before + 7
    errors = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert ["TypeError" in (record.exc_text or "") for record in errors] == [True], (
        "repeated errors are logged once"
    )
    client.got.clear()
    async with time_passes(clock):
        await client.take("status", state="live")
        await client.take("update", 2)
    assert upstream.reconnects == 0
    messages = [(message["type"], message["seq"]) for message in client.got if "seq" in message]
    assert all(
        kind == "snapshot" or number == last + 1 for (_, last), (kind, number) in pairwise(messages)
    )


async def test_failing_subscriber_does_not_affect_others(
    start: StartGateway,
    join: Join,
    sandbox: Sandbox,
    clock: FakeClock,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An error of one connection affects no other; its gap ends with a snapshot."""
    monkeypatch.setattr(hub, "HEARTBEAT_SECONDS", 0.05)
    live = await start()
    first = await watched(live, join, sandbox, clock)
    (failing,) = inside(live).connections
    second = await join(live)
    await second.subscribe(exchange="binance")
    await second.take("update", 2)
    with monkeypatch.context() as broken:
        for name in ("push", "send_heartbeat", "send_pending"):
            broken.setattr(failing, name, None)
        inside(live).slow_connections |= inside(live).connections
        await second.take("snapshot", 2)
        await second.take("heartbeat", 2)
        await eventually(lambda: inside(live).slow_connections == {failing})
    inside(live).slow_connections.clear()
    first.got.clear()
    await first.take("snapshot")
    await first.take("update", 2)
    assert tickers(live, "binance").reconnects == 0
    with monkeypatch.context() as broken:
        broken.setattr(failing, "close_for_shutdown", None)
        inside(live).announce_shutdown()
    assert await second.closed() == (1001, "the gateway stops")


async def test_shutdown_closes_connections(start: StartGateway, join: Join) -> None:
    """On shutdown, /ws clients are closed with 1001 and server-sent events end."""
    live = await start()
    client = await join(live)
    await client.subscribe(exchange="kraken")
    async with live.client.stream("GET", f"{live.url}/stream/BTC-USDT?exchange=kraken") as answer:
        lines = answer.aiter_lines()
        await anext(lines)
        await eventually(lambda: len(inside(live).connections) == 2)
        inside(live).announce_shutdown()
        async for _ in lines:
            pass
    assert await client.closed() == (1001, "the gateway stops")


async def test_subscription_avoids_a_halted_market(
    start: StartGateway, join: Join, sandbox: Sandbox
) -> None:
    """Without `exchange`, the next exchange is subscribed while the market pauses at one."""
    live = await start()
    await sandbox.set("bybit", halted=["BTCUSDT"])
    assert (await live.get("/ticker/BTC-USDT?exchange=bybit")).status_code == 503
    client = await join(live)
    await client.subscribe(BTC)
    assert {topic.exchange for topic in inside(live).topics} == {"binance"}
