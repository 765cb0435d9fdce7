"""Hostile requests: answers are bounded and clear, without upstream calls and without secrets."""

import asyncio
import gc
import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from src.core.errors import GatewayError
from src.exchanges.markets import Markets
from src.sandbox.server import Sandbox
from src.web.middleware import MAX_HEADER_BYTES, MAX_URL_BYTES
from tests.conftest import FakeClock, RedisServer, StartGateway, eventually

EXCHANGES = ("bybit", "binance", "kraken")


def upstream_calls(sandbox: Sandbox) -> int:
    return sum(sandbox.count(name) for name in EXCHANGES)


@pytest.mark.parametrize(
    "target",
    [
        "/ticker/../../etc/passwd",
        "/ticker/%2e%2e%2f%2e%2e%2fetc/passwd",
        "/ticker/http://evil.example/x",
        "/ticker/BTC/USDT/extra",
        "/ticker/__class__/__init__",
        "/ticker/BTC%00USDT",
        "/ticker/BTC%0d%0aX:1/USDT",
        "/ticker/%ff%fe/USDT",
        "/ticker/BTC%2FUSDT%0a",
        "/ticker/" + "A" * 3000,
        "/ticker/",
        "/ticker/*/*",
        "/orderbook/'%20OR%201=1/USDT",
        "/ticker/BTC/USDT:",
        "/ticker/${jndi:ldap}/USDT",
        "/ticker/BTC/USDT?exchange=__class__",
        "/ticker/BTC/USDT?exchange=http://evil.example",
        "/ticker/BTC/USDT?exchange=bybit%0d%0a",
        "/ticker/BTC/USDT?exchange=",
        "/markets?exchange=ccxt",
        "/tickers?symbols=BTC/USDT&exchange=__init__",
    ],
)
async def test_hostile_names_are_refused_without_a_call(
    start: StartGateway, sandbox: Sandbox, target: str
) -> None:
    """Paths, URLs, attributes and control characters as symbol or exchange are 400 or 404."""
    live = await start()
    raw = await live.raw(f"GET {target} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
    head, _, body = raw.partition(b"\r\n\r\n")
    assert head.split()[1] in (b"400", b"404", b"422"), raw
    assert b"application/problem+json" in head
    assert b"evil" not in head
    assert len(body) < 1000
    assert upstream_calls(sandbox) == 0


async def test_unknown_exchange_error_lists_the_known_ones(start: StartGateway) -> None:
    """The error names the configured exchanges."""
    answer = await (await start()).get("/ticker/BTC/USDT?exchange=mtgox")
    assert (answer.status_code, answer.json()["code"]) == (404, "unknown_exchange")
    assert answer.json()["detail"].endswith("use one of: bybit, binance, kraken")


async def test_unknown_symbols_cost_nothing(
    start: StartGateway, sandbox: Sandbox, redis: RedisServer
) -> None:
    """A thousand unknown symbols: 404 each, no call, and memory, Redis and labels do not grow."""
    live = await start(redis_url=redis.url, stale_seconds=3600)
    for path in (
        "/ticker/BTC/USDT",
        "/ticker/NO/SUCH",
        "/metrics",
    ):  # these create the time series that the flood increases
        await live.get(path)
    await eventually(lambda: redis.client.keys("virtuoso:3:data:*"))
    series = len((await live.get("/metrics")).text.splitlines())
    keys, entries = redis.client.keys("virtuoso:3:data:*"), len(live.gateway.cache.memory)
    paths = [
        f"/ticker/{a}{b}{c}/USDT"
        for a in string.ascii_uppercase[:10]
        for b in string.digits
        for c in "KLMNOPQRST"
    ]
    for start_at in range(0, len(paths), 100):
        answers = await asyncio.gather(
            *(live.get(path) for path in paths[start_at : start_at + 100])
        )
        assert {answer.status_code for answer in answers} == {404}
    assert upstream_calls(sandbox) == 1
    assert (redis.client.keys("virtuoso:3:data:*"), len(live.gateway.cache.memory)) == (
        keys,
        entries,
    )
    assert len((await live.get("/metrics")).text.splitlines()) == series


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=60))
def test_any_text_is_a_symbol_or_refused(text: str) -> None:
    """Any text becomes a canonical symbol of a strict form, or a clear refusal."""
    markets = Markets(EXCHANGES, ("spot",))
    markets.replace(
        "kraken",
        [
            {
                "symbol": "BTC/USDT",
                "base": "BTC",
                "quote": "USDT",
                "type": "spot",
                "id": "XBTUSDT",
                "ws_name": "BTC/USDT",
                "status": "online",
                "state": "quoted",
            }
        ],
        0,
    )
    refusal, symbol = None, ""
    try:
        symbol = markets.canonical(text)
    except GatewayError as error:
        refusal = error
    if refusal is None:
        assert symbol.isprintable()
        assert " " not in symbol
        markets.suggestions(symbol)
    else:
        assert (refusal.status, refusal.detail.isprintable()) == (400, True)
        assert len(refusal.detail) < 200


