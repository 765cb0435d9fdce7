"""What all simulated exchanges have in common. Each exchange has a subclass in a module of its own.

Wire formats are texts with fields, in records that an empty line separates. The first line of a
record is the channel of a push, or paths, kind, most rows and default rows (500) of a REST answer.
The indented lines are the text of one row, which is repeated; the other lines are the text around
the rows. The fields come from the market (`Market.ticker`, `trade`, `candle`), the pair
(`Exchange.fields`) and the request (`Exchange.answer`). `<spot text>` and `<swap text>` are parts
for one type of market only.

The rows of a kind of REST answer are made by its function in `ROWS`.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Set
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from src.sandbox.knobs import Knobs
from src.sandbox.market import (
    BOOK_STEPS_PER_SECOND,
    FUNDING_SECONDS,
    TRADE_SECONDS,
    Fields,
    Market,
    Pair,
    Rows,
    current_funding,
    funding,
    iso_time,
    pairs,
    positions,
)

Headers = Mapping[str, str] | None
MARKET_TYPES = ("spot", "swap")
MONDAY = 4 * 86_400
"""Weeks of Binance and Bybit start then, after the epoch. Public report: ccxt issue 25046."""
HALT_SECONDS = 3 * 86_400
"""Time since the last trade of a halted market."""
INTEREST_SECONDS = 60
"""The current open interest changes this often."""
SPREADS = 100
"""Seconds of which the best prices are sent. The real number is not documented."""


@dataclass(eq=False)
class RefusalError(Exception):
    """A request is refused."""

    reason: str
    """The name of an error, or for a socket its text."""
    headers: Headers = None
    until: float | None = None
    """End of the refusal, Unix time."""
    parameter: str = ""
    """Name of the wrong parameter."""


def names_in(params: Mapping[str, str]) -> list[str]:
    """Return the markets in the parameters of a request: one, a JSON list or a comma list."""
    texts = (params[name] for name in ("symbol", "symbols", "pair") if name in params)
    return re.findall(r"\w+", next(texts, ""))


@dataclass(frozen=True)
class Request:
    """One REST request."""

    path: str
    params: Mapping[str, str]
    market: Market
    ms: int
    """Unix time of the exchange's clock in milliseconds, which includes its skew."""
    knobs: Knobs
    url_length: int = 0
    """Length of path and query."""
    most: int = 1
    """The most rows of the answer."""
    default: int = 500
    """The rows of the answer if the request has no limit."""

    @property
    def names(self) -> list[str]:
        """Return the requested markets."""
        return names_in(self.params)

    @property
    def is_concerned(self) -> bool:
        """Return whether the knobs `error` and `odd` apply to the request."""
        return self.knobs.pair in ("", *self.names)

    def unknown_names(self, known: Mapping[str, Pair]) -> set[str]:
        """Return the requested markets that are unknown, or that the knobs make unknown."""
        refused = {self.knobs.pair} if self.knobs.error == "no_symbol" else set()
        return {name for name in self.names if name not in known or name in refused}

    def param(self, *names: str) -> str:
        """Return the first of these parameters that is present."""
        return next((self.params[name] for name in names if name in self.params), "")

    def number(self, *names: str) -> int | None:
        """Return a whole number. Raise `ValueError` with the name of the parameter otherwise."""
        text = self.param(*names)
        if text and not text.isdecimal():
            raise ValueError(next(name for name in names if name in self.params))
        return int(text) if text else None

    def limit(self, default: int) -> int:
        return max(1, min(self.number("limit", "count") or default, self.most))

    def seconds(self, *names: str) -> float | None:
        """Return a time. Its size shows if it is in seconds, ms or ns."""
        number = self.number(*names)
        units = ((10**17, 10**9), (10**11, 1_000), (0, 1))  # ns, ms (after 1973), s
        return None if number is None else number / next(n for least, n in units if number >= least)

    def periods(self, market: Market, seconds: float, earliest: float = 0) -> range:
        """Return the numbers of the trades or candles that are requested.

        For a time before the listing of a market, exchanges send its first candles.
        """
        start = self.seconds("start", "startTime", "since")
        start = None if start is None else max(start, earliest)
        end = self.seconds("end", "endTime")
        return market.periods(seconds, self.limit(self.default), start, end)


