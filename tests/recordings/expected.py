"""What the gateway has to serve for a recording, read from the recording itself and not by ccxt.

A text or integer of a recording has to be served exactly. A `Decimal` is computed from several of
them, and has to be served up to rounding.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from decimal import Decimal
from typing import Any, NamedTuple

from tests.recordings.book import Book, apply_bybit
from tests.recordings.recording import Recording
from tests.recordings.replay import BASE_AND_QUOTE, SETTLE

MAX_SHOWN = 20  # faults in a failure
ROUNDING = 1e-9  # relative; of computed values

# Members of answers that a recording does not have.
NOT_RECORDED = {"symbol", "exchange", "datetime", "fetched_at", "source", "stale"}
NOT_RECORDED |= {"requested_at", "server_time"}

# Names of assets that the exchange uses alone, and the common ones.
RENAMED = {
    "bybit": {},
    "binance": {"YOYO": "YOYOW", "BCHSV": "BSV"},
    "kraken": {
        "XBT": "BTC",
        "XDG": "DOGE",
        "LUNA": "LUNC",
        "LUNA2": "LUNA",
        "UST": "USTC",
        "REPV2": "REP",
        "REP": "REPV1",
    },
}
# Statuses of markets whose bid and ask are live.
LIVE_STATUSES = {
    "binance": {"TRADING"},
    "bybit": {"Trading"},
    "kraken": {"online", "post_only", "limit_only", "reduce_only"},
}
# Members of tickers by the exchange's own names.
BINANCE_TICKER = {
    "last": "lastPrice", "close": "lastPrice", "price": "lastPrice", "bid": "bidPrice",
    "bidVolume": "bidQty", "ask": "askPrice", "askVolume": "askQty", "open": "openPrice",
    "high": "highPrice", "low": "lowPrice", "vwap": "weightedAvgPrice",
    "previousClose": "prevClosePrice", "change": "priceChange",
    "percentage": "priceChangePercent", "baseVolume": "volume", "quoteVolume": "quoteVolume",
    "timestamp": "closeTime", "last_trade_at": "closeTime",
}  # fmt: skip
BYBIT_TICKER = {
    "last": "lastPrice", "close": "lastPrice", "price": "lastPrice", "bid": "bid1Price",
    "bidVolume": "bid1Size", "ask": "ask1Price", "askVolume": "ask1Size", "open": "prevPrice24h",
    "high": "highPrice24h", "low": "lowPrice24h", "baseVolume": "volume24h",
    "quoteVolume": "turnover24h", "markPrice": "markPrice", "indexPrice": "indexPrice",
}  # fmt: skip


class Omitted(NamedTuple):
    """Members of tickers that are not served although they are recorded."""

    exchange: str
    members: tuple[str, ...]
    reason: str
    applies: Callable[[Mapping[str, Any]], bool] = lambda values: True
    """Given the recorded members."""


def is_zero(member: str) -> Callable[[Mapping[str, Any]], bool]:
    """Return a function that tells if a recorded member is 0 or missing."""
    return lambda row: not float(row[member] or 0)


OMITTED = (
    Omitted("binance", ("bid", "bidVolume"), "0 means that nobody buys", is_zero("bid")),
    Omitted("binance", ("ask", "askVolume"), "0 means that nobody sells", is_zero("ask")),
    Omitted("kraken", ("bid", "bidVolume"), "0 means that nobody buys", is_zero("bid")),
    Omitted("kraken", ("ask", "askVolume"), "0 means that nobody sells", is_zero("ask")),
)


class Unserved(NamedTuple):
    """Recorded tickers that are answered with an error."""

    code: str
    reason: str
    applies: Callable[[str, Mapping[str, Any]], bool]
    """Given the symbol and the recorded members."""


UNSERVED = (
    Unserved(
        "unknown_symbol", "Kraken's synthetic pairs have no symbol", lambda s, _: ":BTNL" in s
    ),
    Unserved("unknown_symbol", "ccxt calls REP and REPV2 REP", lambda s, _: s.startswith("REPV1/")),
    Unserved(
        "market_halted", "never traded, so 0 is no price", lambda _, row: not float(row["last"])
    ),
    Unserved(
        "market_halted",
        "halted: no orders, and no trade for a long time",
        lambda s, row: ":" not in s and row.get("bid", 1) is row.get("ask", 1) is None,
    ),
)


def symbol_of(exchange: str, market_type: str, market: Mapping[str, Any]) -> str:
    """Return the canonical symbol of a row of a market list."""
    base, quote = (market[member] for member in BASE_AND_QUOTE[exchange])
    if exchange == "kraken":
        base, quote = market["wsname"].split("/")
    renamed = RENAMED[exchange]
    symbol = f"{renamed.get(base, base)}/{renamed.get(quote, quote)}"
    return f"{symbol}:{market[SETTLE[exchange]]}" if market_type == "swap" else symbol


def ticker(exchange: str, row: Mapping[str, Any]) -> dict[str, Any]:
    """Return the expected members of a ticker."""
    values = READERS[exchange](row)
    if values["open"] is not None:
        values["average"] = (Decimal(values["open"]) + Decimal(values["last"])) / 2
    for omitted in OMITTED:
        if omitted.exchange == exchange and omitted.applies(values):
            values |= dict.fromkeys(omitted.members)
    return values


def listed_symbols(
    exchange: str, market_type: str, markets: Iterable[Mapping[str, Any]]
) -> set[str]:
    """Return the symbols that the gateway lists, given the rows of a market list."""
    trading = [market for market in markets if market["status"] in LIVE_STATUSES[exchange]]
    if market_type == "swap":
        trading = [row for row in trading if row["contractType"].upper().endswith("PERPETUAL")]
    if exchange == "kraken":  # dark pools had no `wsname`
        trading = [market for market in trading if "wsname" in market]
    symbols = {symbol_of(exchange, market_type, market) for market in trading}
    return {symbol for symbol in symbols if not unserved_code(symbol, {"last": 1})}


def unserved_code(symbol: str, values: Mapping[str, Any]) -> str:
    """Return the code of the expected error. Empty if the ticker is served."""
    return next((row.code for row in UNSERVED if row.applies(symbol, values)), "")


def read_binance(row: Mapping[str, Any]) -> dict[str, Any]:
    """Read a row of `ticker/24hr`."""
    return {member: row.get(name) for member, name in BINANCE_TICKER.items()}


def read_bybit(row: Mapping[str, Any]) -> dict[str, Any]:
    """Read a row of `tickers`, also one that was pushed."""
    values: dict[str, Any] = {member: row.get(name) for member, name in BYBIT_TICKER.items()}
    values["change"] = Decimal(row["lastPrice"]) - Decimal(row["prevPrice24h"])
    values["percentage"] = Decimal(row["price24hPcnt"]) * 100
    if float(row["volume24h"]):
        values["vwap"] = Decimal(row["turnover24h"]) / Decimal(row["volume24h"])
    return values


def read_kraken(row: Mapping[str, Any]) -> dict[str, Any]:
    """Read a row of `Ticker`. Of two values, the second is that of 24 hours.

    `o` is the open of the day, from which no figure of 24 hours can be computed.
    """
    values: dict[str, Any] = dict.fromkeys(("last", "close", "price"), row["c"][0])
    values |= {"bid": row["b"][0], "bidVolume": row["b"][2]}
    values |= {"ask": row["a"][0], "askVolume": row["a"][2]}
    values |= {"high": row["h"][1], "low": row["l"][1], "open": None}
    values |= {"vwap": row["p"][1], "baseVolume": row["v"][1]}
    values["quoteVolume"] = Decimal(row["v"][1]) * Decimal(row["p"][1])
    return values


READERS: Mapping[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
    "binance": read_binance,
    "bybit": read_bybit,
    "kraken": read_kraken,
}


def book_states(
    exchange: str, messages: Iterable[Mapping[str, Any]], snapshot: Recording | None, count: int
) -> list[dict[str, Any]]:
    """Return an order book after its snapshot by REST, if there is one, and after each message."""
    book = Book()
    states: list[dict[str, Any]] = []

    def add(**numbers: Any) -> None:
        for side in ("bids", "asks"):
            best = book.best(side, count)
            numbers[side] = [[float(text) for text in level] for level in best]
        states.append(numbers)

    first = 0
    if snapshot is not None:
        first = snapshot.body["lastUpdateId"]
        book.apply(*levels(snapshot).values())
        add(timestamp=snapshot.body.get("T"), nonce=first)
    for message in messages:
        if exchange == "bybit":
            apply_bybit(book, message)
            add(timestamp=message["ts"])  # ccxt drops the number
        elif message["u"] >= first:
            book.apply(message["b"], message["a"])
            add(timestamp=message["E"], nonce=message["u"])
    return states


def ticker_states(messages: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return Bybit's ticker after each message. Spot has bid and ask in other messages."""
    row: dict[str, Any] = {}
    top: dict[str, Any] = {}
    times: dict[str, int] = {}
    states = []
    for message in messages:
        data = message["data"]
        times[message["topic"]] = message["ts"]
        if message["topic"].startswith("tickers."):
            row |= data
        else:
            for side, (price, amount) in (("bid", data["b"][0]), ("ask", data["a"][0])):
                top |= {side: price, f"{side}Volume": amount}
        if row:
            states.append(ticker("bybit", row) | top | {"timestamp": max(times.values())})
    return states


