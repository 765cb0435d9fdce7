"""Pushed values are those of the market: right coin, right time, no lost or repeated update."""

import json
from typing import Any

import pytest

from src.exchanges.book_guard import checksum
from src.sandbox.knobs import Knobs
from src.sandbox.market import Market, Pair
from src.sandbox.server import Sandbox
from src.streams import registry
from src.streams.topics import Topic
from tests.conftest import FakeClock, StartGateway, eventually, sample
from tests.streams.test_hub import BTC, Client, Join, inside, join, time_passes

__all__ = ["join"]
EXCHANGES = ["bybit", "binance", "kraken"]
SWAP = "BTC/USDT:USDT"


async def next_push(client: Client, **members: object) -> dict[str, Any]:
    """Return the next message with a value that an exchange pushed."""

    def is_pushed_value(message: dict[str, Any]) -> bool:
        is_wanted = all(message.get(name) == value for name, value in members.items())
        return is_wanted and message.get("data", {}).get("source") == "stream"

    return await client.next(is_pushed_value)


def dropped(exchange: str) -> float:
    """Return how many trades of an exchange were dropped because they are odd."""
    return sum(
        sample("trades_dropped_total", exchange=exchange, reason=reason)
        for reason in ("not_market", "implausible")
    )


async def test_renamed_coins_have_their_own_prices(
    start: StartGateway, join: Join, sandbox: Sandbox
) -> None:
    """Kraken's LUNA is LUNC here, and its LUNA2 is LUNA: each has its own price on all paths."""
    live = await start()
    client = await join(live)
    pushed = {}
    for symbol in ("LUNA/USDT", "LUNC/USDT", "DOGE/USDT"):
        await client.subscribe(symbol, exchange="kraken")
        pushed[symbol] = (await next_push(client, symbol=symbol))["data"]["price"]
        served = (await live.get(f"/ticker/{symbol}?exchange=kraken")).json()
        assert served["source"] == "stream"
        assert served["symbol"] == symbol
        assert served["price"] == pushed[symbol]
    market = sandbox.listeners["kraken"].market(sandbox.listeners["kraken"].knobs)
    for symbol, price in pushed.items():
        assert price == float(market.ticker(Pair.of_symbol(symbol))["last"])


async def test_ticker_follows_the_book_without_trades(
    start: StartGateway, join: Join, sandbox: Sandbox, clock: FakeClock
) -> None:
    """Kraken pushes tickers also when only bid and ask change, with the exchange's time."""
    live = await start()
    client = await join(live)
    await client.subscribe(BTC, exchange="kraken")
    before = (await next_push(client))["data"]
    clock.advance(1)
    await sandbox.set("kraken", rate_limit=-1, still=["XBTUSDT"], price=1.02, push_ms=20)
    async with time_passes(clock):
        while (after := (await next_push(client))["data"])["bid"] < before["bid"] * 1.01:
            pass
    assert after["last"] == pytest.approx(before["last"], rel=0.005)
    assert 0 <= after["fetched_at"] - after["timestamp"] <= 1000
    assert after["timestamp"] > before["timestamp"]


