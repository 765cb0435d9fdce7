"""The routes for market data, streams, status and the page: parse, call, return.

A new operation needs a handler and a line in `add_routes` here, a model in `documents` and an
example in `openapi_examples.json`.
"""

from functools import partial
from typing import Annotated, Any

from fastapi import Path, Query, Request
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.responses import Response
from starlette.websockets import WebSocket

from config import Settings
from src.candles import CandleRange, serve_range
from src.core import errors, models
from src.gateway import Gateway
from src.streams.topics import ChannelName, Subscription, Timeframe
from src.web import dashboard, documents, responses, status, websocket
from src.web.documents import DashboardData, Listings
from src.web.openapi import GUARDED, OPEN, DescribedApp, Errors
from src.web.server_events import EventStream

MAX_SYMBOLS = 100
DEFAULT_CANDLES = 100


def query(description: str, example: object, **bounds: Any) -> Any:
    """Return a query parameter with an example."""
    return Query(description=description, examples=[example], **bounds)


def path(description: str, example: str) -> Any:
    """Return a path parameter with an example."""
    return Path(description=description, examples=[example])


SYMBOL = path("`BTC-USDT` or `BTC/USDT`, in any case; `BTC-USDT:USDT` for a swap.", "BTC-USDT")
SYMBOLS = path("One symbol, or several with commas.", "BTC-USDT,ETH-USDT")
ONLY_EXCHANGE = "Use only this exchange; by default, the first one that can answer."
EXCHANGE = query(ONLY_EXCHANGE, "kraken", min_length=1, max_length=32)
OLDEST = "Maximum age in seconds; 0 fetches now. Older data is an error instead."
MAX_AGE = query(OLDEST, 5, ge=0, le=86400, allow_inf_nan=False)
SINCE = query("UTC milliseconds of the first candle.", 1795294800000, ge=0, le=4102444800000)
UNTIL = query(
    "With `since`: the first candle that is not wanted.", 1795298400000, ge=0, le=4102444800000
)
CLOSED = query("Only candles that are final.", True)
TWO_SYMBOLS = "BTC/USDT,ETH-USDT"
TICKER_SYMBOLS = query(f"Up to {MAX_SYMBOLS} symbols, with commas.", TWO_SYMBOLS, min_length=1)
PAGE_SYMBOLS = query("As in `/tickers`, or empty; by default `DASHBOARD_SYMBOLS`.", TWO_SYMBOLS)

Symbol = Annotated[str, SYMBOL]
Symbols = Annotated[str, TICKER_SYMBOLS]
Base = Annotated[str | None, query("As in `BTC`.", "BTC", min_length=1, max_length=24)]
Quote = Annotated[str | None, query("As in `USDT`.", "USDT", min_length=1, max_length=24)]
ExchangeName = Annotated[str | None, EXCHANGE]
MaxAge = Annotated[float | None, MAX_AGE]


def gateway_of(request: Request) -> Gateway:
    """Return the gateway that the lifespan started."""
    gateway: Gateway = request.state.gateway
    return gateway


CANDLES = query(f"By default {DEFAULT_CANDLES}, or all with `until`.", 24, ge=1, le=1000)


async def get_ticker(
    request: Request, symbol: Symbol, exchange: ExchangeName = None, max_age: MaxAge = None
) -> Response:
    """Return the price and 24 hour figures of one market."""
    served = await gateway_of(request).serve("ticker", symbol, exchange, max_age)
    return responses.answer(request, served)


async def get_tickers(
    request: Request, symbols: Symbols, exchange: ExchangeName = None, max_age: MaxAge = None
) -> Response:
    """Return many tickers at once; `exchange=all` returns those of every exchange.

    The status is 200 even if tickers are missing: `errors` has a problem for each missing ticker.
    """
    name = exchange and exchange.lower()
    tickers = await gateway_of(request).tickers(_split(symbols), name, max_age)
    return responses.batch(request, tickers)


