"""Keeps cached candles up to date with pushed ones, so that a close costs no REST call.

A series is the cached answer of `/ohlcv` with the newest candles of a market. A pushed candle is
added to a series only if the final states of all candles before it are known. Otherwise the series
has a gap, and is fetched by REST.
"""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import orjson

from src.cache.entry import Entry, Freshness, Key
from src.core.models import TIMEFRAMES
from src.exchanges.profiles import PROFILES
from src.gateway import SERIES_SECONDS, Gateway
from src.kinds import series_freshness
from src.streams.topics import MarketDataEvent, Topic

MIN_REQUESTS = 2  # a series requested so often within `SERIES_SECONDS` is watched
MAX_SERIES = 100  # watched without subscribers: each message costs a merge of up to 1,000 candles
RENEWED_RATIO = 0.5  # a series of a live stream is renewed at this share of its TTL


class Requests(NamedTuple):
    """The requests for a series."""

    total: int = 0
    """All requests, at the last check."""
    recent: int = 0
    """Requests since there was none for `SERIES_SECONDS`."""
    last_at: float = 0.0
    """Monotonic seconds."""


class CandleKeeper:
    """Finds the series that clients request, and merges pushed candles into them."""

    def __init__(self, gateway: Gateway) -> None:
        self.gaps: set[Key] = set()
        self._gateway = gateway
        self._requests: dict[Key, Requests] = {}
        self._series: dict[Topic, list[Key]] = {}

    def find_requested(self) -> list[Topic]:
        """Return the topics of the series to watch, the most recently requested first."""
        self._count_requests()
        newest_first = sorted(self._requests, key=lambda key: -self._requests[key].last_at)
        self._series = defaultdict(list)
        for key in newest_first:
            self._series[self._topic_of(key)].append(key)
        requested = (
            topic
            for topic, keys in self._series.items()
            if sum(self._requests[key].recent for key in keys) >= MIN_REQUESTS
        )
        return list(requested)[:MAX_SERIES]

    def _topic_of(self, key: Key) -> Topic:
        foreign = self._gateway.foreign.get(key.kind)
        timeframe = foreign.timeframe_of(key) if foreign else str(key.params[0])
        return Topic(key.exchange, "ohlcv", key.symbol, timeframe)

    def _count_requests(self) -> None:
        now = self._gateway.clock.monotonic()
        loads = self._gateway.series
        for key in {*loads, *self._requests}:
            hits = self._gateway.cache.memory.request_count(key) or 0
            total = loads.get(key, 0) + hits
            seen = self._requests.get(key, Requests())
            if total > seen.total:
                self._requests[key] = Requests(total, seen.recent + total - seen.total, now)
            elif now - seen.last_at > SERIES_SECONDS:
                self._requests.pop(key, None)
                self.gaps.discard(key)
            else:  # lower if the cached answer has left
                self._requests[key] = seen._replace(total=total)

    def merge(self, event: MarketDataEvent, *, share: bool) -> None:
        """Add pushed candles to the series of their topic, or note the gaps."""
        pushed = orjson.loads(event.data)
        for key in self._series.get(event.topic, ()):
            if key.kind in self._gateway.foreign:
                self._gateway.foreign[key.kind].merge(key, event, pushed, share=share)
                continue
            entry = self._gateway.cache.memory.get(key)
            series = orjson.loads(entry.body) if entry else {}
            if not series or not merge(series, pushed, PROFILES[key.exchange].candle_page):
                self.gaps.add(key)
                continue
            self.gaps.discard(key)
            freshness = self._freshness(key, series["closed_until"])
            self._gateway.add_pushed(key, orjson.dumps(series), event.born, freshness, share=share)

    def renew(self, topic: Topic) -> None:
        """Keep the series of a live stream fresh until a close: no message means no change."""
        now = self._gateway.clock.monotonic()
        for key in self._series.get(topic, ()):
            entry = self._gateway.cache.memory.find_fresh(key)
            if entry is not None and entry.age(now) > entry.ttl * RENEWED_RATIO:
                self._renew(entry, now)

    def _renew(self, entry: Entry, now: float) -> None:
        foreign = self._gateway.foreign.get(entry.key.kind)
        if foreign is not None:
            ttl = foreign.seconds_left(entry)
        else:
            ttl = self._freshness(entry.key, entry.closed_until).ttl
        if ttl > 0:
            renewed = replace(entry, born=now, received=now, ttl=ttl, views={})
            self._gateway.cache.add(renewed, share=False)

    def _freshness(self, key: Key, closed_until: int) -> Freshness:
        now_ms = int(self._gateway.clock.time() * 1000)
        return series_freshness(key, closed_until, now_ms)


def merge(series: dict[str, Any], pushed: Mapping[str, Any], limit: int) -> bool:
    """Add pushed candles to a document of `/ohlcv`, which keeps the newest `limit` candles.

    Returns False if the final state of a candle in between is missing.
    """
    length = TIMEFRAMES[series["timeframe"]] * 1000
    rows: list[Any] = series["candles"]
    closed_until = series["closed_until"]
    for row in pushed["candles"]:
        if row[0] < closed_until:
            continue  # the final state is known
        if row[0] > closed_until:
            return False
        while rows and rows[-1][0] >= row[0]:
            rows.pop()
        rows.append(row)
        if row[0] < pushed["closed_until"]:
            closed_until = row[0] + length
    for name in ("requested_at", "server_time"):  # of the request before
        series.pop(name, None)
    series |= {name: pushed[name] for name in ("fetched_at", "timestamp") if name in pushed}
    series |= {"candles": rows[-limit:], "closed_until": closed_until}
    series |= {"source": "stream", "stale": series.pop("stale")}  # `stale` is the last member
    return True
