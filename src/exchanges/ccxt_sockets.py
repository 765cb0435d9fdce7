"""The only module that uses ccxt's WebSocket clients. Messages are passed on as they are parsed.

ccxt keeps one future per subscription and drops messages while no task awaits it. Therefore the
functions that resolve the futures are wrapped: no message is lost, and none has to wake a task.
`ccxt_client.INTERNALS` names what this needs.
"""

import asyncio
import re
from collections.abc import Awaitable, Callable, Iterable
from functools import partial
from typing import Any, Protocol

from aiohttp import ClientSession, WSServerHandshakeError

from config import Settings
from src.core import metrics
from src.core.background import report_error
from src.core.errors import GatewayError
from src.exchanges import ccxt_client
from src.exchanges.book_guard import BookGuard, MissingUpdateError
from src.exchanges.ccxt_client import CcxtClient, ccxt
from src.exchanges.http_client import Answer
from src.exchanges.profiles import PROFILES, Profile, Refusal
from src.exchanges.tickers import join_top, with_last_trade
from src.exchanges.translation import translate

# ccxt's names of subscriptions: `ticker:BTC/USDT`, `ticker:ticker@BTC/USDT`,
# `orderbook::BTC/USDT:USDT`, ...
SUBSCRIPTION = re.compile(r"(?P<channel>[a-z]+)[:@]+(\w+@)?(?P<symbol>.+?)(::\w+)?")
CCXT_CHANNELS = {
    "ticker": {"ticker", "bidask"},
    "orderbook": {"orderbook"},
    "trades": {"trade"},
    "ohlcv": {"ohlcv"},
}
CLOSE_TIMEOUT_SECONDS = 1.0
# How much older than its bid and ask a ticker may be: a market may have no trade for this long.
MAX_TICKER_LAG_MS = 600_000
# How much older than its ticker bid and ask may be. Each trade changes the best orders, too.
MAX_TOP_LAG_MS = 3_000
# How much older than the newest value a late one may be. An even older one means that the clock of
# the exchange was corrected.
MAX_LATE_MS = 60_000


class Listener(Protocol):
    """Receives events of the sockets. No method may raise."""

    def received(self, symbol: str, value: Any, *, steady: bool) -> None:
        """Process ccxt's data of one message.

        `steady` is True for messages that arrive regardless of how many trades there are.
        """

    def lost(self, cause: str, refusal: GatewayError | None) -> None:
        """Process a lost or failed connection. `refusal` is the error the exchange sent."""

    def ended(self, symbol: str, *, is_refused: bool) -> None:
        """Process a refused subscription, or data that misses an update.

        Only a new subscription makes the data complete.
        """


