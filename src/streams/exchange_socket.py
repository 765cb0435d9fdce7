"""One socket of one exchange, kept: what is subscribed to, whether it still comes, and when to try again.

A socket that answers pings may push nothing all the same. So each symbol has a pace of its own, learnt from what came,
and is silent when nothing has come for much longer than that.
"""

import asyncio
import logging
import random
from collections.abc import Callable
from typing import Any

import aiohttp

from config import Settings
from src.core import metrics
from src.core.background import report_error
from src.core.clock import Clock
from src.core.errors import ExchangeRateLimited, GatewayError, GeoBlocked
from src.exchanges.ccxt_sockets import CcxtSockets
from src.exchanges.manager import HOLDS, ExchangeManager
from src.streams.feed import NAMES

log = logging.getLogger(__name__)

LOOK_SECONDS = 0.25  # how often it is looked whether anything is silent or due
BATCH = 50  # symbols in one message; kraken and bybit take more, binance takes five messages a second
PAUSE_SECONDS = 0.25  # between two messages to an exchange
SILENT_PACES = 10  # a symbol is silent when nothing came for so many times its pace, within these bounds
PACE_DECAY = 0.2  # seconds a symbol's pace shrinks in each second
SILENT_SECONDS = (5.0, 600.0)
FIRST_SECONDS = 15.0  # for the first message after subscribing; doubled each time while a symbol's pace is not known
RETRY_SECONDS = (0.5, 30.0)  # first and longest pause before the next try; doubled each time, and spread by half
GRACE_SECONDS = 3.0  # for a socket to be there again before anybody is told; binance closes each once a day
STEADY_SECONDS = 30.0  # what stays open so long begins with the first pause again
MAX_DOUBLINGS = 8  # more would change nothing


class Liveness:
    """What is known of one watched symbol; times are monotonic seconds."""

    __slots__ = ("asked_at", "last", "messages", "pace", "retry_at", "since", "times", "tries")

    def __init__(self, now: float) -> None:
        self.since = now
        self.asked_at: float | None = None  # None: not subscribed to, here and now
        self.times = 0  # how often it was subscribed to
        self.last: float | None = None  # when something came; None: never yet
        self.messages = 0
        self.pace: float | None = None  # the longest seconds between two messages, of late
        self.tries, self.retry_at = 0, 0.0  # in vain, since something came

    @property
    def patience(self) -> float:
        """Seconds without a message after which one is missed."""
        least, most = SILENT_SECONDS
        if self.pace is None:
            return min(FIRST_SECONDS * 2.0**self.tries, most)
        return min(max(SILENT_PACES * self.pace, least), most)

    def came(self, now: float) -> None:
        """Learn from a message.

        Messages may come in bursts: what counts is the longest gap, less and less as time goes by. One that was longer
        than expected may have been an outage: the pace doubles, and is found out again if it was not.
        """
        if self.last is not None:
            gap, pace, (least, most) = now - self.last, self.pace, SILENT_SECONDS
            if gap > self.patience:
                gap = self.patience if pace is None else 2 * max(pace, least / SILENT_PACES)
            self.pace = min(gap if pace is None else max(gap, pace - PACE_DECAY * gap), most / SILENT_PACES)
        self.last, self.tries, self.messages = now, 0, self.messages + 1

    def is_silent(self, now: float) -> bool:
        """Whether something should have come by now over this socket."""
        if self.asked_at is None:
            return False
        if self.last is None or self.last < self.asked_at:
            return now - self.asked_at > max(self.patience, FIRST_SECONDS)
        return now - self.last > self.patience

    def is_overdue(self, now: float) -> bool:
        """Whether something should have come by now, over whatever socket."""
        return now - (self.since if self.last is None else self.last) > self.patience

    def tried(self) -> None:
        """Learn that it was subscribed to in vain."""
        self.tries = min(self.tries + 1, MAX_DOUBLINGS)


