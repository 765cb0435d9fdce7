"""The contract of candles: closes, final candles, ranges and shared calls."""

from typing import Any

import pytest

from src.sandbox.server import Sandbox
from tests.conftest import FakeClock, Live, RedisServer, StartGateway

EXCHANGES = ("bybit", "binance", "kraken")
MINUTE = 60_000


def move_to(clock: FakeClock, second: float, length: int = 60) -> None:
    """Advance to a second of the next period, by default of the next minute."""
    clock.advance(length - clock.time() % length + second)


async def candles(live: Live, query: str = "") -> dict[str, Any]:
    response = await live.get(f"/ohlcv/BTC-USDT?{query}")
    assert response.status_code == 200, response.text
    document: dict[str, Any] = response.json()
    return document


@pytest.mark.parametrize("exchange", EXCHANGES)
async def test_a_growing_candle_is_never_served_as_fresh_after_its_close(
    start: StartGateway, clock: FakeClock, sandbox: Sandbox, exchange: str
) -> None:
    """A 1m candle that was requested 5 s before its close is fetched again after it."""
    live = await start(ohlcv_ttl_seconds=30)
    move_to(clock, 55)
    growing = await candles(live, f"exchange={exchange}")
    start_ms = growing["candles"][-1][0]
    assert growing["closed_until"] == start_ms == int(clock.time()) // 60 * MINUTE
    clock.advance(5.4)  # the exchange may still change it
    assert (await candles(live, f"exchange={exchange}"))["candles"] == growing["candles"]
    assert sandbox.count(exchange) == 1
    clock.advance(0.1)
    closed = await candles(live, f"exchange={exchange}")
    assert closed["closed_until"] == closed["candles"][-1][0] == start_ms + MINUTE
    assert not closed["stale"]
    assert closed["candles"][-2][5] > growing["candles"][-1][5]  # the complete volume
    assert sandbox.count(exchange) == 2


async def test_candles_expire_at_the_close_on_every_replica(
    start: StartGateway, clock: FakeClock, sandbox: Sandbox, redis: RedisServer
) -> None:
    """The expiry is stored in Redis with the entry."""
    first = await start(redis_url=redis.url)
    second = await start(redis_url=redis.url)
    move_to(clock, 50)
    before = await candles(first)
    assert await candles(second) == before
    clock.advance(10.5)
    after = await candles(second)
    assert after["closed_until"] == before["closed_until"] + MINUTE
    assert await candles(first) == after
    assert sandbox.count("bybit") == 2


async def test_candles_from_before_a_close_are_marked_stale(
    start: StartGateway, clock: FakeClock, sandbox: Sandbox
) -> None:
    """Also with REVALIDATE_SECONDS: the growing candle is not served while a refresh runs."""
    live = await start(revalidate_seconds=30, cb_threshold=100)
    move_to(clock, 55)
    before = await candles(live, "exchange=bybit")
    clock.advance(5.5)
    await sandbox.set("bybit", rate_limit=-1, status=503)
    stale = await candles(live, "exchange=bybit")
    assert stale == before | {"stale": True}
    await sandbox.set("bybit", rate_limit=-1)
    after = await candles(live, "exchange=bybit")
    assert not after["stale"]
    assert after["closed_until"] == before["closed_until"] + MINUTE


async def test_the_exchanges_clock_decides_what_is_closed(
    start: StartGateway, clock: FakeClock, sandbox: Sandbox
) -> None:
    """A clock of the gateway that is 3 s ahead does not close candles early."""
    live = await start()
    move_to(clock, 1)
    await sandbox.set("binance", rate_limit=-1, clock_skew_ms=-3000)
    early = await candles(live, "exchange=binance&limit=3")
    assert early["closed_until"] == int(clock.time()) // 60 * MINUTE - MINUTE
