"""The fast path answers like the app, without calling it."""

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

from src.core import metrics
from src.sandbox.server import Sandbox
from src.web.fast_path import MAX_BATCHES, MAX_SECOND_CHANCES, RequestTable, Target
from src.web.responses import Recipe, freshness
from tests.conftest import FakeClock, Live, StartGateway, eventually, make_settings, sample, serve

TICKER = "/ticker/BTC/USDT"
ORIGIN = "https://desk.example"
KEY = "a-long-enough-key"


class Counted:
    """Stands in front of the app, passes everything on, and counts it."""

    def __init__(self, live: Live) -> None:
        self.count = 0
        self._app = live.front.app
        live.front.app = self  # type: ignore[assignment]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.count += scope["type"] == "http"
        await self._app(scope, receive, send)


# ---- equal answers


class Trio:
    """Three gateways, with one clock and sandbox, in a thread.

    The first has all paths, the second only the fast path and the app, and the third only the app.
    """

    def __init__(self, **overrides: object) -> None:
        self.clock = FakeClock()
        self.tags: dict[str, str] = {}
        self.sent = 0
        self._overrides = overrides
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))
        self._thread.start()
        assert self._ready.wait(120)
        self.clients = [httpx.Client(base_url=live.url) for live in self._lives]

    async def _run(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        sandbox = Sandbox(now=self.clock.time)
        await sandbox.start()
        for name in sandbox.urls:
            await sandbox.set(name, rate_limit=-1)
        budgets = {f"{name}_budget": "1000000/5" for name in sandbox.urls}
        # Streams would push values to the two gateways at different times.
        fixed: dict[str, object] = {"log_level": "WARNING", "streaming": False, **budgets}
        chosen = make_settings(sandbox, **fixed, **self._overrides)
        async with AsyncExitStack() as stack:
            self._lives = [
                await stack.enter_async_context(
                    serve(chosen, self.clock, wire=wire, shortcut=shortcut)
                )
                for wire, shortcut in ((True, True), (False, True), (False, False))
            ]
            await eventually(
                lambda: all(len(live.gateway.markets.loaded_at) == 3 for live in self._lives)
            )
            self.passed_on = Counted(self._lives[0])
            self._ready.set()
            await self._stop.wait()
        await sandbox.stop()

    def stop(self) -> None:
        for client in self.clients:
            client.close()
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()

    def ask_all(self, method: str, target: str, headers: list[tuple[str, str]]) -> list[Any]:
        """Send one request to each gateway; return the parts of the answers that must be equal."""
        tag = self.tags.get(target, '"none-yet"')
        headers = [(name, value.replace("TAG", tag)) for name, value in headers]
        compared: list[Any] = []
        for client in self.clients:
            url = httpx.URL(client.base_url).copy_with(raw_path=target.encode())
            answer = client.request(method, url, headers=headers)
            fields = sorted(
                (name, value)
                for name, value in answer.headers.multi_items()
                if name not in ("date", "server")
            )
            ids = [value for name, value in fields if name == "x-request-id"]
            sent_ids = [value for name, value in headers if name == "X-Request-ID"]
            if ids != sent_ids[:1]:  # a new id: only its form can be compared
                assert len(ids) == 1
                assert ids[0].isalnum()
                fields = [
                    (name, "made" if name == "x-request-id" else value) for name, value in fields
                ]
            compared.append((answer.status_code, fields, answer.content))
            self.tags[target] = answer.headers.get("etag", tag)
        self.sent += 1
        return compared


SETTINGS: dict[str, dict[str, object]] = {
    "open": {},
    "keys and limits": {"api_keys": f"desk:{KEY}", "client_rate_limit": 25},
    "browsers": {"cors_origins": ORIGIN},
    "behind a proxy": {"client_rate_limit": 25, "trusted_proxies": "127.0.0.1"},
}


@pytest.fixture(scope="module", params=SETTINGS)
def trio(request: pytest.FixtureRequest) -> Iterator[Trio]:
    gateways = Trio(**SETTINGS[request.param])
    yield gateways
    gateways.stop()


paths = st.sampled_from(
    [
        TICKER,
        "/ticker/btc-usdt",
        "/ticker/BTC%2FUSDT",
        "/ticker/XBT-USDT",
        "/ticker/BTCUSDT",
        "/ticker/BTC/USDT/",
        "/tickers",
        "/orderbook/BTC-USDT",
        "/ohlcv/ETH-USDT",
        "/trades/BTC-USDT",
        "/markets",
        "/health/live",
        "/nothing",
    ]
)
queries = st.sampled_from(
    [
        "",
        "",
        "",
        "?",
        "?exchange=kraken",
        "?exchange=KRAKEN",
        "?exchange=mtgox",
        "?limit=5",
        "?limit=0",
        "?unknown=1",
        "?symbols=BTC-USDT,eth-usdt",
        "?symbols=BTC-USDT,ETH-USDT&exchange=all",
        "?symbols=BTC-USDT,NO-USDT",
        "?max_age=0",
        "?max_age=5",
        "?max_age=-1",
        "?timeframe=5m&limit=3",
        "?timeframe=5m&since=1700000000000&limit=3",
        "?limit=5&limit=6",
    ]
)
fields = st.sampled_from(
    [
        ("If-None-Match", "TAG"),
        ("If-None-Match", "TAG"),
        ("If-None-Match", 'W/TAG, "other"'),
        ("If-None-Match", "*"),
        ("If-None-Match", '"other"'),
        ("X-Request-ID", "plain-1.2_3"),
        ("X-Request-ID", "not plain"),
        ("X-API-Key", KEY),
        ("X-API-Key", KEY),
        ("X-API-Key", KEY),
        ("X-API-Key", "wrong"),
        ("Origin", ORIGIN),
        ("Origin", "https://else.example"),
        ("X-Forwarded-For", "203.0.113.1"),
        ("X-Forwarded-For", "9.9.9.9, 203.0.113.1"),
        ("X-Forwarded-For", "unknown"),
        ("Accept-Encoding", "br"),
        ("Content-Length", "0"),
        ("Range", "bytes=0-1"),
        ("Cache-Control", "no-cache"),
    ]
)
requests = st.tuples(
    st.sampled_from(["GET"] * 8 + ["HEAD", "POST", "OPTIONS"]),
    paths,
    queries,
    st.lists(fields, max_size=3),
)
steps = st.lists(
    st.tuples(requests, st.integers(1, 4), st.sampled_from([0, 0, 0, 0.4, 1.99, 2, 14.9, 15, 40])),
    max_size=5,
)


@pytest.mark.parametrize("examples", [10, pytest.param(100, marks=pytest.mark.full)])
def test_every_request_is_answered_like_the_app_does(trio: Trio, examples: int) -> None:
    """Status, header fields and body equal those of the app alone, for any sequence of requests."""

    @given(steps)
    @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck))
    def compare(steps: list[Any]) -> None:
        for (method, path, query, headers), times, pause in steps:
            for _ in range(times):
                by_wire, by_fast_path, expected = trio.ask_all(method, path + query, headers)
                assert by_wire == expected
                assert by_fast_path == expected
            trio.clock.advance(pause)

    compare()


