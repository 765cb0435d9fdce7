"""The sliding window in memory, and the request budgets that replicas share in Redis."""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from src.core.errors import BudgetSpent, ExchangeBanned, ExchangeRateLimited
from src.exchanges.budget import RateLimiter
from src.store.redis import BREAKER_MAX_OPEN_SECONDS, PREFIX, RedisStore
from src.store.window import BUCKETS, SharedWindow, Window
from tests.conftest import FakeClock, RedisServer

LIMIT, SECONDS = 10, 60
KEY = f"{PREFIX}budget:{{binance}}"
TICK = 1 / 64  # seconds; times are multiples of it, so that they are exact floats
LONG = 100_000  # seconds; the duration of a test is negligible in such a window
BUCKET_MS = LONG * 1000 // BUCKETS

Steps = list[tuple[int, int]]
steps = st.lists(st.tuples(st.integers(0, 3 * 64), st.integers(1, 12)), min_size=1, max_size=60)
lengths = st.sampled_from([5, 10, 60])  # seconds whose tenth is a whole number of ticks
Make = Callable[..., RateLimiter]


def spend(window: Window, clock: FakeClock, schedule: Steps) -> list[tuple[float, int]]:
    """Spend what fits, with a pause before each step, and return the times and weights."""
    spent = []
    for pause, cost in schedule:
        clock.advance(pause * TICK)
        if window.wait_for(cost) == 0:
            weight = min(cost, window.limit)
            window.add(weight)
            spent.append((clock.monotonic(), weight))
    return spent


@settings(max_examples=300, deadline=None)
@given(steps, lengths)
def test_no_period_of_the_window_length_exceeds_the_limit(schedule: Steps, seconds: int) -> None:
    """At most the limit is spent in any period as long as the window."""
    clock = FakeClock()
    spent = spend(Window(LIMIT, seconds, clock), clock, schedule)
    for begin, _ in spent:
        assert sum(weight for at, weight in spent if begin <= at <= begin + seconds) <= LIMIT


@settings(max_examples=300, deadline=None)
@given(steps, lengths, st.integers(1, 12))
def test_wait_is_exact(schedule: Steps, seconds: int, cost: int) -> None:
    """The cost fits after the wait, and not shortly before."""
    clock = FakeClock()
    window = Window(LIMIT, seconds, clock)
    spend(window, clock, schedule)
    wait = window.wait_for(cost)
    assert 0 <= wait <= seconds * (1 + 1 / BUCKETS)
    if wait:
        clock.advance(wait - TICK / 2)
        assert window.wait_for(cost) == TICK / 2
        clock.advance(TICK / 2)
        assert window.wait_for(cost) == 0


def test_weight_returns_one_bucket_at_a_time(clock: FakeClock) -> None:
    """Weight returns when its bucket, a tenth of the window, has left the window."""
    window = Window(2 * (BUCKETS + 1), 10, clock)
    for number in range(BUCKETS + 1):
        window.add(1)
        clock.advance(0.75)
        window.add(1)
        assert window.used() == 2 * (number + 1)
        clock.advance(0.25)
    assert (window.used(), window.wait_for(2), window.wait_for(6)) == (2 * BUCKETS, 0, 2)
    clock.advance(BUCKETS)
    assert window.used() == 0


def test_cost_above_the_limit_counts_as_the_limit(clock: FakeClock) -> None:
    """A cost above the limit waits for an empty window instead of forever."""
    window = Window(LIMIT, 10, clock)
    assert window.wait_for(10 * LIMIT) == 0
    window.add(1)
    assert window.wait_for(10 * LIMIT) == window.wait_for(LIMIT) == 11
    clock.advance(11)
    assert window.wait_for(10 * LIMIT) == 0


async def test_raise_to_never_lowers_the_count(clock: FakeClock) -> None:
    """A higher count is accepted, a lower one changes nothing."""
    window = Window(LIMIT, 10, clock)
    shared = SharedWindow(KEY, window, RedisStore("", clock), "budget")
    window.add(3)
    for count, used in ((7, 7), (2, 7), (7, 7), (15, 15)):
        await shared.raise_to(count)
        assert window.used() == used
    assert window.wait_for(1) == 11


