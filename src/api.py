"""The HTTP surface: routes that parse, call and return, the lifespan, and the one error handler.

Run it with `uvicorn src.api:app --no-proxy-headers`.
"""

import asyncio
import logging
import re
import signal
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from types import FrameType
from typing import Annotated, Any, Literal, TypedDict

from fastapi import Depends, FastAPI, Path, Query, Request
from fastapi.exceptions import RequestValidationError
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.websockets import WebSocket

from config import ConfigError, Settings, load_settings
from src.core import errors, metrics
from src.core.background import repeat, report_error
from src.core.clock import Clock, SystemClock
from src.core.logs import request_id, set_up_logging
from src.exchanges.manager import PROBE_TICK_SECONDS
from src.gateway import Gateway
from src.refresh_ahead import RefreshAhead
from src.store.redis import RedisAway
from src.streams.hub import StreamHub
from src.web import openapi, responses, status, websocket
from src.web.dashboard import Dashboard, Files
from src.web.fast_path import FastPath
from src.web.gate import Gate
from src.web.middleware import Access, Observe
from src.web.server_events import EventStream

log = logging.getLogger(__name__)

END_SECONDS = 3.0  # for background work to end
FOLLOW_SECONDS = 0.1  # before listening to Redis, and before listening again after it was lost

MAX_SYMBOLS = 100


class State(TypedDict):
    """What the lifespan hands to every request."""

    gate: Gate
    gateway: Gateway
    streams: StreamHub | None
    dashboard: Dashboard


Symbol = Annotated[
    str, Path(description="`BTC-USDT` or `BTC/USDT`, in any case; `BTC-USDT:USDT` for a swap.", examples=["BTC-USDT"])
]
Exchange = Annotated[
    str | None,
    Query(
        min_length=1,
        max_length=32,
        description="Ask only this exchange; without it, the first that can answer.",
        examples=["kraken"],
    ),
]
MaxAge = Annotated[
    float | None,
    Query(
        ge=0,
        le=86400,
        allow_inf_nan=False,
        description="Nothing older than these seconds will do; 0 fetches now. Never silently exceeded.",
        examples=[5],
    ),
]
Timeframe = Annotated[
    Literal["1m", "5m", "15m", "30m", "1h", "4h", "1d", "1w"],
    Query(description="Length of one candle.", examples=["1h"]),
]
Since = Annotated[
    int | None,
    Query(ge=0, le=4102444800000, description="UTC milliseconds of the first candle.", examples=[1795294800000]),
]
Streamed = Annotated[str, Path(description="One symbol, or several with commas.", examples=["BTC-USDT,ETH-USDT"])]
Symbols = Annotated[
    str, Query(min_length=1, description=f"Up to {MAX_SYMBOLS} symbols, with commas.", examples=["BTC/USDT,ETH-USDT"])
]


def create_app(
    settings: Settings, clock: Clock | None = None, snapshots: Mapping[str, bytes] | None = None
) -> FastPath:
    """Build the app, whose lifespan starts and stops the gateway, behind the fast path.

    `snapshots` maps exchanges to prepared market lists (see `ccxt_client.load_snapshot`): the gateway starts from them
    as it would from those in Redis, without a call to the exchange.
    """
    clock = clock or SystemClock()
    gate = Gate(settings, clock)
    return FastPath(_create_app(settings, clock, gate, snapshots or {}), gate, settings, clock)


