"""The WebSockets of the simulated exchanges, in their own wire formats: what they are asked, and what they push.

A topic is one subscription, such as the ticker of one market. Each socket has a state of its own: what it was told of a
book or of trades, so that the next push says what is new.
"""

import contextlib
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any, ClassVar, NamedTuple

import orjson
from aiohttp import WSMsgType, web

from src.sandbox.market import STEPS, Market, Pair, Row
from src.sandbox.wire import SWAPS, Exchange

MAX_STEPS = 30  # steps of a book pushed one by one after a pause; what is before them comes as one
MAX_TRADES = 100  # in one push, after a pause
CLOSE_SECONDS = 1.0  # for a client to answer that a socket is closed
DEPTH = 100  # levels of binance's books that are kept right; the real ones send all
BYBIT_CHANNELS = {"tickers": "ticker", "orderbook": "book", "publicTrade": "trades"}
BINANCE_CHANNELS = {"ticker": "ticker", "miniTicker": "mini", "bookTicker": "top", "depth": "book", "trade": "trades"}
BYBIT_DEPTHS = (1, 50, 200, 1_000)
KRAKEN_DEPTHS = (10, 25, 100, 500, 1_000)
WANTED = {"subscribe": True, "unsubscribe": False}
KRAKEN_CHANNELS = {"ticker": "ticker", "book": "book", "trade": "trades"}
SIDES = ("bid", "ask")
Levels = dict[str, str]  # price -> amount
Message = dict[str, Any]


class Topic(NamedTuple):
    """One subscription: its name on the wire, what it brings, and of which market."""

    name: str
    channel: str  # ticker, top, book or trades
    pair: Pair
    depth: int = 0


class Step(NamedTuple):
    """A book as it was at one time, or how it changed since the one before."""

    whole: bool
    before: int  # UTC milliseconds of the one before
    ms: int
    bids: Levels
    asks: Levels


class Dialect:
    """How an exchange is asked, and how it says things. `ask` yields the answers to a message, and keeps the topics."""

    malformed: ClassVar[Message]  # the answer to what cannot be understood

    def __init__(self, exchange: Exchange) -> None:
        self.exchange = exchange

    def hello(self) -> list[Message]:
        """Return what is sent to every new socket."""
        return []

    def ask(self, message: Message, path: str, topics: dict[str, Topic]) -> Iterator[Message]:
        raise NotImplementedError

    def ticker(self, topic: Topic, day: Row, ms: int) -> Message:
        raise NotImplementedError

    def book(self, topic: Topic, step: Step) -> Message:
        raise NotImplementedError

    def trades(self, topic: Topic, rows: list[Row], ms: int) -> list[Message]:
        raise NotImplementedError


