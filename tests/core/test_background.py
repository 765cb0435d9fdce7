"""Background work: it survives unexpected errors, which are logged and counted."""

import asyncio
import logging
from collections.abc import Callable
from typing import Any

import pytest

from src import api, refresh_ahead
from src.cache import redis_tier
from src.core import background, models
from src.core.background import repeat, report_error
from src.core.metrics import COMPONENTS
from src.store import redis as redis_store
from src.web import dashboard
from tests.conftest import FakeClock, Live, RedisServer, StartGateway, eventually, sample
from tests.streams.test_hub import inside


@pytest.fixture(autouse=True)
def _new_log(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget the errors that other tests logged, and shorten the pause after an error."""
    monkeypatch.setattr(background, "_logged_at", {})
    monkeypatch.setattr(background, "ERROR_SECONDS", 0.01)


def errors(component: str) -> float:
    return sample("internal_errors_total", component=component)


def tracebacks(caplog: pytest.LogCaptureFixture, component: str) -> list[str]:
    """Return the logged tracebacks of errors of `component`."""
    records = [
        record for record in caplog.records if getattr(record, "component", None) == component
    ]
    assert all(record.levelno == logging.ERROR for record in records)
    return [
        logging.Formatter().formatException(record.exc_info)
        for record in records
        if record.exc_info
    ]


async def test_loop_continues_after_an_error(caplog: pytest.LogCaptureFixture) -> None:
    """A step that raises is reported and repeated. A cancellation ends the loop."""
    before, runs = errors("streams"), 0

    async def step() -> None:
        nonlocal runs
        runs += 1
        if runs < 4:
            raise ZeroDivisionError("run", runs)

    task = asyncio.create_task(repeat("streams", step))
    await eventually(lambda: runs > 10)
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled()
    assert errors("streams") == before + 3
    assert ["ZeroDivisionError: ('run', 1)" in text for text in tracebacks(caplog, "streams")] == [
        True
    ]


def test_all_errors_are_counted_and_repeated_errors_are_logged_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Errors of another class or component are still logged."""
    before = errors("delivery")
    for error in (KeyError("one"), KeyError("two"), IndexError("three"), KeyError("four")):
        report_error("delivery", error)
    report_error("markets", KeyError("five"))
    assert errors("delivery") == before + 4
    assert [text.strip() for text in tracebacks(caplog, "delivery")] == [
        "KeyError: 'one'",
        "IndexError: three",
    ]
    assert len(tracebacks(caplog, "markets")) == 1
    monkeypatch.setattr(background, "LOG_SECONDS", 0)
    report_error("delivery", KeyError("six"))
    assert len(tracebacks(caplog, "delivery")) == 3


# For each loop of a gateway: an object and an attribute that its step needs.
BROKEN: dict[str, Callable[[Live], tuple[Any, str]]] = {
    "breaker_probe": lambda live: (live.gateway.manager, "_exchanges"),
    "cache_clears": lambda live: (live.gateway.cache.redis, "_count_clears"),
    "dashboard": lambda _: (dashboard, "_read_counters"),
    "loop_lag": lambda live: (live.gateway.clock, "monotonic"),
    "redis": lambda live: (live.gateway.store, "run"),
    "refresh_ahead": lambda _: (refresh_ahead, "defaultdict"),
    "streams": lambda live: (inside(live)._monitor, "_request_counts"),
}


def test_every_component_with_a_loop_is_tested() -> None:
    """Deliveries, loads and the shutdown are not loops. The market loader has its own pauses."""
    assert {*BROKEN, "delivery", "loads", "markets", "shutdown"} == set(COMPONENTS)


@pytest.mark.parametrize("component", BROKEN)
async def test_every_loop_of_the_gateway_survives_errors(
    start: StartGateway,
    redis: RedisServer,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    component: str,
) -> None:
    """A broken loop logs tracebacks, and works again after it is repaired."""
    monkeypatch.setattr(api, "SAMPLE_SECONDS", 0.01)
    monkeypatch.setattr(redis_store, "PING_SECONDS", 0.01)
    monkeypatch.setattr(redis_tier, "CHECK_SECONDS", 0.01)
    live = await start(redis_url=redis.url, refresh_ahead=True)
    before = errors(component)
    owner, name = BROKEN[component](live)
    with monkeypatch.context() as broken:
        broken.setattr(owner, name, None)
        await eventually(lambda: errors(component) >= before + 3)
    assert "TypeError" in tracebacks(caplog, component)[0]
    settled = -1.0
    while settled != (settled := errors(component)):  # noqa: ASYNC110 - a step may still be running
        await asyncio.sleep(0.1)
    assert (await live.get("/health")).json()["status"] == "healthy"


async def test_unexpected_error_of_a_load_is_reported(
    start: StartGateway, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The log has the traceback. The client gets an error and no price."""
    live, before = await start(), errors("loads")
    monkeypatch.setattr(models, "_to_number", None)
    answer = await live.get("/ticker/BTC/USDT?exchange=kraken")
    assert (answer.status_code, answer.json()["code"]) == (502, "bad_upstream_data")
    assert errors("loads") == before + 1
    assert "from_ccxt" in tracebacks(caplog, "loads")[0]


async def test_unexpected_error_of_a_background_refresh_is_reported(
    start: StartGateway,
    clock: FakeClock,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The client gets the stale value. The log has the traceback of the failed refresh."""
    live, before = await start(revalidate_seconds=60), errors("loads")
    await live.get("/ticker/BTC/USDT?exchange=kraken")
    clock.advance(20)
    monkeypatch.setattr(live.gateway.last_prices, "record", None)
    assert (await live.get("/ticker/BTC/USDT?exchange=kraken")).json()["stale"]
    await eventually(lambda: errors("loads") == before + 1)
    assert "TypeError" in tracebacks(caplog, "loads")[0]
