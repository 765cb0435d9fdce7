"""Models of the market data that clients receive, built from ccxt's unified dicts.

ccxt reports success with empty fields if an exchange sends an empty, incomplete or unrelated body.
So each `from_ccxt` checks that the data is plausible, and raises `BadUpstreamData` before
implausible data reaches the cache. Prices are floats in the quote currency, amounts are floats in
the base currency, times are UTC milliseconds.
"""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Annotated, Any, Literal, NamedTuple, Self

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr

from src.core import metrics
from src.core.errors import BadUpstreamData, MarketHalted

TIMEFRAMES = {  # seconds
    "1m": 60, "5m": 300, "15m": 900, "30m": 1800, "1h": 3600, "4h": 14400, "1d": 86400,
    "1w": 604800,
}  # fmt: skip
MAX_NUMBER = 1e300  # sums of larger numbers overflow; no market has them
MAX_INTEGER = 2**53  # JSON clients cannot represent all larger integers; no time or nonce is larger
HALTED_MS = 900_000  # a market without orders and without trades for so long is halted
# Exchanges finalise a candle up to some hundred milliseconds after its close. A candle is final if
# it was requested later than this, and if a newer candle follows or none could be expected.
CLOSE_MARGIN_MS = 500
# Without a newer candle, a close is certain after this time: nothing was traded since.
QUIET_CLOSE_MS = 5_000
RETRY_MS = 500  # until the next request, while an answer after a close is from before the close
MAX_AHEAD_MS = 3_600_000  # a candle that starts further ahead of our clock is implausible
Raw = Mapping[str, Any]  # a dict of ccxt
Level = Annotated[list[float], Field(min_length=2, max_length=2)]  # price, amount
Candle = Annotated[list[int | float], Field(min_length=6, max_length=6)]


def _describe_as_sent(schema: dict[str, Any]) -> None:
    """Correct a generated JSON schema: members with the default None are absent instead of null.

    All other members are required.
    """
    schema["required"] = []
    for name, member in schema["properties"].items():
        member.pop("title", None)  # a generated title such as "Bidvolume"
        if member.pop("default", ...) is not None:
            schema["required"].append(name)
        else:
            (kind,) = (kind for kind in member.pop("anyOf") if kind != {"type": "null"})
            member |= kind


class Document(BaseModel):
    """A JSON object for clients. Its JSON schema allows no further members."""

    model_config = ConfigDict(
        extra="forbid", json_schema_extra=_describe_as_sent, use_attribute_docstrings=True
    )


class MarketData(Document):
    """Members of all answers about one market."""

    model_config = ConfigDict(populate_by_name=True, serialize_by_alias=True)

    symbol: str
    """Canonical symbol, such as `BTC/USDT`, or `BTC/USDT:USDT` for a swap."""
    exchange: str
    """The exchange that sent the data."""
    fetched_at: int
    """When the gateway received the data, in UTC milliseconds."""
    requested_at: int | None = None
    """When the gateway requested the data, in UTC milliseconds. Absent if it was pushed."""
    server_time: int | None = None
    """When the exchange answered the request, in UTC milliseconds of its clock.

    Whole seconds if only the HTTP header has it. Absent if the data was pushed."""
    timestamp: int | None = None
    """The exchange's own time of the data in UTC milliseconds. Absent if the exchange sent none."""
    source: Literal["rest", "stream"] = "rest"
    """`rest`: the gateway requested the data. `stream`: the exchange pushed it."""
    stale: bool = False
    """True if the data is older than its TTL because no newer data is available."""


