"""Limits of one client: streaming connections, and failed logins."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed

from config import Settings
from src.core import metrics
from src.store.redis import RedisStore
from src.web.gate import MAX_CLIENTS, MAX_FAILED_LOGINS, WINDOW_SECONDS, Gate
from tests.conftest import FakeClock, Live, StartGateway, eventually, make_settings, sample

ROOT = Path(__file__).parents[2]
PATH = "/ticker/BTC/USDT"
KEY, OTHER_KEY, TOKEN = "alices-key", "bobs-long-key", "open-sesame"
LOGIN: dict[str, Any] = {"api_keys": f"alice:{KEY},bob:{OTHER_KEY}", "admin_token": TOKEN}

# A WebSocket handshake and a masked text frame with a command.
HANDSHAKE = (
    b"GET /ws HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n\r\n"
)
PING = b"\x81\x8d\0\0\0\0" + b'{"op":"ping"}'


def socket_url(live: Live, query: str = "") -> str:
    return live.url.replace("http", "ws") + "/ws" + query


async def refusal(live: Live, query: str = "", **options: Any) -> tuple[dict[str, Any], int | None]:
    """Connect to `/ws`; return the error of the refusal, and the close code."""
    async with connect(socket_url(live, query), **options) as socket:
        problem: dict[str, Any] = orjson.loads(await socket.recv())
        with pytest.raises(ConnectionClosed):
            await socket.recv()
        return problem, socket.close_code


@asynccontextmanager
async def idle(
    live: Live, count: int, query: str = "", **options: Any
) -> AsyncIterator[list[ClientConnection]]:
    """Hold `count` connections that only ping."""
    async with AsyncExitStack() as stack:
        sockets = [
            await stack.enter_async_context(connect(socket_url(live, query), **options))
            for _ in range(count)
        ]
        for socket in sockets:
            await socket.send('{"op":"ping"}')
            assert orjson.loads(await socket.recv())["type"] == "pong"
        yield sockets


def streams(live: Live) -> Any:
    return live.server.lifespan.state["streams"]


# ---- connections


def test_one_client_cannot_take_all_connections() -> None:
    """By default ten clients are needed for that, and one client may have many pages."""
    settings = Settings()
    assert 50 <= settings.stream_max_per_client <= settings.stream_max_clients / 10


async def test_connections_per_address_are_limited(start: StartGateway) -> None:
    """Too many from one address are refused and counted on both transports; others connect."""
    live = await start(stream_max_per_client=3)
    before = sample("stream_refused_total", reason="max_per_client")
    async with idle(live, 3) as sockets:
        problem, code = await refusal(live)
        assert (problem["type"], problem["status"], problem["code"], code) == (
            "error",
            429,
            "too_many_connections",
            1013,
        )
        assert "STREAM_MAX_PER_CLIENT" in problem["detail"]
        answer = await live.get("/stream/BTC-USDT")
        assert (answer.status_code, answer.json()["code"]) == (429, "too_many_connections")
        assert answer.headers["content-type"] == "application/problem+json"
        assert sample("stream_refused_total", reason="max_per_client") == before + 2
        async with idle(live, 3, local_addr=("127.0.0.2", 0)):
            assert len(streams(live).connections) == 6
        await sockets[0].close()
        await eventually(lambda: len(streams(live).connections) == 2)
        async with idle(live, 1):
            pass


async def test_two_thousand_sockets_of_one_address_leave_room_for_others(
    start: StartGateway,
) -> None:
    """With default settings, most of the sockets are refused, and another address connects."""
    live = await start()
    limit = live.gateway.settings.stream_max_per_client
    address = ("127.0.0.1", httpx.URL(live.url).port)
    held = []
    refused = 0
    for _ in range(live.gateway.settings.stream_max_clients // limit):
        attempts = [asyncio.open_connection(*address) for _ in range(limit)]
        for reader, writer in await asyncio.gather(*attempts):
            writer.write(HANDSHAKE)
            assert b" 101 " in await reader.readuntil(b"\r\n\r\n")
            writer.write(PING)
            if b"too_many_connections" in await reader.read(1024):
                refused += 1
                writer.close()
            else:
                held.append(writer)
    assert (len(held), refused) == (limit, 2000 - limit)
    async with idle(live, 1, local_addr=("127.0.0.2", 0)):
        pass
    for writer in held:
        writer.close()


async def test_both_transports_share_the_limit(start: StartGateway) -> None:
    """An event stream counts for its address until it ends, however it ends."""
    live = await start(stream_max_per_client=2)
    for _ in range(3):
        async with (
            live.client.stream("GET", f"{live.url}/stream/BTC-USDT") as events,
            idle(live, 1),
        ):
            assert events.status_code == 200
            assert (await refusal(live))[0]["code"] == "too_many_connections"
        await eventually(lambda: not streams(live).connections)
    assert (await live.get("/stream/NO-SUCH")).status_code == 404
    async with idle(live, 2):
        pass


async def test_limit_is_per_key(start: StartGateway) -> None:
    """A key has its own limit from any address; another key at that address has its own."""
    live = await start(stream_max_per_client=2, **LOGIN)
    header = {"X-API-Key": KEY}
    async with (
        idle(live, 1, f"?token={KEY}"),
        idle(live, 1, additional_headers=header, local_addr=("127.0.0.2", 0)),
        idle(live, 2, f"?token={OTHER_KEY}"),
    ):
        assert (await refusal(live, additional_headers=header))[0]["code"] == "too_many_connections"
        assert (await live.get(f"/stream/BTC-USDT?token={KEY}")).json()[
            "code"
        ] == "too_many_connections"


async def test_limit_behind_a_proxy_is_per_client(start: StartGateway) -> None:
    """The proxy's own address is not the client."""
    live = await start(stream_max_per_client=1, trusted_proxies="127.0.0.1")
    headers = [{"X-Forwarded-For": f"203.0.113.{number}"} for number in range(3)]
    async with (
        idle(live, 1, additional_headers=headers[0]),
        idle(live, 1, additional_headers=headers[1]),
    ):
        assert (await refusal(live, additional_headers=headers[0]))[0][
            "code"
        ] == "too_many_connections"
        assert (await live.get("/stream/BTC-USDT", headers=headers[1])).status_code == 429
        async with idle(live, 1, additional_headers=headers[2]):
            pass


