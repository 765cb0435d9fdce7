"""Which value is served while the preferred exchange hangs or fails."""

import asyncio
import time

import pytest

from src.sandbox.server import Sandbox
from tests.conftest import FakeClock, StartGateway, eventually

PATHS = (
    "/ticker/BTC-USDT?",
    "/tickers?symbols=BTC-USDT&",
    "/orderbook/BTC-USDT?limit=5&",
    "/ohlcv/BTC-USDT?",
    "/trades/BTC-USDT?limit=5&",
)


@pytest.mark.parametrize("path", [*PATHS, "/ohlcv/BTC-USDT?since={since}&"])
async def test_stale_value_is_served_soon_while_an_exchange_hangs(
    start: StartGateway, sandbox: Sandbox, clock: FakeClock, path: str
) -> None:
    """The answer waits STALE_WAIT_SECONDS, is marked, and the load continues and is stored."""
    live = await start(stale_wait_seconds=0.1, stale_seconds=300)
    path = path.format(since=int(clock.time() - 600) * 1000)
    await live.get(f"{path}exchange=bybit")
    clock.advance(61)
    await sandbox.set("bybit", hang=True)
    began = time.monotonic()
    answer = (await live.get(f"{path}exchange=bybit")).json()
    assert 0.1 <= time.monotonic() - began < 10  # the exchange's timeout is 30 s
    assert answer.get("tickers", {}).get("BTC/USDT", answer)["stale"] is True
    await sandbox.set("bybit")
    key = next(iter(live.gateway.cache.memory.keys()))
    await eventually(lambda: live.gateway.cache.has_fresh(key))
    fresh = (await live.get(f"{path}exchange=bybit")).json()
    assert fresh.get("tickers", {}).get("BTC/USDT", fresh)["stale"] is False
    assert sandbox.count("bybit") == 2


async def test_fresh_value_of_another_exchange_is_preferred_to_a_stale_one(
    start: StartGateway, sandbox: Sandbox, clock: FakeClock
) -> None:
    """Without `exchange`, each other exchange gets STALE_WAIT_SECONDS, too."""
    live = await start(stale_wait_seconds=0.2)
    await live.get("/ticker/BTC-USDT")
    clock.advance(20)
    await sandbox.set("bybit", hang=True)
    ticker = (await live.get("/ticker/BTC-USDT")).json()
    assert (ticker["exchange"], ticker["stale"]) == ("binance", False)


async def test_without_stale_value_a_request_waits(
    start: StartGateway, sandbox: Sandbox, clock: FakeClock
) -> None:
    """Without a value, or with a `max_age` that it exceeds, the request waits as long as it may."""
    live = await start(stale_wait_seconds=0.05, exchange_timeout_seconds=0.5)
    await sandbox.set("bybit", hang=True)
    answer = (await live.get("/ticker/BTC-USDT?exchange=bybit")).json()
    assert answer["code"] == "exchange_timeout"
    await sandbox.set("bybit")
    await live.get("/ticker/BTC-USDT?exchange=bybit")
    clock.advance(20)
    await sandbox.set("bybit", hang=True)
    answer = (await live.get("/ticker/BTC-USDT?exchange=bybit&max_age=19")).json()
    assert answer["code"] == "exchange_timeout"


@pytest.mark.parametrize("path", PATHS)
async def test_fallback_with_a_different_price_is_refused(
    start: StartGateway, sandbox: Sandbox, clock: FakeClock, path: str
) -> None:
    """The same symbol may be another coin: it is not served, neither as a first nor a repeat (A5).

    The exchange can still be requested by its name.
    """
    live = await start(stale_seconds=0)
    await live.get(path)
    clock.advance(61)
    for name in ("binance", "kraken"):
        await sandbox.set(name, price=100)
    await sandbox.set("bybit", status=503)
    for _ in range(2):
        answer = (await live.get(path)).json()
        problem = answer.get("errors", {}).get("BTC/USDT", answer)
        assert problem["code"] == "no_exchange_available"
        codes = [attempt["code"] for attempt in problem["attempts"]]
        assert codes == ["exchange_unavailable", "price_mismatch", "price_mismatch"]
    asked = (await live.get(f"{path}exchange=binance")).json()
    assert asked.get("tickers", {}).get("BTC/USDT", asked)["exchange"] == "binance"
    for name in ("binance", "kraken"):
        await sandbox.set(name, price=1.1)
    clock.advance(61)
    answer = (await live.get(path)).json()
    assert answer.get("tickers", {}).get("BTC/USDT", answer)["exchange"] == "binance"


async def test_fast_path_compares_prices_of_fallbacks(
    start: StartGateway, sandbox: Sandbox, clock: FakeClock
) -> None:
    """A fallback that was served once is compared again after it has changed."""
    live = await start(stale_seconds=0, ticker_ttl_seconds=5)
    await live.get("/ticker/BTC-USDT")
    clock.advance(6)
    await sandbox.set("bybit", status=503)
    for _ in range(3):
        assert (await live.get("/ticker/BTC-USDT")).json()["exchange"] == "binance"
    clock.advance(6)
    await sandbox.set("binance", price=2)
    assert (await live.get("/ticker/BTC-USDT?exchange=binance")).status_code == 200
    answer = (await live.get("/ticker/BTC-USDT")).json()
    assert answer["exchange"] == "kraken"


async def test_comparison_can_be_turned_off(
    start: StartGateway, sandbox: Sandbox, clock: FakeClock
) -> None:
    """FALLBACK_MAX_DEVIATION=0 serves every fallback."""
    live = await start(stale_seconds=0, fallback_max_deviation=0)
    await live.get("/ticker/BTC-USDT")
    clock.advance(20)
    await sandbox.set("binance", price=100)
    await sandbox.set("bybit", status=503)
    assert (await live.get("/ticker/BTC-USDT")).json()["exchange"] == "binance"


async def test_stale_value_of_the_preferred_exchange_replaces_a_refused_fallback(
    start: StartGateway, sandbox: Sandbox, clock: FakeClock
) -> None:
    """The stale value is of the right coin."""
    live = await start()
    await live.get("/ticker/BTC-USDT")
    clock.advance(20)
    for name in ("binance", "kraken"):
        await sandbox.set(name, price=100)
    await sandbox.set("bybit", status=503)
    answers = await asyncio.gather(*(live.get("/ticker/BTC-USDT") for _ in range(5)))
    assert {(answer.json()["exchange"], answer.json()["stale"]) for answer in answers} == {
        ("bybit", True)
    }
