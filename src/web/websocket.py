"""`/ws`: subscriptions over a WebSocket; docs/streaming.md describes the protocol.

Updates are framed once and written directly to each connection's transport: sending through the
server costs more per client than everything else. The buffer of a slow client fills up. Then only
the newest value of each stream is kept for the client.
"""

import asyncio
import re
import struct
from collections.abc import Collection, Mapping
from contextlib import suppress
from typing import Any, Literal, get_args

import orjson
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette import status
from starlette.websockets import WebSocket, WebSocketDisconnect

from config import EXCHANGES
from src.core import errors, metrics
from src.streams.feed import SEND_BUFFER_BYTES, SLOW_SECONDS, ClientConnection, Feed, utc_ms
from src.streams.hub import StreamHub
from src.streams.topics import CHANNELS, MAX_LEVELS, ChannelName, Subscription, Timeframe
from src.web import uvicorn_edge
from src.web.gate import Gate

MAX_MESSAGE_BYTES = 16_384  # 100 symbols of the longest kind are a quarter of this
MAX_SYMBOLS = 100  # in one message
MESSAGES_PER_SECOND = 10  # average rate of messages from one client
MESSAGES_AT_ONCE = 50
IDLE_SECONDS = 60.0  # a connection without a subscription and a message is closed after this
BUFFER_BYTES = 65_536  # a client with more unsent data is slow
CLOSE_SECONDS = 5.0  # for a client to take the close frame

Op = Literal["subscribe", "unsubscribe", "list", "ping"]
SYMBOLS = f'a list such as ["BTC-USDT"] with 1 to {MAX_SYMBOLS} symbols'
EXCHANGE = f"one of {', '.join(EXCHANGES)}, all; if absent, the gateway chooses"


class Command(BaseModel):
    """A message from a client. Descriptions follow "expected" in error messages."""

    model_config = ConfigDict(extra="forbid", strict=True)

    op: Op = Field(description=f"one of {', '.join(get_args(Op))}")
    id: str | int | None = Field(None, description="a string or an integer")
    channel: ChannelName = Field("ticker", description=f"one of {', '.join(CHANNELS)}")
    symbols: list[str] = Field([], max_length=MAX_SYMBOLS, description=SYMBOLS)
    exchange: str = Field("", max_length=32, description=EXCHANGE)
    levels: int = Field(10, ge=1, le=MAX_LEVELS, description=f"an integer from 1 to {MAX_LEVELS}")
    timeframe: Timeframe = Field("1m", description=f"one of {', '.join(get_args(Timeframe))}")