async def test_full_gateway_has_its_own_error(start: StartGateway) -> None:
    """If all connections are taken, the error and the metric say so."""
    live = await start(stream_max_per_client=2, stream_max_clients=2)
    before = sample("stream_refused_total", reason="max_clients")
    async with idle(live, 1), idle(live, 1, local_addr=("127.0.0.2", 0)):
        assert (await refusal(live))[0]["code"] == "too_many_streams"
        assert (await live.get("/stream/BTC-USDT")).json()["code"] == "too_many_streams"
    assert sample("stream_refused_total", reason="max_clients") == before + 2


# ---- failed logins


def counted(client: str, outcome: str) -> float:
    metrics.flush()  # as at each scrape
    return sample("client_requests_total", client=client, outcome=outcome)


async def post(live: Live, token: str | None, **options: Any) -> httpx.Response:
    header = {} if token is None else {"Authorization": f"Bearer {token}"}
    return await live.client.post(f"{live.url}/admin/maintenance/check", headers=header, **options)


@pytest.mark.parametrize(
    "limit", [0, 600], ids=["without CLIENT_RATE_LIMIT", "with CLIENT_RATE_LIMIT"]
)
async def test_wrong_keys_are_limited(start: StartGateway, clock: FakeClock, limit: int) -> None:
    """After too many, the answer has Retry-After; valid keys and other addresses still work."""
    live = await start(client_rate_limit=limit, **LOGIN)
    wrong, before = (
        {"X-API-Key": "wrong-secret"},
        {outcome: counted("unknown", outcome) for outcome in ("unauthorized", "limited")},
    )
    answers = [await live.get(PATH, headers=wrong) for _ in range(MAX_FAILED_LOGINS + 5)]
    assert [answer.status_code for answer in answers] == [401] * MAX_FAILED_LOGINS + [429] * 5
    last = answers[-1]
    assert last.json()["code"] == "too_many_requests"
    assert "wrong keys" in last.json()["detail"]
    assert "ratelimit" not in last.headers  # this header is about admitted requests
    assert 0 < int(last.headers["retry-after"]) <= WINDOW_SECONDS + 1
    assert counted("unknown", "unauthorized") == before["unauthorized"] + MAX_FAILED_LOGINS
    assert counted("unknown", "limited") == before["limited"] + 5
    assert (await live.get(PATH, headers={"X-API-Key": KEY})).status_code == 200
    async with httpx.AsyncClient(
        transport=httpx.AsyncHTTPTransport(local_address="127.0.0.2")
    ) as other:
        assert (await other.get(live.url + PATH, headers=wrong)).status_code == 401
    clock.advance(int(last.headers["retry-after"]))
    assert (await live.get(PATH, headers=wrong)).status_code == 401


def test_documents_state_the_limit() -> None:
    """API document and runbook name the limit of the code."""
    assert (
        f"More than {MAX_FAILED_LOGINS} wrong keys or admin tokens a minute"
        in (ROOT / "docs/api.md").read_text()
    )
    assert (
        f"After {MAX_FAILED_LOGINS} invalid keys per minute"
        in (ROOT / "docs/runbook.md").read_text()
    )


async def test_missing_key_does_not_count(start: StartGateway) -> None:
    """The answer stays 401, so that the page asks for a key."""
    live = await start(**LOGIN)
    answers = [await live.get(PATH) for _ in range(MAX_FAILED_LOGINS + 5)]
    assert {answer.status_code for answer in answers} == {401}
    wrong = await live.get(PATH, headers={"X-API-Key": "wrong-secret"})
    assert (wrong.status_code, wrong.json()) == (401, answers[0].json())