class Format(NamedTuple):
    """The text of a message, and of each of its rows, with fields to fill in."""

    kind: str
    most: int
    """The most rows of a REST answer."""
    default: int
    """The rows of a REST answer to a request without a limit."""
    text: str
    row: str

    def fill(self, fields: Fields, lists: Mapping[str, Iterable[Fields]]) -> str:
        filled = fields.copy()
        for name, rows in lists.items():
            filled[name] = ",".join([self.row % (fields | row) for row in rows])
        return self.text % filled


def parse_formats(records: str, envelope: str = "%s") -> dict[tuple[str, str], Format]:
    """Parse the records that the module's docstring describes.

    Return the formats by market type and name. `envelope` contains `%s` where the message goes.
    """
    formats: dict[tuple[str, str], Format] = {}
    for market_type in MARKET_TYPES:
        text = re.sub(rf"<{market_type}\s([^>]*)>", r"\1", records)
        text = re.sub(r"<\w+\s[^>]*>", "", text)
        for record in re.sub(r"\$(\w+)", r"%(\1)s", text).strip().split("\n\n"):
            header, *lines = record.splitlines()
            names, _, kind = header.partition(" ")
            kind, _, most = kind.partition(" ")
            most, _, default = most.partition(" ")
            message = envelope % "".join(line for line in lines if line[0] != " ")
            row = "".join(line.strip() for line in lines if line[0] == " ")
            parsed = Format(kind, int(most or 1), int(default or 500), message, row)
            formats |= {(market_type, name): parsed for name in names.split(",")}
    return formats


@dataclass
class Limit:
    """How much of one rate limit is used."""

    window: float = 0.0
    used: float = 0.0
    refused: int = 0
    banned_until: float = 0.0

    def start_window(self, now: float, seconds: int) -> float:
        """Start a new window if the last one is over. Return the end of the window."""
        if self.window != now // seconds:
            self.window = now // seconds
            self.used = 0.0
            self.refused = 0
        return (self.window + 1) * seconds

    def take(self, now: float, burst: int, per_second: float) -> bool:
        """Count a request. Return False if it exceeds a burst that is refilled all the time."""
        self.used = max(0.0, self.used - (now - self.window) * per_second)
        self.window = now
        is_allowed = self.used + 1 <= burst
        self.used += is_allowed
        return is_allowed


class Topic(NamedTuple):
    """One subscription of a socket."""

    name: str
    """The name on the wire."""
    channel: str
    """book, trades, or the name of a ticker's push format"""
    pair: Pair
    option: Any = ""
    """The depth of a book, the length of candles or the trigger of a ticker, as on the wire."""

    @property
    def key(self) -> str:
        """Return what distinguishes this subscription from all others of its socket."""
        return f"{self.channel} {self.name} {self.option}"


