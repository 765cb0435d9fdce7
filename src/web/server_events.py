"""`GET /stream/{symbol}`: streams as server-sent events (WHATWG HTML, section 9.2), for curl and EventSource."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

import orjson
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from src.core import metrics
from src.streams.bus import Topic
from src.streams.feed import SEND_BUFFER_BYTES, ClientConnection, Feed, Subscription, way_to
from src.streams.hub import StreamHub

SLOW_SECONDS = 15.0  # a client that takes nothing for so long is left
MAX_NOTES = 100  # messages beside the updates that are kept for a slow client; the newest stay
RETRY = b"retry: 1000\n\n"  # milliseconds after which a browser connects again


class Events(ClientConnection):
    """One client; the server waits for it, and what comes meanwhile replaces what was not taken yet."""

    transport = "sse"

    def __init__(self, streams: StreamHub, transport: asyncio.Transport, client: str) -> None:
        super().__init__(client)
        self._streams, self._transport = streams, transport
        self._pending: dict[Feed, str] = {}
        self._notes: deque[bytes] = deque(maxlen=MAX_NOTES)
        self._wake = asyncio.Event()
        self._ended = False
        self._taken_at = streams.clock.monotonic()

    def offer(self, feed: Feed, what: str) -> None:
        """Keep the newest until the client takes it."""
        if not self._pending:
            self._taken_at = self._streams.clock.monotonic()
        if feed in self._pending:
            what = "snapshot"
            metrics.stream_conflated_total.inc()
            self._streams.slow.add(self)
        self._pending[feed] = what
        self._wake.set()

    def tell(self, message: dict[str, Any]) -> None:
        """Keep a message until the client takes it."""
        self._notes.append(b"event: %b\ndata: %b\n\n" % (str(message["type"]).encode(), orjson.dumps(message)))
        self._wake.set()

    def beat(self, message: bytes) -> None:
        """Send it as an event, which a page sees, unlike a comment: what is quiet can be told from what is dead."""
        if not self._notes:
            self._notes.append(b"event: heartbeat\ndata: %b\n\n" % message)
            self._wake.set()

    def catch_up(self) -> bool:
        """Cut off a client that takes nothing; returns whether the client is slow no more."""
        if self._pending and self._streams.clock.monotonic() - self._taken_at > SLOW_SECONDS:
            metrics.stream_dropped_total.labels("slow_client").inc()
            self._streams.leave(self)
            self._transport.abort()  # to close it in order would wait for the client to take what was written
            return True
        return not self._pending

    def goodbye(self) -> None:
        """End the answer."""
        self._ended = True
        self._wake.set()

    async def run(self) -> AsyncIterator[bytes]:
        """Yield what is to be sent, until the gateway stops."""
        yield RETRY
        while not self._ended:
            await self._wake.wait()
            self._wake.clear()
            for feed in list(self._pending):  # what is new by then has its turn after the notes
                what = self._pending.pop(feed)
                metrics.streamed[feed.channel] += 1
                yield feed.text(what, _event)
                self._taken_at = self._streams.clock.monotonic()
            while self._notes:  # a status is about what came before it
                yield self._notes.popleft()


class EventStream(StreamingResponse):
    """The answer: it subscribes when it begins, or is refused as any other, and leaves however it ends."""

    def __init__(
        self,
        streams: StreamHub,
        server: Any,
        wanted: Mapping[Subscription, Sequence[Topic]],
        seen: int | None,
        client: str,
    ) -> None:
        self._streams, self._wanted, self._seen = streams, wanted, seen
        self._events = Events(streams, way_to(server, SEND_BUFFER_BYTES), client)
        super().__init__(self._events.run(), headers={"Cache-Control": "no-store"}, media_type="text/event-stream")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send events until the client leaves or the gateway stops; raises as `StreamHub.join` before the first."""
        try:
            self._streams.join(self._events)
            if scope.get("is_head"):  # the server drops the body, so no failing write would end the stream
                self._events.goodbye()
                self._wanted = {}
            for want, topics in self._wanted.items():
                self._streams.subscribe(self._events, want, topics, self._seen)
            await super().__call__(scope, receive, send)
        finally:
            self._streams.leave(self._events)


def _event(what: str, sequence: int, payload: bytes) -> bytes:
    return b"id: %d\nevent: %b\ndata: %b\n\n" % (sequence, what.encode(), payload)
