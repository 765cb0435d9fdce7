"""The product: choose the exchange, use the cache, fall back to another one, serve stale data.

All entry points use this module, so they share one entry per exchange, kind, symbol and parameters.
"""

import asyncio
import contextlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from operator import methodcaller
from typing import Any, Protocol

from cachetools import TTLCache

from config import Settings
from src import kinds
from src.cache.cache import Cache, Loaded, Outcome
from src.cache.entry import Entry, Freshness, Key, Param, Served, encode
from src.core import errors, metrics
from src.core.clock import Clock
from src.core.errors import CallerError, GatewayError, MarketsLoading, Overloaded
from src.core.models import MarketData
from src.exchanges.manager import ExchangeManager, Fetched, is_swap
from src.exchanges.market_loader import MarketLoader
from src.kinds import KINDS
from src.last_prices import LastPrices
from src.store.redis import PREFIX, RedisStore, RedisUnavailable

ALL = "all"
SERIES_SECONDS = 600.0  # requests for newest candles are counted for this long after the last one
MAX_SERIES = 1000  # series of candles whose requests are counted
# Longest wait for all market lists before the port opens; a snapshot is restored in a tenth of one.
START_SECONDS = 3.0
FIRST_LIST_SECONDS = 15.0  # longest wait for any of them
RECALL_TIMEOUT_SECONDS = 1.0
# Longest wait of a request for a refreshed market list that may have its symbol.
NEW_MARKET_SECONDS = 3.0
MAINTENANCE = f"{PREFIX}maintenance"  # Redis hash: task -> UTC seconds of its last success

# An error of one of these classes stands for all exchanges if all of them have the same.
SAME_FOR_ALL = (CallerError, errors.GeoBlocked, errors.MarketHalted, Overloaded)
BatchKey = tuple[str, str]  # a ticker in a batch: its symbol, and its exchange or ""
Attempts = dict[Key, GatewayError]


class ForeignKind(Protocol):
    """Answers whose format is not ours, and series of candles in that format."""

    async def load(self, key: Key) -> Entry:
        """Load an answer."""

    def timeframe_of(self, key: Key) -> str:
        """Return the length of the candles of a series."""

    def merge(self, key: Key, event: Any, pushed: Mapping[str, Any], *, share: bool) -> None:
        """Add the candles of a stream's event to a series, if none is missing in between.

        `pushed` is the data of the event.
        """

    def seconds_left(self, entry: Entry) -> float:
        """Return how long the series of a live stream stays fresh: no message means no change."""


