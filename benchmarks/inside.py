"""The time a memory hit takes inside the ASGI app, without any socket, in turn with the bare app in the same process.

Started by `benchmarks.bench` with the environment of a gateway; prints the times of every call in nanoseconds as JSON.
"""

import argparse
import asyncio
import cProfile
import json
import pstats
import time
from pathlib import Path
from typing import Any

import uvloop
from starlette.types import ASGIApp, Message
from uvicorn import Config
from uvicorn.lifespan.on import LifespanOn

from benchmarks.bare import make
from benchmarks.figures import percentile
from benchmarks.servers import PATH
from src import api


def scope(state: dict[str, Any]) -> dict[str, Any]:
    """Return what uvicorn makes of one GET request."""
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "server": ("127.0.0.1", 8000),
        "client": ("127.0.0.1", 50000),
        "scheme": "http",
        "root_path": "",
        "headers": [(b"host", b"127.0.0.1:8000"), (b"user-agent", b"bench"), (b"accept", b"*/*")],
        "state": state.copy(),
        "method": "GET",
        "path": PATH,
        "raw_path": PATH.encode(),
        "query_string": b"",
    }


async def call(app: ASGIApp, state: dict[str, Any], count: int) -> list[int]:
    """Call the app so often; returns the nanoseconds of each call."""
    times = []
    for number in range(count):
        fresh = scope(state)
        began = time.perf_counter_ns()
        await app(fresh, receive, send)
        times.append(time.perf_counter_ns() - began)
        if number % 100 == 0:  # let the app's own tasks run, as they do between requests
            await asyncio.sleep(0)
    return times


async def receive() -> Message:
    return {"type": "http.request", "body": b"", "more_body": False}


async def send(message: Message) -> None:
    """Take the answer and do nothing with it."""


async def found(app: ASGIApp, state: dict[str, Any]) -> tuple[int, bytes]:
    """Call the app once; returns the status and how the cache found it."""
    starts: list[Message] = []

    async def keep(message: Message) -> None:
        starts.append(message)

    await app(scope(state), receive, keep)
    return starts[0]["status"], dict(starts[0]["headers"]).get(b"cache-status", b"")


async def main(pairs: int, calls: int) -> None:
    """Start the gateway, wait for a hit, measure both apps in turn, and print milliseconds."""
    app, bare = api.app, make()
    lifespan = LifespanOn(Config(app, log_level="warning"))
    await lifespan.startup()
    deadline = time.monotonic() + 30
    while b"detail=memory" not in (await found(app, lifespan.state))[1]:
        if time.monotonic() > deadline:
            raise SystemExit(f"no memory hit came: {await found(app, lifespan.state)}")
        await asyncio.sleep(0.05)
    await call(app, lifespan.state, calls // 10)
    measured: dict[str, list[tuple[float, float]]] = {"gateway": [], "bare": []}
    sides: list[tuple[str, ASGIApp, dict[str, Any]]] = [("gateway", app, lifespan.state), ("bare", bare, {})]
    for pair in range(pairs):
        for name, one, state in sides if pair % 2 else sides[::-1]:
            times = [nanoseconds / 1e6 for nanoseconds in await call(one, state, calls)]
            measured[name].append((percentile(times, 0.50), percentile(times, 0.99)))
    profiler = cProfile.Profile()
    profiler.enable()
    await call(app, lifespan.state, calls)
    profiler.disable()
    last = await found(app, lifespan.state)
    await lifespan.shutdown()
    if last[0] != 200 or b"detail=memory" not in last[1]:
        raise SystemExit(f"the last call was no memory hit: {last}")
    print(json.dumps({**measured, "profile": shares(profiler)}))


def shares(profiler: cProfile.Profile) -> list[tuple[str, float]]:
    """Name the functions that take the most time of their own, each with its percentage of the time in the app."""
    rows = pstats.Stats(profiler).get_stats_profile().func_profiles
    outside = (__file__, "~")
    inside = {
        name: row for name, row in rows.items() if row.file_name not in outside and "asyncio" not in row.file_name
    }
    own = {f"{Path(row.file_name).stem}.{name}": row.tottime for name, row in inside.items()}
    whole = sum(own.values())
    return [(name, 100 * own[name] / whole) for name in sorted(own, key=own.__getitem__, reverse=True)[:10]]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pairs", type=int)
    parser.add_argument("calls", type=int)
    chosen = parser.parse_args()
    uvloop.run(main(chosen.pairs, chosen.calls))
