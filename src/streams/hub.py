"""What is watched and who is told: events of exchanges and of other replicas, into the cache and on to subscribers.

A topic is watched from its first subscriber, or because it is asked for often, until some time after the last. What
comes of it is encoded once, whoever and however many are told.
"""

import asyncio
import logging
import time
from collections import defaultdict
from collections.abc import Coroutine, Sequence
from contextlib import AsyncExitStack, suppress
from typing import Any, NamedTuple, Self, TypeVar

import aiohttp
import orjson

from src.cache.entry import Key, encode
from src.core import metrics
from src.core.background import repeat, report_error
from src.core.clock import Clock
from src.core.errors import BadUpstreamData, GatewayError, NoPrice, TooManyConnections, TooManyStreams
from src.core.models import OrderBook, Ticker, Trades
from src.exchanges.http_client import open_socket_session
from src.exchanges.manager import is_swap, weight_of
from src.gateway import ALL, Gateway, Served
from src.streams.bus import LISTEN_SECONDS, Bus, MarketDataEvent, Topic
from src.streams.exchange_socket import GRACE_SECONDS, LOOK_SECONDS, ExchangeSocket, Liveness
from src.streams.feed import CHANNELS, LEVELS, NAMES, ClientConnection, Feed, Subscription, about, bodies, for_each

log = logging.getLogger(__name__)
T = TypeVar("T")

TICK_SECONDS = 0.5  # how often it is looked what is stale, idle or hot
POLL_SECONDS = 2.0  # how often what is stale is asked for by REST
POLL_BUDGET_RATIO = 0.5  # of an exchange's budget; above it what is stale stays so
SPREAD_SECONDS = 1.0  # how often a watched value is written to Redis, for replicas that do not listen
HOT_REQUESTS = 100  # a minute: a ticker asked for so often is watched without a subscriber
HOT_SECONDS = 60.0
SLOW_LOOK_SECONDS = 0.05  # how often it is looked whether slow clients can take more
HEARTBEAT_SECONDS = 15.0


class SocketKey(NamedTuple):
    """What one socket is for."""

    exchange: str
    kind: str
    swaps: bool

    @classmethod
    def of(cls, topic: Topic) -> Self:
        """Return where a topic is watched."""
        return cls(topic.exchange, topic.kind, is_swap(topic.symbol))


class TopicState:
    """A topic that is watched, and who is told."""

    def __init__(self, topic: Topic, clock: Clock) -> None:
        self.topic = topic
        self.feeds: dict[int, Feed] = {}
        self.coming = 0  # subscribers who wait for a first value
        # Of the newest event. It begins with the time, so that neither a restart nor another replica repeats a number.
        self.sequence = int(clock.time() * 1000)
        self.held = False
        self.live: bool | None = None  # as subscribers were told; None before the first word
        self.messages = 0  # that had come when they were told last
        self.used_at = self.born = clock.monotonic()  # when somebody wanted it, and when the newest event was true
        self.spread_at = 0.0
        self.watch = Liveness(self.used_at)
        self.times = 0  # how often it had been subscribed to when the newest event came
        self.event: MarketDataEvent | None = None
        self.has_gap = False  # the newest event did not reach every subscriber

    @property
    def is_wanted(self) -> bool:
        """Whether anybody is told of it, or about to be."""
        return self.coming > 0 or any(feed.subscribers for feed in self.feeds.values())


