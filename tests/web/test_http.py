"""The HTTP API: symbols, fallback, max_age, batches, coalescing, load, health and errors."""

import asyncio
from collections import Counter
from typing import Any

import httpx
import orjson
import pytest

from src import gateway
from src.core.clock import SystemClock
from src.sandbox.server import Sandbox
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


async def request_together(live: Live, sandbox: Sandbox, paths: list[str]) -> list[httpx.Response]:
    """Request all paths at the same time: bybit answers only when every request has arrived."""
    await sandbox.set("bybit", hang=True, rate_limit=-1)
    waiting = [asyncio.create_task(live.get(path)) for path in paths]
    await eventually(lambda: sample("http_requests_in_progress") == len(paths))
    await sandbox.set("bybit", rate_limit=-1)
    return await asyncio.gather(*waiting)


@pytest.mark.parametrize(
    "path", ["BTC/USDT", "BTC-USDT", "BTC%2FUSDT", "btc/usdt", "btc-usdt", "Btc%2fUsdt"]
)
async def test_all_usual_spellings_of_a_symbol_are_accepted(
    start: StartGateway, sandbox: Sandbox, path: str
) -> None:
    """Slash, dash, encoded slash and any case name one symbol; the answer names it canonically."""
    live = await start()
    first = (await live.get("/ticker/BTC/USDT")).json()
    again = await live.get(f"/ticker/{path}")
    assert again.json() == first
    assert again.json()["symbol"] == "BTC/USDT"
    assert sandbox.count("bybit", "tickers") == 1


async def test_ticker_has_the_unified_fields(start: StartGateway, clock: FakeClock) -> None:
    """A ticker has ccxt's unified fields without `info`, plus price, exchange and fetched_at."""
    live = await start()
    bybit, binance = [
        (await live.get(f"/ticker/BTC/USDT?exchange={name}")).json()
        for name in ("bybit", "binance")
    ]
    assert bybit["price"] == bybit["last"] > 0
    assert bybit["fetched_at"] == int(clock.time() * 1000)
    assert "info" not in bybit
    assert "timestamp" not in bybit
    assert "datetime" not in bybit
    assert binance["timestamp"] == pytest.approx(clock.time() * 1000, abs=10)
    assert {"bid", "ask", "high", "low", "open", "baseVolume", "quoteVolume", "percentage"} <= set(
        bybit
    )
    assert bybit["stale"] is False


async def test_first_exchange_that_lists_a_symbol_answers(start: StartGateway) -> None:
    """Without `exchange`, the order of preference decides among those that list the symbol."""
    live = await start(exchange_order="kraken,binance,bybit")
    assert (await live.get("/ticker/BTC/USDT")).json()["exchange"] == "kraken"
    assert (await live.get("/ticker/BTC/USD")).json()["exchange"] == "kraken"
    assert (await live.get("/ticker/TON/USDT")).json()["exchange"] == "binance"


async def test_failed_exchange_falls_back_to_the_next(
    start: StartGateway, sandbox: Sandbox
) -> None:
    """The client gets a fresh price from the next exchange, within the same request."""
    live = await start()
    await sandbox.set("bybit", status=500, rate_limit=-1)
    answer = await live.get("/ticker/BTC/USDT")
    assert (answer.status_code, answer.json()["exchange"], answer.json()["stale"]) == (
        200,
        "binance",
        False,
    )


async def test_requested_exchange_has_no_fallback(start: StartGateway, sandbox: Sandbox) -> None:
    """A request for one exchange gets its price or its error, never another exchange's price."""
    live = await start()
    await sandbox.set("bybit", status=500, rate_limit=-1)
    answer = await live.get("/ticker/BTC/USDT?exchange=BYBIT")
    assert (answer.status_code, answer.json()["exchange"]) == (502, "bybit")


async def test_open_breaker_is_skipped_without_a_call(
    start: StartGateway, sandbox: Sandbox, clock: FakeClock
) -> None:
    """After CB_THRESHOLD failures the exchange is not called; the next one's values are hits."""
    live = await start(cb_threshold=2)
    await sandbox.set("bybit", status=500, rate_limit=-1)
    for base in ("BTC", "ETH", "SOL", "XRP"):
        assert (await live.get(f"/ticker/{base}/USDT")).json()["exchange"] == "binance"
    assert sandbox.count("bybit", "tickers") == 2
    state = (await live.get("/exchanges")).json()["bybit"]["breaker"]
    assert (state["state"], state["cause"]) == ("open", "unavailable")
    assert state["retry_at"] == pytest.approx((clock.time() + 60) * 1000, abs=1000)
    pinned = await live.get("/ticker/BTC/USDT?exchange=bybit")
    assert (pinned.status_code, pinned.json()["code"], pinned.headers["retry-after"]) == (
        503,
        "circuit_open",
        "60",
    )
    assert (
        (await live.get("/ticker/BTC/USDT"))
        .headers["cache-status"]
        .startswith("virtuoso; hit; detail=memory")
    )


