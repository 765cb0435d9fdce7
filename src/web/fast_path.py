"""Answers repeated requests from memory, in front of the app.

Each answer of the app leaves a recipe: the cache keys that it was made from. When the same request
comes again, the fast path looks up these keys in the same cache, with the same order of exchanges
and breakers, and builds the header fields with the same functions. Every other request goes to the
app unchanged, so that no decision is made in two places.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter
from typing import TypeVar

from fastapi import FastAPI
from starlette.types import Receive, Scope, Send

from config import Settings
from src.cache.entry import Entry
from src.core import metrics
from src.core.clock import Clock
from src.gateway import Gateway
from src.web import uvicorn_edge
from src.web.gate import Gate, RawHeaders
from src.web.middleware import MAX_HEADER_BYTES, valid_request_id
from src.web.responses import HeaderFields, Recipe, content_headers, freshness, matches

REQUESTS_PER_ENTRY = 2  # remembered requests per entry in memory: a symbol has several spellings
MAX_REQUEST_BYTES = 256  # path and query of a request for a single value
MAX_BATCHES = 64  # each keeps its body: about 45 KB for 100 symbols, 135 KB with `exchange=all`
MAX_BATCH_BYTES = 4096  # path and query of a batch request
MAX_SECOND_CHANCES = 8  # requests that are kept before a new request is refused

# An answer depends on the first set. Requests with a field of the second set go to the app.
HEADERS = "host accept-encoding if-none-match x-api-key x-forwarded-for x-request-id"
RELEVANT = frozenset(HEADERS.encode().split())
# The app refuses requests that are signed for an exchange, whatever the cache has.
SIGNED = "api-key api-sign authorization x-bapi-api-key x-bapi-recv-window x-bapi-sign"
SIGNED += " x-bapi-sign-type x-bapi-timestamp x-mbx-apikey"
APP_ONLY = frozenset(f"content-length transfer-encoding expect {SIGNED}".encode().split())

Target = tuple[bytes, bytes]  # path and query, as received
K = TypeVar("K")
log = logging.getLogger(__name__)


@dataclass(slots=True)
class KnownRequest:
    """A parsed request that the fast path can answer."""

    target: Target
    headers: RawHeaders
    """The relevant fields of its header."""
    was_used: bool = False
    """True if it was repeated since its last turn in the table."""


V = TypeVar("V", Recipe, KnownRequest)


class RequestTable(dict[K, V]):
    """At most `size` remembered requests; the oldest is dropped first.

    A request that was repeated since its last turn stays for another turn. A flood of requests that
    are never repeated therefore only replaces itself.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self._size = size

    def add(self, name: K, request: V) -> None:
        """Remember a request, unless all candidates for removal are in use."""
        for _ in range(MAX_SECOND_CHANCES):
            if self._has_room(name):
                break
            oldest = next(iter(self))
            candidate = self.pop(oldest)
            if candidate.was_used:
                candidate.was_used = False
                self[oldest] = candidate
        if self._has_room(name):
            self[name] = request

    def _has_room(self, name: K) -> bool:
        return len(self) < self._size or name in self


