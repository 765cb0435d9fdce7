"""Between replicas: one of them watches a topic, by a lease in Redis, and tells the others over pub/sub what comes.

Without Redis, and while it is away, each watches for itself. A holder that dies is replaced when its lease ends.
"""

import asyncio
import os
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import orjson
from redis.asyncio import RedisCluster

from src.core import metrics
from src.core.background import report_error
from src.store.redis import PREFIX, RedisAway, RedisClient, RedisStore

LEASE_SECONDS = 3.0  # what a dead holder costs at most; renewed three times as often
LISTEN_SECONDS = 0.1  # longest wait for a message before it is looked what to listen to
MAX_PENDING = 2000  # events on their way to other replicas; past that the oldest are dropped, and counted
MAX_TOGETHER = 100  # of them in one command

# Takes or keeps a lease, or with 0 milliseconds gives it up. KEYS: lease. ARGV: who asks, milliseconds. Returns 1 when
# nobody else has it.
LEASE = """
local holder = redis.call('GET', KEYS[1])
if holder and holder ~= ARGV[1] then return 0 end
if ARGV[2] ~= '0' then redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
elseif holder then redis.call('DEL', KEYS[1]) end
return 1
"""


class Topic(NamedTuple):
    """What can be watched: one kind of data of one market."""

    exchange: str
    kind: str  # ticker, orderbook or trades
    symbol: str

    def redis(self, what: str) -> str:
        """The name of its lease or channel in Redis."""
        return f"{PREFIX}{what}:{{{self.exchange}|{self.kind}|{self.symbol}}}"


@dataclass(frozen=True, slots=True)
class MarketDataEvent:
    """Something new of a topic. Times are UTC milliseconds; `data` is the answer as REST would send it."""

    exchange: str
    symbol: str
    kind: str
    sequence: int  # grows by one with each event of a topic; a new holder begins where it thinks the last one was
    exchange_time: int | None
    receive_time: int
    data: bytes
    steady: bool = True  # whether it shows that the topic is alive, not only a part of it

    @property
    def topic(self) -> Topic:
        """What it is about."""
        return Topic(self.exchange, self.kind, self.symbol)

    def dump(self) -> bytes:
        """Write it for other replicas: a line about it, then the data."""
        head = [*self.topic, self.sequence, self.exchange_time, self.receive_time, self.steady]
        return orjson.dumps(head) + b"\n" + self.data

    @classmethod
    def parse(cls, raw: object) -> Self | None:
        """Read what `dump` wrote; anything else is None."""
        head, _, data = raw.partition(b"\n") if isinstance(raw, bytes) else (b"", b"", b"")
        with suppress(ValueError, TypeError):
            *names, sequence, exchange_time, receive_time, steady = orjson.loads(head)
            exchange, kind, symbol = map(str, names)
            return cls(exchange, symbol, kind, int(sequence), exchange_time, int(receive_time), data, bool(steady))
        return None


