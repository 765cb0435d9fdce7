"""Models: implausible data is rejected, and no value is invented."""

import math
from typing import Any

import pytest

from src.cache.entry import encode
from src.core.errors import BadUpstreamData, MarketHalted
from src.core.models import Candles, Grid, OrderBook, Ticker, Trades
from tests.conftest import sample

NOW = 1_700_000_000_000
TICKER = {
    "symbol": "BTC/USDT",
    "last": 100.0,
    "bid": 99.0,
    "ask": 101.0,
    "baseVolume": 5.0,
    "timestamp": None,
}


def ticker(**changes: Any) -> Ticker:
    return Ticker.from_ccxt(TICKER | changes, "kraken", "BTC/USDT", NOW)


def test_plausible_ticker_keeps_its_numbers() -> None:
    """Fields that the exchange did not send are null. The timestamp is absent."""
    result = ticker(info={"secret": 1}, high=0.00001, open=None)
    document = result.model_dump(exclude_unset=True)
    assert (result.price, result.last, document["high"], document["open"]) == (
        100,
        100,
        0.00001,
        None,
    )
    assert "info" not in document
    assert "timestamp" not in document


@pytest.mark.parametrize(
    "changes",
    [
        {"last": None}, {"last": 0.0}, {"last": -1.0}, {"last": math.nan}, {"last": math.inf},
        {"last": "100"},
        {"last": True}, {"bid": 102.0}, {"symbol": "ETH/USDT"}, {"symbol": None},
    ],
    ids=str,
)  # fmt: skip
def test_implausible_ticker_is_bad_data(changes: dict[str, Any]) -> None:
    """A ticker without a finite price, with a crossed market or for another symbol is bad data."""
    with pytest.raises(BadUpstreamData):
        ticker(**changes)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, "1", True, [1]], ids=str)
@pytest.mark.parametrize("field", ["bid", "ask", "high", "vwap", "percentage", "quoteVolume"])
def test_secondary_values_that_are_not_finite_numbers_are_null(field: str, value: object) -> None:
    """The JSON body contains no NaN or Infinity."""
    body = encode(ticker(**{field: value}))
    assert f'"{field}":null'.encode() in body
    assert b"NaN" not in body
    assert b"nfinity" not in body


@pytest.mark.parametrize(
    "changes", [{"bid": 101.0, "ask": 101.0}, {"ask": 0.0}, {"bid": None}, {"bid": 0.0, "ask": 0.0}]
)
def test_missing_or_equal_bid_and_ask_are_plausible(changes: dict[str, Any]) -> None:
    """Bid and ask may be equal, and one side may have no orders."""
    assert ticker(**changes).price == 100


def test_huge_integers_are_null_or_bad_data() -> None:
    """Integers above 64 bits are null in optional fields and bad data in required fields."""
    huge = 10**30
    assert "timestamp" not in ticker(timestamp=huge).model_dump(exclude_unset=True)
    assert (
        OrderBook.from_ccxt(
            {"bids": [[1, 1]], "asks": [], "nonce": huge}, "x", "A/B", NOW, limit=1
        ).nonce
        is None
    )
    assert b"1e+30" in encode(ticker(high=float(huge)))
    assert b'"high":null' in encode(ticker(high=10**400))
    for build in (
        lambda: candles([[huge, 10.0, 12.0, 9.0, 11.0, 5.0]]),
        lambda: Trades.from_ccxt(
            [{"timestamp": huge, "price": 1.0, "amount": 1.0}], "x", "A/B", NOW
        ),
    ):
        with pytest.raises(BadUpstreamData):
            build()


@pytest.mark.parametrize("last", [None, 0.0])
def test_market_that_never_traded_has_no_price(last: float | None) -> None:
    """No price and no volume is `MarketHalted`, which does not open a breaker."""
    with pytest.raises(MarketHalted):
        ticker(last=last, baseVolume=0.0)


def test_timestamp_is_the_exchanges_own_or_absent() -> None:
    """Zero, text and None are not timestamps."""
    assert ticker(timestamp=123, datetime="1970").model_dump(exclude_unset=True)["timestamp"] == 123
    for invalid in (None, 0, "123", 1.5):
        assert "timestamp" not in ticker(timestamp=invalid).model_dump(exclude_unset=True)


def test_zero_is_not_replaced_by_null() -> None:
    """A change of zero or an amount of zero stays zero."""
    assert ticker(change=0.0, bidVolume=0).change == 0
    assert ticker(bidVolume=0).bid_volume == 0


def book(bids: object, asks: object) -> OrderBook:
    return OrderBook.from_ccxt({"bids": bids, "asks": asks}, "kraken", "BTC/USDT", NOW, limit=10)


def test_order_book_keeps_price_and_amount() -> None:
    """Rows with three elements, as Kraken sends, lose the third. Sides may be empty or equal."""
    assert (book([], []).bids, book([], []).asks) == ([], [])
    assert book([[100, 1]], [[100, 2]]).asks == [[100, 2]]
    assert book([[99, 1, 5], [98, 2, 5]], []).bids == [[99, 1], [98, 2]]
    assert len(book([[99 - level, 1] for level in range(20)], []).bids) == 10


@pytest.mark.parametrize(
    ("bids", "asks"),
    [(None, None), ([[101, 1]], [[100, 1]]), ([[None, 1]], []), ([[1]], []),
     ([[math.nan, 1]], []), ([[1, -1]], [])],
)  # fmt: skip
def test_implausible_order_book_is_bad_data(bids: object, asks: object) -> None:
    """An order book that is missing, crossed or not numeric is bad data."""
    with pytest.raises(BadUpstreamData):
        book(bids, asks)


