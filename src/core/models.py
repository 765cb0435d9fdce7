"""Models of the market data that clients receive, built from ccxt's unified dicts.

ccxt reports success with empty fields if an exchange sends an empty, incomplete or unrelated body.
So each `from_ccxt` checks that the data is plausible, and raises `BadUpstreamData` before
implausible data reaches the cache. Prices are floats in the quote currency, amounts are floats in
the base currency, times are UTC milliseconds.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field

from src.core.errors import BadUpstreamData, NoPrice

TIMEFRAMES = {  # seconds
    "1m": 60, "5m": 300, "15m": 900, "30m": 1800, "1h": 3600, "4h": 14400, "1d": 86400,
    "1w": 604800,
}  # fmt: skip
MAX_NUMBER = 1e300  # sums of larger numbers overflow; no market has them
MAX_INTEGER = 2**53  # JSON clients cannot represent all larger integers; no time or nonce is larger
EMPTY_TIMEFRAMES = 2  # after a `since` no longer ago than this, there may be no candle yet
Since = int | None  # UTC milliseconds
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
    timestamp: int | None = None
    """The exchange's own time in UTC milliseconds. Absent if the exchange sent none."""
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
    change: float | None
    percentage: float | None
    """Change over 24 hours in percent."""
    average: float | None
    base_volume: float | None = Field(alias="baseVolume")
    quote_volume: float | None = Field(alias="quoteVolume")
    mark_price: float | None = Field(alias="markPrice")
    index_price: float | None = Field(alias="indexPrice")

    @classmethod
    def from_ccxt(cls, raw: Raw, exchange: str, symbol: str, fetched_at: int) -> Self:
        """Convert a ccxt ticker. Values that are not finite numbers become None.

        Raises `NoPrice` if the market has never traded, and `BadUpstreamData` if the ticker is for
        another symbol, has no price or a bid above the ask.
        """
        values: dict[str, Any] = {name: _to_number(raw.get(name)) for name in _TICKER_NUMBERS}
        last, bid, ask = values["last"], values["bid"], values["ask"]
        if raw.get("symbol") != symbol:
            raise _bad_data(exchange, symbol, "answered for another symbol")
        if last in (None, 0) and values["baseVolume"] == 0:
            raise _no_price(exchange, symbol, "has never traded")
        if last is None or last <= 0:
            raise _bad_data(exchange, symbol, "sent no usable price")
        if bid is not None and ask is not None and 0 < ask < bid:
            raise _bad_data(exchange, symbol, "sent a bid above the ask")
        values |= {"symbol": symbol, "exchange": exchange, "price": last, "fetched_at": fetched_at}
        if timestamp := _to_positive_integer(raw.get("timestamp")):
            values |= {"timestamp": timestamp, "datetime": raw.get("datetime")}
        return cls.model_validate(values)


_OWN_FIELDS = {*MarketData.model_fields, "price", "datetime"}
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

        Raises `BadUpstreamData` if the book is empty, crossed or not numeric.
        """
        bids = _to_rows(raw.get("bids"), 2, exchange, symbol)[:limit]
        asks = _to_rows(raw.get("asks"), 2, exchange, symbol)[:limit]
        if not (bids or asks):
            raise _bad_data(exchange, symbol, "sent an empty order book")
        if bids and asks and bids[0][0] >= asks[0][0]:
            raise _bad_data(exchange, symbol, "sent a crossed order book")
        numbers = {name: _to_positive_integer(raw.get(name)) for name in ("timestamp", "nonce")}
        values: dict[str, Any] = {name: number for name, number in numbers.items() if number}
        values |= {"symbol": symbol, "exchange": exchange, "fetched_at": fetched_at}
        return cls(bids=bids, asks=asks, **values)


class Candles(MarketData):
    """Candles as `[time, open, high, low, close, volume]`, oldest first.

    The newest candle may be incomplete.
    """

    timeframe: str
    candles: list[Candle]

    @classmethod
    def from_ccxt(
        cls, raw: Any, exchange: str, symbol: str, fetched_at: int, timeframe: str, since: Since
    ) -> Self:
        """Convert ccxt's OHLCV rows.

        Raises `BadUpstreamData` if rows are missing, out of order or not numeric. No rows are
        plausible if `since` is so recent that there may be no candle yet.
        """
        rows = _to_rows(raw, 6, exchange, symbol)
        empty_ms = EMPTY_TIMEFRAMES * TIMEFRAMES[timeframe] * 1000
        may_be_empty = since is not None and since > fetched_at - empty_ms
        is_ascending = all(earlier[0] < later[0] for earlier, later in pairwise(rows))
        is_plausible = is_ascending and not any(
            low > high or close <= 0 or time >= MAX_INTEGER for time, _, high, low, close, _ in rows
        )
        if not is_plausible or not (rows or may_be_empty):
            raise _bad_data(exchange, symbol, "sent implausible candles")
        values: dict[str, Any] = {"symbol": symbol, "exchange": exchange, "fetched_at": fetched_at}
        candles = [[int(row[0]), *row[1:]] for row in rows]
        return cls(timeframe=timeframe, candles=candles, **values)


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
        """Convert a ccxt trade. Raises `BadUpstreamData` if a number is missing or implausible."""
        price = _to_number(raw.get("price"))
        amount = _to_number(raw.get("amount"))
        timestamp = _to_positive_integer(raw.get("timestamp"))
        if price is None or price <= 0 or amount is None or timestamp is None:
            raise _bad_data(exchange, symbol, "sent an implausible trade")
        identity = None if raw.get("id") is None else str(raw["id"])
        side = raw["side"] if raw.get("side") in ("buy", "sell") else None
        return cls(id=identity, timestamp=timestamp, side=side, price=price, amount=amount)


class Trades(MarketData):
    """Recent public trades, oldest first."""

    trades: list[Trade]

    @classmethod
    def from_ccxt(cls, raw: Sequence[Raw], exchange: str, symbol: str, fetched_at: int) -> Self:
        """Convert ccxt trades. Raises `NoPrice` without trades, `BadUpstreamData` if one is bad."""
        if not raw:
            raise _no_price(exchange, symbol, "has no trades")
        trades = [Trade.from_ccxt(trade, exchange, symbol) for trade in raw]
        return cls(symbol=symbol, exchange=exchange, fetched_at=fetched_at, trades=trades)


def _bad_data(exchange: str, symbol: str, fault: str) -> BadUpstreamData:
    return BadUpstreamData(f"{exchange} {fault}", exchange=exchange, symbol=symbol)


def _no_price(exchange: str, symbol: str, reason: str) -> NoPrice:
    return NoPrice(f"{symbol} {reason} on {exchange}", exchange=exchange, symbol=symbol)


def _to_number(value: Any) -> float | None:
    """Return a finite number unchanged, and None for anything else."""
    is_number = type(value) in (int, float)  # not a bool
    return value if is_number and -MAX_NUMBER < value < MAX_NUMBER else None


def _to_positive_integer(value: Any) -> int | None:
    return value if type(value) is int and 0 < value < MAX_INTEGER else None


def _to_rows(raw: object, width: int, exchange: str, symbol: str) -> list[list[float]]:
    """Return the first `width` numbers of each row.

    Raises `BadUpstreamData` if one of them is not a number or negative.
    """
    rows = []
    for row in raw if isinstance(raw, list) else ():
        numbers = [_to_number(value) for value in row[:width]]
        if len(numbers) < width or any(number is None or number < 0 for number in numbers):
            raise _bad_data(exchange, symbol, "sent rows that are not numbers")
        rows.append(numbers)
    return rows  # type: ignore[return-value]
