"""API keys, addresses behind proxies, and the rate limit that replicas share."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from ipaddress import IPv4Address, ip_network
from pathlib import Path

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from config import ConfigError
from src.core import metrics
from src.core.clock import SystemClock
from src.store.redis import RedisStore
from src.web.gate import MAX_CLIENTS, MAX_FORWARDED, Gate
from tests.conftest import (
    FakeClock,
    Live,
    RedisServer,
    StartGateway,
    eventually,
    make_settings,
    sample,
)

ROOT = Path(__file__).parents[2]
PATH = "/ticker/BTC/USDT"


async def statuses(live: Live, count: int, **headers: str) -> Counter[int]:
    """Send `count` requests in turn, and count the statuses."""
    return Counter([(await live.get(PATH, headers=headers)).status_code for _ in range(count)])


def left(answer: httpx.Response) -> int:
    """Return the remaining requests that the answer reports."""
    return int(answer.headers["ratelimit"].split(";r=")[1].split(";")[0])


def counted(client: str, outcome: str) -> float:
    metrics.flush()  # as at each scrape
    return sample("client_requests_total", client=client, outcome=outcome)


async def two_replicas(start: StartGateway, redis: RedisServer, limit: int) -> list[Live]:
    """Start two gateways with one Redis."""
    return [
        await start(redis_url=redis.url, client_rate_limit=limit, clock=SystemClock())
        for _ in range(2)
    ]


@pytest.mark.parametrize("limit", [7, 150])
async def test_replicas_share_one_limit(
    start: StartGateway, redis: RedisServer, limit: int
) -> None:
    """A client gets its limit once and completely, however it spreads requests over replicas."""
    replicas = await two_replicas(start, redis, limit)
    answers = [await replicas[number % 3 == 0].get(PATH) for number in range(limit + 20)]
    admitted = [answer for answer in answers if answer.status_code == 200]
    assert len(admitted) == limit
    assert min(left(answer) for answer in admitted) == 0
    refused = next(answer for answer in answers if answer.status_code == 429)
    assert 0 < int(refused.headers["retry-after"]) <= 61
    assert left(refused) == 0


async def test_burst_gets_exactly_the_limit(start: StartGateway, redis: RedisServer) -> None:
    """Concurrent requests to both replicas are admitted up to the limit; none is lost."""
    replicas = await two_replicas(start, redis, 120)
    answers = [await live.get(PATH) for live in replicas]
    for _ in range(14):  # ten at once: more would delay Redis' replies in this event loop
        answers += await asyncio.gather(*(replicas[number % 2].get(PATH) for number in range(10)))
    assert Counter(answer.status_code for answer in answers) == {200: 120, 429: 22}


async def test_most_requests_do_not_call_redis(start: StartGateway, redis: RedisServer) -> None:
    """A replica calls Redis once for one second's share of permits."""
    live = await start(redis_url=redis.url, client_rate_limit=600, clock=SystemClock())
    before = sample(
        "cache_tier_operations_total", tier="redis", operation="limit", outcome="success"
    )
    answers = [await live.get(PATH) for _ in range(100)]
    calls = (
        sample("cache_tier_operations_total", tier="redis", operation="limit", outcome="success")
        - before
    )
    assert calls == 10
    assert [left(answer) for answer in answers] == list(range(599, 499, -1))


async def test_refused_client_does_not_call_redis(start: StartGateway, redis: RedisServer) -> None:
    """Until its wait is over it is refused from memory, with a decreasing wait."""
    clock = FakeClock()
    live = await start(redis_url=redis.url, client_rate_limit=5, clock=clock)
    assert await statuses(live, 6) == {200: 5, 429: 1}
    before = sample(
        "cache_tier_operations_total", tier="redis", operation="limit", outcome="success"
    )
    first = await live.get(PATH)
    clock.advance(10)
    second = await live.get(PATH)
    assert int(first.headers["retry-after"]) - int(second.headers["retry-after"]) == 10
    assert (
        sample("cache_tier_operations_total", tier="redis", operation="limit", outcome="success")
        == before
    )
    redis.client.flushall()  # Redis has its own clock, which the test cannot advance
    clock.advance(60)
    assert await statuses(live, 1) == {200: 1}


