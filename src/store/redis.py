"""All access to Redis: one server, a primary behind Sentinels, or a Redis Cluster.

Redis is optional at any time. Each command has a timeout and goes through a circuit breaker, so a
Redis that hangs delays one request and is then skipped. Keys have a version, and a hash tag in
braces: keys that are used together are in the same slot of a cluster.
"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from typing import Any, TypeVar

from redis.asyncio import Redis, RedisCluster, Sentinel
from redis.asyncio.client import PubSub
from redis.asyncio.cluster import ClusterNode
from redis.asyncio.connection import parse_url
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import SentinelConnectionPool
from redis.backoff import NoBackoff
from redis.exceptions import RedisClusterException, RedisError, ResponseError

from config import split_hosts
from src.core import metrics
from src.core.circuit_breaker import CircuitBreaker, Policy
from src.core.clock import Clock

log = logging.getLogger(__name__)
T = TypeVar("T")
RedisClient = Redis | RedisCluster
Command = Callable[[RedisClient], Awaitable[T]]

PREFIX = "virtuoso:3:"  # increase the number when the format of any value changes
# Share of a command's timeout for one of several servers, so that there is time to try another.
NODE_SHARE = 0.5
MAX_COMMANDS = 50  # concurrent commands
SLOT_WAIT_SECONDS = 0.1  # longest wait for a free slot; does not count as a failure of Redis
BREAKER_MAX_OPEN_SECONDS = 15.0
BREAKER_POLICY = Policy(
    threshold=1,  # a cold request uses Redis three times: open after one timeout instead of three
    reset_seconds=1.0,
    max_open_seconds=BREAKER_MAX_OPEN_SECONDS,
    neutral=(ResponseError,),  # Redis answered: it is full, read-only, or the type is wrong
)
PING_SECONDS = 5.0  # between two pings
DELETE_KEYS = 500  # keys that one command scans or deletes
DELETE_SECONDS = 20.0  # for all of them; each command has the timeout of the connection as well


class RedisUnavailable(Exception):
    """Redis is not configured, does not answer or rejected the command. Continue without it."""


class RedisStore:
    """Runs commands on Redis. All methods raise `RedisUnavailable` and no other error."""

    def __init__(self, address: str, clock: Clock, timeout: float = 0.15) -> None:
        """Create a client for the URL `address`. An empty URL means that there is no Redis.

        `timeout` is the timeout of one command in seconds.
        """
        self._address = address
        self._clock = clock
        self._timeout = timeout
        self._slots = asyncio.Semaphore(MAX_COMMANDS)
        self.client = _create_client(address, timeout) if address else None
        self.breaker = CircuitBreaker("redis", clock, BREAKER_POLICY, _log_change)

    @property
    def configured(self) -> bool:
        """True if there is a Redis."""
        return self.client is not None

    @property
    def up(self) -> bool:
        """True if Redis is configured and answered the last command."""
        return self.configured and self.breaker.state == "closed"

    async def run(self, operation: str, command: Command[T], seconds: float = 0) -> T:
        """Run one command within the timeout, or within `seconds` if that is longer.

        `operation` is the label of the command in the metrics.
        """
        if self.client is None:
            raise RedisUnavailable("not configured")
        if not self.breaker.admits():
            metrics.cache_tier_operations_total.labels("redis", operation, "skipped").inc()
            raise RedisUnavailable("its breaker is open")
        timeout = max(seconds, self._timeout)
        started = self._clock.monotonic()
        outcome = "error"
        try:
            result = await self._call(timeout, command, self.client)
            outcome = "success"
        except Exception as error:  # noqa: BLE001 - a cluster client may raise any error
            fields = {"operation": operation, "error": type(error).__name__}
            log.debug("redis command failed", extra=fields)
            raise RedisUnavailable(type(error).__name__) from None
        finally:
            metrics.cache_tier_operations_total.labels("redis", operation, outcome).inc()
            duration = metrics.cache_tier_operation_duration_seconds.labels("redis", operation)
            duration.observe(self._clock.monotonic() - started)
        return result

    async def _call(self, seconds: float, command: Command[T], client: RedisClient) -> T:
        """Run one command in a slot. Raises `TimeoutError` if none becomes free."""
        async with asyncio.timeout(SLOT_WAIT_SECONDS if self._slots.locked() else None):
            await self._slots.acquire()
        try:
            return await self.breaker.call(_run_command, seconds, command, client)
        finally:
            self._slots.release()

    async def delete_matching(self, pattern: str) -> int:
        """Delete the gateway's keys that match the glob `pattern`, and return their number.

        Scans and deletes in small steps, so that Redis is not blocked.
        """
        return await self.run("clear", partial(_delete_matching, PREFIX + pattern), DELETE_SECONDS)

    async def ping(self) -> None:
        """Send a command, so that the breaker follows the state of Redis without requests.

        Then wait for `PING_SECONDS`.
        """
        with contextlib.suppress(RedisUnavailable):
            # No request waits for a ping, and a cluster may need several answers.
            await self.run("ping", _check, seconds=1)
        await asyncio.sleep(PING_SECONDS)

    @contextlib.asynccontextmanager
    async def pubsub(self) -> AsyncIterator[PubSub]:
        """Open a pub/sub connection that does not use the pool of the commands.

        Raises `RedisUnavailable` if Redis is down, and when the connection is lost.
        """
        if not self.up:
            raise RedisUnavailable("not configured, or its breaker is not closed")
        # A new client reads the current servers of a cluster.
        client = _create_client(self._address, self._timeout)
        try:
            if isinstance(client, RedisCluster):
                await client.initialize()
            async with client.pubsub() as pubsub:
                yield pubsub
        except (RedisError, RedisClusterException, OSError, TimeoutError) as error:
            log.debug("redis pub/sub ended", extra={"error": type(error).__name__})
            raise RedisUnavailable(type(error).__name__) from None
        finally:
            await _close(client)

    async def close(self) -> None:
        """Close all connections."""
        if self.client is not None:
            await _close(self.client)


def _create_client(address: str, timeout: float) -> RedisClient:
    scheme, _, rest = address.partition("://")
    if "+" not in scheme:
        return Redis.from_url(address, **_limits(timeout))
    hosts = [parse_url(url) for url in split_hosts(address)]
    access: dict[str, Any] = {name: hosts[0].get(name) for name in ("username", "password")}
    access["ssl"] = scheme.startswith("rediss")
    if scheme.endswith("+cluster"):
        nodes = [ClusterNode(host["host"], host.get("port", 6379)) for host in hosts]
        # Not dynamic: the client asks the hosts of the URL for the current nodes, whose addresses
        # may have changed.
        limits = _limits(timeout * NODE_SHARE)
        cluster = RedisCluster(startup_nodes=nodes, dynamic_startup_nodes=False, **limits, **access)
        cluster.commands_parser = _FirstArgument()  # type: ignore[assignment]
        return cluster
    name, _, database = rest.partition("/")[2].partition("/")
    access["db"] = int(database.strip("/") or 0)
    limits = _limits(timeout * NODE_SHARE, retries=0) | {"ssl": access["ssl"]}
    addresses = [(host["host"], host.get("port", 26379)) for host in hosts]
    # The client asks the Sentinels for the primary `name` for each new connection.
    sentinel = Sentinel(addresses, sentinel_kwargs=limits)  # type: ignore[no-untyped-call]
    primary: Redis = sentinel.master_for(name, **_limits(timeout), **access)
    return primary


def _limits(seconds: float, retries: int = 1) -> dict[str, Any]:
    """Return the options that limit the duration of a command.

    The default options of redis-py wait 58 seconds for a frozen server. One retry is needed for
    connections that a restart of Redis has closed.
    """
    return {
        "max_connections": MAX_COMMANDS + 10,  # per server; an exhausted pool raises an error
        "socket_timeout": seconds,
        "socket_connect_timeout": seconds,
        "retry": Retry(NoBackoff(), retries),
    }


class _FirstArgument:
    """Finds the key of a command: all commands of the gateway have it as the first argument.

    redis-py's own parser reads the server's table of commands, which is the server's longest
    answer, each time the client discovers the cluster.
    """

    async def initialize(self, node: ClusterNode | None = None) -> None:
        """Do nothing: there is nothing to read."""

    async def get_keys(self, *command: Any) -> list[Any]:
        """Return the key of a command."""
        return [command[1]]


async def _close(client: RedisClient) -> None:
    if isinstance(client, RedisCluster):
        # RedisCluster.aclose() does not close the nodes that the client no longer uses.
        await client.nodes_manager.aclose()
        await client.nodes_manager.aclose("startup_nodes")
    elif isinstance(client.connection_pool, SentinelConnectionPool):
        await client.connection_pool.sentinel_manager.aclose()
    await client.aclose()


async def _run_command(seconds: float, command: Command[T], client: RedisClient) -> T:
    # The timeout is inside the breaker's call. Outside, it would look like a cancelled caller.
    async with asyncio.timeout(seconds):
        cancellations = _count_cancellations()
        if isinstance(client, RedisCluster):
            await client.initialize()  # before the client chooses the node of its first command
        result = await command(client)
        # Before Python 3.12, `asyncio.wait_for` in redis-py may swallow a cancellation. Without
        # this check, a loop that uses Redis, and so the process, would never end.
        if _count_cancellations() > cancellations:
            raise asyncio.CancelledError
        return result


def _count_cancellations() -> int:
    task = asyncio.current_task()
    return task.cancelling() if task is not None else 0


async def _check(client: RedisClient) -> None:
    """Raise `RedisError` unless Redis can be used."""
    try:
        await client.get(PREFIX)  # nodes of a broken cluster still answer PING
    except ResponseError as error:  # any error reply means that Redis is unavailable
        raise RedisError(type(error).__name__) from None


async def _delete_matching(pattern: str, client: RedisClient) -> int:
    keys = [key async for key in client.scan_iter(match=pattern, count=DELETE_KEYS)]
    removed = 0
    for start in range(0, len(keys), DELETE_KEYS):
        removed += await client.unlink(*keys[start : start + DELETE_KEYS])
    return removed


def _log_change(old: str, new: str, cause: str | None) -> None:
    level = logging.WARNING if new == "open" else logging.INFO
    log.log(level, "redis breaker changed", extra={"from": old, "to": new, "cause": cause})
