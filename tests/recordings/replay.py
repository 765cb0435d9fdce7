"""The exchanges as a server that answers REST requests with recordings, under their own paths.

Without a recording of a request, the answer is 404. The market lists are those of the recordings,
and have a market for every recorded value.
"""

import asyncio
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import orjson
from aiohttp import web

from src.sandbox.server import listen
from tests.recordings.recording import DEFAULT_ID, Recording, market_id, topic_key


class Endpoint(NamedTuple):
    """What a path returns. Bybit's parameter `category` tells the market type."""

    exchange: str
    type: str
    kind: str


PATHS = {
    **{
        prefix + path: Endpoint("binance", market_type, kind)
        for prefix, market_type in (("/api/v3/", "spot"), ("/fapi/v1/", "swap"))
        for path, kind in {
            "exchangeInfo": "list",
            "ticker/24hr": "ticker",
            "ticker/bookTicker": "top",
            "depth": "orderbook",
            "aggTrades": "trades",
            "klines": "ohlcv",
            "time": "time",
        }.items()
    },
    **{
        f"/v5/market/{path}": Endpoint("bybit", "", kind)
        for path, kind in {
            "instruments-info": "list",
            "tickers": "ticker",
            "orderbook": "orderbook",
            "recent-trade": "trades",
            "kline": "ohlcv",
            "time": "time",
        }.items()
    },
    **{
        f"/0/public/{path}": Endpoint("kraken", "spot", kind)
        for path, kind in {
            "AssetPairs": "list",
            "Ticker": "ticker",
            "Depth": "orderbook",
            "Trades": "trades",
            "OHLC": "ohlcv",
            "Time": "time",
        }.items()
    },
}
# Members of a market: trading status, base, quote, and other names.
ONLINE = {"binance": "TRADING", "bybit": "Trading", "kraken": "online"}
BASE_AND_QUOTE = {
    "binance": ("baseAsset", "quoteAsset"),
    "bybit": ("baseCoin", "quoteCoin"),
    "kraken": ("base", "quote"),
}
SETTLE = {"binance": "marginAsset", "bybit": "settleCoin", "kraken": ""}
WEBSOCKET_NAMES = {"XBT": "BTC", "XDG": "DOGE"}  # Kraken's assets in `wsname` and by WebSocket v2


