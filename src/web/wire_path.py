"""Answers known requests by their bytes, in front of uvicorn's protocol.

Bots repeat the same bytes on connections that they keep open. After the first answer of a
connection from memory, a `WireProtocol` takes the place of uvicorn's protocol. A read that holds
exactly one known request is answered here, from the same cache and by the same functions as in the
fast path. Everything else is passed on unchanged and at once, so uvicorn's parser never misses a
part of a message. A request is known if the fast path has answered the same bytes before, so that
uvicorn's parser decides what they mean.

This depends on internals of uvicorn's protocol for httptools: see `uvicorn_edge`. With another
server, another version, h11, `--limit-concurrency` or the log level DEBUG it is not active.
"""

import asyncio
from time import perf_counter
from typing import Any

from starlette.types import Scope

from src.cache.entry import Entry
from src.core import metrics
from src.core.logs import new_request_id
from src.web import uvicorn_edge
from src.web.fast_path import FastPath, KnownRequest, RequestTable
from src.web.responses import FLOAT_ERROR_SECONDS, HeaderFields, Recipe

MAX_REQUEST_BYTES = 2048  # a batch of 100 symbols has 1,200 bytes, a browser's header 600
MAX_JOINED_BYTES = 65_536  # longer bodies are written without a copy


class WirePath:
    """The requests that are known by their bytes, of all connections.

    They are at most as many as the fast path knows, of `MAX_REQUEST_BYTES` each.
    """

    def __init__(self, front: FastPath) -> None:
        self.table: RequestTable[bytes, KnownRequest] = RequestTable(front.size)
        self._front = front
        self._seen: set[int] = set()  # hashes of requests that came once

    def learn(self, scope: Scope, request: KnownRequest) -> None:
        """Remember a request that the fast path answers, and prepare its connection for others."""
        cycle = uvicorn_edge.server_of(scope)
        transport = getattr(cycle, "transport", None)
        if transport is None or not cycle.keep_alive:
            return
        protocol = transport.get_protocol()
        if isinstance(protocol, WireProtocol):
            data = protocol.take_request()
            if data and _is_repeatable(cycle, request, len(data)) and self._was_seen(data):
                self.table.add(data, request)
        elif uvicorn_edge.is_tested_protocol(protocol):
            transport.set_protocol(WireProtocol(self, protocol, scope))

    def _was_seen(self, data: bytes) -> bool:
        """Return True if the same bytes came before."""
        number = hash(data)
        if number in self._seen:
            return True
        if len(self._seen) >= self._front.size:
            self._seen.clear()
        self._seen.add(number)
        return False

    def answer(
        self, request: KnownRequest, scope: Scope, defaults: HeaderFields
    ) -> tuple[int, list[bytes]] | None:
        """Return the status and the bytes of an answer, or None if the fast path has none.

        `defaults` are the header fields that the server adds. It makes a new list every second.
        """
        started = perf_counter()
        hit = self._front.find(request, scope)
        if hit is None:
            return None
        request.was_used = True
        recipe, entries, limit_fields = hit
        entry = recipe.answer(entries, request.headers)
        now = self._front.clock.monotonic()
        status, head = self._find_head(request, recipe, entry, defaults, now)
        pieces = [head]
        for name, value in limit_fields:
            pieces += (name, b": ", value, b"\r\n")
        pieces += (b"x-request-id: ", new_request_id().encode(), b"\r\n\r\n")
        if status == 200:
            pieces.append(entry.body)
        age = max(0.0, now - entry.born)
        seconds = perf_counter() - started
        metrics.hits[recipe.route].count(status, age, seconds, len(entries))
        return status, pieces

    def _find_head(
        self,
        request: KnownRequest,
        recipe: Recipe,
        entry: Entry,
        defaults: HeaderFields,
        now: float,
    ) -> tuple[int, bytes]:
        """Return the status and the head of an answer, without the fields of this answer only.

        The head of a whole answer is kept with its entry, until one of its fields changes.
        """
        version = recipe.count()
        is_conditional = b"if-none-match" in request.headers
        until, known_defaults, known_version, head = entry.head
        is_same = known_defaults is defaults and known_version == version
        if is_same and now < until and not is_conditional:
            return 200, head
        status, fields = self._front.respond(recipe, entry, request.headers)
        head = _dump(status, defaults, fields)
        if not is_conditional:
            entry.head = (_end_of_second(entry, now), defaults, version, head)
        return status, head


