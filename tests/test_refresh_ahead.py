"""Hot entries are refreshed before they expire: which entries, with which calls, at what cost.

The refresher runs ten times a second in real time, and uses the clock of the test.
"""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from urllib.parse import unquote

import pytest

from config import EXCHANGES, Settings
from src.cache.entry import Entry, Key
from src.cache.memory import HOT_HITS
from src.core.metrics import CACHE_RESULTS, REFRESHES
from src.exchanges.manager import batch_size
from src.refresh_ahead import (
    DUE_RATIO,
    MAX_BUDGET_RATIO,
    MAX_LOADS_RATIO,
    TICK_SECONDS,
    RefreshAhead,
)
from src.sandbox.market import COINS
from src.sandbox.server import Sandbox
from src.store.redis import RedisUnavailable
from tests.conftest import (
    FakeClock,
    Live,
    RedisServer,
    StartGateway,
    eventually,
    make_settings,
    sample,
    serve,
)

TTL = 15.0
MAX_REFRESHES = int(100 * MAX_LOADS_RATIO)  # at once, with the default MAX_CONCURRENT
DUE = 12.0  # the age at which an entry is due: a fifth of its TTL is left
OFTEN = HOT_HITS + 1  # a miss, and hits enough to make it hot
KEY = Key("bybit", "ticker", "BTC/USDT")
PATH = "/ticker/BTC-USDT?exchange=bybit"
CANARY = "/trades/BTC-USDT?exchange=bybit&limit=1"
CANARY_KEY = Key("bybit", "trades", "BTC/USDT", (60,))
CANARY_TTL = 0.015625
MISS, HIT = "fwd=miss; stored", "hit; detail=memory"

StartWatched = Callable[..., Awaitable[Live]]


@pytest.fixture
def watched(start: StartGateway) -> StartWatched:
    """Start gateways that refresh ahead, by default with bybit only."""

    async def start_watched(exchanges: tuple[str, ...] = ("bybit",), **overrides: object) -> Live:
        return await start(**(only(*exchanges) | {"ticker_ttl_seconds": TTL} | overrides))

    return start_watched


def only(*exchanges: str) -> dict[str, object]:
    """Return settings with these exchanges and REFRESH_AHEAD enabled."""
    return {"refresh_ahead": True, **{f"{name}_enabled": name in exchanges for name in EXCHANGES}}


class Tally:
    """Counts the outcomes of due entries since the test began."""

    def __init__(self) -> None:
        self._before = self._read()

    def __call__(self) -> tuple[int, ...]:
        """Return the counts of success, error and skipped."""
        return tuple(
            int(now - before) for now, before in zip(self._read(), self._before, strict=True)
        )

    async def reaches(self, **expected: int) -> None:
        """Wait until the outcomes have these counts."""
        await eventually(
            lambda: expected.items() <= dict(zip(REFRESHES, self(), strict=True)).items()
        )

    @staticmethod
    def _read() -> list[float]:
        return [sample("cache_refreshes_total", outcome=outcome) for outcome in REFRESHES]


@pytest.fixture
def tally() -> Tally:
    return Tally()


def results() -> dict[str, float]:
    return {result: sample("cache_requests_total", result=result) for result in CACHE_RESULTS}


async def ask(live: Live, path: str, times: int = OFTEN) -> list[str]:
    """Send requests one after the other; returns how each was answered."""
    found = []
    for _ in range(times):
        answer = await live.get(path)
        assert answer.status_code == 200, answer.text
        found.append(answer.headers["Cache-Status"].split("; ttl")[0].removeprefix("virtuoso; "))
    return found


def born(live: Live, key: Key) -> float | None:
    """Return when the entry in memory was born, by the clock of the test, or None."""
    entry = live.gateway.cache.memory.get(key)
    return None if entry is None else entry.born - 1000.0


def births(live: Live) -> list[float | None]:
    """Return `born` of all entries."""
    keys = live.gateway.cache.memory.keys()
    return [born(live, key) for key in keys]


def hold(live: Live, key: Key, age: float = 0.0, ttl: float = TTL) -> None:
    """Put a hot entry of this age into memory."""
    memory, at = live.gateway.cache.memory, live.gateway.clock.monotonic() - age
    memory.put(Entry.create(key, b'{"stale":false}', at, at, ttl))
    for _ in range(HOT_HITS):
        entry = memory.find_fresh(key)
        assert entry is not None
        memory.count_hit(entry)


async def seen(live: Live, clock: FakeClock) -> None:
    """Wait until the refresher has checked all entries that are due now, and its refreshes ended.

    Trades of bybit, with a TTL that is nothing beside the others, are made due, and are refreshed
    in the same look.
    """
    await ask(live, CANARY)
    clock.advance(CANARY_TTL * 7 / 8)
    await eventually(lambda: born(live, CANARY_KEY) == clock.elapsed)
    await idle(live)


