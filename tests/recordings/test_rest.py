"""Every number that REST serves is that of the recording."""

from collections.abc import Iterator
from typing import Any

import pytest

from src.exchanges.profiles import PROFILES
from tests.conftest import Live
from tests.recordings import expected
from tests.recordings.expected import check
from tests.recordings.recording import Recording, of_kind
from tests.recordings.serving import gateway, symbols

MAX_SYMBOLS = 100  # of one request
MAX_LEVELS = 200
MAX_REQUESTED_LEVELS = 500  # Binance's futures accept no number between 100 and 500
MAX_ROWS = 1000


def batches(items: list[str], size: int) -> Iterator[list[str]]:
    """Yield parts of a list."""
    for start in range(0, len(items), size):
        yield items[start : start + size]


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
        names = symbols(replay, recording.exchange, recording.type, recording.rows)
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
        (symbol,) = symbols(replay, recording.exchange, recording.type, [recording.id]).values()
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
        (symbol,) = symbols(replay, recording.exchange, recording.type, [recording.id]).values()
        timeframe = recording.timeframe
        path = f"/ohlcv/{symbol}"
        answer = await ask(live, recording, path, limit=MAX_ROWS, timeframe=timeframe)
        # The recording of Kraken has one candle more than its documented 720.
        most = PROFILES[recording.exchange].candle_page
        recorded = expected.candles(recording)[-most:]
        assert answer["candles"] == [[row[0], *map(float, row[1:])] for row in recorded]
        client = live.gateway.manager[recording.exchange].client
        assert answer["candles"] == await client.fetch_ohlcv(symbol, timeframe, limit=most)


@pytest.mark.parametrize("recording", of_kind("trades"))
async def test_trades_are_served_as_recorded(recording: Recording) -> None:
    """All trades are served, oldest first. ccxt reads the same values."""
    async with gateway(recording) as (live, replay):
        (symbol,) = symbols(replay, recording.exchange, recording.type, [recording.id]).values()
        served = (await ask(live, recording, f"/trades/{symbol}", limit=MAX_ROWS))["trades"]
        recorded = expected.trades(recording)
        assert len(served) == len(recorded)
        pairs = zip(served, recorded, strict=True)
        check(expected.differences(symbol, trade, row) for trade, row in pairs)
        raw = await live.gateway.manager[recording.exchange].client.fetch_trades(symbol)
        pairs = zip(served, raw, strict=True)
        check(expected.contradictions(symbol, trade, row) for trade, row in pairs)