def _create_app(settings: Settings, clock: Clock, gate: Gate, snapshots: Mapping[str, bytes]) -> FastAPI:

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[State]:
        async with AsyncExitStack() as stack:
            gateway = Gateway(settings, clock, snapshots)
            stack.push_async_callback(gateway.close)
            await gateway.start()
            endless = [repeat("loop_lag", partial(metrics.measure_loop_lag, clock)), gateway.store.keep_asking()]
            endless += [
                repeat("breaker_probe", partial(gateway.manager.probe, name), PROBE_TICK_SECONDS)
                for name in gateway.manager.names
            ]
            if gateway.store.configured:
                endless.append(repeat("cache_clears", gateway.cache.follow_clears, FOLLOW_SECONDS))
            if settings.refresh_ahead:
                endless.append(RefreshAhead(gateway).run())
            streams = StreamHub(gateway) if settings.streaming else None
            if streams is not None:
                endless.append(streams.run())
                stack.callback(_before_stop(partial(_notify_clients, streams)))
            dashboard = Dashboard(gateway, streams)
            endless.append(dashboard.recent.run())
            for work in endless:
                task = asyncio.create_task(work)
                task.add_done_callback(_report)
                stack.push_async_callback(_end, task)
            yield {"gate": gate, "gateway": gateway, "streams": streams, "dashboard": dashboard}

    app = openapi.DescribedApp(
        title="Virtuoso",
        version=metrics.VERSION,
        description="A self-hosted market-data gateway: one address, three exchanges, honest ages.",
        lifespan=lifespan,
        openapi_url="/openapi.json" if settings.docs_enabled else None,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,  # it would send clients to wherever their Host header says
    )
    _add_routes(app, settings, gate)
    _add_handlers(app)
    app.add_middleware(Access, gate=gate)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.cors_origins),
            allow_methods=["GET", "HEAD"],
            allow_headers=["X-API-Key", "If-None-Match", "X-Request-ID"],
            expose_headers=[
                "Age", "ETag", "Cache-Status", "Retry-After", "X-Request-ID", "RateLimit", "RateLimit-Policy",
            ],
        )  # fmt: skip
    app.add_middleware(Observe)
    metrics.initialise(settings.enabled_exchanges)
    return app


def _before_stop(say: Callable[[], None]) -> Callable[[], None]:
    """Have it said as soon as the process is asked to stop: the server closes connections before it ends the lifespan.

    Returns what undoes it.
    """
    loop = asyncio.get_running_loop()
    kept: dict[int, Any] = {}

    def stop(number: int) -> None:
        try:
            say()
        finally:
            if callable(then := kept[number]):
                then(number, None)  # only now: the server looks several times a second whether it was called

    def on_signal(number: int, _: FrameType | None) -> None:
        loop.call_soon_threadsafe(stop, number)

    def undo() -> None:
        for number, then in kept.items():
            signal.signal(number, then)

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGINT):
            kept[number] = signal.signal(number, on_signal)
    return undo


def _notify_clients(streams: StreamHub) -> None:
    try:
        streams.goodbye()
    except Exception as error:  # noqa: BLE001 - reported; nothing may keep the gateway from stopping
        report_error("shutdown", error)


async def _end(background: asyncio.Task[None]) -> None:
    """End background work, and wait for it: it has something to put in order."""
    background.cancel()
    await asyncio.wait([background], timeout=END_SECONDS)


def _report(background: asyncio.Task[None]) -> None:
    """Say that background work has ended: the gateway goes on answering without it, and nobody would notice."""
    if not background.cancelled() and (error := background.exception()) is not None:
        report_error("streams", error)


