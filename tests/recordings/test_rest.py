"""Every number that REST serves is that of the recording."""

from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from src.exchanges.ccxt_client import ClientOptions, load_snapshot
from src.exchanges.http_client import MAX_MARKETS_BYTES, Answer
from tests.conftest import FakeClock, Live, make_settings, serve
from tests.recordings import expected
from tests.recordings.recording import NEWEST_TIME, Recording, every_recording, of_kind
from tests.recordings.replay import Replay

MAX_SYMBOLS = 100  # of one request
MAX_LEVELS = 200
MAX_REQUESTED_LEVELS = 500  # Binance's futures accept no number between 100 and 500
MAX_ROWS = 1000
MAX_SHOWN = 20  # faults in a failure

_snapshots: dict[str, bytes] = {}


@asynccontextmanager
async def gateway(recording: Recording) -> AsyncIterator[tuple[Live, Replay]]:
    """Serve one recording at its own time, with the markets of all recordings."""
    async with Replay(every_recording()) as replay:
        settings = make_settings(None, market_types="spot,swap", **replay.settings)
        for name in settings.enabled_exchanges:
            if name not in _snapshots:
                options = ClientOptions.from_settings(name, settings)
                answer = Answer(max_bytes=MAX_MARKETS_BYTES)
                _snapshots[name] = await load_snapshot(options, answer, NEWEST_TIME)
        replay.recordings = [recording]
        clock = FakeClock(recording.ms / 1000 + 1)
        async with serve(settings, clock, snapshots=_snapshots) as live:
            yield live, replay


def batches(items: list[str], size: int) -> Iterator[list[str]]:
    """Yield parts of a list."""
    for start in range(0, len(items), size):
        yield items[start : start + size]


def symbols(recording: Recording, replay: Replay, ids: Iterable[str]) -> dict[str, str]:
    """Return the canonical symbols of market ids, without those that have no market."""
    markets = replay.markets[recording.exchange, recording.type]
    names = replay.ids[recording.exchange, recording.type]
    return {
        name: expected.symbol_of(recording.exchange, recording.type, markets[names[name]])
        for name in ids
        if name in names
    }


def check(comparisons: Iterable[tuple[int, list[str]]]) -> None:
    """Fail if there are faults, or if nothing was compared."""
    results = list(comparisons)
    faults = [fault for _, found in results for fault in found]
    count = sum(count for count, _ in results)
    shown = "\n".join(faults[:MAX_SHOWN])
    assert not faults, f"{len(faults)} of {count} values are not those of the recording:\n{shown}"
    assert count


async def ask(live: Live, recording: Recording, path: str, **query: object) -> Any:
    """Request a path of the gateway."""
    params = {"exchange": recording.exchange} | {key: str(value) for key, value in query.items()}
    answer = await live.get(path, params=params)
    assert answer.status_code == 200, answer.text
    return answer.json()


@pytest.mark.parametrize("recording", of_kind("ticker"))
async def test_tickers_are_served_as_recorded(recording: Recording) -> None:
    """All recorded markets are requested in batches. ccxt reads the same values."""
    async with gateway(recording) as (live, replay):
        names = symbols(recording, replay, recording.rows)
        rows = {
            symbol: expected.ticker(recording.exchange, recording.rows[name])
            for name, symbol in names.items()
        }
        client = live.gateway.manager[recording.exchange].client
        for batch in batches(list(rows), MAX_SYMBOLS):
            answer = await ask(live, recording, "/tickers", symbols=",".join(batch))
            codes = {symbol: problem["code"] for symbol, problem in answer["errors"].items()}
            unserved = {symbol: expected.unserved_code(symbol, rows[symbol]) for symbol in batch}
            assert codes == {symbol: code for symbol, code in unserved.items() if code}
            served = answer["tickers"]
            check(expected.differences(symbol, served[symbol], rows[symbol]) for symbol in served)
            raw = await client.fetch_tickers(list(served))
            check(expected.contradictions(symbol, served[symbol], raw[symbol]) for symbol in served)


@pytest.mark.parametrize("recording", of_kind("orderbook"))
async def test_order_books_are_served_as_recorded(recording: Recording) -> None:
    """All levels of both sides are served, best first. ccxt reads the same levels."""
    async with gateway(recording) as (live, replay):
        (symbol,) = symbols(recording, replay, [recording.id]).values()
        book = await ask(live, recording, f"/orderbook/{symbol}", limit=MAX_LEVELS)
        for side, recorded in expected.levels(recording).items():
            levels = [[float(text) for text in level] for level in recorded[:MAX_LEVELS]]
            assert book[side] == levels
        client = live.gateway.manager[recording.exchange].client
        raw = await client.fetch_order_book(symbol, MAX_REQUESTED_LEVELS)
        for side in ("bids", "asks"):
            assert book[side] == [level[:2] for level in raw[side]][:MAX_LEVELS]


@pytest.mark.parametrize("recording", of_kind("ohlcv"))
async def test_candles_are_served_as_recorded(recording: Recording) -> None:
    """All candles are served, oldest first. ccxt reads the same numbers."""
    async with gateway(recording) as (live, replay):
        (symbol,) = symbols(recording, replay, [recording.id]).values()
        timeframe = recording.timeframe
        path = f"/ohlcv/{symbol}"
        answer = await ask(live, recording, path, limit=MAX_ROWS, timeframe=timeframe)
        recorded = expected.candles(recording)
        assert answer["candles"] == [[row[0], *map(float, row[1:])] for row in recorded]
        client = live.gateway.manager[recording.exchange].client
        assert answer["candles"] == await client.fetch_ohlcv(symbol, timeframe, limit=MAX_ROWS)


@pytest.mark.parametrize("recording", of_kind("trades"))
async def test_trades_are_served_as_recorded(recording: Recording) -> None:
    """All trades are served, oldest first. ccxt reads the same values."""
    async with gateway(recording) as (live, replay):
        (symbol,) = symbols(recording, replay, [recording.id]).values()
        served = (await ask(live, recording, f"/trades/{symbol}", limit=MAX_ROWS))["trades"]
        recorded = expected.trades(recording)
        assert len(served) == len(recorded)
        pairs = zip(served, recorded, strict=True)
        check(expected.differences(symbol, trade, row) for trade, row in pairs)
        raw = await live.gateway.manager[recording.exchange].client.fetch_trades(symbol)
        pairs = zip(served, raw, strict=True)
        check(expected.contradictions(symbol, trade, row) for trade, row in pairs)
