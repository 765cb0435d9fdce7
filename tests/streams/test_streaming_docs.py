"""Tests that docs/streaming.md, docs/asyncapi.yaml and the examples match the gateway."""

import ast
import asyncio
import json
import os
import re
import sys
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, get_args

import jsonschema
import pytest
import uvicorn
import yaml
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

from config import EXCHANGES, setting_names
from src.core import errors, metrics
from src.core.errors import GatewayError
from src.core.models import Candles, OrderBook, Ticker, Trade, Trades
from src.exchanges import ccxt_sockets
from src.exchanges.markets import Markets
from src.gateway import Gateway
from src.sandbox.server import Sandbox
from src.streams import (
    bus,
    candles,
    dialer,
    exchange_socket,
    feed,
    hub,
    liveness,
    monitor,
    registry,
    subscriptions,
    topics,
)
from src.web import server_events, websocket
from tests.conftest import FakeClock, Live, StartGateway, eventually, tool

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "streaming.md").read_text()
API = (ROOT / "docs" / "api.md").read_text()
DOCUMENT: dict[str, Any] = yaml.safe_load((ROOT / "docs" / "asyncapi.yaml").read_text())
SCHEMAS, MESSAGES = DOCUMENT["components"]["schemas"], DOCUMENT["components"]["messages"]
ASKED = {
    "subscribe": "Subscribe",
    "unsubscribe": "Unsubscribe",
    "list": "ListAsked",
    "ping": "Ping",
}
OPS = set(get_args(websocket.Command.model_fields["op"].annotation))
KEY = "k3y-of-the-example"
# Internal constants without an effect that clients can observe.
PRIVATE = {
    "hub": {"TICK_SECONDS", "PENDING_SECONDS"},
    "liveness": {"PACE_DECAY"},
    "exchange_socket": {"CHECK_SECONDS"},
    "subscriptions": {"REFUSED_SPLIT"},
    "dialer": {"ATTEMPTS_RATIO"},
    "ccxt_sockets": {"CLOSE_TIMEOUT_SECONDS"},
    "bus": {"LISTEN_SECONDS", "COMMAND_SECONDS", "MAX_BATCH"},
}
HANDED_ON = {
    "snapshot",
    "update",
    "subscribed",
    "unsubscribed",
}  # message types passed as arguments


def section(heading: str, text: str = TEXT) -> str:
    """Return the text of a section, up to the next heading of its level or above."""
    level = heading.split(" ")[0]
    body = text.split(f"\n{heading}\n", 1)[1]
    return re.split(rf"\n#{{1,{len(level)}}} ", body)[0]


def cells(text: str) -> list[list[str]]:
    """Return the rows of all tables in a text, without header rows."""
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.splitlines()
        if line[:1] == "|"
    ]
    heads = {at - 1 for at, row in enumerate(rows) if set(row[0]) <= {"-"}}
    return [row for at, row in enumerate(rows) if at not in heads and at - 1 not in heads]


def named(cell: str) -> list[str]:
    """Return the code spans of a cell."""
    return re.findall(r"`([^`]+)`", cell)


def problems(schema: str, value: object) -> list[str]:
    """Return the violations of a schema."""
    whole = {
        "allOf": [{"$ref": f"#/components/schemas/{schema}"}],
        "components": DOCUMENT["components"],
    }
    return [error.message for error in jsonschema.Draft7Validator(whole).iter_errors(value)]


def check(message: dict[str, Any]) -> None:
    """Check a message of a gateway with the schema of its type."""
    payload: str = MESSAGES[message["type"]]["payload"]["$ref"]
    assert not problems(payload.rpartition("/")[2], message), message


def sent_types() -> set[str]:
    """Find every message type in the code, in a member `type` or passed as an argument."""
    found = set()
    for module in (websocket, hub, registry, server_events):
        for node in ast.walk(ast.parse(Path(str(module.__file__)).read_text())):
            pairs = zip(node.keys, node.values, strict=True) if isinstance(node, ast.Dict) else ()
            for key, value in pairs:
                if (
                    isinstance(key, ast.Constant)
                    and key.value == "type"
                    and isinstance(value, ast.Constant)
                ):
                    found.add(str(value.value))
            if isinstance(node, ast.Constant) and node.value in HANDED_ON:
                found.add(str(node.value))
    return found