async def idle(live: Live) -> None:
    """Wait until no load is under way."""
    await eventually(lambda: not live.gateway.cache._tasks)


async def most_at_once(live: Live, exchange: str, ended: Callable[[], bool]) -> int:
    """Return the most calls to the exchange that are under way at once until `ended`."""
    counts: list[int] = []

    def check() -> bool:
        counts.append(live.gateway.manager[exchange].in_flight)
        return ended()

    await eventually(check)
    return max(counts)


async def reachable(live: Live, clock: FakeClock) -> None:
    """Wait until Redis is used. On a busy machine its breaker may have opened at start."""
    store = live.gateway.store
    while not store.up:
        clock.advance(20)
        with contextlib.suppress(RedisUnavailable):
            await store.run("ping", lambda redis: redis.ping())


def requests_of(sandbox: Sandbox, exchange: str) -> list[str]:
    """Return the requests of an exchange, sorted."""
    return sorted(unquote(path) for path, _ in sandbox.requests[exchange])


async def test_a_hot_key_never_misses(
    watched: StartWatched, sandbox: Sandbox, clock: FakeClock, tally: Tally
) -> None:
    """Over many TTLs every request but the first is a hit.

    Each TTL costs one call, and no refresh counts as a request.
    """
    live, rounds, before = await watched(), 8, results()
    found = await ask(live, PATH)
    for round_number in range(1, rounds + 1):
        for _ in range(4):
            found += await ask(live, PATH, 2)
            clock.advance(DUE / 4)
        await tally.reaches(success=round_number)
        assert born(live, KEY) == round_number * DUE
    assert (found[0], set(found[1:])) == (MISS, {HIT})
    assert (sandbox.count("bybit", "tickers"), tally()) == (1 + rounds, (rounds, 0, 0))
    asked = {
        result: count - before[result]
        for result, count in results().items()
        if count != before[result]
    }
    assert asked == {"miss": 1, "hit_memory": len(found) - 1}


@pytest.mark.parametrize("hits", range(HOT_HITS))
async def test_an_entry_below_hot_hits_expires(
    watched: StartWatched, sandbox: Sandbox, clock: FakeClock, hits: int
) -> None:
    """An entry that was requested once, or less often than HOT_HITS, is not refreshed."""
    live = await watched(trades_ttl_seconds=CANARY_TTL)
    await ask(live, PATH, 1 + hits)
    clock.advance(DUE)
    await seen(live, clock)
    assert (sandbox.count("bybit", "tickers"), born(live, KEY)) == (1, 0.0)
    clock.advance(TTL - DUE)
    assert await ask(live, PATH, 1) == [MISS]


async def test_a_key_without_requests_stops_being_refreshed(
    watched: StartWatched, sandbox: Sandbox, clock: FakeClock, tally: Tally
) -> None:
    """However often it was requested before: after two more refreshes it expires."""
    live = await watched(trades_ttl_seconds=CANARY_TTL)
    await ask(live, PATH, 50)
    for round_number in (1, 2, 3):
        clock.elapsed = round_number * DUE
        await tally.reaches(success=round_number)
    for round_number in (4, 5):
        clock.elapsed = round_number * DUE
        await seen(live, clock)
    assert (sandbox.count("bybit", "tickers"), born(live, KEY)) == (1 + 3, 3 * DUE)
    assert await ask(live, PATH, 1) == [MISS]


@pytest.mark.parametrize(
    "spellings", [["BTC-USDT"] * 3, ["BTC-USDT", "btc-usdt", "Btc-Usdt"]], ids=["path", "app"]
)
async def test_hits_of_fast_path_and_app_count_alike(
    watched: StartWatched, clock: FakeClock, tally: Tally, spellings: list[str]
) -> None:
    """Both make an entry hot."""
    live = await watched()
    for spelling in spellings:
        assert KEY not in live.gateway.cache.memory.hot
        await ask(live, f"/ticker/{spelling}", 1)
    by_fast_path = sum(recipe.was_used for recipe in live.front._singles.values())
    assert by_fast_path == (len(set(spellings)) == 1), "which of the two answered"
    assert KEY in live.gateway.cache.memory.hot
    clock.advance(DUE)
    await tally.reaches(success=1)


async def test_an_entry_is_refreshed_when_a_fifth_of_its_ttl_is_left(
    watched: StartWatched, sandbox: Sandbox, clock: FakeClock, tally: Tally
) -> None:
    """Not before, and not only when it expires."""
    live = await watched(trades_ttl_seconds=CANARY_TTL)
    await ask(live, PATH)
    clock.elapsed = DUE - 0.0625
    await seen(live, clock)
    assert (sandbox.count("bybit", "tickers"), born(live, KEY)) == (1, 0.0)
    clock.elapsed = DUE
    await eventually(lambda: born(live, KEY) == DUE)
    assert (sandbox.count("bybit", "tickers"), tally()[1:]) == (2, (0, 0))


