"""The sandbox's sockets, seen by real clients of ccxt.pro and by plain ones."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager
from importlib import import_module
from typing import Any, TypeVar
from urllib.parse import urlsplit

import aiohttp
import ccxt
import orjson
import pytest

from src.sandbox.server import Sandbox
from tests.conftest import eventually
from tests.sandbox.test_sandbox import NAMES, NOON, Clock

SWAP = "BTC/USDT:USDT"
MARKETS = [*((name, "ETH/USDT") for name in NAMES), ("bybit", SWAP), ("binance", SWAP)]
PATHS = {"bybit": "/v5/public/spot", "binance": "/stream/ws/0", "kraken": "/v2"}
OTHERS = {"bybit": "/v5/public/other/spot", "binance": "/stream/ws/other", "kraken": "/v2/other"}
DEPTHS = {"bybit": 50, "binance": 100, "kraken": 25}
LATE = 10**8  # milliseconds, as good as never
FIGURES = ("last", "open", "high", "low", "baseVolume")
FORBIDDEN = {"bybit": 403, "binance": 451, "kraken": 403}
PING = {"bybit": {"op": "ping", "req_id": "7"}, "kraken": {"method": "ping", "req_id": 7}}
ACCEPTED: dict[str, dict[str, Any]] = {
    "bybit": {"success": True, "ret_msg": "subscribe", "conn_id": "0", "op": "subscribe", "req_id": "7"},
    "binance": {"result": None, "id": 7},
    "kraken": {
        "method": "subscribe",
        "result": {"channel": "ticker", "snapshot": True, "symbol": "BTC/USDT"},
        "success": True,
        "req_id": 7,
    },
}
MALFORMED: dict[str, dict[str, Any]] = {
    "bybit": {"success": False, "ret_msg": "error:invalid op", "conn_id": "0"},
    "binance": {"id": None, "error": {"code": 3, "msg": "Invalid json"}},
    "kraken": {"error": "Malformed request", "method": "", "success": False},
}
Connect = Callable[..., Awaitable[Any]]
Value = TypeVar("Value")


def topic(name: str, coin: str) -> str:
    """Name the topic of a coin's ticker."""
    return {"bybit": f"tickers.{coin}USDT", "binance": f"{coin.lower()}usdt@ticker"}.get(name, f"ticker {coin}/USDT")


def request(name: str, wanted: str, verb: str = "subscribe", **more: object) -> dict[str, Any]:
    """Word a request for a topic as the exchange asks for it; kraken's topics are written with their channel here."""
    if name == "bybit":
        return {"op": verb, "args": [wanted], "req_id": "7"}
    if name == "binance":
        return {"method": verb.upper(), "params": [wanted], "id": 7}
    channel, symbol = wanted.split()
    return {"method": verb, "params": {"channel": channel, "symbol": [symbol]} | more, "req_id": 7}


async def soon(awaited: Awaitable[Value]) -> Value:
    """Wait for something that is about to happen; the limit is for what never will."""
    return await asyncio.wait_for(awaited, 60)


def ticker(push: dict[str, Any]) -> dict[str, Any]:
    data = push.get("data", push)
    row: dict[str, Any] = data[0] if isinstance(data, list) else data
    return row


def price(push: dict[str, Any]) -> float:
    row = ticker(push)
    return float(next(row[key] for key in ("lastPrice", "last", "c") if key in row))


def mentioned(push: dict[str, Any]) -> str:
    """Return the market a ticker is of, in one spelling."""
    row = ticker(push)
    return str(row.get("symbol") or row["s"]).replace("/", "")


class Peer:
    """A plain socket; what is pushed while it waits for something else is kept."""

    def __init__(self, name: str, ws: aiohttp.ClientWebSocketResponse) -> None:
        self.name, self.ws = name, ws
        self.pushed: list[dict[str, Any]] = []

    async def read(self) -> dict[str, Any]:
        message: dict[str, Any] = orjson.loads((await soon(self.ws.receive())).data)
        return message

    async def push(self) -> dict[str, Any]:
        while not self.is_push(message := await self.read()):
            pass
        return message

    async def ask(self, message: object) -> dict[str, Any]:
        """Send a text, or something as JSON, and return the answer."""
        await self.ws.send_str(message if isinstance(message, str) else orjson.dumps(message).decode())
        while self.is_push(answer := await self.read()):
            self.pushed.append(answer)
        return {key: value for key, value in answer.items() if key not in {"time_in", "time_out"}}

    async def ping(self) -> None:
        """Send a ping of the protocol and wait for its answer."""
        await self.ws.ping()
        while (message := await soon(self.ws.receive())).type is not aiohttp.WSMsgType.PONG:
            self.pushed.append(orjson.loads(message.data))

    def is_push(self, message: dict[str, Any]) -> bool:
        return {"bybit": "topic", "binance": "s", "kraken": "data"}[self.name] in message and "method" not in message

    async def last(self) -> float:
        """Return the last price that the next ticker tells."""
        return price(await self.push())


