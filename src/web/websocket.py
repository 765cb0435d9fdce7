"""`/ws`: subscriptions over a WebSocket, as docs/streaming.md describes them.

Updates are framed once and written to each connection's transport as they are: the way through the server would cost
more for each client than all the rest. A client that reads too slowly has a full buffer; then only the newest of each
stream is kept for it.
"""

import asyncio
import struct
import time
from collections.abc import Callable, Mapping
from typing import Any, Literal

import orjson
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.websockets import WebSocket, WebSocketDisconnect

from config import EXCHANGES
from src.core import metrics
from src.core.errors import (
    GatewayError,
    InternalError,
    InvalidParameter,
    MalformedRequest,
    OriginRefused,
    TooManyRequests,
    TooManySubscriptions,
    Unauthorized,
)
from src.gateway import Gateway
from src.streams.feed import SEND_BUFFER_BYTES, ClientConnection, Feed, Subscription, way_to
from src.streams.hub import StreamHub
from src.web.gate import Gate

MAX_MESSAGE_BYTES = 16_384  # 100 symbols of the longest kind are a quarter of it
MAX_SYMBOLS = 100  # in one message
MESSAGES_PER_SECOND, MESSAGES_AT_ONCE = 10, 50  # from one client
IDLE_SECONDS = 60.0  # how long a client may be connected without a subscription
BUFFER_BYTES = 65_536  # written and not taken yet: with more a client is slow
CLOSE_SECONDS = 5.0  # for a client to take the notice that it is closed
SLOW_SECONDS = 15.0  # a client that takes nothing for so long is closed
NORMAL, GOING_AWAY, POLICY, TOO_BIG, FAILED, TRY_AGAIN = 1000, 1001, 1008, 1009, 1011, 1013  # RFC 6455 section 7.4


class Command(BaseModel):
    """What a client may send."""

    model_config = ConfigDict(extra="forbid", strict=True)

    op: Literal["subscribe", "unsubscribe", "list", "ping"]
    id: str | int | None = Field(None, description="Comes back with the answer.")
    channel: Literal["ticker", "book", "trades"] = "ticker"
    symbols: list[str] = Field([], max_length=MAX_SYMBOLS)
    exchange: str = Field("", max_length=32)
    levels: int = Field(10, ge=1, le=50)


EXPECTED = {
    "op": "one of subscribe, unsubscribe, list, ping",
    "id": "a text or a whole number",
    "channel": "one of ticker, book, trades",
    "symbols": f'a list such as ["BTC-USDT"], of {MAX_SYMBOLS} at most',
    "exchange": f"one of {', '.join(EXCHANGES)}, all; without it the gateway chooses",
    "levels": "a number from 1 to 50",
}


