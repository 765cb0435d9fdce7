"""Recorded answers of the exchanges: what each file is follows from its body, name and source.

The files are not part of the project. `conftest.recordings` finds their folder. A new file needs no
code if its body has the shape of a known endpoint.
"""

import csv
import gzip
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, urlsplit

import pytest

from tests.conftest import recordings
from tests.recordings.book import Book, apply_bybit

# For recordings without a time in them, and markets without a name.
DEFAULT_MS = 1_735_689_600_000
DEFAULT_ID = "BTCUSDT"
TIMEFRAMES_MS = {
    60_000: "1m",
    300_000: "5m",
    900_000: "15m",
    1_800_000: "30m",
    3_600_000: "1h",
    14_400_000: "4h",
    86_400_000: "1d",
    604_800_000: "1w",
}
# UTC seconds of 2014 and 2030. No other integer in the recordings lies between them, neither as
# seconds nor as milliseconds.
OLDEST_TIME, NEWEST_TIME = 1_400_000_000, 1_900_000_000
# A member of an answer, or of its first row, shows the kind of data.
KINDS = {
    "symbols": "list",
    "wsname": "list",
    "baseCoin": "list",
    "lastPrice": "ticker",
    "c": "ticker",
    "lastUpdateId": "orderbook",
    "bids": "orderbook",
    "s": "orderbook",
    "execId": "trades",
    "p": "trades",
}


class Push(NamedTuple):
    """One recorded message of a socket."""

    type: str
    """`spot` or `swap`."""
    topic: str
    """The topic without the number of levels: `orderbook.BTCUSDT`."""
    message: dict[str, Any]
    """The message, as a socket with single streams receives it."""


@dataclass(frozen=True)
class Recording:
    """One file."""

    name: str
    """Name of the file without its extension."""
    body: Any
    url: str = ""
    """The requested URL or its query, if the source tells it."""

    @cached_property
    def exchange(self) -> str:
        """The name of the exchange, by its envelope."""
        body = self.body[0][2] if self.kind == "stream" else self.body
        if "result" not in body:
            return "bybit" if "topic" in body else "binance"
        return "kraken" if "error" in body else "bybit"

    @cached_property
    def type(self) -> str:
        """`spot` or `swap`."""
        if "_fut_" in self.name or "_linear_" in self.name:
            return "swap"
        rows = list(self.rows.values()) if self.kind == "list" else [{}]
        return "swap" if "contractType" in rows[0] else "spot"

    @property
    def types(self) -> set[str]:
        """The market types of a recording: a recorded stream may have several."""
        return {push.type for push in self.pushes} if self.kind == "stream" else {self.type}

    @cached_property
    def kind(self) -> str:
        """`list` of markets, `ticker`, `orderbook`, `ohlcv`, `trades` or `stream`."""
        body = self.body.get("result", self.body) if isinstance(self.body, dict) else self.body
        rows = body.get("list", body) if isinstance(body, dict) else body
        first = next(iter(rows.values())) if isinstance(rows, dict) else rows[0]
        for row in (body, first):
            for member, kind in KINDS.items():
                if isinstance(row, dict) and member in row:
                    return kind
        if isinstance(first[0], list):  # Kraken's rows of one market
            return "trades" if first[0][3] in ("b", "s") else "ohlcv"
        return "stream" if isinstance(first[0], str) else "ohlcv"

    @cached_property
    def rows(self) -> dict[str, Any]:
        """Markets or tickers by market id. Kraken's recorded tickers may have display names."""
        body = self.body
        if isinstance(body, dict) and "symbols" in body:
            body = body["symbols"]
        if self.exchange == "kraken":
            return dict(body["result"])
        if isinstance(body, dict):
            body = body["result"]["list"] if "result" in body else [body]
        return {row["symbol"]: row for row in body}

    @cached_property
    def values(self) -> Any:
        """The order book, or the list of trades or candles."""
        if self.exchange == "binance":
            return self.body
        result = self.body["result"]
        return result.get(self.id) or result.get("list") or result

    @cached_property
    def pushes(self) -> list[Push]:
        """The messages of a recorded stream in order.

        Bybit's spot tickers have no bid and ask, and the channel with them is not recorded: its
        messages are made of the recorded order books.
        """
        swaps = {name for name, _, message in self.body if "markPrice" in message.get("data", {})}
        books: dict[tuple[str, str], Book] = {}
        pushes = []
        for name, _, message in self.body:
            market_type = "swap" if self.type == "swap" or name in swaps else "spot"
            topic = message.get("stream") or message["topic"]
            is_combined = "stream" in message
            push = Push(market_type, topic_key(topic), message["data"] if is_combined else message)
            pushes.append(push)
            if topic.startswith("orderbook."):
                book = books.setdefault((name, topic), Book())
                apply_bybit(book, message)
                pushes.append(_top_of(book, push))
        return pushes

    @cached_property
    def id(self) -> str:
        """The id of the market of an order book, trades or candles."""
        query = dict(parse_qsl(urlsplit(self.url).query or self.url))
        if found := query.get("symbol") or query.get("pair"):
            return found
        if self.exchange == "kraken":
            return str(next(iter(self.body["result"])))
        if self.exchange == "bybit":
            result = self.body["result"]
            return str(result.get("s") or result["list"][0]["symbol"])
        match = re.search(r"_([A-Z0-9]{5,})$", self.name)
        return match[1] if match else DEFAULT_ID

    @cached_property
    def timeframe(self) -> str:
        """The timeframe of candles, by the distance of their times."""
        step = self.values[1][0] - self.values[0][0]
        return TIMEFRAMES_MS[step if step >= min(TIMEFRAMES_MS) else step * 1000]

    @cached_property
    def ms(self) -> int:
        """The time of the answer: the exchange's own, or the newest in the body (UTC ms)."""
        if isinstance(self.body, dict) and (own := self.body.get("time")):
            return int(own)
        if self.kind == "list":
            return int(self.body.get("serverTime", DEFAULT_MS))
        times = [message[1] for message in self.body] if self.kind == "stream" else self.body
        return max(_times(times), default=DEFAULT_MS)


