"""Redis as the second tier: shared when it answers, and never more than a short delay when it does not."""

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
from src.store.redis import PREFIX, RedisAway, RedisStore
from tests.cache.test_cache import FAILURE, KEY, TTL, Bench, key, number
from tests.conftest import FakeClock, Live, RedisServer, StartGateway, eventually, sample

LOCK, DATA = KEY.redis("lock"), KEY.redis()
WAIT = 1.0  # seconds that a Redis which does not answer may cost once; more than a busy machine costs


@pytest.fixture
async def bench(clock: FakeClock) -> AsyncIterator[Bench]:
    async with Bench.opened(clock) as bench:
        yield bench


@pytest.fixture
def full_redis() -> Iterator[RedisServer]:
    """A Redis that holds one value of ours and refuses every write."""
    server = RedisServer("--maxmemory", "3mb", "--maxmemory-policy", "noeviction")
    yield server
    server.kill()


def commands(redis: RedisServer) -> int:
    """How many commands Redis has run for requests: not those of the test, nor the checks that run beside requests."""
    stats: dict[str, dict[str, int]] = redis.client.info("commandstats")
    others = {"cmdstat_info", "cmdstat_ping", "cmdstat_get", "cmdstat_pubsub"}
    return sum(stat["calls"] for name, stat in stats.items() if name not in others)


def followers(redis: RedisServer) -> int:
    """How many replicas hear of clears."""
    ((_, count),) = redis.client.pubsub_numsub(CLEARS)
    return int(count)


def failures(outcome: str) -> float:
    """How many commands ended so."""
    operations = ("get", "lock", "set", "budget")
    return sum(
        sample("cache_tier_operations_total", tier="redis", operation=operation, outcome=outcome)
        for operation in operations
    )


def names(redis: RedisServer) -> set[str]:
    """Every key but the count of clears."""
    return {name.decode() for name in redis.client.keys("*") if isinstance(name, bytes)} - {CLEARS}


async def settled(bench: Bench) -> None:
    """Wait for the writes beside the answers."""
    for cache, _ in bench.made:
        await cache._redis.drain()


async def timed(bench: Bench, symbol: str) -> float:
    began = time.perf_counter()
    assert (await bench.ask(key(symbol)))[0] == "miss"
    return time.perf_counter() - began


async def ask_many(live: Live, symbols: list[str]) -> set[int]:
    """Ask for each symbol three times at once; returns the statuses."""
    paths = [f"/ticker/{symbol}" for symbol in symbols] * 3
    return {answer.status_code for answer in await asyncio.gather(*(live.get(path) for path in paths))}


async def test_a_memory_hit_asks_redis_nothing(start: StartGateway, redis: RedisServer) -> None:
    """What memory has fresh costs no command in Redis."""
    live = await start(redis_url=redis.url)
    await live.get("/ticker/BTC/USDT")
    await eventually(lambda: redis.client.exists(DATA))
    await eventually(lambda: followers(redis) == 1)
    before = commands(redis)
    for _ in range(20):
        assert (await live.get("/ticker/BTC/USDT")).headers["Cache-Status"].startswith("virtuoso; hit; detail=memory")
    assert commands(redis) == before


async def test_a_redis_hit_fills_memory_for_what_is_left_of_its_ttl(bench: Bench, redis: RedisServer) -> None:
    """What one replica loaded another finds, at its true age, and drops when its TTL counted from the load is over."""
    bench.make(redis_url=redis.url, stale_seconds=60)
    await bench.ask()
    await settled(bench)
    assert 74_000 < redis.client.pttl(DATA) <= 75_000, "kept for as long as it may stand in"
    other = bench.make(redis_url=redis.url)
    bench.clock.advance(10)
    assert await bench.ask() == ("hit_redis", 1)
    bench.clock.advance(4.99)
    assert await bench.ask() == ("hit_memory", 1)
    entry = other.peek(KEY)
    assert entry is not None
    assert entry.age(bench.clock.monotonic()) == pytest.approx(14.99, abs=0.002)
    bench.clock.advance(0.01)
    assert await bench.ask() == ("miss", 2)


