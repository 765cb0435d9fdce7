"""Suggestions for unknown symbols, and the bounded work for a request full of them."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from random import Random
from types import FrameType
from typing import Any

import orjson
import pytest
from websockets.asyncio.client import connect

from src.core.errors import MalformedRequest
from src.exchanges.markets import MAX_CACHED_SUGGESTIONS, MAX_SUGGESTIONS, Markets
from tests.conftest import Live, StartGateway

SIZES = {"bybit": 1695, "binance": 1357, "kraken": 1320}  # markets, as the live exchanges list them
QUOTES = ("USDT", "USDC", "USD", "EUR", "BTC", "ETH", "BNB", "TRY", "FDUSD", "GBP", "BRL", "DAI")
MAX_OPCODES = 2500  # for the suggestions for one unknown symbol
# Per symbol of a request, with client, server and three problem documents.
MAX_OPCODES_PER_SYMBOL = 8000


def full_lists(share: float = 1.0) -> dict[str, list[dict[str, Any]]]:
    """Return market lists of the size and shape of the live ones, or a share of them."""
    random = Random(7)
    letters = "ABCDEFGHIKLMNOPRSTUX"
    lengths = (3, 3, 4, 4, 5, 6)
    coins = {"".join(random.choices(letters, k=random.choice(lengths))) for _ in range(2000)}
    names = ["BTC", "ETH", *sorted(coins)]  # the order of a set differs by process
    lists = {}
    for exchange, size in SIZES.items():
        pairs = {(base, quote) for base in names[:2] for quote in QUOTES}
        while len(pairs) < size * share:
            pairs.add((random.choice(names[: size // 2]), random.choice(QUOTES[:4])))
        lists[exchange] = [
            {
                "symbol": f"{base}/{quote}",
                "base": base,
                "quote": quote,
                "type": "spot",
                "id": f"{base}{quote}",
                "ws_name": f"{base}{quote}",
                "status": "TRADING",
                "state": "quoted",
            }
            for base, quote in sorted(pairs)
        ]
    return lists


def full_markets(share: float = 1.0) -> Markets:
    markets = Markets(SIZES, ("spot",))
    for exchange, listed in full_lists(share).items():
        markets.replace(exchange, listed, 0.0)
    return markets


def unknown_symbols() -> list[str]:
    """Return a hundred unlisted symbols, with unknown quotes and with bases of 3 to 6 letters."""
    random = Random(11)
    bases: dict[str, None] = {}
    while len(bases) < 75:
        bases["".join(random.choices("BCDEFGHJKT", k=3 + len(bases) % 4))] = None
    return [f"BTC/{base}Q" for base in list(bases)[:25]] + [f"{base}/USDQ" for base in bases]


@contextmanager
def counted_opcodes() -> Iterator[Callable[[], int]]:
    """Count the bytecode instructions of this thread: work independent of the machine's load."""
    count = 0
    previous = sys.gettrace()

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal count
        frame.f_trace_opcodes = True
        count += event == "opcode"
        return trace

    sys.settrace(trace)
    try:
        yield lambda: count
    finally:
        sys.settrace(previous)


def test_similar_spellings_are_suggested() -> None:
    """A missing, extra, wrong or swapped character leads to the intended symbol."""
    markets = full_markets()
    for typo in (
        "BT/USDT",
        "BTCC/USDT",
        "BTX/USDT",
        "BCT/USDT",
        "BTC/UST",
        "BTC/USDTT",
        "BTC/USBT",
        "BTC/USTD",
    ):
        assert "BTC/USDT" in markets.suggestions(typo), typo
    assert markets.suggestions("QQQQQQQ/ZZZ") == []
    assert len(markets.suggestions("BTC/NOPE")) == MAX_SUGGESTIONS
    assert all(found.startswith("BTC/") for found in markets.suggestions("BTC/NOPE"))


def test_symbol_is_not_suggested_for_itself() -> None:
    """A symbol that another exchange lists is not suggested for itself."""
    assert "BTC/USDT" not in full_markets().suggestions("BTC/USDT")


@pytest.mark.parametrize("share", [0.1, 1.0])
def test_work_for_an_unknown_symbol_is_bounded(share: float) -> None:
    """The work depends neither on the number of markets nor on the symbol."""
    markets = full_markets(share)
    markets.suggestions("BTC/NOPE")  # computes the variants of all quotes, once per process
    most = 0
    for symbol in [*unknown_symbols(), "A" * 24 + "/" + "B" * 24]:
        with counted_opcodes() as work:
            markets.suggestions(symbol)
        most = max(most, work())
    assert 0 < most < MAX_OPCODES


def test_suggestions_are_cached() -> None:
    """A repeated symbol costs almost no work. The cache is bounded."""
    markets = full_markets()
    first = markets.suggestions("BTCC/USDT")
    with counted_opcodes() as work:
        assert markets.suggestions("BTCC/USDT") == first
    assert work() < 50
    first.clear()
    assert markets.suggestions("BTCC/USDT")
    for number in range(MAX_CACHED_SUGGESTIONS + 10):
        markets.suggestions(f"BTC{number}/USDT")
    assert markets._suggestions.cache_info().currsize == MAX_CACHED_SUGGESTIONS


async def full_gateway(start: StartGateway) -> Live:
    live = await start()
    for exchange, listed in full_lists().items():
        live.gateway.markets.replace(exchange, listed, live.gateway.clock.time())
    return live


def test_work_for_a_joined_symbol_is_bounded() -> None:
    """A text such as `BTCUSDT` is split and looked up, not compared with every symbol."""
    markets = full_markets()
    with pytest.raises(MalformedRequest), counted_opcodes() as work:
        markets.canonical("BTC" + "Q" * 36)
    assert work() < MAX_OPCODES


@pytest.mark.parametrize(
    "path", ["/tickers?exchange=all&symbols=", "/tickers?symbols=", "/api/dashboard/data?symbols="]
)
async def test_work_for_a_batch_of_unknown_symbols_is_bounded(
    start: StartGateway, path: str
) -> None:
    """Suggestions are computed once per symbol, even if three exchanges report it."""
    live = await full_gateway(start)
    symbols = unknown_symbols()
    with counted_opcodes() as work:
        answer = (await live.get(path + ",".join(symbols))).json()
    errors = answer.get("market", answer)["errors"]
    assert list(errors) == symbols
    assert sum("suggestions" in str(error) for error in errors.values()) > len(symbols) / 4
    assert work() / len(symbols) < MAX_OPCODES_PER_SYMBOL
    assert live.gateway.markets._suggestions.cache_info().misses == len(symbols)


async def test_work_for_unknown_subscriptions_is_bounded(start: StartGateway) -> None:
    """The same limit holds for a hundred unknown symbols in a message to `/ws` or in `/stream`."""
    live = await full_gateway(start)
    symbols = unknown_symbols()
    async with connect(live.url.replace("http", "ws") + "/ws") as socket:
        with counted_opcodes() as work:
            await socket.send(orjson.dumps({"op": "subscribe", "symbols": symbols}).decode())
            answer = orjson.loads(await socket.recv())
    assert list(answer["errors"]) == symbols
    assert work() / len(symbols) < MAX_OPCODES_PER_SYMBOL
    with counted_opcodes() as work:
        assert (await live.get(f"/stream/{','.join(reversed(symbols))}")).status_code == 404
    assert work() / len(symbols) < MAX_OPCODES_PER_SYMBOL
