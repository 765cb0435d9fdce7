"""The one market under all simulated exchanges: every number is a pure function of the symbol and the time."""

import math
import re
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any, Self
from zlib import crc32

Row = dict[str, Any]
Time = float | None
DAY = 86_400
STEPS = 10  # a second: how often books change
PRICE_LIST = """
BTC 97000 ETH 3400 SOL 190 XRP 2.4 ADA 0.85 DOGE 0.33 LTC 105 LINK 21 AVAX 36 DOT 6.8 BCH 440 XLM 0.38 ATOM 6.4 UNI 12.5
ETC 25 TRX 0.24 AAVE 310 ALGO 0.33 FIL 5 NEAR 5.1 BNB 650 APT 9 ARB 0.72 OP 1.7 INJ 22 SUI 4.2 TON 5.4 XTZ 1.2
SHIB 0.000022 PEPE 0.0000178 MNT 1.1 XMR 195 EUR 1.08 USDC 0.9998 USDT 1 USD 1
"""
PRICES = {coin: float(price) for coin, price in re.findall(r"(\S+) (\S+)", PRICE_LIST)}
CALMER = {"EUR": 0.1, "USDC": 0.001, "USDT": 0.0, "USD": 0.0}
# Each lattice wobbles as a random walk does over its period, so that every timeframe looks like a market.
OCTAVES = [(2 * 16**n, 1e-4 * math.sqrt(2 * 16**n)) for n in range(6)]


@lru_cache(maxsize=65_536)
def _lattice(seed: int, index: int) -> float:
    """Return fixed noise between -1 and 1."""
    # A checksum alone is linear, which would let all symbols move alike; the multiplication breaks that.
    return (crc32(b"%d" % index, seed) * 0x9E3779B1 & 0xFFFFFFFF) / 2**31 - 1


@lru_cache(maxsize=8_192)
def _seeds(name: str) -> list[int]:
    return [crc32(f"{name}:{octave}".encode()) for octave in range(len(OCTAVES))]


@lru_cache(maxsize=8_192)
def _base_price(asset: str) -> float:
    return PRICES.get(asset) or 10 ** (2 * _lattice(_seeds(asset)[0], 0))


