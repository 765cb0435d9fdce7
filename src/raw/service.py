"""Answers requests in an exchange's own wire format, from the cache that all endpoints share.

An answer is passed on byte for byte and never stale. Errors of the exchange that concern one
request are kept for `NEGATIVE_TTL_SECONDS`; all others are passed on once.
"""

import asyncio
import math
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakValueDictionary

import orjson
from yarl import URL

from src.cache.entry import FINAL_TTL_SECONDS, LARGE_BYTES, Entry, Freshness, Key, Served, etag_of
from src.core import metrics
from src.core.errors import CallerError, GatewayError
from src.core.models import TIMEFRAMES, closing_times
from src.exchanges.ccxt_client import CcxtClient, ccxt
from src.exchanges.http_client import Answer
from src.exchanges.manager import ExchangeCall, Fetched, keep
from src.gateway import Gateway
from src.kinds import grid_of
from src.raw.candles import is_series, merge
from src.raw.requests import KIND, RawRequest, parse
from src.raw.wire_api import number

UNKNOWN_LENGTH_SECONDS = 1.0  # TTL of candles whose closes are not known, such as months
UNPRINTABLE = re.compile(r"[^ -~]")
MAX_BODY_BYTES = 16 * 1024 * 1024  # the largest known list, Binance's, has 15 MB with descriptions
# The first state of a new candle is pushed within two seconds. Clients wait for half of it, so that
# their own timeouts are never reached.
NEXT_CANDLE_MS = 2_000
WAIT_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Reply:
    """An exchange's answer, as it was received."""

    status: int
    media_type: str
    body: bytes