@pytest.mark.parametrize("query", ["", "?exchange=kraken", "?symbols=BTC-USDT,ETH-USDT"])
def test_comparison_uses_the_fast_path(trio: Trio, query: str) -> None:
    """The fast path does answer in the comparison above; also with key, tag and request id."""
    trio.clock.advance(100)  # a new window of the client's limit
    path = ("/tickers" if "symbols" in query else TICKER) + query
    headers = [("X-API-Key", KEY), ("X-Request-ID", "mine")]
    trio.ask_all("GET", path, headers)
    before = trio.passed_on.count
    for more in (
        [],
        [("If-None-Match", "TAG")],
        [("If-None-Match", "*")],
        [("Range", "bytes=0-1")],
    ):
        answers = trio.ask_all("GET", path, headers + more)
        assert answers == [answers[0]] * 3
        assert answers[0][0] == (304 if more and more[0][0] == "If-None-Match" else 200)
    assert trio.passed_on.count == before
    assert trio.passed_on.count < trio.sent


@pytest.mark.parametrize(
    ("left", "shown"), [(15 - 1e-9, 15), (14.99, 14), (0.5, 0), (-1 - 1e-9, -1)]
)
def test_float_errors_do_not_cost_a_second(left: float, shown: int) -> None:
    """Both paths report the same whole seconds if one computes 15 and the other slightly less."""
    fields = dict(freshness("", 0, left, "hit_memory", private=False))
    assert fields[b"cache-status"] == b"virtuoso; hit; detail=memory; ttl=%d" % shown


def counted(client: httpx.Client) -> dict[str, float]:
    """Read every metric that a request changes, except durations."""
    client.get("/health/live")  # when this is answered, all earlier requests are counted
    names = (
        "virtuoso_http_requests_total",
        "virtuoso_cache_requests",
        "virtuoso_cache_tier_operations",
        "served_age",
    )
    values = {}
    metrics.flush()
    for metric in REGISTRY.collect():
        for measurement in metric.samples:
            if measurement.labels.get("route") == "/health/live":
                continue
            if any(name in measurement.name for name in names) or measurement.name.endswith(
                "http_request_duration_seconds_count"
            ):
                values[f"{measurement.name}{sorted(measurement.labels.items())}"] = (
                    measurement.value
                )
    return values


