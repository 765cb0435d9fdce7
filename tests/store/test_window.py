"""The request budget: the window in memory, and the one all replicas share in Redis."""

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
TICK = 1 / 64  # times in the window's tests are multiples of it, so that no rounding blurs the edges
LONG = 100_000  # seconds of a window so long that the time a test takes is nothing in it
BUCKET_MS = LONG * 1000 // BUCKETS

Steps = list[tuple[int, int]]
steps = st.lists(st.tuples(st.integers(0, 3 * 64), st.integers(1, 12)), min_size=1, max_size=60)
lengths = st.sampled_from([5, 10, 60])  # seconds whose tenth is a whole number of ticks
Make = Callable[..., RateLimiter]


def spend(window: Window, clock: FakeClock, schedule: Steps) -> list[tuple[float, int]]:
    """Spend what fits, pausing before each step; returns when how much was spent."""
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
def test_no_window_of_its_length_holds_more_than_the_limit(schedule: Steps, seconds: int) -> None:
    """Wherever a window of the given length is laid over the time, no more than the limit was spent in it."""
    clock = FakeClock()
    spent = spend(Window(LIMIT, seconds, clock), clock, schedule)
    for begin, _ in spent:
        assert sum(weight for at, weight in spent if begin <= at <= begin + seconds) <= LIMIT


@settings(max_examples=300, deadline=None)
@given(steps, lengths, st.integers(1, 12))
def test_the_wait_is_exact(schedule: Steps, seconds: int, cost: int) -> None:
    """After the wait the cost fits, and a moment before it does not."""
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


def test_weight_comes_back_by_tenths(clock: FakeClock) -> None:
    """Weight comes back when the tenth of the window it was spent in has left the window, and no other with it."""
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


def test_a_cost_above_the_limit_counts_as_the_limit(clock: FakeClock) -> None:
    """What costs more than the whole limit waits for an empty window, not for ever."""
    window = Window(LIMIT, 10, clock)
    assert window.wait_for(10 * LIMIT) == 0
    window.add(1)
    assert window.wait_for(10 * LIMIT) == window.wait_for(LIMIT) == 11
    clock.advance(11)
    assert window.wait_for(10 * LIMIT) == 0


def test_raising_only_raises(clock: FakeClock) -> None:
    """A higher count of somebody who sees more is taken over, a lower one changes nothing."""
    window = Window(LIMIT, 10, clock)
    window.add(3)
    for told, used in ((7, 7), (2, 7), (7, 7), (15, 15)):
        window.raise_to(told)
        assert window.used() == used
    assert window.wait_for(1) == 11


@pytest.fixture
async def make(clock: FakeClock) -> AsyncIterator[Make]:
    """Make limiters with a budget for two exchanges: `make(redis.url)`, or `make()` without Redis."""
    stores: list[RedisStore] = []

    def limiter(url: str = "", seconds: int = SECONDS) -> RateLimiter:
        stores.append(RedisStore(url, clock, timeout=5))
        return RateLimiter(dict.fromkeys(["binance", "kraken"], (LIMIT, seconds)), stores[-1], clock)

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
    """Have weight spent so many tenths of a long window ago; returns the tenth of now."""
    current = now_ms(redis) // BUCKET_MS
    for age in ages:
        redis.client.hset(KEY, str(current - age), weight)
    return current


@pytest.mark.parametrize("shared", [True, False])
async def test_a_budget_is_spent_once_by_all_who_ask_at_once(make: Make, redis: RedisServer, shared: bool) -> None:
    """Of many calls at once as many are admitted as the budget holds, by two limiters on one Redis or one alone."""
    limiters = [make(redis.url), make(redis.url)] if shared else [make()] * 2
    calls = [limiter.acquire("binance", 1) for limiter in limiters * LIMIT]
    outcomes = await asyncio.gather(*calls, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes if outcome is not None] == [BudgetSpent] * LIMIT


async def test_two_limiters_share_one_budget(make: Make, redis: RedisServer) -> None:
    """What one limiter spent the other cannot, and learns of when it asks; another exchange has its own budget."""
    one, other = make(redis.url), make(redis.url)
    await one.acquire("binance", 6)
    assert other.used_ratio("binance") == 0
    await refused(other, 5)
    assert other.used_ratio("binance") == 0.6
    assert (other.is_spent("binance", 4), other.is_spent("binance", 5)) == (False, True)
    await other.acquire("binance", 4)
    assert other.used_ratio("binance") == 1
    await refused(one)
    await one.acquire("kraken", LIMIT)