async def test_breaker_state_changes_without_traffic(
    start: StartGateway, sandbox: Sandbox, clock: FakeClock
) -> None:
    """/exchanges, /health and /metrics show half-open after the reset time, without a call."""
    live = await start(cb_threshold=1)
    await sandbox.set("kraken", status=500, rate_limit=-1)
    await live.get("/ticker/BTC/USDT?exchange=kraken")
    assert (
        'virtuoso_circuit_state{exchange="kraken",state="open"} 1.0'
        in (await live.get("/metrics")).text
    )
    clock.advance(60)
    sandbox.clear_counts()
    assert (await live.get("/exchanges")).json()["kraken"]["breaker"]["state"] == "half_open"
    assert (await live.get("/health")).json()["exchanges"]["kraken"] == "half_open"
    assert (
        'virtuoso_circuit_state{exchange="kraken",state="half_open"} 1.0'
        in (await live.get("/metrics")).text
    )
    assert sandbox.count("kraken") == 0
    await sandbox.set("kraken", rate_limit=-1)
    assert (await live.get("/ticker/BTC/USDT?exchange=kraken")).status_code == 200
    assert (
        'virtuoso_circuit_state{exchange="kraken",state="closed"} 1.0'
        in (await live.get("/metrics")).text
    )


async def test_half_open_breaker_admits_one_probe(
    start: StartGateway, sandbox: Sandbox, clock: FakeClock
) -> None:
    """Of 40 symbols requested at once, one probes the exchange; the rest get a 503."""
    live = await start(cb_threshold=1)
    await sandbox.set("bybit", status=500, rate_limit=-1)
    await live.get("/ticker/BTC/USDT?exchange=bybit")
    await sandbox.set("bybit", hang=True, rate_limit=-1)
    clock.advance(60)
    sandbox.clear_counts()
    symbols = [
        row["symbol"] for row in (await live.get("/markets?exchange=bybit")).json()["markets"]
    ][:40]
    waiting = [
        asyncio.create_task(live.get(f"/ticker/{symbol}?exchange=bybit")) for symbol in symbols
    ]
    await eventually(lambda: sum(task.done() for task in waiting) == 39)
    await sandbox.set("bybit", rate_limit=-1)
    answers = await asyncio.gather(*waiting)
    assert Counter(answer.status_code for answer in answers) == {200: 1, 503: 39}
    assert sandbox.count("bybit") == 1


async def test_caller_error_does_not_trip_a_breaker(start: StartGateway, sandbox: Sandbox) -> None:
    """A symbol that the exchange rejects is a 404, not a failure, and is remembered for a while."""
    live = await start(cb_threshold=1)
    await sandbox.set(
        "binance", status=400, body='{"code":-1121,"msg":"Invalid symbol."}', rate_limit=-1
    )
    for _ in range(3):
        answer = await live.get("/ticker/BTC/USDT?exchange=binance")
        assert (answer.status_code, answer.json()["code"]) == (404, "unknown_symbol")
    assert live.gateway.manager["binance"].breaker.state == "closed"
    assert sandbox.count("binance", "24hr") == 1


async def test_failing_exchanges_lose_no_answer(
    start: StartGateway, sandbox: Sandbox, clock: FakeClock
) -> None:
    """Fallback comes first, then the last value marked as stale, then 503 after the window."""
    live = await start(stale_seconds=60)
    fresh = (await live.get("/ticker/BTC/USDT")).json()
    await sandbox.set("bybit", refuse=True)
    clock.advance(20)
    assert (await live.get("/ticker/BTC/USDT")).json()["exchange"] == "binance"
    for name in ("binance", "kraken"):
        await sandbox.set(name, refuse=True)
    clock.advance(20)
    stale = await live.get("/ticker/BTC/USDT")
    assert stale.status_code == 200
    assert stale.json()["stale"] is True
    assert int(stale.headers["age"]) in (20, 40)
    assert stale.headers["cache-control"] == "max-age=0"
    assert "detail=stale_error; ttl=-" in stale.headers["cache-status"]
    assert {**stale.json(), "stale": False} == fresh or stale.json()["exchange"] == "binance"
    clock.advance(80)
    gone = await live.get("/ticker/BTC/USDT")
    assert (gone.status_code, gone.json()["code"]) == (503, "no_exchange_available")
    assert [attempt["exchange"] for attempt in gone.json()["attempts"]] == [
        "bybit",
        "binance",
        "kraken",
    ]
    assert int(gone.headers["retry-after"]) >= 1


@pytest.mark.parametrize("knobs", [{"status": 500}, {"hang": True}, {"body": "junk"}], ids=str)
async def test_max_age_is_never_exceeded(
    start: StartGateway, sandbox: Sandbox, clock: FakeClock, knobs: dict[str, Any]
) -> None:
    """Data that is too old is a 503 or 504, even where an old value would be served otherwise."""
    live = await start(
        exchange_timeout_seconds=1 if "hang" in knobs else 30,
        exchange_order="kraken",
        bybit_enabled=False,
        binance_enabled=False,
    )
    await live.get("/ticker/BTC/USDT")
    clock.advance(20)
    await sandbox.set("kraken", rate_limit=-1, **knobs)
    assert (await live.get("/ticker/BTC/USDT")).json()["stale"] is True
    refused = await live.get("/ticker/BTC/USDT?max_age=19")
    assert refused.status_code in (503, 504)
    assert refused.headers["cache-control"] == "no-store"
    assert (await live.get("/ticker/BTC/USDT?max_age=21")).json()["stale"] is True


