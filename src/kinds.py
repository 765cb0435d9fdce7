"""The kinds of market data: how each is fetched, how long it is fresh, and which parameters it has.

A new kind is a row in `KINDS`, a model in `core/models.py`, a route in `web/routes.py`, a setting
`<kind>_ttl_seconds`, and a weight in `BINANCE_WEIGHTS` of `exchanges/profiles.py`.
"""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from operator import methodcaller
from typing import Any

import orjson

from config import Settings
from src.cache.entry import FINAL_TTL_SECONDS, Entry, Freshness, Key, Param
from src.core.models import (
    CLOSE_MARGIN_MS,
    MAX_INTEGER,
    TIMEFRAMES,
    CandlePage,
    Grid,
    MarketData,
    OrderBook,
    Ticker,
)
from src.exchanges.ccxt_client import CcxtClient
from src.exchanges.manager import ExchangeCall, ExchangeManager, Fetched, is_swap, weight_of
from src.exchanges.profiles import PROFILES, Profile
from src.exchanges.tickers import fetch_ticker
from src.exchanges.trades import build_trades

RECENT_TIMEFRAMES = 2  # candles that begin no longer ago have the current price
MAX_VIEWS = 8  # parts that an entry keeps: bots use few different limits
MIN_SINCE_MS = 100_000_000_000  # in 1973, before any market: a smaller number is in seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """One kind of market data."""

    fetch: Callable[..., Callable[[CcxtClient], Awaitable[Any]]]
    """Returns the call of ccxt, given the profile, the symbol and `params`."""
    params: tuple[str, ...] = ()
    """Names of the parameters, in the order of `Key.params`. They are those of ccxt's method."""
    build: Callable[..., MarketData]
    """Converts ccxt's result, given `exchange`, `symbol`, `fetched_at` and `build_params`."""
    build_params: tuple[str, ...] = ()
    share: Callable[[Profile, str, tuple[Any, ...]], tuple[Param, ...]] = lambda _, __, params: (
        params
    )
    """Returns the parameters of the entry that has the answer, given the exchange and the symbol.

    Requests with different parameters share an entry with at least as many rows.
    """
    cut: Callable[[dict[str, Any], tuple[Any, ...]], dict[str, Any]] = lambda document, _: document
    """Returns the part of a shared answer that a client's parameters ask for."""
    freshness: Callable[[float, Key, Any, float], Freshness] = lambda ttl, *_: Freshness(ttl)
    """Returns how long an answer is fresh, given its TTL, its key and when it was requested.

    The time is in UTC seconds on the exchange's clock. Sets the members of the data that depend on
    it.
    """
    price: Callable[[Mapping[str, Any]], float | None]
    """Returns the current price in an answer, None if there is none."""
    has_levels: bool = False
    """True if the first parameter is a number of levels, on which the request weight depends."""


def _call_of(method: str) -> Callable[..., Callable[[CcxtClient], Awaitable[Any]]]:
    """Return a function that returns the call of a method of ccxt."""
    return lambda _, symbol, **params: methodcaller(method, symbol, **params)


def _share_rows(kind: str) -> Callable[[Profile, str, tuple[int]], tuple[Param, ...]]:
    """Return a function that replaces a `limit` by one of the profile's sizes."""
    return lambda profile, symbol, params: (profile.size(kind, params[0], is_swap=is_swap(symbol)),)


def _cut_levels(document: dict[str, Any], params: tuple[int]) -> dict[str, Any]:
    """Keep the best `limit` levels of each side."""
    (limit,) = params
    return document | {side: document[side][:limit] for side in ("bids", "asks")}


def _cut_trades(document: dict[str, Any], params: tuple[int]) -> dict[str, Any]:
    """Keep the newest `limit` trades."""
    return document | {"trades": document["trades"][-params[0] :]}


def _ticker_price(document: Mapping[str, Any]) -> float | None:
    return float(document["price"])


def _book_price(document: Mapping[str, Any]) -> float | None:
    best = [document[side][0][0] for side in ("bids", "asks") if document[side]]
    return sum(best) / len(best) if best else None


def _trades_price(document: Mapping[str, Any]) -> float | None:
    trades = document["trades"]
    return float(trades[-1]["price"]) if trades else None


def _candles_price(document: Mapping[str, Any]) -> float | None:
    """Return the newest close, unless the candles are of the past."""
    rows = document["candles"]
    longest_ms = RECENT_TIMEFRAMES * TIMEFRAMES[document["timeframe"]] * 1000
    is_recent = rows and document["fetched_at"] - rows[-1][0] <= longest_ms
    return float(rows[-1][4]) if is_recent else None


def grid_of(exchange: str, timeframe: str) -> Grid:
    """Return the starts of an exchange's candles."""
    offset = PROFILES[exchange].week_offset_seconds if timeframe == "1w" else 0
    return Grid(TIMEFRAMES[timeframe] * 1000, offset * 1000)


def _cut_candles(document: dict[str, Any], params: tuple[str, int, bool]) -> dict[str, Any]:
    """Keep the newest `limit` candles, with `closed` those that are final."""
    _, limit, closed = params
    end = document["closed_until"] if closed else MAX_INTEGER
    return document | {"candles": [row for row in document["candles"] if row[0] < end][-limit:]}


def _fetch_candles(
    profile: Profile, symbol: str, timeframe: str, since: int | None
) -> Callable[[CcxtClient], Awaitable[Any]]:
    """Request a whole page. ccxt rounds the start of weeks wrongly for some exchanges."""
    arguments: dict[str, Any] = {"since": since, "limit": profile.candle_page}
    if profile.since_parameter and since is not None:
        arguments["params"] = {profile.since_parameter: since}
    return methodcaller("fetch_ohlcv", symbol, timeframe, **arguments)


