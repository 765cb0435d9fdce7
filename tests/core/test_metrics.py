"""Metrics: format, labels and values."""

import asyncio
import subprocess
import time

from prometheus_client.parser import text_string_to_metric_families

from src.core.clock import SystemClock
from src.sandbox.server import Sandbox
from tests.conftest import FakeClock, RedisServer, StartGateway, eventually, sample, tool

FIXED_LABELS = {
    "pool",
    "route", "method", "code", "exchange", "operation", "outcome", "state", "to", "result", "tier",
    "reason", "task", "version", "python", "le", "client", "channel", "cause", "transport",
    "component",
}  # fmt: skip


async def test_metrics_are_valid_prometheus_text(start: StartGateway, redis: RedisServer) -> None:
    """The client library parses the text. Names, help and labels follow the conventions."""
    live = await start(redis_url=redis.url)
    for path in (
        "/ticker/BTC/USDT",
        "/ticker/BTC/USDT",
        "/tickers?symbols=BTC/USDT,ETH/USDT",
        "/ticker/x",
        "/nope",
    ):
        await live.get(path)
    families = {
        family.name: family
        for family in text_string_to_metric_families((await live.get("/metrics")).text)
    }
    gateway_families = {
        name: family for name, family in families.items() if name.startswith("virtuoso_")
    }
    assert len(gateway_families) >= 20
    for name, family in gateway_families.items():
        assert family.documentation.endswith("."), name
        assert family.type != "gauge" or not name.endswith("_total")
        for series in family.samples:
            assert set(series.labels) <= FIXED_LABELS, series
            assert "BTC" not in str(series.labels)
    assert "process_cpu_seconds" in families
    assert "python_gc_objects_collected" in families


async def test_promtool_reports_no_problem(start: StartGateway) -> None:
    """`promtool check metrics` is clean, if it is installed."""
    promtool = tool("promtool", "prometheus")
    text = (await (await start()).get("/metrics")).content
    command = [promtool, "check", "metrics"]
    checked = await asyncio.to_thread(
        subprocess.run, command, input=text, capture_output=True, check=False
    )
    assert (checked.returncode, checked.stderr.decode()) == (0, "")


async def test_series_with_known_labels_exist_from_the_start(start: StartGateway) -> None:
    """A rate starts at zero before the first event. A value that was not measured is absent."""
    live = await start(redis_host="")
    text = (await live.get("/metrics")).text
    for line in (
        'virtuoso_cache_requests_total{result="negative"}',
        'virtuoso_circuit_transitions_total{exchange="kraken",to="open"}',
        'virtuoso_http_requests_total{code="503",method="GET",route="/trades/{symbol}"}',
        'virtuoso_circuit_state{exchange="bybit",state="closed"} 1.0',
        'virtuoso_circuit_state{exchange="bybit",state="open"} 0.0',
        'virtuoso_exchange_requests_total{exchange="binance",operation="ohlcv",outcome="success"}',
        'virtuoso_stream_reconnects_total{cause="lost",exchange="kraken"}',
    ):
        assert line in text
    assert 'virtuoso_build_info{python="' in text


async def test_requests_are_counted_by_cache_result(
    start: StartGateway, sandbox: Sandbox, clock: FakeClock
) -> None:
    """A miss, a hit in memory and a stale value after an error are counted as such."""
    live = await start(stale_seconds=60)
    counts = {
        result: sample("cache_requests_total", result=result)
        for result in ("miss", "hit_memory", "stale_error")
    }
    await live.get("/ticker/BTC/USDT?exchange=bybit")
    await live.get("/ticker/BTC/USDT?exchange=bybit")
    assert sample("cache_requests_total", result="miss") == counts["miss"] + 1
    assert sample("cache_requests_total", result="hit_memory") == counts["hit_memory"] + 1
    clock.advance(20)
    await sandbox.set("bybit", status=500, rate_limit=-1)
    await live.get("/ticker/BTC/USDT?exchange=bybit")
    assert sample("cache_requests_total", result="stale_error") == counts["stale_error"] + 1


async def test_gauges_show_the_state_at_the_scrape(
    start: StartGateway, clock: FakeClock, own_redis: RedisServer
) -> None:
    """Entries, state of Redis, budget, last success and markets are current at each scrape."""
    live = await start(redis_url=own_redis.url)
    await live.get("/ticker/BTC/USDT?exchange=bybit")
    await live.get("/metrics")
    assert sample("cache_entries") == 1
    assert sample("cache_tier_up", tier="redis") == 1
    assert sample("exchange_last_success_timestamp_seconds", exchange="bybit") == clock.time()
    assert 0 < sample("exchange_budget_used_ratio", exchange="bybit", pool="main") < 0.01
    assert sample("exchange_markets", exchange="bybit") == live.gateway.markets.count("bybit")
    own_redis.kill()
    await live.get("/ticker/ETH/USDT?exchange=bybit")
    await eventually(lambda: not live.gateway.store.up)
    await live.get("/metrics")
    assert sample("cache_tier_up", tier="redis") == 0
    clock.advance(1000)
    await live.get("/metrics")
    assert sample("cache_entries") == 0
    assert sample("exchange_budget_used_ratio", exchange="bybit", pool="main") == 0


async def test_event_loop_stall_is_measured(start: StartGateway) -> None:
    """Code that blocks the event loop appears in the lag histogram."""
    await start(clock=SystemClock())
    before = sample("event_loop_lag_seconds_sum")
    await eventually(lambda: sample("event_loop_lag_seconds_count") > 0)
    deadline = time.monotonic() + 0.2
    while time.monotonic() < deadline:
        pass
    await eventually(lambda: sample("event_loop_lag_seconds_sum") > before + 0.1)


async def test_routes_are_labelled_by_template(start: StartGateway) -> None:
    """The label of a request is the template of its route, or `unmatched`."""
    live = await start()
    before = {
        (route, code): sample("http_requests_total", route=route, method="GET", code=code)
        for route, code in (
            ("/ticker/{symbol}", "200"),
            ("/ticker/{symbol}", "404"),
            ("unmatched", "404"),
        )
    }
    for path in ("/ticker/BTC/USDT", "/ticker/NO/SUCH", "/favicon.ico"):
        await live.get(path)
    for (route, code), count in before.items():
        assert sample("http_requests_total", route=route, method="GET", code=code) == count + 1
    await live.client.request("PROPFIND", live.url + "/health")
    assert sample("http_requests_total", route="/health", method="OTHER", code="405") == 1
