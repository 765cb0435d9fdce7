"""Logging: one line per event for any content, without secrets."""

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

BREAKS = [
    "\r",
    "\n",
    "\r\n",
    "\t",
    "\0",
    "\x1b[2J",
    "\x7f",
    "\x85",
    "\x9b2J",
    "\u2028",
    "\u2029",
    "\u202e",
    "\ud800",
]
SECRETS = ['pa"ss\\w=rd', "hunter2/+ x", 'né"e', "a'b\"c"]


def record(
    message: str, *arguments: object, error: BaseException | None = None, **extra: object
) -> logging.LogRecord:
    """Make a record in the same way as a logger."""
    exc_info = (type(error), error, error.__traceback__) if error is not None else None
    log_record = logging.LogRecord(
        "src.part", logging.INFO, __file__, 1, message, arguments, exc_info
    )
    vars(log_record).update(extra)
    return log_record


def raised(text: str) -> ValueError:
    """Raise and catch an error, so that it has a traceback."""
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - it is the only one
        raise ValueError(text)
    return caught.value


@pytest.fixture
def restored_loggers() -> Iterator[None]:
    """Restore the loggers after the test."""
    names = (None, "uvicorn", "uvicorn.error", "uvicorn.access", "ccxt", "ccxt.base.exchange")
    loggers = [logging.getLogger(name) for name in names]
    before = [
        (logger, logger.handlers[:], logger.level, logger.propagate, logger.filters[:])
        for logger in loggers
    ]
    logging.root.handlers = []  # set_up_logging closes handlers, and these are pytest's
    yield
    for logger, handlers, level, propagate, filters in before:
        logger.handlers, logger.propagate, logger.filters = handlers, propagate, filters
        logger.setLevel(level)


@pytest.mark.parametrize("as_json", [False, True])
@pytest.mark.parametrize("sign", BREAKS, ids=ascii)
def test_control_characters_are_escaped(sign: str, as_json: bool) -> None:
    """Messages, arguments, fields and tracebacks with control characters are one line."""
    event = record(
        f"a{sign}b %s",
        f"c{sign}d",
        error=raised(f"e{sign}f"),
        path=f"g{sign}h",
        parts=[f"i{sign}j"],
    )
    line = LineFormatter(as_json=as_json).format(event)
    assert line.isprintable()
    assert len(line.splitlines()) == 1
    line.encode()


@pytest.mark.parametrize("sign", BREAKS, ids=ascii)
def test_json_line_can_be_parsed_to_the_original_text(sign: str) -> None:
    """A line of JSON parses to the logged text with its control characters."""
    line = LineFormatter(as_json=True).format(record(f"a{sign}b", path=f"g{sign}h"))
    document = json.loads(line)
    assert document["event"] == f"a{sign}b"
    assert document["path"] == f"g{sign}h"


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        1.5,
        -3,
        2**70,
        "text",
        b"\xff",
        ["a", 1],
        {"a": 1},
        {1: 2},
        object(),
        ValueError("x"),
    ],
    ids=lambda value: type(value).__name__,  # the same in every process
)
@pytest.mark.parametrize("as_json", [False, True])
def test_any_value_can_be_a_field(value: object, as_json: bool) -> None:
    """Values of any type can be fields."""
    line = LineFormatter(as_json=as_json).format(record("event", value=value))
    assert line.isprintable()
    if as_json:
        assert "value" in json.loads(line)


def test_json_fields_are_in_order() -> None:
    """Time (UTC), level, logger, event and request id come first, then the record's own fields."""
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


def test_text_line_has_time_level_logger_event_and_fields() -> None:
    """Values that are not one plain word are quoted."""
    event = record("exchange asked", exchange="kraken", note='a b="c"', empty="", nothing=None)
    event.created, event.msecs = 0.0, 7.0
    line = LineFormatter(as_json=False).format(event)
    assert line == (
        "1970-01-01T00:00:00.007Z INFO src.part: exchange asked "
        'exchange=kraken note="a b=\\"c\\"" empty=""'
    )