def _add_routes(app: FastAPI, settings: Settings, gate: Gate) -> None:
    plain: dict[str, Any] = {"response_class": Response, "response_model": None}

    async def open_socket(connection: WebSocket) -> None:
        await websocket.serve(connection, gate, connection.state.streams)

    def add(path: str, handler: Any, tag: str, **options: Any) -> None:
        operation = openapi.operation_id(handler.__name__)
        options |= openapi.describe(operation, needs_key=bool(settings.api_keys))
        app.add_api_route(path, handler, operation_id=operation, tags=[tag], **plain, **options)

    def add_admin(path: str, handler: Any, *parameters: str) -> None:
        add(path, handler, "admin", methods=["POST"], dependencies=[Depends(_admin_only(parameters))])

    add("/ticker/{symbol:path}", get_ticker, "market data")
    add("/tickers", get_tickers, "market data")
    add("/orderbook/{symbol:path}", get_order_book, "market data")
    add("/ohlcv/{symbol:path}", get_ohlcv, "market data")
    add("/trades/{symbol:path}", get_trades, "market data")
    if settings.streaming:
        add("/stream/{symbol:path}", get_stream, "streams")
        app.add_api_websocket_route("/ws", open_socket)
    add("/markets", get_markets, "market data")
    add("/exchanges", get_exchanges, "status")
    add("/health", get_health, "status")
    add("/health/live", get_live, "status")
    add("/health/ready", get_ready, "status")
    if settings.metrics_enabled:
        add("/metrics", get_metrics, "status")
    add("/api/dashboard/data", get_dashboard_data, "status")
    _add_files(app, ["/", "/mobile", "/static/{name}"], Files.of_page())
    if settings.docs_enabled:
        _add_files(app, ["/docs", "/docs/{name}"], Files.of_docs())
    add_admin("/admin/cache/clear", clear_cache, "exchange", "symbol")
    add_admin("/admin/breakers/reset", reset_breakers, "bans")
    add_admin("/admin/maintenance/{task}", record_maintenance)


def _add_files(app: FastAPI, paths: Sequence[str], files: Files) -> None:
    for path in paths:
        app.add_api_route(path, files.send, include_in_schema=False, response_class=Response, response_model=None)


async def get_ticker(request: Request, symbol: Symbol, exchange: Exchange = None, max_age: MaxAge = None) -> Response:
    """Give the price and 24 hour figures of one market."""
    return responses.answer(request, await _gateway(request).ticker(symbol, exchange, max_age))


async def get_tickers(
    request: Request, symbols: Symbols, exchange: Exchange = None, max_age: MaxAge = None
) -> Response:
    """Give many tickers at once; `exchange=all` gives every exchange's, by symbol and exchange.

    The status is 200 even if some or all could not be had: `errors` holds a problem for each of those.
    """
    exchange = exchange and exchange.lower()
    return responses.batch(request, await _gateway(request).tickers(_listed(symbols), exchange, max_age))


def _listed(symbols: str, least: int = 1) -> list[str]:
    """Split a comma list; raises `InvalidParameter` for too many symbols or too few."""
    wanted = list(dict.fromkeys(text.strip() for text in symbols.split(",") if text.strip()))
    if not least <= len(wanted) <= MAX_SYMBOLS:
        raise errors.InvalidParameter(f"symbols: {len(wanted)} were given, {least} to {MAX_SYMBOLS} are allowed")
    return wanted


async def get_order_book(
    request: Request,
    symbol: Symbol,
    exchange: Exchange = None,
    max_age: MaxAge = None,
    limit: Annotated[int, Query(ge=1, le=200, description="Levels on each side.", examples=[10])] = 50,
) -> Response:
    """Give the best levels of an order book."""
    return responses.answer(request, await _gateway(request).order_book(symbol, exchange, max_age, limit))


async def get_ohlcv(
    request: Request,
    symbol: Symbol,
    timeframe: Timeframe = "1m",
    limit: Annotated[int, Query(ge=1, le=1000, description="Most candles; kraken keeps 720.", examples=[24])] = 100,
    since: Since = None,
    exchange: Exchange = None,
    max_age: MaxAge = None,
) -> Response:
    """Give candles, oldest first; the newest may still be growing."""
    served = await _gateway(request).ohlcv(symbol, exchange, max_age, timeframe, limit, since)
    return responses.answer(request, served)


async def get_trades(
    request: Request,
    symbol: Symbol,
    exchange: Exchange = None,
    max_age: MaxAge = None,
    limit: Annotated[
        int, Query(ge=1, le=1000, description="Most trades; bybit gives 60 for spot.", examples=[20])
    ] = 50,
) -> Response:
    """Give the newest public trades, oldest first."""
    return responses.answer(request, await _gateway(request).trades(symbol, exchange, max_age, limit))


