"""The watched topics: where each is watched, and the publication of their values."""

import asyncio
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from typing import Any

import orjson

from src.cache.entry import Freshness, encode
from src.core import metrics
from src.core.background import repeat
from src.core.clock import Clock
from src.core.errors import BadUpstreamData, GatewayError, MarketHalted
from src.core.models import MarketData, Trade, Trades
from src.exchanges.ccxt_sockets import is_late
from src.exchanges.http_client import open_socket_session
from src.exchanges.profiles import PROFILES
from src.gateway import Gateway
from src.kinds import is_available
from src.streams.bus import Bus
from src.streams.candles import CandleKeeper
from src.streams.dialer import Dialer
from src.streams.exchange_socket import CHECK_SECONDS, GRACE_SECONDS, ExchangeSocket
from src.streams.feed import ClientConnection, Feed, encode_levels
from src.streams.liveness import Liveness
from src.streams.topics import MarketDataEvent, SocketKey, Topic

SPREAD_SECONDS = 1.0  # between two writes of a value to Redis, for replicas that do not listen

SEEN_TRADES = 1000  # ids of each topic; exchanges repeat up to 50 trades after a reconnect


class TopicState:
    """A watched topic: its feeds, its newest event, and whether it is live."""

    def __init__(self, topic: Topic, clock: Clock) -> None:
        now = clock.monotonic()
        self.topic = topic
        self.feeds: dict[int, Feed] = {}  # by number of levels
        self.waiting_subscribers = 0  # subscribers that wait for the first value
        # Starts with the time, so that no number repeats after a restart or on another replica.
        self.sequence = int(clock.time() * 1000)
        self.held = False  # this replica has the lease
        self.live: bool | None = None  # None until the first decision
        self.used_at = now  # last time at which the topic had subscribers or was hot
        self.spread_at = 0.0  # last time at which a value was written to Redis
        self.liveness = Liveness(now)
        self.event: MarketDataEvent | None = None
        self.has_gap = False  # the newest event did not reach every subscriber
        self._seen_trades: dict[str, None] = {}  # ids, oldest first

    @property
    def is_wanted(self) -> bool:
        """Return True if the topic has subscribers."""
        return self.waiting_subscribers > 0 or any(feed.subscribers for feed in self.feeds.values())

    @property
    def has_current_value(self) -> bool:
        """Return True if new subscribers need no value from REST."""
        return self.event is not None and (self.live is True or self.topic.channel.is_incremental)

    def is_late(self, exchange_time: int | None) -> bool:
        """Return True if a value is older than the newest one by the exchange's time."""
        newest = None if self.event is None else self.event.exchange_time
        return is_late(exchange_time, newest)

    def find_new_trades(self, trades: Iterable[Trade]) -> list[Trade]:
        """Return the trades that were not received before, and remember their ids."""
        new = [trade for trade in trades if trade.id not in self._seen_trades]
        self.remember_trades(trade.id for trade in new)
        return new

    def remember_trades(self, ids: Iterable[str | None]) -> None:
        """Remember the ids of received trades, the newest `SEEN_TRADES`."""
        self._seen_trades |= {identity: None for identity in ids if identity is not None}
        excess = len(self._seen_trades) - SEEN_TRADES
        for identity in list(islice(self._seen_trades, max(0, excess))):
            del self._seen_trades[identity]

    def subscribers(self) -> set[ClientConnection]:
        """Return the subscribers of all feeds."""
        return {subscriber for feed in self.feeds.values() for subscriber in feed.subscribers}

    def feed(self, levels: int) -> Feed:
        """Return the feed with this number of levels, created on first use."""
        if levels not in self.feeds:
            feed = Feed(self.topic, levels)
            if self.event is not None:
                feed.publish(self.event, encode_levels(self.event, [levels])[levels], "snapshot")
            self.feeds[levels] = feed
        return self.feeds[levels]

    def send_status(
        self, subscriber: ClientConnection, now: float, error: GatewayError | None = None
    ) -> None:
        """Send `stale`. Send `live` only to subscribers that received `stale`.

        `error` is the reason why there is no first value.
        """
        if self.live is None or (self.live and self.topic not in subscriber.stale_topics):
            return
        message: dict[str, Any] = {"type": "status"} | self.topic.fields()
        message["state"] = "live" if self.live else "stale"
        message["age_ms"] = None if self.event is None else int((now - self.event.born) * 1000)
        if self.live:
            subscriber.stale_topics.discard(self.topic)
        else:
            subscriber.stale_topics.add(self.topic)
            message |= {} if error is None else {"code": error.code}
        subscriber.send_message(message)


