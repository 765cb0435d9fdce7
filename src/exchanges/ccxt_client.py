"""The only module that imports ccxt: its clients, and snapshots of its market lists.

`INTERNALS` names every undocumented part of ccxt that this package uses.
"""

import asyncio
import sys
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec, module_from_spec
from inspect import getmembers, isclass
from typing import TYPE_CHECKING, Any, NamedTuple, Self
from urllib.parse import urlsplit

import aiohttp
import orjson

from src.exchanges.http_client import Answer, answer, open_session, tls_context
from src.exchanges.profiles import PROFILES, QUOTED, Profile, status_of

if TYPE_CHECKING:
    from config import Settings

CcxtClient = Any  # ccxt's clients are untyped and generated
MARKETS_TIMEOUT_SECONDS = 20.0
SNAPSHOT_FORMAT = 6  # 6: with ws_name, decimals, status and state, which sets `active`
UNUSED_FIELDS = {"info", "limits", "precision", "marginModes", "tiers"}
"""Fields of a market that nothing here reads. `info` alone is more than half of a market."""

TESTED_CCXT_VERSION = "4.5.90"
# Undocumented parts of ccxt, by the object that has them, and what replaces them if they are
# missing:
# - packages: registered without running them (`_import_lazily`). Otherwise all of ccxt is imported.
# - markets: assigned directly (`adopt_markets`). Otherwise `set_markets` copies each market.
# - sockets and connection: observed by `CcxtSockets`. Otherwise streams poll by REST.
# Attributes that are set and never read (`timeout_on_exit`, `ssl_context`, `ws_dial_backoff`) need
# no check: without them ccxt closes more slowly, builds a TLS context of its own, or dials later.
INTERNALS = {
    "markets": "markets markets_by_id safe_market_structure",
    "sockets": "client clients tickers bidsasks orderbooks trades ohlcvs timeframes "
    "fetch_rest_order_book_safe",
    "connection": "handle_message resolve reject on_error on_error_callback on_close_callback "
    "on_connected_callback on_message_callback connecting subscriptions isConnected closed error",
}


def _import_ccxt() -> Any:
    """Import ccxt. Return the module with its errors.

    ccxt's packages import a hundred exchanges each, which costs 50 MB and 0.3 s.
    """
    if "ccxt" in sys.modules:
        return import_module("ccxt.async_support")
    try:
        return _import_lazily()
    except Exception:  # noqa: BLE001 - another layout of ccxt
        for name in [name for name in sys.modules if name.partition(".")[0] == "ccxt"]:
            del sys.modules[name]
        import ccxt.async_support
        import ccxt.pro

        return ccxt.async_support


def _import_lazily() -> Any:
    """Register ccxt's packages without running them, with the names that their modules need."""
    for name in ("ccxt", "ccxt.async_support", "ccxt.pro"):
        spec = find_spec(name)
        if spec is None:
            raise ModuleNotFoundError(name)
        sys.modules[name] = module_from_spec(spec)
    package = sys.modules["ccxt.async_support"]
    errors = getmembers(import_module("ccxt.base.errors"), isclass)
    root = sys.modules["ccxt"]
    vars(root).update(errors, Exchange=import_module("ccxt.base.exchange").Exchange)
    vars(root).update(async_support=package)
    vars(package).update(errors, __getattr__=_load_exchange)
    return package


def _load_exchange(name: str) -> Any:
    """Import the class of an exchange when it is first used (PEP 562)."""
    try:
        module = import_module(f"ccxt.async_support.{name}")
    except ModuleNotFoundError:
        raise AttributeError(name) from None
    exchange_class = getattr(module, name)
    setattr(sys.modules["ccxt.async_support"], name, exchange_class)  # replaces the module there
    return exchange_class


ccxt = _import_ccxt()


