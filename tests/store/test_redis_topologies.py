"""Redis behind Sentinels and as a Redis Cluster, with real servers on loopback."""

import asyncio
import logging
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from itertools import chain
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import redis as redis_py
from redis.asyncio import RedisCluster
from redis.exceptions import RedisError

from src.cache.redis_tier import CLEARS
from src.core.background import repeat
from src.core.clock import SystemClock
from src.sandbox.server import Sandbox
from src.store.redis import BREAKER_MAX_OPEN_SECONDS, PREFIX, RedisStore, RedisUnavailable
from src.streams.topics import Topic
from tests.conftest import FakeClock, Live, RedisServer, StartGateway, eventually, free_port
from tests.streams.test_hub import Join, inside, join, time_passes

__all__ = ["join"]  # a fixture

PASSWORD = "c4nary/p@ss:w,rd"
QUOTED = quote(PASSWORD, safe="")
NODE_LOST_MS = "2000"  # other nodes give up a node that does not answer for this time
PRIMARY_LOST_MS = "3000"  # the same for a Sentinel; longer than the pause between its pings
TIMEOUT = 1.0  # seconds, for commands in tests that lose servers
SLOWEST = 10 * TIMEOUT  # longest duration of an answer in such tests; unbounded it would be minutes
DATABASE = 2


