"""Reads a market list in a child process, which runs while the list is being read.

ccxt parses a list in one piece. In the gateway's process, in a thread as well, that would block
every request for up to 0.2 s, and the memory would not return.

The child runs this module as a script. It reads a pickled request from stdin: `ClientOptions`
without keys, the maximum size in bytes, and the time of the snapshot (UTC seconds). It writes to
stdout a line of JSON with the outcome, and then the snapshot. It ends when stdin is closed: it
never outlives the gateway.
"""

import asyncio
import contextlib
import gc
import json
import logging
import os
import pickle
import sys
from asyncio.subprocess import DEVNULL, PIPE, Process
from dataclasses import replace
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING

from multidict import CIMultiDict

from src.core import errors
from src.exchanges.ccxt_client import ClientOptions, load_snapshot
from src.exchanges.http_client import Answer
from src.exchanges.profiles import PROFILES
from src.exchanges.translation import translate

if TYPE_CHECKING:
    from config import Settings

log = logging.getLogger(__name__)

ROOT = Path(__file__).parents[2]
CHILD = (sys.executable, "-m", "src.exchanges.market_reader")
NICENESS = 10  # on a busy machine, requests come first


async def read_markets(exchange: str, settings: "Settings", response: Answer, now: float) -> bytes:
    """Read a market list. Return its snapshot made at `now` (UTC seconds).

    Fills in `response`. Raises the `GatewayError` of the exchange's failure, or `InternalError` if
    the child failed.
    """
    options = ClientOptions.from_settings(exchange, settings)
    options = replace(options, api_key="", api_secret="")
    child = await _start_child()
    assert child.stdin is not None and child.stdout is not None  # noqa: S101, PT018 - pipes
    try:
        child.stdin.write(pickle.dumps((options, response.max_bytes, now)))
        output = await child.stdout.read()
        await child.wait()
    finally:
        with contextlib.suppress(ProcessLookupError):
            child.kill()
        await child.wait()
    if child.returncode:
        log.error("market reader failed", extra={"code": child.returncode})
        raise errors.InternalError("the process that reads a market list failed", exchange=exchange)
    outcome, _, snapshot = output.partition(b"\n")
    response.status, headers, response.is_json, error = json.loads(outcome)
    response.headers = CIMultiDict(headers)
    if error:
        kind, detail, retry_after, scope = error
        failure = getattr(errors, kind)(detail, exchange=exchange, retry_after=retry_after)
        failure.scope = scope
        raise failure
    return snapshot


async def _start_child() -> Process:
    from config import foreign_environment  # the child imports this module, and needs no settings

    return await asyncio.create_subprocess_exec(
        *CHILD,
        env=foreign_environment() | {"PYTHONPATH": str(ROOT)},
        stdin=PIPE,
        stdout=PIPE,
        stderr=DEVNULL,  # a message might contain a proxy's password
        start_new_session=True,  # Ctrl-C reaches only the gateway
    )


async def _read(options: ClientOptions, max_bytes: int, now: float) -> bytes:
    """Read a market list. Return the outcome and the snapshot."""
    PROFILES[options.profile.name] = options.profile
    response = Answer(max_bytes=max_bytes)
    reason = None
    snapshot = b""
    try:
        snapshot = await load_snapshot(options, response, now)
    except Exception as raised:  # noqa: BLE001 - raised again in the gateway
        error = translate(options.profile.name, raised, response, now)
        reason = (type(error).__name__, error.detail, error.retry_after, error.scope)
    outcome = (response.status, dict(response.headers), response.is_json, reason)
    return json.dumps(outcome).encode() + b"\n" + snapshot


def _end_with_gateway() -> None:
    """Wait until stdin is closed. Then end the process."""
    os.read(sys.stdin.fileno(), 1)
    os._exit(0)


if __name__ == "__main__":
    gc.disable()  # the process ends before it needs a collection
    os.nice(NICENESS)
    request = pickle.load(sys.stdin.buffer)  # noqa: S301 - of the gateway
    Thread(target=_end_with_gateway, daemon=True).start()
    sys.stdout.buffer.write(asyncio.run(_read(*request)))
