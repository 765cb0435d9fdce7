"""Requests for different numbers of rows share one upstream call and one entry."""

import asyncio
import random
from itertools import pairwise

import pytest

from src.cache.entry import etag_of
from src.exchanges.profiles import PROFILES
from src.sandbox.server import Sandbox
from src.streams.topics import MAX_LEVELS
from tests.conftest import FakeClock, StartGateway
from tests.web.test_fast_path import Counted

EXCHANGES = tuple(PROFILES)
SYMBOLS = ("BTC-USDT", "BTC-USDT:USDT")


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("symbol", SYMBOLS)
async def test_fifty_limits_of_a_book_share_one_call(
    start: StartGateway, sandbox: Sandbox, exchange: str, symbol: str
) -> None:
    """Each client gets the best levels that it asked for, on the app's and on the fast path."""
    live = await start(market_types="spot,swap")
    if exchange == "kraken" and ":" in symbol:
        pytest.skip("kraken has no swaps")
    path = f"/orderbook/{symbol}?exchange={exchange}"
    limits = list(range(1, 51))
    random.shuffle(limits)
    answers = await asyncio.gather(*(live.get(f"{path}&limit={limit}") for limit in limits))
    whole = (await live.get(f"{path}&limit=50")).json()
    for limit, answer in zip(limits, answers, strict=True):
        book = answer.json()
        assert book == whole | {"bids": whole["bids"][:limit], "asks": whole["asks"][:limit]}
        assert answer.headers["ETag"] == etag_of(answer.content)
        repeated = await live.get(f"{path}&limit={limit}")
        assert repeated.content == answer.content
        assert repeated.headers["ETag"] == answer.headers["ETag"]
    assert sandbox.count(exchange) == 1


@pytest.mark.parametrize("exchange", EXCHANGES)
async def test_ten_limits_of_trades_share_one_call(
    start: StartGateway, sandbox: Sandbox, exchange: str
) -> None:
    """Each client gets the newest trades that it asked for."""
    live = await start()
    path = f"/trades/BTC-USDT?exchange={exchange}"
    limits = range(5, 55, 5)
    answers = await asyncio.gather(*(live.get(f"{path}&limit={limit}") for limit in limits))
    lists = [answer.json()["trades"] for answer in answers]
    assert [len(trades) for trades in lists] == list(limits)
    assert all(long[-len(short) :] == short for short, long in pairwise(lists))
    assert sandbox.count(exchange) == 1


async def test_fast_path_cuts_an_entry_once(start: StartGateway, clock: FakeClock) -> None:
    """Repeated requests share the cut; a new entry is cut again; If-None-Match has its own tag."""
    live = await start()
    passed_on = Counted(live)
    path = "/orderbook/BTC-USDT?limit=7"
    tag = (await live.get(path)).headers["ETag"]
    whole_tag = (await live.get("/orderbook/BTC-USDT?limit=50")).headers["ETag"]
    assert tag != whole_tag
    first, second = [(await live.get(path)).content for _ in range(2)]
    assert first == second
    assert (await live.get(path, headers={"If-None-Match": tag})).status_code == 304
    assert (await live.get(path, headers={"If-None-Match": whole_tag})).status_code == 200
    assert passed_on.count == 2
    entry = live.gateway.find_in_memory(live.gateway.find_keys("orderbook", "BTC-USDT", None, (7,)))
    assert entry is not None
    assert list(entry.views) == [(7,)]
    clock.advance(2.5)
    assert (await live.get(path)).headers["ETag"] != tag


async def test_stale_answers_are_cut(
    start: StartGateway, sandbox: Sandbox, clock: FakeClock
) -> None:
    """An answer that is stale has the number of rows that was asked for, and says so."""
    live = await start()
    await live.get("/orderbook/BTC-USDT?limit=50&exchange=bybit")
    clock.advance(3)
    await sandbox.set("bybit", status=503)
    book = (await live.get("/orderbook/BTC-USDT?limit=3&exchange=bybit")).json()
    assert (len(book["bids"]), len(book["asks"]), book["stale"]) == (3, 3, True)


def test_every_stream_of_books_serves_requests() -> None:
    """A pushed book has the size that REST requests for so many levels."""
    for profile in PROFILES.values():
        for is_swap in (False, True):
            assert profile.size("orderbook", MAX_LEVELS, is_swap=is_swap) == MAX_LEVELS
