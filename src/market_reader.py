"""Reads an exchange's market list in a process of its own, which ends with it.

ccxt parses a list in one piece, and one thread of a process runs at a time: in the gateway's process, in a thread too,
that would hold up every request by up to 0.2 s, and leave behind the memory it took. The child is told what it needs
through its stdin; no key is part of that.
"""

import asyncio
import contextlib
import json
import os
import signal
import sys
from asyncio.subprocess import DEVNULL, PIPE
from pathlib import Path
from typing import Any

from multidict import CIMultiDict

from config import Settings, load_settings
from src import errors
from src.ccxt_client import MARKETS_TIMEOUT_SECONDS, load_snapshot, translate
from src.http_client import Answer

ROOT = Path(__file__).parents[1]
# Without garbage collection: it would take a part of the child's time, and the process ends before it needs one.
CHILD = "import gc; gc.disable(); from src.market_reader import main; main()"
NICENESS = 10  # on a busy machine requests come first


async def read_markets(exchange: str, settings: Settings, got: Answer, now: float) -> bytes:
    """Return an exchange's market list as a snapshot made at `now` (UTC seconds), and fill in `got`.

    Raises `GatewayError`: what the child made of the exchange's failure, or `InternalError` when the child failed.
    """
    environment = {
        f"{exchange.upper()}_REST_URL": settings.exchange(exchange).rest_url,
        "HTTPS_PROXY": settings.https_proxy.get_secret_value(),
        "MARKET_TYPES": ",".join(settings.market_types),
    }
    asked = {"exchange": exchange, "environment": environment, "max_bytes": got.max_bytes, "now": now}
    try:
        told, _, snapshot = (await _run_child(json.dumps(asked).encode())).partition(b"\n")
        result = json.loads(told)
    except (OSError, ValueError):
        raise errors.InternalError("the process that reads a market list failed", exchange=exchange) from None
    got.status, got.headers, got.is_json = result["status"], CIMultiDict(result["headers"]), result["is_json"]
    if (error := result["error"]) is not None:
        kind: type[errors.GatewayError] = getattr(errors, error["kind"])
        raise kind(error["detail"], exchange=exchange, retry_after=error["retry_after"])
    return snapshot


async def _run_child(asked: bytes) -> bytes:
    """Return what the child writes; it is gone when this returns, or is cancelled."""
    # A session of its own, so that Ctrl-C reaches only the gateway. What it says beside its answer could hold an
    # address with a password, so nobody hears it.
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-c", CHILD, cwd=ROOT, stdin=PIPE, stdout=PIPE, stderr=DEVNULL, start_new_session=True
    )
    try:
        return (await child.communicate(asked))[0]
    finally:
        with contextlib.suppress(ProcessLookupError):
            child.kill()
        await child.communicate()


def main() -> None:
    """Be the child: write one line of JSON that says what came of it, and behind it the snapshot."""
    signal.alarm(round(MARKETS_TIMEOUT_SECONDS))  # for when the gateway was killed and cannot end it
    os.nice(NICENESS)
    asked = json.load(sys.stdin)
    got = Answer(max_bytes=asked["max_bytes"])
    result: dict[str, Any] = {"error": None}
    snapshot = b""
    try:
        settings = load_settings(asked["environment"], Path(os.devnull))
        snapshot = asyncio.run(load_snapshot(asked["exchange"], settings, got, asked["now"]))
    except Exception as error:  # noqa: BLE001 - every one is translated, and raised again in the gateway
        ours = translate(asked["exchange"], error, got)
        result["error"] = {"kind": type(ours).__name__, "detail": ours.detail, "retry_after": ours.retry_after}
    result |= {"status": got.status, "headers": dict(got.headers), "is_json": got.is_json}
    sys.stdout.buffer.write(json.dumps(result).encode() + b"\n" + snapshot)
    sys.stdout.flush()
    os._exit(0)  # taking all modules down in order costs up to 50 ms
