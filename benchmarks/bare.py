"""Apps that the gateway is compared with: a bare ASGI app, FastAPI, and no fast path.

The bare app is the upper limit of what Python under uvicorn can serve. It and the FastAPI route
repeat a recorded response of the gateway.
"""

import json
import os
from pathlib import Path
from typing import Annotated

from fastapi import FastAPI, Query
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from config import load_settings
from src.api import create_app


def create_bare_app() -> ASGIApp:
    """Create an ASGI app that sends the recorded response to every request."""
    headers, body = _recorded_response()
    start = {
        "type": "http.response.start",
        "status": 200,
        "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
    }

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await send(start)
            await send({"type": "http.response.body", "body": body})

    return app


def create_fastapi_app() -> FastAPI:
    """Create an app with the gateway's ticker route, which sends the recorded response."""
    headers, body = _recorded_response()
    app = FastAPI()

    @app.get("/ticker/{symbol:path}")
    async def get_ticker(
        symbol: str,
        exchange: Annotated[str | None, Query(max_length=32)] = None,
        max_age: Annotated[float | None, Query(ge=0, le=86400, allow_inf_nan=False)] = None,
    ) -> Response:
        return Response(body, headers=headers)

    return app


def create_gateway_without_fast_path() -> FastAPI:
    """Create the gateway without its fast path: FastAPI handles every request."""
    return create_app(load_settings()).app


def _recorded_response() -> tuple[dict[str, str], bytes]:
    recorded = json.loads(Path(os.environ["BENCH_RESPONSE"]).read_text())
    return recorded["headers"], recorded["body"].encode()