@dataclass(frozen=True, slots=True)
class ClientOptions:
    """What a client of one exchange needs of the settings."""

    profile: Profile
    market_types: tuple[str, ...]
    rest_url: str = ""
    ws_url: str = ""
    https_proxy: str = field(default="", repr=False)
    api_key: str = field(default="", repr=False)
    api_secret: str = field(default="", repr=False)

    @classmethod
    def from_settings(cls, exchange: str, settings: "Settings") -> Self:
        """Select the settings of one exchange."""
        selected = settings.exchanges[exchange]
        urls = (selected.rest_url, selected.ws_url)
        proxy = settings.https_proxy.get_secret_value()
        keys = (selected.api_key.get_secret_value(), selected.api_secret.get_secret_value())
        return cls(PROFILES[exchange], settings.market_types, *urls, proxy, *keys)


def make_client(
    options: ClientOptions, session: aiohttp.ClientSession, *, has_sockets: bool = False
) -> CcxtClient:
    """Return a ccxt client that makes only public calls and has no queue of its own."""
    types = ["spot", "linear"] if "swap" in options.market_types else ["spot"]
    config = {
        "session": session,
        "enableRateLimit": False,
        # A backstop: the deadline of each call is shorter.
        "timeout": int(MARKETS_TIMEOUT_SECONDS * 1000),
        "apiKey": options.api_key,
        "secret": options.api_secret,
        "has": {"fetchCurrencies": False},  # with keys, fetchCurrencies sends signed requests
        "options": {
            "fetchMarkets": {"types": types},
            "fetchCurrencies": False,
            "fetchMargins": False,
        },
    }
    client = _client_class(options.profile.ccxt_class, has_sockets)(config)
    client.timeout_on_exit = 0
    client.ssl_context = tls_context()  # otherwise ccxt creates one that is never used
    client.urls["api"] = _replace_hosts(client.urls["api"], options.rest_url, options.ws_url)
    if has_sockets:
        client.options |= options.profile.socket_options
        if options.ws_url and options.profile.spot_socket_path:
            client.urls["api"]["ws"]["spot"] = options.ws_url + options.profile.spot_socket_path
    if options.profile.has_partial_errors:
        _accept_partial_errors(client)
    if not options.rest_url.startswith("http://"):
        client.aiohttp_proxy = options.https_proxy or None
    if not options.ws_url.startswith("ws://"):
        client.wss_proxy = options.https_proxy or None
    return client


def _accept_partial_errors(client: CcxtClient) -> None:
    """Keep the rows of an answer that has an error beside them, which ccxt would discard."""
    handle_errors = client.handle_errors

    def handle(*arguments: Any) -> Any:
        response = arguments[6]  # the parsed body
        has_rows = isinstance(response, dict) and response.get("result")
        return None if has_rows else handle_errors(*arguments)

    client.handle_errors = handle


def _client_class(name: str, has_sockets: bool) -> Any:
    rest_class = getattr(ccxt, name)  # the class with sockets is derived from it
    return getattr(import_module(f"ccxt.pro.{name}"), name) if has_sockets else rest_class


def _replace_hosts(urls: Any, rest_url: str, ws_url: str) -> Any:
    """Replace scheme, host and port of every URL. The path of a replacement goes in front."""
    if isinstance(urls, Mapping):
        return {name: _replace_hosts(url, rest_url, ws_url) for name, url in urls.items()}
    if not isinstance(urls, str):
        return urls
    parts = urlsplit(urls)
    target = ws_url if parts.scheme in ("ws", "wss") else rest_url
    return target + parts.path if target else urls


def record_answers(client: CcxtClient) -> list[tuple[str, str]]:
    """Return a list to which a client adds the URL and the body of each answer."""
    answers: list[tuple[str, str]] = []
    on_rest_response = client.on_rest_response

    def record(code: int, reason: str, url: str, *more: Any) -> Any:
        body = on_rest_response(code, reason, url, *more)
        answers.append((url, body))
        return body

    client.on_rest_response = record
    return answers


