"""The contract with ccxt: the gateway returns the values of recorded responses.

The expected values are read from the recording itself. Run these tests before and after an upgrade
of ccxt.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from src.sandbox.server import Sandbox
from tests.conftest import StartGateway, recordings

RECORDINGS = {
    "binance_24hr_BTCUSDT.json",
    "binance_klines_5m.json",
    "binance_spot_exchangeInfo_2021-10.json",
    "bybit_doc_instruments_spot.json",
    "bybit_v5_tickers_spot_2023-08.json",
    "kraken_2025-11_http_asset_pairs.json",
    "kraken_2025-11_http_order_book.json",
    "kraken_2025-11_http_ticker.json",
}


def recorded(name: str) -> Any:
    """Return a recording. Skip the test if there are no recordings."""
    folder = recordings()
    if folder is None:
        pytest.skip("there are no recordings of live exchanges (VIRTUOSO_RECORDINGS)")
    return json.loads((folder / name).read_text())


def values_of(answer: dict[str, Any], *names: str) -> list[float]:
    return [answer[name] for name in names]


def test_every_recording_has_a_test() -> None:
    """Every recording is used by a test of this module."""
    folder = recordings()
    if folder is None:
        pytest.skip("there are no recordings of live exchanges (VIRTUOSO_RECORDINGS)")
    assert {path.name for path in folder.glob("*.json")} == RECORDINGS
    source = Path(__file__).read_text().split("def test_every_recording", 1)[1]
    assert not [name for name in RECORDINGS if f'recorded("{name}")' not in source]


async def test_binance_ticker_has_the_recorded_values(
    start: StartGateway, sandbox: Sandbox
) -> None:
    """All 24-hour statistics and the exchange's own time are returned."""
    recording = recorded("binance_24hr_BTCUSDT.json")
    live = await start()
    await sandbox.set("binance", only="24hr", body=json.dumps(recording), rate_limit=-1)
    ticker = (await live.get("/ticker/BTC-USDT?exchange=binance")).json()
    names = {
        "price": "lastPrice", "last": "lastPrice", "close": "lastPrice",
        "bid": "bidPrice", "bidVolume": "bidQty",
        "ask": "askPrice", "askVolume": "askQty", "open": "openPrice",
        "high": "highPrice", "low": "lowPrice",
        "vwap": "weightedAvgPrice", "previousClose": "prevClosePrice", "change": "priceChange",
        "percentage": "priceChangePercent", "baseVolume": "volume", "quoteVolume": "quoteVolume",
    }  # fmt: skip
    assert values_of(ticker, *names) == [float(recording[name]) for name in names.values()]
    assert ticker["timestamp"] == recording["closeTime"]


async def test_bybit_tickers_have_the_recorded_values(
    start: StartGateway, sandbox: Sandbox
) -> None:
    """All recorded markets that the sandbox lists are returned by one call."""
    recording = recorded("bybit_v5_tickers_spot_2023-08.json")
    live = await start()
    await sandbox.set(
        "bybit", only="tickers", body=json.dumps({"retCode": 0} | recording), rate_limit=-1
    )
    rows = {row["symbol"]: row for row in recording["result"]["list"]}
    listed = (await live.get("/markets?exchange=bybit")).json()["markets"]
    ids = {market["symbol"]: market["symbol"].replace("/", "") for market in listed}
    expected = {symbol: rows[name] for symbol, name in ids.items() if name in rows}
    assert len(expected) > 10
    answer = (await live.get(f"/tickers?symbols={','.join(expected)}&exchange=bybit")).json()
    for symbol, row in expected.items():
        returned = values_of(
            answer["tickers"][symbol], "price", "bid", "ask", "high", "low", "open", "baseVolume"
        )
        fields = [
            "lastPrice",
            "bid1Price",
            "ask1Price",
            "highPrice24h",
            "lowPrice24h",
            "prevPrice24h",
            "volume24h",
        ]
        assert returned == [float(row[field]) for field in fields], symbol


