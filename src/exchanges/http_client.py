"""The HTTP session under ccxt: bodies are bounded, redirects refused, and the answer's status can be asked for.

ccxt keeps the last status and headers in attributes all tasks share, and reads any body to its end. Here each task
finds its own answer in a context variable.
"""

import ssl
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache

import aiohttp
import certifi

MAX_DATA_BYTES = 4 * 1024 * 1024  # a list of 419 tickers was 0.12 MB: room for thirty times that
MAX_MARKETS_BYTES = 64 * 1024 * 1024  # a list of 1,695 markets was 1.9 MB, and what a market tells of itself grows


@dataclass(slots=True)
class Answer:
    """What one call brought back; `max_bytes` is set by the caller, the rest by the session."""

    max_bytes: int = MAX_DATA_BYTES
    status: int | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    is_json: bool = False
    says_too_frequent: bool = False  # how bybit's 403 for a limit differs from its 403 for a country


answer: ContextVar[Answer] = ContextVar("answer")


class AnswerRefused(aiohttp.ClientPayloadError):
    """The answer is one we do not take; the text is ours and may be shown."""


class BoundedResponse(aiohttp.ClientResponse):
    """Reads no more than the task's answer allows."""

    async def read(self) -> bytes:
        """Return the body; raises `AnswerRefused` when it is longer than allowed."""
        if self._body is None:
            body, mine = bytearray(), answer.get()
            async for chunk in self.content.iter_any():
                body += chunk
                if len(body) > mine.max_bytes:
                    self.close()
                    raise AnswerRefused("its body is too long")
            self._body = bytes(body)
            text = self._body.strip()
            mine.is_json = text[:1] + text[-1:] in (b"{}", b"[]")
            mine.says_too_frequent = b"too frequent" in text[:1000].lower()
        return await super().read()


async def _note_status(request: aiohttp.ClientRequest, handler: aiohttp.ClientHandlerType) -> aiohttp.ClientResponse:
    response = await handler(request)
    mine = answer.get()
    mine.status, mine.headers = response.status, response.headers
    if 300 <= response.status < 400:  # an exchange's API has no reason to send us elsewhere
        response.close()
        raise AnswerRefused("it sent a redirect")
    return response


async def _refuse_redirect(
    request: aiohttp.ClientRequest, handler: aiohttp.ClientHandlerType
) -> aiohttp.ClientResponse:
    response = await handler(request)
    if 300 <= response.status < 400:
        response.close()
        raise AnswerRefused("it sent a redirect")
    return response


@cache
def tls_context() -> ssl.SSLContext:
    """Return the TLS context that all clients share: building one blocks the event loop for 16 ms or more."""
    return ssl.create_default_context(cafile=certifi.where())


def open_session(max_connections: int) -> aiohttp.ClientSession:
    """Open a session; it has no cookies, and no timeouts of its own as every call carries a deadline."""
    connector = aiohttp.TCPConnector(ssl=tls_context(), limit=max_connections, happy_eyeballs_delay=0.25)
    return aiohttp.ClientSession(
        connector=connector,
        cookie_jar=aiohttp.DummyCookieJar(),
        response_class=BoundedResponse,
        middlewares=(_note_status,),
    )


def open_socket_session() -> aiohttp.ClientSession:
    """Open a session for WebSockets, of which there are as many as there are exchanges, kinds and types of market."""
    connector = aiohttp.TCPConnector(ssl=tls_context(), happy_eyeballs_delay=0.25)
    return aiohttp.ClientSession(
        connector=connector, cookie_jar=aiohttp.DummyCookieJar(), middlewares=(_refuse_redirect,)
    )