class Gateway:
    """The parts of one process, joined. Its methods raise `GatewayError` and nothing else."""

    def __init__(
        self, settings: Settings, clock: Clock, snapshots: Mapping[str, bytes] | None = None
    ) -> None:
        self.settings = settings
        self.clock = clock
        self.store = RedisStore(settings.redis_address, clock, settings.redis_timeout_seconds)
        self.manager = ExchangeManager(settings, self.store, clock)
        self.loader = MarketLoader(self.manager, self.store, snapshots or {})
        self.manager.pauses.on_unknown_symbol = self.loader.request_refresh
        self.foreign: dict[str, ForeignKind] = {}  # kinds that are not in `KINDS`
        self.cache = Cache(settings, self.store, clock, self._load)
        # Requests for newest candles that were not answered from memory alone.
        self.series: TTLCache[Key, int] = TTLCache(
            MAX_SERIES, SERIES_SECONDS, timer=clock.monotonic
        )
        self.markets = self.manager.markets
        self.last_prices = LastPrices(settings.fallback_max_deviation, clock)
        self.started_at = clock.time()
        self.maintenance: dict[str, float] = {}
        """Maintenance task -> UTC seconds of its last success. Redis keeps it over restarts."""

    async def serve(
        self,
        kind: str,
        symbol: str,
        exchange: str | None = None,
        max_age: float | None = None,
        params: tuple[Param, ...] = (),
    ) -> Served:
        """Answer from the first exchange that can, or with a stale entry.

        Without `exchange` all enabled exchanges are candidates, in order of preference. Nothing
        older than `max_age` seconds is served. `params` are the parameters of the kind, in the
        order of `Kind.params`.
        """
        await self.look_for_new_markets([symbol], exchange)
        keys = self.find_keys(kind, symbol, exchange, params)
        name = (keys[0].symbol, "")
        answers = await self._answer_all({name: keys}, self.settings.request_timeout, max_age)
        answer = answers[name]
        if isinstance(answer, GatewayError):
            raise answer
        if answer.entry is None or not params:
            return answer
        key = answer.entry.key
        if kinds.is_series(key):
            self.series[key] = self.series.get(key, 0) + 1
        part = kinds.view(answer.entry, params)
        served = Served.from_entry(part, answer.result, self.clock.monotonic())
        return served._replace(keys=answer.keys, params=params)

    async def tickers(
        self, symbols: Sequence[str], exchange: str | None, max_age: float | None, within: float = 0
    ) -> dict[BatchKey, Served | GatewayError]:
        """Answer with many tickers by (symbol, exchange or "").

        Misses of one exchange share one upstream call. With the exchange `all`, every enabled
        exchange answers; otherwise one exchange answers for each symbol, as in `serve`. After
        `within` seconds, by default the request timeout, a missing ticker is a `DeadlineExceeded`
        or stale, and its load continues.
        """
        seconds = within or self.settings.request_timeout
        await self.look_for_new_markets(symbols, exchange, seconds)
        candidates, refused = self._batch_candidates(symbols, exchange)
        return await self._answer_all(candidates, seconds, max_age) | refused

    async def _answer_all(
        self, candidates: dict[BatchKey, list[Key]], seconds: float, max_age: float | None
    ) -> dict[BatchKey, Served | GatewayError]:
        """Answer each name with the first of its keys that can be had within `seconds`."""
        deadline = self.clock.monotonic() + seconds
        answers: dict[BatchKey, Served] = {}
        attempts: dict[BatchKey, Attempts] = {name: {} for name in candidates}
        while self.clock.monotonic() < deadline:
            left = {
                name: [key for key in keys if key not in attempts[name]]
                for name, keys in candidates.items()
                if name not in answers
            }
            chosen = {name: self.choose(keys, max_age) for name, keys in left.items() if keys}
            if not chosen:
                break
            now = self.clock.monotonic()
            # Each exchange gets its share of the time left, so that one that hangs leaves some.
            share = (deadline - now) / max(len(keys) for keys in left.values())
            if all(self.find_stale(candidates[name], max_age) for name in chosen):
                share = min(share, self.settings.stale_wait_seconds)
            outcomes = await _get(self.cache, set(chosen.values()), now + share, max_age)
            for name, key in chosen.items():
                outcome = self.last_prices.check(outcomes[key], candidates[name])
                if isinstance(outcome, Served):
                    answers[name] = _answer(outcome, candidates[name], max_age)
                elif isinstance(outcome, Overloaded):  # a bound of the gateway: no exchange helps
                    attempts[name] = dict.fromkeys(candidates[name], outcome)
                else:
                    attempts[name][key] = outcome
        return {
            name: answers.get(name) or self.stale_or_error(keys, attempts[name], max_age)
            for name, keys in candidates.items()
        }

    def find_in_memory(self, keys: Sequence[Key]) -> Entry | None:
        """Return the entry that answers a request for these keys, or None.

        The fast path uses this: it is the decision that `choose` and the cache make, in one step
        and without counting.
        """
        for key in keys:
            entry = self.cache.memory.find_fresh(key)
            if entry is not None:
                return None if self.last_prices.find_mismatch(entry, keys) else entry
            if kinds.is_available(self.manager, key):
                return None
        return None

    async def refresh(self, keys: Sequence[Key], max_age: float) -> int:
        """Load keys of one exchange and kind that are older than `max_age` seconds.

        Leaves out markets that are no longer quoted. Returns how many succeeded.
        """
        find = self.markets.find
        keys = [key for key in keys if find(key.exchange, self.markets.canonical(key.symbol))]
        if not keys:
            return 0
        deadline = self.clock.monotonic() + self.settings.request_timeout
        first = keys[0]
        # Replicas mostly have the same hot keys. They take turns, and the next one finds the
        # entries in Redis.
        turn = Key(first.exchange, "ticker", "*") if first.kind == "ticker" else first
        async with self.cache.redis.turn(turn):
            outcomes = await self.cache.get_many(keys, deadline, max_age)
        return sum(isinstance(outcome, Served) for outcome in outcomes.values())

    def add_pushed(
        self, key: Key, body: bytes, born: float, freshness: Freshness, *, share: bool
    ) -> None:
        """Store an answer that was pushed at `born` (monotonic seconds).

        If `share` is true, it is written to Redis as well. It is fresh for at most the TTL of its
        kind.
        """
        ttl = min(freshness.ttl, kinds.ttl_of(self.settings, key))
        entry = self._create_entry(key, body, (born, born), freshness._replace(ttl=ttl))
        self.cache.add(entry, share=share)

    async def look_for_new_markets(
        self, symbols: Sequence[str], exchange: str | None, seconds: float | None = None
    ) -> None:
        """Refresh the market lists of the requested exchanges if none of them has a symbol.

        However many symbols are missing, each list is refreshed once, and at most once a minute.
        Raises `UnknownExchange`.
        """
        names = self.manager.names
        if exchange not in (None, "", ALL):
            names = (self.markets.check_exchange(exchange),)
        longest = min(seconds or self.settings.request_timeout, NEW_MARKET_SECONDS)
        for symbol in symbols:
            if self.markets.is_missing(names, symbol):
                await self.loader.look_for_new_markets(names, longest)
                return

    def find_keys(
        self, kind: str, text: str, exchange: str | None, params: tuple[Param, ...] = ()
    ) -> list[Key]:
        """Return the keys of the exchanges that list a symbol, in order of preference.

        Raises `MalformedRequest`, `UnknownExchange`, `UnknownSymbol`, `Maintenance` or
        `MarketHalted`, or `MarketsLoading` while a market list that may have the symbol is missing.
        """
        names = self.manager.names if exchange is None else (self.markets.check_exchange(exchange),)
        symbol = self.markets.canonical(text)
        markets = {name: self.markets.find(name, symbol) for name in names}
        keys = [
            kinds.shared_key(name, kind, market.symbol, params)
            for name, market in markets.items()
            if market
        ]
        if keys:
            return keys
        loading = [name for name in names if name not in self.markets.loaded_at]
        if loading or not names:
            missing = ", ".join(loading) or "no exchange is enabled"
            text = f"the market list is not loaded yet: {missing}; ask again shortly"
            raise MarketsLoading(text, symbol=symbol)
        raise self.markets.explain_missing(symbol, names)

    async def start(self) -> None:
        """Create the clients, start background work, and wait a bounded time for market lists.

        A client that finds the port open then gets answers, and a proxy sends no request to a
        replica without a list. Nothing has to be reachable: some lists are enough after
        `START_SECONDS`, none after `FIRST_LIST_SECONDS`.
        """
        await self.manager.start()
        await self.cache.start()
        self.loader.start()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(START_SECONDS):
                await self.loader.wait_for_first_lists()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(FIRST_LIST_SECONDS - START_SECONDS):
                await self.loader.wait_for_first_lists(enough=1)
        await self.recall_maintenance()

    async def record_maintenance(self, task: str) -> None:
        """Record that a maintenance task succeeded now."""
        now = self.clock.time()
        self.maintenance[task] = now
        with contextlib.suppress(RedisUnavailable):
            await self.store.run("maintenance", methodcaller("hset", MAINTENANCE, task, now))

    async def recall_maintenance(self) -> None:
        """Read what Redis has about maintenance tasks."""
        with contextlib.suppress(RedisUnavailable, ValueError):
            read = methodcaller("hmget", MAINTENANCE, metrics.TASKS)
            times = await self.store.run("maintenance", read, RECALL_TIMEOUT_SECONDS)
            found = zip(metrics.TASKS, times, strict=True)
            self.maintenance |= {task: float(time) for task, time in found if time}

    async def close(self) -> None:
        """Close the parts in reverse order."""
        await self.cache.close()
        await self.loader.close()
        await self.manager.close()
        await self.store.close()

    def _batch_candidates(
        self, symbols: Sequence[str], exchange: str | None
    ) -> tuple[dict[BatchKey, list[Key]], dict[BatchKey, GatewayError]]:
        """Return the keys that can answer each ticker, and the errors of the other tickers."""
        candidates: dict[BatchKey, list[Key]] = {}
        refused: dict[BatchKey, GatewayError] = {}
        if exchange is not None and exchange != ALL:
            self.markets.check_exchange(exchange)  # an error of the request, not of one symbol
        for text in symbols:
            for name in self.manager.names if exchange == ALL else [""]:
                try:
                    keys = self.find_keys("ticker", text, name or exchange)
                    candidates[keys[0].symbol, name] = keys
                except (CallerError, errors.Unavailable) as error:
                    refused[error.symbol or text, name] = error
        return candidates, refused

    async def _load(self, keys: Sequence[Key]) -> Loaded:
        """Load one key of any kind, or tickers of one exchange and market type with one call.

        A refusal is returned, because the cache remembers it.
        """
        first = keys[0]
        if first.kind in self.foreign:
            return {first: await self.foreign[first.kind].load(first)}
        try:
            if len(keys) == 1:
                fetched = await kinds.fetch(self.manager, first)
                return {first: self._entry(first, fetched.value, fetched)}
            tickers = await self.manager.tickers(first.exchange, [key.symbol for key in keys])
        except CallerError as error:
            if len(keys) == 1:
                return {first: error}
            half = len(keys) // 2  # one symbol that the exchange no longer knows fails the list
            return await self._load(keys[:half]) | await self._load(keys[half:])
        return {key: self._entry(key, tickers.value[key.symbol], tickers) for key in keys}

    def _entry(
        self, key: Key, data: MarketData | GatewayError, fetched: Fetched[Any]
    ) -> Entry | GatewayError:
        if isinstance(data, GatewayError):
            return data
        ttl = kinds.ttl_of(self.settings, key)
        freshness = KINDS[key.kind].freshness(ttl, key, data, fetched.requested_at)
        data.requested_at = int(fetched.sent_at * 1000)
        if fetched.server_time:
            data.server_time = fetched.server_time
        times = (fetched.started, fetched.received)
        return self._create_entry(key, encode(data), times, freshness)

    def _create_entry(
        self, key: Key, body: bytes, times: tuple[float, float], freshness: Freshness
    ) -> Entry:
        """Create an entry of an answer from an exchange, and remember its price.

        `times` are those of the request and the answer.
        """
        entry = Entry.create(key, body, *times, freshness.ttl)
        entry.closed_until = freshness.closed_until
        if not entry.closed_until:
            entry.shorten_ttl(self.settings.ttl_jitter_ratio)
        kinds.read_body(entry)
        self.last_prices.record(entry)
        return entry

    def choose(self, keys: Sequence[Key], max_age: float | None) -> Key:
        """Return the first key that memory or its exchange can answer now, or else the first."""
        for key in keys:
            if self.cache.has_fresh(key, max_age) or kinds.is_available(self.manager, key):
                return key
        return keys[0]

    def find_stale(self, keys: Sequence[Key], max_age: float | None) -> list[Entry]:
        """Return the entries that may replace a failed load."""
        found = (self.cache.find_stale(key, max_age) for key in keys)
        return [
            entry for entry in found if entry and not self.last_prices.find_mismatch(entry, keys)
        ]

    def stale_or_error(
        self, keys: Sequence[Key], attempts: Attempts, max_age: float | None
    ) -> Served | GatewayError:
        """Return the youngest stale entry in place of a failed load, or the most informative error.

        A stale entry never hides an error of the caller.
        """
        failed = [key for key in keys if not isinstance(attempts.get(key), CallerError)]
        entries = self.find_stale(failed, max_age)
        if entries:
            youngest = max(entries, key=lambda entry: entry.born)
            served = Served.from_entry(youngest, "stale_error", self.clock.monotonic())
            return _answer(served, keys, max_age)
        error = _combine(list(attempts.values()), max_age)
        result = "negative" if isinstance(error, CallerError) else "miss"
        metrics.cache_requests_total.labels(result).inc()
        return error