async def test_max_age_zero_fetches_now_and_coalesces(
    start: StartGateway, sandbox: Sandbox
) -> None:
    """Each such request in turn is a call; fifty at once are one call."""
    live = await start()
    for _ in range(3):
        answer = await live.get("/ticker/BTC/USDT?max_age=0")
        assert (answer.headers["age"], answer.status_code) == ("0", 200)
    assert sandbox.count("bybit", "tickers") == 3
    await request_together(live, sandbox, ["/ticker/BTC/USDT?max_age=0"] * 50)
    assert sandbox.count("bybit", "tickers") == 4


async def test_max_age_shortens_freshness(
    start: StartGateway, sandbox: Sandbox, clock: FakeClock
) -> None:
    """A value of five seconds is fresh, but too old for a max_age below five."""
    live = await start()
    await live.get("/ticker/BTC/USDT")
    clock.advance(5)
    assert (await live.get("/ticker/BTC/USDT?max_age=6")).headers["age"] == "5"
    assert (await live.get("/ticker/BTC/USDT?max_age=5")).headers["age"] == "0"


async def test_concurrent_misses_share_one_upstream_call(
    start: StartGateway, sandbox: Sandbox
) -> None:
    """A hundred cold requests, in several spellings, make one fetch."""
    live = await start()
    paths = [
        "/ticker/BTC/USDT",
        "/ticker/btc-usdt",
        "/ticker/BTC-USDT?exchange=bybit",
        "/ticker/BTC%2FUSDT",
    ]
    answers = await request_together(live, sandbox, paths * 25)
    assert {answer.status_code for answer in answers} == {200}
    assert len({answer.headers["etag"] for answer in answers}) == 1
    assert sandbox.count("bybit", "tickers") == 1


async def test_disconnecting_clients_do_not_cancel_the_load(
    start: StartGateway, sandbox: Sandbox
) -> None:
    """Forty clients disconnect: no failure, no task remains, and the value is cached."""
    live = await start(cb_threshold=1)
    await sandbox.set("bybit", latency_ms=150, rate_limit=-1)
    requests = [asyncio.create_task(live.get("/ticker/BTC/USDT?exchange=bybit")) for _ in range(40)]
    await eventually(lambda: sandbox.count("bybit", "tickers") == 1)
    for request in requests:
        request.cancel()
    await asyncio.gather(*requests, return_exceptions=True)
    await eventually(lambda: live.gateway.manager["bybit"].in_flight == 0)
    await eventually(lambda: sample("http_requests_in_progress") == 0)
    answer = await live.get("/ticker/BTC/USDT?exchange=bybit")
    assert "detail=memory" in answer.headers["cache-status"]
    assert live.gateway.manager["bybit"].breaker.state == "closed"
    assert not live.gateway.cache._tasks


async def test_batch_fetches_its_misses_with_one_call(
    start: StartGateway, sandbox: Sandbox
) -> None:
    """Cached symbols cost nothing, all others one list call; a single miss uses the single call."""
    live = await start()
    await live.get("/ticker/BTC/USDT")
    assert sandbox.count("bybit") == 1
    batch = await live.get("/tickers?symbols=BTC/USDT,ETH-USDT,sol/usdt,BTC-USDT")
    assert sorted(batch.json()["tickers"]) == ["BTC/USDT", "ETH/USDT", "SOL/USDT"]
    assert batch.json()["errors"] == {}
    assert sandbox.count("bybit") == 2
    again = await live.get("/tickers?symbols=BTC/USDT,ETH-USDT,sol/usdt")
    assert sandbox.count("bybit") == 2
    assert again.headers["cache-status"].startswith("virtuoso; hit")
    matched = await live.get(
        "/tickers?symbols=BTC/USDT,ETH-USDT,sol/usdt",
        headers={"If-None-Match": again.headers["etag"]},
    )
    assert matched.status_code == 304


async def test_cold_batch_of_100_is_one_call_per_exchange(
    sandbox: Sandbox, start: StartGateway
) -> None:
    """A hundred symbols of several exchanges cost one upstream call for each needed exchange."""
    live = await start()
    rows = (await live.get("/markets")).json()["markets"][:100]
    batch = (await live.get("/tickers?symbols=" + ",".join(row["symbol"] for row in rows))).json()
    assert len(batch["tickers"]) + len(batch["errors"]) == len(rows)
    assert batch["errors"] == {}
    assert all(sandbox.count(name) <= 1 for name in ("bybit", "binance", "kraken"))


async def test_cold_batch_of_all_exchanges_is_one_call_each(clock: FakeClock) -> None:
    """A hundred symbols of three exchanges: three upstream calls return 300 tickers."""
    sandbox = Sandbox(now=clock.time, filler=100)
    await sandbox.start()
    async with serve(make_settings(sandbox), clock, load_markets=True) as live:
        await eventually(lambda: len(live.gateway.markets.loaded_at) == 3)
        sandbox.clear_counts()
        symbols = ",".join(f"F{number:04d}/USDT" for number in range(1, 101))
        batch = (await live.get(f"/tickers?symbols={symbols}&exchange=all")).json()
        assert (len(batch["tickers"]), batch["errors"]) == (100, {})
        assert {len(by_exchange) for by_exchange in batch["tickers"].values()} == {3}
        assert [sandbox.count(name) for name in sandbox.urls] == [1, 1, 1]
    await sandbox.stop()