async def get_stream(
    request: Request,
    symbol: Streamed,
    channel: Annotated[
        Literal["ticker", "book", "trades"], Query(description="What is pushed.", examples=["book"])
    ] = "ticker",
    exchange: Exchange = None,
    levels: Annotated[int, Query(ge=1, le=50, description="Levels on each side of a book.", examples=[5])] = 10,
) -> Response:
    """Push what is new of some symbols as server-sent events; `exchange=all` pushes every exchange's.

    Of each there is a snapshot first, then updates.
    """
    streams: StreamHub = request.state.streams
    wants = [streams.want(channel, text, exchange or "", levels) for text in _listed(symbol)]
    wanted = {want: streams.find(want) for want in wants}
    count, most = sum(len(topics) for topics in wanted.values()), streams.settings.stream_max_subscriptions
    if count > most:
        raise errors.TooManySubscriptions(f"{count} streams are more than STREAM_MAX_SUBSCRIPTIONS, which is {most}")
    last = request.headers.get("last-event-id", "")
    seen = int(last) if re.fullmatch(r"[0-9]{1,18}", last) and count == 1 else None
    client = request.state.gate.client_of(request.scope)
    return EventStream(streams, request.scope.get("virtuoso.server"), wanted, seen, client)


async def get_markets(
    request: Request,
    exchange: Exchange = None,
    base: Annotated[
        str | None, Query(min_length=1, max_length=24, description="As in `BTC`.", examples=["BTC"])
    ] = None,
    quote: Annotated[
        str | None, Query(min_length=1, max_length=24, description="As in `USDT`.", examples=["USDT"])
    ] = None,
) -> Response:
    """List the markets that can be asked for, each with the exchanges that list it."""
    gateway = _gateway(request)
    name = None if exchange is None else gateway.markets.check_exchange(exchange)
    if not gateway.is_ready():
        raise errors.MarketsLoading("no market list is there yet; ask again shortly")
    found = gateway.markets.select(name, base and base.upper(), quote and quote.upper())
    return responses.json({"count": len(found), "markets": found})


async def get_exchanges(request: Request) -> Response:
    """Tell of each exchange: breaker, budget, last success, market list. Asks nobody."""
    return responses.json(status.exchanges(_gateway(request), request.state.streams))


async def get_dashboard_data(
    request: Request,
    symbols: Annotated[
        str | None,
        Query(description="As in `/tickers`, or empty; else `DASHBOARD_SYMBOLS`.", examples=["BTC/USDT,ETH-USDT"]),
    ] = None,
) -> Response:
    """Give all that the page shows: every exchange's tickers, as `/tickers`, and how the gateway does."""
    wanted = _gateway(request).settings.dashboard_symbols if symbols is None else _listed(symbols, least=0)
    return responses.answer(request, await request.state.dashboard.data(wanted))


async def get_health(request: Request) -> Response:
    """Tell how the gateway is, part by part. Asks nobody."""
    health = status.health(_gateway(request), request.state.streams)
    return responses.json(health, 503 if health["status"] == "unhealthy" else 200)


async def get_live() -> Response:
    """Tell that the process answers."""
    return responses.json({"status": "live"})


async def get_ready(request: Request) -> Response:
    """Tell whether at least one market list is loaded, so that symbols can be answered."""
    ready = _gateway(request).is_ready()
    return responses.json({"status": "ready" if ready else "loading"}, 200 if ready else 503)


async def get_metrics(request: Request) -> Response:
    """Give the metrics in Prometheus' text format. Asks nobody."""
    status.update_gauges(_gateway(request), request.state.streams)
    return Response(generate_latest(), media_type=CONTENT_TYPE_LATEST)


def _admin_only(parameters: tuple[str, ...]) -> Callable[[Request], Awaitable[None]]:
    """Return a check that requires the admin token, and refuses what would be ignored.

    A parameter that is misspelt, given twice, or sent in a body would do more than was meant: clear all, lift all bans.
    """

    async def check(request: Request) -> None:
        request.state.gate.check_admin(request.scope, _gateway(request).store)
        given = [name for name, _ in request.query_params.multi_items()]
        has_body = request.headers.get("content-length", "0") != "0" or "transfer-encoding" in request.headers
        if has_body or len(given) > len(set(given)) or set(given) - set(parameters):
            allowed = f"only {', '.join(parameters)}, each once" if parameters else "nothing"
            raise errors.InvalidParameter(f"send {allowed} in the query, and no body")

    return check


