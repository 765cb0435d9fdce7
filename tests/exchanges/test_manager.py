"""Calls to the exchanges: errors, budgets, breakers, market lists, and that no secret leaves."""

import asyncio
import inspect
import json
import logging
import os
import pickle
import resource
import signal
import subprocess
import time
import zlib
from itertools import pairwise
from pathlib import Path
from typing import Any

import ccxt
import orjson
import pytest

from config import Settings
from src import gateway
from src.core import background
from src.core.clock import SystemClock
from src.core.errors import BadUpstreamData, GatewayError, InternalError, UpstreamError
from src.exchanges import ccxt_client, market_reader
from src.exchanges.ccxt_client import (
    SNAPSHOT_FORMAT,
    ClientOptions,
    load_snapshot,
    make_client,
    restore_markets,
)
from src.exchanges.http_client import MAX_MARKETS_BYTES, Answer
from src.exchanges.manager import PROBE_DELAY_SECONDS, ExchangeManager, weight_of
from src.exchanges.market_reader import MarketReader
from src.exchanges.markets import Markets
from src.exchanges.translation import TRANSLATION, translate
from src.sandbox.server import Sandbox
from src.store.redis import RedisStore
from tests.conftest import (
    FakeClock,
    Live,
    StartGateway,
    eventually,
    make_settings,
    sample,
)
from tests.processes import children

ROOT = Path(__file__).parents[2]
EXCHANGES = ["bybit", "binance", "kraken"]
REJECTED = '{"error":["EGeneral:Invalid arguments"]}'
CCXT_ERRORS = [
    error
    for _, error in inspect.getmembers(ccxt, inspect.isclass)
    if issubclass(error, ccxt.BaseError)
]


@pytest.mark.parametrize("error", CCXT_ERRORS, ids=lambda error: error.__name__)
def test_every_ccxt_error_is_translated_without_its_text(error: type[Exception]) -> None:
    """Each error class becomes a `GatewayError` that contains none of the original text."""
    translated = translate(
        "kraken", error("https://secret.example/?signature=abc\r\nevil"), Answer()
    )
    assert isinstance(translated, GatewayError)
    assert translated.exchange == "kraken"
    assert "secret" not in translated.detail
    assert "\n" not in translated.detail


@pytest.mark.parametrize(
    "error", [ValueError, KeyError, AttributeError, TimeoutError, ConnectionError]
)
def test_builtin_errors_are_bad_upstream_data_or_a_timeout(error: type[Exception]) -> None:
    """Errors of ccxt's parsers are failures of the exchange, never a 500."""
    translated = translate("bybit", error("junk"), Answer())
    assert isinstance(translated, UpstreamError)
    assert translated.code == ("exchange_timeout" if error is TimeoutError else "bad_upstream_data")


def test_nearest_ancestor_of_an_error_decides() -> None:
    """Each class of the table maps to its own entry, regardless of the order."""
    for foreign, expected in TRANSLATION.items():
        if foreign is not Exception and issubclass(foreign, ccxt.BaseError):
            assert type(translate("bybit", foreign("x"), Answer())) is expected


@pytest.mark.parametrize("name", EXCHANGES)
@pytest.mark.parametrize(
    ("knobs", "status", "code"),
    [
        ({"status": 500}, 502, "exchange_unavailable"),
        ({"status": 503}, 502, "exchange_unavailable"),
        ({"status": 523}, 502, "exchange_unavailable"),
        ({"reset": True}, 502, "exchange_unavailable"),
        ({"refuse": True}, 502, "exchange_unavailable"),
        ({"status": 429, "headers": {"Retry-After": "7"}}, 503, "exchange_rate_limited"),
        ({"status": 418, "headers": {"Retry-After": "77"}}, 503, "exchange_banned"),
        ({"status": 418, "body": "{}"}, 503, "exchange_banned"),
        ({"geo_block": True}, 451, "geo_blocked"),
        ({"status": 451}, 451, "geo_blocked"),
        ({"hang": True}, 504, "exchange_timeout"),
        ({"drip": True}, 504, "exchange_timeout"),
        ({"body": ""}, 502, "bad_upstream_data"),
        ({"body": "<html>"}, 502, "bad_upstream_data"),
        ({"body": '{"retCode":0,"result":{'}, 502, "bad_upstream_data"),
        ({"body": '{"retCode":0,"result":{}}'}, 502, "bad_upstream_data"),
        ({"redirect": "http://127.0.0.1:1/"}, 502, "upstream_error"),
        ({"size": 10_000_000}, 502, "upstream_error"),
    ],
    ids=str,
)
async def test_each_fault_has_its_status_and_code(
    start: StartGateway, sandbox: Sandbox, name: str, knobs: dict[str, Any], status: int, code: str
) -> None:
    """Each fault has its status and code on every exchange, and is never cached or a 500."""
    live = await start(exchange_timeout_seconds=1.5 if knobs.keys() & {"hang", "drip"} else 30)
    await sandbox.set(name, rate_limit=-1, only="icker", **knobs)
    answer = await live.get(f"/ticker/BTC/USDT?exchange={name}")
    assert (answer.status_code, answer.json()["code"]) == (status, code), answer.text
    assert answer.json()["exchange"] == name
    assert answer.headers["cache-control"] == "no-store"
    assert "127.0.0.1" not in answer.text
    await sandbox.reset()
    await live.gateway.manager.reset_breakers()
    assert (await live.get(f"/ticker/BTC/USDT?exchange={name}")).status_code == 200