def test_field_value_cannot_look_like_another_field() -> None:
    """A value with quotes and blanks is quoted as a whole."""
    line = LineFormatter(as_json=False).format(record("request", path='/x" status=200', status=404))
    assert line.endswith('path="/x\\" status=200" status=404')


@pytest.mark.parametrize("as_json", [False, True])
def test_traceback_is_part_of_the_line(as_json: bool) -> None:
    """A traceback is complete, with escaped line breaks."""
    line = LineFormatter(as_json=as_json).format(record("failed", error=raised("deep")))
    assert "Traceback (most recent call last):\\n" in line
    assert "ValueError: deep" in line


@pytest.mark.parametrize("as_json", [False, True])
@pytest.mark.parametrize("secret", SECRETS)
def test_secret_is_replaced(secret: str, as_json: bool) -> None:
    """A secret is replaced in all spellings: plain, URL-quoted, escaped and as a repr."""
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


def test_longer_secret_is_replaced_first() -> None:
    """If a secret contains another, no part of it remains."""
    line = LineFormatter(as_json=False, secrets=["hunter", "hunter2-and-more"]).format(
        record("is hunter2-and-more")
    )
    assert line.endswith(": is ***")


@pytest.mark.parametrize("as_json", [False, True])
def test_request_id_is_on_every_line(as_json: bool) -> None:
    """Lines written during a request have its id."""
    token = request_id.set("abc-1")
    try:
        line = LineFormatter(as_json=as_json).format(record("event"))
    finally:
        request_id.reset(token)
    assert "abc-1" in line


@pytest.mark.usefixtures("restored_loggers")
@pytest.mark.parametrize("log_format", ["text", "json"])
def test_all_loggers_use_one_formatter(log_format: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The server's loggers, too, write to standard error at the configured level."""
    logging.getLogger("uvicorn").addHandler(logging.NullHandler())
    set_up_logging("INFO", log_format, ["hunter2"])
    logging.getLogger("src.part").info("one hunter2\n")
    logging.getLogger("src.part").debug("below the level")
    logging.getLogger("uvicorn.error").info("two", extra={"color_message": "\x1b[1mtwo"})
    logging.getLogger("uvicorn.access").info("each request has a line of the gateway's own")
    logging.getLogger("ccxt.base.exchange").info("whole URLs")
    written = capsys.readouterr()
    assert written.out == ""
    first, second = written.err.splitlines()
    assert "one ***\\n" in first
    assert "two" in second
    assert "[1m" not in second
    if log_format == "json":
        assert json.loads(first)["logger"] == "src.part"


@pytest.mark.usefixtures("restored_loggers")
@pytest.mark.parametrize("level", ["DEBUG", "INFO", "ERROR"])
def test_server_lines_about_single_sockets_are_dropped(
    level: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """They contain the query, and at DEBUG all data of clients. Other lines remain."""
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
    """A path with escaped line breaks is logged as one line with the request id."""
    live = await start()
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(LineFormatter(as_json=as_json))
    logger = logging.getLogger("src.web.middleware")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    try:
        answer = await live.get(
            "/ticker/BTC%0d%0a2026-01-01T00:00:00Z%20ERROR%20src:%20forged%C2%85%E2%80%A8%1b%5b2J"
        )
        await live.get("/health/live", headers={"X-Request-ID": "mine-1"})
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    written: list[Any] = stream.getvalue().splitlines()
    assert answer.status_code == 400
    assert len(written) == 2
    assert answer.headers["x-request-id"] in written[0]
    assert "mine-1" in written[1]
    assert all(line.isprintable() for line in written)


def test_wrong_log_arguments_do_not_raise(capsys: pytest.CaptureFixture[str]) -> None:
    """A message with wrong arguments is reported by logging and does not fail the request."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(LineFormatter(as_json=True))
    handler.handle(record("%d", "no number"))
    assert "no number" in capsys.readouterr().err