@pytest.mark.parametrize(("cost", "age"), [(1, 10), (4, 10), (5, 6), (8, 6), (9, 0), (10, 0), (99, 0)])
async def test_a_refusal_names_the_seconds(make: Make, redis: RedisServer, cost: int, age: int) -> None:
    """A refusal says when enough of the oldest weight comes back for the cost to fit."""
    current = put(redis, 0, weight=2)
    put(redis, 6, 10, weight=4)
    earliest = now_ms(redis)
    wait = (await refused(make(redis.url, LONG), cost)).retry_after
    frees_at = (current - age + BUCKETS + 1) * BUCKET_MS
    assert wait is not None
    assert (frees_at - now_ms(redis)) / 1000 <= wait <= (frees_at - earliest) / 1000


async def test_a_refusal_without_redis_names_the_seconds(make: Make, clock: FakeClock) -> None:
    """Alone, too, a limiter says how long to wait, and not longer than that."""
    limiter = make(seconds=10)
    await limiter.acquire("binance", LIMIT)
    refusal = await refused(limiter)
    assert refusal.retry_after == 11
    assert "(10 per 10 s)" in refusal.detail
    clock.advance(11)
    await limiter.acquire("binance", 1)
    assert limiter.used_ratio("binance") == 0.1


async def test_redis_forgets_what_left_the_window(make: Make, redis: RedisServer) -> None:
    """Weight older than the window and its tenth neither counts nor stays in Redis."""
    current = put(redis, 11, 12, weight=LIMIT)
    await make(redis.url, LONG).acquire("binance", LIMIT)
    assert redis.client.hgetall(KEY) == {b"%d" % current: b"%d" % LIMIT}


async def test_a_cost_above_the_limit_spends_the_limit(make: Make, redis: RedisServer) -> None:
    """What costs more than the budget is admitted when all of it is there, and takes all of it."""
    for limiter in (make(redis.url), make()):
        await limiter.acquire("binance", 10 * LIMIT)
        assert limiter.used_ratio("binance") == 1
        await refused(limiter)


@pytest.mark.parametrize("cause", [ExchangeBanned.cause, ExchangeRateLimited.cause])
async def test_a_hold_of_one_stops_the_other(make: Make, redis: RedisServer, cause: str) -> None:
    """A ban or limit one limiter was told of stops the other for as long, with its cause, and spends nothing."""
    one, other = make(redis.url), make(redis.url)
    await one.acquire("binance", 2)
    await one.hold("binance", 90.5, cause)
    for _ in range(LIMIT):
        with pytest.raises(ExchangeRateLimited) as raised:
            await other.acquire("binance", 1)
    assert (raised.value.cause, raised.value.exchange) == (cause, "binance")
    assert 85 < (raised.value.retry_after or 0) <= 90.5
    await other.acquire("kraken", 1)
    assert other.used_ratio("binance") == 0.2
    with pytest.raises(ExchangeRateLimited):
        await other.acquire("binance", LIMIT)


async def test_a_release_forgets_the_hold_only(make: Make, redis: RedisServer) -> None:
    """After a release the other limiter may ask again, and what was spent stays spent."""
    one, other = make(redis.url), make(redis.url)
    await one.acquire("binance", 8)
    await one.hold("binance", 90, "banned")
    await one.release("binance")
    await refused(other, 3)
    await other.acquire("binance", 2)


async def test_a_hold_ends_by_itself(make: Make, redis: RedisServer) -> None:
    """A hold whose time is over stops nobody."""
    redis.client.hset(KEY, "hold", f"{now_ms(redis)} banned")
    await make(redis.url).acquire("binance", 1)


async def test_the_exchanges_own_count_corrects_both(make: Make, redis: RedisServer) -> None:
    """A higher count the exchange tells one limiter counts for the other; a lower one changes nothing."""
    one, other = make(redis.url), make(redis.url)
    await one.acquire("binance", 2)
    for told, ratio in ((7, 0.7), (3, 0.7)):
        await one.correct("binance", told)
        assert one.used_ratio("binance") == ratio
    await refused(other, 4)
    await other.acquire("binance", 3)
    await one.correct("binance", 15)
    await refused(other)
    assert (one.used_ratio("binance"), other.used_ratio("binance")) == (1.5, 1.5)


async def test_a_correction_is_waited_for(make: Make, redis: RedisServer) -> None:
    """Weight an exchange reported counts from then on, for one window and its tenth at most."""
    limiter = make(redis.url, LONG)
    put(redis, 9, weight=1)
    await limiter.correct("binance", LIMIT)
    wait = (await refused(limiter, LIMIT)).retry_after
    assert wait is not None
    assert LONG < wait <= LONG + BUCKET_MS / 1000


async def test_keys_expire(make: Make, redis: RedisServer) -> None:
    """A key lives as long as what it holds can matter: the window and its tenth, or a longer hold."""
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


async def test_without_redis_memory_is_the_budget(make: Make, clock: FakeClock) -> None:
    """A limiter without Redis keeps its own budgets; a hold is nothing it could share."""
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