@pytest.mark.parametrize(
    ("knobs", "cause", "seconds"),
    [
        ({"status": 429, "headers": {"Retry-After": "7"}}, "rate_limited", 7),
        ({"status": 429}, "rate_limited", 60),
        ({"status": 418, "headers": {"Retry-After": "300"}}, "banned", 300),
        ({"status": 418}, "banned", 120),
        (
            {"status": 403, "body": '{"retCode":10018,"retMsg":"access too frequent"}'},
            "rate_limited",
            600,
        ),
        ({"geo_block": True}, "geo_blocked", 900),
    ],
    ids=str,
)
async def test_limit_or_block_opens_the_breaker_for_the_requested_time(
    start: StartGateway,
    sandbox: Sandbox,
    clock: FakeClock,
    knobs: dict[str, Any],
    cause: str,
    seconds: int,
) -> None:
    """One 429, 418 or geo-block opens the breaker with its cause until Retry-After ends."""
    live = await start(cb_reset_seconds=30)
    await sandbox.set("bybit", only="tickers", **knobs)
    first = await live.get("/ticker/BTC/USDT?exchange=bybit")
    breaker = (await live.get("/exchanges")).json()["bybit"]["breaker"]
    assert (breaker["state"], breaker["cause"]) == ("open", cause)
    assert (breaker["retry_at"] - breaker["opened_at"]) / 1000 == pytest.approx(seconds, abs=1.1)
    assert first.json()["retry_after"] == pytest.approx(seconds, abs=1)
    clock.advance(seconds - 1.5)
    await live.get("/ticker/BTC/USDT?exchange=bybit")
    assert sandbox.count("bybit", "tickers") == 1
    await sandbox.reset()
    clock.advance(2)
    assert (await live.get("/ticker/BTC/USDT?exchange=bybit")).status_code == 200


async def test_retry_after_may_be_a_date(start: StartGateway, sandbox: Sandbox) -> None:
    """Both forms of Retry-After are read."""
    live = await start()
    await sandbox.set(
        "binance", status=429, headers={"Retry-After": "Wed, 01 Jan 2020 00:00:00 GMT"}
    )
    answer = await live.get("/ticker/BTC/USDT?exchange=binance")
    assert answer.json()["retry_after"] == 1


async def test_geo_block_returns_451_while_the_breaker_is_open(
    start: StartGateway, sandbox: Sandbox
) -> None:
    """A request for a blocked exchange returns the cause; without a choice others answer."""
    live = await start()
    await sandbox.set("bybit", geo_block=True)
    answers = [await live.get("/ticker/BTC/USDT?exchange=bybit") for _ in range(3)]
    assert {(answer.status_code, answer.json()["code"]) for answer in answers} == {
        (451, "geo_blocked")
    }
    assert sandbox.count("bybit", "tickers") == 1
    assert (await live.get("/ticker/BTC/USDT")).json()["exchange"] == "binance"


async def test_requests_are_never_signed(start: StartGateway, sandbox: Sandbox) -> None:
    """With keys configured, every request is a public GET without key or signature."""
    keys = {
        f"{name}_{part}": f"canary-{name}-{part}"
        for name in EXCHANGES
        for part in ("api_key", "api_secret")
    }
    live = await start(**keys)
    for name in EXCHANGES:
        for path in ("ticker/BTC-USDT", "orderbook/BTC-USDT", "ohlcv/BTC-USDT", "trades/BTC-USDT"):
            assert (await live.get(f"/{path}?exchange={name}")).status_code == 200
    await live.get("/tickers?symbols=BTC/USDT,ETH/USDT&exchange=all")
    for name in EXCHANGES:
        assert live.gateway.manager[name].client.apiKey == f"canary-{name}-api_key"
        requests = str(sandbox.requests[name]).lower()
        assert sandbox.requests[name]
        for word in ("canary", "signature", "x-bapi-api-key", "api-sign", "mbx-apikey"):
            assert word not in requests


@pytest.mark.parametrize("name", EXCHANGES)
async def test_every_kind_of_data_comes_from_every_exchange(
    start: StartGateway, sandbox: Sandbox, name: str
) -> None:
    """Ticker, order book, candles, trades and time work with one call each."""
    live = await start()
    book = (await live.get(f"/orderbook/BTC-USDT?exchange={name}&limit=7")).json()
    assert (len(book["bids"]), len(book["asks"])) == (7, 7)
    assert book["bids"][0][0] < book["asks"][0][0]
    candles = (await live.get(f"/ohlcv/BTC-USDT?exchange={name}&timeframe=1h&limit=5")).json()[
        "candles"
    ]
    assert [later[0] - earlier[0] for earlier, later in pairwise(candles)] == [3_600_000] * 4
    trades = (await live.get(f"/trades/BTC-USDT?exchange={name}&limit=5")).json()["trades"]
    assert len(trades) == 5
    assert {trade["side"] for trade in trades} <= {"buy", "sell"}
    assert abs(await live.gateway.manager.clock_skew(name)) < 1.1
    assert sandbox.count(name) == 4


async def test_swaps_are_listed_if_configured(start: StartGateway, sandbox: Sandbox) -> None:
    """With MARKET_TYPES=spot,swap, linear perpetuals are served alone and in a batch."""
    live = await start(market_types="spot,swap")
    swap = (await live.get("/ticker/btc-usdt:usdt")).json()
    assert (swap["symbol"], swap["exchange"]) == ("BTC/USDT:USDT", "bybit")
    symbols = "BTC/USDT,BTC/USDT:USDT,ETH/USDT:USDT"
    batch = (await live.get(f"/tickers?symbols={symbols}&exchange=binance")).json()
    assert sorted(batch["tickers"]) == ["BTC/USDT", "BTC/USDT:USDT", "ETH/USDT:USDT"]
    assert batch["errors"] == {}
    book = (await live.get("/orderbook/BTC/USDT:USDT?exchange=binance&limit=7")).json()
    assert (len(book["bids"]), len(book["asks"])) == (7, 7)
    order_books = [path for path, _ in sandbox.requests["binance"] if "depth" in path]
    assert "limit=50" in str(order_books)


async def test_swaps_are_unknown_by_default(start: StartGateway) -> None:
    """The default is spot, so a swap is an unknown symbol."""
    assert (await (await start()).get("/ticker/BTC/USDT:USDT")).status_code == 404


def test_request_weights_match_the_documentation() -> None:
    """Lists of tickers and deep books weigh more on Binance. Other exchanges count calls."""
    tickers = [weight_of("binance", "tickers", count) for count in (1, 20, 21, 100)]
    books = [weight_of("binance", "orderbook", limit) for limit in (5, 100, 101, 500)]
    kinds = [weight_of("binance", kind) for kind in ("ticker", "ohlcv", "trades", "markets")]
    swaps = [weight_of("binance", kind, symbol="X/Y:Y") for kind in ("ticker", "tickers")]
    assert tickers == [2, 2, 40, 40]
    assert books == [5, 5, 25, 25]
    assert kinds == [2, 2, 4, 20]
    assert swaps == [3, 45]  # 1 + 2 and 40 + 5
    assert weight_of("bybit", "tickers", 100) == weight_of("kraken", "orderbook", 200) == 1


