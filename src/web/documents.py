"""Models of all JSON documents except market data, for the OpenAPI document.

Answers are built as plain dicts or bytes, and are not validated when they are sent. Tests validate
real answers against the schemas of these models.
"""

from typing import Annotated, Any, Literal

from pydantic import Field, create_model
from typing_extensions import TypeAliasType

from config import EXCHANGES
from src.core.errors import GatewayError, error_classes
from src.core.models import Document, Ticker

# A TypeAliasType becomes a schema with its name, which generated clients use.
_enum: dict[str, Any] = {"enum": sorted({error.code for error in error_classes(GatewayError)})}
ErrorCode = TypeAliasType("ErrorCode", Annotated[str, Field(json_schema_extra=_enum)])
BreakerState = TypeAliasType("BreakerState", Literal["closed", "open", "half_open"])
HealthStatus = TypeAliasType("HealthStatus", Literal["healthy", "degraded", "unhealthy"])
Milliseconds = Annotated[int, Field(description="UTC milliseconds.")]


class Attempt(Document):
    """The error of one exchange."""

    exchange: str | None
    code: ErrorCode
    detail: str


class Problem(Document):
    """RFC 9457 problem document. docs/api.md lists the meaning of each code."""

    type: str
    """`urn:virtuoso:error:` and the code."""
    title: str
    status: int
    """The HTTP status of this problem."""
    code: ErrorCode
    detail: str
    """What happened, and what to do."""
    exchange: str | None = None
    symbol: str | None = None
    retry_after: int | None = None
    """Seconds to wait; also the header Retry-After."""
    cause: str | None = None
    """Why the circuit breaker is open."""
    attempts: list[Attempt] | None = None
    suggestions: list[str] | None = None
    """Listed symbols similar to the requested one."""
    earliest: int | None = None
    """Start of the oldest candle that can be requested, in UTC milliseconds."""
    last_trade_at: int | None = None
    """Time of the last trade of a halted market in UTC milliseconds."""


class TickerBatch(Document):
    """Tickers by symbol, and a problem for each symbol without one."""

    tickers: dict[str, Ticker]
    errors: dict[str, Problem]


class TickerTable(Document):
    """With `exchange=all`: tickers by symbol and exchange, and a problem for each missing one."""

    tickers: dict[str, dict[str, Ticker]]
    errors: dict[str, dict[str, Problem]]


class Listing(Document):
    """A market, and the exchanges that list it."""

    symbol: str
    base: str
    quote: str
    type: Literal["spot", "swap"]
    exchanges: list[str]
    ids: Annotated[dict[str, str], Field(description="Exchange -> its own id of the market.")]
    statuses: Annotated[
        dict[str, str], Field(description="Exchange -> its own word for the status.")
    ]


class Listings(Document):
    """The markets that match, by symbol."""

    count: int
    markets: list[Listing]


class Breaker(Document):
    """The circuit breaker of an exchange."""

    state: BreakerState
    cause: str | None
    opened_at: Milliseconds | None
    retry_at: Milliseconds | None


class LoadedMarkets(Document):
    """The market list of an exchange; `error` is the code of the last attempt, if it failed."""

    count: int
    loaded_at: Milliseconds | None
    error: ErrorCode | None


class StreamStatus(Document):
    """The streams of an exchange on this replica; `cause` is the reason if nothing is pushed."""

    sockets: int
    watched: int
    stale: int
    reconnects: int
    cause: str | None


class EnabledExchange(Document):
    """The state of an exchange; `streams` is absent when STREAMING is off."""

    enabled: Literal[True]
    breaker: Breaker
    last_success: Milliseconds | None
    budget_used_ratio: float
    """1 means that the whole budget is used."""
    futures_budget_used_ratio: float | None = None
    """The same for swaps. Absent if they share the budget."""
    in_flight: int
    markets: LoadedMarkets
    streams: StreamStatus | None = None


class DisabledExchange(Document):
    """An exchange that the settings switch off."""

    enabled: Literal[False]


_fields: Any = dict.fromkeys(EXCHANGES, EnabledExchange | DisabledExchange)
Exchanges = create_model(
    "Exchanges", __base__=Document, __doc__="Every known exchange, by name.", **_fields
)


class HealthPart(Document):
    """The state of one part of the gateway."""

    status: HealthStatus
    reason: str


_parts: Any = dict.fromkeys(("exchanges", "markets", "redis", "cache", "streams"), HealthPart)
_parts_text = "The state of every part of the gateway."
HealthParts = create_model("HealthParts", __base__=Document, __doc__=_parts_text, **_parts)


class Health(Document):
    """The state of the gateway: that of its worst part."""

    status: HealthStatus
    parts: HealthParts
    exchanges: dict[str, BreakerState]
    timestamp: Milliseconds
    version: str
    python: str
    uptime_seconds: float


class Liveness(Document):
    """The process is running."""

    status: Literal["live"]


class Readiness(Document):
    """`ready` as soon as one market list is loaded."""

    status: Literal["ready", "loading"]


class CacheFigures(Document):
    """The cache in the last minute; a ratio is null if nothing was requested."""

    window_seconds: float
    requests: int
    memory_hit_ratio: float | None
    redis_hit_ratio: float | None
    stale_ratio: float | None
    entries: int


class Subscribers(Document):
    """Connected streaming clients by transport."""

    ws: int
    sse: int


class ServiceFigures(Document):
    """The service in the last minute; a figure is null if nothing was counted."""

    window_seconds: float
    requests_per_second: float | None
    updates_per_second: float | None
    served_age_seconds: float | None
    in_flight: int
    subscribers: Subscribers


class Savings(Document):
    """Calls to exchanges in the last hour, or since the start, that clients did not have to make.

    Each requested value counts as a call. `saved` is lower by all calls of the gateway itself.
    """

    window_seconds: float
    requests: int
    saved: int


class RecentErrors(Document):
    """Errors of the last ten minutes: answers by status, calls by exchange and outcome."""

    window_seconds: float
    answers: dict[str, int]
    exchanges: dict[str, dict[str, int]]


class DashboardData(Document):
    """Everything that the page shows."""

    generated_at: Milliseconds
    version: str
    symbols: list[str]
    outlier_ratio: float
    streaming: bool
    grafana_url: str
    ticker_ttl_seconds: float
    market: TickerTable
    exchanges: Exchanges
    health: Health
    cache: CacheFigures
    service: ServiceFigures
    saved: Savings
    recent_errors: RecentErrors


class ClearedCache(Document):
    """The number of removed cache entries; `cleared` is null if Redis did not answer."""

    cleared: int | None
    redis: str


class ResetBreakers(Document):
    """The exchanges whose breaker was not closed before."""

    reset: list[str]


class RecordedTask(Document):
    """The maintenance task that was recorded."""

    recorded: Literal["daily", "check", "deep_check", "warm"]