class Bybit(Dialect):
    """bybit, public sockets of version 5."""

    malformed: ClassVar[Message] = {"success": False, "ret_msg": "error:invalid op", "conn_id": "0"}

    def ask(self, message: Message, path: str, topics: dict[str, Topic]) -> Iterator[Message]:
        answer = {"success": True, "ret_msg": message["op"], "conn_id": "0", "op": message["op"]}
        answer |= {"req_id": str(message["req_id"])} if "req_id" in message else {}
        if message["op"] == "ping":
            yield answer | {"ret_msg": "pong"}
            return
        found = [self.topic(name, path) for name in message["args"]]
        if None in found:
            wrong = f"error:handler not found,topic:{message['args'][found.index(None)]}"
            yield answer | {"success": False, "ret_msg": wrong}
            return
        yield answer
        _keep(topics, [topic for topic in found if topic], WANTED[message["op"]])

    def topic(self, name: str, path: str) -> Topic | None:
        kind, *depth, market = name.split(".")
        pair = (self.exchange.spot if path.endswith("spot") else SWAPS).get(market)
        levels = int(depth[0]) if depth else 0
        if pair is None or kind not in BYBIT_CHANNELS or (levels in BYBIT_DEPTHS) != (kind == "orderbook"):
            return None
        return Topic(name, BYBIT_CHANNELS[kind], pair, levels)

    def ticker(self, topic: Topic, day: Row, ms: int) -> Message:
        data = {"symbol": topic.pair.id, "lastPrice": day["last"], "prevPrice24h": day["open"]}
        data |= {"highPrice24h": day["high"], "lowPrice24h": day["low"], "price24hPcnt": f"{day['change']:.6f}"}
        data |= {"volume24h": f"{day['volume']:.8f}", "turnover24h": f"{day['turnover']:.8f}"}
        if topic.pair.swap:
            data |= {"openInterestValue": "0", "markPrice": day["last"], "indexPrice": day["last"]}
            data |= {"bid1Price": day["bid"], "bid1Size": f"{day['bid_size']:.8f}"}
            data |= {"ask1Price": day["ask"], "ask1Size": f"{day['ask_size']:.8f}"}
        else:  # without bid and ask, as the real one
            data |= {"usdIndexPrice": day["last"]}
        return {"topic": topic.name, "ts": ms, "type": "snapshot", "cs": ms, "data": data}

    def book(self, topic: Topic, step: Step) -> Message:
        sides = {"b": [*step.bids.items()], "a": [*step.asks.items()]}
        data = {"s": topic.pair.id, **sides, "u": step.ms, "seq": step.ms}
        return {"topic": topic.name, "type": "snapshot" if step.whole else "delta", "ts": step.ms, "data": data}

    def trades(self, topic: Topic, rows: list[Row], ms: int) -> list[Message]:
        each = {"s": topic.pair.id, "L": "PlusTick", "BT": False}
        data = [
            each | {"T": row["ms"], "S": row["side"], "v": row["size"], "p": row["price"], "i": str(row["number"])}
            for row in rows
        ]
        return [{"topic": topic.name, "ts": ms, "type": "snapshot", "data": data}]


class Binance(Dialect):
    """binance: raw streams of spot and of linear perpetuals."""

    malformed: ClassVar[Message] = {"id": None, "error": {"code": 3, "msg": "Invalid json"}}

    def ask(self, message: Message, path: str, topics: dict[str, Topic]) -> Iterator[Message]:
        found = [self.topic(name, path) for name in message["params"]]
        if None in found:
            yield {"error": {"code": 2, "msg": "Invalid request: unknown stream"}, "id": message["id"]}
            return
        yield {"result": None, "id": message["id"]}
        _keep(topics, [topic for topic in found if topic], WANTED[message["method"].lower()])

    def topic(self, name: str, path: str) -> Topic | None:
        market, _, kind = name.partition("@")
        pair = (self.exchange.spot if "/stream" in path else SWAPS).get(market.upper())
        channel = BINANCE_CHANNELS.get(kind.partition("@")[0])
        return Topic(name, channel, pair, DEPTH) if pair and channel else None

    def ticker(self, topic: Topic, day: Row, ms: int) -> Message:
        about = {"E": ms, "s": topic.pair.id}
        top = {"b": day["bid"], "B": f"{day['bid_size']:.8f}", "a": day["ask"], "A": f"{day['ask_size']:.8f}"}
        if topic.channel == "top":
            return about | {"u": ms} | top | ({"e": "bookTicker", "T": ms} if topic.pair.swap else {})
        day_only = {"c": day["last"], "o": day["open"], "h": day["high"], "l": day["low"]}
        day_only |= {"v": f"{day['volume']:.8f}", "q": f"{day['turnover']:.8f}"}
        if topic.channel == "mini":
            return {"e": "24hrMiniTicker"} | about | day_only
        change = {"P": f"{day['change'] * 100:.3f}", "w": day["average"], "O": ms - 86_400_000, "C": ms}
        return {"e": "24hrTicker"} | about | day_only | change | ({} if topic.pair.swap else top)

    def book(self, topic: Topic, step: Step) -> Message:
        told = {"e": "depthUpdate", "E": step.ms, "s": topic.pair.id, "U": step.before + 1, "u": step.ms}
        told |= {"T": step.ms, "pu": step.before} if topic.pair.swap else {}
        return told | {"b": [*step.bids.items()], "a": [*step.asks.items()]}

    def trades(self, topic: Topic, rows: list[Row], ms: int) -> list[Message]:
        about = {"e": "trade", "E": ms, "s": topic.pair.id, "M": True}
        return [
            about
            | {"t": row["number"], "p": row["price"], "q": row["size"], "T": row["ms"], "m": row["maker"] == "true"}
            for row in rows
        ]


