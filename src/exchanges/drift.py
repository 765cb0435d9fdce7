"""Compares answers of the exchanges with `shapes.json`, and describes differences in words.

`shapes.json` has what each endpoint sends, from the exchanges' documentation and recorded answers:
exchange -> part of the URL -> rows in the body -> members, or the types of columns. In the place of
the rows, `result.*` stands for all values of the member `result`. The type of a member that may be
missing ends with `?`. A list has the known words of a member.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import orjson

SHAPES = orjson.loads(Path(__file__).with_name("shapes.json").read_bytes())
TYPES = {bool: "boolean", int: "number", float: "number", str: "text", list: "list", dict: "object"}
MAX_WORD_LENGTH = 40


class Difference(NamedTuple):
    """A difference between an answer and its shape."""

    text: str
    is_breaking: bool = True
    """False for a new member, which the gateway ignores."""


def compare(exchange: str, url: str, body: Any) -> list[Difference]:
    """Return the differences of an answer, each once. All values are compared."""
    keys = [key for key in SHAPES[exchange] if all(part in url for part in key.split("?"))]
    endpoint = url.partition("?")[0].rpartition("/")[2]
    if not keys:
        return [Difference(f"{exchange} {endpoint}: no shape is known of {url.partition('?')[0]}")]
    found: dict[Difference, None] = {}
    for where, shape in SHAPES[exchange][max(keys, key=len)].items():
        for row in _select(body, where.split(".") if where else []):
            found |= dict.fromkeys(_compare_row(row, shape))
    return [
        found_one._replace(text=f"{exchange} {endpoint}: {found_one.text}") for found_one in found
    ]


def _select(value: Any, path: list[str]) -> list[Any]:
    """Return the objects and lists at a path."""
    if not isinstance(value, dict | list):
        return []
    if not path:
        return [value]
    name, *rest = path
    members = value if isinstance(value, dict) else dict(enumerate(value))
    chosen = members.values() if name == "*" else [members.get(name)]
    return [row for member in chosen for row in _select(member, rest)]


def _compare_row(row: Any, shape: Mapping[str, Any] | list[str]) -> Iterable[Difference]:
    if isinstance(shape, list):
        types = [TYPES.get(type(value), "null") for value in row]
        if types[: len(shape)] != shape:
            yield Difference(f"a row has {', '.join(types)} instead of {', '.join(shape)}")
        elif len(row) > len(shape):
            yield Difference(f"a row has {len(row)} columns instead of {len(shape)}", False)
        return
    if not isinstance(row, dict):
        yield Difference("a row is a list instead of an object")
        return
    for name in sorted(row.keys() - shape.keys()):
        yield Difference(f"new member {_shown(name)}", False)
    for name, expected in shape.items():
        yield from _compare_member(name, row, expected)


def _compare_member(name: str, row: Mapping[str, Any], expected: Any) -> Iterable[Difference]:
    value = row.get(name)
    if isinstance(expected, list):
        if value not in expected:
            yield Difference(f"new {name} {_shown(value)}")
        return
    allowed = expected.removesuffix("?").split("|")
    if value is None and not expected.endswith("?"):
        yield Difference(f"member {_shown(name)} is missing")
    elif value is not None and TYPES[type(value)] not in allowed:
        yield Difference(f"member {_shown(name)} is {TYPES[type(value)]} instead of {allowed[0]}")


def _shown(text: object) -> str:
    return ascii(str(text)[:MAX_WORD_LENGTH])
