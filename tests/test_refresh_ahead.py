"""What is asked for often is refreshed before it expires: what is, what is not, in which calls, and at what cost.

The refresher looks ten times a second of real time at what is due by the clock of the test.
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
from src.refresh_ahead import BUDGET_RATIO, LEAD_RATIO, LOADS_RATIO, TICK_SECONDS, RefreshAhead
from src.sandbox.server import Sandbox
from src.sandbox.wire import COINS
from src.store.redis import RedisAway
from tests.conftest import FakeClock, Live, RedisServer, StartGateway, eventually, make_settings, sample, serve

TTL = 15.0
MAX_REFRESHES = int(100 * LOADS_RATIO)  # under way at once, with the default MAX_CONCURRENT
DUE = 12.0  # the age at which an entry is due: a fifth of its TTL is left
OFTEN = HOT_HITS + 1  # a miss, and hits enough to make it hot
KEY = Key("bybit", "ticker", "BTC/USDT")
PATH = "/ticker/BTC-USDT?exchange=bybit"
CANARY = "/trades/BTC-USDT?exchange=bybit&limit=1"
CANARY_KEY = Key("bybit", "trades", "BTC/USDT", "1")
CANARY_TTL = 0.015625
MISS, HIT = "fwd=miss; stored", "hit; detail=memory"

StartWatched = Callable[..., Awaitable[Live]]


@pytest.fixture
def watched(start: StartGateway) -> StartWatched:
    """Start gateways that refresh ahead; with bybit alone, unless more are named."""

    async def start_watched(exchanges: tuple[str, ...] = ("bybit",), **overrides: object) -> Live:
        return await start(**(only(*exchanges) | {"ticker_ttl_seconds": TTL} | overrides))

    return start_watched


def only(*exchanges: str) -> dict[str, object]:
    """Settings with these exchanges enabled, which are refreshed ahead."""
    return {"refresh_ahead": True, **{f"{name}_enabled": name in exchanges for name in EXCHANGES}}


class Tally:
    """How many entries that came due since the test began had which outcome."""

    def __init__(self) -> None:
        self._before = self._read()

    def __call__(self) -> tuple[int, ...]:
        """Count what succeeded, failed and was skipped, in this order."""
        return tuple(int(now - before) for now, before in zip(self._read(), self._before, strict=True))

    async def reaches(self, **expected: int) -> None:
        """Wait until these outcomes were had so often."""
        await eventually(lambda: expected.items() <= dict(zip(REFRESHES, self(), strict=True)).items())

    @staticmethod
    def _read() -> list[float]:
        return [sample("cache_refreshes_total", outcome=outcome) for outcome in REFRESHES]


@pytest.fixture
def tally() -> Tally:
    return Tally()


def results() -> dict[str, float]:
    return {result: sample("cache_requests_total", result=result) for result in CACHE_RESULTS}


async def ask(live: Live, path: str, times: int = OFTEN) -> list[str]:
    """Ask so often, one after the other; returns how each was answered."""
    found = []
    for _ in range(times):
        answer = await live.get(path)
        assert answer.status_code == 200, answer.text
        found.append(answer.headers["Cache-Status"].split("; ttl")[0].removeprefix("virtuoso; "))
    return found


def born(live: Live, key: Key) -> float | None:
    """When the entry in memory was asked for, by the clock of the test; None when there is none."""
    entry = live.gateway.cache.memory.get(key)
    return None if entry is None else entry.born - 1000.0


def births(live: Live) -> list[float | None]:
    """The same for all entries."""
    keys = live.gateway.cache.memory.keys()
    return [born(live, key) for key in keys]


def hold(live: Live, key: Key, age: float = 0.0, ttl: float = TTL) -> None:
    """Put a hot entry of this age into memory."""
    memory, at = live.gateway.cache.memory, live.gateway.clock.monotonic() - age
    memory.put(key, Entry.of(b'{"stale":false}', at, at, ttl))
    assert all(memory.ready(key) for _ in range(HOT_HITS))


async def seen(live: Live, clock: FakeClock) -> None:
    """Return when the refresher has looked at all that is due now, and what it began has ended.

    Trades of bybit, with a TTL that is nothing beside the others, are made due, and are refreshed in the same look.
    """
    await ask(live, CANARY)
    clock.advance(CANARY_TTL * 7 / 8)
    await eventually(lambda: born(live, CANARY_KEY) == clock.elapsed)
    await idle(live)


async def idle(live: Live) -> None:
    """Wait until no load is under way."""
    await eventually(lambda: not live.gateway.cache._tasks)


async def most_at_once(live: Live, exchange: str, ended: Callable[[], bool]) -> int:
    """Wait for the end; returns how many calls to the exchange were under way at once until then."""
    counts: list[int] = []

    def look() -> bool:
        counts.append(live.gateway.manager[exchange].in_flight)
        return ended()

    await eventually(look)
    return max(counts)


async def reachable(live: Live, clock: FakeClock) -> None:
    """Wait until Redis is used: on a busy machine it may have looked slow while the gateway started."""
    store = live.gateway.store
    while not store.up:
        clock.advance(20)
        with contextlib.suppress(RedisAway):
            await store.run("ping", lambda redis: redis.ping())


def names(sandbox: Sandbox, exchange: str) -> list[str]:
    """The requests an exchange got, in a fixed order."""
    return sorted(unquote(path) for path, _ in sandbox.requests[exchange])


async def test_what_is_asked_for_often_never_misses(
    watched: StartWatched, sandbox: Sandbox, clock: FakeClock, tally: Tally
) -> None:
    """Over many TTLs every request but the first is a hit, each life costs one call, and no refresh is a request."""
    live, lives, before = await watched(), 8, results()
    found = await ask(live, PATH)
    for life in range(1, lives + 1):
        for _ in range(4):
            found += await ask(live, PATH, 2)
            clock.advance(DUE / 4)
        await tally.reaches(success=life)
        assert born(live, KEY) == life * DUE
    assert (found[0], set(found[1:])) == (MISS, {HIT})
    assert (sandbox.count("bybit", "tickers"), tally()) == (1 + lives, (lives, 0, 0))
    asked = {result: count - before[result] for result, count in results().items() if count != before[result]}
    assert asked == {"miss": 1, "hit_memory": len(found) - 1}


@pytest.mark.parametrize("hits", range(HOT_HITS))
async def test_what_is_not_asked_for_again_is_not_refreshed(
    watched: StartWatched, sandbox: Sandbox, clock: FakeClock, hits: int
) -> None:
    """A value that was asked for once, or given out less often than makes it hot, simply expires."""
    live = await watched(trades_ttl_seconds=CANARY_TTL)
    await ask(live, PATH, 1 + hits)
    clock.advance(DUE)
    await seen(live, clock)
    assert (sandbox.count("bybit", "tickers"), born(live, KEY)) == (1, 0.0)
    clock.advance(TTL - DUE)
    assert await ask(live, PATH, 1) == [MISS]


async def test_what_nobody_asks_for_any_more_is_forgotten(
    watched: StartWatched, sandbox: Sandbox, clock: FakeClock, tally: Tally
) -> None:
    """However popular it was, it is refreshed for two more lives without a request, and then it expires."""
    live = await watched(trades_ttl_seconds=CANARY_TTL)
    await ask(live, PATH, 50)
    for life in (1, 2, 3):
        clock.elapsed = life * DUE
        await tally.reaches(success=life)
    for life in (4, 5):
        clock.elapsed = life * DUE
        await seen(live, clock)
    assert (sandbox.count("bybit", "tickers"), born(live, KEY)) == (1 + 3, 3 * DUE)
    assert await ask(live, PATH, 1) == [MISS]


@pytest.mark.parametrize("spellings", [["BTC-USDT"] * 3, ["BTC-USDT", "btc-usdt", "Btc-Usdt"]], ids=["path", "app"])
async def test_hits_count_whoever_answers_them(
    watched: StartWatched, clock: FakeClock, tally: Tally, spellings: list[str]
) -> None:
    """Repetitions that are answered in front of the app make a value hot as those do that the app answers."""
    live = await watched()
    for spelling in spellings:
        assert KEY not in live.gateway.cache.memory.hot
        await ask(live, f"/ticker/{spelling}", 1)
    in_front = sum(slot.used for slot in live.front._single.values())
    assert in_front == (len(set(spellings)) == 1), "which of the two answered"
    assert KEY in live.gateway.cache.memory.hot
    clock.advance(DUE)
    await tally.reaches(success=1)


async def test_when_it_is_due(watched: StartWatched, sandbox: Sandbox, clock: FakeClock, tally: Tally) -> None:
    """An entry is left alone until a fifth of its TTL is left, and is refreshed then, not when somebody asks."""
    live = await watched(trades_ttl_seconds=CANARY_TTL)
    await ask(live, PATH)
    clock.elapsed = DUE - 0.0625
    await seen(live, clock)
    assert (sandbox.count("bybit", "tickers"), born(live, KEY)) == (1, 0.0)
    clock.elapsed = DUE
    await eventually(lambda: born(live, KEY) == DUE)
    assert (sandbox.count("bybit", "tickers"), tally()[1:]) == (2, (0, 0))


def test_looks_are_frequent_enough() -> None:
    """Between two looks no usual entry goes from not yet due to expired, even if one look comes late."""
    settings: Settings = make_settings()
    ttls = (
        settings.ticker_ttl_seconds,
        settings.orderbook_ttl_seconds,
        settings.ohlcv_ttl_seconds,
        settings.trades_ttl_seconds,
    )
    assert 0 < TICK_SECONDS * 3 < min(ttls) * LEAD_RATIO


async def test_tickers_of_an_exchange_go_together(
    watched: StartWatched, sandbox: Sandbox, clock: FakeClock, tally: Tally
) -> None:
    """One call brings all that are due, those along that are nearly, but none that is younger or not asked for."""
    live = await watched(("kraken",))
    ages = {"BTC": 0.0, "ETH": 0.0, "SOL": 3.0, "XRP": 3.125}  # at 12 s these are 12, 12, 9 and 8.875 s old
    for coin, at in ages.items():
        clock.elapsed = at
        await ask(live, f"/ticker/{coin}-USDT?exchange=kraken")
    await ask(live, "/ticker/ADA-USDT?exchange=kraken", 1)
    sandbox.clear_counts()
    clock.elapsed = DUE
    await tally.reaches(success=3)
    found = {coin: born(live, Key("kraken", "ticker", f"{coin}/USDT")) for coin in (*ages, "ADA")}
    assert found == {"BTC": DUE, "ETH": DUE, "SOL": DUE, "XRP": 3.125, "ADA": 3.125}
    assert names(sandbox, "kraken") == ["/0/public/Ticker?pair=XBTUSDT,ETHUSDT,SOLUSDT"]


async def test_what_is_nearly_due_is_no_reason_for_a_call(
    watched: StartWatched, sandbox: Sandbox, clock: FakeClock
) -> None:
    """Entries of which nearly half of the TTL is left wait until one of their own exchange is due."""
    live = await watched(("bybit", "binance"), trades_ttl_seconds=CANARY_TTL)
    await ask(live, "/ticker/ETH-USDT?exchange=binance")
    clock.elapsed = 3.0
    await ask(live, PATH)
    await ask(live, "/ticker/ETH-USDT?exchange=bybit")
    sandbox.clear_counts()
    clock.elapsed = DUE
    await seen(live, clock)
    assert (sandbox.count("binance"), sandbox.count("bybit", "tickers")) == (1, 0)


async def test_each_is_loaded_that_goes_along(
    watched: StartWatched, sandbox: Sandbox, clock: FakeClock, tally: Tally
) -> None:
    """Of entries with unlike TTLs the call brings every one, also one that is young but expires soon."""
    live, short = await watched(("kraken",)), Key("kraken", "ticker", "ETH/USDT")
    long = short._replace(symbol="BTC/USDT")
    hold(live, long, age=DUE)
    hold(live, short, age=5.0, ttl=8.0)
    await tally.reaches(success=2)
    assert (born(live, long), born(live, short)) == (0.0, 0.0)
    assert names(sandbox, "kraken") == ["/0/public/Ticker?pair=XBTUSDT,ETHUSDT"]


async def test_binance_is_asked_in_lists_of_twenty(
    watched: StartWatched, sandbox: Sandbox, clock: FakeClock, tally: Tally
) -> None:
    """Tickers of binance go in calls of 20, of which the documented weight is least, and each goes once."""
    live = await watched(("binance",))
    symbols = sorted(market["symbol"] for market in live.gateway.markets.select("binance", None, None))[:45]
    assert len(symbols) == 45
    await ask(live, f"/tickers?symbols={','.join(symbols)}")
    sandbox.clear_counts()
    clock.advance(DUE)
    await tally.reaches(success=45)
    asked = [path.count('"') // 2 for path in names(sandbox, "binance")]
    assert sorted(asked) == [5, batch_size("binance"), 20]
    assert {born(live, Key("binance", "ticker", symbol)) for symbol in symbols} == {DUE}


async def test_other_exchanges_are_asked_once_for_each_type_of_market(
    watched: StartWatched, sandbox: Sandbox, clock: FakeClock, tally: Tally
) -> None:
    """Where a list costs as much as one ticker all that is due is one call; swaps have a list of their own."""
    live = await watched(market_types="spot,swap")
    listed = [market["symbol"] for market in live.gateway.markets.select("bybit", None, "USDT")]
    spot, swaps = [[name for name in listed if (":" in name) == swap] for swap in (False, True)]
    symbols = [*swaps[:2], *spot[:30]]
    await ask(live, f"/tickers?symbols={','.join(symbols)}")
    sandbox.clear_counts()
    clock.advance(DUE)
    await tally.reaches(success=32)
    assert names(sandbox, "bybit") == [f"/v5/market/tickers?category={kind}" for kind in ("linear", "spot")]
    assert {born(live, Key("bybit", "ticker", symbol)) for symbol in symbols} == {DUE}


async def test_each_exchange_is_asked_for_its_own(
    watched: StartWatched, sandbox: Sandbox, clock: FakeClock, tally: Tally
) -> None:
    """A symbol that is asked for by exchange is refreshed at each of them."""
    live = await watched(EXCHANGES)
    await ask(live, "/tickers?symbols=BTC-USDT,ETH-USDT&exchange=all")
    clock.advance(DUE)
    sandbox.clear_counts()
    await tally.reaches(success=6)
    assert [sandbox.count(name) for name in live.gateway.manager.names] == [1, 1, 1]


async def test_every_kind_is_refreshed_as_it_was_asked_for(
    watched: StartWatched, sandbox: Sandbox, clock: FakeClock, tally: Tally
) -> None:
    """Order books, candles and trades are refreshed each by a call of its own, with the parameters it was first had."""
    live = await watched(("binance",), orderbook_ttl_seconds=TTL, ohlcv_ttl_seconds=TTL, trades_ttl_seconds=TTL)
    paths = [f"/orderbook/{what}" for what in ("BTC-USDT?limit=5", "BTC-USDT?limit=50", "ETH-USDT?limit=5")]
    paths += [f"/ohlcv/{what}" for what in ("BTC-USDT?timeframe=5m&limit=7", "BTC-USDT?timeframe=1h&limit=7")]
    paths += ["/trades/BTC-USDT?limit=5", "/trades/ETH-USDT?limit=5", "/ticker/BTC-USDT"]
    for path in paths:
        await ask(live, f"{path}{'&' if '?' in path else '?'}exchange=binance")
    first = names(sandbox, "binance")
    sandbox.clear_counts()
    clock.advance(DUE)
    await tally.reaches(success=len(paths))
    assert names(sandbox, "binance") == first
    assert set(births(live)) == {DUE}


async def test_half_of_a_budget_is_left_to_callers(
    watched: StartWatched, sandbox: Sandbox, clock: FakeClock, tally: Tally
) -> None:
    """Above half of the budget nothing is refreshed, once for each entry, and callers' own misses are answered."""
    assert BUDGET_RATIO == 0.5
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


