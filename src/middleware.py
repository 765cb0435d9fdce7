"""Around every request: an id, the measurements, the bounds, and who may ask how often. Pure ASGI, no framework."""

import hmac
import logging
import math
import re
import time
from functools import lru_cache

from cachetools import TTLCache
from prometheus_client import Counter, Histogram
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from config import Settings
from src import metrics
from src.clock import Clock
from src.errors import GatewayError, HeadersTooLarge, MalformedRequest, TooManyRequests, Unauthorized, UriTooLong
from src.logs import new_request_id, request_id
from src.rate_limiter import Window
from src.responses import problem

log = logging.getLogger(__name__)

MAX_URL_BYTES = 8192  # a batch of 100 symbols of the longest kind is half of it
MAX_HEADER_BYTES = 32768  # what nginx takes by default: four buffers of 8 KB
MAX_CLIENTS = 10_000  # clients counted at once; the least recently seen is forgotten first
CLIENT_WINDOW_SECONDS = 60
METHODS = frozenset({"GET", "HEAD", "POST", "OPTIONS", "PUT", "PATCH", "DELETE"})
OPEN_PATHS = ("/health", "/metrics", "/docs", "/openapi.json", "/admin")  # probes and browsers; /admin has its token
DOCUMENTS = frozenset({"/docs", "/openapi.json"})
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


class Observe:
    """Outermost: gives the request its id, counts and times the answer by route template, refuses what is too big."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers, status, started = Headers(scope=scope), 500, time.perf_counter()
        request_id.set(identify(headers.get("x-request-id", "")))
        method = scope["method"]
        if method == "HEAD":  # the server drops the body; everything else is that of a GET
            scope = {**scope, "method": "GET"}

        async def observed(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-ID"] = request_id.get()
            await send(message)

        metrics.in_progress.count += 1
        try:
            if (error := _refusal(scope, headers)) is not None:
                await problem(error)(scope, receive, observed)
            else:
                await self.app(scope, receive, observed)
        finally:
            metrics.in_progress.count -= 1
            path = scope["path"] if scope["path"] in DOCUMENTS else "unmatched"  # these have no template
            route = getattr(scope.get("route"), "path_format", path)
            elapsed = time.perf_counter() - started
            counter, histogram = _measured(route, method if method in METHODS else "OTHER", status)
            counter.inc()
            histogram.observe(elapsed)
            log.debug("request", extra={"method": method, "path": scope["path"], "status": status, "seconds": elapsed})


@lru_cache(1024)  # more than there are routes, methods and statuses
def _measured(route: str, method: str, status: int) -> tuple[Counter, Histogram]:
    """Return the metrics of one kind of answer, looked up once."""
    counter = metrics.http_requests_total.labels(route, method, str(status))
    return counter, metrics.http_request_duration_seconds.labels(route)


def identify(given: str) -> str:
    """Return the id of a request: the one it came with, if that is a plain one, else a new one."""
    return given if given and _REQUEST_ID.fullmatch(given) else new_request_id()


def _refusal(scope: Scope, headers: Headers) -> GatewayError | None:
    if len(scope.get("raw_path", b"")) + len(scope["query_string"]) > MAX_URL_BYTES:
        return UriTooLong(f"path and query are longer than {MAX_URL_BYTES} bytes; ask for fewer symbols at once")
    if sum(len(name) + len(value) for name, value in headers.raw) > MAX_HEADER_BYTES:
        return HeadersTooLarge(f"the headers are longer than {MAX_HEADER_BYTES} bytes")
    if not scope["path"].isprintable():  # also because the router would overlook a line feed at the end
        return MalformedRequest("the path has control characters in it")
    if "host" not in headers and scope["http_version"] == "1.1":
        return MalformedRequest("HTTP/1.1 asks for a Host header (RFC 9112 section 3.2)")
    return None


class Gate:
    """Lets in who has a key, as often as the limit allows; without keys or limit it lets everybody in."""

    def __init__(self, settings: Settings, clock: Clock) -> None:
        self.open = not settings.api_keys and not settings.client_rate_limit
        self._keys = {name: key.get_secret_value().encode() for name, key in settings.api_keys.items()}
        self._limit = settings.client_rate_limit
        self._clock = clock
        self._windows: TTLCache[str, Window] = TTLCache(MAX_CLIENTS, 2 * CLIENT_WINDOW_SECONDS, timer=clock.monotonic)

    def admit(self, key: str, scope: Scope) -> dict[str, str]:
        """Count a request that came with this key; returns the headers that tell what is left of the limit.

        Raises `Unauthorized`, or `TooManyRequests`, which counts as nothing.
        """
        client = self._identify(key, scope)
        return self._count(client) if self._limit else {}

    def _identify(self, given: str, scope: Scope) -> str:
        """Return who asks: the name of the key, or the address. Raises `Unauthorized`."""
        if not self._keys:
            return str((scope.get("client") or ("unknown",))[0])
        # Every key is compared, in constant time, so that time tells nothing.
        names = [name for name, key in self._keys.items() if hmac.compare_digest(given.encode(), key)]
        if not names:
            raise Unauthorized("send one of the configured keys in the header X-API-Key")
        return f"key:{names[0]}"

    def _count(self, client: str) -> dict[str, str]:
        """Count the request; returns the headers that tell what is left. Raises `TooManyRequests`."""
        window = self._windows.pop(client, None) or Window(self._limit, CLIENT_WINDOW_SECONDS, self._clock)
        self._windows[client] = window  # put back, so that who asks often is not who is forgotten
        if wait := window.wait_for(1):
            raise TooManyRequests(
                f"more than {self._limit} requests in {CLIENT_WINDOW_SECONDS} s; wait and ask again", retry_after=wait
            )
        window.add(1)
        return self.headers(self._limit - window.used(), window.wait_for(self._limit))

    def headers(self, left: int, seconds: float) -> dict[str, str]:
        """Return the headers that tell of the limit: how many requests are left, and when all of it is free again."""
        return {
            "RateLimit-Policy": f'"client";q={self._limit};w={CLIENT_WINDOW_SECONDS}',
            "RateLimit": f'"client";r={left};t={math.ceil(seconds)}',
        }


class Access:
    """Sends away whom the gate does not let in; health, metrics and docs are open, and /admin has its own token."""

    def __init__(self, app: ASGIApp, gate: Gate) -> None:
        self.app = app
        self._gate = gate

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"].startswith(OPEN_PATHS):
            await self.app(scope, receive, send)
            return
        try:
            limits = self._gate.admit(Headers(scope=scope).get("x-api-key", ""), scope)
        except Unauthorized as error:
            await problem(error)(scope, receive, send)
            return
        except TooManyRequests as error:
            await problem(error, self._gate.headers(0, error.retry_after or 0))(scope, receive, send)
            return

        async def limited(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(limits)
            await send(message)

        await self.app(scope, receive, limited if limits else send)
