"""Calls to the exchanges: through the breaker, the budget, a deadline and error translation."""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from operator import methodcaller
from typing import Any, Generic, TypeVar

import aiohttp

from config import Settings
from src.core import errors, metrics
from src.core.background import report_error
from src.core.circuit_breaker import CLOSED, HALF_OPEN, OPEN, CircuitBreaker, Policy, hold
from src.core.clock import Clock
from src.core.errors import RETRY_ADVICE
from src.core.models import Ticker
from src.exchanges import ccxt_client
from src.exchanges.budget import FUTURES, RateLimiter
from src.exchanges.http_client import Answer, answer, clock_difference, open_session
from src.exchanges.markets import Markets
from src.exchanges.pauses import Pauses, Target
from src.exchanges.profiles import EXCHANGE, MARKET, PROFILES
from src.exchanges.tickers import fetch_tickers
from src.exchanges.translation import check_answer, check_empty, describe, translate
from src.store.redis import RedisStore

log = logging.getLogger(__name__)
T = TypeVar("T")

# Pauses that the exchange asked for. Calling earlier may lengthen a ban.
HOLD_CAUSES = (errors.ExchangeRateLimited.cause, errors.ExchangeBanned.cause)
# A breaker that has been half-open for this long is probed with a request for the time. Clients'
# requests come first, because they show whether the data is right.
PROBE_DELAY_SECONDS = 2.0
PROBE_TICK_SECONDS = 0.5
# Connections besides those of the MAX_CONCURRENT loads: 50 order book snapshots for streams at
# once, and probes. Behind loads that hang, these calls would count as timeouts of their exchange.
EXTRA_CONNECTIONS = 64


@dataclass(frozen=True, slots=True)
class Fetched(Generic[T]):
    """Data from an exchange, and when the call started and ended (monotonic seconds)."""

    value: T
    started: float
    received: float
    requested_at: float = 0.0
    """When the call started, in UTC seconds on the exchange's clock."""
    sent_at: float = 0.0
    """The same on our clock."""
    server_time: int | None = None
    """When the exchange answered, in UTC milliseconds of its clock. None if it did not say."""


@dataclass
class Exchange:
    """The state of one exchange."""

    client: ccxt_client.CcxtClient
    breaker: CircuitBreaker
    last_success: float | None = None
    """UTC seconds."""
    in_flight: int = 0


@dataclass(frozen=True, slots=True)
class ExchangeCall(Generic[T]):
    """One call to an exchange."""

    exchange: str
    operation: str
    fetch: Callable[[ccxt_client.CcxtClient], Awaitable[Any]]
    """Returns ccxt's result."""
    build: Callable[..., T]
    """Converts ccxt's result to our model, given `fetched_at` (UTC ms). Raises `GatewayError`."""
    symbol: str = ""
    """A symbol of the market type, on which the request weight depends."""
    size: int = 1
    """Number of symbols or levels, on which the request weight depends."""
    fixed_weight: int | None = None
    """The request weight. None: the one of the operation."""
    for_swap: bool | None = None
    """True if the call uses the budget of swaps. None: the symbol decides."""
    timeout_seconds: float | None = None
    """Replaces EXCHANGE_TIMEOUT_SECONDS for calls that no request waits for."""
    answer: Answer = field(default_factory=Answer)

    @property
    def weight(self) -> int:
        """The request weight."""
        if self.fixed_weight is not None:
            return self.fixed_weight
        return weight_of(self.exchange, self.operation, self.size, self.symbol)

    @property
    def is_swap(self) -> bool:
        """True if the call uses the budget of swaps."""
        return is_swap(self.symbol) if self.for_swap is None else self.for_swap

    @property
    def target(self) -> Target:
        """What the call is about. Without a symbol if it is about several markets."""
        symbol = "" if self.operation == "tickers" else self.symbol
        return Target(self.exchange, self.operation, symbol)


