"""The second tier: entries in Redis, and the short lock by which all replicas together load a value once."""

import asyncio
import os
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import orjson
from redis.asyncio import RedisCluster

from src.cache.entry import Entry, Key
from src.core.clock import Clock
from src.store.redis import PREFIX, RedisAway, RedisClient, RedisStore

MAX_PENDING_WRITES = 1000  # writes under way beside the answers; past that they are dropped, not queued
LOCK_POLL_SECONDS = 0.025
CLEARS = f"{PREFIX}clears"  # the key that counts the clears, and the channel that announces each with its number
CHECK_SECONDS = 5.0  # without an announcement, before the count is read again: one may have been lost
LATE_SECONDS = 0.5  # how much later than the count an announcement may come before it is taken for lost

# Stores a value unless a newer one is there, and gives up the lock if it is ours. Any broken old value is overwritten.
# KEYS: value, lock. ARGV: lock token, milliseconds to keep the value, payload (empty: none).
STORE = """
local old = redis.pcall('GETRANGE', KEYS[1], 0, 15)
local newer = type(old) == 'string' and tonumber(old) and tonumber(old) > (tonumber(string.sub(ARGV[3], 1, 16)) or 0)
if ARGV[3] ~= '' and not newer then redis.call('SET', KEYS[1], ARGV[3], 'PX', ARGV[2]) end
if redis.call('GET', KEYS[2]) == ARGV[1] then redis.call('DEL', KEYS[2]) end
"""

# Takes the lock if it is free. KEYS: value, lock. ARGV: lock token, milliseconds to hold it. Returns: 1 when it is ours
# (perhaps from before: its release was lost in an outage, or a clear took its flight off the board), and the value.
LOCK = """
redis.call('SET', KEYS[2], ARGV[1], 'NX', 'PX', ARGV[2])
local value = redis.pcall('GET', KEYS[1])
return {redis.call('GET', KEYS[2]) == ARGV[1] and 1 or 0, type(value) == 'string' and value}
"""

# Counts a clear and announces it. KEYS: count and channel. ARGV: announcement, a JSON array to put the number before.
ANNOUNCE = "redis.call('PUBLISH', KEYS[1], '[' .. redis.call('INCR', KEYS[1]) .. ',' .. string.sub(ARGV[1], 2))"


