"""The edge to the exchanges: what their faults become, what they cost, and that nothing secret or signed leaves."""

import asyncio
import inspect
import json
import logging
import os
import resource
import signal
import subprocess
import sys
import time
import zlib
from itertools import pairwise
from pathlib import Path
from typing import Any

import ccxt
import orjson
import pytest

from src import gateway
from src.core import background
from src.core.clock import SystemClock
from src.core.errors import BadUpstreamData, GatewayError, InternalError, UpstreamError
from src.exchanges import market_loader
from src.exchanges.ccxt_client import (
    SNAPSHOT_FORMAT,
    TRANSLATION,
    load_snapshot,
    make_client,
    restore_markets,
    translate,
)
from src.exchanges.http_client import MAX_MARKETS_BYTES, Answer
from src.exchanges.manager import PROBE_DELAY_SECONDS, ExchangeManager, weight_of
from src.exchanges.market_reader import MarketReader
from src.exchanges.markets import Markets
from src.sandbox.server import Sandbox
from src.store.redis import RedisStore
from tests.conftest import FakeClock, Live, StartGateway, eventually, make_settings, recordings, sample
from tests.processes import children

ROOT = Path(__file__).parents[2]
EXCHANGES = ["bybit", "binance", "kraken"]
REJECTED = '{"error":["EGeneral:Invalid arguments"]}'
CCXT_ERRORS = [error for _, error in inspect.getmembers(ccxt, inspect.isclass) if issubclass(error, ccxt.BaseError)]


@pytest.mark.parametrize("error", CCXT_ERRORS, ids=lambda error: error.__name__)
def test_every_error_ccxt_has_is_translated_without_its_text(error: type[Exception]) -> None:
    """Whatever class a release of ccxt raises, ours comes out, and no word of the foreign one."""
    ours = translate("kraken", error("https://secret.example/?signature=abc\r\nevil"), Answer())
    assert isinstance(ours, GatewayError)
    assert ours.exchange == "kraken"
    assert "secret" not in ours.detail
    assert "\n" not in ours.detail


@pytest.mark.parametrize("error", [ValueError, KeyError, AttributeError, TimeoutError, ConnectionError])
def test_an_error_of_no_library_is_bad_upstream_data_or_a_timeout(error: type[Exception]) -> None:
    """ccxt's parsers stumble over junk in many ways; each is the exchange's failure, none a 500."""
    ours = translate("bybit", error("junk"), Answer())
    assert isinstance(ours, UpstreamError)
    assert ours.code == ("exchange_timeout" if error is TimeoutError else "bad_upstream_data")


def test_the_nearest_ancestor_decides() -> None:
    """Each class of the table stands for itself, whatever the order of the table."""
    for foreign, ours in TRANSLATION.items():
        if foreign is not Exception and issubclass(foreign, ccxt.BaseError):
            assert type(translate("bybit", foreign("x"), Answer())) is ours


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
        ({"status": 403, "body": '{"error":["denied"]}'}, 451, "geo_blocked"),
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
async def test_what_the_exchange_does_decides_what_the_client_reads(
    start: StartGateway, sandbox: Sandbox, name: str, knobs: dict[str, Any], status: int, code: str
) -> None:
    """Each fault has its own status and code on every exchange, is never cached, and is never a 500."""
    live = await start(exchange_timeout_seconds=1.5 if knobs.keys() & {"hang", "drip"} else 30)
    await sandbox.set(name, rate_limit=-1, only="icker", **knobs)
    answer = await live.get(f"/ticker/BTC/USDT?exchange={name}")
    assert (answer.status_code, answer.json()["code"]) == (status, code), answer.text
    assert answer.json()["exchange"] == name
    assert answer.headers["cache-control"] == "no-store"
    assert "127.0.0.1" not in answer.text
    await sandbox.reset()
    live.gateway.manager[name].breaker.reset()
    assert (await live.get(f"/ticker/BTC/USDT?exchange={name}")).status_code == 200


@pytest.mark.parametrize(
    ("knobs", "cause", "seconds"),
    [
        ({"status": 429, "headers": {"Retry-After": "7"}}, "rate_limited", 7),
        ({"status": 429}, "rate_limited", 60),
        ({"status": 418, "headers": {"Retry-After": "300"}}, "banned", 300),
        ({"status": 418}, "banned", 120),
        ({"status": 403, "body": '{"retCode":10018,"retMsg":"access too frequent"}'}, "rate_limited", 600),
        ({"geo_block": True}, "geo_blocked", 900),
    ],
    ids=str,
)
async def test_a_limit_or_block_opens_the_breaker_at_once_for_as_long_as_it_says(
    start: StartGateway, sandbox: Sandbox, clock: FakeClock, knobs: dict[str, Any], cause: str, seconds: int
) -> None:
    """One 429, 418 or geo-block is enough: the breaker opens with its cause, for as long as Retry-After says."""
    live = await start(cb_reset_seconds=30)
    await sandbox.set("bybit", only="tickers", **knobs)
    first = await live.get("/ticker/BTC/USDT?exchange=bybit")
    told = first.json()["retry_after"]
    breaker = (await live.get("/exchanges")).json()["bybit"]["breaker"]
    assert (breaker["state"], breaker["cause"]) == ("open", cause)
    assert (breaker["retry_at"] - breaker["opened_at"]) / 1000 == pytest.approx(seconds, abs=1.1)
    assert told == pytest.approx(seconds, abs=1)
    clock.advance(seconds - 1.5)
    await live.get("/ticker/BTC/USDT?exchange=bybit")
    assert sandbox.count("bybit", "tickers") == 1
    await sandbox.reset()
    clock.advance(2)
    assert (await live.get("/ticker/BTC/USDT?exchange=bybit")).status_code == 200


