"""Pauses of single markets and endpoints, and when the trouble of markets is one of the exchange.

A pause is known to this process only. It lasts seconds, so that sharing it would save few calls.
"""

from collections.abc import Callable
from typing import NamedTuple

from cachetools import TLRUCache

from config import Settings
from src.core import errors
from src.core.clock import Clock
from src.exchanges.profiles import CALL, ENDPOINT, EXCHANGE, MARKET

MAX_PAUSES = 4096  # more than the markets of all exchanges that clients ask for in a minute
# Different markets that have the same trouble within the window of the breaker, from which on it
# concerns the whole exchange. A limit is often several clients' fault, implausible data is not.
MARKETS_FOR_EXCHANGE_SCOPE = 3
MARKETS_FOR_BAD_DATA = 2
# Trouble of a market that, once several markets have it, is the trouble of the exchange.
SPREADING = (errors.BadUpstreamData, errors.ExchangeRateLimited)
# What an error of a market is about if the call was about several: a list of tickers.
SCOPES_OF_LISTS: dict[type, str] = {
    errors.BadUpstreamData: EXCHANGE,
    errors.ExchangeRateLimited: ENDPOINT,
}
# One endpoint answers both, with the same limits.
ENDPOINTS = {"tickers": "ticker"}


class Target(NamedTuple):
    """What a call is about. Without a symbol: an endpoint. Without an operation: a market."""

    exchange: str
    operation: str
    symbol: str

    @property
    def key(self) -> "Target":
        """The same target, under the name of its endpoint."""
        return self._replace(operation=ENDPOINTS.get(self.operation, self.operation))


class _Pause(NamedTuple):
    end: float
    """Monotonic seconds."""
    error: errors.GatewayError


class Pauses:
    """Markets and endpoints that are not called for some time."""

    def __init__(self, clock: Clock, settings: Settings) -> None:
        self.on_unknown_symbol: Callable[[str], object] = lambda _: None
        """Called with the exchange when it does not know a symbol that its list has."""
        self._clock = clock
        self._settings = settings
        self._pauses: TLRUCache[Target, _Pause] = TLRUCache(
            MAX_PAUSES, ttu=lambda _, pause, __: pause.end, timer=clock.monotonic
        )
        # (exchange, type of error) -> the last markets that had it, the endpoint and the time.
        self._troubled: dict[tuple[str, type], dict[str, tuple[str, float]]] = {}

    def find(self, target: Target) -> errors.GatewayError | None:
        """Return the error of a target that is paused, with the seconds that are left."""
        key = target.key
        targets = (key, key._replace(symbol=""), key._replace(operation=""))
        pause = next(filter(None, map(self._pauses.get, targets)), None)
        if pause is None:
            return None
        error = type(pause.error)(
            pause.error.detail,
            exchange=target.exchange,
            symbol=target.symbol or None,
            retry_after=pause.error.retry_after and pause.end - self._clock.monotonic(),
            **pause.error.extra,
        )
        error.scope = CALL  # it was counted when it arrived
        return error

    def length_of(self, error: errors.GatewayError) -> float:
        """Return the seconds that the pause after an error lasts."""
        if isinstance(error, errors.GeoBlocked):
            return self._settings.geo_block_seconds
        return error.retry_after or self._settings.cb_reset_seconds

    def record(self, target: Target, error: errors.GatewayError) -> None:
        """Decide what an error is about. Pause that, unless it is the exchange.

        After an unknown symbol, the exchange's new market list is needed.
        """
        if error.scope == MARKET and not target.symbol:
            error.scope = SCOPES_OF_LISTS.get(type(error), CALL)
        if isinstance(error, errors.UnknownSymbol):
            if target.symbol:
                error.symbol = target.symbol
                error.scope = MARKET
                self.add(target, error, self._settings.negative_ttl_seconds)
            self.on_unknown_symbol(target.exchange)
            return
        if error.scope != CALL:
            error.retry_after = self.length_of(error)
        if error.scope in (MARKET, ENDPOINT):
            self.add(target, error, self.length_of(error))
        if error.scope == MARKET and isinstance(error, SPREADING):
            error.scope = EXCHANGE if self.is_widespread(target, error) else MARKET

    def add(self, target: Target, error: errors.GatewayError, seconds: float) -> None:
        """Pause the target of an error for some seconds."""
        key = target.key if error.scope == MARKET else target.key._replace(symbol="")
        self._pauses[key] = _Pause(self._clock.monotonic() + seconds, error)

    def release(self, exchange: str) -> None:
        """End all pauses of an exchange."""
        for key in [key for key in self._pauses if key.exchange == exchange]:
            self._pauses.pop(key, None)

    def is_widespread(self, target: Target, error: errors.GatewayError) -> bool:
        """Record the trouble of a market. True if enough different markets have it."""
        now = self._clock.monotonic()
        is_bad_data = isinstance(error, errors.BadUpstreamData)
        enough = MARKETS_FOR_BAD_DATA if is_bad_data else MARKETS_FOR_EXCHANGE_SCOPE
        recent = self._troubled.setdefault((target.exchange, type(error)), {})
        recent.pop(target.symbol, None)
        recent[target.symbol] = (target.key.operation, now)
        for symbol, (_, time) in list(recent.items()):
            if now - time >= self._settings.cb_window_seconds or len(recent) > enough:
                del recent[symbol]
        return len(recent) >= enough

    def succeeded(self, target: Target) -> None:
        """Forget the trouble of a market whose call succeeded at the same endpoint."""
        for (exchange, _), recent in self._troubled.items():
            known = recent.get(target.symbol)
            if exchange == target.exchange and known and known[0] == target.key.operation:
                del recent[target.symbol]
