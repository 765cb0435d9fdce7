"""The public REST APIs of the exchanges, as far as clients may use them through the gateway.

One `WireApi` per exchange lists its paths with their request weights and TTLs, and has the
exchange's own words for a refusal. It is the raw part of the exchange's profile.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import orjson

from src.core.models import TIMEFRAMES

Params = Mapping[str, str]
Weight = Callable[[Params], int]
"""Returns the request weight of a call, given its parameters."""
ANY_NAME = re.compile(r"[A-Za-z0-9_-]{1,40}(/[A-Za-z0-9_-]{1,40})?")
NO_BODY = re.compile(rb"(?!)")  # matches nothing: every error has a status of its own
MINUTES = {str(seconds // 60): name for name, seconds in TIMEFRAMES.items()}
NEVER = 0.0  # TTL of answers that are never cached
VALUE_SECONDS = 5.0  # TTL of values without a setting
LIST_SECONDS = 60.0  # TTL of market lists, and of series with a value every few minutes
MAX_DIGITS = 15


@dataclass(frozen=True, slots=True)
class WirePath:
    """A path of an exchange's API that clients may request."""

    kind: str = ""
    """The kind of data: its setting is the TTL, and its endpoint shares pauses. Empty: neither."""
    weight: int | Weight = 1
    ttl: float = VALUE_SECONDS
    """Seconds, if there is no kind."""
    is_swap: bool = False
    """True if the calls use the budget of swaps."""

    @property
    def is_cached(self) -> bool:
        """True if answers are kept."""
        return bool(self.kind) or self.ttl != NEVER

    def weight_of(self, params: Params) -> int:
        """Return the documented request weight."""
        return self.weight if isinstance(self.weight, int) else self.weight(params)


class Refusal(NamedTuple):
    """What an exchange, or the proxy in front of it, answers when it refuses a request."""

    status: int
    body: Mapping[str, Any] | str

    @property
    def media_type(self) -> str:
        """The media type of the body."""
        return "text/plain" if isinstance(self.body, str) else "application/json"

    def dump(self) -> bytes:
        """Return the body as it is sent."""
        return self.body.encode() if isinstance(self.body, str) else orjson.dumps(self.body)


# In the words of the proxies in front of the exchanges.
TIMED_OUT = Refusal(504, "Gateway Timeout")
UNAVAILABLE = Refusal(503, "Service Unavailable")


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusals:
    """The refusals of an exchange, by what the gateway's error means."""

    unknown_symbol: Refusal
    request_rejected: Refusal
    rate_limited: Refusal
    banned: Refusal
    timed_out: Refusal = TIMED_OUT
    unavailable: Refusal = UNAVAILABLE

    def find(self, code: str) -> Refusal:
        """Return the refusal for the code of a gateway's error."""
        match code:
            case "unknown_symbol" | "market_halted":
                return self.unknown_symbol
            case "request_rejected":
                return self.request_rejected
            case "budget_spent" | "overloaded" | "exchange_rate_limited":
                return self.rate_limited
            case "exchange_banned":
                return self.banned
            case "exchange_timeout" | "deadline_exceeded":
                return self.timed_out
        return self.unavailable


class CandleNames(NamedTuple):
    """The parameters of requests for candles."""

    start: str
    end: str
    default_limit: int
    max_limit: int