async def test_an_old_value_of_redis_only_stands_in(bench: Bench, redis: RedisServer) -> None:
    """A value past its TTL is not served as fresh, but a replica that just started has it when its load fails."""
    bench.make(redis_url=redis.url)
    await bench.ask()
    await settled(bench)
    bench.clock.advance(TTL)
    bench.error, cache = FAILURE, bench.make(redis_url=redis.url)
    with pytest.raises(ExchangeUnavailable):
        await bench.ask()
    assert number(cache.stale(KEY)) == 1


async def test_a_limit_on_the_age_holds_for_redis_too(bench: Bench, redis: RedisServer) -> None:
    """A value in Redis that is older than the caller allows is loaded anew; one that is younger is not."""
    bench.make(redis_url=redis.url)
    await bench.ask()
    await settled(bench)
    bench.clock.advance(5)
    for limit, found in ((5.1, ("hit_redis", 1)), (4.9, ("miss", 2))):
        bench.make(redis_url=redis.url)
        assert await bench.ask(max_age=limit) == found


@pytest.mark.parametrize(("seconds", "found"), [(0.5, ("hit_redis", 1)), (100, ("miss", 2))])
async def test_a_clock_ahead_makes_nothing_younger_than_new(
    bench: Bench, redis: RedisServer, seconds: float, found: tuple[str, int]
) -> None:
    """A value from a clock a little ahead is new when it comes; one from far ahead would always be, and is a miss."""
    ahead = FakeClock()
    ahead.advance(seconds)
    bench.clock, ours = ahead, bench.clock
    bench.make(redis_url=redis.url)
    await bench.ask()
    await settled(bench)
    bench.clock = ours
    bench.make(redis_url=redis.url)
    assert await bench.ask() == found
    entry = bench.cache.peek(KEY)
    assert entry is not None
    assert entry.born == entry.received == ours.monotonic()


async def test_past_its_own_limit_memory_looks_into_redis(bench: Bench, redis: RedisServer) -> None:
    """An entry younger than its TTL is found in Redis again once memory's own limit is over: no load, not stale."""
    bench.make(redis_url=redis.url, cache_memory_ttl=5)
    await bench.ask()
    await settled(bench)
    bench.clock.advance(6)
    assert await bench.ask() == ("hit_redis", 1)


async def test_a_process_does_not_wait_for_its_own_lock(bench: Bench, redis: RedisServer) -> None:
    """A lock of ours whose release got lost in an outage is ours still."""
    cache = bench.make(redis_url=redis.url)
    redis.client.set(LOCK, cache._redis._token)
    assert await asyncio.wait_for(bench.ask(), 15) == ("miss", 1)


async def test_a_clear_is_not_undone_by_reading_redis(bench: Bench, redis: RedisServer) -> None:
    """Lookups during a clear may still bring the old value from Redis; none of them puts it back into memory."""
    cache = bench.make(redis_url=redis.url)
    for _ in range(30):
        _, before = await bench.ask(max_age=0)
        await settled(bench)
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
async def test_a_broken_value_is_a_miss_and_is_replaced(bench: Bench, redis: RedisServer, fault: str) -> None:
    """Whatever stands in Redis under our key, the answer is loaded, and the next replica finds it there."""
    bench.make(redis_url=redis.url)
    await bench.ask()
    await settled(bench)
    raw = redis.client.getdel(DATA)
    assert isinstance(raw, bytes)
    if fault == "wrong type":
        redis.client.rpush(DATA, "x")
    else:
        redis.client.set(DATA, BROKEN[fault](raw))
    bench.make(redis_url=redis.url)
    assert await bench.ask() == ("miss", 2)
    await settled(bench)
    assert not redis.client.exists(LOCK)
    bench.make(redis_url=redis.url)
    assert await bench.ask() == ("hit_redis", 2)


