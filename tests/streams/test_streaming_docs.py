"""What docs/streaming.md, docs/asyncapi.yaml and the examples say of /ws and /stream is what a gateway does."""

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
from src.core.models import OrderBook, Ticker, Trade, Trades
from src.exchanges import ccxt_sockets as ccxt_stream
from src.exchanges.markets import Markets
from src.gateway import Gateway
from src.sandbox.server import Sandbox
from src.streams import bus
from src.streams import exchange_socket as upstream
from src.streams import feed as feeds
from src.streams import hub as streams
from src.web import server_events, websocket
from tests.conftest import FakeClock, Live, StartGateway, eventually, tool

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "streaming.md").read_text()
README = (ROOT / "README.md").read_text()
DOCUMENT: dict[str, Any] = yaml.safe_load((ROOT / "docs" / "asyncapi.yaml").read_text())
SCHEMAS, MESSAGES = DOCUMENT["components"]["schemas"], DOCUMENT["components"]["messages"]
ASKED = {"subscribe": "Subscribe", "unsubscribe": "Unsubscribe", "list": "ListAsked", "ping": "Ping"}
OPS = set(get_args(websocket.Command.model_fields["op"].annotation))
KEY = "k3y-of-the-example"
# Inside only: nobody outside can tell them.
PRIVATE = {
    "websocket": {"NORMAL", "GOING_AWAY", "POLICY", "TOO_BIG", "FAILED", "TRY_AGAIN"},  # codes: a table of their own
    "server_events": set[str](),
    "feed": set[str](),
    "hub": {"TICK_SECONDS", "SLOW_LOOK_SECONDS", "ERROR_SECONDS"},
    "exchange_socket": {"LOOK_SECONDS", "BATCH", "PAUSE_SECONDS", "PACE_DECAY", "MAX_DOUBLINGS"},
    "ccxt_sockets": {"CLOSE_SECONDS"},
    "bus": {"LISTEN_SECONDS", "MAX_TOGETHER"},
}
HANDED_ON = {"snapshot", "update", "subscribed", "unsubscribed"}  # types that are arguments before they are members


def section(heading: str, text: str = TEXT) -> str:
    """Return what stands under a heading, up to the next of its level or a higher one."""
    level = heading.split(" ")[0]
    body = text.split(f"\n{heading}\n", 1)[1]
    return re.split(rf"\n#{{1,{len(level)}}} ", body)[0]


