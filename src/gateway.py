"""What the product does: symbol and exchanges chosen, the cache in front of the manager, fallback, old values.

Every way into the gateway comes through here, so all of them share one entry per exchange, kind, symbol and variant.
"""

import asyncio
import contextlib
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from config import Settings
from src.cache.cache import Cache, Lookup, Outcome
from src.cache.entry import Entry, Key, encode
from src.cache.memory import Held
from src.core import metrics
from src.core.clock import Clock
from src.core.errors import (
    CallerError,
    DeadlineExceeded,
    ExchangeTimeout,
    GatewayError,
    GeoBlocked,
    InvalidParameter,
    MarketsLoading,
    NoExchangeAvailable,
    NoPrice,
    Overloaded,
    TooOld,
    UnknownSymbol,
)
from src.core.models import TIMEFRAMES, MarketData
from src.exchanges.manager import ExchangeManager, Fetched, is_swap, weight_of
from src.exchanges.market_loader import MarketLoader
from src.store.redis import PREFIX, RedisAway, RedisStore

ALL = "all"
START_SECONDS = 3.0  # longest wait for all market lists before the port opens; with a snapshot it takes a tenth of one
FIRST_LIST_SECONDS = 15.0  # longest wait for any of them
SECONDS_BELOW = 100_000_000_000  # as milliseconds this is in 1973, before there was a market: somebody meant seconds


class Served(NamedTuple):
    """An answer as it will be sent; `ttl` is the seconds it stays fresh, negative when it is stale."""

    body: bytes
    etag: str | None  # None: not known yet, the body was marked
    age: float
    ttl: float
    result: str
    keys: tuple[Key, ...] = ()  # all that could have answered, most preferred first; empty when `max_age` was given