async def test_permits_expire_with_the_window(start: StartGateway, redis: RedisServer) -> None:
    """A lot that was not spent within a window is void; a new one is taken."""
    clock = FakeClock()
    live = await start(redis_url=redis.url, client_rate_limit=600, clock=clock)
    await live.get(PATH)
    clock.advance(60)
    redis.client.flushall()
    assert left(await live.get(PATH)) == 599
    assert (await live.get(PATH)).headers["ratelimit"].startswith('"client";r=598;')


async def test_replicas_count_alone_without_redis(
    start: StartGateway, own_redis: RedisServer
) -> None:
    """Without Redis each replica enforces the limit; what was spent counts afterwards."""
    live = await start(redis_url=own_redis.url, client_rate_limit=8, clock=SystemClock())
    assert await statuses(live, 3) == {200: 3}
    own_redis.kill()
    assert await statuses(live, 3) == {200: 3}
    own_redis.start()
    await eventually(lambda: live.gateway.store.up, 20)
    assert await statuses(live, 4) == {200: 2, 429: 2}


async def test_valid_keys_have_separate_limits(start: StartGateway) -> None:
    """Requests of others from the same address, with wrong keys too, do not use a key's limit."""
    live = await start(api_keys="alice:first-secret,bob:second-secret", client_rate_limit=3)
    assert await statuses(live, 5, **{"X-API-Key": "wrong-secret"}) == {401: 5}
    for name, key in (("alice", "first-secret"), ("bob", "second-secret")):
        admitted, limited = counted(name, "admitted"), counted(name, "limited")
        assert await statuses(live, 4, **{"X-API-Key": key}) == {200: 3, 429: 1}
        assert (counted(name, "admitted"), counted(name, "limited")) == (admitted + 3, limited + 1)


async def test_no_client_metrics_without_keys_and_limit(start: StartGateway) -> None:
    """Without keys and limit there are no client metrics and no limit headers."""
    live = await start()
    before = counted("anonymous", "admitted")
    assert "ratelimit" not in (await live.get(PATH)).headers
    assert counted("anonymous", "admitted") == before


@asynccontextmanager
async def coming_from(address: str) -> AsyncIterator[httpx.AsyncClient]:
    """Return a client that connects from another address of this machine."""
    async with httpx.AsyncClient(
        transport=httpx.AsyncHTTPTransport(local_address=address), timeout=90
    ) as client:
        yield client


SPELLINGS = [
    "",
    "127.0.0.1",
    "127.0.0.1:80",
    "::ffff:127.0.0.1",
    "[::1]:80",
    "203.0.113.{}",
    "203.0.113.{}:443",
    "junk-{}",
    "10.0.0.1, 203.0.113.{}",
    "203.0.113.{}, 127.0.0.1",
    "[2001:db8::{}]:80",
    "unknown",
    ",",
]