class Ticker(MarketData):
    """Price and 24-hour statistics of one market. Fields are those of ccxt, and `price`."""

    price: float
    """Last traded price, the same as `last`."""
    datetime: str | None = None
    """`timestamp` in ISO 8601. Absent if there is no timestamp."""
    last: float | None
    close: float | None
    bid: float | None
    bid_volume: float | None = Field(alias="bidVolume")
    ask: float | None
    ask_volume: float | None = Field(alias="askVolume")
    open: float | None
    high: float | None
    low: float | None
    vwap: float | None
    previous_close: float | None = Field(alias="previousClose")
    """Price of the last trade before `open`."""
    change: float | None
    percentage: float | None
    """Change over 24 hours in percent."""
    average: float | None
    base_volume: float | None = Field(alias="baseVolume")
    quote_volume: float | None = Field(alias="quoteVolume")
    mark_price: float | None = Field(alias="markPrice")
    index_price: float | None = Field(alias="indexPrice")
    last_trade_at: int | None = None
    """Time of the last trade in UTC milliseconds. Absent if the exchange does not send it."""

    @classmethod
    def from_ccxt(cls, raw: Raw, exchange: str, symbol: str, fetched_at: int) -> Self:
        """Convert a ccxt ticker. Values that are not finite numbers become None.

        Raises `MarketHalted` if the market has no current price, and `BadUpstreamData` if the
        ticker is for another symbol, has no price or a bid above the ask.
        """
        values: dict[str, Any] = {name: _to_number(raw.get(name)) for name in _TICKER_NUMBERS}
        if raw.get("symbol") != symbol:
            raise _bad_data(exchange, symbol, "answered for another symbol")
        for side in ("bid", "ask"):
            if not values[side]:  # 0 means that there are no orders
                values |= {side: None, f"{side}Volume": None}
        _check_prices(exchange, symbol, values)
        traded_at = _to_positive_integer(raw.get("lastTradeTimestamp"))
        if values["bid"] is None and values["ask"] is None:
            _check_not_halted(exchange, symbol, traded_at, values["baseVolume"], fetched_at)
        values |= {"symbol": symbol, "exchange": exchange, "fetched_at": fetched_at}
        values["price"] = values["last"]
        if traded_at:
            values["last_trade_at"] = traded_at
        if timestamp := _to_positive_integer(raw.get("timestamp")):
            values |= {"timestamp": timestamp, "datetime": raw.get("datetime")}
        return cls.model_validate(values)


_OWN_FIELDS = {*MarketData.model_fields, "price", "datetime", "last_trade_at"}
_TICKER_NUMBERS = tuple(
    field.alias or name for name, field in Ticker.model_fields.items() if name not in _OWN_FIELDS
)


class OrderBook(MarketData):
    """Bids and asks as `[price, amount]`, best price first."""

    bids: list[Level]
    asks: list[Level]
    nonce: int | None = None
    """The exchange's sequence number. Absent if the exchange sent none."""

    @classmethod
    def from_ccxt(cls, raw: Raw, exchange: str, symbol: str, fetched_at: int, limit: int) -> Self:
        """Convert the best `limit` levels of a ccxt order book.

        Raises `BadUpstreamData` if the book is crossed or not numeric. A halted market has an empty
        book, and in an auction the best bid may equal the best ask.
        """
        bids = _to_levels(raw.get("bids"), exchange, symbol)[:limit]
        asks = _to_levels(raw.get("asks"), exchange, symbol)[:limit]
        if bids and asks and bids[0][0] > asks[0][0]:
            raise _bad_data(exchange, symbol, "sent a crossed order book")
        numbers = {name: _to_positive_integer(raw.get(name)) for name in ("timestamp", "nonce")}
        values: dict[str, Any] = {name: number for name, number in numbers.items() if number}
        values |= {"symbol": symbol, "exchange": exchange, "fetched_at": fetched_at}
        return cls(bids=bids, asks=asks, **values)


class Grid(NamedTuple):
    """The starts of an exchange's candles of one timeframe. Times are UTC milliseconds."""

    length: int
    offset: int = 0
    """The start of any candle."""

    def floor(self, time: int) -> int:
        """Return the start of the candle that `time` belongs to."""
        return time - (time - self.offset) % self.length

    def ceil(self, time: int) -> int:
        """Return the first start of a candle that is not before `time`."""
        return self.floor(time + self.length - 1)


