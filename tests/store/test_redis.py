"""Redis as the second cache tier: shared values, and short delays without Redis."""

import asyncio
import contextlib
import gc
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field

import pytest

from src.cache import redis_tier
from src.cache.entry import Entry, Key
from src.cache.redis_tier import CLEARS, MAX_PENDING_WRITES, RedisTier
from src.core.clock import SystemClock
from src.core.errors import ExchangeUnavailable
from src.sandbox.server import Sandbox
from src.store.redis import PREFIX, RedisStore, RedisUnavailable
from tests.cache.test_cache import FAILURE, KEY, TTL, Bench, key, number
from tests.conftest import FakeClock, Live, RedisServer, StartGateway, eventually, sample

LOCK, DATA = KEY.redis_name("lock"), KEY.redis_name()
# Timeout of a frozen Redis in seconds, longer than a busy machine takes for an answer.
WAIT = 1.0


@pytest.fixture
async def bench(clock: FakeClock) -> AsyncIterator[Bench]:
    async with Bench.opened(clock) as bench:
        yield bench


@pytest.fixture
def full_redis() -> Iterator[RedisServer]:
    """A Redis that has one value of the gateway and rejects every write."""
    server = RedisServer("--maxmemory", "3mb", "--maxmemory-policy", "noeviction")
    yield server
    server.kill()


def commands(redis: RedisServer) -> int:
    """Count the commands that Redis ran for requests, not for tests and background checks."""
    stats: dict[str, dict[str, int]] = redis.client.info("commandstats")
    others = {"cmdstat_info", "cmdstat_ping", "cmdstat_get", "cmdstat_pubsub"}
    return sum(stat["calls"] for name, stat in stats.items() if name not in others)


def count_followers(redis: RedisServer) -> int:
    """Count the replicas that follow announcements of cleared entries."""
    ((_, count),) = redis.client.pubsub_numsub(CLEARS)
    return int(count)


def count_outcomes(outcome: str) -> float:
    """Count the commands with this outcome."""
    operations = ("get", "lock", "set", "budget")
    return sum(
        sample("cache_tier_operations_total", tier="redis", operation=operation, outcome=outcome)
        for operation in operations
    )


def names(redis: RedisServer) -> set[str]:
    """Return all keys except the count of clears."""
    return {name.decode() for name in redis.client.keys("*") if isinstance(name, bytes)} - {CLEARS}


async def wait_for_writes(bench: Bench) -> None:
    """Wait for the writes that run in the background."""
    for cache, _ in bench.made:
        await cache.redis.drain()


async def timed(bench: Bench, symbol: str) -> float:
    started = time.perf_counter()
    assert (await bench.ask(key(symbol)))[0] == "miss"
    return time.perf_counter() - started


async def request_many(live: Live, symbols: list[str]) -> set[int]:
    """Request each symbol three times concurrently and return the status codes."""
    paths = [f"/ticker/{symbol}" for symbol in symbols] * 3
    return {
        answer.status_code for answer in await asyncio.gather(*(live.get(path) for path in paths))
    }


async def test_memory_hit_sends_no_command_to_redis(
    start: StartGateway, redis: RedisServer
) -> None:
    """A fresh entry in memory is served without Redis."""
    live = await start(redis_url=redis.url)
    await live.get("/ticker/BTC/USDT")
    await eventually(lambda: redis.client.exists(DATA))
    await eventually(lambda: count_followers(redis) == 1)
    before = commands(redis)
    for _ in range(20):
        assert (
            (await live.get("/ticker/BTC/USDT"))
            .headers["Cache-Status"]
            .startswith("virtuoso; hit; detail=memory")
        )
    assert commands(redis) == before


async def test_redis_hit_keeps_its_age_in_memory(bench: Bench, redis: RedisServer) -> None:
    """An entry of another replica keeps its age, and its TTL counts from its load."""
    bench.make(redis_url=redis.url, stale_seconds=60)
    await bench.ask()
    await wait_for_writes(bench)
    assert 74_000 < redis.client.pttl(DATA) <= 75_000, (
        "kept for as long as it may be served as stale"
    )
    second = bench.make(redis_url=redis.url)
    bench.clock.advance(10)
    assert await bench.ask() == ("hit_redis", 1)
    bench.clock.advance(4.99)
    assert await bench.ask() == ("hit_memory", 1)
    entry = second.memory.find_fresh(KEY)
    assert entry is not None
    assert entry.age(bench.clock.monotonic()) == pytest.approx(14.99, abs=0.002)
    bench.clock.advance(0.01)
    assert await bench.ask() == ("miss", 2)


