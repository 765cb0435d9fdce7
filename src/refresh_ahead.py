"""Refreshes what is asked for often shortly before it expires, so that nobody waits for it.

It takes no more than it saves: an entry is refreshed only if it was asked for again, tickers of one exchange are
refreshed together, and the second half of a budget is left to what callers wait for.
"""

import asyncio
from collections import Counter, defaultdict
from typing import NamedTuple

from src.cache.entry import Entry, Key
from src.core import metrics
from src.core.background import repeat, report_error
from src.exchanges.manager import batch_size, is_swap, weight_of
from src.gateway import Gateway

TICK_SECONDS = 0.1  # how often it is looked whether anything is due; the shortest usual TTL is 2 s
LEAD_RATIO = 0.2  # of its TTL: what is left of an entry that is due
TOGETHER_RATIO = 0.4  # what is left of one that goes along when another of its exchange is due
BUDGET_RATIO = 0.5  # of an exchange's budget; above it nothing is refreshed ahead
LOADS_RATIO = 0.1  # of MAX_CONCURRENT: what may be under way at once; what is due waits for its turn


class _Group(NamedTuple):
    """What one call can bring: one key, or tickers of an exchange and type of market."""

    exchange: str
    kind: str
    what: str | bool


class RefreshAhead:
    """Watches the hot entries of the gateway's memory."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._hot = gateway.cache.memory.hot
        most = gateway.settings.max_concurrent
        self._most = min(max(1, int(most * LOADS_RATIO)), most - 1)  # one load is always left to callers
        self._pending = Counter[str]()  # exchange -> weight of the refreshes under way
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Look for what is due, for ever."""
        try:
            await repeat("refresh_ahead", self.look, TICK_SECONDS)
        finally:
            for task in self._tasks:
                task.cancel()

    async def look(self) -> None:
        """Begin to refresh what is due now. A key that was tried is hot no more, unless its next entry makes it so."""
        for keys in self._due():
            size = batch_size(keys[0].exchange)
            for start in range(0, len(keys), size):
                if len(self._tasks) >= self._most:
                    return
                self._begin(keys[start : start + size])

    def _due(self) -> list[list[Key]]:
        """Group the hot keys by the calls that would refresh them, where one of the group is due; the oldest first."""
        now, groups, least = (
            self._gateway.clock.monotonic(),
            defaultdict[_Group, list[Key]](list),
            dict[_Group, float](),
        )
        for key, entry in self._hot.items():
            left = 1 - entry.age(now) / self._life(entry)
            if left <= TOGETHER_RATIO:
                together = is_swap(key.symbol) if key.kind == "ticker" else f"{key.symbol}|{key.variant}"
                group = _Group(key.exchange, key.kind, together)
                groups[group].append(key)
                least[group] = min(left, least.get(group, left))
        due = sorted((left, group) for group, left in least.items() if left <= LEAD_RATIO)
        return [sorted(groups[group]) for _, group in due]

    def _life(self, entry: Entry) -> float:
        """Return the seconds for which nobody has to wait for an entry: past memory's own limit Redis may have it."""
        gateway = self._gateway
        return entry.ttl if gateway.store.up else min(entry.ttl, gateway.settings.cache_memory_ttl)

    def _begin(self, keys: list[Key]) -> None:
        entries = [self._hot.pop(key) for key in keys]
        first = keys[0]
        kind = "tickers" if len(keys) > 1 else first.kind
        levels = int(first.variant) if kind == "orderbook" else len(keys)
        cost = weight_of(first.exchange, kind, levels, first.symbol)
        newest = min(self._life(entry) for entry in entries) * (1 - TOGETHER_RATIO)
        task = asyncio.create_task(self._refresh(keys, newest, cost))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _refresh(self, keys: list[Key], max_age: float, cost: int) -> None:
        exchange, refreshed = keys[0].exchange, 0
        try:
            if not await self._may_spend(exchange, cost):
                metrics.cache_refreshes_total.labels("skipped").inc(len(keys))
                return
            self._pending[exchange] += cost
            try:
                refreshed = await self._gateway.refresh(keys, max_age)
            finally:
                self._pending[exchange] -= cost
        except Exception as error:  # noqa: BLE001 - reported
            report_error("refresh_ahead", error)
        metrics.cache_refreshes_total.labels("success").inc(refreshed)
        metrics.cache_refreshes_total.labels("error").inc(len(keys) - refreshed)

    async def _may_spend(self, exchange: str, cost: int) -> bool:
        """Whether the exchange would take a call, and callers keep their half of its budget, other replicas' too."""
        manager = self._gateway.manager
        await manager.limiter.look(exchange)
        pending = self._pending[exchange] / self._gateway.settings.exchange(exchange).budget[0]
        used = manager.limiter.used_ratio(exchange) + pending
        return used <= BUDGET_RATIO and manager.is_available(exchange, cost)
