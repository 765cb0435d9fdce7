"""The raw pass-through serves the exchanges' own bytes, cached and within the budgets."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from src.cache.entry import LARGE_BYTES
from src.sandbox.server import Sandbox
from tests.conftest import (
    FakeClock,
    Live,
    RedisServer,
    StartGateway,
    eventually,
    make_settings,
    serve,
)

PATHS = {
    "binance": "api/v3/ticker/24hr?symbol=BTCUSDT",
    "bybit": "v5/market/tickers?category=spot&symbol=BTCUSDT",
    "kraken": "0/public/Ticker?pair=XBTUSDT",
}
UNKNOWN = {
    "binance": "api/v3/ticker/24hr?symbol=NOSUCH",
    "bybit": "v5/market/tickers?category=spot&symbol=NOSUCH",
    "kraken": "0/public/Ticker?pair=NOSUCH",
}


async def direct(sandbox: Sandbox, exchange: str, path: str) -> httpx.Response:
    """Ask an exchange without the gateway."""
    async with httpx.AsyncClient() as client:
        return await client.get(f"{sandbox.urls[exchange]}/{path}")


async def raw(live: Live, exchange: str, path: str, **headers: str) -> httpx.Response:
    return await live.get(f"/raw/{exchange}/{path}", headers=headers)


@pytest.mark.parametrize("exchange", PATHS)
async def test_body_and_content_type_are_those_of_the_exchange(
    start: StartGateway, sandbox: Sandbox, exchange: str
) -> None:
    """Also when the answer comes from the cache, and by the fast path."""
    live = await start()
    expected = await direct(sandbox, exchange, PATHS[exchange])
    sandbox.clear_counts()
    for _ in range(3):
        answer = await raw(live, exchange, PATHS[exchange])
        assert answer.status_code == 200
        assert answer.content == expected.content
        assert answer.headers["content-type"] == expected.headers["content-type"]
    assert sandbox.count(exchange) == 1


@pytest.mark.parametrize("exchange", UNKNOWN)
async def test_errors_of_the_exchange_are_passed_on_and_kept(
    start: StartGateway, sandbox: Sandbox, exchange: str
) -> None:
    """An unknown symbol costs one call, and does not close the exchange for others."""
    live = await start()
    expected = await direct(sandbox, exchange, UNKNOWN[exchange])
    sandbox.clear_counts()
    for _ in range(3):
        answer = await raw(live, exchange, UNKNOWN[exchange])
        assert (answer.status_code, answer.content) == (expected.status_code, expected.content)
    assert sandbox.count(exchange) == 1
    assert (await raw(live, exchange, PATHS[exchange])).status_code == 200


@pytest.mark.parametrize("exchange", PATHS)
async def test_head_has_the_fields_of_get(start: StartGateway, exchange: str) -> None:
    live = await start()
    await raw(live, exchange, PATHS[exchange])
    got = await raw(live, exchange, PATHS[exchange])
    head = await live.client.head(f"{live.url}/raw/{exchange}/{PATHS[exchange]}")
    assert (head.status_code, head.content) == (200, b"")
    for name in ("content-type", "content-length", "etag", "age", "cache-status"):
        assert head.headers[name] == got.headers[name]


async def test_answers_have_age_tag_and_cache_status(start: StartGateway, clock: FakeClock) -> None:
    """A client that sends the tag gets 304 while the answer is the same."""
    live = await start(ticker_ttl_seconds=10)
    first = await raw(live, "binance", PATHS["binance"])
    assert first.headers["cache-status"] == "virtuoso; fwd=miss; stored; ttl=10"
    clock.advance(3)
    for _ in range(2):
        second = await raw(live, "binance", PATHS["binance"])
        assert second.headers["age"] == "3"
        assert second.headers["cache-control"] == "max-age=7"
        assert second.headers["cache-status"] == "virtuoso; hit; detail=memory; ttl=7"
    tag = {"If-None-Match": first.headers["etag"]}
    for _ in range(2):
        assert (await raw(live, "binance", PATHS["binance"], **tag)).status_code == 304


@pytest.mark.parametrize(
    "path",
    [
        "api/v3/ticker/24hr?symbol=BTCUSDT&x=1",
        "api/v3/ticker/24hr?x=1&symbol=BTCUSDT",
        "api/v3/ticker/24hr?symbol=BTC%55SDT&x=1",
        "api/v3/ticker/24hr?symbol=BTCUSDT&x=%31",
    ],
)
async def test_equal_requests_share_one_answer(
    start: StartGateway, sandbox: Sandbox, path: str
) -> None:
    """The order of parameters and their encoding do not matter."""
    live = await start()
    await raw(live, "binance", "api/v3/ticker/24hr?symbol=BTCUSDT&x=1")
    await raw(live, "binance", path)
    assert sandbox.count("binance") == 1


async def test_concurrent_requests_share_one_call(start: StartGateway, sandbox: Sandbox) -> None:
    await sandbox.set("binance", rate_limit=-1, latency_ms=100)
    live = await start()
    await asyncio.gather(*(raw(live, "binance", PATHS["binance"]) for _ in range(50)))
    assert sandbox.count("binance") == 1


async def test_replicas_share_answers(
    start: StartGateway, sandbox: Sandbox, redis: RedisServer
) -> None:
    """With status and media type. Errors are shared, too."""
    first, second = [await start(redis_url=redis.url) for _ in range(2)]
    for path, status in ((PATHS["binance"], 200), (UNKNOWN["binance"], 400)):
        sandbox.clear_counts()
        expected = await raw(first, "binance", path)
        await eventually(lambda: not first.gateway.cache.redis._writes)
        actual = await raw(second, "binance", path)
        assert actual.status_code == expected.status_code == status
        assert actual.content == expected.content
        assert actual.headers["content-type"] == expected.headers["content-type"]
        assert sandbox.count("binance") == 1


@pytest.mark.parametrize(
    ("exchange", "path"),
    [
        ("binance", "api/v3/time"),
        ("binance", "fapi/v1/time"),
        ("bybit", "v5/market/time"),
        ("kraken", "0/public/Time"),
    ],
)
async def test_time_is_never_cached(
    start: StartGateway, sandbox: Sandbox, exchange: str, path: str
) -> None:
    live = await start()
    for _ in range(3):
        answer = await raw(live, exchange, path)
        assert answer.status_code == 200
        assert answer.headers["cache-control"] == "no-store"
        assert answer.headers["cache-status"] == "virtuoso; fwd=bypass"
    assert sandbox.count(exchange) == 3


@pytest.mark.parametrize("exchange", PATHS)
async def test_answers_without_json_are_not_kept(
    start: StartGateway, sandbox: Sandbox, exchange: str
) -> None:
    """The page of a proxy is passed on once, with the gateway's code for it."""
    live = await start()
    await sandbox.set(exchange, body="<html>")
    page = await raw(live, exchange, PATHS[exchange])
    assert (page.text, page.headers["x-virtuoso-error"]) == ("<html>", "bad_upstream_data")
    assert page.headers["cache-control"] == "no-store"
    again = await raw(live, exchange, PATHS[exchange])
    assert again.content != page.content


