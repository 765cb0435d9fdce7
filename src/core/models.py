"""What clients get: built from ccxt's dicts by name, inventing nothing, and only if it is plausible.

ccxt answers "success" with every field empty when an exchange sends an empty, cut or foreign body, so each builder is a
gate: it raises `BadUpstreamData` rather than let such a thing near the cache. Prices and amounts are floats in units of
quote and base; times are UTC milliseconds.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field

from src.core.errors import BadUpstreamData, NoPrice

TIMEFRAMES = {"1m": 60, "5m": 300, "15m": 900, "30m": 1800, "1h": 3600, "4h": 14400, "1d": 86400, "1w": 604800}
LARGEST = 1e300  # beyond it sums overflow, and no figure of a market is that large
EXACT = 2**53  # integers from here on are not exact in every client's JSON; no time or sequence number is that large
Level = Annotated[list[float], Field(min_length=2, max_length=2)]  # price, amount


def _describe_as_sent(schema: dict[str, Any]) -> None:
    """Correct a generated JSON schema: members with the default None are absent, not null; all others are required."""
    schema["required"] = []
    for name, member in schema["properties"].items():
        member.pop("title", None)  # "Bidvolume"
        if member.pop("default", ...) is not None:
            schema["required"].append(name)
        else:
            (kind,) = (kind for kind in member.pop("anyOf") if kind != {"type": "null"})
            member |= kind


class Document(BaseModel):
    """A JSON object that clients receive. Its schema in the OpenAPI document allows no other members."""

    model_config = ConfigDict(extra="forbid", json_schema_extra=_describe_as_sent)


class MarketData(Document):
    """What every answer about one market carries."""

    model_config = ConfigDict(populate_by_name=True, serialize_by_alias=True)

    symbol: str = Field(description="Canonical symbol, as in `BTC/USDT` or `BTC/USDT:USDT` for a swap.")
    exchange: str = Field(description="The exchange it comes from.")
    fetched_at: int = Field(description="When the gateway received it, UTC milliseconds.")
    timestamp: int | None = Field(None, description="The exchange's own time of it; absent when it gave none.")
    source: Literal["rest", "stream"] = Field("rest", description="Whether it was asked for or pushed.")
    stale: bool = Field(
        False, description="True when it is older than it should be because nothing newer could be had."
    )


class Ticker(MarketData):
    """Price and 24 hour figures of one market: ccxt's unified fields, and `price`, which is `last`."""

    price: float = Field(description="The last traded price.")
    datetime: str | None = Field(None, description="`timestamp` as ISO 8601; absent when there is none.")
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
    percentage: float | None = Field(description="Change over 24 hours in percent.")
    average: float | None
    base_volume: float | None = Field(alias="baseVolume")
    quote_volume: float | None = Field(alias="quoteVolume")
    mark_price: float | None = Field(alias="markPrice")
    index_price: float | None = Field(alias="indexPrice")

    @classmethod
    def from_ccxt(cls, raw: Mapping[str, Any], exchange: str, symbol: str, fetched_at: int) -> Self:
        """Build it. Raises `NoPrice` for a market that never traded, `BadUpstreamData` for what cannot be true."""
        names = [field.alias or name for name, field in cls.model_fields.items()]
        values: dict[str, Any] = {name: _number(raw.get(name)) for name in names if name not in _OWN_FIELDS}
        if raw.get("symbol") != symbol:
            raise BadUpstreamData(f"{exchange} answered for another symbol", exchange=exchange, symbol=symbol)
        last, bid, ask = values["last"], values["bid"], values["ask"]
        if last in (None, 0) and values["baseVolume"] == 0:
            raise NoPrice(f"{symbol} has never traded on {exchange}", exchange=exchange, symbol=symbol)
        if last is None or last <= 0:
            raise BadUpstreamData(f"{exchange} sent no usable price", exchange=exchange, symbol=symbol)
        if bid is not None and ask is not None and 0 < ask < bid:
            raise BadUpstreamData(f"{exchange} sent a bid above the ask", exchange=exchange, symbol=symbol)
        values |= {"symbol": symbol, "exchange": exchange, "price": last, "fetched_at": fetched_at}
        if timestamp := _milliseconds(raw.get("timestamp")):
            values |= {"timestamp": timestamp, "datetime": raw.get("datetime")}
        return cls.model_validate(values)


