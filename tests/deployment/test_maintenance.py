"""maintenance.py as cron runs it: against a running gateway, by its exit codes."""

import asyncio
import time

import pytest

import maintenance
from src.sandbox.server import Sandbox
from tests.conftest import FakeClock, Live, RedisServer, StartGateway, sample

TOKEN = "open-sesame"


async def run(monkeypatch: pytest.MonkeyPatch, live: Live | None, *arguments: str, **environment: str) -> int:
    """Run a task in a thread, with the environment cron would give it."""
    environment = {"GATEWAY_URL": live.url if live else "http://127.0.0.1:9", "ADMIN_TOKEN": TOKEN} | environment
    environment = {"EXCHANGE_TIMEOUT_SECONDS": "30"} | environment
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    return await asyncio.to_thread(maintenance.main, arguments)


async def test_daily_clears_closes_and_is_noted(
    start: StartGateway, sandbox: Sandbox, clock: FakeClock, redis: RedisServer, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Our keys go, breakers close, and the success is a metric that survives a restart of the gateway."""
    live = await start(admin_token=TOKEN, cb_threshold=1, redis_url=redis.url, api_keys="cron:cron-secret")
    key = {"X-API-Key": "cron-secret"}
    await live.get("/ticker/BTC/USDT?exchange=bybit", headers=key)
    await sandbox.set("bybit", status=500, rate_limit=-1)
    await live.get("/ticker/ETH/USDT?exchange=bybit", headers=key)
    assert await run(monkeypatch, live, "daily") == maintenance.OK
    assert "cache: 1 cleared" in (out := capsys.readouterr().out)
    assert "breakers closed: bybit" in out
    await live.get("/metrics")
    assert sample("maintenance_last_success_timestamp_seconds", task="daily") == pytest.approx(clock.time(), abs=1)
    restarted = await start(redis_url=redis.url)
    assert restarted.gateway.maintenance["daily"] == pytest.approx(clock.time(), abs=1)


async def test_daily_leaves_bans_alone(
    start: StartGateway, sandbox: Sandbox, redis: RedisServer, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """An exchange that told us to wait is not asked sooner for it, neither by who was told nor by another replica."""
    told, other = [await start(admin_token=TOKEN, cb_threshold=1, redis_url=redis.url) for _ in range(2)]
    await sandbox.set("kraken", status=429, headers={"Retry-After": "1000"}, rate_limit=-1)
    await told.get("/ticker/BTC/USDT?exchange=kraken")
    await sandbox.set("kraken", rate_limit=-1)
    sandbox.clear_counts()
    for live in (told, other):
        assert await run(monkeypatch, live, "daily") == maintenance.OK
        assert "breakers closed: none" in capsys.readouterr().out
    answers = [(await live.get("/ticker/BTC/USDT?exchange=kraken")).json()["code"] for live in (told, other)]
    assert answers == ["circuit_open", "exchange_rate_limited"]
    assert sandbox.count("kraken", "Ticker") == 0


async def test_daily_fails_loudly(
    start: StartGateway, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """No gateway, a wrong token and no token each end with their exit code and one line that says what to do."""
    assert await run(monkeypatch, None, "daily") == maintenance.FAILED
    assert "does not answer at http://127.0.0.1:9" in capsys.readouterr().err
    live = await start(admin_token="another-token")
    assert await run(monkeypatch, live, "daily") == maintenance.FAILED
    assert "Authorization" in capsys.readouterr().err
    assert await run(monkeypatch, live, "daily", ADMIN_TOKEN="") == maintenance.USAGE
    assert await run(monkeypatch, live, "daily", CB_THRESHOLD="many") == maintenance.USAGE
    assert "CB_THRESHOLD" in capsys.readouterr().err


async def test_daily_without_redis_has_failed(
    start: StartGateway, own_redis: RedisServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What could not be cleared is no success: exit code 1, and nothing is noted."""
    live = await start(admin_token=TOKEN, redis_url=own_redis.url)
    own_redis.kill()
    assert await run(monkeypatch, live, "daily") == maintenance.FAILED
    assert "does not answer" in capsys.readouterr().err
    assert live.gateway.maintenance == {}


async def test_status_tells_by_its_exit_code(
    start: StartGateway, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """0 healthy, 3 degraded, 1 unhealthy."""
    live = await start(cb_threshold=1)
    assert await run(monkeypatch, live, "status") == maintenance.OK
    for name in ("bybit", "binance", "kraken"):
        await sandbox.set(name, status=500, rate_limit=-1)
    await live.get("/ticker/BTC/USDT?exchange=bybit")
    assert await run(monkeypatch, live, "status") == maintenance.DEGRADED
    assert "exchanges: degraded (bybit is open (unavailable))" in capsys.readouterr().out
    await live.get("/ticker/BTC/USDT")
    assert await run(monkeypatch, live, "status") == maintenance.FAILED


async def test_check_asks_each_exchange_for_its_time(
    start: StartGateway, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Reachable and in step is 0; a clock that is off or an exchange that is away is 1, each named."""
    live = await start(admin_token=TOKEN)
    for listener in sandbox.listeners.values():
        listener.now = time.time  # the clock of the test stood still meanwhile
    urls = {f"{name.upper()}_REST_URL": url for name, url in sandbox.urls.items()} | {"REDIS_HOST": ""}
    assert await run(monkeypatch, live, "check", **urls) == maintenance.OK
    assert capsys.readouterr().out.count("reachable") == 3
    assert "check" in live.gateway.maintenance
    await sandbox.set("binance", clock_skew_ms=5000)
    await sandbox.set("bybit", refuse=True)
    assert await run(monkeypatch, live, "check", **urls) == maintenance.FAILED
    told = capsys.readouterr()
    assert "set the clock" in told.out
    assert told.err.startswith("bybit: ")


async def test_warm_fills_the_cache(
    start: StartGateway, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The symbols are hits afterwards; one that is unknown makes the exit code 1 and is named."""
    live = await start()
    assert await run(monkeypatch, live, "warm", "BTC-USDT", "eth/usdt", ADMIN_TOKEN="") == maintenance.OK
    assert "2 of 2 symbols are cached" in capsys.readouterr().out
    assert "hit" in (await live.get("/ticker/ETH/USDT")).headers["cache-status"]
    assert await run(monkeypatch, live, "warm", "BTC-USDT", "NO-SUCH", ADMIN_TOKEN="") == maintenance.FAILED
    assert "NO/SUCH is not listed" in capsys.readouterr().err


async def test_what_answers_may_be_no_gateway(
    sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A server that is something else is told from the gateway."""
    await sandbox.set("bybit", body="<html>")
    assert await run(monkeypatch, None, "status", GATEWAY_URL=sandbox.urls["bybit"]) == maintenance.FAILED
    assert "is no gateway" in capsys.readouterr().err


def test_wrong_usage_is_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    """An unknown task is told from a failed one."""
    with pytest.raises(SystemExit) as ended:
        maintenance.main(["weekly"])
    assert ended.value.code == maintenance.USAGE


async def test_the_time_of_a_success_is_kept_without_redis(start: StartGateway, clock: FakeClock) -> None:
    """Losing Redis costs the memory of it over a restart, not the note."""
    live = await start(admin_token=TOKEN)
    await live.client.post(live.url + "/admin/maintenance/daily", headers={"Authorization": f"Bearer {TOKEN}"})
    assert live.gateway.maintenance == {"daily": pytest.approx(clock.time(), abs=1)}
