"""The exchanges: breaker, budget, deadline and error translation meet here, around every call.

A call goes: the breaker admits it, the budget admits it, a deadline runs, ccxt asks, the answer passes the
plausibility gate.
"""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from operator import methodcaller
from typing import Any, Generic, TypeVar

import aiohttp

from config import Settings
from src.core import metrics
from src.core.background import report_error
from src.core.circuit_breaker import CircuitBreaker
from src.core.clock import Clock
from src.core.errors import (
    BadUpstreamData,
    BudgetSpent,
    CallerError,
    CircuitOpen,
    ExchangeRateLimited,
    GatewayError,
    GeoBlocked,
    InternalError,
    NoPrice,
    UpstreamError,
)
from src.core.models import Candles, OrderBook, Ticker, Trades
from src.exchanges.budget import RateLimiter
from src.exchanges.ccxt_client import CcxtClient, check_answer, make_client, reason_of, translate
from src.exchanges.http_client import Answer, answer, open_session
from src.exchanges.markets import Markets
from src.store.redis import RedisStore

log = logging.getLogger(__name__)
T = TypeVar("T")

MAX_TRADES = {"bybit": 60}  # bybit refuses more for spot
HOLDS = ("rate_limited", "banned")  # causes of an open breaker that are an exchange's own word
# A breaker that is half-open for so long without a call is probed. Requests come first: they show whether the data is
# right, and the probe only asks for the time.
PROBE_DELAY_SECONDS = 2.0
PROBE_TICK_SECONDS = 0.5  # how often a breaker is checked for that
# Calls at once beside the loads that MAX_CONCURRENT bounds: order book snapshots for streams (50 at a time) and probes.
# Without connections of their own they would wait for loads that hang, and be counted as timeouts of their exchange.
OTHER_CALLS = 64
MAX_BATCH = 100  # tickers in one call: kraken's list of pairs goes into the URL

# Documented request weights of binance; the others count calls.
BINANCE_TICKERS = ((20, 2), (100, 40))
BINANCE_DEPTH = ((100, 5), (500, 25), (1000, 50), (5000, 250))
BINANCE_WEIGHTS = {"ticker": 2, "ohlcv": 2, "trades": 4, "markets": 20, "time": 1}
# Its swaps have a pool of their own, 2,400 a minute, and cost 1, 40, 20, 10 and 20 there. Times 2.5 they are charged to
# the one budget we keep, whose 6,000 then cannot be more than theirs.
BINANCE_SWAP_WEIGHTS = {"ticker": 3, "tickers": 100, "orderbook": 50, "ohlcv": 25, "trades": 50}
BINANCE_SWAP_DEPTHS = (5, 10, 20, 50, 100, 500)  # it refuses any other number of levels


@dataclass(frozen=True, slots=True)
class Fetched(Generic[T]):
    """What an exchange sent, and when it was asked and had answered (monotonic seconds)."""

    value: T
    started: float
    received: float


@dataclass
class Exchange:
    """What belongs to one exchange."""

    client: CcxtClient
    breaker: CircuitBreaker
    last_success: float | None = None  # UTC seconds
    in_flight: int = 0


@dataclass(frozen=True, slots=True)
class ExchangeCall(Generic[T]):
    """One call to make: `ask(client)` brings ccxt's answer, `build(raw, fetched_at=ms)` makes ours of it, or raises."""

    exchange: str
    operation: str
    weight: int
    ask: Callable[[CcxtClient], Awaitable[Any]]
    build: Callable[..., T]
    seconds: float | None = None  # longer than EXCHANGE_TIMEOUT_SECONDS for what no request waits for
    got: Answer = field(default_factory=Answer)


