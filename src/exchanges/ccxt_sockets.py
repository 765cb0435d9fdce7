"""The other edge to ccxt: its sockets. What comes over them is handed on as it is read; nothing waits for a turn.

ccxt keeps one future per subscription, and what comes while nobody waits for it is not heard of. So the functions that
settle its futures are listened to instead: no message is lost, and none has to wake a task.
"""

import asyncio
import re
from collections.abc import Awaitable, Callable, Iterable, Sequence
from functools import partial
from typing import Any, Protocol

import aiohttp

from config import Settings
from src.core.errors import GatewayError
from src.exchanges.ccxt_client import CcxtClient, ccxt, make_client, translate
from src.exchanges.http_client import Answer

BOOK_DEPTH = {"bybit": 50, "binance": 100, "kraken": 100}  # the least each has, from 50 levels on
# What ccxt calls a subscription: `ticker:BTC/USDT`, `ticker:ticker@BTC/USDT`, `orderbook::BTC/USDT:USDT`, ...
SUBSCRIPTION = re.compile(r"(?P<word>[a-z]+)[:@]+(\w+@)?(?P<symbol>.+)")
WORDS = {"ticker": {"ticker", "bidask"}, "orderbook": {"orderbook"}, "trades": {"trade"}}
TOPICS = {
    ("bybit", "ticker"): ("tickers.{id}", "orderbook.1.{id}"),
    ("bybit", "orderbook"): ("orderbook.50.{id}",),
    ("bybit", "trades"): ("publicTrade.{id}",),
    ("binance", "ticker"): ("{lowercaseId}@ticker", "{lowercaseId}@bookTicker"),
    ("binance", "orderbook"): ("{lowercaseId}@depth@100ms",),
    ("binance", "trades"): ("{lowercaseId}@trade",),
    **dict.fromkeys((("kraken", kind) for kind in WORDS), ("{symbol}",)),
}
CHANNELS = {"ticker": "ticker", "orderbook": "book", "trades": "trade"}  # of kraken
CLOSE_SECONDS = 1.0
APART_SECONDS = 600.0  # that a ticker may be older than its bid and ask: so long may a market be without a trade
TOP = ("bid", "bidVolume", "ask", "askVolume")


class Listener(Protocol):
    """What is told of the sockets. No method may raise."""

    def heard(self, symbol: str, value: Any, *, steady: bool) -> None:
        """Take what ccxt made of one message; `steady` if messages of its kind come however few trades there are."""

    def lost(self, cause: str, refusal: GatewayError | None) -> None:
        """Learn that a socket ended or could not be opened; `refusal` is what the exchange answered instead."""

    def refused(self, symbol: str) -> None:
        """Learn that one subscription ended."""