def levels(recording: Recording) -> dict[str, list[list[str]]]:
    """Return bids and asks of an order book, best first."""
    book = recording.values
    sides = ("bids", "asks") if "bids" in book else ("b", "a")
    return {
        name: [row[:2] for row in book[side]]
        for name, side in zip(("bids", "asks"), sides, strict=True)
    }


def candles(recording: Recording) -> list[list[Any]]:
    """Return time, open, high, low, close and volume of each candle, oldest first."""
    if recording.exchange == "kraken":
        return [[row[0] * 1000, *row[1:5], row[6]] for row in recording.values]
    return sorted(row[:6] for row in recording.values)


def trades(recording: Recording) -> list[dict[str, Any]]:
    """Return the trades, oldest first."""
    return [trade(recording.exchange, row) for row in recording.values]


def trade(exchange: str, row: Any) -> dict[str, Any]:
    """Return the expected members of one trade."""
    if exchange == "kraken":
        sides = {"b": "buy", "s": "sell"}
        identity = str(row[6]) if len(row) > 6 else None
        ms = int(Decimal(str(row[2])) * 1000)
        members = (identity, ms, sides[row[3]], row[0], row[1])
    elif exchange == "bybit":
        ms = int(row["time"])
        members = (row["execId"], ms, row["side"].lower(), row["price"], row["size"])
    else:
        side = "sell" if row["m"] else "buy"  # `m`: the buyer was the maker
        members = (str(row["a"]), row["T"], side, row["p"], row["q"])
    return dict(zip(("id", "timestamp", "side", "price", "amount"), members, strict=True))