def cells(text: str) -> list[list[str]]:
    """Return the rows of the tables in a text, but for their heads."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    heads = {at - 1 for at, row in enumerate(rows) if set(row[0]) <= {"-"}}
    return [row for at, row in enumerate(rows) if at not in heads and at - 1 not in heads]


def named(cell: str) -> list[str]:
    """Return what a cell names in code letters."""
    return re.findall(r"`([^`]+)`", cell)


def problems(schema: str, value: object) -> list[str]:
    """Return what is wrong with a value."""
    whole = {"allOf": [{"$ref": f"#/components/schemas/{schema}"}], "components": DOCUMENT["components"]}
    return [error.message for error in jsonschema.Draft7Validator(whole).iter_errors(value)]


def check(message: dict[str, Any]) -> None:
    """Hold a message from a gateway against the schema of its type."""
    payload: str = MESSAGES[message["type"]]["payload"]["$ref"]
    assert not problems(payload.rpartition("/")[2], message), message


def sent_types() -> set[str]:
    """Find every type of message the code writes down, beside a member `type` or to be one."""
    found = set()
    for module in (websocket, streams, server_events):
        for node in ast.walk(ast.parse(Path(str(module.__file__)).read_text())):
            pairs = zip(node.keys, node.values, strict=True) if isinstance(node, ast.Dict) else ()
            for key, value in pairs:
                if isinstance(key, ast.Constant) and key.value == "type" and isinstance(value, ast.Constant):
                    found.add(str(value.value))
            if isinstance(node, ast.Constant) and node.value in HANDED_ON:
                found.add(str(node.value))
    return found


def raised(*places: Any) -> set[str]:
    """Find the codes of the errors of ours that a module or function makes, wherever in it."""
    found = set()
    for place in places:
        path = Path(sys.modules[place.__module__].__file__ or "") if callable(place) else Path(place.__file__)
        tree: ast.AST = ast.parse(path.read_text())
        if callable(place):
            nodes = (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))
            tree = next(node for node in nodes if node.name == place.__name__)
        names = {
            node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        }
        classes = (getattr(errors, name, None) for name in names)
        found |= {it.code for it in classes if isinstance(it, type) and issubclass(it, GatewayError)}
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
    """Let the time of gateway and sandbox pass: without that nothing is ever new."""

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


def inside(live: Live) -> streams.StreamHub:
    found: streams.StreamHub = live.server.lifespan.state["streams"]
    return found


async def say(socket: ClientConnection, **message: object) -> None:
    await socket.send(json.dumps(message))


async def hear(socket: ClientConnection, wanted: Callable[[dict[str, Any]], bool]) -> list[dict[str, Any]]:
    """Return all messages up to the one that is wanted; each is held against its schema."""
    heard: list[dict[str, Any]] = []
    async with asyncio.timeout(60):
        while not heard or not wanted(heard[-1]):
            heard.append(json.loads(await socket.recv()))
            check(heard[-1])
    return heard


def is_type(*types: str, **members: object) -> Callable[[dict[str, Any]], bool]:
    return lambda message: message["type"] in types and members.items() <= message.items()


def test_document_is_whole() -> None:
    """It is AsyncAPI 3.0, every reference leads somewhere, and both ways have all their messages."""
    assert DOCUMENT["asyncapi"] == "3.0.0"
    assert DOCUMENT["info"]["version"] == metrics.VERSION
    for reference in walk_refs(DOCUMENT):
        found: Any = DOCUMENT
        for part in reference.removeprefix("#/").split("/"):
            found = found[part]
    assert set(DOCUMENT["channels"]["ws"]["messages"]) == set(MESSAGES)
    operations = DOCUMENT["operations"]
    ways = {way: {it["$ref"].rpartition("/")[2] for it in operations[way]["messages"]} for way in operations}
    answers = {it["$ref"].rpartition("/")[2] for it in operations["ask"]["reply"]["messages"]}
    assert ways["ask"] | ways["push"] | answers == set(MESSAGES)
    events = {"snapshot", "update", "status", "heartbeat"}
    assert set(DOCUMENT["channels"]["events"]["messages"]) == ways["pushEvents"] == events


@pytest.mark.parametrize("name", MESSAGES)
def test_examples_fit_their_schemas(name: str) -> None:
    """Each message has an example that its schema takes, and takes no more without any member it has to have."""
    schema = MESSAGES[name]["payload"]["$ref"].rpartition("/")[2]
    assert MESSAGES[name]["examples"]
    for example in MESSAGES[name]["examples"]:
        payload = example["payload"]
        assert not problems(schema, payload)
        merged = SCHEMAS[schema] if "required" in SCHEMAS[schema] else SCHEMAS["Value"]
        for member in merged["required"]:
            assert problems(schema, {key: value for key, value in payload.items() if key != member}), member
        assert problems(schema, payload | {"type": "other", "op": "other"})
        if "type" in payload:
            assert problems(schema, payload | {"more": 1})


def test_every_message_is_documented() -> None:
    """The ops and types the code knows are in both documents, and nothing else is."""
    assert sent_types() == {row[0].strip("`") for row in cells(section("## What comes")) if row[1].isascii()} & set(
        MESSAGES
    )
    assert {named(row[0])[0] for row in cells(section("## What comes").split("\n###")[0])} == sent_types()
    assert set(ASKED) == OPS == set(named(cells(section("## Asking"))[0][2]))
    assert {MESSAGES[name].get("name", name) for name in MESSAGES} == sent_types() | OPS
    assert {f"### {op}" for op in OPS} == set(re.findall(r"^### .*", section("## Asking"), re.MULTILINE))
    headings = " ".join(re.findall(r"^### (.*)", section("## What comes"), re.MULTILINE))
    assert set(re.findall(r"[a-z]+", headings)) - {"and"} == sent_types() - {
        "subscribed",
        "unsubscribed",
        "list",
        "pong",
    }


def test_every_member_is_documented() -> None:
    """The members of each message are those of its schema; what is asked has the members of the code's model."""
    for row in cells(section("## What comes").split("\n###")[0]):
        schema = MESSAGES[named(row[0])[0]]["payload"]["$ref"].rpartition("/")[2]
        properties = SCHEMAS[schema].get("properties") or SCHEMAS["Value"]["properties"]
        told = named(row[2])
        if schema == "Snapshot":
            assert told == ["update"]
        else:
            assert set(told) == set(properties) - {"type"}
    assert [named(row[0])[0] for row in cells(section("## Asking").split("\n###")[0])] == list(
        websocket.Command.model_fields
    )
    assert set(SCHEMAS["Subscribe"]["properties"]) == set(websocket.Command.model_fields)
    assert [named(row[0])[0] for row in cells(section("### snapshot and update"))] == [
        member for member in SCHEMAS["Value"]["required"] if member not in {"type", "channel", "exchange", "symbol"}
    ]


