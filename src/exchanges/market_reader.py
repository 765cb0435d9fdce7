"""Reads market lists in a child process, which is there while any list is being read.

ccxt parses a list in one piece, and one thread of a process runs at a time: in the gateway's process, in a thread too,
that would hold up every request by up to 0.2 s, and leave behind the memory it took. The child is told what it needs
through its stdin; no key is part of that, nor of its environment. It reads every list that is wanted meanwhile, and
ends when its stdin does.
"""

import asyncio
import contextlib
import itertools
import json
import logging
import os
import sys
from asyncio.subprocess import DEVNULL, PIPE, Process
from pathlib import Path
from typing import Any

from multidict import CIMultiDict

from config import Settings, foreign_environment, load_settings
from src.core import errors
from src.exchanges.ccxt_client import load_snapshot, translate
from src.exchanges.http_client import Answer

log = logging.getLogger(__name__)

ROOT = Path(__file__).parents[2]
# Without garbage collection: it would take a part of the child's time, and the process ends before it needs one.
CHILD = "import gc, sys; gc.disable(); sys.path.insert(0, ''); from src.exchanges.market_reader import main; main()"
NICENESS = 10  # on a busy machine requests come first


class MarketReader:
    """Asks the child, which it starts and ends. Every list has its own answer, whatever becomes of the others."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._numbers = itertools.count()
        self._waiting: dict[int, asyncio.Future[tuple[dict[str, Any], bytes] | None]] = {}
        self._starting = asyncio.Lock()
        self._child: Process | None = None
        self._listener: asyncio.Task[None] | None = None

    async def read(self, exchange: str, got: Answer, now: float) -> bytes:
        """Return an exchange's market list as a snapshot made at `now` (UTC seconds), and fill in `got`.

        Raises `GatewayError`: what the child made of the exchange's failure, or `InternalError` when the child failed.
        """
        number = next(self._numbers)
        answer = self._waiting[number] = asyncio.get_running_loop().create_future()
        try:
            await self._tell({"number": number, "exchange": exchange, "max_bytes": got.max_bytes, "now": now})
            told = await answer
        except OSError:
            told = None
        finally:
            del self._waiting[number]
            if not self._waiting:
                await self._end()
        if told is None:
            raise errors.InternalError("the process that reads market lists failed", exchange=exchange)
        result, snapshot = told
        got.status, got.headers, got.is_json = result["status"], CIMultiDict(result["headers"]), result["is_json"]
        if (error := result["error"]) is not None:
            kind: type[errors.GatewayError] = getattr(errors, error["kind"])
            raise kind(error["detail"], exchange=exchange, retry_after=error["retry_after"])
        return bytes(snapshot)

    async def _tell(self, asked: dict[str, Any]) -> None:
        own = self._settings.exchange(asked["exchange"])
        environment = {
            f"{asked['exchange'].upper()}_REST_URL": own.rest_url,
            "HTTPS_PROXY": self._settings.https_proxy.get_secret_value(),
            "MARKET_TYPES": ",".join(self._settings.market_types),
        }
        async with self._starting:
            if self._child is None:
                # In a session of its own, so that Ctrl-C reaches only the gateway. What it says beside its answers
                # could hold an address with a password, so nobody hears it.
                self._child = await asyncio.create_subprocess_exec(
                    sys.executable,
                    "-c",
                    CHILD,
                    cwd=ROOT,
                    env=foreign_environment(),
                    stdin=PIPE,
                    stdout=PIPE,
                    stderr=DEVNULL,
                    start_new_session=True,
                )
                self._listener = asyncio.create_task(self._listen(self._child))
            child = self._child
        assert child.stdin is not None  # noqa: S101 - it is a pipe
        child.stdin.write(json.dumps(asked | {"environment": environment}).encode() + b"\n")
        await child.stdin.drain()

    async def _listen(self, child: Process) -> None:
        """Hand each answer to who waits for it; when the child ends, whoever still waits is told."""
        assert child.stdout is not None  # noqa: S101
        try:
            while told := await child.stdout.readline():
                result = json.loads(told)
                snapshot = await child.stdout.readexactly(result["length"])
                waiting = self._waiting.get(result["number"])
                if waiting is not None and not waiting.done():
                    waiting.set_result((result, snapshot))
        except (ValueError, asyncio.IncompleteReadError):
            pass
        finally:
            with contextlib.suppress(ProcessLookupError):
                child.kill()
            if child is self._child:
                self._child = None
                for waiting in [waiting for waiting in self._waiting.values() if not waiting.done()]:
                    waiting.set_result(None)
                log.error("the process that reads market lists ended", extra={"code": await child.wait()})

    async def _end(self) -> None:
        """End the child; it is gone when this returns."""
        child, listener, self._child = self._child, self._listener, None
        if child is None or listener is None:
            return
        listener.cancel()
        with contextlib.suppress(ProcessLookupError):
            child.kill()
        await child.wait()


def main() -> None:
    """Be the child, until stdin ends: that it does too when the gateway was killed."""
    os.nice(NICENESS)
    asyncio.run(_serve())
    os._exit(0)  # taking all modules down in order costs up to 50 ms


async def _serve() -> None:
    asked = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(asked), sys.stdin)
    tasks: set[asyncio.Task[None]] = set()  # keeps them from being collected
    while line := await asked.readline():
        tasks.add(asyncio.create_task(_answer(**json.loads(line))))


async def _answer(number: int, exchange: str, max_bytes: int, now: float, environment: dict[str, str]) -> None:
    """Write one line of JSON that says what came of it, and behind it the snapshot."""
    got = Answer(max_bytes=max_bytes)
    result: dict[str, Any] = {"number": number, "error": None}
    snapshot = b""
    try:
        settings = load_settings(environment, Path(os.devnull))
        snapshot = await load_snapshot(exchange, settings, got, now)
    except Exception as error:  # noqa: BLE001 - every one is translated, and raised again in the gateway
        ours = translate(exchange, error, got)
        result["error"] = {"kind": type(ours).__name__, "detail": ours.detail, "retry_after": ours.retry_after}
    result |= {"status": got.status, "headers": dict(got.headers), "is_json": got.is_json, "length": len(snapshot)}
    sys.stdout.buffer.write(json.dumps(result).encode() + b"\n" + snapshot)
    sys.stdout.flush()