class ExchangeManager:
    """Asks the enabled exchanges. Every method that asks raises `UpstreamError` or `CallerError`, and nothing else."""

    def __init__(self, settings: Settings, store: RedisStore, clock: Clock) -> None:
        self.names = settings.enabled_exchanges
        self.markets = Markets(self.names, settings.market_types)
        self.limiter = RateLimiter({name: settings.exchange(name).budget for name in self.names}, store, clock)
        self._settings = settings
        self._clock = clock
        self._exchanges: dict[str, Exchange] = {}
        self._probe_at = dict.fromkeys(self.names, 0.0)  # earliest time of the next probe, monotonic seconds
        self._session: aiohttp.ClientSession | None = None

    async def start(self) -> None:
        """Make the clients; nothing connects yet."""
        self._session = open_session(self._settings.max_concurrent + OTHER_CALLS)
        for name in self.names:
            client = make_client(name, self._settings, self._session)
            self._exchanges[name] = Exchange(client, self._make_breaker(name))

    async def close(self) -> None:
        """Close the connections."""
        for exchange in self._exchanges.values():
            await exchange.client.close()
        if self._session is not None:
            await self._session.close()

    def __getitem__(self, name: str) -> Exchange:
        return self._exchanges[name]

    def is_available(self, name: str, cost: int = 1) -> bool:
        """Whether a call would get past the breaker and the budget now, as far as this process knows."""
        return self._exchanges[name].breaker.admits and not self.limiter.is_spent(name, cost)

    async def ticker(self, name: str, symbol: str) -> Fetched[Ticker]:
        """Fetch one ticker."""
        build = partial(Ticker.from_ccxt, exchange=name, symbol=symbol)
        ask = methodcaller("fetch_ticker", symbol)
        return await self.call(ExchangeCall(name, "ticker", weight_of(name, "ticker", symbol=symbol), ask, build))

    async def tickers(self, name: str, symbols: Sequence[str]) -> Fetched[dict[str, Ticker | GatewayError]]:
        """Fetch several tickers of one type of market with one call; what is wrong with one is its value."""
        build = partial(_tickers, exchange=name, symbols=symbols)
        ask = methodcaller("fetch_tickers", list(symbols))
        weight = weight_of(name, "tickers", len(symbols), symbols[0])
        return await self.call(ExchangeCall(name, "tickers", weight, ask, build))

    async def order_book(self, name: str, symbol: str, limit: int) -> Fetched[OrderBook]:
        """Fetch the best `limit` levels of both sides."""
        build = partial(OrderBook.from_ccxt, exchange=name, symbol=symbol, limit=limit)
        if name == "binance" and is_swap(symbol):
            limit = next(depth for depth in BINANCE_SWAP_DEPTHS if depth >= limit)
        ask = methodcaller("fetch_order_book", symbol, limit)
        return await self.call(ExchangeCall(name, "orderbook", weight_of(name, "orderbook", limit, symbol), ask, build))

    async def raw_order_book(self, name: str, symbol: str, limit: int) -> dict[str, Any]:
        """Fetch a book as ccxt has it, to which what is pushed is added."""
        ask = methodcaller("fetch_order_book", symbol, limit)
        call = ExchangeCall(
            name, "orderbook", weight_of(name, "orderbook", limit, symbol), ask, lambda raw, fetched_at: raw
        )
        fetched: Fetched[dict[str, Any]] = await self.call(call)
        return fetched.value

    async def ohlcv(self, name: str, symbol: str, timeframe: str, limit: int, since: int | None) -> Fetched[Candles]:
        """Fetch up to `limit` candles, from `since` (UTC ms) or the newest ones."""
        build = partial(Candles.from_ccxt, exchange=name, symbol=symbol, timeframe=timeframe, since=since)
        ask = methodcaller("fetch_ohlcv", symbol, timeframe, since, limit)
        return await self.call(ExchangeCall(name, "ohlcv", weight_of(name, "ohlcv", symbol=symbol), ask, build))

    async def trades(self, name: str, symbol: str, limit: int) -> Fetched[Trades]:
        """Fetch up to `limit` of the newest trades."""
        build = partial(Trades.from_ccxt, exchange=name, symbol=symbol)
        ask = methodcaller("fetch_trades", symbol, None, min(limit, MAX_TRADES.get(name, limit)))
        return await self.call(ExchangeCall(name, "trades", weight_of(name, "trades", symbol=symbol), ask, build))

    async def clock_skew(self, name: str) -> float:
        """Return how many seconds the exchange's clock is ahead of ours, half the round trip taken off."""
        before = self._clock.time()
        call = ExchangeCall(name, "time", weight_of(name, "time"), methodcaller("fetch_time"), _server_time)
        fetched = await self.call(call)
        return fetched.value / 1000 - (before + self._clock.time()) / 2

    async def probe(self, name: str) -> None:
        """Ask an exchange for its time if its breaker is half-open and no request tries it.

        The breaker decides what follows: a success closes it, a failure opens it for longer. A probe without a verdict,
        such as one without budget, is repeated after CB_RESET_SECONDS at the earliest.
        """
        now = self._clock.monotonic()
        breaker = self._exchanges[name].breaker
        if now >= self._probe_at[name] and breaker.is_idle(PROBE_DELAY_SECONDS):
            self._probe_at[name] = now + self._settings.cb_reset_seconds
            trips = breaker.trips
            with contextlib.suppress(GatewayError):
                await self.clock_skew(name)
                breaker.trips = trips  # the next failure of data doubles the open time again

    async def reset_breakers(self, *, keep_holds: bool = False) -> list[str]:
        """Close every breaker and forget every hold; returns the exchanges whose breaker was not closed.

        With `keep_holds` what an exchange asked for stays: asking again too soon may lengthen a ban.
        """
        changed = []
        for name, exchange in self._exchanges.items():
            if keep_holds and exchange.breaker.cause in HOLDS:
                continue
            if exchange.breaker.state != "closed":
                changed.append(name)
            exchange.breaker.reset()
            if not keep_holds:  # it may be another replica's
                await self.limiter.release(name)
        return changed

    async def call(self, call: ExchangeCall[T]) -> Fetched[T]:
        """Ask an exchange through its breaker; a limit or block it tells of keeps that open as long as it says."""
        name, breaker = call.exchange, self._exchanges[call.exchange].breaker
        try:
            return await breaker.call(self._ask, call)
        except CircuitOpen as rejected:
            metrics.circuit_rejected_total.labels(name).inc()
            if breaker.cause != GeoBlocked.cause:
                raise
            told = f"{name} refuses this location; ask another exchange"  # waiting changes nothing: say so each time
            raise GeoBlocked(told, exchange=name, retry_after=rejected.retry_after) from None
        except (GeoBlocked, ExchangeRateLimited) as error:
            self.keep_away(name, error)
            raise

    def keep_away(self, name: str, error: UpstreamError) -> None:
        """Keep the breaker open for as long as an exchange's refusal says."""
        self._exchanges[name].breaker.open_until(self._clock.monotonic() + self._pause(error), error.cause)

    async def _ask(self, call: ExchangeCall[T]) -> Fetched[T]:
        name, got = call.exchange, call.got
        await self.limiter.acquire(name, call.weight)
        exchange, started, outcome, reason = self._exchanges[name], self._clock.monotonic(), "error", ""
        token = answer.set(got)
        exchange.in_flight += 1
        try:
            # asyncio.timeout, not wait_for: the call stays in this task, where its answer is noted.
            async with asyncio.timeout(call.seconds or self._settings.exchange_timeout_seconds):
                raw = await call.ask(exchange.client)
            check_answer(name, got)
            result = Fetched(self._build(call, raw), started, self._clock.monotonic())
        except Exception as error:  # noqa: BLE001 - every one is translated and raised again
            ours, reason = translate(name, error, got), reason_of(error, got) or type(error).__name__
            outcome = "rejected" if isinstance(ours, CallerError | NoPrice) else getattr(ours, "cause", "error")
            if isinstance(ours, ExchangeRateLimited | GeoBlocked):
                ours.retry_after = self._pause(ours)
            if isinstance(ours, ExchangeRateLimited):
                await self.limiter.hold(name, self._pause(ours), ours.cause)
            raise ours from None
        else:
            outcome, exchange.last_success = "success", self._clock.time()
            return result
        finally:
            exchange.in_flight -= 1
            answer.reset(token)
            self._observe(call, outcome, reason, self._clock.monotonic() - started)
            await self._correct_budget(name, got)

    def _build(self, call: ExchangeCall[T], raw: object) -> T:
        """Convert ccxt's result. Report an unexpected exception before it is translated: it may be our own fault."""
        try:
            return call.build(raw, fetched_at=int(self._clock.time() * 1000))
        except GatewayError:
            raise
        except Exception as error:
            report_error("loads", error)
            raise

    @staticmethod
    def _observe(call: ExchangeCall[Any], outcome: str, reason: str, seconds: float) -> None:
        metrics.exchange_requests_total.labels(call.exchange, call.operation, outcome).inc()
        metrics.exchange_request_duration_seconds.labels(call.exchange, call.operation).observe(seconds)
        fields: dict[str, Any] = {"exchange": call.exchange, "operation": call.operation, "outcome": outcome}
        fields |= {"reason": reason or None, "seconds": round(seconds, 4)}
        log.log(logging.DEBUG if outcome == "success" else logging.INFO, "exchange asked", extra=fields)

    async def _correct_budget(self, name: str, got: Answer) -> None:
        """Trust the exchange's own count over ours, where it tells."""
        used = got.headers.get("X-MBX-USED-WEIGHT-1M", "")
        if name == "binance" and used.isascii() and used.isdigit():
            await self.limiter.correct(name, int(used[:9]))
        if name == "bybit" and got.headers.get("X-Bapi-Limit-Status") == "0":
            await self.limiter.correct(name, self._settings.bybit.budget[0])

    def _pause(self, error: UpstreamError) -> float:
        if isinstance(error, GeoBlocked):
            return self._settings.geo_block_seconds
        return error.retry_after or self._settings.cb_reset_seconds

    def _make_breaker(self, name: str) -> CircuitBreaker:
        def on_change(old: str, new: str, cause: str | None) -> None:
            metrics.circuit_transitions_total.labels(name, new).inc()
            wait = round(self._exchanges[name].breaker.retry_after, 1) or None
            fields = {"exchange": name, "from": old, "to": new, "cause": cause, "retry_in": wait}
            log.log(logging.WARNING if new == "open" else logging.INFO, "circuit breaker changed", extra=fields)

        return CircuitBreaker(
            name,
            clock=self._clock,
            threshold=self._settings.cb_threshold,
            reset_seconds=self._settings.cb_reset_seconds,
            window_seconds=self._settings.cb_window_seconds,
            max_open_seconds=self._settings.cb_max_open_seconds,
            neutral=(CallerError, NoPrice, BudgetSpent, InternalError),
            on_change=on_change,
        )


