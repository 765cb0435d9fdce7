"""Logging: one line per event, what came from outside escaped, secrets struck out."""

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
_PROCESS, _NUMBERS = os.urandom(8).hex(), itertools.count(1)
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName", "color_message"}


def new_request_id() -> str:
    """Name a request: random by process, then a number. A random id for each would cost half a memory hit."""
    return f"{_PROCESS}{next(_NUMBERS):016x}"


class LineFormatter(logging.Formatter):
    """Formats a record, its `extra` fields and its traceback as exactly one line of text or JSON."""

    def __init__(self, *, as_json: bool, secrets: Iterable[str] = ()) -> None:
        super().__init__()
        self._as_json = as_json
        # A secret as it is, as it stands in a URL, as Python shows it; and each of these as a line holds it.
        # One or two letters cannot be struck out of a line without taking half of it along.
        secrets = [secret for secret in secrets if len(secret) > 3]
        forms = {form for secret in secrets for form in (secret, quote(secret, safe=""), repr(secret)[1:-1])}
        forms |= {json.dumps(form, ensure_ascii=strict)[1:-1] for form in forms for strict in (True, False)}
        self._secrets = sorted(forms, key=len, reverse=True)

    def format(self, record: logging.LogRecord) -> str:
        """Return the line; CR, LF and every other control character in it are escaped."""
        fields: dict[str, object] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": record.getMessage(),
            "request_id": request_id.get(),
        }
        fields |= {name: value for name, value in vars(record).items() if name not in _STANDARD}
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        line = self._json(fields) if self._as_json else self._text(fields)
        for secret in self._secrets:
            line = line.replace(secret, "***")
        return line

    @staticmethod
    def _json(fields: dict[str, object]) -> str:
        # Not orjson: this escapes all but ASCII, so no separator and no lone surrogate gets into the line.
        return json.dumps(fields, default=str, skipkeys=True).replace("\x7f", "\\u007f")

    @staticmethod
    def _text(fields: dict[str, object]) -> str:
        head = f"{fields.pop('time')} {str(fields.pop('level')).upper()} {fields.pop('logger')}: "
        event = json.dumps(str(fields.pop("event")), ensure_ascii=False)[1:-1]
        rest = (f"{name}={_word(value)}" for name, value in fields.items() if value not in ("-", None))
        return " ".join([_printable(head + event), *rest])


def _word(value: object) -> str:
    """Return a value that cannot be taken for two fields: quoted when it is not one plain word."""
    text = str(value)
    plain = text.isascii() and text.isprintable() and text and not set(text) & {" ", '"', "=", "\\"}
    return text if plain else json.dumps(text)


def _printable(text: str) -> str:
    return "".join(sign if sign.isprintable() else f"\\u{ord(sign):04x}" for sign in text)


def _is_worth_a_line(record: logging.LogRecord) -> bool:
    """Whether a line of the server is about more than one connection; those quote the query, which may hold a key."""
    return not str(record.msg).startswith(('%s - "WebSocket ', "connection open", "connection closed"))


def set_up_logging(level: str, log_format: str, secrets: Iterable[str] = ()) -> None:
    """Send all logging, uvicorn's included, through one formatter to standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(LineFormatter(as_json=log_format == "json", secrets=secrets))
    logging.basicConfig(level=level, handlers=[handler], force=True)
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = name != "uvicorn.access"  # without a handler the server does not even write the line
    server = logging.getLogger("uvicorn.error")
    server.addFilter(_is_worth_a_line)
    server.setLevel(max(server.getEffectiveLevel(), logging.INFO))  # below, it writes all that comes in by a socket
    # Each request is one debug line of the gateway's own, and these log whole URLs and headers at debug.
    for name in ("uvicorn.access", "ccxt", "ccxt.base.exchange"):
        logging.getLogger(name).setLevel(logging.WARNING)
