"""Translation of errors: from ccxt, aiohttp and the exchanges to the errors of the gateway."""

import re
import time
from email.utils import parsedate_to_datetime

import aiohttp

from src.core import errors
from src.core.errors import RETRY_ADVICE, error_classes
from src.exchanges.ccxt_client import ccxt
from src.exchanges.http_client import Answer, AnswerRefused
from src.exchanges.profiles import COMMON_RULES, PROFILES, ErrorRule

MAX_RETRY_AFTER_SECONDS = 3 * 86400.0  # Binance's longest ban
FIRST_MILLISECONDS = 10**11  # a larger Unix time is in milliseconds; in seconds it is year 5138
MAX_TIME_DIGITS = 15

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

ERRORS = {kind.code: kind for kind in error_classes(errors.GatewayError)}

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


def translate(
    exchange: str, error: Exception, answer: Answer, now: float | None = None
) -> errors.GatewayError:
    """Return the gateway's error for an error and the response it came with, at `now` (UTC s).

    The text of the original error is never used: it may contain addresses. A `GatewayError` is
    returned unchanged.
    """
    if isinstance(error, errors.GatewayError):
        return error
    now = time.time() if now is None else now
    kind = next(TRANSLATION[parent] for parent in type(error).__mro__ if parent in TRANSLATION)
    retry_after = _retry_after(answer, now)
    scope = kind.scope
    rule, end = _find_rule(exchange, answer) if isinstance(error, ccxt.BaseError) else (None, None)
    if rule is not None:
        kind = ERRORS[rule.code]
        scope = rule.scope
        header = answer.headers.get(PROFILES[exchange].reset_header, "").encode()
        retry_after = _seconds_until(end or header, now) or retry_after or rule.pause_seconds
    reason = describe(error, answer)
    advice = RETRY_ADVICE
    if issubclass(kind, errors.UnknownSymbol | errors.RequestRejected):
        advice = "check the symbol and the parameters"
    summary = f"{kind.title.lower()} ({reason})" if reason else kind.title.lower()
    result = kind(f"{exchange}: {summary}; {advice}", exchange=exchange, retry_after=retry_after)
    result.scope = scope
    return result


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
        raise ccxt.ExchangeNotAvailable
    if not answer.is_json:
        detail = f"{exchange} sent an empty or foreign body; {RETRY_ADVICE}"
        raise errors.BadUpstreamData(detail, exchange=exchange)


def check_empty(exchange: str, operation: str, market_id: str, answer: Answer) -> None:
    """Raise for an answer without rows that does not show that it is about the market.

    ccxt turns any unrelated JSON into an empty result.
    """
    proof = PROFILES[exchange].proofs[operation].replace(b"%s", market_id.lower().encode())
    if proof not in b"".join(answer.body_start.split()):
        detail = f"{exchange} sent no data, and nothing that names the market; {RETRY_ADVICE}"
        raise errors.BadUpstreamData(detail, exchange=exchange)


def _find_rule(exchange: str, answer: Answer) -> tuple[ErrorRule | None, bytes | None]:
    """Return the rule that an error answer matches, and the time in its text."""
    for rule in (*PROFILES[exchange].error_rules, *COMMON_RULES):
        if rule.status in (None, answer.status):
            match = re.search(rule.text, answer.body_start)
            if match is not None:
                return rule, match[1] if match.re.groups else None
    return None, None


def _seconds_until(digits: bytes | None, now: float) -> float | None:
    """Return the seconds until a Unix time in s or ms. None if that is no possible end of a pause.

    Exchanges send such times in texts and in headers of their own.
    """
    if not digits or not digits.isdigit():
        return None
    number = int(digits[:MAX_TIME_DIGITS])
    seconds = (number / 1000 if number >= FIRST_MILLISECONDS else number) - now
    return seconds if 0 < seconds <= MAX_RETRY_AFTER_SECONDS else None


def _retry_after(answer: Answer, now: float) -> float | None:
    """Return `Retry-After`, in either form of RFC 9110, as seconds from now."""
    value = answer.headers.get("Retry-After", "")
    if value.isascii() and value.isdigit():
        return min(float(value[:9]), MAX_RETRY_AFTER_SECONDS)
    try:
        seconds = parsedate_to_datetime(value).timestamp() - now
    except (TypeError, ValueError):
        return None
    return min(max(seconds, 1.0), MAX_RETRY_AFTER_SECONDS)