def test_data_is_described_as_the_models_are() -> None:
    """What is pushed has the members of REST's answers, and the words that are allowed are those of the code."""
    for model in (Ticker, OrderBook, Trades, Trade):
        fields = {field.alias or name for name, field in model.model_fields.items()}
        assert set(SCHEMAS[model.__name__]["properties"]) == fields
    assert SCHEMAS["Channel"]["enum"] == list(feeds.CHANNELS) == [named(row[0])[0] for row in cells(TEXT)[:3]]
    assert SCHEMAS["Exchange"]["enum"] == list(EXCHANGES)
    own = websocket.Command.model_json_schema()["properties"]
    levels = SCHEMAS["Levels"]
    assert [levels[it] for it in ("minimum", "maximum", "default")] == [
        own["levels"][it] for it in ("minimum", "maximum", "default")
    ]
    assert levels["maximum"] == SCHEMAS["Side"]["maxItems"] == feeds.LEVELS
    assert SCHEMAS["AnySymbols"]["maxItems"] == own["symbols"]["maxItems"]
    assert SCHEMAS["AnyExchange"]["maxLength"] == own["exchange"]["maxLength"]


def test_every_error_is_documented() -> None:
    """The codes /ws can send are those in both documents, and all of them are in the README."""
    codes = raised(websocket, streams, feeds, Gateway.keys, Markets.canonical, Markets.check_exchange)
    codes |= {errors.Unauthorized.code, errors.TooManyRequests.code}  # of the gate, at the handshake
    documented = [named(row[0])[0] for row in cells(section("### error"))]
    assert codes == set(documented) == set(SCHEMAS["Code"]["enum"])
    assert len(documented) == len(codes)
    assert codes <= set(re.findall(r"^\| `(\w+)` \| \d{3} \|", README, re.MULTILINE))


def test_every_bound_is_documented() -> None:
    """The tables of bounds are complete, with the numbers of the code."""
    modules = {module.__name__.rpartition(".")[2]: module for module in (
        websocket, server_events, feeds, streams, upstream, ccxt_stream, bus,
    )}  # fmt: skip
    expected = {
        f"{name}.{constant}": " to ".join(f"{one:.15g}" for one in (value if isinstance(value, tuple) else (value,)))
        for name, module in modules.items()
        for constant, value in bounds(module).items()
        if constant not in PRIVATE[name]
    }
    own = {row[0].strip("`"): row[1] for row in cells(section("## Bounds")) if "." in row[0]}
    assert own == expected
    settings = {row[0].strip("`"): row[1] for row in cells(section("## Bounds")) if "." not in row[0]}
    assert settings == {
        name: f"{default:g}"
        for name, (_, default) in setting_names().items()
        if name.startswith("STREAM_") and isinstance(default, int | float)
    }


def bounds(module: Any) -> dict[str, Any]:
    """Return the numbers and pairs of numbers a module sets at its top."""
    tree = ast.parse(Path(module.__file__).read_text())
    assigned = [node for node in tree.body if isinstance(node, ast.Assign)]
    names = {name.id for node in assigned for name in ast.walk(node) if isinstance(name, ast.Name)}
    found = {name: getattr(module, name) for name in names if name.isupper()}
    return {
        name: value
        for name, value in found.items()
        if all(isinstance(one, int | float) for one in (value if isinstance(value, tuple) else [value]))
    }