def candles(rows: object, fetched_at: int = NOW) -> Candles:
    return Candles.from_ccxt(rows, "kraken", "BTC/USDT", fetched_at, timeframe="1m")


GOOD = [60_000, 10.0, 12.0, 9.0, 11.0, 5.0]
NEXT = [120_000, *GOOD[1:]]


def test_candles_may_be_empty() -> None:
    """No rows are data: nothing was traded."""
    assert candles([]).candles == []


@pytest.mark.parametrize(
    "row",
    [
        [60_000, 10, 9, 12, 11, 5],
        [60_000, 10, 12, 9, 0, 5],
        [60_000, None, 12, 9, 11, 5],
        GOOD[:5],
        [NOW + 86_400_000, *GOOD[1:]],
    ],
    ids=str,
)
def test_implausible_candles_are_dropped_and_counted(row: list[float]) -> None:
    """Only an answer without a plausible candle is bad data. What is missing is not final."""
    before = sample("rows_dropped_total", exchange="kraken", operation="ohlcv")
    with pytest.raises(BadUpstreamData):
        candles([row])
    kept = candles([row, NEXT])
    assert kept.candles == [NEXT]
    assert sample("rows_dropped_total", exchange="kraken", operation="ohlcv") == before + 2
    kept.set_closed(NOW, MINUTES)
    assert kept.closed_until <= max(row[0], NOW // 60_000 * 60_000)


def test_candles_are_sorted_and_the_latest_state_of_each_is_kept() -> None:
    """The volume of a candle only grows, so the largest volume is the latest state."""
    later = [*GOOD[:5], 6.0]
    assert candles([NEXT, GOOD, later]).candles == candles([later, GOOD, NEXT]).candles
    assert candles([NEXT, GOOD, later]).candles == [later, NEXT]


MINUTES = Grid(60_000)
MINUTE = 1_800_000_000_000 // 60_000 * 60_000


@pytest.mark.parametrize(
    ("requested_ms", "newest", "is_closed", "changes_ms"),
    [
        (55_000, MINUTE, True, 60_500),  # the candle grows until its close
        (60_499, MINUTE, False, 60_500),  # too early: trades of the last moment may be missing
        (60_500, MINUTE, False, 61_000),  # the answer is still that from before the close
        (60_500, MINUTE + 60_000, True, 120_500),
        (64_999, MINUTE, False, 65_499),
        (65_000, MINUTE, True, 120_500),  # nothing was traded since the close
        (58_000, MINUTE + 60_000, False, 60_500),  # our clock is late
    ],
)
def test_a_candle_is_final_after_its_close_plus_a_margin(
    requested_ms: int, newest: int, is_closed: bool, changes_ms: int
) -> None:
    """And only if a newer candle follows, or none comes for a few seconds."""
    minute = candles([[newest, *GOOD[1:]]], fetched_at=MINUTE + 60_000)
    changes_at = minute.set_closed(MINUTE + requested_ms, MINUTES)
    last_close = MINUTE + (60_000 if max(requested_ms, newest - MINUTE) >= 60_000 else 0)
    assert minute.closed_until == last_close - (0 if is_closed else 60_000)
    assert changes_at == MINUTE + changes_ms


@pytest.mark.parametrize(
    ("closed", "times", "closed_until"),
    [
        (None, [120_000], 120_000),  # how the candle before ended is not known
        (60_000, [60_000, 120_000], 120_000),
        (120_000, [120_000], 180_000),
    ],
)
def test_pushed_candles_are_those_whose_state_is_known(
    closed: int | None, times: list[int], closed_until: int
) -> None:
    """The newest candle, and the one before if the exchange has closed it."""
    raw = {"timeframe": "1m", "rows": [GOOD, NEXT], "closed": closed}
    pushed = Candles.from_push(raw, "kraken", "BTC/USDT", MINUTE + 120_000)
    assert [row[0] for row in pushed.candles] == times
    assert pushed.closed_until == closed_until


def test_weeks_start_on_the_day_of_the_exchange() -> None:
    """The epoch began on a Thursday."""
    thursday, monday, week = 20 * 604_800_000, 20 * 604_800_000 + 4 * 86_400_000, 604_800_000
    assert Grid(week).ceil(monday) == thursday + week
    assert Grid(week, 4 * 86_400_000).ceil(monday) == monday
    assert Grid(week, 4 * 86_400_000).floor(monday - 1) == monday - week


def test_trades_are_checked() -> None:
    """There may be no trades, a trade without numbers is bad data, an unknown side is null."""
    good = {"id": 7, "timestamp": NOW, "side": "buy", "price": 1.5, "amount": 2.0, "info": {}}
    result = Trades.from_ccxt(
        [good, good | {"side": "?", "id": None}], "kraken", "BTC/USDT", NOW
    ).trades
    assert (result[0].id, result[0].side, result[1].id, result[1].side) == ("7", "buy", None, None)
    assert Trades.from_ccxt([], "kraken", "BTC/USDT", NOW).trades == []
    zero: list[dict[str, Any]] = [{"price": 0}, {"amount": 0}]
    for bad in (*zero, {"price": None}, {"amount": math.nan}, {"timestamp": None}):
        with pytest.raises(BadUpstreamData):
            Trades.from_ccxt([good | bad], "kraken", "BTC/USDT", NOW)
        rows = [good, good | bad | {"id": 8}, good]
        trades = Trades.from_ccxt(rows, "kraken", "BTC/USDT", NOW).trades
        assert [trade.id for trade in trades] == ["7"]
