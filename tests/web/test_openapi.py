"""The OpenAPI document is complete, strict, and true of the running gateway."""

import asyncio
import json
import re
import threading
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from jsonschema import Draft202012Validator, ValidationError
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from src.api import create_app
from src.core import errors
from src.core.clock import SystemClock
from src.sandbox.server import Sandbox
from tests.conftest import FakeClock, Live, StartGateway, eventually, make_settings, serve

DOCUMENT = create_app(make_settings()).app.openapi()
OPERATIONS = [
    result.ok()  # type: ignore[union-attr]
    for result in schemathesis.openapi.from_dict(DOCUMENT).get_all_operations()
]


class Operation(NamedTuple):
    """An operation; `path` contains the examples of its required parameters."""

    method: str
    path: str
    parameters: list[dict[str, Any]]
    answers: dict[str, dict[str, Any]]  # by status
    is_secured: bool


def operations(document: dict[str, Any] = DOCUMENT) -> dict[str, Operation]:
    """Return every operation by its id."""
    by_id = {}
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            parameters = operation.get("parameters", [])
            url = path
            for parameter in parameters:
                name, example = parameter["name"], parameter["schema"]["examples"][0]
                if parameter["in"] == "path":
                    url = url.replace(f"{{{name}}}", example)
                elif parameter["required"]:
                    url += f"?{name}={example}"
            is_secured = "security" in operation
            entry = Operation(method.upper(), url, parameters, operation["responses"], is_secured)
            by_id[operation["operationId"]] = entry
    return by_id


DOCUMENTED = operations()
MARKET_DATA = ("getTicker", "getOrderBook", "getOhlcv", "getTrades")
GUARDED = (
    *MARKET_DATA,
    "getTickers",
    "getMarkets",
    "getExchanges",
    "getDashboardData",
    "getStream",
)
ADMIN = ("clearCache", "resetBreakers", "recordMaintenance")
UNLISTED = {
    "getTicker": "/ticker/NO-SUCH",
    "getOrderBook": "/orderbook/NO-SUCH",
    "getOhlcv": "/ohlcv/NO-SUCH",
    "getTrades": "/trades/NO-SUCH",
    "getStream": "/stream/NO-SUCH",
}
INVALID = {
    "getTicker": "/ticker/BTC-USDT?max_age=-1",
    "getTickers": "/tickers?symbols=",
    "getOrderBook": "/orderbook/BTC-USDT?limit=0",
    "getOhlcv": "/ohlcv/BTC-USDT?timeframe=2m",
    "getTrades": "/trades/BTC-USDT?limit=0",
    "getMarkets": f"/markets?base={'x' * 25}",
    "getDashboardData": f"/api/dashboard/data?symbols={','.join(map(str, range(101)))}",
    "getStream": "/stream/BTC-USDT?levels=0",
    "clearCache": "/admin/cache/clear?what=all",
    "resetBreakers": "/admin/breakers/reset?bans=some",
    "recordMaintenance": "/admin/maintenance/none",
}
FAULTS: dict[str, dict[str, Any]] = {  # code -> knobs of kraken
    "request_rejected": {"body": '{"error":["EGeneral:Invalid arguments"],"result":{}}'},
    "geo_blocked": {"geo_block": True},
    "upstream_error": {"redirect": "http://127.0.0.1:1/"},
    "bad_upstream_data": {"body": "<html>"},
    "exchange_unavailable": {"status": 500},
    "exchange_rate_limited": {"status": 429},
    "exchange_banned": {"status": 418},
    "exchange_timeout": {"hang": True},
}
KRAKEN_ONLY: dict[str, Any] = {
    "bybit_enabled": False,
    "binance_enabled": False,
}  # so that a gateway starts faster
KEY, TOKEN = {"X-API-Key": "12345678"}, {"Authorization": "Bearer 87654321"}


def validate(schema: dict[str, Any], value: Any) -> None:
    """Raise `ValidationError` if a schema of the document does not accept the value."""
    Draft202012Validator({**DOCUMENT, **schema}).validate(value)


