"""Every value that is pushed to clients is one of the recorded stream, in its order."""

import asyncio
import json
from collections import defaultdict
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pytest
from websockets.asyncio.client import connect

from tests.conftest import Live, eventually
from tests.recordings import expected
from tests.recordings.recording import Recording, every_recording, market_id, of_kind
from tests.recordings.replay import Replay
from tests.recordings.serving import gateway, symbols

LEVELS = 50  # of pushed order books
IDLE_SECONDS = 20.0  # after this time without a value, no more values are expected
# The beginning of a topic, or its end after the market -> our channel. Other topics were recorded
# that the gateway does not use.
CHANNELS = {
    "tickers": "ticker",
    "orderbook": "book",
    "publicTrade": "trades",
    "depth": "book",
    "kline": "ohlcv",
    "kline_1m": "ohlcv",
}


class Stream(NamedTuple):
    """One subscription of a client."""

    channel: str
    symbol: str


@dataclass
class Recorded:
    """The topics of one subscription, and what they have to lead to."""

    topics: set[tuple[str, str]]
    """Market types and topics."""
    states: list[dict[str, Any]]
    """The value after each message, or all trades."""
    pushed: list[dict[str, Any]] = field(default_factory=list)
    """The values that the client received, or all trades."""

    def is_complete(self, channel: str) -> bool:
        """Return True if the client has the last value, or all trades."""
        if channel == "trades":
            return len(self.pushed) >= len(self.states)
        return (
            bool(self.pushed) and not expected.differences("", self.pushed[-1], self.states[-1])[1]
        )


def read(
    recording: Recording, books: Mapping[str, Recording], replay: Replay
) -> dict[Stream, Recorded]:
    """Return the subscriptions whose values are recorded."""
    exchange = recording.exchange
    found = {}
    for market_type, topic in dict.fromkeys((push.type, push.topic) for push in recording.pushes):
        name = topic.split("@")[1] if "@" in topic else topic.split(".")[0]
        if name not in CHANNELS or ".1." in topic:
            continue
        market = market_id(topic)
        (symbol,) = symbols(replay, exchange, market_type, [market]).values()
        stream = Stream(CHANNELS[name], symbol)
        topics = {topic}
        if stream.channel == "ticker" and market_type == "spot":
            topics.add(f"orderbook.1.{market}")
        messages = [
            push.message
            for push in recording.pushes
            if push.type == market_type and push.topic in topics
        ]
        if stream.channel == "book":
            states = expected.book_states(exchange, messages, books.get(market), LEVELS)
        elif stream.channel == "ticker":
            states = expected.ticker_states(messages)
        elif stream.channel == "ohlcv":
            states = [expected.pushed_candle(message) for message in messages]
        else:
            states = [expected.pushed_trade(row) for each in messages for row in each["data"]]
        found[stream] = Recorded({(market_type, each) for each in topics}, states)
    return found


def follow(stream: Stream, recorded: Recorded) -> tuple[int, list[str]]:
    """Check that each value is a state, and not one before that of the previous value."""
    position = 0
    count = 0
    for value in recorded.pushed:
        later = recorded.states[position:]
        results = (expected.differences(str(stream), value, state) for state in later)
        for index, (compared, faults) in enumerate(results):
            if not faults:
                position += index
                count += compared
                break
        else:
            same_time = [
                state for state in later if state.get("timestamp") == value.get("timestamp")
            ]
            return expected.differences(str(stream), value, (same_time or later)[0])
    return count, []


async def receive(
    live: Live, exchange: str, replay: Replay, streams: Mapping[Stream, Recorded]
) -> None:
    """Subscribe a client to all streams, and keep what it receives until all is there."""
    address = live.url.replace("http", "ws") + "/ws"
    wanted = {topic for recorded in streams.values() for topic in recorded.topics}
    by_channel: defaultdict[str, list[str]] = defaultdict(list)
    for stream in streams:
        by_channel[stream.channel].append(stream.symbol)
    async with connect(address, compression=None, max_size=None) as client:
        for channel, names in by_channel.items():
            command = {"op": "subscribe", "channel": channel, "symbols": names}
            await client.send(json.dumps(command | {"exchange": exchange, "levels": LEVELS}))
        await eventually(lambda: replay.subscribed >= wanted)
        replay.release.set()
        pending = dict(streams)
        loop = asyncio.get_running_loop()
        with suppress(TimeoutError):
            async with asyncio.timeout(IDLE_SECONDS) as idle:
                while pending:
                    message = json.loads(await client.recv())
                    if message["type"] not in ("snapshot", "update"):
                        continue
                    idle.reschedule(loop.time() + IDLE_SECONDS)
                    stream = Stream(message["channel"], message["symbol"])
                    data = message["data"]
                    recorded = streams[stream]
                    if stream.channel == "ohlcv":
                        data = {"candle": data["candles"][-1]}
                    recorded.pushed += data["trades"] if stream.channel == "trades" else [data]
                    if recorded.is_complete(stream.channel):
                        pending.pop(stream, None)


@pytest.mark.parametrize("recording", of_kind("stream"))
async def test_values_are_pushed_as_recorded(recording: Recording) -> None:
    """The messages are replayed as fast as possible to a client of all recorded streams."""
    books = {
        other.id: other
        for other in every_recording()
        if other.kind == "orderbook" and other.name.startswith(recording.name.removesuffix("ws"))
    }
    async with gateway(recording, list(books.values())) as (live, replay):
        streams = read(recording, books, replay)
        await receive(live, recording.exchange, replay, streams)
    results = []
    for stream, recorded in streams.items():
        if stream.channel == "trades":
            pairs = zip(recorded.pushed, recorded.states, strict=False)
            results += [expected.differences(str(stream), *pair) for pair in pairs]
        else:
            results.append(follow(stream, recorded))
        if not recorded.is_complete(stream.channel):
            results.append((1, [f"{stream} has {len(recorded.pushed)} values, but not the last"]))
    expected.check(results)