def _candle_freshness(ttl: float, key: Key, candles: CandlePage, requested_at: float) -> Freshness:
    """Expire candles when the newest one closes, and final pages after a day."""
    timeframe, start = key.params
    grid = grid_of(key.exchange, str(timeframe))
    requested_ms = int(requested_at * 1000)
    changes_at = candles.set_closed(requested_ms, grid)
    if start is not None:
        end = int(start) + PROFILES[key.exchange].candle_page * grid.length
        candles.end_at(end)
        if candles.closed_until >= end:
            return Freshness(FINAL_TTL_SECONDS, candles.closed_until)
    return Freshness(min(ttl, (changes_at - requested_ms) / 1000), candles.closed_until)


KINDS = {
    "ticker": Kind(
        fetch=partial(partial, fetch_ticker), build=Ticker.from_ccxt, price=_ticker_price
    ),
    "orderbook": Kind(
        fetch=_call_of("fetch_order_book"),
        params=("limit",),
        share=_share_rows("orderbook"),
        cut=_cut_levels,
        build=OrderBook.from_ccxt,
        price=_book_price,
        build_params=("limit",),
        has_levels=True,
    ),
    "ohlcv": Kind(
        fetch=_fetch_candles,
        params=("timeframe", "since"),
        build=CandlePage.from_ccxt,
        price=_candles_price,
        build_params=("timeframe",),
        share=lambda _, __, params: (params[0], None),  # the newest candles, a whole page
        cut=_cut_candles,
        freshness=_candle_freshness,
    ),
    "trades": Kind(
        fetch=_call_of("fetch_trades"),
        params=("limit",),
        share=_share_rows("trades"),
        cut=_cut_trades,
        build=build_trades,
        price=_trades_price,
    ),
}
DATA_ROUTES = ("/tickers", *(f"/{kind}/{{symbol}}" for kind in KINDS))


async def fetch(manager: ExchangeManager, key: Key) -> Fetched[MarketData]:
    """Fetch the data of a key from its exchange. Raises `UpstreamError` or `CallerError`."""
    kind = KINDS[key.kind]
    params: dict[str, Any] = dict(zip(kind.params, key.params, strict=True))
    build_params = {name: params[name] for name in kind.build_params}
    build = partial(kind.build, exchange=key.exchange, symbol=key.symbol, **build_params)
    call_ccxt = kind.fetch(PROFILES[key.exchange], key.symbol, **params)
    call = ExchangeCall(key.exchange, key.kind, call_ccxt, build, key.symbol, _size_of(key))
    return await manager.call(call)


def shared_key(exchange: str, kind: str, symbol: str, params: tuple[Param, ...]) -> Key:
    """Return the key of the entry that has the answer to a request."""
    return Key(exchange, kind, symbol, KINDS[kind].share(PROFILES[exchange], symbol, params))


def view(entry: Entry, params: tuple[Param, ...]) -> Entry:
    """Return the part of an entry that a client's parameters ask for.

    The entry keeps a few parts, so that repeated requests are not cut again.
    """
    if params == entry.key.params:
        return entry
    part = entry.views.get(params)
    if part is None:
        document = KINDS[entry.key.kind].cut(orjson.loads(entry.body), params)
        part = entry.with_body(orjson.dumps(document))
        if len(entry.views) >= MAX_VIEWS:
            entry.views.clear()
        entry.views[params] = part
    return part


def price_of(entry: Entry) -> float | None:
    """Return the current price in an entry, None if there is none."""
    if not entry.price:
        read_body(entry)
    return entry.price or None


def read_body(entry: Entry) -> None:
    """Set the members of an entry that come from its body: price, sequence number and time."""
    document = orjson.loads(entry.body)
    entry.price = KINDS[entry.key.kind].price(document) or 0.0
    entry.nonce = document.get("nonce") or 0
    if document.get("candles"):
        entry.nonce = document["candles"][-1][0]
    newest: dict[str, Any] = (document.get("trades") or [document])[-1]
    entry.data_time = newest.get("timestamp") or 0


def weight_of_keys(keys: Sequence[Key]) -> int:
    """Return the request weight of fetching a key, or tickers of one exchange with one call."""
    first = keys[0]
    if len(keys) > 1:
        return weight_of(first.exchange, "tickers", len(keys), first.symbol)
    return weight_of(first.exchange, first.kind, _size_of(first), first.symbol)


def is_available(manager: ExchangeManager, key: Key) -> bool:
    """True if a call for a key would be made now, as far as this process knows."""
    return manager.is_available(key.exchange, weight_of_keys([key]), key.kind, key.symbol)


def _size_of(key: Key) -> int:
    """Return the number on which the request weight of a key depends."""
    return int(key.params[0] or 1) if KINDS[key.kind].has_levels else 1


def series_freshness(key: Key, closed_until: int, now_ms: int) -> Freshness:
    """Return how long candles are fresh whose newest final candle a stream has reported.

    Times are UTC milliseconds.
    """
    closes_at = closed_until + TIMEFRAMES[str(key.params[0])] * 1000
    return Freshness((closes_at + CLOSE_MARGIN_MS - now_ms) / 1000, closed_until)


def is_series(key: Key) -> bool:
    """Return True for the newest candles of a market, to which a stream adds."""
    return "since" in KINDS[key.kind].params and None in key.params


def ttl_of(settings: Settings, key: Key) -> float:
    """Return the seconds an answer is fresh: the setting `<kind>_ttl_seconds`."""
    ttl: float = getattr(settings, f"{key.kind}_ttl_seconds")
    return ttl
