"""Answers repeated requests from memory, in front of the app.

Each answer of the app leaves a recipe: the cache keys that it was made from. When the same request
comes again, the fast path looks up these keys in the same cache, with the same order of exchanges
and breakers, and builds the header fields with the same functions. Every other request goes to the
app unchanged, so that no decision is made in two places.
"""

import logging
from time import perf_counter

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
log = logging.getLogger(__name__)


class RecipeTable(dict[Target, Recipe]):
    """At most `size` remembered requests; the oldest is dropped first.

    A request that was repeated since its last turn stays for another turn. A flood of requests that
    are never repeated therefore only replaces itself.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self._size = size

    def add(self, target: Target, recipe: Recipe) -> None:
        """Remember a request, unless all candidates for removal are in use."""
        for _ in range(MAX_SECOND_CHANCES):
            if self._has_room(target):
                break
            oldest = next(iter(self))
            candidate = self.pop(oldest)
            if candidate.was_used:
                candidate.was_used = False
                self[oldest] = candidate
        if self._has_room(target):
            self[target] = recipe

    def _has_room(self, target: Target) -> bool:
        return len(self) < self._size or target in self


class FastPath:
    """The ASGI app that the server runs. `app` is the complete app without the fast path."""

    def __init__(self, app: FastAPI, gate: Gate, settings: Settings, clock: Clock) -> None:
        self.app = app
        self._gate = gate
        self._clock = clock
        self._private = bool(settings.api_keys)
        self._noted = RELEVANT | APP_ONLY
        self._common_fields: HeaderFields = []
        if settings.cors_origins:  # the CORS middleware sends Vary for requests without Origin, too
            self._noted |= {b"origin"}
            self._common_fields = [(b"vary", b"Origin")]
        self._singles = RecipeTable(REQUESTS_PER_ENTRY * settings.cache_memory_size)
        self._batches = RecipeTable(MAX_BATCHES)
        self._markets_version = 0
        self._logs_requests = log.isEnabledFor(logging.DEBUG)  # only the app logs requests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request from memory, or pass it on to the app."""
        started = perf_counter()
        scope[uvicorn_edge.SEND] = send
        is_get = scope["type"] == "http" and scope["method"] == "GET"
        match = self._find(scope) if is_get else None
        if match is None:
            await self._pass_on(scope, receive, send)
            return
        recipe, entries, headers, limit_fields = match
        age, status, fields, body = self._respond(recipe, entries, headers)
        fields += limit_fields
        given_id = headers.get(b"x-request-id", b"").decode("latin-1")
        fields.append((b"x-request-id", valid_request_id(given_id).encode()))
        metrics.in_progress.count += 1
        try:
            await send({"type": "http.response.start", "status": status, "headers": fields})
            await send({"type": "http.response.body", "body": body})
        finally:
            metrics.in_progress.count -= 1
            metrics.hits[recipe.route].count(status, age, perf_counter() - started, len(entries))

    def _find(self, scope: Scope) -> tuple[Recipe, list[Entry], RawHeaders, HeaderFields] | None:
        """Return the recipe, entries, request headers and limit fields, or None for the app."""
        target = (scope["raw_path"], scope["query_string"])
        recipe = self._singles.get(target) or self._batches.get(target)
        if recipe is None:
            return None
        gateway: Gateway = scope["state"]["gateway"]
        if gateway.markets.version != self._markets_version:  # exchanges may list other symbols now
            return None
        headers = self._read_headers(scope["headers"])
        entries = recipe.find(gateway)
        if headers is None or entries is None:
            return None
        limit_fields = self._common_fields
        if not self._gate.open:
            limits = self._gate.try_admit(scope, headers, gateway.store)
            if limits is None:
                return None
            encoded = [(name.lower().encode(), value.encode()) for name, value in limits.items()]
            limit_fields = limit_fields + encoded
        recipe.was_used = True
        for entry in entries:
            gateway.cache.memory.count_hit(entry)
        return recipe, entries, headers, limit_fields

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

    def _respond(
        self, recipe: Recipe, entries: list[Entry], headers: RawHeaders
    ) -> tuple[float, int, HeaderFields, bytes]:
        """Return the age, status, header fields and body of an answer."""
        entry = recipe.answer(entries, headers)
        age = self._clock.monotonic() - entry.born
        if age < 0:
            age = 0.0
        fields = freshness(entry.etag, age, entry.ttl - age, "hit_memory", private=self._private)
        fields += recipe.extra_fields(entry)
        condition = headers.get(b"if-none-match")
        if condition is not None and matches([condition.decode("latin-1")], entry.etag):
            return age, 304, fields, b""
        fields += content_headers(len(entry.body), entry.media_type)
        return age, 200, fields, entry.body

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
