"""Refreshes hot entries shortly before they expire, so that no request waits for the exchange.

It costs no more than it saves: an entry is refreshed only if it was requested again, tickers of one
exchange are refreshed together, and the second half of each budget is reserved for requests.
"""

import asyncio
from collections import Counter, defaultdict

from src.cache.entry import Entry, Key
from src.core import metrics
from src.core.background import repeat, report_error
from src.exchanges.manager import batch_size, is_swap
from src.gateway import Gateway
from src.kinds import KINDS, weight_of_keys

TICK_SECONDS = 0.1  # between two checks of what is due; the shortest usual TTL is 2 s
DUE_RATIO = 0.2  # an entry is due when this share of its TTL is left
GROUP_RATIO = 0.4  # at this share an entry is refreshed together with another that is due
MAX_BUDGET_RATIO = 0.5  # no refresh when more of an exchange's budget is used
MAX_LOADS_RATIO = 0.1  # of MAX_CONCURRENT, for refreshes under way at once


def _call_of(key: Key) -> Key:
    """Return the name of the call that refreshes a key: tickers of one market type share a call."""
    if key.kind != "ticker":
        return key
    return key._replace(symbol="swap" if is_swap(key.symbol) else "spot")


class RefreshAhead:
    """Refreshes the hot entries of the gateway's memory."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._hot = gateway.cache.memory.hot
        max_loads = gateway.settings.max_concurrent
        # One load is always left to requests.
        self._max_tasks = min(max(1, int(max_loads * MAX_LOADS_RATIO)), max_loads - 1)
        self._pending = Counter[str]()  # exchange -> request weight of the refreshes under way
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Refresh due entries until the task is cancelled."""
        try:
            await repeat("refresh_ahead", self.refresh_due, TICK_SECONDS)
        finally:
            for task in self._tasks:
                task.cancel()

    async def refresh_due(self) -> None:
        """Start to refresh the entries that are due.

        A key is no longer hot after its refresh has started, unless its next entry is hot as well.
        """
        for keys in self._due_groups():
            size = batch_size(keys[0].exchange)
            for start in range(0, len(keys), size):
                if len(self._tasks) >= self._max_tasks:
                    return
                self._start(keys[start : start + size])

    def _due_groups(self) -> list[list[Key]]:
        """Return the keys of each call with an entry that is due, the oldest call first."""
        now = self._gateway.clock.monotonic()
        groups = defaultdict[Key, list[Key]](list)
        least_left = dict[Key, float]()
        for key, entry in self._hot.items():
            if key.kind not in KINDS:
                continue
            left = 1 - entry.age(now) / self._lifetime(entry)
            # Before the close of a candle, a refresh would bring nothing new.
            if left <= (0 if entry.closed_until else GROUP_RATIO):
                group = _call_of(key)
                groups[group].append(key)
                least_left[group] = min(left, least_left.get(group, left))
        due = [group for group, left in least_left.items() if left <= DUE_RATIO]
        return [sorted(groups[group]) for group in sorted(due, key=least_left.__getitem__)]

    def _lifetime(self, entry: Entry) -> float:
        """Return the seconds for which memory, or else Redis, answers for the entry."""
        if self._gateway.store.up:
            return entry.ttl
        return min(entry.ttl, self._gateway.settings.cache_memory_ttl)

    def _start(self, keys: list[Key]) -> None:
        entries = [self._hot.pop(key) for key in keys]
        max_age = min(self._lifetime(entry) for entry in entries) * (1 - GROUP_RATIO)
        task = asyncio.create_task(self._refresh(keys, max_age))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _refresh(self, keys: list[Key], max_age: float) -> None:
        exchange = keys[0].exchange
        weight = weight_of_keys(keys)
        refreshed = 0
        try:
            if not await self._can_spend(exchange, keys[0].symbol, weight):
                metrics.cache_refreshes_total.labels("skipped").inc(len(keys))
                return
            self._pending[exchange] += weight
            try:
                refreshed = await self._gateway.refresh(keys, max_age)
            finally:
                self._pending[exchange] -= weight
        except Exception as error:  # noqa: BLE001 - reported
            report_error("refresh_ahead", error)
        metrics.cache_refreshes_total.labels("success").inc(refreshed)
        metrics.cache_refreshes_total.labels("error").inc(len(keys) - refreshed)

    async def _can_spend(self, exchange: str, symbol: str, weight: int) -> bool:
        """Return True if the exchange accepts a call and half of the shared budget is left."""
        manager = self._gateway.manager
        pool = manager.pool_of(exchange, symbol)
        await manager.limiter.refresh(pool)
        pending = self._pending[exchange] / manager.limiter.budgets[pool][0]
        used = manager.limiter.used_ratio(pool) + pending
        return used <= MAX_BUDGET_RATIO and manager.is_available(exchange, weight, symbol=symbol)