class CcxtSockets:
    """The socket of an exchange for one kind of data, market type and length of candles."""

    def __init__(
        self,
        exchange: str,
        kind: str,
        timeframe: str,
        settings: Settings,
        session: ClientSession,
        listener: Listener,
        on_dial: Callable[[], None],
    ) -> None:
        """Create the socket. It connects when it is needed; `on_dial` is called each time."""
        self._on_dial = on_dial
        self._profile = PROFILES[exchange]
        self._kind = kind
        self._timeframe = timeframe
        self._listener = listener
        self._tasks: set[asyncio.Future[Any]] = set()
        self._topics: dict[str, list[str]] = {}  # symbol -> the exchange's names of subscriptions
        self._markets: dict[str, dict[str, Any]] = {}
        self._names: dict[str, str] = {}  # symbol -> ccxt's name of the market, if they differ
        options = ccxt_client.ClientOptions.from_settings(exchange, settings)
        self._ccxt: CcxtClient = ccxt_client.make_client(options, session, has_sockets=True)
        self._interval = str(self._ccxt.timeframes[timeframe]) if timeframe else ""
        self._observer = _Observer(self._ccxt, self._profile, kind, timeframe, listener)
        missing = ccxt_client.missing_internals(self._ccxt)
        self._is_supported = not missing.keys() & {"sockets", "connection"}
        if self._is_supported:
            self._make_connection = self._ccxt.client
            self._ccxt.client = self._connection

    def use(self, markets: CcxtClient, snapshot: Callable[..., Awaitable[Any]]) -> None:
        """Use the REST client's markets, and this function to fetch order book snapshots."""
        if markets.markets is not self._markets:  # replaced every hour
            self._markets = markets.markets
            self._adopt_markets()
        self._ccxt.fetch_rest_order_book_safe = snapshot

    def _adopt_markets(self) -> None:
        named = self._markets
        if self._profile.has_own_symbols:
            self._names = {symbol: market["ws_name"] for symbol, market in named.items()}
            symbols = {name: symbol for symbol, name in self._names.items()}
            named = {name: named[symbol] | {"symbol": name} for name, symbol in symbols.items()}
            self._observer.symbols = symbols
        ccxt_client.adopt_markets(self._ccxt, named)

    @property
    def count(self) -> int:
        """The number of open sockets."""
        return sum(map(_is_open, self._connections()))

    @property
    def is_connecting(self) -> bool:
        """True while a socket opens. Messages are sent at once when it is open."""
        return any(connection.connecting for connection in self._connections())

    def subscribe(self, symbols: list[str]) -> int:
        """Subscribe to symbols of one market type. The listener receives the results.

        Returns the number of messages, each with one topic per symbol.
        """
        if not self._is_supported:
            self._listener.lost("lost", None)
            return 0
        self._ccxt.ws_dial_backoff = {}  # the caller decides when to try again
        names = [self._names.get(symbol, symbol) for symbol in symbols]
        self._observer.forget(names)  # data that arrived after they were unsubscribed
        for name in names:
            market = self._ccxt.market(name)
            topics = self._profile.topics[self._kind]
            fields = {**market, "interval": self._interval}
            self._topics[name] = [topic.format_map(fields) for topic in topics]
        if self._kind == "ohlcv":
            return self._subscribe_candles(names)
        params = dict(self._profile.watch_params.get(self._kind, {}))
        if self._kind == "trades":
            self._start(self._ccxt.watch_trades_for_symbols(names, params=params))
        elif self._kind == "orderbook":
            depth = self._profile.book_depth
            self._start(self._ccxt.watch_order_book_for_symbols(names, depth, params))
        else:
            self._start(self._ccxt.watch_tickers(names, params))
            if self._observer.has_separate_top(names[0]):
                self._start(self._ccxt.watch_bids_asks(names))
                return 2
        return 1

    def _subscribe_candles(self, symbols: list[str]) -> int:
        if self._ccxt.has["watchOHLCVForSymbols"]:
            series = [[symbol, self._timeframe] for symbol in symbols]
            self._start(self._ccxt.watch_ohlcv_for_symbols(series))
            return 1
        for symbol in symbols:
            self._start(self._ccxt.watch_ohlcv(symbol, self._timeframe))
        return len(symbols)

    def unsubscribe(self, symbols: Iterable[str]) -> int:
        """Unsubscribe with one message per socket. Returns the number of messages.

        ccxt's own methods are missing or incomplete on some exchanges.
        """
        names = {self._names.get(symbol, symbol) for symbol in symbols}
        ended = sorted(names & self._topics.keys())
        topics = [topic for name in ended for topic in self._topics.pop(name)]
        self._observer.forget(ended)
        sent = 0
        for connection in self._connections():
            for name in list(connection.subscriptions):
                match = SUBSCRIPTION.fullmatch(name)
                if match and match["symbol"] in ended:
                    del connection.subscriptions[name]
            if ended and _is_open(connection):
                arguments = (connection.url,) if self._profile.numbers_per_socket else ()
                number = self._ccxt.request_id(*arguments)
                message = self._profile.unsubscribe(self._kind, topics, number, self._interval)
                self._start(connection.send(message))
                sent += 1
        return sent

    def drop(self) -> None:
        """Close all sockets and forget all subscriptions. The next `subscribe` opens new ones."""
        connections = self._connections()
        self._ccxt.clients = {}
        for connection in connections:
            connection.on_error_callback = _ignore
            connection.on_close_callback = _ignore
            connection.on_connected_callback = self._close  # while it is connecting
            connection.error = connection.error or ccxt.NetworkError("dropped")
            self._close(connection)
        self._observer.forget(self._topics)
        self._topics.clear()

    async def close(self) -> None:
        """Close all sockets. A peer that does not respond is left after `CLOSE_TIMEOUT_SECONDS`."""
        self.drop()
        if self._tasks:
            await asyncio.wait(set(self._tasks), timeout=CLOSE_TIMEOUT_SECONDS)
        for task in self._tasks:
            task.cancel()
        await self._ccxt.close()

    def _connections(self) -> list[Any]:
        return list((self._ccxt.clients or {}).values()) if self._is_supported else []

    def _close(self, connection: Any) -> None:
        self._start(connection.close())

    def _start(self, work: Awaitable[Any]) -> None:
        # An exception is ignored: the listener has received it.
        task = asyncio.gather(work, return_exceptions=True)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _connection(self, url: str) -> Any:
        """Replace ccxt's function that makes a connection: observe each new one."""
        is_known = url in (self._ccxt.clients or {})
        connection = self._make_connection(url)
        if not is_known:
            self._on_dial()
            self._observer.observe(connection)
        return connection