def test_numbers_in_sentences_are_true() -> None:
    """Each sentence that tells a number tells the code's."""
    config = uvicorn.Config("", log_config=None)
    (least, most), (first, longest) = upstream.SILENT_SECONDS, upstream.RETRY_SECONDS
    levels = websocket.Command.model_fields["levels"]
    assert config.ws_ping_interval == config.ws_ping_timeout
    assert streams.POLL_BUDGET_RATIO == 0.5
    assert streams.HOT_SECONDS == 60
    sentences = [
        f"every {streams.HEARTBEAT_SECONDS:g} s, unless you are too slow",
        f"or, every {streams.HEARTBEAT_SECONDS:g} s, `heartbeat`",
        f"is lost, and not back after {upstream.GRACE_SECONDS:g} s",
        f"without a trade for {ccxt_stream.APART_SECONDS:g} s",
        f"for {upstream.SILENT_PACES} times as long as its longest pause of late",
        f"but not before {least:g} s, and after {most:g} s at the latest",
        f"when nothing came in the first {upstream.FIRST_SECONDS:g} s",
        f"by REST, every {streams.POLL_SECONDS:g} s at the most, as long as less than half of",
        f"connects again after {first:g} s, doubling up to {longest:g} s",
        f"{websocket.IDLE_SECONDS:g} s without a subscription and without a message",
        f"A message of more than {websocket.MAX_MESSAGE_BYTES} bytes",
        f"You were too slow for {websocket.SLOW_SECONDS:g} s",
        f"After {websocket.SLOW_SECONDS:g} s without room",
        f"a buffer of {websocket.BUFFER_BYTES} bytes, and as much in the kernel",
        f"{websocket.MESSAGES_PER_SECOND} a second, {websocket.MESSAGES_AT_ONCE} at once",
        f"Whoever takes nothing for {server_events.SLOW_SECONDS:g} s",
        f"answers {streams.HOT_REQUESTS} times within a minute",
        f"a lease of {bus.LEASE_SECONDS:g} s which it renews every second",
        f"replaced within {bus.LEASE_SECONDS:g} s",
        f"1 to {feeds.LEVELS}, {levels.default} by default",
        f"pings of its own, every {config.ws_ping_interval:g} s",
        f"the server's ping within {config.ws_ping_timeout:g} s",
    ]
    text = " ".join(TEXT.split())
    assert not [sentence for sentence in sentences if sentence not in text]
    assert bus.LEASE_SECONDS / 3 == 1
    assert feeds.SEND_BUFFER_BYTES == websocket.BUFFER_BYTES
    assert server_events.RETRY == b"retry: 1000\n\n"


def test_messages_shown_are_messages() -> None:
    """Every message in docs/streaming.md fits its schema, and every op is shown."""
    shown = [json.loads(text) for text in re.findall(r"```json\n(.*)\n```", TEXT)]
    for message in shown:
        if "op" in message:
            assert not problems(ASKED[message["op"]], message)
        else:
            check(message)
    assert {message["op"] for message in shown if "op" in message} == OPS
    assert {message["type"] for message in shown if "type" in message} == sent_types()