def raised(*places: Any) -> set[str]:
    """Find the codes of all errors that a module or function raises."""
    found = set()
    for place in places:
        path = (
            Path(sys.modules[place.__module__].__file__ or "")
            if callable(place)
            else Path(place.__file__)
        )
        tree: ast.AST = ast.parse(path.read_text())
        if callable(place):
            nodes = (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))
            tree = next(node for node in nodes if node.name == place.__name__)
        calls = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
        names = {call.id for call in calls if isinstance(call, ast.Name)}
        names |= {call.attr for call in calls if isinstance(call, ast.Attribute)}
        classes = (getattr(errors, name, None) for name in names)
        found |= {
            item.code
            for item in classes
            if isinstance(item, type) and issubclass(item, GatewayError)
        }
    return found


def walk_refs(node: object) -> Iterator[str]:
    """Yield every reference in the document."""
    if isinstance(node, dict):
        yield from ([node["$ref"]] if "$ref" in node else ())
        for value in node.values():
            yield from walk_refs(value)
    elif isinstance(node, list):
        for value in node:
            yield from walk_refs(value)


@asynccontextmanager
async def passing(clock: FakeClock) -> AsyncIterator[None]:
    """Advance the clock of gateway and sandbox, so that values change."""

    async def move() -> None:
        while True:
            clock.advance(0.05)
            await asyncio.sleep(0.02)

    task = asyncio.create_task(move())
    try:
        yield
    finally:
        task.cancel()


def address(live: Live) -> str:
    return live.url.replace("http", "ws") + "/ws"


def inside(live: Live) -> hub.StreamHub:
    found: hub.StreamHub = live.server.lifespan.state["streams"]
    return found


async def send(socket: ClientConnection, **message: object) -> None:
    await socket.send(json.dumps(message))


async def receive_until(
    socket: ClientConnection, wanted: Callable[[dict[str, Any]], bool]
) -> list[dict[str, Any]]:
    """Return all messages up to a wanted one, each checked with its schema."""
    messages: list[dict[str, Any]] = []
    async with asyncio.timeout(60):
        while not messages or not wanted(messages[-1]):
            messages.append(json.loads(await socket.recv()))
            check(messages[-1])
    return messages


def is_type(*types: str, **members: object) -> Callable[[dict[str, Any]], bool]:
    return lambda message: message["type"] in types and members.items() <= message.items()


def test_document_is_complete() -> None:
    """The document is AsyncAPI 3.0, its references resolve, and operations list all messages."""
    assert DOCUMENT["asyncapi"] == "3.0.0"
    assert DOCUMENT["info"]["version"] == metrics.VERSION
    for reference in walk_refs(DOCUMENT):
        found: Any = DOCUMENT
        for part in reference.removeprefix("#/").split("/"):
            found = found[part]
    assert set(DOCUMENT["channels"]["ws"]["messages"]) == set(MESSAGES)
    operations = DOCUMENT["operations"]
    ways = {
        way: {item["$ref"].rpartition("/")[2] for item in operations[way]["messages"]}
        for way in operations
    }
    answers = {item["$ref"].rpartition("/")[2] for item in operations["ask"]["reply"]["messages"]}
    assert ways["ask"] | ways["push"] | answers == set(MESSAGES)
    events = {"snapshot", "update", "status", "heartbeat"}
    assert set(DOCUMENT["channels"]["events"]["messages"]) == ways["pushEvents"] == events


@pytest.mark.parametrize("name", MESSAGES)
def test_examples_match_schemas(name: str) -> None:
    """Each example matches its schema, and does not without any required member."""
    schema = MESSAGES[name]["payload"]["$ref"].rpartition("/")[2]
    assert MESSAGES[name]["examples"]
    for example in MESSAGES[name]["examples"]:
        payload = example["payload"]
        assert not problems(schema, payload)
        merged = SCHEMAS[schema] if "required" in SCHEMAS[schema] else SCHEMAS["Value"]
        for member in merged["required"]:
            assert problems(
                schema, {key: value for key, value in payload.items() if key != member}
            ), member
        assert problems(schema, payload | {"type": "other", "op": "other"})
        if "type" in payload:
            assert problems(schema, payload | {"more": 1})


