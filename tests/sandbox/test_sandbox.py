"""The REST interface of the sandbox, with ccxt clients and a plain HTTP client."""

import asyncio
import json
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from dataclasses import dataclass
from itertools import pairwise
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import ccxt.async_support as ccxt
import pytest

from src.sandbox.server import Sandbox

NAMES = ["bybit", "binance", "kraken"]
NOON = 1_767_268_830.25
TIME = {"bybit": "/v5/market/time", "binance": "/api/v3/time", "kraken": "/0/public/Time"}
TICKER = {
    "bybit": "/v5/market/tickers?category=spot&symbol=BTCUSDT",
    "binance": "/api/v3/ticker/24hr?symbol=BTCUSDT",
    "kraken": "/0/public/Ticker?pair=XBTUSDT",
}
Connect = Callable[[str], Awaitable[Any]]
Get = Callable[..., Coroutine[Any, Any, tuple[int, str, dict[str, str]]]]


@dataclass
class Clock:
    """A clock that tests set."""

    now: float = NOON
    step: float = 0.0
    """Seconds that pass with each call."""

    def __call__(self) -> float:
        self.now += self.step
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def sandbox(clock: Clock) -> AsyncIterator[Sandbox]:
    box = Sandbox(now=clock, filler=500)
    await box.start()
    yield box
    await box.stop()


@pytest.fixture
async def get(sandbox: Sandbox) -> AsyncIterator[Get]:
    """Request a path of an exchange or of the control server. With data, send a POST."""
    async with aiohttp.ClientSession() as session:

        async def send(
            name: str, path: str = "", data: object = None
        ) -> tuple[int, str, dict[str, str]]:
            url = sandbox.control_url if name == "control" else sandbox.urls[name]
            method = "GET" if data is None else "POST"
            async with session.request(
                method, url + path, json=data, allow_redirects=False
            ) as answer:
                return answer.status, await answer.text(), dict(answer.headers)

        yield send


def with_base(urls: Any, base: str) -> Any:
    """Replace scheme, host and port of all addresses."""
    if isinstance(urls, dict):
        return {key: with_base(value, base) for key, value in urls.items()}
    return base + urlsplit(urls.replace("{hostname}", "host")).path


@pytest.fixture
async def connect(sandbox: Sandbox) -> AsyncIterator[Connect]:
    clients: list[Any] = []

    async def make(name: str) -> Any:
        options = {} if name == "kraken" else {"fetchMarkets": {"types": ["spot", "linear"]}}
        client = getattr(ccxt, name)({"enableRateLimit": False, "options": options})
        client.has["fetchCurrencies"] = False
        client.timeout_on_exit, client.timeout = 0, 30_000
        client.urls["api"] = with_base(client.urls["api"], sandbox.urls[name])
        clients.append(client)
        await client.load_markets()
        return client

    yield make
    await asyncio.gather(*(client.close() for client in clients))


@pytest.fixture(params=NAMES)
async def client(request: pytest.FixtureRequest, connect: Connect) -> Any:
    return await connect(request.param)


async def test_each_exchange_lists_its_own_markets(connect: Connect) -> None:
    """Markets have a precision. Each exchange lists a symbol that the others do not list."""
    clients = {name: await connect(name) for name in NAMES}
    bybit, binance, kraken = (set(client.markets) for client in clients.values())
    assert 555 <= len(bybit | binance | kraken) <= 580
    assert "MNT/USDT" in bybit - binance - kraken
    assert "BNB/BTC" in binance - bybit - kraken
    assert "XMR/EUR" in kraken - bybit - binance
    assert "BTC/USDT:USDT" in (bybit & binance) - kraken
    for market in (client.markets["BTC/USDT"] for client in clients.values()):
        assert market["active"]
        assert 0 < market["precision"]["price"] <= 1
        assert 0 < market["precision"]["amount"] <= 0.001


async def test_ticker_figures_are_consistent(client: Any) -> None:
    """The last price is between bid and ask, and in the range of the day."""
    symbols = ["BTC/USDT", "DOGE/USDT", "ETH/BTC", "EUR/USDT", "USDC/USDT"]
    tickers = await client.fetch_tickers(symbols)
    assert set(tickers) == set(symbols)
    assert tickers["BTC/USDT"]["last"] == (await client.fetch_ticker("BTC/USDT"))["last"]
    all_tickers = await client.fetch_tickers(None, {"type": "spot"} if client.id == "bybit" else {})
    assert set(all_tickers) == {
        symbol for symbol, market in client.markets.items() if market["spot"]
    }
    assert len(all_tickers) > 500
    for ticker in all_tickers.values():
        assert ticker["bid"] < ticker["last"] < ticker["ask"] < ticker["bid"] * 1.02
        assert ticker["high"] >= max(ticker["last"], ticker["open"])
        assert ticker["low"] <= min(ticker["last"], ticker["open"])
        assert ticker["quoteVolume"] == pytest.approx(
            ticker["baseVolume"] * ticker["last"], rel=0.2
        )