class StreamHub:
    """All that is watched. Its methods that name a want raise `GatewayError`, and nothing else."""

    def __init__(self, gateway: Gateway) -> None:
        self.settings, self.clock = gateway.settings, gateway.clock
        self.topics: dict[Topic, TopicState] = {}
        self.upstreams: dict[SocketKey, ExchangeSocket] = {}
        self.subscribers: set[ClientConnection] = set()
        self.slow: set[ClientConnection] = set()  # who could not take all that was offered
        self._gateway = gateway
        self._bus = Bus(gateway.store, self._hold, self._take, self._reaches)
        self._session: aiohttp.ClientSession
        self._tasks: set[asyncio.Task[Any]] = set()
        self._first: dict[SocketKey, tuple[list[str], asyncio.Task[dict[tuple[str, str], Served | GatewayError]]]] = {}
        self._polling: set[SocketKey] = set()
        self._polled_at = 0.0
        self._asked: dict[Key, tuple[float, int]] = {}  # since when, and how often it had been asked for by then

    async def run(self) -> None:
        """Watch, for ever."""
        async with AsyncExitStack() as stack:
            self._session = await stack.enter_async_context(open_socket_session())
            stack.push_async_callback(self._bus.close)
            stack.push_async_callback(self._close)
            self._spawn(repeat("streams", self._bus.keep_leases))
            self._spawn(repeat("streams", self._bus.listen, LISTEN_SECONDS))
            self._spawn(repeat("streams", self._tick, TICK_SECONDS))
            self._spawn(repeat("streams", self._look_after_the_slow, SLOW_LOOK_SECONDS))
            self._spawn(repeat("streams", self._beat, HEARTBEAT_SECONDS))
            await asyncio.Event().wait()

    async def _close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.gather(*(upstream.close() for upstream in self.upstreams.values()))

    def of(self, exchange: str) -> list[ExchangeSocket]:
        """Return what watches an exchange."""
        return [upstream for place, upstream in self.upstreams.items() if place.exchange == exchange]

    def _upstream(self, topic: Topic) -> ExchangeSocket:
        """Return what watches a topic, made when it is first needed."""
        place = SocketKey.of(topic)
        if place not in self.upstreams:
            upstream = self.upstreams[place] = ExchangeSocket(
                place.exchange, place.kind, self._gateway.manager, self._session, self.settings, self.clock, self._hear
            )
            self._spawn(repeat("streams", upstream.look, LOOK_SECONDS))
        return self.upstreams[place]

    def goodbye(self) -> None:
        """Tell everybody that the gateway stops."""
        for_each(self.subscribers, lambda subscriber: subscriber.goodbye())

    # Who wants what.

    def want(self, channel: str, symbol: str, exchange: str, levels: int) -> Subscription:
        """Return the canonical form of what is wanted; raises what REST would."""
        markets = self._gateway.markets
        exchange = exchange.lower()
        if exchange not in ("", ALL):
            exchange = markets.check_exchange(exchange)
        return Subscription(channel, markets.canonical(symbol), exchange, levels if channel == "book" else 0)

    def find(self, want: Subscription) -> list[Topic]:
        """Return the topics a want comes down to; raises what REST would."""
        exchange = None if want.exchange in ("", ALL) else want.exchange
        kind = CHANNELS[want.channel]
        topics = [Topic(key.exchange, kind, key.symbol) for key in self._gateway.keys(kind, want.symbol, exchange, "")]
        if want.exchange == "":
            topics = [next((topic for topic in topics if self._is_usable(topic)), topics[0])]
        return topics

    def _is_usable(self, topic: Topic) -> bool:
        watched = self.topics.get(topic)
        if watched is not None and watched.live is not None:
            return watched.live
        upstream = self.upstreams.get(SocketKey.of(topic))
        return self._gateway.manager.is_available(topic.exchange) and (upstream is None or upstream.trouble is None)

    def _has_room(self, topics: Sequence[Topic]) -> bool:
        """Whether these can be watched, too; topics nobody wants now are ended for them, the longest unused first."""
        over = len(self.topics.keys() | set(topics)) - self.settings.stream_max_topics
        unused = [it for topic, it in self.topics.items() if not it.is_wanted and topic not in topics]
        if over > len(unused):
            return False
        for watched in sorted(unused, key=lambda it: it.used_at)[: max(0, over)]:
            self._end(watched)
        return True

    def subscribe(
        self, subscriber: ClientConnection, want: Subscription, topics: Sequence[Topic], seen: int | None = None
    ) -> None:
        """Tell a subscriber of topics from now on, beginning with a snapshot of each, unless it has `seen` that.

        Raises `TooManyStreams`.
        """
        if not self._has_room(topics):
            have = f"{len(self.topics)} streams are watched, as many as are allowed"
            raise TooManyStreams(f"{have}; ask for one that is, or use /ticker", symbol=want.symbol)
        subscriber.wants.setdefault(want, [])
        for topic in topics:
            watched = self._watch(topic)
            watched.coming += 1
            self._spawn(self._begin(subscriber, want, watched, seen))

    async def _begin(
        self, subscriber: ClientConnection, want: Subscription, watched: TopicState, seen: int | None
    ) -> None:
        try:
            is_known = watched.event is not None and (watched.live or watched.topic.kind == "trades")
            error = None if is_known else await self._load(watched)
        finally:
            watched.coming -= 1
        if want not in subscriber.wants:
            return  # it left meanwhile
        feed = watched.feeds.setdefault(want.levels, Feed(watched.topic, want.levels))
        if feed.event is None and watched.event is not None:
            feed.push(watched.event, bodies(watched.event, [want.levels])[want.levels], "snapshot")  # to nobody yet
        feed.subscribers[subscriber] = None
        if feed not in subscriber.wants[want]:
            subscriber.wants[want].append(feed)
        if feed.event is not None and feed.event.sequence != seen:
            subscriber.offer(feed, "snapshot")
        if error is not None and watched.live is None:
            watched.live = False
        self._tell(subscriber, watched, error)

    def _tell(self, subscriber: ClientConnection, watched: TopicState, error: GatewayError | None = None) -> None:
        """Tell that a topic is stale; that it is live is told to whom that was told, and to nobody else."""
        topic = watched.topic
        if watched.live is None or (watched.live and topic not in subscriber.stale):
            return
        (subscriber.stale.discard if watched.live else subscriber.stale.add)(topic)
        code = {} if watched.live or error is None else {"code": error.code}
        subscriber.tell(self._status(watched) | code)

    async def _load(self, watched: TopicState) -> GatewayError | None:
        """Bring a first value by REST, from the cache if it is there."""
        exchange, kind, symbol = watched.topic
        try:
            if kind == "ticker" and not self._gateway.cache.has_fresh(Key(*watched.topic, "")):
                served = await self._first_ticker(SocketKey.of(watched.topic), symbol)
            else:
                served = await self._gateway.serve(kind, symbol, exchange, None, _variant(kind))
        except GatewayError as error:
            return error
        self._refresh(watched, served.body, self.clock.monotonic() - served.age)
        return None

    async def _first_ticker(self, place: SocketKey, symbol: str) -> Served:
        """Ask for it together with all others of its place that are wanted at this moment."""
        if place not in self._first:
            symbols: list[str] = []
            self._first[place] = symbols, self._spawn(self._first_tickers(place, symbols))
        symbols, asking = self._first[place]
        symbols.append(symbol)
        served = (await asyncio.shield(asking))[symbol, ""]
        if isinstance(served, GatewayError):
            raise served
        return served

    async def _first_tickers(
        self, place: SocketKey, symbols: list[str]
    ) -> dict[tuple[str, str], Served | GatewayError]:
        del self._first[place]  # it began when all that were subscribed to by one message had come
        return await self._gateway.tickers(symbols, place.exchange, None)

    def unsubscribe(self, subscriber: ClientConnection, want: Subscription) -> bool:
        """Tell a subscriber no more; returns whether it was told at all."""
        feeds = subscriber.wants.pop(want, None)
        for feed in feeds or []:
            self._detach(subscriber, feed)
        if not any(other[:2] == want[:2] for other in subscriber.wants):
            kind, names = CHANNELS[want.channel], self._gateway.manager.names
            subscriber.stale -= {Topic(name, kind, want.symbol) for name in names}
        return feeds is not None

    def _detach(self, subscriber: ClientConnection, feed: Feed) -> None:
        if any(feed in feeds for feeds in subscriber.wants.values()):
            return  # another want of the same subscriber comes down to it, too
        feed.subscribers.pop(subscriber, None)
        watched = self.topics.get(feed.topic)
        if watched is not None:
            watched.used_at = self.clock.monotonic()
            if not feed.subscribers:
                watched.feeds.pop(feed.levels, None)

    def join(self, subscriber: ClientConnection) -> None:
        """Add a subscriber.

        Raises `TooManyConnections` when its client has all it may have: one address must not take every place there is.
        Raises `TooManyStreams` when all places are taken.
        """
        most = self.settings.stream_max_per_client
        if sum(other.client == subscriber.client for other in self.subscribers) >= most:
            metrics.stream_refused_total.labels("max_per_client").inc()
            have = f"this client has {most} connections to /ws and /stream (STREAM_MAX_PER_CLIENT)"
            raise TooManyConnections(f"{have}; close one, or subscribe on one that is open")
        if len(self.subscribers) >= self.settings.stream_max_clients:
            metrics.stream_refused_total.labels("max_clients").inc()
            raise TooManyStreams(f"{len(self.subscribers)} clients are connected, as many as are allowed; try later")
        self.subscribers.add(subscriber)

    def leave(self, subscriber: ClientConnection) -> None:
        """Forget a subscriber."""
        for want in list(subscriber.wants):
            self.unsubscribe(subscriber, want)
        self.subscribers.discard(subscriber)
        self.slow.discard(subscriber)

    def _watch(self, topic: Topic) -> TopicState:
        if (watched := self.topics.get(topic)) is None:
            watched = self.topics[topic] = TopicState(topic, self.clock)
            self._bus.want(topic)
        watched.used_at = self.clock.monotonic()
        return watched

    def _end(self, watched: TopicState) -> None:
        del self.topics[watched.topic]
        self._bus.leave(watched.topic)

    # What comes.

    def _reaches(self, topic: Topic) -> bool:
        """Whether the exchange can be heard from here, as far as is known before it was tried."""
        upstream = self.upstreams.get(SocketKey.of(topic))
        return upstream is None or not upstream.is_barred()

    def _hold(self, topic: Topic, held: bool) -> None:
        watched = self.topics.get(topic)
        if watched is not None:
            watched.held = held
            watched.sequence += held and watched.watch.last is not None  # it took over: what came between is a hole
        if watched is not None and held:
            self._upstream(topic).watch(topic.symbol, watched.watch)
        else:
            self._upstream(topic).unwatch(topic.symbol)

    def _hear(self, exchange: str, kind: str, symbol: str, raw: Any, steady: bool) -> bool:
        """Take what an exchange pushed; returns whether it was any good."""
        watched = self.topics.get(Topic(exchange, kind, symbol))
        metrics.stream_messages_received_total.labels(exchange, NAMES[kind]).inc()
        if watched is None:
            return False
        try:
            data = _build(exchange, kind, symbol, raw, int(self.clock.time() * 1000))
        except (BadUpstreamData, NoPrice):
            metrics.stream_dropped_total.labels("implausible").inc()
            return False
        if kind == "trades":  # each counts: what came while it was not subscribed to is a hole
            watched.sequence += watched.times != watched.watch.times
            watched.times = watched.watch.times
        event = self._event(watched, encode(data), data.timestamp, data.fetched_at, steady)
        self._bus.publish(event)
        self._deliver(watched, event, self.clock.monotonic(), keep=True)
        return True

    def _take(self, event: MarketDataEvent) -> None:
        """Take what another replica heard."""
        if (watched := self.topics.get(event.topic)) is not None:
            now = self.clock.monotonic()
            born = now - max(0.0, self.clock.time() - event.receive_time / 1000)
            newest = 0 if watched.event is None else watched.event.receive_time
            if event.receive_time >= newest or event.kind == "trades":  # it may have waited, and REST have been faster
                self._deliver(watched, event, born, keep=True)
            if event.steady:
                watched.watch.came(now)

    def _refresh(self, watched: TopicState, body: bytes, born: float) -> None:
        """Take what came by REST, if it is newer than what is there."""
        document = orjson.loads(body)
        is_same = watched.event is not None and watched.event.receive_time == document["fetched_at"]
        if watched.event is None or (born > watched.born and not is_same):
            event = self._event(watched, body, document.get("timestamp"), document["fetched_at"])
            self._deliver(watched, event, born, keep=False)

    @staticmethod
    def _event(
        watched: TopicState, body: bytes, timestamp: int | None, fetched_at: int, steady: bool = False
    ) -> MarketDataEvent:
        exchange, kind, symbol = watched.topic
        return MarketDataEvent(exchange, symbol, kind, watched.sequence + 1, timestamp, fetched_at, body, steady)

    def _deliver(self, watched: TopicState, event: MarketDataEvent, born: float, *, keep: bool) -> None:
        """Put an event before everybody who wants it, and `keep` it in the cache that REST answers from.

        If anything fails, the next event is a snapshot.
        """
        made = bodies(event, {LEVELS, *watched.feeds} if event.kind == "orderbook" else (0,))  # raises on nonsense
        is_next = watched.event is not None and event.sequence == watched.event.sequence + 1
        what = "update" if is_next and not watched.has_gap else "snapshot"
        watched.sequence, watched.event, watched.born, watched.has_gap = event.sequence, event, born, True
        if keep and event.kind != "trades":
            self._keep(watched, made, born)
        taken = []
        for levels, feed in list(watched.feeds.items()):
            metrics.stream_event_age_seconds.observe(max(0.0, self.clock.time() - event.receive_time / 1000))
            taken.append(feed.push(event, made[levels], what))
        watched.has_gap = not all(taken)

    def _keep(self, watched: TopicState, made: dict[int, bytes], born: float) -> None:
        now, topic = self.clock.monotonic(), watched.topic
        spread = watched.held and now - watched.spread_at >= SPREAD_SECONDS
        watched.spread_at = now if spread else watched.spread_at
        for levels, body in made.items():
            self._gateway.adopt(Key(*topic, str(levels or "")), body, born, spread=spread)

    # What does not come.

    async def _look_after_the_slow(self) -> None:
        for_each(self.slow, self._catch_up)

    def _catch_up(self, subscriber: ClientConnection) -> None:
        if subscriber.catch_up():
            self.slow.discard(subscriber)

    async def _beat(self) -> None:
        message = orjson.dumps({"type": "heartbeat", "sent_at": time.time_ns() // 1_000_000})
        for_each(self.subscribers, lambda subscriber: subscriber.beat(message))

    async def _tick(self) -> None:
        now = self.clock.monotonic()
        self._note_hot(now)
        stale: dict[SocketKey, list[TopicState]] = defaultdict(list)
        for watched in list(self.topics.values()):
            if watched.is_wanted:
                watched.used_at = now
            elif now - watched.used_at > self.settings.stream_idle_seconds:
                self._end(watched)
                continue
            self._judge(watched, now)
            if watched.live is False and watched.feeds:
                stale[SocketKey.of(watched.topic)].append(watched)
        if now - self._polled_at >= POLL_SECONDS:
            self._polled_at = now
            for place, some in stale.items():
                self._relieve(place, some)

    def _relieve(self, place: SocketKey, stale: list[TopicState]) -> None:
        """Find for those who are told of what is stale something newer."""
        for watched in stale:
            self._move(watched)
        if place.kind != "trades" and place not in self._polling:
            self._polling.add(place)
            self._spawn(self._poll(place, stale))

    def _judge(self, watched: TopicState, now: float) -> None:
        """Tell when a topic became stale, and when it is live again."""
        upstream = self.upstreams.get(SocketKey.of(watched.topic)) if watched.held else None
        is_new = now - watched.watch.since <= GRACE_SECONDS  # what was lost before it is no word about it
        lost = upstream is not None and upstream.is_lost() and not is_new
        live = not lost and not watched.watch.is_overdue(now)
        if live is watched.live or (live and watched.watch.messages == watched.messages):
            return  # that it is live again is shown by a message, by nothing else
        was, watched.live, watched.messages = watched.live, live, watched.watch.messages
        if was is not None or not live:
            log.info("stream is live again" if live else "stream is stale", extra=about(watched.topic))
        for subscriber in {subscriber for feed in watched.feeds.values() for subscriber in feed.subscribers}:
            self._tell(subscriber, watched)
        if not live:
            self._move(watched)

    def _status(self, watched: TopicState) -> dict[str, Any]:
        age = None if watched.event is None else int((self.clock.monotonic() - watched.born) * 1000)
        state = "live" if watched.live else "stale"
        return {"type": "status"} | about(watched.topic) | {"state": state, "age_ms": age}

    def _move(self, watched: TopicState) -> None:
        """Take those who left the choice to us to another exchange, if there is one that pushes."""
        topic = watched.topic
        for feed in list(watched.feeds.values()):
            want = Subscription(NAMES[topic.kind], topic.symbol, "", feed.levels)
            movers = [subscriber for subscriber in feed.subscribers if feed in subscriber.wants.get(want, ())]
            with suppress(GatewayError):
                if movers and (found := self.find(want))[0] != topic and self._is_usable(found[0]):
                    for subscriber in movers:
                        self.subscribe(subscriber, want, found)
                        subscriber.wants[want].remove(feed)
                        self._detach(subscriber, feed)

    async def _poll(self, place: SocketKey, stale: list[TopicState]) -> None:
        """Ask by REST, within the budget, for what is not pushed."""
        manager, (exchange, kind, _) = self._gateway.manager, place
        try:
            cost = weight_of(exchange, "tickers" if kind == "ticker" and len(stale) > 1 else kind, len(stale))
            if manager.limiter.used_ratio(exchange) > POLL_BUDGET_RATIO or not manager.is_available(exchange, cost):
                return
            keys = [Key(*watched.topic, _variant(kind)) for watched in stale]
            for group in [keys] if kind == "ticker" else [[key] for key in keys]:
                await self._gateway.refresh(group, POLL_SECONDS)
            for key, watched in zip(keys, stale, strict=True):
                entry = self._gateway.cache.memory.get(key)
                if entry is not None and entry.is_fresh(self.clock.monotonic()):
                    self._refresh(watched, entry.body, entry.born)
        finally:
            self._polling.discard(place)

    def _note_hot(self, now: float) -> None:
        """Watch tickers that are asked for often, and keep watching while they are."""
        memory = self._gateway.cache.memory
        for key in {*memory.hot, *self._asked}:
            if key.kind != "ticker" or (asked := memory.asked(key)) is None:
                self._asked.pop(key, None)
                continue
            since, before = self._asked.setdefault(key, (now, asked))
            topic = Topic(*key[:3])
            if asked - before >= HOT_REQUESTS:
                self._asked[key] = now, asked
                if self._has_room([topic]):
                    self._watch(topic)
            elif now - since >= HOT_SECONDS:
                self._asked[key] = now, asked
                if asked == before:
                    del self._asked[key]

    def _spawn(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._finished)
        return task

    def _finished(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            report_error("streams", error)


def _build(exchange: str, kind: str, symbol: str, raw: Any, now: int) -> Ticker | OrderBook | Trades:
    if kind == "ticker":
        data: Ticker | OrderBook | Trades = Ticker.from_ccxt(raw, exchange, symbol, now)
    elif kind == "orderbook":
        data = OrderBook.from_ccxt(raw, exchange, symbol, now, LEVELS)
    else:
        data = Trades.from_ccxt(raw, exchange, symbol, now)
    data.source = "stream"
    return data


def _variant(kind: str) -> str:
    """Return what REST calls the most that is watched of a kind."""
    return "" if kind == "ticker" else str(LEVELS)
