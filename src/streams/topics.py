"""What clients can subscribe to: the table of channels, topics, subscriptions and events.

A new channel needs a name and a row in `CHANNELS`, the exchanges' own names for it in
`src/exchanges`, and a schema in docs/asyncapi.yaml.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, Literal, NamedTuple, Self

import orjson

from src.cache.entry import Key, Param
from src.core.models import Candles, MarketData, OrderBook, Ticker
from src.exchanges.manager import is_swap
from src.exchanges.trades import build_trades
from src.kinds import shared_key
from src.store.redis import PREFIX

MAX_LEVELS = 50  # of each watched order book; subscribers may request fewer
ChannelName = Literal["ticker", "book", "trades", "ohlcv"]
Timeframe = Literal["1m", "5m", "15m", "30m", "1h", "4h", "1d", "1w"]


class Channel(NamedTuple):
    """One kind of market data that clients subscribe to."""

    name: ChannelName
    """Name in the streaming API."""

    kind: str
    """Name in the gateway and its cache."""

    parse: Callable[[Any, str, str, int], MarketData]
    """Convert ccxt's result, exchange, symbol and time of receipt to a model."""

    rest_params: tuple[Param, ...] = ()
    """Parameters of the REST request whose answer has as much data as the stream.

    Those of candles follow the timeframe.
    """

    has_levels: bool = False
    """Subscribers choose the number of order book levels."""

    has_timeframe: bool = False
    """Subscribers choose the length of candles. Each length is a topic of its own."""

    has_bulk_call: bool = False
    """REST returns many symbols in one call."""

    is_incremental: bool = False
    """Each message adds to earlier ones: REST cannot replace lost ones, and nothing is cached."""

    def params(self, timeframe: str) -> tuple[Param, ...]:
        """Return the parameters of the REST request, for one length of candles."""
        return (timeframe, *self.rest_params) if self.has_timeframe else self.rest_params


_parse_book = partial(OrderBook.from_ccxt, limit=MAX_LEVELS)
_ROWS = (
    Channel("ticker", "ticker", Ticker.from_ccxt, has_bulk_call=True),
    Channel("book", "orderbook", _parse_book, rest_params=(MAX_LEVELS,), has_levels=True),
    Channel("trades", "trades", build_trades, rest_params=(50,), is_incremental=True),
    Channel("ohlcv", "ohlcv", Candles.from_push, rest_params=(2, False), has_timeframe=True),
)
CHANNELS: dict[str, Channel] = {channel.name: channel for channel in _ROWS}
CHANNEL_BY_KIND = {channel.kind: channel for channel in _ROWS}


class Topic(NamedTuple):
    """One kind of data of one market of one exchange."""

    exchange: str
    kind: str
    symbol: str
    timeframe: str = ""
    """The length of candles. Empty for all other kinds."""

    @property
    def channel(self) -> Channel:
        """Return the channel of this kind of data."""
        return CHANNEL_BY_KIND[self.kind]

    @property
    def rest_params(self) -> tuple[Param, ...]:
        """Return the parameters of the REST request whose answer has as much data."""
        return self.channel.params(self.timeframe)

    @property
    def key(self) -> Key:
        """Return the key of the cached answer that has as much data."""
        return shared_key(self.exchange, self.kind, self.symbol, self.rest_params)

    def fields(self) -> dict[str, Any]:
        """Return the members that name the topic in messages and log lines."""
        names = {"channel": self.channel.name, "exchange": self.exchange, "symbol": self.symbol}
        return names | ({"timeframe": self.timeframe} if self.timeframe else {})

    def redis_name(self, purpose: str) -> str:
        """Return the name of the topic's lease or pub/sub channel in Redis."""
        return f"{PREFIX}{purpose}:{{{'|'.join(filter(None, self))}}}"


class SocketKey(NamedTuple):
    """Identifies one exchange socket: market types and lengths of candles have separate sockets."""

    exchange: str
    kind: str
    swaps: bool
    timeframe: str = ""

    @classmethod
    def of(cls, topic: Topic) -> Self:
        """Return the key of the socket that carries a topic."""
        return cls(topic.exchange, topic.kind, is_swap(topic.symbol), topic.timeframe)


class Subscription(NamedTuple):
    """What a client subscribed to. Without an exchange, the first usable one is chosen."""

    channel: str
    symbol: str
    exchange: str = ""
    levels: int = 0
    timeframe: str = ""


class MarketDataEvent(NamedTuple):
    """A new value of a topic. Times are UTC milliseconds."""

    topic: Topic
    sequence: int
    """Grows by one with each event. A new lease holder continues from the last number it knows."""

    exchange_time: int | None
    receive_time: int
    data: bytes
    """The value, encoded as REST returns it."""

    steady: bool = True
    """True if the event proves that the whole topic is alive, and not only a part of it."""

    wire: Sequence[Sequence[Any]] = ()
    """Candles as rows of the exchange's REST API."""

    born: float = 0.0
    """Time of the value in monotonic seconds of this replica. `dump` omits it."""

    def dump(self) -> bytes:
        """Encode for other replicas: one line of metadata, then the data."""
        times = (self.exchange_time, self.receive_time)
        head = [*self.topic, self.sequence, *times, self.steady, self.wire]
        return orjson.dumps(head) + b"\n" + self.data

    @classmethod
    def parse(cls, raw: object) -> Self | None:
        """Decode the output of `dump`. Return None for anything else."""
        if not isinstance(raw, bytes):
            return None
        head, _, data = raw.partition(b"\n")
        with suppress(ValueError, TypeError):
            *names, sequence, exchange_time, receive_time, steady, wire = orjson.loads(head)
            topic = Topic(*map(str, names))
            times = (exchange_time, int(receive_time))
            return cls(topic, int(sequence), *times, data, bool(steady), wire)
        return None