class CcxtSockets:
    """The socket of an exchange for one kind of data and type of market, however much is watched."""

    def __init__(
        self, exchange: str, kind: str, settings: Settings, session: aiohttp.ClientSession, listener: Listener
    ) -> None:
        self._exchange, self._kind, self._listener = exchange, kind, listener
        self._tasks: set[asyncio.Future[Any]] = set()
        self._names: dict[str, list[str]] = {}  # what is subscribed to, as the exchange calls it
        self._joined: dict[str, Any] = {}  # the bid and ask that were joined with a ticker last
        self._ccxt: CcxtClient = make_client(exchange, settings, session, sockets=True)
        self._make = self._ccxt.client
        self._ccxt.client = self._listened

    def use(self, markets: CcxtClient, snapshot: Callable[..., Awaitable[Any]]) -> None:
        """Read data by the markets of another client, and books' beginnings, where they have to be asked for, so."""
        self._ccxt.markets, self._ccxt.markets_by_id = markets.markets, markets.markets_by_id
        self._ccxt.fetch_rest_order_book_safe = snapshot

    @property
    def count(self) -> int:
        """Sockets that are open."""
        return sum(ws.isConnected and not ws.closed() for ws in (self._ccxt.clients or {}).values())

    def subscribe(self, symbols: Sequence[str]) -> None:
        """Ask for symbols of one type of market; what comes of it is told to the listener."""
        self._ccxt.ws_dial_backoff = {}  # when to try again is decided by who calls this
        self._forget(symbols)  # what came after they were unsubscribed from
        for symbol in symbols:
            market = self._ccxt.market(symbol)
            self._names[symbol] = [topic.format_map(market) for topic in TOPICS[self._exchange, self._kind]]
        for method, *arguments in self._calls(symbols):
            self._begin(getattr(self._ccxt, method)(list(symbols), *arguments))

    def _calls(self, symbols: Sequence[str]) -> Iterable[tuple[Any, ...]]:
        if self._kind == "trades":
            return [("watch_trades_for_symbols",)]
        if self._kind == "orderbook":
            return [("watch_order_book_for_symbols", BOOK_DEPTH[self._exchange])]
        return [("watch_tickers",), ("watch_bids_asks",)] if self._needs_top(symbols[0]) else [("watch_tickers",)]

    def _needs_top(self, symbol: str) -> bool:
        """Whether the tickers of a market come without bid and ask."""
        return (self._exchange, ":" in symbol) in {("bybit", False), ("binance", True)}

    def unsubscribe(self, symbols: Iterable[str]) -> None:
        """Ask for these symbols no more. ccxt has no word for that on kraken, and forgets half on bybit."""
        ended = sorted(set(symbols) & self._names.keys())
        names = [name for symbol in ended for name in self._names.pop(symbol)]
        self._forget(ended)
        for ws in (self._ccxt.clients or {}).values():
            for name in list(ws.subscriptions):
                if (it := SUBSCRIPTION.fullmatch(name)) and it["symbol"] in ended:
                    del ws.subscriptions[name]
            if ended and ws.isConnected and not ws.closed():
                self._begin(ws.send(self._goodbye(names, ws.url)))

    def _goodbye(self, names: list[str], url: str) -> dict[str, Any]:
        number = self._ccxt.request_id(url) if self._exchange == "binance" else self._ccxt.request_id()
        if self._exchange == "kraken":
            asked = {"channel": CHANNELS[self._kind], "symbol": names}
            return {"method": "unsubscribe", "params": asked, "req_id": number}
        if self._exchange == "bybit":
            return {"op": "unsubscribe", "req_id": number, "args": names}
        return {"method": "UNSUBSCRIBE", "params": names, "id": number}

    def _kept(self) -> tuple[dict[str, Any], ...]:
        return self._joined, self._ccxt.tickers, self._ccxt.bidsasks, self._ccxt.orderbooks, self._ccxt.trades

    def _forget(self, symbols: Iterable[str]) -> None:
        """Drop what is known of them: it would pass for new when they are watched again."""
        for symbol in symbols:
            for kept in self._kept():
                kept.pop(symbol, None)

    def drop(self) -> None:
        """Close all sockets and forget what was subscribed to; the next `subscribe` opens new ones."""
        clients, self._ccxt.clients = self._ccxt.clients or {}, {}
        for ws in clients.values():
            ws.on_error_callback = ws.on_close_callback = lambda *_: None
            ws.on_connected_callback = self._close  # if it is about to be
            ws.error = ws.error or ccxt.NetworkError("dropped")
            self._close(ws)
        for kept in (self._names, *self._kept()):
            kept.clear()

    async def close(self) -> None:
        """Close all sockets; a peer that does not answer to that is left after `CLOSE_SECONDS`."""
        self.drop()
        if self._tasks:
            await asyncio.wait(set(self._tasks), timeout=CLOSE_SECONDS)
        for task in self._tasks:
            task.cancel()
        await self._ccxt.close()

    def _close(self, ws: Any) -> None:
        self._begin(ws.close())

    def _begin(self, work: Awaitable[Any]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Future[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # whatever it is, the listener was told

    def _listened(self, url: str) -> Any:
        """Stand in for ccxt's function that makes a socket's client: listen to each new one."""
        known = url in (self._ccxt.clients or {})
        ws = self._make(url)
        if not known:
            self._listen(ws)
        return ws

    def _listen(self, ws: Any) -> None:
        ws.handle_message = partial(self._handled, ws, ws.handle_message)
        ws.resolve = partial(self._resolved, ws.resolve)
        ws.reject = partial(self._rejected, ws, ws.reject)
        ws.on_error_callback = partial(self._failed, ws.on_error_callback)
        ws.on_close_callback = partial(self._closed, ws.on_close_callback)

    @staticmethod
    def _handled(ws: Any, handle: Callable[[Any], None], message: Any) -> None:
        try:
            handle(message)
        except Exception:  # noqa: BLE001 - ccxt's parsers stumble over junk, and would never read on
            ws.on_error(ccxt.BadResponse("junk"))

    def _resolved(self, resolve: Callable[..., Any], result: Any, name: str) -> Any:
        found = SUBSCRIPTION.fullmatch(name)
        if found is not None and found["word"] in WORDS[self._kind]:
            self._hear(found["symbol"], result)
        return resolve(result, name)

    def _rejected(self, ws: Any, reject: Callable[..., Any], error: Any, name: str | None = None) -> Any:
        found = SUBSCRIPTION.fullmatch(name or "")
        if found is not None and not ws.error:
            self._listener.refused(found["symbol"])
        return reject(error, name)

    def _failed(self, on_error: Callable[..., None], ws: Any, error: Any) -> None:
        cause = "refused" if ws.dial_failed else "lost"
        on_error(ws, error)
        if isinstance(error, ccxt.BadResponse):
            cause = "junk"
        elif isinstance(error, ccxt.RequestTimeout):
            cause = "timeout"
        answer = next((it for it in error.args if isinstance(it, aiohttp.WSServerHandshakeError)), None)
        refusal = None
        if answer is not None:
            refusal = translate(self._exchange, error, Answer(status=answer.status, headers=answer.headers or {}))
        self._listener.lost(cause, refusal)

    def _closed(self, on_close: Callable[..., None], ws: Any, code: Any) -> None:
        on_close(ws, code)
        if not ws.error:
            self._listener.lost("closed", None)

    def _hear(self, symbol: str, result: Any) -> None:
        if self._kind == "ticker":
            self._hear_ticker(symbol)
        elif self._kind == "orderbook":
            depth = BOOK_DEPTH[self._exchange]
            book = {**result, "bids": result["bids"][:depth], "asks": result["asks"][:depth]}
            self._listener.heard(symbol, book, steady=True)
        else:
            self._listener.heard(symbol, result[-result.getLimit(symbol, None) :], steady=True)

    def _hear_ticker(self, symbol: str) -> None:
        """Join a ticker with the best bid and ask where these come apart from it."""
        ticker, top = self._ccxt.tickers.get(symbol), self._ccxt.bidsasks.get(symbol)
        if ticker and not self._needs_top(symbol):
            self._listener.heard(symbol, ticker, steady=True)
        elif ticker and top:
            behind = (top["timestamp"] or 0) - (ticker["timestamp"] or 0)
            if behind > 1000 * APART_SECONDS:
                return  # the last price is no longer told: without a sign of life it will be asked for anew
            newest = top if behind > 0 else ticker
            joined = {name: top[name] for name in TOP} | {name: newest[name] for name in ("timestamp", "datetime")}
            is_new, self._joined[symbol] = top is not self._joined.get(symbol), top
            self._listener.heard(symbol, ticker | joined, steady=is_new)
