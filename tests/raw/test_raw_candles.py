"""Raw candles follow the candle contract: none is served after its close as it was before."""

import pytest

from src.sandbox.server import Sandbox
from tests.conftest import FakeClock, RedisServer, StartGateway, eventually
from tests.raw.test_pass_through import raw
from tests.web.test_candles import MINUTE, move_to

NEWEST = {
    "binance": "api/v3/klines?symbol=BTCUSDT&interval=1m&limit=3",
    "bybit": "v5/market/kline?category=spot&symbol=BTCUSDT&interval=1&limit=3",
    "kraken": "0/public/OHLC?pair=XBTUSDT&interval=1",
}
PAST = {
    "binance": "api/v3/klines?symbol=BTCUSDT&interval=1m&startTime={start}&{end}limit=10",
    "bybit": "v5/market/kline?category=spot&symbol=BTCUSDT&interval=1&start={start}&{end}limit=10",
}
END_NAMES = {"binance": "endTime", "bybit": "end"}


@pytest.fixture
def start(start: StartGateway) -> StartGateway:
    async def start_without_streams(**overrides: object) -> object:
        return await start(streaming=False, **overrides)

    return start_without_streams  # type: ignore[return-value]


@pytest.mark.parametrize("exchange", NEWEST)
async def test_growing_candle_is_fetched_again_after_its_close(
    start: StartGateway, sandbox: Sandbox, clock: FakeClock, exchange: str
) -> None:
    """Answers from within 0.5 s after a close are fetched again: the exchange may be late."""
    live = await start(ohlcv_ttl_seconds=30)
    move_to(clock, 55)
    first = await raw(live, exchange, NEWEST[exchange])
    clock.advance(4.9)
    assert (await raw(live, exchange, NEWEST[exchange])).content == first.content
    assert sandbox.count(exchange) == 1
    clock.advance(0.2)
    closing = await raw(live, exchange, NEWEST[exchange])
    assert closing.content != first.content
    assert sandbox.count(exchange) == 2
    clock.advance(0.5)
    await raw(live, exchange, NEWEST[exchange])
    clock.advance(29)
    closed = await raw(live, exchange, NEWEST[exchange])
    assert sandbox.count(exchange) == 3
    assert closed.headers["age"] == "29"


@pytest.mark.parametrize("has_end", [True, False])
@pytest.mark.parametrize("exchange", PAST)
async def test_candles_of_the_past_are_kept_for_a_day_on_every_replica(
    start: StartGateway,
    sandbox: Sandbox,
    clock: FakeClock,
    redis: RedisServer,
    exchange: str,
    has_end: bool,
) -> None:
    first, second = [await start(redis_url=redis.url) for _ in range(2)]
    begin = int(clock.time()) // 60 * MINUTE - 60 * MINUTE
    end = f"{END_NAMES[exchange]}={begin + 9 * MINUTE}&" if has_end else ""
    path = PAST[exchange].format(start=begin, end=end)
    expected = await raw(first, exchange, path)
    assert sandbox.count(exchange) == 1
    await eventually(lambda: not first.gateway.cache.redis._writes)
    clock.advance(80_000)
    assert (await raw(first, exchange, path)).content == expected.content
    assert (await raw(second, exchange, path)).content == expected.content
    assert sandbox.count(exchange) == 1


@pytest.mark.parametrize("exchange", PAST)
async def test_a_range_with_the_growing_candle_is_not_kept(
    start: StartGateway, sandbox: Sandbox, clock: FakeClock, exchange: str
) -> None:
    live = await start()
    move_to(clock, 50)
    begin = int(clock.time()) // 60 * MINUTE - 3 * MINUTE
    path = PAST[exchange].format(start=begin, end="")
    first = await raw(live, exchange, path)
    clock.advance(11)
    assert (await raw(live, exchange, path)).content != first.content
    assert sandbox.count(exchange) == 2
