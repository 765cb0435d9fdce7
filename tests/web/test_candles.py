"""The contract of candles: closes, final candles, ranges and shared calls."""

import asyncio
import json
from typing import Any

import pytest

from src.sandbox.server import Sandbox
from tests.conftest import FakeClock, Live, RedisServer, StartGateway

EXCHANGES = ("bybit", "binance", "kraken")
MINUTE = 60_000
HOUR = 60 * MINUTE


@pytest.fixture
def start(start: StartGateway) -> StartGateway:
    """Start gateways without streams, which would keep requested candles up to date."""

    async def start_without_streams(**overrides: Any) -> Live:
        return await start(streaming=False, **overrides)

    return start_without_streams


def move_to(clock: FakeClock, second: float, length: int = 60) -> None:
    """Advance to a second of the next period, by default of the next minute."""
    clock.advance(length - clock.time() % length + second)


async def candles(live: Live, query: str = "") -> dict[str, Any]:
    response = await live.get(f"/ohlcv/BTC-USDT?{query}")
    assert response.status_code == 200, response.text
    document: dict[str, Any] = response.json()
    return document


@pytest.mark.parametrize("exchange", EXCHANGES)
async def test_a_growing_candle_is_never_served_as_fresh_after_its_close(
    start: StartGateway, clock: FakeClock, sandbox: Sandbox, exchange: str
) -> None:
    """A 1m candle that was requested 5 s before its close is fetched again after it."""
    live = await start(ohlcv_ttl_seconds=30)
    move_to(clock, 55)
    growing = await candles(live, f"exchange={exchange}")
    start_ms = growing["candles"][-1][0]
    assert growing["closed_until"] == start_ms == int(clock.time()) // 60 * MINUTE
    clock.advance(5.4)  # the exchange may still change it
    assert (await candles(live, f"exchange={exchange}"))["candles"] == growing["candles"]
    assert sandbox.count(exchange) == 1
    clock.advance(0.1)
    closed = await candles(live, f"exchange={exchange}")
    assert closed["closed_until"] == closed["candles"][-1][0] == start_ms + MINUTE
    assert not closed["stale"]
    assert closed["candles"][-2][5] > growing["candles"][-1][5]  # the complete volume
    assert sandbox.count(exchange) == 2


async def test_candles_expire_at_the_close_on_every_replica(
    start: StartGateway, clock: FakeClock, sandbox: Sandbox, redis: RedisServer
) -> None:
    """The expiry is stored in Redis with the entry."""
    first = await start(redis_url=redis.url)
    second = await start(redis_url=redis.url)
    move_to(clock, 50)
    before = await candles(first)
    assert await candles(second) == before
    clock.advance(10.5)
    after = await candles(second)
    assert after["closed_until"] == before["closed_until"] + MINUTE
    assert await candles(first) == after
    assert sandbox.count("bybit") == 2


async def test_candles_from_before_a_close_are_marked_stale(
    start: StartGateway, clock: FakeClock, sandbox: Sandbox
) -> None:
    """Also with REVALIDATE_SECONDS: the growing candle is not served while a refresh runs."""
    live = await start(revalidate_seconds=30, cb_threshold=100)
    move_to(clock, 55)
    before = await candles(live, "exchange=bybit")
    clock.advance(5.5)
    await sandbox.set("bybit", rate_limit=-1, status=503)
    stale = await candles(live, "exchange=bybit")
    assert stale == before | {"stale": True}
    await sandbox.set("bybit", rate_limit=-1)
    after = await candles(live, "exchange=bybit")
    assert not after["stale"]
    assert after["closed_until"] == before["closed_until"] + MINUTE


async def test_the_exchanges_clock_decides_what_is_closed(
    start: StartGateway, clock: FakeClock, sandbox: Sandbox
) -> None:
    """A clock of the gateway that is 3 s ahead does not close candles early."""
    live = await start()
    move_to(clock, 1)
    await sandbox.set("binance", rate_limit=-1, clock_skew_ms=-3000)
    early = await candles(live, "exchange=binance&limit=3")
    assert early["closed_until"] == int(clock.time()) // 60 * MINUTE - MINUTE


