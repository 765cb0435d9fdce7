"""Keeps the market lists loaded, in the background.

A list comes from a snapshot in Redis if that is recent, else from the exchange, of which
`market_reader` makes a snapshot. Restoring a snapshot takes a few milliseconds.
"""

import asyncio
import contextlib
import gc
import logging
import math
from collections.abc import Iterable, Mapping
from functools import cache, partial
from typing import Any

from src.core import errors
from src.core.background import repeat, report_error
from src.core.circuit_breaker import exponential_backoff
from src.exchanges import ccxt_client
from src.exchanges.ccxt_client import CcxtClient, MarketList
from src.exchanges.http_client import MAX_MARKETS_BYTES, Answer
from src.exchanges.manager import ExchangeCall, ExchangeManager, Fetched, keep
from src.exchanges.market_reader import MarketReader
from src.store.redis import PREFIX, Command, RedisStore, RedisUnavailable

log = logging.getLogger(__name__)

# Shortest time between two requests for a list outside of MARKETS_REFRESH_SECONDS: a symbol that is
# not listed, a maintenance and a failed refresh of a list that is not old.
EARLY_REFRESH_SECONDS = 60.0
EARLY_REFRESH_SHARE = 0.5  # no early refresh if more of an exchange's budget is used
RETRY_INITIAL_SECONDS = 1.0
RETRY_MAX_SECONDS = 60.0
FIRST_LISTS_POLL_SECONDS = 0.01
SNAPSHOT_SECONDS = 86400  # a list of this age still names nearly every market
SNAPSHOT_TIMEOUT_SECONDS = 1.0  # some hundred kilobytes, once an hour, apart from all requests


class Refresh:
    """The refreshes of one list."""

    def __init__(self) -> None:
        self.wanted = asyncio.Event()
        self.ended: asyncio.Event | None = None  # of a refresh that is running or wanted
        self.started_at = -math.inf  # monotonic seconds; the last attempt
        self.failures = 0


@cache
def _freeze_modules() -> None:
    """Hide all modules from the garbage collector: a collection no longer takes 40 ms.

    A list creates many objects, which cause collections. Only once: later objects may end.
    """
    gc.collect()
    gc.freeze()


