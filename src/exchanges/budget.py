"""The request budget of each exchange: what all replicas together may request from one address.

No library does this, for three reasons: the clock is an argument, a refusal contains the seconds
until the weight fits, and the exchange's own count can raise ours. The same key in Redis carries a
hold (a ban, a Retry-After), so that one replica's ban stops all replicas.
"""

import contextlib
import math
from collections.abc import Mapping

from src.core.clock import Clock
from src.core.errors import RETRY_ADVICE, BudgetSpent, ExchangeBanned, ExchangeRateLimited
from src.store.redis import PREFIX, RedisStore, RedisUnavailable
from src.store.window import SharedWindow, Window

# Sets the end and the cause of a hold (ms of Redis' clock), unless a longer one exists.
HOLD = """
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local till = now + ARGV[1]
local current = string.match(redis.call('HGET', KEYS[1], 'hold') or '', '^%d+')
if till <= tonumber(current or 0) then return end
redis.call('HSET', KEYS[1], 'hold', string.format('%d', till) .. ' ' .. ARGV[2])
redis.call('PEXPIRE', KEYS[1], math.max(tonumber(ARGV[1]), redis.call('PTTL', KEYS[1])))
"""


class RateLimiter:
    """Admits calls within the budgets of exchanges."""

    def __init__(
        self, budgets: Mapping[str, tuple[int, int]], store: RedisStore, clock: Clock
    ) -> None:
        """Create a window per exchange; `budgets` maps an exchange to (weight, seconds)."""
        self._store = store
        self._budgets = budgets
        self._windows = {
            exchange: SharedWindow(_key(exchange), Window(weight, seconds, clock), store, "budget")
            for exchange, (weight, seconds) in budgets.items()
        }

    def used_ratio(self, exchange: str) -> float:
        """Return the used share of the budget, as far as this process knows.

        It exceeds 1 if the exchange's own count does.
        """
        window = self._windows[exchange].window
        return window.used() / window.limit

    async def refresh(self, exchange: str) -> None:
        """Learn from Redis what other replicas have used."""
        await self._windows[exchange].update()

    def is_spent(self, exchange: str, weight: int) -> bool:
        """True if `weight` would be refused now, as far as this process knows."""
        return self._windows[exchange].window.wait_for(weight) > 0

    async def acquire(self, exchange: str, weight: int) -> None:
        """Use `weight` of the budget.

        Raises `BudgetSpent`, or the error of a hold that another replica has set, with the seconds
        to wait.
        """
        reply = await self._windows[exchange].spend(weight)
        if reply.hold_seconds:
            kind = ExchangeBanned if reply.cause == ExchangeBanned.cause else ExchangeRateLimited
            detail = f"{exchange} asked another replica to pause ({reply.cause}); {RETRY_ADVICE}"
            raise kind(detail, exchange=exchange, retry_after=reply.hold_seconds)
        if not reply.admitted:
            limit, seconds = self._budgets[exchange]
            budget = f"the request budget of {exchange} ({limit} per {seconds} s)"
            detail = f"{budget} is spent; {RETRY_ADVICE}"
            raise BudgetSpent(detail, exchange=exchange, retry_after=reply.wait_seconds)

    async def correct(self, exchange: str, used: int) -> None:
        """Use the exchange's own count of what this address has used, if it is higher than ours."""
        await self._windows[exchange].raise_to(used)

    async def hold(self, exchange: str, seconds: float, cause: str) -> None:
        """Stop the calls of all replicas for `seconds`."""
        milliseconds = math.ceil(seconds * 1000)
        with contextlib.suppress(RedisUnavailable):
            await self._store.run(
                "hold", lambda redis: redis.eval(HOLD, 1, _key(exchange), milliseconds, cause)
            )

    async def release(self, exchange: str) -> None:
        """Remove a hold."""
        with contextlib.suppress(RedisUnavailable):
            await self._store.run("hold", lambda redis: redis.hdel(_key(exchange), "hold"))


def _key(exchange: str) -> str:
    return f"{PREFIX}budget:{{{exchange}}}"
