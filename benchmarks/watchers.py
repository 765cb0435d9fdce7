"""Many clients of one stream in one process, each a socket that is read and nothing more."""

import asyncio
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from benchmarks.stalls import Stalls

MARKS = (b'"timestamp":', b'"E":')  # the exchange's time, in the gateway's messages and in the exchange's own
CONNECTING_AT_ONCE = 50


@dataclass
class Seen:
    """What all clients together received; times are UTC milliseconds, sent is the exchange's own time of a message."""

    messages: int = 0
    came: list[tuple[float, float]] = field(default_factory=list)  # when a message was sent and received
    lost: int = 0  # connections that ended

    def latencies(self, stalls: Stalls) -> list[float]:
        """Return the latencies of what was under way while the machine did not stand still."""
        return [received - sent for sent, received in self.came if not stalls.touch(sent, received)]


class Watcher(asyncio.Protocol):
    """One client: it shakes hands, sends what it wants, and notes when messages come."""

    def __init__(self, path: str, wants: bytes, seen: Seen) -> None:
        self._path, self._wants, self.seen = path, wants, seen
        self.ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.transport: asyncio.Transport

    def connection_made(self, transport: Any) -> None:  # uvloop's is none of asyncio's classes
        self.transport = transport
        transport.write(
            b"GET %b HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n\r\n" % self._path.encode()
        )

    def data_received(self, data: bytes) -> None:
        now = time.time() * 1000
        if not self.ready.done():
            if b" 101 " not in data:
                self.ready.set_exception(ConnectionError(data[:200].decode(errors="replace")))
                return
            if self._wants:
                self.transport.write(masked(self._wants))
            self.ready.set_result(None)
        seen = self.seen
        for mark in MARKS:
            at = data.rfind(mark)
            if at >= 0:
                seen.messages += data.count(mark) if mark == MARKS[1] else data.count(b'"sent_at":')
                told = data[at + len(mark) : at + len(mark) + 13]
                if told.isdigit():
                    seen.came.append((int(told), now))
                break

    def connection_lost(self, exc: Exception | None) -> None:
        self.seen.lost += 1
        if not self.ready.done():
            self.ready.set_exception(exc or ConnectionError("closed"))


def masked(payload: bytes) -> bytes:
    """Frame a message of less than 126 bytes as clients have to (RFC 6455 section 5.2)."""
    mask = os.urandom(4)
    body = bytes(byte ^ mask[at % 4] for at, byte in enumerate(payload))
    return bytes((0x81, 0x80 | len(payload))) + mask + body


async def connect(url: str, wants: bytes, count: int, seen: Seen) -> Sequence[Watcher]:
    """Connect so many clients, some at a time."""
    parts, loop = urlsplit(url), asyncio.get_running_loop()
    host, port = parts.hostname or "", parts.port or 80
    watchers: list[Watcher] = []
    while len(watchers) < count:
        some = min(CONNECTING_AT_ONCE, count - len(watchers))
        made = [
            loop.create_connection(lambda: Watcher(parts.path or "/", wants, seen), host, port) for _ in range(some)
        ]
        new = [protocol for _, protocol in await asyncio.gather(*made)]
        await asyncio.gather(*(one.ready for one in new))
        watchers += new
    return watchers