async def test_half_of_a_budget_may_be_used(
    watched: StartWatched, sandbox: Sandbox, clock: FakeClock, tally: Tally
) -> None:
    """At exactly half of the budget an entry is still refreshed, and the next, which finds more of it used, is not."""
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
        (SWAPS, 101, TWELVE_TICKERS[:1], {"skipped": 2}),
        (SWAP, 101, TWELVE_TICKERS[:1], {"success": 1}),
    ],
    ids=["a book that fits", "a book that does not", "swaps that do not", "a swap that does"],
)
async def test_what_would_not_fit_is_not_tried(
    watched: StartWatched,
    clock: FakeClock,
    tally: Tally,
    path: str,
    budget: int,
    others: list[str],
    outcome: dict[str, int],
) -> None:
    """A refresh whose documented weight the rest of the budget does not suffice for is skipped, not a failure."""
    more = {"market_types": "spot,swap", "binance_budget": f"{budget}/10", "orderbook_ttl_seconds": TTL}
    live = await watched(("binance",), **more)
    clock.elapsed = 60.0  # what the market list cost is forgotten
    await ask(live, path)
    clock.elapsed = 71.5  # and so is the first load
    for other in others:
        await ask(live, other, 1)
    assert live.gateway.manager.limiter.used_ratio("binance") <= 0.5
    clock.elapsed = 60.0 + DUE
    await tally.reaches(**outcome)
    assert sum(tally()) == sum(outcome.values())


