"""Unmodified ccxt gets the same results and the same errors through the gateway as directly."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import urlsplit

import ccxt.async_support as ccxt
import pytest

from src.sandbox.server import Sandbox
from tests.conftest import FakeClock, StartGateway

NAMES = ("binance", "bybit", "kraken")
FAULTS: dict[str, dict[str, Any]] = {
    "hang": {"hang": True},
    "refuse": {"refuse": True},
    "reset": {"reset": True},
    "500": {"status": 500},
    "502": {"status": 502},
    "503": {"status": 503},
    "504": {"status": 504},
    "418": {"status": 418},
    "429": {"status": 429},
    "403": {"status": 403},
    "451": {"status": 451},
    "404": {"status": 404},
    "400": {"status": 400},
    "half": {"body": "{"},
    "html": {"body": "<html>x</html>"},
    "empty": {"body": ""},
    **{
        word: {"error": word}
        for word in (
            "rate_limit",
            "pair_limit",
            "throttled",
            "banned",
            "firewall",
            "busy",
            "unavailable",
            "timeout",
            "no_symbol",
        )
    },
}

LIMITED = {"DDoSProtection", "RateLimitExceeded"}
HOLDS = dict.fromkeys(("429", "418", "rate_limit", "banned"), LIMITED)


def with_base(urls: Any, base: str) -> Any:
    """Replace scheme, host and port of all REST addresses, as docs/drop-in.md shows."""
    if isinstance(urls, dict):
        return {name: with_base(url, base) for name, url in urls.items()}
    return base + urlsplit(urls).path if isinstance(urls, str) else urls


@asynccontextmanager
async def client_of(name: str, base: str) -> AsyncIterator[Any]:
    """Open a ccxt client whose requests go to `base`."""
    client = getattr(ccxt, name)({"enableRateLimit": False, "timeout": 4000})
    client.options["fetchMarkets"] = {"types": ["spot", "linear"]}
    client.has["fetchCurrencies"] = False
    client.timeout_on_exit = 0
    client.urls["api"] = with_base(client.urls["api"], base)
    try:
        yield client
    finally:
        await client.close()


async def result(client: Any, method: str, *arguments: Any, **more: Any) -> Any:
    """Return the result of a method, or the class of its error."""
    try:
        return await getattr(client, method)(*arguments, **more)
    except ccxt.BaseError as error:
        return type(error).__name__


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("name", NAMES)
async def test_faults_raise_the_same_error(
    start: StartGateway, sandbox: Sandbox, clock: FakeClock, name: str, fault: str
) -> None:
    live = await start(exchange_timeout_seconds=1)
    async with (
        client_of(name, sandbox.urls[name]) as direct,
        client_of(name, f"{live.url}/raw/{name}") as through,
    ):
        await direct.load_markets()
        through.set_markets_from_exchange(direct)
        await sandbox.set(name, rate_limit=-1, **FAULTS[fault])
        expected = await result(direct, "fetch_ticker", "BTC/USDT")
        assert await result(through, "fetch_ticker", "BTC/USDT") == expected
        if fault in HOLDS:  # the gateway does not ask again
            sandbox.clear_counts()
            assert await result(through, "fetch_ticker", "ETH/USDT") in HOLDS[fault]
            assert sandbox.count(name) == 0


METHODS: dict[str, tuple[Any, ...]] = {
    "fetch_ticker": ("BTC/USDT",),
    "fetch_tickers": (["BTC/USDT", "ETH/USDT"],),
    "fetch_order_book": ("BTC/USDT", 100),
    "fetch_ohlcv": ("BTC/USDT", "1m", None, 50),
    "fetch_trades": ("BTC/USDT", None, 50),
    "fetch_time": (),
    "fetch_status": (),
    "load_markets": (),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", NAMES)
async def test_results_are_equal(
    start: StartGateway, sandbox: Sandbox, name: str, method: str
) -> None:
    """Every public method returns what it returns directly."""
    live = await start()
    base = f"{live.url}/raw/{name}"
    async with client_of(name, sandbox.urls[name]) as direct, client_of(name, base) as through:
        expected = await result(direct, method, *METHODS[method])
        assert await result(through, method, *METHODS[method]) == expected