async def test_exchange_count_corrects_the_budget(start: StartGateway, sandbox: Sandbox) -> None:
    """The weight that other clients of this address used counts once a header contains it."""
    live = await start(redis_host="")
    await sandbox.set("binance", rate_limit=-1, headers={"X-MBX-USED-WEIGHT-1M": "5000"})
    await live.get("/ticker/BTC/USDT?exchange=binance")
    assert (await live.get("/exchanges")).json()["binance"]["budget_used_ratio"] == pytest.approx(
        5000 / 6000, abs=0.001
    )
    await sandbox.set("bybit", rate_limit=-1, headers={"X-Bapi-Limit-Status": "0"})
    await live.get("/ticker/BTC/USDT?exchange=bybit")
    assert (await live.get("/exchanges")).json()["bybit"]["budget_used_ratio"] == 1


async def test_swaps_on_binance_have_a_budget_of_their_own(
    start: StartGateway, sandbox: Sandbox
) -> None:
    """A count from the futures' pool corrects only its budget, and a spent one stops only swaps."""
    live = await start(market_types="spot,swap", binance_futures_budget="2400/60")
    await sandbox.set("binance", rate_limit=-1, headers={"X-MBX-USED-WEIGHT-1M": "2400"})
    await live.get("/ticker/BTC/USDT:USDT?exchange=binance")
    shown = (await live.get("/exchanges")).json()
    assert (shown["binance"]["budget_used_ratio"], shown["kraken"].get("futures_budget")) == (
        0,
        None,
    )
    assert shown["binance"]["futures_budget_used_ratio"] == 1
    assert "futures_budget_used_ratio" not in shown["bybit"]
    await live.get("/metrics")
    for pool, ratio in (("main", 0), ("futures", 1)):
        assert sample("exchange_budget_used_ratio", exchange="binance", pool=pool) == ratio
    swap = await live.get("/ticker/ETH/USDT:USDT?exchange=binance")
    assert (swap.status_code, swap.json()["code"]) == (503, "budget_spent")
    assert "binance-futures (2400 per 60 s)" in swap.json()["detail"]
    assert (await live.get("/ticker/ETH/USDT:USDT")).json()["exchange"] == "bybit"
    assert (await live.get("/ticker/ETH/USDT?exchange=binance")).status_code == 200


async def test_market_lists_of_two_pools_correct_neither(
    start: StartGateway, sandbox: Sandbox
) -> None:
    """The last of several answers may be from either pool, so its count is not used."""
    await sandbox.set("binance", rate_limit=-1, headers={"X-MBX-USED-WEIGHT-1M": "2302"})
    live = await start(market_types="spot,swap", load_markets=True)
    shown = (await live.get("/exchanges")).json()["binance"]
    assert (shown["budget_used_ratio"], shown["futures_budget_used_ratio"]) == (0.0033, 0)


async def test_ban_stops_both_pools_of_all_replicas(
    start: StartGateway, sandbox: Sandbox, redis: Any
) -> None:
    """A ban applies to the address: another replica calls neither spot markets nor swaps."""
    settings = {"redis_url": redis.url, "market_types": "spot,swap"}
    banned = await start(**settings)
    other = await start(**settings)
    await sandbox.set("binance", status=418, headers={"Retry-After": "300"})
    await banned.get("/ticker/BTC/USDT?exchange=binance")
    sandbox.clear_counts()
    problem = (await other.get("/ticker/BTC/USDT:USDT?exchange=binance")).json()
    assert (problem["code"], problem["retry_after"]) == ("exchange_banned", 300)
    assert sandbox.count("binance") == 0


async def test_spent_budget_falls_back_or_returns_the_wait(
    start: StartGateway, sandbox: Sandbox, clock: FakeClock
) -> None:
    """The next exchange answers; a request for the spent one returns 503 with the seconds."""
    live = await start(bybit_budget="2/10")
    for base, exchange in (("BTC", "bybit"), ("ETH", "bybit"), ("SOL", "binance")):
        assert (await live.get(f"/ticker/{base}/USDT")).json()["exchange"] == exchange
    pinned = await live.get("/ticker/XRP/USDT?exchange=bybit")
    assert (pinned.status_code, pinned.json()["code"]) == (503, "budget_spent")
    assert int(pinned.headers["retry-after"]) == pinned.json()["retry_after"] <= 11
    assert sandbox.count("bybit", "tickers") == 2
    clock.advance(pinned.json()["retry_after"])
    assert (await live.get("/ticker/XRP/USDT?exchange=bybit")).status_code == 200


async def test_failing_market_list_does_not_affect_other_exchanges(
    start: StartGateway, sandbox: Sandbox, clock: FakeClock
) -> None:
    """The gateway starts, health names the missing list, and the list is loaded later."""
    await sandbox.set("bybit", status=500)
    live = await start(wait=False)
    await eventually(
        lambda: len(live.gateway.markets.loaded_at) == 2 and "bybit" in live.gateway.loader.errors
    )
    assert (await live.get("/ticker/BTC/USDT")).json()["exchange"] == "binance"
    health = (await live.get("/health")).json()
    assert (health["status"], health["parts"]["markets"]["reason"]) == (
        "degraded",
        "not loaded: bybit",
    )
    only_there = await live.get("/ticker/BTC/USDT?exchange=bybit")
    assert (only_there.status_code, only_there.json()["code"]) == (503, "markets_loading")
    await sandbox.set("bybit", rate_limit=-1)
    await eventually(lambda: "bybit" in live.gateway.markets.loaded_at)


