"""The WebSockets of the simulated exchanges: one `Socket` for each connection of a client.

A socket remembers what it pushed of each topic, so that the next push contains only what is new.
"""

import contextlib
import itertools
import time
from collections import Counter
from typing import Any

import orjson
from aiohttp import WSCloseCode, WSMsgType, web

from src.sandbox.exchange import Exchange, Topic
from src.sandbox.market import Book, Fields, Market, iso_time

MAX_STEPS = 30
"""Book steps that are pushed one by one after a pause. The first includes all earlier steps."""
MAX_TRADES = 100
"""Trades of one push, after a pause."""
TOO_FAST = b"Too many requests"
CLOSE_SECONDS = 1.0
"""Time a client has to confirm that its socket is closed."""


class Socket:
    """The WebSocket connection of one client of a simulated exchange."""

    def __init__(self, exchange: Exchange, path: str, calls: Counter[str]) -> None:
        """Count the client's messages in `calls`."""
        self.ws = web.WebSocketResponse(compress=False, timeout=CLOSE_SECONDS)
        self.exchange = exchange
        self.path = path
        self.calls = calls
        self.topics: dict[str, Topic] = {}
        self.pushed: dict[str, Any] = {}
        """By topic: the last book (`Book`) or candle, the number of the last trade, or the event
        that caused the last ticker."""
        self.message_times: list[float] = []
        self.earlier: dict[str, list[str]] = {}
        """The messages of the last push by topic, for the knob `odd: late`."""
        self.lost: set[str] = set()
        """Topics of which a delta was lost."""
        self.updates: dict[str, int] = {}
        """Numbers of the last updates of books, by topic."""
        self.now = 0.0
        self.is_clock_stopped = False
        """True if tests stopped the clock. Then tickers are pushed without an event, too."""

    async def serve(self) -> None:
        """Reply to messages until the client leaves."""
        if self.exchange.greeting:
            await self.send(self.exchange.greeting)
        async for frame in self.ws:
            if frame.type is not WSMsgType.TEXT:
                continue
            self.calls[f"{self.path} asked"] += 1
            if self.is_too_fast():
                if not self.exchange.too_fast:
                    await self.ws.close(code=WSCloseCode.POLICY_VIOLATION, message=TOO_FAST)
                    return
                await self.send(self.exchange.too_fast)
                continue
            for reply in self.replies(frame.data):
                await self.send(reply)

    def is_too_fast(self) -> bool:
        """Count a message. Return whether there are too many in a second of the system's clock."""
        limits = self.exchange.message_limits
        limit = next((limit for part, limit in limits if part in self.path), 0)
        now = time.monotonic()
        self.message_times = [at for at in self.message_times if at > now - 1] + [now]
        return 0 < limit < len(self.message_times)

    def replies(self, text: str) -> list[str]:
        try:
            replies = self.exchange.reply(orjson.loads(text), self.path, self.topics)
        except (ValueError, KeyError, TypeError, AttributeError):
            return [self.exchange.malformed]
        self.pushed = {key: last for key, last in self.pushed.items() if key in self.topics}
        self.earlier = {key: last for key, last in self.earlier.items() if key in self.topics}
        return [orjson.dumps(reply).decode() for reply in replies]

    def new_messages(self, market: Market, mute: str) -> list[str]:
        """Return what is new since the last push, except for topics with `mute` in their name."""
        messages: list[str] = []
        self.is_clock_stopped = market.now == self.now
        self.now = market.now
        for topic in self.topics.values():
            if mute and mute in topic.key:
                continue
            push = {
                "book": self.book_messages,
                "trades": self.trade_messages,
                "candles": self.candle_messages,
            }.get(topic.channel, self.ticker_messages)
            messages += self.odd_messages(topic, market, push(topic, market))
        return messages

    def odd_messages(self, topic: Topic, market: Market, messages: list[str]) -> list[str]:
        """Return the messages, more than once or again after newer ones if the knob `odd` says."""
        if not messages:
            return messages
        earlier = self.earlier.get(topic.key, [])
        self.earlier[topic.key] = messages
        if market.is_odd(topic.pair, "duplicates"):
            messages = [message for message in messages for _ in range(2)]
        is_late = market.is_odd(topic.pair, "late") and topic.channel != "book"
        return messages + earlier if is_late else messages

    def ticker_messages(self, topic: Topic, market: Market) -> list[str]:
        """Return the ticker, on kraken only after a trade or a change of the best prices."""
        ticker = market.ticker(topic.pair)
        ms = int(market.now * 1000)
        best = (ticker["bid"], ticker["ask"])
        event = {"trades": market.last_trade(topic.pair), "bbo": best}.get(topic.option)
        if event is None:
            messages = self.exchange.push(topic, ms, ticker)
            is_delta = self.exchange.pushes_swap_deltas and topic.pair.is_swap
            return self.ticker_deltas(topic, messages[0]) if is_delta else messages
        last = self.pushed.get(topic.key)
        self.pushed[topic.key] = event
        is_active = topic.pair not in market.last_trades
        if event == last and not (self.is_clock_stopped and is_active):
            return []
        return self.exchange.push(topic, ms, ticker | {"type": "update" if last else "snapshot"})

    def ticker_deltas(self, topic: Topic, text: str) -> list[str]:
        """Return only the fields of a ticker that changed. A size comes with its price."""
        message = orjson.loads(text)
        data = message["data"]
        last = self.pushed.get(topic.key)
        self.pushed[topic.key] = data
        if last is None or (data == last and self.is_clock_stopped):
            return [text]
        if data == last:
            return []
        names = {name for name in data if data[name] != last[name]} | {"symbol"}
        names |= {name.replace("Size", "Price") for name in names}
        names |= {name.replace("Price", "Size") for name in names if "1Price" in name}
        changed = {name: value for name, value in data.items() if name in names}
        return [orjson.dumps(message | {"type": "delta", "data": changed}).decode()]

    def trade_messages(self, topic: Topic, market: Market) -> list[str]:
        last = market.last_trade(topic.pair)
        pushed = self.pushed.get(topic.key, last)
        first = max(pushed, last - MAX_TRADES) + 1
        self.pushed[topic.key] = max(pushed, last)
        rows = market.trades(topic.pair, range(first, last + 1))
        is_odd = topic.pair.is_swap and market.is_odd(topic.pair, "odd_trades")
        if is_odd and self.exchange.pushes_block_trades:
            rows = [row | block_trade(row) for row in rows]
        ms = int(market.now * 1000)
        return self.exchange.push(topic, ms, {"push_ms": ms}, rows=rows) if rows else []

    def candle_messages(self, topic: Topic, market: Market) -> list[str]:
        """Return the growing candle, after the last updates of candles that have closed."""
        ms = int(market.now * 1000)
        sent: Fields = self.pushed.get(topic.key, {})
        count = MAX_STEPS if sent else self.exchange.candle_snapshot
        seconds = self.exchange.intervals[str(topic.option)]
        periods = market.periods(seconds, count)
        first = max(periods.start, sent.get("number", 0))
        rows = [candle_row(market, topic, number, seconds) for number in range(first, periods.stop)]
        if self.exchange.pushes_only_trades:
            known = (sent.get("number"), sent.get("volume"))
            rows = [row for row in rows if float(row["volume"])]
            rows = [row for row in rows if (row["number"], row["volume"]) != known]
        if not rows:
            return []
        self.pushed[topic.key] = rows[-1]
        fields = {"push_ms": ms, "interval": topic.option, "type": "update" if sent else "snapshot"}
        parts = [rows]  # recorded: bybit's message has both candles
        if sent and self.exchange.pushes_only_trades:
            parts = [[row] for row in rows]
        pushes = [self.exchange.push(topic, ms, fields, rows=part) for part in parts]
        return list(itertools.chain.from_iterable(pushes))

    def book_messages(self, topic: Topic, market: Market) -> list[str]:
        """Return the updates of a book, after its snapshot if the exchange pushes one."""
        messages: list[str] = []
        now = market.step
        depth = int(topic.option)
        book: Book | None = self.pushed.get(topic.key)
        if book is None and self.exchange.pushes_snapshots:
            book = market.book(topic.pair, depth, now)
            messages += self.push_book("snapshot", topic, book, book)
        elif book is None:  # the snapshot that the client fetches by REST may be older
            book = market.book(topic.pair, depth, now - MAX_STEPS)
        for step in range(max(book.step + 1, now - MAX_STEPS), now + 1):
            new = market.book(topic.pair, depth, step)
            update = self.push_book("snapshot" if depth == 1 else "delta", topic, book, new)
            if depth == 1 or not self.loses_delta(topic, market, book, new):
                messages += update
            book = new
        self.pushed[topic.key] = book
        return messages

    def loses_delta(self, topic: Topic, market: Market, book: Book, new: Book) -> bool:
        """Return whether to skip this delta: the first one that changes the prices of the book."""
        if not market.is_odd(topic.pair, "lost_delta"):
            self.lost.discard(topic.key)
            return False
        if topic.key in self.lost or book.bids.keys() == new.bids.keys():
            return False
        self.lost.add(topic.key)
        return True

    def push_book(self, kind: str, topic: Topic, previous: Book, book: Book) -> list[str]:
        self.updates[topic.key] = update = self.updates.get(topic.key, 1) + 1
        fields: Fields = {"type": kind, "kind": kind.replace("delta", "update"), "update": update}
        fields |= {"previous_ms": previous.ms, "first_ms": previous.ms + 1}
        if self.exchange.has_checksums:
            fields["checksum"] = book.checksum
        rows = book if kind == "snapshot" else book.changes_since(previous)
        return self.exchange.push(topic, book.ms, fields, **rows.rows)

    async def send(self, message: str) -> None:
        with contextlib.suppress(ConnectionError):
            await self.ws.send_str(message)


def block_trade(row: Fields) -> Fields:
    """Return what makes one of ten trades of a swap one that was not made on the market."""
    if row["number"] % 10 != 3:
        return {}
    price = f"{float(row['price']) * 0.9:.8f}"
    return {"price": price, "is_block": "true"}


def candle_row(market: Market, topic: Topic, number: int, seconds: int) -> Fields:
    """Return a candle as REST has it, and whether it has closed."""
    row = market.candle(topic.pair, number, seconds)
    row["is_closed"] = "true" if row["end"] < market.now * 1000 else "false"
    return row | {
        "number": number,
        "begin": iso_time(row["ms"]),
        "close_time": iso_time(row["end"] + 1),
    }
