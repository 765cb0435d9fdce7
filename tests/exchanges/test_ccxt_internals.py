"""Undocumented parts of ccxt: the check at startup, and what works without them."""

import logging
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import aiohttp
import pytest

from src.exchanges import ccxt_client
from src.exchanges.ccxt_client import ClientOptions, make_client, missing_internals
from src.exchanges.ccxt_sockets import CcxtSockets
from src.sandbox.server import Sandbox
from tests.conftest import StartGateway, make_settings

ROOT = Path(__file__).parents[2]
UNUSED_EXCHANGE = "print(any('okx' in name for name in sys.modules))"
USE = f"import src.exchanges.ccxt_client as c; c._client_class('kraken', True); {UNUSED_EXCHANGE}"
WITHOUT_LAZY_IMPORT = "import importlib.util; importlib.util.module_from_spec = None; "


def test_installed_ccxt_is_the_tested_version() -> None:
    """A new version of ccxt is tested before it is used."""
    assert metadata.version("ccxt") == ccxt_client.TESTED_CCXT_VERSION


async def test_installed_ccxt_has_all_internals(start: StartGateway) -> None:
    """Nothing is missing, and the start logs no warning about it."""
    live = await start()
    for name in live.gateway.manager.names:
        assert missing_internals(live.gateway.manager[name].client) == {}


def test_missing_internals_are_named() -> None:
    """The check names each missing part with the object that lacks it."""
    client = SimpleNamespace(markets={}, markets_by_id={}, client=None, clients={}, tickers={})
    assert missing_internals(client) == {
        "markets": ["safe_market_structure"],
        "sockets": [
            "bidsasks",
            "orderbooks",
            "trades",
            "ohlcvs",
            "timeframes",
            "fetch_rest_order_book_safe",
        ],
    }


async def test_missing_internals_are_logged_at_startup(
    start: StartGateway, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One warning names what is missing and the tested version, and REST works."""
    monkeypatch.setitem(ccxt_client.INTERNALS, "connection", "no_such_name")
    caplog.set_level(logging.WARNING)
    live = await start()
    (record,) = [vars(record) for record in caplog.records if "internals" in record.message]
    assert record["missing"] == {"connection": ["no_such_name"]}
    assert record["tested"] == ccxt_client.TESTED_CCXT_VERSION
    assert (await live.get("/ticker/BTC-USDT")).status_code == 200


@pytest.mark.parametrize(
    ("before", "imports_all"),
    [("", False), ("import ccxt.async_support; ", True), (WITHOUT_LAZY_IMPORT, True)],
    ids=["lazily", "after all of ccxt", "without lazy import"],
)
def test_clients_work_however_ccxt_is_imported(before: str, imports_all: bool) -> None:
    """Only the used exchanges are imported. Without the lazy import, all of ccxt is."""
    command = [sys.executable, "-c", "import sys; " + before + USE]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert printed.stdout.strip() == str(imports_all)


class SlowClient:
    """A client without `markets_by_id`."""

    def set_markets(self, markets: list[dict[str, Any]]) -> None:
        self.adopted = markets


def test_markets_are_adopted_without_internals() -> None:
    """Without the index of markets, ccxt's own method is used."""
    client = SlowClient()
    ccxt_client.adopt_markets(client, {"X/Y": {"id": "XY", "symbol": "X/Y"}})
    assert client.adopted == [{"id": "XY", "symbol": "X/Y"}]


class Losses:
    """A listener that records losses."""

    def __init__(self) -> None:
        self.causes: list[str] = []

    def received(self, symbol: str, value: Any, *, steady: bool) -> None:
        pytest.fail("nothing can be received")

    def lost(self, cause: str, refusal: object) -> None:
        self.causes.append(cause)

    def ended(self, symbol: str, *, is_refused: bool) -> None:
        pytest.fail("nothing can be refused")


async def test_sockets_without_internals_report_a_loss(
    sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A subscription is lost at once, upon which streams poll by REST. Nothing connects."""
    monkeypatch.setitem(ccxt_client.INTERNALS, "sockets", "no_such_name")
    listener = Losses()
    async with aiohttp.ClientSession() as session:
        settings = make_settings(sandbox)
        sockets = CcxtSockets("kraken", "ticker", "", settings, session, listener, lambda: None)
        sockets.subscribe(["BTC/USDT"])
        sockets.unsubscribe(["BTC/USDT"])
        sockets.drop()
        assert (listener.causes, sockets.count) == (["lost"], 0)
        await sockets.close()
    assert sandbox.count("kraken") == 0


def test_keys_are_not_shown() -> None:
    """The representation of a client's options contains no secret."""
    settings = make_settings(
        kraken_api_key="canary", kraken_api_secret="canary", https_proxy="http://u:canary@proxy:1"
    )
    assert "canary" not in repr(ClientOptions.from_settings("kraken", settings))


def test_sockets_connect_through_the_replaced_address(sandbox: Sandbox) -> None:
    """Every WebSocket URL of every exchange is replaced."""
    settings = make_settings(sandbox)
    for name, url in sandbox.urls.items():
        options = ClientOptions.from_settings(name, settings)
        client = make_client(options, None, has_sockets=True)  # type: ignore[arg-type]
        urls = str(client.urls["api"]["ws"])
        assert url.replace("http", "ws") in urls
        assert "wss://" not in urls