async def _get(
    cache: Cache, keys: set[Key], deadline: float, max_age: float | None
) -> dict[Key, Outcome]:
    """Get answers of several exchanges at once, with one load per exchange and market type."""
    groups: dict[tuple[str, bool], list[Key]] = defaultdict(list)
    for key in sorted(keys):
        groups[key.exchange, is_swap(key.symbol)].append(key)
    lookups = [cache.get_many(group, deadline, max_age) for group in groups.values()]
    # A single lookup, as of every request for one symbol, needs no task of its own.
    parts = await asyncio.gather(*lookups) if len(lookups) > 1 else [await lookups[0]]
    return {key: outcome for part in parts for key, outcome in part.items()}


def _answer(served: Served, keys: Sequence[Key], max_age: float | None) -> Served:
    """Count an answer, and attach the keys that could have answered."""
    metrics.cache_requests_total.labels(served.result).inc()
    return served if max_age is not None else served._replace(keys=tuple(keys))


def _combine(failures: list[GatewayError], max_age: float | None) -> GatewayError:
    """Return one error that says why no exchange answered."""
    if not failures:
        return errors.DeadlineExceeded("no time was left to ask an exchange; ask again")
    first = failures[0]
    waits = [error.retry_after for error in failures if error.retry_after is not None]
    details = "; ".join(error.detail for error in failures)
    extra: dict[str, Any] = {
        "symbol": first.symbol,
        "retry_after": min(waits, default=None),
        "attempts": [
            {"exchange": error.exchange, "code": error.code, "detail": error.detail}
            for error in failures
        ],
    }
    if max_age is not None and first.status == 502:
        return errors.TooOld(f"nothing newer than {max_age:g} s was available: {details}", **extra)
    is_same = len({error.code for error in failures}) == 1
    if len(failures) == 1 or (is_same and isinstance(first, SAME_FOR_ALL)):
        return first
    is_timeout = is_same and isinstance(first, errors.ExchangeTimeout)
    if is_timeout or isinstance(failures[-1], errors.DeadlineExceeded):
        return errors.DeadlineExceeded(f"the time of the request ran out: {details}", **extra)
    return errors.NoExchangeAvailable(details, **extra)