class Kraken(Dialect):
    """kraken, version 2: numbers, today's names of assets, and no time in a ticker."""

    malformed: ClassVar[Message] = {"error": "Malformed request", "method": "", "success": False}

    def hello(self) -> list[Message]:
        data = {"api_version": "v2", "connection_id": 1, "system": "online", "version": "2.0.0"}
        return [{"channel": "status", "type": "update", "data": [data]}]

    def ask(self, message: Message, path: str, topics: dict[str, Topic]) -> Iterator[Message]:
        told = {"method": message["method"], "time_in": _iso(0), "time_out": _iso(0)}
        told |= {"req_id": message["req_id"]} if "req_id" in message else {}
        if message["method"] == "ping":
            yield told | {"method": "pong"}
            return
        asked, pairs = message["params"], {f"{pair.base}/{pair.quote}": pair for pair in self.exchange.spot.values()}
        channel, depth = asked["channel"], asked.get("depth", 10)
        for symbol in asked["symbol"]:
            wrong = "" if symbol in pairs else f"Currency pair not supported {symbol}"
            wrong = wrong or ("" if channel in KRAKEN_CHANNELS else "Subscription name invalid")
            wrong = wrong or ("" if depth in KRAKEN_DEPTHS else "Subscription depth not supported")
            if wrong:
                yield told | {"error": wrong, "success": False, "symbol": symbol}
                continue
            yield told | {"result": {"channel": channel, "snapshot": True, "symbol": symbol}, "success": True}
            topic = Topic(symbol, KRAKEN_CHANNELS[channel], pairs[symbol], depth)
            _keep(topics, [topic], WANTED[message["method"]])

    def ticker(self, topic: Topic, day: Row, ms: int) -> Message:
        figures = {"last": "last", "bid": "bid", "ask": "ask", "vwap": "average", "low": "low", "high": "high"}
        data: Row = {"symbol": topic.name} | {name: float(day[ours]) for name, ours in figures.items()}
        sizes = {"bid_qty": "bid_size", "ask_qty": "ask_size", "volume": "volume"}
        data |= {name: round(day[ours], 8) for name, ours in sizes.items()}
        change = topic.pair.price(float(day["last"]) - float(day["open"]))
        data |= {"change": float(change), "change_pct": round(day["change"] * 100, 2)}
        return {"channel": "ticker", "type": "update", "data": [data]}

    def book(self, topic: Topic, step: Step) -> Message:
        data: Row = {"symbol": topic.name, "checksum": 0} | ({} if step.whole else {"timestamp": _iso(step.ms)})
        for side, levels in (("bids", step.bids), ("asks", step.asks)):
            data[side] = [{"price": float(price), "qty": float(amount)} for price, amount in levels.items()]
        return {"channel": "book", "type": "snapshot" if step.whole else "update", "data": [data]}

    def trades(self, topic: Topic, rows: list[Row], ms: int) -> list[Message]:
        each = {"symbol": topic.name, "ord_type": "market"}
        data = [
            each
            | {"side": row["side"].lower(), "price": float(row["price"]), "qty": float(row["size"])}
            | {"trade_id": row["number"], "timestamp": _iso(row["ms"])}
            for row in rows
        ]
        return [{"channel": "trade", "type": "update", "data": data}]


