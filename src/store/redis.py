"""The one way to Redis, guarded: losing Redis costs speed, never an answer. Its URL names one, a Sentinel or a Cluster.

Every command is bounded in time and goes through a breaker, so a Redis that hangs costs one short wait and then
nothing. Keys are versioned and carry a hash tag in braces, so that keys used together share a slot of a cluster.
"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

from redis.asyncio import ConnectionPool, Redis, RedisCluster, Sentinel
from redis.asyncio.client import PubSub
from redis.asyncio.cluster import ClusterNode
from redis.asyncio.connection import parse_url
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import SentinelConnectionPool
from redis.backoff import NoBackoff
from redis.exceptions import RedisClusterException, RedisError, ResponseError

from config import split_hosts
from src.core import metrics
from src.core.background import repeat
from src.core.circuit_breaker import CircuitBreaker
from src.core.clock import Clock

log = logging.getLogger(__name__)
T = TypeVar("T")
RedisClient = Redis | RedisCluster

PREFIX = "virtuoso:1:"  # the number is the version of what the keys hold; raise it when that changes
NODE_SHARE = 0.5  # of a command's time, for one of several servers: it leaves time to ask another
MAX_COMMANDS = 50  # at once
SLOT_WAIT_SECONDS = 0.1  # longest wait for one of them to end; a burst of our own making is no fault of Redis
MAX_CONNECTIONS = 60  # to each server; more than commands, because a pool without a free one fails as Redis would
# One timeout is enough: a cold request uses Redis three times, and three waits would be three times as long.
BREAKER_THRESHOLD = 1
BREAKER_RESET_SECONDS = 1.0
BREAKER_MAX_OPEN_SECONDS = 15.0
SCAN_COUNT = 500
PING_SECONDS = 5.0
PING_TIMEOUT_SECONDS = 1.0  # nobody waits for it, and finding one's way in a cluster takes several answers


class RedisAway(Exception):
    """Redis is not configured, does not answer, or refused the command: go on without it."""


class RedisStore:
    """Runs commands on Redis; every one of them may raise `RedisAway`, and nothing else."""

    def __init__(self, address: str, clock: Clock, timeout: float = 0.15) -> None:
        """Prepare a client for the URL `address` (empty: no Redis), whose commands take `timeout` seconds at most."""
        self._address = address
        self._clock = clock
        self._timeout = timeout
        self._slots = asyncio.Semaphore(MAX_COMMANDS)
        self.client = _client(address, timeout) if address else None
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

    async def run(self, operation: str, command: Callable[[RedisClient], Awaitable[T]], seconds: float = 0) -> T:
        """Run one command within the timeout, or `seconds` if that is more; count it. Raises `RedisAway`."""
        if self.client is None:
            raise RedisAway("not configured")
        if not self.breaker.admits:
            metrics.cache_tier_operations_total.labels("redis", operation, "skipped").inc()
            raise RedisAway("its breaker is open")
        started, outcome = self._clock.monotonic(), "error"
        try:
            async with self._slot():
                result = await self.breaker.call(_within, max(seconds, self._timeout), command, self.client)
        except Exception as error:  # noqa: BLE001 - a cluster's client may close a connection that another call uses
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
        """Hold one of `MAX_COMMANDS` places; raises `TimeoutError`, outside the breaker, when none becomes free."""
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
        removed = 0
        for node in await self.run("scan", _primaries):
            cursor = None
            while cursor != 0:
                cursor, keys = await self.run("scan", _scan(node, cursor or 0, PREFIX + pattern))
                if keys:
                    removed += await self.run("unlink", _unlink(keys))
        return removed

    async def keep_asking(self) -> None:
        """Ask Redis for a sign of life, for ever: or memory hits alone would never learn that it went or came back."""
        if self.configured:
            await repeat("redis", self._ask)

    async def _ask(self) -> None:
        with contextlib.suppress(RedisAway):
            await self.run("ping", _sign_of_life, PING_TIMEOUT_SECONDS)
        await asyncio.sleep(PING_SECONDS)

    @contextlib.asynccontextmanager
    async def pubsub(self) -> AsyncIterator[PubSub]:
        """Open a pub/sub connection outside the pool of the commands.

        Raises `RedisAway` if Redis is not configured or its breaker is not closed, and when the connection is lost.
        """
        if not self.up:
            raise RedisAway("not configured, or its breaker is not closed")
        client = _client(self._address, self._timeout)  # a new client knows the current servers of a cluster
        try:
            if isinstance(client, RedisCluster):
                await client.initialize()
            async with client.pubsub() as pubsub:
                yield pubsub
        except (RedisError, RedisClusterException, OSError, TimeoutError) as error:
            log.debug("redis pub/sub ended", extra={"error": type(error).__name__})
            raise RedisAway(type(error).__name__) from None
        finally:
            await _close(client)

    async def close(self) -> None:
        """Close the connections."""
        if self.client is not None:
            await _close(self.client)


async def _close(client: RedisClient) -> None:
    if isinstance(client, RedisCluster):  # its own close does nothing once it has lost sight of a node
        await client.nodes_manager.aclose()
        await client.nodes_manager.aclose("startup_nodes")
    elif isinstance(client.connection_pool, SentinelConnectionPool):
        await client.connection_pool.sentinel_manager.aclose()
    await client.aclose()


def _client(address: str, timeout: float) -> RedisClient:
    scheme, _, rest = address.partition("://")
    if "+" not in scheme:
        return Redis.from_pool(ConnectionPool.from_url(address, **_limits(timeout)))
    hosts = [parse_url(url) for url in split_hosts(address)]
    access: dict[str, Any] = {"username": hosts[0].get("username"), "password": hosts[0].get("password")}
    access["ssl"] = scheme.startswith("rediss")
    if scheme.endswith("+cluster"):
        return _cluster([ClusterNode(host["host"], host.get("port", 6379)) for host in hosts], timeout, access)
    name, _, database = rest.partition("/")[2].partition("/")
    access["db"] = int(database.strip("/") or 0)
    return _primary(name, [(host["host"], host.get("port", 26379)) for host in hosts], timeout, access)


def _limits(seconds: float, retries: int = 1) -> dict[str, Any]:
    # redis-py's defaults wait 58 s on a frozen server; one retry saves the calls that find a connection closed by a
    # restart. Decoding is off: values are bytes.
    return {
        "max_connections": MAX_CONNECTIONS,
        "socket_timeout": seconds,
        "socket_connect_timeout": seconds,
        "retry": Retry(NoBackoff(), retries),
    }


def _cluster(nodes: list[ClusterNode], timeout: float, access: dict[str, Any]) -> RedisCluster:
    # Not dynamic: it asks the hosts of the URL for the nodes there are now, whatever addresses these have had before.
    limits = _limits(timeout * NODE_SHARE)
    cluster = RedisCluster(startup_nodes=nodes, dynamic_startup_nodes=False, **limits, **access)
    cluster.commands_parser = _FirstArgument()  # type: ignore[assignment]
    return cluster


def _primary(name: str, hosts: list[tuple[str, int]], timeout: float, access: dict[str, Any]) -> Redis:
    # Each new connection asks the sentinels, one after the other, which server is the primary now.
    limits = _limits(timeout * NODE_SHARE, retries=0) | {"ssl": access["ssl"]}
    sentinel = Sentinel(hosts, sentinel_kwargs=limits)  # type: ignore[no-untyped-call]
    primary: Redis = sentinel.master_for(name, **_limits(timeout), **access)
    return primary


class _FirstArgument:
    """Finds the key of a command where all commands used here have it.

    It saves a cluster's client from reading a server's whole table of commands, its longest answer, whenever it looks
    around.
    """

    async def initialize(self, node: ClusterNode | None = None) -> None:
        """Have nothing to read."""

    async def get_keys(self, *command: Any) -> list[Any]:
        """Return the key of a command."""
        return [command[1]]


async def _within(seconds: float, command: Callable[[RedisClient], Awaitable[T]], client: RedisClient) -> T:
    # Inside the breaker's call: a timeout out there would look like a caller that left.
    async with asyncio.timeout(seconds):
        already = _cancellations()
        if isinstance(client, RedisCluster):
            await client.initialize()  # it would do that itself, but after it has chosen a node for its first command
        result = await command(client)
        # Before Python 3.12 `asyncio.wait_for`, by which redis-py sends, loses a cancellation that comes as it ends: a
        # loop such as `keep_asking` would then never end, nor would the process.
        if _cancellations() > already:
            raise asyncio.CancelledError
        return result


def _cancellations() -> int:
    task = asyncio.current_task()
    return task.cancelling() if task is not None else 0


async def _sign_of_life(client: RedisClient) -> None:
    try:  # what is left of a cluster that is down answers a PING, but no command that has a key
        await (client.get(PREFIX) if isinstance(client, RedisCluster) else client.ping())
    except ResponseError as error:  # it refuses other commands for their own sake, but this one because it is no use
        raise RedisError(type(error).__name__) from None


async def _primaries(client: RedisClient) -> list[ClusterNode | None]:
    return [*client.get_primaries()] if isinstance(client, RedisCluster) else [None]


def _scan(
    node: ClusterNode | None, cursor: int, pattern: str
) -> Callable[[RedisClient], Awaitable[tuple[int, list[Any]]]]:
    async def scan(client: RedisClient) -> tuple[int, list[Any]]:
        target: dict[str, Any] = {} if node is None else {"target_nodes": node}
        after: Any
        after, keys = await client.scan(cursor, match=pattern, count=SCAN_COUNT, **target)
        return after if node is None else after[node.name], keys

    return scan


def _unlink(keys: list[bytes]) -> Callable[[RedisClient], Awaitable[Any]]:
    return lambda client: client.unlink(*keys)


def _log_change(old: str, new: str, cause: str | None) -> None:
    level = logging.WARNING if new == "open" else logging.INFO
    log.log(level, "redis breaker changed", extra={"from": old, "to": new, "cause": cause})
