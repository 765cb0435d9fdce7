"""Streams of candles, and cached candles that a stream keeps up to date."""

from functools import partial
from typing import Any

import pytest

from src.sandbox.server import Sandbox
from src.streams import candles
from src.streams.candles import merge
from src.streams.registry import TopicState
from src.streams.topics import Topic
from tests.conftest import FakeClock, Live, RedisServer, StartGateway, eventually
from tests.streams.test_hub import BTC, Join, inside, join, time_passes

__all__ = ["join"]  # a fixture
MINUTE = 60_000
SOCKET_PATHS = {"bybit": "/v5/public", "binance": "/ws", "kraken": "/v2"}
SWAP = "BTC/USDT:USDT"
MARKETS = [("bybit", BTC), ("binance", BTC), ("kraken", BTC), ("bybit", SWAP), ("binance", SWAP)]


def move_to(clock: FakeClock, second: float) -> None:
    """Advance to a second of the next minute."""
    clock.advance(60 - clock.time() % 60 + second)


async def ohlcv(live: Live, exchange: str, symbol: str = BTC, **params: object) -> dict[str, Any]:
    query = "&".join(f"{name}={value}" for name, value in params.items())
    response = await live.get(f"/ohlcv/{symbol}?exchange={exchange}&{query}")
    assert response.status_code == 200, response.text
    document: dict[str, Any] = response.json()
    return document


async def watch(
    live: Live, clock: FakeClock, exchange: str, symbol: str = BTC, **params: object
) -> Topic:
    """Request candles repeatedly, and wait until their stream is live."""
    topic = Topic(exchange, "ohlcv", symbol, "1m")
    for _ in range(candles.MIN_REQUESTS):
        await ohlcv(live, exchange, symbol, **params)
    async with time_passes(clock, 0.05):
        await eventually(lambda: topic in inside(live).topics and inside(live).topics[topic].live)
    return topic


async def pass_until(live: Live, clock: FakeClock, topic: Topic, time: float) -> None:
    """Advance to a UTC time in steps, with a pushed candle in each."""
    state = inside(live).topics[topic]
    while clock.time() < time:
        clock.advance(min(2.0, time - clock.time()))  # a longer silence is a loss
        await eventually(partial(_has_newer, state, state.sequence))


def _has_newer(state: TopicState, sequence: int) -> bool:
    return state.sequence > sequence


async def until_closed(
    live: Live, exchange: str, symbol: str, close: int, **params: object
) -> dict[str, Any]:
    """Wait until the answer has the candle that ended at `close` (UTC ms)."""
    while True:
        document = await ohlcv(live, exchange, symbol, **params)
        if document["closed_until"] == close:
            return document


def final(document: dict[str, Any]) -> list[Any]:
    """Return the candles that are final."""
    return [row for row in document["candles"] if row[0] < document["closed_until"]]


def calls(sandbox: Sandbox, exchange: str) -> int:
    """Return the number of REST calls for candles."""
    return sum(sandbox.count(exchange, name) for name in ("klines", "market/kline", "public/OHLC"))


@pytest.mark.parametrize(("exchange", "symbol"), MARKETS)
async def test_a_stream_pushes_the_growing_candle_and_its_close(
    start: StartGateway,
    join: Join,
    sandbox: Sandbox,
    clock: FakeClock,
    exchange: str,
    symbol: str,
) -> None:
    """After the close, the final candle is pushed together with the next one."""
    await sandbox.set(exchange, push_ms=20)
    live = await start(market_types="spot,swap")
    move_to(clock, 50)
    minute = int(clock.time()) // 60 * MINUTE
    client = await join(live)
    answer = await client.subscribe(symbol, channel="ohlcv", exchange=exchange, timeframe="1m")
    assert answer["errors"] == {}
    first = await client.next(lambda message: message.get("data", {}).get("source") == "stream")
    assert (first["channel"], first["timeframe"]) == ("ohlcv", "1m")
    assert first["data"]["candles"][-1][0] == first["data"]["closed_until"] == minute
    async with time_passes(clock, 0.25):
        last = await client.next(
            lambda message: (
                message["type"] in ("snapshot", "update")
                and message["data"]["candles"][-1][0] == minute + MINUTE
            )
        )
    data = last["data"]
    assert [row[0] for row in data["candles"]] == [minute, minute + MINUTE]
    assert data["closed_until"] == minute + MINUTE
    fetched = await ohlcv(live, exchange, symbol, limit=2, since=minute, max_age=0)
    assert fetched["candles"][0] == data["candles"][0]


