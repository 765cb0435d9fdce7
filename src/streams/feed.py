"""What subscribers get: the newest of a topic, in the form of their transport, made once for all of them."""

import asyncio
import socket
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any, NamedTuple

import orjson

from src.core.background import report_error
from src.core.errors import InternalError
from src.streams.bus import MarketDataEvent, Topic

SEND_BUFFER_BYTES = 65_536  # of the kernel, for each client: what is in it is old when it arrives
LEVELS = 50  # of books that are watched; subscribers may want fewer
CHANNELS = {"ticker": "ticker", "book": "orderbook", "trades": "trades"}  # what clients call the kinds
TRANSPORTS = ("ws", "sse")
NAMES = {kind: channel for channel, kind in CHANNELS.items()}
Form = Callable[[str, int, bytes], bytes]  # type, sequence, JSON -> what is sent


class Subscription(NamedTuple):
    """What a subscriber asked for; without an exchange it is the first that can be watched."""

    channel: str
    symbol: str
    exchange: str = ""
    levels: int = 0


class Feed:
    """A topic as its subscribers get it: with so many levels of a book; its texts are made once for all of them."""

    __slots__ = ("_body", "_texts", "channel", "event", "levels", "subscribers", "topic")

    def __init__(self, topic: Topic, levels: int) -> None:
        self.topic, self.levels, self.channel = topic, levels, NAMES[topic.kind]
        self.event: MarketDataEvent | None = None
        self.subscribers: dict[ClientConnection, None] = {}
        self._body = b""
        self._texts: dict[Form, bytes] = {}

    def push(self, event: MarketDataEvent, body: bytes, what: str) -> bool:
        """Offer something new to every subscriber; `body` is the event's data with the feed's levels.

        An error of one subscriber is reported and does not affect the others. Returns True if there was none.
        """
        self.event, self._body, self._texts = event, body, {}
        return for_each(self.subscribers, lambda subscriber: subscriber.offer(self, what))

    def text(self, what: str, form: Form) -> bytes:
        """Return the message of the newest event, a `snapshot` or an `update`, in the form of a transport.

        An update is made once for all; a snapshot may be taken any time later, and says when that was.
        """
        if (made := self._texts.get(form)) is not None and what == "update":
            return made
        if self.event is None:
            return b""
        event = self.event
        head = {"type": what} | about(self.topic) | ({"levels": self.levels} if self.levels else {})
        head |= {"seq": event.sequence, "timestamp": event.exchange_time, "fetched_at": event.receive_time}
        text = orjson.dumps(head | {"sent_at": time.time_ns() // 1_000_000})[:-1] + b',"data":' + self._body + b"}"
        made = form(what, event.sequence, text)
        if what == "update":
            self._texts[form] = made
        return made


class ClientConnection:
    """Somebody who is told. What it is offered may be taken now, or later as it is then; it must not wait."""

    transport = ""

    def __init__(self, client: str) -> None:
        self.client = client  # whose connection it is, as the gate names it
        self.wants: dict[Subscription, list[Feed]] = {}
        self.stale: set[Topic] = set()  # of what it wants: told to be stale, and not yet to be live again

    def catch_up(self) -> bool:
        """Take what was kept back, if that can be; returns whether nothing is any more."""
        raise NotImplementedError

    def beat(self, message: bytes) -> None:
        """Take a sign of life."""
        raise NotImplementedError

    def offer(self, feed: Feed, what: str) -> None:
        """Take what is new of a feed."""
        raise NotImplementedError

    def tell(self, message: dict[str, Any]) -> None:
        """Take a message that is about a feed, or about the gateway."""
        raise NotImplementedError

    def goodbye(self) -> None:
        """Learn that the gateway stops."""
        raise NotImplementedError


def for_each(subscribers: Iterable[ClientConnection], action: Callable[[ClientConnection], object]) -> bool:
    """Run `action` for every subscriber. Errors are reported and do not affect the others; True if there was none."""
    failures = 0
    for subscriber in list(subscribers):
        try:
            action(subscriber)
        except Exception as error:  # noqa: BLE001 - reported
            report_error("delivery", error)
            failures += 1
    return not failures


def way_to(server: Any, buffer_bytes: int) -> asyncio.Transport:
    """Return the transport of a connection of the server's, with so much of the kernel's buffer."""
    if server is None:
        raise InternalError("the gateway does not know the sockets of this server")
    transport: asyncio.Transport = server.transport
    if (raw := transport.get_extra_info("socket")) is not None:
        with suppress(OSError):  # it may be closed already
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer_bytes)
    return transport


def about(topic: Topic) -> dict[str, Any]:
    """Name a topic as messages do."""
    return {"channel": NAMES[topic.kind], "exchange": topic.exchange, "symbol": topic.symbol}


def bodies(event: MarketDataEvent, levels: Iterable[int]) -> dict[int, bytes]:
    """Return the event's data with only the best levels of a book, for each of these numbers of levels."""
    if event.kind != "orderbook":
        return dict.fromkeys(levels, event.data)
    whole = orjson.loads(event.data)
    return {most: orjson.dumps(whole | {side: whole[side][:most] for side in ("bids", "asks")}) for most in levels}