async def test_an_open_breaker_is_left_alone(
    watched: StartWatched, sandbox: Sandbox, clock: FakeClock, tally: Tally
) -> None:
    """While an exchange is not asked at all nothing of it is refreshed: it is skipped, served, and then expires."""
    live = await watched(cb_threshold=1, cb_reset_seconds=600, cb_max_open_seconds=600)
    await ask(live, PATH)
    await sandbox.set("bybit", status=500, rate_limit=-1)
    assert (await live.get("/ticker/ETH-USDT?exchange=bybit")).status_code == 502
    await sandbox.set("bybit", rate_limit=-1)
    sandbox.clear_counts()
    clock.elapsed = DUE
    await tally.reaches(skipped=1)
    assert await ask(live, PATH) == [HIT] * OFTEN
    clock.elapsed = TTL
    assert await ask(live, PATH, 1) == ["hit; detail=stale_error"]
    assert (sandbox.count("bybit", "tickers"), tally()) == (0, (0, 0, 1))


async def test_a_refresh_that_fails_is_tried_once(
    watched: StartWatched, sandbox: Sandbox, clock: FakeClock, tally: Tally
) -> None:
    """A failed refresh is an error; the old entry is served until its TTL, and in its life no other is tried."""
    live = await watched(trades_ttl_seconds=CANARY_TTL)
    await ask(live, PATH)
    for life in (0.0, TTL):
        await sandbox.set("bybit", status=500, only="tickers", rate_limit=-1)
        sandbox.clear_counts()
        clock.elapsed = life + DUE
        errors = 1 if life == 0.0 else 2
        await tally.reaches(error=errors)
        for at in (12.5, 13.0, 14.875):
            clock.elapsed = life + at
            assert await ask(live, PATH) == [HIT] * OFTEN
            await seen(live, clock)
        assert (sandbox.count("bybit", "tickers"), tally()[1:], born(live, KEY)) == (1, (errors, 0), life)
        await sandbox.set("bybit", rate_limit=-1)
        clock.elapsed = life + TTL
        assert await ask(live, PATH, 1) == [MISS], "the next life, whose entry inherits what makes it hot"