Dial = Callable[..., Coroutine[Any, Any, Peer]]


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Nothing may fail behind the scenes: no handler, and no task that pushes."""
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
async def dial(sandbox: Sandbox) -> AsyncIterator[Dial]:
    """Open a plain socket at an exchange."""
    peers: list[Peer] = []
    async with aiohttp.ClientSession() as session:

        async def open_socket(name: str, path: str = "") -> Peer:
            url = sandbox.urls[name] + (path or PATHS[name])
            peer = Peer(name, await session.ws_connect(url, autoping=False, timeout=aiohttp.ClientWSTimeout(None, 1)))
            peers.append(peer)
            if name == "kraken":
                assert (await peer.read())["channel"] == "status"
            return peer

        yield open_socket
        release([peer.ws for peer in peers])


def release(sockets: list[aiohttp.ClientWebSocketResponse]) -> None:
    """Let go of connections: aiohttp does not by itself when the other side cut them, and warns of it later."""
    for ws in sockets:
        ws._response.close()


def moved(urls: Any, base: str) -> Any:
    """Put another host and port into every address; sockets stay sockets."""
    if isinstance(urls, dict):
        return {key: moved(value, base) for key, value in urls.items()}
    parts = urlsplit(urls.replace("{hostname}", "host"))
    return (base.replace("http", "ws") if parts.scheme == "wss" else base) + parts.path


@pytest.fixture
async def connect(sandbox: Sandbox) -> AsyncIterator[Connect]:
    clients: list[Any] = []

    async def make(name: str, tickers: str = "ticker") -> Any:
        options: dict[str, Any] = {"fetchMarkets": {"types": ["spot", "linear"]}, "fetchCurrencies": False}
        options |= {"watchTickers": {"name": tickers}} if name == "binance" else {}
        client = getattr(import_module(f"ccxt.pro.{name}"), name)(
            {"enableRateLimit": False, "options": {} if name == "kraken" else options}
        )
        client.has["fetchCurrencies"] = False
        client.timeout_on_exit, client.timeout = 0, 60_000
        base = sandbox.urls[name]
        client.urls["api"] = moved(client.urls["api"], base)
        if name == "binance":  # by this word ccxt tells spot from swaps, and it stood in the host
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
async def moving(clock: Clock) -> AsyncIterator[None]:
    """Let the clock run, many times faster than the real one, so that a push has one step of a book or several."""

    async def move() -> None:
        while True:
            clock.now += 0.07
            await asyncio.sleep(0.002)

    running = asyncio.create_task(move())
    yield
    running.cancel()


async def test_tickers_are_those_of_rest(clock: Clock, connect: Connect, name: str) -> None:
    """Each ticker of a subscription comes, is what REST says at that time, and follows when time passes."""
    client, symbols = await connect(name), ["BTC/USDT", "DOGE/USDT", "ETH/BTC"]
    await soon(client.watch_tickers(symbols))
    for _ in range(2):
        told = await client.fetch_tickers(symbols)
        expected = {symbol: [told[symbol][figure] for figure in FIGURES] for symbol in symbols}
        await eventually(lambda: {s: [t[f] for f in FIGURES] for s, t in client.tickers.items()} == expected)  # noqa: B023
        for symbol, ticker in client.tickers.items():
            assert ticker["percentage"] == pytest.approx(told[symbol]["percentage"], abs=0.01)
            sides = [told[symbol][side] for side in ("bid", "ask")]
            assert [ticker["bid"], ticker["ask"]] == ([None, None] if name == "bybit" else sides)
            assert ticker["timestamp"] == (None if name == "kraken" else int(clock.now * 1000))
        clock.now += 60


@pytest.mark.parametrize("name", ["bybit", "binance"])
async def test_tickers_of_swaps(connect: Connect, name: str) -> None:
    """A swap's ticker is what REST says; only bybit's has bid and ask."""
    client = await connect(name)
    pushed, told = (await soon(client.watch_tickers([SWAP])))[SWAP], await client.fetch_ticker(SWAP)
    assert [pushed[figure] for figure in FIGURES] == [told[figure] for figure in FIGURES]
    sides = [told["bid"], told["ask"]] if name == "bybit" else [None, None]
    assert [pushed["bid"], pushed["ask"]] == sides


async def test_small_tickers_have_no_sides(connect: Connect) -> None:
    """The small ticker of binance tells the day's prices and neither bid nor ask."""
    client = await connect("binance", "miniTicker")
    pushed, told = (await soon(client.watch_tickers(["BTC/USDT"])))["BTC/USDT"], await client.fetch_ticker("BTC/USDT")
    assert [pushed[figure] for figure in FIGURES] == [told[figure] for figure in FIGURES]
    assert [pushed["bid"], pushed["ask"]] == [None, None]