@pytest.mark.parametrize(
    "query",
    [
        "limit=1e9",
        "limit=-1",
        "limit=0",
        "limit=201",
        "limit=NaN",
        "limit=" + "9" * 5000,
        "max_age=NaN",
        "max_age=inf",
        "max_age=-1",
        "max_age=1e308",
        "max_age=x",
        "exchange=" + "x" * 33,
    ],
)
async def test_out_of_range_parameter_is_a_short_422(
    start: StartGateway, sandbox: Sandbox, query: str
) -> None:
    """The error names what is allowed, and does not repeat the value."""
    live = await start()
    answer = await live.get(f"/orderbook/BTC-USDT?{query}")
    assert (answer.status_code, answer.json()["code"]) == (422, "invalid_parameter")
    assert answer.json()["detail"].startswith(query.split("=")[0])
    assert len(answer.text) < 400
    assert upstream_calls(sandbox) == 0


@pytest.mark.parametrize(
    "path",
    [
        "/ohlcv/BTC-USDT?timeframe=2m",
        "/ohlcv/BTC-USDT?since=-1",
        "/trades/BTC-USDT?limit=1001",
        "/tickers",
        "/tickers?symbols=",
        "/tickers?symbols=,,",
    ],
)
async def test_invalid_parameter_error_names_the_parameter(start: StartGateway, path: str) -> None:
    """Each is a 422 with the name of the parameter."""
    answer = await (await start()).get(path)
    assert answer.status_code == 422
    assert any(
        name in answer.json()["detail"] for name in ("timeframe", "since", "limit", "symbols")
    )


async def test_too_many_symbols_are_refused(start: StartGateway) -> None:
    """A batch has at most a hundred symbols."""
    many = ",".join(f"A{number}/USDT" for number in range(101))
    answer = await (await start()).get(f"/tickers?symbols={many}")
    assert (answer.status_code, answer.json()["code"]) == (422, "invalid_parameter")


async def test_extra_parameters_do_not_split_the_cache(
    start: StartGateway, sandbox: Sandbox
) -> None:
    """The cache key consists of canonical values; other parts of the query change nothing."""
    live = await start()
    for query in (
        "",
        "?x=1",
        "?x=2&x=3",
        "?exchange=kraken&exchange=bybit",
        "?exchange=BYBIT",
        "?_=99",
        "?max_age=",
    ):
        answer = await live.get(f"/ticker/BTC/USDT{query}")
        assert answer.status_code == (422 if query == "?max_age=" else 200)
    assert upstream_calls(sandbox) == 1


async def test_large_urls_and_headers_are_refused(start: StartGateway) -> None:
    """414 and 431 beyond the limits, and the connection's memory is released."""
    live = await start()
    assert (await live.get("/ticker/BTC/USDT?" + "x" * MAX_URL_BYTES)).status_code == 414
    assert (await live.get("/health", headers={"X-Big": "x" * MAX_HEADER_BYTES})).status_code == 431


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"GET /health HTTP/1.1\r\n\r\n",
        b"POST /health HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n"
        b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"GET /health HTTP/9.9\r\nHost: x\r\n\r\n",
        b"\x00\x01\x02\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: x\r\nBad Header: 1\r\n\r\n",
    ],
    ids=["no host", "two lengths", "version", "binary", "header name"],
)
async def test_malformed_http_is_a_400(start: StartGateway, request_bytes: bytes) -> None:
    """Missing Host, contradicting lengths and junk get 400, and the server continues."""
    live = await start()
    answer = await live.raw(request_bytes)
    assert answer.split(b" ", 2)[1] == b"400", answer
    assert (await live.get("/health")).status_code == 200


