"""Partners: a bare ASGI app, the limit; a route of FastAPI; and the gateway itself without its fast path.

The first two repeat one recorded answer of the gateway.
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


def make() -> ASGIApp:
    """Make the app that answers every request with the recorded answer, and does nothing else."""
    headers, body = _recorded()
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


def make_fastapi() -> FastAPI:
    """Make the app that routes and validates as the gateway does, and then sends the recorded answer."""
    headers, body = _recorded()
    app = FastAPI()

    @app.get("/ticker/{symbol:path}")
    async def get_ticker(
        symbol: str,
        exchange: Annotated[str | None, Query(max_length=32)] = None,
        max_age: Annotated[float | None, Query(ge=0, le=86400, allow_inf_nan=False)] = None,
    ) -> Response:
        return Response(body, headers=headers)

    return app


def make_app_alone() -> FastAPI:
    """Make the gateway as it is without its fast path: each request goes through the framework."""
    return create_app(load_settings()).app


def _recorded() -> tuple[dict[str, str], bytes]:
    recorded = json.loads(Path(os.environ["BENCH_ANSWER"]).read_text())
    return recorded["headers"], recorded["body"].encode()