class Replay:
    """One server with the recordings of all exchanges."""

    def __init__(
        self,
        recordings: Sequence[Recording],
        *,
        as_recorded: bool = False,
        every_ticker: bool = False,
    ) -> None:
        """Replay these recordings. Later market lists take precedence over earlier ones.

        Every market of the lists is trading and every recorded value has one, unless `as_recorded`.
        With `every_ticker`, markets without a recorded ticker have that of another market.
        """
        self.recordings = recordings
        self.every_ticker = every_ticker
        self.calls: Counter[str] = Counter()
        self.subscribed: set[tuple[str, str]] = set()
        """Market types and topics of all sockets, without numbers of levels."""
        self.release = asyncio.Event()
        """Set when the sockets shall send the recorded messages."""
        self.ms = max((recording.ms for recording in recordings), default=0)
        self.markets = {
            (exchange, market_type): self._markets(exchange, market_type, as_recorded)
            for exchange in ONLINE
            for market_type in ("spot", "swap")
        }
        # Names of markets in recordings -> market ids.
        self.ids = {
            key: {display_name(row): name for name, row in markets.items()}
            | {name: name for name in markets}
            for key, markets in self.markets.items()
        }
        self._runner: web.AppRunner | None = None
        self.url = ""

    async def __aenter__(self) -> "Replay":
        """Start to listen on a free port."""
        app = web.Application()
        app.router.add_get("/{path:.*}", self.handle)
        self._runner, port = await listen(app, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{port}"
        return self

    async def __aexit__(self, *_: object) -> None:
        """Close the port and all connections."""
        if self._runner is not None:
            await self._runner.cleanup()

    @property
    def settings(self) -> dict[str, str]:
        """The settings with which the gateway uses this server as every exchange."""
        rest = {f"{name.upper()}_REST_URL": self.url for name in ONLINE}
        return rest | {f"{name.upper()}_WS_URL": self.url.replace("http", "ws") for name in ONLINE}

    def _markets(self, exchange: str, market_type: str, as_recorded: bool) -> dict[str, Any]:
        """Return the rows of a market list by market id."""
        chosen = [
            recording
            for recording in sorted(self.recordings, key=lambda recording: recording.ms)
            if recording.exchange == exchange and market_type in recording.types
        ]
        rows: dict[str, Any] = {}
        for recording in chosen:
            if recording.kind == "list":  # before 2022, Kraken's pairs had no status
                rows |= {
                    name: {"status": ONLINE[exchange]} | row for name, row in recording.rows.items()
                }
        if as_recorded:
            return rows
        # Kraken's dark pools, which are closed, had the symbols of other markets.
        rows = {name: row for name, row in rows.items() if not name.endswith(".d")}
        rows = {name: row | {"status": ONLINE[exchange]} for name, row in rows.items()}
        wanted = {name for recording in chosen for name in recorded_ids(recording)}
        known = rows.keys() | {display_name(row) for row in rows.values()}
        made = {name: make_market(exchange, name, rows) for name in sorted(wanted - known)}
        return rows | {name.replace("/", ""): row for name, row in made.items() if row}

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """Answer a REST request, or serve a socket."""
        self.calls[request.path] += 1
        if request.headers.get("Upgrade", "").lower() == "websocket":
            return await self.serve_socket(request)
        endpoint = PATHS.get(request.path)
        if endpoint is None:
            return web.Response(status=404)
        if endpoint.exchange == "bybit":
            swap = request.query.get("category") == "linear"
            endpoint = endpoint._replace(type="swap" if swap else "spot")
        result = self.answer(endpoint, request.query)
        if result is None:
            return web.Response(status=404)
        payload = orjson.dumps(envelope(endpoint, result, self.ms))
        return web.Response(body=payload, content_type="application/json")

    async def serve_socket(self, request: web.Request) -> web.WebSocketResponse:
        """Confirm subscriptions. After `release`, send the recorded messages of their topics."""
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        topics: dict[str, str] = {}
        is_spot = "spot" in request.path or "/stream/" in request.path
        market_type = "spot" if is_spot else "swap"
        sending = asyncio.create_task(self._send(socket, market_type, topics))
        try:
            async for frame in socket:
                command = json.loads(frame.data)
                for topic in command.get("args") or command.get("params") or ():
                    topics[topic_key(topic)] = topic
                    self.subscribed.add((market_type, topic_key(topic)))
                names = {"id": command.get("id"), "req_id": str(command.get("req_id"))}
                op = "pong" if command.get("op") == "ping" else command.get("op")
                reply = {"success": True, "ret_msg": op, "op": op, "result": None}
                await socket.send_json(reply | names)
        finally:
            sending.cancel()
        return socket

    async def _send(
        self, socket: web.WebSocketResponse, market_type: str, topics: Mapping[str, str]
    ) -> None:
        await self.release.wait()
        for recording in self.recordings:
            for push in recording.pushes if recording.kind == "stream" else ():
                if push.type == market_type and push.topic in topics:
                    renamed = {"topic": topics[push.topic]} if "topic" in push.message else {}
                    await socket.send_json(push.message | renamed)
                    await asyncio.sleep(0)  # gateway and client run in the same loop

    def answer(self, endpoint: Endpoint, query: Mapping[str, str]) -> Any:
        """Return the recorded data for a request, None if there is none."""
        if endpoint.kind == "time":
            return self.ms
        if endpoint.kind == "list":
            return self.markets[endpoint.exchange, endpoint.type]
        name = query.get("symbol") or query.get("pair") or ""
        if endpoint.kind in ("ticker", "top"):
            found = self._tickers(endpoint, query)
            is_single = endpoint.exchange == "binance" and name
            return found.get(name) if is_single else found
        for recording in self.recordings:
            shape = (recording.exchange, recording.type, recording.kind)
            if shape == endpoint and recording.id == name:
                values = cut(recording, query)
                return {name: values} if endpoint.exchange == "kraken" else values
        return None

    def _tickers(self, endpoint: Endpoint, query: Mapping[str, str]) -> dict[str, Any]:
        """Return the recorded tickers by market id, all or those that are requested."""
        markets = self.markets[endpoint.exchange, endpoint.type]
        ids = self.ids[endpoint.exchange, endpoint.type]
        found = {
            ids.get(name, name): row
            for recording in self.recordings
            if (recording.exchange, recording.type) == (endpoint.exchange, endpoint.type)
            and recording.kind == "ticker"
            for name, row in recording.rows.items()
        }
        if self.every_ticker and found:
            template = found.get(DEFAULT_ID) or next(iter(found.values()))
            found = {name: template | {"symbol": name} for name in markets} | found
        if text := query.get("symbols"):
            wanted = json.loads(text)
        elif text := query.get("symbol") or query.get("pair"):
            wanted = text.split(",")
        else:
            return found
        return {name: found[name] for name in wanted if name in found}


def recorded_ids(recording: Recording) -> Iterable[str]:
    """Return the markets of a recorded value."""
    if recording.kind == "stream":
        return {market_id(push.topic) for push in recording.pushes}
    if recording.kind == "ticker":
        return recording.rows.keys()
    return {recording.id} if recording.kind != "list" else set()


def display_name(row: Mapping[str, Any]) -> str:
    """Return the name of a market in Kraken's newer answers: `BTC/USD`. Empty without `wsname`."""
    assets = row.get("wsname", "").split("/")
    return "/".join(WEBSOCKET_NAMES.get(asset, asset) for asset in assets)


def make_market(exchange: str, name: str, rows: Mapping[str, Any]) -> dict[str, Any]:
    """Return the row of a market that no recorded list has. Empty if its quote is unknown."""
    base_member, quote_member = BASE_AND_QUOTE[exchange]
    template: dict[str, Any] = rows.get(DEFAULT_ID) or next(iter(rows.values()), {})
    base, slash, quote = name.partition("/")
    if not slash:
        quotes = [row[quote_member] for row in rows.values() if name.endswith(row[quote_member])]
        quote = max(quotes, key=len, default="")
        base = name.removesuffix(quote)
    if not quote or not template:
        return {}
    row = template | {base_member: base, quote_member: quote, SETTLE[exchange]: quote}
    return row | {"symbol": name, "altname": base + quote, "wsname": f"{base}/{quote}"}


def cut(recording: Recording, query: Mapping[str, str]) -> Any:
    """Return the part of a recording that the parameters of a request ask for."""
    values = recording.values
    count = int(query.get("limit") or query.get("count") or 0)
    if recording.kind == "orderbook":
        sides = ("bids", "asks") if "bids" in values else ("b", "a")
        return values | {side: values[side][: count or None] for side in sides}
    if start := int(query.get("startTime") or query.get("start") or 0):
        values = [row for row in values if row[0] >= start]
    if end := int(query.get("endTime") or query.get("end") or 0):
        values = [row for row in values if row[0] <= end]
    if not count:
        return values
    return values[:count] if start else values[-count:]


def envelope(endpoint: Endpoint, result: Any, ms: int) -> Any:
    """Return the body that the exchange sends for a result."""
    kind = endpoint.kind
    if endpoint.exchange == "kraken":
        return {"error": [], "result": {"unixtime": ms // 1000} if kind == "time" else result}
    is_rows = kind in ("list", "ticker", "top") and "symbol" not in result
    rows = list(result.values()) if is_rows else result
    if endpoint.exchange == "binance":
        members = {"time": {"serverTime": ms}, "list": {"serverTime": ms, "symbols": rows}}
        return members.get(kind, rows)
    if kind == "time":
        result = {"timeSecond": str(ms // 1000), "timeNano": str(ms * 10**6)}
    elif kind != "orderbook":
        result = {"category": endpoint.type, "list": rows, "nextPageCursor": ""}
    return {"retCode": 0, "retMsg": "OK", "result": result, "retExtInfo": {}, "time": ms}