async def test_what_is_past_its_ttl_is_refreshed_too(
    watched: StartWatched, sandbox: Sandbox, clock: FakeClock, tally: Tally
) -> None:
    """After a pause of the process what had been asked for often is brought back, unless somebody was quicker."""
    live = await watched()
    await ask(live, PATH)
    clock.elapsed = 2 * TTL
    await tally.reaches(success=1)
    assert (await ask(live, PATH, 1), sandbox.count("bybit", "tickers")) == ([HIT], 2)


@pytest.mark.parametrize(
    ("coins", "latency"),  # milliseconds: in the one case the looks of the two come one after the other, or both begin
    [(["BTC"], 0), (["BTC", "ETH", "SOL", "XRP"], 150)],
    ids=["one", "list"],
)
async def test_replicas_refresh_once(
    watched: StartWatched,
    sandbox: Sandbox,
    clock: FakeClock,
    tally: Tally,
    redis: RedisServer,
    coins: list[str],
    latency: int,
) -> None:
    """Two gateways with one Redis make one call for what is due on both, be it one value or a list, life after life."""
    replicas = [await watched(redis_url=redis.url) for _ in range(2)]
    orders = [",".join(f"{coin}-USDT" for coin in order) for order in (coins, reversed(coins))]
    asked = [(live, f"/tickers?symbols={order}&exchange=bybit") for live, order in zip(replicas, orders, strict=True)]
    await sandbox.set("bybit", latency_ms=latency, rate_limit=-1)
    for live in replicas:
        await reachable(live, clock)
    sandbox.clear_counts()
    before = tally()[0]
    for live, path in asked:
        await ask(live, path, OFTEN + 5)
    for life in (1, 2):
        clock.advance(DUE)
        await tally.reaches(success=before + 2 * len(coins) * life)
        for live, path in asked:
            assert set(await ask(live, path, 5)) == {HIT}
            assert births(live) == pytest.approx([clock.elapsed] * len(coins), abs=0.002), "Redis keeps ms"
    assert sandbox.count("bybit", "tickers") == 1 + 2