def topic_key(topic: str) -> str:
    """Return a topic without its number of levels, except for the best level."""
    return re.sub(r"^orderbook\.(?!1\.)\d+\.", "orderbook.", topic)


def market_id(topic: str) -> str:
    """Return the market id of a topic: `btcusdt@trade` or `tickers.BTCUSDT`."""
    return topic.partition("@")[0].rpartition(".")[2].upper()


def _top_of(book: Book, push: Push) -> Push:
    """Return Bybit's message with the best level of an order book."""
    levels = {name: book.best(side, 1) for name, side in (("b", "bids"), ("a", "asks"))}
    topic = push.topic.replace("orderbook.", "orderbook.1.")
    message = push.message | {"type": "snapshot", "data": push.message["data"] | levels}
    return Push(push.type, topic, message)


def _times(value: Any) -> Iterator[int]:
    """Yield all numbers in a body that are times, as UTC milliseconds."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from _times(item)
    elif isinstance(value, int | float):
        for factor in (1, 1000):
            if OLDEST_TIME <= value / factor <= NEWEST_TIME:
                yield int(value * 1000 / factor)


@cache
def every_recording() -> tuple[Recording, ...]:
    """Read all recordings: `*.json`, and `wire/*.json.gz` with the answer under `body`."""
    root = recordings()
    if root is None:
        return ()
    urls = {}
    if (sources := root / "wire" / "SOURCES.tsv").exists():
        with sources.open(newline="") as lines:
            urls = {row["name"]: row["note"] or "" for row in csv.DictReader(lines, delimiter="\t")}
    found = [Recording(path.stem, json.loads(path.read_bytes())) for path in root.glob("*.json")]
    for path in root.glob("wire/*.json.gz"):
        name = path.name.removesuffix(".json.gz")
        body = json.loads(gzip.decompress(path.read_bytes()))["body"]
        found.append(Recording(name, body, urls.get(name, "")))
    return tuple(sorted(found, key=lambda recording: recording.name))


def of_kind(*kinds: str, newest: bool = False) -> list[Any]:
    """Return the recordings of these kinds as parameters of a test, which is skipped without.

    With `newest`, return only the newest of each exchange, market type and kind.
    """
    chosen = [recording for recording in every_recording() if recording.kind in kinds]
    if newest:
        chosen.sort(key=lambda each: (each.ms, each.name))
        chosen = list({(each.exchange, each.type, each.kind): each for each in chosen}.values())
    if not chosen:
        reason = "there are no recordings of live exchanges (VIRTUOSO_RECORDINGS)"
        return [pytest.param(None, marks=pytest.mark.skip(reason))]
    return [pytest.param(recording, id=recording.name) for recording in chosen]
