"""The cache without Redis, by itself and in the headers that clients see."""

import asyncio
import gc
import json
import logging
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest

from src.cache.cache import Cache, Loaded
from src.cache.entry import Entry, Key, Served, etag_of
from src.core.clock import Clock
from src.core.errors import (
    DeadlineExceeded,
    ExchangeUnavailable,
    GatewayError,
    Overloaded,
    TooOld,
    UnknownSymbol,
)
from src.sandbox.server import Sandbox
from src.store.redis import RedisStore
from tests.conftest import FakeClock, StartGateway, eventually, make_settings, sample

TTL = 15.0
KEY = Key("bybit", "ticker", "BTC/USDT")
PATH = "/ticker/BTC/USDT?exchange=bybit"
REFUSAL, FAILURE = UnknownSymbol("there is no such symbol"), ExchangeUnavailable("it is down")


def key(symbol: str, exchange: str = "bybit") -> Key:
    return Key(exchange, "ticker", symbol)


class Bench:
    """A cache and its source: numbered answers, which can be late, fail or wait for a gate."""

    def __init__(self, clock: FakeClock) -> None:
        self.clock = clock
        self.made: list[tuple[Cache, RedisStore]] = []
        self.calls: list[list[Key]] = []
        self.error: Exception | None = None  # every load raises this
        self.refused: Mapping[Key, GatewayError] = {}  # keys whose load returns an error
        self.late = 0.0  # seconds before the load at which its data was requested
        self.gate = asyncio.Event()  # loads that begin now wait for this
        self.gate.set()
        self.cache = self.make()

    def make(self, clock: Clock | None = None, **overrides: object) -> Cache:
        settings, clock = make_settings(None, **overrides), clock or self.clock
        store = RedisStore(settings.redis_address, clock, settings.redis_timeout_seconds)
        self.cache = Cache(settings, store, clock, self.load)
        self.made.append((self.cache, store))
        return self.cache

    def close_gate(self) -> asyncio.Event:
        self.gate = asyncio.Event()
        return self.gate

    async def load(self, keys: Sequence[Key]) -> Loaded:
        gate, late, number, started = (
            self.gate,
            self.late,
            len(self.calls) + 1,
            self.clock.monotonic(),
        )
        self.calls.append(list(keys))
        await gate.wait()
        if self.error is not None:
            raise self.error
        body = b'{"number":%d,"stale":false}' % number
        received = self.clock.monotonic() - late
        return {
            key: self.refused.get(key) or Entry.create(key, body, started - late, received, TTL)
            for key in keys
        }

    async def ask(
        self,
        key: Key = KEY,
        max_age: float | None = None,
        seconds: float = 5,
        cache: Cache | None = None,
    ) -> tuple[str, int]:
        """Return how a key was answered, and the number of the load its answer comes from."""
        cache = self.cache if cache is None else cache
        outcome = (await cache.get_many([key], cache._clock.monotonic() + seconds, max_age))[key]
        if isinstance(outcome, GatewayError):
            raise outcome
        return outcome.result, number(outcome)

    def task(self, key: Key = KEY, max_age: float | None = None, cache: Cache | None = None) -> Any:
        return asyncio.create_task(self.ask(key, max_age, cache=cache))

    async def called(self, times: int) -> None:
        await eventually(lambda: len(self.calls) == times)

    @classmethod
    @asynccontextmanager
    async def opened(cls, clock: FakeClock) -> AsyncIterator["Bench"]:
        bench = cls(clock)
        yield bench
        for cache, store in bench.made:
            await cache.close()
            await store.close()


def number(entry: Entry | Served | None) -> int:
    return int(json.loads(entry.body)["number"]) if entry else 0


@pytest.fixture
async def bench(clock: FakeClock) -> AsyncIterator[Bench]:
    async with Bench.opened(clock) as bench:
        yield bench


