"""The composition root: builds the app, and starts and stops the gateway.

Run it with `uvicorn src.api:app --no-proxy-headers`.
"""

import asyncio
from collections.abc import AsyncIterator, Coroutine, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from typing import Any

from starlette.middleware.cors import CORSMiddleware

from config import ConfigError, Settings, load_settings
from src.core import metrics
from src.core.background import repeat, report_error
from src.core.clock import Clock, SystemClock
from src.core.logs import set_up_logging
from src.exchanges.manager import PROBE_TICK_SECONDS
from src.gateway import Gateway
from src.kinds import DATA_ROUTES, KINDS
from src.raw import routes as raw_routes
from src.raw.service import RawService
from src.refresh_ahead import RefreshAhead
from src.streams.hub import StreamHub
from src.web import admin, routes, uvicorn_edge
from src.web.dashboard import HOUR_SAMPLE_SECONDS, SAMPLE_SECONDS, Dashboard
from src.web.fast_path import FastPath
from src.web.gate import Gate
from src.web.handlers import HANDLERS
from src.web.middleware import Access, Observe
from src.web.openapi import DescribedApp
from src.web.wire_path import WirePath

STOP_SECONDS = 3.0  # for a background task to end after it was cancelled
FOLLOW_SECONDS = 0.1  # before each attempt to listen for cache clears in Redis
FRESHNESS_HEADERS = ["Age", "ETag", "Cache-Status"]
REQUEST_HEADERS = ["Retry-After", "X-Request-ID", "RateLimit", "RateLimit-Policy"]


def create_app(
    settings: Settings, clock: Clock | None = None, snapshots: Mapping[str, bytes] | None = None
) -> FastPath:
    """Build the app behind the fast path. Its lifespan starts and stops the gateway.

    `snapshots` maps exchanges to prepared market lists (see `ccxt_client.load_snapshot`). The
    gateway starts from them as from those in Redis, without a call to the exchange.
    """
    clock = clock or SystemClock()
    gate = Gate(settings, clock)

    @asynccontextmanager
    async def lifespan(_: object) -> AsyncIterator[dict[str, Any]]:
        async with AsyncExitStack() as stack:
            yield await _start(stack, Gateway(settings, clock, snapshots or {}), gate)

    app = DescribedApp(
        title="Virtuoso",
        version=metrics.VERSION,
        description="A self-hosted market-data gateway: one address, three exchanges, honest ages.",
        lifespan=lifespan,
        exception_handlers=HANDLERS,
        openapi_url="/openapi.json" if settings.docs_enabled else None,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,  # redirects would follow the client's Host header
    )
    routes.add_routes(app, settings)
    raw_routes.add_routes(app)
    admin.add_routes(app)
    _add_middleware(app, settings, gate)
    metrics.initialise(settings.enabled_exchanges, tuple(KINDS), DATA_ROUTES)
    front = FastPath(app, gate, settings, clock)
    front.on_hit = WirePath(front).learn
    return front


def _add_middleware(app: DescribedApp, settings: Settings, gate: Gate) -> None:
    """Add the middleware, innermost first."""
    app.add_middleware(Access, gate=gate)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.cors_origins),
            allow_methods=["GET", "HEAD"],
            allow_headers=["X-API-Key", "If-None-Match", "X-Request-ID"],
            expose_headers=FRESHNESS_HEADERS + REQUEST_HEADERS,
        )
    app.add_middleware(Observe)


async def _start(stack: AsyncExitStack, gateway: Gateway, gate: Gate) -> dict[str, Any]:
    """Start the gateway and its background tasks; `stack` stops them in reverse order.

    Returns the members of `request.state`. `streams` is None if STREAMING is off.
    """
    stack.push_async_callback(gateway.close)
    await gateway.start()
    streams = StreamHub(gateway) if gateway.settings.streaming else None
    if streams is not None:
        stack.callback(uvicorn_edge.call_before_shutdown(streams.announce_shutdown))
    dashboard = Dashboard(gateway, streams)
    for loop in _background_loops(gateway, streams, dashboard):
        task = asyncio.create_task(loop)
        task.add_done_callback(_report_end)
        stack.push_async_callback(_stop, task)
    state = {"gate": gate, "gateway": gateway, "raw": RawService(gateway)}
    return state | {"streams": streams, "dashboard": dashboard}


def _background_loops(
    gateway: Gateway, streams: StreamHub | None, dashboard: Dashboard
) -> list[Coroutine[Any, Any, None]]:
    """Return the loops that run until the gateway stops."""
    manager = gateway.manager
    probes = [partial(manager.probe, name) for name in manager.names]
    loops = [
        *(repeat("breaker_probe", probe, PROBE_TICK_SECONDS) for probe in probes),
        repeat("loop_lag", partial(metrics.measure_loop_lag, gateway.clock)),
        repeat("dashboard", dashboard.recent.take_sample, SAMPLE_SECONDS),
        repeat("dashboard", dashboard.hour.take_sample, HOUR_SAMPLE_SECONDS),
    ]
    if gateway.store.configured:
        loops.append(repeat("redis", gateway.store.ping))
        loops.append(repeat("cache_clears", gateway.cache.follow_clears, FOLLOW_SECONDS))
    if gateway.settings.refresh_ahead:
        loops.append(RefreshAhead(gateway).run())
    if streams is not None:
        loops.append(streams.run())
    return loops


async def _stop(task: asyncio.Task[None]) -> None:
    """Cancel a background task, and wait until it has cleaned up."""
    task.cancel()
    await asyncio.wait([task], timeout=STOP_SECONDS)


def _report_end(task: asyncio.Task[None]) -> None:
    """Report a background task that failed. The gateway continues without it.

    Only `StreamHub.run` can fail: all other tasks repeat a step, and report its errors themselves.
    """
    if not task.cancelled() and (error := task.exception()) is not None:
        report_error("streams", error)


def __getattr__(name: str) -> FastPath:
    """Build `app` when a server asks for it, so that importing reads no environment (PEP 562)."""
    if name != "app":
        raise AttributeError(name)
    try:
        settings = load_settings()
    except ConfigError as error:
        raise SystemExit(f"virtuoso cannot start: {error}") from None
    set_up_logging(settings.log_level, settings.log_format, settings.secrets)
    return create_app(settings)