def _end_of_second(entry: Entry, now: float) -> float:
    """Return until when the age and the remaining freshness of an answer are the same seconds."""
    age = now - entry.born
    if age < 0:
        return now
    left = entry.ttl - age + FLOAT_ERROR_SECONDS
    return now + min(1 - age % 1, left % 1) - FLOAT_ERROR_SECONDS


def _dump(status: int, defaults: HeaderFields, fields: HeaderFields) -> bytes:
    """Return the head of an answer as uvicorn writes it, without its end."""
    lines = [uvicorn_edge.status_line(status)]
    for name, value in (*defaults, *fields):
        lines += (name.lower(), b": ", value, b"\r\n")
    return b"".join(lines)


def _is_repeatable(cycle: Any, request: KnownRequest, length: int) -> bool:
    """Return True if equal bytes on other connections mean the same, and have no unique field."""
    names = {name for name, _ in cycle.scope["headers"]}
    is_known_per_peer = cycle.access_log and b"x-forwarded-for" in names
    return (
        length <= MAX_REQUEST_BYTES
        and not {b"upgrade", b"x-request-id"} & names
        and not is_known_per_peer
    )


class WireProtocol(asyncio.Protocol):
    """Stands in front of uvicorn's protocol of one connection."""

    def __init__(self, path: WirePath, inner: Any, scope: Scope) -> None:
        self._path = path
        self._inner = inner
        self._scope = scope
        self._loop = asyncio.get_running_loop()
        self._idle_scope: object = None  # of the last request, after its answer was complete
        self._request = b""  # the last read, if the connection was idle before
        self._answered_at = 0.0
        inner.timeout_keep_alive_handler = self._on_keep_alive_timeout

    def data_received(self, data: bytes) -> None:
        """Answer one known request, or pass the data on."""
        inner = self._inner
        if inner.scope is self._idle_scope or self._is_idle():
            request = self._path.table.get(data)
            if request is not None and self._answer(request):
                return
            self._request = data
        else:
            self._request = b""
        inner.data_received(data)

    def _is_idle(self) -> bool:
        """Return True if uvicorn's parser is between two requests, and all are answered."""
        inner = self._inner
        cycle = inner.cycle
        if cycle.scope is not inner.scope or not cycle.response_complete or cycle.more_body:
            return False
        if inner.pipeline or inner.limit_concurrency is not None or not cycle.keep_alive:
            return False
        if any(name == b"upgrade" for name, _ in cycle.scope["headers"]):
            return False
        self._idle_scope = inner.scope
        return True

    def _answer(self, request: KnownRequest) -> bool:
        inner = self._inner
        transport = inner.transport
        if inner.flow.write_paused or transport.is_closing():
            return False
        answer = self._path.answer(request, self._scope, inner.server_state.default_headers)
        if answer is None:
            return False
        status, pieces = answer
        inner.server_state.total_requests += 1
        if inner.access_log:
            uvicorn_edge.log_access(inner, *request.target, status)
        if len(pieces[-1]) > MAX_JOINED_BYTES:
            transport.write(b"".join(pieces[:-1]))
            transport.write(pieces[-1])
        else:
            transport.write(b"".join(pieces))
        self._answered_at = self._loop.time()
        return True

    def take_request(self) -> bytes:
        """Return the bytes of the request that is answered now. Empty if they are not known.

        The counts exclude other messages in the same read: each line ends with CR LF, and only the
        last one is empty.
        """
        data, self._request = self._request, b""
        is_single = data.endswith(b"\r\n\r\n") and data.count(b"\r\n\r\n") == 1
        if not is_single or not data.startswith(b"GET "):
            return b""
        return data if data.count(b"\r") == data.count(b"\n") == data.count(b"\r\n") else b""

    def _on_keep_alive_timeout(self) -> None:
        """Close the connection if it was idle for long enough since the last answer from here."""
        inner = self._inner
        left = self._answered_at + inner.timeout_keep_alive - self._loop.time()
        if left > 0:
            handle = self._loop.call_later(left, self._on_keep_alive_timeout)
            inner.timeout_keep_alive_task = handle
        else:
            type(inner).timeout_keep_alive_handler(inner)

    def eof_received(self) -> bool | None:
        """Pass the end of the client's data on."""
        result: bool | None = self._inner.eof_received()
        return result

    def connection_lost(self, exc: Exception | None) -> None:
        """Pass the end of the connection on."""
        self._inner.connection_lost(exc)

    def pause_writing(self) -> None:
        """Pass on that the client reads too slowly."""
        self._inner.pause_writing()

    def resume_writing(self) -> None:
        """Pass on that the client has caught up."""
        self._inner.resume_writing()