async def test_expired_redis_value_is_used_only_as_stale(bench: Bench, redis: RedisServer) -> None:
    """A new replica does not serve a value past its TTL as fresh, but has it if its load fails."""
    bench.make(redis_url=redis.url)
    await bench.ask()
    await wait_for_writes(bench)
    bench.clock.advance(TTL)
    bench.error, cache = FAILURE, bench.make(redis_url=redis.url)
    with pytest.raises(ExchangeUnavailable):
        await bench.ask()
    assert number(cache.find_stale(KEY)) == 1


async def test_max_age_applies_to_redis(bench: Bench, redis: RedisServer) -> None:
    """A value in Redis that is older than `max_age` is loaded again."""
    bench.make(redis_url=redis.url)
    await bench.ask()
    await wait_for_writes(bench)
    bench.clock.advance(5)
    for limit, expected in ((5.1, ("hit_redis", 1)), (4.9, ("miss", 2))):
        bench.make(redis_url=redis.url)
        assert await bench.ask(max_age=limit) == expected


@pytest.mark.parametrize(("seconds", "expected"), [(0.5, ("hit_redis", 1)), (100, ("miss", 2))])
async def test_value_from_a_clock_ahead_is_not_fresh_for_longer(
    bench: Bench, redis: RedisServer, seconds: float, expected: tuple[str, int]
) -> None:
    """A value from the near future counts as new. A value from the far future is a miss."""
    ahead = FakeClock()
    ahead.advance(seconds)
    bench.clock, ours = ahead, bench.clock
    bench.make(redis_url=redis.url)
    await bench.ask()
    await wait_for_writes(bench)
    bench.clock = ours
    bench.make(redis_url=redis.url)
    assert await bench.ask() == expected
    entry = bench.cache.memory.find_fresh(KEY)
    assert entry is not None
    assert entry.born == entry.received == ours.monotonic()


async def test_redis_is_used_after_the_memory_ttl(bench: Bench, redis: RedisServer) -> None:
    """An entry past the memory TTL but within its own TTL is read from Redis without a load."""
    bench.make(redis_url=redis.url, cache_memory_ttl=5)
    await bench.ask()
    await wait_for_writes(bench)
    bench.clock.advance(6)
    assert await bench.ask() == ("hit_redis", 1)


async def test_process_does_not_wait_for_its_own_lock(bench: Bench, redis: RedisServer) -> None:
    """A lock whose release was lost in an outage still belongs to the process."""
    cache = bench.make(redis_url=redis.url)
    redis.client.set(LOCK, cache.redis._token)
    assert await asyncio.wait_for(bench.ask(), 15) == ("miss", 1)


async def test_clear_is_not_undone_by_concurrent_reads(bench: Bench, redis: RedisServer) -> None:
    """Requests during a clear do not put the old value back into memory."""
    cache = bench.make(redis_url=redis.url)
    for _ in range(30):
        _, before = await bench.ask(max_age=0)
        await wait_for_writes(bench)
        await asyncio.gather(cache.clear(), *(bench.ask() for _ in range(4)))
        assert (await bench.ask())[1] > before


BROKEN: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda raw: b"",
    "truncated": lambda raw: raw[:-1],
    "cut in its head": lambda raw: raw[:20],
    "changed": lambda raw: raw.replace(b"1,", b"2,"),
    "foreign": lambda raw: b'{"price": 1}',
    "no times": lambda raw: b"x" * 32 + raw[32:],
    "binary": lambda raw: bytes(range(256)),
}


@pytest.mark.parametrize("fault", [*BROKEN, "wrong type"])
async def test_invalid_value_in_redis_is_a_miss_and_is_replaced(
    bench: Bench, redis: RedisServer, fault: str
) -> None:
    """The value is loaded, and the next replica finds it in Redis."""
    bench.make(redis_url=redis.url)
    await bench.ask()
    await wait_for_writes(bench)
    raw = redis.client.getdel(DATA)
    assert isinstance(raw, bytes)
    if fault == "wrong type":
        redis.client.rpush(DATA, "x")
    else:
        redis.client.set(DATA, BROKEN[fault](raw))
    bench.make(redis_url=redis.url)
    assert await bench.ask() == ("miss", 2)
    await wait_for_writes(bench)
    assert not redis.client.exists(LOCK)
    bench.make(redis_url=redis.url)
    assert await bench.ask() == ("hit_redis", 2)


