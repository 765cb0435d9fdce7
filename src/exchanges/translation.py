"""Translation of errors: from ccxt, aiohttp and HTTP statuses to the errors of the gateway."""

from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

import aiohttp

from src.core import errors
from src.core.errors import RETRY_ADVICE
from src.exchanges.ccxt_client import ccxt
from src.exchanges.http_client import Answer, AnswerRefused
from src.exchanges.profiles import PROFILES, StatusRule

MAX_RETRY_AFTER_SECONDS = 3 * 86400.0  # Binance's longest ban

# The nearest class in an error's ancestry decides. A bare ExchangeError is a failure: Bybit and
# Kraken send it for server timeouts. A test walks through every error class of ccxt.
TRANSLATION: dict[type[Exception], type[errors.GatewayError]] = {
    ccxt.BadSymbol: errors.UnknownSymbol,
    ccxt.BadRequest: errors.RequestRejected,
    ccxt.ArgumentsRequired: errors.RequestRejected,
    ccxt.NotSupported: errors.RequestRejected,
    ccxt.RestrictedLocation: errors.GeoBlocked,
    ccxt.DDoSProtection: errors.ExchangeRateLimited,
    ccxt.RateLimitExceeded: errors.ExchangeRateLimited,
    ccxt.RequestTimeout: errors.ExchangeTimeout,
    ccxt.NetworkError: errors.ExchangeUnavailable,
    ccxt.BadResponse: errors.BadUpstreamData,
    ccxt.OperationFailed: errors.ExchangeUnavailable,
    ccxt.BaseError: errors.UpstreamError,
    TimeoutError: errors.ExchangeTimeout,
    aiohttp.ClientError: errors.ExchangeUnavailable,
    Exception: errors.BadUpstreamData,  # raised by ccxt's parsers for unexpected data
}

ERRORS: dict[str, type[errors.GatewayError]] = {
    kind.cause: kind
    for kind in (errors.ExchangeBanned, errors.ExchangeRateLimited, errors.GeoBlocked)
}

# The first match decides.
REASONS: dict[type[BaseException], str] = {
    aiohttp.ClientConnectorDNSError: "its name cannot be resolved",
    aiohttp.ClientConnectorCertificateError: "its certificate is not trusted",
    aiohttp.ClientProxyConnectionError: "the proxy cannot be reached",
    aiohttp.ClientHttpProxyError: "the proxy refused",
    aiohttp.ClientConnectorError: "no connection: refused or unreachable",
    aiohttp.ServerDisconnectedError: "the connection was cut",
    ConnectionResetError: "the connection was cut",
    aiohttp.ClientPayloadError: "its response ended early",
    TimeoutError: "it did not respond in time",
}


def translate(exchange: str, error: Exception, answer: Answer) -> errors.GatewayError:
    """Return the gateway's error for an error and the response it came with.

    The text of the original error is never used: it may contain addresses. A `GatewayError` is
    returned unchanged.
    """
    if isinstance(error, errors.GatewayError):
        return error
    kind = next(TRANSLATION[parent] for parent in type(error).__mro__ if parent in TRANSLATION)
    retry_after = _retry_after(answer)
    rule = _matching_rule(exchange, answer)
    if rule is not None:
        kind = ERRORS[rule.cause]
        retry_after = retry_after or rule.pause_seconds
    reason = describe(error, answer)
    advice = RETRY_ADVICE
    if issubclass(kind, errors.UnknownSymbol | errors.RequestRejected):
        advice = "check the symbol and the parameters"
    summary = f"{kind.title.lower()} ({reason})" if reason else kind.title.lower()
    return kind(f"{exchange}: {summary}; {advice}", exchange=exchange, retry_after=retry_after)


def describe(error: BaseException, answer: Answer) -> str:
    """Describe in our words what happened on the network. Empty if unknown."""
    if isinstance(error, errors.GatewayError):
        return error.detail
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, AnswerRefused):
            return str(cause)
        for kind, reason in REASONS.items():
            if isinstance(cause, kind):
                return reason
        cause = cause.__cause__
    return f"status {answer.status}" if answer.status else ""


def check_answer(exchange: str, answer: Answer) -> None:
    """Raise for responses that ccxt accepts: unexpected statuses, and bodies that are not JSON."""
    if answer.status is not None and answer.status >= 400:
        detail = f"{exchange} responded with status {answer.status}; {RETRY_ADVICE}"
        raise errors.ExchangeUnavailable(detail, exchange=exchange)
    if not answer.is_json:
        detail = f"{exchange} sent an empty or foreign body; {RETRY_ADVICE}"
        raise errors.BadUpstreamData(detail, exchange=exchange)


def _matching_rule(exchange: str, answer: Answer) -> StatusRule | None:
    rules = (rule for rule in PROFILES[exchange].status_rules if rule.status == answer.status)
    return next((rule for rule in rules if rule.text in answer.body_start), None)


def _retry_after(answer: Answer) -> float | None:
    """Return `Retry-After`, in either form of RFC 9110, as seconds from now."""
    value = answer.headers.get("Retry-After", "")
    if value.isascii() and value.isdigit():
        return min(float(value[:9]), MAX_RETRY_AFTER_SECONDS)
    try:
        seconds = (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds()
    except (TypeError, ValueError):
        return None
    return min(max(seconds, 1.0), MAX_RETRY_AFTER_SECONDS)
