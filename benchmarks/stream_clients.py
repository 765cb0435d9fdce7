"""Many WebSocket clients in one process, which only read and count messages."""

import asyncio
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from benchmarks.stalls import Stalls

GATEWAY_TIME = b'"timestamp":'  # the exchange's time in a message of the gateway
GATEWAY_MESSAGE = b'"sent_at":'  # once in each message of the gateway
EXCHANGE_TIME = b'"E":'  # the exchange's time, once in each message of binance
TIME_DIGITS = 13  # of a time in UTC milliseconds
CONNECTING_AT_ONCE = 50


@dataclass
class Received:
    """What all clients received. Times are UTC milliseconds."""

    messages: int = 0
    times: list[tuple[float, float]] = field(default_factory=list)
    """The exchange's time of a message, and when a client received it."""
    lost_connections: int = 0

    def latencies(self, stalls: Stalls) -> list[float]:
        """Return the latencies of messages that no stall of the machine delayed."""
        return [
            received - sent for sent, received in self.times if not stalls.overlap(sent, received)
        ]

    def reset(self) -> None:
        """Forget what was received."""
        self.messages = 0
        self.lost_connections = 0
        self.times.clear()


class StreamClient(asyncio.Protocol):
    """One client: does the handshake, sends its command and counts the messages."""

    def __init__(self, path: str, command: bytes, received: Received) -> None:
        self._path = path
        self._command = command
        self._received = received
        self.ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.transport: asyncio.Transport

    # The transport of uvloop is not a subclass of asyncio's.
    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        transport.write(
            b"GET %b HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n\r\n"
            % self._path.encode()
        )

    def data_received(self, data: bytes) -> None:
        now = time.time() * 1000
        if not self.ready.done() and not self._finish_handshake(data):
            return
        if GATEWAY_TIME in data:
            self._received.messages += data.count(GATEWAY_MESSAGE)
            self._note_time(data, GATEWAY_TIME, now)
        elif EXCHANGE_TIME in data:
            self._received.messages += data.count(EXCHANGE_TIME)
            self._note_time(data, EXCHANGE_TIME, now)

    def _finish_handshake(self, data: bytes) -> bool:
        """Send the command and return True, or fail if the server did not switch protocols."""
        if b" 101 " not in data:
            self.ready.set_exception(ConnectionError(data[:200].decode(errors="replace")))
            return False
        if self._command:
            self.transport.write(masked_frame(self._command))
        self.ready.set_result(None)
        return True

    def _note_time(self, data: bytes, mark: bytes, now: float) -> None:
        """Note the time after the last occurrence of `mark`. It may be incomplete in `data`."""
        begin = data.rfind(mark) + len(mark)
        digits = data[begin : begin + TIME_DIGITS]
        if digits.isdigit():
            self._received.times.append((int(digits), now))

    def connection_lost(self, exc: Exception | None) -> None:
        self._received.lost_connections += 1
        if not self.ready.done():
            self.ready.set_exception(exc or ConnectionError("closed"))


def masked_frame(payload: bytes) -> bytes:
    """Return a client's frame for a payload of less than 126 bytes (RFC 6455 section 5.2)."""
    mask = os.urandom(4)
    body = bytes(byte ^ mask[index % 4] for index, byte in enumerate(payload))
    return bytes((0x81, 0x80 | len(payload))) + mask + body


async def connect(
    url: str, command: bytes, count: int, received: Received
) -> Sequence[StreamClient]:
    """Connect clients, `CONNECTING_AT_ONCE` at a time, and return them."""
    parts = urlsplit(url)
    loop = asyncio.get_running_loop()
    clients: list[StreamClient] = []

    async def connect_one() -> StreamClient:
        _, client = await loop.create_connection(
            lambda: StreamClient(parts.path or "/", command, received),
            parts.hostname or "",
            parts.port or 80,
        )
        await client.ready
        return client

    while len(clients) < count:
        batch = min(CONNECTING_AT_ONCE, count - len(clients))
        clients += await asyncio.gather(*(connect_one() for _ in range(batch)))
    return clients
