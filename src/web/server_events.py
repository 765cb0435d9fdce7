"""`GET /stream/{symbol}`: streams as server-sent events (WHATWG HTML, section 9.2)."""

import asyncio
import re
from collections import deque
from collections.abc import AsyncIterator, Mapping
from typing import Any

import orjson
from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from src.core import metrics
from src.streams.feed import SEND_BUFFER_BYTES, SLOW_SECONDS, ClientConnection, Feed
from src.streams.hub import StreamHub
from src.streams.topics import Subscription
from src.web import uvicorn_edge

MAX_NOTES = 100  # status messages and heartbeats kept for a slow client; the newest are kept
RETRY = b"retry: 1000\n\n"  # milliseconds after which a browser reconnects


class EventStream(ClientConnection, StreamingResponse):
    """One client and its response, which subscribes when it starts, and unsubscribes when it ends.

    While the server waits for the client, new values replace values not yet sent.
    """

    transport = "sse"

    def __init__(self, request: Request, wanted: list[Subscription]) -> None:
        """Prepare a response that pushes updates. Raises the same errors as REST."""
        ClientConnection.__init__(self, request.state.gate.client_of(request.scope))
        headers = {"Cache-Control": "no-store", "Content-Type": "text/event-stream; charset=utf-8"}
        StreamingResponse.__init__(self, self.events(), headers=headers)
        self._hub: StreamHub = request.state.streams
        subscriptions = [self._hub.resolve(subscription) for subscription in wanted]
        self._topics = {resolved: self._hub.find_topics(resolved) for resolved in subscriptions}
        count = sum(map(len, self._topics.values()))
        self._hub.check_count(count)
        last_id = request.headers.get("last-event-id", "")
        if count == 1 and re.fullmatch(r"[0-9]{1,18}", last_id):  # ambiguous for several topics
            self.last_seen = int(last_id)
        self._transport = uvicorn_edge.transport_of(request.scope, SEND_BUFFER_BYTES)
        self._pending: dict[Feed, str] = {}  # message type of each feed's next value
        self._notes: deque[bytes] = deque(maxlen=MAX_NOTES)
        self._has_data = asyncio.Event()
        self._is_closed = False
        self._sent_at = self._hub.clock.monotonic()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send events until the client leaves or the gateway stops.

        Raises the errors of `StreamHub.connect` before the first event.
        """
        try:
            self._hub.connect(self)
            if scope.get("is_head"):  # the body is dropped, so no failed write would end the stream
                self.close_for_shutdown()
                self._topics = {}
            for subscription, topics in self._topics.items():
                self._hub.subscribe(self, subscription, topics)
            await super().__call__(scope, receive, send)
        finally:
            self._hub.disconnect(self)

    def push(self, feed: Feed, message_type: str) -> None:
        """Keep the newest value of a feed until the client takes it."""
        if not self._pending:
            self._sent_at = self._hub.clock.monotonic()
        if feed in self._pending:
            message_type = "snapshot"
            metrics.stream_conflated_total.inc()
            self._hub.slow_connections.add(self)
        self._pending[feed] = message_type
        self._has_data.set()

    def send_message(self, message: Mapping[str, Any]) -> None:
        """Keep a message until the client takes it."""
        self._add_note(str(message["type"]), orjson.dumps(message))

    def send_heartbeat(self, message: bytes) -> None:
        """Send a heartbeat as an event: a page cannot see comments."""
        if not self._notes:
            self._add_note("heartbeat", message)

    def _add_note(self, message_type: str, payload: bytes) -> None:
        self._notes.append(b"event: %b\ndata: %b\n\n" % (message_type.encode(), payload))
        self._has_data.set()

    def send_pending(self) -> None:
        """Disconnect a client that takes nothing."""
        if self._pending and self._hub.clock.monotonic() - self._sent_at > SLOW_SECONDS:
            metrics.stream_dropped_total.labels("slow_client").inc()
            self._hub.disconnect(self)
            self.close_for_shutdown()
            if self._transport is not None:
                self._transport.abort()  # otherwise the close waits until all data is taken
        elif not self._pending:
            self._hub.slow_connections.discard(self)

    def close_for_shutdown(self) -> None:
        """End the response."""
        self._is_closed = True
        self._has_data.set()

    async def events(self) -> AsyncIterator[bytes]:
        """Yield events until the gateway stops."""
        yield RETRY
        while not self._is_closed:
            await self._has_data.wait()
            self._has_data.clear()
            for feed in list(self._pending):  # newer values are sent after the notes
                message_type = self._pending.pop(feed)
                metrics.streamed[feed.channel] += 1
                yield feed.message(message_type, _event)
                self._sent_at = self._hub.clock.monotonic()
            while self._notes:  # a status refers to values sent before it
                yield self._notes.popleft()


def _event(payload: bytes, message_type: str, sequence: int) -> bytes:
    return b"id: %d\nevent: %b\ndata: %b\n\n" % (sequence, message_type.encode(), payload)
