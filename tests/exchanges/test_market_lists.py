"""The market lists: identities, names on the sockets, and recorded lists of live exchanges."""

import gzip
import json
from typing import Any

import pytest

from src.exchanges.ccxt_client import ClientOptions, load_snapshot, restore_markets
from src.exchanges.http_client import MAX_MARKETS_BYTES, Answer
from src.sandbox.server import Sandbox
from tests.conftest import make_settings, recordings


def recorded(name: str) -> str:
    """Return the body of a recording. Skip the test if there are no recordings."""
    folder = recordings()
    if folder is None:
        pytest.skip("there are no recordings of live exchanges (VIRTUOSO_RECORDINGS)")
    document = json.loads(gzip.decompress((folder / "wire" / f"{name}.json.gz").read_bytes()))
    return json.dumps(document["body"])


async def slim_markets(sandbox: Sandbox, exchange: str) -> dict[str, dict[str, Any]]:
    """Return the markets that a snapshot of an exchange's list has, by symbol."""
    options = ClientOptions.from_settings(exchange, make_settings(sandbox))
    snapshot = await load_snapshot(options, Answer(max_bytes=MAX_MARKETS_BYTES), 1.0)
    loaded = await restore_markets(object(), snapshot)
    assert loaded is not None
    return loaded.markets


async def test_kraken_markets_have_their_names_on_the_socket(sandbox: Sandbox) -> None:
    """ccxt renames LUNA to LUNC, LUNA2 to LUNA and others; the socket knows Kraken's names."""
    await sandbox.set("kraken", body=recorded("kr_2026_AssetPairs"))
    markets = await slim_markets(sandbox, "kraken")
    names = {symbol: market["ws_name"] for symbol, market in markets.items()}
    assert names["LUNC/USD"] == "LUNA/USD"
    assert names["LUNA/USD"] == "LUNA2/USD"
    assert names["USTC/USDT"] == "UST/USDT"
    assert names["REP/EUR"] == "REPV2/EUR"
    assert names["BTC/USDT"] == "BTC/USDT"
    assert names["ADA/BTC"] == "ADA/BTC"
    assert names["DOGE/USD"] == "DOGE/USD"
    assert names["AIXBT/EUR"] == "AIXBT/EUR"
    assert len(set(names.values())) == len(names)


async def test_other_markets_have_their_ids_on_the_socket(sandbox: Sandbox) -> None:
    """Without a rule in the profile, the name of a market on the sockets is its id."""
    for exchange in ("bybit", "binance"):
        for market in (await slim_markets(sandbox, exchange)).values():
            assert market["ws_name"] == market["id"]


async def test_first_market_of_a_symbol_is_listed(sandbox: Sandbox) -> None:
    """Kraken listed XXBTZUSD, and then its dark pool XXBTZUSD.d, which has the same symbol."""
    pair = {"base": "XXBT", "quote": "ZUSD", "status": "online", "wsname": "XBT/USD"}
    result = {name: pair | {"altname": name} for name in ("XBTUSD.c", "XXBTZUSD", "XXBTZUSD.d")}
    result["XBTUSD.c"] |= {"status": "cancel_only"}
    await sandbox.set("kraken", body=json.dumps({"error": [], "result": result}))
    markets = await slim_markets(sandbox, "kraken")
    assert [market["id"] for market in markets.values()] == ["XXBTZUSD"]
