"""The routes under /admin, which need the admin token."""

from functools import partial
from typing import Annotated, Literal

from fastapi import Depends, Request
from starlette.responses import Response

from src.core import errors
from src.store.redis import RedisUnavailable
from src.web import documents, responses
from src.web.openapi import OPEN, DescribedApp
from src.web.routes import ExchangeName, gateway_of, path, query

REFUSALS = (errors.AdminTokenMissing, errors.TooManyRequests)
ADMIN = (*OPEN, *REFUSALS, errors.NotFound, errors.InvalidParameter)
CLEAR_ERRORS = (*ADMIN, errors.UnknownExchange)
CLEARED_SYMBOL = query("Clear only this symbol.", "BTC-USDT", min_length=1, max_length=64)
BANS = query("`keep` leaves exchanges alone that asked for a pause.", "keep")


async def check_request(request: Request) -> None:
    """Check the admin token, and refuse every parameter that the route does not have.

    Otherwise a parameter that is misspelt, repeated or sent in a body would be ignored, and the
    route would do more than intended: clear everything, or lift all bans.
    """
    request.state.gate.check_admin(request.scope, gateway_of(request).store)
    parameters = [field.alias for field in request.scope["route"].dependant.query_params]
    given = [name for name, _ in request.query_params.multi_items()]
    headers = request.headers
    has_body = headers.get("content-length", "0") != "0" or "transfer-encoding" in headers
    if has_body or len(given) > len(set(given)) or set(given) - set(parameters):
        allowed = f"only {', '.join(parameters)}, each once" if parameters else "no parameters"
        raise errors.InvalidParameter(f"send {allowed} in the query, and no body")


async def clear_cache(
    request: Request,
    exchange: ExchangeName = None,
    symbol: Annotated[str | None, CLEARED_SYMBOL] = None,
) -> Response:
    """Clear the cache of all replicas, or only one exchange or symbol of it.

    Keys of other applications in Redis are not touched.
    """
    gateway = gateway_of(request)
    name = None if exchange is None else gateway.markets.check_exchange(exchange)
    canonical = None if symbol is None else gateway.markets.canonical(symbol)
    try:
        cleared = await gateway.cache.clear(name, canonical)
    except RedisUnavailable:
        state = "does not answer: its entries and those of other replicas stay until they expire"
        return responses.json({"cleared": None, "redis": state})
    state = "cleared" if gateway.store.configured else "none"
    return responses.json({"cleared": cleared, "redis": state})


async def reset_breakers(
    request: Request, bans: Annotated[Literal["forget", "keep"], BANS] = "forget"
) -> Response:
    """Close every circuit breaker and forget every ban; `bans=keep` keeps the bans."""
    names = await gateway_of(request).manager.reset_breakers(keep_holds=bans == "keep")
    return responses.json({"reset": names})


async def record_maintenance(
    request: Request,
    task: Annotated[
        Literal["daily", "check", "deep_check", "warm"], path("The task that succeeded.", "daily")
    ],
) -> Response:
    """Record that a maintenance task succeeded now."""
    await gateway_of(request).record_maintenance(task)
    return responses.json({"recorded": task})


def add_routes(app: DescribedApp) -> None:
    """Add the admin API to the app."""
    checks = [Depends(check_request)]
    add = partial(app.add_operation, tags=["admin"], methods=["POST"], dependencies=checks)
    add("/admin/cache/clear", clear_cache, documents.ClearedCache, CLEAR_ERRORS)
    add("/admin/breakers/reset", reset_breakers, documents.ResetBreakers, ADMIN)
    add("/admin/maintenance/{task}", record_maintenance, documents.RecordedTask, ADMIN)
