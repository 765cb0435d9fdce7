"""Every use of uvicorn's internals, each with a slower alternative for other servers and protocols.

Tested with uvicorn 0.54, httptools 0.9, h11 0.16 and websockets 17.4. `check_server` looks for the
internals at startup and logs one warning if some are missing.

| Internal | Used for | Without it |
|---|---|---|
| object that owns the ASGI `send` | finding `transport` and `conn` | see below |
| its `transport`, HTTP | peer address, small kernel buffer, cutting off slow clients | \
`scope["client"]`; a slow `/stream` client keeps its connection, but gets no more updates |
| its `transport`, WebSocket | writing ready frames | `PlainTransport`: ASGI messages |
| its `conn.max_message_size` | refusing a large message before it is in memory | \
uvicorn's `ws_max_size`; `/ws` refuses the message after it is read |
| its protocol for httptools, HTTP | answering known requests by their bytes: see `wire_path` | \
each request is parsed |
| handlers of SIGTERM and SIGINT | notifying streaming clients before connections close | \
uvicorn closes the connections without notice |
"""

import asyncio
import logging
import signal
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from typing import Any
from urllib.parse import quote, unquote

from starlette.types import Scope
from starlette.websockets import WebSocket, WebSocketDisconnect

from src.core.background import report_error

log = logging.getLogger(__name__)

TESTED_VERSION = "0.54.0"  # of uvicorn; wire_path uses more internals than the others
SEND = "virtuoso.send"  # member of the scope with the ASGI `send` of the server itself
FINISH_SECONDS = 5.0
CLOSE_OPCODE = 0x88  # first byte of a close frame (RFC 6455 section 5.2)


def server_of(scope: Scope) -> Any:
    """Return the server's object for this connection, or None if the server does not expose it."""
    return getattr(scope.get(SEND), "__self__", None)


def transport_of(scope: Scope, send_buffer: int) -> asyncio.Transport | None:
    """Return the transport of a connection, or None if the gateway must not write to it.

    The kernel then buffers at most `send_buffer` bytes: buffered updates are outdated.

    Frames may be written to a WebSocket's transport only if the server adds none of its own in
    between. That was tested with uvicorn's `websockets-sansio` protocol.
    """
    server = server_of(scope)
    if scope["type"] == "websocket" and not _has_message_limit(server):
        return None
    transport: asyncio.Transport | None = getattr(server, "transport", None)
    raw_socket = None if transport is None else transport.get_extra_info("socket")
    if raw_socket is not None:
        with suppress(OSError):  # the socket may already be closed
            raw_socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
    return transport


def _has_message_limit(server: Any) -> bool:
    return hasattr(getattr(server, "conn", None), "max_message_size")


def limit_message_size(scope: Scope, size: int) -> None:
    """Limit one message of a WebSocket client to `size` bytes, where the server supports it."""
    server = server_of(scope)
    if _has_message_limit(server):
        server.conn.max_message_size = size


def peer_of(scope: Scope) -> str:
    """Return the address of the other end of the connection.

    `scope["client"]` may come from X-Forwarded-For, as uvicorn trusts local proxies by default.
    """
    transport = getattr(server_of(scope), "transport", None)
    peer = scope.get("client") if transport is None else transport.get_extra_info("peername")
    return peer[0] if isinstance(peer, tuple | list) else "unknown"


def is_tested_protocol(protocol: object) -> bool:
    """Return True if this is the protocol for HTTP/1.1 whose internals `wire_path` uses."""
    return type(protocol) is _find_tested_protocol()


@cache
def _find_tested_protocol() -> type | None:
    try:
        import uvicorn  # another server may run the app
        from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
    except ImportError:
        return None
    return HttpToolsProtocol if uvicorn.__version__ == TESTED_VERSION else None


def status_line(status: int) -> bytes:
    """Return the first line of an answer as uvicorn writes it."""
    from uvicorn.protocols.http.httptools_impl import STATUS_LINE

    return STATUS_LINE[status]