async def test_full_redis_is_still_read(
    start: StartGateway, full_redis: RedisServer, sandbox: Sandbox
) -> None:
    """If Redis rejects writes, all requests are answered and its values are still used."""
    first = await start(redis_url=full_redis.url)
    await first.get("/ticker/BTC/USDT")
    await eventually(lambda: full_redis.client.exists(DATA))
    full_redis.client.config_set("maxmemory", 1)
    live = await start(redis_url=full_redis.url)
    assert await request_many(live, ["ETH-USDT", "SOL-USDT", "XRP-USDT"]) == {200}
    assert sandbox.count("bybit") == 3
    assert "detail=redis" in (await live.get("/ticker/BTC/USDT")).headers["Cache-Status"]
    assert live.gateway.store.up, "a rejected write is an answer"


async def test_frozen_redis_delays_one_request(bench: Bench, own_redis: RedisServer) -> None:
    """The first request waits for one timeout. Further requests do not wait."""
    bench.make(redis_url=own_redis.url, redis_timeout_seconds=WAIT)
    await timed(bench, "A/A")
    for round_name in ("once", "again"):
        own_redis.freeze()
        first = await timed(bench, f"{round_name}/FIRST")
        assert first > WAIT / 2
        waits, skips = count_outcomes("error"), count_outcomes("skipped")
        for index in range(10):
            await timed(bench, f"{round_name}/{index}")
        assert count_outcomes("error") == waits, "a command was sent to a frozen Redis"
        assert count_outcomes("skipped") > skips
        bench.clock.advance(1.01)
        await timed(bench, f"{round_name}/PROBE")
        assert count_outcomes("error") == waits + 1, "one command probes Redis"
        own_redis.thaw()
        bench.clock.advance(15)
        await timed(bench, f"{round_name}/BACK")
        await wait_for_writes(bench)
        assert own_redis.client.exists(key(f"{round_name}/BACK").redis_name())


async def test_killed_redis_causes_no_delay_and_is_used_after_restart(
    bench: Bench, own_redis: RedisServer
) -> None:
    """Redis is filled again when it is back, and no lookup fails."""
    bench.make(redis_url=own_redis.url)
    await timed(bench, "A/A")
    own_redis.kill()
    for index in range(10):
        await timed(bench, f"DOWN/{index}")
    own_redis.start()
    bench.clock.advance(15)
    await timed(bench, "BACK/A")
    await wait_for_writes(bench)
    assert own_redis.client.exists(key("BACK/A").redis_name())
    own_redis.kill()
    own_redis.start()
    await timed(bench, "BACK/B")
    await wait_for_writes(bench)
    assert own_redis.client.exists(key("BACK/B").redis_name()), (
        "a restart between two commands is not noticed"
    )


@pytest.mark.parametrize("failure", ["freeze", "kill"])
async def test_all_requests_are_answered_while_redis_fails_under_load(
    start: StartGateway, sandbox: Sandbox, clock: FakeClock, own_redis: RedisServer, failure: str
) -> None:
    """Redis freezes or dies, comes back and fails again during many requests."""
    # The exchange timeout limits how long a load waits for a lock in a frozen Redis.
    settings = {"redis_timeout_seconds": WAIT, "exchange_timeout_seconds": 5}
    live = await start(redis_url=own_redis.url, ticker_ttl_seconds=1, stale_seconds=0, **settings)
    symbols = [
        market["symbol"].replace("/", "-")
        for market in live.gateway.markets.select("bybit", None, "USDT")
    ][:12]
    for _ in range(2):
        await sandbox.set("bybit", latency_ms=30, rate_limit=-1)
        clock.advance(20)
        requests = asyncio.create_task(request_many(live, symbols))
        await eventually(lambda: sandbox.count("bybit") >= 5)
        getattr(own_redis, failure)()
        assert await requests == {200}
        for _ in range(3):
            clock.advance(1.1)
            assert await request_many(live, symbols) == {200}
        own_redis.thaw() if failure == "freeze" else own_redis.start()
        for _ in range(5):  # on a busy machine, Redis may seem slow
            clock.advance(15)
            assert await request_many(live, symbols) == {200}
            if live.gateway.store.up:
                break
        assert live.gateway.store.up
        await eventually(lambda: own_redis.client.keys(f"{PREFIX}data:*"))
        sandbox.clear_counts()