@pytest.fixture
async def make(clock: FakeClock) -> AsyncIterator[Make]:
    """Make limiters for two exchanges: `make(redis.url)`, or `make()` without Redis."""
    stores: list[RedisStore] = []

    def limiter(url: str = "", seconds: int = SECONDS) -> RateLimiter:
        stores.append(RedisStore(url, clock, timeout=5))
        return RateLimiter(
            dict.fromkeys(["binance", "kraken"], (LIMIT, seconds)), stores[-1], clock
        )

    yield limiter
    for store in stores:
        await store.close()


async def refused(limiter: RateLimiter, cost: int = 1) -> BudgetSpent:
    with pytest.raises(BudgetSpent) as raised:
        await limiter.acquire("binance", cost)
    assert raised.value.exchange == "binance"
    return raised.value


def now_ms(redis: RedisServer) -> int:
    seconds, micros = redis.client.time()
    return int(seconds * 1000 + micros // 1000)


def put(redis: RedisServer, *ages: int, weight: int) -> int:
    """Store weight that was spent a number of buckets ago, and return the current bucket."""
    current = now_ms(redis) // BUCKET_MS
    for age in ages:
        redis.client.hset(KEY, str(current - age), weight)
    return current


@pytest.mark.parametrize("shared", [True, False])
async def test_concurrent_calls_do_not_exceed_the_budget(
    make: Make, redis: RedisServer, shared: bool
) -> None:
    """The budget limits concurrent calls of two limiters with one Redis, and of one alone."""
    limiters = [make(redis.url), make(redis.url)] if shared else [make()] * 2
    calls = [limiter.acquire("binance", 1) for limiter in limiters * LIMIT]
    outcomes = await asyncio.gather(*calls, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes if outcome is not None] == [BudgetSpent] * LIMIT


async def test_two_limiters_share_one_budget(make: Make, redis: RedisServer) -> None:
    """A limiter cannot spend what another has spent. Each exchange has its own budget."""
    first, second = make(redis.url), make(redis.url)
    await first.acquire("binance", 6)
    assert second.used_ratio("binance") == 0
    await refused(second, 5)
    assert second.used_ratio("binance") == 0.6
    assert (second.is_spent("binance", 4), second.is_spent("binance", 5)) == (False, True)
    await second.acquire("binance", 4)
    assert second.used_ratio("binance") == 1
    await refused(first)
    await first.acquire("kraken", LIMIT)


@pytest.mark.parametrize(
    ("cost", "age"), [(1, 10), (4, 10), (5, 6), (8, 6), (9, 0), (10, 0), (99, 0)]
)
async def test_refusal_has_the_seconds_to_wait(
    make: Make, redis: RedisServer, cost: int, age: int
) -> None:
    """The wait ends when enough of the oldest weight returns for the cost to fit."""
    current = put(redis, 0, weight=2)
    put(redis, 6, 10, weight=4)
    earliest = now_ms(redis)
    wait = (await refused(make(redis.url, LONG), cost)).retry_after
    frees_at = (current - age + BUCKETS + 1) * BUCKET_MS
    assert wait is not None
    assert (frees_at - now_ms(redis)) / 1000 <= wait <= (frees_at - earliest) / 1000


async def test_refusal_without_redis_has_the_seconds_to_wait(make: Make, clock: FakeClock) -> None:
    """The cost fits after the wait."""
    limiter = make(seconds=10)
    await limiter.acquire("binance", LIMIT)
    refusal = await refused(limiter)
    assert refusal.retry_after == 11
    assert "(10 per 10 s)" in refusal.detail
    clock.advance(11)
    await limiter.acquire("binance", 1)
    assert limiter.used_ratio("binance") == 0.1


async def test_old_buckets_are_deleted_from_redis(make: Make, redis: RedisServer) -> None:
    """Weight older than the window and one bucket does not count, and is deleted."""
    current = put(redis, 11, 12, weight=LIMIT)
    await make(redis.url, LONG).acquire("binance", LIMIT)
    assert redis.client.hgetall(KEY) == {b"%d" % current: b"%d" % LIMIT}


async def test_cost_above_the_limit_spends_the_limit(make: Make, redis: RedisServer) -> None:
    """A cost above the budget is admitted when the whole budget is available."""
    for limiter in (make(redis.url), make()):
        await limiter.acquire("binance", 10 * LIMIT)
        assert limiter.used_ratio("binance") == 1
        await refused(limiter)


@pytest.mark.parametrize("cause", [ExchangeBanned.cause, ExchangeRateLimited.cause])
async def test_hold_applies_to_all_limiters(make: Make, redis: RedisServer, cause: str) -> None:
    """A ban or rate limit stops all limiters for as long, with its cause, and spends nothing."""
    first, second = make(redis.url), make(redis.url)
    await first.acquire("binance", 2)
    await first.hold("binance", 90.5, cause)
    for _ in range(LIMIT):
        with pytest.raises(ExchangeRateLimited) as raised:
            await second.acquire("binance", 1)
    assert (raised.value.cause, raised.value.exchange) == (cause, "binance")
    assert 85 < (raised.value.retry_after or 0) <= 90.5
    await second.acquire("kraken", 1)
    assert second.used_ratio("binance") == 0.2
    with pytest.raises(ExchangeRateLimited):
        await second.acquire("binance", LIMIT)


async def test_release_ends_only_the_hold(make: Make, redis: RedisServer) -> None:
    """After a release, other limiters may spend again. Spent weight stays spent."""
    first, second = make(redis.url), make(redis.url)
    await first.acquire("binance", 8)
    await first.hold("binance", 90, "banned")
    await first.release("binance")
    await refused(second, 3)
    await second.acquire("binance", 2)


async def test_hold_expires(make: Make, redis: RedisServer) -> None:
    """A hold in the past stops no limiter."""
    redis.client.hset(KEY, "hold", f"{now_ms(redis)} banned")
    await make(redis.url).acquire("binance", 1)


async def test_count_of_the_exchange_applies_to_all_limiters(
    make: Make, redis: RedisServer
) -> None:
    """A higher count of the exchange is shared, a lower count changes nothing."""
    first, second = make(redis.url), make(redis.url)
    await first.acquire("binance", 2)
    for count, ratio in ((7, 0.7), (3, 0.7)):
        await first.correct("binance", count)
        assert first.used_ratio("binance") == ratio
    await refused(second, 4)
    await second.acquire("binance", 3)
    await first.correct("binance", 15)
    await refused(second)
    assert (first.used_ratio("binance"), second.used_ratio("binance")) == (1.5, 1.5)


async def test_corrected_weight_counts_for_one_window(make: Make, redis: RedisServer) -> None:
    """Weight that an exchange reported counts for one window and one bucket at most."""
    limiter = make(redis.url, LONG)
    put(redis, 9, weight=1)
    await limiter.correct("binance", LIMIT)
    wait = (await refused(limiter, LIMIT)).retry_after
    assert wait is not None
    assert LONG < wait <= LONG + BUCKET_MS / 1000


async def test_keys_expire(make: Make, redis: RedisServer) -> None:
    """A key expires after the window and one bucket, or at the end of a longer hold."""
    limiter = make(redis.url)
    await limiter.acquire("binance", 1)
    assert 60_000 < redis.client.pttl(KEY) <= 66_000
    await limiter.hold("binance", 1, "rate_limited")
    assert 60_000 < redis.client.pttl(KEY) <= 66_000
    await limiter.hold("binance", 600, "banned")
    assert 590_000 < redis.client.pttl(KEY) <= 600_000
    await limiter.correct("binance", 5)
    assert 590_000 < redis.client.pttl(KEY) <= 600_000
    assert redis.client.keys("*") == [KEY.encode()]


async def test_without_redis_each_limiter_has_its_own_budget(make: Make, clock: FakeClock) -> None:
    """Without Redis, holds are not shared."""
    limiter = make()
    await limiter.acquire("binance", 3)
    await limiter.correct("binance", 8)
    await limiter.hold("binance", 90, "banned")
    await limiter.release("binance")
    await refused(limiter, 3)
    await limiter.acquire("binance", 2)
    await limiter.acquire("kraken", LIMIT)
    assert limiter.is_spent("binance", 1)
    clock.advance(SECONDS * (1 + 1 / BUCKETS))
    assert not limiter.is_spent("binance", LIMIT)


async def test_limiter_continues_from_the_shared_count_without_redis(
    make: Make, own_redis: RedisServer
) -> None:
    """When Redis dies, a limiter admits what is left of the shared budget."""
    first, second = make(own_redis.url), make(own_redis.url)
    await first.acquire("binance", 4)
    await second.acquire("binance", 3)
    await first.acquire("binance", 1)
    own_redis.kill()
    await first.hold("binance", 90, "banned")
    await first.release("binance")
    await refused(first, 3)
    await first.acquire("binance", 1)
    await first.correct("binance", LIMIT)
    assert ((await refused(first)).retry_after or 0) > SECONDS


async def test_redis_is_used_again_after_an_outage(
    make: Make, own_redis: RedisServer, clock: FakeClock
) -> None:
    """After an outage, limiters share their budget as before."""
    first, second = make(own_redis.url), make(own_redis.url)
    own_redis.kill()
    await first.acquire("binance", 1)
    own_redis.start()
    clock.advance(BREAKER_MAX_OPEN_SECONDS)
    await first.acquire("binance", 6)
    await refused(second, LIMIT)
    assert second.used_ratio("binance") >= 0.6


async def test_outage_does_not_provide_a_second_budget(
    make: Make, own_redis: RedisServer, clock: FakeClock
) -> None:
    """Weight spent without Redis counts when Redis is back, even with an empty Redis."""
    limiter = make(own_redis.url)
    await limiter.acquire("binance", 1)
    own_redis.kill()
    await limiter.acquire("binance", LIMIT - 1)
    own_redis.start()
    clock.advance(BREAKER_MAX_OPEN_SECONDS)
    await refused(limiter)
    await refused(make(own_redis.url))


async def test_update_after_an_outage_keeps_local_weight(
    make: Make, own_redis: RedisServer, clock: FakeClock
) -> None:
    """A limiter that only reads the shared count reports its local weight, and keeps it."""
    limiter = make(own_redis.url)
    own_redis.kill()
    await limiter.acquire("binance", LIMIT)
    own_redis.start()
    clock.advance(BREAKER_MAX_OPEN_SECONDS)
    await limiter.refresh("binance")
    assert limiter.used_ratio("binance") == 1
    await refused(make(own_redis.url))


async def test_weight_spent_during_a_redis_call_counts(
    own_redis: RedisServer, clock: FakeClock
) -> None:
    """The reply of Redis does not remove it, and the next call reports it to Redis."""
    store = RedisStore(own_redis.url, clock, timeout=20)
    shared = SharedWindow(KEY, Window(LIMIT, SECONDS, clock), store, "budget")
    await shared.spend(1)
    own_redis.client.client_pause(60_000, all=False)
    spending = asyncio.create_task(shared.spend(2))
    await asyncio.sleep(0)
    shared.spend_locally(3)
    own_redis.client.client_unpause()
    assert (await spending).admitted
    assert shared.window.used() == 6
    await shared.update()
    second = SharedWindow(KEY, Window(LIMIT, SECONDS, clock), store, "budget")
    await second.update()
    assert second.window.used() == 6
    await store.close()


async def test_shorter_hold_does_not_shorten_a_longer_one(make: Make, redis: RedisServer) -> None:
    """A ban stays in effect if a running call returns a shorter wait."""
    limiter = make(redis.url)
    await limiter.hold("binance", 600, "banned")
    await limiter.hold("binance", 5, "rate_limited")
    with pytest.raises(ExchangeBanned) as banned:
        await make(redis.url).acquire("binance", 1)
    assert (banned.value.retry_after or 0) > 500
    await limiter.hold("binance", 1200, "rate_limited")
    with pytest.raises(ExchangeRateLimited) as limited:
        await make(redis.url).acquire("binance", 1)
    assert (limited.value.retry_after or 0) > 1100


async def test_buckets_of_a_changed_budget_are_ignored(make: Make, redis: RedisServer) -> None:
    """Buckets of another width are not weight in the future, and no wait exceeds the window."""
    far: dict[bytes | bytearray | memoryview[int] | str | int | float, Any] = {
        str(10**10): 500,
        str(10**11): 500,
    }
    redis.client.hset(KEY, mapping=far)
    limiter = make(redis.url)
    await limiter.acquire("binance", LIMIT)
    assert 0 < ((await refused(limiter)).retry_after or 0) <= SECONDS * (1 + 1 / BUCKETS)
    assert len(redis.client.hkeys(KEY)) == 1


async def test_weight_of_other_limiters_returns_on_time(
    make: Make, redis: RedisServer, clock: FakeClock
) -> None:
    """A limiter that learns late of spent weight knows its age."""
    limiter = make(redis.url, LONG)
    put(redis, BUCKETS - 1, weight=LIMIT - 2)
    await limiter.acquire("binance", 1)
    assert limiter.used_ratio("binance") == 0.9
    clock.advance(2 * LONG / BUCKETS)
    assert limiter.used_ratio("binance") == 0.1
    assert not limiter.is_spent("binance", LIMIT - 1)