async def test_losing_redis_it_goes_on_from_the_shared_count(make: Make, own_redis: RedisServer) -> None:
    """When Redis dies a limiter knows what all had spent, admits what is left of it, and never fails otherwise."""
    one, other = make(own_redis.url), make(own_redis.url)
    await one.acquire("binance", 4)
    await other.acquire("binance", 3)
    await one.acquire("binance", 1)
    own_redis.kill()
    await one.hold("binance", 90, "banned")
    await one.release("binance")
    await refused(one, 3)
    await one.acquire("binance", 1)
    await one.correct("binance", LIMIT)
    assert ((await refused(one)).retry_after or 0) > SECONDS


async def test_redis_back_is_used_again(make: Make, own_redis: RedisServer, clock: FakeClock) -> None:
    """After an outage limiters share their budget as before."""
    one, other = make(own_redis.url), make(own_redis.url)
    own_redis.kill()
    await one.acquire("binance", 1)
    own_redis.start()
    clock.advance(BREAKER_MAX_OPEN_SECONDS)
    await one.acquire("binance", 6)
    await refused(other, LIMIT)
    assert other.used_ratio("binance") >= 0.6


async def test_an_outage_is_no_second_budget(make: Make, own_redis: RedisServer, clock: FakeClock) -> None:
    """What was spent from memory while Redis was away counts when it is back, even if it came back empty."""
    one = make(own_redis.url)
    await one.acquire("binance", 1)
    own_redis.kill()
    await one.acquire("binance", LIMIT - 1)
    own_redis.start()
    clock.advance(BREAKER_MAX_OPEN_SECONDS)
    await refused(one)
    await refused(make(own_redis.url))


async def test_a_look_after_an_outage_forgets_nothing(make: Make, own_redis: RedisServer, clock: FakeClock) -> None:
    """Who only looks what others spent tells what it spent alone as well, and goes on counting it."""
    one = make(own_redis.url)
    own_redis.kill()
    await one.acquire("binance", LIMIT)
    own_redis.start()
    clock.advance(BREAKER_MAX_OPEN_SECONDS)
    await one.look("binance")
    assert one.used_ratio("binance") == 1
    await refused(make(own_redis.url))


async def test_what_is_spent_alone_while_redis_is_asked_counts(own_redis: RedisServer, clock: FakeClock) -> None:
    """An answer that was under way meanwhile does not wipe it out, and Redis is told at the next word."""
    store = RedisStore(own_redis.url, clock, timeout=20)
    shared = SharedWindow(KEY, Window(LIMIT, SECONDS, clock), store, "budget")
    await shared.spend(1)
    own_redis.client.client_pause(60_000, all=False)
    asked = asyncio.create_task(shared.spend(2))
    await asyncio.sleep(0)
    shared.spend_alone(3)
    own_redis.client.client_unpause()
    assert (await asked).admitted
    assert shared.window.used() == 6
    await shared.look()
    other = SharedWindow(KEY, Window(LIMIT, SECONDS, clock), store, "budget")
    await other.look()
    assert other.window.used() == 6
    await store.close()


async def test_a_shorter_hold_does_not_shorten_a_longer_one(make: Make, redis: RedisServer) -> None:
    """A ban stays a ban when a call that was under way brings home a shorter wait."""
    one = make(redis.url)
    await one.hold("binance", 600, "banned")
    await one.hold("binance", 5, "rate_limited")
    with pytest.raises(ExchangeBanned) as banned:
        await make(redis.url).acquire("binance", 1)
    assert (banned.value.retry_after or 0) > 500
    await one.hold("binance", 1200, "rate_limited")
    with pytest.raises(ExchangeRateLimited) as limited:
        await make(redis.url).acquire("binance", 1)
    assert (limited.value.retry_after or 0) > 1100


async def test_a_changed_budget_starts_a_sane_count(make: Make, redis: RedisServer) -> None:
    """Buckets another window left behind are no spending of the future, and no wait is longer than the window."""
    far: dict[bytes | bytearray | memoryview[int] | str | int | float, Any] = {str(10**10): 500, str(10**11): 500}
    redis.client.hset(KEY, mapping=far)
    one = make(redis.url)
    await one.acquire("binance", LIMIT)
    assert 0 < ((await refused(one)).retry_after or 0) <= SECONDS * (1 + 1 / BUCKETS)
    assert len(redis.client.hkeys(KEY)) == 1


async def test_what_others_spent_comes_back_when_it_does(make: Make, redis: RedisServer, clock: FakeClock) -> None:
    """A limiter that learns late of spending knows how old it is: it does not hold its exchange back any longer."""
    other = make(redis.url, LONG)
    put(redis, BUCKETS - 1, weight=LIMIT - 2)
    await other.acquire("binance", 1)
    assert other.used_ratio("binance") == 0.9
    clock.advance(2 * LONG / BUCKETS)
    assert other.used_ratio("binance") == 0.1
    assert not other.is_spent("binance", LIMIT - 1)