class Server(RedisServer):
    """A Redis with a password."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self.port = free_port()
        self.folder = folder
        self._arguments = (
            "--requirepass",
            PASSWORD,
            "--masterauth",
            PASSWORD,
            "--dir",
            str(folder),
            *arguments,
        )
        self.start()

    def _answers(self) -> bool:
        self.client.close()
        self.client = redis_py.Redis(port=self.port, password=PASSWORD, db=self._database)
        return super()._answers()

    @property
    def _database(self) -> int:
        return 0 if "--cluster-enabled" in self._arguments else DATABASE

    def cluster(self, *arguments: object) -> str:
        return as_text(self.client.execute_command("CLUSTER", *arguments))  # type: ignore[no-untyped-call]


class SentinelServer(RedisServer):
    """A Sentinel that monitors one primary, and is enough for a failover."""

    def __init__(self, folder: Path, primary: int) -> None:
        self.port = free_port()
        self.file = folder / "sentinel.conf"  # the Sentinel writes to it
        self.file.write_text(
            f"port {self.port}\nbind 127.0.0.1\ndir {folder}\n"
            f"sentinel monitor mymaster 127.0.0.1 {primary} 1\n"
            f"sentinel auth-pass mymaster {PASSWORD}\n"
            f"sentinel down-after-milliseconds mymaster {PRIMARY_LOST_MS}\n"
            "sentinel failover-timeout mymaster 2000\n"
        )
        self.start()

    def start(self) -> None:
        command = [str(self.program), str(self.file), "--sentinel"]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        self.client = redis_py.Redis(port=self.port)
        wait_for(self._answers)

    def replicas(self) -> int:
        return len(self.client.sentinel_slaves("mymaster"))


class Group:
    """The servers behind one URL. `servers` are those with data, primaries first."""

    def __init__(self, url: str, servers: list[Server], watchers: list[SentinelServer]) -> None:
        self.url = url
        self.servers = servers
        self.watchers = watchers
        self.lost: list[Server] = []  # killed or frozen

    def lose(self, server: Server, failure: str) -> None:
        getattr(server, failure)()
        self.lost.append(server)

    def on(self, server: Server, pattern: str = "*") -> set[str]:
        return {as_text(key) for key in server.client.keys(pattern)}

    def primaries(self) -> list[Server]:
        alive = [server for server in self.servers if server not in self.lost]
        return [server for server in alive if server.client.info("replication")["role"] == "master"]

    def keys(self, pattern: str = "*") -> set[str]:
        return set(chain.from_iterable(self.on(server, pattern) for server in self.primaries()))

    def is_whole(self) -> bool:
        try:
            return all("cluster_state:ok" in server.cluster("INFO") for server in self.servers)
        except RedisError:
            return False


def as_text(raw: object) -> str:
    return raw.decode() if isinstance(raw, bytes) else str(raw)


def wait_for(predicate: Callable[[], object]) -> None:
    deadline = time.monotonic() + 120
    while not predicate():
        assert time.monotonic() < deadline, "the servers did not get ready"
        time.sleep(0.01)


@contextmanager
def cluster(folder: Path, *, replica: bool = False) -> Iterator[Group]:
    """Start a cluster of three primaries, and optionally a replica of the second.

    The URL starts with a host that is down.
    """
    options = ("--cluster-enabled", "yes", "--cluster-node-timeout", NODE_LOST_MS)
    nodes: list[Server] = []
    group = Group("redis+cluster://", nodes, [])
    with ExitStack() as stack:
        for index in range(3 + replica):
            nodes.append(Server(folder, *options, "--cluster-config-file", f"{index}.conf"))
            stack.callback(nodes[-1].kill)
            nodes[-1].cluster("SET-CONFIG-EPOCH", index + 1)
            nodes[-1].cluster("MEET", "127.0.0.1", nodes[0].port)
            if index < 3:
                nodes[-1].cluster("ADDSLOTS", *range(16384 * index // 3, 16384 * (index + 1) // 3))
        wait_for(group.is_whole)
        if replica:
            wait_for(lambda: nodes[1].cluster("MYID") in nodes[3].cluster("NODES"))
            nodes[3].cluster("REPLICATE", nodes[1].cluster("MYID"))
            wait_for(lambda: nodes[3].client.info("replication").get("master_link_status") == "up")
            wait_for(lambda: all("slave" in node.cluster("NODES") for node in nodes))
        hosts = [f"127.0.0.1:{port}" for port in (free_port(), *(node.port for node in nodes[:3]))]
        group.url = f"redis+cluster://:{QUOTED}@{','.join(hosts)}"
        yield group


@contextmanager
def sentinel(folder: Path) -> Iterator[Group]:
    """Start a primary, its replica and a Sentinel. The URL starts with a host that is down."""
    with ExitStack() as stack:
        primary = Server(folder)
        stack.callback(primary.kill)
        replica = Server(folder, "--replicaof", "127.0.0.1", str(primary.port))
        stack.callback(replica.kill)
        wait_for(lambda: replica.client.info("replication")["master_link_status"] == "up")
        watcher = SentinelServer(folder, primary.port)
        stack.callback(watcher.kill)
        wait_for(watcher.replicas)
        hosts = f"127.0.0.1:{free_port()},127.0.0.1:{watcher.port}"
        yield Group(
            f"redis+sentinel://:{QUOTED}@{hosts}/mymaster/{DATABASE}", [primary, replica], [watcher]
        )


GROUPS = [
    pytest.param(make, marks=pytest.mark.xdist_group(make.__name__)) for make in (cluster, sentinel)
]


@pytest.fixture(scope="session", params=GROUPS)
def shared_group(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Group]:
    with request.param(tmp_path_factory.mktemp("group")) as group:
        yield group


@pytest.fixture
def group(shared_group: Group) -> Group:
    """An empty cluster, then an empty primary behind a Sentinel."""
    for server in shared_group.primaries():
        server.client.flushall()
    return shared_group


@pytest.fixture
def own_cluster(tmp_path: Path) -> Iterator[Group]:
    """A cluster with nodes that the test may kill or freeze. The second has a replica."""
    with cluster(tmp_path, replica=True) as group:
        yield group


@pytest.fixture
def own_sentinel(tmp_path: Path) -> Iterator[Group]:
    """A primary that the test may kill or freeze."""
    with sentinel(tmp_path) as group:
        yield group


@pytest.fixture
def begin(start: StartGateway, clock: FakeClock) -> StartGateway:
    """Start a gateway that uses Redis. On a busy machine, Redis may seem down at first."""

    async def begin(**overrides: object) -> Live:
        live = await start(**overrides)
        if not live.gateway.store.up:
            clock.advance(BREAKER_MAX_OPEN_SECONDS)
            await until_it_works(live.gateway.store, PREFIX, clock)
        return live

    return begin


def symbols(live: Live, number: int) -> list[str]:
    return [market["symbol"] for market in live.gateway.markets.select("bybit", None, "USDT")][
        :number
    ]


async def request_all(live: Live, wanted: list[str]) -> float:
    """Request all symbols concurrently, singly and in a batch, and return the longest duration."""

    async def timed(path: str) -> float:
        started = time.perf_counter()
        answer = await live.get(path)
        assert answer.status_code == 200, answer.text
        assert not answer.json().get("errors")
        assert not answer.json().get("stale")
        return time.perf_counter() - started

    paths = [f"/ticker/{symbol}?exchange=bybit" for symbol in wanted]
    return max(
        await asyncio.gather(
            *map(timed, [*paths, f"/tickers?symbols={','.join(wanted)}&exchange=bybit"])
        )
    )


async def are_found_in_redis(begin: StartGateway, url: str, wanted: list[str]) -> bool:
    """Return True if a new gateway finds all symbols in Redis."""
    second = await begin(redis_url=url)
    answers = [await second.get(f"/ticker/{symbol}?exchange=bybit") for symbol in wanted]
    return all("hit; detail=redis" in answer.headers["Cache-Status"] for answer in answers)


async def wait_for_recovery(live: Live, clock: FakeClock, wanted: list[str], group: Group) -> None:
    """Send requests until all values reach Redis again. The breaker's clock is advanced."""
    async with asyncio.timeout(120):
        while True:
            for server in group.primaries():
                server.client.flushall()
            clock.advance(BREAKER_MAX_OPEN_SECONDS)
            assert await request_all(live, wanted) < SLOWEST
            if live.gateway.store.up:
                with suppress(TimeoutError):
                    await eventually(
                        lambda: len(group.keys(f"{PREFIX}data:*")) == len(wanted), seconds=2
                    )
                    return


