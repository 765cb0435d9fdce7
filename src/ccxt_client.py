"""The edge to ccxt: how its clients are made, what its errors mean here, and how it reads market lists.

No other module imports ccxt.
"""

import asyncio
import threading
import zlib
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

import aiohttp
import ccxt.async_support as ccxt
import orjson

from config import Settings
from src.errors import (
    BadUpstreamData,
    ExchangeBanned,
    ExchangeRateLimited,
    ExchangeTimeout,
    ExchangeUnavailable,
    GatewayError,
    GeoBlocked,
    RequestRejected,
    UnknownSymbol,
    UpstreamError,
)
from src.http_client import Answer, AnswerRefused, answer, open_session

T = TypeVar("T")
Client = Any  # ccxt's clients are untyped and generated; this is one of bybit, binance, kraken
MARKETS_TIMEOUT_SECONDS = 20.0
MAX_RETRY_AFTER_SECONDS = 3 * 86400.0  # binance's longest ban
# bybit documents 10 minutes for "access too frequent", which it sends as a 403 without Retry-After.
RATE_LIMITED_403_SECONDS = 600.0

# The nearest class in an error's ancestry decides. A bare ExchangeError is a failure: bybit and kraken send it for
# server timeouts. test_ccxt_client.py walks every class ccxt has, so a new release cannot surprise.
TRANSLATION: dict[type[Exception], type[GatewayError]] = {
    ccxt.BadSymbol: UnknownSymbol,
    ccxt.BadRequest: RequestRejected,
    ccxt.ArgumentsRequired: RequestRejected,
    ccxt.NotSupported: RequestRejected,
    ccxt.RestrictedLocation: GeoBlocked,
    ccxt.DDoSProtection: ExchangeRateLimited,
    ccxt.RateLimitExceeded: ExchangeRateLimited,
    ccxt.RequestTimeout: ExchangeTimeout,
    ccxt.NetworkError: ExchangeUnavailable,
    ccxt.BadResponse: BadUpstreamData,
    ccxt.OperationFailed: ExchangeUnavailable,
    ccxt.BaseError: UpstreamError,
    TimeoutError: ExchangeTimeout,
    aiohttp.ClientError: ExchangeUnavailable,
    Exception: BadUpstreamData,  # ccxt's parsers stumble over junk in many ways
}


# The first that an error or a cause of it is; without words the error's own, which are ours.
REASONS: dict[type[BaseException], str] = {
    AnswerRefused: "",
    aiohttp.ClientConnectorDNSError: "its name cannot be resolved",
    aiohttp.ClientConnectorCertificateError: "its certificate is not trusted",
    aiohttp.ClientProxyConnectionError: "the proxy cannot be reached",
    aiohttp.ClientHttpProxyError: "the proxy refused",
    aiohttp.ClientConnectorError: "no connection: refused or unreachable",
    aiohttp.ServerDisconnectedError: "the connection was cut",
    ConnectionResetError: "the connection was cut",
    aiohttp.ClientPayloadError: "its answer broke off",
    TimeoutError: "nothing, or too little, came within the time",
}


def make_client(exchange: str, settings: Settings, session: aiohttp.ClientSession) -> Client:
    """Make the ccxt client of an exchange: no queue of its own, no private calls, our URLs."""
    own = settings.exchange(exchange)
    types = ["spot", "linear"] if "swap" in settings.market_types else ["spot"]
    config: dict[str, Any] = {
        "session": session,
        "enableRateLimit": False,
        "timeout": int(MARKETS_TIMEOUT_SECONDS * 1000),  # a backstop: the deadline of each call is shorter
        "apiKey": own.api_key.get_secret_value(),
        "secret": own.api_secret.get_secret_value(),
        "has": {"fetchCurrencies": False},  # with keys set these would be signed requests
        "options": {"fetchMarkets": {"types": types}, "fetchCurrencies": False, "fetchMargins": False},
    }
    client = {"bybit": ccxt.bybit, "binance": ccxt.binance, "kraken": ccxt.kraken}[exchange](config)
    client.timeout_on_exit = 0
    client.urls["api"] = _moved(client.urls["api"], own.rest_url, own.ws_url)
    if not own.rest_url.startswith("http://"):
        client.aiohttp_proxy = settings.https_proxy.get_secret_value() or None
    return client


def _moved(urls: Any, rest: str, ws: str) -> Any:
    """Put every URL on another scheme, host and port; its path stays, the path of the override goes in front."""
    if isinstance(urls, Mapping):
        return {name: _moved(url, rest, ws) for name, url in urls.items()}
    if not isinstance(urls, str):
        return urls
    parts = urlsplit(urls)
    target = ws if parts.scheme in ("ws", "wss") else rest
    return target + parts.path if target else urls