class ExchangeManager:
    """Calls the enabled exchanges. Methods that call one raise `UpstreamError` or `CallerError`."""

    def __init__(self, settings: Settings, store: RedisStore, clock: Clock) -> None:
        self.names = settings.enabled_exchanges
        self.markets = Markets(self.names, settings.market_types)
        self.limiter = RateLimiter(_budgets(settings), store, clock)
        self.pauses = Pauses(clock, settings)
        self.settings = settings
        self.clock = clock
        self._exchanges: dict[str, Exchange] = {}
        # Earliest time of the next probe, monotonic seconds.
        self._probe_at = dict.fromkeys(self.names, 0.0)
        self._session: aiohttp.ClientSession | None = None

    async def start(self) -> None:
        """Create the clients. Nothing connects yet."""
        self._session = open_session(self.settings.max_concurrent + EXTRA_CONNECTIONS)
        policy = Policy(
            threshold=self.settings.cb_threshold,
            reset_seconds=self.settings.cb_reset_seconds,
            window_seconds=self.settings.cb_window_seconds,
            max_open_seconds=self.settings.cb_max_open_seconds,
        )
        for name in self.names:
            options = ccxt_client.ClientOptions.from_settings(name, self.settings)
            client = ccxt_client.make_client(options, self._session)
            breaker = CircuitBreaker(name, self.clock, policy, partial(self._log_change, name))
            self._exchanges[name] = Exchange(client, breaker)
        missing = ccxt_client.missing_internals(client)
        if missing:
            fields = {"missing": missing, "tested": ccxt_client.TESTED_CCXT_VERSION}
            log.warning("ccxt internals are missing; slower alternatives are used", extra=fields)

    async def close(self) -> None:
        """Close the connections."""
        for exchange in self._exchanges.values():
            await exchange.client.close()
        if self._session is not None:
            await self._session.close()

    def __getitem__(self, name: str) -> Exchange:
        return self._exchanges[name]

    def is_available(
        self, name: str, weight: int = 1, operation: str = "", symbol: str = ""
    ) -> bool:
        """True if breaker and budget would admit a call now, as far as this process knows.

        With `operation` and `symbol`, also if neither the endpoint nor the market is paused.
        """
        is_spent = self.limiter.is_spent(self.pool_of(name, symbol), weight)
        is_paused = self.pauses.find(Target(name, operation, symbol)) is not None
        is_admitted = self._exchanges[name].breaker.admits(symbol if operation else "")
        return is_admitted and not is_spent and not is_paused

    def pool_of(self, name: str, symbol: str) -> str:
        """Return the pool of request weight that a symbol uses."""
        return self.limiter.pool_of(name, is_swap=is_swap(symbol))

    def is_refused(self, name: str) -> bool:
        """True while the exchange has asked for a pause or refuses this location."""
        breaker = self._exchanges[name].breaker
        return breaker.state == OPEN and breaker.cause in (*HOLD_CAUSES, errors.GeoBlocked.cause)

    async def tickers(
        self, name: str, symbols: Sequence[str]
    ) -> Fetched[dict[str, Ticker | errors.GatewayError]]:
        """Fetch several tickers of one market type with one call.

        Where one ticker is unusable, its value is the error. Paused markets are not requested.
        """
        values: dict[str, Ticker | errors.GatewayError] = {}
        for symbol in symbols:
            if (paused := self.pauses.find(Target(name, "tickers", symbol))) is not None:
                values[symbol] = paused
        requested = [symbol for symbol in symbols if symbol not in values]
        started = self.clock.monotonic()
        if not requested:
            return Fetched(values, started, started)
        build = partial(_build_plausible_tickers, exchange=name, symbols=requested)
        fetch = partial(fetch_tickers, PROFILES[name], requested)
        call = ExchangeCall(name, "tickers", fetch, build, requested[0], len(requested))
        try:
            fetched = await self.call(call)
        except errors.UnknownSymbol:
            if not PROFILES[name].has_partial_errors or call.answer.status is None:
                raise  # `None`: ccxt's own market list has no such symbol
            unknown = _build_tickers({}, name, requested)  # an error without any rows
            fetched = Fetched(unknown, started, self.clock.monotonic())
        for symbol, ticker in fetched.value.items():
            if isinstance(ticker, errors.UnknownSymbol | errors.MarketHalted):
                self.pauses.record(Target(name, "tickers", symbol), ticker)
        return replace(fetched, value=values | fetched.value)

    async def raw_order_book(self, name: str, symbol: str, limit: int) -> dict[str, Any]:
        """Fetch ccxt's order book, to which streamed updates are applied."""
        fetch = methodcaller("fetch_order_book", symbol, limit)
        call = ExchangeCall(name, "orderbook", fetch, keep, symbol, limit)
        fetched: Fetched[dict[str, Any]] = await self.call(call)
        return fetched.value

    async def clock_skew(self, name: str) -> float:
        """Return the seconds that the exchange's clock is ahead, without half the round trip."""
        before = self.clock.time()
        call = ExchangeCall(name, "time", methodcaller("fetch_time"), _build_time)
        fetched = await self.call(call)
        return fetched.value / 1000 - (before + self.clock.time()) / 2

    async def probe(self, name: str) -> None:
        """Request an exchange's time if its breaker is half-open and no request has tried it.

        A probe without a verdict, for example without budget, is repeated after CB_RESET_SECONDS.
        """
        now = self.clock.monotonic()
        breaker = self._exchanges[name].breaker
        due = max(self._probe_at[name], breaker.open_until + PROBE_DELAY_SECONDS)
        if breaker.state == HALF_OPEN and breaker.admits() and now >= due:
            self._probe_at[name] = now + self.settings.cb_reset_seconds
            trips = breaker.trips
            with contextlib.suppress(errors.GatewayError):
                await self.clock_skew(name)
                breaker.trips = trips  # the next failure of data doubles the open time again

    async def reset_breakers(self, *, keep_holds: bool = False) -> list[str]:
        """Close all breakers and forget all holds. Return the exchanges whose breaker changed.

        With `keep_holds`, pauses that an exchange asked for stay.
        """
        changed = []
        for name, exchange in self._exchanges.items():
            if keep_holds and exchange.breaker.cause in HOLD_CAUSES:
                continue
            if exchange.breaker.state != CLOSED:
                changed.append(name)
            exchange.breaker.reset()
            self.pauses.release(name)
            if not keep_holds:  # the hold may be another replica's
                await self.limiter.release(name)
        return changed

    async def call(self, call: ExchangeCall[T]) -> Fetched[T]:
        """Call an exchange through its breaker. Rate limits, bans and geo-blocks hold it open.

        A market or endpoint that is paused is not called: that is no verdict about the exchange.
        """
        name = call.exchange
        paused = self.pauses.find(call.target)
        if paused is not None:
            raise paused
        breaker = self._exchanges[name].breaker
        try:
            return await breaker.call(self._execute, call, subject=call.target.symbol)
        except errors.CircuitOpen as error:
            metrics.circuit_rejected_total.labels(name).inc()
            if breaker.cause != errors.GeoBlocked.cause:
                raise
            detail = f"{name} refuses this location; use another exchange"
            raise errors.GeoBlocked(detail, exchange=name, retry_after=error.retry_after) from None
        except errors.UpstreamError as error:
            is_refusal = isinstance(error, errors.GeoBlocked | errors.ExchangeRateLimited)
            if is_refusal and error.scope == EXCHANGE:
                self.hold(name, error)
            # The breaker may stay open for longer than this error says.
            error.retry_after = max(error.retry_after or 0.0, breaker.retry_after)
            raise

    def hold(self, name: str, error: errors.UpstreamError) -> None:
        """Keep the breaker open for as long as an exchange's refusal asks."""
        until = self.clock.monotonic() + self.pauses.length_of(error)
        hold(self._exchanges[name].breaker, until, error.cause)

    async def _execute(self, call: ExchangeCall[T]) -> Fetched[T]:
        """Call an exchange within its budget and the deadline."""
        pool = self.limiter.pool_of(call.exchange, is_swap=call.is_swap)
        await self.limiter.acquire(pool, call.weight)
        exchange = self._exchanges[call.exchange]
        started = self.clock.monotonic()
        outcome = "error"
        reason = ""
        token = answer.set(call.answer)
        exchange.in_flight += 1
        try:
            value = await self._fetch(call, exchange)
            outcome = "success"
            exchange.last_success = self.clock.time()
            self.pauses.succeeded(call.target)
            return self._fetched(call, value, started)
        except Exception as raised:  # noqa: BLE001 - translated and raised again
            error = translate(call.exchange, raised, call.answer, self.clock.time())
            outcome = _outcome_of(error)
            reason = describe(raised, call.answer) or type(raised).__name__
            self.pauses.record(call.target, error)
            if isinstance(error, errors.ExchangeRateLimited) and error.scope == EXCHANGE:
                await self.limiter.hold(call.exchange, self.pauses.length_of(error), error.cause)
            raise error from None
        finally:
            exchange.in_flight -= 1
            answer.reset(token)
            _observe(call, outcome, reason, self.clock.monotonic() - started)
            await self._correct_budget(call)

    def _fetched(self, call: ExchangeCall[T], value: T, started: float) -> Fetched[T]:
        received = self.clock.monotonic()
        received_at = self.clock.time()
        sent_at = received_at - (received - started)
        ahead = clock_difference(call.answer.headers.get("Date", ""), sent_at, received_at)
        pattern = PROFILES[call.exchange].body_time
        server_time = call.answer.server_time(pattern, received_at)
        if pattern and server_time:  # the whole seconds of the Date header would show a false lag
            lag = metrics.receipt_lag_seconds
            metrics.observe_lag(lag, call.exchange, server_time, received_at)
        return Fetched(value, started, received, sent_at + ahead, sent_at, server_time)

    async def _fetch(self, call: ExchangeCall[T], exchange: Exchange) -> T:
        # Not wait_for: the call has to stay in this task, which holds the context variable.
        async with asyncio.timeout(call.timeout_seconds or self.settings.exchange_timeout_seconds):
            raw = await call.fetch(exchange.client)
        check_answer(call.exchange, call.answer)
        if call.symbol and call.operation in PROFILES[call.exchange].proofs and not has_rows(raw):
            market_id = exchange.client.markets[call.symbol]["id"]
            check_empty(call.exchange, call.operation, market_id, call.answer)
        try:
            return call.build(raw, fetched_at=int(self.clock.time() * 1000))
        except errors.GatewayError:
            raise
        except Exception as error:  # it may be our own fault
            report_error("loads", error)
            raise

    async def _correct_budget(self, call: ExchangeCall[Any]) -> None:
        """Use the exchange's own count if its response has one."""
        name = call.exchange
        has_swaps = "swap" in self.settings.market_types
        if call.operation == "markets" and has_swaps and len(self.limiter.pools(name)) > 1:
            return  # several calls to different pools; the headers are those of the last one
        pool = self.limiter.pool_of(name, is_swap=call.is_swap)
        profile = PROFILES[name]
        used = call.answer.headers.get(profile.used_weight_header, "")
        if used.isascii() and used.isdigit():
            await self.limiter.correct(pool, int(used[:9]))
        if call.answer.headers.get(profile.remaining_header) == "0":
            await self.limiter.correct(pool, self.limiter.budgets[pool][0])

    def _pause_suspect(self, name: str, new: str) -> None:
        """When another market closes a breaker, pause the only one that failed in its place."""
        breaker = self._exchanges[name].breaker
        seconds = breaker.open_until - self.clock.monotonic()
        if new == CLOSED and breaker.suspect and seconds > 0:
            detail = f"{name} fails for {breaker.suspect} and works for others; {RETRY_ADVICE}"
            error = errors.CircuitOpen(detail, retry_after=seconds)
            error.scope = MARKET
            self.pauses.add(Target(name, "", breaker.suspect), error, seconds)

    def _log_change(self, name: str, old: str, new: str, cause: str | None) -> None:
        self._pause_suspect(name, new)
        metrics.circuit_transitions_total.labels(name, new).inc()
        seconds = round(self._exchanges[name].breaker.retry_after, 1) or None
        fields = {"exchange": name, "from": old, "to": new, "cause": cause, "retry_in": seconds}
        level = logging.WARNING if new == OPEN else logging.INFO
        log.log(level, "circuit breaker changed", extra=fields)