@pytest.mark.parametrize("exchange", EXCHANGES)
async def test_requests_for_different_numbers_of_candles_share_one_call(
    start: StartGateway, sandbox: Sandbox, exchange: str
) -> None:
    """Each client gets the newest candles, as many as it asked for."""
    live = await start()
    limits = (1, 7, 10, 50, 100, 101, 250, 500, 720)
    found = [await candles(live, f"exchange={exchange}&limit={limit}") for limit in limits]
    assert [len(document["candles"]) for document in found] == list(limits)
    assert all(
        document["candles"] == found[-1]["candles"][-limit:]
        for document, limit in zip(found, limits, strict=True)
    )
    assert sandbox.count(exchange) == 1


async def test_closed_omits_the_growing_candle(
    start: StartGateway, clock: FakeClock, sandbox: Sandbox
) -> None:
    """`limit` then counts final candles. The cached candles are the same."""
    live = await start()
    move_to(clock, 30)
    newest = await candles(live, "limit=4")
    closed = await candles(live, "limit=3&closed=true")
    assert closed["candles"] == newest["candles"][:-1]
    assert closed["closed_until"] == newest["closed_until"] == newest["candles"][-1][0]
    since = newest["candles"][1][0]
    later = await candles(live, f"since={since}&closed=true")
    assert later["candles"] == newest["candles"][1:-1]
    assert sandbox.count("bybit") == 1


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("query", ["until={until}", "limit=60"])
async def test_a_range_in_the_past_is_cached_for_a_day(
    start: StartGateway,
    clock: FakeClock,
    sandbox: Sandbox,
    redis: RedisServer,
    exchange: str,
    query: str,
) -> None:
    """In memory and in Redis, although the newest candles expire within seconds."""
    first = await start(redis_url=redis.url)
    now = int(clock.time() * 1000)
    since = now - 90 * HOUR - now % HOUR
    path = f"exchange={exchange}&timeframe=1h&since={since}&" + query.format(
        until=since + 60 * HOUR
    )
    found = await candles(first, path)
    assert [row[0] for row in found["candles"]] == [since + hour * HOUR for hour in range(60)]
    clock.advance(23 * 3600)
    second = await start(redis_url=redis.url)
    for live in (first, second):
        response = await live.get(f"/ohlcv/BTC-USDT?{path}")
        assert response.json()["candles"] == found["candles"]
        assert response.headers["Cache-Control"] in ("max-age=3600", "max-age=3599")
    assert sandbox.count(exchange) == 0  # `start` clears the counts of the first call
    clock.advance(2 * 3600)
    await candles(first, path)
    assert sandbox.count(exchange) == 1


@pytest.mark.parametrize("exchange", ["bybit", "binance"])
async def test_a_long_range_is_fetched_in_pages_that_ranges_share(
    start: StartGateway, clock: FakeClock, sandbox: Sandbox, exchange: str
) -> None:
    """Without gaps and duplicates. Each page and the newest candles are one call."""
    live = await start(redis_host="")
    move_to(clock, 30)
    now = int(clock.time()) // 60 * MINUTE
    path = f"exchange={exchange}&since={now - 2500 * MINUTE}&until={now + MINUTE}"
    long = await candles(live, path)
    assert [row[0] for row in long["candles"]] == [now + n * MINUTE for n in range(-2500, 1)]
    assert long["closed_until"] == now
    assert "earliest" not in long
    calls = sandbox.count(exchange)
    assert calls <= 4
    part = await candles(
        live, f"exchange={exchange}&since={now - 2300 * MINUTE}&until={now - 50 * MINUTE}"
    )
    assert part["candles"] == long["candles"][200:2450]
    last = await candles(live, f"exchange={exchange}&since={now - 2300 * MINUTE}&limit=1000")
    assert last["candles"] == long["candles"][200:1200]
    assert sandbox.count(exchange) == calls