class _Observer:
    """Forwards the messages and failures of ccxt's connections to a listener."""

    def __init__(
        self,
        client: CcxtClient,
        profile: Profile,
        kind: str,
        timeframe: str,
        listener: Listener,
    ) -> None:
        self._ccxt = client
        self._profile = profile
        self._kind = kind
        self._timeframe = timeframe
        self._listener = listener
        self._forward = {
            "ticker": self._forward_ticker,
            "orderbook": self._forward_book,
            "trades": self._forward_trades,
            "ohlcv": self._forward_candles,
        }[kind]
        self._guard = BookGuard(profile.find_book_update if kind == "orderbook" else None)
        self.symbols: dict[str, str] = {}  # ccxt's name of a market -> symbol, if they differ
        self._closing: int | None = None  # start of the candle that the current message closes
        self._message_time: int | None = None  # of the current message
        self._delta_times: dict[str, int] = {}  # topic -> time of its newest message (UTC ms)
        self._wire_candles: list[list[Any]] = []  # of the current message
        self._candle_times: dict[str, int] = {}  # name -> time of the newest message (UTC ms)
        self._closed: dict[str, int] = {}  # name -> start of the last candle that was closed
        self._candles: dict[str, dict[int, list[Any]]] = {}  # name -> start -> forwarded state
        self._joined: dict[str, tuple[Any, Any]] = {}  # name -> newest ticker, bid and ask

    def has_separate_top(self, symbol: str) -> bool:
        """True if a market's ticker arrives without bid and ask."""
        return ("swap" if ":" in symbol else "spot") in self._profile.separate_top_types

    def forget(self, names: Iterable[str]) -> None:
        """Remove the data of markets, which would look new after the next subscription."""
        client = self._ccxt
        caches = (client.tickers, client.bidsasks, client.orderbooks, client.trades, client.ohlcvs)
        for name in names:
            self._guard.forget(self._ws_name(name))
            for data in (self._joined, self._closed, self._candles, *caches):
                data.pop(name, None)

    def _ws_name(self, name: str) -> str:
        market = self._ccxt.markets.get(name, {})
        return str(market.get("ws_name", name))

    def observe(self, connection: Any) -> None:
        """Wrap ccxt's functions that process messages, resolve futures and report failures."""
        handle = connection.handle_message
        connection.handle_message = partial(_handle, connection, handle)
        process = connection.on_message_callback
        connection.on_message_callback = partial(self._on_data, process)
        connection.resolve = partial(self._on_resolve, connection.resolve)
        connection.reject = partial(self._on_reject, connection, connection.reject)
        connection.on_error_callback = partial(self._on_error, connection.on_error_callback)
        connection.on_close_callback = partial(self._on_close, connection.on_close_callback)

    def _on_data(self, process: Callable[..., None], connection: Any, data: Any) -> None:
        if isinstance(data, dict) and not self._is_usable(connection, data):
            return
        process(connection, data)

    def _is_usable(self, connection: Any, data: dict[str, Any]) -> bool:
        """Report refusals and missing updates. Return False for data that ccxt must not process."""
        refusal = self._profile.find_refusal(data)
        if refusal is not None:
            self._report_refusal(connection, refusal)
        topic, time = self._profile.ticker_delta(data) or ("", 0)
        if is_late(time, self._delta_times.get(topic)):
            metrics.stream_dropped_total.labels("late").inc()
            return False
        self._delta_times[topic] = time
        if self._timeframe:
            self._message_time = _to_ms(self._ccxt, data.get(self._profile.candle_time))
        if self._timeframe and self._profile.wire_candles:
            self._wire_candles = self._profile.wire_candles(data)
        if self._timeframe and self._profile.closed_candle:
            self._closing = self._profile.closed_candle(data)
        try:
            return self._guard.is_next(data)
        except MissingUpdateError as error:
            market_type = "spot" if "spot" in connection.url else "swap"
            market = self._ccxt.safe_market(error.args[0], None, None, market_type)
            self._end(market["symbol"], is_refused=False)
            return False

    def _receive(self, name: str, value: Any, *, steady: bool = True) -> None:
        symbol = self.symbols.get(name, name)
        if isinstance(value, dict):
            value = {**value, "symbol": symbol}
        self._listener.received(symbol, value, steady=steady)

    def _end(self, name: str, *, is_refused: bool) -> None:
        if not is_refused:
            metrics.stream_dropped_total.labels("incomplete").inc()
        self._listener.ended(self.symbols.get(name, name), is_refused=is_refused)

    def _report_refusal(self, connection: Any, refusal: Refusal) -> None:
        symbols = {refusal.symbol}
        for name, subscription in connection.subscriptions.items():
            match = SUBSCRIPTION.fullmatch(name)
            is_refused = (
                isinstance(subscription, dict) and str(subscription["id"]) == refusal.number
            )
            if match is not None and is_refused:
                symbols.add(match["symbol"])
        for symbol in symbols - {""}:
            self._end(symbol, is_refused=True)

    def _on_resolve(self, resolve: Callable[..., Any], result: Any, name: str) -> Any:
        match = SUBSCRIPTION.fullmatch(name)
        if match is not None and match["channel"] in CCXT_CHANNELS[self._kind]:
            try:
                self._forward(match["symbol"], result)
            except Exception as error:  # noqa: BLE001 - otherwise it would count as the exchange's
                report_error("delivery", error)
        return resolve(result, name)

    def _on_reject(self, connection: Any, reject: Any, error: Any, name: str | None = None) -> Any:
        match = SUBSCRIPTION.fullmatch(name or "")
        if match is not None and not connection.error:
            # Our own errors come from requests for snapshots.
            is_refusal = isinstance(error, ccxt.BaseError)
            is_lost = isinstance(error, ccxt.ChecksumError)
            self._end(match["symbol"], is_refused=is_refusal and not is_lost)
        return reject(error, name)

    def _on_error(self, on_error: Callable[..., None], connection: Any, error: Any) -> None:
        # ccxt's callback resets `dial_failed`.
        cause = "refused" if getattr(connection, "dial_failed", False) else "lost"
        on_error(connection, error)
        if isinstance(error, ccxt.BadResponse):
            cause = "junk"
        elif isinstance(error, ccxt.RequestTimeout):
            cause = "timeout"
        self._listener.lost(cause, _refusal_of(self._profile.name, error))

    def _on_close(self, on_close: Callable[..., None], connection: Any, code: Any) -> None:
        on_close(connection, code)
        if not connection.error:
            self._listener.lost("closed", None)

    def _forward_trades(self, name: str, trades: Any) -> None:
        self._receive(name, trades[-trades.getLimit(name, None) :])

    def _forward_book(self, name: str, book: dict[str, Any]) -> None:
        ws_name = self._ws_name(name)
        decimals = self._ccxt.markets[name].get("decimals")
        if not self._guard.is_correct(ws_name, book, decimals):
            self._end(name, is_refused=False)
            return
        depth = self._profile.book_depth
        value = {**book, "bids": book["bids"][:depth], "asks": book["asks"][:depth]}
        if time := self._guard.time_of(ws_name):
            value["timestamp"] = self._ccxt.parse8601(time)
        self._receive(name, value)

    def _forward_candles(self, name: str, _: Any) -> None:
        """Forward the newest candle, and the one before if its final state is known."""
        stored = self._ccxt.ohlcvs[name][self._timeframe][-2:]
        self._candles[name] = newest_states(self._candles.get(name, {}), stored)
        rows = list(self._candles[name].values())
        if self._profile.closed_candle is None and len(rows) == 2:
            self._closing = rows[0][0]
        if self._closing is not None:
            self._closed[name] = max(self._closing, self._closed.get(name, 0))
            self._closing = None
        if self._message_time and not is_late(self._message_time, self._candle_times.get(name)):
            self._candle_times[name] = self._message_time
        value = {
            "timeframe": self._timeframe,
            "rows": rows,
            "closed": self._closed.get(name),
            "timestamp": self._candle_times.get(name),
            "wire": self._wire_candles,
        }
        self._receive(name, value)

    def _forward_ticker(self, name: str, _: Any) -> None:
        """Forward a ticker, joined with bid and ask if they arrive separately."""
        ticker = self._with_time(self._ccxt.tickers.get(name))
        top = self._ccxt.bidsasks.get(name)
        if ticker and not self.has_separate_top(name):
            self._receive(name, with_last_trade(self._profile, ticker))
        elif ticker and top:
            self._forward_joined(name, ticker, top)

    def _with_time(self, ticker: dict[str, Any] | None) -> dict[str, Any] | None:
        """Add the exchange's time to a ticker if ccxt ignores it."""
        text = ticker["info"].get(self._profile.ticker_time) if ticker else None
        if not ticker or not text:
            return ticker
        timestamp = self._ccxt.parse8601(text)
        return ticker | {"timestamp": timestamp, "datetime": self._ccxt.iso8601(timestamp)}

    def _forward_joined(self, name: str, ticker: dict[str, Any], top: dict[str, Any]) -> None:
        last_ticker, last_top = self._joined.get(name, (None, None))
        ticker = _newer(ticker, last_ticker)
        top = _newer(top, last_top)
        if ticker is last_ticker and top is last_top:
            metrics.stream_dropped_total.labels("late").inc()
            return
        self._joined[name] = (ticker, top)
        lag_ms = (top["timestamp"] or 0) - (ticker["timestamp"] or 0)
        if lag_ms > MAX_TICKER_LAG_MS:
            return  # the last price stopped arriving: the silence leads to a new subscription
        if lag_ms < -MAX_TOP_LAG_MS:  # after a pause of the socket, the ticker came first
            metrics.stream_dropped_total.labels("late").inc()
            return
        joined = join_top(with_last_trade(self._profile, ticker), top)
        self._receive(name, joined, steady=top is not last_top)


