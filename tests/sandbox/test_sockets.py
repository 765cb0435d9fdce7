"""The sockets of the sandbox, with ccxt.pro clients and plain clients."""

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager
from importlib import import_module
from itertools import pairwise
from typing import Any, TypeVar
from urllib.parse import urlsplit
from zlib import crc32

import aiohttp
import ccxt
import orjson
import pytest

from src.sandbox.binance import Binance
from src.sandbox.market import TRADE_SECONDS, iso_time
from src.sandbox.server import Sandbox
from tests.conftest import eventually
from tests.sandbox.test_sandbox import NAMES, NOON, Clock

SWAP = "BTC/USDT:USDT"
MARKETS = [*((name, "ETH/USDT") for name in NAMES), ("bybit", SWAP), ("binance", SWAP)]
PATHS = {"bybit": "/v5/public/spot", "binance": "/stream/ws/0", "kraken": "/v2"}
OTHERS = {"bybit": "/v5/public/other/spot", "binance": "/stream/ws/other", "kraken": "/v2/other"}
DEPTHS = {"bybit": 50, "binance": 100, "kraken": 25}
LATE = 10**8  # milliseconds: in practice never
FIGURES = ("open", "last", "high", "low", "baseVolume")
FORBIDDEN = {"bybit": 403, "binance": 451, "kraken": 403}
PING = {"bybit": {"op": "ping", "req_id": "7"}, "kraken": {"method": "ping", "req_id": 7}}
MALFORMED: dict[str, dict[str, Any]] = {
    "bybit": {"success": False, "ret_msg": "error:invalid op", "conn_id": "0"},
    "binance": {"id": None, "error": {"code": 3, "msg": "Invalid json"}},
    "kraken": {"error": "Malformed request", "method": "", "success": False},
}
Connect = Callable[..., Awaitable[Any]]
Value = TypeVar("Value")


def topic(name: str, coin: str) -> str:
    """Return the topic of a coin's ticker in USDT."""
    return {"bybit": f"tickers.{coin}USDT", "binance": f"{coin.lower()}usdt@ticker"}.get(
        name, f"ticker {coin}/USDT"
    )


def accepted(name: str, coin: str = "BTC", verb: str = "subscribe") -> dict[str, Any]:
    """Return the reply to a subscription to the ticker of a coin in USDT."""
    result = {"channel": "ticker", "snapshot": True, "symbol": f"{coin}/USDT"}
    result["event_trigger"] = "trades"
    common = {"success": True, "req_id": 7}
    replies: dict[str, dict[str, Any]] = {
        "bybit": common | {"ret_msg": verb, "conn_id": "0", "op": verb, "req_id": "7"},
        "binance": {"result": None, "id": 7},
        "kraken": common | {"method": verb, "result": result},
    }
    return replies[name]


def request(name: str, wanted: str, verb: str = "subscribe", **more: object) -> dict[str, Any]:
    """Return the message that subscribes to a topic. A topic of kraken is `channel symbol`."""
    if name == "bybit":
        return {"op": verb, "args": [wanted], "req_id": "7"}
    if name == "binance":
        return {"method": verb.upper(), "params": [wanted], "id": 7}
    channel, symbol = wanted.split()
    return {"method": verb, "params": {"channel": channel, "symbol": [symbol]} | more, "req_id": 7}


async def within_limit(awaited: Awaitable[Value]) -> Value:
    """Wait for at most 60 seconds."""
    return await asyncio.wait_for(awaited, 60)


def ticker(push: dict[str, Any]) -> dict[str, Any]:
    data = push.get("data", push)
    row: dict[str, Any] = data[0] if isinstance(data, list) else data
    return row


def price(push: dict[str, Any]) -> float:
    row = ticker(push)
    return float(next(row[key] for key in ("lastPrice", "last", "c") if key in row))


def symbol_of(push: dict[str, Any]) -> str:
    """Return the symbol of a ticker, without a slash."""
    row = ticker(push)
    return str(row.get("symbol") or row["s"]).replace("/", "")


class Peer:
    """A plain socket. It keeps the pushes that arrive while it waits for a reply."""

    def __init__(self, name: str, ws: aiohttp.ClientWebSocketResponse, clock: Clock) -> None:
        self.name, self.ws, self.clock = name, ws, clock
        self.pushed: list[dict[str, Any]] = []

    async def read(self) -> dict[str, Any]:
        message: dict[str, Any] = orjson.loads((await within_limit(self.ws.receive())).data)
        return message

    async def push(self) -> dict[str, Any]:
        """Return the next push. kraken pushes tickers only after trades, so that time passes."""
        self.clock.now += TRADE_SECONDS if self.name == "kraken" else 0
        while not self.is_push(message := await self.read()):
            pass
        return message

    async def request(self, message: object) -> dict[str, Any]:
        """Send a text, or another value as JSON. Return the reply without its times."""
        await self.ws.send_str(
            message if isinstance(message, str) else orjson.dumps(message).decode()
        )
        while self.is_push(answer := await self.read()):
            self.pushed.append(answer)
        return {key: value for key, value in answer.items() if key not in {"time_in", "time_out"}}

    async def ping(self) -> None:
        """Send a ping frame and wait for the pong."""
        await self.ws.ping()
        while (message := await within_limit(self.ws.receive())).type is not aiohttp.WSMsgType.PONG:
            self.pushed.append(orjson.loads(message.data))

    def is_push(self, message: dict[str, Any]) -> bool:
        return {"bybit": "topic", "binance": "s", "kraken": "data"}[
            self.name
        ] in message and "method" not in message

    async def next_price(self) -> float:
        """Return the last price of the next ticker."""
        return price(await self.push())


Dial = Callable[..., Coroutine[Any, Any, Peer]]