@lru_cache(maxsize=65_536)
def _usd(asset: str, at: float) -> float:
    """Return what the asset costs in dollars at that time."""
    calm = CALMER.get(asset, 1.0)
    if not calm:
        return _base_price(asset)
    walk = 0.0
    for seed, (period, amplitude) in zip(_seeds(asset), OCTAVES, strict=True):
        index = int(at // period)
        part = at / period - index
        left, right = _lattice(seed, index), _lattice(seed, index + 1)
        walk += amplitude * (left + (right - left) * part * part * (3 - 2 * part))
    return _base_price(asset) * math.exp(calm * walk)


@dataclass(frozen=True)
class Pair:
    """One listed market, with the digits its prices and amounts have."""

    base: str
    quote: str
    swap: bool = False

    @property
    def id(self) -> str:
        return self.base + self.quote

    @cached_property
    def price_digits(self) -> int:
        """Give every price about five significant digits."""
        magnitude = math.floor(math.log10(_base_price(self.base) / _base_price(self.quote)))
        return max(1, min(8, 4 - magnitude))

    @property
    def tick(self) -> str:
        return self.price(10**-self.price_digits)

    def price(self, value: float) -> str:
        return f"{value:.{self.price_digits}f}"


@dataclass(frozen=True)
class Market:
    """The market as one exchange sees it at one moment."""

    now: float
    factor: float = 1.0
    half_spread: float = 0.0001

    @property
    def step(self) -> int:
        """Return the number of the step of time in which books change, for sockets and REST alike."""
        return int(self.now * STEPS)

    @property
    def ms(self) -> int:
        return round(self.now * 1000)

    def at(self, step: int) -> Self:
        return replace(self, now=step / STEPS)

    def price(self, pair: Pair, at: float) -> float:
        return self.factor * _usd(pair.base, at) / _usd(pair.quote, at)

    def volume(self, pair: Pair, index: int) -> float:
        """Return the base volume of one second."""
        seed = _seeds(pair.base)[0]
        dollars = 10 ** (7.5 + 1.5 * _lattice(seed, 0)) * (1 + 0.5 * _lattice(seed, index))
        return dollars / DAY / _base_price(pair.base)

    def day(self, pair: Pair) -> Row:
        """Return what all tickers say about now and the last 24 hours."""
        times = [self.now - DAY, *range(int(self.now // 7_200 - 11) * 7_200, int(self.now) + 1, 7_200), self.now]
        points = [self.price(pair, at) for at in times]
        opened, last, volume = points[0], points[-1], self.volume(pair, int(self.now // 60)) * DAY
        prices = {"last": last, "open": opened, "high": max(points), "low": min(points), "average": (last + opened) / 2}
        day: Row = {name: pair.price(value) for name, value in prices.items()}
        for side in ("bid", "ask"):
            best = next(iter(self.book(pair, side, 1)), {"price": pair.tick, "amount": 0})
            day |= {side: best["price"], f"{side}_size": best["amount"]}
        return day | {"volume": volume, "turnover": volume * prices["average"], "change": last / opened - 1}

    def book(self, pair: Pair, side: str, count: int) -> list[Row]:
        """Return the best levels of one side, in whole ticks, steady for a second."""
        tick, last = float(pair.tick), self.price(pair, self.now)
        seed, second, lots = _seeds(pair.id + side)[0], int(self.now), 5_000 / _base_price(pair.base)
        best, step = round(last / tick), max(1, round(last * self.half_spread / tick))
        prices = (best + (step if side == "ask" else -step) * level for level in range(1, count + 1))
        return [
            {"price": pair.price(price * tick), "amount": lots * (1.1 + _lattice(seed, second + level))}
            for level, price in enumerate(prices)
            if price > 0
        ]

    def trades(self, pair: Pair, count: int, start: Time = None, end: Time = None) -> list[Row]:
        """Return trades in the order of time, two per second: the first ones from a start, else the latest."""
        last = math.floor(min(self.now, end or self.now) * 2)
        first = last - count + 1 if start is None else math.ceil(start * 2)
        return [self.trade(pair, number) for number in range(first, min(last, first + count - 1) + 1)]

    def trade(self, pair: Pair, number: int) -> Row:
        noise = _lattice(_seeds(pair.id)[1], number)
        trade: Row = {"number": number, "second": number / 2, "ms": number * 500, "ns": number * 500_000_000}
        buy = {"side": "Buy", "letter": "b", "maker": "false"}
        trade |= buy if noise > 0 else {"side": "Sell", "letter": "s", "maker": "true"}
        amount = 800 / _base_price(pair.base) * (1.01 + noise)
        return trade | {"price": pair.price(self.price(pair, number / 2)), "amount": amount}

    def candles(self, pair: Pair, seconds: int, count: int, start: Time = None, end: Time = None) -> list[Row]:
        """Return candles in the order of time: the first ones from a start, else the latest."""
        last = int(min(self.now, end or self.now) // seconds) * seconds
        first = last - (count - 1) * seconds if start is None else math.ceil(start / seconds) * seconds
        starts = range(first, min(last, first + (count - 1) * seconds) + 1, seconds)
        return [self.candle(pair, begin, seconds) for begin in starts]

    def candle(self, pair: Pair, start: int, seconds: int) -> Row:
        """Return one candle; the running one closes at the price of now."""
        end = min(start + seconds, self.now)
        marks = (start, start + seconds / 3, start + seconds * 2 / 3)
        points = [self.price(pair, mark) for mark in (*(mark for mark in marks if mark <= end), end)]
        ends = {"open": points[0], "high": max(points), "low": min(points), "close": points[-1]}
        volume = self.volume(pair, start // 60) * max(end - start, 0.001)
        times = {"second": start, "ms": start * 1000, "end": (start + seconds) * 1000 - 1}
        return {name: pair.price(value) for name, value in ends.items()} | times | {"volume": volume}