async def works(store: RedisStore, key: str) -> bool:
    """Return True if a command succeeds within the timeout of requests."""
    try:
        await store.run("get", lambda redis: redis.get(key))
    except RedisUnavailable:
        return False
    return True


async def until_it_works(store: RedisStore, key: str, clock: FakeClock) -> None:
    """Repeat a command until it succeeds. The breaker's clock is advanced."""
    async with asyncio.timeout(120):
        while not await works(store, key):
            clock.advance(BREAKER_MAX_OPEN_SECONDS)


async def test_replicas_share_loaded_values(
    begin: StartGateway, group: Group, sandbox: Sandbox
) -> None:
    """Other gateways find loaded values in Redis, on any node of a cluster."""
    live = await begin(redis_url=group.url)
    wanted = symbols(live, 12)
    await request_all(live, wanted)
    await eventually(lambda: len(group.keys(f"{PREFIX}data:*")) == 12)
    assert all(group.on(server, f"{PREFIX}data:*") for server in group.primaries()), (
        "the keys should be on all nodes"
    )
    assert await are_found_in_redis(begin, group.url, wanted)
    second = await begin(redis_url=group.url)
    batch = await second.get(f"/tickers?symbols={','.join(wanted)}&exchange=bybit")
    assert (len(batch.json()["tickers"]), sandbox.count("bybit")) == (12, 0)
    # COMMAND has the longest answer of a server. Clients do not need it.
    for server in group.primaries():
        assert "cmdstat_command" not in server.client.info("commandstats")


async def test_replicas_load_a_cold_symbol_once(
    begin: StartGateway, group: Group, sandbox: Sandbox
) -> None:
    """Concurrent requests to three gateways share one upstream call. No lock remains."""
    gateways = [await begin(redis_url=group.url) for _ in range(3)]
    await sandbox.set("bybit", latency_ms=100, rate_limit=-1)
    answers = await asyncio.gather(*(live.get("/ticker/BTC/USDT") for live in gateways * 5))
    assert sandbox.count("bybit", "tickers") == 1
    assert {answer.status_code for answer in answers} == {200}
    assert len({answer.content for answer in answers}) == 1
    # Without a release, the lock expires after 30 seconds.
    await eventually(lambda: not group.keys(f"{PREFIX}lock:*"), seconds=15)


