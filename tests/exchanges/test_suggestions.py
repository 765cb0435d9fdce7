"""What is suggested for unknown symbols, and that a request full of them does not hold up the others."""

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
MOST_OPCODES = 2000  # to find what was meant by one unknown symbol
MOST_OPCODES_IN_ALL = 8000  # per symbol of a request, with client, server and three problem documents


def full_lists(share: float = 1.0) -> dict[str, list[dict[str, Any]]]:
    """Make market lists of the size and shape of the live ones, or a share of them; always the same ones."""
    chance = Random(7)
    names = ["BTC", "ETH", *{"".join(chance.choices("ABCDEFGHIKLMNOPRSTUX", k=chance.choice((3, 3, 4, 4, 5, 6))))
                             for _ in range(2000)}]  # fmt: skip
    lists = {}
    for exchange, size in SIZES.items():
        pairs = {(base, quote) for base in names[:2] for quote in QUOTES}
        while len(pairs) < size * share:
            pairs.add((chance.choice(names[: size // 2]), chance.choice(QUOTES[:4])))
        lists[exchange] = [
            {"symbol": f"{base}/{quote}", "base": base, "quote": quote, "type": "spot", "active": True}
            for base, quote in sorted(pairs)
        ]
    return lists


def full_markets(share: float = 1.0) -> Markets:
    markets = Markets(SIZES, ("spot",))
    for exchange, listed in full_lists(share).items():
        markets.replace(exchange, listed, 0.0)
    return markets


def unknown_symbols() -> list[str]:
    """Make a hundred symbols nobody lists: an unknown quote, and bases of three, four and more letters."""
    chance, bases = Random(11), dict[str, None]()
    while len(bases) < 75:
        bases["".join(chance.choices("BCDEFGHJKT", k=3 + len(bases) % 4))] = None
    return [f"BTC/{base}Q" for base in list(bases)[:25]] + [f"{base}/USDQ" for base in bases]


@contextmanager
def counted_opcodes() -> Iterator[Callable[[], int]]:
    """Count the bytecode instructions this thread runs: a measure of work that no busy machine changes."""
    count, before = 0, sys.gettrace()

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal count
        frame.f_trace_opcodes = True
        count += event == "opcode"
        return trace

    sys.settrace(trace)
    try:
        yield lambda: count
    finally:
        sys.settrace(before)


def test_similar_spellings_are_suggested() -> None:
    """A missing, extra, wrong or swapped character in base or quote leads to the symbol that was meant."""
    markets = full_markets()
    for wrong in ("BT/USDT", "BTCC/USDT", "BTX/USDT", "BCT/USDT", "BTC/UST", "BTC/USDTT", "BTC/USBT", "BTC/USTD"):
        assert "BTC/USDT" in markets.suggestions(wrong), wrong
    assert markets.suggestions("QQQQQQQ/ZZZ") == []
    assert len(markets.suggestions("BTC/NOPE")) == MAX_SUGGESTIONS
    assert all(found.startswith("BTC/") for found in markets.suggestions("BTC/NOPE"))


def test_a_symbol_is_not_suggested_for_itself() -> None:
    """What another exchange lists under the same name is no correction."""
    assert "BTC/USDT" not in full_markets().suggestions("BTC/USDT")


@pytest.mark.parametrize("share", [0.1, 1.0])
def test_the_work_for_an_unknown_symbol_is_bounded(share: float) -> None:
    """However many markets there are, and whatever the symbol is, about as much is compared."""
    markets = full_markets(share)
    markets.suggestions("BTC/NOPE")  # once in the life of a process, the variants of all quotes are made
    worst = 0
    for symbol in [*unknown_symbols(), "A" * 24 + "/" + "B" * 24]:
        with counted_opcodes() as work:
            markets.suggestions(symbol)
        worst = max(worst, work())
    assert 0 < worst < MOST_OPCODES


def test_suggestions_are_looked_for_once() -> None:
    """A repeated symbol costs next to nothing, and what is kept of a flood of symbols is bounded."""
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


def test_joined_symbols_are_told_apart_cheaply() -> None:
    """`BTCUSDT` without a slash is compared with what is listed, not with everything that begins so."""
    markets = full_markets()
    with pytest.raises(MalformedRequest), counted_opcodes() as work:
        markets.canonical("BTC" + "Q" * 36)
    assert work() < MOST_OPCODES


@pytest.mark.parametrize(
    "path", ["/tickers?exchange=all&symbols=", "/tickers?symbols=", "/api/dashboard/data?symbols="]
)
async def test_a_batch_of_unknown_symbols_is_bounded(start: StartGateway, path: str) -> None:
    """Up to three problems per symbol, but one search for what was meant."""
    live, symbols = await full_gateway(start), unknown_symbols()
    with counted_opcodes() as work:
        answer = (await live.get(path + ",".join(symbols))).json()
    errors = answer.get("market", answer)["errors"]
    assert list(errors) == symbols
    assert sum("suggestions" in str(error) for error in errors.values()) > len(symbols) / 4
    assert work() / len(symbols) < MOST_OPCODES_IN_ALL
    assert live.gateway.markets._suggestions.cache_info().misses == len(symbols)


async def test_subscriptions_to_unknown_symbols_are_bounded(start: StartGateway) -> None:
    """A message to `/ws` with a hundred unknown symbols, and `/stream` with as many, take no more."""
    live, symbols = await full_gateway(start), unknown_symbols()
    async with connect(live.url.replace("http", "ws") + "/ws") as socket:
        with counted_opcodes() as work:
            await socket.send(orjson.dumps({"op": "subscribe", "symbols": symbols}).decode())
            answer = orjson.loads(await socket.recv())
    assert list(answer["errors"]) == symbols
    assert work() / len(symbols) < MOST_OPCODES_IN_ALL
    with counted_opcodes() as work:
        assert (await live.get(f"/stream/{','.join(reversed(symbols))}")).status_code == 404
    assert work() / len(symbols) < MOST_OPCODES_IN_ALL
