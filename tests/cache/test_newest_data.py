"""Of two values of a key, the one that is newer by the exchange's own order stays (A9)."""

import orjson
import pytest

from src.cache.entry import Freshness, Key
from src.sandbox.server import Sandbox
from tests.conftest import FakeClock, Live, RedisServer, StartGateway, eventually

TICKER = "/ticker/BTC-USDT?exchange=binance"
BOOK = "/orderbook/BTC-USDT?exchange=binance"
KEYS = {
    TICKER: Key("binance", "ticker", "BTC/USDT"),
    BOOK: Key("binance", "orderbook", "BTC/USDT", (50,)),
}


async def push(live: Live, path: str, ahead_ms: int) -> None:
    """Push the value of REST as if it were newer, or older with a negative number."""
    value = (await live.get(f"{path}&max_age=0")).json()
    names = [name for name in ("timestamp", "nonce") if value.get(name)]
    value |= {name: value[name] + ahead_ms for name in names}
    del value["source"], value["stale"]
    body = orjson.dumps(value | {"source": "stream", "stale": False})
    born = live.gateway.clock.monotonic()
    live.gateway.add_pushed(KEYS[path], body, born, Freshness(60), share=True)


@pytest.mark.parametrize("path", KEYS)
async def test_older_answer_does_not_replace_a_newer_push(
    start: StartGateway, sandbox: Sandbox, clock: FakeClock, redis: RedisServer, path: str
) -> None:
    """Others keep the newer value, in both tiers; the client with max_age gets its own answer."""
    live = await start(redis_url=redis.url)
    await push(live, path, 5_000)
    await live.gateway.cache.redis.drain()
    clock.advance(1)
    asked = (await live.get(f"{path}&max_age=0")).json()
    assert asked["source"] == "rest"
    await live.gateway.cache.redis.drain()
    assert (await live.get(path)).json()["source"] == "stream"
    replica = await start(redis_url=redis.url)
    sandbox.clear_counts()
    assert (await replica.get(path)).json()["source"] == "stream"
    assert sandbox.count("binance") == 0


@pytest.mark.parametrize("path", KEYS)
async def test_late_push_does_not_replace_a_newer_answer(
    start: StartGateway, sandbox: Sandbox, clock: FakeClock, redis: RedisServer, path: str
) -> None:
    """A push that is older than the last answer is not served."""
    live = await start(redis_url=redis.url)
    await push(live, path, -5_000)
    assert (await live.get(path)).json()["source"] == "rest"
    await live.gateway.cache.redis.drain()
    replica = await start(redis_url=redis.url)
    assert (await replica.get(path)).json()["source"] == "rest"


async def test_older_answer_replaces_a_push_that_expired(
    start: StartGateway, sandbox: Sandbox, clock: FakeClock
) -> None:
    """An expired value never blocks a new one, and neither does a clock that was corrected."""
    live = await start()
    await push(live, TICKER, 20_000)
    clock.advance(16)
    await live.get(TICKER)
    await eventually(lambda: live.gateway.cache.has_fresh(KEYS[TICKER]))
    assert (await live.get(TICKER)).json()["source"] == "rest"
    await push(live, TICKER, 3_600_000)
    await live.get(f"{TICKER}&max_age=0")
    assert (await live.get(TICKER)).json()["source"] == "rest"
