"""Subscriptions stay within the limits that exchanges set for their sockets."""

from collections.abc import AsyncIterator
from typing import Any

import pytest

from src.exchanges.profiles import PROFILES, SocketLimits
from src.sandbox.server import Sandbox
from src.streams.topics import Topic
from tests.conftest import FakeClock, Live, StartGateway, eventually
from tests.streams.test_hub import Join, inside, join, time_passes

__all__ = ["join"]
SYMBOLS = [f"F{number:04d}/USDT" for number in range(1, 101)]


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