async def get_order_book(
    request: Request,
    symbol: Symbol,
    exchange: ExchangeName = None,
    max_age: MaxAge = None,
    limit: Annotated[int, query("Levels on each side.", 10, ge=1, le=200)] = 50,
) -> Response:
    """Return the best levels of an order book."""
    served = await gateway_of(request).serve("orderbook", symbol, exchange, max_age, (limit,))
    return responses.answer(request, served)


async def get_ohlcv(
    request: Request,
    symbol: Symbol,
    timeframe: Annotated[Timeframe, query("Length of one candle.", "1h")] = "1m",
    limit: Annotated[int | None, CANDLES] = None,
    since: Annotated[int | None, SINCE] = None,
    until: Annotated[int | None, UNTIL] = None,
    closed: Annotated[bool, CLOSED] = False,
    exchange: ExchangeName = None,
    max_age: MaxAge = None,
) -> Response:
    """Return the newest candles or those of a range, oldest first.

    The newest one may be incomplete.
    """
    gateway = gateway_of(request)
    if until is not None and since is None:
        raise errors.InvalidParameter("until needs since, the start of the first candle")
    rows = limit or (models.MAX_INTEGER if until else DEFAULT_CANDLES)
    if since is None:
        params = (timeframe, rows, closed)
        served = await gateway.serve("ohlcv", symbol, exchange, max_age, params)
    else:
        wanted = CandleRange(timeframe, since, until, rows, closed)
        served = await serve_range(gateway, symbol, exchange, max_age, wanted)
    return responses.answer(request, served)


async def get_trades(
    request: Request,
    symbol: Symbol,
    exchange: ExchangeName = None,
    max_age: MaxAge = None,
    limit: Annotated[int, query("Maximum number; bybit has 60 for spot.", 20, ge=1, le=1000)] = 50,
) -> Response:
    """Return the newest public trades, oldest first."""
    served = await gateway_of(request).serve("trades", symbol, exchange, max_age, (limit,))
    return responses.answer(request, served)


async def get_markets(
    request: Request, exchange: ExchangeName = None, base: Base = None, quote: Quote = None
) -> Response:
    """List the markets, each with the exchanges that list it."""
    gateway = gateway_of(request)
    name = None if exchange is None else gateway.markets.check_exchange(exchange)
    if not gateway.markets.loaded_at:
        raise errors.MarketsLoading("no market list is loaded yet; try again shortly")
    markets = gateway.markets.select(name, base and base.upper(), quote and quote.upper())
    return responses.json({"count": len(markets), "markets": markets})


async def get_stream(
    request: Request,
    symbol: Annotated[str, SYMBOLS],
    channel: Annotated[ChannelName, query("The data to push.", "book")] = "ticker",
    exchange: ExchangeName = None,
    levels: Annotated[int, query("Levels on each side of a book.", 5, ge=1, le=50)] = 10,
    timeframe: Annotated[Timeframe, query("Length of a candle.", "1m")] = "1m",
) -> Response:
    """Push updates of symbols as server-sent events; `exchange=all` pushes every exchange's.

    Each stream starts with a snapshot, followed by updates.
    """
    names = _split(symbol)
    await request.state.streams.look_for_new_markets(names, exchange or "")
    options = (exchange or "", levels, timeframe)
    return EventStream(request, [Subscription(channel, name, *options) for name in names])


async def get_exchanges(request: Request) -> Response:
    """Return breaker, budget, last success and market list of each exchange, without any call."""
    return responses.json(status.exchanges(gateway_of(request), request.state.streams))


async def get_health(request: Request) -> Response:
    """Return the state of the gateway and of its parts, without any call to an exchange."""
    health = status.health(gateway_of(request), request.state.streams)
    return responses.json(health, 503 if health["status"] == "unhealthy" else 200)


async def get_live() -> Response:
    """Return 200 while the process runs."""
    return responses.json({"status": "live"})


async def get_ready(request: Request) -> Response:
    """Return 200 as soon as one market list is loaded, so that symbols can be answered."""
    if gateway_of(request).markets.loaded_at:
        return responses.json({"status": "ready"})
    return responses.json({"status": "loading"}, 503)