class FastPath:
    """The ASGI app that the server runs. `app` is the complete app without the fast path."""

    def __init__(self, app: FastAPI, gate: Gate, settings: Settings, clock: Clock) -> None:
        self.app = app
        self.clock = clock
        self.on_hit: Callable[[Scope, KnownRequest], None] = lambda _scope, _request: None
        self._gate = gate
        self._private = bool(settings.api_keys)
        self._noted = RELEVANT | APP_ONLY
        self._common_fields: HeaderFields = []
        if settings.cors_origins:  # the CORS middleware sends Vary for requests without Origin, too
            self._noted |= {b"origin"}
            self._common_fields = [(b"vary", b"Origin")]
        self.size = REQUESTS_PER_ENTRY * settings.cache_memory_size
        self._singles: RequestTable[Target, Recipe] = RequestTable(self.size)
        self._batches: RequestTable[Target, Recipe] = RequestTable(MAX_BATCHES)
        self._markets_version = 0
        self._logs_requests = log.isEnabledFor(logging.DEBUG)  # only the app logs requests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request from memory, or pass it on to the app."""
        started = perf_counter()
        scope[uvicorn_edge.SEND] = send
        is_get = scope["type"] == "http" and scope["method"] == "GET"
        request = self._read(scope) if is_get else None
        hit = None if request is None else self.find(request, scope)
        if request is None or hit is None:
            await self._pass_on(scope, receive, send)
            return
        recipe, entries, limit_fields = hit
        entry = recipe.answer(entries, request.headers)
        recipe.count()
        status, fields = self.respond(recipe, entry, request.headers)
        given_id = request.headers.get(b"x-request-id", b"").decode("latin-1")
        fields += [*limit_fields, (b"x-request-id", valid_request_id(given_id).encode())]
        self.on_hit(scope, request)
        age = max(0.0, self.clock.monotonic() - entry.born)
        metrics.in_progress.count += 1
        try:
            await send({"type": "http.response.start", "status": status, "headers": fields})
            body = entry.body if status == 200 else b""
            await send({"type": "http.response.body", "body": body})
        finally:
            metrics.in_progress.count -= 1
            metrics.hits[recipe.route].count(status, age, perf_counter() - started, len(entries))

    def _read(self, scope: Scope) -> KnownRequest | None:
        """Return a request that a recipe may answer, or None for the app."""
        target = (scope["raw_path"], scope["query_string"])
        if target not in self._singles and target not in self._batches:
            return None
        headers = self._read_headers(scope["headers"])
        return None if headers is None else KnownRequest(target, headers)

    def find(
        self, request: KnownRequest, scope: Scope
    ) -> tuple[Recipe, list[Entry], HeaderFields] | None:
        """Return the recipe, the entries and the limit fields, or None for the app.

        `scope` is that of a request on the same connection.
        """
        recipe = self._singles.get(request.target) or self._batches.get(request.target)
        if recipe is None:
            return None
        gateway: Gateway = scope["state"]["gateway"]
        if gateway.markets.version != self._markets_version:  # exchanges may list other symbols now
            return None
        entries = recipe.find(gateway)
        if entries is None:
            return None
        limit_fields = self._common_fields
        if not self._gate.open:
            limits = self._gate.try_admit(scope, request.headers, gateway.store)
            if limits is None:
                return None
            encoded = [(name.lower().encode(), value.encode()) for name, value in limits.items()]
            limit_fields = limit_fields + encoded
        recipe.was_used = True
        for entry in entries:
            gateway.cache.memory.count_hit(entry)
        return recipe, entries, limit_fields

    def _read_headers(self, fields: HeaderFields) -> dict[bytes, bytes] | None:
        """Return the relevant header fields, or None if the app has to judge the headers."""
        headers: dict[bytes, bytes] = {}
        size = 0
        noted = self._noted
        for name, value in fields:
            size += len(name) + len(value)
            if name in noted:
                if name in headers or name not in RELEVANT:
                    return None
                headers[name] = value
        return headers if b"host" in headers and size <= MAX_HEADER_BYTES else None

    def respond(
        self, recipe: Recipe, entry: Entry, headers: RawHeaders
    ) -> tuple[int, HeaderFields]:
        """Return the status and the header fields of an answer, without those of limits."""
        age = max(0.0, self.clock.monotonic() - entry.born)
        fields = freshness(entry.etag, age, entry.ttl - age, "hit_memory", private=self._private)
        fields += recipe.extra_fields(entry)
        condition = headers.get(b"if-none-match")
        if condition is not None and matches([condition.decode("latin-1")], entry.etag):
            return 304, fields
        return 200, fields + content_headers(len(entry.body), entry.media_type)

    async def _pass_on(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let the app answer, and remember the recipe that it leaves."""
        if scope["type"] == "lifespan":
            uvicorn_edge.check_server(scope)
        gateway: Gateway | None = scope.get("state", {}).get("gateway")
        version = gateway.markets.version if gateway else 0
        await self.app(scope, receive, send)
        recipe = scope.get("state", {}).pop("recipe", None)
        # A recipe from a market list that was replaced meanwhile may be wrong.
        if recipe is not None and gateway is not None and gateway.markets.version == version:
            self._remember(scope, recipe, version)

    def _remember(self, scope: Scope, recipe: Recipe, version: int) -> None:
        if scope["method"] != "GET" or self._logs_requests:
            return
        if version != self._markets_version:
            self._markets_version = version
            self._singles.clear()
            self._batches.clear()
        target = (scope["raw_path"], scope["query_string"])
        table = self._batches if recipe.batch_keys else self._singles
        max_bytes = MAX_BATCH_BYTES if recipe.batch_keys else MAX_REQUEST_BYTES
        if len(target[0]) + len(target[1]) <= max_bytes and table.get(target) != recipe:
            table.add(target, recipe)
