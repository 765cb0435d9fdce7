"""Our WebSocket connection to an exchange: subscriptions, silence, reconnects and refusals."""

import asyncio
import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import aiohttp

from src.core import metrics
from src.core.background import report_error
from src.core.errors import ExchangeRateLimited, GatewayError, GeoBlocked
from src.exchanges.ccxt_sockets import CcxtSockets
from src.exchanges.profiles import PROFILES
from src.gateway import Gateway
from src.streams.dialer import Dialer
from src.streams.liveness import Liveness
from src.streams.subscriptions import Subscriptions, retry_pause
from src.streams.topics import CHANNEL_BY_KIND, SocketKey, Topic

log = logging.getLogger(__name__)

CHECK_SECONDS = 0.25  # between two checks for silent symbols and due subscriptions
GRACE_SECONDS = 3.0  # to reconnect before clients are told; binance closes each socket once a day
FORGET_SECONDS = 30.0  # until failures of an unused socket are forgotten
STEADY_SECONDS = 30.0  # a socket open for this long starts again with the initial retry pause

Receive = Callable[[Topic, Any, bool], bool]


class ExchangeSocket:
    """Maintains the subscriptions of one socket: one exchange, kind of data and type of market.

    `receive(topic, raw, steady)` is called for every message, and returns True if the message is
    valid.
    """

    def __init__(
        self,
        key: SocketKey,
        gateway: Gateway,
        session: aiohttp.ClientSession,
        dialer: Dialer,
        receive: Receive,
    ) -> None:
        self.exchange = key.exchange
        self.channel = CHANNEL_BY_KIND[key.kind]
        self._timeframe = key.timeframe
        self.lost_cause: str | None = None  # cause of the last loss; None since the last message
        self.lost_at = 0.0
        self.retry_at = 0.0
        self.reconnects = 0
        market_type = "swap" if key.swaps else "spot"
        self._subscriptions = Subscriptions(PROFILES[key.exchange], key.kind, market_type)
        self.watched = self._subscriptions.watched
        self._manager = gateway.manager
        self._clock = gateway.clock
        self._receive = receive
        self._dialer = dialer
        attempt = dialer.record_attempt
        self._sockets = CcxtSockets(
            key.exchange, key.kind, key.timeframe, gateway.settings, session, self, attempt
        )
        self._failures = 0
        self._is_open = False
        self._opened_at = 0.0
        self._received_at = 0.0

    @property
    def open_count(self) -> int:
        """Return the number of open sockets, 0 or 1."""
        return self._sockets.count

    @property
    def outage_cause(self) -> str | None:
        """Return why nothing is pushed: a refusal or a lost socket. None if all is well."""
        if not self.watched:
            return None
        if self._is_open or not self._manager.is_refused(self.exchange):
            return self.lost_cause
        return self._manager[self.exchange].breaker.cause

    def is_lost(self) -> bool:
        """Return True if the socket was lost and has not reconnected within `GRACE_SECONDS`."""
        is_overdue = self._clock.monotonic() - self.lost_at > GRACE_SECONDS
        return self.lost_cause is not None and is_overdue

    def is_unreachable(self) -> bool:
        """Return True if the socket is down or the exchange refuses connections."""
        return self.is_lost() or not (self._is_open or not self._manager.is_refused(self.exchange))

    def watch(self, symbol: str, liveness: Liveness) -> None:
        """Subscribe to a symbol. Message times are recorded in `liveness`.

        A pending unsubscription is sent first: exchanges refuse a topic that is subscribed twice.
        """
        self.watched.setdefault(symbol, liveness)

    def unwatch(self, symbol: str) -> None:
        """Unsubscribe from a symbol."""
        self._subscriptions.remove(symbol)

    async def close(self) -> None:
        """Close the socket."""
        await self._sockets.close()

    async def check(self) -> None:
        """Subscribe, unsubscribe and reconnect as needed. Call this every `CHECK_SECONDS`."""
        if not self.watched:
            self._close_unused()
        if self._can_send():
            await self._send_unsubscriptions()
            self._check_silence(self._clock.monotonic())
            await self._send_subscriptions()

    def _close_unused(self) -> None:
        # If failures were forgotten earlier, replicas would take turns without a pause.
        if self._clock.monotonic() > self.retry_at + FORGET_SECONDS:
            self.lost_cause = None
            self._failures = 0
        if self._is_open:
            self._drop()

    def _drop(self) -> None:
        self._is_open = False
        self._subscriptions.ended.clear()
        self._sockets.drop()

    def _check_silence(self, now: float) -> None:
        """Reconnect if the whole socket is silent, else subscribe again to the silent symbols."""
        silent = [symbol for symbol, liveness in self.watched.items() if liveness.is_silent(now)]
        quiet_seconds = now - max(self._received_at, self._opened_at)
        if any(quiet_seconds > self.watched[symbol].timeout for symbol in silent):
            for symbol in silent:
                self.watched[symbol].failures += 1
            self.lost("silent", None)
            return
        for symbol in silent:
            self._subscriptions.repeat(symbol, now)

    async def _send_unsubscriptions(self) -> None:
        while symbols := self._subscriptions.take_ended():
            await self._pause(self._sockets.unsubscribe(symbols))

    async def _pause(self, messages: int) -> None:
        """Wait after messages to the exchange, as its limits require."""
        await asyncio.sleep(messages * self._subscriptions.limits.frame_seconds)

    async def _send_subscriptions(self) -> None:
        is_listed = partial(self._manager.markets.find, self.exchange)
        while self._can_send():
            now = self._clock.monotonic()
            symbols = self._subscriptions.find_due(now, is_listed)
            if not symbols:
                return
            self._sockets.use(self._manager[self.exchange].client, self._fetch_snapshot)
            for symbol in symbols:
                self.watched[symbol].subscribed_at = now
                self.watched[symbol].is_resubscribed = True
            if not self._is_open:
                self._is_open = True
                self._opened_at = now
            await self._pause(self._sockets.subscribe(symbols))
            await self._send_unsubscriptions()  # of symbols that are subscribed again below

    def _can_send(self) -> bool:
        """Return True if a message can be sent. Connecting sockets would send all at once."""
        if self._manager.is_refused(self.exchange) or self._sockets.is_connecting:
            return False
        if self._sockets.count:
            self._dialer.record_success()
            return True
        is_due = (
            self._clock.monotonic() >= self.retry_at or self._dialer.connected_at > self.lost_at
        )
        return is_due and self._dialer.can_dial()

    async def _fetch_snapshot(self, symbol: str, limit: int | None = None, _: Any = None) -> Any:
        return await self._manager.raw_order_book(self.exchange, symbol, limit or 100)

    def received(self, symbol: str, value: Any, *, steady: bool) -> None:
        """Process one message. Only a `steady` message proves that the topic is alive."""
        liveness = self.watched.get(symbol)
        if liveness is None or liveness.subscribed_at is None:
            return
        try:
            topic = Topic(self.exchange, self.channel.kind, symbol, self._timeframe)
            if not self._receive(topic, value, steady):
                return
        except Exception as error:  # noqa: BLE001 - reported
            report_error("delivery", error)
            steady = False  # the socket works, but subscribers get nothing: the topic becomes stale
        now = self._clock.monotonic()
        self._received_at = now
        if steady:
            liveness.record_message(now)
        self.lost_cause = None
        if now - self._opened_at > STEADY_SECONDS:
            self._failures = 0

    def lost(self, cause: str, refusal: GatewayError | None) -> None:
        """Close the socket, and reconnect after a pause. `refusal` is the exchange's answer."""
        if not self._is_open:
            return
        self._drop()
        for liveness in self.watched.values():
            liveness.subscribed_at = None
        now = self._clock.monotonic()
        if cause in ("refused", "timeout") and self._received_at < self._opened_at:
            self._dialer.is_failing = True
        pause = retry_pause(self._failures, self._dialer.interval)
        self.retry_at = now + pause
        if self.lost_cause is None:
            self.lost_at = now
        self.lost_cause = cause
        self._failures += 1
        self.reconnects += 1
        metrics.stream_reconnects_total.labels(self.exchange, cause).inc()
        names = {"exchange": self.exchange, "channel": self.channel.name}
        level = logging.INFO if cause == "closed" else logging.WARNING
        log.log(level, "stream lost", extra=names | {"cause": cause, "retry_in": round(pause, 1)})
        if isinstance(refusal, GeoBlocked | ExchangeRateLimited):
            self._manager.hold(self.exchange, refusal)

    def ended(self, symbol: str, *, is_refused: bool) -> None:
        """Subscribe again after a refusal of one or more symbols, or after a lost update."""
        if symbol in self.watched and self._is_open:
            self.watched[symbol].refusals += is_refused
            self._subscriptions.repeat(symbol, self._clock.monotonic())