async def test_replicas_share_one_budget(
    begin: StartGateway, group: Group, sandbox: Sandbox
) -> None:
    """Three gateways together make no more calls than the budget of one allows."""
    gateways = [await begin(redis_url=group.url, bybit_budget="8/600") for _ in range(3)]
    wanted = symbols(gateways[0], 18)
    answers = []
    for index in range(0, 18, 3):
        paths = [f"/ticker/{symbol}?exchange=bybit" for symbol in wanted[index : index + 3]]
        answers += await asyncio.gather(
            *(live.get(path) for live, path in zip(gateways, paths, strict=True))
        )
    codes = [answer.json().get("code", "answered") for answer in answers]
    assert set(codes) == {"answered", "budget_spent"}
    assert codes.count("answered") == sandbox.count("bybit")
    assert sandbox.count("bybit") == 8


async def test_ban_of_one_replica_stops_all(
    begin: StartGateway, group: Group, sandbox: Sandbox
) -> None:
    """After a ban of one gateway, others do not call the exchange. Their error has the cause."""
    gateways = [await begin(redis_url=group.url) for _ in range(3)]
    await sandbox.set("bybit", status=418, headers={"Retry-After": "300"})
    await gateways[0].get("/ticker/BTC/USDT?exchange=bybit")
    await sandbox.set("bybit", rate_limit=-1)
    sandbox.clear_counts()
    for live in gateways[1:]:
        problem = (await live.get("/ticker/ETH/USDT?exchange=bybit")).json()
        assert (problem["code"], 290 < problem["retry_after"] <= 300) == ("exchange_banned", True)
    assert sandbox.count("bybit") == 0


async def test_one_replica_subscribes_for_all(
    begin: StartGateway, group: Group, sandbox: Sandbox, clock: FakeClock, join: Join
) -> None:
    """Clients of two gateways get the same updates, from one upstream stream per symbol."""
    await sandbox.set("kraken", push_ms=50)
    lives = [await begin(redis_url=group.url) for _ in range(2)]
    clients = [await join(live) for live in lives]
    names = ["BTC/USDT", "ETH/USDT", "SOL/USDT", "BTC/USD"]
    topics = [Topic("kraken", "ticker", name) for name in names]
    for client in clients:
        await client.subscribe(*names, exchange="kraken")

    def held(topic: Topic) -> list[bool]:
        return sorted(inside(live).topics[topic].held for live in lives)

    async with time_passes(clock):  # on a busy machine, Redis may seem down: then both subscribe
        await eventually(lambda: all(held(topic) == [False, True] for topic in topics), seconds=30)
    assert all(group.keys(topic.redis_name("lease")) for topic in topics)
    for client in clients:
        client.got.clear()
        for name in names:
            await client.take("update", 5, symbol=name)
    got = [
        {
            (message["symbol"], message["seq"]): message["data"]
            for message in client.got
            if message["type"] == "update"
        }
        for client in clients
    ]
    both = got[0].keys() & got[1].keys()
    assert {name for name, _ in both} == set(names)
    assert all(got[0][update] == got[1][update] for update in both)


async def test_clear_deletes_only_entries_of_the_gateway(begin: StartGateway, group: Group) -> None:
    """A clear deletes the matching entries from every node, and no other key."""
    live = await begin(redis_url=group.url, admin_token="open-sesame", load_markets=True)
    wanted = symbols(live, 12)
    await request_all(live, wanted)
    await eventually(
        lambda: (
            len(group.keys(f"{PREFIX}data:*")) == 12 and len(group.keys(f"{PREFIX}markets:*")) == 3
        )
    )
    for server in group.primaries():
        for name in ("session:", f"x{PREFIX}data:"):
            for index in range(30):
                with suppress(redis_py.ResponseError):  # the key is on another node
                    server.client.set(f"{name}{index}", "1")
    kept = group.keys() - group.keys(f"{PREFIX}data:*") | {CLEARS}
    assert len(kept) > 60

    async def clear(query: str) -> Any:
        admin = {"Authorization": "Bearer open-sesame"}
        return (
            await live.client.post(f"{live.url}/admin/cache/clear{query}", headers=admin)
        ).json()

    assert await clear(f"?symbol={wanted[0]}") == {"cleared": 1, "redis": "cleared"}
    assert len(group.keys(f"{PREFIX}data:*")) == 11
    assert await clear("") == {"cleared": 11, "redis": "cleared"}
    assert group.keys() == kept