class Candles(MarketData):
    """Candles as `[time, open, high, low, close, volume]`, oldest first.

    A period without a candle had no trades, as far as the exchange says. Nothing is interpolated.
    """

    timeframe: str
    candles: list[Candle]
    closed_until: int = 0
    """Candles that start before this time (UTC milliseconds) are final. 0 if none is."""
    earliest: int | None = None
    """Start of the first candle that the exchange has, if that is later than `since`."""
    _dropped_from: int = PrivateAttr(MAX_INTEGER)
    """Start of the first implausible candle: what follows is not final, because it is missing."""

    @classmethod
    def from_ccxt(
        cls, raw: Any, exchange: str, symbol: str, fetched_at: int, timeframe: str
    ) -> Self:
        """Convert ccxt's OHLCV rows, in any order. No rows are data as well.

        Of rows with the same time, the one with the largest volume is the latest. Implausible rows
        are dropped and counted. Raises `BadUpstreamData` if all rows are implausible.
        """
        rows: dict[int, list[int | float]] = {}
        dropped_from = MAX_INTEGER
        for row in raw:
            candle = _to_candle(row, fetched_at + MAX_AHEAD_MS)
            if candle is None:
                metrics.rows_dropped_total.labels(exchange, "ohlcv").inc()
                dropped_from = min(dropped_from, _to_positive_integer(row[0]) or 0)
            elif candle[5] >= rows.get(int(candle[0]), candle)[5]:
                rows[int(candle[0])] = candle
        if raw and not rows:
            raise _bad_data(exchange, symbol, "sent implausible candles")
        values: dict[str, Any] = {"symbol": symbol, "exchange": exchange, "fetched_at": fetched_at}
        candles = [rows[time] for time in sorted(rows)]
        built = cls(timeframe=timeframe, candles=candles, **values)
        built._dropped_from = dropped_from
        return built

    def set_closed(self, requested_at: int, grid: Grid) -> int:
        """Set `closed_until`. Return when the candles change next, in UTC milliseconds.

        `requested_at` is the time of the request on the exchange's clock.
        """
        newest = int(self.candles[-1][0]) if self.candles else 0
        closed_until, changes_at = closing_times(newest, requested_at, grid)
        self.closed_until = min(closed_until, self._dropped_from)
        return changes_at

    @classmethod
    def from_push(cls, raw: Raw, exchange: str, symbol: str, fetched_at: int) -> Self:
        """Convert pushed candles: their `timeframe`, the newest one or two `rows`, and `closed`.

        `closed` is the start of the newest candle whose final state is known. The candle before the
        newest is left out unless it is that one. Raises `BadUpstreamData` as `from_ccxt` does.
        """
        rows = raw["rows"]
        closed = raw["closed"]
        known = [row for row in rows if row is rows[-1] or row[0] == closed]
        built = cls.from_ccxt(known, exchange, symbol, fetched_at, raw["timeframe"])
        newest = int(built.candles[-1][0])
        length = TIMEFRAMES[built.timeframe] * 1000
        built.closed_until = newest + length if closed == newest else newest
        if timestamp := _to_positive_integer(raw.get("timestamp")):
            built.timestamp = timestamp
        return built


class CandlePage(Candles):
    """Candles as they are cached: the newest ones, or one page of older ones."""

    next_candle: int | None = None
    """Start of the first known candle after a page: there is none in between."""

    def end_at(self, end: int) -> None:
        """Keep only the candles that start before `end`."""
        following = [int(row[0]) for row in self.candles if row[0] >= end]
        if following:
            self.next_candle = following[0]
        self.candles = [row for row in self.candles if row[0] < end]


class Trade(Document):
    """One public trade."""

    id: str | None
    timestamp: int
    """Time of the trade in UTC milliseconds."""
    side: Literal["buy", "sell"] | None
    """Side of the taker. Null if the exchange does not send it."""
    price: float
    amount: float

    @classmethod
    def from_ccxt(cls, raw: Raw, exchange: str, symbol: str) -> Self:
        """Convert a ccxt trade. Raises `BadUpstreamData` if a number is missing or not positive."""
        price = _to_number(raw.get("price")) or 0.0
        amount = _to_number(raw.get("amount")) or 0.0
        timestamp = _to_positive_integer(raw.get("timestamp"))
        if price <= 0 or amount <= 0 or timestamp is None:
            raise _bad_data(exchange, symbol, "sent an implausible trade")
        identity = None if raw.get("id") is None else str(raw["id"])
        side = raw["side"] if raw.get("side") in ("buy", "sell") else None
        return cls(id=identity, timestamp=timestamp, side=side, price=price, amount=amount)