async def test_an_entry_is_fresh_until_its_ttl(bench: Bench) -> None:
    """A miss is followed by hits of the right age; at the TTL it is a miss again."""
    assert await bench.ask() == ("miss", 1)
    bench.clock.advance(TTL - 0.001)
    assert await bench.ask() == ("hit_memory", 1)
    entry = bench.cache.memory.find_fresh(KEY)
    assert entry is not None
    assert entry.age(bench.clock.monotonic()) == pytest.approx(TTL - 0.001)
    bench.clock.advance(0.001)
    assert (bench.cache.memory.find_fresh(KEY), bench.cache.has_fresh(KEY)) == (None, False)
    assert await bench.ask() == ("miss", 2)


async def test_memory_ttl_limits_freshness_in_memory(bench: Bench) -> None:
    """No entry is fresh in memory at CACHE_MEMORY_TTL, however long its TTL."""
    cache = bench.make(cache_memory_ttl=5)
    await bench.ask()
    bench.clock.advance(4.999)
    assert cache.has_fresh(KEY)
    assert cache.has_fresh(KEY, 10)
    bench.clock.advance(0.001)
    assert (cache.memory.find_fresh(KEY), cache.memory.find_fresh(KEY, 10)) == (None, None)
    assert await bench.ask() == ("miss", 2)  # an entry within its TTL is never stale


async def test_concurrent_misses_share_one_upstream_call(bench: Bench) -> None:
    """A hundred callers of one missing key cause one load."""
    found = await asyncio.gather(*(bench.ask() for _ in range(100)))
    assert sorted(found) == [("coalesced", 1)] * 99 + [("miss", 1)]
    assert len(bench.calls) == 1


async def test_an_error_is_shared_but_not_remembered(bench: Bench) -> None:
    """All callers of a load get its error; the next caller loads again."""
    for times in (1, 2):
        bench.error, bench.refused = (FAILURE, {}) if times == 1 else (None, {KEY: FAILURE})
        assert (
            await asyncio.gather(*(bench.ask() for _ in range(20)), return_exceptions=True)
            == [FAILURE] * 20
        )
        assert len(bench.calls) == times
    bench.refused = {}
    assert await bench.ask() == ("miss", 3)


async def test_cancelled_callers_do_not_cancel_the_load(bench: Bench) -> None:
    """The others get their answer, and a load without callers still fills the cache."""
    gate = bench.close_gate()
    first, others = bench.task(), [bench.task() for _ in range(5)]
    lonely = bench.task(key("ETH/USDT"))
    await bench.called(2)
    first.cancel()
    lonely.cancel()
    await asyncio.wait([first, lonely])
    gate.set()
    assert await asyncio.gather(*others) == [("coalesced", 1)] * 5
    await eventually(lambda: bench.cache.has_fresh(key("ETH/USDT")))
    assert len(bench.calls) == 2


async def test_stale_while_revalidate_starts_one_refresh(bench: Bench) -> None:
    """In the window all callers get the stale entry at once, and one load replaces it."""
    cache = bench.make(revalidate_seconds=10)
    await bench.ask()
    gate = bench.close_gate()
    bench.clock.advance(TTL + 9.999)
    assert {await bench.ask() for _ in range(100)} == {("stale_revalidate", 1)}
    await bench.called(2)
    gate.set()
    await eventually(lambda: cache.has_fresh(KEY))
    assert await bench.ask() == ("hit_memory", 2)
    bench.clock.advance(TTL + 1)
    assert await bench.ask(max_age=1) == ("miss", 3), "a caller with max_age waits"
    bench.clock.advance(TTL + 10)
    assert await bench.ask() == ("miss", 4), "every caller waits after the window"