def test_every_message_is_documented() -> None:
    """Both documents list exactly the ops and message types of the code."""
    assert sent_types() == {
        row[0].strip("`") for row in cells(section("## Messages")) if row[1].isascii()
    } & set(MESSAGES)
    assert {
        named(row[0])[0] for row in cells(section("## Messages").split("\n###")[0])
    } == sent_types()
    assert set(ASKED) == OPS == set(named(cells(section("## Commands"))[0][2]))
    assert {MESSAGES[name].get("name", name) for name in MESSAGES} == sent_types() | OPS
    assert {f"### {op}" for op in OPS} == set(
        re.findall(r"^### .*", section("## Commands"), re.MULTILINE)
    )
    headings = " ".join(re.findall(r"^### (.*)", section("## Messages"), re.MULTILINE))
    assert set(re.findall(r"[a-z]+", headings)) - {"and"} == sent_types() - {
        "subscribed",
        "unsubscribed",
        "list",
        "pong",
    }


def test_every_member_is_documented() -> None:
    """The documented members are those of the schemas and of the command model."""
    for row in cells(section("## Messages").split("\n###")[0]):
        schema = MESSAGES[named(row[0])[0]]["payload"]["$ref"].rpartition("/")[2]
        properties = SCHEMAS[schema].get("properties") or SCHEMAS["Value"]["properties"]
        told = named(row[2])
        if schema == "Snapshot":
            assert told == ["update"]
        else:
            assert set(told) == set(properties) - {"type"}
    assert [named(row[0])[0] for row in cells(section("## Commands").split("\n###")[0])] == list(
        websocket.Command.model_fields
    )
    assert set(SCHEMAS["Subscribe"]["properties"]) == set(websocket.Command.model_fields)
    assert [named(row[0])[0] for row in cells(section("### snapshot and update"))] == [
        member
        for member in SCHEMAS["Value"]["required"]
        if member not in {"type", "channel", "exchange", "symbol"}
    ]


def test_data_schemas_match_models() -> None:
    """The data schemas have the members of the REST models, and the code's enums."""
    for model in (Ticker, OrderBook, Candles, Trades, Trade):
        fields = {field.alias or name for name, field in model.model_fields.items()}
        assert set(SCHEMAS[model.__name__]["properties"]) == fields
    assert (
        SCHEMAS["Channel"]["enum"]
        == list(topics.CHANNELS)
        == [named(row[0])[0] for row in cells(TEXT)[:4]]
    )
    assert SCHEMAS["Exchange"]["enum"] == list(EXCHANGES)
    own = websocket.Command.model_json_schema()["properties"]
    levels = SCHEMAS["Levels"]
    assert [levels[item] for item in ("minimum", "maximum", "default")] == [
        own["levels"][item] for item in ("minimum", "maximum", "default")
    ]
    assert levels["maximum"] == SCHEMAS["Side"]["maxItems"] == topics.MAX_LEVELS
    assert SCHEMAS["AnySymbols"]["maxItems"] == own["symbols"]["maxItems"]
    assert SCHEMAS["AnyExchange"]["maxLength"] == own["exchange"]["maxLength"]


def test_every_error_is_documented() -> None:
    """Both documents list the error codes that /ws can send, and docs/api.md has them."""
    codes = raised(
        websocket,
        hub,
        Gateway.find_keys,
        Markets.explain_missing,
        Markets._halted_error,
        Markets.canonical,
        Markets.check_exchange,
    )
    codes |= {
        errors.Unauthorized.code,
        errors.TooManyRequests.code,
    }  # of the gate, at the handshake
    documented = [named(row[0])[0] for row in cells(section("### error"))]
    assert codes == set(documented) == set(SCHEMAS["Code"]["enum"])
    assert len(documented) == len(codes)
    assert codes <= set(re.findall(r"^\| `(\w+)` \| \d{3} \|", API, re.MULTILINE))