async def test_a_full_redis_is_read_and_else_does_without(
    start: StartGateway, full_redis: RedisServer, sandbox: Sandbox
) -> None:
    """When Redis refuses writes every request is answered, and what it holds is still used."""
    first = await start(redis_url=full_redis.url)
    await first.get("/ticker/BTC/USDT")
    await eventually(lambda: full_redis.client.exists(DATA))
    full_redis.client.config_set("maxmemory", 1)
    live = await start(redis_url=full_redis.url)
    assert await ask_many(live, ["ETH-USDT", "SOL-USDT", "XRP-USDT"]) == {200}
    assert sandbox.count("bybit") == 3
    assert "detail=redis" in (await live.get("/ticker/BTC/USDT")).headers["Cache-Status"]
    assert live.gateway.store.up, "a refusal is an answer"


async def test_a_frozen_redis_costs_one_short_wait(bench: Bench, own_redis: RedisServer) -> None:
    """The first request waits for one command's timeout, the next for nothing; the same when it freezes again."""
    bench.make(redis_url=own_redis.url, redis_timeout_seconds=WAIT)
    await timed(bench, "A/A")
    for time_ in ("once", "again"):
        own_redis.freeze()
        first = await timed(bench, f"{time_}/FIRST")
        assert first > WAIT / 2
        waits, skips = failures("error"), failures("skipped")
        for place in range(10):
            await timed(bench, f"{time_}/{place}")
        assert failures("error") == waits, "a command was sent to a Redis that hangs"
        assert failures("skipped") > skips
        bench.clock.advance(1.01)
        await timed(bench, f"{time_}/PROBE")
        assert failures("error") == waits + 1, "one command asks how Redis is"
        own_redis.thaw()
        bench.clock.advance(15)
        await timed(bench, f"{time_}/BACK")
        await settled(bench)
        assert own_redis.client.exists(key(f"{time_}/BACK").redis())


async def test_a_killed_redis_costs_nothing_and_is_used_again(bench: Bench, own_redis: RedisServer) -> None:
    """Without Redis lookups are as quick as ever; when it is back it is filled again, without a lost lookup."""
    bench.make(redis_url=own_redis.url)
    await timed(bench, "A/A")
    own_redis.kill()
    for place in range(10):
        await timed(bench, f"DOWN/{place}")
    own_redis.start()
    bench.clock.advance(15)
    await timed(bench, "BACK/A")
    await settled(bench)
    assert own_redis.client.exists(key("BACK/A").redis())
    own_redis.kill()
    own_redis.start()
    await timed(bench, "BACK/B")
    await settled(bench)
    assert own_redis.client.exists(key("BACK/B").redis()), "a restart between two commands is not even noticed"


@pytest.mark.parametrize("blow", ["freeze", "kill"])
async def test_losing_redis_under_load_loses_no_answer(
    start: StartGateway, sandbox: Sandbox, clock: FakeClock, own_redis: RedisServer, blow: str
) -> None:
    """Frozen, killed, back or lost again in the middle of many requests: all of them are answered."""
    settings = {"redis_timeout_seconds": WAIT, "exchange_timeout_seconds": 5}  # a lock that thaws lasts for the second
    live = await start(redis_url=own_redis.url, ticker_ttl_seconds=1, stale_seconds=0, **settings)
    symbols = [market["symbol"].replace("/", "-") for market in live.gateway.markets.select("bybit", None, "USDT")][:12]
    for _ in range(2):
        await sandbox.set("bybit", latency_ms=30, rate_limit=-1)
        clock.advance(20)
        requests = asyncio.create_task(ask_many(live, symbols))
        await eventually(lambda: sandbox.count("bybit") >= 5)
        getattr(own_redis, blow)()
        assert await requests == {200}
        for _ in range(3):
            clock.advance(1.1)
            assert await ask_many(live, symbols) == {200}
        own_redis.thaw() if blow == "freeze" else own_redis.start()
        for _ in range(5):  # a busy machine may look like a slow Redis
            clock.advance(15)
            assert await ask_many(live, symbols) == {200}
            if live.gateway.store.up:
                break
        assert live.gateway.store.up
        await eventually(lambda: own_redis.client.keys(f"{PREFIX}data:*"))
        sandbox.clear_counts()