class Trades(MarketData):
    """Recent public trades, oldest first."""

    trades: list[Trade]

    @classmethod
    def from_ccxt(cls, raw: Sequence[Raw], exchange: str, symbol: str, fetched_at: int) -> Self:
        """Convert ccxt trades, each id once. Implausible trades are left out and counted.

        There may be no trades. Raises `BadUpstreamData` if none is plausible.
        """
        trades: list[Trade] = []
        ids: set[str] = set()
        for row in raw:
            try:
                trade = Trade.from_ccxt(row, exchange, symbol)
            except BadUpstreamData:
                metrics.trades_dropped_total.labels(exchange, "implausible").inc()
                continue
            if trade.id in ids:
                metrics.trades_dropped_total.labels(exchange, "duplicate").inc()
                continue
            ids |= {trade.id} if trade.id is not None else set()
            trades.append(trade)
        if raw and not trades:
            raise _bad_data(exchange, symbol, "sent no plausible trade")
        values: dict[str, Any] = {"symbol": symbol, "exchange": exchange, "fetched_at": fetched_at}
        if trades:
            values["timestamp"] = max(trade.timestamp for trade in trades)
        return cls(trades=trades, **values)


def closing_times(newest: int, requested_at: int, grid: Grid) -> tuple[int, int]:
    """Return until when candles are final, and when they change next.

    `newest` is the start of the newest candle, `requested_at` the time of the request on the
    exchange's clock. All times are UTC milliseconds.
    """
    now = max(requested_at, newest)
    start = grid.floor(now)  # of the growing candle
    if now >= start + (CLOSE_MARGIN_MS if newest >= start else QUIET_CLOSE_MS):
        return start, start + grid.length + CLOSE_MARGIN_MS
    close = start + CLOSE_MARGIN_MS
    return start - grid.length, close if now < close else now + RETRY_MS


def _bad_data(exchange: str, symbol: str, fault: str) -> BadUpstreamData:
    return BadUpstreamData(f"{exchange} {fault}", exchange=exchange, symbol=symbol)


def _halted(exchange: str, symbol: str, reason: str, **extra: int) -> MarketHalted:
    detail = f"{symbol} {reason} on {exchange}"
    return MarketHalted(detail, exchange=exchange, symbol=symbol, **extra)


def _check_prices(exchange: str, symbol: str, values: Mapping[str, Any]) -> None:
    last, bid, ask = values["last"], values["bid"], values["ask"]
    if last in (None, 0) and values["baseVolume"] == 0:
        raise _halted(exchange, symbol, "has never traded")
    if last is None or last <= 0:
        raise _bad_data(exchange, symbol, "sent no usable price")
    if bid is not None and ask is not None and ask < bid:
        raise _bad_data(exchange, symbol, "sent a bid above the ask")


def _check_not_halted(
    exchange: str, symbol: str, traded_at: int | None, volume: float | None, now_ms: int
) -> None:
    """Raise `MarketHalted` if a market without orders has not traded lately: its price is old."""
    if traded_at is not None and now_ms - traded_at > HALTED_MS:
        moment = datetime.fromtimestamp(traded_at / 1000, UTC).isoformat(timespec="seconds")
        reason = f"has no orders, and no trade since {moment},"
        raise _halted(exchange, symbol, reason, last_trade_at=traded_at)
    if traded_at is None and volume == 0:
        raise _halted(exchange, symbol, "has no orders, and no trade within 24 hours,")


def _to_number(value: Any) -> float | None:
    """Return a finite number unchanged, and None for anything else."""
    is_number = type(value) in (int, float)  # not a bool
    return value if is_number and -MAX_NUMBER < value < MAX_NUMBER else None


def _to_positive_integer(value: Any) -> int | None:
    return value if type(value) is int and 0 < value < MAX_INTEGER else None


def _to_candle(row: Sequence[Any], end: int) -> list[int | float] | None:
    """Return a plausible candle that starts before `end`, and None for any other row."""
    numbers = [number for value in row[:6] if (number := _to_number(value)) is not None]
    if len(numbers) < 6 or min(numbers) < 0:
        return None
    time, _, high, low, close, _ = numbers
    is_plausible = 0 < time < end and low <= high and close > 0
    return [int(time), *numbers[1:]] if is_plausible else None


def _to_levels(raw: object, exchange: str, symbol: str) -> list[list[float]]:
    """Return price and amount of each row.

    Raises `BadUpstreamData` if there is no list, or if one of them is not a number or negative.
    """
    if not isinstance(raw, list):
        raise _bad_data(exchange, symbol, "sent no rows")
    rows = []
    for row in raw:
        numbers = [_to_number(value) for value in row[:2]]
        if len(numbers) < 2 or any(number is None or number < 0 for number in numbers):
            raise _bad_data(exchange, symbol, "sent rows that are not numbers")
        rows.append(numbers)
    return rows  # type: ignore[return-value]