async def test_real_messages_fit_the_schemas(start: StartGateway, sandbox: Sandbox, clock: FakeClock) -> None:
    """Everything a gateway says, of every type and channel, live and stale, is as the documents say."""
    live, heard = await start(), list[dict[str, Any]]()
    async with passing(clock), connect(address(live)) as socket:
        await say(socket, op="ping", id="p")
        heard += await hear(socket, is_type("pong", id="p"))
        await say(socket, op="subscribe", id=1, symbols=["btc-usdt", "FOO-BAR"], exchange="all")
        heard += await hear(socket, is_type("subscribed", id=1))
        assert list(heard[-1]["errors"]) == ["FOO-BAR"]
        await say(socket, op="subscribe", channel="book", symbols=["ETH/USDT"], levels=3)
        await say(socket, op="subscribe", channel="trades", symbols=["ETH/USDT"], exchange="kraken")
        for channel in feeds.CHANNELS:
            heard += await hear(socket, is_type("update", channel=channel))
        await say(socket, op="list", id=2)
        heard += await hear(socket, is_type("list", id=2))
        assert [it["exchange"] for it in heard[-1]["streams"]] == ["all", None, "kraken"]
        await say(socket, op="subscribe", symbols=["FOO-BAR"])
        heard += await hear(socket, is_type("error"))
        await sandbox.set("kraken", freeze=True, rate_limit=-1)
        heard += await hear(socket, is_type("status", exchange="kraken", state="stale"))
        await sandbox.set("kraken", rate_limit=-1)
        heard += await hear(socket, is_type("status", exchange="kraken", state="live"))
        await say(socket, op="unsubscribe", channel="trades", symbols=["ETH/USDT"], exchange="kraken")
        heard += await hear(socket, is_type("unsubscribed"))
        await inside(live)._beat()
        heard += await hear(socket, is_type("heartbeat"))
    assert {message["type"] for message in heard} == sent_types()
    numbers: dict[tuple[str, ...], int] = defaultdict(int)
    for message in heard:
        if message["type"] in {"snapshot", "update"}:
            stream = message["channel"], message["exchange"], message["symbol"]
            assert message["type"] == "snapshot" or message["seq"] == numbers[stream] + 1
            numbers[stream] = message["seq"]
            if message["channel"] == "book":
                assert len(message["data"]["bids"]) == 3
    assert len(numbers) == 5


async def test_pushed_is_what_rest_answers(start: StartGateway, clock: FakeClock) -> None:
    """The data of an update is REST's answer from then on, to the letter, and says that it was pushed."""
    live = await start()
    async with connect(address(live)) as socket:
        async with passing(clock):
            await say(socket, op="subscribe", symbols=["BTC-USDT"], exchange="binance")
            await hear(socket, is_type("update"))
        newest = await _drain(socket)
        answer = (await live.get("/ticker/BTC-USDT?exchange=binance")).json()
        assert answer["source"] == "stream"
        watched = inside(live).topics[bus.Topic("binance", "ticker", "BTC/USDT")]
        assert watched.event is not None
        assert answer == json.loads(watched.event.data)
        assert not newest or newest[-1]["data"] == answer


async def _drain(socket: ClientConnection) -> list[dict[str, Any]]:
    """Take what is there, up to the answer of a ping."""
    await say(socket, op="ping", id="drain")
    return (await hear(socket, is_type("pong", id="drain")))[:-1]


async def test_two_subscriptions_share_a_stream(start: StartGateway, clock: FakeClock) -> None:
    """What two subscriptions come down to is pushed once, and goes on when one of them ends."""
    live = await start()
    async with passing(clock), connect(address(live)) as socket:
        await say(socket, op="subscribe", symbols=["BTC-USDT"], exchange="all")
        await say(socket, op="subscribe", symbols=["BTC-USDT"], exchange="kraken")
        heard = await hear(socket, is_type("update", exchange="kraken"))
        seen = [message["seq"] for message in heard if is_type("update", exchange="kraken")(message)]
        assert len(seen) == len(set(seen))
        await say(socket, op="unsubscribe", symbols=["BTC-USDT"], exchange="all", id=1)
        await hear(socket, is_type("unsubscribed", id=1))
        heard = await hear(socket, is_type("update"))
        heard += await hear(socket, is_type("update"))
        assert {message["exchange"] for message in heard if "exchange" in message} == {"kraken"}
        await say(socket, op="unsubscribe", symbols=["BTC-USDT"], exchange="kraken", id=2)
        await hear(socket, is_type("unsubscribed", id=2))
        assert not await _drain(socket)