async def test_it_can_be_switched_off(watched: StartWatched, sandbox: Sandbox, clock: FakeClock, tally: Tally) -> None:
    """With REFRESH_AHEAD=false what is asked for often expires as everything does."""
    off, on = await watched(refresh_ahead="false"), await watched(("kraken",))
    await ask(off, PATH)
    await ask(on, "/ticker/BTC-USDT?exchange=kraken", 20)
    for life in (1, 2):  # two looks of the other: in between was one of this, if there were any
        clock.elapsed = life * DUE
        await tally.reaches(success=life)
    assert (sandbox.count("bybit", "tickers"), list(off.gateway.cache.memory.hot)) == (1, [KEY])
    assert await ask(off, PATH, 1) == [MISS]


async def test_few_refreshes_are_under_way_at_once(
    watched: StartWatched, sandbox: Sandbox, clock: FakeClock, tally: Tally
) -> None:
    """Of many that are due at most `MAX_REFRESHES` are under way, and the others follow as those end."""
    live, count = await watched(orderbook_ttl_seconds=TTL), 2 * MAX_REFRESHES + 3
    symbols = [market["symbol"] for market in live.gateway.markets.select("bybit", None, "USDT")][:count]
    for symbol in symbols:
        await ask(live, f"/orderbook/{symbol}?limit=5&exchange=bybit")
    assert len(live.gateway.cache.memory.hot) == count
    await sandbox.set("bybit", latency_ms=150, rate_limit=-1)
    clock.advance(DUE)
    assert await most_at_once(live, "bybit", lambda: tally() == (count, 0, 0)) == MAX_REFRESHES
    assert set(births(live)) == {DUE}