@pytest.fixture(autouse=True)
def no_logged_errors(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Fail if a handler or a task logs an error."""
    yield
    assert [record.getMessage() for record in caplog.records if record.levelname == "ERROR"] == []


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def sandbox(clock: Clock) -> AsyncIterator[Sandbox]:
    box = Sandbox(now=clock)
    await box.start()
    for name in NAMES:
        await box.set(name, push_ms=5, rate_limit=-1)
    yield box
    await box.stop()


@pytest.fixture
async def dial(sandbox: Sandbox, clock: Clock) -> AsyncIterator[Dial]:
    """Return a function that opens a plain socket."""
    peers: list[Peer] = []
    async with aiohttp.ClientSession() as session:

        async def open_socket(name: str, path: str = "") -> Peer:
            url = sandbox.urls[name] + (path or PATHS[name])
            peer = Peer(
                name,
                await session.ws_connect(
                    url, autoping=False, timeout=aiohttp.ClientWSTimeout(None, 1)
                ),
                clock,
            )
            peers.append(peer)
            if name == "kraken":
                assert (await peer.read())["channel"] == "status"
            return peer

        yield open_socket
        release([peer.ws for peer in peers])


def release(sockets: list[aiohttp.ClientWebSocketResponse]) -> None:
    """Close connections that the server aborted. aiohttp does not close them, and warns later."""
    for ws in sockets:
        ws._response.close()


def with_base(urls: Any, base: str) -> Any:
    """Replace host and port of all addresses. Socket addresses keep a socket scheme."""
    if isinstance(urls, dict):
        return {key: with_base(value, base) for key, value in urls.items()}
    parts = urlsplit(urls.replace("{hostname}", "host"))
    return (base.replace("http", "ws") if parts.scheme == "wss" else base) + parts.path


@pytest.fixture
async def connect(sandbox: Sandbox) -> AsyncIterator[Connect]:
    clients: list[Any] = []

    async def make(name: str, tickers: str = "ticker") -> Any:
        options: dict[str, Any] = {
            "fetchMarkets": {"types": ["spot", "linear"]},
            "fetchCurrencies": False,
        }
        if name == "binance":
            options["watchTickers"] = {"name": tickers}
            options["watchTrades"] = {"name": "aggTrade"}
        client = getattr(import_module(f"ccxt.pro.{name}"), name)(
            {"enableRateLimit": False, "options": {} if name == "kraken" else options}
        )
        client.has["fetchCurrencies"] = False
        client.timeout_on_exit, client.timeout = 0, 60_000
        base = sandbox.urls[name]
        client.urls["api"] = with_base(client.urls["api"], base)
        if name == "binance":  # ccxt recognizes spot sockets by "stream"
            client.urls["api"]["ws"]["spot"] = f"{base.replace('http', 'ws')}/stream/ws"
        clients.append(client)
        await client.load_markets()
        return client

    yield make
    await asyncio.gather(*(client.close() for client in clients))


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@asynccontextmanager
async def fast_clock(clock: Clock) -> AsyncIterator[None]:
    """Run the clock so fast that a push has one or more steps of a book."""

    async def move() -> None:
        while True:
            clock.now += 0.07
            await asyncio.sleep(0.002)

    running = asyncio.create_task(move())
    yield
    running.cancel()


def figures(tickers: dict[str, Any]) -> dict[str, list[Any]]:
    """Return the figures of tickers by symbol, without the open price."""
    return {symbol: [row[figure] for figure in FIGURES[1:]] for symbol, row in tickers.items()}


async def test_pushed_tickers_equal_rest(clock: Clock, connect: Connect, name: str) -> None:
    """All tickers of a subscription are pushed, and change with the time."""
    client, symbols = await connect(name), ["BTC/USDT", "DOGE/USDT", "ETH/BTC"]
    await within_limit(client.watch_tickers(symbols))
    for _ in range(2):
        fetched = await client.fetch_tickers(symbols)
        expected = figures(fetched)
        await eventually(lambda: figures(client.tickers) == expected)  # noqa: B023
        for symbol, ticker in client.tickers.items():
            if name != "kraken":  # its REST ticker has only the open price of today
                assert ticker["percentage"] == pytest.approx(
                    fetched[symbol]["percentage"], abs=0.01
                )
            sides = [fetched[symbol][side] for side in ("bid", "ask")]
            assert [ticker["bid"], ticker["ask"]] == ([None, None] if name == "bybit" else sides)
            # ccxt ignores the time of kraken's tickers.
            assert ticker["timestamp"] == (None if name == "kraken" else int(clock.now * 1000))
            if name == "kraken":
                assert ticker["info"]["timestamp"] == iso_time(int(clock.now * 1000))
        clock.now += 60


@pytest.mark.parametrize("name", ["bybit", "binance"])
async def test_pushed_swap_tickers_equal_rest(connect: Connect, name: str) -> None:
    """Only bybit pushes the bid and ask of a swap."""
    client = await connect(name)
    pushed = (await within_limit(client.watch_tickers([SWAP])))[SWAP]
    fetched = await client.fetch_ticker(SWAP)
    assert [pushed[figure] for figure in FIGURES] == [fetched[figure] for figure in FIGURES]
    sides = [fetched["bid"], fetched["ask"]] if name == "bybit" else [None, None]
    assert [pushed["bid"], pushed["ask"]] == sides


async def test_mini_tickers_have_no_bid_and_ask(connect: Connect) -> None:
    """The mini ticker of binance has only the prices of the day."""
    client = await connect("binance", "miniTicker")
    pushed = (await within_limit(client.watch_tickers(["BTC/USDT"])))["BTC/USDT"]
    fetched = await client.fetch_ticker("BTC/USDT")
    assert [pushed[figure] for figure in FIGURES] == [fetched[figure] for figure in FIGURES]
    assert [pushed["bid"], pushed["ask"]] == [None, None]


@pytest.mark.parametrize(("name", "symbol"), MARKETS)
async def test_pushed_bid_and_ask_equal_rest(
    clock: Clock, connect: Connect, name: str, symbol: str
) -> None:
    """Best bid and ask are the first levels of the REST book."""
    clock.now = NOON - 0.05  # a time at which books change, so that tickers have the same prices
    client = await connect(name)
    best, book = (
        (await within_limit(client.watch_bids_asks([symbol])))[symbol],
        await client.fetch_order_book(symbol, 5),
    )
    top = [book["bids"][0], book["asks"][0]]
    assert [best["bid"], best["ask"]] == [level[0] for level in top]
    assert [best["bidVolume"], best["askVolume"]] == pytest.approx(
        [level[1] for level in top], abs=1e-8
    )


@pytest.mark.parametrize(("name", "symbol"), MARKETS)
async def test_pushed_books_equal_rest(
    clock: Clock, connect: Connect, name: str, symbol: str
) -> None:
    """Books are never crossed, and equal the REST book also after a pause."""
    client, depth = await connect(name), DEPTHS[name]
    async with fast_clock(clock):
        for _ in range(40):
            book = await within_limit(client.watch_order_book(symbol, depth))
            bids, asks = [[level[0] for level in book[side]] for side in ("bids", "asks")]
            assert bids == sorted(set(bids), reverse=True)
            assert asks == sorted(set(asks))
            assert bids[0] < asks[0]
    for pause in (0.0, 0.3, 60.0):
        clock.now += pause
        step = int(clock.now * 10) * 100
        await eventually(lambda: client.orderbooks[symbol]["timestamp"] == step)  # noqa: B023
        fetched = await client.fetch_order_book(symbol, depth)
        book = client.orderbooks[symbol].limit()
        for side in ("bids", "asks"):
            assert len(book[side]) == depth
            assert [level[:2] for level in book[side]] == [level[:2] for level in fetched[side]]
        if name == "binance":
            assert book["nonce"] == fetched["nonce"] == step


@pytest.mark.parametrize(("name", "symbol"), MARKETS)
async def test_pushed_trades_equal_rest(
    clock: Clock, connect: Connect, name: str, symbol: str
) -> None:
    """Each trade is pushed once and in order, also if a push has many trades."""
    client = await connect(name)
    async with fast_clock(clock):
        for _ in range(3):
            await within_limit(client.watch_trades(symbol))
    clock.now += 20
    await eventually(lambda: client.trades[symbol][-1]["timestamp"] == int(clock.now * 2) * 500)
    pushed = list(client.trades[symbol])
    assert len(pushed) >= 43
    numbers = [int(trade["id"]) for trade in pushed]
    assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
    fetched = await client.fetch_trades(symbol, None, len(pushed))
    for figure in ("id", "timestamp", "side", "price", "amount"):
        assert [trade[figure] for trade in pushed] == [trade[figure] for trade in fetched]


def candle_topic(name: str, interval: str) -> dict[str, Any]:
    """Return the message that subscribes to candles of BTC/USDT."""
    if name == "kraken":
        return request(name, "ohlc BTC/USDT", interval=int(interval))
    return request(name, {"bybit": f"kline.{interval}.BTCUSDT"}.get(name, f"btcusdt@{interval}"))


@pytest.mark.parametrize("timeframe", ["1m", "5m", "15m", "30m", "1h", "4h", "1d", "1w"])
@pytest.mark.parametrize(("name", "symbol"), MARKETS)
async def test_pushed_candles_equal_rest(
    clock: Clock, connect: Connect, name: str, symbol: str, timeframe: str
) -> None:
    """The growing candle is the last one of REST, also after closes."""
    client = await connect(name)
    await within_limit(client.watch_ohlcv(symbol, timeframe))
    for pause in (0.0, 20.0, client.parse_timeframe(timeframe), 45.0):
        clock.now += pause
        fetched = (await client.fetch_ohlcv(symbol, timeframe))[-2:]
        pushed = client.ohlcvs[symbol][timeframe]
        await eventually(lambda: pushed[-1] == fetched[-1])  # noqa: B023
        if pause >= 45:
            assert pushed[-2] == fetched[-2]


async def test_the_last_update_of_a_candle_is_final(
    sandbox: Sandbox, dial: Dial, clock: Clock, name: str
) -> None:
    """bybit and binance mark it. kraken sends the candle without a mark, once."""
    minute = int(NOON // 60) * 60
    clock.now = minute + 50
    peer = await dial(name)
    await peer.request(candle_topic(name, {"binance": "kline_1m"}.get(name, "1")))
    await peer.push()
    clock.now = minute + 75
    closed: list[tuple[int, bool | None, str]] = []
    while (rows := candles_of(await peer.push()))[-1][0] == minute * 1000:
        closed += rows
    *ended, row = rows
    closed += ended
    marks = [mark for _, mark, _ in closed]
    assert marks[-1] is (None if name == "kraken" else True)
    assert True not in marks[:-1]
    assert row[:2] == ((minute + 60) * 1000, None if name == "kraken" else False)
    async with aiohttp.ClientSession() as session:
        path = {
            "bybit": "/v5/market/kline?category=spot&symbol=BTCUSDT&interval=1&limit=2",
            "binance": "/api/v3/klines?symbol=BTCUSDT&interval=1m&limit=2",
            "kraken": "/0/public/OHLC?pair=XBTUSDT&interval=1",
        }[name]
        async with session.get(sandbox.urls[name] + path) as answer:
            fetched = await answer.json()
    volume = {
        "bybit": lambda: fetched["result"]["list"][1][5],
        "binance": lambda: fetched[0][5],
        "kraken": lambda: fetched["result"]["XBTUSDT"][-2][6],
    }[name]()
    assert float(closed[-1][2]) == float(volume)


def candles_of(push: dict[str, Any]) -> list[tuple[int, bool | None, str]]:
    """Return start in milliseconds, the mark of the end, and volume of pushed candles."""
    if "k" in push:
        return [(push["k"]["t"], push["k"]["x"], push["k"]["v"])]
    rows = push["data"]
    if "start" in rows[0]:
        return [(row["start"], row["confirm"], row["volume"]) for row in rows]
    start = ccxt.Exchange.parse8601
    return [(start(row["interval_begin"]) or 0, None, row["volume"]) for row in rows]


async def test_kraken_pushes_a_snapshot_of_candles(dial: Dial, clock: Clock) -> None:
    """An update follows only after a trade, so that a quiet candle has no last update."""
    peer = await dial("kraken")
    await peer.request(request("kraken", "ohlc BTC/USDT", interval=5))
    while not peer.is_push(snapshot := await peer.read()):  # `push` would let time pass
        pass
    assert (snapshot["type"], len(snapshot["data"])) == ("snapshot", 10)
    await drain_pushes(peer)
    assert peer.pushed == []
    clock.now += 10
    update = await peer.push()
    assert (update["type"], len(update["data"])) == ("update", 1)
    row = update["data"][0]
    assert row["interval"] == 5
    assert row["timestamp"] == "2026-01-01T12:05:00.000Z"


async def test_kraken_knows_markets_by_their_own_names(dial: Dial) -> None:
    """The names are `wsname` with BTC and DOGE. REST names are refused with different errors."""
    peer = await dial("kraken")
    refusals = {
        "XBT/USDT": "Currency pair not supported XBT/USDT",
        "XDG/USDT": "Currency pair not supported XDG/USDT",
        "btc/usdt": "Currency pair not supported btc/usdt",
        "XBTUSDT": "Currency pair not in ISO 4217-A3 format XBTUSDT",
    }
    for symbol, error in refusals.items():
        answer = await peer.request(request("kraken", f"ticker {symbol}"))
        assert (answer["error"], answer["symbol"]) == (error, symbol)
    for symbol in ("BTC/USDT", "DOGE/USDT"):
        assert (await peer.request(request("kraken", f"ticker {symbol}")))["success"] is True


@pytest.mark.parametrize(
    ("wanted", "first", "other"),
    [
        ("ticker BTC/USDT", {}, {"event_trigger": "bbo"}),
        ("book BTC/USDT", {"depth": 100}, {}),
    ],
)
async def test_kraken_distinguishes_subscriptions_by_their_options(
    dial: Dial, wanted: str, first: dict[str, Any], other: dict[str, Any]
) -> None:
    """A second subscription and an unsubscription with other options are refused."""
    peer = await dial("kraken")
    echoed = (await peer.request(request("kraken", wanted, **first)))["result"]
    assert echoed.items() >= first.items()
    for options in (first, other):
        answer = await peer.request(request("kraken", wanted, **options))
        assert answer["error"] == "Already subscribed"
    answer = await peer.request(request("kraken", wanted, "unsubscribe", **other))
    assert answer["error"] == "Subscription Not Found"
    assert (await peer.request(request("kraken", wanted, "unsubscribe", **first)))["success"]


async def test_kraken_pushes_tickers_after_trades_or_changes_of_the_best_prices(
    sandbox: Sandbox, dial: Dial, clock: Clock
) -> None:
    """A move of the book without a trade is pushed only with the event trigger `bbo`."""
    clock.now, clock.step = NOON // 1, 1e-6  # the next trade follows in half a second
    trades, best = await dial("kraken"), await dial("kraken", OTHERS["kraken"])
    await trades.request(request("kraken", "ticker BTC/USDT"))
    await best.request(request("kraken", "ticker BTC/USDT", event_trigger="bbo"))
    first = [orjson.loads((await within_limit(peer.ws.receive())).data) for peer in (trades, best)]
    assert [push["type"] for push in first] == ["snapshot", "snapshot"]
    bid = first[0]["data"][0]["bid"]
    assert first[1]["data"][0]["bid"] == bid
    await sandbox.set("kraken", push_ms=5, price=1.02)
    moved = orjson.loads((await within_limit(best.ws.receive())).data)
    assert moved["type"] == "update"
    assert moved["data"][0]["bid"] == pytest.approx(bid * 1.02, rel=1e-4)
    await drain_pushes(trades)
    assert trades.pushed == []
    assert (await trades.push())["data"][0]["bid"] == pytest.approx(bid * 1.02, rel=1e-3)
    await sandbox.set("kraken", push_ms=5, price=1.04, still=["XBTUSDT"])
    while (await best.read())["data"][0]["bid"] < bid * 1.03:
        pass
    clock.now += 60
    await drain_pushes(trades)
    assert trades.pushed == []


def checksum_of(message: dict[str, Any], text: str, book: dict[str, dict[str, str]]) -> int:
    """Apply a pushed book, and return the checksum that kraken documents."""
    pattern = r'"price":([\d.]+),"qty":([\d.]+)'
    for side in ("bids", "asks"):
        rows = re.findall(pattern, re.search(rf'"{side}":\[(.*?)\]', text)[1])  # type: ignore[index]
        if message["type"] == "snapshot":
            book[side] = {}
        book[side] |= dict(rows)
        ordered = sorted(book[side].items(), key=lambda row: float(row[0]), reverse=side == "bids")
        book[side] = dict([row for row in ordered if float(row[1])][:25])
    levels = [*list(book["asks"].items())[:10], *list(book["bids"].items())[:10]]
    digits = [number.replace(".", "").lstrip("0") for level in levels for number in level]
    return crc32("".join(digits).encode())


@pytest.mark.parametrize("symbol", ["BTC/USDT", "DOGE/USDT", "USDC/USDT", "ETH/BTC"])
async def test_kraken_pushes_the_checksum_of_the_book(
    dial: Dial, clock: Clock, symbol: str
) -> None:
    """It is the CRC-32 of the digits of the ten best levels after the update, as documented."""
    peer = await dial("kraken")
    await peer.request(request("kraken", f"book {symbol}", depth=25))
    book: dict[str, dict[str, str]] = {}
    async with fast_clock(clock):
        for _ in range(60):
            text = str((await within_limit(peer.ws.receive())).data)
            message = orjson.loads(text)
            assert checksum_of(message, text, book) == message["data"][0]["checksum"]


@pytest.mark.parametrize("name", ["bybit", "binance"])
async def test_sockets_share_one_market(
    sandbox: Sandbox, dial: Dial, clock: Clock, name: str
) -> None:
    """The price depends only on the time. The price knob multiplies it for all sockets."""
    first, second = await dial(name), await dial(name, OTHERS[name])
    for peer in (first, second):
        await peer.request(request(name, topic(name, "BTC")))
    before = await first.next_price()
    assert await second.next_price() == before
    clock.now += 60
    await first.request(request(name, topic(name, "ETH"), "unsubscribe"))
    assert await first.next_price() != before
    clock.now -= 60
    await first.ping()
    assert await first.next_price() == before
    await sandbox.set(name, push_ms=5, price=1.05)
    await first.ping()
    assert await first.next_price() == pytest.approx(before * 1.05, rel=1e-5)
    await sandbox.reset()
    await first.ping()
    assert await first.next_price() == before


async def test_subscriptions_are_confirmed(dial: Dial, name: str) -> None:
    """Subscribing and unsubscribing are confirmed, and apply only to their topic."""
    peer, bitcoin, ether = await dial(name), topic(name, "BTC"), topic(name, "ETH")
    assert await peer.request(request(name, bitcoin)) == accepted(name)
    await peer.request(request(name, ether))
    both = [await peer.push() for _ in range(8)]
    assert len({symbol_of(push) for push in both}) == 2
    answer = await peer.request(request(name, bitcoin, "unsubscribe"))
    assert answer == accepted(name, verb="unsubscribe")
    assert {symbol_of(await peer.push()) for _ in range(8)} == {"ETHUSDT"}


@pytest.mark.parametrize(
    ("name", "wanted", "error"),
    [
        ("bybit", "tickers.NOPE", {"ret_msg": "error:handler not found,topic:tickers.NOPE"}),
        ("bybit", "nope.BTCUSDT", {"ret_msg": "error:handler not found,topic:nope.BTCUSDT"}),
        (
            "bybit",
            "orderbook.3.BTCUSDT",
            {"ret_msg": "error:handler not found,topic:orderbook.3.BTCUSDT"},
        ),
        (
            "bybit",
            "orderbook.BTCUSDT",
            {"ret_msg": "error:handler not found,topic:orderbook.BTCUSDT"},
        ),
        (
            "binance",
            "nope@ticker",
            {"error": {"code": 2, "msg": "Invalid request: unknown stream"}},
        ),
        (
            "binance",
            "btcusdt@nope",
            {"error": {"code": 2, "msg": "Invalid request: unknown stream"}},
        ),
        (
            "kraken",
            "ticker NO/PE",
            {"error": "Currency pair not supported NO/PE", "symbol": "NO/PE"},
        ),
        ("kraken", "nope BTC/USDT", {"error": "Subscription name invalid", "symbol": "BTC/USDT"}),
        ("bybit", "kline.2.BTCUSDT", {"ret_msg": "error:handler not found,topic:kline.2.BTCUSDT"}),
        (
            "binance",
            "btcusdt@kline_2m",
            {"error": {"code": 2, "msg": "Invalid request: unknown stream"}},
        ),
    ],
)
async def test_unknown_topics_are_refused(
    dial: Dial, name: str, wanted: str, error: dict[str, Any]
) -> None:
    """The error has the exchange's format. Nothing is pushed for the topic."""
    peer, refused = (
        await dial(name),
        {"bybit": {"success": False}, "kraken": {"success": False}}.get(name, {}),
    )
    asked = request(name, wanted)
    answer = await peer.request(asked)
    assert answer.items() >= (error | refused).items()
    assert {answer.get(key) for key in ("id", "req_id")} == {
        None,
        asked.get("id", asked.get("req_id")),
    }
    await peer.request(request(name, topic(name, "ETH")))
    assert {symbol_of(await peer.push()) for _ in range(4)} == {"ETHUSDT"}


@pytest.mark.parametrize("depth", [3, 0, "10", None])
async def test_kraken_refuses_unknown_depths(dial: Dial, depth: object) -> None:
    """Other topics of the socket are still pushed."""
    peer = await dial("kraken")
    answer = await peer.request(request("kraken", "book BTC/USDT", depth=depth))
    assert answer["error"] == "Subscription depth not supported"
    await peer.request(request("kraken", "ticker ETH/USDT"))
    assert symbol_of(await peer.push()) == "ETHUSDT"


async def messages_with(
    sandbox: Sandbox, dial: Dial, name: str, wanted: str, odd: str, path: str = ""
) -> list[dict[str, Any]]:
    """Return forty pushes of a topic while the knob `odd` is set. Time passes with each."""
    peer = await dial(name, path)
    await sandbox.set(name, push_ms=5, odd=[odd])
    async with fast_clock(peer.clock):
        await peer.request(request(name, wanted))
        return [*peer.pushed, *[await peer.push() for _ in range(40)]]


async def test_pushes_can_come_twice(sandbox: Sandbox, dial: Dial, name: str) -> None:
    """Each push is followed by a copy."""
    pushes = await messages_with(sandbox, dial, name, topic(name, "BTC"), "duplicates")
    assert pushes[0::2] == pushes[1::2]


async def test_pushes_can_come_late(sandbox: Sandbox, dial: Dial, name: str) -> None:
    """Each push is followed by the one before it."""
    pushes = await messages_with(sandbox, dial, name, topic(name, "BTC"), "late")
    assert pushes[2::2] == [pushes[0], *pushes[1::2]][: len(pushes[2::2])]


async def test_trades_are_not_repeated_after_a_halt(
    sandbox: Sandbox, dial: Dial, clock: Clock
) -> None:
    """The last trade of a halted market is three days old, but known trades do not come again."""
    peer = await dial("bybit")
    await peer.request(request("bybit", "publicTrade.BTCUSDT"))
    changes: list[dict[str, Any]] = [{}, {"halted": ["BTCUSDT"]}, {}]
    async with fast_clock(clock):
        for knobs in changes:
            await sandbox.set("bybit", push_ms=5, **knobs)
            for _ in range(20):
                await drain_pushes(peer)
        pushes = [*peer.pushed, *[await peer.push() for _ in range(5)]]
    numbers = [int(row["i"]) for push in pushes for row in push["data"]]
    assert numbers == sorted(set(numbers))


@pytest.mark.parametrize(
    ("wanted", "path"),
    [("orderbook.50.BTCUSDT", ""), ("orderbook.50.BTCUSDT", "/v5/public/linear")],
)
async def test_bybit_numbers_its_book_updates(
    sandbox: Sandbox, dial: Dial, clock: Clock, wanted: str, path: str
) -> None:
    """Numbers are consecutive. With the knob `lost_delta`, one is missing."""
    peer = await dial("bybit", path)
    await peer.request(request("bybit", wanted))
    async with fast_clock(clock):
        numbers = [(await peer.push())["data"]["u"] for _ in range(20)]
        assert numbers == list(range(numbers[0], numbers[0] + 20))
        await sandbox.set("bybit", push_ms=5, odd=["lost_delta"])
        while (number := (await peer.push())["data"]["u"]) == numbers[-1] + 1:
            numbers.append(number)
        assert number == numbers[-1] + 2
        assert [(await peer.push())["data"]["u"] for _ in range(5)] == [
            *range(number + 1, number + 6)
        ]


async def test_a_lost_delta_breaks_the_chain_of_binance(
    sandbox: Sandbox, dial: Dial, clock: Clock
) -> None:
    """`pu` is the number of the update before, except once."""
    peer = await dial("binance", "/public/ws/0")
    await peer.request(request("binance", "btcusdt@depth"))
    async with fast_clock(clock):
        last = await peer.push()
        await sandbox.set("binance", push_ms=5, odd=["lost_delta"])
        while (push := await peer.push())["pu"] == last["u"]:
            last = push
        following = [push, *[await peer.push() for _ in range(5)]]
    assert push["pu"] > last["u"]
    assert all(later["pu"] == earlier["u"] for earlier, later in pairwise(following))


async def test_a_lost_delta_breaks_the_checksum_of_kraken(
    sandbox: Sandbox, dial: Dial, clock: Clock
) -> None:
    """The checksum differs as soon as a delta is missing, until a new snapshot."""
    peer = await dial("kraken")
    await peer.request(request("kraken", "book BTC/USDT", depth=25))
    await sandbox.set("kraken", push_ms=5, odd=["lost_delta"])
    book: dict[str, dict[str, str]] = {}
    matches = []
    async with fast_clock(clock):
        for _ in range(60):
            text = str((await within_limit(peer.ws.receive())).data)
            message = orjson.loads(text)
            matches.append(checksum_of(message, text, book) == message["data"][0]["checksum"])
    assert matches[0] is True
    assert False in matches


@pytest.mark.parametrize(
    ("name", "wanted", "path"),
    [
        ("bybit", "publicTrade.BTCUSDT", "/v5/public/linear"),
        ("binance", "btcusdt@aggTrade", "/market/ws/0"),
    ],
)
async def test_swaps_have_odd_trades(
    sandbox: Sandbox, dial: Dial, name: str, wanted: str, path: str
) -> None:
    """Some have no amount, no price, or come twice. Bybit marks block trades."""
    pushes = await messages_with(sandbox, dial, name, wanted, "odd_trades", path)
    rows = [row for push in pushes for row in push.get("data", [push])]
    special = [row for row in rows if row.get("BT") is True]
    usual = [row for row in rows if row not in special]
    prices = [float(row["p"]) for row in usual if float(row["p"])]
    assert bool(special) == (name == "bybit")
    assert all(0.89 < float(row["p"]) / prices[0] < 0.91 for row in special)
    assert 0.0 in {float(row["p"]) for row in rows}
    assert 0.0 in {float(row.get("q") or row["v"]) for row in rows}
    numbers = [row.get("a") or row["i"] for row in rows]
    assert len(set(numbers)) < len(numbers)


async def test_bybit_pushes_changed_fields_of_a_swap(dial: Dial, connect: Connect) -> None:
    """ccxt merges them, so that its ticker equals that of REST."""
    peer = await dial("bybit", "/v5/public/linear")
    await peer.request(request("bybit", "tickers.BTCUSDT"))
    first = await peer.push()
    assert first["type"] == "snapshot"
    peer.clock.step = 0.05
    deltas = [await peer.push() for _ in range(20)]
    changed = [delta for delta in deltas if delta["type"] == "delta"]
    assert all(delta["data"].keys() < first["data"].keys() for delta in changed)
    assert all(("bid1Price" in row["data"]) == ("bid1Size" in row["data"]) for row in changed)
    client = await connect("bybit")
    await within_limit(client.watch_tickers([SWAP]))
    peer.clock.step = 0.0
    peer.clock.now += 60
    fetched = await client.fetch_ticker(SWAP)
    figures = [*FIGURES, "bid", "ask"]
    expected = [fetched[figure] for figure in figures]
    await eventually(lambda: [client.tickers[SWAP][figure] for figure in figures] == expected)


async def test_bybit_pushes_a_closed_candle_with_the_next_one(dial: Dial, clock: Clock) -> None:
    """Recorded on 2026-08-09: one message has both rows."""
    clock.now = int(NOON // 60) * 60 + 50
    peer = await dial("bybit")
    await peer.request(request("bybit", "kline.1.BTCUSDT"))
    await peer.push()
    clock.now += 20
    while len(rows := (await peer.push())["data"]) == 1 and not rows[0]["confirm"]:
        pass
    assert [row["confirm"] for row in rows] == [True, False]


async def test_bybit_limits_the_topics_of_a_message(dial: Dial) -> None:
    """Spot accepts ten topics per message, and all topics of a socket have 21,000 characters."""
    spot, linear = await dial("bybit"), await dial("bybit", "/v5/public/linear")
    coins = ["BTC", "ETH", "SOL", "XRP", "ADA", "DOGE", "LTC", "LINK", "AVAX", "DOT", "BCH"]
    topics = [f"tickers.{coin}USDT" for coin in coins]
    answer = await spot.request({"op": "subscribe", "args": topics})
    assert (answer["success"], answer["ret_msg"]) == (False, "args size >10")
    assert (await spot.request({"op": "subscribe", "args": topics[:10]}))["success"] is True
    channels = ("tickers", "publicTrade", "orderbook.50")
    swaps = [f"{channel}.{coin}USDT" for channel in channels for coin in coins[:4]]
    assert (await linear.request({"op": "subscribe", "args": swaps}))["success"] is True
    many = ["tickers.BTCUSDT"] * 1_400
    answer = await linear.request({"op": "unsubscribe", "args": many})
    assert (answer["success"], answer["ret_msg"]) == (False, "args length >21000")


async def test_bybit_refuses_a_message_with_a_known_topic(dial: Dial) -> None:
    """No topic of the message is subscribed."""
    peer = await dial("bybit")
    await peer.request(request("bybit", "tickers.BTCUSDT"))
    both = {"op": "subscribe", "args": ["tickers.ETHUSDT", "tickers.BTCUSDT"]}
    answer = await peer.request(both)
    refusal = "error:already subscribed,topic:tickers.BTCUSDT"
    assert (answer["success"], answer["ret_msg"]) == (False, refusal)
    assert {symbol_of(await peer.push()) for _ in range(4)} == {"BTCUSDT"}


@pytest.mark.parametrize(("path", "limit"), [(PATHS["binance"], 5), ("/market/ws/0", 10)])
async def test_binance_closes_a_socket_with_too_many_messages(
    dial: Dial, path: str, limit: int
) -> None:
    """Spot sockets accept five messages per second, those of swaps ten."""
    peer = await dial("binance", path)
    for _ in range(limit):
        await peer.request(request("binance", "btcusdt@ticker"))
    await peer.ws.send_str("{}")
    while (await within_limit(peer.ws.receive())).type is aiohttp.WSMsgType.TEXT:
        pass
    assert peer.ws.close_code == aiohttp.WSCloseCode.POLICY_VIOLATION


async def test_binance_limits_the_streams_of_a_socket(sandbox: Sandbox, dial: Dial) -> None:
    """A socket has at most 1,024 streams."""
    await sandbox.set("binance", push_ms=LATE, rate_limit=-1)
    peer = await dial("binance")
    speeds = [f"btcusdt@depth@{number}ms" for number in range(1_025)]
    answer = await peer.request({"method": "SUBSCRIBE", "params": speeds, "id": 7})
    assert answer["error"]["msg"] == "Invalid request: more than 1024 streams"
    answer = await peer.request({"method": "SUBSCRIBE", "params": speeds[1:], "id": 7})
    assert answer == accepted("binance")


async def test_binance_serves_the_streams_of_swaps_by_category(dial: Dial) -> None:
    """Books and best prices are at /public, all others at /market."""
    for path, known, unknown in (("/public", "depth", "ticker"), ("/market", "aggTrade", "depth")):
        peer = await dial("binance", f"{path}/ws/0")
        assert await peer.request(request("binance", f"btcusdt@{known}")) == accepted("binance")
        assert "error" in await peer.request(request("binance", f"btcusdt@{unknown}"))


async def test_kraken_refuses_too_many_messages(dial: Dial) -> None:
    """The socket stays open."""
    peer = await dial("kraken")
    answers = [await peer.request(PING["kraken"]) for _ in range(101)]
    assert answers[-1] == {
        "error": "Exceeded msg rate",
        "method": "subscribe",
        "success": False,
    }
    await peer.ping()


@pytest.mark.parametrize(
    ("name", "count", "seconds", "status"),
    [("bybit", 500, 300, 403), ("binance", 300, 300, 429), ("kraken", 150, 600, 429)],
)
async def test_exchanges_limit_new_sockets(
    sandbox: Sandbox, dial: Dial, clock: Clock, name: str, count: int, seconds: int, status: int
) -> None:
    """The limit is of a period, and a change of the knobs resets it."""
    sandbox.listeners[name].connections = [clock.now] * (count - 1)
    await dial(name)
    with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
        await dial(name)
    assert refused.value.status == status
    clock.now += seconds
    await dial(name)
    sandbox.listeners[name].connections = [clock.now] * count
    await sandbox.reset()
    await dial(name)


async def test_pings_are_answered(dial: Dial, name: str) -> None:
    """All exchanges answer ping frames. bybit and kraken also answer ping messages."""
    peer = await dial(name)
    await peer.ping()
    if name == "bybit":
        pong = {"success": True, "ret_msg": "pong", "conn_id": "0", "op": "ping", "req_id": "7"}
        assert await peer.request(PING[name]) == pong
    if name == "kraken":
        assert await peer.request(PING[name]) == {"method": "pong", "req_id": 7}


async def test_malformed_messages_change_nothing(
    dial: Dial, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reply has the exchange's format. Binary messages are not answered."""
    monkeypatch.setattr(Binance, "message_limits", ())
    peer, wanted = await dial(name), topic(name, "BTC")
    await peer.request(request(name, wanted))
    for junk in (
        "hello",
        "",
        "[]",
        "7",
        "null",
        "{}",
        '{"op":"subscribe"}',
        '{"method":"subscribe","params":7}',
    ):
        assert await peer.request(junk) == MALFORMED[name]
    assert await peer.request(request(name, wanted, "dance")) == MALFORMED[name]
    await peer.ws.send_bytes(b"{}")
    assert symbol_of(await peer.push()) == "BTCUSDT"
    assert await peer.request(request(name, topic(name, "ETH"))) == accepted(name, "ETH")


@pytest.mark.parametrize(
    ("name", "wanted"), [("bybit", "orderbook.50.BTCUSDT"), ("kraken", "book BTC/USDT")]
)
async def test_subscribing_again_sends_a_new_snapshot(
    sandbox: Sandbox, dial: Dial, clock: Clock, name: str, wanted: str
) -> None:
    """This holds even without a push between unsubscribing and subscribing."""
    peer = await dial(name)
    await peer.request(request(name, wanted))
    assert (await peer.push())["type"] == "snapshot"
    await sandbox.set(name, push_ms=LATE)
    await peer.ping()
    clock.now += 1
    for verb in ("unsubscribe", "subscribe"):
        await peer.request(request(name, wanted, verb))
    await sandbox.set(name, push_ms=5)
    assert (await peer.push())["type"] == "snapshot"


async def test_sockets_and_their_messages_are_counted(
    sandbox: Sandbox, dial: Dial, name: str
) -> None:
    """Handshakes are counted by path, messages by path and " asked"."""
    path = PATHS[name]
    peer = await dial(name)
    assert sandbox.calls[name] == {path: 1}
    await peer.request(request(name, topic(name, "BTC")))
    await peer.request("junk")
    await dial(name, OTHERS[name])
    assert sandbox.calls[name] == {path: 1, f"{path} asked": 2, OTHERS[name]: 1}
    assert sandbox.count(name, "asked") == 2


async def open_two(dial: Dial, name: str) -> tuple[Peer, Peer]:
    """Open two sockets with a ticker, the second one on another path."""
    peers = [await dial(name), await dial(name, OTHERS[name])]
    for peer in peers:
        await peer.request(request(name, topic(name, "BTC")))
        await peer.push()
    return peers[0], peers[1]


async def drain_pushes(peer: Peer) -> None:
    """Receive the pushes that were sent before."""
    for _ in range(3):
        await peer.ping()


@pytest.mark.parametrize("knobs", [{"freeze": True}, {"latency_ms": LATE}, {"push_ms": LATE}])
async def test_pushes_can_be_held_back(
    sandbox: Sandbox, dial: Dial, name: str, knobs: dict[str, Any]
) -> None:
    """The socket still replies, and pushes after a reset. Other sockets are not affected."""
    other, spoiled = await open_two(dial, name)
    await sandbox.set(name, only="other", **({"push_ms": 5} | knobs))
    await drain_pushes(spoiled)
    spoiled.pushed.clear()
    await drain_pushes(other)
    for _ in range(2):
        await other.push()
    assert await spoiled.request(request(name, topic(name, "ETH"))) == accepted(name, "ETH")
    await spoiled.ping()
    assert spoiled.pushed == []
    await sandbox.reset()
    await spoiled.push()


async def test_late_pushes_have_the_old_price(
    sandbox: Sandbox, dial: Dial, clock: Clock, name: str
) -> None:
    """A delayed push has the price of the time at which it was due."""
    peer = await dial(name)
    await peer.request(request(name, topic(name, "BTC")))
    first, prices = price(await peer.read()), list[float]()
    clock.now += 60
    await sandbox.set(name, push_ms=5, latency_ms=LATE)
    await drain_pushes(peer)
    assert {price(push) for push in peer.pushed} <= {first}
    clock.now += 60
    await sandbox.set(name, push_ms=5)
    while len(set(prices) - {first}) < 2:
        prices.append(await peer.next_price())
    assert len([value for value in prices if value != first]) == 2


async def test_body_replaces_pushes(sandbox: Sandbox, dial: Dial, clock: Clock, name: str) -> None:
    """Handshakes and replies are not replaced."""
    await sandbox.set(name, push_ms=5, body="<html>")
    peer = await dial(name)
    assert await peer.request(request(name, topic(name, "BTC"))) == accepted(name)
    async with fast_clock(clock):
        assert [(await within_limit(peer.ws.receive())).data for _ in range(3)] == ["<html>"] * 3
        await sandbox.reset()
        while (text := (await within_limit(peer.ws.receive())).data) == "<html>":
            pass
    assert peer.is_push(orjson.loads(text))


@pytest.mark.parametrize(("how", "code"), [("cut", 1006), ("close", 1000)])
async def test_drop_ends_open_sockets(
    sandbox: Sandbox, dial: Dial, name: str, how: str, code: int
) -> None:
    """Sockets on other paths stay open, and new sockets are served."""
    other, dropped = await open_two(dial, name)

    async def drain() -> None:
        async for _ in dropped.ws:
            pass

    reading = asyncio.create_task(drain())
    await sandbox.set(name, push_ms=5, only="other", drop=how)
    await within_limit(reading)
    assert dropped.ws.close_code == code
    await other.ping()
    await other.push()
    again = await dial(name, OTHERS[name])
    await again.request(request(name, topic(name, "BTC")))
    await again.push()


@pytest.mark.parametrize("knobs", [{"drop": "cut"}, {"drop": "close"}, {"refuse": True}])
async def test_ccxt_reconnects_after_a_drop(
    sandbox: Sandbox, connect: Connect, name: str, knobs: dict[str, Any]
) -> None:
    """A waiting client raises a network error, and can watch again after a reset."""
    client = await connect(name)
    await within_limit(client.watch_ticker("BTC/USDT"))
    await sandbox.set(name, freeze=True)
    await client.fetch_time()  # receives the pushes that were sent before
    waiting = asyncio.create_task(client.watch_ticker("BTC/USDT"))
    await client.fetch_time()
    sockets = [socket.connection for socket in client.clients.values()]
    await sandbox.set(name, freeze=True, **knobs)
    with pytest.raises(ccxt.NetworkError):
        await within_limit(waiting)
    release(sockets)
    await sandbox.reset()
    assert (await within_limit(client.watch_ticker("BTC/USDT")))["last"] == (
        await client.fetch_ticker("BTC/USDT")
    )["last"]


@pytest.mark.parametrize(
    ("knobs", "status"),
    [
        ({"status": 503}, 503),
        ({"status": 429, "body": "slow down"}, 429),
        ({"geo_block": True}, 0),
        ({"size": 99}, 200),
    ],
)
async def test_knobs_refuse_handshakes(
    sandbox: Sandbox, dial: Dial, name: str, knobs: dict[str, Any], status: int
) -> None:
    """`only` and `times` apply to handshakes. Open sockets stay open."""
    open_before = await dial(name, OTHERS[name])
    await sandbox.set(name, push_ms=5, only="other", times=2, **knobs)
    await dial(name)
    for _ in range(2):
        with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
            await dial(name, OTHERS[name])
        assert refused.value.status == (status or FORBIDDEN[name])
    for peer in (open_before, await dial(name, OTHERS[name])):
        assert await peer.request(request(name, topic(name, "BTC"))) == accepted(name)


async def test_refuse_reset_and_hang_apply_to_sockets(
    sandbox: Sandbox, dial: Dial, name: str
) -> None:
    """`refuse` ends sockets, `reset` aborts handshakes, `hang` delays them until a reset."""
    peer = await dial(name)
    await sandbox.set(name, refuse=True)
    assert (await within_limit(peer.ws.receive())).type in {
        aiohttp.WSMsgType.CLOSE,
        aiohttp.WSMsgType.CLOSED,
    }
    with pytest.raises(aiohttp.ClientConnectorError):
        await dial(name)
    await sandbox.set(name, reset=True)
    with pytest.raises(aiohttp.ClientError):
        await dial(name)
    await sandbox.set(name, hang=True)
    asked = sandbox.count(name, PATHS[name])
    hanging = asyncio.create_task(dial(name))
    await eventually(lambda: sandbox.count(name, PATHS[name]) > asked)
    await sandbox.reset()
    await (await within_limit(hanging)).ping()
    assert sandbox.listeners[name].knobs.hang is False


async def test_control_replaces_the_knobs_of_sockets(sandbox: Sandbox, dial: Dial) -> None:
    """Errors name the valid knobs and change nothing. Calls are counted."""
    peer = await dial("kraken")
    await peer.request(request("kraken", "ticker BTC/USDT"))
    mistakes: list[dict[str, object]] = [
        {"push_ms": 0},
        {"push_ms": "x"},
        {"drop": "gently"},
        {"drop": True},
        {"freeze": "x"},
    ]
    async with aiohttp.ClientSession() as session:
        for data in mistakes:
            async with session.post(f"{sandbox.control_url}/kraken", json=data) as answer:
                assert answer.status == 400
                assert "push_ms, freeze, mute, drop" in await answer.text()
        async with session.get(sandbox.control_url) as answer:
            assert (await answer.json())["kraken"]["knobs"]["push_ms"] == 5
        async with session.post(
            f"{sandbox.control_url}/kraken", json={"freeze": True, "push_ms": 1}
        ) as answer:
            state = (await answer.json())["kraken"]
    assert (state["knobs"]["freeze"], state["knobs"]["push_ms"]) == (True, 1)
    assert state["calls"] == {"/v2": 1, "/v2 asked": 1}


async def test_closed_sockets_are_removed(sandbox: Sandbox, dial: Dial, name: str) -> None:
    """Stopping the sandbox ends the open sockets."""
    peers = [await dial(name) for _ in range(3)]
    assert len(sandbox.listeners[name].sockets) == 3
    await peers[0].ws.close()
    await eventually(lambda: len(sandbox.listeners[name].sockets) == 2)
    await sandbox.stop()
    assert sandbox.listeners[name].sockets == {}
    assert (await within_limit(peers[1].ws.receive())).type in {
        aiohttp.WSMsgType.CLOSE,
        aiohttp.WSMsgType.CLOSED,
    }
