"""Around every request: an id, the measurements, the bounds, and the gate. Pure ASGI, no framework."""

import logging
import re
import time
from functools import lru_cache

from prometheus_client import Counter, Histogram
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from src.core import errors, metrics
from src.core.logs import new_request_id, request_id
from src.web.gate import Gate
from src.web.responses import problem

log = logging.getLogger(__name__)

MAX_URL_BYTES = 8192  # a batch of 100 symbols of the longest kind is half of it
MAX_HEADER_BYTES = 32768  # what nginx takes by default: four buffers of 8 KB
METHODS = frozenset({"GET", "HEAD", "POST", "OPTIONS", "PUT", "PATCH", "DELETE"})
OPEN_PATHS = (  # probes and browsers; /admin has its token, and the page asks for its data with a key
    "/health", "/metrics", "/docs", "/openapi.json", "/admin", "/mobile", "/static/",
)  # fmt: skip
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
            scope = {**scope, "method": "GET", "is_head": True}

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
            path = "/openapi.json" if scope["path"] == "/openapi.json" else "unmatched"  # it has no template
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


def _refusal(scope: Scope, headers: Headers) -> errors.GatewayError | None:
    if len(scope.get("raw_path", b"")) + len(scope["query_string"]) > MAX_URL_BYTES:
        return errors.UriTooLong(f"path and query are longer than {MAX_URL_BYTES} bytes; ask for fewer symbols at once")
    if sum(len(name) + len(value) for name, value in headers.raw) > MAX_HEADER_BYTES:
        return errors.HeadersTooLarge(f"the headers are longer than {MAX_HEADER_BYTES} bytes")
    if not scope["path"].isprintable():  # also because the router would overlook a line feed at the end
        return errors.MalformedRequest("the path has control characters in it")
    if "host" not in headers and scope["http_version"] == "1.1":
        return errors.MalformedRequest("HTTP/1.1 asks for a Host header (RFC 9112 section 3.2)")
    return None


class Access:
    """Sends away whom the gate does not let in; health, metrics, docs and the page's files are open."""

    def __init__(self, app: ASGIApp, gate: Gate) -> None:
        self.app = app
        self._gate = gate

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope.get("path", "/")  # a lifespan has none
        if self._gate.open or scope["type"] != "http" or path == "/" or path.startswith(OPEN_PATHS):
            await self.app(scope, receive, send)
            return
        try:
            limits = await self._gate.admit(scope, scope["state"]["gateway"].store)
        except (errors.Unauthorized, errors.TooManyFailedLogins) as error:
            await problem(error)(scope, receive, send)
            return
        except errors.TooManyRequests as error:
            await problem(error, self._gate.refused(error.retry_after or 0))(scope, receive, send)
            return

        async def limited(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(limits)
            await send(message)

        await self.app(scope, receive, limited if limits else send)
