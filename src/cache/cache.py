"""Two tiers of ready answers, memory before Redis, and one load per miss.

Entries stay past their freshness for as long as they may stand in for a failed load (RFC 5861). Concurrent lookups of
one key share one flight: a task nobody owns, so a caller who leaves takes nothing along.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence
from contextlib import asynccontextmanager, suppress
from typing import NamedTuple

from cachetools import TTLCache

from config import Settings
from src.cache.entry import Entry, Key
from src.cache.memory import Memory
from src.cache.redis_tier import RedisTier
from src.core import metrics
from src.core.background import report_error
from src.core.clock import Clock
from src.core.errors import CallerError, DeadlineExceeded, GatewayError, NoPrice, Overloaded, TooOld
from src.store.redis import RedisAway, RedisStore

log = logging.getLogger(__name__)

NEGATIVE_SIZE = 1000  # refusals remembered at once; only symbols that exist can get here, so more is never useful
SAME_SECONDS = 0.002  # an entry that went through Redis comes back rounded, and is no older for that
_MEMORY_HIT, _MEMORY_MISS = (metrics.cache_tier_operations_total.labels("memory", "get", it) for it in ("hit", "miss"))
_MEMORY_SET = metrics.cache_tier_operations_total.labels("memory", "set", "success")


class Lookup(NamedTuple):
    """An entry and how it was found: one of `metrics.CACHE_RESULTS`."""

    entry: Entry
    result: str


Outcome = Lookup | GatewayError
Load = Callable[[Sequence[Key]], Awaitable[dict[Key, Entry | GatewayError]]]
_Flight = asyncio.Task[dict[Key, Outcome]]


class Cache:
    """The two tiers. One object serves all kinds; each lookup brings its TTL and how to load what is missing."""

    def __init__(self, settings: Settings, store: RedisStore, clock: Clock) -> None:
        self.jitter = settings.ttl_jitter_ratio
        self._clock = clock
        self._memory_ttl = settings.cache_memory_ttl
        self._stale_seconds = settings.stale_seconds
        self._revalidate_seconds = settings.revalidate_seconds
        self._keep_seconds = max(settings.stale_seconds, settings.revalidate_seconds)
        self._max_loads = settings.max_concurrent
        self.memory = Memory(settings.cache_memory_size, self._memory_ttl, self._keep_seconds, clock)
        self._negative: TTLCache[Key, GatewayError] = TTLCache(
            NEGATIVE_SIZE, settings.negative_ttl_seconds, timer=clock.monotonic
        )
        self._redis = RedisTier(
            store,
            clock,
            jitter=self.jitter,
            keep_seconds=self._keep_seconds,
            lock_seconds=settings.exchange_timeout_seconds,
        )
        self._flights: dict[Key, _Flight] = {}
        self._tasks: set[_Flight] = set()  # also the flights that a clear took off the board
        self._loads = 0
        self._generation = 0

    def __len__(self) -> int:
        """Entries in memory, those that only stand in for failed loads included."""
        return len(self.memory)

    def has_fresh(self, key: Key, max_age: float | None = None) -> bool:
        """Whether memory could answer now."""
        entry = self.memory.get(key)
        return entry is not None and self._is_fresh_here(entry, max_age)

    def peek(self, key: Key, max_age: float | None = None) -> Entry | None:
        """Return the entry if memory has it fresh; nothing is awaited and Redis is not asked."""
        entry = self.memory.ready(key, max_age)
        (_MEMORY_MISS if entry is None else _MEMORY_HIT).inc()
        return entry

    def stale(self, key: Key, max_age: float | None = None) -> Entry | None:
        """Return an entry that may stand in for a failed load: not past `STALE_SECONDS`, nor older than `max_age`."""
        entry, now = self.memory.get(key), self._clock.monotonic()
        if entry is None or entry.age(now) >= entry.ttl + self._stale_seconds:
            return None
        return entry if max_age is None or entry.age(now) < max_age else None

    async def get(self, key: Key, ttl: float, load: Load, deadline: float, max_age: float | None = None) -> Lookup:
        """Look one key up as `get_many` does; raises its error."""
        outcome = (await self.get_many([key], ttl, load, deadline, max_age))[key]
        if isinstance(outcome, GatewayError):
            raise outcome
        return outcome

    def all_ready(self, keys: Collection[Key], max_age: float | None) -> dict[Key, Outcome] | None:
        """Return the entries of all keys if memory has every one of them fresh, else None; nothing is awaited."""
        found = [held for key in keys if (held := self.memory.fresh(key, max_age)) is not None]
        if len(found) < len(keys):
            return None
        for held in found:
            self.memory.use(held)
        _MEMORY_HIT.inc(len(found))
        return {held.key: Lookup(held.entry, "hit_memory") for held in found}

    async def get_many(
        self, keys: Sequence[Key], ttl: float, load: Load, deadline: float, max_age: float | None = None
    ) -> dict[Key, Outcome]:
        """Find each key in memory, in Redis, in a flight under way, or with one `load` for all that is left.

        `deadline` is monotonic; what is not there by then is a `DeadlineExceeded`, and its load goes on. Nothing older
        than `max_age` seconds is returned, except what arrived after this call began.
        """
        at_hand = {key: outcome for key in keys if (outcome := self._at_hand(key, max_age)) is not None}
        aging = [key for key, outcome in at_hand.items() if getattr(outcome, "result", "") == "stale_revalidate"]
        self._start([key for key in aging if key not in self._flights], ttl, load, max_age)
        missing = [key for key in keys if key not in at_hand]
        if not missing:
            return at_hand
        fetched: dict[Key, Outcome] = {
            key: TooOld("a newer value could not be had; ask again", symbol=key.symbol) for key in missing
        }
        arrived = self._clock.monotonic()
        for _ in range(2):  # a flight joined may bring what is fresh to others but too old for this caller: once more
            joined = {key for key in missing if key in self._flights}
            self._start([key for key in missing if key not in joined], ttl, load, max_age)
            landed = await self._land(missing, joined, deadline)
            fetched |= {key: outcome for key, outcome in landed.items() if self._is_ok(outcome, arrived, max_age)}
            missing = [key for key in missing if isinstance(fetched[key], TooOld)]
            if not missing:
                break
        return at_hand | fetched

    @asynccontextmanager
    async def turn(self, name: Key) -> AsyncIterator[None]:
        """Wait until no other replica has its turn at `name`; what it brought is in Redis then."""
        locked, _ = await self._redis.lock_or_find(name, 0.0, lambda _: False)
        try:
            yield
        finally:
            if locked:
                self._redis.write(name, None, last=True)

    async def clear(self, exchange: str | None = None, symbol: str | None = None) -> int:
        """Forget what is cached, all of it or of one exchange or symbol; returns how many entries went.

        A load under way still answers its callers, but what it brings is not kept. Raises `RedisAway`, after memory is
        cleared, when Redis could not be.
        """
        cleared = self._forget(exchange, symbol)
        try:
            return max(cleared, await self._redis.clear(exchange, symbol))
        finally:
            self._forget(exchange, symbol)  # what came back from Redis before it was gone there

    async def start(self) -> None:
        """Learn which clears are over before the first entry is kept."""
        with suppress(RedisAway):
            await self._redis.start()

    async def follow_clears(self) -> None:
        """Forget what other replicas clear, until Redis is lost."""
        with suppress(RedisAway):
            await self._redis.follow_clears(self._forget)

    async def close(self) -> None:
        """End every flight, and let the writes under way finish."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._redis.drain()

    def _forget(self, exchange: str | None, symbol: str | None) -> int:
        self._generation += 1  # no flight that began before may keep what it brings
        for key in [key for key in self._flights if _matches(key, exchange, symbol)]:
            del self._flights[key]
        gone = [key for key in [*self.memory.keys(), *self._negative] if _matches(key, exchange, symbol)]
        for key in gone:
            self.memory.pop(key, "cleared")
            if self._negative.pop(key, None) is not None:
                metrics.cache_evictions_total.labels("cleared").inc()
        return len(gone)

    def _is_fresh_here(self, entry: Entry, max_age: float | None) -> bool:
        return entry.is_fresh(
            self._clock.monotonic(), self._memory_ttl if max_age is None else min(self._memory_ttl, max_age)
        )

    def _is_ok(self, outcome: Outcome, since: float, max_age: float | None) -> bool:
        """Whether a value from a flight or another replica will do for a caller who came at `since`; errors do."""
        if max_age is None or isinstance(outcome, GatewayError) or outcome.entry.received >= since:
            return True
        return outcome.entry.age(self._clock.monotonic()) < max_age

    def _at_hand(self, key: Key, max_age: float | None) -> Outcome | None:
        """What needs no waiting: a fresh entry, a remembered refusal, or an old entry that a refresh can follow."""
        if (entry := self.peek(key, max_age)) is not None:
            return Lookup(entry, "hit_memory")
        if max_age is not None:
            return None
        if (refusal := self._negative.get(key)) is not None:
            return refusal
        entry, now = self.memory.get(key), self._clock.monotonic()
        if entry is None or not entry.ttl <= entry.age(now) < entry.ttl + self._revalidate_seconds:
            return None
        return Lookup(entry, "stale_revalidate")

    def _start(self, keys: list[Key], ttl: float, load: Load, max_age: float | None) -> None:
        if not keys:
            return
        task = asyncio.create_task(self._fly(keys, ttl, load, max_age))
        self._flights |= dict.fromkeys(keys, task)
        self._tasks.add(task)
        task.add_done_callback(self._landed)

    def _landed(self, flight: _Flight) -> None:
        """Take the flight off the board, and its error out of asyncio's hands, whether or not anybody waits for it."""
        self._tasks.discard(flight)
        for key in [key for key, other in self._flights.items() if other is flight]:
            del self._flights[key]
        if flight.cancelled() or (error := flight.exception()) is None:
            return
        if isinstance(error, GatewayError):
            log.debug("load failed", extra={"error": type(error).__name__, "code": error.code})
        else:
            report_error("loads", error)

    async def _land(self, keys: Sequence[Key], joined: set[Key], deadline: float) -> dict[Key, Outcome]:
        """Wait for the flights of the keys until the deadline; leaving early disturbs none of them."""
        flights = {key: self._flights[key] for key in keys}
        await asyncio.wait(set(flights.values()), timeout=max(0.0, deadline - self._clock.monotonic()))
        landed: dict[Key, Outcome] = {}
        for key, flight in flights.items():
            if not flight.done():
                landed[key] = DeadlineExceeded(
                    "no answer within the time of a request; the load goes on, ask again",
                    exchange=key.exchange,
                    symbol=key.symbol,
                )
            elif isinstance(error := flight.exception(), GatewayError):
                landed[key] = error
            else:
                outcome = flight.result()[key]
                if key in joined and isinstance(outcome, Lookup):
                    outcome = Lookup(outcome.entry, "coalesced")
                landed[key] = outcome
        return landed

    async def _fly(self, keys: list[Key], ttl: float, load: Load, max_age: float | None) -> dict[Key, Outcome]:
        """Bring the keys from Redis or upstream, into memory too."""
        generation, started = self._generation, self._clock.monotonic()
        results = await self._read(keys, ttl, generation, started, max_age)
        missing = [key for key in keys if key not in results]
        if not missing:
            return results
        if self._loads >= self._max_loads:
            raise Overloaded(f"{self._loads} loads are in flight, as many as are allowed; ask again shortly")
        self._loads += 1
        try:
            return results | await self._load(missing, ttl, load, max_age, generation, started)
        finally:
            self._loads -= 1

    async def _load(
        self, keys: Sequence[Key], ttl: float, load: Load, max_age: float | None, generation: int, started: float
    ) -> dict[Key, Outcome]:
        """Load what neither tier has, once for all replicas: the lock of its first key stands for a whole batch."""
        results: dict[Key, Outcome] = {}
        locked, entry = await self._redis.lock_or_find(
            keys[0], ttl, lambda entry: self._promote(keys[0], entry, generation, started, max_age)
        )
        if entry is not None:  # another replica has just loaded it, and the rest of the batch too if it was the same
            results = await self._read(keys[1:], ttl, generation, started, max_age)
            results[keys[0]] = Lookup(entry, "hit_redis")
            keys = [key for key in keys if key not in results]
        loaded: dict[Key, Entry | GatewayError] = {}
        try:
            loaded = await load(keys) if keys else {}
        finally:
            kept = {key: value for key, value in loaded.items() if generation == self._generation}
            for key in reversed(keys):  # the lock goes last: who waits for it finds the others there
                self._keep(key, kept.get(key), locked and key == keys[0])
        return results | {
            key: Lookup(value, "miss") if isinstance(value, Entry) else value for key, value in loaded.items()
        }

    async def _read(
        self, keys: Sequence[Key], ttl: float, generation: int, started: float, max_age: float | None
    ) -> dict[Key, Outcome]:
        """Take over from Redis what will do."""
        entries = await self._redis.read(keys, ttl) if keys else {}
        return {
            key: Lookup(entry, "hit_redis")
            for key, entry in entries.items()
            if self._promote(key, entry, generation, started, max_age)
        }

    def _keep(self, key: Key, value: Entry | GatewayError | None, locked: bool) -> None:
        """Put what was loaded into both tiers, and give up the lock even if nothing was."""
        entry = value if isinstance(value, Entry) else None
        if entry is not None:
            self._remember(key, entry)
            self._negative.pop(key, None)
        elif isinstance(value, CallerError | NoPrice):
            self._negative[key] = value
        if entry is not None or locked:
            self._redis.write(key, entry, last=locked)

    def adopt(self, key: Key, entry: Entry, *, spread: bool) -> None:
        """Keep what came unasked; with `spread` in Redis, too."""
        self._remember(key, entry)
        self._negative.pop(key, None)
        if spread:
            self._redis.write(key, entry)

    def _remember(self, key: Key, entry: Entry) -> bool:
        """Keep an entry in memory unless a newer one is there; returns whether it is the newest now."""
        known = self.memory.get(key)
        if known is not None and known.born > entry.born + SAME_SECONDS:
            return False
        if known is not None and known.born >= entry.born - SAME_SECONDS and known.etag == entry.etag:
            return True  # it is the one we have, and its popularity with it
        self.memory.put(key, entry)
        _MEMORY_SET.inc()
        return True

    def _promote(self, key: Key, entry: Entry, generation: int, started: float, max_age: float | None) -> bool:
        """Take an entry of Redis into memory, where even an old one can stand in; returns whether it will do now."""
        if generation != self._generation or not self._remember(key, entry):
            return False
        return entry.is_fresh(self._clock.monotonic()) and self._is_ok(Lookup(entry, "hit_redis"), started, max_age)


def _matches(key: Key, exchange: str | None, symbol: str | None) -> bool:
    return exchange in (None, key.exchange) and symbol in (None, key.symbol)