@pytest.mark.parametrize(("exchange", "symbol"), MARKETS)
async def test_a_late_state_of_a_candle_does_not_replace_a_newer_one(
    start: StartGateway,
    join: Join,
    sandbox: Sandbox,
    clock: FakeClock,
    exchange: str,
    symbol: str,
) -> None:
    """The exchange sends each state again after newer ones, also after the close."""
    await sandbox.set(exchange, push_ms=20, odd=["late"])
    live = await start(market_types="spot,swap")
    move_to(clock, 50)
    minute = int(clock.time()) // 60 * MINUTE
    client = await join(live)
    await client.subscribe(symbol, channel="ohlcv", exchange=exchange, timeframe="1m")
    async with time_passes(clock, 0.25):
        for _ in range(50):
            await client.take("update")
        while client.got[-1]["data"]["candles"][-1][0] == minute:
            await client.take("update")
        await client.take("update", 20)
    documents = [message["data"] for message in client.got if message["type"] == "update"]
    states = [row for document in documents for row in document["candles"] if row[0] == minute]
    assert states == sorted(states, key=lambda state: state[5])
    fetched = await ohlcv(live, exchange, symbol, limit=2, since=minute, max_age=0)
    assert states[-1] == fetched["candles"][0]


@pytest.mark.parametrize(("exchange", "symbol"), MARKETS)
async def test_a_close_costs_no_call_for_requested_candles(
    start: StartGateway, sandbox: Sandbox, clock: FakeClock, exchange: str, symbol: str
) -> None:
    """The closed candle comes from the stream, and equals the one of REST."""
    await sandbox.set(exchange, push_ms=20)
    live = await start(market_types="spot,swap")
    move_to(clock, 40)
    topic = await watch(live, clock, exchange, symbol)
    before = calls(sandbox, exchange)
    close = int(clock.time()) // 60 * MINUTE + MINUTE
    for _ in range(3):
        await pass_until(live, clock, topic, close / 1000 - 1)
        clock.advance(close / 1000 - clock.time() + 0.3)
        pushed = await until_closed(live, exchange, symbol, close)
        assert pushed["source"] == "stream"
        assert not pushed["stale"]
        close += MINUTE
        clock.advance(1)
    assert calls(sandbox, exchange) == before
    fetched = await ohlcv(live, exchange, symbol, max_age=0)
    assert calls(sandbox, exchange) == before + 1
    assert final(fetched)[-50:] == final(pushed)[-50:]


@pytest.mark.parametrize("exchange", ["bybit", "binance", "kraken"])
async def test_a_close_costs_no_call_for_requests_since_a_candle(
    start: StartGateway, sandbox: Sandbox, clock: FakeClock, exchange: str
) -> None:
    """A client that asks for the candles since its last one, as bots do, has them pushed, too."""
    await sandbox.set(exchange, push_ms=20)
    live = await start()
    move_to(clock, 40)
    close = int(clock.time()) // 60 * MINUTE + MINUTE
    topic = await watch(live, clock, exchange, since=close - 3 * MINUTE)
    before = calls(sandbox, exchange)
    for _ in range(3):
        await pass_until(live, clock, topic, close / 1000 - 1)
        clock.advance(close / 1000 - clock.time() + 0.3)
        since = close - 2 * MINUTE
        pushed = await until_closed(live, exchange, BTC, close, since=since)
        assert (pushed["source"], pushed["stale"]) == ("stream", False)
        assert [row[0] for row in pushed["candles"][:2]] == [since, since + MINUTE]
        close += MINUTE
        clock.advance(1)
    assert calls(sandbox, exchange) == before


@pytest.mark.parametrize("exchange", ["bybit", "binance", "kraken"])
async def test_candles_are_fetched_if_the_close_is_not_pushed(
    start: StartGateway, sandbox: Sandbox, clock: FakeClock, exchange: str
) -> None:
    """A stream that pushes nothing at the close does not keep the growing candle alive."""
    await sandbox.set(exchange, push_ms=20)
    live = await start()
    move_to(clock, 50)
    await watch(live, clock, exchange)
    await sandbox.set(exchange, freeze=True)
    before = calls(sandbox, exchange)
    close = int(clock.time()) // 60 * MINUTE + MINUTE
    clock.advance(close / 1000 - clock.time() + 0.6)
    assert (await until_closed(live, exchange, BTC, close))["source"] == "rest"
    assert calls(sandbox, exchange) == before + 1


