"""Refreshes what is asked for often shortly before it expires, so that nobody waits for it.

It takes no more than it saves: an entry is refreshed only if it was asked for again, tickers of one exchange are
refreshed together, and the second half of a budget is left to what callers wait for.
"""

import asyncio
from collections import defaultdict
from typing import NamedTuple

from src import metrics
from src.entry import Key
from src.exchanges import batch_size, is_swap, weight_of
from src.gateway import Gateway

TICK_SECONDS = 0.1  # how often it is looked whether anything is due; the shortest usual TTL is 2 s
LEAD_RATIO = 0.2  # of its TTL: what is left of an entry that is due
TOGETHER_RATIO = 0.4  # what is left of one that goes along when another of its exchange is due
BUDGET_RATIO = 0.5  # of an exchange's budget; above it nothing is refreshed ahead
MAX_REFRESHES = 10  # under way at once, a tenth of the loads that are allowed; what is due waits for its turn


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
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Look for what is due, for ever."""
        try:
            while True:
                await asyncio.sleep(TICK_SECONDS)
                self.look()
        finally:
            for task in self._tasks:
                task.cancel()

    def look(self) -> None:
        """Begin to refresh what is due now. A key that was tried is hot no more, unless its next entry makes it so."""
        for keys in self._due():
            size = batch_size(keys[0].exchange)
            for start in range(0, len(keys), size):
                if len(self._tasks) >= MAX_REFRESHES:
                    return
                self._begin(keys[start : start + size])

    def _due(self) -> list[list[Key]]:
        """Group the hot keys by the calls that would refresh them, where at least one of the group is due."""
        now, groups, due = self._gateway.clock.monotonic(), defaultdict[_Group, list[Key]](list), set[_Group]()
        for key, entry in self._hot.items():
            left = 1 - entry.age(now) / entry.ttl
            if left <= TOGETHER_RATIO:
                together = is_swap(key.symbol) if key.kind == "ticker" else f"{key.symbol}|{key.variant}"
                group = _Group(key.exchange, key.kind, together)
                groups[group].append(key)
                if left <= LEAD_RATIO:
                    due.add(group)
        return [sorted(groups[group]) for group in due]

    def _begin(self, keys: list[Key]) -> None:
        entries = [self._hot.pop(key) for key in keys]
        first, manager = keys[0], self._gateway.manager
        kind = "tickers" if len(keys) > 1 else first.kind
        levels = int(first.variant) if kind == "orderbook" else len(keys)
        cost = weight_of(first.exchange, kind, levels, first.symbol)
        if manager.limiter.used_ratio(first.exchange) > BUDGET_RATIO or not manager.is_available(first.exchange, cost):
            metrics.cache_refreshes_total.labels("skipped").inc(len(keys))
            return
        newest = min(entry.ttl for entry in entries) * (1 - TOGETHER_RATIO)
        task = asyncio.create_task(self._refresh(keys, newest))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _refresh(self, keys: list[Key], max_age: float) -> None:
        outcome = "success" if await self._gateway.refresh(keys, max_age) else "error"
        metrics.cache_refreshes_total.labels(outcome).inc(len(keys))
