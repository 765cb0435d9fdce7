"""The request budget of each exchange: what all replicas together may request from one address.

No library does this, for three reasons: the clock is an argument, a refusal contains the seconds
until the weight fits, and the exchange's own count can raise ours. The same key in Redis carries a
hold (a ban, a Retry-After), so that one replica's ban stops all replicas.
"""

import contextlib
import math
from collections.abc import Mapping
from operator import methodcaller

from src.core.clock import Clock
from src.core.errors import RETRY_ADVICE, BudgetSpent, ExchangeBanned, ExchangeRateLimited
from src.store.redis import PREFIX, RedisStore, RedisUnavailable
from src.store.window import SharedWindow, Window

FUTURES = "-futures"  # after the name of the exchange: the pool of its swaps

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
    """Admits calls within the budgets of exchanges.

    A pool is what an exchange counts together. The first pool of an exchange has its name; see
    `pool_of`.
    """

    def __init__(
        self, budgets: Mapping[str, tuple[int, int]], store: RedisStore, clock: Clock
    ) -> None:
        """Create a window per pool; `budgets` maps a pool to (weight, seconds)."""
        self._store = store
        self.budgets = budgets
        self._windows = {
            pool: SharedWindow(_key(pool), Window(weight, seconds, clock), store, "budget")
            for pool, (weight, seconds) in budgets.items()
        }

    def pool_of(self, exchange: str, *, is_swap: bool) -> str:
        """Return the pool that the calls for spot markets or swaps use."""
        pool = exchange + FUTURES
        return pool if is_swap and pool in self.budgets else exchange

    def pools(self, exchange: str) -> list[str]:
        """Return all pools of an exchange."""
        return [pool for pool in self.budgets if _exchange_of(pool) == exchange]

    def used_ratio(self, pool: str, weight: int = 0) -> float:
        """Return the used share of the budget after `weight`, as far as this process knows.

        It exceeds 1 if the exchange's own count does.
        """
        window = self._windows[pool].window
        return (window.used() + weight) / window.limit

    def window(self, pool: str) -> Window:
        """Return the window of a pool, as this process knows it."""
        return self._windows[pool].window

    def usage(self, pool: str) -> tuple[int, int, float]:
        """Return the used weight, the limit, and the seconds until the whole limit is free."""
        window = self._windows[pool].window
        return window.used(), window.limit, window.wait_for(window.limit)

    def used_ratios(self, exchange: str) -> dict[str, float]:
        """Return the used share of each budget: `main` and, if it is separate, `futures`."""
        pools = {"main": exchange, "futures": exchange + FUTURES}
        return {name: self.used_ratio(pool) for name, pool in pools.items() if pool in self.budgets}

    async def refresh(self, pool: str) -> None:
        """Learn from Redis what other replicas have used."""
        await self._windows[pool].update()

    def is_spent(self, pool: str, weight: int) -> bool:
        """True if `weight` would be refused now, as far as this process knows."""
        return self._windows[pool].window.wait_for(weight) > 0

    async def acquire(self, pool: str, weight: int) -> None:
        """Use `weight` of the budget.

        Raises `BudgetSpent`, or the error of a hold that another replica has set, with the seconds
        to wait.
        """
        exchange = _exchange_of(pool)
        reply = await self._windows[pool].spend(weight)
        if reply.hold_seconds:
            kind = ExchangeBanned if reply.cause == ExchangeBanned.cause else ExchangeRateLimited
            detail = f"{exchange} asked another replica to pause ({reply.cause}); {RETRY_ADVICE}"
            raise kind(detail, exchange=exchange, retry_after=reply.hold_seconds)
        if not reply.admitted:
            limit, seconds = self.budgets[pool]
            budget = f"the request budget of {pool} ({limit} per {seconds} s)"
            detail = f"{budget} is spent; {RETRY_ADVICE}"
            raise BudgetSpent(detail, exchange=exchange, retry_after=reply.wait_seconds)

    async def correct(self, pool: str, used: int) -> None:
        """Use the exchange's own count of what this address has used, if it is higher than ours."""
        await self._windows[pool].raise_to(used)

    async def hold(self, exchange: str, seconds: float, cause: str) -> None:
        """Stop the calls of all replicas for `seconds`."""
        milliseconds = math.ceil(seconds * 1000)
        for pool in self.pools(exchange):
            with contextlib.suppress(RedisUnavailable):
                command = methodcaller("eval", HOLD, 1, _key(pool), milliseconds, cause)
                await self._store.run("hold", command)

    async def release(self, exchange: str) -> None:
        """Remove a hold."""
        for pool in self.pools(exchange):
            with contextlib.suppress(RedisUnavailable):
                await self._store.run("hold", methodcaller("hdel", _key(pool), "hold"))


def _exchange_of(pool: str) -> str:
    return pool.removesuffix(FUTURES)


def _key(pool: str) -> str:
    return f"{PREFIX}budget:{{{pool}}}"
