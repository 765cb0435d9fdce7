"""The request budget of each exchange: what all replicas together may ask of it from one address.

Three things keep this from being a library: the clock is an argument, a refusal names the seconds until the weight
fits, and the exchange's own count can raise ours. The same key carries a hold (a ban, a Retry-After): one replica's
ban stops all.
"""

import contextlib
import math
from collections.abc import Mapping

from src.core.clock import Clock
from src.core.errors import BudgetSpent, ExchangeBanned, ExchangeRateLimited
from src.store.redis import PREFIX, RedisAway, RedisStore
from src.store.window import SharedWindow, Window

HOLD = """
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local till = now + ARGV[1]
if till <= tonumber(string.match(redis.call('HGET', KEYS[1], 'hold') or '', '^%d+') or 0) then return end
redis.call('HSET', KEYS[1], 'hold', string.format('%d', till) .. ' ' .. ARGV[2])
redis.call('PEXPIRE', KEYS[1], math.max(tonumber(ARGV[1]), redis.call('PTTL', KEYS[1])))
"""


class RateLimiter:
    """Admits calls to exchanges within their budgets: `budgets` maps an exchange to (weight, seconds)."""

    def __init__(self, budgets: Mapping[str, tuple[int, int]], store: RedisStore, clock: Clock) -> None:
        self._store = store
        self._seconds = {exchange: seconds for exchange, (_, seconds) in budgets.items()}
        self._shared = {
            exchange: SharedWindow(_key(exchange), Window(weight, seconds, clock), store, "budget")
            for exchange, (weight, seconds) in budgets.items()
        }

    def used_ratio(self, exchange: str) -> float:
        """Share of the budget used in its window, as far as this process knows; above 1 when the exchange said so."""
        window = self._shared[exchange].window
        return window.used() / window.limit

    async def look(self, exchange: str) -> None:
        """Learn what other replicas have spent meanwhile; without Redis there is nothing to learn."""
        await self._shared[exchange].look()

    def is_spent(self, exchange: str, cost: int) -> bool:
        """Whether `cost` would be refused now, as far as this process knows."""
        return self._shared[exchange].window.wait_for(cost) > 0

    async def acquire(self, exchange: str, cost: int) -> None:
        """Spend `cost`. Raises `BudgetSpent` with the seconds to wait, or the reason of a hold other replicas know."""
        reply = await self._shared[exchange].spend(cost)
        if reply.hold_seconds:
            banned = reply.cause == ExchangeBanned.cause
            raise (ExchangeBanned if banned else ExchangeRateLimited)(
                f"{exchange} told another replica to wait ({reply.cause}); ask again later or ask another exchange",
                exchange=exchange,
                retry_after=reply.hold_seconds,
            )
        if not reply.admitted:
            limit = self._shared[exchange].window.limit
            raise BudgetSpent(
                f"the request budget of {exchange} ({limit} per {self._seconds[exchange]} s) is spent; "
                "ask again later or ask another exchange",
                exchange=exchange,
                retry_after=reply.wait_seconds,
            )

    async def correct(self, exchange: str, used: int) -> None:
        """Take over the exchange's own count of what this address has used, when it is higher than ours."""
        await self._shared[exchange].raise_to(used)

    async def hold(self, exchange: str, seconds: float, cause: str) -> None:
        """Tell every replica not to ask the exchange for `seconds`."""
        with contextlib.suppress(RedisAway):
            await self._store.run(
                "hold", lambda redis: redis.eval(HOLD, 1, _key(exchange), math.ceil(seconds * 1000), cause)
            )

    async def release(self, exchange: str) -> None:
        """Forget a hold, as a reset of the breaker asks for."""
        with contextlib.suppress(RedisAway):
            await self._store.run("hold", lambda redis: redis.hdel(_key(exchange), "hold"))


def _key(exchange: str) -> str:
    return f"{PREFIX}budget:{{{exchange}}}"