async def test_stale_entries_of_a_batch_are_refreshed_together(bench: Bench) -> None:
    """The stale entries are served at once, and one load refreshes all of them."""
    cache = bench.make(revalidate_seconds=30)
    keys = [key(f"X{number}/USDT") for number in range(5)]
    for result in ("miss", "stale_revalidate"):
        found = await cache.get_many(keys, bench.clock.monotonic() + 5)
        assert {outcome.result for outcome in found.values() if isinstance(outcome, Served)} == {
            result
        }
        bench.clock.advance(TTL)
    await bench.called(2)
    assert sorted(bench.calls[1]) == keys


async def test_a_successful_load_forgets_a_refusal(bench: Bench) -> None:
    """After a successful load a later miss asks the exchange again."""
    bench.make(negative_ttl_seconds=600)
    bench.refused = {KEY: REFUSAL}
    for _ in range(2):
        with pytest.raises(UnknownSymbol):
            await bench.ask()
    bench.refused = {}
    assert await bench.ask(max_age=0) == ("miss", 2)
    bench.clock.advance(TTL)
    assert await bench.ask() == ("miss", 3)


async def test_a_failed_refresh_keeps_the_stale_entry(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    """The failure is logged, and the next caller starts another refresh."""
    caplog.set_level(logging.DEBUG, "src.cache.cache")
    cache = bench.make(revalidate_seconds=10)
    await bench.ask()
    bench.clock.advance(TTL)
    bench.error = FAILURE
    for tries in (1, 2):
        assert await bench.ask() == ("stale_revalidate", 1)
        await bench.called(1 + tries)
        await eventually(lambda: not cache._flights)
        assert caplog.messages == ["load failed"] * tries
    bench.error = None
    assert await bench.ask() == ("stale_revalidate", 1)
    await eventually(lambda: cache.has_fresh(KEY))


async def test_stale_entries_are_served_for_stale_seconds(bench: Bench) -> None:
    """Up to STALE_SECONDS after the TTL, and below the caller's `max_age`."""
    cache = bench.make(stale_seconds=60, revalidate_seconds=90)
    await bench.ask()
    bench.clock.advance(TTL + 59.99)
    assert [number(cache.find_stale(KEY, limit)) for limit in (None, TTL + 60, TTL + 59.99)] == [
        1,
        1,
        0,
    ]
    bench.clock.advance(0.01)
    assert (cache.find_stale(KEY), len(cache.memory)) == (None, 1)
    before = sample("cache_evictions_total", reason="expired")
    bench.clock.advance(30)
    assert (len(cache.memory), sample("cache_evictions_total", reason="expired")) == (0, before + 1)


async def test_refusals_are_remembered_for_negative_ttl_seconds(bench: Bench) -> None:
    """Until then the exchange is not asked again, unless `max_age` is given."""
    bench.make(negative_ttl_seconds=10)
    bench.refused = {KEY: REFUSAL}
    for seconds, calls in ((0, 1), (9.99, 1), (0.01, 2)):
        bench.clock.advance(seconds)
        with pytest.raises(UnknownSymbol):
            await bench.ask()
        assert len(bench.calls) == calls
    bench.refused = {}
    assert await bench.ask(max_age=1) == ("miss", 3), "max_age asks the exchange again"


async def test_a_hanging_load_is_shared_and_waits_are_bounded(bench: Bench) -> None:
    """No caller waits past its deadline, no second load starts, and a late result is stored."""
    gate = bench.close_gate()
    for _ in range(3):
        with pytest.raises(DeadlineExceeded) as caught:
            await bench.ask(seconds=0.02)
        assert (caught.value.exchange, caught.value.symbol) == (KEY.exchange, KEY.symbol)
    assert len(bench.calls) == 1
    gate.set()
    await eventually(lambda: bench.cache.has_fresh(KEY))


@pytest.mark.parametrize("refresh", [False, True])
async def test_a_load_from_before_a_clear_is_not_stored(bench: Bench, refresh: bool) -> None:
    """It still answers its callers, and later callers do not join it."""
    cache = bench.make(revalidate_seconds=10)
    if refresh:
        await bench.ask()
        bench.clock.advance(TTL)
    first = len(bench.calls) + 1
    gate, before = bench.close_gate(), bench.task()
    await bench.called(first)
    assert await cache.clear() == refresh
    newer, after = bench.close_gate(), bench.task()
    await bench.called(first + 1)
    gate.set()
    assert (await before)[1] == 1
    await eventually(lambda: len(cache._tasks) == 1)
    assert len(cache.memory) == 0
    joined = bench.task()
    newer.set()
    assert [await after, await joined] == [("miss", first + 1), ("coalesced", first + 1)]
    assert number(cache.memory.find_fresh(KEY)) == len(bench.calls) == first + 1


async def test_clear_removes_one_exchange_or_symbol(bench: Bench) -> None:
    """Refusals are removed, too; other entries stay."""
    keys = [
        key(symbol, exchange)
        for exchange in ("bybit", "kraken")
        for symbol in ("A/B", "C/D", "E/F")
    ]
    bench.refused = {keys[0]: REFUSAL}
    await bench.cache.get_many(keys, bench.clock.monotonic() + 5)
    before = sample("cache_evictions_total", reason="cleared")
    assert [
        await bench.cache.clear(*what) for what in (("bybit", "C/D"), (None, "C/D"), ("bybit",))
    ] == [1, 1, 2]
    assert [name for name in keys if bench.cache.has_fresh(name)] == [keys[3], keys[5]]
    assert sample("cache_evictions_total", reason="cleared") == before + 4
    bench.refused = {}
    assert await bench.ask(keys[0]) == ("miss", 2)


async def test_a_flood_of_keys_does_not_evict_a_used_entry(bench: Bench) -> None:
    """The size is a hard bound, and the least recently used entries leave first."""
    cache, before = bench.make(cache_memory_size=10), sample("cache_evictions_total", reason="size")
    await bench.ask()
    for place in range(200):
        await bench.ask(key(f"X{place}/USDT"))
        assert await bench.ask() == ("hit_memory", 1)
    assert (len(cache.memory), sample("cache_evictions_total", reason="size")) == (10, before + 191)


def test_jitter_shortens_ttls_differently_per_body() -> None:
    """By at most its share, and by the same share on every replica."""

    def jittered(body: bytes, born: float) -> float:
        entry = Entry.create(KEY, body, born, born, TTL)
        entry.shorten_ttl(0.2)
        return entry.ttl

    ttls = [jittered(b"%d" % place, 0) for place in range(200)]
    assert ttls == [jittered(b"%d" % place, 5) for place in range(200)]
    assert TTL * 0.8 <= min(ttls) < TTL * 0.82 < TTL * 0.98 < max(ttls) <= TTL
    assert len(set(ttls)) > 190
    assert Entry.create(KEY, b"0", 0, 0, TTL).ttl == TTL


def test_a_joined_entry_has_the_ttl_of_its_parts() -> None:
    """To the last digit, whatever the time is."""
    for tenth in range(1000):
        parts = [Entry.create(KEY, b"1", 1000 + tenth / 10, 1000 + tenth / 10, TTL)] * 2
        assert Entry.join(b"11", parts).ttl == TTL


async def test_a_slow_load_does_not_delay_other_keys(bench: Bench) -> None:
    """A request waits only for the loads of its own keys."""
    gate, slow = bench.close_gate(), bench.task()
    await bench.called(1)
    bench.close_gate().set()
    assert await bench.ask(key("ETH/USDT")) == ("miss", 2)
    assert not slow.done()
    gate.set()
    assert await slow == ("miss", 1)


async def test_an_older_result_does_not_replace_a_newer_entry(bench: Bench) -> None:
    """A result of the same time does."""
    await bench.ask()
    bench.late = 1
    with pytest.raises(TooOld):
        await bench.ask(max_age=0)
    assert number(bench.cache.memory.find_fresh(KEY)) == 1
    bench.late = 0
    await bench.ask(max_age=0)
    assert number(bench.cache.memory.find_fresh(KEY)) == len(bench.calls)


async def test_unexpected_errors_without_callers_are_retrieved(bench: Bench) -> None:
    """asyncio reports no exception that was never retrieved."""
    reports: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: reports.append(context))
    gate, bench.error = bench.close_gate(), RuntimeError("unforeseen")
    with pytest.raises(DeadlineExceeded):
        await bench.ask(seconds=0)
    await bench.called(1)
    gate.set()
    await eventually(lambda: not bench.cache._tasks)
    gc.collect()
    assert (reports, bench.cache._flights) == ([], {})