async def test_answer_does_not_wait_for_the_write_to_redis(
    bench: Bench, own_redis: RedisServer
) -> None:
    """A write that fails causes no error."""
    problems: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: problems.append(context))
    bench.make(redis_url=own_redis.url, redis_timeout_seconds=WAIT)
    gate, task = bench.close_gate(), bench.task()
    await bench.called(1)
    own_redis.freeze()
    gate.set()
    started = time.perf_counter()
    assert await task == ("miss", 1)
    assert time.perf_counter() - started < WAIT / 2
    await wait_for_writes(bench)
    gc.collect()
    assert problems == []


async def test_pending_writes_are_bounded(bench: Bench, redis: RedisServer) -> None:
    """Writes above the limit are dropped. Closing waits for the pending writes."""
    cache = bench.make(redis_url=redis.url)
    await cache.get_many([key(f"{index}") for index in range(10)], bench.clock.monotonic() + 5)
    await cache.close()
    assert redis.client.dbsize() == 10
    keys = [key(f"X{index}/USDT") for index in range(MAX_PENDING_WRITES + 200)]
    found = await cache.get_many(keys, bench.clock.monotonic() + 5)
    assert (len(found), len(cache.redis._writes)) == (len(keys), MAX_PENDING_WRITES)


async def test_older_redis_value_does_not_replace_memory_after_an_outage(
    bench: Bench, own_redis: RedisServer
) -> None:
    """A value in Redis that is older than the value in memory is not used, even if it is fresh."""
    bench.make(redis_url=own_redis.url, redis_timeout_seconds=WAIT, cache_memory_ttl=2)
    await bench.ask()
    await wait_for_writes(bench)
    own_redis.freeze()
    bench.clock.advance(1)
    assert await bench.ask(max_age=0) == ("miss", 2)
    await wait_for_writes(bench)
    own_redis.thaw()
    bench.clock.advance(3)
    assert await bench.ask(max_age=10) == ("miss", 3)


async def test_older_load_does_not_replace_a_newer_value_in_redis(
    bench: Bench, redis: RedisServer
) -> None:
    """A slow load keeps the newer value of another replica and the lock of a third one."""
    slow, quick = (
        bench.make(redis_url=redis.url, exchange_timeout_seconds=0.05),
        bench.make(redis_url=redis.url),
    )
    gate, older = bench.close_gate(), bench.task(cache=slow)
    await bench.called(1)
    bench.clock.advance(1)
    bench.close_gate().set()
    assert await bench.ask(cache=quick) == ("miss", 2)
    await wait_for_writes(bench)
    redis.client.set(LOCK, "of a third", px=5000)
    gate.set()
    assert await older == ("miss", 1)
    await wait_for_writes(bench)
    assert redis.client.get(LOCK) == b"of a third"
    bench.make(redis_url=redis.url)
    assert await bench.ask() == ("hit_redis", 2)


async def test_replicas_load_a_cold_symbol_once(
    start: StartGateway, sandbox: Sandbox, redis: RedisServer
) -> None:
    """Concurrent requests to two gateways for a cold symbol share one upstream call."""
    gateways = [await start(redis_url=redis.url) for _ in range(2)]
    await sandbox.set("bybit", latency_ms=100, rate_limit=-1)
    answers = await asyncio.gather(*(live.get("/ticker/BTC/USDT") for live in gateways * 10))
    assert sandbox.count("bybit", "tickers") == 1
    assert {answer.status_code for answer in answers} == {200}
    assert len({answer.content for answer in answers}) == 1
    assert sum("detail=redis" in answer.headers["Cache-Status"] for answer in answers) == 1
    # Without a release, the lock expires after 30 seconds.
    await eventually(lambda: not redis.client.exists(LOCK), seconds=15)