@dataclass(frozen=True, slots=True, kw_only=True)
class WireApi:
    """The public API of an exchange."""

    hosts: Mapping[str, str]
    """Beginning of a path -> URL of the host; the first that matches."""
    paths: Mapping[str, WirePath]
    """Path -> rules. The last segment `*` stands for any name."""
    market_param: str = "symbol"
    """The parameter with the exchange's id of a market."""
    swap_categories: frozenset[str] = frozenset()
    """Values of the parameter `category` with which a request is about swaps."""
    error: re.Pattern[bytes] = NO_BODY
    """Matches the beginning of a body that is an error although its status is 200."""
    intervals: Mapping[str, str]
    """The exchange's name of a length of candles -> that of `/ohlcv`."""
    candle_names: CandleNames | None = None
    """None if an answer always has the newest candles."""
    candle_rows: Callable[[Any], Sequence[Any]]
    """Returns the rows of a parsed answer, oldest first; the first member is the start."""
    candle_document: Callable[[Any, Sequence[Any], int], Any] | None = None
    """Returns a parsed answer with other rows, given the exchange's time of the newest one (UTC
    ms). None if streams have other digits than the REST API."""
    series_paths: frozenset[str] = frozenset()
    """Paths whose candles the kline streams have, too."""
    candle_unit: int = 1
    """Milliseconds of the unit of the starts."""
    refusals: Refusals
    limit_fields: Callable[[int, int, int], Mapping[str, int]] = lambda _, __, ___: {}
    """Returns the exchange's header fields, given the used weight, the limit and the end of the
    window (UTC ms)."""

    def find(self, path: str) -> tuple[str, WirePath] | None:
        """Return the template and the rules of a path. None if clients may not request it."""
        if path in self.paths:
            return path, self.paths[path]
        for template, rules in self.paths.items():
            prefix = template.removesuffix("*")
            name = path.removeprefix(prefix)
            if prefix != template and name != path and ANY_NAME.fullmatch(name):
                return template, rules
        return None

    def host_of(self, path: str) -> str:
        """Return the URL of the host that serves a path."""
        return next(url for prefix, url in self.hosts.items() if path.startswith(prefix))


def number(params: Params, name: str, default: int) -> int:
    """Return a whole number of the parameters. The exchange judges anything else."""
    text = params.get(name, "")
    return int(text) if text.isascii() and text.isdigit() and len(text) <= MAX_DIGITS else default


def _by_limit(default: int, steps: Mapping[int, int]) -> Weight:
    """Return the weight of the first step (rows -> weight) that has so many rows."""

    def weight(params: Params) -> int:
        rows = number(params, "limit", default)
        return next((value for most, value in steps.items() if rows <= most), max(steps.values()))

    return weight


def _by_symbols(one: int, every: int, steps: Mapping[int, int] | None = None) -> Weight:
    """Return the weight of one symbol, of a list (symbols -> weight), or of all symbols."""

    def weight(params: Params) -> int:
        if params.get("symbol"):
            return one
        symbols = params.get("symbols", "").count('"') // 2
        known = (steps or {}).items()
        return next((value for most, value in known if 0 < symbols <= most), every)

    return weight


