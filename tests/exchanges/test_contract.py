"""The contract with ccxt: each recorded answer of a live exchange, through the pinned ccxt, gives the values it holds.

What is expected is read from the recording itself, so none of it is copied here. To be run before ccxt is upgraded, and
after.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from src.sandbox.server import Sandbox
from tests.conftest import StartGateway, recordings

KNOWN = {
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
    """Read a recording; without it the test is skipped."""
    folder = recordings()
    if folder is None:
        pytest.skip("no recordings of live exchanges are there (VIRTUOSO_RECORDINGS)")
    return json.loads((folder / name).read_text())


def numbers(answer: dict[str, Any], *names: str) -> list[float]:
    return [answer[name] for name in names]


def test_every_recording_has_its_test() -> None:
    """A recording that is added has to be held against something here."""
    folder = recordings()
    if folder is None:
        pytest.skip("no recordings of live exchanges are there (VIRTUOSO_RECORDINGS)")
    assert {path.name for path in folder.glob("*.json")} == KNOWN
    source = Path(__file__).read_text().split("def test_every_recording", 1)[1]
    assert not [name for name in KNOWN if f'recorded("{name}")' not in source]


async def test_binance_ticker(start: StartGateway, sandbox: Sandbox) -> None:
    """Every figure of the day, and the exchange's own time."""
    told = recorded("binance_24hr_BTCUSDT.json")
    live = await start()
    await sandbox.set("binance", only="24hr", body=json.dumps(told), rate_limit=-1)
    ticker = (await live.get("/ticker/BTC-USDT?exchange=binance")).json()
    names = {
        "price": "lastPrice", "last": "lastPrice", "close": "lastPrice", "bid": "bidPrice", "bidVolume": "bidQty",
        "ask": "askPrice", "askVolume": "askQty", "open": "openPrice", "high": "highPrice", "low": "lowPrice",
        "vwap": "weightedAvgPrice", "previousClose": "prevClosePrice", "change": "priceChange",
        "percentage": "priceChangePercent", "baseVolume": "volume", "quoteVolume": "quoteVolume",
    }  # fmt: skip
    assert numbers(ticker, *names) == [float(told[name]) for name in names.values()]
    assert ticker["timestamp"] == told["closeTime"]


async def test_bybit_tickers(start: StartGateway, sandbox: Sandbox) -> None:
    """Each market that was recorded and is listed here, asked for in one call."""
    told = recorded("bybit_v5_tickers_spot_2023-08.json")
    live = await start()
    await sandbox.set("bybit", only="tickers", body=json.dumps({"retCode": 0} | told), rate_limit=-1)
    rows = {row["symbol"]: row for row in told["result"]["list"]}
    listed = (await live.get("/markets?exchange=bybit")).json()["markets"]
    ids = {market["symbol"]: market["symbol"].replace("/", "") for market in listed}
    wanted = {symbol: rows[name] for symbol, name in ids.items() if name in rows}
    assert len(wanted) > 10
    answer = (await live.get(f"/tickers?symbols={','.join(wanted)}&exchange=bybit")).json()
    for symbol, row in wanted.items():
        given = numbers(answer["tickers"][symbol], "price", "bid", "ask", "high", "low", "open", "baseVolume")
        fields = ["lastPrice", "bid1Price", "ask1Price", "highPrice24h", "lowPrice24h", "prevPrice24h", "volume24h"]
        assert given == [float(row[field]) for field in fields], symbol


async def test_kraken_ticker(start: StartGateway, sandbox: Sandbox) -> None:
    """Figures of the last 24 hours, which are the second ones, and none of today's."""
    told = recorded("kraken_2025-11_http_ticker.json")
    live = await start()
    await sandbox.set("kraken", only="Ticker", body=json.dumps(told), rate_limit=-1)
    ticker = (await live.get("/ticker/BTC-USDT?exchange=kraken")).json()
    (row,) = told["result"].values()
    given = numbers(ticker, "price", "bid", "ask", "high", "low", "open", "baseVolume", "vwap")
    raw = [row["c"][0], row["b"][0], row["a"][0], row["h"][1], row["l"][1], row["o"], row["v"][1], row["p"][1]]
    assert given == [float(value) for value in raw]
    assert "timestamp" not in ticker


async def test_kraken_order_book(start: StartGateway, sandbox: Sandbox) -> None:
    """Every level of both sides, best first."""
    told = recorded("kraken_2025-11_http_order_book.json")
    live = await start()
    await sandbox.set("kraken", only="Depth", body=json.dumps(told), rate_limit=-1)
    book = (await live.get("/orderbook/BTC-USDT?limit=5&exchange=kraken")).json()
    (row,) = told["result"].values()
    for side in ("bids", "asks"):
        assert book[side] == [[float(price), float(amount)] for price, amount, _ in row[side]]


async def test_binance_candles(start: StartGateway, sandbox: Sandbox) -> None:
    """Every candle: its begin, open, high, low, close and volume."""
    told = recorded("binance_klines_5m.json")
    live = await start()
    await sandbox.set("binance", only="klines", body=json.dumps(told), rate_limit=-1)
    answer = (await live.get(f"/ohlcv/BTC-USDT?timeframe=5m&limit={len(told)}&exchange=binance")).json()
    assert answer["candles"] == [[row[0], *map(float, row[1:6])] for row in told]


async def markets(start: StartGateway, sandbox: Sandbox, name: str, only: str, told: Any) -> set[str]:
    """Return the symbols an exchange lists after it answered so."""
    await sandbox.set(name, only=only, body=json.dumps(told), rate_limit=-1)
    live = await start(load_markets=True)
    return {market["symbol"] for market in (await live.get(f"/markets?exchange={name}")).json()["markets"]}


async def test_binance_markets(start: StartGateway, sandbox: Sandbox) -> None:
    """Those that trade, leveraged tokens among them, by base and quote, out of 1,695."""
    told = recorded("binance_spot_exchangeInfo_2021-10.json")
    trading = [row for row in told["symbols"] if row["status"] == "TRADING"]
    listed = await markets(start, sandbox, "binance", "exchangeInfo", told)
    renamed = {"YOYO": "YOYOW"}  # what everybody else calls it
    assert listed == {f"{renamed.get(row['baseAsset'], row['baseAsset'])}/{row['quoteAsset']}" for row in trading}


async def test_bybit_markets(start: StartGateway, sandbox: Sandbox) -> None:
    """Those of the documented example."""
    told = recorded("bybit_doc_instruments_spot.json")
    listed = await markets(start, sandbox, "bybit", "instruments-info", told)
    assert listed == {f"{row['baseCoin']}/{row['quoteCoin']}" for row in told["result"]["list"]}


async def test_kraken_markets(start: StartGateway, sandbox: Sandbox) -> None:
    """XBT is BTC to everybody else."""
    told = recorded("kraken_2025-11_http_asset_pairs.json")
    listed = await markets(start, sandbox, "kraken", "AssetPairs", told)
    assert listed == {row["wsname"].replace("XBT", "BTC") for row in told["result"].values()}