class Gateway:
    """Joins the parts; one object per process. Its methods raise `GatewayError`, and nothing else."""

    def __init__(self, settings: Settings, clock: Clock, snapshots: Mapping[str, bytes] | None = None) -> None:
        self.settings = settings
        self.clock = clock
        self.store = RedisStore(settings.redis_address, clock, settings.redis_timeout_seconds)
        self.manager = ExchangeManager(settings, self.store, clock)
        self.loader = MarketLoader(self.manager, settings, self.store, clock, snapshots or {})
        self.cache = Cache(settings, self.store, clock)
        self.markets = self.manager.markets
        self.started_at = clock.time()
        self.maintenance: dict[str, float] = {}  # task -> UTC seconds of its last success
        self._ttls = {
            "ticker": settings.ticker_ttl_seconds,
            "orderbook": settings.orderbook_ttl_seconds,
            "ohlcv": settings.ohlcv_ttl_seconds,
            "trades": settings.trades_ttl_seconds,
        }

    async def ticker(self, symbol: str, exchange: str | None, max_age: float | None) -> Served:
        """Answer with one ticker."""
        return await self.serve("ticker", symbol, exchange, max_age, "")

    async def order_book(self, symbol: str, exchange: str | None, max_age: float | None, limit: int) -> Served:
        """Answer with the best `limit` levels of an order book."""
        return await self.serve("orderbook", symbol, exchange, max_age, str(limit))

    async def ohlcv(
        self, symbol: str, exchange: str | None, max_age: float | None, timeframe: str, limit: int, since: int | None
    ) -> Served:
        """Answer with candles; `since` is UTC milliseconds and must not lie ahead."""
        if since is not None and since > self.clock.time() * 1000:
            raise InvalidParameter("since lies in the future; it is UTC milliseconds, up to now")
        if since is not None and 0 < since < SECONDS_BELOW:
            raise InvalidParameter("since looks like seconds; it is UTC milliseconds")

        if since is not None:  # the first candle that begins at or after it is the same for a whole candle's time
            length = TIMEFRAMES[timeframe] * 1000
            since = -(-since // length) * length
        variant = f"{timeframe}:{limit}:{'' if since is None else since}"
        return await self.serve("ohlcv", symbol, exchange, max_age, variant)

    async def trades(self, symbol: str, exchange: str | None, max_age: float | None, limit: int) -> Served:
        """Answer with the newest trades."""
        return await self.serve("trades", symbol, exchange, max_age, str(limit))

    async def tickers(
        self, symbols: Sequence[str], exchange: str | None, max_age: float | None, within: float = math.inf
    ) -> dict[tuple[str, str], Served | GatewayError]:
        """Answer with many tickers, each by (symbol, exchange or ""); misses of one exchange are one call.

        With the exchange `all` every enabled one answers for itself; else one answers for each symbol, as in `ticker`.
        What is not there after `within` seconds is a `DeadlineExceeded`, or an old value, and its load goes on.
        """
        deadline = self.clock.monotonic() + min(self.settings.request_timeout, within)
        wanted, answers = self._places(symbols, exchange)
        attempts: dict[tuple[str, str], dict[Key, GatewayError]] = {place: {} for place in wanted}
        while self.clock.monotonic() < deadline:
            rest = {
                place: [key for key in keys if key not in attempts[place]]
                for place, keys in wanted.items()
                if place not in answers
            }
            heads = {place: self._pick(keys, max_age) for place, keys in rest.items() if keys}
            if not heads:
                break
            until = self._share(deadline, max(len(keys) for keys in rest.values()))
            outcomes = await self._batch(set(heads.values()), until, max_age)
            for place, key in heads.items():
                outcome = outcomes[key]
                if isinstance(outcome, GatewayError):
                    attempts[place][key] = outcome
                else:
                    answers[place] = self._served(outcome, wanted[place], max_age)
        for place in [place for place in wanted if place not in answers]:
            answers[place] = self._stand_in(wanted[place], attempts[place], max_age)
        return {place: answers.pop(place) for place in wanted} | answers  # in the order asked for, the refused last

    def _places(
        self, symbols: Sequence[str], exchange: str | None
    ) -> tuple[dict[tuple[str, str], list[Key]], dict[tuple[str, str], Served | GatewayError]]:
        """Name each ticker asked for, with the keys that can answer it, or with the error why none can."""
        wanted: dict[tuple[str, str], list[Key]] = {}
        refused: dict[tuple[str, str], Served | GatewayError] = {}
        if exchange not in (None, ALL):
            self.markets.check_exchange(str(exchange))  # wrong for all of them is no matter of one
        for text in symbols:
            for name in self.manager.names if exchange == ALL else [""]:
                try:
                    keys = self.keys("ticker", text, name or exchange, "")
                    wanted[keys[0].symbol, name] = keys
                except (CallerError, MarketsLoading) as error:
                    refused[error.symbol or text, name] = error
        return wanted, refused

    async def _batch(self, keys: set[Key], deadline: float, max_age: float | None) -> dict[Key, Outcome]:
        """Look up tickers of several exchanges at once, with one call for the misses of each."""
        if (ready := self.cache.all_ready(keys, max_age)) is not None:
            return ready  # without a task for each group
        groups: dict[tuple[str, bool], list[Key]] = defaultdict(list)
        for key in sorted(keys):
            groups[key.exchange, is_swap(key.symbol)].append(key)
        ttl = self._ttls["ticker"]
        found = await asyncio.gather(
            *(self.cache.get_many(group, ttl, self._load, deadline, max_age) for group in groups.values())
        )
        return {key: outcome for part in found for key, outcome in part.items()}

    def at_hand(self, keys: Sequence[Key]) -> Held | None:
        """Return what memory answers a request for these keys with; None when more has to be done for it.

        It is what `_pick` and the cache come to, in one step, without waiting and without a trace.
        """
        for key in keys:
            if (held := self.cache.memory.fresh(key)) is not None:
                return held
            if self._is_available(key):
                return None
        return None

    async def refresh(self, keys: Sequence[Key], max_age: float) -> int:
        """Load keys of one exchange and kind that are older than `max_age` seconds; returns how many could be had."""
        until, ttl = self.clock.monotonic() + self.settings.request_timeout, self._ttls[keys[0].kind]
        # What is hot on one replica mostly is on others too: they take turns, and the next one finds it in Redis.
        turn = Key(keys[0].exchange, "refresh", "tickers") if keys[0].kind == "ticker" else keys[0]
        async with self.cache.turn(turn):
            outcomes = await self.cache.get_many(keys, ttl, self._load, until, max_age)
        return sum(isinstance(outcome, Lookup) for outcome in outcomes.values())

    def adopt(self, key: Key, body: bytes, born: float, *, spread: bool) -> None:
        """Keep an answer that came unasked at `born` (monotonic seconds); with `spread` in Redis, too."""
        entry = Entry.of(body, born, born, self._ttls[key.kind], self.cache.jitter)
        self.cache.adopt(key, entry, spread=spread)

    async def serve(self, kind: str, text: str, exchange: str | None, max_age: float | None, variant: str) -> Served:
        """Answer from the first exchange that can, in order; from an old value when none can."""
        deadline = self.clock.monotonic() + self.settings.request_timeout
        keys = self.keys(kind, text, exchange, variant)
        attempts: dict[Key, GatewayError] = {}
        while len(attempts) < len(keys) and (not attempts or self.clock.monotonic() < deadline):
            key = self._pick([key for key in keys if key not in attempts], max_age)
            try:
                until = self._share(deadline, len(keys) - len(attempts))
                found = await self.cache.get(key, self._ttls[kind], self._load, until, max_age)
                return self._served(found, keys, max_age)
            except Overloaded as error:  # the gateway's own bound: another exchange is no way round it
                attempts = dict.fromkeys(keys, error)
            except GatewayError as error:
                attempts[key] = error
        answer = self._stand_in(keys, attempts, max_age)
        if isinstance(answer, GatewayError):
            raise answer
        return answer

    async def _load_one(self, key: Key) -> Entry | GatewayError:
        """Fetch one entry; a refusal is a value, as it is remembered."""
        try:
            return self._entry(await self._fetch(key), key.kind)
        except (CallerError, NoPrice) as error:
            return error

    async def _fetch(self, key: Key) -> Fetched[Any]:
        """Ask the exchange for what a key names."""
        if key.kind == "ticker":
            return await self.manager.ticker(key.exchange, key.symbol)
        if key.kind == "orderbook":
            return await self.manager.order_book(key.exchange, key.symbol, int(key.variant))
        if key.kind == "trades":
            return await self.manager.trades(key.exchange, key.symbol, int(key.variant))
        timeframe, limit, since = key.variant.split(":")
        return await self.manager.ohlcv(key.exchange, key.symbol, timeframe, int(limit), int(since) if since else None)

    async def _load(self, keys: Sequence[Key]) -> dict[Key, Entry | GatewayError]:
        """Load one key of any kind, or tickers of one exchange and type of market by the call for lists."""
        if len(keys) == 1:
            return {keys[0]: await self._load_one(keys[0])}
        try:
            fetched = await self.manager.tickers(keys[0].exchange, [key.symbol for key in keys])
        except CallerError:  # one symbol the exchange no longer knows spoils its whole list: find it
            half = len(keys) // 2
            return await self._load(keys[:half]) | await self._load(keys[half:])
        loaded: dict[Key, Entry | GatewayError] = {}
        for key in keys:
            value = fetched.value[key.symbol]
            if isinstance(value, GatewayError):
                loaded[key] = value
            else:
                loaded[key] = self._entry(Fetched(value, fetched.started, fetched.received), key.kind)
        return loaded

    def _entry(self, fetched: Fetched[MarketData], kind: str) -> Entry:
        body = encode(fetched.value)
        return Entry.of(body, fetched.started, fetched.received, self._ttls[kind], self.cache.jitter)

    def keys(self, kind: str, text: str, exchange: str | None, variant: str) -> list[Key]:
        """Return the keys of the exchanges that list the symbol, in order of preference.

        Raises `MalformedRequest`, `UnknownExchange`, `UnknownSymbol`, or `MarketsLoading` while it cannot be told.
        """
        names = self.manager.names if exchange is None else (self.markets.check_exchange(exchange),)
        symbol = self.markets.canonical(text)
        listed = [(name, market) for name in names if (market := self.markets.find(name, symbol)) is not None]
        if listed:
            return [Key(name, kind, market.symbol, variant) for name, market in listed]
        loading = [name for name in names if name not in self.markets.loaded_at]
        if loading or not names:
            which = ", ".join(loading) or "no exchange is enabled"
            raise MarketsLoading(f"the market list is not there yet: {which}; ask again shortly", symbol=symbol)
        close = self.markets.suggestions(symbol)
        hint = f"; close to it: {', '.join(close)}" if close else "; see /markets"
        if is_swap(symbol) and "swap" not in self.settings.market_types:
            hint = "; swaps are left out by MARKET_TYPES" + hint
        raise UnknownSymbol(
            f"{symbol} is not listed on {' or '.join(names)}{hint}", symbol=symbol, suggestions=close or None
        )

    def _pick(self, keys: Sequence[Key], max_age: float | None) -> Key:
        """Return the first key that memory or its exchange can answer now; else the first, for Redis or the error."""
        for key in keys:
            if self.cache.has_fresh(key, max_age) or self._is_available(key):
                return key
        return keys[0]

    def _is_available(self, key: Key) -> bool:
        levels = int(key.variant) if key.kind == "orderbook" else 1
        return self.manager.is_available(key.exchange, weight_of(key.exchange, key.kind, levels, key.symbol))

    def _share(self, deadline: float, candidates: int) -> float:
        """When to go on to the next exchange: each gets its share of the time left, so that a hang hides no other."""
        now = self.clock.monotonic()
        return now + (deadline - now) / candidates

    def _served(self, lookup: Lookup, keys: Sequence[Key], max_age: float | None) -> Served:
        entry, result = lookup
        metrics.cache_requests_total.labels(result).inc()
        age = entry.age(self.clock.monotonic())
        candidates = tuple(keys) if max_age is None else ()
        if result.startswith("stale"):
            return Served(entry.marked_stale(), None, age, min(entry.ttl - age, -1.0), result, candidates)
        return Served(entry.body, entry.etag, age, entry.ttl - age, result, candidates)

    def _stand_in(
        self, keys: Sequence[Key], attempts: dict[Key, GatewayError], max_age: float | None
    ) -> Served | GatewayError:
        """Return the youngest old value in place of a failed load, or else the error that tells the caller most.

        A caller's error is never hidden behind an old value.
        """
        failed = [key for key in keys if not isinstance(attempts.get(key), CallerError)]
        entries = [entry for key in failed if (entry := self.cache.stale(key, max_age)) is not None]
        if not entries:
            verdict = _verdict(list(attempts.values()), max_age)
            refused = isinstance(verdict, CallerError | NoPrice)
            metrics.cache_requests_total.labels("negative" if refused else "miss").inc()
            return verdict
        return self._served(Lookup(max(entries, key=lambda entry: entry.born), "stale_error"), keys, max_age)

    def is_ready(self) -> bool:
        """Whether at least one exchange's markets are loaded."""
        return bool(self.markets.loaded_at)

    async def start(self) -> None:
        """Make the clients, begin the background work, and give the market lists a moment to come.

        Whoever finds the port open then finds answers: no proxy sends a request to a replica that has no list yet. But
        nothing has to be reachable: after `START_SECONDS` some are enough, after `FIRST_LIST_SECONDS` none is needed.
        """
        await self.manager.start()
        await self.cache.start()
        self.loader.start()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(START_SECONDS):
                await self.loader.first_word()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0 if self.is_ready() else FIRST_LIST_SECONDS - START_SECONDS):
                await self.loader.first_word(least=1)
        await self._recall_maintenance()

    async def close(self) -> None:
        """End all of it, in reverse."""
        await self.cache.close()
        await self.loader.close()
        await self.manager.close()
        await self.store.close()

    async def record_maintenance(self, task: str) -> None:
        """Remember that a maintenance task succeeded now, in Redis too, so that a restart does not forget it."""
        self.maintenance[task] = now = self.clock.time()
        try:
            await self.store.run("maintenance", lambda redis: redis.hset(f"{PREFIX}maintenance", task, str(now)))
        except RedisAway:
            return

    async def _recall_maintenance(self) -> None:
        try:
            known = await self.store.run("maintenance", lambda redis: redis.hgetall(f"{PREFIX}maintenance"), 1.0)
            self.maintenance = {_text(task): float(_text(when)) for task, when in known.items()}
        except (RedisAway, ValueError):
            return


def _verdict(errors: list[GatewayError], max_age: float | None) -> GatewayError:
    """Say in one error why nobody answered."""
    if not errors:
        return DeadlineExceeded("no time was left to ask an exchange; ask again")
    first, last = errors[0], errors[-1]
    told = "; ".join(error.detail for error in errors)
    wait = min((error.retry_after for error in errors if error.retry_after is not None), default=None)
    more: dict[str, Any] = {
        "symbol": first.symbol,
        "retry_after": wait,
        "attempts": [{"exchange": error.exchange, "code": error.code, "detail": error.detail} for error in errors],
    }
    if max_age is not None and first.status == 502:
        return TooOld(f"nothing newer than {max_age:g} s could be had: {told}", **more)
    same = len({error.code for error in errors}) == 1
    if len(errors) == 1 or (same and isinstance(first, CallerError | GeoBlocked | NoPrice | Overloaded)):
        return first
    if isinstance(last, DeadlineExceeded) or (same and isinstance(first, ExchangeTimeout)):
        return DeadlineExceeded(f"the time ran out: {told}", **more)
    return NoExchangeAvailable(told, **more)


def _text(raw: bytes | str) -> str:
    return raw if isinstance(raw, str) else raw.decode()