class Answers:
    """The answers of live gateways, each validated against the document and recorded."""

    def __init__(self) -> None:
        self.codes: dict[str, set[tuple[str, str]]] = {name: set() for name in DOCUMENTED}

    async def request(
        self, live: Live, name: str, url: str = "", query: str = "", **headers: str
    ) -> str:
        """Send a request to an operation, by default its example; return the code of a problem."""
        url = url or DOCUMENTED[name].path
        url += ("&" if "?" in url else "?") * bool(query) + query
        async with live.client.stream(
            DOCUMENTED[name].method, live.url + url, headers=headers
        ) as answer:
            media = answer.headers.get("content-type", "").partition(";")[0]
            is_endless = media == "text/event-stream"
            body = (
                (await anext(answer.aiter_text())).encode() if is_endless else await answer.aread()
            )
        return self.note(name, str(answer.status_code), media, body)

    async def request_without_host(self, live: Live, name: str) -> None:
        """Send a request that no client would send."""
        operation = DOCUMENTED[name]
        request = f"{operation.method} {operation.path} HTTP/1.1\r\nConnection: close\r\n\r\n"
        head, _, body = (await live.raw(request.encode())).partition(b"\r\n\r\n")
        self.note(
            name,
            head.split()[1].decode(),
            re.findall(r"content-type: (\S+)", head.decode())[0],
            body,
        )

    def note(self, name: str, status: str, media: str, body: bytes) -> str:
        """Validate and record an answer; return the code of a problem."""
        documented = DOCUMENTED[name].answers.get(status)
        assert documented is not None, f"{name} does not document {status}: {body[:300]!r}"
        assert list(documented.get("content", {})) == ([media] if media else []), f"{name} {status}"
        code = ""
        if media:
            content = documented["content"][media]
            value: Any = body.decode() if media.startswith("text/") else json.loads(body)
            validate(content["schema"], value)
            if media == "application/problem+json":
                code = value["code"]
                assert code in content["examples"], f"{name} does not document {status} {code}"
        self.codes[name].add((status, code))
        return code


def documented_codes(name: str) -> set[tuple[str, str]]:
    """Return each status of an operation with each documented code."""
    codes = set()
    for status, answer in DOCUMENTED[name].answers.items():
        problems = (
            answer.get("content", {})
            .get("application/problem+json", {})
            .get("examples", {"": None})
        )
        codes |= {(status, code) for code in problems}
    return codes


async def ask_rightly(answers: Answers, live: Live) -> None:
    """Make every operation answer 200, and 304 where it has a tag."""
    for name in DOCUMENTED:
        await answers.request(live, name, **TOKEN)
        if name != "getStream":
            await answers.request(live, name, **TOKEN, **{"If-None-Match": "*"})
    await answers.request(live, "getTickers", "/tickers?symbols=BTC-USDT,NO-SUCH,x&exchange=all")
    await answers.request(live, "getTickers", "/tickers?symbols=BTC-USDT,NO-SUCH,x")


async def ask_wrongly(answers: Answers, live: Live) -> None:
    """Send each operation requests that it always refuses."""
    for name in DOCUMENTED:
        await answers.request_without_host(live, name)
        await answers.request(live, name, query=f"x={'x' * 9000}")
        await answers.request(live, name, **{"X-Long": "x" * 33_000})
    for name, url in INVALID.items():
        assert await answers.request(live, name, url, **TOKEN) == "invalid_parameter", name
    for name, url in UNLISTED.items():
        assert await answers.request(live, name, url) == "unknown_symbol", name
    for name, operation in DOCUMENTED.items():
        if any(parameter["name"] == "exchange" for parameter in operation.parameters):
            assert (
                await answers.request(live, name, query="exchange=none", **TOKEN)
                == "unknown_exchange"
            ), name


async def ask_without_permission(answers: Answers, start: StartGateway) -> None:
    """Send no key, too many requests, no admin token, and a token where none is configured."""
    live = await start(
        **KRAKEN_ONLY, admin_token="87654321", api_keys="desk:12345678", client_rate_limit=20
    )
    for name in (*GUARDED, *ADMIN):
        assert await answers.request(live, name) == "unauthorized", name
    while await answers.request(live, "getExchanges", **KEY) != "too_many_requests":
        pass
    for name in GUARDED:
        assert await answers.request(live, name, **KEY) == "too_many_requests", name
    for name in ADMIN:
        while (
            await answers.request(live, name, Authorization="Bearer wrong-token")
            != "too_many_requests"
        ):
            pass
    bare = await start(**KRAKEN_ONLY)
    for name in ADMIN:
        assert await answers.request(bare, name) == "not_found", name


async def ask_while_kraken_fails(
    answers: Answers, start: StartGateway, sandbox: Sandbox, clock: FakeClock
) -> None:
    """Make kraken fail in every possible way, until its breaker opens."""
    live = await start(**KRAKEN_ONLY, exchange_timeout_seconds=1.5)
    for code, knobs in FAULTS.items():
        await sandbox.set("kraken", **{"rate_limit": -1, **knobs})
        for name in MARKET_DATA:
            await live.gateway.manager.reset_breakers()
            assert await answers.request(live, name) == code, name
        clock.advance(3600)  # so that no refusal is cached
    await sandbox.set("kraken", rate_limit=-1, status=500)
    await live.gateway.manager.reset_breakers()
    for name in MARKET_DATA:
        assert await answers.request(live, name, query="max_age=0") == "too_old", name
    await live.get("/ticker/ETH-USDT")
    for name in MARKET_DATA:
        assert await answers.request(live, name) == "circuit_open", name