@pytest.mark.parametrize("exchange", EXCHANGES)
async def test_book_with_a_lost_update_is_not_served(
    start: StartGateway, join: Join, sandbox: Sandbox, clock: FakeClock, exchange: str
) -> None:
    """After a lost update, no wrong book is pushed, and a new subscription repairs the book."""
    live = await start()
    client = await join(live)
    await sandbox.set(exchange, rate_limit=-1, push_ms=20)
    await client.subscribe(BTC, channel="book", exchange=exchange)
    async with time_passes(clock):
        for _ in range(15):
            await next_push(client)
    lost = sample("stream_dropped_total", reason="incomplete")
    await sandbox.set(exchange, rate_limit=-1, push_ms=20, odd=["lost_delta"])
    async with time_passes(clock):
        await eventually(lambda: sample("stream_dropped_total", reason="incomplete") > lost)
        await sandbox.set(exchange, rate_limit=-1, push_ms=20)
        for _ in range(5):
            await next_push(client)
    market = sandbox.listeners[exchange].market(Knobs())
    pair = Pair.of_symbol(BTC)
    for message in client.got:
        data = message.get("data", {})
        if data.get("timestamp") and data["source"] == "stream":
            bids, _ = market.book(pair, 10, data["timestamp"] // 100).rows.values()
            levels = [[float(row["price"]), float(row["amount"])] for row in bids]
            assert data["bids"][:10] == levels


@pytest.mark.parametrize(
    ("exchange", "symbol"),
    [("bybit", BTC), ("bybit", SWAP), ("binance", BTC), ("binance", SWAP), ("kraken", BTC)],
)
async def test_late_ticker_does_not_replace_a_newer_one(
    start: StartGateway,
    join: Join,
    sandbox: Sandbox,
    clock: FakeClock,
    exchange: str,
    symbol: str,
) -> None:
    """A pushed ticker with an earlier time of the exchange is dropped, also one of its parts."""
    live = await start(market_types="spot,swap")
    client = await join(live)
    await client.subscribe(symbol, exchange=exchange)
    await next_push(client)
    clock.advance(7)
    newest = (await next_push(client))["data"]
    late = sample("stream_dropped_total", reason="late")
    listener = sandbox.listeners[exchange]
    now = newest["timestamp"] / 1000 - 5
    market = listener.exchange.market(now, Knobs(price=0.9), now)
    for socket in listener.sockets:
        for topic in socket.topics.values():
            fields = market.ticker(topic.pair) | {"type": "update"}
            if topic.channel == "book":
                book = market.book(topic.pair, 1, market.step)
                for message in socket.push_book("snapshot", topic, book, book):
                    await socket.send(message)
                continue
            for message in listener.exchange.push(topic, int(now * 1000), fields):
                await socket.send(message)
    await eventually(lambda: sample("stream_dropped_total", reason="late") > late)
    clock.advance(1)
    await next_push(client)
    prices = [message["data"]["price"] for message in client.got if "data" in message]
    assert min(prices) > newest["price"] * 0.95
    served = (await live.get(f"/ticker/{symbol}?exchange={exchange}")).json()
    assert served["timestamp"] >= newest["timestamp"]


def has_time(message: dict[str, Any], timestamp: int) -> bool:
    """Return True for a message with data of this time."""
    return bool(message.get("data", {}).get("timestamp") == timestamp)


async def test_late_changes_of_a_ticker_do_not_stay_in_the_next_one(
    start: StartGateway, join: Join, sandbox: Sandbox, clock: FakeClock
) -> None:
    """The next message has only the fields that changed since the newest one."""
    live = await start(market_types="spot,swap")
    client = await join(live)
    await client.subscribe(SWAP, exchange="bybit")
    await next_push(client)
    await sandbox.set("bybit", rate_limit=-1, push_ms=3_600_000)
    clock.advance(7)
    newest = (await next_push(client))["data"]
    late = sample("stream_dropped_total", reason="late")
    (socket,) = sandbox.listeners["bybit"].sockets
    newest_ms = newest["timestamp"]
    for time, fields in ((newest_ms - 5_000, {"lastPrice": "1.5"}), (newest_ms + 1, {})):
        message = {"topic": "tickers.BTCUSDT", "type": "delta", "ts": time, "data": fields}
        await socket.send(json.dumps(message))
    last = await client.next(lambda message: has_time(message, newest_ms + 1))
    assert last["data"]["price"] == newest["price"]
    assert sample("stream_dropped_total", reason="late") == late + 1


@pytest.mark.parametrize(
    ("exchange", "symbol", "top"),
    [("bybit", BTC, "orderbook.1."), ("binance", SWAP, "bookTicker")],
)
async def test_ticker_is_not_joined_with_an_old_bid_and_ask(
    start: StartGateway,
    join: Join,
    sandbox: Sandbox,
    clock: FakeClock,
    exchange: str,
    symbol: str,
    top: str,
) -> None:
    """After a pause, a ticker that arrives before its bid and ask waits for them."""
    live = await start(market_types="spot,swap")
    client = await join(live)
    await client.subscribe(symbol, exchange=exchange)
    await next_push(client)
    await sandbox.set(exchange, freeze=True)
    clock.advance(4)
    dropped = sample("stream_dropped_total", reason="late")
    await sandbox.set(exchange, push_ms=20, mute=top, price=1.5)
    await eventually(lambda: sample("stream_dropped_total", reason="late") > dropped)
    await sandbox.set(exchange, push_ms=20, price=1.5)
    while (ticker := (await next_push(client))["data"])["price"] < ticker["bid"] * 0.9:
        pass  # sent before the pause
    pushed = [message["data"] for message in client.got if "data" in message]
    assert all(0.9 < data["price"] / data["ask"] < 1.1 for data in pushed if data["ask"])


@pytest.mark.parametrize("exchange", EXCHANGES)
async def test_reconnect_repeats_no_trades(
    start: StartGateway, join: Join, sandbox: Sandbox, clock: FakeClock, exchange: str
) -> None:
    """Each trade is pushed once, also if an exchange repeats the latest ones after a reconnect."""
    live = await start()
    client = await join(live)
    await client.subscribe(BTC, channel="trades", exchange=exchange)
    await sandbox.set(exchange, rate_limit=-1, push_ms=20)
    async with time_passes(clock):
        await next_push(client)
        await sandbox.set(exchange, rate_limit=-1, push_ms=20, drop="cut")
        await eventually(lambda: inside(live).sockets_of(exchange)[0].reconnects == 1)
        await next_push(client)
        await next_push(client)
    pushed = [message["data"] for message in client.got if "data" in message]
    ids = [trade["id"] for data in pushed if data["source"] == "stream" for trade in data["trades"]]
    assert len(ids) == len(set(ids))
    assert ids


@pytest.mark.parametrize(
    ("exchange", "symbol"),
    [("bybit", BTC), ("bybit", SWAP), ("binance", BTC), ("binance", SWAP), ("kraken", BTC)],
)
async def test_a_trade_has_the_same_id_by_rest_and_in_the_stream(
    start: StartGateway,
    join: Join,
    sandbox: Sandbox,
    clock: FakeClock,
    exchange: str,
    symbol: str,
) -> None:
    """The pushed trades are among those of REST, with the same ids, prices and amounts."""
    live = await start(market_types="spot,swap")
    client = await join(live)
    await sandbox.set(exchange, rate_limit=-1, push_ms=20)
    await client.subscribe(symbol, channel="trades", exchange=exchange)
    async with time_passes(clock):
        await client.next(lambda message: message.get("data", {}).get("source") == "stream")
    pushed = client.got[-1]["data"]["trades"]
    path = f"/trades/{symbol}?exchange={exchange}&limit=60&max_age=0"
    trades = (await live.get(path)).json()["trades"]
    assert pushed
    assert [trade for trade in pushed if trade not in trades] == []


@pytest.mark.parametrize("symbol", [BTC, SWAP])
@pytest.mark.parametrize(
    ("exchange", "row", "odd"),
    [
        ("binance", {"e": "aggTrade", "s": "BTCUSDT"}, {"q": "0"}),
        ("binance", {"e": "aggTrade", "s": "BTCUSDT"}, {"p": "0"}),
        ("bybit", {"topic": "publicTrade.BTCUSDT"}, {"BT": True}),
        ("bybit", {"topic": "publicTrade.BTCUSDT"}, {"v": "0"}),
    ],
)
async def test_odd_trades_are_not_pushed(
    start: StartGateway,
    join: Join,
    sandbox: Sandbox,
    clock: FakeClock,
    symbol: str,
    exchange: str,
    row: dict[str, str],
    odd: dict[str, Any],
) -> None:
    """Block trades and trades without amount or price are dropped."""
    live = await start(market_types="spot,swap")
    client = await join(live)
    await client.subscribe(symbol, channel="trades", exchange=exchange)
    await eventually(lambda: sandbox.count(exchange, " asked"))
    async with time_passes(clock):
        await next_push(client)
    ms = int(clock.time() * 1000)
    trade: dict[str, Any] = {"p": "97000", "T": ms}
    if exchange == "binance":
        trade |= {"a": 1, "q": "3.2", "E": ms, "m": True}
    else:
        trade |= {"i": "1", "v": "3.2", "s": "BTCUSDT", "S": "Buy", "BT": False}
    before = dropped(exchange)
    for change in (odd, {"a": 2, "i": "2"}):
        changed = trade | change
        body = row | (changed if exchange == "binance" else {"type": "snapshot", "data": [changed]})
        for socket in sandbox.listeners[exchange].sockets:
            await socket.send(json.dumps(body))
    await eventually(lambda: dropped(exchange) > before)
    await client.next(lambda message: '"2"' in json.dumps(message.get("data", {}).get("trades")))
    pushed = [message["data"]["trades"] for message in client.got if "data" in message]
    assert "1" not in {trade["id"] for trades in pushed for trade in trades}


@pytest.mark.parametrize("exchange", EXCHANGES)
async def test_odd_rows_do_not_spoil_a_list_of_trades(
    start: StartGateway, sandbox: Sandbox, exchange: str
) -> None:
    """REST leaves out trades without amount or price, and has each id once."""
    live = await start()
    await sandbox.set(exchange, rate_limit=-1, odd=["odd_trades"])
    answer = await live.get(f"/trades/BTC-USDT?exchange={exchange}&limit=50")
    assert answer.status_code == 200
    trades = answer.json()["trades"]
    assert all(trade["price"] > 0 and trade["amount"] > 0 for trade in trades)
    assert len({trade["id"] for trade in trades}) == len(trades) >= 30
    assert answer.json()["timestamp"] == max(trade["timestamp"] for trade in trades)


def test_checksum_equals_that_of_the_exchange() -> None:
    """The checksum of decoded numbers equals that of the digits which an exchange sends."""
    book = Market(1_800_000_000.0).book(Pair("DOGE", "USDT"), 10, 18_000_000_000)
    rows = {
        side: [[float(row["price"]), float(row["amount"])] for row in levels]
        for side, levels in book.rows.items()
    }
    assert checksum(rows, Pair("DOGE", "USDT").price_digits, 8) == book.checksum


def test_checksum_of_numbers_without_all_digits_is_unknown() -> None:
    """JSON numbers above 2**53 units lose digits, so their checksum cannot be computed."""
    book = {"asks": [(0.0000123, 123_456_789_012.12345)], "bids": []}
    assert checksum(book, 10, 8) is None


def test_memory_of_trades_is_bounded(clock: FakeClock) -> None:
    """The ids of the newest trades are remembered, and no more."""
    state = registry.TopicState(Topic("kraken", "trades", BTC), clock)
    state.remember_trades(str(number) for number in range(5 * registry.SEEN_TRADES))
    assert len(state._seen_trades) == registry.SEEN_TRADES
