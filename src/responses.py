"""How answers and errors become HTTP: freshness headers, conditional requests, problem documents, their description."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import orjson
from starlette.requests import Request
from starlette.responses import Response

from src import metrics
from src.entry import etag_of
from src.errors import GatewayError, Unauthorized
from src.gateway import Served

CACHE_STATUS = {  # RFC 9211; `ttl` is added to each
    "hit_memory": "virtuoso; hit; detail=memory",
    "hit_redis": "virtuoso; hit; detail=redis",
    "miss": "virtuoso; fwd=miss; stored",
    "coalesced": "virtuoso; fwd=miss; collapsed",
    "stale_revalidate": "virtuoso; hit; detail=stale_revalidate",
    "stale_error": "virtuoso; hit; detail=stale_error",
}


def answer(request: Request, served: Served) -> Response:
    """Send an answer with its age, what is left of its freshness, its tag, and how it was found."""
    metrics.cache_served_age_seconds.labels(request.scope["route"].path_format).observe(served.age)
    etag = served.etag or etag_of(served.body)
    ttl = math.floor(served.ttl)
    scope = "private, " if request.state.gateway.settings.api_keys else ""
    headers = {
        "Age": str(int(served.age)),
        "Cache-Control": f"{scope}max-age={max(0, ttl)}",
        "Cache-Status": f"{CACHE_STATUS[served.result]}; ttl={ttl}",
        "ETag": etag,
    }
    if _matches(request.headers.getlist("if-none-match"), etag):
        return Response(status_code=304, headers=headers)
    return Response(served.body, headers=headers, media_type="application/json")


def batch(request: Request, answers: Mapping[tuple[str, str], Served | GatewayError]) -> Response:
    """Send many tickers and the problems of those that could not be had; as old as the oldest of them."""
    served = [value for value in answers.values() if isinstance(value, Served)]
    body = b'{"tickers":%b,"errors":%b}' % (
        _object({place: value.body for place, value in answers.items() if isinstance(value, Served)}),
        _object({place: orjson.dumps(v.problem()) for place, v in answers.items() if isinstance(v, GatewayError)}),
    )
    if len(served) < len(answers) or not served:
        return Response(body, headers={"Cache-Control": "no-store"}, media_type="application/json")
    worst = min(served, key=lambda one: (one.result.startswith("hit"), one.ttl))
    oldest, left = max(one.age for one in served), min(one.ttl for one in served)
    return answer(request, Served(body, None, oldest, left, worst.result))


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


def describe(*errors: type[GatewayError]) -> dict[int | str, dict[str, Any]]:
    """Describe errors for the OpenAPI document, each with an example."""
    described: dict[int | str, dict[str, Any]] = {}
    for error in errors:
        entry = described.setdefault(
            error.status,
            {"description": error.title, "content": {"application/problem+json": {"schema": _SCHEMA, "examples": {}}}},
        )
        example = error((error.__doc__ or error.title).splitlines()[0])
        entry["content"]["application/problem+json"]["examples"][error.code] = {"value": example.problem()}
    return described


def members(*names: str) -> dict[str, Any]:
    """Describe a JSON object by the members it always has."""
    schema = {"type": "object", "required": list(names), "properties": {name: {} for name in names}}
    return {"description": "Successful Response", "content": {"application/json": {"schema": schema}}}


_SCHEMA: dict[str, Any] = {
    "type": "object",
    "title": "Problem",
    "description": "RFC 9457 problem document; see the README for every code.",
    "required": ["type", "title", "status", "code", "detail"],
    "properties": {
        **{name: {"type": "string"} for name in ("type", "title", "code", "detail", "exchange", "symbol")},
        "status": {"type": "integer"},
        "retry_after": {"type": "integer", "description": "Seconds to wait; also the header Retry-After."},
    },
}


def _object(members: Mapping[tuple[str, str], bytes]) -> bytes:
    """Join ready bytes to a JSON object; members with an exchange are grouped by symbol."""
    grouped: dict[str, dict[str, bytes] | bytes] = {}
    for (symbol, exchange), body in members.items():
        if exchange:
            group = grouped.setdefault(symbol, {})
            if isinstance(group, dict):
                group[exchange] = body
        else:
            grouped[symbol] = body
    return _braces(
        [(name, value if isinstance(value, bytes) else _braces(list(value.items()))) for name, value in grouped.items()]
    )


def _braces(members: Sequence[tuple[str, bytes]]) -> bytes:
    return b"{%b}" % b",".join(orjson.dumps(name) + b":" + body for name, body in members)


def _matches(conditions: Sequence[str], etag: str) -> bool:
    """Weak comparison, as If-None-Match asks for (RFC 9110 section 13.1.2)."""
    tags = [tag.strip().removeprefix("W/") for condition in conditions for tag in condition.split(",")]
    return etag in tags or tags == ["*"]
