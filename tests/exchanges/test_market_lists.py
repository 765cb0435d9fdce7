"""The market lists: identities, statuses, new and missing markets."""

import asyncio
import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from websockets.asyncio.client import connect

from src import gateway
from src.core.errors import BadUpstreamData
from src.exchanges.ccxt_client import ClientOptions, load_snapshot, restore_markets
from src.exchanges.http_client import MAX_MARKETS_BYTES, Answer
from src.exchanges.market_loader import EARLY_REFRESH_SECONDS, EARLY_REFRESH_SHARE
from src.exchanges.markets import KEPT_SECONDS, Markets
from src.sandbox.server import Sandbox
from tests.conftest import FakeClock, Live, StartGateway, eventually, make_settings
from tests.recordings.recording import every_recording

EXCHANGES = ["bybit", "binance", "kraken"]
LISTS = {
    "bybit": "/v5/market/instruments-info?category=spot",
    "binance": "/api/v3/exchangeInfo",
    "kraken": "/0/public/AssetPairs",
}
IDS = {"bybit": "DOGEUSDT", "binance": "DOGEUSDT", "kraken": "XDGUSDT"}
# A status in which the exchange keeps a market in its list, with old prices.
HALTS = {"bybit": "Halted", "binance": "BREAK", "kraken": "cancel_only"}
STATUSES = {"bybit": "Trading", "binance": "TRADING", "kraken": "online"}
ONLY_LIST = {"bybit": "instruments-info", "binance": "exchangeInfo", "kraken": "AssetPairs"}


def recorded(name: str) -> str:
    """Return the body of a recording. Skip the test if there are no recordings."""
    for recording in every_recording():
        if recording.name == name:
            return json.dumps(recording.body)
    pytest.skip("there are no recordings of live exchanges (VIRTUOSO_RECORDINGS)")


Change = Callable[[dict[str, Any]], dict[str, Any] | None]
"""Changes a row of a market list, or drops it."""


async def set_list(sandbox: Sandbox, exchange: str, change: Change) -> None:
    """Let an exchange send its market list with changed rows."""
    await sandbox.set(exchange, rate_limit=-1)
    async with httpx.AsyncClient() as client:
        body = (await client.get(sandbox.urls[exchange] + LISTS[exchange])).json()
    if exchange == "kraken":
        rows = {name: change(row) for name, row in body["result"].items()}
        body["result"] = {name: row for name, row in rows.items() if row}
    else:
        owner = body["result"] if exchange == "bybit" else body
        member = "list" if exchange == "bybit" else "symbols"
        owner[member] = [row for row in map(change, owner[member]) if row]
    await sandbox.set(exchange, rate_limit=-1, body=json.dumps(body), only=ONLY_LIST[exchange])
    sandbox.clear_counts()


def id_of(row: dict[str, Any]) -> str:
    return str(row.get("symbol") or row["altname"])


def halt(exchange: str, *ids: str) -> Change:
    """Return a change that halts the markets with these ids, or all."""
    return lambda row: row | ({"status": HALTS[exchange]} if not ids or id_of(row) in ids else {})


def without(*ids: str) -> Change:
    """Return a change that drops the markets with these ids."""
    return lambda row: None if id_of(row) in ids else row


def lists_read(sandbox: Sandbox, exchange: str) -> int:
    return sandbox.count(exchange, ONLY_LIST[exchange])


