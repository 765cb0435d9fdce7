"""Decides which topics are watched, stale or live, and fetches values that are not pushed by REST.

Tickers that REST clients request often are hot: they are watched without a subscriber. REST has the
first value of a topic, and replaces pushed values while a topic is stale.
"""

import asyncio
import logging
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import suppress

from src.cache.entry import Key, Served
from src.core.errors import GatewayError
from src.exchanges.manager import batch_size
from src.kinds import view, weight_of_keys
from src.streams.registry import TopicRegistry, TopicState
from src.streams.topics import SocketKey, Topic

log = logging.getLogger(__name__)

HOT_REQUESTS = 100  # requests within `HOT_SECONDS` that make a ticker hot
HOT_SECONDS = 60.0
POLL_SECONDS = 2.0  # between two REST requests for a stale topic
POLL_BUDGET_RATIO = 0.5  # stale topics are not polled above this share of the exchange's budget

Answers = dict[tuple[str, str], Served | GatewayError]


class TopicMonitor:
    """Checks all topics. `move(state)` moves subscribers of a stale topic to another exchange."""

    def __init__(self, registry: TopicRegistry, move: Callable[[TopicState], None]) -> None:
        self._gateway = registry.gateway
        self._registry = registry
        self._move = move
        self._polled_at = 0.0
        self._polling: set[SocketKey] = set()
        self._repairing: set[Key] = set()
        self._bulk_symbols: dict[SocketKey, list[str]] = defaultdict(list)  # of the next bulk load
        self._bulk_loads: dict[SocketKey, asyncio.Task[Answers]] = {}  # newest of each socket
        self._request_counts: dict[Key, int] = {}  # total requests of tickers at `_counted_at`
        self._counted_at = 0.0

    async def check(self) -> None:
        """Update the state of every topic, and poll stale topics every `POLL_SECONDS`."""
        now = self._gateway.clock.monotonic()
        self._watch_hot_tickers(now)
        self._watch_requested_candles()
        stale: dict[SocketKey, list[TopicState]] = defaultdict(list)
        for state in list(self._registry.topics.values()):
            if state.is_wanted:
                state.used_at = now
            elif now - state.used_at > self._gateway.settings.stream_idle_seconds:
                self._registry.unwatch(state)
                continue
            self._update(state, now)
            if state.live is False and state.feeds:
                stale[SocketKey.of(state.topic)].append(state)
        if now - self._polled_at >= POLL_SECONDS:
            self._polled_at = now
            for key, states in stale.items():
                self._registry.spawn(self._poll, key, states)

    # Hot tickers.

    def _watch_hot_tickers(self, now: float) -> None:
        """Watch tickers with `HOT_REQUESTS` requests since the start of the period.

        A ticker is counted while it has an entry in memory. A pushed ticker may be missing from
        `hot`, because each value replaces the entry.
        """
        memory = self._gateway.cache.memory
        is_over = now - self._counted_at >= HOT_SECONDS
        if is_over:
            self._counted_at = now
        for key in {*memory.hot, *self._request_counts}:
            count = memory.request_count(key)
            start = self._request_counts.pop(key, count)
            if key.kind != "ticker" or count is None or start is None:
                continue
            is_hot = count - start >= HOT_REQUESTS
            self._request_counts[key] = count if is_hot or is_over else start
            topic = Topic(key.exchange, key.kind, key.symbol)
            if is_hot and self._registry.make_room([topic]):
                self._registry.watch(topic)

    def _watch_requested_candles(self) -> None:
        """Watch the series of candles that clients request, and fetch those with gaps."""
        candles = self._registry.candles
        for topic in candles.find_requested():
            if self._registry.make_room([topic]) and self._registry.watch(topic).live:
                candles.renew(topic)
        for key in candles.gaps - self._repairing:
            self._registry.spawn(self._repair, key)

    async def _repair(self, key: Key) -> None:
        if not self._has_budget([key]):
            return
        self._repairing.add(key)
        try:
            if await self._gateway.refresh([key], POLL_SECONDS):
                self._registry.candles.gaps.discard(key)
        finally:
            self._repairing.discard(key)

    # Choice of exchanges.

    def can_use(self, topic: Topic, keys: Sequence[Key]) -> bool:
        """Return True if a topic is usable and has the price of the keys before its own."""
        key = topic.key
        if not self._registry.is_usable(topic):
            return False
        prices = self._gateway.last_prices
        earlier = keys[: keys.index(key)]
        if not prices.is_known(key) and any(map(prices.is_known, earlier)):
            self._registry.spawn(self._fetch_price, key)
            return False
        return prices.compare(key, keys) is None

    async def _fetch_price(self, key: Key) -> None:
        """Fetch the price of a market, so that it can be compared. Then move stale topics to it."""
        with suppress(GatewayError):
            await self._gateway.serve("ticker", key.symbol, key.exchange)
            for topic, state in list(self._registry.topics.items()):
                if topic.symbol == key.symbol and state.live is False:
                    self._move(state)

    # Stale topics.

    def _update(self, state: TopicState, now: float) -> None:
        """Decide whether a topic is live, and send changes to its subscribers."""
        live = not (state.liveness.is_overdue(now) or self._registry.is_lost(state, now))
        # A stale topic becomes live only with a message: a longer timeout proves nothing.
        if live is state.live or (live and not state.liveness.has_new_message):
            return
        if state.live is not None or not live:
            text = "stream is live again" if live else "stream is stale"
            log.info(text, extra=state.topic.fields())
        state.live = live
        state.liveness.has_new_message = False
        for subscriber in state.subscribers():
            state.send_status(subscriber, now)
        if not live:
            self._move(state)

    async def _poll(self, key: SocketKey, states: list[TopicState]) -> None:
        """Move subscribers of stale topics of one socket, or fetch the topics by REST."""
        for state in states:
            self._move(state)
        if key in self._polling or states[0].topic.channel.is_incremental:
            return
        self._polling.add(key)
        try:
            await self._refresh(states)
        finally:
            self._polling.discard(key)

    def _has_budget(self, keys: Sequence[Key]) -> bool:
        """Return True if one call for these keys leaves half of the budget to clients."""
        manager = self._gateway.manager
        exchange, kind, symbol, _ = keys[0]
        weight = weight_of_keys(keys)
        pool = manager.pool_of(exchange, symbol)
        is_busy = manager.limiter.used_ratio(pool, weight) > POLL_BUDGET_RATIO
        return not is_busy and manager.is_available(exchange, weight, kind, symbol)

    async def _refresh(self, states: list[TopicState]) -> None:
        """Fetch topics of one socket, the oldest values first, as long as there is budget."""
        states = sorted(states, key=lambda state: state.event.born if state.event else 0.0)
        channel = states[0].topic.channel
        size = batch_size(states[0].topic.exchange) if channel.has_bulk_call else 1
        for first in range(0, len(states), size):
            group = states[first : first + size]
            keys = [state.topic.key for state in group]
            if not self._has_budget(keys):
                return
            await self._gateway.refresh(keys, POLL_SECONDS)
            for state in group:
                entry = self._gateway.cache.memory.find_fresh(state.topic.key)
                if entry is not None:
                    part = view(entry, state.topic.rest_params)
                    self._registry.receive_rest(state, part.body, entry.born)

    # First values.

    async def load(self, state: TopicState) -> GatewayError | None:
        """Fetch a topic's first value, from the cache if possible. Return the error if it fails."""
        exchange, kind, symbol, _ = state.topic
        is_fresh = self._gateway.cache.has_fresh(state.topic.key)
        try:
            if state.topic.channel.has_bulk_call and not is_fresh:
                served = await self._load_in_bulk(SocketKey.of(state.topic), symbol)
            else:
                served = await self._gateway.serve(
                    kind, symbol, exchange, params=state.topic.rest_params
                )
        except GatewayError as error:
            return error
        born = self._gateway.clock.monotonic() - served.age
        self._registry.receive_rest(state, served.body, born)
        return None

    async def _load_in_bulk(self, key: SocketKey, symbol: str) -> Served:
        """Fetch a ticker in one call with all tickers of the socket that are requested now."""
        if key not in self._bulk_symbols:
            self._bulk_loads[key] = asyncio.create_task(self._fetch_bulk(key))
        self._bulk_symbols[key].append(symbol)
        answer = (await self._bulk_loads[key])[symbol, ""]
        if isinstance(answer, GatewayError):
            raise answer
        return answer

    async def _fetch_bulk(self, key: SocketKey) -> Answers:
        # The task starts after all subscriptions of one client message have added their symbols.
        return await self._gateway.tickers(self._bulk_symbols.pop(key), key.exchange, None)
