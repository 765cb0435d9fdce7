"""In front of the app: a request that was answered before is answered from ready bytes while memory has them fresh.

The app teaches it: each of its answers leaves a recipe, the keys that request came down to. A repetition looks those
keys up in the same cache, by the same order of exchanges and breakers, and writes the same header fields by the same
functions. Whatever asks for more than that goes on to the app untouched, so nothing is decided twice.
"""

import logging
from time import perf_counter

from fastapi import FastAPI
from starlette.types import Receive, Scope, Send

from config import Settings
from src.cache.entry import Entry
from src.cache.memory import Held
from src.core import metrics
from src.core.clock import Clock
from src.core.logs import new_request_id
from src.gateway import Gateway
from src.web.gate import Gate
from src.web.middleware import MAX_HEADER_BYTES, identify
from src.web.responses import Fields, Recipe, content, head, joined, matches

REQUESTS_PER_ENTRY = 2  # requests remembered for each entry memory may hold: a symbol has more than one spelling
MAX_REQUEST_BYTES = 256  # of path and query; a longer one for a single value is nobody's habit
MAX_BATCHES = 64  # each holds its whole answer: some 45 KB for 100 symbols, three times that with `exchange=all`
MAX_BATCH_BYTES = 4096
TURNS = 8  # most requests that get a second chance before a new one is turned away

# What a ready answer depends on, and what only the app can judge.
NOTED = frozenset({b"host", b"if-none-match", b"x-api-key", b"x-forwarded-for", b"x-request-id"})
FOR_THE_APP = frozenset({b"content-length", b"transfer-encoding", b"expect"})

Raw = tuple[bytes, bytes]  # path and query as they came
log = logging.getLogger(__name__)


class Slot:
    """One remembered request."""

    __slots__ = ("_joined", "_keys", "_parts", "hits", "is_batch", "recipe", "used", "values")

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.hits = metrics.hits.setdefault(recipe.route, metrics.Hits(recipe.route))
        self.used = False
        self.values = len(recipe.keys)
        self.is_batch = bool(recipe.places)
        self._keys = recipe.keys
        self._parts: list[Held] = []
        self._joined: Entry | None = None

    def find(self, gateway: Gateway) -> list[Held] | None:
        """Return every value of the answer, if all of them are fresh in memory."""
        found = []
        for keys in self._keys:
            if (held := gateway.at_hand(keys)) is None:
                return None
            found.append(held)
        return found

    def join(self, found: list[Held]) -> Entry:
        """Return the answer of a batch, which is joined anew only when a part has changed."""
        if self._joined is None or found != self._parts:
            bodies = (held.entry.body for held in found)
            whole = joined(dict(zip(self.recipe.places, bodies, strict=True)))
            self._joined, self._parts = Entry.joined(whole, [held.entry for held in found]), found
        return self._joined