@pytest.mark.parametrize(
    ("query", "text"),
    [
        ("until={now}", "until needs since"),
        ("since={hour}&until={hour}", "is not after since"),
        ("since={hour}&until={day}", "is not after since"),
        ("since={hour}&until={ahead}", "is in the future"),
        ("since={ahead}", "is in the future"),
        ("since={seconds}", "looks like seconds"),
        ("since={hour}&until={seconds}", "looks like seconds"),
        ("since={week}&until={now}", "10080 candles, and an answer at most 5000; split it"),
        ("closed=perhaps", "closed"),
    ],
)
async def test_a_range_that_cannot_be_meant_is_refused(
    start: StartGateway, clock: FakeClock, sandbox: Sandbox, query: str, text: str
) -> None:
    """The error says what would have worked. No exchange is called."""
    live = await start()
    now = int(clock.time()) // 60 * MINUTE
    times = {"now": now, "hour": now - HOUR, "day": now - 24 * HOUR, "week": now - 168 * HOUR}
    times |= {"ahead": now + 3 * MINUTE, "seconds": now // 1000}
    response = await live.get(f"/ohlcv/BTC-USDT?{query.format(**times)}")
    assert response.status_code == 422
    assert text in response.json()["detail"]
    assert sum(map(sandbox.count, EXCHANGES)) == 0


async def test_an_exchange_without_old_candles_refuses_them_and_is_not_chosen(
    start: StartGateway, clock: FakeClock, sandbox: Sandbox
) -> None:
    """Kraken has 720 candles, whatever `since` is. Another exchange has the range."""
    live = await start(exchange_order="kraken,binance,bybit")
    now = int(clock.time()) // 60 * MINUTE
    since = now - 720 * MINUTE
    response = await live.get(f"/ohlcv/BTC-USDT?exchange=kraken&since={since}&limit=900")
    problem = response.json()
    assert (response.status_code, problem["code"]) == (422, "invalid_parameter")
    assert problem["earliest"] == since + MINUTE
    assert str(since + MINUTE) in problem["detail"]
    assert sandbox.count("kraken") == 0
    found = await candles(live, f"since={since}&limit=900")
    assert (found["exchange"], found["candles"][0][0]) == ("binance", since)
    oldest = await candles(live, f"exchange=kraken&since={since + MINUTE}&limit=1")
    assert oldest["candles"][0][0] == since + MINUTE


@pytest.mark.parametrize(
    ("exchange", "weeks", "days"),
    [
        ("bybit", 3, 0),
        ("binance", 3, 0),
        ("kraken", 3, 3),
        ("bybit", 1500, 0),
        ("binance", 1500, 0),
    ],
)
async def test_weeks_start_on_each_exchanges_own_day(
    start: StartGateway, clock: FakeClock, exchange: str, weeks: int, days: int
) -> None:
    """`since` a Monday 00:00 UTC: that week, or on kraken the one that starts on Thursday."""
    live = await start()
    week, day = 168 * HOUR, 24 * HOUR
    monday = (int(clock.time() * 1000) // week - weeks) * week + 4 * day
    found = await candles(live, f"exchange={exchange}&timeframe=1w&since={monday}&limit=2")
    first = monday + days * day
    assert [row[0] for row in found["candles"]] == [first, first + week]


@pytest.mark.parametrize("exchange", ["bybit", "binance"])
async def test_the_answer_says_when_the_exchange_has_no_older_candles(
    start: StartGateway, clock: FakeClock, sandbox: Sandbox, exchange: str
) -> None:
    """`earliest` is the first candle of a market that was listed after `since`."""
    live = await start()
    now = int(clock.time()) // 60 * MINUTE
    for age in (50, 1700):
        listed = now - age * MINUTE
        await sandbox.set(exchange, rate_limit=-1, candles_from_ms=listed)
        for since in (listed - 3 * MINUTE, listed - 3000 * MINUTE, 0):
            await live.gateway.cache.clear()
            found = await candles(live, f"exchange={exchange}&since={since}&limit=20")
            assert found["earliest"] == found["candles"][0][0] == listed
            assert len(found["candles"]) == 20
        found = await candles(live, f"exchange={exchange}&since={listed}&limit=20")
        assert "earliest" not in found


async def test_a_failing_exchange_is_replaced_for_the_whole_range(
    start: StartGateway, clock: FakeClock, sandbox: Sandbox
) -> None:
    """All candles of an answer come from one exchange. The newest ones may be stale."""
    live = await start(redis_host="", cb_threshold=100)
    move_to(clock, 30)
    now = int(clock.time()) // 60 * MINUTE
    recent = f"since={now - 10 * MINUTE}&limit=20"
    before = await candles(live, recent)
    await sandbox.set("bybit", rate_limit=-1, status=503)
    found = await candles(live, f"since={now - 1500 * MINUTE}&until={now + MINUTE}")
    assert (found["exchange"], len(found["candles"])) == ("binance", 1501)
    for exchange in EXCHANGES:
        await sandbox.set(exchange, rate_limit=-1, status=503)
    clock.advance(31)
    stale = await candles(live, recent)
    assert (stale["stale"], stale["candles"]) == (True, before["candles"])
    old = await live.get(f"/ohlcv/BTC-USDT?since={now - 4000 * MINUTE}&limit=5")
    assert (old.status_code, old.json()["code"]) == (503, "no_exchange_available")


@pytest.mark.parametrize("clients", [100, pytest.param(1_000, marks=pytest.mark.full)])
async def test_a_close_costs_one_call_for_all_clients_and_replicas(
    start: StartGateway, clock: FakeClock, sandbox: Sandbox, redis: RedisServer, clients: int
) -> None:
    """All clients that ask after a close, on two replicas, share one call."""
    replicas = [await start(redis_url=redis.url) for _ in range(2)]
    move_to(clock, 50)
    query = "exchange=binance&limit=2&closed=true"
    for live in replicas:
        await candles(live, query)
    clock.advance(10.5)
    await sandbox.set("binance", rate_limit=-1, latency_ms=200)
    sandbox.clear_counts()
    request = f"GET /ohlcv/BTC-USDT?{query} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    answers = await asyncio.gather(
        *(live.raw(request.encode()) for live in replicas * (clients // 2))
    )
    bodies = [json.loads(answer.partition(b"\r\n\r\n")[2]) for answer in answers]
    assert {body["closed_until"] for body in bodies} == {int(clock.time()) // 60 * MINUTE}
    assert sandbox.count("binance") == 1


@pytest.mark.parametrize("exchange", EXCHANGES)
async def test_a_late_final_candle_is_served_within_a_second(
    start: StartGateway, clock: FakeClock, sandbox: Sandbox, exchange: str
) -> None:
    """While the exchange still sends the state from before the close, requests are repeated."""
    live = await start()
    move_to(clock, 50)
    await sandbox.set(exchange, rate_limit=-1, candle_delay_ms=700)
    before = await candles(live, f"exchange={exchange}")
    clock.advance(10)
    closed = []
    for _ in range(20):  # 2 seconds
        clock.advance(0.1)
        found = await candles(live, f"exchange={exchange}")
        closed.append(found["closed_until"] > before["closed_until"])
        assert closed[-1] == (found["candles"][-1][0] > before["candles"][-1][0])
    assert closed.index(True) < 17  # 1 s after 700 ms
    assert sandbox.count(exchange) <= 4


@pytest.mark.parametrize("exchange", EXCHANGES)
async def test_a_repeated_candle_is_one_candle_and_no_failure(
    start: StartGateway, sandbox: Sandbox, exchange: str
) -> None:
    """The row with more volume is the later state of the newest candle."""
    live = await start(redis_host="", cb_threshold=1)
    plain = await candles(live, f"exchange={exchange}&limit=3")
    await sandbox.set(exchange, rate_limit=-1, odd=["duplicate_candle"])
    await live.gateway.cache.clear()
    found = await candles(live, f"exchange={exchange}&limit=3")
    assert [row[0] for row in found["candles"]] == [row[0] for row in plain["candles"]]
    assert found["candles"][-1][5] == pytest.approx(plain["candles"][-1][5] * 1.5, rel=1e-4)
    assert live.gateway.manager[exchange].breaker.state == "closed"


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("query", ["", "since={since}&until={until}"])
async def test_no_candles_are_an_answer(
    start: StartGateway, clock: FakeClock, sandbox: Sandbox, exchange: str, query: str
) -> None:
    """A market without trades does not open the breaker of its exchange."""
    live = await start(cb_threshold=1)
    now = int(clock.time()) // 60 * MINUTE
    await sandbox.set(exchange, rate_limit=-1, odd=["empty_candles"])
    times = {"since": now - 30 * MINUTE, "until": now - 10 * MINUTE}
    found = await candles(live, f"exchange={exchange}&{query.format(**times)}")
    assert found["candles"] == []
    assert "earliest" not in found
    assert live.gateway.manager[exchange].breaker.state == "closed"