def translate(exchange: str, error: Exception, got: Answer) -> GatewayError:
    """Say in our terms what an error of ccxt and the status of the answer mean; none of its text is taken over.

    An error that is ours already comes back as it is.
    """
    if isinstance(error, GatewayError):
        return error
    ours = next(TRANSLATION[parent] for parent in type(error).__mro__ if parent in TRANSLATION)
    retry_after = _retry_after(got)
    if got.status == 418:
        ours = ExchangeBanned
    elif got.status == 403 and got.says_too_frequent:  # ccxt takes every 403 of bybit for a limit
        ours, retry_after = ExchangeRateLimited, retry_after or RATE_LIMITED_403_SECONDS
    elif got.status in (403, 451):
        ours = GeoBlocked
    elif got.status == 429:
        ours = ExchangeRateLimited
    reason = reason_of(error, got)
    told = f" ({reason})" if reason else ""
    advice = "ask another exchange, or again later"
    if issubclass(ours, UnknownSymbol | RequestRejected):
        advice = "check the symbol and the parameters"
    return ours(f"{exchange}: {ours.title.lower()}{told}; {advice}", exchange=exchange, retry_after=retry_after)


def reason_of(error: BaseException, got: Answer) -> str:
    """Say in our words what happened on the wire, as far as that is known; for people, in answers and logs."""
    if isinstance(error, GatewayError):
        return error.detail
    cause: BaseException | None = error
    while cause is not None:
        for kind, words in REASONS.items():
            if isinstance(cause, kind):
                return words or str(cause)
        cause = cause.__cause__
    return f"status {got.status}" if got.status else ""


def check_answer(exchange: str, got: Answer) -> None:
    """Raise for what ccxt takes for a success: odd statuses, and bodies that are no JSON."""
    if got.status is not None and got.status >= 400:
        raise ExchangeUnavailable(f"{exchange} answered with status {got.status}", exchange=exchange)
    if not got.is_json:
        raise BadUpstreamData(f"{exchange} sent an empty or foreign body", exchange=exchange)


def _retry_after(got: Answer) -> float | None:
    """Read `Retry-After`, in either form of RFC 9110, as seconds from now."""
    value = got.headers.get("Retry-After", "")
    if value.isascii() and value.isdigit():
        return min(float(value[:9]), MAX_RETRY_AFTER_SECONDS)
    try:
        seconds = (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds()
    except (TypeError, ValueError):
        return None
    return min(max(seconds, 1.0), MAX_RETRY_AFTER_SECONDS)


class MarketList(NamedTuple):
    """A market list that was read: a client that holds it, when it was loaded (UTC seconds), and it as a snapshot."""

    source: Client
    loaded_at: float
    snapshot: bytes


def read_markets(exchange: str, settings: Settings, got: Answer, now: float) -> MarketList:
    """Load and parse an exchange's market list, blocking. For a thread: parsing 2,000 markets takes 0.2 s of CPU."""

    async def load() -> Client:
        answer.set(got)
        async with open_session(max_connections=4) as session:
            client = make_client(exchange, settings, session)
            try:
                await client.load_markets()
            finally:
                await client.close()
            return client

    source = asyncio.run(load())
    # `info` is the exchange's own record of a market: more than half of the whole, and nothing here reads it.
    markets = [{**market, "info": {}} for market in source.markets.values()]
    return MarketList(source, now, zlib.compress(orjson.dumps({"loaded_at": now, "markets": markets}), 1))


def restore_markets(exchange: str, snapshot: bytes) -> MarketList | None:
    """Parse a snapshot, blocking; None when it is broken."""
    try:
        document = orjson.loads(zlib.decompress(snapshot))
        loaded_at, markets = float(document["loaded_at"]), document["markets"]
        source = {"bybit": ccxt.bybit, "binance": ccxt.binance, "kraken": ccxt.kraken}[exchange]()
        source.set_markets(markets)
        if not markets:
            return None
    except (zlib.error, ValueError, KeyError, TypeError, AttributeError):
        return None
    return MarketList(source, loaded_at, snapshot)


async def in_thread(function: Callable[[], T]) -> T:
    """Run a blocking function in a thread that does not keep the process from ending."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def settle(result: T | None, error: Exception | None) -> None:
        if future.done():
            return
        if error is None:
            future.set_result(result)  # type: ignore[arg-type]
        else:
            future.set_exception(error)

    def run() -> None:
        result, failure = None, None
        try:
            result = function()
        except Exception as error:  # noqa: BLE001 - it is raised again where the result is awaited
            failure = error
        if not loop.is_closed():
            loop.call_soon_threadsafe(settle, result, failure)

    threading.Thread(target=run, name="markets", daemon=True).start()
    return await future