async def ask_while_all_fail(
    answers: Answers, live: Live, sandbox: Sandbox, clock: FakeClock
) -> None:
    """Make markets without trades, and then no exchange that answers."""
    clock.advance(3600)  # the cache has expired
    await sandbox.set(
        "binance",
        rate_limit=-1,
        body='{"symbol":"BTCUSDT","lastPrice":"0","volume":"0","closeTime":1}',
    )
    await sandbox.set("bybit", rate_limit=-1, body='{"retCode":0,"result":{"list":[]}}')
    assert await answers.request(live, "getTicker", query="exchange=binance") == "market_halted"
    for exchange in sandbox.urls:
        await sandbox.set(exchange, rate_limit=-1, status=500)
    clock.advance(3600)
    for name in MARKET_DATA:
        await live.gateway.manager.reset_breakers()
        assert await answers.request(live, name) == "no_exchange_available", name


async def ask_while_busy(answers: Answers, start: StartGateway, sandbox: Sandbox) -> None:
    """Reach every limit of the gateway."""
    poor = await start(
        **KRAKEN_ONLY, kraken_budget="1/5", load_markets=True
    )  # the market list spends it
    for name in MARKET_DATA:
        assert await answers.request(poor, name) == "budget_spent", name
    late = await start(**KRAKEN_ONLY, clock=SystemClock(), request_timeout=1.5)
    full = await start(
        **KRAKEN_ONLY, max_concurrent=1, stream_max_clients=1, stream_max_subscriptions=1
    )
    assert await answers.request(full, "getStream") == "too_many_subscriptions"
    async with full.client.stream("GET", f"{full.url}/stream/BTC-USDT") as first:
        await anext(first.aiter_text())
        assert await answers.request(full, "getStream", "/stream/BTC-USDT") == "too_many_streams"
    greedy = await start(**KRAKEN_ONLY, stream_max_per_client=1)
    async with greedy.client.stream("GET", f"{greedy.url}/stream/BTC-USDT") as first:
        await anext(first.aiter_text())
        assert (
            await answers.request(greedy, "getStream", "/stream/BTC-USDT") == "too_many_connections"
        )
    await sandbox.set("kraken", hang=True)
    codes = await asyncio.gather(*(answers.request(late, name) for name in MARKET_DATA))
    assert set(codes) == {"deadline_exceeded"}
    sandbox.clear_counts()
    first_load = asyncio.create_task(full.get("/ticker/SOL-USDT"))
    await eventually(lambda: sandbox.count("kraken", "Ticker") == 1)
    for name in MARKET_DATA:
        assert await answers.request(full, name, query="max_age=0") == "overloaded", name
    await sandbox.set("kraken", rate_limit=-1)
    await first_load


async def ask_while_loading(answers: Answers, start: StartGateway, sandbox: Sandbox) -> None:
    """Send requests to a gateway without a market list."""
    await sandbox.set("kraken", status=500)
    live = await start(**KRAKEN_ONLY, wait=False)
    for name in (*MARKET_DATA, "getStream", "getMarkets"):
        assert await answers.request(live, name) == "markets_loading", name
    for name in ("getHealth", "getReady", "getExchanges", "getTickers"):
        await answers.request(live, name)


async def ask_while_halted(answers: Answers, start: StartGateway, clock: FakeClock) -> None:
    """Send requests while one market is halted, and while all are."""
    live = await start(**KRAKEN_ONLY)
    rows = live.gateway.manager["kraken"].client.markets.values()
    for code, text in (("market_halted", "BTC/USDT"), ("maintenance", "")):
        halted = [row | {"state": "halted"} if text in row["symbol"] else row for row in rows]
        live.gateway.markets.replace("kraken", halted, clock.time())
        for name in (*MARKET_DATA, "getStream"):
            assert await answers.request(live, name) == code, name


async def test_operations_send_exactly_what_they_document(
    start: StartGateway, sandbox: Sandbox, clock: FakeClock
) -> None:
    """Every answer validates, and every documented code is sent, except an internal error."""
    answers, live = Answers(), await start(admin_token="87654321", kraken_enabled=False)
    await ask_rightly(answers, live)
    await ask_wrongly(answers, live)
    await ask_without_permission(answers, start)
    await ask_while_busy(answers, start, sandbox)
    await ask_while_kraken_fails(answers, start, sandbox, clock)
    await ask_while_all_fail(answers, live, sandbox, clock)
    await ask_while_loading(answers, start, sandbox)
    await ask_while_halted(answers, start, clock)
    for name in DOCUMENTED:
        assert answers.codes[name] == documented_codes(name) - {("500", "internal_error")}, name


