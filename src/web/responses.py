"""HTTP responses: freshness headers, conditional requests, batches, problem documents."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import orjson
from starlette.requests import Request
from starlette.responses import Response

from src.cache.entry import MEDIA_TYPE, Entry, Key, Param, Served, etag_of
from src.core import errors, metrics
from src.core.errors import GatewayError
from src.gateway import BatchKey, Gateway
from src.kinds import view

HeaderFields = list[tuple[bytes, bytes]]
FORWARDED = {"miss": "fwd=miss; stored", "coalesced": "fwd=miss; collapsed"}  # RFC 9211
RAW_PREFIX = "/raw/"  # paths whose clients are those of an exchange
FLOAT_ERROR_SECONDS = 1e-6  # must not cost a whole second when a time is rounded down


@dataclass(slots=True)
class Recipe:
    """How a request was answered, so that the fast path can answer the same request again."""

    route: str
    """Template of the path."""
    keys: tuple[tuple[Key, ...], ...]
    """For each value of the answer: the keys that can provide it, in order of preference."""
    batch_keys: tuple[BatchKey, ...] = ()
    """The name of each value in a batch; empty if the answer is a single value."""
    params: tuple[Param, ...] = ()
    """The client's parameters, of a single value."""
    was_used: bool = field(default=False, compare=False)
    """True if the request was repeated since its last turn in the table."""
    _parts: list[Entry] = field(default_factory=list, init=False, compare=False)
    _batch: Entry | None = field(default=None, init=False, compare=False)

    def find(self, gateway: Gateway) -> list[Entry] | None:
        """Return the entries of the answer, or None unless all of them are fresh in memory."""
        entries = []
        for keys in self.keys:
            entry = gateway.find_in_memory(keys)
            if entry is None:
                return None
            entries.append(entry)
        return entries

    def count(self) -> int:
        """Count an answer, and return the version of its extra fields within the current second."""
        return 0

    def extra_fields(self, _answer: Entry) -> HeaderFields:
        """Return further header fields of an answer."""
        return []

    def answer(self, entries: list[Entry], _headers: Mapping[bytes, bytes]) -> Entry:
        """Return the answer that the entries make, given the header of the request.

        A batch is built again only if an entry has changed.
        """
        if not self.batch_keys:
            return view(entries[0], self.params)
        if self._batch is None or entries != self._parts:
            body = batch_body(dict(zip(self.batch_keys, entries, strict=True)))
            self._batch = Entry.join(body, entries)
            self._parts = entries
        return self._batch


def answer(request: Request, served: Served) -> Response:
    """Return an answer with its age, remaining freshness, tag and cache status."""
    route = request.scope["route"].path_format
    if served.keys:
        request.state.recipe = Recipe(route, (served.keys,), params=served.params)
    metrics.cache_served_age_seconds.labels(route).observe(served.age)
    etag = served.etag or etag_of(served.body)
    is_private = bool(request.state.gateway.settings.api_keys)
    fields = freshness(etag, served.age, served.ttl, served.result, private=is_private)
    if matches(request.headers.getlist("if-none-match"), etag):
        response = Response(status_code=304)
    else:
        response = Response(served.body)
        fields += content_headers(len(served.body))
    response.raw_headers = fields
    return response


def freshness(etag: str, age: float, ttl: float, result: str, *, private: bool) -> HeaderFields:
    """Return the header fields of an answer that is `age` seconds old and fresh for `ttl` more.

    `result` is one of `metrics.CACHE_RESULTS`.
    """
    left = math.floor(ttl + FLOAT_ERROR_SECONDS)
    return [*_freshness(int(age), left, result, private), (b"etag", etag.encode())]


@lru_cache(4096)  # whole seconds take few different values
def _freshness(age: int, left: int, result: str, private: bool) -> HeaderFields:
    prefix = b"private, " if private else b""
    status = FORWARDED.get(result) or f"hit; detail={result.removeprefix('hit_')}"
    return [
        (b"age", b"%d" % age),
        (b"cache-control", b"%bmax-age=%d" % (prefix, max(0, left))),
        (b"cache-status", f"virtuoso; {status}; ttl={left}".encode()),
    ]


@lru_cache(4096)
def content_headers(length: int, media_type: str = MEDIA_TYPE) -> HeaderFields:
    """Return the header fields of a body. The list is shared; do not change it."""
    fields = (b"content-length", b"%d" % length), (b"content-type", media_type.encode("latin-1"))
    return [*fields]


def batch(request: Request, answers: Mapping[BatchKey, Served | GatewayError]) -> Response:
    """Return many tickers, and a problem for each one that failed; as old as the oldest ticker."""
    served = [value for value in answers.values() if isinstance(value, Served)]
    body = batch_body(answers)
    if len(served) < len(answers) or not served:
        return json(orjson.Fragment(body))
    if all(value.keys for value in served):
        keys = tuple(value.keys for value in served)
        route = request.scope["route"].path_format
        request.state.recipe = Recipe(route, keys, tuple(answers))
    age = max(value.age for value in served)
    ttl = min(value.ttl for value in served)
    worst = min(served, key=lambda value: (value.result.startswith("hit"), value.ttl))
    return answer(request, Served(body, None, age, ttl, worst.result))


def batch_body(answers: Mapping[BatchKey, Served | Entry | GatewayError]) -> bytes:
    """Return the body of a batch of tickers and problems, by symbol, or by symbol and exchange."""
    document: dict[str, dict[str, Any]] = {"tickers": {}, "errors": {}}
    for (symbol, exchange), value in answers.items():
        member: Any
        if isinstance(value, GatewayError):
            group, member = document["errors"], value.problem()
        else:
            group, member = document["tickers"], orjson.Fragment(value.body)
        if exchange:
            group.setdefault(symbol, {})[exchange] = member
        else:
            group[symbol] = member
    return orjson.dumps(document)


def problem(
    error: GatewayError, path: str = "", headers: Mapping[str, str] | None = None
) -> Response:
    """Return an error as an RFC 9457 problem document.

    Documents below `/raw/` have no `code`, which clients of Binance read as a number. The header
    field X-Virtuoso-Error has it.
    """
    fields = {"X-Virtuoso-Error": error.code, **(headers or {})}
    document = error.problem()
    if path.startswith(RAW_PREFIX):
        del document["code"]
    if error.retry_after_seconds is not None:
        fields["Retry-After"] = str(error.retry_after_seconds)
    if isinstance(error, errors.Unauthorized):
        fields["WWW-Authenticate"] = error.challenge
    return json(document, error.status, fields, "application/problem+json")


def json(
    document: object,
    status: int = 200,
    headers: Mapping[str, str] | None = None,
    media_type: str = "application/json",
) -> Response:
    """Return a document that must not be cached, because it is true only now."""
    fields = {"Cache-Control": "no-store", **(headers or {})}
    return Response(orjson.dumps(document), status, fields, media_type=media_type)


def matches(conditions: Sequence[str], etag: str) -> bool:
    """Return True if If-None-Match holds the tag, by weak comparison (RFC 9110 section 13.1.2)."""
    tags = [tag.strip().removeprefix("W/") for tag in ",".join(conditions).split(",")]
    return etag in tags or tags == ["*"]