def test_every_limit_is_documented() -> None:
    """The tables of limits are complete, with the numbers of the code."""
    modules = {
        module.__name__.rpartition(".")[2]: module
        for module in (
            websocket,
            server_events,
            topics,
            feed,
            hub,
            registry,
            monitor,
            candles,
            subscriptions,
            liveness,
            exchange_socket,
            dialer,
            ccxt_sockets,
            bus,
        )
    }
    expected = {
        f"{name}.{constant}": f"{value:.15g}"
        for name, module in modules.items()
        for constant, value in bounds(module).items()
        if constant not in PRIVATE.get(name, ())
    }
    own = {row[0].strip("`"): row[1] for row in cells(section("## Limits")) if "." in row[0]}
    assert own == expected
    settings = {
        row[0].strip("`"): row[1] for row in cells(section("## Limits")) if "." not in row[0]
    }
    assert settings == {
        name: f"{default:g}"
        for name, (_, default) in setting_names().items()
        if name.startswith("STREAM_") and isinstance(default, int | float)
    }


def bounds(module: Any) -> dict[str, int | float]:
    """Return the numeric constants that a module defines."""
    tree = ast.parse(Path(module.__file__).read_text())
    assignments = [node for node in tree.body if isinstance(node, ast.Assign)]
    targets = [target for node in assignments for target in node.targets]
    names = [target.id for target in targets if isinstance(target, ast.Name)]
    values = {name: getattr(module, name) for name in names if name.isupper()}
    return {name: value for name, value in values.items() if isinstance(value, int | float)}


def test_numbers_in_sentences_match_code() -> None:
    """Each sentence with a number has the number of the code."""
    config = uvicorn.Config("", log_config=None)
    (least, most), (first, longest) = (
        (liveness.SILENT_MIN_SECONDS, liveness.SILENT_MAX_SECONDS),
        (subscriptions.RETRY_INITIAL_SECONDS, dialer.INTERVAL_MIN_SECONDS),
    )
    levels = websocket.Command.model_fields["levels"]
    assert config.ws_ping_interval == config.ws_ping_timeout
    assert monitor.POLL_BUDGET_RATIO == 0.5
    assert monitor.HOT_SECONDS == 60
    sentences = [
        f"every {hub.HEARTBEAT_SECONDS:g} s, unless you are too slow",
        f"or, every {hub.HEARTBEAT_SECONDS:g} s, `heartbeat`",
        f"is lost, and not back after {exchange_socket.GRACE_SECONDS:g} s",
        f"may be missing for {ccxt_sockets.MAX_TICKER_LAG_MS / 1000:g} s",
        f"arrives for {liveness.SILENT_PACES} times its longest recent pause",
        f"(at least {least:g} s, at most {most:g} s)",
        f"if no message arrives in the first {liveness.FIRST_MESSAGE_SECONDS:g} s",
        f"by REST, at most every {monitor.POLL_SECONDS:g} s, as long as less than half of",
        f"connects again after {first:g} s, doubling up to {longest:g} s",
        f"{websocket.IDLE_SECONDS:g} s without a subscription and without a message",
        f"A message of more than {websocket.MAX_MESSAGE_BYTES} bytes",
        f"You were too slow for {feed.SLOW_SECONDS:g} s",
        f"After {feed.SLOW_SECONDS:g} s without room",
        f"a buffer of {websocket.BUFFER_BYTES} bytes, and as much in the kernel",
        f"{websocket.MESSAGES_PER_SECOND} a second, {websocket.MESSAGES_AT_ONCE} at once",
        f"reads nothing or almost nothing for {feed.SLOW_SECONDS:g} s",
        f"with {monitor.HOT_REQUESTS} hits in memory within a minute",
        f"a lease of {bus.LEASE_SECONDS:g} s, renews it every second",
        f"replaced within {bus.LEASE_SECONDS:g} s",
        f"1 to {topics.MAX_LEVELS}, {levels.default} by default",
        f"pings of its own, every {config.ws_ping_interval:g} s",
        f"the server's ping within {config.ws_ping_timeout:g} s",
    ]
    text = " ".join(TEXT.split())
    assert not [sentence for sentence in sentences if sentence not in text]
    assert bus.LEASE_SECONDS / 3 == 1
    assert feed.SEND_BUFFER_BYTES == websocket.BUFFER_BYTES
    assert server_events.RETRY == b"retry: 1000\n\n"


