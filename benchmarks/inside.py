"""Measure the time of a memory hit inside the ASGI app, without sockets, beside the bare app.

`benchmarks.bench` starts this module with the environment of a gateway. It prints p50 and p99 in
milliseconds for each round, and a profile, as JSON.
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

from benchmarks.bare import create_bare_app
from benchmarks.figures import percentile
from benchmarks.servers import PATH
from src import api

FIRST_HIT_SECONDS = 30.0
YIELD_EVERY = 100  # calls, after which tasks of the app may run, as they do between requests
PROFILED_FUNCTIONS = 10

State = dict[str, Any]


def scope(state: State) -> dict[str, Any]:
    """Return the ASGI scope that uvicorn creates for a GET request."""
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


async def call(app: ASGIApp, state: State, count: int) -> list[float]:
    """Call the app `count` times and return the milliseconds of each call."""
    times = []
    for number in range(count):
        request_scope = scope(state)
        began = time.perf_counter_ns()
        await app(request_scope, receive, send)
        times.append((time.perf_counter_ns() - began) / 1e6)
        if number % YIELD_EVERY == 0:
            await asyncio.sleep(0)
    return times


async def receive() -> Message:
    return {"type": "http.request", "body": b"", "more_body": False}


async def send(message: Message) -> None:
    """Discard a message of the response."""


async def request(app: ASGIApp, state: State) -> tuple[int, bytes]:
    """Call the app once and return the status and the `Cache-Status` header."""
    messages: list[Message] = []

    async def collect(message: Message) -> None:
        messages.append(message)

    await app(scope(state), receive, collect)
    start = messages[0]
    return start["status"], dict(start["headers"]).get(b"cache-status", b"")


def is_memory_hit(response: tuple[int, bytes]) -> bool:
    status, cache_status = response
    return status == 200 and b"detail=memory" in cache_status


async def main(rounds: int, calls: int) -> None:
    """Start the gateway, measure both apps in turn, profile the gateway, and print the results."""
    app = api.app
    lifespan = LifespanOn(Config(app, log_level="warning"))
    await lifespan.startup()
    state = lifespan.state
    await wait_for_hit(app, state)
    await call(app, state, calls // 10)
    results = await measure(app, state, rounds, calls)
    profiler = cProfile.Profile()
    profiler.enable()
    await call(app, state, calls)
    profiler.disable()
    last = await request(app, state)
    await lifespan.shutdown()
    if not is_memory_hit(last):
        raise SystemExit(f"the last response is not a memory hit: {last}")
    print(json.dumps({**results, "profile": profile_shares(profiler)}))


async def wait_for_hit(app: ASGIApp, state: State) -> None:
    """Call the app until the response is a memory hit."""
    deadline = time.monotonic() + FIRST_HIT_SECONDS
    while not is_memory_hit(response := await request(app, state)):
        if time.monotonic() > deadline:
            raise SystemExit(f"no memory hit after {FIRST_HIT_SECONDS:g} s: {response}")
        await asyncio.sleep(0.05)


async def measure(
    app: ASGIApp, state: State, rounds: int, calls: int
) -> dict[str, list[tuple[float, float]]]:
    """Measure the gateway and the bare app in turn; return p50 and p99 of each round."""
    sides: list[tuple[str, ASGIApp, State]] = [
        ("bare", create_bare_app(), {}),
        ("gateway", app, state),
    ]
    results: dict[str, list[tuple[float, float]]] = {"gateway": [], "bare": []}
    for _ in range(rounds):
        for name, side_app, side_state in sides:
            times = await call(side_app, side_state, calls)
            results[name].append((percentile(times, 0.50), percentile(times, 0.99)))
        sides.reverse()
    return results


def profile_shares(profiler: cProfile.Profile) -> list[tuple[str, float]]:
    """Return the functions with the most time of their own, as percentages of the app's time."""
    profiles = pstats.Stats(profiler).get_stats_profile().func_profiles
    seconds = {
        f"{Path(profile.file_name).stem}.{name}": profile.tottime
        for name, profile in profiles.items()
        if profile.file_name not in (__file__, "~") and "asyncio" not in profile.file_name
    }
    total = sum(seconds.values())
    slowest = sorted(seconds, key=seconds.__getitem__, reverse=True)[:PROFILED_FUNCTIONS]
    return [(name, 100 * seconds[name] / total) for name in slowest]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rounds", type=int)
    parser.add_argument("calls", type=int)
    options = parser.parse_args()
    uvloop.run(main(options.rounds, options.calls))
