"""The OpenAPI document, held against the running gateway by generated requests."""

import asyncio
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from src import errors
from src.api import create_app
from src.clock import SystemClock
from src.sandbox import Sandbox
from tests.conftest import eventually, make_settings, serve


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
        settings = make_settings(sandbox, log_level="WARNING", binance_budget="1000000/5", bybit_budget="100000/5")
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


DOCUMENT = create_app(make_settings()).app.openapi()
OPERATIONS = [found.ok() for found in schemathesis.openapi.from_dict(DOCUMENT).get_all_operations()]  # type: ignore[union-attr]


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.label)
def test_no_generated_request_finds_a_500_or_an_undocumented_answer(background: Background, operation: Any) -> None:
    """Valid and invalid requests to every operation: no server error, and only what the document promises."""
    invalid = operation.as_strategy(generation_mode=GenerationMode.NEGATIVE)

    @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
    @given(case=operation.as_strategy() | invalid)
    def check(case: schemathesis.Case[Any]) -> None:
        answer = case.call(base_url=background.url)
        checks = [status_code_conformance, content_type_conformance, response_schema_conformance]
        case.validate_response(answer, checks=checks)
        assert answer.status_code < 500 or answer.status_code == 503, answer.text  # a spent budget is an honest 503

    check()


def test_every_error_is_in_the_document_with_an_example() -> None:
    """Each code the gateway can send over HTTP is documented as problem+json, with an example that is one."""
    codes = set()
    for path in DOCUMENT["paths"].values():
        for operation in path.values():
            for status, answer in operation["responses"].items():
                examples = answer.get("content", {}).get("application/problem+json", {}).get("examples", {})
                for code, example in examples.items():
                    assert example["value"]["status"] == int(status)
                    assert example["value"]["code"] == code
                    codes.add(code)
    only_on_sockets = {"origin_refused"}
    assert codes == {error.code for error in walk(errors.GatewayError)} - {"unavailable"} - only_on_sockets


def walk(error: type[errors.GatewayError]) -> Iterator[type[errors.GatewayError]]:
    """Yield every class of the error tree but the two roots that nobody raises."""
    for child in error.__subclasses__():
        yield child
        yield from walk(child)
