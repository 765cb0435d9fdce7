"""Redis as a Sentinel and as a Cluster: real ones on loopback, named by nothing but their URL."""

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
from src.core.clock import SystemClock
from src.sandbox.server import Sandbox
from src.store.redis import BREAKER_MAX_OPEN_SECONDS, PREFIX, RedisAway, RedisStore
from src.streams.bus import Topic
from tests.conftest import FakeClock, Live, RedisServer, StartGateway, eventually, free_port
from tests.streams.test_hub import Join, inside, join, time_passes

__all__ = ["join"]  # a fixture

PASSWORD = "c4nary/p@ss:w,rd"
QUOTED = quote(PASSWORD, safe="")
NODE_LOST_MS = "2000"  # after this a node that does not answer is given up by the others
PRIMARY_LOST_MS = "3000"  # the same for a sentinel; with less it takes a primary for lost between two of its pings
TIMEOUT = 1.0  # seconds a command may take where servers are lost
SLOWEST = 10 * TIMEOUT  # an answer may take while servers are lost, on a busy machine; without a bound it is minutes
DATABASE = 2


class Server(RedisServer):
    """A Redis with a password."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self.port = free_port()
        self.folder = folder
        self._arguments = ("--requirepass", PASSWORD, "--masterauth", PASSWORD, "--dir", str(folder), *arguments)
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
    """A process that watches a primary, and makes its replica the primary when it is lost."""

    def __init__(self, folder: Path, primary: int) -> None:
        self.port = free_port()
        self.file = folder / "sentinel.conf"  # it writes into it
        self.file.write_text(
            f"port {self.port}\nbind 127.0.0.1\ndir {folder}\nsentinel monitor mymaster 127.0.0.1 {primary} 1\n"
            f"sentinel auth-pass mymaster {PASSWORD}\nsentinel down-after-milliseconds mymaster {PRIMARY_LOST_MS}\n"
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
    """Servers that one URL leads to; `servers` are those that hold data, primaries first."""

    def __init__(self, url: str, servers: list[Server], watchers: list[SentinelServer]) -> None:
        self.url = url
        self.servers = servers
        self.watchers = watchers
        self.lost: list[Server] = []  # killed or frozen

    def lose(self, server: Server, blow: str) -> None:
        getattr(server, blow)()
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
    """Join three primaries, and on demand a replica of the second, into a cluster; its URL begins with a dead host."""
    options = ("--cluster-enabled", "yes", "--cluster-node-timeout", NODE_LOST_MS)
    nodes: list[Server] = []
    group = Group("redis+cluster://", nodes, [])
    with ExitStack() as stack:
        for place in range(3 + replica):
            nodes.append(Server(folder, *options, "--cluster-config-file", f"{place}.conf"))
            stack.callback(nodes[-1].kill)
            nodes[-1].cluster("SET-CONFIG-EPOCH", place + 1)
            nodes[-1].cluster("MEET", "127.0.0.1", nodes[0].port)
            if place < 3:
                nodes[-1].cluster("ADDSLOTS", *range(16384 * place // 3, 16384 * (place + 1) // 3))
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
    """Start a primary, its replica and a sentinel; the URL begins with a dead host."""
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
        yield Group(f"redis+sentinel://:{QUOTED}@{hosts}/mymaster/{DATABASE}", [primary, replica], [watcher])


GROUPS = [pytest.param(make, marks=pytest.mark.xdist_group(make.__name__)) for make in (cluster, sentinel)]


@pytest.fixture(scope="session", params=GROUPS)
def shared_group(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Group]:
    with request.param(tmp_path_factory.mktemp("group")) as group:
        yield group


@pytest.fixture
def group(shared_group: Group) -> Group:
    """An empty cluster, then an empty primary behind a sentinel."""
    for server in shared_group.primaries():
        server.client.flushall()
    return shared_group


@pytest.fixture
def own_cluster(tmp_path: Path) -> Iterator[Group]:
    """A cluster whose nodes the test may lose; the second has a replica."""
    with cluster(tmp_path, replica=True) as group:
        yield group


@pytest.fixture
def own_sentinel(tmp_path: Path) -> Iterator[Group]:
    """A primary the test may lose."""
    with sentinel(tmp_path) as group:
        yield group


@pytest.fixture
def begin(start: StartGateway, clock: FakeClock) -> StartGateway:
    """Start a gateway that is sure to use its Redis: a machine busy with the start may take Redis for lost at first."""

    async def begin(**overrides: object) -> Live:
        live = await start(**overrides)
        if not live.gateway.store.up:
            clock.advance(BREAKER_MAX_OPEN_SECONDS)
            await until_it_works(live.gateway.store, PREFIX, clock)
        return live

    return begin


def symbols(live: Live, number: int) -> list[str]:
    return [market["symbol"] for market in live.gateway.markets.select("bybit", None, "USDT")][:number]


async def ask(live: Live, wanted: list[str]) -> float:
    """Ask for all symbols at once, one by one and in a batch; all have to be answered. Returns the slowest's time."""

    async def timed(path: str) -> float:
        began = time.perf_counter()
        answer = await live.get(path)
        assert answer.status_code == 200, answer.text
        assert not answer.json().get("errors")
        assert not answer.json().get("stale")
        return time.perf_counter() - began

    paths = [f"/ticker/{symbol}?exchange=bybit" for symbol in wanted]
    return max(await asyncio.gather(*map(timed, [*paths, f"/tickers?symbols={','.join(wanted)}&exchange=bybit"])))


