"""The errors a client can see; each knows its HTTP status, its code and whether asking again helps.

GatewayError
|-- CallerError            the request is at fault: never counted against an exchange, never masked by an old value
|   |-- MalformedRequest       400 malformed_request
|   |-- Unauthorized           401 unauthorized
|   |   `-- AdminTokenMissing  401 unauthorized
|   |-- OriginRefused          403 origin_refused
|   |-- NotFound               404 not_found
|   |   |-- UnknownSymbol      404 unknown_symbol
|   |   `-- UnknownExchange    404 unknown_exchange
|   |-- MethodNotAllowed       405 method_not_allowed
|   |-- UriTooLong             414 uri_too_long
|   |-- InvalidParameter       422 invalid_parameter
|   |-- RequestRejected        422 request_rejected
|   |-- TooManyRequests        429 too_many_requests
|   |   `-- TooManyFailedLogins 429 too_many_requests
|   |-- TooManySubscriptions   429 too_many_subscriptions
|   |-- TooManyConnections     429 too_many_connections
|   `-- HeadersTooLarge        431 headers_too_large
`-- UpstreamError          502 upstream_error: the exchange is at fault, or the way to it
    |-- BadUpstreamData        502 bad_upstream_data
    |-- NoPrice                502 no_price
    |-- ExchangeUnavailable    502 exchange_unavailable
    |-- ExchangeTimeout        504 exchange_timeout
    |-- DeadlineExceeded       504 deadline_exceeded
    |-- GeoBlocked             451 geo_blocked
    `-- Unavailable            503: known without asking the exchange, or said by it; try again later
        |-- ExchangeRateLimited    503 exchange_rate_limited
        |   `-- ExchangeBanned     503 exchange_banned
        |-- CircuitOpen            503 circuit_open
        |-- BudgetSpent            503 budget_spent
        |-- Overloaded             503 overloaded
        |-- TooManyStreams         503 too_many_streams
        |-- MarketsLoading         503 markets_loading
        |-- NoExchangeAvailable    503 no_exchange_available
        `-- TooOld                 503 too_old

`InternalError` (500 internal_error) stands apart: it is the form an unforeseen exception takes. One place
raises it: where a process that reads a market list died.
"""

import math
from typing import Any, ClassVar


class GatewayError(Exception):
    """An error with an answer: `detail` says what was wrong and what would have worked, and holds no foreign text.

    `retry_after` is in seconds; `exchange` and `symbol` are set where the error is about one.
    """

    status: ClassVar[int] = 500
    code: ClassVar[str] = "internal_error"
    title: ClassVar[str] = "The gateway failed"
    default_retry_after: ClassVar[float | None] = None

    def __init__(
        self,
        detail: str,
        *,
        exchange: str | None = None,
        symbol: str | None = None,
        retry_after: float | None = None,
        **extra: Any,
    ) -> None:
        super().__init__(detail)
        self.detail = detail
        self.exchange = exchange
        self.symbol = symbol
        self.retry_after = self.default_retry_after if retry_after is None else retry_after
        self.extra = extra

    @property
    def retry_after_seconds(self) -> int | None:
        """Whole seconds to wait, at least 1, as `Retry-After` takes them (RFC 9110 section 10.2.3)."""
        return None if self.retry_after is None else max(1, math.ceil(self.retry_after))

    def problem(self) -> dict[str, Any]:
        """Return the RFC 9457 problem document; members that do not apply are left out."""
        document: dict[str, Any] = {
            "type": f"urn:virtuoso:error:{self.code}",
            "title": self.title,
            "status": self.status,
            "code": self.code,
            "detail": self.detail,
        }
        optional = {"exchange": self.exchange, "symbol": self.symbol, "retry_after": self.retry_after_seconds}
        return document | {name: value for name, value in (optional | self.extra).items() if value is not None}


class InternalError(GatewayError):
    """Something nobody foresaw; its text stays in the log."""


class CallerError(GatewayError):
    """The request is at fault; asking the same again will not help."""

    status, code, title = 400, "malformed_request", "The request is malformed"


class MalformedRequest(CallerError):
    """The request cannot be read."""


class Unauthorized(CallerError):
    """A key or token is missing or wrong."""

    status, code, title = 401, "unauthorized", "A valid key is needed"
    challenge: ClassVar[str] = 'ApiKey header="X-API-Key"'  # for WWW-Authenticate, which a 401 has to carry


class AdminTokenMissing(Unauthorized):
    """The admin token is missing or wrong."""

    challenge = 'Bearer realm="admin"'


class OriginRefused(CallerError):
    """A browser's page may not connect from where it came."""

    status, code, title = 403, "origin_refused", "Pages of this origin may not connect"


class NotFound(CallerError):
    """Nothing is served at this path."""

    status, code, title = 404, "not_found", "There is nothing here"


