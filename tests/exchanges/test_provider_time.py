"""Answers have the exchange's own time where it gives one, and those of request and receipt."""

from typing import Any

import pytest

from src.exchanges.http_client import MAX_DIFFERENCE_SECONDS, Answer
from src.exchanges.profiles import PROFILES
from src.sandbox.server import Sandbox
from tests.conftest import FakeClock, Live, StartGateway, sample
from tests.streams.test_hub import Join, join, time_passes

__all__ = ["join"]
NOW = 1_796_063_280
DATE = "Mon, 30 Nov 2026 18:28:00 GMT"

BTC, SWAP = "BTC/USDT", "BTC/USDT:USDT"
MARKETS = [("bybit", BTC), ("bybit", SWAP), ("binance", BTC), ("binance", SWAP), ("kraken", BTC)]
PATHS = {
    "ticker": "/ticker/{}?",
    "tickers": "/tickers?symbols={}&",
    "orderbook": "/orderbook/{}?limit=5&",
    "ohlcv": "/ohlcv/{}?timeframe=1m&limit=2&",
    "trades": "/trades/{}?limit=5&",
}
# What has a `timestamp` by REST: the table of docs/api.md. Recorded order books of swaps have
# one, too.
TIMED = {
    ("bybit", BTC): {"orderbook", "trades"},
    ("bybit", SWAP): {"orderbook", "trades"},
    ("binance", BTC): {"ticker", "tickers", "trades"},
    ("binance", SWAP): {"ticker", "tickers", "orderbook", "trades"},
    ("kraken", BTC): {"trades"},
}


async def requested(live: Live, kind: str, exchange: str, symbol: str) -> dict[str, Any]:
    """Return an answer of an exchange to a request, which the cache does not have."""
    url = f"{PATHS[kind].format(symbol)}exchange={exchange}&max_age=0"
    answer: dict[str, Any] = (await live.get(url)).json()
    data: dict[str, Any] = answer["tickers"][symbol] if kind == "tickers" else answer
    assert data["source"] == "rest"
    return data


@pytest.mark.parametrize(("exchange", "symbol"), MARKETS)
async def test_requested_data_has_the_times_of_request_answer_and_receipt(
    start: StartGateway, sandbox: Sandbox, clock: FakeClock, exchange: str, symbol: str
) -> None:
    """Each kind has all times. Bybit's is exact, that of a Date header has whole seconds."""
    live = await start(market_types="spot,swap")
    is_exact = bool(PROFILES[exchange].body_time)
    await sandbox.set(exchange, clock_skew_ms=7_000)
    for kind in PATHS:
        before = int(clock.time() * 1000)
        data = await requested(live, kind, exchange, symbol)
        assert before <= data["requested_at"] <= data["fetched_at"] <= clock.time() * 1000
        ahead = data["server_time"] - data["fetched_at"]
        assert (6_900 if is_exact else 5_900) <= ahead <= 7_100, kind
        assert is_exact or data["server_time"] % 1000 == 0
        assert ("timestamp" in data) == (kind in TIMED[exchange, symbol]), kind


@pytest.mark.parametrize("channel", ["ticker", "book", "trades", "ohlcv"])
@pytest.mark.parametrize(("exchange", "symbol"), MARKETS)
async def test_pushed_data_has_the_time_of_the_exchange(
    start: StartGateway,
    join: Join,
    sandbox: Sandbox,
    clock: FakeClock,
    exchange: str,
    symbol: str,
    channel: str,
) -> None:
    """A pushed value was not requested. Its lag is measured until receipt and until delivery."""
    live = await start(market_types="spot,swap")
    client = await join(live)
    await sandbox.set(exchange, push_ms=20)
    before = lags(exchange)
    timeframe = {"timeframe": "1m"} if channel == "ohlcv" else {}
    await client.subscribe(symbol, channel=channel, exchange=exchange, **timeframe)
    async with time_passes(clock, 0.25):
        message = await client.next(is_pushed_with_time)
    data = message["data"]
    assert not {"requested_at", "server_time"} & data.keys()
    assert abs(data["fetched_at"] - data["timestamp"]) < 10_000
    assert message["timestamp"] == data["timestamp"]
    assert all(new > old for new, old in zip(lags(exchange), before, strict=True))


def is_pushed_with_time(message: dict[str, Any]) -> bool:
    """Return True for a pushed value with a time. Binance's snapshots of books have none."""
    data = message.get("data", {})
    return data.get("source") == "stream" and "timestamp" in data


def lags(exchange: str) -> list[float]:
    """Return how many lags were measured until receipt and until delivery."""
    names = ("receipt_lag_seconds_count", "delivery_lag_seconds_count")
    return [sample(name, exchange=exchange) for name in names]


async def test_lag_is_measured_with_exact_times_and_is_never_negative(
    start: StartGateway, sandbox: Sandbox, clock: FakeClock
) -> None:
    """An answer with milliseconds has a lag, 0 if the clock is ahead; a Date header has none."""
    live = await start()
    names = ("receipt_lag_seconds_sum", "receipt_lag_seconds_count")
    for skew_ms, lag in ((-5_000, 5), (5_000, 0)):
        await sandbox.set("bybit", clock_skew_ms=skew_ms)
        before = [sample(name, exchange="bybit") for name in names]
        await requested(live, "ticker", "bybit", BTC)
        total, count = (sample(name, exchange="bybit") for name in names)
        assert total - before[0] == pytest.approx(lag, abs=0.2)
        assert count - before[1] == 1
    counts = lags("binance")
    await requested(live, "ticker", "binance", BTC)
    assert lags("binance") == counts


@pytest.mark.parametrize("exchange", PROFILES)
async def test_time_of_a_wrong_clock_is_left_out(
    start: StartGateway, sandbox: Sandbox, exchange: str
) -> None:
    """A time that is hours away is not the exchange's: a cache may have sent the answer."""
    live = await start()
    await sandbox.set(exchange, clock_skew_ms=int(-2_000 * MAX_DIFFERENCE_SECONDS))
    for kind in ("orderbook", "ohlcv"):
        assert "server_time" not in await requested(live, kind, exchange, BTC)


def test_answer_without_a_time_has_none() -> None:
    """A missing or malformed header, and a body with another end, give no time."""
    pattern = PROFILES["bybit"].body_time
    assert Answer().server_time(b"", NOW) is None
    assert Answer(headers={"Date": "soon"}).server_time(b"", NOW) is None
    assert Answer(headers={"Date": DATE}).server_time(b"", NOW) == NOW * 1000
    assert Answer(headers={"Date": DATE}, body_end=b'{"list":[]}').server_time(pattern, NOW) is None
    answer = Answer(body_end=b'"retExtInfo":{},"time":1796063279355}')
    assert answer.server_time(pattern, NOW) == 1_796_063_279_355
