"""ASGI middleware around every request: request id, metrics, size limits, access control."""

import logging
import re
import time
from functools import lru_cache

from prometheus_client import Counter, Histogram
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from src.core import errors, metrics
from src.core.logs import new_request_id, request_id
from src.web.gate import Gate, limit_headers
from src.web.responses import problem

log = logging.getLogger(__name__)

MAX_URL_BYTES = 8192  # twice the length of a batch of 100 of the longest symbols
MAX_HEADER_BYTES = 32768  # nginx accepts as much by default: four buffers of 8 KB
METHODS = frozenset({"GET", "HEAD", "POST", "OPTIONS", "PUT", "PATCH", "DELETE"})
# Probes and pages need no key. /admin has its own token; the page sends a key for its data.
OPEN_PATHS = ("/health", "/metrics", "/docs", "/openapi.json", "/admin", "/mobile", "/static/")
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


class Observe:
    """Outermost middleware: adds header fields, refuses oversized requests, records metrics.

    The fields are the request id, and those of the client's limit, which `Access` leaves in the
    state of the request.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request and record its answer by route template."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        status = 500
        started = time.perf_counter()
        request_id.set(valid_request_id(headers.get("x-request-id", "")))
        method = scope["method"]
        if method == "HEAD":  # answered as GET; the server drops the body
            scope = {**scope, "method": "GET", "is_head": True}

        async def send_observed(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                added = MutableHeaders(scope=message)
                added["X-Request-ID"] = request_id.get()
                added.update(scope.get("state", {}).pop("limit_headers", {}))
            await send(message)

        metrics.in_progress.count += 1
        try:
            error = _find_fault(scope, headers)
            app = self.app if error is None else problem(error, scope["path"])
            await app(scope, receive, send_observed)
        finally:
            metrics.in_progress.count -= 1
            _record(scope, method, status, time.perf_counter() - started)


def _record(scope: Scope, method: str, status: int, seconds: float) -> None:
    path = scope["path"]
    unmatched = path if path == "/openapi.json" else "unmatched"  # that route has no template
    route = getattr(scope.get("route"), "path_format", unmatched)
    counter, histogram = _metrics_of(route, method if method in METHODS else "OTHER", status)
    counter.inc()
    histogram.observe(seconds)
    extra = {"method": method, "path": path, "status": status, "seconds": seconds}
    log.debug("request", extra=extra)


@lru_cache(1024)  # more than all combinations of routes, methods and statuses
def _metrics_of(route: str, method: str, status: int) -> tuple[Counter, Histogram]:
    """Return the metrics of one kind of answer; looking up labels is slow."""
    counter = metrics.http_requests_total.labels(route, method, str(status))
    return counter, metrics.http_request_duration_seconds.labels(route)


def valid_request_id(given: str) -> str:
    """Return the client's request id if it is valid, otherwise a new one."""
    return given if given and _REQUEST_ID.fullmatch(given) else new_request_id()


def _find_fault(scope: Scope, headers: Headers) -> errors.GatewayError | None:
    if len(scope.get("raw_path", b"")) + len(scope["query_string"]) > MAX_URL_BYTES:
        return errors.UriTooLong(f"path and query exceed {MAX_URL_BYTES} bytes; send fewer symbols")
    if sum(len(name) + len(value) for name, value in headers.raw) > MAX_HEADER_BYTES:
        return errors.HeadersTooLarge(f"the headers exceed {MAX_HEADER_BYTES} bytes; send fewer")
    if not scope["path"].isprintable():  # the router would ignore a line feed at the end
        return errors.MalformedRequest("the path contains control characters; remove them")
    if "host" not in headers and scope["http_version"] == "1.1":
        return errors.MalformedRequest("the Host header is missing; send it (RFC 9112 section 3.2)")
    return None


class Access:
    """Middleware that checks keys and client limits, except for `OPEN_PATHS`."""

    def __init__(self, app: ASGIApp, gate: Gate) -> None:
        self.app = app
        self._gate = gate

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on if the gate admits it, otherwise answer with the problem."""
        path = scope.get("path", "/")  # a lifespan has none
        is_open = path == "/" or path.startswith(OPEN_PATHS)
        if self._gate.open or scope["type"] != "http" or is_open:
            await self.app(scope, receive, send)
            return
        app = self.app
        state = scope["state"]
        try:
            state["limit_headers"] = await self._gate.admit(scope, state["gateway"].store)
        except errors.GatewayError as error:
            if type(error) is errors.TooManyRequests:  # not its subclass for failed logins
                state["limit_headers"] = limit_headers(self._gate.limit, 0, error.retry_after or 0)
            app = problem(error, path)
        await app(scope, receive, send)