class Table(dict[Raw, Slot]):
    """Remembered requests, at most `size`, the oldest out first.

    One that was repeated since its last turn stays for another: so a flood of requests nobody repeats replaces itself.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self._size = size

    def add(self, raw: Raw, slot: Slot) -> None:
        """Remember a request, unless every one that would have to go for it is in use."""
        for _ in range(TURNS):
            if len(self) < self._size or raw in self:
                break
            oldest = next(iter(self))
            old = self.pop(oldest)
            if old.used:
                old.used = False
                self[oldest] = old
        if len(self) < self._size or raw in self:
            self[raw] = slot


class FastPath:
    """The ASGI app that is served; `app` is the whole of it without this shortcut."""

    def __init__(self, app: FastAPI, gate: Gate, settings: Settings, clock: Clock) -> None:
        self.app = app
        self._gate = gate
        self._clock = clock
        self._private = bool(settings.api_keys)
        self._noted = NOTED | FOR_THE_APP | ({b"origin"} if settings.cors_origins else set())
        # The CORS middleware says so even where there is no Origin.
        self._always: Fields = [(b"vary", b"Origin")] if settings.cors_origins else []
        self._single = Table(REQUESTS_PER_ENTRY * settings.cache_memory_size)
        self._batches = Table(MAX_BATCHES)
        self._markets_version = 0
        self._logs_requests = log.isEnabledFor(logging.DEBUG)  # the app writes a line for each: leave them all to it

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = perf_counter()
        # The connection: its address is that of the client, and behind the app's layers `send` does not lead to it.
        scope["virtuoso.server"] = getattr(send, "__self__", None)
        hit = self._hit(scope) if scope["type"] == "http" and scope["method"] == "GET" else None
        if hit is None:
            await self._pass_on(scope, receive, send)
            return
        slot, age, status, fields, body = hit
        metrics.in_progress.count += 1
        try:
            await send({"type": "http.response.start", "status": status, "headers": fields})
            await send({"type": "http.response.body", "body": body})
        finally:
            metrics.in_progress.count -= 1
            slot.hits.count(status, age, perf_counter() - started, slot.values)

    def _hit(self, scope: Scope) -> tuple[Slot, float, int, Fields, bytes] | None:
        """Make the answer to a request: its age, status, header fields and body; None when that is for the app."""
        raw = (scope["raw_path"], scope["query_string"])
        if (slot := self._single.get(raw) or self._batches.get(raw)) is None:
            return None
        gateway: Gateway = scope["state"]["gateway"]
        if gateway.markets.version != self._markets_version:  # who lists what may have changed: the app finds out
            return None
        if (asked := self._read(scope["headers"])) is None or (found := slot.find(gateway)) is None:
            return None
        if (limits := self._always if self._gate.open else self._limits(asked, scope, gateway)) is None:
            return None
        slot.used = True
        for held in found:
            gateway.cache.memory.use(held)
        entry = slot.join(found) if slot.is_batch else found[0].entry
        age = self._clock.monotonic() - entry.born
        age = age if age > 0 else 0.0
        fields = head(entry.etag, age, entry.ttl - age, "hit_memory", private=self._private)
        status, body = 200, entry.body
        if b"if-none-match" in asked and matches([asked[b"if-none-match"].decode("latin-1")], entry.etag):
            status, body = 304, b""
        else:
            fields += content(len(body))
        fields += limits
        given = asked.get(b"x-request-id")
        fields.append((b"x-request-id", (identify(given.decode("latin-1")) if given else new_request_id()).encode()))
        return slot, age, status, fields, body

    def _limits(self, asked: dict[bytes, bytes], scope: Scope, gateway: Gateway) -> Fields | None:
        """Count the request against its client's limit; returns the fields that tell of it, or None: the app's."""
        key, forwarded = (asked.get(name, b"").decode("latin-1") for name in (b"x-api-key", b"x-forwarded-for"))
        told = self._gate.at_once(scope, key, forwarded, gateway.store)
        if told is None:
            return None
        return self._always + [(name.lower().encode(), value.encode()) for name, value in told.items()]

    def _read(self, headers: Fields) -> dict[bytes, bytes] | None:
        """Pick the header fields an answer depends on; None when there is one the app has to see, or too much."""
        asked: dict[bytes, bytes] = {}
        size, noted = 0, self._noted
        for name, value in headers:
            size += len(name) + len(value)
            if name in noted:
                if name in asked or name not in NOTED:
                    return None
                asked[name] = value
        return asked if b"host" in asked and size <= MAX_HEADER_BYTES else None

    async def _pass_on(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let the app answer, and remember how, if it told."""
        gateway: Gateway | None = scope.get("state", {}).get("gateway")
        version = gateway.markets.version if gateway else 0
        await self.app(scope, receive, send)
        recipe = scope.get("state", {}).pop("recipe", None)
        # What came of a market list that was replaced meanwhile may be wrong by now.
        if recipe is not None and gateway is not None and gateway.markets.version == version:
            self._learn(scope, recipe, version)

    def _learn(self, scope: Scope, recipe: Recipe, version: int) -> None:
        if scope["method"] != "GET" or self._logs_requests:
            return
        if version != self._markets_version:
            self._markets_version = version
            self._single.clear()
            self._batches.clear()
        raw = (scope["raw_path"], scope["query_string"])
        table, longest = (self._batches, MAX_BATCH_BYTES) if recipe.places else (self._single, MAX_REQUEST_BYTES)
        known = table.get(raw)
        if len(raw[0]) + len(raw[1]) <= longest and (known is None or known.recipe != recipe):
            table.add(raw, Slot(recipe))