class Bus:
    """Decides which topics this replica watches: `hold(topic, held)` says so; `take(event)` brings what others tell.

    A lease is only for who `reaches(topic)`: else one replica in trouble would keep all others from watching.
    """

    def __init__(
        self,
        store: RedisStore,
        hold: Callable[[Topic, bool], None],
        take: Callable[[MarketDataEvent], None],
        reaches: Callable[[Topic], bool],
    ) -> None:
        self._store, self._hold, self._take, self._reaches = store, hold, take, reaches
        self._me = os.urandom(8).hex()
        self._wanted: dict[Topic, bool] = {}  # whether we hold it
        self._changed = asyncio.Event()
        self._to_hear: set[str] | None = None  # channels; None: to be worked out again
        self._outgoing: deque[MarketDataEvent] = deque(maxlen=MAX_PENDING)
        self._sending: asyncio.Task[None] | None = None
        self._releasing: set[asyncio.Task[None]] = set()

    def want(self, topic: Topic) -> None:
        """Watch a topic, here or through another replica."""
        if topic not in self._wanted:
            self._wanted[topic], self._to_hear = False, None
            self._changed.set()

    def leave(self, topic: Topic) -> None:
        """Want a topic no more; another replica may take it over at once."""
        self._to_hear = None
        if self._wanted.pop(topic, False):
            self._hold(topic, False)
            task = asyncio.create_task(self._release([topic]))
            self._releasing.add(task)
            task.add_done_callback(self._releasing.discard)

    def publish(self, event: MarketDataEvent) -> None:
        """Tell other replicas, beside all else."""
        if not self._store.up:
            return
        if len(self._outgoing) == MAX_PENDING:
            metrics.stream_dropped_total.labels("bus").inc()
        self._outgoing.append(event)
        if self._sending is None or self._sending.done():
            self._sending = asyncio.create_task(self._send())

    async def keep_leases(self) -> None:
        """Take and renew leases, then wait until it is time to do so again."""
        self._changed.clear()
        await self._renew()
        with suppress(TimeoutError):
            async with asyncio.timeout(LEASE_SECONDS / 3):
                await self._changed.wait()

    async def listen(self) -> None:
        """Hear what other replicas tell of the topics they hold, as long as Redis is there."""
        with suppress(RedisAway):
            await self._listen()

    async def close(self) -> None:
        """Give up all leases, so that others need not wait for their end."""
        held = [topic for topic, is_held in self._wanted.items() if is_held]
        self._wanted.clear()
        if held and self._store.up:
            await self._release(held)
        for task in self._releasing:
            task.cancel()

    async def _renew(self) -> None:
        if not (topics := list(self._wanted)):
            return
        try:
            # Who does not reach the exchange gives its lease up, and goes on trying until somebody else has it.
            lengths = [LEASE_SECONDS if self._reaches(topic) else 0 for topic in topics]
            replies = await self._store.run("lease", _lease(self._me, topics, lengths), 1.0)
        except RedisAway:
            replies = [1] * len(topics)
        for topic, reply in zip(topics, replies, strict=True):
            held = bool(reply)
            if self._wanted.get(topic, held) != held:  # else it was left meanwhile, or nothing changed
                self._wanted[topic], self._to_hear = held, None
                metrics.stream_lease_changes_total.labels("taken" if held else "lost").inc()
                self._hold(topic, held)

    async def _release(self, topics: Sequence[Topic]) -> None:
        with suppress(RedisAway):
            await self._store.run("release", _lease(self._me, topics, [0] * len(topics)), 1.0)

    async def _send(self) -> None:
        while self._outgoing:
            together = [self._outgoing.popleft() for _ in range(min(MAX_TOGETHER, len(self._outgoing)))]
            try:
                await self._store.run("publish", _publish(together), 1.0)
            except RedisAway:
                metrics.stream_dropped_total.labels("bus").inc(len(together))

    async def _listen(self) -> None:
        heard: set[str] = set()
        async with self._store.pubsub() as pubsub:
            while True:
                if self._to_hear is None:
                    self._to_hear = {topic.redis("events") for topic, held in self._wanted.items() if not held}
                wanted = self._to_hear
                if wanted - heard:
                    await pubsub.subscribe(*(wanted - heard))
                if heard - wanted:
                    await pubsub.unsubscribe(*(heard - wanted))
                if heard := wanted:
                    message = await pubsub.get_message(ignore_subscribe_messages=True, timeout=LISTEN_SECONDS)
                    self._understand(message["data"] if message else None)
                else:
                    await asyncio.sleep(LISTEN_SECONDS)

    def _understand(self, raw: object) -> None:
        event = MarketDataEvent.parse(raw)
        if event is not None and self._wanted.get(event.topic) is False:
            try:
                self._take(event)
            except Exception as error:  # noqa: BLE001 - reported; the next events are heard all the same
                report_error("delivery", error)


def _lease(me: str, topics: Sequence[Topic], seconds: Sequence[float]) -> Callable[[RedisClient], Awaitable[list[Any]]]:
    async def run(client: RedisClient) -> list[Any]:
        pipeline: Any = client.pipeline(transaction=False)
        for topic, length in zip(topics, seconds, strict=True):
            pipeline.eval(LEASE, 1, topic.redis("lease"), me, int(length * 1000))
        replies: list[Any] = await pipeline.execute()
        return replies

    return run


def _publish(events: Sequence[MarketDataEvent]) -> Callable[[RedisClient], Awaitable[None]]:
    async def run(client: RedisClient) -> None:
        if isinstance(client, RedisCluster):  # takes no such command in a pipeline
            for event in events:
                await client.publish(event.topic.redis("events"), event.dump())
            return
        pipeline: Any = client.pipeline(transaction=False)
        for event in events:
            pipeline.publish(event.topic.redis("events"), event.dump())
        await pipeline.execute()

    return run