@pytest.fixture(autouse=True)
def _patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wait for refreshes on a busy machine. The real time limit has a test of its own."""
    monkeypatch.setattr(gateway, "NEW_MARKET_SECONDS", 30.0)


async def start_without(start: StartGateway, clock: FakeClock, **settings: object) -> Live:
    """Start a gateway with lists without DOGE/USDT that are a minute old."""
    live = await start(**settings)
    for name in EXCHANGES:
        listed = live.gateway.manager[name].client.markets.values()
        rows = [row for row in listed if row["symbol"] != "DOGE/USDT"]
        live.gateway.markets.replace(name, rows, clock.time())
    clock.advance(EARLY_REFRESH_SECONDS)
    return live


@pytest.mark.parametrize(
    ("name", "path"),
    [*((name, "ticker") for name in EXCHANGES), ("bybit", "ohlcv"), ("kraken", "orderbook")],
)
async def test_market_listed_after_the_start_is_found(
    start: StartGateway, sandbox: Sandbox, clock: FakeClock, name: str, path: str
) -> None:
    """The list is refreshed before the 404 (ccxt #26338)."""
    live = await start_without(start, clock)
    assert live.gateway.markets.find(name, "DOGE/USDT") is None
    answer = await live.get(f"/{path}/DOGE/USDT?exchange={name}")
    assert (answer.status_code, answer.json()["symbol"]) == (200, "DOGE/USDT")
    assert [lists_read(sandbox, other) for other in EXCHANGES] == [
        int(other == name) for other in EXCHANGES
    ]


async def test_new_market_is_found_by_batches_and_pages(
    start: StartGateway, sandbox: Sandbox, clock: FakeClock
) -> None:
    """One missing symbol, or a hundred, cost one refresh per exchange."""
    live = await start_without(start, clock)
    unknown = [f"NEW{number}/USDT" for number in range(98)]
    symbols = ",".join(["DOGE/USDT", "BTC/USDT", *unknown])
    answer = (await live.get(f"/tickers?exchange=all&symbols={symbols}")).json()
    assert answer["tickers"]["DOGE/USDT"].keys() == set(EXCHANGES)
    assert answer["errors"].keys() == set(unknown)
    assert [lists_read(sandbox, name) for name in EXCHANGES] == [1, 1, 1]


async def test_new_market_is_found_by_streams(
    start: StartGateway, sandbox: Sandbox, clock: FakeClock
) -> None:
    """A subscription waits for the refreshed list, and is answered before later messages."""
    live = await start_without(start, clock)
    async with connect(live.url.replace("http", "ws") + "/ws") as socket:
        await socket.send('{"op":"subscribe","symbols":["DOGE/USDT"],"exchange":"kraken"}')
        await socket.send('{"op":"ping"}')
        answers = [json.loads(await socket.recv()) for _ in range(2)]
    assert [answer["type"] for answer in answers] == ["subscribed", "pong"]
    url = f"{live.url}/stream/DOGE-USDT?exchange=bybit"
    async with live.client.stream("GET", url) as response:
        assert response.status_code == 200
    assert [lists_read(sandbox, name) for name in EXCHANGES] == [1, 0, 1]


async def test_unknown_symbols_cost_one_refresh_a_minute(
    start: StartGateway, sandbox: Sandbox, clock: FakeClock
) -> None:
    """However many unknown symbols are requested, each list is read once a minute."""
    live = await start_without(start, clock)
    for minute in (1, 2):
        for batch in range(2):
            paths = [f"/ticker/A{batch}B{number}/USDT" for number in range(40)]
            answers = await asyncio.gather(*map(live.get, paths))
            assert {answer.status_code for answer in answers} == {404}
        assert [lists_read(sandbox, name) for name in EXCHANGES] == [minute] * 3
        clock.advance(EARLY_REFRESH_SECONDS)


@pytest.mark.parametrize(
    "knobs", [{"status": 500}, {"hang": True}, {"body": "<html>"}, {"refuse": True}], ids=str
)
async def test_failed_refresh_is_no_error_of_the_request(
    start: StartGateway,
    sandbox: Sandbox,
    clock: FakeClock,
    monkeypatch: pytest.MonkeyPatch,
    knobs: dict[str, Any],
) -> None:
    """The answer is the 404 with its hint, after a bounded wait."""
    live = await start_without(start, clock)
    if "hang" in knobs:
        monkeypatch.setattr(gateway, "NEW_MARKET_SECONDS", 0.2)
    await sandbox.set("kraken", rate_limit=-1, only="AssetPairs", **knobs)
    answer = await live.get("/ticker/BTCC/USDT?exchange=kraken")
    assert (answer.status_code, answer.json()["code"]) == (404, "unknown_symbol")
    assert "BTC/USDT" in answer.json()["suggestions"]
    if "refuse" not in knobs:
        assert (await live.get("/ticker/BTC/USDT?exchange=kraken")).status_code == 200


async def test_refresh_for_an_unknown_symbol_leaves_the_budget_to_requests(
    start: StartGateway, sandbox: Sandbox, clock: FakeClock
) -> None:
    """Nothing is refreshed early while most of the budget is used."""
    live = await start_without(start, clock, kraken_budget="4/600")
    for number in range(3):
        assert await live.get(f"/ohlcv/BTC/USDT?exchange=kraken&limit={number + 1}&max_age=0")
    assert live.gateway.manager.limiter.used_ratio("kraken") > EARLY_REFRESH_SHARE
    assert (await live.get("/ticker/DOGE/USDT?exchange=kraken")).status_code == 404
    assert lists_read(sandbox, "kraken") == 0


async def test_requested_refresh_removes_a_delisted_market(
    start: StartGateway, sandbox: Sandbox, clock: FakeClock
) -> None:
    """After an exchange has called a listed symbol unknown, its list is refreshed."""
    live = await start()
    assert (await live.get("/ticker/DOGE/USDT?exchange=kraken")).status_code == 200
    await set_list(sandbox, "kraken", without(IDS["kraken"]))
    clock.advance(EARLY_REFRESH_SECONDS)
    for _ in range(5):
        live.gateway.loader.request_refresh("kraken")
    await eventually(lambda: live.gateway.markets.find("kraken", "DOGE/USDT") is None)
    assert (await live.get("/ticker/DOGE/USDT?exchange=kraken")).status_code == 404
    assert lists_read(sandbox, "kraken") == 1


@pytest.mark.parametrize("name", EXCHANGES)
async def test_maintenance_keeps_the_list_and_answers_503(
    start: StartGateway, sandbox: Sandbox, clock: FakeClock, name: str
) -> None:
    """While all markets are halted, requests get `maintenance`; other exchanges answer."""
    live = await start()
    count = live.gateway.markets.count(name)
    await set_list(sandbox, name, halt(name))
    clock.advance(3601)
    live.gateway.loader.request_refresh(name)
    await eventually(lambda: live.gateway.markets.in_maintenance == {name})
    answer = await live.get(f"/ticker/BTC/USDT?exchange={name}")
    assert (answer.status_code, answer.json()["code"]) == (503, "maintenance")
    assert answer.headers["retry-after"] == "60"
    assert live.gateway.markets.count(name) == count
    assert (await live.get(f"/markets?exchange={name}")).json()["count"] == count
    batch = (await live.get(f"/tickers?exchange={name}&symbols=BTC/USDT")).json()
    assert batch["errors"]["BTC/USDT"]["code"] == "maintenance"
    assert (await live.get(f"/stream/BTC-USDT?exchange={name}")).status_code == 503
    assert (await live.get("/ticker/BTC/USDT")).json()["exchange"] != name
    health = (await live.get("/health")).json()
    assert health["status"] == "degraded"
    assert health["parts"]["markets"]["reason"] == f"{name} is in maintenance"
    shown = (await live.get("/exchanges")).json()[name]
    assert (shown["markets"]["error"], shown["breaker"]["state"]) == ("maintenance", "closed")

    await sandbox.set(name, rate_limit=-1)
    clock.advance(EARLY_REFRESH_SECONDS)
    assert (await live.get(f"/ticker/BTC/USDT?exchange={name}")).status_code == 200
    assert (await live.get("/health")).json()["status"] == "healthy"


async def test_start_during_a_maintenance_knows_the_markets(
    start: StartGateway, sandbox: Sandbox
) -> None:
    """Without an earlier list, a list without a trading market is that of a maintenance."""
    await set_list(sandbox, "binance", halt("binance"))
    live = await start(load_markets=True)
    answer = await live.get("/ticker/BTC/USDT?exchange=binance")
    assert (answer.status_code, answer.json()["code"]) == (503, "maintenance")
    assert (await live.get("/ticker/NO/SUCH?exchange=binance")).status_code == 404


@pytest.mark.parametrize("name", EXCHANGES)
async def test_halted_market_is_refused_and_other_exchanges_answer(
    start: StartGateway, sandbox: Sandbox, clock: FakeClock, name: str
) -> None:
    """A market that was halted within a day has old prices. Later it counts as delisted."""
    live = await start()
    await set_list(sandbox, name, halt(name, IDS[name]))
    clock.advance(EARLY_REFRESH_SECONDS)
    await live.gateway.loader.load(name, EARLY_REFRESH_SECONDS)
    answer = await live.get(f"/ticker/DOGE/USDT?exchange={name}")
    assert (answer.status_code, answer.json()["code"]) == (503, "market_halted")
    assert HALTS[name] in answer.json()["detail"]
    assert (await live.get("/ticker/DOGE/USDT")).json()["exchange"] != name
    listed = (await live.get(f"/markets?exchange={name}&base=DOGE&quote=USDT")).json()["markets"]
    assert listed[0]["statuses"] == {name: HALTS[name]}
    assert (await live.get("/health")).json()["status"] == "healthy"
    clock.advance(KEPT_SECONDS)
    await live.gateway.loader.load(name)
    assert (await live.get(f"/ticker/DOGE/USDT?exchange={name}")).status_code == 404


async def test_halted_market_is_not_refreshed(
    start: StartGateway, sandbox: Sandbox, clock: FakeClock
) -> None:
    """Refresh-ahead and the polling of stale streams fetch no prices of halted markets."""
    live = await start()
    key = live.gateway.find_keys("ticker", "DOGE/USDT", "binance")[0]
    assert await live.gateway.refresh([key], 0) == 1
    await set_list(sandbox, "binance", halt("binance", IDS["binance"]))
    clock.advance(EARLY_REFRESH_SECONDS)
    await live.gateway.loader.load("binance", EARLY_REFRESH_SECONDS)
    assert await live.gateway.refresh([key], 0) == 0
    assert sandbox.count("binance", "ticker") == 0


@pytest.mark.parametrize("status", ["post_only", "limit_only", "reduce_only"])
async def test_restricted_kraken_markets_are_served(
    start: StartGateway, sandbox: Sandbox, status: str
) -> None:
    """Their order books are live. `/markets` has the status."""
    await set_list(
        sandbox, "kraken", lambda row: row | {"status": status if "XDG" in id_of(row) else "online"}
    )
    live = await start(load_markets=True)
    assert (await live.get("/ticker/DOGE/USDT?exchange=kraken")).status_code == 200
    batch = await live.get("/tickers?exchange=kraken&symbols=DOGE/USDT,BTC/USDT&max_age=0")
    assert batch.json()["tickers"].keys() == {"DOGE/USDT", "BTC/USDT"}
    listed = (await live.get("/markets?exchange=kraken&base=DOGE&quote=USDT")).json()["markets"]
    assert listed[0]["statuses"] == {"kraken": status}
    assert listed[0]["ids"] == {"kraken": IDS["kraken"]}


async def test_half_a_list_does_not_replace_a_whole_one(
    start: StartGateway, sandbox: Sandbox, clock: FakeClock
) -> None:
    """The old list stays, /health says so, and the breaker stays closed."""
    live = await start()
    count = live.gateway.markets.count("bybit")
    await set_list(sandbox, "bybit", lambda row: row if id_of(row) < "D" else None)
    clock.advance(EARLY_REFRESH_SECONDS)
    live.gateway.loader.request_refresh("bybit")
    await eventually(lambda: live.gateway.loader.errors)
    assert live.gateway.markets.count("bybit") == count
    assert (await live.get("/ticker/DOGE/USDT?exchange=bybit")).status_code == 200
    health = (await live.get("/health")).json()
    assert health["status"] == "degraded"
    assert health["parts"]["markets"]["reason"] == "old list of bybit (bad_upstream_data)"
    assert live.gateway.manager["bybit"].breaker.state == "closed"
    await sandbox.set("bybit", rate_limit=-1)
    clock.advance(EARLY_REFRESH_SECONDS)
    live.gateway.loader.request_refresh("bybit")
    await eventually(lambda: not live.gateway.loader.errors)


async def test_list_without_a_configured_market_type_is_no_fault(start: StartGateway) -> None:
    """Kraken lists no swaps. It is neither broken nor in maintenance."""
    live = await start(load_markets=True, market_types="swap")
    assert live.gateway.markets.count("kraken") == 0
    assert not live.gateway.loader.errors
    assert not live.gateway.markets.in_maintenance


async def test_short_list_is_accepted_after_a_day(
    start: StartGateway, sandbox: Sandbox, clock: FakeClock
) -> None:
    """A list that nobody confirms for a day is no longer kept."""
    live = await start()
    await set_list(sandbox, "bybit", lambda row: row if id_of(row) < "D" else None)
    clock.advance(3601)
    with pytest.raises(BadUpstreamData):
        await live.gateway.loader.load("bybit")
    clock.advance(KEPT_SECONDS)
    await live.gateway.loader.load("bybit")
    assert live.gateway.markets.find("bybit", "DOGE/USDT") is None


async def test_refresh_survives_any_error(
    start: StartGateway, sandbox: Sandbox, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither a failing load nor a failing report of it ends the loop."""
    live = await start()
    loader = live.gateway.loader
    await set_list(sandbox, "kraken", without(IDS["kraken"]))
    clock.advance(EARLY_REFRESH_SECONDS)
    with monkeypatch.context() as broken:
        broken.setattr(loader, "_fetch", None)
        broken.setattr(loader, "_report", None)
        loader.request_refresh("kraken")
        await eventually(lambda: loader._refreshes["kraken"].failures)
    clock.advance(EARLY_REFRESH_SECONDS)
    loader.request_refresh("kraken")
    await eventually(lambda: live.gateway.markets.find("kraken", "DOGE/USDT") is None)


def market(symbol: str, state: str = "quoted", **members: Any) -> dict[str, Any]:
    base, _, quote = symbol.partition("/")
    row = {"symbol": symbol, "base": base, "quote": quote.partition(":")[0], "id": symbol}
    return row | {"type": "spot", "ws_name": symbol, "status": "", "state": state} | members


def test_markets_that_differ_only_in_case_are_all_found() -> None:
    """Tokenised shares have such names: AAPLx beside a coin AAPLX."""
    markets = Markets(["kraken"], ("spot",))
    markets.replace("kraken", [market("AAPLx/USD"), market("AAPLX/USD"), market("TSLAx/USD")], 1.0)
    found = {
        text: markets.find("kraken", markets.canonical(text))
        for text in ("AAPLx-USD", "AAPLx/USD", "AAPLX/USD", "aaplx/usd", "tslax/usd", "TSLAx/USD")
    }
    assert {text: row and row.symbol for text, row in found.items()} == {
        "AAPLx-USD": "AAPLx/USD",
        "AAPLx/USD": "AAPLx/USD",
        "AAPLX/USD": "AAPLX/USD",
        "aaplx/usd": "AAPLX/USD",
        "tslax/usd": "TSLAx/USD",
        "TSLAx/USD": "TSLAx/USD",
    }


def test_market_does_not_answer_for_an_ended_one_that_differs_in_case() -> None:
    """The price of AAPLx is never that of AAPLX."""
    markets = Markets(["kraken"], ("spot",))
    markets.replace("kraken", [market("AAPLx/USD"), market("AAPLX/USD", "halted")], 1.0)
    assert markets.find("kraken", "AAPLX/USD") is None
    assert markets.find("kraken", markets.canonical("AAPLx/USD")) is not None


def test_inverse_swaps_and_futures_are_not_listed() -> None:
    """`swap` means linear perpetuals."""
    markets = Markets(["bybit"], ("spot", "swap"))
    rows = [
        market("BTC/USDT:USDT", type="swap", inverse=False),
        market("BTC/USD:BTC", type="swap", inverse=True),
        market("BTC/USDT:USDT-261225", type="future"),
    ]
    markets.replace("bybit", rows, 1.0)
    assert [row["symbol"] for row in markets.select(None, None, None)] == ["BTC/USDT:USDT"]


async def test_trading_market_wins_a_symbol_that_two_ids_share(sandbox: Sandbox) -> None:
    """Binance's futures list has IDOL (pending) and IDOLUSDT (trading), both IDOL/USDT:USDT."""
    body = recorded("bn_fut_2026_exchangeInfo")
    await sandbox.set("binance", rate_limit=-1, body=body, only="fapi")
    for rows in (json.loads(body)["symbols"], json.loads(body)["symbols"][::-1]):
        changed = json.dumps(json.loads(body) | {"symbols": rows})
        await sandbox.set("binance", rate_limit=-1, body=changed, only="fapi")
        markets = await slim_markets(sandbox, "binance", market_types="spot,swap")
        assert markets["IDOL/USDT:USDT"]["id"] == "IDOLUSDT"


async def slim_markets(
    sandbox: Sandbox, exchange: str, **settings: object
) -> dict[str, dict[str, Any]]:
    """Return the markets that a snapshot of an exchange's list has, by symbol."""
    options = ClientOptions.from_settings(exchange, make_settings(sandbox, **settings))
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