def log_access(protocol: Any, path: bytes, query: bytes, status: int) -> None:
    """Write the line of uvicorn's access log for an answer to a GET request."""
    client = ":".join(map(str, protocol.client or ()))
    target = quote(unquote(path.decode("ascii")))
    if query:
        target = f"{target}?{query.decode('ascii')}"
    line = '%s - "%s %s HTTP/%s" %d'
    protocol.access_logger.info(line, client, "GET", target, "1.1", status)


def check_server(scope: Scope) -> None:
    """Log one warning if the server lacks internals. `scope` is that of the lifespan."""
    config = getattr(server_of(scope), "config", None)
    missing = []
    if not hasattr(_protocol(config, "http_protocol_class"), "transport"):
        missing.append("http transport")
    if not _has_message_limit(_protocol(config, "ws_protocol_class")):
        missing.append("websocket frames")
    if missing:
        text = "this server lacks internals that the gateway uses; it works, but streams are slower"
        log.warning(text, extra={"missing": ", ".join(missing)})


def _protocol(config: Any, name: str) -> Any:
    """Make an unconnected protocol object of the server, or return None if that is impossible."""
    try:
        from uvicorn.server import ServerState  # another server may run the app

        return getattr(config, name)(config=config, server_state=ServerState(), app_state={})
    except Exception:  # noqa: BLE001 - any failure means that the internals are not as tested
        return None


def call_before_shutdown(callback: Callable[[], None]) -> Callable[[], None]:
    """Call `callback` on SIGTERM or SIGINT, before uvicorn closes its connections.

    uvicorn closes connections before it ends the lifespan, so the lifespan would be too late.
    Returns a function that restores the previous signal handlers.
    """
    if threading.current_thread() is not threading.main_thread():
        return lambda: None  # only the main thread can handle signals
    loop = asyncio.get_running_loop()
    previous = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def stop(number: int) -> None:
        try:
            callback()
        except Exception as error:  # noqa: BLE001 - reported; it must not prevent the shutdown
            report_error("shutdown", error)
        handler = previous[signal.Signals(number)]
        if callable(handler):
            handler(number, None)  # uvicorn polls the result several times per second

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    for number in previous:
        signal.signal(number, lambda number, _: loop.call_soon_threadsafe(stop, number))
    return restore


class PlainTransport:
    """The methods of `asyncio.Transport` that `/ws` uses, over the messages of ASGI.

    `write` takes one complete, unmasked text or close frame at a time.
    """

    def __init__(self, websocket: WebSocket) -> None:
        self._websocket = websocket
        self._frames: asyncio.Queue[bytes] = asyncio.Queue()
        self._size = 0
        self._task = asyncio.create_task(self._send_frames())

    def is_closing(self) -> bool:
        """Return True if nothing can be sent any more."""
        return self._task.done()

    def get_write_buffer_size(self) -> int:
        """Return the number of bytes that the server has not taken yet."""
        return self._size

    def write(self, frame: bytes) -> None:
        """Send a frame after those that wait."""
        self._size += len(frame)
        self._frames.put_nowait(frame)

    def abort(self) -> None:
        """Stop sending. The server closes the connection when its own ping times out."""
        self._task.cancel()

    async def finish(self) -> None:
        """Send the waiting frames, within `FINISH_SECONDS`. Call it before the connection's end."""
        self._frames.put_nowait(b"")
        await asyncio.wait([self._task], timeout=FINISH_SECONDS)
        self._task.cancel()

    async def _send_frames(self) -> None:
        with suppress(WebSocketDisconnect, RuntimeError):  # the client is gone
            while frame := await self._frames.get():
                payload = _payload(frame)
                if frame[0] == CLOSE_OPCODE:
                    code = int.from_bytes(payload[:2])
                    await self._websocket.close(code, payload[2:].decode())
                    return
                await self._websocket.send_text(payload.decode())
                self._size -= len(frame)


def _payload(frame: bytes) -> bytes:
    """Return the payload of an unmasked frame (RFC 6455 section 5.2)."""
    extended_length_bytes = {126: 2, 127: 8}.get(frame[1], 0)
    return frame[2 + extended_length_bytes :]
