"""Raw candles that a stream keeps up to date, in the exchange's own digits.

A raw answer with the newest candles is a series. A pushed row is added only if the final states of
all rows before it are known, and if its numbers are written as those of the REST API. A series
without the growing candle is not fresh: clients of the REST API expect it as the last row.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import orjson

from src.cache.entry import Entry
from src.core.models import TIMEFRAMES
from src.raw.requests import RawRequest
from src.raw.wire_api import number

COMPARED_ROWS = 20  # enough to see how numbers are written
Row = Sequence[Any]


def is_series(request: RawRequest) -> bool:
    """Return True for a request for the newest candles, to which a stream can add."""
    api = request.api
    if request.path not in api.series_paths or api.candle_names is None:
        return False
    ends = {api.candle_names.start, api.candle_names.end}
    return request.timeframe is not None and not ends & request.params.keys()


def merge(
    request: RawRequest, entry: Entry, wire: Sequence[Row], pushed: Mapping[str, Any]
) -> tuple[bytes, int, int] | None:
    """Return the body of a series with pushed rows, the end of its final part, and its newest row.

    Times are UTC milliseconds. None if the series has a gap, or if the digits differ.
    """
    api = request.api
    if not entry.nonce or api.candle_names is None or api.candle_document is None:
        return None
    document = orjson.loads(entry.body)
    rows = list(api.candle_rows(document))
    limit = number(request.params, "limit", api.candle_names.default_limit)
    closed_until = entry.nonce
    for row in wire:
        start = int(row[0])
        if start < closed_until:
            continue  # the final state is known
        if start > closed_until or not has_same_digits(row, rows):
            return None
        rows = [known for known in rows if int(known[0]) < start]
        rows.append(row)
        if start < pushed["closed_until"]:
            closed_until = start + TIMEFRAMES[pushed["timeframe"]] * 1000
    rows = rows[-min(limit, api.candle_names.max_limit) :]
    body = orjson.dumps(api.candle_document(document, rows, pushed["timestamp"]))
    return body, closed_until, int(rows[-1][0])


def has_same_digits(row: Row, rows: Sequence[Row]) -> bool:
    """Return True if a pushed row is written as the rows of the REST API."""
    recent = rows[-COMPARED_ROWS:]
    if not recent or len(row) != len(recent[-1]):
        return False
    return all(_is_same_style(value, column) for value, *column in zip(row, *recent, strict=True))


def _is_same_style(value: object, column: Sequence[object]) -> bool:
    """Return True if a number is written as others: with as many decimals, or without zeros."""
    if type(value) is not type(column[-1]) or not isinstance(value, str):
        return type(value) is type(column[-1])
    texts = [str(other) for other in column]
    decimals = {len(text.partition(".")[2]) for text in (*texts, value)}
    has_zeros = any("." in text and text.endswith("0") for text in (*texts, value))
    return len(decimals) == 1 or not has_zeros
