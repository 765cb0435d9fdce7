"""The limit: a bare ASGI app under the same server, sending the bytes the gateway sends, and doing nothing else."""

import json
import os
from pathlib import Path

from starlette.types import ASGIApp, Receive, Scope, Send


def make() -> ASGIApp:
    """Make the app that answers every request with the answer recorded in the file BENCH_ANSWER names."""
    recorded = json.loads(Path(os.environ["BENCH_ANSWER"]).read_text())
    body = recorded["body"].encode()
    start = {
        "type": "http.response.start",
        "status": 200,
        "headers": [(name.encode(), value.encode()) for name, value in recorded["headers"].items()],
    }

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await send(start)
            await send({"type": "http.response.body", "body": body})

    return app
