"""A sliding window of weight: how much was spent in the last seconds, counted in buckets.

Replicas count together in Redis (`SharedWindow`). While Redis is away, each replica counts for itself (`Window`).
"""

import contextlib
import math
from collections import Counter, deque
from collections.abc import Sequence
from typing import NamedTuple

from src.core.clock import Clock
from src.store.redis import RedisAway, RedisStore

BUCKETS = 10  # a window is counted in tenths: weight comes back at most a tenth of the window too late, never too early

# KEYS[1] hash: bucket number -> weight, "hold" -> "until_ms cause". ARGV: cost (0 only looks), limit, bucket ms,
# buckets, at-least (raise the count to this). Returns: 1 when admitted, ms to wait, hold ms left, its cause, the number
# of the current bucket, and the live buckets: number, weight, number, weight...
SPEND = """
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local cost, limit, width, buckets = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4])
local current, used, live, hold, cause = math.floor(now / width), 0, {}, 0, ''
local fields = redis.call('HGETALL', KEYS[1])
for i = 1, #fields, 2 do
  if fields[i] == 'hold' then
    local till, why = string.match(fields[i + 1], '^(%d+) (.*)$')
    hold, cause = math.max(0, tonumber(till) - now), why
  elseif tonumber(fields[i]) >= current - buckets and tonumber(fields[i]) <= current then
    used = used + tonumber(fields[i + 1])
    live[#live + 1] = {tonumber(fields[i]), tonumber(fields[i + 1])}
  else
    redis.call('HDEL', KEYS[1], fields[i])
  end
end
local function add(weight)
  redis.call('HINCRBY', KEYS[1], string.format('%d', current), weight)
  redis.call('PEXPIRE', KEYS[1], math.max(width * (buckets + 1), hold, redis.call('PTTL', KEYS[1])))
  used = used + weight
  live[#live + 1] = {current, weight}
end
local function reply(admitted, wait)
  local flat = {}
  for _, bucket in ipairs(live) do flat[#flat + 1] = bucket[1] flat[#flat + 1] = bucket[2] end
  return {admitted, wait, hold, cause, current, flat}
end
if tonumber(ARGV[5]) > used then add(tonumber(ARGV[5]) - used) end
if hold > 0 or used + cost <= limit then
  if hold == 0 and cost > 0 then add(cost) end
  return reply(hold == 0 and 1 or 0, 0)
end
table.sort(live, function(a, b) return a[1] < b[1] end)
local excess, wait = used + cost - limit, width * (buckets + 1)
for _, bucket in ipairs(live) do
  excess = excess - bucket[2]
  if excess <= 0 then wait = (bucket[1] + buckets + 1) * width - now break end
end
return reply(0, math.min(wait, width * (buckets + 1)))
"""


class Window:
    """Weight spent in the last `seconds`, in memory; conservative, as it counts by whole buckets."""

    def __init__(self, limit: int, seconds: float, clock: Clock, count: int = BUCKETS) -> None:
        """Allow `limit` in so many seconds, counted in `count` buckets."""
        self.limit = limit
        self.count = count
        self.width = seconds / count
        self._clock = clock
        self._buckets: deque[list[int]] = deque(maxlen=count + 1)  # [bucket number, weight], oldest first

    def used(self) -> int:
        """Weight that counts now."""
        oldest = self._current() - self.count
        while self._buckets and self._buckets[0][0] < oldest:
            self._buckets.popleft()
        return sum(weight for _, weight in self._buckets)

    def wait_for(self, cost: int) -> float:
        """Seconds until `cost` fits; 0 when it fits now. A cost above the whole limit counts as the limit."""
        excess = self.used() + min(cost, self.limit) - self.limit
        if excess <= 0:
            return 0.0
        wait = 0.0
        for number, weight in self._buckets:
            wait = (number + self.count + 1) * self.width - self._clock.monotonic()
            excess -= weight
            if excess <= 0:
                break
        return wait

    def add(self, cost: int) -> None:
        """Count weight as spent now."""
        current = self._current()
        if not self._buckets or self._buckets[-1][0] != current:
            self._buckets.append([current, 0])
        self._buckets[-1][1] += cost

    def mirror(self, current: int, shared: Sequence[int]) -> None:
        """Take over the shared buckets: number, weight, number, weight... by a clock whose bucket is `current` now."""
        shift, weights = self._current() - current, Counter[int]()
        for number, weight in zip(shared[::2], shared[1::2], strict=True):
            weights[number + shift] += weight
        self._buckets = deque(([number, weights[number]] for number in sorted(weights)), maxlen=self.count + 1)

    def raise_to(self, used: int) -> None:
        """Count at least `used`, as somebody who sees more than we do said."""
        if (missing := used - self.used()) > 0:
            self.add(missing)

    def _current(self) -> int:
        return math.floor(self._clock.monotonic() / self.width)


class Reply(NamedTuple):
    """What came of the wish to spend: whether it was, else the seconds until it fits; and the hold there is."""

    admitted: bool
    wait_seconds: float
    hold_seconds: float = 0.0
    cause: str = ""


class SharedWindow:
    """A window all replicas count in together, through Redis; while that is away each counts for itself.

    `window` follows the shared count, so that it goes on from there when Redis is lost.
    """

    def __init__(self, key: str, window: Window, store: RedisStore, operation: str) -> None:
        """`key` names it in Redis, `operation` in the metrics."""
        self.window = window
        self._key = key
        self._store = store
        self._operation = operation
        self._alone = 0  # weight spent without Redis
        self._told = 0  # of that, what Redis was told: it has to know all before it may admit

    async def spend(self, cost: int) -> Reply:
        """Spend `cost`, or the whole limit if that is less."""
        cost = min(cost, self.window.limit)
        try:
            return await self._ask(cost)
        except RedisAway:
            return self.spend_alone(cost)

    def spend_alone(self, cost: int) -> Reply:
        """Spend `cost` as far as this process knows; Redis is told later."""
        wait = self.window.wait_for(cost)
        if not wait:
            self.window.add(cost)
            self._alone += cost
        return Reply(not wait, wait)

    async def look(self) -> None:
        """Learn what other replicas have spent meanwhile; without Redis there is nothing to learn."""
        with contextlib.suppress(RedisAway):
            await self._ask(0)

    async def raise_to(self, used: int) -> None:
        """Count at least `used`, as somebody who sees more than we do said."""
        if used <= self.window.used():
            return
        self.window.raise_to(used)
        with contextlib.suppress(RedisAway):
            await self._ask(0, used)

    async def _ask(self, cost: int, at_least: int = 0) -> Reply:
        alone = self._alone
        if alone > self._told:
            # Not on every call: ours lags above the shared count, and the two would keep each other up.
            at_least = max(at_least, self.window.used())
        limit, width, count = self.window.limit, round(self.window.width * 1000), self.window.count
        raw = await self._store.run(
            self._operation, lambda redis: redis.eval(SPEND, 1, self._key, cost, limit, width, count, at_least)
        )
        admitted, wait, hold, cause, current, shared = raw
        self._told = alone
        self.window.mirror(current, shared)
        if meanwhile := self._alone - alone:
            self.window.add(meanwhile)
        return Reply(bool(admitted), max(wait, 1) / 1000, hold / 1000, cause.decode())