async def clear_cache(
    request: Request,
    exchange: Exchange = None,
    symbol: Annotated[
        str | None, Query(min_length=1, max_length=64, description="Only of this symbol.", examples=["BTC-USDT"])
    ] = None,
) -> Response:
    """Forget cached answers of all replicas: all, or of one exchange or symbol. Leaves foreign keys in Redis alone."""
    gateway = _gateway(request)
    name = None if exchange is None else gateway.markets.check_exchange(exchange)
    canonical = None if symbol is None else gateway.markets.canonical(symbol)
    try:
        cleared, redis = await gateway.cache.clear(name, canonical), "cleared" if gateway.store.configured else "none"
    except RedisAway:
        cleared, redis = None, "does not answer: its entries and those of other replicas stay until they expire"
    return responses.json({"cleared": cleared, "redis": redis})


async def reset_breakers(
    request: Request,
    bans: Annotated[
        Literal["forget", "keep"],
        Query(description="Whether exchanges that told us to wait are asked again.", examples=["keep"]),
    ] = "forget",
) -> Response:
    """Close every breaker and forget every ban, whatever the exchanges said; `bans=keep` leaves the banned alone."""
    return responses.json({"reset": await _gateway(request).manager.reset_breakers(keep_holds=bans == "keep")})


async def record_maintenance(
    request: Request,
    task: Annotated[
        Literal["daily", "check", "warm"], Path(description="The task that succeeded.", examples=["daily"])
    ],
) -> Response:
    """Note that a maintenance task succeeded now."""
    await _gateway(request).record_maintenance(task)
    return responses.json({"recorded": task})


def _gateway(request: Request) -> Gateway:
    gateway: Gateway = request.state.gateway
    return gateway


def _add_handlers(app: FastAPI) -> None:
    """Translate what is raised anywhere into a problem document."""

    async def ours(_: Request, error: Any) -> Response:  # each is registered for one class, and gets no other
        return responses.problem(error)

    async def invalid(_: Request, error: Any) -> Response:
        first = error.errors()[0]
        fault = ": " + first["msg"]
        if first["type"] == "string_too_short":  # each text has a minimum of 1: an empty one could be taken for `all`
            fault = " is empty: give it a value, or leave it out if it is optional"
        return responses.problem(errors.InvalidParameter(f"{first['loc'][-1]}{fault}"))

    async def framework(request: Request, error: Any) -> Response:
        if error.status_code == 405:
            allowed = (error.headers or {}).get("Allow", "GET").replace("GET", "GET, HEAD")
            wrong = errors.MethodNotAllowed(f"{request.method} is not served here; allowed: {allowed}")
            return responses.problem(wrong, {"Allow": allowed})
        is_socket = request.url.path == "/ws" and _gateway(request).settings.streaming
        what = "only WebSockets are" if is_socket else "nothing is"
        return responses.problem(errors.NotFound(f"{what} served at this path; try /ticker/BTC-USDT or /health"))

    async def unforeseen(_: Request, __: Exception) -> Response:
        wrong = errors.InternalError("the gateway failed; its log tells more under this request's id")
        return responses.problem(wrong, {"X-Request-ID": request_id.get()})

    app.add_exception_handler(errors.GatewayError, ours)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, framework)
    app.add_exception_handler(Exception, unforeseen)


def __getattr__(name: str) -> FastPath:
    """Make `app` when a server asks for it: importing this module reads no environment (PEP 562)."""
    if name != "app":
        raise AttributeError(name)
    try:
        settings = load_settings()
    except ConfigError as error:
        raise SystemExit(f"virtuoso cannot start: {error}") from None
    set_up_logging(settings.log_level, settings.log_format, settings.secrets)
    return create_app(settings)
