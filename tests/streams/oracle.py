"""Checks values that the gateway serves against the market model of the sandbox.

The model is a function of the symbol and the time, so that each served number can be compared with
what the market had at the stated time. A symbol is checked only if no knob changes its prices.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from src.sandbox.exchange import Exchange
from src.sandbox.knobs import Knobs
from src.sandbox.market import BOOK_STEPS_PER_SECOND, Fields, Market, Pair

SLACK_SECONDS = 3.0
"""How much older than its stated time a value may be: latency, and pauses of a busy machine."""
CLOSE_SECONDS = 3.0
"""How long after a close an answer may end before the closed candle."""
FRESH_SECONDS = {"ticker": 15.0, "orderbook": 2.0, "trades": 5.0, "ohlcv": 30.0}
"""The defaults of the TTLs."""
STREAM_SECONDS = 8.0
"""Silence until a stream is stale, and the time to reconnect before."""
TIMEFRAMES = {"1m": 60, "5m": 300}
TICKER_FIELDS = {
    "last": "last",
    "price": "last",
    "bid": "bid",
    "ask": "ask",
    "high": "high",
    "low": "low",
    "baseVolume": "volume",
}
TODAY_FIELDS = {"high", "low", "baseVolume"}
"""Fields of Kraken that have another meaning in the sandbox, or are of the current day."""
CANDLE_FIELDS = ("open", "high", "low", "close", "volume")
Value = dict[str, Any]


@dataclass
class Oracle:
    """Knows the market of one exchange at all times."""

    exchange: Exchange

    def problems(
        self, kind: str, value: Value, received: float, *, is_past: bool = False
    ) -> list[str]:
        """Return what is wrong with a value of a kind that was received at a Unix time.

        Candles of a range in the past are never too old.
        """
        end = value["fetched_at"] / 1000
        age = received - end
        limit = FRESH_SECONDS[kind]
        if value["source"] == "stream":
            limit = max(limit, STREAM_SECONDS)
        found = []
        if age < -1:
            found.append(f"was fetched {-age:.1f} s in the future")
        if not (value["stale"] or is_past):
            if age > limit + SLACK_SECONDS:
                found.append(f"is {age:.1f} s old and not marked as stale")
            if kind == "ohlcv":
                found += self.close_problems(value, received)
        if value.get("timestamp"):
            end = min(end, value["timestamp"] / 1000)
        checks: dict[str, Callable[[Pair, Value, float], list[str]]] = {
            "ticker": self.ticker_problems,
            "orderbook": self.book_problems,
            "trades": self.trades_problems,
            "ohlcv": self.candle_problems,
        }
        return [*found, *checks[kind](Pair.of_symbol(value["symbol"]), value, end)]

    def market(self, at: float) -> Market:
        return self.exchange.market(at, Knobs(), 0)

    def markets(self, end: float) -> Iterator[Market]:
        """Return the markets of the last seconds, the latest ones first. They change in steps."""
        last = int(end * BOOK_STEPS_PER_SECOND) + 1
        for step in range(last, int(last - SLACK_SECONDS * BOOK_STEPS_PER_SECOND) - 1, -1):
            yield self.market(step / BOOK_STEPS_PER_SECOND)

    def ticker_problems(self, pair: Pair, value: Value, end: float) -> list[str]:
        wrong = {name for name in TICKER_FIELDS if value[name] is not None}
        if self.exchange.name == "kraken":
            wrong -= TODAY_FIELDS
        for market in self.markets(end):
            row = market.ticker(pair)
            wrong = {name for name in wrong if value[name] != float(row[TICKER_FIELDS[name]])}
            if not wrong:
                return []
        return [f"{name} {value[name]} is not of the last seconds" for name in sorted(wrong)]

    def book_problems(self, pair: Pair, value: Value, end: float) -> list[str]:
        served = [[tuple(level[:2]) for level in value[side]] for side in ("bids", "asks")]
        depth = max(map(len, served))
        for market in self.markets(end):
            sides = market.sides(pair, depth)
            if served == [[tuple(map(float, level)) for level in side.items()] for side in sides]:
                return []
        return [f"is not a book of the last seconds: {served}"]

    def trades_problems(self, pair: Pair, value: Value, end: float) -> list[str]:
        ids = [trade["id"] for trade in value["trades"]]
        found = [] if len(set(ids)) == len(ids) else [f"has trades twice: {ids}"]
        newest = self.market(end + 1 / BOOK_STEPS_PER_SECOND).last_trade(pair)
        for trade in value["trades"]:
            row = self.market(end).trade(pair, int(trade["id"]))
            served = [trade[name] for name in ("timestamp", "side", "price", "amount")]
            if served != [row["ms"], row["side"], float(row["price"]), float(row["amount"])]:
                found.append(f"has a trade that was not made: {trade}, {row}")
            if int(trade["id"]) > newest:
                found.append(f"has a trade of the future: {trade}")
        return found

    def close_problems(self, value: Value, received: float) -> list[str]:
        """Check that the answer includes the last closed candle, soon after the close."""
        seconds = TIMEFRAMES[value["timeframe"]]
        due = (received - CLOSE_SECONDS) // seconds * seconds
        closed_until = value["closed_until"] / 1000
        if closed_until >= due:
            return []
        return [f"is closed until {closed_until} after {due}, and not marked as stale"]

    def candle_problems(self, pair: Pair, value: Value, end: float) -> list[str]:
        seconds = TIMEFRAMES[value["timeframe"]]
        rows = value["candles"]
        starts = [row[0] // 1000 for row in rows]
        found = []
        if starts and starts != list(range(starts[0], starts[-1] + 1, seconds)):
            found.append(f"has gaps or repeats: {starts}")
        for row, start in zip(rows, starts, strict=True):
            is_closed = row[0] < value["closed_until"]
            markets = iter([self.market(start + seconds)]) if is_closed else self.markets(end)
            known = (market.candle(pair, start // seconds, seconds) for market in markets)
            if not any(row[1:] == numbers(candle, CANDLE_FIELDS) for candle in known):
                kind = "closed" if is_closed else "growing"
                found.append(f"has a {kind} candle that the market did not have: {row}")
        return found


def numbers(row: Fields, names: tuple[str, ...]) -> list[float]:
    return [float(row[name]) for name in names]