async def found_in_redis(begin: StartGateway, url: str, wanted: list[str]) -> bool:
    """Whether a gateway that just started finds all of them in Redis."""
    other = await begin(redis_url=url)
    answers = [await other.get(f"/ticker/{symbol}?exchange=bybit") for symbol in wanted]
    return all("hit; detail=redis" in answer.headers["Cache-Status"] for answer in answers)


async def comes_back(live: Live, clock: FakeClock, wanted: list[str], group: Group) -> None:
    """Ask on until every value reaches Redis again. The breaker's time flies; the servers' does not."""
    async with asyncio.timeout(120):
        while True:
            for server in group.primaries():
                server.client.flushall()
            clock.advance(BREAKER_MAX_OPEN_SECONDS)
            assert await ask(live, wanted) < SLOWEST
            if live.gateway.store.up:
                with suppress(TimeoutError):
                    await eventually(lambda: len(group.keys(f"{PREFIX}data:*")) == len(wanted), seconds=2)
                    return


async def works(store: RedisStore, key: str) -> bool:
    """Whether a short command gets through; it has no more time than those of requests."""
    try:
        await store.run("get", lambda redis: redis.get(key))
    except RedisAway:
        return False
    return True


async def until_it_works(store: RedisStore, key: str, clock: FakeClock) -> None:
    """Try until a command gets through. The breaker's time flies; the servers' does not."""
    async with asyncio.timeout(120):
        while not await works(store, key):
            clock.advance(BREAKER_MAX_OPEN_SECONDS)


async def test_replicas_share_what_one_of_them_loaded(begin: StartGateway, group: Group, sandbox: Sandbox) -> None:
    """What one gateway loaded, alone or in a batch, others find in Redis, wherever it lies there."""
    live = await begin(redis_url=group.url)
    wanted = symbols(live, 12)
    await ask(live, wanted)
    await eventually(lambda: len(group.keys(f"{PREFIX}data:*")) == 12)
    assert all(group.on(server, f"{PREFIX}data:*") for server in group.primaries()), "the keys should be on all nodes"
    assert await found_in_redis(begin, group.url, wanted)
    other = await begin(redis_url=group.url)
    batch = await other.get(f"/tickers?symbols={','.join(wanted)}&exchange=bybit")
    assert (len(batch.json()["tickers"]), sandbox.count("bybit")) == (12, 0)
    for server in group.primaries():  # a server's longest answer; no client needs it to find its way
        assert "cmdstat_command" not in server.client.info("commandstats")


async def test_replicas_load_a_cold_symbol_once(begin: StartGateway, group: Group, sandbox: Sandbox) -> None:
    """Three gateways asked for one cold symbol at once make one call, and all give its answer; no lock remains."""
    gateways = [await begin(redis_url=group.url) for _ in range(3)]
    await sandbox.set("bybit", latency_ms=100, rate_limit=-1)
    answers = await asyncio.gather(*(live.get("/ticker/BTC/USDT") for live in gateways * 5))
    assert sandbox.count("bybit", "tickers") == 1
    assert {answer.status_code for answer in answers} == {200}
    assert len({answer.content for answer in answers}) == 1
    await eventually(lambda: not group.keys(f"{PREFIX}lock:*"), seconds=15)  # by itself it goes after 30