def test_the_tick_is_short_enough() -> None:
    """No usual entry expires between two ticks, even if one tick is late."""
    settings: Settings = make_settings()
    ttls = (
        settings.ticker_ttl_seconds,
        settings.orderbook_ttl_seconds,
        settings.ohlcv_ttl_seconds,
        settings.trades_ttl_seconds,
    )
    assert 0 < TICK_SECONDS * 3 < min(ttls) * DUE_RATIO


async def test_tickers_of_an_exchange_are_refreshed_together(
    watched: StartWatched, sandbox: Sandbox, clock: FakeClock, tally: Tally
) -> None:
    """One call refreshes all that are due or nearly due, and no entry that is younger or of another
    exchange.
    """
    live = await watched(("kraken",))
    ages = {
        "BTC": 0.0,
        "ETH": 0.0,
        "SOL": 3.0,
        "XRP": 3.125,
    }  # at 12 s these are 12, 12, 9 and 8.875 s old
    for coin, at in ages.items():
        clock.elapsed = at
        await ask(live, f"/ticker/{coin}-USDT?exchange=kraken")
    await ask(live, "/ticker/ADA-USDT?exchange=kraken", 1)
    sandbox.clear_counts()
    clock.elapsed = DUE
    await tally.reaches(success=3)
    found = {coin: born(live, Key("kraken", "ticker", f"{coin}/USDT")) for coin in (*ages, "ADA")}
    assert found == {"BTC": DUE, "ETH": DUE, "SOL": DUE, "XRP": 3.125, "ADA": 3.125}
    assert requests_of(sandbox, "kraken") == ["/0/public/Ticker?pair=XBTUSDT,ETHUSDT,SOLUSDT"]


async def test_a_nearly_due_entry_waits_for_one_that_is_due(
    watched: StartWatched, sandbox: Sandbox, clock: FakeClock
) -> None:
    """An entry with nearly half of its TTL left waits until another of its exchange is due."""
    live = await watched(("bybit", "binance"), trades_ttl_seconds=CANARY_TTL)
    await ask(live, "/ticker/ETH-USDT?exchange=binance")
    clock.elapsed = 3.0
    await ask(live, PATH)
    await ask(live, "/ticker/ETH-USDT?exchange=bybit")
    sandbox.clear_counts()
    clock.elapsed = DUE
    await seen(live, clock)
    assert (sandbox.count("binance"), sandbox.count("bybit", "tickers")) == (1, 0)


async def test_a_group_refresh_loads_entries_with_short_ttls_too(
    watched: StartWatched, sandbox: Sandbox, clock: FakeClock, tally: Tally
) -> None:
    """The call refreshes each entry of the group, also a young one that expires soon."""
    live, short = await watched(("kraken",)), Key("kraken", "ticker", "ETH/USDT")
    long = short._replace(symbol="BTC/USDT")
    hold(live, long, age=DUE)
    hold(live, short, age=5.0, ttl=8.0)
    await tally.reaches(success=2)
    assert (born(live, long), born(live, short)) == (0.0, 0.0)
    assert requests_of(sandbox, "kraken") == ["/0/public/Ticker?pair=XBTUSDT,ETHUSDT"]