async def test_kraken_ticker_has_the_recorded_values(start: StartGateway, sandbox: Sandbox) -> None:
    """The second value of each pair is returned: the last 24 hours. The first is today's."""
    recording = recorded("kraken_2025-11_http_ticker.json")
    live = await start()
    await sandbox.set("kraken", only="Ticker", body=json.dumps(recording), rate_limit=-1)
    ticker = (await live.get("/ticker/BTC-USDT?exchange=kraken")).json()
    (row,) = recording["result"].values()
    returned = values_of(ticker, "price", "bid", "ask", "high", "low", "open", "baseVolume", "vwap")
    texts = [
        row["c"][0],
        row["b"][0],
        row["a"][0],
        row["h"][1],
        row["l"][1],
        row["o"],
        row["v"][1],
        row["p"][1],
    ]
    assert returned == [float(value) for value in texts]
    assert "timestamp" not in ticker


async def test_kraken_order_book_has_the_recorded_levels(
    start: StartGateway, sandbox: Sandbox
) -> None:
    """All levels of both sides are returned, best first."""
    recording = recorded("kraken_2025-11_http_order_book.json")
    live = await start()
    await sandbox.set("kraken", only="Depth", body=json.dumps(recording), rate_limit=-1)
    book = (await live.get("/orderbook/BTC-USDT?limit=5&exchange=kraken")).json()
    (row,) = recording["result"].values()
    for side in ("bids", "asks"):
        assert book[side] == [[float(price), float(amount)] for price, amount, _ in row[side]]


async def test_binance_candles_have_the_recorded_values(
    start: StartGateway, sandbox: Sandbox
) -> None:
    """All candles are returned with start, open, high, low, close and volume."""
    recording = recorded("binance_klines_5m.json")
    live = await start()
    await sandbox.set("binance", only="klines", body=json.dumps(recording), rate_limit=-1)
    answer = (
        await live.get(f"/ohlcv/BTC-USDT?timeframe=5m&limit={len(recording)}&exchange=binance")
    ).json()
    assert answer["candles"] == [[row[0], *map(float, row[1:6])] for row in recording]


async def listed_symbols(
    start: StartGateway, sandbox: Sandbox, name: str, only: str, recording: Any
) -> set[str]:
    """Return the symbols of an exchange that sends a recorded market list."""
    await sandbox.set(name, only=only, body=json.dumps(recording), rate_limit=-1)
    live = await start(load_markets=True)
    return {
        market["symbol"]
        for market in (await live.get(f"/markets?exchange={name}")).json()["markets"]
    }


async def test_binance_lists_the_recorded_markets(start: StartGateway, sandbox: Sandbox) -> None:
    """The trading markets among 1,695 are listed, including leveraged tokens."""
    recording = recorded("binance_spot_exchangeInfo_2021-10.json")
    trading = [row for row in recording["symbols"] if row["status"] == "TRADING"]
    listed = await listed_symbols(start, sandbox, "binance", "exchangeInfo", recording)
    renamed = {"YOYO": "YOYOW"}  # the name on other exchanges
    assert listed == {
        f"{renamed.get(row['baseAsset'], row['baseAsset'])}/{row['quoteAsset']}" for row in trading
    }


async def test_bybit_lists_the_recorded_markets(start: StartGateway, sandbox: Sandbox) -> None:
    """The markets of the documented example are listed."""
    recording = recorded("bybit_doc_instruments_spot.json")
    listed = await listed_symbols(start, sandbox, "bybit", "instruments-info", recording)
    assert listed == {
        f"{row['baseCoin']}/{row['quoteCoin']}" for row in recording["result"]["list"]
    }


async def test_kraken_lists_the_recorded_markets(start: StartGateway, sandbox: Sandbox) -> None:
    """Kraken's XBT is listed as BTC."""
    recording = recorded("kraken_2025-11_http_asset_pairs.json")
    listed = await listed_symbols(start, sandbox, "kraken", "AssetPairs", recording)
    assert listed == {row["wsname"].replace("XBT", "BTC") for row in recording["result"].values()}
