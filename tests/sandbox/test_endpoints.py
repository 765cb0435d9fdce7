"""Endpoints of the sandbox that the gateway does not use, but clients of the exchanges do."""

import json
from typing import Any
from urllib.parse import quote

import pytest

from src.sandbox.server import Sandbox
from tests.sandbox.test_sandbox import Get, clock, get, sandbox

__all__ = ["clock", "get", "sandbox"]  # fixtures
SPOT = "/api/v3/"
SWAP = "/fapi/v1/"
DATA = "/futures/data/"


async def read(get: Get, exchange: str, path: str) -> Any:
    """Return a parsed answer."""
    status, text, _ = await get(exchange, path)
    assert status == 200, text
    return json.loads(text)


async def test_binance_prices_agree_on_all_endpoints(get: Get) -> None:
    """Prices of all endpoints come from the same trades."""
    last = (await read(get, "binance", f"{SPOT}ticker/24hr?symbol=BTCUSDT"))["lastPrice"]
    for path in ("ticker/price", "ticker", "ticker/tradingDay"):
        ticker = await read(get, "binance", f"{SPOT}{path}?symbol=BTCUSDT")
        assert ticker.get("lastPrice", ticker.get("price")) == last
    assert (await read(get, "binance", f"{SPOT}trades?symbol=BTCUSDT"))[-1]["price"] == last
    day = await read(get, "binance", f"{SPOT}ticker/tradingDay?symbol=BTCUSDT")
    candle = (await read(get, "binance", f"{SPOT}uiKlines?symbol=BTCUSDT&interval=1d"))[-1]
    assert [day["openTime"], day["openPrice"], day["highPrice"]] == candle[:3]
    mark = (await read(get, "binance", f"{SWAP}premiumIndex?symbol=BTCUSDT"))["markPrice"]
    assert (await read(get, "binance", "/fapi/v2/ticker/price?symbol=BTCUSDT"))["price"] == mark
    marks = await read(get, "binance", f"{SWAP}markPriceKlines?symbol=BTCUSDT&interval=1m")
    assert marks[-1][4] == mark
    average = await read(get, "binance", f"{SPOT}avgPrice?symbol=BTCUSDT")
    assert float(average["price"]) == pytest.approx(float(last), rel=0.01)


async def test_binance_answers_one_symbol_with_an_object(get: Get) -> None:
    """One symbol gives an object; a list of symbols, or none, gives a list."""
    symbols = quote('["BTCUSDT","ETHUSDT"]')
    for path in ("ticker", "ticker/tradingDay", "ticker/price"):
        assert isinstance(await read(get, "binance", f"{SPOT}{path}?symbol=BTCUSDT"), dict)
        assert len(await read(get, "binance", f"{SPOT}{path}?symbols={symbols}")) == 2
    assert len(await read(get, "binance", f"{SWAP}premiumIndex")) > 2
    assert await read(get, "binance", f"{SPOT}ping") == {}
    status, text, _ = await get("binance", f"{SPOT}ticker?symbol=BTCUSDT&windowSize=1y")
    assert (status, json.loads(text)["code"]) == (400, -1100)


async def test_windows_have_the_requested_length(get: Get) -> None:
    """`windowSize` sets how long ago the window opened."""
    for size, minutes in (("5m", 5), ("4h", 240), ("7d", 10_080)):
        ticker = await read(get, "binance", f"{SPOT}ticker?symbol=BTCUSDT&windowSize={size}")
        length = (ticker["closeTime"] - ticker["openTime"]) / 60_000
        assert minutes <= length < minutes + 1


async def test_fundings_and_positions_agree_between_endpoints(get: Get) -> None:
    """Both exchanges have the same fundings, in the order and number of their documentation."""
    history = await read(get, "binance", f"{SWAP}fundingRate?symbol=BTCUSDT")
    current = await read(get, "binance", f"{SWAP}premiumIndex?symbol=BTCUSDT")
    assert len(history) == 100
    assert history[-1]["fundingRate"] == current["lastFundingRate"]
    assert history[-1]["fundingTime"] + 28_800_000 == current["nextFundingTime"]
    path = "/v5/market/funding/history?category=linear&symbol=BTCUSDT&limit=3"
    newest = (await read(get, "bybit", path))["result"]["list"]
    assert [row["fundingRate"] for row in newest] == [row["fundingRate"] for row in history[:-4:-1]]
    positions = await read(get, "binance", f"{DATA}openInterestHist?symbol=BTCUSDT&period=1h")
    assert len(positions) == 30
    path = "/v5/market/open-interest?category=linear&symbol=BTCUSDT&intervalTime=1h"
    rows = (await read(get, "bybit", path))["result"]["list"]
    assert len(rows) == 50
    assert rows[0]["openInterest"] == positions[-1]["sumOpenInterest"]
    ratios = await read(
        get, "binance", f"{DATA}globalLongShortAccountRatio?symbol=BTCUSDT&period=1h"
    )
    for row in ratios:
        assert float(row["longAccount"]) + float(row["shortAccount"]) == pytest.approx(1)
    status, text, _ = await get("binance", f"{DATA}openInterestHist?symbol=BTCUSDT&period=7m")
    assert (status, json.loads(text)["code"]) == (400, -1120)


async def test_kraken_lists_assets_spreads_and_its_status(get: Get) -> None:
    """Assets have Kraken's names; spreads are those of the books."""
    assets = (await read(get, "kraken", "/0/public/Assets"))["result"]
    assert assets["XXBT"]["altname"] == "XBT"
    assert "USDT" in assets
    some = (await read(get, "kraken", "/0/public/Assets?asset=XBT,ZUSD"))["result"]
    assert set(some) == {"XXBT", "ZUSD"}
    spreads = (await read(get, "kraken", "/0/public/Spread?pair=XBTUSDT"))["result"]
    last = spreads["XBTUSDT"][-1]
    since = f"/0/public/Spread?pair=XBTUSDT&since={last[0]}"
    assert (await read(get, "kraken", since))["result"]["XBTUSDT"] == [last]
    assert float(last[1]) < float(last[2])
    assert (await read(get, "kraken", "/0/public/SystemStatus"))["result"]["status"] == "online"


async def test_binance_counts_some_paths_apart(sandbox: Sandbox, get: Get) -> None:
    """Requests of fundings and of futures/data have no weight; others have the documented one."""
    await sandbox.reset()
    for path in (f"{SWAP}fundingInfo", f"{DATA}takerlongshortRatio?symbol=BTCUSDT&period=5m"):
        _, _, headers = await get("binance", path)
        assert "X-MBX-USED-WEIGHT-1M" not in headers
    used = 0
    symbols = quote(json.dumps(["BTCUSDT", "ETHUSDT", "SOLUSDT"]))
    for path, weight in (("trades?symbol=BTCUSDT", 25), (f"ticker?symbols={symbols}", 12)):
        used += weight
        _, _, headers = await get("binance", SPOT + path)
        assert headers["X-MBX-USED-WEIGHT-1M"] == str(used)
    await sandbox.set("binance", rate_limit=1)
    assert (await get("binance", f"{SWAP}fundingInfo"))[0] == 200
    assert (await get("binance", f"{SWAP}fundingRate?symbol=BTCUSDT"))[0] == 429