class Socket(ClientConnection):
    """One connected client."""

    transport = "ws"

    def __init__(self, websocket: WebSocket, transport: asyncio.Transport, streams: StreamHub, client: str) -> None:
        super().__init__(client)
        self._websocket, self._transport, self._streams = websocket, transport, streams
        self._behind: dict[Feed, None] = {}
        self._sizes: dict[Subscription, int] = {}  # streams each want came down to
        self._slow_since = 0.0
        self._tokens, self._counted_at = float(MESSAGES_AT_ONCE), streams.clock.monotonic()
        self._closing = False

    def offer(self, feed: Feed, what: str) -> None:
        """Write it now, or the newest when there is room again."""
        if self._transport.is_closing():
            return  # uvloop raises on what comes to nothing with others
        if self._behind or self._transport.get_write_buffer_size() > BUFFER_BYTES:
            if feed in self._behind:
                metrics.stream_conflated_total.inc()
            elif not self._behind:
                self._slow_since = self._streams.clock.monotonic()
                self._streams.slow.add(self)
            self._behind[feed] = None
        else:
            metrics.streamed[feed.channel] += 1
            self._transport.write(feed.text(what, _framed))

    def catch_up(self) -> bool:
        """Write what was kept back if there is room; returns whether the client is slow no more."""
        if self._transport.is_closing():
            self._transport.abort()  # it was slow, and would keep what is written for as long as it likes
            return True
        if self._transport.get_write_buffer_size() > BUFFER_BYTES // 2:
            if self._streams.clock.monotonic() - self._slow_since > SLOW_SECONDS:
                self.close(TRY_AGAIN, "too slow")
                return True
            return False
        behind, self._behind = self._behind, {}
        for feed in behind:
            if self in feed.subscribers:
                self.offer(feed, "snapshot")
        return not self._behind

    def tell(self, message: Mapping[str, Any]) -> None:
        """Write a message; who has left no room for that either is closed."""
        if self._transport.get_write_buffer_size() > 2 * BUFFER_BYTES:
            self.close(TRY_AGAIN, "too slow")
        elif not self._transport.is_closing():
            self._transport.write(frame(orjson.dumps(message)))

    def beat(self, message: bytes) -> None:
        """Show that the gateway is there; who is slow has other signs of that."""
        if not self._behind and not self._transport.is_closing():
            self._transport.write(frame(message))

    def goodbye(self) -> None:
        """Close because the gateway stops."""
        self.close(GOING_AWAY, "the gateway stops")

    def close(self, code: int, reason: str) -> None:
        """Say why, and close; a client that does not take that in time is cut off."""
        self._streams.leave(self)
        if not self._closing and not self._transport.is_closing():
            self._closing = True
            if code == TRY_AGAIN:
                metrics.stream_dropped_total.labels("slow_client").inc()
            self._transport.write(closing_frame(code, reason))
            asyncio.get_running_loop().call_later(CLOSE_SECONDS, self._transport.abort)

    async def serve(self) -> None:
        """Answer until the client leaves."""
        while True:
            async with asyncio.timeout(None if self.wants else IDLE_SECONDS):
                message = await self._websocket.receive()
            if message["type"] == "websocket.disconnect":
                return
            if self._closing:
                continue
            text = message.get("text") or message.get("bytes") or ""
            if len(text) > MAX_MESSAGE_BYTES:
                self.close(TOO_BIG, f"more than {MAX_MESSAGE_BYTES} bytes")
                return
            if not self._may_speak():
                self.tell(
                    _problem(
                        TooManyRequests(
                            f"more than {MESSAGES_AT_ONCE} messages at once, or {MESSAGES_PER_SECOND} a second"
                        )
                    )
                )
                self.close(POLICY, "too many messages")
                return
            await self._answer(text)

    def _may_speak(self) -> bool:
        now = self._streams.clock.monotonic()
        self._tokens = min(self._tokens + (now - self._counted_at) * MESSAGES_PER_SECOND, MESSAGES_AT_ONCE)
        self._counted_at = now
        self._tokens -= 1
        return self._tokens >= 0

    async def _answer(self, text: str | bytes) -> None:
        number = None
        try:
            document = _read(text)
            number = document.get("id") if isinstance(document.get("id"), str | int) else None
            command = _understand(document)
            if command.op in ("subscribe", "unsubscribe") and not command.symbols:
                raise InvalidParameter(f"symbols has to be {EXPECTED['symbols']}, and of one at least")
            await getattr(self, f"_{command.op}")(command)
        except GatewayError as error:
            self.tell(_problem(error, number))

    async def _ping(self, command: Command) -> None:
        self.tell({"type": "pong", "id": command.id, "sent_at": time.time_ns() // 1_000_000})

    async def _list(self, command: Command) -> None:
        self.tell({"type": "list", "id": command.id, "streams": [self._described(want) for want in self.wants]})

    def _described(self, want: Subscription) -> dict[str, Any]:
        exchanges = [feed.topic.exchange for feed in self.wants[want]]
        about: dict[str, Any] = {"channel": want.channel, "symbol": want.symbol, "exchange": want.exchange or None}
        return about | ({"levels": want.levels} if want.levels else {}) | {"from": exchanges}

    async def _subscribe(self, command: Command) -> None:
        self._each(command, "subscribed", self._begin)

    async def _unsubscribe(self, command: Command) -> None:
        self._each(command, "unsubscribed", self._end)

    def _each(self, command: Command, done: str, work: Callable[[Subscription], None]) -> None:
        """Do it for each symbol, and tell for which it was done. A wrong one costs as much as a message."""
        found: list[str] = []
        errors: dict[str, Any] = {}
        for symbol in command.symbols:
            try:
                want = self._streams.want(command.channel, symbol, command.exchange, command.levels)
                work(want)
                found.append(want.symbol)
            except GatewayError as error:
                if len(command.symbols) == 1:
                    raise
                self._tokens -= 1
                errors[symbol] = error.problem()
        answer = {"type": done, "id": command.id, "channel": command.channel}
        self.tell(answer | {"symbols": found, "errors": errors})

    def _begin(self, want: Subscription) -> None:
        topics = self._streams.find(want)
        if want in self.wants:
            return
        most, have = self._streams.settings.stream_max_subscriptions, sum(self._sizes.values())
        if have + len(topics) > most:
            told = f"{have} streams are subscribed to, {most} are allowed (STREAM_MAX_SUBSCRIPTIONS)"
            raise TooManySubscriptions(f"{told}; `all` counts each exchange; unsubscribe some")
        self._streams.subscribe(self, want, topics)  # it says nothing before this message is answered
        self._sizes[want] = len(topics)

    def _end(self, want: Subscription) -> None:
        if not self._streams.unsubscribe(self, want):
            told = "channel, exchange and levels have to be those of the subscription; `list` shows them"
            raise InvalidParameter(f"{want.symbol} is not subscribed to so: {told}", symbol=want.symbol)
        del self._sizes[want]


async def serve(websocket: WebSocket, gate: Gate, streams: StreamHub) -> None:
    """Serve one connection from its handshake to its end."""
    server = websocket.scope.get("virtuoso.server")
    gateway: Gateway = websocket.state.gateway
    refusal = await _refusal(websocket, gate, gateway)
    await websocket.accept()
    try:
        if refusal is not None:
            raise refusal
        client = Socket(websocket, _bound(server), streams, gate.client_of(websocket.scope))
        streams.join(client)
    except GatewayError as error:
        code = {Unauthorized: POLICY, OriginRefused: POLICY, InternalError: FAILED}.get(type(error), TRY_AGAIN)
        await websocket.send_text(orjson.dumps(_problem(error)).decode())
        await websocket.close(code, error.code)
        return
    try:
        await client.serve()
    except TimeoutError:
        client.close(NORMAL, f"idle for {IDLE_SECONDS:g} s: subscribe to something")
    except (WebSocketDisconnect, RuntimeError):
        pass  # it is gone
    finally:
        streams.leave(client)


async def _refusal(websocket: WebSocket, gate: Gate, gateway: Gateway) -> GatewayError | None:
    """Return why a connection may not be: its key, its limit, or its origin."""
    headers = websocket.headers
    origin, allowed = headers.get("origin"), gateway.settings.cors_origins
    if origin is not None and not _is_own(origin, headers.get("host", "")) and not {origin, "*"} & set(allowed):
        return OriginRefused("the gateway lets pages of its own origin connect, and those in CORS_ORIGINS")
    try:
        if not gate.open:
            await gate.admit(websocket.scope, gateway.store)
    except GatewayError as error:
        return error
    return None


def _is_own(origin: str, host: str) -> bool:
    """Whether a page comes from where it connects to; a proxy may have taken the port off the Host header."""
    came = origin.partition("://")[2]
    return came == host or came.rpartition(":")[0] == host


def _bound(server: Any) -> asyncio.Transport:
    """Bound what the server reads of one message, and what the kernel holds back; returns the way to the client."""
    transport = way_to(server, SEND_BUFFER_BYTES)
    server.conn.max_message_size = MAX_MESSAGE_BYTES
    return transport


def frame(payload: bytes) -> bytes:
    """Return a text message as one unmasked frame (RFC 6455 section 5.2)."""
    size = len(payload)
    if size < 126:
        return b"\x81%c%b" % (size, payload)
    if size < 65_536:
        return b"\x81\x7e" + struct.pack("!H", size) + payload
    return b"\x81\x7f" + struct.pack("!Q", size) + payload


def closing_frame(code: int, reason: str) -> bytes:
    """Return the frame that ends a connection (RFC 6455 section 5.5.1)."""
    body = struct.pack("!H", code) + reason.encode()
    return b"\x88%c%b" % (len(body), body)


def _framed(_: str, __: int, payload: bytes) -> bytes:
    return frame(payload)


def _read(text: str | bytes) -> dict[str, Any]:
    try:
        document = orjson.loads(text)
    except orjson.JSONDecodeError:
        document = None
    if not isinstance(document, dict):
        raise MalformedRequest('send a JSON object, such as {"op":"ping"}')
    return document


def _understand(document: dict[str, Any]) -> Command:
    try:
        return Command.model_validate(document)
    except ValidationError as error:
        name = str(error.errors()[0]["loc"][0])
        told = f"has to be {EXPECTED[name]}" if name in EXPECTED else f"is no member; those are {', '.join(EXPECTED)}"
        raise InvalidParameter(f"{name} {told}") from None


def _problem(error: GatewayError, number: object = None) -> dict[str, Any]:
    return {"type": "error", "id": number, **{f: v for f, v in error.problem().items() if f != "type"}}