async def test_replicas_load_a_cold_batch_once(
    start: StartGateway, sandbox: Sandbox, redis: RedisServer
) -> None:
    """Two gateways load the same batch once, in any order. A different batch is loaded."""
    gateways = [await start(redis_url=redis.url) for _ in range(2)]
    await sandbox.set("bybit", latency_ms=100, rate_limit=-1)
    first, second = gateways
    answers = await asyncio.gather(
        first.get("/tickers?symbols=BTC-USDT,ETH-USDT,SOL-USDT"),
        second.get("/tickers?symbols=SOL-USDT,BTC-USDT,ETH-USDT"),
    )
    assert sandbox.count("bybit", "tickers") == 1
    assert answers[0].json() == answers[1].json()
    more = await second.get("/tickers?symbols=BTC-USDT,ETH-USDT,XRP-USDT,ADA-USDT")
    assert len(more.json()["tickers"]) == 4
    assert sandbox.count("bybit", "tickers") == 2


@pytest.mark.parametrize("error", [None, FAILURE])
async def test_load_releases_its_lock(
    bench: Bench, redis: RedisServer, error: Exception | None
) -> None:
    """The lock exists during a load, has an expiry, and is gone after success and failure."""
    redis.client.rpush(DATA, "a value of the wrong type")
    bench.make(redis_url=redis.url, exchange_timeout_seconds=60)
    bench.error, gate, task = error, bench.close_gate(), bench.task()
    await bench.called(1)
    assert 30_000 < redis.client.pttl(LOCK) <= 60_000
    gate.set()
    await asyncio.wait([task])
    await wait_for_writes(bench)
    assert not redis.client.exists(LOCK)
    assert redis.client.type(DATA) == (b"list" if error else b"string")


@pytest.mark.parametrize("milliseconds", [1000, None])
async def test_lock_of_a_dead_process_delays_for_its_lifetime_at_most(
    bench: Bench, redis: RedisServer, milliseconds: int | None
) -> None:
    """A lock without an expiry delays for as long as the gateway's own lock would last."""
    redis.client.set(LOCK, "dead", px=milliseconds)
    bench.make(SystemClock(), redis_url=redis.url, exchange_timeout_seconds=1)
    started = time.perf_counter()
    assert await bench.ask(seconds=60) == ("miss", 1)
    assert 0.7 < time.perf_counter() - started < 5


async def test_clear_deletes_only_matching_keys_of_the_gateway(
    bench: Bench, redis: RedisServer
) -> None:
    """A clear deletes the entries of the exchange or symbol, and no foreign keys."""
    cache = bench.make(redis_url=redis.url)
    foreign = {
        "session:1",
        f"x{DATA}",
        f"virtuoso:1:{DATA.removeprefix(PREFIX)}",
        f"{PREFIX}budget:{{bybit}}",
        f"{PREFIX}markets:x",
        key("Q/Q").redis_name("lock"),
    }
    redis.client.mset(dict.fromkeys(foreign, "1"))
    keys = [
        KEY,
        key("A*C/USDT"),
        key("ABC/USDT"),
        key("[B]/USDT", "kraken"),
        Key("kraken", "ohlcv", "B/USDT", ("1m", 9)),
    ]
    keys += [key("BTC/USDT:USDT", "kraken")]
    await cache.get_many(keys, bench.clock.monotonic() + 5)
    kept = {entry_key.redis_name() for entry_key in keys}
    for arguments, removed in (
        ((None, "A*C/USDT"), [1]),
        (("bybit", "B/USDT"), []),
        (("kraken", "BTC/USDT"), []),
        ((None, "[B]/USDT"), [3]),
        (("bybit",), [0, 2]),
    ):
        assert await cache.clear(*arguments) == len(removed)
        kept -= {keys[index].redis_name() for index in removed}
        assert names(redis) == kept | foreign
    for index in range(1200):
        redis.client.set(key(f"X{index}").redis_name(), "1")
    assert await bench.make(redis_url=redis.url).clear() == 1202
    assert names(redis) == foreign


async def test_clear_is_not_undone_by_a_running_load(bench: Bench, redis: RedisServer) -> None:
    """Loads and writes that are running during a clear leave nothing in Redis."""
    cache = bench.make(redis_url=redis.url)
    gate, both = (
        bench.close_gate(),
        cache.get_many([KEY, key("X/Y")], bench.clock.monotonic() + 5),
    )
    load = asyncio.create_task(both)
    await bench.called(1)
    redis.client.client_pause(5000, all=False)  # only writes are paused
    gate.set()
    await load
    clear = asyncio.create_task(cache.clear())
    await asyncio.wait([clear], timeout=0.03)
    redis.client.client_unpause()
    assert await clear == 2
    await wait_for_writes(bench)
    assert names(redis) == set()
    gate, task = bench.close_gate(), bench.task()
    await bench.called(2)
    await cache.clear()
    gate.set()
    assert await task == ("miss", 2)
    await wait_for_writes(bench)
    assert (names(redis), len(cache.memory)) == (set(), 0)