async def test_replicas_share_one_budget(begin: StartGateway, group: Group, sandbox: Sandbox) -> None:
    """Three gateways together make no more calls than the budget of one allows."""
    gateways = [await begin(redis_url=group.url, bybit_budget="8/600") for _ in range(3)]
    wanted = symbols(gateways[0], 18)
    answers = []
    for place in range(0, 18, 3):
        paths = [f"/ticker/{symbol}?exchange=bybit" for symbol in wanted[place : place + 3]]
        answers += await asyncio.gather(*(live.get(path) for live, path in zip(gateways, paths, strict=True)))
    codes = [answer.json().get("code", "answered") for answer in answers]
    assert set(codes) == {"answered", "budget_spent"}
    assert codes.count("answered") == sandbox.count("bybit")
    assert sandbox.count("bybit") == 8


async def test_one_replicas_ban_stops_them_all(begin: StartGateway, group: Group, sandbox: Sandbox) -> None:
    """When an exchange bans one gateway the others do not ask it either, and say why."""
    gateways = [await begin(redis_url=group.url) for _ in range(3)]
    await sandbox.set("bybit", status=418, headers={"Retry-After": "300"})
    await gateways[0].get("/ticker/BTC/USDT?exchange=bybit")
    await sandbox.set("bybit", rate_limit=-1)
    sandbox.clear_counts()
    for live in gateways[1:]:
        told = (await live.get("/ticker/ETH/USDT?exchange=bybit")).json()
        assert (told["code"], 290 < told["retry_after"] <= 300) == ("exchange_banned", True)
    assert sandbox.count("bybit") == 0


async def test_one_replica_watches_for_all(
    begin: StartGateway, group: Group, sandbox: Sandbox, clock: FakeClock, join: Join
) -> None:
    """Clients of two gateways get the same updates of each symbol, and one of the gateways alone watches it."""
    await sandbox.set("kraken", push_ms=50)
    lives = [await begin(redis_url=group.url) for _ in range(2)]
    clients = [await join(live) for live in lives]
    names = ["BTC/USDT", "ETH/USDT", "SOL/USDT", "BTC/USD"]
    topics = [Topic("kraken", "ticker", name) for name in names]
    for client in clients:
        await client.subscribe(*names, exchange="kraken")

    def held(topic: Topic) -> list[bool]:
        return sorted(inside(live).topics[topic].held for live in lives)

    async with time_passes(clock):  # a busy machine may take Redis for lost for a while: then both watch
        await eventually(lambda: all(held(topic) == [False, True] for topic in topics), seconds=30)
    assert all(group.keys(topic.redis("lease")) for topic in topics)
    for client in clients:
        client.got.clear()
        for name in names:
            await client.take("update", 5, symbol=name)
    got = [{(it["symbol"], it["seq"]): it["data"] for it in client.got if it["type"] == "update"} for client in clients]
    both = got[0].keys() & got[1].keys()
    assert {name for name, _ in both} == set(names)
    assert all(got[0][update] == got[1][update] for update in both)


async def test_a_clear_takes_all_of_ours_and_nothing_else(begin: StartGateway, group: Group) -> None:
    """A clear removes our entries from every node, those of one symbol where it is named, and no other key."""
    live = await begin(redis_url=group.url, admin_token="open-sesame", load_markets=True)
    wanted = symbols(live, 12)
    await ask(live, wanted)
    await eventually(lambda: len(group.keys(f"{PREFIX}data:*")) == 12 and len(group.keys(f"{PREFIX}markets:*")) == 3)
    for server in group.primaries():
        for name in ("session:", f"x{PREFIX}data:"):
            for place in range(30):
                with suppress(redis_py.ResponseError):  # it lies on another node
                    server.client.set(f"{name}{place}", "1")
    kept = group.keys() - group.keys(f"{PREFIX}data:*") | {CLEARS}
    assert len(kept) > 60

    async def clear(query: str) -> Any:
        admin = {"Authorization": "Bearer open-sesame"}
        return (await live.client.post(f"{live.url}/admin/cache/clear{query}", headers=admin)).json()

    assert await clear(f"?symbol={wanted[0]}") == {"cleared": 1, "redis": "cleared"}
    assert len(group.keys(f"{PREFIX}data:*")) == 11
    assert await clear("") == {"cleared": 11, "redis": "cleared"}
    assert group.keys() == kept