class RawService:
    """Fetches and caches raw answers, and adds pushed candles to them."""

    def __init__(self, gateway: Gateway) -> None:
        self.gateway = gateway
        self._clock = gateway.clock
        self._settings = gateway.settings
        self._tasks: set[asyncio.Task[bytes]] = set()
        # Set when a series has its next candle. An event is kept while a request waits for it.
        self._changed: WeakValueDictionary[Key, asyncio.Event] = WeakValueDictionary()
        gateway.foreign[KIND] = self

    async def serve(self, request: RawRequest) -> Served:
        """Return the answer to a request.

        Raises `GatewayError`. If the exchange caused the error, its `reply` is what it sent.
        """
        served = await self._find(request)
        metrics.cache_requests_total.labels(served.result).inc()
        return served

    async def _find(self, request: RawRequest) -> Served:
        if not request.rules.is_cached:
            entry = await self._fetch(request)
            return Served.from_entry(entry, "miss", self._clock.monotonic())
        deadline = self._clock.monotonic() + self._settings.request_timeout
        key = request.key(self._symbol_of(request))
        if is_series(request):
            self.gateway.series[key] = self.gateway.series.get(key, 0) + 1
            await self._wait_for_stream(request, key)
        # With an age limit, the cache serves no value during its refresh.
        outcome = (await self.gateway.cache.get_many([key], deadline, math.inf))[key]
        if isinstance(outcome, GatewayError):
            raise outcome
        return outcome

    async def load(self, key: Key) -> Entry:
        """Load one answer for the cache."""
        return await self._fetch(_request_of(key))

    def timeframe_of(self, key: Key) -> str:
        """Return the length of the candles of a series."""
        return _request_of(key).timeframe or ""

    def merge(self, key: Key, event: Any, pushed: Mapping[str, Any], *, share: bool) -> None:
        """Add the candles of a stream's event to a series."""
        entry = self.gateway.cache.memory.get(key)
        merged = entry and merge(_request_of(key), entry, event.wire, pushed)
        if not entry or not merged:
            return
        body, closed_until, newest = merged
        series = entry.with_body(body)
        series.born = series.received = event.born
        series.nonce, series.data_time = closed_until, event.exchange_time or 0
        series.ttl = self._seconds_until_close(key, newest)
        self.gateway.cache.add(series, share=share)
        if series.ttl > 0:
            self._changed.pop(key, asyncio.Event()).set()

    def seconds_left(self, entry: Entry) -> float:
        """Return how long the series of a live stream stays fresh."""
        if not entry.data_time:
            return 0.0  # no stream has added to it
        return self._seconds_until_close(entry.key, entry.nonce)

    def _seconds_until_close(self, key: Key, start: int) -> float:
        """Return how long a series is fresh whose newest candle starts at `start` (UTC ms)."""
        end = start / 1000 + TIMEFRAMES[self.timeframe_of(key)]
        return min(end - self._clock.time(), self._settings.ohlcv_ttl_seconds)

    async def _wait_for_stream(self, request: RawRequest, key: Key) -> None:
        """Wait for the first state of the next candle, if a stream keeps a series."""
        entry = self.gateway.cache.memory.get(key)
        if not entry or not entry.data_time or entry.is_fresh(self._clock.monotonic()):
            return
        now_ms = int(self._clock.time() * 1000)
        grid = grid_of(key.exchange, str(request.timeframe))
        close = grid.floor(now_ms)
        if now_ms - close < NEXT_CANDLE_MS and entry.nonce >= close - grid.length:
            with suppress(TimeoutError):
                async with asyncio.timeout(WAIT_SECONDS):
                    await self._changed.setdefault(key, asyncio.Event()).wait()

    async def _fetch(self, request: RawRequest) -> Entry:
        """Request an answer within the budget and through the breaker."""
        replies: list[Reply] = []
        symbol = self._symbol_of(request)
        call = ExchangeCall(
            exchange=request.exchange,
            operation=request.operation,
            fetch=partial(self._request, request, replies),
            build=keep,
            symbol=symbol,
            fixed_weight=request.rules.weight_of(request.params),
            for_swap=request.is_swap,
            answer=Answer(max_bytes=MAX_BODY_BYTES),
        )
        started = self._clock.monotonic()
        try:
            fetched: Fetched[Reply] = await self.gateway.manager.call(call)
        except GatewayError as error:
            error.reply = replies[0] if replies else None
            if not replies or not isinstance(error, CallerError):
                raise
            received = self._clock.monotonic()
            fetched = Fetched(replies[0], started, received)
            freshness = Freshness(self._settings.negative_ttl_seconds, 0)
        else:
            freshness = self._freshness(request, fetched)
        reply = fetched.value
        times = (fetched.started, fetched.received)
        entry = Entry(request.key(symbol), reply.body, etag_of(reply.body), *times, freshness.ttl)
        entry.nonce = freshness.closed_until  # not final for as long as that of `/ohlcv`
        entry.status = reply.status
        entry.media_type = reply.media_type
        if len(entry.body) >= LARGE_BYTES:
            self._pack(entry)
        return entry

    def _pack(self, entry: Entry) -> None:
        """Pack a large body for clients that accept gzip, while the first client gets it plain."""
        task = asyncio.create_task(asyncio.to_thread(entry.pack))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _request(
        self, request: RawRequest, replies: list[Reply], client: CcxtClient
    ) -> Reply:
        """Send the request. No field of the client's header is sent.

        Raises an error of ccxt if the exchange answers with an error, so that the rules of the
        profile decide what it means. An unknown error is about this request only.
        """
        rest_url = self._settings.exchanges[request.exchange].rest_url
        url = URL(request.url(rest_url), encoded=True)
        async with client.session.get(url, proxy=client.aiohttp_proxy) as response:
            body = await response.read()
            media_type = response.headers.get("Content-Type", "application/json")
        reply = Reply(response.status, UNPRINTABLE.sub("?", media_type), body)
        replies.append(reply)
        if 400 <= reply.status < 500 or request.api.error.match(body):
            raise ccxt.BadRequest
        return reply

    def _symbol_of(self, request: RawRequest) -> str:
        """Return the symbol of the request's market, or its id if no symbol is known."""
        by_id = self.gateway.manager[request.exchange].client.markets_by_id or {}
        markets: list[Any] = by_id.get(request.market_id, [])
        matching = (market for market in markets if bool(market.get("swap")) == request.is_swap)
        market = next(matching, None)
        return str(market["symbol"]) if market else request.market_id

    def _freshness(self, request: RawRequest, fetched: Fetched[Reply]) -> Freshness:
        """Return how long an answer is fresh. Candles expire at their close."""
        rules = request.rules
        if not rules.kind:
            return Freshness(rules.ttl, 0)
        ttl: float = getattr(self._settings, f"{rules.kind}_ttl_seconds")
        if rules.kind != "ohlcv":
            return Freshness(ttl, 0)
        return _candle_freshness(request, fetched, ttl)


def _candle_freshness(request: RawRequest, fetched: Fetched[Reply], ttl: float) -> Freshness:
    """Expire candles when the newest one closes, and those of the past after a day."""
    api = request.api
    if request.timeframe is None:
        return Freshness(min(ttl, UNKNOWN_LENGTH_SECONDS), 0)
    try:
        rows = api.candle_rows(orjson.loads(fetched.value.body))
        newest = int(rows[-1][0]) * api.candle_unit if rows else 0
    except (ValueError, TypeError, LookupError):
        return Freshness(0.0, 0)
    requested_ms = int(fetched.requested_at * 1000)
    grid = grid_of(request.exchange, request.timeframe)
    closed_until, changes_at = closing_times(newest, requested_ms, grid)
    if api.candle_names is not None:
        start, end, default_limit, _ = api.candle_names
        is_past = 0 < number(request.params, end, 0) < closed_until
        is_full = len(rows) >= number(request.params, "limit", default_limit)
        if is_past or (start in request.params and is_full and newest < closed_until):
            return Freshness(FINAL_TTL_SECONDS, 0)
    closes_at = grid.floor(requested_ms) + grid.length
    return Freshness(min(ttl, (min(changes_at, closes_at) - requested_ms) / 1000), closed_until)


def _request_of(key: Key) -> RawRequest:
    path, query = key.params
    return parse(key.exchange, str(path), str(query))