class WebSocketConnection(ClientConnection):
    """One client of `/ws`."""

    transport = "ws"

    def __init__(self, websocket: WebSocket, hub: StreamHub, client: str) -> None:
        super().__init__(client)
        uvicorn_edge.limit_message_size(websocket.scope, MAX_MESSAGE_BYTES)
        transport = uvicorn_edge.transport_of(websocket.scope, SEND_BUFFER_BYTES)
        self._websocket = websocket
        self._hub = hub
        self._pending: dict[Feed, None] = {}
        self._slow_since = 0.0
        self._tokens = float(MESSAGES_AT_ONCE)
        self._tokens_at = hub.clock.monotonic()
        self._is_closing = False
        hub.connect(self)  # before the transport: a refused connection must not start a task
        self._transport = transport or uvicorn_edge.PlainTransport(websocket)

    def push(self, feed: Feed, message_type: str) -> None:
        """Send the newest value of a feed, or keep the feed until there is room again."""
        if self._transport.is_closing():  # uvloop raises an error on a write
            return
        if not self._pending and self._transport.get_write_buffer_size() <= BUFFER_BYTES:
            metrics.streamed[feed.channel] += 1
            self._transport.write(feed.message(message_type, frame))
            return
        if feed in self._pending:
            metrics.stream_conflated_total.inc()
        elif not self._pending:
            self._slow_since = self._hub.clock.monotonic()
            self._hub.slow_connections.add(self)
        self._pending[feed] = None

    def send_pending(self) -> None:
        """Send pending values if there is room. Close the connection if it is too slow."""
        if self._transport.is_closing():
            self._hub.disconnect(self)
            self._transport.abort()  # a slow client would keep the written data indefinitely
        elif self._transport.get_write_buffer_size() <= BUFFER_BYTES // 2:
            self._hub.slow_connections.discard(self)
            pending = self._pending
            self._pending = {}
            for feed in pending:
                if self in feed.subscribers:
                    self.push(feed, "snapshot")
        elif self._hub.clock.monotonic() - self._slow_since > SLOW_SECONDS:
            self.close(status.WS_1013_TRY_AGAIN_LATER, "too slow")

    def send_message(self, message: Mapping[str, Any]) -> None:
        """Send a message. Close the connection if there is no room for the message either."""
        if self._transport.get_write_buffer_size() > 2 * BUFFER_BYTES:
            self.close(status.WS_1013_TRY_AGAIN_LATER, "too slow")
        elif not self._transport.is_closing():
            self._transport.write(frame(orjson.dumps(message)))

    def send_heartbeat(self, message: bytes) -> None:
        """Send a heartbeat, unless values are pending."""
        if not self._pending and not self._transport.is_closing():
            self._transport.write(frame(message))

    def close_for_shutdown(self) -> None:
        """Close the connection because the gateway stops."""
        self.close(status.WS_1001_GOING_AWAY, "the gateway stops")

    def close(self, code: int, reason: str) -> None:
        """Send a close frame, and disconnect the client after `CLOSE_SECONDS`."""
        self._hub.disconnect(self)
        if self._is_closing or self._transport.is_closing():
            return
        self._is_closing = True
        if code == status.WS_1013_TRY_AGAIN_LATER:
            metrics.stream_dropped_total.labels("slow_client").inc()
        self._transport.write(close_frame(code, reason))
        asyncio.get_running_loop().call_later(CLOSE_SECONDS, self._transport.abort)

    async def run(self) -> None:
        """Answer messages until the client leaves or the connection is closed."""
        try:
            while True:
                async with asyncio.timeout(None if self.subscriptions else IDLE_SECONDS):
                    message = await self._websocket.receive()
                if message["type"] == "websocket.disconnect":
                    return
                if not self._is_closing:
                    await self._answer(message.get("text") or message.get("bytes") or "")
        except TimeoutError:
            reason = f"idle for {IDLE_SECONDS:g} s: subscribe to something"
            self.close(status.WS_1000_NORMAL_CLOSURE, reason)
        except (WebSocketDisconnect, RuntimeError):
            pass  # the client has left
        finally:
            self._hub.disconnect(self)
            if isinstance(self._transport, uvicorn_edge.PlainTransport):
                await self._transport.finish()

    def _take_token(self) -> None:
        """Raise `TooManyRequests` if the client has exceeded its message rate."""
        now = self._hub.clock.monotonic()
        earned = (now - self._tokens_at) * MESSAGES_PER_SECOND
        self._tokens = min(self._tokens + earned, MESSAGES_AT_ONCE) - 1
        self._tokens_at = now
        if self._tokens < 0:
            raise errors.TooManyRequests(
                f"this client sent more than {MESSAGES_AT_ONCE} messages at once or"
                f" {MESSAGES_PER_SECOND} per second; reconnect and send fewer"
            )

    async def _answer(self, text: str | bytes) -> None:
        if len(text) > MAX_MESSAGE_BYTES:
            self.close(status.WS_1009_MESSAGE_TOO_BIG, f"more than {MAX_MESSAGE_BYTES} bytes")
            return
        request_id = None
        try:
            self._take_token()
            document = _parse_object(text)
            if isinstance(document.get("id"), str | int):
                request_id = document["id"]
            command = _parse_command(document)
            if command.op == "subscribe":
                await self._hub.look_for_new_markets(command.symbols, command.exchange)
            self.send_message(self._run_command(command))
        except errors.GatewayError as error:
            self.send_message(_error_message(error, request_id))
            if isinstance(error, errors.TooManyRequests):
                self.close(status.WS_1008_POLICY_VIOLATION, "too many messages")

    def _run_command(self, command: Command) -> dict[str, Any]:
        """Run a command, and return its answer."""
        if command.op == "ping":
            return {"type": "pong", "id": command.id, "sent_at": utc_ms()}
        if command.op == "list":
            streams = [self._describe(subscription) for subscription in self.subscriptions]
            return {"type": "list", "id": command.id, "streams": streams}
        answer_type = "subscribed" if command.op == "subscribe" else "unsubscribed"
        return {"type": answer_type, "id": command.id} | self._run_for_symbols(command)

    def _describe(self, subscription: Subscription) -> dict[str, Any]:
        description = subscription._asdict() | {"exchange": subscription.exchange or None}
        for name in ("levels", "timeframe"):
            if not description[name]:
                del description[name]
        feeds = self.subscriptions[subscription]
        return description | {"from": [topic.exchange for topic, feed in feeds.items() if feed]}

    def _run_for_symbols(self, command: Command) -> dict[str, Any]:
        """Subscribe to or unsubscribe from each symbol, and return the members of the answer.

        A wrong symbol costs as much as a message. Raises the error of a single symbol.
        """
        if not command.symbols:
            raise errors.InvalidParameter(f"symbols is empty: expected {SYMBOLS}")
        action = self._begin if command.op == "subscribe" else self._end
        symbols: list[str] = []
        problems: dict[str, Any] = {}
        for symbol in command.symbols:
            try:
                options = (command.exchange, command.levels, command.timeframe)
                subscription = self._hub.resolve(Subscription(command.channel, symbol, *options))
                action(subscription)
                symbols.append(subscription.symbol)
            except errors.GatewayError as error:
                if len(command.symbols) == 1:
                    raise
                self._tokens -= 1
                problems[symbol] = error.problem()
        return {"channel": command.channel, "symbols": symbols, "errors": problems}

    def _begin(self, subscription: Subscription) -> None:
        topics = self._hub.find_topics(subscription)
        if subscription not in self.subscriptions:
            self._hub.check_count(sum(map(len, self.subscriptions.values())) + len(topics))
            self._hub.subscribe(self, subscription, topics)  # sends nothing before the answer

    def _end(self, subscription: Subscription) -> None:
        if not self._hub.unsubscribe(self, subscription):
            raise errors.InvalidParameter(
                f"{subscription.symbol} has no such subscription; use the channel, exchange,"
                " levels and timeframe that `list` shows",
                symbol=subscription.symbol,
            )