async def test_max_age_excludes_older_entries(bench: Bench) -> None:
    """The answer is younger than `max_age`, or arrived after the call began."""
    await bench.ask()
    bench.clock.advance(2)
    assert (bench.cache.has_fresh(KEY, 2.001), bench.cache.has_fresh(KEY, 2)) == (True, False)
    assert [await bench.ask(max_age=limit) for limit in (2.001, 2, 0)] == [
        ("hit_memory", 1),
        ("miss", 2),
        ("miss", 3),
    ]


async def test_a_joined_load_that_is_too_old_is_followed_by_another(bench: Bench) -> None:
    """Each caller of a shared load applies its own `max_age`."""
    bench.late, gate = 8, bench.close_gate()
    tasks = [bench.task(max_age=limit) for limit in (None, 8.001, 8)]
    await bench.called(1)
    bench.late = 0
    bench.close_gate().set()
    gate.set()
    assert await asyncio.gather(*tasks) == [("miss", 1), ("coalesced", 1), ("miss", 2)]


@pytest.mark.parametrize("error", [None, FAILURE, RuntimeError("unforeseen")])
async def test_concurrent_loads_are_bounded(bench: Bench, error: Exception | None) -> None:
    """A load over MAX_CONCURRENT is refused at once; every load that ends makes room."""
    bench.make(max_concurrent=2)
    bench.error, gate = error, bench.close_gate()
    tasks = [bench.task(key(symbol)) for symbol in ("A/B", "C/D")]
    await bench.called(2)
    with pytest.raises(Overloaded):
        await bench.ask()
    gate.set()
    await asyncio.wait(tasks)
    assert [task.exception() for task in tasks] == [error, error]
    bench.error = None
    assert [await task for task in (bench.task(), bench.task(key("E/F")))] == [
        ("miss", 3),
        ("miss", 4),
    ]