def is_swap(symbol: str) -> bool:
    """Whether a unified symbol names a swap: `BTC/USDT:USDT` tells what it settles in."""
    return ":" in symbol


def weight_of(name: str, operation: str, size: int = 1, symbol: str = "") -> int:
    """Return what a call costs of the exchange's budget; `size` is the number of symbols or levels."""
    if name != "binance":
        return 1
    if is_swap(symbol):
        return BINANCE_SWAP_WEIGHTS[operation]
    steps = {"tickers": BINANCE_TICKERS, "orderbook": BINANCE_DEPTH}.get(operation)
    if steps is None:
        return BINANCE_WEIGHTS[operation]
    return next((weight for upto, weight in steps if size <= upto), steps[-1][1])


def batch_size(name: str) -> int:
    """Return how many tickers one call is worth asking for: on binance more than 20 cost twenty times as much."""
    return BINANCE_TICKERS[0][0] if name == "binance" else MAX_BATCH


def _server_time(raw: object, fetched_at: int) -> float:
    if not isinstance(raw, int):
        raise BadUpstreamData(f"the exchange sent no time at {fetched_at}")
    return float(raw)


def _tickers(
    raw: dict[str, Any], exchange: str, symbols: Sequence[str], fetched_at: int
) -> dict[str, Ticker | GatewayError]:
    """Build each ticker of a list; raises `BadUpstreamData` when not one of them is plausible."""
    built: dict[str, Ticker | GatewayError] = {}
    for symbol in symbols:
        try:
            built[symbol] = Ticker.from_ccxt(raw.get(symbol) or {"symbol": symbol}, exchange, symbol, fetched_at)
        except (BadUpstreamData, NoPrice) as error:
            built[symbol] = error
    if all(isinstance(ticker, BadUpstreamData) for ticker in built.values()):
        raise BadUpstreamData(f"{exchange} sent no plausible ticker", exchange=exchange)
    return built
