"""Feeds: the newest value of a topic, encoded once for all client connections."""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any

import orjson

from src.core.background import report_error
from src.streams.topics import MAX_LEVELS, MarketDataEvent, Subscription, Topic

SEND_BUFFER_BYTES = 65_536  # kernel buffer of each client; data in it is already old on arrival
TRANSPORTS = ("ws", "sse")
SLOW_SECONDS = 15.0  # a client that is slow for this long is disconnected
Framing = Callable[[bytes, str, int], bytes]  # JSON, message type, sequence -> bytes to send


class Feed:
    """A topic with a fixed number of order book levels, and the connections subscribed to it."""

    def __init__(self, topic: Topic, levels: int) -> None:
        self.topic = topic
        self.levels = levels
        self.channel = topic.channel.name
        self.event: MarketDataEvent | None = None
        self.subscribers: dict[ClientConnection, None] = {}
        self._body = b""
        self._names = topic.fields() | ({"levels": levels} if levels else {})
        self._updates: dict[Framing, bytes] = {}

    def publish(self, event: MarketDataEvent, body: bytes, message_type: str) -> bool:
        """Push a new value to every subscriber. Return True if no subscriber raised an error.

        `body` is the event's data with this feed's number of levels.
        """
        self.event = event
        self._body = body
        self._updates = {}
        return for_each(self.subscribers, lambda subscriber: subscriber.push(self, message_type))

    def message(self, message_type: str, framing: Framing) -> bytes:
        """Return a `snapshot` or `update` of the newest value, framed for a transport.

        All subscribers share one update. A snapshot may be sent at any later time, so it is encoded
        each time with its own `sent_at`.
        """
        if message_type == "update" and framing in self._updates:
            return self._updates[framing]
        event = self.event
        if event is None:
            return b""
        head = {"type": message_type} | self._names
        head |= {
            "seq": event.sequence,
            "timestamp": event.exchange_time,
            "fetched_at": event.receive_time,
            "sent_at": utc_ms(),
        }
        payload = orjson.dumps(head)[:-1] + b',"data":' + self._body + b"}"
        framed = framing(payload, message_type, event.sequence)
        if message_type == "update":
            self._updates[framing] = framed
        return framed


class ClientConnection(ABC):
    """A consumer's connection. No method waits: data that cannot be sent now is sent later."""

    transport = ""

    def __init__(self, client: str) -> None:
        self.client = client  # API key or address, as the gate identifies the client
        # The feed of each topic is None until the topic has a first value, or its load failed.
        self.subscriptions: dict[Subscription, dict[Topic, Feed | None]] = {}
        self.stale_topics: set[Topic] = set()  # topics whose last sent status is `stale`
        self.last_seen: int | None = None  # number of the newest event that the client has

    @abstractmethod
    def push(self, feed: Feed, message_type: str) -> None:
        """Send the newest value of a feed."""

    @abstractmethod
    def send_message(self, message: dict[str, Any]) -> None:
        """Send any other message."""

    @abstractmethod
    def send_heartbeat(self, message: bytes) -> None:
        """Send a heartbeat, unless other messages are pending."""

    @abstractmethod
    def send_pending(self) -> None:
        """Send pending values if the client can take them, or disconnect a client that is too slow.

        Without pending values, remove the connection from `StreamHub.slow_connections`.
        """

    @abstractmethod
    def close_for_shutdown(self) -> None:
        """Close the connection because the gateway stops."""


def for_each(
    connections: Iterable[ClientConnection], action: Callable[[ClientConnection], object]
) -> bool:
    """Run `action` for every connection. Return True if no connection raised an error.

    An error is reported and does not affect other connections.
    """
    has_failed = False
    for connection in list(connections):
        try:
            action(connection)
        except Exception as error:  # noqa: BLE001 - reported
            report_error("delivery", error)
            has_failed = True
    return not has_failed


def encode_levels(event: MarketDataEvent, levels: Iterable[int]) -> dict[int, bytes]:
    """Return the event's data with all levels, and with each number of the best levels.

    Data without levels has the key 0. Raises an exception if another replica's data is invalid.
    """
    if not event.topic.channel.has_levels:
        return {0: event.data}
    book = orjson.loads(event.data)
    bids, asks = book["bids"], book["asks"]
    bodies = {MAX_LEVELS: event.data}
    for count in set(levels) - {MAX_LEVELS}:
        bodies[count] = orjson.dumps(book | {"bids": bids[:count], "asks": asks[:count]})
    return bodies


def utc_ms() -> int:
    """Return the time of the system clock, for `sent_at`."""
    return time.time_ns() // 1_000_000