@pytest.mark.parametrize("streaming", [True, False])
async def test_clear_reaches_every_replica(
    start: StartGateway, redis: RedisServer, streaming: bool
) -> None:
    """All replicas forget the named entries, and nothing else."""
    admin = {"Authorization": "Bearer open-sesame"}
    lives = [
        await start(redis_url=redis.url, admin_token="open-sesame", streaming=streaming)
        for _ in range(2)
    ]
    await eventually(lambda: count_followers(redis) == 2)
    kept = [Key("binance", "ticker", "BTC/USDT"), Key("bybit", "ticker", "ETH/USDT")]
    for live in lives:
        for entry_key in (KEY, *kept):
            await live.get(f"/ticker/{entry_key.symbol}?exchange={entry_key.exchange}")
    memories = [live.gateway.cache.memory for live in lives]
    assert all(set(memory.keys()) == {KEY, *kept} for memory in memories)
    path = f"{lives[0].url}/admin/cache/clear"
    await lives[0].client.post(
        path, params={"exchange": KEY.exchange, "symbol": KEY.symbol}, headers=admin
    )
    await eventually(lambda: all(set(memory.keys()) == set(kept) for memory in memories))
    await lives[1].get(f"/ticker/{KEY.symbol}?exchange={KEY.exchange}")
    await lives[0].client.post(path, headers=admin)
    await eventually(lambda: not any(memory.keys() for memory in memories))


async def test_clear_during_a_lost_connection_is_noticed_after_reconnecting(
    start: StartGateway, redis: RedisServer
) -> None:
    """A replica that missed an announcement forgets all entries."""
    live = await start(redis_url=redis.url)
    await eventually(lambda: count_followers(redis) == 1)
    await live.get("/ticker/BTC/USDT?exchange=bybit")
    assert live.gateway.cache.memory.keys()
    redis.client.incr(CLEARS)
    redis.client.client_kill_filter(_type="pubsub")
    await eventually(lambda: not live.gateway.cache.memory.keys())
    await eventually(lambda: count_followers(redis) == 1)


