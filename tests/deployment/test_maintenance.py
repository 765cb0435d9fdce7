"""Tasks of maintenance.py against a running gateway: exit codes, output and effects."""

import asyncio
import time

import pytest

import maintenance
from src.sandbox.server import Sandbox
from tests.conftest import FakeClock, Live, RedisServer, StartGateway, sample

TOKEN = "open-sesame"


async def run(
    monkeypatch: pytest.MonkeyPatch, live: Live | None, *arguments: str, **environment: str
) -> int:
    """Run a task in a thread, with an environment such as that of cron."""
    environment = {
        "GATEWAY_URL": live.url if live else "http://127.0.0.1:9",
        "ADMIN_TOKEN": TOKEN,
    } | environment
    environment = {"EXCHANGE_TIMEOUT_SECONDS": "30"} | environment
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    return await asyncio.to_thread(maintenance.main, arguments)


async def test_daily_clears_cache_resets_breakers_and_is_recorded(
    start: StartGateway,
    sandbox: Sandbox,
    clock: FakeClock,
    redis: RedisServer,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The time of the success is a metric that survives a restart of the gateway."""
    live = await start(
        admin_token=TOKEN, cb_threshold=1, redis_url=redis.url, api_keys="cron:cron-secret"
    )
    key = {"X-API-Key": "cron-secret"}
    await live.get("/ticker/BTC/USDT?exchange=bybit", headers=key)
    await sandbox.set("bybit", status=500, rate_limit=-1)
    await live.get("/ticker/ETH/USDT?exchange=bybit", headers=key)
    assert await run(monkeypatch, live, "daily") == maintenance.OK
    assert "cache: 1 cleared" in (output := capsys.readouterr().out)
    assert "breakers closed: bybit" in output
    await live.get("/metrics")
    assert sample("maintenance_last_success_timestamp_seconds", task="daily") == pytest.approx(
        clock.time(), abs=1
    )
    restarted = await start(redis_url=redis.url)
    assert restarted.gateway.maintenance["daily"] == pytest.approx(clock.time(), abs=1)


async def test_daily_does_not_end_bans(
    start: StartGateway,
    sandbox: Sandbox,
    redis: RedisServer,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """No replica calls an exchange before the end of its `Retry-After`."""
    limited, other = [
        await start(admin_token=TOKEN, cb_threshold=1, redis_url=redis.url) for _ in range(2)
    ]
    await sandbox.set("kraken", status=429, headers={"Retry-After": "1000"}, rate_limit=-1)
    await limited.get("/ticker/BTC/USDT?exchange=kraken")
    await sandbox.set("kraken", rate_limit=-1)
    sandbox.clear_counts()
    for live in (limited, other):
        assert await run(monkeypatch, live, "daily") == maintenance.OK
        assert "breakers closed: none" in capsys.readouterr().out
    codes = [
        (await live.get("/ticker/BTC/USDT?exchange=kraken")).json()["code"]
        for live in (limited, other)
    ]
    assert codes == ["circuit_open", "exchange_rate_limited"]
    assert sandbox.count("kraken", "Ticker") == 0


async def test_daily_reports_each_failure(
    start: StartGateway, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """No gateway, a wrong token and no token have their exit codes, and a line with advice."""
    assert await run(monkeypatch, None, "daily") == maintenance.FAILED
    assert "does not answer at http://127.0.0.1:9" in capsys.readouterr().err
    live = await start(admin_token="another-token")
    assert await run(monkeypatch, live, "daily") == maintenance.FAILED
    assert "Authorization" in capsys.readouterr().err
    assert await run(monkeypatch, live, "daily", ADMIN_TOKEN="") == maintenance.USAGE
    assert await run(monkeypatch, live, "daily", CB_THRESHOLD="many") == maintenance.USAGE
    assert "CB_THRESHOLD" in capsys.readouterr().err


async def test_daily_fails_without_redis(
    start: StartGateway,
    own_redis: RedisServer,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """If Redis was not cleared, the exit code is 1 and no success is recorded."""
    live = await start(admin_token=TOKEN, redis_url=own_redis.url)
    own_redis.kill()
    assert await run(monkeypatch, live, "daily") == maintenance.FAILED
    assert "does not answer" in capsys.readouterr().err
    assert live.gateway.maintenance == {}


async def test_exit_code_of_status_is_the_health(
    start: StartGateway,
    sandbox: Sandbox,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """0 is healthy, 3 degraded, 1 unhealthy."""
    live = await start(cb_threshold=1)
    assert await run(monkeypatch, live, "status") == maintenance.OK
    for name in ("bybit", "binance", "kraken"):
        await sandbox.set(name, status=500, rate_limit=-1)
    await live.get("/ticker/BTC/USDT?exchange=bybit")
    assert await run(monkeypatch, live, "status") == maintenance.DEGRADED
    assert "exchanges: degraded (bybit is open (unavailable))" in capsys.readouterr().out
    await live.get("/ticker/BTC/USDT")
    assert await run(monkeypatch, live, "status") == maintenance.FAILED


async def test_check_reports_unreachable_exchanges_and_wrong_clocks(
    start: StartGateway,
    sandbox: Sandbox,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The exit code is 0 if all exchanges are reachable and all clocks agree, else 1."""
    live = await start(admin_token=TOKEN)
    for listener in sandbox.listeners.values():
        listener.now = time.time  # the clock of the test did not advance
    urls = {f"{name.upper()}_REST_URL": url for name, url in sandbox.urls.items()} | {
        "REDIS_HOST": ""
    }
    assert await run(monkeypatch, live, "check", **urls) == maintenance.OK
    assert capsys.readouterr().out.count("reachable") == 3
    assert "check" in live.gateway.maintenance
    await sandbox.set("binance", clock_skew_ms=5000)
    await sandbox.set("bybit", refuse=True)
    assert await run(monkeypatch, live, "check", **urls) == maintenance.FAILED
    output = capsys.readouterr()
    assert "set the clock" in output.out
    assert output.err.startswith("bybit: ")


async def test_deep_check_finds_no_difference_in_the_sandbox(
    start: StartGateway,
    lively: Sandbox,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The sandbox sends what the exchanges send, and nothing else. The success is recorded."""
    live = await start(admin_token=TOKEN)
    environment = lively.settings | {"REDIS_HOST": "", "MARKET_TYPES": "spot,swap"}
    assert await run(monkeypatch, live, "check", "--deep", **environment) == maintenance.OK
    output = capsys.readouterr()
    assert output.err == ""
    assert "not used" not in output.out
    assert output.out.count(" answers, 0 problems") == 3
    paths = ("exchangeInfo", "ticker/24hr", "depth", "klines", "aggTrades")
    assert all(lively.count("binance", f"/fapi/v1/{path}") for path in paths)
    assert live.gateway.maintenance.keys() == {"deep_check"}


async def test_deep_check_describes_what_an_exchange_changed(
    lively: Sandbox, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """New words, missing members and answers that the models refuse lead to the exit code 1."""
    for name in lively.urls:
        await lively.set(name, odd=["drift"], rate_limit=-1)
    environment = lively.settings | {"REDIS_HOST": "", "MARKET_TYPES": "spot,swap"}
    assert await run(monkeypatch, None, "check", "--deep", **environment) == maintenance.FAILED
    output = capsys.readouterr()
    assert "binance exchangeInfo: new status 'Auction'\n" in output.err
    assert "kraken Ticker: member 'p' is missing\n" in output.err
    assert "bybit tickers: new member 'new_volume24h' (not used)\n" in output.out
    await lively.set("kraken", body="[]", only="Depth", rate_limit=-1)
    assert await run(monkeypatch, None, "check", "--deep", **environment) == maintenance.FAILED
    assert "kraken Depth: a row is a list instead of an object\n" in capsys.readouterr().err


async def test_warm_loads_symbols_into_the_cache(
    start: StartGateway,
    sandbox: Sandbox,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The symbols are hits afterwards. For an unknown symbol, the exit code is 1."""
    live = await start()
    assert (
        await run(monkeypatch, live, "warm", "BTC-USDT", "eth/usdt", ADMIN_TOKEN="")
        == maintenance.OK
    )
    assert "2 of 2 symbols are cached" in capsys.readouterr().out
    assert "hit" in (await live.get("/ticker/ETH/USDT")).headers["cache-status"]
    assert (
        await run(monkeypatch, live, "warm", "BTC-USDT", "NO-SUCH", ADMIN_TOKEN="")
        == maintenance.FAILED
    )
    assert "NO/SUCH is not listed" in capsys.readouterr().err


async def test_other_servers_are_not_mistaken_for_a_gateway(
    sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An answer that is not JSON is reported with the address."""
    await sandbox.set("bybit", body="<html>")
    assert (
        await run(monkeypatch, None, "status", GATEWAY_URL=sandbox.urls["bybit"])
        == maintenance.FAILED
    )
    assert "is not a gateway" in capsys.readouterr().err


def test_exit_code_of_an_unknown_task_is_2(capsys: pytest.CaptureFixture[str]) -> None:
    """Wrong usage and a failed task have different exit codes."""
    with pytest.raises(SystemExit) as caught:
        maintenance.main(["weekly"])
    assert caught.value.code == maintenance.USAGE


async def test_success_is_recorded_without_redis(start: StartGateway, clock: FakeClock) -> None:
    """Without Redis, the time of the last success is lost at a restart, but recorded until then."""
    live = await start(admin_token=TOKEN)
    await live.client.post(
        live.url + "/admin/maintenance/daily", headers={"Authorization": f"Bearer {TOKEN}"}
    )
    assert live.gateway.maintenance == {"daily": pytest.approx(clock.time(), abs=1)}