def test_shown_messages_match_schemas() -> None:
    """Each message in docs/streaming.md matches its schema, and every op is shown."""
    shown = [json.loads(text) for text in re.findall(r"```json\n(.*)\n```", TEXT)]
    for message in shown:
        if "op" in message:
            assert not problems(ASKED[message["op"]], message)
        else:
            check(message)
    assert {message["op"] for message in shown if "op" in message} == OPS
    assert {message["type"] for message in shown if "type" in message} == sent_types()


async def test_real_messages_match_schemas(
    start: StartGateway, sandbox: Sandbox, clock: FakeClock
) -> None:
    """Real messages of every type and channel, live and stale, match the schemas."""
    live, messages = await start(), list[dict[str, Any]]()
    async with passing(clock), connect(address(live)) as socket:
        await send(socket, op="ping", id="p")
        messages += await receive_until(socket, is_type("pong", id="p"))
        await send(socket, op="subscribe", id=1, symbols=["btc-usdt", "FOO-BAR"], exchange="all")
        messages += await receive_until(socket, is_type("subscribed", id=1))
        assert list(messages[-1]["errors"]) == ["FOO-BAR"]
        await send(socket, op="subscribe", channel="book", symbols=["ETH/USDT"], levels=3)
        await send(
            socket, op="subscribe", channel="trades", symbols=["ETH/USDT"], exchange="kraken"
        )
        candles_of = {"channel": "ohlcv", "symbols": ["ETH/USDT"], "exchange": "binance"}
        await send(socket, op="subscribe", timeframe="5m", **candles_of)
        for channel in topics.CHANNELS:
            messages += await receive_until(socket, is_type("update", channel=channel))
        await send(socket, op="list", id=2)
        messages += await receive_until(socket, is_type("list", id=2))
        assert [item["exchange"] for item in messages[-1]["streams"]] == [
            "all",
            None,
            "kraken",
            "binance",
        ]
        await send(socket, op="subscribe", symbols=["FOO-BAR"])
        messages += await receive_until(socket, is_type("error"))
        await sandbox.set("kraken", freeze=True, rate_limit=-1)
        messages += await receive_until(socket, is_type("status", exchange="kraken", state="stale"))
        await sandbox.set("kraken", rate_limit=-1)
        messages += await receive_until(socket, is_type("status", exchange="kraken", state="live"))
        await send(
            socket, op="unsubscribe", channel="trades", symbols=["ETH/USDT"], exchange="kraken"
        )
        messages += await receive_until(socket, is_type("unsubscribed"))
        await inside(live).send_heartbeats()
        messages += await receive_until(socket, is_type("heartbeat"))
    assert {message["type"] for message in messages} == sent_types()
    numbers: dict[tuple[str, ...], int] = defaultdict(int)
    for message in messages:
        if message["type"] in {"snapshot", "update"}:
            stream = message["channel"], message["exchange"], message["symbol"]
            assert message["type"] == "snapshot" or message["seq"] == numbers[stream] + 1
            numbers[stream] = message["seq"]
            if message["channel"] == "book":
                assert len(message["data"]["bids"]) == 3
    assert len(numbers) == 6


async def test_rest_answers_with_pushed_data(start: StartGateway, clock: FakeClock) -> None:
    """REST answers with the data of the newest update, and `source` is `stream`."""
    live = await start()
    async with connect(address(live)) as socket:
        async with passing(clock):
            await send(socket, op="subscribe", symbols=["BTC-USDT"], exchange="binance")
            await receive_until(socket, is_type("update"))
        newest = await _drain(socket)
        answer = (await live.get("/ticker/BTC-USDT?exchange=binance")).json()
        assert answer["source"] == "stream"
        watched = inside(live).topics[topics.Topic("binance", "ticker", "BTC/USDT")]
        assert watched.event is not None
        assert answer == json.loads(watched.event.data)
        assert not newest or newest[-1]["data"] == answer