class ExchangeSocket:
    """Keeps the subscriptions of one socket: those of an exchange, for one kind of data and type of market.

    `hear` is called for every message, and returns whether it was any good.
    """

    def __init__(
        self,
        exchange: str,
        kind: str,
        manager: ExchangeManager,
        session: aiohttp.ClientSession,
        settings: Settings,
        clock: Clock,
        hear: Callable[[str, str, str, Any, bool], bool],
    ) -> None:
        self.exchange, self.kind = exchange, kind
        self.watched: dict[str, Liveness] = {}
        self.cause: str | None = None  # of the last loss; None while all is well
        self.lost_at = 0.0  # when all was well last
        self.retry_at = 0.0
        self.reconnects = 0
        self._manager = manager
        self._clock = clock
        self._hear = hear
        self._sockets = CcxtSockets(exchange, kind, settings, session, self)
        self._ended: set[str] = set()  # subscribed to, and not wanted any more
        self._failures = 0
        self._is_open, self._opened_at, self._heard_at = False, 0.0, 0.0

    @property
    def sockets(self) -> int:
        """Sockets that are open: one, or none."""
        return self._sockets.count

    @property
    def trouble(self) -> str | None:
        """Why nothing is pushed: what the exchange told us, or how the socket was lost; None while all is well."""
        if not self.watched:
            return None
        return self.cause if self._is_open or self._is_welcome() else self._manager[self.exchange].breaker.cause

    def is_lost(self) -> bool:
        """Whether the socket has been gone for longer than it takes to be back."""
        return self.cause is not None and self._clock.monotonic() - self.lost_at > GRACE_SECONDS

    def is_barred(self) -> bool:
        """Whether nothing can be had from here: it is lost, or the exchange told us to stay away."""
        return self.is_lost() or not (self._is_open or self._is_welcome())

    def watch(self, symbol: str, watch: Liveness) -> None:
        """Begin to watch a symbol; what becomes known of it is kept in `watch`."""
        self._ended.discard(symbol)
        self.watched.setdefault(symbol, watch)

    def unwatch(self, symbol: str) -> None:
        """Watch a symbol no more."""
        watch = self.watched.pop(symbol, None)
        if watch is not None and watch.asked_at is not None:
            watch.asked_at = None
            self._ended.add(symbol)

    async def close(self) -> None:
        """Close the socket."""
        await self._sockets.close()

    async def look(self) -> None:
        """Do what is due; to be called every `LOOK_SECONDS`."""
        if not self.watched:
            if self._clock.monotonic() > self.retry_at + RETRY_SECONDS[1]:
                self.cause, self._failures = None, 0  # not before: replicas would take turns without a pause
            if self._is_open:
                self._is_open, self._ended = False, set()
                self._sockets.drop()
        if self._may_connect():
            await self._unsubscribe()
            self._judge(self._clock.monotonic())
            await self._subscribe()

    async def _unsubscribe(self) -> None:
        if self._ended:
            self._sockets.unsubscribe(self._ended)
            self._ended = set()
            await asyncio.sleep(PAUSE_SECONDS)

    def _judge(self, now: float) -> None:
        """Open the socket anew when nothing comes over it; if only some symbols are silent, subscribe to them again."""
        silent = [symbol for symbol, watch in self.watched.items() if watch.is_silent(now)]
        quiet = now - max(self._heard_at, self._opened_at)
        is_dead = any(quiet > self.watched[symbol].patience for symbol in silent)
        for symbol in silent:
            if is_dead:
                self.watched[symbol].tried()
            else:
                self.refused(symbol)
        if is_dead:
            self.lost("silent", None)

    async def _subscribe(self) -> None:
        while self._may_connect() and (batch := self._due()):
            self._sockets.use(self._manager[self.exchange].client, self._snapshot)
            now = self._clock.monotonic()
            for symbol in batch:
                self.watched[symbol].asked_at = now
                self.watched[symbol].times += 1
            if not self._is_open:
                self._is_open, self._opened_at = True, now
            self._sockets.subscribe(batch)
            await asyncio.sleep(PAUSE_SECONDS)

    def _due(self) -> list[str]:
        now, find = self._clock.monotonic(), self._manager.markets.find
        due = [symbol for symbol, it in self.watched.items() if it.asked_at is None and it.retry_at <= now]
        return [symbol for symbol in due if find(self.exchange, symbol) is not None][:BATCH]

    def _may_connect(self) -> bool:
        """Whether it is time, and the exchange has not told us to stay away."""
        return self._is_welcome() and self._clock.monotonic() >= self.retry_at

    def _is_welcome(self) -> bool:
        breaker = self._manager[self.exchange].breaker
        return breaker.state != "open" or breaker.cause not in (*HOLDS, GeoBlocked.cause)

    async def _snapshot(self, symbol: str, limit: int | None = None, _: Any = None) -> Any:
        return await self._manager.raw_order_book(self.exchange, symbol, limit or 100)

    def heard(self, symbol: str, value: Any, *, steady: bool) -> None:
        """Take what came of one symbol; what is not `steady` is no sign that the rest of it still comes."""
        watch = self.watched.get(symbol)
        if watch is None or watch.asked_at is None:
            return
        try:
            if not self._hear(self.exchange, self.kind, symbol, value, steady):
                return
        except Exception as error:  # noqa: BLE001 - reported
            report_error("delivery", error)
            steady = False  # the exchange pushes, so the socket stays; subscribers get nothing, so the symbol is stale
        self._heard_at = now = self._clock.monotonic()
        if steady:
            watch.came(now)
        self.cause = None
        if now - self._opened_at > STEADY_SECONDS:
            self._failures = 0

    def lost(self, cause: str, refusal: GatewayError | None) -> None:
        """Begin anew after a pause that grows; what is open still is closed."""
        if not self._is_open:
            return
        self._is_open, self._ended = False, set()
        self._sockets.drop()
        for watch in self.watched.values():
            watch.asked_at = None
        now, pause = self._clock.monotonic(), _pause(self._failures)
        self.retry_at = now + pause
        self.lost_at = self.lost_at if self.cause else now
        self._failures, self.cause = min(self._failures + 1, MAX_DOUBLINGS), cause
        self.reconnects += 1
        metrics.stream_reconnects_total.labels(self.exchange, cause).inc()
        fields = {"exchange": self.exchange, "channel": NAMES[self.kind], "cause": cause, "retry_in": round(pause, 1)}
        log.log(logging.INFO if cause == "closed" else logging.WARNING, "stream lost", extra=fields)
        if isinstance(refusal, GeoBlocked | ExchangeRateLimited):
            self._manager.keep_away(self.exchange, refusal)

    def refused(self, symbol: str) -> None:
        """Subscribe to a symbol again, not before its time."""
        watch = self.watched.get(symbol)
        if watch is not None and watch.asked_at is not None and self._is_open:
            watch.asked_at = None
            watch.retry_at = self._clock.monotonic() + _pause(watch.tries)
            watch.tried()
            self._ended.add(symbol)


def _pause(failures: int) -> float:
    first, longest = RETRY_SECONDS
    return min(first * 2.0**failures, longest) * random.uniform(0.5, 1.0)  # noqa: S311 - no secret
