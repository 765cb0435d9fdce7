"""Everything that is specific to one exchange, as one `Profile` per exchange.

No other module names an exchange. This module imports nothing of the project.
`docs/adding-an-exchange.md` describes how to add one.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

MARKET_TYPES = ("spot", "swap")
Weight = Callable[[str, int, bool], int]
"""Returns the weight of a call: operation, number of symbols or levels, True for a swap."""
Unsubscribe = Callable[[str, Sequence[str], int, str], dict[str, Any]]
"""Returns the message that ends subscriptions: kind of data, topics, number of the message, and the
exchange's name of the length of candles."""
ClosedCandle = Callable[[Mapping[str, Any]], int | None]
"""Returns the start (UTC ms) of the candle of which a message has the final state."""
WireCandles = Callable[[Mapping[str, Any]], list[list[Any]]]
"""Returns the candles of a message as rows of the REST API, digit for digit."""
MarketName = Callable[[Mapping[str, Any]], str]
"""Returns a name of ccxt's market, of which `info` is the exchange's own row."""


class Refusal(NamedTuple):
    """A refused subscription: the number of the refused message, or the refused symbol."""

    number: str = ""
    symbol: str = ""


FindRefusal = Callable[[Mapping[str, Any]], Refusal | None]
"""Returns the refusal that a message of the exchange contains."""

CALL = "call"
MARKET = "market"
ENDPOINT = "endpoint"
EXCHANGE = "exchange"


class BookUpdate(NamedTuple):
    """What a message says about the order book that it changes."""

    name: str
    """Name of the market on the sockets."""
    is_snapshot: bool
    number: int | None = None
    """Grows by one with each update."""
    checksum: int | None = None
    """Of the book after the update."""
    time: str = ""
    """Time of the update in ISO 8601, if ccxt ignores it."""


TickerDelta = Callable[[Mapping[str, Any]], tuple[str, int] | None]
"""Returns topic and time (UTC ms) of a message with the changed fields of a ticker."""
FindBookUpdate = Callable[[Mapping[str, Any]], BookUpdate | None]
"""Returns the order book update that a message of the exchange contains."""


@dataclass(frozen=True, slots=True)
class ErrorRule:
    """Meaning of an exchange's error answers. `src/core/errors.py` describes the scopes."""

    code: str
    """Code of the gateway's error that the answer stands for."""
    text: bytes = b""
    """Regular expression that has to match in the beginning of the body, in lower case.

    Its group, if it has one and it matches, is the end of the pause in Unix seconds or
    milliseconds."""
    status: int | None = None
    """HTTP status that the answer has to have."""
    scope: str = EXCHANGE
    pause_seconds: float | None = None
    """Pause if the answer has no time. None: the default of the gateway's error."""


