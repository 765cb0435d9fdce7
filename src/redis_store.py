"""The one connection to Redis, guarded: losing Redis costs speed, never an answer.

Every command is bounded in time and goes through a breaker, so a Redis that hangs costs one short wait and then
nothing. Keys are versioned and carry a hash tag in braces, so that keys used together share a slot of a cluster.
"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

from redis.asyncio import ConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError, ResponseError

from src import metrics
from src.circuit_breaker import CircuitBreaker
from src.clock import Clock
from src.errors import CircuitOpen

log = logging.getLogger(__name__)
T = TypeVar("T")

PREFIX = "virtuoso:1:"  # the number is the version of what the keys hold; raise it when that changes
COMMAND_TIMEOUT_SECONDS = 0.15  # a Redis slower than this is no cache
MAX_CONNECTIONS = 50
SLOT_WAIT_SECONDS = 0.1  # longest wait for one of them; a burst of our own making is no fault of Redis
# One timeout is enough: a cold request uses Redis three times, and three waits would be three times as long.
BREAKER_THRESHOLD = 1
BREAKER_RESET_SECONDS = 1.0
BREAKER_MAX_OPEN_SECONDS = 15.0
SCAN_COUNT = 500
PING_SECONDS = 5.0


class RedisAway(Exception):
    """Redis is not configured, does not answer, or refused the command: go on without it."""


class RedisStore:
    """Runs commands on Redis; every one of them may raise `RedisAway`, and nothing else."""

    def __init__(self, address: str, clock: Clock) -> None:
        """Prepare a client for the URL `address` (empty: no Redis); nothing connects yet."""
        self._clock = clock
        self._slots = asyncio.Semaphore(MAX_CONNECTIONS)
        self.client = _client(address) if address else None
        self.breaker = CircuitBreaker(
            "redis",
            clock=clock,
            threshold=BREAKER_THRESHOLD,
            reset_seconds=BREAKER_RESET_SECONDS,
            max_open_seconds=BREAKER_MAX_OPEN_SECONDS,
            neutral=(ResponseError,),  # it answered: full, a wrong type, read-only
            on_change=_log_change,
        )

    def __repr__(self) -> str:
        return f"RedisStore(configured={self.client is not None}, state={self.breaker.state})"

    @property
    def configured(self) -> bool:
        """Whether there is a Redis to use at all."""
        return self.client is not None

    @property
    def up(self) -> bool:
        """Whether the last word from Redis was an answer."""
        return self.client is not None and self.breaker.state == "closed"

    async def run(
        self, operation: str, command: Callable[["Redis"], Awaitable[T]], seconds: float = COMMAND_TIMEOUT_SECONDS
    ) -> T:
        """Run one command within `seconds` and count it under `operation`. Raises `RedisAway`."""
        if self.client is None:
            raise RedisAway("not configured")
        if not self.breaker.admits:
            metrics.cache_tier_operations_total.labels("redis", operation, "skipped").inc()
            raise RedisAway("its breaker is open")
        started, outcome = self._clock.monotonic(), "error"
        try:
            async with self._slot():
                result = await self.breaker.call(_within, seconds, command, self.client)
        except (RedisError, CircuitOpen, OSError, TimeoutError, UnicodeError, ValueError) as error:
            log.debug("redis command failed", extra={"operation": operation, "error": type(error).__name__})
            raise RedisAway(type(error).__name__) from None
        else:
            outcome = "success"
            return result
        finally:
            metrics.cache_tier_operations_total.labels("redis", operation, outcome).inc()
            elapsed = self._clock.monotonic() - started
            metrics.cache_tier_operation_duration_seconds.labels("redis", operation).observe(elapsed)

    @contextlib.asynccontextmanager
    async def _slot(self) -> AsyncIterator[None]:
        """Hold one of the connections' places; raises `TimeoutError` when none comes free, outside the breaker."""
        async with asyncio.timeout(SLOT_WAIT_SECONDS if self._slots.locked() else None):
            await self._slots.acquire()
        try:
            yield
        finally:
            self._slots.release()

    async def delete_matching(self, pattern: str) -> int:
        """Remove our own keys that match the glob `pattern` after the prefix; returns how many. Raises `RedisAway`.

        Scans and unlinks in small steps: nothing blocks Redis, and no key of anybody else is touched.
        """
        removed, cursor = 0, 0
        while True:
            cursor, keys = await self.run("scan", _scan(cursor, PREFIX + pattern))
            if keys:
                removed += await self.run("unlink", _unlink(keys))
            if cursor == 0:
                return removed

    async def keep_asking(self) -> None:
        """Ask Redis for a sign of life, for ever: or memory hits alone would never learn that it went or came back."""
        while self.configured:
            with contextlib.suppress(RedisAway):
                await self.run("ping", lambda redis: redis.ping())
            await asyncio.sleep(PING_SECONDS)

    async def close(self) -> None:
        """Close the connections."""
        if self.client is not None:
            await self.client.aclose()


def _client(address: str) -> "Redis":
    # redis-py's defaults wait 58 s on a frozen server; one retry saves the calls that find a connection closed by a
    # restart. Decoding is off: values are bytes.
    pool = ConnectionPool.from_url(
        address,
        max_connections=MAX_CONNECTIONS,
        socket_timeout=COMMAND_TIMEOUT_SECONDS,
        socket_connect_timeout=0.25,
        retry=Retry(NoBackoff(), 1),
    )
    return Redis.from_pool(pool)


async def _within(seconds: float, command: Callable[["Redis"], Awaitable[T]], client: "Redis") -> T:
    # Inside the breaker's call: a timeout out there would look like a caller that left.
    async with asyncio.timeout(seconds):
        return await command(client)


def _scan(cursor: int, pattern: str) -> Callable[["Redis"], Awaitable[tuple[int, list[Any]]]]:
    return lambda client: client.scan(cursor, match=pattern, count=SCAN_COUNT)


def _unlink(keys: list[bytes]) -> Callable[["Redis"], Awaitable[Any]]:
    return lambda client: client.unlink(*keys)


def _log_change(old: str, new: str, cause: str | None) -> None:
    level = logging.INFO if new == "half_open" else logging.WARNING
    log.log(level, "redis breaker changed", extra={"from": old, "to": new, "cause": cause})