@pytest.mark.parametrize(("name", "symbol"), MARKETS)
async def test_best_bid_and_ask(clock: Clock, connect: Connect, name: str, symbol: str) -> None:
    """The best bid and ask are those of REST's book at that time."""
    clock.now = NOON - 0.05  # when a book changes, so that it is the book of now
    client = await connect(name)
    best, book = (await soon(client.watch_bids_asks([symbol])))[symbol], await client.fetch_order_book(symbol, 5)
    top = [book["bids"][0], book["asks"][0]]
    assert [best["bid"], best["ask"]] == [level[0] for level in top]
    assert [best["bidVolume"], best["askVolume"]] == pytest.approx([level[1] for level in top], abs=1e-8)


@pytest.mark.parametrize(("name", "symbol"), MARKETS)
async def test_books_are_those_of_rest(clock: Clock, connect: Connect, name: str, symbol: str) -> None:
    """A book made of pushes is never crossed while time runs, and then is REST's, even after a pause."""
    client, depth = await connect(name), DEPTHS[name]
    async with moving(clock):
        for _ in range(40):
            book = await soon(client.watch_order_book(symbol, depth))
            bids, asks = [[level[0] for level in book[side]] for side in ("bids", "asks")]
            assert bids == sorted(set(bids), reverse=True)
            assert asks == sorted(set(asks))
            assert bids[0] < asks[0]
    for pause in (0.0, 0.3, 60.0):
        clock.now += pause
        step = int(clock.now * 10) * 100
        await eventually(lambda: client.orderbooks[symbol]["timestamp"] == step)  # noqa: B023
        told, book = await client.fetch_order_book(symbol, depth), client.orderbooks[symbol].limit()
        for side in ("bids", "asks"):
            assert len(book[side]) == depth
            assert [level[:2] for level in book[side]] == [level[:2] for level in told[side]]
        if name == "binance":
            assert book["nonce"] == told["nonce"] == step


@pytest.mark.parametrize(("name", "symbol"), MARKETS)
async def test_trades_are_those_of_rest(clock: Clock, connect: Connect, name: str, symbol: str) -> None:
    """Each trade comes once and in order, none is lost, also when many come at once, and all are as REST says."""
    client = await connect(name)
    async with moving(clock):
        for _ in range(3):
            await soon(client.watch_trades(symbol))
    clock.now += 20
    await eventually(lambda: client.trades[symbol][-1]["timestamp"] == int(clock.now * 2) * 500)
    pushed = list(client.trades[symbol])
    assert len(pushed) >= 43
    numbers = [int(trade["id"]) for trade in pushed]
    assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
    told = await client.fetch_trades(symbol, None, len(pushed))
    for figure in ("id", "timestamp", "side", "price", "amount"):
        assert [trade[figure] for trade in pushed] == [trade[figure] for trade in told]


async def test_one_market_under_rest_and_sockets(sandbox: Sandbox, dial: Dial, clock: Clock, name: str) -> None:
    """The same time gives the same price again, to every socket; the price knob multiplies it."""
    first, second = await dial(name), await dial(name, OTHERS[name])
    for peer in (first, second):
        await peer.ask(request(name, topic(name, "BTC")))
    before = await first.last()
    assert await second.last() == before
    clock.now += 60
    await first.ask(request(name, topic(name, "ETH"), "unsubscribe"))
    assert await first.last() != before
    clock.now -= 60
    await first.ping()
    assert await first.last() == before
    await sandbox.set(name, push_ms=5, price=1.05)
    await first.ping()
    assert await first.last() == pytest.approx(before * 1.05, rel=1e-5)
    await sandbox.reset()
    await first.ping()
    assert await first.last() == before


