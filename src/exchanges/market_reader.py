"""Reads market lists in a child process, which runs while any list is being read.

ccxt parses a list in one piece. In the gateway's process, in a thread as well, that would block
every request for up to 0.2 s, and the memory would not return.

The child runs this module as a script. It reads pickled requests from stdin: a number,
`ClientOptions` without keys, the maximum size in bytes, and the time of the snapshot (UTC seconds).
It reads all requested lists concurrently. For each it writes a line of JSON with the outcome and
the snapshot (Base64) to stdout. It ends when stdin is closed: it never outlives the gateway.
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
from base64 import b64decode, b64encode
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from multidict import CIMultiDict

from src.core import errors
from src.exchanges.ccxt_client import ClientOptions, load_snapshot
from src.exchanges.http_client import MAX_MARKETS_BYTES, Answer
from src.exchanges.profiles import PROFILES
from src.exchanges.translation import translate

if TYPE_CHECKING:
    from config import Settings

log = logging.getLogger(__name__)

ROOT = Path(__file__).parents[2]
CHILD = (sys.executable, "-m", "src.exchanges.market_reader")
NICENESS = 10  # on a busy machine, requests come first
FAILURE = "the process that reads a market list failed"


class MarketReader:
    """Reads market lists in one child process."""

    def __init__(self, settings: "Settings") -> None:
        self._settings = settings
        self._numbers = count()
        # By the number of the request. None stands for a child that has ended.
        self._results: dict[int, asyncio.Queue[list[Any] | None]] = {}
        self._starting = asyncio.Lock()
        self._child: Process | None = None
        self._receiver: asyncio.Task[None] | None = None

    async def read(self, exchange: str, response: Answer, now: float) -> bytes:
        """Read a market list. Return its snapshot made at `now` (UTC seconds).

        Fills in `response`. Raises the `GatewayError` of the exchange's failure, or `InternalError`
        if the child failed. The child has ended when no list is being read.
        """
        options = ClientOptions.from_settings(exchange, self._settings)
        options = replace(options, api_key="", api_secret="")
        number = next(self._numbers)
        self._results[number] = asyncio.Queue()
        try:
            await self._send(pickle.dumps((number, options, response.max_bytes, now)))
            result = await self._results[number].get()
        finally:
            del self._results[number]
            if not self._results:
                await self._stop()
        if result is None:
            raise errors.InternalError(FAILURE, exchange=exchange)
        response.status, headers, response.is_json, error, snapshot = result
        response.headers = CIMultiDict(headers)
        if error:
            kind, detail, retry_after, scope = error
            failure = getattr(errors, kind)(detail, exchange=exchange, retry_after=retry_after)
            failure.scope = scope
            raise failure
        return b64decode(snapshot)

    async def _send(self, request: bytes) -> None:
        async with self._starting:
            if self._child is None:
                self._child = await _start_child()
                self._receiver = asyncio.create_task(self._receive(self._child))
            assert self._child.stdin is not None  # noqa: S101 - a pipe
            self._child.stdin.write(request)

    async def _receive(self, child: Process) -> None:
        """Deliver the results of a child until it ends."""
        assert child.stdout is not None  # noqa: S101 - a pipe
        with contextlib.suppress(ValueError):  # it was killed while it wrote
            async for line in child.stdout:
                number, *result = json.loads(line)
                if number in self._results:
                    self._results[number].put_nowait(result)
        if child is self._child:  # it ended by itself
            for results in self._results.values():
                results.put_nowait(None)
            await self._stop()
            log.error("market reader failed", extra={"code": child.returncode})

    async def _stop(self) -> None:
        child = self._child
        self._child = None
        if child is not None:
            with contextlib.suppress(ProcessLookupError):
                child.kill()
            await child.wait()


async def _start_child() -> Process:
    from config import foreign_environment  # the child imports this module, and needs no settings

    return await asyncio.create_subprocess_exec(
        *CHILD,
        env=foreign_environment() | {"PYTHONPATH": str(ROOT)},
        stdin=PIPE,
        stdout=PIPE,
        limit=MAX_MARKETS_BYTES,
        stderr=DEVNULL,  # a message might contain a proxy's password
        start_new_session=True,  # Ctrl-C reaches only the gateway
    )


async def main() -> None:
    """Answer requests until stdin is closed."""
    tasks = set()
    with contextlib.suppress(EOFError):
        while True:
            request = await asyncio.to_thread(pickle.load, sys.stdin.buffer)
            tasks.add(asyncio.create_task(_answer(*request)))
    os._exit(0)  # the gateway is gone


async def _answer(number: int, options: ClientOptions, max_bytes: int, now: float) -> None:
    """Read a market list. Write the outcome and the snapshot."""
    PROFILES[options.profile.name] = options.profile
    response = Answer(max_bytes=max_bytes)
    error = None
    snapshot = b""
    try:
        snapshot = await load_snapshot(options, response, now)
    except Exception as raised:  # noqa: BLE001 - raised again in the gateway
        error = translate(options.profile.name, raised, response, now)
    reason = error and (type(error).__name__, error.detail, error.retry_after, error.scope)
    encoded = b64encode(snapshot).decode()
    outcome = (number, response.status, dict(response.headers), response.is_json, reason, encoded)
    print(json.dumps(outcome), flush=True)  # noqa: T201 - the protocol


if __name__ == "__main__":
    gc.disable()  # the process ends before it needs a collection
    os.nice(NICENESS)
    asyncio.run(main())
