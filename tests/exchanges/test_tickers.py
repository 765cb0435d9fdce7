"""A member of a ticker means the same by REST and in the stream, on each exchange."""

from typing import Any

import orjson
import pytest
import websockets

from src.exchanges.profiles import PROFILES
from src.sandbox.server import Sandbox
from tests.conftest import FakeClock, Live, StartGateway

MARKETS = [
    ("bybit", "BTC/USDT"),
    ("bybit", "BTC/USDT:USDT"),
    ("binance", "BTC/USDT"),
    ("binance", "BTC/USDT:USDT"),
    ("kraken", "BTC/USDT"),
]
# Members that one path has and the other does not have, as docs/api.md says.
ONLY_IN_STREAMS = {"kraken": {"open", "change", "percentage", "average", "timestamp", "datetime"}}
# Bybit's answer has no time of a ticker.
ONLY_IN_STREAMS["bybit"] = {"timestamp", "datetime"}


async def pushed_ticker(live: Live, exchange: str, symbol: str) -> dict[str, Any]:
    """Return the first ticker that the exchange pushed."""
    url = live.url.replace("http", "ws") + "/ws"
    async with websockets.connect(url) as socket:
        request = {"op": "subscribe", "channel": "ticker", "symbols": [symbol]}
        await socket.send(orjson.dumps(request | {"exchange": exchange}).decode())
        async for text in socket:
            ticker: dict[str, Any] = orjson.loads(text).get("data") or {}
            if ticker.get("source") == "stream":
                return ticker
    raise AssertionError("the socket was closed")


@pytest.mark.parametrize(("exchange", "symbol"), MARKETS)
async def test_rest_and_stream_have_the_same_members(
    start: StartGateway, sandbox: Sandbox, exchange: str, symbol: str
) -> None:
    """A member is null on both paths or on none, alone and in a batch, with few exceptions."""
    live = await start(market_types="spot,swap")
    alone = (await live.get(f"/ticker/{symbol}?exchange={exchange}&max_age=0")).json()
    other = symbol.replace("BTC", "ETH")
    symbols = f"{symbol},{other}"
    batch = await live.get(f"/tickers?symbols={symbols}&exchange={exchange}&max_age=0")
    together = batch.json()["tickers"][symbol]
    assert {name for name in alone if alone[name] is None} == {
        name for name in together if together[name] is None
    }
    pushed = await pushed_ticker(live, exchange, symbol)
    assert {"requested_at", "server_time"} <= alone.keys()
    by_rest = {name for name, value in alone.items() if value is not None}
    by_rest -= {"requested_at", "server_time"}
    in_stream = {name for name, value in pushed.items() if value is not None}
    assert by_rest ^ in_stream <= ONLY_IN_STREAMS.get(exchange, set())
    assert {"bid", "bidVolume", "ask", "askVolume", "last", "vwap"} <= by_rest


async def test_kraken_serves_nothing_of_the_day_as_24_hours(
    start: StartGateway, sandbox: Sandbox
) -> None:
    """Kraken's `o` is the open at 00:00 UTC, so nothing is computed from it (A2)."""
    live = await start()
    for path in ("/ticker/BTC-USDT", "/tickers?symbols=BTC-USDT"):
        answer = (await live.get(f"{path}{'&' if '?' in path else '?'}exchange=kraken")).json()
        ticker = answer.get("tickers", {}).get("BTC/USDT", answer)
        names = ("open", "change", "percentage", "average", "previousClose")
        assert [ticker[name] for name in names] == [None] * 5
        assert ticker["high"] >= ticker["last"] >= ticker["low"] > 0


async def test_swaps_have_bid_and_ask(start: StartGateway, sandbox: Sandbox) -> None:
    """Binance's ticker of a swap is joined with its best bid and ask (A12)."""
    live = await start(market_types="spot,swap")
    single = (await live.get("/ticker/BTC-USDT:USDT?exchange=binance")).json()
    symbols = "ETH-USDT:USDT,SOL-USDT:USDT"
    batch = (await live.get(f"/tickers?symbols={symbols}&exchange=binance")).json()["tickers"]
    for ticker in (single, *batch.values()):
        assert 0 < ticker["bid"] <= ticker["ask"]
        assert ticker["bidVolume"] > 0 < ticker["askVolume"]
    assert sandbox.count("binance") == 4


@pytest.mark.parametrize("exchange", PROFILES)
async def test_market_without_orders_and_trades_is_halted(
    start: StartGateway, sandbox: Sandbox, clock: FakeClock, exchange: str
) -> None:
    """An old price is not served as a current one, and not requested again for a minute (A13)."""
    live = await start()
    market = "XBTUSDT" if exchange == "kraken" else "BTCUSDT"
    await sandbox.set(exchange, halted=[market])
    for path in ("/ticker/BTC-USDT?", "/tickers?symbols=BTC-USDT,ETH-USDT&"):
        answer = (await live.get(f"{path}exchange={exchange}&max_age=0")).json()
        problem = answer.get("errors", {}).get("BTC/USDT", answer)
        assert (problem["code"], problem["status"]) == ("market_halted", 503), problem
        assert "no trade" in problem["detail"]
        days = (clock.time() - problem.get("last_trade_at", 0) / 1000) / 86_400
        assert exchange != "binance" or 2.9 < days < 3.1
    another = (await live.get("/ticker/BTC-USDT")).json()
    assert another["exchange"] != exchange
    sandbox.clear_counts()
    await live.get(f"/ticker/BTC-USDT?exchange={exchange}&max_age=0")
    assert sandbox.count(exchange) == 0
    clock.advance(60)
    await sandbox.set(exchange)
    ticker = (await live.get(f"/ticker/BTC-USDT?exchange={exchange}")).json()
    assert ticker["price"] > 0


async def test_quiet_market_with_orders_has_the_time_of_its_last_trade(
    start: StartGateway, sandbox: Sandbox
) -> None:
    """Orders are current without trades, so the ticker is served with the time of the trade."""
    live = await start()
    ticker = (await live.get("/ticker/BTC-USDT?exchange=binance")).json()
    assert 0 <= ticker["fetched_at"] - ticker["last_trade_at"] < 10_000
