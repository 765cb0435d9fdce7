"""Client connections and their subscriptions to topics.

A topic is watched from its first subscriber until STREAM_IDLE_SECONDS after the last one. Hot
tickers are watched without a subscriber. Each value is encoded once for all subscribers.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Any

import orjson

from src.core import metrics
from src.core.background import repeat, report_error
from src.core.errors import (
    GatewayError,
    TooManyConnections,
    TooManyStreams,
    TooManySubscriptions,
    UnknownExchange,
)
from src.gateway import ALL, Gateway
from src.streams.bus import LISTEN_SECONDS
from src.streams.exchange_socket import ExchangeSocket
from src.streams.feed import ClientConnection, Feed, for_each, utc_ms
from src.streams.monitor import TopicMonitor
from src.streams.registry import TopicRegistry, TopicState
from src.streams.topics import CHANNELS, Subscription, Topic

TICK_SECONDS = 0.5  # between two checks for stale, unused and hot topics
PENDING_SECONDS = 0.05  # between two attempts to send pending values to slow clients
HEARTBEAT_SECONDS = 15.0


class StreamHub:
    """Connects clients with topics. Methods that take a subscription raise only `GatewayError`."""

    def __init__(self, gateway: Gateway) -> None:
        self.settings = gateway.settings
        self.clock = gateway.clock
        self.connections: set[ClientConnection] = set()
        self.slow_connections: set[ClientConnection] = set()  # connections with pending values
        self._gateway = gateway
        self._tasks = asyncio.TaskGroup()
        self._registry = TopicRegistry(gateway, self._spawn)
        self._monitor = TopicMonitor(self._registry, self._move)
        self.topics = self._registry.topics
        self.sockets = self._registry.sockets

    async def run(self) -> None:
        """Watch topics and serve connections until cancelled."""
        bus = self._registry.bus
        try:
            async with self._tasks:
                self._spawn(repeat, "streams", bus.keep_leases)
                self._spawn(repeat, "streams", bus.send)
                self._spawn(repeat, "streams", bus.listen, LISTEN_SECONDS)
                self._spawn(repeat, "streams", self._monitor.check, TICK_SECONDS)
                self._spawn(repeat, "streams", self._send_pending, PENDING_SECONDS)
                self._spawn(repeat, "streams", self.send_heartbeats, HEARTBEAT_SECONDS)
        finally:
            await self._registry.close()

    def _spawn(self, work: Callable[..., Awaitable[None]], *arguments: Any) -> None:
        """Start a background task."""
        self._tasks.create_task(_report_errors(work, *arguments))

    def sockets_of(self, exchange: str) -> list[ExchangeSocket]:
        """Return the sockets to an exchange."""
        return [self.sockets[key] for key in self.sockets if key.exchange == exchange]

    def announce_shutdown(self) -> None:
        """Close all client connections because the gateway stops."""
        for_each(self.connections, lambda connection: connection.close_for_shutdown())

    # Connections.

    def connect(self, connection: ClientConnection) -> None:
        """Add a client connection.

        Raises `TooManyConnections` if its client has STREAM_MAX_PER_CLIENT connections, so that one
        address cannot take every connection. Raises `TooManyStreams` if no connection is free.
        """
        limit = self.settings.stream_max_per_client
        if sum(other.client == connection.client for other in self.connections) >= limit:
            metrics.stream_refused_total.labels("max_per_client").inc()
            raise TooManyConnections(
                f"this client has {limit} connections to /ws and /stream, the limit set by"
                " STREAM_MAX_PER_CLIENT; close one, or subscribe on an open one"
            )
        count = len(self.connections)
        if count >= self.settings.stream_max_clients:
            metrics.stream_refused_total.labels("max_clients").inc()
            raise TooManyStreams(
                f"{count} clients are connected (STREAM_MAX_CLIENTS); try again later"
            )
        self.connections.add(connection)

    def disconnect(self, connection: ClientConnection) -> None:
        """Remove a client connection and its subscriptions."""
        for subscription in list(connection.subscriptions):
            self.unsubscribe(connection, subscription)
        self.connections.discard(connection)
        self.slow_connections.discard(connection)

    # Subscriptions.

    def resolve(self, wanted: Subscription) -> Subscription:
        """Return a client's subscription with canonical names. Raises the same errors as REST."""
        markets = self._gateway.markets
        channel = CHANNELS[wanted.channel]
        exchange = wanted.exchange.lower()
        if exchange not in ("", ALL):
            exchange = markets.check_exchange(exchange)
        levels = wanted.levels if channel.has_levels else 0
        timeframe = wanted.timeframe if channel.has_timeframe else ""
        symbol = markets.canonical(wanted.symbol)
        return Subscription(channel.name, symbol, exchange, levels, timeframe)

    async def look_for_new_markets(self, symbols: Sequence[str], exchange: str) -> None:
        """Refresh market lists that miss a symbol, before the symbol is resolved."""
        with suppress(UnknownExchange):  # `resolve` raises it for each symbol
            await self._gateway.look_for_new_markets(symbols, exchange.lower())

    def find_topics(self, subscription: Subscription) -> list[Topic]:
        """Return the topics of a subscription. Raises the same errors as REST."""
        exchange = None if subscription.exchange in ("", ALL) else subscription.exchange
        channel = CHANNELS[subscription.channel]
        timeframe = subscription.timeframe
        params = channel.params(timeframe)
        keys = self._gateway.find_keys(channel.kind, subscription.symbol, exchange, params)
        topics = [Topic(key.exchange, channel.kind, key.symbol, timeframe) for key in keys]
        if subscription.exchange == "":
            usable = (topic for topic in topics if self._monitor.can_use(topic, keys))
            return [next(usable, topics[0])]
        return topics

    def check_count(self, count: int) -> None:
        """Raise `TooManySubscriptions` if one connection may not have `count` topics."""
        limit = self.settings.stream_max_subscriptions
        if count > limit:
            raise TooManySubscriptions(
                f"{count} streams are too many for one connection, {limit} are allowed"
                " (STREAM_MAX_SUBSCRIPTIONS); subscribe to fewer, `all` counts each exchange"
            )

    def subscribe(
        self, connection: ClientConnection, subscription: Subscription, topics: Sequence[Topic]
    ) -> None:
        """Subscribe a connection to topics.

        Each topic starts with a snapshot, unless its newest event is `connection.last_seen`.
        Raises `TooManyStreams` if STREAM_MAX_TOPICS is reached.
        """
        if not self._registry.make_room(topics):
            raise TooManyStreams(
                f"{len(self.topics)} streams are watched, the limit set by STREAM_MAX_TOPICS;"
                " subscribe to a watched one, or use /ticker",
                symbol=subscription.symbol,
            )
        feeds = connection.subscriptions.setdefault(subscription, {})
        for topic in topics:
            feeds[topic] = None
            state = self._registry.watch(topic)
            state.waiting_subscribers += 1
            self._spawn(self._start, connection, subscription, state)

    async def _start(
        self, connection: ClientConnection, subscription: Subscription, state: TopicState
    ) -> None:
        """Attach a connection to a feed as soon as the topic has a value or the load has failed."""
        try:
            error = None if state.has_current_value else await self._monitor.load(state)
        finally:
            state.waiting_subscribers -= 1
        feeds = connection.subscriptions.get(subscription, {})
        if state.topic not in feeds:  # unsubscribed in the meantime
            return
        feed = state.feed(subscription.levels)
        feed.subscribers[connection] = None
        feeds[state.topic] = feed
        if feed.event is not None and feed.event.sequence != connection.last_seen:
            connection.push(feed, "snapshot")
        connection.last_seen = None  # after a move, each stream starts with a snapshot
        if error is not None and state.live is None:
            state.live = False
        state.send_status(connection, self.clock.monotonic(), error)

    def unsubscribe(self, connection: ClientConnection, subscription: Subscription) -> bool:
        """End a subscription. Return False if there is no such subscription."""
        feeds = connection.subscriptions.pop(subscription, None)
        for feed in (feeds or {}).values():
            self._detach(connection, feed)
        subscribed = {other[:2] for other in connection.subscriptions}  # channels and symbols
        connection.stale_topics = {
            topic
            for topic in connection.stale_topics
            if (topic.channel.name, topic.symbol) in subscribed
        }
        return feeds is not None

    def _detach(self, connection: ClientConnection, feed: Feed | None) -> None:
        """Remove a connection from a feed, unless another of its subscriptions uses the feed."""
        all_feeds = connection.subscriptions.values()
        if feed is None or any(feed in feeds.values() for feeds in all_feeds):
            return
        feed.subscribers.pop(connection, None)
        state = self.topics[feed.topic]
        state.used_at = self.clock.monotonic()
        if not feed.subscribers:
            state.feeds.pop(feed.levels, None)

    def _move(self, state: TopicState) -> None:
        """Move subscriptions without an exchange from a stale topic to a usable one."""
        for feed in list(state.feeds.values()):
            names = (feed.channel, state.topic.symbol, "", feed.levels, state.topic.timeframe)
            subscription = Subscription(*names)
            with suppress(GatewayError):
                topics = self.find_topics(subscription)
                if self._registry.is_usable(topics[0]):
                    self._move_feed(subscription, feed, topics)

    def _move_feed(self, subscription: Subscription, feed: Feed, topics: Sequence[Topic]) -> None:
        for connection in list(feed.subscribers):
            feeds = connection.subscriptions.get(subscription, {})
            if feeds.get(feed.topic) is feed:
                self.subscribe(connection, subscription, topics)
                del feeds[feed.topic]
                self._detach(connection, feed)

    # Periodic work.

    async def _send_pending(self) -> None:
        for_each(self.slow_connections, lambda connection: connection.send_pending())

    async def send_heartbeats(self) -> None:
        """Send a heartbeat to every connection."""
        message = orjson.dumps({"type": "heartbeat", "sent_at": utc_ms()})
        for_each(self.connections, lambda connection: connection.send_heartbeat(message))


async def _report_errors(work: Callable[..., Awaitable[None]], *arguments: Any) -> None:
    """Run a background task. An unexpected error is reported and does not end other tasks."""
    try:
        await work(*arguments)
    except Exception as error:  # noqa: BLE001 - reported
        report_error("streams", error)
