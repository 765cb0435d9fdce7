"""Keeps the market lists loaded, in the background.

A list comes from a snapshot in Redis if that is recent, else from the exchange, of which
`market_reader` makes a snapshot. Restoring a snapshot takes a few milliseconds.
"""

import asyncio
import contextlib
import gc
import logging
from collections.abc import Mapping
from typing import Any

from src.core import errors
from src.core.background import report_error
from src.core.circuit_breaker import exponential_backoff
from src.exchanges import ccxt_client
from src.exchanges.ccxt_client import CcxtClient, MarketList
from src.exchanges.http_client import MAX_MARKETS_BYTES, Answer
from src.exchanges.manager import ExchangeCall, ExchangeManager, Fetched, keep
from src.exchanges.market_reader import MarketReader
from src.store.redis import PREFIX, Command, RedisStore, RedisUnavailable

log = logging.getLogger(__name__)

RETRY_INITIAL_SECONDS = 1.0
RETRY_MAX_SECONDS = 60.0
FIRST_LISTS_POLL_SECONDS = 0.01
SNAPSHOT_SECONDS = 86400  # a list of this age still names nearly every market
SNAPSHOT_TIMEOUT_SECONDS = 1.0  # some hundred kilobytes, once an hour, apart from all requests


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
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Start loading in the background."""
        # Modules stay. Hidden from the garbage collector, they no longer cause a pause of 40 ms
        # each time a list creates many objects. Only once: later objects may end.
        if gc.get_freeze_count() == 0:
            gc.collect()
            gc.freeze()
        self._tasks = [asyncio.create_task(self._keep_loaded(name)) for name in self._manager.names]

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

    async def load(self, name: str) -> None:
        """Load the list of an exchange now, unless it is recent. Raises `GatewayError`."""
        oldest = self._clock.time() - self._refresh_seconds
        await self._restore(name, oldest)
        if self._markets.loaded_at.get(name, 0.0) > oldest:
            return
        loaded = await self._fetch(name)
        self._adopt(name, loaded)
        await self._save(name, loaded.snapshot)

    async def _fetch(self, name: str) -> MarketList:
        response = Answer(max_bytes=MAX_MARKETS_BYTES)

        async def fetch(client: CcxtClient) -> MarketList:
            snapshot = await self._reader.read(name, response, self._clock.time())
            loaded = await ccxt_client.restore_markets(client, snapshot)
            if loaded is None:
                raise errors.BadUpstreamData("the market list is empty or broken", exchange=name)
            return loaded

        timeout = ccxt_client.MARKETS_TIMEOUT_SECONDS
        call = ExchangeCall(name, "markets", fetch, keep, timeout_seconds=timeout, answer=response)
        fetched: Fetched[MarketList] = await self._manager.call(call)
        return fetched.value

    async def _keep_loaded(self, name: str) -> None:
        failures = 0
        while True:
            try:
                await self.load(name)
            except Exception as error:  # noqa: BLE001 - reported and tried again
                pause = exponential_backoff(failures, RETRY_INITIAL_SECONDS, RETRY_MAX_SECONDS)
                failures += 1
                self._report(name, error, pause)
            else:
                self.errors.pop(name, None)
                failures = 0
                age = self._clock.time() - self._markets.loaded_at[name]
                pause = max(RETRY_INITIAL_SECONDS, self._refresh_seconds - age)
            await asyncio.sleep(pause)

    def _report(self, name: str, error: Exception, pause: float) -> None:
        if not isinstance(error, errors.GatewayError):
            report_error("markets", error)
        code = getattr(error, "code", errors.GatewayError.code)
        self.errors[name] = code
        fields = {"exchange": name, "code": code, "retry_in": pause}
        log.warning("market list not loaded", extra=fields)

    def _adopt(self, name: str, loaded: MarketList) -> None:
        ccxt_client.adopt_markets(self._manager[name].client, loaded.markets)
        self._markets.replace(name, loaded.markets.values(), loaded.loaded_at)
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
        if restored.loaded_at > oldest or name not in self._markets.loaded_at:
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
