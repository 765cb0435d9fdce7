"""How answers and errors become HTTP: freshness headers, conditional requests, problem documents."""

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

import orjson
from starlette.requests import Request
from starlette.responses import Response

from src.cache.entry import Key, etag_of
from src.core import metrics
from src.core.errors import GatewayError, Unauthorized
from src.gateway import Served

Field = tuple[bytes, bytes]  # of a header
Fields = list[Field]
BatchKey = tuple[str, str]  # a ticker in a batch: its symbol, and its exchange or ""
CACHE_STATUS = {  # RFC 9211; `ttl` is added to each
    "hit_memory": "virtuoso; hit; detail=memory",
    "hit_redis": "virtuoso; hit; detail=redis",
    "miss": "virtuoso; fwd=miss; stored",
    "coalesced": "virtuoso; fwd=miss; collapsed",
    "stale_revalidate": "virtuoso; hit; detail=stale_revalidate",
    "stale_error": "virtuoso; hit; detail=stale_error",
}


class Recipe(NamedTuple):
    """How a request was answered, for the next one that is the same to the letter."""

    route: str  # template of the path
    keys: tuple[tuple[Key, ...], ...]  # for each value in the answer, what could have answered, most preferred first
    places: tuple[BatchKey, ...] = ()  # what each value is called in a batch; none when the answer is one value


def answer(request: Request, served: Served) -> Response:
    """Send an answer with its age, what is left of its freshness, its tag, and how it was found."""
    if served.keys:
        request.state.recipe = Recipe(request.scope["route"].path_format, (served.keys,))
    return _send(request, served)


def _send(request: Request, served: Served) -> Response:
    metrics.cache_served_age_seconds.labels(request.scope["route"].path_format).observe(served.age)
    etag = served.etag or etag_of(served.body)
    private = bool(request.state.gateway.settings.api_keys)
    fields = head(etag, served.age, served.ttl, served.result, private=private)
    if matches(request.headers.getlist("if-none-match"), etag):
        response = Response(status_code=304)
    else:
        response = Response(served.body)
        fields += content(len(served.body))
    response.raw_headers = fields
    return response


def head(etag: str, age: float, ttl: float, result: str, *, private: bool) -> Fields:
    """Make the header fields of an answer that is `age` seconds old and fresh for `ttl` more, found as `result`."""
    left = math.floor(ttl + 1e-6)  # an error of float arithmetic is no second less
    return [_age(int(age)), _cache_control(left, private), _cache_status(result, left), (b"etag", etag.encode())]


@lru_cache(4096)
def content(length: int) -> Fields:
    """Make the header fields of a body of JSON; do not change the list."""
    return [(b"content-length", b"%d" % length), (b"content-type", b"application/json")]


# Ages and times left come back all the time: each of these is written once, and found again.
@lru_cache(4096)
def _age(seconds: int) -> Field:
    return b"age", b"%d" % seconds


@lru_cache(4096)
def _cache_control(left: int, private: bool) -> Field:
    return b"cache-control", b"%bmax-age=%d" % (b"private, " if private else b"", max(0, left))


@lru_cache(4096)
def _cache_status(result: str, left: int) -> Field:
    return b"cache-status", f"{CACHE_STATUS[result]}; ttl={left}".encode()


def batch(request: Request, answers: Mapping[BatchKey, Served | GatewayError]) -> Response:
    """Send many tickers and the problems of those that could not be had; as old as the oldest of them."""
    served = [value for value in answers.values() if isinstance(value, Served)]
    body = batch_body(answers)
    if len(served) < len(answers) or not served:
        return Response(body, headers={"Cache-Control": "no-store"}, media_type="application/json")
    if all(one.keys for one in served):
        keys = tuple(one.keys for one in served)
        request.state.recipe = Recipe(request.scope["route"].path_format, keys, tuple(answers))
    worst = min(served, key=lambda one: (one.result.startswith("hit"), one.ttl))
    oldest, left = max(one.age for one in served), min(one.ttl for one in served)
    return _send(request, Served(body, None, oldest, left, worst.result))


def batch_body(answers: Mapping[BatchKey, Served | GatewayError]) -> bytes:
    """Make the body of a batch of tickers and problems."""
    errors = {place: orjson.dumps(v.problem()) for place, v in answers.items() if isinstance(v, GatewayError)}
    return joined({place: v.body for place, v in answers.items() if isinstance(v, Served)}, errors)


def joined(tickers: Mapping[BatchKey, bytes], errors: Mapping[BatchKey, bytes] | None = None) -> bytes:
    """Join ready tickers, and problems if there are any, to the body of a batch."""
    return b'{"tickers":%b,"errors":%b}' % (_object(tickers), _object(errors or {}))


def problem(error: GatewayError, headers: Mapping[str, str] | None = None) -> Response:
    """Send an error as RFC 9457 problem+json; never to be cached."""
    sent = {"Cache-Control": "no-store", **(headers or {})}
    if error.retry_after_seconds is not None:
        sent["Retry-After"] = str(error.retry_after_seconds)
    if isinstance(error, Unauthorized):
        sent["WWW-Authenticate"] = error.challenge
    body = orjson.dumps(error.problem())
    return Response(body, error.status, sent, media_type="application/problem+json")


def json(document: object, status: int = 200) -> Response:
    """Send a document about the gateway itself, which is true only now."""
    return Response(orjson.dumps(document), status, {"Cache-Control": "no-store"}, media_type="application/json")


def _object(members: Mapping[BatchKey, bytes]) -> bytes:
    """Join ready bytes to a JSON object; members with an exchange are grouped by symbol."""
    grouped: dict[str, dict[str, bytes]] = {}
    for (symbol, exchange), body in members.items():
        grouped.setdefault(symbol, {})[exchange] = body
    return _braces([(symbol, group.get("") or _braces(group.items())) for symbol, group in grouped.items()])


def _braces(members: Iterable[tuple[str, bytes]]) -> bytes:
    return b"{%b}" % b",".join(orjson.dumps(name) + b":" + body for name, body in members)


def matches(conditions: Sequence[str], etag: str) -> bool:
    """Weak comparison, as If-None-Match asks for (RFC 9110 section 13.1.2)."""
    tags = [tag.strip().removeprefix("W/") for condition in conditions for tag in condition.split(",")]
    return etag in tags or tags == ["*"]