async def _drain(socket: ClientConnection) -> list[dict[str, Any]]:
    """Return all pending messages, up to the answer to a ping."""
    await send(socket, op="ping", id="drain")
    return (await receive_until(socket, is_type("pong", id="drain")))[:-1]


async def test_two_subscriptions_share_one_stream(start: StartGateway, clock: FakeClock) -> None:
    """A stream of two subscriptions is pushed once, until both have ended."""
    live = await start()
    async with passing(clock), connect(address(live)) as socket:
        await send(socket, op="subscribe", symbols=["BTC-USDT"], exchange="all")
        await send(socket, op="subscribe", symbols=["BTC-USDT"], exchange="kraken")
        messages = await receive_until(socket, is_type("update", exchange="kraken"))
        seen = [
            message["seq"] for message in messages if is_type("update", exchange="kraken")(message)
        ]
        assert len(seen) == len(set(seen))
        await send(socket, op="unsubscribe", symbols=["BTC-USDT"], exchange="all", id=1)
        await receive_until(socket, is_type("unsubscribed", id=1))
        messages = await receive_until(socket, is_type("update"))
        messages += await receive_until(socket, is_type("update"))
        assert {message["exchange"] for message in messages if "exchange" in message} == {"kraken"}
        await send(socket, op="unsubscribe", symbols=["BTC-USDT"], exchange="kraken", id=2)
        await receive_until(socket, is_type("unsubscribed", id=2))
        assert not await _drain(socket)


async def test_each_exchange_counts_as_a_stream(start: StartGateway) -> None:
    """With `all` each exchange counts as a stream, in one message and in several."""
    live = await start(stream_max_subscriptions=5)
    symbols = ["BTC/USDT", "ETH/USDT", "SOL/USDT"]
    async with connect(address(live)) as socket:
        for _ in range(2):
            await send(socket, op="subscribe", symbols=symbols, exchange="all")
            (answer,) = [
                item
                for item in await receive_until(socket, is_type("subscribed"))
                if item["type"] == "subscribed"
            ]
            assert answer["symbols"] == symbols[:1]
            assert {item["code"] for item in answer["errors"].values()} == {
                "too_many_subscriptions"
            }
            await send(socket, op="subscribe", symbols=symbols[1:], id="more")
            answer = (await receive_until(socket, is_type("subscribed", id="more")))[-1]
            assert answer["symbols"] == symbols[1:]
            await send(socket, op="unsubscribe", symbols=symbols, exchange="all")
            await send(socket, op="unsubscribe", symbols=symbols, id="all")
            await receive_until(socket, is_type("unsubscribed", id="all"))


async def test_one_message_respects_topic_limit(start: StartGateway) -> None:
    """STREAM_MAX_TOPICS applies to each symbol of one message."""
    live = await start(stream_max_topics=2)
    async with connect(address(live)) as socket:
        await send(socket, op="subscribe", symbols=["BTC/USDT", "ETH/USDT", "SOL/USDT"])
        answer = (await receive_until(socket, is_type("subscribed")))[-1]
    assert answer["symbols"] == ["BTC/USDT", "ETH/USDT"]
    assert answer["errors"]["SOL/USDT"]["code"] == "too_many_streams"


