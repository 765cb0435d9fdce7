"""The errors that a client can receive. Each error class has its HTTP status and its code.

GatewayError
|-- CallerError               the request is wrong: no exchange is blamed, no stale value is served
|   |-- MalformedRequest          400 malformed_request
|   |-- Unauthorized              401 unauthorized
|   |   `-- AdminTokenMissing     401 unauthorized
|   |-- OriginRefused             403 origin_refused
|   |-- PrivateRequest            403 private_request
|   |-- NotFound                  404 not_found
|   |   |-- UnknownSymbol         404 unknown_symbol
|   |   `-- UnknownExchange       404 unknown_exchange
|   |-- MethodNotAllowed          405 method_not_allowed
|   |-- UriTooLong                414 uri_too_long
|   |-- InvalidParameter          422 invalid_parameter
|   |-- RequestRejected           422 request_rejected
|   |-- TooManyRequests           429 too_many_requests
|   |   `-- TooManyFailedLogins   429 too_many_requests
|   |-- TooManySubscriptions      429 too_many_subscriptions
|   |-- TooManyConnections        429 too_many_connections
|   `-- HeadersTooLarge           431 headers_too_large
`-- UpstreamError             502 upstream_error: the exchange, or the connection to it, failed
    |-- BadUpstreamData           502 bad_upstream_data
    |-- ExchangeUnavailable       502 exchange_unavailable
    |-- ExchangeTimeout           504 exchange_timeout
    |-- DeadlineExceeded          504 deadline_exceeded
    |-- GeoBlocked                451 geo_blocked
    `-- Unavailable               503: a temporary state of the gateway or the exchange
        |-- ExchangeRateLimited       503 exchange_rate_limited
        |   `-- ExchangeBanned        503 exchange_banned
        |-- CircuitOpen               503 circuit_open
        |-- BudgetSpent               503 budget_spent
        |-- Overloaded                503 overloaded
        |-- TooManyStreams            503 too_many_streams
        |-- PriceMismatch             503 price_mismatch
        |-- MarketsLoading            503 markets_loading
        |-- Maintenance               503 maintenance
        |-- MarketHalted              503 market_halted
        |-- NoExchangeAvailable       503 no_exchange_available
        `-- TooOld                    503 too_old

Each error of an exchange has a scope, which says what it is about:

- `call`: only this request, or our own limits. Nothing follows.
- `market`: one market at one endpoint, which pauses. When several markets have the same trouble,
  the scope becomes `exchange`.
- `endpoint`: one endpoint, which pauses.
- `exchange`: counts as a failure for the circuit breaker, or holds it open.

An unexpected exception is answered as `InternalError` (500 internal_error). Code raises
`InternalError` itself only if a process that reads market lists dies.
"""

import math
import re
from collections.abc import Iterator
from typing import Any, ClassVar

RETRY_ADVICE = "try again later or use another exchange"


class GatewayError(Exception):
    """An error that is answered as an RFC 9457 problem document.

    `detail` says what is wrong and what to do. It contains no text from an exchange. `exchange`
    and `symbol` are given if the error concerns one. `retry_after` is in seconds. `extra` holds
    further members of the problem document.

    A subclass inherits `status`, `title` and `code`. If its class statement sets the status or the
    title, its code is its name in snake case, unless its body sets another.
    """

    status: ClassVar[int] = 500
    code: ClassVar[str] = "internal_error"
    title: ClassVar[str] = "The gateway failed"
    default_retry_after: ClassVar[float | None] = None
    scope: str = "call"
    """What the error is about. An instance may differ from its class."""
    reply: Any = None
    """The exchange's own answer, for clients of its wire format."""

    def __init_subclass__(cls, status: int | None = None, title: str | None = None) -> None:
        cls.status = status or cls.status
        cls.title = title or cls.title
        if (status or title) and "code" not in vars(cls):
            cls.code = re.sub(r"(?<!^)(?=[A-Z])", "_", cls.__name__).lower()

    def __init__(self, detail: str, *, retry_after: float | None = None, **extra: Any) -> None:
        super().__init__(detail)
        self.detail = detail
        self.exchange: str | None = extra.pop("exchange", None)
        self.symbol: str | None = extra.pop("symbol", None)
        self.retry_after = self.default_retry_after if retry_after is None else retry_after
        self.extra = extra

    @property
    def retry_after_seconds(self) -> int | None:
        """Value of `Retry-After`: whole seconds, at least 1 (RFC 9110 section 10.2.3)."""
        return None if self.retry_after is None else max(1, math.ceil(self.retry_after))

    def problem(self) -> dict[str, Any]:
        """Return the problem document. Members without a value are left out."""
        document = {
            "type": f"urn:virtuoso:error:{self.code}",
            "title": self.title,
            "status": self.status,
            "code": self.code,
            "detail": self.detail,
            "exchange": self.exchange,
            "symbol": self.symbol,
            "retry_after": self.retry_after_seconds,
            **self.extra,
        }
        return {name: value for name, value in document.items() if value is not None}


class InternalError(GatewayError):
    """An unexpected error occurred. The log has its details."""


class CallerError(GatewayError, status=400, title="The request is malformed"):
    """The request is wrong. The same request will fail again."""

    code = "malformed_request"


class MalformedRequest(CallerError):
    """The request cannot be parsed."""


class Unauthorized(CallerError, status=401, title="A valid key is needed"):
    """The API key is missing or wrong."""

    challenge: ClassVar[str] = 'ApiKey header="X-API-Key"'
    """Value of the `WWW-Authenticate` header, which a 401 answer must have."""