async def serve(websocket: WebSocket, gate: Gate, hub: StreamHub) -> None:
    """Serve one connection from its handshake to its end."""
    await websocket.accept()
    try:
        _check_origin(websocket, hub.settings.cors_origins)
        if not gate.open:
            await gate.admit(websocket.scope, websocket.state.gateway.store)
        connection = WebSocketConnection(websocket, hub, gate.client_of(websocket.scope))
    except errors.GatewayError as error:
        await websocket.send_text(orjson.dumps(_error_message(error)).decode())
        is_denied = isinstance(error, errors.Unauthorized | errors.OriginRefused)
        code = status.WS_1008_POLICY_VIOLATION if is_denied else status.WS_1013_TRY_AGAIN_LATER
        await websocket.close(code, error.code)
        return
    await connection.run()


def _check_origin(websocket: WebSocket, allowed: Collection[str]) -> None:
    """Raise `OriginRefused` for a page of another host that CORS_ORIGINS does not allow."""
    origin = websocket.headers.get("origin")
    if origin is None or "*" in allowed or origin in allowed:
        return
    page_host = origin.partition("://")[2]
    page_hosts = {page_host, re.sub(r":\d+$", "", page_host)}  # a proxy may remove Host's port
    if websocket.headers.get("host", "") not in page_hosts - {""}:
        raise errors.OriginRefused(f"{origin} may not connect; add the origin to CORS_ORIGINS")


def frame(payload: bytes, *_: object) -> bytes:
    """Return a text message as one unmasked frame (RFC 6455 section 5.2)."""
    size = len(payload)
    if size < 126:
        return b"\x81%c%b" % (size, payload)
    if size < 65_536:
        return b"\x81\x7e" + struct.pack("!H", size) + payload
    return b"\x81\x7f" + struct.pack("!Q", size) + payload


def close_frame(code: int, reason: str) -> bytes:
    """Return a close frame (RFC 6455 section 5.5.1)."""
    body = struct.pack("!H", code) + reason.encode()
    return b"\x88%c%b" % (len(body), body)


def _parse_object(text: str | bytes) -> dict[str, Any]:
    with suppress(orjson.JSONDecodeError):
        document = orjson.loads(text)
        if isinstance(document, dict):
            return document
    raise errors.MalformedRequest('send a JSON object, such as {"op":"ping"}')


def _parse_command(document: dict[str, Any]) -> Command:
    try:
        return Command.model_validate(document)
    except ValidationError as error:
        name = str(error.errors()[0]["loc"][0])
    field = Command.model_fields.get(name)
    if field is None:
        raise errors.InvalidParameter(f"{name} is unknown; use {', '.join(Command.model_fields)}")
    raise errors.InvalidParameter(f"{name} is invalid: expected {field.description}")


def _error_message(error: errors.GatewayError, request_id: object = None) -> dict[str, Any]:
    # A problem has its own `type`.
    return {"type": "error", "id": request_id} | error.problem() | {"type": "error"}