def _budgets(settings: Settings) -> dict[str, tuple[int, int]]:
    """Return the budget of each pool of the enabled exchanges."""
    budgets = {}
    for name in settings.enabled_exchanges:
        exchange = settings.exchanges[name]
        budgets[name] = exchange.budget
        if exchange.futures_budget is not None:
            budgets[name + FUTURES] = exchange.futures_budget
    return budgets


def has_rows(raw: object) -> bool:
    """True if ccxt's candles, trades or order book have any row."""
    if isinstance(raw, dict):
        return bool(raw.get("bids") or raw.get("asks"))
    return bool(raw)


def is_swap(symbol: str) -> bool:
    """True for the unified symbol of a swap, which names the settlement: `BTC/USDT:USDT`."""
    return ":" in symbol


def weight_of(name: str, operation: str, size: int = 1, symbol: str = "") -> int:
    """Return the weight of a call; `size` is the number of symbols or levels."""
    return PROFILES[name].weight(operation, size, is_swap(symbol))


def batch_size(name: str) -> int:
    """Return how many tickers one call should fetch."""
    return PROFILES[name].batch_size


def _observe(call: ExchangeCall[Any], outcome: str, reason: str, seconds: float) -> None:
    metrics.exchange_requests_total.labels(call.exchange, call.operation, outcome).inc()
    duration = metrics.exchange_request_duration_seconds.labels(call.exchange, call.operation)
    duration.observe(seconds)
    fields: dict[str, Any] = {"exchange": call.exchange, "operation": call.operation}
    fields |= {"outcome": outcome, "reason": reason or None, "seconds": round(seconds, 4)}
    level = logging.DEBUG if outcome == "success" else logging.INFO
    log.log(level, "exchange asked", extra=fields)