@pytest.mark.parametrize("exchange", ["bybit", "binance", "kraken"])
async def test_gaps_after_a_reconnect_are_fetched(
    start: StartGateway, sandbox: Sandbox, clock: FakeClock, exchange: str
) -> None:
    """Candles that nobody pushed are never missing, and the stream continues after them."""
    await sandbox.set(exchange, push_ms=20)
    live = await start()
    move_to(clock, 50)
    topic = await watch(live, clock, exchange)
    await sandbox.set(
        exchange,
        drop="cut",
        status=503,
        only=SOCKET_PATHS[exchange],
    )
    clock.advance(130)
    async with time_passes(clock):
        await eventually(lambda: not inside(live).topics[topic].live)
        await sandbox.set(exchange, push_ms=20)
        await eventually(lambda: inside(live).topics[topic].live)
        while (document := await ohlcv(live, exchange))["source"] != "stream":
            pass
    times = [row[0] for row in document["candles"]]
    assert times == list(range(times[0], times[-1] + 1, MINUTE))
    fetched = await ohlcv(live, exchange, max_age=0)  # maybe after another close
    assert all(row in fetched["candles"] for row in final(document)[-50:])


async def test_streams_keep_candles_correct_while_rest_fails(
    start: StartGateway, sandbox: Sandbox, clock: FakeClock
) -> None:
    """Candles of a live stream are neither stale nor an error, for as long as it is live."""
    await sandbox.set("binance", push_ms=20)
    live = await start()
    move_to(clock, 50)
    topic = await watch(live, clock, "binance")
    await sandbox.set("binance", push_ms=20, status=503, only="/api/")
    close = int(clock.time()) // 60 * MINUTE + MINUTE
    for _ in range(3):
        await pass_until(live, clock, topic, close / 1000 - 1)
        clock.advance(close / 1000 - clock.time() + 0.2)
        assert not (await until_closed(live, "binance", BTC, close))["stale"]
        close += MINUTE


async def test_replicas_share_pushed_candles(
    start: StartGateway, sandbox: Sandbox, clock: FakeClock, redis: RedisServer
) -> None:
    """A close costs no replica a call."""
    await sandbox.set("bybit", push_ms=20)
    lives = [await start(redis_url=redis.url) for _ in range(2)]
    move_to(clock, 40)
    for live in lives:
        topic = await watch(live, clock, "bybit")
    before = calls(sandbox, "bybit")
    close = int(clock.time()) // 60 * MINUTE + MINUTE
    for live in lives:
        await pass_until(live, clock, topic, close / 1000 - 1)
    clock.advance(close / 1000 - clock.time() + 0.2)
    for live in lives:
        await until_closed(live, "bybit", BTC, close)
    assert calls(sandbox, "bybit") == before


OLD = [0, 1.0, 2.0, 1.0, 2.0, 5.0]
GROWING = [MINUTE, 2.0, 3.0, 2.0, 3.0, 1.0]
FINAL = [MINUTE, 2.0, 4.0, 2.0, 4.0, 9.0]
NEXT = [2 * MINUTE, 4.0, 4.0, 4.0, 4.0, 1.0]


@pytest.mark.parametrize(
    ("rows", "closed_until", "merged", "merged_until"),
    [
        ([GROWING], MINUTE, [OLD, GROWING], MINUTE),
        ([FINAL], 2 * MINUTE, [OLD, FINAL], 2 * MINUTE),
        ([FINAL, NEXT], 2 * MINUTE, [FINAL, NEXT], 2 * MINUTE),
        ([NEXT], 2 * MINUTE, None, 0),  # the final state of the candle before is missing
        ([[0, 9.0, 9.0, 9.0, 9.0, 9.0]], MINUTE, [OLD, GROWING], MINUTE),  # late
    ],
)
def test_pushed_candles_are_added_in_order(
    rows: list[Any], closed_until: int, merged: list[Any] | None, merged_until: int
) -> None:
    """A series never has a candle that may not be final, except the newest."""
    series = {"timeframe": "1m", "candles": [OLD, GROWING], "closed_until": MINUTE, "stale": False}
    pushed = {"candles": rows, "closed_until": closed_until, "fetched_at": 1}
    assert merge(series, pushed, 2) is (merged is not None)
    if merged is not None:
        assert (series["candles"], series["closed_until"]) == (merged, merged_until)
        assert list(series)[-1] == "stale"