def pushed_trade(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return the expected members of a trade that Bybit pushed."""
    members = (row["i"], row["T"], row["S"].lower(), row["p"], row["v"])
    return dict(zip(("id", "timestamp", "side", "price", "amount"), members, strict=True))


def pushed_candle(message: Mapping[str, Any]) -> dict[str, Any]:
    """Return time, open, high, low, close and volume of a candle that was pushed."""
    if "data" in message:
        row = message["data"][-1]
        names = ("open", "high", "low", "close", "volume")
        time = row["start"]
    else:
        row = message["k"]
        names = ("o", "h", "l", "c", "v")
        time = row["t"]
    return {"candle": [time, *(float(row[name]) for name in names)]}


def is_equal(served: Any, expected: Any) -> bool:
    """Return True if a served value is the expected one. An empty text stands for no value."""
    if expected in (None, "") or served is None:
        return served is None and expected in (None, "")
    if isinstance(expected, Decimal):
        return math.isclose(served, float(expected), rel_tol=ROUNDING, abs_tol=1e-15)
    return bool(served == (float(expected) if isinstance(served, float) else expected))


def differences(
    where: str, served: Mapping[str, Any], expected: Mapping[str, Any]
) -> tuple[int, list[str]]:
    """Compare all members, also those that are not expected. Return their count and the faults."""
    members = (served.keys() | expected.keys()) - NOT_RECORDED
    faults = [
        f"{where} {member}: served {served.get(member)!r}, recorded {expected.get(member)!r}"
        for member in sorted(members)
        if not is_equal(served.get(member), expected.get(member))
    ]
    return len(members), faults


def contradictions(
    where: str, served: Mapping[str, Any], raw: Mapping[str, Any]
) -> tuple[int, list[str]]:
    """Compare all served values with ccxt's. Return their count and the faults."""
    members = [member for member, value in served.items() if value is not None and member in raw]
    members = [member for member in members if member not in NOT_RECORDED]
    faults = [
        f"{where} {member}: served {served[member]!r}, read by ccxt {raw[member]!r}"
        for member in members
        if served[member] != raw[member]
    ]
    return len(members), faults


def check(comparisons: Iterable[tuple[int, list[str]]]) -> None:
    """Fail if there are faults, or if nothing was compared."""
    results = list(comparisons)
    faults = [fault for _, found in results for fault in found]
    count = sum(count for count, _ in results)
    shown = "\n".join(faults[:MAX_SHOWN])
    assert not faults, f"{len(faults)} of {count} values are not those of the recording:\n{shown}"
    assert count