async def get_metrics(request: Request) -> Response:
    """Return the metrics in Prometheus' text format."""
    status.update_gauges(gateway_of(request), request.state.streams)
    return Response(generate_latest(), media_type=CONTENT_TYPE_LATEST)


async def get_dashboard_data(
    request: Request, symbols: Annotated[str | None, PAGE_SYMBOLS] = None
) -> Response:
    """Return everything that the page shows: the tickers of all exchanges, and the state."""
    default = gateway_of(request).settings.dashboard_symbols
    names = default if symbols is None else _split(symbols, minimum=0)
    return responses.answer(request, await request.state.dashboard.data(names))


def _split(symbols: str, minimum: int = 1) -> list[str]:
    """Split a list with commas. Raises `InvalidParameter` for too many symbols or too few."""
    stripped = (text.strip() for text in symbols.split(","))
    names = list(dict.fromkeys(text for text in stripped if text))
    if not minimum <= len(names) <= MAX_SYMBOLS:
        raise errors.InvalidParameter(
            f"symbols: {len(names)} were given; give {minimum} to {MAX_SYMBOLS}"
        )
    return names


LIST_ERRORS = (*GUARDED, errors.UnknownExchange, errors.InvalidParameter)
SYMBOL_ERRORS = (*LIST_ERRORS, errors.UnknownSymbol)
# Not the error of every fetch. A price mismatch is one of several attempts.
NOT_FETCHED = (errors.TooManyStreams, errors.PriceMismatch)
FETCH_ERRORS = set(errors.error_classes(errors.UpstreamError)).difference(NOT_FETCHED)
DATA_ERRORS: Errors = (*SYMBOL_ERRORS, errors.RequestRejected, *FETCH_ERRORS)
TOO_MANY = (errors.TooManyStreams, errors.TooManySubscriptions, errors.TooManyConnections)
NOT_QUOTED = (errors.MarketsLoading, errors.Maintenance, errors.MarketHalted)
STREAM_ERRORS = (*SYMBOL_ERRORS, *NOT_QUOTED, *TOO_MANY)
PAGE_ERRORS = (*GUARDED, errors.InvalidParameter)
TICKERS = documents.TickerBatch | documents.TickerTable


async def open_websocket(connection: WebSocket) -> None:
    """Serve a client of `/ws`."""
    await websocket.serve(connection, connection.state.gate, connection.state.streams)


def add_routes(app: DescribedApp, settings: Settings) -> None:
    """Add all routes to the app that the settings switch on."""
    add = partial(app.add_operation, needs_key=bool(settings.api_keys), tags=["market data"])
    add("/ticker/{symbol:path}", get_ticker, models.Ticker, DATA_ERRORS, has_etag=True)
    add("/tickers", get_tickers, TICKERS, LIST_ERRORS, has_etag=True)
    add("/orderbook/{symbol:path}", get_order_book, models.OrderBook, DATA_ERRORS, has_etag=True)
    add("/ohlcv/{symbol:path}", get_ohlcv, models.Candles, DATA_ERRORS, has_etag=True)
    add("/trades/{symbol:path}", get_trades, models.Trades, DATA_ERRORS, has_etag=True)
    add("/markets", get_markets, Listings, (*LIST_ERRORS, errors.MarketsLoading))
    if settings.streaming:
        add = partial(add, tags=["streams"])
        add("/stream/{symbol:path}", get_stream, "text/event-stream", STREAM_ERRORS)
        app.add_api_websocket_route("/ws", open_websocket)
    add = partial(add, tags=["status"])
    add("/exchanges", get_exchanges, documents.Exchanges, GUARDED)
    add("/health", get_health, documents.Health, OPEN)
    add("/health/live", get_live, documents.Liveness, OPEN)
    add("/health/ready", get_ready, documents.Readiness, OPEN)
    if settings.metrics_enabled:
        add("/metrics", get_metrics, "text/plain", OPEN)
    add("/api/dashboard/data", get_dashboard_data, DashboardData, PAGE_ERRORS, has_etag=True)
    dashboard.add_routes(app, has_docs=settings.docs_enabled)