async def test_a_batch_loads_all_missing_keys_at_once(bench: Bench) -> None:
    """Each key has its own outcome."""
    keys = [key(f"X{place}/USDT") for place in range(4)]
    await bench.ask(keys[0])
    bench.refused = {keys[1]: REFUSAL}
    found = await bench.cache.get_many(keys, bench.clock.monotonic() + 5)
    assert bench.calls == [keys[:1], keys[1:]]
    results = [
        outcome.result if isinstance(outcome, Served) else outcome
        for outcome in (found[key] for key in keys)
    ]
    assert results == ["hit_memory", REFUSAL, "miss", "miss"]


async def test_close_cancels_all_loads(bench: Bench) -> None:
    """Also those that a clear detached from their keys."""
    bench.close_gate()
    tasks = [bench.task(), bench.task(key("ETH/USDT"))]
    await bench.called(2)
    await bench.cache.clear(None, KEY.symbol)
    await bench.cache.close()
    assert (bench.cache._tasks, bench.cache._flights) == (set(), {})
    assert len((await asyncio.wait(tasks, timeout=60))[0]) == 2


def test_marking_an_entry_as_stale_leaves_its_body() -> None:
    """The stale body is another object."""
    entry = Entry.create(KEY, b'{"a":1,"stale":false}', 0, 0, TTL)
    assert (entry.marked_stale(), entry.body) == (b'{"a":1,"stale":true}', b'{"a":1,"stale":false}')