async def test_all_endpoints_share_the_count_of_wrong_keys(start: StartGateway) -> None:
    """`/ws`, `/stream` and REST share the count of an address, and refuse beyond the limit."""
    live = await start(**LOGIN)
    for _ in range(MAX_FAILED_LOGINS // 2):
        problem, code = await refusal(live, "?token=wrong-secret")
        assert (problem["code"], code) == ("unauthorized", 1008)
        assert (await live.get("/stream/BTC-USDT?token=wrong-secret")).status_code == 401
    problem, code = await refusal(live, additional_headers={"X-API-Key": "wrong-secret"})
    assert (problem["status"], problem["code"], code) == (429, "too_many_requests", 1013)
    assert problem["retry_after"] > 0
    assert (await live.get("/stream/BTC-USDT?token=wrong-secret")).status_code == 429
    assert (
        await live.get("/api/dashboard/data", headers={"X-API-Key": "wrong-secret"})
    ).status_code == 429
    assert (await post(live, "wrong-token")).status_code == 429
    async with idle(live, 1, f"?token={KEY}"):
        pass
    async with live.client.stream("GET", f"{live.url}/stream/BTC-USDT?token={KEY}") as events:
        assert events.status_code == 200


async def test_wrong_admin_tokens_are_limited_and_counted(
    start: StartGateway, clock: FakeClock
) -> None:
    """`/admin` has no other limit; a missing and a wrong token get the same answer."""
    live = await start(**LOGIN)
    before = {
        outcome: counted("/admin", outcome) for outcome in ("admitted", "unauthorized", "limited")
    }
    missing, wrong = await post(live, None), await post(live, "wrong-token")
    assert (missing.status_code, missing.json()) == (wrong.status_code, wrong.json())
    assert (
        missing.headers["www-authenticate"]
        == wrong.headers["www-authenticate"]
        == 'Bearer realm="admin"'
    )
    codes = [(await post(live, "wrong-token")).status_code for _ in range(MAX_FAILED_LOGINS + 4)]
    assert codes == [401] * (MAX_FAILED_LOGINS - 1) + [429] * 5
    limited = await post(live, TOKEN[:-1])
    assert (limited.status_code, limited.json()["code"]) == (429, "too_many_requests")
    assert [(await post(live, TOKEN)).status_code for _ in range(2)] == [200, 200]
    assert (await post(live, None)).status_code == 401
    assert {outcome: counted("/admin", outcome) - before[outcome] for outcome in before} == {
        "admitted": 2,
        "unauthorized": MAX_FAILED_LOGINS + 2,
        "limited": 6,
    }
    clock.advance(int(limited.headers["retry-after"]))
    assert (await post(live, "wrong-token")).status_code == 401


async def test_forged_header_does_not_reset_the_count(start: StartGateway) -> None:
    """A client cannot pretend to be many addresses."""
    live = await start(proxy_headers=True, **LOGIN)
    codes = [
        (
            await live.get(
                PATH,
                headers={"X-API-Key": "wrong-secret", "X-Forwarded-For": f"203.0.113.{number}"},
            )
        ).status_code
        for number in range(MAX_FAILED_LOGINS + 3)
    ]
    assert codes == [401] * MAX_FAILED_LOGINS + [429] * 3


async def test_concurrent_wrong_keys_are_counted(start: StartGateway) -> None:
    """Concurrent attempts are counted one by one."""
    live = await start(**LOGIN)
    answers = await asyncio.gather(
        *(live.get(PATH, headers={"X-API-Key": f"wrong-{number}"}) for number in range(60))
    )
    assert sum(answer.status_code == 401 for answer in answers) == MAX_FAILED_LOGINS


async def test_number_of_failing_addresses_is_limited(clock: FakeClock) -> None:
    """The least recently seen addresses are dropped."""
    gate, store = Gate(make_settings(**LOGIN), clock), RedisStore("", clock)

    async def attempt(host: str) -> str:
        scope = {
            "type": "http",
            "path": PATH,
            "headers": [(b"x-api-key", b"wrong-secret")],
            "client": (host, 1),
        }
        with pytest.raises(Exception, match="key") as caught:
            await gate.admit(scope, store)
        return type(caught.value).__name__

    for _ in range(MAX_FAILED_LOGINS):
        assert await attempt("192.0.2.1") == "Unauthorized"
    for number in range(MAX_CLIENTS + 50):
        await attempt(f"10.{number // 65_536}.{number // 256 % 256}.{number % 256}")
        if number % 1000 == 0:
            assert await attempt("192.0.2.1") == "TooManyFailedLogins"
    assert gate._client.cache_info().currsize == MAX_CLIENTS