async def test_a_clear_reaches_the_other_replicas(begin: StartGateway, group: Group, clock: FakeClock) -> None:
    """What one gateway clears another one forgets."""
    lives = [await begin(redis_url=group.url) for _ in range(2)]
    wanted = symbols(lives[0], 3)
    for live in lives:
        await ask(live, wanted)
    memory = lives[1].gateway.cache.memory
    assert len(memory.keys()) == 3
    async with time_passes(clock):  # a busy machine may take Redis for lost for a while
        while True:
            with suppress(RedisAway):
                await lives[0].gateway.cache.clear("bybit", wanted[0])
                break
            await asyncio.sleep(0.1)
        await eventually(lambda: wanted[0] not in {key.symbol for key in memory.keys()})  # noqa: SIM118 - a method


async def test_a_restart_begins_with_what_is_there(begin: StartGateway, group: Group, sandbox: Sandbox) -> None:
    """A gateway that starts finds the market lists and the times of maintenance in Redis, and asks no exchange."""
    first = await begin(redis_url=group.url, admin_token="open-sesame", load_markets=True)
    await eventually(lambda: len(group.keys(f"{PREFIX}markets:*")) == 3)
    admin = {"Authorization": "Bearer open-sesame"}
    assert (await first.client.post(f"{first.url}/admin/maintenance/daily", headers=admin)).status_code == 200
    second = await begin(redis_url=group.url, wait=False)
    await eventually(lambda: len(second.gateway.markets.loaded_at) == 3)
    assert [sandbox.count(name) for name in ("bybit", "binance", "kraken")] == [0, 0, 0]
    await second.gateway._recall_maintenance()  # as it did when it started, if the machine was not too busy
    assert second.gateway.maintenance == first.gateway.maintenance


@pytest.mark.parametrize("blow", ["kill", "freeze"])
async def test_a_cluster_that_lost_a_part_loses_no_answer(
    begin: StartGateway, own_cluster: Group, clock: FakeClock, blow: str
) -> None:
    """Without one of its parts a cluster answers nothing; the gateway does, soon, and uses it once it is whole."""
    live = await begin(
        redis_url=own_cluster.url, ticker_ttl_seconds=10, stale_seconds=600, redis_timeout_seconds=TIMEOUT
    )
    wanted = symbols(live, 12)
    await ask(live, wanted)
    lost = own_cluster.servers[2]
    own_cluster.lose(lost, blow)
    rest = own_cluster.servers[:2]
    for _ in range(3):
        clock.advance(BREAKER_MAX_OPEN_SECONDS)
        assert await ask(live, wanted) < SLOWEST
    await eventually(lambda: all("cluster_state:fail" in node.cluster("INFO") for node in rest))
    for _ in range(3):
        clock.advance(BREAKER_MAX_OPEN_SECONDS)
        assert await ask(live, wanted) < SLOWEST
    assert not live.gateway.store.up
    own_cluster.lost.clear()
    lost.thaw() if blow == "freeze" else lost.start()
    await eventually(own_cluster.is_whole)
    await comes_back(live, clock, wanted, own_cluster)
    assert await found_in_redis(begin, own_cluster.url, wanted)


@pytest.mark.parametrize(("kind", "blow"), [("own_sentinel", "kill"), ("own_cluster", "freeze")])
async def test_after_a_failover_the_new_primary_is_used(
    begin: StartGateway, request: pytest.FixtureRequest, clock: FakeClock, kind: str, blow: str
) -> None:
    """When a replica takes over, the gateway finds it without a restart, and no answer is lost meanwhile."""
    group: Group = request.getfixturevalue(kind)
    live = await begin(redis_url=group.url, ticker_ttl_seconds=10, stale_seconds=600, redis_timeout_seconds=TIMEOUT)
    wanted = symbols(live, 12)
    await ask(live, wanted)
    lost, heir = group.servers if kind == "own_sentinel" else group.servers[1::2]
    await eventually(lambda: group.on(lost, f"{PREFIX}data:*"))
    store, key = RedisStore(group.url, clock, TIMEOUT), group.on(lost, f"{PREFIX}data:*").pop()
    await until_it_works(store, key, clock)
    group.lose(lost, blow)
    assert not await works(store, key)
    clock.advance(BREAKER_MAX_OPEN_SECONDS)
    assert await ask(live, wanted) < SLOWEST
    await eventually(lambda: heir.client.info("replication")["role"] == "master")
    await until_it_works(store, key, clock)
    await store.close()
    await comes_back(live, clock, wanted, group)
    assert group.on(heir, f"{PREFIX}data:*")
    assert await found_in_redis(begin, group.url, wanted)