async def test_the_write_is_beside_the_answer(bench: Bench, own_redis: RedisServer) -> None:
    """An answer does not wait for its write to Redis, and a write that fails is nobody's error."""
    complaints: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
    bench.make(redis_url=own_redis.url, redis_timeout_seconds=WAIT)
    gate, task = bench.close_gate(), bench.task()
    await bench.called(1)
    own_redis.freeze()
    gate.set()
    began = time.perf_counter()
    assert await task == ("miss", 1)
    assert time.perf_counter() - began < WAIT / 2
    await settled(bench)
    gc.collect()
    assert complaints == []


async def test_writes_do_not_pile_up(bench: Bench, redis: RedisServer) -> None:
    """Past a bound writes under way are dropped, not queued; closing waits for those that are under way."""
    cache = bench.make(redis_url=redis.url)
    await cache.get_many([key(f"{place}") for place in range(10)], TTL, bench.load, bench.clock.monotonic() + 5)
    await cache.close()
    assert redis.client.dbsize() == 10
    keys = [key(f"X{place}/USDT") for place in range(MAX_PENDING_WRITES + 200)]
    found = await cache.get_many(keys, TTL, bench.load, bench.clock.monotonic() + 5)
    assert (len(found), len(cache._redis._writes)) == (len(keys), MAX_PENDING_WRITES)


async def test_after_an_outage_redis_takes_nothing_back(bench: Bench, own_redis: RedisServer) -> None:
    """A value in Redis that is older than the one in memory is neither served nor kept, however fresh it is."""
    bench.make(redis_url=own_redis.url, redis_timeout_seconds=WAIT, cache_memory_ttl=2)
    await bench.ask()
    await settled(bench)
    own_redis.freeze()
    bench.clock.advance(1)
    assert await bench.ask(max_age=0) == ("miss", 2)
    await settled(bench)
    own_redis.thaw()
    bench.clock.advance(3)
    assert await bench.ask(max_age=10) == ("miss", 3)


async def test_an_older_load_does_not_replace_a_newer_value_in_redis(bench: Bench, redis: RedisServer) -> None:
    """A slow load of one replica leaves the newer value of another alone, and that one's lock too."""
    slow, quick = bench.make(redis_url=redis.url, exchange_timeout_seconds=0.05), bench.make(redis_url=redis.url)
    gate, older = bench.close_gate(), bench.task(cache=slow)
    await bench.called(1)
    bench.clock.advance(1)
    bench.close_gate().set()
    assert await bench.ask(cache=quick) == ("miss", 2)
    await settled(bench)
    redis.client.set(LOCK, "of a third", px=5000)
    gate.set()
    assert await older == ("miss", 1)
    await settled(bench)
    assert redis.client.get(LOCK) == b"of a third"
    bench.make(redis_url=redis.url)
    assert await bench.ask() == ("hit_redis", 2)


async def test_replicas_load_a_cold_symbol_once(start: StartGateway, sandbox: Sandbox, redis: RedisServer) -> None:
    """Two gateways asked for the same cold symbol at once make one call, and both give its answer."""
    gateways = [await start(redis_url=redis.url) for _ in range(2)]
    await sandbox.set("bybit", latency_ms=100, rate_limit=-1)
    answers = await asyncio.gather(*(live.get("/ticker/BTC/USDT") for live in gateways * 10))
    assert sandbox.count("bybit", "tickers") == 1
    assert {answer.status_code for answer in answers} == {200}
    assert len({answer.content for answer in answers}) == 1
    assert sum("detail=redis" in answer.headers["Cache-Status"] for answer in answers) == 1
    await eventually(lambda: not redis.client.exists(LOCK), seconds=15)  # by itself it goes after 30