async def test_keys_are_canonical_and_versioned_in_redis(
    start: StartGateway, sandbox: Sandbox
) -> None:
    """Spellings of a symbol share an entry; an entry and its lock share a slot of a cluster."""
    ohlcv_key = Key("bybit", "ohlcv", "BTC/USDT", ("1m", 100))
    assert ohlcv_key.redis_name() == "virtuoso:3:data:{bybit|ohlcv|BTC/USDT|1m:100}"
    assert ohlcv_key.redis_name("lock") == "virtuoso:3:lock:{bybit|ohlcv|BTC/USDT|1m:100}"
    live = await start()
    for path in ("ticker/btc-usdt", "ticker/BTC/USDT", "ticker/Btc-Usdt?exchange=BYBIT"):
        assert (await live.get(f"/{path}")).status_code == 200
    assert sandbox.count("bybit") == 1
    for limit in (5, 51, 6):  # two sizes are fetched
        await live.get(f"/orderbook/BTC-USDT?limit={limit}")
    assert sandbox.count("bybit") == 3


async def test_answers_state_age_freshness_tag_and_cache_status(
    start: StartGateway, clock: FakeClock
) -> None:
    """Age, Cache-Control, Cache-Status and ETag."""
    live = await start(ticker_ttl_seconds=15)
    first = await live.get(PATH)
    names = ("Age", "Cache-Control", "Cache-Status")
    assert [first.headers[name] for name in names] == [
        "0",
        "max-age=15",
        "virtuoso; fwd=miss; stored; ttl=15",
    ]
    assert first.headers["ETag"] == etag_of(first.content)
    clock.advance(3.5)
    second = await live.get(PATH)
    assert [second.headers[name] for name in names] == [
        "3",
        "max-age=11",
        "virtuoso; hit; detail=memory; ttl=11",
    ]
    assert (second.content, second.headers["ETag"]) == (first.content, first.headers["ETag"])
    clock.advance(12)
    third = await live.get(PATH)
    assert (third.headers["Age"], third.headers["ETag"]) == ("0", etag_of(third.content))
    assert third.headers["ETag"] != first.headers["ETag"]


async def test_cache_status_names_collapsed_requests(start: StartGateway, sandbox: Sandbox) -> None:
    """Requests that shared a load have `collapsed` in Cache-Status."""
    live = await start()
    await sandbox.set("bybit", latency_ms=100, rate_limit=-1)
    found = [
        answer.headers["Cache-Status"]
        for answer in await asyncio.gather(*(live.get(PATH) for _ in range(5)))
    ]
    assert sorted(found) == ["virtuoso; fwd=miss; collapsed; ttl=15"] * 4 + [
        "virtuoso; fwd=miss; stored; ttl=15"
    ]


async def test_if_none_match_returns_304_with_headers(
    start: StartGateway, sandbox: Sandbox, clock: FakeClock
) -> None:
    """For one tag, a list, a weak tag and `*`."""
    live = await start()
    tag = (await live.get(PATH)).headers["ETag"]
    clock.advance(2)
    for condition in (tag, f'"other", {tag}', f"W/{tag}", f'W/"a",W/{tag} , "b"', "*"):
        answer = await live.get(PATH, headers={"If-None-Match": condition})
        assert (answer.status_code, answer.content) == (304, b"")
        assert [answer.headers[name] for name in ("ETag", "Cache-Control", "Age")] == [
            tag,
            "max-age=13",
            "2",
        ]
    for condition in ('"other"', tag.strip('"'), ""):
        assert (await live.get(PATH, headers={"If-None-Match": condition})).status_code == 200
    assert sandbox.count("bybit") == 1