async def test_lists_are_bounded_alike(clock: FakeClock, tally: Tally) -> None:
    """The bound on what is under way counts calls: it holds in the middle of an exchange's lists too."""
    lists = MAX_REFRESHES + 2
    sandbox = Sandbox(now=clock.time, filler=lists * batch_size("binance"))
    await sandbox.start()
    await sandbox.set("binance", rate_limit=-1)
    async with serve(make_settings(sandbox, **only("binance")), clock, load_markets=True) as live:
        await eventually(lambda: live.gateway.markets.loaded_at)
        symbols = [market["symbol"] for market in live.gateway.markets.select("binance", None, "USDT")]
        await sandbox.set("binance", latency_ms=150, rate_limit=-1)
        for symbol in symbols[-lists * batch_size("binance") :]:
            hold(live, Key("binance", "ticker", symbol), age=DUE)
        ended = (lists * batch_size("binance"), 0, 0)
        assert await most_at_once(live, "binance", lambda: tally() == ended) == MAX_REFRESHES
    await sandbox.stop()


async def test_a_clear_ends_it(watched: StartWatched, sandbox: Sandbox, clock: FakeClock) -> None:
    """What was cleared is not refreshed any more, and has to be asked for often again."""
    live = await watched(trades_ttl_seconds=CANARY_TTL, admin_token="0123456789")
    await ask(live, PATH, 20)
    cleared = await live.client.post(f"{live.url}/admin/cache/clear", headers={"Authorization": "Bearer 0123456789"})
    assert cleared.json()["cleared"] == 1
    clock.elapsed = DUE
    await seen(live, clock)
    assert (sandbox.count("bybit", "tickers"), born(live, KEY)) == (1, None)
    assert await ask(live, PATH, 1) == [MISS]
    clock.elapsed = 2 * DUE
    await seen(live, clock)
    assert sandbox.count("bybit", "tickers") == 2, "nothing is inherited from before"