async def test_replicas_load_a_cold_batch_once(start: StartGateway, sandbox: Sandbox, redis: RedisServer) -> None:
    """Two gateways asked for the same cold batch at once, in whatever order, make one call; what differs is loaded."""
    gateways = [await start(redis_url=redis.url) for _ in range(2)]
    await sandbox.set("bybit", latency_ms=100, rate_limit=-1)
    one, other = gateways
    answers = await asyncio.gather(
        one.get("/tickers?symbols=BTC-USDT,ETH-USDT,SOL-USDT"), other.get("/tickers?symbols=SOL-USDT,BTC-USDT,ETH-USDT")
    )
    assert sandbox.count("bybit", "tickers") == 1
    assert answers[0].json() == answers[1].json()
    more = await other.get("/tickers?symbols=BTC-USDT,ETH-USDT,XRP-USDT,ADA-USDT")
    assert len(more.json()["tickers"]) == 4
    assert sandbox.count("bybit", "tickers") == 2


@pytest.mark.parametrize("error", [None, FAILURE])
async def test_a_load_gives_up_its_lock(bench: Bench, redis: RedisServer, error: Exception | None) -> None:
    """The lock is held while a load runs, would expire by itself, and is gone after it, whatever the load brought."""
    redis.client.rpush(DATA, "a value of the wrong type")
    bench.make(redis_url=redis.url, exchange_timeout_seconds=60)
    bench.error, gate, task = error, bench.close_gate(), bench.task()
    await bench.called(1)
    assert 30_000 < redis.client.pttl(LOCK) <= 60_000
    gate.set()
    await asyncio.wait([task])
    await settled(bench)
    assert not redis.client.exists(LOCK)
    assert redis.client.type(DATA) == (b"list" if error else b"string")


@pytest.mark.parametrize("milliseconds", [1000, None])
async def test_a_dead_lock_holder_costs_at_most_the_locks_time(
    bench: Bench, redis: RedisServer, milliseconds: int | None
) -> None:
    """A lock whose holder died is waited for until it expires, or else for as long as ours would last."""
    redis.client.set(LOCK, "dead", px=milliseconds)
    bench.make(SystemClock(), redis_url=redis.url, exchange_timeout_seconds=1)
    began = time.perf_counter()
    assert await bench.ask(seconds=60) == ("miss", 1)
    assert 0.7 < time.perf_counter() - began < 5


async def test_a_clear_removes_only_what_is_ours_and_named(bench: Bench, redis: RedisServer) -> None:
    """A clear takes our entries of the exchange or symbol, and nobody's other keys."""
    cache = bench.make(redis_url=redis.url)
    foreign = {
        "session:1",
        f"x{DATA}",
        DATA.replace(":1:", ":2:", 1),
        f"{PREFIX}budget:{{bybit}}",
        f"{PREFIX}markets:x",
        key("Q/Q").redis("lock"),
    }
    redis.client.mset(dict.fromkeys(foreign, "1"))
    keys = [KEY, key("A*C/USDT"), key("ABC/USDT"), key("[B]/USDT", "kraken"), Key("kraken", "ohlcv", "B/USDT", "1m:9")]
    keys += [key("BTC/USDT:USDT", "kraken")]
    await cache.get_many(keys, TTL, bench.load, bench.clock.monotonic() + 5)
    kept = {one.redis() for one in keys}
    for what, gone in (
        ((None, "A*C/USDT"), [1]),
        (("bybit", "B/USDT"), []),
        (("kraken", "BTC/USDT"), []),
        ((None, "[B]/USDT"), [3]),
        (("bybit",), [0, 2]),
    ):
        assert await cache.clear(*what) == len(gone)
        kept -= {keys[place].redis() for place in gone}
        assert names(redis) == kept | foreign
    for place in range(1200):
        redis.client.set(key(f"X{place}").redis(), "1")
    assert await bench.make(redis_url=redis.url).clear() == 1202
    assert names(redis) == foreign


async def test_a_clear_is_not_undone_by_a_load(bench: Bench, redis: RedisServer) -> None:
    """A load under way at a clear leaves nothing in Redis, nor does a write that was under way."""
    cache = bench.make(redis_url=redis.url)
    gate, both = bench.close_gate(), cache.get_many([KEY, key("X/Y")], TTL, bench.load, bench.clock.monotonic() + 5)
    load = asyncio.create_task(both)
    await bench.called(1)
    redis.client.client_pause(5000, all=False)  # reads go on
    gate.set()
    await load
    clear = asyncio.create_task(cache.clear())
    await asyncio.wait([clear], timeout=0.03)
    redis.client.client_unpause()
    assert await clear == 2
    await settled(bench)
    assert names(redis) == set()
    gate, task = bench.close_gate(), bench.task()
    await bench.called(2)
    await cache.clear()
    gate.set()
    assert await task == ("miss", 2)
    await settled(bench)
    assert (names(redis), len(cache)) == (set(), 0)