def test_hits_are_counted_like_the_app_counts_them(trio: Trio) -> None:
    """The same requests change the same metrics by the same amounts, with and without fast path."""
    trio.clock.advance(100)
    moved = []
    targets = [TICKER, "/orderbook/BTC-USDT", "/tickers?symbols=BTC-USDT,ETH-USDT"]
    for client in trio.clients:
        for target in targets:
            client.get(target, headers={"X-API-Key": KEY})
        before = counted(client)
        for target in targets:
            for headers in ({}, {}, {"If-None-Match": "*"}):
                client.get(target, headers={"X-API-Key": KEY, **headers})
        after = counted(client)
        moved.append(
            {
                name: value - before.get(name, 0)
                for name, value in after.items()
                if value != before.get(name, 0)
            }
        )
    assert moved[0] == moved[1] == moved[2]
    assert sum(value for name, value in moved[0].items() if "http_requests_total" in name) == 9
    assert sum(value for name, value in moved[0].items() if "cache_requests" in name) == 12


# ---- requests of the fast path and of the app


@pytest.fixture
async def live(start: StartGateway) -> Live:
    return await start()


@pytest.fixture
async def passed_on(live: Live) -> Counted:
    return Counted(live)


async def test_repeated_request_calls_the_app_once(live: Live, passed_on: Counted) -> None:
    """The app answers the first request; each spelling of a symbol is a separate request."""
    answers = [await live.get(TICKER) for _ in range(5)]
    assert passed_on.count == 1
    assert [answer.headers["cache-status"].split(";")[1].strip() for answer in answers] == [
        "fwd=miss"
    ] + ["hit"] * 4
    assert {answer.text for answer in answers} == {answers[0].text}
    assert len({answer.headers["x-request-id"] for answer in answers}) == 5
    await live.get("/ticker/btc-usdt")
    assert passed_on.count == 2


async def test_fast_path_ends_with_freshness(
    live: Live, passed_on: Counted, clock: FakeClock
) -> None:
    """At exactly the TTL the app is called again; until then the age increases."""
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


async def test_fast_path_respects_the_memory_ttl(start: StartGateway, clock: FakeClock) -> None:
    """After CACHE_MEMORY_TTL the app is called, as Redis may have a newer value."""
    live = await start(cache_memory_ttl=5)
    passed_on = Counted(live)
    await live.get(TICKER)
    clock.advance(4.999)
    await live.get(TICKER)
    assert passed_on.count == 1
    clock.advance(0.001)
    await live.get(TICKER)
    assert passed_on.count == 2


async def test_newest_value_is_served(live: Live, passed_on: Counted, clock: FakeClock) -> None:
    """A value that another request fetched is served; a cleared one is not."""
    await live.get(TICKER)
    clock.advance(5)
    newer = await live.get(f"{TICKER}?max_age=0")
    again = await live.get(TICKER)
    assert (again.text, again.headers["age"]) == (newer.text, "0")
    assert passed_on.count == 2
    await live.gateway.cache.clear()
    assert "fwd=miss" in (await live.get(TICKER)).headers["cache-status"]


async def test_order_of_exchanges_is_kept(
    start: StartGateway, clock: FakeClock, sandbox: Sandbox
) -> None:
    """While the preferred exchange is down, the next one's value is served, but not longer."""
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


async def test_new_market_list_invalidates_recipes(live: Live, passed_on: Counted) -> None:
    """Recipes of an older market list are forgotten: exchanges may list other symbols now."""
    await live.get(TICKER)
    markets = live.gateway.markets
    listed = [
        market
        for market in live.gateway.manager["bybit"].client.markets.values()
        if market["symbol"] != "BTC/USDT"
    ]
    markets.replace("bybit", listed, markets.loaded_at["bybit"])
    assert (await live.get(TICKER)).json()["exchange"] == "binance"
    assert passed_on.count == 2
    await live.get(TICKER)
    assert passed_on.count == 2


async def test_recipe_of_a_replaced_market_list_is_not_kept(live: Live, sandbox: Sandbox) -> None:
    """A list that arrives during a request may put another exchange first."""
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


async def test_batch_is_joined_again_when_a_part_changes(
    live: Live, passed_on: Counted, clock: FakeClock
) -> None:
    """A batch keeps its bytes until one ticker changes, and is as old as its oldest ticker."""
    path = "/tickers?symbols=BTC-USDT,ETH-USDT,btc/usdt"
    first, clock_moved = await live.get(path), 5
    clock.advance(clock_moved)
    second = await live.get(path)
    assert (second.text, second.headers["etag"], second.headers["age"]) == (
        first.text,
        first.headers["etag"],
        "5",
    )
    await live.get("/ticker/ETH-USDT?max_age=0")
    third = await live.get(path)
    assert (third.headers["age"], third.headers["etag"] == first.headers["etag"]) == ("5", False)
    assert passed_on.count == 2
    clock.advance(10)
    await live.get(path)
    assert passed_on.count == 3


