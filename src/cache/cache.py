"""Two tiers of ready answers, memory before Redis, and one load per miss.

Entries stay after their TTL while they may replace a failed load (RFC 5861). Concurrent requests
for one key share one flight. A flight is a task of its own, so a caller that leaves does not cancel
the load for the others.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

from cachetools import TTLCache

from config import Settings
from src.cache.entry import FINAL_TTL_SECONDS, ROUNDING_SECONDS, Entry, Key, Served
from src.cache.memory import Memory
from src.cache.redis_tier import RedisTier
from src.core import metrics
from src.core.background import report_error
from src.core.clock import Clock
from src.core.errors import CallerError, DeadlineExceeded, GatewayError, Overloaded, TooOld
from src.store.redis import RedisStore, RedisUnavailable

log = logging.getLogger(__name__)

MAX_REFUSALS = 1000  # an exchange can refuse only symbols that it lists
_MEMORY_HIT = metrics.cache_tier_operations_total.labels("memory", "get", "hit")
_MEMORY_MISS = metrics.cache_tier_operations_total.labels("memory", "get", "miss")
_MEMORY_SET = metrics.cache_tier_operations_total.labels("memory", "set", "success")

Loaded = dict[Key, Entry | GatewayError]
Load = Callable[[Sequence[Key]], Awaitable[Loaded]]
Outcome = Served | GatewayError


class AgeLimit(NamedTuple):
    """How old an answer may be for one caller."""

    max_age: float | None
    arrived: float
    """When the caller asked (monotonic seconds). What is received later is never too old."""
    final_until: int | None = None
    """UTC milliseconds. An entry that is final until then answers even if it is not fresh."""

    def accepts(self, entry: Entry, now: float) -> bool:
        """Return True if the entry answers the caller.

        The flight of another caller may have found an entry whose final part was enough.
        """
        if entry.received >= self.arrived:
            return True
        if entry.closed_until and not self.is_usable(entry, now):
            return False
        return self.max_age is None or entry.age(now) < self.max_age

    def is_usable(self, entry: Entry, now: float) -> bool:
        """Return True if the entry is fresh, or final for as long as the caller needs."""
        is_final = self.final_until is not None and entry.closed_until >= self.final_until
        return entry.is_fresh(now) or (is_final and entry.age(now) < FINAL_TTL_SECONDS)


@dataclass(eq=False)
class Flight:
    """One load of some keys, shared by all concurrent callers."""

    keys: list[Key]
    limit: AgeLimit
    generation: int
    """The number of clears when the flight began. Results from before a clear are not stored."""
    loaded: Loaded = field(default_factory=dict)
    from_redis: set[Key] = field(default_factory=set)
    error: Exception | None = None
    task: asyncio.Task[None] = field(init=False)

    def outcome(self, key: Key) -> Entry | GatewayError:
        """Return what came of one key so far. Raises what ended the flight unexpectedly."""
        if not self.task.done():
            text = "no answer within the time of a request; the load continues, ask again"
            return DeadlineExceeded(text, exchange=key.exchange, symbol=key.symbol)
        self.task.result()  # raises if the flight was cancelled
        if key in self.loaded:
            return self.loaded[key]
        if isinstance(self.error, GatewayError):
            return self.error
        raise self.error or KeyError(key)


class Cache:
    """The two tiers for all kinds of data.

    `load` fetches keys of one exchange and kind; its refusals are values, all other errors are
    raised.
    """

    def __init__(self, settings: Settings, store: RedisStore, clock: Clock, load: Load) -> None:
        self._clock = clock
        self._load = load
        self._settings = settings
        keep_seconds = max(settings.stale_seconds, settings.revalidate_seconds)
        bounds = (settings.cache_memory_size, settings.cache_memory_bytes)
        self.memory = Memory(*bounds, settings.cache_memory_ttl, keep_seconds, clock)
        self._refusals: TTLCache[Key, GatewayError] = TTLCache(
            MAX_REFUSALS, settings.negative_ttl_seconds, timer=clock.monotonic
        )
        self.redis = RedisTier(store, clock, keep_seconds, settings.exchange_timeout_seconds)
        self._flights: dict[Key, Flight] = {}
        self._tasks: set[asyncio.Task[None]] = set()  # also flights that a clear has detached
        self._load_slots = asyncio.Semaphore(settings.max_concurrent)
        self._generation = 0

    def has_fresh(self, key: Key, max_age: float | None = None) -> bool:
        """Return True if memory has a fresh entry younger than `max_age` seconds."""
        return self.memory.find_fresh(key, max_age) is not None

    def find_stale(self, key: Key, max_age: float | None = None) -> Entry | None:
        """Return an entry that may replace a failed load, up to STALE_SECONDS after its TTL."""
        entry = self.memory.get(key)
        now = self._clock.monotonic()
        if entry is None or entry.age(now) >= entry.ttl + self._settings.stale_seconds:
            return None
        return entry if max_age is None or entry.age(now) < max_age else None

    async def get_many(
        self,
        keys: Sequence[Key],
        deadline: float,
        max_age: float | None = None,
        final_until: int | None = None,
    ) -> dict[Key, Outcome]:
        """Return the answer to each key: from memory, Redis, a flight under way, or a new load.

        `deadline` is in monotonic seconds. A key that is not loaded by then is a
        `DeadlineExceeded`, and its load continues. No answer is older than `max_age` seconds,
        unless it arrived after this call began. With `final_until` (UTC ms), an entry that is final
        until then need not be fresh.
        """
        limit = AgeLimit(max_age, self._clock.monotonic(), final_until)
        outcomes: dict[Key, Outcome] = {}
        for key in keys:
            outcome = self._find_immediate(key, limit)
            if outcome is not None:
                outcomes[key] = outcome
        self._start_flight([key for key in outcomes if _is_aging(outcomes[key])], limit)
        for _ in range(2):  # the result of a flight that was joined may be too old for this caller
            missing = [key for key in keys if key not in outcomes]
            if not missing:
                return outcomes
            joined = self._flights.keys() & missing
            self._start_flight(missing, limit)
            outcomes |= await self._wait_for(missing, joined, deadline, limit)
        for key in keys:
            if key not in outcomes:
                outcomes[key] = TooOld("no newer value was available; ask again", symbol=key.symbol)
        return outcomes

    def add(self, entry: Entry, *, share: bool) -> None:
        """Store a pushed entry in memory, unless a newer one is there; with `share`, in Redis."""
        self._put_newest(entry)
        self._refusals.pop(entry.key, None)
        if share:
            self.redis.write(entry.key, entry)

    async def clear(self, exchange: str | None = None, symbol: str | None = None) -> int:
        """Remove all entries, or those of one exchange or symbol; returns how many.

        A load under way still answers its callers, but its result is not stored. Raises
        `RedisUnavailable`, after memory was cleared, if Redis could not be cleared.
        """
        removed = self._forget(exchange, symbol)
        try:
            return max(removed, await self.redis.clear(exchange, symbol))
        finally:
            self._forget(exchange, symbol)  # again: memory may have read from Redis meanwhile

    async def start(self) -> None:
        """Read how many clears there were before the first entry is stored."""
        with suppress(RedisUnavailable):
            await self.redis.start()

    async def follow_clears(self) -> None:
        """Apply the clears of other replicas until Redis is lost."""
        with suppress(RedisUnavailable):
            await self.redis.follow_clears(self._forget)

    async def close(self) -> None:
        """Cancel all flights, and wait for the writes under way."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.redis.drain()

    def _forget(self, exchange: str | None, symbol: str | None) -> int:
        self._generation += 1  # results of flights that began before are not stored
        for key in _matching(self._flights, exchange, symbol):
            del self._flights[key]
        removed = _matching([*self.memory.keys(), *self._refusals], exchange, symbol)
        for key in removed:
            self.memory.remove(key, "cleared")
            if self._refusals.pop(key, None) is not None:
                metrics.cache_evictions_total.labels("cleared").inc()
        return len(removed)

    def _find_immediate(self, key: Key, limit: AgeLimit) -> Outcome | None:
        """Return a fresh entry, a remembered refusal, or an old entry that a refresh follows.

        An entry with a final part is never served during a refresh: it may be from before a close.
        """
        now = self._clock.monotonic()
        max_age = limit.max_age
        known = self.memory.get(key) if limit.final_until is not None else None
        if known is not None and limit.accepts(known, now):
            _MEMORY_HIT.inc()
            return Served.from_entry(known, "hit_memory", now)
        entry = self.memory.find_fresh(key, max_age)
        if entry is not None:
            _MEMORY_HIT.inc()
            self.memory.count_hit(entry)
            return Served.from_entry(entry, "hit_memory", now)
        _MEMORY_MISS.inc()
        if max_age is not None:
            return None
        refusal = self._refusals.get(key)
        if refusal is not None:
            return refusal
        entry = self.memory.get(key)
        if entry is None or entry.closed_until:
            return None
        if not 0 <= entry.age(now) - entry.ttl < self._settings.revalidate_seconds:
            return None
        return Served.from_entry(entry, "stale_revalidate", now)

    def _start_flight(self, keys: Iterable[Key], limit: AgeLimit) -> None:
        """Start a flight for the keys that have none."""
        keys = [key for key in keys if key not in self._flights]
        if keys:
            flight = Flight(keys, limit, self._generation)
            flight.task = asyncio.create_task(self._fly(flight))
            self._flights |= dict.fromkeys(keys, flight)
            self._tasks.add(flight.task)
            flight.task.add_done_callback(self._tasks.discard)

    async def _wait_for(
        self, keys: Sequence[Key], joined: set[Key], deadline: float, limit: AgeLimit
    ) -> dict[Key, Outcome]:
        """Wait for the flights of the keys, and return the outcomes that the limit accepts."""
        flights = {key: self._flights[key] for key in keys}
        timeout = max(0.0, deadline - self._clock.monotonic())
        await asyncio.wait({flight.task for flight in flights.values()}, timeout=timeout)
        outcomes: dict[Key, Outcome] = {}
        for key, flight in flights.items():
            value = flight.outcome(key)
            now = self._clock.monotonic()
            if isinstance(value, GatewayError):
                outcomes[key] = value
            elif limit.accepts(value, now):
                result = "hit_redis" if key in flight.from_redis else "miss"
                result = "coalesced" if key in joined else result
                outcomes[key] = Served.from_entry(value, result, now)
        return outcomes

    async def _fly(self, flight: Flight) -> None:
        """Run a flight: read its keys from Redis, load the others, and store the results."""
        try:
            await self._read_redis(flight, flight.keys)
            if len(flight.loaded) < len(flight.keys):
                await self._load_missing(flight)
        except GatewayError as error:
            log.debug("load failed", extra={"error": type(error).__name__, "code": error.code})
            flight.error = error
        except Exception as error:  # noqa: BLE001 - reported, and raised to the callers
            report_error("loads", error)
            flight.error = error
        finally:
            for key in flight.keys:
                if self._flights.get(key) is flight:
                    del self._flights[key]

    async def _load_missing(self, flight: Flight) -> None:
        """Load what neither tier has, once for all replicas.

        The lock of the first key stands for a whole batch.
        """
        if self._load_slots.locked():
            raise Overloaded("MAX_CONCURRENT loads are in flight; ask again shortly")
        async with self._load_slots:
            keys = [key for key in flight.keys if key not in flight.loaded]
            first = keys[0]
            accept = partial(self._accept, flight)
            is_locked, entry = await self.redis.lock_or_find(first, accept)
            if entry is not None:  # another replica has just loaded it, perhaps with the other keys
                flight.loaded[first] = entry
                flight.from_redis.add(first)
                await self._read_redis(flight, keys[1:])
                keys = [key for key in keys if key not in flight.loaded]
            loaded: Loaded = {}
            try:
                loaded = await self._load(keys) if keys else {}
            finally:
                kept = loaded if flight.generation == self._generation else {}
                # The lock is released last: a replica that waits for it finds the others in Redis.
                for key in reversed(keys):
                    self._store(key, kept.get(key), is_locked and key == first)
            flight.loaded |= loaded

    async def _read_redis(self, flight: Flight, keys: Sequence[Key]) -> None:
        """Add the entries of Redis that answer the flight."""
        entries = await self.redis.read(keys) if keys else {}
        for key, entry in entries.items():
            if self._accept(flight, entry):
                flight.loaded[key] = entry
                flight.from_redis.add(key)

    def _accept(self, flight: Flight, entry: Entry) -> bool:
        """Store an entry of Redis in memory, where even an old one can be served as stale.

        Returns True if the entry answers the flight.
        """
        if flight.generation != self._generation or not self._put_newest(entry):
            return False
        now = self._clock.monotonic()
        return flight.limit.is_usable(entry, now) and flight.limit.accepts(entry, now)

    def _store(self, key: Key, value: Entry | GatewayError | None, is_locked: bool) -> None:
        """Store what was loaded in both tiers, and release the lock even if nothing was."""
        entry = value if isinstance(value, Entry) else None
        if entry is not None:
            self._put_newest(entry)
            self._refusals.pop(key, None)
        elif isinstance(value, CallerError):
            self._refusals[key] = value
        if entry is not None or is_locked:
            self.redis.write(key, entry, last=is_locked)

    def _put_newest(self, entry: Entry) -> bool:
        """Store an entry in memory unless a newer one is there. Return True if it is the newest."""
        known = self.memory.get(entry.key)
        if known is not None:
            if known.is_newer_than(entry):
                return False
            if abs(known.born - entry.born) <= ROUNDING_SECONDS and known.etag == entry.etag:
                return True  # the same entry, whose hits are kept
        self.memory.put(entry)
        _MEMORY_SET.inc()
        return True


def _is_aging(outcome: Outcome) -> bool:
    """Return True if a refresh has to follow the answer."""
    return isinstance(outcome, Served) and outcome.result == "stale_revalidate"


def _matching(keys: Iterable[Key], exchange: str | None, symbol: str | None) -> list[Key]:
    """Return the keys of an exchange and symbol; None matches all."""
    found = [key for key in keys if exchange in (None, key.exchange)]
    return [key for key in found if symbol in (None, key.symbol)]