async def test_each_exchange_counts(start: StartGateway) -> None:
    """With `all` every exchange's stream counts, in one message as in several, and ends with its subscription."""
    live = await start(stream_max_subscriptions=5)
    symbols = ["BTC/USDT", "ETH/USDT", "SOL/USDT"]
    async with connect(address(live)) as socket:
        for _ in range(2):
            await say(socket, op="subscribe", symbols=symbols, exchange="all")
            (answer,) = [it for it in await hear(socket, is_type("subscribed")) if it["type"] == "subscribed"]
            assert answer["symbols"] == symbols[:1]
            assert {it["code"] for it in answer["errors"].values()} == {"too_many_subscriptions"}
            await say(socket, op="subscribe", symbols=symbols[1:], id="more")
            answer = (await hear(socket, is_type("subscribed", id="more")))[-1]
            assert answer["symbols"] == symbols[1:]
            await say(socket, op="unsubscribe", symbols=symbols, exchange="all")
            await say(socket, op="unsubscribe", symbols=symbols, id="all")
            await hear(socket, is_type("unsubscribed", id="all"))


async def test_one_message_does_not_pass_the_bound_of_topics(start: StartGateway) -> None:
    """A message with many symbols is held to STREAM_MAX_TOPICS as many messages are."""
    live = await start(stream_max_topics=2)
    async with connect(address(live)) as socket:
        await say(socket, op="subscribe", symbols=["BTC/USDT", "ETH/USDT", "SOL/USDT"])
        answer = (await hear(socket, is_type("subscribed")))[-1]
    assert answer["symbols"] == ["BTC/USDT", "ETH/USDT"]
    assert answer["errors"]["SOL/USDT"]["code"] == "too_many_streams"


async def test_half_an_unsubscription_is_told(start: StartGateway) -> None:
    """When one symbol of it cannot be read, the others are ended, and the answer says which were."""
    live = await start()
    async with connect(address(live)) as socket:
        await say(socket, op="subscribe", symbols=["BTC/USDT", "ETH/USDT"])
        await say(socket, op="unsubscribe", symbols=["BTC/USDT", "B!", "SOL/USDT"], id=1)
        answer = (await hear(socket, is_type("unsubscribed", id=1)))[-1]
        assert answer["symbols"] == ["BTC/USDT"]
        codes = {symbol: error["code"] for symbol, error in answer["errors"].items()}
        assert codes == {"B!": "malformed_request", "SOL/USDT": "invalid_parameter"}
        await say(socket, op="unsubscribe", symbols=["B!"], id=2)
        assert (await hear(socket, is_type("error", id=2)))[-1]["code"] == "malformed_request"
        await say(socket, op="list", id=3)
        streams = (await hear(socket, is_type("list", id=3)))[-1]["streams"]
    assert [it["symbol"] for it in streams] == ["ETH/USDT"]


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
async def test_refusals_are_told(
    start: StartGateway, settings: dict[str, Any], arguments: dict[str, Any], code: str, close: int
) -> None:
    """Who may not connect gets the documented error, then the documented code."""
    live = await start(**settings)
    header = {"X-API-Key": KEY} if "api_keys" in settings else {}
    async with connect(address(live), additional_headers=header):  # the one who may
        await eventually(lambda: len(inside(live).subscribers) == 1)
        async with connect(address(live), **arguments) as socket:
            assert (await hear(socket, is_type("error")))[-1]["code"] == code
            with pytest.raises(ConnectionClosed):
                await socket.recv()
            assert socket.close_code == close
    assert f"| {close} |" in section("## The end of a connection")


@pytest.mark.parametrize(
    ("messages", "close"), [(["x" * (websocket.MAX_MESSAGE_BYTES + 1)], 1009), (['{"op":"ping"}'] * 60, 1008)]
)
async def test_too_much_is_closed(start: StartGateway, messages: list[str], close: int) -> None:
    """Who says too much at once, or too often, is closed with the documented code."""
    live = await start()
    async with connect(address(live)) as socket:
        with pytest.raises(ConnectionClosed):  # noqa: PT012 - it may end in any of these
            for message in messages:
                await socket.send(message)
            while True:
                check(json.loads(await socket.recv()))
        assert socket.close_code == close
    assert f"| {close} |" in section("## The end of a connection")


async def test_without_streaming_there_is_nothing(start: StartGateway) -> None:
    """Where it is switched off the handshake is refused, and the path is not there."""
    live = await start(streaming=False)
    with pytest.raises(InvalidStatus) as caught:
        await connect(address(live))
    assert caught.value.response.status_code == 403
    assert (await live.get("/stream/BTC-USDT")).status_code == 404


