"""Logging: one line per event whatever is in it, and no secret in any."""

import io
import json
import logging
import sys
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

import pytest

from src.core.logs import LineFormatter, request_id, set_up_logging
from tests.conftest import StartGateway

BREAKS = ["\r", "\n", "\r\n", "\t", "\0", "\x1b[2J", "\x7f", "\x85", "\x9b2J", "\u2028", "\u2029", "\u202e", "\ud800"]
SECRETS = ['pa"ss\\w=rd', "hunter2/+ x", 'né"e', "a'b\"c"]


def record(message: str, *arguments: object, error: BaseException | None = None, **extra: object) -> logging.LogRecord:
    """Make a record as a logger makes it."""
    exc_info = (type(error), error, error.__traceback__) if error is not None else None
    made = logging.LogRecord("src.part", logging.INFO, __file__, 1, message, arguments, exc_info)
    vars(made).update(extra)
    return made


def raised(text: str) -> ValueError:
    """Raise and catch an error, so that it has a traceback."""
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - it is the only one
        raise ValueError(text)
    return caught.value


@pytest.fixture
def as_set_up() -> Iterator[None]:
    """Give the loggers back as they were."""
    names = (None, "uvicorn", "uvicorn.error", "uvicorn.access", "ccxt", "ccxt.base.exchange")
    loggers = [logging.getLogger(name) for name in names]
    before = [(logger, logger.handlers[:], logger.level, logger.propagate, logger.filters[:]) for logger in loggers]
    logging.root.handlers = []  # setting up closes what is there, and these are pytest's
    yield
    for logger, handlers, level, propagate, filters in before:
        logger.handlers, logger.propagate, logger.filters = handlers, propagate, filters
        logger.setLevel(level)


@pytest.mark.parametrize("as_json", [False, True])
@pytest.mark.parametrize("sign", BREAKS, ids=ascii)
def test_one_line_whatever_is_in_it(sign: str, as_json: bool) -> None:
    """No control character of a message, an argument, a field or a traceback gets into the line as itself."""
    event = record(f"a{sign}b %s", f"c{sign}d", error=raised(f"e{sign}f"), path=f"g{sign}h", parts=[f"i{sign}j"])
    line = LineFormatter(as_json=as_json).format(event)
    assert line.isprintable()
    assert len(line.splitlines()) == 1
    line.encode()


@pytest.mark.parametrize("sign", BREAKS, ids=ascii)
def test_json_brings_it_back(sign: str) -> None:
    """A line of JSON parses to what was logged, sign by sign."""
    line = LineFormatter(as_json=True).format(record(f"a{sign}b", path=f"g{sign}h"))
    document = json.loads(line)
    assert document["event"] == f"a{sign}b"
    assert document["path"] == f"g{sign}h"


@pytest.mark.parametrize(
    "value",
    [None, True, 1.5, -3, 2**70, "text", b"\xff", ["a", 1], {"a": 1}, {1: 2}, object(), ValueError("x")],
    ids=lambda value: type(value).__name__,  # the same in every process: some values show their address
)
@pytest.mark.parametrize("as_json", [False, True])
def test_any_value_can_be_a_field(value: object, as_json: bool) -> None:
    """Whatever a field holds makes a line; logging never fails on it."""
    line = LineFormatter(as_json=as_json).format(record("event", value=value))
    assert line.isprintable()
    if as_json:
        assert "value" in json.loads(line)


def test_json_has_the_usual_fields() -> None:
    """Time in UTC, level, logger, event and request id come first, the record's own fields after them."""
    event = record("exchange asked", exchange="kraken", seconds=0.25)
    event.created, event.msecs = 0.0, 7.0
    assert list(json.loads(LineFormatter(as_json=True).format(event)).items()) == [
        ("time", "1970-01-01T00:00:00.007Z"),
        ("level", "info"),
        ("logger", "src.part"),
        ("event", "exchange asked"),
        ("request_id", "-"),
        ("exchange", "kraken"),
        ("seconds", 0.25),
    ]


def test_text_reads_well() -> None:
    """A text line begins with time, level and logger; fields are words, or quoted where they are not one plain word."""
    event = record("exchange asked", exchange="kraken", note='a b="c"', empty="", nothing=None)
    event.created, event.msecs = 0.0, 7.0
    line = LineFormatter(as_json=False).format(event)
    assert line == (
        '1970-01-01T00:00:00.007Z INFO src.part: exchange asked exchange=kraken note="a b=\\"c\\"" empty=""'
    )


def test_field_cannot_forge_another() -> None:
    """A value that looks like two fields stays one."""
    line = LineFormatter(as_json=False).format(record("request", path='/x" status=200', status=404))
    assert line.endswith('path="/x\\" status=200" status=404')


@pytest.mark.parametrize("as_json", [False, True])
def test_traceback_is_part_of_the_line(as_json: bool) -> None:
    """A traceback is there in full, with its breaks written out."""
    line = LineFormatter(as_json=as_json).format(record("failed", error=raised("deep")))
    assert "Traceback (most recent call last):\\n" in line
    assert "ValueError: deep" in line