async def test_a_retry_after_may_be_a_date(start: StartGateway, sandbox: Sandbox) -> None:
    """Both forms of Retry-After are read."""
    live = await start()
    await sandbox.set("binance", status=429, headers={"Retry-After": "Wed, 01 Jan 2020 00:00:00 GMT"})
    answer = await live.get("/ticker/BTC/USDT?exchange=binance")
    assert answer.json()["retry_after"] == 1


async def test_a_geo_block_answers_451_while_the_breaker_is_open(start: StartGateway, sandbox: Sandbox) -> None:
    """A pinned client of a blocked exchange reads why, with the cause, and the others still answer for it."""
    live = await start()
    await sandbox.set("bybit", geo_block=True)
    answers = [await live.get("/ticker/BTC/USDT?exchange=bybit") for _ in range(3)]
    assert {(answer.status_code, answer.json()["code"]) for answer in answers} == {(451, "geo_blocked")}
    assert sandbox.count("bybit", "tickers") == 1
    assert (await live.get("/ticker/BTC/USDT")).json()["exchange"] == "binance"


async def test_no_signed_request_is_made_even_with_keys(start: StartGateway, sandbox: Sandbox) -> None:
    """Keys are handed to the client, and still every request is a plain public GET without key or signature."""
    keys = {f"{name}_{part}": f"canary-{name}-{part}" for name in EXCHANGES for part in ("api_key", "api_secret")}
    live = await start(**keys)
    for name in EXCHANGES:
        for path in ("ticker/BTC-USDT", "orderbook/BTC-USDT", "ohlcv/BTC-USDT", "trades/BTC-USDT"):
            assert (await live.get(f"/{path}?exchange={name}")).status_code == 200
    await live.get("/tickers?symbols=BTC/USDT,ETH/USDT&exchange=all")
    for name in EXCHANGES:
        assert live.gateway.manager[name].client.apiKey == f"canary-{name}-api_key"
        seen = str(sandbox.requests[name]).lower()
        assert sandbox.requests[name]
        assert not [
            word for word in ("canary", "signature", "x-bapi-api-key", "api-sign", "mbx-apikey") if word in seen
        ]


@pytest.mark.parametrize("name", EXCHANGES)
async def test_every_kind_of_data_comes_from_every_exchange(start: StartGateway, sandbox: Sandbox, name: str) -> None:
    """Ticker, order book, candles, trades and time work on all three, one call each, with what a client expects."""
    live = await start()
    book = (await live.get(f"/orderbook/BTC-USDT?exchange={name}&limit=7")).json()
    assert (len(book["bids"]), len(book["asks"])) == (7, 7)
    assert book["bids"][0][0] < book["asks"][0][0]
    candles = (await live.get(f"/ohlcv/BTC-USDT?exchange={name}&timeframe=1h&limit=5")).json()["candles"]
    assert [later[0] - earlier[0] for earlier, later in pairwise(candles)] == [3_600_000] * 4
    trades = (await live.get(f"/trades/BTC-USDT?exchange={name}&limit=5")).json()["trades"]
    assert len(trades) == 5
    assert {trade["side"] for trade in trades} <= {"buy", "sell"}
    assert abs(await live.gateway.manager.clock_skew(name)) < 1.1
    assert sandbox.count(name) == 4


async def test_swaps_are_listed_when_asked_for(start: StartGateway, sandbox: Sandbox) -> None:
    """With MARKET_TYPES=spot,swap linear perpetuals answer beside spot, alone and in a batch."""
    live = await start(market_types="spot,swap")
    swap = (await live.get("/ticker/btc-usdt:usdt")).json()
    assert (swap["symbol"], swap["exchange"]) == ("BTC/USDT:USDT", "bybit")
    both = (await live.get("/tickers?symbols=BTC/USDT,BTC/USDT:USDT,ETH/USDT:USDT&exchange=binance")).json()
    assert sorted(both["tickers"]) == ["BTC/USDT", "BTC/USDT:USDT", "ETH/USDT:USDT"]
    assert both["errors"] == {}
    book = (await live.get("/orderbook/BTC/USDT:USDT?exchange=binance&limit=7")).json()
    assert (len(book["bids"]), len(book["asks"])) == (7, 7)
    assert "limit=10" in str(live_requests(sandbox))


def live_requests(sandbox: Sandbox) -> list[str]:
    """The order books binance was asked for."""
    return [path for path, _ in sandbox.requests["binance"] if "depth" in path]


async def test_swaps_are_unknown_otherwise(start: StartGateway) -> None:
    """Spot is the default: a swap is no listed symbol then."""
    assert (await (await start()).get("/ticker/BTC/USDT:USDT")).status_code == 404