async def test_partial_unsubscribe_is_reported(start: StartGateway) -> None:
    """If one symbol is invalid, the others are unsubscribed and listed."""
    live = await start()
    async with connect(address(live)) as socket:
        await send(socket, op="subscribe", symbols=["BTC/USDT", "ETH/USDT"])
        await send(socket, op="unsubscribe", symbols=["BTC/USDT", "B!", "SOL/USDT"], id=1)
        answer = (await receive_until(socket, is_type("unsubscribed", id=1)))[-1]
        assert answer["symbols"] == ["BTC/USDT"]
        codes = {symbol: error["code"] for symbol, error in answer["errors"].items()}
        assert codes == {"B!": "malformed_request", "SOL/USDT": "invalid_parameter"}
        await send(socket, op="unsubscribe", symbols=["B!"], id=2)
        assert (await receive_until(socket, is_type("error", id=2)))[-1][
            "code"
        ] == "malformed_request"
        await send(socket, op="list", id=3)
        streams = (await receive_until(socket, is_type("list", id=3)))[-1]["streams"]
    assert [item["symbol"] for item in streams] == ["ETH/USDT"]


@pytest.mark.parametrize(
    ("settings", "arguments", "code", "close"),
    [
        ({"api_keys": KEY}, {}, "unauthorized", 1008),
        ({"api_keys": KEY}, {"additional_headers": {"X-API-Key": "wrong"}}, "unauthorized", 1008),
        ({}, {"origin": "https://elsewhere.example"}, "origin_refused", 1008),
        ({"stream_max_clients": 1}, {}, "too_many_streams", 1013),
        ({"client_rate_limit": 1}, {}, "too_many_requests", 1013),
    ],
)
async def test_refused_connection_gets_error_and_code(
    start: StartGateway, settings: dict[str, Any], arguments: dict[str, Any], code: str, close: int
) -> None:
    """A refused connection gets the documented error and close code."""
    live = await start(**settings)
    header = {"X-API-Key": KEY} if "api_keys" in settings else {}
    async with connect(address(live), additional_headers=header):  # the accepted connection
        await eventually(lambda: len(inside(live).connections) == 1)
        async with connect(address(live), **arguments) as socket:
            assert (await receive_until(socket, is_type("error")))[-1]["code"] == code
            with pytest.raises(ConnectionClosed):
                await socket.recv()
            assert socket.close_code == close
    assert f"| {close} |" in section("## Close codes")


@pytest.mark.parametrize(
    ("messages", "close"),
    [(["x" * (websocket.MAX_MESSAGE_BYTES + 1)], 1009), (['{"op":"ping"}'] * 60, 1008)],
)
async def test_excessive_messages_close_the_connection(
    start: StartGateway, messages: list[str], close: int
) -> None:
    """Too long or too many messages close the connection with the documented code."""
    live = await start()
    async with connect(address(live)) as socket:
        with pytest.raises(ConnectionClosed):  # noqa: PT012 - it may end in any of these
            for message in messages:
                await socket.send(message)
            while True:
                check(json.loads(await socket.recv()))
        assert socket.close_code == close
    assert f"| {close} |" in section("## Close codes")


async def test_streaming_false_refuses_handshake(start: StartGateway) -> None:
    """With STREAMING=false the handshake is refused and /stream is absent."""
    live = await start(streaming=False)
    with pytest.raises(InvalidStatus) as caught:
        await connect(address(live))
    assert caught.value.response.status_code == 403
    assert (await live.get("/stream/BTC-USDT")).status_code == 404


async def test_events_match_documentation(start: StartGateway, clock: FakeClock) -> None:
    """Events have the id of their message, match docs/api.md, and resume after an id."""
    live = await start(api_keys=KEY)
    path = f"/stream/BTC-USDT?token={KEY}"
    assert (await live.get(path.replace("BTC", "FOO"))).status_code == 404
    assert (await live.get("/stream/BTC-USDT")).status_code == 401
    async with passing(clock):
        events = await _events(live, path, 3)
    assert [name for name, *_ in events][:2] == ["snapshot", "update"]
    for name, number, message in events:
        check(message)
        assert (name, number) == (message["type"], str(message["seq"]))
    watched = inside(live).topics[topics.Topic("bybit", "ticker", "BTC/USDT")]
    async with (
        asyncio.timeout(60),
        live.client.stream(
            "GET", live.url + path, headers={"Last-Event-ID": str(watched.sequence)}
        ) as answer,
    ):
        lines = answer.aiter_lines()
        assert [await anext(lines) for _ in range(2)] == ["retry: 1000", ""]
        async with passing(clock):
            assert (await anext(lines)).startswith("id: ")
            assert await anext(lines) == "event: update"
    shown = section("## Streaming", API).split("```console\n")[1].split("```")[0]
    found = [
        json.loads(line.removeprefix("data: "))
        for line in shown.splitlines()
        if line.startswith("data: ")
    ]
    assert [list(message) for message in found] == [list(message) for _, _, message in events[:2]]
    assert [list(message["data"]) for message in found] == [
        list(message["data"]) for _, _, message in events[:2]
    ]
    assert shown.splitlines()[1:5] == [
        "retry: 1000",
        "",
        f"id: {found[0]['seq']}",
        "event: snapshot",
    ]
    for message in found:
        check(message)