async def test_binance_tickers_are_refreshed_in_lists_of_twenty(
    watched: StartWatched, sandbox: Sandbox, clock: FakeClock, tally: Tally
) -> None:
    """Calls for up to 20 tickers have the lowest documented weight. Each ticker is in one call."""
    live = await watched(("binance",))
    symbols = sorted(
        market["symbol"] for market in live.gateway.markets.select("binance", None, None)
    )[:45]
    assert len(symbols) == 45
    await ask(live, f"/tickers?symbols={','.join(symbols)}")
    sandbox.clear_counts()
    clock.advance(DUE)
    await tally.reaches(success=45)
    asked = [path.count('"') // 2 for path in requests_of(sandbox, "binance")]
    assert sorted(asked) == [5, batch_size("binance"), 20]
    assert {born(live, Key("binance", "ticker", symbol)) for symbol in symbols} == {DUE}


async def test_other_exchanges_need_one_call_per_market_type(
    watched: StartWatched, sandbox: Sandbox, clock: FakeClock, tally: Tally
) -> None:
    """A list costs as much as one ticker there. Swaps have a list of their own."""
    live = await watched(market_types="spot,swap")
    listed = [market["symbol"] for market in live.gateway.markets.select("bybit", None, "USDT")]
    spot, swaps = [[name for name in listed if (":" in name) == swap] for swap in (False, True)]
    symbols = [*swaps[:2], *spot[:30]]
    await ask(live, f"/tickers?symbols={','.join(symbols)}")
    sandbox.clear_counts()
    clock.advance(DUE)
    await tally.reaches(success=32)
    assert requests_of(sandbox, "bybit") == [
        f"/v5/market/tickers?category={kind}" for kind in ("linear", "spot")
    ]
    assert {born(live, Key("bybit", "ticker", symbol)) for symbol in symbols} == {DUE}


async def test_each_exchange_refreshes_its_own_entries(
    watched: StartWatched, sandbox: Sandbox, clock: FakeClock, tally: Tally
) -> None:
    """A symbol that is requested by exchange is refreshed at each of them."""
    live = await watched(EXCHANGES)
    await ask(live, "/tickers?symbols=BTC-USDT,ETH-USDT&exchange=all")
    clock.advance(DUE)
    sandbox.clear_counts()
    await tally.reaches(success=6)
    assert [sandbox.count(name) for name in live.gateway.manager.names] == [1, 1, 1]


async def test_every_kind_is_refreshed_with_its_parameters(
    watched: StartWatched, sandbox: Sandbox, clock: FakeClock, tally: Tally
) -> None:
    """Order books and trades each need a call of their own."""
    live = await watched(("binance",), orderbook_ttl_seconds=TTL, trades_ttl_seconds=TTL)
    paths = [
        f"/orderbook/{what}"
        for what in ("BTC-USDT?limit=5", "BTC-USDT?limit=100", "ETH-USDT?limit=5")
    ]
    paths += ["/trades/BTC-USDT?limit=5", "/trades/ETH-USDT?limit=5", "/ticker/BTC-USDT"]
    for path in paths:
        await ask(live, f"{path}{'&' if '?' in path else '?'}exchange=binance")
    first = requests_of(sandbox, "binance")
    sandbox.clear_counts()
    clock.advance(DUE)
    await tally.reaches(success=len(paths))
    assert requests_of(sandbox, "binance") == first
    assert set(births(live)) == {DUE}


async def test_candles_are_refreshed_when_they_close(
    watched: StartWatched, sandbox: Sandbox, clock: FakeClock
) -> None:
    """An earlier refresh would bring nothing final. Each close costs one call."""
    live = await watched(
        ("bybit", "binance"),
        ohlcv_ttl_seconds=100,
        cache_memory_ttl=100,
        streaming=False,  # a stream would keep the candles up to date
        trades_ttl_seconds=CANARY_TTL,
    )
    clock.advance(60 - clock.time() % 60 + 20)
    path = "/ohlcv/BTC-USDT?timeframe=1m&exchange=binance"
    found = await ask(live, path)
    for calls in (2, 3):
        clock.advance(60 - clock.time() % 60 + 0.25)
        await seen(live, clock)
        assert sandbox.count("binance") == calls - 1
        clock.advance(0.25)
        await eventually(lambda calls=calls: sandbox.count("binance") == calls)  # type: ignore[misc]
        await eventually(lambda: clock.elapsed in births(live))
        found += await ask(live, path)
    assert found.count(MISS) == 1


async def test_half_of_the_budget_is_reserved_for_requests(
    watched: StartWatched, sandbox: Sandbox, clock: FakeClock, tally: Tally
) -> None:
    """Above half of the budget each due entry is skipped once; misses of requests still load."""
    assert MAX_BUDGET_RATIO == 0.5
    live = await watched(("kraken",), kraken_budget="3/600", trades_ttl_seconds=TTL)
    paths = [f"/{kind}/BTC-USDT?exchange=kraken" for kind in ("ticker", "trades")]
    for path in paths:
        await ask(live, path)
    assert live.gateway.manager.limiter.used_ratio("kraken") > 0.5
    clock.advance(DUE)
    await tally.reaches(skipped=2)
    assert [await ask(live, path) for path in paths] == [[HIT] * OFTEN] * 2
    await ask(live, "/ticker/ETH-USDT?exchange=kraken", 1)
    assert (sandbox.count("kraken"), tally()) == (3, (0, 0, 2))


async def test_refreshes_may_use_half_of_the_budget(
    watched: StartWatched, sandbox: Sandbox, clock: FakeClock, tally: Tally
) -> None:
    """At exactly half an entry is refreshed; above it the next one is skipped."""
    live = await watched(("kraken",), kraken_budget="4/600")
    path = "/ticker/BTC-USDT?exchange=kraken"
    await ask(live, "/ticker/ETH-USDT?exchange=kraken", 1)
    await ask(live, path)
    assert live.gateway.manager.limiter.used_ratio("kraken") == 0.5
    clock.advance(DUE)
    await tally.reaches(success=1)
    await ask(live, path)
    clock.advance(DUE)
    await tally.reaches(success=1, skipped=1)
    assert await ask(live, path, 1) == [HIT]
    clock.advance(TTL - DUE)
    assert await ask(live, path, 1) == [MISS]
    assert sandbox.count("kraken") == 4


BOOK = "/orderbook/BTC-USDT?limit=200"
SWAP, SWAPS = "/ticker/BTC-USDT:USDT", "/tickers?symbols=BTC-USDT:USDT,ETH-USDT:USDT"
FIVE_BOOKS = [f"/orderbook/{coin}-USDT?limit=5" for coin in ("ETH", "SOL", "XRP", "ADA", "LTC")]
TWELVE_TICKERS = [f"/ticker/{coin}-USDT" for coin in COINS[:12]]


@pytest.mark.parametrize(
    ("path", "budget", "others", "outcome"),
    [
        (BOOK, 50, FIVE_BOOKS, {"success": 1}),
        (BOOK, 48, TWELVE_TICKERS, {"skipped": 1}),
        (SWAPS, 40, ["/ticker/SOL-USDT:USDT"], {"skipped": 2}),
        (SWAP, 101, TWELVE_TICKERS[:1], {"success": 1}),
    ],
    ids=["a book that fits", "a book that does not", "swaps that do not", "a swap that does"],
)
async def test_a_refresh_over_the_budget_is_skipped(
    watched: StartWatched,
    clock: FakeClock,
    tally: Tally,
    path: str,
    budget: int,
    others: list[str],
    outcome: dict[str, int],
) -> None:
    """By its documented weight; a skipped refresh is no error."""
    more = {
        "market_types": "spot,swap",
        "binance_budget": f"{budget}/10",
        "binance_futures_budget": f"{budget}/10",
        "orderbook_ttl_seconds": TTL,
    }
    live = await watched(("binance",), **more)
    clock.elapsed = 60.0  # the weight of the market list has left the window
    await ask(live, path)
    clock.elapsed = 71.5  # the weight of the first load, too
    for other in others:
        await ask(live, other, 1)
    assert live.gateway.manager.limiter.used_ratio("binance") <= 0.5
    clock.elapsed = 60.0 + DUE
    await tally.reaches(**outcome)
    assert sum(tally()) == sum(outcome.values())


async def test_no_refresh_while_the_breaker_is_open(
    watched: StartWatched, sandbox: Sandbox, clock: FakeClock, tally: Tally
) -> None:
    """The refresh is skipped, the entry is served, and the exchange is not asked."""
    live = await watched(cb_threshold=1, cb_reset_seconds=600, cb_max_open_seconds=600)
    await ask(live, PATH)
    await sandbox.set("bybit", status=500, rate_limit=-1)
    for coin in ("ETH", "SOL"):
        assert (await live.get(f"/ticker/{coin}-USDT?exchange=bybit")).status_code == 502
    await sandbox.set("bybit", rate_limit=-1)
    sandbox.clear_counts()
    clock.elapsed = DUE
    await tally.reaches(skipped=1)
    assert await ask(live, PATH) == [HIT] * OFTEN
    clock.elapsed = TTL
    assert await ask(live, PATH, 1) == ["hit; detail=stale_error"]
    assert (sandbox.count("bybit", "tickers"), tally()) == (0, (0, 0, 1))


async def test_a_failed_refresh_is_not_repeated(
    watched: StartWatched, sandbox: Sandbox, clock: FakeClock, tally: Tally
) -> None:
    """It counts as an error; the old entry is served until its TTL."""
    live = await watched(trades_ttl_seconds=CANARY_TTL)
    await ask(live, PATH)
    for begin in (0.0, TTL):
        await sandbox.set("bybit", status=500, only="tickers", rate_limit=-1)
        sandbox.clear_counts()
        clock.elapsed = begin + DUE
        errors = 1 if begin == 0.0 else 2
        await tally.reaches(error=errors)
        for at in (12.5, 13.0, 14.875):
            clock.elapsed = begin + at
            assert await ask(live, PATH) == [HIT] * OFTEN
            await seen(live, clock)
        assert (sandbox.count("bybit", "tickers"), tally()[1:], born(live, KEY)) == (
            1,
            (errors, 0),
            begin,
        )
        await sandbox.set("bybit", rate_limit=-1)
        clock.elapsed = begin + TTL
        assert await ask(live, PATH, 1) == [MISS], (
            "the next entry inherits the hits that make it hot"
        )


async def test_an_expired_hot_entry_is_refreshed(
    watched: StartWatched, sandbox: Sandbox, clock: FakeClock, tally: Tally
) -> None:
    """After a pause of the process, hot entries are refreshed unless a request was faster."""
    live = await watched()
    await ask(live, PATH)
    clock.elapsed = 2 * TTL
    await tally.reaches(success=1)
    assert (await ask(live, PATH, 1), sandbox.count("bybit", "tickers")) == ([HIT], 2)


@pytest.mark.parametrize(
    (
        "coins",
        "latency",
    ),  # milliseconds: in the one case the ticks of the two come one after the other, or both begin
    [(["BTC"], 0), (["BTC", "ETH", "SOL", "XRP"], 150)],
    ids=["one", "list"],
)
async def test_replicas_share_a_refresh(
    watched: StartWatched,
    sandbox: Sandbox,
    clock: FakeClock,
    tally: Tally,
    redis: RedisServer,
    coins: list[str],
    latency: int,
) -> None:
    """Two gateways with one Redis make one call for an entry, or a list, that is due on both."""
    replicas = [await watched(redis_url=redis.url) for _ in range(2)]
    orders = [",".join(f"{coin}-USDT" for coin in order) for order in (coins, reversed(coins))]
    asked = [
        (live, f"/tickers?symbols={order}&exchange=bybit")
        for live, order in zip(replicas, orders, strict=True)
    ]
    await sandbox.set("bybit", latency_ms=latency, rate_limit=-1)
    for live in replicas:
        await reachable(live, clock)
    sandbox.clear_counts()
    before = tally()[0]
    for live, path in asked:
        await ask(live, path, OFTEN + 5)
    for round_number in (1, 2):
        clock.advance(DUE)
        await tally.reaches(success=before + 2 * len(coins) * round_number)
        for live, path in asked:
            assert set(await ask(live, path, 5)) == {HIT}
            assert births(live) == pytest.approx([clock.elapsed] * len(coins), abs=0.002), (
                "Redis keeps ms"
            )
    assert sandbox.count("bybit", "tickers") == 1 + 2


async def test_refresh_ahead_can_be_disabled(
    watched: StartWatched, sandbox: Sandbox, clock: FakeClock, tally: Tally
) -> None:
    """With REFRESH_AHEAD=false hot entries expire."""
    off, on = await watched(refresh_ahead="false"), await watched(("kraken",))
    await ask(off, PATH)
    await ask(on, "/ticker/BTC-USDT?exchange=kraken", 20)
    # Two ticks of the other gateway: in between was a tick of this one, if it had any.
    for round_number in (1, 2):
        clock.elapsed = round_number * DUE
        await tally.reaches(success=round_number)
    assert (sandbox.count("bybit", "tickers"), list(off.gateway.cache.memory.hot)) == (1, [KEY])
    assert await ask(off, PATH, 1) == [MISS]


async def test_concurrent_refreshes_are_bounded(
    watched: StartWatched, sandbox: Sandbox, clock: FakeClock, tally: Tally
) -> None:
    """At most `MAX_REFRESHES` are under way; the others follow."""
    live, count = await watched(orderbook_ttl_seconds=TTL), 2 * MAX_REFRESHES + 3
    symbols = [market["symbol"] for market in live.gateway.markets.select("bybit", None, "USDT")][
        :count
    ]
    for symbol in symbols:
        await ask(live, f"/orderbook/{symbol}?limit=5&exchange=bybit")
    assert len(live.gateway.cache.memory.hot) == count
    await sandbox.set("bybit", latency_ms=150, rate_limit=-1)
    clock.advance(DUE)
    assert await most_at_once(live, "bybit", lambda: tally() == (count, 0, 0)) == MAX_REFRESHES
    assert set(births(live)) == {DUE}


async def test_concurrent_list_refreshes_are_bounded(clock: FakeClock, tally: Tally) -> None:
    """The bound counts calls, also within the lists of one exchange."""
    lists = MAX_REFRESHES + 2
    sandbox = Sandbox(now=clock.time, filler=lists * batch_size("binance"))
    await sandbox.start()
    await sandbox.set("binance", rate_limit=-1)
    async with serve(make_settings(sandbox, **only("binance")), clock, load_markets=True) as live:
        await eventually(lambda: live.gateway.markets.loaded_at)
        symbols = [
            market["symbol"] for market in live.gateway.markets.select("binance", None, "USDT")
        ]
        await sandbox.set("binance", latency_ms=150, rate_limit=-1)
        for symbol in symbols[-lists * batch_size("binance") :]:
            hold(live, Key("binance", "ticker", symbol), age=DUE)
        ended = (lists * batch_size("binance"), 0, 0)
        assert await most_at_once(live, "binance", lambda: tally() == ended) == MAX_REFRESHES
    await sandbox.stop()


async def test_a_cleared_key_is_not_refreshed(
    watched: StartWatched, sandbox: Sandbox, clock: FakeClock
) -> None:
    """It has to become hot again; no hits are inherited."""
    live = await watched(trades_ttl_seconds=CANARY_TTL, admin_token="0123456789")
    await ask(live, PATH, 20)
    cleared = await live.client.post(
        f"{live.url}/admin/cache/clear", headers={"Authorization": "Bearer 0123456789"}
    )
    assert cleared.json()["cleared"] == 1
    clock.elapsed = DUE
    await seen(live, clock)
    assert (sandbox.count("bybit", "tickers"), born(live, KEY)) == (1, None)
    assert await ask(live, PATH, 1) == [MISS]
    clock.elapsed = 2 * DUE
    await seen(live, clock)
    assert sandbox.count("bybit", "tickers") == 2, "no hits are inherited"


async def test_a_refresh_from_before_a_clear_is_not_stored(
    watched: StartWatched, sandbox: Sandbox, clock: FakeClock, tally: Tally
) -> None:
    """The result of a refresh that was under way at a clear is dropped."""
    live = await watched()
    await ask(live, PATH, 20)
    await sandbox.set("bybit", hang=True, rate_limit=-1)
    clock.elapsed = DUE
    await eventually(lambda: sandbox.count("bybit", "tickers") == 2)
    assert await live.gateway.cache.clear() == 1
    await sandbox.set("bybit", rate_limit=-1)
    await tally.reaches(success=1)
    assert (born(live, KEY), live.gateway.cache.memory.hot) == (None, {})


async def test_requests_hit_the_old_entry_during_a_refresh(
    watched: StartWatched, sandbox: Sandbox, clock: FakeClock, tally: Tally
) -> None:
    """Past its TTL, requests wait for the same refresh."""
    live = await watched()
    await ask(live, PATH)
    await sandbox.set("bybit", hang=True, rate_limit=-1)
    clock.elapsed = DUE
    await eventually(lambda: sandbox.count("bybit", "tickers") == 2)
    clock.elapsed = TTL - 0.125
    assert await ask(live, PATH) == [HIT] * OFTEN
    clock.elapsed = TTL
    waiting = asyncio.create_task(ask(live, PATH, 1))
    await eventually(lambda: sample("http_requests_in_progress") == 1)
    await sandbox.set("bybit", rate_limit=-1)
    assert await waiting == ["fwd=miss; collapsed"]
    assert (sandbox.count("bybit", "tickers"), tally()) == (2, (1, 0, 0))


async def test_shutdown_ends_refreshes(sandbox: Sandbox, clock: FakeClock) -> None:
    """No task and no connection is left."""
    before = asyncio.all_tasks()
    async with serve(
        make_settings(sandbox, **only("bybit"), ticker_ttl_seconds=TTL, trades_ttl_seconds=TTL),
        clock,
    ) as live:
        await eventually(
            lambda: len(live.gateway.markets.loaded_at) == len(live.gateway.manager.names)
        )
        await ask(live, PATH)
        await ask(live, CANARY)
        sandbox.clear_counts()
        await sandbox.set("bybit", hang=True, rate_limit=-1)
        clock.advance(DUE)
        await eventually(lambda: sandbox.count("bybit") == 2)
    await eventually(lambda: asyncio.all_tasks() <= before)


async def test_stopping_the_refresher_ends_its_tasks(
    start: StartGateway, sandbox: Sandbox, clock: FakeClock
) -> None:
    """A load under way belongs to the cache, and still fills it."""
    live = await start(**only("bybit") | {"refresh_ahead": False}, ticker_ttl_seconds=TTL)
    ahead = RefreshAhead(live.gateway)
    running = asyncio.create_task(ahead.run())
    await ask(live, PATH)
    await sandbox.set("bybit", hang=True, rate_limit=-1)
    clock.elapsed = DUE
    await eventually(lambda: sandbox.count("bybit", "tickers") == 2)
    assert len(ahead._tasks) == 1
    running.cancel()
    await asyncio.wait([running])
    await eventually(lambda: not ahead._tasks, seconds=1)
    await sandbox.set("bybit", rate_limit=-1)
    await eventually(lambda: born(live, KEY) == DUE)


async def test_memory_ttl_makes_an_entry_due(
    watched: StartWatched, sandbox: Sandbox, clock: FakeClock
) -> None:
    """Without Redis, if CACHE_MEMORY_TTL is shorter than the TTL."""
    live = await watched(ticker_ttl_seconds=60, cache_memory_ttl=30)
    path, key = PATH, KEY
    found = await ask(live, path)
    for round_number in (1, 2, 3):
        clock.advance(24)
        await eventually(lambda round_number=round_number: born(live, key) == 24 * round_number)  # type: ignore[misc]
        found += await ask(live, path)
    assert (found.count(MISS), sandbox.count("bybit")) == (1, 4)


async def test_refreshes_leave_loads_for_requests(
    watched: StartWatched, sandbox: Sandbox, clock: FakeClock
) -> None:
    """Refreshes use a tenth of MAX_CONCURRENT, or one if that is less. One load stays free."""
    live = await watched(("bybit", "kraken"), orderbook_ttl_seconds=TTL, max_concurrent=2)
    for market in live.gateway.markets.select("bybit", None, "USDT")[:8]:
        hold(live, Key("bybit", "orderbook", market["symbol"], (5,)))
    await sandbox.set("bybit", hang=True, rate_limit=-1)
    clock.advance(DUE)
    await eventually(lambda: live.gateway.manager["bybit"].in_flight == 1)
    assert await ask(live, "/ticker/BTC-USDT?exchange=kraken", 1) == [MISS]
    assert live.gateway.manager["bybit"].in_flight == 1
    await sandbox.reset()


async def test_refused_requests_make_nothing_hot(watched: StartWatched) -> None:
    """Requests without a key or over the limit must not spend the budget of an exchange."""
    live = await watched(api_keys="me:0123456789", client_rate_limit=1)
    assert (await live.get(PATH, headers={"X-API-Key": "0123456789"})).status_code == 200
    for headers, statuses in (
        ({}, [401, 401, 401]),
        ({"X-API-Key": "0123456789"}, [429, 429, 429]),
    ):
        assert [
            (await live.get(PATH, headers=headers)).status_code for _ in range(OFTEN)
        ] == statuses
    assert not live.gateway.cache.memory.hot


async def test_a_batch_counts_one_hit_per_ticker(watched: StartWatched) -> None:
    """Also if the app has to load a missing ticker."""
    live = await watched()
    path = "/tickers?symbols=BTC-USDT,ETH-USDT&exchange=bybit"
    await ask(live, path, 1)
    live.gateway.cache.memory.remove(Key("bybit", "ticker", "ETH/USDT"), "cleared")
    await ask(live, path, 1)
    assert not live.gateway.cache.memory.hot
    await ask(live, path, 1)
    assert list(live.gateway.cache.memory.hot) == [KEY]


async def test_each_entry_of_a_list_has_its_own_outcome(
    watched: StartWatched, tally: Tally
) -> None:
    """A symbol that fails is one error; the others of its list are successes."""
    live = await watched(("kraken",))
    for coin in ("BTC", "ETH", "SOL", "XRP", "ADA", "LTC", "DOT", "NOPE"):
        hold(live, Key("kraken", "ticker", f"{coin}/USDT"), age=DUE)
    await eventually(lambda: sum(tally()) == 8)
    assert tally() == (7, 1, 0)


async def test_replicas_with_different_hot_keys_take_turns(
    watched: StartWatched, sandbox: Sandbox, clock: FakeClock, redis: RedisServer
) -> None:
    """A key that another replica is just refreshing in its list needs no second call."""
    one, other = replicas = [
        await watched(redis_url=redis.url, refresh_ahead=False) for _ in range(2)
    ]
    for live in replicas:
        await reachable(live, clock)
    await ask(one, "/tickers?symbols=ADA-USDT,BTC-USDT&exchange=bybit")
    await ask(other, PATH)
    sandbox.clear_counts()
    await sandbox.set("bybit", latency_ms=200, rate_limit=-1)
    clock.advance(DUE)
    await RefreshAhead(one.gateway).refresh_due()
    await eventually(lambda: sandbox.count("bybit") == 1)
    await RefreshAhead(other.gateway).refresh_due()
    now = pytest.approx(clock.elapsed, abs=0.002)  # Redis keeps milliseconds
    await eventually(lambda: born(one, KEY) == now and born(other, KEY) == now)
    assert sandbox.count("bybit") == 1


async def test_pending_refreshes_count_as_spent(
    watched: StartWatched, clock: FakeClock, tally: Tally
) -> None:
    """Refreshes that come due at once do not use the half that is reserved for requests."""
    live = await watched(("kraken",), kraken_budget="10/60", orderbook_ttl_seconds=TTL)
    for coin in ("BTC", "ETH", "SOL", "XRP", "ADA", "LTC", "DOT", "DOGE", "LINK"):
        hold(live, Key("kraken", "orderbook", f"{coin}/USDT", (5,)))
    used = live.gateway.manager.limiter.used_ratio("kraken")
    clock.advance(DUE)
    await eventually(lambda: sum(tally()) == 9)
    assert used < live.gateway.manager.limiter.used_ratio("kraken") <= MAX_BUDGET_RATIO + 0.1
    assert await ask(live, "/trades/BTC-USDT?exchange=kraken", 1) == [MISS]


async def test_a_single_load_is_reserved_for_requests(
    watched: StartWatched, sandbox: Sandbox, clock: FakeClock
) -> None:
    """With MAX_CONCURRENT=1 nothing is refreshed ahead."""
    live = await watched(("bybit",), max_concurrent=1)
    hold(live, KEY, age=DUE)
    refresher = RefreshAhead(live.gateway)
    await refresher.refresh_due()
    assert (refresher._tasks, list(live.gateway.cache.memory.hot)) == (set(), [KEY])