def test_request_weights_are_those_binance_documents() -> None:
    """A list of tickers and a deep book cost more; the other exchanges count calls."""
    assert [weight_of("binance", "tickers", count) for count in (1, 20, 21, 100)] == [2, 2, 40, 40]
    assert [weight_of("binance", "orderbook", limit) for limit in (5, 100, 101, 500)] == [5, 5, 25, 25]
    assert [weight_of("binance", kind) for kind in ("ticker", "ohlcv", "trades", "markets")] == [2, 2, 4, 20]
    assert [weight_of("binance", kind, symbol="BTC/USDT:USDT") for kind in ("ticker", "tickers")] == [
        3,
        100,
    ]  # 2.5 times 1 and 40
    assert weight_of("bybit", "tickers", 100) == weight_of("kraken", "orderbook", 200) == 1


async def test_the_exchanges_own_count_corrects_the_budget(start: StartGateway, sandbox: Sandbox) -> None:
    """Used weight that others on this address caused counts here too, once a header tells of it."""
    live = await start(redis_host="")
    await sandbox.set("binance", rate_limit=-1, headers={"X-MBX-USED-WEIGHT-1M": "5000"})
    await live.get("/ticker/BTC/USDT?exchange=binance")
    assert (await live.get("/exchanges")).json()["binance"]["budget_used_ratio"] == pytest.approx(
        5000 / 6000, abs=0.001
    )
    await sandbox.set("bybit", rate_limit=-1, headers={"X-Bapi-Limit-Status": "0"})
    await live.get("/ticker/BTC/USDT?exchange=bybit")
    assert (await live.get("/exchanges")).json()["bybit"]["budget_used_ratio"] == 1


async def test_a_spent_budget_falls_through_or_tells_how_long(
    start: StartGateway, sandbox: Sandbox, clock: FakeClock
) -> None:
    """Past the budget the next exchange answers; a pinned one answers 503 with the seconds, and never asks upstream."""
    live = await start(bybit_budget="2/10")
    assert [(await live.get(f"/ticker/{base}/USDT")).json()["exchange"] for base in ("BTC", "ETH", "SOL")] == [
        "bybit", "bybit", "binance",
    ]  # fmt: skip
    pinned = await live.get("/ticker/XRP/USDT?exchange=bybit")
    assert (pinned.status_code, pinned.json()["code"]) == (503, "budget_spent")
    assert int(pinned.headers["retry-after"]) == pinned.json()["retry_after"] <= 11
    assert sandbox.count("bybit", "tickers") == 2
    clock.advance(pinned.json()["retry_after"])
    assert (await live.get("/ticker/XRP/USDT?exchange=bybit")).status_code == 200


async def test_an_exchange_that_cannot_be_loaded_stops_nobody(
    start: StartGateway, sandbox: Sandbox, clock: FakeClock
) -> None:
    """Start-up goes on, the others answer, health says which is missing, and it is there once it works again."""
    await sandbox.set("bybit", status=500)
    live = await start(wait=False)
    await eventually(lambda: len(live.gateway.markets.loaded_at) == 2 and "bybit" in live.gateway.loader.errors)
    assert (await live.get("/ticker/BTC/USDT")).json()["exchange"] == "binance"
    health = (await live.get("/health")).json()
    assert (health["status"], health["parts"]["markets"]["reason"]) == ("degraded", "not loaded: bybit")
    only_there = await live.get("/ticker/BTC/USDT?exchange=bybit")
    assert (only_there.status_code, only_there.json()["code"]) == (503, "markets_loading")
    await sandbox.set("bybit", rate_limit=-1)
    await eventually(lambda: "bybit" in live.gateway.markets.loaded_at)