async def test_order_book_is_sorted_and_has_the_requested_depth(client: Any, clock: Clock) -> None:
    """The best levels of the book are the bid and ask of the ticker."""
    clock.now = NOON // 1  # a full second: books change ten times per second
    book = await client.fetch_order_book("BTC/USDT", 20)
    bids, asks = [[level[0] for level in book[side]] for side in ("bids", "asks")]
    assert len(bids) == len(asks) == 20
    assert bids == sorted(set(bids), reverse=True)
    assert asks == sorted(set(asks))
    ticker = await client.fetch_ticker("BTC/USDT")
    assert (bids[0], asks[0]) == (ticker["bid"], ticker["ask"])
    assert all(level[1] > 0 for side in ("bids", "asks") for level in book[side])


@pytest.mark.parametrize("frame", ["1m", "1h", "1d", "1w"])
async def test_candles_are_gapless_and_end_at_the_ticker(client: Any, frame: str) -> None:
    """Each candle opens at the close of the previous one. The last closes at the ticker's price."""
    candles = await client.fetch_ohlcv("ETH/USDT", frame)
    starts, step = [candle[0] for candle in candles], client.parse_timeframe(frame) * 1000
    assert starts == list(range(starts[0], starts[-1] + 1, step))
    assert len(candles) >= 200
    assert NOON * 1000 - step < starts[-1] <= NOON * 1000
    assert all(
        low <= min(start, end) <= max(start, end) <= high for _, start, high, low, end, _ in candles
    )
    assert all(candle[5] > 0 for candle in candles)
    assert candles[-1][4] == (await client.fetch_ticker("ETH/USDT"))["last"]
    assert all(earlier[4] == later[1] for earlier, later in pairwise(candles))


