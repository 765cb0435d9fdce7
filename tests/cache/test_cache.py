"""The cache in memory, by itself and as clients see it in headers."""

import asyncio
import gc
import json
import logging
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import FrozenInstanceError
from typing import Any

import pytest

from src.cache.cache import Cache, Lookup
from src.cache.entry import Entry, Key, etag_of
from src.core.clock import Clock
from src.core.errors import (
    DeadlineExceeded,
    ExchangeUnavailable,
    GatewayError,
    NoPrice,
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
    """A cache and what it loads from: numbered answers, which come late or not at all when told."""

    def __init__(self, clock: FakeClock) -> None:
        self.clock = clock
        self.made: list[tuple[Cache, RedisStore]] = []
        self.calls: list[list[Key]] = []
        self.error: Exception | None = None  # raised by every load
        self.refused: Mapping[Key, GatewayError] = {}  # the value of a key
        self.late = 0.0  # how long before a load its values were asked for
        self.gate = asyncio.Event()  # what loads that begin now wait for
        self.gate.set()
        self.cache = self.make()

    def make(self, clock: Clock | None = None, **overrides: object) -> Cache:
        settings, clock = make_settings(None, **overrides), clock or self.clock
        store = RedisStore(settings.redis_address, clock, settings.redis_timeout_seconds)
        self.cache = Cache(settings, store, clock)
        self.made.append((self.cache, store))
        return self.cache

    def close_gate(self) -> asyncio.Event:
        self.gate = asyncio.Event()
        return self.gate

    async def load(self, keys: Sequence[Key]) -> dict[Key, Entry | GatewayError]:
        gate, late, number, started = self.gate, self.late, len(self.calls) + 1, self.clock.monotonic()
        self.calls.append(list(keys))
        await gate.wait()
        if self.error is not None:
            raise self.error
        body = b'{"number":%d,"stale":false}' % number
        entry = Entry.of(body, started - late, self.clock.monotonic() - late, TTL)
        return {key: self.refused.get(key) or entry for key in keys}

    async def ask(
        self, key: Key = KEY, max_age: float | None = None, seconds: float = 5, cache: Cache | None = None
    ) -> tuple[str, int]:
        """Look a key up; returns how it was found and the number of the load it came from."""
        cache = self.cache if cache is None else cache
        found = await cache.get(key, TTL, self.load, cache._clock.monotonic() + seconds, max_age)
        return found.result, number(found.entry)

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


def number(entry: Entry | None) -> int:
    return int(json.loads(entry.body)["number"]) if entry else 0


@pytest.fixture
async def bench(clock: FakeClock) -> AsyncIterator[Bench]:
    async with Bench.opened(clock) as bench:
        yield bench


async def test_an_entry_is_fresh_for_less_than_its_ttl(bench: Bench) -> None:
    """A miss is followed by hits of the right age until the age is the TTL; then it is a miss again."""
    assert await bench.ask() == ("miss", 1)
    bench.clock.advance(TTL - 0.001)
    assert await bench.ask() == ("hit_memory", 1)
    entry = bench.cache.peek(KEY)
    assert entry is not None
    assert entry.age(bench.clock.monotonic()) == pytest.approx(TTL - 0.001)
    bench.clock.advance(0.001)
    assert (bench.cache.peek(KEY), bench.cache.has_fresh(KEY)) == (None, False)
    assert await bench.ask() == ("miss", 2)


async def test_memory_has_a_limit_of_its_own(bench: Bench) -> None:
    """Memory gives no entry out as fresh at or past its own limit, however long the TTL or the caller's limit."""
    cache = bench.make(cache_memory_ttl=5)
    await bench.ask()
    bench.clock.advance(4.999)
    assert cache.has_fresh(KEY)
    assert cache.has_fresh(KEY, 10)
    bench.clock.advance(0.001)
    assert (cache.peek(KEY), cache.peek(KEY, 10)) == (None, None)
    assert await bench.ask() == ("miss", 2)  # and what is younger than its TTL is never called old


async def test_a_hundred_cold_callers_make_one_load(bench: Bench) -> None:
    """Callers who miss the same key at once share one load."""
    found = await asyncio.gather(*(bench.ask() for _ in range(100)))
    assert sorted(found) == [("coalesced", 1)] * 99 + [("miss", 1)]
    assert len(bench.calls) == 1


async def test_an_error_is_shared_but_not_kept(bench: Bench) -> None:
    """All who wait for a load get its error, raised or of their key; the next caller loads again."""
    for times in (1, 2):
        bench.error, bench.refused = (FAILURE, {}) if times == 1 else (None, {KEY: FAILURE})
        assert await asyncio.gather(*(bench.ask() for _ in range(20)), return_exceptions=True) == [FAILURE] * 20
        assert len(bench.calls) == times
    bench.refused = {}
    assert await bench.ask() == ("miss", 3)


async def test_callers_may_leave(bench: Bench) -> None:
    """A caller who leaves takes nothing from the others, and a load that all have left still fills the cache."""
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


async def test_an_old_value_is_served_while_one_refresh_runs(bench: Bench) -> None:
    """In the revalidation window a hundred callers get the old value at once, and one load brings the new one."""
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
    assert await bench.ask(max_age=1) == ("miss", 3), "who limits the age waits"
    bench.clock.advance(TTL + 10)
    assert await bench.ask() == ("miss", 4), "and so does everybody past the window"


async def test_refreshes_of_a_batch_are_one_load(bench: Bench) -> None:
    """Old values that are asked for together are served at once and refreshed together."""
    cache = bench.make(revalidate_seconds=30)
    keys = [key(f"X{number}/USDT") for number in range(5)]
    for found_as in ("miss", "stale_revalidate"):
        found = await cache.get_many(keys, TTL, bench.load, bench.clock.monotonic() + 5)
        assert {outcome.result for outcome in found.values() if isinstance(outcome, Lookup)} == {found_as}
        bench.clock.advance(TTL)
    await bench.called(2)
    assert sorted(bench.calls[1]) == keys


async def test_a_success_ends_a_refusal(bench: Bench) -> None:
    """Once the exchange has answered for a key, what it refused before is forgotten."""
    bench.make(negative_ttl_seconds=600)
    bench.refused = {KEY: REFUSAL}
    for _ in range(2):
        with pytest.raises(UnknownSymbol):
            await bench.ask()
    bench.refused = {}
    assert await bench.ask(max_age=0) == ("miss", 2)
    bench.clock.advance(TTL)
    assert await bench.ask() == ("miss", 3)


async def test_a_failed_refresh_keeps_the_old_value(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    """A refresh that fails is logged, leaves the old value in place, and is tried again by the next caller."""
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


async def test_how_long_an_old_value_may_stand_in(bench: Bench) -> None:
    """An old value stands in for less than its TTL and the window, and less than the caller's limit."""
    cache = bench.make(stale_seconds=60, revalidate_seconds=90)
    await bench.ask()
    bench.clock.advance(TTL + 59.99)
    assert [number(cache.stale(KEY, limit)) for limit in (None, TTL + 60, TTL + 59.99)] == [1, 1, 0]
    bench.clock.advance(0.01)
    assert (cache.stale(KEY), len(cache)) == (None, 1)
    before = sample("cache_evictions_total", reason="expired")
    bench.clock.advance(30)
    assert (len(cache), sample("cache_evictions_total", reason="expired")) == (0, before + 1)


@pytest.mark.parametrize("refusal", [REFUSAL, NoPrice("it has never traded")])
async def test_a_refusal_is_remembered_for_a_time_of_its_own(bench: Bench, refusal: GatewayError) -> None:
    """What the exchange refused is refused again without asking, until its own short time is over."""
    bench.make(negative_ttl_seconds=10)
    bench.refused = {KEY: refusal}
    for seconds, calls in ((0, 1), (9.99, 1), (0.01, 2)):
        bench.clock.advance(seconds)
        with pytest.raises(type(refusal)):
            await bench.ask()
        assert len(bench.calls) == calls
    bench.refused = {}
    assert await bench.ask(max_age=1) == ("miss", 3), "who wants it new has it asked again"


async def test_a_hanging_load_is_one_load_and_bounded(bench: Bench) -> None:
    """Nobody waits past his deadline, no second load piles up, and what comes late is kept."""
    gate = bench.close_gate()
    for _ in range(3):
        with pytest.raises(DeadlineExceeded) as caught:
            await bench.ask(seconds=0.02)
        assert (caught.value.exchange, caught.value.symbol) == (KEY.exchange, KEY.symbol)
    assert len(bench.calls) == 1
    gate.set()
    await eventually(lambda: bench.cache.has_fresh(KEY))


@pytest.mark.parametrize("refresh", [False, True])
async def test_a_clear_is_not_undone_by_a_load(bench: Bench, refresh: bool) -> None:
    """A load or refresh under way at a clear answers its callers but leaves nothing, and nobody joins it later."""
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
    assert len(cache) == 0
    joined = bench.task()
    newer.set()
    assert [await after, await joined] == [("miss", first + 1), ("coalesced", first + 1)]
    assert number(cache.peek(KEY)) == len(bench.calls) == first + 1


async def test_a_clear_takes_only_what_it_names(bench: Bench) -> None:
    """A clear of one exchange or one symbol leaves the others; refusals go too."""
    keys = [key(symbol, exchange) for exchange in ("bybit", "kraken") for symbol in ("A/B", "C/D", "E/F")]
    bench.refused = {keys[0]: REFUSAL}
    await bench.cache.get_many(keys, TTL, bench.load, bench.clock.monotonic() + 5)
    before = sample("cache_evictions_total", reason="cleared")
    assert [await bench.cache.clear(*what) for what in (("bybit", "C/D"), (None, "C/D"), ("bybit",))] == [1, 1, 2]
    assert [one for one in keys if bench.cache.has_fresh(one)] == [keys[3], keys[5]]
    assert sample("cache_evictions_total", reason="cleared") == before + 4
    bench.refused = {}
    assert await bench.ask(keys[0]) == ("miss", 2)


async def test_a_flood_neither_grows_memory_nor_drives_out_what_is_used(bench: Bench) -> None:
    """The bound on entries is hard, and the least recently used go first."""
    cache, before = bench.make(cache_memory_size=10), sample("cache_evictions_total", reason="size")
    await bench.ask()
    for place in range(200):
        await bench.ask(key(f"X{place}/USDT"))
        assert await bench.ask() == ("hit_memory", 1)
    assert (len(cache), sample("cache_evictions_total", reason="size")) == (10, before + 191)


def test_jitter_spreads_expiries() -> None:
    """Jitter only shortens a TTL, by up to its share, differently for different bodies, and alike on every replica."""
    ttls = [Entry.of(b"%d" % place, 0, 0, TTL, 0.2).ttl for place in range(200)]
    assert ttls == [Entry.of(b"%d" % place, 5, 5, TTL, 0.2).ttl for place in range(200)]
    assert TTL * 0.8 <= min(ttls) < TTL * 0.82 < TTL * 0.98 < max(ttls) <= TTL
    assert len(set(ttls)) > 190
    assert Entry.of(b"0", 0, 0, TTL).ttl == TTL


def test_entries_that_are_joined_keep_their_ttl() -> None:
    """A batch that was loaded at once is fresh for the TTL of its parts, to the last digit, whatever the time is."""
    for tenth in range(1000):
        parts = [Entry.of(b"1", 1000 + tenth / 10, 1000 + tenth / 10, TTL)] * 2
        assert Entry.joined(b"11", parts).ttl == TTL


async def test_a_slow_key_does_not_delay_others(bench: Bench) -> None:
    """A lookup waits only for the loads of its own keys."""
    gate, slow = bench.close_gate(), bench.task()
    await bench.called(1)
    bench.close_gate().set()
    assert await bench.ask(key("ETH/USDT")) == ("miss", 2)
    assert not slow.done()
    gate.set()
    assert await slow == ("miss", 1)


async def test_an_older_load_does_not_replace_a_newer_value(bench: Bench) -> None:
    """A value that was asked for earlier than the one in memory does not take its place; one of the same time does."""
    await bench.ask()
    bench.late = 1
    with pytest.raises(TooOld):
        await bench.ask(max_age=0)
    assert number(bench.cache.peek(KEY)) == 1
    bench.late = 0
    await bench.ask(max_age=0)
    assert number(bench.cache.peek(KEY)) == len(bench.calls)


async def test_errors_nobody_waits_for_are_not_lost(bench: Bench) -> None:
    """asyncio has nothing to complain about when a load fails after its callers left, or was never waited for."""
    complaints: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
    gate, bench.error = bench.close_gate(), RuntimeError("unforeseen")
    with pytest.raises(DeadlineExceeded):
        await bench.ask(seconds=0)
    await bench.called(1)
    gate.set()
    await eventually(lambda: not bench.cache._tasks)
    gc.collect()
    assert (complaints, bench.cache._flights) == ([], {})


async def test_nothing_older_than_asked_for(bench: Bench) -> None:
    """A caller with a limit on the age gets a value below it, or one that arrived after he came."""
    await bench.ask()
    bench.clock.advance(2)
    assert (bench.cache.has_fresh(KEY, 2.001), bench.cache.has_fresh(KEY, 2)) == (True, False)
    assert [await bench.ask(max_age=limit) for limit in (2.001, 2, 0)] == [("hit_memory", 1), ("miss", 2), ("miss", 3)]


async def test_who_joins_a_load_that_brings_too_old_a_value_loads_again(bench: Bench) -> None:
    """A shared load satisfies each caller by his own limit; who is not satisfied gets a load of his own."""
    bench.late, gate = 8, bench.close_gate()
    tasks = [bench.task(max_age=limit) for limit in (None, 8.001, 8)]
    await bench.called(1)
    bench.late = 0
    bench.close_gate().set()
    gate.set()
    assert await asyncio.gather(*tasks) == [("miss", 1), ("coalesced", 1), ("miss", 2)]


@pytest.mark.parametrize("error", [None, FAILURE, RuntimeError("unforeseen")])
async def test_loads_are_limited(bench: Bench, error: Exception | None) -> None:
    """More loads than allowed are refused at once; each that ends, however it ends, makes room for another."""
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
    assert [await task for task in (bench.task(), bench.task(key("E/F")))] == [("miss", 3), ("miss", 4)]


async def test_many_keys_are_one_load_of_what_is_missing(bench: Bench) -> None:
    """A lookup of many keys loads what memory lacks, all at once, and tells of each by itself."""
    keys = [key(f"X{place}/USDT") for place in range(4)]
    await bench.ask(keys[0])
    bench.refused = {keys[1]: REFUSAL}
    found = await bench.cache.get_many(keys, TTL, bench.load, bench.clock.monotonic() + 5)
    assert bench.calls == [keys[:1], keys[1:]]
    told = [one.result if isinstance(one, Lookup) else one for one in (found[key] for key in keys)]
    assert told == ["hit_memory", REFUSAL, "miss", "miss"]


async def test_closing_ends_every_load(bench: Bench) -> None:
    """Closing cancels the loads under way, those too that a clear made nobody join any more."""
    bench.close_gate()
    tasks = [bench.task(), bench.task(key("ETH/USDT"))]
    await bench.called(2)
    await bench.cache.clear(None, KEY.symbol)
    await bench.cache.close()
    assert (bench.cache._tasks, bench.cache._flights, bench.cache._loads) == (set(), {}, 0)
    assert len((await asyncio.wait(tasks, timeout=60))[0]) == 2


def test_what_is_cached_cannot_be_changed() -> None:
    """An entry is frozen, its body is bytes, and its stale form is another body."""
    entry = Entry.of(b'{"a":1,"stale":false}', 0, 0, TTL)
    with pytest.raises(FrozenInstanceError):
        entry.body = b""  # type: ignore[misc]
    assert (entry.marked_stale(), entry.body) == (b'{"a":1,"stale":true}', b'{"a":1,"stale":false}')


async def test_keys_are_versioned_and_canonical(start: StartGateway, sandbox: Sandbox) -> None:
    """Spellings of a symbol share an entry, other parameters do not; a value and its lock share a slot in Redis."""
    one = Key("bybit", "ohlcv", "BTC/USDT", "1m:100")
    assert one.redis() == "virtuoso:1:data:{bybit|ohlcv|BTC/USDT|1m:100}"
    assert one.redis("lock") == "virtuoso:1:lock:{bybit|ohlcv|BTC/USDT|1m:100}"
    live = await start()
    for path in ("ticker/btc-usdt", "ticker/BTC/USDT", "ticker/Btc-Usdt?exchange=BYBIT"):
        assert (await live.get(f"/{path}")).status_code == 200
    assert sandbox.count("bybit") == 1
    for limit in (5, 6, 5):
        await live.get(f"/orderbook/BTC-USDT?limit={limit}")
    assert sandbox.count("bybit") == 3


async def test_freshness_headers(start: StartGateway, clock: FakeClock) -> None:
    """An answer tells its age, how long it stays fresh, its tag and how it was found."""
    live = await start(ticker_ttl_seconds=15)
    first = await live.get(PATH)
    names = ("Age", "Cache-Control", "Cache-Status")
    assert [first.headers[name] for name in names] == ["0", "max-age=15", "virtuoso; fwd=miss; stored; ttl=15"]
    assert first.headers["ETag"] == etag_of(first.content)
    clock.advance(3.5)
    second = await live.get(PATH)
    assert [second.headers[name] for name in names] == ["3", "max-age=11", "virtuoso; hit; detail=memory; ttl=11"]
    assert (second.content, second.headers["ETag"]) == (first.content, first.headers["ETag"])
    clock.advance(12)
    third = await live.get(PATH)
    assert (third.headers["Age"], third.headers["ETag"]) == ("0", etag_of(third.content))
    assert third.headers["ETag"] != first.headers["ETag"]


async def test_callers_of_one_load_are_told_so(start: StartGateway, sandbox: Sandbox) -> None:
    """Who shared another's load finds that in Cache-Status."""
    live = await start()
    await sandbox.set("bybit", latency_ms=100, rate_limit=-1)
    found = [answer.headers["Cache-Status"] for answer in await asyncio.gather(*(live.get(PATH) for _ in range(5)))]
    assert sorted(found) == ["virtuoso; fwd=miss; collapsed; ttl=15"] * 4 + ["virtuoso; fwd=miss; stored; ttl=15"]


async def test_conditional_requests(start: StartGateway, sandbox: Sandbox, clock: FakeClock) -> None:
    """A tag the client has gives 304 without a body but with the headers: alone, in a list, weak, or any."""
    live = await start()
    tag = (await live.get(PATH)).headers["ETag"]
    clock.advance(2)
    for condition in (tag, f'"other", {tag}', f"W/{tag}", f'W/"a",W/{tag} , "b"', "*"):
        answer = await live.get(PATH, headers={"If-None-Match": condition})
        assert (answer.status_code, answer.content) == (304, b"")
        assert [answer.headers[name] for name in ("ETag", "Cache-Control", "Age")] == [tag, "max-age=13", "2"]
    for condition in ('"other"', tag.strip('"'), ""):
        assert (await live.get(PATH, headers={"If-None-Match": condition})).status_code == 200
    assert sandbox.count("bybit") == 1


async def test_an_old_value_stands_in_for_a_failed_load(
    start: StartGateway, sandbox: Sandbox, clock: FakeClock
) -> None:
    """Inside its window an old value is served with its true age, marked, under a tag of its own; then the error."""
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


async def test_a_refusal_is_not_hidden_behind_an_old_value(
    start: StartGateway, sandbox: Sandbox, clock: FakeClock
) -> None:
    """When the exchange calls the request wrong the client hears that, and not an old price."""
    live = await start()
    await live.get(PATH)
    clock.advance(20)
    await sandbox.set("bybit", body='{"retCode":10001,"retMsg":"Not supported symbols","result":{}}', rate_limit=-1)
    assert (await live.get(PATH)).status_code in {404, 422}


async def test_an_implausible_answer_is_never_kept(start: StartGateway, sandbox: Sandbox) -> None:
    """What the exchange sends wrong is an error, and the next request asks again."""
    live = await start()
    for body in ("{}", "<html>oops", '{"retCode":0,"result":{"list":[{"symbol":"BTCUSDT","lastPrice":"0"}]}}'):
        await sandbox.set("bybit", body=body, rate_limit=-1)
        assert (await live.get(PATH)).status_code == 502
        assert len(live.gateway.cache) == 0
    await sandbox.set("bybit", rate_limit=-1)
    assert (await live.get(PATH)).status_code == 200


async def test_age_counts_from_the_request(start: StartGateway, sandbox: Sandbox, clock: FakeClock) -> None:
    """A slow answer is as old as the question."""
    live = await start()
    await sandbox.set("bybit", latency_ms=200, rate_limit=-1)
    request = asyncio.create_task(live.get(PATH))
    await eventually(lambda: sandbox.count("bybit"))
    clock.advance(4)
    assert (await request).headers["Age"] == "4"


async def test_a_cold_request_to_a_hanging_exchange_is_a_504(start: StartGateway, sandbox: Sandbox) -> None:
    """No answer in time is a gateway timeout, whether the time of the call or of the request ends first."""
    for setting, code in (("exchange_timeout_seconds", "exchange_timeout"), ("request_timeout", "deadline_exceeded")):
        live = await start(**{setting: 0.1})
        await sandbox.set("bybit", hang=True, rate_limit=-1)
        answer = await live.get(PATH)
        assert (answer.status_code, answer.json()["code"]) == (504, code)
        await sandbox.set("bybit", rate_limit=-1)


async def test_errors_are_not_to_be_cached(start: StartGateway, sandbox: Sandbox) -> None:
    """Every error says no-store, and so does a batch that holds one."""
    live = await start()
    await sandbox.set("bybit", status=500, rate_limit=-1)
    paths = {"/ticker/NO/SUCH": 404, "/ticker/BTC/USDT?max_age=-1": 422, "/nothing": 404, PATH: 502}
    for path, status in (paths | {"/tickers?symbols=BTC/USDT,NO/SUCH&exchange=kraken": 200}).items():
        answer = await live.get(path)
        assert (answer.status_code, answer.headers["Cache-Control"]) == (status, "no-store")
        assert "ETag" not in answer.headers