async def test_thousand_cold_requests_share_one_call(start: StartGateway, sandbox: Sandbox) -> None:
    """A thousand requests for a symbol that is not cached make one call, and all are answered."""
    live = await start()
    await sandbox.set("bybit", latency_ms=300, rate_limit=-1)
    request = (
        b"GET /ticker/BTC/USDT?exchange=bybit HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"
    )
    answers = await asyncio.gather(*(live.raw(request) for _ in range(1000)))
    assert sandbox.count("bybit") == 1
    assert {answer.split(b"\r\n")[0] for answer in answers} == {b"HTTP/1.1 200 OK"}
    assert len({answer.split(b"\r\n\r\n")[1] for answer in answers}) == 1


async def test_exchange_all_returns_every_exchange(start: StartGateway, sandbox: Sandbox) -> None:
    """Answers are grouped by symbol and exchange; unlisted symbols and failures are problems."""
    live = await start()
    await sandbox.set("kraken", status=500, rate_limit=-1)
    batch = (await live.get("/tickers?symbols=BTC/USDT,TON/USDT,NO/SUCH&exchange=all")).json()
    assert sorted(batch["tickers"]["BTC/USDT"]) == ["binance", "bybit"]
    assert batch["errors"]["BTC/USDT"]["kraken"]["code"] == "exchange_unavailable"
    assert sorted(batch["tickers"]["TON/USDT"]) == ["binance"]
    assert batch["errors"]["TON/USDT"]["bybit"]["code"] == "unknown_symbol"
    assert sorted(batch["errors"]["NO/SUCH"]) == ["binance", "bybit", "kraken"]


async def test_batch_falls_back_like_single_requests(
    start: StartGateway, sandbox: Sandbox, clock: FakeClock
) -> None:
    """Each symbol tries its next exchange; then its old value or its problem is returned."""
    live = await start()
    await sandbox.set("bybit", status=500, rate_limit=-1)
    batch = (await live.get("/tickers?symbols=BTC/USDT,ETH/USDT,MNT/USDT")).json()
    assert {ticker["exchange"] for ticker in batch["tickers"].values()} == {"binance"}
    assert batch["errors"]["MNT/USDT"]["code"] == "exchange_unavailable"
    clock.advance(20)
    for name in ("binance", "kraken"):
        await sandbox.set(name, status=500, rate_limit=-1)
    stale = await live.get("/tickers?symbols=BTC/USDT,ETH/USDT")
    assert all(ticker["stale"] for ticker in stale.json()["tickers"].values())
    assert (stale.headers["age"], stale.headers["cache-control"]) == ("20", "max-age=0")


async def test_invalid_symbol_does_not_affect_others_in_a_batch(start: StartGateway) -> None:
    """Malformed, unknown and valid symbols of one batch each get their own answer."""
    live = await start()
    batch = await live.get("/tickers?symbols=BTC/USDT,BTCUSDT,BTC/USTD")
    assert batch.status_code == 200
    assert list(batch.json()["tickers"]) == ["BTC/USDT"]
    errors = batch.json()["errors"]
    assert errors["BTCUSDT"]["code"] == "malformed_request"
    dashed = (await live.get("/tickers?symbols=NO-SUCH")).json()
    assert list(dashed["errors"]) == ["NO/SUCH"]
    assert "BTC/USDT" in errors["BTC/USTD"]["suggestions"]
    assert batch.headers["cache-control"] == "no-store"


async def test_implausible_ticker_does_not_spoil_a_list(
    start: StartGateway, sandbox: Sandbox
) -> None:
    """Valid tickers of a list are served; the implausible one is an error of its own."""
    live = await start(cb_threshold=1)
    rows = [
        {
            "symbol": "BTCUSDT",
            "lastPrice": "100",
            "bid1Price": "99",
            "ask1Price": "101",
            "volume24h": "5",
        },
        {
            "symbol": "ETHUSDT",
            "lastPrice": "100",
            "bid1Price": "105",
            "ask1Price": "101",
            "volume24h": "5",
        },
        {
            "symbol": "SOLUSDT",
            "lastPrice": "0",
            "bid1Price": "0",
            "ask1Price": "0",
            "volume24h": "0",
        },
    ]
    body = orjson.dumps(
        {"retCode": 0, "retMsg": "OK", "result": {"category": "spot", "list": rows}}
    ).decode()
    await sandbox.set("bybit", body=body, rate_limit=-1)
    batch = (
        await live.get("/tickers?symbols=BTC/USDT,ETH/USDT,SOL/USDT,XRP/USDT&exchange=bybit")
    ).json()
    assert list(batch["tickers"]) == ["BTC/USDT"]
    codes = {symbol: problem["code"] for symbol, problem in batch["errors"].items()}
    assert codes == {
        "ETH/USDT": "bad_upstream_data",
        "SOL/USDT": "market_halted",
        "XRP/USDT": "unknown_symbol",
    }
    assert live.gateway.manager["bybit"].breaker.state == "closed"