# Applied to every exchange after its own rules; the first match decides.
COMMON_RULES = (
    ErrorRule("exchange_banned", status=418),
    ErrorRule("exchange_rate_limited", status=429),
    ErrorRule("geo_blocked", status=403),
    ErrorRule("geo_blocked", status=451),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class SocketLimits:
    """Limits of one WebSocket connection to an exchange."""

    frame_topics: int = 100
    """Topics of one message that subscribes or unsubscribes."""
    frame_seconds: float = 0.1
    """Pause after each message."""
    socket_topics: int = 1_000
    """Topics of one connection."""


class Sizes(NamedTuple):
    """Numbers of rows that are requested of spot markets and swaps, ascending.

    Few sizes make requests for different numbers of rows share one call. The largest size is what
    the exchange has at most, or what a client may ask for.
    """

    spot: tuple[int, ...]
    swap: tuple[int, ...]


# The stream of an order book has 50 levels, so requests for up to 50 share its values.
BOOK_SIZES = Sizes(spot=(50, 200), swap=(50, 200))
TRADE_SIZES = Sizes(spot=(100, 1000), swap=(100, 1000))
SIZES = {"orderbook": BOOK_SIZES, "trades": TRADE_SIZES}


# Defaults of a profile. They have names, because a profile is sent to a child process.
def one_per_call(_operation: str, _size: int, _is_swap: bool) -> int:
    """Count calls: every call has the weight 1."""
    return 1


def nothing(_: Mapping[str, Any]) -> None:
    """Find nothing in a message or a row."""
    return


def any_trade(_row: Mapping[str, Any]) -> bool:
    """Accept every trade."""
    return True


def market_id(market: Mapping[str, Any]) -> str:
    """Return the exchange's id of a market."""
    return str(market["id"])


QUOTED, HALTED, ENDED = "quoted", "halted", "ended"  # the states of a market


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """One exchange."""

    name: str
    """Name in settings, requests and responses."""
    ccxt_class: str
    """Name of the ccxt class and its module."""
    default_budget: str
    """Request weight per seconds, as `weight/seconds`, per egress address."""
    default_futures_budget: str = ""
    """The same for the calls for swaps, if the exchange counts them apart."""
    weight: Weight = one_per_call
    batch_size: int = 100
    """Tickers in one call. Kraken's list of pairs is part of the URL."""
    sizes: Mapping[str, Sizes] = field(default_factory=lambda: SIZES)
    """Kind of data -> numbers of rows to request."""
    candle_page: int = 1000
    """Candles in one call."""
    max_candles_back: int | None = None
    """The exchange has only so many candles, whatever `since` is. None: all since its listing."""
    since_parameter: str = ""
    """The exchange's parameter for the first candle, if ccxt rounds weeks wrongly for it."""
    week_offset_seconds: int = 4 * 86_400
    """Start of a weekly candle: seconds since Thursday 00:00 UTC, on which the epoch began."""
    used_weight_header: str = ""
    """Response header with the weight that this address has used."""
    remaining_header: str = ""
    """Response header with the remaining requests; `0` means that the budget is spent."""
    reset_header: str = ""
    """Response header with the end of a rate limit in Unix milliseconds."""
    body_time: bytes = b""
    """Regular expression that finds the time (UTC ms) of an answer in the end of its body.

    Empty if bodies have no such time: the Date header has it in whole seconds."""
    error_rules: tuple[ErrorRule, ...] = ()
    """Checked before `COMMON_RULES`."""
    has_partial_errors: bool = False
    """True if an answer has the rows of known symbols and an error for unknown ones."""
    proofs: Mapping[str, bytes] = field(default_factory=dict)
    """Kind of data -> text that shows that an answer without rows is about the market.

    `%s` stands for the market's id. The text is in lower case and without blanks."""

    quoted_statuses: frozenset[str] = frozenset()
    """Statuses of markets with a live order book. Empty: ccxt's `active` flag decides."""
    ended_statuses: frozenset[str] = frozenset()
    """Statuses of markets that have not begun to trade or never will again: they are not listed.
    A market with any other status is halted: its prices are old."""
    ws_name: MarketName = market_id
    """Returns the name of a market on the sockets."""
    has_own_symbols: bool = False
    """True if ccxt passes on the names on the sockets as symbols."""
    decimals: Callable[[Mapping[str, Any]], tuple[int, int] | None] = nothing
    """Returns the decimals of a market's prices and amounts, of which checksums are made."""
    is_market_trade: Callable[[Mapping[str, Any]], bool] = any_trade
    """Returns False for rows in lists of trades that no order in the market caused."""
    topics: Mapping[str, tuple[str, ...]]
    """Kind of data -> topics of one market, formatted with the fields of ccxt's market."""
    socket_limits: dict[str, SocketLimits]
    """Market type -> limits of its connections."""
    connection_limit: tuple[int, int]
    """New connections per seconds and egress address."""
    book_depth: int
    """Levels of a streamed order book: the smallest depth from 50 levels on."""
    unsubscribe: Unsubscribe
    watch_params: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Kind of data -> further parameters of the subscription."""
    candle_time: str = ""
    """Member of a message with pushed candles that has the exchange's time."""
    ticker_time: str = ""
    """Field of a pushed ticker with the exchange's time, if ccxt ignores it."""
    ticker_delta: TickerDelta = nothing
    """Finds messages with a part of a ticker. A late one would stay in ccxt's merged ticker."""
    find_book_update: FindBookUpdate | None = None
    """Finds numbers and checksums of order book updates that ccxt does not check."""
    wire_candles: WireCandles | None = None
    """None if the sockets send other digits than the REST API."""
    closed_candle: ClosedCandle | None = None
    """None if no message marks the end of a candle: the next candle does."""
    find_refusal: FindRefusal = nothing
    """Finds refused subscriptions that ccxt does not report."""
    undefined_rest_fields: tuple[str, ...] = ()
    """Members of ccxt's ticker that mean something else by REST than in the stream."""
    last_trade_fields: tuple[str, ...] = ()
    """Names of the time of the last trade in the exchange's own ticker, by REST and in the stream.
    """
    separate_rest_top_types: frozenset[str] = frozenset()
    """Market types whose REST ticker has no bid and ask: a second call has them."""
    separate_top_types: frozenset[str] = frozenset()
    """Market types whose ticker stream has no bid and ask: a second stream has them."""
    numbers_per_socket: bool = False
    """True if ccxt numbers messages per socket: `request_id` takes the URL."""
    socket_options: Mapping[str, Any] = field(default_factory=dict)
    """Options of ccxt's WebSocket client."""
    spot_socket_path: str = ""
    """Path of the spot socket on a replaced host, if ccxt tells spot from swap by the URL."""

    def size(self, kind: str, rows: int, *, is_swap: bool) -> int:
        """Return the smallest size that has so many rows, or else the largest."""
        sizes = self.sizes[kind].swap if is_swap else self.sizes[kind].spot
        return next((size for size in sizes if size >= rows), sizes[-1])

    @property
    def budgets(self) -> dict[str, str]:
        """The settings of the budgets, and their defaults."""
        budgets = {"budget": self.default_budget, "futures_budget": self.default_futures_budget}
        return {setting: budget for setting, budget in budgets.items() if budget}

    def state_of(self, market: Mapping[str, Any]) -> str:
        """Return the state of ccxt's market: quoted, halted or ended."""
        status = status_of(market)
        if not self.quoted_statuses or not status:
            return ENDED if market["active"] is False else QUOTED
        if status in self.quoted_statuses:
            return QUOTED
        return ENDED if status in self.ended_statuses else HALTED


def status_of(market: Mapping[str, Any]) -> str:
    """Return the exchange's own word for the status of ccxt's market. Empty if there is none."""
    return str(market["info"].get("status") or "")


def bybit_unsubscribe(_kind: str, topics: Sequence[str], number: int, _: str) -> dict[str, Any]:
    """Return Bybit's message."""
    return {"op": "unsubscribe", "req_id": number, "args": topics}


def bybit_book_update(message: Mapping[str, Any]) -> BookUpdate | None:
    """Read `u` of an order book message. Recorded on 2026-08-09: it grows by one."""
    if not str(message.get("topic")).startswith("orderbook."):
        return None
    data = message["data"]
    return BookUpdate(data["s"], message["type"] == "snapshot", number=data["u"])


def bybit_ticker_delta(message: Mapping[str, Any]) -> tuple[str, int] | None:
    """Read `topic` and `ts`: https://bybit-exchange.github.io/docs/v5/websocket/public/ticker."""
    topic = str(message.get("topic"))
    return (topic, message["ts"]) if topic.startswith("tickers.") else None


def bybit_is_market_trade(row: Mapping[str, Any]) -> bool:
    """Reject block trades, which are negotiated outside of the order book."""
    return not (row.get("BT") or row.get("isBlockTrade"))


def bybit_closed_candle(message: Mapping[str, Any]) -> int | None:
    """Read `confirm`: https://bybit-exchange.github.io/docs/v5/websocket/public/kline."""
    closed = [row["start"] for row in message.get("data", ()) if row["confirm"]]
    return int(closed[-1]) if closed else None


def bybit_wire_candles(message: Mapping[str, Any]) -> list[list[Any]]:
    """Return rows of `/v5/market/kline`: start, prices, volume, turnover."""
    names = ("open", "high", "low", "close", "volume", "turnover")
    return [[str(row["start"]), *map(row.get, names)] for row in message.get("data", ())]


# https://bybit-exchange.github.io/docs/v5/ws/connect: ten args per message for spot, and 21,000
# characters of args per connection. The longest, `"orderbook.50.1000000BABYDOGEUSDT",`, has 35. No
# rate of messages is documented.
BYBIT_SPOT_LIMITS = SocketLimits(frame_topics=10, frame_seconds=0.05, socket_topics=600)
BYBIT_SWAP_LIMITS = SocketLimits(frame_seconds=0.05, socket_topics=600)

# https://bybit-exchange.github.io/docs/v5/error: all but 403 arrive with HTTP status 200. 403 means
# that the address exceeded its limit, for 10 minutes, or that its country is blocked.
BYBIT_RULES = (
    ErrorRule("unknown_symbol", rb'"retcode":10001,"retmsg":"[^"]*symbol', scope=MARKET),
    ErrorRule("request_rejected", rb'"retcode":10001\b', scope=CALL),
    ErrorRule("exchange_rate_limited", rb'"retcode":10006\b', scope=ENDPOINT, pause_seconds=5),
    ErrorRule("exchange_rate_limited", rb'"retcode":10018\b|too frequent', pause_seconds=600),
    ErrorRule("exchange_banned", rb'"retcode":10009\b', pause_seconds=600),
    ErrorRule("exchange_timeout", rb'"retcode":(?:10000|5004)\b'),
    ErrorRule("exchange_unavailable", rb'"retcode":10016\b'),
    ErrorRule("geo_blocked", rb"from your country", status=403),
    ErrorRule("exchange_rate_limited", rb"<html", status=403, pause_seconds=600),
)

BYBIT = Profile(
    name="bybit",
    ccxt_class="bybit",
    default_budget="600/5",
    # At most 60 trades of a spot market are documented.
    sizes=SIZES | {"trades": Sizes(spot=(60,), swap=(100, 1000))},
    quoted_statuses=frozenset({"Trading"}),
    # Before a launch, prices are those of an auction. "Delivering" is the end of dated futures.
    ended_statuses=frozenset({"PreLaunch", "Delivering", "Closed"}),
    since_parameter="start",
    remaining_header="X-Bapi-Limit-Status",
    reset_header="X-Bapi-Limit-Reset-Timestamp",
    # https://bybit-exchange.github.io/docs/v5/guide#response: "Current timestamp (ms)".
    body_time=rb'"time": ?(\d{13})}$',
    error_rules=BYBIT_RULES,
    proofs={"orderbook": b'"s":"%s"', "ohlcv": b'"symbol":"%s"', "trades": b'"list":[]'},
    topics={
        "ticker": ("tickers.{id}", "orderbook.1.{id}"),
        "orderbook": ("orderbook.50.{id}",),
        "trades": ("publicTrade.{id}",),
        "ohlcv": ("kline.{interval}.{id}",),
    },
    socket_limits={"spot": BYBIT_SPOT_LIMITS, "swap": BYBIT_SWAP_LIMITS},
    connection_limit=(500, 300),
    book_depth=50,
    unsubscribe=bybit_unsubscribe,
    ticker_delta=bybit_ticker_delta,
    find_book_update=bybit_book_update,
    is_market_trade=bybit_is_market_trade,
    closed_candle=bybit_closed_candle,
    wire_candles=bybit_wire_candles,
    candle_time="ts",
    separate_top_types=frozenset({"spot"}),
)

# Documented request weights. For lists of tickers and order books: (largest size, weight).
BINANCE_WEIGHTS = {"ticker": 2, "ohlcv": 2, "trades": 4, "markets": 20, "time": 1}
BINANCE_SIZED_WEIGHTS = {
    "tickers": ((20, 2), (100, 40)),
    "orderbook": ((100, 5), (500, 25), (1000, 50), (5000, 250)),
}
# Swaps have a pool of their own. A list of tickers is that of all swaps. A ticker is joined with
# its best bid and ask: 1 + 2, and 40 + 5 for a list. Candles weigh 1 to 10.
BINANCE_SWAP_WEIGHTS = {"ticker": 3, "tickers": 45, "ohlcv": 10, "trades": 20}
BINANCE_SWAP_SIZED_WEIGHTS = {"orderbook": ((50, 2), (100, 5), (500, 10), (1000, 20))}


def binance_weight(operation: str, size: int, is_swap: bool) -> int:
    """Return the documented request weight."""
    weights = BINANCE_SWAP_WEIGHTS if is_swap else BINANCE_WEIGHTS
    sized_weights = BINANCE_SWAP_SIZED_WEIGHTS if is_swap else BINANCE_SIZED_WEIGHTS
    steps = sized_weights.get(operation)
    if steps is None:
        return weights[operation]
    return next((weight for limit, weight in steps if size <= limit), steps[-1][1])


# https://developers.binance.com/docs/binance-spot-api-docs/errors. A text may have the end of a
# ban:
# "IP(1.2.3.4) banned until 1700000600000". 403 is the firewall, whose limit lasts five minutes
# (freqtrade #7865); a blocked country gets 451, or its text with another status.
BINANCE_RULES = (
    ErrorRule("geo_blocked", rb"restricted location"),
    ErrorRule("exchange_banned", rb"\buntil (\d{10,13})\b", status=418),
    ErrorRule("exchange_banned", rb"\bbanned until (\d{10,13})\b"),
    ErrorRule("exchange_rate_limited", rb"\buntil (\d{10,13})\b", status=429),
    ErrorRule("exchange_banned", status=418),
    ErrorRule("exchange_rate_limited", rb'"code":-1003\b'),
    ErrorRule("unknown_symbol", rb'"code":-1121\b', scope=MARKET),
    ErrorRule("market_halted", rb'"code":-1122\b', scope=MARKET),
    ErrorRule("exchange_timeout", rb'"code":-1007\b'),
    ErrorRule("exchange_unavailable", rb'"code":-(?:1001|1008)\b'),
    ErrorRule("request_rejected", rb'"code":-11\d\d\b', scope=CALL),
    ErrorRule("exchange_rate_limited", status=403, pause_seconds=300),
)


def binance_unsubscribe(_kind: str, topics: Sequence[str], number: int, _: str) -> dict[str, Any]:
    """Return Binance's message."""
    return {"method": "UNSUBSCRIBE", "params": topics, "id": number}


def binance_closed_candle(message: Mapping[str, Any]) -> int | None:
    """Read "is this kline closed?" of the kline streams."""
    candle = message.get("k", {})
    return int(candle["t"]) if candle.get("x") else None


def binance_wire_candles(message: Mapping[str, Any]) -> list[list[Any]]:
    """Return a row of `/api/v3/klines`. Its last member is unused, and always "0"."""
    candle = message.get("k")
    return [[*map(candle.get, "tohlcvTqnVQ"), "0"]] if candle else []


def binance_refusal(message: Mapping[str, Any]) -> Refusal | None:
    """Find an error such as `{"error":{"code":2,"msg":"Invalid request: ..."},"id":1}`."""
    return Refusal(number=str(message.get("id"))) if "error" in message else None


# https://developers.binance.com/docs/binance-spot-api-docs/web-socket-streams: five messages per
# second and connection, including pings and pongs, and 1,024 streams per connection. Three messages
# per second leave room for a ping and a pong. Swaps have ten messages per second.
BINANCE_SOCKET_LIMITS = SocketLimits(frame_seconds=0.34, socket_topics=1_024)

BINANCE = Profile(
    name="binance",
    ccxt_class="binance",
    default_budget="6000/60",
    default_futures_budget="2400/60",
    weight=binance_weight,
    batch_size=20,  # a longer list costs twenty times as much
    # More than 100 levels cost five times as much. Swaps accept 5, 10, 20, 50, 100, 500 and 1000.
    sizes=SIZES | {"orderbook": Sizes(spot=(50, 100, 200), swap=(50, 100, 500))},
    used_weight_header="X-MBX-USED-WEIGHT-1M",
    quoted_statuses=frozenset({"TRADING"}),
    # SETTLING perpetuals are delisted: recorded lists have 29 and 53 of them. HALT, BREAK and
    # others keep their last prices. BREAK is used for maintenance and for delisted markets.
    ended_statuses=frozenset({"PENDING_TRADING", "PRE_TRADING", "SETTLING", "CLOSE", "DELIVERED"}),
    error_rules=BINANCE_RULES,
    proofs={"orderbook": b'"lastupdateid":', "ohlcv": b"[]", "trades": b"[]"},
    topics={
        "ticker": ("{lowercaseId}@ticker", "{lowercaseId}@bookTicker"),
        "orderbook": ("{lowercaseId}@depth@100ms",),
        "trades": ("{lowercaseId}@aggTrade",),
        "ohlcv": ("{lowercaseId}@kline_{interval}",),
    },
    socket_limits=dict.fromkeys(MARKET_TYPES, BINANCE_SOCKET_LIMITS),
    connection_limit=(300, 300),
    book_depth=100,
    unsubscribe=binance_unsubscribe,
    closed_candle=binance_closed_candle,
    wire_candles=binance_wire_candles,
    candle_time="E",
    find_refusal=binance_refusal,
    last_trade_fields=("closeTime", "C"),
    separate_rest_top_types=frozenset({"swap"}),
    separate_top_types=frozenset({"swap"}),
    numbers_per_socket=True,
    # The default ticker stream of ccxt has no bid and ask. By default ccxt spreads subscriptions
    # over fifty sockets, and its limit counts subscriptions that have ended. Aggregate trades are
    # those of REST, with the same ids, and the only stream of trades that is documented for swaps.
    socket_options={
        "watchTickers": {"name": "ticker"},
        "watchTradesForSymbols": {"name": "aggTrade"},
        "streamLimits": {"spot": 1, "linear": 1},
        "subscriptionLimitByStream": {"spot": 10**9, "linear": 10**9},
    },
    spot_socket_path="/stream/ws",
)

# The socket's version 2 has these names for them; `wsname` in the market list is of version 1.
KRAKEN_RENAMED = {"XBT": "BTC", "XDG": "DOGE"}


def kraken_ws_name(market: Mapping[str, Any]) -> str:
    """Return `wsname` with the names of version 2. ccxt's symbols have other names, as for LUNA."""
    base, slash, quote = str(market["info"].get("wsname") or market["symbol"]).partition("/")
    return KRAKEN_RENAMED.get(base, base) + slash + KRAKEN_RENAMED.get(quote, quote)


KRAKEN_CHANNELS = {"ticker": "ticker", "orderbook": "book", "trades": "trade", "ohlcv": "ohlc"}
KRAKEN_BOOK_DEPTH = 100
# By default Kraken pushes a ticker only after a trade. The documentation requires the same
# parameters for the unsubscription.
KRAKEN_WATCH_PARAMS: dict[str, dict[str, Any]] = {
    "ticker": {"event_trigger": "bbo"},
    "orderbook": {"depth": KRAKEN_BOOK_DEPTH},
}


def kraken_unsubscribe(
    kind: str, topics: Sequence[str], number: int, interval: str
) -> dict[str, Any]:
    """Return Kraken's message."""
    params: dict[str, Any] = {"channel": KRAKEN_CHANNELS[kind], "symbol": topics}
    params |= KRAKEN_WATCH_PARAMS.get(kind, {})
    if interval:
        params["interval"] = int(interval)
    return {"method": "unsubscribe", "params": params, "req_id": number}


def kraken_decimals(market: Mapping[str, Any]) -> tuple[int, int] | None:
    """Return the decimals of prices and amounts."""
    info = market["info"]
    if "pair_decimals" not in info or "lot_decimals" not in info:
        return None
    return int(info["pair_decimals"]), int(info["lot_decimals"])


def kraken_book_update(message: Mapping[str, Any]) -> BookUpdate | None:
    """Read the checksum of an order book message."""
    if message.get("channel") != "book":
        return None
    book = message["data"][0]
    is_snapshot = message["type"] == "snapshot"
    checksum, time = book.get("checksum"), book.get("timestamp", "")
    return BookUpdate(book["symbol"], is_snapshot, checksum=checksum, time=time)


def kraken_refusal(message: Mapping[str, Any]) -> Refusal | None:
    """Find an error such as `{"error":"Currency pair not supported A/B","symbol":"A/B",...}`."""
    is_refused = message.get("method") == "subscribe" and message.get("success") is False
    return Refusal(symbol=str(message.get("symbol", ""))) if is_refused else None


# Kraken documents no limits of messages and symbols.
KRAKEN_SOCKET_LIMITS = SocketLimits()

# https://docs.kraken.com/api/docs/guides/spot-errors. These arrive with HTTP status 200. OHLC and
# Trades are limited by address and pair (ccxt #20648); a lockout lasts 15 minutes. Cloudflare's
# pages, in front of the exchange: 1015 is its rate limit, 1020 and challenges are its firewall.
KRAKEN_RULES = (
    ErrorRule("exchange_rate_limited", rb"eapi:rate limit exceeded", pause_seconds=15),
    ErrorRule(
        "exchange_rate_limited", rb"egeneral:too many requests", scope=MARKET, pause_seconds=5
    ),
    ErrorRule("exchange_rate_limited", rb"eservice: ?throttled(?:: ?(\d{10,13})\b)?"),
    ErrorRule("exchange_banned", rb"egeneral:temporary lockout", pause_seconds=900),
    ErrorRule("unknown_symbol", rb"equery:(?:unknown|invalid) asset", scope=MARKET),
    ErrorRule("market_halted", rb"eservice: ?market", scope=MARKET, pause_seconds=60),
    ErrorRule("exchange_timeout", rb"eservice: ?timeout"),
    ErrorRule("exchange_unavailable", rb"eservice: ?(?:unavailable|busy)"),
    ErrorRule("request_rejected", rb"egeneral:invalid arguments", scope=CALL),
    ErrorRule("exchange_rate_limited", rb"error code:? ?(?:<span>)?1015", pause_seconds=60),
    ErrorRule(
        "exchange_rate_limited",
        rb"error code:? ?(?:<span>)?1020|just a moment|attention required",
        status=403,
        pause_seconds=300,
    ),
)

KRAKEN = Profile(
    name="kraken",
    ccxt_class="kraken",
    # Kraken documents no budget. Callers measure about one call per second; the burst of 5 admits a
    # cold batch without a higher mean.
    default_budget="5/5",
    # Orders rest in the book with each of these statuses, so bid and ask are live. In cancel_only,
    # which is also that of maintenance, the book can only shrink.
    quoted_statuses=frozenset({"online", "post_only", "limit_only", "reduce_only"}),
    ended_statuses=frozenset({"delisted"}),
    error_rules=KRAKEN_RULES,
    has_partial_errors=True,
    proofs=dict.fromkeys(("orderbook", "ohlcv", "trades"), b'"%s":'),
    candle_page=720,
    max_candles_back=720,
    week_offset_seconds=0,  # Thursday
    ws_name=kraken_ws_name,
    has_own_symbols=True,
    decimals=kraken_decimals,
    topics=dict.fromkeys(KRAKEN_CHANNELS, ("{symbol}",)),
    socket_limits=dict.fromkeys(MARKET_TYPES, KRAKEN_SOCKET_LIMITS),
    connection_limit=(150, 600),  # "approximately", by its CDN
    watch_params=KRAKEN_WATCH_PARAMS,
    candle_time="timestamp",
    ticker_time="timestamp",
    # `o` is the open of the day that began at 00:00 UTC, and ccxt computes the others from it.
    undefined_rest_fields=("open", "change", "percentage", "average"),
    book_depth=KRAKEN_BOOK_DEPTH,
    unsubscribe=kraken_unsubscribe,
    find_book_update=kraken_book_update,
    find_refusal=kraken_refusal,
)

PROFILES = {profile.name: profile for profile in (BYBIT, BINANCE, KRAKEN)}
