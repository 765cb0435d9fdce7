"""The second cache tier: entries in Redis, and a lock with which replicas load an answer once."""

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import orjson
from redis.asyncio import RedisCluster

from src.cache.entry import LARGE_BYTES, Entry, Key
from src.core.clock import Clock
from src.store.redis import PREFIX, RedisClient, RedisStore, RedisUnavailable

MAX_PENDING_WRITES = 1000  # writes under way beside the answers; more are dropped, not queued
LOCK_POLL_SECONDS = 0.025
# The key that counts the clears, and the channel that announces each with its number.
CLEARS = f"{PREFIX}clears"
# After this time without an announcement the count is read, as an announcement may have been lost.
CHECK_SECONDS = 5.0
LATE_SECONDS = 0.5  # an announcement that comes later than this after its count is taken for lost
CLEAR_TIMEOUT_SECONDS = 1.0  # timeout of commands that no request waits for

# Stores an entry unless a newer one is there, by the rule of `Entry.is_newer_than`, and releases
# the lock if it is ours. Overwrites any invalid entry. KEYS: entry, lock. ARGV: lock token,
# milliseconds to keep the entry, payload (empty: none).
STORE = """
local old = redis.pcall('GETRANGE', KEYS[1], 0, 95)
local function number(text, position)
  local digits = type(text) == 'string' and string.sub(text, position * 16 + 1, position * 16 + 16)
  return tonumber(digits or '') or 0
end
local newer = number(old, 0) > number(ARGV[3], 0)
if number(old, 0) + number(old, 2) > number(ARGV[3], 0) then
  local late = number(old, 5) - number(ARGV[3], 5)
  local nonce = number(old, 4)
  if nonce > 0 and number(ARGV[3], 4) > 0 and nonce ~= number(ARGV[3], 4) then
    newer = nonce > number(ARGV[3], 4)
  elseif number(old, 5) > 0 and number(ARGV[3], 5) > 0 and late ~= 0 and late <= 60000 then
    newer = late > 0
  end
end
if ARGV[3] ~= '' and not newer then redis.call('SET', KEYS[1], ARGV[3], 'PX', ARGV[2]) end
if redis.call('GET', KEYS[2]) == ARGV[1] then redis.call('DEL', KEYS[2]) end
"""

# Takes the lock if it is free. KEYS: entry, lock. ARGV: lock token, milliseconds to hold it.
# Returns 1 if the lock is ours (perhaps from before: an outage lost its release, or a clear
# detached its flight), and the entry.
LOCK = """
redis.call('SET', KEYS[2], ARGV[1], 'NX', 'PX', ARGV[2])
local value = redis.pcall('GET', KEYS[1])
return {redis.call('GET', KEYS[2]) == ARGV[1] and 1 or 0, type(value) == 'string' and value}
"""

# Counts a clear and announces it. KEYS: count and channel. ARGV: announcement, a JSON array that
# gets the number in front.
ANNOUNCE = """
local number = redis.call('INCR', KEYS[1])
redis.call('PUBLISH', KEYS[1], '[' .. number .. ',' .. string.sub(ARGV[1], 2))
"""