@pytest.mark.parametrize(
    "proxy_headers", [False, True], ids=["as documented", "with uvicorn's proxy headers"]
)
@pytest.mark.parametrize("limit", [4, 120], ids=["one by one", "in lots"])
async def test_headers_do_not_change_the_counted_client(
    start: StartGateway, proxy_headers: bool, limit: int
) -> None:
    """Without TRUSTED_PROXIES a client has one limit, whatever headers it sends."""
    live = await start(client_rate_limit=limit, proxy_headers=proxy_headers)
    count = max(2 * limit // len(SPELLINGS), 1)
    for number in range(count):
        for spelling in SPELLINGS:
            answer = await live.get(PATH, headers={"X-Forwarded-For": spelling.format(number)})
            sent = number * len(SPELLINGS) + SPELLINGS.index(spelling) + 1
            assert answer.status_code == (200 if sent <= limit else 429), (sent, spelling)
    assert await statuses(live, 2) == {429: 2}
    async with coming_from("127.0.0.2") as other:
        assert (await other.get(live.url + PATH)).status_code == 200


@pytest.mark.parametrize(
    "proxy_headers", [False, True], ids=["as documented", "with uvicorn's proxy headers"]
)
async def test_only_trusted_proxies_may_forward_addresses(
    start: StartGateway, proxy_headers: bool
) -> None:
    """A proxy is recognised by its connection, not by a header."""
    live = await start(
        client_rate_limit=2, trusted_proxies="127.0.0.3", proxy_headers=proxy_headers
    )
    async with coming_from("127.0.0.3") as proxy, coming_from("127.0.0.2") as other:
        for client, header in (
            (live.client, "127.0.0.3, 198.51.100.1"),
            (other, "127.0.0.3"),
            (proxy, "198.51.100.2"),
        ):
            answers = [
                await client.get(live.url + PATH, headers={"X-Forwarded-For": header})
                for _ in range(3)
            ]
            assert [answer.status_code for answer in answers] == [200, 200, 429]
        for client, header in (
            (live.client, "198.51.100.9"),
            (other, ""),
            (proxy, "9.9.9.9, 198.51.100.2"),
        ):
            answer = await client.get(live.url + PATH, headers={"X-Forwarded-For": header})
            assert answer.status_code == 429
        assert (
            await proxy.get(live.url + PATH, headers={"X-Forwarded-For": "127.0.0.9"})
        ).status_code == 200


async def test_clients_behind_a_trusted_proxy_have_separate_limits(start: StartGateway) -> None:
    """The nearest untrusted address counts, not what a client wrote in front of it."""
    live = await start(client_rate_limit=2, trusted_proxies="127.0.0.1,10.0.0.0/8")
    for chain in (
        "203.0.113.1",
        "6.6.6.6, 203.0.113.2",
        "203.0.113.3, 10.1.2.3",
        "7.7.7.7, 203.0.113.4, 10.0.0.9",
    ):
        assert await statuses(live, 3, **{"X-Forwarded-For": chain}) == {200: 2, 429: 1}
    for number in range(3):
        answer = await live.get(PATH, headers={"X-Forwarded-For": f"9.9.9.{number}, 203.0.113.1"})
        assert answer.status_code == 429


def address(host: str, forwarded: str, trusted: str = "") -> str:
    gate = Gate(make_settings(client_rate_limit=1, trusted_proxies=trusted), SystemClock())
    return gate._find_address(host, forwarded)


@pytest.mark.parametrize(
    ("host", "forwarded", "trusted", "expected"),
    [
        ("203.0.113.5", "", "", "203.0.113.5"),
        ("203.0.113.5", "198.51.100.1", "", "203.0.113.5"),
        ("10.0.0.2", "198.51.100.1", "10.0.0.0/8", "198.51.100.1"),
        ("10.0.0.2", "198.51.100.1, 10.0.0.3", "10.0.0.0/8", "198.51.100.1"),
        ("10.0.0.2", "10.0.0.4, 10.0.0.3", "10.0.0.0/8", "10.0.0.3"),
        ("10.0.0.2", "10.0.0.4", "10.0.0.0/8", "10.0.0.4"),
        ("10.0.0.2", "not an address", "10.0.0.0/8", "10.0.0.2"),
        ("10.0.0.2", "", "10.0.0.0/8", "10.0.0.2"),
        ("11.0.0.2", "198.51.100.1", "10.0.0.0/8", "11.0.0.2"),
        ("2001:db8:1:2:3::4", "", "", "2001:db8:1:2::/64"),
        ("2001:db8:1:2:9::9", "", "", "2001:db8:1:2::/64"),
        ("fd00::1", "[2001:db8::7]:443", "fd00::/8", "2001:db8::/64"),
        ("fe80::1%eth0", "", "", "fe80::/64"),
        ("::ffff:203.0.113.5", "", "", "203.0.113.5"),
        ("::ffff:10.0.0.2", "198.51.100.1:9", "10.0.0.0/8", "198.51.100.1"),
        ("203.0.113.5", "203.0.113.5", "", "203.0.113.5"),
        ("203.0.113.5", "6.6.6.6, 203.0.113.5:1", "127.0.0.1", "203.0.113.5"),
        ("127.0.0.1", "127.0.0.1", "", "127.0.0.1"),
        ("127.0.0.1", "::1", "", "127.0.0.1"),
        ("::1", "127.0.0.1", "", "::/64"),
        ("2001:db8::1", "2001:db8::1, 6.6.6.6", "", "2001:db8::/64"),
        ("::ffff:203.0.113.5", "203.0.113.5", "", "203.0.113.5"),
        ("::ffff:10.0.0.2", "::ffff:198.51.100.1", "10.0.0.0/8", "198.51.100.1"),
        ("10.0.0.2", "198.51.100.1, ::ffff:10.0.0.3", "10.0.0.0/8", "198.51.100.1"),
        ("10.0.0.2", "6.6.6.6, 198.51.100.1, 10.0.0.3, 10.0.0.4", "10.0.0.0/8", "198.51.100.1"),
        ("10.0.0.2", "6.6.6.6, unknown", "10.0.0.0/8", "10.0.0.2"),
        ("10.0.0.2", "6.6.6.6, unknown, 10.0.0.3", "10.0.0.0/8", "10.0.0.3"),
        ("10.0.0.2", "198.51.100.1,, ", "10.0.0.0/8", "198.51.100.1"),
        ("fd00::1", "2001:db8::7, fd00::2", "fd00::/8", "2001:db8::/64"),
        ("unknown", "", "", "unknown"),
    ],
)
def test_client_address(host: str, forwarded: str, trusted: str, expected: str) -> None:
    """From the connection's address, the header and the trusted networks."""
    assert address(host, forwarded, trusted) == expected


@settings(deadline=None)
@given(st.lists(st.one_of(st.ip_addresses().map(str), st.text(max_size=20))))
def test_untrusted_client_cannot_choose_its_address(parts: list[str]) -> None:
    """The connection's address counts, whatever the client sends."""
    assert address("203.0.113.5", ",".join(parts), "10.0.0.0/8") == "203.0.113.5"


chains = st.lists(
    st.one_of(
        st.ip_addresses().map(str), st.text(max_size=20), st.sampled_from(["unknown", "10.0.0.7"])
    )
)


@settings(deadline=None)
@given(
    chains,
    st.ip_addresses(v=4).filter(lambda address: address not in ip_network("10.0.0.0/8")),
    st.booleans(),
)
def test_text_before_the_nearest_client_is_ignored(
    parts: list[str], client: IPv4Address, is_chain: bool
) -> None:
    """Proxies append the address they see; everything before it, and before junk, is ignored."""
    forwarded = f"{client},10.0.0.8" if is_chain else str(client)
    assert address("10.0.0.2", ",".join([*parts, forwarded]), "10.0.0.0/8") == str(client)
    assert address("10.0.0.2", ",".join([*parts, "unknown"]), "10.0.0.0/8") == "10.0.0.2"


def test_every_start_command_disables_uvicorns_proxy_headers() -> None:
    """TRUSTED_PROXIES decides, not a default of the server."""
    files = [
        ROOT / name
        for name in ("Makefile", "Dockerfile", "deploy/virtuoso.service", "src/sandbox/demo.py")
    ]
    files += [ROOT / "src/api.py", ROOT / "benchmarks/servers.py"]
    for file in files:
        text = file.read_text()
        assert text.count("--no-proxy-headers") == 1, file
        assert "uvicorn" in text


async def test_number_of_clients_is_limited(clock: FakeClock) -> None:
    """The least recently seen clients are dropped; long headers are read from their end."""
    gate, store = Gate(make_settings(client_rate_limit=9), clock), RedisStore("", clock)
    for number in range(MAX_CLIENTS + 50):
        scope = {"client": (f"10.0.{number // 250}.{number % 250}", 1)}
        assert gate.try_admit(scope, {}, store)
        assert gate.try_admit({"client": ("192.0.2.1", 1)}, {}, store) or number >= 9
    assert gate._client.cache_info().currsize == MAX_CLIENTS
    trusting = Gate(make_settings(client_rate_limit=9, trusted_proxies="10.0.0.0/8"), clock)
    header = "1.1.1.1," * MAX_FORWARDED + "198.51.100.1"
    assert (
        trusting._client_id(
            "anonymous", {"client": ("10.0.0.1", 1)}, {b"x-forwarded-for": header.encode()}
        )
        == "198.51.100.1"
    )


@pytest.mark.parametrize("value", ["10.0.0.0/33", "edge", "10.0.0.1;10.0.0.2"])
def test_invalid_networks_are_refused(value: str) -> None:
    """TRUSTED_PROXIES takes addresses and networks; a name could resolve to anything."""
    with pytest.raises(
        ConfigError, match=r"TRUSTED_PROXIES=.* is invalid: expected .* networks, for example"
    ):
        make_settings(trusted_proxies=value)