async def test_market_list_is_read_again_after_an_internal_error(
    start: StartGateway, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """An internal error is logged, counted and shown, and the list is read again."""
    monkeypatch.setattr(background, "_logged_at", {})
    before = sample("internal_errors_total", component="markets")
    with monkeypatch.context() as broken:
        broken.setattr(ccxt_client, "adopt_markets", None)
        live = await start(wait=False)
        shown = (await live.get("/exchanges")).json()
        assert {shown[name]["markets"]["error"] for name in EXCHANGES} == {"internal_error"}
    assert sample("internal_errors_total", component="markets") >= before + 3
    assert "TypeError" in next(
        record.exc_text or "" for record in caplog.records if hasattr(record, "component")
    )
    await eventually(lambda: len(live.gateway.markets.loaded_at) == 3)
    assert not live.gateway.loader.errors


async def test_successful_start_logs_no_warning(
    start: StartGateway, caplog: pytest.LogCaptureFixture
) -> None:
    """A successful start logs only the loaded market lists."""
    caplog.set_level(logging.INFO)
    await start()
    events = {
        record.levelname: record.message
        for record in caplog.records
        if record.name.startswith("src.")
    }
    assert events == {"INFO": "market list loaded"}


async def test_hanging_loads_leave_connections_for_other_calls(
    start: StartGateway, sandbox: Sandbox
) -> None:
    """Snapshots for streams and probes do not wait for MAX_CONCURRENT loads."""
    live = await start(max_concurrent=1)
    await sandbox.set("bybit", hang=True)
    hanging = asyncio.create_task(live.get("/ticker/BTC/USDT?exchange=bybit"))
    await eventually(lambda: sandbox.count("bybit") == 1)
    assert abs(await live.gateway.manager.clock_skew("binance")) < 1.1
    assert not hanging.done()
    await sandbox.set("bybit", rate_limit=-1)
    assert (await hanging).status_code == 200


async def tripped(
    start: StartGateway, sandbox: Sandbox, knobs: dict[str, Any], **settings: object
) -> Live:
    """Start a gateway. Open its breaker of Kraken with one request."""
    live = await start(cb_threshold=1, **settings)
    await sandbox.set("kraken", **({"rate_limit": -1} | knobs))
    for symbol in ("BTC/USDT", "ETH/USDT"):  # bad data of one market opens no breaker
        assert not (await live.get(f"/ticker/{symbol}?exchange=kraken")).is_success
    assert live.gateway.manager["kraken"].breaker.state == "open"
    sandbox.clear_counts()
    return live


@pytest.mark.parametrize(
    ("knobs", "seconds"),
    [
        ({"status": 500}, 60),
        ({"body": "junk"}, 60),
        ({"status": 429, "headers": {"Retry-After": "7"}}, 60),
        ({"status": 418, "headers": {"Retry-After": "300"}}, 300),
        ({"geo_block": True}, 900),
    ],
    ids=str,
)
async def test_breaker_closes_without_a_request(
    start: StartGateway, sandbox: Sandbox, clock: FakeClock, knobs: dict[str, Any], seconds: int
) -> None:
    """After the open time one cheap call closes the breaker and /health is healthy."""
    live = await tripped(start, sandbox, knobs)
    manager = live.gateway.manager
    breaker = manager["kraken"].breaker
    await sandbox.set("kraken", rate_limit=-1)
    clock.advance(seconds - 0.1)
    await manager.probe("kraken")
    assert (breaker.state, sandbox.count("kraken")) == ("open", 0)
    clock.advance(PROBE_DELAY_SECONDS)
    await manager.probe("kraken")
    assert (breaker.state, sandbox.count("kraken")) == ("half_open", 0), "requests come first"
    assert (await live.get("/health")).json()["status"] == "degraded"
    clock.advance(0.2)
    await eventually(lambda: breaker.state == "closed")
    assert (sandbox.count("kraken"), sandbox.count("kraken", "/0/public/Time")) == (1, 1)
    assert (await live.get("/health")).json()["status"] == "healthy"


async def test_failed_probes_double_the_open_time(
    start: StartGateway, sandbox: Sandbox, clock: FakeClock
) -> None:
    """A failed probe doubles the open time up to the maximum, without calls in between."""
    live = await tripped(start, sandbox, {"status": 500}, cb_max_open_seconds=240)
    breaker = live.gateway.manager["kraken"].breaker
    for calls, (seconds, then) in enumerate(((60, 120), (120, 240), (240, 240)), start=1):
        clock.advance(seconds - 1)
        await live.gateway.manager.probe("kraken")
        assert sandbox.count("kraken") == calls - 1
        clock.advance(1 + PROBE_DELAY_SECONDS)
        await eventually(lambda: breaker.retry_after == then)  # noqa: B023 - awaited at once
        assert sandbox.count("kraken") == calls


async def test_probe_does_not_shorten_the_open_time(
    start: StartGateway, sandbox: Sandbox, clock: FakeClock
) -> None:
    """The open time doubles until the exchange sends a price, even if it sends its time."""
    live = await tripped(start, sandbox, {"status": 500}, cb_max_open_seconds=600)
    breaker = live.gateway.manager["kraken"].breaker
    for seconds in (60, 120, 240):
        assert breaker.retry_after == seconds
        await sandbox.set("kraken", rate_limit=-1)
        clock.advance(seconds + PROBE_DELAY_SECONDS)
        await eventually(lambda: breaker.state == "closed")
        await sandbox.set("kraken", rate_limit=-1, status=500)
        assert not (await live.get("/ticker/BTC/USDT?exchange=kraken")).is_success
    await sandbox.set("kraken", rate_limit=-1)
    clock.advance(480)
    assert (await live.get("/ticker/BTC/USDT?exchange=kraken")).is_success
    await sandbox.set("kraken", rate_limit=-1, status=500)
    assert not (await live.get("/ticker/ETH/USDT?exchange=kraken")).is_success
    assert breaker.retry_after == 60


@pytest.mark.parametrize("reason", ["no budget", "no verdict"])
async def test_probe_without_a_verdict_is_repeated_after_the_reset_time(
    start: StartGateway, sandbox: Sandbox, clock: FakeClock, reason: str
) -> None:
    """A probe without budget or without a verdict is repeated after CB_RESET_SECONDS."""
    live = await tripped(start, sandbox, {"status": 500}, kraken_budget="10/60")
    manager = live.gateway.manager
    await sandbox.set(
        "kraken", rate_limit=-1, **({} if reason == "no budget" else {"body": REJECTED})
    )
    clock.advance(60)
    if reason == "no budget":
        await manager.limiter.correct("kraken", 20)
    clock.advance(PROBE_DELAY_SECONDS)
    calls = 0 if reason == "no budget" else 1
    await eventually(
        lambda: manager._probe_at["kraken"] > clock.monotonic() and not manager["kraken"].in_flight
    )
    clock.advance(59)
    await manager.probe("kraken")
    assert (manager["kraken"].breaker.state, sandbox.count("kraken")) == ("half_open", calls)
    await sandbox.set("kraken", rate_limit=-1)
    clock.advance(20)
    await eventually(lambda: manager["kraken"].breaker.state == "closed")
    assert sandbox.count("kraken") == calls + 1


async def test_probe_respects_the_hold_of_another_replica(
    start: StartGateway, sandbox: Sandbox, clock: FakeClock, redis: Any
) -> None:
    """No probe is sent to an exchange that banned another replica."""
    live = await tripped(start, sandbox, {"status": 500}, redis_url=redis.url)
    other = await start(redis_url=redis.url)
    await sandbox.set("kraken", status=418, headers={"Retry-After": "300"})
    await other.get("/ticker/BTC/USDT?exchange=kraken")
    await sandbox.set("kraken", rate_limit=-1)
    sandbox.clear_counts()
    breaker = live.gateway.manager["kraken"].breaker
    clock.advance(60 + PROBE_DELAY_SECONDS)
    await eventually(lambda: breaker.cause == "banned")
    assert 290 < breaker.retry_after <= 300
    assert sandbox.count("kraken") == 0


async def test_port_opens_with_the_first_list(
    start: StartGateway, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If all lists are late, the port opens with the first one."""
    monkeypatch.setattr(gateway, "START_SECONDS", 0.1)
    monkeypatch.setattr(gateway, "FIRST_LIST_SECONDS", 60)
    for name in ("bybit", "binance"):
        await sandbox.set(name, hang=True)
    await sandbox.set("kraken", latency_ms=500, rate_limit=-1)
    live = await start(wait=False)
    assert set(live.gateway.markets.loaded_at) == {"kraken"}
    assert not live.gateway.loader.errors, "the other lists are still loading"
    assert (await live.get("/ticker/BTC/USDT")).json()["exchange"] == "kraken"


async def test_restart_needs_no_upstream_call(
    start: StartGateway, sandbox: Sandbox, redis: Any
) -> None:
    """Recent market lists come from Redis, and every kind of data works with them."""
    await start(redis_url=redis.url, load_markets=True)
    await eventually(lambda: len(redis.client.keys("virtuoso:3:markets:*")) == 3)
    second = await start(redis_url=redis.url, load_markets=True)
    assert sum(sandbox.count(name) for name in EXCHANGES) == 0
    for name in EXCHANGES:
        for path in ("ticker", "orderbook", "ohlcv", "trades"):
            assert (
                await second.get(f"/{path}/BTC-USDT?exchange={name}&max_age=0")
            ).status_code == 200


async def test_swaps_work_from_a_snapshot(
    start: StartGateway, sandbox: Sandbox, redis: Any
) -> None:
    """Swaps need no field of a market that a snapshot leaves out."""
    await start(redis_url=redis.url, market_types="spot,swap", load_markets=True)
    await eventually(lambda: len(redis.client.keys("virtuoso:3:markets:*")) == 3)
    second = await start(redis_url=redis.url, market_types="spot,swap", load_markets=True)
    for name in ("bybit", "binance"):
        for path in ("ticker", "orderbook", "ohlcv", "trades"):
            assert (
                await second.get(f"/{path}/BTC-USDT:USDT?exchange={name}&max_age=0")
            ).status_code == 200
    assert sandbox.count("binance", "exchangeInfo") + sandbox.count("bybit", "instruments") == 0


async def test_old_snapshot_is_replaced(
    start: StartGateway, sandbox: Sandbox, redis: Any, clock: FakeClock
) -> None:
    """After the refresh time, the list is requested from the exchange."""
    first = await start(redis_url=redis.url, load_markets=True)
    await eventually(lambda: len(redis.client.keys("virtuoso:3:markets:*")) == 3)
    await first.gateway.loader.close()  # its background tasks could refresh the list, too
    clock.advance(3601)
    await first.gateway.loader.load("bybit")
    assert sandbox.count("bybit", "instruments") == 1


def packed(document: Any) -> bytes:
    return zlib.compress(orjson.dumps(document))


MARKET = {"id": "XY", "symbol": "X/Y", "base": "X", "quote": "Y", "type": "spot"}
MARKET |= {"ws_name": "XY", "status": "online", "state": "quoted"}
SNAPSHOT = {"format": SNAPSHOT_FORMAT, "loaded_at": 1.0, "markets": [MARKET]}


@pytest.mark.parametrize(
    "snapshot",
    [
        b"junk", b"", packed(SNAPSHOT)[:-9], zlib.compress(b"junk"), packed([]), packed({}),
        packed("text"),
        packed({"loaded_at": 1.0, "markets": [MARKET | {"info": {}}]}),
        packed(SNAPSHOT | {"format": SNAPSHOT_FORMAT + 1}),
        packed(SNAPSHOT | {"loaded_at": None}),
        packed(SNAPSHOT | {"markets": []}),
        packed(SNAPSHOT | {"markets": [{"symbol": "X/Y"}]}),
        packed(SNAPSHOT | {"markets": [MARKET | {"symbol": 7}]}),
        packed(SNAPSHOT | {"markets": [MARKET, "text"]}),
    ],
    ids=["junk", "empty", "cut", "no json", "list", "no members", "text", "older format",
         "newer format",
         "no time", "no markets", "no id", "no symbol", "no market"],
)  # fmt: skip
async def test_unusable_snapshot_is_ignored_and_replaced(
    start: StartGateway, sandbox: Sandbox, redis: Any, snapshot: bytes
) -> None:
    """A broken snapshot, or one of another format, is replaced by one from the exchange."""
    redis.client.set("virtuoso:3:markets:{kraken}:spot", snapshot)
    live = await start(
        redis_url=redis.url, bybit_enabled=False, binance_enabled=False, load_markets=True
    )
    assert live.gateway.markets.count("kraken") > 10
    await eventually(lambda: redis.client.get("virtuoso:3:markets:{kraken}:spot") != snapshot)
    assert (
        await restore_markets(live.gateway.manager["kraken"].client, packed(SNAPSHOT)) is not None
    )


async def test_long_market_list_is_parsed_outside_the_gateway(clock: FakeClock) -> None:
    """A child parses 2,000 markets, and other tasks run while they are restored."""
    big = Sandbox(now=clock.time, filler=2000)
    await big.start()
    settings = make_settings(big)
    try:
        started = time.process_time()
        child_started = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
        snapshot = await MarketReader(settings).read(
            "kraken", Answer(max_bytes=MAX_MARKETS_BYTES), 7.0
        )
        seconds = time.process_time() - started  # includes the work of the sandbox
        child_seconds = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - child_started
    finally:
        await big.stop()
    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    counter = asyncio.create_task(count())
    loaded = await restore_markets(client_of("kraken", settings), snapshot)
    counter.cancel()
    assert loaded is not None
    assert (loaded.loaded_at, len(loaded.markets)) == (7.0, 2043)
    assert seconds < child_seconds / 2
    assert turns >= 2
    assert len(snapshot) < 100_000


def client_of(name: str, settings: Settings, *, has_sockets: bool = False) -> Any:
    """Return a client that is never connected."""
    options = ClientOptions.from_settings(name, settings)
    return make_client(options, None, has_sockets=has_sockets)  # type: ignore[arg-type]


def readers() -> list[tuple[int, str]]:
    """Return the number and command line of each child process that reads a market list."""
    return [
        (number, command)
        for number, command in children(os.getpid()).items()
        if "market_reader" in command
    ]


def environment_of(number: int) -> bytes:
    return Path(f"/proc/{number}/environ").read_bytes()


async def test_child_has_no_secret_and_starts_with_safe_path(
    start: StartGateway, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The child's environment contains no setting, and PYTHONSAFEPATH does not break it."""
    names = ("BYBIT_API_SECRET", "KRAKEN_KEY", "ADMIN_TOKEN", "REDIS_URL")
    for name in names:
        monkeypatch.setenv(name, "canary-value")
    monkeypatch.setenv("PYTHONSAFEPATH", "1")
    await sandbox.set("kraken", hang=True)
    await start(wait=False)
    await eventually(lambda: sandbox.count("kraken"))
    ((number, _),) = readers()
    assert b"PYTHONSAFEPATH=1" in environment_of(number)
    assert b"canary-value" not in environment_of(number)


async def test_cancelled_load_leaves_no_process(start: StartGateway, sandbox: Sandbox) -> None:
    """A shutdown ends a waiting child, whose command line contains no secret."""
    await sandbox.set("kraken", hang=True)
    proxy = "http://user:canary@127.0.0.1:1"
    live = await start(
        wait=False,
        kraken_api_key="canary-key",
        kraken_api_secret="canary-secret",
        https_proxy=proxy,
    )
    await eventually(lambda: sandbox.count("kraken") and len(live.gateway.markets.loaded_at) == 2)
    ((_, command),) = readers()
    assert "canary" not in command
    await live.gateway.loader.close()
    assert readers() == []


async def test_dead_child_is_no_failure_of_the_exchange(
    start: StartGateway, sandbox: Sandbox, clock: FakeClock, caplog: pytest.LogCaptureFixture
) -> None:
    """The load fails as an internal error; the breaker stays closed and the old list stays."""
    live = await start(cb_threshold=1)
    await sandbox.set("kraken", hang=True)
    clock.advance(3601)
    load = asyncio.create_task(live.gateway.loader.load("kraken"))
    await eventually(lambda: sandbox.count("kraken"))
    ((number, _),) = readers()
    os.kill(number, signal.SIGKILL)
    with pytest.raises(InternalError):
        await load
    await eventually(lambda: "market reader failed" in caplog.messages)
    assert live.gateway.manager["kraken"].breaker.state == "closed"
    assert live.gateway.markets.count("kraken") > 10


@pytest.mark.parametrize(
    ("knobs", "code", "cause", "seconds"),
    [
        (
            {"status": 429, "headers": {"Retry-After": "77"}},
            "exchange_rate_limited",
            "rate_limited",
            77,
        ),
        ({"status": 418, "headers": {"retry-after": "300"}}, "exchange_banned", "banned", 300),
        ({"geo_block": True}, "geo_blocked", "geo_blocked", 900),
    ],
    ids=str,
)
async def test_refused_market_list_opens_the_breaker(
    start: StartGateway,
    sandbox: Sandbox,
    knobs: dict[str, Any],
    code: str,
    cause: str,
    seconds: int,
) -> None:
    """Status and Retry-After reach the breaker from the process that saw them."""
    await sandbox.set("binance", **knobs)
    live = await start(wait=False)
    await eventually(lambda: live.gateway.loader.errors.get("binance") == code)
    breaker = live.gateway.manager["binance"].breaker
    assert (breaker.state, breaker.cause) == ("open", cause)
    assert breaker.retry_after == pytest.approx(seconds, abs=1)


async def test_headers_of_a_market_list_correct_the_budget(
    start: StartGateway, sandbox: Sandbox
) -> None:
    """The child returns the headers of the response, regardless of the case of their names."""
    await sandbox.set("binance", rate_limit=-1, headers={"x-mbx-used-weight-1m": "5000"})
    live = await start(load_markets=True)
    assert (await live.get("/exchanges")).json()["binance"]["budget_used_ratio"] > 0.8


@pytest.mark.parametrize(
    ("knobs", "text"),
    [
        ({"redirect": "http://127.0.0.1:1/"}, "it sent a redirect"),
        ({"size": 2_000_000}, "its response is too long"),
        ({"refuse": True}, "no connection"),
        ({"body": '{"error":["EService:Unavailable"]}'}, "is unavailable"),
    ],
    ids=str,
)
async def test_child_checks_responses_like_the_gateway(
    sandbox: Sandbox, knobs: dict[str, Any], text: str
) -> None:
    """The child limits bodies, refuses redirects and describes the failure."""
    await sandbox.set("kraken", **knobs)
    with pytest.raises(UpstreamError, match=text):
        await MarketReader(make_settings(sandbox)).read("kraken", Answer(max_bytes=1_000_000), 1.0)


async def test_hanging_market_list_does_not_delay_the_others(
    start: StartGateway, sandbox: Sandbox
) -> None:
    """One process reads all lists concurrently, and ends with the last one."""
    await sandbox.set("bybit", hang=True)
    await sandbox.set("binance", status=503)
    live = await start(wait=False)
    await eventually(lambda: live.gateway.markets.count("kraken") and live.gateway.loader.errors)
    assert live.gateway.loader.errors == {"binance": "exchange_unavailable"}
    assert len(readers()) == 1
    await sandbox.reset()
    await eventually(lambda: len(live.gateway.markets.loaded_at) == 3)
    await eventually(lambda: not readers())


async def test_child_ends_with_the_gateway(sandbox: Sandbox) -> None:
    """The end of the gateway closes the child's stdin, upon which a waiting child exits."""
    await sandbox.set("kraken", hang=True)
    options = ClientOptions.from_settings("kraken", make_settings(sandbox))
    child = await asyncio.create_subprocess_exec(
        *market_reader.CHILD, cwd=ROOT, stdin=subprocess.PIPE
    )
    assert child.stdin is not None
    child.stdin.write(pickle.dumps((1, options, 1000, 1.0)))
    await eventually(lambda: sandbox.count("kraken"))
    assert child.returncode is None
    child.stdin.close()
    assert await child.wait() == 0


async def test_child_reads_the_same_list_as_this_process(sandbox: Sandbox) -> None:
    """Read in this process or in a child, the list is the same."""
    settings = make_settings(sandbox, market_types="spot,swap")
    for name in EXCHANGES:
        expected = await load_snapshot(
            ClientOptions.from_settings(name, settings), Answer(max_bytes=MAX_MARKETS_BYTES), 1.0
        )
        assert (
            await MarketReader(settings).read(name, Answer(max_bytes=MAX_MARKETS_BYTES), 1.0)
            == expected
        )


def test_new_list_replaces_the_old_one_and_raises_the_version() -> None:
    """Each replacement raises the version; suggestions come from the current lists."""
    markets = Markets(EXCHANGES, ("spot",))

    def listed(*bases: str) -> list[dict[str, Any]]:
        return [
            MARKET | {"symbol": f"{base}/USDT", "base": base, "quote": "USDT"} for base in bases
        ]

    assert markets.version == 0
    markets.replace("bybit", listed("ABC", "ABD"), 1.0)
    markets.replace("kraken", listed("ABC", "XYZ"), 1.0)
    assert markets.suggestions("ABC/USD") == ["ABC/USDT"]
    markets.replace("bybit", listed("ABD"), 2.0)
    assert (markets.version, markets.loaded_at["bybit"]) == (3, 2.0)
    assert markets.suggestions("ABC/USD") == ["ABC/USDT"]
    markets.replace("kraken", listed("XYZ"), 2.0)
    assert markets.suggestions("ABC/USD") == ["ABD/USDT"]


@pytest.mark.parametrize(
    "body",
    [
        '{"error":[],"result":{}}',
        '{"error":[],"result":{"X":{"altname":7}}}',
        "[1, 2",
        "<html>",
        "",
    ],
)
async def test_empty_or_broken_market_list_is_refused(
    start: StartGateway, sandbox: Sandbox, clock: FakeClock, body: str
) -> None:
    """An unusable list is bad data. The old list stays."""
    live = await start()
    clock.advance(3601)
    await sandbox.set("kraken", body=body)
    with pytest.raises(BadUpstreamData):
        await live.gateway.loader.load("kraken")
    assert live.gateway.markets.count("kraken") > 10


@pytest.mark.parametrize(
    ("knobs", "words"),
    [
        ({"refuse": True}, "no connection: refused or unreachable"),
        ({"reset": True}, "the connection was cut"),
        ({"status": 500}, "status 500"),
        ({"size": 10_000_000}, "its response is too long"),
        ({"redirect": "http://127.0.0.1:1/"}, "it sent a redirect"),
        ({"hang": True}, "it did not respond in time"),
        ({"body": "<html>"}, "an empty or foreign body"),
    ],
    ids=str,
)
async def test_error_and_log_describe_the_network_failure(
    start: StartGateway,
    sandbox: Sandbox,
    caplog: pytest.LogCaptureFixture,
    knobs: dict[str, Any],
    words: str,
) -> None:
    """Refused and cut connections, timeouts and junk differ in the response and the log."""
    live = await start(exchange_timeout_seconds=1.5 if knobs.keys() & {"hang", "drip"} else 30)
    await sandbox.set("binance", rate_limit=-1, **knobs)
    with caplog.at_level("INFO", "src.exchanges.manager"):
        assert words in (await live.get("/ticker/BTC/USDT?exchange=binance")).json()["detail"]
    assert words in next(
        vars(record)["reason"] for record in caplog.records if record.message == "exchange asked"
    )


def test_addresses_can_be_replaced() -> None:
    """A setting replaces scheme, host and port of every URL; its path goes in front."""
    settings = make_settings(
        bybit_rest_url="http://localhost:9/x", bybit_ws_url="ws://localhost:8",
        binance_rest_url="https://data-api.binance.vision",
        https_proxy="http://user:canary@proxy:3128",
    )  # fmt: skip
    bybit = client_of("bybit", settings)
    assert bybit.urls["api"]["public"] == "http://localhost:9/x"
    assert bybit.aiohttp_proxy is None
    assert client_of("bybit", settings, has_sockets=True).wss_proxy is None
    binance = client_of("binance", settings)
    assert binance.urls["api"]["public"] == "https://data-api.binance.vision/api/v3"
    assert binance.aiohttp_proxy == "http://user:canary@proxy:3128"
    assert client_of("kraken", settings).urls["api"]["public"] == "https://api.kraken.com"
    assert client_of("kraken", settings, has_sockets=True).wss_proxy == binance.aiohttp_proxy
    assert "canary" not in repr(settings)


async def test_calls_use_the_configured_proxy(
    start: StartGateway, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """HTTPS_PROXY is used with its credentials, which appear in no log."""
    requests: list[bytes] = []

    async def proxy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        requests.append(await reader.readuntil(b"\r\n\r\n"))
        writer.write(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n")
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(proxy, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        with caplog.at_level("DEBUG"):
            live = await start(
                wait=False,
                bybit_enabled=False,
                binance_enabled=False,
                kraken_rest_url="https://exchange.invalid",
                https_proxy=f"http://user:canary@127.0.0.1:{port}",
            )
            await eventually(lambda: live.gateway.loader.errors)
    assert requests[0].startswith(b"CONNECT exchange.invalid:443")
    assert b"Proxy-Authorization: Basic " in requests[0]
    assert "the proxy refused" in str([vars(record).get("reason") for record in caplog.records])
    assert "canary" not in caplog.text + "".join(capfd.readouterr())


async def test_calls_are_counted_by_exchange_operation_and_outcome(
    start: StartGateway, sandbox: Sandbox
) -> None:
    """Each upstream call is counted with its outcome."""
    live = await start()
    before = {
        outcome: sample(
            "exchange_requests_total", exchange="kraken", operation="ticker", outcome=outcome
        )
        for outcome in ("success", "bad_data")
    }
    await live.get("/ticker/BTC/USDT?exchange=kraken")
    await sandbox.set("kraken", body="junk")
    await live.get("/ticker/ETH/USDT?exchange=kraken")
    for outcome, count in before.items():
        assert (
            sample(
                "exchange_requests_total", exchange="kraken", operation="ticker", outcome=outcome
            )
            == count + 1
        )


async def test_market_without_a_price_does_not_trip_the_breaker(
    start: StartGateway, sandbox: Sandbox
) -> None:
    """A market that never traded is not requested again, and keeps the breaker closed."""
    live = await start(cb_threshold=1)
    ticker = {"symbol": "BTCUSDT", "lastPrice": "0.00", "volume": "0.00", "closeTime": 1}
    await sandbox.set("binance", body=json.dumps(ticker), rate_limit=-1)
    for _ in range(3):
        answer = await live.get("/ticker/BTC/USDT?exchange=binance")
        assert (answer.status_code, answer.json()["code"]) == (503, "market_halted")
    assert sandbox.count("binance", "24hr") == 1
    assert live.gateway.manager["binance"].breaker.state == "closed"


async def test_invalid_header_values_are_ignored(start: StartGateway, sandbox: Sandbox) -> None:
    """Characters that resemble digits are ignored in good and in bad responses."""
    live = await start()
    await sandbox.set("binance", rate_limit=-1, headers={"X-MBX-USED-WEIGHT-1M": "\u00b2"})
    assert (await live.get("/ticker/BTC/USDT?exchange=binance")).status_code == 200
    await sandbox.set("binance", rate_limit=-1, status=429, headers={"Retry-After": "\u00b2"})
    assert (await live.get("/ticker/ETH/USDT?exchange=binance")).json()["retry_after"] == 60


async def with_delisted(start: StartGateway, sandbox: Sandbox, name: str) -> tuple[Live, list[str]]:
    """Start a gateway whose list has SOL/USDT, which the exchange no longer knows.

    Returns also the exchanges whose market list was requested again.
    """
    live = await start()
    refreshed: list[str] = []
    live.gateway.manager.pauses.on_unknown_symbol = refreshed.append
    await sandbox.set(name, rate_limit=-1, delisted=["SOLUSDT"])
    return live, refreshed


@pytest.mark.parametrize(("name", "calls"), [("kraken", 1), ("bybit", 1), ("binance", 7)])
async def test_delisted_symbol_does_not_fail_a_batch(
    start: StartGateway, sandbox: Sandbox, name: str, calls: int
) -> None:
    """The other tickers come from the same answer. The delisted one is unknown, and remembered."""
    live, refreshed = await with_delisted(start, sandbox, name)
    bases = ["BTC", "ETH", "XRP", "ADA", "DOGE", "LTC", "LINK"]
    others = [f"{base}/USDT" for base in bases]
    path = f"/tickers?exchange={name}&symbols={','.join(others)},SOL/USDT"
    for expected in (calls, calls + 1):  # then only the other symbols are requested
        batch = (await live.get(path + "&max_age=0")).json()
        assert sorted(batch["tickers"]) == sorted(others)
        problems = {symbol: problem["code"] for symbol, problem in batch["errors"].items()}
        assert problems == {"SOL/USDT": "unknown_symbol"}
        assert sandbox.count(name) == expected
    assert set(refreshed) == {name}
    assert live.gateway.manager[name].breaker.state == "closed"


@pytest.mark.parametrize("name", EXCHANGES)
async def test_delisted_symbols_alone_are_unknown(
    start: StartGateway, sandbox: Sandbox, name: str
) -> None:
    """A single request is a 404 that costs one call until NEGATIVE_TTL_SECONDS have passed."""
    live, refreshed = await with_delisted(start, sandbox, name)
    for _ in range(6):
        answer = await live.get(f"/ticker/SOL/USDT?exchange={name}&max_age=0")
        assert (answer.status_code, answer.json()["code"]) == (404, "unknown_symbol")
    assert (sandbox.count(name), refreshed) == (1, [name])
    assert (await live.get("/ticker/BTC/USDT?exchange=" + name)).status_code == 200


async def test_ban_of_one_replica_stops_all_replicas(
    start: StartGateway, sandbox: Sandbox, redis: Any
) -> None:
    """A ban of one gateway also stops another gateway on the same Redis."""
    banned = await start(redis_url=redis.url)
    other = await start(redis_url=redis.url)
    await sandbox.set("bybit", status=418, headers={"Retry-After": "300"})
    await banned.get("/ticker/BTC/USDT?exchange=bybit")
    sandbox.clear_counts()
    problem = (await other.get("/ticker/ETH/USDT?exchange=bybit")).json()
    assert (problem["code"], problem["retry_after"]) == ("exchange_banned", 300)
    assert (await other.get("/exchanges")).json()["bybit"]["breaker"]["cause"] == "banned"
    assert sandbox.count("bybit") == 0


async def test_replicas_behind_a_hanging_exchange_both_fall_back(
    start: StartGateway, sandbox: Sandbox, redis: Any
) -> None:
    """A replica that waits for another's load also falls back in time."""
    settings = {
        "redis_url": redis.url,
        "exchange_timeout_seconds": 5,
        "request_timeout": 9,
        "clock": SystemClock(),
    }
    replicas = [await start(**settings) for _ in range(2)]
    await sandbox.set("bybit", hang=True)
    answers = await asyncio.gather(*(live.get("/ticker/BTC/USDT") for live in replicas))
    assert [(answer.status_code, answer.json()["exchange"]) for answer in answers] == [
        (200, "binance")
    ] * 2


async def test_close_closes_the_session_and_works_before_start(
    sandbox: Sandbox, clock: FakeClock
) -> None:
    """A manager can be closed before its start, and has no open session afterwards."""
    manager = ExchangeManager(make_settings(sandbox), RedisStore("", clock), clock)
    await manager.close()
    await manager.start()
    session = manager._session
    assert session is not None
    assert not session.closed
    await manager.close()
    assert session.closed