async def test_lost_announcement_is_noticed(
    start: StartGateway, redis: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A replica reads the count of clears from time to time."""
    monkeypatch.setattr(redis_tier, "CHECK_SECONDS", 0.01)
    live = await start(redis_url=redis.url)
    await live.get("/ticker/BTC/USDT?exchange=bybit")
    redis.client.incr(CLEARS)
    await eventually(lambda: not live.gateway.cache.memory.keys())


@dataclass
class Follower:
    """A tier that follows clears, and the clears that it received."""

    tier: RedisTier
    forgotten: list[tuple[str | None, str | None]] = field(default_factory=list)

    def forget(self, exchange: str | None, symbol: str | None) -> None:
        self.forgotten.append((exchange, symbol))


Follow = Callable[[], Awaitable[Follower]]


@pytest.fixture
async def follow(
    bench: Bench, redis: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Follow]:
    """Start tiers that follow clears, with short waits."""
    monkeypatch.setattr(redis_tier, "CHECK_SECONDS", 0.02)
    tasks: list[asyncio.Task[None]] = []

    async def begin() -> Follower:
        follower = Follower(bench.make(redis_url=redis.url).redis)
        await follower.tier.start()
        tasks.append(asyncio.create_task(follower.tier.follow_clears(follower.forget)))
        await eventually(lambda: count_followers(redis) == len(tasks))
        return follower

    yield begin
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)


async def test_concurrent_clears_are_all_followed(follow: Follow, redis: RedisServer) -> None:
    """Each replica forgets what the others clear, and never everything."""
    tiers = [await follow() for _ in range(3)]
    for _ in range(20):
        await asyncio.gather(
            *(follower.tier.clear(None, f"X{index}/Y") for index, follower in enumerate(tiers))
        )
    await eventually(
        lambda: all(
            follower.tier._clears == int(redis.client.get(CLEARS) or 0) for follower in tiers
        )
    )
    await asyncio.sleep(3 * redis_tier.CHECK_SECONDS)
    for index, follower in enumerate(tiers):
        others = {(None, f"X{other}/Y") for other in range(3) if other != index}
        assert set(follower.forgotten) == others
        assert len(follower.forgotten) == 20 * 2 * 2, "each clear is announced before and after"


async def test_own_clear_does_not_hide_a_missed_clear(
    follow: Follow, redis: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A replica that missed a clear forgets everything, despite later clears."""
    monkeypatch.setattr(redis_tier, "LATE_SECONDS", 0.02)
    tiers = [await follow() for _ in range(2)]
    redis.client.incr(CLEARS)  # without an announcement
    await tiers[0].tier.clear(None, "X/Y")
    await eventually(lambda: all((None, None) in follower.forgotten for follower in tiers))
    await eventually(
        lambda: all(
            follower.tier._clears == int(redis.client.get(CLEARS) or 0) for follower in tiers
        )
    )


@pytest.mark.parametrize("count", [None, b"7", b"8"])
async def test_memory_is_cleared_only_after_a_missed_clear(
    follow: Follow, redis: RedisServer, monkeypatch: pytest.MonkeyPatch, count: bytes | None
) -> None:
    """Clears before the start, and a Redis that lost its data, do not clear the memory."""
    monkeypatch.setattr(redis_tier, "LATE_SECONDS", 0.02)
    redis.client.set(CLEARS, 7)
    follower = await follow()
    if count is None:
        redis.client.delete(CLEARS)
    else:
        redis.client.set(CLEARS, count)
    await eventually(lambda: follower.tier._clears == int(count or 0))
    assert follower.forgotten == ([(None, None)] if count == b"8" else [])


async def test_clear_by_another_replica_is_not_undone_by_a_load(
    bench: Bench, redis: RedisServer
) -> None:
    """A load that started before the clear answers its callers and is not stored."""
    ours, second = bench.make(redis_url=redis.url), bench.make(redis_url=redis.url)
    following = asyncio.create_task(ours.follow_clears())
    await eventually(lambda: count_followers(redis) == 1)
    gate, load = bench.close_gate(), bench.task(cache=ours)
    await bench.called(1)
    generation = ours._generation
    await second.clear()
    await eventually(lambda: ours._generation > generation)
    gate.set()
    assert await load == ("miss", 1)
    await wait_for_writes(bench)
    assert (names(redis), len(ours.memory)) == (set(), 0)
    following.cancel()
    await asyncio.wait([following])


async def test_cancellation_is_not_lost(redis: RedisServer, clock: FakeClock) -> None:
    """redis-py may swallow a cancellation before Python 3.12. `run` raises it again."""
    store, sent = RedisStore(redis.url, clock), asyncio.Event()

    async def swallow(_: object) -> None:
        sent.set()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(60)

    task = asyncio.create_task(store.run("get", swallow, 30))
    await sent.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert store.up
    with pytest.raises(RedisUnavailable):
        await store.run("get", swallow, 0.2)
    await store.close()


async def test_clear_without_redis_clears_memory_and_raises(
    bench: Bench, own_redis: RedisServer
) -> None:
    """If Redis does not answer, the memory is cleared and the caller gets an error."""
    cache = bench.make(redis_url=own_redis.url, redis_timeout_seconds=WAIT)
    await bench.ask()
    own_redis.freeze()
    with pytest.raises(RedisUnavailable):
        await cache.clear()
    assert len(cache.memory) == 0


def test_entry_is_read_from_redis_as_written(clock: FakeClock) -> None:
    """The times of an entry are exact to the millisecond."""
    entry = Entry.create(KEY, b'{"stale":false}', clock.monotonic() - 3, clock.monotonic() - 2, TTL)
    entry.shorten_ttl(0.1)
    entry.closed_until = 1_796_063_220_000
    read = Entry.parse(KEY, entry.dump(clock), clock)
    assert read is not None
    assert (read.body, read.etag, read.closed_until) == (
        entry.body,
        entry.etag,
        entry.closed_until,
    )
    assert read.ttl == pytest.approx(entry.ttl, abs=0.001)
    assert (read.born, read.received) == pytest.approx((entry.born, entry.received), abs=0.002)