class Exchange:
    """A simulated exchange: its markets, wire formats and rate limits."""

    name = ""
    model = Market(0, week_offset=MONDAY)
    """Prices and spreads of the exchange, and the start of its weeks."""
    listing: tuple[Pair, ...]
    swap_listing: tuple[Pair, ...] = ()
    trading_status = ""
    """Status of a market without restrictions."""
    intervals: Mapping[str, int]
    """Lengths of candles in seconds, by the value of the parameter."""
    periods: Mapping[str, int]
    """Lengths of periods of the open interest in seconds, by the value of the parameter."""
    error_lines = ""
    """Name, status and text of each error. A status may have the seconds that the failure is said
    to last (`418+600`). Indented lines continue a text."""
    error_format: tuple[str, str]
    """An expression for texts of errors, and the answer with them. Other texts are sent as such."""
    drift_removes: tuple[str, ...] = ()
    drift_renames = ""
    """Members that the word `drift` removes from answers or renames, each once."""
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
    pushes_swap_deltas = False
    """True if pushes of a swap's ticker contain only the fields that changed."""
    pushes_block_trades = False
    """True if trades of a swap can have a mark that they were not made on the market."""
    connection_limit = (0, 0)
    """New sockets per address, and the seconds in which they are counted."""
    message_limits: tuple[tuple[str, int], ...] = ()
    """Messages per second and socket, by a part of its path."""
    too_fast = ""
    """Reply to a message above the limit. Without it, the socket is closed."""
    has_checksums = False
    """True if pushes of order books have a checksum."""
    greeting = ""
    """Sent to every new socket."""
    malformed = ""
    """Reply to a message that cannot be understood."""

    def __init__(self, filler: int) -> None:
        """List `filler` more markets than usual."""
        self.filler = pairs((f"F{number:04d}" for number in range(1, filler + 1)), "USDT")
        self.configure(Knobs())
        self.errors = {}
        for line in self.error_lines.strip().replace("\n ", " ").splitlines():
            name, status, text = re.sub(r"\$(\w+)", r"%(\1)s", line).split(" ", 2)
            self.errors[name] = (status, re.sub(*self.error_format, text))
        self.rest_formats = parse_formats(self.rest_records, self.envelope)
        self.push_formats = parse_formats(self.push_records)
        self.reset_limits()

    def configure(self, knobs: Knobs) -> None:
        """List the markets that the knobs say."""
        added = [Pair.of_symbol(symbol) for symbol in knobs.listed]
        self.spot: dict[str, Pair] = {}
        self.swaps: dict[str, Pair] = {}
        for pair in [*self.listing, *self.filler, *self.swap_listing, *added]:
            known = self.swaps if pair.is_swap else self.spot
            if (pair_id := self.fields(pair)["id"]) not in knobs.delisted:
                known[pair_id] = pair

    def market(self, now: float, knobs: Knobs, since: float) -> Market:
        """Return the market at a time, under knobs that were set at the time `since`."""
        halted = self.pairs_with(knobs.halted)
        last_trades = dict.fromkeys(halted, since - HALT_SECONDS)
        last_trades |= dict.fromkeys(self.pairs_with(knobs.still), since)
        return replace(
            self.model,
            now=now,
            shift=knobs.price,
            last_trades=last_trades,
            halted=halted,
            odd=knobs.odd,
            odd_pairs=self.pairs_with({knobs.pair}) if knobs.pair else None,
        )

    def pairs_with(self, ids: Set[str]) -> Set[Pair]:
        """Return the spot markets and swaps with these ids."""
        return {known[name] for known in (self.spot, self.swaps) for name in ids & known.keys()}

    def error(self, refusal: RefusalError, now: float) -> tuple[int, str, Headers]:
        """Return status, body and headers of an error answer in the format of the exchange."""
        status, text = self.errors.get(refusal.reason) or self.errors["rate_limit"]
        status, _, seconds = status.partition("+")
        until = now + int(seconds or 0) if refusal.until is None else refusal.until
        times = {"now_ms": int(now * 1000), "until": int(until), "until_ms": int(until * 1000)}
        body = text % (times | {"parameter": refusal.parameter})
        return int(status), body, refusal.headers

    def reset_limits(self) -> None:
        self.limits: defaultdict[str, Limit] = defaultdict(Limit)

    def charge(self, request: Request) -> dict[str, str]:
        """Count a request towards the rate limit. Return its headers, or raise `RefusalError`."""
        raise NotImplementedError

    def fields(self, pair: Pair) -> Fields:
        """Return the fields that formats use for a market."""
        names = {"id": pair.id, "base": pair.base, "quote": pair.quote}
        return names | {"tick": pair.tick, "digits": pair.price_digits}

    def answer(self, request: Request) -> tuple[str, dict[str, str]]:
        """Return the body, which is JSON, and the headers. Raise `RefusalError` otherwise."""
        answer_format = self.rest_formats.get((self.market_type(request), request.path))
        if answer_format is None:
            raise RefusalError("unknown_path")
        request = replace(request, most=answer_format.most, default=answer_format.default)
        # In a list of markets, an unknown one is refused by `requested_pairs`.
        is_in_list = request.knobs.error == "no_symbol" and request.knobs.pair
        if request.knobs.error and request.is_concerned and not is_in_list:
            raise RefusalError(request.knobs.error)
        try:
            headers = {} if request.knobs.rate_limit < 0 else self.charge(request)
            text = self.filled(answer_format, request)
        except ValueError as error:
            raise RefusalError("bad_parameter", parameter=str(error)) from None
        is_drifting = "drift" in request.knobs.odd and request.is_concerned
        return self.drifted(text) if is_drifting else text, headers

    def drifted(self, text: str) -> str:
        """Return an answer with a new status, without some members and with a renamed one."""
        for name in self.drift_removes:
            text = re.sub(rf'"{name}":("[^"]*"|\[[^]]*\]),', "", text, count=1)
        text = text.replace(f'"status":"{self.trading_status}"', '"status":"Auction"', 1)
        return text.replace(f'"{self.drift_renames}":', f'"new_{self.drift_renames}":', 1)

    def filled(self, answer_format: Format, request: Request) -> str:
        kind = answer_format.kind
        requested = self.requested_pairs(request)
        lists = self.rows(kind, request, requested)
        ms = request.market.book_ms if kind == "book" else request.ms
        fields: Fields = {"ms": ms, "close_ms": ms, "second": ms // 1000, "answer_ms": request.ms}
        fields |= {"category": request.param("category"), "last_ms": ms, "last_candle": ms // 1000}
        fields["iso"] = iso_time(ms)
        if requested:
            fields |= self.fields(requested[0])
        if kind in {"candles", "trades"} and lists["rows"]:
            last_candle = lists["rows"][-2:][0]["second"]  # recorded: the last complete one
            fields |= {"last_ms": lists["rows"][-1]["ms"], "last_candle": last_candle}
        return answer_format.fill(fields, lists)

    def rows(self, kind: str, request: Request, requested: list[Pair]) -> Rows:
        """Return the rows of an answer, by the field that they fill in."""
        return ROWS[kind](self, request, requested)

    def candle_numbers(self, request: Request, market: Market, seconds: int) -> range:
        return request.periods(market, seconds, request.knobs.candles_from_ms / 1000)

    def status(self, pair: Pair, request: Request) -> str:
        """Return the status of a market, in the exchange's own words."""
        statuses = request.knobs.statuses
        return statuses.get(self.fields(pair)["id"], statuses.get("*", self.trading_status))

    def requested_pairs(self, request: Request) -> list[Pair]:
        """Return the markets in the parameters, or all."""
        known = self.known_pairs(request)
        if request.unknown_names(known):
            raise RefusalError("no_symbol")
        return [known[name] for name in request.names or known]

    def market_type(self, request: Request) -> str:
        """Return the type of the markets that a request can ask for: `spot` or `swap`."""
        return "spot"

    def known_pairs(self, request: Request) -> Mapping[str, Pair]:
        """Return the markets a request can ask for, by the names it can use."""
        return self.swaps if self.market_type(request) == "swap" else self.spot

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
        push_format = self.push_formats["swap" if topic.pair.is_swap else "spot", topic.channel]
        times: Fields = {"ms": ms, "iso": iso_time(ms)}
        fields = self.fields(topic.pair) | {"name": topic.name} | times | fields
        fields = {"is_block": "false"} | fields
        if not push_format.text:  # each row is a message
            return [push_format.row % (fields | row) for row in lists["rows"]]
        return [push_format.fill(fields, lists)]


def market_rows(exchange: Exchange, request: Request, requested: list[Pair]) -> Rows:
    rows = [
        exchange.fields(pair) | {"status": exchange.status(pair, request)} for pair in requested
    ]
    return {"rows": rows}


def ticker_rows(exchange: Exchange, request: Request, requested: list[Pair]) -> Rows:
    return {"rows": [exchange.fields(pair) | request.market.ticker(pair) for pair in requested]}


def candle_rows(exchange: Exchange, request: Request, requested: list[Pair]) -> Rows:
    """Return candles as the knobs want them.

    Binance and Bybit finalise candles up to some hundred milliseconds after their close.
    """
    pair = requested[0]
    market = request.market
    seconds = exchange.intervals.get(request.param("interval"))
    if seconds is None:
        raise RefusalError("bad_interval")
    since_close = (market.now - market.offset(seconds)) % seconds
    if since_close * 1000 < request.knobs.candle_delay_ms:
        market = replace(market, now=market.now - since_close - 0.001)
    numbers = exchange.candle_numbers(request, market, seconds)
    if pair in market.halted or market.is_odd(pair, "empty_candles"):
        return {"rows": []}
    rows = [market.candle(pair, number, seconds) for number in numbers]
    rows = [row for row in rows if row["ms"] >= request.knobs.candles_from_ms]
    if rows and market.is_odd(pair, "duplicate_candle"):  # hummingbot pull request 6889
        rows.append(rows[-1] | {"volume": f"{float(rows[-1]['volume']) * 1.5:.8f}"})
    return {"rows": rows}


def trade_rows(exchange: Exchange, request: Request, requested: list[Pair]) -> Rows:
    numbers = request.periods(request.market.traded(requested[0]), TRADE_SECONDS)
    return {"rows": request.market.trades(requested[0], numbers)}


def book_rows(exchange: Exchange, request: Request, requested: list[Pair]) -> Rows:
    return request.market.book(requested[0], request.limit(100), request.market.step).rows


def swap_rows(exchange: Exchange, request: Request, requested: list[Pair]) -> Rows:
    """Return the current prices, funding and open interest of swaps."""
    market = request.market
    rows = []
    for pair in requested:
        row = exchange.fields(pair) | market.figures(pair, market.now // 60 * 60, market.now + 1)
        number = int(market.now // INTEREST_SECONDS)
        row |= positions(market, pair, number, INTEREST_SECONDS) | current_funding(market, pair)
        rows.append(row | {"ms": request.ms})
    return {"rows": rows}


def funding_rows(exchange: Exchange, request: Request, requested: list[Pair]) -> Rows:
    numbers = request.periods(request.market, FUNDING_SECONDS)
    fields = exchange.fields(requested[0])
    return {"rows": [fields | funding(request.market, requested[0], number) for number in numbers]}


def position_rows(exchange: Exchange, request: Request, requested: list[Pair]) -> Rows:
    """Return the open interest of a swap, and the ratio of long and short positions, by period."""
    seconds = exchange.periods.get(request.param("period", "intervalTime"))
    if seconds is None:
        raise RefusalError("bad_interval")
    pair = requested[0]
    numbers = request.periods(request.market, seconds)
    rows = [positions(request.market, pair, number, seconds) for number in numbers]
    return {"rows": [exchange.fields(pair) | row for row in rows]}


def spread_rows(_exchange: Exchange, request: Request, requested: list[Pair]) -> Rows:
    """Return the best prices of the last seconds."""
    market = request.market
    since = request.seconds("since") or 0
    rows: list[Fields] = []
    for second in range(int(market.now) - SPREADS + 1, int(market.now) + 1):
        book = market.book(requested[0], 1, second * BOOK_STEPS_PER_SECOND)
        for bid, ask in zip(book.bids, book.asks, strict=False):
            rows.append({"second": second, "bid": bid, "ask": ask})
    return {"rows": [row for row in rows if row["second"] >= since]}


ROWS: dict[str, Callable[[Exchange, Request, list[Pair]], Rows]] = {
    "markets": market_rows,
    "tickers": ticker_rows,
    "candles": candle_rows,
    "trades": trade_rows,
    "book": book_rows,
    "swaps": swap_rows,
    "fundings": funding_rows,
    "positions": position_rows,
    "spreads": spread_rows,
    "time": lambda *_: {},
}