async def test_answers_to_subscriptions(dial: Dial, name: str) -> None:
    """Subscribing and its contrary are confirmed in the exchange's words, and then hold, for one topic alone."""
    peer, bitcoin, ether = await dial(name), topic(name, "BTC"), topic(name, "ETH")
    assert await peer.ask(request(name, bitcoin)) == ACCEPTED[name]
    await peer.ask(request(name, ether))
    both = [await peer.push() for _ in range(8)]
    assert len({mentioned(push) for push in both}) == 2
    answer, method = await peer.ask(request(name, bitcoin, "unsubscribe")), "unsubscribe"
    changed = {"bybit": {"op": method, "ret_msg": method}, "kraken": {"method": method}}.get(name, {})
    assert answer == ACCEPTED[name] | changed
    assert {mentioned(await peer.push()) for _ in range(8)} == {"ETHUSDT"}


@pytest.mark.parametrize(
    ("name", "wanted", "error"),
    [
        ("bybit", "tickers.NOPE", {"ret_msg": "error:handler not found,topic:tickers.NOPE"}),
        ("bybit", "nope.BTCUSDT", {"ret_msg": "error:handler not found,topic:nope.BTCUSDT"}),
        ("bybit", "orderbook.3.BTCUSDT", {"ret_msg": "error:handler not found,topic:orderbook.3.BTCUSDT"}),
        ("bybit", "orderbook.BTCUSDT", {"ret_msg": "error:handler not found,topic:orderbook.BTCUSDT"}),
        ("binance", "nope@ticker", {"error": {"code": 2, "msg": "Invalid request: unknown stream"}}),
        ("binance", "btcusdt@nope", {"error": {"code": 2, "msg": "Invalid request: unknown stream"}}),
        ("kraken", "ticker NO/PE", {"error": "Currency pair not supported NO/PE", "symbol": "NO/PE"}),
        ("kraken", "nope BTC/USDT", {"error": "Subscription name invalid", "symbol": "BTC/USDT"}),
    ],
)
async def test_wrong_topics(dial: Dial, name: str, wanted: str, error: dict[str, Any]) -> None:
    """What does not exist is refused in the exchange's words, and nothing is pushed of it."""
    peer, refused = await dial(name), {"bybit": {"success": False}, "kraken": {"success": False}}.get(name, {})
    asked = request(name, wanted)
    answer = await peer.ask(asked)
    assert answer.items() >= (error | refused).items()
    assert {answer.get(key) for key in ("id", "req_id")} == {None, asked.get("id", asked.get("req_id"))}
    await peer.ask(request(name, topic(name, "ETH")))
    assert {mentioned(await peer.push()) for _ in range(4)} == {"ETHUSDT"}


@pytest.mark.parametrize("depth", [3, 0, "10", None])
async def test_wrong_depths_at_kraken(dial: Dial, depth: object) -> None:
    """A depth that kraken does not have is refused, and pushes of other topics go on."""
    peer = await dial("kraken")
    answer = await peer.ask(request("kraken", "book BTC/USDT", depth=depth))
    assert answer["error"] == "Subscription depth not supported"
    await peer.ask(request("kraken", "ticker ETH/USDT"))
    assert mentioned(await peer.push()) == "ETHUSDT"


async def test_pings(dial: Dial, name: str) -> None:
    """Pings are answered, those of the protocol by all, those in words by bybit and kraken."""
    peer = await dial(name)
    await peer.ping()
    if name == "bybit":
        pong = {"success": True, "ret_msg": "pong", "conn_id": "0", "op": "ping", "req_id": "7"}
        assert await peer.ask(PING[name]) == pong
    if name == "kraken":
        assert await peer.ask(PING[name]) == {"method": "pong", "req_id": 7}


async def test_junk_is_refused(dial: Dial, name: str) -> None:
    """What makes no sense is called malformed in the exchange's words and changes nothing; bytes are not answered."""
    peer, wanted = await dial(name), topic(name, "BTC")
    await peer.ask(request(name, wanted))
    for junk in ("hello", "", "[]", "7", "null", "{}", '{"op":"subscribe"}', '{"method":"subscribe","params":7}'):
        assert await peer.ask(junk) == MALFORMED[name]
    assert await peer.ask(request(name, wanted, "dance")) == MALFORMED[name]
    await peer.ws.send_bytes(b"{}")
    assert await peer.ask(request(name, wanted)) == ACCEPTED[name]
    assert mentioned(await peer.push()) == "BTCUSDT"