async def test_wrong_methods_get_405_with_allow(start: StartGateway) -> None:
    """The answer names the allowed methods."""
    live = await start(admin_token="t0ken-t0ken")
    for method, path, allowed in (
        ("DELETE", "/ticker/BTC/USDT", "GET, HEAD"),
        ("GET", "/admin/cache/clear", "POST"),
    ):
        answer = await live.client.request(method, live.url + path)
        assert (answer.status_code, answer.json()["code"], answer.headers["allow"]) == (
            405,
            "method_not_allowed",
            allowed,
        )


async def test_admin_requires_its_token(start: StartGateway) -> None:
    """Off without a configured token; 401 with a challenge for a wrong one; never by GET."""
    off, on = await start(), await start(admin_token="open-sesame")
    for path in ("/admin/cache/clear", "/admin/breakers/reset", "/admin/maintenance/daily"):
        assert (
            await off.client.post(off.url + path, headers={"Authorization": "Bearer x"})
        ).status_code == 404
        for headers in (
            {},
            {"Authorization": "Bearer wrong"},
            {"Authorization": "open-sesame"},
            {"X-API-Key": "open-sesame"},
        ):
            refused = await on.client.post(on.url + path, headers=headers)
            assert (refused.status_code, refused.headers["www-authenticate"]) == (
                401,
                'Bearer realm="admin"',
            )
        assert (
            await on.client.post(on.url + path, headers={"Authorization": "Bearer open-sesame"})
        ).status_code == 200


async def test_secrets_appear_nowhere(
    start: StartGateway,
    sandbox: Sandbox,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """With a canary in every secret setting: in no answer, header, metric, log line or repr."""
    secrets: dict[str, str] = {
        f"{name}_{part}": f"canary-{name}-{part}"
        for name in EXCHANGES
        for part in ("api_key", "api_secret")
    }
    secrets |= {"redis_url": "redis://:canary-redis@127.0.0.1:1/0", "admin_token": "canary-admin"}
    secrets |= {"api_keys": "me:canary-client", "https_proxy": "http://u:canary-proxy@127.0.0.1:1"}
    live = await start(**secrets, cb_threshold=1, exchange_timeout_seconds=0.2)
    key = {"X-API-Key": "canary-client"}
    texts = []
    for knobs in (
        {},
        {"status": 500},
        {"body": "junk"},
        {"geo_block": True},
        {"hang": True},
        {"refuse": True},
    ):
        for name in EXCHANGES:
            await sandbox.set(name, rate_limit=-1, **knobs)
            live.gateway.manager[name].breaker.reset()
        for path in (
            "/ticker/BTC/USDT?max_age=0",
            "/tickers?symbols=BTC/USDT,X&exchange=all",
            "/health",
            "/exchanges",
            "/metrics",
            "/openapi.json",
            "/markets",
            "/nope",
            "/ticker/x",
        ):
            answer = await live.get(path, headers=key)
            texts.append(answer.text + str(answer.headers))
    texts.append(
        (await live.get("/health")).text
        + (await live.client.post(live.url + "/admin/cache/clear")).text
    )
    gateway = live.gateway
    texts.append(
        repr(
            [
                gateway.settings,
                gateway.store,
                gateway.store.breaker,
                gateway.manager,
                gateway.cache,
                gateway,
            ]
        )
    )
    out, err = capfd.readouterr()
    assert "canary" not in "".join(texts) + out + err + caplog.text


async def test_vanished_clients_leave_nothing_behind(
    start: StartGateway, sandbox: Sandbox, clock: FakeClock
) -> None:
    """Two hundred connections send a request and close: no failure, and no task remains."""
    live = await start(cb_threshold=1)
    await sandbox.set("bybit", latency_ms=100, rate_limit=-1)
    port = int(live.url.rsplit(":", 1)[1])

    async def vanish() -> None:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET /ticker/BTC/USDT?max_age=0 HTTP/1.1\r\nHost: x\r\n\r\n")
        await writer.drain()
        writer.transport.abort()

    await live.get(
        "/ticker/BTC/USDT"
    )  # its upstream connection stays open, and keeps a task of the sandbox
    before = len(asyncio.all_tasks())
    await asyncio.gather(*(vanish() for _ in range(200)))
    await eventually(lambda: len(asyncio.all_tasks()) <= before and not live.gateway.cache._tasks)
    assert live.gateway.manager["bybit"].breaker.state == "closed"
    gc.collect()