class MarketLoader:
    """Keeps the market lists of all exchanges loaded. A failing exchange affects no other."""

    def __init__(
        self, manager: ExchangeManager, store: RedisStore, snapshots: Mapping[str, bytes]
    ) -> None:
        """Prepare. Each of the `snapshots` is used once, instead of the one in Redis."""
        self.errors: dict[str, str] = {}  # exchange -> code of the last attempt's error
        self._prepared = dict(snapshots)
        self._manager = manager
        self._markets = manager.markets
        self._clock = manager.clock
        self._refresh_seconds = manager.settings.markets_refresh_seconds
        self._store = store
        self._reader = MarketReader(manager.settings)
        self._refreshes = {name: Refresh() for name in manager.names}
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Start loading in the background."""
        _freeze_modules()
        steps = [partial(self._refresh, name) for name in self._manager.names]
        self._tasks = [asyncio.create_task(repeat("markets", step)) for step in steps]

    async def wait_for_first_lists(self, enough: int | None = None) -> None:
        """Wait until each list is loaded or an attempt has failed, or until `enough` are loaded."""
        loaded = self._markets.loaded_at
        names = set(self._manager.names)
        needed = enough or len(names)
        while names - loaded.keys() - self.errors.keys() and len(loaded) < needed:  # noqa: ASYNC110
            await asyncio.sleep(FIRST_LISTS_POLL_SECONDS)

    async def close(self) -> None:
        """Stop the background tasks and the child process."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def request_refresh(self, name: str) -> None:
        """Refresh a list soon, because it seems outdated.

        Waits until the list and the last attempt are `EARLY_REFRESH_SECONDS` old.
        """
        delay = max(0.0, self._early_refresh_delay(name))
        asyncio.get_running_loop().call_later(delay, self._refreshes[name].wanted.set)

    async def look_for_new_markets(self, names: Iterable[str], seconds: float) -> None:
        """Refresh lists that may be refreshed now. Wait for them, but at most `seconds`.

        Joins refreshes that have just started. A failure only shows in `errors`.
        """
        running = []
        for name in names:
            refresh = self._refreshes[name]
            if refresh.ended is None and self._may_refresh_early(name):
                refresh.started_at = self._clock.monotonic()  # later requests join this one
                refresh.ended = asyncio.Event()
                refresh.wanted.set()
            if refresh.ended and self._clock.monotonic() - refresh.started_at < seconds:
                running.append(refresh.ended)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                for ended in running:
                    await ended.wait()

    def _may_refresh_early(self, name: str) -> bool:
        is_affordable = self._manager.limiter.used_ratio(name) <= EARLY_REFRESH_SHARE
        is_usable = is_affordable and self._manager.is_available(name)
        return is_usable and self._early_refresh_delay(name) <= 0

    def _early_refresh_delay(self, name: str) -> float:
        """Return the seconds until an early refresh is allowed."""
        since_attempt = self._clock.monotonic() - self._refreshes[name].started_at
        now = self._clock.time()
        age = now - self._markets.loaded_at.get(name, now)  # a missing list is loading
        return EARLY_REFRESH_SECONDS - min(since_attempt, age)

    async def load(self, name: str, max_age: float | None = None) -> None:
        """Load the list of an exchange, unless it is younger than `max_age` seconds.

        The default is MARKETS_REFRESH_SECONDS. Raises `GatewayError`.
        """
        oldest = self._clock.time() - (max_age or self._refresh_seconds)
        await self._restore(name, oldest)
        if self._markets.loaded_at.get(name, 0.0) > oldest:
            return
        loaded = await self._fetch(name)
        self._adopt(name, loaded)
        await self._save(name, loaded.snapshot)

    async def _fetch(self, name: str) -> MarketList:
        response = Answer(max_bytes=MAX_MARKETS_BYTES)

        async def fetch(_client: CcxtClient) -> bytes:
            return await self._reader.read(name, response, self._clock.time())

        timeout = ccxt_client.MARKETS_TIMEOUT_SECONDS
        call = ExchangeCall(name, "markets", fetch, keep, timeout_seconds=timeout, answer=response)
        fetched: Fetched[bytes] = await self._manager.call(call)
        # A broken list is no reason to refuse requests: it does not count for the breaker.
        loaded = await ccxt_client.restore_markets(self._manager[name].client, fetched.value)
        if loaded is None:
            raise errors.BadUpstreamData("the market list is empty or broken", exchange=name)
        return loaded

    async def _refresh(self, name: str) -> None:
        """Load a list if it is due, and wait until it is due again, or wanted."""
        refresh = self._refreshes[name]
        is_early = refresh.wanted.is_set()
        refresh.wanted.clear()
        refresh.started_at = self._clock.monotonic()
        ended = refresh.ended = refresh.ended or asyncio.Event()
        try:
            await self.load(name, EARLY_REFRESH_SECONDS if is_early else None)
        except Exception as error:  # noqa: BLE001 - reported and tried again
            refresh.failures += 1
            self._report(name, error)
        else:
            refresh.failures = 0
            self._report_success(name)
        finally:
            ended.set()
            refresh.ended = None
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._pause(name)):
                await refresh.wanted.wait()
        if name in self.errors:  # the list may be younger than MARKETS_REFRESH_SECONDS
            refresh.wanted.set()

    def _pause(self, name: str) -> float:
        """Return the seconds until the next refresh of a list."""
        failures = self._refreshes[name].failures
        age = self._clock.time() - self._markets.loaded_at.get(name, 0.0)
        if failures and age >= self._refresh_seconds:
            return exponential_backoff(failures - 1, RETRY_INITIAL_SECONDS, RETRY_MAX_SECONDS)
        if name in self.errors:  # a failure, or a maintenance
            return EARLY_REFRESH_SECONDS
        return max(RETRY_INITIAL_SECONDS, self._refresh_seconds - age)

    def _report_success(self, name: str) -> None:
        if name not in self._markets.in_maintenance:
            self.errors.pop(name, None)
        elif self.errors.get(name) != errors.Maintenance.code:
            self.errors[name] = errors.Maintenance.code
            log.warning("exchange in maintenance", extra={"exchange": name})

    def _report(self, name: str, error: Exception) -> None:
        if not isinstance(error, errors.GatewayError):
            report_error("markets", error)
        code = getattr(error, "code", errors.GatewayError.code)
        reason = getattr(error, "detail", None)
        self.errors[name] = code
        fields = {"exchange": name, "code": code, "reason": reason, "retry_in": self._pause(name)}
        log.warning("market list not loaded", extra=fields)

    def _adopt(self, name: str, loaded: MarketList) -> None:
        """Use a list. Raises `BadUpstreamData` if it is broken."""
        markets = loaded.markets.values()
        self._markets.check_size(name, markets, loaded.loaded_at)
        ccxt_client.adopt_markets(self._manager[name].client, loaded.markets)
        self._markets.replace(name, markets, loaded.loaded_at)
        fields = {"exchange": name, "markets": self._markets.count(name)}
        log.info("market list loaded", extra=fields)

    async def _restore(self, name: str, oldest: float) -> None:
        """Load the list from its snapshot if that is recent, or if there is no list yet."""
        snapshot = self._prepared.pop(name, None)
        if snapshot is None:
            snapshot = await self._run("snapshot_get", lambda redis: redis.get(self._key(name)))
        client = self._manager[name].client
        restored = await ccxt_client.restore_markets(client, snapshot or b"")
        if restored is None:
            return
        # The clock of the replica that made it may be ahead.
        restored = restored._replace(loaded_at=min(restored.loaded_at, self._clock.time()))
        known_at = self._markets.loaded_at.get(name)
        if known_at is None or restored.loaded_at > max(oldest, known_at):
            with contextlib.suppress(errors.BadUpstreamData):  # the exchange may have a better one
                self._adopt(name, restored)

    async def _save(self, name: str, snapshot: bytes) -> None:
        key = self._key(name)
        saved = await self._run(
            "snapshot_set", lambda redis: redis.set(key, snapshot, ex=SNAPSHOT_SECONDS)
        )
        if not saved and self._store.configured:
            log.info("market snapshot not saved", extra={"exchange": name})

    async def _run(self, operation: str, command: Command[Any]) -> Any:
        """Run a Redis command. Return None if Redis is unavailable."""
        with contextlib.suppress(RedisUnavailable):
            return await self._store.run(operation, command, SNAPSHOT_TIMEOUT_SECONDS)
        return None

    def _key(self, name: str) -> str:
        # Replicas with other MARKET_TYPES need other lists.
        return f"{PREFIX}markets:{{{name}}}:{'+'.join(sorted(self._manager.settings.market_types))}"
