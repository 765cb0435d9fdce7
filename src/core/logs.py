"""Logging: one line per event. Control characters are escaped and secrets are replaced."""

import itertools
import json
import logging
import os
import sys
import time
from collections.abc import Iterable
from contextvars import ContextVar
from urllib.parse import quote

request_id: ContextVar[str] = ContextVar("request_id", default="-")

MIN_SECRET_LENGTH = 4  # replacing shorter texts would make lines unreadable
_PROCESS_ID = os.urandom(8).hex()
_numbers = itertools.count(1)
_STANDARD_FIELDS = {*vars(logging.makeLogRecord({})), "message", "asctime", "color_message"}
# uvicorn's lines about single connections contain the query, which may contain a key.
_CONNECTION_EVENTS = ('%s - "WebSocket ', "connection open", "connection closed")


def new_request_id() -> str:
    """Return a new request id: a random text per process, followed by a counter.

    A random id per request would take half as long as a memory hit.
    """
    return f"{_PROCESS_ID}{next(_numbers):016x}"


class LineFormatter(logging.Formatter):
    """Formats a record, its `extra` fields and its traceback as one line of text or JSON."""

    def __init__(self, *, as_json: bool, secrets: Iterable[str] = ()) -> None:
        super().__init__()
        self._as_json = as_json
        long_secrets = (secret for secret in secrets if len(secret) >= MIN_SECRET_LENGTH)
        texts = set[str]().union(*map(_spellings, long_secrets))
        self._secrets = sorted(texts, key=len, reverse=True)  # a secret may contain a shorter one

    def format(self, record: logging.LogRecord) -> str:
        """Return the line, without unescaped control characters and without secrets."""
        utc = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        fields: dict[str, object] = {
            "time": f"{utc}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": record.getMessage(),
            "request_id": request_id.get(),
        }
        extra = vars(record).items()
        fields |= {name: value for name, value in extra if name not in _STANDARD_FIELDS}
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        line = _format_json(fields) if self._as_json else _format_text(fields)
        for secret in self._secrets:
            line = line.replace(secret, "***")
        return line


def _spellings(secret: str) -> set[str]:
    """Return the forms of a secret in a line: plain, URL-quoted, as a repr, and each as JSON."""
    forms = {secret, quote(secret, safe=""), repr(secret)[1:-1]}
    as_ascii = {json.dumps(form)[1:-1] for form in forms}
    return forms | as_ascii | {json.dumps(form, ensure_ascii=False)[1:-1] for form in forms}


def _format_json(fields: dict[str, object]) -> str:
    # json escapes all non-ASCII characters. orjson would keep line separators and lone surrogates.
    return json.dumps(fields, default=str, skipkeys=True).replace("\x7f", "\\u007f")


def _format_text(fields: dict[str, object]) -> str:
    head = f"{fields.pop('time')} {str(fields.pop('level')).upper()} {fields.pop('logger')}: "
    event = json.dumps(str(fields.pop("event")), ensure_ascii=False)[1:-1]
    shown = {name: value for name, value in fields.items() if value not in ("-", None)}
    words = [f"{name}={_quote_if_needed(value)}" for name, value in shown.items()]
    return " ".join([_escape(head + event), *words])


def _quote_if_needed(value: object) -> str:
    """Quote a value unless it is one plain word, so that it cannot look like two fields."""
    text = str(value)
    is_word = text.isascii() and text.isprintable() and text and not set(text) & set(' "=\\')
    return text if is_word else json.dumps(text)


def _escape(text: str) -> str:
    return "".join(char if char.isprintable() else f"\\u{ord(char):04x}" for char in text)


def _is_server_event(record: logging.LogRecord) -> bool:
    """Return True if a line of uvicorn does not concern a single connection."""
    return not str(record.msg).startswith(_CONNECTION_EVENTS)


def set_up_logging(level: str, log_format: str, secrets: Iterable[str] = ()) -> None:
    """Send all log lines, including uvicorn's, to standard error through one formatter."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(LineFormatter(as_json=log_format == "json", secrets=secrets))
    logging.basicConfig(level=level, handlers=[handler], force=True)
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):
        logging.getLogger(name).handlers.clear()
        logging.getLogger(name).propagate = name != "uvicorn.access"
    server = logging.getLogger("uvicorn.error")
    server.addFilter(_is_server_event)
    # At DEBUG, uvicorn logs all data that WebSocket clients send.
    server.setLevel(max(server.getEffectiveLevel(), logging.INFO))
    # The gateway logs each request itself, at DEBUG. ccxt logs whole URLs and headers at DEBUG.
    for name in ("uvicorn.access", "ccxt", "ccxt.base.exchange"):
        logging.getLogger(name).setLevel(logging.WARNING)