async def test_a_clear_is_not_undone_by_a_refresh(
    watched: StartWatched, sandbox: Sandbox, clock: FakeClock, tally: Tally
) -> None:
    """What a refresh brings that was under way at a clear is not kept."""
    live = await watched()
    await ask(live, PATH, 20)
    await sandbox.set("bybit", hang=True, rate_limit=-1)
    clock.elapsed = DUE
    await eventually(lambda: sandbox.count("bybit", "tickers") == 2)
    assert await live.gateway.cache.clear() == 1
    await sandbox.set("bybit", rate_limit=-1)
    await tally.reaches(success=1)
    assert (born(live, KEY), live.gateway.cache.memory.hot) == (None, {})


async def test_callers_have_hits_during_a_refresh(
    watched: StartWatched, sandbox: Sandbox, clock: FakeClock, tally: Tally
) -> None:
    """While a refresh is under way the old entry is served; past its TTL callers wait for that refresh."""
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


async def test_the_end_of_the_app_leaves_nothing(sandbox: Sandbox, clock: FakeClock) -> None:
    """The app that ends in the middle of refreshes leaves no task and no connection behind."""
    before = asyncio.all_tasks()
    async with serve(
        make_settings(sandbox, **only("bybit"), ticker_ttl_seconds=TTL, trades_ttl_seconds=TTL), clock
    ) as live:
        await eventually(lambda: len(live.gateway.markets.loaded_at) == len(live.gateway.manager.names))
        await ask(live, PATH)
        await ask(live, CANARY)
        sandbox.clear_counts()
        await sandbox.set("bybit", hang=True, rate_limit=-1)
        clock.advance(DUE)
        await eventually(lambda: sandbox.count("bybit") == 2)
    await eventually(lambda: asyncio.all_tasks() <= before)


async def test_who_stops_watching_stops_waiting(start: StartGateway, sandbox: Sandbox, clock: FakeClock) -> None:
    """When the refresher ends so does what it began; a load under way is nobody's, and fills the cache."""
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


async def test_memorys_own_limit_is_an_end_too(watched: StartWatched, sandbox: Sandbox, clock: FakeClock) -> None:
    """Where memory gives a value out for less than its TTL, and there is no Redis, it is refreshed before that."""
    live = await watched(ohlcv_ttl_seconds=60, cache_memory_ttl=30)
    path, key = "/ohlcv/BTC-USDT?exchange=bybit", Key("bybit", "ohlcv", "BTC/USDT", "1m:100:")
    found = await ask(live, path)
    for life in (1, 2, 3):
        clock.advance(24)
        await eventually(lambda life=life: born(live, key) == 24 * life)  # type: ignore[misc]
        found += await ask(live, path)
    assert (found.count(MISS), sandbox.count("bybit")) == (1, 4)


async def test_refreshes_leave_room_for_callers(watched: StartWatched, sandbox: Sandbox, clock: FakeClock) -> None:
    """However few loads are allowed at once, refreshes are a tenth of them and at least one: callers have the rest."""
    live = await watched(("bybit", "kraken"), orderbook_ttl_seconds=TTL, max_concurrent=2)
    for market in live.gateway.markets.select("bybit", None, "USDT")[:8]:
        hold(live, Key("bybit", "orderbook", market["symbol"], "5"))
    await sandbox.set("bybit", hang=True, rate_limit=-1)
    clock.advance(DUE)
    await eventually(lambda: live.gateway.manager["bybit"].in_flight == 1)
    assert await ask(live, "/ticker/BTC-USDT?exchange=kraken", 1) == [MISS]
    assert live.gateway.manager["bybit"].in_flight == 1
    await sandbox.reset()


