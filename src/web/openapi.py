"""The OpenAPI document: what each operation answers, with an example of every answer."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
from fastapi import FastAPI
from starlette.responses import Response

from src.core import errors

# operation -> status -> body
EXAMPLES = orjson.loads(Path(__file__).with_name("openapi_examples.json").read_bytes())
SECURITY_SCHEMES = {
    "ApiKey": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
    "AdminToken": {"type": "http", "scheme": "bearer"},
}
DESCRIPTIONS = {
    200: "The answer.",
    304: "The answer still has the tag in If-None-Match.",
    503: "The same document when the gateway cannot answer requests for market data.",
}

Errors = tuple[type[errors.GatewayError], ...]
OPEN = (errors.MalformedRequest, errors.UriTooLong, errors.HeadersTooLarge, errors.InternalError)
GUARDED = (*OPEN, errors.Unauthorized, errors.TooManyRequests)


class DescribedApp(FastAPI):
    """An app whose document has an example of every answer, and the keys that operations need."""

    def add_operation(
        self,
        path: str,
        handler: Callable[..., Any],
        body: Any,
        problems: Errors,
        *,
        has_etag: bool = False,
        needs_key: bool = False,
        **options: Any,
    ) -> None:
        """Add the route of an operation, with the options of `add_api_route`.

        `body` is a model, or the media type of a text. `problems` are the errors that the operation
        can answer with. The operation id is `getOrderBook` for the handler `get_order_book`.
        `needs_key`: whether operations that check API keys need one.
        """
        verb, *nouns = handler.__name__.split("_")
        options["operation_id"] = verb + "".join(map(str.title, nouns))
        options["responses"] = _responses(options["operation_id"], body, problems)
        if has_etag:
            options["responses"][304] = {"description": DESCRIPTIONS[304]}
        if errors.AdminTokenMissing in problems:
            options["openapi_extra"] = {"security": [{"AdminToken": []}]}
        elif needs_key and errors.Unauthorized in problems:
            options["openapi_extra"] = {"security": [{"ApiKey": []}]}
        self.add_api_route(path, handler, response_class=Response, response_model=None, **options)

    def openapi(self) -> dict[str, Any]:
        """Return the document. It is built once."""
        if self.openapi_schema is None:
            document = super().openapi()
            document["components"]["securitySchemes"] = SECURITY_SCHEMES
            for methods in document["paths"].values():
                for operation in methods.values():
                    _complete(operation)
        return super().openapi()


def _complete(operation: dict[str, Any]) -> None:
    """Simplify the parameters of an operation, and add the examples of its answers."""
    for parameter in operation.get("parameters", []):
        _simplify(parameter)
    for status, example in EXAMPLES[operation["operationId"]].items():
        (content,) = operation["responses"][status]["content"].values()
        content["example"] = example  # not earlier, because FastAPI drops members that are null


def _simplify(parameter: dict[str, Any]) -> None:
    """Remove null, as an absent parameter is left out, and give required ones an example.

    `/docs` fills in the example.
    """
    schema = parameter["schema"]
    for kind in schema.pop("anyOf", []):
        schema |= kind if kind != {"type": "null"} else {}
    if parameter["required"]:
        parameter["example"] = schema["examples"][0]


def _responses(operation_id: str, body: Any, problems: Errors) -> dict[int | str, dict[str, Any]]:
    """Return the `responses` of an operation, for `add_api_route`."""
    responses: dict[int | str, dict[str, Any]] = {}
    for status in map(int, EXAMPLES[operation_id]):
        responses[status] = {"description": DESCRIPTIONS[status]}
        if isinstance(body, str):
            responses[status]["content"] = {body: {"schema": {"type": "string"}}}
        else:
            responses[status]["model"] = body
    for error in problems:
        response = responses.setdefault(error.status, {"description": error.title, "content": {}})
        empty = {"schema": {"$ref": "#/components/schemas/Problem"}, "examples": {}}
        content = response["content"].setdefault("application/problem+json", empty)
        example = error((error.__doc__ or error.title).splitlines()[0])
        content["examples"][error.code] = {"value": example.problem()}
    return responses