async def test_content_type_with_odd_bytes_is_made_printable(start: StartGateway) -> None:
    """Header fields may hold any byte above 127 (RFC 9110, section 5.5)."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/\xff\r\nContent-Length: 2\r\n\r\n{}")
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        live = await start(binance_rest_url=f"http://127.0.0.1:{port}")
        for _ in range(2):
            reply = await raw(live, "binance", PATHS["binance"])
            assert (reply.status_code, reply.text) == (200, "{}")
            assert reply.headers["content-type"] == "text/?"


async def test_stale_answers_are_never_served(
    start: StartGateway, sandbox: Sandbox, clock: FakeClock
) -> None:
    """Old bytes cannot say that they are old. The other endpoints may serve them, marked."""
    live = await start(ticker_ttl_seconds=2, revalidate_seconds=30, stale_seconds=60)
    await raw(live, "binance", PATHS["binance"])
    clock.advance(2.5)
    await sandbox.set("binance", rate_limit=-1, status=503)
    assert (await raw(live, "binance", PATHS["binance"])).status_code == 503


@pytest.mark.parametrize(
    ("exchange", "path", "weight"),
    [
        ("binance", "api/v3/ticker/24hr?symbol=BTCUSDT", 2),
        ("binance", 'api/v3/ticker/24hr?symbols=["BTCUSDT","ETHUSDT"]', 2),
        ("binance", "api/v3/ticker/24hr", 80),
        ("binance", "api/v3/depth?symbol=BTCUSDT", 5),
        ("binance", "api/v3/depth?symbol=BTCUSDT&limit=1000", 50),
        ("binance", "api/v3/klines?symbol=BTCUSDT&interval=1m", 2),
        ("binance", "api/v3/exchangeInfo", 20),
        ("binance", "api/v3/aggTrades?symbol=BTCUSDT", 4),
    ],
)
async def test_calls_use_the_documented_weight(
    start: StartGateway, exchange: str, path: str, weight: int
) -> None:
    """The header has what all clients have used together."""
    live = await start()
    await live.get(f"/ticker/ETH-USDT?exchange={exchange}")
    answer = await raw(live, exchange, path)
    assert answer.status_code == 200, answer.text
    assert int(answer.headers["x-mbx-used-weight-1m"]) == 2 + weight
    again = await raw(live, exchange, path)
    assert int(again.headers["x-mbx-used-weight-1m"]) == 2 + weight


async def test_swaps_use_their_own_budget(start: StartGateway) -> None:
    live = await start()
    await raw(live, "binance", "fapi/v1/ticker/24hr?symbol=BTCUSDT")
    limiter = live.gateway.manager.limiter
    assert limiter.usage("binance")[0] == 0
    assert limiter.usage("binance-futures")[0] == 1


@pytest.mark.parametrize(
    ("exchange", "status", "body"),
    [
        ("binance", 429, {"code": -1003, "msg": "Too many requests."}),
        (
            "bybit",
            200,
            {"retCode": 10006, "retMsg": "Too many visits!", "result": {}, "retExtInfo": {}},
        ),
        ("kraken", 200, {"error": ["EAPI:Rate limit exceeded"]}),
    ],
)
async def test_spent_budget_is_refused_in_the_words_of_the_exchange(
    start: StartGateway, sandbox: Sandbox, exchange: str, status: int, body: dict[str, Any]
) -> None:
    live = await start(**{f"{exchange}_budget": "1/60"})
    await raw(live, exchange, PATHS[exchange])
    sandbox.clear_counts()
    refused = await raw(live, exchange, UNKNOWN[exchange])
    assert (refused.status_code, refused.json()) == (status, body)
    assert refused.headers["x-virtuoso-error"] == "budget_spent"
    assert 0 < int(refused.headers["retry-after"]) <= 62  # a bucket longer than the window
    assert sandbox.count(exchange) == 0


async def test_ban_stops_all_endpoints(start: StartGateway, sandbox: Sandbox) -> None:
    """Raw requests and the others share breakers, in both directions."""
    live = await start()
    await sandbox.set("binance", rate_limit=-1, error="banned")
    banned = await raw(live, "binance", PATHS["binance"])
    assert banned.status_code == 418
    assert 500 < int(banned.headers["retry-after"]) <= 600
    sandbox.clear_counts()
    assert (await live.get("/ticker/BTC-USDT?exchange=binance")).status_code == 503
    refused = await raw(live, "binance", "api/v3/depth?symbol=BTCUSDT")
    assert (refused.status_code, refused.json()["code"]) == (418, -1003)
    assert refused.headers["x-virtuoso-error"] == "circuit_open"
    assert sandbox.count("binance") == 0


SIGNED = [
    ("?signature=abc", {}),
    ("?symbol=BTCUSDT&timestamp=1&SIGNATURE=x", {}),
    ("", {"X-MBX-APIKEY": "key"}),
    ("", {"API-Sign": "x"}),
    ("", {"API-Key": "x"}),
    ("", {"X-BAPI-API-KEY": "x"}),
    ("", {"x-bapi-sign": "x"}),
    ("", {"X-BAPI-TIMESTAMP": "1"}),
    ("", {"Authorization": "Bearer x"}),
]


@pytest.mark.parametrize(("query", "headers"), SIGNED)
async def test_signed_requests_never_leave_the_gateway(
    start: StartGateway, sandbox: Sandbox, query: str, headers: dict[str, str]
) -> None:
    live = await start()
    path = f"api/v3/ticker/24hr{query or '?symbol=BTCUSDT'}"
    if headers:  # the answer is known to memory and to the fast path
        for _ in range(3):
            assert (await raw(live, "binance", path)).status_code == 200
        sandbox.clear_counts()
    refused = await raw(live, "binance", path, **headers)
    assert (refused.status_code, refused.headers["x-virtuoso-error"]) == (403, "private_request")
    assert "code" not in refused.json(), "clients of Binance read it as a number"
    assert sandbox.count("binance") == 0


@pytest.mark.parametrize(
    "path",
    [
        "binance/api/v3/account",
        "binance/api/v3/order",
        "binance/api/v3/ticker/24hr/",
        "binance/api/v3//ticker/24hr",
        "binance/api/v3/%2e%2e/account",
        "binance/futures/data/../x",
        "binance/futures/data/a%2Fb%2Fc",
        "binance/sapi/v1/account",
        "bybit/v5/order/realtime",
        "bybit/v5/market/../order",
        "kraken/0/private/Balance",
        "kraken/0/public/a%00",
        "kraken/0/public/a%0d%0aX:1",
        "kraken/@evil.example/0/public/Time",
        "nowhere/api/v3/time",
    ],
)
async def test_other_paths_are_refused(start: StartGateway, sandbox: Sandbox, path: str) -> None:
    live = await start()
    refused = await live.get(f"/raw/{path}")
    assert refused.status_code in {400, 404}
    assert refused.headers["content-type"] == "application/problem+json"
    for exchange in PATHS:
        assert sandbox.count(exchange) == 0


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH"])
async def test_other_methods_are_refused(start: StartGateway, method: str) -> None:
    live = await start()
    answer = await live.client.request(method, f"{live.url}/raw/binance/api/v3/time")
    assert answer.status_code == 405


LIST = {
    "binance": "api/v3/exchangeInfo",
    "bybit": "v5/market/instruments-info?category=spot",
    "kraken": "0/public/AssetPairs",
}


@pytest.fixture
async def large_lists(clock: FakeClock) -> AsyncIterator[Sandbox]:
    """Exchanges with so many markets that their lists are large."""
    exchanges = Sandbox(now=clock.time, filler=500)
    await exchanges.start()
    yield exchanges
    await exchanges.stop()


@pytest.mark.parametrize("exchange", LIST)
async def test_large_answers_are_packed(
    large_lists: Sandbox, clock: FakeClock, redis: RedisServer, exchange: str
) -> None:
    """For clients that accept gzip, and in Redis. Plain and packed answers have different tags."""
    expected = await direct(large_lists, exchange, LIST[exchange])
    assert len(expected.content) > LARGE_BYTES
    settings = make_settings(large_lists, redis_url=redis.url)
    plain, packed = {"Accept-Encoding": "identity"}, {"Accept-Encoding": "br, gzip"}
    async with serve(settings, clock) as first, serve(settings, clock) as second:
        await raw(first, exchange, LIST[exchange], **packed)
        await eventually(lambda: not first.gateway.cache.redis._writes)
        for live in (first, second):
            await raw(live, exchange, LIST[exchange], **packed)
            for _ in range(2):
                small = await raw(live, exchange, LIST[exchange], **packed)
                whole = await raw(live, exchange, LIST[exchange], **plain)
                assert small.content == whole.content == expected.content
                assert small.headers["content-encoding"] == "gzip"
                assert int(small.headers["content-length"]) < len(expected.content) / 3
                assert "content-encoding" not in whole.headers
                assert small.headers["vary"] == whole.headers["vary"] == "Accept-Encoding"
                assert small.headers["etag"] != whole.headers["etag"]
                tag = {"If-None-Match": small.headers["etag"]}
                answer = await raw(live, exchange, LIST[exchange], **packed, **tag)
                assert answer.status_code == 304
        name = next(name for name in redis.client.keys("*data:*raw*") if exchange.encode() in name)
        assert redis.client.strlen(name) < len(expected.content) / 3