class RedisTier:
    """Reads, writes and locks entries. Nothing here raises for Redis' sake: what it cannot do is a miss."""

    def __init__(
        self, store: RedisStore, clock: Clock, *, jitter: float, keep_seconds: float, lock_seconds: float
    ) -> None:
        """`keep_seconds` is how long past its TTL an entry is kept, `lock_seconds` what a dead holder may cost."""
        self._store = store
        self._clock = clock
        self._jitter = jitter
        self._keep_seconds = keep_seconds
        self._lock_seconds = lock_seconds
        self._token = os.urandom(8).hex()
        self._clears = 0  # number of the last clear that this process has applied
        self._writes: set[asyncio.Task[None]] = set()

    async def read(self, keys: Sequence[Key], ttl: float) -> dict[Key, Entry]:
        """Return the entries Redis has, fresh or not."""
        try:
            raw = await self._store.run("get", _mget([key.redis() for key in keys]))
        except RedisAway:
            return {}
        entries = {key: self._parse(value, ttl) for key, value in zip(keys, raw, strict=True)}
        return {key: entry for key, entry in entries.items() if entry is not None}

    async def lock_or_find(self, key: Key, ttl: float, accept: Callable[[Entry], bool]) -> tuple[bool, Entry | None]:
        """Take the right to load the key for all replicas, or wait for the value of the one that has it.

        Returns whether the lock is ours, and the entry if one that `accept` takes came first. (False, None) means that
        neither could be had in time: load it without a lock.
        """
        give_up = self._clock.monotonic() + self._lock_seconds
        while True:
            try:
                held, raw = await self._store.run("lock", self._script(LOCK, key, int(self._lock_seconds * 1000)))
            except RedisAway:
                return False, None
            locked, entry = bool(held), self._parse(raw, ttl)
            if entry is not None and accept(entry):
                if locked:
                    self.write(key, None)
                return False, entry
            if locked or self._clock.monotonic() >= give_up:
                return locked, None
            await asyncio.sleep(LOCK_POLL_SECONDS)

    def write(self, key: Key, entry: Entry | None, *, last: bool = False) -> None:
        """Store an entry (if there is one) and give up the lock, beside the answer: nobody waits for it.

        With `last` it is done after the writes that are under way.
        """
        if not self._store.configured or len(self._writes) >= MAX_PENDING_WRITES:
            return
        earlier = set(self._writes) if last else set()
        payload = b"" if entry is None else entry.dump(self._clock)
        keep = 1 if entry is None else max(1, int((entry.ttl + self._keep_seconds) * 1000))
        task = asyncio.create_task(self._write_now(key, payload, keep, earlier))
        self._writes.add(task)
        task.add_done_callback(self._writes.discard)

    async def clear(self, exchange: str | None, symbol: str | None) -> int:
        """Remove the entries of one exchange or symbol, or all; returns how many. Raises `RedisAway`.

        The clear is announced to other replicas twice: before, so that they do not keep the results of loads under way,
        and after, so that they drop what they read from Redis meanwhile.
        """
        await self.drain()  # or a write that began before would come after
        if not self._store.configured:
            return 0
        await self._announce(exchange, symbol)
        removed = await self._store.delete_matching(f"data:{{{exchange or '*'}|*|{_literal(symbol)}|*}}")
        await self._announce(exchange, symbol)
        return removed

    async def _announce(self, exchange: str | None, symbol: str | None) -> None:
        message = orjson.dumps([self._token, exchange, symbol])
        await self._store.run("clear", lambda redis: redis.eval(ANNOUNCE, 1, CLEARS, message), 1.0)

    async def start(self) -> None:
        """Learn which clears are over. Raises `RedisAway`."""
        self._clears = await self._count_clears()

    async def follow_clears(self, forget: Callable[[str | None, str | None], object]) -> None:
        """Call `forget` for each clear by another replica, and for everything if one was missed.

        Raises `RedisAway` when Redis is lost; nothing is missed if it is called again. A Redis without a count was
        started anew. That is no reason to drop what memory has: the exchanges would be asked for all of it at once.
        """
        async with self._store.pubsub() as pubsub:
            await pubsub.subscribe(CLEARS)
            is_behind = False  # True while Redis counts a clear that was not announced here yet
            while True:
                message = await pubsub.get_message(timeout=LATE_SECONDS if is_behind else CHECK_SECONDS)
                if message is not None and message["type"] == "message":
                    number, token, exchange, symbol = orjson.loads(message["data"])
                    if token != self._token:
                        forget(exchange, symbol)
                    if number == self._clears + 1:
                        self._clears = number
                        continue
                count = await self._count_clears()
                is_missing = count not in (0, self._clears)
                if is_missing and is_behind:
                    forget(None, None)
                is_behind = is_missing and not is_behind
                self._clears = self._clears if is_behind else count

    async def _count_clears(self) -> int:
        return int(await self._store.run("clear", lambda redis: redis.get(CLEARS), 1.0) or 0)  # no request waits for it

    async def drain(self) -> None:
        """Wait for the writes under way; each is bounded by the timeout of a command."""
        if self._writes:
            await asyncio.wait(set(self._writes))

    async def _write_now(self, key: Key, payload: bytes, keep_ms: int, earlier: set[asyncio.Task[None]]) -> None:
        if earlier:
            await asyncio.wait(earlier)
        try:
            await self._store.run("set", self._script(STORE, key, keep_ms, payload))
        except RedisAway:
            return

    def _script(self, script: str, key: Key, *arguments: bytes | int) -> Callable[[RedisClient], Awaitable[Any]]:
        return lambda redis: redis.eval(script, 2, key.redis(), key.redis("lock"), self._token, *arguments)

    def _parse(self, raw: object, ttl: float) -> Entry | None:
        return Entry.parse(raw, ttl, self._jitter, self._clock)


def _mget(names: list[str]) -> Callable[[RedisClient], Awaitable[list[Any]]]:
    def mget(redis: RedisClient) -> Awaitable[list[Any]]:
        if isinstance(redis, RedisCluster) and len(names) > 1:  # a command for each slot
            return redis.mget_nonatomic(names)
        return redis.mget(names)

    return mget


def _literal(symbol: str | None) -> str:
    """Escape what a Redis pattern would read as more than itself."""
    return "*" if symbol is None else "".join(f"\\{sign}" if sign in "*?[]^\\" else sign for sign in symbol)
