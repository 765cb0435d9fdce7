"""The fast path means what the app means, and does it without the app."""

import asyncio
import logging
import threading
from collections.abc import Iterator
from contextlib import AsyncExitStack
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prometheus_client import REGISTRY
from starlette.types import Receive, Scope, Send

from src.sandbox.server import Sandbox
from src.web.fast_path import MAX_BATCHES, TURNS, Slot, Table
from src.web.responses import Recipe, head
from tests.conftest import FakeClock, Live, StartGateway, eventually, make_settings, sample, serve

TICKER = "/ticker/BTC/USDT"
ORIGIN = "https://desk.example"
KEY = "a-long-enough-key"


class Counted:
    """Stands before the app, lets everything through, and counts it."""

    def __init__(self, live: Live) -> None:
        self.count = 0
        self._app = live.front.app
        live.front.app = self  # type: ignore[assignment]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.count += scope["type"] == "http"
        await self._app(scope, receive, send)


# ---- one meaning


class Pair:
    """Two gateways alike but for the fast path, with one clock and one sandbox, in a thread."""

    def __init__(self, **overrides: object) -> None:
        self.clock = FakeClock()
        self.tags: dict[str, str] = {}
        self.sent = 0
        self._overrides = overrides
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))
        self._thread.start()
        assert self._ready.wait(30)
        self.clients = [httpx.Client(base_url=live.url) for live in self._lives]

    async def _run(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        sandbox = Sandbox(now=self.clock.time)
        await sandbox.start()
        for name in sandbox.urls:
            await sandbox.set(name, rate_limit=-1)
        budgets = {f"{name}_budget": "1000000/5" for name in sandbox.urls}
        chosen = make_settings(sandbox, log_level="WARNING", **budgets, **self._overrides)
        async with AsyncExitStack() as stack:
            self._lives = [
                await stack.enter_async_context(serve(chosen, self.clock, shortcut=shortcut))
                for shortcut in (True, False)
            ]
            await eventually(lambda: all(len(live.gateway.markets.loaded_at) == 3 for live in self._lives))
            self.passed_on = Counted(self._lives[0])
            self._ready.set()
            await self._stop.wait()
        await sandbox.stop()

    def stop(self) -> None:
        for client in self.clients:
            client.close()
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()

    def ask_both(self, method: str, target: str, headers: list[tuple[str, str]]) -> list[Any]:
        """Send one request to each; returns what of the answers has to be the same."""
        tag = self.tags.get(target, '"none-yet"')
        headers = [(name, value.replace("TAG", tag)) for name, value in headers]
        told: list[Any] = []
        for client in self.clients:
            url = httpx.URL(client.base_url).copy_with(raw_path=target.encode())
            answer = client.request(method, url, headers=headers)
            fields = sorted(
                (name, value) for name, value in answer.headers.multi_items() if name not in ("date", "server")
            )
            ids = [value for name, value in fields if name == "x-request-id"]
            own = [value for name, value in headers if name == "X-Request-ID"]
            if ids != own[:1]:  # made here: only that there is a plain one can be compared
                assert len(ids) == 1
                assert ids[0].isalnum()
                fields = [(name, "made" if name == "x-request-id" else value) for name, value in fields]
            told.append((answer.status_code, fields, answer.content))
            self.tags[target] = answer.headers.get("etag", tag)
        self.sent += 1
        return told


SETTINGS: dict[str, dict[str, object]] = {
    "open": {},
    "keys and limits": {"api_keys": f"desk:{KEY}", "client_rate_limit": 25},
    "browsers": {"cors_origins": ORIGIN},
    "behind a proxy": {"client_rate_limit": 25, "trusted_proxies": "127.0.0.1"},
}


@pytest.fixture(scope="module", params=SETTINGS)
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    gateways = Pair(**SETTINGS[request.param])
    yield gateways
    gateways.stop()


paths = st.sampled_from([
    TICKER, "/ticker/btc-usdt", "/ticker/BTC%2FUSDT", "/ticker/XBT-USDT", "/ticker/BTCUSDT", "/ticker/BTC/USDT/",
    "/tickers", "/orderbook/BTC-USDT", "/ohlcv/ETH-USDT", "/trades/BTC-USDT", "/markets", "/health/live", "/nothing",
])  # fmt: skip
queries = st.sampled_from([
    "", "", "", "?", "?exchange=kraken", "?exchange=KRAKEN", "?exchange=mtgox", "?limit=5", "?limit=0", "?unknown=1",
    "?symbols=BTC-USDT,eth-usdt", "?symbols=BTC-USDT,ETH-USDT&exchange=all", "?symbols=BTC-USDT,NO-USDT", "?max_age=0",
    "?max_age=5", "?max_age=-1", "?timeframe=5m&limit=3", "?timeframe=5m&since=1700000000000&limit=3",
    "?limit=5&limit=6",
])  # fmt: skip
fields = st.sampled_from([
    ("If-None-Match", "TAG"), ("If-None-Match", "TAG"), ("If-None-Match", "W/TAG, \"other\""), ("If-None-Match", "*"),
    ("If-None-Match", '"other"'), ("X-Request-ID", "plain-1.2_3"), ("X-Request-ID", "not plain"), ("X-API-Key", KEY),
    ("X-API-Key", KEY), ("X-API-Key", KEY), ("X-API-Key", "wrong"), ("Origin", ORIGIN), ("Origin", "https://else.example"),
    ("X-Forwarded-For", "203.0.113.1"), ("X-Forwarded-For", "9.9.9.9, 203.0.113.1"), ("X-Forwarded-For", "unknown"),
    ("Accept-Encoding", "br"), ("Content-Length", "0"), ("Range", "bytes=0-1"), ("Cache-Control", "no-cache"),
])  # fmt: skip
requests = st.tuples(
    st.sampled_from(["GET"] * 8 + ["HEAD", "POST", "OPTIONS"]), paths, queries, st.lists(fields, max_size=3)
)
steps = st.lists(
    st.tuples(requests, st.integers(1, 4), st.sampled_from([0, 0, 0, 0.4, 1.99, 2, 14.9, 15, 40])), max_size=5
)


@given(steps)
@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
def test_every_request_is_answered_as_the_app_answers_it(pair: Pair, steps: list[Any]) -> None:
    """Whatever is asked, how often and when: status, header fields and body are those of the app alone."""
    for (method, path, query, headers), times, pause in steps:
        for _ in range(times):
            ours, the_apps = pair.ask_both(method, path + query, headers)
            assert ours == the_apps
        pair.clock.advance(pause)


@pytest.mark.parametrize("query", ["", "?exchange=kraken", "?symbols=BTC-USDT,ETH-USDT"])
def test_the_comparison_compares_something(pair: Pair, query: str) -> None:
    """The fast path does answer in the comparison above; with a key, a tag and an id of the client's own too."""
    pair.clock.advance(100)  # a new minute of the client's limit
    path = ("/tickers" if "symbols" in query else TICKER) + query
    headers = [("X-API-Key", KEY), ("X-Request-ID", "mine")]
    pair.ask_both("GET", path, headers)
    before = pair.passed_on.count
    for more in ([], [("If-None-Match", "TAG")], [("If-None-Match", "*")], [("Range", "bytes=0-1")]):
        ours, the_apps = pair.ask_both("GET", path, headers + more)
        assert ours == the_apps
        assert ours[0] == (304 if more and more[0][0] == "If-None-Match" else 200)
    assert pair.passed_on.count == before
    assert pair.passed_on.count < pair.sent


@pytest.mark.parametrize(("left", "told"), [(15 - 1e-9, 15), (14.99, 14), (0.5, 0), (-1 - 1e-9, -1)])
def test_what_arithmetic_is_off_is_no_second(left: float, told: int) -> None:
    """Both paths tell the same whole seconds, also when one comes to 15 and the other to a little less."""
    fields = dict(head("", 0, left, "hit_memory", private=False))
    assert fields[b"cache-status"] == b"virtuoso; hit; detail=memory; ttl=%d" % told


def counted(client: httpx.Client) -> dict[str, float]:
    """Read every figure a request shows in, but for how long it took."""
    client.get("/health/live")  # once this is answered, all before it are counted
    names = ("virtuoso_http_requests_total", "virtuoso_cache_requests", "virtuoso_cache_tier_operations", "served_age")
    found = {}
    for metric in REGISTRY.collect():
        for one in metric.samples:
            if one.labels.get("route") == "/health/live":
                continue
            if any(name in one.name for name in names) or one.name.endswith("http_request_duration_seconds_count"):
                found[f"{one.name}{sorted(one.labels.items())}"] = one.value
    return found


def test_every_hit_is_counted_as_the_app_counts_it(pair: Pair) -> None:
    """The same requests move the same metrics by the same amounts, with the fast path and without."""
    pair.clock.advance(100)
    moved = []
    targets = [TICKER, "/orderbook/BTC-USDT", "/tickers?symbols=BTC-USDT,ETH-USDT"]
    for client in pair.clients:
        for target in targets:
            client.get(target, headers={"X-API-Key": KEY})
        before = counted(client)
        for target in targets:
            for headers in ({}, {}, {"If-None-Match": "*"}):
                client.get(target, headers={"X-API-Key": KEY, **headers})
        after = counted(client)
        moved.append(
            {name: value - before.get(name, 0) for name, value in after.items() if value != before.get(name, 0)}
        )
    assert moved[0] == moved[1]
    assert sum(value for name, value in moved[0].items() if "http_requests_total" in name) == 9
    assert sum(value for name, value in moved[0].items() if "cache_requests" in name) == 12


# ---- what it answers, and what it leaves to the app


@pytest.fixture
async def live(start: StartGateway) -> Live:
    return await start()


@pytest.fixture
async def passed_on(live: Live) -> Counted:
    return Counted(live)


async def test_a_repeated_request_needs_the_app_once(live: Live, passed_on: Counted) -> None:
    """The app answers the first of many; each spelling of a symbol is a request of its own."""
    answers = [await live.get(TICKER) for _ in range(5)]
    assert passed_on.count == 1
    assert [answer.headers["cache-status"].split(";")[1].strip() for answer in answers] == ["fwd=miss"] + ["hit"] * 4
    assert {answer.text for answer in answers} == {answers[0].text}
    assert len({answer.headers["x-request-id"] for answer in answers}) == 5
    await live.get("/ticker/btc-usdt")
    assert passed_on.count == 2


async def test_it_ends_with_the_freshness(live: Live, passed_on: Counted, clock: FakeClock) -> None:
    """At exactly the TTL the app is asked again; until then the age goes up."""
    await live.get(TICKER)
    clock.advance(14.999)
    last = await live.get(TICKER)
    assert (last.headers["age"], last.headers["cache-control"]) == ("14", "max-age=0")
    assert passed_on.count == 1
    clock.advance(0.001)
    assert "fwd=miss" in (await live.get(TICKER)).headers["cache-status"]
    assert passed_on.count == 2
    assert "hit" in (await live.get(TICKER)).headers["cache-status"]
    assert passed_on.count == 2


async def test_memory_has_a_limit_of_its_own(start: StartGateway, clock: FakeClock) -> None:
    """Past CACHE_MEMORY_TTL the app is asked, as Redis may know something newer."""
    live = await start(cache_memory_ttl=5)
    passed_on = Counted(live)
    await live.get(TICKER)
    clock.advance(4.999)
    await live.get(TICKER)
    assert passed_on.count == 1
    clock.advance(0.001)
    await live.get(TICKER)
    assert passed_on.count == 2


async def test_it_serves_the_newest_value(live: Live, passed_on: Counted, clock: FakeClock) -> None:
    """A value somebody else had fetched anew is the one that is served; one that was cleared is not."""
    await live.get(TICKER)
    clock.advance(5)
    newer = await live.get(f"{TICKER}?max_age=0")
    again = await live.get(TICKER)
    assert (again.text, again.headers["age"]) == (newer.text, "0")
    assert passed_on.count == 2
    await live.gateway.cache.clear()
    assert "fwd=miss" in (await live.get(TICKER)).headers["cache-status"]


async def test_the_order_of_exchanges_is_kept(start: StartGateway, clock: FakeClock, sandbox: Sandbox) -> None:
    """While the preferred exchange is out the next one's value is served fast, and no longer than that."""
    live = await start(cb_threshold=1, cb_reset_seconds=8)
    passed_on = Counted(live)
    await sandbox.set("bybit", status=500, rate_limit=-1)
    assert (await live.get(TICKER)).json()["exchange"] == "binance"
    clock.advance(7.9)
    assert (await live.get(TICKER)).json()["exchange"] == "binance"
    assert passed_on.count == 1
    await sandbox.set("bybit", rate_limit=-1)
    clock.advance(0.2)
    assert (await live.get(TICKER)).json()["exchange"] == "bybit"
    assert passed_on.count == 2


async def test_a_new_market_list_is_taken_notice_of(live: Live, passed_on: Counted) -> None:
    """What an older list of markets led to is forgotten: an exchange may have begun or ceased to list the symbol."""
    await live.get(TICKER)
    markets = live.gateway.markets
    listed = [
        market for market in live.gateway.manager["bybit"].client.markets.values() if market["symbol"] != "BTC/USDT"
    ]
    markets.replace("bybit", listed, markets.loaded_at["bybit"])
    assert (await live.get(TICKER)).json()["exchange"] == "binance"
    assert passed_on.count == 2
    await live.get(TICKER)
    assert passed_on.count == 2


async def test_what_an_older_market_list_led_to_is_not_learned(live: Live, sandbox: Sandbox) -> None:
    """A list that comes while a request is under way may put another exchange first: the next request finds out."""
    passed_on, markets = Counted(live), live.gateway.markets
    listed = list(live.gateway.manager["bybit"].client.markets.values())
    others = [market for market in listed if market["symbol"] != "BTC/USDT"]
    markets.replace("bybit", others, markets.loaded_at["bybit"])
    await sandbox.set("binance", latency_ms=200, rate_limit=-1)
    first = asyncio.create_task(live.get(TICKER))
    await eventually(lambda: sandbox.count("binance"))
    markets.replace("bybit", listed, markets.loaded_at["bybit"])
    assert (await first).json()["exchange"] == "binance"
    assert (await live.get(TICKER)).json()["exchange"] == "bybit"
    assert passed_on.count == 2


async def test_a_batch_is_joined_anew_when_a_part_changes(live: Live, passed_on: Counted, clock: FakeClock) -> None:
    """A batch is the same bytes until one of its tickers is another, and as old as its oldest one."""
    path = "/tickers?symbols=BTC-USDT,ETH-USDT,btc/usdt"
    first, clock_moved = await live.get(path), 5
    clock.advance(clock_moved)
    second = await live.get(path)
    assert (second.text, second.headers["etag"], second.headers["age"]) == (first.text, first.headers["etag"], "5")
    await live.get("/ticker/ETH-USDT?max_age=0")
    third = await live.get(path)
    assert (third.headers["age"], third.headers["etag"] == first.headers["etag"]) == ("5", False)
    assert passed_on.count == 2
    clock.advance(10)
    await live.get(path)
    assert passed_on.count == 3


async def test_a_batch_with_an_error_is_left_to_the_app(live: Live, passed_on: Counted) -> None:
    """An error in it may be gone the next time."""
    for _ in range(3):
        await live.get("/tickers?symbols=BTC-USDT,NOPE-USDT")
    assert passed_on.count == 3


@pytest.mark.parametrize(
    ("method", "path", "headers"),
    [
        ("GET", f"{TICKER}?max_age=100", {}),
        ("HEAD", TICKER, {}),
        ("GET", TICKER, {"Content-Length": "0"}),
        ("GET", TICKER, {"Expect": "100-continue"}),
        ("GET", "/health/live", {}),
        ("GET", "/ticker/NOPE-USDT", {}),
    ],
)
async def test_everything_else_goes_through(
    live: Live, passed_on: Counted, method: str, path: str, headers: dict[str, str]
) -> None:
    """What is not a plain repetition of a data request reaches the app each time."""
    await live.get(TICKER)
    for _ in range(3):
        await live.client.request(method, live.url + path, headers=headers)
    assert passed_on.count == 4


async def test_what_is_wrong_with_a_request_is_for_the_app_to_say(live: Live, passed_on: Counted) -> None:
    """No Host, two of a field, too long headers: the path that was answered before does not excuse them."""
    await live.get(TICKER)
    line = f"GET {TICKER} HTTP/1.1\r\nConnection: close\r\n".encode()
    assert b" 400 " in (await live.raw(line + b"\r\n")).split(b"\r\n")[0]
    assert b" 431 " in (await live.raw(line + b"Host: a\r\nX: " + b"x" * 40000 + b"\r\n\r\n")).split(b"\r\n")[0]
    assert (
        b" 200 " in (await live.raw(line + b"Host: a\r\nX-Request-ID: a\r\nX-Request-ID: b\r\n\r\n")).split(b"\r\n")[0]
    )
    assert passed_on.count == 4


async def test_at_debug_level_every_request_is_logged(start: StartGateway, caplog: pytest.LogCaptureFixture) -> None:
    """The app writes the line of each request, so it has to see them all."""
    with caplog.at_level(logging.DEBUG):
        live = await start()
        for _ in range(3):
            await live.get(TICKER)
    assert len([record for record in caplog.records if record.message == "request"]) == 3


async def test_no_request_stays_in_progress(live: Live) -> None:
    """The gauge of requests under way is back at zero after hits and misses."""
    for _ in range(3):
        await live.get(TICKER)
    assert sample("http_requests_in_progress") == 0


# ---- bounds


def test_a_flood_does_not_drive_out_what_is_repeated() -> None:
    """However many requests come that nobody repeats, the table keeps its size and those that are repeated."""
    table, hot = Table(50), [(b"/ticker/%d" % number, b"") for number in range(20)]
    recipe = Recipe("/ticker/{symbol}", ((),))
    for raw in hot:
        table.add(raw, Slot(recipe))
    for number in range(5000):
        table.add((b"/ticker/BTC-USDT", b"x=%d" % number), Slot(recipe))
        for raw in hot:
            table[raw].used = True
    assert len(table) == 50
    assert all(raw in table for raw in hot)


def test_where_all_is_in_use_a_new_one_waits() -> None:
    """A full table of requests in use turns a new one away after a few looks, and takes it when one is used no more."""
    table, recipe = Table(TURNS + 2), Recipe("/ticker/{symbol}", ((),))
    for number in range(TURNS + 2):
        table.add((b"%d" % number, b""), Slot(recipe))
        table[b"%d" % number, b""].used = True
    table.add((b"new", b""), Slot(recipe))
    assert (len(table), (b"new", b"") in table) == (TURNS + 2, False)
    for _ in range(3):
        table.add((b"new", b""), Slot(recipe))
    assert (len(table), (b"new", b"") in table) == (TURNS + 2, True)


async def test_a_flood_over_http_leaves_hot_symbols_fast(start: StartGateway) -> None:
    """Distinct queries by the hundred take nothing from a hot symbol: not its place in the table, nor in memory."""
    live = await start(cache_memory_size=20)
    passed_on = Counted(live)
    await live.get(TICKER)
    for number in range(300):
        await live.get(f"/orderbook/ETH-USDT?limit={number % 200 + 1}&x={number}")
        assert "hit" in (await live.get(TICKER)).headers["cache-status"]
    assert passed_on.count == 301
    assert len(live.front._single) <= 40
    assert len(live.gateway.cache) == 20


async def test_long_requests_and_batches_have_bounds_of_their_own(live: Live, passed_on: Counted) -> None:
    """A request with a long tail is not remembered; batches are, a bounded number of them."""
    for _ in range(2):
        await live.get(f"{TICKER}?x={'x' * 300}")
        await live.get(f"/tickers?symbols=BTC-USDT&x={'x' * 4096}")
    assert passed_on.count == 4
    for number in range(MAX_BATCHES + 20):
        await live.get(f"/tickers?symbols=BTC-USDT&x={number}")
    assert (len(live.front._batches), len(live.front._single)) == (MAX_BATCHES, 0)
