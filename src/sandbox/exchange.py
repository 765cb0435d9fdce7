"""What all simulated exchanges have in common. Each exchange has a subclass in a module of its own.

Wire formats are texts with fields, in records that an empty line separates. The first line of a
record is its name: the path and kind of a REST answer, or the channel of a push. The indented lines
are the text of one row, which is repeated; the other lines are the text around the rows. The fields
come from the market (`Market.ticker`, `trade`, `candle`), the pair (`Exchange.fields`) and the
request (`Exchange.answer`).
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from src.sandbox.market import COMMON_PAIRS, TRADE_SECONDS, Fields, Market, Pair, iso_time, pairs

MAX_ROWS = 5_000
UNIT_SECONDS = {"": 60, "s": 1, "m": 60, "h": 3_600, "d": 86_400, "w": 604_800}
Refusal = tuple[int, object]
"""Status and body of an error answer."""


class RefusalError(Exception):
    """A request is refused. Arguments: status, body and headers; for a socket only a text."""


@dataclass(frozen=True)
class Request:
    """One REST request."""

    path: str
    params: Mapping[str, str]
    market: Market
    ms: int
    """Unix time of the exchange's clock in milliseconds, which includes its skew."""
    rate_limit: int = 0
    """Requests or weight per window. 0 is the documented limit, -1 no limit."""

    def param(self, *names: str) -> str:
        """Return the first of these parameters that is present."""
        return next((self.params[name] for name in names if name in self.params), "")

    def limit(self, default: int) -> int:
        return max(1, min(int(self.param("limit", "count") or default), MAX_ROWS))

    def seconds(self, *names: str) -> float | None:
        """Return a time. Its number of digits shows if it is in seconds, ms or ns."""
        text = self.param(*names)
        return int(text) / 10 ** max(0, len(text) - 10) if text else None

    def periods(self, seconds: float) -> range:
        """Return the numbers of the trades or candles that are requested."""
        start = self.seconds("start", "startTime", "since")
        end = self.seconds("end", "endTime")
        return self.market.periods(seconds, self.limit(500), start, end)


class Format(NamedTuple):
    """The text of a message, and of each of its rows, with fields to fill in."""

    kind: str
    text: str
    row: str

    def fill(self, fields: Fields, lists: Mapping[str, Iterable[Fields]]) -> str:
        filled = fields.copy()
        for name, rows in lists.items():
            filled[name] = ",".join([self.row % (fields | row) for row in rows])
        return self.text % filled


def parse_formats(records: str, envelope: str = "%s") -> dict[str, Format]:
    """Parse the records that the module's docstring describes. Return the formats by name.

    `envelope` contains `%s` where the message goes.
    """
    formats = {}
    for record in records.strip().split("\n\n"):
        header, *lines = re.sub(r"\$(\w+)", r"%(\1)s", record).splitlines()
        name, _, kind = header.partition(" ")
        text = envelope % "".join(line for line in lines if line[0] != " ")
        row = "".join(line.strip() for line in lines if line[0] == " ")
        formats[name] = Format(kind, text, row)
    return formats


class Topic(NamedTuple):
    """One subscription of a socket."""

    name: str
    """The name on the wire."""
    channel: str
    """book, trades, or the name of a ticker's push format"""
    pair: Pair
    depth: int = 0
    seconds: int = 0
    """The length of candles."""
    interval: str = ""
    """The length of candles on the wire."""

    @property
    def key(self) -> str:
        """Return what distinguishes this subscription from all others of its socket."""
        return f"{self.channel} {self.name} {self.depth} {self.interval}"


