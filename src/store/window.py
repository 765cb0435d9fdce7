"""A sliding window that limits the weight spent in the last seconds.

`SharedWindow` counts for all replicas in Redis. While Redis is down, each replica counts for
itself in a `Window`.
"""

import contextlib
import math
from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

from src.core.clock import Clock
from src.store.redis import RedisStore, RedisUnavailable

# Buckets per window. Weight becomes available at most one bucket too late, and never too early.
BUCKETS = 10

# Spends weight in the shared window.
#
# KEYS[1]: a hash of bucket number -> weight, and "hold" -> "<end in ms> <cause>".
# ARGV: cost (0 spends nothing), limit, bucket width in ms, number of buckets, minimum: the weight
#   used is raised to the minimum first.
# Returns: 1 if the cost was spent, ms left of the hold, cause of the hold, time in ms, and the hash
#   as a flat list, without buckets that have left the window.
SPEND = """
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local cost, limit = tonumber(ARGV[1]), tonumber(ARGV[2])
local width, buckets, minimum = tonumber(ARGV[3]), tonumber(ARGV[4]), tonumber(ARGV[5])
local current = math.floor(now / width)
local used, hold, cause = 0, 0, ''

local fields = redis.call('HGETALL', KEYS[1])
for i = 1, #fields, 2 do
  local number = tonumber(fields[i])
  if fields[i] == 'hold' then
    local till, why = string.match(fields[i + 1], '^(%d+) (.*)$')
    hold, cause = math.max(0, till - now), why
  elseif number >= current - buckets and number <= current then
    used = used + fields[i + 1]
  else
    redis.call('HDEL', KEYS[1], fields[i])
  end
end

local spent = math.max(0, minimum - used)
local admitted = hold == 0 and used + spent + cost <= limit
if admitted then spent = spent + cost end
if spent > 0 then
  redis.call('HINCRBY', KEYS[1], string.format('%d', current), spent)
  local longest = math.max(width * (buckets + 1), hold, redis.call('PTTL', KEYS[1]))
  redis.call('PEXPIRE', KEYS[1], longest)
end
return {admitted and 1 or 0, hold, cause, now, redis.call('HGETALL', KEYS[1])}
"""


class Window:
    """Weight spent in the last `seconds`, in memory, counted in whole buckets."""

    def __init__(self, limit: int, seconds: float, clock: Clock, count: int = BUCKETS) -> None:
        """Allow a weight of `limit` in `seconds`, counted in `count` buckets."""
        self.limit = limit
        self.count = count
        self.width = seconds / count
        self._clock = clock
        self._clock_offset = 0.0  # between the clock of Redis, if it is known, and `clock`
        self._weights = Counter[int]()  # by bucket number, oldest first
        self.version = 0
        """Changes with each recorded weight, so that others can keep what depends on it."""

    def used(self) -> int:
        """Return the weight in the window."""
        oldest = self._current() - self.count
        while self._weights and (number := next(iter(self._weights))) < oldest:
            del self._weights[number]
        return sum(self._weights.values())

    def wait_for(self, cost: int) -> float:
        """Return the seconds until `cost` fits, 0 if it fits now.

        A cost above the limit counts as the limit.
        """
        excess = self.used() + min(cost, self.limit) - self.limit
        if excess <= 0:
            return 0.0
        wait = 0.0
        for number, weight in self._weights.items():
            wait = (number + self.count + 1) * self.width - self._now()
            excess -= weight
            if excess <= 0:
                break
        return wait

    def add(self, cost: int) -> None:
        """Record a weight as spent now."""
        self._weights[self._current()] += cost
        self.version += 1

    def mirror(self, now: float, weights: Mapping[int, int]) -> None:
        """Replace the weights by the shared weights at the time `now` of the clock of Redis."""
        self._clock_offset = now - self._clock.monotonic()
        self._weights = Counter(dict(sorted(weights.items())))
        self.version += 1

    def _now(self) -> float:
        return self._clock.monotonic() + self._clock_offset

    def _current(self) -> int:
        return math.floor(self._now() / self.width)


class Reply(NamedTuple):
    """The result of spending weight, and the hold that is in effect."""

    admitted: bool
    """True if the cost was spent."""
    wait_seconds: float
    """Seconds until the cost fits."""
    hold_seconds: float = 0.0
    cause: str = ""
    """Cause of the hold."""


class SharedWindow:
    """A window that all replicas share through Redis.

    `window` mirrors the shared count, so that counting continues from it when Redis is lost.
    """

    def __init__(self, key: str, window: Window, store: RedisStore, operation: str) -> None:
        """Create a window with the Redis key `key`. `operation` is its label in the metrics."""
        self.window = window
        self._key = key
        self._store = store
        self._operation = operation
        self._local_weight = 0  # spent without Redis, in total
        self._reported_weight = 0  # the part of it that Redis knows

    async def spend(self, cost: int) -> Reply:
        """Spend `cost`, or the limit if that is less."""
        cost = min(cost, self.window.limit)
        try:
            return await self._spend_shared(cost)
        except RedisUnavailable:
            return self.spend_locally(cost)

    def spend_locally(self, cost: int) -> Reply:
        """Spend `cost` without asking Redis. The weight is reported to Redis later."""
        wait = self.window.wait_for(cost)
        if not wait:
            self.window.add(cost)
            self._local_weight += cost
        return Reply(not wait, wait)

    async def update(self) -> None:
        """Update `window` with the weight that other replicas spent, if Redis is up."""
        with contextlib.suppress(RedisUnavailable):
            await self._spend_shared(0)

    async def raise_to(self, used: int) -> None:
        """Raise the weight in the window to `used`, if it is lower, for all replicas."""
        missing = used - self.window.used()
        if missing <= 0:
            return
        self.window.add(missing)
        with contextlib.suppress(RedisUnavailable):
            await self._spend_shared(0, used)

    async def _spend_shared(self, cost: int, minimum: int = 0) -> Reply:
        """Run `SPEND` and mirror its result. Unreported local weight is reported first."""
        local_weight = self._local_weight
        if local_weight > self._reported_weight:
            # Only then: the local count decays later than the shared count, so that reporting it
            # with every call would keep both from decaying.
            minimum = max(minimum, self.window.used())
        width_ms = round(self.window.width * 1000)
        arguments = (cost, self.window.limit, width_ms, self.window.count, minimum)
        admitted, hold, cause, now, fields = await self._store.run(
            self._operation, lambda redis: redis.eval(SPEND, 1, self._key, *arguments)
        )
        self._reported_weight = local_weight
        values = zip(fields[::2], fields[1::2], strict=True)
        weights = {int(name): int(value) for name, value in values if name != b"hold"}
        self.window.mirror(now / 1000, weights)
        # In ms as the clock of Redis. A wait of 0 would mean that the cost was spent.
        wait = 0.0 if admitted else max(round(self.window.wait_for(cost), 3), 0.001)
        # Weight that was spent locally during the call is not in the reply.
        if spent_meanwhile := self._local_weight - local_weight:
            self.window.add(spent_meanwhile)
        return Reply(bool(admitted), wait, hold / 1000, cause.decode())
