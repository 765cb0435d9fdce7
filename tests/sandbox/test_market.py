"""The market model: trades, candles, tickers and books of a market agree exactly."""

import sys
from decimal import Decimal
from types import FrameType

import pytest

from src.sandbox.market import Fields, Market, Pair

NOON = 1_767_268_830.25
MINUTE, FIVE_MINUTES, HOUR, DAY, WEEK = 60, 300, 3_600, 86_400, 604_800
MONDAY = 4 * DAY
PAIRS = [
    Pair(*names) for names in [("BTC", "USDT"), ("SHIB", "USDT"), ("ETH", "BTC"), ("USDC", "USDT")]
]
TIMES = [NOON, NOON // MINUTE * MINUTE, NOON // DAY * DAY, NOON // MINUTE * MINUTE - 0.5]


def joined(rows: list[Fields]) -> list[str | Decimal]:
    """Return open, high, low, close and volume of consecutive candles."""
    high, low, volume = (
        combine([Decimal(row[name]) for row in rows])
        for name, combine in (("high", max), ("low", min), ("volume", sum))
    )
    return [rows[0]["open"], high, low, rows[-1]["close"], volume]


def as_candle(trade: Fields) -> Fields:
    prices = dict.fromkeys(("open", "high", "low", "close"), trade["price"])
    return {**prices, "volume": trade["amount"]}


@pytest.mark.parametrize("now", TIMES)
@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair.id)
def test_candles_equal_their_trades(pair: Pair, now: float) -> None:
    """Complete and growing candles have exactly the prices and the volume of their trades."""
    market = Market(now, 1.00015)
    for seconds in (MINUTE, FIVE_MINUTES):
        for number in market.periods(seconds, 4):
            start = number * seconds
            numbers = range(start * 2, (start + seconds) * 2)
            trades = [market.trade(pair, number) for number in numbers if number / 2 <= now]
            expected = joined([as_candle(trade) for trade in trades])
            candle = market.candle(pair, number, seconds)
            assert joined([candle]) == expected
            assert candle["count"] == len(trades)


@pytest.mark.parametrize("now", TIMES)
@pytest.mark.parametrize(
    ("length", "part"),
    [
        (FIVE_MINUTES, MINUTE),
        (HOUR, MINUTE),
        (4 * HOUR, HOUR),
        (DAY, HOUR),
        (WEEK, HOUR),
        (WEEK, DAY),
    ],
)
def test_long_candles_equal_short_ones(length: int, part: int, now: float) -> None:
    """Each timeframe is the sum of a shorter one, also in weeks from Monday."""
    market = Market(now, 0.9998, week_offset=MONDAY)
    for pair in PAIRS:
        for number in market.periods(length, 3):
            start = number * length + market.offset(length)
            parts = range(start // part, (start + length) // part)
            rows = [market.candle(pair, k, part) for k in parts if k * part <= now]
            assert joined([market.candle(pair, number, length)]) == joined(rows)


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair.id)
def test_ticker_and_book_surround_the_last_trade(pair: Pair) -> None:
    """The last price is that of the last trade. The figures of a day are those of its candles."""
    for second in range(20):
        market = Market(NOON + second * 0.3)
        ticker = market.ticker(pair)
        book = market.book(pair, 5, market.step)
        bid, ask = next(iter(book.bids)), next(iter(book.asks))
        assert ticker["last"] == market.trade(pair, int(market.now * 2))["price"]
        assert (ticker["bid"], ticker["ask"]) == (bid, ask)
        assert float(bid) < float(ticker["last"]) < float(ask)
    minutes = [market.candle(pair, number, MINUTE) for number in market.periods(MINUTE, 1_441)]
    _, high, low, _, volume = joined(minutes)
    assert [Decimal(ticker[name]) for name in ("high", "low", "volume")] == [high, low, volume]
    today = market.candle(pair, market.periods(DAY, 1)[0], DAY)
    assert (
        joined([today])[1:]
        == joined(
            [{name: ticker[f"today_{name}"] for name in ("open", "high", "low", "close", "volume")}]
        )[1:]
    )
    assert ticker["today_open"] == today["open"]


def test_price_is_applied_to_the_whole_history() -> None:
    """A factor multiplies the prices of trades and candles, and changes no volume."""
    pair = PAIRS[0]
    before, after = Market(NOON), Market(NOON, shift=1.05)
    for seconds in (MINUTE, DAY):
        number = before.periods(seconds, 1)[0]
        old, new = (market.candle(pair, number, seconds) for market in (before, after))
        for name in ("open", "high", "low", "close"):
            assert float(new[name]) == pytest.approx(float(old[name]) * 1.05, rel=1e-5)
        assert new["volume"] == old["volume"]


@pytest.mark.parametrize(("seconds", "most"), [(MINUTE, 80), (HOUR, 60), (DAY, 60), (WEEK, 300)])
def test_candles_need_few_function_calls(seconds: int, most: int) -> None:
    """1,000 candles of a market that was not requested before need few function calls each."""
    calls = 0

    def count(_frame: FrameType, event: str, _argument: object) -> None:
        nonlocal calls
        calls += event == "call"

    market = Market(NOON)
    pair = Pair(f"NEW{seconds}", "USDT")
    sys.setprofile(count)
    try:
        rows = [market.candle(pair, number, seconds) for number in market.periods(seconds, 1_000)]
    finally:
        sys.setprofile(None)
    assert len(rows) == 1_000
    assert calls < 1_000 * most