class Exchange:
    """A simulated exchange: its markets, wire formats and rate limits."""

    name = ""
    price_factor = 1.0
    """The prices of the exchange, relative to those of the market."""
    half_spread = 0.0001
    listing: tuple[Pair, ...] = COMMON_PAIRS
    unknown_path: Refusal
    unknown_symbol: Refusal
    invalid_interval: Refusal
    geo_block: Refusal
    envelope = "%s"
    """The text around each REST answer."""
    rest_records = ""
    push_records = ""
    pushes_snapshots = True
    """False if clients fetch the snapshots of order books by REST."""
    pushes_only_trades = False
    """True if candles are pushed only when a trade changes them, and without a mark of the end."""
    candle_snapshot = 1
    """Candles that the first push of a subscription contains."""
    greeting = ""
    """Sent to every new socket."""
    malformed = ""
    """Reply to a message that cannot be understood."""

    def __init__(self, filler: int) -> None:
        """List `filler` more markets than usual."""
        extra = pairs((f"F{number:04d}" for number in range(1, filler + 1)), "USDT")
        self.spot = {self.fields(pair)["id"]: pair for pair in self.listing + extra}
        self.rest_formats = parse_formats(self.rest_records, self.envelope)
        self.push_formats = parse_formats(self.push_records)
        self.reset_limits()

    def reset_limits(self) -> None:
        self.window = 0.0
        self.used = 0.0
        self.refused = 0
        self.banned_until = 0.0

    def charge(self, request: Request) -> dict[str, str]:
        """Count a request towards the rate limit. Return its headers, or raise `RefusalError`."""
        raise NotImplementedError

    def start_window(self, now: float, seconds: int) -> float:
        """Start a new window of the rate limit if the last one is over. Return its end."""
        if self.window != now // seconds:
            self.window = now // seconds
            self.used = 0.0
            self.refused = 0
        return (self.window + 1) * seconds

    def fields(self, pair: Pair) -> Fields:
        """Return the fields that formats use for a market."""
        names = {"id": pair.id, "base": pair.base, "quote": pair.quote}
        return names | {"tick": pair.tick, "digits": pair.price_digits}

    def answer(self, request: Request) -> tuple[str, dict[str, str]]:
        """Return the body, which is JSON, and the headers. Raise `RefusalError` otherwise."""
        answer_format = self.rest_formats.get(request.path)
        if answer_format is None:
            raise RefusalError(*self.unknown_path)
        headers = {} if request.rate_limit < 0 else self.charge(request)
        kind = answer_format.kind
        requested = self.requested_pairs(request)
        lists = self.rows(kind, request, requested)
        ms = request.market.book_ms if kind == "book" else request.ms
        fields: Fields = {"ms": ms, "second": ms // 1000, "last_ms": ms}
        fields["category"] = request.param("category")
        if requested:
            fields |= self.fields(requested[0])
        if kind == "trades" and lists["rows"]:
            fields["last_ms"] = lists["rows"][-1]["ms"]
        return answer_format.fill(fields, lists), headers

    def rows(self, kind: str, request: Request, requested: list[Pair]) -> dict[str, list[Fields]]:
        """Return the rows of an answer, by the field that they fill in."""
        market = request.market
        match kind:
            case "markets":
                return {"rows": [self.fields(pair) for pair in requested]}
            case "tickers":
                return {"rows": [self.fields(pair) | market.ticker(pair) for pair in requested]}
            case "candles":
                seconds = self.interval_seconds(request)
                numbers = request.periods(seconds)
                return {"rows": [market.candle(requested[0], n, seconds) for n in numbers]}
            case "trades":
                numbers = request.periods(TRADE_SECONDS)
                return {"rows": [market.trade(requested[0], number) for number in numbers]}
            case "book":
                return market.book(requested[0], request.limit(100), market.step).rows
        return {}

    def interval_seconds(self, request: Request) -> int:
        matched = re.fullmatch(r"(\d*)([smhdwDW]?)", request.param("interval"))
        if matched is None:
            raise RefusalError(*self.invalid_interval)
        return int(matched[1] or 1) * UNIT_SECONDS[matched[2].lower()]

    def requested_pairs(self, request: Request) -> list[Pair]:
        """Return the markets in the parameters (one, a JSON list or a comma list), or all."""
        known = self.known_pairs(request)
        names = re.findall(r"\w+", request.param("symbol", "symbols", "pair"))
        if not known.keys() >= set(names):
            raise RefusalError(*self.unknown_symbol)
        return [known[name] for name in names or known]

    def known_pairs(self, request: Request) -> Mapping[str, Pair]:
        """Return the markets a request can ask for, by the names it can use."""
        return self.spot

    def reply(self, message: Fields, path: str, topics: dict[str, Topic]) -> list[Fields]:
        """Return the replies to a message of a socket, and change the socket's topics.

        Raise `ValueError`, `KeyError`, `TypeError` or `AttributeError` if it is malformed.
        """
        raise NotImplementedError

    @staticmethod
    def change_topics(topics: dict[str, Topic], verb: str, changed: Iterable[Topic]) -> None:
        """Subscribe to topics, or unsubscribe. Raise `KeyError` for another verb."""
        for topic in changed:
            if {"subscribe": True, "unsubscribe": False}[verb]:
                topics[topic.key] = topic
            else:
                topics.pop(topic.key, None)

    def push(self, topic: Topic, ms: int, fields: Fields, **lists: list[Fields]) -> list[str]:
        """Return the messages that push data of a topic."""
        variant = "swap" if topic.pair.is_swap else fields.get("type")
        push_format = self.push_formats.get(f"{topic.channel}.{variant}")
        push_format = push_format or self.push_formats[topic.channel]
        times = {"ms": ms, "iso": iso_time(ms)}
        fields = self.fields(topic.pair) | {"name": topic.name} | times | fields
        if not push_format.text:  # each row is a message
            return [push_format.row % (fields | row) for row in lists["rows"]]
        return [push_format.fill(fields, lists)]