DIALECTS: dict[str, type[Dialect]] = {"bybit": Bybit, "binance": Binance, "kraken": Kraken}


class Socket:
    """One open socket: it answers what it is asked, and pushes what is new of its topics."""

    def __init__(self, dialect: Dialect, path: str, calls: Counter[str]) -> None:
        self.ws = web.WebSocketResponse(compress=False, timeout=CLOSE_SECONDS)
        self.dialect, self.path, self.calls = dialect, path, calls
        self.topics: dict[str, Topic] = {}
        self.told: dict[str, Any] = {}  # of a topic: the last step of its book, or the number of its last trade

    async def answer(self) -> None:
        """Answer until the other side leaves."""
        for message in self.dialect.hello():
            await self.send(message)
        async for raw in self.ws:
            if raw.type is not WSMsgType.TEXT:
                continue
            self.calls[f"{self.path} asked"] += 1
            try:
                answers = [*self.dialect.ask(orjson.loads(raw.data), self.path, self.topics)]
            except (ValueError, KeyError, TypeError, AttributeError):
                answers = [self.dialect.malformed]
            self.told = {name: told for name, told in self.told.items() if name in self.topics}
            for message in answers:
                await self.send(message)

    def news(self, market: Market, mute: str) -> list[Message]:
        """Return what is new since the last push, but for topics with the text `mute` in their name."""
        messages = list[Message]()
        for name, topic in self.topics.items():
            if mute and mute in name:
                continue
            ms = int(market.now * 1000)
            if topic.channel == "book":
                messages += [self.dialect.book(topic, step) for step in self.steps(name, topic, market)]
            elif topic.channel == "trades":
                last = int(market.now * 2)
                rows = market.trades(topic.pair, min(last - self.told.get(name, last), MAX_TRADES))
                self.told[name] = last
                rows = [row | {"size": f"{row['amount']:.8f}"} for row in rows]
                messages += self.dialect.trades(topic, rows, ms) if rows else []
            else:
                messages.append(self.dialect.ticker(topic, market.day(topic.pair), ms))
        return messages

    def steps(self, name: str, topic: Topic, market: Market) -> Iterator[Step]:
        """Yield the steps a book made, after the whole of it, which binance sends by REST, within three seconds."""
        now, last = market.step, self.told.get(name)
        if last is None:
            last = _book(topic, market.at(now - MAX_STEPS if isinstance(self.dialect, Binance) else now))
            if not isinstance(self.dialect, Binance):
                yield last
        for step in range(max(last.ms * STEPS // 1000 + 1, now - MAX_STEPS), now + 1):
            new = _book(topic, market.at(step))
            if topic.depth == 1:
                yield new
            else:
                yield Step(False, last.ms, new.ms, _changes(last.bids, new.bids), _changes(last.asks, new.asks))
            last = new
        self.told[name] = last

    async def send(self, message: Message | str) -> None:
        with contextlib.suppress(ConnectionError):
            await self.ws.send_str(message if isinstance(message, str) else orjson.dumps(message).decode())


def _keep(topics: dict[str, Topic], some: list[Topic], wanted: bool) -> None:
    for topic in some:
        key = f"{topic.channel} {topic.name}"
        if wanted:
            topics[key] = topic
        else:
            topics.pop(key, None)


def _book(topic: Topic, market: Market) -> Step:
    sides = (
        {row["price"]: f"{row['amount']:.8f}" for row in market.book(topic.pair, side, topic.depth)} for side in SIDES
    )
    return Step(True, market.ms, market.ms, *sides)


def _changes(old: Levels, new: Levels) -> Levels:
    gone = dict.fromkeys(old.keys() - new.keys(), "0")
    return gone | {price: amount for price, amount in new.items() if old.get(price) != amount}


def _iso(ms: int) -> str:
    return datetime.fromtimestamp(ms / 1000, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