class RedisTier:
    """Reads, writes and locks entries.

    A failure of Redis never raises here, except in `clear`: it is a miss.
    """

    def __init__(
        self, store: RedisStore, clock: Clock, keep_seconds: float, lock_seconds: float
    ) -> None:
        """Redis removes an entry `keep_seconds` after its TTL, a lock after `lock_seconds`."""
        self._store = store
        self._clock = clock
        self._keep_seconds = keep_seconds
        self._lock_seconds = lock_seconds
        self._token = os.urandom(8).hex()
        self._clears = 0  # number of the last clear that this process has applied
        self._writes: set[asyncio.Task[None]] = set()

    async def read(self, keys: Sequence[Key]) -> dict[Key, Entry]:
        """Return the entries in Redis, fresh or not."""
        try:
            values = await self._store.run(
                "get", partial(_mget, [key.redis_name() for key in keys])
            )
        except RedisUnavailable:
            return {}
        parse = partial(Entry.parse, clock=self._clock)
        entries = {key: parse(key, value) for key, value in zip(keys, values, strict=True)}
        return {key: entry for key, entry in entries.items() if entry is not None}

    async def lock_or_find(
        self, key: Key, accept: Callable[[Entry], bool]
    ) -> tuple[bool, Entry | None]:
        """Take the lock to load a key for all replicas, or wait for the entry of its holder.

        Returns whether the lock is ours, and the first entry that `accept` takes. (False, None)
        means that neither was possible in time: load without a lock.
        """
        give_up_at = self._clock.monotonic() + self._lock_seconds
        while True:
            try:
                reply = await self._store.run(
                    "lock", self._script(LOCK, key, int(self._lock_seconds * 1000))
                )
            except RedisUnavailable:
                return False, None
            is_locked = bool(reply[0])
            entry = Entry.parse(key, reply[1], self._clock)
            if entry is not None and accept(entry):
                if is_locked:
                    self.write(key, None)
                return False, entry
            if is_locked or self._clock.monotonic() >= give_up_at:
                return is_locked, None
            await asyncio.sleep(LOCK_POLL_SECONDS)

    @asynccontextmanager
    async def turn(self, key: Key) -> AsyncIterator[None]:
        """Wait until no other replica holds the lock of `key`, and hold it.

        Redis has what the other loaded.
        """
        is_locked, _ = await self.lock_or_find(key, lambda _: False)
        try:
            yield
        finally:
            if is_locked:
                self.write(key, None, last=True)

    def write(self, key: Key, entry: Entry | None, *, last: bool = False) -> None:
        """Store an entry, if there is one, and release the lock, in a task of its own.

        With `last` this happens after the writes that are under way.
        """
        if not self._store.configured or len(self._writes) >= MAX_PENDING_WRITES:
            return
        earlier = set(self._writes) if last else set()
        task = asyncio.create_task(self._write_after(earlier, key, entry))
        self._writes.add(task)
        task.add_done_callback(self._writes.discard)

    async def clear(self, exchange: str | None, symbol: str | None) -> int:
        """Remove the entries of one exchange or symbol, or all. Return how many there were.

        Raises `RedisUnavailable`. The clear is announced to other replicas twice: before, so that
        they do not store the results of loads under way, and after, so that they remove what they
        read from Redis meanwhile.
        """
        await self.drain()  # a write that began before would restore an entry
        if not self._store.configured:
            return 0
        await self._announce(exchange, symbol)
        removed = await self._store.delete_matching(
            f"data:{{{exchange or '*'}|*|{_escape_pattern(symbol)}|*}}"
        )
        await self._announce(exchange, symbol)
        return removed

    async def start(self) -> None:
        """Read the number of the last clear. Raises `RedisUnavailable`."""
        self._clears = await self._count_clears()

    async def follow_clears(self, forget: Callable[[str | None, str | None], object]) -> None:
        """Call `forget` for each clear of another replica, and for everything if one was missed.

        Raises `RedisUnavailable` when Redis is lost; call it again, and nothing is missed. A Redis
        without a count has lost its data. That is no reason to clear memory: all replicas would ask
        the exchanges for everything at once.
        """
        async with self._store.pubsub() as pubsub:
            await pubsub.subscribe(CLEARS)
            is_behind = False  # True while Redis counts a clear whose announcement has not arrived
            while True:
                message = await pubsub.get_message(
                    timeout=LATE_SECONDS if is_behind else CHECK_SECONDS
                )
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

    async def drain(self) -> None:
        """Wait for the writes under way; the timeout of a command bounds each of them."""
        if self._writes:
            await asyncio.wait(set(self._writes))

    async def _announce(self, exchange: str | None, symbol: str | None) -> None:
        message = orjson.dumps([self._token, exchange, symbol])
        await self._store.run(
            "clear", lambda redis: redis.eval(ANNOUNCE, 1, CLEARS, message), CLEAR_TIMEOUT_SECONDS
        )

    async def _count_clears(self) -> int:
        return int(
            await self._store.run("clear", lambda redis: redis.get(CLEARS), CLEAR_TIMEOUT_SECONDS)
            or 0
        )

    async def _write_after(
        self, earlier: set[asyncio.Task[None]], key: Key, entry: Entry | None
    ) -> None:
        payload = b""
        if entry is not None and len(entry.body) >= LARGE_BYTES:
            payload = await asyncio.to_thread(entry.dump, self._clock)
        elif entry is not None:
            payload = entry.dump(self._clock)
        keep_ms = 1 if entry is None else max(1, int(entry.keep_seconds(self._keep_seconds) * 1000))
        if earlier:
            await asyncio.wait(earlier)
        try:
            await self._store.run("set", self._script(STORE, key, keep_ms, payload))
        except RedisUnavailable:
            return

    def _script(
        self, script: str, key: Key, *arguments: bytes | int
    ) -> Callable[[RedisClient], Awaitable[Any]]:
        names = (key.redis_name(), key.redis_name("lock"))
        return lambda redis: redis.eval(script, 2, *names, self._token, *arguments)


def _mget(names: list[str], redis: RedisClient) -> Awaitable[list[Any]]:
    if isinstance(redis, RedisCluster) and len(names) > 1:  # a command for each slot
        return redis.mget_nonatomic(names)
    return redis.mget(names)


def _escape_pattern(symbol: str | None) -> str:
    """Return a Redis pattern that matches the symbol and nothing else; None matches all."""
    if symbol is None:
        return "*"
    return "".join(
        f"\\{character}" if character in "*?[]^\\" else character for character in symbol
    )
