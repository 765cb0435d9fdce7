"""The market behind all simulated exchanges. Every figure is a function of the market and the time.

Each day has open, high, low, close and volume. It is divided into hours, these into five minutes,
these into minutes, and these into trades. One part reaches the high of the whole and one its low;
the volumes of the parts add up to its volume. So any candle equals the sum of its trades, without
counting them. `Bar` is the result on each level. Rounding to the digits of a market comes last. It
never changes an order, so that highs and lows stay equal.

Prices and amounts are texts with a fixed number of digits, because exchanges send them so.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import cached_property, lru_cache
from itertools import accumulate, pairwise
from random import Random
from typing import Any, NamedTuple, Self
from zlib import crc32

Fields = dict[str, Any]
"""The fields of a message on the wire, or of one of its rows."""
Rows = dict[str, list[Fields]]
"""Lists of rows, by the field of the message that they fill in."""
Levels = dict[str, str]
"""One side of an order book: price -> amount."""
Time = float | None
"""Unix time in seconds."""

DAY_SECONDS = 86_400
WEEK_SECONDS = 7 * DAY_SECONDS
BOOK_STEPS_PER_SECOND = 10
"""Order books change this often."""
BOOK_STEP_MS = 1000 // BOOK_STEPS_PER_SECOND
TRADE_SECONDS = 0.5
"""Time between two trades."""
FUNDING_SECONDS = 28_800
"""Time between two fundings of a swap."""
FUNDING_RATE = 0.0001
"""The usual rate of a funding."""
LEVELS = (86_400, 3_600, 300, 60)
"""Lengths of bars in seconds. The last ones are divided into trades."""
PARTS = (24, 12, 5, 120)
"""How many parts each of them has."""
UNITS = 10**8
"""Amounts are whole multiples of 1e-8."""
SIDES = ("bid", "ask")
PRICE_LIST = """
BTC 97000 ETH 3400 SOL 190 XRP 2.4 ADA 0.85 DOGE 0.33 LTC 105 LINK 21 AVAX 36 DOT 6.8 BCH 440
XLM 0.38 ATOM 6.4 UNI 12.5 ETC 25 TRX 0.24 AAVE 310 ALGO 0.33 FIL 5 NEAR 5.1 BNB 650 APT 9
ARB 0.72 OP 1.7 INJ 22 SUI 4.2 TON 5.4 XTZ 1.2 SHIB 0.000022 PEPE 0.0000178 MNT 1.1 XMR 195
LUNC 0.00006 LUNA 0.16 AAPLx 231 EUR 1.08 USDC 0.9998 USDT 1 USD 1
"""
PRICES = {asset: float(price) for asset, price in re.findall(r"(\S+) (\S+)", PRICE_LIST)}
COINS = [*list(PRICES)[:30], "EUR", "USDC"]
MAJORS = COINS[:8]
SWAP_COINS = ("BTC", "ETH", "SOL", "XRP", "DOGE")
VOLATILITY = {"EUR": 0.1, "USDC": 0.001, "USDT": 0.0, "USD": 0.0}
"""Relative to all other assets, which have 1."""
# Days per step and size of the random walks, so that prices move slowly also over months.
OCTAVES = ((2, 0.04), (32, 0.16))
NOISE = 0.2
"""How far prices leave the straight line from open to close, as a part of the range."""
DAY_RANGE = 0.015
"""How far the high and low of a day are at most from its open and close, as a part of them."""


@lru_cache(maxsize=65_536)
def _noise(seed: int, index: int) -> float:
    """Return fixed noise between -1 and 1."""
    # CRC-32 is linear: without the multiplication all symbols would move in parallel.
    return (crc32(b"%d" % index, seed) * 0x9E3779B1 & 0xFFFFFFFF) / 2**31 - 1


@lru_cache(maxsize=8_192)
def _seeds(name: str) -> list[int]:
    return [crc32(f"{name}:{octave}".encode()) for octave in range(len(OCTAVES) + 2)]


@lru_cache(maxsize=8_192)
def _base_price(asset: str) -> float:
    return PRICES.get(asset) or 10 ** (2 * _noise(_seeds(asset)[0], 0))


@lru_cache(maxsize=65_536)
def _dollar_price(asset: str, day: int) -> float:
    """Return the price of an asset in dollars at the start of a day, in days since the epoch."""
    volatility = VOLATILITY.get(asset, 1.0)
    if not volatility:
        return _base_price(asset)
    walk = 0.0
    for seed, (period, size) in zip(_seeds(asset), OCTAVES, strict=False):
        index, rest = divmod(day, period)
        part = rest / period
        left = _noise(seed, index)
        right = _noise(seed, index + 1)
        walk += size * (left + (right - left) * part * part * (3 - 2 * part))
    return _base_price(asset) * math.exp(volatility * walk)


def iso_time(ms: int) -> str:
    """Return Unix milliseconds as ISO 8601 in UTC."""
    moment = datetime.fromtimestamp(ms / 1000, UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _amount(units: int) -> str:
    return f"{units // UNITS}.{units % UNITS:08d}"


@dataclass(frozen=True)
class Pair:
    """One market: its assets, and the digits of its prices."""

    base: str
    quote: str
    is_swap: bool = False

    @classmethod
    def of_symbol(cls, symbol: str) -> Self:
        """Return the market with a symbol such as `BTC/USDT`, or of the swap `BTC/USDT:USDT`."""
        base, _, quote = symbol.partition("/")
        return cls(base, quote.partition(":")[0], is_swap=":" in symbol)

    @property
    def id(self) -> str:
        return self.base + self.quote

    @cached_property
    def price_digits(self) -> int:
        """Return the number of decimals that gives prices about five significant digits."""
        magnitude = math.floor(math.log10(_base_price(self.base) / _base_price(self.quote)))
        return max(1, min(8, 4 - magnitude))

    @property
    def tick(self) -> str:
        return self.price(10**-self.price_digits)

    def price(self, value: float) -> str:
        return f"{value:.{self.price_digits}f}"


def pairs(bases: Iterable[str], quote: str, is_swap: bool = False) -> tuple[Pair, ...]:
    return tuple(Pair(base, quote, is_swap) for base in bases)


COMMON_PAIRS = pairs(COINS, "USDT") + pairs(MAJORS, "USDC")
COMMON_PAIRS += pairs(MAJORS[1:5], "BTC") + pairs(MAJORS[:4], "EUR")
SWAPS = pairs(SWAP_COINS, "USDT", is_swap=True)


class Bar(NamedTuple):
    """The trades of a period, or one trade."""

    open: float
    high: float
    low: float
    close: float
    volume: int
    """In units of 1e-8."""

    @classmethod
    def of(cls, bars: Sequence[Self]) -> Self:
        """Join the bars of consecutive periods."""
        volume = sum([bar.volume for bar in bars])
        high = max([bar.high for bar in bars])
        return cls(bars[0].open, high, min([bar.low for bar in bars]), bars[-1].close, volume)


@lru_cache(maxsize=8_192)
def _habits(pair: Pair) -> tuple[float, float]:
    """Return the largest range of a day, as a part of the price, and the average volume."""
    span = DAY_RANGE * max(VOLATILITY.get(name, 1.0) for name in (pair.base, pair.quote))
    dollars = 10 ** (7.5 + 1.5 * _noise(_seeds(pair.id)[-1], 0))
    return span, dollars / _base_price(pair.base) * UNITS


@lru_cache(maxsize=16_384)
def _day(pair: Pair, number: int) -> Bar:
    first = _dollar_price(pair.base, number) / _dollar_price(pair.quote, number)
    last = _dollar_price(pair.base, number + 1) / _dollar_price(pair.quote, number + 1)
    seed = _seeds(pair.id)[-1]
    span, units = _habits(pair)
    high = max(first, last) * (1 + span * (1.2 + _noise(seed, number)) / 2.2)
    low = min(first, last) * (1 - span * (1.2 + _noise(seed, -number)) / 2.2)
    return Bar(first, high, low, last, int(units * (1 + 0.5 * _noise(seed + 1, number))))


@lru_cache(maxsize=4_096)
def _parts(pair: Pair, level: int, number: int) -> list[Bar]:
    """Divide a bar into bars of the next level, or a minute into trades."""
    whole = _bar(pair, level, number)
    random = Random(crc32(f"{pair.id}:{level}:{number}".encode())).random  # noqa: S311
    count = PARTS[level]
    is_minute = level == len(PARTS) - 1
    steps = count - 1 if is_minute else count
    points = [whole.open]
    for step in range(1, steps):
        point = whole.open + (whole.close - whole.open) * step / steps
        point += (random() - 0.5) * (whole.high - whole.low) * NOISE
        points.append(min(max(point, whole.low), whole.high))
    points.append(whole.close)
    shares = list(accumulate([int(1_000 * random()) + 200 for _ in range(count)], initial=0))
    volumes = [whole.volume * share // shares[-1] for share in shares]
    amounts = [end - start for start, end in pairwise(volumes)]
    top = 1 + int(random() * (count - 3))
    if is_minute:
        points[top : top + 2] = [whole.high, whole.low]
        trades = zip(points, amounts, strict=True)
        return [Bar(price, price, price, price, amount) for price, amount in trades]
    bars = []
    for first, last, amount in zip(points, points[1:], amounts, strict=False):
        above = (whole.high - max(first, last)) * random() * NOISE
        below = (min(first, last) - whole.low) * random() * NOISE
        high = min(whole.high, max(first, last) + above)
        bars.append(Bar(first, high, max(whole.low, min(first, last) - below), last, amount))
    bars[top] = bars[top]._replace(high=whole.high)
    bottom = int(random() * count)
    bars[bottom] = bars[bottom]._replace(low=whole.low)
    return bars


def _bar(pair: Pair, level: int, number: int) -> Bar:
    """Return a bar of a level, or a trade. They are numbered from the epoch."""
    if level == 0:
        return _day(pair, number)
    whole, part = divmod(number, PARTS[level - 1])
    return _parts(pair, level - 1, whole)[part]


@lru_cache(maxsize=16_384)
def _whole_minutes(pair: Pair, start: int, end: int) -> list[Bar]:
    """Return the bars from one minute to another, in seconds. They are as long as possible."""
    bars = []
    while start < end:
        for level, seconds in enumerate(LEVELS):
            if start % seconds == 0 and start + seconds <= end:
                bars.append(_bar(pair, level, start // seconds))
                start += seconds
                break
    return [Bar.of(bars)] if bars else []


class Book(NamedTuple):
    """An order book in one step of time, or its changes since an earlier step."""

    step: int
    bids: Levels
    asks: Levels

    @property
    def ms(self) -> int:
        return self.step * BOOK_STEP_MS

    @property
    def rows(self) -> Rows:
        return {"bids": _rows(self.bids), "asks": _rows(self.asks)}

    @property
    def checksum(self) -> int:
        """Return Kraken's checksum: CRC-32 of all digits of the ten best asks, then of the bids.

        https://docs.kraken.com/exchange/guides/websockets/book-checksum-v2
        """
        levels = [*list(self.asks.items())[:10], *list(self.bids.items())[:10]]
        texts = [text.replace(".", "").lstrip("0") for level in levels for text in level]
        return crc32("".join(texts).encode())

    def changes_since(self, old: Self) -> Self:
        bids = _changed_levels(old.bids, self.bids)
        return self._replace(bids=bids, asks=_changed_levels(old.asks, self.asks))


def _rows(levels: Levels) -> list[Fields]:
    return [{"price": price, "amount": amount} for price, amount in levels.items()]


def _changed_levels(old: Levels, new: Levels) -> Levels:
    """Return the levels that differ. A level that is gone has the amount 0."""
    removed = dict.fromkeys(old.keys() - new.keys(), "0")
    return removed | {price: amount for price, amount in new.items() if old.get(price) != amount}


@dataclass(frozen=True)
class Market:
    """All markets of one exchange at one time."""

    now: float
    """Unix time in seconds."""
    factor: float = 1.0
    half_spread: float = 0.0001
    shift: float = 1.0
    """Another factor of prices, but not of the trades of the markets in `last_trades`."""
    last_trades: Mapping[Pair, float] = field(default_factory=dict)
    """Time of the last trade, of markets without trades since then."""
    halted: Set[Pair] = frozenset()
    """Markets without orders."""
    odd: Set[str] = frozenset()
    """Unusual data, see the knob of this name."""
    odd_pairs: Set[Pair] | None = None
    """The markets with unusual data. None is all."""
    week_offset: int = 0
    """Seconds from the start of the epoch, which is a Thursday, to the start of a week."""

    def is_odd(self, pair: Pair, *names: str) -> bool:
        is_concerned = self.odd_pairs is None or pair in self.odd_pairs
        return is_concerned and not self.odd.isdisjoint(names)

    def traded(self, pair: Pair) -> Self:
        """Return the market at the time of the last trade, or at the present."""
        return replace(self, now=min(self.now, self.last_trades.get(pair, self.now)))

    @property
    def step(self) -> int:
        """Return the number of the current step of the order books."""
        return int(self.now * BOOK_STEPS_PER_SECOND)

    @property
    def book_ms(self) -> int:
        """Return the time of the current step, in Unix milliseconds."""
        return self.step * BOOK_STEP_MS

    def factor_of(self, pair: Pair) -> float:
        """Return the factor of the prices of trades."""
        return self.factor if pair in self.last_trades else self.factor * self.shift

    def last_trade(self, pair: Pair) -> int:
        """Return the number of the last trade."""
        return int(min(self.now, self.last_trades.get(pair, self.now)) / TRADE_SECONDS)

    def bar(self, pair: Pair, start: float, end: float) -> Bar | None:
        """Return the trades from a time until before another, if there are any.

        The times are whole minutes, or less than a minute and in one minute.
        """
        last = min(math.ceil(end / TRADE_SECONDS), self.last_trade(pair) + 1)
        first = math.ceil(start / TRADE_SECONDS)
        if last <= first:
            return None
        bars = []
        minute, part = divmod(first, PARTS[-1])
        if end - start >= LEVELS[-1]:
            minute = last // PARTS[-1]
            part = 0
            bars = _whole_minutes(pair, int(start), minute * LEVELS[-1])
        rest = last - minute * PARTS[-1]
        trades = _parts(pair, len(LEVELS) - 1, minute)[part:rest] if rest else []
        return Bar.of([*bars, *trades])

    def figures(self, pair: Pair, start: float, end: float) -> Fields:
        """Return the figures of the trades from one time until before another.

        Without trades, all prices are that of the last trade.
        """
        bar = self.bar(pair, start, end)
        last = self.last_trade(pair)
        count = max(0, min(int(end / TRADE_SECONDS), last + 1) - int(start / TRADE_SECONDS))
        if bar is None:
            close = _bar(pair, len(LEVELS), last).close
            bar = Bar(close, close, close, close, 0)
        factor = self.factor_of(pair)
        average = factor * (bar.high + bar.low + bar.close) / 3
        row = {name: pair.price(factor * value) for name, value in bar._asdict().items()}
        turnover = f"{average * bar.volume / UNITS:.8f}"
        row |= {"average": pair.price(average), "volume": _amount(bar.volume), "turnover": turnover}
        return row | {"count": count}

    def window(self, pair: Pair, start: float) -> Fields:
        """Return the figures of the trades since a whole minute, and the change of the price."""
        row = self.figures(pair, start, self.now + TRADE_SECONDS)
        change = float(row["close"]) - float(row["open"])
        ratio = change / float(row["open"])
        return row | {"change": pair.price(change), "ratio": ratio, "percent": ratio * 100}

    def ticker(self, pair: Pair) -> Fields:
        """Return the current prices, and the figures of the last 24 hours and of today (UTC)."""
        end = self.now + TRADE_SECONDS
        row = self.window(pair, self.now // 60 * 60 - DAY_SECONDS)
        today = self.figures(pair, self.now // DAY_SECONDS * DAY_SECONDS, end)
        row |= {f"today_{name}": value for name, value in today.items()}
        row |= {"last": row["close"], "start": int(self.now * 1000) - DAY_SECONDS * 1000}
        for side, levels in zip(SIDES, self.sides(pair, 1), strict=True):
            best = next(iter(levels.items()), (pair.price(0), _amount(0)))
            row[side], row[f"{side}_size"] = best
        if pair in self.last_trades:
            row["close_ms"] = int(self.traded(pair).now * 1000)
        return row

    def sides(self, pair: Pair, count: int) -> list[Levels]:
        """Return the best levels of both sides."""
        if pair in self.halted or self.is_odd(pair, "empty_book"):
            return [{}, {}]
        first = 1
        if self.is_odd(pair, "locked_book"):
            first = 0
        if self.is_odd(pair, "crossed_book"):
            first = -1
        asks = {} if self.is_odd(pair, "one_sided_book") else self.levels(pair, "ask", count, first)
        return [self.levels(pair, "bid", count, first), asks]

    def levels(self, pair: Pair, side: str, count: int, first: int = 1) -> Levels:
        """Return the best levels of one side, in whole ticks. Each amount changes once per second.

        The first level is `first` times the half spread away from the middle.
        """
        tick = float(pair.tick)
        last = self.factor * self.shift * _bar(pair, len(LEVELS), self.last_trade(pair)).close
        distance = max(1, round(last * self.half_spread / tick)) * (1 if side == "ask" else -1)
        middle = round(float(pair.price(last)) / tick)
        seed = _seeds(pair.id + side)[0]
        lot = 5_000 * UNITS / _base_price(pair.base)
        levels = {}
        for level in range(count):
            ticks = middle + distance * (level + first)
            if ticks > 0:
                change = (self.step + 7 * level) // BOOK_STEPS_PER_SECOND
                amount = int(lot * (1.1 + _noise(seed, change + level)))
                levels[pair.price(ticks * tick)] = _amount(amount)
        return levels

    def book(self, pair: Pair, depth: int, step: int) -> Book:
        moment = replace(self, now=step / BOOK_STEPS_PER_SECOND)
        return Book(step, *moment.sides(pair, depth))

    def trades(self, pair: Pair, numbers: Iterable[int]) -> list[Fields]:
        """Return trades. Of ten odd ones, one has no amount, one no price, and one comes twice."""
        rows = [self.trade(pair, number) for number in numbers]
        if not self.is_odd(pair, "odd_trades"):
            return rows
        # Real amounts and prices of 0: binance-public-data issues 342 and 353.
        zeros: dict[int, Fields] = {0: {"amount": "0"}, 1: {"price": "0"}}
        odd = [row | zeros.get(row["number"] % 10, {}) for row in rows]
        return [row for row in odd for _ in range(2 if row["number"] % 10 == 2 else 1)]

    def trade(self, pair: Pair, number: int) -> Fields:
        """Return one trade. Trades are numbered by time, see `periods`."""
        side = "buy" if _noise(_seeds(pair.id)[1], number) > 0 else "sell"
        row: Fields = {"side": side, "side_title": side.title(), "side_letter": side[0]}
        row["is_buyer_maker"] = "true" if side == "sell" else "false"
        ms = number * 500
        row |= {"number": number, "second": ms / 1000, "ms": ms, "iso": iso_time(ms)}
        trade = _bar(pair, len(LEVELS), number)
        price = pair.price(self.factor_of(pair) * trade.close)
        amount = _amount(trade.volume)
        cost = f"{float(price) * float(amount):.8f}"
        return row | {"price": price, "amount": amount, "cost": cost}

    def candle(self, pair: Pair, number: int, seconds: int) -> Fields:
        """Return one candle. The current candle closes at the current price."""
        start = number * seconds + self.offset(seconds)
        row = self.figures(pair, start, start + seconds)
        return row | {"second": start, "ms": start * 1000, "end": (start + seconds) * 1000 - 1}

    def offset(self, seconds: float) -> int:
        """Return the start of the first period of a length, in seconds since the epoch."""
        return self.week_offset if seconds == WEEK_SECONDS else 0

    def periods(self, seconds: float, count: int, start: Time = None, end: Time = None) -> range:
        """Return the numbers of up to `count` periods, counted from the epoch.

        They are the first ones that begin at or after `start`, or the latest ones without it.
        """
        offset = self.offset(seconds)
        last = int((min(self.now, end or self.now) - offset) // seconds)
        first = last - count + 1 if start is None else math.ceil((start - offset) / seconds)
        return range(first, min(last, first + count - 1) + 1)


def funding(market: Market, pair: Pair, number: int) -> Fields:
    """Return one funding of a swap. Fundings are numbered by time, see `periods`."""
    second = number * FUNDING_SECONDS
    rate = FUNDING_RATE * (1 + 0.5 * _noise(_seeds(pair.id)[2], number))
    trade = _bar(pair, len(LEVELS), int(second / TRADE_SECONDS))
    price = pair.price(market.factor_of(pair) * trade.close)
    return {"rate": f"{rate:.8f}", "ms": second * 1000, "mark": price}


def current_funding(market: Market, pair: Pair) -> Fields:
    """Return the expected rate of the next funding, and its time."""
    row = funding(market, pair, int(market.now // FUNDING_SECONDS))
    return {"rate": row["rate"], "next_ms": row["ms"] + FUNDING_SECONDS * 1000}


def positions(market: Market, pair: Pair, number: int, seconds: int) -> Fields:
    """Return who held how many contracts of a swap at the start of a period."""
    start = number * seconds
    noise = _noise(_seeds(pair.id)[3], start // LEVELS[-2])
    traded = market.figures(pair, start, start + seconds)
    units = int(_habits(pair)[1] * (1 + 0.1 * noise))
    value = units / UNITS * float(traded["open"])
    long = 0.5 + 0.2 * noise
    volume = float(traded["volume"])
    return {
        "ms": start * 1000,
        "interest": _amount(units),
        "interest_value": f"{value:.8f}",
        "long": f"{long:.4f}",
        "short": f"{1 - long:.4f}",
        "long_short": f"{long / (1 - long):.4f}",
        "bought": f"{volume * long:.4f}",
        "sold": f"{volume * (1 - long):.4f}",
    }