@pytest.mark.parametrize("as_json", [False, True])
@pytest.mark.parametrize("secret", SECRETS)
def test_secret_is_struck_out(secret: str, as_json: bool) -> None:
    """A secret is struck out wherever it is: as it is, quoted for a URL, escaped, or as Python shows it."""
    formatter = LineFormatter(as_json=as_json, secrets=SECRETS)
    forms = [secret, quote(secret, safe=""), f"redis://:{quote(secret, safe='')}@host/0"]
    for form in forms:
        for event in (
            record(f"at {form} end"),
            record("at %s end", form),
            record("event", field=f"at {form} end"),
            record("event", field=["at", form]),
            record("event", field={"at": form}),
            record("failed", error=raised(form)),
            record("failed", error=KeyError(form)),
        ):
            line = formatter.format(event)
            assert "***" in line
            for part in (form, json.dumps(form)[1:-1], json.dumps(form, ensure_ascii=False)[1:-1]):
                assert part not in line


def test_longer_secret_goes_first() -> None:
    """Of two secrets, one within the other, nothing of the longer is left."""
    line = LineFormatter(as_json=False, secrets=["hunter", "hunter2-and-more"]).format(record("is hunter2-and-more"))
    assert line.endswith(": is ***")


@pytest.mark.parametrize("as_json", [False, True])
def test_request_id_is_on_every_line(as_json: bool) -> None:
    """Lines written during a request carry its id."""
    token = request_id.set("abc-1")
    try:
        line = LineFormatter(as_json=as_json).format(record("event"))
    finally:
        request_id.reset(token)
    assert "abc-1" in line


@pytest.mark.usefixtures("as_set_up")
@pytest.mark.parametrize("log_format", ["text", "json"])
def test_set_up(log_format: str, capsys: pytest.CaptureFixture[str]) -> None:
    """All loggers, the server's too, write through the one formatter to standard error, from the level on."""
    logging.getLogger("uvicorn").addHandler(logging.NullHandler())
    set_up_logging("INFO", log_format, ["hunter2"])
    logging.getLogger("src.part").info("one hunter2\n")
    logging.getLogger("src.part").debug("below the level")
    logging.getLogger("uvicorn.error").info("two", extra={"color_message": "\x1b[1mtwo"})
    logging.getLogger("uvicorn.access").info("each request has a line of the gateway's own")
    logging.getLogger("ccxt.base.exchange").info("whole URLs")
    written = capsys.readouterr()
    assert written.out == ""
    one, two = written.err.splitlines()
    assert "one ***\\n" in one
    assert "two" in two
    assert "[1m" not in two
    if log_format == "json":
        assert json.loads(one)["logger"] == "src.part"


@pytest.mark.usefixtures("as_set_up")
@pytest.mark.parametrize("level", ["DEBUG", "INFO", "ERROR"])
def test_the_server_says_nothing_of_single_sockets(level: str, capsys: pytest.CaptureFixture[str]) -> None:
    """What it writes for each WebSocket holds the query, and at debug all that comes in; the rest of it stays."""
    logging.getLogger("uvicorn.error").setLevel(logging.NOTSET)
    set_up_logging(level, "text")
    server = logging.getLogger("uvicorn.error")
    for line in ('%s - "WebSocket %s" [accepted]', '%s - "WebSocket %s" 403'):
        server.info(line, "127.0.0.1:1", "/ws?token=hunter2")
    server.info('%s - "WebSocket %s" %d', "127.0.0.1:1", "/ws?token=hunter2", 503)
    server.info("connection open")
    server.info("connection closed")
    server.debug("< GET %s HTTP/1.1", "/ws?token=hunter2")
    server.info("Application startup complete.")
    server.error("Exception in ASGI application\n")
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(": ")[2] for line in lines if "startup" in line] == (
        [] if level == "ERROR" else ["Application startup complete."]
    )
    assert len(lines) == (1 if level == "ERROR" else 2), lines


@pytest.mark.parametrize("as_json", [False, True])
async def test_request_is_one_line(start: StartGateway, as_json: bool) -> None:
    """A path made to look like a second line is logged as one, with the id the client was told."""
    live = await start()
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(LineFormatter(as_json=as_json))
    logger = logging.getLogger("src.web.middleware")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    try:
        answered = await live.get(
            "/ticker/BTC%0d%0a2026-01-01T00:00:00Z%20ERROR%20src:%20forged%C2%85%E2%80%A8%1b%5b2J"
        )
        await live.get("/health/live", headers={"X-Request-ID": "mine-1"})
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    written: list[Any] = stream.getvalue().splitlines()
    assert answered.status_code == 400
    assert len(written) == 2
    assert answered.headers["x-request-id"] in written[0]
    assert "mine-1" in written[1]
    assert all(line.isprintable() for line in written)


def test_broken_arguments_do_not_reach_the_caller(capsys: pytest.CaptureFixture[str]) -> None:
    """A message whose arguments do not fit is a fault in a log line, and never one of the request."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(LineFormatter(as_json=True))
    handler.handle(record("%d", "no number"))
    assert "no number" in capsys.readouterr().err
