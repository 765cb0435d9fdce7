"""The kinds of market data: how each is fetched, how long it is fresh, and which parameters it has.

A new kind is a row in `KINDS`, a model in `core/models.py`, a route in `web/routes.py`, a setting
`<kind>_ttl_seconds`, and a weight in `BINANCE_WEIGHTS` of `exchanges/profiles.py`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from operator import methodcaller
from typing import Any

from config import Settings
from src.cache.entry import Key, Param
from src.core.clock import Clock
from src.core.errors import InvalidParameter
from src.core.models import TIMEFRAMES, Candles, MarketData, OrderBook, Ticker, Trades
from src.exchanges.manager import ExchangeCall, ExchangeManager, Fetched, is_swap, weight_of
from src.exchanges.profiles import PROFILES, Profile

MIN_SINCE_MS = 100_000_000_000  # in 1973, before any market: a smaller number is in seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """One kind of market data."""

    method: str
    """ccxt's method, called with the symbol and `params`."""
    params: tuple[str, ...] = ()
    """Names of the parameters, in the order of `Key.params`. They are those of ccxt's method."""
    limit: Callable[[Profile, str, int], int] = lambda profile, symbol, limit: limit
    """Returns the `limit` to request, for exchanges that do not accept every value."""
    build: Callable[..., MarketData]
    """Converts ccxt's result, given `exchange`, `symbol`, `fetched_at` and `build_params`."""
    build_params: tuple[str, ...] = ()
    check_params: Callable[[Clock, tuple[Any, ...]], tuple[Param, ...]] = lambda _, params: params
    """Returns the canonical form of the parameters. Raises `InvalidParameter`."""
    has_levels: bool = False
    """True if the first parameter is a number of levels, on which the request weight depends."""


def _accepted_depth(profile: Profile, symbol: str, limit: int) -> int:
    """Return the smallest accepted number of levels from `limit` on."""
    depths = profile.swap_depths if is_swap(symbol) else ()
    return next((depth for depth in depths if depth >= limit), limit)


def _accepted_trades(profile: Profile, _symbol: str, limit: int) -> int:
    return min(limit, profile.max_trades or limit)


def _check_ohlcv(clock: Clock, params: tuple[str, int, int | None]) -> tuple[Param, ...]:
    """Round `since` up to the start of a candle, so that requests share an answer."""
    timeframe, limit, since = params
    if since is None:
        return params
    if since > clock.time() * 1000:
        raise InvalidParameter(
            f"since={since} is in the future; expected UTC milliseconds up to now"
        )
    if 0 < since < MIN_SINCE_MS:
        raise InvalidParameter(f"since={since} looks like seconds; expected UTC milliseconds")
    length_ms = TIMEFRAMES[timeframe] * 1000
    return timeframe, limit, -(-since // length_ms) * length_ms


KINDS = {
    "ticker": Kind(method="fetch_ticker", build=Ticker.from_ccxt),
    "orderbook": Kind(
        method="fetch_order_book",
        params=("limit",),
        limit=_accepted_depth,
        build=OrderBook.from_ccxt,
        build_params=("limit",),
        has_levels=True,
    ),
    "ohlcv": Kind(
        method="fetch_ohlcv",
        params=("timeframe", "limit", "since"),
        build=Candles.from_ccxt,
        build_params=("timeframe", "since"),
        check_params=_check_ohlcv,
    ),
    "trades": Kind(
        method="fetch_trades",
        params=("limit",),
        limit=_accepted_trades,
        build=Trades.from_ccxt,
    ),
}
DATA_ROUTES = ("/tickers", *(f"/{kind}/{{symbol}}" for kind in KINDS))


async def fetch(manager: ExchangeManager, key: Key) -> Fetched[MarketData]:
    """Fetch the data of a key from its exchange. Raises `UpstreamError` or `CallerError`."""
    kind = KINDS[key.kind]
    params: dict[str, Any] = dict(zip(kind.params, key.params, strict=True))
    build_params = {name: params[name] for name in kind.build_params}
    build = partial(kind.build, exchange=key.exchange, symbol=key.symbol, **build_params)
    if "limit" in params:
        params["limit"] = kind.limit(PROFILES[key.exchange], key.symbol, params["limit"])
    method = methodcaller(kind.method, key.symbol, **params)
    call = ExchangeCall(key.exchange, key.kind, method, build, key.symbol, _size_of(key))
    return await manager.call(call)


def weight_of_key(key: Key) -> int:
    """Return the request weight of fetching a key."""
    return weight_of(key.exchange, key.kind, _size_of(key), key.symbol)


def _size_of(key: Key) -> int:
    """Return the number on which the request weight of a key depends."""
    return int(key.params[0] or 1) if KINDS[key.kind].has_levels else 1


def ttl_of(settings: Settings, key: Key) -> float:
    """Return the seconds an answer is fresh: the setting `<kind>_ttl_seconds`."""
    ttl: float = getattr(settings, f"{key.kind}_ttl_seconds")
    return ttl
