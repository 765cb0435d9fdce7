"""The full recorded market lists fit in memory, and all of their tickers in the budgets."""

import math
import tracemalloc
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from src.exchanges.ccxt_client import ClientOptions, load_snapshot, restore_markets
from src.exchanges.http_client import MAX_MARKETS_BYTES, Answer
from src.exchanges.manager import batch_size, is_swap
from src.exchanges.markets import Markets
from tests.conftest import FakeClock, Live, eventually, make_settings, serve
from tests.recordings.recording import every_recording
from tests.recordings.replay import ONLINE, Replay
from tests.recordings.test_rest import MAX_SYMBOLS, batches

# The largest recorded list of each exchange and market type, and one with tickers of each.
RECORDINGS = {
    "binance_spot_exchangeInfo_2021-10",
    "bn_spot_2020_ticker24",
    "bn_fut_2026_exchangeInfo",
    "bn_fut_2020_ticker24",
    "by_spot_2026_instruments",
    "by_spot_2023_tickers",
    "by_linear_2026_instruments",
    "by_linear_2023_tickers",
    "kr_2026_AssetPairs",
    "kr_2026_Ticker",
}
# Markets with live prices: Binance lists 1,695 and 705, Bybit 557 and 800 with 40 futures.
COUNTS = {"binance": 1262 + 586, "bybit": 557 + 760, "kraken": 1273}
MAX_MEGABYTES = 30  # of about 4,400 markets in memory
BUDGETS = {"binance_budget": "6000/60", "bybit_budget": "600/5", "kraken_budget": "5/5"}


@pytest.fixture
async def replay() -> AsyncIterator[Replay]:
    chosen = [recording for recording in every_recording() if recording.name in RECORDINGS]
    if not chosen:
        pytest.skip("there are no recordings of live exchanges (VIRTUOSO_RECORDINGS)")
    async with Replay(chosen, as_recorded=True, every_ticker=True) as server:
        yield server


@asynccontextmanager
async def full_gateway(
    replay: Replay, exchange: str = "binance"
) -> AsyncIterator[tuple[Live, FakeClock]]:
    """Start a gateway that loads all lists through its child process.

    Its time is that of the exchange's recorded tickers: much later, markets would count as halted.
    """
    tickers = [recording for recording in replay.recordings if recording.kind == "ticker"]
    times = [recording.ms for recording in tickers if recording.exchange == exchange]
    clock = FakeClock(max(times) / 1000)
    settings = make_settings(None, market_types="spot,swap", **replay.settings, **BUDGETS)
    async with serve(settings, clock, load_markets=True) as live:
        await eventually(lambda: len(live.gateway.markets.loaded_at) == len(ONLINE))
        yield live, clock


async def test_full_lists_are_loaded_and_every_symbol_is_found(replay: Replay) -> None:
    """Each listed symbol, also 测试测试/USDT:USDT, leads to one market with its own id."""
    async with full_gateway(replay) as (live, _):
        markets = live.gateway.markets
        assert {name: markets.count(name) for name in ONLINE} == COUNTS
        for name in ONLINE:
            listed = (await live.get(f"/markets?exchange={name}")).json()["markets"]
            ids = {(market["type"], market["ids"][name]) for market in listed}
            assert len(ids) == COUNTS[name]
            for market in listed:
                for text in (market["symbol"], market["symbol"].replace("/", "-").lower()):
                    (key,) = live.gateway.find_keys("ticker", text, name)
                    assert key.symbol == market["symbol"]


async def test_full_lists_take_little_memory(replay: Replay) -> None:
    """The memory of all lists together is bounded."""
    settings = make_settings(None, market_types="spot,swap", **replay.settings)
    snapshots = {}
    for name in ONLINE:
        options = ClientOptions.from_settings(name, settings)
        snapshots[name] = await load_snapshot(options, Answer(max_bytes=MAX_MARKETS_BYTES), 1.0)
    markets = Markets(ONLINE, ("spot", "swap"))
    tracemalloc.start()
    try:
        kept = {name: await restore_markets(object(), snapshots[name]) for name in ONLINE}
        for name, loaded in kept.items():
            assert loaded is not None
            markets.replace(name, loaded.markets.values(), loaded.loaded_at)
        megabytes = tracemalloc.get_traced_memory()[0] / 1e6
    finally:
        tracemalloc.stop()
    assert {name: markets.count(name) for name in ONLINE} == COUNTS
    assert megabytes < MAX_MEGABYTES


@pytest.mark.parametrize("name", ONLINE)
async def test_all_symbols_are_served_in_batches_within_the_budget(
    replay: Replay, name: str
) -> None:
    """No batch exceeds the documented budget, and each ticker has the recorded price or none."""
    async with full_gateway(replay, name) as (live, clock):
        limiter = live.gateway.manager.limiter
        budget = live.gateway.settings.exchanges[name].budget
        symbols = [market["symbol"] for market in live.gateway.markets.select(name, None, None)]
        served = 0
        replay.calls.clear()
        for batch in batches(sorted(symbols, key=is_swap), MAX_SYMBOLS):
            parameters = {"exchange": name, "symbols": ",".join(batch)}
            answer = (await live.get("/tickers", params=parameters)).json()
            assert {error["code"] for error in answer["errors"].values()} <= {"market_halted"}
            assert limiter.used_ratio(name) <= 1
            served += len(answer["tickers"])
            clock.advance(budget[1] / 2)
        assert served > 0.9 * COUNTS[name]
        most = len(ONLINE) * math.ceil(len(symbols) / batch_size(name))
        assert sum(replay.calls.values()) <= most


async def test_symbols_that_are_not_ascii_work_everywhere(replay: Replay) -> None:
    """Binance's futures have listed 测试测试USDT."""
    symbol = "测试测试/USDT:USDT"
    async with full_gateway(replay) as (live, _):
        answer = (await live.get(f"/tickers?symbols={symbol}")).json()
        assert list(answer["tickers"]) == [symbol]
        for text in (symbol, "%E6%B5%8B%E8%AF%95%E6%B5%8B%E8%AF%95-USDT:USDT"):
            answer = (await live.get(f"/ticker/{text}")).json()
            assert answer["symbol"] == symbol
            stream = live.client.stream("GET", f"{live.url}/stream/{text}")
            async with stream as response:
                assert response.status_code == 200