async def test_a_failed_load_serves_the_stale_entry(
    start: StartGateway, sandbox: Sandbox, clock: FakeClock
) -> None:
    """With its true age, marked, and with its own tag, until STALE_SECONDS are over."""
    live = await start(ticker_ttl_seconds=15, stale_seconds=60, cb_threshold=100)
    fresh = await live.get(PATH)
    await sandbox.set("bybit", status=503, rate_limit=-1)
    clock.advance(20.5)
    old = await live.get(PATH)
    assert old.json() == fresh.json() | {"stale": True}
    assert [old.headers[name] for name in ("Age", "Cache-Control")] == ["20", "max-age=0"]
    assert old.headers["Cache-Status"] == "virtuoso; hit; detail=stale_error; ttl=-6"
    assert old.headers["ETag"] == etag_of(old.content)
    for tag, status in ((old.headers["ETag"], 304), (fresh.headers["ETag"], 200)):
        assert (await live.get(PATH, headers={"If-None-Match": tag})).status_code == status
    assert (await live.get(f"{PATH}&max_age=20")).status_code == 503
    clock.advance(54.4)
    assert (await live.get(PATH)).headers["Age"] == "74"
    clock.advance(0.2)
    assert (await live.get(PATH)).status_code == 502


async def test_a_stale_entry_does_not_hide_a_refusal(
    start: StartGateway, sandbox: Sandbox, clock: FakeClock
) -> None:
    """An exchange that refuses the parameters is reported to the client."""
    live = await start()
    await live.get(PATH)
    clock.advance(20)
    await sandbox.set(
        "bybit",
        body='{"retCode":10001,"retMsg":"Not supported symbols","result":{}}',
        rate_limit=-1,
    )
    assert (await live.get(PATH)).status_code in {404, 422}


async def test_implausible_answers_are_not_stored(
    start: StartGateway, sandbox: Sandbox, clock: FakeClock
) -> None:
    """They are errors, and a request after the pause of the market asks again."""
    live = await start()
    for body in (
        "{}",
        "<html>oops",
        '{"retCode":0,"result":{"list":[{"symbol":"BTCUSDT","lastPrice":"0"}]}}',
    ):
        await sandbox.set("bybit", body=body, rate_limit=-1)
        assert (await live.get(PATH)).status_code == 502
        assert len(live.gateway.cache.memory) == 0
        clock.advance(2)
    await sandbox.set("bybit", rate_limit=-1)
    assert (await live.get(PATH)).status_code == 200


async def test_age_counts_from_the_upstream_request(
    start: StartGateway, sandbox: Sandbox, clock: FakeClock
) -> None:
    """A slow answer is as old as its request."""
    live = await start()
    await sandbox.set("bybit", latency_ms=200, rate_limit=-1)
    request = asyncio.create_task(live.get(PATH))
    await eventually(lambda: sandbox.count("bybit"))
    clock.advance(4)
    assert (await request).headers["Age"] == "4"


async def test_a_hanging_exchange_causes_504(start: StartGateway, sandbox: Sandbox) -> None:
    """Whether the timeout of the call or of the request ends first."""
    for setting, code in (
        ("exchange_timeout_seconds", "exchange_timeout"),
        ("request_timeout", "deadline_exceeded"),
    ):
        live = await start(**{setting: 0.1})
        await sandbox.set("bybit", hang=True, rate_limit=-1)
        answer = await live.get(PATH)
        assert (answer.status_code, answer.json()["code"]) == (504, code)
        await sandbox.set("bybit", rate_limit=-1)


async def test_errors_have_no_store(start: StartGateway, sandbox: Sandbox) -> None:
    """A batch that contains an error, too."""
    live = await start()
    await sandbox.set("bybit", status=500, rate_limit=-1)
    paths = {"/ticker/NO/SUCH": 404, "/ticker/BTC/USDT?max_age=-1": 422, "/nothing": 404, PATH: 502}
    for path, status in (
        paths | {"/tickers?symbols=BTC/USDT,NO/SUCH&exchange=kraken": 200}
    ).items():
        answer = await live.get(path)
        assert (answer.status_code, answer.headers["Cache-Control"]) == (status, "no-store")
        assert "ETag" not in answer.headers
