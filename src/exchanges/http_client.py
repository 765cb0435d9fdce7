"""The HTTP sessions that ccxt uses: bodies are bounded and redirects are refused.

ccxt keeps the last status and headers in attributes that all tasks share, and reads bodies of any
length. Here each task finds its own `Answer` in a context variable.
"""

import re
import ssl
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from functools import cache

import aiohttp
import certifi

MAX_DATA_BYTES = 4 * 1024 * 1024  # a list of 419 tickers has 0.12 MB
MAX_MARKETS_BYTES = 64 * 1024 * 1024  # a list of 1,695 markets has 1.9 MB, and descriptions grow
MAX_SOCKETS = 100
MAX_DIFFERENCE_SECONDS = 3600.0  # a Date further from our clock is wrong: a cache may have sent it
BODY_START_BYTES = 4000  # Cloudflare's page has its code after 1,500 bytes
BODY_END_BYTES = 100  # Bybit's time is in the last 21 bytes


@dataclass(slots=True)
class Answer:
    """The response to one call. The caller sets `max_bytes`, the session sets the rest."""

    max_bytes: int = MAX_DATA_BYTES
    status: int | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    is_json: bool = False
    body_start: bytes = b""
    """Beginning of the body, in lower case."""
    body_end: bytes = b""

    def server_time(self, pattern: bytes, now: float) -> int | None:
        """Return when the server answered, in UTC milliseconds of its clock.

        The group of `pattern` in the end of the body is the time. Without a pattern it is the
        Date header, which has whole seconds. `now` is in UTC seconds. None if there is no time, or
        if it is too far from `now`: a cache may have sent it.
        """
        seconds = parse_date(self.headers.get("Date", ""))
        if pattern:
            found = re.search(pattern, self.body_end)
            seconds = int(found[1]) / 1000 if found else 0.0
        return round(seconds * 1000) if abs(seconds - now) < MAX_DIFFERENCE_SECONDS else None


answer: ContextVar[Answer | None] = ContextVar("answer", default=None)


def parse_date(date: str) -> float:
    """Return the UTC seconds of a Date header, 0 if it has none."""
    try:
        return parsedate_to_datetime(date).timestamp()
    except (TypeError, ValueError):
        return 0.0


def clock_difference(date: str, sent: float, received: float) -> float:
    """Return the seconds by which a server's clock is ahead of ours. 0 if it may be the same.

    `date` is the response's Date header, which has whole seconds. `sent` and `received` are UTC
    seconds of our clock.
    """
    second = parse_date(date)
    ahead = min(max(0.0, second - received), second + 1 - sent)
    return ahead if abs(ahead) < MAX_DIFFERENCE_SECONDS else 0.0


class AnswerRefused(aiohttp.ClientPayloadError):
    """A response that is not accepted. Its text is ours and may be shown to clients."""


class BoundedResponse(aiohttp.ClientResponse):
    """A response that reads no more than the answer of the task allows."""

    async def read(self) -> bytes:
        """Return the body. Raises `AnswerRefused` if it is longer than allowed."""
        if self._body is None:
            current = answer.get() or Answer()
            body = bytearray()
            async for chunk in self.content.iter_any():
                body += chunk
                if len(body) > current.max_bytes:
                    self.close()
                    raise AnswerRefused("its response is too long")
            self._body = bytes(body)
            text = self._body.strip()
            current.is_json = text[:1] + text[-1:] in (b"{}", b"[]")
            current.body_start = text[:BODY_START_BYTES].lower()
            current.body_end = text[-BODY_END_BYTES:]
        return await super().read()


async def _record_and_refuse_redirects(
    request: aiohttp.ClientRequest, handler: aiohttp.ClientHandlerType
) -> aiohttp.ClientResponse:
    response = await handler(request)
    current = answer.get() or Answer()
    current.status = response.status
    current.headers = response.headers
    if 300 <= response.status < 400:  # an exchange's API does not move
        response.close()
        raise AnswerRefused("it sent a redirect")
    return response


@cache
def tls_context() -> ssl.SSLContext:
    """Return the shared TLS context. Creating one blocks the event loop for 16 ms or more."""
    return ssl.create_default_context(cafile=certifi.where())


def open_session(
    max_connections: int, response_class: type[aiohttp.ClientResponse] = BoundedResponse
) -> aiohttp.ClientSession:
    """Open a session without cookies. It has no timeouts, because every call has a deadline."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(
            ssl=tls_context(), limit=max_connections, happy_eyeballs_delay=0.25
        ),
        cookie_jar=aiohttp.DummyCookieJar(),
        response_class=response_class,
        middlewares=(_record_and_refuse_redirects,),
    )


def open_socket_session() -> aiohttp.ClientSession:
    """Open a session for WebSockets: one per exchange, kind of data and market type."""
    return open_session(MAX_SOCKETS, aiohttp.ClientResponse)