@pytest.mark.parametrize("name", DOCUMENTED)
def test_examples_are_strictly_valid(name: str) -> None:
    """Each example is valid; with a member less or more, the example of a 200 is not."""
    for status, answer in DOCUMENTED[name].answers.items():
        for media, content in answer.get("content", {}).items():
            if media == "application/problem+json":
                assert content["schema"] == {"$ref": "#/components/schemas/Problem"}
                for code, example in content["examples"].items():
                    validate(content["schema"], example["value"])
                    assert (example["value"]["status"], example["value"]["code"]) == (
                        int(status),
                        code,
                    )
                continue
            validate(content["schema"], content["example"])
            if media == "application/json":
                for changed in changes(content["example"]):
                    with pytest.raises(ValidationError):
                        validate(content["schema"], changed)


def changes(example: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield an example with one extra member, and without each member that is always sent."""
    yield example | {"unknown": 1}
    for name in example.keys() - {
        "timestamp",
        "datetime",
        "nonce",
        "requested_at",
        "server_time",
    }:  # absent if the exchange sent none, or pushed the data
        yield {other: value for other, value in example.items() if other != name}


def test_parameters_have_descriptions_and_examples() -> None:
    """A reader and `/docs` have something to begin with."""
    for name, operation in DOCUMENTED.items():
        for parameter in operation.parameters:
            assert parameter.get("description"), (name, parameter["name"])
            for example in parameter["schema"]["examples"]:
                validate(
                    {key: value for key, value in parameter["schema"].items() if key != "examples"},
                    example,
                )


def test_every_error_code_is_documented() -> None:
    """The documented codes are those of the error classes, each where it can be sent."""
    codes = {error.code for error in walk(errors.GatewayError)} - {
        "unavailable"
    }  # this class is never raised
    assert set(DOCUMENT["components"]["schemas"]["ErrorCode"]["enum"]) == codes
    sent = {code for name in DOCUMENTED for _, code in documented_codes(name) if code}
    assert codes - sent == {
        "origin_refused",
        "method_not_allowed",
        "price_mismatch",
        "private_request",
    }  # only for `/ws`, for undocumented methods, in `attempts` and below `/raw`


def walk(error: type[errors.GatewayError]) -> Iterator[type[errors.GatewayError]]:
    """Yield every class of the error tree below the root."""
    for child in error.__subclasses__():
        yield child
        yield from walk(child)


def test_operation_ids_and_security() -> None:
    """Ids are in camel case; keys are required only if configured, a token for `/admin`."""
    assert set(DOCUMENTED) == {*GUARDED, *ADMIN, "getHealth", "getLive", "getReady", "getMetrics"}
    assert {name for name, operation in DOCUMENTED.items() if operation.is_secured} == {*ADMIN}
    keyed = operations(create_app(make_settings(api_keys="desk:12345678")).app.openapi())
    assert {name for name, operation in keyed.items() if operation.is_secured} == {*ADMIN, *GUARDED}


class Background:
    """A gateway with its sandbox in a thread, for a client that blocks."""

    def __init__(self) -> None:
        self.url = ""
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))
        self._thread.start()
        assert self._ready.wait(30)

    async def _run(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        sandbox = Sandbox()
        await sandbox.start()
        for name in sandbox.urls:
            await sandbox.set(name, rate_limit=-1)
        settings = make_settings(
            sandbox, log_level="WARNING", binance_budget="1000000/5", bybit_budget="100000/5"
        )
        async with serve(settings, SystemClock()) as live:
            await eventually(lambda: len(live.gateway.markets.loaded_at) == 3)
            self.url = live.url
            self._ready.set()
            await self._stop.wait()
        await sandbox.stop()

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()


@pytest.fixture(scope="module")
def background() -> Iterator[Background]:
    server = Background()
    yield server
    server.stop()


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.label)
def test_generated_requests_get_documented_answers(background: Background, operation: Any) -> None:
    """Valid and invalid requests: no server error, and only documented answers."""
    invalid = operation.as_strategy(generation_mode=GenerationMode.NEGATIVE)

    # The body of each stream is read until it ends.
    examples = 15 if operation.path.startswith("/stream/") else 60

    @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck))
    @given(case=operation.as_strategy() | invalid)
    def check(case: schemathesis.Case[Any]) -> None:
        answer = case.call(base_url=background.url)
        checks = [status_code_conformance, content_type_conformance]
        if not operation.path.startswith(
            "/stream/"
        ):  # schemathesis applies its schema to a single event
            checks.append(response_schema_conformance)
        case.validate_response(answer, checks=checks)
        assert answer.status_code < 500 or answer.status_code == 503, (
            answer.text
        )  # a spent budget is a legitimate 503

    check()