async def test_candles_since_a_time_start_there(client: Any) -> None:
    """The limit counts from the start. The exchange's time is that of the sandbox's clock."""
    assert abs(await client.fetch_time() - NOON * 1000) < 1_000
    since = int(NOON // 3600 - 100) * 3_600_000
    candles = await client.fetch_ohlcv("BTC/USDT", "1h", since, 10)
    assert [candle[0] for candle in candles] == [since + hour * 3_600_000 for hour in range(10)]


async def test_trades_ascend_until_now(client: Any) -> None:
    """The prices of recent trades are close to the ticker's price."""
    trades = await client.fetch_trades("BTC/USDT", None, 30)
    times = [trade["timestamp"] for trade in trades]
    assert len(trades) == 30
    assert times == sorted(times)
    assert NOON - 1 <= times[-1] / 1000 <= NOON
    assert {trade["side"] for trade in trades} == {"buy", "sell"}
    last = (await client.fetch_ticker("BTC/USDT"))["last"]
    assert all(
        trade["price"] == pytest.approx(last, rel=0.01) and trade["amount"] > 0 for trade in trades
    )


@pytest.mark.parametrize(
    ("name", "symbol", "limit"),
    [
        ("bybit", "ETH/USDT", 60),
        ("bybit", "ETH/USDT:USDT", 600),
        ("binance", "ETH/USDT", 600),
        ("binance", "ETH/USDT:USDT", 600),
        ("kraken", "ETH/USDT", 600),
    ],
)
@pytest.mark.parametrize("frame", ["1m", "5m"])
async def test_candles_equal_the_trades(
    connect: Connect, clock: Clock, name: str, symbol: str, limit: int, frame: str
) -> None:
    """The trades of a candle have exactly its prices and its volume."""
    client = await connect(name)
    clock.now = NOON // 300 * 300 + min(limit / 2, client.parse_timeframe(frame)) - 1
    candle = (await client.fetch_ohlcv(symbol, frame))[-1]
    trades = await client.fetch_trades(symbol, None, limit)
    trades = [trade for trade in trades if trade["timestamp"] >= candle[0]]
    prices = [trade["price"] for trade in trades]
    assert candle[1:5] == [prices[0], max(prices), min(prices), prices[-1]]
    assert candle[5] == pytest.approx(sum(trade["amount"] for trade in trades), rel=1e-12)


@pytest.mark.parametrize("name", ["bybit", "binance"])
async def test_perpetual_swaps_have_all_kinds_of_data(connect: Connect, name: str) -> None:
    """Linear perpetuals are separate markets with a ticker, candles, a book and trades."""
    client = await connect(name)
    ticker = await client.fetch_ticker("BTC/USDT:USDT")
    assert ticker["symbol"] == "BTC/USDT:USDT"
    assert (await client.fetch_ohlcv("BTC/USDT:USDT", "1m"))[-1][4] == ticker["last"]
    assert len((await client.fetch_order_book("BTC/USDT:USDT", 5))["asks"]) == 5
    assert len(await client.fetch_trades("BTC/USDT:USDT", None, 5)) == 5
    assert "ETH/USDT:USDT" in await client.fetch_tickers(["ETH/USDT:USDT"])


async def test_prices_depend_only_on_the_time(sandbox: Sandbox, clock: Clock, get: Get) -> None:
    """The prices of the exchanges differ by less than ten basis points."""
    first, again = [[(await get(name, TICKER[name]))[1] for name in NAMES] for _ in range(2)]
    clock.now += 60
    later = [(await get(name, TICKER[name]))[1] for name in NAMES]
    assert first == again
    assert all(before != after for before, after in zip(first, later, strict=True))
    last = [
        float(price)
        for text in first
        for price in re.findall(r'(?:"lastPrice":"|"c":\[")([\d.]+)', text)
    ]
    assert len(set(last)) == 3
    assert max(last) / min(last) < 1.001


@pytest.mark.parametrize(
    ("name", "path", "status", "text"),
    [
        ("bybit", "/v5/market/tickers?category=spot&symbol=NOPE", 200, '"retCode":10001'),
        ("binance", "/api/v3/ticker/24hr?symbol=NOPE", 400, '"code":-1121'),
        ("binance", "/api/v3/klines?symbol=BTCUSDT&interval=7x", 400, '"code":-1120'),
        ("binance", "/api/v3/depth?symbol=BTCUSDT&limit=x", 400, "'limit'"),
        ("bybit", "/v5/market/recent-trade?category=spot&symbol=BTCUSDT&limit=x", 200, "10001"),
        ("kraken", "/0/public/Trades?pair=XBTUSDT&since=x", 200, "EGeneral:Invalid arguments"),
        ("kraken", "/0/public/Depth?pair=NOPE", 200, "EQuery:Unknown asset pair"),
        ("kraken", "/0/public/Ticker?pair=XBTUSD", 200, '"result":{"XXBTZUSD":{'),
        ("bybit", "/v5/nowhere", 404, "404 page not found"),
        ("binance", "/api/v3/nowhere", 404, "404 Not found"),
        ("kraken", "/0/public/Nowhere", 404, "EGeneral:Unknown method"),
    ],
)
async def test_errors_have_the_format_of_the_exchange(
    get: Get, name: str, path: str, status: int, text: str
) -> None:
    """Unknown symbols and paths are errors. kraken answers short market names with long ones."""
    answer = await get(name, path)
    assert answer[0] == status
    assert text in answer[1]


@pytest.mark.parametrize(
    ("knobs", "error"),
    [
        ({"status": 503}, ccxt.ExchangeNotAvailable),
        ({"status": 500, "body": "<html>"}, ccxt.ExchangeNotAvailable),
        ({"hang": True}, ccxt.RequestTimeout),
        ({"drip": True}, ccxt.RequestTimeout),
        ({"latency_ms": 5_000}, ccxt.RequestTimeout),
        ({"refuse": True}, ccxt.ExchangeNotAvailable),
        ({"reset": True}, ccxt.ExchangeNotAvailable),
        ({"geo_block": True}, ccxt.BaseError),
        ({"status": 429}, (ccxt.RateLimitExceeded, ccxt.DDoSProtection)),
    ],
)
async def test_knobs_raise_the_errors_of_real_failures(
    sandbox: Sandbox, client: Any, knobs: dict[str, Any], error: Any
) -> None:
    """ccxt raises the error of the simulated failure until a reset."""
    client.timeout = 1_000
    await sandbox.set(client.id, **knobs)
    with pytest.raises(error):
        await client.fetch_ticker("BTC/USDT")
    await sandbox.reset()
    client.timeout = 30_000
    assert (await client.fetch_ticker("BTC/USDT"))["last"] > 0


FAILURES = {
    "bybit": {
        "rate_limit": (200, '"retCode":10006'),
        "banned": (403, "access too frequent"),
        "firewall": (403, "CloudFront"),
        "busy": (200, '"retCode":10016'),
        "unavailable": (200, '"retCode":10016'),
        "timeout": (200, '"retCode":10000'),
        "no_symbol": (200, '"retCode":10001'),
    },
    "binance": {
        "rate_limit": (429, '"code":-1003'),
        "banned": (418, f"IP banned until {int((NOON + 600) * 1000)}."),
        "firewall": (403, "CloudFront"),
        "busy": (503, '"code":-1008'),
        "unavailable": (503, "Unavailable"),
        "timeout": (408, '"code":-1007'),
        "no_symbol": (400, '"code":-1121'),
    },
    "kraken": {
        "rate_limit": (200, "EAPI:Rate limit exceeded"),
        "pair_limit": (200, "EGeneral:Too many requests"),
        "throttled": (200, f"EService: Throttled: {int(NOON + 60)}"),
        "banned": (200, "EGeneral:Temporary lockout"),
        "firewall": (520, "Cloudflare"),
        "busy": (200, "EService:Busy"),
        "unavailable": (200, "EService:Unavailable"),
        "timeout": (200, "EService:Timeout"),
        "no_symbol": (200, "EQuery:Unknown asset pair"),
    },
}
BOOK = {
    "bybit": "/v5/market/orderbook?category=spot&symbol=",
    "binance": "/api/v3/depth?symbol=",
    "kraken": "/0/public/Depth?pair=",
}
ID = {"bybit": "ETHUSDT", "binance": "ETHUSDT", "kraken": "ETHUSDT"}


@pytest.mark.parametrize(
    ("name", "failure"), [(name, failure) for name in NAMES for failure in FAILURES[name]]
)
async def test_failures_have_the_format_of_the_exchange(
    sandbox: Sandbox, get: Get, name: str, failure: str
) -> None:
    """`error` answers in the exchange's own format, with `pair` only for one market."""
    await sandbox.set(name, error=failure, pair=ID[name])
    status, text, headers = await get(name, BOOK[name] + ID[name])
    assert status == FAILURES[name][failure][0]
    assert FAILURES[name][failure][1] in text
    assert "Retry-After" not in headers
    assert (await get(name, TICKER[name]))[0] == 200
    await sandbox.set(name, error=failure)
    assert (await get(name, TICKER[name]))[:2] == (status, text)


async def test_times_counts_only_requests_of_the_pair(sandbox: Sandbox, get: Get) -> None:
    """Requests of other markets do not end the knobs."""
    await sandbox.set("binance", error="busy", pair="ETHUSDT", times=1)
    paths = [TICKER["binance"], BOOK["binance"] + "ETHUSDT", BOOK["binance"] + "ETHUSDT"]
    assert [(await get("binance", path))[0] for path in paths] == [200, 503, 200]


@pytest.mark.parametrize("name", NAMES)
async def test_markets_are_listed_delisted_and_have_a_status(
    sandbox: Sandbox, connect: Connect, get: Get, name: str
) -> None:
    """`statuses` makes markets inactive for ccxt. A delisted market is unknown."""
    before = set((await connect(name)).markets)
    added = {"NEW/USDT"} if name == "kraken" else {"NEW/USDT", "NEW/USDT:USDT"}
    status = {"bybit": "Closed", "binance": "BREAK", "kraken": "cancel_only"}[name]
    await sandbox.set(name, listed=sorted(added), delisted=[ID[name]], statuses={"NEWUSDT": status})
    client = await connect(name)
    assert set(client.markets) - before == added
    assert before - set(client.markets) >= {"ETH/USDT"}
    assert {symbol for symbol in client.markets if not client.markets[symbol]["active"]} >= added
    assert (await client.fetch_ticker("NEW/USDT"))["last"] > 0
    assert FAILURES[name]["no_symbol"][1] in (await get(name, BOOK[name] + ID[name]))[1]
    await sandbox.reset()
    assert set((await connect(name)).markets) == before


async def test_swaps_that_are_not_traded_are_refused(sandbox: Sandbox, get: Get) -> None:
    """binance answers -1122 for a swap with another status, and lists its old ticker."""
    await sandbox.set("binance", statuses={"ETHUSDT": "SETTLING"})
    status, text, _ = await get("binance", "/fapi/v1/klines?symbol=ETHUSDT&interval=1m")
    assert (status, '"code":-1122' in text) == (400, True)
    assert (await get("binance", "/fapi/v1/ticker/24hr?symbol=ETHUSDT"))[0] == 200


async def test_kraken_names_unknown_pairs_beside_the_known_ones(sandbox: Sandbox, get: Get) -> None:
    """A batch with a delisted pair has an error and all other pairs."""
    for knobs in ({"delisted": ["ETHUSDT"]}, {"error": "no_symbol", "pair": "ETHUSDT"}):
        await sandbox.set("kraken", **knobs)
        _, text, _ = await get("kraken", "/0/public/Ticker?pair=XBTUSDT,ETHUSDT,SOLUSDT")
        answer = json.loads(text)
        assert answer["error"] == ["EQuery:Unknown asset pair"]
        assert list(answer["result"]) == ["XBTUSDT", "SOLUSDT"]


async def test_halted_markets_have_no_orders(sandbox: Sandbox, client: Any, clock: Clock) -> None:
    """A halted market has an old last price that does not change, and no candles."""
    await sandbox.set(client.id, halted=[ID[client.id]])
    first = await client.fetch_ticker("ETH/USDT")
    clock.now += 60
    ticker = await client.fetch_ticker("ETH/USDT")
    assert ticker["last"] == first["last"] > 0
    assert not ticker["bid"]
    assert not ticker["ask"]
    assert ticker["baseVolume"] == 0
    if client.id == "binance":
        assert ticker["timestamp"] == int((NOON - 3 * 86_400) * 1000)
    assert await client.fetch_ohlcv("ETH/USDT", "1m") == []
    book = await client.fetch_order_book("ETH/USDT")
    assert [book["bids"], book["asks"]] == [[], []]
    trades = await client.fetch_trades("ETH/USDT", None, 5)
    assert trades[-1]["timestamp"] / 1000 == pytest.approx(NOON - 3 * 86_400, abs=1)


async def test_books_of_still_markets_move_without_trades(
    sandbox: Sandbox, client: Any, clock: Clock
) -> None:
    """Bid and ask follow `price`. Last price and trades do not change, volume does not grow."""
    before = await client.fetch_ticker("ETH/USDT")
    await sandbox.set(client.id, still=[ID[client.id]], price=1.02)
    clock.now += 60
    after = await client.fetch_ticker("ETH/USDT")
    assert after["last"] == before["last"]
    assert after["baseVolume"] <= before["baseVolume"]
    assert after["bid"] == pytest.approx(before["bid"] * 1.02, rel=0.001)
    trades = await client.fetch_trades("ETH/USDT", None, 5)
    assert trades[-1]["timestamp"] / 1000 == pytest.approx(NOON, abs=1)
    candle = (await client.fetch_ohlcv("ETH/USDT", "1m"))[-1]
    assert candle[1:] == [*[before["last"]] * 4, 0]


async def test_odd_data_is_sent_for_one_market(sandbox: Sandbox, client: Any) -> None:
    """Each word of `odd` changes the data of the pair, and of no other market."""
    name = client.id
    expected: dict[str, Callable[[list[Any], list[Any]], bool]] = {
        "locked_book": lambda bids, asks: bids[0][0] == asks[0][0],
        "crossed_book": lambda bids, asks: bids[0][0] > asks[0][0],
        "empty_book": lambda bids, asks: not bids and not asks,
        "one_sided_book": lambda bids, asks: bool(bids) and not asks,
    }
    for word, is_odd in expected.items():
        await sandbox.set(name, odd=[word], pair=ID[name], rate_limit=-1)
        odd, normal = [await client.fetch_order_book(f"{coin}/USDT") for coin in ("ETH", "BTC")]
        assert is_odd(odd["bids"], odd["asks"]), word
        assert normal["bids"][0][0] < normal["asks"][0][0]
    await sandbox.set(name, odd=["empty_candles"], rate_limit=-1)
    assert await client.fetch_ohlcv("ETH/USDT", "1m") == []
    await sandbox.set(name, odd=["duplicate_candle"], rate_limit=-1)
    first, second = (await client.fetch_ohlcv("ETH/USDT", "1m"))[-2:]
    assert first[:5] == second[:5]
    assert second[5] == pytest.approx(first[5] * 1.5)
    await sandbox.set(name, odd=["odd_trades"], rate_limit=-1)
    trades = await client.fetch_trades("ETH/USDT", None, 20)
    assert 0 in {trade["price"] for trade in trades}
    assert 0 in {trade["amount"] for trade in trades}
    assert len({trade["id"] for trade in trades}) < len(trades)


async def test_drift_changes_lists_and_tickers(sandbox: Sandbox, get: Get) -> None:
    """A status is new, and a list and a ticker miss a field."""
    lists = {
        "bybit": "/v5/market/instruments-info?category=linear",
        "binance": "/api/v3/exchangeInfo",
        "kraken": "/0/public/AssetPairs",
    }
    for name in NAMES:
        paths = [lists[name], TICKER[name]]
        before = [(await get(name, path))[1] for path in paths]
        await sandbox.set(name, odd=["drift"])
        after = [(await get(name, path))[1] for path in paths]
        assert "auction" in after[0].lower()
        assert all(len(new) < len(old) for old, new in zip(before, after, strict=True))


@pytest.mark.parametrize(
    ("knobs", "expected"),
    [
        ({"body": "hello", "headers": {"X-Extra": "1"}}, (200, "hello", {"X-Extra": "1"})),
        ({"body": ""}, (200, "", {})),
        ({"size": 1_000}, (200, f'["{"x" * 996}"]', {})),
        ({"redirect": "http://127.0.0.1:1/"}, (302, "", {"Location": "http://127.0.0.1:1/"})),
        (
            {"status": 418, "headers": {"Retry-After": "9"}},
            (418, "status 418", {"Retry-After": "9"}),
        ),
    ],
)
async def test_knobs_replace_status_body_and_headers(
    sandbox: Sandbox, get: Get, knobs: dict[str, Any], expected: Any
) -> None:
    """Body, headers, size, redirect and status are sent as set."""
    for name in NAMES:
        await sandbox.set(name, **knobs)
        status, text, headers = await get(name, TIME[name])
        assert (status, text) == expected[:2]
        assert expected[2].items() <= headers.items()


async def test_knobs_apply_to_some_paths_and_requests(sandbox: Sandbox, get: Get) -> None:
    """`only` selects paths by a part of their text, `times` limits the number of requests."""
    await sandbox.set("binance", status=503, only="ticker", times=2)
    paths = [TIME["binance"], *[TICKER["binance"]] * 3]
    assert [(await get("binance", path))[0] for path in paths] == [200, 503, 503, 200]


async def test_price_and_clock_skew_shift_one_exchange(sandbox: Sandbox, client: Any) -> None:
    """`price` multiplies the prices of an exchange, `clock_skew_ms` shifts its clock."""
    before, now = (await client.fetch_ticker("BTC/USDT"))["last"], await client.fetch_time()
    await sandbox.set(client.id, price=1.05, clock_skew_ms=-60_000)
    assert (await client.fetch_ticker("BTC/USDT"))["last"] == pytest.approx(before * 1.05, rel=1e-5)
    assert await client.fetch_time() == now - 60_000


async def test_hanging_requests_end_when_the_knobs_change(sandbox: Sandbox, get: Get) -> None:
    """They are answered, or aborted by `refuse`. The port stays the same. Stopping is fast."""
    url, ends = sandbox.urls["kraken"], []
    for knobs in ({}, {"refuse": True}):
        await sandbox.set("kraken", hang=True)
        waiting = asyncio.create_task(get("kraken", TIME["kraken"]))
        await asyncio.sleep(0.1)
        await sandbox.set("kraken", **knobs)
        ends.append((await asyncio.gather(waiting, return_exceptions=True))[0])
    assert isinstance(ends[0], tuple)
    assert isinstance(ends[1], aiohttp.ClientError)
    with pytest.raises(aiohttp.ClientConnectorError):
        await get("kraken", TIME["kraken"])
    assert (await get("bybit", TIME["bybit"]))[0] == 200
    await sandbox.set("kraken", hang=True)
    assert sandbox.urls["kraken"] == url
    waiting = asyncio.create_task(get("kraken", TIME["kraken"]))
    await asyncio.sleep(0.1)
    begun = time.monotonic()
    await sandbox.stop()
    assert time.monotonic() - begun < 10
    with pytest.raises(aiohttp.ClientError):
        await waiting


async def test_binance_counts_weight_and_bans(sandbox: Sandbox, clock: Clock, get: Get) -> None:
    """binance answers 429 until the minute ends, and bans clients that continue."""
    await sandbox.set("binance", rate_limit=4)
    answers = [await get("binance", TICKER["binance"]) for _ in range(3)]
    assert [status for status, _, _ in answers] == [200, 200, 429]
    assert [headers["X-MBX-USED-WEIGHT-1M"] for _, _, headers in answers] == ["2", "4", "6"]
    assert answers[2][2]["Retry-After"] == "30"
    clock.now += 30
    answers = [await get("binance", TICKER["binance"]) for _ in range(13)]
    assert [status for status, _, _ in answers] == [200, 200, *[429] * 10, 418]
    assert answers[-1][2]["Retry-After"] == "120"
    assert '"code":-1003' in answers[-1][1]
    clock.now += 121
    assert (await get("binance", TICKER["binance"]))[0] == 200


async def test_binance_weights_depend_on_the_size_of_the_answer(get: Get) -> None:
    """The header counts the weight of all requests in the minute."""
    queries = [
        "depth?symbol=BTCUSDT&limit=5000",
        "depth?symbol=BTCUSDT",
        'ticker/24hr?symbols=["BTCUSDT","ETHUSDT"]',
    ]
    answers = [
        await get("binance", f"/api/v3/{query}")
        for query in ["ticker/24hr", *queries, "exchangeInfo"]
    ]
    assert [int(headers["X-MBX-USED-WEIGHT-1M"]) for _, _, headers in answers] == [
        80,
        330,
        335,
        337,
        357,
    ]


async def test_binance_swaps_have_their_own_weights(get: Get) -> None:
    """Swaps are counted apart from spot markets, with other weights."""
    queries = [
        "ticker/24hr?symbol=BTCUSDT",
        "ticker/24hr",
        "ticker/bookTicker",
        "depth?symbol=BTCUSDT&limit=20",
        "depth?symbol=BTCUSDT&limit=1000",
        "klines?symbol=BTCUSDT&interval=1m&limit=99",
        "klines?symbol=BTCUSDT&interval=1m&limit=1500",
        "aggTrades?symbol=BTCUSDT",
    ]
    await get("binance", "/api/v3/ticker/24hr")
    used = [0]
    for query in queries:
        status, _, headers = await get("binance", f"/fapi/v1/{query}")
        assert status == 200
        used.append(int(headers["X-MBX-USED-WEIGHT-1M"]))
    assert [end - start for start, end in pairwise(used)] == [1, 40, 5, 2, 20, 1, 10, 20]
    _, _, headers = await get("binance", TIME["binance"])
    assert headers["X-MBX-USED-WEIGHT-1M"] == "81"


async def test_binance_swap_books_have_fixed_sizes(get: Get) -> None:
    """Another number of levels is an error. Spot books have any size up to 5,000."""
    path = "depth?symbol=BTCUSDT&limit=7"
    assert (await get("binance", f"/api/v3/{path}"))[0] == 200
    status, text, _ = await get("binance", f"/fapi/v1/{path}")
    assert (status, '"code":-4021' in text) == (400, True)


async def test_binance_swap_books_have_times(get: Get) -> None:
    """A book of a swap has the time of its last change (`T`) and of the message (`E`)."""
    for prefix, times in (("/api/v3", set()), ("/fapi/v1", {"E", "T"})):
        _, text, _ = await get("binance", f"{prefix}/depth?symbol=BTCUSDT&limit=5")
        assert json.loads(text).keys() == {"lastUpdateId", "bids", "asks"} | times


async def test_binance_lists_a_symbol_that_is_not_ascii(get: Get) -> None:
    """The swap of a recorded list can be requested."""
    status, text, _ = await get("binance", "/fapi/v1/ticker/bookTicker?symbol=测试测试USDT")
    assert status == 200
    assert json.loads(text)["symbol"] == "测试测试USDT"


async def test_bybit_limits_rows_by_category(get: Get) -> None:
    """Spot has at most 60 trades and 200 levels, swaps have 1,000 and 500."""
    counts = []
    for category in ("spot", "linear"):
        for path in ("recent-trade", "orderbook"):
            query = f"/v5/market/{path}?category={category}&symbol=BTCUSDT&limit=1000"
            result = json.loads((await get("bybit", query))[1])["result"]
            counts.append(len(result["list"] if "list" in result else result["b"]))
    assert counts == [60, 200, 1_000, 500]


async def test_kraken_has_names_of_its_own(connect: Connect, get: Get) -> None:
    """kraken's LUNA is LUNC for ccxt. `wsname` has XBT and XDG. Some ids have prefixes."""
    markets = (await connect("kraken")).markets
    ids = {symbol: (market["id"], market["info"]["wsname"]) for symbol, market in markets.items()}
    assert ids["LUNC/USDT"] == ("LUNAUSDT", "LUNA/USDT")
    assert ids["LUNA/USDT"] == ("LUNA2USDT", "LUNA2/USDT")
    assert ids["BTC/EUR"] == ("XXBTZEUR", "XBT/EUR")
    assert ids["ETH/BTC"] == ("XETHXXBT", "ETH/XBT")
    assert ids["DOGE/USDT"] == ("XDGUSDT", "XDG/USDT")
    assert "AAPLxUSD" in {market_id for market_id, _ in ids.values()}
    luna, lunc = [
        float(
            json.loads((await get("kraken", f"/0/public/Ticker?pair={name}"))[1])["result"][name][
                "c"
            ][0]
        )
        for name in ("LUNA2USDT", "LUNAUSDT")
    ]
    assert luna > 100 * lunc


async def test_kraken_tickers_have_figures_of_today_and_of_a_day(get: Get) -> None:
    """The first value of each list, and `o`, are of the time since 00:00 UTC."""
    row = json.loads((await get("kraken", TICKER["kraken"]))[1])["result"]["XBTUSDT"]
    for name in ("v", "p", "t"):
        assert float(row[name][0]) != float(row[name][1])
    assert float(row["l"][1]) <= float(row["l"][0]) <= float(row["h"][0]) <= float(row["h"][1])
    _, text, _ = await get("kraken", "/0/public/OHLC?pair=XBTUSDT&interval=1440")
    assert json.loads(text)["result"]["XBTUSDT"][-1][1] == row["o"]


async def test_kraken_limits_candles_and_trades_of_one_pair(get: Get, clock: Clock) -> None:
    """The limit of a pair does not concern other pairs, and ends after seconds."""
    path = "/0/public/OHLC?interval=1&pair="
    for _ in range(10):
        assert "Too many" not in (await get("kraken", f"{path}XBTUSDT"))[1]
    assert '{"error":["EGeneral:Too many requests"]}' in (await get("kraken", f"{path}XBTUSDT"))[1]
    assert '"error":[]' in (await get("kraken", f"{path}ETHUSDT"))[1]
    clock.now += 5
    assert '"error":[]' in (await get("kraken", f"{path}XBTUSDT"))[1]


async def test_kraken_refuses_long_urls(get: Get) -> None:
    """A URL of more than 4 KB gets an HTML page."""
    pairs = ",".join(["XBTUSDT"] * 600)
    assert (await get("kraken", f"/0/public/Ticker?pair={pairs}"))[0] == 520


async def test_weeks_start_on_the_day_of_the_exchange(client: Any) -> None:
    """Candles of a week start on Thursday on kraken, and on Monday elsewhere."""
    candles = await client.fetch_ohlcv("ETH/USDT", "1w")
    weekdays = {int(candle[0] / 86_400_000 + 3) % 7 for candle in candles}
    assert weekdays == ({3} if client.id == "kraken" else {0})


async def test_bybit_refuses_for_ten_minutes(
    sandbox: Sandbox, clock: Clock, connect: Connect, get: Get
) -> None:
    """bybit counts down in a header. ccxt raises a rate limit error for the ban."""
    client = await connect("bybit")
    await sandbox.set("bybit", rate_limit=2)
    answers = [await get("bybit", TIME["bybit"]) for _ in range(3)]
    assert [status for status, _, _ in answers] == [200, 200, 403]
    assert [headers["X-Bapi-Limit-Status"] for _, _, headers in answers[:2]] == ["1", "0"]
    clock.now += 599
    with pytest.raises(ccxt.RateLimitExceeded):
        await client.fetch_time()
    clock.now += 1
    assert await client.fetch_time()


@pytest.mark.parametrize(("limit", "burst"), [(0, 15), (3, 3)])
async def test_kraken_allows_a_burst(
    sandbox: Sandbox, clock: Clock, connect: Connect, limit: int, burst: int
) -> None:
    """After the burst, kraken allows one request per second."""
    client = await connect("kraken")
    await sandbox.set("kraken", rate_limit=limit)
    for _ in range(burst):
        await client.fetch_time()
    with pytest.raises(ccxt.DDoSProtection):
        await client.fetch_time()
    clock.now += 1
    await client.fetch_time()
    await sandbox.set("kraken", rate_limit=-1)
    for _ in range(20):
        await client.fetch_time()


async def test_kraken_trades_continue_from_last(get: Get) -> None:
    """`last` is the time of the last trade in nanoseconds, and a valid `since`."""
    path = "/0/public/Trades?pair=XBTUSDT"
    first = json.loads((await get("kraken", f"{path}&count=5"))[1])["result"]
    again = json.loads((await get("kraken", f"{path}&since={first['last']}"))[1])["result"]
    assert again["XBTUSDT"] == first["XBTUSDT"][-1:]


async def test_requests_are_counted_by_path(sandbox: Sandbox, get: Get) -> None:
    """The last requests are kept with their query and headers."""
    await get("bybit", TIME["bybit"])
    sandbox.clear_counts()
    await get("bybit", TICKER["bybit"])
    await get("bybit", TIME["bybit"])
    assert sandbox.count("bybit") == 2
    assert sandbox.count("bybit", "tickers") == sandbox.calls["bybit"]["/v5/market/tickers"] == 1
    path, headers = sandbox.requests["bybit"][0]
    assert path == TICKER["bybit"]
    assert "User-Agent" in headers
    assert sandbox.count("kraken") == 0


async def test_control_replaces_and_shows_knobs(get: Get) -> None:
    """Errors name the valid knobs."""
    answer = await get("control", "/kraken", {"status": 500, "rate_limit": None})
    assert json.loads(answer[1])["kraken"]["knobs"]["status"] == 500
    assert (await get("kraken", TIME["kraken"]))[0] == 500
    mistakes: list[object] = [{"statuss": 1}, {"status": "x"}, []]
    for data in mistakes:
        status, error, _ = await get("control", "/kraken", data)
        assert status == 400
        assert "the knobs are latency_ms, status" in error
    assert (await get("control", "/nowhere", {}))[0] == 404
    assert (await get("control", "/reset", {}))[0] == 200
    state = json.loads((await get("control"))[1])["kraken"]
    assert state["knobs"]["status"] == 0
    assert state["calls"] == {TIME["kraken"]: 1}
