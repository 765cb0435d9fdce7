"""Raw candles that a stream keeps up to date: a close costs no REST call, and no digit differs."""

import asyncio
from typing import Any

import httpx
import pytest

from src.raw.candles import has_same_digits
from src.sandbox.server import Sandbox
from src.streams.topics import Topic
from tests.conftest import FakeClock, Live, StartGateway, eventually
from tests.raw.test_pass_through import direct, raw
from tests.streams.test_candle_streams import calls, move_to, pass_until
from tests.streams.test_hub import inside, time_passes

MINUTE = 60_000
CANDLES = {
    "binance": "api/v3/klines?symbol={}&interval=1m&limit=5",
    "binance swap": "fapi/v1/klines?symbol={}&interval=1m&limit=5",
    "bybit": "v5/market/kline?category=spot&symbol={}&interval=1&limit=5",
    "bybit swap": "v5/market/kline?category=linear&symbol={}&interval=1&limit=5",
}
COINS = ("BTC", "ETH", "SOL")


def rows_of(answer: httpx.Response) -> list[list[Any]]:
    document = answer.json()
    return document if isinstance(document, list) else document["result"]["list"][::-1]


async def watch(live: Live, clock: FakeClock, market: str, coin: str = "BTC") -> Topic:
    """Request raw candles repeatedly, and wait until their stream is live."""
    exchange, _, kind = market.partition(" ")
    symbol = f"{coin}/USDT" + (":USDT" if kind else "")
    topic = Topic(exchange, "ohlcv", symbol, "1m")
    for _ in range(2):
        await raw(live, exchange, CANDLES[market].format(f"{coin}USDT"))
    async with time_passes(clock, 0.05):
        await eventually(lambda: topic in inside(live).topics and inside(live).topics[topic].live)
    return topic


@pytest.mark.parametrize("market", CANDLES)
async def test_a_close_costs_no_call(
    start: StartGateway, sandbox: Sandbox, clock: FakeClock, market: str
) -> None:
    """The answer has the digits of REST, the final candle and the growing one."""
    exchange = market.partition(" ")[0]
    path = CANDLES[market].format("BTCUSDT")
    await sandbox.set(exchange, push_ms=20, rate_limit=-1)
    live = await start(market_types="spot,swap")
    move_to(clock, 40)
    topic = await watch(live, clock, market)
    close = int(clock.time()) // 60 * MINUTE + MINUTE
    await pass_until(live, clock, topic, close / 1000 - 1)
    before = calls(sandbox, exchange)
    clock.advance(close / 1000 - clock.time() + 0.2)
    answer = await raw(live, exchange, path)
    assert calls(sandbox, exchange) == before
    rows = rows_of(answer)
    assert [int(row[0]) for row in rows[-2:]] == [close - MINUTE, close]
    expected = rows_of(await direct(sandbox, exchange, path))
    assert rows[:-1] == expected[:-1]
    assert (
        answer.headers["content-type"]
        == (await direct(sandbox, exchange, path)).headers["content-type"]
    )


async def test_many_bots_cause_no_call_at_a_close(
    start: StartGateway, sandbox: Sandbox, clock: FakeClock
) -> None:
    """Fourteen bots ask for each pair at once. All get the closed candle."""
    await sandbox.set("binance", push_ms=20, rate_limit=-1)
    live = await start()
    move_to(clock, 30)
    topics = [await watch(live, clock, "binance", coin) for coin in COINS]
    for _ in range(2):
        close = int(clock.time()) // 60 * MINUTE + MINUTE
        for topic in topics:
            await pass_until(live, clock, topic, close / 1000 - 1)
        before = calls(sandbox, "binance")
        clock.advance(close / 1000 - clock.time() + 0.1)
        paths = [CANDLES["binance"].format(f"{coin}USDT") for coin in COINS] * 14
        answers = await asyncio.gather(*(raw(live, "binance", path) for path in paths))
        assert {rows_of(answer)[-2][0] for answer in answers} == {close - MINUTE}
        assert calls(sandbox, "binance") == before


async def test_without_streams_each_pair_costs_one_call(
    start: StartGateway, sandbox: Sandbox, clock: FakeClock
) -> None:
    live = await start(streaming=False)
    move_to(clock, 59)
    paths = [CANDLES["binance"].format(f"{coin}USDT") for coin in COINS] * 14
    await asyncio.gather(*(raw(live, "binance", path) for path in paths))
    clock.advance(1.6)
    sandbox.clear_counts()
    await asyncio.gather(*(raw(live, "binance", path) for path in paths))
    assert calls(sandbox, "binance") == len(COINS)


async def test_a_lost_message_is_fetched(
    start: StartGateway, sandbox: Sandbox, clock: FakeClock
) -> None:
    """If the final state of a candle did not arrive, the series is requested again."""
    await sandbox.set("binance", push_ms=20, rate_limit=-1)
    live = await start()
    move_to(clock, 40)
    topic = await watch(live, clock, "binance")
    await sandbox.set("binance", push_ms=20, rate_limit=-1, refuse=True)
    clock.advance(141)
    await sandbox.set("binance", push_ms=20, rate_limit=-1)
    liveness = inside(live).topics[topic].liveness
    last = liveness.last_message_at or 0.0
    async with time_passes(clock, 0.05):
        await eventually(lambda: (liveness.last_message_at or 0.0) > last)
    before = calls(sandbox, "binance")
    path = CANDLES["binance"].format("BTCUSDT")
    rows = rows_of(await raw(live, "binance", path))
    assert calls(sandbox, "binance") == before + 1
    assert rows == rows_of(await direct(sandbox, "binance", path))


@pytest.mark.parametrize(
    ("row", "rows", "is_same"),
    [
        ([1, "2.50"], [[0, "2.40"], [0, "2.30"]], True),
        ([1, "2.5"], [[0, "2.40"], [0, "2.30"]], False),
        ([1, "2.5"], [[0, "2.41"], [0, "2.3"]], True),
        ([1, "2.50"], [[0, "2.41"], [0, "2.3"]], False),
        ([1, "2"], [[0, "2.41"], [0, "3"]], True),
        ([1, 2.5], [[0, "2.4"]], False),
        (["1", "2.5"], [[0, "2.4"]], False),
        ([1, "2.5", 3], [[0, "2.4"]], False),
        ([1, "2.5"], [], False),
    ],
)
def test_numbers_have_to_be_written_alike(row: list[Any], rows: list[Any], is_same: bool) -> None:
    """A column has a fixed number of decimals, or no zeros at the end."""
    assert has_same_digits(row, rows) == is_same
