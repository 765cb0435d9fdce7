"""Subscriptions stay within the limits that exchanges set for their sockets."""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from src.exchanges.profiles import PROFILES, SocketLimits
from src.sandbox.server import Sandbox
from src.streams.dialer import Dialer
from src.streams.topics import Topic
from tests.conftest import FakeClock, Live, StartGateway, eventually
from tests.streams.test_hub import BTC, Join, inside, join, time_passes

__all__ = ["join"]
SYMBOLS = [f"F{number:04d}/USDT" for number in range(1, 101)]


async def subscribe_all(live: Live, join: Join, exchange: str) -> None:
    """Watch the tickers and order books of 100 symbols, and wait until all are pushed."""
    for channel in ("ticker", "book"):
        client = await join(live)
        await client.subscribe(*SYMBOLS, channel=channel, exchange=exchange)
    await eventually(lambda: all(times(live)))


def times(live: Live) -> list[float]:
    """Return the time of the last message of each topic, 0 before the first one."""
    return [state.liveness.last_message_at or 0.0 for state in inside(live).topics.values()]


async def seconds_until(clock: FakeClock, condition: Callable[[], object]) -> float:
    """Advance the clock in real time until a condition is true. Return the seconds."""
    started = clock.monotonic()
    while not condition():
        clock.advance(0.1)
        await asyncio.sleep(0.1)
    return clock.monotonic() - started


@pytest.fixture
async def sandbox(clock: FakeClock) -> AsyncIterator[Sandbox]:
    """The exchanges with 100 more markets than usual."""
    exchanges = Sandbox(now=clock.time, filler=len(SYMBOLS))
    await exchanges.start()
    yield exchanges
    await exchanges.stop()


def pushed(live: Live) -> set[str]:
    """Return the symbols that have received a pushed value."""
    topics = inside(live).topics.values()
    return {state.topic.symbol for state in topics if state.liveness.last_message_at is not None}


@pytest.mark.parametrize(
    ("exchange", "channel", "messages"),
    [
        ("bybit", "ticker", 20),  # ten topics per message, and two topics per symbol
        ("bybit", "book", 10),
        ("bybit", "trades", 10),
        ("binance", "ticker", 1),
        ("kraken", "ticker", 1),
    ],
)
async def test_hundred_symbols_are_subscribed_within_the_limits(
    start: StartGateway, join: Join, sandbox: Sandbox, exchange: str, channel: str, messages: int
) -> None:
    """Messages are as large as the exchange allows, and not larger."""
    live = await start(load_markets=True, **{f"{exchange}_budget": "10000/5"})
    client = await join(live)
    await client.subscribe(*SYMBOLS, channel=channel, exchange=exchange)
    await eventually(lambda: sandbox.count(exchange, " asked") >= messages)
    if channel != "trades":
        await eventually(lambda: pushed(live) == set(SYMBOLS))
    assert sandbox.count(exchange, " asked") == messages


@pytest.mark.parametrize("exchange", ["bybit", "binance", "kraken"])
async def test_refused_symbol_does_not_affect_others(
    start: StartGateway, join: Join, sandbox: Sandbox, clock: FakeClock, exchange: str
) -> None:
    """If an exchange refuses a message because of one symbol, the others are subscribed soon."""
    live = await start(load_markets=True, **{f"{exchange}_budget": "10000/5"})
    del sandbox.listeners[exchange].exchange.spot["F0005USDT"]
    client = await join(live)
    await client.subscribe(*SYMBOLS[:40], exchange=exchange)
    refused = inside(live).topics[Topic(exchange, "ticker", "F0005/USDT")]
    await eventually(lambda: refused.liveness.refusals)
    async with time_passes(clock):
        await eventually(lambda: pushed(live) == {*SYMBOLS[:40]} - {"F0005/USDT"}, seconds=20)


async def test_full_socket_accepts_no_more_symbols(
    start: StartGateway, join: Join, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Symbols beyond the limit of a connection are not subscribed. REST has their values."""
    live = await start(load_markets=True, bybit_budget="10000/5")
    limits = SocketLimits(frame_topics=10, socket_topics=60)
    monkeypatch.setitem(PROFILES["bybit"].socket_limits, "spot", limits)
    client = await join(live)
    await client.subscribe(*SYMBOLS, exchange="bybit")
    await eventually(lambda: len(pushed(live)) == 30)

    def has_value(message: dict[str, Any]) -> bool:
        return "data" in message and message["symbol"] == SYMBOLS[-1]

    assert (await client.next(has_value))["data"]["source"] == "rest"
    assert sandbox.count("bybit", " asked") == 6


@pytest.mark.parametrize("exchange", ["bybit", "binance", "kraken"])
async def test_two_hundred_cut_streams_recover_within_five_seconds(
    start: StartGateway, join: Join, sandbox: Sandbox, clock: FakeClock, exchange: str
) -> None:
    """After an exchange cuts its sockets, all streams are pushed again within 5 s."""
    live = await start(load_markets=True, **{f"{exchange}_budget": "10000/5"})
    await sandbox.set(exchange, rate_limit=-1)
    await subscribe_all(live, join, exchange)
    clock.advance(1)
    cut_at = clock.monotonic()
    await sandbox.set(exchange, rate_limit=-1, drop="cut")
    await seconds_until(clock, lambda: sum(s.reconnects for s in inside(live).sockets.values()) > 1)
    seconds = await seconds_until(clock, lambda: min(times(live)) > cut_at)
    assert seconds < 5


@pytest.mark.parametrize("exchange", ["bybit", "binance", "kraken"])
async def test_refused_sockets_connect_soon_and_within_the_limit(
    start: StartGateway, join: Join, sandbox: Sandbox, clock: FakeClock, exchange: str
) -> None:
    """Sockets of an exchange that refuses connections take turns, and notice its return."""
    live = await start(load_markets=True)
    client = await join(live)
    for channel in ("ticker", "book", "trades"):
        await client.subscribe(BTC, channel=channel, exchange=exchange)

    def open_count() -> int:
        return sum(socket.open_count for socket in inside(live).sockets_of(exchange))

    await eventually(lambda: open_count() == 3)
    await sandbox.set(exchange, refuse=True)
    for _ in range(120):
        clock.advance(0.5)
        await asyncio.sleep(0.03)
    count, seconds = PROFILES[exchange].connection_limit
    attempts = sum(socket.reconnects for socket in inside(live).sockets_of(exchange)) - 3
    assert 2 < attempts <= max(60 / 2, count * 60 / seconds) + 3
    await sandbox.set(exchange, rate_limit=-1)
    interval = Dialer(PROFILES[exchange], clock).interval  # 4.2 s on kraken
    assert await seconds_until(clock, lambda: open_count() == 3) < interval + 3