async def test_clear_reaches_other_replicas(
    begin: StartGateway, group: Group, clock: FakeClock
) -> None:
    """A replica forgets what another replica clears."""
    lives = [await begin(redis_url=group.url) for _ in range(2)]
    wanted = symbols(lives[0], 3)
    for live in lives:
        await request_all(live, wanted)
    memory = lives[1].gateway.cache.memory
    assert len(memory.keys()) == 3
    async with time_passes(clock):  # on a busy machine, Redis may seem down
        while True:
            with suppress(RedisUnavailable):
                await lives[0].gateway.cache.clear("bybit", wanted[0])
                break
            await asyncio.sleep(0.1)
        await eventually(lambda: wanted[0] not in {key.symbol for key in memory.keys()})  # noqa: SIM118 - a method


async def test_restarted_gateway_uses_data_in_redis(
    begin: StartGateway, group: Group, sandbox: Sandbox
) -> None:
    """A new gateway reads market lists and maintenance times from Redis and calls no exchange."""
    first = await begin(redis_url=group.url, admin_token="open-sesame", load_markets=True)
    await eventually(lambda: len(group.keys(f"{PREFIX}markets:*")) == 3)
    admin = {"Authorization": "Bearer open-sesame"}
    assert (
        await first.client.post(f"{first.url}/admin/maintenance/daily", headers=admin)
    ).status_code == 200
    second = await begin(redis_url=group.url, wait=False)
    await eventually(lambda: len(second.gateway.markets.loaded_at) == 3)
    assert [sandbox.count(name) for name in ("bybit", "binance", "kraken")] == [0, 0, 0]
    # As at its start, which may have failed on a busy machine.
    await second.gateway.recall_maintenance()
    assert second.gateway.maintenance == first.gateway.maintenance


@pytest.mark.parametrize("failure", ["kill", "freeze"])
async def test_all_requests_are_answered_while_a_cluster_is_incomplete(
    begin: StartGateway, own_cluster: Group, clock: FakeClock, failure: str
) -> None:
    """An incomplete cluster answers nothing. The gateway uses it again when it is complete."""
    live = await begin(
        redis_url=own_cluster.url,
        ticker_ttl_seconds=10,
        stale_seconds=600,
        redis_timeout_seconds=TIMEOUT,
    )
    wanted = symbols(live, 12)
    await request_all(live, wanted)
    lost = own_cluster.servers[2]
    own_cluster.lose(lost, failure)
    rest = own_cluster.servers[:2]
    for _ in range(3):
        clock.advance(BREAKER_MAX_OPEN_SECONDS)
        assert await request_all(live, wanted) < SLOWEST
    await eventually(lambda: all("cluster_state:fail" in node.cluster("INFO") for node in rest))
    for _ in range(3):
        clock.advance(BREAKER_MAX_OPEN_SECONDS)
        assert await request_all(live, wanted) < SLOWEST
    assert not live.gateway.store.up
    own_cluster.lost.clear()
    lost.thaw() if failure == "freeze" else lost.start()
    await eventually(own_cluster.is_whole)
    await wait_for_recovery(live, clock, wanted, own_cluster)
    assert await are_found_in_redis(begin, own_cluster.url, wanted)


@pytest.mark.parametrize(("kind", "failure"), [("own_sentinel", "kill"), ("own_cluster", "freeze")])
async def test_new_primary_is_used_after_a_failover(
    begin: StartGateway, request: pytest.FixtureRequest, clock: FakeClock, kind: str, failure: str
) -> None:
    """The gateway finds the new primary without a restart, and answers all requests meanwhile."""
    group: Group = request.getfixturevalue(kind)
    live = await begin(
        redis_url=group.url, ticker_ttl_seconds=10, stale_seconds=600, redis_timeout_seconds=TIMEOUT
    )
    wanted = symbols(live, 12)
    await request_all(live, wanted)
    lost, heir = group.servers if kind == "own_sentinel" else group.servers[1::2]
    await eventually(lambda: group.on(lost, f"{PREFIX}data:*"))
    store, key = RedisStore(group.url, clock, TIMEOUT), group.on(lost, f"{PREFIX}data:*").pop()
    await until_it_works(store, key, clock)
    group.lose(lost, failure)
    assert not await works(store, key)
    clock.advance(BREAKER_MAX_OPEN_SECONDS)
    assert await request_all(live, wanted) < SLOWEST
    await eventually(lambda: heir.client.info("replication")["role"] == "master")
    await until_it_works(store, key, clock)
    await store.close()
    await wait_for_recovery(live, clock, wanted, group)
    assert group.on(heir, f"{PREFIX}data:*")
    assert await are_found_in_redis(begin, group.url, wanted)