@pytest.mark.parametrize("streaming", [True, False])
async def test_a_clear_reaches_every_replica(start: StartGateway, redis: RedisServer, streaming: bool) -> None:
    """What one replica is told to forget the others forget, too: what was named, and nothing else."""
    admin = {"Authorization": "Bearer open-sesame"}
    lives = [await start(redis_url=redis.url, admin_token="open-sesame", streaming=streaming) for _ in range(2)]
    await eventually(lambda: followers(redis) == 2)
    kept = [Key("binance", "ticker", "BTC/USDT", ""), Key("bybit", "ticker", "ETH/USDT", "")]
    for live in lives:
        for one in (KEY, *kept):
            await live.get(f"/ticker/{one.symbol}?exchange={one.exchange}")
    memories = [live.gateway.cache.memory for live in lives]
    assert all(set(memory.keys()) == {KEY, *kept} for memory in memories)
    path = f"{lives[0].url}/admin/cache/clear"
    await lives[0].client.post(path, params={"exchange": KEY.exchange, "symbol": KEY.symbol}, headers=admin)
    await eventually(lambda: all(set(memory.keys()) == set(kept) for memory in memories))
    await lives[1].get(f"/ticker/{KEY.symbol}?exchange={KEY.exchange}")
    await lives[0].client.post(path, headers=admin)
    await eventually(lambda: not any(memory.keys() for memory in memories))


async def test_a_replica_that_did_not_listen_forgets_when_it_does(start: StartGateway, redis: RedisServer) -> None:
    """A clear that was announced while the connection was lost is noticed when there is a new one."""
    live = await start(redis_url=redis.url)
    await eventually(lambda: followers(redis) == 1)
    await live.get("/ticker/BTC/USDT?exchange=bybit")
    assert live.gateway.cache.memory.keys()
    redis.client.incr(CLEARS)
    redis.client.client_kill_filter(_type="pubsub")
    await eventually(lambda: not live.gateway.cache.memory.keys())
    await eventually(lambda: followers(redis) == 1)