async def test_a_market_list_is_read_again_after_an_error_of_ours(
    start: StartGateway, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """An unexpected error while a list is read is logged, counted and shown, and the list is read again."""
    monkeypatch.setattr(background, "_logged_at", {})
    before = sample("internal_errors_total", component="markets")
    with monkeypatch.context() as broken:
        broken.setattr(market_loader, "adopt_markets", None)
        live = await start(wait=False)
        shown = (await live.get("/exchanges")).json()
        assert {shown[name]["markets"]["error"] for name in EXCHANGES} == {"internal_error"}
    assert sample("internal_errors_total", component="markets") >= before + 3
    assert "TypeError" in next(record.exc_text or "" for record in caplog.records if hasattr(record, "component"))
    await eventually(lambda: len(live.gateway.markets.loaded_at) == 3)
    assert not live.gateway.loader.errors


async def test_a_list_that_loads_is_no_warning(start: StartGateway, caplog: pytest.LogCaptureFixture) -> None:
    """A start at which all goes well logs nothing from warnings on."""
    caplog.set_level(logging.INFO)
    await start()
    events = {record.levelname: record.message for record in caplog.records if record.name.startswith("src.")}
    assert events == {"INFO": "market list loaded"}


async def test_loads_that_hang_leave_connections_to_other_calls(start: StartGateway, sandbox: Sandbox) -> None:
    """Calls beside the loads, such as snapshots for streams and probes, do not wait for MAX_CONCURRENT loads."""
    live = await start(max_concurrent=1)
    await sandbox.set("bybit", hang=True)
    hanging = asyncio.create_task(live.get("/ticker/BTC/USDT?exchange=bybit"))
    await eventually(lambda: sandbox.count("bybit") == 1)
    assert abs(await live.gateway.manager.clock_skew("binance")) < 1.1
    assert not hanging.done()
    await sandbox.set("bybit", rate_limit=-1)
    assert (await hanging).status_code == 200


# Breakers that nobody tries.


async def tripped(start: StartGateway, sandbox: Sandbox, knobs: dict[str, Any], **settings: object) -> Live:
    """A gateway whose breaker of kraken was opened by one request; no request follows."""
    live = await start(cb_threshold=1, **settings)
    await sandbox.set("kraken", **({"rate_limit": -1} | knobs))
    assert not (await live.get("/ticker/BTC/USDT?exchange=kraken")).is_success
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
async def test_a_breaker_closes_without_a_request(
    start: StartGateway, sandbox: Sandbox, clock: FakeClock, knobs: dict[str, Any], seconds: int
) -> None:
    """When its open time is over one cheap call closes it and /health is healthy; before that there is no call."""
    live = await tripped(start, sandbox, knobs)
    breaker, manager = live.gateway.manager["kraken"].breaker, live.gateway.manager
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


async def test_probes_back_off_by_the_rule_of_the_breaker(
    start: StartGateway, sandbox: Sandbox, clock: FakeClock
) -> None:
    """A probe that fails opens the breaker for twice as long, up to the cap; meanwhile the exchange is not asked."""
    live = await tripped(start, sandbox, {"status": 500}, cb_max_open_seconds=240)
    breaker = live.gateway.manager["kraken"].breaker
    for calls, (seconds, then) in enumerate(((60, 120), (120, 240), (240, 240)), start=1):
        clock.advance(seconds - 1)
        await live.gateway.manager.probe("kraken")
        assert sandbox.count("kraken") == calls - 1
        clock.advance(1 + PROBE_DELAY_SECONDS)
        await eventually(lambda: breaker.retry_after == then)  # noqa: B023 - awaited at once
        assert sandbox.count("kraken") == calls


async def test_a_probe_does_not_shorten_the_open_time(start: StartGateway, sandbox: Sandbox, clock: FakeClock) -> None:
    """An exchange that tells its time, but no prices, is left alone for longer each time, until it tells a price."""
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


@pytest.mark.parametrize("why", ["no budget", "no verdict"])
async def test_a_probe_without_a_verdict_is_not_repeated_soon(
    start: StartGateway, sandbox: Sandbox, clock: FakeClock, why: str
) -> None:
    """Without budget the exchange is not asked, and a probe that decided nothing waits for CB_RESET_SECONDS."""
    live = await tripped(start, sandbox, {"status": 500}, kraken_budget="10/60")
    manager = live.gateway.manager
    await sandbox.set("kraken", rate_limit=-1, **({} if why == "no budget" else {"body": REJECTED}))
    clock.advance(60)
    if why == "no budget":
        await manager.limiter.correct("kraken", 20)
    clock.advance(PROBE_DELAY_SECONDS)
    made = 0 if why == "no budget" else 1
    await eventually(lambda: manager._probe_at["kraken"] > clock.monotonic() and not manager["kraken"].in_flight)
    clock.advance(59)
    await manager.probe("kraken")
    assert (manager["kraken"].breaker.state, sandbox.count("kraken")) == ("half_open", made)
    await sandbox.set("kraken", rate_limit=-1)
    clock.advance(20)
    await eventually(lambda: manager["kraken"].breaker.state == "closed")
    assert sandbox.count("kraken") == made + 1


async def test_a_hold_of_another_replica_is_kept(
    start: StartGateway, sandbox: Sandbox, clock: FakeClock, redis: Any
) -> None:
    """A probe does not ask an exchange that banned another replica meanwhile."""
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


async def test_the_port_opens_with_the_first_list(
    start: StartGateway, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When all lists are late the port stays closed until one is there, and not for the others."""
    monkeypatch.setattr(gateway, "START_SECONDS", 0.1)
    monkeypatch.setattr(gateway, "FIRST_LIST_SECONDS", 60)
    for name in ("bybit", "binance"):
        await sandbox.set(name, hang=True)
    await sandbox.set("kraken", latency_ms=500, rate_limit=-1)
    live = await start(wait=False)
    assert set(live.gateway.markets.loaded_at) == {"kraken"}
    assert not live.gateway.loader.errors, "the others are waited for still, but not by the port"
    assert (await live.get("/ticker/BTC/USDT")).json()["exchange"] == "kraken"


async def test_a_restart_needs_no_upstream_call(start: StartGateway, sandbox: Sandbox, redis: Any) -> None:
    """The market lists come from Redis while they are young, and every kind of data works with them."""
    await start(redis_url=redis.url, load_markets=True)
    await eventually(lambda: len(redis.client.keys("virtuoso:1:markets:*")) == 3)
    second = await start(redis_url=redis.url, load_markets=True)
    assert sum(sandbox.count(name) for name in EXCHANGES) == 0
    for name in EXCHANGES:
        for path in ("ticker", "orderbook", "ohlcv", "trades"):
            assert (await second.get(f"/{path}/BTC-USDT?exchange={name}&max_age=0")).status_code == 200


async def test_swaps_work_from_a_snapshot_too(start: StartGateway, sandbox: Sandbox, redis: Any) -> None:
    """What a snapshot leaves out of a market is nothing that reading its data needs."""
    await start(redis_url=redis.url, market_types="spot,swap", load_markets=True)
    await eventually(lambda: len(redis.client.keys("virtuoso:1:markets:*")) == 3)
    second = await start(redis_url=redis.url, market_types="spot,swap", load_markets=True)
    for name in ("bybit", "binance"):
        for path in ("ticker", "orderbook", "ohlcv", "trades"):
            assert (await second.get(f"/{path}/BTC-USDT:USDT?exchange={name}&max_age=0")).status_code == 200
    assert sandbox.count("binance", "exchangeInfo") + sandbox.count("bybit", "instruments") == 0


async def test_an_old_snapshot_is_replaced(start: StartGateway, sandbox: Sandbox, redis: Any, clock: FakeClock) -> None:
    """After the refresh time the exchange is asked for its list again."""
    first = await start(redis_url=redis.url, load_markets=True)
    await eventually(lambda: len(redis.client.keys("virtuoso:1:markets:*")) == 3)
    await first.gateway.loader.close()  # it would ask as well, if it has not looked at the clock since it saved
    clock.advance(3601)
    await first.gateway.loader.load("bybit")
    assert sandbox.count("bybit", "instruments") == 1


def packed(document: Any) -> bytes:
    return zlib.compress(orjson.dumps(document))


MARKET = {"id": "XY", "symbol": "X/Y", "base": "X", "quote": "Y", "type": "spot", "active": True}
SNAPSHOT = {"format": SNAPSHOT_FORMAT, "loaded_at": 1.0, "markets": [MARKET]}


@pytest.mark.parametrize(
    "snapshot",
    [
        b"junk", b"", packed(SNAPSHOT)[:-9], zlib.compress(b"junk"), packed([]), packed({}), packed("text"),
        packed({"loaded_at": 1.0, "markets": [MARKET | {"info": {}}]}),
        packed(SNAPSHOT | {"format": SNAPSHOT_FORMAT + 1}),
        packed(SNAPSHOT | {"loaded_at": None}),
        packed(SNAPSHOT | {"markets": []}),
        packed(SNAPSHOT | {"markets": [{"symbol": "X/Y"}]}),
        packed(SNAPSHOT | {"markets": [MARKET | {"symbol": 7}]}),
        packed(SNAPSHOT | {"markets": [MARKET, "text"]}),
    ],
    ids=["junk", "empty", "cut", "no json", "list", "no members", "text", "older format", "newer format",
         "no time", "no markets", "no id", "no symbol", "no market"],
)  # fmt: skip
async def test_a_snapshot_that_cannot_be_used_is_none(
    start: StartGateway, sandbox: Sandbox, redis: Any, snapshot: bytes
) -> None:
    """Broken, or of another format: the exchange is asked as if there were none, and a good one takes its place."""
    redis.client.set("virtuoso:1:markets:{kraken}:spot", snapshot)
    live = await start(redis_url=redis.url, bybit_enabled=False, binance_enabled=False, load_markets=True)
    assert live.gateway.markets.count("kraken") > 10
    await eventually(lambda: redis.client.get("virtuoso:1:markets:{kraken}:spot") != snapshot)
    assert await restore_markets(live.gateway.manager["kraken"].client, packed(SNAPSHOT)) is not None


async def test_a_long_list_costs_the_gateway_little(clock: FakeClock) -> None:
    """A child process has the work of a list of 2,000 markets, and taking it over leaves other tasks their turns."""
    big = Sandbox(now=clock.time, filler=2000)
    await big.start()
    settings = make_settings(big)
    try:
        before, theirs = time.process_time(), resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
        snapshot = await MarketReader(settings).read("kraken", Answer(max_bytes=MAX_MARKETS_BYTES), 7.0)
        ours = time.process_time() - before  # the sandbox's own work is part of it
        theirs = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - theirs
    finally:
        await big.stop()
    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    other = asyncio.create_task(count())
    loaded = await restore_markets(make_client("kraken", settings, None), snapshot)  # type: ignore[arg-type]
    other.cancel()
    assert loaded is not None
    assert (loaded.loaded_at, len(loaded.markets)) == (7.0, 2038)
    assert ours < theirs / 2
    assert turns >= 2
    assert len(snapshot) < 100_000


def readers() -> list[tuple[int, str]]:
    """Return the number and command line of each child process that reads a market list."""
    return [(number, command) for number, command in children(os.getpid()).items() if "market_reader" in command]


def environment_of(number: int) -> bytes:
    return Path(f"/proc/{number}/environ").read_bytes()


async def test_the_child_knows_no_secret_and_starts_anywhere(
    start: StartGateway, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No setting of ours is in its environment, and it finds its code where Python adds no folder by itself."""
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


async def test_a_load_that_is_cancelled_leaves_no_process(start: StartGateway, sandbox: Sandbox) -> None:
    """A shutdown while an exchange hangs ends the child that waits for it; its command line tells no secret."""
    await sandbox.set("kraken", hang=True)
    proxy = "http://user:canary@127.0.0.1:1"
    live = await start(wait=False, kraken_api_key="canary-key", kraken_api_secret="canary-secret", https_proxy=proxy)
    await eventually(lambda: sandbox.count("kraken") and len(live.gateway.markets.loaded_at) == 2)
    ((_, command),) = readers()
    assert "canary" not in command
    await live.gateway.loader.close()
    assert readers() == []


async def test_a_child_that_dies_is_no_fault_of_the_exchange(
    start: StartGateway, sandbox: Sandbox, clock: FakeClock, caplog: pytest.LogCaptureFixture
) -> None:
    """The load fails as a fault of the gateway, the breaker stays closed, and the old list stays."""
    live = await start(cb_threshold=1)
    await sandbox.set("kraken", hang=True)
    clock.advance(3601)
    load = asyncio.create_task(live.gateway.loader.load("kraken"))
    await eventually(lambda: sandbox.count("kraken"))
    ((number, _),) = readers()
    os.kill(number, signal.SIGKILL)
    with pytest.raises(InternalError):
        await load
    await eventually(lambda: "the process that reads market lists ended" in caplog.messages)
    assert live.gateway.manager["kraken"].breaker.state == "closed"
    assert live.gateway.markets.count("kraken") > 10


@pytest.mark.parametrize(
    ("knobs", "code", "cause", "seconds"),
    [
        ({"status": 429, "headers": {"Retry-After": "77"}}, "exchange_rate_limited", "rate_limited", 77),
        ({"status": 418, "headers": {"retry-after": "300"}}, "exchange_banned", "banned", 300),
        ({"geo_block": True}, "geo_blocked", "geo_blocked", 900),
    ],
    ids=str,
)
async def test_what_a_market_list_is_refused_with_opens_the_breaker(
    start: StartGateway, sandbox: Sandbox, knobs: dict[str, Any], code: str, cause: str, seconds: int
) -> None:
    """Status and Retry-After reach the breaker from the process that saw them."""
    await sandbox.set("binance", **knobs)
    live = await start(wait=False)
    await eventually(lambda: live.gateway.loader.errors.get("binance") == code)
    breaker = live.gateway.manager["binance"].breaker
    assert (breaker.state, breaker.cause) == ("open", cause)
    assert breaker.retry_after == pytest.approx(seconds, abs=1)


async def test_the_count_told_with_a_market_list_corrects_the_budget(start: StartGateway, sandbox: Sandbox) -> None:
    """The headers of the list's answer come back from the child, whatever the case of their names."""
    await sandbox.set("binance", rate_limit=-1, headers={"x-mbx-used-weight-1m": "5000"})
    live = await start(load_markets=True)
    assert (await live.get("/exchanges")).json()["binance"]["budget_used_ratio"] > 0.8


@pytest.mark.parametrize(
    ("knobs", "told"),
    [
        ({"redirect": "http://127.0.0.1:1/"}, "it sent a redirect"),
        ({"size": 2_000_000}, "its body is too long"),
        ({"refuse": True}, "no connection"),
        ({"body": '{"error":["EService:Unavailable"]}'}, "is unavailable"),
    ],
    ids=str,
)
async def test_the_child_reads_as_carefully_as_the_gateway(sandbox: Sandbox, knobs: dict[str, Any], told: str) -> None:
    """Bodies are bounded, redirects refused and junk is bad data in the child too, and the error says which."""
    await sandbox.set("kraken", **knobs)
    with pytest.raises(UpstreamError, match=told):
        await MarketReader(make_settings(sandbox)).read("kraken", Answer(max_bytes=1_000_000), 1.0)


async def test_one_child_reads_all_lists_and_one_that_hangs_holds_up_none(
    start: StartGateway, sandbox: Sandbox
) -> None:
    """Lists that are wanted at once are read by one process; each has its own answer or error, when it comes."""
    await sandbox.set("bybit", hang=True)
    await sandbox.set("binance", status=503)
    live = await start(wait=False)
    await eventually(lambda: live.gateway.markets.count("kraken") and live.gateway.loader.errors)
    assert live.gateway.loader.errors == {"binance": "exchange_unavailable"}
    ((first, _),) = readers()
    await eventually(lambda: sandbox.count("binance") == 2)  # asked again after a second
    assert [number for number, _ in readers()] == [first]
    await sandbox.reset()
    await eventually(lambda: len(live.gateway.markets.loaded_at) == 3)
    await eventually(lambda: not readers())


async def test_what_is_written_to_the_child_makes_the_same_client(sandbox: Sandbox) -> None:
    """Read in this process or in a child, the list is the same."""
    settings = make_settings(sandbox, market_types="spot,swap")
    for name in EXCHANGES:
        own = await load_snapshot(name, settings, Answer(max_bytes=MAX_MARKETS_BYTES), 1.0)
        assert await MarketReader(settings).read(name, Answer(max_bytes=MAX_MARKETS_BYTES), 1.0) == own


@pytest.mark.parametrize("first", ["", "import ccxt.async_support; "], ids=["alone", "after all of ccxt"])
def test_only_the_clients_in_use_are_imported(first: str) -> None:
    """The other hundred exchanges of ccxt stay out of the process, unless somebody has brought them in before."""
    code = "import sys; import src.exchanges.ccxt_client as c; c.ccxt.kraken(); "
    code += "print(any('okx' in name for name in sys.modules))"
    printed = subprocess.run([sys.executable, "-c", first + code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert printed.stdout.strip() == str(bool(first))


def test_a_new_list_replaces_the_old_one_and_counts() -> None:
    """Each replacement raises the version; suggestions come from what is listed now, on any exchange."""
    markets = Markets(EXCHANGES, ("spot",))

    def listed(*bases: str) -> list[dict[str, Any]]:
        return [MARKET | {"symbol": f"{base}/USDT", "base": base, "quote": "USDT"} for base in bases]

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
    "body", ['{"error":[],"result":{}}', '{"error":[],"result":{"X":{"altname":7}}}', "[1, 2", "<html>", ""]
)
async def test_an_empty_or_broken_market_list_is_refused(
    start: StartGateway, sandbox: Sandbox, clock: FakeClock, body: str
) -> None:
    """A list without markets, or with some that have no name, is bad data: the old one stays."""
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
        ({"size": 10_000_000}, "its body is too long"),
        ({"redirect": "http://127.0.0.1:1/"}, "it sent a redirect"),
        ({"hang": True}, "nothing, or too little, came within the time"),
        ({"body": "<html>"}, "an empty or foreign body"),
    ],
    ids=str,
)
async def test_an_error_and_the_log_say_what_happened_on_the_wire(
    start: StartGateway, sandbox: Sandbox, caplog: pytest.LogCaptureFixture, knobs: dict[str, Any], words: str
) -> None:
    """A refused connection reads differently from a cut one, a timeout or junk: in the answer and in the log."""
    live = await start(exchange_timeout_seconds=1.5 if knobs.keys() & {"hang", "drip"} else 30)
    await sandbox.set("binance", rate_limit=-1, **knobs)
    with caplog.at_level("INFO", "src.exchanges.manager"):
        assert words in (await live.get("/ticker/BTC/USDT?exchange=binance")).json()["detail"]
    assert words in next(vars(record)["reason"] for record in caplog.records if record.message == "exchange asked")


def test_addresses_can_be_moved() -> None:
    """An override replaces scheme, host and port of every URL of an exchange; its own path goes in front."""
    settings = make_settings(
        bybit_rest_url="http://localhost:9/x", bybit_ws_url="ws://localhost:8",
        binance_rest_url="https://data-api.binance.vision", https_proxy="http://user:canary@proxy:3128",
    )  # fmt: skip
    moved = make_client("bybit", settings, None)  # type: ignore[arg-type]
    assert moved.urls["api"]["public"] == "http://localhost:9/x"
    assert moved.aiohttp_proxy is None
    binance = make_client("binance", settings, None)  # type: ignore[arg-type]
    assert binance.urls["api"]["public"] == "https://data-api.binance.vision/api/v3"
    assert binance.aiohttp_proxy == "http://user:canary@proxy:3128"
    assert make_client("kraken", settings, None).urls["api"]["public"] == "https://api.kraken.com"  # type: ignore[arg-type]
    assert make_client("kraken", settings, None, sockets=True).wss_proxy == binance.aiohttp_proxy  # type: ignore[arg-type]
    assert make_client("bybit", settings, None, sockets=True).wss_proxy is None  # type: ignore[arg-type]
    assert "canary" not in repr(settings)


async def test_calls_go_through_the_proxy_that_is_set(
    start: StartGateway, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """With HTTPS_PROXY an https exchange is asked through it, with its credentials, which show nowhere."""
    asked: list[bytes] = []

    async def proxy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append(await reader.readuntil(b"\r\n\r\n"))
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
    assert asked[0].startswith(b"CONNECT exchange.invalid:443")
    assert b"Proxy-Authorization: Basic " in asked[0]
    assert "the proxy refused" in str([vars(record).get("reason") for record in caplog.records])
    assert "canary" not in caplog.text + "".join(capfd.readouterr())


async def test_calls_are_counted_by_exchange_operation_and_outcome(start: StartGateway, sandbox: Sandbox) -> None:
    """Each call upstream shows in the metrics, with what came of it."""
    live = await start()
    before = {
        outcome: sample("exchange_requests_total", exchange="kraken", operation="ticker", outcome=outcome)
        for outcome in ("success", "bad_data")
    }
    await live.get("/ticker/BTC/USDT?exchange=kraken")
    await sandbox.set("kraken", body="junk")
    await live.get("/ticker/ETH/USDT?exchange=kraken")
    for outcome, count in before.items():
        assert sample("exchange_requests_total", exchange="kraken", operation="ticker", outcome=outcome) == count + 1


RECORDED = [
    ("binance", "ticker", "24hr", "binance_24hr_BTCUSDT.json", 6705.82),
    ("kraken", "ticker", "Ticker", "kraken_2025-11_http_ticker.json", 105899.4),
]


@pytest.mark.parametrize(("name", "kind", "only", "file", "price"), RECORDED)
async def test_recorded_answers_are_understood(
    start: StartGateway, sandbox: Sandbox, name: str, kind: str, only: str, file: str, price: float
) -> None:
    """What the live exchange once sent becomes the ticker it should."""
    folder = recordings()
    if folder is None:
        pytest.skip("no recordings of live exchanges are there (VIRTUOSO_RECORDINGS)")
    live = await start()
    await sandbox.set(name, only=only, body=(folder / file).read_text())
    ticker = (await live.get(f"/{kind}/BTC-USDT?exchange={name}")).json()
    assert ticker["price"] == ticker["last"] == price
    assert ticker["bid"] <= ticker["ask"]
    assert ("timestamp" in ticker) == (name == "binance")


@pytest.mark.parametrize(
    ("name", "path", "only", "file", "field"),
    [
        ("binance", "ohlcv/BTC-USDT?timeframe=5m", "klines", "binance_klines_5m.json", "candles"),
        ("kraken", "orderbook/BTC-USDT?limit=5", "Depth", "kraken_2025-11_http_order_book.json", "bids"),
    ],
)
async def test_recorded_books_and_candles_are_understood(
    start: StartGateway, sandbox: Sandbox, name: str, path: str, only: str, file: str, field: str
) -> None:
    """What the live exchange once sent passes the gate."""
    folder = recordings()
    if folder is None:
        pytest.skip("no recordings of live exchanges are there (VIRTUOSO_RECORDINGS)")
    live = await start()
    await sandbox.set(name, only=only, body=(folder / file).read_text())
    answer = await live.get(f"/{path}&exchange={name}")
    assert answer.status_code == 200, answer.text
    assert answer.json()[field]


async def test_recorded_lists_of_realistic_size_are_understood(start: StartGateway, sandbox: Sandbox) -> None:
    """Whole recorded lists go through: 1,695 markets of binance, 419 tickers of bybit."""
    folder = recordings()
    if folder is None:
        pytest.skip("no recordings of live exchanges are there (VIRTUOSO_RECORDINGS)")
    body = (folder / "binance_spot_exchangeInfo_2021-10.json").read_text()
    await sandbox.set("binance", only="exchangeInfo", body=body)
    live = await start(load_markets=True)
    trading = [market for market in json.loads(body)["symbols"] if market["status"] == "TRADING"]
    assert live.gateway.markets.count("binance") == pytest.approx(len(trading), abs=5)
    recorded = {"retCode": 0} | json.loads((folder / "bybit_v5_tickers_spot_2023-08.json").read_text())
    await sandbox.set("bybit", only="tickers", body=json.dumps(recorded))
    batch = (await live.get("/tickers?symbols=BTC/USDT,ETH/USDT&exchange=bybit")).json()
    assert sorted(batch["tickers"]) == ["BTC/USDT", "ETH/USDT"], batch


async def test_a_market_that_never_traded_is_remembered_and_trips_nothing(
    start: StartGateway, sandbox: Sandbox
) -> None:
    """No price and no volume: 502 with its code, asked once in a while, and the breaker stays closed."""
    live = await start(cb_threshold=1)
    ticker = {"symbol": "BTCUSDT", "lastPrice": "0.00", "volume": "0.00", "closeTime": 1}
    await sandbox.set("binance", body=json.dumps(ticker), rate_limit=-1)
    for _ in range(3):
        answer = await live.get("/ticker/BTC/USDT?exchange=binance")
        assert (answer.status_code, answer.json()["code"]) == (502, "no_price")
    assert sandbox.count("binance", "24hr") == 1
    assert live.gateway.manager["binance"].breaker.state == "closed"


async def test_odd_headers_are_no_reason_to_fail(start: StartGateway, sandbox: Sandbox) -> None:
    """Signs that look like digits and are none are ignored, in an answer that is good and in one that is not."""
    live = await start()
    await sandbox.set("binance", rate_limit=-1, headers={"X-MBX-USED-WEIGHT-1M": "\u00b2"})
    assert (await live.get("/ticker/BTC/USDT?exchange=binance")).status_code == 200
    await sandbox.set("binance", rate_limit=-1, status=429, headers={"Retry-After": "\u00b2"})
    assert (await live.get("/ticker/ETH/USDT?exchange=binance")).json()["retry_after"] == 60


async def test_one_symbol_the_exchange_forgot_does_not_spoil_a_batch(start: StartGateway, sandbox: Sandbox) -> None:
    """A list call refused for one symbol is split until that one stands alone."""
    live = await start()
    # The market list still has it, the exchange has not: as after a delisting, until the list is read again.
    live.gateway.manager["binance"].client.markets["SOL/USDT"]["id"] = "GONEUSDT"
    batch = (await live.get("/tickers?symbols=BTC/USDT,ETH/USDT,SOL/USDT,XRP/USDT&exchange=binance")).json()
    assert sorted(batch["tickers"]) == ["BTC/USDT", "ETH/USDT", "XRP/USDT"]
    assert {symbol: problem["code"] for symbol, problem in batch["errors"].items()} == {"SOL/USDT": "unknown_symbol"}


async def test_one_replicas_ban_stops_them_all(start: StartGateway, sandbox: Sandbox, redis: Any) -> None:
    """What one gateway was told to wait for, another on the same Redis does not ask for either."""
    one, other = await start(redis_url=redis.url), await start(redis_url=redis.url)
    await sandbox.set("bybit", status=418, headers={"Retry-After": "300"})
    await one.get("/ticker/BTC/USDT?exchange=bybit")
    sandbox.clear_counts()
    told = (await other.get("/ticker/ETH/USDT?exchange=bybit")).json()
    assert (told["code"], told["retry_after"]) == ("exchange_banned", 300)
    assert (await other.get("/exchanges")).json()["bybit"]["breaker"]["cause"] == "banned"
    assert sandbox.count("bybit") == 0


async def test_replicas_behind_a_hanging_exchange_both_fall_back(
    start: StartGateway, sandbox: Sandbox, redis: Any
) -> None:
    """The one that waits for the other's load goes on to the next exchange in time as well."""
    settings = {"redis_url": redis.url, "exchange_timeout_seconds": 5, "request_timeout": 9, "clock": SystemClock()}
    one, other = await start(**settings), await start(**settings)
    await sandbox.set("bybit", hang=True)
    answers = await asyncio.gather(*(live.get("/ticker/BTC/USDT") for live in (one, other)))
    assert [(answer.status_code, answer.json()["exchange"]) for answer in answers] == [(200, "binance")] * 2


async def test_closing_closes_the_session_and_may_come_before_the_start(sandbox: Sandbox, clock: FakeClock) -> None:
    """A manager that was never started can be closed; one that was has no open connections afterwards."""
    manager = ExchangeManager(make_settings(sandbox), RedisStore("", clock), clock)
    await manager.close()
    await manager.start()
    session = manager._session
    assert session is not None
    assert not session.closed
    await manager.close()
    assert session.closed
