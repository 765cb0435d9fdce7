"""No secret leaks from a real gateway process with a canary in every secret setting.

Every answer with its headers, all output of the processes and their arguments are searched, through
every failure of an exchange, the proxy or Redis, also if these send the secrets back.
"""

import asyncio
import base64
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote, quote_plus

import httpx
import pytest
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

from config import EXCHANGES, ExchangeSettings, Settings
from src.sandbox.server import Sandbox
from tests.conftest import RedisServer, free_port
from tests.deployment.test_edge import GatewayProcess

ROOT = Path(__file__).parents[2]
KEY, OTHER_KEY, ADMIN = "c4nary-reader+/key=", "c4nary-writer~key", "c4nary-admin+/token="
PASSWORDS = {"redis": "c4nary-redis p@ss/w+rd", "proxy": "c4nary-proxy"}
SECRETS = [KEY, OTHER_KEY, ADMIN, *PASSWORDS.values()]
SECRETS += [f"c4nary-{name}-{part}" for name in EXCHANGES for part in ("key", "secret")]


def forms(secret: str) -> Iterator[str]:
    """Yield the spellings of a secret: plain, in a URL, in JSON, as Python shows it, in base64."""
    yield from (
        secret,
        quote(secret),
        quote(secret, safe=""),
        quote_plus(secret),
        json.dumps(secret)[1:-1],
        repr(secret)[1:-1],
    )
    for before in range(3):
        encoded = base64.b64encode(b"\0" * before + secret.encode()).decode()
        yield encoded[-(-before * 8 // 6) : -4]  # the part that does not depend on the neighbours


FORMS = {form.lower(): secret for secret in SECRETS for form in forms(secret)} | {
    "c4nary": "some part of a secret"
}


def leaks(text: str) -> list[str]:
    """Return the secrets in a text, each with the text around it."""
    low = text.lower()
    return [
        f"{secret}: {text[max(0, at - 80) : at + 80]!r}"
        for form, secret in FORMS.items()
        if (at := low.find(form)) >= 0
    ]


def settings_with_secrets(proxy: int, redis: str = "") -> dict[str, str]:
    """Return a canary for every setting that holds a secret."""
    variables = {"API_KEYS": f"reader:{KEY},writer:{OTHER_KEY}", "ADMIN_TOKEN": ADMIN}
    variables |= {
        f"{name.upper()}_API_{part.upper()}": f"c4nary-{name}-{part}"
        for name in EXCHANGES
        for part in ("key", "secret")
    }
    variables["HTTPS_PROXY"] = f"http://me:{PASSWORDS['proxy']}@127.0.0.1:{proxy}"
    variables["REDIS_PASSWORD"] = PASSWORDS["redis"]
    variables["REDIS_URL"] = redis
    return variables


def test_every_secret_setting_has_a_canary() -> None:
    """A new setting that holds a secret must be added here; its type shows that it does."""
    kept = {
        name.upper()
        for name, field in Settings.model_fields.items()
        if "SecretStr" in str(field.annotation)
    }
    exchange_secrets = {
        name.upper()
        for name, field in ExchangeSettings.model_fields.items()
        if "SecretStr" in str(field.annotation)
    }
    assert exchange_secrets == {"API_KEY", "API_SECRET"}
    kept |= {f"{exchange.upper()}_{name}" for exchange in EXCHANGES for name in exchange_secrets}
    assert kept == settings_with_secrets(1).keys()


@pytest.mark.parametrize("secret", SECRETS)
def test_the_search_finds_every_form(secret: str) -> None:
    """Every spelling of a secret is found, alone and within other text."""
    credentials = base64.b64encode(f"me:{secret}".encode()).decode()
    for text in (
        *forms(secret),
        f"Basic {credentials}",
        f"redis://:{quote(secret, safe='')}@h",
        repr([secret]),
        secret.upper(),
    ):
        assert any(leak.startswith((secret, "some")) for leak in leaks(f"x {text} y")), text
    assert not leaks("redis://:***@127.0.0.1:6379/0 SecretStr('**********')")


class EchoingProxy:
    """A proxy that refuses, and returns all it received in the reason, a header and the body."""

    def __init__(self) -> None:
        self.port = 0
        self.received = ""

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.received = (await reader.readuntil(b"\r\n\r\n")).decode()
        flat = self.received.replace("\r\n", " ")
        body = json.dumps({"error": [self.received], "msg": self.received})
        head = f"HTTP/1.1 407 {flat}\r\nX-Echo: {flat}\r\n"
        head += f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        writer.write((head + body).encode())
        await writer.drain()
        writer.close()


@pytest.fixture
async def proxy() -> AsyncIterator[EchoingProxy]:
    made = EchoingProxy()
    server = await asyncio.start_server(made.answer, "127.0.0.1", 0)
    made.port = server.sockets[0].getsockname()[1]
    yield made
    server.close()


ECHO = json.dumps(
    {"code": -1, "retMsg": " ".join(SECRETS), "msg": " ".join(SECRETS), "error": SECRETS}
)
FAILURES: list[dict[str, Any]] = [
    {
        "status": status,
        "body": ECHO,
        "headers": {"X-Echo": KEY, "Retry-After": OTHER_KEY, "Set-Cookie": f"a={ADMIN}"},
    }
    for status in (200, 400, 401, 403, 418, 429, 451, 500, 503)
]
FAILURES += [
    {"body": ADMIN},
    {"body": ""},
    {"redirect": f"http://me:{KEY}@127.0.0.1:1/{ADMIN}"},
    {"geo_block": True},
]
FAILURES += [
    {"reset": True},
    {"refuse": True},
    {"hang": True},
    {"size": 8_000_000},
    {"drip": True},
    {"price": 1e200},
]

PLACES = {"symbol": ["BTC-USDT", "X", "%00", "..%2f..%2fenviron"], "task": ["daily", "nope"]}
QUERIES = [
    "",
    "?exchange=bybit&max_age=0",
    "?exchange=__class__",
    "?limit=x&symbols=BTC-USDT,X&timeframe=9",
    "?symbols=BTC-USDT",
]
HEADERS: list[dict[str, str]] = [
    {},
    {"X-API-Key": KEY, "Authorization": f"Bearer {ADMIN}", "X-Request-ID": "mine"},
    {
        "X-API-Key": ADMIN,
        "Authorization": f"Bearer {KEY}",
        "X-Request-ID": ADMIN,
        "Origin": f"https://{KEY}.example",
    },
    {
        "X-API-Key": KEY[:-1],
        "Authorization": f"Basic {base64.b64encode(ADMIN.encode()).decode()}",
        "Expect": ADMIN,
    },
]


ASKED = ["/ticker/BTC-USDT?max_age=0", "/tickers?symbols=BTC-USDT&exchange=all&max_age=0"]
ASKED += [
    "/orderbook/ETH-USDT?exchange=binance&max_age=0",
    "/trades/SOL-USDT?exchange=binance",
    "/exchanges",
    "/health",
    "/metrics",
]


async def first_message(answer: httpx.Response) -> str:
    """Read an endless answer up to its first message."""
    lines = []
    async for line in answer.aiter_lines():
        lines.append(line)
        if line.startswith("data: "):
            break
    return "\n".join(lines)


class Driver:
    """Sends requests and keeps everything that comes back."""

    def __init__(self, url: str, client: httpx.AsyncClient) -> None:
        self.url = url
        self.client = client
        self.texts: list[str] = []
        self.statuses: set[int] = set()

    async def send(
        self, path: str, method: str = "GET", headers: Mapping[str, str] | None = None
    ) -> httpx.Response:
        async with self.client.stream(method, self.url + path, headers=headers) as answer:
            if answer.headers.get("content-type", "").startswith("text/event-stream"):
                text = await first_message(answer)
            else:
                await answer.aread()
                text = answer.text
        head = "".join(f"{name}: {value}\n" for name, value in answer.headers.items())
        self.texts.append(f"{method} {answer.status_code}\n{head}\n{text}")
        self.statuses.add(answer.status_code)
        return answer

    async def every_route(self) -> int:
        """Request every route, valid and invalid, with and without keys; return their number."""
        document = (await self.send("/openapi.json")).json()
        routes = [
            (path, method.upper())
            for path, methods in document["paths"].items()
            for method in methods
        ]
        for path, method in [*routes, ("/nope", "GET"), ("/docs", "GET")]:
            name = path.partition("{")[2].partition("}")[0].partition(":")[0]
            for place in PLACES.get(name, [""]):
                for query in QUERIES:
                    for headers in HEADERS:
                        await self.send(path.split("{")[0] + place + query, method, headers)
            await self.send(path.split("{")[0], "DELETE", HEADERS[1])
        return len(routes)

    async def raw(self, request: str) -> None:
        """Send a request that no client would send; it must end the connection."""
        reader, writer = await asyncio.open_connection("127.0.0.1", httpx.URL(self.url).port)
        writer.write(request.encode())
        with suppress(ConnectionError):
            self.texts.append((await asyncio.wait_for(reader.read(), 30)).decode(errors="replace"))
        writer.close()


@pytest.mark.full
@pytest.mark.parametrize(("log_format", "redis_by"), [("text", "url"), ("json", "password")])
async def test_no_secret_leaks(
    tmp_path: Path,
    lively: Sandbox,
    proxy: EchoingProxy,
    own_redis: RedisServer,
    log_format: str,
    redis_by: str,
) -> None:
    """Every route, every exchange failure, a refusing proxy and Redis, at the loudest log level."""
    own_redis.client.config_set("requirepass", "another one")
    url = (
        f"redis://:{quote(PASSWORDS['redis'], safe='')}@127.0.0.1:{own_redis.port}/0"
        if redis_by == "url"
        else ""
    )
    environment = settings_with_secrets(proxy.port, url) | {
        "LOG_LEVEL": "DEBUG",
        "LOG_FORMAT": log_format,
        "REDIS_HOST": "127.0.0.1",
        "REDIS_PORT": str(own_redis.port),
        "BYBIT_REST_URL": lively.urls["bybit"],
        "BINANCE_REST_URL": lively.urls["binance"],
        "KRAKEN_REST_URL": "https://kraken.invalid",
        "EXCHANGE_TIMEOUT_SECONDS": "1.5",
        "CB_THRESHOLD": "1000",
        "CORS_ORIGINS": "https://app.example",
        "CLIENT_RATE_LIMIT": "100000",
    }
    gateway = GatewayProcess(tmp_path, environment)
    right = HEADERS[1]
    try:
        async with httpx.AsyncClient(timeout=60) as client:
            driver = Driver(gateway.url, client)
            await loaded(driver, gateway, 2)
            assert await driver.every_route() >= 14
            for knobs in FAILURES:
                for name in ("bybit", "binance"):
                    await lively.set(name, **({"rate_limit": -1} | knobs))
                await driver.send("/admin/breakers/reset", "POST", right)
                for path in ASKED:
                    await driver.send(path, headers=right)
            fields = f"X-API-Key: {KEY}\r\nAuthorization: {ADMIN}\r\nConnection: close\r\n\r\n"
            await driver.raw(f"GET /health HTTP/1.1\r\n{fields}")
            await driver.raw(f"GET /health HTTP/1.1\r\nHost: x\r\nX-API-Key : {ADMIN}\r\n{fields}")
            await driver.raw(f"GET /{'x' * 70_000} HTTP/1.1\r\nHost: x\r\n{fields}")
            maintained = await asyncio.to_thread(
                maintain, tmp_path, environment | {"GATEWAY_URL": gateway.url}
            )
        shown = arguments(gateway)
    finally:
        gateway.end()
    written = gateway.log.read_text()
    assert {200, 400, 401, 404, 405, 422, 429, 431, 451, 502, 503, 504} - driver.statuses <= {
        429,
        431,
        451,
        503,
        504,
    }
    assert "c4nary" in proxy.received or leaks(proxy.received), "the proxy received its password"
    assert len(written.splitlines()) > len(driver.texts) / 2, "each request has a line"
    assert "AuthenticationError" in written, "Redis refused the password"
    for text in (*driver.texts, *written.splitlines(), shown, maintained):
        assert not leaks(text)


async def test_no_stream_key_is_logged(tmp_path: Path, lively: Sandbox) -> None:
    """Valid and wrong keys in the query of `/ws` and `/stream`, at the loudest log level."""
    environment = settings_with_secrets(1) | {
        "HTTPS_PROXY": "",
        "REDIS_HOST": "",
        "LOG_LEVEL": "DEBUG",
    }
    gateway = GatewayProcess(tmp_path, environment | lively.settings)
    address, messages = gateway.url.replace("http", "ws") + "/ws?token=", []
    try:
        async with httpx.AsyncClient(timeout=60) as client:
            driver = Driver(gateway.url, client)
            await loaded(driver, gateway, 3)
            for key in (quote(KEY, safe=""), "c4nary-wrong", quote(ADMIN, safe="")):
                with suppress(ConnectionClosed):
                    async with connect(address + key) as socket:
                        messages.append(await socket.recv() if key != quote(KEY, safe="") else "{}")
                        await socket.send(
                            json.dumps({"op": "subscribe", "symbols": ["BTC/USDT"], "id": "c4nary"})
                        )
                        messages.append(await socket.recv())
                async with client.stream(
                    "GET", f"{gateway.url}/stream/BTC-USDT?token={key}"
                ) as answer:
                    driver.statuses.add(answer.status_code)
            with pytest.raises(InvalidStatus):
                async with connect(address.replace("/ws", "/nope") + "c4nary"):
                    pass
    finally:
        gateway.end()
    assert [json.loads(message).get("type") for message in messages] == [
        None,
        "subscribed",
        "error",
        "error",
    ]
    assert {200, 401} <= driver.statuses
    written = gateway.log.read_text()
    assert "Application startup complete" in written
    assert not leaks(written)


def arguments(gateway: GatewayProcess) -> str:
    """Return the command line of the process, as other users see it."""
    return Path(f"/proc/{gateway.process.pid}/cmdline").read_text()


async def loaded(driver: Driver, gateway: GatewayProcess, count: int) -> None:
    """Wait for the market lists of `count` exchanges."""
    async with asyncio.timeout(240):
        while True:
            assert gateway.process.poll() is None, gateway.log.read_text()
            try:
                shown = (await driver.send("/exchanges", headers=HEADERS[1])).json()
            except httpx.TransportError:
                shown = None
            if (
                shown is not None
                and sum(bool(exchange["markets"]["count"]) for exchange in shown.values()) >= count
            ):
                return
            await asyncio.sleep(0.05)


def maintain(folder: Path, environment: Mapping[str, str]) -> str:
    """Run each maintenance task: without a server, with wrong keys and with invalid settings."""
    unreachable = {"GATEWAY_URL": f"http://127.0.0.1:{free_port()}"}
    runs: list[tuple[Sequence[str], Mapping[str, str]]] = [
        (["daily"], {}),
        (["status"], {}),
        (["check"], {}),
        (["warm", "BTC-USDT", "X"], {}),
        (["daily"], unreachable),
        (["daily"], {"ADMIN_TOKEN": OTHER_KEY}),
        (["warm", "X"], {"API_KEYS": ADMIN}),
        (["nope"], {}),
        (["status"], {"ADMIN_TOKEN": f"{ADMIN} x"}),
        (["status"], {"API_KEYS": f"a:{KEY},a:{KEY}"}),
        (["status"], {"HTTPS_PROXY": f"socks5://u:{ADMIN}@h"}),
        (["status"], {"REDIS_URL": f"http://:{ADMIN}@h"}),
    ]
    written = []
    for arguments, changed in runs:
        command = [sys.executable, str(ROOT / "maintenance.py"), *arguments]
        variables = {"PATH": os.environ["PATH"], **environment, **changed}
        ended = subprocess.run(
            command,
            cwd=folder,
            env=variables,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        written.append(ended.stdout + ended.stderr)
        assert written[-1]
        assert "Traceback" not in written[-1]
    return "\n".join(written)


BROKEN = """
import config
from src import api
from src.gateway import Gateway

settings = config.load_settings()

async def serve(self, *arguments):
    held = {"settings": settings, "secrets": settings.secrets}
    try:
        raise KeyError(held)
    except KeyError as error:
        raise RuntimeError(" ".join(settings.secrets)) from error

Gateway.serve = serve
app = api.app
"""


@pytest.mark.full
@pytest.mark.parametrize("log_format", ["text", "json"])
async def test_unexpected_exception_reveals_no_secret(tmp_path: Path, log_format: str) -> None:
    """The log has the traceback of an exception full of secrets, all of them removed."""
    (tmp_path / "broken.py").write_text(BROKEN)
    environment = settings_with_secrets(1) | {
        "LOG_LEVEL": "DEBUG",
        "LOG_FORMAT": log_format,
        "REDIS_HOST": "",
    }
    environment |= {f"{name.upper()}_REST_URL": "http://127.0.0.1:1" for name in EXCHANGES}
    gateway = GatewayProcess(tmp_path, environment, app="broken:app")
    try:
        async with httpx.AsyncClient(timeout=60) as client:
            driver = Driver(gateway.url, client)
            await loaded(driver, gateway, 0)
            answer = await driver.send("/ticker/BTC-USDT", headers=HEADERS[1])
    finally:
        gateway.end()
    assert (answer.status_code, answer.json()["code"]) == (500, "internal_error")
    written = gateway.log.read_text()
    assert "Traceback" in written
    assert "RuntimeError: ***" in written
    for text in (*driver.texts, *written.splitlines()):
        assert not leaks(text)
