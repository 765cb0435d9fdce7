"""Reads the market lists in the background: from a snapshot in Redis where one is new enough, else from the exchange.

Never on a request's path, and parsed in a process of its own (`market_reader`): from the exchange's words to a
snapshot, which is small and is restored in a few milliseconds.
"""

import asyncio
import gc
import logging
from collections.abc import Mapping

from config import Settings
from src.core.background import report_error
from src.core.clock import Clock
from src.core.errors import BadUpstreamData, GatewayError
from src.exchanges.ccxt_client import MARKETS_TIMEOUT_SECONDS, CcxtClient, MarketList, adopt_markets, restore_markets
from src.exchanges.http_client import MAX_MARKETS_BYTES, Answer
from src.exchanges.manager import ExchangeCall, ExchangeManager, weight_of
from src.exchanges.market_reader import MarketReader
from src.store.redis import PREFIX, RedisAway, RedisStore

log = logging.getLogger(__name__)

RETRY_SECONDS = (1.0, 60.0)  # first and longest pause between tries
FIRST_WORD_POLL_SECONDS = 0.01
SNAPSHOT_SECONDS = 86400  # a list this old still names nearly every market, and spares a call at start-up
SNAPSHOT_TIMEOUT_SECONDS = 1.0  # some hundred kilobytes, once an hour and beside all requests


class MarketLoader:
    """Keeps the market lists of all exchanges loaded; one that cannot be read does not disturb the others."""

    def __init__(
        self,
        manager: ExchangeManager,
        settings: Settings,
        store: RedisStore,
        clock: Clock,
        snapshots: Mapping[str, bytes],
    ) -> None:
        self.errors: dict[str, str] = {}  # exchange -> code of the error of the last try
        self._prepared = dict(snapshots)  # used once each, in place of those in Redis
        self._manager = manager
        self._settings = settings
        self._store = store
        self._clock = clock
        self._reader = MarketReader(settings)
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Begin to load in the background."""
        # What was imported stays. Left out of the garbage collector's view, it no longer costs a stall of 40 ms each
        # time a list makes many objects. Once: what is made later may end.
        if gc.get_freeze_count() == 0:
            gc.collect()
            gc.freeze()
        self._tasks = [asyncio.create_task(self._keep_loaded(name)) for name in self._manager.names]

    async def first_word(self, least: int | None = None) -> None:
        """Wait until each exchange's list is there, or a try to read it has failed; `least` lists are enough."""
        loaded, names = self._manager.markets.loaded_at, set(self._manager.names)
        while names - set(loaded) - set(self.errors) and len(loaded) < (least or len(names)):  # noqa: ASYNC110 - once
            await asyncio.sleep(FIRST_WORD_POLL_SECONDS)

    async def close(self) -> None:
        """End the background work."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def load(self, name: str) -> None:
        """Load the list of an exchange now, unless it is new enough. Raises `GatewayError`."""
        loaded_at = self._manager.markets.loaded_at
        oldest = self._clock.time() - self._settings.markets_refresh_seconds
        restored = await self._restore(name)
        if restored is not None and restored.loaded_at > self._clock.time():  # by a clock that is ahead: as if just now
            restored = restored._replace(loaded_at=self._clock.time())
        if restored is not None and (restored.loaded_at > oldest or name not in loaded_at):
            self._adopt(name, restored)
        if loaded_at.get(name, 0.0) > oldest:
            return
        got = Answer(max_bytes=MAX_MARKETS_BYTES)

        async def read(client: CcxtClient) -> MarketList | None:
            snapshot = await self._reader.read(name, got, self._clock.time())
            return await restore_markets(client, snapshot)

        call = ExchangeCall(name, "markets", weight_of(name, "markets"), read, _plausible, MARKETS_TIMEOUT_SECONDS, got)
        fetched = await self._manager.call(call)
        self._adopt(name, fetched.value)
        await self._save(name, fetched.value)

    async def _keep_loaded(self, name: str) -> None:
        first, longest = RETRY_SECONDS
        pause = first
        while True:
            try:
                await self.load(name)
            except Exception as error:  # noqa: BLE001 - reported, and tried again
                if not isinstance(error, GatewayError):
                    report_error("markets", error)
                self.errors[name] = code = getattr(error, "code", GatewayError.code)
                log.warning("market list not loaded", extra={"exchange": name, "code": code, "retry_in": pause})
                await asyncio.sleep(pause)
                pause = min(pause * 2, longest)
            else:
                self.errors.pop(name, None)
                pause = first
                age = self._clock.time() - self._manager.markets.loaded_at[name]
                await asyncio.sleep(max(first, self._settings.markets_refresh_seconds - age))

    def _adopt(self, name: str, loaded: MarketList) -> None:
        markets = self._manager.markets
        adopt_markets(self._manager[name].client, loaded.markets)
        markets.replace(name, loaded.markets.values(), loaded.loaded_at)
        log.info("market list loaded", extra={"exchange": name, "markets": markets.count(name)})

    async def _restore(self, name: str) -> MarketList | None:
        key = self._key(name)
        raw: bytes | str | None = self._prepared.pop(name, None)
        try:
            if raw is None:
                raw = await self._store.run("snapshot_get", lambda redis: redis.get(key), SNAPSHOT_TIMEOUT_SECONDS)
        except RedisAway:
            return None
        return await restore_markets(self._manager[name].client, raw) if isinstance(raw, bytes) else None

    async def _save(self, name: str, loaded: MarketList) -> None:
        key, snapshot = self._key(name), loaded.snapshot
        try:
            await self._store.run(
                "snapshot_set", lambda redis: redis.set(key, snapshot, ex=SNAPSHOT_SECONDS), SNAPSHOT_TIMEOUT_SECONDS
            )
        except RedisAway:
            if self._store.configured:
                log.info("market snapshot not saved", extra={"exchange": name})

    def _key(self, name: str) -> str:
        # The types belong to the name: replicas with other MARKET_TYPES need other lists.
        return f"{PREFIX}markets:{{{name}}}:{'+'.join(sorted(self._settings.market_types))}"


def _plausible(loaded: MarketList | None, fetched_at: int) -> MarketList:
    if loaded is None:
        raise BadUpstreamData(f"the exchange sent an empty or broken market list at {fetched_at}")
    return loaded