@pytest.mark.parametrize(("name", "wanted"), [("bybit", "orderbook.50.BTCUSDT"), ("kraken", "book BTC/USDT")])
async def test_subscribing_again_begins_anew(
    sandbox: Sandbox, dial: Dial, clock: Clock, name: str, wanted: str
) -> None:
    """Who subscribes to a book again gets all of it first, even when no push was between."""
    peer = await dial(name)
    await peer.ask(request(name, wanted))
    assert (await peer.push())["type"] == "snapshot"
    await sandbox.set(name, push_ms=LATE)
    await peer.ping()
    clock.now += 1
    for verb in ("unsubscribe", "subscribe"):
        await peer.ask(request(name, wanted, verb))
    await sandbox.set(name, push_ms=5)
    assert (await peer.push())["type"] == "snapshot"


async def test_counts(sandbox: Sandbox, dial: Dial, name: str) -> None:
    """Sockets are counted by path as other calls are, and what they ask on top."""
    path = PATHS[name]
    peer = await dial(name)
    assert sandbox.calls[name] == {path: 1}
    await peer.ask(request(name, topic(name, "BTC")))
    await peer.ask("junk")
    await dial(name, OTHERS[name])
    assert sandbox.calls[name] == {path: 1, f"{path} asked": 2, OTHERS[name]: 1}
    assert sandbox.count(name, "asked") == 2


async def beside(dial: Dial, name: str) -> tuple[Peer, Peer]:
    """Open two sockets that are pushed a ticker, the second on another path."""
    peers = [await dial(name), await dial(name, OTHERS[name])]
    for peer in peers:
        await peer.ask(request(name, topic(name, "BTC")))
        await peer.push()
    return peers[0], peers[1]


async def settled(peer: Peer) -> None:
    """Take in what was under way."""
    for _ in range(3):
        await peer.ping()


@pytest.mark.parametrize("knobs", [{"freeze": True}, {"latency_ms": LATE}, {"push_ms": LATE}])
async def test_pushes_can_be_held_back(sandbox: Sandbox, dial: Dial, name: str, knobs: dict[str, Any]) -> None:
    """A socket that is frozen, late or slow answers and pushes nothing, until a reset; one on another path goes on."""
    other, spoiled = await beside(dial, name)
    await sandbox.set(name, only="other", **({"push_ms": 5} | knobs))
    await settled(spoiled)
    spoiled.pushed.clear()
    await settled(other)
    for _ in range(2):
        await other.push()
    assert await spoiled.ask(request(name, topic(name, "BTC"))) == ACCEPTED[name]
    await spoiled.ping()
    assert spoiled.pushed == []
    await sandbox.reset()
    await spoiled.push()


async def test_late_pushes(sandbox: Sandbox, dial: Dial, clock: Clock, name: str) -> None:
    """What comes late says what was when it was due."""
    peer = await dial(name)
    await peer.ask(request(name, topic(name, "BTC")))
    first, prices = await peer.last(), list[float]()
    clock.now += 60
    await sandbox.set(name, push_ms=5, latency_ms=LATE)
    await settled(peer)
    assert {price(push) for push in peer.pushed} <= {first}
    clock.now += 60
    await sandbox.set(name, push_ms=5)
    while len(set(prices) - {first}) < 2:
        prices.append(await peer.last())
    assert len([value for value in prices if value != first]) == 2


async def test_garbage(sandbox: Sandbox, dial: Dial, name: str) -> None:
    """Texts can be pushed in place of data; handshakes and answers stay as they are."""
    await sandbox.set(name, push_ms=5, body="<html>")
    peer = await dial(name)
    assert await peer.ask(request(name, topic(name, "BTC"))) == ACCEPTED[name]
    assert [(await soon(peer.ws.receive())).data for _ in range(3)] == ["<html>"] * 3
    await sandbox.reset()
    while (text := (await soon(peer.ws.receive())).data) == "<html>":
        pass
    assert peer.is_push(orjson.loads(text))