class TopicRegistry:
    """Watches topics on an exchange socket of this replica, or through another replica.

    Numbers new values, and passes them on to the cache, to other replicas and to subscribers.
    """

    def __init__(self, gateway: Gateway, spawn: Callable[..., None]) -> None:
        self.topics: dict[Topic, TopicState] = {}
        self.sockets: dict[SocketKey, ExchangeSocket] = {}
        self.bus = Bus(gateway.store, self._set_held, self._is_reachable, self.receive_event)
        self.candles = CandleKeeper(gateway)
        self.gateway = gateway
        self.spawn = spawn
        self._clock = gateway.clock
        self._session = open_socket_session()
        self._dialers = {
            name: Dialer(PROFILES[name], self._clock) for name in gateway.manager.names
        }

    async def close(self) -> None:
        """Close all sockets and release all leases."""
        await asyncio.gather(*(socket.close() for socket in self.sockets.values()))
        await self.bus.close()
        await self._session.close()

    def watch(self, topic: Topic) -> TopicState:
        """Return the state of a topic, and start watching the topic if it is new."""
        state = self.topics.get(topic)
        if state is None:
            state = TopicState(topic, self._clock)
            self.topics[topic] = state
            self.bus.add(topic)
        state.used_at = self._clock.monotonic()
        return state

    def unwatch(self, state: TopicState) -> None:
        """Stop watching a topic."""
        self.bus.remove(state.topic)
        del self.topics[state.topic]

    def make_room(self, topics: Sequence[Topic]) -> bool:
        """Return True if STREAM_MAX_TOPICS allows these different topics, too.

        Topics without subscribers are removed if needed, the longest unused first.
        """
        others = [state for topic, state in self.topics.items() if topic not in topics]
        excess = len(others) + len(topics) - self.gateway.settings.stream_max_topics
        unused = [state for state in others if not state.is_wanted]
        if excess > len(unused):
            return False
        for state in sorted(unused, key=lambda state: state.used_at)[: max(0, excess)]:
            self.unwatch(state)
        return True

    def is_usable(self, topic: Topic) -> bool:
        """Return True if a topic is live, or if its exchange is available and connected."""
        if (state := self.topics.get(topic)) is not None and state.live is not None:
            return state.live
        socket = self.sockets.get(SocketKey.of(topic))
        is_connected = socket is None or socket.outage_cause is None
        return is_connected and is_available(self.gateway.manager, topic.key)

    def is_lost(self, state: TopicState, now: float) -> bool:
        """Return True if this replica's socket for the topic is lost.

        A loss before the topic was watched does not count until `GRACE_SECONDS` later.
        """
        socket = self.sockets.get(SocketKey.of(state.topic)) if state.held else None
        is_new = now - state.liveness.created_at <= GRACE_SECONDS
        return socket is not None and socket.is_lost() and not is_new

    def _is_reachable(self, topic: Topic) -> bool:
        """Return False if a socket for the topic was tried and cannot connect."""
        socket = self.sockets.get(SocketKey.of(topic))
        return socket is None or not socket.is_unreachable()

    def _set_held(self, topic: Topic, held: bool) -> None:
        state = self.topics[topic]
        state.held = held
        if not held:
            self._socket(topic).unwatch(topic.symbol)
            return
        if state.liveness.last_message_at is not None:
            state.sequence += 1  # taken over: events between the two holders may be missing
        self._socket(topic).watch(topic.symbol, state.liveness)

    def _socket(self, topic: Topic) -> ExchangeSocket:
        """Return the socket of a topic, created on first use."""
        key = SocketKey.of(topic)
        if key not in self.sockets:
            dialer = self._dialers[key.exchange]
            socket = ExchangeSocket(key, self.gateway, self._session, dialer, self.receive_message)
            self.sockets[key] = socket
            self.spawn(repeat, "streams", socket.check, CHECK_SECONDS)
        return self.sockets[key]

    # Values.

    def receive_message(self, topic: Topic, raw: Any, steady: bool) -> bool:
        """Publish a message of an exchange. Return True if the message is valid."""
        state = self.topics[topic]
        channel = topic.channel
        metrics.stream_messages_received_total.labels(topic.exchange, channel.name).inc()
        received_at = int(self._clock.time() * 1000)
        try:
            data = channel.parse(raw, topic.exchange, topic.symbol, received_at)
        except (BadUpstreamData, MarketHalted):
            metrics.stream_dropped_total.labels("implausible").inc()
            return False
        if not self._is_new(state, data):
            return True
        if data.timestamp:
            lag = metrics.receipt_lag_seconds
            metrics.observe_lag(lag, topic.exchange, data.timestamp, received_at / 1000)
        data.source = "stream"
        if channel.is_incremental and state.liveness.is_resubscribed:
            state.sequence += 1  # data before the new subscription is missing
        state.liveness.is_resubscribed = False
        sequence = state.sequence + 1
        body = encode(data)
        now = self._clock.monotonic()
        wire = raw.get("wire", ()) if channel.has_timeframe else ()
        times = (data.timestamp, data.fetched_at)
        event = MarketDataEvent(topic, sequence, *times, body, steady, wire, now)
        self.bus.publish(event)
        self._publish(state, event, is_pushed=True)
        return True

    @staticmethod
    def _is_new(state: TopicState, data: MarketData) -> bool:
        """Return False for late values. Remove repeated trades; False if no trade is new."""
        if isinstance(data, Trades):
            new = state.find_new_trades(data.trades)
            repeated = len(data.trades) - len(new)
            metrics.trades_dropped_total.labels(data.exchange, "duplicate").inc(repeated)
            data.trades = new
            return bool(new)
        if state.is_late(data.timestamp):
            metrics.stream_dropped_total.labels("late").inc()
            return False
        return True

    def receive_event(self, event: MarketDataEvent) -> None:
        """Publish an event of another replica."""
        state = self.topics[event.topic]
        now = self._clock.monotonic()
        born = now - max(0.0, self._clock.time() - event.receive_time / 1000)
        newest_time = 0 if state.event is None else state.event.receive_time
        if event.topic.channel.is_incremental:
            state.remember_trades(row["id"] for row in orjson.loads(event.data)["trades"])
        # The event may be delayed, and older than a value from REST.
        if event.receive_time >= newest_time or event.topic.channel.is_incremental:
            self._publish(state, event._replace(born=born), is_pushed=True)
        if event.steady:
            state.liveness.record_message(now)

    def receive_rest(self, state: TopicState, body: bytes, born: float) -> None:
        """Publish a value from REST if it is newer than the newest event."""
        document = orjson.loads(body)
        fetched_at = document["fetched_at"]
        newest = state.event
        timestamp = document.get("timestamp")
        if state.topic.channel.is_incremental:
            state.remember_trades(row["id"] for row in document["trades"])
        if newest is not None and (newest.receive_time == fetched_at or born <= newest.born):
            return
        if state.is_late(timestamp):
            return
        sequence = state.sequence + 1
        times = (timestamp, fetched_at)
        event = MarketDataEvent(state.topic, sequence, *times, body, False, born=born)
        self._publish(state, event, is_pushed=False)

    def _publish(self, state: TopicState, event: MarketDataEvent, *, is_pushed: bool) -> None:
        """Push an event to all subscribers, and cache it for REST if an exchange pushed it.

        After an error, the next event is a snapshot.
        """
        # Before any change, because invalid data raises an error.
        bodies = encode_levels(event, state.feeds)
        is_next = state.event is not None and event.sequence == state.event.sequence + 1
        message_type = "update" if is_next and not state.has_gap else "snapshot"
        state.sequence = event.sequence
        state.event = event
        state.has_gap = True
        if is_pushed and not state.topic.channel.is_incremental:
            self._cache(state, event)
        if is_pushed and event.exchange_time and state.feeds:
            lag, exchange = metrics.delivery_lag_seconds, state.topic.exchange
            metrics.observe_lag(lag, exchange, event.exchange_time, self._clock.time())
        is_complete = True
        for count, feed in list(state.feeds.items()):
            age = self._clock.time() - event.receive_time / 1000
            metrics.stream_event_age_seconds.observe(max(0.0, age))
            is_complete &= feed.publish(event, bodies[count], message_type)
        state.has_gap = not is_complete

    def _cache(self, state: TopicState, event: MarketDataEvent) -> None:
        spread = state.held and event.born - state.spread_at >= SPREAD_SECONDS
        if spread:
            state.spread_at = event.born
        if state.topic.channel.has_timeframe:
            self.candles.merge(event, share=spread)
            return
        freshness = Freshness(state.liveness.fresh_seconds)
        self.gateway.add_pushed(state.topic.key, event.data, event.born, freshness, share=spread)