async def test_overload_refuses_misses_and_serves_hits(
    start: StartGateway, sandbox: Sandbox
) -> None:
    """With MAX_CONCURRENT loads in flight, a miss gets 503 with Retry-After, a hit its answer."""
    live = await start(max_concurrent=5, bybit_enabled=False, kraken_enabled=False)
    await live.get("/ticker/BTC/USDT")
    await sandbox.set("binance", hang=True, rate_limit=-1)
    symbols = [
        row["symbol"]
        for row in (await live.get("/markets")).json()["markets"]
        if row["symbol"] != "BTC/USDT"
    ]
    waiting = [asyncio.create_task(live.get(f"/ticker/{symbol}")) for symbol in symbols[:5]]
    await eventually(lambda: sandbox.count("binance", "24hr") == 6)
    refused = await live.get(f"/ticker/{symbols[6]}")
    assert (refused.status_code, refused.json()["code"], refused.headers["retry-after"]) == (
        503,
        "overloaded",
        "1",
    )
    assert (await live.get("/ticker/BTC/USDT")).status_code == 200
    await sandbox.set("binance", rate_limit=-1)
    assert {answer.status_code for answer in await asyncio.gather(*waiting)} <= {200, 502, 504}


async def test_request_never_exceeds_its_deadline(start: StartGateway, sandbox: Sandbox) -> None:
    """All exchanges hang: each gets its share of REQUEST_TIMEOUT; the answer is a 504 in time."""
    live = await start(clock=SystemClock(), request_timeout=6, exchange_timeout_seconds=5)
    for name in ("bybit", "binance", "kraken"):
        await sandbox.set(name, hang=True)
    started = asyncio.get_running_loop().time()
    answer = await live.get("/ticker/BTC/USDT")
    assert asyncio.get_running_loop().time() - started < 12
    assert (answer.status_code, answer.json()["code"]) == (504, "deadline_exceeded")
    assert [sandbox.count(name) for name in ("bybit", "binance", "kraken")] == [1, 1, 1]


@pytest.mark.parametrize("path", ["/ticker/BTC/USDT", "/tickers?symbols=BTC/USDT,ETH/USDT"])
async def test_hanging_exchanges_do_not_hide_a_working_one(
    start: StartGateway, sandbox: Sandbox, path: str
) -> None:
    """Two exchanges hang longer than a request may take: the third one still answers."""
    live = await start(clock=SystemClock(), request_timeout=6, exchange_timeout_seconds=5.6)
    for name in ("bybit", "binance"):
        await sandbox.set(name, hang=True)
    answer = await live.get(path)
    assert answer.status_code == 200
    assert '"exchange":"kraken"' in answer.text
    assert '"errors":{}' in answer.text or path.startswith("/ticker/")


async def test_overload_is_not_blamed_on_an_exchange(start: StartGateway, sandbox: Sandbox) -> None:
    """A refusal for too many loads names no exchange, and the next exchange is not tried."""
    live = await start(max_concurrent=1)
    await sandbox.set("bybit", hang=True)
    first = asyncio.create_task(live.get("/ticker/BTC/USDT"))
    await eventually(lambda: sandbox.count("bybit", "tickers") == 1)
    refused = await live.get("/ticker/ETH/USDT")
    assert (refused.status_code, refused.json()["code"]) == (503, "overloaded")
    assert "exchange" not in refused.json()
    await sandbox.set("bybit", rate_limit=-1)
    assert (await first).status_code == 200


async def test_health_has_three_states_with_reasons(
    start: StartGateway, sandbox: Sandbox, clock: FakeClock, redis: RedisServer
) -> None:
    """Healthy, degraded with one exchange down, unhealthy without any answer; without any call."""
    live = await start(cb_threshold=1, redis_url=redis.url)
    healthy = await live.get("/health")
    assert (healthy.status_code, healthy.json()["status"]) == (200, "healthy")
    assert healthy.json()["exchanges"] == {
        "bybit": "closed",
        "binance": "closed",
        "kraken": "closed",
    }
    assert healthy.json()["timestamp"] == int(clock.time() * 1000)
    for name in ("bybit", "binance", "kraken"):
        await sandbox.set(name, status=500, rate_limit=-1)
    await live.get("/ticker/BTC/USDT?exchange=bybit")
    degraded = await live.get("/health")
    assert (degraded.status_code, degraded.json()["status"]) == (200, "degraded")
    assert degraded.json()["parts"]["exchanges"]["reason"] == "bybit is open (unavailable)"
    await live.get("/ticker/BTC/USDT")
    unhealthy = await live.get("/health")
    assert (unhealthy.status_code, unhealthy.json()["status"]) == (503, "unhealthy")
    sandbox.clear_counts()
    for path in ("/health", "/health/live", "/health/ready", "/exchanges", "/metrics"):
        await live.get(path)
    assert sum(sandbox.count(name) for name in ("bybit", "binance", "kraken")) == 0