async def test_an_announcement_that_was_lost_is_noticed(
    start: StartGateway, redis: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A replica whose connection delivers nothing reads the count of clears from time to time."""
    monkeypatch.setattr(redis_tier, "CHECK_SECONDS", 0.01)
    live = await start(redis_url=redis.url)
    await live.get("/ticker/BTC/USDT?exchange=bybit")
    redis.client.incr(CLEARS)
    await eventually(lambda: not live.gateway.cache.memory.keys())


@dataclass
class Follower:
    """A tier that follows clears, and what it was told to forget."""

    tier: RedisTier
    forgotten: list[tuple[str | None, str | None]] = field(default_factory=list)

    def forget(self, exchange: str | None, symbol: str | None) -> None:
        self.forgotten.append((exchange, symbol))


Follow = Callable[[], Awaitable[Follower]]


@pytest.fixture
async def follow(bench: Bench, redis: RedisServer, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Follow]:
    """Start tiers that follow clears, with short waits."""
    monkeypatch.setattr(redis_tier, "CHECK_SECONDS", 0.02)
    tasks: list[asyncio.Task[None]] = []

    async def begin() -> Follower:
        follower = Follower(bench.make(redis_url=redis.url)._redis)
        await follower.tier.start()
        tasks.append(asyncio.create_task(follower.tier.follow_clears(follower.forget)))
        await eventually(lambda: followers(redis) == len(tasks))
        return follower

    yield begin
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)


async def test_clears_at_the_same_time_are_each_followed(follow: Follow, redis: RedisServer) -> None:
    """Replicas that clear one symbol each forget what the others clear, and never everything."""
    tiers = [await follow() for _ in range(3)]
    for _ in range(20):
        await asyncio.gather(*(each.tier.clear(None, f"X{number}/Y") for number, each in enumerate(tiers)))
    await eventually(lambda: all(each.tier._clears == int(redis.client.get(CLEARS) or 0) for each in tiers))
    await asyncio.sleep(3 * redis_tier.CHECK_SECONDS)
    for own, each in enumerate(tiers):
        others = {(None, f"X{other}/Y") for other in range(3) if other != own}
        assert set(each.forgotten) == others
        assert len(each.forgotten) == 20 * 2 * 2, "each clear is announced before and after"


async def test_a_clear_of_its_own_hides_no_other_that_was_missed(
    follow: Follow, redis: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A replica that missed a clear forgets everything, whatever it or another replica clears afterwards."""
    monkeypatch.setattr(redis_tier, "LATE_SECONDS", 0.02)
    tiers = [await follow() for _ in range(2)]
    redis.client.incr(CLEARS)  # and nobody heard of it
    await tiers[0].tier.clear(None, "X/Y")
    await eventually(lambda: all((None, None) in each.forgotten for each in tiers))
    await eventually(lambda: all(each.tier._clears == int(redis.client.get(CLEARS) or 0) for each in tiers))


@pytest.mark.parametrize("count", [None, b"7", b"8"])
async def test_only_a_clear_that_was_missed_clears(
    follow: Follow, redis: RedisServer, monkeypatch: pytest.MonkeyPatch, count: bytes | None
) -> None:
    """A clear before the start is over, and a Redis that lost its data does not know of one."""
    monkeypatch.setattr(redis_tier, "LATE_SECONDS", 0.02)
    redis.client.set(CLEARS, 7)
    follower = await follow()
    if count is None:
        redis.client.delete(CLEARS)
    else:
        redis.client.set(CLEARS, count)
    await eventually(lambda: follower.tier._clears == int(count or 0))
    assert follower.forgotten == ([(None, None)] if count == b"8" else [])


async def test_a_clear_elsewhere_is_not_undone_by_a_load(bench: Bench, redis: RedisServer) -> None:
    """What a replica began to load before another one's clear answers its callers, and is not kept in either tier."""
    ours, other = bench.make(redis_url=redis.url), bench.make(redis_url=redis.url)
    following = asyncio.create_task(ours.follow_clears())
    await eventually(lambda: followers(redis) == 1)
    gate, load = bench.close_gate(), bench.task(cache=ours)
    await bench.called(1)
    generation = ours._generation
    await other.clear()
    await eventually(lambda: ours._generation > generation)
    gate.set()
    assert await load == ("miss", 1)
    await settled(bench)
    assert (names(redis), len(ours)) == (set(), 0)
    following.cancel()
    await asyncio.wait([following])


async def test_a_cancellation_is_never_lost(redis: RedisServer, clock: FakeClock) -> None:
    """A client that swallows a cancellation, as redis-py may before Python 3.12, keeps no task from ending."""
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
    with pytest.raises(RedisAway):
        await store.run("get", swallow, 0.2)
    await store.close()


async def test_a_clear_without_redis_says_so(bench: Bench, own_redis: RedisServer) -> None:
    """When Redis does not answer memory is cleared all the same, and the caller is told."""
    cache = bench.make(redis_url=own_redis.url, redis_timeout_seconds=WAIT)
    await bench.ask()
    own_redis.freeze()
    with pytest.raises(RedisAway):
        await cache.clear()
    assert len(cache) == 0


def test_an_entry_survives_redis(clock: FakeClock) -> None:
    """What is written for Redis is read back as it was, to the millisecond."""
    entry = Entry.of(b'{"stale":false}', clock.monotonic() - 3, clock.monotonic() - 2, TTL, 0.1)
    read = Entry.parse(entry.dump(clock), TTL, 0.1, clock)
    assert read is not None
    assert (read.body, read.etag, read.ttl) == (entry.body, entry.etag, entry.ttl)
    assert (read.born, read.received) == pytest.approx((entry.born, entry.received), abs=0.002)