class UnknownSymbol(NotFound):
    """No exchange that was asked about lists the symbol."""

    code, title = "unknown_symbol", "The symbol is not listed"


class UnknownExchange(NotFound):
    """No exchange of this name is configured."""

    code, title = "unknown_exchange", "The exchange is not configured"


class MethodNotAllowed(CallerError):
    """The path exists, the verb does not."""

    status, code, title = 405, "method_not_allowed", "The method is not allowed here"


class UriTooLong(CallerError):
    """Path and query are longer than anything the gateway serves."""

    status, code, title = 414, "uri_too_long", "The URL is too long"


class InvalidParameter(CallerError):
    """A parameter has a value outside what is allowed."""

    status, code, title = 422, "invalid_parameter", "A parameter is invalid"


class RequestRejected(CallerError):
    """The exchange itself refused the parameters."""

    status, code, title = 422, "request_rejected", "The exchange refused the request"


class TooManyRequests(CallerError):
    """This client asked more often than the gateway allows."""

    status, code, title = 429, "too_many_requests", "The client limit is reached"


class TooManyFailedLogins(TooManyRequests):
    """More wrong keys or admin tokens came from this address than are answered with 401."""

    title = "Too many wrong keys or tokens"


class TooManySubscriptions(CallerError):
    """One connection wants more streams than it may have."""

    status, code, title = 429, "too_many_subscriptions", "This connection has as many streams as it may"


class TooManyConnections(CallerError):
    """One client, by key or address, has as many connections for streams as it may."""

    status, code, title = 429, "too_many_connections", "This client has as many connections as it may"


class HeadersTooLarge(CallerError):
    """The headers are larger than anything the gateway reads."""

    status, code, title = 431, "headers_too_large", "The headers are too large"


class UpstreamError(GatewayError):
    """The exchange answered with an error, or not in a way that can be used."""

    status, code, title = 502, "upstream_error", "The exchange failed"
    default_retry_after = 1
    cause: ClassVar[str] = "error"  # why a breaker opened: a word of a fixed set, it is shown and is a log field


class BadUpstreamData(UpstreamError):
    """The exchange's answer is implausible: empty, cut, crossed or not a number."""

    code, title, cause = "bad_upstream_data", "The exchange sent implausible data", "bad_data"


class NoPrice(UpstreamError):
    """The market is listed but has never traded: a fact about the symbol, no failure of the exchange."""

    code, title = "no_price", "The market has no price"
    default_retry_after = 60


class ExchangeUnavailable(UpstreamError):
    """The exchange cannot be reached or says that it is down."""

    code, title, cause = "exchange_unavailable", "The exchange is unavailable", "unavailable"


class ExchangeTimeout(UpstreamError):
    """The exchange did not answer in time."""

    status, code, title, cause = 504, "exchange_timeout", "The exchange did not answer in time", "timeout"


class DeadlineExceeded(UpstreamError):
    """The time of the whole request ran out."""

    status, code, title = 504, "deadline_exceeded", "The request ran out of time"


class GeoBlocked(UpstreamError):
    """The exchange does not serve this server's place (RFC 7725)."""

    status, code, title, cause = 451, "geo_blocked", "The exchange refuses this location", "geo_blocked"
    default_retry_after = 900


class Unavailable(UpstreamError):
    """Cannot be answered now; waiting helps."""

    status, code, title = 503, "unavailable", "Not available now"


class ExchangeRateLimited(Unavailable):
    """The exchange told this address to slow down, for a time."""

    code, title, cause = "exchange_rate_limited", "The exchange limits this address", "rate_limited"
    default_retry_after = 60


class ExchangeBanned(ExchangeRateLimited):
    """The exchange banned this address for a time (binance: status 418)."""

    code, title, cause = "exchange_banned", "The exchange banned this address", "banned"
    default_retry_after = 120


class CircuitOpen(Unavailable):
    """The breaker of the exchange is open: it was not asked."""

    code, title = "circuit_open", "The circuit breaker is open"


class BudgetSpent(Unavailable):
    """Asking now would exceed what the exchange allows this address."""

    code, title = "budget_spent", "The request budget of the exchange is spent"


class Overloaded(Unavailable):
    """As many loads are in flight as the gateway allows."""

    code, title = "overloaded", "Too many loads in flight"


class TooManyStreams(Unavailable):
    """As many streams are watched, or clients connected, as the gateway allows."""

    code, title = "too_many_streams", "Too many streams are watched"


class MarketsLoading(Unavailable):
    """The market list is not there yet, so the symbol cannot be judged."""

    code, title = "markets_loading", "The market list is still loading"


class NoExchangeAvailable(Unavailable):
    """Every exchange that lists the symbol failed; `attempts` says how."""

    code, title = "no_exchange_available", "No exchange could answer"


class TooOld(Unavailable):
    """Only a value older than `max_age` is there, and no newer one could be had."""

    code, title = "too_old", "Nothing new enough is available"