async def test_a_cluster_that_is_down_does_not_look_up(own_cluster: Group, clock: FakeClock) -> None:
    """What is left of a cluster still answers, but is not taken for one; and closing closes all there is."""
    store, hosts = RedisStore(own_cluster.url, clock, TIMEOUT), own_cluster.url.rpartition("@")[2]
    client = store.client
    assert isinstance(client, RedisCluster)
    assert all([await works(store, str(place)) for place in range(30)])
    own_cluster.lose(own_cluster.servers[2], "kill")
    assert not all([await works(store, str(place)) for place in range(30)])
    assert ",".join(client.nodes_manager.startup_nodes) == hosts, "the hosts of the URL are asked as long as it runs"
    await store.close()
    nodes = [*client.get_nodes(), *client.nodes_manager.startup_nodes.values()]
    assert not any(connection.is_connected for node in nodes for connection in node._connections)
    await eventually(lambda: "cluster_state:fail" in own_cluster.servers[0].cluster("INFO"))
    other = RedisStore(own_cluster.url, clock, TIMEOUT)
    asking = asyncio.create_task(other.keep_asking())
    await eventually(lambda: not other.up)
    asking.cancel()
    await other.close()


@pytest.mark.parametrize(
    "url",
    [
        "redis+cluster://:{password}@127.0.0.1:{nobody},127.0.0.1:{nobody}",
        "redis+cluster://:{password}@127.0.0.1:{single}",
        "redis+cluster://127.0.0.1:{single}",
        "redis+sentinel://:{password}@127.0.0.1:{nobody},127.0.0.1:{nobody}/mymaster",
        "redis+sentinel://:{password}@127.0.0.1:{sentinel}/another",
        "redis+sentinel://:{password}@127.0.0.1:{single}/mymaster",
        "redis+sentinel://:not-{password}@127.0.0.1:{sentinel}/mymaster",
    ],
)
async def test_whatever_is_wrong_is_only_redis_away(
    request: pytest.FixtureRequest, redis: RedisServer, url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A wrong address, server, name or password is as any other loss of Redis, and never told with the password."""
    caplog.set_level(logging.DEBUG)
    ports = {"nobody": free_port(), "single": redis.port, "password": QUOTED}
    if "{sentinel}" in url:
        ports["sentinel"] = request.getfixturevalue("own_sentinel").watchers[0].port
    clock = FakeClock()
    store, said = RedisStore(url.format(**ports), clock, TIMEOUT), []
    assert store.client is not None
    for operation in (store.client.get, store.client.unlink):
        clock.advance(BREAKER_MAX_OPEN_SECONDS)
        began = time.perf_counter()
        with pytest.raises(RedisAway) as away:
            await store.run("test", lambda _: operation(PREFIX))  # noqa: B023 - run at once
        assert time.perf_counter() - began < SLOWEST
        said += [repr(away.value), repr(store), repr(store.client)]
    clock.advance(BREAKER_MAX_OPEN_SECONDS)
    asking = asyncio.create_task(store.keep_asking())
    await eventually(lambda: not store.up)
    asking.cancel()
    await store.close()
    assert "c4nary" not in "".join(said) + caplog.text


@pytest.mark.parametrize("url", ["redis+cluster://127.0.0.1:{}", "redis+sentinel://127.0.0.1:{}/mymaster"])
async def test_nothing_connects_before_it_is_asked(url: str) -> None:
    """Making a store needs no server."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        store = RedisStore(url.format(listener.getsockname()[1]), SystemClock())
        with pytest.raises(BlockingIOError):
            listener.accept()
        await store.close()
