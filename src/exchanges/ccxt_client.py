"""The edge to ccxt: how its clients are made, what its errors mean here, and what is kept of its market lists.

No other module imports ccxt.
"""

import asyncio
import sys
import zlib
from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from importlib import import_module
from importlib.util import find_spec, module_from_spec
from inspect import getmembers, isclass
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import aiohttp
import orjson

from config import EXCHANGES, Settings
from src.core.errors import (
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
from src.exchanges.http_client import Answer, AnswerRefused, answer, open_session, tls_context

CcxtClient = Any  # ccxt's clients are untyped and generated; this is one of bybit, binance, kraken
MARKETS_TIMEOUT_SECONDS = 20.0
MAX_RETRY_AFTER_SECONDS = 3 * 86400.0  # binance's longest ban
# bybit documents 10 minutes for "access too frequent", which it sends as a 403 without Retry-After.
RATE_LIMITED_403_SECONDS = 600.0
SNAPSHOT_FORMAT = 2  # the first had no number
# What of a market nothing here reads; `info`, the exchange's own record of it, is more than half of the whole.
UNREAD = {"info", "limits", "precision", "marginModes", "tiers"}


# Binance's small ticker has no bid and ask. ccxt spreads what is watched over fifty sockets, and counts what ever was.
BINANCE_SOCKETS = {
    "watchTickers": {"name": "ticker"},
    "streamLimits": dict.fromkeys(("spot", "linear"), 1),
    "subscriptionLimitByStream": dict.fromkeys(("spot", "linear"), 10**9),
}


def _import_ccxt() -> Any:
    """Import what is used of ccxt, and return its errors and clients as one namespace.

    Its packages import a hundred exchanges each, which is 50 MB and 0.3 s. So they are registered without being
    run, and hold only what the modules below them look for.
    """
    if "ccxt" in sys.modules:
        return import_module("ccxt.async_support")
    for name in ("ccxt", "ccxt.async_support", "ccxt.pro"):
        spec = find_spec(name)
        if spec is None:
            raise ModuleNotFoundError(name)
        sys.modules[name] = module_from_spec(spec)
    import ccxt
    from ccxt.base import errors, exchange

    vars(ccxt).update(getmembers(errors, isclass), Exchange=exchange.Exchange)
    ccxt.async_support = package = sys.modules["ccxt.async_support"]
    vars(package).update(getmembers(errors, isclass))
    for name in EXCHANGES:
        setattr(package, name, getattr(import_module(f"ccxt.async_support.{name}"), name))
    return package


ccxt = _import_ccxt()

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


def make_client(
    exchange: str, settings: Settings, session: aiohttp.ClientSession, *, sockets: bool = False
) -> CcxtClient:
    """Make the ccxt client of an exchange: no queue of its own, no private calls, our URLs; with `sockets`, its pro."""
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
    package = import_module(f"ccxt.pro.{exchange}") if sockets else ccxt
    client = getattr(package, exchange)(config)
    client.timeout_on_exit = 0
    client.ssl_context = tls_context()  # else ccxt builds one on the first call, which the shared session never uses
    client.urls["api"] = _moved(client.urls["api"], own.rest_url, own.ws_url)
    if sockets and exchange == "binance":
        client.options |= BINANCE_SOCKETS
        if own.ws_url:  # by this word ccxt tells spot from swaps, and it stood in the host
            client.urls["api"]["ws"]["spot"] = f"{own.ws_url}/stream/ws"
    if not own.rest_url.startswith("http://"):
        client.aiohttp_proxy = settings.https_proxy.get_secret_value() or None
    if not own.ws_url.startswith("ws://"):
        client.wss_proxy = settings.https_proxy.get_secret_value() or None
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
    """A market list that was read: ccxt's markets by symbol, when it was loaded (UTC seconds), and it as a snapshot."""

    markets: dict[str, dict[str, Any]]
    loaded_at: float
    snapshot: bytes


async def load_snapshot(exchange: str, settings: Settings, got: Answer, now: float) -> bytes:
    """Load and parse an exchange's market list; returns it as a snapshot. Blocks: 0.2 s of CPU for 2,000 markets."""
    answer.set(got)
    async with open_session(max_connections=4) as session:
        client = make_client(exchange, settings, session)
        try:
            markets = (await client.load_markets()).values()
        finally:
            await client.close()
    slim = [{key: it for key, it in market.items() if it is not None and key not in UNREAD} for market in markets]
    return zlib.compress(orjson.dumps({"format": SNAPSHOT_FORMAT, "loaded_at": now, "markets": slim}), 1)


async def restore_markets(client: CcxtClient, snapshot: bytes) -> MarketList | None:
    """Unpack a snapshot; None when it is broken, empty or of another format.

    It takes 10 ms of CPU for 2,000 markets, in steps between which other tasks have their turn.
    """
    try:
        document = orjson.loads(zlib.decompress(snapshot))
        if document["format"] != SNAPSHOT_FORMAT:
            return None
        await asyncio.sleep(0)
        blank, loaded_at = client.safe_market_structure(), float(document["loaded_at"])
        markets = {market["symbol"]: blank | market for market in document["markets"]}
        await asyncio.sleep(0)
    except (zlib.error, ValueError, KeyError, TypeError):
        return None
    needed = ("id", "symbol", "base", "quote", "type")
    named = all(isinstance(market[key], str) for market in markets.values() for key in needed)
    return MarketList(markets, loaded_at, snapshot) if markets and named else None


def adopt_markets(client: CcxtClient, markets: dict[str, dict[str, Any]]) -> None:
    """Have a client read data by these markets, as ccxt's `set_markets` would, without a copy of each."""
    by_id: dict[str, list[dict[str, Any]]] = {}
    for market in markets.values():
        by_id.setdefault(market["id"], []).append(market)
    client.markets, client.markets_by_id = markets, by_id