async def test_batch_with_an_error_goes_to_the_app(live: Live, passed_on: Counted) -> None:
    """The error may be gone the next time."""
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
async def test_other_requests_go_to_the_app(
    live: Live, passed_on: Counted, method: str, path: str, headers: dict[str, str]
) -> None:
    """Everything but an exact repetition of a data request reaches the app each time."""
    await live.get(TICKER)
    for _ in range(3):
        await live.client.request(method, live.url + path, headers=headers)
    assert passed_on.count == 4


async def test_invalid_repetitions_go_to_the_app(live: Live, passed_on: Counted) -> None:
    """No Host, repeated fields or long headers: a known path does not excuse them."""
    await live.get(TICKER)
    line = f"GET {TICKER} HTTP/1.1\r\nConnection: close\r\n".encode()
    assert b" 400 " in (await live.raw(line + b"\r\n")).split(b"\r\n")[0]
    assert (
        b" 431 "
        in (await live.raw(line + b"Host: a\r\nX: " + b"x" * 40000 + b"\r\n\r\n")).split(b"\r\n")[0]
    )
    assert (
        b" 200 "
        in (await live.raw(line + b"Host: a\r\nX-Request-ID: a\r\nX-Request-ID: b\r\n\r\n")).split(
            b"\r\n"
        )[0]
    )
    assert passed_on.count == 4


async def test_requests_are_logged_at_debug_level(
    start: StartGateway, caplog: pytest.LogCaptureFixture
) -> None:
    """Only the app logs requests, so it must see all of them."""
    with caplog.at_level(logging.DEBUG):
        live = await start()
        for _ in range(3):
            await live.get(TICKER)
    assert len([record for record in caplog.records if record.message == "request"]) == 3


async def test_no_request_stays_in_progress(live: Live) -> None:
    """The gauge of requests in progress is 0 after hits and misses."""
    for _ in range(3):
        await live.get(TICKER)
    assert sample("http_requests_in_progress") == 0


# ---- limits


def test_flood_does_not_evict_repeated_requests() -> None:
    """The table keeps its size, and the requests that are repeated."""
    table: RequestTable[Target, Recipe] = RequestTable(50)
    hot = [(b"/ticker/%d" % number, b"") for number in range(20)]
    for raw in hot:
        table.add(raw, Recipe("/ticker/{symbol}", ((),)))
    for number in range(5000):
        table.add((b"/ticker/BTC-USDT", b"x=%d" % number), Recipe("/ticker/{symbol}", ((),)))
        for raw in hot:
            table[raw].was_used = True
    assert len(table) == 50
    assert all(raw in table for raw in hot)


def test_full_table_refuses_new_requests() -> None:
    """A full table of used requests refuses a new one, and takes it when another is unused."""
    table: RequestTable[Target, Recipe] = RequestTable(MAX_SECOND_CHANCES + 2)
    for number in range(MAX_SECOND_CHANCES + 2):
        table.add((b"%d" % number, b""), Recipe("/ticker/{symbol}", ((),)))
        table[b"%d" % number, b""].was_used = True
    table.add((b"new", b""), Recipe("/ticker/{symbol}", ((),)))
    assert (len(table), (b"new", b"") in table) == (MAX_SECOND_CHANCES + 2, False)
    for _ in range(3):
        table.add((b"new", b""), Recipe("/ticker/{symbol}", ((),)))
    assert (len(table), (b"new", b"") in table) == (MAX_SECOND_CHANCES + 2, True)


async def test_flood_over_http_keeps_hot_symbols_fast(start: StartGateway) -> None:
    """Hundreds of distinct queries evict a hot symbol neither from the table nor from memory."""
    live = await start(cache_memory_size=20)
    passed_on = Counted(live)
    await live.get(TICKER)
    symbols = [market["symbol"] for market in live.gateway.markets.select("bybit", None, "USDT")]
    for number in range(300):
        await live.get(f"/orderbook/{symbols[number % len(symbols)]}?limit=5&x={number}")
        assert "hit" in (await live.get(TICKER)).headers["cache-status"]
    assert passed_on.count == 301
    assert len(live.front._singles) <= 40
    assert len(live.gateway.cache.memory) == 20


async def test_long_requests_and_batches_have_separate_limits(
    live: Live, passed_on: Counted
) -> None:
    """A long request is not remembered; a limited number of batches is."""
    for _ in range(2):
        await live.get(f"{TICKER}?x={'x' * 300}")
        await live.get(f"/tickers?symbols=BTC-USDT&x={'x' * 4096}")
    assert passed_on.count == 4
    for number in range(MAX_BATCHES + 20):
        await live.get(f"/tickers?symbols=BTC-USDT&x={number}")
    assert (len(live.front._batches), len(live.front._singles)) == (MAX_BATCHES, 0)