async def test_incomplete_cluster_is_down(own_cluster: Group, clock: FakeClock) -> None:
    """Nodes of a broken cluster still answer, but the store is down. Closing closes everything."""
    store, hosts = RedisStore(own_cluster.url, clock, TIMEOUT), own_cluster.url.rpartition("@")[2]
    client = store.client
    assert isinstance(client, RedisCluster)
    assert all([await works(store, str(index)) for index in range(30)])
    own_cluster.lose(own_cluster.servers[2], "kill")
    assert not all([await works(store, str(index)) for index in range(30)])
    assert ",".join(client.nodes_manager.startup_nodes) == hosts, (
        "the client keeps the hosts of the URL"
    )
    await store.close()
    nodes = [*client.get_nodes(), *client.nodes_manager.startup_nodes.values()]
    assert not any(connection.is_connected for node in nodes for connection in node._connections)
    await eventually(lambda: "cluster_state:fail" in own_cluster.servers[0].cluster("INFO"))
    second = RedisStore(own_cluster.url, clock, TIMEOUT)
    pinging = asyncio.create_task(repeat("redis", second.ping))
    await eventually(lambda: not second.up)
    pinging.cancel()
    await second.close()


@pytest.mark.parametrize(
    "url",
    [
        "redis+cluster://:{password}@127.0.0.1:{unused},127.0.0.1:{unused}",
        "redis+cluster://:{password}@127.0.0.1:{single}",
        "redis+cluster://127.0.0.1:{single}",
        "redis+sentinel://:{password}@127.0.0.1:{unused},127.0.0.1:{unused}/mymaster",
        "redis+sentinel://:{password}@127.0.0.1:{sentinel}/another",
        "redis+sentinel://:{password}@127.0.0.1:{single}/mymaster",
        "redis+sentinel://:not-{password}@127.0.0.1:{sentinel}/mymaster",
    ],
)
async def test_wrong_url_is_handled_as_an_outage(
    request: pytest.FixtureRequest, redis: RedisServer, url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A wrong address, server, name or password raises `RedisUnavailable`, without the password."""
    caplog.set_level(logging.DEBUG)
    ports = {"unused": free_port(), "single": redis.port, "password": QUOTED}
    if "{sentinel}" in url:
        ports["sentinel"] = request.getfixturevalue("own_sentinel").watchers[0].port
    clock = FakeClock()
    store, texts = RedisStore(url.format(**ports), clock, TIMEOUT), []
    assert store.client is not None
    for operation in (store.client.get, store.client.unlink):
        clock.advance(BREAKER_MAX_OPEN_SECONDS)
        started = time.perf_counter()
        with pytest.raises(RedisUnavailable) as caught:
            await store.run("test", lambda _: operation(PREFIX))  # noqa: B023 - run at once
        assert time.perf_counter() - started < SLOWEST
        texts += [repr(caught.value), repr(store), repr(store.client)]
    clock.advance(BREAKER_MAX_OPEN_SECONDS)
    pinging = asyncio.create_task(repeat("redis", store.ping))
    await eventually(lambda: not store.up)
    pinging.cancel()
    await store.close()
    assert "c4nary" not in "".join(texts) + caplog.text


@pytest.mark.parametrize(
    "url", ["redis+cluster://127.0.0.1:{}", "redis+sentinel://127.0.0.1:{}/mymaster"]
)
async def test_new_store_does_not_connect(url: str) -> None:
    """Creating a store needs no server."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        store = RedisStore(url.format(listener.getsockname()[1]), SystemClock())
        with pytest.raises(BlockingIOError):
            listener.accept()
        await store.close()