async def test_who_is_sent_away_makes_nothing_hot(watched: StartWatched) -> None:
    """Requests without the right key, or over the limit, do not count: they could keep the budget busy."""
    live = await watched(api_keys="me:0123456789", client_rate_limit=1)
    assert (await live.get(PATH, headers={"X-API-Key": "0123456789"})).status_code == 200
    for headers, statuses in (({}, [401, 401, 401]), ({"X-API-Key": "0123456789"}, [429, 429, 429])):
        assert [(await live.get(PATH, headers=headers)).status_code for _ in range(OFTEN)] == statuses
    assert not live.gateway.cache.memory.hot


async def test_one_request_for_many_counts_once(watched: StartWatched) -> None:
    """A batch that has to be completed by the app counts once for each of its tickers, not once more for the look."""
    live = await watched()
    path = "/tickers?symbols=BTC-USDT,ETH-USDT&exchange=bybit"
    await ask(live, path, 1)
    live.gateway.cache.memory.pop(Key("bybit", "ticker", "ETH/USDT"), "cleared")
    await ask(live, path, 1)
    assert not live.gateway.cache.memory.hot
    await ask(live, path, 1)
    assert list(live.gateway.cache.memory.hot) == [KEY]


async def test_of_a_list_each_counts_for_itself(watched: StartWatched, tally: Tally) -> None:
    """One symbol that can no longer be had is one error; the others of its list are successes."""
    live = await watched(("kraken",))
    for coin in ("BTC", "ETH", "SOL", "XRP", "ADA", "LTC", "DOT", "NOPE"):
        hold(live, Key("kraken", "ticker", f"{coin}/USDT"), age=DUE)
    await eventually(lambda: sum(tally()) == 8)
    assert tally() == (7, 1, 0)


async def test_replicas_with_different_favourites_share_a_call(
    watched: StartWatched, sandbox: Sandbox, clock: FakeClock, redis: RedisServer
) -> None:
    """What is hot on one replica and in the list another one is just refreshing costs no second call."""
    one, other = replicas = [await watched(redis_url=redis.url, refresh_ahead=False) for _ in range(2)]
    for live in replicas:
        await reachable(live, clock)
    await ask(one, "/tickers?symbols=ADA-USDT,BTC-USDT&exchange=bybit")
    await ask(other, PATH)
    sandbox.clear_counts()
    await sandbox.set("bybit", latency_ms=200, rate_limit=-1)
    clock.advance(DUE)
    await RefreshAhead(one.gateway).look()
    await eventually(lambda: sandbox.count("bybit") == 1)
    await RefreshAhead(other.gateway).look()
    now = pytest.approx(clock.elapsed, abs=0.002)  # Redis keeps milliseconds
    await eventually(lambda: born(one, KEY) == now and born(other, KEY) == now)
    assert sandbox.count("bybit") == 1


async def test_what_is_under_way_counts_as_spent(watched: StartWatched, clock: FakeClock, tally: Tally) -> None:
    """Refreshes that come due at once do not together take what is left to callers."""
    live = await watched(("kraken",), kraken_budget="10/60", orderbook_ttl_seconds=TTL)
    for coin in ("BTC", "ETH", "SOL", "XRP", "ADA", "LTC", "DOT", "DOGE", "LINK"):
        hold(live, Key("kraken", "orderbook", f"{coin}/USDT", "5"))
    used = live.gateway.manager.limiter.used_ratio("kraken")
    clock.advance(DUE)
    await eventually(lambda: sum(tally()) == 9)
    assert used < live.gateway.manager.limiter.used_ratio("kraken") <= BUDGET_RATIO + 0.1
    assert await ask(live, "/trades/BTC-USDT?exchange=kraken", 1) == [MISS]


async def test_the_only_load_is_for_callers(watched: StartWatched, sandbox: Sandbox, clock: FakeClock) -> None:
    """Where one load is allowed at a time, nothing is refreshed ahead."""
    live = await watched(("bybit",), max_concurrent=1)
    hold(live, KEY, age=DUE)
    refresher = RefreshAhead(live.gateway)
    await refresher.look()
    assert (refresher._tasks, list(live.gateway.cache.memory.hot)) == (set(), [KEY])
