"""The knobs of a simulated exchange: how it misbehaves, and what its markets are like."""

from typing import Literal

from pydantic import BaseModel, Field

LimitFailure = Literal["rate_limit", "pair_limit", "throttled", "banned", "firewall"]
Failure = Literal["", "busy", "unavailable", "timeout", "no_symbol"] | LimitFailure
BookOddity = Literal["locked_book", "crossed_book", "empty_book", "one_sided_book"]
PushOddity = Literal["duplicates", "late", "lost_delta"]
Oddity = (
    Literal["empty_candles", "duplicate_candle", "odd_trades", "drift"] | BookOddity | PushOddity
)


class Knobs(BaseModel, extra="forbid", frozen=True):
    """How one exchange misbehaves."""

    latency_ms: float = 0.0
    """Delay of answers and pushes."""
    status: int = 0
    """Answer with this status, also to the handshakes of sockets."""
    headers: dict[str, str] = {}
    """Add these headers to answers."""
    body: str | None = None
    """Send this text in place of answers and pushes."""
    hang: bool = False
    """Do not answer until the knobs change."""
    drip: bool = False
    """Send one byte per 100 ms."""
    size: int = 0
    """Answer with this many bytes of JSON."""
    redirect: str = ""
    """Redirect to this address."""
    refuse: bool = False
    """Close the port and all connections."""
    reset: bool = False
    """Abort the connection of a request."""
    geo_block: bool = False
    """Answer as to clients in a blocked country."""
    rate_limit: int = 0
    """Requests or weight per window. 0 is the documented limit, -1 no limit."""
    only: str = ""
    """Apply the knobs only to paths that contain this text. `refuse` applies to all paths."""
    times: int = 0
    """Apply the knobs to this many requests. 0 is all."""
    price: float = 1.0
    """Multiply all prices."""
    clock_skew_ms: int = 0
    """Shift the time in answers."""
    push_ms: float = Field(250, ge=1)
    """Interval of pushes."""
    freeze: bool = False
    """Push nothing, but answer pings."""
    mute: str = ""
    """Push nothing of topics whose names contain this text."""
    drop: Literal["", "cut", "close"] = ""
    """Abort the open sockets, or close them in order, as binance does after 24 hours."""
    error: Failure = ""
    """Answer REST requests with this failure in the exchange's own format."""
    pair: str = ""
    """Apply `error`, `odd` and `times` only to requests and topics of the market with this id."""
    statuses: dict[str, str] = {}
    """Status of markets in the exchange's own words, by id. The id `*` is all other markets."""
    delisted: frozenset[str] = frozenset()
    """Remove the markets with these ids."""
    listed: tuple[str, ...] = ()
    """Add markets with these symbols, such as `NEW/USDT` or the swap `NEW/USDT:USDT`."""
    halted: frozenset[str] = frozenset()
    """Ids of markets without trades for three days, with empty books."""
    still: frozenset[str] = frozenset()
    """Ids of markets without new trades. Only their order books follow `price`."""
    candle_delay_ms: int = 0
    """Send the candles from before a close for this long after it."""
    candles_from_ms: int = 0
    """Start of the first candle of all markets, Unix milliseconds."""
    odd: frozenset[Oddity] = frozenset()
    """Send unusual data, see docs/sandbox.md."""