async def test_events_are_as_documented(start: StartGateway, clock: FakeClock) -> None:
    """Each event has the number of its message, the README shows such ones, and what was seen is not repeated."""
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
    watched = inside(live).topics[bus.Topic("bybit", "ticker", "BTC/USDT")]
    async with asyncio.timeout(60), live.client.stream(
        "GET", live.url + path, headers={"Last-Event-ID": str(watched.sequence)}
    ) as answer:  # fmt: skip
        lines = answer.aiter_lines()
        assert [await anext(lines) for _ in range(2)] == ["retry: 1000", ""]
        async with passing(clock):
            assert (await anext(lines)).startswith("id: ")
            assert await anext(lines) == "event: update"
    shown = section("## Streaming", README).split("```console\n")[1].split("```")[0]
    found = [json.loads(line.removeprefix("data: ")) for line in shown.splitlines() if line.startswith("data: ")]
    assert [list(message) for message in found] == [list(message) for _, _, message in events[:2]]
    assert [list(message["data"]) for message in found] == [list(message["data"]) for _, _, message in events[:2]]
    assert shown.splitlines()[1:5] == ["retry: 1000", "", f"id: {found[0]['seq']}", "event: snapshot"]
    for message in found:
        check(message)


async def _events(live: Live, path: str, count: int) -> list[tuple[str, str, dict[str, Any]]]:
    """Return the first events of a stream: name, id and data."""
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
    raise AssertionError("it ended")


@pytest.mark.parametrize("example", ["stream.py", "stream.js"])
async def test_examples_work(start: StartGateway, sandbox: Sandbox, clock: FakeClock, example: str) -> None:
    """Each prints what comes, says what is stale, and connects again when the gateway ends the connection."""
    program = [sys.executable] if example.endswith(".py") else [tool("node", "nodejs"), "--experimental-websocket"]
    live = await start(api_keys=KEY)
    environment = {"PATH": os.environ["PATH"], "GATEWAY": address(live), "API_KEY": KEY}
    process = await asyncio.create_subprocess_exec(
        *program, str(ROOT / "examples" / example), "BTC-USDT", env=environment, stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None

    async def until(*beginnings: str) -> None:
        async with asyncio.timeout(60):
            for beginning in beginnings:
                line = ""
                while not line.startswith(beginning):
                    line = (await process.stdout.readline()).decode()  # type: ignore[union-attr]
                    assert line, f"it ended before it said {beginning}"

    try:
        async with passing(clock):
            await until("subscribed", "snapshot bybit BTC/USDT", "update bybit", "update bybit")
            await sandbox.set("bybit", freeze=True, rate_limit=-1)
            await until("status bybit BTC/USDT stale", "snapshot binance", "update binance")
            inside(live).goodbye()
            await until("lost", "subscribed", "snapshot", "update", "update")
        assert process.returncode is None
    finally:
        if process.returncode is None:
            process.terminate()
        await process.communicate()


@pytest.mark.parametrize("example", ["stream.py", "stream.js"])
async def test_examples_take_no_for_an_answer(start: StartGateway, example: str) -> None:
    """Who is refused for good does not ask for ever."""
    program = [sys.executable] if example.endswith(".py") else [tool("node", "nodejs"), "--experimental-websocket"]
    live = await start(api_keys=KEY)
    environment = {"PATH": os.environ["PATH"], "GATEWAY": address(live), "API_KEY": "wrong-key"}
    process = await asyncio.create_subprocess_exec(
        *program,
        str(ROOT / "examples" / example),
        env=environment,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    said, _ = await asyncio.wait_for(process.communicate(), 60)
    assert b"refused: unauthorized" in said


async def test_examples_need_only_what_they_say(start: StartGateway) -> None:
    """The Python example imports the standard library and `websockets`; the other one nothing."""
    tree = ast.parse((ROOT / "examples" / "stream.py").read_text())
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {str(node.module).split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert names - set(sys.stdlib_module_names) == {"websockets"}
    assert not re.search(r"\b(import|require)\b", (ROOT / "examples" / "stream.js").read_text())
