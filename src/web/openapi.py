"""The OpenAPI document: what each operation answers, with an example of every answer."""

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import orjson
from fastapi import FastAPI

from src.core import errors, models
from src.web import documents

EXAMPLES = Path(__file__).with_name("openapi_examples.json")  # operation -> status -> body; from sandbox exchanges
SECURITY_SCHEMES = {
    "ApiKey": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
    "AdminToken": {"type": "http", "scheme": "bearer"},
}
DESCRIPTIONS = {
    200: "The answer.",
    304: "The tag in If-None-Match is still the tag of the answer.",
    503: "The same document when the gateway cannot answer requests for market data.",
}

Errors = tuple[type[errors.GatewayError], ...]
OPEN: Errors = (errors.MalformedRequest, errors.UriTooLong, errors.HeadersTooLarge, errors.InternalError)
GUARDED: Errors = (*OPEN, errors.Unauthorized, errors.TooManyRequests)
MARKET_DATA: Errors = (
    *GUARDED, errors.UnknownSymbol, errors.UnknownExchange, errors.InvalidParameter, errors.RequestRejected,
    errors.GeoBlocked, errors.UpstreamError, errors.BadUpstreamData, errors.ExchangeUnavailable,
    errors.ExchangeRateLimited, errors.ExchangeBanned, errors.CircuitOpen, errors.BudgetSpent, errors.Overloaded,
    errors.MarketsLoading, errors.NoExchangeAvailable, errors.TooOld, errors.ExchangeTimeout, errors.DeadlineExceeded,
)  # fmt: skip
STREAMS: Errors = (
    *GUARDED, errors.UnknownSymbol, errors.UnknownExchange, errors.InvalidParameter, errors.MarketsLoading,
    errors.TooManyStreams, errors.TooManySubscriptions, errors.TooManyConnections,
)  # fmt: skip
ADMIN: Errors = (*OPEN, errors.AdminTokenMissing, errors.TooManyRequests, errors.NotFound, errors.InvalidParameter)


class Answers(NamedTuple):
    """What an operation answers: a model or the media type of a text, problems, and whether 304."""

    body: Any
    problems: Errors
    can_be_unchanged: bool = False


ANSWERS = {
    "getTicker": Answers(models.Ticker, (*MARKET_DATA, errors.NoPrice), True),
    "getTickers": Answers(
        documents.TickerBatch | documents.TickerTable, (*GUARDED, errors.UnknownExchange, errors.InvalidParameter), True
    ),
    "getOrderBook": Answers(models.OrderBook, MARKET_DATA, True),
    "getOhlcv": Answers(models.Candles, MARKET_DATA, True),
    "getTrades": Answers(models.Trades, (*MARKET_DATA, errors.NoPrice), True),
    "getStream": Answers("text/event-stream", STREAMS),
    "getMarkets": Answers(
        documents.Listings, (*GUARDED, errors.UnknownExchange, errors.InvalidParameter, errors.MarketsLoading)
    ),
    "getExchanges": Answers(documents.Exchanges, GUARDED),
    "getHealth": Answers(documents.Health, OPEN),
    "getLive": Answers(documents.Liveness, OPEN),
    "getReady": Answers(documents.Readiness, OPEN),
    "getMetrics": Answers("text/plain", OPEN),
    "getDashboardData": Answers(documents.DashboardData, (*GUARDED, errors.InvalidParameter), True),
    "clearCache": Answers(documents.ClearedCache, (*ADMIN, errors.UnknownExchange)),
    "resetBreakers": Answers(documents.ResetBreakers, ADMIN),
    "recordMaintenance": Answers(documents.RecordedTask, ADMIN),
}


class DescribedApp(FastAPI):
    """An app whose OpenAPI document has an example of every answer and names the keys that operations need."""

    def openapi(self) -> dict[str, Any]:
        """Return the document; it is made once."""
        if self.openapi_schema is None:
            document = super().openapi()
            document["components"]["securitySchemes"] = SECURITY_SCHEMES
            for operation in (each for methods in document["paths"].values() for each in methods.values()):
                for parameter in operation.get("parameters", []):
                    _simplify(parameter)
                for status, example in _examples()[operation["operationId"]].items():
                    (content,) = operation["responses"][status]["content"].values()
                    content["example"] = example  # added here, because FastAPI drops members that are null
        return super().openapi()


def _simplify(parameter: dict[str, Any]) -> None:
    """Drop null, as a parameter without a value is left out, and let `/docs` fill in what is required."""
    schema = parameter["schema"]
    for kind in schema.pop("anyOf", []):
        schema |= kind if kind != {"type": "null"} else {}
    if parameter["required"]:
        parameter["example"] = schema["examples"][0]


def operation_id(handler: str) -> str:
    """Name an operation after its handler: `get_order_book` is `getOrderBook`."""
    first, *rest = handler.split("_")
    return first + "".join(word.title() for word in rest)


def describe(operation: str, *, needs_key: bool) -> dict[str, Any]:
    """Return the arguments for `add_api_route` that describe the answers of an operation.

    `needs_key` says whether API_KEYS is set, so that guarded operations need one of them.
    """
    body, problems, can_be_unchanged = ANSWERS[operation]
    described: dict[int, dict[str, Any]] = {304: {"description": DESCRIPTIONS[304]}} if can_be_unchanged else {}
    for status in _examples()[operation]:
        answer: dict[str, Any] = {"description": DESCRIPTIONS[int(status)]}
        if isinstance(body, str):
            answer["content"] = {body: {"schema": {"type": "string"}}}
        else:
            answer["model"] = body
        described[int(status)] = answer
    for error in problems:
        _add_problem(described, error)
    scheme = "AdminToken" if errors.AdminTokenMissing in problems else "ApiKey"
    is_secured = errors.AdminTokenMissing in problems or (needs_key and errors.Unauthorized in problems)
    return {"responses": described, "openapi_extra": {"security": [{scheme: []}]} if is_secured else None}


def _add_problem(described: dict[int, dict[str, Any]], error: type[errors.GatewayError]) -> None:
    schema = {"$ref": "#/components/schemas/Problem"}
    answer = described.setdefault(error.status, {"description": error.title, "content": {}})
    content = answer["content"].setdefault("application/problem+json", {"schema": schema, "examples": {}})
    example = error((error.__doc__ or error.title).splitlines()[0])
    content["examples"][error.code] = {"value": example.problem()}


@cache
def _examples() -> Mapping[str, Mapping[str, Any]]:
    examples: dict[str, dict[str, Any]] = orjson.loads(EXAMPLES.read_bytes())
    return examples