class AdminTokenMissing(Unauthorized):
    """The admin token is missing or wrong."""

    challenge = 'Bearer realm="admin"'


class OriginRefused(CallerError, status=403, title="Pages of this origin may not connect"):
    """Pages of this origin may not open a WebSocket."""


class PrivateRequest(CallerError, status=403, title="The gateway serves only public data"):
    """A signed request, or one with keys of an exchange. It never leaves the gateway."""


class NotFound(CallerError, status=404, title="There is nothing here"):
    """The path does not exist."""


class UnknownSymbol(NotFound, title="The symbol is not listed"):
    """None of the requested exchanges lists the symbol."""


class UnknownExchange(NotFound, title="The exchange is not configured"):
    """No exchange of this name is enabled."""


class MethodNotAllowed(CallerError, status=405, title="The method is not allowed here"):
    """The path exists, but does not support this method."""


class UriTooLong(CallerError, status=414, title="The URL is too long"):
    """The path and query are too long."""


class InvalidParameter(CallerError, status=422, title="A parameter is invalid"):
    """The value of a parameter is not allowed."""


class RequestRejected(CallerError, status=422, title="The exchange refused the request"):
    """The exchange rejected the parameters."""


class TooManyRequests(CallerError, status=429, title="The client limit is reached"):
    """The client exceeded its request limit."""


class TooManyFailedLogins(TooManyRequests, title="Too many wrong keys or tokens"):
    """This address sent too many wrong API keys or admin tokens."""

    code = TooManyRequests.code


class TooManySubscriptions(CallerError, status=429):
    """The connection has the maximum number of streams."""

    title = "This connection has as many streams as it may"


class TooManyConnections(CallerError, status=429):
    """The client (API key or address) has the maximum number of streaming connections."""

    title = "This client has as many connections as it may"


class HeadersTooLarge(CallerError, status=431, title="The headers are too large"):
    """The request headers are too large."""


class UpstreamError(GatewayError, status=502, title="The exchange failed"):
    """The exchange answered with an error or with an answer that cannot be used."""

    default_retry_after = 1
    cause: ClassVar[str] = "error"
    """Why a circuit breaker opened: a fixed word, which is shown and logged."""
    scope = "exchange"


class BadUpstreamData(UpstreamError, title="The exchange sent implausible data"):
    """The exchange sent data that is empty, incomplete, crossed or not numeric."""

    cause = "bad_data"
    scope = "market"


class ExchangeUnavailable(UpstreamError, title="The exchange is unavailable"):
    """The exchange cannot be reached, or reports that it is down."""

    cause = "unavailable"


class ExchangeTimeout(UpstreamError, status=504, title="The exchange did not answer in time"):
    """The exchange did not answer in time."""

    cause = "timeout"


class DeadlineExceeded(UpstreamError, status=504, title="The request ran out of time"):
    """The request exceeded its time limit."""


class GeoBlocked(UpstreamError, status=451, title="The exchange refuses this location"):
    """The exchange refuses requests from the location of this server. Status 451: RFC 7725."""

    cause = "geo_blocked"
    default_retry_after = 900


class Unavailable(UpstreamError, status=503, title="Not available now"):
    """The request cannot be answered now. A later request may succeed."""


class ExchangeRateLimited(Unavailable, title="The exchange limits this address"):
    """The exchange limits requests from this address for some time."""

    cause = "rate_limited"
    default_retry_after = 60


class ExchangeBanned(ExchangeRateLimited, title="The exchange banned this address"):
    """The exchange banned this address for some time (Binance: status 418)."""

    cause = "banned"
    default_retry_after = 120


class CircuitOpen(Unavailable, title="The circuit breaker is open"):
    """The circuit breaker of the exchange is open. The exchange was not called."""


class BudgetSpent(Unavailable, title="The request budget of the exchange is spent"):
    """The call would exceed the request budget of the exchange."""

    scope = "call"


class Overloaded(Unavailable, title="Too many loads in flight"):
    """The maximum number of concurrent loads is reached."""


class TooManyStreams(Unavailable, title="Too many streams are watched"):
    """The maximum number of streams or connections is reached."""


class PriceMismatch(Unavailable, title="The other exchange's price differs too much"):
    """The price of a fallback differs too much from the last price of the preferred exchange."""


class MarketsLoading(Unavailable, title="The market list is still loading"):
    """The market list is still loading, so the symbol cannot be checked."""


class Maintenance(Unavailable, title="The exchange is in maintenance"):
    """The exchange halted most of its markets. It is asked every minute whether they trade."""

    cause = "maintenance"
    default_retry_after = 60


class MarketHalted(Unavailable, title="The market is halted"):
    """The market does not trade, so it has no current price. The exchange did not fail.

    Its status says so, or its ticker: no trade ever, or neither orders nor a recent trade. `extra`
    then has `last_trade_at` (UTC ms), if the exchange sends it.
    """

    default_retry_after = 60
    scope = "market"


class NoExchangeAvailable(Unavailable, title="No exchange could answer"):
    """All exchanges that list the symbol failed. `attempts` has the error of each."""


class TooOld(Unavailable, title="Nothing new enough is available"):
    """Only a value older than `max_age` is available."""


def error_classes(root: type[GatewayError]) -> Iterator[type[GatewayError]]:
    """Yield an error class and its subclasses, without `Unavailable`, which is never raised."""
    if root is not Unavailable:
        yield root
    for child in root.__subclasses__():
        yield from error_classes(child)