class OrderBook(MarketData):
    """Both sides of the book, best first, as `[price, amount]`."""

    bids: list[Level]
    asks: list[Level]
    nonce: int | None = Field(None, description="The exchange's sequence number; absent when it gave none.")

    @classmethod
    def from_ccxt(cls, raw: Mapping[str, Any], exchange: str, symbol: str, fetched_at: int, limit: int) -> Self:
        """Build its best `limit` levels. Raises `BadUpstreamData` for one that is empty, crossed or no numbers."""
        bids, asks = (_rows(raw.get(side), 2, exchange, symbol)[:limit] for side in ("bids", "asks"))
        if not (bids or asks):
            raise BadUpstreamData(f"{exchange} sent an empty order book", exchange=exchange, symbol=symbol)
        if bids and asks and bids[0][0] >= asks[0][0]:
            raise BadUpstreamData(f"{exchange} sent a crossed order book", exchange=exchange, symbol=symbol)
        values = {"symbol": symbol, "exchange": exchange, "fetched_at": fetched_at, "bids": bids, "asks": asks}
        optional = {"timestamp": _milliseconds(raw.get("timestamp")), "nonce": _milliseconds(raw.get("nonce"))}
        return cls.model_validate(values | {name: value for name, value in optional.items() if value is not None})


class Candles(MarketData):
    """Candles, oldest first, as `[time, open, high, low, close, volume]`; the newest may still be growing."""

    timeframe: str
    candles: list[Annotated[list[int | float], Field(min_length=6, max_length=6)]]

    @classmethod
    def from_ccxt(
        cls, raw: object, exchange: str, symbol: str, fetched_at: int, *, timeframe: str, since: int | None
    ) -> Self:
        """Build it. Raises `BadUpstreamData` for rows that are missing, out of order or not made of numbers."""
        rows = _rows(raw, 6, exchange, symbol)
        may_be_empty = since is not None and since > fetched_at - 2000 * TIMEFRAMES[timeframe]
        ascending = all(earlier[0] < later[0] for earlier, later in pairwise(rows))
        if (
            not ascending
            or any(row[3] > row[2] or row[4] <= 0 or row[0] >= EXACT for row in rows)
            or not (rows or may_be_empty)
        ):
            raise BadUpstreamData(f"{exchange} sent implausible candles", exchange=exchange, symbol=symbol)
        candles = [[int(row[0]), *row[1:]] for row in rows]
        values = {"symbol": symbol, "exchange": exchange, "fetched_at": fetched_at, "timeframe": timeframe}
        return cls.model_validate(values | {"candles": candles})


class Trade(Document):
    """One public trade."""

    id: str | None
    timestamp: int = Field(description="When it happened, UTC milliseconds.")
    side: Literal["buy", "sell"] | None = Field(description="Of the taker; null when the exchange does not say.")
    price: float
    amount: float


class Trades(MarketData):
    """Recent public trades, oldest first."""

    trades: list[Trade]

    @classmethod
    def from_ccxt(cls, raw: Sequence[Mapping[str, Any]], exchange: str, symbol: str, fetched_at: int) -> Self:
        """Build it. Raises `NoPrice` when there are none, `BadUpstreamData` when one is not made of numbers."""
        if not raw:
            raise NoPrice(f"{symbol} has no trades on {exchange}", exchange=exchange, symbol=symbol)
        trades = []
        for item in raw:
            price, amount = (_number(item.get(name)) for name in ("price", "amount"))
            time = _milliseconds(item.get("timestamp"))
            if price is None or price <= 0 or amount is None or time is None:
                raise BadUpstreamData(f"{exchange} sent an implausible trade", exchange=exchange, symbol=symbol)
            side = item.get("side") if item.get("side") in ("buy", "sell") else None
            identity = item.get("id")
            trades.append(
                Trade(
                    id=None if identity is None else str(identity),
                    timestamp=time,
                    side=side,
                    price=price,
                    amount=amount,
                )
            )
        return cls(symbol=symbol, exchange=exchange, fetched_at=fetched_at, trades=trades)


_OWN_FIELDS = frozenset({"symbol", "exchange", "fetched_at", "timestamp", "datetime", "stale", "price", "source"})


def _number(value: object) -> float | None:
    """Return a finite number, or None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not -LARGEST < value < LARGEST:
        return None
    return value


def _milliseconds(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 < value < EXACT else None


def _rows(raw: object, width: int, exchange: str, symbol: str) -> list[list[float]]:
    """Take the first `width` numbers of every row; raises `BadUpstreamData` where they are not numbers."""
    rows = []
    for row in raw if isinstance(raw, list) else ():
        numbers = [_number(value) for value in row[:width]]
        if len(numbers) < width or any(number is None or number < 0 for number in numbers):
            raise BadUpstreamData(f"{exchange} sent rows that are no numbers", exchange=exchange, symbol=symbol)
        rows.append(numbers)
    return rows  # type: ignore[return-value]