def _handle(connection: Any, handle: Callable[[Any], None], message: Any) -> None:
    try:
        handle(message)
    except Exception:  # noqa: BLE001 - otherwise ccxt stops reading after unexpected data
        connection.on_error(ccxt.BadResponse("junk"))


def newest_states(known: dict[int, list[Any]], rows: Iterable[Any]) -> dict[int, list[Any]]:
    """Return candles by start in their newest states: ccxt keeps the one that arrived last.

    Volumes only grow, so that a state with less volume is a late one.
    """
    newest = [max(known.get(row[0], row), row, key=lambda state: state[5]) for row in rows]
    return {row[0]: list(row) for row in newest}


def is_late(timestamp: int | None, newest: int | None) -> bool:
    """Return True if a value is older than the newest one, by the exchange's time (UTC ms)."""
    return bool(timestamp and newest and 0 < newest - timestamp <= MAX_LATE_MS)


def _to_ms(client: CcxtClient, time: object) -> int | None:
    """Return UTC milliseconds of a time that is in milliseconds or ISO 8601."""
    ms: int | None = time if isinstance(time, int) else client.parse8601(time)
    return ms


def _newer(ticker: dict[str, Any], last: dict[str, Any] | None) -> dict[str, Any]:
    """Return a ticker, or the last one if the ticker is late."""
    if last is not None and is_late(ticker["timestamp"], last["timestamp"]):
        return last
    return ticker


def _refusal_of(exchange: str, error: Any) -> GatewayError | None:
    """Return the error that the answer to a socket's handshake stands for."""
    for cause in error.args:
        if isinstance(cause, WSServerHandshakeError):
            response = Answer(status=cause.status, headers=cause.headers or {})
            return translate(exchange, error, response)
    return None


def _is_open(connection: Any) -> bool:
    return bool(connection.isConnected and not connection.closed())


def _ignore(*_: Any) -> None:
    """Ignore an event."""