async def _events(live: Live, path: str, count: int) -> list[tuple[str, str, dict[str, Any]]]:
    """Return the first events of a stream as name, id and data."""
    found: list[tuple[str, str, dict[str, Any]]] = []
    fields: dict[str, str] = {}
    async with asyncio.timeout(60), live.client.stream("GET", live.url + path) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        async for line in answer.aiter_lines():
            name, _, value = line.partition(": ")
            fields[name] = value
            if not line and "data" in fields:
                found.append((fields["event"], fields["id"], json.loads(fields["data"])))
                fields = {}
            if len(found) == count:
                return found
    raise AssertionError("the stream ended")


@pytest.mark.parametrize("example", ["stream.py", "stream.js"])
async def test_example_prints_and_reconnects(
    start: StartGateway, sandbox: Sandbox, clock: FakeClock, example: str
) -> None:
    """Each example prints values and `stale`, and reconnects after a shutdown."""
    program = (
        [sys.executable]
        if example.endswith(".py")
        else [tool("node", "nodejs"), "--experimental-websocket"]
    )
    live = await start(api_keys=KEY)
    environment = {"PATH": os.environ["PATH"], "GATEWAY": address(live), "API_KEY": KEY}
    process = await asyncio.create_subprocess_exec(
        *program,
        str(ROOT / "examples" / example),
        "BTC-USDT",
        env=environment,
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None

    async def until(*beginnings: str) -> None:
        async with asyncio.timeout(60):
            for beginning in beginnings:
                line = ""
                while not line.startswith(beginning):
                    line = (await process.stdout.readline()).decode()  # type: ignore[union-attr]
                    assert line, f"the example ended before {beginning}"

    try:
        async with passing(clock):
            await until("subscribed", "snapshot bybit BTC/USDT", "update bybit", "update bybit")
            await sandbox.set("bybit", freeze=True, rate_limit=-1)
            await until("status bybit BTC/USDT stale", "snapshot binance", "update binance")
            inside(live).announce_shutdown()
            await until("lost", "subscribed", "snapshot", "update", "update")
        assert process.returncode is None
    finally:
        if process.returncode is None:
            process.terminate()
        await process.communicate()


@pytest.mark.parametrize("example", ["stream.py", "stream.js"])
async def test_example_stops_when_refused(start: StartGateway, example: str) -> None:
    """A client with a wrong key does not reconnect."""
    program = (
        [sys.executable]
        if example.endswith(".py")
        else [tool("node", "nodejs"), "--experimental-websocket"]
    )
    live = await start(api_keys=KEY)
    environment = {"PATH": os.environ["PATH"], "GATEWAY": address(live), "API_KEY": "wrong-key"}
    process = await asyncio.create_subprocess_exec(
        *program,
        str(ROOT / "examples" / example),
        env=environment,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    output, _ = await asyncio.wait_for(process.communicate(), 60)
    assert b"refused: unauthorized" in output


async def test_examples_import_only_documented_packages(start: StartGateway) -> None:
    """The Python example imports only `websockets`; the other one imports nothing."""
    tree = ast.parse((ROOT / "examples" / "stream.py").read_text())
    names = {
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for alias in node.names
    }
    names |= {
        str(node.module).split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
    }
    assert names - set(sys.stdlib_module_names) == {"websockets"}
    assert not re.search(r"\b(import|require)\b", (ROOT / "examples" / "stream.js").read_text())
