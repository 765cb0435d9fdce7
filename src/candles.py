"""Candles of a range of time, put together from the newest candles and from pages of older ones.

The newest candles of a market are one entry of the cache. Older ones are entries of their own, one
for each page of an exchange's call, so that overlapping ranges share calls. All times are UTC
milliseconds.
"""

from datetime import UTC, datetime
from typing import Any, NamedTuple

import orjson

from src.cache.entry import FINAL_TTL_SECONDS, Key, Served, etag_of
from src.core import metrics
from src.core.errors import GatewayError, InvalidParameter
from src.core.models import MAX_INTEGER, TIMEFRAMES, Grid
from src.exchanges.profiles import PROFILES
from src.gateway import Attempts, Gateway
from src.kinds import MIN_SINCE_MS, grid_of

MAX_ROWS = 5_000  # of one answer, which then has about 350 KB
# Entries of one request: MAX_ROWS of every exchange, and a few pages that are empty.
MAX_PAGES = 10
SPARE_ROWS = 2  # candles that may close between the choice of the entries and their load


class CandleRange(NamedTuple):
    """The candles that a client wants: those with since <= start < until, at most `limit`."""

    timeframe: str
    since: int
    until: int | None
    limit: int
    closed: bool

    @property
    def length(self) -> int:
        """Return the length of a candle."""
        return TIMEFRAMES[self.timeframe] * 1000

    def check(self, now: int) -> None:
        """Raise `InvalidParameter` if the range cannot be meant."""
        for name, value in (("since", self.since), ("until", self.until)):
            if value is not None and 0 < value < MIN_SINCE_MS:
                text = f"{name}={value} looks like seconds; expected UTC milliseconds"
                raise InvalidParameter(text)
            if value is not None and value > now + (self.length if name == "until" else 0):
                text = f"{name}={value} is in the future; expected UTC milliseconds up to now"
                raise InvalidParameter(text)
        if self.until is None:
            return
        if self.until <= self.since:
            text = f"until={self.until} is not after since={self.since}; `until` is excluded"
            raise InvalidParameter(text)
        rows = min(-(-(self.until - self.since) // self.length), self.limit)
        if rows > MAX_ROWS:
            split = self.since + MAX_ROWS * self.length
            text = f"the range has {rows} candles, and an answer at most {MAX_ROWS}; split it,"
            raise InvalidParameter(f"{text} first with until={split}, then with since={split}")


class ExchangeRange:
    """A range on one exchange: which entries have it, and the rows that were found so far."""

    def __init__(self, key: Key, wanted: CandleRange, now: int) -> None:
        """`key` names the newest candles of the market."""
        profile = PROFILES[key.exchange]
        self.key = key
        self.wanted = wanted
        self.grid = grid_of(key.exchange, wanted.timeframe)
        self.newest = self.grid.floor(now)
        self.since = self.grid.ceil(wanted.since)
        self.page_rows = profile.candle_page
        rows = profile.max_candles_back or profile.candle_page - SPARE_ROWS
        # The newest candles answer for the time from here on.
        self.recent_from = self.newest - (rows - 1) * self.grid.length
        self.earliest = self.recent_from if profile.max_candles_back else 0
        self.has_older = False
        self._rows: list[list[float]] = []
        self._answers: list[Served] = []
        self._document: dict[str, Any] = {"closed_until": 0}

    def page(self, start: int) -> tuple[Key, int]:
        """Return the key and the end of the entry with the candle that starts at `start`."""
        if start >= self.recent_from:
            return self.key, MAX_INTEGER
        length = self.page_rows * self.grid.length
        first = Grid(length, self.grid.offset).floor(start)
        first = first if first > MIN_SINCE_MS else 0  # there was no market before
        return self.key._replace(params=(self.wanted.timeframe, first)), first + length

    def final_until(self, start: int, end: int) -> int | None:
        """Return until when an entry has to be final to have the rows from `start` to `end`."""
        missing = self.wanted.limit - len(self.selected())
        needed = self.wanted.until or start + missing * self.grid.length
        needed = min(end, self.grid.ceil(needed))
        return needed if needed <= self.newest else None

    def add(self, served: Served, start: int, end: int) -> int:
        """Add the rows of an entry from `start` to `end`. Return where the next rows start."""
        document = orjson.loads(served.body)
        rows = document["candles"]
        following = document.pop("next_candle", None)
        if not self._answers:
            is_full = end == MAX_INTEGER and len(rows) >= self.page_rows
            self.has_older = is_full or any(row[0] < start for row in rows)
        self._answers.append(served)
        if served.ttl < 0 and served.result.startswith("hit"):  # only its final part is used
            end = min(end, document["closed_until"])
        stop = min(end, self.wanted.until or end)
        self._rows += [row for row in rows if start <= row[0] < stop]
        final_until = self._document["closed_until"]
        if 0 < final_until < start:  # where a page is not final, nothing after is
            document["closed_until"] = final_until
        self._document = document
        return max(end, self.grid.floor(following or end))

    def selected(self) -> list[list[float]]:
        """Return the rows of the answer so far."""
        end = self._document["closed_until"] if self.wanted.closed else MAX_INTEGER
        return [row for row in self._rows if row[0] < end][: self.wanted.limit]

    def is_complete(self, start: int) -> bool:
        """Return True if no rows from `start` on are wanted."""
        is_full = len(self.selected()) >= self.wanted.limit
        return is_full or start >= (self.wanted.until or MAX_INTEGER)

    @property
    def starts_late(self) -> bool:
        """True if the first row is late, and nothing shows that the exchange has older ones."""
        first = self._rows[0][0] if self._rows else self.since
        return first > self.since + self.grid.length and not self.has_older

    def served(self) -> Served:
        """Return the answer: as old as its oldest part, fresh while all parts are."""
        rows = self.selected()
        document = self._document
        end = self.wanted.until
        if end is None and len(rows) >= self.wanted.limit:
            end = int(rows[-1][0]) + self.grid.length
        is_final = end is not None and end <= document["closed_until"] and not document["stale"]
        age = max(answer.age for answer in self._answers)
        ttl = FINAL_TTL_SECONDS - age if is_final else min(answer.ttl for answer in self._answers)
        results = [answer.result for answer in self._answers]
        result = next((result for result in results if result != "hit_memory"), results[0])
        status = {name: document.pop(name) for name in ("source", "stale")}
        document |= {"earliest": int(self._rows[0][0])} if self.starts_late else {}
        body = orjson.dumps(document | {"candles": rows} | status)
        return Served(body, etag_of(body), age, ttl, result)


async def serve_range(
    gateway: Gateway, symbol: str, exchange: str | None, max_age: float | None, wanted: CandleRange
) -> Served:
    """Answer from the first exchange that has the range and can answer.

    Raises `InvalidParameter` if no exchange has candles that old, and other `GatewayError`s.
    """
    now = int(gateway.clock.time() * 1000)
    wanted.check(now)
    await gateway.look_for_new_markets([symbol], exchange)
    keys = gateway.find_keys("ohlcv", symbol, exchange, (wanted.timeframe, 1, False))
    everywhere = [ExchangeRange(key, wanted, now) for key in keys]
    ranges = {part.key: part for part in everywhere if part.since >= part.earliest}
    if not ranges:
        raise _too_old(everywhere)
    # A stale entry of the newest candles can answer these.
    recent = [key for key, part in ranges.items() if part.since >= part.recent_from]
    deadline = gateway.clock.monotonic() + gateway.settings.request_timeout
    attempts: Attempts = {}
    while len(attempts) < len(ranges) and gateway.clock.monotonic() < deadline:
        left = [key for key in ranges if key not in attempts]
        key = gateway.choose(left, max_age)
        now_seconds = gateway.clock.monotonic()
        share = (deadline - now_seconds) / len(left)
        if gateway.find_stale(recent, max_age):
            share = min(share, gateway.settings.stale_wait_seconds)
        try:
            await _collect(gateway, ranges[key], now_seconds + share, max_age)
            if mismatch := gateway.last_prices.compare(key, keys):
                raise mismatch
        except GatewayError as error:
            attempts[key] = error
            continue
        served = ranges[key].served()
        metrics.cache_requests_total.labels(served.result).inc()
        return served
    outcome = gateway.stale_or_error(recent, attempts, max_age)
    if isinstance(outcome, GatewayError):
        raise outcome
    exchange = orjson.loads(outcome.body)["exchange"]
    stale = next(ExchangeRange(key, wanted, now) for key in recent if key.exchange == exchange)
    stale.add(outcome, stale.since, MAX_INTEGER)
    return stale.served()


async def _collect(
    gateway: Gateway, part: ExchangeRange, deadline: float, max_age: float | None
) -> None:
    """Load the entries of a range, one after the other. Raises `GatewayError`."""

    async def load(key: Key, final_until: int | None) -> Served:
        outcomes = await gateway.cache.get_many([key], deadline, max_age, final_until)
        outcome = outcomes[key]
        if isinstance(outcome, GatewayError):
            raise outcome
        is_growing = key == part.key and final_until is None
        if is_growing and outcome.result != "hit_memory":  # the entry counts its hits
            gateway.series[key] = gateway.series.get(key, 0) + 1
        return outcome

    first = start = part.since
    for _ in range(MAX_PAGES):
        key, end = part.page(start)
        start = part.add(await load(key, part.final_until(start, end)), start, end)
        if part.is_complete(start):
            break
    page, _ = part.page(first)
    if part.starts_late and page != part.key and page.params[1]:
        earlier, end = part.page(int(page.params[1]) - 1)
        part.has_older = bool(orjson.loads((await load(earlier, end)).body)["candles"])


def _too_old(ranges: list[ExchangeRange]) -> InvalidParameter:
    """Return the error that no exchange has candles from the beginning of a range."""
    best = min(ranges, key=lambda part: part.earliest)
    exchange = best.key.exchange
    rows = PROFILES[exchange].max_candles_back
    moment = datetime.fromtimestamp(best.earliest / 1000, UTC).isoformat()
    text = f"{exchange} has only the last {rows} candles of {best.wanted.timeframe}, from"
    advice = "use a later since, a longer timeframe or another exchange"
    return InvalidParameter(
        f"{text} {best.earliest} ({moment}) on; {advice}",
        exchange=exchange,
        symbol=best.key.symbol,
        earliest=best.earliest,
    )