def _outcome_of(error: errors.GatewayError) -> str:
    if isinstance(error, errors.CallerError | errors.MarketHalted):
        return "rejected"
    return str(getattr(error, "cause", "error"))


def keep(raw: T, fetched_at: int) -> T:
    """Return the result unchanged: it needs no conversion."""
    return raw


def _build_time(raw: object, fetched_at: int) -> float:
    if not isinstance(raw, int):
        raise errors.BadUpstreamData("the exchange sent no time; it is requested again")
    return float(raw)


def _build_tickers(
    raw: dict[str, Any], exchange: str, symbols: Sequence[str], fetched_at: int = 0
) -> dict[str, Ticker | errors.GatewayError]:
    """Convert a list of tickers. A symbol that is missing is no longer known to the exchange."""
    built: dict[str, Ticker | errors.GatewayError] = {}
    for symbol in symbols:
        if symbol not in raw:
            detail = f"{exchange} no longer lists {symbol}; see /markets"
            built[symbol] = errors.UnknownSymbol(detail, exchange=exchange, symbol=symbol)
            continue
        try:
            built[symbol] = Ticker.from_ccxt(raw[symbol], exchange, symbol, fetched_at)
        except (errors.BadUpstreamData, errors.MarketHalted) as error:
            built[symbol] = error
    return built


def _build_plausible_tickers(
    raw: dict[str, Any], exchange: str, symbols: Sequence[str], fetched_at: int
) -> dict[str, Ticker | errors.GatewayError]:
    """Convert a list of tickers. Raises `BadUpstreamData` if none of them is plausible."""
    built = _build_tickers(raw, exchange, symbols, fetched_at)
    if not any(isinstance(ticker, Ticker | errors.MarketHalted) for ticker in built.values()):
        raise errors.BadUpstreamData(f"{exchange} sent no plausible ticker", exchange=exchange)
    return built
