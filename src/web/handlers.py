"""Exception handlers: every exception becomes a problem document."""

from typing import Any

from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from src.core import errors
from src.core.logs import request_id
from src.web.responses import problem


async def handle_gateway_error(request: Request, error: Any) -> Response:
    """Answer with an error of the gateway."""
    return problem(error, request.url.path)


async def handle_validation_error(_: Request, error: Any) -> Response:
    """Answer with the first parameter that FastAPI found to be invalid."""
    first = error.errors()[0]
    fault = f": {first['msg']}"
    if first["type"] == "string_too_short":  # the minimum is 1: an empty text could mean "all"
        fault = " is empty; give it a value, or leave it out if it is optional"
    return problem(errors.InvalidParameter(f"{first['loc'][-1]}{fault}"))


async def handle_http_error(request: Request, error: Any) -> Response:
    """Answer with an error of the router: an unknown path or method."""
    if error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "GET").replace("GET", "GET, HEAD")
        detail = f"{request.method} is not supported at this path; use {allowed}"
        return problem(errors.MethodNotAllowed(detail), request.url.path, {"Allow": allowed})
    if request.url.path == "/ws" and request.state.gateway.settings.streaming:
        detail = "this path serves only WebSockets; connect with a WebSocket client"
    else:
        detail = "nothing is served at this path; try /ticker/BTC-USDT or /health"
    return problem(errors.NotFound(detail), request.url.path)


async def handle_unexpected_error(request: Request, __: Exception) -> Response:
    """Answer with a 500 that reveals nothing; the server logs the exception."""
    error = errors.InternalError("the gateway failed; search its log for this X-Request-ID")
    return problem(error, request.url.path, {"X-Request-ID": request_id.get()})


HANDLERS: dict[Any, Any] = {
    errors.GatewayError: handle_gateway_error,
    RequestValidationError: handle_validation_error,
    HTTPException: handle_http_error,
    Exception: handle_unexpected_error,
}
