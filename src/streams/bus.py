"""Coordination of replicas: a lease in Redis per topic, and pub/sub for the events of topics.

Without Redis, or while Redis is unavailable, each replica watches every topic itself. A lease
holder that dies is replaced when its lease expires.
"""

import asyncio
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

from redis.asyncio import RedisCluster

from src.core import metrics
from src.core.background import report_error
from src.store.redis import RedisClient, RedisStore, RedisUnavailable
from src.streams.topics import MarketDataEvent, Topic

LEASE_SECONDS = 3.0  # longest outage after a holder dies; a lease is renewed three times as often
LISTEN_SECONDS = 0.1  # longest wait for a message before the list of channels is checked
COMMAND_SECONDS = 1.0
MAX_PENDING = 2000  # events queued for other replicas; beyond it the oldest are dropped and counted
MAX_BATCH = 100  # events in one command

# Acquires, renews or (0 milliseconds) releases a lease. KEYS: lease. ARGV: replica, milliseconds.
# Returns 1 if no other replica holds the lease.
LEASE_SCRIPT = """
local holder = redis.call('GET', KEYS[1])
if holder and holder ~= ARGV[1] then return 0 end
if ARGV[2] ~= '0' then redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
elseif holder then redis.call('DEL', KEYS[1]) end
return 1
"""


class Bus:
    """Decides which topics this replica watches, and exchanges events with other replicas.

    `set_held(topic, held)` is called when this replica acquires or loses a lease. A replica that
    cannot reach the exchange, by `is_reachable(topic)`, releases its lease for another replica.
    `receive(event)` is called for each event of a topic that another replica holds.
    """

    def __init__(
        self,
        store: RedisStore,
        set_held: Callable[[Topic, bool], None],
        is_reachable: Callable[[Topic], bool],
        receive: Callable[[MarketDataEvent], None],
    ) -> None:
        self._store = store
        self._set_held = set_held
        self._is_reachable = is_reachable
        self._receive = receive
        self._replica = os.urandom(8).hex()
        self._held: dict[Topic, bool] = {}  # every topic of this replica: True if it has the lease
        self._released: set[Topic] = set()  # topics whose leases have to be released
        self._has_changes = asyncio.Event()
        self._channels: set[str] = set()  # of topics without a lease: events of other replicas
        self._outgoing: asyncio.Queue[MarketDataEvent] = asyncio.Queue(MAX_PENDING)

    def add(self, topic: Topic) -> None:
        """Start watching a topic, on this replica or through another one."""
        self._held[topic] = False
        self._channels.add(topic.redis_name("events"))
        self._has_changes.set()

    def remove(self, topic: Topic) -> None:
        """Stop watching a topic, and release its lease for other replicas."""
        self._channels.discard(topic.redis_name("events"))
        if self._held.pop(topic, False):
            self._set_held(topic, False)
            self._released.add(topic)
            self._has_changes.set()

    def publish(self, event: MarketDataEvent) -> None:
        """Queue an event for other replicas."""
        if self._store.up:
            if self._outgoing.full():
                self._outgoing.get_nowait()
                metrics.stream_dropped_total.labels("bus").inc()
            self._outgoing.put_nowait(event)

    async def keep_leases(self) -> None:
        """Acquire, renew and release leases, then wait until the next renewal or change."""
        self._has_changes.clear()
        await self._renew()
        with suppress(TimeoutError):
            async with asyncio.timeout(LEASE_SECONDS / 3):
                await self._has_changes.wait()

    async def send(self) -> None:
        """Wait for queued events, and send a batch of them to other replicas."""
        batch = [await self._outgoing.get()]
        while len(batch) < MAX_BATCH and not self._outgoing.empty():
            batch.append(self._outgoing.get_nowait())
        try:
            await self._store.run("publish", partial(_publish, batch), COMMAND_SECONDS)
        except RedisUnavailable:
            metrics.stream_dropped_total.labels("bus").inc(len(batch))

    async def listen(self) -> None:
        """Receive events of topics that other replicas hold, until Redis is unavailable."""
        subscribed: set[str] = set()
        with suppress(RedisUnavailable):
            async with self._store.pubsub() as pubsub:
                while True:
                    channels = set(self._channels)
                    if channels - subscribed:
                        await pubsub.subscribe(*(channels - subscribed))
                    if subscribed - channels:
                        await pubsub.unsubscribe(*(subscribed - channels))
                    subscribed = channels
                    if not subscribed:
                        await asyncio.sleep(LISTEN_SECONDS)
                        continue
                    message = await pubsub.get_message(timeout=LISTEN_SECONDS)
                    if message:
                        self._deliver(message["data"])

    async def close(self) -> None:
        """Release all leases, so that other replicas need not wait until they expire."""
        self._released |= {topic for topic, is_held in self._held.items() if is_held}
        self._held.clear()
        if self._store.up:
            await self._renew()

    async def _renew(self) -> None:
        # An unreachable topic is released on each attempt: 1 means that no other replica has it.
        seconds = dict.fromkeys(self._released, 0.0)
        for topic in self._held:
            seconds[topic] = LEASE_SECONDS if self._is_reachable(topic) else 0.0
        self._released = set()
        if not seconds:
            return
        command = partial(_update_leases, self._replica, seconds)
        try:
            replies = await self._store.run("lease", command, COMMAND_SECONDS)
        except RedisUnavailable:
            replies = [1] * len(seconds)
        for topic, reply in zip(seconds, replies, strict=True):
            held = bool(reply)
            if self._held.get(topic, held) != held:  # changed, and not removed in the meantime
                self._held[topic] = held
                self._channels ^= {topic.redis_name("events")}  # remove or add
                metrics.stream_lease_changes_total.labels("taken" if held else "lost").inc()
                self._set_held(topic, held)

    def _deliver(self, raw: object) -> None:
        event = MarketDataEvent.parse(raw)
        if event is not None and self._held.get(event.topic) is False:
            try:
                self._receive(event)
            except Exception as error:  # noqa: BLE001 - reported; later events are still delivered
                report_error("delivery", error)


async def _update_leases(replica: str, seconds: Mapping[Topic, float], client: RedisClient) -> Any:
    pipeline: Any = client.pipeline(transaction=False)
    for topic, length in seconds.items():
        pipeline.eval(LEASE_SCRIPT, 1, topic.redis_name("lease"), replica, int(length * 1000))
    return await pipeline.execute()


async def _publish(events: Sequence[MarketDataEvent], client: RedisClient) -> None:
    if isinstance(client, RedisCluster):  # its pipelines do not support PUBLISH
        for event in events:
            await client.publish(event.topic.redis_name("events"), event.dump())
        return
    pipeline: Any = client.pipeline(transaction=False)
    for event in events:
        pipeline.publish(event.topic.redis_name("events"), event.dump())
    await pipeline.execute()