def missing_internals(client: CcxtClient) -> dict[str, list[str]]:
    """Return the names from `INTERNALS` that the installed ccxt lacks, by the object."""
    try:
        connection = import_module("ccxt.async_support.base.ws.client").Client
    except (ImportError, AttributeError):
        connection = None
    owners = {"markets": client, "sockets": client, "connection": connection}
    missing = {
        kind: [name for name in names.split() if not hasattr(owners[kind], name)]
        for kind, names in INTERNALS.items()
    }
    return {kind: names for kind, names in missing.items() if names}


class MarketList(NamedTuple):
    """A market list: ccxt's markets by symbol, its age (UTC seconds), and its snapshot."""

    markets: dict[str, dict[str, Any]]
    loaded_at: float
    snapshot: bytes


async def load_snapshot(options: ClientOptions, response: Answer, now: float) -> bytes:
    """Load an exchange's market list. Return a snapshot made at `now` (UTC seconds).

    Blocks the event loop: 0.2 s of CPU time for 2,000 markets.
    """
    answer.set(response)
    async with open_session(max_connections=4) as session:
        client = make_client(options, session)
        try:
            listed = await client.load_markets()
        finally:
            await client.close()
    # ccxt keeps the last market of each symbol, and all markets by id.
    groups = getattr(client, "markets_by_id", None) or {"": listed.values()}
    markets = [_slim(options.profile, market) for group in groups.values() for market in group]
    document = {
        "format": SNAPSHOT_FORMAT,
        "loaded_at": now,
        "markets": [*_unique(markets).values()],
    }
    return zlib.compress(orjson.dumps(document), 1)


def _slim(profile: Profile, market: dict[str, Any]) -> dict[str, Any]:
    """Return the used fields of ccxt's market, and what the profile makes of the exchange's row."""
    used = {name: value for name, value in market.items() if name not in UNUSED_FIELDS}
    used["ws_name"] = profile.ws_name(market)
    used["decimals"] = profile.decimals(market)
    used["status"] = status_of(market)
    used["state"] = profile.state_of(market)
    used["active"] = used["state"] == QUOTED  # ccxt's batches omit Kraken's inactive markets
    return {name: value for name, value in used.items() if value is not None}


def _unique(markets: Iterable[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return one market per symbol: of several ids with the same symbol, the first that trades.

    Binance's futures have IDOL, which is pending, before IDOLUSDT. Kraken's old REP was listed
    after REPV2, which ccxt calls REP, and its dark pools XXBTZUSD.d after XXBTZUSD.
    """
    unique: dict[str, dict[str, Any]] = {}
    for market in markets:
        known = unique.setdefault(market["symbol"], market)
        if known["state"] != QUOTED and market["state"] == QUOTED:
            unique[market["symbol"]] = market
    return unique


async def restore_markets(client: CcxtClient, snapshot: bytes) -> MarketList | None:
    """Unpack a snapshot. Return None if it is broken, empty or of another format.

    Takes 10 ms of CPU time for 2,000 markets, in steps between which other tasks run.
    """
    try:
        document = orjson.loads(zlib.decompress(snapshot))
        if document["format"] != SNAPSHOT_FORMAT:
            return None
        await asyncio.sleep(0)
        blank: dict[str, Any] = getattr(client, "safe_market_structure", dict)()
        loaded_at = float(document["loaded_at"])
        markets = {market["symbol"]: blank | market for market in document["markets"]}
        await asyncio.sleep(0)
    except (zlib.error, ValueError, KeyError, TypeError):
        return None
    needed = ("id", "symbol", "base", "quote", "type", "ws_name", "status", "state")
    is_complete = all(isinstance(market[key], str) for market in markets.values() for key in needed)
    return MarketList(markets, loaded_at, snapshot) if markets and is_complete else None


def adopt_markets(client: CcxtClient, markets: dict[str, dict[str, Any]]) -> None:
    """Set the markets of a client without copying each, as ccxt's `set_markets` does."""
    if not hasattr(client, "markets_by_id"):
        client.set_markets(list(markets.values()))
        return
    by_id: dict[str, list[dict[str, Any]]] = {}
    for market in markets.values():
        by_id.setdefault(market["id"], []).append(market)
    client.markets = markets
    client.markets_by_id = by_id
