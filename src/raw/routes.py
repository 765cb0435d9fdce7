"""The route of the raw pass-through: answers and refusals in the exchange's own format."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from fastapi import FastAPI, Request
from starlette.responses import Response

from src.cache.entry import LARGE_BYTES, Entry, Served
from src.core import errors, metrics
from src.core.errors import GatewayError
from src.exchanges.budget import RateLimiter
from src.gateway import Gateway
from src.raw.requests import RawRequest, check_headers, parse
from src.raw.service import RawService, Reply
from src.store.window import Window
from src.web.responses import HeaderFields, Recipe, content_headers, freshness, matches

GZIP: tuple[str] = ("gzip",)  # name of the packed entry among the parts of an entry
ACCEPTS_GZIP = re.compile(rb"\bgzip\b(?!\s*;\s*q=0(\.0*)?\s*(,|$))")
NOT_CACHED = ((b"cache-control", b"no-store"), (b"cache-status", b"virtuoso; fwd=bypass"))
# pybit fails if its limit was reset in the past, and prepared fields are up to one second old.
MIN_RESET_SECONDS = 2
# Why a breaker is open -> code of the error that opened it.
CODES_OF_CAUSES = {
    error.cause: error.code for error in (errors.ExchangeRateLimited, errors.ExchangeBanned)
}


@dataclass(slots=True, kw_only=True)
class RawRecipe(Recipe):
    """How a raw request was answered."""

    gateway: Gateway = field(compare=False)
    request: RawRequest = field(compare=False)
    _hits: list[int] = field(init=False, compare=False)
    _window: Window = field(init=False, compare=False)

    def __post_init__(self) -> None:
        """Find once what every hit needs."""
        self._hits = metrics.raw_hits[self.request.exchange, self.request.template]
        limiter = self.gateway.manager.limiter
        self._window = limiter.window(_pool_of(limiter, self.request))

    def find(self, gateway: Gateway) -> list[Entry] | None:
        """Return the answer, or None unless it is fresh in memory."""
        entry = gateway.cache.memory.find_fresh(self.keys[0][0])
        return None if entry is None else [entry]

    def answer(self, entries: list[Entry], headers: Mapping[bytes, bytes]) -> Entry:
        """Return the answer in the best coding that the client accepts."""
        return _coded(entries[0], headers.get(b"accept-encoding", b""))

    def count(self) -> int:
        """Count an answer, and return the version of its limit fields."""
        self._hits[0] += 1
        return self._window.version

    def extra_fields(self, answer: Entry) -> HeaderFields:
        """Return the exchange's own fields, and those of the coding."""
        return _coding_fields(answer) + _limit_fields(self.gateway, self.request)


async def get_raw(request: Request, exchange: str, path: str) -> Response:
    """Return an exchange's own answer to a public request, byte for byte and never stale.

    Everything after `/raw/{exchange}/` is as in the exchange's documentation. If the gateway
    refuses the request, it answers as the exchange would; `X-Virtuoso-Error` has its reason.
    """
    service: RawService = request.state.raw
    name = service.gateway.markets.check_exchange(exchange)
    check_headers(field for field, _ in request.scope["headers"])
    raw = parse(name, path, request.scope["query_string"].decode("latin-1"))
    try:
        served = await service.serve(raw)
    except GatewayError as error:
        return _refuse(service.gateway, raw, error)
    return _answer(request, service.gateway, raw, served)


def _answer(request: Request, gateway: Gateway, raw: RawRequest, served: Served) -> Response:
    """Return an answer of the exchange, and leave a recipe for the fast path."""
    whole = served.entry
    assert whole is not None  # noqa: S101 - raw answers are never put together
    entry = _coded(whole, request.headers.get("accept-encoding", "").encode("latin-1"))
    route = request.scope["route"].path_format
    metrics.cache_served_age_seconds.labels(route).observe(served.age)
    is_private = bool(gateway.settings.api_keys)
    if raw.rules.is_cached:
        fields = freshness(entry.etag, served.age, served.ttl, served.result, private=is_private)
    else:
        fields = [*NOT_CACHED]
    if entry.status == 200 and matches(request.headers.getlist("if-none-match"), entry.etag):
        response = Response(status_code=304)
    else:
        response = Response(entry.body, entry.status)
        fields += content_headers(len(entry.body), entry.media_type)
    if entry.status == 200:
        request.state.recipe = RawRecipe(
            route,
            ((whole.key,),),
            params=whole.key.params,
            gateway=gateway,
            request=raw,
        )
    fields += _coding_fields(entry)
    response.raw_headers = fields + _fields(gateway, raw, served.result)
    return response


def _coded(entry: Entry, accepted: bytes) -> Entry:
    """Return an entry in gzip if it has been packed and the client accepts gzip."""
    if not entry.packed or not ACCEPTS_GZIP.search(accepted):
        return entry
    packed = entry.views.get(GZIP)
    if packed is None:
        packed = entry.views[GZIP] = entry.as_gzip()
    return packed


def _coding_fields(entry: Entry) -> HeaderFields:
    fields: HeaderFields = [(b"vary", b"Accept-Encoding")] if len(entry.body) >= LARGE_BYTES else []
    if entry.encoding:
        fields = [(b"vary", b"Accept-Encoding"), (b"content-encoding", entry.encoding.encode())]
    return fields


def _refuse(gateway: Gateway, raw: RawRequest, error: GatewayError) -> Response:
    """Pass on the exchange's own error, or refuse as the exchange would."""
    reply: Reply | None = error.reply
    if reply is None:
        breaker = gateway.manager[raw.exchange].breaker
        is_open = isinstance(error, errors.CircuitOpen)
        code = CODES_OF_CAUSES.get(breaker.cause or "", "") if is_open else error.code
        refusal = raw.api.refusals.find(code)
        reply = Reply(refusal.status, refusal.media_type, refusal.dump())
    response = Response(reply.body, reply.status)
    fields = [*content_headers(len(reply.body), reply.media_type), (b"cache-control", b"no-store")]
    if error.retry_after_seconds is not None:
        fields.append((b"retry-after", b"%d" % error.retry_after_seconds))
    fields.append((b"x-virtuoso-error", error.code.encode()))
    response.raw_headers = fields + _fields(gateway, raw, "error" if error.reply else "refused")
    return response


def _fields(gateway: Gateway, raw: RawRequest, outcome: str) -> HeaderFields:
    """Count an answer, and return the exchange's own header fields about its limits.

    They have what all clients of the gateway have used together.
    """
    metrics.raw_requests_total.labels(raw.exchange, raw.template, outcome).inc()
    return _limit_fields(gateway, raw)


def _pool_of(limiter: RateLimiter, raw: RawRequest) -> str:
    return limiter.pool_of(raw.exchange, is_swap=raw.is_swap)


def _limit_fields(gateway: Gateway, raw: RawRequest) -> HeaderFields:
    limiter = gateway.manager.limiter
    used, limit, seconds = limiter.usage(_pool_of(limiter, raw))
    end = int(gateway.clock.time()) + math.ceil(max(seconds, MIN_RESET_SECONDS))
    fields = raw.api.limit_fields(used, limit, end * 1000)
    return [(name.encode(), b"%d" % value) for name, value in fields.items()]


def add_routes(app: FastAPI) -> None:
    """Add the route to the app. The exchanges document its answers, so OpenAPI does not."""
    app.add_api_route("/raw/{exchange}/{path:path}", get_raw, include_in_schema=False)