def _per_symbol(params: Params) -> int:
    """Return 4 per symbol, up to 200."""
    return min(200, 4 * max(1, params.get("symbols", "").count('"') // 2))


# https://developers.binance.com/docs/binance-spot-api-docs/rest-api/market-data-endpoints and
# https://developers.binance.com/docs/derivatives/usds-margined-futures/market-data/rest-api
_swap = partial(WirePath, is_swap=True)
_swap_klines = _by_limit(500, {99: 1, 499: 2, 1000: 5, 1500: 10})
BINANCE_PATHS = {
    "api/v3/ping": WirePath(ttl=NEVER),
    "api/v3/time": WirePath(ttl=NEVER),
    "api/v3/exchangeInfo": WirePath(ttl=LIST_SECONDS, weight=20),
    "api/v3/depth": WirePath("orderbook", _by_limit(100, {100: 5, 500: 25, 1000: 50, 5000: 250})),
    "api/v3/trades": WirePath("trades", 25),
    "api/v3/aggTrades": WirePath("trades", 4),
    "api/v3/klines": WirePath("ohlcv", 2),
    "api/v3/uiKlines": WirePath("ohlcv", 2),
    "api/v3/avgPrice": WirePath("ticker", 2),
    "api/v3/ticker": WirePath("ticker", _per_symbol),
    "api/v3/ticker/24hr": WirePath("ticker", _by_symbols(2, 80, {20: 2, 100: 40})),
    "api/v3/ticker/tradingDay": WirePath("ticker", _per_symbol),
    "api/v3/ticker/price": WirePath("ticker", _by_symbols(2, 4)),
    "api/v3/ticker/bookTicker": WirePath("ticker", _by_symbols(2, 4)),
    "sapi/v1/system/status": WirePath(),
    "fapi/v1/ping": _swap(ttl=NEVER),
    "fapi/v1/time": _swap(ttl=NEVER),
    "fapi/v1/exchangeInfo": _swap(ttl=LIST_SECONDS),
    "fapi/v1/depth": _swap("orderbook", _by_limit(500, {50: 2, 100: 5, 500: 10, 1000: 20})),
    "fapi/v1/trades": _swap("trades", 5),
    "fapi/v1/aggTrades": _swap("trades", 20),
    "fapi/v1/klines": _swap("ohlcv", _swap_klines),
    "fapi/v1/continuousKlines": _swap("ohlcv", _swap_klines),
    "fapi/v1/indexPriceKlines": _swap("ohlcv", _swap_klines),
    "fapi/v1/markPriceKlines": _swap("ohlcv", _swap_klines),
    "fapi/v1/premiumIndexKlines": _swap("ohlcv", _swap_klines),
    "fapi/v1/ticker/24hr": _swap("ticker", _by_symbols(1, 40)),
    "fapi/v1/ticker/price": _swap("ticker", _by_symbols(1, 2)),
    "fapi/v2/ticker/price": _swap("ticker", _by_symbols(1, 2)),
    "fapi/v1/ticker/bookTicker": _swap("ticker", _by_symbols(2, 5)),
    "fapi/v1/premiumIndex": _swap("", _by_symbols(1, 10)),
    "fapi/v1/fundingInfo": _swap(ttl=LIST_SECONDS),
    "fapi/v1/fundingRate": _swap(ttl=LIST_SECONDS),
    "fapi/v1/openInterest": _swap(),
    "futures/data/*": _swap(ttl=LIST_SECONDS),
}


def _binance_refusal(status: int, code: int, text: str) -> Refusal:
    return Refusal(status, {"code": code, "msg": text})


# https://developers.binance.com/docs/binance-spot-api-docs/errors
BINANCE = WireApi(
    hosts={"f": "https://fapi.binance.com", "": "https://api.binance.com"},
    paths=BINANCE_PATHS,
    intervals=dict(zip(TIMEFRAMES, TIMEFRAMES, strict=True)),
    candle_names=CandleNames("startTime", "endTime", 500, 1000),
    candle_rows=lambda document: document,
    candle_document=lambda _document, rows, _time: rows,
    series_paths=frozenset({"api/v3/klines", "fapi/v1/klines"}),
    refusals=Refusals(
        unknown_symbol=_binance_refusal(400, -1121, "Invalid symbol."),
        request_rejected=_binance_refusal(400, -1100, "Illegal characters found in a parameter."),
        rate_limited=_binance_refusal(429, -1003, "Too many requests."),
        banned=_binance_refusal(418, -1003, "Way too many requests; IP banned."),
        timed_out=_binance_refusal(504, -1007, "Timeout waiting for response from backend server."),
        unavailable=_binance_refusal(503, 0, "Service Unavailable."),
    ),
    limit_fields=lambda used, _limit, _end: {"x-mbx-used-weight-1m": used},
)

# https://bybit-exchange.github.io/docs/v5/market: every call counts as one.
BYBIT_PATHS = {
    "v5/market/time": WirePath(ttl=NEVER),
    "v5/market/kline": WirePath("ohlcv"),
    "v5/market/mark-price-kline": WirePath("ohlcv"),
    "v5/market/index-price-kline": WirePath("ohlcv"),
    "v5/market/premium-index-price-kline": WirePath("ohlcv"),
    "v5/market/instruments-info": WirePath(ttl=LIST_SECONDS),
    "v5/market/orderbook": WirePath("orderbook"),
    "v5/market/tickers": WirePath("ticker"),
    "v5/market/recent-trade": WirePath("trades"),
    "v5/market/funding/history": WirePath(ttl=LIST_SECONDS),
    "v5/market/open-interest": WirePath(ttl=LIST_SECONDS),
    "v5/market/account-ratio": WirePath(ttl=LIST_SECONDS),
    "v5/market/*": WirePath(),
    "v5/system/status": WirePath(),
}


def _bybit_refusal(code: int, text: str) -> Refusal:
    return Refusal(200, {"retCode": code, "retMsg": text, "result": {}, "retExtInfo": {}})


def _bybit_limit_fields(used: int, limit: int, end: int) -> Mapping[str, int]:
    return {
        "x-bapi-limit": limit,
        "x-bapi-limit-status": max(0, limit - used),
        "x-bapi-limit-reset-timestamp": end,
    }


def _bybit_candles(document: Any, rows: Sequence[Any], time: int) -> Any:
    """Replace the rows, which are newest first, and the time of the answer."""
    result = document["result"] | {"list": rows[::-1]}
    return document | {"result": result, "time": time}


# https://bybit-exchange.github.io/docs/v5/error
BYBIT = WireApi(
    hosts={"": "https://api.bybit.com"},
    paths=BYBIT_PATHS,
    swap_categories=frozenset({"linear", "inverse"}),
    error=re.compile(rb'\{"retCode": ?(?!0\b)'),
    intervals=MINUTES | {"D": "1d", "W": "1w"},
    candle_names=CandleNames("start", "end", 200, 1000),
    candle_rows=lambda document: document["result"]["list"][::-1],
    candle_document=_bybit_candles,
    series_paths=frozenset({"v5/market/kline"}),
    refusals=Refusals(
        unknown_symbol=_bybit_refusal(10001, "Not supported symbols"),
        request_rejected=_bybit_refusal(10001, "params error"),
        rate_limited=_bybit_refusal(10006, "Too many visits!"),
        banned=_bybit_refusal(10006, "Too many visits!"),
    ),
    limit_fields=_bybit_limit_fields,
)

# https://docs.kraken.com/api/docs/category/rest-api/market-data
KRAKEN_PATHS = {
    "0/public/Time": WirePath(ttl=NEVER),
    "0/public/AssetPairs": WirePath(ttl=LIST_SECONDS),
    "0/public/Assets": WirePath(ttl=LIST_SECONDS),
    "0/public/Ticker": WirePath("ticker"),
    "0/public/OHLC": WirePath("ohlcv"),
    "0/public/Depth": WirePath("orderbook"),
    "0/public/Trades": WirePath("trades"),
    "0/public/*": WirePath(),
}


def _kraken_refusal(text: str) -> Refusal:
    return Refusal(200, {"error": [text]})


def _kraken_rows(document: Any) -> Sequence[Any]:
    rows: list[Sequence[Any]] = [
        rows for name, rows in document["result"].items() if name != "last"
    ]
    return rows[0] if rows else ()


# https://docs.kraken.com/api/docs/guides/spot-errors. Kraken sends the newest candles whatever
# `since` is. Beside the rows of known pairs, an error is about the others.
KRAKEN = WireApi(
    hosts={"": "https://api.kraken.com"},
    paths=KRAKEN_PATHS,
    market_param="pair",
    error=re.compile(rb'\{\s*"error":\s*\[\s*"(?!.{0,2000}"result":\s*\{\s*")'),
    intervals=MINUTES,
    candle_rows=_kraken_rows,
    candle_unit=1000,
    refusals=Refusals(
        unknown_symbol=_kraken_refusal("EQuery:Unknown asset pair"),
        request_rejected=_kraken_refusal("EGeneral:Invalid arguments"),
        rate_limited=_kraken_refusal("EAPI:Rate limit exceeded"),
        banned=_kraken_refusal("EAPI:Rate limit exceeded"),
        unavailable=_kraken_refusal("EService:Unavailable"),
    ),
)

WIRE_APIS = {"bybit": BYBIT, "binance": BINANCE, "kraken": KRAKEN}
