"""A profile is all that an exchange needs: a copy of Kraken's profile under another name works."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace

import orjson
import pytest
from websockets.asyncio.client import connect

import config
from src.core.clock import SystemClock
from src.exchanges.profiles import PROFILES
from src.sandbox.server import Sandbox
from tests.conftest import Live, eventually, make_settings, serve


@pytest.fixture
async def fourth(lively: Sandbox, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Live]:
    """Run a gateway with the exchange "fourth", whose addresses are those of simulated Kraken."""
    profile = replace(PROFILES["kraken"], name="fourth")
    monkeypatch.setitem(PROFILES, "fourth", profile)
    monkeypatch.setattr(config, "EXCHANGES", tuple(PROFILES))
    default = {"budget": profile.default_budget}
    monkeypatch.setitem(config.DEFAULT_EXCHANGES, "fourth", default)
    settings = make_settings(
        lively,
        fourth_rest_url=lively.urls["kraken"],
        fourth_ws_url=lively.urls["kraken"].replace("http", "ws"),
        fourth_budget="1000/5",
    )
    async with serve(settings, SystemClock(), load_markets=True) as live:
        await eventually(lambda: "fourth" in live.gateway.markets.loaded_at)
        lively.clear_counts()
        yield live


@pytest.mark.parametrize(
    ("path", "member"),
    [
        ("ticker/BTC-USDT", "price"),
        ("ohlcv/BTC-USDT", "candles"),
        ("orderbook/BTC-USDT", "bids"),
        ("trades/BTC-USDT", "trades"),
    ],
)
async def test_profile_is_enough_for_market_data(
    fourth: Live, lively: Sandbox, path: str, member: str
) -> None:
    """Ticker, candles, order book and trades come from the exchange."""
    response = await fourth.get(f"/{path}?exchange=fourth")
    assert response.status_code == 200, response.text
    assert response.json()["exchange"] == "fourth"
    assert response.json()[member]
    assert lively.count("kraken") == 1


async def test_profile_is_enough_for_a_ticker_stream(fourth: Live, lively: Sandbox) -> None:
    """A ticker is streamed over the exchange's socket."""
    async with connect(fourth.url.replace("http", "ws") + "/ws") as socket:
        await socket.send('{"op":"subscribe","symbols":["BTC-USDT"],"exchange":"fourth"}')
        async with asyncio.timeout(30):
            message = orjson.loads(await socket.recv())
            while message["type"] != "update":
                message = orjson.loads(await socket.recv())
    assert (message["exchange"], message["channel"]) == ("fourth", "ticker")
    assert message["data"]["price"]
    assert lively.count("kraken", "/v2"), "no socket was opened"