@pytest.mark.parametrize(("how", "code"), [("cut", 1006), ("close", 1000)])
async def test_drop(sandbox: Sandbox, dial: Dial, name: str, how: str, code: int) -> None:
    """Open sockets are cut or closed in order, those on other paths stay, and new ones are served."""
    other, dropped = await beside(dial, name)

    async def drain() -> None:
        async for _ in dropped.ws:
            pass

    reading = asyncio.create_task(drain())
    await sandbox.set(name, push_ms=5, only="other", drop=how)
    await soon(reading)
    assert dropped.ws.close_code == code
    await other.ping()
    await other.push()
    again = await dial(name, OTHERS[name])
    await again.ask(request(name, topic(name, "BTC")))
    await again.push()


@pytest.mark.parametrize("knobs", [{"drop": "cut"}, {"drop": "close"}, {"refuse": True}])
async def test_ccxt_notices_and_comes_back(
    sandbox: Sandbox, connect: Connect, name: str, knobs: dict[str, Any]
) -> None:
    """A client that waits for a push is told that its socket ended, and can watch again after a reset."""
    client = await connect(name)
    await soon(client.watch_ticker("BTC/USDT"))
    await sandbox.set(name, freeze=True)
    await client.fetch_time()  # meanwhile what was under way has come
    waiting = asyncio.create_task(client.watch_ticker("BTC/USDT"))
    await client.fetch_time()
    sockets = [own.connection for own in client.clients.values()]
    await sandbox.set(name, freeze=True, **knobs)
    with pytest.raises(ccxt.NetworkError):
        await soon(waiting)
    release(sockets)
    await sandbox.reset()
    assert (await soon(client.watch_ticker("BTC/USDT")))["last"] == (await client.fetch_ticker("BTC/USDT"))["last"]


@pytest.mark.parametrize(
    ("knobs", "status"),
    [
        ({"status": 503}, 503),
        ({"status": 429, "body": "slow down"}, 429),
        ({"geo_block": True}, 0),
        ({"size": 99}, 200),
    ],
)
async def test_handshakes_refused(sandbox: Sandbox, dial: Dial, name: str, knobs: dict[str, Any], status: int) -> None:
    """Handshakes are answered with the status of the knobs, on their paths and so many times; open sockets go on."""
    open_before = await dial(name, OTHERS[name])
    await sandbox.set(name, push_ms=5, only="other", times=2, **knobs)
    await dial(name)
    for _ in range(2):
        with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
            await dial(name, OTHERS[name])
        assert refused.value.status == (status or FORBIDDEN[name])
    for peer in (open_before, await dial(name, OTHERS[name])):
        assert await peer.ask(request(name, topic(name, "BTC"))) == ACCEPTED[name]


async def test_refuse_hang_and_reset(sandbox: Sandbox, dial: Dial, name: str) -> None:
    """A closed port ends sockets and takes no new ones, reset aborts a handshake, and what hangs goes on later."""
    peer = await dial(name)
    await sandbox.set(name, refuse=True)
    assert (await soon(peer.ws.receive())).type in {aiohttp.WSMsgType.CLOSE, aiohttp.WSMsgType.CLOSED}
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
    await (await soon(hanging)).ping()
    assert sandbox.listeners[name].knobs.hang is False


async def test_control(sandbox: Sandbox, dial: Dial) -> None:
    """The knobs of sockets are turned over HTTP, mistakes are explained and change nothing, counts are shown."""
    peer = await dial("kraken")
    await peer.ask(request("kraken", "ticker BTC/USDT"))
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
        async with session.post(f"{sandbox.control_url}/kraken", json={"freeze": True, "push_ms": 1}) as answer:
            told = (await answer.json())["kraken"]
    assert (told["knobs"]["freeze"], told["knobs"]["push_ms"]) == (True, 1)
    assert told["calls"] == {"/v2": 1, "/v2 asked": 1}


async def test_sockets_that_left_are_forgotten(sandbox: Sandbox, dial: Dial, name: str) -> None:
    """Nothing is kept of a socket that its client closed, and stopping ends those that are open."""
    peers = [await dial(name) for _ in range(3)]
    assert len(sandbox.listeners[name].sockets) == 3
    await peers[0].ws.close()
    await eventually(lambda: len(sandbox.listeners[name].sockets) == 2)
    await sandbox.stop()
    assert sandbox.listeners[name].sockets == {}
    assert (await soon(peers[1].ws.receive())).type in {aiohttp.WSMsgType.CLOSE, aiohttp.WSMsgType.CLOSED}