async def test_readiness_requires_a_market_list(
    start: StartGateway, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """/health/ready and symbols are 503 until one list is loaded; /health/live is always 200."""
    monkeypatch.setattr(gateway, "START_SECONDS", 0.1)
    monkeypatch.setattr(gateway, "FIRST_LIST_SECONDS", 0.1)
    for name in ("bybit", "binance", "kraken"):
        await sandbox.set(name, hang=True)
    live = await start(wait=False)
    assert (await live.get("/health/live")).status_code == 200
    assert (await live.get("/health/ready")).status_code == 503
    assert (await live.get("/health")).status_code == 503
    for path in ("/ticker/BTC/USDT", "/markets"):
        waiting = await live.get(path)
        assert (waiting.status_code, waiting.json()["code"]) == (503, "markets_loading")
    await sandbox.reset()
    await eventually(lambda: live.gateway.markets.loaded_at)
    assert (await live.get("/health/ready")).status_code == 200


async def test_markets_can_be_filtered(start: StartGateway) -> None:
    """By exchange, base and quote, in any case; each with its exchanges in order of preference."""
    live = await start()
    both = (await live.get("/markets?base=btc&quote=USDT")).json()
    assert both["count"] == 1
    (market,) = both["markets"]
    names = ("symbol", "base", "quote", "type")
    assert [market[name] for name in names] == ["BTC/USDT", "BTC", "USDT", "spot"]
    assert market["exchanges"] == ["bybit", "binance", "kraken"]
    assert [*market["ids"].values()] == ["BTCUSDT", "BTCUSDT", "XBTUSDT"]
    assert [*market["statuses"].values()] == ["Trading", "TRADING", "online"]
    kraken = (await live.get("/markets?exchange=kraken")).json()
    assert 10 < kraken["count"] < (await live.get("/markets")).json()["count"]
    assert (await live.get("/markets?exchange=mtgox")).status_code == 404


async def test_unknown_symbol_returns_suggestions(start: StartGateway) -> None:
    """A misspelt symbol is answered with similar ones."""
    live = await start()
    assert (await live.get("/ticker/BTC/USTD")).json()["suggestions"][:2]
    assert "ETH/USDT" in (await live.get("/ticker/ETHH/USDT")).json()["suggestions"]
    assert "did you mean BTC-USDT" in (await live.get("/ticker/btcusdt")).json()["detail"]
    assert "suggestions" not in (await live.get("/ticker/QQQQQQ/ZZZ")).json()


async def test_since_must_not_be_in_the_future(start: StartGateway, clock: FakeClock) -> None:
    """A future `since` is the caller's error; a recent one returns an empty list at worst."""
    live = await start()
    ahead = await live.get(f"/ohlcv/BTC-USDT?since={int(clock.time() * 1000) + 60_000}")
    assert (ahead.status_code, ahead.json()["code"]) == (422, "invalid_parameter")
    seconds = await live.get(f"/ohlcv/BTC-USDT?since={int(clock.time())}")
    assert "looks like seconds" in seconds.json()["detail"]
    now = await live.get(f"/ohlcv/BTC-USDT?since={int(clock.time() * 1000) - 1000}&exchange=kraken")
    assert now.status_code == 200


async def test_head_returns_the_headers_of_get(start: StartGateway) -> None:
    """`curl -I` shows the headers of a GET."""
    live = await start()
    full, head = (
        await live.get("/ticker/BTC/USDT"),
        await live.client.head(live.url + "/ticker/BTC/USDT"),
    )
    assert head.content == b""
    assert head.headers["content-length"] == full.headers["content-length"]
    assert head.headers["etag"] == full.headers["etag"]


async def test_every_answer_has_a_request_id(start: StartGateway) -> None:
    """A new id, or the client's own if it is valid; on errors as well."""
    live = await start()
    for path in ("/ticker/BTC/USDT", "/nope", "/ticker/x", "/health", "/tickers"):
        assert len((await live.get(path)).headers["x-request-id"]) == 32
    custom = await live.get("/nope", headers={"X-Request-ID": "trace-1.2_3"})
    assert custom.headers["x-request-id"] == "trace-1.2_3"
    for bad in ("two words", "x" * 65, "a;b"):
        assert (await live.get("/nope", headers={"X-Request-ID": bad})).headers[
            "x-request-id"
        ] != bad


async def test_unexpected_error_is_a_500_without_details(
    start: StartGateway, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The client reads an id, the log has the rest under that id, and the 500 is counted."""
    live = await start()
    monkeypatch.setattr(live.gateway.manager.markets, "canonical", None)
    answer = await live.get("/ticker/BTC/USDT")
    assert (answer.status_code, answer.json()["code"]) == (500, "internal_error")
    assert "NoneType" not in answer.text
    assert len(answer.headers["x-request-id"]) == 32
    assert sample("http_requests_total", route="/ticker/{symbol}", method="GET", code="500") >= 1


async def test_admin_clears_the_cache_and_resets_breakers(
    start: StartGateway, sandbox: Sandbox, redis: RedisServer
) -> None:
    """The cache is cleared as a whole, by exchange or by symbol, in both tiers; breakers close."""
    live = await start(admin_token="open-sesame", cb_threshold=1, redis_url=redis.url)
    admin = {"Authorization": "Bearer open-sesame"}
    redis.client.set("foreign", "stays")

    async def post(path: str) -> dict[str, Any]:
        answer = await live.client.post(live.url + path, headers=admin)
        assert answer.status_code == 200, answer.text
        document: dict[str, Any] = answer.json()
        return document

    for symbol in ("BTC-USDT", "ETH-USDT"):
        for name in ("bybit", "binance"):
            await live.get(f"/ticker/{symbol}?exchange={name}")
    assert (await post("/admin/cache/clear?symbol=btc-usdt&exchange=bybit"))["cleared"] == 1
    assert (await post("/admin/cache/clear?symbol=BTC/USDT"))["cleared"] == 1
    assert (await post("/admin/cache/clear"))["cleared"] == 2
    assert redis.client.get("foreign") == b"stays"
    assert not redis.client.keys("virtuoso:3:data:*")
    for wrong in ("?exchnage=kraken", "?exchange=mtgox"):
        assert (
            await live.client.post(live.url + f"/admin/cache/clear{wrong}", headers=admin)
        ).status_code in (
            404,
            422,
        )
    body = await live.client.post(
        live.url + "/admin/cache/clear", headers=admin, json={"exchange": "kraken"}
    )
    assert body.status_code == 422
    chunked = b"POST /admin/cache/clear HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
    chunked += b"Authorization: Bearer open-sesame\r\n"
    answered = await live.raw(chunked + b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n")
    assert answered.split(b" ", 2)[1] == b"422"
    await sandbox.set("kraken", status=429, headers={"Retry-After": "1000"}, rate_limit=-1)
    await live.get("/ticker/BTC-USDT?exchange=kraken")
    await sandbox.set("kraken", rate_limit=-1)
    assert (
        await live.client.post(live.url + "/admin/breakers/reset?bans=no", headers=admin)
    ).status_code == 422
    assert (await post("/admin/breakers/reset?bans=keep"))["reset"] == []
    assert (await live.get("/ticker/BTC-USDT?exchange=kraken&max_age=0")).json()[
        "code"
    ] == "circuit_open"
    assert (await post("/admin/breakers/reset"))["reset"] == ["kraken"]
    assert (await live.get("/ticker/BTC-USDT?exchange=kraken")).status_code == 200


@pytest.mark.parametrize(
    "request_line",
    [
        "cache/clear?exchange=",
        "cache/clear?symbol=",
        "cache/clear?exchange=&symbol=BTC-USDT",
        "cache/clear?exchange=bybit&symbol=",
        "cache/clear?exchange=bybit&exchange=kraken",
        "cache/clear?exchange",
        "cache/clear?symbols=BTC-USDT",
        "cache/clear?exchange=bybit&exchange=",
        "breakers/reset?ban=keep",
        "breakers/reset?bans=",
        "breakers/reset?bans=keep&bans=forget",
        "breakers/reset?exchange=kraken",
        "maintenance/daily?dry_run=1",
    ],
)
async def test_admin_refuses_unknown_parameters(
    start: StartGateway, sandbox: Sandbox, request_line: str
) -> None:
    """An empty, unknown or repeated parameter is a 422; nothing is cleared or reset."""
    live = await start(admin_token="open-sesame", cb_threshold=1)
    await live.get("/ticker/BTC-USDT")
    await sandbox.set("kraken", status=429, headers={"Retry-After": "1000"}, rate_limit=-1)
    await live.get("/ticker/BTC-USDT?exchange=kraken")
    admin = {"Authorization": "Bearer open-sesame"}
    answer = await live.client.post(f"{live.url}/admin/{request_line}", headers=admin)
    assert (answer.status_code, answer.json()["code"]) == (422, "invalid_parameter")
    words = ("give it a value, or leave it out", "'forget' or 'keep'", "in the query, and no body")
    assert any(word in answer.json()["detail"] for word in words)
    assert len(live.gateway.cache.memory) == 1
    assert live.gateway.manager["kraken"].breaker.state == "open"
    assert not live.gateway.maintenance
    refused = await live.client.post(f"{live.url}/admin/{request_line}")
    assert refused.status_code == 401, "without a token, nothing is revealed about parameters"


@pytest.mark.parametrize(
    "path",
    [
        "/ticker/BTC-USDT?exchange=",
        "/tickers?symbols=BTC-USDT&exchange=",
        "/tickers?symbols=",
        "/markets?exchange=",
        "/orderbook/BTC-USDT?exchange=",
        "/ohlcv/BTC-USDT?exchange=",
        "/trades/BTC-USDT?exchange=",
        "/markets?base=",
        "/markets?quote=",
        "/stream/BTC-USDT?exchange=",
        "/ticker/BTC-USDT?max_age=",
        "/orderbook/BTC-USDT?limit=",
        "/ohlcv/BTC-USDT?timeframe=",
        "/ohlcv/BTC-USDT?since=",
        "/stream/BTC-USDT?channel=",
        "/stream/BTC-USDT?levels=",
        "/ticker/BTC-USDT?exchange=kraken&exchange=",
    ],
)
async def test_empty_parameter_never_means_all(
    start: StartGateway, sandbox: Sandbox, path: str
) -> None:
    """An empty parameter is a 422 that names it, without a call; absent means all."""
    live = await start()
    async with live.client.stream(
        "GET", live.url + path
    ) as answer:  # an accepted stream would not end
        assert answer.status_code == 422
        problem = orjson.loads(await answer.aread())
    name = path.rpartition("?")[2].rpartition("&")[2].rstrip("=")
    assert problem["code"] == "invalid_parameter"
    assert problem["detail"].startswith(name)
    assert sum(sandbox.count(exchange) for exchange in sandbox.urls) == 0


async def test_empty_symbols_of_the_page_mean_none(start: StartGateway, sandbox: Sandbox) -> None:
    """An empty watch list differs from an absent one, which means DASHBOARD_SYMBOLS."""
    live = await start()
    market = (await live.get("/api/dashboard/data?symbols=")).json()["market"]
    assert market == {"tickers": {}, "errors": {}}
    assert sum(sandbox.count(exchange) for exchange in sandbox.urls) == 0


async def test_keys_have_separate_limits(start: StartGateway, clock: FakeClock) -> None:
    """With API_KEYS a key is required; each has its own limit, in headers and Retry-After."""
    live = await start(api_keys="alice:first-secret,bob:second-secret", client_rate_limit=3)
    assert (await live.get("/ticker/BTC/USDT")).status_code == 401
    wrong = await live.get("/ticker/BTC/USDT", headers={"X-API-Key": "first-secreT"})
    assert (wrong.status_code, wrong.headers["www-authenticate"]) == (
        401,
        'ApiKey header="X-API-Key"',
    )
    alice, bob = {"X-API-Key": "first-secret"}, {"X-API-Key": "second-secret"}
    for left in (2, 1, 0):
        answer = await live.get("/ticker/BTC/USDT", headers=alice)
        assert answer.headers["ratelimit"].startswith(f'"client";r={left};t=')
        assert 60 <= int(answer.headers["ratelimit"].rpartition("=")[2]) <= 66
        assert answer.headers["cache-control"].startswith("private, max-age=")
    limited = await live.get("/ticker/BTC/USDT", headers=alice)
    assert (limited.status_code, limited.json()["code"]) == (429, "too_many_requests")
    assert 60 <= int(limited.headers["retry-after"]) <= 66
    assert limited.headers["ratelimit"] == f'"client";r=0;t={limited.headers["retry-after"]}'
    assert limited.headers["ratelimit-policy"] == '"client";q=3;w=60'
    assert (await live.get("/ticker/BTC/USDT", headers=bob)).status_code == 200
    for path in ("/health", "/health/live", "/metrics"):
        assert (await live.get(path)).status_code == 200
    clock.advance(int(limited.headers["retry-after"]))
    assert (await live.get("/ticker/BTC/USDT", headers=alice)).status_code == 200


async def test_only_configured_origins_may_call(start: StartGateway) -> None:
    """Without CORS_ORIGINS no CORS header is sent; with it, only for those origins, never `*`."""
    origin = {"Origin": "https://desk.example"}
    closed, opened = await start(), await start(cors_origins="https://desk.example")
    assert (
        "access-control-allow-origin"
        not in (await closed.get("/ticker/BTC/USDT", headers=origin)).headers
    )
    answer = await opened.get("/ticker/BTC/USDT", headers=origin)
    assert answer.headers["access-control-allow-origin"] == "https://desk.example"
    assert "access-control-allow-credentials" not in answer.headers
    other = await opened.get("/ticker/BTC/USDT", headers={"Origin": "https://evil.example"})
    assert "access-control-allow-origin" not in other.headers


async def test_docs_and_metrics_can_be_disabled(start: StartGateway) -> None:
    """DOCS_ENABLED and METRICS_ENABLED decide whether those paths exist."""
    live = await start(docs_enabled=False, metrics_enabled=False)
    for path in ("/docs", "/docs/start.js", "/openapi.json", "/metrics", "/redoc"):
        assert (await live.get(path)).status_code == 404


async def test_stopping_leaves_no_task_behind(
    sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A load and a market list in progress end with the gateway."""
    monkeypatch.setattr(gateway, "START_SECONDS", 0.1)
    await sandbox.set("kraken", hang=True)
    settings = make_settings(
        sandbox, request_timeout=1
    )  # how long the server waits for the request when it stops
    async with serve(settings, SystemClock(), load_markets=True) as live:
        await eventually(lambda: "bybit" in live.gateway.markets.loaded_at)
        await sandbox.set("bybit", hang=True)
        leaving = asyncio.create_task(live.get("/ticker/BTC/USDT?exchange=bybit"))
        await eventually(lambda: sandbox.count("bybit", "tickers") == 1)
        leaving.cancel()
        await asyncio.gather(leaving, return_exceptions=True)
    assert not [
        task
        for task in asyncio.all_tasks()
        if "src.gateway" in repr(task) or "src/cache" in repr(task)
    ]
    assert not [task for task in asyncio.all_tasks() if "src/exchanges/market_loader" in repr(task)]
